"""Which rows of one source file are worth keeping, decided as they stream by: cheap columns, language, a random cap.

Hundreds of files of millions of rows pass here, one job each; what is left of them is small enough for `metadata`.
"""

from __future__ import annotations

import collections
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import polars as pl
import pyarrow.parquet as pq

from mia import languages, sources, tables
from mia.config import SelectionOptions
from mia.errors import UserError

LANGUAGE, CAP = "language", "above max_rows"


def reasons(options: SelectionOptions) -> dict[str, pl.Expr]:
    """Reason -> whether a row is to go for it, null where the row lacks the value; the first that holds counts.

    An option left at its default takes part in nothing, so that its column need not be read.
    """
    short, long = pl.min_horizontal("width", "height"), pl.max_horizontal("width", "height")
    tests = {
        "min_aesthetic": ("aesthetic score", pl.col("aesthetic") < options.min_aesthetic),
        "min_similarity": ("similarity", pl.col("similarity") < options.min_similarity),
        "max_punsafe": ("unsafe", pl.col("punsafe") > options.max_punsafe),
        "max_pwatermark": ("watermark", pl.col("pwatermark") > options.max_pwatermark),
        "min_side_px": ("too small", short < options.min_side_px),
        "max_aspect_ratio": ("aspect ratio", long / short > options.max_aspect_ratio),
        "languages": (LANGUAGE, ~pl.col("language").is_in(options.languages)),
    }
    if options.detect_language:
        del tests["languages"]
    plain = SelectionOptions()
    return dict(test for name, test in tests.items() if getattr(options, name) != getattr(plain, name))


def count(pieces: Sequence[pl.LazyFrame], options: SelectionOptions) -> dict[str, int]:
    """Rows that go, by reason, and under "" those that stay, before any detected language and any cap.

    Only the columns that decide are read. `pieces` are as `sources.named` gives them.
    """
    names = ["", *reasons(options)]  # rows are grouped by small numbers, twice as fast as by names
    number = [pl.when(test).then(pl.lit(i, pl.UInt8)) for i, test in enumerate(reasons(options).values(), start=1)]
    reason = pl.coalesce(*number, pl.lit(0, pl.UInt8)).alias("reason")
    found: collections.Counter[int] = collections.Counter({0: 0})
    for piece in pieces:
        rows = piece.select(reason, pl.len()) if not number else piece.group_by(reason).len()
        found.update(dict(rows.collect(engine="streaming").iter_rows()))
    return {names[i]: n for i, n in sorted(found.items())}


def select(rows: pl.LazyFrame, options: SelectionOptions) -> pl.LazyFrame:
    """The rows that stay, in the order they had, before the cap.

    A row that lacks a value passes the filter on it. With `detect_language` the column `language` holds what was
    detected in the cleaned caption, in place of what the source says.
    """
    kept = rows.filter(*(test.fill_null(False).not_() for test in reasons(options).values()))
    if options.detect_language:
        caption = sources.clean_caption(pl.col("caption"))
        found = caption.map_batches(languages.detect, return_dtype=pl.String, is_elementwise=True)
        kept = kept.with_columns(found.alias("language"))
        if options.languages:
            kept = kept.filter(pl.col("language").is_in(options.languages).fill_null(True))
    return kept


def last_rank(kept: Sequence[pl.LazyFrame], max_rows: int) -> tuple[int, int]:
    """The highest of the `max_rows` lowest ranks, uint64, and how many rows there are.

    The rank is the second half of the sample id, hence as good as random and the same wherever a row stands; it is also
    what `metadata` caps a pool by.
    """
    lowest, total = pl.Series(dtype=pl.UInt64), 0
    for piece in kept:
        for found in _batches(piece.select(_rank())):
            total += len(found)
            lowest = pl.concat([lowest, found.to_series()]).bottom_k(max_rows)
    return lowest.max() or 0, total  # type: ignore[return-value]


def _rank() -> pl.Expr:
    named = pl.struct("url", sources.clean_caption(pl.col("caption")).alias("caption"))
    return named.map_batches(_ranks, return_dtype=pl.UInt64, is_elementwise=True)


def _ranks(rows: pl.Series) -> pl.Series:
    pairs = zip(*(rows.struct.field(name).to_list() for name in ("url", "caption")), strict=True)
    return pl.Series([int(tables.sample_id(url or "", text or "")[16:], 16) for url, text in pairs], dtype=pl.UInt64)


def write(
    pieces: Sequence[pl.LazyFrame], path: pathlib.Path, options: SelectionOptions, metadata: dict[str, str]
) -> dict[str, int]:
    """Writes the selected rows to `path` as Parquet and returns how many stay (under "") and go, by reason.

    With `max_rows` those of the lowest rank stay, in the order they had. Rows that tie with the last of them, which are
    the same row again, stay with it.

    Args:
        pieces: as `sources.named` gives them.
        metadata: put into the file's own metadata.

    Raises:
        UserError: the source has no rows at all.
    """
    counts = count(pieces, options)
    if not sum(counts.values()):
        raise UserError("source has no rows", path.name, "leave it out")
    kept, passed = [select(piece, options) for piece in pieces], None
    if options.max_rows:
        last, passed = last_rank(kept, options.max_rows)
        kept = [piece.filter(_rank() <= last) for piece in kept]
    written = _write(kept, path, metadata)
    passed = written if passed is None else passed
    lost = {LANGUAGE: counts[""] - passed, CAP: passed - written}
    return counts | {"": written} | {name: rows for name, rows in lost.items() if rows}


def _write(kept: Sequence[pl.LazyFrame], path: pathlib.Path, metadata: dict[str, str]) -> int:
    """A batch at a time: polars would read ahead of a sink that has little to write. lz4: the file is read once."""
    schema, rows = pl.DataFrame(schema=sources.TYPES).to_arrow().schema.with_metadata(metadata), 0
    with pq.ParquetWriter(path, schema, compression="lz4", use_dictionary=["language"]) as out:
        for found in itertools.chain.from_iterable(map(_batches, kept)):
            rows += len(found)
            out.write_table(found.to_arrow())
    return rows


def _batches(rows: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    """The rows in their order, `sources.PIECE_ROWS` at a time, so that a source of one large piece streams as well."""
    return iter(rows.collect_batches(chunk_size=sources.PIECE_ROWS, lazy=True, engine="streaming"))
