"""Sources from a small hub on this machine and from local files: what is fetched, what is refused, in what words."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import re
import subprocess
import sys

import polars as pl
import pytest

from mia import sources, tables
from mia.errors import UserError
from tests.hub import COMMIT, OLD, REPO, serving

SOURCE = f"hf://datasets/{REPO}@{COMMIT}/data/part-0.parquet"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that a user without a token sees, with an empty cache."""
    files = {(repo, COMMIT, "data/part-0.parquet"): b"new" for repo in (REPO, "laion/gated", "laion/private")}
    files[REPO, OLD, "data/part-0.parquet"] = b"old"
    with serving(files) as (handler, endpoint):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("time.sleep", lambda _: None)  # between its retries
        yield handler


# ------------------------------------------------------------------------------------------------ the hub


def test_a_file_comes_at_the_commit_that_is_named(hub):
    assert sources.fetch(SOURCE).read_bytes() == b"new"
    assert sources.fetch(SOURCE.replace(COMMIT, OLD)).read_bytes() == b"old"
    assert {re.search("[0-9a-f]{40}", path)[0] for _, path, _ in hub.asked} == {COMMIT, OLD}
    assert sources.fetch(SOURCE).name == "part-0.parquet"


def test_a_cached_file_is_not_asked_for_again(hub):
    sources.fetch(SOURCE)
    before = len(hub.asked)
    assert sources.fetch(SOURCE).read_bytes() == b"new" and len(hub.asked) == before


def test_the_token_of_the_environment_is_sent_and_none_without(hub, monkeypatch):
    sources.fetch(SOURCE)
    assert {token for _, _, token in hub.asked} == {None}
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    for repo in ("laion/gated", "laion/private"):
        assert sources.fetch(SOURCE.replace(REPO, repo)).read_bytes() == b"new"
    assert ("GET", f"/datasets/laion/gated/resolve/{COMMIT}/data/part-0.parquet", "Bearer hf_good") in hub.asked


@pytest.mark.parametrize("revision", ["@main", ""])
def test_a_branch_is_refused_with_the_commit_to_write(hub, revision):
    with pytest.raises(UserError, match="'main' is no commit of 40 hex digits") as caught:
        sources.fetch(SOURCE.replace(f"@{COMMIT}", revision))
    assert caught.value.fix == f"write {SOURCE}"


def test_a_branch_is_refused_offline_with_the_commit_of_the_cache(hub, monkeypatch):
    import huggingface_hub

    huggingface_hub.hf_hub_download(REPO, "data/part-0.parquet", repo_type="dataset", revision="main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no commit") as caught:
        sources.fetch(SOURCE.replace(COMMIT, "main"))
    assert caught.value.fix == f"write {SOURCE}"
    with pytest.raises(UserError, match="no commit") as caught:
        sources.fetch(SOURCE.replace(COMMIT, "v2"))
    history = f"https://huggingface.co/datasets/{REPO}/commits/main"
    assert caught.value.fix == f"write {SOURCE.replace(COMMIT, 'COMMIT')} with one of {history}"


def test_a_commit_to_be_filled_in_is_refused_with_the_newest(hub):
    with pytest.raises(UserError, match="'COMMIT' is no commit of 40 hex digits") as caught:
        sources.fetch(SOURCE.replace(COMMIT, "COMMIT"))
    assert caught.value.fix == f"write {SOURCE}"


@pytest.mark.parametrize("token", [None, "hf_bad"])
def test_a_gated_dataset_is_refused_with_where_to_ask(hub, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = r"^dataset is gated.*, hf://\S+, accept its terms at http://127\S+/datasets/laion/gated and set HF_TOKEN$"
    with pytest.raises(UserError, match=message):
        sources.fetch(SOURCE.replace(REPO, "laion/gated"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((REPO, "laion/nothing"), "^hub has no such dataset, or it is private, hf://.*, mend it, or set HF_TOKEN$"),
        ((REPO, "laion/private"), "^hub has no such dataset, or it is private, "),
        ((COMMIT, "a" * 40), "^dataset has no such commit, hf://.*, take one from its history$"),
        (("part-0", "part-9"), "^dataset has no such file at this commit, hf://.*, see its list of files$"),
        ((REPO, "laion/broken"), "^source cannot be had from the hub, hf://.*, see whether the network"),
        ((REPO, "laion/cut"), "^download failed .*, hf://.*, run this again; a download goes on where it broke off$"),
        ((REPO, "lai on/ti--ny"), "^source names no dataset, "),
        (
            (f"datasets/{REPO}", "tiny"),
            "^source is no file of a dataset on the hub, .*, write hf://datasets/OWNER/NAME",
        ),
        ((f"@{COMMIT}/data/part-0.parquet", ""), "^source is no file of a dataset on the hub"),
    ],
)
def test_what_the_hub_does_not_have_is_one_clear_line(hub, change, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        sources.fetch(SOURCE.replace(*change))
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").rglob("*.parquet") if path.is_file()]


def test_offline_the_cache_serves_and_says_what_it_lacks(hub, monkeypatch):
    sources.fetch(SOURCE)
    before = len(hub.asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert sources.fetch(SOURCE).read_bytes() == b"new"
    absent = SOURCE.replace("part-0", "part-1")
    with pytest.raises(UserError, match="not in the cache, and HF_HUB_OFFLINE forbids a download") as caught:
        sources.fetch(absent)
    assert caught.value.where == absent and len(hub.asked) == before


def test_a_download_onto_a_full_disk_is_said_in_one_line(hub, monkeypatch):
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(UserError, match="^disk is full, hf://.*, make room and run this again"):
        sources.fetch(SOURCE)


def test_a_user_fetches_by_environment_alone_and_the_file_says_from_where(hub, tmp_path):
    import huggingface_hub

    rows = pl.DataFrame({"URL": ["http://a"], "TEXT": ["a cat"]})
    rows.write_parquet(tmp_path / "part.parquet")
    hub.files[REPO, COMMIT, "part.parquet"] = (tmp_path / "part.parquet").read_bytes()
    source = f"hf://datasets/{REPO}@{COMMIT}/part.parquet"
    endpoint = {"HF_ENDPOINT": huggingface_hub.constants.ENDPOINT, "HF_HOME": str(tmp_path / "home")}
    words = ["select", "--source", source, "--column", "url=URL", "--column", "caption=TEXT"]
    for n, more in enumerate(({"HF_HUB_OFFLINE": "0"}, {"HF_HUB_OFFLINE": "1"})):
        output = tmp_path / f"{n}.parquet"
        command = [sys.executable, "-m", "mia", *words, "--output", str(output)]
        subprocess.run(command, check=True, env=os.environ | endpoint | more | {"HF_TOKEN": "hf_mine"})
        about = tables.provenance(output)
        assert about["source"] == source and pl.read_parquet(output)["url"].to_list() == ["http://a"]
    assert {token for _, path, token in hub.asked if "resolve" in path} == {"Bearer hf_mine"}


# ------------------------------------------------------------------------------------------------ local files

ROWS = [
    {"URL": "http://a", "TEXT": 'a "red", cat', "WIDTH": 640, "S": 0.5},
    {"URL": "http://b", "TEXT": None, "WIDTH": None, "S": None},
    {"URL": "http://c", "TEXT": "häuser\nam see", "WIDTH": 12, "S": 1.0},
]
COLUMNS = {"url": "URL", "caption": "TEXT", "width": "WIDTH", "similarity": "S"}


def as_file(folder: pathlib.Path, ending: str) -> pathlib.Path:
    frame, path = pl.DataFrame(ROWS), folder / f"rows{ending}"
    kind = ending.removesuffix(".gz")
    if kind in (".csv", ".tsv"):
        text = frame.write_csv(separator="," if kind == ".csv" else "\t")
    elif kind == ".json":
        text = json.dumps(ROWS)
    else:
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
    if ending == ".parquet":
        frame.write_parquet(path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".csv.gz", ".tsv", ".json", ".jsonl", ".ndjson", ".jsonl.gz"])
def test_every_format_gives_the_same_rows(ending, tmp_path):
    rows = sources.named(sources.scan(sources.fetch(str(as_file(tmp_path, ending)))), COLUMNS, "rows")
    found = rows[0].collect(engine="streaming")
    assert found.schema == pl.Schema(sources.TYPES)
    none = dict.fromkeys(sources.TYPES)
    wanted = [none | {ours: row[theirs] for ours, theirs in COLUMNS.items()} for row in ROWS]
    assert found.to_dicts() == wanted


def test_values_are_read_as_pandas_and_spreadsheets_write_them(tmp_path):
    (tmp_path / "a.csv").write_text("URL,TEXT,WIDTH,S\nu,t,640.0,NaN\nv,t,,0\n")
    found = sources.named(sources.scan(tmp_path / "a.csv"), COLUMNS, "a")[0].collect()
    assert found["width"].to_list() == [640, None] and found["similarity"].to_list() == [None, 0.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"URL,TEXT\nu,\xff\xfe\n", "source cannot be read .*utf-8"),
        ("a.csv", b"URL,TEXT\nu,one,two\n", "source cannot be read .*more fields"),
        ("a.csv", b"", "source cannot be read .*empty CSV"),
        ("a.csv", b"URL,TEXT,WIDTH\nu,t,wide\n", "a column cannot be read as its type .*wide"),
        ("a.csv", b"URL\nu\n", "source has no column 'TEXT' for 'caption'"),
        ("a.jsonl", b'{"URL":"u","TEXT":"t"}\n{"URL":"v\n', "source cannot be read"),
        ("a.json", b'{"URL": [', "source cannot be read"),
        ("a.parquet", b"PAR1", "source cannot be read .*Parquet"),
        ("a.csv.gz", b"\x1f\x8b\x08\x00broken", "source cannot be read"),
    ],
)
def test_a_broken_file_is_one_clear_line(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    columns = {k: v for k, v in COLUMNS.items() if k in ("url", "caption") or v.encode() in content}
    with pytest.raises(UserError, match=message) as caught, sources.reading(path):
        sources.named(sources.scan(path), columns, path)[0].collect(engine="streaming")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_said(tmp_path):
    for call in (lambda: sources.fetch(str(tmp_path / "x.csv")), lambda: sources.scan(tmp_path / "x.csv")):
        with pytest.raises(UserError, match="source does not exist, .*x.csv, mend its path"):
            call()


@pytest.mark.parametrize("rows", [0, 1, 6, 7, 8, 20])
def test_pieces_of_a_parquet_file_are_its_rows_once_each_in_order(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_ROWS", 7)
    frame = pl.DataFrame({"n": pl.Series(range(rows), dtype=pl.Int64)})
    frame.write_parquet(tmp_path / "a.parquet", row_group_size=5)
    pieces = [piece.collect(engine="streaming") for piece in sources.scan(tmp_path / "a.parquet")]
    assert pl.concat(pieces).equals(frame) and max(map(len, pieces)) <= 7
