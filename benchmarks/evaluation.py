"""The evaluation's three heavy loops on real sizes: the paper's protocol, the bootstrap, and the blind audit.

The peer of the first is the authors' own loop, scikit-learn's `roc_curve` for each subsample and column; results are
held to be bit-equal. The others have a limit in seconds. The audit needs the real captions of ../shared/data, and is
left out without them.
"""

from __future__ import annotations

import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from sklearn.metrics import roc_curve

from mia import resampling

SIDE, COLUMNS, RESAMPLES, SIZE, TARGET = 5_000, 78, 100, 1_000, 0.01
CAPTIONS = pathlib.Path(__file__).parent.parent.parent / "shared" / "data" / "laion_mi_captions"


def population() -> tuple[np.ndarray, np.ndarray]:
    """Scores of 5,000 members and 5,000 non-members, 78 columns, members a little higher."""
    generator = np.random.default_rng(0)
    member = np.arange(2 * SIDE) < SIDE
    return generator.normal(size=(2 * SIDE, COLUMNS)) + 0.2 * member[:, None], member


def by_roc_curve(scores: np.ndarray, member: np.ndarray, resamples: int) -> np.ndarray:
    """The loop of `attacks/analysis.py` in Ankowa/inz, without its rescaling, which changes no order."""
    drawn = np.random.RandomState(123)
    sides = np.flatnonzero(member), np.flatnonzero(~member)
    out = np.empty((resamples, scores.shape[1]))
    for r in range(resamples):
        rows = np.concatenate([side[drawn.choice(len(side), SIZE, replace=False)] for side in sides])
        for c in range(scores.shape[1]):
            fpr, tpr, _ = roc_curve(member[rows], scores[rows, c])
            out[r, c] = tpr[np.flatnonzero(fpr <= TARGET)[-1]]
    return out


def paper() -> None:
    """Protocol `paper`, ours against the loop; both do all 100 subsamples of all 78 columns."""
    scores, member = population()
    start = time.perf_counter()
    ours = resampling.subsampled(scores, member, (TARGET,), RESAMPLES, SIZE, 123)[:, :, 0]
    middle = time.perf_counter()
    theirs = by_roc_curve(scores, member, RESAMPLES)
    end = time.perf_counter()
    assert (ours == theirs).all(), "not bit-equal"
    fast, slow = middle - start, end - middle
    print(f"paper protocol, {SIDE:,} + {SIDE:,} x {COLUMNS}, {RESAMPLES} subsamples, bit-equal: {fast:.3f} s,")
    print(f"  roc_curve in loops {slow:.1f} s: {slow / fast:.0f}x (goal: 40x)")


def bootstrap() -> None:
    """10,000 resamples of AUC and TPR of 17 columns."""
    scores, member = population()
    start = time.perf_counter()
    generator = np.random.default_rng(0)
    resampling.bootstrap(scores[:, :17], member, np.arange(2 * SIDE), (TARGET,), 10_000, generator)
    print(f"bootstrap, 10,000 resamples of 17 columns: {time.perf_counter() - start:.1f} s (limit: 60 s)")


def audit() -> None:
    """`mia audit` on 8,037 + 8,037 real captions, as a user runs it."""
    if not CAPTIONS.is_dir():
        print(f"audit: left out, {CAPTIONS} is absent")
        return
    with tempfile.TemporaryDirectory() as folder:
        words = ["--members", CAPTIONS / "members.parquet", "--nonmembers", CAPTIONS / "nonmembers.parquet"]
        command = [sys.executable, "-m", "mia", "audit", *map(str, words), "--output", f"{folder}/a.parquet"]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"audit of 8,037 + 8,037 captions: {seconds:.0f} s, {peak:.2f} GB at most (limits: 120 s, 2 GB)")


if __name__ == "__main__":
    paper()
    bootstrap()
    audit()
