"""One epoch of feeding text states to a classifier on the CPU, in random order, as batches of float32.

The peer is the reference's path restated: all states in memory as float32, a dataset that returns one row, and torch's
DataLoader with shuffling and worker processes. Ours reads a memory-mapped float16 file with one thread. Nothing is
computed on the batches. Both run in turn and the best of each is taken, because other processes come and go.
Goal: 4x (`performance.md`, E5). Source: `laion-mi/iterative_sanitization.py` of arXiv 2306.12983.
"""

from __future__ import annotations

import logging
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

from mia import paper_sanitizer

ROWS, WIDTH, BATCH = 20_000, 77 * 768, 128  # the batch of the third classifier, which takes nearly all of the time
GOAL, TURNS = 4.0, 2


class PerRow(torch.utils.data.Dataset):
    """What the reference feeds from: a row and its label at a time."""

    def __init__(self, states: torch.Tensor, labels: torch.Tensor) -> None:
        self.states, self.labels = states, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.states[row], self.labels[row]


def states(rows: np.ndarray) -> np.ndarray:
    """Made-up text states, float16[n, WIDTH], the same for a row each time; only a window of noise, to be quick."""
    noise = np.random.default_rng(0).standard_normal(2 * WIDTH, dtype=np.float32).astype(np.float16)
    return np.stack([noise[row % WIDTH : row % WIDTH + WIDTH] for row in rows])


def seconds(epoch: Callable[[], Iterable]) -> float:
    """Wall time of one pass, which must bring every row."""
    start = time.perf_counter()
    fed = sum(len(x) for x, _ in epoch())
    assert fed == ROWS, fed
    return time.perf_counter() - start


def main() -> None:
    """Print the ratio, the rates and the goal."""
    torch.set_num_threads(1)
    workers = min(4, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        held = paper_sanitizer.hold(states, np.arange(ROWS), torch.device("cpu"), pathlib.Path(folder))
        labels, loader = torch.zeros((ROWS, 1)), torch.Generator().manual_seed(0)
        dataset = PerRow(held.float(), labels)
        peer = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=workers)

        def ours() -> Iterable:
            order = paper_sanitizer.shuffled(ROWS, loader)
            return ((x, labels[rows]) for rows, x in paper_sanitizer.feed(held, order, BATCH))

        times = np.array([(seconds(lambda: peer), seconds(ours)) for _ in range(TURNS)]).min(axis=0)
    size = ROWS * WIDTH * 4 / 1e9
    text = "%d rows of %d: DataLoader with %d workers %.2f GB/s of float32, mapped float16 with one thread %.2f GB/s"
    logging.info(text, ROWS, WIDTH, workers, *(size / times))
    logging.info("ratio %.1f, goal %.0f", times[0] / times[1], GOAL)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
