"""One target's stored features as arrays over (sample, timestep, draw), which every attack is a cheap function of.

Symbols are those of `docs/attacks.md`: z0 the latent, eps the noise, `cond` and `null` the noise predictions under the
caption and under the empty prompt. In the blocks of PIA the anchor e0 stands in the place of eps.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mia import tables
from mia.errors import UserError

OPERANDS = ("z0", "eps", "null", "cond")
CONDITIONS = ("cond", "null")  # under the caption, under the empty prompt
LOSSES = ("model_loss", "latent_error", "pixel_error")
COLUMNS = ("sample_id", "block", "timestep", "draw", *LOSSES, "gram", "norms", "bands", "vector")
KEY = COLUMNS[:4]
BATCH = 8192  # rows read at once: a fixed-size list takes its full width in memory even where it is empty
# Beginning of a block's name -> the job that makes it, and the probe to name beside it.
SOURCES = {
    "clean": ("clean", "clean"), "pian": ("clean", "pian"), "pia": ("clean", "pia"), "secmi": ("clean", "secmi"),
    "noised": ("noised", "noised"), "prompt": ("prompts", "prompts"), "stepback": ("noised", "stepback"),
    "aggregation": ("noised", "aggregation"), "crop": ("crops", "crops"), "gsa": ("gradients", "gsa"),
    "gradient-masking": ("gradients", "gradient_masking"), "noise-opt": ("gradients", "noise_optimisation"),
    "generations": ("generations", "generations"), "variations": ("variations", "variations"),
}  # fmt: skip


class Evidence:
    """Stored features of n samples, block by block; what a block holds is placed when it is first asked for.

    Attributes:
        ids: str[n], ascending; the first axis of every array.
        shape: Channels, height and width of a latent.
        elements: Their product, d: a mean over a latent is a sum divided by it.
        blocks: Names of the blocks that are there.
    """

    def __init__(self, parts: Iterable[pa.Table | pa.RecordBatch], shape: Sequence[int]) -> None:
        """Take in features tables, in any order of shards, blocks and rows; columns that no attack reads may lack."""
        self.shape = tuple(int(side) for side in shape)
        self.elements = math.prod(self.shape)
        self._pieces: dict[str, list[pa.Table]] = {}
        for part in parts:
            for name, piece in _by_block(part):
                self._pieces.setdefault(name, []).append(piece)
        found = [piece["sample_id"].unique() for pieces in self._pieces.values() for piece in pieces]
        ids = pa.chunked_array(found, pa.string()).unique()
        self._ids = ids.take(pc.array_sort_indices(ids))
        self.ids = np.array(self._ids.to_pylist(), dtype=object)
        self.blocks = tuple(sorted(self._pieces))
        self._places: dict[str, tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]] = {}
        self._arrays: dict[tuple[str, str], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def has(self, block: str) -> bool:
        """Whether the block was extracted."""
        return block in self._pieces

    @property
    def has_null(self) -> bool:
        """Whether anything was predicted under the empty prompt; unconditional models have none."""
        return any(name.endswith("-null") for name in self.blocks) or any(
            self.has(block) and bool(self.known(block, "null")) for block in ("noised", "clean")
        )

    def need(self, block: str) -> None:
        """Nothing, or the error that names the command which makes the block."""
        if not self.has(block):
            raise UserError(f"block '{block}' was not extracted", "features", f"run `{command(block)}`")

    def need_null(self, block: str, attack: str) -> None:
        """Nothing, or the error that says that this attack cannot be had of a model without an empty prompt."""
        if not self.known(block, "null"):
            raise UserError("no prediction under the empty prompt", f"block '{block}'", f"leave {attack} out")

    def timesteps(self, block: str) -> tuple[int, ...]:
        """The block's timesteps, ascending: the second axis of its arrays."""
        return self._place(block)[1]

    def draws(self, block: str) -> tuple[int, ...]:
        """The block's draws, ascending: the third axis of its arrays."""
        return self._place(block)[2]

    def at(self, block: str, timesteps: Iterable[int]) -> list[int]:
        """Positions of timesteps on the second axis of the block's arrays.

        Raises:
            UserError: the block was not extracted, or not at one of them.
        """
        here = {t: i for i, t in enumerate(self.timesteps(block))}
        for t in timesteps:
            if t not in here:
                raise UserError(f"block '{block}' has no timestep {t}", "features", f"run `{command(block)}`")
        return [here[t] for t in timesteps]

    def losses(self, block: str, name: str, timesteps: Sequence[int] | None = None) -> np.ndarray:
        """One of the three losses, float64[n, T, K]."""
        return self._known(self._column(block, name), block, name, timesteps)

    def gram(self, block: str, timesteps: Sequence[int] | None = None) -> np.ndarray:
        """Sums of products of (z0, eps, null, cond), float64[n, T, K, 4, 4], symmetric; NaN where there is none."""
        kept = self._column(block, "gram")
        kept = kept if timesteps is None else kept[:, self.at(block, timesteps)]
        where = np.empty((4, 4), dtype=int)
        where[np.triu_indices(4)] = where.T[np.triu_indices(4)] = np.arange(10)
        return kept[..., where]

    def product(self, block: str, one: str, other: str, timesteps: Sequence[int] | None = None) -> np.ndarray:
        """The sum over a latent of `one` times `other`, float64[n, T, K]; both are among `OPERANDS`."""
        low, high = sorted((OPERANDS.index(one), OPERANDS.index(other)))
        index = 4 * low - low * (low - 1) // 2 + high - low
        return self._known(self._column(block, "gram")[..., index], block, f"product {one}*{other}", timesteps)

    def distance(self, block: str, one: str, other: str, timesteps: Sequence[int] | None = None) -> np.ndarray:
        """The sum over a latent of (one - other)^2, float64[n, T, K], from the Gram matrix."""
        parts = [self.product(block, *pair, timesteps) for pair in ((one, one), (one, other), (other, other))]
        return np.maximum(parts[0] - 2 * parts[1] + parts[2], 0.0)

    def norm(self, block: str, name: str, timesteps: Sequence[int] | None = None) -> np.ndarray:
        """One of `tables.NORM_NAMES`, a sum of powers without the root, float64[n, T, K]."""
        return self._known(
            self._column(block, "norms")[..., tables.NORM_NAMES.index(name)], block, f"norm {name}", timesteps
        )

    def bands(self, block: str, timesteps: Sequence[int] | None = None, condition: str = "cond") -> np.ndarray:
        """Energy of the prediction minus eps by channel, then that of its 2x2 block means, float64[n, T, K, C + 1]."""
        width, first = self.shape[0] + 1, CONDITIONS.index(condition)
        kept = self._column(block, "bands")[..., first * width : (first + 1) * width]
        if kept.shape[-1] < width:  # extracted when the caption's alone were kept
            raise UserError(f"block '{block}' holds no bands of '{condition}'", "features", f"run `{command(block)}`")
        return self._known(kept, block, "band energies", timesteps)

    def vectors(self, block: str) -> np.ndarray:
        """What the block's own attack keeps, float32[n, T, K, k], at the timesteps where it keeps something."""
        if (block, "vector") not in self._arrays:
            place, steps, draws = self._place(block)
            pieces = [piece for piece in self._pieces[block] if "vector" in piece.column_names]
            there = np.concatenate([_there(piece) for piece in self._pieces[block]])
            if not there.any():
                raise UserError(f"block '{block}' holds no vectors", "features", f"run `{command(block)}`")
            # Placed among the timesteps that keep one: of SecMI's fifteen one does, and maps are large.
            sample, t, draw = np.unravel_index(place[there], (len(self.ids), len(steps), len(draws)))
            kept, t = np.unique(t, return_inverse=True)
            rows = [_numbers(piece.filter(piece["vector"].is_valid()), "vector") for piece in pieces]
            values = np.concatenate(_widened(rows, block, "vector"))
            out = np.full((len(self.ids), len(kept), len(draws), values.shape[1]), np.nan, values.dtype)
            out[sample, t, draw] = values
            self._arrays[block, "vector"] = out
            self._release(block, "vector")
        return self._arrays[block, "vector"]

    def known(self, block: str, condition: str) -> tuple[int, ...]:
        """The timesteps at which the block holds a noise prediction of this condition."""
        place = {"null": 7, "cond": 9}[condition]
        there = ~np.isnan(self._column(block, "gram")[..., place]).all(axis=(0, 2))
        return tuple(t for t, known in zip(self.timesteps(block), there, strict=True) if known)

    def _known(self, values: np.ndarray, block: str, what: str, timesteps: Sequence[int] | None) -> np.ndarray:
        """`values` at these timesteps, if all of them were computed."""
        steps = self.timesteps(block) if timesteps is None else tuple(timesteps)
        values = values if timesteps is None else values[:, self.at(block, steps)]
        empty = np.isnan(values)
        if empty.any():
            i, t = np.argwhere(empty)[0][:2]
            where = f"sample {self.ids[i]}, timestep {steps[t]}"
            raise UserError(f"block '{block}' holds no {what}", where, f"run `{command(block)}`")
        return values

    def _place(self, block: str) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
        """Where each row of the block goes, int64[rows] into n x T x K; its timesteps; its draws."""
        if block not in self._places:
            self.need(block)
            pieces = self._pieces[block]
            samples = [pc.index_in(piece["sample_id"], value_set=self._ids) for piece in pieces]
            sample, timestep, draw = (
                np.concatenate([column.to_numpy() for column in columns]).astype(np.int64)
                for columns in (samples, [p["timestep"] for p in pieces], [p["draw"] for p in pieces])
            )
            (steps, t), (draws, k) = (np.unique(axis, return_inverse=True) for axis in (timestep, draw))
            place = (sample * len(steps) + t) * len(draws) + k
            seen = np.bincount(place, minlength=len(self.ids) * len(steps) * len(draws))
            self._refuse(block, seen, steps, draws)
            self._places[block] = place, tuple(steps.tolist()), tuple(draws.tolist())
            for name in ("sample_id", "timestep", "draw"):
                self._release(block, name)
        return self._places[block]

    def _refuse(self, block: str, seen: np.ndarray, steps: np.ndarray, draws: np.ndarray) -> None:
        for wrong, what, fix in (
            (seen > 1, "stand twice", "give each shard once"),
            (seen == 0, "are missing", f"extract all samples: `{command(block)}`"),
        ):
            if wrong.any():
                i, t, k = np.unravel_index(np.flatnonzero(wrong)[0], (len(self.ids), len(steps), len(draws)))
                where = f"sample {self.ids[i]}, timestep {steps[t]}, draw {draws[k]}"
                raise UserError(f"{wrong.sum()} of {len(seen)} rows of block '{block}' {what}", where, fix)

    def _column(self, block: str, name: str) -> np.ndarray:
        """A column as float[n, T, K] or, of lists, float[n, T, K, width]; NaN where it is empty."""
        if (block, name) not in self._arrays:
            place, steps, draws = self._place(block)
            values = np.concatenate(_widened([_numbers(piece, name) for piece in self._pieces[block]], block, name))
            out = np.empty_like(values)
            out[place] = values
            self._arrays[block, name] = out.reshape(len(self.ids), len(steps), len(draws), *values.shape[1:])
            self._release(block, name)
        return self._arrays[block, name]

    def _release(self, block: str, name: str) -> None:
        """What has become an array is needed as a table no more."""
        self._pieces[block] = [p.drop_columns(name) if name in p.column_names else p for p in self._pieces[block]]


def command(block: str) -> str:
    """The command that makes a block."""
    if block.startswith("setting-"):
        return f"mia features --settings {int(block.removeprefix('setting-'))}"
    start = max((s for s in SOURCES if block.startswith(s)), key=len, default="")
    job, probe = SOURCES.get(start, (block, block))
    crop = f" --crops {block.removeprefix('crop-')}" if start == "crop" else ""
    return f"mia features --block {job} --probes {probe}{crop}"


def read(paths: Iterable[object], shape: Sequence[int], blocks: Iterable[str] | None = None) -> Evidence:
    """Evidence from features files; of the blocks given only, where some are.

    A name that ends in `*` stands for all that begin so.
    """
    wanted = None if blocks is None else tuple(blocks)
    return Evidence(_batches(paths, wanted), shape)


def _batches(paths: Iterable[object], wanted: tuple[str, ...] | None) -> Iterator[pa.RecordBatch]:
    for path in map(pathlib.Path, map(str, paths)):
        with tables.parquet(path, "features") as file:
            names = file.schema_arrow.names
            absent = [column for column in KEY if column not in names]
            if absent:
                raise UserError(f"features table has no column '{absent[0]}'", path, "is it another table?")
            for batch in file.iter_batches(BATCH, columns=[column for column in COLUMNS if column in names]):
                yield batch if wanted is None else batch.filter(_among(batch["block"], wanted))


def _among(column: pa.Array, wanted: tuple[str, ...]) -> pa.Array:
    mask = pc.is_in(column, value_set=pa.array([name for name in wanted if not name.endswith("*")], pa.string()))
    for name in wanted:
        if name.endswith("*"):
            mask = pc.or_(mask, pc.starts_with(column, name[:-1]))
    return mask


def _by_block(part: pa.Table | pa.RecordBatch) -> Iterator[tuple[str, pa.Table]]:
    """Each block's rows, without the columns that are empty there."""
    table = part if isinstance(part, pa.Table) else pa.Table.from_batches([part])
    table = table.select([name for name in COLUMNS if name in table.column_names])
    for name in table["block"].unique().to_pylist():
        rows = table.filter(pc.equal(table["block"], name))
        kept = [c for c in rows.column_names if c != "block" and (c in KEY or rows[c].null_count < len(rows))]
        rows = rows.select(kept)
        if "vector" in kept:  # few rows have one, and each takes its full width
            rows = rows.set_column(kept.index("vector"), "vector", _narrow(rows["vector"]))
        yield name, rows


def _narrow(column: pa.ChunkedArray) -> pa.Array:
    """Fixed-size lists as lists, whose empty entries take no room."""
    array = column.combine_chunks()
    if not pa.types.is_fixed_size_list(array.type):
        return array
    there = array.is_valid().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(there * array.type.list_size)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), array.flatten(), mask=pa.array(~there))


def _there(piece: pa.Table) -> np.ndarray:
    """Which rows of a block have a vector, bool[rows]."""
    if "vector" not in piece.column_names:
        return np.zeros(len(piece), dtype=bool)
    return piece["vector"].is_valid().to_numpy()


def _numbers(piece: pa.Table, name: str) -> np.ndarray:
    """A column as float[rows] or float[rows, width], NaN where it is empty; width 0 where all of it is."""
    listed = name not in LOSSES
    if name not in piece.column_names:
        return np.full((len(piece), 0) if listed else len(piece), np.nan)
    column = piece[name].combine_chunks()
    if not listed:
        return column.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    there = column.is_valid().to_numpy(zero_copy_only=False)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    out = np.full((len(piece), len(flat) // max(int(there.sum()), 1)), np.nan, flat.dtype)
    if there.sum() * out.shape[1] != len(flat):
        raise UserError(f"features column '{name}' holds lists of several lengths", "features", "extract it anew")
    out[there] = flat.reshape(-1, out.shape[1])
    return out


def _widened(parts: list[np.ndarray], block: str, name: str) -> list[np.ndarray]:
    """All parts with one width: those without a value get as many empty entries as the others have."""
    if parts[0].ndim == 1:
        return parts
    widths: Any = {part.shape[1] for part in parts} - {0}
    if len(widths) > 1:
        raise UserError(f"block '{block}' holds a '{name}' of lengths {sorted(widths)}", "features", "extract it anew")
    if not widths:
        raise UserError(f"block '{block}' holds no '{name}'", "features", f"run `{command(block)}`")
    width, dtype = widths.pop(), next(part.dtype for part in parts if part.shape[1])
    return [p if p.shape[1] else np.full((len(p), width), np.nan, dtype) for p in parts]
