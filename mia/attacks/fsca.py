"""FSCA (arXiv 2506.11434): consistency of generations with image and caption, and a classifier on labelled samples.

Features: sorted cos(gen_i, x), and sorted cos(text, gen_i) - cos(text, x). The authors generate 64 images a caption and
train a perceptron of two streams, checkpoint chosen on test. cos(text, x) is a property of the pair that no model
enters, and on LAION-mi captions of the two sides differ. So there are three attacks: `fsca`, the paper's features;
`fsca_model`, without cos(text, x); and `blind_pair`, cos(text, x) alone, which is a blind baseline: what it reaches is
not membership. High = member, a probability.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia import classifiers
from mia.attacks.calibration import Calibration
from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """`part`: all, model or pair; `learner`: of `mia.classifiers`."""

    name: str = "fsca"
    part: str = "all"
    learner: str = "neural_net"
    block: str = "generations"


def scores(evidence: Evidence, options: Options, calibration: Calibration) -> dict[str, np.ndarray]:
    """Probability of a member by the learner, a variant named after the part; calibration rows out of fold."""
    calibration.check(options.name)
    fitted = classifiers.fitted(
        options.learner, features(evidence, options), calibration.member, calibration.group, calibration.known,
        calibration.options, calibration.seed, workers=calibration.workers,
    )  # fmt: skip
    return {options.part: fitted.score}


def features(evidence: Evidence, options: Options) -> np.ndarray:
    """What the learner sees of n generations: float64[samples, 2 n], or of the pair alone float64[samples, 1]."""
    image, text, pair = np.moveaxis(evidence.vectors(options.block)[:, 0, :, :3].astype(np.float64), -1, 0)
    if options.part == "pair":
        return pair[:, :1]
    return np.concatenate([np.sort(image, axis=1), np.sort(text - (pair if options.part == "all" else 0))], axis=1)
