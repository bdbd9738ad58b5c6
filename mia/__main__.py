"""Entry point of `mia` and `python -m mia`."""

from __future__ import annotations

import logging
import sys
import traceback

import click

from mia.errors import UserError


def main() -> None:
    """Run a command; a failure ends in one line, `error: what, where, fix`, and exit code 2; 1 if the fault is ours."""
    from mia.cli import commands

    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")  # libraries: warnings only
    logging.getLogger("mia").setLevel(logging.INFO)
    try:
        sys.exit(commands.main(standalone_mode=False) or 0)
    except UserError as problem:
        click.echo(f"error: {problem}", err=True)
    except click.exceptions.NoArgsIsHelpError as problem:
        problem.show()
        click.echo("error: no command given, choose one of these", err=True)
    except click.ClickException as problem:
        click.echo(f"error: {' '.join(problem.format_message().split())}", err=True)
    except click.exceptions.Abort:
        click.echo("error: interrupted", err=True)
        sys.exit(130)
    except Exception as problem:
        place = getattr(problem, "filename", None)
        if isinstance(problem, OSError) and place:
            click.echo(f"error: {problem.strerror}, {place}", err=True)
            sys.exit(2)
        traceback.print_exc()
        click.echo(f"error: {type(problem).__name__}, a bug: please report the lines above", err=True)
        sys.exit(1)
    sys.exit(2)


if __name__ == "__main__":
    main()
