"""The tables that stages hand to each other: schemas, checks, and atomic, byte-reproducible Parquet files.

Every table is sorted by `sample_id` first, holds no NaN and no infinity, and says in its file metadata which stage,
version, options, seed, inputs and libraries made it. Nothing in a file depends on the clock, the host or a path, so
that a rerun gives the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mia.errors import UserError

PROVENANCE_KEY = b"mia"
GROUP_ROWS = {"metadata": 8_192}  # a row group, of which a job with a shard reads few; any other table's has 65,536
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
POOLS = ("member", "candidate", "control")
PARTS = ("calibration", "test")
IMAGE_STATUSES = (
    "ok", "http_4xx", "http_5xx", "dns", "connection", "timeout", "too_many_redirects", "refused", "blocked_address",
    "too_large", "too_many_pixels", "not_an_image", "undecodable", "opted_out", "not_found",
)  # fmt: skip

_ID = pa.field("sample_id", pa.string(), nullable=False)


def _required(**columns: pa.DataType) -> list[pa.Field]:
    return [pa.field(name, kind, nullable=False) for name, kind in columns.items()]


def _optional(**columns: pa.DataType) -> list[pa.Field]:
    return [pa.field(name, kind) for name, kind in columns.items()]


_STRING, _F32, _F64, _I32 = pa.string(), pa.float32(), pa.float64(), pa.int32()
VECTOR = pa.list_(pa.float16(), -1)  # stands for a fixed-size float16 vector of any length
GRAM = pa.list_(pa.float64(), 10)
NORMS = pa.list_(pa.float64(), 10)
BANDS = pa.list_(pa.float64(), -1)
# What the entries of the columns `gram` and `norms` of a features table are.
GRAM_NAMES = (
    "z0_z0", "z0_eps", "z0_null", "z0_cond", "eps_eps", "eps_null", "eps_cond", "null_null", "null_cond", "cond_cond",
)  # fmt: skip
NORM_NAMES = (  # sums of powers, without the root
    "cond_eps_l1", "cond_eps_l4", "cond_eps_l5", "cond_l1", "cond_l4",
    "null_eps_l1", "null_eps_l4", "null_eps_l5", "null_l1", "null_l4",
)  # fmt: skip

SCHEMAS: dict[str, pa.Schema] = {
    "metadata": pa.schema(
        [_ID, *_required(url=_STRING, caption=_STRING, source=_STRING, pool=_STRING),
         *_optional(language=_STRING, width=_I32, height=_I32, aesthetic=_F32, similarity=_F32, punsafe=_F32,
                    pwatermark=_F32)]
    ),
    "images": pa.schema(
        [_ID, *_required(status=_STRING, detail=_STRING),
         *_optional(sha256=_STRING, bytes=pa.large_binary(), width=_I32, height=_I32, format=_STRING,
                    phash=pa.uint64())]
    ),
    "embeddings": pa.schema([_ID, *_required(image=VECTOR, text=VECTOR)]),
    "neighbours": pa.schema([_ID, *_required(rank=_I32, reference_id=_STRING, distance=_F64)]),
    "matches": pa.schema(
        [_ID, *_required(pool=_STRING, phash=pa.uint64()),
         *_optional(nearest_id=_STRING, distance=_F64, hamming=_I32, method=_STRING, reason=_STRING)]
    ),
    "links": pa.schema([_ID, *_required(linked_id=_STRING)]),
    "duplicates": pa.schema(
        [_ID, *_required(pool=_STRING, group=_STRING),
         *_optional(nearest_id=_STRING, distance=_F64, hamming=_I32, method=_STRING, reason=_STRING)]
    ),
    "dataset": pa.schema(
        [_ID, *_required(url=_STRING, caption=_STRING, sha256=_STRING, member=pa.bool_(), group=_STRING, part=_STRING,
                         weight=_F64)]
    ),
    "attrition": pa.schema(_required(pool=_STRING, status=_STRING, rows=_I32, total=_I32, share=_F64, ci_low=_F64,
                                     ci_high=_F64)),
    "selection": pa.schema([_ID, *_required(caption=_STRING, sha256=_STRING)]),
    "latents": pa.schema([_ID, *_required(caption_id=_STRING, mean=VECTOR, logvar=VECTOR)]),
    "texts": pa.schema([*_required(caption_id=_STRING, n_tokens=_I32),
                        *_optional(states=VECTOR, pooled=VECTOR, label=_I32)]),
    "features": pa.schema(
        [_ID, *_required(block=_STRING, timestep=_I32, draw=_I32),
         *_optional(model_loss=_F32, latent_error=_F32, pixel_error=_F32, gram=GRAM, norms=NORMS, bands=BANDS,
                    vector=pa.list_(pa.float32()))]
    ),
    "scores": pa.schema([_ID, *_required(attack=_STRING, variant=_STRING, score=_F64)]),
    "metrics": pa.schema(
        [*_required(attack=_STRING, variant=_STRING, part=_STRING, metric=_STRING, n_members=_I32, n_nonmembers=_I32,
                    method=_STRING, note=_STRING),
         *_optional(value=_F64, ci_low=_F64, ci_high=_F64, fpr_target=_F64, fpr_realized=_F64, threshold=_F64,
                    std=_F64, p_value=_F64, p_adjusted=_F64, p_shift=_F64, verdict=_STRING)]
    ),
    "roc": pa.schema([*_required(attack=_STRING, variant=_STRING, part=_STRING, fpr_target=_F64, tpr=_F64,
                                 fpr_realized=_F64), *_optional(threshold=_F64)]),
    "telling": pa.schema([*_required(attack=_STRING, variant=_STRING, rank=_I32, feature=_STRING, weight=_F64,
                                     member_mean=_F64, nonmember_mean=_F64, auc=_F64)]),
    "distance": pa.schema([*_required(space=_STRING, metric=_STRING, n_members=_I32, n_nonmembers=_I32, value=_F64),
                           *_optional(ci_low=_F64, ci_high=_F64, p_value=_F64)]),
    "dropped": pa.schema([*_required(stage=_STRING, reason=_STRING, pool=_STRING, rows=pa.int64())]),  # LAION: 2.3 G
}  # fmt: skip

KEYS: dict[str, tuple[str, ...]] = {
    "neighbours": ("sample_id", "rank"),
    "links": ("sample_id", "linked_id"),
    "features": ("sample_id", "block", "timestep", "draw"),
    "scores": ("sample_id", "attack", "variant"),
    "texts": ("caption_id",),
    "metrics": ("attack", "variant", "part", "method", "metric", "fpr_target"),
    "roc": ("attack", "variant", "part", "fpr_target"),
    "telling": ("attack", "variant", "rank"),
    "distance": ("space", "metric"),
    "attrition": ("pool", "status"),
    "dropped": ("stage", "reason", "pool"),
}
CATEGORIES: dict[str, dict[str, tuple[str, ...]]] = {
    "metadata": {"pool": POOLS},
    "matches": {"pool": POOLS},
    "duplicates": {"pool": POOLS},
    "images": {"status": IMAGE_STATUSES},
    "dataset": {"part": PARTS},
}


def sample_id(url: str, caption: str) -> str:
    """The first 128 bits, as 32 hex digits, of the SHA-256 of `url`, a newline and `caption`."""
    return hashlib.sha256(f"{url}\n{caption}".encode()).hexdigest()[:32]


def caption_id(caption: str) -> str:
    """32 hex digits that name a caption; the empty prompt has one too."""
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def bands(channels: int) -> int:
    """Length of the column `bands`: energies by latent channel and of low frequencies, under either prompt."""
    return 2 * (channels + 1)


def shard_of(ids: Sequence[str], shards: int) -> np.ndarray:
    """The shard of each sample, int64[n] in 0..shards-1: equal ranges of the (hashed, hence label-free) id space."""
    return np.array([int(i[:8], 16) * shards >> 32 for i in ids], dtype=np.int64)


def ids_of(shard: int, shards: int) -> tuple[str, str]:
    """Bounds of the ids of which `shard_of` says `shard`; no id equals the second."""
    first, end = (-(-(number << 32) // shards) for number in (shard, shard + 1))
    return f"{first:08x}", f"{end - 1:08x}g"  # g comes after every digit


def key(name: str) -> tuple[str, ...]:
    """The columns that identify a row of table `name`, in sort order."""
    return KEYS.get(name, ("sample_id",))


def vectors(column: pa.ChunkedArray | pa.Array, dtype: type = np.float32) -> np.ndarray:
    """A fixed-size-list column as a matrix, `dtype`[n_rows, length]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(array), array.type.list_size).astype(dtype, copy=False)


def vector_column(matrix: np.ndarray) -> pa.Array:
    """A matrix [n_rows, length] as a fixed-size-list column of the same dtype."""
    matrix = np.ascontiguousarray(matrix)
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    if wanted in (VECTOR, BANDS):
        return pa.types.is_fixed_size_list(found) and found.value_type == wanted.value_type
    return found == wanted


def check(table: pa.Table, name: str, where: object = "") -> pa.Table:
    """Table `name` in schema order and sorted by its key, or a `UserError` that says what is wrong with it.

    Raises:
        UserError: a column missing or of another type, a null in a required column, NaN or infinity, a value outside
            its fixed list, or two rows with one key.
    """
    for field in SCHEMAS[name]:
        if field.name not in table.column_names:
            raise UserError(f"{name} table has no column '{field.name}'", where, f"columns: {table.column_names}")
        column = table[field.name]
        if not _same_type(column.type, field.type):
            raise UserError(f"{name} column '{field.name}' is {column.type}", where, f"make it {field.type}")
        if not field.nullable and column.null_count:
            raise UserError(f"{name} column '{field.name}' has {column.null_count} empty values", where, "fill them")
        _refuse_nonfinite(table, name, field.name, where)
    for column_name, allowed in CATEGORIES.get(name, {}).items():
        wrong = set(table[column_name].unique().to_pylist()) - set(allowed)
        if wrong:
            raise UserError(f"{name} column '{column_name}' holds {sorted(wrong)}", where, f"use {list(allowed)}")
    table = table.select(SCHEMAS[name].names).sort_by([(column, "ascending") for column in key(name)])
    _refuse_duplicate_keys(table, name, where)
    return table.replace_schema_metadata(None)


def _refuse_nonfinite(table: pa.Table, name: str, column_name: str, where: object) -> None:
    column = table[column_name].combine_chunks()
    values = column.flatten() if pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type) else column
    if not pa.types.is_floating(values.type):
        return
    nullable = SCHEMAS[name].field(column_name).nullable  # then a vector may have empty entries, too
    known = values.drop_null() if nullable else values  # an empty entry becomes NaN here
    if not np.isfinite(known.to_numpy(zero_copy_only=False)).all():
        row = next(i for i, value in enumerate(column.to_pylist()) if not _finite(value, nullable))
        at = {k: table[k][row].as_py() for k in key(name)}
        raise UserError(
            f"{name} column '{column_name}' holds NaN or infinity", f"{where} {at}".strip(), "mend or drop the row"
        )


def _finite(value: float | list[float | None] | None, nullable: bool) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(nullable if v is None else bool(np.isfinite(v)) for v in values)


def _refuse_duplicate_keys(table: pa.Table, name: str, where: object) -> None:
    if table.num_rows < 2:
        return
    same = None
    for column_name in key(name):
        column = table[column_name].combine_chunks()
        if pa.types.is_floating(column.type):
            column = pc.fill_null(column, -1.0)
        equal = pc.equal(column[1:], column[:-1])
        same = equal if same is None else pc.and_(same, equal)
    if pc.any(same).as_py():
        row = pc.index(same, True).as_py()
        at = {k: table[k][row].as_py() for k in key(name)}
        raise UserError(f"{name} table has two rows with one key", f"{where} {at}".strip(), "drop one of them")


def read(paths: Any, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Table `name` from one Parquet file or the concatenation of several, checked and sorted.

    `columns`, the table's first key among them, reads a part of it, unchecked but for the columns' presence and,
    where all key columns are read, for rows that stand twice.

    Raises:
        UserError: a file is missing, is not Parquet, lacks a column or breaks off, the files are not of one make, or
            `check` finds something wrong.
    """
    files = [pathlib.Path(p) for p in (paths if isinstance(paths, (list, tuple)) else [paths])]
    where = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    parts = [_read_one(path, name, columns) for path in files]
    return joined(parts, name, where) if columns else check(_in_one(parts, name, where), name, where)


def joined(parts: Sequence[pa.Table], name: str, where: object) -> pa.Table:
    """Parts of table `name`, of which some columns were read, in one, sorted by what they have of its key.

    Raises:
        UserError: they are not of one make, or, where they have the whole key, a row stands twice.
    """
    table = _in_one(parts, name, where)
    there = [column for column in key(name) if column in table.column_names]
    table = table.sort_by([(column, "ascending") for column in there])
    if len(there) == len(key(name)):
        _refuse_duplicate_keys(table, name, where)
    return table


def _in_one(parts: Sequence[pa.Table], name: str, where: object) -> pa.Table:
    try:
        return pa.concat_tables(parts)
    except pa.ArrowInvalid as problem:
        raise UserError(f"{name} files differ in columns or types", where, "make all of them in one way") from problem


def between(path: Any, name: str, first: str, last: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of table `name` whose `sample_id` is from `first` to `last`, by those row groups that may hold some.

    `columns` as in `read`.

    Raises:
        UserError: as `read` does.
    """
    path = pathlib.Path(path)
    with parquet(path, name) as file:
        absent = [column for column in columns or ("sample_id",) if column not in file.schema_arrow.names]
        if absent:
            raise UserError(f"{name} table has no column '{absent[0]}'", path, "is it another table?")
        about, at = file.metadata, file.schema_arrow.names.index("sample_id")
        stats = [about.row_group(group).column(at).statistics for group in range(about.num_row_groups)]
        held = [g for g, s in enumerate(stats) if s is None or not s.has_min_max or (s.min <= last and s.max >= first)]
        table = file.read_row_groups(held, columns=list(columns) if columns else None)
    inside = pc.and_(pc.greater_equal(table["sample_id"], first), pc.less_equal(table["sample_id"], last))
    return table.filter(inside) if columns else check(table.filter(inside), name, path)


def batches(paths: Iterable[object], name: str, rows: int = 256) -> Iterator[pa.RecordBatch]:
    """Table `name` from Parquet files, `rows` at a time, one file after the other; each batch is checked by itself.

    Raises:
        UserError: as `read` does, when it comes to the fault.
    """
    for path in map(pathlib.Path, map(str, paths)):
        with parquet(path, name) as file:
            for batch in file.iter_batches(rows):
                yield from check(pa.Table.from_batches([batch]), name, path).to_batches()


def _read_one(path: pathlib.Path, name: str, columns: Sequence[str] | None) -> pa.Table:
    with parquet(path, name) as file:
        absent = [column for column in columns or () if column not in file.schema_arrow.names]
        if absent:
            raise UserError(f"{name} table has no column '{absent[0]}'", path, "is it another table?")
        return file.read(columns=list(columns) if columns else None)


@contextlib.contextmanager
def parquet(path: pathlib.Path, name: str) -> Iterator[pq.ParquetFile]:
    """The open Parquet file at `path`, spoken of as `name` in errors.

    Raises:
        UserError: it is missing or is not Parquet.
    """
    if not path.is_file():
        raise UserError(f"{name} file does not exist", path, "run the stage that makes it, or mend the path")
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # which would hold the whole file while batches are read
            yield file
    except (pa.ArrowInvalid, OSError) as problem:
        raise UserError(f"{name} file cannot be read as Parquet ({problem})", path, "make it anew") from problem


def provenance(path: object) -> dict:
    """What the file at `path` says of its own making; empty when it says nothing.

    Raises:
        UserError: the file is missing or is not Parquet.
    """
    with parquet(pathlib.Path(str(path)), "Parquet") as file:
        return json.loads((file.schema_arrow.metadata or {}).get(PROVENANCE_KEY, b"{}"))


def file_hash(path: object) -> str:
    """SHA-256 of a file's bytes, 64 hex digits.

    Raises:
        UserError: the file is missing.
    """
    if not pathlib.Path(str(path)).is_file():
        raise UserError("file does not exist", path, "run the stage that makes it, or mend the path")
    with pathlib.Path(str(path)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions of the named distributions."""
    return {name: importlib.metadata.version(name) for name in sorted(names)}


@contextlib.contextmanager
def replacing(path: object) -> Iterator[pathlib.Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    target = pathlib.Path(str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        with room_for(target):
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def room_for(target: object) -> Iterator[None]:
    """Says in one line that the disk is full, where `target` was to be written.

    Raises:
        UserError: the block ran out of room.
    """
    try:
        yield
    except OSError as problem:
        if problem.errno not in _NO_ROOM:
            raise
        fix = "free some and start again; nothing is half-written"
        raise UserError("no room on the disk", target, fix) from problem


def write(path: object, table: pa.Table, name: str, made_by: dict) -> None:
    """Check `table` and put it at `path` at once, with `made_by` (see `provenance`) in the file's metadata."""
    table = check(table, name, path).replace_schema_metadata(_metadata(made_by))
    rows = GROUP_ROWS.get(name, 65_536)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=rows, store_schema=True)


def write_batches(path: object, found: Iterable[pa.RecordBatch], name: str, made_by: dict) -> int:
    """Like `write`, for what is larger than memory: each batch becomes a row group. Returns the number of rows.

    Raises:
        UserError: `check` finds something wrong with a batch, or one does not begin after the last one's end.
    """
    schema, rows, last = SCHEMAS[name].with_metadata(_metadata(made_by)), 0, None
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for batch in found:
            table = check(pa.Table.from_batches([batch]), name, path)
            if not table.num_rows:
                continue
            first, end = (tuple(table[column][i].as_py() for column in key(name)) for i in (0, -1))
            if last is not None and first <= last:
                raise UserError(f"{name} rows are out of order", f"{path} {first} after {last}", "sort them first")
            writer.write_table(table, row_group_size=table.num_rows)
            rows, last = rows + table.num_rows, end
    return rows


def _metadata(made_by: dict) -> dict[bytes, bytes]:
    return {PROVENANCE_KEY: json.dumps(made_by, sort_keys=True, ensure_ascii=False).encode()}
