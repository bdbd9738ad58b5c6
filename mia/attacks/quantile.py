"""Quantile regression (arXiv 2312.05140): is this image's error low *for an image like it*?

A regressor is fitted on non-members only, by pinball loss, to predict the q-quantile of the log of SecMI's t-error at t
= 140 from what the image itself is like; s = -(log error - predicted quantile), mean over a bag. High = member. The
paper trains small convolutional networks on pixels of public non-members and lets a bag vote; its quantile is the
wanted FPR. No code is public, never on SD.

What the image is like is read off its latent alone, which no model under attack enters: energy by channel and in low
frequencies, from the clean block. q = .05, ours: at .01 a leaf of 50 rows holds half a sample. The log makes it a ratio
of errors, so that hard images do not spread wider than easy ones.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia import rng
from mia.attacks.calibration import Calibration, Predictor
from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """`quantile`: the one predicted; `bag`: regressors on bootstrap samples; trees as scikit-learn names them."""

    name: str = "quantile_regression"
    timestep: int = 140
    quantile: float = 0.05
    bag: int = 5
    max_iter: int = 50
    max_leaf_nodes: int = 8
    min_samples_leaf: int = 50
    condition: str = "cond"


def scores(evidence: Evidence, options: Options, calibration: Calibration) -> dict[str, np.ndarray]:
    """Minus the residual, variant `q<quantile>@<t>`; calibration rows out of fold."""
    block = "secmi-null" if options.condition == "null" else "secmi"
    error = evidence.losses(block, "latent_error", [options.timestep]).mean(axis=(1, 2))
    error = np.log(np.maximum(error, np.finfo(np.float64).tiny))
    residual = _Residual(difficulty(evidence), error, calibration.member, calibration.seed, options)
    variant = f"q{100 * options.quantile:02.0f}@{options.timestep:03d}"
    return {variant: calibration.out_of_fold(options.name, residual)}


def difficulty(evidence: Evidence) -> np.ndarray:
    """Of each latent, float64[n, C + 1]: log energy by channel, and the share of it in low frequencies."""
    bands = evidence.bands("clean", evidence.timesteps("clean")[:1])[:, 0, 0]
    energy = np.maximum(bands[:, :-1], np.finfo(np.float64).tiny)
    return np.column_stack([np.log(energy), bands[:, -1] / energy.sum(axis=1)])


@dataclasses.dataclass(frozen=True)
class _Residual:
    x: np.ndarray
    error: np.ndarray
    member: np.ndarray
    seed: int
    options: Options

    def __call__(self, train: np.ndarray) -> Predictor:
        from sklearn.ensemble import HistGradientBoostingRegressor

        rows, o = train[~self.member[train]], self.options
        models = []
        for index in range(o.bag):
            picked = rng.stream(self.seed, o.name, index, "bag").integers(len(rows), size=len(rows))
            model = HistGradientBoostingRegressor(
                loss="quantile", quantile=o.quantile, max_iter=o.max_iter, max_leaf_nodes=o.max_leaf_nodes,
                min_samples_leaf=min(o.min_samples_leaf, max(len(rows) // 4, 1)), random_state=self.seed,
                early_stopping=False,
            )  # fmt: skip
            models.append(model.fit(self.x[rows[picked]], self.error[rows[picked]]))
        return lambda scored: np.mean([m.predict(self.x[scored]) for m in models], axis=0) - self.error[scored]
