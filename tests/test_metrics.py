"""`mia.metrics` against pair counting, brute force over thresholds, and real scores."""

from __future__ import annotations

import fractions
import pathlib

import numpy as np
import polars as pl
import pytest
from scipy.stats import binom
from sklearn.metrics import roc_auc_score, roc_curve

from mia import metrics

REAL = pathlib.Path(__file__).parent.parent.parent / "shared" / "data" / "sd15_laion_mi_scores"
TARGETS = (0.01, 0.05, 0.1, 0.29, 1.0)


def pairs_auc(score: np.ndarray, member: np.ndarray) -> float:
    """Count every pair of a member and a non-member, a tie for half."""
    wins = [
        1.0 if inside > outside else 0.5 if inside == outside else 0.0
        for inside in score[member]
        for outside in score[~member]
    ]
    return sum(wins) / len(wins)


def brute_tpr(score: np.ndarray, member: np.ndarray, target: str) -> float:
    """Try every threshold; the allowed number of false positives by exact fractions."""
    inside, outside = list(score[member]), list(score[~member])
    best = 0
    for threshold in set(score):
        alarms = sum(s >= threshold for s in outside)
        if fractions.Fraction(alarms, len(outside)) <= fractions.Fraction(target):
            best = max(best, sum(s >= threshold for s in inside))
    return best / len(inside)


def drawn(seed: int, n: int, m: int, decimals: int | None = None, shift: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """Scores of n members and m non-members in random order; rounding to few decimals makes ties."""
    generator = np.random.default_rng(seed)
    member = generator.permutation(np.arange(n + m) < n)
    score = generator.normal(size=n + m) + shift * member
    return (score if decimals is None else np.round(score, decimals)), member


CASES = [(1, 30, 40, None), (2, 40, 25, 1), (3, 17, 60, 0), (4, 1, 9, 0), (5, 9, 1, 0), (6, 50, 100, 1)]


@pytest.mark.parametrize(("seed", "n", "m", "decimals"), CASES)
def test_auc_is_the_share_of_pairs_in_order(seed, n, m, decimals):
    score, member = drawn(seed, n, m, decimals)
    assert metrics.auc(score, member) == pytest.approx(pairs_auc(score, member), abs=1e-14)
    assert metrics.auc(score, member) == pytest.approx(roc_auc_score(member, score), abs=1e-12)


def test_auc_by_hand():
    member = np.array([True, True, False, False, False])
    # Member 3 beats 2, 1 and 1; member 1 beats none, loses to 2, ties with two: 3 + 1 of 6 pairs.
    assert metrics.auc(np.array([3.0, 1.0, 2.0, 1.0, 1.0]), member) == 4 / 6
    assert metrics.auc(np.zeros(5), member) == 0.5
    assert metrics.auc(np.array([9.0, 8.0, 2.0, 1.0, 1.0]), member) == 1.0


def test_auc_turns_over_with_the_sign_and_keeps_under_monotone_maps():
    score, member = drawn(7, 60, 50, 1)
    value = metrics.auc(score, member)
    assert metrics.auc(-score, member) == pytest.approx(1 - value, abs=1e-14)
    assert metrics.auc(score, ~member) == pytest.approx(1 - value, abs=1e-14)
    assert metrics.auc(np.exp(3 * score) + 5, member) == value


@pytest.mark.parametrize("target", ["0.01", "0.05", "0.1", "0.29", "1.0"])
@pytest.mark.parametrize(("seed", "n", "m", "decimals"), CASES)
def test_tpr_is_the_largest_that_any_allowed_threshold_gives(seed, n, m, decimals, target):
    score, member = drawn(seed, n, m, decimals)
    at = metrics.tpr_at_fpr(score, member, float(target))
    assert at.tpr == brute_tpr(score, member, target)
    assert round(at.fpr * m) <= fractions.Fraction(target) * m
    assert at.tpr == (score[member] >= at.threshold).mean()
    assert at.fpr == (score[~member] >= at.threshold).mean()


@pytest.mark.parametrize("target", [0.01, 0.1, 0.5])
def test_tpr_agrees_with_roc_curve_of_sklearn(target):
    for seed in range(5):
        score, member = drawn(seed, 150, 200, 1)
        fpr, tpr, _ = roc_curve(member, score, drop_intermediate=False)
        assert metrics.tpr_at_fpr(score, member, target).tpr == tpr[fpr <= target].max()


def test_tpr_by_hand():
    member = np.array([True] * 4 + [False] * 10)
    score = np.array([10.0, 8, 7, 1, 9, 7, 6, 5, 4, 3, 2, 0, 0, 0])
    # Falling: member 10, other 9, member 8, then a member and another tied at 7, ...
    assert metrics.tpr_at_fpr(score, member, 0.0) == metrics.Operating(0.25, 0.0, 10.0)
    assert metrics.tpr_at_fpr(score, member, 0.1) == metrics.Operating(0.5, 0.1, 8.0)
    assert metrics.tpr_at_fpr(score, member, 0.2) == metrics.Operating(0.75, 0.2, 7.0)
    assert metrics.tpr_at_fpr(score, member, 1.0) == metrics.Operating(1.0, 1.0, 0.0)


def test_ties_go_together():
    member = np.array([True] * 5 + [False] * 100)
    score = np.r_[np.full(5, 1.0), np.full(2, 1.0), np.zeros(98)]
    assert metrics.tpr_at_fpr(score, member, 0.01) == metrics.Operating(0.0, 0.0, np.inf)  # two tied, one allowed
    assert metrics.tpr_at_fpr(score, member, 0.02) == metrics.Operating(1.0, 0.02, 1.0)


def test_an_oracle_of_known_orientation_finds_members_only():
    """Pitfall 4 of the catalogue: a rate reported for the other class would give 1 for the reversed oracle too."""
    member = np.arange(400) % 2 == 0
    oracle = member.astype(float)
    assert metrics.tpr_at_fpr(oracle, member, 0.01) == metrics.Operating(1.0, 0.0, 1.0)
    assert metrics.auc(oracle, member) == 1.0
    assert metrics.tpr_at_fpr(-oracle, member, 0.01) == metrics.Operating(0.0, 0.0, np.inf)
    assert metrics.auc(-oracle, member) == 0.0


def test_a_constant_score_calls_nobody_a_member():
    member = np.arange(300) < 100
    assert metrics.tpr_at_fpr(np.full(300, 3.0), member, 0.01) == metrics.Operating(0.0, 0.0, np.inf)


@pytest.mark.parametrize(
    ("target", "m", "count"),
    [(0.01, 100, 1), (0.01, 99, 0), (0.01, 1000, 10), (0.01, 2500, 25), (0.001, 2500, 2), (0.001, 999, 0),
     (0.001, 1000, 1), (0.29, 100, 29), (0.57, 100, 57), (0.07, 100, 7), (0.1, 30, 3), (0.3, 10, 3), (1.0, 7, 7)],
)  # fmt: skip
def test_allowed_false_positives_are_the_floor_of_target_times_n(target, m, count):
    assert metrics.allowed(target, m) == count
    member = np.r_[np.ones(m + 5, dtype=bool), np.zeros(m, dtype=bool)]
    # A member stands just below each non-member, so that each false positive more finds one member more.
    score = np.r_[np.arange(m + 5) - 0.5, np.arange(m) + 5.0]
    at = metrics.tpr_at_fpr(score, member, target)
    assert round(at.fpr * m) == count
    assert at.tpr == (count / (m + 5) if count < m else 1.0)


@pytest.mark.parametrize("denominator", [3, 7, 49, 100, 1000, 2500, 100_000])
def test_allowed_is_exact_for_every_fraction_of_n(denominator):
    counts = np.arange(1, denominator + 1)
    assert all(metrics.allowed(k / denominator, denominator) == k for k in counts[:: max(1, denominator // 500)])


def test_roc_runs_from_nobody_to_everybody():
    score, member = drawn(8, 40, 60, 1)
    tpr, fpr, threshold = metrics.roc(score, member)
    assert (tpr[0], fpr[0], threshold[0]) == (0, 0, np.inf)
    assert (tpr[-1], fpr[-1], threshold[-1]) == (1, 1, score.min())
    assert (np.diff(tpr) >= 0).all() and (np.diff(fpr) >= 0).all() and (np.diff(threshold) < 0).all()
    assert len(threshold) == len(set(score)) + 1
    for t, f, at in zip(tpr, fpr, threshold, strict=True):
        assert t == (score[member] >= at).mean() and f == (score[~member] >= at).mean()
    assert np.trapezoid(tpr, fpr) == pytest.approx(metrics.auc(score, member), abs=1e-14)


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_roc_equals_that_of_sklearn(decimals):
    score, member = drawn(9, 70, 80, decimals)
    fpr, tpr, threshold = roc_curve(member, score, drop_intermediate=False)
    for ours, theirs in zip(metrics.roc(score, member), (tpr, fpr, threshold), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_metric_depends_on_the_order_of_rows():
    score, member = drawn(10, 120, 130, 1)
    shuffle = np.random.default_rng(0).permutation(len(score))
    assert metrics.auc(score, member) == metrics.auc(score[shuffle], member[shuffle])
    for target in TARGETS:
        assert metrics.tpr_at_fpr(score, member, target) == metrics.tpr_at_fpr(score[shuffle], member[shuffle], target)


def test_tie_ends():
    assert metrics.tie_ends(np.array([5.0, 5, 4, 3, 3, 3])).tolist() == [1, 2, 5]
    assert metrics.tie_ends(np.array([1.0])).tolist() == [0]


def test_interval_is_the_central_part():
    values = np.stack([np.arange(101.0), 7 * np.ones(101)], axis=1)
    low, high = metrics.interval(np.random.default_rng(0).permutation(values), 0.9)
    np.testing.assert_allclose(low, [5, 7])
    np.testing.assert_allclose(high, [95, 7])


def test_balanced_accuracy_by_hand():
    score = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    member = np.array([True, True, False, True, False, False])
    assert metrics.balanced_accuracy(score, member, 3.5) == (2 / 3 + 1) / 2
    assert metrics.balanced_accuracy(score, member, 2.0) == (1 + 2 / 3) / 2
    assert metrics.balanced_accuracy(score, member, np.inf) == metrics.balanced_accuracy(score, member, -1.0) == 0.5


@pytest.mark.parametrize(("seed", "n", "m", "decimals"), CASES)
def test_the_best_threshold_beats_every_other(seed, n, m, decimals):
    score, member = drawn(seed, n, m, decimals)
    best = metrics.balanced_accuracy(score, member, metrics.best_threshold(score, member))
    assert best == pytest.approx(max(metrics.balanced_accuracy(score, member, t) for t in [*score, np.inf]), abs=1e-12)


def test_of_equally_good_thresholds_the_highest_is_taken():
    member = np.array([True, False, True, False])
    assert metrics.best_threshold(np.array([4.0, 3.0, 2.0, 1.0]), member) == 4.0
    assert metrics.best_threshold(np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, True, False, False])) == np.inf
    assert metrics.best_threshold(np.zeros(4), member) == np.inf


def test_log_roc_is_the_curve_at_rates_evenly_spaced():
    score, member = drawn(3, 50, 100)
    points = metrics.log_roc(score, member, per_decade=4)
    rates = [rate for rate, _ in points]
    np.testing.assert_allclose(rates, 10.0 ** np.arange(-2, 0.1, 0.25))
    for rate, at in points:
        assert at == metrics.tpr_at_fpr(score, member, rate)
    assert points[-1][1].tpr == points[-1][1].fpr == 1.0


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10)])
def test_the_exact_interval_leaves_half_the_doubt_on_each_side(hits, n):
    low, high = metrics.exact_interval(hits, n, 0.9)
    assert low == 0 if hits == 0 else binom.sf(hits - 1, n, low) == pytest.approx(0.05)
    assert high == 1 if hits == n else binom.cdf(hits, n, high) == pytest.approx(0.05)


# Real scores


def real(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    path = REAL / f"{name}_calibration.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is absent: real scores are not part of the project")
    table = pl.read_parquet(path)
    scores = {column.name: column.to_numpy().astype(np.float64) for column in table.drop("sample_id", "member")}
    return scores, table["member"].to_numpy()


def percent(score: np.ndarray, member: np.ndarray) -> tuple[float, float, float]:
    rates = (metrics.tpr_at_fpr(score, member, target).tpr for target in (0.01, 0.001))
    return (round(metrics.auc(score, member), 4), *(round(100 * rate, 10) for rate in rates))


def test_published_losses_of_stable_diffusion_to_the_last_digit():
    losses, member = real("summed_loss")
    total = -sum(losses.values())
    assert percent(total, member) == (0.5348, 1.16, 0.20)
    assert metrics.auc(total, member) == pytest.approx(roc_auc_score(member, total), abs=1e-12)
    corrected = -sum(loss / loss.mean() for loss in losses.values())
    assert percent(corrected, member)[:2] == (0.5356, 1.28)


def test_published_secmi_scores_to_the_last_digit():
    scores, member = real("secmi_port")
    assert percent(-scores["t051"], member) == (0.5232, 1.28, 0.20)
    corrected = -sum(score / score.mean() for score in scores.values())
    assert percent(corrected, member)[:2] == (0.5337, 1.24)


@pytest.mark.parametrize(("name", "percent_at_best"), [("summed_loss", 2.16), ("secmi_port", 1.52)])
def test_best_published_column_of_this_half(name, percent_at_best):
    scores, member = real(name)
    rates = [metrics.tpr_at_fpr(-score, member, 0.01).tpr for score in scores.values()]
    assert round(100 * max(rates), 10) == percent_at_best
