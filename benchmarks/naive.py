"""The reference's loop, restated: two images and five copies a call, timestep by timestep, losses in numpy on the host.

Source: `attacks.md` 1.1 of the authors' `attacks/mia.py`. Both guidance branches always, a decode after every step.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from mia import rng, settings

IMAGES_PER_CALL = 2


def naive(network: Any, samples: Any, setting: settings.Setting, draws: int, seed: int = 0) -> float:
    """Seconds for one non-iterative setting over all samples, draws and timesteps."""
    import torch

    on, schedule = network.device, network.schedule
    states = samples.condition["states"].to(on)
    latent, shown = samples.latents["image"], samples.pixels
    _wait(on)
    start = time.perf_counter()
    with torch.no_grad():
        for first in range(0, len(samples.ids), IMAGES_PER_CALL):
            rows = np.repeat(np.arange(first, min(first + IMAGES_PER_CALL, len(samples.ids))), draws)
            ids, copies = [samples.ids[i] for i in rows], [i % draws for i in range(len(rows))]
            z0 = latent[rows].to(on)
            eps = torch.from_numpy(rng.noise(seed, ids, copies, "forward", tuple(latent.shape[1:]))).to(on)
            text = torch.cat([states[-1:].expand(len(rows), -1, -1), states[samples.text["caption"][rows]]])
            for t in setting.timesteps():
                alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
                z = alpha * z0 + sigma * eps
                steps = torch.full((2 * len(rows),), t, device=on)
                null, cond = network(torch.cat([z, z]), steps, {"states": text}).chunk(2)
                e = null + setting.guidance_scale * (cond - null)
                to = max(t - setting.step, -1)
                prev = float(schedule.alpha(to)) * (z - sigma * e) / alpha + float(schedule.sigma(to)) * e
                decoded = (network.decode(prev) / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
                pixels = shown[rows].permute(0, 2, 3, 1).numpy()
                np.abs(pixels - (decoded * 255).round().astype("uint8")).mean((1, 2, 3))
                ((prev - z0).float().cpu().numpy() ** 2).mean((1, 2, 3))
                ((eps - cond).float().cpu().numpy() ** 2).mean((1, 2, 3))
    _wait(on)
    return time.perf_counter() - start


def _wait(on: Any) -> None:
    import torch

    if on.type == "cuda":
        torch.cuda.synchronize()
