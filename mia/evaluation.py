"""How well scores tell members from non-members, by three protocols side by side, and whether that is membership.

`holdout` chooses on the calibration part and reports on the test part; it is the headline. `crossfit` does the same in
folds over all samples. `paper` is the protocol of arXiv 2306.12983, which chooses on the very samples it reports on;
its difference to `holdout` is the selection gain. `as_is` rows hold every column of scores, with nothing chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from mia import metrics, resampling, rng, tables
from mia.config import EvaluationOptions
from mia.errors import UserError
from mia.scored import CHANCE, CHOSEN, SHIFT, SIGNAL, Scored

PAPER_SEED = 123  # of the authors' subsamples

Row = dict[str, Any]


def evaluate(
    scored: Scored,
    options: EvaluationOptions,
    seed: int,
    blind: Scored | None = None,
    controls: Mapping[str, Scored] | None = None,
) -> pa.Table:
    """The metrics table, by every protocol; without a calibration part `as_is` alone.

    Intervals of `as_is` rows hold one at a time; those of `holdout` and `crossfit`, which are read side by side, hold
    together over the table's k attacks (Bonferroni: each at 1 - (1 - confidence) / k).

    Args:
        blind: the blind baselines' scores of the same samples.
        controls: by name, the same attacks' scores of the same samples on models that trained on neither side.

    Raises:
        UserError: options out of range, no sample in the test part, a part with one side only or with too few
            non-members for the first FPR target, an attack that scores all samples alike, rivals without a
            calibration part.
    """
    _check(scored, options)
    if (blind or controls) and not (scored.part == "calibration").any():
        raise UserError(
            "rivals without a calibration part", "--blind or --control", "a verdict is on a choice: give it"
        )
    for name, control in (controls or {}).items():
        if not set(scored.names) & set(control.names):
            raise UserError("control has none of the scores' columns", name, "score it by the same attacks")
    run = _Run(scored, options, seed, blind, dict(controls or {}))
    rows = list(run.as_is())
    if "calibration" in run.at:
        holdout = list(run.holdout())
        rows += [*holdout, *run.crossfit(), *run.paper(holdout)]
    schema = tables.SCHEMAS["metrics"]
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)


def _check(scored: Scored, options: EvaluationOptions) -> None:
    """Hold options that came as flags to what the schema says of those in `config.yaml`, and the scores to both."""
    targets = options.fpr_targets
    if not targets or not all(0 < target <= 1 for target in targets):
        raise UserError(f"fpr_targets are {targets}", "evaluation.fpr_targets", "give rates above 0, at most 1")
    if len(set(targets)) < len(targets):
        raise UserError(f"fpr_targets are {targets}", "evaluation.fpr_targets", "give each rate once")
    if not 0 < options.confidence < 1:
        raise UserError(f"confidence is {options.confidence}", "evaluation.confidence", "give a number between 0 and 1")
    for name, least in (("bootstrap", 100), ("permutations", 100), ("crossfit_folds", 2), ("paper_resamples", 1),
                        ("paper_size", 1)):  # fmt: skip
        value = getattr(options, name)
        if value < least:
            raise UserError(f"{name} is {value}", f"evaluation.{name}", f"give {least} or more")
    for part in dict.fromkeys(("test", *scored.part)):
        member = scored.member[scored.part == part]
        if not member.any() or member.all():
            raise UserError(f"the {part} part holds one side only", "labels", "bring members and non-members to it")
        note = _too_few(targets[0], int((~member).sum()))
        if note:
            raise UserError(f"the {part} part's {note}", "evaluation.fpr_targets", "bring more, or raise --fpr")
    for named, score in zip(scored.names, scored.scores.T, strict=True):
        if np.ptp(score) == 0 and not named[0].startswith("blind_"):  # a blind one may be: nothing leaks
            raise UserError(f"{' '.join(named).strip()} is {score[0]} for every sample", "scores", "mend or drop it")


def _too_few(target: float, nonmembers: int) -> str:
    """Why there is no TPR at this target, or nothing."""
    if metrics.allowed(target, nonmembers) >= 1:
        return ""
    needed = int(np.ceil(1 / target - 1e-9))
    return f"{nonmembers} non-members allow no false positive at {target:g}; {needed} are needed"


class _Run:
    """One evaluation: what its protocols share. Scores of rivals stand beside the attacks' in `test`'s resamples."""

    def __init__(
        self, scored: Scored, options: EvaluationOptions, seed: int, blind: Scored | None, controls: dict[str, Scored]
    ) -> None:
        self.scored, self.options, self.seed = scored, options, seed
        self.blind, self.controls = blind, controls
        self.at = {p: np.flatnonzero(scored.part == p) for p in tables.PARTS if p == "test" or (scored.part == p).any()}
        attacks = {attack for attack, _ in scored.names}
        self.together = 1 - (1 - options.confidence) / len(attacks)
        test = self.at["test"]
        self.member, self.group = scored.member[test], scored.group[test]
        self.scores = np.concatenate([s.scores[test] for s in self._all()], axis=1)
        self.resamples = self._bootstrap(self.scores, test, "test")
        generator = rng.stream(seed, "test", purpose="permutation")
        own = self.scores[:, : len(scored.names)]
        targets = options.fpr_targets
        self.permuted = resampling.permutation(own, self.member, self.group, targets, options.permutations, generator)
        self.observed = np.array([_values(own[:, c], self.member, targets) for c in range(own.shape[1])])

    def _all(self) -> list[Scored]:
        return [self.scored, *([] if self.blind is None else [self.blind]), *self.controls.values()]

    def _bootstrap(self, scores: np.ndarray, rows: np.ndarray, part: str) -> np.ndarray:
        generator = rng.stream(self.seed, part, purpose="bootstrap")
        member, group = self.scored.member[rows], self.scored.group[rows]
        options = self.options
        return resampling.bootstrap(scores, member, group, options.fpr_targets, options.bootstrap, generator)

    # Protocols

    def as_is(self) -> Iterator[Row]:
        """Every column on the test part, nothing chosen."""
        p = self._p_values(range(len(self.scored.names)))
        for column, (attack, variant) in enumerate(self.scored.names):
            score = self.scores[:, column]
            named = {"attack": attack, "variant": variant, "part": "test", "method": "as_is"}
            found = self._measured(column, self.options.confidence)
            yield from _with(found, named, p[column])
            yield self._optimistic(score) | named

    def _optimistic(self, score: np.ndarray) -> Row:
        threshold = metrics.best_threshold(score, self.member)
        value = metrics.balanced_accuracy(score, self.member, threshold)
        note = "threshold chosen on the same samples: optimistic, without interval"
        return _row(self.member, "balanced_accuracy", value, threshold=_finite(threshold), note=note)

    def holdout(self) -> Iterator[Row]:
        """Each attack's variant chosen on calibration, and the choice over all attacks, reported on both parts."""
        rows = self.at["calibration"]
        chosen = choices(self.scored, rows, self.options)
        columns = list(chosen.values())
        resamples = self._bootstrap(self.scored.scores[rows][:, columns], rows, "calibration")
        p = self._p_values(columns)
        member = self.scored.member[rows]
        for place, (attack, column) in enumerate(chosen.items()):
            score = self.scored.scores[rows, column]
            named = {"attack": attack, "variant": self._variant(attack, column), "method": "holdout"}
            group = self.scored.group[rows]
            found = measured(score, member, group, resamples[:, place], self.options, self.together)
            yield from _with(found, named | {"part": "calibration"})
            found = self._measured(column, self.together)
            found = [self._judged(row | more, column) for row, more in zip(found, p[place], strict=True)]
            yield from _with([*found, *self._frozen(column, score, member)], named | {"part": "test"})

    def _frozen(self, column: int, score: np.ndarray, member: np.ndarray) -> Iterator[Row]:
        """On test, what the thresholds chosen on calibration reach: TPR and FPR with exact intervals, and accuracy."""
        mine = self.scores[:, column]
        for target in self.options.fpr_targets:
            if _too_few(target, int((~member).sum())):
                continue
            threshold = metrics.tpr_at_fpr(score, member, target).threshold
            for metric, side in (("tpr_at_threshold", self.member), ("fpr_at_threshold", ~self.member)):
                hits, n = int((mine[side] >= threshold).sum()), int(side.sum())
                low, high = metrics.exact_interval(hits, n, self.together)
                yield _row(self.member, metric, hits / n, low, high, fpr_target=target, threshold=_finite(threshold))
        threshold = metrics.best_threshold(score, member)
        # Balanced accuracy is the AUC of the yes or no that the threshold makes of a score.
        called = mine >= threshold
        value, variance = resampling.delong(called.astype(float)[:, None], self.member, self.group)
        low, high = _normal(value[0], variance[0, 0], self.together)
        rates = [(int(right.sum()), len(right)) for right in (called[self.member], ~called[~self.member])]
        if any(hits in (0, n) for hits, n in rates):  # of a rate of 0 or 1 a variance knows no doubt
            exact = [metrics.exact_interval(hits, n, (1 + self.together) / 2) for hits, n in rates]  # both at once
            low = min(low, sum(one for one, _ in exact) / 2)
            high = max(high, sum(other for _, other in exact) / 2)
        yield _row(self.member, "balanced_accuracy", value[0], low, high, threshold=_finite(threshold))

    def crossfit(self) -> Iterator[Row]:
        """As holdout, in folds over all samples: a variant is chosen on the others and read on the fold.

        Where folds choose different variants, each is put on one scale first, by the median and quartiles that
        non-members have in the training folds; by their standard deviation where the quartiles are equal.
        """
        rows = np.arange(len(self.scored.member))
        found = crossfitted(self.scored, self.options, self.seed)
        resamples = self._bootstrap(np.stack([score for score, _ in found.values()], axis=1), rows, "all")
        for place, (attack, (score, variant)) in enumerate(found.items()):
            named = {"attack": attack, "variant": variant, "part": "all", "method": "crossfit"}
            everyone = self.scored.member, self.scored.group
            yield from _with(measured(score, *everyone, resamples[:, place], self.options, self.together), named)

    def paper(self, holdout: list[Row]) -> Iterator[Row]:
        """The best variant on the test part itself, mean over subsamples; and by how much that is above holdout."""
        targets = self.options.fpr_targets
        size = min(self.options.paper_size, int(self.member.sum()), int((~self.member).sum()))
        own = self.scores[:, : len(self.scored.names)]
        found = resampling.subsampled(own, self.member, targets, self.options.paper_resamples, size, PAPER_SEED)
        means = np.rint(found * size).sum(0) / (size * len(found))  # of whole numbers, so that no gain is of rounding
        spreads = found.std(0)
        honest = {
            (row["attack"], row["fpr_target"]): row.get("value")
            for row in holdout
            if row["part"] == "test" and row["metric"] == "tpr"
        }
        for attack, columns in _by_attack(self.scored.names).items():
            for place, target in enumerate(targets):
                named = {"attack": attack, "part": "test", "method": "paper", "fpr_target": target}
                few = _too_few(target, size)
                if few:
                    yield _row(self.member, "tpr", note=few) | named | {"variant": ""}
                    continue
                best = columns[int(np.argmax(means[columns, place]))]
                alone = self._p_max(columns, place + 1)
                note = f"chosen on the test part; mean of {len(found)} subsamples of {size} + {size}, std no interval"
                named["variant"] = self._variant(attack, best)
                yield _row(self.member, "tpr", means[best, place], std=spreads[best, place], note=note) | named | alone
                gain = means[best, place] - honest[attack, target]
                yield _row(self.member, "selection_gain", gain, note="paper minus holdout") | named

    # What rows are made of

    def _measured(self, column: int, confidence: float) -> list[Row]:
        """A column's rows on the test part."""
        rows = self.member, self.group, self.resamples[:, column]
        return measured(self.scores[:, column], *rows, self.options, confidence)

    def _variant(self, attack: str, column: int) -> str:
        name, variant = self.scored.names[column]
        return f"{name} {variant}".strip() if attack == CHOSEN else variant

    def _p_values(self, columns: Any) -> list[list[Row]]:
        """For each of these columns and each metric, its p-value alone and adjusted for all of these columns."""
        columns = list(columns)
        out: list[list[Row]] = [[] for _ in columns]
        for place in range(self.observed.shape[1]):
            both = resampling.p_values(self.observed[columns, place], self.permuted[:, columns, place])
            for row, alone, adjusted in zip(out, *both, strict=True):
                row.append({"p_value": float(alone), "p_adjusted": float(adjusted)})
        return out

    def _p_max(self, columns: list[int], place: int) -> Row:
        """The p-value of the best of an attack's variants, and of that within the best of all attacks."""
        best = self.observed[columns, place].max()
        within, over = (
            resampling.p_values(np.array([best]), self.permuted[:, which, place].max(1)[:, None])[0][0]
            for which in (columns, slice(None))
        )
        return {"p_value": float(within), "p_adjusted": float(over)}

    def _judged(self, row: Row, column: int) -> Row:
        """A test row with its verdict, and the p-value of beating every blind baseline and negative control."""
        if row.get("value") is None or not (self.blind or self.controls):
            return row
        rivals = self._rivals(column)
        name = self.scored.names[column]
        lacking = [label for label, control in self.controls.items() if name not in control.names]
        row = row | {"p_shift": max((self._p_over(row, column, rival) for rival, _ in rivals), default=None)}
        row = row | ({"note": f"not held against {', '.join(lacking)}, which lacks it"} if lacking else {})
        alpha = 1 - self.options.confidence
        if row["p_adjusted"] > alpha:
            return row | {"verdict": CHANCE}
        kinds = {kind for _, kind in rivals}
        if row["p_shift"] is not None and row["p_shift"] > alpha:
            return row | {"verdict": SHIFT}
        absent = {"blind": "blind baseline", "control": "negative control"}
        lacks = " and no ".join(words for kind, words in absent.items() if kind not in kinds)
        return row | ({"note": f"no verdict: no {lacks} beside it"} if lacks else {"verdict": SIGNAL})

    def _rivals(self, column: int) -> list[tuple[int, str]]:
        """Columns of `self.scores` to beat: each blind attack's choice on calibration, each control's same column."""
        found, start = [], len(self.scored.names)
        if self.blind is not None:
            found += [(start + c, "blind") for c in choices(self.blind, self.at["calibration"], self.options).values()]
            start += len(self.blind.names)
        for control in self.controls.values():
            name = self.scored.names[column]
            found += [(start + control.names.index(name), "control")] if name in control.names else []
            start += len(control.names)
        return found

    def _p_over(self, row: Row, column: int, rival: int) -> float:
        if row["metric"] == "auc":
            one, other = self.scores[:, column], self.scores[:, rival]
            return resampling.paired_auc(one, other, self.member, self.group)[1]
        place = 1 + self.options.fpr_targets.index(row["fpr_target"])
        return resampling.paired(self.resamples[:, column, place], self.resamples[:, rival, place])


def choices(scored: Scored, rows: np.ndarray, options: EvaluationOptions) -> dict[str, int]:
    """For each attack, and for all of them but the blind ones together, the column that is best on these rows.

    Best is the highest TPR at the first FPR target, ties by AUC, then the first by name.
    """
    best: dict[str, int] = {}
    merits = [_merit(scored.scores[rows, c], scored.member[rows], options) for c in range(len(scored.names))]
    for column, (attack, _) in enumerate(scored.names):
        for name in (attack,) if attack.startswith("blind_") else (attack, CHOSEN):
            if name not in best or merits[column] > merits[best[name]]:
                best[name] = column
    return best


def _merit(score: np.ndarray, member: np.ndarray, options: EvaluationOptions) -> tuple[float, float]:
    return metrics.tpr_at_fpr(score, member, options.fpr_targets[0]).tpr, metrics.auc(score, member)


def crossfitted(scored: Scored, options: EvaluationOptions, seed: int) -> dict[str, tuple[np.ndarray, str]]:
    """For each attack, and over all, float64[n] scores whose variant was chosen without them, and which these were."""
    folds = rng.folds(options.crossfit_folds, scored.member, scored.group, seed, "evaluation.crossfit_folds")
    picked = [choices(scored, train, options) for train, _ in folds]
    out = {}
    for attack in picked[0]:
        columns = [choice[attack] for choice in picked]
        score = np.empty(len(scored.member))
        for column, (train, test) in zip(columns, folds, strict=True):
            values = scored.scores[:, column]
            low, middle, high = np.quantile(values[train][~scored.member[train]], [0.25, 0.5, 0.75])
            width = (high - low) or values[train][~scored.member[train]].std() or 1.0
            scale = (middle, width) if len(set(columns)) > 1 else (0.0, 1.0)
            score[test] = (values[test] - scale[0]) / scale[1]
        out[attack] = score, _tally([scored.names[column] for column in columns], attack == CHOSEN)
    return out


def _tally(names: list[tuple[str, str]], whole: bool) -> str:
    counts = Counter(" ".join(name).strip() if whole else name[1] for name in names)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _by_attack(names: list[tuple[str, str]]) -> dict[str, list[int]]:
    """Columns of each attack, and of all that are not blind."""
    found: dict[str, list[int]] = {}
    for column, (attack, _) in enumerate(names):
        for name in (attack,) if attack.startswith("blind_") else (attack, CHOSEN):
            found.setdefault(name, []).append(column)
    return found


def measured(
    score: np.ndarray, member: np.ndarray, group: np.ndarray, resamples: np.ndarray, options: EvaluationOptions,
    confidence: float,
) -> list[Row]:  # fmt: skip
    """Rows of a metrics table, without names: exact AUC, and TPR at each FPR target, with intervals.

    Intervals are the bootstrap's, `resamples` float64[bootstrap, 1 + targets]; for a TPR, at least as wide as the exact
    binomial one of its hits, since a bootstrap of no hit at all knows no doubt. For the same reason an AUC of 0 or 1
    gets the exact interval of as many independent pairs as the smaller side has groups. A target that allows not even
    one false positive gets no value but a note why.
    """
    n, m = int(member.sum()), int((~member).sum())
    low, high = metrics.interval(resamples, confidence)
    area = metrics.auc(score, member)
    if area in (0.0, 1.0):
        pairs = min(len(np.unique(group[side])) for side in (member, ~member))
        low[0], high[0] = metrics.exact_interval(int(area) * pairs, pairs, confidence)
    rows = [_row(member, "auc", area, low[0], high[0])]
    for target, lower, upper in zip(options.fpr_targets, low[1:], high[1:], strict=True):
        few = _too_few(target, m)
        if few:
            rows.append(_row(member, "tpr", fpr_target=target, note=few))
            continue
        at = metrics.tpr_at_fpr(score, member, target)
        exact = metrics.exact_interval(round(at.tpr * n), n, confidence)
        ends = min(lower, exact[0]), max(upper, exact[1])
        more = {"fpr_target": target, "fpr_realized": at.fpr, "threshold": _finite(at.threshold)}
        rows.append(_row(member, "tpr", at.tpr, *ends, **more))
    return rows


def roc(scored: Scored) -> pa.Table:
    """The roc table: points of each column's ROC curve on the test part, evenly spaced on a logarithmic axis."""
    rows = np.flatnonzero(scored.part == "test")
    found = []
    for column, (attack, variant) in enumerate(scored.names):
        for rate, at in metrics.log_roc(scored.scores[rows, column], scored.member[rows]):
            named = {"attack": attack, "variant": variant, "part": "test", "fpr_target": rate}
            found.append(named | {"tpr": at.tpr, "fpr_realized": at.fpr, "threshold": _finite(at.threshold)})
    return pa.Table.from_pylist(found, schema=tables.SCHEMAS["roc"])


def _values(score: np.ndarray, member: np.ndarray, targets: tuple[float, ...]) -> list[float]:
    return [metrics.auc(score, member), *(metrics.tpr_at_fpr(score, member, target).tpr for target in targets)]


def _row(
    member: np.ndarray, metric: str, value: float | None = None, low: float | None = None, high: float | None = None,
    **more: Any,
) -> Row:  # fmt: skip
    counts = {"n_members": int(member.sum()), "n_nonmembers": int((~member).sum()), "note": "", "fpr_target": None}
    return counts | {"metric": metric, "value": value, "ci_low": low, "ci_high": high} | more


def _with(rows: list[Row], named: Row, more: list[Row] | None = None) -> list[Row]:
    extra = more or [{}] * len(rows)
    return [row | named | one for row, one in zip(rows, extra, strict=True)]


def _normal(value: float, variance: float, confidence: float) -> tuple[float, float]:
    from scipy.stats import norm

    half = float(norm.ppf((1 + confidence) / 2) * np.sqrt(variance))
    return max(0.0, value - half), min(1.0, value + half)


def _finite(threshold: float) -> float | None:
    return threshold if np.isfinite(threshold) else None
