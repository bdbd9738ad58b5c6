"""What an image service reveals when asked for variations of an image, or for pictures of its caption. Black-box.

The service answers requests and nothing else: no losses, no latents, no weights. Every score here is computed from
its pictures. Sources and differences from the official code: `docs/expensive_attacks.md`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from mia import models, rng, rows, ssim
from mia.errors import UserError
from mia.services import Budgeted, Service

VARIATION_NAMES = ("ssim", "l2")
GENERATION_NAMES = ("cos_generation_image", "cos_text_generation", "cos_text_image", "tokens_mean", "tokens_max")
MODEL_FREE = ("cos_text_image",)  # says nothing of the target; to be reported alone, beside the attack


@dataclasses.dataclass(frozen=True)
class Options:
    """What the service is asked.

    Attributes:
        variations: of each image, averaged. Source: ReDiffuse, arXiv 2405.20771 (10; its released code has 1).
        strength: of a variation: 0.05 is timestep 50 of 1000. Source: ReDiffuse's code for Stable Diffusion.
        generations: pictures of each caption. Source: arXiv 2312.08207 (3); FSCA, arXiv 2506.11434, has 64.
        keep_tokens: keep the similarity at every image token behind the named entries of `generations`, too.
        images_per_query: images in one request.
    """

    variations: int = 10
    strength: float = 0.05
    generations: int = 3
    keep_tokens: bool = False
    images_per_query: int = 16


def planned_images(options: Options, n_samples: int, passes: Sequence[str] = ("variations", "generations")) -> int:
    """How many pictures the named passes ask the service for."""
    each = {"variations": options.variations, "generations": options.generations}
    return n_samples * sum(each[name] for name in passes)


def seeds(seed: int, ids: Sequence[str], draws: Sequence[int], purpose: str) -> list[int]:
    """A seed below 2^31, which every service can take, for each pair (ids[i], draws[i])."""
    return [int(rng.stream(seed, name, draw, purpose).integers(2**31)) for name, draw in zip(ids, draws, strict=True)]


def variations(
    service: Service, ids: Sequence[str], images: np.ndarray, prompts: Sequence[str], options: Options, seed: int,
    bands: int, progress: Callable = iter,
) -> pa.Table:  # fmt: skip
    """Rows of the block `variations`: `vector` is (ssim, l2) of each image and the mean of its variations.

    `ssim` of the grey pictures, high = member; `l2`, root mean square difference on 0..1, low = member. `timestep` is
    1000 x strength.

    Args:
        images: uint8[n, H, W, 3], of the size that the service varies.
        prompts: sent along; empty ones keep the captions, which may tell members by themselves, out of it.
        bands: see `rows.features_rows`.

    Raises:
        UserError: the service gives images of another size, or its budget is too small for all.

    Source: ReDiffuse, arXiv 2405.20771.
    """

    _require(service, planned_images(options, len(ids), ["variations"]))

    def ask(at: list[int], draws: list[int]) -> np.ndarray:
        drawn = seeds(seed, [ids[i] for i in at], draws, "variation")
        return service.vary(images[at], options.strength, drawn, [prompts[i] for i in at])

    found = np.empty((len(ids), len(VARIATION_NAMES)), np.float32)
    total = np.zeros(images.shape[1:])  # of the sample whose variations are coming in
    for at, draws, pictures in _asked(ask, len(ids), options.variations, options, images.shape[1:], progress):
        for i, draw, picture in zip(at, draws, pictures, strict=True):
            total = total + picture if draw else picture.astype(np.float64)
            if draw == options.variations - 1:
                found[i] = similarity(images[i], total / options.variations)
    timestep = round(1000 * options.strength)
    return rows.features_rows("variations", ids, timestep, 0, bands, vector=found)


def similarity(image: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """`VARIATION_NAMES` of two pictures [H, W, 3] on 0..255."""
    off = (np.asarray(image, dtype=np.float64) - other) / 255
    return ssim.ssim(ssim.grey(image), ssim.grey(other)), float(np.sqrt(np.square(off).mean()))


def _require(service: Service, images: int) -> None:
    """Stop before the first request when the last ones would exceed a budget: those sent would be paid for nothing."""
    if isinstance(service, Budgeted):
        service.require(images)


def _asked(
    ask: Callable, n: int, draws: int, options: Options, shape: tuple[int, ...] | None, progress: Callable
) -> Iterator[tuple[list[int], list[int], np.ndarray]]:
    """Rows, draws and pictures of one request after another, sample by sample.

    Raises:
        UserError: the answer is not as many pictures, of `shape` where one is given, as asked for.
    """
    pairs = [(i, d) for i in range(n) for d in range(draws)]
    for start in progress(range(0, len(pairs), options.images_per_query)):
        run = pairs[start : start + options.images_per_query]
        at, some = [i for i, _ in run], [d for _, d in run]
        pictures = np.asarray(ask(at, some))
        wanted = (len(run), *(shape or (*pictures.shape[1:3], 3)))
        if pictures.dtype != np.uint8 or pictures.shape != wanted:
            raise UserError(
                f"the service gives {pictures.dtype}{list(pictures.shape)}, not uint8{list(wanted)}",
                f"request {start // options.images_per_query}", "ask for images of its own size",
            )  # fmt: skip
        yield at, some, pictures


class Encoder:
    """An open_clip model as the attacks on generations need it: unit vectors, and unit vectors of image tokens."""

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, batch_size: int = 64):
        self.model, self.preprocess, self.tokenizer, self.batch_size = model, preprocess, tokenizer, batch_size
        self.device = next(model.parameters()).device
        self.has_tokens = hasattr(model.visual, "output_tokens")

    def images(self, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """float32[n, width], and float32[n, tokens, token width] or None where the encoder shows no tokens."""
        import torch

        vectors, tokens = [], []
        for run, real in models.batches(len(pictures), self.batch_size):
            shown = torch.stack([self.preprocess(Image.fromarray(pictures[i])) for i in run]).to(self.device)
            with torch.inference_mode(), self._showing_tokens():
                found = self.model.visual(shown)
            pooled, local = found if self.has_tokens else (found, None)
            vectors.append(_unit(pooled[:real]))
            if local is not None:
                tokens.append(_unit(local[:real]))
        return np.concatenate(vectors), np.concatenate(tokens) if tokens else None

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """float32[n, width]."""
        import torch

        vectors = []
        for run, real in models.batches(len(captions), self.batch_size):
            tokens = self.tokenizer([captions[i] for i in run]).to(self.device)
            with torch.inference_mode():
                vectors.append(_unit(self.model.encode_text(tokens)[:real]))
        return np.concatenate(vectors)

    @contextlib.contextmanager
    def _showing_tokens(self) -> Iterator[None]:
        if not self.has_tokens:
            yield
            return
        before, self.model.visual.output_tokens = self.model.visual.output_tokens, True
        try:
            yield
        finally:
            self.model.visual.output_tokens = before


def _unit(vectors: Any) -> np.ndarray:
    import torch

    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()


def generation_names(tokens: int = 0) -> tuple[str, ...]:
    """The layout of `vector` in the block `generations`, with the similarities of so many image tokens kept.

    cos_generation_image: of the embeddings of the picture and the image, high = member (FSCA's first stream).
    cos_text_generation, cos_text_image: of the caption with either; FSCA's second stream is their difference.
    tokens_mean, tokens_max: of the cosines of the picture's and the image's tokens, place by place (Pang and Wang).
    token_NNNN: each of these cosines.
    """
    return (*GENERATION_NAMES, *(f"token_{i:04d}" for i in range(tokens)))


def generations(
    service: Service, ids: Sequence[str], images: Sequence[np.ndarray], prompts: Sequence[str], encoder: Encoder,
    options: Options, seed: int, bands: int, progress: Callable = iter,
) -> pa.Table:  # fmt: skip
    """Rows of the block `generations`, one for each sample and draw: `vector` is laid out as `generation_names` says.

    Args:
        images: the samples, uint8[H, W, 3] each, of any size.
        prompts: what is asked for, and the text that is compared.

    Raises:
        UserError: the encoder shows no tokens and they are to be kept, the service gives something else, or its
            budget is too small for all.

    Source: FSCA, arXiv 2506.11434; Pang and Wang, arXiv 2312.08207.
    """
    if options.keep_tokens and not encoder.has_tokens:
        raise UserError("the encoder shows no image tokens", "keep_tokens", "keep none, or use a vision transformer")

    _require(service, planned_images(options, len(ids), ["generations"]))

    def ask(at: list[int], draws: list[int]) -> np.ndarray:
        drawn = seeds(seed, [ids[i] for i in at], draws, "generation")
        return service.generate([prompts[i] for i in at], drawn)

    found = []
    for at, _, pictures in _asked(ask, len(ids), options.generations, options, None, progress):
        distinct = sorted(set(at))
        place = [distinct.index(i) for i in at]
        clean, clean_tokens = encoder.images([images[i] for i in distinct])
        text = encoder.texts([prompts[i] for i in distinct])[place]
        drawn, drawn_tokens = encoder.images(list(pictures))
        clean = clean[place]
        local = np.full((len(at), 1), np.nan, np.float32)
        if clean_tokens is not None and drawn_tokens is not None:
            local = (drawn_tokens * clean_tokens[place]).sum(-1)
        cosines = [(drawn * clean).sum(1), (text * drawn).sum(1), (text * clean).sum(1), local.mean(1), local.max(1)]
        found.append(
            np.concatenate([np.stack(cosines, 1), local] if options.keep_tokens else [np.stack(cosines, 1)], 1)
        )
    each = [i for i in ids for _ in range(options.generations)]
    draws = np.tile(np.arange(options.generations), len(ids))
    vector = np.concatenate(found) if found else np.empty((0, len(GENERATION_NAMES)), np.float32)
    return rows.features_rows("generations", each, 0, draws, bands, vector=vector)
