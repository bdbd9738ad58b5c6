"""PIA and PIAN (arXiv 2305.18355): does the model predict, at t, the noise that it itself found in the image at 0?

e0 = e(z0, 0, .), and PIA(t) = || e0 - e(alpha z0 + sigma e0, t, .) ||_p^p; PIAN scales e0 to the L1 level of a unit
Gaussian, e0 sqrt(2/pi) / mean|e0|. Low = member, so s is minus that. p = 4 is the class default of
`stable_diffusion/components.py`; t = 200 is where its authors and CDI found it best.

Official code for Stable Diffusion cannot run, and has linear betas, 2x - 1 on latents and guidance 7.5 on every query;
ours takes the model's own schedule and one prediction. CDI uses p = 5 (variant `l5`), and its PIAN is off by pi/2.
CopyMark's "PIA" is `summed_loss`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """`block`: `pia` or `pian`; under the empty prompt `-null` is added. No timesteps: all that the block holds."""

    block: str = "pia"
    powers: tuple[int, ...] = (4, 1, 5)
    timesteps: tuple[int, ...] = ()
    condition: str = "cond"


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """Minus the distance to the anchor, `l<p>@<t>` for each power and timestep."""
    block = options.block + ("-null" if options.condition == "null" else "")
    steps = options.timesteps or evidence.known(block, options.condition)
    out: dict[str, np.ndarray] = {}
    for p in options.powers:
        power = evidence.norm(block, f"{options.condition}_eps_l{p}", steps).mean(axis=2)
        out |= {f"l{p}@{t:03d}": -power[:, i] for i, t in enumerate(steps)}
    return out
