"""The command between features and evaluation: scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click
import polars as pl
import pyarrow.compute as pc

from mia import tables, walks
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
    files = list(features)
    model = _one_target(files)
    found = _scored(files, model, dataset, settings, seed, workers, options)
    table = found.to_arrow().cast(common.plain(tables.SCHEMAS["scores"]))
    del found
    made = common.made_by(
        "scores", options, seed, [*features, dataset], settings=settings, unet=model["unet"],
        encoders=model["encoders"], libraries=("scikit-learn", "polars"),
    )  # fmt: skip
    tables.write(output, table, "scores", made)


def _scored(
    files: list, model: dict, dataset: Any, settings: Any, seed: int, workers: int, options: Any
) -> pl.DataFrame:
    """The scores. A function of its own, so that what was read is gone from memory when they are sorted and written."""
    from mia import attacks
    from mia import scores as stage
    from mia.attacks import evidence

    blocks = attacks.blocks(name for name in options.attacks if name not in stage.OF_SETTINGS)
    needed = bool(set(options.attacks) & set(stage.OF_SETTINGS))
    rows = settings_losses(files) if needed else pl.DataFrame()
    others = evidence.read(files, _latent_shape(model, files[0]), blocks) if blocks else None
    labels = pl.DataFrame(pl.from_arrow(tables.read(dataset, "dataset", ("sample_id", "group", "part", "member"))))
    known = labels.with_columns(pl.when(pl.col("part") == "calibration").then("member").alias("member"))
    return stage.attack_scores(rows, known.drop("part"), settings, options, seed, workers, others)


def settings_losses(paths: Iterable[object]) -> pl.DataFrame:
    """The losses of the settings' blocks in features files, file by file: other blocks hold more rows than these."""
    columns = ("sample_id", "block", "timestep", "draw", "model_loss", "latent_error", "pixel_error")
    parts = (tables.read(path, "features", columns=columns) for path in paths)
    kept = (part.filter(pc.starts_with(part["block"], "setting-")) for part in parts)
    return pl.concat([pl.DataFrame(pl.from_arrow(part)) for part in kept], how="vertical_relaxed")


# What files of one target may differ in: parts of the work, and a limit that changes no result.
MAY_DIFFER = {"settings", "probes", "losses", "query_budget"}


def _one_target(paths: Any) -> dict[str, Any]:
    """What the features share in being made. Refuses those of two models, seeds or options: no attack may mix them."""
    shared: dict[str, Any] = {}
    for path in paths:
        for name, value in _facts(tables.provenance(path)).items():
            if shared.setdefault(name, value) != value:
                raise UserError(
                    f"features differ in {name}: {shared[name]} and {value}", path, "give one target's features"
                )
    return shared


def _latent_shape(model: dict[str, Any], path: Any) -> tuple[int, ...]:
    """Channels, height and width of the latents."""
    if not model["latent_shape"]:
        raise UserError("features do not say the shape of their latents", path, "extract them anew")
    return tuple(model["latent_shape"])


def _facts(made: dict[str, Any]) -> dict[str, Any]:
    """What a features file is made of: the model, the seed, and those options that its job looks at."""
    options = common.features_options(made)
    looked_at = sorted(walks.looks_at(options) - MAY_DIFFER)
    facts = {name: made.get(name) for name in ("unet", "encoders", "latent_shape", "seed", "version")}
    encoder = {"encoder": made["encoder"]} if made.get("encoder") else {}  # that compared the generations
    return facts | encoder | {name: getattr(options, name) for name in looked_at}
