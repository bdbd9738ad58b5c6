"""Scores beside truth: from long or wide tables, by sample id, into the arrays that evaluation works on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from mia.errors import UserError

SEPARATOR = "\x1f"
CHOSEN = "best_of_all"  # the attack's name in rows where the choice was made over all attacks
CHANCE, SHIFT, SIGNAL = "chance", "explained by shift", "signal"  # verdicts


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores beside truth: names (attack, variant) of k columns, float64[n, k], and arrays over the n samples."""

    names: list[tuple[str, str]]
    scores: np.ndarray
    ids: np.ndarray
    member: np.ndarray
    group: np.ndarray
    part: np.ndarray


def columns(table: pl.DataFrame, where: object) -> pl.DataFrame:
    """A table of scores as sample_id and a float64 column for each score.

    From a long table (sample_id, attack, variant, score) or a wide one (sample_id and a float column for each score;
    `name/variant` names a variant, such as a timestep).

    Raises:
        UserError: a column missing, scores that are not floats, NaN or infinity, an id or a row twice.
    """
    table = identified(table, where)
    if {"attack", "variant", "score"} <= set(table.columns):
        _refuse_bad_scores(table.select("score"), where)
        if table.select("sample_id", "attack", "variant").is_duplicated().any():
            raise UserError("two scores of one sample by one attack", where, "give each once")
        table = table.with_columns(pl.concat_str("attack", "variant", separator=SEPARATOR).alias("column"))
        found = table.pivot("column", index="sample_id", values="score")
    else:
        found = table.drop("member", "group", "part", strict=False)
        names = [name for name in found.columns if name != "sample_id"]
        _refuse_bad_scores(found.select(names), where)
        twice = found.filter(found["sample_id"].is_duplicated())
        if len(twice):
            raise UserError(f"{len(twice)} rows share a sample_id", twice["sample_id"][0], f"each once in {where}")
        renamed = {n: n.replace("/", SEPARATOR, 1) if "/" in n else n + SEPARATOR for n in names}
        if len(set(renamed.values())) < len(names) or any(name.count(SEPARATOR) != 1 for name in renamed.values()):
            raise UserError("columns do not name their attacks apart", where, f"rename some of {names}")
        found = found.rename(renamed)
    if any(name.split(SEPARATOR)[0] == CHOSEN for name in found.columns):
        raise UserError(f"a score is named '{CHOSEN}', as the choice over all is", where, "rename it")
    kinds = [pl.col(name).cast(pl.Float64) for name in sorted(found.columns) if name != "sample_id"]
    return found.select("sample_id", *kinds)


def identified(table: pl.DataFrame, where: object) -> pl.DataFrame:
    """The table with its `sample_id` as text.

    Raises:
        UserError: there is none, or some are empty or are lists.
    """
    if "sample_id" not in table.columns:
        raise UserError("table has no column 'sample_id'", where, f"columns: {table.columns}")
    return table.with_columns(_words(table, "sample_id", where))


def groups_of(table: pl.DataFrame, where: object, names: Sequence[str] = ("group",)) -> pl.Series:
    """The near-duplicate group of each row: the first of the columns `names` that is there, else the sample alone.

    Raises:
        UserError: some entries of that column are empty or are lists.
    """
    return _words(table, next((name for name in names if name in table.columns), "sample_id"), where).alias("group")


def _words(table: pl.DataFrame, name: str, where: object) -> pl.Series:
    if table[name].dtype.is_nested() or table[name].dtype == pl.Binary:
        raise UserError(f"column '{name}' is {table[name].dtype}", where, "make it text or whole numbers")
    if table[name].has_nulls():
        raise UserError(f"column '{name}' has empty values", where, "fill them, or drop the rows")
    return table[name].cast(pl.String)


def _refuse_bad_scores(scores: pl.DataFrame, where: object) -> None:
    if not scores.columns:
        raise UserError("scores have no float column", where, "give at least one column of scores")
    for name in scores.columns:
        if not scores[name].dtype.is_float():
            raise UserError(f"column '{name}' is {scores[name].dtype}", where, "make it float, or drop it")
        if not scores[name].is_finite().fill_null(False).all():
            raise UserError(f"column '{name}' holds NaN, infinity or nothing", where, "mend it, or drop the rows")


def stacked(parts: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """`columns` of several wide tables, given by the flags they came with, below each other.

    Raises:
        UserError: besides what `columns` refuses, tables that do not hold the same columns.
    """
    found = {where: columns(table, where) for where, table in parts.items()}
    first, *rest = found
    for where in rest:
        for one, other in ((first, where), (where, first)):
            absent = [name for name in found[one].columns if name not in found[other].columns]
            if absent:
                name = absent[0].replace(SEPARATOR, "/").rstrip("/")
                raise UserError(f"scores have no column '{name}'", other, f"{one} has it: give both the same")
    return pl.concat([table.select(found[first].columns) for table in found.values()])


def labels(test: pl.DataFrame, calibration: pl.DataFrame | None) -> pl.DataFrame:
    """sample_id, member, group and part, a row for each sample; without a column `group` each sample stands alone.

    Raises:
        UserError: no or another than a bool `member`, empty values, two labels of one sample, an id or a group in both
            parts.
    """
    parts = {"test": test} if calibration is None else {"calibration": calibration, "test": test}
    found = []
    for part, table in parts.items():
        where = {"test": "--scores", "calibration": "--calibration"}[part]
        table = identified(table, where)
        if "member" not in table.columns:
            raise UserError(f"{part} scores have no column 'member'", where, f"columns: {table.columns}")
        if table["member"].has_nulls():
            raise UserError(f"{part} column 'member' has empty values", where, "fill them")
        if table["member"].dtype != pl.Boolean:
            raise UserError(f"{part} column 'member' is {table['member'].dtype}", where, "make it bool")
        rows = table.select("sample_id", "member", groups_of(table, where), pl.lit(part).alias("part")).unique()
        torn = rows.filter(rows["sample_id"].is_duplicated())  # a long table tells a sample's label once for each score
        if len(torn):
            raise UserError("one sample has two labels or groups", torn["sample_id"].min(), f"give it one in {where}")
        found.append(rows)
    rows = pl.concat(found)
    for name, rule in (("sample_id", "each sample once, in one part"), ("group", "keep a group in one part")):
        both = rows.filter(pl.col("part").n_unique().over(name) > 1)
        if len(both):
            raise UserError(f"{both[name].n_unique()} values of {name} stand in both parts", both[name].min(), rule)
    return rows


def join(scores: pl.DataFrame, truth: pl.DataFrame) -> Scored:
    """Every column of `columns` beside the labels (sample_id, member, group, part), rows by sample id.

    Raises:
        UserError: a column leaves out a sample, or scores one without a label.
    """
    stray = scores.join(truth, on="sample_id", how="anti")
    if len(stray):
        raise UserError(
            f"{len(stray)} scored samples are not in the dataset", stray["sample_id"][0], "score this dataset"
        )
    rows = truth.sort("sample_id").join(scores, on="sample_id", how="left", maintain_order="left")
    names = [name for name in scores.columns if name != "sample_id"]
    for name in names:
        words = name.replace(SEPARATOR, " ").strip()
        absent = rows.filter(pl.col(name).is_null())
        if len(absent):
            raise UserError(f"{words} has no score for {len(absent)} samples", absent["sample_id"][0], "score them all")
    arrays = (rows[name].to_numpy() for name in ("sample_id", "member", "group", "part"))
    split = [tuple(name.split(SEPARATOR)) for name in names]
    return Scored(split, rows.select(names).to_numpy(), *arrays)  # type: ignore[arg-type]


def flipped(scored: Scored) -> Scored:
    """The same scores with their sign changed: for losses, which are low for members. Thresholds change theirs too."""
    return dataclasses.replace(scored, scores=-scored.scores)


def merged(several: Sequence[Scored]) -> Scored | None:
    """The columns of several tables over the same samples, side by side; None of none."""
    if not several:
        return None
    names = [name for one in several for name in one.names]
    return dataclasses.replace(several[0], names=names, scores=np.concatenate([s.scores for s in several], axis=1))
