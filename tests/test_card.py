"""The split as a Hugging Face folder: what the card says is so, the bytes are the same each time, nothing is leaked."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import subprocess
import sys

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mia import card, tables
from mia.cli.card import card as command
from mia.errors import UserError
from tests.conftest import picture

MADE = {"stage": "sanitize", "version": 1, "seed": 7, "options": {"method": "paper"}, "inputs": ["00ff" * 4]}
COUNTS = {("calibration", True): 3, ("calibration", False): 5, ("test", True): 4, ("test", False): 6}
METRIC = {"variant": "", "n_members": 4, "n_nonmembers": 6, "note": "", "ci_low": 0.4, "ci_high": 0.6, "value": 0.5123}


def split() -> list[dict]:
    """Rows of every part and side, with pictures; captions hold what could break a table or a header."""
    rows = []
    for (part, member), count in COUNTS.items():
        for i in range(count):
            url, caption = f"http://host/{part}{member}{i}", f"a | b\n--- {i}"
            content = picture(len(rows), 8)
            rows.append({
                "sample_id": tables.sample_id(url, caption), "url": url, "caption": caption,
                "sha256": hashlib.sha256(content).hexdigest(), "member": member, "group": f"{part} {i // 2}",
                "part": part, "weight": 1.0, "bytes": content,
            })  # fmt: skip
    return rows


def written(path: pathlib.Path, rows: list[dict], name: str, made: dict = MADE) -> pathlib.Path:
    tables.write(path, pa.Table.from_pylist(rows, schema=tables.SCHEMAS[name]), name, made)
    return path


@pytest.fixture
def inputs(tmp_path) -> pathlib.Path:
    """A folder with dataset, two shards of images, an audit and a dropped table."""
    rows = split()
    written(tmp_path / "split.parquet", rows, "dataset")
    images = [
        {"sample_id": r["sample_id"], "status": "ok", "detail": "", "sha256": r["sha256"], "bytes": r["bytes"],
         "width": 8, "height": 15, "format": "png", "phash": 1}
        for r in rows
    ]  # fmt: skip
    images.append({"sample_id": "0" * 32, "status": "dns", "detail": ""})
    shard = tables.shard_of([r["sample_id"] for r in images], 2)
    for number in range(2):
        here = [row for row, s in zip(images, shard, strict=True) if s == number]
        written(tmp_path / f"images{number}.parquet", here, "images")
    audit = [
        METRIC | {"attack": "blind_caption", "part": part, "metric": metric, "method": method, "fpr_target": rate}
        for metric, rate in (("auc", None), ("tpr", 0.01), ("balanced_accuracy", None))
        for part, method in (("test", "holdout"), ("test", "as_is"), ("calibration", "holdout"))
    ]
    audit.append({"attack": "blind_image", "part": "test", "metric": "tpr", "method": "holdout", "fpr_target": 0.001})
    audit[-1] |= {"variant": "", "n_members": 4, "n_nonmembers": 6, "note": "too | few"}
    written(tmp_path / "audit.parquet", audit, "metrics")
    drop = {"stage": "dedup", "reason": "near-duplicate", "pool": "candidate", "rows": 1234}
    written(tmp_path / "dropped.parquet", [drop], "dropped")
    return tmp_path


def run(inputs: pathlib.Path, *words: object, output: str = "out") -> pathlib.Path:
    flags = ["--dataset", inputs / "split.parquet", *words, "--output", inputs / output]
    command.main([str(word) for word in flags], standalone_mode=False)
    return inputs / output


def all_flags(inputs: pathlib.Path) -> list:
    shards = [word for i in (1, 0) for word in ("--images", inputs / f"images{i}.parquet")]  # not in order
    tells = ["--audit", inputs / "audit.parquet", "--dropped", inputs / "dropped.parquet"]
    return [*tells, *shards, "--with-images", "--title", "A: | 'split'\n# x", "--licence", "cc-by-4.0"]


def header(folder: pathlib.Path) -> dict:
    _, text, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(text)


def test_files_columns_and_rows(inputs):
    folder = run(inputs)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert names == ["README.md", "data/calibration.parquet", "data/test.parquet"]
    wanted = {row["sample_id"]: {name: row[name] for name in card.COLUMNS} for row in split()}
    for part in tables.PARTS:
        rows = pl.read_parquet(folder / "data" / f"{part}.parquet")
        assert rows.columns == list(card.COLUMNS) and rows["sample_id"].is_sorted()
        assert rows.to_dicts() == [wanted[name] for name in sorted(wanted) if wanted[name]["part"] == part]


def test_the_cards_counts_hashes_and_header(inputs):
    folder = run(inputs, *all_flags(inputs))
    text = (folder / "README.md").read_text()
    assert "| calibration | 3 | 5 | 3 |" in text and "| test | 4 | 6 | 3 |" in text and "| both | 7 | 11 |" in text
    for part in tables.PARTS:
        path = folder / "data" / f"{part}.parquet"
        assert f"| `data/{part}.parquet` | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" in text
    for name in ("split", "audit", "dropped"):
        assert tables.file_hash(inputs / f"{name}.parquet") in text
    found = header(folder)
    assert found["pretty_name"] == "A: | 'split'\n# x" and found["license"] == "cc-by-4.0"
    assert found["size_categories"] == ["n<1K"]
    assert found["configs"][0]["data_files"] == [{"split": p, "path": f"data/{p}.parquet"} for p in tables.PARTS]
    features = {f["name"]: f["dtype"] for f in found["dataset_info"]["features"]}
    assert features == dict.fromkeys(card.COLUMNS, "string") | {"member": "bool", "image": "image"}
    assert "\n# A: \\| 'split' # x\n" in text  # a title is one line
    assert 'options: {"method": "paper"}' in text and "seed: 7" in text and "00ff" * 4 in text
    assert "| dedup | near-duplicate | candidate | 1,234 |" in text
    assert str(inputs) not in text


def test_the_audit_shows_the_headline_protocol_with_intervals_or_the_reason(inputs):
    text = (run(inputs, *all_flags(inputs)) / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| blind")]
    assert lines == [
        "| blind_caption |  | test | holdout | auc |  | 0.512 | [0.400, 0.600] | 4 | 6 |  |",
        "| blind_caption |  | test | holdout | tpr | 0.01 | 0.512 | [0.400, 0.600] | 4 | 6 |  |",
        "| blind_image |  | test | holdout | tpr | 0.001 | - | - | 4 | 6 | too \\| few |",
    ]
    assert "no false-positive rate between 0 and 0.17;" in text  # 1 / 6
    assert "Do not use this split before one was made" in (run(inputs, output="bare") / "README.md").read_text()


def test_tables_in_the_card_are_well_formed(inputs):
    text = (run(inputs, *all_flags(inputs)) / "README.md").read_text()
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
    assert "\n\n\n" not in text


def test_no_image_bytes_without_the_flag(inputs):
    plain, full = run(inputs), run(inputs, *all_flags(inputs), output="full")
    content = {row["sample_id"]: row["bytes"] for row in split()}
    for part in tables.PARTS:
        data = (plain / "data" / f"{part}.parquet").read_bytes()
        assert "image" not in pq.read_schema(plain / "data" / f"{part}.parquet").names
        assert not any(value in data for value in content.values())
        rows = pl.read_parquet(full / "data" / f"{part}.parquet")
        assert rows["sample_id"].is_sorted() and len(rows) == len(pl.read_parquet(plain / "data" / f"{part}.parquet"))
        assert all(row["image"]["bytes"] == content[row["sample_id"]] for row in rows.to_dicts())
    assert "No image bytes" in (plain / "README.md").read_text()
    assert "No image bytes" not in (full / "README.md").read_text()


def test_the_same_bytes_each_time_and_over_an_earlier_card(inputs):
    first = {p.name: p.read_bytes() for p in run(inputs, *all_flags(inputs)).rglob("*") if p.is_file()}
    again = {p.name: p.read_bytes() for p in run(inputs, *all_flags(inputs), output="x/y").rglob("*") if p.is_file()}
    assert first == again
    run(inputs)  # another card in its place
    run(inputs, *all_flags(inputs))
    assert first == {p.name: p.read_bytes() for p in (inputs / "out").rglob("*") if p.is_file()}
    assert not list(inputs.glob(".*"))


def test_a_weight_that_matters_is_kept(inputs):
    written(inputs / "split.parquet", [row | {"weight": 0.5} for row in split()], "dataset")
    folder = run(inputs)
    assert pl.read_parquet(folder / "data" / "test.parquet")["weight"].to_list() == [0.5] * 10
    assert {"name": "weight", "dtype": "float64"} in header(folder)["dataset_info"]["features"]


@pytest.mark.parametrize(
    ("rows", "word"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (40_270, "10K<n<100K"), (10**6, "1M<n<10M"), (10**13, "n>1T")],
)
def test_size_categories_are_the_hubs(rows, word):
    assert card.size_category(rows) == word


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--with-images"], "^image bytes need both flags, --with-images and --images, give both or neither$"),
        (["--images", "images0.parquet"], "^image bytes need both flags"),
        (
            ["--with-images", "--images", "images0.parquet"],
            r"^images for \d of the 8 samples of part 'calibration', --im",
        ),
        (["--audit", "dropped.parquet"], "^metrics table has no column 'attack'"),
        (["--dropped", "nowhere.parquet"], "^dropped file does not exist"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, message, inputs):
    words = [str(inputs / word) if word.endswith(".parquet") else word for word in words]
    with pytest.raises(UserError, match=message):
        run(inputs, *words)
    assert not (inputs / "out").exists() and not list(inputs.glob(".*"))


def test_one_side_only_foreign_files_and_other_images_are_refused(inputs):
    rows = split()
    (inputs / "mine").mkdir()
    (inputs / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="^a file that is not of an earlier card is in the way, .*thesis.txt"):
        run(inputs, output="mine")
    assert (inputs / "mine" / "thesis.txt").read_text() == "years"
    written(inputs / "split.parquet", [row | {"sha256": "0" * 64} for row in rows], "dataset")
    with pytest.raises(UserError, match="^an image is not the one the dataset names by its sha256"):
        run(inputs, *all_flags(inputs))
    written(inputs / "split.parquet", [row for row in rows if row["part"] == "test" or row["member"]], "dataset")
    with pytest.raises(UserError, match="^part 'calibration' has no non-members, dataset"):
        run(inputs)


@pytest.mark.parametrize("flags", [[], all_flags])
@pytest.mark.parametrize("fails", ["data/calibration.parquet", "README.md"])
def test_a_full_disk_is_one_line_and_the_earlier_card_stays(fails, flags, inputs):
    """No file of the process may grow to the size of the one that is to fail."""
    out = run(inputs, *(flags and flags(inputs)))
    earlier = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    limit = len(earlier[out / fails]) - 1
    program = (
        f"import resource, runpy, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "runpy.run_module('mia', run_name='__main__')"
    )
    words = ["card", "--dataset", inputs / "split.parquet", *(flags and flags(inputs)), "--output", out]
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True)
    line = f"error: no room on the disk, {out}, free some and start again; nothing is half-written"
    assert done.returncode == 2 and done.stderr.splitlines() == [line]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == earlier
    assert not list(inputs.glob(".*"))


def test_load_dataset_reads_it_offline(inputs, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(inputs / "cache"))
    import datasets

    for output, words in (("plain", []), ("full", all_flags(inputs))):
        found = datasets.load_dataset(str(run(inputs, *words, output=output)), cache_dir=str(inputs / "cache"))
        assert {part: len(rows) for part, rows in found.items()} == {"calibration": 8, "test": 10}
        assert set(found["test"].column_names) == set(card.COLUMNS) | ({"image"} if words else set())
        if words:
            assert found["test"][0]["image"].size == (8, 15)
    json.dumps(found["test"].remove_columns("image")[0])
