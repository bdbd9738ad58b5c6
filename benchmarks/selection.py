"""Selecting rows of LAION metadata: speed, memory from 1x to 10x input, and the ratio to a lambda of `datasets`.

Writes 5 million synthetic rows as wide as LAION's, ten files, to a temporary folder that is deleted afterwards. One
measurement is one process with one polars thread. CPU seconds are user + system: they hold on a shared machine, where
wall time does not. The peer is what the paper's authors did, `load_dataset` and `filter` with a lambda, on one of the
files.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import polars as pl

ROWS, FILES = 500_000, 10
WORDS = (
    "the a of red blue wooden vintage poster print photo landscape portrait black white house dog cat woman man art "
    "wall canvas decor kitchen summer stock vector illustration background free shipping sale mountain lake"
)
COLUMNS = {
    "url": "URL", "caption": "TEXT", "language": "LANGUAGE", "width": "WIDTH", "height": "HEIGHT",
    "aesthetic": "AESTHETIC_SCORE", "similarity": "similarity", "punsafe": "punsafe", "pwatermark": "pwatermark",
}  # fmt: skip


def synthetic(seed: int, rows: int = ROWS) -> pl.DataFrame:
    """Rows with LAION's columns and widths: a URL of about 90 characters, a caption of 4 to 15 words; half score 5."""
    r = np.random.default_rng(seed)
    number = [pl.Series(r.integers(2**60, 2**63, rows)).cast(pl.String) for _ in range(2)]
    length = r.integers(4, 16, rows)
    known = np.array(WORDS.split())
    words = {f"w{i}": pl.Series(known[r.integers(0, len(known), rows)]) for i in range(15)}
    text = pl.DataFrame({"a": number[0], "b": number[1], **words}).select(
        URL=pl.format(
            "https://cdn{}.example.com/s/files/{}/products/{}_large.jpg", pl.col("a").str.slice(0, 3), "a", "b"
        ),
        TEXT=pl.concat_str(
            (pl.when(pl.lit(pl.Series(length > i))).then(name) for i, name in enumerate(words)),
            separator=" ",
            ignore_nulls=True,
        ),
    )
    return text.with_columns(
        LANGUAGE=pl.Series(np.array(["en", "de", "fr", "es"])[r.choice(4, rows, p=[0.7, 0.1, 0.1, 0.1])]),
        WIDTH=pl.Series(r.integers(64, 2048, rows).astype(float)),
        HEIGHT=pl.Series(r.integers(64, 2048, rows).astype(float)),
        similarity=pl.Series(r.uniform(0.2, 0.5, rows)),
        punsafe=pl.Series(r.beta(0.3, 4, rows).astype(np.float32)),
        pwatermark=pl.Series(r.beta(0.5, 1, rows).astype(np.float32)),
        AESTHETIC_SCORE=pl.Series(r.normal(5, 0.6, rows).astype(np.float32)),
    )


OURS = """
import pathlib, sys, time
from mia import selection, sources
from mia.config import SelectionOptions
columns, what, files, options = COLUMNS, sys.argv[1], sys.argv[2:], SelectionOptions(min_aesthetic=5.0)
sources.scan(pathlib.Path(files[0]))[0].head(1).collect()
cpu, wall, rows = time.process_time(), time.perf_counter(), 0
for file in files:
    pieces = sources.named(sources.scan(pathlib.Path(file)), columns, file)
    if what == "write":
        counts = selection.write(pieces, pathlib.Path(file).with_name("selected"), options, {})
    else:
        counts = selection.count(pieces, options)
    rows += sum(counts.values())
DONE
"""
THEIRS = """
import pathlib, sys, time, datasets
datasets.disable_progress_bars()
cpu, wall, files = time.process_time(), time.perf_counter(), sys.argv[2:]
cache = pathlib.Path(files[0]).with_name(sys.argv[1])
table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
kept = table.filter(lambda row: row["AESTHETIC_SCORE"] > 5.0)
kept.to_parquet(str(cache / "kept.parquet")) if sys.argv[1] == "to_parquet" else kept.save_to_disk(str(cache / "kept"))
rows = len(table)
DONE
"""
DONE = """
import json, re
# ru_maxrss would be the parent's, if that is more
peak = int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
print(json.dumps([rows, cpu, wall, peak / 1024]))
"""


def measured(code: str, what: str, files: list[pathlib.Path]) -> tuple[float, float, float]:
    """Million rows a CPU second, million rows a second, peak MB, of `code` in a process of its own."""
    code = code.replace("DONE", DONE).replace("COLUMNS", repr(COLUMNS))
    threads = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-c", code, what, *map(str, files)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | threads)
    rows, cpu, wall, peak = json.loads(done.stdout.splitlines()[-1])
    return rows / cpu / 1e6, rows / wall / 1e6, peak


def main() -> None:
    """Prints each rate beside its goal."""
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder) / f"part-{i:05d}.parquet" for i in range(FILES)]
        for seed, file in enumerate(files):
            synthetic(seed).write_parquet(file, compression="snappy", row_group_size=100_000)
        big = pathlib.Path(folder) / "big.parquet"
        pl.scan_parquet(files).sink_parquet(big, compression="snappy", row_group_size=ROWS)
        size = sum(file.stat().st_size for file in files) / 1e6
        print(f"{ROWS * FILES:,} rows, {len(COLUMNS)} columns, {FILES} files, {size:.0f} MB; one thread")
        ours = measured(OURS, "write", files[:1])
        for what, goal in (("write", 1.5), ("count", 15)):
            one = ours if what == "write" else measured(OURS, what, files[:1])
            ten, whole = measured(OURS, what, files), measured(OURS, what, [big])
            print(
                f"{what}: {ten[0]:.2f} M rows a CPU second, {ten[1]:.2f} by the clock (goal, on a quiet core: {goal})"
            )
            print(f"  10x in one file of 500,000-row groups: {whole[0]:.2f} M rows a CPU second")
            print(
                f"  peak memory {one[2]:.0f} MB at 1x, {ten[2]:.0f} MB at 10x in files, {whole[2]:.0f} MB in one file",
                end="",
            )
            print(" (limit: 512 MB, flat)")
        for how in ("to_parquet", "save_to_disk"):  # a Parquet file, as ours; or its own uncompressed format
            theirs = measured(THEIRS, how, files[:1])
            cpu, wall = (mine / peer for mine, peer in zip(ours[:2], theirs[:2], strict=True))
            print(f"datasets.filter with a lambda and {how}, 1 file: {theirs[0]:.3f} M rows a CPU second,", end="")
            print(f" {theirs[2]:.0f} MB\n  ours on that file: {cpu:.1f}x by CPU, {wall:.1f}x by the clock (goal: 15x)")


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"took {time.perf_counter() - start:.0f} s")
