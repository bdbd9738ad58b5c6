"""CLIP embeddings of images and captions, unit length, by open_clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mia import models, pixels, tables


def embed(
    ids: Sequence[str], images: Sequence[bytes], captions: Sequence[str], model: Any, preprocess: Any, tokenizer: Any,
    batch_size: int, max_pixels: int, progress: Callable = iter,
) -> pa.Table:  # fmt: skip
    """The embeddings table: unit vectors in float16, one for each image and one for each caption."""
    import torch

    device = next(model.parameters()).device
    found: dict[str, list[np.ndarray]] = {"image": [], "text": []}
    for run, real in progress(list(models.batches(len(ids), batch_size))):
        with torch.inference_mode():
            shown = torch.stack([preprocess(pixels.decode(images[i], max_pixels)) for i in run]).to(device)
            tokens = tokenizer([captions[i] for i in run]).to(device)
            found["image"].append(model.encode_image(shown, normalize=True)[:real].float().cpu().numpy())
            found["text"].append(model.encode_text(tokens, normalize=True)[:real].float().cpu().numpy())
    columns = {name: tables.vector_column(np.concatenate(v).astype(np.float16)) for name, v in found.items()}
    return pa.table({"sample_id": list(ids), **columns})
