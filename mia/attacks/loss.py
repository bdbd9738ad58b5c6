"""Denoising loss by threshold, from the grid of noised latents.

s = -agg over draws and timesteps of |eps - e(z_t, t, .)|^2, z_t = alpha(t) z0 + sigma(t) eps. A model has lower loss on
what it was trained on. Sources: Matsumoto et al. 2302.03262, Carlini et al. 2301.13188, arXiv 2306.12983 #16 and #18.
What official code publishes under other names differs in the aggregate, and so has names of its own here:

- `denoising_loss` and `multiple_loss` (CDI, arXiv 2411.12858) average L2 *norms*; CDI's t = 100 is our grid's 101;
- `summed_loss` (CopyMark's "PIA", arXiv 2410.03640) sums SSE over t with one noise for all: its anchor e0 was replaced
  by Gaussian noise. It takes t = 11, 21, ..., 501; we take the grid's timesteps in that range. Its "corr" score divides
  by means of the test set and is left out.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence

TENS = tuple(range(1, 1000, 100))


@dataclasses.dataclass(frozen=True)
class Options:
    """`statistic`: mse, l2 (norms) or sum (of SSE over `timesteps`); no timesteps: all that the block holds.

    `mean_over`: the timesteps of the variant `mean`, those of setting 16; `draws`: 0 takes all, else the first ones.
    """

    statistic: str = "mse"
    timesteps: tuple[int, ...] = ()
    mean_over: tuple[int, ...] = ()
    draws: int = 0
    condition: str = "cond"
    block: str = "noised"


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """Minus the loss: `<statistic>@<t>` for each timestep, `mean` over `mean_over`; `sum` alone when summed."""
    steps = options.timesteps or evidence.known(options.block, options.condition)
    sse = evidence.distance(options.block, options.condition, "eps", steps)[:, :, : options.draws or None]
    if options.statistic == "sum":
        return {"sum": -sse.mean(axis=2).sum(axis=1)}
    error = np.sqrt(sse) if options.statistic == "l2" else sse / evidence.elements
    of = dict(zip(steps, error.mean(axis=2).T, strict=True))
    out = {f"{options.statistic}@{t:03d}": -of[t] for t in steps}
    if options.mean_over:
        evidence.at(options.block, options.mean_over)
        out["mean"] = -np.mean([of[t] for t in options.mean_over], axis=0)
    return out
