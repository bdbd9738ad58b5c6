"""Extraction against the reference's loop, on a tiny model on the CPU: the same work, and the work that is needed.

Setting 16 over 32 images, 5 draws and 10 timesteps. Prints seconds and ratios; limits: 1.3x for the same work, 2.4x for
the model loss alone (`performance.md`, E).
"""

from __future__ import annotations

import logging
import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.naive import naive
from mia import families, features, settings, toy, train, walks
from mia.config import FeaturesOptions, TrainOptions
from mia.models import ensure_torchvision
from mia.reader import Samples

IMAGES, DRAWS, NUMBER, BATCH, ROUNDS = 32, 5, 16, 160, 3
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}


def target(folder: pathlib.Path) -> pathlib.Path:
    """A toy diffusers folder with random weights, in the example's shapes."""
    ensure_torchvision()
    import open_clip
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32), latent_channels=4, norm_num_groups=8, sample_size=32,
        mid_block_add_attention=False,
    ).save_pretrained(folder / "vae")  # fmt: skip
    unet = train.new_unet(4, 8, 64, TrainOptions(), 0)
    toy.write_pipeline(folder / "model", open_clip.CLIP(**CLIP), folder / "vae", unet)
    return folder / "model"


def random_samples(images: int, latent_shape: tuple[int, ...], side: int, tokens: int, width: int) -> Samples:
    """Random latents, text states and pixels, seeded."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return Samples(
        [f"{i:032x}" for i in range(images)], {"image": torch.randn(images, *latent_shape, generator=generator)},
        {"states": torch.randn(images + 1, tokens, width, generator=generator)}, {"caption": np.arange(images)},
        torch.rand(images, 3, side, side, generator=generator) * 255,
    )  # fmt: skip


def ours(network: Any, samples: Samples, losses: tuple[str, ...], draws: int, batch_size: int) -> float:
    """Seconds of `features.extract` for the same setting."""
    options = walks.jobs(FeaturesOptions(settings=(NUMBER,), draws=draws, losses=losses))["noised"]
    start = time.perf_counter()
    features.extract(network, samples, options, 0, batch_size)
    return time.perf_counter() - start


def main() -> None:
    """Print the table: the best of a few rounds each, in turn, since the machine is shared."""
    import torch

    log = logging.getLogger("bench")
    with tempfile.TemporaryDirectory() as folder:
        network = families.find(str(target(pathlib.Path(folder)))).network(torch.device("cpu"), torch.float32)
        samples = random_samples(IMAGES, (4, 8, 8), 32, 77, 64)
        ours(network, samples, ("model_loss",), 1, BATCH)  # warm up
        timed: dict[str, list[float]] = {"naive": [], "same work": [], "model loss only": []}
        for _ in range(ROUNDS):
            timed["naive"].append(naive(network, samples, settings.SETTINGS[NUMBER], DRAWS))
            timed["same work"].append(ours(network, samples, settings.LOSSES, DRAWS, BATCH))
            timed["model loss only"].append(ours(network, samples, ("model_loss",), DRAWS, BATCH))
        slow = min(timed.pop("naive"))
        for (what, seconds), limit in zip(timed.items(), (1.3, 2.4), strict=True):
            log.info(
                "%-16s naive %.2f s, ours %.2f s, ratio %.2f (limit %.1f)",
                what, slow, min(seconds), slow / min(seconds), limit,
            )  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
