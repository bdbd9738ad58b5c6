"""Set-level inference: was this *set* of images in the training data? One test of many weak scores at once.

The suspects are held against known non-members of the same distribution, and the test is one-sided: suspects that score
lower are no evidence. It only asks whether the two sets differ, and a shift between them differs too. So a verdict
needs a `Guard`: what blind baselines, which see no model, found between the same two sets.

Near-duplicates share a group, and a group is one unit of evidence: every step works on the means of groups. The
permutation test is exact where groups are exchangeable, their sizes included; sides de-duplicated in one way are.

Source: CDI (arXiv 2411.12858) for the fitted combination and Welch's test; there two-sided and without a guard. There,
too, the p-values of many resamples are averaged; here one test is made of all suspects.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mia import rng
from mia.config import InferOptions
from mia.errors import UserError

METHODS = ("permutation", "welch")
MIN_GROUPS = 10  # on a side
MIN_KNOWN = 50  # groups
GUARD_LEVEL = 0.05  # of the guard, at least: a stricter test of the suspects must not make it laxer
SAME = 1e-12  # relative spread below which values differ by rounding only
BATCH_VALUES = 2**20  # permuted at a time


@dataclasses.dataclass(frozen=True)
class Known:
    """Labelled others, disjoint from suspects and reference, to fit the combination on.

    `x` float64[n, k], with the columns of the suspects; `member` bool[n]; `group` str[n].
    """

    x: np.ndarray
    member: np.ndarray
    group: np.ndarray


@dataclasses.dataclass(frozen=True)
class Guard:
    """What the blind audit between suspects and reference found.

    `attack` is the baseline that leaks most; `p_value` is one-sided, adjusted for the number of baselines looked at.
    """

    attack: str
    auc: float
    p_value: float


def infer(
    suspects: np.ndarray,
    reference: np.ndarray,
    suspect_group: np.ndarray,
    reference_group: np.ndarray,
    known: Known | None,
    guard: Guard | None,
    options: InferOptions,
    seed: int,
) -> dict[str, Any]:
    """The verdict on the suspects and all it rests on, in plain types that JSON can hold.

    `verdict` is `refused` where the guard found a shift (at 5 %, or at the own level of the test if higher), or where
    there is none and options want one; `member set` where p <= level; else `no evidence`. `reason` says why in one
    sentence. `statistic` is Cohen's d: the difference of the means of groups in pooled standard deviations.
    `columns_used` are column numbers, from 0. `p_value` and `power` stand in every case; see `power_curve` for what the
    latter means.

    Args:
        suspects: float64[q, k], each column a score, high = member.
        reference: float64[m, k], the same scores of known non-members of the same distribution.
        suspect_group: str[q], the near-duplicate group of each suspect.
        reference_group: str[m].

    Raises:
        UserError: options out of range; sides or known samples that are too few, differ in columns, share a group or
            hold NaN or infinity; known samples of one class; scores that do not vary.
    """
    _check_options(options)
    _check_samples(suspects, reference, suspect_group, reference_group, known)
    sides = by_group(suspects, suspect_group), by_group(reference, reference_group)
    columns = _varying(sides, known)
    a, b = combined(sides[0][:, columns], sides[1][:, columns], _only(known, columns))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("scores are too large to be averaged", "suspects and reference", "divide them by a constant")
    if max(np.ptp(a), np.ptp(b)) <= SAME:
        fix = "give scores that differ between samples, not a label of the side"
        raise UserError("the combined score is constant within each side", "suspects and reference", fix)
    p = p_value(a, b, options.method, options.permutations, rng.stream(seed, "permutation", purpose="infer"))
    d = cohens_d(a, b)
    verdict, reason = _verdict(p, d, guard, options)
    power = power_curve(a, b, options, seed)
    dropped = sorted(set(range(suspects.shape[1])) - set(columns.tolist()))
    return {
        "verdict": verdict,
        "reason": reason,
        "p_value": p,
        "statistic": d,
        "method": options.method,
        "level": float(options.level),
        "n_suspects": len(suspects),
        "n_reference": len(reference),
        "groups_suspects": len(a),
        "groups_reference": len(b),
        "combination": _combination(len(columns), known),
        "columns_used": columns.tolist(),
        "notes": [f"constant columns were dropped: {dropped}"] if dropped else [],
        "guard": {"attack": guard.attack, "auc": float(guard.auc), "p_value": float(guard.p_value)} if guard else None,
        "power": power,
        "size_for_80_percent": next((row["size"] for row in power if row["power"] >= 0.8), None),
    }


def by_group(x: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The mean of each group's rows, float64[n_groups, k], groups in order of their names."""
    _, code, size = np.unique(group, return_inverse=True, return_counts=True)
    sums = [np.bincount(code, weights=column) for column in x.T]
    return np.stack(sums, axis=1) / size[:, None]


def combined(suspects: np.ndarray, reference: np.ndarray, known: Known | None) -> tuple[np.ndarray, np.ndarray]:
    """One number for each suspect group and each reference group: float64[q], float64[m], high = member.

    Without `known`, the mean of the columns, each standardised by mean and standard deviation of both sides together:
    no label goes in, so that a permutation test stays exact. Columns weigh the same however they correlate: the test
    is as valid, but ten near-copies of one score drown out an eleventh that says something else. With `known`, the
    log-odds of a logistic regression of standardised columns, which weighs them by what they are worth together.
    """
    if known is None:
        pooled = np.concatenate([suspects, reference])
        mean, deviation = pooled.mean(0), pooled.std(0)
        return ((suspects - mean) / deviation).mean(1), ((reference - mean) / deviation).mean(1)
    model = _fitted(known)
    return model.decision_function(suspects), model.decision_function(reference)


def _fitted(known: Known) -> Any:
    """CDI's classifier (arXiv 2411.12858) on the means of known groups, members and non-members of a group apart."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sides = [by_group(known.x[side], known.group[side]) for side in (known.member, ~known.member)]
    truth = np.repeat([True, False], [len(side) for side in sides])
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(np.concatenate(sides), truth)


def p_value(
    suspects: np.ndarray, reference: np.ndarray, method: str, permutations: int, generator: np.random.Generator
) -> float:
    """One-sided p of the difference of means, of float64[q] and float64[m]: small when suspects score higher.

    `permutation` gives (1 + how many permuted differences reach the observed one) / (permutations + 1), ties counted,
    which is exactly valid (Phipson & Smyth 2010); where `permutations` would do for every split, each is tried once
    and p is exact. `welch` is Welch's t test, approximate, and without a random part.
    """
    if method == "welch":
        return float(_welch(suspects, reference))
    from scipy.stats import permutation_test

    result = permutation_test(
        (suspects, reference),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        vectorized=True,
        n_resamples=permutations,
        batch=max(1, BATCH_VALUES // (len(suspects) + len(reference))),
        alternative="greater",
        rng=generator,
    )
    return float(result.pvalue)


def _welch(suspects: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """One-sided p of Welch's t test, float64[...], of each set in float64[..., q] against float64[m]."""
    from scipy.stats import ttest_ind_from_stats

    moments = [part for x in (suspects, reference) for part in (x.mean(-1), x.std(-1, ddof=1), x.shape[-1])]
    return ttest_ind_from_stats(*moments, equal_var=False, alternative="greater").pvalue


def cohens_d(a: np.ndarray, b: np.ndarray) -> float:
    """Difference of the means of float64[q] and float64[m] in standard deviations, pooled within the two."""
    squares = np.square(a - a.mean()).sum() + np.square(b - b.mean()).sum()
    return float((a.mean() - b.mean()) / np.sqrt(squares / (len(a) + len(b) - 2)))


def power_curve(suspects: np.ndarray, reference: np.ndarray, options: InferOptions, seed: int) -> list[dict[str, Any]]:
    """How often fewer suspects would have done: rows of `size` (in groups), `power`, `low`, `high` and `draws`.

    `power` is the share of `draws` random subsets, without replacement, that Welch's test (for its speed, whatever
    `options.method` says) finds at `options.level` against the whole reference; `low` and `high` are exact 95 % bounds
    of that share. It speaks of these suspects and this reference: large subsets resemble each other, so that they
    vary less than fresh suspects would and a power above a half is flattered; at the full size, always the last
    row, there is one subset only, and `power` says no more than the test does. Sizes above it are left out.
    """
    from scipy.stats import binomtest

    rows = []
    for size in sorted({s for s in options.power_sizes if s < len(suspects)} | {len(suspects)}):
        draws = 1 if size == len(suspects) else options.power_draws
        generator = rng.stream(seed, "power", draw=size, purpose="infer")
        subsets = generator.permuted(np.tile(suspects, (draws, 1)), axis=1)[:, :size]
        found = binomtest(int((_welch(subsets, reference) <= options.level).sum()), draws)
        bounds = found.proportion_ci(0.95)
        power = float(found.statistic)
        rows.append(
            {"size": size, "power": power, "low": float(bounds.low), "high": float(bounds.high), "draws": draws}
        )
    return rows


def _verdict(p: float, d: float, guard: Guard | None, options: InferOptions) -> tuple[str, str]:
    if guard is not None and guard.p_value <= max(options.level, GUARD_LEVEL):
        found = f"AUC {guard.auc:.3f}, p = {guard.p_value:.2g}"
        leak = f"The baseline {guard.attack} tells suspects from reference without any model ({found})"
        return "refused", f"{leak}: a shift between them explains a difference of scores."
    if guard is None and options.guard:
        lack = "No caption, URL or image column was there to look for a shift between suspects and reference"
        return "refused", f"{lack}: bring them, or switch the guard off."
    side = "above" if d > 0 else "below"
    seen = f"The suspects score {abs(d):.2g} standard deviations {side} the reference (one-sided p = {p:.2g})"
    alone = "" if guard else "; no guard looked for a shift between the two"
    if p <= options.level:
        return "member set", f"{seen}, more than chance allows at level {options.level:g}{alone}."
    return "no evidence", f"{seen}, which chance explains at level {options.level:g}{alone}."


def _combination(columns: int, known: Known | None) -> str:
    if known is not None:
        return f"logistic regression on {_known_groups(known)} known"
    return "single score" if columns == 1 else "mean of standardised scores"


def _known_groups(known: Known) -> int:
    return sum(len(np.unique(known.group[side])) for side in (known.member, ~known.member))


def _only(known: Known | None, columns: np.ndarray) -> Known | None:
    return None if known is None else dataclasses.replace(known, x=known.x[:, columns])


def _varying(sides: tuple[np.ndarray, np.ndarray], known: Known | None) -> np.ndarray:
    """Numbers of the columns that vary among the groups and, if any, among the known ones."""
    varies = np.ones(sides[0].shape[1], dtype=bool)
    for x in (np.concatenate(sides), *([] if known is None else [known.x])):
        varies &= np.ptp(x, axis=0) > SAME * np.abs(x).max(0)
    if not varies.any():
        raise UserError("every column of scores is constant", "suspects and reference", "give scores that vary")
    return np.flatnonzero(varies)


def _check_options(options: InferOptions) -> None:
    if options.method not in METHODS:
        raise UserError(f"unknown method '{options.method}'", "infer.method", f"use {list(METHODS)}")
    if not 0 < options.level < 1:
        raise UserError(f"level is {options.level}", "infer.level", "give a number between 0 and 1")
    if options.method == "permutation" and 1 / (options.permutations + 1) > options.level:
        what = f"{options.permutations} permutations cannot reach level {options.level:g}"
        raise UserError(what, "infer.permutations", f"give {int(np.ceil(1 / options.level - 1e-9)) - 1} or more")
    if min(options.power_sizes, default=2) < 2:
        raise UserError(f"power_sizes are {options.power_sizes}", "infer.power_sizes", "give sizes of 2 or more")
    if options.power_draws < 1:
        raise UserError(f"power_draws is {options.power_draws}", "infer.power_draws", "give 1 or more")


def _check_samples(
    suspects: np.ndarray,
    reference: np.ndarray,
    suspect_group: np.ndarray,
    reference_group: np.ndarray,
    known: Known | None,
) -> None:
    sides = {"suspects": (suspects, suspect_group), "reference": (reference, reference_group)}
    for name, (_, group) in sides.items():
        if len(np.unique(group)) < MIN_GROUPS:
            what = f"{len(np.unique(group))} groups of near-duplicates"
            raise UserError(what, name, f"bring {MIN_GROUPS} or more: a group counts once")
    if known is not None:
        sides["known"] = (known.x, known.group)
        _check_known(known)
    for name, (x, _) in sides.items():
        if x.shape[1] != suspects.shape[1]:
            what = f"{x.shape[1]} columns of scores where suspects have {suspects.shape[1]}"
            raise UserError(what, name, "give the same scores of all")
        if not np.isfinite(x).all():
            row, column = np.argwhere(~np.isfinite(x))[0]
            raise UserError("scores hold NaN or infinity", f"{name}, row {row}, column {column}", "drop the row")
    _refuse_shared({name: group for name, (_, group) in sides.items()})


def _check_known(known: Known) -> None:
    if _known_groups(known) < MIN_KNOWN:
        fix = f"bring {MIN_KNOWN} or more, or none: without them scores are averaged"
        raise UserError(f"{_known_groups(known)} groups of near-duplicates to fit on", "known", fix)
    if known.member.all() or not known.member.any():
        raise UserError("all samples are of one class", "known", "bring members and non-members")


def _refuse_shared(groups: dict[str, np.ndarray]) -> None:
    """Stop where near-duplicates stand in two places: evidence would count twice, or a score see its own label."""
    names = list(groups)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = np.intersect1d(groups[one], groups[other])
            if len(shared):
                what = f"{len(shared)} groups of near-duplicates stand in both {one} and {other}"
                raise UserError(what, f"group {shared[0]}", "drop them from one of the two")
