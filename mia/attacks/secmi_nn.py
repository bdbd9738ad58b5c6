"""SecMI-NN (arXiv 2302.01316, NNs): a network on the map |yhat_t - y_t| at t_sec = 140, fitted on labelled samples.

The authors train a ResNet-18 on 20 % of the data and release none for Stable Diffusion. The map is stored averaged down
to 16 x 16 at most, and we average it further and give it to the perceptron of `mia.classifiers`. High = member, a
probability.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia import classifiers
from mia.attacks.calibration import Calibration
from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """`side`: the map is averaged down to at most this many squares a side; `learner`: of `mia.classifiers`."""

    name: str = "secmi_nn"
    side: int = 4
    learner: str = "neural_net"
    condition: str = "cond"


def scores(evidence: Evidence, options: Options, calibration: Calibration) -> dict[str, np.ndarray]:
    """Probability of a member by the learner, variant `map@140`; calibration rows out of fold."""
    block = "secmi-null" if options.condition == "null" else "secmi"
    maps = averaged(evidence.vectors(block)[:, -1].mean(axis=1), evidence.shape, options.side)
    calibration.check(options.name)
    fitted = classifiers.fitted(
        options.learner, maps, calibration.member, calibration.group, calibration.known, calibration.options,
        calibration.seed, workers=calibration.workers,
    )  # fmt: skip
    return {"map@140": fitted.score}


def averaged(vectors: np.ndarray, shape: tuple[int, ...], side: int) -> np.ndarray:
    """Flattened maps float32[n, C * h * w], averaged over blocks to at most `side` squares a side, float64[n, k].

    The stored map is square where the latent is; a map that cannot be cut into equal blocks stays as it is.
    """
    n, channels = len(vectors), shape[0]
    edge = round((vectors.shape[1] / channels) ** 0.5)
    x = vectors.astype(np.float64)
    if edge * edge * channels != vectors.shape[1] or edge <= side or edge % side:
        return x
    step = edge // side
    return x.reshape(n, channels, side, step, side, step).mean(axis=(3, 5)).reshape(n, -1)
