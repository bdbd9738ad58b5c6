"""What the model's gradients say about each image: norms by weight tensor, and inputs masked where they matter.

White-box passes, apart from the engine because they cost backward passes; `noise_optimisation` is the third of them.
Every image goes through the network alone where weights are differentiated: the gradient of a batch is a sum, and a sum
has no norm of its parts. The alternative, `torch.func.vmap` over samples, holds one gradient of all weights for every
sample of the batch (3.4 GB each for SD 1.x in float32) and makes results depend on the batch; one image at a time
already keeps a GPU busy at SD's size. Sources, defaults and differences from the official code:
`docs/expensive_attacks.md`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mia import models, rng, rows
from mia.errors import UserError

if TYPE_CHECKING:
    import torch

GSA_TIMESTEPS = tuple(range(99, 1000, 100))  # GSA's ten
MASKING_TIMESTEPS = tuple(range(0, 1000, 100))  # CDI's ten
DTYPES = ("float32", "bfloat16")
PASSES = ("gsa", "gradient-masking", "noise-optimisation")


@dataclasses.dataclass(frozen=True)
class Options:
    """How the gradient passes run.

    Attributes:
        gsa_timesteps: timesteps whose gradients GSA takes.
        masking_timesteps: timesteps at which inputs are masked; one in both lists costs one backward pass, not two.
        masked_share: part of the latent's entries that is masked, those with the largest input gradient. Source: CDI.
        noise_timestep: where noise is optimised. CDI has 100; 101 is the nearest of the timesteps read elsewhere.
        noise_iterations: of L-BFGS. Source: CDI.
        dtype: `float32`, or `bfloat16`: forward and backward in bfloat16, by autocast where weights are float32 (their
            gradients are then float32). Norms are float64 and GSA1's sum float32 in both. There is no float16: its
            gradients overflow, and the one published port that used it replaced what overflowed by pooled means.
    """

    gsa_timesteps: tuple[int, ...] = GSA_TIMESTEPS
    masking_timesteps: tuple[int, ...] = MASKING_TIMESTEPS
    masked_share: float = 0.2
    noise_timestep: int = 101
    noise_iterations: int = 5
    dtype: str = "float32"


@dataclasses.dataclass
class Counts:
    """Work done: rows through the network, and backward passes, each of one row."""

    unet_rows: int = 0
    backwards: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.unet_rows + other.unet_rows, self.backwards + other.backwards)


def _epsilon(z0: torch.Tensor, eps: torch.Tensor, timestep: int) -> torch.Tensor:
    return eps


def _as_it_is(output: torch.Tensor, z: torch.Tensor, timestep: int) -> torch.Tensor:
    return output


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network with the schedule it was trained on.

    Attributes:
        network: `network(z, t, condition)` is its output, [n, C, H, W], for latents z and timesteps t, int64[n]. Its
            weights are its own `named_parameters()`, or those of the torch modules that it holds as attributes.
        alpha, sigma: z_t = alpha(t) z0 + sigma(t) eps.
        target: `target(z0, eps, t)`, what the output is trained towards; noise by default.
        noise: `noise(output, z, t)`, the noise prediction that an output stands for; the output itself by default.
    """

    network: Callable[[Any, Any, Any], Any]
    alpha: Callable[[int], Any]
    sigma: Callable[[int], Any]
    target: Callable[[Any, Any, int], Any] = _epsilon
    noise: Callable[[Any, Any, int], Any] = _as_it_is

    @classmethod
    def of(cls, network: Any) -> Denoiser:
        """The denoiser of one target's networks, whose `schedule` has `alpha`, `sigma`, `target` and `to_noise`."""
        schedule = network.schedule

        def mixed(t: int) -> tuple[float, float]:
            return float(schedule.alpha(t)), float(schedule.sigma(t))

        return cls(
            network, schedule.alpha, schedule.sigma, lambda z0, eps, t: schedule.target(z0, eps, *mixed(t)),
            lambda output, z, t: schedule.to_noise(output, z, *mixed(t)),
        )  # fmt: skip

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """The network's weight tensors by name, each once, in the order of registration.

        Raises:
            TypeError: the network neither has weights nor holds a module that has.
        """
        import torch

        if hasattr(self.network, "named_parameters"):
            return dict(self.network.named_parameters())
        held = {k: v for k, v in vars(self.network).items() if isinstance(v, torch.nn.Module)}
        if not held:
            raise TypeError(f"{type(self.network).__name__} has no named_parameters() and holds no torch module")
        prefix = (lambda name: f"{name}.") if len(held) > 1 else (lambda name: "")
        named = {prefix(name) + key: p for name, module in held.items() for key, p in module.named_parameters()}
        first = {id(p): key for key, p in reversed(named.items())}  # a tensor that two modules share counts once
        return {key: p for key, p in named.items() if first[id(p)] == key}

    def noised(self, z0: torch.Tensor, eps: torch.Tensor, timestep: int) -> torch.Tensor:
        """z0 noised to `timestep`."""
        return float(self.alpha(timestep)) * z0 + float(self.sigma(timestep)) * eps

    def __call__(self, z: torch.Tensor, timesteps: np.ndarray, condition: Any, dtype: Any) -> torch.Tensor:
        """The network's output at z, in z's dtype, computed in `dtype`."""
        import torch

        t = torch.from_numpy(np.asarray(timesteps, dtype=np.int64)).to(z.device)
        return self.network(z.to(dtype), t, condition).to(z.dtype)


@dataclasses.dataclass(frozen=True)
class Samples:
    """One shard of images, ready for the model.

    Attributes:
        ids: sample ids, n of them.
        z0: scaled latents, float32[n, C, H, W], on any device.
        condition: `condition(rows)` is what the network takes beside z and t for these samples, int64[m] -> any.
        seed: of the noise, which is draw 0 of purpose "forward", as everywhere.
    """

    ids: Sequence[str]
    z0: torch.Tensor
    condition: Callable[[np.ndarray], Any]
    seed: int

    def pair(self, rows: np.ndarray, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """z0 and eps of these samples on `device`."""
        import torch

        z0 = self.z0[torch.from_numpy(rows)].to(device)
        eps = rng.noise(self.seed, [self.ids[i] for i in rows], [0] * len(rows), "forward", tuple(z0.shape[1:]))
        return z0, torch.from_numpy(eps).to(device, z0.dtype)


@dataclasses.dataclass(frozen=True)
class Backward:
    """What `backward` found.

    Attributes:
        gsa1: norm, by weight tensor, of the gradient of the loss averaged over timesteps; float64[n, tensors].
        gsa2: mean over timesteps of the norms of each one's gradient; float64[n, tensors].
        masking: CDI's masked score, low = member; float64[n, timesteps].
        timesteps: of `masking`, ascending.
        tensors: names of the weight tensors.
        counts: work done.
    """

    gsa1: np.ndarray
    gsa2: np.ndarray
    masking: np.ndarray
    timesteps: tuple[int, ...]
    tensors: tuple[str, ...]
    counts: Counts


def planned(passes: Sequence[str], options: Options, n_samples: int) -> Counts:
    """The work that `backward` (`gsa`, `gradient-masking`) and `noise_optimisation.optimise` will do."""
    gsa = set(options.gsa_timesteps) if "gsa" in passes else set()
    masking = set(options.masking_timesteps) if "gradient-masking" in passes else set()
    once = Counts(len(gsa | masking) + len(masking), len(gsa | masking))
    if "noise-optimisation" in passes:
        once += Counts(options.noise_iterations + 1, options.noise_iterations)
    return Counts(once.unet_rows * n_samples, once.backwards * n_samples)


@contextlib.contextmanager
def differentiable(weights: dict[str, torch.nn.Parameter], wanted: bool, dtype: str) -> Iterator[Any]:
    """Gradients on for all weights, or for none of them; as they were afterwards. Gives the dtype of the input.

    Raises:
        UserError: the weights' dtype does not go with `dtype`.
    """
    import torch

    kind = next(iter(weights.values())).dtype
    if kind == torch.float16 or (dtype == "float32" and kind == torch.bfloat16):
        raise UserError(f"weights are {kind}, gradients in {dtype}", "gradients.dtype", "load the weights in float32")
    if dtype not in DTYPES:
        raise UserError(f"gradients in {dtype}", "gradients.dtype", f"use one of {', '.join(DTYPES)}")
    before = {name: p.requires_grad for name, p in weights.items()}
    device = next(iter(weights.values())).device.type
    autocast = dtype == "bfloat16" and kind != torch.bfloat16
    try:
        for p in weights.values():
            p.requires_grad_(wanted)
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast, cache_enabled=False):
            yield kind
    finally:
        for name, p in weights.items():
            p.requires_grad_(before[name])


def backward(
    denoiser: Denoiser, samples: Samples, options: Options, passes: Sequence[str] = ("gsa", "gradient-masking"),
    progress: Callable = iter,
) -> Backward:  # fmt: skip
    """GSA1 and GSA2 (arXiv 2308.06405) and gradient masking (CDI, arXiv 2411.12858) from one loop over timesteps.

    Raises:
        UserError: a gradient or score is not finite; names sample, timestep and tensor. Nothing is ever put in its
            place.
    """
    weights = denoiser.weights()
    gsa = sorted(set(options.gsa_timesteps)) if "gsa" in passes else []
    masking = sorted(set(options.masking_timesteps)) if "gradient-masking" in passes else []
    n, width = len(samples.ids), len(weights) if gsa else 0
    gsa1, gsa2, masked = np.empty((n, width)), np.empty((n, width)), np.empty((n, len(masking)))
    out = Backward(gsa1, gsa2, masked, tuple(masking), tuple(weights) if gsa else (), Counts())
    memory = models.Memory(next(iter(weights.values())).device, smallest=1)
    with differentiable(weights, bool(gsa), options.dtype) as dtype:

        def work(row: int, rows: np.ndarray, real: int) -> None:
            one = _Image(denoiser, samples, row, weights, options, dtype, out.counts, memory)
            out.gsa1[row], out.gsa2[row], out.masking[row] = one.scores(gsa, masking)

        for row in progress(range(n)):
            memory.read(functools.partial(work, row), 1, 1)
    return out


class _Image:
    """One image's passes. Norms stay on the device until the image is done: to wait for each would idle a GPU."""

    def __init__(
        self, denoiser: Denoiser, samples: Samples, row: int, weights: dict[str, Any], options: Options, dtype: Any,
        counts: Counts, memory: models.Memory,
    ):  # fmt: skip
        self.denoiser, self.samples, self.weights, self.options = denoiser, samples, weights, options
        self.row, self.dtype, self.counts, self.memory = row, dtype, counts, memory
        self.z0, self.eps = samples.pair(np.array([row]), next(iter(weights.values())).device)

    def scores(self, gsa: list[int], masking: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """GSA1 and GSA2, float64[tensors] each (empty without `gsa`), and masked scores, float64[masking]."""
        import torch

        norms, masks = [], []
        total = (
            [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in self.weights.values()]
            if gsa
            else []
        )
        for t in sorted({*gsa, *masking}):
            by_input, by_weight = self.gradients(t, t in masking, t in gsa)
            if t in masking:
                masks.append(self.mask(by_input))
            if t in gsa:
                norms.append(_norms(by_weight))
                for kept, g in zip(total, by_weight, strict=True):
                    kept.add_(g, alpha=1 / len(gsa))
            del by_weight
        gsa1 = gsa2 = np.empty(0)
        if gsa:
            each = torch.stack(norms).cpu().numpy()
            self.refuse(~np.isfinite(each), gsa, "gradient")
            gsa1, gsa2 = _norms(total).cpu().numpy(), each.mean(0)
            self.refuse(~np.isfinite(gsa1)[None], [gsa], "accumulated gradient")
        return gsa1, gsa2, self.masked(masks, masking) if masking else np.empty(0)

    def gradients(self, t: int, by_input: bool, by_weight: bool) -> tuple[Any, tuple]:
        """Gradients of the mean-square loss at timestep t, by the noised latent and by every weight tensor."""
        import torch

        z = self.denoiser.noised(self.z0, self.eps, t).requires_grad_(by_input)
        output = self.denoiser(z, np.array([t]), self.samples.condition(np.array([self.row])), self.dtype)
        loss = (self.denoiser.target(self.z0, self.eps, t) - output).square().mean()
        self.counts.unet_rows += 1
        self.counts.backwards += 1
        wanted = [z] * by_input + list(self.weights.values()) * by_weight
        found = torch.autograd.grad(loss, wanted, materialize_grads=True)  # a weight that is not used has gradient 0
        return (found[0], found[1:]) if by_input else (None, found)

    def mask(self, gradient: torch.Tensor) -> torch.Tensor:
        """True at the given share of entries with the largest gradient, bool[1, C, H, W].

        By z_t, not z0: one is alpha(t) times the other, which moves no entry. Ties, frequent in bfloat16, go to the
        entry that comes first.
        """
        import torch

        size = gradient[0].numel()
        order = gradient.flatten().abs().sort(descending=True, stable=True).indices
        found = torch.zeros(size, dtype=torch.bool, device=gradient.device)
        found[order[: max(1, round(self.options.masked_share * size))]] = True
        finite = gradient.isfinite().all()  # else no mask means anything: masked() refuses it
        return (found & finite).reshape(gradient.shape)

    def masked(self, masks: list, timesteps: list[int]) -> np.ndarray:
        """norm((eps - z0)[M] - e[M]), e being the noise predicted for z0 with eps in place of its masked entries.

        All timesteps of the image in one call, where memory holds it, without gradients.
        """
        found = np.empty(len(timesteps))

        def work(rows: np.ndarray, real: int) -> None:
            found[rows] = self.restored([masks[i] for i in rows], [timesteps[i] for i in rows])

        self.memory.read(work, len(timesteps), len(timesteps))
        self.refuse(~np.isfinite(found)[:, None], timesteps, "masked score", ["latent"])
        return found

    def restored(self, masks: list, timesteps: list[int]) -> np.ndarray:
        """What `masked` says of some timesteps, by one call; NaN where the mask is empty."""
        import torch

        mask = torch.cat(masks)
        count = len(timesteps)
        with torch.no_grad():
            z = torch.where(mask, self.eps, self.z0)
            output = self.denoiser(z, np.array(timesteps), self.samples.condition(np.full(count, self.row)), self.dtype)
            each = [self.denoiser.noise(output[i : i + 1], z[i : i + 1], t) for i, t in enumerate(timesteps)]
            off = ((self.eps - self.z0) - torch.cat(each)).double() * mask
            empty = torch.full((count,), float("nan"), dtype=torch.float64, device=z.device)
            score = torch.where(mask.flatten(1).any(1), off.flatten(1).norm(dim=1), empty)
        self.counts.unet_rows += count
        return score.cpu().numpy()

    def refuse(self, bad: np.ndarray, timesteps: list, what: str, tensors: Sequence[str] = ()) -> None:
        """Stop at a value that is not finite, bool[timesteps, tensors]."""
        if not bad.any():
            return
        at, tensor = (int(i) for i in np.argwhere(bad)[0])
        name = (tensors or tuple(self.weights))[tensor]
        raise UserError(
            f"the {what} is not finite ({int(bad.sum())} of {bad.size} values of this image)",
            f"sample {self.samples.ids[self.row]}, timestep {timesteps[at]}, tensor {name}",
            "check the weights, or use float32",
        )


def _norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The L2 norm of each tensor, summed in float64; float64[tensors]."""
    import torch

    return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors])


def backward_rows(found: Backward, ids: Sequence[str], bands: int) -> dict[str, pa.Table]:
    """Rows of the features table by block, of what was computed: `gsa1`, `gsa2` (timestep 0), `gradient-masking`."""
    blocks = {}
    if found.tensors:
        for block, norms in (("gsa1", found.gsa1), ("gsa2", found.gsa2)):
            blocks[block] = rows.features_rows(block, ids, 0, 0, bands, vector=norms)
    if found.timesteps:
        each = [i for i in ids for _ in found.timesteps]
        at = np.tile(found.timesteps, len(ids))
        score = found.masking.reshape(-1)
        blocks["gradient-masking"] = rows.features_rows("gradient-masking", each, at, 0, bands, score)
    return blocks
