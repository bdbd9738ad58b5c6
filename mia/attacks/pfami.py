"""PFAMI (arXiv 2308.12143): a member's loss rises more when the image is cropped a little.

L(x, t) = MSE(e(z_t, t, .), eps) and x_m the image centre-cropped to a share lambda_m of its side and resized; s = mean
over t and m of (L(x_m, t) - L(x, t)) / L(x, t), high = member.

Paper and code: ten crops of .95 to .70, t = 0, 50, ..., 450, fresh noise everywhere, but only the crop of about .81 is
used, and the same statistic of a reference model is subtracted (we have none; a control target's score stands beside it
instead). Here original and crop share their noise, which the paper's pairing means and no port does. Ports, unpaired
(the original with draw 1):

- `pfami_copymark`: SSE, sum over t of mean_m (L_m - L) / (L + 1e-6); official t = 50, ..., 500, ten crops;
- `pfami_clid`: mean over t of L_m - L, no division; official t = 1, 51, ..., 451, one crop of .825;
- `pfami_sima`: mean over t of (L - mean_m L_m)^2: the sign is lost. It crops the latent; we crop the image. Its
  orientation is taken to be PFAMI's.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence

LEAST = 1e-12  # a loss below is the rounding of the Gram matrix


@dataclasses.dataclass(frozen=True)
class Options:
    """`kind`: paper, copymark, clid or sima; `crops`: percent of the side kept; no timesteps: all of the crops' block.

    `draw`: whose noise the original has; 0 is the crops' own.
    """

    kind: str = "paper"
    crops: tuple[int, ...] = (82,)
    draw: int = 0
    timesteps: tuple[int, ...] = ()
    condition: str = "cond"


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """The rise of the loss: `mean` (or `sum`) over timesteps and, in the paper's kind, `rise@<t>` for each."""
    blocks = [f"crop-{percent}" for percent in options.crops]
    steps = options.timesteps or evidence.known(blocks[0], options.condition)
    crop = np.mean([_loss(evidence, block, steps, 0, options) for block in blocks], axis=0)
    original = _loss(evidence, "noised", steps, options.draw, options)
    if options.kind == "copymark":
        d = evidence.elements
        return {"sum": (d * (crop - original) / (d * original + 1e-6)).sum(axis=1)}
    if options.kind == "clid":
        return {"mean": (crop - original).mean(axis=1)}
    if options.kind == "sima":
        return {"mean": ((original - crop) ** 2).mean(axis=1)}
    rise = (crop - original) / np.maximum(original, LEAST)
    return {"mean": rise.mean(axis=1)} | {f"rise@{t:03d}": rise[:, i] for i, t in enumerate(steps)}


def _loss(evidence: Evidence, block: str, steps: tuple[int, ...], draw: int, options: Options) -> np.ndarray:
    """L, float64[n, T]. Where only one draw was made, it is the original's, too."""
    draw = min(draw, len(evidence.draws(block)) - 1)
    return evidence.distance(block, options.condition, "eps", steps)[:, :, draw] / evidence.elements
