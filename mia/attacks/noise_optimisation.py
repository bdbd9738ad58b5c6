"""Noise optimisation (CDI, arXiv 2411.12858): how far a noised latent must move to please the model, and how well.

L-BFGS on a perturbation delta of z_t, t = 101, five iterations; s = -final loss and s = -||delta||_2. CDI leaves both
signs to a logistic regression; that members need less of either is its reasoning and our reading. Its code noises an
already noised latent; the block does not.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """The block, whose vector holds the final loss and the norm."""

    block: str = "noise-optimisation"


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """Minus the final loss and minus the norm, mean over draws: variants `loss@<t>` and `delta@<t>`."""
    kept = evidence.vectors(options.block).astype(np.float64).mean(axis=2)
    steps = evidence.timesteps(options.block)
    names = ("loss", "delta")
    return {f"{name}@{t:03d}": -kept[:, i, j] for j, name in enumerate(names) for i, t in enumerate(steps)}
