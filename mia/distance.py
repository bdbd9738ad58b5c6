"""How far apart members and non-members are in an embedding space, beside what chance alone would show."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from mia import rng, tables
from mia.errors import UserError


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance between normal fits of two sets of vectors, float[n, d] and float[m, d].

    Source: Heusel et al. 2017, eq. 6: |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)).
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(np.atleast_2d(cov_a))
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.linalg.eigvalsh(root @ np.atleast_2d(cov_b) @ root)
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    return float(shift + np.trace(np.atleast_2d(cov_a + cov_b)) - 2 * np.sqrt(np.maximum(cross, 0)).sum())


def distances(spaces: dict[str, np.ndarray], member: np.ndarray, seed: int, permutations: int = 200) -> pa.Table:
    """The distance table: in each space the Fréchet distance of members to non-members, and its level under chance.

    `ci_low`, `ci_high` of `frechet_chance` are the central 95 % of the distance over `permutations` shuffled labels: a
    distance inside it tells nothing from nothing.

    Raises:
        UserError: fewer than two samples on a side.
    """
    n, m = int(member.sum()), int((~member).sum())
    if min(n, m) < 2:
        raise UserError(f"{n} members and {m} non-members", "dataset", "a covariance needs two of each at least")
    rows: list[tuple] = []
    for space, x in spaces.items():
        generator = rng.stream(seed, space, purpose="distance")
        shuffled = [generator.permutation(member) for _ in range(permutations)]
        chance = [frechet(x[s], x[~s]) for s in shuffled]
        low, high = np.quantile(chance, [0.025, 0.975])
        rows.append((space, "frechet", n, m, frechet(x[member], x[~member]), None, None))
        rows.append((space, "frechet_chance", n, m, float(np.median(chance)), float(low), float(high)))
    schema = tables.SCHEMAS["distance"]
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)
