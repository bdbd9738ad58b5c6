"""A small latent diffusion model trained on one pool: the example's target, whose membership truth is known."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mia import models
from mia.config import TrainOptions
from mia.errors import UserError

log = logging.getLogger(__name__)


def new_unet(latent_channels: int, latent_side: int, text_width: int, options: TrainOptions, seed: int) -> Any:
    """A UNet2DConditionModel shaped as Stable Diffusion's, seeded random weights; cross-attention at the last level."""
    import torch

    models.ensure_torchvision()
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    levels = len(options.block_out_channels)
    return UNet2DConditionModel(
        sample_size=latent_side, in_channels=latent_channels, out_channels=latent_channels, layers_per_block=1,
        block_out_channels=options.block_out_channels, attention_head_dim=2, norm_num_groups=16,
        cross_attention_dim=text_width,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
    )  # fmt: skip


def train(
    unet: Any,
    z0: Any,
    states: Any,
    schedule: models.Schedule,
    options: TrainOptions,
    seed: int,
    progress: Callable = iter,
) -> Iterator[tuple[int, Any]]:
    """Train `unet` in place and yield (step, unet) at each of `options.checkpoints`, step 0 being the untrained model.

    Args:
        z0: scaled latents, float32[n, channels, height, width].
        states: text states, float32[n + 1, tokens, width]; the last is the empty prompt's, which replaces a caption
            with probability `caption_dropout`.

    Raises:
        UserError: the loss is no longer finite.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=options.learning_rate, fused=True)
    last = max(options.checkpoints)
    warm_then_cosine = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / 50) * (0.05 + 0.95 * (1 + np.cos(np.pi * s / max(last, 1))) / 2)
    )
    root_a = torch.from_numpy(np.sqrt(schedule.alpha_bar)).float()
    root_b = torch.from_numpy(np.sqrt(1 - schedule.alpha_bar)).float()
    order = _epochs(len(z0), options.train_batch_size, generator)
    if 0 in options.checkpoints:
        yield 0, unet
    for step in progress(range(1, last + 1)):
        rows = next(order)
        t = torch.randint(len(root_a), (len(rows),), generator=generator)
        eps = torch.randn(z0[rows].shape, generator=generator)
        caption = torch.where(
            torch.rand(len(rows), generator=generator) < options.caption_dropout, len(states) - 1, rows
        )
        z = root_a[t, None, None, None] * z0[rows] + root_b[t, None, None, None] * eps
        loss = torch.nn.functional.mse_loss(unet(z, t, states[caption]).sample, eps)
        if not torch.isfinite(loss):
            raise UserError(f"training loss is {loss.item()} at step {step}", "models.*.learning_rate", "lower it")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        warm_then_cosine.step()
        if step in options.checkpoints:
            log.info("step %d, loss %.4f", step, loss.item())
            yield step, unet


def _epochs(n: int, batch: int, generator: Any) -> Iterator[Any]:
    """Row numbers in seeded random order without end, each row once an epoch, in batches of `batch`."""
    import torch

    rest = torch.empty(0, dtype=torch.int64)
    while True:
        while len(rest) < batch:
            rest = torch.cat([rest, torch.randperm(n, generator=generator)])
        yield rest[:batch]
        rest = rest[batch:]
