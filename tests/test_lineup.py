"""Costs of attacks by hand, and what an attack's advantage over its twin without the caption is put down to."""

from __future__ import annotations

import types

import numpy as np
import polars as pl
import pytest

from mia import attacks, figures, lineup, summary

ENCODE, DECODE = 1.11666 / 0.80327, 2.51452 / 0.80327


@pytest.mark.parametrize(
    ("attack", "variant", "access", "labels", "cost"),
    [
        ("baseline_loss_threshold", "model_loss@301", "grey", False, 5 + ENCODE),  # one row for each of 5 draws
        ("baseline_loss_threshold", "latent_error@301", "grey", False, 10 + ENCODE),  # and the empty prompt
        ("partial_denoising", "pixel_error@051", "grey", False, 260 + 130 * DECODE + ENCODE),
        ("secmi", "error@140", "grey", False, 16 + ENCODE),  # its twin is not counted
        ("pfami", "mean", "grey", False, 8 + 2 * ENCODE),
        ("gsa1", "all", "white", True, 10 + 10 * 2 + ENCODE),
        ("rediffuse", "ssim@050", "black", False, 10 + 10 * (DECODE + ENCODE)),
        ("random_forest", "all", "grey", True, None),
        ("unheard_of", "x", "grey", False, None),
    ],
)
def test_costs_by_hand(attack, variant, access, labels, cost):
    found = lineup._about(attack, variant)
    assert found[:2] == (access, labels) and found[2] == (None if cost is None else pytest.approx(cost))


def results(gain: float, caption_low: float | None) -> types.SimpleNamespace:
    """200 test samples, an attack and its twin that tells members less by `gain`, and a caption baseline."""
    generator, member = np.random.default_rng(0), np.arange(200) % 2 == 0
    ids = [f"{i:032x}" for i in range(200)]
    noise = generator.normal(size=200)
    scores = [
        pl.DataFrame({"sample_id": ids, "attack": name, "variant": "v", "score": member * shift + noise})
        for name, shift in (("pia", 1.0), ("pia" + attacks.TWIN, 1.0 - gain))
    ]
    metrics = pl.DataFrame(
        [
            {"attack": name, "variant": "v", "method": "holdout", "part": "test"}
            for name in ("pia", "pia" + attacks.TWIN)
        ]
    )
    blind = {"attack": "blind_caption", "method": "holdout", "part": "test", "metric": "auc", "ci_low": caption_low}
    dataset = pl.DataFrame({"sample_id": ids, "member": member, "group": ids, "part": "test"})
    main = types.SimpleNamespace(scores=pl.concat(scores), metrics=metrics)
    return types.SimpleNamespace(main=main, datasets={"attacked": dataset}, audits={"attacked": pl.DataFrame([blind])})


def test_an_advantage_with_the_caption_is_put_down_to_it():
    assert lineup._driven(results(0.9, 0.45), "pia") == lineup.CAPTION
    assert lineup._driven(results(0.9, 0.55), "pia") == lineup.CAPTION_SHIFT
    assert lineup._driven(results(0.0, 0.55), "pia") is None
    assert lineup._driven(results(-0.9, 0.55), "pia") is None  # better without it
    assert lineup._driven(results(0.9, 0.55), "sima") is None  # no twin was scored


def test_the_figure_of_costs_numbers_every_attack():
    rows = [
        {"number": k, "attack": name, "access": access, "labels": k == 2, "cost": 10.0**k, "value": 0.1 * k,
         "ci_low": 0.05, "ci_high": 0.1 * k + 0.1}
        for k, (name, access) in enumerate((("pia", "grey"), ("gsa1", "white"), ("fsca", "black")), 1)
    ]  # fmt: skip
    figure = figures.costs(rows, {"Best blind baseline": 0.03}, 0.01)
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [w for w in words if w.isdigit()] == ["3", "1", "2"]  # black, grey, white
    assert any("1  PIA" in w and "2  GSA1*" in w for w in words) and any("3  FSCA" in w for w in words)
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["Best blind baseline", "Chance"]


def test_names_are_printed_as_their_papers_print_them():
    assert summary.attack_label("secmi_null") == "SecMI, empty prompt"
    assert summary.attack_label("clid_null") == "CLiD, empty prompt"  # an attack of its own, no twin
    assert summary.attack_label("noise_aggregation") == "Noise aggregation"
