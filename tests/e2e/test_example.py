"""What a finished `make demo` must have found: who finds the members, who cannot and why, and controls at chance.

Reads results/example; where there is none, only the lists are tested. Everything is seeded, so this passes always or
never.
"""

from __future__ import annotations

import polars as pl
import pytest

from mia import attacks, classifiers
from tests.conftest import ROOT

EXAMPLE = ROOT / "results/example/evaluation"
finished = pytest.mark.skipif(not (EXAMPLE / "memorised.parquet").is_file(), reason="no finished `make demo`")

SETTINGS = ("baseline_loss_threshold", "partial_denoising", "reversed_noising", "reversed_noising_regular_cfg")
FIND = {
    *SETTINGS, *classifiers.LEARNERS, "loss", "denoising_loss", "multiple_loss", "summed_loss", "secmi", "secmi_nn",
    "pia", "pfami", "pfami_copymark", "pfami_clid", "pfami_sima", "sima", "sima_mc", "clid", "clid_vector", "clid_null",
    "frequency_low", "frequency_high", "gsa1", "gsa2", "gradient_masking", "noise_optimisation", "pang",
    "pang_classifier", "fsca", "fsca_model",
}  # fmt: skip
# Why each of these does not, with numbers, stands in its card in docs/attacks.md, under "On the example".
DO_NOT = {
    "secmi_copymark", "pian", "noise_aggregation", "quantile_regression", "memorisation", "rediffuse", "blind_pair",
}  # fmt: skip


def areas(target: str) -> pl.DataFrame:
    """The AUC of each attack, chosen on calibration, on the test part; intervals of a target hold jointly at 95 %."""
    rows = pl.read_parquet(EXAMPLE / f"{target}.parquet")
    return rows.filter(pl.col("metric") == "auc", pl.col("part") == "test", pl.col("method") == "holdout")


def test_every_attack_is_expected_to_find_or_not_to():
    assert not FIND & DO_NOT
    assert (FIND - set(SETTINGS)) | DO_NOT | {"loss_threshold"} == set(attacks.REGISTRY)


@finished
def test_the_memorising_checkpoint_is_found_out():
    above = areas("memorised").filter(pl.col("ci_low") > 0.5)["attack"].to_list()
    assert sorted(FIND - set(above)) == []
    assert sorted(DO_NOT & set(above)) == []  # one that now does: say so above and in its card


@finished
@pytest.mark.parametrize("control", ["neither", "untrained"])
def test_controls_stay_at_chance(control):
    """Joint intervals: with 95 % none of them leaves chance."""
    found = areas(control)
    assert len(found) > 10
    left = found.filter((pl.col("ci_low") > 0.5) | (pl.col("ci_high") < 0.5))
    assert left["attack"].to_list() == []
