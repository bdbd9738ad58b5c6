"""Commands that build the dataset: metadata, images, embeddings, dedup, sanitize, distance."""

from __future__ import annotations

import pathlib
from typing import Any

import click
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from mia import tables
from mia.cli import common
from mia.cli.common import PATH, many, one, seed_option, stage_options
from mia.errors import UserError


@click.command()
@click.option(
    "--member", "members", type=PATH, multiple=True, required=True, help="Parquet with rows the target was trained on."
)
@click.option(
    "--candidate", "candidates", type=PATH, multiple=True, required=True, help="Parquet with possible non-members."
)
@click.option(
    "--control", "controls", type=PATH, multiple=True, help="Parquet with rows for the negative control's training."
)
@click.option(
    "--column", "columns", multiple=True, metavar="OURS=THEIRS", help="How the sources name a column of ours."
)
@one("--output", "The metadata table.")
@one("--dropped-output", "Counts of rows dropped, by reason.")
@stage_options("metadata")
def metadata(
    members: Any, candidates: Any, controls: Any, columns: Any, output: Any, dropped_output: Any, options: Any
) -> None:
    """Bring sources into one metadata table and drop rows not worth a download."""
    from mia import metadata as stage

    wrong = [pair for pair in columns if "=" not in pair]
    if wrong:
        raise UserError(f"'{wrong[0]}' names no column", "--column", "write OURS=THEIRS, as in caption=TEXT")
    mapping = dict(pair.split("=", 1) for pair in columns) or {c: c for c in ("url", "caption")}
    parts = []
    for pool, paths in (("member", members), ("candidate", candidates), ("control", controls)):
        for path in paths:
            parts.append(stage.source_rows(_rows(path), mapping, path.stem, pool))
    rows = pl.concat(parts)
    kept, dropped = stage.select(rows, options)
    made = common.made_by("metadata", options, None, [*members, *candidates, *controls], columns=mapping)
    schema = tables.SCHEMAS["metadata"]
    tables.write(output, kept.select(schema.names).to_arrow().cast(_plain(schema)), "metadata", made)
    counts = [("metadata", r["reason"], r["pool"], r["rows"]) for r in dropped.to_dicts()]
    write_dropped(dropped_output, counts, made, rows_in=len(rows), rows_out=len(kept))


def _rows(path: pathlib.Path) -> pl.DataFrame:
    if not path.is_file():
        raise UserError("source does not exist", path, "mend metadata.sources")
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.ComputeError, OSError) as problem:
        raise UserError(f"source cannot be read as Parquet ({problem})", path, "fetch it anew") from problem


def _plain(schema: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(f.name, f.type) for f in schema])


def write_dropped(path: Any, counts: list[tuple], made: dict, rows_in: int, rows_out: int) -> None:
    """Write the dropped table, holding rows in = rows out + rows dropped."""
    total = sum(count for *_, count in counts)
    if rows_in != rows_out + total:
        raise AssertionError(f"{rows_in} rows in, {rows_out} out, {total} dropped")
    schema = tables.SCHEMAS["dropped"]
    table = pa.Table.from_pylist([dict(zip(schema.names, count, strict=True)) for count in counts], schema=schema)
    tables.write(path, table, "dropped", made)


@click.command()
@one("--metadata", "The metadata table.")
@click.option("--shard", type=int, default=0, help="This job's share of the id space.")
@click.option("--shards", type=click.IntRange(1), default=1, help="Number of shares.")
@click.option("--root", type=PATH, default=".", help="Folder that relative file: URLs start from.")
@click.option("--concurrency", type=click.IntRange(1), default=32, help="Downloads at a time; changes no result.")
@click.option("--timeout-s", type=float, default=30.0, help="Seconds for one download, in all.")
@one("--output", "The images table of this shard.")
@stage_options("images")
def images(
    metadata: Any, shard: int, shards: int, root: Any, concurrency: int, timeout_s: float, output: Any, options: Any
) -> None:
    """Fetch the original bytes of a shard's images; every row ends with one status."""
    from mia import images as stage

    if not 0 <= shard < shards:
        raise UserError(f"shard {shard} of {shards} does not exist", "--shard", f"give a number from 0 to {shards - 1}")
    rows = tables.read(metadata, "metadata")
    rows = rows.filter(pa.array(tables.shard_of(rows["sample_id"].to_pylist(), shards) == shard))
    found = stage.fetch(rows, options, concurrency=concurrency, timeout_s=timeout_s, root=root)
    counts = pc.value_counts(found["status"]).to_pylist()
    click.echo(f"shard {shard}: " + ", ".join(f"{c['values']} {c['counts']}" for c in counts), err=True)
    made = common.made_by(
        "images", options, None, [metadata], shard=f"{shard}/{shards}", libraries=("pillow", "imagehash")
    )
    tables.write(output, found, "images", made)


@click.command()
@one("--metadata", "The metadata table.")
@one("--images", "One shard of the images table.")
@common.device_option
@common.batch_option
@one("--output", "The embeddings table of this shard.")
@stage_options("embeddings")
def embeddings(metadata: Any, images: Any, device: str, batch_size: int, output: Any, options: Any) -> None:
    """Unit CLIP embeddings of a shard's images and captions."""
    from mia import embeddings as stage
    from mia import models

    shown = tables.read(images, "images")
    shown = shown.filter(pc.equal(shown["status"], "ok"))
    ids = shown["sample_id"].to_pylist()
    rows = tables.read(metadata, "metadata", columns=("sample_id", "caption"))
    captions = dict(zip(rows["sample_id"].to_pylist(), rows["caption"].to_pylist(), strict=True))
    model, preprocess, tokenizer, weights = models.encoder(options.model, models.device(device))
    found = stage.embed(
        ids, shown["bytes"].to_pylist(), [captions[i] for i in ids], model, preprocess, tokenizer, batch_size,
        common.progress("embeddings"),
    )  # fmt: skip
    made = common.made_by(
        "embeddings", options, None, [metadata, images], weights=weights, device=device, dtype="float32",
        libraries=("torch", "open_clip_torch", "pillow"),
    )  # fmt: skip
    tables.write(output, found, "embeddings", made)


@click.command()
@one("--metadata", "The metadata table.")
@many("--images", "images", "Shards of the images table.")
@many("--embeddings", "embeddings", "Shards of the embeddings table.")
@one("--output", "The duplicates table.")
@stage_options("dedup")
def dedup(metadata: Any, images: Any, embeddings: Any, output: Any, options: Any) -> None:
    """Find candidates that are near-duplicates of training images, and group look-alikes."""
    from mia import dedup as stage

    vectors = tables.read(embeddings, "embeddings")
    ids = vectors["sample_id"].to_pylist()
    about = _by_id(tables.read(metadata, "metadata", columns=("sample_id", "pool", "caption")), ids)
    hashes = _by_id(tables.read(images, "images", columns=("sample_id", "phash")), ids)
    samples = stage.Sample(
        np.array(ids, dtype=object), np.array(about["pool"].to_list(), dtype=object),
        np.array(about["caption"].to_list(), dtype=object), tables.vectors(vectors["image"]),
        hashes["phash"].to_numpy(),
    )  # fmt: skip
    made = common.made_by("dedup", options, None, [metadata, *images, *embeddings], libraries=("scikit-learn", "scipy"))
    tables.write(output, stage.deduplicate(samples, options), "duplicates", made)


def _by_id(table: pa.Table, ids: list[str]) -> pl.DataFrame:
    """Rows of `table` in the order of `ids`."""
    wanted = pl.DataFrame({"sample_id": ids}, schema={"sample_id": pl.String})
    rows = wanted.join(pl.from_arrow(table), on="sample_id", how="left", maintain_order="left", validate="1:1")  # type: ignore[arg-type]
    if rows.null_count().sum_horizontal().item():
        absent = rows.filter(pl.any_horizontal(pl.all().is_null()))["sample_id"][0]
        raise UserError("a table lacks a sample that another one has", absent, "make both from the same metadata")
    return rows


@click.command()
@one("--metadata", "The metadata table.")
@many("--images", "images", "Shards of the images table.")
@one("--duplicates", "The duplicates table.")
@click.option("--target", type=PATH, help="Manifest of the target whose text encoder feeds method `paper`.")
@common.batch_option
@seed_option
@one("--output", "The dataset table.")
@one("--attacked-output", "The samples of it to attack, at most --max-per-side a side.")
@one("--selection-output", "The samples to attack without any label, for stages that must not see one.")
@one("--dropped-output", "Counts of rows dropped, by stage and reason.")
@one("--report-output", "What each round did, as JSON.")
@stage_options("sanitize")
def sanitize(
    metadata: Any, images: Any, duplicates: Any, target: Any, batch_size: int, seed: int, output: Any,
    attacked_output: Any, selection_output: Any, dropped_output: Any, report_output: Any, options: Any,
) -> None:  # fmt: skip
    """Keep the members that look like non-members, and cut the dataset into calibration and test."""
    from mia import sanitize as stage

    if options.method not in stage.METHODS:
        raise UserError(f"unknown method '{options.method}'", "sanitize.method", f"use {list(stage.METHODS)}")
    rows, counts, rows_in = _pooled(metadata, images, duplicates)
    member = rows["member"].to_numpy(zero_copy_only=False)
    keep, encoders = np.ones(len(member), dtype=bool), None
    rounds: list[dict] = []
    if options.method == "paper":
        if target is None:
            raise UserError("method 'paper' needs a text encoder", "--target", "give the target's manifest")
        states, encoders = _text_states(target, rows["caption"].to_pylist(), batch_size)
        keep, rounds = stage.keep_members(states, member, np.array(rows["group"].to_pylist()), options, seed)
    dataset = stage.finish(rows.filter(pa.array(keep)), options, seed)
    attacked = stage.to_attack(dataset, options, seed)
    counts.append(("sanitize", f"told apart by method {options.method}", "member", int((~keep).sum())))
    made = common.made_by(
        "sanitize",
        options,
        seed,
        [metadata, *images, duplicates],
        encoders=encoders,
        libraries=("torch", "scikit-learn"),
    )
    common.write_json(report_output, {"method": options.method, "rounds": rounds, "keep_above": options.keep_above})
    write_dropped(dropped_output, [c for c in counts if c[3]], made, rows_in, len(dataset))
    tables.write(selection_output, attacked.select(tables.SCHEMAS["selection"].names), "selection", made)
    tables.write(attacked_output, attacked, "dataset", made)
    tables.write(output, dataset, "dataset", made)


def _pooled(metadata: Any, images: Any, duplicates: Any) -> tuple[pa.Table, list[tuple], int]:
    """Members and unduplicated candidates with usable images; counts of what fell out; rows there were."""
    about = pl.from_arrow(tables.read(metadata, "metadata", columns=("sample_id", "url", "caption", "pool")))
    fetched = pl.from_arrow(tables.read(list(images), "images", columns=("sample_id", "status", "sha256")))
    near = pl.from_arrow(tables.read(duplicates, "duplicates", columns=("sample_id", "group", "reason")))
    assert isinstance(about, pl.DataFrame) and isinstance(fetched, pl.DataFrame) and isinstance(near, pl.DataFrame)
    rows = about.join(fetched, on="sample_id", how="left").join(near, on="sample_id", how="left").sort("sample_id")
    for flag, lost in (("--images", "status"), ("--duplicates", "group")):
        absent = rows.filter(pl.col(lost).is_null() & (pl.lit(lost == "status") | (pl.col("status") == "ok")))
        if len(absent):
            raise UserError(
                f"{flag} lacks {len(absent)} samples", absent["sample_id"][0], "give every shard of one run"
            )
    why = (
        pl.when(pl.col("status") != "ok").then(pl.format("images: {}", "status"))
        .when(pl.col("pool") == "control").then(pl.lit("dedup: only trains a negative control"))
        .when(pl.col("reason").is_not_null()).then(pl.format("dedup: {}", "reason"))
    )  # fmt: skip
    marked = rows.with_columns(why.alias("why"))
    gone = marked.drop_nulls("why").group_by("why", "pool").len().sort("why", "pool")
    counts = [(*row["why"].split(": ", 1), row["pool"], row["len"]) for row in gone.to_dicts()]
    kept = marked.filter(pl.col("why").is_null()).with_columns((pl.col("pool") == "member").alias("member"))
    for pool in ("member", "candidate"):
        if not (kept["pool"] == pool).any():
            raise UserError(f"no {pool} rows are left", "images and dedup", "see their tables for the reasons")
    columns = ["sample_id", "url", "caption", "sha256", "member", "group"]
    return (
        kept.select(columns).to_arrow().cast(_plain(pa.schema([tables.SCHEMAS["dataset"].field(c) for c in columns]))),
        counts,
        len(rows),
    )


def _text_states(manifest: pathlib.Path, captions: list[str], batch_size: int) -> tuple[np.ndarray, str]:
    from mia import models

    folder, about = common.target_folder(manifest)
    encoder = models.text_encoder(folder, models.device("cpu"), models.torch_dtype("float32"))
    states, _ = models.text_states(models.tokenizer(folder), encoder, captions, batch_size)
    return states.reshape(len(states), -1), about["encoders"]


@click.command()
@one("--dataset", "The dataset table.")
@many("--embeddings", "embeddings", "Shards of the embeddings table.")
@seed_option
@one("--output", "The distance table.")
def distance(dataset: Any, embeddings: Any, seed: int, output: Any) -> None:
    """Fréchet distance between members and non-members in image and text space."""
    from mia import distance as stage

    rows = tables.read(dataset, "dataset")
    vectors = common.matching(tables.read(embeddings, "embeddings"), rows)
    spaces = {space: tables.vectors(vectors[space]) for space in ("image", "text")}
    found = stage.distances(spaces, rows["member"].to_numpy(zero_copy_only=False), seed)
    tables.write(output, found, "distance", common.made_by("distance", None, seed, [dataset, *embeddings]))
