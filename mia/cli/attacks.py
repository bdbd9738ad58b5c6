"""Commands that need no model: scores, evaluate, report."""

from __future__ import annotations

import pathlib
from typing import Any

import click
import polars as pl

from mia import tables
from mia.cli import common
from mia.cli.common import PATH, listed, many, one, seed_option, stage_options
from mia.errors import UserError


@click.command()
@many("--features", "features", "Shards of the features tables, of every block.")
@one("--dataset", "The dataset table; only labels of its calibration part are read.")
@click.option("--settings", required=True, callback=listed(int), metavar="int,...", help="Settings by number.")
@seed_option
@one("--output", "The scores table.")
@stage_options("scores")
def scores(features: Any, dataset: Any, settings: Any, seed: int, output: Any, options: Any) -> None:
    """Turn stored features into attack scores, high = member."""
    from mia import scores as stage

    columns = ("sample_id", "block", "timestep", "draw", "model_loss", "latent_error", "pixel_error")
    rows = pl.from_arrow(tables.read(list(features), "features", columns=columns))
    model = _one_target(features)
    labels = pl.from_arrow(tables.read(dataset, "dataset", columns=("sample_id", "group", "part", "member")))
    assert isinstance(rows, pl.DataFrame) and isinstance(labels, pl.DataFrame)
    known = labels.with_columns(pl.when(pl.col("part") == "calibration").then("member").alias("member"))
    found = stage.attack_scores(rows, known.drop("part"), settings, options, seed)
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


@click.command()
@many("--scores", "scores", "Scores tables (sample_id, attack, variant, score), or one with a column for each score.")
@click.option("--dataset", type=PATH, help="The dataset table, when the scores hold no column `member`.")
@click.option("--calibration", type=PATH, help="A second table like --scores: choices are made there.")
@click.option("--lower-is-member", is_flag=True, help="Scores are losses: change their sign (and thresholds').")
@seed_option
@one("--output", "The metrics table.")
@stage_options("evaluation")
def evaluate(
    scores: Any, dataset: Any, calibration: Any, lower_is_member: bool, seed: int, output: Any, options: Any
) -> None:
    """Choose on calibration, report on test, with intervals."""
    from mia import evaluation as stage

    if dataset is not None:
        for given, flag in ((calibration, "--calibration"), (lower_is_member, "--lower-is-member")):
            if given:
                raise UserError(f"{flag} does not go with --dataset", flag, "leave it out: the tables say it")
        long = pl.DataFrame(pl.from_arrow(tables.read(list(scores), "scores")))
        labels = pl.DataFrame(pl.from_arrow(tables.read(dataset, "dataset")))
        scored = stage.join(long, labels.select("sample_id", "member", "group", "part"))
    else:
        if len(scores) > 1:
            raise UserError(f"{len(scores)} tables without --dataset", "--scores", "join them, a column for each score")
        scored = stage.from_wide(_wide(scores[0]), None if calibration is None else _wide(calibration))
    if lower_is_member:
        scored = stage.flipped(scored)
    inputs = [*scores, *(path for path in (dataset, calibration) if path is not None)]
    made = common.made_by(
        "evaluation",
        options,
        seed,
        inputs,
        lower_is_member=lower_is_member,
        unet=tables.provenance(scores[0]).get("unet"),
        libraries=("scipy", "polars"),
    )
    tables.write(output, stage.evaluate(scored, options, seed), "metrics", made)


def _wide(path: pathlib.Path) -> pl.DataFrame:
    if not path.is_file():
        raise UserError("scores file does not exist", path, "mend the path")
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as problem:
        raise UserError(f"scores file cannot be read as Parquet ({problem})", path, "make it anew") from problem
