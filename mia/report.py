"""The report: figures, tables and one self-contained page, from what a run found.

The page makes no request and runs nothing: styles and figures stand in it, and its policy forbids the rest.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import numpy as np
import polars as pl
from markupsafe import Markup
from matplotlib.figure import Figure

from mia import figures, lineup, metrics, summary
from mia.figures import Curve
from mia.summary import CHOSEN, Results, Target, attack_label, percent, reported, tpr_key, variant_label
from mia.verdict import listed, p_words, verdict

SCREEN_SCALE = 1.3  # figures are drawn in a journal's size; a screen is read from farther away
MAX_CURVES = 10  # of the main target in the figure of ROC curves
SHOWN_FEATURES = 5  # of each blind baseline on the page; the rest is in the CSV


@dataclasses.dataclass(frozen=True)
class Report:
    """What `mia report` writes: figures by name (svg and pdf), tables by name (csv), and the page."""

    figures: dict[str, dict[str, bytes]]
    tables: dict[str, pl.DataFrame]
    html: str


def build(results: Results) -> Report:
    """The whole report; the same bytes for the same results."""
    drawn, absent = {}, {}
    for name, draw in FIGURES.items():
        figure = draw(results)
        if isinstance(figure, str):
            absent[name], figure = figure, figures.empty(figure)
        drawn[name] = {kind: figures.rendered(figure, kind) for kind in ("svg", "pdf")}
    found = {name: make(results) for name, make in TABLES.items()}
    return Report(drawn, found, page(results, found, {name: kinds["svg"] for name, kinds in drawn.items()}, absent))


TABLES: dict[str, Callable[[Results], pl.DataFrame]] = {
    "attacks": summary.attacks, "lineup": lineup.lineup, "comparison": summary.comparison,
    "protocols": summary.protocols,
    "all_metrics": summary.all_metrics, "blind_audits": summary.blind_audits, "distances": summary.distances,
    "telling": summary.telling,
    "attrition": lambda results: results.attrition, "dedup_thresholds": lambda results: results.thresholds,
    "dedup_checked_bins": lambda results: results.checked_bins, "dropped": summary.dropped,
    "sanitization_rounds": summary.rounds,
    "dedup_recall": summary.dedup_recall, "dedup_methods": summary.dedup_methods, "targets": summary.target_rows,
    "settings": summary.settings_used, "provenance": summary.provenance,
}  # fmt: skip


UNPRINTED = ("all_metrics", "distances")  # in their files only


# Figures: each takes the results and returns a figure, or the sentence that says why there is none.


def _roc(results: Results) -> Figure | str:
    curves = []
    chosen = summary.attacks(results)
    shown = chosen.filter(pl.col("kind") == "main", pl.col("attack").is_in(summary.leading(results, MAX_CURVES)))
    for row in shown.iter_rows(named=True):
        label = _named(row["attack"], row["variant"])
        curves.append(_curve(results, results.main.scores, row["attack"], row["variant"], label, "main"))
    for control in results.controls:
        best = chosen.filter(pl.col("target") == control.name, pl.col("attack") == CHOSEN)["variant"].item()
        attack, _, variant = best.partition(" ")
        label = f"Control {control.name}, its best of all:\n{_named(attack, variant)}"
        curves.append(_curve(results, control.scores, attack, variant, label, "control"))
    blind = sorted(set(results.blind_scores["attack"]))
    if blind:
        name = "blind_caption" if "blind_caption" in blind else blind[0]
        curves.append(_curve(results, results.blind_scores, name, "all", attack_label(name), "blind"))
    n_nonmembers = int(reported(results.main.metrics)["n_nonmembers"][0])
    return figures.roc(curves, n_nonmembers, results.fpr_targets[0])


def _named(attack: str, variant: str) -> str:
    return attack_label(attack) if variant == "all" else f"{attack_label(attack)}, {variant_label(variant)}"


def _curve(results: Results, scores: pl.DataFrame | None, attack: str, variant: str, label: str, kind: str) -> Curve:
    """The ROC of one column of scores on the test part."""
    assert scores is not None
    test = results.datasets["attacked"].filter(pl.col("part") == "test").select("sample_id", "member")
    mine = scores.filter(pl.col("attack") == attack, pl.col("variant") == variant)
    rows = test.join(mine, on="sample_id", how="inner", maintain_order="left")
    tpr, fpr, _ = metrics.roc(rows["score"].to_numpy(), rows["member"].to_numpy())
    return Curve(label, kind, attack, fpr, tpr)


def _as_is(target: Target, fpr_target: float) -> pl.DataFrame:
    """TPR of every variant that has a timestep: attack, loss, timestep, value, ci_low, ci_high, on test."""
    rows = summary.of_study(target.metrics).filter(
        pl.col("method") == "as_is", pl.col("part") == "test", pl.col("metric") == "tpr",
        pl.col("fpr_target") == fpr_target, pl.col("variant").str.contains("@"), pl.col("value").is_not_null(),
    )  # fmt: skip
    loss, timestep = (pl.col("variant").str.split_exact("@", 1).struct[i] for i in range(2))
    rows = rows.select(
        "attack", "value", "ci_low", "ci_high", loss.alias("loss"), timestep.cast(pl.Int64).alias("timestep")
    )
    return rows.sort(summary.placed("attack", summary.ORDER), "attack", "loss", "timestep")


def _tpr_by_timestep(results: Results) -> Figure | str:
    target = results.fpr_targets[0]
    main = _as_is(results.main, target)
    if main.is_empty():
        return f"No attack has timesteps and a TPR at {percent(target)} FPR."
    none = main.clear().with_columns(target=pl.lit(""))
    controls = [_as_is(control, target).with_columns(target=pl.lit(control.name)) for control in results.controls]
    return figures.tpr_by_timestep(main, pl.concat([none, *controls]), target)


def _tpr_by_step(results: Results) -> Figure | str:
    """Threshold attacks that every target with a training step has, chosen on calibration at each step."""
    target, parts = results.fpr_targets[0], []
    for one in (t for t in results.targets.values() if t.step is not None):
        rows = summary.of_study(reported(one.metrics)).filter(
            (pl.col("metric") == "auc") | (pl.col("fpr_target") == target)
        )
        rows = rows.filter(pl.col("variant").str.contains("@"), pl.col("attack") != CHOSEN).drop_nulls("value")
        parts.append(rows.select("attack", "metric", "value", "ci_low", "ci_high", step=pl.lit(one.step)))
    if len(parts) < 2:
        return "Fewer than two targets state a training step."
    shared = set.intersection(*(set(part["attack"]) for part in parts))
    if not shared:
        return "No attack was run on every target that states a training step."
    rows = pl.concat(parts).filter(pl.col("attack").is_in(sorted(shared)))
    rows = rows.sort(summary.placed("attack", summary.ORDER), "attack", "step")
    return figures.tpr_by_step(rows, target)


def _embedding_scatter(results: Results) -> Figure | str:
    parts, explained = [], {}
    for space, x in results.vectors.items():
        fitted = np.isin(results.vector_ids, summary.drawn(results.datasets["collected"])["sample_id"].to_numpy())
        place, explained[space] = principal_components(x[fitted], x)
        ids = pl.Series(results.vector_ids, dtype=pl.String)
        at = pl.DataFrame({"sample_id": ids, "pc1": place[:, 0], "pc2": place[:, 1]})
        for split in summary.MOMENTS:
            rows = summary.drawn(results.datasets[split]).join(at, on="sample_id", maintain_order="left")
            parts.append(rows.select("member", "pc1", "pc2", space=pl.lit(space), split=pl.lit(split)))
    return figures.embedding_scatter(pl.concat(parts), explained)


def principal_components(fit: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """`x`, float32[n, d], on the first two principal components of `fit`, float64[n, 2], and their shares of variance.

    Each component's sign makes its largest loading positive, so that the picture does not flip between libraries.
    """
    centre = fit.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(fit.astype(np.float64), rowvar=False)))
    basis = vectors[:, [-1, -2]]
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), [0, 1]])
    shares = values[[-1, -2]] / values.sum()
    return (x - centre) @ basis, (float(shares[0]), float(shares[1]))


def _distances(results: Results) -> Figure | str:
    return figures.distances(summary.distances(results))


def _dedup_distances(results: Results) -> Figure | str:
    rows = summary.candidates(results).drop_nulls("distance")
    if rows.is_empty():
        return "No candidate has a distance to a member."
    return figures.dedup_distances(rows, results.made["dedup"].get("options", {}).get("max_distance"))


def _controls(results: Results) -> Figure | str:
    found, target, parts = summary.of_study(summary.attacks(results)), results.fpr_targets[0], []
    names = {"main": "Main target {}", "control": "Control {}", "blind": "Blind baselines"}
    for metric, key in (("auc", "auc"), ("tpr", tpr_key(target))):
        columns = {key: "value", f"{key}_low": "ci_low", f"{key}_high": "ci_high"}
        parts.append(found.select("kind", "target", "attack", *columns, metric=pl.lit(metric)).rename(columns))
    rows = pl.concat(parts)
    labels = [names[kind].format(name) for kind, name in rows.select("kind", "target").iter_rows()]
    return figures.controls(rows.with_columns(pl.Series("target", labels)), target)


def _costs(results: Results) -> Figure | str:
    """Cost against what is found: each attack alone, as this run had it, blind baseline and control beside."""
    rows, target = lineup.lineup(results), results.fpr_targets[0]
    shown = lineup.points(results, rows)
    if not shown:
        return f"No attack has a known cost and a TPR at {percent(target)} FPR."
    found, key = summary.attacks(results), tpr_key(target)
    blind = found.filter(pl.col("kind") == "blind", pl.col("attack") == summary.best_blind(results))
    control = found.filter(pl.col("kind") == "control", pl.col("attack") == CHOSEN).sort(key, nulls_last=False)
    lines = {"Best blind baseline": blind[key], "Best of all on a control": control[key].drop_nulls()[-1:]}
    return figures.costs(shown, {name: float(v[0]) for name, v in lines.items() if len(v) and v[0] is not None}, target)


FIGURES: dict[str, Callable[[Results], Figure | str]] = {
    "roc": _roc, "controls": _controls, "costs": _costs, "tpr_by_timestep": _tpr_by_timestep,
    "tpr_by_step": _tpr_by_step,
    "embedding_scatter": _embedding_scatter, "distances": _distances, "dedup_distances": _dedup_distances,
}  # fmt: skip


# The page.


def page(results: Results, found: dict[str, pl.DataFrame], svgs: dict[str, bytes], absent: dict[str, str]) -> str:
    """The report as one HTML document; `absent` says of a figure that is not there why."""
    loader = jinja2.PackageLoader("mia", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "percent": percent, "attack": attack_label, "variant": variant_label, "listed": listed, "share": share,
        "p": p_text, "auc": lambda value: "" if value is None else f"{value:.3f}",
        "cost": lambda value: "" if value is None else f"{value:,.0f}",
        "estimate": estimate, "brief": brief, "count": lambda n: f"{n:,}", "short": lambda text: (text or "")[:12],
    }  # fmt: skip
    rows = found["attacks"].rows(named=True)
    study = summary.of_study(found["attacks"]).rows(named=True)
    best = [row for row in rows if row["attack"] == CHOSEN]
    blind = summary.best_blind(results)
    context = {
        "results": results, "main": results.main, "verdict": verdict(results), "absent": absent,
        "best": best, "blind": blind,
        "best_blind": [row for row in rows if row["kind"] == "blind" and row["attack"] == blind],
        "groups": [list(group) for _, group in itertools.groupby(study, key=lambda row: (row["kind"], row["target"]))],
        "tables": {name: table.rows(named=True) for name, table in found.items() if name not in UNPRINTED},
        "study": summary.STUDY,
        "figures": {name: inline(svg, name) for name, svg in svgs.items() if name not in absent},
        "test": best[0], "fpr_targets": results.fpr_targets, "tpr_keys": [tpr_key(t) for t in results.fpr_targets],
        "notes": Notes(), "libraries": summary.libraries(results), "planted": _planted(results),
        "told_apart": summary.told_apart(results),
        "splits": _sizes(results), "max_points": summary.MAX_POINTS, "max_curves": MAX_CURVES,
        "shown_features": SHOWN_FEATURES,
        "draws": results.made.get("features", {}).get("options", {}).get("draws"),
    }  # fmt: skip
    return environment.get_template("report.html.j2").render(context)


def _planted(results: Results) -> dict[str, int]:
    """Counts for the text on dedup: planted in all, of these seen, dropped candidates, planted among them."""
    seen = summary.candidates(results)
    gone = seen.filter(pl.col("reason").is_not_null())
    return {
        "all": 0 if results.planted is None else results.planted["candidate_id"].n_unique(),
        "seen": int(seen["planted"].sum()), "candidates": len(seen),
        "dropped": len(gone), "hits": int(gone["planted"].sum()),
    }  # fmt: skip


def _sizes(results: Results) -> dict[str, dict[str, int]]:
    """Members and non-members of each split, and of the two parts of the attacked one."""
    out = {}
    rows = results.datasets["attacked"]
    parts = results.datasets | {part: rows.filter(pl.col("part") == part) for part in ("calibration", "test")}
    for name, part in parts.items():
        member = part["member"]
        out[name] = {"members": int(member.sum()), "nonmembers": int((~member).sum())}
    return out


class Notes:
    """Footnotes of a table: each text gets one letter."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> Markup:
        """The raised letter that stands for `text`."""
        if text not in self.texts:
            self.texts.append(text)
        return Markup("<sup>{}</sup>").format(self.letter(self.texts.index(text)))

    def letter(self, place: int) -> str:
        """a, b, c, ..."""
        return chr(ord("a") + place)

    def taken(self) -> Sequence[tuple[str, str]]:
        """Letters and texts so far, and a fresh start for the next table."""
        texts, self.texts = self.texts, []
        return [(self.letter(i), text) for i, text in enumerate(texts)]


def share(rate: float | None) -> str:
    """A rate in per cent with one decimal."""
    return "" if rate is None else f"{100 * rate:.1f} %"


def p_text(p: float | None) -> str:
    """A p-value to three decimals."""
    return "" if p is None else p_words(p).removeprefix("p = ").removeprefix("p ")


def estimate(row: dict[str, Any], key: str, notes: Notes) -> Markup:
    """A value with its interval, AUC with three decimals and rates in per cent with one; a blank with its reason."""
    value, low, high = (row[f"{key}{end}"] for end in ("", "_low", "_high"))
    if value is None:
        return Markup("&ndash;{}").format(notes.mark(row[f"{key}_note"] or "not measured"))
    if key == "auc":
        return Markup("{:.3f} <small>[{:.3f}, {:.3f}]</small>").format(value, low, high)
    return Markup("{:.1f} % <small>[{:.1f}, {:.1f}]</small>").format(100 * value, 100 * low, 100 * high)


def brief(row: dict[str, Any], name: str) -> str:
    """A value of the comparison table without its interval."""
    value = row[name]
    return "\N{EN DASH}" if value is None else f"{value:.3f}" if row["metric"] == "auc" else share(value)


def inline(svg: bytes, name: str) -> Markup:
    """A figure's SVG as it stands in the page: no prolog, no metadata, no fixed size, ids that are the figure's own."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    opening, rest = text.split(">", 1)
    width_pt = float(re.search(r'viewBox="0 0 ([\d.]+) ', opening)[1])  # type: ignore[index]
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    size = f"width:{SCREEN_SCALE * width_pt / 72:.2f}in"
    return Markup(f'{opening} role="img" aria-labelledby="{name}-caption" style="{size}">{rest}')
