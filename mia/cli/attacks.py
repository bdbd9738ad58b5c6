"""The command between features and evaluation: scores."""

from __future__ import annotations

from typing import Any

import click
import polars as pl

from mia import tables
from mia.cli import common
from mia.cli.common import listed, many, one, seed_option, stage_options, workers_option
from mia.errors import UserError


@click.command()
@many("--features", "features", "Shards of the features tables, of every block.")
@one("--dataset", "The dataset table; only labels of its calibration part are read.")
@click.option("--settings", required=True, callback=listed(int), metavar="int,...", help="Settings by number.")
@seed_option
@workers_option
@one("--output", "The scores table.")
@stage_options("scores")
def scores(features: Any, dataset: Any, settings: Any, seed: int, workers: int, output: Any, options: Any) -> None:
    """Turn stored features into attack scores, high = member."""
    from mia import scores as stage

    columns = ("sample_id", "block", "timestep", "draw", "model_loss", "latent_error", "pixel_error")
    rows = pl.from_arrow(tables.read(list(features), "features", columns=columns))
    model = _one_target(features)
    labels = pl.from_arrow(tables.read(dataset, "dataset", columns=("sample_id", "group", "part", "member")))
    assert isinstance(rows, pl.DataFrame) and isinstance(labels, pl.DataFrame)
    known = labels.with_columns(pl.when(pl.col("part") == "calibration").then("member").alias("member"))
    found = stage.attack_scores(rows, known.drop("part"), settings, options, seed, workers)
    made = common.made_by(
        "scores", options, seed, [*features, dataset], settings=settings, **model, libraries=("scikit-learn", "polars")
    )
    tables.write(output, found.to_arrow().cast(_plain("scores")), "scores", made)


def _plain(name: str) -> Any:
    import pyarrow as pa

    return pa.schema([pa.field(f.name, f.type) for f in tables.SCHEMAS[name]])


def _one_target(paths: Any) -> dict:
    """Hashes of the model that all the features share. Refuses features of two models, seeds or draw counts."""
    shared: dict[str, Any] = {}
    for path in paths:
        made = tables.provenance(path)
        facts = {"unet": made.get("unet"), "encoders": made.get("encoders"), "seed": made.get("seed")}
        facts |= {name: made.get("options", {}).get(name) for name in ("draws", "dtype", "timesteps")}
        for name, value in facts.items():
            if shared.setdefault(name, value) != value:
                raise UserError(
                    f"features differ in {name}: {shared[name]} and {value}", path, "give one target's features"
                )
    return {name: shared[name] for name in ("unet", "encoders")}
