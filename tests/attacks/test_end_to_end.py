"""Every grey-box attack from image files to scores, against its paper's formula on the networks themselves.

The engine reads the tiny target in float64, so that scores must agree to 1e-5 even where they are small differences.
The other side calls diffusers' UNet, VAE and text encoder and steps with diffusers' own schedulers; it shares the noise
with `mia`, and what was stored in half precision it rounds likewise.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from PIL import Image

from mia import attacks, classifiers, families, features, latents, rng, scores, tables, walks
from mia.attacks.calibration import Calibration
from mia.attacks.evidence import Evidence
from mia.cli import reading
from mia.config import FeaturesOptions, ScoresOptions
from tests.attacks.recipes import Recipes
from tests.conftest import picture

pytestmark = pytest.mark.slow

N, DRAWS, SEED = 60, 2, 11
WORDS = ("red", "dog", "two cats", "snow", "hill", "boat", "sun")
CAPTIONS = [f"{WORDS[i % 7]} and {WORDS[i // 7 % 7]} {i}" for i in range(N - 1)] + ["a"]
TEXT = {tables.sample_id(f"u{i}", CAPTIONS[i]): CAPTIONS[i] for i in range(N)}
IDS = sorted(TEXT)
FILES = {name: picture(i) for i, name in enumerate(IDS)}

GREY = [n for n, a in attacks.REGISTRY.items() if a.access == "grey" and a.module]
OPTIONS = FeaturesOptions(settings=(16, 18), probes=attacks.probes(GREY), draws=DRAWS)
OPTIONS = dataclasses.replace(OPTIONS, losses=("model_loss", "latent_error"))

DRAWN = np.random.default_rng(5)
MEMBER, KNOWN = DRAWN.permutation(np.arange(N) % 2 == 0), DRAWN.permutation(np.arange(N) >= 8)
GROUP = np.array([f"g{i // 2}" for i in range(N)])
RECIPES = Recipes(MEMBER, KNOWN, GROUP, folds=3, seed=SEED)
CALIBRATION = Calibration(np.where(KNOWN, MEMBER, False), GROUP, KNOWN, ScoresOptions(folds=3), SEED)


# Through mia


class InFloat64:
    """The target's network, whose answers are not rounded to float32."""

    def __init__(self, network):
        self.network = network

    def __getattr__(self, name):
        return getattr(self.network, name)

    def __call__(self, z, t, condition):
        return self.network.denoiser(z.double(), t, encoder_hidden_states=condition["states"].double()).sample


@pytest.fixture(scope="module")
def tables_read(tiny_target, tmp_path_factory):
    """The features tables of every job, made from files as the command makes them, but in float64."""
    import torch

    folder, on = tmp_path_factory.mktemp("files"), torch.device("cpu")
    model = families.find(str(tiny_target))
    network, captions = model.network(on, torch.float64), model.captions(on)
    selection = pa.table({"sample_id": IDS, "caption": [TEXT[i] for i in IDS], "sha256": ["0" * 64] * N})
    coder = model.autoencoder(on, torch.float32)
    encoded, texts, _ = latents.encode(selection, FILES, coder, captions, 64)
    about = {"status": "ok", "detail": "", "sha256": "0" * 64, "width": 40, "height": 47, "format": "png", "phash": 0}
    images = [{"sample_id": name, "bytes": FILES[name], **about} for name in IDS]
    parts = {"latents": encoded, "texts": texts, "images": pa.Table.from_pylist(images, tables.SCHEMAS["images"])}
    parts["selection"] = selection
    for name, table in parts.items():
        tables.write(folder / f"{name}.parquet", table, name, {"text_width": captions.width})
    files = [folder / f"{name}.parquet" for name in parts]
    found = []
    for job, its in walks.jobs(OPTIONS).items():
        shard = reading.Shard(*files, {"source": ""}, job, its, SEED)
        samples = reading.samples(shard, network, coder, captions)
        samples = dataclasses.replace(samples, latents={k: v.double() for k, v in samples.latents.items()})
        found.append(features.extract(InFloat64(network), samples, its, SEED, 64)[0])
    return found


@pytest.fixture(scope="module")
def found(tables_read):
    return Evidence(tables_read, (4, 8, 8))


# By hand


@pytest.fixture(scope="module")
def plain(tiny_target):
    return Plain(tiny_target)


class Plain:
    """The networks, and z0[n], crop[n], eps[draw][n] and text states; every method is of all images at once."""

    def __init__(self, folder):
        import torch
        from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval().double()
        vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.bar = (1 - betas).cumprod(0)
        self.down = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.up = DDIMInverseScheduler.from_pretrained(folder / "scheduler")
        for scheduler in (self.down, self.up):
            scheduler.alphas_cumprod = self.bar  # its own are float32
            scheduler.final_alpha_cumprod = self.bar[0]
        squares = [self.square(FILES[name]) for name in IDS]
        crops = [one.crop((3, 3, 29, 29)).resize((32, 32), Image.Resampling.BILINEAR) for one in squares]
        self.z0, self.crop = (self.encode(vae, some) for some in (squares, crops))
        self.eps = [torch.stack([self.noise(name, d) for name in IDS]) for d in range(DRAWS)]
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()

        def states(captions):
            tokens = tokenizer(captions, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
            with torch.no_grad():
                return encoder(tokens.input_ids)[0].half().double()

        own = [TEXT[name] for name in IDS]
        self.states = {"cond": states(own), "null": states([""] * N)}
        for third in (1, 2, 3):
            self.states[f"p{third}"] = states([self.cut(caption, third) for caption in own])

    @staticmethod
    def square(data):
        """40 x 47 pixels: the shorter side to 32, the middle of the longer."""
        import io

        return Image.open(io.BytesIO(data)).resize((32, 37), Image.Resampling.BILINEAR).crop((0, 2, 32, 34))

    @staticmethod
    def encode(vae, pictures):
        import torch

        x = torch.from_numpy(np.stack([np.array(one) for one in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            return 0.7 * vae.encode(x).latent_dist.mean.half().double()

    @staticmethod
    def noise(name, draw):
        import torch

        drawn = rng.stream(SEED, name, draw, "forward").standard_normal((4, 8, 8), dtype=np.float32)
        return torch.from_numpy(drawn).double()

    @staticmethod
    def cut(caption, third):
        a, b = round(len(caption) * (third - 1) / 3), round(len(caption) * third / 3)
        return caption[:a] + caption[b:]

    def predict(self, z, t, c):
        import torch

        with torch.no_grad():
            return self.unet(z, t, encoder_hidden_states=self.states[c]).sample

    def mix(self, t, noise, z0=None):
        z0 = self.z0 if z0 is None else z0
        return self.bar[t].sqrt() * z0 + (1 - self.bar[t]).sqrt() * noise

    def step(self, z, e, t, to):
        """diffusers' DDIM, down or (its inverse) up."""
        scheduler = self.down if to < t else self.up
        scheduler.set_timesteps(1000 // abs(to - t))
        return scheduler.step(e, max(t, to), z).prev_sample

    @functools.cache  # noqa: B019
    def off(self, t, draw, c):
        """eps - e(z_t, t, c)."""
        return self.eps[draw] - self.predict(self.mix(t, self.eps[draw]), t, c)

    def loss(self, t, draw, c):
        return mse(self.off(t, draw, c))

    @functools.cache  # noqa: B019
    def crop_loss(self, t, c):
        return mse(self.eps[0] - self.predict(self.mix(t, self.eps[0], self.crop), t, c))

    @functools.cache  # noqa: B019
    def secmi(self, c):
        """By t: yhat - y."""
        out, y = {}, self.z0
        for t in range(0, 150, 10):
            up = self.step(y, self.predict(y, t, c), t, t + 10)
            out[t] = self.step(up, self.predict(up, t + 10, c), t + 10, t) - y
            y = up
        return out


def total(x):
    return x.sum((1, 2, 3)).numpy()


def mse(x):
    return total(x**2) / 256


GRID = (1, 51, 101, 141, 201, 301, 401, 441, 451, 461, 501, 601, 701, 801, 901)
TENS, CROPS, ALL_DRAWS = GRID[:1] + tuple(range(101, 1000, 100)), (101, 201, 301, 401), range(DRAWS)


def of_loss(p, c):
    out = {t: -np.mean([p.loss(t, d, c) for d in ALL_DRAWS], axis=0) for t in GRID}
    return {f"mse@{t:03d}": v for t, v in out.items()} | {"mean": np.mean([out[t] for t in TENS], axis=0)}


def of_denoising_loss(p, c):
    return {"l2@101": -np.mean([np.sqrt(256 * p.loss(101, d, c)) for d in ALL_DRAWS], axis=0)}


def of_multiple_loss(p, c):
    return {f"l2@{t:03d}": -np.sqrt(256 * p.loss(t, 0, c)) for t in TENS}


def of_summed_loss(p, c):
    return {"sum": -sum(256 * p.loss(t, 0, c) for t in GRID if 11 <= t <= 501)}


def of_secmi(p, c):
    return {f"error@{t:03d}": -mse(error) for t, error in p.secmi(c).items()}


def of_secmi_nn(p, c):
    return {"map@140": RECIPES.secmi_net(p.secmi(c)[140].abs().float().double().numpy())}


def of_quantile_regression(p, c):
    name = "quantile_regression" + ("" if c == "cond" else "_null")
    return {"q05@140": RECIPES.below_quantile(name, mse(p.secmi(c)[140]), p.z0.numpy())}


def of_secmi_copymark(p, c):
    z = p.mix(51, p.eps[0])
    up = p.step(z, p.predict(z, 51, c), 51, 61)
    return {"error@051": -mse(p.step(up, p.predict(up, 61, c), 61, 51) - z)}


def of_pia(p, c, scaled=False):
    e0 = p.predict(p.z0, 0, c)
    if scaled:
        e0 = e0 * (2 / np.pi) ** 0.5 / e0.abs().mean((1, 2, 3), keepdim=True)
    out = {}
    for t in (200,) if scaled else (100, 200, 300, 400, 500):
        d = (e0 - p.predict(p.mix(t, e0), t, c)).abs()
        out |= {f"l{power}@{t:03d}": -total(d**power) for power in (1, 4, 5)}
    return out


def of_pian(p, c):
    return of_pia(p, c, scaled=True)


def of_pfami(p, c):
    rises = {t: (p.crop_loss(t, c) - p.loss(t, 0, c)) / p.loss(t, 0, c) for t in CROPS}
    return {"mean": np.mean(list(rises.values()), axis=0)} | {f"rise@{t:03d}": r for t, r in rises.items()}


def of_pfami_copymark(p, c):
    parts = [(256 * p.loss(t, 1, c), 256 * p.crop_loss(t, c)) for t in CROPS]
    return {"sum": sum((crop - loss) / (loss + 1e-6) for loss, crop in parts)}


def of_pfami_clid(p, c):
    return {"mean": np.mean([p.crop_loss(t, c) - p.loss(t, 1, c) for t in CROPS], axis=0)}


def of_pfami_sima(p, c):
    return {"mean": np.mean([(p.crop_loss(t, c) - p.loss(t, 1, c)) ** 2 for t in CROPS], axis=0)}


def of_sima(p, c):
    return {f"l4@{t:03d}": -total(p.predict(p.z0, t, c) ** 4) for t in range(0, 200, 10)}


def of_sima_mc(p, c):
    def power(t, d):
        return total((p.eps[d] - p.off(t, d, c)) ** 4)

    return {f"l4@{t:03d}": -np.mean([power(t, d) for d in ALL_DRAWS], axis=0) for t in GRID}


def clid_losses(p, cut):
    def mean(c):
        return np.mean([p.loss(t, 0, c) for t in (441, 451, 461)], axis=0)

    return mean("cond"), np.stack([mean(c) - mean("cond") for c in (*cut, "null")], axis=1)


def of_clid(p, c):
    return {"threshold": RECIPES.clid(*clid_losses(p, ("p1", "p2", "p3")))}


def of_clid_null(p, c):
    return {"threshold": RECIPES.clid(*clid_losses(p, ()))}


def of_clid_vector(p, c):
    return {"vector": RECIPES.clid_trees(*clid_losses(p, ("p1", "p2", "p3")))}


def of_noise_aggregation(p, c):
    z, seen = p.mix(101, p.eps[0]), []
    for t in (101, 91, 81, 71, 61):
        seen.append(p.predict(z, t, c))
        z = p.step(z, seen[-1], t, t - 10)
    return {"l2@101": -np.mean([total((a - b) ** 2) ** 0.5 for a, b in itertools.combinations(seen, 2)], axis=0)}


def bands(p, t, draw, c):
    """Mean square of 2x2 block means spread over their blocks, and of what they leave."""
    d = p.off(t, draw, c)
    low = d.reshape(-1, 4, 4, 2, 4, 2).mean((3, 5)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return mse(low), mse(d - low)


def of_frequency_low(p, c):
    return {f"low@{t:03d}": -np.mean([bands(p, t, d, c)[0] for d in ALL_DRAWS], axis=0) for t in GRID}


def of_frequency_high(p, c):
    return {f"high@{t:03d}": -np.mean([bands(p, t, d, c)[1] for d in ALL_DRAWS], axis=0) for t in GRID}


def of_memorisation(p, c):
    def norm(t, d):
        return np.sqrt(total((p.off(t, d, "null") - p.off(t, d, "cond")) ** 2))

    out = {t: np.mean([norm(t, d) for d in ALL_DRAWS], axis=0) for t in GRID}
    return {f"norm@{t:03d}": v for t, v in out.items()} | {"mean": np.mean([out[t] for t in TENS], axis=0)}


def setting_losses(p):
    """Settings 16 (guidance 100, steps of 100) and 18 (7.5, of 20): model loss before guidance, latent error after."""
    out = {}
    for number, steps, stride, weight in ((16, TENS, 100, 100.0), (18, (301,), 20, 7.5)):
        for t in steps:
            model, latent = [], []
            for eps in p.eps:
                z = p.mix(t, eps)
                cond, null = p.predict(z, t, "cond"), p.predict(z, t, "null")
                model.append(mse(eps - cond))
                latent.append(mse(p.step(z, null + weight * (cond - null), t, t - stride) - p.z0))
            out[number, f"model_loss@{t:03d}"], out[number, f"latent_error@{t:03d}"] = (
                -np.mean(one, axis=0) for one in (model, latent)
            )
    return out


ORACLES = {name.removeprefix("of_"): f for name, f in list(globals().items()) if name.startswith("of_")}


# Differences of logs, or of losses from their median over the quartiles' distance: what is near 0 holds little of what
# was subtracted. Their scale is 1.
DIFFERENCES = {"quantile_regression", "clid", "clid_null"}


def test_every_grey_box_attack_is_here():
    of_settings = {n for n, a in attacks.REGISTRY.items() if a.access == "grey" and not a.module}
    assert set(ORACLES) == set(GREY) and of_settings == {"loss_threshold", *classifiers.LEARNERS}


@pytest.mark.parametrize("name", GREY)
def test_scores_of_images_are_the_papers_formula(found, plain, name):
    conditions = {"": "cond"} | ({attacks.TWIN: "null"} if attacks.REGISTRY[name].paired else {})
    wanted = {(name + end, v): s for end, c in conditions.items() for v, s in ORACLES[name](plain, c).items()}
    scored = {(a, v): score for a, v, score in attacks.run(name, found, CALIBRATION)}
    assert scored.keys() == wanted.keys()
    for key, score in wanted.items():
        assert len(np.unique(score)) > 5, key  # a constant would agree with anything
        near_zero = 1e-6 if name in DIFFERENCES else 0
        np.testing.assert_allclose(scored[key], score, rtol=1e-5, atol=near_zero, err_msg=str(key))


def test_scores_on_settings_are_the_papers_losses(tables_read, plain):
    """What the classifiers fit on labels are these losses, too; their recipes are held in `test_classifiers.py`."""
    losses = pl.DataFrame(pl.from_arrow(pa.concat_tables(tables_read))).filter(
        pl.col("block").str.starts_with("setting")
    )
    labels = pl.DataFrame({"sample_id": IDS, "group": GROUP.tolist(), "member": [None] * N})
    options = ScoresOptions(attacks=("loss_threshold",))
    table = scores.attack_scores(losses, labels, (16, 18), options, SEED).sort("sample_id")
    got = {key: part["score"].to_numpy() for key, part in table.group_by("attack", "variant")}
    wanted = setting_losses(plain)
    assert len(got) == len(wanted) == 22
    names = {16: "reversed_noising", 18: "baseline_loss_threshold"}
    for (number, variant), score in wanted.items():
        np.testing.assert_allclose(got[names[number], variant], score, rtol=1e-5, err_msg=variant)
