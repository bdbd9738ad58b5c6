"""Each distance against closed forms and a slow oracle, and its level under chance."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import scipy.linalg
import scipy.stats

from mia import cli, distance, resampling, tables
from mia.errors import UserError


def cross(*squares: float, centre: tuple[float, ...] = (0.0, 0.0)) -> np.ndarray:
    """Points on the axes with exactly this diagonal covariance (over n - 1) and this mean."""
    n = 2 * len(squares)
    arms = [math.sqrt(s * (n - 1) / 2) for s in squares]
    points = [sign * arm * np.eye(len(squares))[i] for i, arm in enumerate(arms) for sign in (1, -1)]
    return np.array(points) + np.array(centre)


def by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6, as pytorch-fid computes it."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(np.real(root)))


def normal(seed: int, n: int, d: int) -> np.ndarray:
    """Correlated normal vectors."""
    r = np.random.default_rng(seed)
    return r.normal(size=(n, d)) @ r.normal(size=(d, d)) + r.normal(size=d)


def test_cross_is_what_it_says():
    assert np.cov(cross(4.0, 9.0).T) == pytest.approx(np.diag([4.0, 9.0]))


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (cross(4, 9), cross(4, 9), 0),
        (cross(4, 9), cross(4, 9, centre=(3, -4)), 25),  # |shift|^2
        (cross(4, 9), cross(1, 1), (2 - 1) ** 2 + (3 - 1) ** 2),  # sum of (sigma_a - sigma_b)^2
        (cross(4, 9), cross(9, 4), 1 + 1),
        (cross(4, 9), cross(25, 16, centre=(1, 2)), 9 + 1 + 5),
        (cross(4, 0), cross(0, 9), 4 + 9),  # both flat, at right angles
    ],
)
def test_normal_distributions_on_the_axes_by_hand(a, b, wanted):
    assert distance.frechet(a, b) == pytest.approx(wanted, abs=1e-12)


def test_rotation_changes_nothing():
    turn = scipy.linalg.expm(np.array([[0.0, 1.0], [-1.0, 0.0]]))
    assert distance.frechet(cross(4, 9) @ turn, cross(25, 16, centre=(1, 2)) @ turn) == pytest.approx(15, rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 7, 20])
def test_random_data_agree_with_scipys_matrix_root(d):
    a, b = normal(1, 90, d), normal(2, 60, d)
    wanted = by_sqrtm(a, b) if d > 1 else (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert distance.frechet(a, b) == pytest.approx(wanted, rel=1e-9)


def test_fewer_samples_than_dimensions():
    """Singular covariances: scipy's root is only good to some digits there, so it is given a nudge."""
    a, b = normal(3, 12, 30), normal(4, 9, 30)
    nudge = 1e-10 * np.eye(30)
    root = scipy.linalg.sqrtm((np.cov(a.T) + nudge) @ (np.cov(b.T) + nudge))
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * np.trace(root.real)
    assert distance.frechet(a, b) == pytest.approx(wanted, rel=1e-4)


def test_zero_for_one_set_symmetric_and_blind_to_row_order():
    a, b = normal(5, 50, 8), normal(6, 40, 8)
    assert distance.frechet(a, a) == pytest.approx(0, abs=1e-9 * np.trace(np.cov(a.T)))
    assert distance.frechet(a, a[::-1]) == pytest.approx(0, abs=1e-9 * np.trace(np.cov(a.T)))
    assert distance.frechet(a, b) == pytest.approx(distance.frechet(b, a), rel=1e-10)
    assert distance.frechet(a[::-1], b[::-1]) == pytest.approx(distance.frechet(a, b), rel=1e-10)
    assert distance.frechet(a, b) > 0


def test_float32_is_summed_in_float64():
    a, b = normal(7, 60, 4).astype(np.float32) + 1000, normal(8, 60, 4).astype(np.float32) + 1000
    assert distance.frechet(a, b) == pytest.approx(by_sqrtm(a.astype(np.float64), b.astype(np.float64)), rel=1e-6)


# ------------------------------------------------------------------------------------------------ many labellings


def labellings(member: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """The true labels and shuffled ones, bool[1 + count, n]."""
    r = np.random.default_rng(seed)
    return np.stack([member, *(r.permutation(member) for _ in range(count))])


@pytest.mark.parametrize(
    ("n", "m", "d"), [(9, 12, 30), (40, 90, 12), (90, 40, 12), (50, 50, 50), (2, 9, 3), (30, 30, 1)]
)
def test_shared_moments_change_no_frechet_distance(n, m, d):
    """Oracle: the two sides' own covariances, for either side the smaller and fewer rows than columns, or more."""
    x, labels = normal(10, n + m, d), labellings(np.arange(n + m) < n, 5)
    wanted = [distance.frechet(x[row], x[~row]) for row in labels]
    np.testing.assert_allclose(distance.frechets(x, labels), wanted, rtol=1e-7)
    np.testing.assert_allclose(distance.frechets(x + 1e3, labels), wanted, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ kernel


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """Binkowski et al. 2018, eq. 4, pair by pair, of vectors scaled from length 1 to sqrt(d)."""
    d = a.shape[1]
    a, b = math.sqrt(d) * a, math.sqrt(d) * b
    k = lambda x, y: (float(x @ y) / d + 1) ** 3  # noqa: E731
    inside = [sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) for s in (a, b)]
    n, m = len(a), len(b)
    return inside[0] / (n * (n - 1)) + inside[1] / (m * (m - 1)) - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def kernel_value(x: np.ndarray, member: np.ndarray, group: np.ndarray | None = None) -> float:
    group = np.arange(len(x)) if group is None else group
    return float(distance.kernel(x, member[None], group)[0][0])


def test_kernel_distance_of_three_and_three_points_by_hand():
    """On a line at 1, 1, 0 and -1, 0, 0: k = (xy + 1)^3 is 8 for like signs, 0 for unlike ones, 1 beside a zero."""
    x, member = np.array([[1.0], [1.0], [0.0], [-1.0], [0.0], [0.0]]), np.arange(6) < 3
    members, others = (8 + 1 + 1) / 3, (1 + 1 + 1) / 3  # means over the three pairs of each side
    across = (2 * (0 + 1 + 1) + (1 + 1 + 1)) / 9
    assert kernel_value(x, member) == pytest.approx(members + others - 2 * across, rel=1e-14)


def test_kernel_distance_leaves_out_pairs_of_one_group_by_hand():
    """The same six points, of which 1 and 1 are one group, and 0 and -1 another across the sides."""
    x, member = np.array([[1.0], [1.0], [0.0], [-1.0], [0.0], [0.0]]), np.arange(6) < 3
    members, others = (1 + 1) / 2, (1 + 1 + 1) / 3
    across = (2 * (0 + 1 + 1) + (1 + 1)) / 8  # without the pair of 0 and -1
    group = np.array(["a", "a", "b", "b", "c", "d"])
    assert kernel_value(x, member, group) == pytest.approx(members + others - 2 * across, rel=1e-14)


def test_kernel_distance_agrees_with_kid_pair_by_pair(monkeypatch):
    x = normal(11, 25, 4)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels = labellings(np.arange(25) < 11, 4)
    wanted = [kid(x[row], x[~row]) for row in labels]
    whole = distance.kernel(x, labels, np.arange(25))
    np.testing.assert_allclose(whole[0], wanted, rtol=1e-10)
    monkeypatch.setattr(distance, "BLOCK", 75)  # three rows at a time, and one in the last block
    in_blocks = distance.kernel(x, labels, np.arange(25))
    np.testing.assert_allclose(in_blocks[0], wanted, rtol=1e-10)
    assert in_blocks[1] == pytest.approx(whole[1], rel=1e-10)


@pytest.mark.parametrize("copies", [1, 3])
def test_kernel_distance_is_unbiased(copies):
    """Two draws from one distribution, each `copies` times: 0 on average, and below it about as often as not."""
    found, rows = [], np.arange(30).repeat(copies)
    for seed in range(400):
        x = np.random.default_rng(seed).normal(size=(30, 3)) / 2
        found.append(kernel_value(x[rows], rows < 12, rows))
    assert abs(np.mean(found)) < 3.5 * np.std(found) / 20
    assert 0.3 < np.mean(np.array(found) < 0) < 0.8


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_kernel_interval_holds_the_population_distance_in_groups(share):
    """Signs that are + with probability 1/2 and `share`: E k(s, t) is 8 P(alike). Each is drawn once for two rows."""
    alike = [0.5, share**2 + (1 - share) ** 2, 0.5]
    wanted = 8 * (alike[0] + alike[1]) - 16 * alike[2]
    member, group, held, values, reaches = np.arange(280) < 120, np.arange(280) // 2, 0, [], []
    for seed in range(300):
        r = np.random.default_rng(seed)
        sign = np.concatenate([r.random(60) < 0.5, r.random(80) < share]).repeat(2)
        labels = np.concatenate([member[None], *resampling.shuffled(member, group, 50, r)])
        (value, *_), (low, high) = distance.kernel(np.where(sign, 1.0, -1.0)[:, None], labels, group)
        values.append(value)
        reaches.append((high - low) / 2)
        held += low <= wanted <= high
    assert np.mean(values) == pytest.approx(wanted, abs=0.1)  # unbiased, here too
    assert 0.9 < np.mean(reaches) / (1.96 * np.std(values)) < 1.6
    assert held / 300 > 0.85  # one side misses more often: the estimate is skewed


# ------------------------------------------------------------------------------------------------ classifier


def told_apart(x: np.ndarray, member: np.ndarray, group: np.ndarray, seed: int = 0) -> tuple[float, tuple]:
    values, interval = distance.c2st(x, member[None], group, np.random.default_rng(seed))
    return float(values[0]), interval


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 2.0])
def test_classifier_on_shifted_gaussians_reaches_its_closed_form(shift):
    """AUC = Phi(shift / sqrt 2) for the best classifier of two unit Gaussians."""
    r = np.random.default_rng(0)
    member = np.arange(6000) < 2500
    x = r.normal(size=(6000, 5)) @ np.diag([1, 2, 3, 4, 5])
    x[member, 2] += 3 * shift
    value, (low, high) = told_apart(x, member, np.arange(6000))
    assert value == pytest.approx(scipy.stats.norm.cdf(shift / math.sqrt(2)), abs=0.02)
    assert low <= value <= high and high - low < 0.04


def test_classifier_agrees_with_scikit_learns_ridge_fold_by_fold():
    """Oracle: one fit for each labelling and fold; without the intercept, as documented."""
    from sklearn.linear_model import Ridge
    from sklearn.metrics import roc_auc_score

    x, labels, group = normal(12, 90, 6), labellings(np.arange(90) < 40, 3), np.arange(90) // 2
    found, _ = distance.c2st(x, labels, group, np.random.default_rng(5))
    z = (x - x.mean(0)) / x.std(0)
    for row, value in zip(labels, found, strict=True):
        score = np.empty(90)
        for test in distance._folds(group, np.random.default_rng(5)):
            ridge = Ridge(distance.SHRINKAGE * (~test).sum()).fit(z[~test], row[~test])
            score[test] = ridge.predict(z[test]) - ridge.predict(z[~test]).mean()
        assert value == pytest.approx(roc_auc_score(row, score), abs=1e-12)


@pytest.mark.parametrize("size", [1, 3])
def test_classifier_interval_holds_chance_where_there_is_nothing(size):
    """DeLong's variance alone would hold it 80 to 87 times in 100."""
    held = 0
    for seed in range(120):
        r = np.random.default_rng(seed)
        x = np.repeat(r.normal(size=(60, 8)), size, axis=0) + r.normal(size=(60 * size, 8)) / 10
        member, group = np.repeat(r.permutation(np.arange(60) < 20), size), np.arange(60 * size) // size
        low, high = distance.measured(x, member, group, r, 50)["c2st"][1]
        held += low <= 0.5 <= high
    assert held / 120 > 0.9


def test_folds_keep_groups_whole_and_hold_each_row_once():
    group = np.random.default_rng(0).integers(0, 23, 100)
    folds = distance._folds(group, np.random.default_rng(0))
    assert len(folds) == distance.FOLDS and (np.sum(folds, axis=0) == 1).all()
    assert all(len(np.unique(test[group == name])) == 1 for test in folds for name in np.unique(group))
    assert len(distance._folds(np.arange(6) // 3, np.random.default_rng(0))) == 2


def test_a_copy_on_the_other_side_of_a_fold_teaches_nothing():
    """Ten copies of each of 30 vectors in 200 dimensions: split up, the classifier would know each by heart."""
    r = np.random.default_rng(0)
    x, member = np.repeat(r.normal(size=(30, 200)), 10, axis=0), np.repeat(np.arange(30) < 15, 10)
    assert told_apart(x, member, np.arange(300))[0] > 0.95
    assert told_apart(x, member, np.arange(300) // 10)[0] < 0.75


def test_a_perfect_classifier_and_a_column_without_spread():
    x = np.stack([np.r_[np.zeros(20), np.ones(20)], np.full(40, 7.0)], axis=1)
    assert told_apart(x, np.arange(40) >= 20, np.arange(40)) == (1.0, (1.0, 1.0))
    assert told_apart(np.full((40, 2), 7.0), np.arange(40) < 20, np.arange(40))[0] == 0.5


# ------------------------------------------------------------------------------------------------ p-values


def test_p_values_are_uniform_where_labels_mean_nothing_in_groups():
    """Three near-copies of each of 30 vectors share a label. A test of rows one by one finds what is not there."""
    grouped: dict[str, list[float]] = {"frechet": [], "kernel": [], "c2st": []}
    alone: list[float] = []
    for seed in range(150):
        r = np.random.default_rng(seed)
        x = np.repeat(r.normal(size=(30, 3)), 3, axis=0) + r.normal(size=(90, 3)) / 10
        member, group = np.repeat(r.permutation(np.arange(30) < 12), 3), np.arange(90) // 3
        for metric, (values, _) in distance.measured(x, member, group, r, 39).items():
            grouped[metric].append(float((values >= values[0] - 1e-12).mean()))
        values = distance.measured(x, member, np.arange(90), r, 39)["kernel"][0]
        alone.append(float((values >= values[0]).mean()))
    for found in grouped.values():
        assert scipy.stats.kstest(found, "uniform").statistic < 1.63 / math.sqrt(150) + 1 / 40  # 1 % of discrete p
    assert np.mean(np.array(alone) <= 0.05) > 0.2


def test_rows_in_another_order_give_the_same_distances():
    r = np.random.default_rng(1)
    member, group = np.arange(80) < 30, np.array([f"g{i // 2}" for i in range(80)])
    x = r.normal(size=(80, 4)) + member[:, None]
    order = np.argsort(r.random(40)).repeat(2) * 2 + np.tile([0, 1], 40)  # groups move, their own rows stay in order
    one = distance.distances({"image": x}, member, 3, 25, group).to_pylist()
    two = distance.distances({"image": x[order]}, member[order], 3, 25, group[order]).to_pylist()
    for a, b in zip(one, two, strict=True):
        assert a["metric"] == b["metric"]
        for column in ("value", "ci_low", "ci_high"):
            assert a[column] == (b[column] if a[column] is None else pytest.approx(b[column], rel=1e-9, abs=1e-12))


# ------------------------------------------------------------------------------------------------ chance


def measured(x: np.ndarray, member: np.ndarray, seed: int = 0, permutations: int = 100) -> tuple[dict, dict]:
    table = distance.distances({"image": x}, member, seed, permutations)
    rows = {row["metric"]: row for row in tables.check(table, "distance").to_pylist()}
    return rows["frechet"], rows["frechet_chance"]


def test_chance_covers_a_split_that_means_nothing_and_not_one_that_does():
    inside = 0
    for seed in range(30):
        r = np.random.default_rng(seed)
        x, member = r.normal(size=(120, 4)), r.permutation(np.arange(120) < 50)
        found, chance = measured(x, member, seed, 60)
        inside += chance["ci_low"] <= found["value"] <= chance["ci_high"]
        assert 0 < chance["ci_low"] <= chance["value"] <= chance["ci_high"]
    assert inside >= 23  # binomial(30, 0.95 or a little less): 23 has probability below 1e-3
    x[member] += 1.0
    found, chance = measured(x, member)
    assert found["value"] > 2 * chance["ci_high"]


def test_the_table_has_two_rows_for_each_metric_and_space():
    r = np.random.default_rng(0)
    member = np.arange(60) < 20
    spaces = {"image": r.normal(size=(60, 3)), "text": r.normal(size=(60, 5)) + 2.0 * member[:, None]}
    table = tables.check(distance.distances(spaces, member, 0, 50), "distance")
    rows = {(row["space"], row["metric"]): row for row in table.to_pylist()}
    metrics = [name + end for name in ("frechet", "kernel", "c2st") for end in ("", "_chance")]
    assert set(rows) == {(s, m) for s in ("image", "text") for m in metrics}
    assert all((row["n_members"], row["n_nonmembers"]) == (20, 40) for row in rows.values())
    for space, x in spaces.items():
        assert rows[space, "frechet"]["value"] == pytest.approx(by_sqrtm(x[member], x[~member]), rel=1e-9)
        assert rows[space, "frechet"]["ci_low"] is None
    for metric in ("frechet", "kernel", "c2st"):
        assert rows["text", metric]["value"] > rows["text", f"{metric}_chance"]["ci_high"]


def test_chance_is_the_middle_of_shuffled_labels():
    """Oracle: another generator's shuffles give the same level, to the accuracy of 400 of them."""
    r = np.random.default_rng(3)
    x, member = r.normal(size=(80, 3)), np.arange(80) < 30
    _, chance = measured(x, member, permutations=400)
    level = []
    for _ in range(400):
        rows = r.permutation(80)
        level.append(by_sqrtm(x[rows[:30]], x[rows[30:]]))
    assert chance["value"] == pytest.approx(np.median(level), rel=0.15)
    assert chance["ci_high"] == pytest.approx(np.sort(level)[389], rel=0.25)
    assert chance["ci_low"] == pytest.approx(np.sort(level)[10], rel=0.25)


def test_the_seed_decides_chance_and_not_the_distance():
    x, member = normal(9, 60, 3), np.arange(60) < 30
    assert measured(x, member, 1, 20) == measured(x, member, 1, 20)
    one, two = measured(x, member, 1, 20), measured(x, member, 2, 20)
    assert one[0] | {"p_value": 0} == two[0] | {"p_value": 0} and one[1] != two[1]
    other = distance.distances({"text": x}, member, 1, 20).to_pylist()[1]
    assert other["value"] != one[1]["value"]  # each space has shuffles of its own


@pytest.mark.parametrize("members", [0, 1, 4, 5])
def test_a_side_of_fewer_than_two_is_refused(members):
    with pytest.raises(
        UserError, match=f"^{members} members and {5 - members} non-members, dataset, a covariance needs two"
    ):
        distance.distances({"image": np.eye(5)}, np.arange(5) < members, 0)


def test_a_side_of_one_group_is_refused():
    with pytest.raises(UserError, match="^all of one side are one group, dataset, near-duplicates tell nothing apart"):
        distance.distances({"image": np.eye(6)}, np.arange(6) < 3, 0, group=np.array([0, 0, 0, 1, 2, 3]))


def test_a_sample_takes_whole_groups_whatever_the_order_of_rows():
    r = np.random.default_rng(0)
    group = np.array([f"g{i}" for i in r.integers(0, 300, 1000)])
    member = r.random(1000) < 0.4
    rows = distance.sampled(member, group, 400, 3)
    assert 380 <= len(rows) <= 400 and (np.diff(rows) > 0).all()
    taken = set(group[rows])
    assert (np.isin(group, list(taken)) == np.isin(np.arange(1000), rows)).all()
    order = r.permutation(1000)
    assert set(group[order][distance.sampled(member[order], group[order], 400, 3)]) == taken
    assert set(group[distance.sampled(member, group, 400, 4)]) != taken
    for everything in (0, 1000, 5000):
        assert (distance.sampled(member, group, everything, 3) == np.arange(1000)).all()


@pytest.mark.parametrize("share", [0.03, 0.5])
def test_a_sample_takes_the_same_share_of_both_sides_and_passes_over_what_is_too_large(share):
    """700 members, of whom 500 look alike, 9,000 non-members alone, 30 mixed groups: chance would differ by row."""
    sizes = [(1, 0)] * 200 + [(500, 0)] + [(0, 1)] * 9_000 + [(1, 1)] * 30
    group = np.repeat(np.arange(len(sizes)), [sum(size) for size in sizes])
    member = np.concatenate([np.arange(sum(size)) < size[0] for size in sizes])
    for seed in range(20):
        rows = distance.sampled(member, group, int(share * len(group)), seed)
        assert len(rows) <= share * len(group)
        assert abs(member[rows].sum() - min(share * 730, 215 if share == 0.5 else 99)) <= 4
        assert abs((~member[rows]).sum() - share * 9_030) <= 3


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_joins_shards_by_sample_and_refuses_a_lack(tmp_path):
    r = np.random.default_rng(0)
    ids = [tables.sample_id(f"u{i}", "c") for i in range(40)]
    image, text = r.normal(size=(40, 3)).astype(np.float16), r.normal(size=(40, 2)).astype(np.float16)
    dataset = [
        {
            "sample_id": ids[i],
            "url": "u",
            "caption": "c",
            "sha256": "0",
            "member": i % 3 == 0,
            "group": ids[i],
            "part": "test",
            "weight": 1.0,
        }
        for i in range(2, 40)  # two embedded samples are not in the dataset
    ]
    tables.write(tmp_path / "d", pa.Table.from_pylist(dataset, schema=tables.SCHEMAS["dataset"]), "dataset", {})
    for number, rows in enumerate((range(39, 20, -1), range(21))):
        shard = pa.table(
            {
                "sample_id": [ids[i] for i in rows], "image": tables.vector_column(image[list(rows)]),
                "text": tables.vector_column(text[list(rows)]),
            }
        )  # fmt: skip
        tables.write(tmp_path / f"e{number}", shard, "embeddings", {})
    words = [
        "distance",
        "--dataset",
        str(tmp_path / "d"),
        "--embeddings",
        str(tmp_path / "e0"),
        "--output",
        str(tmp_path / "o"),
    ]
    with pytest.raises(UserError, match="^embeddings lack samples of the dataset, --embeddings, give every shard$"):
        cli.commands.main(words, standalone_mode=False)
    assert not (tmp_path / "o").exists()
    cli.commands.main([*words, "--embeddings", str(tmp_path / "e1")], standalone_mode=False)
    rows = {(row["space"], row["metric"]): row["value"] for row in tables.read(tmp_path / "o", "distance").to_pylist()}
    member = np.array([i for i in range(2, 40) if i % 3 == 0])
    others = np.array([i for i in range(2, 40) if i % 3])
    for space, x in (("image", image.astype(np.float64)), ("text", text.astype(np.float64))):
        assert rows[space, "frechet"] == pytest.approx(by_sqrtm(x[member], x[others]), rel=1e-9)


def test_the_command_measures_all_that_dedup_saw(tmp_path):
    """Before dedup: members and candidates, duplicates too, but no row of the controls' pool.

    Thirty candidates copy one of two pictures, a member's and one of published embeddings; each stands in a group of
    its own, as dedup leaves what it drops. Chance must move copies of one picture together.
    """
    r = np.random.default_rng(1)
    ids = [tables.sample_id(f"u{i}", "c") for i in range(170)]
    vectors = r.normal(size=(170, 3)).astype(np.float16)
    vectors[100:130] = [[4, 4, 4]]
    vectors[130:135] = [[-4, 0, 4]]
    pools = ["member"] * 60 + ["candidate"] * 90 + ["control"] * 20
    nearest = [None] * 100 + [ids[7]] * 30 + ["img_emb_0#12"] * 5 + [None] * 35
    rows = [
        {"sample_id": i, "pool": pool, "group": i, "nearest_id": near, "reason": near and "near-duplicate"}
        for i, pool, near in zip(ids, pools, nearest, strict=True)
    ]
    near = pa.Table.from_pylist(rows, schema=tables.SCHEMAS["duplicates"])
    tables.write(tmp_path / "near", near, "duplicates", {})
    both = tables.vector_column(vectors)
    tables.write(tmp_path / "e", pa.table({"sample_id": ids, "image": both, "text": both}), "embeddings", {})
    words = ["distance", "--embeddings", str(tmp_path / "e"), "--output", str(tmp_path / "o"), "--permutations", "99"]
    with pytest.raises(UserError, match="^nothing to measure, or two things, mia distance, give --dataset or"):
        cli.commands.main(words, standalone_mode=False)
    cli.commands.main([*words, "--duplicates", str(tmp_path / "near")], standalone_mode=False)
    rows = tables.read(tmp_path / "o", "distance").to_pylist()
    found = {row["metric"]: row for row in rows if row["space"] == "text"}
    assert {(row["n_members"], row["n_nonmembers"]) for row in found.values()} == {(60, 90)}
    wanted = by_sqrtm(vectors[:60].astype(np.float64), vectors[60:150].astype(np.float64))
    assert found["frechet"]["value"] == pytest.approx(wanted, rel=1e-9)
    some = tmp_path / "some"
    cli.commands.main(
        [*words, "--output", str(some), "--duplicates", str(tmp_path / "near"), "--max-rows", "80"],
        standalone_mode=False,
    )
    row = tables.read(some, "distance").to_pylist()[0]
    assert 45 <= row["n_members"] + row["n_nonmembers"] <= 80
    assert found["frechet"]["p_value"] > 0.2  # by single rows 0.01: no labelling by chance puts the copies on one side
