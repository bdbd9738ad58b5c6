"""The paper's 18 settings as the specification has them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mia import settings
from mia.errors import UserError
from tests.conftest import SHARED

# Points in the paper's plots, and where each list begins and ends in the order walked.
WALKED = {
    **dict.fromkeys(range(1, 7), (26, 301, 51)), **dict.fromkeys((7, 8, 9, 10, 13, 14), (10, 901, 1)),
    **dict.fromkeys((12, 15, 16), (10, 1, 901)), 11: (3, 201, 1), 17: (50, 981, 1), 18: (1, 301, 301),
}  # fmt: skip


@pytest.mark.parametrize("number", settings.SETTINGS)
def test_the_walk_has_the_points_of_the_papers_plots(number):
    steps = settings.SETTINGS[number].timesteps()
    assert (len(steps), steps[0], steps[-1]) == WALKED[number]
    assert {abs(a - b) for a, b in zip(steps, steps[1:], strict=False)} <= {settings.SETTINGS[number].step}


def test_as_committed_ten_settings_walk_nothing():
    empty = [n for n, of in settings.SETTINGS.items() if not of.timesteps("committed")]
    assert empty == list(range(7, 17))
    assert settings.SETTINGS[1].timesteps("committed")[::25] == (291, 41)
    assert settings.SETTINGS[18].timesteps("committed") == (281,)


def test_settings_agree_with_the_specification():
    file = SHARED / "spec" / "settings.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    rows = json.loads(file.read_text())["settings"]
    assert [row["number"] for row in rows] == list(settings.SETTINGS)
    for row in rows:
        mine = settings.SETTINGS[row["number"]]
        assert list(mine.timesteps()) == row["timesteps"]
        assert list(mine.timesteps("committed")) == row["timesteps_as_committed"]
        stated = {f.name for f in dataclasses.fields(mine)} & row.keys() - {"start_noise_step"}
        for name in stated:
            assert getattr(mine, name) == row[name], (row["number"], name)
        assert mine.start_noise_step == min(row["start_noise_step"], 999)  # 1000, the black box's, is no timestep
        assert mine.text_shift == row.get("text_shift", 0) and mine.latent_shift == ("latent_shift_index" in row)


def test_settings_are_named_by_number_name_or_key():
    assert settings.named("all") == tuple(range(1, 19)) and settings.named("none") == ()
    assert settings.named("18, reversed_noising,embeddings") == (18, 16, 1)
    with pytest.raises(UserError, match="unknown setting 'partial_denoisin', --settings, use partial_denoising"):
        settings.named("partial_denoisin")
    with pytest.raises(UserError, match="unknown setting 19"):
        settings.setting(19)


def test_settings_that_share_an_evaluation_are_one_job():
    jobs: dict[str, list[int]] = {}
    for number, of in settings.SETTINGS.items():
        jobs.setdefault(settings.job_of(of), []).append(number)
    assert jobs == {
        "noised": [2, 16, 17, 18], "start-050": [9], "start-100": [6, 7, 12, 14, 15], "start-300": [1, 3, 10, 11, 13],
        "start-300-text-0.1": [4], "start-300-text-0.5": [5], "start-100-text-0.1": [8],
    }  # fmt: skip
