"""Exact metrics of a score, high = member, and their bootstrap over groups. Used by audit and evaluation."""

from __future__ import annotations

import dataclasses

import numpy as np

CHUNK = 128  # resamples counted at a time


@dataclasses.dataclass(frozen=True)
class Operating:
    """A point of the ROC curve: true and realised false-positive rate, and the score from which on `member` is said."""

    tpr: float
    fpr: float
    threshold: float


def auc(score: np.ndarray, member: np.ndarray) -> float:
    """Probability that a member scores above a non-member, ties counting half. Exact, from ranks."""
    from scipy.stats import rankdata

    n, m = int(member.sum()), int((~member).sum())
    return float((rankdata(score)[member].sum() - n * (n + 1) / 2) / (n * m))


def tpr_at_fpr(score: np.ndarray, member: np.ndarray, target: float) -> Operating:
    """The largest true-positive rate whose empirical false-positive rate is at most `target`; ties go together.

    With n non-members that allows floor(target * n) false positives. When even the highest score would allow more,
    nobody is called a member and the threshold is infinite.
    """
    tpr, fpr, threshold = roc(score, member)
    m = (~member).sum()
    last = np.flatnonzero(fpr * m < allowed(target, m) + 0.5)[-1]
    return Operating(float(tpr[last]), float(fpr[last]), float(threshold[last]))


def allowed(target: float, nonmembers: np.ndarray | int) -> np.ndarray:
    """How many false positives a target allows: floor(target * nonmembers), where 0.29 * 100 is 29."""
    return np.floor(target * np.asarray(nonmembers) + 1e-9)


def roc(score: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every attainable (tpr, fpr, threshold), from nobody (0, 0, inf) to everybody (1, 1, lowest score)."""
    order = np.argsort(-score, kind="stable")
    ends = tie_ends(score[order])
    hits = np.cumsum(member[order])[ends]
    alarms = np.cumsum(~member[order])[ends]
    return (
        np.concatenate([[0.0], hits / hits[-1]]),
        np.concatenate([[0.0], alarms / alarms[-1]]),
        np.concatenate([[np.inf], score[order][ends]]),
    )


def tie_ends(ordered: np.ndarray) -> np.ndarray:
    """Positions of the last of each run of equal values."""
    return np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))


def group_weights(group: np.ndarray, member: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each sample stands in each bootstrap resample: int16[resamples, n].

    Groups are drawn with replacement, all of a group's samples together; groups of members, of non-members and of both
    are drawn apart, so that no resample lacks a side.
    """
    _, code = np.unique(group, return_inverse=True)
    holds = np.zeros((2, code.max() + 1), dtype=np.int8)
    holds[member.astype(int), code] = 1
    kinds = 2 * holds[0] + holds[1]
    weights = np.zeros((resamples, code.max() + 1), dtype=np.int16)
    for kind in (1, 2, 3):
        mine = np.flatnonzero(kinds == kind)
        if len(mine):
            weights[:, mine] = generator.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), size=resamples)
    return weights[:, code]


def resampled(score: np.ndarray, member: np.ndarray, weights: np.ndarray, targets: tuple[float, ...]) -> np.ndarray:
    """AUC and the TPR at each target in every resample: float64[resamples, 1 + len(targets)].

    The score is sorted once; resamples are then counted in whole numbers, some at a time so that they stay in cache.
    """
    order = np.argsort(-score, kind="stable")
    mine, others = order[member[order]], order[~member[order]]
    # How many members stand above, and at or above, each non-member.
    above, reached = (len(mine) - np.searchsorted(score[mine[::-1]], score[others], side) for side in ("right", "left"))
    ahead = np.append(above, len(mine))
    out = np.empty((len(weights), 1 + len(targets)))
    for rows in range(0, len(weights), CHUNK):
        some = weights[rows : rows + CHUNK]
        hits = np.zeros((len(some), len(mine) + 1), dtype=np.int32)
        np.cumsum(some[:, mine], axis=1, out=hits[:, 1:])
        alarms = np.cumsum(some[:, others], axis=1, dtype=np.int32)
        n, m = hits[:, -1].astype(np.float64), alarms[:, -1].astype(np.float64)
        wins = (hits[:, above].astype(np.float64) + hits[:, reached]) / 2
        out[rows : rows + CHUNK, 0] = np.einsum("ij,ij->i", wins, some[:, others].astype(np.float64)) / (n * m)
        for column, target in enumerate(targets, 1):
            # The first non-member too many and all that do not score above it are left out.
            first = (alarms <= allowed(target, m)[:, None]).sum(1)
            out[rows : rows + CHUNK, column] = hits[np.arange(len(some)), ahead[first]] / n
    return out


def interval(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The central `confidence` part of bootstrap `values`, float64[resamples, k]: two arrays of k."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return low, high


def measured(
    score: np.ndarray, member: np.ndarray, weights: np.ndarray, targets: tuple[float, ...], confidence: float
) -> list[dict]:
    """Rows of a metrics table, without names: exact AUC, and TPR at each FPR target, with intervals.

    Intervals are the bootstrap's; for a TPR, at least as wide as the exact binomial one of its hits, since a bootstrap
    of no hit at all knows no doubt. A target that allows not even one false positive gets no value but a note why.
    """
    from scipy.stats import binomtest

    n, m = int(member.sum()), int((~member).sum())
    low, high = interval(resampled(score, member, weights, targets), confidence)
    rows = [{"metric": "auc", "value": auc(score, member), "ci_low": low[0], "ci_high": high[0], "note": ""}]
    for target, lower, upper in zip(targets, low[1:], high[1:], strict=True):
        if allowed(target, m) < 1:
            needed = int(np.ceil(1 / target - 1e-9))
            note = f"{m} non-members allow no false positive at {target:g}; {needed} are needed"
            rows.append({"metric": "tpr", "fpr_target": target, "note": note})
            continue
        at = tpr_at_fpr(score, member, target)
        exact = binomtest(round(at.tpr * n), n).proportion_ci(confidence)
        rows.append({
            "metric": "tpr", "fpr_target": target, "value": at.tpr,
            "ci_low": min(lower, exact.low), "ci_high": max(upper, exact.high),
            "fpr_realized": at.fpr, "threshold": at.threshold if np.isfinite(at.threshold) else None, "note": "",
        })  # fmt: skip
    return [row | {"n_members": n, "n_nonmembers": m} for row in rows]
