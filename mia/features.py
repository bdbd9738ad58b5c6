"""What the model reveals about each image: losses at every timestep, and the statistics that attacks are made from.

The engine never sees a membership label. Formulas: arXiv 2306.12983 as its authors' code computes them (`attacks.md`
1.1), with noise keyed by sample and draw, losses in float64 sums, and the VAE's mode instead of a sample by default.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mia import models, rng, settings, tables
from mia.config import FeaturesOptions
from mia.errors import UserError
from mia.settings import Setting

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

GRAM_NAMES = (
    "z0_z0", "z0_eps", "z0_null", "z0_cond", "eps_eps", "eps_null", "eps_cond", "null_null", "null_cond", "cond_cond",
)  # fmt: skip
NORM_NAMES = (  # sums of powers, without the root
    "cond_eps_l1", "cond_eps_l4", "cond_eps_l5", "cond_l1", "cond_l4",
    "null_eps_l1", "null_eps_l4", "null_eps_l5", "null_l1", "null_l4",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Samples:
    """One shard of images, ready for the model.

    Attributes:
        ids: sample ids, n of them.
        z0: scaled latents, float32[n, channels, height, width].
        states: text states, float32[n_captions, tokens, width]; the last one is the empty prompt's.
        caption: which of `states` is each sample's, int64[n].
        pixels: the image itself, float32[n, 3, side, side] in 0..255, or None when pixel error is not asked for.
    """

    ids: Sequence[str]
    z0: torch.Tensor
    states: torch.Tensor
    caption: np.ndarray
    pixels: torch.Tensor | None


@dataclasses.dataclass
class Counts:
    """Work done: rows through the UNet (guidance counts two per evaluation) and latents through the decoder."""

    unet_rows: int = 0
    decodes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.unet_rows + other.unet_rows, self.decodes + other.decodes)


class Engine:
    """The networks of one target on one device, and the three losses they give."""

    def __init__(
        self, unet: Any, vae: Any, schedule: models.Schedule, samples: Samples, options: FeaturesOptions, seed: int
    ):
        import torch

        self.unet, self.vae, self.schedule, self.samples, self.options = unet, vae, schedule, samples, options
        self.counts = Counts()
        self.device = unet.device
        shape = tuple(samples.z0.shape[1:])
        draws = range(options.draws)
        pairs = [(i, d) for i in samples.ids for d in draws]
        noise = rng.noise(seed, [i for i, _ in pairs], [d for _, d in pairs], "forward", shape)
        self.eps = torch.from_numpy(noise).reshape(len(samples.ids), options.draws, *shape)

    def coefficients(self, timesteps: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar), float32[n, 1, 1, 1], at each of `timesteps`."""
        import torch

        a = self.schedule.at(timesteps)
        both = torch.from_numpy(np.stack([np.sqrt(a), np.sqrt(1 - a)]).astype(np.float32)).to(self.device)
        return both[0].reshape(-1, 1, 1, 1), both[1].reshape(-1, 1, 1, 1)

    def predict(
        self, z: torch.Tensor, timesteps: np.ndarray, image: np.ndarray, real: int, null: bool
    ) -> tuple[Any, Any]:
        """Noise predicted under the caption and, if `null`, under the empty prompt; one call for both."""
        import torch

        states = self.samples.states
        text = states[torch.from_numpy(self.samples.caption[image])]
        t = torch.from_numpy(timesteps)
        if null:
            text = torch.cat([text, states[-1:].expand(len(z), -1, -1)])
            z, t = torch.cat([z, z]), torch.cat([t, t])
        out = self.unet(z.to(self.unet.dtype), t.to(self.device), text.to(self.device, self.unet.dtype)).sample.float()
        self.counts.unet_rows += real * (1 + null)
        return (out[: len(out) // 2], out[len(out) // 2 :]) if null else (out, None)

    def ddim(self, z: torch.Tensor, e: torch.Tensor, timesteps: np.ndarray, step: int) -> torch.Tensor:
        """The latent one DDIM step (eta 0) lower, at `timesteps - step`."""
        root_a, root_b = self.coefficients(timesteps)
        root_a_prev, root_b_prev = self.coefficients(timesteps - step)
        return root_a_prev * (z - root_b * e) / root_a + root_b_prev * e

    def losses(self, z0: Any, eps: Any, cond: Any, prev: Any, image: np.ndarray, real: int) -> dict[str, torch.Tensor]:
        """The requested losses, each float64[n]: low = member.

        Model loss scores the caption branch before guidance against the *initial* noise; latent error holds the DDIM
        result `prev`, at the next lower noise level, against z0.
        """
        compute = {
            "model_loss": lambda: mean_square(eps - cond),
            "latent_error": lambda: mean_square(prev - z0),
            "pixel_error": lambda: self.pixel_error(prev, image, real),
        }
        return {name: compute[name]() for name in self.options.losses}

    def pixel_error(self, prev: torch.Tensor, image: np.ndarray, real: int) -> torch.Tensor:
        """Mean absolute difference, 0..255, of the image and the decoded, clamped, rounded `prev`; float64[n]."""
        import torch

        assert self.samples.pixels is not None
        decoded = self.vae.decode((prev / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()
        self.counts.decodes += real
        rounded = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()
        return (self.samples.pixels[torch.from_numpy(image)].to(self.device) - rounded).abs().double().mean((1, 2, 3))


def guided(cond: Any, null: Any, weight: float) -> Any:
    """Classifier-free guidance; weight 0 means the caption-conditioned prediction as it is."""
    return cond if null is None else null + weight * (cond - null)


def mean_square(x: torch.Tensor) -> torch.Tensor:
    """Mean over channel, height and width of x squared, summed in float64; float64[n]."""
    return x.double().square().mean((1, 2, 3))


def noised_grid(numbers: Iterable[int], options: FeaturesOptions) -> dict[int, list[Setting]]:
    """Timestep -> the settings that read it, for the settings that share the plain noised evaluations."""
    grid: dict[int, list[Setting]] = {}
    for number in numbers:
        setting = settings.setting(number)
        if setting.shares_grid:
            for t in setting.timesteps(options.timesteps):
                grid.setdefault(t, []).append(setting)
    return dict(sorted(grid.items()))


def needs_null(setting: Setting, options: FeaturesOptions) -> bool:
    """Model loss scores the caption branch before guidance, so only the other losses need the empty prompt."""
    return setting.guided and bool({"latent_error", "pixel_error"} & set(options.losses))


def plan(block: str, numbers: Iterable[int], options: FeaturesOptions, n_samples: int) -> Counts:
    """The work `extract` will do for `n_samples` images."""
    pixel = "pixel_error" in options.losses
    rows = decodes = 0
    if block == settings.GRID:
        for readers in noised_grid(numbers, options).values():
            rows += 1 + any(needs_null(s, options) for s in readers)
            decodes += pixel * len(readers)
    else:
        setting = settings.setting(int(block.removeprefix("setting-")))
        steps = len(setting.timesteps(options.timesteps))
        rows = steps + (steps if needs_null(setting, options) else (steps - 1) * setting.guided * setting.iterative)
        decodes = pixel * steps
    return Counts(rows * options.draws * n_samples, decodes * options.draws * n_samples)


def extract(engine: Engine, block: str, numbers: Iterable[int], batch_size: int, progress: Callable = iter) -> pa.Table:
    """The features table of one block, for every sample, draw and timestep.

    Args:
        engine: networks, samples and options.
        block: `noised` or `setting-NN`.
        numbers: the settings requested; the grid of `noised` is the union of their timesteps.
        batch_size: evaluations per call of the UNet; changes no result.
        progress: wraps the iterable of batches.

    Raises:
        UserError: a value is not finite; names sample and timestep.
    """
    import torch

    with torch.inference_mode():
        if not engine.samples.ids:
            columns = [{"block": block, **{name: np.empty(0, np.int64) for name in ("image", "draw", "timestep")}}]
        elif block == settings.GRID:
            columns = _noised(engine, list(numbers), batch_size, progress)
        else:
            setting = settings.setting(int(block.removeprefix("setting-")))
            columns = [_trajectory(engine, setting, batch_size, progress)]
    bands = engine.samples.z0.shape[1] + 1
    table = pa.concat_tables([_as_table(c, engine.samples.ids, bands) for c in columns])
    return tables.check(table, "features", f"block {block}")


def _noised(engine: Engine, numbers: list[int], batch_size: int, progress: Callable) -> list[dict]:
    """The plain evaluations at every (image, draw, timestep) as one flat work list, Gram matrix and norms kept."""
    options = engine.options
    grid = noised_grid(numbers, options)
    parts: dict[str, list[dict]] = {}
    for null in (False, True):
        chosen = [t for t, readers in grid.items() if any(needs_null(s, options) for s in readers) == null]
        # Timestep by timestep, so that a setting that reads few of them finds its rows together in full batches.
        pairs = [(t, i, d) for t in chosen for i in range(len(engine.samples.ids)) for d in range(options.draws)]
        work = np.array(pairs, dtype=np.int64).reshape(-1, 3)
        for run, real in progress(list(models.batches(len(work), batch_size))):
            t, image, draw = work[run].T
            _noised_batch(engine, image, draw, t, real, null, grid, parts)
    return [_joined(block, rows) for block, rows in parts.items()]


def _noised_batch(
    engine: Engine, image: Any, draw: Any, t: Any, real: int, null: bool, grid: dict, parts: dict
) -> None:
    z0, eps = engine.samples.z0[image].to(engine.device), engine.eps[image, draw].to(engine.device)
    root_a, root_b = engine.coefficients(t)
    z = root_a * z0 + root_b * eps
    cond, empty = engine.predict(z, t, image, real, null)
    _keep(parts, settings.GRID, image, draw, t, real, **_statistics(z0, eps, empty, cond))
    for setting in {s.number: s for readers in grid.values() for s in readers}.values():
        mine = np.flatnonzero([setting in grid[step] for step in t[:real]])
        if not len(mine):
            continue
        rows = np.pad(mine, (0, max(0, models.MIN_BATCH - len(mine))), mode="edge")
        g = guided(cond[rows], empty[rows] if needs_null(setting, engine.options) else None, setting.guidance_scale)
        prev = engine.ddim(z[rows], g, t[rows], setting.step)
        losses = engine.losses(z0[rows], eps[rows], cond[rows], prev, image[rows], len(mine))
        _keep(parts, settings.own_block(setting), image[rows], draw[rows], t[rows], len(mine), **losses)


def _statistics(z0: torch.Tensor, eps: torch.Tensor, null: torch.Tensor | None, cond: torch.Tensor) -> dict[str, Any]:
    """Gram matrix, order-dependent norms and band energies of one batch; what needs `null` is NaN without it."""
    import torch

    nothing = torch.full_like(cond, float("nan"))
    u = nothing if null is None else null
    flat = torch.stack([z0, eps, u, cond], 1).flatten(2).double()
    gram = flat @ flat.transpose(1, 2)
    upper = torch.triu_indices(4, 4)
    norms = []
    for e in (cond, u):
        e, d = e.double().flatten(1), (e - eps).double().flatten(1)
        norms += [d.abs().sum(1), d.pow(4).sum(1), d.abs().pow(5).sum(1), e.abs().sum(1), e.pow(4).sum(1)]
    d = (cond - eps).double()
    low = torch.nn.functional.avg_pool2d(d, 2).square().sum((1, 2, 3)) * 4  # energy of the 2x2 block means
    bands = torch.cat([d.square().sum((2, 3)), low[:, None]], 1)
    return {"gram": gram[:, upper[0], upper[1]], "norms": torch.stack(norms, 1), "bands": bands}


def _trajectory(engine: Engine, setting: Setting, batch_size: int, progress: Callable) -> dict:
    """An iterative setting: each DDIM step starts from the last one's latent; losses are read at every step."""
    options, steps = engine.options, setting.timesteps(engine.options.timesteps)
    null = needs_null(setting, options)
    parts: dict[str, list[dict]] = {}
    work = np.array([(i, d) for i in range(len(engine.samples.ids)) for d in range(options.draws)], dtype=np.int64)
    for run, real in progress(list(models.batches(len(work), batch_size))):
        image, draw = work[run].T
        z0, eps = engine.samples.z0[image].to(engine.device), engine.eps[image, draw].to(engine.device)
        root_a, root_b = engine.coefficients(np.full(len(image), setting.start_noise_step))
        z = root_a * z0 + root_b * eps
        for index, step in enumerate(steps):
            t = np.full(len(image), step)
            last = index == len(steps) - 1
            cond, empty = engine.predict(z, t, image, real, null or (setting.guided and not last))
            z = engine.ddim(z, guided(cond, empty, setting.guidance_scale), t, setting.step)
            losses = engine.losses(z0, eps, cond, z, image, real)
            _keep(parts, settings.own_block(setting), image, draw, t, real, **losses)
    return _joined(settings.own_block(setting), parts[settings.own_block(setting)])


def _keep(parts: dict, block: str, image: Any, draw: Any, t: Any, real: int, **values: torch.Tensor) -> None:
    """Remember the first `real` rows of one batch's results; values stay on the device until the shard is done."""
    entry = {"image": image[:real], "draw": draw[:real], "timestep": t[:real]}
    parts.setdefault(block, []).append(entry | {name: value[:real] for name, value in values.items()})


def _joined(block: str, rows: list[dict]) -> dict:
    import torch

    names = rows[0].keys()
    joined = {
        name: torch.cat([r[name] for r in rows]).cpu().numpy()
        if isinstance(rows[0][name], torch.Tensor)
        else np.concatenate([r[name] for r in rows])
        for name in names
    }
    return {"block": block, **joined}


def _as_table(columns: dict, ids: Sequence[str], bands: int) -> pa.Table:
    """One block's arrays as a features table; statistics that were not computed are empty."""
    _refuse_nonfinite(columns, ids)
    n = len(columns["image"])
    fields: dict[str, pa.Array] = {
        "sample_id": pa.array(np.asarray(ids, dtype=object)[columns["image"]], pa.string()),
        "block": pa.array([columns["block"]] * n, pa.string()),
        "timestep": pa.array(columns["timestep"].astype(np.int32)),
        "draw": pa.array(columns["draw"].astype(np.int32)),
    }
    for name in settings.LOSSES:
        fields[name] = pa.array(columns[name]) if name in columns else pa.nulls(n, pa.float64())
    for name, width in (("gram", 10), ("norms", 10), ("bands", bands)):
        kind = pa.list_(pa.float64(), width)
        if name in columns:
            values = columns[name].reshape(-1)
            fields[name] = pa.FixedSizeListArray.from_arrays(pa.array(values, mask=np.isnan(values)), width)
        else:
            fields[name] = pa.nulls(n, kind)
    return pa.table(fields)


def _refuse_nonfinite(columns: dict, ids: Sequence[str]) -> None:
    for name in (*settings.LOSSES, "bands"):
        if name not in columns:
            continue
        bad = ~np.isfinite(columns[name]).reshape(len(columns["image"]), -1).all(1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise UserError(
                f"the model gives a {name} that is not finite ({int(bad.sum())} of {len(bad)} evaluations)",
                f"sample {ids[columns['image'][row]]}, timestep {columns['timestep'][row]}",
                "check the weights, or run in float32",
            )
