"""What papers fit on labels, in plain scikit-learn calls; nothing of `mia` but the streams that the bag draws from.

Calibration rows are scored by the fit on the other folds, rows of the test part by the fit on all of calibration.
"""

from __future__ import annotations

import copy

import numpy as np
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from sklearn.neural_network import MLPClassifier

from mia import rng


class Recipes:
    """Labels `member`, bool[n], of which those `known` are of calibration, and `group`, str[n]."""

    def __init__(self, member, known, group, folds, seed):
        self.member, self.known, self.group, self.folds, self.seed = member, known, group, folds, seed

    def out_of_fold(self, fit):
        """`fit(train)` gives a score for every row; each row's is taken from the fit that did not see it."""
        rows, out = np.flatnonzero(self.known), np.full(len(self.known), np.nan)
        split = StratifiedGroupKFold(self.folds, shuffle=True, random_state=self.seed)
        for train, test in split.split(rows, self.member[rows], self.group[rows]):
            out[rows[test]] = fit(rows[train])[rows[test]]
        out[~self.known] = fit(rows)[~self.known]
        return out

    def by(self, make, x):
        """Out of fold by a classifier."""
        return self.out_of_fold(lambda train: make().fit(x[train], self.member[train]).predict_proba(x)[:, 1])

    def by_net(self, x):
        """Ten rectified units by Adam in batches of 32; a fifth held out; the weights before the first bad epoch.

        Columns are scaled to mean 0 and variance 1 of the rows fitted on.
        """

        def fit(train):
            mean, spread = x[train].mean(axis=0), x[train].std(axis=0)
            scaled = (x - mean) / np.where(spread == 0, 1, spread)
            a, held, y, held_y = train_test_split(
                scaled[train], self.member[train], test_size=0.2, stratify=self.member[train], random_state=self.seed
            )
            net = MLPClassifier(
                (10,), alpha=0.0, learning_rate_init=1e-3, batch_size=32, random_state=np.random.RandomState(self.seed)
            )
            kept, least = None, np.inf
            for _ in range(100):
                net.partial_fit(a, y, classes=[False, True])
                said = net.predict_proba(held)[:, 1]
                loss = -np.mean([np.log(p if truth else 1 - p) for p, truth in zip(said, held_y, strict=True)])
                if loss >= least:
                    break
                kept, least = copy.deepcopy(net), loss
            return kept.predict_proba(scaled)[:, 1]

        return self.out_of_fold(fit)

    def clid(self, loss, rises):
        """CLiD's threshold form, of L(c), float64[n], and D, float64[n, K]."""

        def fit(train):
            def robust(x):
                low, middle, high = np.percentile(x[train], [25, 50, 75])
                return (x - middle) / (high - low)

            first, second = robust(loss), robust(-np.mean(rises, axis=1))
            best, score = -1.0, None
            for tenth in range(11):
                mixed = -((1 - tenth / 10) * first + tenth / 10 * second)
                reached = area(mixed[train], self.member[train])
                if reached > best + 1e-12:
                    best, score = reached, mixed
            return score

        return self.out_of_fold(fit)

    def clid_trees(self, loss, rises):
        """CLiD's vector form."""

        def make():
            return GradientBoostingClassifier(
                n_estimators=20, max_depth=3, learning_rate=0.3, subsample=0.7, max_features=0.7,
                random_state=self.seed,
            )  # fmt: skip

        return self.by(make, np.column_stack([loss, rises]))

    def secmi_net(self, maps):
        """SecMI-NN on error maps float[n, C, 8, 8], each averaged to 4 x 4."""
        squares = [(y, x) for y in range(0, 8, 2) for x in range(0, 8, 2)]
        return self.by_net(
            np.array([[one[y : y + 2, x : x + 2].mean() for one in m for y, x in squares] for m in maps])
        )

    def below_quantile(self, name, error, z0):
        """Minus log error over the .05 quantile that a bag of five predicts from energy and low frequencies of z0."""
        x = []
        for z in z0:
            energy = [float(np.sum(channel**2)) for channel in z]
            corners = [(c, y, x) for c in range(len(z)) for y in range(0, 8, 2) for x in range(0, 8, 2)]
            low = sum(4 * np.mean(z[c, y : y + 2, x : x + 2]) ** 2 for c, y, x in corners)
            x.append([*np.log(energy), low / sum(energy)])
        x, log_error = np.array(x), np.log(error)

        def fit(train):
            rows = train[~self.member[train]]
            total = np.zeros(len(x))
            for k in range(5):
                some = rows[rng.stream(self.seed, name, k, "bag").integers(len(rows), size=len(rows))]
                trees = HistGradientBoostingRegressor(
                    loss="quantile", quantile=0.05, max_iter=50, max_leaf_nodes=8,
                    min_samples_leaf=min(50, len(rows) // 4), random_state=self.seed, early_stopping=False,
                )  # fmt: skip
                total += trees.fit(x[some], log_error[some]).predict(x) / 5
            return total - log_error

        return self.out_of_fold(fit)


def area(score, member):
    pairs = [(a > b) + (a == b) / 2 for a in score[member] for b in score[~member]]
    return sum(pairs) / len(pairs)
