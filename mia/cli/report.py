"""The command that needs every table and makes none: report."""

from __future__ import annotations

import json
import logging
import pathlib
from typing import TYPE_CHECKING, Any

import click
import polars as pl

from mia import tables
from mia.cli.common import features_options, frame, one
from mia.config import FeaturesOptions
from mia.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from mia.summary import Results, Target

ROLES = ("main", "negative_control", "checkpoint")


@click.command()
@one("--results", "Folder that holds the tables of a run, results/<name>.")
@click.option(
    "--targets", required=True, metavar="JSON", help="Targets as in the configuration: JSON, or a file that holds it."
)
@click.option("--planted", default="", metavar="PATH", help="Truth about planted near-duplicates, if there is any.")
@one("--output", "The report; figures/ and tables/ come to lie beside it.")
def report(results: pathlib.Path, targets: str, planted: str, output: pathlib.Path) -> None:
    """Write one self-contained page, its figures (SVG, PDF) and its tables (CSV)."""
    from mia import report as stage

    logging.getLogger("fontTools").setLevel(logging.WARNING)  # tells of every glyph that goes into a PDF
    built = stage.build(_results(results, _targets(targets), planted))
    for name, kinds in built.figures.items():
        for kind, content in kinds.items():
            with tables.replacing(output.parent / "figures" / f"{name}.{kind}") as path:
                path.write_bytes(content)
    for name, table in built.tables.items():
        with tables.replacing(output.parent / "tables" / f"{name}.csv") as path:
            table.write_csv(path)
    with tables.replacing(output) as path:
        path.write_text(built.html, encoding="utf-8")


def _targets(text: str) -> dict[str, dict[str, Any]]:
    """The targets, the main one first, then negative controls, then checkpoints."""
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else _json(pathlib.Path(text))
    except json.JSONDecodeError as problem:
        raise UserError(f"targets are not JSON ({problem})", "--targets", "quote them for the shell") from problem
    roles = [about.get("role") for about in found.values()]
    wrong = [role for role in roles if role not in ROLES]
    if wrong:
        raise UserError(f"unknown role '{wrong[0]}'", "--targets", f"use one of {list(ROLES)}")
    if roles.count("main") != 1:
        raise UserError(f"{roles.count('main')} targets have role 'main'", "--targets", "give exactly one that role")
    return dict(sorted(found.items(), key=lambda item: ROLES.index(item[1]["role"])))


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as problem:
        raise UserError(
            f"JSON cannot be read ({problem})", path, "run the stage that makes it, or mend the path"
        ) from problem


def _results(folder: pathlib.Path, targets: dict[str, dict[str, Any]], planted: str) -> Results:
    """Everything the report needs and nothing else: captions are not even read, URLs only to look up planted pairs."""
    from mia import dedup
    from mia.attacks import REGISTRY
    from mia.cli import passes
    from mia.summary import MOMENTS, Results, drawn

    found, main = {name: _target(folder, name, about) for name, about in targets.items()}, next(iter(targets))
    jobs, has_null = _jobs(folder / "features" / main)
    attacks = {name: passes.as_run(attack, jobs, has_null) for name, attack in REGISTRY.items()}
    files = {split: folder / "dataset" / f"{split}.parquet" for split in ("unsanitized", "sanitized")}
    files["attacked"] = folder / "attacked/sanitized.parquet"
    datasets = {s: frame(path, "dataset", ("sample_id", "member", "part", "group")) for s, path in files.items()}
    near = ("sample_id", "pool", "nearest_id", "distance", "method", "reason")
    duplicates = tables.read(folder / "duplicates.parquet", "duplicates", near)
    seen = pl.DataFrame(pl.from_arrow(duplicates)).filter(pl.col("pool") != "control")
    datasets["collected"] = seen.select("sample_id", member=pl.col("pool") == "member")
    shown = pl.concat([drawn(datasets[moment]).select("sample_id") for moment in MOMENTS])["sample_id"].unique()
    ids, vectors = _vectors(folder / "embeddings", shown)
    dropped = [frame(folder / "dropped" / f"{name}.parquet", "dropped") for name in ("metadata", "sanitized")]
    return Results(
        name=folder.resolve().name, targets=found, datasets=datasets,
        rounds=_json(folder / "dataset" / "sanitized.json"),
        audits={s: frame(folder / "audit" / f"{s}.parquet", "metrics") for s in files},
        blind_scores=frame(folder / "audit" / "attacked.scores.parquet", "scores"),
        telling=frame(folder / "audit" / "attacked.telling.parquet", "telling"),
        distances={s: frame(folder / "distance" / f"{s}.parquet", "distance") for s in MOMENTS},
        vector_ids=ids, vectors=vectors, duplicates=pl.DataFrame(pl.from_arrow(duplicates)),
        planted=_planted(planted, folder / "metadata.parquet"), dropped=pl.concat(dropped),
        thresholds=pl.DataFrame(pl.from_arrow(dedup.threshold_curve(duplicates))),
        checked_bins=pl.DataFrame(pl.from_arrow(dedup.checked_bins(duplicates))),
        attrition=frame(folder / "attrition.parquet", "attrition"), survival=_json(folder / "attrition.json"),
        made=_provenance(folder, main), field=attacks, jobs=jobs, has_null=has_null,
    )  # fmt: skip


def _jobs(folder: pathlib.Path) -> tuple[dict[str, FeaturesOptions], bool]:
    """Options of each job that read a target, and whether that knows an empty prompt, as a shard of each tells."""
    first = {path.parent.name: path for path in sorted(folder.glob("*/*.parquet"), reverse=True)}
    made = {job: tables.provenance(path) for job, path in first.items()}
    jobs = {job: features_options(about) for job, about in made.items()}
    return jobs, all(about.get("has_null", True) for about in made.values())


def _target(folder: pathlib.Path, name: str, about: dict[str, Any]) -> Target:
    from mia.summary import CHOSEN, Target

    scores = None if about["role"] == "checkpoint" else frame(folder / "scores" / f"{name}.parquet", "scores")
    path = folder / "evaluation" / f"{name}.parquet"
    metrics = frame(path, "metrics")
    if CHOSEN not in metrics["attack"]:
        raise UserError("no attack was chosen on calibration", path, "evaluate with a calibration part")
    return Target(name, about["role"], about.get("step"), _json(folder / "targets" / f"{name}.json"), metrics, scores)


def _vectors(folder: pathlib.Path, wanted: pl.Series) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Ids and embeddings of the samples asked for, read shard by shard."""
    import pyarrow as pa
    import pyarrow.compute as pc

    paths, ids = sorted(folder.glob("*.parquet")), pa.array(wanted.to_list(), pa.string())
    if not paths:
        raise UserError("embeddings files do not exist", folder, "run `mia embeddings`")
    parts = []
    for path in paths:
        shard = tables.read(path, "embeddings")
        parts.append(shard.filter(pc.is_in(shard["sample_id"], ids)))
    table = pa.concat_tables(parts).sort_by("sample_id")
    if table.num_rows != len(wanted):
        raise UserError(
            f"embeddings lack {len(wanted) - table.num_rows} samples of the dataset", folder, "bring every shard"
        )
    return table["sample_id"].to_numpy(), {space: tables.vectors(table[space]) for space in ("image", "text")}


def _planted(path: str, metadata: pathlib.Path) -> pl.DataFrame | None:
    """The planted truth by sample id: candidate_id, member_id, transform, same_caption; None without a path."""
    if not path:
        return None
    try:
        truth = pl.read_parquet(path)
    except (OSError, pl.exceptions.ComputeError) as problem:
        raise UserError(
            f"planted truth cannot be read ({problem})", path, "mend report.planted, or leave it empty"
        ) from problem
    absent = [c for c in ("candidate_url", "member_url", "transform", "same_caption") if c not in truth.columns]
    if absent:
        raise UserError(f"planted truth has no column '{absent[0]}'", path, f"columns: {truth.columns}")
    ids = frame(metadata, "metadata", ("sample_id", "url", "pool"))
    for side, pool in (("candidate", "candidate"), ("member", "member")):
        here = ids.filter(pl.col("pool") == pool).select(
            pl.col("url").alias(f"{side}_url"), pl.col("sample_id").alias(f"{side}_id")
        )
        truth = truth.join(
            here.unique(f"{side}_url", keep="first", maintain_order=True),
            on=f"{side}_url",
            how="left",
            maintain_order="left",
        )
    unknown = pl.format("planted {}", pl.int_range(pl.len()))  # dropped before dedup: counts as planted, never as seen
    return truth.select(
        pl.coalesce("candidate_id", unknown).alias("candidate_id"), "member_id", "transform", "same_caption"
    )


def _provenance(folder: pathlib.Path, main: str) -> dict[str, dict[str, Any]]:
    """What one table of each stage says of its making, in the order of the flow."""
    paths = {
        "metadata": folder / "metadata.parquet", "embeddings": min((folder / "embeddings").glob("*.parquet")),
        "dedup": folder / "duplicates.parquet", "sanitize": folder / "dataset" / "sanitized.parquet",
        "distance": folder / "distance" / "sanitized.parquet", "audit": folder / "audit" / "attacked.scores.parquet",
        # Of the blocks one that looks at the number of draws, where there is one.
        "features": min(
            (folder / "features" / main).glob("*/*.parquet"), key=lambda p: (p.parent.name != "noised", p), default=None
        ),
        "scores": folder / "scores" / f"{main}.parquet", "evaluation": folder / "evaluation" / f"{main}.parquet",
    }  # fmt: skip
    made = {stage: tables.provenance(path) for stage, path in paths.items() if path is not None}
    made.get("features", {}).get("options", {}).pop("settings", None)  # this block's only; the scores tell of all
    return made
