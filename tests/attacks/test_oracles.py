"""Each attack against its paper's formula, written out in plain loops over the raw tensors of a random world."""

from __future__ import annotations

import numpy as np
import pytest

from mia import attacks
from mia.attacks import clid
from mia.attacks.evidence import Evidence
from tests.attacks.world import CROPS, GRID, alpha, arrow, random_world, rows_of, sigma, step

WORLD = random_world(n=5)
FOUND = Evidence([arrow(rows_of(WORLD))], WORLD.shape)
N, DRAWS = 5, 2


def predicted(i, z, t, condition):
    return WORLD.model(i, z, t, condition)


def error(i, t, draw, condition):
    """The vector eps - e(z_t, t, c)."""
    z = alpha(t) * WORLD.z0[i] + sigma(t) * WORLD.eps[i, draw]
    return WORLD.eps[i, draw] - predicted(i, z, t, condition)


def mse_of_crop(i, t, condition):
    z = alpha(t) * WORLD.crop[i] + sigma(t) * WORLD.eps[i, 0]
    return np.mean((WORLD.eps[i, 0] - predicted(i, z, t, condition)) ** 2)


def of_loss(i, c):
    out = {f"mse@{t:03d}": -np.mean([np.mean(error(i, t, d, c) ** 2) for d in range(DRAWS)]) for t in GRID}
    return out | {"mean": np.mean([out[f"mse@{t:03d}"] for t in range(1, 1000, 100)])}


def of_denoising_loss(i, c):
    return {"l2@101": -np.mean([np.sqrt(np.sum(error(i, 101, d, c) ** 2)) for d in range(DRAWS)])}


def of_multiple_loss(i, c):
    return {f"l2@{t:03d}": -np.sqrt(np.sum(error(i, t, 0, c) ** 2)) for t in range(1, 1000, 100)}


def of_summed_loss(i, c):
    return {"sum": -sum(np.sum(error(i, t, 0, c) ** 2) for t in GRID if 11 <= t <= 501)}


def of_secmi(i, c):
    out, y = {}, WORLD.z0[i]
    for t in range(0, 150, 10):
        after = step(y, t, t + 10, predicted(i, y, t, c))
        back = step(after, t + 10, t, predicted(i, after, t + 10, c))
        out[f"error@{t:03d}"] = -np.sum((back - y) ** 2) / y.size
        y = after
    return out


def of_secmi_copymark(i, c):
    z = alpha(51) * WORLD.z0[i] + sigma(51) * WORLD.eps[i, 0]
    there = step(z, 51, 61, predicted(i, z, 51, c))
    return {"error@051": -np.mean((step(there, 61, 51, predicted(i, there, 61, c)) - z) ** 2)}


def of_pia(i, c, scaled=False):
    e0 = predicted(i, WORLD.z0[i], 0, c)
    if scaled:
        e0 = e0 / np.mean(np.abs(e0)) * np.sqrt(2 / np.pi)
    out = {}
    for t in (200,) if scaled else (100, 200, 300, 400, 500):
        e = predicted(i, alpha(t) * WORLD.z0[i] + sigma(t) * e0, t, c)
        for p in (1, 4, 5):
            out[f"l{p}@{t:03d}"] = -sum(abs(a - b) ** p for a, b in zip(e0.ravel(), e.ravel(), strict=True))
    return out


def of_pian(i, c):
    return of_pia(i, c, scaled=True)


def pfami_losses(i, c, draw):
    return [(np.mean(error(i, t, draw, c) ** 2), mse_of_crop(i, t, c)) for t in CROPS]


def of_pfami(i, c):
    rises = [(crop - loss) / loss for loss, crop in pfami_losses(i, c, 0)]
    return {"mean": np.mean(rises)} | {f"rise@{t:03d}": r for t, r in zip(CROPS, rises, strict=True)}


def of_pfami_copymark(i, c):
    d = WORLD.z0[i].size
    return {"sum": -sum((d * loss - d * crop) / (d * loss + 1e-6) for loss, crop in pfami_losses(i, c, 1))}


def of_pfami_clid(i, c):
    return {"mean": np.mean([crop - loss for loss, crop in pfami_losses(i, c, 1)])}


def of_pfami_sima(i, c):
    return {"mean": np.mean([(loss - crop) ** 2 for loss, crop in pfami_losses(i, c, 1)])}


def of_sima(i, c):
    return {f"l4@{t:03d}": -np.sum(predicted(i, WORLD.z0[i], t, c) ** 4) for t in range(0, 200, 10)}


def of_sima_mc(i, c):
    out = {}
    for t in GRID:
        each = [np.sum(predicted(i, WORLD.noised(i, t, d), t, c) ** 4) for d in range(DRAWS)]
        out[f"l4@{t:03d}"] = -sum(each) / DRAWS
    return out


def of_noise_aggregation(i, c):
    z, seen = WORLD.noised(i, 101), []
    for k in range(5):
        seen.append(predicted(i, z, 101 - 10 * k, c))
        z = step(z, 101 - 10 * k, 91 - 10 * k, seen[-1])
    apart = [np.sqrt(np.sum((seen[a] - seen[b]) ** 2)) for a in range(5) for b in range(a + 1, 5)]
    assert len(apart) == 10
    return {"l2@101": -np.mean(apart)}


def bands(i, t, draw, c):
    """Low: each 2x2 block replaced by its mean; high: what that leaves. They are orthogonal."""
    d = error(i, t, draw, c)
    blocks = d.reshape(2, 2, 2, 2, 2).mean(axis=(2, 4))
    low = np.repeat(np.repeat(blocks, 2, axis=1), 2, axis=2)
    return np.mean(low**2), np.mean((d - low) ** 2)


def of_frequency_low(i, c):
    return {f"low@{t:03d}": -np.mean([bands(i, t, d, c)[0] for d in range(DRAWS)]) for t in GRID}


def of_frequency_high(i, c):
    return {f"high@{t:03d}": -np.mean([bands(i, t, d, c)[1] for d in range(DRAWS)]) for t in GRID}


def of_memorisation(i, c):
    out = {}
    for t in GRID:
        zs = [WORLD.noised(i, t, d) for d in range(DRAWS)]
        out[f"norm@{t:03d}"] = np.mean(
            [np.linalg.norm(predicted(i, z, t, "cond") - predicted(i, z, t, "null")) for z in zs]
        )
    return out | {"mean": np.mean([out[f"norm@{t:03d}"] for t in range(1, 1000, 100)])}


ORACLES = {name.removeprefix("of_"): f for name, f in list(globals().items()) if name.startswith("of_")}
GREY = {n for n, a in attacks.REGISTRY.items() if a.access == "grey" and a.module and not a.labels}


def test_every_unsupervised_grey_box_attack_has_an_oracle():
    assert set(ORACLES) == GREY


@pytest.mark.parametrize("name", sorted(GREY))
def test_it_is_its_papers_formula(name):
    twins = {"": "cond", attacks.TWIN: "null"} if attacks.REGISTRY[name].paired else {"": "cond"}
    wanted = {
        (name + suffix, variant, i): value
        for suffix, c in twins.items()
        for i in range(N)
        for variant, value in ORACLES[name](i, c).items()
    }
    found = {(a, v, i): score[i] for a, v, score in attacks.run(name, FOUND) for i in range(N)}
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[k] for k in wanted], list(wanted.values()), rtol=1e-5 if "nois" in name else 1e-9)


@pytest.mark.parametrize("prompts", [("prompt-1", "prompt-2", "prompt-3"), ()])
def test_the_losses_of_clid(prompts):
    loss, rises = clid.losses(FOUND, clid.Options(prompts=prompts))
    for i in range(N):

        def mean(condition, i=i):
            return np.mean([np.mean(error(i, t, 0, condition) ** 2) for t in (441, 451, 461)])

        np.testing.assert_allclose(loss[i], mean("cond"), rtol=1e-9)
        others = [c.replace("prompt-", "p") for c in prompts] + ["null"]
        np.testing.assert_allclose(rises[i], [mean(c) - mean("cond") for c in others], rtol=1e-7)
