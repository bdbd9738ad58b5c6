"""Score tables from anywhere: Parquet, CSV, or numpy's npz with named arrays."""

from __future__ import annotations

import pathlib
import zipfile

import numpy as np
import polars as pl

from mia.errors import UserError


def read(path: pathlib.Path) -> pl.DataFrame:
    """The table at `path`, by its ending: .csv, .npz, else Parquet.

    In an npz, `sample_id` (else rows are numbered) and `member` name arrays of n; any other array is a score: of n, of
    n x variants, or of n x variants x draws, which are averaged. Variants become columns such as `name/301`, by the
    integers of an array `timesteps`, else numbered from 0. No pickled array is read.

    Raises:
        UserError: no such file, a file that is not what its ending says, arrays of different lengths.
    """
    if not path.is_file():
        raise UserError("table does not exist", path, "mend the path")
    try:
        if path.suffix == ".npz":
            return _from_arrays(_arrays(path), path)
        return pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError, EOFError, ValueError, zipfile.BadZipFile) as problem:
        kind = {".npz": "npz", ".csv": "CSV"}.get(path.suffix, "Parquet")
        raise UserError(f"table cannot be read as {kind} ({problem})", path, "make it anew") from problem


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    found = np.load(path, allow_pickle=False)
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise ValueError("it holds one array without a name")
    with found as file:
        return {name: file[name] for name in file.files}


def _from_arrays(arrays: dict[str, np.ndarray], path: pathlib.Path) -> pl.DataFrame:
    timesteps = arrays.pop("timesteps", None)
    if timesteps is not None and (timesteps.ndim != 1 or timesteps.dtype.kind not in "iu" or _repeats(timesteps)):
        raise UserError("timesteps are no list of different whole numbers", path, "name each variant once")
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or not all(array.ndim and array.size for array in arrays.values()):
        raise UserError(f"arrays differ in length: {lengths}", path, "give each sample one row in all of them")
    if arrays.get("sample_id", np.empty(0)).ndim > 1:
        raise UserError("sample_id is no list", path, "give each sample one")
    ids = arrays.pop("sample_id", np.array([f"{row:08d}" for row in range(next(iter(lengths.values())))]))
    found = {"sample_id": pl.Series(ids)}
    for name, array in arrays.items():
        if array.ndim == 1:
            found[name] = pl.Series(array)
            continue
        averaged = array if array.ndim == 2 else array.mean(axis=tuple(range(2, array.ndim)), dtype=np.float64)
        steps = range(averaged.shape[1]) if timesteps is None else timesteps.tolist()
        if len(steps) != averaged.shape[1]:
            raise UserError(
                f"{len(steps)} timesteps for {averaged.shape[1]} columns of '{name}'", path, "name them all"
            )
        found |= {f"{name}/{step:03d}": pl.Series(averaged[:, place]) for place, step in enumerate(steps)}
    return pl.DataFrame(found)


def _repeats(numbers: np.ndarray) -> bool:
    return len(np.unique(numbers)) < len(numbers)
