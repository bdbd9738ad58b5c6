"""CLiD (arXiv 2405.14800): a member's loss rises more when its caption is cut or taken away.

L(c*) = mean over t = 441, 451, 461 of MSE(e(z_t, t, c*), eps), the same noise for every condition; D_k = L(c*_k) - L(c)
for three reduced captions and the empty prompt. Threshold form: (1 - alpha) S(L(c)) + alpha S(-mean_k D_k), low =
member, so s is minus that; S = (x - median) / (third - first quartile). Vector form: boosted trees on (L(c), D_1, ...,
D_4). `clid_null` has the empty prompt alone.

S and alpha (of 0, .1, ..., 1, by AUC) are the authors' shadow model's; here the calibration part's, both out of fold
for its own rows. Their trees are XGBoost's: 20, depth 3, rate .3, subsample and columns .7, and gamma .7, which
scikit-learn's do not have. Official t: 440, 450, 460. Confounder: every D is the effect of the caption, and captions of
the two sides differ.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mia import metrics
from mia.attacks.calibration import Calibration, Predictor
from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """`form`: threshold or vector; `prompts`: blocks of reduced captions; one draw, as the authors."""

    name: str = "clid"
    form: str = "threshold"
    prompts: tuple[str, ...] = ("prompt-1", "prompt-2", "prompt-3")
    timesteps: tuple[int, ...] = (441, 451, 461)
    alphas: tuple[float, ...] = tuple(i / 10 for i in range(11))


def scores(evidence: Evidence, options: Options, calibration: Calibration) -> dict[str, np.ndarray]:
    """The threshold form's score, or the probability of a member by the trees, as variant `<form>`."""
    calibration.check(options.name)
    evidence.need_null("noised", options.name)
    loss, rises = losses(evidence, options)
    if options.form == "vector":
        x = np.column_stack([loss, rises])
        return {"vector": calibration.classified(options.name, x, trees)}
    fit = _Alpha(np.stack([loss, -rises.mean(axis=1)]), calibration.member, options.alphas)
    return {"threshold": calibration.out_of_fold(options.name, fit)}


def losses(evidence: Evidence, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """L(c), float64[n], and D_k for each reduced caption and last the empty prompt, float64[n, K]."""
    steps = options.timesteps

    def mean(block: str, condition: str) -> np.ndarray:
        return evidence.distance(block, condition, "eps", steps)[:, :, 0].mean(axis=1) / evidence.elements

    loss = mean("noised", "cond")
    others = [mean(block, "cond") for block in options.prompts] + [mean("noised", "null")]
    return loss, np.stack([other - loss for other in others], axis=1)


def scaled(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """`x` by the median and quartiles of its rows `train`."""
    low, median, high = np.quantile(x[train], [0.25, 0.5, 0.75])
    return (x - median) / (high - low if high > low else 1.0)


def trees(seed: int) -> Any:
    """The boosted trees of the vector form, unfitted."""
    from sklearn.ensemble import GradientBoostingClassifier

    return GradientBoostingClassifier(
        n_estimators=20, max_depth=3, learning_rate=0.3, subsample=0.7, max_features=0.7, random_state=seed
    )


@dataclasses.dataclass(frozen=True)
class _Alpha:
    """Scales both parts, and chooses alpha by AUC, on the rows given; the first of equals."""

    parts: np.ndarray
    member: np.ndarray
    alphas: tuple[float, ...]

    def __call__(self, train: np.ndarray) -> Predictor:
        loss, fall = (scaled(part, train) for part in self.parts)
        mixed = [-((1 - a) * loss + a * fall) for a in self.alphas]
        aucs = [metrics.auc(score[train], self.member[train]) for score in mixed]
        best = mixed[int(np.argmax(aucs))]
        return lambda rows: best[rows]
