"""Every attack of the field side by side: what each costs, what it finds, and how much of that is the caption."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import polars as pl

from mia import attacks, resampling, settings, walks
from mia.config import FeaturesOptions
from mia.scored import CHOSEN
from mia.summary import Results, Target, reported, tpr_key, wide

# One call in units of a UNet row of Stable Diffusion 1.x, by counted FLOP. Source: `performance.md` A.
DECODE, ENCODE = 2.51452 / 0.80327, 1.11666 / 0.80327
# What the pair of an attack and its twin says.
CAPTION, CAPTION_SHIFT = "better with the caption", "better with the caption, which tells by itself"
NO_GAIN, NO_TWIN = "no gain by the caption seen", "no twin: {}"
NO_PROMPT = "the model knows no empty prompt"
LEVEL = 0.05  # of all pairs together


def lineup(results: Results) -> pl.DataFrame:
    """One row for each attack on the main target, each with its variant chosen on calibration, read on test.

    Columns: attack; variant; access, labels (whether labelled samples are needed) and cost (in UNet rows for one image,
    alone, under this run's options, or at the attack's own defaults where they are not known); for AUC and each TPR
    `wide`'s columns; the same attack's TPR and AUC under the empty prompt (`null_`) and on each control (`<name>_`);
    caption_gain, what an attack and its twin say of the caption's part, or why there is no twin; caption_gain_p, the
    p-value of that gain, adjusted for the number of pairs.
    """
    main = _of(results.main, results)
    rows = main.filter(~pl.col("attack").is_in(set(attacks.TWINS)), pl.col("attack") != CHOSEN)
    about = [_about(attack, variant, results) for attack, variant in rows.select("attack", "variant").iter_rows()]
    kinds = {"access": pl.String, "labels": pl.Boolean, "cost": pl.Float64}
    rows = rows.hstack(pl.DataFrame(about, schema=kinds, orient="row"))
    keys = ["auc", tpr_key(results.fpr_targets[0])]
    twins = main.filter(pl.col("attack").is_in(set(attacks.TWINS))).with_columns(
        pl.col("attack").replace(attacks.TWINS)
    )
    for name, other in [("null", twins), *((control.name, _of(control, results)) for control in results.controls)]:
        chosen = other.select("attack", *(pl.col(key).alias(f"{name}_{key}") for key in keys))
        rows = rows.join(chosen, on="attack", how="left", maintain_order="left")
    gains = _gains(results)
    p = [gains.get(attack) for attack in rows["attack"]]
    said = [_caption_gain(*about, results) for about in zip(rows["attack"], p, strict=True)]
    return rows.with_columns(
        pl.Series("caption_gain", said, pl.String), pl.Series("caption_gain_p", p, pl.Float64)
    ).sort("cost", "attack", nulls_last=True)


def _of(target: Target, results: Results) -> pl.DataFrame:
    return wide(reported(target.metrics), results.fpr_targets)


def _about(attack: str, variant: str, results: Results) -> tuple[str, bool, float | None]:
    """Access, whether labels are needed, and cost of an attack of the registry or of a setting."""
    known = results.field.get(attack) or attacks.REGISTRY.get(attack)
    if known is None:
        return "grey", False, _of_setting(attack, variant.partition("@")[0], results)
    if known.unet_rows is None:  # a classifier on the losses of all settings
        return known.access, known.labels, None
    rows = known.unet_rows / (2 if known.paired else 1)  # the registry counts the twin, too
    extra = known.decodes * DECODE if known.decodes else 0.0
    backwards = known.backwards * (2 if known.to_weights else 1)  # see `docs/expensive_attacks.md`
    return known.access, known.labels, rows + extra + known.encodes * ENCODE + backwards


def _of_setting(name: str, loss: str, results: Results) -> float | None:
    """The cost of one loss of one setting."""
    of = next((of for of in settings.SETTINGS.values() if of.name == name), None)
    if of is None or loss not in settings.LOSSES:
        return None
    options = results.jobs.get(settings.job_of(of), FeaturesOptions())
    alone = dataclasses.replace(options, settings=(of.number,), probes=(), losses=(loss,))
    work = walks.planned(alone, results.has_null)
    return work.unet_rows + work.decodes * DECODE + ENCODE


def _gains(results: Results) -> dict[str, float]:
    """For each attack with a twin the one-sided p-value of its gain over it on the test part, by Holm's method for all.

    DeLong's paired test of the AUCs.
    """
    scores = results.main.scores
    assert scores is not None
    chosen = dict(reported(results.main.metrics).select("attack", "variant").iter_rows())
    test = results.datasets["attacked"].filter(pl.col("part") == "test").select("sample_id", "member", "group")
    truth = test["member"].to_numpy(), test["group"].to_numpy()
    p = {}
    for attack, twin in attacks.pairs(scores["attack"].unique()):
        with_caption, without = (_scores(scores, test, name, chosen[name]) for name in (attack, twin))
        p[attack] = attacks.caption_driven((with_caption, without), *truth)[2]
    return dict(zip(p, resampling.holm(np.array(list(p.values()))).tolist(), strict=True))


def _caption_gain(attack: str, p: float | None, results: Results) -> str:
    """What an attack and its twin say of the caption's part, or why there is no twin.

    The caption is part of what a model learns; but where a classifier that sees captions alone, and no model, already
    tells members, that advantage is not to be counted as membership.
    """
    if p is None:
        known = attacks.REGISTRY.get(attack) or attacks.REGISTRY["loss_threshold"]  # of which each setting is one
        return NO_TWIN.format(known.no_twin or NO_PROMPT)
    if p > LEVEL:
        return NO_GAIN
    blind = reported(results.audits["attacked"]).filter(pl.col("attack") == "blind_caption", pl.col("metric") == "auc")
    return CAPTION_SHIFT if len(blind) and (blind["ci_low"][0] or 0) > 0.5 else CAPTION


def _scores(scores: pl.DataFrame, test: pl.DataFrame, attack: str, variant: str) -> np.ndarray:
    mine = scores.filter(pl.col("attack") == attack, pl.col("variant") == variant)
    return test.join(mine, on="sample_id", how="left", maintain_order="left")["score"].to_numpy()


def points(results: Results, rows: pl.DataFrame) -> list[dict[str, Any]]:
    """What the figure of costs shows of each attack with a known cost: number, attack, access, labels, cost, TPR."""
    key = tpr_key(results.fpr_targets[0])
    shown = rows.filter(
        pl.col("cost").is_not_null(), pl.col(key).is_not_null(), ~pl.col("attack").str.starts_with("blind_")
    )
    names = {key: "value", f"{key}_low": "ci_low", f"{key}_high": "ci_high"}
    return (
        shown.select("attack", "access", "labels", "cost", *names).rename(names).with_row_index("number", 1).to_dicts()
    )
