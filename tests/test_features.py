"""The extraction engine against a slow oracle, its invariances, and its counts of model calls."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from mia import features, latents, models, pixels, rng, settings, tables
from mia.config import FeaturesOptions
from mia.errors import UserError
from tests.conftest import picture

SEED = 11
IDS = [tables.sample_id(f"u{i}", f"c{i}") for i in range(9)]
CAPTIONS = ["a red dog", "two cats", "a red dog", "", "snow on a hill", "sun", "car", "blue boat", "tree"]
OPTIONS = FeaturesOptions(draws=2)


@pytest.fixture(scope="module")
def parts(tiny_target):
    import torch

    on, dtype = torch.device("cpu"), torch.float32
    return {
        "unet": models.unet(tiny_target, on, dtype), "vae": models.vae(tiny_target, on, dtype),
        "tokenizer": models.tokenizer(tiny_target), "text": models.text_encoder(tiny_target, on, dtype),
        "schedule": models.schedule(tiny_target), "folder": tiny_target,
    }  # fmt: skip


@pytest.fixture(scope="module")
def encoded(parts):
    selection = pa.table({"sample_id": IDS, "caption": CAPTIONS})
    data = {name: picture(i) for i, name in enumerate(IDS)}
    found, texts = latents.encode(selection, data, parts["vae"], parts["tokenizer"], parts["text"], 32, 4)
    return found, texts, data


def engine_for(parts, encoded, ids=IDS, options=OPTIONS, unet=None):
    import torch

    found, texts, data = encoded
    rows = pa.concat_tables([found.slice(0, 0), *(found.filter(pa.compute.equal(found["sample_id"], i)) for i in ids)])
    states, caption = latents.state_tensor(rows, texts, 32)
    squares = latents.squares(data, list(ids), 32)
    shown = torch.from_numpy(squares).permute(0, 3, 1, 2).float() if "pixel_error" in options.losses else None
    samples = features.Samples(list(ids), latents.latent_tensor(rows, parts["vae"]), states, caption, shown)
    return features.Engine(unet or parts["unet"], parts["vae"], parts["schedule"], samples, options, SEED)


def rows_of(table: pa.Table, block: str) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(table)).filter(pl.col("block") == block).sort("sample_id", "timestep", "draw")


def oracle(parts, encoded, number: int, sample: int, draw: int) -> dict[int, tuple[float, float, float]]:
    """The three losses at every timestep of one setting, one sample, one draw: plain loops, diffusers' own DDIM.

    Networks are called on 16 copies: guidance of 100 would enlarge what kernels for a batch of one sum differently.
    """
    import torch
    from diffusers import DDIMScheduler

    s = settings.SETTINGS[number]
    found, _, data = encoded
    scheduler = DDIMScheduler.from_pretrained(parts["folder"], subfolder="scheduler")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)  # its own are float32: 1 - alpha_bar(1) is off by 4e-5 there
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(1000 // s.step)
    tokens = parts["tokenizer"](
        [CAPTIONS[sample], ""], padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        text = parts["text"](tokens.input_ids)[0].half().float()
        row = found["sample_id"].to_pylist().index(IDS[sample])
        z0 = 0.7 * torch.tensor(found["mean"][row].as_py()).float().reshape(1, 4, 8, 8)
        eps = torch.from_numpy(
            rng.stream(SEED, IDS[sample], draw, "forward").standard_normal((1, 4, 8, 8), dtype=np.float32)
        )
        image = torch.from_numpy(pixels.centre_square(pixels.decode(data[IDS[sample]], 10**6), 32).copy()).float()
        acp = scheduler.alphas_cumprod
        out, z = {}, None
        for t in s.timesteps():
            level = s.start_noise_step if s.iterative else t
            if z is None or not s.iterative:
                z = (acp[level].sqrt() * z0 + (1 - acp[level]).sqrt() * eps).float()
            cond, null = (
                parts["unet"](z.expand(16, -1, -1, -1), t, c.expand(16, -1, -1)).sample[:1]
                for c in (text[:1], text[1:])
            )
            e = null + s.guidance_scale * (cond - null)
            prev = scheduler.step(e.double(), t, z.double(), eta=0.0).prev_sample.float()
            decoded = parts["vae"].decode((prev / 0.7).expand(16, -1, -1, -1)).sample[0]
            shown = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
            out[t] = (
                float(((eps - cond) ** 2).double().mean()), float(((prev - z0) ** 2).double().mean()),
                float((image - shown).abs().double().mean()),
            )  # fmt: skip
            z = prev
    return out


@pytest.mark.parametrize("number", [1, 15, 16, 18])
def test_losses_equal_the_slow_oracle(parts, encoded, number):
    engine = engine_for(parts, encoded)
    table = features.extract(engine, settings.block_of(settings.SETTINGS[number]), [number], 64)
    got = rows_of(table, f"setting-{number:02d}")
    for sample, draw in [(0, 0), (3, 1), (8, 1)]:
        wanted = oracle(parts, encoded, number, sample, draw)
        mine = got.filter(pl.col("sample_id") == IDS[sample], pl.col("draw") == draw)
        assert mine["timestep"].to_list() == sorted(wanted)
        for row in mine.to_dicts():
            model, latent, pixel = wanted[row["timestep"]]
            assert row["model_loss"] == pytest.approx(model, rel=1e-5)
            assert row["latent_error"] == pytest.approx(latent, rel=1e-5)
            assert row["pixel_error"] == pytest.approx(pixel, rel=1e-4)  # a rounded pixel may fall on the other side


def test_the_schedule_is_scaled_linear(parts):
    assert parts["schedule"].at(300) == pytest.approx(0.59050, abs=1e-5)
    assert parts["schedule"].at(-9) == parts["schedule"].at(0)
    assert parts["schedule"].at(np.array([0, 999])) == pytest.approx([0.99915, 0.0046601], rel=1e-4)


@pytest.mark.parametrize("block", ["noised", "setting-15"])
def test_batch_size_order_and_shards_change_nothing(parts, encoded, block):
    numbers = [15, 16, 18]
    whole = features.extract(engine_for(parts, encoded), block, numbers, 64)
    assert features.extract(engine_for(parts, encoded), block, numbers, 1).equals(whole)
    assert features.extract(engine_for(parts, encoded, IDS[::-1]), block, numbers, 7).equals(whole)
    shards = [engine_for(parts, encoded, IDS[i::7]) for i in range(7)]
    pieces = [features.extract(shard, block, numbers, 64) for shard in shards]
    assert tables.check(pa.concat_tables(pieces), "features").equals(whole)


@pytest.mark.parametrize(
    ("losses", "block", "numbers", "rows", "decodes"),
    [  # for each image and draw, counted by hand from performance.md B
        (settings.LOSSES, "noised", [16, 18], 20, 11),
        (settings.LOSSES, "setting-01", [1], 52, 26),
        (settings.LOSSES, "setting-15", [15], 20, 10),
        (("model_loss",), "noised", [16, 18], 10, 0),
        (("model_loss",), "setting-01", [1], 51, 0),
        (("model_loss", "latent_error"), "noised", [18], 2, 0),
    ],
)
def test_work_is_counted_and_planned(parts, encoded, losses, block, numbers, rows, decodes):
    options = FeaturesOptions(draws=2, losses=losses)
    engine = engine_for(parts, encoded, IDS[:3], options)
    features.extract(engine, block, numbers, 8)
    assert engine.counts == features.Counts(rows * 6, decodes * 6)
    assert features.plan(block, numbers, options, 3) == engine.counts


def test_a_setting_gives_the_same_losses_alone_and_in_company(parts, encoded):
    alone = features.extract(engine_for(parts, encoded), "noised", [18], 64)
    company = features.extract(engine_for(parts, encoded), "noised", [16, 18], 64)
    assert rows_of(alone, "setting-18").equals(rows_of(company, "setting-18"))


def test_gram_matrix_gives_model_loss_and_latent_error(parts, encoded):
    table = features.extract(engine_for(parts, encoded), "noised", [16], 64)
    grid, losses = rows_of(table, "noised"), rows_of(table, "setting-16")
    alpha = settings.alpha_bar(0.00085, 0.012)
    at = {name: i for i, name in enumerate(features.GRAM_NAMES)}
    for row, loss in zip(grid.to_dicts(), losses.to_dicts(), strict=True):
        g, t = row["gram"], row["timestep"]
        sse = g[at["eps_eps"]] - 2 * g[at["eps_cond"]] + g[at["cond_cond"]]
        assert sse / 256 == pytest.approx(loss["model_loss"], rel=1e-6)
        assert sum(row["bands"][:4]) == pytest.approx(sse, rel=1e-6)
        assert 0 < row["bands"][4] < sse
        a, p = alpha[t], alpha[max(t - 100, 0)]
        root, w = math.sqrt(p * (1 - a) / a), 100.0
        k = math.sqrt(1 - p) - root
        c = np.array([math.sqrt(p) - 1, root, (1 - w) * k, w * k])  # of z0, eps, null, cond
        full = np.zeros((4, 4))
        full[np.triu_indices(4)] = g
        full = full + np.triu(full, 1).T
        assert c @ full @ c / 256 == pytest.approx(loss["latent_error"], rel=1e-4)


def test_norms_are_what_their_names_say(parts, encoded):
    import torch

    engine = engine_for(parts, encoded, IDS[:1])
    row = rows_of(features.extract(engine, "noised", [18], 4), "noised").to_dicts()[0]
    z0, eps = engine.samples.z0[:1], engine.eps[0, :1]
    a = settings.alpha_bar(0.00085, 0.012)[301]
    with torch.no_grad():
        text = engine.samples.states[engine.samples.caption[:1]]
        e = parts["unet"](math.sqrt(a) * z0 + math.sqrt(1 - a) * eps, 301, text).sample.double()
    norms = dict(zip(features.NORM_NAMES, row["norms"], strict=True))
    assert norms["cond_eps_l1"] == pytest.approx(float((e - eps).abs().sum()), rel=1e-5)
    assert norms["cond_eps_l4"] == pytest.approx(float(((e - eps) ** 4).sum()), rel=1e-5)
    assert norms["cond_eps_l5"] == pytest.approx(float(((e - eps).abs() ** 5).sum()), rel=1e-5)
    assert norms["cond_l4"] == pytest.approx(float((e**4).sum()), rel=1e-5)


def test_what_needs_the_empty_prompt_is_empty_without_it(parts, encoded):
    options = FeaturesOptions(draws=1, losses=("model_loss",))
    table = features.extract(engine_for(parts, encoded, IDS[:2], options), "noised", [18], 8)
    row = rows_of(table, "noised").to_dicts()[0]
    values = dict(zip(features.GRAM_NAMES, row["gram"], strict=True))
    assert [name for name, value in values.items() if value is None] == [n for n in values if "null" in n]
    assert rows_of(table, "setting-18")["latent_error"].null_count() == 2


def test_weights_that_give_nan_fail_naming_sample_and_timestep(parts, encoded):
    import copy

    broken = copy.deepcopy(parts["unet"])
    broken.conv_out.bias.data[0] = float("nan")
    with pytest.raises(UserError, match=rf"not finite.*{min(IDS)[:4]}|not finite.*sample [0-9a-f]{{32}}, timestep 301"):
        features.extract(engine_for(parts, encoded, unet=broken), "noised", [18], 8)


def test_draws_differ_and_are_seeded(parts, encoded):
    table = rows_of(features.extract(engine_for(parts, encoded), "noised", [18], 64), "setting-18")
    assert table["model_loss"].n_unique() == len(table)
    other = engine_for(parts, encoded)
    other.eps = other.eps.flip(1)  # draws exchanged
    swapped = rows_of(features.extract(other, "noised", [18], 64), "setting-18")
    assert swapped["model_loss"].to_list()[::2] == table["model_loss"].to_list()[1::2]


def test_settings_agree_with_the_specification():
    import json

    from tests.conftest import SHARED

    file = SHARED / "spec" / "settings.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    for row in json.loads(file.read_text())["settings"]:
        if row["number"] in settings.SETTINGS:
            mine = settings.SETTINGS[row["number"]]
            assert list(mine.timesteps()) == row["timesteps"]
            assert list(mine.timesteps("committed")) == row["timesteps_as_committed"]
            for name in {f.name for f in dataclasses.fields(mine)} & row.keys():
                assert getattr(mine, name) == row[name], (row["number"], name)


def test_an_empty_shard_gives_an_empty_table(parts, encoded):
    for block in ("noised", "setting-15"):
        table = features.extract(engine_for(parts, (encoded[0].slice(0, 0), *encoded[1:]), []), block, [15, 16], 64)
        assert table.num_rows == 0
        assert tables.check(
            pa.concat_tables([table, features.extract(engine_for(parts, encoded), block, [15, 16], 64)]), "features"
        )
