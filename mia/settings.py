"""The 18 attack settings of arXiv 2306.12983, their timestep lists, and the DDIM schedule they walk.

Source: `attacks/attacks_config.py` and `attacks/attack_utils.py` of Ankowa/inz 34884b7. As committed, the code that
cuts the timestep lists returns empty lists for settings 7 to 16; the `reconstructed` lists (default) are the simplest
rule that yields the number of points in every published plot, the `committed` ones are kept as a variant.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from mia.errors import UserError

TRAIN_STEPS = 1000
LOSSES = ("model_loss", "latent_error", "pixel_error")
VARIANTS = ("reconstructed", "committed")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to walk the model's timesteps.

    Attributes:
        number: 1 to 18, as in the paper's tables.
        key: the name in the authors' configuration.
        label: the name in the paper.
        start, stop, step: the range of training timesteps and the DDIM step between two of them.
        start_noise_step: the level to which z0 is noised at the start.
        iterative: each step starts from the last one's result; otherwise from z0 noised anew.
        reversed_order: timesteps are walked upwards.
        fixed_noise_step: not iterative, and always noised to `start_noise_step`, whatever timestep the UNet is told.
        guidance_scale: classifier-free guidance weight; 0 means one caption-conditioned prediction, without guidance.
    """

    number: int
    key: str
    label: str
    start: int
    stop: int
    step: int
    start_noise_step: int
    iterative: bool = True
    reversed_order: bool = False
    fixed_noise_step: bool = False
    guidance_scale: float = 7.5

    @property
    def name(self) -> str:
        """The label as an identifier, e.g. `partial_denoising`."""
        return re.sub(r"\W+", "_", self.label.lower())

    def timesteps(self, variant: str = "reconstructed") -> tuple[int, ...]:
        """Training timesteps in the order walked. Source: `attacks.md` 1.2."""
        shift = {"reconstructed": 0, "committed": 1}[variant]
        schedule = [1 + i * self.step for i in reversed(range(TRAIN_STEPS // self.step))]
        first = -((self.start - shift) // self.step + 1)
        last = -((self.stop - shift) // self.step)
        if variant == "committed" and self.stop == 1 or variant == "reconstructed" and self.stop == 0:
            cut = schedule[max(first, -len(schedule)) :]
        else:
            cut = schedule[first:last]
        return tuple(reversed(cut) if self.reversed_order else cut)

    def level(self, timestep: int) -> int:
        """The noise level of the latent that a non-iterative setting feeds to the UNet at `timestep`."""
        return min(self.start_noise_step, TRAIN_STEPS - 1) if self.fixed_noise_step else timestep

    @property
    def shares_grid(self) -> bool:
        """Whether its evaluations are plain ones, z0 noised to level t and told t, shared with other settings."""
        return not self.iterative and not self.fixed_noise_step

    @property
    def guided(self) -> bool:
        """Whether the prediction mixes in the empty prompt's."""
        return self.guidance_scale != 0


SETTINGS: dict[int, Setting] = {
    setting.number: setting
    for setting in (
        Setting(1, "embeddings", "Partial denoising", 300, 50, 10, 300),
        Setting(
            15, "embeddings-wrong-start-reversed-steps", "Reversed noising regular cfg", 900, 0, 100, 100,
            reversed_order=True,
        ),
        Setting(
            16, "embeddings-reversed-noise-big-classifier-free-guidance", "Reversed noising", 900, 0, 100, 100,
            iterative=False, reversed_order=True, guidance_scale=100.0,
        ),
        Setting(18, "embeddings-carlini", "Baseline loss threshold", 300, 300, 20, 300, iterative=False),
    )
}  # fmt: skip


def setting(number: int) -> Setting:
    """Setting `number` of the paper.

    Raises:
        UserError: this version does not implement it.
    """
    if number not in SETTINGS:
        raise UserError(f"unknown setting {number}", "settings", f"use one of {sorted(SETTINGS)}")
    return SETTINGS[number]


GRID = "noised"


def block_of(of: Setting) -> str:
    """The block, extracted by one job into one file per shard, that holds a setting's model evaluations."""
    return GRID if of.shares_grid else own_block(of)


def own_block(of: Setting) -> str:
    """The name under which results that belong to one setting alone are stored, e.g. `setting-01`."""
    return f"setting-{of.number:02d}"


def blocks(numbers: Iterable[int]) -> list[str]:
    """The blocks that the settings need, each once."""
    return sorted({block_of(setting(number)) for number in numbers})


def alpha_bar(betas_start: float, betas_end: float, steps: int = TRAIN_STEPS) -> np.ndarray:
    """Cumulative product of 1 - beta for `scaled_linear` betas (sqrt(beta) linear), float64[steps]. Source: SD 1.x."""
    betas = np.linspace(np.sqrt(betas_start), np.sqrt(betas_end), steps, dtype=np.float64) ** 2
    return np.cumprod(1.0 - betas)
