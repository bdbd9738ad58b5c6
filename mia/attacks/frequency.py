"""The loss in one band of frequencies (after arXiv 2505.20955, which filters what loss-type attacks compare).

low: energy of the 2x2 block means of e(z_t, t, .) - eps, each counted four times; high: the rest. s = -band energy / d,
mean over draws, low = member. A filter of two bands, ours; the paper's cut-off is not ours to know, and no LAION-mi
number was found.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """`band`: low or high; no timesteps: all that the block holds."""

    band: str = "low"
    timesteps: tuple[int, ...] = ()
    condition: str = "cond"
    block: str = "noised"


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """Minus the band's mean square, `<band>@<t>` for each timestep."""
    steps = options.timesteps or evidence.known(options.block, options.condition)
    bands = evidence.bands(options.block, steps, options.condition)
    low = bands[..., -1]
    energy = low if options.band == "low" else bands[..., :-1].sum(axis=-1) - low
    mean = energy.mean(axis=2) / evidence.elements
    return {f"{options.band}@{t:03d}": -mean[:, i] for i, t in enumerate(steps)}
