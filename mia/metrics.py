"""Exact metrics of a score, high = member; a sample is called a member when it scores at or above the threshold."""

from __future__ import annotations

import dataclasses

import numpy as np


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


def balanced_accuracy(score: np.ndarray, member: np.ndarray, threshold: float) -> float:
    """Mean of the true-positive and the true-negative rate at a threshold."""
    called = score >= threshold
    return float((called[member].mean() + (~called[~member]).mean()) / 2)


def best_threshold(score: np.ndarray, member: np.ndarray) -> float:
    """The highest of the thresholds at which balanced accuracy is largest; infinite when none beats calling nobody."""
    tpr, fpr, threshold = roc(score, member)
    return float(threshold[np.argmax(np.round(tpr - fpr, 12))])


def log_roc(score: np.ndarray, member: np.ndarray, per_decade: int = 20) -> list[tuple[float, Operating]]:
    """Points of the ROC curve at false-positive rates evenly spaced on a logarithmic axis.

    From the rate of one false positive to 1: pairs of the rate asked for and `tpr_at_fpr` there.
    """
    decades = np.log10((~member).sum())
    rates = np.logspace(-decades, 0, 1 + int(np.ceil(per_decade * decades)))
    return [(float(rate), tpr_at_fpr(score, member, rate)) for rate in rates]


def interval(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The central `confidence` part of bootstrap `values`, float64[resamples, k]: two arrays of k."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return low, high


def exact_interval(hits: int, n: int, confidence: float) -> tuple[float, float]:
    """Exact binomial interval of a share (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest

    found = binomtest(hits, n).proportion_ci(confidence)
    return float(found.low), float(found.high)
