"""Blind baselines: can members be told from non-members without a diffusion model? A fair split leaves them at chance.

Each blind classifier sees what every attacker sees, the caption, the image file or the metadata, and the same labels
and folds as any supervised attack: fitted on calibration, applied to test; within calibration, out of fold by group.
"""

from __future__ import annotations

import dataclasses
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mia import pixels, rng
from mia.config import AuditOptions
from mia.errors import UserError

KINDS = ("caption", "image", "metadata")
_NOT_WORD = re.compile(r"\W")


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the blind classifiers see of n samples; `images` and `embeddings` may be None."""

    ids: np.ndarray
    captions: Sequence[str]
    urls: Sequence[str]
    images: Sequence[bytes] | None
    embeddings: np.ndarray | None


def blind_scores(
    seen: Seen, member: np.ndarray, group: np.ndarray, part: np.ndarray, options: AuditOptions, seed: int
) -> pa.Table:
    """The scores table of every blind classifier asked for: attack `blind_<kind>`, high = member.

    Args:
        member: bool[n]; only calibration rows' labels are used for fitting.
        group: str[n]; folds never split a group.
        part: `calibration` or `test` for each row; all `calibration` gives out-of-fold scores for all.
    """
    names, scores = [], []
    for kind in options.features:
        if kind not in KINDS:
            raise UserError(f"unknown kind of feature '{kind}'", "audit.features", f"use {list(KINDS)}")
        x = {"caption": caption_input, "image": image_input, "metadata": metadata_input}[kind](seen)
        names.append(f"blind_{kind}")
        scores.append(protocol(_learner(kind, seed), x, member, group, part, options.folds, seed))
    n = len(seen.ids)
    return pa.table(
        {
            "sample_id": pa.array(np.tile(seen.ids, len(names)), pa.string()),
            "attack": pa.array(np.repeat(names, n), pa.string()),
            "variant": pa.array(["all"] * (n * len(names)), pa.string()),
            "score": pa.array(np.concatenate(scores)),
        }
    )


def protocol(
    learner: Any, x: Any, member: np.ndarray, group: np.ndarray, part: np.ndarray, folds: int, seed: int
) -> np.ndarray:
    """Scores, float64[n], that no row's own label or group went into: see the module's text."""
    from sklearn.base import clone

    known, out = np.flatnonzero(part == "calibration"), np.empty(len(part))
    for train, test in rng.folds(folds, member[known], group[known], seed, "audit.folds"):
        fitted = clone(learner).fit(_take(x, known[train]), member[known[train]])
        out[known[test]] = fitted.predict_proba(_take(x, known[test]))[:, 1]
    rest = np.flatnonzero(part != "calibration")
    if len(rest):
        fitted = clone(learner).fit(_take(x, known), member[known])
        out[rest] = fitted.predict_proba(_take(x, rest))[:, 1]
    return out


def _take(x: Any, rows: np.ndarray) -> Any:
    return x[rows] if isinstance(x, np.ndarray) else [x[i] for i in rows]


def _learner(kind: str, seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    if kind == "image":
        return RandomForestClassifier(300, min_samples_leaf=3, random_state=seed)
    characters = TfidfVectorizer(analyzer="char", lowercase=False, ngram_range=(1, 5), min_df=2, sublinear_tf=True)
    words = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    union = make_union(characters, words) if kind == "caption" else words.set_params(min_df=1)
    return make_pipeline(union, LogisticRegression(C=3.0, max_iter=1000, class_weight="balanced"))


def caption_input(seen: Seen) -> list[str]:
    """Captions as they are, for n-grams of 1 to 5 characters and 1 to 2 words. Source: replay in `attacks.md` 4."""
    return list(seen.captions)


def metadata_input(seen: Seen) -> list[str]:
    """Scheme, host name, top-level domain and file extension of each URL, each as one word."""
    return [_url_words(url) for url in seen.urls]


def _url_words(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "none").rstrip(".")
    except ValueError:  # a bracket that opens no IPv6 address
        return "unreadable"
    name = parts.path.rsplit("/", 1)[-1]
    extension = name.rsplit(".", 1)[-1].lower() if "." in name else "none"
    about = {"scheme": parts.scheme, "host": host, "top": host.rsplit(".", 1)[-1], "extension": extension}
    return " ".join(f"{kind}_{_NOT_WORD.sub('_', value)}" for kind, value in about.items())


def image_input(seen: Seen) -> np.ndarray:
    """File and colour statistics of each image, and its CLIP embedding when given; float64[n, k]."""
    if seen.images is None:
        raise UserError(
            "image features need the column 'image'", "audit", "give image bytes, or drop 'image' from --features"
        )
    statistics = np.array([image_statistics(data) for data in seen.images])
    return statistics if seen.embeddings is None else np.concatenate([statistics, seen.embeddings], axis=1)


def image_statistics(data: bytes) -> list[float]:
    """Width, height, aspect, bytes per pixel, sharpness (variance of the Laplacian), mean and deviation of each colour
    channel, mean saturation, and share of white: 13 numbers."""
    image = np.asarray(pixels.decode(data), dtype=np.float64) / 255
    height, width, _ = image.shape
    grey = image.mean(2)
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    return [
        width, height, width / height, len(data) / (width * height), float(laplacian.var()) if inner.size else 0.0,
        *image.mean((0, 1)), *image.std((0, 1)),
        float((image.max(2) - image.min(2)).mean()), float((image.min(2) > 0.97).mean()),
    ]  # fmt: skip
