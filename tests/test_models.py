"""Loading targets: what is refused, and that ordinary diffusers code loads what we write."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mia import models, settings, toy
from mia.errors import UserError
from tests.conftest import ROOT


@pytest.fixture
def copy(tiny_target, tmp_path):
    return shutil.copytree(tiny_target, tmp_path / "model")


def test_the_toy_is_an_ordinary_diffusers_pipeline(tiny_target):
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_target, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(["a dog"], num_inference_steps=2, height=32, width=32, output_type="pt").images
    assert image.shape == (1, 3, 32, 32)
    mine = models.unet(tiny_target, torch.device("cpu"), torch.float32).state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in pipeline.unet.state_dict().items())


def test_text_encoder_is_the_clip_text_tower(tiny_target, tiny_clip):
    """Same captions, same hidden states; the reference runs open_clip's own modules."""
    import open_clip
    import torch

    captions = ["a red dog", "Two cats, asleep: été 日本", "x"]
    tokens = open_clip.get_tokenizer("ViT-B-32")(captions)
    encoder = models.text_encoder(tiny_target, torch.device("cpu"), torch.float32)
    mine, counts = models.text_states(models.tokenizer(tiny_target), encoder, captions, 2)
    with torch.no_grad():
        x = tiny_clip.token_embedding(tokens) + tiny_clip.positional_embedding
        theirs = tiny_clip.ln_final(tiny_clip.transformer(x, attn_mask=tiny_clip.attn_mask)).numpy()
    for row, count in enumerate(counts):  # padding differs; under a causal mask it cannot reach what is before it
        assert count == int((tokens[row] != 0).sum())
        np.testing.assert_allclose(mine[row, :count], theirs[row, :count], rtol=1e-4, atol=1e-5)


def test_long_captions_are_truncated_and_counted(tiny_target):
    import torch

    encoder = models.text_encoder(tiny_target, torch.device("cpu"), torch.float32)
    states, counts = models.text_states(models.tokenizer(tiny_target), encoder, ["dog " * 100], 4)
    assert states.shape == (1, 32, 32)
    assert counts[0] == 102


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(UserError, match=f"lacks {part}.*complete diffusers folder"):
        models.locate(str(copy))


def test_a_part_without_weights_is_named(copy):
    import torch

    for file in (copy / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="unet cannot be loaded"):
        models.unet(copy, torch.device("cpu"), torch.float32)


def test_pickled_weights_are_never_read(copy):
    import torch

    for file in (copy / "unet").glob("*.safetensors"):
        torch.save({}, copy / "unet" / "diffusion_pytorch_model.bin")
        file.unlink()
    with pytest.raises(UserError, match="unet cannot be loaded"):
        models.unet(copy, torch.device("cpu"), torch.float32)


def test_neither_a_folder_nor_on_the_hub():
    with pytest.raises(UserError, match="'nobody/nothing' is neither a folder nor on the hub"):
        models.locate("nobody/nothing")


def scheduler_of(copy, **changed):
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return models.schedule(copy)


def test_schedule_is_the_configs_own(copy):
    assert scheduler_of(copy).at(300) == pytest.approx(0.59050, abs=1e-5)
    linear = scheduler_of(copy, beta_schedule="linear")
    assert linear.at(300) == pytest.approx(0.46726, abs=1e-5)  # the wrong schedule of several published codes
    assert linear.at(900 + 1) == pytest.approx(0.00489, abs=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"prediction_type": "noise"}, "noise.*not supported"), ({"clip_sample": True}, "clips latents")],
)
def test_schedules_that_would_change_a_formula_are_refused(copy, changed, message):
    with pytest.raises(UserError, match=message):
        scheduler_of(copy, **changed)


def test_alpha_bar_by_hand():
    a = settings.alpha_bar(0.00085, 0.012)
    assert a[0] == pytest.approx(1 - 0.00085)
    step = (0.012**0.5 - 0.00085**0.5) / 999
    assert a[1] == pytest.approx((1 - 0.00085) * (1 - (0.00085**0.5 + step) ** 2))
    wanted = {10: 0.99043, 50: 0.95158, 100: 0.89422, 140: 0.84176, 281: 0.62239, 500: 0.27633, 999: 0.00466}
    assert {t: round(float(a[t]), 5) for t in wanted} == wanted


def test_cuda_is_never_replaced_in_silence():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="no CUDA device"):
        models.device("cuda")


def test_hashes_tell_one_weight_apart(copy, tiny_target):
    import torch
    from safetensors.torch import load_file, save_file

    assert models.part_hash(copy, "unet") == models.part_hash(tiny_target, "unet")
    file = next((copy / "unet").glob("*.safetensors"))
    weights = load_file(file)
    weights["conv_out.bias"] += torch.finfo(torch.float32).eps
    save_file(weights, file)
    assert models.part_hash(copy, "unet") != models.part_hash(tiny_target, "unet")
    parts = ("vae", "text_encoder", "tokenizer")
    assert models.part_hash(copy, *parts) == models.part_hash(tiny_target, *parts)


def test_batches_cover_every_row_once_and_are_never_small():
    for rows, size in [(1, 1), (5, 64), (64, 64), (65, 64), (100, 7), (0, 4)]:
        runs = list(models.batches(rows, size))
        assert np.concatenate([run[:real] for run, real in runs] or [np.arange(0)]).tolist() == list(range(rows))
        assert all(len(run) >= models.MIN_BATCH and real <= size for run, real in runs)


def test_the_toys_own_schedule_is_the_one_it_writes_down(tiny_target):
    assert np.array_equal(toy.schedule().alpha_bar, models.schedule(tiny_target).alpha_bar)
    assert toy.schedule().final == models.schedule(tiny_target).final


def example_encoder(folder, quick_gelu):
    """A copy of the example's encoder whose configuration names this activation."""
    copied = shutil.copytree(ROOT / "resources/example/encoders/clip", folder / "clip")
    file = copied / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["quick_gelu"] = quick_gelu
    file.write_text(json.dumps(config))
    return copied


@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-L-14", "local-dir:", "tag:", "file:x"])
def test_encoders_whose_weights_might_be_pickles_are_refused(model):
    import torch

    with pytest.raises(UserError, match="no known kind.*local-dir:FOLDER, hf-hub:NAME or tag:"):
        models.encoder(model, torch.device("cpu"))


@pytest.mark.parametrize(
    ("model", "fetched", "revision"),
    [
        ("tag:ViT-L-14/openai", "timm/vit_large_patch14_clip_224.openai", ""),
        ("tag:ViT-B-32/laion2b_s34b_b79k@v1", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "v1"),
        ("hf-hub:someone/clip@abc", "someone/clip", "abc"),
        ("hf-hub:someone/clip", "someone/clip", ""),
    ],
)
def test_names_stand_for_safetensors_on_the_hub(tmp_path, monkeypatch, model, fetched, revision):
    import torch

    asked = []
    folder = example_encoder(tmp_path, quick_gelu=model.endswith("/openai"))

    def snapshot(*arguments):
        asked.append(arguments)
        return folder

    monkeypatch.setattr(models, "snapshot", snapshot)
    assert models.encoder(model, torch.device("cpu"))[3]
    assert asked == [(fetched, revision, ["*.safetensors"], "embeddings.model")]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tag:ViT-L-14/opena", "^open_clip knows no 'ViT-L-14/opena', embeddings.model, use ViT-L-14/openai"),
        ("tag:ViT-L-14", "^open_clip knows no 'ViT-L-14'"),
        ("tag:ViTamin-S/datacomp1b", "^'ViTamin-S/datacomp1b' is not kept as safetensors"),
    ],
)
def test_names_unknown_or_kept_as_pickles_are_refused(model, message):
    import torch

    with pytest.raises(UserError, match=message):
        models.encoder(model, torch.device("cpu"))


@pytest.mark.parametrize(
    ("model", "quick", "said"),
    [("tag:ViT-L-14/openai@v1", False, "says gelu, its weights were trained with QuickGELU, tag:ViT-L-14/openai@v1, "),
     ("tag:ViT-B-32/laion2b_s34b_b79k", True, "says quick_gelu, its weights were trained without QuickGELU")],
)  # fmt: skip
def test_a_repository_that_gives_its_weights_another_activation_is_refused(tmp_path, monkeypatch, model, quick, said):
    import torch

    folder = example_encoder(tmp_path, quick)
    monkeypatch.setattr(models, "snapshot", lambda *arguments: folder)
    with pytest.raises(UserError, match=said):
        models.encoder(model, torch.device("cpu"))


@pytest.mark.parametrize(("quick", "activation"), [(False, "gelu"), (True, "quick_gelu")])
def test_an_encoders_card_names_its_activation_and_preprocessing(tmp_path, quick, activation):
    import torch

    folder = example_encoder(tmp_path, quick)
    config = json.loads((folder / "open_clip_config.json").read_text())
    card = models.encoder_card(models.encoder(f"local-dir:{folder}", torch.device("cpu"))[0])
    assert card["activation"] == activation
    wanted = config["preprocess_cfg"] | {"size": [64, 64]}
    assert {name: card["preprocess"][name] for name in wanted} == wanted
    assert json.loads(json.dumps(card)) == card


def test_an_encoder_folder_without_safetensors_is_refused(tmp_path):
    import torch

    shutil.copy(ROOT / "resources/example/encoders/clip/open_clip_config.json", tmp_path)
    torch.save({}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="holds no open_clip model"):
        models.encoder(f"local-dir:{tmp_path}", torch.device("cpu"))


def test_the_examples_encoder_gives_its_golden_embedding():
    """Unit length, and the cosine that the corpus's metadata states for its first member."""
    import polars as pl
    import torch

    from mia import embeddings

    row = pl.read_parquet(ROOT / "resources/example/members.parquet").row(0, named=True)
    data = (ROOT / row["URL"].removeprefix("file:")).read_bytes()
    net, preprocess, tokenize, _ = models.encoder(
        f"local-dir:{ROOT}/resources/example/encoders/clip", torch.device("cpu")
    )
    table = embeddings.embed(["0" * 32], [data], [row["TEXT"]], net, preprocess, tokenize, 4)
    image, text = (np.array(table[space][0].as_py(), dtype=np.float64) for space in ("image", "text"))
    assert np.linalg.norm(image) == pytest.approx(1, abs=1e-3)
    assert image @ text == pytest.approx(row["similarity"], abs=2e-3)
