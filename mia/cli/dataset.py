"""Commands that build the dataset: metadata, images, embeddings, matches, dedup, distance."""

from __future__ import annotations

import itertools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import click
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from mia import sources, tables
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
@click.option(
    "--dropped", "earlier", type=PATH, multiple=True, help="Counts of rows that `mia select` dropped, to be handed on."
)
@one("--output", "The metadata table.")
@one("--dropped-output", "Counts of rows dropped, by reason.")
@stage_options("metadata")
def metadata(
    members: Any, candidates: Any, controls: Any, columns: Any, earlier: Any, output: Any, dropped_output: Any,
    options: Any,
) -> None:  # fmt: skip
    """Bring sources into one metadata table and drop rows not worth a download."""
    from mia import metadata as stage

    mapping = common.column_names(columns)
    parts = []
    for pool, paths in (("member", members), ("candidate", candidates), ("control", controls)):
        for path in paths:
            parts.append(stage.source_rows(_rows(path), *_named(path, mapping), pool))
    rows, before = pl.concat(parts), _summed(earlier)
    for pool, paths in (("member", members), ("candidate", candidates), ("control", controls)):
        if paths and not (rows["pool"] == pool).any():
            raise UserError(f"no source of the {pool} pool has a row", paths[0], "name another, or loosen `select`")
    kept, dropped = stage.select(rows, options)
    inputs = [*members, *candidates, *controls, *earlier]
    made = common.made_by("metadata", options, None, inputs, columns=mapping)
    schema = tables.SCHEMAS["metadata"]
    tables.write(output, kept.select(schema.names).to_arrow().cast(common.plain(schema)), "metadata", made)
    counts = [*before, *(("metadata", r["reason"], r["pool"], r["rows"]) for r in dropped.to_dicts())]
    rows_in = len(rows) + sum(count for *_, count in before)
    common.write_dropped(dropped_output, counts, made, rows_in=rows_in, rows_out=len(kept))


def _named(path: pathlib.Path, mapping: dict[str, str]) -> tuple[dict[str, str], str]:
    """The columns and the name of a source: as given, or, of what `mia select` wrote, our own and the one it notes."""
    made = tables.provenance(path)
    if made.get("stage") != "select":
        return mapping, path.stem
    return {name: name for name in sources.COLUMNS}, made.get("source", path.stem)


def _summed(paths: tuple[pathlib.Path, ...]) -> list[tuple]:
    """Rows of dropped tables, those of one stage, reason and pool added up."""
    keys = ["stage", "reason", "pool"]
    found = [common.frame(path, "dropped") for path in paths]
    return pl.concat(found).group_by(keys).agg(pl.col("rows").sum()).sort(keys).rows() if found else []


def _rows(path: pathlib.Path) -> pl.DataFrame:
    if not path.is_file():
        raise UserError("source does not exist", path, "mend metadata.sources")
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.ComputeError, OSError) as problem:
        raise UserError(f"source cannot be read as Parquet ({problem})", path, "fetch it anew") from problem


@click.command()
@one("--metadata", "The metadata table.")
@click.option("--shard", type=int, default=0, help="This job's share of the id space.")
@click.option("--shards", type=click.IntRange(1), default=1, help="Number of shares.")
@click.option("--root", type=PATH, default=".", help="Folder that relative file: URLs start from.")
@click.option("--concurrency", type=click.IntRange(1), default=32, help="Downloads at a time; changes no result.")
@click.option(
    "--timeout-s", type=click.FloatRange(0, min_open=True), default=30.0, help="Seconds for one attempt, in all."
)
@click.option(
    "--deadline-s",
    type=click.FloatRange(0, min_open=True),
    default=float("inf"),
    help="Seconds for the shard; the rest are 'timeout'.",
)
@click.option("--per-host", type=click.IntRange(1), default=8, help="Downloads at a time at one host.")
@click.option(
    "--host-delay-s", type=click.FloatRange(0), default=0.0, help="Seconds between the starts of two at one host."
)
@click.option("--previous", type=PATH, multiple=True, help="Earlier images table: only what may pass is asked again.")
@one("--output", "The images table of this shard.")
@stage_options("images")
def images(
    metadata: Any, shard: int, shards: int, root: Any, previous: Any, output: Any, options: Any, **pace: Any
) -> None:
    """Fetch the original bytes of a shard's images; every row ends with one status."""
    from mia import images as stage

    if not 0 <= shard < shards:
        raise UserError(f"shard {shard} of {shards} does not exist", "--shard", f"give a number from 0 to {shards - 1}")
    rows = tables.between(metadata, "metadata", *tables.ids_of(shard, shards))
    made = common.made_by(
        "images", options, None, [metadata, *previous], shard=f"{shard}/{shards}", libraries=("pillow", "imagehash")
    )
    common.refuse_other_options(previous, options, "earlier images were fetched", "use the same, or start afresh")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output.parent, buffering=0) as spool:
        earlier = tables.batches(previous, "images")
        found = stage.stream(rows, options, stage.Pace(**pace), root=root, previous=earlier, spool=spool)
        written = tables.write_batches(output, found, "images", made)
    if written != rows.num_rows:
        raise AssertionError(f"{rows.num_rows} rows in, {written} out")


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

    shown = tables.read(images, "images", columns=("sample_id", "status"))
    ids = shown.filter(pc.equal(shown["status"], "ok"))["sample_id"].to_pylist()
    rows = tables.between(metadata, "metadata", min(ids, default=""), max(ids, default=""), ("sample_id", "caption"))
    captions = _by_id(rows, ids)["caption"].to_list()
    model, preprocess, tokenizer, weights = models.encoder(options.model, models.device(device))
    found = stage.embed(
        ids, _bytes_of(images, ids), captions, model, preprocess, tokenizer, batch_size,
        common.progress("embeddings"),
    )  # fmt: skip
    made = common.made_by(
        "embeddings", options, None, [metadata, images], weights=weights, device=device, dtype="float32",
        encoder=models.encoder_card(model),
        libraries=("torch", "open_clip_torch", "pillow"),
    )  # fmt: skip
    tables.write(output, found, "embeddings", made)


def _bytes_of(images: pathlib.Path, ids: list[str]) -> Iterator[bytes]:
    """The original bytes of samples in the order of `ids`, of which a few are in memory at a time.

    Raises:
        UserError: the shard is in another order.
    """
    found = (pair for some in common.images_of([images], ids) for pair in zip(*some, strict=True))
    for wanted, (name, data) in zip(ids, found, strict=True):
        if name != wanted:
            raise UserError("images are not in order of sample_id", f"{images} {name}", "run `mia images` again")
        yield data


@click.command()
@one("--metadata", "The metadata table.")
@many("--images", "images", "Shards of the images table.")
@many("--embeddings", "embeddings", "Shards of the embeddings table.")
@many("--neighbours", "neighbours", "Neighbours tables of all that was searched, our own members too.")
@one("--output", "The matches table.")
@stage_options("dedup")
def matches(metadata: Any, images: Any, embeddings: Any, neighbours: Any, output: Any, options: Any) -> None:
    """Decide which candidates are near-duplicates of training images: dedup's first half, before `links`."""
    from mia import dedup as stage

    asked = _refuse_strangers(neighbours, embeddings)
    near = _nearest(neighbours)
    ids = tables.read(list(embeddings), "embeddings", columns=("sample_id",))["sample_id"].to_pylist()
    pools = _column(metadata, "metadata", "pool", ids)
    phash = _column(images, "images", "phash", ids)
    inputs = [metadata, *images, *embeddings, *neighbours]
    made = common.made_by("matches", options, None, inputs, embeddings=sorted(asked))
    table = stage.match(np.array(ids, dtype=object), _objects(pools), phash.to_numpy(), near, options)
    tables.write(output, table, "matches", made)


@click.command()
@one("--metadata", "The metadata table.")
@click.option("--images", type=PATH, multiple=True, help="Shards of the images table, and")
@click.option("--embeddings", type=PATH, multiple=True, help="shards of the embeddings table, and")
@click.option(
    "--neighbours", type=PATH, multiple=True,
    help="neighbours tables of all that was searched, our own members too; without any, our members are searched here.",
)  # fmt: skip
@click.option("--matches", type=PATH, help="Or, where images and embeddings do not fit one job: the matches table, and")
@click.option("--links", type=PATH, multiple=True, help="links tables of all shards.")
@one("--output", "The duplicates table.")
@stage_options("dedup")
def dedup(
    metadata: Any, images: Any, embeddings: Any, neighbours: Any, matches: Any, links: Any, output: Any, options: Any
) -> None:
    """Find candidates that are near-duplicates of training images, and group look-alikes."""
    whole, parts = bool(images and embeddings), bool(matches and links)
    if whole == parts or bool(images or embeddings or neighbours) == bool(matches or links):
        what, fix = "nothing to group, or in two ways", "give both of --images and --embeddings, or of the others"
        raise UserError(what, "--images and --embeddings, --matches and --links", fix)
    if parts:
        table, inputs = _grouped(metadata, matches, links, options), [metadata, matches, *links]
    else:
        table = _deduplicated(metadata, images, embeddings, neighbours, options)
        inputs = [metadata, *images, *embeddings, *neighbours]
    tables.write(output, table, "duplicates", common.made_by("dedup", options, None, inputs, libraries=("scipy",)))


def _grouped(metadata: Any, matches: Any, links: Any, options: Any) -> pa.Table:
    from mia import dedup as stage

    common.refuse_other_options([matches, *links], options, "this was made", "use the same, or make it anew")
    _refuse_gaps(matches, links)
    rows = tables.read(matches, "matches")
    captions = _column(metadata, "metadata", "caption", rows["sample_id"].to_pylist())
    return stage.group(rows, _objects(captions), (tables.read(path, "links") for path in links), options)


def _deduplicated(metadata: Any, images: Any, embeddings: Any, neighbours: Any, options: Any) -> pa.Table:
    from mia import dedup as stage

    _refuse_strangers(neighbours, embeddings)
    near = _nearest(neighbours) if neighbours else None
    ids, vectors = _image_vectors(embeddings)
    pools, captions = (_objects(_column(metadata, "metadata", name, ids)) for name in ("pool", "caption"))
    phash = _column(images, "images", "phash", ids).to_numpy()
    samples = stage.Sample(np.array(ids, dtype=object), pools, captions, vectors, phash)
    return stage.deduplicate(samples, options, near)


def _nearest(neighbours: tuple[pathlib.Path, ...]) -> pa.Table:
    from mia import search

    return search.merge((tables.read(path, "neighbours") for path in neighbours), 1)


def _column(paths: Any, name: str, column: str, ids: list[str]) -> pl.Series:
    """A column of table `name` in the order of `ids`."""
    return _by_id(tables.read(paths, name, columns=("sample_id", column)), ids)[column]


def _objects(column: pl.Series) -> np.ndarray:
    return np.array(column.to_list(), dtype=object)


def _image_vectors(paths: tuple[pathlib.Path, ...]) -> tuple[list[str], np.ndarray]:
    """Sample ids in order and image embeddings, float16[n, width]; in memory once, where the shards are in order.

    Raises:
        UserError: shards of two widths, or a sample that stands twice.
    """
    rows = [_rows_in(path) for path in paths]
    ids, vectors = list[str](), np.empty((0, 0), np.float16)
    for path, expected in zip(paths, rows, strict=True):
        shard = tables.read(path, "embeddings", columns=("sample_id", "image"))
        block = tables.vectors(shard["image"], np.float16)
        if not ids:
            vectors = np.empty((sum(rows), block.shape[1]), np.float16)
        if block.shape != (expected, vectors.shape[1]):
            raise UserError(f"embeddings are {block.shape[1]} wide, others {vectors.shape[1]}", path, "use one encoder")
        vectors[len(ids) : len(ids) + expected] = block
        ids += shard["sample_id"].to_pylist()
    order = np.argsort(np.array(ids, dtype=object), kind="stable")
    ids = [ids[i] for i in order]
    twice = next((one for one, other in itertools.pairwise(ids) if one == other), None)
    if twice:
        raise UserError("embeddings table has two rows with one key", twice, "give every shard once")
    return ids, vectors if (order == np.arange(len(order))).all() else vectors[order]


def _rows_in(path: pathlib.Path) -> int:
    """The number of rows of a shard of embeddings, from its footer."""
    with tables.parquet(path, "embeddings") as file:
        kind = file.schema_arrow.field("image").type if "image" in file.schema_arrow.names else None
        if kind is not None and not pa.types.is_fixed_size_list(kind):
            raise UserError(f"embeddings column 'image' is {kind}", path, "make it anew")
        return file.metadata.num_rows


def _refuse_strangers(neighbours: tuple[pathlib.Path, ...], embeddings: tuple[pathlib.Path, ...]) -> set[str]:
    """Refuse neighbours that were searched for other embeddings than these: some samples would pass for unique.

    Returns the embeddings' hashes.
    """
    asked = {tables.file_hash(path)[:16] for path in embeddings} if neighbours else set()
    for path in neighbours:
        if not asked <= set(tables.provenance(path).get("inputs", ())):
            raise UserError("neighbours were searched for other embeddings", path, "run `mia neighbours` again")
    return asked


def _refuse_gaps(matches: pathlib.Path, links: tuple[pathlib.Path, ...]) -> None:
    """Refuse links of other matches, and those that leave two shards uncompared: look-alikes would pass for unlike."""
    mine, compared = tables.file_hash(matches)[:16], set[frozenset]()
    for path in links:
        made = tables.provenance(path)
        if mine not in made.get("inputs", ()):
            raise UserError("links were made of other matches", path, "run `mia links` again")
        compared.update(frozenset((made.get("own", ""), other)) for other in made["inputs"])
    pairs = itertools.combinations_with_replacement(tables.provenance(matches).get("embeddings", ()), 2)
    absent = sum(frozenset(pair) not in compared for pair in pairs)
    if absent:
        what = f"pairs of shards that were not compared: {absent}"
        raise UserError(what, f"{len(links)} links tables", "give those of all shards")


def _by_id(table: pa.Table, ids: list[str]) -> pl.DataFrame:
    """Rows of `table` in the order of `ids`."""
    wanted = pl.DataFrame({"sample_id": ids}, schema={"sample_id": pl.String})
    rows = wanted.join(pl.from_arrow(table), on="sample_id", how="left", maintain_order="left", validate="1:1")  # type: ignore[arg-type]
    if rows.null_count().sum_horizontal().item():
        absent = rows.filter(pl.any_horizontal(pl.all().is_null()))["sample_id"][0]
        raise UserError("a table lacks a sample that another one has", absent, "make both from the same metadata")
    return rows


@click.command()
@click.option("--dataset", type=PATH, help="The dataset table; or")
@click.option("--duplicates", type=PATH, help="The duplicates table: members and candidates as they were before dedup.")
@many("--embeddings", "embeddings", "Shards of the embeddings table.")
@seed_option
@one("--output", "The distance table.")
@stage_options("distance")
def distance(dataset: Any, duplicates: Any, embeddings: Any, seed: int, output: Any, options: Any) -> None:
    """How far apart members and non-members are in image and text space: Fréchet, kernel, and a classifier."""
    from mia import distance as stage

    if (dataset is None) == (duplicates is None):
        raise UserError("nothing to measure, or two things", "mia distance", "give --dataset or --duplicates")
    rows = tables.read(dataset, "dataset") if dataset else _before_dedup(duplicates)
    member, group = rows["member"].to_numpy(zero_copy_only=False), np.array(rows["group"].to_pylist())
    some = stage.sampled(member, group, options.max_rows, seed)
    vectors = common.embeddings_of(embeddings, rows.take(some))
    spaces = {space: tables.vectors(vectors[space]) for space in ("image", "text")}
    found = stage.distances(spaces, member[some], seed, options.permutations, group[some])
    made = common.made_by("distance", options, seed, [dataset or duplicates, *embeddings], libraries=("scipy",))
    tables.write(output, found, "distance", made)


def _before_dedup(path: pathlib.Path) -> pa.Table:
    """All members and candidates that dedup saw, its duplicates too: sample_id, member, group.

    What was dropped stands in a group of its own there; here in that of the training image that it resembles, with
    all others that resemble it, or chance would take copies of one picture for samples that say as much as others.
    """
    rows = common.frame(path, "duplicates", ("sample_id", "pool", "group", "nearest_id", "reason"))
    groups = rows.select(nearest_id="sample_id", with_nearest="group")
    rows = rows.join(groups, on="nearest_id", how="left").filter(pl.col("pool") != "control").sort("sample_id")
    dropped = pl.coalesce("with_nearest", "nearest_id")
    group = pl.when(pl.col("reason").is_null()).then("group").otherwise(dropped)
    return rows.select("sample_id", member=pl.col("pool") == "member", group=group).to_arrow()
