"""The engine on every family of models, with the real diffusers classes at toy size, against plain loops."""

from __future__ import annotations

import functools

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from mia import families, features, latents, rng, settings, tables, walks
from mia.config import FeaturesOptions
from mia.reader import Samples
from tests import toys
from tests.conftest import picture

BUILD = {
    "sd2": functools.partial(toys.stable, prediction="v_prediction"),
    "sdxl": toys.xl, "sd3": toys.sd3, "ldm": toys.unconditional, "dit": toys.dit, "ddpm": toys.ddpm,
}  # fmt: skip
IDS = [tables.sample_id(f"u{i}", "") for i in range(2)]
SEED = 5
OPTIONS = FeaturesOptions(settings=(7, 13, 16), probes=("clean", "noised", "secmi"), draws=1)


@pytest.fixture(scope="module", params=BUILD)
def read(request, tmp_path_factory):
    """A family's network, its samples, and what every job gives."""
    import torch

    folder = tmp_path_factory.mktemp(request.param)
    BUILD[request.param](folder)
    model, on = families.find(str(folder)), torch.device("cpu")
    network, captions = model.network(on, torch.float32), model.captions(on)
    names = ["3", "7"] if request.param == "dit" else ["a dog", "snow on it"]
    data = {name: picture(i) for i, name in enumerate(IDS)}
    selection = pa.table({"sample_id": IDS, "caption": names})
    rows, texts, _ = latents.encode(selection, data, network.autoencoder, captions, 4)
    condition, caption = latents.conditions(rows, texts, captions.width)
    mean, _ = latents.posterior(rows, network.latent_shape)
    shown = torch.from_numpy(latents.squares(data, rows["sample_id"].to_pylist(), network.side_px)).permute(0, 3, 1, 2)
    ids = rows["sample_id"].to_pylist()
    samples = Samples(ids, {"image": network.scaled(mean)}, condition, {"caption": caption}, shown.float())
    found, counts = [], walks.Counts()
    for its in walks.jobs(OPTIONS).values():
        table, done = features.extract(network, samples, its, SEED, 16)
        found.append(table)
        counts += done
        assert done == walks.planned(its, network.has_null) * 2
    table = pl.DataFrame(pl.from_arrow(tables.check(pa.concat_tables(found), "features")))
    return request.param, network, samples, table


def outputs(network, samples, row: int, z, t: int):
    """What the network says under the caption and, where there is one, under the null condition; 16 copies each."""
    import torch

    out = []
    for place in (samples.text["caption"][row], -1) if network.has_null else (samples.text["caption"][row],):
        told = {name: values[[place]].repeat_interleave(16, 0) for name, values in samples.condition.items()}
        with torch.inference_mode():
            out.append(network(z.repeat(16, 1, 1, 1), torch.full((16,), t), told)[:1])
    return out


@pytest.mark.parametrize("number", [7, 13, 16])
def test_losses_are_those_of_a_plain_loop(read, number):
    """Noise prediction, step and loss written out for each kind of training target, with numbers of our own."""
    import torch

    name, network, samples, table = read
    row, of = 1, settings.SETTINGS[number]
    kind = {"sd2": "v", "sd3": "flow"}.get(name, "epsilon")
    if kind == "flow":
        alpha, sigma = (lambda t: 1 - max(t, 0) / 1000), (lambda t: max(t, 0) / 1000)
    else:
        bar = np.append(network.schedule.alpha_bar, network.schedule.final)
        alpha, sigma = (lambda t: bar[max(t, -1)] ** 0.5), (lambda t: (1 - bar[max(t, -1)]) ** 0.5)
    z0 = samples.latents["image"][row : row + 1]
    shape = tuple(z0.shape)
    drawn = rng.stream(SEED, samples.ids[row], 0, "forward").standard_normal(shape, dtype=np.float32)
    eps, z = torch.from_numpy(drawn), None
    found = table.filter(pl.col("block") == f"setting-{number:02d}", pl.col("sample_id") == samples.ids[row])
    rows = {r["timestep"]: r for r in found.to_dicts()}
    for t in of.timesteps():
        a, s = alpha(t), sigma(t)
        if z is None or not of.iterative:
            level = of.start_noise_step if of.iterative else t
            z = alpha(level) * z0 + sigma(level) * eps
        said = outputs(network, samples, row, z, t)
        if kind == "v":
            target, noise = a * eps - s * z0, [a * v + s * z for v in said]
        elif kind == "flow":
            target, noise = eps - z0, [z + a * v for v in said]
        else:
            target, noise = eps, said
        w = of.guidance_scale
        e = noise[1] + w * (noise[0] - noise[1]) if w and len(noise) == 2 else noise[0]
        u = t - of.step
        prev = alpha(u) * (z - s * e) / a + sigma(u) * e
        assert rows[t]["model_loss"] == pytest.approx(float(((target - said[0]) ** 2).mean()), rel=2e-5)
        assert rows[t]["latent_error"] == pytest.approx(float(((prev - z0) ** 2).mean()), rel=2e-4)
        with torch.inference_mode():
            picture_ = ((network.decode(prev.repeat(16, 1, 1, 1))[:1] / 2 + 0.5).clamp(0, 1) * 255).round()
        off = float((samples.pixels[row : row + 1] - picture_).abs().mean())
        assert rows[t]["pixel_error"] == pytest.approx(off, rel=2e-3)
        z = prev
    assert len(rows) == 10


def test_probes_are_read_with_and_without_a_null_condition(read):
    name, network, samples, table = read
    clean = table.filter(pl.col("block") == "clean", pl.col("sample_id") == samples.ids[0], pl.col("timestep") == 100)
    norms = dict(zip(tables.NORM_NAMES, clean["norms"][0], strict=True))
    said = outputs(network, samples, 0, samples.latents["image"][:1], 100)
    a, s = float(network.schedule.alpha(100)), float(network.schedule.sigma(100))
    noise = [network.schedule.to_noise(x, samples.latents["image"][:1], a, s) for x in said]
    assert norms["cond_l4"] == pytest.approx(float((noise[0].double() ** 4).sum()), rel=1e-5)
    assert (norms["null_l4"] is None) == (name in ("ldm", "ddpm"))
    if network.has_null:
        assert norms["null_l4"] == pytest.approx(float((noise[1].double() ** 4).sum()), rel=1e-5)
    assert ("secmi-null" in set(table["block"])) == network.has_null
    grid = table.filter(pl.col("block") == "noised", pl.col("sample_id") == samples.ids[0])
    assert set(walks.GRID) <= set(grid["timestep"])
