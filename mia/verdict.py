"""What the evaluation's verdicts let one say of the main target, in plain words. Nothing here is hard-coded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from mia.scored import CHANCE, CHOSEN, SHIFT, SIGNAL
from mia.summary import Results, attack_label, attacks, percent, tpr_key, variant_label


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`level` is `signal`, `shift`, `none` or `undecided`; `sentences` say why, the first in bold."""

    level: str
    sentences: list[str]


def verdict(results: Results) -> Verdict:
    """What may be said of the attack chosen among all on calibration, from its rows of the test part."""
    found = attacks(results)
    best = found.filter(pl.col("kind") == "main", pl.col("attack") == CHOSEN).row(0, named=True)
    metrics = {name: key for key, name, _ in _headline(results.fpr_targets[0]) if best[key] is not None}
    drawn = {name: best[f"{key}_verdict"] for name, key in metrics.items()}
    level = _level(set(drawn.values()))
    sentences = [_first(level, best, list(drawn)), *(_detail(name, best, key) for name, key in metrics.items())]
    kinds = set(found["kind"])
    if "control" not in kinds:
        sentences.append("No negative control was attacked: nothing shows that a difference comes from the model.")
    if "blind" not in kinds:
        sentences.append("No blind baseline was run: a difference may need no model at all.")
    return Verdict(level, [*sentences, *_controls_at_chance(found, results)])


def _level(drawn: set[str | None]) -> str:
    if drawn == {SIGNAL}:
        return "signal"
    if drawn == {CHANCE}:
        return "none"
    return "shift" if SHIFT in drawn and SIGNAL not in drawn else "undecided"


def _headline(fpr_target: float) -> tuple[tuple[str, str, float], ...]:
    """The two metrics that a verdict rests on: column, name, and the level of chance."""
    return ("auc", "AUC", 0.5), (tpr_key(fpr_target), f"TPR at {percent(fpr_target)} FPR", fpr_target)


def _first(level: str, best: dict[str, Any], metrics: list[str]) -> str:
    attack = f"the attack chosen on calibration ({variant_label(best['variant'])})"
    return {
        "signal": f"Membership signal: in {listed(metrics)}, {attack} beats chance, every blind baseline and every "
        "negative control.",
        "none": f"No membership signal: {attack} is not distinguishable from chance in {listed(metrics)}.",
        "shift": f"No membership signal: {attack} beats chance, but not all that sees no membership.",
        "undecided": f"Undecided: of {attack} the metrics do not say the same, or what a claim needs was not run.",
    }[level]


def _detail(name: str, best: dict[str, Any], key: str) -> str:
    said = f"{name}: {best[f'{key}_verdict'] or 'no verdict'} ({p_words(best[f'{key}_p'])} against chance"
    rival = best[f"{key}_p_shift"]
    return said + (")." if rival is None else f", {p_words(rival)} against the strongest of baselines and controls).")


def p_words(p: float) -> str:
    """A p-value to three decimals, as a sentence says it: `p = 0.012`, `p < 0.001`."""
    return "p < 0.001" if p < 0.0005 else f"p = {p:.3f}"


def _controls_at_chance(found: pl.DataFrame, results: Results) -> Iterator[str]:
    """Whether the controls' own intervals leave chance, as they must not where nothing leaks.

    An AUC leaves it to either side. A TPR leaves it upwards only: where nobody is found the interval says little. The
    choice over all attacks is one of them, and not counted again.
    """
    outside, total = [], 0
    for row in found.filter(pl.col("kind") == "control", pl.col("attack") != CHOSEN).iter_rows(named=True):
        for key, metric, chance in _headline(results.fpr_targets[0]):
            if row[key] is None:
                continue
            total += 1
            if row[f"{key}_low"] > chance or (key == "auc" and row[f"{key}_high"] < chance):
                outside.append(f"{row['target']}, {attack_label(row['attack']).lower()}, {metric}")
    if total and not outside:
        yield f"None of {total} intervals of attacks on negative controls leaves chance."
    if outside:
        leave = f"{len(outside)} {'leaves' if len(outside) == 1 else 'leave'} chance"
        by_luck = f"luck alone lets one do so in about {percent(round(1 - results.confidence, 6))} of models"
        yield f"Of {total} intervals of attacks on negative controls {leave} ({by_luck}): {'; '.join(outside)}."


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them: `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""
