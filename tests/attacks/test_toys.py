"""Toys with a closed form: the distribution of their scores is known, so a measured TPR has a true value to meet."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mia import attacks
from mia.attacks.evidence import Evidence
from mia.metrics import exact_interval, tpr_at_fpr
from tests.attacks.world import World, alpha, arrow, memorising_world, rows_of, sigma

N, FPR = 500, 0.01


@pytest.fixture(scope="module")
def gaussian():
    """Images from N(0, 1), the model's best guess for them is linear; members are less bright, N(0, .49).

    With e(z, t) = sigma z, the optimal denoiser of N(0, 1), every score is a known sum of squares or fourth powers.
    """
    generator = np.random.default_rng(0)
    member = np.arange(2 * N) < N
    scale = np.where(member, 0.7, 1.0)
    z0 = generator.normal(size=(2 * N, 1, 2, 2)) * scale[:, None, None, None]
    world = World(z0, generator.normal(size=(2 * N, 1, 1, 2, 2)), lambda i, z, t, c: sigma(t) * z)
    kept = [r for r in rows_of(world) if not r["block"].endswith("-null")]
    return Evidence([arrow(kept, channels=1)], world.shape), member


def score(found, name, variant):
    return next(score for a, v, score in attacks.run(name, found) if (a, v) == (name, variant))


def agrees(score, member, scale, ratio, cdf, ppf):
    """Rates at the threshold that truly has an FPR of 1 %, and the TPR at the measured one, within 99.9 %.

    Minus the score is `scale` times a number of known distribution (`cdf`, `ppf`), and for members `ratio` times that.
    """
    bar = -ppf(FPR) * scale
    for side, truth in ((~member, FPR), (member, cdf(ppf(FPR) / ratio))):
        low, high = exact_interval(int((score[side] >= bar).sum()), N, 0.999)
        assert low <= truth <= high, truth
    # The measured threshold lies between the k-th and the next highest non-member: its true FPR is a beta variable.
    k = int(FPR * N)
    least, most = stats.beta.ppf(0.0005, k, N - k + 1), stats.beta.ppf(0.9995, k + 1, N - k)
    low = stats.binom.ppf(0.0005, N, cdf(ppf(least) / ratio)) / N
    high = stats.binom.ppf(0.9995, N, cdf(ppf(most) / ratio)) / N
    assert low <= tpr_at_fpr(score, member, FPR).tpr <= high
    assert cdf(ppf(FPR) / ratio) > 1.5 * FPR  # else chance would pass, too


CHI = (lambda x: stats.chi2.cdf(x, 4), lambda p: stats.chi2.ppf(p, 4))


@pytest.fixture(scope="module")
def fourth():
    """The same of sums of four fourth powers, from a million draws."""
    z = np.sort((np.random.default_rng(1).normal(size=(1_000_000, 4)) ** 4).sum(axis=1))
    return lambda x: np.searchsorted(z, x) / len(z), lambda p: np.quantile(z, p)


@pytest.mark.parametrize("t", [301, 501, 901])
def test_the_loss_has_the_rate_that_the_chi_square_says(gaussian, t):
    """eps - e = alpha (alpha eps - sigma z0): variance alpha^2 (alpha^2 + sigma^2 s^2) a coordinate."""
    found, member = gaussian
    spread = [alpha(t) ** 2 * (alpha(t) ** 2 + (sigma(t) * s) ** 2) for s in (0.7, 1.0)]
    agrees(score(found, "loss", f"mse@{t:03d}"), member, spread[1] / 4, spread[0] / spread[1], *CHI)


@pytest.mark.parametrize("t", [10, 140])
def test_secmi_has_the_rate_that_the_chi_square_says(gaussian, t):
    """The chain is y_t = c_t z0 with a number c_t, and so is its error."""
    found, member = gaussian
    c = 1.0
    for u in range(0, t + 10, 10):
        before, c = c, alpha(u + 10) * (c - sigma(u) * sigma(u) * c) / alpha(u) + sigma(u + 10) * sigma(u) * c
    e = sigma(t + 10) * c
    back = alpha(t) * (c - sigma(t + 10) * e) / alpha(t + 10) + sigma(t) * e - before
    agrees(score(found, "secmi", f"error@{t:03d}"), member, back**2 / 4, 0.49, *CHI)


@pytest.mark.parametrize("t", [0, 100, 190])
def test_sima_has_its_known_rate(gaussian, fourth, t):
    found, member = gaussian
    agrees(score(found, "sima", f"l4@{t:03d}"), member, sigma(t) ** 4, 0.7**4, *fourth)


def test_pia_has_its_known_rate(gaussian, fourth):
    """e0 = sigma_0 z0, and e - e0 = (sigma (alpha + sigma sigma_0) - sigma_0) z0."""
    found, member = gaussian
    c = sigma(200) * (alpha(200) + sigma(200) * sigma(0)) - sigma(0)
    agrees(score(found, "pia", "l4@200"), member, c**4, 0.7**4, *fourth)


@pytest.mark.parametrize(
    ("name", "variant"), [("loss", "mse@101"), ("sima", "l4@190"), ("pia", "l4@200"), ("secmi", "error@140")]
)
def test_a_control_that_has_seen_neither_side_is_at_chance(gaussian, name, variant):
    """Both sides are of one kind: the TPR at 5 % FPR is 5 %, four standard deviations of which are .08 here."""
    found, _ = gaussian
    some = score(found, name, variant)[N:]
    half = np.random.default_rng(3).permutation(N) < N // 2
    assert abs(tpr_at_fpr(some, half, 0.05).tpr - 0.05) < 0.08


def test_a_model_that_holds_its_training_images_gives_them_the_scores_it_must():
    """The exact mixture over training points: on one of them the posterior is that point, and e is known."""
    world, member = memorising_world(n=40)
    found = Evidence([arrow(rows_of(world))], world.shape)
    z0 = world.z0[member]
    for name, variant in (("loss", "mse@101"), ("secmi", "error@140"), ("pia", "l4@200")):
        known = score(found, name, variant)
        assert np.abs(known[member]).max() < 1e-9 < np.abs(known[~member]).min(), name
        assert tpr_at_fpr(known, member, 0.0).tpr == 1
    for t in (0, 100, 190):  # e(z0, t) = (z0 - alpha z0) / sigma
        by_hand = -(((1 - alpha(t)) * z0 / sigma(t)) ** 4)
        np.testing.assert_allclose(score(found, "sima", f"l4@{t:03d}")[member], by_hand.sum(axis=(1, 2, 3)), rtol=1e-9)
    # On an image that it never saw it answers with the nearest one that it knows.
    i, t = 30, 51
    z = world.noised(i, t)
    nearest = world.z0[np.argmin(((z - alpha(t) * world.z0[:20]) ** 2).sum(axis=(1, 2, 3)))]
    by_hand = -np.mean((alpha(t) * (world.z0[i] - nearest) / sigma(t)) ** 2)
    one = Evidence([arrow([r for r in rows_of(world) if r["draw"] == 0 and r["block"] == "noised"])], world.shape)
    np.testing.assert_allclose(score(one, "loss", f"mse@{t:03d}")[i], by_hand, rtol=1e-6)
