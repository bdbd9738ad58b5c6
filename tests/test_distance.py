"""The Fréchet distance against closed forms and scipy's matrix root, and its level under chance."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import scipy.linalg

from mia import cli, distance, tables
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


def test_the_table_has_two_rows_for_each_space():
    r = np.random.default_rng(0)
    member = np.arange(60) < 20
    spaces = {"image": r.normal(size=(60, 3)), "text": r.normal(size=(60, 5)) + 2.0 * member[:, None]}
    table = tables.check(distance.distances(spaces, member, 0, 50), "distance")
    rows = {(row["space"], row["metric"]): row for row in table.to_pylist()}
    assert set(rows) == {(s, m) for s in ("image", "text") for m in ("frechet", "frechet_chance")}
    assert all((row["n_members"], row["n_nonmembers"]) == (20, 40) for row in rows.values())
    for space, x in spaces.items():
        assert rows[space, "frechet"]["value"] == pytest.approx(by_sqrtm(x[member], x[~member]), rel=1e-9)
        assert rows[space, "frechet"]["ci_low"] is None
    assert rows["text", "frechet"]["value"] > rows["text", "frechet_chance"]["ci_high"]


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
    assert one[0] == two[0] and one[1] != two[1]
    other = distance.distances({"text": x}, member, 1, 20).to_pylist()[1]
    assert other["value"] != one[1]["value"]  # each space has shuffles of its own


@pytest.mark.parametrize("members", [0, 1, 4, 5])
def test_a_side_of_fewer_than_two_is_refused(members):
    with pytest.raises(
        UserError, match=f"^{members} members and {5 - members} non-members, dataset, a covariance needs two"
    ):
        distance.distances({"image": np.eye(5)}, np.arange(5) < members, 0)


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
