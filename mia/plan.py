"""What a study costs before a model is loaded: the distinct work of settings and probes, in calls, FLOP, hours, bytes.

Source of the FLOP counts: Stable Diffusion 1.x at 512 px, one row, counted by `torch.utils.flop_counter` on the real
architecture (matrix multiplications, convolutions and attention; a multiply-add is two).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from mia import settings, walks
from mia.config import FeaturesOptions
from mia.walks import Counts

UNET_TFLOP, DECODE_TFLOP, ENCODE_TFLOP, TEXT_TFLOP = 0.80327, 2.51452, 1.11666, 0.01330
LOSS_BYTES, STATISTICS_BYTES = 4, 8 * 30  # float32 losses; Gram matrix, norms and bands in float64


@dataclasses.dataclass(frozen=True)
class Line:
    """One setting or job: timesteps, its work alone, and what it adds to the lines before it; for one image."""

    name: str
    timesteps: int
    alone: Counts
    new: Counts


@dataclasses.dataclass(frozen=True)
class Plan:
    """The work for one image.

    Attributes:
        lines: of each setting, in the order given, then of each job of the probes.
        total: distinct rows and decodes of all, and pictures asked of the target, or of a service in its place.
        encodes, texts: images through the encoder (crops too), and captions through the text encoder.
        backwards: backward passes through the denoiser; each has its forward among the rows.
        to_weights: those of them that go on to its weights; each of the two parts is taken to cost a forward.
        values: losses and statistics written, in bytes before compression.
    """

    lines: Sequence[Line]
    total: Counts
    encodes: int
    texts: int
    backwards: int
    values: int
    to_weights: int = 0

    @property
    def tflop(self) -> float:
        """TFLOP for one image of Stable Diffusion 1.x."""
        calls = self.total.unet_rows * UNET_TFLOP + self.total.decodes * DECODE_TFLOP
        return (
            calls
            + self.encodes * ENCODE_TFLOP
            + self.texts * TEXT_TFLOP
            + (self.backwards + self.to_weights) * UNET_TFLOP
        )


def plan(
    options: FeaturesOptions, more: Counts | None = None, encodes: int = 0, backwards: int = 0, to_weights: int = 0
) -> Plan:
    """The plan of the settings and probes of `options`.

    Args:
        more, encodes, backwards, to_weights: work of the probes that are passes of their own (gradients,
            pictures).
    """
    lines, before = [], dict[str, FeaturesOptions]()
    for number in options.settings:
        of = settings.setting(number)
        alone = dataclasses.replace(options, settings=(number,), probes=())
        job, known = settings.job_of(of), before.get(settings.job_of(of))
        company = dataclasses.replace(alone, settings=(*(known.settings if known else ()), number))
        was = walks.planned(known) if known else Counts()
        new = walks.planned(company)
        gain = Counts(new.unet_rows - was.unet_rows, new.decodes - was.decodes)
        lines.append(Line(f"{number:2d} {of.name}", len(walks.timesteps(of, options)), walks.planned(alone), gain))
        before[job] = company
    jobs = walks.jobs(options)
    for job, its in jobs.items():
        if walks.walked(its):
            was = walks.planned(dataclasses.replace(its, probes=())) if its.settings else Counts()
            now = walks.planned(its)
            gain = Counts(now.unet_rows - was.unet_rows, now.decodes - was.decodes)
            by_itself = walks.planned(dataclasses.replace(its, settings=()))
            lines.append(Line(f"{job}: {', '.join(its.probes)}", 0, by_itself, gain))
    if more is not None:
        lines.append(Line("gradients and pictures", 0, more, more))
    total = sum((walks.planned(its) for its in jobs.values()), more or Counts())
    crops, prompts = ("crops" in options.probes) * len(options.crops), ("prompts" in options.probes) * 3
    values = _bytes(options, jobs.values())
    return Plan(lines, total, 1 + crops + encodes, 1 + prompts, backwards, values, to_weights)


def _bytes(options: FeaturesOptions, jobs: Iterable[FeaturesOptions]) -> int:
    """Values written for one image: a loss for each setting, timestep and draw; statistics for each probe's reading."""
    steps = sum(len(walks.timesteps(settings.setting(n), options)) for n in options.settings)
    found = steps * options.draws * len(options.losses) * LOSS_BYTES
    for its in jobs:
        if walks.walked(its):
            rows = walks.planned(dataclasses.replace(its, settings=())).unet_rows
            found += rows // 2 * STATISTICS_BYTES  # both texts stand in one row
    return found


def shown(found: Plan, images: int, tflops: float) -> Iterable[str]:
    """The plan as lines of text, for so many images at so many TFLOP/s."""
    yield f"{'':44s} {'steps':>5s} {'rows':>6s} {'new':>6s} {'decodes':>8s} {'new':>6s}"
    for line in found.lines:
        steps, alone, new = line.timesteps or "", line.alone, line.new
        counts = f"{alone.unet_rows:6d} {new.unet_rows:6d} {alone.decodes:8d} {new.decodes:6d}"
        yield f"{line.name:44s} {steps:>5} {counts}"
    alone = sum((line.alone for line in found.lines), Counts())
    rows, decodes = found.total.unet_rows, found.total.decodes
    yield f"{'for one image':44s} {'':>5s} {alone.unet_rows:6d} {rows:6d} {alone.decodes:8d} {decodes:6d}"
    yield (
        f"encodes {found.encodes}, text passes {found.texts}, backward passes {found.backwards}, "
        f"pictures {found.total.pictures}"
    )
    hours = found.tflop * images / tflops / 3600
    yield f"{found.tflop:.1f} TFLOP an image; {images} images: {found.tflop * images / 1e6:.2f} EFLOP"
    yield f"{hours:.1f} h at {tflops:g} TFLOP/s; a real device reaches perhaps 40 % of its rate: {hours / 0.4:.1f} h"
    yield f"{found.values * images / 1e6:.0f} MB of losses and statistics, before compression"
