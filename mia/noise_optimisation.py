"""How well, and how far, a perturbation of the noised latent must move to please the model. White-box.

After CDI (arXiv 2411.12858). What differs from its code, and why: `docs/expensive_attacks.md`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mia import lbfgs, models, rows
from mia.errors import UserError
from mia.gradients import Counts, Denoiser, Options, Samples, differentiable

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Optimised:
    """What `optimise` found: `loss` left over and `norm` of the perturbation, each float64[n]; work done."""

    loss: np.ndarray
    norm: np.ndarray
    counts: Counts


def optimise(
    denoiser: Denoiser, samples: Samples, options: Options, batch_size: int, progress: Callable = iter
) -> Optimised:
    """The loss that is left when z_t + delta is optimised for it, and how long delta is. After CDI, arXiv 2411.12858.

    Each sample has its own L-BFGS, in float64 around the network's own precision; `batch_size` changes no result. It
    is halved where memory does not hold it, if need be to 1: below `models.MIN_BATCH` the last bits may differ.

    Raises:
        UserError: a loss at delta = 0 is not finite; names sample and timestep.
    """
    import torch

    weights = denoiser.weights()
    device = next(iter(weights.values())).device
    n, counts = len(samples.ids), Counts()
    loss, norm = np.empty(n), np.empty(n)
    with differentiable(weights, False, options.dtype) as dtype:

        def work(rows: np.ndarray, real: int) -> None:
            nonlocal counts
            run, done = batch[rows], Counts()
            evaluate = _loss_of_delta(denoiser, samples, run, real, options.noise_timestep, device, dtype, done)
            start = torch.zeros(len(run), samples.z0[0].numel(), dtype=torch.float64, device=device)
            value, delta = lbfgs.minimise(evaluate, start, options.noise_iterations)
            loss[run[:real]] = value[:real].cpu().numpy()
            norm[run[:real]] = delta[:real].norm(dim=1).cpu().numpy()
            counts += done

        memory = models.Memory(device, smallest=1)
        for batch, whole in progress(list(models.batches(n, batch_size))):
            memory.read(work, len(batch), whole)
    bad = ~np.isfinite(loss)
    if bad.any():
        raise UserError(
            f"the loss is not finite ({int(bad.sum())} of {n} images)",
            f"sample {samples.ids[int(np.flatnonzero(bad)[0])]}, timestep {options.noise_timestep}",
            "check the weights, or use float32",
        )
    return Optimised(loss, norm, counts)


def _loss_of_delta(
    denoiser: Denoiser, samples: Samples, run: np.ndarray, real: int, t: int, device: Any, dtype: Any, counts: Counts
) -> Callable[[torch.Tensor, bool], tuple]:
    """delta, float64[m, d] -> mean-square loss at z_t + delta, float64[m], and its gradient, for one run of samples."""
    import torch

    z0, eps = samples.pair(run, device)
    z, target = denoiser.noised(z0, eps, t), denoiser.target(z0, eps, t)
    condition, timesteps = samples.condition(run), np.full(len(run), t)

    def evaluate(delta: torch.Tensor, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        moved = (z.double() + delta.reshape(z.shape)).to(z.dtype).requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            off = target.double() - denoiser(moved, timesteps, condition, dtype).double()
            value = off.square().mean((1, 2, 3))
        counts.unet_rows += real
        counts.backwards += real * gradient
        slope = torch.autograd.grad(value.sum(), moved)[0].double().flatten(1) if gradient else None
        return value.detach(), slope

    return evaluate


def optimised_rows(found: Optimised, ids: Sequence[str], timestep: int, bands: int) -> pa.Table:
    """Rows of the block `noise-optimisation`: `vector` is (loss left over, norm of the perturbation)."""
    vector = np.stack([found.loss, found.norm], 1)
    return rows.features_rows("noise-optimisation", ids, timestep, 0, bands, vector=vector)
