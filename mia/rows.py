"""Rows of the features table for passes that keep a vector or one number, not the statistics of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

WIDTHS = {"gram": 10, "norms": 10}


def features_rows(
    block: str, ids: Sequence[str], timestep: np.ndarray | int, draw: np.ndarray | int, bands: int,
    model_loss: np.ndarray | None = None, vector: np.ndarray | None = None,
) -> pa.Table:  # fmt: skip
    """One block's rows, every column of the features table; what was not computed is null.

    Args:
        block: the block's name.
        ids: sample id of each row.
        timestep: of each row, or one for all.
        draw: of each row, or one for all.
        bands: length of the column `bands` (`tables.bands`), which all of one target's files share.
        model_loss: float[n].
        vector: float[n, k]; NaN entries become null.
    """
    n = len(ids)
    lists = {name: pa.nulls(n, pa.list_(pa.float64(), k)) for name, k in (WIDTHS | {"bands": bands}).items()}
    entries = pa.nulls(n, pa.list_(pa.float32()))
    if vector is not None:
        flat = np.asarray(vector, dtype=np.float32)
        offsets = np.arange(n + 1, dtype=np.int32) * flat.shape[1]
        entries = pa.ListArray.from_arrays(offsets, pa.array(flat.reshape(-1), mask=np.isnan(flat.reshape(-1))))
    return pa.table(
        {
            "sample_id": pa.array(ids, pa.string()),
            "block": pa.array([block] * n, pa.string()),
            "timestep": pa.array(np.broadcast_to(timestep, n).astype(np.int32)),
            "draw": pa.array(np.broadcast_to(draw, n).astype(np.int32)),
            "model_loss": pa.nulls(n, pa.float32()) if model_loss is None else pa.array(model_loss, pa.float32()),
            "latent_error": pa.nulls(n, pa.float32()),
            "pixel_error": pa.nulls(n, pa.float32()),
            **lists,
            "vector": entries,
        }
    )
