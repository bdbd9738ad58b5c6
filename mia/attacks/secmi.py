"""SecMI (arXiv 2302.01316): the error of one step forth and back on the deterministic path from the image to noise.

y_0 = z0, y_{t+10} = phi(y_t, t -> t+10, e(y_t, t, .)), yhat_t = phi(y_{t+10}, t+10 -> t, e(y_{t+10}, t+10, .)); s =
-MSE(yhat_t - y_t). Low error = member. Defaults of `src/mia/secmi.py`: step 10, t_sec = 140 (the paper's for DDPM is
100), caption, no guidance. Its sum of squares and CDI's L2 norm order images alike. 16 UNet rows give every t to 140.

`secmi_copymark` is another statistic that was published under the name (CopyMark, arXiv 2410.03640): y_t is z0 with
fresh Gaussian noise, and because its list of timesteps runs downwards "the 50th step" is t = 51. Its "corr" score
divides by means of the test set and is left out.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """`block`: `secmi`, under the empty prompt `secmi-null`, or `stepback`; no timesteps: all that it holds."""

    block: str = "secmi"
    timesteps: tuple[int, ...] = ()
    condition: str = "cond"


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """Minus the mean over draws, `error@<t>` for each timestep."""
    block = options.block + ("-null" if options.condition == "null" else "")
    steps = options.timesteps or evidence.timesteps(block)
    error = evidence.losses(block, "latent_error", steps).mean(axis=2)
    return {f"error@{t:03d}": -error[:, i] for i, t in enumerate(steps)}
