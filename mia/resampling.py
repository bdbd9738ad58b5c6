"""How sure a metric is: bootstrap over groups, permutation of labels, the paper's subsamples, DeLong's covariance.

Each function takes all columns of scores at once, `scores` float64[n, k], high = member, so that every column meets the
same resamples (differences between attacks are then paired) and each column is sorted once, never per resample.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mia.metrics import allowed

CHUNK = 128  # resamples counted at a time, so that they stay in cache


def bootstrap(
    scores: np.ndarray, member: np.ndarray, group: np.ndarray, targets: tuple[float, ...], resamples: int,
    generator: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """AUC and the TPR at each target in every resample: float64[resamples, k, 1 + len(targets)].

    The Bayesian bootstrap (Rubin 1981) over groups: each group gets an exponential weight, the same for all its samples
    and for every column. The false-positive rates at m sorted non-members are then distributed as those of order
    statistics, m + 1 gaps sharing the whole; between two non-members the TPR is interpolated. The common, multinomial
    bootstrap cannot place the threshold above the highest non-member, and its intervals for the TPR at 1 % of 200
    non-members hold the truth less often the better the attack (97 down to 92 times in 100 where these hold it 93 to 97
    times: `benchmarks/coverage.py`).
    """
    columns = [_Column(scores[:, c], member) for c in range(scores.shape[1])]
    _, code = np.unique(group, return_inverse=True)
    out = np.empty((resamples, scores.shape[1], 1 + len(targets)))
    for start in range(0, resamples, CHUNK):
        rows = min(CHUNK, resamples - start)
        drawn = generator.standard_exponential((rows, code.max() + 2))
        weights, beyond = drawn[:, :-1][:, code], drawn[:, -1]
        for place, column in enumerate(columns):
            out[start : start + rows, place] = column.measured(weights, beyond, targets)
    return out


class _Column:
    """One column of scores, sorted: which members stand above each non-member."""

    def __init__(self, score: np.ndarray, member: np.ndarray) -> None:
        order = np.argsort(-score, kind="stable")
        self.mine, self.others = order[member[order]], order[~member[order]]
        ascending = score[self.mine[::-1]]
        n = len(self.mine)
        # Members above, and at or above, each non-member, from the highest non-member to the lowest.
        self.above = n - np.searchsorted(ascending, score[self.others], "right")
        self.reached = n - np.searchsorted(ascending, score[self.others], "left")
        self.gaps = np.concatenate([[0], self.above, [n]])  # members above the upper end of each gap

    def measured(self, weights: np.ndarray, beyond: np.ndarray, targets: tuple[float, ...]) -> np.ndarray:
        hits = np.zeros((len(weights), len(self.mine) + 1))
        np.cumsum(weights[:, self.mine], axis=1, out=hits[:, 1:])
        alarms = weights[:, self.others]
        total = alarms.sum(1)
        wins = np.einsum("ij,ij->i", hits[:, self.above] + hits[:, self.reached], alarms) / 2
        out = np.empty((len(weights), 1 + len(targets)))
        out[:, 0] = wins / (hits[:, -1] * total)
        for place, target in enumerate(targets, 1):
            out[:, place] = self._tpr(hits, alarms, total + beyond, target)
        return out

    def _tpr(self, hits: np.ndarray, alarms: np.ndarray, total: np.ndarray, target: float) -> np.ndarray:
        m, rows, wide = alarms.shape[1], np.arange(len(hits)), 0
        while True:  # few non-members are needed: widen until the target lies within them, or all are in
            wide = min(m, max(2 * wide, int(2 * target * m) + 16))
            rates = np.zeros((len(hits), wide + 2))
            np.cumsum(alarms[:, :wide], axis=1, out=rates[:, 1:-1])
            rates /= total[:, None]
            rates[:, -1] = 1.0 if wide == m else np.inf
            gap = (rates[:, :-1] <= target).sum(1) - 1
            if wide == m or gap.max() < wide:
                break
        low, high = rates[rows, gap], rates[rows, gap + 1]
        before, after = hits[rows, self.gaps[gap]], hits[rows, self.gaps[gap + 1]]
        return (before + (target - low) / (high - low) * (after - before)) / hits[:, -1]


def permutation(
    scores: np.ndarray, member: np.ndarray, group: np.ndarray, targets: tuple[float, ...], permutations: int,
    generator: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """AUC and the TPR at each target under shuffled labels: float64[permutations, k, 1 + len(targets)].

    Labels are shuffled among groups of equal size, all of a group's labels together. AUC comes from rank sums, one
    matrix product for all columns; the TPR from the top of each sorted column, down to the first false positive too
    many.
    """
    from scipy.stats import rankdata

    n, m = int(member.sum()), int((~member).sum())
    ranks = rankdata(scores, axis=0)
    orders = np.argsort(-scores, axis=0, kind="stable")
    starts = [_tie_starts(scores[orders[:, c], c]) for c in range(scores.shape[1])]
    out = np.empty((permutations, scores.shape[1], 1 + len(targets)))
    done = 0
    for labels in shuffled(member, group, permutations, generator):
        rows = slice(done, done + len(labels))
        out[rows, :, 0] = (labels.astype(np.float64) @ ranks - n * (n + 1) / 2) / (n * m)
        for c, start in enumerate(starts):
            for place, target in enumerate(targets, 1):
                out[rows, c, place] = _top_hits(labels, orders[:, c], start, int(allowed(target, m)), m) / n
        done += len(labels)
    return out


def _tie_starts(ordered: np.ndarray) -> np.ndarray:
    """For each position of a sorted column, the first position of its run of equal values."""
    new = np.append(True, ordered[1:] != ordered[:-1])
    return np.maximum.accumulate(np.where(new, np.arange(len(ordered)), 0))


def shuffled(member: np.ndarray, group: np.ndarray, count: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Chunks of shuffled labels, bool[rows, n], `count` rows in all."""
    _, code, sizes = np.unique(group, return_inverse=True, return_counts=True)
    by_group = np.argsort(code, kind="stable")
    strata = [by_group[np.isin(code[by_group], np.flatnonzero(sizes == s))].reshape(-1, s) for s in np.unique(sizes)]
    for start in range(0, count, CHUNK):
        labels = np.empty((min(CHUNK, count - start), len(member)), dtype=bool)
        for rows in strata:  # rows[i] are the samples of the i-th group of this size
            order = generator.permuted(np.tile(np.arange(len(rows)), (len(labels), 1)), axis=1)
            labels[:, rows.ravel()] = member[rows][order].reshape(len(labels), -1)
        yield labels


def _top_hits(labels: np.ndarray, order: np.ndarray, start: np.ndarray, most: int, m: int) -> np.ndarray:
    """Members above the first false positive too many, and above all that tie with it, in each row of labels."""
    if most >= m:
        return np.full(len(labels), len(order) - m)
    wide = 0
    while True:
        wide = min(len(order), max(2 * wide, 3 * most + 64))
        alarms = np.cumsum(~labels[:, order[:wide]], axis=1, dtype=np.int32)
        if wide == len(order) or alarms[:, -1].min() > most:
            break
    first = start[(alarms <= most).sum(1)]
    passed = np.where(first > 0, alarms[np.arange(len(labels)), np.maximum(first - 1, 0)], 0)
    return first - passed


def p_values(observed: np.ndarray, permuted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One-sided p-value of each column alone, and adjusted for having looked at all of them: float64[k] each.

    The second compares with the best of all columns in each permutation (max statistic; Westfall and Young 1993). For
    the best column it is the p-value of the best-of-many.

    Args:
        observed: float64[k].
        permuted: float64[permutations, k].
    """
    above = observed - 1e-12  # what is equal but for rounding counts as equal
    count = len(permuted) + 1
    alone = (1 + (permuted >= above).sum(0)) / count
    adjusted = (1 + (permuted.max(1)[:, None] >= above).sum(0)) / count
    return alone, adjusted


def subsampled(
    scores: np.ndarray, member: np.ndarray, targets: tuple[float, ...], resamples: int, size: int, seed: int
) -> np.ndarray:
    """TPR at each target in the paper's subsamples: float64[resamples, k, len(targets)].

    Each subsample holds `size` members and then `size` non-members, drawn without replacement by numpy's legacy
    generator. Bit-equal to scikit-learn's `roc_curve` read at its last point within the target.
    Source: `attacks/analysis.py` of arXiv 2306.12983 (seed 123, 100 times 1000 + 1000).
    """
    drawn = np.random.RandomState(seed)
    sides = np.flatnonzero(member), np.flatnonzero(~member)
    chosen = [np.zeros((len(side), resamples), dtype=bool) for side in sides]
    for r in range(resamples):
        for side, picks in zip(sides, chosen, strict=True):
            picks[drawn.choice(len(side), size, replace=False), r] = True
    out = np.empty((resamples, scores.shape[1], len(targets)))
    for c in range(scores.shape[1]):
        mine, others = (scores[side, c] for side in sides)
        for place, target in enumerate(targets):
            bar = _bars(others, chosen[1], int(allowed(target, size)), size)
            out[:, c, place] = _hits_above(mine, chosen[0], bar) / size
    return out


def _bars(others: np.ndarray, picks: np.ndarray, most: int, size: int) -> np.ndarray:
    """In each subsample the score of the first false positive too many; members must score above it."""
    if most >= size:
        return np.full(picks.shape[1], -np.inf)
    wide = 0
    while True:  # the bar lies near the top: look at few, and at more only when they do not suffice
        wide = min(len(others), max(2 * wide, 2 * (most + 1) * len(others) // size + 64))
        top = np.argpartition(-others, wide - 1)[:wide]
        top = top[np.argsort(-others[top])]
        alarms = np.cumsum(picks[top], axis=0, dtype=np.int32)
        if alarms[-1].min() > most:
            return others[top][(alarms <= most).sum(0)]


def _hits_above(mine: np.ndarray, picks: np.ndarray, bar: np.ndarray) -> np.ndarray:
    """How many of each subsample's members score above its bar."""
    high = np.flatnonzero(mine > bar.min())
    high = high[np.argsort(-mine[high])]
    hits = np.zeros((len(high) + 1, len(bar)), dtype=np.int32)
    np.cumsum(picks[high], axis=0, out=hits[1:])
    return hits[np.searchsorted(-mine[high], -bar, "left"), np.arange(len(bar))]


def delong(scores: np.ndarray, member: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact AUCs, float64[k], and their covariance over samples, float64[k, k].

    DeLong, DeLong and Clarke-Pearson 1988, from ranks (Sun and Xu 2014); samples of one group are summed before they
    are squared (Obuchowski 1997), which changes nothing where each stands alone.
    """
    from scipy.stats import rankdata

    n, m = int(member.sum()), int((~member).sum())
    ranks = rankdata(scores, axis=0)
    above = (ranks[member] - rankdata(scores[member], axis=0)) / m  # share of non-members below each member
    below = 1 - (ranks[~member] - rankdata(scores[~member], axis=0)) / n
    auc = above.mean(0)
    _, code = np.unique(group, return_inverse=True)
    sums = np.zeros((2, code.max() + 1, scores.shape[1]))
    np.add.at(sums[0], code[member], (above - auc) / n)
    np.add.at(sums[1], code[~member], (below - auc) / m)
    held = [np.unique(code[side]).size for side in (member, ~member)]
    few = [count / max(count - 1, 1) for count in (*held, code.max() + 1)]
    cross = sums[0].T @ sums[1]
    return auc, few[0] * sums[0].T @ sums[0] + few[1] * sums[1].T @ sums[1] + few[2] * (cross + cross.T)


def paired_auc(one: np.ndarray, other: np.ndarray, member: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """How much higher the AUC of `one` is than that of `other` on the same samples, and the one-sided p-value."""
    from scipy.stats import norm

    auc, covariance = delong(np.stack([one, other], axis=1), member, group)
    difference = float(auc[0] - auc[1])
    spread = float(np.sqrt(max(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1], 0)))
    if spread < 1e-12:  # the two order every pair alike, or both are without doubt: a sign test of disjoint pairs
        pairs = min(len(np.unique(group[side])) for side in (member, ~member))
        return difference, 1.0 if difference <= 0 else 0.5**pairs
    return difference, float(norm.sf(difference / spread))


def holm(p: np.ndarray) -> np.ndarray:
    """p-values float64[k] adjusted for being k: that one true hypothesis is rejected has at most the level's chance.

    The smallest counts k times, the next k - 1 times, and none less than those before it; holds however they depend on
    each other (Holm 1979).
    """
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def paired(one: np.ndarray, other: np.ndarray) -> float:
    """One-sided p-value of a metric being higher for `one`, from the same bootstrap resamples, float64[resamples]."""
    return float((1 + (one <= other).sum()) / (len(one) + 1))
