"""Options of every stage, in data-flow order, and the check of `config.yaml` against its schema.

A stage's section of `config.yaml`, its flags on the command line and its frozen dataclass here are the same names: a
test holds the three, and the defaults, together. `version` is raised whenever a stage's result changes for the same
input and options; it stands in the rule's parameters, so raising it reruns the stage and all that follows.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import yaml

from mia.attacks import REGISTRY
from mia.errors import UserError

SCHEMA = pathlib.Path(__file__).parent.parent / "workflow" / "schemas" / "config.schema.yaml"


@dataclasses.dataclass(frozen=True)
class SelectionOptions:
    """Which rows of one source file stay: by cheap columns, language, and at most so many at random (0: all).

    A row that lacks a value passes the filter on it. `languages` empty admits every language; `detect_language` detects
    it in the caption even where the source names one.
    """

    version: ClassVar[int] = 2
    languages: tuple[str, ...] = ()
    detect_language: bool = False
    min_aesthetic: float = -1e9
    min_similarity: float = -1.0
    max_punsafe: float = 1.0
    max_pwatermark: float = 1.0
    min_side_px: int = 0
    max_aspect_ratio: float = 1e9
    max_rows: int = 0


@dataclasses.dataclass(frozen=True)
class MetadataOptions:
    """Which rows of the sources are worth a download. Empty `languages` admits every language."""

    version: ClassVar[int] = 2
    languages: tuple[str, ...] = ()
    min_aesthetic: float = 0.0
    min_side_px: int = 0
    max_aspect_ratio: float = 1e9
    min_caption_chars: int = 1
    max_rows_per_pool: int = 0


@dataclasses.dataclass(frozen=True)
class ImagesOptions:
    """What may be fetched and what is taken for an image."""

    version: ClassVar[int] = 2
    allow_local_files: bool = False
    allow_private_hosts: tuple[str, ...] = ()
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_redirects: int = 5


@dataclasses.dataclass(frozen=True)
class EmbeddingsOptions:
    """The open_clip model: `local-dir:FOLDER` or `hf-hub:NAME`, with its weights in safetensors."""

    version: ClassVar[int] = 2
    model: str = ""


@dataclasses.dataclass(frozen=True)
class NeighboursOptions:
    """How many of the nearest training images are kept, and from how many on the search may be approximate.

    A job with more than `exact_below` vectors to search looks into `probes` of 1,024 cells only (faiss IVF). Then
    `recall_queries` are searched exactly as well, and how often their nearest was found stands in the table's metadata.
    """

    version: ClassVar[int] = 1
    k: int = 1
    exact_below: int = 10_000_000
    probes: int = 32
    recall_queries: int = 500


@dataclasses.dataclass(frozen=True)
class DedupOptions:
    """A candidate closer than this to a member is a duplicate. Source: arXiv 2306.12983, L2 < 0.5 of unit CLIP.

    Options and version of `matches`, `links` and `dedup`, which are one stage in three jobs.
    """

    version: ClassVar[int] = 2
    max_distance: float = 0.5
    max_hamming: int = 6


@dataclasses.dataclass(frozen=True)
class SanitizeOptions:
    """Method, its strength, and how the finished dataset is cut.

    `matched` is ours (`mia/matching.py`): at most `max_rounds`, each taking the part `step` of the log-odds away, as
    long as `min_keep` of the smaller side stay, then pairs within `caliper` log-odds; it balances what `views` name, as
    far as it is there. `paper` is the authors' procedure
    on chunks of members (`laion-mi/` of arXiv 2306.12983), `crossfitted` its classifiers for pools too small for that.
    """

    version: ClassVar[int] = 5
    method: str = "matched"
    views: tuple[str, ...] = ("caption", "image", "metadata")
    folds: int = 5
    max_rounds: int = 15
    step: float = 0.3
    min_keep: float = 0.75
    caliper: float = 0.25
    chunk: int = 40_000
    keep_above: float = 0.5
    hidden_scale: float = 1.0
    batch_scale: float = 1.0
    learning_rate_scale: float = 1.0
    max_epochs: int = 100
    max_per_side: int = 0
    calibration_fraction: float = 0.5


@dataclasses.dataclass(frozen=True)
class DistanceOptions:
    """How many shufflings of the labels stand for chance, and of how many rows (0: all), whole groups at random."""

    version: ClassVar[int] = 3
    permutations: int = 200
    max_rows: int = 20_000


@dataclasses.dataclass(frozen=True)
class AuditOptions:
    """Which kinds of feature the blind classifiers see, the folds within calibration, and how many features to name.

    `sentence_model` is a folder with a transformers text encoder (safetensors); captions are embedded with it if given.
    """

    version: ClassVar[int] = 2
    features: tuple[str, ...] = ("caption", "image", "metadata", "agreement")
    folds: int = 5
    top_features: int = 20
    sentence_model: str = ""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """A small UNet trained on one pool, as DDPM trains: noise prediction, uniform timesteps, mean squared error."""

    version: ClassVar[int] = 1
    pool: str = "member"
    checkpoints: tuple[int, ...] = (0, 1000)
    max_images: int = 0
    learning_rate: float = 1e-3
    train_batch_size: int = 64
    caption_dropout: float = 0.1
    block_out_channels: tuple[int, ...] = (32, 64)


@dataclasses.dataclass(frozen=True)
class LatentsOptions:
    """Nothing to choose yet but the version: the VAE's posterior is stored whole, mean and log-variance."""

    version: ClassVar[int] = 2


@dataclasses.dataclass(frozen=True)
class FeaturesOptions:
    """What is read off the model: settings by number, probes, losses, draws, and the precision the networks run in.

    `latent_shift_index` and `latent_shift_by` say before which step setting 3 adds noise to its latent and with what
    standard deviation; `text_shift_scale` multiplies the shifts of the text states in settings 4, 5 and 8. `crops` are
    the parts of the side, in percent, that are kept. `posterior` is `mode`, or `sample` for a z0 of each draw's own, as
    the paper has it. Gradients are taken at `gradient_timesteps`. `variations` of each image and `generations` of each
    caption are asked of the target itself, in `generation_steps`, or of the HTTP `service`; no more than `query_budget`
    for each shard, if it is not 0.
    """

    version: ClassVar[int] = 3
    settings: tuple[int, ...] = (18, 1, 15, 16)
    probes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ("model_loss", "latent_error", "pixel_error")
    draws: int = 5
    timesteps: str = "reconstructed"
    latent_shift_index: int = 13
    latent_shift_by: float = 1.0
    text_shift_scale: float = 1.0
    crops: tuple[int, ...] = (82,)
    posterior: str = "mode"
    gradient_timesteps: tuple[int, ...] = (1, 101, 201, 301, 401, 501, 601, 701, 801, 901)
    variations: int = 10
    generations: int = 3
    generation_steps: int = 50
    service: str = ""
    query_budget: int = 0
    dtype: str = "float32"
    tf32: bool = False


@dataclasses.dataclass(frozen=True)
class ScoresOptions:
    """Attacks that turn stored features into scores; folds and grids of the classifiers among them.

    `standardize` scales features for logistic regression and the neural net; the paper does not (arXiv 2306.12983).
    """

    version: ClassVar[int] = 4
    attacks: tuple[str, ...] = ("loss_threshold", "random_forest")
    folds: int = 5
    standardize: bool = True
    trees: tuple[int, ...] = (10, 100, 1000)
    max_depths: tuple[int, ...] = (2, 8, 16)


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """False-positive rates to report at, what intervals and p-values rest on, and the sizes of the other protocols."""

    version: ClassVar[int] = 2
    fpr_targets: tuple[float, ...] = (0.01, 0.001)
    confidence: float = 0.95
    bootstrap: int = 2000
    permutations: int = 1000
    crossfit_folds: int = 5
    paper_resamples: int = 100
    paper_size: int = 1000


@dataclasses.dataclass(frozen=True)
class InferOptions:
    """The one-sided test of a set, its power curve, and whether a verdict needs a guard against shift."""

    version: ClassVar[int] = 1
    method: str = "permutation"
    level: float = 0.01
    permutations: int = 9999
    power_sizes: tuple[int, ...] = (10, 20, 50, 100, 200, 500, 1000)
    power_draws: int = 200
    guard: bool = True


STAGES: dict[str, type] = {
    "select": SelectionOptions,
    "metadata": MetadataOptions,
    "images": ImagesOptions,
    "embeddings": EmbeddingsOptions,
    "neighbours": NeighboursOptions,
    "dedup": DedupOptions,
    "sanitize": SanitizeOptions,
    "distance": DistanceOptions,
    "audit": AuditOptions,
    "train": TrainOptions,
    "latents": LatentsOptions,
    "features": FeaturesOptions,
    "scores": ScoresOptions,
    "evaluation": EvaluationOptions,
}
UNTUNED = {"target": 2, "attrition": 1, "card": 1}  # versions of the stages that have no options
COMMANDS = STAGES | {"infer": InferOptions}  # what stands alone has no section in config.yaml
COMMIT_TO_FILL_IN = "COMMIT"  # stands in configurations of ours for a commit that only the hub can tell
_NOT_PARQUET = re.compile(r"hf:.*|.*\.(csv|tsv|json|jsonl|ndjson)(\.gz)?")
_PINNED = re.compile(r"hf://datasets/[^/@]+/[^/@]+@([0-9a-f]{40}|" + COMMIT_TO_FILL_IN + r")/.+")


def load(path: object) -> dict[str, Any]:
    """The checked configuration at `path`.

    Raises:
        UserError: the file is missing, is not YAML, or breaks the schema.
    """
    file = pathlib.Path(str(path))
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError("configuration cannot be read", file, str(problem)) from problem
    except yaml.YAMLError as problem:
        raise UserError(f"configuration is not YAML ({problem})", file, "mend its syntax") from problem
    return checked(config, file.name)


def checked(config: Any, where: str = "config.yaml") -> dict[str, Any]:
    """`config` itself when it keeps to the schema and its parts agree.

    Raises:
        UserError: names the key, its value, and how to mend it; a misspelt name is answered with the nearest valid one.
    """
    for error in sorted(_validator().iter_errors(config), key=lambda e: (len(e.absolute_path), str(e.absolute_path))):
        raise _explained(error, where)
    _check_sources(config, where)
    _check_references(config, where)
    _check_targets(config, where)
    _check_draws(config, where)
    return config


@functools.cache
def _validator() -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(yaml.safe_load(SCHEMA.read_text(encoding="utf-8")))


def _explained(error: Any, where: str) -> UserError:
    at = f"{where}{'' if where.startswith('--') else ': '}{_dotted(error.absolute_path)}".rstrip(": ")
    if error.validator == "additionalProperties":
        known = sorted(error.schema["properties"])
        name = next(key for key in error.instance if key not in known)
        return _wrong(at, f"unknown key '{name}'", f"use {_nearest(name, known)}")
    if error.validator == "required":
        name = next(key for key in error.validator_value if key not in error.instance)
        description = error.schema["properties"].get(name, {}).get("description", "")
        return _wrong(at, f"missing key '{name}'", f"add it: {description}")
    if error.validator == "enum":
        return _wrong(at, f"unknown value '{error.instance}'", f"use {_nearest(error.instance, error.validator_value)}")
    hint = error.schema.get("description", "")
    limits = {
        "minimum": f"{error.instance!r} is less than {error.validator_value}",
        "maximum": f"{error.instance!r} is greater than {error.validator_value}",
        "exclusiveMinimum": f"{error.instance!r} is not greater than {error.validator_value}",
        "exclusiveMaximum": f"{error.instance!r} is not less than {error.validator_value}",
        "type": f"{error.instance!r} is not of type {_either(error.validator_value)}",
    }
    return _wrong(at, limits.get(error.validator, error.message), hint)


def _either(kinds: object) -> str:
    return " or ".join(kinds) if isinstance(kinds, list) else str(kinds)


def _wrong(at: str, what: str, fix: str) -> UserError:
    return UserError(f"{at}: {what}" + (f"; {fix}" if fix else ""))


def _dotted(path: Any) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _nearest(name: object, known: Any) -> str:
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=3, cutoff=0.5)
    return " or ".join(f"'{c}'" for c in close) if close else "one of " + ", ".join(f"'{k}'" for k in known)


def sources(config: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Pool -> its sources in order, each with its `file`, local or on the hub, and `columns` (ours: the source's)."""
    section = config["metadata"]
    return {
        pool: [{"columns": section["columns"], **({"file": one} if isinstance(one, str) else one)} for one in given]
        for pool, given in section["sources"].items()
    }


def unpinned(config: Mapping[str, Any]) -> list[str]:
    """The hub's files whose commit has yet to be filled in; a run stops at them."""
    mark = f"@{COMMIT_TO_FILL_IN}/"
    return [one["file"] for given in sources(config).values() for one in given if mark in one["file"]]


def _check_sources(config: dict[str, Any], where: str) -> None:
    """A file of the hub is pinned; and only `select` reads one, or what is not Parquet, or columns of its own."""
    for pool, given in sources(config).items():
        for number, one in enumerate(given):
            at, file = f"{where}: metadata.sources.{pool}[{number}]", one["file"]
            if file.startswith("hf:") and not _PINNED.fullmatch(file):
                form = "hf://datasets/OWNER/NAME@COMMIT/FILE, its commit in 40 hex digits"
                raise _wrong(at, f"'{file}' is no pinned file of the hub", f"write {form}; see the dataset's history")
            named = one["columns"] != config["metadata"]["columns"]
            if "select" not in config and (named or _NOT_PARQUET.fullmatch(file)):
                what = "has columns of its own" if named else f"'{file}' is no local Parquet file"
                raise _wrong(at, what, "add the section `select`, if only as `select: {}`: it reads such sources")


def _check_references(config: dict[str, Any], where: str) -> None:
    """Arrays do not tell which model made them, and another model's vectors of the same width would pass unnoticed."""
    section, ours = config["neighbours"], config["embeddings"]["model"]
    arrays = [file for file in section.get("references", []) if file.endswith(".npy")]
    theirs = section.get("reference_model", "")
    if arrays and theirs != ours:
        what = f"'{theirs}' is not embeddings.model, '{ours}'" if theirs else f"not said for {arrays[0]}"
        fix = "name the encoder that made the references, LAION's by tag:ViT-L-14/openai, and embed with the same"
        raise _wrong(f"{where}: neighbours.reference_model", what, fix)


def _check_targets(config: dict[str, Any], where: str) -> None:
    """Folds agree; one target is attacked; none needs a setting that `features` lacks, or a target that is none."""
    mains = [name for name, target in config["targets"].items() if target["role"] == "main"]
    if len(mains) != 1:
        raise _wrong(f"{where}: targets", f"{len(mains)} targets have role 'main'", "give exactly one that role")
    if config["audit"].get("folds", AuditOptions.folds) != config["scores"].get("folds", ScoresOptions.folds):
        raise _wrong(f"{where}: audit.folds", "differs from scores.folds", "blind and supervised attacks share folds")
    requested = set(config["features"]["settings"])
    for name, target in config["targets"].items():
        lender = target.get("encoders_of", name)
        if lender not in config["targets"]:
            nearest = _nearest(lender, config["targets"])
            raise _wrong(f"{where}: targets.{name}.encoders_of", f"unknown target '{lender}'", f"use {nearest}")
        extra = sorted(set(target.get("settings", requested)) - requested)
        if extra:
            at = f"{where}: targets.{name}.settings"
            raise _wrong(at, f"setting {extra[0]} is not requested", "add it to features.settings")


def _check_draws(config: dict[str, Any], where: str) -> None:
    """No attack needs more draws of noise than are made."""
    made = config["features"].get("draws", FeaturesOptions.draws)
    asked = [config["scores"].get("attacks", ()), *(of.get("attacks", ()) for of in config["targets"].values())]
    for name in itertools.chain(*asked):
        if name in REGISTRY and REGISTRY[name].fewest_draws > made:
            what = f"{made} is too few for {name}, whose image and crop have noises of their own"
            raise _wrong(
                f"{where}: features.draws", what, f"make it {REGISTRY[name].fewest_draws}, or leave {name} out"
            )


def refuse_out_of_range(stage: str, values: Mapping[str, Any]) -> None:
    """Hold options that came as flags to what the schema says of those in `config.yaml`.

    Raises:
        UserError: names the flag, its value, and how to mend it.
    """
    import jsonschema

    section = _validator().schema["properties"].get(stage, {}).get("properties", {})
    section = section["models"]["additionalProperties"]["properties"] if stage == "train" else section
    for name, rule in section.items():
        if name in values:
            plain = list(values[name]) if isinstance(values[name], tuple) else values[name]
            for error in jsonschema.Draft202012Validator(rule).iter_errors(plain):
                raise _explained(error, f"--{flag_name(name)}")


def flag_name(option: str) -> str:
    """The flag, without dashes, of an option."""
    return {"fpr_targets": "fpr"}.get(option, option.replace("_", "-"))


def flags(stage: str, section: Mapping[str, Any]) -> str:
    """A section of the configuration as flags of `mia <stage>`, quoted for the shell; other keys are left out."""
    words = []
    for field in dataclasses.fields(STAGES[stage]):
        if field.name not in section:
            continue
        value, name = section[field.name], flag_name(field.name)
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            text = ",".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
            words += [f"--{name}", shlex.quote(text)]
    return " ".join(words)


NUMBERED = re.compile(r"(.*/)(0|[1-9][0-9]*)([.][a-z]+)")


def repeated(flag: str, values: Iterable[object]) -> str:
    """A flag once for each value, for bash; files numbered in order are one word, `flag=folder/{0..499}.parquet`.

    Written out, three lists of 900 shards do not fit the 128 KiB that Linux gives to one argument, and a job's whole
    command line is one.
    """
    words = []
    for run, grouped in itertools.groupby(enumerate(map(str, values)), lambda item: _run(*item)):
        items = list(grouped)
        if run is None or len(items) == 1:
            words += [f"{flag} {shlex.quote(text)}" for _, text in items]
        else:
            folder, suffix, ahead = run
            words.append(f"{flag}={shlex.quote(folder)}{{{items[0][0] + ahead}..{items[-1][0] + ahead}}}{suffix}")
    return " ".join(words)


def _run(place: int, path: str) -> tuple[str, str, int] | None:
    """What numbered files in one run have in common: folder, suffix, and how far the number is ahead of the place."""
    found = NUMBERED.fullmatch(path)
    return (found[1], found[3], int(found[2]) - place) if found else None
