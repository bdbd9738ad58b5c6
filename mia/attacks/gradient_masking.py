"""Gradient masking (CDI, arXiv 2411.12858): how well the model restores the entries that matter most to its loss.

The fifth of the latent's entries with the largest input gradient are replaced by noise; s = -|| (eps - z0) - e ||_2 on
them, low = member. Ten timesteps, each a variant; CDI gives all ten to a logistic regression. 20 UNet rows and 10
backward passes.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """The block."""

    block: str = "gradient-masking"


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """Minus the masked error, mean over draws, `masked@<t>` for each timestep."""
    error = evidence.losses(options.block, "model_loss").mean(axis=2)
    return {f"masked@{t:03d}": -error[:, i] for i, t in enumerate(evidence.timesteps(options.block))}
