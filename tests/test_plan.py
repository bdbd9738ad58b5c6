"""The plan's counts, held to those counted by hand in the specification (`performance.md` B), and its command."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
from click.testing import CliRunner

from mia import attacks, plan, settings, walks
from mia.attacks import evidence
from mia.cli import commands, passes
from mia.config import FeaturesOptions
from mia.errors import UserError
from mia.walks import Counts

# Setting -> rows and decodes alone (5 draws), and distinct ones that it adds to those before it (one draw).
COUNTED = {
    1: (260, 130, 52, 26), 2: (260, 130, 52, 26), 3: (260, 130, 26, 13), 4: (260, 130, 52, 26), 5: (260, 130, 52, 26),
    6: (260, 130, 52, 26), 7: (100, 50, 20, 10), 8: (100, 50, 20, 10), 9: (100, 50, 20, 10), 10: (100, 50, 20, 10),
    11: (30, 15, 6, 3), 12: (100, 50, 20, 10), 13: (50, 50, 9, 10), 14: (100, 50, 14, 9), 15: (100, 50, 18, 10),
    16: (100, 50, 14, 10), 17: (500, 250, 60, 50), 18: (10, 5, 0, 0),
}  # fmt: skip
ALL = FeaturesOptions(settings=tuple(settings.SETTINGS))
GREY = FeaturesOptions(settings=(), probes=tuple(walks.PROBES))


def test_all_settings_cost_what_was_counted():
    found = plan.plan(ALL)
    mine = {
        int(line.name[:2]): (line.alone.unet_rows, line.alone.decodes, line.new.unet_rows // 5, line.new.decodes // 5)
        for line in found.lines
    }
    assert mine == COUNTED
    assert found.total == Counts(507 * 5, 285 * 5)
    assert sum((line.alone for line in found.lines), Counts()) == Counts(2950, 1500)
    assert found.tflop == pytest.approx(5621, abs=1)  # for one image, all 18 with shared work


def test_the_published_settings_cost_what_was_counted():
    published = dataclasses.replace(ALL, settings=tuple(n for n in ALL.settings if n != 17))
    assert plan.plan(published).total == Counts(447 * 5, 236 * 5)
    without = dataclasses.replace(published, losses=("model_loss", "latent_error"))
    assert plan.plan(without).tflop == pytest.approx(1796, abs=1)
    assert plan.plan(without).total.decodes == 0
    least = FeaturesOptions(settings=(2, 16, 18), losses=("model_loss",))
    assert plan.plan(least).total == Counts(33 * 5, 0)  # one forward for each distinct timestep and draw
    assert plan.plan(least).tflop == pytest.approx(133.7, abs=0.1)


@pytest.mark.parametrize("numbers", [ALL.settings[::-1], (17, 3, 18, 1), (14, 12, 7)])
def test_the_order_of_the_settings_changes_no_total(numbers):
    some = dataclasses.replace(ALL, settings=numbers)
    assert plan.plan(some).total == plan.plan(dataclasses.replace(some, settings=tuple(sorted(numbers)))).total


def test_all_grey_box_probes_cost_at_most_260_rows_and_two_encodes():
    found = plan.plan(GREY)
    assert found.total.unet_rows == 259 and found.total.decodes == 0 and found.encodes == 2
    # 20 clean timesteps, 5 of PIA, 1 of PIAN, 15 more of SecMI, each under two texts
    assert walks.planned(walks.jobs(GREY)["clean"]).unet_rows == 2 * (20 + 5 + 1 + 15)
    # 15 timesteps, 5 draws, two texts; one step on for CopyMark's SecMI, four more for the aggregation
    assert walks.planned(walks.jobs(GREY)["noised"]).unet_rows == 2 * (15 * 5 + 1 + 4)


def test_a_probe_costs_only_its_own_difference():
    base = dataclasses.replace(GREY, probes=("noised", "clean"))
    more = {
        name: plan.plan(dataclasses.replace(base, probes=(*base.probes, name))).total.unet_rows
        - plan.plan(base).total.unet_rows
        for name in walks.PROBES
    }
    assert more == {
        "noised": 0, "clean": 0, "stepback": 2, "aggregation": 8, "pia": 10, "pian": 2, "secmi": 30, "prompts": 9,
        "crops": 8,
    }  # fmt: skip


def test_probes_are_the_same_in_the_registry_in_the_walks_and_in_what_errors_advise():
    assert set(attacks.PROBES) - {"settings"} == set(walks.PROBES) | set(walks.PASSES)
    for name, blocks in attacks.PROBES.items():
        for block in blocks if name != "settings" else ():
            advised = evidence.command(block.replace("*", "1"))
            crop = " --crops 1" if name == "crops" else ""
            assert advised == f"mia features --block {walks.job_of(name)} --probes {name}{crop}"


@pytest.mark.parametrize("name", [name for name, attack in attacks.REGISTRY.items() if attack.unet_rows is not None])
@pytest.mark.parametrize("more", [{}, {"draws": 2, "crops": (70, 80, 90), "generations": 64, "variations": 4}])
def test_an_attacks_stated_cost_is_what_is_planned_of_its_probes_where_it_reads_them(name, more, monkeypatch):
    """At the registry's defaults and at a run's options; probes are cut to the timesteps and draws that it reads."""
    attack = attacks.REGISTRY[name]
    options = FeaturesOptions(settings=(), probes=attack.probes, **more)
    stated = passes.as_run(attack, walks.jobs(options))
    assert more or stated == attack
    monkeypatch.setattr(walks, "GRID", read_of_grid(attack))
    if name == "quantile_regression":
        monkeypatch.setattr(walks, "CLEAN_TIMESTEPS", walks.CLEAN_TIMESTEPS[:1])  # of the latent alone
    read = dataclasses.replace(
        options,
        draws=options.draws if attack.every_draw else 1,
        crops=options.crops if attack.every_crop else options.crops[:1],
        generations=min(options.generations, attack.pictures or options.generations),
    )
    work = passes.planned(read)
    found = plan.plan(read, *work)
    if name == "blind_pair":  # reads what the others' pictures are compared with
        assert (stated.unet_rows, stated.decodes, stated.backwards) == (0, 0, 0)
        return
    assert (stated.unet_rows, stated.decodes) == (found.total.unet_rows, found.total.decodes)
    assert (stated.backwards, stated.to_weights * stated.backwards) == (found.backwards, found.to_weights)
    assert stated.encodes == found.encodes - (attack.access == "black")  # which asks with the image itself


def read_of_grid(attack: attacks.Attack) -> tuple[int, ...]:
    """The timesteps of the noised grid that an attack reads: those of its options, the crops', or all."""
    if "crops" in attack.probes:
        return walks.CROP_TIMESTEPS
    options = importlib.import_module(f"mia.attacks.{attack.module}").Options(**attack.options)
    return getattr(options, "timesteps", ()) or walks.GRID


def test_the_pictures_that_an_attack_looks_at_are_its_modules():
    for attack in attacks.REGISTRY.values():
        if attack.module:
            options = importlib.import_module(f"mia.attacks.{attack.module}").Options(**attack.options)
            assert attack.pictures == getattr(options, "images", 0), attack.name


@pytest.mark.parametrize("name", [name for name, attack in attacks.REGISTRY.items() if attack.every_draw])
def test_an_attack_of_every_draw_costs_what_the_plan_says_for_any_number_of_them(name):
    """`denoising_loss` reads one of the grid's 15 timesteps."""
    few = FeaturesOptions(settings=(), probes=attacks.REGISTRY[name].probes, draws=3)
    rows = passes.as_run(attacks.REGISTRY[name], walks.jobs(few)).unet_rows
    assert rows * (15 if name == "denoising_loss" else 1) == plan.plan(few).total.unet_rows


@pytest.mark.parametrize(
    ("probes", "forwards"),
    [  # backward passes to the input cost a forward, those that go on to the weights two
        (("gsa",), 10 + 2 * 10), (("gradient_masking",), 20 + 10), (("noise_optimisation",), 6 + 5),
        (("gsa", "gradient_masking"), 20 + 2 * 10), (("gsa", "gradient_masking", "noise_optimisation"), 26 + 20 + 5),
    ],
)  # fmt: skip
def test_backward_passes_are_converted_by_what_they_go_to(probes, forwards):
    """As the table of `docs/expensive_attacks.md` has it."""
    options = FeaturesOptions(settings=(), probes=probes)
    found = plan.plan(options, *passes.planned(options))
    assert found.tflop == pytest.approx(forwards * plan.UNET_TFLOP + plan.ENCODE_TFLOP + plan.TEXT_TFLOP)


def test_a_setting_on_timesteps_already_visited_costs_no_row():
    grid = FeaturesOptions(settings=(), probes=("noised",), losses=("model_loss",))
    both = dataclasses.replace(grid, settings=(16, 18))  # their timesteps are all of the grid's
    assert plan.plan(both).total == plan.plan(grid).total


def test_without_an_empty_prompt_there_is_half_the_work():
    assert walks.planned(GREY, has_null=False).unet_rows < walks.planned(GREY).unet_rows
    full = dataclasses.replace(ALL, settings=(7,))
    assert walks.planned(full, has_null=False) == Counts(50, 50)


def test_a_setting_that_walks_nothing_is_refused():
    with pytest.raises(UserError, match="setting 7 has no timesteps as committed"):
        plan.plan(dataclasses.replace(ALL, timesteps="committed"))
    with pytest.raises(UserError, match="unknown probe 'piano'"):
        plan.plan(dataclasses.replace(GREY, probes=("piano",)))


def test_ten_thousand_images_write_150_mb():
    """The published settings walk 250 timesteps; each holds 3 losses of 4 bytes for each of 5 draws."""
    published = dataclasses.replace(ALL, settings=tuple(n for n in ALL.settings if n != 17))
    assert 10_000 * plan.plan(published).values == 150_000_000
    assert 10_000 * plan.plan(ALL).values == 180_000_000  # setting 17 has 50 timesteps more
    assert plan.plan(GREY).values == (259 // 2) * 30 * 8  # of a probe's reading 30 sums, both texts in one row


def told(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(commands, ["plan", *words])
    return found.exit_code, found.output


def test_the_command_prints_counts_and_cost():
    code, text = told("--settings", "18,reversed_noising", "--losses", "model_loss", "--images", "1000")
    assert code == 0
    assert text.splitlines()[-1].startswith("0 MB")
    assert "16 reversed_noising" in text and "0.04 EFLOP" in text
