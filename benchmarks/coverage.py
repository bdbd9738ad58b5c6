"""How often 95 % intervals of the TPR at a rate hold the truth: ours, against the usual multinomial bootstrap.

Gaussian scores, members shifted; the truth is the normal distribution's. Prints the shares that `docs/methods.md` and
`mia/resampling.py` speak of.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from mia import metrics, resampling

SIMULATIONS, RESAMPLES, TARGET = 500, 400, 0.01


def multinomial(score: np.ndarray, member: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """TPR in resamples drawn with replacement from either side, each measured as if it were the sample."""
    inside, outside = score[member], -np.sort(-score[~member])
    most = int(metrics.allowed(TARGET, len(outside)))
    out = np.empty(RESAMPLES)
    for row in range(RESAMPLES):
        bar = -np.sort(-generator.choice(outside, len(outside)))[most]
        out[row] = (generator.choice(inside, len(inside)) > bar).mean()
    return out


def main() -> None:
    """One line for each size and shift."""
    for n in (200, 1000):
        for shift in (0.0, 0.5, 1.0, 2.0):
            truth, held = norm.cdf(shift - norm.isf(TARGET)), np.zeros(2)
            for seed in range(SIMULATIONS):
                generator = np.random.default_rng((n, seed))
                member = np.arange(2 * n) < n
                score = generator.normal(size=2 * n) + shift * member
                ours = resampling.bootstrap(score[:, None], member, np.arange(2 * n), (TARGET,), RESAMPLES, generator)[
                    :, 0, 1
                ]
                for place, values in enumerate((ours, multinomial(score, member, generator))):
                    low, high = np.quantile(values, [0.025, 0.975])
                    held[place] += low <= truth <= high
            ours_held, usual = held / SIMULATIONS
            print(f"{n} + {n}, shift {shift:g}, true TPR {truth:.3f}: ours {ours_held:.3f}, multinomial {usual:.3f}")


if __name__ == "__main__":
    main()
