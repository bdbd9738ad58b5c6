"""Commands that look for shift: audit, in the workflow and on anybody's tables, and infer, which rests on it."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import click
import numpy as np
import polars as pl

from mia import formats, tables
from mia.cli import common
from mia.cli.common import PATH, one, seed_option, stage_options
from mia.errors import UserError


@click.command()
@click.option("--dataset", type=PATH, help="The dataset table, with --images and --embeddings; or")
@click.option("--members", type=PATH, help="A table of members: sample_id, caption; image, url, width, height, group.")
@click.option("--nonmembers", type=PATH, help="A table of non-members, with the same columns.")
@click.option("--images", "images", type=PATH, multiple=True, help="Shards of the images table.")
@click.option("--embeddings", "embeddings", type=PATH, multiple=True, help="Shards of the embeddings table.")
@click.option("--max-auc", type=click.FloatRange(0, 1), default=1.0, help="Exit with 3 when a baseline's is higher.")
@click.option("--max-tpr", type=click.FloatRange(0, 1), default=1.0, help="The same for TPR at the first --fpr.")
@seed_option
@one("--output", "The baselines' metrics table NAME.parquet; NAME.scores and NAME.telling come to lie beside it.")
@stage_options("audit")
@stage_options("evaluation", "rates")
@click.pass_context
def audit(
    context: click.Context, dataset: Any, members: Any, nonmembers: Any, images: Any, embeddings: Any, max_auc: float,
    max_tpr: float, seed: int, output: pathlib.Path, options: Any, rates: Any,
) -> None:  # fmt: skip
    """Tell members from non-members without any diffusion model; name what tells them apart."""
    from mia import audit as stage
    from mia import evaluation, scored

    if (dataset is None) == (members is None or nonmembers is None):
        raise UserError("nothing to audit, or two things", "mia audit", "give --dataset, or --members and --nonmembers")
    if dataset is not None:
        seen, truth = _from_dataset(dataset, images, embeddings, options)
    else:
        paths = {"--members": members, "--nonmembers": nonmembers}
        seen, truth = sides(paths, options.sentence_model, images="image" in options.features)
        if context.get_parameter_source("features") is click.core.ParameterSource.DEFAULT:
            options = dataclasses.replace(options, features=stage.possible(seen))
        if not options.features:
            raise UserError("nothing to look at", f"{members} and {nonmembers}", "give both a column such as caption")
    member, group, part = (truth[name].to_numpy() for name in ("member", "group", "part"))
    found = stage.audit(seen, member, group, part, options, seed)
    if dataset is None:  # every score is out of fold, so all of them may be reported
        truth = truth.with_columns(part=pl.lit("test"))
    scores = pl.DataFrame(pl.from_arrow(found.scores))
    metrics = evaluation.evaluate(scored.join(scored.columns(scores, "audit"), truth), rates, seed)
    inputs = [p for p in (dataset, members, nonmembers, *images, *embeddings) if p is not None]
    made = common.made_by("audit", options, seed, inputs, libraries=("scikit-learn", "scipy", "polars"))
    tables.write(output.with_suffix(".scores.parquet"), found.scores, "scores", made)
    tables.write(output.with_suffix(".telling.parquet"), found.telling, "telling", made)
    made = common.made_by("evaluation", rates, seed, inputs, audit=made["options"], libraries=made["libraries"])
    tables.write(output, metrics, "metrics", made)
    rows = pl.DataFrame(pl.from_arrow(metrics)).filter(method="as_is", part="test")
    _say_audit(rows, pl.DataFrame(pl.from_arrow(found.telling)), rates.fpr_targets[0])
    broken = _broken(rows, {"auc": max_auc, "tpr": max_tpr}, rates.fpr_targets[0])
    for line in broken:
        common.say(line)
    if broken:
        context.exit(3)


def _from_dataset(dataset: pathlib.Path, images: Any, embeddings: Any, options: Any) -> tuple[Any, pl.DataFrame]:
    """What the baselines see of a dataset of the workflow, and its labels."""
    from mia import audit as stage
    from mia import blind

    rows = tables.read(dataset, "dataset")
    ids, captions = rows["sample_id"].to_pylist(), rows["caption"].to_pylist()
    vectors = common.embeddings_of(embeddings, rows) if embeddings else None
    seen = stage.Seen(
        np.array(ids, dtype=object), captions=captions, urls=rows["url"].to_pylist(),
        image_statistics=common.image_statistics(images, ids) if "image" in options.features else None,
        image_embeddings=None if vectors is None else tables.vectors(vectors["image"]),
        text_embeddings=None if vectors is None else tables.vectors(vectors["text"]),
        sentence_embeddings=blind.sentence_embeddings(options.sentence_model, captions)
        if options.sentence_model else None,
    )  # fmt: skip
    return seen, common.frame(dataset, "dataset").select("sample_id", "member", "group", "part")


ASIDE = ("caption", "image", "url", "width", "height", "image_embedding", "text_embedding", "sha256", "part", "pool")


def sides(paths: dict[str, pathlib.Path], sentence_model: str = "", *, images: bool = True) -> tuple[Any, pl.DataFrame]:
    """What the baselines see of two tables, the members' first, and their labels: all calibration, rows by id.

    Groups are the column `group`, else identical captions, else each sample alone. Without `images` none is looked at.
    """
    from mia import audit as stage
    from mia import blind, scored

    parts = []
    for member, (where, path) in zip((True, False), paths.items(), strict=True):
        table = scored.identified(formats.read(path), path)
        if not len(table):
            raise UserError("table has no rows", path, "give samples on both sides")
        _refuse_bad_columns(table, where)
        known = [name for name in (*ASIDE, "group") if name in table.columns]
        parts.append(table.select("sample_id", *known, member=pl.lit(member)))
    shared = [name for name in parts[0].columns if name in parts[1].columns]
    rows = pl.concat([part.select(shared) for part in parts], how="vertical_relaxed").sort("sample_id")
    twice = rows.filter(rows["sample_id"].is_duplicated())
    if len(twice):
        raise UserError(f"{len(twice)} rows share a sample_id", twice["sample_id"][0], "each sample once, on one side")
    group = scored.groups_of(rows, " and ".join(paths), ("group", "caption"))
    truth = rows.select("sample_id", "member", group, pl.lit("calibration").alias("part"))
    captions = rows["caption"].to_list() if "caption" in shared else None
    seen = stage.Seen(
        rows["sample_id"].to_numpy(), captions=captions,
        urls=rows["url"].to_list() if "url" in shared else None,
        image_statistics=blind.of_images(rows["sample_id"], rows["image"]) if images and "image" in shared else None,
        sizes=rows.select(pl.col("width", "height").cast(pl.Float64)).fill_null(np.nan).to_numpy()
        if {"width", "height"} <= set(shared) else None,
        image_embeddings=_vectors(rows, "image_embedding"), text_embeddings=_vectors(rows, "text_embedding"),
        sentence_embeddings=blind.sentence_embeddings(sentence_model, captions)
        if sentence_model and captions else None,
    )  # fmt: skip
    return seen, truth


def _refuse_bad_columns(table: pl.DataFrame, where: str) -> None:
    """Hold what the baselines look at to its type; stated sizes may be empty, nothing else."""
    kinds = {"caption": pl.String, "url": pl.String, "image": pl.Binary}
    for name in (name for name in ASIDE if name in table.columns):
        found = table[name].dtype
        right = found == kinds[name] if name in kinds else found.is_nested() if "embedding" in name else True
        if not right or (name in ("width", "height") and not found.is_numeric()):
            raise UserError(f"column '{name}' is {found}", where, "see `mia audit --help` for what it holds")
        if table[name].has_nulls() and name not in ("width", "height"):
            raise UserError(f"column '{name}' has empty values", where, "fill them, or drop the rows")


def _vectors(rows: pl.DataFrame, name: str) -> np.ndarray | None:
    if name not in rows.columns:
        return None
    try:
        found = np.array(rows[name].to_list(), dtype=np.float32)
    except (ValueError, TypeError) as problem:
        raise UserError(f"column '{name}' holds vectors of different lengths, or none", name, "mend it") from problem
    if not np.isfinite(found).all():
        raise UserError(f"column '{name}' holds NaN, infinity or nothing", name, "mend it, or drop the rows")
    return found


def _say_audit(rows: pl.DataFrame, telling: pl.DataFrame, target: float) -> None:
    """For a person: each baseline's AUC and TPR with intervals, and what tells members from non-members most."""
    wanted = (pl.col("metric") == "auc") | ((pl.col("metric") == "tpr") & (pl.col("fpr_target") == target))
    for (attack, variant), mine in rows.filter(wanted).group_by("attack", "variant", maintain_order=True):
        words = [
            f"{'AUC' if row['metric'] == 'auc' else f'TPR at {100 * target:g} % FPR'} "
            f"{row['value']:.4f} [{row['ci_low']:.4f}, {row['ci_high']:.4f}]"
            for row in mine.sort("metric").iter_rows(named=True)
        ]
        common.say(f"{attack} {variant}: {', '.join(words)}")
        top = telling.filter(attack=attack, variant=variant).sort("rank").head(5)
        if len(top):
            common.say("  most telling: " + "; ".join(top["feature"]))


def _broken(rows: pl.DataFrame, gates: dict[str, float], target: float) -> list[str]:
    """One line for each baseline above a gate."""
    lines = []
    for row in rows.drop_nulls("value").iter_rows(named=True):
        if row["metric"] not in gates or (row["metric"] == "tpr" and row["fpr_target"] != target):
            continue
        if row["value"] > gates[row["metric"]]:
            name = f"{row['attack']} {row['variant']}"
            lines.append(f"gate: {name} has {row['metric']} {row['value']:.4f}, above {gates[row['metric']]:g}")
    return lines


@click.command()
@one("--suspects", "The set in question: sample_id, a float column for each score; caption, url or image for a guard.")
@one("--nonmembers", "Known non-members of the same distribution, with the same columns.")
@click.option("--known", type=PATH, help="Other samples with a column `member`, to learn from how scores combine.")
@click.option("--lower-is-member", is_flag=True, help="Scores are losses: change their sign.")
@seed_option
@one("--output", "The verdict and all it rests on, as JSON.")
@stage_options("infer")
def infer(
    suspects: Any, nonmembers: Any, known: Any, lower_is_member: bool, seed: int, output: Any, options: Any
) -> None:
    """Test whether a set of images was in the training data: one-sided, guarded against shift."""
    from mia import infer as stage

    paths = {"--suspects": suspects, "--nonmembers": nonmembers} | ({"--known": known} if known else {})
    parts = {where: formats.read(path) for where, path in paths.items()}
    grouped = ["group" in parts[where].columns for where in ("--suspects", "--nonmembers")]
    if any(grouped) and not all(grouped):
        raise UserError("one side has a column 'group', the other has none", "--suspects", "give both one, or neither")
    x, groups = _score_arrays(parts, -1.0 if lower_is_member else 1.0)
    others = None
    if known is not None:
        label = parts["--known"].get_column("member", default=pl.Series(dtype=pl.Null))
        if label.dtype != pl.Boolean or label.has_nulls():
            raise UserError("known samples have no bool column 'member' without gaps", "--known", "add it")
        others = stage.Known(x["--known"], label.to_numpy(), groups["--known"])
    guard = _guard(suspects, nonmembers, seed) if options.guard else None
    found = stage.infer(
        x["--suspects"], x["--nonmembers"], groups["--suspects"], groups["--nonmembers"], others, guard, options, seed
    )
    names = [name for name in _columns(parts["--suspects"], "--suspects").columns if name != "sample_id"]
    found["columns_used"] = [names[column].rstrip("\x1f").replace("\x1f", "/") for column in found["columns_used"]]
    made = common.made_by("infer", options, seed, list(paths.values()), libraries=("scipy", "scikit-learn"))
    common.write_json(output, found | {"made": made})
    common.say(f"{found['verdict']}: {found['reason']}")


def _columns(table: pl.DataFrame, where: str) -> pl.DataFrame:
    from mia import scored

    return scored.columns(table.drop(*ASIDE, strict=False), where)


def _score_arrays(parts: dict[str, pl.DataFrame], sign: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """For each table its scores, float64[n, k], and groups: the column `group`, else identical captions in it."""
    from mia import scored

    plain = {where: table.drop(*ASIDE, strict=False) for where, table in parts.items()}
    first = scored.stacked(plain).columns  # also refuses tables with different columns
    ids = pl.concat([scored.identified(table, where).select("sample_id") for where, table in parts.items()])
    twice = ids.filter(ids["sample_id"].is_duplicated())
    if len(twice):
        raise UserError(f"{len(twice)} rows share a sample_id", twice["sample_id"][0], "each sample once, on one side")
    x, groups = {}, {}
    for where, table in parts.items():
        x[where] = sign * scored.columns(plain[where], where).select(first).drop("sample_id").to_numpy()
        own = "group" in table.columns  # else one caption on both sides would be one group on both
        groups[where] = (("" if own else f"{where} ") + scored.groups_of(table, where, ("group", "caption"))).to_numpy()
    return x, groups


def _guard(suspects: pathlib.Path, nonmembers: pathlib.Path, seed: int) -> Any:
    """The blind baseline that tells suspects from non-members best; None when there is nothing to look at."""
    from scipy.stats import norm

    from mia import audit as stage
    from mia import infer, resampling
    from mia.config import AuditOptions

    seen, truth = sides({"--suspects": suspects, "--nonmembers": nonmembers})
    kinds = stage.possible(seen)
    if not kinds:
        return None
    member, group, part = (truth[name].to_numpy() for name in ("member", "group", "part"))
    found = pl.DataFrame(
        pl.from_arrow(stage.audit(seen, member, group, part, AuditOptions(features=kinds), seed).scores)
    )
    p: dict[str, tuple[float, float]] = {}
    for (attack, variant), rows in found.group_by("attack", "variant", maintain_order=True):
        score = rows.sort("sample_id")["score"].to_numpy()[:, None]
        auc, variance = resampling.delong(score, member, group)
        p[f"{attack} {variant}"] = float(norm.sf((auc[0] - 0.5) / max(np.sqrt(variance[0, 0]), 1e-12))), float(auc[0])
    worst = min(p, key=lambda name: p[name])
    return infer.Guard(worst, p[worst][1], min(1.0, len(p) * p[worst][0]))
