"""Commands that only look: list-settings, list-attacks, show-config, validate-config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import yaml

from mia import config
from mia.cli import common
from mia.cli.common import PATH, say
from mia.config import FeaturesOptions

HUB = "https://huggingface.co"


@click.command("list-settings")
@click.option("--timesteps", type=click.Choice(["reconstructed", "committed"]), default="reconstructed")
def list_settings(timesteps: str) -> None:
    """The paper's attack settings, one a line."""
    from mia.settings import SETTINGS

    for s in SETTINGS.values():
        steps = s.timesteps(timesteps)
        span = f"timesteps {steps[0]}..{steps[-1]}" if steps else "timesteps"
        kind = "iterative" if s.iterative else "not iterative"
        click.echo(f"{s.number:2d}  {s.name:32s} {len(steps):2d} {span}, {kind}, guidance {s.guidance_scale:g}")


def _work(command: Callable) -> Callable:
    """The flags of `features` that change what an attack costs; `list-attacks` and `plan` have them in common."""
    usual = FeaturesOptions()
    for flag in (
        click.option("--generations", type=click.IntRange(1), default=usual.generations, help="Pictures of a caption."),
        click.option(
            "--crops", callback=common.listed(int), default=",".join(map(str, usual.crops)), metavar="int,...",
            help="Percent of the side that each crop keeps."
        ),
        click.option("--draws", type=click.IntRange(1), default=usual.draws, help="Noises for each image."),
    ):  # fmt: skip
        command = flag(command)
    return command


@click.command("list-attacks")
@_work
def list_attacks(draws: int, crops: tuple[int, ...], generations: int) -> None:
    """The attacks, one a line, with what each needs and costs for one image; -: as the settings say (`mia plan`)."""
    from mia import walks
    from mia.attacks import REGISTRY
    from mia.cli import passes

    config.refuse_out_of_range("features", {"crops": crops})
    probes = (*walks.PROBES, *walks.PASSES)
    options = FeaturesOptions(settings=(), probes=probes, draws=draws, crops=crops, generations=generations)
    jobs = walks.jobs(options)
    head = ("name", "access", "probes", "rows", "decodes", "encodes", "backwards", "labels", "paper", "summary")
    lines = [head]
    for a in (passes.as_run(attack, jobs) for attack in REGISTRY.values()):
        counts = ("-" if count is None else str(count) for count in (a.unet_rows, a.decodes, a.encodes, a.backwards))
        name = f"{a.name}[_null]" if a.paired else a.name
        lines.append(
            (name, a.access, ",".join(a.probes), *counts, "yes" if a.labels else "no", a.paper, a.summary)  # type: ignore[arg-type]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        aligned = (w.rjust(n) if 3 <= i <= 6 else w.ljust(n) for i, (w, n) in enumerate(zip(line, widths, strict=True)))
        click.echo("  ".join(aligned).rstrip())
    click.echo(
        f"for one image, an attack alone, with {draws} draws, crops of {', '.join(map(str, crops))} %, "
        f"{options.variations} variations, {generations} generations (FSCA's authors: 64) of "
        f"{options.generation_steps} steps, {len(options.gradient_timesteps)} timesteps of gradients; "
        "what its probes read beside is in `mia plan`"
    )


@click.command("show-config")
@click.option("--config", "path", type=PATH, default="config.yaml", help="The configuration.")
def show_config(path: Any) -> None:
    """The configuration as it is read, checked."""
    click.echo(yaml.safe_dump(config.load(path), sort_keys=False, allow_unicode=True).rstrip())


@click.command("validate-config")
@click.option("--config", "path", type=PATH, default="config.yaml", help="The configuration.")
def validate_config(path: Any) -> None:
    """Check a configuration against the schema."""
    for file in config.unpinned(config.load(path)):
        repo = file.removeprefix("hf://").split("@")[0]
        say(f"{path}: a commit is to be filled in, and a run will stop at it: {file}; see {HUB}/{repo}/commits/main")
    click.echo(f"{path}: valid")


@click.command("plan")
@click.option("--settings", "wanted", default="all", help="`all`, `none`, or settings by number, name or key.")
@click.option("--losses", default="all", help="`all`, or some of model_loss, latent_error, pixel_error.")
@click.option("--attacks", default="none", help="`all`, `none`, or attacks by name (`mia list-attacks`).")
@_work
@click.option("--images", type=click.IntRange(1), default=10_000, help="Members and non-members together.")
@click.option("--tflops", type=click.FloatRange(0, min_open=True), default=790.0, help="The device's rate, TFLOP/s.")
def plan(
    wanted: str, losses: str, attacks: str, draws: int, crops: tuple[int, ...], generations: int, images: int,
    tflops: float,
) -> None:  # fmt: skip
    """Count the work of a study on Stable Diffusion 1.x before it is done; loads no model."""
    from mia import attacks as registry
    from mia import plan as stage
    from mia import settings, walks
    from mia.cli import passes

    numbers = settings.named(wanted)
    chosen = settings.LOSSES if losses == "all" else tuple(losses.split(","))
    config.refuse_out_of_range("features", {"losses": chosen, "crops": crops})
    probes = tuple(name for name in registry.probes(registry.named(attacks)) if name != "settings")
    options = FeaturesOptions(
        settings=numbers, probes=probes, losses=chosen, draws=draws, crops=crops, generations=generations
    )
    work = passes.planned(options) if set(probes) & set(walks.PASSES) else ()
    for line in stage.shown(stage.plan(options, *work), images, tflops):
        click.echo(line)
