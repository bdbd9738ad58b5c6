"""Small models of every family, of the real diffusers and transformers classes, with random weights, as folders."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from mia.compat import ensure_torchvision

TOKENS = 16
SIDE = 32  # pixels; autoencoders halve it twice
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
          "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip


def _alphabet() -> list[str]:
    """The 256 signs that stand for bytes in CLIP's vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(c) for _, c in sorted(zip(plain + rest, plain + list(range(256, 256 + len(rest))), strict=True))]


def clip_tokenizer() -> Any:
    """CLIP's tokenizer without merges: 514 words, every letter a token."""
    from transformers import CLIPTokenizer

    letters = _alphabet()
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS)


def t5_tokenizer() -> Any:
    """A unigram tokenizer of single letters."""
    from transformers import T5TokenizerFast

    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in letters)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0)


def clip_text(width: int, projected: bool, seed: int) -> Any:
    """A CLIP text encoder of three layers, with a projection or without."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=TOKENS, projection_dim=width, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def kl(channels: int = 4, scaling: float = 0.7, **more: Any) -> Any:
    """An AutoencoderKL that makes 8 x 8 of 32 x 32."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), latent_channels=channels, norm_num_groups=4, sample_size=SIDE,
        mid_block_add_attention=False, scaling_factor=scaling, **more,
    ).eval()  # fmt: skip


def vq() -> Any:
    """A VQModel that makes 8 x 8 of 32 x 32."""
    import torch
    from diffusers import VQModel

    torch.manual_seed(2)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), latent_channels=4, vq_embed_dim=4, num_vq_embeddings=32, norm_num_groups=4,
        sample_size=SIDE, mid_block_add_attention=False, scaling_factor=0.6,
    ).eval()  # fmt: skip


def text_unet(width: int, seed: int = 1, **more: Any) -> Any:
    """A UNet with cross-attention to states of `width`."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width, attention_head_dim=8, norm_num_groups=8, **more,
    ).eval()  # fmt: skip


def plain_unet(side: int, channels: int, out: int | None = None) -> Any:
    """A UNet that is told only the timestep."""
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(1)
    return UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=out or channels, layers_per_block=1,
        block_out_channels=(16, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=8,
    ).eval()  # fmt: skip


def stable(folder: pathlib.Path, prediction: str = "epsilon") -> Any:
    """Stable Diffusion 1.x, or 2.x with `v_prediction`; the pipeline as diffusers itself has it."""
    ensure_torchvision()
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return _saved(folder, StableDiffusionPipeline(
        vae=kl(), text_encoder=clip_text(32, False, 3), tokenizer=clip_tokenizer(), unet=text_unet(32),
        scheduler=DDIMScheduler(**STABLE, prediction_type=prediction), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ))  # fmt: skip


def xl(folder: pathlib.Path, force_zeros: bool = True) -> Any:
    """SDXL."""
    ensure_torchvision()
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = text_unet(
        32 + 16, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip
    plain = {name: value for name, value in STABLE.items() if name.startswith("beta")}
    return _saved(folder, StableDiffusionXLPipeline(
        vae=kl(), text_encoder=clip_text(32, False, 3), text_encoder_2=clip_text(16, True, 4),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), unet=unet,
        scheduler=EulerDiscreteScheduler(**plain), force_zeros_for_empty_prompt=force_zeros,
    ))  # fmt: skip


def sd3(folder: pathlib.Path, t5: bool = False) -> Any:
    """Stable Diffusion 3, with its third text encoder or without."""
    ensure_torchvision()
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(1)
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=16, pooled_projection_dim=32 + 16, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    third = T5EncoderModel(
        T5Config(vocab_size=30, d_model=64, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()  # fmt: skip
    return _saved(folder, StableDiffusion3Pipeline(
        vae=kl(scaling=1.5, shift_factor=0.06), text_encoder=clip_text(32, True, 3),
        text_encoder_2=clip_text(16, True, 4), text_encoder_3=third if t5 else None, tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), tokenizer_3=t5_tokenizer() if t5 else None, transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ))  # fmt: skip


def unconditional(folder: pathlib.Path, quantised: bool = True) -> Any:
    """An unconditional latent model, with a VQModel or an AutoencoderKL."""
    ensure_torchvision()
    from diffusers import DDIMScheduler, LDMPipeline

    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    return _saved(folder, LDMPipeline(vqvae=vq() if quantised else kl(), unet=plain_unet(8, 4), scheduler=scheduler))


def dit(folder: pathlib.Path, classes: int = 10) -> Any:
    """A class-conditional latent transformer that predicts a variance, too."""
    ensure_torchvision()
    import torch
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(1)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=classes,
    ).eval()  # fmt: skip
    return _saved(folder, DiTPipeline(transformer=net, vae=kl(), scheduler=DDIMScheduler(clip_sample=False)))


def ddpm(folder: pathlib.Path, flat: bool = False) -> Any:
    """A model of 16 x 16 pixels that clips; `flat` keeps its files beside model_index.json, as on the hub."""
    ensure_torchvision()
    from diffusers import DDPMPipeline, DDPMScheduler

    pipeline = _saved(folder, DDPMPipeline(unet=plain_unet(16, 3), scheduler=DDPMScheduler()))
    if flat:
        for part in ("unet", "scheduler"):
            for file in (folder / part).iterdir():
                file.rename(folder / file.name)
            (folder / part).rmdir()
    return pipeline


def _saved(folder: pathlib.Path, pipeline: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # layers that begin at zero would hide what goes wrong before them
        for net in (value for value in pipeline.components.values() if isinstance(value, torch.nn.Module)):
            for parameter in net.parameters():
                if not parameter.any():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    pipeline.save_pretrained(folder, safe_serialization=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit(file: pathlib.Path, **changed: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    whole = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({name: value for name, value in whole.items() if value is not None}))
