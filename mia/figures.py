"""Figures of the report: pure functions from tables to vector figures, the same bytes for the same tables.

One colour says one thing throughout: in figures that compare models, blue is the main target, greys are its negative
controls and a dotted line is a blind baseline; in figures of the main target alone, each attack keeps its own colour.
Chance is dashed. Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mia.summary import ATTACKS, LOSSES, MOMENTS, attack_label, percent
from mia.verdict import p_words

BLUE, ORANGE, GREEN, SKY, VERMILLION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7"
INK, FAINT = "#333333", "#888888"
MAIN, MEMBER, NONMEMBER = BLUE, BLUE, ORANGE
GREYS = ("#6e6e6e", "#a8a8a8", "#8a8a8a")
CYCLE = ((VERMILLION, "D"), (GREEN, "s"), (ORANGE, "^"), (SKY, "v"), (PURPLE, "P"))
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
OWN_COLOUR = (  # most often seen together
    "baseline_loss_threshold", "partial_denoising", "reversed_noising", "reversed_noising_regular_cfg",
    "logistic_regression",
)  # fmt: skip
CHANCE: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 0.8, "zorder": 1.5}
MAX_MARKERS = 15  # a line with more points goes without markers
WIDE, COLUMN = 7.0, 3.5  # inches: the text and a column of a two-column page

RC: Any = {
    "font.family": ["DejaVu Sans"], "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "axes.titlelocation": "left", "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.linewidth": 0.6, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "xtick.minor.width": 0.4, "ytick.minor.width": 0.4, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.5,
    "axes.axisbelow": True, "lines.linewidth": 1.3, "lines.markersize": 4, "legend.frameon": False,
    "svg.fonttype": "path", "svg.hashsalt": "mia", "pdf.fonttype": 42, "pdf.compression": 9,
}  # fmt: skip


class Curve(NamedTuple):
    """A ROC curve and its part in the figure: kind is `main`, `control` or `blind`."""

    label: str
    kind: str
    attack: str
    fpr: np.ndarray
    tpr: np.ndarray


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw under the report's style and leave matplotlib's settings as they were."""

    @functools.wraps(draw)
    def inside(*args: Any, **named: Any) -> Figure:
        with mpl.rc_context(RC):
            return draw(*args, **named)

    return inside


def rendered(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of an `svg` or `pdf` file, without date, host or version of anything but matplotlib."""
    unsaid = {
        "svg": {"Date": None, "Creator": "mia"},
        "pdf": {"CreationDate": None, "Creator": "mia", "Producer": None},
    }
    file = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(file, format=kind, metadata=unsaid[kind])
    return file.getvalue()


def _look(attack: str) -> dict[str, Any]:
    """The colour, marker and dashes that an attack keeps in every figure of the main target."""
    known = list(dict.fromkeys((*OWN_COLOUR, *(name for name in ATTACKS if not name.startswith("blind_")))))
    place = known.index(attack) if attack in known else len(known)
    colour, marker = CYCLE[place % len(CYCLE)]
    return {"color": colour, "marker": marker, "linestyle": DASHES[place // len(CYCLE) % len(DASHES)]}


def _in_percent(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))


@styled
def empty(reason: str) -> Figure:
    """A figure that holds nothing but why there is nothing to show."""
    figure = Figure((COLUMN, 1.2), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0.5, 0.5, reason, ha="center", va="center", wrap=True, color=FAINT, transform=axes.transAxes)
    return figure


@styled
def roc(curves: Sequence[Curve], n_nonmembers: int, fpr_target: float) -> Figure:
    """ROC curves on logarithmic axes; grey where one false positive is already more than the rate asked for."""
    figure = Figure((WIDE, 3.5), layout="constrained")
    axes, aside = figure.subplots(1, 2, width_ratios=(5, 4))
    aside.set_axis_off()
    low = 1e-3
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, 1),
        ylim=(low, 1.12),
        xlabel="false-positive rate",
        ylabel="true-positive rate",
    )
    axes.set_box_aspect(1)
    if 1 / n_nonmembers > low:
        axes.axvspan(low, 1 / n_nonmembers, color="#f3f3f3", linewidth=0, zorder=0)
        axes.text(0.95 / n_nonmembers, 1.25e-3, f"< 1 of {n_nonmembers}", fontsize=6.5, color=FAINT, ha="right")
    axes.axvline(fpr_target, color=FAINT, linewidth=0.8)
    axes.text(fpr_target * 1.06, 1.25e-3, f"{percent(fpr_target)} FPR", fontsize=6.5, color=FAINT)
    chance = axes.plot([low, 1], [low, 1], label="Chance", **CHANCE)
    greys = iter(GREYS * len(curves))
    handles = []
    for curve in curves:
        look = (
            _look(curve.attack) if curve.kind == "main" else {"color": next(greys) if curve.kind == "control" else INK}
        )
        look = look | {"marker": "", "linewidth": 1.5 if curve.kind == "main" else 1.1}
        look |= {"linestyle": (0, (1, 1.2))} if curve.kind == "blind" else {}
        start = np.flatnonzero(curve.fpr == 0)[-1]  # the best of those without a false positive
        x, y = np.maximum(curve.fpr[start:], low), np.maximum(curve.tpr[start:], low / 10)
        handles += axes.plot(
            x, y, drawstyle="steps-post", label=curve.label, zorder=3 if curve.kind == "main" else 2, **look
        )
    handles += chance
    aside.legend(handles=handles, loc="center left", borderaxespad=0, handlelength=2.4, labelspacing=0.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    return figure


@styled
def tpr_by_timestep(main: pl.DataFrame, controls: pl.DataFrame, fpr_target: float) -> Figure:
    """TPR at one FPR over timesteps, one panel for each loss, one line with its band for each setting.

    Args:
        main: attack, loss, timestep, value, ci_low, ci_high of the main target.
        controls: the same with target, of its negative controls; drawn in grey, without bands.
    """
    losses = [loss for loss in LOSSES if loss in set(main["loss"])]
    figure = Figure((WIDE, 2.6), layout="constrained")
    panels = figure.subplots(1, len(losses), sharey=True, squeeze=False)[0]
    for axes, loss in zip(panels, losses, strict=True):
        for (_, _), line in controls.filter(pl.col("loss") == loss).group_by("target", "attack", maintain_order=True):
            alone = "." if len(line) == 1 else ""
            axes.plot(
                line["timestep"], line["value"], color="#b5b5b5", linewidth=0.8, marker=alone, label="Negative controls"
            )
        for (attack,), line in main.filter(pl.col("loss") == loss).group_by("attack", maintain_order=True):
            _with_interval(axes, line, "timestep", attack_label(str(attack)), _look(str(attack)))
        axes.axhline(fpr_target, **CHANCE)
        axes.set(title=LOSSES[loss].capitalize(), xlabel="diffusion timestep t")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    top = main["ci_high"].max()
    panels[0].set(ylabel=f"TPR at {percent(fpr_target)} FPR (%)", ylim=(0, min(1.0, max(float(top), 0.05) * 1.05)))  # type: ignore[arg-type]
    _in_percent(panels[0].yaxis)
    _legend_above(figure, panels)
    return figure


def _with_interval(axes: Axes, line: pl.DataFrame, x: str, label: str, look: dict[str, Any]) -> None:
    """A line with a band, or, when it has one point only, a marker with a bar."""
    line = line.sort(x)
    if len(line) == 1:
        _bars(axes, line, x, label, look)
        return
    axes.fill_between(line[x], line["ci_low"], line["ci_high"], color=look["color"], alpha=0.13, linewidth=0)
    look = look | ({"marker": ""} if len(line) > MAX_MARKERS else {"markersize": 2.8})
    axes.plot(line[x], line["value"], label=label, zorder=3, **look)


def _bars(axes: Axes, line: pl.DataFrame, x: str, label: str, look: dict[str, Any]) -> None:
    whole = {"capsize": 2, "elinewidth": 1.0, "zorder": 3, "clip_on": False}
    axes.errorbar(line[x], line["value"], _reach(line), label=label, **whole, **look)  # type: ignore[arg-type]


def _reach(rows: pl.DataFrame) -> np.ndarray:
    """How far each value's interval reaches below and above it, float64[2, n_rows]."""
    low, value, high = (rows[column].to_numpy() for column in ("ci_low", "value", "ci_high"))
    return np.maximum([value - low, high - value], 0)


def _legend_above(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend over all panels, each label once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    chance = mpl.lines.Line2D([], [], **{k: v for k, v in CHANCE.items() if k != "zorder"})
    grey = found.pop("Negative controls", None)
    found |= ({"Negative controls": grey} if grey is not None else {}) | {"Chance": chance}
    figure.legend(
        found.values(),
        found.keys(),
        loc="outside upper center",
        ncols=3 if len(found) > 5 else len(found),
        columnspacing=1.6,
    )


@styled
def tpr_by_step(rows: pl.DataFrame, fpr_target: float) -> Figure:
    """TPR at one FPR and AUC over training steps. `rows`: attack, step, metric, value, ci_low, ci_high."""
    figure = Figure((WIDE, 2.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, metric, chance in zip(panels, ("tpr", "auc"), (fpr_target, 0.5), strict=True):
        attacks = list(dict.fromkeys(rows["attack"]))
        for place, attack in enumerate(attacks):
            line = rows.filter(pl.col("metric") == metric, pl.col("attack") == attack).sort("step")
            aside = 0.012 * float(rows["step"].max()) * (place - (len(attacks) - 1) / 2)  # type: ignore[arg-type]
            _bars(axes, line.with_columns(pl.col("step") + aside), "step", attack_label(attack), _look(attack))
        axes.axhline(chance, **CHANCE)
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panels[0].set(ylabel=f"TPR at {percent(fpr_target)} FPR (%)", ylim=(0, None))
    panels[1].set(ylabel="AUC", ylim=(min(0.4, *panels[1].get_ylim()), 1.0))
    _in_percent(panels[0].yaxis)
    _legend_above(figure, panels)
    return figure


@styled
def embedding_scatter(points: pl.DataFrame, explained: dict[str, Sequence[float]]) -> Figure:
    """Members and non-members on the first two principal components: rows image and text, a column for each moment.

    Args:
        points: space, split, member, pc1, pc2; drawn in this order, so that neither side lies on top.
        explained: for each space the share of variance along both components.
    """
    figure = Figure((WIDE, 4.6), layout="constrained")
    panels = figure.subplots(len(explained), len(MOMENTS), sharex="row", sharey="row", squeeze=False)
    for row, (space, shares) in zip(panels, explained.items(), strict=True):
        for axes, (split, when) in zip(row, MOMENTS.items(), strict=True):
            shown = points.filter(pl.col("space") == space, pl.col("split") == split)
            colours = np.where(shown["member"].to_numpy(), MEMBER, NONMEMBER)
            axes.scatter(shown["pc1"], shown["pc2"], s=4, c=colours, alpha=0.45, linewidths=0)
            axes.set(title=f"{space.capitalize()}, {when}", xlabel=f"PC 1 ({100 * shares[0]:.0f} %)")
            axes.locator_params(nbins=4)
        row[0].set_ylabel(f"PC 2 ({100 * shares[1]:.0f} %)")
    dots = [mpl.lines.Line2D([], [], marker="o", linestyle="", markersize=4, color=c) for c in (MEMBER, NONMEMBER)]
    figure.legend(dots, ["Members", "Non-members"], loc="outside upper center", ncols=2)
    return figure


DISTANCES = {
    "frechet": "squared Fréchet distance", "kernel": "squared kernel distance (MMD)", "c2st": "two-sample test, AUC",
}  # fmt: skip


@styled
def distances(rows: pl.DataFrame) -> Figure:
    """Each distance of members to non-members at each moment, with its interval if it has one, beside chance.

    Args:
        rows: distance tables with their `split`.
    """
    spaces = [space for space in ("image", "text") if space in set(rows["space"])]
    places = [(space, split) for space in spaces for split in MOMENTS]
    figure = Figure((WIDE, 0.3 * len(places) + 1.0), layout="constrained")
    panels = figure.subplots(1, len(DISTANCES), sharey=True)
    for axes, (metric, label) in zip(panels, DISTANCES.items(), strict=True):
        of_metric = rows.filter(pl.col("metric").is_in([metric, f"{metric}_chance"])).sort("metric")
        for y, (space, split) in enumerate(places):
            here = of_metric.filter(pl.col("space") == space, pl.col("split") == split)
            _beside_chance(axes, y, *here.rows(named=True))
        axes.set_xlabel(label)
        axes.locator_params(axis="x", nbins=4)
        axes.use_sticky_edges = False
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + 0.3 * (right - left))  # room for the last p-value
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(places)), [f"{space}, {MOMENTS[split]}" for space, split in places])
    panels[0].invert_yaxis()
    shown = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=2)
    return figure


def _beside_chance(axes: Axes, y: float, found: dict[str, Any], chance: dict[str, Any]) -> None:
    """A dot with its interval and p-value over the bar of what chance alone shows."""
    low, high = chance["ci_low"], chance["ci_high"]
    axes.barh(y, high - low, 0.5, low, color="#d0d0d0", label="Chance, central 95 %")
    label = "Members to non-members"
    axes.plot(found["value"], y, marker="o", markersize=4.5, linestyle="", color=MAIN, label=label, zorder=3)
    if found["ci_low"] is not None:
        axes.hlines(y, found["ci_low"], found["ci_high"], color=MAIN, linewidth=1.1, zorder=3)
    right = max(high, found["value"] if found["ci_high"] is None else found["ci_high"])
    axes.annotate(p_words(found["p_value"]), (right, y), (4, 0), textcoords="offset points", va="center", fontsize=6.5)


@styled
def dedup_distances(rows: pl.DataFrame, max_distance: float | None) -> Figure:
    """Candidates' distances to their nearest member, planted duplicates apart. `rows`: distance, planted."""
    figure = Figure((COLUMN + 0.6, 2.5), layout="constrained")
    axes = figure.subplots()
    edges = np.arange(0, float(rows["distance"].max() or 0) + 0.04, 0.04)  # type: ignore[arg-type]
    for planted, label, colour in ((False, "Other candidates", "#9a9a9a"), (True, "Planted duplicates", VERMILLION)):
        shown = rows.filter(pl.col("planted") == planted)["distance"].to_numpy()
        if len(shown):
            look: dict[str, Any] = {
                "facecolor": colour,
                "edgecolor": colour,
                "alpha": 0.45,
                "label": f"{label} ({len(shown)})",
            }
            axes.hist(shown, edges.tolist(), histtype="stepfilled", **look)
    if max_distance is not None:
        axes.axvline(max_distance, color=INK, linewidth=0.9)
        top = axes.get_xaxis_transform()
        axes.text(max_distance, 0.97, f" threshold {max_distance:g}", transform=top, fontsize=7, va="top")
    axes.set(xlabel="L2 distance to the nearest member (unit CLIP embeddings)", ylabel="candidates", xlim=(0, None))
    figure.legend(loc="outside upper center", ncols=2)
    return figure


@styled
def controls(rows: pl.DataFrame, fpr_target: float) -> Figure:
    """AUC and TPR of each attack with intervals: main target, negative controls, and blind baselines apart.

    Args:
        rows: target (its label), kind (`main`, `control` or `blind`), attack, metric, value, ci_low, ci_high.
    """
    attacks = list(dict.fromkeys(rows.filter(pl.col("kind") != "blind")["attack"]))
    blind = list(dict.fromkeys(rows.filter(pl.col("kind") == "blind")["attack"]))
    places = {attack: i for i, attack in enumerate(attacks)} | {
        attack: len(attacks) + 0.35 + 0.7 * i for i, attack in enumerate(blind)
    }
    targets = list(dict.fromkeys(rows.select("target", "kind").iter_rows()))
    modelled = [target for target in targets if target[1] != "blind"]
    figure = Figure((WIDE, 0.42 * len(attacks) + 0.3 * len(blind) + 1.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric, chance in zip(panels, ("auc", "tpr"), (0.5, fpr_target), strict=True):
        greys = iter(GREYS * len(targets))
        for target, kind in targets:
            colour = MAIN if kind == "main" else next(greys) if kind == "control" else INK
            offset = 0.0 if kind == "blind" else 0.24 * (modelled.index((target, kind)) - (len(modelled) - 1) / 2)
            shown = rows.filter(pl.col("target") == target, pl.col("metric") == metric).drop_nulls("value")
            y = np.array([places[attack] + offset for attack in shown["attack"]])
            marker = {"main": "o", "control": "s", "blind": "D"}[kind]
            look: dict[str, Any] = {"marker": marker, "color": colour, "linestyle": "", "elinewidth": 1.1, "zorder": 3}
            axes.errorbar(shown["value"], y, xerr=_reach(shown), label=target, clip_on=False, **look)
        axes.axvline(chance, **CHANCE)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        for place in range(0, len(attacks), 2):
            axes.axhspan(place - 0.5, place + 0.5, color="#f6f6f6", linewidth=0, zorder=0)
    panels[0].set_yticks(list(places.values()), [attack_label(attack) for attack in places])
    panels[0].set(xlabel="AUC", ylim=(max(places.values()) + 0.5, -0.6))
    panels[1].set(xlabel=f"TPR at {percent(fpr_target)} FPR (%)", xlim=(0, None))
    _in_percent(panels[1].xaxis)
    _legend_above(figure, panels)
    return figure


ACCESS_LOOK = {"black": (INK, "^"), "grey": (BLUE, "o"), "white": (VERMILLION, "s")}


@styled
def costs(points: Sequence[dict[str, Any]], lines: dict[str, float], fpr_target: float) -> Figure:
    """TPR at one FPR over cost, numbered points with intervals, and beside them which attack each number is.

    Args:
        points: number, attack, access, labels, cost (UNet rows), value, ci_low, ci_high.
        lines: label -> TPR of what an attack is to be held against.
    """
    figure = Figure((WIDE, max(3.4, 0.135 * ((len(points) + 1) // 2) + 0.9)), layout="constrained")
    axes, aside = figure.subplots(1, 2, width_ratios=(5, 4))
    aside.set_axis_off()
    for access, (colour, marker) in ACCESS_LOOK.items():
        for point in (p for p in points if p["access"] == access):
            face = "white" if point["labels"] else colour
            reach = np.maximum([[point["value"] - point["ci_low"]], [point["ci_high"] - point["value"]]], 0)
            axes.errorbar(
                point["cost"], point["value"], reach, color=colour, marker=marker, markerfacecolor=face, elinewidth=0.6,
                alpha=0.85, zorder=3, linestyle="", clip_on=False,
            )  # fmt: skip
            axes.annotate(
                str(point["number"]), (point["cost"], point["value"]), (3, 3), textcoords="offset points", fontsize=5.5
            )
    looks = ({"color": INK, "linestyle": (0, (1, 1.2))}, {"color": GREYS[0], "linestyle": "-"})
    for (label, value), look in zip(lines.items(), looks, strict=False):
        axes.axhline(value, linewidth=1.0, label=label, zorder=2, **look)  # type: ignore[arg-type]
    axes.axhline(fpr_target, label="Chance", **CHANCE)
    axes.set(xscale="log", xlabel="cost: UNet rows for one image", ylabel=f"TPR at {percent(fpr_target)} FPR (%)")
    axes.set_ylim(0, None)
    _in_percent(axes.yaxis)
    for access, (colour, marker) in ACCESS_LOOK.items():
        if any(point["access"] == access for point in points):
            axes.plot([], [], color=colour, marker=marker, linestyle="", label=f"{access.capitalize()} box")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, columnspacing=1.4)
    half = (len(points) + 1) // 2
    for column, some in enumerate((points[:half], points[half:])):
        names = "\n".join(f"{p['number']:2d}  {attack_label(p['attack'])}{'*' * p['labels']}" for p in some)
        aside.text(0.5 * column, 1.0, names, va="top", fontsize=6, linespacing=1.35, transform=aside.transAxes)
    return figure
