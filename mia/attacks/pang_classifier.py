"""Pang & Wang's classifier (arXiv 2312.08207): a learner on the similarities of `pang`, fitted on labelled samples.

The authors' perceptron reports its best epoch on test; here calibration rows are scored out of fold and nothing is
chosen on test. High = member, a probability.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia import classifiers
from mia.attacks import pang
from mia.attacks.calibration import Calibration
from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options(pang.Options):
    """`learner`: of `mia.classifiers`."""

    name: str = "pang_classifier"
    learner: str = "neural_net"


def scores(evidence: Evidence, options: Options, calibration: Calibration) -> dict[str, np.ndarray]:
    """Probability of a member by the learner on the similarities, variant `all`; calibration rows out of fold."""
    calibration.check(options.name)
    image, tokens = pang.similarities(evidence, options)
    fitted = classifiers.fitted(
        options.learner, np.column_stack([np.sort(image, axis=1), tokens]), calibration.member, calibration.group,
        calibration.known, calibration.options, calibration.seed, workers=calibration.workers,
    )  # fmt: skip
    return {"all": fitted.score}
