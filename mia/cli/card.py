"""The command that hands a finished split to others: card."""

from __future__ import annotations

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mia import tables
from mia.cli.common import PATH, one
from mia.errors import UserError

if TYPE_CHECKING:
    from mia.card import Source

README = "README.md"
FILES = {f"data/{part}.parquet": part for part in tables.PARTS}


@click.command()
@one("--dataset", "The dataset table.")
@click.option("--audit", "audits", type=PATH, multiple=True, help="Metrics table of a blind audit of the dataset.")
@click.option("--dropped", type=PATH, multiple=True, help="Table of rows dropped, by stage and reason.")
@click.option("--images", type=PATH, multiple=True, help="Shards of the images table, for --with-images.")
@click.option("--with-images/--no-with-images", default=False, help="Put the original image bytes in.")
@click.option("--title", default="Membership-inference split", help="The dataset's name on the card.")
@click.option("--licence", default="other", help="As the Hugging Face hub spells it, such as cc-by-4.0.")
@one("--output", "The folder: README.md, data/calibration.parquet, data/test.parquet.")
def card(
    dataset: pathlib.Path, audits: Any, dropped: Any, images: Any, with_images: bool, title: str, licence: str,
    output: pathlib.Path,
) -> None:  # fmt: skip
    """Write the split as a Hugging Face dataset folder with a card; no image bytes unless asked."""
    from mia import card as stage

    if with_images != bool(images):
        raise UserError("image bytes need both flags", "--with-images and --images", "give both or neither")
    rows = _source(dataset, "dataset")
    audited = [_source(path, "metrics") for path in audits]
    lost = [_source(path, "dropped") for path in dropped]
    shards = _by_first_id(images)
    schema = stage.schema(rows.table, with_images)
    made = {
        "stage": "card", "version": stage.VERSION, "dataset": rows.sha256[:16], "with_images": with_images,
        "libraries": tables.library_versions(("pyarrow",)),
    }  # fmt: skip
    metadata = {tables.PROVENANCE_KEY: json.dumps(made, sort_keys=True).encode()}
    with replacing_folder(output) as folder:
        (folder / "data").mkdir()
        for name, part in FILES.items():
            some, kind = stage.rows_of(rows.table, part), schema.with_metadata(metadata)
            if with_images:
                _write_with_images(folder / name, some, kind, shards)
            else:
                _write(folder / name, some, kind)
        hashes = {name: tables.file_hash(folder / name) for name in FILES}
        text = stage.readme(rows, hashes, schema, stage.Words(title, licence), audited, lost)
        (folder / README).write_text(text, encoding="utf-8")


def _source(path: pathlib.Path, name: str) -> Source:
    from mia.card import Source

    table = tables.read(path, name)
    return Source(f"{name} {path.stem}", tables.file_hash(path), tables.provenance(path), table)


def _write(path: pathlib.Path, rows: pa.Table, schema: pa.Schema) -> None:
    pq.write_table(rows.select(schema.names).cast(schema), path, compression="zstd")


def _write_with_images(path: pathlib.Path, rows: pa.Table, schema: pa.Schema, shards: list[pathlib.Path]) -> None:
    """One part as Parquet, in one pass over the shards in the order of their ids, so that memory does not grow."""
    from mia import card as stage

    ids, written = rows["sample_id"].combine_chunks(), 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in tables.batches(shards, "images"):
            shown = batch.filter(pc.and_(pc.is_in(batch["sample_id"], ids), pc.equal(batch["status"], "ok")))
            if shown.num_rows:
                found = dict(zip(shown["sample_id"].to_pylist(), shown["bytes"].to_pylist(), strict=True))
                some = rows.filter(pc.is_in(rows["sample_id"], shown["sample_id"]))
                writer.write_table(stage.with_images(some, found).select(schema.names).cast(schema))
                written += some.num_rows
    if written != len(ids):
        what = f"images for {written} of the {len(ids)} samples of part '{path.stem}'"
        raise UserError(what, "--images", "give every shard of that run, each once")


def _by_first_id(shards: tuple[pathlib.Path, ...]) -> list[pathlib.Path]:
    first = {path: tables.read(path, "images", ("sample_id",))["sample_id"][:1].to_pylist() for path in shards}
    return sorted(first, key=lambda path: first[path])


@contextlib.contextmanager
def replacing_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        UserError: `path` holds something other than an earlier card, or the disk is full.
    """
    strange = [p for p in path.rglob("*") if p.is_file() and str(p.relative_to(path)) not in {README, *FILES}]
    if path.is_file() or strange:
        where = strange[0] if strange else path
        raise UserError("a file that is not of an earlier card is in the way", where, "give a new or empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tables.room_for(path),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".part") as temporary,
    ):
        fresh, old = pathlib.Path(temporary, "new"), pathlib.Path(temporary, "old")
        fresh.mkdir()
        yield fresh
        if path.exists():
            path.rename(old)
        fresh.rename(path)
