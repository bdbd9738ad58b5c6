"""SimA (arXiv 2509.25003): how large the predicted noise is on the un-noised latent, in one query.

SimA(t) = sum e(z0, t, .)^4 and SimA-MC(t) = mean over draws of sum e(z_t, t, .)^4; low = member, so s is minus that.
Defaults of `diffusers/src/mia/attack.py`: t = 0, 10, ..., 190, l4 to the fourth. Its labels call non-members positive,
so its TPR at 1 % FPR counts detected non-members, and it takes the best t on test; we do neither. Confounder: on a
clean latent the prediction follows how noisy the image itself looks.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """`block`: `clean` for SimA, `noised` for SimA-MC; no timesteps: all that the block holds."""

    block: str = "clean"
    timesteps: tuple[int, ...] = ()
    condition: str = "cond"


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """Minus the mean over draws, `l4@<t>` for each timestep."""
    steps = options.timesteps or evidence.known(options.block, options.condition)
    power = evidence.norm(options.block, f"{options.condition}_l4", steps).mean(axis=2)
    return {f"l4@{t:03d}": -power[:, i] for i, t in enumerate(steps)}
