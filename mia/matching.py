"""Members and non-members whom no blind attacker can tell apart: one-to-one matching, repeated until an audit passes.

A blind attacker sees captions, images or metadata, and no diffusion model. In each round attackers of several kinds are
cross-fitted on what is left, their scores are stacked into one log-odds of being a member, and samples that stand on
the more crowded side of it are thinned at random, a part of the surplus only: after a small step the attackers are
fitted anew, with new folds. Taking the whole surplus at once overshoots, for the surplus holds the attackers' noise as
well as the leak, and an attacker fitted on what is left then ranks held-out members below non-members. The rounds end
when no attacker beats what random labels would give; the rest is paired, one to one, within a caliper.

Thinning a part of the surplus at random, by strata of the propensity that are as fine as the samples allow, is matching
on the propensity score (Rosenbaum and Rubin 1983) done in the small steps of boosting (Friedman 2001).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from mia import blind, metrics, rng
from mia.config import SanitizeOptions
from mia.errors import UserError

log = logging.getLogger(__name__)

FEWEST = 50  # a side; fewer cannot tell a leak from chance
FPR = 0.01
MEMORY = 0.25  # weight of the first round's propensity, the only one that knows the samples dropped since
SURE = 1.645  # standard errors above chance that random labels pass one time in twenty
TAIL_SURE = 2.326  # and one time in a hundred
NO_PARTNER, TELLING = "no partner within the caliper", "too telling of its side"
RARE = 3  # an n-gram that fewer captions share tells nothing


@dataclasses.dataclass(frozen=True)
class View:
    """One kind of what a blind attacker sees: texts; numbers, float64[n, k], named by `names`; or counts, csr[n, k]."""

    name: str
    x: Sequence[str] | np.ndarray | sp.csr_matrix
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Matched:
    """What stays and why.

    Attributes:
        keep: bool[n].
        pair: int64[n], the row of the match on the other side, -1 where dropped.
        reason: object[n], why a row was dropped, None where it was kept.
        rounds: one report for each round, in plain Python types; the last one audits the pairs.
        balance: standardised mean difference of each named feature, before and after.
        passed: whether the last audit found no attacker above chance.
        caliper: within which they were paired: that of the options, or wider where it left fewer than `min_keep`.
    """

    keep: np.ndarray
    pair: np.ndarray
    reason: np.ndarray
    rounds: list[dict]
    balance: list[dict]
    passed: bool
    caliper: float


@dataclasses.dataclass(frozen=True)
class First:
    """The first round's scores float64[n, k], folds int64[n], and log-odds float64[n]: 0 where a row was not in it."""

    scores: np.ndarray
    fold: np.ndarray
    odds: np.ndarray


@dataclasses.dataclass(frozen=True)
class Attacker:
    """A kind of attacker, what it sees of all samples, and how it is fitted: (x, member, query, seed) -> scores."""

    name: str
    x: Any
    fit: Callable[[Any, np.ndarray, Any, int], np.ndarray]


# ---------------------------------------------------------------------------------------------------- the method


def matched(
    views: Sequence[View], member: np.ndarray, group: np.ndarray, options: SanitizeOptions, seed: int
) -> Matched:
    """Pairs of members and non-members that attackers on `views` cannot tell apart.

    A group is kept or dropped whole. One with samples on both sides is dropped first: whether the model saw it is
    unknown, so neither label is right.

    Args:
        views: at least one, each of n samples.
        member: bool[n].
        group: near-duplicates, identical captions among them; str or int[n].

    Raises:
        UserError: a view of another length or with a number that is not finite, or too few samples on one side.
    """
    _check(views, member, group)
    code = np.unique(group, return_inverse=True)[1]
    reason = np.full(len(member), None, dtype=object)
    reason[_contradictory(member, code)] = "its group stands on both sides"
    rows = np.flatnonzero(reason == None)  # noqa: E711 - elementwise
    attackers = [attacker for view in views for attacker in attackers_of(view)]
    rows, first, rounds = _thin_until_fair(attackers, rows, member, code, reason, options, seed)
    pair, caliper = _paired_enough(first.odds, rows, member, code, options)
    keep = pair >= 0
    if not (rounds[-1]["passed"] and keep[rows].all()):
        reason[rows[~keep[rows]]] = NO_PARTNER
        rows = np.flatnonzero(keep)
        rounds.append(_look(0, attackers, rows, member, code, first, options, seed)[1] | {"round": "pairs"})
    if not rounds[-1]["passed"]:
        log.warning("the audit of the matched samples did not pass; the report says which attacker tells what")
    return Matched(keep, pair, reason, rounds, balance_of(views, member, keep), rounds[-1]["passed"], caliper)


def _thin_until_fair(
    attackers: Sequence[Attacker], rows: np.ndarray, member: np.ndarray, code: np.ndarray, reason: np.ndarray,
    options: SanitizeOptions, seed: int,
) -> tuple[np.ndarray, First, list[dict]]:  # fmt: skip
    """The rows left when a round passes that lost none to pairing, the first round's propensity, and the reports.

    `reason` is filled in for the rows that go.
    """
    fewest = options.min_keep * _smaller(member)
    first, rounds = None, []
    for number in range(1, options.max_rounds + 1):
        odds, report, first = _look(number, attackers, rows, member, code, first, options, seed)
        rounds.append(report)
        draw = rng.stream(seed, f"round {number}", purpose="matched.thin")
        if report["passed"]:  # a surplus goes evenly along the log-odds: pairing would take it from one end
            even = rows[thinned(odds, member[rows], code[rows], 0.0, draw)]
            left, why = even[paired(first.odds, even, member, code, options.caliper)[even] >= 0], NO_PARTNER
        else:
            left, why = rows[thinned(odds, member[rows], code[rows], options.step, draw)], TELLING
        if _smaller(member[left]) < fewest:
            report["stopped"] = "another round would keep less than min_keep"
            break
        if report["passed"] and len(left) == len(rows):
            break
        reason[np.setdiff1d(rows, left)] = why
        rows = left
    assert first is not None
    return rows, first, rounds


def _look(
    number: int, attackers: Sequence[Attacker], rows: np.ndarray, member: np.ndarray, code: np.ndarray,
    first: First | None, options: SanitizeOptions, seed: int,
) -> tuple[np.ndarray, dict, First]:  # fmt: skip
    """One audit of `rows`: log-odds to thin by, float64[len(rows)], the report, and the first round's propensity."""
    mine, round_seed = member[rows], int(rng.stream(seed, f"round {number}", purpose="matched").integers(2**31))
    scores, fold = cross_fitted(attackers, rows, member, code, options.folds, round_seed)
    odds = stacked(scores, mine, fold)
    if first is None:
        first = First(*(_scattered(x, rows, len(member)) for x in (scores, fold, calibrated(odds, mine))))
    old = stacked(first.scores[rows], mine, first.fold[rows])
    mixed = (1 - MEMORY) * odds + MEMORY * old
    return mixed, _report(number, attackers, scores, odds, old, mine), first


def _paired_enough(
    odds: np.ndarray, rows: np.ndarray, member: np.ndarray, code: np.ndarray, options: SanitizeOptions
) -> tuple[np.ndarray, float]:
    """As `paired`, and the caliper, doubled until there are `min_keep` pairs, for the rounds may have stopped early."""
    caliper, fewest = options.caliper, options.min_keep * _smaller(member)
    while True:
        pair = paired(odds, rows, member, code, caliper)
        if (pair >= 0).sum() / 2 >= fewest or caliper > np.ptp(odds[rows]):
            return pair, caliper
        caliper *= 2
        log.warning("too few pairs within the caliper; it is widened to %.2f", caliper)


def _check(views: Sequence[View], member: np.ndarray, group: np.ndarray) -> None:
    if not views:
        raise UserError("no views", "matched", "give what a blind attacker sees, for instance the captions")
    for name, found in [("group", group), *((view.name, view.x) for view in views)]:
        rows = found.shape[0] if isinstance(found, sp.spmatrix | sp.sparray) else len(found)
        if rows != len(member):
            raise UserError(f"{rows} rows for {len(member)} samples", name, "give one row for each sample")
    for view in views:
        if isinstance(view.x, np.ndarray) and not np.isfinite(view.x).all():
            raise UserError("a number is not finite", view.name, "mend or drop the samples it belongs to")
    if _smaller(member) < FEWEST:
        what = f"{int(member.sum())} members and {int((~member).sum())} non-members"
        raise UserError(what, "matched", f"bring at least {FEWEST} on each side")


def _smaller(member: np.ndarray) -> int:
    return int(min(member.sum(), (~member).sum()))


def _contradictory(member: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Samples whose group has both members and non-members, bool[n]."""
    share = np.bincount(code, member) / np.bincount(code)
    return ((share > 0) & (share < 1))[code]


def _scattered(values: np.ndarray, rows: np.ndarray, n: int) -> np.ndarray:
    """`values`, given for `rows`, as an array of n rows; what is not given is 0."""
    out = np.zeros((n, *values.shape[1:]), dtype=values.dtype)
    out[rows] = values
    return out


# -------------------------------------------------------------------------------------------------- propensity


def cross_fitted(
    attackers: Sequence[Attacker], rows: np.ndarray, member: np.ndarray, code: np.ndarray, folds: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of `rows` by attackers fitted on other folds, float64[len(rows), k], and the fold of each, int64."""
    scores, fold = np.empty((len(rows), len(attackers))), np.empty(len(rows), dtype=np.int64)
    for number, (train, test) in enumerate(rng.folds(folds, member[rows], code[rows], seed, "matched.folds")):
        fold[test] = number
        for column, attacker in enumerate(attackers):
            known, query = attacker.x[rows[train]], attacker.x[rows[test]]
            scores[test, column] = attacker.fit(known, member[rows[train]], query, seed)
    return scores, fold


def stacked(scores: np.ndarray, member: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Log-odds of being a member, float64[n], from all attackers' scores: an additive logistic regression.

    Piecewise linear in each score, since the few samples that give themselves away stand far above the rest; fitted
    on other folds than it is applied to.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import SplineTransformer, StandardScaler

    knots = np.tile(np.array([[-6.0], [-2], [-1], [1], [2], [6]]), (1, scores.shape[1]))
    bends = SplineTransformer(degree=1, knots=knots, extrapolation="linear")
    out = np.empty(len(scores))
    for number in np.unique(fold):
        known = fold != number
        trust = min(0.1, known.sum() / 40_000)  # a few hundred samples would make odds of their noise
        model = make_pipeline(StandardScaler(), bends, LogisticRegression(C=trust, max_iter=1000))
        out[~known] = model.fit(scores[known], member[known]).decision_function(scores[~known])
    return out


def calibrated(odds: np.ndarray, member: np.ndarray) -> np.ndarray:
    """`odds` shrunk to what they are worth: the slope at which they predict `member` best, and never below 0."""
    from sklearn.linear_model import LogisticRegression

    spread = odds.std() or 1.0
    model = LogisticRegression(C=1e6).fit(odds[:, None] / spread, member)
    slope = max(float(model.coef_[0, 0]), 0.0) / spread
    return slope * (odds - odds.mean()) + np.log(member.sum() / (~member).sum())


def _report(
    number: int,
    attackers: Sequence[Attacker],
    scores: np.ndarray,
    odds: np.ndarray,
    old: np.ndarray,
    member: np.ndarray,
) -> dict:
    """One round in plain Python types. `auc_first` is that of the first round's propensity, which knows the dropped."""
    columns = dict(zip([*(a.name for a in attackers), "all"], [*scores.T, odds], strict=True))
    aucs = {name: metrics.auc(score, member) for name, score in columns.items()}
    tprs = {name: metrics.tpr_at_fpr(score, member, FPR).tpr for name, score in columns.items()}
    n, m = int(member.sum()), int((~member).sum())
    limit = 0.5 + SURE * float(np.sqrt((n + m + 1) / (12 * n * m)))  # Mann and Whitney's, of a score without worth
    tpr_limit = FPR + TAIL_SURE * float(np.sqrt(FPR / n + FPR / m))  # hits and false positives are both counted
    report = {
        "round": number, "members": n, "nonmembers": m, "auc": aucs, "auc_first": metrics.auc(old, member),
        "tpr": tprs, "limit": limit, "tpr_limit": tpr_limit,
        "passed": max(aucs.values()) <= limit and max(tprs.values()) <= tpr_limit,
    }  # fmt: skip
    most = max(aucs, key=lambda name: aucs[name])
    log.info(
        "round %d: %d members, %d non-members, highest AUC %.3f (%s; limit %.3f), highest TPR %.3f (limit %.3f)",
        number, n, m, aucs[most], most, limit, max(tprs.values()), tpr_limit,
    )  # fmt: skip
    return report


# ------------------------------------------------------------------------------------------ thinning and pairing


def thinned(
    odds: np.ndarray, member: np.ndarray, code: np.ndarray, step: float, draw: np.random.Generator
) -> np.ndarray:
    """Which samples stay, bool[n]: each of the side in surplus where it stands with probability exp(-step * |odds|).

    The sides' sizes are evened out at once. Whole groups are drawn, systematically along the log-odds, so that every
    stratum loses its share as nearly as whole numbers allow.
    """
    base = np.log(member.sum() / (~member).sum())
    _, code, size = np.unique(code, return_inverse=True, return_counts=True)
    mean, side = np.bincount(code, odds) / size, np.bincount(code, member) > 0
    surplus = np.where(side, 1, -1) * (step * (mean - base) + base)
    gone, offset = -np.expm1(-np.maximum(surplus, 0)), draw.random()
    drop = np.zeros(len(size), dtype=bool)
    for one in (True, False):
        order = np.flatnonzero(side == one)
        order = order[np.argsort(mean[order], kind="stable")]
        drop[order] = np.diff(np.floor(np.cumsum(gone[order]) + offset), prepend=0) > 0
    return ~drop[code]


def paired(odds: np.ndarray, rows: np.ndarray, member: np.ndarray, code: np.ndarray, caliper: float) -> np.ndarray:
    """The partner of each of n samples, int64[n], or -1: as many pairs as `caliper` and whole groups allow.

    Args:
        odds: float64[n].
        rows: the samples to pair.
        caliper: largest difference in `odds` within a pair.
    """
    while True:
        pair = _pairs(odds, rows, member, caliper)
        broken = np.unique(code[rows][pair[rows] < 0])
        left = rows[~np.isin(code[rows], broken)]
        if (pair[left] >= 0).all() and (pair >= 0).sum() == len(left):
            return pair
        rows = left


def _pairs(odds: np.ndarray, rows: np.ndarray, member: np.ndarray, caliper: float) -> np.ndarray:
    """The largest set of pairs no further apart than `caliper`: two walks along the line, the one behind moves on."""
    pair = np.full(len(member), -1, dtype=np.int64)
    order = rows[np.argsort(odds[rows], kind="stable")]
    one, other = order[member[order]], order[~member[order]]
    i = j = 0
    while i < len(one) and j < len(other):
        apart = odds[one[i]] - odds[other[j]]
        if abs(apart) <= caliper:
            pair[one[i]], pair[other[j]] = other[j], one[i]
        i += apart <= caliper
        j += apart >= -caliper
    return pair


# --------------------------------------------------------------------------------------------------- attackers


def attackers_of(view: View) -> list[Attacker]:
    """The attackers of one view. Texts are counted once, for all: the weights of n-grams need no labels."""
    if sp.issparse(view.x):
        return [Attacker(f"{view.name}: log ratios", view.x, log_ratios)]
    if isinstance(view.x, np.ndarray) and view.x.dtype.kind in "fiub":
        x = view.x.astype(np.float64).reshape(len(view.x), -1)
        return [
            Attacker(f"{view.name}: ridge", _standardised(x), ridge),
            Attacker(f"{view.name}: trees", x, trees),
        ]
    texts, (characters, words, present) = list(view.x), _counted(list(view.x))
    looks = blind.beside(blind.characters(texts), blind.shapes(texts), blind.patterns(texts)).matrix
    statistics = text_statistics(texts)
    return [
        Attacker(f"{view.name}: characters", characters, ridge),
        Attacker(f"{view.name}: words", words, ridge),
        Attacker(f"{view.name}: log ratios", looks, log_ratios),
        Attacker(f"{view.name}: statistics", statistics, trees),
        Attacker(f"{view.name}: forest", statistics, forest),
        Attacker(f"{view.name}: n-grams for", present, telling),
        Attacker(f"{view.name}: n-grams against", present, lambda x, y, query, seed: -telling(x, ~y, query, seed)),
    ]


def _standardised(x: np.ndarray) -> np.ndarray:
    spread = x.std(0)
    return (x - x.mean(0)) / np.where(spread > 0, spread, 1)


def _counted(texts: list[str]) -> tuple[Any, Any, Any]:
    """TF-IDF of character n-grams and of word n-grams, and which character n-grams occur: three sparse matrices."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.preprocessing import Binarizer

    plain: dict[str, Any] = {"n_features": 2**18, "norm": None, "alternate_sign": False, "dtype": np.float32}
    characters = HashingVectorizer(analyzer="char", lowercase=False, ngram_range=(1, 4), **plain).transform(texts)
    words = HashingVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), **plain).transform(texts)
    weigh = TfidfTransformer(sublinear_tf=True)
    return weigh.fit_transform(characters), weigh.fit_transform(words), Binarizer().fit_transform(characters)


def ridge(x: Any, member: np.ndarray, query: Any, seed: int) -> np.ndarray:
    """Scores of `query`, float64[m], by ridge regression on the labels: every feature may count a little."""
    from sklearn.linear_model import RidgeClassifier

    how: dict[str, Any] = {"alpha": 3.0, "solver": "sparse_cg", "tol": 1e-2} if sp.issparse(x) else {"alpha": 10.0}
    return np.asarray(RidgeClassifier(**how).fit(x, member).decision_function(query), dtype=np.float64)


def log_ratios(x: Any, member: np.ndarray, query: Any, seed: int) -> np.ndarray:
    """Scores of `query`, float64[m], by `ridge` on `blind.LogRatio`: what tells most on LAION-mi's captions."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    weigh = make_pipeline(blind.LogRatio(), Normalizer()).fit(x, member)
    return ridge(weigh.transform(x), member, weigh.transform(query), seed)


def trees(x: np.ndarray, member: np.ndarray, query: np.ndarray, seed: int) -> np.ndarray:
    """Scores of `query`, float64[m], by boosted trees: few features, which may count together and not in proportion."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    share = min(1.0, 64 / x.shape[1])  # of an embedding's columns; all of them would take minutes
    model = HistGradientBoostingClassifier(max_iter=120, learning_rate=0.06, max_features=share, random_state=seed)
    return np.asarray(model.fit(x, member).decision_function(query), dtype=np.float64)


def forest(x: np.ndarray, member: np.ndarray, query: np.ndarray, seed: int) -> np.ndarray:
    """Scores of `query`, float64[m], by randomised trees: what is nearly the same in many features goes together.

    Boosted trees alone left captions of LAION-mi on which a forest had AUC .525 (`docs/decisions.md`).
    """
    from sklearn.ensemble import ExtraTreesClassifier

    model = ExtraTreesClassifier(100, min_samples_leaf=3, max_features=0.3, random_state=seed)
    return model.fit(x, member).predict_proba(query)[:, 1]


def telling(x: Any, member: np.ndarray, query: Any, seed: int) -> np.ndarray:
    """Scores of `query`, float64[m]: the log-odds of the n-gram that speaks most for `member`, as greedy rules do.

    Source: Blind-MIA (arXiv 2406.16201), made smooth; n-grams in fewer than 3 captions are left out.
    """
    for_, against = (np.asarray(x[side].sum(0)).ravel() for side in (member, ~member))
    worth = np.where(for_ + against >= RARE, np.log((for_ + 1) / (against + 1)), 0.0)
    out, some = np.zeros(query.shape[0]), np.diff(query.indptr) > 0
    out[some] = np.maximum.reduceat(worth[query.indices], query.indptr[:-1][some])
    return out


# ------------------------------------------------------------------------------------------------- statistics


def _count(sign: str, text: str) -> float:
    return text.count(sign)


# Beside those of `blind`, which the audit looks at: counts where it takes shares, and single signs.
MORE_STATISTICS: dict[str, Callable[[str], float]] = {
    "digits": lambda text: sum(map(str.isdigit, text)),
    "upper-case letters": lambda text: sum(map(str.isupper, text)),
    "lower-case letters": lambda text: sum(map(str.islower, text)),
    "words between blanks": lambda text: len(text.split()),
    "capitalised words": lambda text: sum(word[0].isupper() for word in text.split()),
    "distinct words": lambda text: len(set(text.split())),
    "longest word between blanks": lambda text: max(map(len, text.split()), default=0),
    "repeated words": lambda text: len(text.split()) - len(set(text.split())),
    "blanks beyond one": lambda text: len(text) - len(" ".join(text.split())),
    "no upper case": str.islower,
    "no lower case": str.isupper,
    "title case": str.istitle,
    "signs": lambda text: sum(not (sign.isalnum() or sign.isspace()) for sign in text),
    **{f"count of {sign}": functools.partial(_count, sign) for sign in ".:;|()\"'/&!?#"},
}
STATISTICS = (*blind.CAPTION_STATISTICS, *MORE_STATISTICS)


def text_statistics(texts: Sequence[str]) -> np.ndarray:
    """Length, case, punctuation and language of each text, float64[n, k], columns as in `STATISTICS`."""
    rows = [[*blind.caption_statistics(text), *(more(text) for more in MORE_STATISTICS.values())] for text in texts]
    return np.array(rows, dtype=np.float64)


def balance_of(views: Sequence[View], member: np.ndarray, keep: np.ndarray) -> list[dict]:
    """For each named feature the difference of the sides' means, in standard deviations of all: before and after."""
    out = []
    for view in views:
        for name, x in _named(view):
            spread = float(x.std()) or 1.0
            before, after = (
                float(x[member & rows].mean() - x[~member & rows].mean()) / spread if (member & rows).any() else None
                for rows in (np.ones(len(keep), dtype=bool), keep)
            )
            out.append({"view": view.name, "feature": name, "before": before, "after": after})
    return out


def _named(view: View) -> Iterator[tuple[str, np.ndarray]]:
    """What has a name of its own: statistics, not counts."""
    if sp.issparse(view.x):
        return
    if isinstance(view.x, np.ndarray) and view.x.dtype.kind in "fiub":
        x = view.x.astype(np.float64).reshape(len(view.x), -1)
        names: Sequence[str] = view.names or [f"column {number}" for number in range(x.shape[1])]
    else:
        x, names = text_statistics(list(view.x)), list(STATISTICS)
    yield from zip(names, x.T, strict=True)
