"""Where walks are computed: one batch of (image, draw) pairs, each quantity once, on the device, without a wait.

Nothing here moves a value to the host; what is kept stays on the device until the shard is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mia import rng
from mia.config import FeaturesOptions
from mia.walks import CAPTION, EMPTY, IMAGE, Ledger, Value

if TYPE_CHECKING:
    import torch

    from mia.networks import Network

MAP_SIDE = 16
UNIT_L1 = (2 / np.pi) ** 0.5  # mean absolute value of a standard normal


@dataclasses.dataclass(frozen=True)
class Samples:
    """One shard of images, ready for the model.

    Attributes:
        ids: sample ids, n of them.
        latents: scaled latents by source (`image`, `crop-82` ...), each float32[n, channels, height, width].
        condition: what the denoiser is told, by name, one row for each distinct text; the last row is the empty
            prompt's or null class's, where the model has one.
        text: rows of `condition`, int64[n], for `caption` and each of `prompt-1`, `prompt-2` ... that is to be read.
        pixels: the image itself, float32[n, 3, side, side] in 0..255, or None when pixel error is not asked for.
        spread: standard deviation of the scaled posteriors, like `latents`, when each draw samples its own z0.
    """

    ids: Sequence[str]
    latents: dict[str, torch.Tensor]
    condition: dict[str, torch.Tensor]
    text: dict[str, np.ndarray]
    pixels: torch.Tensor | None = None
    spread: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pairs of image and draw with what belongs to them, on the host, pinned where a GPU will fetch it.

    Attributes:
        image, draw: row of the shard and draw of each pair, int64[b]; the first `real` count, the rest is padding.
        tensors: `eps`, latents by source, `pixels`, and the noises of shifted latents and texts where needed.
        text: rows of the condition by text.
    """

    image: np.ndarray
    draw: np.ndarray
    real: int
    tensors: dict[str, torch.Tensor]
    text: dict[str, torch.Tensor]

    def part(self, rows: np.ndarray, real: int) -> Batch:
        """The batch of these rows, of which the first `real` count."""
        return Batch(
            self.image[rows], self.draw[rows], real,
            {name: value[rows] for name, value in self.tensors.items()},
            {name: value[rows] for name, value in self.text.items()},
        )  # fmt: skip


def prepare(samples: Samples, options: FeaturesOptions, seed: int, pairs: np.ndarray, real: int, pin: bool) -> Batch:
    """The batch of `pairs`, int64[b, 2] of image and draw. Noise is keyed by sample and draw, and drawn here."""
    import torch

    from mia import settings

    image, draw = pairs.T
    ids = [samples.ids[i] for i in image]
    shape = tuple(samples.latents[IMAGE].shape[1:])
    tensors = {source: z0[image] for source, z0 in samples.latents.items()}
    if samples.spread:  # an image and its crops share the noise: PFAMI compares them
        own = torch.from_numpy(rng.noise(seed, ids, draw.tolist(), "posterior", shape))
        tensors |= {source: tensors[source] + spread[image] * own for source, spread in samples.spread.items()}
    tensors["eps"] = torch.from_numpy(rng.noise(seed, ids, draw.tolist(), "forward", shape))
    chosen = [settings.setting(number) for number in options.settings]
    if any(of.latent_shift for of in chosen):
        tensors["latent_shift"] = torch.from_numpy(rng.noise(seed, ids, draw.tolist(), "latent_shift", shape))
    if any(of.text_shift for of in chosen):
        tokens = tuple(samples.condition["states"].shape[1:])
        for told in (CAPTION, EMPTY):
            noise = rng.noise(seed, ids, draw.tolist(), f"text_shift {told}", tokens)
            tensors[f"shift of {told}"] = torch.from_numpy(noise)
    if samples.pixels is not None:
        tensors["pixels"] = samples.pixels[image]
    text = {name: torch.from_numpy(rows[image]) for name, rows in samples.text.items()}
    empty = len(next(iter(samples.condition.values()))) - 1 if samples.condition else 0
    text[EMPTY] = torch.full((len(image),), empty)
    if pin:
        tensors, text = ({k: v.pin_memory() for k, v in group.items()} for group in (tensors, text))
    return Batch(image, draw, real, tensors, text)


class Reader(Ledger):
    """A ledger that computes, for one batch."""

    def __init__(self, network: Network, condition: dict[str, torch.Tensor], batch: Batch, options: FeaturesOptions):
        super().__init__(options, network.has_null)
        self.network, self.schedule, self.condition = network, network.schedule, condition
        self.kept: list[tuple[str, dict[str, Any]]] = []
        self.image, self.draw, self.real = batch.image, batch.draw, batch.real
        self.tensors, self.text = (
            {name: value.to(network.device, non_blocking=True) for name, value in group.items()}
            for group in (batch.tensors, batch.text)
        )

    def _count(self, unet_rows: int = 0, decodes: int = 0) -> None:
        super()._count(unet_rows * self.real, decodes * self.real)

    def _compute(self, name: str, arguments: tuple) -> Any:
        return getattr(self, f"_{name}")(*arguments)

    def _levels(self, t: int) -> tuple[float, float]:
        return float(self.schedule.alpha(t)), float(self.schedule.sigma(t))

    def _clean(self, source: str) -> torch.Tensor:
        return self.tensors[source]

    def _noise(self) -> torch.Tensor:
        return self.tensors["eps"]

    def _mixed(self, noise: Value, level: int, source: str) -> torch.Tensor:
        alpha, sigma = self._levels(level)
        return alpha * self.tensors[source] + sigma * noise.tensor

    def _shifted(self, z: Value, by: float) -> torch.Tensor:
        return z.tensor + by * self.tensors["latent_shift"]

    def _unit(self, e: Value) -> torch.Tensor:
        return e.tensor * (UNIT_L1 / e.tensor.abs().mean((1, 2, 3), keepdim=True))

    def _step(self, z: Value, e: Value, t: int, to: int) -> torch.Tensor:
        (alpha, sigma), (alpha_to, sigma_to) = self._levels(t), self._levels(to)
        return alpha_to * ((z.tensor - sigma * e.tensor) / alpha) + sigma_to * e.tensor

    def _guided(self, cond: Value, null: Value, weight: float) -> torch.Tensor:
        return null.tensor + weight * (cond.tensor - null.tensor)

    def _predict(self, z: Value, t: int, texts: list[str], text_shift: float) -> list[tuple[Any, Any]]:
        import torch

        told = [self._told(text, text_shift) for text in texts]
        condition = {name: torch.cat([some[name] for some in told]) for name in told[0]}
        latent = torch.cat([z.tensor] * len(texts))
        steps = torch.full((len(latent),), t, device=latent.device)
        alpha, sigma = self._levels(t)
        outputs = self.network(latent, steps, condition).chunk(len(texts))
        return [(self.schedule.to_noise(output, z.tensor, alpha, sigma), output) for output in outputs]

    def _told(self, text: str, text_shift: float) -> dict[str, torch.Tensor]:
        told = {name: values[self.text[text]] for name, values in self.condition.items()}
        if text_shift:
            told["states"] = told["states"].float() + text_shift * self.tensors[f"shift of {text}"]
        return told

    def _pixel_error(self, z: Value) -> torch.Tensor:
        """Mean absolute difference, 0..255, of the image and the decoded, clamped, rounded latent; float64[b].

        The error is kept rather than the picture: 8 bytes.
        """
        rounded = ((self.network.decode(z.tensor) / 2 + 0.5).clamp(0, 1) * 255).round()
        return (self.tensors["pixels"] - rounded).abs().double().mean((1, 2, 3))

    def _keep_losses(self, block: str, t: int, cond: Value, prev: Value | None, pixel: Value | None) -> None:
        z0, eps = self.tensors[IMAGE], self.tensors["eps"]
        found = {}
        if "model_loss" in self.options.losses:
            found["model_loss"] = mean_square(self.schedule.target(z0, eps, *self._levels(t)) - cond.output)
        if "latent_error" in self.options.losses and prev is not None:
            found["latent_error"] = mean_square(prev.tensor - z0)
        if pixel is not None:
            found["pixel_error"] = pixel.tensor
        self._keep(block, t, **found)

    def statistics(
        self, block: str, t: int, noise: Value | None, cond: Value | None, null: Value | None, source: str = IMAGE
    ) -> None:
        import torch

        z0 = self.tensors[source]
        parts = [value.tensor if value is not None else None for value in (noise, null, cond)]
        finite = torch.stack([part.isfinite().flatten(1).all(1) for part in parts if part is not None], 1)
        self._keep(block, t, finite=finite.all(1), **statistics(z0, *parts))

    def latent_error(self, block: str, t: int, a: Value, b: Value, kept_map: bool = False) -> None:
        import torch

        difference = a.tensor - b.tensor
        found = {"latent_error": mean_square(difference)}
        if kept_map:
            side = min(MAP_SIDE, difference.shape[-1])
            found["vector"] = torch.nn.functional.adaptive_avg_pool2d(difference.abs(), side).flatten(1)
        self._keep(block, t, **found)

    def spread(self, block: str, t: int, values: list[Value]) -> None:
        import torch

        flat = torch.stack([value.tensor.flatten(1) for value in values], 1).double()
        i, j = torch.triu_indices(len(values), len(values), 1, device=flat.device)
        self._keep(block, t, vector=(flat[:, i] - flat[:, j]).norm(dim=2).mean(1, keepdim=True).float())

    def _keep(self, block: str, t: int, **values: torch.Tensor) -> None:
        entry = {"image": self.image[: self.real], "draw": self.draw[: self.real], "timestep": t}
        self.kept.append((block, entry | {name: value[: self.real] for name, value in values.items()}))


def mean_square(x: torch.Tensor) -> torch.Tensor:
    """Mean over channel, height and width of x squared, summed in float64; float64[b]."""
    return x.double().square().mean((1, 2, 3))


def statistics(
    z0: torch.Tensor, eps: torch.Tensor | None, null: torch.Tensor | None, cond: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Gram matrix, order-dependent norms and band energies of one batch; what needs an absent tensor is NaN.

    Bands are those of cond - eps and of null - eps; without noise the first are z0's own, which say how busy an image
    is and involve no model.
    """
    import torch

    nothing = torch.full_like(z0, float("nan"))
    noise, u, v = (nothing if x is None else x for x in (eps, null, cond))
    flat = torch.stack([z0, noise, u, v], 1).flatten(2).double()
    gram = flat @ flat.transpose(1, 2)
    upper = torch.triu_indices(4, 4, device=z0.device)
    norms = []
    for e in (v, u):
        e, d = e.double().flatten(1), (e - noise).double().flatten(1)
        norms += [d.abs().sum(1), d.pow(4).sum(1), d.abs().pow(5).sum(1), e.abs().sum(1), e.pow(4).sum(1)]
    bands = []
    for d in (z0 if eps is None else v - noise, u - noise):
        d = d.double()
        low = torch.nn.functional.avg_pool2d(d, 2).square().sum((1, 2, 3)) * 4  # energy of the 2x2 block means
        bands += [d.square().sum((2, 3)), low[:, None]]
    return {"gram": gram[:, upper[0], upper[1]], "norms": torch.stack(norms, 1), "bands": torch.cat(bands, 1)}
