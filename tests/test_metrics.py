"""`mia.metrics` against pair counting, brute force over thresholds, written-out resamples and closed forms."""

from __future__ import annotations

import fractions
import pathlib

import numpy as np
import polars as pl
import pytest
from scipy.stats import norm
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


# Bootstrap


def grouped(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Names of groups of 1 to 4 samples, most of one side, some of both; and who is a member."""
    generator = np.random.default_rng(seed)
    group = np.repeat([f"g{i:03d}" for i in range(n)], generator.integers(1, 5, n))[:n].astype(object)
    side = {name: generator.integers(3) for name in group}
    member = np.array([side[name] == 1 or (side[name] == 2 and bool(generator.integers(2))) for name in group])
    return group, member


def test_weights_keep_groups_together_and_the_number_of_groups_of_each_kind():
    group, member = grouped(0, 90)
    weights = metrics.group_weights(group, member, 50, np.random.default_rng(1))
    assert weights.shape == (50, 90) and weights.min() >= 0
    kinds: dict[frozenset, list[int]] = {}
    for name in np.unique(group):
        rows = np.flatnonzero(group == name)
        assert (weights[:, rows] == weights[:, rows[:1]]).all()
        kinds.setdefault(frozenset(member[rows]), []).append(rows[0])
    assert len(kinds) == 3, "this test wants groups of members, of non-members and of both"
    for first in kinds.values():
        assert (weights[:, first].sum(1) == len(first)).all()


def test_weights_without_groups_keep_both_sides_sizes_and_average_one():
    member = np.arange(60) < 25
    weights = metrics.group_weights(np.arange(60), member, 4000, np.random.default_rng(2))
    assert (weights[:, member].sum(1) == 25).all() and (weights[:, ~member].sum(1) == 35).all()
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.08)
    np.testing.assert_allclose(weights[:, ~member].var(0), 1 - 1 / 35, atol=0.15)


def test_no_resample_lacks_a_side_even_when_one_group_holds_all_nonmembers():
    member = np.arange(30) != 29
    group = np.where(np.arange(30) >= 28, 28, np.arange(30))  # the only non-member shares a group with a member
    weights = metrics.group_weights(group, member, 300, np.random.default_rng(3))
    assert (weights @ member > 0).all() and (weights @ ~member > 0).all()


def test_weights_follow_the_seed_and_the_group_not_the_row():
    group, member = grouped(4, 50)
    one = metrics.group_weights(group, member, 20, np.random.default_rng(5))
    np.testing.assert_array_equal(one, metrics.group_weights(group, member, 20, np.random.default_rng(5)))
    assert (one != metrics.group_weights(group, member, 20, np.random.default_rng(6))).any()
    shuffle = np.random.default_rng(0).permutation(50)
    again = metrics.group_weights(group[shuffle], member[shuffle], 20, np.random.default_rng(5))
    np.testing.assert_array_equal(one[:, shuffle], again)


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("by_group", [False, True])
def test_resampled_equals_metrics_of_the_samples_written_out(decimals, by_group):
    group, member = grouped(11, 120)
    if not by_group:
        group = np.arange(120)
    score = np.random.default_rng(12).normal(size=120) + member
    score = score if decimals is None else np.round(score, decimals)
    weights = metrics.group_weights(group, member, 150, np.random.default_rng(13))  # more than one chunk
    found = metrics.resampled(score, member, weights, TARGETS)
    assert found.shape == (150, 1 + len(TARGETS)) and found.dtype == np.float64
    for row in (0, 1, 2, 64, 127, 128, 149):
        long, truth = np.repeat(score, weights[row]), np.repeat(member, weights[row])
        assert found[row, 0] == metrics.auc(long, truth)
        assert found[row, 0] == pytest.approx(pairs_auc(long, truth), abs=1e-14)
        for column, target in enumerate(TARGETS, 1):
            assert found[row, column] == brute_tpr(long, truth, str(target))


def test_resampled_with_every_weight_one_is_the_sample_itself():
    for decimals in (None, 0):
        score, member = drawn(14, 200, 300, decimals)
        found = metrics.resampled(score, member, np.ones((1, 500), dtype=np.int16), (0.01, 0.1))[0]
        wanted = [metrics.tpr_at_fpr(score, member, t).tpr for t in (0.01, 0.1)]
        assert found.tolist() == [metrics.auc(score, member), *wanted]


def test_resampled_is_exact_where_pair_counts_pass_float32():
    score, member = drawn(15, 4500, 4500, 2)
    weights = metrics.group_weights(np.arange(9000), member, 2, np.random.default_rng(0))
    found = metrics.resampled(score, member, weights, (0.01,))
    for row in range(2):
        long, truth = np.repeat(score, weights[row]), np.repeat(member, weights[row])
        assert found[row].tolist() == [metrics.auc(long, truth), metrics.tpr_at_fpr(long, truth, 0.01).tpr]


def test_resampled_of_extreme_scores():
    member = np.arange(250) < 50
    weights = metrics.group_weights(np.arange(250), member, 40, np.random.default_rng(0))
    assert (metrics.resampled(np.zeros(250), member, weights, (0.01,)) == [0.5, 0.0]).all()
    assert (metrics.resampled(member * 1.0, member, weights, (0.01,)) == [1.0, 1.0]).all()
    assert (metrics.resampled(member * -1.0, member, weights, (0.01,)) == [0.0, 0.0]).all()


def test_interval_is_the_central_part():
    values = np.stack([np.arange(101.0), 7 * np.ones(101)], axis=1)
    low, high = metrics.interval(np.random.default_rng(0).permutation(values), 0.9)
    np.testing.assert_allclose(low, [5, 7])
    np.testing.assert_allclose(high, [95, 7])


# What stands in the table


def measured(score, member, targets=(0.01, 0.001), resamples=200, seed=0):
    weights = metrics.group_weights(np.arange(len(score)), member, resamples, np.random.default_rng(seed))
    return metrics.measured(score, member, weights, targets, 0.95)


def test_measured_rows_say_everything():
    score, member = drawn(16, 300, 400)
    auc, one, tenth = measured(score, member)
    assert auc["metric"] == "auc" and auc["value"] == metrics.auc(score, member) and auc["note"] == ""
    assert auc["ci_low"] < auc["value"] < auc["ci_high"]
    at = metrics.tpr_at_fpr(score, member, 0.01)
    assert (one["metric"], one["fpr_target"], one["note"]) == ("tpr", 0.01, "")
    assert (one["value"], one["fpr_realized"], one["threshold"]) == (at.tpr, at.fpr, at.threshold)
    assert one["fpr_realized"] == 4 / 400 and one["ci_low"] <= one["value"] <= one["ci_high"]
    assert "value" not in tenth and tenth["fpr_target"] == 0.001
    assert tenth["note"] == "400 non-members allow no false positive at 0.001; 1000 are needed"
    assert all((row["n_members"], row["n_nonmembers"]) == (300, 400) for row in (auc, one, tenth))


@pytest.mark.parametrize(("target", "m", "needed"), [(0.01, 99, 100), (0.001, 999, 1000), (0.003, 333, 334)])
def test_too_few_nonmembers_leave_the_rate_blank_and_the_note_says_how_many_are_needed(target, m, needed):
    score, member = drawn(17, 20, m)
    assert measured(score, member, (target,))[1]["note"].endswith(f"; {needed} are needed")
    assert "value" not in measured(score, member, (target,))[1]
    score, member = drawn(17, 20, needed)
    assert measured(score, member, (target,))[1]["value"] >= 0


def test_an_infinite_threshold_is_left_blank():
    member = np.arange(300) < 100
    row = measured(np.ones(300), member, (0.01,))[1]
    assert (row["value"], row["fpr_realized"], row["threshold"]) == (0.0, 0.0, None)


# Populations with known answers


def test_gaussian_shift_has_its_closed_form_inside_the_intervals():
    for shift in (0.0, 0.5, 1.5):
        score, member = drawn(18, 4000, 4000, shift=shift)
        auc, one, tenth = measured(score, member)
        for row, truth in (
            (auc, norm.cdf(shift / np.sqrt(2))),
            (one, norm.cdf(shift - norm.isf(0.01))),
            (tenth, norm.cdf(shift - norm.isf(0.001))),
        ):
            assert row["ci_low"] <= truth <= row["ci_high"], (shift, row, truth)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """100 populations: 95 intervals of 100 should hold the truth; 87 or fewer happen once in 500 times by luck."""
    shift, n, m, targets = 0.8, 300, 300, (0.05,)
    truth = [norm.cdf(shift / np.sqrt(2)), norm.cdf(shift - norm.isf(0.05))]
    covered = np.zeros(2)
    for seed in range(100):
        score, member = drawn(1000 + seed, n, m, shift=shift)
        weights = metrics.group_weights(np.arange(n + m), member, 200, np.random.default_rng(seed))
        low, high = metrics.interval(metrics.resampled(score, member, weights, targets), 0.95)
        covered += (low <= truth) & (truth <= high)
    assert (covered >= 88).all() and (covered <= 100).all(), covered


def test_intervals_over_groups_are_wider_when_a_group_is_one_image_many_times():
    score, member = drawn(19, 200, 200)
    copies, group = np.repeat(score, 4), np.repeat(np.arange(400), 4)
    width = {}
    for name, names in (("grouped", group), ("alone", np.arange(1600))):
        weights = metrics.group_weights(names, np.repeat(member, 4), 1000, np.random.default_rng(0))
        low, high = metrics.interval(metrics.resampled(copies, np.repeat(member, 4), weights, ()), 0.95)
        width[name] = float(high[0] - low[0])
    assert width["grouped"] == pytest.approx(2 * width["alone"], rel=0.15)  # the square root of four


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
