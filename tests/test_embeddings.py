"""Embeddings against a forward pass written out, recorded numbers, and every batch size and number of workers."""

from __future__ import annotations

import io
import itertools
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from mia import cli, embeddings, models, pixels, tables
from mia.errors import UserError
from tests.conftest import ROOT, picture

FOLDER = ROOT / "resources/example/encoders/clip"
CAPTION = "A red circle, drawn"
# Of `drawing` and CAPTION: every fourth entry of the unit vectors, by `by_hand`.
GOLDEN = {
    "image": [0.2483, -0.0995, 0.0640, -0.0883, 0.0626, -0.0131, 0.0484, 0.0357, -0.0615, 0.1183, -0.0058, 0.0226,
              0.0819, -0.0416, -0.1570, -0.2143],
    "text": [0.1068, 0.1463, 0.0360, -0.3149, 0.0574, 0.0968, -0.1073, 0.0421, -0.0943, 0.1309, 0.0937, -0.2126,
             0.1083, 0.0283, 0.1327, 0.1052],
}  # fmt: skip


def drawing() -> bytes:
    """Something drawn with plain colours and straight coordinates, 96 x 80, without loss."""
    image = Image.new("RGB", (96, 80), (240, 240, 210))
    pen = ImageDraw.Draw(image)
    pen.ellipse((20, 10, 70, 60), fill=(200, 30, 40))
    pen.rectangle((60, 50, 90, 75), fill=(20, 60, 160))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def clip():
    """The shipped encoder: network, preprocessing, tokenizer."""
    import torch

    return models.encoder(f"local-dir:{FOLDER}", torch.device("cpu"))[:3]


def vectors(table, space: str) -> np.ndarray:
    return tables.vectors(table[space], np.float64)


# ------------------------------------------------------------------------------------------------ golden


def layer_norm(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def transformer(x: np.ndarray, w: dict, name: str, layers: int, heads: int, mask: np.ndarray) -> np.ndarray:
    """Pre-norm blocks with GELU, float64[tokens, width]."""
    from scipy.special import erf

    for layer in (f"{name}.resblocks.{i}" for i in range(layers)):
        inner = layer_norm(x, w, f"{layer}.ln_1") @ w[f"{layer}.attn.in_proj_weight"].T
        inner += w[f"{layer}.attn.in_proj_bias"]
        parts = []
        for q, k, v in zip(*(np.split(part, heads, axis=1) for part in np.split(inner, 3, axis=1)), strict=True):
            weight = np.exp(q @ k.T / np.sqrt(q.shape[1]) + mask)
            parts.append(weight / weight.sum(1, keepdims=True) @ v)
        x = x + linear(np.concatenate(parts, axis=1), w, f"{layer}.attn.out_proj")
        hidden = linear(layer_norm(x, w, f"{layer}.ln_2"), w, f"{layer}.mlp.c_fc")
        x = x + linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, w, f"{layer}.mlp.c_proj")
    return x


def by_hand(data: bytes, tokens: list[int]) -> dict[str, np.ndarray]:
    """Both unit vectors of the shipped encoder, from its weights, without open_clip and torch's modules."""
    from safetensors.numpy import load_file

    w = {name: value.astype(np.float64) for name, value in load_file(FOLDER / "open_clip_model.safetensors").items()}
    shown = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BICUBIC)
    x = (np.asarray(shown, dtype=np.float64) / 255 - 0.5) / 0.5
    patches = x.reshape(8, 8, 8, 8, 3).transpose(0, 2, 4, 1, 3).reshape(64, -1)  # rows, columns, (channel, y, x)
    x = patches @ w["visual.conv1.weight"].reshape(64, -1).T
    x = np.concatenate([w["visual.class_embedding"][None], x]) + w["visual.positional_embedding"]
    x = transformer(layer_norm(x, w, "visual.ln_pre"), w, "visual.transformer", 3, 4, np.zeros((65, 65)))
    image = layer_norm(x[0], w, "visual.ln_post") @ w["visual.proj"]
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"][: len(tokens)]
    x = transformer(x, w, "transformer", 2, 4, np.triu(np.full((len(tokens),) * 2, -np.inf), 1))
    text = layer_norm(x[-1], w, "ln_final") @ w["text_projection"]
    return {"image": image / np.linalg.norm(image), "text": text / np.linalg.norm(text)}


def test_the_shipped_encoder_gives_its_golden_embedding(clip):
    table = embeddings.embed(["0" * 32], [drawing()], [CAPTION], *clip, 4)
    for space, wanted in GOLDEN.items():
        np.testing.assert_allclose(vectors(table, space)[0, ::4], wanted, atol=1e-3)


def test_the_shipped_encoder_agrees_with_its_forward_pass_written_out(clip):
    tokens = [int(t) for t in clip[2]([CAPTION])[0]]
    table = embeddings.embed(["0" * 32], [drawing()], [CAPTION], *clip, 4)
    for space, wanted in by_hand(drawing(), tokens[: tokens.index(max(tokens)) + 1]).items():
        assert np.linalg.norm(wanted) == pytest.approx(1)
        np.testing.assert_allclose(vectors(table, space)[0], wanted, atol=1e-3)


# ------------------------------------------------------------------------------------------------ batches, workers


def test_neither_batch_size_nor_workers_nor_order_changes_a_bit(clip):
    ids = [f"{i:032x}" for i in range(41)]
    images, captions = [picture(i) for i in range(41)], [f"a drawing of {i} dogs" for i in range(41)]
    wanted = embeddings.embed(ids, images, captions, *clip, 64, workers=1)
    assert np.allclose(np.linalg.norm(vectors(wanted, "image"), axis=1), 1, atol=1e-3)
    for size, workers in itertools.product((1, 7, 41), (1, 3)):
        assert embeddings.embed(ids, images, captions, *clip, size, workers=workers).equals(wanted), (size, workers)
    back = embeddings.embed(ids[::-1], images[::-1], captions[::-1], *clip, 16)
    assert back.sort_by("sample_id").equals(wanted)


def test_no_images_give_an_empty_table(clip):
    table = embeddings.embed([], [], [], *clip, 8)
    assert table.num_rows == 0 and tables.check(table, "embeddings").num_rows == 0


def test_decoding_runs_ahead_of_the_network_but_not_far(clip):
    """While the first run waits to be used, the next ones are decoded; never all of them."""
    started, lock = [], threading.Lock()

    def preprocess(image: Image.Image):
        with lock:
            started.append(image.size)
        return clip[1](image)

    runs = list(models.batches(400, 20))
    ready = embeddings.prepared(runs, [picture(0)] * 400, ["x"] * 400, preprocess, clip[2], workers=2)
    shown, tokens = next(ready)
    assert shown.shape == (20, 3, 64, 64) and tokens.shape == (20, 77)
    ready.close()
    assert 20 <= len(started) <= 1 + 3 * 20  # one more gave the shape


def test_bytes_are_taken_as_they_are_needed_and_one_too_few_is_an_error(clip):
    taken = []
    images = (taken.append(i) or picture(0) for i in range(399))
    runs = list(models.batches(400, 20))
    ready = embeddings.prepared(runs, images, ["x"] * 400, clip[1], clip[2], workers=2)
    next(ready)
    assert len(taken) <= 3 * 20
    with pytest.raises(ValueError, match="shorter"):
        list(ready)


def test_an_image_that_cannot_be_decoded_stops_the_run_at_once(clip):
    images = [picture(0)] * 5 + [b"no image"] + [picture(0)] * 500
    with pytest.raises(pixels.ImageError, match="not_an_image"):
        embeddings.embed([f"{i:032x}" for i in range(506)], images, ["x"] * 506, *clip, 4, workers=1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


# ------------------------------------------------------------------------------------------------ the command


def test_a_sample_that_the_metadata_lack_is_named(tmp_path):
    ids = [f"{i:032x}" for i in range(2)]
    about = {"url": "u", "caption": "c", "source": "s", "pool": "member"}
    known = pa.Table.from_pylist([{"sample_id": ids[0], **about}], schema=tables.SCHEMAS["metadata"])
    shown = [{"sample_id": i, "status": "ok", "detail": "", "bytes": picture(0)} for i in ids]
    tables.write(tmp_path / "m", known, "metadata", {})
    tables.write(tmp_path / "i", pa.Table.from_pylist(shown, schema=tables.SCHEMAS["images"]), "images", {})
    words = ["embeddings", "--model", f"local-dir:{FOLDER}", "--output"]
    words += [str(tmp_path / "out"), "--metadata", str(tmp_path / "m"), "--images", str(tmp_path / "i")]
    with pytest.raises(UserError, match=f"a table lacks a sample that another one has, {ids[1]}, make both"):
        cli.commands.main(words, standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_the_command_streams_what_is_usable_and_refuses_another_order(tmp_path, clip):
    ids = [f"{i:032x}" for i in range(40)]
    about = {"url": "u", "source": "s", "pool": "member"}
    known = [{"sample_id": name, "caption": f"a drawing of {i} dogs", **about} for i, name in enumerate(ids)]
    shown = [
        {"sample_id": name, "status": "ok" if i % 3 else "dns", "detail": "", "bytes": picture(i) if i % 3 else None}
        for i, name in enumerate(ids)
    ]
    tables.write(tmp_path / "m", pa.Table.from_pylist(known, schema=tables.SCHEMAS["metadata"]), "metadata", {})
    table = pa.Table.from_pylist(shown, schema=tables.SCHEMAS["images"])
    tables.write(tmp_path / "i", table, "images", {})
    words = ["embeddings", "--model", f"local-dir:{FOLDER}", "--output", str(tmp_path / "out")]
    words += ["--metadata", str(tmp_path / "m"), "--images", str(tmp_path / "i")]
    cli.commands.main(words, standalone_mode=False)
    alive = [i for i in range(40) if i % 3]
    wanted = embeddings.embed(
        [ids[i] for i in alive], [picture(i) for i in alive], [known[i]["caption"] for i in alive], *clip, 64
    )
    assert tables.read(tmp_path / "out", "embeddings").equals(tables.check(wanted, "embeddings"))
    pq.write_table(table.take(list(range(40))[::-1]), tmp_path / "i")
    with pytest.raises(UserError, match="images are not in order of sample_id"):
        cli.commands.main(words, standalone_mode=False)
