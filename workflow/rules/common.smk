"""Constants, wildcard constraints and input functions; no rules."""

import dataclasses
import pathlib
import sys

from mia import attacks, walks
from mia.config import (
    STAGES,
    UNTUNED,
    FeaturesOptions,
    checked,
    flags,
    repeated,
    sources,
)
from mia.errors import UserError

try:
    checked(config)
except UserError as problem:
    sys.exit(f"error: {problem}")

# glibc would give large buffers back to the kernel after every layer: a tenth of the time of the toy networks on CPU.
shell.prefix(
    "set -euo pipefail; export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824; "
)

RESULTS = f"results/{config['name']}"
LOGS = f"{RESULTS}/logs"
SEED = config["seed"]
SHARDS = range(config["shards"])
EXECUTION = config["execution"]
CUDA = EXECUTION["device"].startswith("cuda")
GPUS = len(EXECUTION["device"].split(",")) if CUDA else 0
CPU_ENV = "../../envs/cpu.yaml"
MODEL_ENV = "../../envs/gpu.yaml" if CUDA else CPU_ENV
SOURCES = sources(config)
SPLIT = "sanitized"
ATTACKED = f"{RESULTS}/attacked/{SPLIT}.parquet"
MODELS = config.get("train", {}).get("models", {})
TARGETS = config["targets"]
MAIN = next(name for name, target in TARGETS.items() if target["role"] == "main")
CONTROLS = [
    name for name, target in TARGETS.items() if target["role"] == "negative_control"
]
COMPARED = [name for name, target in TARGETS.items() if target["role"] != "checkpoint"]


wildcard_constraints:
    shard=r"\d+",
    pool="|".join(SOURCES),
    number=r"\d+",
    split="collected|sanitized|unsanitized|attacked",
    model="|".join(MODELS) or "none",
    target="|".join(TARGETS),
    block=r"noised|clean|prompts|crops|gradients|generations|variations|start-[\d.a-z-]+",


def version(stage):
    return UNTUNED[stage] if stage in UNTUNED else STAGES[stage].version


def all_shards(pattern):
    return [f"{RESULTS}/{pattern}".format(shard=shard) for shard in SHARDS]


def source_of(wildcards):
    """The source, `file` and `columns`, that a job of `select` reads."""
    return SOURCES[wildcards.pool][int(wildcards.number)]


def local_source_of(wildcards):
    """A local source is an input. One on the hub is not: its commit, a parameter, pins it, and the job fetches it."""
    file = source_of(wildcards)["file"]
    return [] if file.startswith("hf:") else [file]


def pool_files(pool, pattern="selected/{pool}/{number}.parquet"):
    """What `metadata` reads of a pool: what `select` made of its sources, or without that section these themselves."""
    given = SOURCES.get(pool, [])
    if "select" not in config:
        return (
            [source["file"] for source in given]
            if pattern.startswith("selected")
            else []
        )
    return [
        f"{RESULTS}/{pattern}".format(pool=pool, number=n) for n in range(len(given))
    ]


def earlier_images(wildcards):
    """The same shard of an earlier run, if there is one: rows that are final are taken over from it."""
    folder = config["images"].get("previous")
    if folder and pathlib.Path(folder) == pathlib.Path(f"{RESULTS}/images"):
        sys.exit(
            "error: config.yaml: images.previous: is this run's own folder; give another run's, or none"
        )
    return [f"{folder}/{wildcards.shard}.parquet"] if folder else []


def references_of(wildcards):
    """Published embeddings are dealt out to the shards' jobs, so that there are as many jobs as shards."""
    return config["neighbours"].get("references", [])[
        int(wildcards.shard) :: len(SHARDS)
    ]


def reference_metadata_of(wildcards):
    """Beside `img_emb_N.npy` its `metadata_N.parquet`, so that a change of it reruns the search."""
    folder = config["neighbours"].get("reference_metadata")
    files = [pathlib.Path(path) for path in references_of(wildcards)]
    numbers = [
        file.stem.removeprefix("img_emb_") for file in files if file.suffix == ".npy"
    ]
    return [f"{folder}/metadata_{number}.parquet" for number in numbers if folder]


def shards_to_meet(wildcards):
    """The half of the other shards that a job of `links` holds its own against, so that every two meet in one job."""
    own, count = int(wildcards.shard), len(SHARDS)
    steps = [
        step for step in range(1, count // 2 + 1) if 2 * step < count or own < step
    ]
    return [f"{RESULTS}/embeddings/{(own + step) % count}.parquet" for step in steps]


def text_encoder_of(wildcards):
    """The manifest whose text encoder sanitization needs, where its method needs one."""
    method = config["sanitize"].get("method", STAGES["sanitize"].method)
    needed = wildcards.split == SPLIT and method in ("paper", "crossfitted")
    return [f"{RESULTS}/targets/{MAIN}.json"] if needed else []


def measured(wildcards):
    """What stands behind `distance/<split>`: a dataset, or, as `collected`, all that dedup saw."""
    return (
        f"{RESULTS}/duplicates.parquet"
        if wildcards.split == "collected"
        else f"{RESULTS}/dataset/{wildcards.split}.parquet"
    )


def audited(wildcards):
    """The dataset behind `audit/<split>`: a whole split, or the samples under attack, for the blind baselines."""
    return (
        ATTACKED
        if wildcards.split == "attacked"
        else f"{RESULTS}/dataset/{wildcards.split}.parquet"
    )


def settings_of(target):
    return TARGETS[target].get("settings", config["features"]["settings"])


def jobs_of(target):
    """Block -> its options: what the target's settings and attacks need, so that adding one reruns no other block."""
    section = config["features"] | TARGETS[target]
    wanted = config["scores"] | TARGETS[target]
    probes = [p for p in attacks.probes(wanted["attacks"]) if p != "settings"]
    fields = {f.name for f in dataclasses.fields(FeaturesOptions)}
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in section.items()
        if name in fields
    }
    more = section.get("probes", [])
    return walks.jobs(
        FeaturesOptions(**options | {"probes": tuple(dict.fromkeys([*probes, *more]))})
    )


def captions_of(wildcards):
    """The captions, where a block puts them through the text encoder anew."""
    captioned = wildcards.block in ("prompts", "generations", "variations")
    return [f"{RESULTS}/attacked/{SPLIT}.selection.parquet"] if captioned else []


def options_of(stage, target, **more):
    """A stage's flags for one target: what the target's own entry says goes before the stage's section."""
    return flags(stage, config[stage] | TARGETS[target] | more)


def encoders_of(target):
    return TARGETS[target].get("encoders_of", target)


def trained_folder(wildcards):
    """What a target waits for: the folders the training rule makes in which its source, unet or lora lies, if any."""
    target = TARGETS[wildcards.target]
    places = [
        pathlib.PurePath(target.get(key, "")) for key in ("source", "unet", "lora")
    ]
    folders = [f"{RESULTS}/models/{model}" for model in MODELS]
    return [f for f in folders if any(place.is_relative_to(f) for place in places)]


def features_of(wildcards):
    return [
        f"{RESULTS}/features/{wildcards.target}/{block}/{shard}.parquet"
        for block in jobs_of(wildcards.target)
        for shard in SHARDS
    ]


def column_flags(columns):
    return repeated(
        "--column", [f"{ours}={theirs}" for ours, theirs in columns.items()]
    )


def listed(values):
    return ",".join(str(value) for value in values)
