"""Each attack that is fitted on labels against its paper's recipe: features from raw tensors, plain scikit-learn calls.

Nothing of `mia` computes what is wanted here, but for the bag's random streams. Calibration rows are scored by the fit
on the other folds, rows of the test part by the fit on all of calibration.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from sklearn.neural_network import MLPClassifier

from mia import attacks, rng
from mia.attacks.calibration import Calibration
from mia.attacks.evidence import Evidence
from mia.config import ScoresOptions
from tests.attacks.world import alpha, arrow, random_world, rows_of, sigma, step, vector_rows

N, FOLDS, SEED = 192, 3, 4
WORLD = random_world(N, draws=1, shape=(1, 8, 8))
DRAWN = np.random.default_rng(5)
MEMBER = DRAWN.permutation(np.arange(N) % 2 == 0)
KNOWN = DRAWN.permutation(np.arange(N) % 3 > 0)  # 128 of calibration, 64 of test
GROUP = np.array([f"g{i // 2}" for i in range(N)])  # pairs, of which one may be a member and one not
NORMS = {
    block: (DRAWN.gamma(2, size=(N, 1, 6)) + MEMBER[:, None, None]).astype(np.float32) for block in ("gsa1", "gsa2")
}
PICTURES = DRAWN.normal(size=(N, 5, 5)).astype(np.float32) + 0.5 * MEMBER[:, None, None].astype(np.float32)
PICTURES[..., 2] = PICTURES[:, :1, 2]  # of the pair alone

FOUND = Evidence(
    [arrow(rows_of(WORLD) + [row for name in NORMS for row in vector_rows(name, NORMS[name])]
           + vector_rows("generations", PICTURES), channels=1)], WORLD.shape,
)  # fmt: skip
CALIBRATION = Calibration(np.where(KNOWN, MEMBER, False), GROUP, KNOWN, ScoresOptions(folds=FOLDS), SEED)


def out_of_fold(fit):
    """`fit(train)` gives a score for every row; each row's is taken from the fit that did not see it."""
    rows, out = np.flatnonzero(KNOWN), np.full(N, np.nan)
    split = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=SEED)
    for train, test in split.split(rows, MEMBER[rows], GROUP[rows]):
        out[rows[test]] = fit(rows[train])[rows[test]]
    out[~KNOWN] = fit(rows)[~KNOWN]
    return out


def by(make, x):
    """Out of fold by a classifier."""
    return out_of_fold(lambda train: make().fit(x[train], MEMBER[train]).predict_proba(x)[:, 1])


def by_net(x):
    """Ten rectified units by Adam in batches of 32; a fifth held out; the weights before the first bad epoch.

    Columns are scaled to mean 0 and variance 1 of the rows fitted on.
    """

    def fit(train):
        mean, spread = x[train].mean(axis=0), x[train].std(axis=0)
        scaled = (x - mean) / np.where(spread == 0, 1, spread)
        a, held, y, held_y = train_test_split(
            scaled[train], MEMBER[train], test_size=0.2, stratify=MEMBER[train], random_state=SEED
        )
        net = MLPClassifier(
            (10,), alpha=0.0, learning_rate_init=1e-3, batch_size=32, random_state=np.random.RandomState(SEED)
        )
        kept, least = None, np.inf
        for _ in range(100):
            net.partial_fit(a, y, classes=[False, True])
            said = net.predict_proba(held)[:, 1]
            loss = -np.mean([np.log(p if truth else 1 - p) for p, truth in zip(said, held_y, strict=True)])
            if loss >= least:
                break
            kept, least = copy.deepcopy(net), loss
        return kept.predict_proba(scaled)[:, 1]

    return out_of_fold(fit)


def clid_losses(cut):
    """L(c) and D of the captions cut and of none, one draw, over 441, 451 and 461."""

    def mean(i, condition):
        each = [WORLD.eps[i, 0] - WORLD.model(i, WORLD.noised(i, t), t, condition) for t in (441, 451, 461)]
        return np.mean([np.mean(e**2) for e in each])

    loss = np.array([mean(i, "cond") for i in range(N)])
    return loss, np.array([[mean(i, c) - loss[i] for c in (*cut, "null")] for i in range(N)])


def area(score, member):
    pairs = [(a > b) + (a == b) / 2 for a in score[member] for b in score[~member]]
    return sum(pairs) / len(pairs)


def clid_by_threshold(cut):
    loss, rises = clid_losses(cut)

    def fit(train):
        def robust(x):
            low, middle, high = np.percentile(x[train], [25, 50, 75])
            return (x - middle) / (high - low)

        first, second = robust(loss), robust(-np.mean(rises, axis=1))
        best, score = -1.0, None
        for tenth in range(11):
            mixed = -((1 - tenth / 10) * first + tenth / 10 * second)
            if area(mixed[train], MEMBER[train]) > best + 1e-12:
                best, score = area(mixed[train], MEMBER[train]), mixed
        return score

    return out_of_fold(fit)


def secmi_maps(c):
    """|yhat - y| at t = 140, float32[n, 8, 8], and its mean square."""
    maps, errors = [], []
    for i in range(N):
        y = WORLD.z0[i]
        for t in range(0, 150, 10):
            up = step(y, t, t + 10, WORLD.model(i, y, t, c))
            back = step(up, t + 10, t, WORLD.model(i, up, t + 10, c))
            last, y = np.abs(back - y)[0], up
        maps.append(last.astype(np.float32))
        errors.append(np.mean(last**2))
    return np.array(maps).astype(float), np.array(errors)


def secmi_net(c):
    maps, _ = secmi_maps(c)
    squares = [(y, x) for y in range(0, 8, 2) for x in range(0, 8, 2)]
    return by_net(np.array([[m[y : y + 2, x : x + 2].mean() for y, x in squares] for m in maps]))


def below_quantile(c):
    """Minus log error over the .05 quantile that a bag of five predicts from energy and low frequencies of z0."""
    name = "quantile_regression" + ("" if c == "cond" else "_null")
    log_error = np.log(secmi_maps(c)[1])
    x = []
    for z in WORLD.z0:
        energy = float(np.sum(z**2))
        low = sum(4 * np.mean(z[0, y : y + 2, x : x + 2]) ** 2 for y in range(0, 8, 2) for x in range(0, 8, 2))
        x.append([np.log(energy), low / energy])
    x = np.array(x)

    def fit(train):
        rows = train[~MEMBER[train]]
        total = np.zeros(N)
        for k in range(5):
            some = rows[rng.stream(SEED, name, k, "bag").integers(len(rows), size=len(rows))]
            trees = HistGradientBoostingRegressor(
                loss="quantile", quantile=0.05, max_iter=50, max_leaf_nodes=8, min_samples_leaf=min(50, len(rows) // 4),
                random_state=SEED, early_stopping=False,
            )  # fmt: skip
            total += trees.fit(x[some], log_error[some]).predict(x) / 5
        return total - log_error

    return out_of_fold(fit)


def gsa(block):
    def make():
        return HistGradientBoostingClassifier(
            max_iter=50, max_depth=2, max_bins=64, learning_rate=0.3, early_stopping=False, random_state=SEED
        )

    return by(make, NORMS[block][:, 0])


def clid_trees():
    def make():
        return GradientBoostingClassifier(
            n_estimators=20, max_depth=3, learning_rate=0.3, subsample=0.7, max_features=0.7, random_state=SEED
        )

    loss, rises = clid_losses(("p1", "p2", "p3"))
    return by(make, np.column_stack([loss, rises]))


def streams(with_pair):
    """FSCA's: of each caption's five pictures the sorted cosines with the image, and those with the text."""
    kept = PICTURES.astype(float)
    x = [
        sorted(one[:, 0]) + sorted(p[1] - (p[2] if with_pair else 0) for p in one)
        for one in kept
    ]  # fmt: skip
    return np.array(x)


def pang():
    """Sorted cosines with the first three pictures, and means of the token-wise mean and maximum."""
    kept = PICTURES.astype(float)[:, :3]
    return np.array([[*sorted(one[:, 0]), one[:, 3].mean(), one[:, 4].mean()] for one in kept])


WANTED = {
    "gsa1 all": lambda: gsa("gsa1"),
    "gsa2 all": lambda: gsa("gsa2"),
    "clid threshold": lambda: clid_by_threshold(("p1", "p2", "p3")),
    "clid_null threshold": lambda: clid_by_threshold(()),
    "clid_vector vector": clid_trees,
    "secmi_nn map@140": lambda: secmi_net("cond"),
    "secmi_nn_null map@140": lambda: secmi_net("null"),
    "quantile_regression q05@140": lambda: below_quantile("cond"),
    "quantile_regression_null q05@140": lambda: below_quantile("null"),
    "pang_classifier all": lambda: by_net(pang()),
    "fsca all": lambda: by_net(streams(True)),
    "fsca_model model": lambda: by_net(streams(False)),
    "blind_pair pair": lambda: by_net(PICTURES[:, :1, 2].astype(float)),
}
LABELLED = [name for name, attack in attacks.REGISTRY.items() if attack.labels and attack.module]


def test_the_worlds_schedule_is_stable_diffusions():
    assert alpha(300) ** 2 == pytest.approx(0.59050, abs=1e-5) and sigma(300) ** 2 == pytest.approx(0.4095, abs=1e-5)


@pytest.mark.parametrize("name", LABELLED)
def test_it_is_the_recipe_of_its_paper(name):
    found = {f"{a} {v}": score for a, v, score in attacks.run(name, FOUND, CALIBRATION)}
    mine = {name} | {twin for twin, main in attacks.TWINS.items() if main == name}
    wanted = {key: oracle() for key, oracle in WANTED.items() if key.split()[0] in mine}
    assert found.keys() == wanted.keys()
    for key, score in wanted.items():
        assert len(np.unique(score)) > 5, key  # a constant would agree with anything
        np.testing.assert_allclose(found[key], score, rtol=1e-5, err_msg=key)
