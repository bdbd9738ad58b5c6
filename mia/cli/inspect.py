"""Commands that only look: list-settings, list-attacks, show-config, validate-config."""

from __future__ import annotations

from typing import Any

import click
import yaml

from mia import config
from mia.cli.common import PATH


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


@click.command("list-attacks")
def list_attacks() -> None:
    """The attacks, one a line."""
    from mia.scores import ATTACKS

    for name in ATTACKS:
        click.echo(name)


@click.command("show-config")
@click.option("--config", "path", type=PATH, default="config.yaml", help="The configuration.")
def show_config(path: Any) -> None:
    """The configuration as it is read, checked."""
    click.echo(yaml.safe_dump(config.load(path), sort_keys=False, allow_unicode=True).rstrip())


@click.command("validate-config")
@click.option("--config", "path", type=PATH, default="config.yaml", help="The configuration.")
def validate_config(path: Any) -> None:
    """Check a configuration against the schema."""
    config.load(path)
    click.echo(f"{path}: valid")
