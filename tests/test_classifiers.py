"""`mia.classifiers` against GridSearchCV nested by hand, and its promises about labels, groups, order and work."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from threadpoolctl import threadpool_limits

from mia import classifiers, metrics, rng
from mia.classifiers import LEARNERS, Fitted, fitted
from mia.config import ScoresOptions
from mia.errors import UserError

SMALL = ScoresOptions(folds=3, trees=(3, 10), max_depths=(2, 4))
POPULATION = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def small_boosting_on_one_thread(monkeypatch):
    grid = {"learning_rate": (0.1, 0.3), "max_iter": (5, 20), "max_leaf_nodes": (4, 8)}
    monkeypatch.setattr(classifiers, "BOOSTING", grid)
    with threadpool_limits(1):  # for the twin; ours sees to it itself
        yield


def population(n: int = 180, columns: int = 5, signal: float = 0.7, seed: int = 0, share: float = 2 / 3) -> POPULATION:
    """x, member, group, known: groups of two with one label, members higher in the first two columns.

    Without a signal the neural net gives up early: quicker where what is learnt does not matter.
    """
    generator = np.random.default_rng(seed)
    member = np.repeat(generator.permutation(n // 2) % 2 == 0, 2)
    known = np.repeat(generator.permutation(n // 2) < share * n / 2, 2)
    x = generator.normal(size=(n, columns)) * 10.0 ** np.arange(columns)
    x[member, 0] += 2 * signal
    x[member, 1] += 10 * signal
    return x, member, np.array([f"g{i // 2:03d}" for i in range(n)]), known


# The twin


def naive_estimator(learner: str, standardize: bool, seed: int) -> Pipeline:
    models = {
        "logistic_regression": LogisticRegression(max_iter=1000 if standardize else 100),
        "decision_tree": DecisionTreeClassifier(random_state=seed),
        "random_forest": RandomForestClassifier(random_state=seed),
        "neural_net": classifiers.network(seed),  # held against the paper's loop on its own, below
        "boosting": HistGradientBoostingClassifier(random_state=seed, early_stopping=False),
    }
    scaled = standardize and learner in ("logistic_regression", "neural_net")
    return Pipeline([("scale", StandardScaler() if scaled else "passthrough"), ("model", models[learner])])


def naive_grid(learner: str, options: ScoresOptions) -> dict[str, list]:
    grids: dict[str, dict] = {
        "logistic_regression": {"C": [0.01, 0.1, 1.0, 10.0, 100.0]},
        "decision_tree": {"max_depth": options.max_depths, "min_samples_split": [2, 8, 16]},
        "random_forest": {"n_estimators": options.trees, "max_depth": options.max_depths},
        "neural_net": {},
        "boosting": classifiers.BOOSTING,
    }
    return {f"model__{name}": list(values) for name, values in grids[learner].items()}


def by_auc(model, x, y) -> float:
    """Exact, so that equals are equal: scikit-learn's trapezoids tell them apart by their rounding."""
    return metrics.auc(model.predict_proba(x)[:, 1], y)


def searched(learner: str, x, y, splits: list, options: ScoresOptions, seed: int):
    """Every grid point fitted from scratch in every split; what has no grid is fitted once, in favour of the twin."""
    model, grid = naive_estimator(learner, options.standardize, seed), naive_grid(learner, options)
    return GridSearchCV(model, grid, scoring=by_auc, cv=splits).fit(x, y) if grid else clone(model).fit(x, y)


def naive(learner: str, x, member, group, known, options: ScoresOptions, seed: int) -> Fitted:
    """The same nested cross-validation, nothing shared."""
    rows, rest = np.flatnonzero(known), np.flatnonzero(~known)
    y, folds = member[rows], rng.folds(options.folds, member[rows], group[rows], seed, "scores.folds")
    score = np.empty(len(x))
    for i, (train, test) in enumerate(folds):
        masks = [np.isin(train, other) for j, (_, other) in enumerate(folds) if j != i]
        inner = [(np.flatnonzero(~mask), np.flatnonzero(mask)) for mask in masks]
        model = searched(learner, x[rows[train]], y[train], inner, options, seed)
        score[rows[test]] = model.predict_proba(x[rows[test]])[:, 1]
    final = searched(learner, x[rows], y, folds, options, seed)
    if len(rest):
        score[rest] = final.predict_proba(x[rest])[:, 1]
    chosen = {name.removeprefix("model__"): value for name, value in getattr(final, "best_params_", {}).items()}
    return Fitted(score, chosen, by_auc(final, x[rows], y), metrics.auc(score[rows], y))


def assert_same(one: Fitted, other: Fitted) -> None:
    np.testing.assert_array_equal(one.score, other.score)
    assert (one.chosen, one.train_auc, one.out_of_fold_auc) == (other.chosen, other.train_auc, other.out_of_fold_auc)


@pytest.mark.parametrize(
    ("learner", "folds", "share"), [(name, 3, 2 / 3) for name in LEARNERS] + [(name, 4, 1.0) for name in LEARNERS[:3]]
)
def test_answers_are_those_of_the_naive_nested_search_to_the_bit(learner, folds, share):
    options = ScoresOptions(folds=folds, trees=(3, 10), max_depths=(2, 4))
    people = population(n=132, share=share, seed=folds)
    found = fitted(learner, *people, options, seed=7)
    assert found.score.dtype == np.float64 and found.score.min() >= 0 and found.score.max() <= 1
    assert_same(found, naive(learner, *people, options, seed=7))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("learner", ["logistic_regression", "neural_net"])
def test_without_standardizing_the_twin_is_the_paper_s(learner):
    options = ScoresOptions(folds=3, standardize=False)
    found = fitted(learner, *population(n=120), options, seed=7)
    assert_same(found, naive(learner, *population(n=120), options, seed=7))
    assert (found.score != fitted(learner, *population(n=120), SMALL, seed=7).score).any()


@pytest.mark.parametrize("learner", ["logistic_regression", "decision_tree", "random_forest", "boosting"])
def test_the_scale_of_a_column_is_of_no_account(learner):
    """By powers of two, which round nothing, and not too small: to a tree, values 1e-7 apart are equal."""
    x, *rest = population()
    scaled = x * 2.0 ** np.array([-3, 3, 20, 0, 1])
    assert_same(fitted(learner, scaled, *rest, SMALL, seed=0), fitted(learner, x, *rest, SMALL, seed=0))


def test_a_tie_goes_to_the_first_grid_point():
    """A column that gives the label away makes every point perfect."""
    x, member, group, known = population()
    x[:, 0] = member
    found = {learner: fitted(learner, x, member, group, known, SMALL, 0).chosen for learner in LEARNERS[:2]}
    assert found == {"logistic_regression": {"C": 0.01}, "decision_tree": {"max_depth": 2, "min_samples_split": 2}}


def test_the_net_is_trained_until_its_first_bad_epoch_and_keeps_the_weights_before_it():
    x, member, *_ = population(n=200, signal=1.0)
    x = StandardScaler().fit_transform(x)
    net = classifiers.network(3).fit(x, member)
    train_x, held_x, train_y, held_y = train_test_split(x, member, test_size=0.2, stratify=member, random_state=3)
    model = MLPClassifier(
        (10,), solver="adam", activation="relu", alpha=0, batch_size=32, learning_rate_init=0.001,
        random_state=np.random.RandomState(3),
    )  # fmt: skip
    losses, weights = [], []
    for _ in range(100):
        model.partial_fit(train_x, train_y, classes=[False, True])
        losses.append(log_loss(held_y, model.predict_proba(held_x)[:, 1]))
        weights.append(copy.deepcopy(model.coefs_ + model.intercepts_))
    bad = next((i for i in range(1, 100) if losses[i] >= losses[i - 1]), 100)
    assert 1 < bad < 100, "the case must show an early stop"
    for ours, theirs in zip(net.coefs_ + net.intercepts_, weights[bad - 1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


# Labels, groups, order


@pytest.mark.parametrize("learner", LEARNERS)
def test_labels_outside_calibration_are_never_read(learner):
    x, member, group, known = population(signal=0.0)
    found = fitted(learner, x, member | ~known, group, known, SMALL, seed=0)
    hidden = np.array([bool(m) if k else None for m, k in zip(member, known, strict=True)], dtype=object)
    assert_same(found, fitted(learner, x, hidden, group, known, SMALL, seed=0))


@pytest.mark.parametrize("learner", LEARNERS)
def test_no_label_of_a_fold_touches_a_score_in_it(learner, monkeypatch):
    """Not even by way of the hyperparameters. Folds are held fixed, since they are stratified by label."""
    x, member, group, known = population(signal=0.0)
    folds = rng.folds(3, member[known], group[known], 0, "scores.folds")
    monkeypatch.setattr(rng, "folds", lambda *_: folds)
    before = fitted(learner, x, member, group, known, SMALL, seed=0).score
    test = np.flatnonzero(known)[folds[1][1]]
    member = member.copy()
    member[test] = ~member[test]
    after = fitted(learner, x, member, group, known, SMALL, seed=0).score
    np.testing.assert_array_equal(after[test], before[test])
    others = np.setdiff1d(np.arange(len(x)), test)
    assert (after[others] != before[others]).any()


@pytest.mark.parametrize("learner", ["random_forest", "boosting"])
def test_groups_are_never_split(learner):
    """Columns say which group a row is of and nothing else: only whoever has seen the group knows its label."""
    generator = np.random.default_rng(0)
    whose = np.repeat(np.arange(60), 4)
    member = (generator.permutation(60) % 2 == 0)[whose]
    x = generator.normal(size=(60, 3))[whose]
    options, all_known = ScoresOptions(folds=3, trees=(30,), max_depths=(16,)), np.ones(240, dtype=bool)
    whole = fitted(learner, x, member, whose.astype(str), all_known, options, seed=0)
    split = fitted(learner, x, member, np.arange(240).astype(str), all_known, options, seed=0)
    assert 0.3 < whole.out_of_fold_auc < 0.7 and split.out_of_fold_auc > 0.85


def test_order_of_rows():
    """A tree does not depend on it, nor do the folds. The others sum or draw row by row: callers sort."""
    x, member, group, known = population()
    order = np.random.default_rng(0).permutation(len(x))
    found = fitted("decision_tree", x, member, group, known, SMALL, seed=0)
    moved = fitted("decision_tree", x[order], member[order], group[order], known[order], SMALL, seed=0)
    np.testing.assert_array_equal(moved.score, found.score[order])
    assert moved.chosen == found.chosen


@pytest.mark.parametrize("learner", LEARNERS)
def test_two_workers_change_nothing_but_another_seed_does(learner):
    people = population(n=120, signal=0.0)
    found = fitted(learner, *people, SMALL, seed=5)
    assert_same(found, fitted(learner, *people, SMALL, seed=5, workers=2))
    if learner == "random_forest":
        assert (found.score != fitted(learner, *people, SMALL, seed=6).score).any()


# What it learns


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_clear_signal_is_found_and_carried_over(learner):
    options = ScoresOptions(folds=3, trees=(30,), max_depths=(2, 4))
    x, member, group, known = population(n=400, signal=1.2, share=0.5)
    found = fitted(learner, x, member, group, known, options, seed=0)
    assert found.out_of_fold_auc > 0.8 and metrics.auc(found.score[~known], member[~known]) > 0.8
    assert found.out_of_fold_auc == metrics.auc(found.score[known], member[known])


def test_a_forest_knows_noise_by_heart_and_nothing_about_it():
    options = ScoresOptions(folds=3, trees=(30,), max_depths=(16,))
    runs = [fitted("random_forest", *population(signal=0.0, seed=s), options, seed=s) for s in range(4)]
    assert all(run.train_auc > 0.99 for run in runs)
    assert 0.4 < np.mean([run.out_of_fold_auc for run in runs]) < 0.6


# Work


@pytest.mark.parametrize(
    ("learner", "families"),
    [("logistic_regression", 5), ("decision_tree", 6), ("random_forest", 2), ("boosting", 4), ("neural_net", 1)],
)
def test_each_model_is_fitted_once(learner, families, monkeypatch):
    """K(K-1)/2 + K fits for each family of grid points and a last one; the net, with no choice, needs no inner fold."""
    fits, made = [], classifiers.estimator

    def counting(name, point, *rest):
        model = made(name, point, *rest)
        fit = model.fit
        model.fit = lambda x, y: fits.append((tuple(point.items()), x.tobytes())) or fit(x, y)
        return model

    monkeypatch.setattr(classifiers, "estimator", counting)
    found = fitted(learner, *population(signal=0.0), ScoresOptions(folds=4, trees=(3, 10), max_depths=(2, 4)), seed=0)
    pairs = 0 if learner == "neural_net" else 6
    assert len(fits) == (pairs + 4) * families + 1 == len(set(fits))
    assert fits[-1][0] == tuple(found.chosen.items())
    longest = {"random_forest": ("n_estimators", 10), "boosting": ("max_iter", 20)}
    assert all(longest[learner] in point for point, _ in fits[:-1]) if learner in longest else True


# Bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learner": "svm"}, ("unknown learner 'svm'", "logistic_regression", "boosting")),
        ({"known": np.arange(180) < 49}, ("49 labelled samples", "random_forest", "50 are needed")),
        ({"member": np.ones(180, dtype=bool)}, ("all labelled samples are members", "bring both kinds")),
        ({"member": np.zeros(180, dtype=bool)}, ("all labelled samples are non-members",)),
        ({"options": ScoresOptions(folds=2)}, ("2 folds", "scores.folds", "use 3 or more")),
        ({"group": np.array(["a", "b"] * 90)}, ("2 groups for 3 folds", "scores.folds")),
        ({"bad": np.nan}, ("column 2", "not finite")),
        ({"bad": -np.inf}, ("column 2", "not finite")),
        ({"bad": 1e39}, ("column 2", "not finite")),
    ],
)
def test_what_cannot_be_fitted_is_said_in_a_line(changes, words):
    x, member, group, known = population()
    x[17, 2] = changes.pop("bad", 0.0)
    given = {"learner": "random_forest", "member": member, "group": group, "known": known, "options": SMALL} | changes
    with pytest.raises(UserError) as problem:
        fitted(x=x, seed=0, **given)
    assert all(word in str(problem.value) for word in words) and "\n" not in str(problem.value)


def test_a_fold_of_one_class_is_refused(monkeypatch):
    x, member, group, known = population(share=1.0)
    order = np.argsort(member, kind="stable")
    parts = np.array_split(order, 3)
    monkeypatch.setattr(rng, "folds", lambda *_: [(np.setdiff1d(order, part), part) for part in parts])
    with pytest.raises(UserError, match="one class only, scores.folds"):
        fitted("decision_tree", x, member, group, known, SMALL, seed=0)
