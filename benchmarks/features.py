"""Extraction against the paper's own loop, in one run: setting 16 on the toy target's shapes, random weights.

The naive twin restates `attacks/mia.py` of Ankowa/inz: two images times five draws in a call, one timestep at a time,
both guidance branches always, a decode after every step, losses in numpy on the host. Prints seconds and ratios.
"""

from __future__ import annotations

import logging
import pathlib
import tempfile
import time

import numpy as np

from mia import features, models, settings, toy, train
from mia.config import FeaturesOptions, TrainOptions

IMAGES, DRAWS = 32, 5
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}


def target(folder: pathlib.Path) -> pathlib.Path:
    """A toy diffusers folder with random weights, in the example's shapes."""
    models.ensure_torchvision()
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


def naive(engine: features.Engine, setting: settings.Setting) -> float:
    """Seconds of the reference's loop over the same images, draws and timesteps."""
    import torch

    samples, start = engine.samples, time.perf_counter()
    root = np.sqrt(engine.schedule.alpha_bar).astype(np.float32)
    rest = np.sqrt(1 - engine.schedule.alpha_bar).astype(np.float32)
    with torch.no_grad():
        for first in range(0, IMAGES, 2):
            rows = np.repeat([first, first + 1], DRAWS)
            z0, eps = samples.z0[rows], engine.eps[first : first + 2].flatten(0, 1)
            text = torch.cat([samples.states[-1:].expand(len(rows), -1, -1), samples.states[samples.caption[rows]]])
            for t in setting.timesteps():
                z = root[t] * z0 + rest[t] * eps
                null, cond = engine.unet(torch.cat([z, z]), t, text).sample.chunk(2)
                e = null + setting.guidance_scale * (cond - null)
                p = max(t - setting.step, 0)
                prev = float(root[p]) * (z - float(rest[t]) * e) / float(root[t]) + float(rest[p]) * e
                decoded = engine.vae.decode(prev / engine.vae.config.scaling_factor).sample
                shown = (decoded / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
                pixels = samples.pixels[rows].permute(0, 2, 3, 1).numpy()
                np.abs(pixels - (shown * 255).round().astype("uint8")).mean((1, 2, 3))
                ((prev - z0).cpu().numpy() ** 2).mean((1, 2, 3))
                ((eps - cond).cpu().numpy() ** 2).mean((1, 2, 3))
    return time.perf_counter() - start


def ours(engine: features.Engine, number: int) -> float:
    """Seconds of `features.extract`."""
    start = time.perf_counter()
    features.extract(engine, settings.block_of(settings.SETTINGS[number]), [number], 128)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    import torch

    log = logging.getLogger("bench")
    with tempfile.TemporaryDirectory() as folder:
        model = target(pathlib.Path(folder))
        on = torch.device("cpu")
        generator = torch.Generator().manual_seed(0)
        samples = features.Samples(
            [f"{i:032x}" for i in range(IMAGES)], torch.randn(IMAGES, 4, 8, 8, generator=generator),
            torch.randn(IMAGES + 1, 77, 64, generator=generator), np.arange(IMAGES),
            torch.rand(IMAGES, 3, 32, 32, generator=generator) * 255,
        )  # fmt: skip
        unet, vae = models.unet(model, on, torch.float32), models.vae(model, on, torch.float32)
        schedule = models.schedule(model)

        def engine(losses: tuple[str, ...]) -> features.Engine:
            return features.Engine(unet, vae, schedule, samples, FeaturesOptions(draws=DRAWS, losses=losses), 0)

        everything, model_loss = engine(settings.LOSSES), engine(("model_loss",))
        ours(model_loss, 18)  # warm up
        slow = naive(everything, settings.SETTINGS[16])
        for what, seconds in [("same work", ours(everything, 16)), ("model loss only", ours(model_loss, 16))]:
            log.info("%-16s naive %.2f s, ours %.2f s, ratio %.2f", what, slow, seconds, slow / seconds)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
