"""Noise aggregation (arXiv 2510.21783): successive noise predictions of a member lie closer together.

From z_t, t = 101, five predictions along DDIM steps of 10; s = -mean pairwise L2 distance between them. The paper takes
t of about 50 to 150 and 5 steps; no code is public. On its own split the naive loss does better, which says shift.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """The block and the entry of its vector that is the mean distance."""

    block: str = "aggregation"
    entry: int = 0
    condition: str = "cond"


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """Minus the distance, mean over draws, `l2@<t>` for each timestep."""
    block = options.block + ("-null" if options.condition == "null" else "")
    distance = evidence.vectors(block)[..., options.entry].astype(np.float64).mean(axis=2)
    return {f"l2@{t:03d}": -distance[:, i] for i, t in enumerate(evidence.timesteps(block))}
