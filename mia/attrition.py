"""Which links have died, by pool and cause, and whether their dying tells members from non-members.

A row whose image is gone leaves the dataset. If members and candidates lose unequal shares, what is left of either side
is no longer what was chosen, and a study of the same links a year later has another dataset.
"""

from __future__ import annotations

import dataclasses
import logging
import urllib.parse
from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from mia import metrics
from mia.errors import UserError

logger = logging.getLogger(__name__)

SIDES = ("member", "candidate")  # the control pool enters no dataset


@dataclasses.dataclass(frozen=True)
class Odds:
    """An odds ratio with its interval and a two-sided p-value; None where the counts allow none.

    Above 1, members survive more often. `strata` and `rows` are those that inform it.
    """

    odds_ratio: float | None
    ci_low: float | None
    ci_high: float | None
    p_value: float | None
    strata: int
    rows: int


def joined(metadata: Iterable[pa.RecordBatch], images: pa.Table) -> pl.DataFrame:
    """One row for each of `metadata`: sample_id, pool, status, survived (bool), host, top_level_domain ("" for none).

    URLs are in memory a batch at a time, and a batch is soonest joined where both are sorted.

    Raises:
        UserError: a row has no status yet.
    """
    found = pl.DataFrame(pl.from_arrow(images.select(["sample_id", "status"])))
    rows = pl.concat([_joined(batch, found) for batch in metadata]).sort("sample_id")
    absent = rows.filter(pl.col("status").is_null())
    if len(absent):
        what = f"{len(absent)} of {len(rows)} samples have no status, the first is {absent['sample_id'][0]}"
        raise UserError(what, "--images", "give every shard")
    return rows


def _joined(metadata: pa.RecordBatch, found: pl.DataFrame) -> pl.DataFrame:
    rows = pl.DataFrame(pl.from_arrow(metadata.select(["sample_id", "pool", "url"])))
    near = found.filter(
        pl.col("sample_id").is_between(pl.lit(rows["sample_id"].min()), pl.lit(rows["sample_id"].max()))
    )
    rows = rows.join(near, "sample_id", "left", maintain_order="left")
    hosts = [_host(url) for url in rows["url"].to_list()]
    return rows.select("sample_id", "pool", "status", survived=pl.col("status") == "ok").with_columns(
        host=pl.Series(hosts, dtype=pl.String),
        top_level_domain=pl.Series([host.rpartition(".")[2] for host in hosts], dtype=pl.String),
    )


def _host(url: str) -> str:
    try:
        return (urllib.parse.urlsplit(url.strip()).hostname or "").rstrip(".")
    except ValueError:
        return ""


def rates(rows: pl.DataFrame, confidence: float = 0.95) -> pa.Table:
    """Table `attrition`: each pool with each status that any pool has, sorted.

    pool, status; rows and total (int32), of this status and in all; share (float64) and its exact binomial interval.

    Args:
        rows: as `joined` returns them.
        confidence: of each interval.
    """
    totals = dict(rows.group_by("pool").len().iter_rows())
    counts = {(pool, status): n for pool, status, n in rows.group_by("pool", "status").len().iter_rows()}
    cells = [(pool, status) for pool in sorted(totals) for status in sorted(rows["status"].unique())]
    hits, sizes = [counts.get(cell, 0) for cell in cells], [totals[pool] for pool, _ in cells]
    spans = [metrics.exact_interval(k, n, confidence) for k, n in zip(hits, sizes, strict=True)]
    return pa.table(
        {
            "pool": pa.array([pool for pool, _ in cells], pa.string()),
            "status": pa.array([status for _, status in cells], pa.string()),
            "rows": pa.array(hits, pa.int32()),
            "total": pa.array(sizes, pa.int32()),
            "share": pa.array([k / n for k, n in zip(hits, sizes, strict=True)], pa.float64()),
            "ci_low": pa.array([low for low, _ in spans], pa.float64()),
            "ci_high": pa.array([high for _, high in spans], pa.float64()),
        }
    )


def survival(rows: pl.DataFrame, confidence: float = 0.95, level: float = 0.01) -> dict[str, Any]:
    """Whether a live link predicts membership, ready for JSON.

    `pools`: rows, survivors and share of either side. `overall`: odds ratio, Fisher's exact p-value. `within`: the same
    among rows of one host, and of one top-level domain (Cochran-Mantel-Haenszel). `auc`, `auc_ci_low`, `auc_ci_high`:
    of survival taken as a score, chance being 0.5. `predicts`: the overall p-value is below `level`. `statement`: all
    that in words, with what follows from it.

    Args:
        rows: as `joined` returns them.
        confidence: of each interval.
        level: a p-value below it counts as evidence.

    Raises:
        UserError: a side has no rows.
    """
    sides = rows.filter(pl.col("pool").is_in(SIDES))
    counts = fourfold(sides, None)[0]
    for side, n in zip(SIDES, counts.sum(1), strict=True):
        if n == 0:
            raise UserError(f"no row is of pool '{side}'", "--metadata", "give both sides")
    low, high = difference_interval(counts, confidence)
    shares = counts[:, 0] / counts.sum(1)
    found: dict[str, Any] = {
        "pools": {
            side: {"rows": int(row.sum()), "survived": int(row[0]), "share": float(share)}
            for side, row, share in zip(SIDES, counts, shares, strict=True)
        },
        "overall": dataclasses.asdict(fisher(counts, confidence)),
        "within": {
            name: dataclasses.asdict(mantel_haenszel(fourfold(sides, name), confidence))
            for name in ("host", "top_level_domain")
        },
        "auc": float(0.5 + (shares[0] - shares[1]) / 2),  # one threshold: (1 + TPR - FPR) / 2, ties counting half
        "auc_ci_low": 0.5 + low / 2,
        "auc_ci_high": 0.5 + high / 2,
        "confidence": confidence,
        "level": level,
    }
    found["predicts"] = found["overall"]["p_value"] < level
    found["statement"] = _statement(found)
    logger.info("%s", found["statement"])
    return found


def fourfold(rows: pl.DataFrame, by: str | None) -> np.ndarray:
    """Counts by stratum, int64[strata, 2, 2]: member and candidate, survived and lost. One stratum if `by` is None."""
    cells = [
        ((pl.col("pool") == side) & (pl.col("survived") == alive)).sum().alias(f"{side} {alive}")
        for side in SIDES
        for alive in (True, False)
    ]
    counted = rows.select(cells) if by is None else rows.group_by(by).agg(cells).sort(by).drop(by)
    return counted.to_numpy().astype(np.int64).reshape(-1, 2, 2)


def fisher(counts: np.ndarray, confidence: float = 0.95) -> Odds:
    """The odds ratio of one fourfold table, int64[2, 2], and Fisher's exact two-sided p-value.

    The interval is Woolf's (1955). With an empty cell, ratio and interval are those of the counts plus one half
    (Haldane 1956, Anscombe 1956); the p-value never is. All but the p-value are None when all or none survived.
    """
    from scipy.stats import fisher_exact, norm

    p_value, rows = float(fisher_exact(counts)[1]), int(counts.sum())
    if not counts.sum(0).all():
        return Odds(None, None, None, p_value, 1, rows)
    (a, b), (c, d) = counts + (0.0 if counts.all() else 0.5)
    ratio, spread = a * d / (b * c), norm.ppf((1 + confidence) / 2) * np.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    return Odds(float(ratio), float(ratio * np.exp(-spread)), float(ratio * np.exp(spread)), p_value, 1, rows)


def mantel_haenszel(strata: np.ndarray, confidence: float = 0.95) -> Odds:
    """The odds ratio common to fourfold tables, int64[strata, 2, 2], and whether it differs from 1.

    A stratum of one side only, or in which all or none survived, says nothing and is left out.

    Source: Agresti (1990), Categorical Data Analysis, pages 231-236; the test with its continuity correction, the ratio
    by Mantel and Haenszel (1959), its interval by Robins, Breslow and Greenland (1986). R's `mantelhaen.test` agrees,
    except that a sum less than one half from its expectation gets p = 1 here.
    """
    from scipy.stats import chi2, norm

    strata = strata[strata.sum(1).all(1) & strata.sum(2).all(1)].astype(float)
    if not len(strata):
        return Odds(None, None, None, None, 0, 0)
    (a, b), (c, d) = strata.transpose(1, 2, 0)
    n = a + b + c + d
    excess = abs((a - (a + b) * (a + c) / n).sum())
    variance = ((a + b) * (c + d) * (a + c) * (b + d) / (n**2 * (n - 1))).sum()
    p_value = float(chi2.sf(max(0.0, excess - 0.5) ** 2 / variance, 1))
    r, s, p, q = a * d / n, b * c / n, (a + d) / n, (b + c) / n
    if not (r.sum() and s.sum()):
        return Odds(None, None, None, p_value, len(strata), int(n.sum()))
    ratio = r.sum() / s.sum()
    spread = norm.ppf((1 + confidence) / 2) * np.sqrt(
        (p * r).sum() / (2 * r.sum() ** 2)
        + (p * s + q * r).sum() / (2 * r.sum() * s.sum())
        + (q * s).sum() / (2 * s.sum() ** 2)
    )
    low, high = ratio * np.exp(-spread), ratio * np.exp(spread)
    return Odds(float(ratio), float(low), float(high), p_value, len(strata), int(n.sum()))


def difference_interval(counts: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the first row's share of survivors minus the second's, also for shares of 0 and 1.

    Source: Newcombe (1998), Statistics in Medicine 17:873, method 10 (from Wilson's intervals).
    """
    from scipy.stats import binomtest

    (p1, low1, high1), (p2, low2, high2) = (
        (k / n, *binomtest(int(k), int(n)).proportion_ci(confidence, method="wilson"))
        for k, n in zip(counts[:, 0], counts.sum(1), strict=True)
    )
    below, above = np.hypot(p1 - low1, high2 - p2), np.hypot(high1 - p1, p2 - low2)
    return float(p1 - p2 - below), float(p1 - p2 + above)


def _statement(found: dict[str, Any]) -> str:
    """The finding, how it holds up within hosts, and what follows."""
    member, candidate = (found["pools"][side] for side in SIDES)
    facts = (
        f"{member['share']:.1%} of {member['rows']} members and {candidate['share']:.1%} of {candidate['rows']} "
        f"candidates have a usable image ({_in_words(found['overall'])}; AUC {found['auc']:.3f}, "
        f"{found['confidence']:.0%} interval {found['auc_ci_low']:.3f} to {found['auc_ci_high']:.3f})."
    )
    if not found["predicts"]:
        return f"No evidence that survival predicts membership: {facts} The losses cost rows; a bias is not seen."
    host = found["within"]["host"]
    if host["p_value"] is None:
        within = "No host has both sides with losses, so a difference between hosts and one within them look alike."
    elif host["p_value"] < found["level"]:
        within = f"The sides differ on the same host, too ({_in_words(host)} in {host['rows']} rows)."
    else:
        within = (
            f"On the same host no difference is seen ({_in_words(host)} in {host['rows']} rows): "
            "the sides were taken from different hosts."
        )
    return (
        f"Survival predicts membership: {facts} {within} What is left of either side is a biased sample of its pool: "
        "trust an attack only as far as it beats the blind baselines on these rows, and compare with another study "
        "only on the same list of image hashes."
    )


def _in_words(odds: dict[str, Any]) -> str:
    p_value = "p < 0.0001" if odds["p_value"] < 1e-4 else f"p = {odds['p_value']:.4f}"
    return p_value if odds["odds_ratio"] is None else f"odds ratio {odds['odds_ratio']:.2f}, {p_value}"
