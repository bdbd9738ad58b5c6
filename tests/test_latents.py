"""Encoding against the VAE and text encoder called one by one, and its invariances."""

from __future__ import annotations

import io
import types

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mia import families, latents, tables
from mia.errors import UserError
from tests.conftest import picture

CAPTIONS = ["a dog", "", "a dog", "snow"]
IDS = [tables.sample_id(f"u{i}", c) for i, c in enumerate(CAPTIONS)]


@pytest.fixture(scope="module")
def run(tiny_target):
    import torch

    target, on = families.find(str(tiny_target)), torch.device("cpu")
    autoencoder, captions = target.autoencoder(on, torch.float32), target.captions(on)
    data = {name: picture(i) for i, name in enumerate(IDS)}

    def encode(order: list[int], batch_size: int) -> tuple[pa.Table, pa.Table]:
        selection = pa.table({"sample_id": [IDS[i] for i in order], "caption": [CAPTIONS[i] for i in order]})
        found, texts, _ = latents.encode(selection, data, autoencoder, captions, batch_size)
        return tables.check(found, "latents"), tables.check(texts, "texts")

    return encode, autoencoder, data


def test_latents_are_the_vaes_posterior_of_the_centre_crop(run):
    import torch

    encode, autoencoder, data = run
    found, _ = encode([0, 1, 2, 3], 64)
    for name in IDS:
        image = Image.open(io.BytesIO(data[name])).convert("RGB")  # 40 x 47 becomes 32 x 37; 32 rows of it stay
        full = np.asarray(image.resize((32, int(32 * 47 / 40)), Image.Resampling.BILINEAR))
        top = round((full.shape[0] - 32) / 2)
        x = torch.from_numpy(full[top : top + 32].copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            posterior = autoencoder.net.encode((2 * x - 1).expand(16, -1, -1, -1)).latent_dist
        row = found["sample_id"].to_pylist().index(name)
        np.testing.assert_allclose(found["mean"][row].as_py(), posterior.mean[0].flatten(), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(found["logvar"][row].as_py(), posterior.logvar[0].flatten(), rtol=2e-3, atol=2e-3)


def test_one_text_row_for_each_caption_and_the_null_condition(run):
    encode, _, _ = run
    found, texts = encode([0, 2, 3], 64)
    assert set(texts["caption_id"].to_pylist()) == {tables.caption_id(c) for c in ("a dog", "snow")} | {latents.NULL_ID}
    condition, rows = latents.conditions(found, texts, 32)
    assert set(condition) == {"states"}
    states = condition["states"]
    assert states.shape == (3, 32, 32)
    place = dict(zip(found["sample_id"].to_pylist(), rows, strict=True))
    assert place[IDS[0]] == place[IDS[2]] != place[IDS[3]]
    alone, empty_texts = encode([1], 64)  # a sample whose own caption is empty
    empty, row = latents.conditions(alone, empty_texts, 32)
    empty = empty["states"]
    assert len(empty) == 2
    assert (empty[-1] == empty[row[0]]).all()
    assert (states[-1] == empty[-1]).all()


def test_batch_size_and_order_change_nothing(run):
    encode, _, _ = run
    whole = encode([0, 1, 2, 3], 64)
    for order, size in [([3, 1, 0, 2], 64), ([0, 1, 2, 3], 1), ([2, 0, 3, 1], 3)]:
        again = encode(order, size)
        assert again[0].equals(whole[0])
        assert again[1].equals(whole[1])


def test_latents_are_scaled_on_reading(run):
    encode, autoencoder, _ = run
    found, _ = encode([0, 1], 64)
    mean, logvar = latents.posterior(found, autoencoder.latent_shape)
    z0 = autoencoder.scaled(mean)
    assert z0.shape == logvar.shape == (2, 4, 8, 8)
    np.testing.assert_allclose(z0[0].flatten(), 0.7 * np.array(found["mean"][0].as_py()), rtol=1e-6)
    with pytest.raises(UserError, match="latents are not of shape"):
        latents.posterior(found, (4, 9, 9))


@pytest.mark.parametrize(("scaling", "wanted"), [(0.18215, 1.0), (1.0, 5.49)])
def test_the_spread_of_scaled_latents_tells_whether_the_factor_was_left_out(scaling, wanted):
    """Stable Diffusion's codes have 5.49 and a mean of their own; the factor makes 1 of it, in all rows together."""
    codes = 2 + np.random.default_rng(0).normal(0, 1 / 0.18215, (600, 64))
    found = pa.table({"mean": tables.vector_column(codes.astype(np.float16))})
    coder = types.SimpleNamespace(scaled=lambda mean: (mean - 0.1) * scaling)
    assert latents.spread(found, coder) == pytest.approx(wanted, rel=0.01)
    assert latents.spread(found, coder) == pytest.approx(scaling * codes.std(), rel=1e-3)
    assert latents.spread(found.slice(0, 1), coder) == pytest.approx(scaling * codes[0].std(), rel=1e-3)
    assert latents.spread(found.slice(0, 0), coder) is None


def test_images_smaller_than_the_model_are_enlarged_and_counted(tiny_target):
    import torch

    target, on = families.find(str(tiny_target)), torch.device("cpu")
    selection = pa.table({"sample_id": IDS, "caption": CAPTIONS})
    data = {name: picture(i, side=20 if i < 3 else 32) for i, name in enumerate(IDS)}  # 20 x 27 and 32 x 39
    found = latents.encode(selection, data, target.autoencoder(on, torch.float32), target.captions(on), 64)
    assert found.enlarged == 3
    assert found.latents.num_rows == 4


def test_an_empty_shard_gives_an_empty_table(run):
    encode, _, _ = run
    found, texts = encode([], 64)
    whole, _ = encode([0, 1], 64)
    assert found.num_rows == 0
    assert found.schema.equals(whole.schema)
    assert texts["caption_id"].to_pylist() == [latents.NULL_ID]
