"""The frozen parts of a Stable-Diffusion-shaped toy, from an open_clip text tower and a small VAE.

Stable Diffusion's text encoder is the text tower of OpenAI's CLIP, and its tokenizer CLIP's; so are the toy's. The
conversion is exact: the same caption gives the same last hidden states in both.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import shutil
from typing import Any

from mia import models, settings

TOKENS = 32  # of the 77 positions that CLIP has; the example's captions are short, and attention costs by the token
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "skip_prk_steps": True,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def clip_text_model(clip: Any) -> Any:
    """The text tower of an open_clip model as a transformers CLIPTextModel with the same weights."""
    models.ensure_torchvision()
    from transformers import CLIPTextConfig, CLIPTextModel

    width, layers = clip.token_embedding.embedding_dim, len(clip.transformer.resblocks)
    block = clip.transformer.resblocks[0]
    config = CLIPTextConfig(
        vocab_size=clip.token_embedding.num_embeddings, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=block.attn.num_heads, intermediate_size=block.mlp.c_fc.out_features,
        max_position_embeddings=len(clip.positional_embedding), hidden_act="gelu", projection_dim=width,
        bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    )  # fmt: skip
    target = CLIPTextModel(config)
    prefix = "text_model." if "text_model.final_layer_norm.weight" in target.state_dict() else ""  # transformers < 5
    target.load_state_dict({prefix + name: value.float() for name, value in _renamed(clip, layers).items()})
    return target.eval()


def _renamed(clip: Any, layers: int) -> dict[str, Any]:
    """open_clip's text weights under transformers' names."""
    source = clip.state_dict()
    out = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for layer in range(layers):
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                out[f"encoder.layers.{layer}.{ours}.{kind}"] = source[f"transformer.resblocks.{layer}.{theirs}.{kind}"]
            thirds = source[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"].chunk(3)
            for name, third in zip(("q_proj", "k_proj", "v_proj"), thirds, strict=True):
                out[f"encoder.layers.{layer}.self_attn.{name}.{kind}"] = third
    return out


def write_tokenizer(folder: pathlib.Path) -> None:
    """CLIP's byte-pair tokenizer, as Stable Diffusion 1.x has it, from the vocabulary inside open_clip."""
    models.ensure_torchvision()
    import open_clip.tokenizer
    from transformers import CLIPTokenizer

    packed = pathlib.Path(open_clip.tokenizer.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    alphabet = list(open_clip.tokenizer.bytes_to_unicode().values())
    words = alphabet + [c + "</w>" for c in alphabet] + ["".join(m.split()) for m in merges]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS).save_pretrained(folder)


def schedule() -> models.Schedule:
    """The noise schedule that `write_pipeline` writes down."""
    alpha_bar = settings.alpha_bar(SCHEDULER["beta_start"], SCHEDULER["beta_end"])
    return models.Schedule(alpha_bar, float(alpha_bar[0]))


def _mark_unclipped(config: pathlib.Path) -> None:
    """Say, as Stable Diffusion 1.x's own file does, that DDIM made from this config must not clip its sample."""
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clip_sample": False}, indent=2) + "\n")


def write_pipeline(folder: pathlib.Path, clip: Any, vae_folder: pathlib.Path, unet: Any) -> None:
    """An ordinary diffusers folder: VAE, text encoder, tokenizer, scheduler and `unet`."""
    from diffusers.schedulers.scheduling_pndm import PNDMScheduler

    clip_text_model(clip).save_pretrained(folder / "text_encoder", safe_serialization=True)
    write_tokenizer(folder / "tokenizer")
    shutil.copytree(vae_folder, folder / "vae", dirs_exist_ok=True)
    PNDMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    _mark_unclipped(folder / "scheduler" / "scheduler_config.json")
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False,
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
