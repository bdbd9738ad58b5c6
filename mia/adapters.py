"""Low-rank additions (LoRA) merged into the weights of the model that they were trained on.

W becomes W + alpha / r * B A (arXiv 2106.09685, section 4.1), which is what loading and fusing them in diffusers gives.
Files of diffusers (old and new), peft and kohya name the same module in different ways; all of them do so by the path
of the module, so each name is looked up among the paths of the model at hand, with dots and underscores alike.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from mia.errors import UserError

_KEY = re.compile(r"(?P<module>.+?)[._](?:lora[._](?:linear_layer\.)?)?(?P<kind>down|up|A|B)(?:\.default)?\.weight")
_PREFIXES = (  # the longest first
    ("lora_te2_", "text_encoder_2"), ("lora_te1_", "text_encoder"), ("lora_te_", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"), ("text_encoder.", "text_encoder"),
    ("lora_unet_", ""), ("lora_transformer_", ""), ("base_model.model.", ""), ("unet.", ""), ("transformer.", ""),
)  # fmt: skip
_TEXT_NAMES = (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out_0", "out_proj"))
_SGM_NAMES = (  # what kohya's SDXL files call blocks, and the inside of a block
    ("input_blocks_0_0", "conv_in"), ("lora_unet_out_2", "lora_unet_conv_out"),
    ("time_embed_0", "time_embedding_linear_1"), ("time_embed_2", "time_embedding_linear_2"),
    ("label_emb_0_0", "add_embedding_linear_1"), ("label_emb_0_2", "add_embedding_linear_2"),
    ("input_blocks", "down_blocks"), ("middle_block", "mid_block"), ("output_blocks", "up_blocks"),
    ("in_layers_2", "conv1"), ("out_layers_3", "conv2"), ("emb_layers_1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"), ("downsamplers_0_op", "downsamplers_0_conv"),
)  # fmt: skip


_SGM_MARKS = ("input_blocks", "middle_block", "output_blocks", "time_embed_", "label_emb_", "lora_unet_out_2")


def parts(file: pathlib.Path, denoiser: str) -> set[str]:
    """Which parts of a model the file changes: `denoiser`, text_encoder, text_encoder_2."""
    return {part or denoiser for part, _ in map(_part, _read(file)[0])}


def merge(file: pathlib.Path, part: str, net: Any) -> None:
    """Add to the weights of `net`, which is the model's `part`, what the file has for it.

    Raises:
        UserError: the file is no LoRA we understand, or is for another model.
    """
    tensors, stated = _read(file)
    mine = {key: value for key, value in tensors.items() if _part(key)[0] == ("" if part in _DENOISERS else part)}
    flat = {name.replace(".", "_"): module for name, module in net.named_modules() if hasattr(module, "weight")}
    pairs: dict[str, dict[str, Any]] = {}
    for key, value in _diffusers_blocks(mine, net).items():
        name, kind = _name(_part(key)[1], file)
        pairs.setdefault(name, {})[kind] = value
    for name, pair in pairs.items():
        module = _module(name, flat, part, file)
        if not {"down", "up"} <= set(pair):
            raise UserError(f"LoRA has half of '{name}' only", file, "fetch it anew")
        rank = len(pair["down"])
        alpha = float(pair["alpha"]) if "alpha" in pair else stated.get(part, {}).get("lora_alpha", rank)
        _add(module, pair, alpha / stated.get(part, {}).get("r", rank), name, file)


_DENOISERS = ("unet", "transformer")


def _add(module: Any, pair: dict[str, Any], scale: float, name: str, file: pathlib.Path) -> None:
    import torch

    down, up = (pair[kind].float().flatten(1) for kind in ("down", "up"))
    weight = module.weight
    if up.shape[1] != down.shape[0] or len(up) * down.shape[1] != weight.numel() or len(up) != len(weight):
        shapes = f"{tuple(up.shape)} x {tuple(down.shape)} for {tuple(weight.shape)}"
        raise UserError(f"LoRA's '{name}' does not fit ({shapes})", file, "give the base it was trained on")
    with torch.no_grad():
        weight += (scale * (up @ down)).reshape(weight.shape).to(weight)


def _read(file: pathlib.Path) -> tuple[dict[str, Any], dict[str, dict]]:
    """The tensors, and what diffusers' newer files state of rank and alpha, by part."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            stated = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as problem:
        raise UserError(f"LoRA cannot be read ({problem})", file, "give a safetensors file") from problem
    if not tensors:
        raise UserError("LoRA has no weights", file, "fetch it anew")
    by_part: dict[str, dict] = {}
    for name, value in stated.items():
        part, _, field = name.partition(".")
        if field in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias") and value:
            raise UserError(f"LoRA uses {field}, which we do not merge", file, "merge it yourself, and give `unet`")
        by_part.setdefault(part, {})[field] = value
    return tensors, by_part


def _part(key: str) -> tuple[str, str]:
    """The part that a key is for, "" for the denoiser, and the key without its prefix."""
    for prefix, part in _PREFIXES:
        if key.startswith(prefix):
            return part, key.removeprefix(prefix)
    return "", key


def _name(key: str, file: pathlib.Path) -> tuple[str, str]:
    """A module's path with underscores, and `down`, `up` or `alpha`."""
    if key.endswith(".alpha"):
        return re.sub(r"[._]lora$", "", key.removesuffix(".alpha")).replace(".", "_"), "alpha"
    key = key.replace(".processor.", ".").replace("to_out_lora", "to_out.0.lora")
    found = _KEY.fullmatch(key)
    if found is None:
        raise UserError(f"LoRA has a weight we do not know, '{key}'", file, "merge it yourself, and give `unet`")
    kind = {"A": "down", "B": "up"}.get(found["kind"], found["kind"])
    return found["module"].replace(".", "_"), kind


def _module(name: str, flat: dict[str, Any], part: str, file: pathlib.Path) -> Any:
    """The module of this name; text encoders have older names, and an outer module that newer transformers lack."""
    names = [name]
    if part.startswith("text_encoder"):
        for theirs, ours in _TEXT_NAMES:
            name = re.sub(rf"self_attn_{theirs}$", f"self_attn_{ours}", name)
        names = [name, name.removeprefix("text_model_"), f"text_model_{name}"]
    for known in names:
        if known in flat:
            return flat[known]
    raise UserError(f"LoRA has weights for '{names[0]}', which {part} lacks", file, "give the base it was trained on")


def _diffusers_blocks(tensors: dict[str, Any], net: Any) -> dict[str, Any]:
    """Kohya's SDXL names of blocks as diffusers' names."""
    if not any(name in key for key in tensors for name in _SGM_MARKS):
        return tensors
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    renamed = {}
    for key, value in _maybe_map_sgm_blocks_to_diffusers(dict(tensors), net.config).items():
        for theirs, ours in _SGM_NAMES:
            key = key.replace(theirs, ours)
        renamed[key] = value
    return renamed
