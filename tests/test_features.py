"""The extraction engine against a slow oracle, its invariances, and its counts of model calls."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from mia import families, features, latents, models, pixels, rng, settings, tables, walks
from mia.cli import reading
from mia.config import FeaturesOptions
from mia.errors import UserError
from mia.reader import Samples
from tests.conftest import picture

SEED = 11
IDS = [tables.sample_id(f"u{i}", f"c{i}") for i in range(9)]
CAPTIONS = ["a red dog", "two cats", "a red dog", "", "snow on a hill", "sun", "car", "blue boat", "tree"]
OPTIONS = FeaturesOptions(draws=2)


@pytest.fixture(scope="module")
def network(tiny_target):
    import torch

    return families.find(str(tiny_target)).network(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def encoded(tiny_target, network):
    import torch

    selection = pa.table({"sample_id": IDS, "caption": CAPTIONS})
    data = {name: picture(i) for i, name in enumerate(IDS)}
    captions = families.find(str(tiny_target)).captions(torch.device("cpu"))
    found, texts, _ = latents.encode(selection, data, network.autoencoder, captions, 4)
    return found, texts, data


def samples_of(network, encoded, ids=IDS, pixels=True):
    """The samples of `ids`, in that order; crops and shortened prompts stand for what the command makes of them."""
    import torch

    found, texts, data = encoded
    rows = pa.concat_tables([found.slice(0, 0), *(found.filter(pa.compute.equal(found["sample_id"], i)) for i in ids)])
    condition, caption = latents.conditions(rows, texts, 32)
    mean, _ = latents.posterior(rows, network.latent_shape)
    z0 = network.scaled(mean)
    other = {f"prompt-{k}": (caption + k) % (len(condition["states"]) - 1) for k in (1, 2, 3)}
    shown = torch.from_numpy(latents.squares(data, list(ids), 32)).permute(0, 3, 1, 2).float() if pixels else None
    return Samples(list(ids), {"image": z0, "crop-82": z0.flip(3)}, condition, {"caption": caption, **other}, shown)


def read(network, encoded, options=OPTIONS, ids=IDS, batch_size=64, seed=SEED):
    """Tables of all jobs of the options, as one, and the work done."""
    found, counts = [], walks.Counts()
    for its in walks.jobs(options).values():
        table, done = features.extract(network, samples_of(network, encoded, ids), its, seed, batch_size)
        found.append(table)
        counts += done
    return tables.check(pa.concat_tables(found), "features"), counts


def rows_of(table: pa.Table, block: str) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(table)).filter(pl.col("block") == block).sort("sample_id", "timestep", "draw")


def oracle(folder, encoded, number: int, sample: int, draw: int) -> dict[int, tuple[float, float, float]]:
    """The three losses at every timestep of one setting, one sample, one draw: plain loops, diffusers' own DDIM.

    Networks are called on 16 copies: guidance of 100 would enlarge what kernels for a batch of one sum differently.
    """
    import torch
    from diffusers import DDIMScheduler

    s = settings.SETTINGS[number]
    found, texts, data = encoded
    on, dtype = torch.device("cpu"), torch.float32
    unet, vae = models.unet(folder, on, dtype), models.vae(folder, on, dtype)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)  # its own are float32: 1 - alpha_bar(1) is off by 4e-5 there
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(1000 // s.step)
    tokens = models.tokenizer(folder)(
        [CAPTIONS[sample], ""], padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    )

    def drawn(purpose: str, shape: tuple[int, ...]):
        stream = rng.stream(SEED, IDS[sample], draw, purpose)
        return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))

    with torch.no_grad():
        text = models.text_encoder(folder, on, dtype)(tokens.input_ids)[0].half().float()
        for row, half in enumerate(("caption", "empty")):
            text[row] += s.text_shift * drawn(f"text_shift {half}", (32, 32))
        row = found["sample_id"].to_pylist().index(IDS[sample])
        z0 = 0.7 * torch.tensor(found["mean"][row].as_py()).float().reshape(1, 4, 8, 8)
        eps = drawn("forward", (1, 4, 8, 8))
        image = torch.from_numpy(pixels.centre_square(pixels.decode(data[IDS[sample]], 10**6), 32).copy()).float()
        acp = scheduler.alphas_cumprod
        out, z = {}, None
        for index, t in enumerate(s.timesteps()):
            level = s.start_noise_step if s.iterative or s.fixed_noise_step else t
            if z is None or not s.iterative:
                z = (acp[level].sqrt() * z0 + (1 - acp[level]).sqrt() * eps).float()
            if s.latent_shift and index == 13:
                z = z + drawn("latent_shift", (1, 4, 8, 8))
            both = unet(z.expand(16, -1, -1, -1), t, text.repeat_interleave(8, 0)).sample
            cond, null = both[:1], both[8:9]
            e = null + s.guidance_scale * (cond - null) if s.guidance_scale else cond
            prev = scheduler.step(e.double(), t, z.double(), eta=0.0).prev_sample.float()
            decoded = vae.decode((prev / 0.7).expand(16, -1, -1, -1)).sample[0]
            shown = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
            out[t] = (
                float(((eps - cond) ** 2).double().mean()), float(((prev - z0) ** 2).double().mean()),
                float((image - shown).abs().double().mean()),
            )  # fmt: skip
            z = prev
    return out


EVERYTHING = FeaturesOptions(settings=tuple(settings.SETTINGS), probes=tuple(walks.PROBES), draws=1)
QUICK = FeaturesOptions(settings=(14, 18), probes=("pia", "stepback", "crops"), draws=2)


@pytest.fixture(scope="module")
def everything(network, encoded):
    """Every job's table for three samples, and the work done."""
    return read(network, encoded, EVERYTHING, [IDS[0], IDS[3], IDS[8]])


@pytest.mark.parametrize("number", settings.SETTINGS)
def test_losses_equal_the_slow_oracle(tiny_target, encoded, everything, number):
    got = rows_of(everything[0], f"setting-{number:02d}")
    for sample, draw in [((0, 3, 8)[number % 3], 0)]:
        wanted = oracle(tiny_target, encoded, number, sample, draw)
        mine = got.filter(pl.col("sample_id") == IDS[sample], pl.col("draw") == draw)
        assert mine["timestep"].to_list() == sorted(wanted)
        for row in mine.to_dicts():
            model, latent, pixel = wanted[row["timestep"]]
            assert row["model_loss"] == pytest.approx(model, rel=1e-5)
            assert row["latent_error"] == pytest.approx(latent, rel=1e-5)
            assert row["pixel_error"] == pytest.approx(pixel, rel=1e-4)  # a rounded pixel may fall on the other side


def test_the_work_done_is_the_work_planned(everything):
    wanted = sum((walks.planned(its) for its in walks.jobs(EVERYTHING).values()), walks.Counts()) * 3
    assert everything[1] == wanted
    # 507 and 285 distinct evaluations and decodes of the settings for a draw; the grid has the timesteps 51, 141,
    # 441 to 461 and 501 ... beside theirs; 82 rows of clean latents, 10 steps on, 9 prompts and 8 crops once.
    grid = set().union(*(settings.SETTINGS[n].timesteps() for n in (2, 16, 17, 18)))
    more = 2 * len(set(walks.GRID) - grid)
    assert wanted == walks.Counts(3 * (507 + more + 82 + 10 + 9 + 8), 3 * 285)


@pytest.mark.parametrize(
    ("losses", "numbers", "rows", "decodes"),
    [  # for each image and draw, counted by hand from performance.md B
        (settings.LOSSES, (16, 18), 20, 11),
        (settings.LOSSES, (1,), 52, 26),
        (("model_loss",), (16, 18), 10, 0),
        (("model_loss",), (1,), 51, 0),
        (("model_loss", "latent_error"), (18,), 2, 0),
        (("model_loss",), (13,), 10, 0),
    ],
)
def test_only_the_losses_asked_for_are_paid_for(network, encoded, losses, numbers, rows, decodes):
    options = FeaturesOptions(settings=numbers, draws=2, losses=losses)
    table, done = read(network, encoded, options, IDS[:3])
    assert done == walks.Counts(rows * 6, decodes * 6)
    for name in settings.LOSSES:
        assert (table[name].null_count == 0) == (name in losses)


@pytest.mark.parametrize("options", [QUICK, dataclasses.replace(QUICK, losses=("model_loss",), probes=())])
def test_batch_size_order_and_shards_change_nothing(network, encoded, options):
    whole, _ = read(network, encoded, options, IDS[:6])
    assert read(network, encoded, options, IDS[:6], batch_size=1)[0].equals(whole)
    assert read(network, encoded, options, IDS[5::-1], batch_size=7)[0].equals(whole)
    pieces = [read(network, encoded, options, IDS[i:6:4])[0] for i in range(4)]
    assert tables.check(pa.concat_tables(pieces), "features").equals(whole)


def test_a_setting_gives_the_same_losses_alone_and_in_company(network, encoded, everything):
    for number in (3, 13, 14, 17):
        alone, _ = read(network, encoded, FeaturesOptions(settings=(number,), draws=1), [IDS[0], IDS[3], IDS[8]])
        block = f"setting-{number:02d}"
        mine, theirs = rows_of(alone, block), rows_of(everything[0], block)
        assert mine.equals(theirs)


def test_gram_matrix_gives_model_loss_and_latent_error(network, encoded):
    options = FeaturesOptions(settings=(16,), probes=("noised",), draws=2)
    table, _ = read(network, encoded, options)
    losses = rows_of(table, "setting-16")
    grid = rows_of(table, "noised").filter(pl.col("timestep").is_in(losses["timestep"].unique().to_list()))
    alpha = settings.alpha_bar(0.00085, 0.012)
    at = {name: i for i, name in enumerate(tables.GRAM_NAMES)}
    for row, loss in zip(grid.to_dicts(), losses.to_dicts(), strict=True):
        g, t = row["gram"], row["timestep"]
        sse = g[at["eps_eps"]] - 2 * g[at["eps_cond"]] + g[at["cond_cond"]]
        assert sse / 256 == pytest.approx(loss["model_loss"], rel=1e-6)
        assert sum(row["bands"][:4]) == pytest.approx(sse, rel=1e-6)
        assert 0 < row["bands"][4] < sse
        under_null = g[at["eps_eps"]] - 2 * g[at["eps_null"]] + g[at["null_null"]]
        assert sum(row["bands"][5:9]) == pytest.approx(under_null, rel=1e-6)
        assert 0 < row["bands"][9] < under_null
        a, p = alpha[t], alpha[max(t - 100, 0)]
        root, w = math.sqrt(p * (1 - a) / a), 100.0
        k = math.sqrt(1 - p) - root
        c = np.array([math.sqrt(p) - 1, root, (1 - w) * k, w * k])  # of z0, eps, null, cond
        full = np.zeros((4, 4))
        full[np.triu_indices(4)] = g
        full = full + np.triu(full, 1).T
        assert c @ full @ c / 256 == pytest.approx(loss["latent_error"], rel=1e-4)


class Slow:
    """One sample's latent, noise and predictions by plain calls: what the probes' oracles are written with."""

    def __init__(self, network, encoded, sample: int):
        import torch

        self.network = network
        shard = samples_of(network, encoded, [IDS[sample]], pixels=False)
        self.z0, self.crop = shard.latents["image"], shard.latents["crop-82"]
        noise = rng.stream(SEED, IDS[sample], 0, "forward").standard_normal((1, 4, 8, 8), dtype=np.float32)
        self.eps = torch.from_numpy(noise)
        self.states = {name: shard.condition["states"][rows] for name, rows in shard.text.items()}
        self.states["empty"] = shard.condition["states"][-1:]
        self.abar = np.append(settings.alpha_bar(0.00085, 0.012), settings.alpha_bar(0.00085, 0.012)[0])

    def predicts(self, z, t: int, text: str):
        import torch

        with torch.no_grad():
            return self.network.denoiser(z.repeat(16, 1, 1, 1), t, self.states[text].repeat(16, 1, 1)).sample[:1]

    def noised(self, z0, noise, t: int):
        return math.sqrt(self.abar[t]) * z0 + math.sqrt(1 - self.abar[t]) * noise

    def phi(self, z, e, t: int, to: int):
        a, b = self.abar[t], self.abar[to]
        return math.sqrt(b) * (z - math.sqrt(1 - a) * e) / math.sqrt(a) + math.sqrt(1 - b) * e


def one(table: pa.Table, block: str, t: int, sample: int = 0) -> dict:
    found = rows_of(table, block).filter(pl.col("sample_id") == IDS[sample], pl.col("timestep") == t).to_dicts()
    assert [row["draw"] for row in found] == list(range(len(found)))
    return found[0]


def norms_of(row: dict) -> dict[str, float]:
    return dict(zip(tables.NORM_NAMES, row["norms"], strict=True))


def gram_of(row: dict) -> dict[str, float]:
    return dict(zip(tables.GRAM_NAMES, row["gram"], strict=True))


def power(x, p: int) -> float:
    return float((x.double().abs() ** p).sum())


@pytest.mark.parametrize("t", walks.GRID)
def test_noised_statistics_are_what_their_names_say(network, encoded, everything, t):
    s, row = Slow(network, encoded, 0), one(everything[0], "noised", t)
    z = s.noised(s.z0, s.eps, t)
    cond, null = s.predicts(z, t, "caption"), s.predicts(z, t, "empty")
    norms, gram = norms_of(row), gram_of(row)
    for name, e in (("cond", cond), ("null", null)):
        for p in (1, 4, 5):
            assert norms[f"{name}_eps_l{p}"] == pytest.approx(power(e - s.eps, p), rel=1e-5)
        assert norms[f"{name}_l1"] == pytest.approx(power(e, 1), rel=1e-5)
        assert norms[f"{name}_l4"] == pytest.approx(power(e, 4), rel=1e-5)
    both = {"z0": s.z0, "eps": s.eps, "null": null, "cond": cond}
    for pair, value in gram.items():
        first, second = (both[word].double() for word in pair.split("_"))
        scale = float(first.norm() * second.norm())
        assert value == pytest.approx(float((first * second).sum()), abs=1e-6 * scale)


@pytest.mark.parametrize("t", [0, 10, 190])
def test_the_clean_latent_is_told_that_it_is_noised(network, encoded, everything, t):
    s, row = Slow(network, encoded, 3), one(everything[0], "clean", t, 3)
    assert norms_of(row)["cond_l4"] == pytest.approx(power(s.predicts(s.z0, t, "caption"), 4), rel=1e-5)
    assert norms_of(row)["null_l4"] == pytest.approx(power(s.predicts(s.z0, t, "empty"), 4), rel=1e-5)
    assert gram_of(row)["eps_cond"] is None and norms_of(row)["cond_eps_l1"] is None
    z0 = s.z0[0].double()
    squares = [(c, y, x) for c in range(4) for y in (0, 2, 4, 6) for x in (0, 2, 4, 6)]
    low = sum(4 * float(z0[c, y : y + 2, x : x + 2].mean()) ** 2 for c, y, x in squares)
    assert row["bands"][:5] == pytest.approx([*(float((z0[c] ** 2).sum()) for c in range(4)), low], rel=1e-6)
    assert row["bands"][5:] == [None] * 5


@pytest.mark.parametrize(("block", "text"), [("pia", "caption"), ("pia-null", "empty")])
@pytest.mark.parametrize("t", walks.PIA_TIMESTEPS)
def test_pia_noises_with_the_models_own_prediction(network, encoded, everything, block, text, t):
    s, row, side = Slow(network, encoded, 8), one(everything[0], block, t, 8), "cond" if text == "caption" else "null"
    e0 = s.predicts(s.z0, 0, text)
    e = s.predicts(s.noised(s.z0, e0, t), t, text)
    assert norms_of(row)[f"{side}_eps_l4"] == pytest.approx(power(e0 - e, 4), rel=1e-5)
    assert norms_of(row)["null_eps_l4" if side == "cond" else "cond_eps_l4"] is None
    n0 = e0 / e0.abs().mean() * math.sqrt(2 / math.pi)
    assert float(n0.abs().mean()) == pytest.approx(0.7978846, rel=1e-5)
    if t == 200:
        row = one(everything[0], block.replace("pia", "pian"), t, 8)
        e = s.predicts(s.noised(s.z0, n0, t), t, text)
        assert norms_of(row)[f"{side}_eps_l5"] == pytest.approx(power(n0 - e, 5), rel=1e-5)


@pytest.mark.parametrize(("block", "text"), [("secmi", "caption"), ("secmi-null", "empty")])
def test_secmi_inverts_and_steps_back(network, encoded, everything, block, text):
    s, y = Slow(network, encoded, 0), None
    for t in range(0, 150, 10):
        y = s.z0 if y is None else y
        up = s.phi(y, s.predicts(y, t, text), t, t + 10)
        back = s.phi(up, s.predicts(up, t + 10, text), t + 10, t)
        row = one(everything[0], block, t)
        assert row["latent_error"] == pytest.approx(power(back - y, 2) / 256, rel=1e-4)
        if t == 140:
            assert row["vector"] == pytest.approx((back - y).abs().flatten().tolist(), rel=1e-3, abs=1e-6)
        else:
            assert row["vector"] is None
        y = up


def test_stepback_prompts_crops_and_aggregation(network, encoded, everything):
    import itertools

    table, s = everything[0], Slow(network, encoded, 0)
    for text, end in (("caption", ""), ("empty", "-null")):
        z = s.noised(s.z0, s.eps, 51)
        up = s.phi(z, s.predicts(z, 51, text), 51, 61)
        back = s.phi(up, s.predicts(up, 61, text), 61, 51)
        assert one(table, f"stepback{end}", 51)["latent_error"] == pytest.approx(power(back - z, 2) / 256, rel=1e-4)
        z, found = s.noised(s.z0, s.eps, 101), []
        for t in (101, 91, 81, 71, 61):
            found.append(s.predicts(z, t, text))
            z = s.phi(z, found[-1], t, t - 10)
        distances = [power(a - b, 2) ** 0.5 for a, b in itertools.combinations(found, 2)]
        assert one(table, f"aggregation{end}", 101)["vector"] == pytest.approx([np.mean(distances)], rel=1e-4)
    for k, t in itertools.product((1, 2, 3), walks.PROMPT_TIMESTEPS):
        e = s.predicts(s.noised(s.z0, s.eps, t), t, f"prompt-{k}")
        assert norms_of(one(table, f"prompt-{k}", t))["cond_eps_l1"] == pytest.approx(power(e - s.eps, 1), rel=1e-5)
    for t in walks.CROP_TIMESTEPS:
        z = s.noised(s.crop, s.eps, t)
        gram = gram_of(one(table, "crop-82", t))
        for name, text in (("cond", "caption"), ("null", "empty")):
            e = s.predicts(z, t, text)
            sse = gram["eps_eps"] - 2 * gram[f"eps_{name}"] + gram[f"{name}_{name}"]
            assert sse == pytest.approx(power(e - s.eps, 2), rel=1e-5)


def test_what_needs_the_empty_prompt_is_empty_without_it(network, encoded):
    class Unconditional:
        """The same network, said to know no empty prompt."""

        def __getattr__(self, name):
            return getattr(network, name)

        def __call__(self, *arguments):
            return network(*arguments)

        has_null = False

    options = FeaturesOptions(settings=(18,), probes=("noised", "pia"), draws=1)
    table, done = read(Unconditional(), encoded, options, IDS[:2])
    gram = gram_of(one(table, "noised", 301))
    assert [name for name, value in gram.items() if value is None] == [n for n in gram if "null" in n]
    assert rows_of(table, "pia-null").is_empty()
    assert done == walks.Counts(2 * (15 + 6), 2)


def test_weights_that_give_nan_fail_naming_sample_and_timestep(network, encoded):
    import copy

    broken = copy.copy(network)
    broken.denoiser = copy.deepcopy(network.denoiser)
    broken.denoiser.conv_out.bias.data[0] = float("nan")
    for options, t in (
        (FeaturesOptions(settings=(18,), losses=("model_loss",)), 301),
        (FeaturesOptions(settings=(), probes=("clean",)), 0),
        (FeaturesOptions(settings=(), probes=("secmi",)), 0),
    ):
        with pytest.raises(UserError, match=rf"not finite.*sample [0-9a-f]{{32}}, timestep {t}"):
            read(broken, encoded, options)


class Small:
    """A device that holds only so many rows at a time."""

    def __init__(self, network, rows: int):
        self.network, self.rows, self.called = network, rows, []

    def __getattr__(self, name):
        return getattr(self.network, name)

    def __call__(self, z, t, condition):
        import torch

        self.called.append(len(z))
        if len(z) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.network(z, t, condition)


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(network, encoded):
    options = FeaturesOptions(settings=(18,), draws=2, losses=("model_loss",))
    whole, done = read(network, encoded, options)
    small = Small(network, 17)
    table, counts = read(small, encoded, options, batch_size=32)
    assert counts == done
    assert small.called == [18, 16, 16]  # 18 pairs: 16, and 2 that are filled up, since fewer sum in another order
    assert table.equals(whole)
    with pytest.raises(UserError, match="memory does not hold 16 rows at a time, cpu, use a larger one"):
        read(Small(network, 15), encoded, options)


def test_halves_are_found_once_and_kept_to_and_change_no_bit(network, encoded):
    options = FeaturesOptions(settings=(18,), probes=("noised",), draws=9)
    whole, done = read(network, encoded, options, batch_size=81)
    small = Small(network, 2 * 41)  # both texts in one call
    table, counts = read(small, encoded, options, batch_size=64)
    assert counts == done and table.equals(whole)
    assert [n for n in small.called if n > small.rows] == [2 * 64]  # 64 pairs once, then 32, and 17 as they are


def test_draws_differ_and_are_seeded(network, encoded):
    options = FeaturesOptions(settings=(18,), draws=2)
    table = rows_of(read(network, encoded, options)[0], "setting-18")
    assert table["model_loss"].n_unique() == len(table)
    other = rows_of(read(network, encoded, options, seed=SEED + 1)[0], "setting-18")
    assert not set(other["model_loss"]) & set(table["model_loss"])
    more = rows_of(read(network, encoded, dataclasses.replace(options, draws=3))[0], "setting-18")
    assert more.filter(pl.col("draw") < 2).equals(table)


def test_a_posterior_sample_moves_the_latent_by_its_spread(network, encoded):
    import torch

    options = FeaturesOptions(settings=(), probes=("noised",), draws=2, posterior="sample")
    shard = samples_of(network, encoded, IDS[:2], pixels=False)
    spread = {
        name: torch.full_like(z0, size) for (name, z0), size in zip(shard.latents.items(), (0.5, 2.0), strict=True)
    }
    shard = dataclasses.replace(shard, spread=spread)
    for block, size, draws in (("noised", 0.5, 2), ("crop-82", 2.0, 1)):
        job = block.partition("-")[0].replace("crop", "crops")
        its = walks.jobs(dataclasses.replace(options, probes=(job,)))[job]
        table, _ = features.extract(network, shard, its, SEED, 64)
        rows = rows_of(table, block).filter(pl.col("sample_id") == IDS[0], pl.col("timestep") == 101).to_dicts()
        assert len(rows) == draws
        for draw, row in enumerate(rows):  # the crop has the image's own noise, since PFAMI compares the two
            own = rng.stream(SEED, IDS[0], draw, "posterior").standard_normal((4, 8, 8), dtype=np.float32)
            z0 = shard.latents["image" if block == "noised" else block][0].numpy() + size * own
            assert gram_of(row)["z0_z0"] == pytest.approx(float((z0.astype(np.float64) ** 2).sum()), rel=1e-6)


def test_a_crops_posterior_is_read_like_the_images(network, encoded, tmp_path):
    """82 % of 32 pixels are 26, from the fourth on; mean and spread are what the VAE itself says of them."""
    import torch
    from PIL import Image

    found, texts, data = encoded
    about = {"status": "ok", "detail": "", "sha256": "0" * 64, "width": 40, "height": 47, "format": "png", "phash": 0}
    images = [{"sample_id": name, "bytes": data[name], **about} for name in IDS]
    parts = {"latents": found, "texts": texts, "images": pa.Table.from_pylist(images, tables.SCHEMAS["images"])}
    for name, table in parts.items():
        tables.write(tmp_path / f"{name}.parquet", table, name, {"text_width": 32})
    files = [tmp_path / f"{name}.parquet" for name in parts]
    options = FeaturesOptions(settings=(), probes=("crops",), posterior="sample")
    shard = reading.Shard(*files, None, {"source": ""}, "crops", options, SEED)
    got = reading.samples(shard, network, network.autoencoder, None)
    assert got.spread.keys() == got.latents.keys() == {"image", "crop-82"}
    whole = latents.squares(data, [got.ids[2]], 32)[0]
    crop = np.array(Image.fromarray(whole[3:29, 3:29]).resize((32, 32), Image.Resampling.BILINEAR))
    for source, seen in (("image", whole), ("crop-82", crop)):
        x = torch.from_numpy(seen.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            said = network.autoencoder.net.encode(x).latent_dist
        np.testing.assert_allclose(got.latents[source][2], 0.7 * said.mean[0], rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(got.spread[source][2], 0.7 * said.std[0], rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_lower_precision_moves_a_loss_little(network, tiny_target, encoded, dtype, bound):
    import torch

    options = FeaturesOptions(settings=(18,), draws=1, losses=("model_loss", "latent_error"))
    exact = rows_of(read(network, encoded, options, IDS[:3])[0], "setting-18")
    low = families.find(str(tiny_target)).network(torch.device("cpu"), models.torch_dtype(dtype))
    found = rows_of(read(low, encoded, options, IDS[:3])[0], "setting-18")
    for loss in ("model_loss", "latent_error"):
        change = (found[loss] / exact[loss] - 1).abs().max()
        assert 0 < change < bound


def test_an_empty_shard_gives_an_empty_table(network, encoded):
    options = FeaturesOptions(settings=(15, 16), probes=("secmi",))
    table, done = read(network, encoded, options, [])
    assert table.num_rows == 0 and done == walks.Counts()
    assert tables.check(pa.concat_tables([table, read(network, encoded, options, IDS[:1])[0]]), "features").num_rows
