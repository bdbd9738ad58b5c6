"""How far apart members and non-members are in an embedding space, beside what chance alone would show.

Three metrics, each measured for the true labels and for shuffled ones: the Fréchet distance of normal fits, the kernel
distance, and how well a classifier tells the sides apart. Labels are shuffled among groups of equal size, a group's
labels together. What does not depend on the labels is computed once for all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from mia import resampling, rng, tables
from mia.errors import UserError

FOLDS = 5
SHRINKAGE = 0.1  # of the classifier's covariance towards the identity
BLOCK = 2**24  # entries of the Gram matrix held at a time: 128 MB

Interval = tuple[float, float] | tuple[None, None]


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance between normal fits of two sets of vectors, float[n, d] and float[m, d].

    tr (A B)^(1/2) is the sum of the singular values of F' G for any F F' = A and G G' = B, so no root is computed.

    Source: Heusel et al. 2017, eq. 6: |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)).
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    half_a, half_b = _half(a), _half(b)
    cross = np.linalg.svd(half_a @ half_b.T, compute_uv=False).sum()
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    return float(shift + np.square(half_a).sum() + np.square(half_b).sum() - 2 * cross)


def _half(x: np.ndarray) -> np.ndarray:
    """H with H'H the covariance of `x`, and at most as many rows as columns."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.asarray(np.linalg.qr(centred, "r")) if len(centred) > centred.shape[1] else centred


def frechets(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`frechet` of the two sides under each of k labellings, bool[k, n], all with one number of members: float64[k].

    The moments of all rows are computed once; those of the larger side are what the smaller side leaves of them.
    """
    x = x.astype(np.float64)
    x = x - x.mean(0)
    moments = x.T @ x
    smaller = labels if 2 * labels[0].sum() <= len(x) else ~labels
    return np.array([_frechet_to_rest(x[rows], moments, len(x) - int(rows.sum())) for rows in smaller])


def _frechet_to_rest(some: np.ndarray, moments: np.ndarray, others: int) -> float:
    """`frechet` of some rows to the others, where all of them sum to nothing and have these second `moments`."""
    mean, rest_mean = some.mean(0), -some.sum(0) / others
    second = some.T @ some
    rest = (moments - second - others * np.outer(rest_mean, rest_mean)) / (others - 1)
    half = (some - mean) / np.sqrt(len(some) - 1)
    if len(half) > half.shape[1]:
        values, vectors = np.linalg.eigh(half.T @ half)
        half = (vectors * np.sqrt(np.maximum(values, 0))).T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ rest @ half.T), 0)).sum()
    return float(np.square(mean - rest_mean).sum() + np.square(half).sum() + np.trace(rest) - 2 * cross)


def kernel(x: np.ndarray, labels: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, Interval]:
    """Squared kernel distance (MMD) of the sides under each of k labellings, float64[k], and 95 % around the first.

    The unbiased estimate, so below zero as often as not where the sides are alike: the mean over all pairs of rows of
    different groups (near-duplicates are alike by themselves), which the labellings must move whole. Exact; the Gram
    matrix is never whole in memory. The interval adds up two variances: the first-order jackknife's over groups, and
    that under chance, for the second order, which is all there is where the sides are alike. In one dimension,
    where the estimate is most skewed, it holds the truth 87 to 100 times in 100 (`tests/test_distance.py`).

    The kernel is KID's, (x'y / d + 1)^3, for vectors of length sqrt(d); that is (x'y + 1)^3 for unit vectors. By KID's
    own scale x'y / d of a unit vector is below 1 / d, where the cube is straight and sees means only.

    Source: Binkowski et al. 2018, eq. 4 (KID); Gretton et al. 2012, eq. 3; Efron and Stein 1981.
    """
    _, code = np.unique(group, return_inverse=True)
    sums, everything = _gram_sums(x.astype(np.float64), labels.T.astype(np.float64), code)
    mine = np.where(labels.T, sums, 0).sum(0)
    across = np.where(labels.T, 0, sums).sum(0)
    others = everything.sum() - mine - 2 * across
    own, other = _partners(labels[0], code)  # how many each row is paired with
    member = labels[0]
    values = mine / own[member].sum() + others / own[~member].sum() - 2 * across / other[member].sum()
    # How much each row pulls on the first value: each pair's kernel, less its mean over such pairs.
    to_own = np.where(member, sums[:, 0], everything - sums[:, 0])
    to_other = everything - to_own
    pull = np.empty(len(x))
    for side in (member, ~member):
        near = (to_own[side] - to_own[side].sum() / own[side].sum() * own[side]) / own[side].sum()
        far = (to_other[side] - to_other[side].sum() / other[side].sum() * other[side]) / other[side].sum()
        pull[side] = 2 * (near - far)
    by_group = np.bincount(code, pull)
    spread = float(np.sqrt(np.square(by_group).sum() * len(by_group) / (len(by_group) - 1)))
    reach = 1.96 * float(np.hypot(spread, _chance(values)))
    return values, (float(values[0]) - reach, float(values[0]) + reach)


def _chance(values: np.ndarray) -> float:
    """Standard deviation under the shuffled labels, which come after the true ones; 0 without any."""
    return float(np.std(values[1:])) if len(values) > 1 else 0.0


def _gram_sums(x: np.ndarray, weights: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """K @ weights, float64[n, k], and the row sums of K, float64[n], for the Gram matrix K, zero within groups."""
    sums, everything = np.empty_like(weights), np.empty(len(x))
    step = max(1, BLOCK // len(x))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        similar = x[rows] @ x.T + 1
        gram = similar * similar
        gram *= similar
        gram[code[rows, None] == code] = 0
        sums[rows], everything[rows] = gram @ weights, gram.sum(1)
    return sums, everything


def _partners(member: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row the number of rows outside its group on its own side and on the other: int64[n] each."""
    held = [side.sum() - np.bincount(code, side, code.max() + 1)[code] for side in (member, ~member)]
    return np.where(member, *held), np.where(member, *held[::-1])


def c2st(
    x: np.ndarray, labels: np.ndarray, group: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, Interval]:
    """AUC of a cross-fitted classifier under each of k labellings, float64[k], and 95 % around the first.

    The classifier is linear: least squares on standardised columns, a ridge shrinking their covariance. It is fitted
    anew to each labelling, in folds that keep groups whole and know no label. (Logistic regression told our example's
    sides apart no better, but fitting it to 200 labellings takes minutes; and with its scores held fixed, as DeLong's
    variance does, 9 of 100 p-values are below 0.05 where nothing is to be told apart.) The interval is DeLong's, or
    as wide as chance where that is wider.

    Source: Lopez-Paz and Oquab 2017, with AUC for accuracy; DeLong et al. 1988.
    """
    scale = x.std(0, dtype=np.float64)
    x = (x - x.mean(0, dtype=np.float64)) / np.where(scale > 0, scale, 1)
    targets = labels.T.astype(np.float64)
    scores = np.empty(targets.shape)
    for test in _folds(group, generator):
        scores[test] = _fitted(x[~test], targets[~test], x[test])
    values = _aucs(scores, labels.T)
    _, variance = resampling.delong(scores[:, :1], labels[0], group)
    reach = 1.96 * max(float(np.sqrt(max(variance[0, 0], 0))), _chance(values))
    return values, (max(float(values[0]) - reach, 0.0), min(float(values[0]) + reach, 1.0))


def _folds(group: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """Masks of the test rows, bool[n] each: whole groups, shuffled and dealt out in turn."""
    names, code = np.unique(group, return_inverse=True)
    folds = min(FOLDS, len(names))
    dealt = generator.permutation(len(names)) % folds
    return [dealt[code] == fold for fold in range(folds)]


def _fitted(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Scores of the test rows, float64[n_test, k], by one ridge regression for each column of targets.

    No intercept is added: it would be the share of members in training, which is low where many are tested.
    """
    centre = train.mean(0)
    train = train - centre
    shrunk = train.T @ train + SHRINKAGE * len(train) * np.eye(train.shape[1])
    return (test - centre) @ np.linalg.solve(shrunk, train.T @ targets)


def _aucs(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The exact AUC of each column of scores by its own column of labels: float64[k]."""
    from scipy.stats import rankdata

    n, m = int(labels[:, 0].sum()), int((~labels[:, 0]).sum())
    return (np.where(labels, rankdata(scores, axis=0), 0).sum(0) - n * (n + 1) / 2) / (n * m)


def measured(
    x: np.ndarray, member: np.ndarray, group: np.ndarray, generator: np.random.Generator, permutations: int
) -> dict[str, tuple[np.ndarray, Interval]]:
    """For each metric its values, float64[1 + permutations], by the true labels and by shuffled ones, and the interval.

    Args:
        x: float[n, d], finite.
        group: [n]; rows of one group are shuffled together and never stand on both sides of a fit.
    """
    shuffled = resampling.shuffled(member, group, permutations, generator)
    labels = np.concatenate([member[None], *shuffled])
    return {
        "frechet": (frechets(x, labels), (None, None)),
        "kernel": kernel(x, labels, group),
        "c2st": c2st(x, labels, group, generator),
    }


def sampled(member: np.ndarray, group: np.ndarray, max_rows: int, seed: int) -> np.ndarray:
    """Whole groups at random, of at most `max_rows` rows together, 0 for all: sorted row numbers, int64[k].

    The kernel distance looks at every pair. Of groups of members, of non-members and of both the same share of rows is
    taken. Which groups these are depends on their names alone, on no order of rows.
    """
    if not max_rows or len(group) <= max_rows:
        return np.arange(len(group))
    _, code, sizes = np.unique(group, return_inverse=True, return_counts=True)
    members = np.bincount(code, member)
    kind = 1 * (members > 0) + (members == sizes)  # none, some or all of a group are members
    order = rng.stream(seed, "groups", purpose="distance.sample").permutation(len(sizes))
    left = np.bincount(kind, sizes) * max_rows // len(group)  # rows still to take
    taken = np.zeros(len(sizes), bool)
    for i, which, size in zip(order, kind[order], sizes[order], strict=True):
        if size <= left[which]:  # one that is too large is passed over
            taken[i] = True
            left[which] -= size
    return np.flatnonzero(taken[code])


def distances(
    spaces: dict[str, np.ndarray], member: np.ndarray, seed: int, permutations: int = 200,
    group: np.ndarray | None = None,
) -> pa.Table:  # fmt: skip
    """The distance table: in each space each metric of members to non-members, and its level under chance.

    `ci_low`, `ci_high` of `*_chance` are the central 95 % of the metric over `permutations` shuffled labels: a value
    inside it tells nothing from nothing. `p_value` is the share of labellings, the true one among them, that put the
    sides at least as far apart. Without `group` each sample stands alone.

    Raises:
        UserError: fewer than two samples on a side, or all of them in one group.
    """
    n, m = int(member.sum()), int((~member).sum())
    if min(n, m) < 2:
        raise UserError(f"{n} members and {m} non-members", "dataset", "a covariance needs two of each at least")
    group = np.arange(len(member)) if group is None else group
    if min(len(np.unique(group[side])) for side in (member, ~member)) < 2:
        raise UserError("all of one side are one group", "dataset", "near-duplicates tell nothing apart: bring more")
    rows: list[dict[str, Any]] = []
    for space, x in spaces.items():
        generator = rng.stream(seed, space, purpose="distance")
        for metric, (values, (low, high)) in measured(x, member, group, generator, permutations).items():
            about = {"space": space, "n_members": n, "n_nonmembers": m}
            p_value = float(resampling.p_values(values[:1], values[1:, None])[0][0])
            found = {"metric": metric, "value": values[0], "ci_low": low, "ci_high": high, "p_value": p_value}
            rows.append(about | found)
            least, middle, most = np.quantile(values[1:], [0.025, 0.5, 0.975])
            rows.append(about | {"metric": f"{metric}_chance", "value": middle, "ci_low": least, "ci_high": most})
    # Columns that the schema lacks fall out here.
    return pa.Table.from_pylist(rows, schema=tables.SCHEMAS["distance"])
