"""What is fitted: on the calibration part alone, and for its own rows out of fold, groups of near-duplicates whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import polars as pl

from mia import classifiers, rng
from mia.config import ScoresOptions
from mia.errors import UserError

Predictor = Callable[[np.ndarray], np.ndarray]  # row numbers -> float64 scores
Fit = Callable[[np.ndarray], Predictor]  # row numbers to fit on -> predictor


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Labels of the calibration part beside the rows of an `Evidence`.

    Attributes:
        member: bool[n]; False, and never read, where not `known`.
        group: str[n], near-duplicates.
        known: bool[n], the calibration part.
        options: Folds, scaling and grids of the learners.
        seed: Of folds and learners.
        workers: Processes to fit in; changes no answer.
    """

    member: np.ndarray
    group: np.ndarray
    known: np.ndarray
    options: ScoresOptions
    seed: int = 0
    workers: int = 1

    @classmethod
    def of(
        cls, ids: np.ndarray, labels: pl.DataFrame, options: ScoresOptions, seed: int = 0, workers: int = 1
    ) -> Calibration:
        """From a table of sample_id, group and `member`, which is null in the test part."""
        rows = pl.DataFrame({"sample_id": ids.tolist()}, schema={"sample_id": pl.String})
        rows = rows.join(labels, on="sample_id", how="left", maintain_order="left")
        known = rows["member"].is_not_null().to_numpy()
        group = rows["group"].fill_null(rows["sample_id"]).to_numpy()
        return cls(rows["member"].fill_null(False).to_numpy(), group, known, options, seed, workers)

    def check(self, name: str) -> None:
        """Nothing where attack `name` can be fitted.

        Raises:
            UserError: fewer labelled samples than `classifiers.FEWEST`, or of one kind only.
        """
        where, count = f"scores.attacks: {name}", int(self.known.sum())
        if count < classifiers.FEWEST:
            raise UserError(f"{count} labelled samples", where, f"{classifiers.FEWEST} are needed: bring more")
        if len(np.unique(self.member[self.known])) < 2:
            only = "members" if self.member[self.known].any() else "non-members"
            raise UserError(f"all labelled samples are {only}", where, "bring both kinds")

    def out_of_fold(self, name: str, fit: Fit) -> np.ndarray:
        """Scores float64[n]: of a calibration row by the fit on the other folds, of another row by the fit on all.

        Raises:
            UserError: as `check`, or a fold has one class only.
        """
        self.check(name)
        rows, rest = np.flatnonzero(self.known), np.flatnonzero(~self.known)
        split = rng.folds(self.options.folds, self.member[rows], self.group[rows], self.seed, "scores.folds")
        jobs = [(fit, rows[train], rows[test]) for train, test in split] + [(fit, rows, rest)]
        out = np.empty(len(self.known))
        for (_, _, scored), answer in zip(jobs, self._run(jobs), strict=True):
            out[scored] = answer
        return out

    def classified(self, name: str, x: np.ndarray, make: Callable[[int], object]) -> np.ndarray:
        """Probability of a member, float64[n], out of fold, by a scikit-learn classifier with nothing to choose.

        Args:
            name: The attack's, for errors.
            x: float[n, k], finite.
            make: The unfitted classifier from a seed.
        """
        return self.out_of_fold(name, _Classified(x, self.member, make, self.seed))

    def _run(self, jobs: list[tuple]) -> list[np.ndarray]:
        from joblib import Parallel, delayed, parallel_config
        from threadpoolctl import threadpool_limits

        # One thread each, since sums of floats depend on how many threads share them.
        with threadpool_limits(1), parallel_config("loky", n_jobs=self.workers, inner_max_num_threads=1):
            return Parallel()(delayed(_fit_and_apply)(*job) for job in jobs)


@dataclasses.dataclass(frozen=True)
class _Classified:
    x: np.ndarray
    member: np.ndarray
    make: Callable[[int], object]
    seed: int

    def __call__(self, train: np.ndarray) -> Predictor:
        model = self.make(self.seed).fit(self.x[train], self.member[train])  # type: ignore[attr-defined]
        return lambda rows: model.predict_proba(self.x[rows])[:, 1]


def _fit_and_apply(fit: Fit, train: np.ndarray, scored: np.ndarray) -> np.ndarray:
    predictor = fit(train)
    return predictor(scored) if len(scored) else np.empty(0)
