"""Nearest neighbours of unit vectors and groups of look-alikes, exactly and in bounded memory.

Vectors are scaled to unit length here, so that the rounding of float16 does not matter. Products in float32, block by
block, only choose the pairs worth a look, with a margin for the worst rounding; those pairs' distances are computed
in float64 from the vectors as stored. So a result depends on no block size, shard, thread or order of rows: a bit-equal
answer for any of them. Equal distances are ordered by the reference's id.

Source: exact search is one matrix product, and a blocked one is as fast as a library (performance.md, D ii).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mia.errors import UserError
from mia.tables import SCHEMAS

ROWS = 2**16  # vectors read at a time: 0.2 GB of 768 float32
QUERIES, TILE = 1024, 4096  # one matrix product: wide enough for BLAS, and 16 MB out
PAIRS = 2**22  # pairs that wait for their exact distance
RESCORED = 2**11  # pairs rescored at a time: some 12 MB of 768 float64, which caches hold
MERGED = 2**20  # rows of neighbours or links tables gathered before they are looked at, at least
LISTS, TRAINING = (
    1024,
    40,
)  # cells of the approximate index, and vectors to place each: the least faiss accepts in silence
MAX_K = 1024

Vectors = np.ndarray  # float16 or float32 [n, width], as stored
Pairs = tuple[np.ndarray, np.ndarray]
Scored = tuple[np.ndarray, np.ndarray, np.ndarray]  # pairs and their products
Screen = Callable[[np.ndarray, np.ndarray], Iterator[Pairs]]
Progress = Callable[[Sequence], Iterable]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What is searched: a name for messages, the ids of all rows, and the parts' numbers of rows and readers."""

    name: str
    ids: pa.Array
    lengths: Sequence[int]
    parts: Sequence[Callable[[], Vectors]]


class Rows:
    """Some rows, int64[n], of a matrix of vectors, copied only as they are asked for: all at once may be gigabytes."""

    def __init__(self, vectors: Vectors, rows: np.ndarray) -> None:
        self.vectors, self.rows, self.shape = vectors, rows, (len(rows), vectors.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | np.ndarray) -> Vectors:
        return self.vectors[self.rows[which]]


def in_memory(name: str, ids: Sequence[str] | np.ndarray, vectors: Vectors) -> Reference:
    """A reference whose vectors, float16 or float32[n, width], are at hand."""
    blocks = _slices(len(vectors), ROWS)
    parts = [functools.partial(vectors.__getitem__, block) for block in blocks]
    return Reference(name, pa.array(ids, pa.string()), [block.stop - block.start for block in blocks], parts)


def only(reference: Reference, keep: np.ndarray) -> Reference:
    """The rows of a reference that `keep`, bool[n], marks; they are cut out as they are read."""
    if keep.all():
        return reference
    marks = np.split(keep, np.cumsum(reference.lengths)[:-1])
    parts = [functools.partial(_marked, part, mark) for part, mark in zip(reference.parts, marks, strict=True)]
    return Reference(reference.name, reference.ids.filter(pa.array(keep)), [int(m.sum()) for m in marks], parts)


def _marked(part: Callable[[], Vectors], mark: np.ndarray) -> Vectors:
    return part()[mark]


# ------------------------------------------------------------------------------------------------ vectors


def unit(vectors: Vectors, name: str, ids: pa.Array | None = None, room: np.ndarray | None = None) -> np.ndarray:
    """The vectors at unit length, float32[n, width], in `room` if given: fresh memory is slow to come by.

    Messages have the `name` of the whole, and the row's id or number.

    Raises:
        UserError: a vector holds NaN or infinity, or is zero.
    """
    out = np.empty(vectors.shape, np.float32) if room is None else room[: len(vectors)]
    out[:] = vectors
    with np.errstate(over="ignore", invalid="ignore"):
        length = np.sqrt(np.einsum("ij,ij->i", out, out))
    wrong = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
    if len(wrong):
        finite = np.isfinite(vectors[wrong[0]]).all()
        what = "has no length" if finite and length[wrong[0]] == 0 else "holds NaN, infinity or too large a number"
        row = f"row {wrong[0]}" if ids is None else ids[wrong[0]]
        raise UserError(f"the vector of {row} {what}", name, "mend or drop the row")
    out /= length[:, None]
    return out


def distances(left: Vectors | Rows, i: np.ndarray, right: Vectors | Rows, j: np.ndarray) -> np.ndarray:
    """L2 distance, at unit length, of `left[i]` and `right[j]`, pair by pair: float64[n_pairs], from 0 to 2.

    Each depends on its two vectors only, to the last bit, and is exactly 0 for a vector and itself.
    """
    out = np.empty(len(i))
    for some in _slices(len(i), RESCORED):
        apart = _unit64(right[j[some]])
        once, which = np.unique(i[some], return_inverse=True)
        apart -= _unit64(left[once])[which]
        out[some] = np.sqrt(np.vecdot(apart, apart))
    return out


def _unit64(vectors: Vectors) -> np.ndarray:
    wide = vectors.astype(np.float64)
    wide /= np.sqrt(np.vecdot(wide, wide))[:, None]
    return wide


def margin(width: int) -> float:
    """What a float32 product of two unit vectors may be off by, twice: in the one judged and in the one it is held to.

    With u = 2**-24, scaling a vector costs a relative (width / 2 + 3) u, and a sum of `width` products, in any
    order, width u. Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    """
    return 4 * (width + 6) * 2.0**-24


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


# ------------------------------------------------------------------------------------------------ top k


def top_k(queries: Vectors, reference: Reference, k: int, progress: Progress = iter) -> Pairs:
    """The k nearest rows of the reference to each query, nearest first, exactly: int64[n, k]; distances float64[n, k].

    A reference with fewer rows leaves row -1 and distance infinity. Time is one matrix product, memory `ROWS` vectors.

    Raises:
        UserError: vectors of another width than the queries', or some that `unit` refuses.
    """
    return _search(queries, reference, k, lambda block: lambda near, far: _screened(near, block, k, far), progress)


def approximate_top_k(queries: Vectors, reference: Reference, k: int, probes: int, progress: Progress = iter) -> Pairs:
    """Like `top_k`, but looks only into the `probes` of 1,024 cells that lie nearest to a query (faiss IVF, float16).

    Distances are exact; a neighbour may be missed, `recall` says how often. A reference of fewer rows than there are
    cells is searched exactly. Source: what is too large for an exact search, performance.md E, row 4.

    Raises:
        UserError: as `top_k`, or faiss is not installed.
    """
    if len(reference.ids) < LISTS:
        return top_k(queries, reference, k, progress)
    index = _ivf(reference)
    index.nprobe = min(probes, index.nlist)

    def over(block: np.ndarray) -> Screen:
        index.reset()
        index.add(block)

        def screen(near: np.ndarray, far: np.ndarray) -> Iterator[Pairs]:
            rows = index.search(near, 2 * k + 16)[1]  # more than k: its float16 cannot tell apart what is very alike
            query, place = np.nonzero(rows >= 0)
            yield query, rows[query, place]

        return screen

    return _search(queries, reference, k, over, progress)


def recall(queries: Vectors, reference: Reference, found: np.ndarray) -> float:
    """The share of queries whose nearest `found` distance, float64[n], is no farther than an exact search's."""
    exact = top_k(queries, reference, 1)[1][:, 0]
    return float((found <= exact).mean()) if len(found) else 1.0


def _ivf(reference: Reference) -> Any:
    """An index, trained on evenly spaced rows of the reference, that holds nothing yet."""
    try:
        import faiss
    except ImportError as problem:
        fix = "run `pip install faiss-cpu`, or raise neighbours.exact_below"
        raise UserError("an approximate search needs faiss", reference.name, fix) from problem
    lists = min(LISTS, len(reference.ids) // TRAINING)
    step = max(1, len(reference.ids) // (lists * TRAINING))
    sample = np.concatenate([unit(part()[::step], reference.name) for part in reference.parts])
    index = faiss.index_factory(sample.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    return index


def _search(
    queries: Vectors, reference: Reference, k: int, over: Callable[[np.ndarray], Screen], progress: Progress
) -> Pairs:
    """Screen the reference block by block, rescore what passes, and keep the k nearest."""
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k is {k}, not from 1 to {MAX_K}")
    near = unit(queries, "queries")
    rank = np.append(_ranks(reference.ids), len(reference.ids))  # the last is the rank of "no row", -1
    rows, far = np.full((len(near), k), -1), np.full((len(near), k), np.inf)
    room = np.empty((max(reference.lengths, default=0), near.shape[1]), np.float32)
    first = 0
    with each_thread() as each:
        for part in progress(reference.parts):
            stored = part()
            if not len(stored):
                continue
            _refuse_another_width(stored, near, reference.name)
            screen = over(unit(stored, reference.name, reference.ids[first : first + len(stored)], room))
            one = functools.partial(_search_block, queries, near, stored, screen, first, rank, rows, far)
            each(one, _slices(len(near), QUERIES))
            first += len(stored)
    return rows, far


def _refuse_another_width(stored: Vectors, queries: Vectors | Rows, name: str) -> None:
    if stored.shape[1] != queries.shape[1]:
        what = f"vectors have {stored.shape[1]} entries, the queries' have {queries.shape[1]}"
        raise UserError(what, name, "embed both with one model")


def _search_block(
    queries: Vectors, near: np.ndarray, stored: Vectors, screen: Screen, first: int, rank: np.ndarray,
    rows: np.ndarray, far: np.ndarray, some: slice,
) -> None:  # fmt: skip
    """Hold some queries against one block, whose first row has number `first`, and update their nearest in place."""
    for i, j in screen(near[some], far[some]):
        apart = distances(queries[some], i, stored, j)
        _keep_nearest(rows[some], far[some], rank, i, first + j, apart)


@contextlib.contextmanager
def each_thread() -> Iterator[Callable[[Callable, Iterable], list]]:
    """A `for` that calls a function on as many items at a time as BLAS may use threads, each with BLAS on one thread.

    So the passes between the products, which numpy does on one thread, are shared out as well.
    """
    from threadpoolctl import threadpool_info, threadpool_limits

    threads = max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)
    with threadpool_limits(1, "blas"), concurrent.futures.ThreadPoolExecutor(threads) as pool:
        yield lambda function, items: list(pool.map(function, items))


def _ranks(ids: pa.Array) -> np.ndarray:
    """Where each id stands in sorted order: the order of ties."""
    rank = np.empty(len(ids), np.int64)
    rank[pc.array_sort_indices(ids).to_numpy()] = np.arange(len(ids))
    return rank


def _keep_nearest(
    rows: np.ndarray, far: np.ndarray, rank: np.ndarray, i: np.ndarray, j: np.ndarray, apart: np.ndarray
) -> None:
    """Let rows `j`, at distance `apart` from query `i`, into the nearest so far, in place."""
    k = rows.shape[1]
    query = np.concatenate([np.repeat(np.arange(len(rows)), k), i])
    row, distance = np.concatenate([rows.ravel(), j]), np.concatenate([far.ravel(), apart])
    order = np.lexsort((rank[row], distance, query))
    order = order[_places(query[order]) < k]
    rows[:], far[:] = row[order].reshape(rows.shape), distance[order].reshape(far.shape)


def _places(keys: np.ndarray) -> np.ndarray:
    """Each entry's place, from 0, in its run of equal keys; `keys` are sorted."""
    return np.arange(len(keys)) - np.searchsorted(keys, keys)


def _screened(near: np.ndarray, block: np.ndarray, k: int, far: np.ndarray) -> Iterator[Pairs]:
    """Pairs (query, row of the block) that may be among the k nearest. `far`, the distances so far, may fall."""
    slack = np.float32(margin(near.shape[1]))
    floor, limit = _floor(far, slack), 4 * k * len(near)
    nothing = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    found: Scored = nothing
    for tile, product, marks in _products(near, block):
        if tile.start == 0 and product.shape[1] >= k and np.isneginf(floor).any():
            some = product[:, : max(k, TILE // 4)]  # the k-th of these is a floor already, if a lower one
            floor = np.maximum(floor, np.partition(some, -k, axis=1)[:, -k] - slack)
        i, j = _above(product, floor[:, None], marks)
        more = i, j + tile.start, product[i, j]
        found = np.append(found[0], more[0]), np.append(found[1], more[1]), np.append(found[2], more[2])
        if len(found[0]) > limit:
            found, kth = _thinned(found, k, len(near), slack)
            floor, limit = np.maximum(floor, kth - slack), max(limit, 2 * len(found[0]))
        if len(found[0]) > PAIRS:  # a crowd of equals
            yield found[:2]
            found, floor = nothing, np.maximum(floor, _floor(far, slack))
    yield _thinned(found, k, len(near), slack)[0][:2]


def _floor(far: np.ndarray, slack: np.float32) -> np.ndarray:
    """The least product, float32, that a row may have with a query and still come before its k-th nearest."""
    return (1 - np.square(far[:, -1]) / 2).astype(np.float32) - slack


def _products(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """The products of all left vectors with a tile of the right ones, float32, and room for as many bools.

    Both are overwritten by the next: fresh memory for each would cost as much as looking at the products.
    """
    size = len(left) * min(TILE, len(right))
    room, marks = np.empty(size, np.float32), np.empty(size, bool)
    for tile in _slices(len(right), TILE):
        shape = len(left), tile.stop - tile.start
        here = slice(shape[0] * shape[1])
        yield tile, np.matmul(left, right[tile].T, out=room[here].reshape(shape)), marks[here].reshape(shape)


def _above(product: np.ndarray, floor: np.ndarray | np.float32, marks: np.ndarray) -> Pairs:
    """Row and column, int64, of the products that reach the floor, which may differ by row."""
    i, j = np.divmod(np.flatnonzero(np.greater_equal(product, floor, out=marks)), product.shape[1])
    return i, j


def _thinned(found: Scored, k: int, n: int, slack: np.float32) -> tuple[Scored, np.ndarray]:
    """The pairs that are not surely behind k others of their query, and each query's k-th product, float32[n]."""
    order = np.argsort(4.0 * found[0] - found[2])  # by query, then by falling product: exact in float64
    i, j, product = (column[order] for column in found)
    places = np.flatnonzero(_places(i) == k - 1)
    kth = np.full(n, -np.inf, np.float32)
    kth[i[places]] = product[places]
    keep = product >= kth[i] - slack
    return (i[keep], j[keep], product[keep]), kth


# ------------------------------------------------------------------------------------------------ neighbours tables


def neighbours(query_ids: np.ndarray, reference: Reference, rows: np.ndarray, apart: np.ndarray) -> pa.Table:
    """The neighbours table of what a search found: sample_id, rank from 1, reference_id, distance."""
    query, place = np.nonzero(rows >= 0)
    found = rows[query, place]
    columns = [query_ids[query], place + 1, reference.ids.take(pa.array(found)), apart[query, place]]
    return pa.table(
        [pa.array(column, kind) for column, kind in zip(columns, SCHEMAS["neighbours"].types, strict=True)],
        schema=SCHEMAS["neighbours"],
    )


def merge(found: Iterable[pa.Table], k: int) -> pa.Table:
    """The k nearest of each sample over any number of neighbours tables: the table of one search through all.

    As many rows as the result has, or `MERGED`, wait to be merged: memory grows with the samples, not with the tables.
    """
    merged = SCHEMAS["neighbours"].empty_table()

    def enough() -> int:
        return max(MERGED, len(merged))

    for some in _gathered(found, enough):
        merged = _first(pa.concat_tables([merged, some]), k)
    return merged


def _gathered(found: Iterable[pa.Table], enough: Callable[[], int]) -> Iterator[pa.Table]:
    """The rows of many tables in few, each of `enough` rows at least but the last."""
    waiting: list[pa.Table] = []
    for table in found:
        waiting.append(table)
        if sum(len(some) for some in waiting) >= enough():
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _first(table: pa.Table, k: int) -> pa.Table:
    table = table.sort_by([(column, "ascending") for column in ("sample_id", "distance", "reference_id")])
    pair = [table[column].combine_chunks() for column in ("sample_id", "reference_id")]
    if len(table) > 1:  # one reference given twice is one neighbour
        again = pc.and_(*(pc.equal(column[1:], column[:-1]) for column in pair))
        table = table.filter(pa.array(np.append(True, ~again.to_numpy(zero_copy_only=False))))
    keys = table["sample_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    place = _places(keys)
    rank = SCHEMAS["neighbours"].field("rank")
    ranked = table.set_column(table.column_names.index("rank"), rank, pa.array(place + 1, pa.int32()))
    return ranked.filter(pa.array(place < k))


# ------------------------------------------------------------------------------------------------ groups


class Components:
    """Groups of n items that grow link by link, in memory that grows with n and not with the links."""

    def __init__(self, n: int) -> None:
        self._labels = np.arange(n)
        self._waiting: list[Pairs] = []
        self._count = 0

    def link(self, i: np.ndarray, j: np.ndarray) -> None:
        """Put items `i` and `j`, pair by pair, into one group."""
        if len(i):
            self._waiting.append((i, j))
            self._count += len(i)
        if self._count > max(len(self._labels), ROWS):
            self.labels()

    def apart(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Whether items `i` and `j` are in different groups as far as is known yet: bool[n_pairs]."""
        return self._labels[i] != self._labels[j]

    def labels(self) -> np.ndarray:
        """The group of each item, int64[n]: any number, the same within a group."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if self._waiting:
            i, j = (self._labels[np.concatenate(side)] for side in zip(*self._waiting, strict=True))
            n = len(self._labels)
            graph = coo_array((np.ones(len(i), np.int8), (i, j)), shape=(n, n))
            self._labels = connected_components(graph, directed=False)[1].astype(np.int64)[self._labels]
            self._waiting, self._count = [], 0
        return self._labels


def firsts(labels: np.ndarray) -> np.ndarray:
    """For each entry the first entry with its label: int64[n]."""
    _, first, which = np.unique(labels, return_index=True, return_inverse=True)
    return first[which]


def links(
    ids: pa.Array, vectors: Vectors | Rows, others: Sequence[Reference], radius: float, progress: Progress = iter
) -> pa.Table:
    """The links table of rows closer than `radius` at unit length: within `vectors`, and between these and the others.

    Not every such pair: so few that they make the same groups, at most one for each row. One part of the others is in
    memory at a time.

    Raises:
        UserError: vectors of another width, or some that `unit` refuses.
    """
    groups, found = Components(len(ids)), [SCHEMAS["links"].empty_table()]
    link_near(groups, vectors, radius)
    for other in progress(others):
        first = 0
        for part in other.parts:
            block = part()
            _refuse_another_width(block, vectors, other.name)
            i, j = _joined(groups, vectors, block, radius)
            found.append(_links(other.ids.take(pa.array(first + j)), ids.take(pa.array(i))))
            first += len(block)
    first_of_group = firsts(groups.labels())
    later = np.flatnonzero(first_of_group != np.arange(len(ids)))
    found.append(_links(ids.take(pa.array(later)), ids.take(pa.array(first_of_group[later]))))
    return pa.concat_tables(found)


def _links(ids: pa.Array, linked: pa.Array) -> pa.Table:
    return pa.table([ids, linked], schema=SCHEMAS["links"])


def _joined(groups: Components, vectors: Vectors | Rows, block: Vectors, radius: float) -> Pairs:
    """A link to one of `vectors` for each row of `block` that is near any; what the block joins, `groups` joins."""
    n = len(vectors)
    both = Components(n + len(block))
    both.link(np.arange(n), firsts(groups.labels()))
    both.labels()  # so that pairs of what is one group already are seen as such
    for i, j, _ in radius_pairs(vectors, radius, lambda i, j: both.apart(i, n + j), block):
        both.link(i, n + j)
    first = firsts(both.labels())
    groups.link(np.arange(n), first[:n])
    near = np.flatnonzero(first[n:] < n)
    return first[n + near], near


def link_found(groups: Components, ids: pa.Array, found: Iterable[pa.Table]) -> None:
    """Link the rows, whose ids are `ids`, that any number of links tables name.

    Raises:
        UserError: a links table names a sample that is not among them.
    """
    for table in _gathered(found, lambda: max(MERGED, len(ids))):
        i, j = (_rows_of(table[column], ids) for column in ("sample_id", "linked_id"))
        groups.link(i, j)


def _rows_of(names: pa.ChunkedArray, ids: pa.Array) -> np.ndarray:
    rows = pc.index_in(names, ids)
    if rows.null_count:
        alien = names.filter(pc.is_null(rows))[0].as_py()
        raise UserError("a links table has a sample that was not kept", alien, "make links of these matches")
    return rows.to_numpy()


def link_near(groups: Components, vectors: Vectors | Rows, radius: float) -> None:
    """Link all rows closer than `radius` at unit length; pairs that are one group already are not looked at again."""
    for i, j, _ in radius_pairs(vectors, radius, groups.apart):
        groups.link(i, j)


def radius_pairs(
    vectors: Vectors | Rows, radius: float, wanted: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    others: Vectors | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:  # fmt: skip
    """Every pair i < j of rows closer than `radius` at unit length, with its distance, some at a time.

    With `others`, i is a row of `vectors` and j any row of theirs. Exact: in time a matrix product, or half of one
    without others; blocks in memory. `wanted` says which pairs are worth an exact distance.

    Raises:
        UserError: a vector that `unit` refuses.
    """
    right = vectors if others is None else others
    floor = np.float32(1 - radius**2 / 2 - margin(vectors.shape[1])) if radius > 0 else np.inf
    blocks = _slices(len(vectors), 2 * TILE) if radius > 0 else []
    for number, rows in enumerate(blocks):
        left = unit(vectors[rows], "embeddings")
        for columns in blocks[number:] if others is None else _slices(len(right), 2 * TILE):
            same = others is None and columns == rows
            for i, j in _close(left, left if same else unit(right[columns], "embeddings"), floor):
                keep = i < j if same else slice(None)
                i, j = i[keep] + rows.start, j[keep] + columns.start
                for some in _slices(len(i), 2**16):
                    yield from _within(vectors, i[some], right, j[some], radius, wanted)


def _close(left: np.ndarray, right: np.ndarray, floor: np.float32 | float) -> Iterator[Pairs]:
    for rows in _slices(len(left), QUERIES):
        for tile, product, marks in _products(left[rows], right):
            i, j = _above(product, np.float32(floor), marks)
            yield i + rows.start, j + tile.start


def _within(
    left: Vectors | Rows, i: np.ndarray, right: Vectors | Rows, j: np.ndarray, radius: float, wanted: Any
) -> Iterator[tuple]:
    if wanted is not None:
        keep = wanted(i, j)
        i, j = i[keep], j[keep]
    apart = distances(left, i, right, j)
    near = apart < radius
    if near.any():
        yield i[near], j[near], apart[near]


def link_hashes(groups: Components, hashes: np.ndarray, max_hamming: int) -> None:
    """Link all rows whose hashes, uint64[n], differ in at most `max_hamming` bits; -1 links none."""
    if max_hamming < 0 or not len(hashes):
        return
    groups.link(np.arange(len(hashes)), firsts(hashes))
    distinct, first = np.unique(hashes, return_index=True)
    for i, j in hamming_pairs(distinct, max_hamming):
        groups.link(first[i], first[j])


def hamming_pairs(hashes: np.ndarray, max_hamming: int) -> Iterator[Pairs]:
    """Pairs of rows of distinct hashes, uint64[n], that differ in at most `max_hamming` bits; some come more than once.

    Exact. Of `max_hamming` + 2 bands of bits at least two are equal in such a pair (pigeonhole), so only rows that
    share two bands are compared: with 6 differing bits 28 sorts and about n**2 / 4700 comparisons, not n**2 / 2.
    """
    for mask in _masks(max_hamming):
        masked = hashes & mask
        order = np.argsort(masked, kind="stable")
        masked, sorted_hashes = masked[order], hashes[order]
        last = np.searchsorted(masked, masked, side="right") - 1  # the end of each run of equal bands
        places, step = np.arange(len(hashes)), 0
        while len(places):  # each row with the next of its run, then with the one after, ...
            step += 1
            places = places[places + step <= last[places]]
            bits = np.bitwise_count(sorted_hashes[places] ^ sorted_hashes[places + step])
            close = places[bits <= max_hamming]
            if len(close):
                yield order[close], order[close + step]


def _masks(max_hamming: int) -> list[np.uint64]:
    """Bits that are compared at once. The more may differ, the narrower the bands: the schema allows 16.

    Bands are interleaved: neighbouring bits of a perceptual hash are neighbouring frequencies, and often agree.
    """
    count = max_hamming + 2
    bands = [sum(1 << bit for bit in range(band, 64, count)) for band in range(count)]
    return [np.uint64(one | two) for one, two in itertools.combinations(bands, 2)]
