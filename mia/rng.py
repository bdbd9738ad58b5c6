"""Randomness that depends on what is drawn for, never on when, where or in which company.

Each stream is keyed by (seed, name, draw, purpose), so a sample's noise is the same in every setting, batch, shard,
order, device and resumed run. Streams are numpy's counter-based Philox; noise is drawn on the CPU in float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from mia.errors import UserError


def stream(seed: int, name: str, draw: int = 0, purpose: str = "") -> np.random.Generator:
    """A generator of its own for this (seed, name, draw, purpose)."""
    text = "\x1f".join((str(seed), name, str(draw), purpose))
    key = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def noise(seed: int, ids: Sequence[str], draws: Sequence[int], purpose: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise, float32[n, *shape], one stream for each pair (ids[i], draws[i])."""
    out = np.empty((len(ids), *shape), dtype=np.float32)
    for row, (name, draw) in enumerate(zip(ids, draws, strict=True)):
        stream(seed, name, draw, purpose).standard_normal(out=out[row], dtype=np.float32)
    return out


def folds(
    count: int, positive: np.ndarray, group: np.ndarray, seed: int, where: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, test) row numbers of `count` folds, alike in their share of `positive`, that keep every group whole.

    Raises:
        UserError: a class stands in fewer than `count` groups; `where` names the option.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if count < 2:
        raise UserError(f"{count} folds", where, "give 2 or more")
    fewest = min(len(np.unique(group[positive == value])) for value in (False, True))
    if fewest < count:
        raise UserError(f"one class has {fewest} groups for {count} folds", where, "lower it, or bring more samples")
    split = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    return list(split.split(positive, positive, group))
