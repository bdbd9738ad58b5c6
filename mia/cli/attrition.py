"""Commands on links that die: probe, before anything is downloaded, and attrition, after."""

from __future__ import annotations

import collections
import functools
import pathlib
from typing import Any

import click
import pyarrow as pa

from mia import tables
from mia.cli import common
from mia.cli.common import PATH, many, one, stage_options
from mia.errors import UserError

BATCH = 16_384  # rows of metadata in memory at a time


@click.command()
@one("--metadata", "The metadata table.")
@click.option("--count", type=click.IntRange(1), default=20, help="URLs to try.")
@click.option("--root", type=PATH, default=".", help="Folder that relative file: URLs start from.")
@click.option(
    "--timeout-s", type=click.FloatRange(0, min_open=True), default=30.0, help="Seconds for one attempt, in all."
)
@click.option("--output", type=PATH, help="Counts by pool and status, as JSON.")
@stage_options("images")
def probe(metadata: Any, count: int, root: Any, timeout_s: float, output: pathlib.Path | None, options: Any) -> None:
    """Try a few URLs of each pool, before thousands are; fails when none of them works."""
    from mia import images as stage

    batches = (pa.Table.from_batches([batch]) for batch in tables.batches([metadata], "metadata", BATCH))
    some = functools.reduce(lambda kept, more: stage.probe_rows(pa.concat_tables([kept, more]), count), batches)
    rows = stage.probe_rows(some, count)
    found = stage.fetch(rows, options, root=root, timeout_s=timeout_s)
    statuses, pools = found["status"].to_pylist(), rows["pool"].to_pylist()
    counts: dict[str, dict[str, int]] = {
        pool: dict(collections.Counter(s for s, p in zip(statuses, pools, strict=True) if p == pool))
        for pool in sorted(set(pools))
    }
    for pool, by_status in counts.items():
        common.say(f"{pool}: " + ", ".join(f"{n} {status}" for status, n in sorted(by_status.items())))
    if "ok" not in statuses:
        causes = ", ".join(sorted({f"{s} ({d})" for s, d in zip(statuses, found["detail"].to_pylist(), strict=True)}))
        what = f"none of {len(statuses)} URLs gives an image: {causes[:500]}"
        raise UserError(what, metadata, "mend the URLs, the network or what the options allow")
    if output:
        common.write_json(output, counts)


@click.command()
@one("--metadata", "The metadata table.")
@many("--images", "images", "An images table; give every shard.")
@one("--output", "Rows, share and interval by pool and status.")
@one("--report-output", "Whether survival predicts membership, as JSON.")
@click.option("--confidence", type=click.FloatRange(0, 1, True, True), default=0.95, help="Of each interval.")
@click.option("--level", type=click.FloatRange(0, 1, True, True), default=0.01, help="A p-value below it is evidence.")
def attrition(metadata: Any, images: Any, output: Any, report_output: Any, confidence: float, level: float) -> None:
    """Count what died, by pool and cause, and test whether survival predicts membership."""
    from mia import attrition as stage

    statuses = tables.read(list(images), "images", ("sample_id", "status"))
    rows = stage.joined(tables.batches([metadata], "metadata", BATCH), statuses)
    found = stage.survival(rows, confidence, level)
    made = common.made_by(
        "attrition", None, None, [metadata, *images], libraries=("polars", "scipy"), confidence=confidence
    )
    tables.write(output, stage.rates(rows, confidence), "attrition", made)
    common.write_json(report_output, found)
