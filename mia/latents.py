"""Each image and each caption through the frozen encoders, once, for every attack to come. Never sees a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mia import models, pixels, tables
from mia.captions import Captions, Rows
from mia.errors import UserError
from mia.networks import Autoencoder

NULL_ID = "f" * 32  # the null condition's name among captions; sorts behind every hash
CONDITIONS = ("states", "pooled", "label")


class Encoded(NamedTuple):
    """The tables `latents` and `texts`, and how many images were enlarged because they are smaller than the model's."""

    latents: pa.Table
    texts: pa.Table
    enlarged: int


def squares(images: Mapping[str, bytes], ids: list[str], side: int) -> np.ndarray:
    """The images as the model sees them, uint8[n, side, side, 3]: shorter side resized, centre cropped."""
    shown = [pixels.centre_square(pixels.decode(images[i]), side) for i in ids]
    return np.array(shown, dtype=np.uint8).reshape(-1, side, side, 3)


def encode(
    selection: pa.Table, images: Mapping[str, bytes], autoencoder: Autoencoder, captions: Captions, batch_size: int,
    progress: Callable = iter,
) -> Encoded:  # fmt: skip
    """The latents table (posterior mean and log-variance, float16, not yet scaled) and the texts table.

    The texts table has one row for each distinct caption and, last, the null condition where guidance is possible.
    Images smaller than the model's are enlarged, as the paper does, and counted.
    """
    import torch

    ids = selection["sample_id"].to_pylist()
    names = selection["caption"].to_pylist()
    side, width = autoencoder.side_px, int(np.prod(autoencoder.latent_shape))
    mean, logvar = np.empty((len(ids), width), np.float16), np.empty((len(ids), width), np.float16)
    enlarged = 0
    for run, real in progress(list(models.batches(len(ids), batch_size))):
        opened = [pixels.decode(images[ids[i]]) for i in run[:real]]
        enlarged += sum(min(image.size) < side for image in opened)
        batch = np.stack([pixels.centre_square(image, side) for image in opened])[np.minimum(run - run[0], real - 1)]
        x = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            found = autoencoder.encode(x)
        for target, value in zip((mean, logvar), found, strict=True):
            target[run[:real]] = value[:real].flatten(1).cpu().numpy()
    table = {
        "sample_id": pa.array(ids, pa.string()),
        "caption_id": pa.array([tables.caption_id(c) for c in names], pa.string()),
        "mean": tables.vector_column(mean),
        "logvar": tables.vector_column(logvar),
    }
    return Encoded(pa.table(table), encode_texts(names, captions, batch_size), enlarged)


def encode_texts(names: list[str], captions: Captions, batch_size: int) -> pa.Table:
    """The texts table of the distinct captions `names`, and of the null condition where there is one."""
    distinct = sorted(set(names), key=tables.caption_id)
    parts = [(tables.caption_id(c), c) for c in distinct]
    rows = [captions.encode(distinct, batch_size)] if distinct else []
    if captions.has_null:
        rows.append(captions.null(batch_size))
        parts.append((NULL_ID, ""))
    return _texts([name for name, _ in parts], rows)


def _texts(ids: list[str], rows: list[Rows]) -> pa.Table:
    n = len(ids)
    found = {name: np.concatenate([r[name] for r in rows]) for name in (rows[0] if rows else ())}
    columns: dict[str, Any] = {
        "caption_id": pa.array(ids, pa.string()),
        "n_tokens": pa.array(found.get("n_tokens", np.zeros(n)), pa.int32()),
        "label": pa.array(found["label"], pa.int32()) if "label" in found else pa.nulls(n, pa.int32()),
    }
    for name in ("states", "pooled"):
        columns[name] = (
            tables.vector_column(found[name].reshape(n, -1))
            if name in found
            else pa.nulls(n, pa.list_(pa.float16(), 1))
        )
    return pa.table(columns)


def posterior(latents: pa.Table, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Mean and log-variance, unscaled, each float32[n, *shape]; `Network.scaled(mean)` is z0."""
    import torch

    try:
        return tuple(  # type: ignore[return-value]
            torch.from_numpy(tables.vectors(latents[name])).reshape(-1, *shape) for name in ("mean", "logvar")
        )
    except RuntimeError as problem:
        raise UserError(f"latents are not of shape {shape}", "", "make them with this target's encoders") from problem


def spread(latents: pa.Table, autoencoder: Autoencoder) -> float | None:
    """Standard deviation of all scaled latents together, about 1 if they are scaled as the model's were; None of none.

    Source: arXiv 2112.10752, appendix G: the scaling factor is the inverse of what a batch's codes have.
    """
    import torch

    count, total, squares = 0, 0.0, 0.0
    for start in range(0, latents.num_rows, 256):
        mean = tables.vectors(latents["mean"].slice(start, 256))
        z0 = autoencoder.scaled(torch.from_numpy(mean)).double()
        count, total, squares = count + z0.numel(), total + float(z0.sum()), squares + float(z0.square().sum())
    return round(float(np.sqrt(squares / count - (total / count) ** 2)), 4) if count else None


def conditions(latents: pa.Table, texts: pa.Table, width: int) -> tuple[dict[str, Any], np.ndarray]:
    """The tensors of a denoiser's condition, one row for each caption, and each sample's row, int64[n].

    `states` float32[rows, tokens, width], `pooled` float32[rows, w], `label` int64[rows]: what the family has. The last
    row is the null condition where there is one. `width` is the latents table's `text_width`.
    """
    import torch

    place = {name: row for row, name in enumerate(texts["caption_id"].to_pylist())}
    found: dict[str, Any] = {}
    for name in CONDITIONS:
        if name not in texts.column_names or texts[name].null_count:
            continue
        if name == "label":
            found[name] = torch.from_numpy(texts[name].to_numpy().astype(np.int64))
        else:
            found[name] = torch.from_numpy(tables.vectors(texts[name]))
    if "states" in found:
        found["states"] = found["states"].reshape(len(place), -1, width)
    return found, np.array([place[name] for name in latents["caption_id"].to_pylist()], dtype=np.int64)
