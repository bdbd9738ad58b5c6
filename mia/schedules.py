"""How a model mixes image and noise, and how its network's output becomes a prediction of the noise."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mia import settings


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a model mixes image and noise, z_t = alpha(t) z0 + sigma(t) eps, and what its network is trained to output.

    Attributes:
        alpha_bar: float64[train_steps], the share of the signal in the variance. Diffusion models are defined by it;
            for flow matching it is that of the diffusion model with the same ratio of signal to noise.
        final: what stands for alpha_bar below timestep 0.
        prediction: `epsilon`, `v_prediction`, `sample` or `flow`.
    """

    alpha_bar: np.ndarray
    final: float
    prediction: str = "epsilon"

    @property
    def train_steps(self) -> int:
        """Number of timesteps the model was trained on, 1000 as a rule."""
        return len(self.alpha_bar)

    def at(self, timestep: int | np.ndarray) -> np.ndarray:
        """alpha_bar at `timestep`; `final` where the timestep is below 0."""
        timestep = np.asarray(timestep)
        return np.where(timestep < 0, self.final, self.alpha_bar[np.maximum(timestep, 0)])

    def alpha(self, timestep: int | np.ndarray) -> np.ndarray:
        """The weight of the image at `timestep`, float64 of its shape: sqrt(alpha_bar), or 1 - t/1000 for a flow."""
        return 1 - self.sigma(timestep) if self.prediction == "flow" else np.sqrt(self.at(timestep))

    def sigma(self, timestep: int | np.ndarray) -> np.ndarray:
        """The weight of the noise at `timestep`, float64 of its shape: sqrt(1 - alpha_bar), or t/1000 for a flow."""
        if self.prediction == "flow":
            return np.maximum(np.asarray(timestep), 0) / self.train_steps
        return np.sqrt(1 - self.at(timestep))

    def to_noise(self, output: Any, z: Any, alpha: Any, sigma: Any) -> Any:
        """The noise prediction that the network's `output` at `z` amounts to, of the same shape.

        epsilon: e. v_prediction: v = alpha e - sigma x, so e = alpha v + sigma z. sample: e = (z - alpha x) / sigma.
        flow: v = e - x, so e = z + alpha v.

        Source: arXiv 2202.00512, appendix D (v); arXiv 2403.03206, section 2 (flow).
        """
        if self.prediction == "epsilon":
            return output
        if self.prediction == "v_prediction":
            return alpha * output + sigma * z
        if self.prediction == "sample":
            return (z - alpha * output) / sigma
        return z + alpha * output

    def target(self, z0: Any, eps: Any, alpha: Any, sigma: Any) -> Any:
        """What the network is trained to output at alpha z0 + sigma eps: eps, alpha eps - sigma z0, z0 or eps - z0."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "v_prediction":
            return alpha * eps - sigma * z0
        return z0 if self.prediction == "sample" else eps - z0


def flow_schedule(train_steps: int = settings.TRAIN_STEPS) -> Schedule:
    """Straight lines from image to noise: alpha = 1 - t/1000 and sigma = t/1000 in the model's own timestep.

    What schedulers call `shift` chooses among these timesteps when an image is made; the model itself knows none.
    """
    sigma = np.arange(train_steps) / train_steps
    return Schedule((1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2), 1.0, "flow")
