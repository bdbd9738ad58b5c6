"""What the intervals allow one to say, in plain words: signal, none, or undecided. Nothing here is hard-coded.

An attack lies above something when the lower end of its interval exceeds the upper end of the other's: stricter than a
test of the difference. It is called a membership signal only above chance, every negative control and every blind
baseline at once: what a control shows too comes from the data, and what a blind baseline shows needs no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from mia.summary import CHOSEN, Results, attack_label, attacks, percent, tpr_key, variant_label


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`level` is `signal`, `none` or `undecided`; `sentences` say why, the first in bold."""

    level: str
    sentences: list[str]


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where the attack stands in one metric: the names of what it lies above, and of what it does not."""

    metric: str
    above: list[str]
    below: list[str]


def verdict(results: Results) -> Verdict:
    """What may be said of the attack chosen on calibration, from its test intervals beside all the others'."""
    found = attacks(results)
    best = found.filter(pl.col("kind") == "main", pl.col("attack") == CHOSEN).row(0, named=True)
    standings = list(_standings(found, best, results.fpr_targets[0]))
    kinds = set(found["kind"])
    level = "undecided"
    if all(not s.below for s in standings) and {"control", "blind"} <= kinds:
        level = "signal"
    elif all("chance" in s.below for s in standings):
        level = "none"
    sentences = [_first(level, best, standings), *(_detail(s) for s in standings if level == "undecided")]
    if "control" not in kinds:
        sentences.append("No negative control was attacked: nothing shows that a difference comes from the model.")
    if "blind" not in kinds:
        sentences.append("No blind baseline was run: a difference may need no model at all.")
    sentences += _controls_at_chance(found, results)
    return Verdict(level, sentences)


def _standings(found: pl.DataFrame, best: dict[str, Any], fpr_target: float) -> Iterator[Standing]:
    for key, metric, chance in _headline(fpr_target):
        if best[key] is None:
            continue
        bars = {"chance": chance}
        for row in found.iter_rows(named=True):
            if row["kind"] == "control" and row["attack"] == CHOSEN:
                bars[f"the control {row['target']}"] = row[f"{key}_high"]
            if row["kind"] == "blind":
                bars[f"the {row['attack'].replace('_', ' ')} baseline"] = row[f"{key}_high"]
        above = [name for name, bar in bars.items() if bar is not None and best[f"{key}_low"] > bar]
        yield Standing(metric, above, [name for name, bar in bars.items() if bar is not None and name not in above])


def _headline(fpr_target: float) -> tuple[tuple[str, str, float], ...]:
    """The two metrics that a verdict rests on: column, name, and the level of chance."""
    return ("auc", "AUC", 0.5), (tpr_key(fpr_target), f"TPR at {percent(fpr_target)} FPR", fpr_target)


def _first(level: str, best: dict[str, Any], standings: list[Standing]) -> str:
    metrics = listed([s.metric for s in standings])
    attack = f"the attack chosen on calibration ({variant_label(best['variant'])})"
    everything = "chance, every negative control and every blind baseline"
    if level == "signal":
        return f"Membership signal: in {metrics}, {attack} lies above {everything}."
    if level == "none":
        return f"No membership signal: {attack} is not distinguishable from chance in {metrics}."
    if all(not s.below for s in standings):
        return f"Undecided: {attack} lies above all it is held against, but not all that such a claim needs was run."
    return f"Undecided: {attack} does not lie above {everything} in both metrics."


def _detail(standing: Standing) -> str:
    over = f"lies above {listed(standing.above)}" if standing.above else "lies above nothing it is held against"
    under = f", but not above {listed(standing.below)}" if standing.below and standing.above else ""
    return f"In {standing.metric} it {over}{under}."


def _controls_at_chance(found: pl.DataFrame, results: Results) -> list[str]:
    """Whether the controls' own intervals leave chance, as they must not where nothing leaks.

    An AUC leaves it to either side. A TPR leaves it upwards only: where nobody is found the bootstrap has no width. The
    choice over all attacks is one of them, and not counted again.
    """
    target = results.fpr_targets[0]
    outside, total = [], 0
    for row in found.filter(pl.col("kind") == "control", pl.col("attack") != CHOSEN).iter_rows(named=True):
        for key, metric, chance in _headline(target):
            if row[key] is None:
                continue
            total += 1
            if row[f"{key}_low"] > chance or (key == "auc" and row[f"{key}_high"] < chance):
                outside.append(f"{row['target']}, {attack_label(row['attack']).lower()}, {metric}")
    if not total:
        return []
    if not outside:
        return [f"None of {total} intervals of attacks on negative controls leaves chance."]
    leave = f"{len(outside)} {'leaves' if len(outside) == 1 else 'leave'} chance"
    by_luck = f"luck alone lets one do so in about {percent(round(1 - results.confidence, 6))} of models"
    return [f"Of {total} intervals of attacks on negative controls {leave} ({by_luck}): {'; '.join(outside)}."]


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them: `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""
