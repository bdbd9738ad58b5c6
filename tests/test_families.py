"""Every family at toy size: what we compute against what diffusers' own pipeline does with the same files."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from mia import captions, families, latents, models, tables
from mia.errors import UserError
from tests import toys
from tests.conftest import picture

BUILD = {
    "sd1": toys.stable,
    "sd2": functools.partial(toys.stable, prediction="v_prediction"),
    "sdxl": toys.xl,
    "sd3": toys.sd3,
    "sd3-t5": functools.partial(toys.sd3, t5=True),
    "ldm-vq": toys.unconditional,
    "ldm-kl": functools.partial(toys.unconditional, quantised=False),
    "dit": toys.dit,
    "ddpm": toys.ddpm,
    "ddpm-flat": functools.partial(toys.ddpm, flat=True),
}
ASKED = {"dit": {"class_labels": [3], "guidance_scale": 1.0}, "ddpm": {}, "ddpm-flat": {}, "ldm-vq": {}, "ldm-kl": {}}
TEXT = ("sd1", "sd2", "sdxl", "sd3", "sd3-t5")
CAPTIONS = ["a dog", "", "snow on it"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Folder and diffusers pipeline of a family, each built once."""

    @functools.cache
    def build(name):
        folder = tmp_path_factory.mktemp(name)
        return folder, BUILD[name](folder)

    return build


def cpu():
    import torch

    return torch.device("cpu")


def network(folder, **more):
    import torch

    return families.find(str(folder), **more).network(cpu(), torch.float32)


def watched(pipeline, net, **asked):
    """Arguments and output of the last call that `pipeline`, run as a user does, makes to its denoiser."""
    import torch

    calls = []
    handle = net.register_forward_hook(lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True)
    pipeline(num_inference_steps=3, generator=torch.Generator().manual_seed(0), **asked)
    handle.remove()
    args, kwargs, out = calls[-2]
    return args, kwargs, (out[0] if isinstance(out, tuple) else out.sample)


def denoiser_of(pipeline):
    return getattr(pipeline, "unet", None) or pipeline.transformer


def asked(name):
    return ASKED.get(name, {"prompt": "a dog", "guidance_scale": 5.0})


@pytest.mark.parametrize("name", BUILD)
def test_network_does_what_the_pipeline_does(toy, name):
    import torch

    folder, pipeline = toy(name)
    args, kwargs, theirs = watched(pipeline, denoiser_of(pipeline), **asked(name))
    z = args[0] if args else kwargs["hidden_states"]
    t = args[1] if len(args) > 1 else kwargs["timestep"]
    condition = {
        "states": kwargs.get("encoder_hidden_states"),
        "pooled": kwargs.get("pooled_projections", (kwargs.get("added_cond_kwargs") or {}).get("text_embeds")),
        "label": kwargs.get("class_labels"),
    }
    condition = {key: value for key, value in condition.items() if value is not None}
    if "sdxl" in name or "sd3" in name:  # these pipelines' own timesteps are no whole numbers
        t = t.round()
        timed = ((z, t, *args[2:]), kwargs) if args else ((), kwargs | {"timestep": t})
        with torch.no_grad():
            theirs = denoiser_of(pipeline)(*timed[0], **timed[1])[0]
    mine = network(folder)(z, torch.as_tensor(t).long().expand(len(z)), condition)
    assert mine.shape == z.shape
    torch.testing.assert_close(mine, theirs[:, : z.shape[1]], rtol=1e-6, atol=1e-6)
    assert theirs[:, : z.shape[1]].std() > 1e-3


@pytest.mark.parametrize("name", TEXT)
def test_conditions_are_those_of_the_pipeline(toy, name):
    """Caption and null condition, in half precision; the pipeline puts the null condition first."""
    folder, pipeline = toy(name)
    _, kwargs, _ = watched(pipeline, denoiser_of(pipeline), **asked(name))
    text = families.find(str(folder)).captions(cpu())
    rows = [text.null(64), text.encode(["a dog"], 64)]
    theirs = {"states": kwargs["encoder_hidden_states"]}
    if "sdxl" in name:
        theirs["pooled"] = kwargs["added_cond_kwargs"]["text_embeds"]
        assert kwargs["added_cond_kwargs"]["time_ids"][0].tolist() == [32, 32, 0, 0, 32, 32]
        assert not rows[0]["states"].any() and not rows[0]["pooled"].any()  # force_zeros_for_empty_prompt
    if "sd3" in name:
        theirs["pooled"] = kwargs["pooled_projections"]
        assert bool(theirs["states"][:, toys.TOKENS :].any()) == (name == "sd3-t5")  # zeros without T5
    for key, value in theirs.items():
        for row, one in enumerate(rows):
            np.testing.assert_allclose(one[key][0], value[row], rtol=2e-3, atol=2e-3)
    assert set(rows[0]) == {"n_tokens", *theirs}


def test_sdxl_without_forced_zeros_takes_the_empty_prompt(tmp_path):
    pipeline = toys.xl(tmp_path, force_zeros=False)
    _, kwargs, _ = watched(pipeline, pipeline.unet, prompt="a dog", guidance_scale=5.0)
    target = families.find(str(tmp_path))
    null = target.captions(cpu()).null(64)
    np.testing.assert_allclose(null["states"][0], kwargs["encoder_hidden_states"][0], rtol=2e-3, atol=2e-3)
    assert null["states"].any()
    before = target.hashes()
    toys.edit(tmp_path / "model_index.json", force_zeros_for_empty_prompt=True)
    assert target.hashes()["encoders"] != before["encoders"]
    assert target.hashes()["unet"] == before["unet"]


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "ldm-vq", "ldm-kl", "dit"])
def test_decoding_is_the_pipelines(toy, name, monkeypatch):
    """The unscaled code that the pipeline hands to its autoencoder, scaled by us and decoded, gives its image."""
    import torch

    folder, pipeline = toy(name)
    code = getattr(pipeline, "vae", None) or pipeline.vqvae
    seen, decode = [], code.decode
    monkeypatch.setattr(code, "decode", lambda z, **more: seen.append(z) or decode(z, **more))
    more = {} if name in ("dit", "ldm-vq", "ldm-kl") else {"output_type": "np"}
    images = pipeline(
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        **({"output_type": "np"} | asked(name) | more),
    ).images
    net = network(folder)
    with torch.no_grad():
        mine = net.decode(net.scaled(seen[0]))
    shown = (mine / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(shown, images, atol=1e-5)


@pytest.mark.parametrize("name", BUILD)
def test_from_images_to_a_loss(toy, name):
    """The whole way of a target: encode, store, read, noise, predict, convert, decode."""
    import torch

    folder, _ = toy(name)
    target = families.find(str(folder))
    net, text = target.network(cpu(), torch.float32), target.captions(cpu())
    names = ["3", "", "7"] if name == "dit" else CAPTIONS
    ids = [tables.sample_id(f"u{i}", c) for i, c in enumerate(names)]
    data = {one: picture(i) for i, one in enumerate(ids)}
    selection = pa.table({"sample_id": ids, "caption": names})
    encoded = latents.encode(selection, data, net.autoencoder, text, 64)
    found, texts = tables.check(encoded.latents, "latents"), tables.check(encoded.texts, "texts")
    condition, rows = latents.conditions(found, texts, text.width)
    mean, logvar = latents.posterior(found, net.latent_shape)
    z0 = net.scaled(mean)
    assert z0.shape == logvar.shape == (3, *net.latent_shape)
    assert texts.num_rows == 3 + net.has_null
    assert net.has_null == (texts["caption_id"].to_pylist()[-1] == latents.NULL_ID)
    t = torch.tensor([100, 500, 900])
    alpha, sigma = (
        torch.from_numpy(f(t.numpy())).float().reshape(-1, 1, 1, 1) for f in (net.schedule.alpha, net.schedule.sigma)
    )
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1))
    z = alpha * z0 + sigma * eps
    with torch.no_grad():
        output = net(z, t, {key: value[torch.from_numpy(rows)] for key, value in condition.items()})
        assert net.decode(z0).shape == (3, 3, net.side_px, net.side_px)
    assert net.schedule.to_noise(output, z, alpha, sigma).isfinite().all()
    perfect = net.schedule.target(z0, eps, alpha, sigma)
    torch.testing.assert_close(net.schedule.to_noise(perfect, z, alpha, sigma), eps, rtol=1e-4, atol=1e-4)
    if net.has_null:
        last = {key: value[-1:].expand(3, *value.shape[1:]) for key, value in condition.items()}
        with torch.no_grad():
            assert not torch.equal(net(z, t, last), output)


def test_pixels_are_kept_to_the_last_bit(toy):
    import torch

    net = network(toy("ddpm")[0])
    shown = torch.arange(256).float().repeat(3).reshape(1, 3, 16, 16) / 127.5 - 1
    mean, logvar = net.encode(shown)
    assert torch.equal(net.scaled(mean.half().float()), shown)
    assert (logvar == -30).all()
    assert torch.equal(net.decode(shown), shown)


def test_latents_of_a_quantised_model_are_its_codes(toy):
    import torch

    folder, pipeline = toy("ldm-vq")
    net = network(folder)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, logvar = net.encode(x)
        assert torch.equal(mean, pipeline.vqvae.encode(x).latents)
    assert torch.equal(net.scaled(mean), mean * 0.6)
    assert (logvar == -30).all()


def test_stable_diffusion_3_shifts_before_it_scales(toy):
    import torch

    net = network(toy("sd3")[0])
    z = net.scaled(torch.full((1, 4, 8, 8), 0.56))
    torch.testing.assert_close(z, torch.full_like(z, (0.56 - 0.06) * 1.5))


def test_class_numbers(toy):
    text = families.find(str(toy("dit")[0])).captions(cpu())
    assert text.encode(["3", " 9 ", "", "0"], 64)["label"].tolist() == [3, 9, 10, 0]
    assert text.null(64)["label"].tolist() == [10]
    for wrong in ("dog", "10", "-1", "1.5", "٣"):
        with pytest.raises(UserError, match=f"^caption '{wrong}' is no class number, caption, .*0 to 9"):
            text.encode(["1", wrong], 64)


@pytest.mark.parametrize("name", TEXT)
def test_captions_too_long_are_cut_and_counted(toy, name):
    text = families.find(str(toy(name)[0])).captions(cpu())
    rows = text.encode(["a" * 13, "a" * 15, ""], 64)
    assert rows["n_tokens"].tolist() == [15, 17, 2]
    assert (rows["n_tokens"] > text.limit).tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["sdxl", "sd3-t5"])
def test_conditions_do_not_depend_on_batches(toy, name):
    text = families.find(str(toy(name)[0])).captions(cpu())
    whole, single = text.encode(CAPTIONS, 64), text.encode(CAPTIONS, 1)
    for key in whole:
        assert np.array_equal(whole[key], single[key])


def test_older_folders_call_dits_class_otherwise(copy):
    """As facebook/DiT-XL-2-256 does."""
    import torch

    folder = copy("dit")
    config = folder / "transformer" / "config.json"
    here = network(folder)
    toys.edit(config, _class_name="Transformer2DModel", norm_type="ada_norm_zero", norm_elementwise_affine=False)
    there = network(folder)
    z, t, label = torch.ones(2, 4, 8, 8), torch.tensor([10, 700]), {"label": torch.tensor([3, 10])}
    with torch.no_grad():
        assert torch.equal(here(z, t, label), there(z, t, label))


@pytest.mark.parametrize("name", BUILD)
def test_of_a_repository_on_the_hub_every_needed_file_is_fetched_and_no_pickle(toy, name, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    folder, _ = toy(name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")

    def fetch(source, revision, allow_patterns):
        assert (source, revision) == ("someone/model", "abc")
        for file in [*folder.rglob("*"), tmp_path / "pytorch_model.bin"]:
            inside = file.relative_to(folder if folder in file.parents else tmp_path)
            if file.is_file() and list(filter_repo_objects([str(inside)], allow_patterns=allow_patterns)):
                (tmp_path / "got" / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "got" / inside)
        return str(tmp_path / "got")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    target = families.find("someone/model", "abc")
    assert target.folder == tmp_path / "got"
    assert target.hashes() == families.find(str(folder)).hashes()
    assert target.captions(cpu()).has_null == network(folder).has_null
    assert not list((tmp_path / "got").rglob("*.bin"))


def test_a_fine_tuned_denoiser_from_the_hub(toy, monkeypatch):
    asked = []

    def snapshot(*arguments):
        asked.append(arguments)
        return toy("sd1")[0]

    monkeypatch.setattr(models, "snapshot", snapshot)
    target = families.find(str(toy("sd1")[0]), unet="someone/tuned@abc")
    assert target.unet == toy("sd1")[0] / "unet"
    weights = ["unet/*.safetensors*", "diffusion_pytorch_model*.safetensors*"]
    assert asked == [("someone/tuned", "abc", weights, "targets.*.unet")]


# What a manifest says


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sd1", {"family": "stable-diffusion", "prediction": "epsilon", "alpha_bar_300": 0.590501}),
        ("sd2", {"family": "stable-diffusion", "prediction": "v_prediction", "alpha_bar_300": 0.590501}),
        ("sdxl", {"family": "stable-diffusion-xl", "latent_shape": [4, 8, 8], "side_px": 32}),
        ("sd3", {"family": "stable-diffusion-3", "prediction": "flow", "sigma_500": 0.5}),
        ("ldm-vq", {"family": "unconditional-latent"}),
        ("dit", {"family": "class-conditional-latent"}),
        ("ddpm", {"family": "pixel", "latent_shape": [3, 16, 16], "side_px": 16, "alpha_bar_300": 0.394011}),
    ],
)
def test_the_card_tells_the_family_and_its_schedule(toy, name, said):
    card = families.find(str(toy(name)[0])).card()
    assert {key: card[key] for key in said} == said
    assert card["train_steps"] == 1000


def command(name, *arguments):
    from mia import cli

    words = [str(word) for word in arguments]
    cli.commands.get_command(None, name).main(args=words, standalone_mode=False)


def to_latents(folder, out, side):
    """The target's manifest, its latents and texts of three pictures, by the commands: t.json, l and x.parquet."""
    ids = [tables.sample_id(f"u{i}", c) for i, c in enumerate(CAPTIONS)]
    images = [
        {"sample_id": one, "status": "ok", "detail": "", "sha256": "0" * 64, "bytes": picture(k, side=side),
         "width": side, "height": side + 7, "format": "png", "phash": k}
        for k, one in enumerate(ids)
    ]  # fmt: skip
    tables.write(out / "i.parquet", pa.Table.from_pylist(images, schema=tables.SCHEMAS["images"]), "images", {})
    selection = pa.table({"sample_id": ids, "caption": CAPTIONS, "sha256": ["0" * 64] * 3})
    tables.write(out / "s.parquet", selection, "selection", {})
    command("target", "--source", folder, "--output", out / "t.json")
    command(
        "latents", "--selection", out / "s.parquet", "--images", out / "i.parquet", "--target", out / "t.json",
        "--output", out / "l.parquet", "--texts-output", out / "x.parquet",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["sdxl", "ddpm"])
def test_commands_from_a_folder_to_latents(toy, name, tmp_path):
    folder, _ = toy(name)
    to_latents(folder, tmp_path, 20)
    made = tables.provenance(tmp_path / "l.parquet")
    assert made["enlarged_images"] == (3 if name == "sdxl" else 0)
    assert made["truncated_captions"] == 0
    assert made["latent_shape"] == json.loads((tmp_path / "t.json").read_text())["latent_shape"]
    texts = tables.read(tmp_path / "x.parquet", "texts")
    condition, rows = latents.conditions(tables.read(tmp_path / "l.parquet", "latents"), texts, made["text_width"])
    assert {key: value.shape[0] for key, value in condition.items()} == (
        {"states": 4, "pooled": 4} if name == "sdxl" else {}
    )
    assert sorted(rows) == [0, 1, 2]
    about = json.loads((tmp_path / "t.json").read_text())
    families.of_manifest(about).hold(about, "unet", "encoders")
    with pytest.raises(UserError, match="the manifest says"):
        families.of_manifest(about).hold(about | {"unet": "0" * 16}, "unet")


@pytest.mark.parametrize(("name", "factor", "warned"), [("sd1", 4.5, False), ("sd1", 1.0, True), ("ddpm", None, False)])
def test_a_wrong_scaling_factor_is_told_by_the_latents(toy, name, factor, warned, tmp_path, capsys):
    """Codes of this autoencoder have .22: 4.5 makes 1 of it, 1 forgets to. Pixels have no factor to get wrong."""
    folder = shutil.copytree(toy(name)[0], tmp_path / "model")
    if factor:
        toys.edit(folder / "vae" / "config.json", scaling_factor=factor)
    to_latents(folder, tmp_path, 40)
    spread = tables.provenance(tmp_path / "l.parquet")["latent_std"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == warned
    if name == "sd1":
        assert spread == pytest.approx(0.2 if warned else 0.9, rel=0.2)
    if warned:
        assert f"of 3 images have a standard deviation of {spread:.2f} after scaling" in said[0]
        assert "is scaling_factor 1 this autoencoder's, " in said[0]


# Folders that are not what they should be


@pytest.fixture
def copy(toy, tmp_path):
    return lambda name: shutil.copytree(toy(name)[0], tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "part"),
    [("sd1", "vae"), ("sdxl", "text_encoder_2"), ("sd3", "transformer"), ("ldm-vq", "vqvae"), ("dit", "scheduler"),
     ("ddpm", "unet")],
)  # fmt: skip
def test_a_missing_part_is_named(copy, name, part):
    folder = copy(name)
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=f"^model folder lacks {part}, "):
        families.find(str(folder))


def test_an_index_that_lacks_a_part(copy):
    folder = copy("sdxl")
    toys.edit(folder / "model_index.json", text_encoder_2=[None, None])
    with pytest.raises(UserError, match="^StableDiffusionXLPipeline lacks text_encoder_2, "):
        families.find(str(folder))
    (folder / "model_index.json").unlink()
    with pytest.raises(UserError, match="^model folder lacks model_index.json"):
        families.find(str(folder))


def test_a_pipeline_of_no_known_family(copy):
    folder = copy("sd1")
    toys.edit(folder / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(UserError, match="^pipeline class 'FluxPipeline' is of no known family.*DiTPipeline"):
        families.find(str(folder))


def test_a_part_of_another_family(copy, toy):
    folder = copy("sd1")
    shutil.rmtree(folder / "unet")
    shutil.copytree(toy("ddpm")[0] / "unet", folder / "unet")
    with pytest.raises(UserError, match="^unet is a UNet2DModel, this family's is a UNet2DConditionModel, "):
        families.find(str(folder))


def test_a_text_encoder_of_another_family(copy, toy):
    folder = copy("sd1")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(toy("sdxl")[0] / "text_encoder_2", folder / "text_encoder")
    with pytest.raises(UserError, match="^text_encoder is a CLIPTextModelWithProjection, "):
        families.find(str(folder))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"in_channels": 9}, "takes 9 channels, images have 4"),
        ({"sample_size": [8, 12]}, "sample_size is .8, 12."),
        ({"num_class_embeds": 5}, "wants a class"),
    ],
)
def test_denoisers_that_want_what_we_do_not_have(copy, changed, message):
    folder = copy("sd1")
    toys.edit(folder / "unet" / "config.json", **changed)
    with pytest.raises(UserError, match=message):
        families.find(str(folder))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_that_are_missing_are_not_drawn_at_random(copy, part):
    import torch
    from safetensors.torch import load_file, save_file

    folder = copy("sd1")
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    gone = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != gone}, file, metadata={"format": "pt"})
    target = families.find(str(folder))
    with pytest.raises(UserError, match=f"^{part} lacks 1 weights, .*{gone.split('.')[-2]}"):
        target.network(cpu(), torch.float32)
        target.captions(cpu())


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("sd1", {"beta_schedule": "linear"}, "alpha_bar.300. is 0.4673, stable-diffusion states 0.5905"),
        ("sdxl", {"beta_end": 0.02}, "stable-diffusion-xl states 0.5905"),
        ("sd2", {"rescale_betas_zero_snr": True}, "alpha_bar"),
        ("sd1", {"clip_sample": True}, "clips latents"),
        ("sd1", {"clip_sample": None}, "clips latents"),  # DDIM clips unless told not to
        ("sd1", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "prediction is flow, which stable-diffusion does"),
        ("sd3", {"_class_name": "DDIMScheduler", "clip_sample": False}, "prediction is epsilon, which stable-diff"),
        ("dit", {"prediction_type": "noise"}, "prediction type 'noise' is not supported"),
    ],
)
def test_schedules_that_are_not_the_familys_own(copy, name, changed, message):
    folder = copy(name)
    toys.edit(folder / "scheduler" / "scheduler_config.json", **changed)
    with pytest.raises(UserError, match=message):
        families.find(str(folder)).card()


def test_a_scheduler_that_cannot_clip_need_not_say_so(copy):
    folder = copy("sd1")
    toys.edit(folder / "scheduler" / "scheduler_config.json", clip_sample=None, _class_name="PNDMScheduler")
    assert families.find(str(folder)).card()["alpha_bar_300"] == 0.590501


def test_pixel_models_may_clip(toy):
    config = json.loads((toy("ddpm")[0] / "scheduler" / "scheduler_config.json").read_text())
    assert config["clip_sample"] is True
    assert families.find(str(toy("ddpm")[0])).schedule().prediction == "epsilon"


# A denoiser in the base's place


def test_a_fine_tuned_denoiser_takes_the_bases_place(toy, tmp_path):
    import torch

    folder, _ = toy("sd1")
    tuned = toys.text_unet(32, seed=9)
    tuned.save_pretrained(tmp_path / "own" / "unet")
    tuned.save_pretrained(tmp_path / "elsewhere")
    base = families.find(str(folder))
    for place in ("own", "own/unet", "elsewhere"):
        target = families.find(str(folder), unet=str(tmp_path / place))
        net = target.network(cpu(), torch.float32).denoiser
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in tuned.state_dict().items())
        assert target.hashes()["encoders"] == base.hashes()["encoders"]
        assert target.hashes()["unet"] != base.hashes()["unet"]
    assert len({families.find(str(folder), unet=str(tmp_path / p)).hashes()["unet"] for p in ("own", "elsewhere")}) == 1


def test_denoisers_that_do_not_fit_the_base(toy, tmp_path):
    folder, _ = toy("sd1")
    toys.text_unet(48).save_pretrained(tmp_path / "wide")
    toys.plain_unet(8, 4).save_pretrained(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    for place, message in (
        ("wide", "cross_attention_dim is 48, the base's is 32"), ("plain", "is a UNet2DModel, this family's"),
        ("empty", "holds no unet"), ("nowhere/at/all", "is neither a folder nor on the hub"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            families.find(str(folder), unet=str(tmp_path / place) if "/" not in place else place)


# Schedules and predictions


def phi(schedule, z, e, t, u):
    """The engine's step from t to u: DDIM for diffusion, Euler for a flow."""
    a, s, a_u, s_u = (float(f(at)) for at in (t, u) for f in (schedule.alpha, schedule.sigma))
    return a_u * (z - s * e) / a + s_u * e


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [980, 500, 10, 0])
def test_a_step_is_ddims(prediction, t):
    import torch
    from diffusers import DDIMScheduler

    ddim = DDIMScheduler(**toys.STABLE, prediction_type=prediction)
    ddim.set_timesteps(100)
    z, output = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = models.Schedule(ddim.alphas_cumprod.double().numpy(), float(ddim.final_alpha_cumprod), prediction)
    e = mine.to_noise(output, z, float(mine.alpha(t)), float(mine.sigma(t)))
    torch.testing.assert_close(
        phi(mine, z, e, t, t - 10), ddim.step(output, t, z, eta=0.0).prev_sample, rtol=1e-6, atol=1e-6
    )


def test_a_step_is_eulers():
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    euler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    euler.set_timesteps(sigmas=[0.9, 0.5, 0.49, 0.01])
    z, v = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = models.flow_schedule()
    for t, u in ((900, 500), (500, 490), (490, 10), (10, -1)):
        e = mine.to_noise(v, z, float(mine.alpha(t)), float(mine.sigma(t)))
        theirs = euler.step(v, euler.timesteps[euler.step_index or 0], z, return_dict=False)[0]
        torch.testing.assert_close(phi(mine, z, e, t, u), theirs.double(), rtol=1e-5, atol=1e-5)


def test_predictions_by_hand():
    """z = 0.6 * 2 + 0.8 * 3 = 3.6; v = 0.6 * 3 - 0.8 * 2 = 0.2; the flow's velocity at t = 250 is 3 - 2."""
    alpha_bar = np.full(1000, 0.36)
    for prediction, output in (("epsilon", 3.0), ("v_prediction", 0.2), ("sample", 2.0)):
        schedule = models.Schedule(alpha_bar, 1.0, prediction)
        assert (schedule.alpha(7), schedule.sigma(7)) == (pytest.approx(0.6), pytest.approx(0.8))
        assert schedule.target(2.0, 3.0, 0.6, 0.8) == pytest.approx(output)
        assert schedule.to_noise(output, 3.6, 0.6, 0.8) == pytest.approx(3.0)
        assert (schedule.alpha(-10), schedule.sigma(-10)) == (1.0, 0.0)
    flow = models.flow_schedule()
    assert (flow.alpha(250), flow.sigma(250)) == (0.75, 0.25)
    assert flow.target(2.0, 3.0, 0.75, 0.25) == 1.0
    assert flow.to_noise(1.0, 0.75 * 2 + 0.25 * 3, 0.75, 0.25) == pytest.approx(3.0)
    assert flow.alpha(np.array([-5, 0, 1, 999])).tolist() == pytest.approx([1, 1, 0.999, 0.001])
    assert float(flow.at(500)) == pytest.approx(0.5)  # signal and noise alike
    assert flow.train_steps == 1000


def test_sd3s_timestep_keeps_its_precision(toy):
    """In bfloat16 451 would become 452, another noise level."""
    import torch

    folder, _ = toy("sd3")
    net = families.find(str(folder)).network(cpu(), torch.bfloat16)
    seen = []
    net.denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True)
    rows = families.find(str(folder)).captions(cpu()).null(64)
    condition = {key: torch.from_numpy(rows[key]).float() for key in ("states", "pooled")}
    with torch.no_grad():
        out = net(torch.zeros(1, 4, 8, 8), torch.tensor([451]), condition)
    assert seen[0].tolist() == [451.0]
    assert out.dtype == torch.float32


def test_only_captions_that_are_conditions_have_a_null():
    assert not captions.Captions().has_null
    assert captions.ClassNumbers(10).has_null
