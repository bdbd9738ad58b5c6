"""`mia.infer` against enumeration, loops, scipy and closed forms; its false positives on made and on real scores."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import polars as pl
import pytest
from scipy.stats import binomtest, hypergeom, kstest, nct, norm, ttest_ind
from scipy.stats import t as student

from mia import infer, rng
from mia.config import InferOptions
from mia.errors import UserError
from mia.infer import Guard, Known
from tests.conftest import SHARED

REAL = SHARED / "data" / "sd15_laion_mi_scores" / "summed_loss_calibration.parquet"
LEVEL = 0.01
QUICK = InferOptions(guard=False, permutations=999, power_sizes=(10,), power_draws=20)
CLEAN, LEAKY = Guard("blind_caption", 0.51, 0.4), Guard("blind_metadata", 0.7312, 0.0004)


def names(count: int, prefix: str) -> np.ndarray:
    return np.array([f"{prefix}{i:05d}" for i in range(count)])


def alone(suspects: np.ndarray, reference: np.ndarray, options: InferOptions = QUICK, seed: int = 0, **more) -> dict:
    """`infer` where every image is a group of its own; a vector is one column."""
    sides = [x.reshape(len(x), -1) for x in (suspects, reference)]
    groups = names(len(suspects), "s"), names(len(reference), "r")
    arguments = {"known": None, "guard": None} | more
    return infer.infer(*sides, *groups, options=options, seed=seed, **arguments)


def labelled(generator: np.random.Generator, count: int, shift: tuple[float, ...], prefix: str = "k") -> Known:
    member = np.arange(count) % 2 == 0
    return Known(generator.normal(size=(count, len(shift))) + np.outer(member, shift), member, names(count, prefix))


# The permutation test


def enumerated(suspects: np.ndarray, reference: np.ndarray) -> float:
    """The share of all splits whose suspects sum to at least what they do."""
    pooled = np.r_[suspects, reference]
    sums = [sum(split) for split in itertools.combinations(pooled, len(suspects))]
    return float(np.mean(np.array(sums) >= suspects.sum() - 1e-9))


def test_permutation_by_hand():
    def p(suspects: list[float], reference: list[float]) -> float:
        return infer.p_value(np.array(suspects), np.array(reference), "permutation", 99, np.random.default_rng(0))

    # Ten splits of five; the highest pair is one of them, {3, 5} the third highest, {1, 2} the last.
    assert p([5.0, 4.0], [1.0, 2.0, 3.0]) == 1 / 10
    assert p([5.0, 3.0], [1.0, 2.0, 4.0]) == 2 / 10
    assert p([1.0, 2.0], [3.0, 4.0, 5.0]) == 1.0
    assert p([1.0, 1.0], [0.0, 0.0, 1.0]) == 3 / 10  # ties count


@pytest.mark.parametrize("seed", range(4))
def test_permutation_of_few_is_the_full_enumeration(seed):
    generator = np.random.default_rng(seed)
    a, b = generator.normal(0.5, size=4), generator.normal(size=5)
    assert infer.p_value(a, b, "permutation", 9999, generator) == enumerated(a, b)


@pytest.mark.parametrize(("seed", "shift"), [(1, 0.0), (2, 0.6), (3, 1.0)])
def test_permutation_of_ten_against_ten_is_the_enumeration_within_chance(seed, shift):
    generator = np.random.default_rng(seed)
    a, b = generator.normal(shift, size=10), generator.normal(size=10)
    exact, draws = enumerated(a, b), 9999
    hits = round(infer.p_value(a, b, "permutation", draws, generator) * (draws + 1)) - 1
    assert binomtest(hits, draws, exact).pvalue > 0.001


@pytest.mark.parametrize(("q", "m"), [(12, 30), (40, 15), (100, 400)])
def test_permutation_equals_its_slow_twin(q, m):
    generator = np.random.default_rng(q)
    a, b = generator.normal(0.2, size=q), generator.normal(size=m)
    pooled, reached, own = np.r_[a, b], 0, rng.stream(0, "x")
    for _ in range(500):
        order = own.permutation(q + m)
        reached += pooled[order[:q]].mean() - pooled[order[q:]].mean() >= a.mean() - b.mean()
    assert infer.p_value(a, b, "permutation", 500, rng.stream(0, "x")) == (1 + reached) / 501


def test_permutation_does_not_depend_on_how_many_are_done_at_a_time(monkeypatch):
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.3, size=20), generator.normal(size=30)
    found = infer.p_value(a, b, "permutation", 300, np.random.default_rng(1))
    monkeypatch.setattr(infer, "BATCH_VALUES", 50 * 7)
    assert infer.p_value(a, b, "permutation", 300, np.random.default_rng(1)) == found


@pytest.mark.parametrize(("q", "m", "hits", "others"), [(50, 200, 12, 25), (300, 300, 8, 3), (40, 60, 9, 5)])
def test_permutation_of_yes_and_no_is_fishers_test_ties_and_all(q, m, hits, others):
    """Rounding must not lose ties: every sum of a few ones comes up in another order."""
    a, b = (np.arange(n) < k for n, k in ((q, hits), (m, others)))
    a, b = infer.combined(a[:, None].astype(float), b[:, None].astype(float), None)
    exact, draws = hypergeom(q + m, hits + others, q).sf(hits - 1), 9999
    found = round(infer.p_value(a, b, "permutation", draws, np.random.default_rng(0)) * (draws + 1)) - 1
    assert binomtest(found, draws, exact).pvalue > 0.001


# Welch's test, effect size, groups


def test_welch_equals_scipy_and_the_formula():
    a, b = np.array([3.1, 2.7, 4.4, 3.9, 5.0]), np.array([2.0, 2.2, 3.1, 1.1, 2.5, 2.4, 9.0])
    found = infer.p_value(a, b, "welch", 0, np.random.default_rng(0))
    assert found == pytest.approx(ttest_ind(a, b, equal_var=False, alternative="greater").pvalue, abs=1e-14)
    u, v = a.var(ddof=1) / 5, b.var(ddof=1) / 7
    freedom = (u + v) ** 2 / (u**2 / 4 + v**2 / 6)
    assert found == pytest.approx(student.sf((a.mean() - b.mean()) / np.sqrt(u + v), freedom), abs=1e-14)
    assert infer.p_value(b, a, "welch", 0, np.random.default_rng(0)) == pytest.approx(1 - found, abs=1e-14)


def test_effect_size_by_hand():
    # Means 3 and 1; squares about them 2 and 2, over 2 + 3 - 2 degrees of freedom.
    assert infer.cohens_d(np.array([2.0, 4.0]), np.array([0.0, 1.0, 2.0])) == pytest.approx(2 / np.sqrt(4 / 3))


def test_groups_by_hand():
    x = np.array([[1.0, 10], [2, 20], [3, 60], [5, 5]])
    group = np.array(["b", "a", "b", "a"])
    assert infer.by_group(x, group).tolist() == [[3.5, 12.5], [2.0, 35.0]]


def test_copies_of_an_image_change_nothing_but_the_counts():
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.3, size=(30, 2)), generator.normal(size=(40, 2))
    once = alone(a, b)
    times, more = generator.integers(1, 6, 30), generator.integers(1, 6, 40)
    groups = np.repeat(names(30, "s"), times), np.repeat(names(40, "r"), more)
    found = infer.infer(np.repeat(a, times, 0), np.repeat(b, more, 0), *groups, None, None, QUICK, 0)
    assert (found["n_suspects"], found["n_reference"]) == (times.sum(), more.sum())
    assert (found["groups_suspects"], found["groups_reference"]) == (30, 40)
    assert found["statistic"] == pytest.approx(once["statistic"], abs=1e-12)
    assert {k: found[k] for k in ("p_value", "power", "verdict")} == {
        k: once[k] for k in ("p_value", "power", "verdict")
    }


# The combination


def test_mean_of_standardised_scores_written_out():
    generator = np.random.default_rng(1)
    a, b = generator.normal(3, 2, size=(12, 3)), generator.normal(3, 2, size=(15, 3))
    found = np.concatenate(infer.combined(a, b, None))
    pooled = np.concatenate([a, b])
    for row, value in zip(pooled, found, strict=True):
        z = [(row[j] - pooled[:, j].mean()) / pooled[:, j].std() for j in range(3)]
        assert value == pytest.approx(sum(z) / 3, abs=1e-12)


def test_log_odds_are_those_of_the_penalised_likelihoods_maximum():
    known = labelled(np.random.default_rng(2), 300, (1.0, -0.5, 0.0))
    z = (known.x - known.x.mean(0)) / known.x.std(0)
    odds = infer.combined(known.x, known.x, known)[0]
    design = np.c_[np.ones(300), z]
    weights, *_ = np.linalg.lstsq(design, odds, rcond=None)
    np.testing.assert_allclose(design @ weights, odds, atol=1e-9)  # linear in the scores
    slope = design.T @ (1 / (1 + np.exp(-odds)) - known.member) + np.r_[0, weights[1:]]  # C = 1, none on the constant
    np.testing.assert_allclose(slope, 0, atol=0.02)
    assert weights[1] > 0.5 and weights[2] < -0.2


def test_known_copies_count_once():
    generator = np.random.default_rng(3)
    known = labelled(generator, 100, (0.5, 0.2))
    times = generator.integers(1, 9, 100)
    copies = Known(*(np.repeat(array, times, 0) for array in (known.x, known.member, known.group)))
    x = generator.normal(size=(20, 2))
    np.testing.assert_allclose(infer.combined(x, x, copies)[0], infer.combined(x, x, known)[0], atol=1e-9)


def test_known_samples_turn_a_reversed_score_round():
    generator = np.random.default_rng(4)
    a, b = generator.normal(-1, size=(60, 1)), generator.normal(size=(60, 1))
    assert alone(a, b)["p_value"] > 0.99
    found = alone(a, b, known=labelled(generator, 200, (-1.0,)))
    assert found["p_value"] < 0.01 and found["combination"] == "logistic regression on 200 known"


def test_combination_and_columns_are_named():
    generator = np.random.default_rng(5)
    a, b = generator.normal(size=(20, 3)), generator.normal(size=(20, 3))
    assert alone(a[:, :1], b[:, :1])["combination"] == "single score"
    found = alone(a, b)
    assert (found["combination"], found["columns_used"]) == ("mean of standardised scores", [0, 1, 2])
    assert found["notes"] == []


def test_constant_columns_are_dropped_with_a_note():
    generator = np.random.default_rng(6)
    a, b = generator.normal(0.5, size=20), generator.normal(size=25)
    still = np.full(20, 0.1), np.full(25, 0.1)  # a tenth: its group means round
    wide = [np.c_[s, x, s] for s, x in zip(still, (a, b), strict=True)]
    groups = np.repeat(names(10, "s"), 2), np.append(names(22, "r"), ["q"] * 3)
    found = infer.infer(*wide, *groups, None, None, QUICK, 0)
    assert found["columns_used"] == [1] and found["notes"] == ["constant columns were dropped: [0, 2]"]
    slim = infer.infer(a[:, None], b[:, None], *groups, None, None, QUICK, 0)
    assert found == slim | {"columns_used": [1], "notes": found["notes"]}


def test_a_column_constant_among_the_known_is_dropped_too():
    generator = np.random.default_rng(7)
    known = labelled(generator, 100, (1.0, 1.0))
    known.x[:, 0] = 3
    found = alone(generator.normal(size=(20, 2)), generator.normal(size=(20, 2)), known=known)
    assert found["columns_used"] == [1]


# False positives. A draw is two non-member sets: (suspects, their groups, reference, its groups, known).

Draw = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Known | None]
SHARED_PART = np.array([1.0, 0.7, 0.2])


def correlated(generator: np.random.Generator, count: int) -> np.ndarray:
    """Three skewed scores, two of them alike: float64[count, 3]."""
    common = generator.gamma(4, size=(count, 1))
    return common * SHARED_PART + generator.gamma(2, size=(count, 3))


def single(generator: np.random.Generator, fitted: bool) -> Draw:
    known = None
    if fitted:
        member = np.arange(80) % 2 == 0
        known = Known(correlated(generator, 80) + 0.5 * member[:, None], member, names(80, "k"))
    return correlated(generator, 30), names(30, "s"), correlated(generator, 40), names(40, "r"), known


def copied(generator: np.random.Generator, fitted: bool) -> Draw:
    """The same with one to seven noisy copies of each image, distributed alike on both sides."""
    a, groups_a, b, groups_b, known = single(generator, fitted)
    sides = []
    for x, group in ((a, groups_a), (b, groups_b)):
        times = generator.integers(1, 8, len(x))
        rows = np.repeat(x, times, 0)
        sides += [rows + generator.normal(0, 0.1, rows.shape), np.repeat(group, times)]
    return (*sides, known)  # type: ignore[return-value]


def p_values(draws: Iterator[Draw], method: str, generator: np.random.Generator) -> np.ndarray:
    found = []
    for a, groups_a, b, groups_b, known in draws:
        sides = infer.combined(infer.by_group(a, groups_a), infer.by_group(b, groups_b), known)
        found.append(infer.p_value(*sides, method, 199, generator))  # 2 of 200: exactly the level
    return np.array(found)


def assert_level(p: np.ndarray) -> None:
    """The level lies within the exact 99 % interval of the rate at which it is reached."""
    hits = int((p <= LEVEL).sum())
    bounds = binomtest(hits, len(p)).proportion_ci(0.99)
    assert bounds.low <= LEVEL <= bounds.high, f"{hits} of {len(p)}"


@pytest.mark.parametrize("fitted", [False, True], ids=["unsupervised", "known"])
@pytest.mark.parametrize("method", infer.METHODS)
@pytest.mark.parametrize("draw", [single, copied])
def test_nonmembers_are_called_members_as_often_as_the_level_says(draw: Callable, method, fitted):
    generator = np.random.default_rng(20)
    p = p_values((draw(generator, fitted) for _ in range(1000)), method, generator)
    assert_level(p)
    assert kstest(p, "uniform").pvalue > 0.001


@pytest.mark.parametrize("method", infer.METHODS)
def test_copies_counted_as_images_would_be_called_members_far_too_often(method):
    """What the groups are for: the same draws as above, each image a group of its own."""
    generator = np.random.default_rng(20)
    draws = (copied(generator, False) for _ in range(300))
    naive = ((a, names(len(a), "s"), b, names(len(b), "r"), None) for a, _, b, _, _ in draws)
    hits = int((p_values(naive, method, generator) <= LEVEL).sum())
    assert binomtest(hits, 300).proportion_ci(0.99).low > 5 * LEVEL, hits


# Real losses of Stable Diffusion 1.5 on LAION-mi


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    """Scores of 2 500 members and of 2 500 non-members, float64[2500, 50]: losses, turned so that high = member."""
    if not REAL.is_file():
        pytest.skip(f"{REAL} is absent: real scores are not part of the project")
    table = pl.read_parquet(REAL)
    score = -table.drop("sample_id", "member").to_numpy().astype(np.float64)
    member = table["member"].to_numpy()
    return score[member], score[~member]


@pytest.mark.parametrize("fitted", [False, True], ids=["unsupervised", "known"])
@pytest.mark.parametrize("method", infer.METHODS)
def test_real_nonmembers_are_called_members_as_often_as_the_level_says(real, method, fitted):
    """A random split of a random part of the non-members, 100 against 400, 1 000 times."""
    members, others = real
    if fitted:
        known = Known(np.r_[members[:500], others[:500]], np.arange(1000) < 500, names(1000, "k"))
        others = infer.combined(others[500:], others[500:], known)[0][:, None]  # fitted once: the same each time
    generator = np.random.default_rng(21)

    def draws() -> Iterator[Draw]:
        for _ in range(1000):
            picked = others[generator.permutation(len(others))[:500]]
            yield picked[:100], names(100, "s"), picked[100:], names(400, "r"), None

    p = p_values(draws(), method, generator)
    assert_level(p)
    assert kstest(p, "uniform").pvalue > 0.001


def test_real_members_are_found_as_a_set_and_need_hundreds(real):
    options = InferOptions(method="welch", guard=False)
    found = alone(*real, options)
    assert found["verdict"] == "member set" and found["p_value"] < 1e-5
    assert found["statistic"] == pytest.approx(0.129, abs=0.001)
    power = {row["size"]: row["power"] for row in found["power"]}
    assert list(power) == [10, 20, 50, 100, 200, 500, 1000, 2500]
    assert power[50] < 0.1 < power[200] < 0.5 < power[500] and found["size_for_80_percent"] == 1000
    assert alone(*real, dataclasses.replace(QUICK, power_sizes=()))["p_value"] == 1 / 1000  # the least there is
    assert alone(*real[::-1], options)["p_value"] > 0.99999


# Power


def test_power_is_that_of_the_closed_form():
    """Subsets of a large normal population against a large reference: Welch's t is close to a noncentral t."""
    shift, q = 0.5, 5000
    grid = norm.ppf((np.arange(q) + 0.5) / q)
    options = InferOptions(power_sizes=(10, 20, 40, 80), power_draws=1000)
    for row in infer.power_curve(grid + shift, grid, options, seed=0)[:-1]:
        size = row["size"]
        exact = nct.sf(student.isf(LEVEL, size - 1), size - 1, shift / np.sqrt(1 / size + 1 / q))
        hits = round(row["power"] * 1000)
        assert binomtest(hits, 1000, exact).pvalue > 0.001, (size, exact)
        bounds = binomtest(hits, 1000).proportion_ci(0.95)
        assert (row["low"], row["high"]) == (bounds.low, bounds.high)


@pytest.mark.parametrize("method", infer.METHODS)
def test_the_test_itself_has_the_power_of_the_closed_form(method):
    shift, q, m = 0.6, 30, 60
    generator = np.random.default_rng(22)
    root = np.sqrt(1 / q + 1 / m)
    exact = nct.sf(student.isf(LEVEL, q + m - 2), q + m - 2, shift / root)
    hits = 0
    for _ in range(500):
        a, b = generator.normal(shift, size=q), generator.normal(size=m)
        hits += infer.p_value(a, b, method, 499, generator) <= LEVEL
    assert binomtest(hits, 500, exact).pvalue > 0.001, (hits, exact)


def test_power_grows_with_size_and_ends_at_the_full_size():
    generator = np.random.default_rng(23)
    options = dataclasses.replace(QUICK, power_sizes=(200, 20, 50, 400, 401), power_draws=200)
    found = alone(generator.normal(0.3, size=400), generator.normal(size=400), options)
    assert [row["size"] for row in found["power"]] == [20, 50, 200, 400]
    assert [row["draws"] for row in found["power"]] == [200, 200, 200, 1]
    power = [row["power"] for row in found["power"]]
    assert power == sorted(power) and power[0] < 0.3 and power[2] > 0.8
    assert all(row["low"] <= row["power"] <= row["high"] for row in found["power"])
    assert found["size_for_80_percent"] == 200
    assert (found["power"][-1]["low"], found["power"][-1]["high"]) == pytest.approx((0.025, 1))


def test_no_size_reaches_80_percent_where_nothing_is_found():
    generator = np.random.default_rng(24)
    found = alone(generator.normal(size=40), generator.normal(size=40))
    assert found["size_for_80_percent"] is None and found["verdict"] == "no evidence"


def test_subsets_without_any_spread_are_not_found_and_raise_no_warning():
    a = np.arange(20) < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = alone(a.astype(float), np.zeros(20), dataclasses.replace(QUICK, power_sizes=(2,)))
    assert found["power"][0]["power"] == 0


# Direction, verdict, invariance


@pytest.mark.parametrize("method", infer.METHODS)
def test_a_set_that_scores_lower_is_no_evidence(method):
    generator = np.random.default_rng(25)
    options = dataclasses.replace(QUICK, method=method)
    for shift in (-0.3, -3.0):
        found = alone(generator.normal(shift, size=50), generator.normal(size=60), options)
        assert found["p_value"] > 0.5 and found["statistic"] < 0 and found["verdict"] == "no evidence"
        assert "below" in found["reason"]
    assert found["p_value"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("guard", "wanted", "shift", "verdict", "said"),
    [
        (CLEAN, True, 1.5, "member set", "above the reference"),
        (CLEAN, True, 0.0, "no evidence", "chance explains"),
        (CLEAN, False, 1.5, "member set", "above the reference"),
        (LEAKY, True, 1.5, "refused", "blind_metadata tells suspects from reference without any model"),
        (LEAKY, False, 1.5, "refused", "AUC 0.731, p = 0.0004"),
        (LEAKY, True, 0.0, "refused", "shift"),
        (None, True, 1.5, "refused", "No caption, URL or image column"),
        (None, False, 1.5, "member set", "no guard looked for a shift"),
        (None, False, 0.0, "no evidence", "no guard looked for a shift"),
        (dataclasses.replace(LEAKY, p_value=0.05), True, 1.5, "refused", "shift"),  # a guard is held to 5 %, not 1 %
        (dataclasses.replace(LEAKY, p_value=0.0501), True, 1.5, "member set", "above"),
    ],
)  # fmt: skip
def test_verdict(guard, wanted, shift, verdict, said):
    generator = np.random.default_rng(26)
    a, b = generator.normal(shift, size=40), generator.normal(size=40)
    found = alone(a, b, dataclasses.replace(QUICK, guard=wanted), guard=guard)
    assert found["verdict"] == verdict and said in found["reason"]
    assert found["reason"][0].isupper() and found["reason"].endswith(".")
    assert found["guard"] == (dataclasses.asdict(guard) if guard else None)
    without = alone(a, b)
    assert (found["p_value"], found["power"]) == (without["p_value"], without["power"])  # reported in every case


def test_the_level_itself_is_reached():
    a, b = np.r_[np.full(10, 9.0) + np.arange(10)], np.arange(12) / 12
    options = dataclasses.replace(QUICK, permutations=99)  # 1 / 100 at best
    found = alone(a, b, options)
    assert (found["p_value"], found["verdict"]) == (0.01, "member set")


def test_order_of_rows_scale_and_origin_of_columns_do_not_matter():
    generator = np.random.default_rng(27)
    a, b = generator.normal(0.4, size=(30, 3)), generator.normal(size=(50, 3))
    groups = np.array([f"s{i // 2}" for i in range(30)]), np.array([f"r{i // 3}" for i in range(50)])
    found = infer.infer(a, b, *groups, None, CLEAN, QUICK, 0)
    i, j = generator.permutation(30), generator.permutation(50)
    scale, origin = np.array([1e-6, 1.0, 3e8]), np.array([0.0, -7.0, 1e9])
    shuffled = infer.infer(a[i], b[j], groups[0][i], groups[1][j], None, CLEAN, QUICK, 0)
    scaled = infer.infer(a * scale + origin, b * scale + origin, *groups, None, CLEAN, QUICK, 0)
    for other in (shuffled, scaled):
        assert other["statistic"] == pytest.approx(found["statistic"], abs=1e-9)
        assert other | {"statistic": 0} == found | {"statistic": 0}


def test_the_same_seed_gives_the_same_and_another_seed_another_result():
    generator = np.random.default_rng(28)
    a, b = generator.normal(0.8, size=60), generator.normal(size=60)
    options = dataclasses.replace(QUICK, power_sizes=(30,), power_draws=200)
    one, again, other = (alone(a, b, options, seed) for seed in (0, 0, 1))
    assert one == again
    assert one["p_value"] != other["p_value"] and one["power"] != other["power"]
    assert one["statistic"] == other["statistic"]


@pytest.mark.parametrize("method", infer.METHODS)
def test_the_result_is_plain_and_complete(method):
    generator = np.random.default_rng(29)
    guard = Guard("blind_image", np.float64(0.6), np.float64(0.2))  # type: ignore[arg-type]
    options = dataclasses.replace(QUICK, method=method)
    found = alone(generator.normal(0.4, size=(30, 2)), generator.normal(size=(40, 2)), options, guard=guard)
    assert list(found) == [
        "verdict", "reason", "p_value", "statistic", "method", "level", "n_suspects", "n_reference", "groups_suspects",
        "groups_reference", "combination", "columns_used", "notes", "guard", "power", "size_for_80_percent",
    ]  # fmt: skip
    assert json.loads(json.dumps(found, allow_nan=False)) == found

    def plain(value: object) -> bool:
        if isinstance(value, (dict, list)):
            return all(map(plain, value.values() if isinstance(value, dict) else value))
        return type(value) in (str, int, float, type(None))

    assert plain(found)


# Errors


def two(seed: int = 30, columns: int = 2) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(20, columns)), generator.normal(size=(25, columns))


@pytest.mark.parametrize(
    ("change", "what", "where"),
    [
        ({"method": "bayes"}, "unknown method 'bayes'", "infer.method"),
        ({"level": 0.0}, "level is 0.0", "infer.level"),
        ({"level": 1.0}, "level is 1.0", "infer.level"),
        ({"permutations": 98}, "98 permutations cannot reach level 0.01", "infer.permutations"),
        ({"power_sizes": (10, 1)}, "power_sizes are (10, 1)", "infer.power_sizes"),
        ({"power_draws": 0}, "power_draws is 0", "infer.power_draws"),
    ],
)
def test_options_out_of_range(change, what, where):
    with pytest.raises(UserError) as caught:
        alone(*two(), dataclasses.replace(QUICK, **change))
    assert (caught.value.what, caught.value.where) == (what, where)


def test_the_methods_and_the_least_permutations_are_named():
    with pytest.raises(UserError, match=r"\['permutation', 'welch'\]"):
        alone(*two(), dataclasses.replace(QUICK, method="t"))
    with pytest.raises(UserError, match="give 999 or more"):
        alone(*two(), dataclasses.replace(QUICK, level=0.001, permutations=500))
    alone(*two(), dataclasses.replace(QUICK, level=0.001, permutations=999))
    alone(*two(), dataclasses.replace(QUICK, level=0.001, permutations=1, method="welch"))


def test_too_few_groups():
    a, b = two()
    with pytest.raises(UserError, match="9 groups of near-duplicates, suspects"):
        infer.infer(a, b, np.array([f"s{min(i, 8)}" for i in range(20)]), names(25, "r"), None, None, QUICK, 0)
    with pytest.raises(UserError, match="9 groups of near-duplicates, reference"):
        alone(a, b[:9])
    alone(a[:10], b[:10])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_scores_that_are_no_numbers(bad, side):
    sides = two()
    sides[side][3, 1] = bad
    with pytest.raises(UserError, match=f"NaN or infinity, {('suspects', 'reference')[side]}, row 3, column 1"):
        alone(*sides)


def test_scores_that_do_not_vary():
    with pytest.raises(UserError, match="every column of scores is constant"):
        alone(np.full((20, 2), 0.1), np.full((25, 2), 0.1))
    a, _ = two()
    with pytest.raises(UserError, match="constant within each side"):  # one is the other turned round
        alone(np.c_[a[:, 0], -a[:, 0]], np.c_[a[:, 1], -a[:, 1]])
    with pytest.raises(UserError, match="not a label of the side"):
        alone(np.full(20, 1.3), np.full(25, 0.1))


def test_sides_of_different_columns():
    with pytest.raises(UserError, match="3 columns of scores where suspects have 2, reference"):
        alone(two()[0], two(columns=3)[1])
    with pytest.raises(UserError, match="3 columns of scores where suspects have 2, known"):
        alone(*two(), known=labelled(np.random.default_rng(0), 100, (0, 0, 0)))


def test_a_group_on_two_sides():
    a, b = two()
    groups = names(20, "s"), np.append(names(24, "r"), "s00007")
    with pytest.raises(UserError, match="1 groups .* in both suspects and reference, group s00007"):
        infer.infer(a, b, *groups, None, None, QUICK, 0)
    for prefix, side in (("s", "suspects"), ("r", "reference")):
        with pytest.raises(UserError, match=f"in both {side} and known, group {prefix}00000"):
            alone(a, b, known=labelled(np.random.default_rng(0), 60, (1, 1), prefix))


def test_known_samples_that_allow_no_fit():
    known = labelled(np.random.default_rng(31), 60, (1, 1))
    with pytest.raises(UserError, match="49 groups of near-duplicates to fit on, known"):
        alone(*two(), known=Known(known.x[:49], known.member[:49], known.group[:49]))
    with pytest.raises(UserError, match="49 groups"):
        alone(
            *two(),
            known=dataclasses.replace(
                known, group=np.array([f"k{min(i, 48)}" for i in range(60)]), member=np.arange(60) < 30
            ),
        )
    with pytest.raises(UserError, match="one class"):
        alone(*two(), known=dataclasses.replace(known, member=np.ones(60, dtype=bool)))
    known.x[2, 0] = np.nan
    with pytest.raises(UserError, match="NaN or infinity, known, row 2, column 0"):
        alone(*two(), known=known)
