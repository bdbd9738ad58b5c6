"""Candidates that are near-duplicates of training images, and groups of look-alikes among the rest.

Source: arXiv 2306.12983 keeps a candidate as a non-member iff its L2 distance, between unit CLIP embeddings, to every
retrieved training image is at least 0.5. We add a perceptual hash, search all members exactly instead of a retrieval
service, and give every near-duplicate or same-caption group within the dataset one name, so that folds keep it whole.

`match` decides who is dropped, `search.links` finds look-alikes among the kept, in as many jobs as there are shards,
`group` joins them; `deduplicate` does all three at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mia import search
from mia.config import DedupOptions
from mia.errors import UserError

PAIRS, TILE = 2**18, 2**13  # pairs and reference hashes compared at a time: 2 MB, which caches hold
AGAINST = {"candidate": ("member",), "control": ("member", "candidate")}  # what each pool is held against

# Pairs that the authors judged by eye, by distance: low, high, share of true duplicates; 10 pairs x 10 candidates each.
# Source: arXiv 2306.12983.
CHECKED = ((0.0, 0.1, 1.0), (0.1, 0.2, 0.96), (0.2, 0.3, 0.64), (0.3, 0.4, 0.19), (0.4, 0.5, 0.08))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Arrays over n samples: ids, pools, captions, embeddings float16 or float32[n, d], perceptual hashes uint64[n]."""

    ids: np.ndarray
    pools: np.ndarray
    captions: np.ndarray
    embeddings: np.ndarray
    phash: np.ndarray


def against_own(
    query_ids: np.ndarray, query_pools: np.ndarray, queries: np.ndarray, reference: search.Reference,
    reference_pools: np.ndarray, find: Callable[[np.ndarray, search.Reference], search.Pairs],
) -> list[pa.Table]:  # fmt: skip
    """Neighbours of the queries among rows of our own dataset: a table for each pool that is held against others.

    Candidates are held against members; control rows, which only a negative control trains on, against both. `find`
    searches, for example `search.top_k` for some k. Vectors are float16 or float32[n, width], at any length but zero.
    """
    found = []
    for pool, against in AGAINST.items():
        asked, allowed = np.flatnonzero(query_pools == pool), np.isin(reference_pools, against)
        if len(asked) and allowed.any():
            some = search.only(reference, allowed)
            vectors = queries if len(asked) == len(queries) else queries[asked]
            found.append(search.neighbours(query_ids[asked], some, *find(vectors, some)))
    return found


def hamming_nearest(queries: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and number of differing bits of each query's nearest reference hash: int64[n], int64[n].

    The first of equals. Every pair is looked at, on as many threads as BLAS may use.
    """
    index, distance = np.zeros(len(queries), dtype=np.int64), np.full(len(queries), 65)
    tile = min(TILE, PAIRS, len(reference))
    block = max(1, PAIRS // tile)

    def fill(start: int) -> None:
        some = slice(start, start + block)
        for first in range(0, len(reference), tile):
            bits = np.bitwise_count(queries[some, None] ^ reference[None, first : first + tile])
            at = bits.argmin(1)
            least = bits[np.arange(len(at)), at]
            closer = least < distance[some]
            index[some][closer], distance[some][closer] = first + at[closer], least[closer]

    with search.each_thread() as each:
        each(fill, range(0, len(queries), block))
    return index, distance


def deduplicate(samples: Sample, options: DedupOptions, neighbours: pa.Table | None = None) -> pa.Table:
    """The duplicates table of samples that fit in memory: `match`, the links of all that is kept, and `group`.

    Without `neighbours` our own members are searched here and now.
    """
    near = _own_neighbours(samples) if neighbours is None else neighbours
    matches = match(samples.ids, samples.pools, samples.phash, near, options)
    kept = np.flatnonzero(is_kept(matches))
    ids = pa.array(samples.ids[kept], pa.string())
    links = search.links(ids, search.Rows(samples.embeddings, kept), (), options.max_distance)
    return group(matches, samples.captions, [links], options)


def match(
    ids: np.ndarray, pools: np.ndarray, phash: np.ndarray, neighbours: pa.Table, options: DedupOptions
) -> pa.Table:
    """The matches table: for each sample its nearest reference and why it is dropped (or null).

    `neighbours` is what `mia neighbours` found for the candidates and control rows among all training images, merged
    (see `search.merge`). Hashes are held against our own only.

    Raises:
        UserError: neighbours of a sample that is not among `ids`.
    """
    n = len(ids)
    near: dict[str, np.ndarray] = {
        "nearest_id": np.full(n, None, dtype=object), "distance": np.full(n, np.nan),
        "hamming": np.full(n, -1), "method": np.full(n, None, dtype=object), "reason": np.full(n, None, dtype=object),
    }  # fmt: skip
    _mark_by_distance(near, ids, neighbours, options)
    _mark_by_hash(near, ids, pools, phash, options)
    return pa.table(
        {
            "sample_id": pa.array(ids, pa.string()),
            "pool": pa.array(pools, pa.string()),
            "phash": pa.array(phash, pa.uint64()),
            "nearest_id": pa.array(near["nearest_id"], pa.string()),
            "distance": pa.array(near["distance"], mask=np.isnan(near["distance"])),
            "hamming": pa.array(near["hamming"].astype(np.int32), mask=near["hamming"] < 0),
            "method": pa.array(near["method"], pa.string()),
            "reason": pa.array(near["reason"], pa.string()),
        }
    )


def is_kept(matches: pa.Table) -> np.ndarray:
    """Which rows have no reason to be dropped: bool[n]."""
    return pc.is_null(matches["reason"]).to_numpy()


def _own_neighbours(samples: Sample) -> pa.Table:
    own = search.in_memory("embeddings", samples.ids, samples.embeddings)
    find = functools.partial(search.top_k, k=1)
    found = against_own(samples.ids, samples.pools, samples.embeddings, own, samples.pools, find)
    return search.merge(found, 1)


def _mark_by_distance(
    near: dict[str, np.ndarray], ids: np.ndarray, neighbours: pa.Table, options: DedupOptions
) -> None:
    first = neighbours.filter(pc.equal(neighbours["rank"], 1))
    row = pc.index_in(first["sample_id"], pa.array(ids, pa.string()))
    if row.null_count:
        alien = first.filter(pc.is_null(row))["sample_id"][0].as_py()
        raise UserError("a neighbours table has a sample that the embeddings lack", alien, "make both from one run")
    rows = row.to_numpy()
    near["distance"][rows] = first["distance"].to_numpy()
    near["nearest_id"][rows] = first["reference_id"].to_pylist()
    found = near["distance"] < options.max_distance
    near["method"][found], near["reason"][found] = "clip", "near-duplicate"


def _mark_by_hash(
    near: dict[str, np.ndarray], ids: np.ndarray, pools: np.ndarray, phash: np.ndarray, options: DedupOptions
) -> None:
    for pool, against in AGAINST.items():
        query, reference = np.flatnonzero(pools == pool), np.flatnonzero(np.isin(pools, against))
        if not len(query) or not len(reference):
            continue
        index, bits = hamming_nearest(phash[query], phash[reference])
        near["hamming"][query] = bits
        by_hash, by_clip = bits <= options.max_hamming, near["method"][query] == "clip"
        near["method"][query[by_hash]] = np.where(by_clip[by_hash], "clip+phash", "phash")
        near["reason"][query[by_hash]] = "near-duplicate"
        only = by_hash & ~by_clip
        near["nearest_id"][query[only]] = ids[reference[index[only]]]


def group(matches: pa.Table, captions: np.ndarray, links: Iterable[pa.Table], options: DedupOptions) -> pa.Table:
    """The duplicates table: the matches, and the group of each sample.

    A kept sample's group is the smallest id among the kept that look-alike images or one caption link to it, a dropped
    sample's its own. `captions`, object[n], are in the order of the matches; `links` are what `search.links` found
    among the kept.

    Raises:
        UserError: links of a sample that is not kept.
    """
    kept = is_kept(matches)
    some = matches.filter(pa.array(kept))
    linked = search.Components(len(some))
    search.link_found(linked, some["sample_id"].combine_chunks(), links)
    search.link_hashes(linked, some["phash"].to_numpy(), options.max_hamming)
    linked.link(np.arange(len(some)), _same(captions[kept]))
    names = matches["sample_id"].to_numpy()
    group = names.copy()
    group[kept] = _smallest(names[kept], linked.labels())
    return matches.drop_columns("phash").add_column(2, "group", pa.array(group, pa.string()))


def _same(captions: np.ndarray) -> np.ndarray:
    """The first row with each row's caption, by casefold: int64[n]."""
    first: dict[str, int] = {}
    folded = (caption.casefold() for caption in captions)
    return np.fromiter((first.setdefault(caption, row) for row, caption in enumerate(folded)), np.int64, len(captions))


def _smallest(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The smallest id with each row's label: object[n]."""
    by_id = np.argsort(ids, kind="stable")
    names = np.empty(len(ids), dtype=object)
    names[by_id] = ids[by_id][search.firsts(labels[by_id])]
    return names


def threshold_curve(duplicates: pa.Table) -> pa.Table:
    """What other distance thresholds would drop: threshold, within, dropped, true_duplicates; 0.05 to 1 in steps.

    `within` counts candidates nearer than the threshold, `dropped` those and the ones that the hash finds. Of `within`,
    `true_duplicates` are expected to be copies by the paper's check; null above 0.5, where nothing was checked.
    """
    distance, by_hash = _candidates(duplicates)
    rows = []
    for threshold in np.arange(1, 21) / 20:
        near = distance < threshold
        true = _expected(distance[near]) if threshold <= CHECKED[-1][1] else None
        rows.append((float(threshold), int(near.sum()), int((near | by_hash).sum()), true))
    names = ("threshold", "within", "dropped", "true_duplicates")
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def checked_bins(duplicates: pa.Table) -> pa.Table:
    """Candidates in the bins the authors checked: low, high, share, candidates, true_duplicates (expected)."""
    distance, _ = _candidates(duplicates)
    counts = [int(((distance >= low) & (distance < high)).sum()) for low, high, _ in CHECKED]
    low, high, share = (list(column) for column in zip(*CHECKED, strict=True))
    true = [count * part for count, part in zip(counts, share, strict=True)]
    return pa.table({"low": low, "high": high, "share": share, "candidates": counts, "true_duplicates": true})


def _candidates(duplicates: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Distance, float64[n_candidates], infinite where there is none, and whether the hash finds a member, bool."""
    rows = duplicates.filter(pc.equal(duplicates["pool"], "candidate"))
    by_hash = pc.fill_null(pc.match_substring(rows["method"], "phash"), False)
    return pc.fill_null(rows["distance"], np.inf).to_numpy(), by_hash.to_numpy()


def _expected(distance: np.ndarray) -> float:
    edges = np.array([low for low, _, _ in CHECKED])
    return float(np.array([share for *_, share in CHECKED])[np.searchsorted(edges, distance, side="right") - 1].sum())
