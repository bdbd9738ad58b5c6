"""Real Stable Diffusion classes at toy size, with random weights: enough for every formula, trained for none."""

from __future__ import annotations

import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub name must fail at once, not after retries

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


def picture(seed: int, side: int = 40) -> bytes:
    """A PNG of smooth random colour."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((side, side + 7), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def tiny_clip():
    """An open_clip model with a small text tower and image tower."""
    from mia.compat import ensure_torchvision

    ensure_torchvision()
    import open_clip
    import torch

    torch.manual_seed(0)
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    ).eval()


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory, tiny_clip) -> pathlib.Path:
    """An ordinary diffusers folder: 32 px images, 4x8x8 latents."""
    import torch
    from diffusers import AutoencoderKL

    from mia import toy, train
    from mia.config import TrainOptions

    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(1)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32), latent_channels=4, norm_num_groups=8, sample_size=32,
        mid_block_add_attention=False, scaling_factor=0.7,
    ).save_pretrained(folder / "only-vae")  # fmt: skip
    unet = train.new_unet(4, 8, 32, TrainOptions(block_out_channels=(16, 32)), seed=3)
    toy.write_pipeline(folder / "model", tiny_clip, folder / "only-vae", unet)
    return folder / "model"
