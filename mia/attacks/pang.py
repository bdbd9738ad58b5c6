"""Pang & Wang (arXiv 2312.08207): images generated from a member's caption look like the member.

Three images a caption; s = similarity of generation and image, high = member. The authors compare DeiT embeddings token
by token, average over the images, and take the largest entry, a Gaussian likelihood ratio or a perceptron
(`pang_classifier`; theirs reports its best test epoch). The block keeps the cosine of CLIP embeddings and, fourth and
fifth, mean and maximum of the token-wise similarities (NaN where the encoder shows no tokens).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mia.attacks.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Options:
    """`images`: how many of the generations are used, the first ones."""

    block: str = "generations"
    images: int = 3


def scores(evidence: Evidence, options: Options) -> dict[str, np.ndarray]:
    """Cosine: `mean` and `max` over generations; `tokens`, `token_max`: mean over them of token-wise ones."""
    image, tokens = similarities(evidence, options)
    out = {"mean": image.mean(axis=1), "max": image.max(axis=1)}
    return out | dict(zip(("tokens", "token_max"), tokens.T, strict=False))


def similarities(evidence: Evidence, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Cosine with each generation, float64[n, images]; token-wise mean and maximum, float64[n, 2], or [n, 0]."""
    kept = evidence.vectors(options.block)[:, 0, : options.images].astype(np.float64)
    tokens = kept[:, :, 3:5].mean(axis=1)
    return kept[:, :, 0], tokens[:, ~np.isnan(tokens).any(axis=0)]
