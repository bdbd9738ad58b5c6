"""Costs of attacks by hand, and what an attack's advantage over its twin without the caption is put down to."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from mia import attacks, figures, lineup, settings, summary, tables, walks
from mia.cli import common, passes, report
from mia.config import FeaturesOptions

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
    """At the defaults, where nothing is known of the run."""
    found = lineup._about(attack, variant, types.SimpleNamespace(field={}, jobs={}, has_null=True))
    assert found[:2] == (access, labels) and found[2] == (None if cost is None else pytest.approx(cost))


# A run of 2 draws, 4 gradient timesteps, 2 pictures of 10 steps and 4 variations.
RUN = FeaturesOptions(
    settings=tuple(settings.SETTINGS), probes=(*walks.PROBES, *walks.PASSES), draws=2, generations=2,
    generation_steps=10, variations=4, gradient_timesteps=(101, 301, 501, 701),
)  # fmt: skip


@pytest.mark.parametrize(
    ("attack", "variant", "has_null", "cost"),
    [
        ("fsca", "all", True, 2 * 10 * 2 + 2 * DECODE),  # not 64 pictures of 50 guided steps
        ("fsca", "all", False, 2 * 10 + 2 * DECODE),  # no guidance without an empty prompt
        ("pang", "mean", True, 2 * 10 * 2 + 2 * DECODE),
        ("blind_pair", "pair", True, 0),
        ("rediffuse", "ssim@050", True, 4 + 4 * (DECODE + ENCODE)),
        ("gsa1", "all", True, 4 + 4 * 2 + ENCODE),
        ("gradient_masking", "masked@101", True, 8 + 4 + ENCODE),  # to the input only: one forward's work
        ("noise_optimisation", "loss@101", True, 6 + 5 + ENCODE),
        ("loss", "mean", True, 15 * 2 + ENCODE),
        ("frequency_low", "low@101", True, 15 * 2 + ENCODE),
        ("denoising_loss", "l2@101", True, 2 + ENCODE),
        ("memorisation", "mean", True, 15 * 2 * 2 + ENCODE),
        ("multiple_loss", "l2@101", True, 10 + ENCODE),  # one draw, always
        ("secmi", "error@140", True, 16 + ENCODE),
        ("clid", "threshold", True, 15 + ENCODE),
        ("baseline_loss_threshold", "latent_error@301", True, 2 * 2 + ENCODE),
        ("baseline_loss_threshold", "latent_error@301", False, 2 + ENCODE),
        ("partial_denoising", "pixel_error@051", True, 2 * (52 + 26 * DECODE) + ENCODE),
    ],
)
def test_costs_are_those_of_the_run(attack, variant, has_null, cost):
    """Through the options of its jobs, as they stand in the provenance of its features."""
    jobs = walks.jobs(RUN)
    field = {name: passes.as_run(about, jobs, has_null) for name, about in attacks.REGISTRY.items()}
    run = types.SimpleNamespace(field=field, jobs=jobs, has_null=has_null)
    assert lineup._about(attack, variant, run)[2] == pytest.approx(cost)


def test_a_classifier_costs_what_all_settings_of_the_run_do():
    """Settings 18 and 13 with 2 draws: one guided timestep; 10 timesteps without guidance; each with a decode."""
    jobs = walks.jobs(FeaturesOptions(settings=(13, 18), probes=("noised", "clean"), draws=2))
    run = types.SimpleNamespace(field={"random_forest": passes.as_run(attacks.REGISTRY["random_forest"], jobs)})
    assert lineup._about("random_forest", "all", run)[2] == pytest.approx(2 * (2 + 10) + 2 * 11 * DECODE + ENCODE)


def test_options_of_the_run_are_read_off_its_features(tmp_path):
    kinds = {f.name: f.type for f in tables.SCHEMAS["features"]} | {"bands": pa.list_(pa.float64(), tables.bands(4))}
    empty = pa.table({column: pa.array([], kind) for column, kind in kinds.items()})
    for job, options in walks.jobs(RUN).items():
        for shard in (0, 1):
            made = common.made_by("features", options, 7, [], has_null=job != "clean")
            tables.write(tmp_path / job / f"{shard}.parquet", empty, "features", made)
    assert report._jobs(tmp_path) == (walks.jobs(RUN), False)
    assert report._jobs(tmp_path / "nothing") == ({}, True)


def test_of_many_pictures_pang_and_wang_look_at_three():
    jobs = walks.jobs(FeaturesOptions(probes=("generations",), generations=64, generation_steps=10))
    pictures = [passes.as_run(attacks.REGISTRY[name], jobs).decodes for name in ("pang", "pang_classifier", "fsca")]
    assert pictures == [3, 3, 64]


def test_what_was_not_run_costs_what_its_defaults_do():
    """And under the default options every attack costs what the registry says."""
    usual = dataclasses.replace(
        RUN,
        **{
            n: getattr(FeaturesOptions(), n)
            for n in ("draws", "generations", "variations", "generation_steps", "gradient_timesteps")
        },
    )
    for name, attack in attacks.REGISTRY.items():
        assert passes.as_run(attack, {}).unet_rows == attack.unet_rows
        of_settings = attack.unet_rows is None
        assert of_settings or passes.as_run(attack, walks.jobs(usual)) == attack, name


def results(gains: dict[str, float], caption_low: float | None = 0.45) -> types.SimpleNamespace:
    """400 test samples, attacks and their twins that tell members less by `gains`, and a caption baseline."""
    generator, member = np.random.default_rng(0), np.arange(400) % 2 == 0
    ids = [f"{i:032x}" for i in range(400)]
    noise = generator.normal(size=400)
    names = {name + suffix: shift for name, gain in gains.items()
             for suffix, shift in (("", 1.0), (attacks.TWIN, 1.0 - gain))}  # fmt: skip
    scores = [
        pl.DataFrame({"sample_id": ids, "attack": name, "variant": "v", "score": member * shift + noise})
        for name, shift in names.items()
    ]
    metrics = pl.DataFrame([{"attack": name, "variant": "v", "method": "holdout", "part": "test"} for name in names])
    blind = {"attack": "blind_caption", "method": "holdout", "part": "test", "metric": "auc", "ci_low": caption_low}
    dataset = pl.DataFrame({"sample_id": ids, "member": member, "group": ids, "part": "test"})
    main = types.SimpleNamespace(scores=pl.concat(scores), metrics=metrics)
    return types.SimpleNamespace(main=main, datasets={"attacked": dataset}, audits={"attacked": pl.DataFrame([blind])})


def test_an_advantage_with_the_caption_is_put_down_to_it():
    def said(gain, caption_low):
        found = results({"pia": gain}, caption_low)
        return lineup._caption_gain("pia", lineup._gains(found)["pia"], found)

    assert said(0.9, 0.45) == lineup.CAPTION
    assert said(0.9, 0.55) == lineup.CAPTION_SHIFT
    assert said(0.0, 0.55) == lineup.NO_GAIN
    assert said(-0.9, 0.55) == lineup.NO_GAIN  # better without it


def test_gains_are_held_to_a_level_for_all_pairs_together(monkeypatch):
    """A gain with p = .01 is one where a single pair was tested, and none as the best of eight."""
    paired = [name for name, attack in attacks.REGISTRY.items() if attack.paired][:8]

    def said(names):
        p = iter([0.01, *[0.3] * 7])
        monkeypatch.setattr(attacks, "caption_driven", lambda *_: (True, 0.1, next(p)))
        found = results(dict.fromkeys(names, 0.1))
        gains = lineup._gains(found)
        assert list(gains) == names
        return [lineup._caption_gain(name, p, found) for name, p in gains.items()]

    assert said(paired[:1]) == [lineup.CAPTION]
    assert said(paired) == [lineup.NO_GAIN] * 8


@pytest.mark.parametrize(
    ("attack", "why"),
    [("clid", attacks.OF_BOTH), ("memorisation", attacks.OF_BOTH), ("random_forest", attacks.OF_SETTINGS),
     ("baseline_loss_threshold", attacks.OF_SETTINGS), ("gsa1", attacks.OF_GRADIENTS), ("pang", attacks.OF_PICTURES),
     ("blind_pair", "no model enters it"), ("pia", lineup.NO_PROMPT)],
)  # fmt: skip
def test_where_there_is_no_twin_it_is_said_why(attack, why):
    """A blank would pass for a caption that plays no part."""
    assert lineup._caption_gain(attack, None, results({"sima": 0.0})) == f"no twin: {why}"


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
