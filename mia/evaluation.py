"""How well each score tells members from non-members: chosen on calibration, reported on test, with intervals."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from mia import metrics, rng, tables
from mia.config import EvaluationOptions
from mia.errors import UserError

CHOSEN = "best on calibration"


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores beside truth: names (attack, variant) of k columns, float64[n, k], and arrays over the n samples."""

    names: list[tuple[str, str]]
    scores: np.ndarray
    member: np.ndarray
    group: np.ndarray
    part: np.ndarray


def join(scores: pl.DataFrame, dataset: pl.DataFrame) -> Scored:
    """Every attack's scores beside the labels, rows by sample id.

    Raises:
        UserError: an attack leaves out a sample, or scores one that the dataset does not hold.
    """
    names = scores.select("attack", "variant").unique().sort("attack", "variant").rows()
    wide = scores.with_columns(pl.format("{}\x1f{}", "attack", "variant").alias("column"))
    wide = wide.pivot("column", index="sample_id", values="score")
    stray = wide.join(dataset, on="sample_id", how="anti")
    if len(stray):
        raise UserError(
            f"{len(stray)} scored samples are not in the dataset", stray["sample_id"][0], "score this dataset"
        )
    rows = dataset.sort("sample_id").join(wide, on="sample_id", how="left", maintain_order="left")
    columns = ["\x1f".join(name) for name in names]
    for column in columns:
        absent = rows.filter(pl.col(column).is_null())
        if len(absent):
            attack = column.replace("\x1f", " ")
            raise UserError(
                f"{attack} has no score for {len(absent)} samples", absent["sample_id"][0], "score them all"
            )
    return Scored(
        names,
        rows.select(columns).to_numpy(),
        rows["member"].to_numpy(),
        rows["group"].to_numpy(),
        rows["part"].to_numpy(),
    )


def from_wide(test: pl.DataFrame, calibration: pl.DataFrame | None) -> Scored:
    """Scores from tables with `sample_id`, `member` and one float column for each score; attack = the column's name.

    Raises:
        UserError: a column missing, a label that is not bool, a score that is not a finite float, an id twice.
    """
    flags = {"calibration": "--calibration", "test": "--scores"}
    parts = {"test": test} if calibration is None else {"calibration": calibration, "test": test}
    columns = sorted({name for table in parts.values() for name in table.columns} - {"sample_id", "member"})
    for part, table in parts.items():
        for name in ("sample_id", "member", *columns):
            if name not in table.columns:
                raise UserError(f"{part} scores have no column '{name}'", flags[part], f"columns: {table.columns}")
        if table["member"].dtype != pl.Boolean:
            raise UserError(f"{part} column 'member' is {table['member'].dtype}", flags[part], "make it bool")
        for name in ("sample_id", "member"):
            if table[name].has_nulls():
                raise UserError(f"{part} column '{name}' has empty values", flags[part], "fill them")
        for name in columns:
            kind = table[name].dtype
            if not kind.is_float():
                raise UserError(f"{part} column '{name}' is {kind}", flags[part], "make it float, or drop it")
            if not table[name].is_finite().fill_null(False).all():
                raise UserError(f"{part} column '{name}' holds NaN, infinity or nothing", flags[part], "drop the rows")
    if not columns:
        raise UserError("scores have no float column", "--scores", "give at least one column of scores")
    casts: list[Any] = [pl.col("sample_id").cast(pl.String), "member", *(pl.col(c).cast(pl.Float64) for c in columns)]
    rows = pl.concat([t.select(*casts, part=pl.lit(p)) for p, t in parts.items()])
    twice = rows.filter(rows["sample_id"].is_duplicated())
    if len(twice):
        raise UserError(f"{len(twice)} rows share a sample_id", twice["sample_id"][0], "each sample once, in one part")
    arrays = (rows["member"].to_numpy(), rows["sample_id"].to_numpy(), rows["part"].to_numpy())
    return Scored([(name, "") for name in columns], rows.select(columns).to_numpy(), *arrays)


def flipped(scored: Scored) -> Scored:
    """The same scores with their sign changed: for losses, which are low for members. Thresholds change theirs too."""
    return dataclasses.replace(scored, scores=-scored.scores)


def evaluate(scored: Scored, options: EvaluationOptions, seed: int) -> pa.Table:
    """The metrics table.

    `method` says how a row's variant came to be: `as_is` (every variant, nothing chosen, on test: the curves over
    timesteps), `holdout` (an attack's variant with the highest calibration TPR at the first FPR target, ties by AUC,
    reported on both parts), and attack `best on calibration`, the same choice made over all attacks. Intervals of
    `as_is` rows hold one at a time; those of `holdout` rows, which are read side by side, hold together over the
    table's k attacks (Bonferroni: each at 1 - (1 - confidence) / k), so that one of many controls does not miss
    chance by luck alone.

    Raises:
        UserError: options out of range, no sample in the test part, or a part with one side only.
    """
    _check(options)
    rows = []
    at = {
        part: np.flatnonzero(scored.part == part)
        for part in tables.PARTS
        if part == "test" or (scored.part == part).any()
    }
    weights = {}
    for part, mine in at.items():
        if not scored.member[mine].any() or scored.member[mine].all():
            raise UserError(
                f"the {part} part holds one side only", "dataset", "bring members and non-members to both parts"
            )
        generator = rng.stream(seed, part, purpose="bootstrap")
        weights[part] = metrics.group_weights(scored.group[mine], scored.member[mine], options.bootstrap, generator)

    together = 1 - (1 - options.confidence) / len({attack for attack, _ in scored.names})

    def measure(column: int, part: str, attack: str, variant: str, method: str) -> list[dict]:
        mine, confidence = at[part], options.confidence if method == "as_is" else together
        found = metrics.measured(
            scored.scores[mine, column], scored.member[mine], weights[part], options.fpr_targets, confidence
        )
        return [row | {"attack": attack, "variant": variant, "part": part, "method": method} for row in found]

    for column, (attack, variant) in enumerate(scored.names):
        rows += measure(column, "test", attack, variant, "as_is")
    for attack, column in choices(scored, at["calibration"], options).items() if "calibration" in at else ():
        name, variant = scored.names[column]
        for part in at:
            rows += measure(
                column, part, attack, f"{name} {variant}".strip() if attack == CHOSEN else variant, "holdout"
            )
    names = tables.SCHEMAS["metrics"].names
    return pa.Table.from_pylist([{n: row.get(n) for n in names} for row in rows], schema=tables.SCHEMAS["metrics"])


def _check(options: EvaluationOptions) -> None:
    """Hold options that came as flags to what the schema says of those in `config.yaml`."""
    if not options.fpr_targets or not all(0 < target <= 1 for target in options.fpr_targets):
        raise UserError(
            f"fpr_targets are {options.fpr_targets}", "evaluation.fpr_targets", "give rates above 0, at most 1"
        )
    if not 0 < options.confidence < 1:
        raise UserError(f"confidence is {options.confidence}", "evaluation.confidence", "give a number between 0 and 1")
    if options.bootstrap < 100:
        raise UserError(f"bootstrap is {options.bootstrap}", "evaluation.bootstrap", "give 100 resamples or more")


def choices(scored: Scored, calibration: np.ndarray, options: EvaluationOptions) -> dict[str, int]:
    """For each attack, and for all of them but the blind ones together, the column that is best on calibration."""
    member = scored.member[calibration]

    def merit(column: int) -> tuple[float, float]:
        score = scored.scores[calibration, column]
        return metrics.tpr_at_fpr(score, member, options.fpr_targets[0]).tpr, metrics.auc(score, member)

    best: dict[str, int] = {}
    merits = [merit(column) for column in range(len(scored.names))]
    for column, (attack, _) in enumerate(scored.names):
        for name in (attack,) if attack.startswith("blind_") else (attack, CHOSEN):
            if name not in best or merits[column] > merits[best[name]]:
                best[name] = column
    return best
