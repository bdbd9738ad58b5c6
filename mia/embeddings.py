"""CLIP embeddings of images and captions, unit length, by open_clip."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from mia import models, pixels, tables


def embed(
    ids: Sequence[str], images: Iterable[bytes], captions: Sequence[str], model: Any, preprocess: Any, tokenizer: Any,
    batch_size: int, progress: Callable = iter, workers: int = 0,
) -> pa.Table:  # fmt: skip
    """The embeddings table: unit vectors in float16, one for each image and one for each caption.

    Images are decoded while the network is busy with those before, so that the slower of the two sets the pace
    (`benchmarks/embeddings.py`). Neither `batch_size` nor `workers` changes a bit of the result.

    Args:
        images: in the order of `ids`; the bytes of a few batches are held at a time.
        workers: threads that decode; 0 for as many as torch may use.

    Raises:
        ImageError: an image cannot be decoded.
    """
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        width = model.encode_text(tokenizer([""]).to(device)).shape[1]
    found = {space: np.empty((len(ids), width), np.float16) for space in ("image", "text")}
    runs = list(models.batches(len(ids), batch_size))
    ready = prepared(runs, images, captions, preprocess, tokenizer, workers)
    for (run, real), (shown, tokens) in zip(progress(runs), ready, strict=True):
        with torch.inference_mode():
            vectors = {
                "image": model.encode_image(shown.to(device, non_blocking=True), True),
                "text": model.encode_text(tokens.to(device, non_blocking=True), True),
            }
        for space, rows in vectors.items():
            found[space][run[:real]] = rows[:real].float().cpu().numpy()
    columns = {space: tables.vector_column(vectors) for space, vectors in found.items()}
    return pa.table({"sample_id": pa.array(ids, pa.string()), **columns})


def prepared(
    runs: Sequence[tuple[np.ndarray, int]], images: Iterable[bytes], captions: Sequence[str], preprocess: Any,
    tokenizer: Any, workers: int = 0,
) -> Iterator[tuple[Any, Any]]:  # fmt: skip
    """Pixels, float32[len(run), 3, side, side], and tokens of each run of rows, made by threads some runs ahead.

    Pillow lets other threads run while it decodes and resizes, so threads do, and nothing is copied between processes.
    """
    import torch

    workers = workers or torch.get_num_threads()
    shape = preprocess(Image.new("RGB", (8, 8))).shape
    pinned = torch.cuda.is_available()  # the only memory that is copied to a GPU in the background

    waiting = iter(images)

    def fill(place: torch.Tensor, data: bytes) -> None:
        place.copy_(preprocess(pixels.decode(data)))

    def start(run: np.ndarray, real: int) -> tuple:
        shown = torch.empty((len(run), *shape), pin_memory=pinned)
        tokens = pool.submit(tokenizer, [captions[i] for i in run])
        decoded = [
            pool.submit(fill, shown[at], data)
            for at, data in zip(range(real), itertools.islice(waiting, real), strict=True)
        ]
        return real, shown, tokens, decoded

    def finish(real: int, shown: torch.Tensor, tokens: concurrent.futures.Future, decoded: list) -> tuple:
        for image in decoded:
            image.result()
        shown[real:] = shown[real - 1]  # the padding repeats the last row
        return shown, tokens.result()

    ahead: collections.deque[tuple] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(workers, "decode")
    try:
        for run, real in runs:
            ahead.append(start(run, real))
            if len(ahead) > 1 + math.ceil(2 * workers / real):
                yield finish(*ahead.popleft())
        while ahead:
            yield finish(*ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)
