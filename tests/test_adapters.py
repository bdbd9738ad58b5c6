"""LoRA files in every spelling, against W + scale * B A written out; and what is refused.

Files that peft 0.21.2 and diffusers 0.42.1 wrote for toys of SD 1.x, SDXL and SD3, with alpha equal to the rank and
not, gave the same weights here and when diffusers loaded and fused them, bit for bit (2026-11-24; peft is no
dependency, so that this is not run again).
"""

from __future__ import annotations

import json

import pytest

from mia import families
from mia.errors import UserError
from tests import toys

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.1.self_attn.q_proj"
RANK = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    toys.xl(folder)
    return folder


def cpu():
    import torch

    return torch.device("cpu")


def weights(target, name):
    """The weight of one module of the UNet or, for a name of its own, of the first text encoder."""
    import torch

    if name != TEXT:
        return target.network(cpu(), torch.float32).denoiser.get_submodule(name).weight
    encoder = target.captions(cpu()).encoders[0]
    return next(m for n, m in encoder.named_modules() if n.endswith(TEXT.removeprefix("text_model."))).weight


def pair(base, name, seed=0):
    """A down and an up matrix that fit the module, and the addition that they are without a scale."""
    import torch

    weight = weights(families.find(str(base)), name)
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, *weight.shape[1:], generator=generator)
    up = torch.randn(len(weight), RANK, *[1] * (weight.ndim - 2), generator=generator)
    added = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(weight.shape)
    return down, up, added


def flat(name):
    return name.replace(".", "_")


SPELLINGS = {  # name of the module, key of down, key of up, key of alpha
    "diffusers": (QUERY, f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight", ""),
    "bare": (QUERY, f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight", ""),
    "peft": (QUERY, f"base_model.model.{QUERY}.lora_A.default.weight", f"base_model.model.{QUERY}.lora_B.weight", ""),
    "older": (QUERY, f"unet.{QUERY}.lora.down.weight", f"unet.{QUERY}.lora.up.weight", ""),
    "oldest": (
        OUT,
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
        "",
    ),
    "kohya": (
        CONV, f"lora_unet_{flat(CONV)}.lora_down.weight", f"lora_unet_{flat(CONV)}.lora_up.weight",
        f"lora_unet_{flat(CONV)}.alpha",
    ),
    "kohya-sgm-attention": (
        QUERY, "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.alpha",
    ),
    "kohya-sgm-block": (
        CONV, "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight",
        "lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight", "lora_unet_input_blocks_1_0_in_layers_2.alpha",
    ),
    "kohya-sgm-outside": (
        "add_embedding.linear_2", "lora_unet_label_emb_0_2.lora_down.weight", "lora_unet_label_emb_0_2.lora_up.weight",
        "lora_unet_label_emb_0_2.alpha",
    ),
    "kohya-text": (
        TEXT, f"lora_te1_{flat(TEXT)}.lora_down.weight", f"lora_te1_{flat(TEXT)}.lora_up.weight",
        f"lora_te1_{flat(TEXT)}.alpha",
    ),
    "text": (TEXT, f"text_encoder.{TEXT}.lora_A.weight", f"text_encoder.{TEXT}.lora_B.weight", ""),
    "older-text": (
        TEXT, f"text_encoder.{TEXT}.lora_linear_layer.down.weight", f"text_encoder.{TEXT}.lora_linear_layer.up.weight",
        "",
    ),
    "oldest-text": (
        TEXT, "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.down.weight",
        "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.up.weight", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_adds_the_same(base, tmp_path, spelling):
    import torch
    from safetensors.torch import save_file

    name, down_key, up_key, alpha_key = SPELLINGS[spelling]
    down, up, added = pair(base, name)
    tensors = {down_key: down, up_key: up} | ({alpha_key: torch.tensor(6.0)} if alpha_key else {})
    save_file(tensors, tmp_path / "lora.safetensors")
    plain, target = families.find(str(base)), families.find(str(base), lora=str(tmp_path / "lora.safetensors"))
    scale = 6.0 / RANK if alpha_key else 1.0
    torch.testing.assert_close(weights(target, name), weights(plain, name) + scale * added, rtol=1e-5, atol=1e-5)
    other = QUERY if name != QUERY else OUT
    assert torch.equal(weights(target, other), weights(plain, other))
    changed = {key for key, value in target.hashes().items() if value != plain.hashes()[key]}
    assert changed == ({"encoders"} if name == TEXT else {"unet"})


def test_rank_and_alpha_that_the_file_states(base, tmp_path):
    import torch
    from safetensors.torch import save_file

    down, up, added = pair(base, QUERY)
    stated = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": 12, "unet.use_rslora": False})}
    tensors = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors", metadata=stated)
    target = families.find(str(base), lora=str(tmp_path))  # a folder with one file
    wanted = weights(families.find(str(base)), QUERY) + 4 * added
    torch.testing.assert_close(weights(target, QUERY), wanted, rtol=1e-5, atol=1e-5)


def test_a_lora_on_top_of_a_fine_tuned_denoiser(base, tmp_path):
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "unet"
    tuned = families.find(str(base)).network(cpu(), torch.float32).denoiser
    with torch.no_grad():
        tuned.get_submodule(QUERY).weight.zero_()
    tuned.save_pretrained(folder)
    down, up, added = pair(base, QUERY)
    save_file({f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    target = families.find(str(base), unet=str(folder), lora=str(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(weights(target, QUERY), added, rtol=1e-5, atol=1e-5)


def test_a_manifest_remembers_what_is_put_upon_the_base(base, tmp_path):
    from safetensors.torch import save_file

    from mia import cli

    down, up, _ = pair(base, QUERY)
    file = tmp_path / "lora.safetensors"
    save_file({f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up}, file)
    words = ["--source", str(base), "--lora", str(file), "--output", str(tmp_path / "t.json")]
    cli.commands.get_command(None, "target").main(args=words, standalone_mode=False)
    about = json.loads((tmp_path / "t.json").read_text())
    target = families.of_manifest(about)
    assert target.lora == file
    target.hold(about, "unet", "encoders")
    save_file({f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": 2 * up}, file)
    with pytest.raises(UserError, match="^unet is .*, the manifest says .*run `mia target` again"):
        families.of_manifest(about).hold(about, "unet")


@pytest.mark.parametrize(
    ("keys", "metadata", "message"),
    [
        ({"unet.nowhere.lora_A.weight": (3, 16), "unet.nowhere.lora_B.weight": (16, 3)}, {}, "'nowhere'.*unet lacks"),
        ({f"unet.{QUERY}.lora_A.weight": (3, 16)}, {}, "has half of"),
        ({f"unet.{QUERY}.lora_A.weight": (3, 5), f"unet.{QUERY}.lora_B.weight": (16, 3)}, {}, "does not fit"),
        ({f"unet.{QUERY}.lora_A.weight": (3, 16), f"unet.{QUERY}.lora_B.weight": (16, 4)}, {}, "does not fit"),
        ({f"lora_unet_{flat(QUERY)}.hada_w1_a": (3, 16)}, {}, "a weight we do not know, '.*hada_w1_a'"),
        ({f"unet.{QUERY}.dora_scale": (16,)}, {}, "a weight we do not know"),
        ({f"unet.{QUERY}.lora_A.weight": (3, 16)}, {"unet.use_rslora": True}, "uses use_rslora, which we do not merge"),
        ({}, {}, "has no weights"),
    ],
)
def test_what_cannot_be_merged_is_refused(base, tmp_path, keys, metadata, message):
    import torch
    from safetensors.torch import save_file

    stated = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file({key: torch.ones(shape) for key, shape in keys.items()}, tmp_path / "lora.safetensors", metadata=stated)
    with pytest.raises(UserError, match=message):
        families.find(str(base), lora=str(tmp_path / "lora.safetensors")).network(cpu(), torch.float32)


def test_a_lora_for_a_part_that_the_target_lacks(tmp_path):
    import torch
    from safetensors.torch import save_file

    toys.stable(tmp_path / "base")
    tensors = {f"text_encoder_2.{TEXT}.lora_A.weight": torch.ones(3, 16)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="LoRA is for text_encoder_2, which stable-diffusion lacks"):
        families.find(str(tmp_path / "base"), lora=str(tmp_path / "lora.safetensors"))


def test_files_that_are_no_lora(base, tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"no such thing")
    (tmp_path / "lora.pt").write_bytes(b"a pickle")
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.safetensors").write_bytes(b"")
    for place, message in (
        (tmp_path / "lora.safetensors", "LoRA cannot be read"), (tmp_path / "lora.pt", "give one file in safetensors"),
        (tmp_path / "two", "^2 LoRA files"), ("no/where", "is neither a folder nor on the hub"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            families.find(str(base), lora=str(place))
