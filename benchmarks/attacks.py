"""Seconds and memory of `mia scores` on the stored features of 10,000 images of Stable Diffusion's shape.

The features are random numbers in files of the real layout, written by the real writer: 15 timesteps x 5 draws of the
noised grid, caption and empty prompt, every other block with the vectors that it has (5 numbers for each of 3
generations, 2 for the variations, 686 gradient norms), and the losses of the default settings; half of the images are
calibration. Runs the command with every attack of the registry but the five classifiers on the settings' losses,
which have a benchmark of their own (`benchmarks.classifiers`). Prints seconds of time and of CPU from the start of the
process to the table of scores, and its peak memory; limits: 60 s and 2 GB on two cores.
"""

from __future__ import annotations

import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from mia import classifiers, scores, settings, tables, walks
from mia.attacks import evidence
from mia.config import FeaturesOptions

N, SHARDS = 10_000, 4
SHAPE = (4, 64, 64)
LOSSES = settings.LOSSES
OPTIONS = FeaturesOptions(probes=(*walks.PROBES, *walks.PASSES))
TENS = OPTIONS.gradient_timesteps


class Layout(NamedTuple):
    """A block's timesteps and draws, its losses, whether it holds statistics, of which an operand may lack, its vector.

    `at` is the timestep at which there is a vector of `width` entries.
    """

    steps: tuple[int, ...]
    draws: int = 1
    losses: tuple[str, ...] = ()
    statistics: bool = False
    lacks: str = ""
    width: int = 0
    at: int = 0


def layouts() -> dict[str, dict[str, Layout]]:
    """Job -> block -> layout, as `mia features` leaves them."""
    error = ("latent_error",)
    found = {
        "clean": {"clean": Layout(walks.CLEAN_TIMESTEPS, statistics=True, lacks="eps")},
        "noised": {"noised": Layout(walks.GRID, OPTIONS.draws, statistics=True)},
        "prompts": {
            name: Layout(walks.PROMPT_TIMESTEPS, statistics=True, lacks="null") for name in walks.PROMPTS
        },
        "crops": {f"crop-{c}": Layout(walks.CROP_TIMESTEPS, statistics=True) for c in OPTIONS.crops},
        "gradients": {
            "gsa1": Layout((0,), width=686), "gsa2": Layout((0,), width=686),
            "gradient-masking": Layout(TENS, losses=("model_loss",)),
            "noise-optimisation": Layout((101,), width=2, at=101),
        },
        "generations": {"generations": Layout((0,), OPTIONS.generations, width=5)},
        "variations": {"variations": Layout((50,), width=2, at=50)},
    }  # fmt: skip
    for end, lacks in (("", "null"), ("-null", "cond")):
        found["clean"] |= {
            "pia" + end: Layout(walks.PIA_TIMESTEPS, statistics=True, lacks=lacks),
            "pian" + end: Layout(walks.PIAN_TIMESTEPS, statistics=True, lacks=lacks),
            "secmi" + end: Layout(tuple(range(0, 150, 10)), losses=error, width=1024, at=140),
        }
        found["noised"] |= {
            "stepback" + end: Layout((51,), losses=error),
            "aggregation" + end: Layout((101,), width=1, at=101),
        }
    for number in OPTIONS.settings:
        of = settings.setting(number)
        layout = Layout(tuple(sorted(walks.timesteps(of, OPTIONS))), OPTIONS.draws, losses=LOSSES)
        found.setdefault(settings.job_of(of), {})[settings.own_block(of)] = layout
    return found


def rows(ids: list[str], name: str, layout: Layout, generator: np.random.Generator) -> pa.Table:
    """One block's rows for these samples."""
    steps, draws, n = layout.steps, layout.draws, len(ids) * len(layout.steps) * layout.draws
    t = np.tile(np.repeat(steps, draws), len(ids)).astype(np.int32)
    columns: dict[str, pa.Array] = {
        "sample_id": pa.array(np.repeat(np.array(ids, dtype=object), len(steps) * draws)),
        "block": pa.array([name] * n), "timestep": pa.array(t),
        "draw": pa.array(np.tile(np.arange(draws, dtype=np.int32), len(ids) * len(steps))),
    }  # fmt: skip
    for loss in LOSSES:
        known = loss in layout.losses
        columns[loss] = pa.array(generator.random(n, dtype=np.float32) + 0.01) if known else pa.nulls(n, pa.float32())
    columns |= statistics(n, layout, generator)
    there = (t == layout.at) & (layout.width > 0)
    offsets = np.concatenate([[0], np.cumsum(there * layout.width)]).astype(np.int32)
    flat = pa.array(generator.random(int(offsets[-1]), dtype=np.float32))
    columns["vector"] = pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(~there))
    return pa.table(columns)


def statistics(n: int, layout: Layout, generator: np.random.Generator) -> dict[str, pa.Array]:
    """The columns `gram`, `norms` and `bands`, empty where an operand lacks."""
    found = {}
    wide = tables.bands(SHAPE[0])
    names = {
        "gram": tables.GRAM_NAMES,
        "norms": tables.NORM_NAMES,
        "bands": ("cond",) * (wide // 2) + ("null",) * (wide // 2),
    }
    for column, entries in names.items():
        values = generator.random((n, len(entries))) + 1
        if column == "gram":  # of vectors of length 1 that point apart
            values = np.tile([1.0, 0.1, 0.1, 0.1, 1.0, 0.8, 0.8, 1.0, 0.9, 1.0], (n, 1)) + values / 100
        empty = np.tile([bool(layout.lacks) and layout.lacks in entry for entry in entries], n)
        size = len(entries)
        full = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), mask=empty), size)
        found[column] = full if layout.statistics else pa.nulls(n, pa.list_(pa.float64(), size))
    return found


def write(folder: pathlib.Path) -> list[pathlib.Path]:
    """Every job's shards, and the dataset."""
    generator, paths = np.random.default_rng(0), []
    made = {"unet": "random", "encoders": "random", "seed": 0, "latent_shape": list(SHAPE)}
    for shard in range(SHARDS):
        ids = [f"{i:032x}" for i in range(shard, N, SHARDS)]
        for job, blocks in layouts().items():
            table = pa.concat_tables([rows(ids, name, layout, generator) for name, layout in blocks.items()])
            paths.append(folder / f"{job}-{shard}.parquet")
            tables.write(paths[-1], table.sort_by([(c, "ascending") for c in evidence.KEY]), "features", made)
    ids = [f"{i:032x}" for i in range(N)]
    dataset = pl.DataFrame(
        {"sample_id": ids, "url": ids, "caption": ids, "sha256": ids, "member": generator.random(N) < 0.5, "group": ids,
         "part": ["calibration" if i % 2 else "test" for i in range(N)], "weight": np.ones(N)}
    )  # fmt: skip
    tables.write(folder / "dataset.parquet", dataset.to_arrow().cast(tables.SCHEMAS["dataset"]), "dataset", {})
    return paths


def main() -> None:
    """Write the features, then score them by the command, in a process whose memory is only its own."""
    names = [name for name in scores.ATTACKS if name not in classifiers.LEARNERS]
    with tempfile.TemporaryDirectory() as folder:
        paths = write(pathlib.Path(folder))
        print(f"{N} images, {sum(p.stat().st_size for p in paths) / 2**30:.2f} GB of features", flush=True)
        words = [word for path in paths for word in ("--features", str(path))]
        words += ["--dataset", f"{folder}/dataset.parquet", "--settings", ",".join(map(str, OPTIONS.settings))]
        words += ["--attacks", ",".join(names), "--output", f"{folder}/scores.parquet"]
        start = time.perf_counter()
        # One worker: two would share the fits, and their memory is not this process's.
        subprocess.run([sys.executable, "-m", "mia", "scores", *words], check=True)
        took, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        found = pl.read_parquet(f"{folder}/scores.parquet", columns=["attack", "variant"]).unique()
    twins = sum(name.endswith("_null") and name not in names for name in found["attack"].unique())
    print(f"{len(names)} attacks and {twins} twins, {len(found)} variants")
    print(
        f"{took:.1f} s (limit 60), CPU {used.ru_utime + used.ru_stime:.1f} s, "
        f"peak {used.ru_maxrss / 2**20:.2f} GB (limit 2)"
    )


if __name__ == "__main__":
    main()
