"""Blind baselines: can members be told from non-members without a diffusion model? A fair split leaves them at chance.

Each blind classifier sees what every attacker sees, the caption, the image file, the metadata or the embeddings, and
the same labels and folds as any supervised attack: fitted on calibration, applied to test; within calibration, out of
fold by group. What it goes by is told by name, so that a person sees why a split leaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from mia import blind, metrics, rng, tables
from mia.config import AuditOptions
from mia.errors import UserError

Splits = list[tuple[np.ndarray, np.ndarray]]  # of calibration rows, as `rng.folds` gives them
KINDS = ("caption", "image", "metadata", "agreement")


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the blind classifiers see of n samples; None stands for what is not to be had.

    `image_statistics` are those of `blind.of_images`, float64[n, k]. `sizes` are stated widths and heights in pixels,
    float64[n, 2], NaN where not stated. Embeddings are float32[n, d]; those of images and texts are CLIP's, in one
    space.
    """

    ids: np.ndarray
    captions: Sequence[str] | None = None
    urls: Sequence[str] | None = None
    image_statistics: np.ndarray | None = None
    sizes: np.ndarray | None = None
    image_embeddings: np.ndarray | None = None
    text_embeddings: np.ndarray | None = None
    sentence_embeddings: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Seen:
        """The samples at these row numbers, in this order."""
        seen = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: _take(v, rows) for name, v in seen.items() if v is not None})


@dataclasses.dataclass(frozen=True)
class Audited:
    """The scores table (attack `blind_<kind>`, high = member) and the telling table, both as in `tables.SCHEMAS`."""

    scores: pa.Table
    telling: pa.Table


@dataclasses.dataclass(frozen=True)
class _Variant:
    """One way to look at the samples: `x`, a row for each; the names of its columns; and what learns from them.

    `told_by` says how its features are ranked, see `_ranked`; they are not where other variants tell them already.
    Variants that are `joined` also score together, as `all`.
    """

    name: str
    x: Any
    features: Sequence[str] | np.ndarray
    learner: Any
    told_by: str = ""
    joined: bool = False


def possible(seen: Seen) -> tuple[str, ...]:
    """The kinds of feature for which `seen` holds what they need."""
    return tuple(kind for kind in KINDS if _NEEDS[kind][0](seen))


def audit(
    seen: Seen, member: np.ndarray, group: np.ndarray, part: np.ndarray, options: AuditOptions, seed: int
) -> Audited:
    """Scores by every variant of every kind of blind classifier asked for, and what each of them goes by.

    Neither depends on the order of the rows. All statistics of `telling` are of calibration rows.

    Args:
        member: bool[n]; only calibration rows' labels are read.
        group: str[n]; folds never split a group.
        part: `calibration` or `test` for each row; all `calibration` gives out-of-fold scores for all.

    Raises:
        UserError: an unknown kind, something that a kind needs is not in `seen`, or fewer groups than folds.
    """
    _refuse(seen, options)
    order = np.argsort(np.asarray(seen.ids, dtype=str), kind="stable")
    seen, member, group, part = seen.take(order), member[order], group[order], part[order]
    member = np.where(part == "calibration", member, False).astype(bool)  # other labels end here
    known = np.flatnonzero(part == "calibration")
    splits = rng.folds(options.folds, member[known], group[known], seed, "audit.folds")
    scores, telling = [], []
    for kind in dict.fromkeys(options.features):
        joined = []
        for variant in _VARIANTS[kind](seen, seed):
            score = protocol(variant.learner, variant.x, member, part, splits)
            scores.append(_score_rows(seen.ids, kind, variant.name, score))
            telling.append(_telling_rows(kind, variant, member, part, splits, options.top_features))
            joined += [score] if variant.joined else []
        if joined:
            scores.append(_score_rows(seen.ids, kind, "all", np.mean(joined, axis=0)))
    return Audited(pa.concat_tables(scores), pa.concat_tables(telling))


def protocol(learner: Any, x: Any, member: np.ndarray, part: np.ndarray, splits: Splits) -> np.ndarray:
    """Scores, float64[n], that no row's own label or group went into: see the module's text.

    Args:
        x: an array or a csr matrix with a row for each sample.
        splits: `rng.folds` of the calibration rows alone, in their order.
    """
    from sklearn.base import clone

    known, out = np.flatnonzero(part == "calibration"), np.empty(len(part))
    for train, test in splits:
        fitted = clone(learner).fit(x[known[train]], member[known[train]])
        out[known[test]] = fitted.predict_proba(x[known[test]])[:, 1]
    rest = np.flatnonzero(part != "calibration")
    if len(rest):
        fitted = clone(learner).fit(x[known], member[known])
        out[rest] = fitted.predict_proba(x[rest])[:, 1]
    return out


def _take(values: Any, rows: np.ndarray) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows]


def _score_rows(ids: np.ndarray, kind: str, variant: str, score: np.ndarray) -> pa.Table:
    n = len(ids)
    return pa.table(
        {
            "sample_id": pa.array(ids, pa.string()),
            "attack": pa.array([f"blind_{kind}"] * n, pa.string()),
            "variant": pa.array([variant] * n, pa.string()),
            "score": pa.array(score, pa.float64()),
        }
    )


# ------------------------------------------------------------------------------------------------ kinds and variants


def _refuse(seen: Seen, options: AuditOptions) -> None:
    if options.top_features < 1:
        raise UserError(f"{options.top_features} features to name", "audit.top_features", "give 1 or more")
    if not options.features:
        raise UserError("no kind of feature is asked for", "audit.features", f"use {list(KINDS)}")
    for kind in options.features:
        if kind not in KINDS:
            raise UserError(f"unknown kind of feature '{kind}'", "audit.features", f"use {list(KINDS)}")
        satisfied, needed, fix = _NEEDS[kind]
        if not satisfied(seen):
            raise UserError(f"{kind} features need {needed}", "audit", f"{fix}, or drop '{kind}' from --features")


# For each kind: whether what is seen will do, what is needed, and how to get it.
_NEEDS: dict[str, tuple[Callable[[Seen], bool], str, str]] = {
    "caption": (lambda seen: seen.captions is not None, "the column 'caption'", "give captions"),
    "image": (lambda seen: seen.image_statistics is not None, "the column 'image'", "give image bytes"),
    "metadata": (
        lambda seen: seen.urls is not None or seen.sizes is not None,
        "the column 'url', or 'width' and 'height'", "give one of them",
    ),
    "agreement": (
        lambda seen: seen.image_embeddings is not None and seen.text_embeddings is not None,
        "CLIP embeddings of images and captions", "give --embeddings",
    ),
}  # fmt: skip


def _caption(seen: Seen, seed: int) -> list[_Variant]:
    """The replay of `attacks.md` 4; the greedy rule and log ratios on three views of the text; statistics; embedding.

    AUC and TPR at 1 % FPR on LAION-mi's 8,037 + 8,037 captions: `ngrams` .640 and 4.8 %, `greedy` .627 and 9.6 %,
    `log_ratio` .701 and 10.8 %, `statistics` .656 and 7.4 %, `all`, the mean probability of the last two, .710 and
    11.4 %. MiniLM's embedding has .549 and 1.4 %, and would only dilute that mean.
    """
    captions = seen.captions or ()
    characters, words = blind.characters(captions), blind.words(captions)
    inside = blind.without_edges(characters)
    replay = blind.beside(inside, words)
    views = blind.beside(characters, blind.shapes(captions), blind.patterns(captions))
    statistics = np.array([blind.caption_statistics(caption) for caption in captions])
    found = [
        _Variant(
            "ngrams", replay.matrix, replay.names, blind.tfidf([len(inside.names), len(words.names)], seed), "weight"
        ),
        _Variant("greedy", views.matrix, views.names, blind.Greedy(), "order"),
        _Variant("log_ratio", views.matrix, views.names, blind.log_ratio(seed), "weight", joined=True),
        _Variant("statistics", statistics, blind.CAPTION_STATISTICS, blind.boosting(seed), "alone", joined=True),
    ]
    if seen.sentence_embeddings is not None:
        found.append(_embedding("sentence embedding", seen.sentence_embeddings))
    return found


def _image(seen: Seen, seed: int) -> list[_Variant]:
    """Statistics of the file and its pixels, its CLIP embedding, and `all`, boosted trees on both."""
    statistics = np.asarray(seen.image_statistics)
    found = [_Variant("statistics", statistics, blind.IMAGE_STATISTICS, blind.boosting(seed), "alone")]
    if seen.image_embeddings is not None:
        embedding = _embedding("image embedding", seen.image_embeddings)
        x, names = np.hstack([statistics, embedding.x]), [*blind.IMAGE_STATISTICS, *embedding.features]
        found += [embedding, _Variant("all", x, names, blind.boosting(seed))]
    return found


def _embedding(name: str, vectors: np.ndarray) -> _Variant:
    names = [f"{name} {i}" for i in range(vectors.shape[1])]
    return _Variant("embedding", vectors.astype(np.float64), names, blind.dense(), "weight")


def _metadata(seen: Seen, seed: int) -> list[_Variant]:
    """Log ratios of the parts of the URL, and the stated size."""
    found = []
    if seen.urls is not None:
        counts = blind.urls(seen.urls)
        found.append(_Variant("url", counts.matrix, counts.names, blind.log_ratio(seed), "weight"))
    if seen.sizes is not None:
        sizes = blind.size_statistics(seen.sizes)
        found.append(_Variant("size", sizes, blind.SIZE_STATISTICS, blind.boosting(seed), "alone"))
    return found


def _agreement(seen: Seen, seed: int) -> list[_Variant]:
    """The cosine of the caption's and the image's embedding, and its summands, each weighted by itself."""
    from sklearn.preprocessing import normalize

    product = normalize(np.float64(seen.image_embeddings)) * normalize(np.float64(seen.text_embeddings))
    cosine = product.sum(axis=1, keepdims=True)
    names = [f"product of embeddings {i}" for i in range(product.shape[1])]
    return [
        _Variant("cosine", cosine, ["cosine of caption and image"], blind.dense(), "alone"),
        _Variant("joint", product, names, blind.dense(), "weight"),
    ]


_VARIANTS: dict[str, Callable[[Seen, int], list[_Variant]]] = {
    "caption": _caption, "image": _image, "metadata": _metadata, "agreement": _agreement,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ what tells


def _telling_rows(
    kind: str, variant: _Variant, member: np.ndarray, part: np.ndarray, splits: Splits, top: int
) -> pa.Table:
    """The telling table of a variant, on calibration rows.

    Counted features are looked at as held or not: means are shares of the samples that hold them.
    """
    known = np.flatnonzero(part == "calibration")
    x, y = variant.x[known], member[known]
    ranked = _ranked(variant, x, y, splits, top)
    x = x.tocsc() if sp.issparse(x) else x
    rows = []
    for rank, (column, weight) in enumerate(ranked, 1):
        value, side = _stated(x, column, y)
        rows.append({
            "attack": f"blind_{kind}", "variant": variant.name, "rank": rank, "feature": str(variant.features[column]),
            "weight": weight, "member_mean": float(value[side].mean()), "nonmember_mean": float(value[~side].mean()),
            "auc": metrics.auc(value, side),
        })  # fmt: skip
    return pa.Table.from_pylist(rows, schema=tables.SCHEMAS["telling"])


def _stated(x: Any, column: int, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of a column where they are stated, and those rows' labels; of counts, whether there is any."""
    value = _column(x, column)
    stated = np.isfinite(value)
    return value[stated].astype(np.float64), y[stated]


def _column(x: Any, column: int) -> np.ndarray:
    return x[:, [column]].toarray().ravel() > 0 if sp.issparse(x) else x[:, column]


def _ranked(variant: _Variant, x: Any, y: np.ndarray, splits: Splits, top: int) -> list[tuple[int, float]]:
    """At most `top` columns and their weights, the most telling first; a positive weight speaks for a member.

    Told by `weight`, a feature is worth its coefficient times the deviation of the column that it multiplies, so that
    rare n-grams do not come first, and its weight is the coefficient. Told by `order`, features come as the greedy rule
    takes them, weighted by their worth. Told `alone`, a feature is worth what a small tree makes of it alone out of
    fold, its AUC - 0.5; the weight is that with the sign of the feature's own AUC - 0.5.
    """
    if not variant.told_by:
        return []
    if variant.told_by == "order":
        return _in_order(variant.learner.fit(x, y), x, y, top)
    if variant.told_by == "weight":
        weight, worth = _coefficients(variant.learner.fit(x, y), x)
    else:
        weight, worth = np.array([_alone(x, column, y, splits) for column in range(x.shape[1])]).T
    return [(j, float(weight[j])) for j in _distinct(x, np.argsort(-worth, kind="stable")[: (worth > 0).sum()], top)]


def _distinct(x: Any, columns: np.ndarray, top: int) -> list[int]:
    """The first `top` columns, without those that say the same of every row as one before: an apostrophe is one
    character, one shape and one pattern."""
    known: set[bytes] = set()
    found: list[int] = []
    for j in columns:
        if len(found) == top:
            break
        column = _column(x, j).tobytes()
        if column not in known:
            known.add(column)
            found.append(int(j))
    return found


def _coefficients(fitted: Any, x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of a pipeline's logistic regression, and their sizes times the deviation of what they multiply."""
    from sklearn.preprocessing import StandardScaler

    coefficient = fitted[-1].coef_[0]
    deviation = np.sqrt(StandardScaler(with_mean=False).fit(fitted[:-1].transform(x)).var_)
    return coefficient, np.abs(coefficient) * deviation


def _alone(x: np.ndarray, column: int, y: np.ndarray, splits: Splits) -> tuple[float, float]:
    """Weight and worth of one statistic by itself; 0 where it is constant or one side never states it."""
    value, side = _stated(x, column, y)
    if side.all() or not side.any() or np.ptp(value) == 0:
        return 0.0, 0.0
    score = protocol(blind.small_tree(), x[:, [column]], y, np.full(len(y), "calibration"), splits)
    worth = max(0.0, metrics.auc(score.round(9), y) - 0.5)
    return float(np.copysign(worth, metrics.auc(value, side) - 0.5)) + 0.0, max(worth, 1e-12)


def _in_order(fitted: blind.Greedy, x: sp.csr_matrix, y: np.ndarray, top: int) -> list[tuple[int, float]]:
    """Features in the order taken, without those half of whose members hold one that was taken before."""
    found: list[tuple[int, float]] = []
    covered, columns = np.zeros(len(y), dtype=bool), x.tocsc()
    for j in fitted.order_:
        rows = columns.indices[columns.indptr[j] : columns.indptr[j + 1]]
        rows = rows[y[rows]]
        if len(found) == top or not len(rows):
            break
        if covered[rows].mean() < 0.5:
            found.append((int(j), float(fitted.worth_[j])))
        covered[rows] = True
    return found
