"""Candidates that are near-duplicates of training images, and groups of look-alikes among the rest.

Source: arXiv 2306.12983 keeps a candidate as a non-member iff its L2 distance, between unit CLIP embeddings, to every
retrieved training image is at least 0.5. We add a perceptual hash, search all members exactly instead of a retrieval
service, and give every near-duplicate or same-caption group within the dataset one name, so that folds keep it whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from mia.config import DedupOptions

PAIRS = 2**23  # hashes compared at a time: some 100 MB


@dataclasses.dataclass(frozen=True)
class Sample:
    """Arrays over n samples: ids, pools, captions, unit embeddings float32[n, d], perceptual hashes uint64[n]."""

    ids: np.ndarray
    pools: np.ndarray
    captions: np.ndarray
    embeddings: np.ndarray
    phash: np.ndarray


def nearest(queries: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and L2 distance of each query's nearest reference vector: int64[n], float64[n]. Exact, in blocks."""
    from sklearn.metrics import pairwise_distances_argmin_min

    return pairwise_distances_argmin_min(queries.astype(np.float64), reference.astype(np.float64))


def hamming_nearest(queries: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and number of differing bits of each query's nearest reference hash: int64[n], int64[n]."""
    index, distance = np.empty(len(queries), dtype=np.int64), np.empty(len(queries), dtype=np.int64)
    for rows, bits in _hamming(queries, reference):
        index[rows], distance[rows] = bits.argmin(1), bits.min(1)
    return index, distance


def _hamming(queries: np.ndarray, reference: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Differing bits of every pair, a slice of the queries at a time: uint8[slice, n_reference]."""
    block = max(1, PAIRS // len(reference))
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        yield rows, np.bitwise_count(queries[rows, None] ^ reference[None, :])


def deduplicate(samples: Sample, options: DedupOptions) -> pa.Table:
    """The duplicates table: for each sample its nearest reference, why it is dropped (or null), and its group.

    Candidates are held against members; control rows, which only a negative control trains on, against both.
    """
    n = len(samples.ids)
    near: dict[str, np.ndarray] = {
        "nearest_id": np.full(n, None, dtype=object), "distance": np.full(n, np.nan),
        "hamming": np.full(n, -1), "method": np.full(n, None, dtype=object), "reason": np.full(n, None, dtype=object),
    }  # fmt: skip
    for pool, against in (("candidate", ("member",)), ("control", ("member", "candidate"))):
        query, reference = np.flatnonzero(samples.pools == pool), np.flatnonzero(np.isin(samples.pools, against))
        if len(query) and len(reference):
            _mark(near, samples, query, reference, options)
    kept = np.flatnonzero(near["reason"] == None)  # noqa: E711 - elementwise on an object array
    group = samples.ids.copy()
    group[kept] = groups(samples, kept, options)
    return pa.table(
        {
            "sample_id": pa.array(samples.ids, pa.string()),
            "pool": pa.array(samples.pools, pa.string()),
            "group": pa.array(group, pa.string()),
            "nearest_id": pa.array(near["nearest_id"], pa.string()),
            "distance": pa.array(near["distance"], mask=np.isnan(near["distance"])),
            "hamming": pa.array(near["hamming"].astype(np.int32), mask=near["hamming"] < 0),
            "method": pa.array(near["method"], pa.string()),
            "reason": pa.array(near["reason"], pa.string()),
        }
    )


def _mark(
    near: dict[str, np.ndarray], samples: Sample, query: np.ndarray, reference: np.ndarray, options: DedupOptions
) -> None:
    index, distance = nearest(samples.embeddings[query], samples.embeddings[reference])
    hash_index, bits = hamming_nearest(samples.phash[query], samples.phash[reference])
    by_clip, by_hash = distance < options.max_distance, bits <= options.max_hamming
    near["nearest_id"][query] = samples.ids[reference[np.where(by_hash & ~by_clip, hash_index, index)]]
    near["distance"][query], near["hamming"][query] = distance, bits
    for found, method in ((by_hash, "phash"), (by_clip, "clip"), (by_clip & by_hash, "clip+phash")):
        near["method"][query[found]] = method
        near["reason"][query[found]] = "near-duplicate"


def groups(samples: Sample, rows: np.ndarray, options: DedupOptions) -> np.ndarray:
    """For each of `rows` the smallest sample id among those linked to it by look-alike images or one caption."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from sklearn.neighbors import NearestNeighbors

    ids, n = samples.ids[rows], len(rows)
    search = NearestNeighbors(algorithm="brute", radius=options.max_distance).fit(
        samples.embeddings[rows].astype(np.float64)
    )
    linked = search.radius_neighbors_graph(mode="distance").tocoo()
    close = linked.data < options.max_distance
    _, caption = np.unique([c.casefold() for c in samples.captions[rows]], return_inverse=True)
    _, first = np.unique(caption, return_index=True)
    hashes = samples.phash[rows]
    blocks = [np.argwhere(bits <= options.max_hamming) + (block.start, 0) for block, bits in _hamming(hashes, hashes)]
    alike = np.concatenate(blocks)
    row = np.concatenate([linked.row[close], np.arange(n), alike[:, 0]])
    column = np.concatenate([linked.col[close], first[caption], alike[:, 1]])
    _, component = connected_components(coo_array((np.ones(len(row)), (row, column)), shape=(n, n)), directed=False)
    order = np.argsort(ids, kind="stable")
    smallest = {component[i]: ids[i] for i in reversed(order)}
    return np.array([smallest[c] for c in component], dtype=object)
