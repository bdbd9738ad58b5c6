"""The command before `metadata`: what is worth keeping of one source file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import click

from mia import tables
from mia.cli import common
from mia.cli.common import PATH, column_names, stage_options, write_dropped
from mia.errors import UserError

FILTERED = {
    "min_aesthetic": ["aesthetic"], "min_similarity": ["similarity"], "max_punsafe": ["punsafe"],
    "max_pwatermark": ["pwatermark"], "min_side_px": ["width", "height"], "max_aspect_ratio": ["width", "height"],
}  # fmt: skip


@click.command()
@click.option("--source", required=True, help="A local file, or hf://datasets/OWNER/NAME@COMMIT/FILE.")
@click.option(
    "--column", "columns", multiple=True, metavar="OURS=THEIRS", help="How the source names a column of ours."
)
@click.option("--pool", type=click.Choice(tables.POOLS), default="candidate", help="Named in the counts only.")
@click.option("--output", type=PATH, help="Parquet with the selected rows; without it rows are only counted.")
@click.option("--dropped-output", type=PATH, help="Counts of rows dropped, by reason.")
@stage_options("select")
def select(source: str, columns: Any, pool: str, output: Any, dropped_output: Any, options: Any) -> None:
    """Select rows of one source file: cheap filters, language, a random cap; or count them."""
    from mia import selection as stage
    from mia import sources

    if dropped_output is not None and output is None:
        raise UserError("nothing is dropped where rows are only counted", "--dropped-output", "give --output too")
    if output is not None and output.is_dir():
        raise UserError("output is a folder", output, "name a file")
    mapping = column_names(columns)
    if options.languages and "language" not in mapping:
        options = dataclasses.replace(options, detect_language=True)  # else every row would lack it, and pass
    _warn_of_blind_filters(source, options, mapping)
    path = sources.fetch(source)
    with sources.reading(source):
        rows = sources.named(sources.scan(path), mapping, source)
        if output is None:
            counts = stage.count(rows, options)
        else:
            name = source if source.startswith(sources.HUB) else path.stem
            libraries = ("polars", "eldc")
            made = common.made_by("select", options, None, [path], libraries=libraries, columns=mapping, source=name)
            counts = _write(stage, rows, output, options, made)
    kept, total = counts.pop(""), sum(counts.values())
    if output is not None and dropped_output is not None:
        write_dropped(dropped_output, [("select", r, pool, n) for r, n in counts.items()], made, kept + total, kept)
    lost = "".join(f", {reason} {rows:,}" for reason, rows in counts.items())
    common.say(f"{path.name}: {kept + total:,} rows, {kept:,} stay{lost}")


def _warn_of_blind_filters(source: str, options: Any, mapping: dict[str, str]) -> None:
    """A row that lacks a value passes, so a filter on a column that no one named would do nothing, in silence."""
    plain = type(options)()
    for option, columns in FILTERED.items():
        absent = [column for column in columns if column not in mapping]
        if absent and getattr(options, option) != getattr(plain, option):
            what = "holds nothing back" if absent == columns else "may hold less back"
            common.say(f"{source}: no column is named for '{absent[0]}', so {option} {what}")


def _write(stage: Any, rows: Any, output: pathlib.Path, options: Any, made: dict) -> dict[str, int]:
    for left in output.parent.glob(f".{output.name}.*.part"):  # by a run that was killed; there may be gigabytes
        left.unlink()
    text = json.dumps(made, sort_keys=True, ensure_ascii=False)
    with tables.replacing(output) as temporary:
        return stage.write(rows, temporary, options, {tables.PROVENANCE_KEY.decode(): text})
