"""The 18 attack settings of arXiv 2306.12983, their timestep lists, and the DDIM schedule they walk.

Source: `attacks/attacks_config.py` and `attacks/attack_utils.py` of Ankowa/inz 34884b7. As committed, the code that
cuts the timestep lists returns empty lists for settings 7 to 16; the `reconstructed` lists (default) are the simplest
rule that yields the number of points in every published plot, the `committed` ones are kept as a variant.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

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
        latent_shift: noise is added to the running latent midway; where and how much the options say, since 250, the
            place in the authors' configuration, is beyond the last step, while their plot shows a shift (13 fits).
        text_shift: amplitude of the noise added to every token of the caption's and the empty prompt's states.
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
    latent_shift: bool = False
    text_shift: float = 0.0

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
        return self.start_noise_step if self.fixed_noise_step else timestep

    @property
    def shares_grid(self) -> bool:
        """Whether its evaluations are plain ones, z0 noised to level t and told t, shared with other settings."""
        return not self.iterative and not self.fixed_noise_step

    @property
    def guided(self) -> bool:
        """Whether the prediction mixes in the empty prompt's."""
        return self.guidance_scale != 0


_PARTIAL, _FULL = (300, 50, 10), (900, 0, 100)
SETTINGS: dict[int, Setting] = {
    setting.number: setting
    for setting in (
        Setting(1, "embeddings", "Partial denoising", *_PARTIAL, 300),
        Setting(2, "embeddings-diff-starts", "Partial denoising non-iterative", *_PARTIAL, 300, iterative=False),
        Setting(3, "embeddings-shift", "Partial denoising latent shift", *_PARTIAL, 300, latent_shift=True),
        Setting(4, "embeddings-text-shift", "Partial denoising text shift", *_PARTIAL, 300, text_shift=0.1),
        Setting(5, "embeddings-text-shift-05", "Partial denoising bigger text shift", *_PARTIAL, 300, text_shift=0.5),
        Setting(6, "embeddings-wrong-start", "Partial denoising wrong start", *_PARTIAL, 100),
        Setting(7, "embeddings-wrong-start-longer", "Full denoising start 100", *_FULL, 100),
        Setting(
            8, "embeddings-wrong-start-longer-text", "Full denoising start 100 text shift", *_FULL, 100, text_shift=0.1
        ),
        Setting(9, "embeddings-wrong-start-longer-50", "Full denoising start 50", *_FULL, 50),
        Setting(10, "embeddings-wrong-start-longer-300", "Full denoising start 300", *_FULL, 300),
        Setting(11, "embeddings-wrong-start-300-from-200", "Short denoising start 300", 200, 0, 100, 300),
        Setting(
            12, "embeddings-reversed-noise", "Reversed denoising", *_FULL, 100,
            reversed_order=True, guidance_scale=100.0,
        ),
        Setting(
            13, "embeddings-no-classifier-free-guidance", "Full denoising 300 no cfg", *_FULL, 300, guidance_scale=0.0
        ),
        Setting(
            14, "embeddings-noise-100-everytime", "Full denoising 100 non-iterative", *_FULL, 100,
            iterative=False, fixed_noise_step=True, guidance_scale=100.0,
        ),
        Setting(
            15, "embeddings-wrong-start-reversed-steps", "Reversed noising regular cfg", *_FULL, 100,
            reversed_order=True,
        ),
        Setting(
            16, "embeddings-reversed-noise-big-classifier-free-guidance", "Reversed noising", *_FULL, 100,
            iterative=False, reversed_order=True, guidance_scale=100.0,
        ),
        Setting(17, "black-box", "Black-box", 1000, 0, 20, TRAIN_STEPS - 1, iterative=False),  # theirs: 1000
        Setting(18, "embeddings-carlini", "Baseline loss threshold", 300, 300, 20, 300, iterative=False),
    )
}  # fmt: skip


def setting(number: int) -> Setting:
    """Setting `number` of the paper.

    Raises:
        UserError: there is none of that number.
    """
    if number not in SETTINGS:
        raise UserError(f"unknown setting {number}", "settings", "use 1 to 18; `mia list-settings` names them")
    return SETTINGS[number]


def named(text: str) -> tuple[int, ...]:
    """Numbers of the settings that `text` names: `all`, `none`, or numbers, names and keys between commas.

    Raises:
        UserError: a word that is none of these.
    """
    if text in ("all", "none"):
        return tuple(SETTINGS) if text == "all" else ()
    known = {word: of.number for of in SETTINGS.values() for word in (str(of.number), of.name, of.key)}
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, 3) or ["1 to 18; `mia list-settings` names them"]
            raise UserError(f"unknown setting '{word}'", "--settings", f"use {' or '.join(near)}")
    return tuple(dict.fromkeys(known[word] for word in words))


NOISED = "noised"


def own_block(of: Setting) -> str:
    """The name under which a setting's losses are stored, e.g. `setting-01`."""
    return f"setting-{of.number:02d}"


def job_of(of: Setting) -> str:
    """The job, one file for each shard, that reads a setting: all settings that can share an evaluation are one job.

    `noised` holds the settings whose evaluations are plain ones; the others share what starts at one noise level under
    one text, as in `start-300` or `start-300-text-0.1`.
    """
    if of.shares_grid:
        return NOISED
    return f"start-{of.start_noise_step:03d}" + (f"-text-{of.text_shift:g}" if of.text_shift else "")


def alpha_bar(betas_start: float, betas_end: float, steps: int = TRAIN_STEPS) -> np.ndarray:
    """Cumulative product of 1 - beta for `scaled_linear` betas (sqrt(beta) linear), float64[steps]. Source: SD 1.x."""
    betas = np.linspace(np.sqrt(betas_start), np.sqrt(betas_end), steps, dtype=np.float64) ** 2
    return np.cumprod(1.0 - betas)
