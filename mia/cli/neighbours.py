"""Commands that compare embeddings: candidates with training images, ours or published, and all that is kept."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
    help="Other training images to search, embedded with the model of --embeddings, which a .npy does not tell: "
    "img_emb_N.npy as LAION publishes them, or an embeddings table.",
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
    ids, pools, vectors = _queries(metadata, embeddings, list(dedup.AGAINST))
    pa.default_memory_pool().release_unused()  # what was held twice makes room for the search
    _same_model([*embeddings, *own, *(path for path in references if path.suffix != ".npy")])
    held = [_table_reference(path) for path in own]
    others = [_reference(path, reference_metadata) for path in references]
    recalls: list[float] = []
    find = _finder(sum(len(reference.ids) for reference in [*held, *others]), options, recalls)

    def found() -> Iterator[pa.Table]:
        for reference in held:
            yield from dedup.against_own(ids, pools, vectors, reference, _pools(metadata, reference.ids), find)
        for reference in others:
            yield search.neighbours(ids, reference, *find(vectors, reference))

    table = search.merge(found(), options.k)
    inputs = [metadata, *embeddings, *own, *references, *_metadata_files(references, reference_metadata)]
    about = {"method": "approximate" if recalls else "exact", "recall_at_1": min(recalls, default=1.0)}
    made = common.made_by("neighbours", options, None, inputs, **about)
    tables.write(output, table, "neighbours", made)


@click.command()
@one("--matches", "The matches table: it says who is kept.")
@one("--own", "The shard of the embeddings table whose kept samples are held against one another and against:")
@click.option("--other", "others", type=PATH, multiple=True, help="Another shard of it.")
@one("--output", "The links table of this shard.")
@stage_options("dedup")
def links(matches: Any, own: Any, others: Any, output: Any, options: Any) -> None:
    """Link look-alikes among what is kept of one shard, and of it and others; every two shards have to meet once."""
    common.refuse_other_options([matches], options, "matches were made", "use the same, or run `mia matches` again")
    made = common.made_by("links", options, None, [matches, own, *others], own=tables.file_hash(own)[:16])
    _refuse_unmatched(matches, [own, *others], made["inputs"])
    ids, vectors = _vectors(tables.read(own, "embeddings", columns=("sample_id", "image")))
    shards = [_table_reference(path) for path in others]
    kept = _kept(matches, [pa.array(ids, pa.string()), *(shard.ids for shard in shards)])
    rest = [search.only(shard, keep) for shard, keep in zip(shards, kept[1:], strict=True)]
    progress = common.progress("links")
    found = search.links(pa.array(ids[kept[0]], pa.string()), vectors[kept[0]], rest, options.max_distance, progress)
    tables.write(output, found, "links", made)


def _refuse_unmatched(matches: pathlib.Path, embeddings: list[pathlib.Path], hashes: list[str]) -> None:
    """Refuse embeddings that the matches were not made from: none of their samples would pass for kept."""
    known = {tables.file_hash(matches)[:16], *tables.provenance(matches).get("embeddings", ())}
    if not set(hashes) <= known:
        stranger = next(path for path in embeddings if tables.file_hash(path)[:16] not in known)
        raise UserError("embeddings are not those that were matched", stranger, "run `mia matches` again")


def _kept(matches: pathlib.Path, ids: list[pa.Array]) -> list[np.ndarray]:
    """Which samples of each shard are kept: bool[n] each."""
    from mia import dedup

    table = tables.read(matches, "matches", columns=("sample_id", "reason"))
    kept = table["sample_id"].filter(pa.array(dedup.is_kept(table)))
    marks = pc.is_in(pa.concat_arrays(ids), kept).to_numpy(zero_copy_only=False)  # once: it makes a table of all kept
    return np.split(marks, np.cumsum([len(some) for some in ids])[:-1])


def _queries(
    metadata: pathlib.Path, embeddings: tuple[pathlib.Path, ...], asked: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and pools, object[n], and image embeddings, float16[n, width], of the samples of the pools that are `asked`.

    The vectors of others are in memory a shard at a time.
    """
    parts = []
    for path in embeddings:
        shard = tables.read(path, "embeddings", columns=("sample_id", "image"))
        pools = _pools(metadata, shard["sample_id"])
        some = shard.append_column("pool", pa.array(pools, pa.string())).filter(pa.array(np.isin(pools, asked)))
        parts.append(some)
    table = tables.joined(parts, "embeddings", embeddings[0])
    ids, vectors = _vectors(table)
    return ids, np.array(table["pool"].to_pylist(), dtype=object), vectors


def _vectors(embeddings: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids, object[n], and image embeddings, float16[n, width]."""
    ids = np.array(embeddings["sample_id"].to_pylist(), dtype=object)
    return ids, tables.vectors(embeddings["image"], np.float16)


def _pools(metadata: pathlib.Path, ids: pa.Array) -> np.ndarray:
    """The pool of each sample, object[n]; of the metadata what lies around the ids is read."""
    bounds = pc.min_max(ids).as_py()
    known = tables.between(metadata, "metadata", bounds["min"] or "", bounds["max"] or "", ("sample_id", "pool"))
    at = pc.index_in(ids, known["sample_id"])
    if at.null_count:
        absent = pc.filter(ids, pc.is_null(at))[0].as_py()
        raise UserError("the metadata table lacks a sample of the embeddings", absent, "make both anew")
    return np.array(known["pool"].take(at).to_pylist(), dtype=object)


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
