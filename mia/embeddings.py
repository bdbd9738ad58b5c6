"""CLIP embeddings of images and captions, unit length, by open_clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mia import models, pixels, tables


def embed(
    ids: Sequence[str], images: Sequence[bytes], captions: Sequence[str], model: Any, preprocess: Any, tokenizer: Any,
    batch_size: int, progress: Callable = iter,
) -> pa.Table:  # fmt: skip
    """The embeddings table: unit vectors in float16, one for each image and one for each caption."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        width = model.encode_text(tokenizer([""]).to(device)).shape[1]
    found = {space: np.empty((len(ids), width), np.float16) for space in ("image", "text")}
    for run, real in progress(list(models.batches(len(ids), batch_size))):
        with torch.inference_mode():
            shown = torch.stack([preprocess(pixels.decode(images[i])) for i in run]).to(device)
            tokens = tokenizer([captions[i] for i in run]).to(device)
            for space, vectors in (
                ("image", model.encode_image(shown, True)),
                ("text", model.encode_text(tokens, True)),
            ):
                found[space][run[:real]] = vectors[:real].float().cpu().numpy()
    columns = {space: tables.vector_column(vectors) for space, vectors in found.items()}
    return pa.table({"sample_id": pa.array(ids, pa.string()), **columns})
