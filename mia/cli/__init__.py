"""The command line. Each command lives with its phase of the flow and is imported when it is called, not before."""

from __future__ import annotations

import importlib

import click

PHASES = {
    "sources": ("select",),
    "dataset": ("metadata", "images", "embeddings", "matches", "dedup", "distance"),
    "sanitize": ("sanitize",),
    "card": ("card",),
    "attrition": ("probe", "attrition"),
    "neighbours": ("neighbours", "links"),
    "target": ("train", "target"),
    "features": ("latents", "features"),
    "attacks": ("scores",),
    "audit": ("audit", "infer"),
    "evaluation": ("evaluate",),
    "report": ("report",),
    "inspect": ("list-settings", "list-attacks", "plan", "show-config", "validate-config"),
}


class Lazy(click.Group):
    """A group whose commands are imported one phase at a time."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [name for names in PHASES.values() for name in names]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        for phase, names in PHASES.items():
            if name in names:
                return getattr(importlib.import_module(f"mia.cli.{phase}"), name.replace("-", "_"))
        return None


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="mia")
def commands() -> None:
    """Membership inference on diffusion models, evaluated honestly."""
