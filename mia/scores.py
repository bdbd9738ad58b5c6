"""Attacks: cheap functions from stored features to one number per image and variant, high = member, always."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import polars as pl

from mia import attacks, classifiers, settings, tables
from mia.attacks.calibration import Calibration
from mia.attacks.evidence import Evidence
from mia.config import ScoresOptions
from mia.errors import UserError

ATTACKS = tuple(attacks.REGISTRY)
OF_SETTINGS = tuple(name for name, attack in attacks.REGISTRY.items() if attack.probes == ("settings",))
log = logging.getLogger(__name__)


def mean_losses(features: pl.DataFrame, numbers: Iterable[int]) -> pl.DataFrame:
    """Each loss averaged over draws: sample_id, setting (its name), timestep, loss, value; low = member."""
    present = [loss for loss in settings.LOSSES if features[loss].null_count() < len(features)]
    names = {settings.own_block(settings.setting(n)): settings.setting(n).name for n in numbers}
    # In this order, on every machine: the forest draws among columns by their place. By blocks, since each is copied.
    means = (
        _means(features.filter(pl.col("block") == block), present).with_columns(setting=pl.lit(names[block]))
        for block in sorted(names)
    )
    long = pl.concat(means).unpivot(present, index=["sample_id", "setting", "timestep"], variable_name="loss")
    return long.drop_nulls("value")


def _means(rows: pl.DataFrame, present: list[str]) -> pl.DataFrame:
    kept = rows.sort("timestep", "sample_id", "draw").group_by("sample_id", "timestep", maintain_order=True)
    return kept.agg(pl.col(present).cast(pl.Float64).mean())


def loss_threshold(losses: pl.DataFrame) -> pl.DataFrame:
    """Minus the mean loss: attack = the setting's name, variant = `<loss>@<timestep>`. Source: arXiv 2306.12983, 3."""
    return losses.select(
        "sample_id", pl.col("setting").alias("attack"),
        pl.format("{}@{}", "loss", pl.col("timestep").cast(pl.String).str.zfill(3)).alias("variant"),
        (-pl.col("value")).alias("score"),
    )  # fmt: skip


def classifier(
    name: str, losses: pl.DataFrame, labels: pl.DataFrame, options: ScoresOptions, seed: int, workers: int = 1
) -> pl.DataFrame:
    """A classifier on all settings' losses at all timesteps: attack = its name, variant `all`.

    Fitted on calibration; calibration rows are scored out of fold. Only calibration labels are read. The log tells the
    gap between its AUC on the rows it was fitted on and out of fold. See `classifiers.fitted`.

    Args:
        labels: sample_id, group, and `member`, which is null in the test part.
    """
    wide = losses.with_columns(pl.format("{} {}@{}", "setting", "loss", "timestep").alias("column"))
    wide = wide.pivot("column", index="sample_id", values="value").sort("sample_id")
    partial = wide.filter(pl.any_horizontal(pl.all().is_null()))
    if len(partial):
        raise UserError(
            f"{len(partial)} samples lack some of the losses", partial["sample_id"][0], "extract every block for all"
        )
    truth = wide.select("sample_id").join(labels, on="sample_id", how="left", maintain_order="left")
    known = truth["member"].is_not_null().to_numpy()
    member, group = truth["member"].fill_null(False).to_numpy(), truth["group"].to_numpy()
    found = classifiers.fitted(
        name, wide.drop("sample_id").to_numpy(), member, group, known, options, seed, workers=workers
    )
    log.info("%s", found.gap(name))
    return wide.select("sample_id", attack=pl.lit(name), variant=pl.lit("all"), score=pl.Series(found.score))


def attack_scores(
    features: pl.DataFrame, labels: pl.DataFrame, numbers: Iterable[int], options: ScoresOptions, seed: int,
    workers: int = 1, evidence: Evidence | None = None,
) -> pl.DataFrame:  # fmt: skip
    """The scores table of every attack in `options.attacks`.

    Args:
        features: The losses of `setting-NN` blocks (other blocks are passed over), which attacks on settings read.
        labels: sample_id, group, and `member`, which is null in the test part.
        numbers: Settings that attacks on settings read.
        options: Attacks by name, and how classifiers are fitted.
        seed: Of folds and learners.
        workers: Processes to fit in; changes no answer.
        evidence: All other blocks, which the other attacks read.

    Raises:
        UserError: no attack or an unknown one, a block that was not extracted, too few labels to fit with.
    """
    numbers = list(numbers)
    if not options.attacks:
        raise UserError("no attack is asked for", "scores.attacks", f"use {list(ATTACKS)}")
    for name in options.attacks:
        attacks.attack(name)
    out = []
    if any(name in OF_SETTINGS for name in options.attacks):
        out += _of_settings(features, labels, numbers, options, seed, workers)
    others = [name for name in options.attacks if name not in OF_SETTINGS]
    if others:
        out.append(_of_evidence(others, evidence or Evidence((), (1,)), labels, options, seed, workers))
    return pl.concat(out).select(tables.SCHEMAS["scores"].names)


def _of_settings(
    features: pl.DataFrame, labels: pl.DataFrame, numbers: list[int], options: ScoresOptions, seed: int, workers: int
) -> list[pl.DataFrame]:
    if not numbers:
        raise UserError(
            "an attack on settings is asked for, and no setting", "features.settings", "name one or leave it out"
        )
    blocks = set(features["block"].unique())
    for number in numbers:
        if settings.own_block(settings.setting(number)) not in blocks:
            raise UserError(
                f"setting {number} was not extracted", "features", f"run `mia features --settings {number}`"
            )
        rows = features.filter(pl.col("block") == settings.own_block(settings.setting(number)))
        if rows.select("sample_id", "timestep", "draw").is_duplicated().any():
            raise UserError("features hold a row twice", "features", "give each shard once")
    losses = mean_losses(features, numbers)
    out = []
    if "loss_threshold" in options.attacks:
        out.append(loss_threshold(losses))
    learners = [attack for attack in options.attacks if attack in classifiers.LEARNERS]
    return out + [classifier(name, losses, labels, options, seed, workers) for name in learners]


def _of_evidence(
    names: list[str], evidence: Evidence, labels: pl.DataFrame, options: ScoresOptions, seed: int, workers: int
) -> pl.DataFrame:
    """Scores of the registry's other attacks, in its order: what they share is placed once."""
    calibration = Calibration.of(evidence.ids, labels, options, seed, workers)
    order = sorted(set(names), key=ATTACKS.index)
    return long_table(evidence, (one for name in order for one in attacks.run(name, evidence, calibration)))


def long_table(evidence: Evidence, found: Iterable[tuple[str, str, np.ndarray]]) -> pl.DataFrame:
    """(attack, variant, float64[n]) as the columns of the scores table."""
    ids = pl.Series("sample_id", evidence.ids.tolist(), pl.String)
    parts = [
        pl.DataFrame({"sample_id": ids, "score": score}).with_columns(attack=pl.lit(attack), variant=pl.lit(variant))
        for attack, variant, score in found
    ]
    return pl.concat(parts).select("sample_id", "attack", "variant", "score")
