"""Sources of image-caption metadata into one table: named columns, sample ids, and the filters before any download."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from mia import sources, tables
from mia.config import MetadataOptions
from mia.errors import UserError


def source_rows(rows: pl.DataFrame, columns: Mapping[str, str], source: str, pool: str) -> pl.DataFrame:
    """One source's rows under our column names, with `sample_id`, `source` and `pool`; absent optional columns empty.

    Args:
        rows: as the source has them.
        columns: our name -> the source's name.

    Raises:
        UserError: a name that is none of ours, no url or no caption, a mapped column that the source lacks, or one that
            cannot be read as its type.
    """
    with sources.reading(source):
        out = sources.named([rows.lazy()], columns, source)[0].collect()
    out = out.with_columns(
        sources.clean_caption(pl.col("caption")), pl.lit(source).alias("source"), pl.lit(pool).alias("pool")
    )
    urls, captions = out["url"].to_list(), out["caption"].to_list()
    ids = [tables.sample_id(u or "", c or "") for u, c in zip(urls, captions, strict=True)]
    return out.with_columns(pl.Series("sample_id", ids, pl.String))


def select(rows: pl.DataFrame, options: MetadataOptions) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows that pass every filter, and counts of the others (reason, pool, rows), each row once, by its first reason.

    A row that lacks a value passes the filter on it. Of rows with one url and caption a member is kept before others.

    Raises:
        UserError: a pool that had rows has none left.
    """
    side = pl.min_horizontal("width", "height")
    aspect = pl.max_horizontal("width", "height") / side
    reasons = {
        "url or caption empty": pl.col("url").fill_null("").eq("") | pl.col("caption").fill_null("").eq(""),
        "caption too short": pl.col("caption").str.len_chars() < options.min_caption_chars,
        "language": ~pl.col("language").is_in(options.languages) if options.languages else pl.lit(False),
        "aesthetic score": pl.col("aesthetic") < options.min_aesthetic,
        "too small": side < options.min_side_px,
        "aspect ratio": aspect > options.max_aspect_ratio,
        "same url and caption": pl.int_range(pl.len()).over("sample_id") > 0,
    }
    reason = pl.coalesce(pl.when(test.fill_null(False)).then(pl.lit(name)) for name, test in reasons.items())
    order = ["sample_id", "pool", *(name for name in rows.columns if name not in ("sample_id", "pool"))]
    marked = rows.sort(order, descending=[name == "pool" for name in order]).with_columns(reason.alias("reason"))
    if options.max_rows_per_pool:
        # By the id's second half: ranked by the first, the rows kept would all fall into the first shards.
        place = pl.when(pl.col("reason").is_null()).then(pl.col("sample_id").str.slice(16)).rank("ordinal").over("pool")
        over = place > options.max_rows_per_pool
        marked = marked.with_columns(
            pl.when(over).then(pl.lit("above max_rows_per_pool")).otherwise("reason").alias("reason")
        )
    kept = marked.filter(pl.col("reason").is_null()).drop("reason")
    for pool in rows["pool"].unique().sort():
        if not (kept["pool"] == pool).any():
            worst = marked.filter(pl.col("pool") == pool)["reason"].mode().first()
            raise UserError(
                f"no {pool} rows are left after the filters (most dropped for: {worst!s})",
                "metadata",
                "loosen that filter",
            )
    dropped = marked.drop_nulls("reason").group_by("reason", "pool").len("rows").sort("reason", "pool")
    return kept, dropped
