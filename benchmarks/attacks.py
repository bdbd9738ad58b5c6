"""Seconds and memory of every attack on the stored features of 10,000 images of Stable Diffusion's shape.

The features are random numbers in files of the real layout: 15 timesteps x 5 draws of the noised grid, caption and
empty prompt, and every other block; half of the images are calibration. Prints seconds of time and of CPU for each
attack, the total from opening the files to the last score, and peak memory; limits: 60 s and 2 GB on two cores. Attacks
on settings' losses are the matter of `benchmarks.classifiers`.
"""

from __future__ import annotations

import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from mia import attacks, scores, tables
from mia.attacks import evidence
from mia.attacks.calibration import Calibration
from mia.config import ScoresOptions

SHAPE = (4, 64, 64)
GRID = (1, 51, 101, 141, 201, 301, 401, 441, 451, 461, 501, 601, 701, 801, 901)
TENS = tuple(range(1, 1000, 100))
# Block -> timesteps, draws, whether it holds statistics, width of its vector and the timestep that has one.
BLOCKS: dict[str, dict[str, tuple]] = {
    "clean": {
        "clean": (tuple(range(0, 200, 10)), 1, True, 0, 0),
        **{name + end: (steps, 1, True, 0, 0) for end in ("", "-null") for name, steps in
           (("pia", (100, 200, 300, 400, 500)), ("pian", (200,)))},
        **{"secmi" + end: (tuple(range(0, 150, 10)), 1, False, 1024, 140) for end in ("", "-null")},
    },
    "noised": {
        "noised": (GRID, 5, True, 0, 0),
        **{f"prompt-{k}": ((441, 451, 461), 1, True, 0, 0) for k in (1, 2, 3)},
        **{"stepback" + end: ((51,), 1, False, 0, 0) for end in ("", "-null")},
        **{"aggregation" + end: ((101,), 1, False, 1, 101) for end in ("", "-null")},
    },
    "crops": {"crop-82": ((101, 201, 301, 401), 1, True, 0, 0)},
    "gradients": {
        "gsa1": ((0,), 1, False, 686, 0), "gsa2": ((0,), 1, False, 686, 0),
        "gradient-masking": (TENS, 1, False, 0, 0), "noise-optimisation": ((101,), 1, False, 2, 101),
    },
    "generations": {"generations": ((0,), 4, False, 3, 0)},
    "variations": {"variations": ((50,), 1, False, 1, 50)},
}  # fmt: skip


def rows(ids: list[str], name: str, layout: tuple, generator: np.random.Generator) -> pa.Table:
    """One block's rows for these samples."""
    steps, draws, statistics, width, at = layout
    n = len(ids) * len(steps) * draws
    t = np.tile(np.repeat(steps, draws), len(ids)).astype(np.int32)
    columns: dict[str, pa.Array] = {
        "sample_id": pa.array(np.repeat(np.array(ids, dtype=object), len(steps) * draws)),
        "block": pa.array([name] * n), "timestep": pa.array(t),
        "draw": pa.array(np.tile(np.arange(draws, dtype=np.int32), len(ids) * len(steps))),
        "model_loss": pa.array(generator.random(n)), "latent_error": pa.array(generator.random(n) + 0.01),
        "pixel_error": pa.nulls(n, pa.float64()),
    }  # fmt: skip
    for column, size in (("gram", 10), ("norms", 10), ("bands", 10)):
        values = generator.random((n, size)) + 1
        if column == "gram":  # of vectors of length 1 that point apart
            values = np.tile([1.0, 0.1, 0.1, 0.1, 1.0, 0.8, 0.8, 1.0, 0.9, 1.0], (n, 1)) + values / 100
        kind = pa.list_(pa.float64(), size)
        flat = pa.array(values.reshape(-1))
        columns[column] = pa.FixedSizeListArray.from_arrays(flat, size) if statistics else pa.nulls(n, kind)
    there = (t == at) & (width > 0)
    offsets = np.concatenate([[0], np.cumsum(there * width)]).astype(np.int32)
    flat = pa.array(generator.random(int(offsets[-1]), dtype=np.float32))
    columns["vector"] = pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(~there))
    return pa.table(columns)


def files(folder: pathlib.Path, n: int, shards: int = 4) -> Iterator[pathlib.Path]:
    """Write every job's shards."""
    generator = np.random.default_rng(0)
    for shard in range(shards):
        ids = [f"{i:032x}" for i in range(shard, n, shards)]
        for job, blocks in BLOCKS.items():
            parts = [rows(ids, name, layout, generator) for name, layout in blocks.items()]
            table = pa.concat_tables(parts).sort_by([(c, "ascending") for c in evidence.KEY])
            path = folder / f"{job}-{shard}.parquet"
            pq.write_table(table, path, compression="zstd", row_group_size=65_536)
            yield path


def child(folder: pathlib.Path, n: int) -> None:
    """Score everything, print the table."""
    start, cpu = time.perf_counter(), time.process_time()
    names = [name for name, attack in attacks.REGISTRY.items() if attack.module]
    found = evidence.read(sorted(folder.glob("*.parquet")), SHAPE, attacks.blocks(names))
    generator = np.random.default_rng(1)
    member = pl.Series(generator.random(n) < 0.5)
    labels = pl.DataFrame({"sample_id": found.ids.tolist(), "group": found.ids.tolist(), "member": member})
    known = labels.with_columns(pl.when(pl.arange(n) % 2 == 0).then("member").alias("member"))
    calibration = Calibration.of(found.ids, known, ScoresOptions())
    print(f"{'reading':22s} {time.perf_counter() - start:6.2f} s, CPU {time.process_time() - cpu:6.2f} s")
    results: list[tuple] = []
    for name in names:
        before, cpu_before = time.perf_counter(), time.process_time()
        scored = list(attacks.run(name, found, calibration))
        results += scored
        took, cpu_took = time.perf_counter() - before, time.process_time() - cpu_before
        print(f"{name:22s} {took:6.2f} s, CPU {cpu_took:6.2f} s {len(scored):3d} variants", flush=True)
    before = time.perf_counter()
    table = scores.long_table(found, results).to_arrow().cast(tables.SCHEMAS["scores"])
    tables.write(folder / "scores.parquet", table, "scores", {})
    print(f"{'table':22s} {time.perf_counter() - before:6.2f} s, {len(table)} rows")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"total {time.perf_counter() - start:.1f} s (limit 60), CPU {time.process_time() - cpu:.1f} s, "
        f"peak {peak:.2f} GB (limit 2)"
    )


def main() -> None:
    """Write the features, then score them in a process of its own, whose memory is only its own."""
    if len(sys.argv) > 1:
        child(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
        return
    import subprocess

    n = 10_000
    with tempfile.TemporaryDirectory() as folder:
        size = sum(path.stat().st_size for path in files(pathlib.Path(folder), n))
        print(f"{n} images, {size / 2**30:.2f} GB of features", flush=True)
        # One worker: two would share the fits, and their memory is not this process's.
        subprocess.run([sys.executable, "-m", "benchmarks.attacks", folder, str(n)], check=True)


if __name__ == "__main__":
    main()
