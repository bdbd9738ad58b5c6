"""Sources under our names, captions without control characters, and every row kept or dropped for one reason."""

from __future__ import annotations

import collections
import subprocess
import sys
import unicodedata

import numpy as np
import polars as pl
import polars.testing
import pyarrow as pa
import pytest

from mia import cli, metadata, sources, tables
from mia.cli import common
from mia.config import MetadataOptions
from mia.errors import UserError

COLUMNS = {
    "url": "URL", "caption": "TEXT", "language": "LANGUAGE", "width": "WIDTH", "height": "HEIGHT",
    "aesthetic": "AESTHETIC_SCORE", "similarity": "similarity", "punsafe": "punsafe", "pwatermark": "pwatermark",
}  # fmt: skip


def source(rows: int = 3, **changes: list) -> pl.DataFrame:
    """A source as LAION writes it."""
    columns = {
        "URL": [f"http://host/{i}.jpg" for i in range(rows)], "TEXT": [f"caption {i}" for i in range(rows)],
        "LANGUAGE": ["en"] * rows, "WIDTH": [640] * rows, "HEIGHT": [480] * rows, "AESTHETIC_SCORE": [5.5] * rows,
        "similarity": [0.3] * rows, "punsafe": [0.01] * rows, "pwatermark": [0.2] * rows,
    }  # fmt: skip
    return pl.DataFrame(columns | changes, strict=False)


def rows_of(frame: pl.DataFrame, pool: str = "member", columns: dict[str, str] | None = None) -> pl.DataFrame:
    return metadata.source_rows(frame, columns or COLUMNS, "part-0", pool)


# ------------------------------------------------------------------------------------------------ sources


def test_a_source_comes_under_our_names_and_types():
    found = rows_of(source(1, WIDTH=[640.0], AESTHETIC_SCORE=[6]), "candidate").row(0, named=True)
    assert found == {
        "url": "http://host/0.jpg", "caption": "caption 0", "language": "en", "width": 640, "height": 480,
        "aesthetic": 6.0, "similarity": pytest.approx(0.3), "punsafe": pytest.approx(0.01),
        "pwatermark": pytest.approx(0.2), "source": "part-0", "pool": "candidate",
        "sample_id": tables.sample_id("http://host/0.jpg", "caption 0"),
    }  # fmt: skip


def test_columns_that_a_source_lacks_are_empty_and_other_columns_left_out():
    found = rows_of(source(2, hash=[1, 2]), columns={"url": "URL", "caption": "TEXT"})
    assert found["width"].to_list() == found["aesthetic"].to_list() == [None, None]
    assert "hash" not in found.columns
    pl.concat([found, rows_of(source())])  # the same columns and types, whatever the source had


def test_the_id_is_of_the_cleaned_caption():
    found = rows_of(source(1, TEXT=["  a\tred\n\ncat\u200b "]))
    assert found["caption"][0] == "a red cat"
    assert found["sample_id"][0] == tables.sample_id("http://host/0.jpg", "a red cat")


def test_nan_is_a_value_that_is_not_there():
    found = rows_of(source(1, WIDTH=[float("nan")], punsafe=[float("nan")]))
    assert found["width"][0] is None and found["punsafe"][0] is None
    fields = [tables.SCHEMAS["metadata"].field(name) for name in found.columns]
    assert tables.check(found.to_arrow().cast(pa.schema(fields)), "metadata").num_rows == 1


@pytest.mark.parametrize(
    ("frame", "columns", "message"),
    [
        (source(), COLUMNS | {"url": "url"}, "source has no column 'url' for 'url', part-0, .*it has \\['URL', 'TEXT'"),
        (
            source(),
            {"url": "URL", "captoin": "TEXT"},
            "'captoin' is no column of ours, metadata.columns or --column, map url, caption",
        ),
        (source(), {"url": "URL"}, "'caption' has no source's column, metadata.columns"),
        (
            source(WIDTH=["wide"] * 3),
            COLUMNS,
            "a column cannot be read as its type .*'WIDTH'.*, part-0, mend the source",
        ),
        (source(WIDTH=[2**40] * 3), COLUMNS, "a column cannot be read as its type .*WIDTH"),
        (source(TEXT=[["a", "list"]] * 3), COLUMNS, "a column cannot be read as its type .*TEXT"),
        (source(TEXT=[b"\xff\xfe"] * 3), COLUMNS, "source cannot be read .*utf8"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(frame, columns, message):
    with pytest.raises(UserError, match=message) as caught:
        rows_of(frame, columns=columns)
    assert "\n" not in str(caught.value)


def test_every_control_character_becomes_a_space_and_every_letter_stays():
    """Oracle: Python's own character database, one character at a time."""
    points = [chr(i) for i in (*range(0x0, 0x500), *range(0x2000, 0x2100), 0xFEFF, 0xFFFC, 0x1F408, 0xE0001, 0xAD)]
    captions = [f"a{c}b" for c in points]
    found = pl.DataFrame({"c": captions}).select(sources.clean_caption(pl.col("c")))["c"].to_list()
    for character, cleaned in zip(points, found, strict=True):
        gone = unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") or character.isspace()
        assert cleaned == ("a b" if gone else f"a{character}b"), hex(ord(character))


def test_runs_of_white_space_become_one_space_and_none_stands_at_the_ends():
    dirty = ["\x00\x1b[31mred\x07", " \u00a0 two\r\n\tlines  ", "\u202eright to left", "\n\t ", "", None, "one"]
    found = pl.DataFrame({"c": dirty}).select(sources.clean_caption(pl.col("c")))["c"].to_list()
    assert found == ["[31mred", "two lines", "right to left", "", "", None, "one"]


# ------------------------------------------------------------------------------------------------ filters

STRICT = MetadataOptions(
    languages=("en", "de"), min_aesthetic=5.0, min_side_px=100, max_aspect_ratio=2.0, min_caption_chars=3
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"URL": [""]}, "url or caption empty"),
        ({"URL": [None]}, "url or caption empty"),
        ({"TEXT": ["\x00 \n"]}, "url or caption empty"),
        ({"TEXT": [None]}, "url or caption empty"),
        ({"TEXT": ["ab"]}, "caption too short"),
        ({"TEXT": ["猫猫"]}, "caption too short"),  # characters, not bytes
        ({"TEXT": ["abc"]}, None),
        ({"LANGUAGE": ["fr"]}, "language"),
        ({"LANGUAGE": ["de"]}, None),
        ({"LANGUAGE": [None]}, None),  # unknown is no reason
        ({"AESTHETIC_SCORE": [4.99]}, "aesthetic score"),
        ({"AESTHETIC_SCORE": [5.0]}, None),
        ({"AESTHETIC_SCORE": [None]}, None),
        ({"WIDTH": [99], "HEIGHT": [100]}, "too small"),
        ({"WIDTH": [100], "HEIGHT": [99]}, "too small"),
        ({"WIDTH": [100], "HEIGHT": [100]}, None),
        ({"WIDTH": [0], "HEIGHT": [0]}, "too small"),
        ({"WIDTH": [200], "HEIGHT": [100]}, None),
        ({"WIDTH": [201], "HEIGHT": [100]}, "aspect ratio"),
        ({"WIDTH": [100], "HEIGHT": [201]}, "aspect ratio"),
        ({"WIDTH": [None], "HEIGHT": [None]}, None),
        ({"LANGUAGE": ["fr"], "WIDTH": [1], "AESTHETIC_SCORE": [1.0]}, "language"),  # the first of several reasons
    ],
)
def test_a_row_is_dropped_for_its_first_reason(changes, reason):
    other = rows_of(source(1, URL=["http://host/kept.jpg"]))
    kept, dropped = metadata.select(pl.concat([rows_of(source(1, **changes)), other]), STRICT)
    found = [] if reason is None else [{"reason": reason, "pool": "member", "rows": 1}]
    assert dropped.to_dicts() == found and len(kept) == 2 - len(found)


def crowd(seed: int = 0, rows: int = 400) -> pl.DataFrame:
    """Rows of three pools in which every filter has work, with repeated ids within and across pools."""
    r = np.random.default_rng(seed)
    parts = []
    for first, pool in enumerate(("member", "candidate", "control")):
        number = r.integers(200 * first, 200 * first + 300, rows)
        parts.append(
            rows_of(
                source(
                    rows,
                    URL=[f"http://host/{i}" if i % 40 else "" for i in number],
                    TEXT=[f"caption {i}" if i % 7 else "ab" for i in number],
                    LANGUAGE=[["en", "fr", None, "de"][i] for i in r.integers(0, 4, rows)],
                    WIDTH=[int(i) if i > 60 else None for i in r.integers(50, 300, rows)],
                    HEIGHT=r.integers(50, 300, rows).tolist(),
                    AESTHETIC_SCORE=[float(x) if x < 9 else None for x in r.uniform(4.5, 10, rows)],
                ),
                pool,
            )
        )
    return pl.concat(parts)


def judged(rows: list[dict], options: MetadataOptions) -> tuple[list[dict], collections.Counter]:
    """Oracle: one row at a time, in plain Python; members first, then by value."""
    rank = {"member": 0, "control": 1, "candidate": 2}

    def place(row: dict) -> tuple:
        return row["sample_id"], rank[row["pool"]], [(v is not None, v) for k, v in row.items() if k != "sample_id"]

    seen, kept, gone, taken = set(), [], collections.Counter(), collections.Counter()
    for row in sorted(rows, key=place):
        sides = [side for side in (row["width"], row["height"]) if side is not None]
        if not row["url"] or not row["caption"]:
            reason = "url or caption empty"
        elif len(row["caption"]) < options.min_caption_chars:
            reason = "caption too short"
        elif options.languages and row["language"] is not None and row["language"] not in options.languages:
            reason = "language"
        elif row["aesthetic"] is not None and row["aesthetic"] < options.min_aesthetic:
            reason = "aesthetic score"
        elif sides and min(sides) < options.min_side_px:
            reason = "too small"
        elif sides and max(sides) > options.max_aspect_ratio * min(sides):
            reason = "aspect ratio"
        elif row["sample_id"] in seen:
            reason = "same url and caption"
        else:
            reason = None
        seen.add(row["sample_id"])
        if reason:
            gone[reason, row["pool"]] += 1
        else:
            kept.append(row)
    for row in sorted(kept, key=lambda row: row["sample_id"][16:]):
        taken[row["pool"]] += 1
        if options.max_rows_per_pool and taken[row["pool"]] > options.max_rows_per_pool:
            gone["above max_rows_per_pool", row["pool"]] += 1
            kept.remove(row)
    return kept, gone


@pytest.mark.parametrize(
    "options",
    [STRICT, MetadataOptions(), MetadataOptions(("en",), 5.0, 80, 2.0, 3, 4)],
    ids=["strict", "default", "capped"],
)
def test_filters_agree_with_plain_python_in_any_row_order(options):
    rows = crowd()
    wanted, gone = judged(rows.to_dicts(), options)
    for seed in range(3):
        kept, dropped = metadata.select(rows.sample(fraction=1, shuffle=True, seed=seed), options)
        assert kept.to_dicts() == wanted
        assert {(r["reason"], r["pool"]): r["rows"] for r in dropped.to_dicts()} == dict(gone)
    assert len(rows) == len(wanted) + sum(gone.values()) and len(gone) > 4


def test_no_id_is_kept_twice_and_a_member_is_never_a_candidate_too():
    rows = crowd()
    kept, _ = metadata.select(rows, MetadataOptions())
    assert kept["sample_id"].is_unique().all()
    members = set(rows.filter(pl.col("pool") == "member", pl.col("url") != "")["sample_id"])
    assert not members & set(kept.filter(pl.col("pool") != "member")["sample_id"])


def test_a_candidate_equal_to_a_member_goes_even_when_the_member_goes_too():
    known = source(1, AESTHETIC_SCORE=[1.0])
    rows = pl.concat([rows_of(known), rows_of(source(1), "candidate"), rows_of(source(4), "member")[2:]])
    rows = pl.concat([rows, rows_of(source(9)[8:], "candidate")])
    kept, dropped = metadata.select(rows, STRICT)
    assert kept["pool"].to_list().count("candidate") == 1
    assert ("same url and caption", "candidate", 1) in dropped.rows()


def test_the_cap_ranks_by_the_second_half_of_the_id_so_that_shards_stay_even():
    kept, _ = metadata.select(crowd(), MetadataOptions(max_rows_per_pool=3))
    every, _ = metadata.select(crowd(), MetadataOptions())
    for pool in ("member", "candidate"):
        ids = sorted(every.filter(pl.col("pool") == pool)["sample_id"], key=lambda name: name[16:])
        assert kept.filter(pl.col("pool") == pool)["sample_id"].to_list() == sorted(ids[:3])


def test_a_pool_that_loses_all_its_rows_is_an_error_that_names_the_filter():
    rows = pl.concat([rows_of(source()), rows_of(source(3, URL=["a", "b", "c"], LANGUAGE=["fr"] * 3), "candidate")])
    message = (
        r"^no candidate rows are left after the filters \(most dropped for: language\), metadata, loosen that filter$"
    )
    with pytest.raises(UserError, match=message):
        metadata.select(rows, STRICT)


# ------------------------------------------------------------------------------------------------ the command


def run(tmp_path, *more: str, member: str = "m.parquet") -> None:
    source(40, URL=[f"m{i}" for i in range(40)]).write_parquet(tmp_path / "m.parquet")
    dirty = [f"a\x00red\u2028cat {i}" for i in range(30)]
    source(30, URL=[f"c{i}" for i in range(30)], TEXT=dirty, WIDTH=[640] * 25 + [9] * 5).write_parquet(
        tmp_path / "c.parquet"
    )
    columns = [word for ours, theirs in COLUMNS.items() for word in ("--column", f"{ours}={theirs}")]
    words = ["metadata", "--member", str(tmp_path / member), "--candidate", str(tmp_path / "c.parquet"), *columns]
    words += ["--output", str(tmp_path / "out.parquet"), "--dropped-output", str(tmp_path / "dropped.parquet")]
    cli.commands.main([*words, *more], standalone_mode=False)


def test_the_command_writes_both_tables_and_they_add_up(tmp_path):
    run(tmp_path, "--min-side-px", "16")
    found = tables.read(tmp_path / "out.parquet", "metadata")
    dropped = tables.read(tmp_path / "dropped.parquet", "dropped")
    assert dropped.to_pylist() == [{"stage": "metadata", "reason": "too small", "pool": "candidate", "rows": 5}]
    assert found.num_rows == 65
    captions = [row["caption"] for row in found.to_pylist() if row["pool"] == "candidate"]
    assert sorted(captions) == sorted(f"a red cat {i}" for i in range(25))
    assert tables.provenance(tmp_path / "out.parquet")["columns"] == COLUMNS


def test_the_command_gives_the_same_bytes_for_shuffled_sources(tmp_path):
    run(tmp_path)
    before = tables.read(tmp_path / "out.parquet", "metadata")
    shuffled = pl.read_parquet(tmp_path / "m.parquet").sample(fraction=1, shuffle=True, seed=1)
    shuffled.write_parquet(tmp_path / "n.parquet")
    run(tmp_path, member="n.parquet")
    after = tables.read(tmp_path / "out.parquet", "metadata")
    names = [name for name in before.column_names if name != "source"]
    assert before.select(names).equals(after.select(names))


def selected(tmp_path, name: str, frame: pl.DataFrame, *more: str) -> tuple[str, str]:
    """What `mia select` makes of a source with columns of its own, and its counts."""
    frame.rename({"URL": "link", "TEXT": "text"}).write_csv(tmp_path / f"{name}.csv")
    output, dropped = tmp_path / f"{name}-0.parquet", tmp_path / f"{name}-dropped.parquet"
    words = ["--column", "url=link", "--column", "caption=text", "--column", "width=WIDTH", "--column", "height=HEIGHT"]
    words += ["--output", str(output), "--dropped-output", str(dropped), "--pool", "candidate", *more]
    cli.commands.main(["select", "--source", str(tmp_path / f"{name}.csv"), *words], standalone_mode=False)
    return str(output), str(dropped)


def test_what_select_wrote_is_read_by_our_own_names_beside_sources_with_theirs(tmp_path):
    frame = source(10, URL=[f"s{i}" for i in range(10)], WIDTH=[9] * 4 + [640] * 6)
    first, lost = selected(tmp_path, "one", frame, "--min-side-px", "16")
    second, lost_too = selected(tmp_path, "two", frame.with_columns(URL="x" + pl.col("URL")), "--min-side-px", "16")
    run(tmp_path, "--candidate", first, "--candidate", second, "--dropped", lost, "--dropped", lost_too)
    found = tables.read(tmp_path / "out.parquet", "metadata").to_pylist()
    mine = [row for row in found if row["source"] in ("one", "two")]
    assert len(mine) == 12 and {row["width"] for row in mine} == {640} and len(found) == 40 + 30 + 12
    dropped = tables.read(tmp_path / "dropped.parquet", "dropped").to_pylist()
    assert dropped == [{"stage": "select", "reason": "too small", "pool": "candidate", "rows": 8}]
    assert tables.provenance(tmp_path / "out.parquet")["columns"] == COLUMNS


def test_counts_of_a_web_scale_source_are_handed_on(tmp_path):
    """More than 32 bits hold, in one table and in the sum of two."""
    paths, words = [tmp_path / "one", tmp_path / "two"], []
    for path in paths:
        common.write_dropped(path, [("select", "language", "candidate", 2_300_000_000)], {}, 2_300_000_000, 0)
        words += ["--dropped", str(path)]
    run(tmp_path, *words)
    dropped = tables.read(tmp_path / "dropped.parquet", "dropped").to_pylist()
    assert [row["rows"] for row in dropped if row["stage"] == "select"] == [4_600_000_000]


def test_filters_of_both_stages_hold_and_each_counts_its_own(tmp_path):
    frame = source(10, URL=[f"s{i}" for i in range(10)], WIDTH=[9] * 4 + [100] * 3 + [640] * 3)
    output, lost = selected(tmp_path, "one", frame, "--min-side-px", "16")
    run(tmp_path, "--candidate", output, "--dropped", lost, "--min-side-px", "200")
    kept = [row for row in tables.read(tmp_path / "out.parquet", "metadata").to_pylist() if row["source"] == "one"]
    assert len(kept) == 3
    dropped = tables.read(tmp_path / "dropped.parquet", "dropped").to_pylist()
    assert {(row["stage"], row["rows"]) for row in dropped} == {("select", 4), ("metadata", 3 + 5)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dropped", "nowhere.parquet"), "dropped file does not exist, nowhere.parquet"),
        (("--min-side-px", "10000"), "no candidate rows are left after the filters"),
        (("--column", "caption"), "'caption' names no column, --column, write OURS=THEIRS"),
        (("--column", "tittle=TEXT"), "'tittle' is no column of ours, metadata.columns"),
        (("--column", "width=BREADTH"), "source has no column 'BREADTH' for 'width', m, "),
        (("--candidate", "nowhere.parquet"), "source does not exist, nowhere.parquet, mend metadata.sources"),
        (("--candidate", __file__), "source cannot be read as Parquet .*test_metadata.py, fetch it anew"),
    ],
)
def test_the_command_refuses_and_writes_nothing(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, *words)
    assert {path.name for path in tmp_path.iterdir()} == {"c.parquet", "m.parquet"}


def test_a_user_sees_one_line_and_a_failure(tmp_path):
    source().write_parquet(tmp_path / "m.parquet")
    words = ["--member", str(tmp_path / "m.parquet"), "--candidate", "nowhere.parquet", "--output", str(tmp_path / "o")]
    words += ["--dropped-output", str(tmp_path / "d"), "--column", "url=URL", "--column", "caption=TEXT"]
    done = subprocess.run([sys.executable, "-m", "mia", "metadata", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: source does not exist, nowhere.parquet, mend metadata.sources\n"


def test_the_embedded_corpus_passes_its_own_filters():
    """Every row of the example is kept or dropped for a reason, and each pool keeps most of its rows."""
    frames = []
    for pool, name in (("member", "members"), ("candidate", "candidates"), ("control", "control")):
        frames.append(rows_of(pl.read_parquet(f"resources/example/{name}.parquet"), pool))
    rows = pl.concat(frames)
    kept, dropped = metadata.select(rows, MetadataOptions(("en",), 0.0, 16, 8.0, 3))
    assert len(kept) + dropped["rows"].sum() == len(rows)
    polars.testing.assert_frame_equal(kept, kept.sort("sample_id"))
    for pool in ("member", "candidate", "control"):
        assert (kept["pool"] == pool).sum() > 0.5 * (rows["pool"] == pool).sum()


@pytest.mark.parametrize(("pool", "flag"), [("member", "m"), ("candidate", "c")])
def test_a_pool_without_any_row_is_refused(pool, flag, tmp_path):
    """As `mia select` leaves it where every row was dropped."""
    for name in "mc":
        source(3 * (name != flag), URL=[f"{name}{i}" for i in range(3 * (name != flag))]).write_parquet(tmp_path / name)
    columns = [word for ours, theirs in COLUMNS.items() for word in ("--column", f"{ours}={theirs}")]
    words = ["metadata", "--member", str(tmp_path / "m"), "--candidate", str(tmp_path / "c"), *columns]
    words += ["--output", str(tmp_path / "out"), "--dropped-output", str(tmp_path / "dropped")]
    with pytest.raises(UserError, match=f"^no source of the {pool} pool has a row, .*/{flag}, name another, or loosen"):
        cli.commands.main(words, standalone_mode=False)


def test_a_pool_of_which_select_dropped_all_is_refused_and_one_of_two_such_files_is_not(tmp_path):
    source(3, URL=["m1", "m2", "m3"]).write_parquet(tmp_path / "m")
    source(3, URL=["c1", "c2", "c3"], height=[10.0] * 3).write_parquet(tmp_path / "c")
    columns = [word for ours, theirs in COLUMNS.items() for word in ("--column", f"{ours}={theirs}")]
    words = ["select", "--source", str(tmp_path / "c"), *columns, "--min-side-px", "500"]
    cli.commands.main([*words, "--output", str(tmp_path / "none")], standalone_mode=False)
    words = ["metadata", "--member", str(tmp_path / "m"), *columns]
    words += ["--output", str(tmp_path / "out"), "--dropped-output", str(tmp_path / "dropped")]
    with pytest.raises(UserError, match="^no source of the candidate pool has a row, .*/none, name another, or loosen"):
        cli.commands.main([*words, "--candidate", str(tmp_path / "none")], standalone_mode=False)
    assert not (tmp_path / "out").exists()
    both = ["--candidate", str(tmp_path / "none"), "--candidate", str(tmp_path / "c")]
    with pytest.raises(UserError, match="^no source of the control pool has a row, .*/none"):
        cli.commands.main([*words, *both, "--control", str(tmp_path / "none")], standalone_mode=False)
    cli.commands.main([*words, *both], standalone_mode=False)
    assert sorted(tables.read(tmp_path / "out", "metadata")["pool"].to_pylist()) == ["candidate"] * 3 + ["member"] * 3
