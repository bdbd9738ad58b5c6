"""What binds the embeddings: decoding or the network, and how near the pipeline comes to the slower of the two.

On a CPU both want the same cores, and where these are busy overlapping wins nothing: the limit is then the sum of their
times. A GPU leaves the CPU alone, so beside the shipped encoder stand-ins are timed that only wait as long as a GPU
might work, a quarter shorter or longer than decoding takes. One thread decodes. Each is timed in turn and the best of
each is taken, because other processes come and go; the CPU time tells what the pipeline costs above its parts.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from mia import embeddings, models, pixels

ENCODER = "local-dir:resources/example/encoders/clip"
IMAGES, BATCH, TURNS = 256, 16, 3
SIZE = (512, 384)


def jpegs(size: tuple[int, int], count: int = 32) -> list[bytes]:
    """Noisy gradients as JPEG of quality 90, about 1.5 bits a pixel, as photographs have."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        smooth = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size, 3)
        noisy = np.asarray(smooth) + generator.normal(0, 9, (size[1], size[0], 3))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


class Waits(torch.nn.Module):
    """A network on a device of its own: the CPU only waits, `pause` seconds for each batch."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause, self.weight = pause, torch.nn.Parameter(torch.zeros(1))

    def encode_image(self, shown: torch.Tensor, normalize: bool) -> torch.Tensor:
        time.sleep(self.pause)
        return torch.zeros(len(shown), 64)

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return torch.zeros(len(tokens), 64)


def seconds(function: Callable[[], object]) -> np.ndarray:
    """Wall and CPU time of one call."""
    start = np.array([time.perf_counter(), time.process_time()])
    function()
    return np.array([time.perf_counter(), time.process_time()]) - start


def report(name: str, some: list[bytes], net: torch.nn.Module, preprocess: Callable, tokenize: Callable) -> float:
    """One line: decoding alone, the network alone, the pipeline, its share of the slower. Decoding's s per image."""
    images, captions = [some[i % len(some)] for i in range(IMAGES)], [f"a drawing of {i} dogs" for i in range(IMAGES)]
    ids, runs = [f"{i:032x}" for i in range(IMAGES)], list(models.batches(IMAGES, BATCH))
    shown = torch.stack([preprocess(pixels.decode(data)) for data in images[:BATCH]])
    tokens = tokenize(captions[:BATCH])

    def decode() -> None:
        for data, caption in zip(images, captions, strict=True):
            preprocess(pixels.decode(data))
            tokenize([caption])

    def compute() -> None:
        with torch.inference_mode():
            for _ in runs:
                net.encode_image(shown, True), net.encode_text(tokens, True)

    def pipeline() -> None:
        embeddings.embed(ids, images, captions, net, preprocess, tokenize, BATCH, workers=1)

    best = np.full((3, 2), np.inf)
    for _ in range(TURNS):
        for row, part in enumerate((decode, compute, pipeline)):
            best[row] = np.minimum(best[row], seconds(part))
    wall, cpu = best.T
    binds = "decoding" if wall[0] > wall[1] else "network"
    rates = ", ".join(f"{what} {IMAGES / s:.0f}" for what, s in zip(("decoding", "network", "both"), wall, strict=True))
    print(
        f"{name}: images/s: {rates}; {max(wall[:2]) / wall[2]:.0%} of the limit ({binds}; goal 90 %);"
        f" {sum(wall[:2]) / wall[2]:.2f}x as fast as in turn; CPU time {cpu[2] / sum(cpu[:2]):.2f} of its parts"
    )
    return float(wall[0] / IMAGES)


if __name__ == "__main__":
    torch.set_num_threads(1)
    encoder, transform, tokenizer = models.encoder(ENCODER, torch.device("cpu"))[:3]
    files = jpegs(SIZE)
    print(f"JPEG {SIZE[0]} x {SIZE[1]}, {np.mean([len(file) for file in files]) / 1024:.0f} KiB, one thread decodes")
    each = report("shipped encoder, same CPU", files, encoder, transform, tokenizer)
    for share in (0.75, 1.25):
        report(f"device at {share} of decoding", files, Waits(share * each * BATCH), transform, tokenizer)
