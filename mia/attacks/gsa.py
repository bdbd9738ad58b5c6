"""GSA (arXiv 2308.06405): gradient norms, one for each parameter tensor, and boosted trees on labelled samples.

GSA1: norms of the gradient of the loss summed over timesteps; GSA2: norms at each timestep, averaged. High = member, a
probability. The authors fit XGBClassifier(200) on *shadow* models; CopyMark's scores are of 50 trees of depth 2 on
labelled samples of the same model, and so are ours. A gradient that is not finite is an error, with their number:
CopyMark puts the pooled mean or extreme of the set in its place. Confounder: any classifier with such labels learns the
split's shift; hold it against a blind one with the same labels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mia.attacks.calibration import Calibration
from mia.attacks.evidence import Evidence
from mia.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """`block`: `gsa1` or `gsa2`, and the attack's name."""

    block: str = "gsa1"


def scores(evidence: Evidence, options: Options, calibration: Calibration) -> dict[str, np.ndarray]:
    """Probability of a member by the trees, variant `all`; calibration rows out of fold."""
    norms = evidence.vectors(options.block)[:, 0].mean(axis=1)
    bad = np.flatnonzero(~np.isfinite(norms).all(axis=1))
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(norms)} samples have gradients that are not finite",
            f"block '{options.block}', sample {evidence.ids[bad[0]]}", "extract them in bfloat16 or float32",
        )  # fmt: skip
    return {"all": calibration.classified(options.block, norms, trees)}


def trees(seed: int) -> Any:
    """50 boosted trees of depth 2, unfitted. Source: `test_gsa.py` of CopyMark, there as a regression of the label."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(
        max_iter=50, max_depth=2, max_bins=64, learning_rate=0.3, early_stopping=False, random_state=seed
    )
