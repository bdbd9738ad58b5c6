"""What the model reveals about each image: losses at every timestep, and the statistics that attacks are made from.

The engine never sees a membership label. Formulas: arXiv 2306.12983 as its authors' code computes them (`attacks.md`
1.1), with noise keyed by sample and draw, losses in float64 sums, and the VAE's mode instead of a sample by default.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mia import models, settings, tables, walks
from mia.config import FeaturesOptions
from mia.errors import UserError
from mia.walks import Counts

if TYPE_CHECKING:
    from mia.networks import Network
    from mia.reader import Batch, Samples


def extract(
    network: Network, samples: Samples, options: FeaturesOptions, seed: int, batch_size: int, progress: Callable = iter
) -> tuple[pa.Table, Counts]:
    """The features table of one job, for every sample, draw and timestep, and the work done.

    Args:
        network: the target's denoiser and decoder on their device.
        samples: one shard.
        options: of one job, as `walks.jobs` gives them.
        batch_size: pairs of image and draw for each call of the denoiser; changes no result. Where the device's memory
            does not hold them, it is halved, down to `models.MIN_BATCH`, and the batch read again.
        progress: wraps the iterable of batches.

    Raises:
        UserError: a value is not finite; names sample and timestep. Or too few pairs fit into memory.
    """
    import torch

    from mia.reader import prepare

    pin = network.device.type == "cuda"
    runs = _runs(len(samples.ids), options, batch_size, whole=pin)
    batches = Ahead(runs, lambda run: prepare(samples, options, seed, run[0], run[1], pin))
    engine = Engine(network, samples.condition, options)
    with torch.inference_mode():
        for batch in progress(batches):
            engine.read(batch)
    bands = tables.bands(samples.latents["image"].shape[1])
    pieces = [_as_table(block, _joined(rows), samples.ids, bands) for (block, _), rows in engine.kept.items()]
    return tables.check(pa.concat_tables(pieces or [_nothing(bands)]), "features"), engine.counts


def _runs(n_samples: int, options: FeaturesOptions, batch_size: int, whole: bool) -> list[tuple[np.ndarray, int]]:
    """Pairs of image and draw, int64[b, 2], in batches, and how many of each batch are real.

    First draws are in batches of their own where a probe reads nothing else. `whole` fills the last batch up, so that
    compiled kernels see one shape.
    """
    draws = range(walks.draws(options))
    pairs = np.array([(i, d) for i in range(n_samples) for d in draws], dtype=np.int64).reshape(-1, 2)
    apart = any(not probe.every_draw for probe in walks.walked(options))
    parts = [pairs[pairs[:, 1] == 0], pairs[pairs[:, 1] > 0]] if apart else [pairs]
    runs = [(part[run], real) for part in parts for run, real in models.batches(len(part), batch_size)]
    if not whole:
        return runs
    fill = [(0, max(0, batch_size - len(run))) for run, _ in runs]
    return [(np.pad(run, (rows, (0, 0)), mode="edge"), real) for (run, real), rows in zip(runs, fill, strict=True)]


class Ahead:
    """The batches of a shard, the next one prepared while one is read; knows their number."""

    def __init__(self, runs: Sequence[Any], prepare: Callable[[Any], Batch]):
        self.runs, self.prepare = runs, prepare

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Batch]:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            coming = [thread.submit(self.prepare, run) for run in self.runs[:1]]
            for following in self.runs[1:]:
                coming.append(thread.submit(self.prepare, following))
                yield coming.pop(0).result()
            for last in coming:
                yield last.result()


class Engine:
    """Reads batches and remembers what they gave and what they cost."""

    def __init__(self, network: Network, condition: dict[str, Any], options: FeaturesOptions):
        import torch

        self.network, self.options = network, options
        on = network.device
        self.condition = {
            # On a GPU as they are stored: text states of a whole shard, and no more than float16 was ever kept of them.
            name: value.to(on, torch.float16 if on.type == "cuda" and value.is_floating_point() else value.dtype)
            for name, value in condition.items()
        }
        self.kept: dict[tuple[str, frozenset], list[dict]] = {}  # by block and by what was kept of it
        self.counts = Counts()
        self.memory = models.Memory(on)

    def read(self, batch: Batch) -> None:
        """Walk the job for one batch, or for its parts if the device's memory does not hold it whole."""
        size = len(batch.image)
        self.memory.read(
            lambda rows, real: self._walk(batch if len(rows) == size else batch.part(rows, real)), size, batch.real
        )

    def _walk(self, batch: Batch) -> None:
        from mia.reader import Reader

        reader = Reader(self.network, self.condition, batch, self.options)
        walks.walk(reader, first_draw=bool((batch.draw == 0).all()))
        self.counts += reader.counts
        for block, entry in reader.kept:
            self.kept.setdefault((block, frozenset(entry)), []).append(entry)


def _joined(entries: list[dict]) -> dict[str, np.ndarray]:
    """Entries alike, each of one batch and timestep, as arrays; here values come to the host."""
    import torch

    joined = {
        name: torch.cat([entry[name] for entry in entries]).cpu().numpy()
        for name, value in entries[0].items()
        if isinstance(value, torch.Tensor)
    }
    rows = [len(entry["image"]) for entry in entries]
    return joined | {
        "image": np.concatenate([entry["image"] for entry in entries]),
        "draw": np.concatenate([entry["draw"] for entry in entries]),
        "timestep": np.repeat([entry["timestep"] for entry in entries], rows),
    }


def _nothing(bands: int) -> pa.Table:
    empty = {name: np.empty(0, np.int64) for name in ("image", "draw", "timestep")}
    return _as_table("", empty, [], bands)


def _as_table(block: str, columns: dict[str, np.ndarray], ids: Sequence[str], bands: int) -> pa.Table:
    """One block's arrays as a features table; what was not computed is empty."""
    _refuse_nonfinite(columns, ids)
    n = len(columns["image"])
    fields: dict[str, pa.Array] = {
        "sample_id": pa.array(np.asarray(ids, dtype=object)[columns["image"]], pa.string()),
        "block": pa.array([block] * n, pa.string()),
        "timestep": pa.array(columns["timestep"].astype(np.int32)),
        "draw": pa.array(columns["draw"].astype(np.int32)),
    }
    for name in settings.LOSSES:
        fields[name] = pa.array(columns[name].astype(np.float32)) if name in columns else pa.nulls(n, pa.float32())
    for name, width in (("gram", 10), ("norms", 10), ("bands", bands)):
        if name in columns:
            values = columns[name].reshape(-1)
            fields[name] = pa.FixedSizeListArray.from_arrays(pa.array(values, mask=np.isnan(values)), width)
        else:
            fields[name] = pa.nulls(n, pa.list_(pa.float64(), width))
    kind = tables.SCHEMAS["features"].field("vector").type
    vectors = columns.get("vector")
    fields["vector"] = pa.array(list(vectors.astype(np.float32)), kind) if vectors is not None else pa.nulls(n, kind)
    return pa.table(fields)


def _refuse_nonfinite(columns: dict, ids: Sequence[str]) -> None:
    for name, what in (*((name, name) for name in settings.LOSSES), ("finite", "prediction"), ("vector", "value")):
        if name not in columns:
            continue
        values = columns[name].reshape(len(columns["image"]), -1)
        bad = ~(values if name == "finite" else np.isfinite(values)).all(1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise UserError(
                f"the model gives a {what} that is not finite ({int(bad.sum())} of {len(bad)} evaluations)",
                f"sample {ids[columns['image'][row]]}, timestep {columns['timestep'][row]}",
                "check the weights, or run in float32",
            )
