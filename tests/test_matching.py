"""No fresh attacker tells the sides of a matched set apart, none is pushed below chance, and little is lost."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import Normalizer
from sklearn.svm import SVC, LinearSVC

from mia import blind, matching, metrics, resampling
from mia.config import SanitizeOptions
from mia.errors import UserError
from mia.matching import Matched, View
from tests.conftest import SHARED

N = 600  # a side
LEXICON = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "re", "su") for b in "bdgnt" for c in ("a", "el", "o", "y")]
Learners = dict[str, tuple[Any, Callable[[int], Any]]]


def captions(r: np.random.Generator, n: int, leak: np.ndarray | None = None) -> list[str]:
    """Six common words each, and one more where `leak`."""
    said = [" ".join(r.choice(LEXICON, 6)) for _ in range(n)]
    return said if leak is None else [f"{c} photograph" if told else c for c, told in zip(said, leak, strict=True)]


def planted(seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Captions, member, group; two thirds of the members and one third of the non-members say `photograph`."""
    r = np.random.default_rng(seed)
    member = r.permutation(np.arange(2 * N) < N)
    said = captions(r, 2 * N, r.random(2 * N) < np.where(member, 2 / 3, 1 / 3))
    return said, member, np.unique(said, return_inverse=True)[1]


def out_of_fold(x: Any, member: np.ndarray, group: np.ndarray, make: Callable[[int], Any], seed: int) -> np.ndarray:
    """Pooled scores of a learner fitted from scratch, five folds by group."""
    out = np.empty(len(member))
    for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(member, member, group):
        model = make(seed).fit(x[train], member[train])
        if hasattr(model, "decision_function"):
            out[test] = model.decision_function(x[test])
        else:
            how = "predict_log_proba" if hasattr(model, "predict_log_proba") else "predict_proba"
            out[test] = np.diff(getattr(model, how)(x[test]))[:, 0]
    return out


def fresh_auc(x: Any, kept: Matched, member: np.ndarray, group: np.ndarray, make: Callable[[int], Any]) -> float:
    """Mean AUC over three seeds of a fresh attacker on what was kept."""
    rows = kept.keep
    return float(np.mean([metrics.auc(out_of_fold(x[rows], member[rows], group[rows], make, s), member[rows])
                          for s in (901, 902, 903)]))  # fmt: skip


def bag(said: Sequence[str]) -> Any:
    return CountVectorizer(analyzer="char", ngram_range=(2, 3)).fit_transform(said)


def bayes(seed: int) -> Any:
    return MultinomialNB()


def forest(seed: int) -> Any:
    return RandomForestClassifier(100, min_samples_leaf=5, random_state=seed)


def chance(kept: Matched) -> float:
    """Three standard errors of the AUC of a worthless score."""
    n = kept.keep.sum() / 2
    return 3 * float(np.sqrt((2 * n + 1) / (12 * n * n)))


def match(said: Sequence[str], member: np.ndarray, group: np.ndarray, seed: int = 0, **options: Any) -> Matched:
    return matching.matched([View("caption", said)], member, group, SanitizeOptions(**options), seed)


@pytest.fixture(scope="module")
def leaky() -> tuple[list[str], np.ndarray, np.ndarray, Matched]:
    said, member, group = planted()
    return said, member, group, match(said, member, group, min_keep=0.5)


# ------------------------------------------------------------------------------------------------------ the leak


def test_a_planted_leak_is_removed_and_most_is_kept(leaky):
    said, member, group, kept = leaky
    x = bag(said)
    everything = dataclasses.replace(kept, keep=np.ones(len(member), dtype=bool))
    assert fresh_auc(x, everything, member, group, bayes) > 0.6
    assert abs(fresh_auc(x, kept, member, group, bayes) - 0.5) < chance(kept)
    assert kept.keep.sum() >= 0.6 * len(member)  # the sides overlap in two thirds


def test_a_word_that_only_members_say_goes_with_them():
    r = np.random.default_rng(1)
    member = np.arange(2 * N) % 2 == 0
    told = member & (r.random(2 * N) < 0.2)
    said = captions(r, 2 * N, told)
    kept = match(said, member, np.arange(2 * N))
    assert kept.keep[told].mean() < 0.35 and kept.keep[member & ~told].mean() > 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_there_is_no_leak_little_is_lost_and_nobody_falls_below_chance(seed):
    """Each audit of many attackers may raise a false alarm, which costs samples: 0 to 7 % at this size."""
    r = np.random.default_rng(seed)
    member = r.permutation(np.arange(2 * N) < N)
    said, group = captions(r, 2 * N), np.arange(2 * N)
    kept = match(said, member, group, seed)
    assert kept.keep.mean() > 0.9 and kept.passed
    assert abs(fresh_auc(bag(said), kept, member, group, bayes) - 0.5) < chance(kept)


def test_a_shifted_column_is_balanced():
    r = np.random.default_rng(3)
    member, group = np.arange(2 * N) % 2 == 0, np.arange(2 * N)
    x = r.normal(size=(2 * N, 3))
    x[member, 1] += 0.5
    view = View("image", x, ("width", "height", "sharpness"))
    kept = matching.matched([view], member, group, SanitizeOptions(min_keep=0.5), 0)
    assert abs(fresh_auc(x, kept, member, group, forest) - 0.5) < chance(kept)
    height = next(b for b in kept.balance if b["feature"] == "height")
    assert height["before"] > 0.4 and abs(height["after"]) < 0.2 and height["view"] == "image"
    assert kept.keep.mean() > 0.65


def test_hosts_are_balanced():
    """URLs as counted parts: members' come from one host more often than non-members'."""
    r = np.random.default_rng(6)
    member, group = np.arange(2 * N) % 2 == 0, np.arange(2 * N)
    hosts = np.where(r.random(2 * N) < np.where(member, 0.65, 0.35), "one.test", "other.test")
    counts = blind.urls([f"https://{host}/{r.integers(10**6)}.jpg" for host in hosts]).matrix
    kept = matching.matched([View("url", counts)], member, group, SanitizeOptions(min_keep=0.5), 0)
    share = [(hosts[kept.keep & side] == "one.test").mean() for side in (member, ~member)]
    assert abs(share[0] - share[1]) < 0.1 and kept.keep.mean() > 0.6
    assert kept.rounds[0]["auc"]["url: log ratios"] > 0.6


@pytest.mark.parametrize("seed", [4, 5])  # with 5 the first round passes: what is too many must not go from one end
def test_sides_of_different_size_lose_little_of_the_smaller(seed):
    r = np.random.default_rng(seed)
    member = np.arange(3 * N) % 3 == 0
    kept = match(captions(r, 3 * N), member, np.arange(3 * N))
    assert (kept.keep & member).sum() == (kept.keep & ~member).sum() > 0.95 * N


# ------------------------------------------------------------------------------------------------ what is promised


def test_pairs_are_one_to_one_across_the_sides(leaky):
    _, member, _, kept = leaky
    rows = np.flatnonzero(kept.keep)
    assert kept.pair.dtype == np.int64 and kept.keep.dtype == bool
    assert (kept.pair[kept.pair[rows]] == rows).all()
    assert (member[rows] != member[kept.pair[rows]]).all()
    assert (kept.pair[~kept.keep] == -1).all()


def test_as_many_pairs_as_the_caliper_allows():
    odds = np.array([0.0, 0.05, 1.0, 1.3, 5.0, 0.04, 1.2, 1.25, 9.0])
    member = np.array([True] * 5 + [False] * 4)
    pair = matching.paired(odds, np.arange(9), member, np.arange(9), 0.2)
    assert pair.tolist() == [5, -1, 6, 7, -1, 0, 2, 3, -1]


def test_the_caliper_is_doubled_until_enough_are_paired_and_told():
    odds, member = np.array([0.0, 1.0, 2.0, 0.4, 1.4, 2.9]), np.arange(6) < 3
    for min_keep, wanted, caliper in ((0.0, 0, 0.25), (0.6, 2, 0.5), (1.0, 3, 1.0)):
        options = SanitizeOptions(min_keep=min_keep, caliper=0.25)
        pair, used = matching._paired_enough(odds, np.arange(6), member, np.arange(6), options)
        assert ((pair[:3] >= 0).sum(), used) == (wanted, caliper)


def test_groups_stay_or_go_whole_and_those_on_both_sides_go():
    said, member, _ = planted(5)
    group = np.where(member, 0, 1000) + np.random.default_rng(5).integers(0, 300, 2 * N)
    group[np.flatnonzero(member)[0]] = group[np.flatnonzero(~member)[0]]  # now a contradiction
    kept = match(said, member, group, min_keep=0.4)
    for one in np.unique(group):
        assert len(set(kept.keep[group == one])) == 1
    both = group == group[np.flatnonzero(~member)[0]]
    assert not kept.keep[both].any() and set(kept.reason[both]) == {"its group stands on both sides"}


def test_every_sample_is_kept_or_has_a_reason_and_the_rounds_count_them(leaky):
    _, member, _, kept = leaky
    reasons = collections.Counter(kept.reason[~kept.keep])
    assert all(r is None for r in kept.reason[kept.keep]) and all(isinstance(r, str) for r in reasons)
    assert kept.keep.sum() + sum(reasons.values()) == len(member)
    first, last = kept.rounds[0], kept.rounds[-1]
    assert (first["members"], first["nonmembers"]) == (N, N)
    assert last["members"] == last["nonmembers"] == kept.keep.sum() // 2
    assert last["passed"] == kept.passed and max(first["auc"].values()) > first["limit"]
    json.dumps([kept.rounds, kept.balance])  # plain types


def test_never_fewer_than_asked_for(leaky):
    said, member, group, _ = leaky
    kept = match(said, member, group, min_keep=0.9)
    assert kept.keep.sum() >= 0.9 * len(member) and not kept.passed
    assert any("stopped" in r for r in kept.rounds)


def test_the_same_seed_gives_the_same_and_another_seed_as_good(leaky):
    said, member, group, kept = leaky
    again = match(said, member, group, min_keep=0.5)
    assert (again.pair == kept.pair).all() and again.rounds == kept.rounds
    other = match(said, member, group, seed=1, min_keep=0.5)
    assert (other.keep != kept.keep).any()
    assert abs(fresh_auc(bag(said), other, member, group, bayes) - 0.5) < chance(other)


def test_swapped_labels_do_as_well(leaky):
    said, member, group, kept = leaky
    swapped = match(said, ~member, group, min_keep=0.5)
    assert abs(fresh_auc(bag(said), swapped, ~member, group, bayes) - 0.5) < chance(swapped)
    assert abs(swapped.keep.mean() - kept.keep.mean()) < 0.05


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("views", "member", "what"),
    [
        ([View("caption", ["a"] * 200)], np.ones(200, dtype=bool), "200 members and 0 non-members"),
        ([View("caption", ["a"] * 200)], np.arange(200) < 49, "at least 50"),
        ([View("caption", ["a"] * 199)], np.arange(200) < 100, "199 rows for 200 samples"),
        ([View("image", np.full((200, 2), np.nan))], np.arange(200) < 100, "not finite"),
        ([], np.arange(200) < 100, "no views"),
    ],
)
def test_bad_input_is_refused(views, member, what):
    with pytest.raises(UserError, match=what):
        matching.matched(views, member, np.arange(200), SanitizeOptions(), 0)


# -------------------------------------------------------------------------------------------------------- LAION-mi


class Greedy:
    """The ratio of the n-gram that speaks most for members, as Blind-MIA counts it."""

    def fit(self, x: Any, member: np.ndarray) -> Greedy:
        mine, others = (np.asarray((x[side] > 0).sum(0)).ravel() for side in (member, ~member))
        self.worth = np.where(mine + others >= 3, mine / (others + 1), 0.0)
        return self

    def decision_function(self, x: Any) -> np.ndarray:
        return (x > 0).multiply(self.worth).tocsr().max(axis=1).toarray().ravel()


def surface(said: Sequence[str]) -> np.ndarray:
    """Counts of letters by kind, of words, and of signs: much of what the matching's statistics hold, counted anew."""
    kinds = (str.isupper, str.islower, str.isdigit, str.isspace, lambda letter: ord(letter) > 127)
    return np.array(
        [[len(c), c[:1].isupper(), c[-1:].isalnum(), c.istitle(), c.islower(), c.isupper(), len(set(c.split())),
          max(map(len, c.split()), default=0), sum(w[0].isupper() for w in c.split()),
          *(sum(map(kind, c)) for kind in kinds), *(c.count(sign) for sign in ",.:;-|()\"'/&!?#")] for c in said],
        dtype=np.float64,
    )  # fmt: skip


def fresh_attackers(said: list[str]) -> Learners:
    characters = TfidfVectorizer(analyzer="char", lowercase=False, ngram_range=(1, 5), min_df=2, sublinear_tf=True)
    words = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    long, word = characters.fit_transform(said), words.fit_transform(said)
    counts = CountVectorizer(analyzer="char", ngram_range=(1, 5), min_df=3).fit_transform(said)
    hashed = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 4), n_features=2**18).transform(said)
    sketch = Normalizer().fit_transform(TruncatedSVD(50, random_state=0).fit_transform(word))
    look, audited = surface(said), np.array([blind.caption_statistics(c) for c in said])
    return {
        "characters, logistic": (long, lambda seed: LogisticRegression(C=3.0, solver="liblinear")),
        "words, SVM": (word, lambda seed: LinearSVC(C=0.1)),
        "words, ridge": (word, lambda seed: RidgeClassifier(3.0, solver="sparse_cg")),
        "words, neighbours": (sketch, lambda seed: KNeighborsClassifier(200, weights="distance")),
        "words, kernel": (sketch, lambda seed: SVC(C=1.0, gamma=2.0, random_state=seed)),
        "statistics of the audit": (audited, lambda seed: HistGradientBoostingClassifier(min_samples_leaf=10)),
        "greedy n-grams": (counts, lambda seed: Greedy()),
        "naive Bayes": (counts, lambda seed: MultinomialNB(alpha=0.5)),
        "hashed, SGD": (hashed, lambda seed: SGDClassifier(loss="log_loss", alpha=1e-5, random_state=seed)),
        "surface, boosting": (look, lambda seed: HistGradientBoostingClassifier(learning_rate=0.05, random_state=seed)),
        "surface, forest": (look, forest),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_captions_of_laion_mi_cannot_be_told_apart():
    folder = SHARED / "data" / "laion_mi_captions"
    if not folder.exists():
        pytest.skip(f"no {folder}")
    sides = [pq.read_table(folder / f"{side}.parquet").to_pydict() for side in ("members", "nonmembers")]
    rows = sorted((i, c, s == 0) for s, side in enumerate(sides) for i, c in zip(*side.values(), strict=True))
    said, member = [caption for _, caption, _ in rows], np.array([m for _, _, m in rows])
    group = np.unique(said, return_inverse=True)[1]
    kept = match(said, member, group)
    assert kept.keep.sum() / 2 >= 0.75 * 8037
    rest, label, code = [said[i] for i in np.flatnonzero(kept.keep)], member[kept.keep], group[kept.keep]
    missed = []
    for name, (x, make) in fresh_attackers(rest).items():
        for seed in (11, 12):
            score = out_of_fold(x, label, code, make, seed)
            drawn = resampling.bootstrap(score[:, None], label, code, (0.01,), 1000, np.random.default_rng(0))
            # One claim about many intervals: they hold together (docs/decisions.md), so that luck alone breaks none.
            low, high = metrics.interval(drawn[:, 0, 1], 1 - 0.05 / 16)
            area = metrics.auc(score, label)
            print(f"{name:20} {seed} {area:.4f} [{100 * low:.2f}, {100 * high:.2f}] %")  # noqa: T201 - shown on failure
            if not (0.48 <= area <= 0.52 and low <= 0.01 <= high):
                missed.append((name, seed, area, low, high))
    assert not missed
