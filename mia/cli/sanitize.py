"""The command that makes a split fair: sanitize, in the workflow and on tables of one's own."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import click
import numpy as np
import polars as pl
import pyarrow as pa

from mia import formats, tables
from mia.cli import common
from mia.cli.audit import sides
from mia.cli.common import PATH, plain, seed_option, stage_options, write_dropped
from mia.errors import UserError


@click.command()
@click.option("--metadata", type=PATH, help="The metadata table, with --images and --duplicates; or")
@click.option("--members", type=PATH, help="A table of members: sample_id, caption; image, width, height, group.")
@click.option("--nonmembers", type=PATH, help="A table of non-members, with the same columns.")
@click.option("--images", "images", type=PATH, multiple=True, help="Shards of the images table.")
@click.option("--duplicates", type=PATH, help="The duplicates table.")
@click.option("--target", type=PATH, help="Manifest of the target whose text encoder `paper` and `crossfitted` need.")
@common.device_option
@common.batch_option
@seed_option
@click.option("--output-dir", type=PATH, help="For --members: takes members.parquet, nonmembers.parquet, report.json.")
@click.option("--output", type=PATH, help="The dataset table.")
@click.option("--attacked-output", type=PATH, help="The samples of it to attack, at most --max-per-side a side.")
@click.option("--selection-output", type=PATH, help="These without any label, for stages that must not see one.")
@click.option("--dropped-output", type=PATH, help="Counts of rows dropped, by stage and reason.")
@click.option("--report-output", type=PATH, help="What each round did, as JSON.")
@click.option("--rounds-folder", type=PATH, help="Where `paper` keeps finished rounds, to go on after a kill.")
@stage_options("sanitize")
def sanitize(members: Any, nonmembers: Any, metadata: Any, output_dir: Any, **given: Any) -> None:
    """Choose members and non-members that cannot be told apart without the model."""
    if members and nonmembers and output_dir and not metadata:
        encoder = {name: given[name] for name in ("target", "device", "batch_size", "rounds_folder")}
        _two_tables(members, nonmembers, output_dir, given["options"], given["seed"], encoder)
        return
    outputs = ("output", "attacked_output", "selection_output", "dropped_output", "report_output")
    absent = [name for name in ("images", "duplicates", *outputs) if not given[name]]
    if members or nonmembers or not metadata or absent:
        fix = "give --members, --nonmembers and --output-dir; or --metadata, --images, --duplicates and each --*output"
        raise UserError("nothing to sanitize, or two things", "mia sanitize", fix)
    _dataset(metadata, **given)


def _dataset(
    metadata: Any, images: Any, duplicates: Any, target: Any, device: str, batch_size: int, seed: int, output: Any,
    attacked_output: Any, selection_output: Any, dropped_output: Any, report_output: Any, rounds_folder: Any,
    options: Any,
) -> None:  # fmt: skip
    """The workflow's stage: pools into a dataset, and that into the samples to attack."""
    from mia import sanitize as stage
    from mia.audit import Seen

    rows, counts, rows_in = _pooled(metadata, images, duplicates)
    member, group = rows["member"].to_numpy(zero_copy_only=False), np.array(rows["group"].to_pylist())
    ids, looked_at = rows["sample_id"].to_pylist(), options.method == "matched" and "image" in options.views
    seen = Seen(
        np.array(ids, dtype=object), captions=rows["caption"].to_pylist(), urls=rows["url"].to_pylist(),
        image_statistics=common.image_statistics(images, ids) if looked_at else None,
    )  # fmt: skip
    encoder = {
        "target": target, "device": device, "batch_size": batch_size,
        "rounds_folder": rounds_folder or output.with_suffix(".rounds"),
    }  # fmt: skip
    chosen = _chosen(seen, member, group, options, seed, encoder)
    dataset = stage.finish(rows.filter(pa.array(chosen.keep)), options, seed)
    attacked = stage.to_attack(dataset, options, seed)
    for reason in sorted({r for r in chosen.reason if r is not None}):
        for pool, side in (("member", member), ("candidate", ~member)):
            counts.append(("sanitize", reason, pool, int(((chosen.reason == reason) & side).sum())))
    made = common.made_by(
        "sanitize", options, seed, [metadata, *images, duplicates], encoders=chosen.encoders,
        libraries=("torch", "scikit-learn"),
    )  # fmt: skip
    common.write_json(report_output, {"method": options.method, "keep_above": options.keep_above} | chosen.report)
    write_dropped(dropped_output, [c for c in counts if c[3]], made, rows_in, len(dataset))
    tables.write(selection_output, attacked.select(tables.SCHEMAS["selection"].names), "selection", made)
    tables.write(attacked_output, attacked, "dataset", made)
    tables.write(output, dataset, "dataset", made)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Which rows stay, bool[n]; why the others go, object[n]; what stands in the report; the encoder's hash if any."""

    keep: np.ndarray
    reason: np.ndarray
    report: dict[str, Any]
    encoders: str | None = None


def _chosen(
    seen: Any, member: np.ndarray, group: np.ndarray, options: Any, seed: int, encoder: dict[str, Any]
) -> Chosen:
    """The samples that the method keeps, by what blind attackers see of them."""
    reason = np.full(len(member), None, dtype=object)
    if options.method == "none":
        return Chosen(np.ones(len(member), dtype=bool), reason, {"rounds": []})
    if options.method == "matched":
        return _matched(seen, member, group, options, seed)
    if encoder["target"] is None:
        raise UserError(f"method '{options.method}' needs a text encoder", "--target", "give the target's manifest")
    ids, captions = list(seen.ids), list(seen.captions)
    keep, rounds, encoders = _by_text_states(ids, captions, member, group, options, seed, encoder)
    reason[~keep] = f"told apart by method {options.method}"
    return Chosen(keep, reason, {"rounds": rounds}, encoders)


def _matched(seen: Any, member: np.ndarray, group: np.ndarray, options: Any, seed: int) -> Chosen:
    from mia import matching

    found = matching.matched(_views(seen, options.views), member, group, options, seed)
    report = {"rounds": found.rounds, "balance": found.balance, "passed": found.passed, "caliper": found.caliper}
    return Chosen(found.keep, found.reason, report)


def _views(seen: Any, kinds: tuple[str, ...]) -> list[Any]:
    """What `matched` balances: of the kinds asked for, what is there."""
    from mia import blind
    from mia.matching import View

    views = []
    if "caption" in kinds and seen.captions is not None:
        views.append(View("caption", list(seen.captions)))
    if "image" in kinds and seen.image_statistics is not None:
        views.append(View("image", seen.image_statistics, blind.IMAGE_STATISTICS))
    if "metadata" in kinds and seen.urls is not None:
        views.append(View("url", blind.urls(seen.urls).matrix))
    if "metadata" in kinds and seen.sizes is not None:
        views.append(View("size", np.nan_to_num(blind.size_statistics(seen.sizes), nan=-1.0), blind.SIZE_STATISTICS))
    return views


def _by_text_states(
    ids: list[str], captions: list[str], member: np.ndarray, group: np.ndarray, options: Any, seed: int,
    encoder: dict[str, Any],
) -> tuple[np.ndarray, list[dict], str]:  # fmt: skip
    """Methods `paper` and `crossfitted`, on the flattened states of the target's text encoder."""
    from mia import models, paper_sanitizer
    from mia import sanitize as stage

    folder, about = common.target_folder(encoder["target"])
    device = models.device(encoder["device"])
    tokenizer, network = models.tokenizer(folder), models.text_encoder(folder, device, models.torch_dtype("float32"))

    def states(rows: np.ndarray) -> np.ndarray:
        some = [captions[i] for i in rows]
        return models.text_states(tokenizer, network, some, encoder["batch_size"])[0].reshape(len(some), -1)

    if options.method == "crossfitted":
        keep, rounds = stage.keep_members(states(np.arange(len(ids))), member, group, options, seed)
        return keep, rounds, about["encoders"]
    keep, rounds = paper_sanitizer.keep_members(
        lambda rows: states(rows).astype(np.float16), member, ids, options, seed, encoder["rounds_folder"], str(device)
    )
    return keep, rounds, about["encoders"]


def _pooled(metadata: Any, images: Any, duplicates: Any) -> tuple[pa.Table, list[tuple], int]:
    """Members and unduplicated candidates with usable images; counts of what fell out; rows there were."""
    about = pl.from_arrow(tables.read(metadata, "metadata", columns=("sample_id", "url", "caption", "pool")))
    fetched = pl.from_arrow(tables.read(list(images), "images", columns=("sample_id", "status", "sha256")))
    near = pl.from_arrow(tables.read(duplicates, "duplicates", columns=("sample_id", "group", "reason")))
    assert isinstance(about, pl.DataFrame) and isinstance(fetched, pl.DataFrame) and isinstance(near, pl.DataFrame)
    rows = about.join(fetched, on="sample_id", how="left").join(near, on="sample_id", how="left").sort("sample_id")
    for flag, lost in (("--images", "status"), ("--duplicates", "group")):
        absent = rows.filter(pl.col(lost).is_null() & (pl.lit(lost == "status") | (pl.col("status") == "ok")))
        if len(absent):
            raise UserError(
                f"{flag} lacks {len(absent)} samples", absent["sample_id"][0], "give every shard of one run"
            )
    why = (
        pl.when(pl.col("status") != "ok").then(pl.format("images: {}", "status"))
        .when(pl.col("pool") == "control").then(pl.lit("dedup: only trains a negative control"))
        .when(pl.col("reason").is_not_null()).then(pl.format("dedup: {}", "reason"))
    )  # fmt: skip
    marked = rows.with_columns(why.alias("why"))
    gone = marked.drop_nulls("why").group_by("why", "pool").len().sort("why", "pool")
    counts = [(*row["why"].split(": ", 1), row["pool"], row["len"]) for row in gone.to_dicts()]
    kept = marked.filter(pl.col("why").is_null()).with_columns((pl.col("pool") == "member").alias("member"))
    for pool in ("member", "candidate"):
        if not (kept["pool"] == pool).any():
            raise UserError(f"no {pool} rows are left", "images and dedup", "see their tables for the reasons")
    columns = ["sample_id", "url", "caption", "sha256", "member", "group"]
    return (
        kept.select(columns).to_arrow().cast(plain(pa.schema([tables.SCHEMAS["dataset"].field(c) for c in columns]))),
        counts,
        len(rows),
    )


def _two_tables(
    members: pathlib.Path, nonmembers: pathlib.Path, output_dir: pathlib.Path, options: Any, seed: int,
    encoder: dict[str, Any],
) -> None:  # fmt: skip
    """Two tables in, the rows of each that stay out, and a report with the audit before and after."""
    paths = {"--members": members, "--nonmembers": nonmembers}
    seen, truth = sides(paths)
    if seen.captions is None:
        raise UserError("tables have no column 'caption'", f"{members} and {nonmembers}", "give captions on both sides")
    member, group = truth["member"].to_numpy(), truth["group"].to_numpy()
    encoder = encoder | {"rounds_folder": encoder["rounds_folder"] or output_dir / "rounds"}
    chosen = _chosen(seen, member, group, options, seed, encoder)
    report = {
        "method": options.method, "seed": seed, "options": dataclasses.asdict(options),
        "kept": {"members": int((chosen.keep & member).sum()), "nonmembers": int((chosen.keep & ~member).sum())},
        "dropped": {
            side: {r: int(((chosen.reason == r) & rows).sum()) for r in sorted({r for r in chosen.reason if r})}
            for side, rows in (("members", member), ("nonmembers", ~member))
        },
        "audit_before": _audit(seen, truth, np.arange(len(truth)), seed),
        "audit_after": _audit(seen, truth, np.flatnonzero(chosen.keep), seed),
    }  # fmt: skip
    kept = set(np.asarray(seen.ids)[chosen.keep])
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, path in (("members", members), ("nonmembers", nonmembers)):
        with tables.replacing(output_dir / f"{name}.parquet") as temporary:
            formats.read(path).filter(pl.col("sample_id").cast(pl.String).is_in(list(kept))).write_parquet(temporary)
    common.write_json(output_dir / "report.json", report | chosen.report)


def _audit(seen: Any, truth: pl.DataFrame, rows: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """AUC and TPR at 1 % FPR of each blind baseline on these rows, fitted afresh and out of fold."""
    from mia import audit, metrics
    from mia.config import AuditOptions

    mine, member = seen.take(rows), truth["member"].to_numpy()[rows]
    kinds = audit.possible(mine)
    found = audit.audit(
        mine, member, truth["group"].to_numpy()[rows], truth["part"].to_numpy()[rows], AuditOptions(features=kinds),
        seed + 1,
    ).scores  # fmt: skip
    out = []
    scores = pl.DataFrame(pl.from_arrow(found))
    for (attack, variant), some in scores.group_by("attack", "variant", maintain_order=True):
        score = some.sort("sample_id")["score"].to_numpy()
        tpr = metrics.tpr_at_fpr(score, member, 0.01).tpr
        out.append({"attack": attack, "variant": variant, "auc": metrics.auc(score, member), "tpr_at_0.01": tpr})
    return out
