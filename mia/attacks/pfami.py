"""PFAMI (arXiv 2308.12143): a member's loss rises more when the image is cropped a little.

L(x, t) = MSE(e(z_t, t, .), eps) and x_m the image centre-cropped to a share lambda_m of its side and resized; s = mean
over t and m of (L(x_m, t) - L(x, t)) / L(x, t), high = member.

Paper and code: ten crops of .95 to .70, t = 0, 50, ..., 450, fresh noise everywhere, but only the crop of about .81 is
used, and the same statistic of a reference model is subtracted (we have none; a control target's score stands beside it
instead). Here original and crop share their noise, which the paper's pairing means and no port does. Ports, unpaired
(the original with draw 1, so two draws are needed):

- `pfami_copymark`: SSE, sum over t of mean_m (L_m - L) / (L + 1e-6) over all crops; official t = 50, ..., 500, ten
  crops;
- `pfami_clid`: mean over t of L_m - L, no division; official t = 1, 51, ..., 451, one crop of .825;
- `pfami_sima`: mean over t of (L - mean_m L_m)^2: the sign is lost. It crops the latent; we crop the image. Its
  orientation is taken to be PFAMI's.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence
from mia.errors import UserError

LEAST = 1e-12  # a loss below is the rounding of the Gram matrix


@dataclasses.dataclass(frozen=True)
class Options:
    """`kind`: paper, copymark, clid or sima; no timesteps: all of the crops' block.

    `nearest`: percent of the side that a crop keeps; of the crops that are there the nearest to it is read, the larger
    of two, and all of them if it is 0. `draw`: whose noise the original has; 0 is the crops' own.
    """

    kind: str = "paper"
    nearest: int = 82
    draw: int = 0
    timesteps: tuple[int, ...] = ()
    condition: str = "cond"


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """The rise of the loss: `mean` (or `sum`) over timesteps and, in the paper's kind, `rise@<t>` for each."""
    blocks = [f"crop-{percent}" for percent in crops(evidence, options.nearest)]
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


def crops(evidence: Evidence, nearest: int) -> list[int]:
    """Percent of the side that each crop to be read keeps, ascending."""
    found = sorted(int(block.removeprefix("crop-")) for block in evidence.blocks if block.startswith("crop-"))
    if not found:
        evidence.need(f"crop-{nearest or Options.nearest}")
    return [min(found, key=lambda percent: (abs(percent - nearest), -percent))] if nearest else found


def _loss(evidence: Evidence, block: str, steps: tuple[int, ...], draw: int, options: Options) -> np.ndarray:
    """L, float64[n, T].

    Raises:
        UserError: the block has no such draw: the draw of the crops in its place would make it another statistic.
    """
    if draw >= len(evidence.draws(block)):
        what = "image and crop are to have noises of their own, and one draw was made"
        raise UserError(what, f"block '{block}'", "extract it with `--draws 2` or more, or take `pfami`")
    return evidence.distance(block, options.condition, "eps", steps)[:, :, draw] / evidence.elements
