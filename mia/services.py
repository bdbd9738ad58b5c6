"""Who makes pictures for the black-box attacks: a pipeline here, or a service elsewhere, behind one small interface."""

from __future__ import annotations

import base64
import dataclasses
import functools
import http.client
import io
import json
import urllib.request
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from mia import models, pixels, rng
from mia.errors import UserError
from mia.settings import TRAIN_STEPS

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 2**26  # of one picture from a service; its bytes are a stranger's


class Service(Protocol):
    """What a black-box attack may ask. One seed for each image; the same seed and request give the same image."""

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """A picture of each prompt, uint8[n, H, W, 3]."""

    def vary(self, images: np.ndarray, strength: float, seeds: Sequence[int], prompts: Sequence[str]) -> np.ndarray:
        """A variation of each image, uint8[n, H, W, 3], as large as it; `strength` in (0, 1], 1 keeps nothing."""


class Budgeted:
    """A service that counts what it is asked and refuses beyond a limit, before anything is sent; 0 is no limit.

    Attributes:
        queries: calls let through.
        images: pictures asked for in them, which is what services charge.
    """

    def __init__(self, service: Service, limit: int = 0):
        self.service, self.limit = service, limit
        self.queries = self.images = 0

    def require(self, n: int) -> None:
        """Refuse now what the budget does not hold.

        Raises:
            UserError: fewer than `n` images are left.
        """
        if 0 < self.limit < self.images + n:
            raise UserError(
                f"{n} more images would exceed the budget of {self.limit}, {self.images} are used", "budget",
                "raise it, or ask about fewer samples or draws",
            )  # fmt: skip

    def _count(self, n: int) -> None:
        self.require(n)
        self.queries += 1
        self.images += n

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """As `Service.generate`.

        Raises:
            UserError: the budget does not hold this many images more.
        """
        self._count(len(prompts))
        return self.service.generate(prompts, seeds)

    def vary(self, images: np.ndarray, strength: float, seeds: Sequence[int], prompts: Sequence[str]) -> np.ndarray:
        """As `Service.vary`.

        Raises:
            UserError: the budget does not hold this many images more.
        """
        self._count(len(images))
        return self.service.vary(images, strength, seeds, prompts)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How `LocalService` draws.

    Attributes:
        steps: DDIM steps of a generation, leading spacing from timestep 1 (`steps_offset` 1), as Stable Diffusion's.
        guidance_scale: classifier-free guidance weight; 0 means the caption's prediction as it is.
        variation_step: DDIM step of a variation, in timesteps. Source: ReDiffuse, Stable_Diffusion/attack.py (k = 50).
        batch_size: images in one call of the networks; changes no result.
    """

    steps: int = 50
    guidance_scale: float = 7.5
    variation_step: int = 50
    batch_size: int = 16


@dataclasses.dataclass
class Counts:
    """Work done: rows through the network (guidance counts two), latents decoded, images encoded."""

    unet_rows: int = 0
    decodes: int = 0
    encodes: int = 0


@dataclasses.dataclass
class LocalService:
    """A pipeline in this process. Noise is keyed by an image's own seed, so company and batch size change nothing.

    Attributes:
        network: `network(z, t, condition)` is the output for latents z and timesteps t, int64[n].
        alpha, sigma: of the schedule; asked for one timestep at a time, below 0 too, where the last step ends.
        condition: prompts -> what the network takes for them; the empty prompt is asked for when guided.
        encode: uint8[n, H, W, 3] -> scaled latents.
        decode: scaled latents -> uint8[n, H, W, 3].
        latent_shape: (C, H, W) of a generation.
        side: of the images, in pixels.
        sampling: steps, guidance and batch size.
        noise: `noise(output, z, t)`, the noise prediction that an output stands for; the output itself by default.
        device: where the networks are.
    """

    network: Callable[[Any, Any, Any], Any]
    alpha: Callable[[int], Any]
    sigma: Callable[[int], Any]
    condition: Callable[[list[str]], Any]
    encode: Callable[[np.ndarray], Any]
    decode: Callable[[Any], np.ndarray]
    latent_shape: tuple[int, int, int]
    side: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    noise: Callable[[Any, Any, int], Any] = lambda output, z, timestep: output
    device: Any = "cpu"
    counts: Counts = dataclasses.field(default_factory=Counts)

    @classmethod
    def of(cls, network: Any, condition: Callable[[list[str]], Any], sampling: Sampling) -> LocalService:
        """The service of one target's networks, without guidance where they know no null condition.

        Args:
            network: called as `network(z, t, condition)`, with a `schedule` (`alpha`, `sigma`, `to_noise`), `encode`
                (pixels in [-1, 1] -> posterior mean and log-variance), `scaled` (mean -> latents), `decode` (latents ->
                pixels), `latent_shape`, `side_px`, `has_null` and `device`.
            condition: prompts -> condition.
            sampling: how to draw.
        """
        import torch

        schedule = network.schedule

        def encode(images: np.ndarray) -> Any:
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
            return network.scaled(network.encode(pixels)[0])

        def decode(z: Any) -> np.ndarray:
            shown = ((network.decode(z) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            return shown.permute(0, 2, 3, 1).cpu().numpy()

        def noise(output: Any, z: Any, t: int) -> Any:
            return schedule.to_noise(output, z, float(schedule.alpha(t)), float(schedule.sigma(t)))

        return cls(
            network, schedule.alpha, schedule.sigma, condition, encode, decode, network.latent_shape, network.side_px,
            sampling if network.has_null else dataclasses.replace(sampling, guidance_scale=0.0), noise, network.device,
        )  # fmt: skip

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """A picture of each prompt by DDIM (eta 0), uint8[n, side, side, 3]."""
        step = TRAIN_STEPS // self.sampling.steps
        walk = [(1 + i * step, 1 + (i - 1) * step) for i in reversed(range(self.sampling.steps))]
        return self._run(len(prompts), prompts, walk, lambda run: self._start([seeds[i] for i in run], "generate"))

    def vary(self, images: np.ndarray, strength: float, seeds: Sequence[int], prompts: Sequence[str]) -> np.ndarray:
        """Each image noised to timestep 1000 x strength and walked back to 0 in steps of `variation_step`.

        Raises:
            UserError: images that are not of the model's size, or a strength outside (0, 1].
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != (self.side, self.side, 3):
            raise UserError(
                f"images are {images.dtype}{list(images.shape)}",
                "vary",
                f"make them uint8[n, {self.side}, {self.side}, 3]",
            )
        level = min(round(TRAIN_STEPS * strength), TRAIN_STEPS - 1)
        if not 0 < strength <= 1 or level < 1:
            raise UserError(f"strength {strength}", "vary", "give a number above 0.0005 and up to 1")
        times = [*range(level, 0, -self.sampling.variation_step), 0]

        def start(run: np.ndarray) -> Any:
            import torch

            with torch.inference_mode():
                z0 = self.encode(images[run]).to(self.device).float()
            return self._at(level, z0, self._start([seeds[i] for i in run], "vary"))

        found = self._run(len(images), prompts, list(zip(times, times[1:], strict=False)), start)
        self.counts.encodes += len(images)
        return found

    def _start(self, seeds: Sequence[int], purpose: str) -> torch.Tensor:
        import torch

        drawn = [rng.noise(seed, ["service"], [0], purpose, self.latent_shape)[0] for seed in seeds]
        return torch.from_numpy(np.stack(drawn)).to(self.device)

    def _at(self, timestep: int, clean: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return float(self.alpha(timestep)) * clean + float(self.sigma(timestep)) * e

    def _run(self, n: int, prompts: Sequence[str], walk: list[tuple[int, int]], start: Callable) -> np.ndarray:
        """Latents that `start` gives for rows, walked by DDIM steps (from, to) and decoded; uint8[n, ...]."""
        import torch

        out = np.empty((n, self.side, self.side, 3), np.uint8)
        guided = self.sampling.guidance_scale != 0

        def work(rows: np.ndarray, real: int) -> None:
            run = batch[rows]
            asked = [prompts[i] for i in run]
            with torch.inference_mode():
                z = start(run)
                conditions = [self.condition(asked)] + [self.condition([""] * len(run))] * guided
                for t, to in walk:
                    e = self._predict(z, t, conditions)
                    z = self._at(to, (z - float(self.sigma(t)) * e) / float(self.alpha(t)), e)
                out[run[:real]] = self.decode(z)[:real]
            self.counts.unet_rows += real * len(walk) * (1 + guided)
            self.counts.decodes += real

        for batch, whole in models.batches(n, self.sampling.batch_size):
            self._memory.read(work, len(batch), whole)
        return out

    @functools.cached_property
    def _memory(self) -> models.Memory:
        return models.Memory(self.device)

    def _predict(self, z: torch.Tensor, t: int, conditions: list) -> torch.Tensor:
        """The noise predicted, guided when there are two conditions: the prompt's and the empty one's."""
        import torch

        times = torch.full((len(z),), t, dtype=torch.int64, device=z.device)
        each = [self.noise(self.network(z, times, c).float(), z, t) for c in conditions]
        if len(each) == 1:
            return each[0]
        return each[1] + self.sampling.guidance_scale * (each[0] - each[1])


def planned(sampling: Sampling, generations: int = 0, variations: int = 0, strength: float = 0.05) -> Counts:
    """The work that `LocalService` will do for this many generations and variations."""
    level = min(round(TRAIN_STEPS * strength), TRAIN_STEPS - 1)
    rows = generations * sampling.steps + variations * len(range(level, 0, -sampling.variation_step))
    return Counts(rows * (2 if sampling.guidance_scale else 1), generations + variations, variations)


class HttpService:
    """A service behind HTTP, an example to write others by.

    Sends `{"prompts", "seeds"}` to `URL/generate` and `{"images", "strength", "seeds", "prompts"}` to `URL/vary` as
    JSON, images as base64 PNG, and reads `{"images": [...]}`. Nothing is sent twice: a service charges for repeats.
    """

    def __init__(self, url: str, timeout_s: float = 120.0, headers: dict[str, str] | None = None):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"'{url}' is no web address", "service", "give one that begins with https:// or http://")
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self.headers = {"Content-Type": "application/json"} | (headers or {})

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """As `Service.generate`.

        Raises:
            UserError: no answer, or one that is not what was asked for.
        """
        return self._ask("generate", len(prompts), {"prompts": list(prompts), "seeds": list(seeds)})

    def vary(self, images: np.ndarray, strength: float, seeds: Sequence[int], prompts: Sequence[str]) -> np.ndarray:
        """As `Service.vary`.

        Raises:
            UserError: no answer, or one that is not what was asked for.
        """
        sent = {"images": [_png(image) for image in images], "strength": strength}
        return self._ask("vary", len(images), sent | {"seeds": list(seeds), "prompts": list(prompts)})

    def _ask(self, what: str, n: int, sent: dict[str, Any]) -> np.ndarray:
        address = f"{self.url}/{what}"
        request = urllib.request.Request(address, json.dumps(sent).encode(), self.headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                got = json.load(answer)["images"]
            images = [np.asarray(pixels.decode(base64.b64decode(x), MAX_PIXELS)) for x in got]
        except (OSError, http.client.HTTPException, pixels.ImageError, ValueError, KeyError, TypeError) as problem:
            raise UserError(f"the service gives no images ({problem})", address, "see its own log") from problem
        if len(images) != n or len({image.shape for image in images}) > 1:
            sizes = sorted({image.shape[:2] for image in images})
            raise UserError(f"the service gives {len(images)} images of {sizes} for {n}", address, "see its own log")
        return np.stack(images)


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
