"""One stream for each (seed, name, draw, purpose), whatever else is drawn; folds that keep groups whole."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from mia import rng, tables
from mia.errors import UserError

IDS = [tables.sample_id(f"u{i}", "c") for i in range(60)]
SHAPE = (4, 8, 8)


def test_noise_is_pinned():
    """Every result rests on these numbers: a change of key, generator or numpy's sampler must not go unseen."""
    assert rng.stream(0, "x").random() == 0.05406208637596821
    found = rng.noise(7, ["a" * 32, "b" * 32], [0, 3], "eps", (2,))
    wanted = [[-1.0802112817764282, -0.606216549873352], [-0.5948355793952942, -0.0256731566041708]]
    assert found.tolist() == wanted


def test_noise_is_philox_under_the_documented_key():
    key = hashlib.blake2b(b"7\x1f" + b"b" * 32 + b"\x1f3\x1feps", digest_size=16).digest()
    words = np.frombuffer(key, dtype="<u8")
    oracle = np.random.Generator(np.random.Philox(key=words)).standard_normal(5, dtype=np.float32)
    assert rng.noise(7, ["b" * 32], [3], "eps", (5,))[0].tolist() == oracle.tolist()


def test_each_row_is_its_own_whatever_the_batch_order_or_subset():
    draws = [i % 5 for i in range(60)]
    together = rng.noise(3, IDS, draws, "eps", SHAPE)
    order = np.random.default_rng(0).permutation(60)
    shuffled = rng.noise(3, [IDS[i] for i in order], [draws[i] for i in order], "eps", SHAPE)
    assert (shuffled == together[order]).all()
    for start, stop in ((0, 1), (1, 8), (8, 60)):
        assert (rng.noise(3, IDS[start:stop], draws[start:stop], "eps", SHAPE) == together[start:stop]).all()
    assert (rng.noise(3, [IDS[7]] * 2, [2, 2], "eps", SHAPE) == together[7]).all()


def test_a_larger_shape_does_not_touch_other_rows():
    one = rng.noise(0, IDS[:2], [0, 0], "eps", (10_000,))
    assert (rng.noise(0, IDS[1:2], [0], "eps", (3,))[0] == one[1, :3]).all()


def test_streams_differ_by_seed_name_draw_and_purpose():
    keys = list(itertools.product((0, 1, 11), ("a", "b", "a1", ""), (0, 1, 11), ("", "eps", "split", "1")))
    firsts = {rng.stream(*key).random() for key in keys}
    assert len(firsts) == len(keys) == 144


def test_neighbouring_streams_are_independent():
    base = rng.noise(0, IDS, [0] * 60, "eps", SHAPE).ravel().astype(np.float64)
    others = {
        "seed": rng.noise(1, IDS, [0] * 60, "eps", SHAPE), "draw": rng.noise(0, IDS, [1] * 60, "eps", SHAPE),
        "purpose": rng.noise(0, IDS, [0] * 60, "start", SHAPE),
        "id": rng.noise(0, IDS[1:] + IDS[:1], [0] * 60, "eps", SHAPE),
    }  # fmt: skip
    for kind, other in others.items():
        assert abs(np.corrcoef(base, other.ravel())[0, 1]) < 5 / len(base) ** 0.5, kind


def test_noise_is_standard_normal():
    x = rng.noise(0, IDS, range(60), "eps", SHAPE).astype(np.float64).ravel()
    n = len(x)
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert abs((np.abs(x) < 1).mean() - 0.682689) < 5 * (0.2166 / n) ** 0.5


def test_noise_is_float32_of_the_asked_shape():
    found = rng.noise(0, IDS[:3], (0, 1, 2), "eps", SHAPE)
    assert found.dtype == np.float32 and found.shape == (3, *SHAPE)
    assert rng.noise(0, [], [], "eps", SHAPE).shape == (0, *SHAPE)


def test_ids_and_draws_of_unlike_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        rng.noise(0, IDS[:2], [0], "eps", SHAPE)


def test_the_global_generator_is_left_alone():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    rng.noise(0, IDS, [0] * 60, "eps", SHAPE)
    assert (np.random.get_state()[1] == before).all()


# ------------------------------------------------------------------------------------------------ folds


def population(groups: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Groups of one to three rows; a third of the groups positive, every tenth group mixed."""
    group, positive = [], []
    for number in range(groups):
        for row in range(1 + number % 3):
            group.append(f"g{number:02d}")
            positive.append(number % 10 == 9 and row == 0 or number % 10 != 9 and number % 3 == 0)
    return np.array(positive), np.array(group)


def test_every_row_is_tested_once_by_a_fold_that_never_saw_its_group():
    positive, group = population()
    split = rng.folds(4, positive, group, 0, "here")
    assert len(split) == 4
    assert sorted(np.concatenate([test for _, test in split])) == list(range(len(group)))
    for train, test in split:
        assert not set(group[train]) & set(group[test])
        assert sorted([*train, *test]) == list(range(len(group)))


def test_folds_have_like_shares_of_the_positive():
    positive, group = population(200)
    shares = [positive[test].mean() for _, test in rng.folds(4, positive, group, 0, "here")]
    assert np.ptp(shares) < 0.06 and abs(np.mean(shares) - positive.mean()) < 0.02


def test_folds_differ_by_seed_only():
    positive, group = population()

    def first(seed: int) -> list[int]:
        return rng.folds(4, positive, group, seed, "here")[0][1].tolist()

    assert first(0) == first(0) != first(1)


@pytest.mark.parametrize("few", [True, False])
def test_too_few_groups_on_one_side_are_refused(few):
    positive, group = np.array([few] * 4 + [not few] * 8), np.array(list("aabb") + list("cdefghij"))
    with pytest.raises(UserError, match="^one class has 2 groups for 3 folds, audit.folds, lower it, or bring more"):
        rng.folds(3, positive, group, 0, "audit.folds")
    assert len(rng.folds(2, positive, group, 0, "audit.folds")) == 2
