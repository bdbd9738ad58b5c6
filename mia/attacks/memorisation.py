"""Norm of the guidance direction (Wen et al., ICLR 2024): a memorised caption pulls the prediction far.

s = mean over draws of || e(z_t, t, c) - e(z_t, t, null) ||_2, high = member. The authors walk a generation from pure
noise and average over its steps; we read it on the image's own noised latents, at each t and as the mean over 1, 101,
..., 901. It finds images learnt by heart, and says little of others. Confounder: the caption alone decides much of it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """No timesteps: all that hold both predictions; `mean_over`: those of the variant `mean`."""

    timesteps: tuple[int, ...] = ()
    mean_over: tuple[int, ...] = tuple(range(1, 1000, 100))
    block: str = "noised"


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """The norm, `norm@<t>` for each timestep and `mean`."""
    evidence.need_null(options.block, "memorisation")
    steps = options.timesteps or evidence.known(options.block, "null")
    norm = np.sqrt(evidence.distance(options.block, "cond", "null", steps)).mean(axis=2)
    evidence.at(options.block, options.mean_over)
    of = dict(zip(steps, norm.T, strict=True))
    mean = {"mean": np.mean([of[t] for t in options.mean_over], axis=0)} if options.mean_over else {}
    return {f"norm@{t:03d}": of[t] for t in steps} | mean
