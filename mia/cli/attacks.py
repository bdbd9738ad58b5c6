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
@click.option(
    "--settings", required=True, callback=listed(int), metavar="int,...", help="Settings by number, for their attacks."
)
@seed_option
@workers_option
@one("--output", "The scores table.")
@stage_options("scores")
def scores(features: Any, dataset: Any, settings: Any, seed: int, workers: int, output: Any, options: Any) -> None:
    """Turn stored features into attack scores, high = member."""
    from mia import attacks
    from mia import scores as stage
    from mia.attacks import evidence

    files = list(features)
    blocks = attacks.blocks(name for name in options.attacks if name not in stage.OF_SETTINGS)
    columns = ("sample_id", "block", "timestep", "draw", "model_loss", "latent_error", "pixel_error")
    needed = bool(set(options.attacks) & set(stage.OF_SETTINGS))
    rows = pl.from_arrow(tables.read(files, "features", columns=columns)) if needed else pl.DataFrame()
    model = _one_target(files)
    others = evidence.read(files, _latent_shape(files), blocks) if blocks else None
    labels = pl.from_arrow(tables.read(dataset, "dataset", columns=("sample_id", "group", "part", "member")))
    assert isinstance(rows, pl.DataFrame) and isinstance(labels, pl.DataFrame)
    known = labels.with_columns(pl.when(pl.col("part") == "calibration").then("member").alias("member"))
    found = stage.attack_scores(rows, known.drop("part"), settings, options, seed, workers, others)
    made = common.made_by(
        "scores", options, seed, [*features, dataset], settings=settings, **model, libraries=("scikit-learn", "polars")
    )
    tables.write(output, found.to_arrow().cast(common.plain(tables.SCHEMAS["scores"])), "scores", made)


def _one_target(paths: Any) -> dict:
    """Hashes of the model that all the features share. Refuses features of two models, seeds or draw counts."""
    shared: dict[str, Any] = {}
    for path in paths:
        made = tables.provenance(path)
        facts = {"unet": made.get("unet"), "encoders": made.get("encoders"), "seed": made.get("seed")}
        options = made.get("options", {})
        facts["dtype"] = options.get("dtype")
        if options.get("settings"):  # what a job does not look at stands at its default
            facts["timesteps"] = options.get("timesteps")
        if options.get("settings") or "noised" in options.get("probes", ()):
            facts["draws"] = options.get("draws")
        for name, value in facts.items():
            if shared.setdefault(name, value) != value:
                raise UserError(
                    f"features differ in {name}: {shared[name]} and {value}", path, "give one target's features"
                )
    return {name: shared[name] for name in ("unet", "encoders")}


def _latent_shape(paths: Any) -> tuple[int, ...]:
    """Channels, height and width of the latents that all the features are of."""
    shapes = {tuple(tables.provenance(path).get("latent_shape") or ()): path for path in paths}
    if () in shapes:
        raise UserError("features do not say the shape of their latents", shapes[()], "extract them anew")
    if len(shapes) > 1:
        raise UserError(f"features differ in latent_shape: {sorted(shapes)}", paths[0], "give one target's features")
    return shapes.popitem()[0]
