"""A world of plain numpy in which every tensor is at hand: images, noise, a model, and the features table they give.

It shares no code with `mia`: statistics are sums written out, blocks follow the specification, one image at a time.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

GRID = (1, 51, 101, 141, 201, 301, 401, 441, 451, 461, 501, 601, 701, 801, 901)
CROPS = (101, 201, 301, 401)
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
BAR = np.cumprod(1 - BETAS)


def alpha(t):
    return BAR[max(t, 0)] ** 0.5


def sigma(t):
    return (1 - BAR[max(t, 0)]) ** 0.5


def step(z, t, u, e):
    return alpha(u) * (z - sigma(t) * e) / alpha(t) + sigma(u) * e


class World:
    """n images z0[n, C, H, W], noise eps[n, K, C, H, W], crops of z0, and a model(i, z, t, condition) -> e."""

    def __init__(self, z0, eps, model, crop=None):
        self.z0, self.eps, self.model = z0, eps, model
        self.crop = np.roll(z0, 1, axis=-1) * 0.8 if crop is None else crop
        self.ids = [f"{i:05d}" for i in range(len(z0))]
        self.shape = z0.shape[1:]

    def noised(self, i, t, draw=0):
        return alpha(t) * self.z0[i] + sigma(t) * self.eps[i, draw]


def random_world(n=6, draws=2, shape=(2, 4, 4), seed=0):
    """Images, noise and a model without meaning, for oracles."""
    generator = np.random.default_rng(seed)
    tilt = {c: generator.normal(size=(2, *shape)) for c in ("cond", "null", "p1", "p2", "p3")}

    def model(i, z, t, condition):
        a, b = tilt[condition]
        return np.tanh(z * (1 + 0.2 * a) + b * (0.3 + t / 1000)) * 1.3

    return World(generator.normal(size=(n, *shape)), generator.normal(size=(n, draws, *shape)), model)


def memorising_world(n=60, draws=2, shape=(2, 4, 4), seed=0):
    """Images 0..n/2-1 are the training points of an exact mixture, under the caption; without it the model is naive."""
    generator = np.random.default_rng(seed)
    z0 = generator.normal(size=(n, *shape))
    known = z0[: n // 2].reshape(n // 2, -1)

    def model(i, z, t, condition):
        if condition != "cond":
            return sigma(t) * z  # the best guess for standard normal images
        distance = ((z.reshape(-1) - alpha(t) * known) ** 2).sum(axis=1) / (2 * sigma(t) ** 2)
        weight = np.exp(distance.min() - distance)
        mean = (weight[:, None] * known).sum(axis=0) / weight.sum()
        return (z - alpha(t) * mean.reshape(z.shape)) / sigma(t)

    member = np.arange(n) < n // 2
    return World(z0, generator.normal(size=(n, draws, *shape)), model), member


# The table


def statistics(z0, eps, null, cond, bands=True):
    """gram, norms and bands of one evaluation; an operand may be None."""

    def product(a, b):
        return None if a is None or b is None else float(np.sum(a * b))

    def power(a, b, p):
        if a is None or (b is None and b is not False):
            return None
        return float(np.sum(np.abs(a if b is False else a - b) ** p))

    four = (z0, eps, null, cond)
    gram = [product(four[i], four[j]) for i in range(4) for j in range(i, 4)]
    norms = []
    for e in (cond, null):
        norms += [power(e, eps, 1), power(e, eps, 4), power(e, eps, 5), power(e, False, 1), power(e, False, 4)]
    out = {"gram": gram, "norms": norms}
    if bands:
        first = z0 if eps is None else None if cond is None else cond - eps
        out["bands"] = energies(first, z0) + energies(None if eps is None or null is None else null - eps, z0)
    return out


def energies(d, like):
    """By channel, then of the 2x2 block means; as many empty entries where there is no d."""
    if d is None:
        return [None] * (len(like) + 1)
    low = 0.0
    for c in range(d.shape[0]):
        for y in range(0, d.shape[1], 2):
            for x in range(0, d.shape[2], 2):
                low += 4 * float(np.mean(d[c, y : y + 2, x : x + 2])) ** 2
    return [*(float(np.sum(d[c] ** 2)) for c in range(len(d))), low]


def rows_of(world, draws=None):
    """Every grey-box block of the world, as dictionaries."""
    out = []
    for i, name in enumerate(world.ids):
        z0, eps, e = world.z0[i], world.eps[i], lambda z, t, c, i=i: world.model(i, z, t, c)

        def row(block, timestep, draw=0, name=name, **values):
            out.append({"sample_id": name, "block": block, "timestep": timestep, "draw": draw, **values})

        for t in range(0, 200, 10):
            row("clean", t, **statistics(z0, None, e(z0, t, "null"), e(z0, t, "cond")))
        for c, suffix in (("cond", ""), ("null", "-null")):
            e0 = e(z0, 0, c)
            unit = e0 * (2 / np.pi) ** 0.5 / np.abs(e0).mean()
            for block, anchor, steps in (("pia", e0, (100, 200, 300, 400, 500)), ("pian", unit, (200,))):
                for t in steps:
                    found = e(alpha(t) * z0 + sigma(t) * anchor, t, c)
                    both = {"cond": found, "null": None} if c == "cond" else {"null": found, "cond": None}
                    row(block + suffix, t, **statistics(z0, anchor, bands=False, **both))
            y = z0
            for t in range(0, 150, 10):
                after = step(y, t, t + 10, e(y, t, c))
                back = step(after, t + 10, t, e(after, t + 10, c))
                kept = {"vector": np.abs(back - y).reshape(-1).tolist()} if t == 140 else {}
                row("secmi" + suffix, t, latent_error=float(np.mean((back - y) ** 2)), **kept)
                y = after
        for t in GRID:
            for draw in range(len(eps)):
                z = world.noised(i, t, draw)
                row("noised", t, draw, **statistics(z0, eps[draw], e(z, t, "null"), e(z, t, "cond")))
        for k in (1, 2, 3):
            for t in (441, 451, 461):
                cut = e(world.noised(i, t), t, f"p{k}")
                row(f"prompt-{k}", t, **statistics(z0, eps[0], None, cut))
        for c, suffix in (("cond", ""), ("null", "-null")):
            z = world.noised(i, 51)
            there = step(z, 51, 61, e(z, 51, c))
            back = step(there, 61, 51, e(there, 61, c))
            row("stepback" + suffix, 51, latent_error=float(np.mean((back - z) ** 2)))
            z, t, seen = world.noised(i, 101), 101, []
            for _ in range(5):
                seen.append(e(z, t, c))
                z, t = step(z, t, t - 10, seen[-1]), t - 10
            apart = [np.linalg.norm(seen[a] - seen[b]) for a in range(5) for b in range(a)]
            row("aggregation" + suffix, 101, vector=[float(np.mean(apart))])
        for t in CROPS:
            z = alpha(t) * world.crop[i] + sigma(t) * eps[0]
            row("crop-82", t, **statistics(world.crop[i], eps[0], e(z, t, "null"), e(z, t, "cond")))
    return out


def arrow(rows, channels=2):
    """A features table; `vector` is a plain list here, since blocks of one table keep several lengths."""
    floats = pa.list_(pa.float64())
    schema = pa.schema([
        ("sample_id", pa.string()), ("block", pa.string()), ("timestep", pa.int32()), ("draw", pa.int32()),
        ("model_loss", pa.float64()), ("latent_error", pa.float64()), ("pixel_error", pa.float64()),
        ("gram", pa.list_(pa.float64(), 10)), ("norms", pa.list_(pa.float64(), 10)),
        ("bands", pa.list_(pa.float64(), 2 * (channels + 1))), ("vector", pa.list_(pa.float32())),
    ])  # fmt: skip
    assert floats != schema.field("gram").type
    return pa.Table.from_pylist(rows, schema=schema)


def vector_rows(block, vectors, timestep=0):
    """Rows of a block that keeps vectors[n, draws, k]."""
    return [
        {"sample_id": f"{i:05d}", "block": block, "timestep": timestep, "draw": k, "vector": np.asarray(v).tolist()}
        for i, draws in enumerate(vectors)
        for k, v in enumerate(draws)
    ]
