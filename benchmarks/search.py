"""Exact nearest neighbours against the machine's own matrix product, and groups at sizes where pairs are too many.

The limit is the rate of the same products by numpy alone. Both are timed in turn and the best of each is taken, because
other processes come and go. The peer is scikit-learn's brute force, with the distances in float32.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_info

from mia import dedup, search

QUERIES, REFERENCE, WIDTH, K = 2_000, 100_000, 768, 10
GFLOP = 2 * QUERIES * REFERENCE * WIDTH / 1e9
TURNS = 3


def unit_vectors(n: int, seed: int) -> np.ndarray:
    """Unit vectors float32[n, 768], a tenth of them near-duplicates of others."""
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((n, WIDTH), dtype=np.float32)
    vectors[: n // 10] = vectors[-(n // 10) :] + 0.1 * vectors[: n // 10]
    return search.unit(vectors, "vectors")


def seconds(function: Callable, *arguments: object) -> np.ndarray:
    """Wall and CPU time of one call; others on the machine lengthen the first, hardly the second."""
    start = np.array([time.perf_counter(), time.process_time()])
    function(*arguments)
    return np.array([time.perf_counter(), time.process_time()]) - start


def products(queries: np.ndarray, vectors: np.ndarray) -> None:
    """All products of queries and vectors in the blocks of the search, and nothing else."""
    room = np.empty((search.QUERIES, search.TILE), np.float32)
    for start in range(0, len(queries), search.QUERIES):
        some = queries[start : start + search.QUERIES]
        for first in range(0, len(vectors), search.TILE):
            tile = vectors[first : first + search.TILE]
            np.matmul(some, tile.T, out=room.reshape(-1)[: len(some) * len(tile)].reshape(len(some), len(tile)))


class Peak:
    """The most resident memory, in GB, above what was resident at the start; looked at 200 times a second."""

    def __enter__(self) -> Peak:
        self.start, self.most, self._on = self._resident(), 0.0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()

    def _watch(self) -> None:
        while self._on:
            self.most = max(self.most, self._resident() - self.start)
            time.sleep(0.005)

    @staticmethod
    def _resident() -> float:
        with open("/proc/self/statm") as file:  # noqa: PTH123 - once every 5 ms
            return int(file.read().split()[1]) * resource.getpagesize() / 2**30


def nearest(queries: np.ndarray, vectors: np.ndarray) -> None:
    """Rate and memory of the exact search, and the peer's."""
    reference = search.in_memory("vectors", np.char.mod("%06d", np.arange(REFERENCE)), vectors)
    limit, ours = np.full(2, np.inf), np.full(2, np.inf)
    with Peak() as peak:
        for _ in range(TURNS):
            limit = np.minimum(limit, seconds(products, queries, vectors))
            ours = np.minimum(ours, seconds(search.top_k, queries, reference, K))
    print(f"top {K} of {QUERIES:,} x {REFERENCE:,} x {WIDTH}, and its matrix products alone (goal: 90 %):")
    for clock, fast, slow in zip(("wall", "CPU"), limit, ours, strict=True):
        print(f"  {GFLOP / slow:.0f} of {GFLOP / fast:.0f} GFLOP per {clock}-second: {fast / slow:.0%}")
    print(
        f"  scaled to 20,000 x 200,000: {20 * ours[0]:.0f} s; memory beyond queries and reference: {peak.most:.2f} GB"
    )
    peer = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(vectors)
    theirs = seconds(peer.kneighbors, queries)
    print(
        f"  scikit-learn, brute: {theirs[0]:.1f} s, {theirs[1]:.1f} CPU-s: {theirs[1] / ours[1]:.1f}x our CPU-seconds"
    )


def groups(vectors: np.ndarray) -> None:
    """Links of two shards of 10,000 vectors, and within a million hashes; the nearest of hashes."""
    own = np.concatenate([vectors[:5_000], vectors[-5_000:]])  # the near-duplicates of either half lie in the other
    other = np.concatenate([vectors[5_000:10_000], vectors[-10_000:-5_000]])
    ids, others = (np.char.mod(f"{letter}%04d", np.arange(10_000)) for letter in "ab")
    found: list[pa.Table] = []
    with Peak() as peak:
        shard = search.in_memory("others", others, other)
        took = seconds(lambda: found.append(search.links(pa.array(ids), own, [shard], 0.5)))
    rate = 1.5e8 * 2 * WIDTH / 1e9 / took
    print(
        f"links of 10,000 vectors and 10,000 others: {rate[0]:.0f} GFLOP per wall-second, {rate[1]:.0f} per CPU-second,"
        f" {len(found[0]):,} links, {peak.most:.2f} GB"
    )
    hashes = np.random.default_rng(0).integers(0, 2**64, 1_000_000, dtype=np.uint64)
    hashes[:1000] = hashes[-1000:] ^ np.uint64(0b10110)
    rate = 1e-9 * len(hashes) * 1_000 / seconds(dedup.hamming_nearest, hashes[:1_000], hashes)
    print(f"nearest of 1,000 x 1,000,000 hashes: {rate[0]:.1f} G pairs per wall-second, {rate[1]:.1f} per CPU-second")
    with Peak() as peak:
        linked = search.Components(len(hashes))
        took = seconds(search.link_hashes, linked, hashes, 6)
    count = len(hashes) - len(np.unique(linked.labels()))
    print(
        f"groups of {len(hashes):,} hashes, 6 bits: {took[0]:.1f} s, {count} links (1000 planted), {peak.most:.2f} GB"
    )


if __name__ == "__main__":
    blas = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    print(f"threads of BLAS: {max(blas)}")
    asked, references = unit_vectors(QUERIES, 0), unit_vectors(REFERENCE, 1)
    nearest(asked, references)
    groups(references)
