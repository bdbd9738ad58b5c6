"""The command that searches training images, ours or published embeddings, for what resembles our candidates."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from mia import search, tables
from mia.cli import common
from mia.cli.common import PATH, many, one, stage_options
from mia.errors import UserError

Find = Callable[[np.ndarray, search.Reference], search.Pairs]


@click.command()
@one("--metadata", "The metadata table.")
@many("--embeddings", "embeddings", "Shards of the embeddings table; all candidates and control rows are queries.")
@click.option("--own", type=PATH, multiple=True, help="Shards of our embeddings table to search for members.")
@click.option(
    "--reference", "references", type=PATH, multiple=True,
    help="Other training images to search: img_emb_N.npy as LAION publishes them, or an embeddings table.",
)  # fmt: skip
@click.option(
    "--reference-metadata", type=PATH,
    help="Folder with metadata_N.parquet (url, caption) for img_emb_N.npy; else rows are named by file and number.",
)  # fmt: skip
@one("--output", "The neighbours table of these shards.")
@stage_options("neighbours")
def neighbours(
    metadata: Any, embeddings: Any, own: Any, references: Any, reference_metadata: Any, output: Any, options: Any
) -> None:
    """Find the training images nearest to each candidate, by exact search of any number of shards."""
    from mia import dedup

    if not own and not references:
        raise UserError("nothing to search", "--own and --reference", "give at least one file")
    ids, vectors = _queries(embeddings)
    known = common.frame(metadata, "metadata", ("sample_id", "pool"))
    pools = _pools(known, ids)
    asked = np.isin(pools, list(dedup.AGAINST))
    _same_model([*embeddings, *own, *(path for path in references if path.suffix != ".npy")])
    held = [_table_reference(path) for path in own]
    others = [_reference(path, reference_metadata) for path in references]
    recalls: list[float] = []
    find = _finder(sum(len(reference.ids) for reference in [*held, *others]), options, recalls)

    def found() -> Iterator[pa.Table]:
        for reference in held:
            yield from dedup.against_own(
                ids, pools, vectors, reference, _pools(known, np.array(reference.ids, dtype=object)), find
            )
        for reference in others:
            yield search.neighbours(ids[asked], reference, *find(vectors[asked], reference))

    table = search.merge(found(), options.k)
    inputs = [metadata, *embeddings, *own, *references, *_metadata_files(references, reference_metadata)]
    about = {"method": "approximate" if recalls else "exact", "recall_at_1": min(recalls, default=1.0)}
    made = common.made_by("neighbours", options, None, inputs, **about)
    tables.write(output, table, "neighbours", made)


def _queries(embeddings: tuple[pathlib.Path, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids, object[n], and image embeddings, float16[n, width], of all shards."""
    table = tables.read(list(embeddings), "embeddings", columns=("sample_id", "image"))
    return np.array(table["sample_id"].to_pylist(), dtype=object), tables.vectors(table["image"], np.float16)


def _pools(known: pl.DataFrame, ids: np.ndarray) -> np.ndarray:
    """The pool of each sample, object[n]."""
    rows = pl.DataFrame({"sample_id": pl.Series(ids, dtype=pl.String)}).join(
        known, on="sample_id", how="left", maintain_order="left"
    )
    absent = rows.filter(pl.col("pool").is_null())
    if len(absent):
        raise UserError("the metadata table lacks a sample of the embeddings", absent["sample_id"][0], "make both anew")
    return np.array(rows["pool"].to_list(), dtype=object)


def _finder(rows: int, options: Any, recalls: list[float]) -> Find:
    """The exact search, or above `exact_below` rows the approximate one, which notes each recall in `recalls`."""
    progress = common.progress("neighbours")
    if rows <= options.exact_below:
        return lambda vectors, reference: search.top_k(vectors, reference, options.k, progress)

    def find(vectors: np.ndarray, reference: search.Reference) -> search.Pairs:
        found = search.approximate_top_k(vectors, reference, options.k, options.probes, progress)
        some = slice(
            None, None, max(1, len(vectors) // options.recall_queries)
        )  # ids are hashes: any rows are a sample
        recalls.append(search.recall(vectors[some], reference, found[1][some, 0]))
        asked = len(vectors[some])
        common.say(f"neighbours: {reference.name}, approximate, recall@1 {recalls[-1]:.4f} on {asked} queries")
        return found

    return find


def _reference(path: pathlib.Path, metadata: pathlib.Path | None) -> search.Reference:
    return _array_reference(path, metadata) if path.suffix == ".npy" else _table_reference(path)


@contextlib.contextmanager
def _with_columns(path: pathlib.Path, columns: tuple[str, ...]) -> Iterator[pq.ParquetFile]:
    with tables.parquet(path, "Parquet") as file:
        absent = [column for column in columns if column not in file.schema_arrow.names]
        if absent:
            raise UserError(f"table has no column '{absent[0]}'", path, f"give one with {list(columns)}")
        yield file


def _table_reference(path: pathlib.Path) -> search.Reference:
    """An embeddings table, in any order of rows, read one row group at a time."""
    with _with_columns(path, ("sample_id", "image")) as file:
        kind = file.schema_arrow.field("image").type
        if not pa.types.is_fixed_size_list(kind):
            raise UserError(
                f"column 'image' is {kind}", path, "make it a fixed-size list of float16, as `mia embeddings`"
            )
        groups = range(file.metadata.num_row_groups)
        ids = file.read(columns=["sample_id"])["sample_id"].combine_chunks()
        lengths = [file.metadata.row_group(number).num_rows for number in groups]
    return search.Reference(str(path), ids, lengths, [functools.partial(_row_group, path, number) for number in groups])


def _row_group(path: pathlib.Path, number: int) -> np.ndarray:
    with _with_columns(path, ("image",)) as file:
        column = file.read_row_group(number, columns=["image"])["image"]
        return tables.vectors(column, column.type.value_type.to_pandas_dtype())


def _array_reference(path: pathlib.Path, metadata: pathlib.Path | None) -> search.Reference:
    """LAION's `img_emb_N.npy`, read in blocks; each row's id is that of its url and caption, as for our own samples."""
    rows, _ = _mapped(path).shape
    if metadata is None:
        ids = pa.array([f"{path.stem}#{row}" for row in range(rows)], pa.string())
    else:
        ids = _metadata_ids(_metadata_file(path, metadata), rows)
    starts = range(0, rows, search.ROWS)
    lengths = [min(search.ROWS, rows - start) for start in starts]
    return search.Reference(str(path), ids, lengths, [functools.partial(_array_rows, path, start) for start in starts])


def _mapped(path: pathlib.Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as problem:
        raise UserError(
            f"reference cannot be read as npy ({problem})", path, "fetch it anew, or mend the path"
        ) from problem
    if array.ndim != 2 or array.dtype not in (np.float16, np.float32):
        what = f"reference is {array.dtype}{list(array.shape)}"
        raise UserError(what, path, "give float16 or float32 [rows, width]")
    return array


def _array_rows(path: pathlib.Path, start: int) -> np.ndarray:
    return np.array(_mapped(path)[start : start + search.ROWS])  # mapped anew, so that no read page stays resident


def _metadata_file(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    return folder / f"{path.stem.replace('img_emb', 'metadata')}.parquet"


def _metadata_files(references: tuple[pathlib.Path, ...], folder: pathlib.Path | None) -> list[pathlib.Path]:
    return [_metadata_file(path, folder) for path in references if folder and path.suffix == ".npy"]


def _metadata_ids(path: pathlib.Path, rows: int) -> pa.Array:
    """The sample id of every row's url and caption, string[n]."""
    with _with_columns(path, ("url", "caption")) as file:
        batches = file.iter_batches(columns=["url", "caption"])
        found = pa.chunked_array([_ids(batch) for batch in batches], pa.string()).combine_chunks()
    if len(found) != rows:
        raise UserError(f"metadata have {len(found)} rows for {rows} vectors", path, "fetch both anew")
    return found


def _ids(batch: pa.RecordBatch) -> pa.Array:
    pairs = zip(batch["url"].to_pylist(), batch["caption"].to_pylist(), strict=True)
    return pa.array([tables.sample_id(url or "", caption or "") for url, caption in pairs], pa.string())


def _same_model(paths: list[pathlib.Path]) -> None:
    weights = {path: tables.provenance(path).get("weights") for path in paths}
    first = next(iter(weights))
    for path, found in weights.items():
        if found != weights[first]:
            raise UserError(f"embedded with another model than {first}", path, "embed both with one model")
