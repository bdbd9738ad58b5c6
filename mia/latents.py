"""Each image and each caption through the frozen encoders, once, for every attack to come. Never sees a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from mia import models, pixels, tables


def side_px(latent_side: int, vae: Any) -> int:
    """The side, in pixels, of the square images whose latents have `latent_side`."""
    return latent_side * 2 ** (len(vae.config.block_out_channels) - 1)


def squares(images: Mapping[str, bytes], ids: list[str], side: int) -> np.ndarray:
    """The images as the model sees them, uint8[n, side, side, 3]: shorter side resized, centre cropped."""
    shown = [pixels.centre_square(pixels.decode(images[i]), side) for i in ids]
    return np.array(shown, dtype=np.uint8).reshape(-1, side, side, 3)


def encode(
    selection: pa.Table, images: Mapping[str, bytes], vae: Any, tokenize: Any, text_encoder: Any, side: int,
    batch_size: int, progress: Callable = iter,
) -> tuple[pa.Table, pa.Table]:  # fmt: skip
    """The latents table (posterior mean and log-variance, float16) and the texts table (one row for each caption).

    The texts table ends with the empty prompt's states, which guidance needs. Latents are not yet scaled.
    """
    import torch

    ids = selection["sample_id"].to_pylist()
    captions = selection["caption"].to_pylist()
    width = vae.config.latent_channels * (side // side_px(1, vae)) ** 2
    mean, logvar = np.empty((len(ids), width), np.float16), np.empty((len(ids), width), np.float16)
    for run, real in progress(list(models.batches(len(ids), batch_size))):
        batch = squares(images, [ids[i] for i in run], side)
        x = torch.from_numpy(batch).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
        with torch.inference_mode():
            posterior = vae.encode(x).latent_dist
        mean[run[:real]] = posterior.mean[:real].flatten(1).float().cpu().numpy()
        logvar[run[:real]] = posterior.logvar[:real].flatten(1).float().cpu().numpy()
    latents = pa.table(
        {
            "sample_id": pa.array(ids, pa.string()),
            "caption_id": pa.array([tables.caption_id(c) for c in captions], pa.string()),
            "mean": tables.vector_column(mean),
            "logvar": tables.vector_column(logvar),
        }
    )
    return latents, encode_texts([*captions, ""], tokenize, text_encoder, batch_size)


def encode_texts(captions: list[str], tokenize: Any, text_encoder: Any, batch_size: int) -> pa.Table:
    """The texts table of the distinct `captions`: last hidden states [tokens * width] in float16."""
    distinct = sorted(set(captions), key=tables.caption_id)
    states, counts = models.text_states(tokenize, text_encoder, distinct, batch_size)
    return pa.table(
        {
            "caption_id": [tables.caption_id(c) for c in distinct],
            "n_tokens": pa.array(counts),
            "states": tables.vector_column(states.reshape(len(states), -1).astype(np.float16)),
        }
    )


def latent_tensor(latents: pa.Table, vae: Any) -> Any:
    """z0, the posterior's mode times the scaling factor: float32[n, channels, side, side]."""
    import torch

    mean = torch.from_numpy(tables.vectors(latents["mean"]))
    channels = vae.config.latent_channels
    side = round((mean.shape[1] / channels) ** 0.5)
    return mean.reshape(-1, channels, side, side) * vae.config.scaling_factor


def state_tensor(latents: pa.Table, texts: pa.Table, width: int) -> tuple[Any, np.ndarray]:
    """Text states, float32[n_captions + 1, tokens, width], the empty prompt's last; and each sample's row, int64[n]."""
    import torch

    place = {name: row for row, name in enumerate(texts["caption_id"].to_pylist())}
    states = torch.from_numpy(tables.vectors(texts["states"])).reshape(len(place), -1, width)
    empty = place[tables.caption_id("")]
    rows = np.array([place[name] for name in latents["caption_id"].to_pylist()], dtype=np.int64)
    return torch.cat([states, states[empty : empty + 1]]), rows
