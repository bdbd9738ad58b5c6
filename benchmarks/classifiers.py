"""CPU time of the classifiers against a twin that fits every grid point from scratch, and gets the same answers.

The twin is the tests': GridSearchCV nested in the same folds, for every learner. It scores as cheaply as we do, and
does without inner folds for the neural net, which has no grid. Prints CPU seconds (user and system) and ratios, ours to
the twin's; the run fails unless both give every score to the bit.
"""

from __future__ import annotations

import logging
import time

import numpy as np
from threadpoolctl import threadpool_limits

from mia.classifiers import LEARNERS, fitted
from mia.config import ScoresOptions
from tests.test_classifiers import assert_same, naive, population

ROWS, COLUMNS = 600, 78  # the paper's partial settings: 26 timesteps, three losses
OPTIONS = ScoresOptions(trees=(10, 100, 300))

log = logging.getLogger("bench")


def compared(learner: str) -> tuple[float, float]:
    """CPU seconds of `fitted` with one worker, and of the twin."""
    x, *rest = population(ROWS, COLUMNS, signal=0.5, share=0.5)
    x /= x.std(axis=0)
    start = time.process_time()
    ours = fitted(learner, x, *rest, OPTIONS, seed=0)
    middle = time.process_time()
    twin = naive(learner, x, *rest, OPTIONS, seed=0)
    end = time.process_time()
    assert_same(ours, twin)
    return middle - start, end - middle


def main() -> None:
    """Print the table."""
    line = "%-20s ours %6.2f s, from scratch %6.2f s, ratio %.2f"
    with threadpool_limits(1):
        fitted("boosting", *population(), ScoresOptions(folds=3), seed=0)  # imports and first calls
        times = np.array([compared(learner) for learner in LEARNERS])
    for learner, (ours, twin) in zip(LEARNERS, times, strict=True):
        log.info(line, learner, ours, twin, ours / twin)
    ours, twin = times.sum(axis=0)
    log.info(line, "all", ours, twin, ours / twin)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
