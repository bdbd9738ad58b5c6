"""Toys with a closed form: each score is known for each image, and so is its distribution on either side.

The engine itself reads them: 20,000 images a side of four numbers each, in float64. What a score's distribution, AUC
and TPR truly are is held against what is measured, and scores that are wrong are shown to fail.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mia import attacks, blackbox, features, rng, walks
from mia.attacks.evidence import Evidence
from mia.config import FeaturesOptions
from mia.metrics import auc, tpr_at_fpr
from mia.reader import Samples
from mia.schedules import Schedule
from tests.attacks.world import BAR, alpha, arrow, memorising_world, rows_of, sigma

N, FPR, SEED, SHAPE = 20_000, 0.01, 0, (1, 2, 2)
TAIL = 1e-4  # a check of what is right fails this rarely; seeds are fixed, so it fails always or never
Z = stats.norm.isf(TAIL / 2)


def slope(t, width):
    """The optimal prediction of the noise in z, where images are N(0, width), is this times z."""
    return sigma(t) / (alpha(t) ** 2 * width + sigma(t) ** 2)


class Optimal:
    """An unconditional network that answers with the optimal prediction; its condition is the image's width."""

    schedule, has_null, latent_shape = Schedule(BAR, BAR[0]), False, SHAPE

    def __init__(self):
        import torch

        self.device = torch.device("cpu")

    def __call__(self, z, t, condition):
        return slope(int(t[0]), condition["width"][:, None, None, None]) * z


@dataclasses.dataclass(frozen=True)
class Toy:
    """Members are `spread`[0] times N(0, 1), and N(0, `width`[0]) to the model; non-members likewise by [1]."""

    spread: tuple[float, float]
    width: tuple[float, float] = (1.0, 1.0)

    @functools.cached_property
    def member(self):
        return np.arange(2 * N) < N

    @functools.cached_property
    def z0(self):
        drawn = np.random.default_rng(7).normal(size=(2 * N, *SHAPE))
        return drawn * np.where(self.member, *self.spread)[:, None, None, None]

    @functools.cached_property
    def ids(self):
        return [f"{i:05d}" for i in range(2 * N)]

    @functools.cached_property
    def eps(self):
        return rng.noise(SEED, self.ids, [0] * 2 * N, "forward", SHAPE).astype(np.float64)

    @functools.cached_property
    def found(self):
        """What the engine reads off it."""
        import torch

        width = torch.from_numpy(np.where(self.member, *self.width))
        z0 = torch.from_numpy(self.z0)
        samples = Samples(self.ids, {"image": z0}, {"width": width}, {"caption": np.arange(2 * N)})
        probes = ("noised", "stepback", "aggregation", "clean", "pia", "secmi")
        options = FeaturesOptions(settings=(), probes=probes, draws=1)
        jobs = walks.jobs(options).values()
        return Evidence([features.extract(Optimal(), samples, its, SEED, 8192)[0] for its in jobs], SHAPE)

    def score(self, name, variant):
        return next(score for a, v, score in attacks.run(name, self.found) if (a, v) == (name, variant))


BRIGHTNESS = Toy(spread=(0.5, 1.0))  # the model's guess is best for non-members, but members are less bright
# The model's guess is best for both: it expects half the variance of members: half learned.
HALF_LEARNED = Toy(spread=(0.5**0.5, 1.0), width=(0.5, 1.0))


@dataclasses.dataclass(frozen=True)
class Form:
    """Minus the score is a sum of powers of r = a z0 + b eps, or of a part of r's frequencies.

    Attributes:
        a, b: Of members and non-members, float64[2] each.
        power: To which |r| is taken.
        mean: Whether it is the mean over four entries instead of the sum.
        root: Whether the square root is taken.
        band: `low`: of r, once for each entry, its mean alone; `high`: what that leaves.
    """

    a: np.ndarray
    b: np.ndarray
    power: int = 2
    mean: bool = False
    root: bool = False
    band: str = ""

    def scores(self, toy):
        """Of every image, float64[2 N]."""
        a, b = (np.where(toy.member, *pair)[:, None] for pair in (self.a, self.b))
        r = a * toy.z0.reshape(-1, 4) + b * toy.eps.reshape(-1, 4)
        middle = r.mean(axis=1, keepdims=True)
        r = {"": r, "low": 0 * r + middle, "high": r - middle}[self.band]
        total = (np.abs(r) ** self.power).sum(axis=1) / (4 if self.mean else 1)
        return -(np.sqrt(total) if self.root else total)

    def spreads(self, toy):
        """r's standard deviation, of members and of non-members."""
        return np.hypot(self.a * np.array(toy.spread), self.b)

    def sums(self, score):
        """The sums of powers of r behind a score."""
        return (-score) ** (2 if self.root else 1) * (4 if self.mean else 1)

    @property
    def law(self):
        """The distribution of such a sum where r is standard normal."""
        return stats.chi2({"": 4, "low": 1, "high": 3}[self.band]) if self.power == 2 else drawn_law(self.power)


class Drawn:
    """A distribution known by its draws."""

    def __init__(self, draws):
        self.draws = np.sort(draws)

    def cdf(self, x):
        return np.searchsorted(self.draws, x) / len(self.draws)

    def ppf(self, p):
        return self.draws[(np.asarray(p) * len(self.draws)).astype(int)]


@functools.cache
def drawn_law(power):
    """Of the sum of four |standard normal|^power, from a million."""
    return Drawn((np.abs(np.random.default_rng(1).normal(size=(4, 1_000_000))) ** power).sum(axis=0))


@dataclasses.dataclass(frozen=True)
class Law:
    """What follows for a score from the distribution of S: minus it is S for non-members, `ratio` S for members."""

    of: Any
    ratio: float

    def areas(self):
        """Mean and variance of the two kinds of chance whose means are the AUC (DeLong's placements)."""
        p = (np.arange(20_000) + 0.5) / 20_000
        above, below = 1 - self.of.cdf(self.ratio * self.of.ppf(p)), self.of.cdf(self.of.ppf(p) / self.ratio)
        return above.mean(), above.var() + below.var()

    def tpr(self, fpr):
        return self.of.cdf(self.of.ppf(fpr) / self.ratio)


def problems(score, member, form, spreads):
    """What of a score is not as `form` says where r has these `spreads` (members', non-members'); empty if nothing.

    Each side's distribution by Kolmogorov and Smirnov, AUC and TPR at 1 % FPR by intervals that miss the truth as
    rarely as once in 1 / TAIL.
    """
    law = Law(form.law, (spreads[0] / spreads[1]) ** form.power)
    s, n = form.sums(score) / spreads[1] ** form.power, int(member.sum())
    area, variance = law.areas()
    # The threshold lies between the k-th and the next non-member: its true FPR is a beta variable.
    k = int(FPR * n)
    least, most = stats.beta.ppf(TAIL / 4, k, n - k + 1), stats.beta.ppf(1 - TAIL / 4, k + 1, n - k)
    low, high = stats.binom.ppf(TAIL / 4, n, law.tpr(least)), stats.binom.ppf(1 - TAIL / 4, n, law.tpr(most))
    right = {
        "members": stats.kstest(s[member] / law.ratio, law.of.cdf).pvalue > TAIL,
        "non-members": stats.kstest(s[~member], law.of.cdf).pvalue > TAIL,
        "AUC": abs(auc(score, member) - area) < Z * np.sqrt(variance / n),
        "TPR": low <= n * tpr_at_fpr(score, member, FPR).tpr <= high,
    }
    return {name for name, well in right.items() if not well}


# The closed forms; `w` is an image's width.


def both(of, toy):
    """`of(width)` for members and non-members, as an array each where it gives several."""
    return np.array([of(w) for w in toy.width])


def noised(toy, t, factor=None):
    """factor(t, w) z_t; by default the prediction there."""
    factor = slope if factor is None else factor
    g = both(lambda w: factor(t, w), toy)
    return g * alpha(t), g * sigma(t)


def error(toy, t):
    """eps - e(z_t, t)."""
    a, b = noised(toy, t)
    return -a, 1 - b


def forth(t, u, w):
    """What the step from t to u multiplies z with."""
    e = slope(t, w)
    return alpha(u) * (1 - sigma(t) * e) / alpha(t) + sigma(u) * e


def there_and_back(t, w):
    up = forth(t, t + 10, w)
    return up * forth(t + 10, t, w) - 1


def inversion(toy, t):
    """SecMI's chain is a number times z0, and so is its error."""

    def factor(w):
        chain = np.prod([forth(u, u + 10, w) for u in range(0, t, 10)])
        return chain * there_and_back(t, w)

    return both(factor, toy), np.zeros(2)


def apart(t, w):
    """Mean distance of five predictions on the way down from z_t, in units of z_t's norm."""
    kept, seen = 1.0, []
    for u in range(t, t - 50, -10):
        seen.append(slope(u, w) * kept)
        kept *= forth(u, u - 10, w)
    return np.mean([abs(seen[i] - seen[j]) for i in range(5) for j in range(i)])


def anchored(toy, t):
    """e0 - e(alpha z0 + sigma e0, t), e0 the prediction at z0 and 0."""

    def factor(w):
        return slope(0, w) - slope(t, w) * (alpha(t) + sigma(t) * slope(0, w))

    return both(factor, toy), np.zeros(2)


def clean(toy, t):
    return both(lambda w: slope(t, w), toy), np.zeros(2)


def form(toy, name, variant):
    """The closed form of an attack's score."""
    kind, t = variant.split("@")[0], int(variant.split("@")[1])
    return {
        "loss": lambda: Form(*error(toy, t), mean=True),
        "denoising_loss": lambda: Form(*error(toy, t), root=True),
        "frequency_low": lambda: Form(*error(toy, t), mean=True, band="low"),
        "frequency_high": lambda: Form(*error(toy, t), mean=True, band="high"),
        "secmi": lambda: Form(*inversion(toy, t), mean=True),
        "secmi_copymark": lambda: Form(*noised(toy, t, there_and_back), mean=True),
        "noise_aggregation": lambda: Form(*noised(toy, t, apart), root=True),
        "sima": lambda: Form(*clean(toy, t), power=4),
        "sima_mc": lambda: Form(*noised(toy, t), power=4),
        "pia": lambda: Form(*anchored(toy, t), power=int(kind[1])),
    }[name]()


CASES = [
    ("loss", "mse@301"), ("loss", "mse@501"), ("loss", "mse@901"), ("denoising_loss", "l2@101"),
    ("frequency_low", "low@501"), ("frequency_high", "high@501"), ("secmi", "error@010"), ("secmi", "error@140"),
    ("secmi_copymark", "error@051"), ("noise_aggregation", "l2@101"), ("sima", "l4@000"), ("sima", "l4@100"),
    ("sima_mc", "l4@501"), ("pia", "l4@200"), ("pia", "l1@500"), ("pia", "l5@100"),
]  # fmt: skip


@pytest.mark.parametrize("toy", [BRIGHTNESS, HALF_LEARNED], ids=["brightness", "half-learned"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_engine_and_attack_give_each_image_its_score_and_each_side_its_distribution(toy, name, variant):
    known, score = form(toy, name, variant), toy.score(name, variant)
    np.testing.assert_allclose(score, known.scores(toy), rtol=1e-5, atol=1e-7 * np.abs(score).mean())
    assert not problems(score, toy.member, known, known.spreads(toy))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_what_is_wrong_is_noticed(name, variant):
    """No signal, sides exchanged, the sign turned, and a scale that is a tenth off, on both sides or on one."""
    known, score, member = form(BRIGHTNESS, name, variant), BRIGHTNESS.score(name, variant), BRIGHTNESS.member
    spreads = known.spreads(BRIGHTNESS)

    def wrong(score):
        return problems(score, member, known, spreads)

    sides, everything = {"members", "non-members"}, {"members", "non-members", "AUC"}
    if Law(known.law, (spreads[0] / spreads[1]) ** known.power).tpr(FPR) > 1.6 * FPR:
        everything |= {"TPR"}
    for other in (np.random.default_rng(2).permutation(score), np.roll(score, N), score.min() - score):
        assert wrong(other) >= everything
    for scale in (1.1, 1 / 1.1):
        assert wrong(scale * score) == sides  # AUC and TPR cannot see it
        assert "members" in wrong(np.where(member, scale, 1) * score)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_control_that_has_seen_neither_side_is_at_chance(name, variant):
    """Both halves are non-members: one distribution, AUC .5 within .016, TPR 1 % within six tenths of a point."""
    known, score = form(BRIGHTNESS, name, variant), BRIGHTNESS.score(name, variant)
    alike = (known.spreads(BRIGHTNESS)[1],) * 2
    half = np.random.default_rng(3).permutation(N) < N // 2
    assert not problems(score[N:], half, known, alike)
    assert abs(auc(score[N:], half) - 0.5) < 0.016
    assert abs(tpr_at_fpr(score[N:], half, FPR).tpr - FPR) < 0.006
    assert problems(score, BRIGHTNESS.member, known, alike) >= {"members", "AUC"}  # signal is no control


def test_half_learned_images_have_a_low_loss_and_a_high_step_error():
    """What SecMI and noise aggregation measure is no loss: how much the prediction changes along its own path.

    That is nothing about an image known exactly (below), and grows at first as the model's density about it widens. So
    members that are known half as exactly as that turn the order round, by the closed form and by our code alike.
    """
    member = HALF_LEARNED.member
    for name, variant, low, high in (
        ("loss", "mse@101", 0.51, 1), ("loss", "mse@301", 0.55, 1), ("secmi", "error@050", 0, 0.35),
        ("secmi_copymark", "error@051", 0, 0.45), ("noise_aggregation", "l2@101", 0, 0.45),
    ):  # fmt: skip
        known = form(HALF_LEARNED, name, variant)
        spreads = known.spreads(HALF_LEARNED)
        for area in (
            Law(known.law, (spreads[0] / spreads[1]) ** known.power).areas()[0],
            auc(HALF_LEARNED.score(name, variant), member),
        ):
            assert low < area < high, (name, area)


class Recalling:
    """A service that holds pictures and answers with the nearest: the exact memoriser's variation."""

    def __init__(self, known):
        self.known = known.astype(np.float64)

    def vary(self, images, strength, seeds, prompts):
        far = ((images[:, None] - self.known) ** 2).mean(axis=(2, 3, 4))
        return self.known[far.argmin(axis=1)].astype(np.uint8)


def test_a_model_that_holds_its_training_images_gives_them_the_scores_it_must():
    """The exact mixture over training points: on one of them the posterior is that point, and e is known.

    So eps, or whatever the latent was noised with, comes back, at every step the same: loss, PIA, PIAN, both SecMI and
    the spread of predictions are 0 on members. From a noised latent the last two may be 0 on others, too: once it is
    sure which known image it takes one for, its own predictions agree with each other there as well.
    """
    world, member = memorising_world(n=40)
    found = Evidence([arrow(rows_of(world))], world.shape)
    z0 = world.z0[member]
    for name, variant in (
        ("loss", "mse@101"), ("secmi", "error@140"), ("secmi_copymark", "error@051"), ("pia", "l4@200"),
        ("pian", "l4@200"), ("noise_aggregation", "l2@101"),
    ):  # fmt: skip
        known = next(score for a, v, score in attacks.run(name, found) if (a, v) == (name, variant))
        others = np.abs(known[~member])
        assert np.abs(known[member]).max() < 1e-6, name
        if name in ("secmi_copymark", "noise_aggregation"):
            assert others.min() < 1e-6 < others.max() and auc(known, member) > 0.9, name
        else:
            assert others.min() > 1e-6 and tpr_at_fpr(known, member, 0.0).tpr == 1, name
    sima = {v: score for a, v, score in attacks.run("sima", found) if a == "sima"}
    for t in (0, 100, 190):  # e(z0, t) = (z0 - alpha z0) / sigma
        by_hand = -(((1 - alpha(t)) * z0 / sigma(t)) ** 4)
        np.testing.assert_allclose(sima[f"l4@{t:03d}"][member], by_hand.sum(axis=(1, 2, 3)), rtol=1e-9)
    # On an image that it never saw it answers with the nearest one that it knows.
    i, t = 30, 51
    z = world.noised(i, t)
    nearest = world.z0[np.argmin(((z - alpha(t) * world.z0[:20]) ** 2).sum(axis=(1, 2, 3)))]
    by_hand = -np.mean((alpha(t) * (world.z0[i] - nearest) / sigma(t)) ** 2)
    one = Evidence([arrow([r for r in rows_of(world) if r["draw"] == 0 and r["block"] == "noised"])], world.shape)
    loss = next(score for _, v, score in attacks.run("loss", one) if v == f"mse@{t:03d}")
    np.testing.assert_allclose(loss[i], by_hand, rtol=1e-6)


def test_the_guidance_of_an_exact_memoriser_is_the_larger_only_where_noise_hides_the_image():
    """Its norm is |e_c - e_0| = alpha / sigma |E(x | z, c) - E(x | z)|, and E(x | z) = alpha z for normal images.

    With little noise E(x | z) is a member's own x, and the caption adds nothing; of another image it gets the subject
    wrong, which is a long way. Only behind noise does the caption pull a member's prediction further.
    """
    world, member = memorising_world(n=120)
    found = Evidence([arrow(rows_of(world))], world.shape)
    norm = {v: auc(score, member) for _, v, score in attacks.run("memorisation", found)}
    assert max(norm["norm@001"], norm["norm@101"], norm["norm@201"]) < 0.1
    assert min(norm["norm@501"], norm["norm@601"]) > 0.6


def test_a_service_that_holds_its_training_images_gives_them_back():
    pictures = np.random.default_rng(5).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    member, ids = np.arange(12) < 6, [f"{i:05d}" for i in range(12)]
    options = blackbox.Options(variations=2)
    table = blackbox.variations(Recalling(pictures[member]), ids, pictures, [""] * 12, options, SEED, 10)
    [(_, _, score)] = attacks.run("rediffuse", Evidence([table], (4, 8, 8)))
    assert np.allclose(score[member], 1) and score[~member].max() < 0.5
