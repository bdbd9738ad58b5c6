"""Fetch the images of a metadata shard: what was received, byte for byte, or the one reason why nothing was.

Bytes wait in a spool, a file if the caller gives one, until the whole shard is known and its rows can leave in order:
memory does not grow with the images. A row that waits for a slow or resting host keeps its worker; the others, of which
there are `concurrency`, go on. How one image is fetched is told in `mia.fetching`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import io
import logging
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from mia import tables
from mia.config import ImagesOptions
from mia.errors import UserError
from mia.fetching import MALFORMED_HOST, Pace, Row, fetch_all, is_final

logger = logging.getLogger(__name__)

# A batch ends with the row that reaches either. On its way into a file it is in memory several times over.
GROUP_ROWS, GROUP_BYTES = 1024, 2**22
FEW = 10  # of so few rows every host may well be gone. Source: 6-15 % unreachable in published img2dataset statistics
_UNFINISHED: Row = {"status": "timeout", "detail": "not finished before the deadline of the shard"}


def fetch(metadata: pa.Table, options: ImagesOptions, *, root: pathlib.Path = pathlib.Path(), **pace: Any) -> pa.Table:
    """All that `stream` yields, as one table in memory; `pace` are the fields of `Pace`."""
    batches = stream(metadata, options, Pace(**pace), root=root)
    return pa.Table.from_batches(batches, schema=tables.SCHEMAS["images"])


def stream(
    metadata: pa.Table,
    options: ImagesOptions,
    pace: Pace,
    *,
    root: pathlib.Path = pathlib.Path(),
    previous: Iterable[pa.RecordBatch] = (),
    spool: BinaryIO | None = None,
) -> Iterator[pa.RecordBatch]:
    """An `images` table in batches, one row for each row of `metadata`, in its order.

    A row that is not `ok` says why in `status` and `detail` and is null elsewhere. `bytes` and `sha256` are of the
    image as received, `width`, `height` and `format` (lower case) are what Pillow found, `phash` is the 64-bit
    perceptual hash of the image as RGB on white. Neither the pace nor the order of rows changes a row of a server that
    answers in time, and where batches end depends on the rows alone. The first batch comes after the last download.

    Memory: about 1 KiB for each row, one batch, `concurrency` downloads of at most `options.max_bytes` (for a moment
    twice that) and four decoded images; and all bytes, unless `spool` is a file.

    Args:
        metadata: `sample_id` and `url` are read; `file:` URLs start from `root`, and count only if the options allow.
        options: what may be fetched, and the caps on bytes, pixels and redirects.
        pace: how fast and how long to ask.
        root: the folder that relative `file:` URLs start from.
        previous: rows of an earlier run with these options. Those that are final (`is_final`) are taken over, the
            others fetched again.
        spool: an empty file for the bytes until they leave, open for reading and writing, unbuffered: a full disk then
            shows at once and not when the file is closed.

    Raises:
        UserError: no host could be reached, the machine ran out of file descriptors, or the spool's disk is full.
    """
    ids, urls = metadata["sample_id"].to_pylist(), metadata["url"].to_pylist()
    store = _Spool(io.BytesIO() if spool is None else spool)
    rows: list[Row] = [_UNFINISHED] * len(urls)
    taken = _take_over(previous, ids, rows, store)
    if taken:
        logger.info("%d of %d rows are taken over", len(taken), len(rows))
    todo = {index: url for index, url in enumerate(urls) if index not in taken}

    def keep(index: int, row: Row) -> None:
        rows[index] = _set_down(row, store)

    asyncio.run(fetch_all(todo, keep, options, pace, root))
    counts = collections.Counter(row["status"] for row in rows)
    logger.info("%d images: %s", len(rows), ", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    _refuse_if_cut_off(rows)
    if rows and not counts["ok"]:
        logger.warning("not one image is left: later stages will have nothing to work on")
    yield from _batches(ids, rows, store)


def probe_rows(metadata: pa.Table, count: int = 20) -> pa.Table:
    """`count` rows that stand for all, the pools in equal numbers as far as they reach.

    They are those with the lowest ids of each pool. Ids are hashes, so they are drawn at random, yet always the same.
    """
    ids, pools = metadata["sample_id"].to_pylist(), metadata["pool"].to_pylist()
    nth: collections.Counter[str] = collections.Counter()
    turns = []
    for index in sorted(range(len(ids)), key=ids.__getitem__):
        turns.append((nth[pools[index]], pools[index], index))
        nth[pools[index]] += 1
    return metadata.take(sorted(index for *_, index in sorted(turns)[:count]))


class _Spool:
    """Bytes set down in the order they come and picked up in another."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.end = file, 0

    def put(self, data: bytes) -> tuple[int, int]:
        """Where the bytes went: offset and length."""
        span = self.end, len(data)
        with _a_place_on_disk():
            self.file.seek(self.end)
            if self.file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
        self.end += len(data)
        return span

    def get(self, span: tuple[int, int]) -> bytes:
        with _a_place_on_disk():
            self.file.seek(span[0])
            return self.file.read(span[1])


@contextlib.contextmanager
def _a_place_on_disk() -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        fix = "free space beside the output and start again; no shard is half-written"
        raise UserError("images cannot be kept on disk", problem.strerror or "", fix) from problem


def _take_over(previous: Iterable[pa.RecordBatch], ids: list[str], rows: list[Row], store: _Spool) -> set[int]:
    """Puts the final ones among earlier rows into `rows`; their indices there."""
    index_of = {name: index for index, name in enumerate(ids)}
    taken = set()
    for batch in previous:
        for row in batch.to_pylist():
            index = index_of.get(row.pop("sample_id"))
            if index is not None and is_final(row["status"], row["detail"]):
                rows[index] = _set_down(row, store)
                taken.add(index)
    return taken


def _set_down(row: Row, store: _Spool) -> Row:
    """The row with the place of its bytes in the spool instead of them."""
    return row if row.get("bytes") is None else {**row, "bytes": store.put(row["bytes"])}


def _batches(ids: list[str], rows: list[Row], store: _Spool) -> Iterator[pa.RecordBatch]:
    """The rows with their bytes, of a batch at a time."""
    schema = tables.SCHEMAS["images"]
    batch: list[Row] = []
    held = 0
    for name, row in zip(ids, rows, strict=True):
        data = None if row.get("bytes") is None else store.get(row["bytes"])
        batch.append({"sample_id": name, **row, "bytes": data})
        held += len(data or b"")
        if len(batch) == GROUP_ROWS or held >= GROUP_BYTES:
            made, batch, held = pa.RecordBatch.from_pylist(batch, schema=schema), [], 0  # no bytes twice for long
            yield made
    if batch:
        yield pa.RecordBatch.from_pylist(batch, schema=schema)


def _refuse_if_cut_off(rows: list[Row]) -> None:
    """Links die one by one. When no host can be reached at all it is this machine, and links would be blamed for it.

    Rows for which no host had its say, tried or not, tell nothing of that.
    """
    asked = [row for row in rows if row != _UNFINISHED and not _needs_no_host(row)]
    causes = {row["status"] for row in asked}
    if len(asked) >= FEW and causes <= {"dns", "connection", "timeout"}:
        what = f"none of {len(asked)} images could be fetched ({', '.join(sorted(causes))}): the network is down"
        fix = "mend the connection, name lookup, certificates or firewall, or allow more time"
        raise UserError(what, asked[0]["detail"], fix)


def _needs_no_host(row: Row) -> bool:
    return row["status"] in ("refused", "blocked_address", "not_found") or row["detail"] == MALFORMED_HOST
