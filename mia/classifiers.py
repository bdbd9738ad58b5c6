"""Supervised attacks: five learners, hyperparameters chosen in nested folds, no group ever split.

A calibration row's score comes from a fit, and a choice of hyperparameters, that saw no label of its outer fold. The
inner folds of an outer fold are the other outer folds, which lets fits be shared without changing any answer:

- a fit on all but folds i and j serves outer fold i, tested on j, and outer fold j, tested on i;
- a fit on all but fold i is outer fold i's refit and also chooses the final fit's hyperparameters;
- a forest or a boosted sum of n trees is the beginning of the longer one with the same seed, so only the longest is
  fitted.

Answers do not depend on `workers`. Rows are summed and drawn in the order given, so callers sort them first.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mia import metrics, rng
from mia.config import ScoresOptions
from mia.errors import UserError

LEARNERS = ("logistic_regression", "decision_tree", "random_forest", "neural_net", "boosting")
FEWEST = 50  # labelled rows
# What a longer fit of the same learner holds as its beginning.
PREFIX = {"random_forest": "n_estimators", "boosting": "max_iter"}
# Ours: the paper has no boosting.
BOOSTING: dict[str, tuple] = {"learning_rate": (0.03, 0.1), "max_iter": (50, 100, 200, 400), "max_leaf_nodes": (4, 16)}


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What one learner says of n rows; the gap between its two AUCs is what it knows by heart.

    Attributes:
        score: float64[n], probability of a member. Calibration rows out of fold, others from the fit on calibration.
        chosen: Hyperparameters of the final fit; empty where the learner has none to choose.
        train_auc: AUC of the final fit on the very rows it was fitted on.
        out_of_fold_auc: AUC of the calibration rows' scores, folds pooled.
    """

    score: np.ndarray
    chosen: dict[str, Any]
    train_auc: float
    out_of_fold_auc: float

    def gap(self, learner: str) -> str:
        """The two AUCs, and the hyperparameters chosen, as one line for the log."""
        chosen = ", ".join(f"{name} {value}" for name, value in self.chosen.items())
        auc = f"AUC {self.train_auc:.3f} on the rows fitted on, {self.out_of_fold_auc:.3f} out of fold"
        return f"{learner}{f' ({chosen})' if chosen else ''}: {auc}"


def fitted(
    learner: str,
    x: np.ndarray,
    member: np.ndarray,
    group: np.ndarray,
    known: np.ndarray,
    options: ScoresOptions,
    seed: int,
    workers: int = 1,
) -> Fitted:
    """Choose, fit and apply one of `LEARNERS`: the same answers as GridSearchCV nested in these folds, for less work.

    The grid point with the best mean AUC over inner folds is taken, the first of equals in ParameterGrid's order.

    Args:
        x: float64[n, k], finite.
        member: bool[n]; read where `known` only, elsewhere it may be anything.
        group: str[n]; folds keep groups whole.
        known: bool[n], calibration rows. Where all are known, all scores are out of fold.
        workers: processes to fit in, each with one thread.

    Raises:
        UserError: an unknown learner, fewer than three folds, too few labelled rows, one class only (in all, or in a
            fold), a value that is not finite.

    Source: `classifiers_evaluation.py` of arXiv 2306.12983, with groups kept whole and nothing chosen on test.
    """
    from sklearn.model_selection import ParameterGrid

    labels = _checked(learner, x, member, known, options)
    rows, rest = np.flatnonzero(known), np.flatnonzero(~known)
    folds = _folds(rows, labels, group, options.folds, seed)
    points = list(ParameterGrid(grid(learner, options)))
    task = _Task(learner, x, labels, options.standardize, seed)
    found = _shared(task, points, folds, workers)
    aucs = {at: np.array([metrics.auc(row, labels[folds[at[1]]]) for row in p]) for at, p in found.items()}

    score = np.empty(len(x))
    for i, fold in enumerate(folds):
        inner: list[Test] = [((min(i, j), max(i, j)), j) for j in range(len(folds)) if j != i]
        score[fold] = found[(i,), i][_best(aucs, inner, len(points))]
    best = points[_best(aucs, [((i,), i) for i in range(len(folds))], len(points))]
    [train, *others] = _run([(task, [best], rows, [rows, rest] if len(rest) else [rows])], 1)[0]
    if others:
        score[rest] = others[0][0]
    return Fitted(score, best, metrics.auc(train[0], labels[rows]), metrics.auc(score[rows], labels[rows]))


def grid(learner: str, options: ScoresOptions) -> dict[str, tuple]:
    """Hyperparameters to choose among, by the names of scikit-learn. Source: arXiv 2306.12983, except boosting's."""
    grids: dict[str, dict[str, tuple]] = {
        "logistic_regression": {"C": (0.01, 0.1, 1.0, 10.0, 100.0)},
        "decision_tree": {"max_depth": options.max_depths, "min_samples_split": (2, 8, 16)},
        "random_forest": {"max_depth": options.max_depths, "n_estimators": options.trees},
        "neural_net": {},
        "boosting": BOOSTING,
    }
    return grids[learner]


def estimator(learner: str, point: Mapping[str, Any], standardize: bool, seed: int) -> Any:
    """The unfitted scikit-learn estimator of a grid point, scaler included.

    Without `standardize` logistic regression is the paper's, which stops at 100 steps before it has converged.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.tree import DecisionTreeClassifier

    if learner == "decision_tree":
        return DecisionTreeClassifier(random_state=seed, **point)
    if learner == "random_forest":
        return RandomForestClassifier(random_state=seed, n_jobs=1, **point)
    if learner == "boosting":
        return HistGradientBoostingClassifier(random_state=seed, early_stopping=False, **point)
    if learner == "neural_net":
        model = network(seed)
    else:
        model = LogisticRegression(max_iter=1000 if standardize else 100, **point)
    return make_pipeline(StandardScaler(), model) if standardize else model


def network(seed: int) -> Any:
    """The paper's neural net as a scikit-learn estimator, to be fitted once: 10 rectified units, Adam, batches of 32.

    A fifth of the rows is held out, and the first of at most 100 epochs that does not lower their loss ends training.
    The weights before that epoch are kept; the paper means to, but scores the weights after it (`attacks.md` 1.6).
    """
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier

    class Network(MLPClassifier):
        # Its own early stopping watches accuracy, and waits for a second bad epoch.
        def fit(self, X: np.ndarray, y: np.ndarray) -> Any:
            x, held_x, y, held_y = train_test_split(X, y, test_size=0.2, stratify=y, random_state=seed)
            self.batch_size = min(32, len(x))
            least = np.inf
            for _ in range(100):
                self.partial_fit(x, y, classes=[False, True])
                said = self.predict_proba(held_x)[np.arange(len(held_y)), held_y.astype(int)]
                loss = -np.log(said.clip(1e-15)).mean()
                if loss >= least:
                    break
                least, best = loss, copy.deepcopy(self.__dict__)
            self.__dict__.update(best)
            return self

    # A generator, not a number: partial_fit would start from the number, and shuffle alike, in every epoch.
    return Network((10,), alpha=0.0, learning_rate_init=1e-3, random_state=np.random.RandomState(seed))


def _checked(learner: str, x: np.ndarray, member: np.ndarray, known: np.ndarray, options: ScoresOptions) -> np.ndarray:
    """Labels, bool[n], False wherever they are unknown."""
    if learner not in LEARNERS:
        raise UserError(f"unknown learner '{learner}'", "scores.attacks", f"use one of {list(LEARNERS)}")
    where = f"scores.attacks: {learner}"
    if options.folds < 3:
        raise UserError(f"{options.folds} folds leave none to choose within", "scores.folds", "use 3 or more")
    if known.sum() < FEWEST:
        raise UserError(f"{known.sum()} labelled samples", where, f"{FEWEST} are needed: bring more")
    labels = np.zeros(len(x), dtype=bool)
    labels[known] = member[known]
    if len(np.unique(labels[known])) < 2:
        only = "members" if labels.any() else "non-members"
        raise UserError(f"all labelled samples are {only}", where, "bring both kinds")
    # Trees compute in float32, to which a larger float64 is infinite; NaN compares false.
    bad = np.flatnonzero(~(np.abs(x) <= np.finfo(np.float32).max).all(axis=0))
    if len(bad):
        raise UserError(f"column {bad[0]} holds a number that is not finite", where, "mend it or leave it out")
    return labels


def _folds(rows: np.ndarray, labels: np.ndarray, group: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each fold, ascending."""
    folds = [rows[test] for _, test in rng.folds(count, labels[rows], group[rows], seed, "scores.folds")]
    if any(len(np.unique(labels[fold])) < 2 for fold in folds):
        raise UserError("a fold got one class only", "scores.folds", "lower it, or bring more samples")
    return folds


@dataclasses.dataclass(frozen=True)
class _Task:
    """What all fits of one call have in common."""

    learner: str
    x: np.ndarray
    labels: np.ndarray
    standardize: bool
    seed: int


Test = tuple[tuple[int, ...], int]  # folds left out of a fit, and the one of them it is tested on


def _shared(task: _Task, points: list[dict], folds: list[np.ndarray], workers: int) -> dict[Test, np.ndarray]:
    """Probabilities float64[points, len(fold)] of every test that outer, inner and final choices need."""
    jobs, places = [], []
    left_out: list[tuple[int, ...]] = [(i,) for i in range(len(folds))]
    if len(points) > 1:  # else there is nothing to choose within
        left_out += itertools.combinations(range(len(folds)), 2)
    for out, family in itertools.product(left_out, _families(task.learner, points)):
        train = np.sort(np.concatenate([fold for i, fold in enumerate(folds) if i not in out]))
        jobs.append((task, [points[p] for p in family], train, [folds[i] for i in out]))
        places.append((out, family))
    found = {(out, i): np.empty((len(points), len(folds[i]))) for out in left_out for i in out}
    for (out, family), answers in zip(places, _run(jobs, workers), strict=True):
        for i, answer in zip(out, answers, strict=True):
            found[out, i][family] = answer
    return found


def _families(learner: str, points: list[dict]) -> list[list[int]]:
    """Numbers of the grid points that one fit serves, those that differ in length only."""
    families: dict[tuple, list[int]] = {}
    for number, point in enumerate(points):
        rest = tuple(item for item in point.items() if item[0] != PREFIX.get(learner))
        families.setdefault(rest, []).append(number)
    return list(families.values())


def _run(jobs: Sequence[tuple], workers: int) -> list[list[np.ndarray]]:
    """`_probabilities` of each job. One thread each, since sums of floats depend on how many threads share them."""
    from joblib import Parallel, delayed, parallel_config
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), parallel_config("loky", n_jobs=workers, inner_max_num_threads=1):
        return Parallel()(delayed(_probabilities)(*job) for job in jobs)


def _probabilities(task: _Task, family: list[dict], train: np.ndarray, scored: list[np.ndarray]) -> list[np.ndarray]:
    """Fit once on the rows `train`, then float64[family, len(rows)] for each array of rows in `scored`."""
    length = PREFIX.get(task.learner)
    longest = max(family, key=lambda point: point[length]) if length else family[0]
    model = estimator(task.learner, longest, task.standardize, task.seed).fit(task.x[train], task.labels[train])
    if not length:
        return [model.predict_proba(task.x[rows])[None, :, 1] for rows in scored]
    lengths = [point[length] for point in family]
    out = []
    for rows in scored:
        kept = {n: p for n, p in enumerate(_stages(task.learner, model, task.x[rows]), 1) if n in lengths}
        out.append(np.stack([kept[n] for n in lengths]))
    return out


def _stages(learner: str, model: Any, x: np.ndarray) -> Iterator[np.ndarray]:
    """Probabilities, float64[n], after one tree, two trees, ...: to the bit those of a fit that ended there."""
    if learner == "boosting":
        yield from (stage[:, 1] for stage in model.staged_predict_proba(x))
        return
    x, total = x.astype(np.float32), np.zeros(len(x))
    for count, tree in enumerate(model.estimators_, 1):
        total += tree.predict_proba(x, check_input=False)[:, 1]
        yield total / count


def _best(aucs: Mapping[Test, np.ndarray], tests: list[Test], points: int) -> int:
    """The grid point with the best mean AUC over `tests`, the first of equals; a point alone was never tested."""
    return int(np.stack([aucs[test] for test in tests], axis=1).mean(axis=1).argmax()) if points > 1 else 0
