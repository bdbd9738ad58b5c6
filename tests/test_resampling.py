"""`mia.resampling`: slow twins that write every resample out, closed forms, and how often intervals hold the truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binom, binomtest, kstest, norm
from sklearn.metrics import roc_auc_score, roc_curve

from mia import metrics, resampling

TARGETS = (0.01, 0.05, 0.29, 1.0)


def drawn(seed: int, n: int, m: int, decimals: int | None = None, shift: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """Scores, float64[n + m, 1], in random order; rounding to few decimals makes ties."""
    generator = np.random.default_rng(seed)
    member = generator.permutation(np.arange(n + m) < n)
    score = generator.normal(size=n + m) + shift * member
    return (score if decimals is None else np.round(score, decimals))[:, None], member


def alone(member: np.ndarray) -> np.ndarray:
    return np.arange(len(member))


# Bootstrap


def weighted(score: np.ndarray, member: np.ndarray, weight: np.ndarray, beyond: float, target: float) -> list[float]:
    """AUC over weighted pairs; TPR where the weighted false-positive rate passes the target, linear in between."""
    pairs = itertools.product(np.flatnonzero(member), np.flatnonzero(~member))
    wins = sum(weight[i] * weight[j] * ((score[i] > score[j]) + 0.5 * (score[i] == score[j])) for i, j in pairs)
    inside, outside = weight[member].sum(), weight[~member].sum()
    passed, rate, tpr = 0.0, 0.0, 0.0
    for j in sorted(np.flatnonzero(~member), key=lambda j: -score[j]):
        reached = weight[member & (score > score[j])].sum() / inside
        step = weight[j] / (outside + beyond)
        if rate + step > target:
            break
        rate, tpr, passed = rate + step, reached, reached
    else:
        reached, step = 1.0, 1 - rate
    return [wins / (inside * outside), tpr + (target - rate) / step * (reached - passed)]


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("target", TARGETS)
def test_bootstrap_equals_weighted_samples_written_out(decimals, target):
    scores, member = drawn(1, 40, 55, decimals)
    group = np.array([f"g{i // 3:02d}" for i in range(95)])
    found = resampling.bootstrap(scores, member, group, (target,), 130, np.random.default_rng(5))
    generator = np.random.default_rng(5)
    draws = [generator.standard_exponential((rows, 33)) for rows in (128, 2)]  # 32 groups and the gap beyond
    for row, draw in enumerate(np.concatenate(draws)):
        if row % 26 == 0 or row > 127:
            wanted = weighted(scores[:, 0], member, np.repeat(draw[:-1], 3)[:95], draw[-1], target)
            np.testing.assert_allclose(found[row, 0], wanted, rtol=1e-12)


def test_columns_meet_the_same_resamples_and_row_order_changes_nothing():
    scores, member = drawn(2, 60, 70)
    scores = np.concatenate([scores, -scores, scores], axis=1)
    group = np.array([f"g{i // 2:02d}" for i in range(130)])
    found = resampling.bootstrap(scores, member, group, (0.1,), 50, np.random.default_rng(0))
    np.testing.assert_array_equal(found[:, 0], found[:, 2])
    np.testing.assert_allclose(found[:, 0, 0], 1 - found[:, 1, 0])
    shuffle = np.random.default_rng(9).permutation(130)
    again = resampling.bootstrap(scores[shuffle], member[shuffle], group[shuffle], (0.1,), 50, np.random.default_rng(0))
    np.testing.assert_allclose(found, again, rtol=1e-12)


def test_bootstrap_of_extreme_scores():
    member = np.arange(250) < 50
    scores = np.stack([member * 1.0, member * -1.0], axis=1)
    found = resampling.bootstrap(scores, member, alone(member), (0.1, 1.0), 40, np.random.default_rng(0))
    np.testing.assert_allclose(found[:, 0], [[1, 1, 1]] * 40)
    np.testing.assert_allclose(found[:, 1], [[0, 0, 1]] * 40)


def test_a_group_of_one_image_many_times_widens_the_interval():
    scores, member = drawn(3, 200, 200)
    copies, truth, group = np.repeat(scores, 4, axis=0), np.repeat(member, 4), np.repeat(np.arange(400), 4)
    width = {}
    for name, names in (("grouped", group), ("alone", alone(truth))):
        found = resampling.bootstrap(copies, truth, names, (0.05,), 1000, np.random.default_rng(0))
        low, high = metrics.interval(found[:, 0], 0.95)
        width[name] = high - low
    np.testing.assert_allclose(width["grouped"], 2 * width["alone"], rtol=0.2)  # the square root of four


# Permutation


def test_permuted_metrics_are_those_of_the_shuffled_labels():
    for decimals in (None, 0):
        scores, member = drawn(4, 60, 80, decimals)
        scores = np.concatenate([scores, np.random.default_rng(1).normal(size=scores.shape)], axis=1)
        group = np.array([f"g{i // 2:02d}" if i < 100 else f"h{i:03d}" for i in range(140)])
        found = resampling.permutation(scores, member, group, (0.05, 0.3, 1.0), 200, np.random.default_rng(3))
        labels = np.concatenate(list(resampling.shuffled(member, group, 200, np.random.default_rng(3))))
        for row in (0, 1, 127, 128, 199):
            for c in range(2):
                wanted = [metrics.auc(scores[:, c], labels[row])]
                wanted += [metrics.tpr_at_fpr(scores[:, c], labels[row], t).tpr for t in (0.05, 0.3, 1.0)]
                np.testing.assert_allclose(found[row, c], wanted, atol=1e-12)


def test_shuffled_labels_keep_their_number_and_move_by_whole_groups():
    group = np.repeat(np.arange(40), [1] * 20 + [3] * 20)
    member = np.random.default_rng(0).random(80) < 0.4
    patterns = sorted(tuple(member[group == g]) for g in range(20, 40))
    seen = set()
    for labels in resampling.shuffled(member, group, 300, np.random.default_rng(1)):
        for row in labels:
            assert row[:20].sum() == member[:20].sum()
            assert sorted(tuple(row[group == g]) for g in range(20, 40)) == patterns
            seen.add(row.tobytes())
    assert len(seen) == 300


def test_every_assignment_of_labels_is_equally_likely():
    member = np.array([True, True, False, False, False])
    counts: dict[bytes, int] = {}
    for labels in resampling.shuffled(member, alone(member), 10_000, np.random.default_rng(2)):
        for row in labels:
            counts[row.tobytes()] = counts.get(row.tobytes(), 0) + 1
    assert len(counts) == 10 and max(abs(c - 1000) for c in counts.values()) < 5 * np.sqrt(900)


def test_p_values_by_hand():
    permuted = np.array([[0.1, 0.5], [0.4, 0.2], [0.3, 0.3]])
    one, adjusted = resampling.p_values(np.array([0.35, 0.5]), permuted)
    np.testing.assert_allclose(one, [2 / 4, 2 / 4])  # .4 reaches .35; .5 reaches .5
    np.testing.assert_allclose(adjusted, [3 / 4, 2 / 4])  # maxima .5, .4, .3
    assert (resampling.p_values(np.array([9.0]), permuted[:, :1])[0] == 1 / 4).all(), "never zero"


def test_p_values_of_nothing_are_uniform_alone_and_as_the_best_of_many():
    p = []
    for seed in range(300):
        generator = np.random.default_rng(seed)
        scores, member = generator.normal(size=(120, 8)), np.arange(120) < 60
        permuted = resampling.permutation(scores, member, alone(member), (0.1,), 199, generator)
        observed = np.array([
            [metrics.auc(s, member), metrics.tpr_at_fpr(s, member, 0.1).tpr] for s in scores.T
        ])  # fmt: skip
        single, adjusted = resampling.p_values(observed[:, 0], permuted[:, :, 0])
        rate = resampling.p_values(observed[:, 1], permuted[:, :, 1])[1]
        p.append((single[0], adjusted.min(), rate.min()))
    p = np.array(p)
    assert kstest(p[:, 0], "uniform").pvalue > 0.01 and kstest(p[:, 1], "uniform").pvalue > 0.01
    for column in range(3):  # rates are coarse, so their p-values may only be too large
        hits = int((p[:, column] <= 0.05).sum())
        assert binomtest(hits, 300, 0.05, alternative="greater").pvalue > 0.005, (column, hits)


# The paper's subsamples


def by_roc_curve(scores: np.ndarray, member: np.ndarray, target: float, resamples: int, size: int) -> np.ndarray:
    """The authors' loop: subsample, scikit-learn's curve, its last point within the target."""
    np.random.seed(123)
    out = np.empty((resamples, scores.shape[1]))
    for r in range(resamples):
        rows = [np.random.choice(np.flatnonzero(side), size, replace=False) for side in (member, ~member)]
        rows = np.concatenate(rows)
        for c in range(scores.shape[1]):
            fpr, tpr, _ = roc_curve(member[rows], scores[rows, c], drop_intermediate=False)
            out[r, c] = tpr[np.flatnonzero(fpr <= target)[-1]]
    return out


@pytest.mark.parametrize("decimals", [None, 2, 0])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_subsampled_is_bit_equal_to_the_authors_loop(decimals, shift):
    scores, member = drawn(6, 400, 500, decimals, shift)
    scores = np.concatenate([scores, np.random.default_rng(0).normal(size=scores.shape)], axis=1)
    found = resampling.subsampled(scores, member, (0.01, 0.1, 1.0), 30, 200, 123)
    for place, target in enumerate((0.01, 0.1, 1.0)):
        assert (found[:, :, place] == by_roc_curve(scores, member, target, 30, 200)).all()


def test_subsamples_of_everything_are_the_sample_itself():
    scores, member = drawn(7, 100, 100, 1)
    found = resampling.subsampled(scores, member, (0.05,), 3, 100, 0)
    assert (found == metrics.tpr_at_fpr(scores[:, 0], member, 0.05).tpr).all()


# DeLong


def placements(score: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wins = score[member][:, None] > score[~member][None, :]
    ties = score[member][:, None] == score[~member][None, :]
    kernel = wins + 0.5 * ties
    return kernel.mean(1), kernel.mean(0)


@pytest.mark.parametrize("decimals", [None, 0])
def test_delong_equals_its_textbook_form(decimals):
    scores, member = drawn(8, 30, 45, decimals)
    scores = np.concatenate([scores, scores + np.random.default_rng(1).normal(size=scores.shape)], axis=1)
    auc, covariance = resampling.delong(scores, member, alone(member))
    v10, v01 = zip(*(placements(s, member) for s in scores.T), strict=True)
    np.testing.assert_allclose(auc, [roc_auc_score(member, s) for s in scores.T])
    np.testing.assert_allclose(covariance, np.cov(v10) / 30 + np.cov(v01) / 45)


def test_delong_over_groups_of_copies_is_that_of_the_originals():
    scores, member = drawn(9, 40, 40)
    once = resampling.delong(scores, member, alone(member))
    copies = (np.repeat(scores, 3, axis=0), np.repeat(member, 3), np.repeat(alone(member), 3))
    np.testing.assert_allclose(resampling.delong(*copies)[1], once[1], rtol=1e-12)
    assert resampling.delong(*copies[:2], np.arange(240))[1] < 0.4 * once[1], "ungrouped copies look like evidence"


def test_delong_agrees_with_the_bootstrap_also_where_groups_hold_both_sides():
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(300), 3)
    member = generator.random(900) < 0.5
    scores = (generator.normal(size=300)[group] + generator.normal(size=900) + 0.5 * member)[:, None]
    spread = resampling.bootstrap(scores, member, group, (), 2000, generator)[:, 0, 0].std()
    assert np.sqrt(resampling.delong(scores, member, group)[1][0, 0]) == pytest.approx(spread, rel=0.08)


def test_paired_comparison_knows_direction_and_equality():
    scores, member = drawn(10, 300, 300)
    score, noise = scores[:, 0], np.random.default_rng(2).normal(size=600)
    difference, p = resampling.paired_auc(score, noise, member, alone(member))
    assert difference == pytest.approx(metrics.auc(score, member) - metrics.auc(noise, member)) and p < 1e-3
    assert resampling.paired_auc(noise, score, member, alone(member))[1] == pytest.approx(1 - p)
    assert resampling.paired_auc(score, 2 * score + 1, member, alone(member)) == (0.0, 1.0)
    perfect, useless = member.astype(float), np.zeros(600)
    assert resampling.paired_auc(perfect, useless, member, alone(member)) == (0.5, 0.5**300)
    assert resampling.paired(np.array([0.3, 0.2]), np.array([0.1, 0.2])) == 2 / 3


def test_paired_p_values_of_equally_good_attacks_are_uniform():
    p = []
    for seed in range(400):
        generator = np.random.default_rng(seed)
        member, shared = np.arange(200) < 100, generator.normal(size=200)
        one, other = (shared + generator.normal(size=200) + 0.5 * member for _ in range(2))
        p.append(resampling.paired_auc(one, other, member, alone(member))[1])
    assert kstest(p, "uniform").pvalue > 0.01


# How often intervals hold the truth

SIMULATIONS = 500


def held(low: float, high: float, truth: float) -> bool:
    return bool(low <= truth <= high)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "target", "resamples"), [(200, 0.05, 400), (1000, 0.01, 400), (5000, 0.01, 200)])
def test_intervals_hold_the_truth_93_to_97_times_in_100(n, target, resamples):
    """Gaussian shift 1, n + n samples. Of 500 true 95 % intervals, 457 to 491 hold the truth but once in 1,000 runs."""
    shift, truth = 1.0, norm.cdf(1.0 - norm.isf(target))
    area, threshold = norm.cdf(shift / np.sqrt(2)), norm.isf(target)
    counts = dict.fromkeys(("bootstrap auc", "bootstrap tpr", "delong", "exact at a frozen threshold"), 0)
    for seed in range(SIMULATIONS):
        generator = np.random.default_rng((n, seed))
        member = np.arange(2 * n) < n
        scores = generator.normal(size=(2 * n, 1)) + shift * member[:, None]
        found = resampling.bootstrap(scores, member, alone(member), (target,), resamples, generator)[:, 0]
        low, high = metrics.interval(found, 0.95)
        counts["bootstrap auc"] += held(low[0], high[0], area)
        counts["bootstrap tpr"] += held(low[1], high[1], truth)
        auc, covariance = resampling.delong(scores, member, alone(member))
        half = norm.isf(0.025) * np.sqrt(covariance[0, 0])
        counts["delong"] += held(auc[0] - half, auc[0] + half, area)
        hits = int((scores[member] >= threshold).sum())
        counts["exact at a frozen threshold"] += held(*metrics.exact_interval(hits, n, 0.95), truth)
    shares = {name: count / SIMULATIONS for name, count in counts.items()}
    assert all(0.93 <= share <= 0.97 for name, share in shares.items() if not name.startswith("exact")), shares
    # The exact interval promises at least 95 %: what it holds is known without simulation.
    hits = np.arange(n + 1)
    ends = np.array([metrics.exact_interval(int(h), n, 0.95) for h in hits])
    exact = binom.pmf(hits, n, truth)[(ends[:, 0] <= truth) & (truth <= ends[:, 1])].sum()
    assert 0.95 <= exact <= 0.97
    name = "exact at a frozen threshold"
    assert abs(counts[name] - SIMULATIONS * exact) <= 3 * np.sqrt(SIMULATIONS * exact * (1 - exact)), shares


def test_holms_adjustment_by_hand():
    """Four p-values: the smallest times 4, the next times 3, ..., none below the one before it, none above 1."""
    assert resampling.holm(np.array([0.04, 0.01, 0.03, 0.005])) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert resampling.holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert resampling.holm(np.array([0.03])).tolist() == [0.03] and len(resampling.holm(np.empty(0))) == 0


def test_holm_keeps_the_chance_of_any_false_alarm():
    drawn = np.random.default_rng(0).uniform(size=(4000, 18))
    alarms = np.mean([(resampling.holm(p) <= 0.05).any() for p in drawn])
    assert abs(alarms - 0.05) < 0.012 and ((drawn <= 0.05).any(axis=1)).mean() > 0.5
