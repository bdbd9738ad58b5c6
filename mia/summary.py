"""What a run found, as small tables: attacks beside controls and blind baselines, dedup, sanitization, provenance.

Everything here is read off the stages' tables; nothing is estimated anew, but for the interval of dedup's recall.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from mia import settings
from mia.attacks import TWINS, Attack
from mia.config import FeaturesOptions
from mia.scored import CHOSEN

SPLITS = ("unsanitized", "sanitized", "attacked")  # after dedup, after sanitization, and what is attacked of that
MOMENTS = {"collected": "before dedup", "unsanitized": "after dedup", "sanitized": "sanitized"}  # of the distances
MAX_POINTS = 600  # of each side in each panel of the scatter
LOSSES = {"model_loss": "model loss", "latent_error": "latent error", "pixel_error": "pixel error"}
ATTACKS = {s.name: s.label for s in settings.SETTINGS.values()} | {
    "logistic_regression": "Logistic regression", "decision_tree": "Decision tree", "random_forest": "Random forest",
    "neural_net": "Neural net", "boosting": "Boosted trees", CHOSEN: "Best of all",
    "blind_caption": "Blind, caption", "blind_image": "Blind, image", "blind_metadata": "Blind, metadata",
    "blind_agreement": "Blind, caption and image together",
}  # fmt: skip
FIELD = {  # names of the field's attacks that are not plain words
    "secmi": "SecMI", "secmi_nn": "SecMI, network", "secmi_copymark": "SecMI, CopyMark's port", "pia": "PIA",
    "pian": "PIAN", "pfami": "PFAMI", "pfami_copymark": "PFAMI, CopyMark's port", "pfami_clid": "PFAMI, CLiD's port",
    "pfami_sima": "PFAMI, SimA's port", "sima": "SimA", "sima_mc": "SimA, noised", "clid": "CLiD",
    "clid_vector": "CLiD, trees", "clid_null": "CLiD, empty prompt", "gsa1": "GSA1", "gsa2": "GSA2",
    "rediffuse": "ReDiffuse", "pang": "Pang and Wang", "pang_classifier": "Pang and Wang, classifier", "fsca": "FSCA",
    "fsca_model": "FSCA, model's part", "blind_pair": "Blind, cosine of caption and image",
}  # fmt: skip
STUDY = frozenset(ATTACKS)  # the seed paper's attacks and what stands beside them; the field's have their own table
ORDER = (*(attack for attack in ATTACKS if attack != CHOSEN), CHOSEN)
STAGES = ("metadata", "images", "dedup", "sanitize")
POOLS = ("member", "candidate", "control")


@dataclasses.dataclass(frozen=True)
class Target:
    """One model under attack: its place in the configuration, its manifest, and what the attacks found.

    `scores` is None for a checkpoint, of which the report needs the metrics alone.
    """

    name: str
    role: str
    step: int | None
    about: dict[str, Any]
    metrics: pl.DataFrame
    scores: pl.DataFrame | None


@dataclasses.dataclass(frozen=True)
class Results:
    """All that a report is made of. No URL, caption or image is among it.

    Attributes:
        targets: the main target first, then negative controls, then checkpoints.
        datasets, audits: by split. Of the dataset also `collected`, all that reached dedup: sample_id and member.
        distances: by moment.
        telling: what told members from non-members without a model on the attacked samples, most telling first.
        vectors: for each space the CLIP embeddings, float32[n, d], of `vector_ids`, the samples in the scatter.
        thresholds, checked_bins: what other distances would drop, and the paper's human check: see `dedup`.
        attrition, survival: statuses of downloads by pool, and whether a live link predicts membership.
        planted: candidate_id, member_id, transform, same_caption; None when there is no such truth.
        made: what each stage's table says of its own making, by stage.
        field: the attacks of the registry with what they cost in this run, by name; others are at their defaults.
        jobs: options of the jobs that read the main target, by name; others are at their defaults.
        has_null: whether the main target knows an empty prompt; without it guidance costs nothing.
    """

    name: str
    targets: dict[str, Target]
    datasets: dict[str, pl.DataFrame]
    rounds: dict[str, Any]
    audits: dict[str, pl.DataFrame]
    blind_scores: pl.DataFrame
    telling: pl.DataFrame
    distances: dict[str, pl.DataFrame]
    vector_ids: np.ndarray
    vectors: dict[str, np.ndarray]
    duplicates: pl.DataFrame
    thresholds: pl.DataFrame
    checked_bins: pl.DataFrame
    planted: pl.DataFrame | None
    dropped: pl.DataFrame
    attrition: pl.DataFrame
    survival: dict[str, Any]
    made: dict[str, dict[str, Any]]
    field: dict[str, Attack] = dataclasses.field(default_factory=dict)
    jobs: dict[str, FeaturesOptions] = dataclasses.field(default_factory=dict)
    has_null: bool = True

    @property
    def main(self) -> Target:
        """The target under attack."""
        return next(target for target in self.targets.values() if target.role == "main")

    @property
    def controls(self) -> list[Target]:
        """Targets that saw neither side."""
        return [target for target in self.targets.values() if target.role == "negative_control"]

    @property
    def fpr_targets(self) -> tuple[float, ...]:
        """False-positive rates reported at; the first is the headline and chose among variants."""
        return tuple(self.made["evaluation"]["options"]["fpr_targets"])

    @property
    def confidence(self) -> float:
        """Of all intervals of AUC and TPR."""
        return self.made["evaluation"]["options"]["confidence"]


def of_study(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of the seed paper's attacks, of the choice over all attacks and of blind baselines."""
    return rows.filter(pl.col("attack").is_in(STUDY))


def attack_label(attack: str) -> str:
    """An attack's name as the figures and tables print it."""
    name, twin = (TWINS[attack], ", empty prompt") if attack in TWINS else (attack, "")
    return (ATTACKS | FIELD).get(name, name.replace("_", " ").capitalize()) + twin


def variant_label(variant: str) -> str:
    """A variant as printed: `model_loss@101` is `model loss, t = 101`; a choice over all attacks names the attack."""
    attack, _, rest = variant.rpartition(" ")
    loss, _, timestep = rest.partition("@")
    words = [attack_label(attack)] if attack else []
    if timestep:
        words += [LOSSES.get(loss, loss), f"t = {int(timestep)}"]
    elif not attack:
        words += ["all losses and timesteps" if loss == "all" else loss]
    return ", ".join(words)


def percent(rate: float) -> str:
    """A rate as a percentage without needless digits: 0.01 becomes `1 %`, 0.001 becomes `0.1 %`."""
    return f"{100 * rate:g} %"


def tpr_key(fpr_target: float) -> str:
    """The columns' name for the TPR at this rate, e.g. `tpr_at_0.01`."""
    return f"tpr_at_{fpr_target:g}"


def reported(metrics: pl.DataFrame, part: str = "test") -> pl.DataFrame:
    """Rows of a metrics table whose variant was chosen on calibration, in one part."""
    return metrics.filter(pl.col("method") == "holdout", pl.col("part") == part)


def wide(rows: pl.DataFrame, fpr_targets: Iterable[float]) -> pl.DataFrame:
    """One row for each attack: variant, sample counts, and for the AUC and each TPR a set of columns.

    These are its value, interval, note, p-value against chance (adjusted for the number of attacks), p-value against
    blind baselines and controls, and verdict.
    """
    out = rows.select("attack", "variant", "n_members", "n_nonmembers").unique(maintain_order=True)
    chosen = {"auc": pl.col("metric") == "auc"}
    for target in fpr_targets:
        chosen[tpr_key(target)] = (pl.col("metric") == "tpr") & (pl.col("fpr_target") == target)
    for name, which in chosen.items():
        ends = {"ci_low": "low", "ci_high": "high", "note": "note", "p_adjusted": "p", "p_shift": "p_shift"}
        names = {"value": name} | {column: f"{name}_{end}" for column, end in (ends | {"verdict": "verdict"}).items()}
        found = rows.filter(which).select("attack", *names).rename(names)
        out = out.join(found, on="attack", how="left", maintain_order="left")
    return out


def attacks(results: Results) -> pl.DataFrame:
    """Each attack with its variant chosen on calibration, on the test part: kind, target, then `wide`'s columns.

    Kinds are `main`, `control` and `blind`, in this order; attacks go by the paper's number, then the choice over all.
    """
    parts = []
    for target in [results.main, *results.controls]:
        kind = "main" if target.role == "main" else "control"
        rows = wide(reported(target.metrics), results.fpr_targets)
        rows = rows.sort(placed("attack", ORDER), "attack")
        parts.append(rows.select(pl.lit(kind).alias("kind"), pl.lit(target.name).alias("target"), pl.all()))
    blind = wide(reported(results.audits["attacked"]), results.fpr_targets)
    parts.append(blind.select(pl.lit("blind").alias("kind"), pl.lit("no model").alias("target"), pl.all()))
    return pl.concat(parts)


def best_blind(results: Results) -> str | None:
    """The blind baseline that is best on calibration."""
    return next(iter(_best(results.audits["attacked"], results)), None)


def leading(results: Results, count: int) -> list[str]:
    """The seed paper's attacks on the main target, of more than `count` those that are best on calibration."""
    return [name for name in _best(of_study(results.main.metrics), results) if name != CHOSEN][:count]


def _best(metrics: pl.DataFrame, results: Results) -> pl.Series:
    """Attacks from the best on calibration to the worst, by TPR at the first target, ties by AUC."""
    rows = wide(reported(metrics, "calibration"), results.fpr_targets)
    return rows.sort(tpr_key(results.fpr_targets[0]), "auc", descending=True, nulls_last=True)["attack"]


def comparison(results: Results) -> pl.DataFrame:
    """For each attack on the main target, its AUC and TPR beside the same attack's on each control and the blind best.

    One row for each attack and metric: columns main, control_<name> for each control, and blind (null where there is
    none), each with `_low` and `_high`; then p-values against chance (adjusted for the number of attacks) and against
    every blind baseline and control, both paired and one-sided, and the verdict that `evaluation` drew from them.
    """
    rows = attacks(results).rows(named=True)
    of = {(row["kind"], row["target"], row["attack"]): row for row in rows}
    blind = of.get(("blind", "no model", best_blind(results)), {})
    out = []
    for row in (row for row in rows if row["kind"] == "main"):
        others = {f"control_{c.name}": of.get(("control", c.name, row["attack"]), {}) for c in results.controls}
        others["blind"] = blind
        for key in ("auc", *map(tpr_key, results.fpr_targets)):
            line = {"attack": row["attack"], "metric": key}
            for name, other in ({"main": row} | others).items():
                line |= {f"{name}{end}": other.get(f"{key}{end}") for end in ("", "_low", "_high")}
            out.append(line | {end: row[f"{key}_{end}"] for end in ("p", "p_shift", "verdict")})
    return pl.DataFrame(out, infer_schema_length=None)


def protocols(results: Results) -> pl.DataFrame:
    """The TPR of each attack on the main target by each protocol, and what choosing on the test part gained.

    Columns: attack, fpr_target; holdout, crossfit and paper, each with its variant, interval or spread; selection_gain
    (paper minus holdout); p_best, the p-value of the best of the attack's variants, and p_best_of_all, among all
    attacks'.
    """
    rows = results.main.metrics.filter(pl.col("part") != "calibration")
    out = rows.filter(method="holdout", metric="tpr").select("attack", "fpr_target")
    ends = {"ci_low": "low", "ci_high": "high", "std": "std"}
    for method in ("holdout", "crossfit", "paper"):
        names = {"value": method, "variant": f"{method}_variant"}
        names |= {column: f"{method}_{end}" for column, end in ends.items() if (end == "std") == (method == "paper")}
        if method == "paper":
            names |= {"p_value": "p_best", "p_adjusted": "p_best_of_all"}
        found = rows.filter(method=method, metric="tpr").select("attack", "fpr_target", *names).rename(names)
        out = out.join(found, on=["attack", "fpr_target"], how="left", maintain_order="left")
    gain = rows.filter(metric="selection_gain").select("attack", "fpr_target", selection_gain="value")
    out = out.join(gain, on=["attack", "fpr_target"], how="left", maintain_order="left")
    return out.sort(placed("attack", ORDER), "attack", pl.col("fpr_target") * -1, maintain_order=True)


def telling(results: Results) -> pl.DataFrame:
    """What told members from non-members without a model: see `Results.telling`."""
    return results.telling.sort(placed("attack", ORDER), "attack", "variant", "rank")


def all_metrics(results: Results) -> pl.DataFrame:
    """Every row of every metrics table, with target and role; the blind ones of both splits too."""
    found = [(target.name, target.role, target.metrics) for target in results.targets.values()]
    found += [(f"no model, {split}", "blind", audit) for split, audit in results.audits.items()]
    columns = ("target", "role", *found[0][2].columns)
    parts = [rows.with_columns(target=pl.lit(name), role=pl.lit(role)).select(columns) for name, role, rows in found]
    return pl.concat(parts)


def drawn(dataset: pl.DataFrame) -> pl.DataFrame:
    """At most `MAX_POINTS` rows of each side, in the order of ids; these are hashes, so the sample is random."""
    return dataset.sort("sample_id").filter(pl.int_range(pl.len()).over("member") < MAX_POINTS)


def distances(results: Results) -> pl.DataFrame:
    """The distance tables with the moment, `split`, at which each was measured."""
    return pl.concat([results.distances[split].select(pl.lit(split).alias("split"), pl.all()) for split in MOMENTS])


def blind_audits(results: Results) -> pl.DataFrame:
    """Blind baselines before and after sanitization and on the attacked samples: split, then `wide`'s columns."""
    parts = []
    for split in SPLITS:
        rows = wide(reported(results.audits[split]), results.fpr_targets)
        parts.append(rows.select(pl.lit(split).alias("split"), pl.all()))
    return pl.concat(parts).sort("attack", maintain_order=True)


def candidates(results: Results) -> pl.DataFrame:
    """Candidates that dedup saw: distance, method, reason; and planted, transform, same_caption, right.

    `planted` says that the truth lists it and that the member it was made from reached dedup too, `right` that this
    very member is named as its nearest.
    """
    seen = results.duplicates.filter(pl.col("pool") == "candidate").drop("pool")
    kinds = {"candidate_id": pl.String, "member_id": pl.String, "transform": pl.String, "same_caption": pl.Boolean}
    truth = results.planted if results.planted is not None else pl.DataFrame(schema=kinds)
    truth = truth.filter(pl.col("member_id").is_in(results.duplicates["sample_id"].implode()))
    truth = truth.unique("candidate_id", keep="first", maintain_order=True)
    rows = seen.join(truth, left_on="sample_id", right_on="candidate_id", how="left", maintain_order="left")
    return rows.with_columns(
        pl.col("transform").is_not_null().alias("planted"), (pl.col("nearest_id") == pl.col("member_id")).alias("right")
    )


def dedup_recall(results: Results) -> pl.DataFrame:
    """Recall on planted duplicates, in all, by transform and by caption: by, planted, found, recall, low, high, right.

    Only pairs that reached dedup whole count; `low` and `high` are Wilson's 95 % interval.
    """
    planted = candidates(results).filter("planted").with_columns(
        pl.when("same_caption").then(pl.lit("same caption")).otherwise(pl.lit("another caption")).alias("caption"),
        pl.lit("all planted").alias("all"), pl.format("transform: {}", "transform").alias("transform"),
    )  # fmt: skip
    parts = []
    for by in ("all", "transform", "caption"):
        counts = planted.group_by(pl.col(by).alias("by")).agg(
            pl.len().alias("planted"), pl.col("reason").is_not_null().sum().alias("found"),
            (pl.col("right") & pl.col("reason").is_not_null()).sum().alias("right"),
        )  # fmt: skip
        parts.append(counts.sort("by"))
    rows = pl.concat(parts)
    bounds = [wilson(found, n) for found, n in rows.select("found", "planted").iter_rows()]
    low, high = (pl.Series([ends[i] for ends in bounds], dtype=pl.Float64) for i in range(2))
    rows = rows.with_columns(
        (pl.col("found") / pl.col("planted")).alias("recall"), low.alias("low"), high.alias("high")
    )
    return rows.select("by", "planted", "found", "recall", "low", "high", "right")


def wilson(hits: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % score interval of a proportion. Source: Wilson 1927."""
    centre, spread = (hits + z * z / 2) / (n + z * z), z / (n + z * z) * (hits * (n - hits) / n + z * z / 4) ** 0.5
    return max(0.0, centre - spread), min(1.0, centre + spread)


def dedup_methods(results: Results) -> pl.DataFrame:
    """How many candidates each method drops, planted and other: method, planted, other."""
    rows = candidates(results).with_columns(pl.col("method").fill_null("kept"))
    counts = rows.group_by("method").agg(pl.col("planted").sum(), (~pl.col("planted")).sum().alias("other"))
    return counts.sort(placed("method", ("clip+phash", "clip", "phash", "kept")), "method")


def dropped(results: Results) -> pl.DataFrame:
    """Rows dropped in the order of stages, a column for each pool; then what was left, and of that attacked."""
    counts = [pl.col("rows").filter(pl.col("pool") == pool).sum().alias(pool) for pool in POOLS]
    rows = results.dropped.group_by("stage", "reason").agg(counts).sort(placed("stage", STAGES), "reason")
    ends = []
    for split, reason in (("sanitized", "rows left"), ("attacked", "of these attacked")):
        member = results.datasets[split]["member"]
        ends.append(("dataset", reason, int(member.sum()), int((~member).sum()), 0))
    return pl.concat([rows, pl.DataFrame(ends, schema=rows.schema, orient="row")])


def placed(column: str, order: Sequence[str]) -> pl.Expr:
    """A sort key that puts a column's known values in this order, others before the last of them."""
    places = {value: float(place) for place, value in enumerate(order)}
    return pl.col(column).replace_strict(places, default=len(order) - 1.5, return_dtype=pl.Float64)


def rounds(results: Results) -> pl.DataFrame:
    """Sanitization's rounds: round, members in and kept, non-members in, the (best) classifier's cross-fitted AUC."""
    kinds = dict.fromkeys(("round", "members_in", "members_kept", "nonmembers"), pl.Int64()) | {"auc": pl.Float64()}
    rows = results.rounds.get("rounds", [])
    if results.rounds.get("method") == "matched":  # both sides shrink, and several attackers look
        left = [one["members"] for one in rows]
        rows = [
            {"round": number, "members_in": one["members"], "members_kept": kept, "nonmembers": one["nonmembers"],
             "auc": max(one["auc"].values())}
            for number, (one, kept) in enumerate(zip(rows, [*left[1:], left[-1]], strict=True), 1)
        ]  # fmt: skip
    return pl.DataFrame([{name: one[name] for name in kinds} for one in rows], schema=kinds)


def told_apart(results: Results) -> list[str]:
    """The attackers that method `matched` could not bring down to chance, in words; none where its audit passed."""
    if results.rounds.get("method") != "matched":
        return []
    last, words = results.rounds["rounds"][-1], []
    for name, auc in last["auc"].items():
        tpr = last["tpr"][name]
        if auc > last["limit"]:
            words.append(f"{name} has an AUC of {auc:.3f}, above {last['limit']:.3f}")
        elif tpr > last["tpr_limit"]:
            words.append(f"{name} has a TPR of {100 * tpr:.1f} %, above {100 * last['tpr_limit']:.1f} %")
    return words


def target_rows(results: Results) -> pl.DataFrame:
    """Which models these are: name, role, step, source, hashes of UNet and encoders, family, schedule."""
    keys = (
        "source", "revision", "finetuned", "lora", "unet", "encoders", "family", "prediction", "alpha_bar_300",
        "sigma_500", "train_steps",
    )  # fmt: skip
    plain = [{"target": t.name, "role": t.role, "step": t.step} for t in results.targets.values()]
    found = [{key: t.about.get(key) for key in keys} for t in results.targets.values()]
    return pl.DataFrame([a | b for a, b in zip(plain, found, strict=True)], infer_schema_length=None)


def settings_used(results: Results) -> pl.DataFrame:
    """Settings attacked with: number, label, how many timesteps and which, losses, guidance scale, how it walks."""
    assert results.main.scores is not None
    names = results.main.scores.select("attack", "variant").unique()
    out = []
    for setting in settings.SETTINGS.values():
        mine = names.filter(pl.col("attack") == setting.name)["variant"].str.split_exact("@", 1).struct.unnest()
        if not len(mine):
            continue
        steps, losses = mine["field_1"].cast(pl.Int64), mine["field_0"].unique().sort()
        out.append({
            "setting": setting.number, "label": setting.label, "timesteps": steps.n_unique(), "first": steps.min(),
            "last": steps.max(), "losses": ", ".join(losses), "guidance_scale": setting.guidance_scale,
            "iterative": setting.iterative, "reversed_order": setting.reversed_order,
        })  # fmt: skip
    return pl.DataFrame(out, infer_schema_length=None)


def provenance(results: Results) -> pl.DataFrame:
    """What each stage's table says of its making: stage, version, config hash, seed, options as `name = value`."""
    out = []
    for stage, made in results.made.items():
        options = "; ".join(f"{name} = {_plain(value)}" for name, value in made.get("options", {}).items())
        out.append(
            {"stage": stage} | {key: made.get(key) for key in ("version", "config_hash", "seed")} | {"options": options}
        )
    return pl.DataFrame(out, infer_schema_length=None)


def _plain(value: Any) -> str:
    return ", ".join(str(v) for v in value) if isinstance(value, list) else str(value)


def libraries(results: Results) -> dict[str, str]:
    """Versions of the libraries that had a part in any stage."""
    found: dict[str, str] = {}
    for made in [*results.made.values(), *(target.about for target in results.targets.values())]:
        found |= made.get("libraries", {})
    return dict(sorted(found.items()))
