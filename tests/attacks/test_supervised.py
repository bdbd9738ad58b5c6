"""Each attack that is fitted on labels against its paper's recipe: features from raw tensors, plain scikit-learn calls.

Nothing of `mia` computes what is wanted here; see `recipes`.
"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier

from mia import attacks
from mia.attacks.calibration import Calibration
from mia.attacks.evidence import Evidence
from mia.config import ScoresOptions
from tests.attacks.recipes import Recipes
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
RECIPES = Recipes(MEMBER, KNOWN, GROUP, FOLDS, SEED)
CALIBRATION = Calibration(np.where(KNOWN, MEMBER, False), GROUP, KNOWN, ScoresOptions(folds=FOLDS), SEED)


def clid_losses(cut):
    """L(c) and D of the captions cut and of none, one draw, over 441, 451 and 461."""

    def mean(i, condition):
        each = [WORLD.eps[i, 0] - WORLD.model(i, WORLD.noised(i, t), t, condition) for t in (441, 451, 461)]
        return np.mean([np.mean(e**2) for e in each])

    loss = np.array([mean(i, "cond") for i in range(N)])
    return loss, np.array([[mean(i, c) - loss[i] for c in (*cut, "null")] for i in range(N)])


def secmi_maps(c):
    """|yhat - y| at t = 140, float32[n, 1, 8, 8], and its mean square."""
    maps, errors = [], []
    for i in range(N):
        y = WORLD.z0[i]
        for t in range(0, 150, 10):
            up = step(y, t, t + 10, WORLD.model(i, y, t, c))
            back = step(up, t + 10, t, WORLD.model(i, up, t + 10, c))
            last, y = np.abs(back - y), up
        maps.append(last.astype(np.float32))
        errors.append(np.mean(last**2))
    return np.array(maps).astype(float), np.array(errors)


def below_quantile(c):
    name = "quantile_regression" + ("" if c == "cond" else "_null")
    return RECIPES.below_quantile(name, secmi_maps(c)[1], WORLD.z0)


def gsa(block):
    def make():
        return HistGradientBoostingClassifier(
            max_iter=50, max_depth=2, max_bins=64, learning_rate=0.3, early_stopping=False, random_state=SEED
        )

    return RECIPES.by(make, NORMS[block][:, 0])


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
    "clid threshold": lambda: RECIPES.clid(*clid_losses(("p1", "p2", "p3"))),
    "clid_null threshold": lambda: RECIPES.clid(*clid_losses(())),
    "clid_vector vector": lambda: RECIPES.clid_trees(*clid_losses(("p1", "p2", "p3"))),
    "secmi_nn map@140": lambda: RECIPES.secmi_net(secmi_maps("cond")[0]),
    "secmi_nn_null map@140": lambda: RECIPES.secmi_net(secmi_maps("null")[0]),
    "quantile_regression q05@140": lambda: below_quantile("cond"),
    "quantile_regression_null q05@140": lambda: below_quantile("null"),
    "pang_classifier all": lambda: RECIPES.by_net(pang()),
    "fsca all": lambda: RECIPES.by_net(streams(True)),
    "fsca_model model": lambda: RECIPES.by_net(streams(False)),
    "blind_pair pair": lambda: RECIPES.by_net(PICTURES[:, :1, 2].astype(float)),
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
