"""`config.yaml`, its schema, the options and the flags: one set of names; and one clear line for every mistake."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from typing import Any

import click
import jsonschema
import pytest
import yaml

from mia import cli, config, scores, settings
from mia.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
OURS = [ROOT / "config.yaml", *sorted((ROOT / "workflow" / "config").glob("*.yaml"))]
SCHEMA = yaml.safe_load(config.SCHEMA.read_text())
GOOD = yaml.safe_load((ROOT / "config.yaml").read_text())
MODEL, ENCODER = next(iter(GOOD["train"]["models"])), GOOD["embeddings"]["model"]


def target_with(**wanted: Any) -> str:
    """The first target of the example that has these values; `...` asks for any."""
    for name, target in GOOD["targets"].items():
        if all(key in target and value in (target[key], ...) for key, value in wanted.items()):
            return name
    raise LookupError(wanted)


MAIN, CONTROL = target_with(role="main"), target_with(role="negative_control", encoders_of=...)
FIRST_PARTIAL = target_with(settings=...)
PARTIAL = target_with(settings=..., attacks=...)  # not all settings and attacks are for it
LEAST = min(set(GOOD["targets"][FIRST_PARTIAL]["settings"]) - {1})


def changed(*path: Any, to: Any) -> dict:
    """The good configuration with one value set; `to` is `...` to delete the key."""
    new = copy.deepcopy(GOOD)
    place = new
    for step in path[:-1]:
        place = place[step]
    if to is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return new


def refusal(wrong: Any) -> str:
    with pytest.raises(UserError) as caught:
        config.checked(wrong)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 2000
    return text


# ------------------------------------------------------------------------------------------------ good ones


@pytest.mark.parametrize("path", OURS, ids=str)
def test_a_configuration_of_ours_is_valid(path):
    assert config.load(path) == yaml.safe_load(path.read_text())


def test_the_example_uses_every_option_there_is():
    """design.md: config.yaml holds every option."""
    for stage, kind in config.STAGES.items():
        names = {field.name for field in dataclasses.fields(kind)}
        for section in sections(stage):
            assert names == names & set(section), stage


def test_every_option_of_the_example_has_a_place_in_data_flow_order():
    order = [name for name in GOOD if name in config.STAGES]
    assert order == [name for name in config.STAGES if name in order]


@pytest.mark.parametrize(
    "section",
    [{"references": ["x/img_emb_7.npy"], "reference_model": ENCODER}, {"references": ["own.parquet"]},
     {"reference_model": "tag:ViT-L-14/openai"}],
)  # fmt: skip
def test_references_of_our_own_encoder_pass_and_tables_which_name_theirs(section):
    assert config.checked(changed("neighbours", to=section))


@pytest.mark.parametrize("path", sorted((ROOT / "workflow" / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_that_speak_of_laions_embeddings_embed_with_the_encoder_of_these(path):
    """LAION made img_emb_N.npy with OpenAI's CLIP ViT-L/14."""
    found = config.load(path)
    assert "img_emb" in path.read_text()
    assert {found["embeddings"]["model"], found["neighbours"]["reference_model"]} == {"tag:ViT-L-14/openai"}
    config.checked(found | {"neighbours": found["neighbours"] | {"references": ["img_emb_0.npy"]}})


def select_section() -> dict:
    """The section of the example that stands there as a comment."""
    lines = (ROOT / "config.yaml").read_text().splitlines()
    first = lines.index("# select:")
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("#"))
    return yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines[first:last]))["select"]


def test_the_commented_section_holds_every_option_of_select_at_its_default():
    section = select_section()
    assert config.checked(changed("select", to=section))
    assert config.SelectionOptions(**section | {"languages": ()}) == config.SelectionOptions()
    assert list(section) == [field.name for field in dataclasses.fields(config.SelectionOptions)]


def test_sources_are_read_in_order_each_with_its_file_and_its_columns():
    own = {"url": "u", "caption": "c"}
    new = changed("metadata", "sources", to={"member": ["a.csv"], "candidate": ["b", {"file": "c", "columns": own}]})
    new["select"] = {}
    default = GOOD["metadata"]["columns"]
    assert config.sources(config.checked(new)) == {
        "member": [{"file": "a.csv", "columns": default}],
        "candidate": [{"file": "b", "columns": default}, {"file": "c", "columns": own}],
    }


def test_a_commit_to_be_filled_in_is_valid_and_spoken_of(capsys):
    path = ROOT / "workflow" / "config" / "laion-mi.yaml"
    waiting = config.unpinned(config.load(path))
    assert len(waiting) == 2 and all("@COMMIT/" in file for file in waiting)
    cli.commands.main(["validate-config", "--config", str(path)], standalone_mode=False)
    said = capsys.readouterr()
    assert said.out == f"{path}: valid\n" and len(said.err.splitlines()) == 2
    assert waiting[0] in said.err and "https://huggingface.co/datasets/ChristophSchuhmann/improved" in said.err
    assert config.unpinned(config.load(ROOT / "workflow" / "config" / "laion-mi-published.yaml")) == []


# ------------------------------------------------------------------------------------------------ bad ones


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            changed("features", "draws", to=1),
            "config.yaml: features.draws: 1 is too few for pfami_copymark, whose image and crop have noises of their "
            "own; make it 2, or leave pfami_copymark out",
        ),
        (
            changed("evaluation", "fpr_targets", to=[0.01, 1.4]),
            "config.yaml: evaluation.fpr_targets[1]: 1.4 is greater than 1; give a rate between 0 and 1",
        ),
        (
            changed("evaluation", "fpr_targets", 0, to=0),
            "config.yaml: evaluation.fpr_targets[0]: 0 is not greater than 0; give a rate between 0 and 1",
        ),
        (
            changed("dedup", "max_distance", to=-0.5),
            "config.yaml: dedup.max_distance: -0.5 is less than 0; L2 between unit embeddings, from 0 to 2",
        ),
        (
            changed("evaluation", "confidence", to=1),
            "config.yaml: evaluation.confidence: 1 is not less than 1; of the intervals, between 0 and 1",
        ),
        (
            changed("sanitize", "folds", to=2.5),
            "config.yaml: sanitize.folds: 2.5 is not of type integer; folds of the cross-fitting, 2 or more",
        ),
        (
            changed("seed", to="zero"),
            "config.yaml: seed: 'zero' is not of type integer; a whole number from 0; all randomness is",
        ),
        (changed("seed", to=True), "config.yaml: seed: True is not of type integer"),
        (changed("seed", to=...), "config.yaml: missing key 'seed'; add it: a whole number from 0"),
        (
            changed("embeddings", "model", to=...),
            "config.yaml: embeddings: missing key 'model'; add it: local-dir:FOLDER, hf-hub:NAME or tag:",
        ),
        (
            changed("metadata", "columns", "url", to=...),
            "config.yaml: metadata.columns: missing key 'url'; add it: the source's column of URLs",
        ),
        (
            changed("targets", MAIN, "source", to=...),
            f"config.yaml: targets.{MAIN}: missing key 'source'; add it: a diffusers folder or a hub name",
        ),
        (changed("sanitise", to={}), "config.yaml: unknown key 'sanitise'; use 'sanitize'"),
        (changed("dedup", "max_distanse", to=1), "config.yaml: dedup: unknown key 'max_distanse'; use 'max_distance'"),
        (
            changed("train", "models", MODEL, "check_points", to=[1]),
            f"config.yaml: train.models.{MODEL}: unknown key 'check_points'; use 'checkpoints'",
        ),
        (changed("targets", MAIN, "rôle", to="main"), f"targets.{MAIN}: unknown key 'rôle'; use 'role'"),
        (
            changed("execution", "qqq", to=1),
            "unknown key 'qqq'; use one of 'batch_size', 'compile', 'concurrency', 'deadline_s', 'device',"
            " 'host_delay_s', 'per_host', 'timeout_s'",
        ),
        (
            changed("scores", "attacks", to=["loss_threshold", "random_forrest"]),
            "config.yaml: scores.attacks[1]: unknown value 'random_forrest'; use 'random_forest'",
        ),
        (
            changed("targets", PARTIAL, "attacks", to=["xyzzy"]),
            f"targets.{PARTIAL}.attacks[0]: unknown value 'xyzzy'; use one of 'loss_threshold', 'logistic_regression'",
        ),
        (changed("features", "settings", to=[19]), "config.yaml: features.settings[0]: 19 is greater than 18; "),
        (
            changed("features", "losses", 0, to="model_los"),
            "features.losses[0]: unknown value 'model_los'; use 'model_loss'",
        ),
        (changed("features", "dtype", to="fp16"), "config.yaml: features.dtype: unknown value 'fp16'; use "),
        (changed("sanitize", "method", to="papper"), "sanitize.method: unknown value 'papper'; use 'paper'"),
        (changed("scores", "attacks", to=[]), "config.yaml: scores.attacks: [] should be non-empty; attacks by name"),
        (changed("name", to="../../etc"), "config.yaml: name: '../../etc' does not match"),
        (changed("execution", "device", to="cuda:x"), "config.yaml: execution.device: 'cuda:x' does not match"),
        (changed("targets", "Bad Name", to={}), "config.yaml: targets: 'Bad Name' does not match"),
        (changed("targets", False, to=GOOD["targets"][CONTROL]), "config.yaml: targets: False is not of type string"),
        (changed("targets", to={}), "config.yaml: targets: {} should be non-empty; models under attack, by name"),
        (
            changed("train", "models", MODEL, "block_out_channels", to=[33]),
            f"train.models.{MODEL}.block_out_channels[0]: 33 is not a multiple of 16",
        ),
        (
            changed("targets", MAIN, "role", to="checkpoint"),
            "config.yaml: targets: 0 targets have role 'main'; give exactly one that role",
        ),
        (
            changed("targets", CONTROL, "role", to="main"),
            "config.yaml: targets: 2 targets have role 'main'; give exactly one that role",
        ),
        (
            changed("features", "settings", to=[1]),
            f"config.yaml: targets.{FIRST_PARTIAL}.settings: setting {LEAST} is not requested; "
            "add it to features.settings",
        ),
        (
            changed("targets", CONTROL, "encoders_of", to=MAIN + "x"),
            f"config.yaml: targets.{CONTROL}.encoders_of: unknown target '{MAIN}x'; use '{MAIN}'",
        ),
        (
            changed("audit", "folds", to=4),
            "config.yaml: audit.folds: differs from scores.folds; blind and supervised attacks share folds",
        ),
        (
            changed("dedup", "max_hamming", to=17),
            "config.yaml: dedup.max_hamming: 17 is greater than 16; differing bits of 64, from -1, which switches",
        ),
        (
            changed("neighbours", "references", to=["e.parquet", "x/img_emb_7.npy"]),
            "config.yaml: neighbours.reference_model: not said for x/img_emb_7.npy; name the encoder that made the "
            "references, LAION's by tag:ViT-L-14/openai, and embed with the same",
        ),
        (
            changed("neighbours", to={"references": ["img_emb_7.npy"], "reference_model": "tag:ViT-L-14/openai"}),
            f"config.yaml: neighbours.reference_model: 'tag:ViT-L-14/openai' is not embeddings.model, '{ENCODER}'",
        ),
        (
            changed("metadata", "sources", "member", 0, to="hf://datasets/a/b@main/c.parquet"),
            "config.yaml: metadata.sources.member[0]: 'hf://datasets/a/b@main/c.parquet' is no pinned file of the hub; "
            "write hf://datasets/OWNER/NAME@COMMIT/FILE, its commit in 40 hex digits; see the dataset's history",
        ),
        (
            changed("metadata", "sources", "candidate", to=[{"file": "hf://datasets/a/b/c.parquet"}]),
            "config.yaml: metadata.sources.candidate[0]: 'hf://datasets/a/b/c.parquet' is no pinned file of the hub",
        ),
        (
            changed("metadata", "sources", "control", to=["a.parquet", "b.csv.gz"]),
            "config.yaml: metadata.sources.control[1]: 'b.csv.gz' is no local Parquet file; add the section `select`",
        ),
        (
            changed("metadata", "sources", "member", to=[f"hf://datasets/a/b@{'0' * 40}/c.parquet"]),
            "c.parquet' is no local Parquet file; add the section `select`, if only as `select: {}`",
        ),
        (
            changed(
                "metadata", "sources", "member", 0, to={"file": "a.parquet", "columns": {"url": "u", "caption": "c"}}
            ),
            "config.yaml: metadata.sources.member[0]: has columns of its own; add the section `select`",
        ),
        (
            changed("metadata", "sources", "member", 0, to={"columns": {"url": "u", "caption": "c"}}),
            "config.yaml: metadata.sources.member[0]: missing key 'file'; add it: a path, or hf://datasets/OWNER/NAME@",
        ),
        (
            changed("metadata", "sources", "member", 0, to={"file": "a.csv", "columns": {"url": "u"}}),
            "metadata.sources.member[0].columns: missing key 'caption'; add it: the source's column of captions",
        ),
        (
            changed("metadata", "sources", "member", 0, to={"file": "a.csv", "colums": {}}),
            "metadata.sources.member[0]: unknown key 'colums'; use 'columns'",
        ),
        (
            changed("metadata", "sources", "member", 0, to=5),
            "metadata.sources.member[0]: 5 is not of type string or object; a path, hf://datasets/OWNER/NAME@COMMIT/FILE",
        ),
        (
            changed("metadata", "sources", "member", 0, to=""),
            "config.yaml: metadata.sources.member[0]: '' should be non-empty; a path, hf://datasets/OWNER/NAME@COMMIT",
        ),
        (
            changed("metadata", "sources", "member", to=[]),
            "config.yaml: metadata.sources.member: [] should be non-empty",
        ),
        (changed("select", to={"max_row": 5}), "config.yaml: select: unknown key 'max_row'; use 'max_rows'"),
        (
            changed("select", to={"max_rows": -1}),
            "config.yaml: select.max_rows: -1 is less than 0; rows to keep of each",
        ),
        (changed("select", to=None), "config.yaml: select: None is not of type object; which rows of each source stay"),
        (None, "config.yaml: None is not of type object"),
        ([], "config.yaml: [] is not of type object"),
    ],
)
def test_a_mistake_is_answered_with_its_key_its_value_and_the_remedy(wrong, message):
    assert refusal(wrong).startswith(message) if message.startswith("config.yaml") else message in refusal(wrong)


def places(node: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every (path, value) below a configuration."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for step, value in inside:
        yield (*path, step), value
        yield from places(value, (*path, step))


def dotted(path: tuple) -> str:
    text = path[0]
    for step in path[1:]:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text


def test_a_value_of_another_kind_is_refused_at_every_key():
    for path, value in places(GOOD):
        wrong = {"a": 1} if not isinstance(value, dict) else "text"
        found = refusal(changed(*path, to=wrong))
        assert found.startswith(f"config.yaml: {dotted(path)}: "), found
        unlike = "unknown key 'a'" if path[:2] == ("metadata", "sources") and len(path) == 4 else "is not of type"
        assert "unknown value" in found or unlike in found  # a source may be an object


def test_an_unknown_key_is_refused_in_every_section():
    free = {("train", "models"), ("targets",)}  # named by the user
    for path, value in [((), GOOD), *places(GOOD)]:
        if isinstance(value, dict) and path not in free:
            found = refusal(changed(*path, "nosuchkey", to=1))
            at = f"config.yaml: {dotted(path)}: " if path else "config.yaml: "
            assert found.startswith(f"{at}unknown key 'nosuchkey'; use "), found


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("seed: [1\nname: x\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00name")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "wrong.yaml").write_text("name: x\n")
    for name, message in (
        ("nowhere.yaml", "configuration cannot be read, .*nowhere.yaml, .*No such file"), ("", "cannot be read"),
        ("bad.yaml", "configuration is not YAML .*bad.yaml"), ("binary.yaml", "cannot be read, .*binary.yaml, .*utf-8"),
        ("empty.yaml", "^empty.yaml: None is not of type object"), ("wrong.yaml", "^wrong.yaml: missing key 'seed'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            config.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_yaml_that_would_build_objects_is_not_obeyed(tmp_path):
    (tmp_path / "c.yaml").write_text("name: !!python/object/apply:os.system ['touch " + str(tmp_path / "made") + "']\n")
    with pytest.raises(UserError, match="configuration is not YAML"):
        config.load(tmp_path / "c.yaml")
    assert not (tmp_path / "made").exists()


def test_the_command_ends_with_one_line_and_a_failure(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(changed("shard", to=1)))
    command = [sys.executable, "-m", "mia", "validate-config", "--config", str(tmp_path / "c.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: c.yaml: unknown key 'shard'; use 'shards' or 'card'\n"


# ------------------------------------------------------------------------------------------------ schema and options


def sections(stage: str) -> list[dict]:
    """The stage's section of the example, or one for each trained model."""
    return list(GOOD["train"]["models"].values()) if stage == "train" else [GOOD[stage]] if stage in GOOD else []


def properties(stage: str) -> dict[str, dict]:
    found = SCHEMA["properties"].get(stage, {"properties": {}})
    return (
        found["properties"]["models"]["additionalProperties"]["properties"] if stage == "train" else found["properties"]
    )


@pytest.mark.parametrize("stage", config.STAGES)
def test_schema_and_options_have_the_same_names(stage):
    names = {field.name for field in dataclasses.fields(config.STAGES[stage])}
    not_options = {
        "metadata": {"sources", "columns"}, "images": {"previous"},
        "neighbours": {"references", "reference_model", "reference_metadata"},
    }.get(stage, set())  # fmt: skip
    assert set(properties(stage)) - not_options == names


@pytest.mark.parametrize("stage", config.STAGES)
def test_schema_and_options_have_the_same_types_and_defaults_are_valid(stage):
    kind = config.STAGES[stage]
    hints = typing.get_type_hints(kind)
    words = {bool: "boolean", int: "integer", float: "number", str: "string", tuple: "array"}
    for field in dataclasses.fields(kind):
        rule = properties(stage)[field.name]
        of = typing.get_origin(hints[field.name]) or hints[field.name]
        assert rule.get("type", "string") == words[of], field.name
        if of is tuple and "type" in rule["items"]:
            assert rule["items"]["type"] == words[typing.get_args(hints[field.name])[0]]
        default = list(field.default) if of is tuple else field.default
        jsonschema.Draft202012Validator(rule).validate(default)


def test_every_key_of_the_schema_has_a_description():
    def walk(node: Any, path: str) -> Iterator[tuple[str, dict]]:
        for name, rule in node.get("properties", {}).items():
            yield f"{path}.{name}", rule
            yield from walk(rule, f"{path}.{name}")
        if isinstance(node.get("additionalProperties"), dict):
            yield from walk(node["additionalProperties"], f"{path}.*")

    found = dict(walk(SCHEMA, "")) | {name: rule for part in SCHEMA["$defs"].values() for name, rule in walk(part, "$")}
    assert len(found) >= 90
    assert [name for name, rule in found.items() if not rule.get("description")] == []


def test_every_object_of_the_schema_is_closed():
    """Unknown keys are refused everywhere: an object either lists its keys or says what all its values are."""

    def walk(node: Any) -> Iterator[dict]:
        if isinstance(node, dict):
            if node.get("type") == "object":
                yield node
            for value in node.values():
                yield from walk(value)

    objects = list(walk(SCHEMA))
    assert len(objects) > 15
    assert all(o.get("additionalProperties") is False or isinstance(o["additionalProperties"], dict) for o in objects)


def test_the_schema_is_itself_valid_and_lists_what_the_code_has():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert properties("scores")["attacks"]["items"]["enum"] == list(scores.ATTACKS)
    numbers = properties("features")["settings"]["items"]
    assert (numbers["minimum"], numbers["maximum"]) == (min(settings.SETTINGS), max(settings.SETTINGS))
    assert properties("features")["losses"]["items"]["enum"] == list(settings.LOSSES)
    assert properties("features")["timesteps"]["enum"] == list(settings.VARIANTS)
    target = SCHEMA["properties"]["targets"]["additionalProperties"]["properties"]
    assert target["attacks"]["items"]["enum"] == list(scores.ATTACKS)
    columns = SCHEMA["$defs"]["columns"]["properties"]
    from mia import sanitize, sources

    assert list(columns) == list(sources.COLUMNS)
    assert properties("sanitize")["method"]["enum"] == list(sanitize.METHODS)


# ------------------------------------------------------------------------------------------------ flags


def parsed(stage: str, words: list[str]) -> Any:
    """The options that the stage's own command makes of flags, by click's parser; required paths are filled in."""
    command = cli.commands.get_command(None, {"evaluation": "evaluate"}.get(stage, stage))
    filled = [word for p in command.params if p.required for word in (p.opts[0], "1")]
    group = click.Context(cli.commands, **cli.commands.context_settings)  # click keeps the help flags of the first call
    context = command.make_context(stage, [*filled, *words], parent=group)
    kind = config.STAGES[stage]
    return kind(**{field.name: context.params[field.name] for field in dataclasses.fields(kind)})


def by_shell(line: str) -> list[str]:
    """The words of a line as /bin/sh, which Snakemake starts, hands them over."""
    command = ["sh", "-c", f"printf '%s\\0' {line}"]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("stage", config.STAGES)
def test_without_flags_a_command_has_the_options_defaults(stage):
    assert parsed(stage, []) == config.STAGES[stage]()


@pytest.mark.parametrize("stage", [stage for stage in config.STAGES if sections(stage)])
def test_a_section_comes_through_its_flags_unchanged(stage):
    kind = config.STAGES[stage]
    for section in sections(stage):
        found = parsed(stage, shlex.split(config.flags(stage, section)))
        for field in dataclasses.fields(kind):
            wanted = section.get(field.name, field.default)
            assert getattr(found, field.name) == (tuple(wanted) if isinstance(wanted, list) else wanted), field.name
            assert type(getattr(found, field.name)) is type(field.default)


@pytest.mark.parametrize(
    "options",
    [
        config.SelectionOptions(("en", "de"), True, -1e9, 0.3, 0.5, 0.5, 256, 3.0, 7),
        config.ImagesOptions(True, ("127.0.0.1:8000", "::1", "a-b.example"), 1, 2, 0),
        config.ImagesOptions(False, (), 10**12),
        config.EmbeddingsOptions("local-dir:/a b/$HOME/`id`/'q'\"d\"; rm -rf *|&<>(x)\\n"),
        config.EmbeddingsOptions("-starts-with-a-dash"),
        config.DedupOptions(1e-07, -1),
        config.DedupOptions(0.1 + 0.2, 64),
        config.MetadataOptions(("en", "zh-TW"), -1e300, 0, 1.0, 10, 5),
        config.AuditOptions(("caption",), 2),
        config.FeaturesOptions(
            (1, 14), ("secmi",), ("pixel_error",), 1, "committed", 3, 0.5, crops=(70, 95), tf32=True
        ),
        config.EvaluationOptions((0.1, 1e-05), 0.99, 100),
        config.TrainOptions("control", (0,), 7, 1e-5, 1, 0.0, (16, 32, 64)),
    ],
    ids=lambda options: type(options).__name__,
)
def test_any_options_come_through_the_shell_unchanged(options):
    stage = next(name for name, kind in config.STAGES.items() if kind is type(options))
    line = config.flags(stage, dataclasses.asdict(options))
    assert by_shell(line) == shlex.split(line)
    assert parsed(stage, by_shell(line)) == options
    assert repr(parsed(stage, by_shell(line))) == repr(options)  # 1 is not 1.0


def test_flags_hold_what_the_section_gives_and_leave_other_keys_out():
    assert config.flags("dedup", {"max_hamming": 3}) == "--max-hamming 3"
    assert config.flags("evaluation", {"fpr_targets": [0.01, 0.5], "bootstrap": 7}) == "--fpr 0.01,0.5 --bootstrap 7"
    assert config.flags("images", {"allow_local_files": False}) == "--no-allow-local-files"
    assert config.flags("metadata", {"sources": {"member": ["x"]}, "columns": {"url": "U"}}) == ""


@pytest.mark.parametrize("words", [["--max-depths", "2,x"], ["--folds", "two"], ["--trees", "1.5"]])
def test_a_flag_of_another_type_is_refused(words):
    import click

    with pytest.raises(click.UsageError, match=re.escape(words[1])):
        parsed("scores", words)


def test_the_posteriors_mode_is_the_default():
    """A sample of it adds noise to every loss (pitfall 16)."""
    chosen = [config.load(path).get("features", {}).get("posterior", "mode") for path in OURS]
    assert config.FeaturesOptions().posterior == "mode" and set(chosen) == {"mode"}


def test_options_cannot_be_changed_and_carry_a_version():
    for stage, kind in config.STAGES.items():
        assert isinstance(kind.version, int) and kind.version >= 1, stage
        assert "version" not in {field.name for field in dataclasses.fields(kind)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.DedupOptions().max_distance = 1.0


# ------------------------------------------------------------------------------------------------ environments


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines: list[str]) -> dict[str, str]:
    """name -> version of `name==version` lines; other pins are an error, options and comments are left out."""
    found = {}
    for line in lines:
        text = line.split("#")[0].strip()
        if text and not text.startswith("-"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)(\[[a-z,]+\])?==([^\s;]+)", text)
            assert match, f"{text} is not pinned"
            found[plain(match[1])] = match[3]
    return found


LOCK = pins((ROOT / "requirements.lock").read_text().splitlines())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_lock_holds_every_dependency():
    wanted = [re.match(r"[A-Za-z0-9._-]+", text)[0] for text in PROJECT["dependencies"]]
    assert {plain(name) for name in wanted} <= set(LOCK)
    for text in PROJECT["dependencies"]:
        if "==" in text:
            name, version = text.split("==")
            assert LOCK[plain(name)] == version


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_an_environment_pins_what_the_lock_pins(name):
    dependencies = yaml.safe_load((ROOT / "envs" / name).read_text())["dependencies"]
    by_pip = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert len(by_pip) == 1, "one list of pip requirements"
    found = pins(by_pip[0])
    assert {package: LOCK.get(package) for package in found} == found
    wanted = {plain(re.match(r"[A-Za-z0-9._-]+", text)[0]) for text in PROJECT["dependencies"]}
    assert wanted - {"snakemake"} <= set(found)


def test_the_two_environments_are_the_only_ones():
    assert sorted(path.name for path in (ROOT / "envs").iterdir()) == ["cpu.yaml", "gpu.yaml"]


def test_the_schema_file_is_json_too():
    """Nothing in it needs YAML's own types: dates, sets or anchors would not reach a JSON Schema tool."""
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


def test_the_lock_names_no_cuda_package():
    """A GPU machine gets them with its build of torch; where there is no GPU they are gigabytes of nothing."""
    names = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.M)
    assert "torch" in names
    assert [name for name in names if name.startswith(("nvidia", "cuda", "triton"))] == []


# ------------------------------------------------------------------------------------------- lists of files for bash

FEW = ["a b/images/9.parquet", "a b/images/10.parquet", "a b/images/11.parquet", "a b/texts.parquet", "x'y/0.npy"]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        (["r/0.parquet"], "--images r/0.parquet"),
        (["r/0.parquet", "r/1.parquet"], "--images=r/{0..1}.parquet"),
        (["r/1.parquet", "r/0.parquet"], "--images r/1.parquet --images r/0.parquet"),
        (["r/0.parquet", "s/1.parquet"], "--images r/0.parquet --images s/1.parquet"),
        (["r/0.parquet", "r/0.parquet"], "--images r/0.parquet --images r/0.parquet"),
        (["r/07.parquet", "r/08.parquet"], "--images r/07.parquet --images r/08.parquet"),
        (["url=URL", "a", "a"], "--images url=URL --images a --images a"),
    ],
)
def test_files_numbered_in_order_are_one_word(values, line):
    assert config.repeated("--images", values) == line


@pytest.mark.parametrize("values", [FEW, FEW[::-1], [f"r/{i}.parquet" for i in (0, 1, 2, 4, 5, 7)]])
def test_bash_makes_every_file_of_it_again(values):
    line = f"for word in {config.repeated('--f', values)}; do printf '%s\\n' \"$word\"; done"
    words = subprocess.run(["bash", "-c", line], check=True, capture_output=True, text=True).stdout.splitlines()
    assert "\n".join(words).replace("--f\n", "--f=").splitlines() == [f"--f={value}" for value in values]


def test_the_command_line_of_ten_thousand_shards_fits_one_argument():
    lists = [[f"results/laion-mi/{name}/{i}.parquet" for i in range(10_000)] for name in ("images", "embeddings")]
    line = "true " + " ".join(config.repeated("--flag", paths) for paths in lists)
    assert len(line) < 200
    subprocess.run(["bash", "-c", line], check=True)
