"""Streaming selection against one row at a time, in any order, any pieces, killed and run again."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from mia import cli, languages, metadata, selection, sources, tables
from mia.config import MetadataOptions, SelectionOptions
from mia.errors import UserError

COLUMNS = {
    "url": "URL", "caption": "TEXT", "language": "LANGUAGE", "width": "WIDTH", "height": "HEIGHT",
    "aesthetic": "AESTHETIC_SCORE", "similarity": "similarity", "punsafe": "punsafe", "pwatermark": "pwatermark",
}  # fmt: skip
STRICT = SelectionOptions(
    languages=("en", "de"), min_aesthetic=5.1, min_similarity=0.25, max_punsafe=0.8, max_pwatermark=0.7,
    min_side_px=60, max_aspect_ratio=2.5,
)  # fmt: skip
CAPTIONS = ["a red cat on the old wooden roof", "ein  rotes Haus\tam See", "une maison au bord de la mer", "", None]


def crowd(rows: int = 600, seed: int = 0) -> pl.DataFrame:
    """A source as LAION writes it, in which every filter has work, with nulls and NaN and some rows twice."""
    r = np.random.default_rng(seed)

    def floats(low: float, high: float) -> list:
        return [
            [None, float("nan"), v][i]
            for i, v in zip(r.choice(3, rows, p=[0.1, 0.1, 0.8]), r.uniform(low, high, rows), strict=True)
        ]

    number = r.integers(0, 2 * rows, rows)
    return pl.DataFrame(
        {
            "URL": [f"http://host/{i}" if i % 50 else None for i in number],
            "TEXT": [CAPTIONS[i % 5] for i in number],
            "LANGUAGE": [["en", "fr", None, "de"][i] for i in r.integers(0, 4, rows)],
            "WIDTH": floats(0, 300),
            "HEIGHT": [int(i) if i > 20 else None for i in r.integers(0, 300, rows)],
            "AESTHETIC_SCORE": pl.Series(floats(4, 7), dtype=pl.Float32, strict=False),
            "similarity": floats(0, 0.5),
            "punsafe": floats(0, 1),
            "pwatermark": floats(0, 1),
            "hash": r.integers(0, 2**62, rows),
        },
        strict=False,
    )


def named(frame: pl.DataFrame) -> list[pl.LazyFrame]:
    return sources.named([frame.lazy()], COLUMNS, "part-0")


def why(row: dict, options: SelectionOptions) -> str:
    """Oracle: the reason for which one row, in float32 as stored, is to go; empty if it stays."""
    sides = [side for side in (row["width"], row["height"]) if side is not None]

    def less(name: str, limit: float) -> bool:
        return row[name] is not None and np.float32(row[name]) < np.float32(limit)

    def more(name: str, limit: float) -> bool:
        return row[name] is not None and np.float32(row[name]) > np.float32(limit)

    tests = {
        "aesthetic score": less("aesthetic", options.min_aesthetic),
        "similarity": less("similarity", options.min_similarity),
        "unsafe": more("punsafe", options.max_punsafe),
        "watermark": more("pwatermark", options.max_pwatermark),
        "too small": bool(sides) and min(sides) < options.min_side_px,
        "aspect ratio": bool(sides)
        and options.max_aspect_ratio < 1e9
        and (min(sides) == 0 or max(sides) / min(sides) > options.max_aspect_ratio),
    }
    for reason, holds in tests.items():
        if holds:
            return reason
    language = row["language"]
    if options.detect_language:
        caption = metadata_caption(row["caption"])
        language = languages.detect(pl.Series([caption], dtype=pl.String))[0]
    return "language" if options.languages and language is not None and language not in options.languages else ""


def metadata_caption(caption: str | None) -> str | None:
    return None if caption is None else " ".join(caption.split())


def judged(frame: pl.DataFrame, options: SelectionOptions) -> tuple[list[dict], dict[str, int]]:
    kept, counts = [], collections.Counter({"": 0})
    for row in named(frame)[0].collect().to_dicts():
        reason = why(row, options)
        counts[reason] += 1
        if not reason:
            kept.append(row)
    if options.max_rows:
        ranks = sorted(rank(row) for row in kept)[: options.max_rows]
        counts["above max_rows"] = len(kept)
        kept = [row for row in kept if rank(row) <= ranks[-1]]
        counts[""] = len(kept)
        counts["above max_rows"] -= len(kept)
    return kept, {reason: n for reason, n in counts.items() if n or not reason}


def rank(row: dict) -> int:
    return int(tables.sample_id(row["url"] or "", metadata_caption(row["caption"]) or "")[16:], 16)


def written(frame: pl.DataFrame, options: SelectionOptions, folder: pathlib.Path) -> tuple[list[dict], dict[str, int]]:
    frame.write_parquet(folder / "in.parquet", row_group_size=97)
    rows = sources.named(sources.scan(folder / "in.parquet"), COLUMNS, "part-0")
    counts = selection.write(rows, folder / "out.parquet", options, {})
    return pl.read_parquet(folder / "out.parquet").to_dicts(), counts


def without_language(rows: list[dict]) -> list[dict]:
    return [row | {"language": None} for row in rows]


ALONE = {
    f.name: SelectionOptions(**{f.name: getattr(STRICT, f.name)})
    for f in dataclasses.fields(STRICT) if getattr(STRICT, f.name) != f.default
}  # fmt: skip
CASES = ALONE | {
    "nothing": SelectionOptions(),
    "all": STRICT,
    "cap": SelectionOptions(max_rows=50),
    "all and cap": dataclasses.replace(STRICT, max_rows=20),
    "cap above": dataclasses.replace(STRICT, max_rows=10**6),
    "detected": SelectionOptions(languages=("en",), detect_language=True),
    "detected, all and cap": dataclasses.replace(STRICT, detect_language=True, max_rows=20),
}  # fmt: skip


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("piece", [7, 131_072])
def test_streaming_agrees_with_one_row_at_a_time(options, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_ROWS", piece)
    frame = crowd()
    wanted, counts = judged(frame, options)
    found, found_counts = written(frame, options, tmp_path)
    assert without_language(found) == without_language(wanted)
    if not options.detect_language:
        assert found == wanted
    assert found_counts == counts and sum(counts.values()) == len(frame)


def test_every_filter_alone_was_tested():
    assert len(ALONE) == len(dataclasses.fields(SelectionOptions)) - 2  # but the cap, and detection, which filters not


@pytest.mark.parametrize("options", [STRICT, CASES["all and cap"]], ids=["all", "cap"])
def test_row_order_changes_only_the_order(options, tmp_path):
    frame = crowd()
    found, counts = written(frame, options, tmp_path)
    for seed in range(3):
        shuffled, again = written(frame.sample(fraction=1, shuffle=True, seed=seed), options, tmp_path)
        assert sorted(map(str, shuffled)) == sorted(map(str, found)) and again == counts


def test_a_file_cut_in_parts_gives_the_same_rows(tmp_path):
    frame, found = crowd(), []
    for part in (frame[:1], frame[1:250], frame[250:]):
        found += written(part, STRICT, tmp_path)[0]
    assert found == written(frame, STRICT, tmp_path)[0]


def test_a_capped_file_in_parts_holds_the_capped_whole(tmp_path):
    """So the cap of a pool, taken by `metadata` among the survivors, is the one it would have taken among all."""
    frame, options = crowd(), SelectionOptions(max_rows=30)
    whole = {str(row) for row in written(frame, options, tmp_path)[0]}
    parts = [str(row) for part in (frame[:250], frame[250:]) for row in written(part, options, tmp_path)[0]]
    assert whole <= set(parts) and len(parts) < 70


def test_metadata_after_selection_is_metadata_without_it(tmp_path):
    options = MetadataOptions(("en", "de"), 5.1, 60, 2.5, 3)
    frame = crowd(2000).unique(["URL", "TEXT"], maintain_order=True)  # of twins it would judge the first only
    chosen = SelectionOptions(languages=("en", "de"), min_aesthetic=5.1, min_side_px=60, max_aspect_ratio=2.5)
    written(frame, chosen, tmp_path)
    same = {name: name for name in sources.COLUMNS}
    after = metadata.source_rows(pl.read_parquet(tmp_path / "out.parquet"), same, "s", "member")
    direct, _ = metadata.select(metadata.source_rows(frame, COLUMNS, "s", "member"), options)
    assert metadata.select(after, options)[0].equals(direct) and len(direct) > 100


def test_a_row_twice_stays_twice_and_ties_stay_together(tmp_path):
    frame = pl.concat([crowd(9)] * 3)
    found, counts = written(frame, SelectionOptions(max_rows=2), tmp_path)
    assert len(found) == counts[""] == 3 and len({str(row) for row in found}) == 1
    assert sum(counts.values()) == 27


@pytest.mark.parametrize(
    "name", [name for name, options in CASES.items() if not options.max_rows and not options.detect_language]
)
def test_counting_alone_says_what_writing_says(name, tmp_path):
    frame = crowd()
    assert selection.count(named(frame), CASES[name]) == written(frame, CASES[name], tmp_path)[1]


def test_counting_reads_only_what_decides(tmp_path):
    frame = crowd().with_columns(TEXT=pl.lit(b"\xff\xfe"))  # no caption at all: reading it as one would fail
    assert selection.count(named(frame), dataclasses.replace(STRICT, languages=()))[""] > 0
    with pytest.raises(UserError, match="cannot be read .*invalid utf8"), sources.reading("here"):
        written(frame, STRICT, tmp_path)


def test_no_row_left_is_a_file_without_rows_and_no_row_at_all_an_error(tmp_path):
    found, counts = written(crowd(), SelectionOptions(max_punsafe=-1.0, min_aesthetic=99, min_similarity=9), tmp_path)
    assert len(found) == counts[""] and len(found) < 20  # rows that lack all three values
    none = written(crowd(20).with_columns(AESTHETIC_SCORE=pl.lit(1.0)), SelectionOptions(min_aesthetic=5), tmp_path)
    assert none == ([], {"": 0, "aesthetic score": 20})
    assert pl.read_parquet_schema(tmp_path / "out.parquet") == pl.Schema(sources.TYPES)
    with pytest.raises(UserError, match="source has no rows, out.parquet, leave it out"):
        written(crowd(0), STRICT, tmp_path)


# ------------------------------------------------------------------------------------------------ the command

WORDS = [word for ours, theirs in COLUMNS.items() for word in ("--column", f"{ours}={theirs}")]
FILTERS = ["--languages", "en,de", "--min-aesthetic", "5.1", "--max-rows", "40"]


def run(source: object, folder: pathlib.Path, *more: str, words: list[str] = WORDS) -> pathlib.Path:
    output = folder / "out.parquet"
    cli.commands.main(
        ["select", "--source", str(source), "--output", str(output), *words, *more], standalone_mode=False
    )
    return output


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
    path = tmp_path / "part-0.parquet"
    crowd(3000).unique(["URL", "TEXT"], maintain_order=True)[:2000].write_parquet(path, row_group_size=500)
    return path


def test_the_command_writes_rows_counts_and_where_they_come_from(source, tmp_path, capsys):
    output = run(source, tmp_path, *FILTERS, "--pool", "member", "--dropped-output", str(tmp_path / "dropped.parquet"))
    kept, counts = judged(pl.read_parquet(source), SelectionOptions(("en", "de"), min_aesthetic=5.1, max_rows=40))
    assert pl.read_parquet(output).to_dicts() == kept and len(kept) == 40
    dropped = tables.read(tmp_path / "dropped.parquet", "dropped").to_pylist()
    assert {row["reason"]: row["rows"] for row in dropped} == {k: v for k, v in counts.items() if k}
    assert {(row["stage"], row["pool"]) for row in dropped} == {("select", "member")}
    made = tables.provenance(output)
    assert made["options"]["languages"] == ["en", "de"] and made["columns"] == COLUMNS
    assert made["inputs"] == [tables.file_hash(source)[:16]] and str(tmp_path) not in json.dumps(made)
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"part-0.parquet: 2,000 rows, 40 stay, aesthetic score [\d,]+, language \d+, above .*", said)


def test_without_an_output_rows_are_only_counted(source, tmp_path, capsys):
    cli.commands.main(["select", "--source", str(source), *WORDS, "--min-aesthetic", "5.1"], standalone_mode=False)
    counts = judged(pl.read_parquet(source), SelectionOptions(min_aesthetic=5.1))[1]
    lost = f"aesthetic score {counts['aesthetic score']:,}"
    said = f"part-0.parquet: 2,000 rows, {counts['']:,} stay, {lost}\n"
    assert capsys.readouterr().err == said
    assert [path.name for path in tmp_path.iterdir()] == ["part-0.parquet"]


def test_a_source_without_a_language_has_it_detected(source, tmp_path):
    output = run(source, tmp_path, "--languages", "en", words=["--column", "url=URL", "--column", "caption=TEXT"])
    found = pl.read_parquet(output)
    assert set(found["language"]) == {"en", None} and set(found["caption"]) == {CAPTIONS[0], "", None}


BREAKER = """
import os, signal, sys
import polars as pl
from mia import __main__, selection
real, seen = selection.select, []
def bomb(column):
    seen.append(len(column))
    if len(seen) > 3: os.kill(os.getpid(), signal.SIGKILL)
    return column
def broken(rows, options):
    broken_url = pl.col("url").map_batches(bomb, is_elementwise=True, return_dtype=pl.String)
    return real(rows, options).with_columns(broken_url)
selection.select = broken
from mia import sources
sources.PIECE_ROWS = 500
sys.argv[0] = "mia"
__main__.main()
"""


def test_killed_in_the_middle_leaves_nothing_that_counts_and_a_rerun_gives_the_same_bytes(source, tmp_path):
    output = run(source, tmp_path, "--min-aesthetic", "5.1")
    wanted = output.read_bytes()
    output.unlink()
    words = ["select", "--source", str(source), "--output", str(output), *WORDS, "--min-aesthetic", "5.1"]
    done = subprocess.run([sys.executable, "-c", BREAKER, *words], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"part-0.parquet"}
    assert len(left) == 1 and left.pop().endswith(".part")
    assert run(source, tmp_path, "--min-aesthetic", "5.1").read_bytes() == wanted
    assert {path.name for path in tmp_path.iterdir()} == {"part-0.parquet", "out.parquet"}


def test_the_number_of_threads_changes_no_byte(source, tmp_path):
    wanted = run(source, tmp_path, *FILTERS).read_bytes()
    output = tmp_path / "again.parquet"
    words = ["select", "--source", str(source), "--output", str(output), *WORDS, *FILTERS]
    subprocess.run([sys.executable, "-m", "mia", *words], check=True, env=os.environ | {"POLARS_MAX_THREADS": "4"})
    assert output.read_bytes() == wanted


def truncated(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def corrupt(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[200:300] = b"\xff" * 100
    path.write_bytes(content)


def mistyped(path: pathlib.Path) -> None:
    pl.read_parquet(path).with_columns(AESTHETIC_SCORE=pl.lit("fine")).write_parquet(path)


def listed(path: pathlib.Path) -> None:
    pl.read_parquet(path).with_columns(WIDTH=pl.lit([1, 2])).write_parquet(path)


def lacking(path: pathlib.Path) -> None:
    pl.read_parquet(path).drop("punsafe").write_parquet(path)


def rowless(path: pathlib.Path) -> None:
    pl.read_parquet(path).clear().write_parquet(path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncated, r"source cannot be read \(parquet: .*PAR1.*part-0.parquet, fetch it anew"),
        (corrupt, r"source cannot be read \(.*part-0.parquet, fetch it anew"),
        (mistyped, r"a column cannot be read as its type \(.*fine.*part-0.parquet, mend the source"),
        (listed, r"a column cannot be read as its type \(cannot cast List.*part-0.parquet, mend the source"),
        (
            lacking,
            r"has no column 'punsafe' for 'punsafe', .*part-0.parquet, map it in .* or by --column; it has \['URL'",
        ),
        (rowless, r"source has no rows, .*, leave it out"),
        (pathlib.Path.unlink, r"source does not exist, .*part-0.parquet, mend its path"),
    ],
)
def test_a_bad_source_is_one_clear_line_and_no_output(harm, message, source, tmp_path):
    harm(source)
    with pytest.raises(UserError, match=message) as caught:
        run(source, tmp_path, *FILTERS)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"part-0.parquet"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--column", "caption"], "'caption' names no column, --column, write OURS=THEIRS"),
        (
            [*WORDS, "--column", "tittle=TEXT"],
            "'tittle' is no column of ours, metadata.columns or --column, map url, caption",
        ),
        (["--column", "url=URL"], "'caption' has no source's column"),
    ],
)
def test_a_bad_map_of_columns_is_refused(words, message, source, tmp_path):
    with pytest.raises(UserError, match=message):
        run(source, tmp_path, words=words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-rows", "-1"], "--max-rows: -1 is less than 0; rows to keep of each file"),
        (["--max-aspect-ratio", "0.5"], "--max-aspect-ratio: 0.5 is less than 1"),
        (["--min-side-px", "-5"], "--min-side-px: -5 is less than 0"),
    ],
)
def test_a_flag_out_of_range_is_refused_as_in_the_configuration(words, message, source, tmp_path):
    with pytest.raises(UserError, match=message):
        run(source, tmp_path, *words)


def test_a_filter_on_a_column_that_no_one_named_is_spoken_of(source, tmp_path, capsys):
    words = ["--column", "url=URL", "--column", "caption=TEXT", "--column", "width=WIDTH"]
    run(source, tmp_path, "--min-aesthetic", "5", "--min-side-px", "60", words=words)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{source}: no column is named for 'aesthetic', so min_aesthetic holds nothing back"
    assert said[1] == f"{source}: no column is named for 'height', so min_side_px may hold less back" and len(said) == 3


def test_a_full_disk_is_said_in_one_line(source, tmp_path):
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    rows = sources.named(sources.scan(source), COLUMNS, "part-0")
    with (
        pytest.raises(UserError, match="^disk is full, part-0, make room and run this again"),
        sources.reading("part-0"),
    ):
        selection.write(rows, full, SelectionOptions(), {})


def test_a_user_sees_one_line_and_a_failure(tmp_path):
    words = ["select", "--source", "nowhere.parquet", "--output", str(tmp_path / "o.parquet")]
    done = subprocess.run([sys.executable, "-m", "mia", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: source does not exist, nowhere.parquet, mend its path\n"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_source_of_one_piece_is_written_in_batches(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_ROWS", 7)
    rows = pl.DataFrame({"url": [f"u{i}" for i in range(50)], "caption": ["c"] * 50, "width": range(50)})
    getattr(rows, {"csv": "write_csv", "jsonl": "write_ndjson"}[kind])(tmp_path / f"s.{kind}")
    columns = {"url": "url", "caption": "caption", "width": "width", "height": "width"}
    pieces = sources.named(sources.scan(tmp_path / f"s.{kind}"), columns, "s")
    for cap, left in ((0, 40), (15, 15)):
        counts = selection.write(pieces, tmp_path / "out", SelectionOptions(min_side_px=10, max_rows=cap), {})
        about = pq.ParquetFile(tmp_path / "out").metadata
        assert counts[""] == about.num_rows == left
        assert max(about.row_group(i).num_rows for i in range(about.num_row_groups)) == 7
        found = pq.read_table(tmp_path / "out")["url"].to_pylist()
        assert found == sorted(found, key=lambda url: int(url[1:]))
