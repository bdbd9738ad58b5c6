"""ReDiffuse (arXiv 2405.20771): a member comes back from an image-variation service more like itself.

xhat = mean of n variations; s = SSIM(grey(x), grey(xhat)), high = member. Paper: n = 10; `Stable_Diffusion/attack.py`:
n = 1, t = 50, guidance 7.5, and PIA's linear betas and doubled latents, which we do not have.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """The block and the entry of its vector that is the structural similarity."""

    block: str = "variations"
    entry: int = 0


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """The structural similarity, mean over draws, `ssim@<t>` for each timestep."""
    kept = evidence.vectors(options.block)[..., options.entry].astype(np.float64).mean(axis=2)
    return {f"ssim@{t:03d}": kept[:, i] for i, t in enumerate(evidence.timesteps(options.block))}
