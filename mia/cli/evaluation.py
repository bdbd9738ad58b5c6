"""The command that judges attacks, in the workflow and on anybody's tables: evaluate."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import click
import numpy as np
import polars as pl

from mia import formats, tables
from mia.cli import common
from mia.cli.common import PATH, listed, many, one, seed_option, stage_options, workers_option
from mia.errors import UserError


@click.command()
@many("--scores", "scores", "Scores: (sample_id, attack, variant, score), or a column for each. Parquet, CSV or npz.")
@click.option("--dataset", type=PATH, help="The dataset table, when the scores hold no column `member`.")
@click.option("--calibration", type=PATH, help="A second table like --scores: choices are made there.")
@click.option("--blind", type=PATH, multiple=True, help="Blind baselines' scores of the same samples.")
@click.option("--control", type=PATH, multiple=True, help="The attacks' scores on a model that saw neither side.")
@click.option(
    "--classifiers", default="", callback=listed(str), metavar="NAME,...", help="Also fit these on all the columns."
)
@workers_option
@click.option("--lower-is-member", is_flag=True, help="Scores are losses: change their sign (and thresholds').")
@seed_option
@click.option("--roc-output", type=PATH, help="Points of every column's ROC curve, evenly spaced on a log axis.")
@one("--output", "The metrics table.")
@stage_options("evaluation")
def evaluate(
    scores: Any, dataset: Any, calibration: Any, blind: Any, control: Any, classifiers: Any, workers: int,
    lower_is_member: bool, seed: int, roc_output: Any, output: Any, options: Any,
) -> None:  # fmt: skip
    """Choose on calibration, report on test, with intervals, beside blind baselines and negative controls."""
    from mia import evaluation as stage
    from mia import scored as table

    if roc_output == output:
        raise UserError("both outputs are one file", "--roc-output", "name another")
    if dataset is not None:
        for given, flag in ((calibration, "--calibration"), (lower_is_member, "--lower-is-member")):
            if given:
                raise UserError(f"{flag} does not go with --dataset", flag, "leave it out: the tables say it")
        truth = common.frame(dataset, "dataset").select("sample_id", "member", "group", "part")
        columns = table.columns(pl.concat([common.frame(path, "scores") for path in scores]), "--scores")
    else:
        if len(scores) > 1:
            raise UserError(f"{len(scores)} tables without --dataset", "--scores", "join them, a column for each score")
        parts = {"--scores": formats.read(scores[0])}
        if calibration is not None:
            parts["--calibration"] = formats.read(calibration)
        truth = table.labels(parts["--scores"], parts.get("--calibration"))
        columns = table.stacked(parts)

    scored = table.join(columns, truth)
    against = table.merged([_rival(path, truth) for path in blind])
    controls = {str(path): _rival(path, truth) for path in control}
    if lower_is_member:
        scored, controls = table.flipped(scored), {name: table.flipped(one) for name, one in controls.items()}
    if classifiers:
        scored = _with_classifiers(scored, classifiers, options, seed, workers)
        controls = {n: _with_classifiers(one, classifiers, options, seed, workers) for n, one in controls.items()}
    unet = _unet(scores)
    inputs = [*scores, *blind, *control, *(path for path in (dataset, calibration) if path is not None)]
    made = common.made_by(
        "evaluation", options, seed, inputs, lower_is_member=lower_is_member, classifiers=classifiers,
        unet=unet, libraries=("scipy", "scikit-learn", "polars"),
    )  # fmt: skip
    tables.write(output, stage.evaluate(scored, options, seed, against, controls), "metrics", made)
    if roc_output is not None:
        tables.write(roc_output, stage.roc(scored), "roc", made)


def _unet(paths: Sequence[pathlib.Path]) -> str | None:
    """The one model that the scores are of, as far as they say.

    Raises:
        UserError: they are of two: a fine-tuned model's attacks are no evidence about another.
    """
    said = {path: tables.provenance(path).get("unet") for path in paths if path.suffix == ".parquet"}
    known = {unet: path for path, unet in said.items() if unet}
    if len(known) > 1:
        raise UserError(f"scores are of two models, {' and '.join(known)}", [*known.values()][1], "give one target's")
    return next(iter(known), None)


def _rival(path: pathlib.Path, truth: pl.DataFrame) -> Any:
    """Scores of a blind baseline or a control for the samples evaluated; more samples than these are left out."""
    from mia import scored

    found = scored.columns(formats.read(path), path)
    return scored.join(found.join(truth, on="sample_id", how="semi"), truth)


def _with_classifiers(scored: Any, names: tuple[str, ...], options: Any, seed: int, workers: int) -> Any:
    """The scores with a column more for each classifier, fitted on all of the columns and on calibration alone."""
    from mia import classifiers
    from mia.config import ScoresOptions

    taken = {attack for attack, _ in scored.names}
    for name in names:
        if name not in classifiers.LEARNERS:
            raise UserError(f"unknown learner '{name}'", "--classifiers", f"use {list(classifiers.LEARNERS)}")
        if name in taken or names.count(name) > 1:
            raise UserError(f"'{name}' names two attacks", "--classifiers", "name it once, or rename the column")
    if options.crossfit_folds < 3:
        raise UserError(f"{options.crossfit_folds} folds", "--crossfit-folds", "classifiers need 3 or more")
    known = scored.part == "calibration"
    if not known.any():
        raise UserError("classifiers need a calibration part", "--classifiers", "give --calibration, or leave them out")
    grids, more = ScoresOptions(folds=options.crossfit_folds), []
    for name in names:
        found = classifiers.fitted(
            name, scored.scores, scored.member, scored.group, known, grids, seed, workers=workers
        )
        common.say(found.gap(name))
        more.append(found.score)
    return dataclasses.replace(
        scored, names=[*scored.names, *((name, "all") for name in names)],
        scores=np.concatenate([scored.scores, np.stack(more, axis=1)], axis=1),
    )  # fmt: skip
