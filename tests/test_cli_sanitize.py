"""The command sanitize on two tables of one's own: what stays, what the report says, and what it refuses."""

from __future__ import annotations

import json
import pathlib

import polars as pl
import pytest

from tests.test_cli import mia, refused  # noqa: F401 - a fixture
from tests.test_cli_audit import side

METHODS = ("matched", "none")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """m.parquet, in which two fifths of the captions is marked, and n.parquet, in which none is."""
    for name, leak in (("m", 0.4), ("n", 0.0)):
        side(name, 300, leak=leak).drop("loss", "norm").write_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


def words(folder: pathlib.Path, *more: object) -> tuple:
    paths = ("--members", folder / "m.parquet", "--nonmembers", folder / "n.parquet", "--output-dir", folder / "out")
    return ("sanitize", *paths, *more)


def test_matched_takes_the_leak_out_and_says_what_it_did(mia, folder):  # noqa: F811
    assert mia(*words(folder, "--min-keep", "0.5"))[0] == 0
    members, nonmembers = (pl.read_parquet(folder / "out" / f"{name}.parquet") for name in ("members", "nonmembers"))
    report = json.loads((folder / "out" / "report.json").read_text())
    assert len(members) == len(nonmembers) == report["kept"]["members"] == report["kept"]["nonmembers"] >= 150
    assert members.columns == pl.read_parquet(folder / "m.parquet").columns
    assert members["caption"].str.contains("watercolour").mean() < 0.1
    for name, rows in (("members", members), ("nonmembers", nonmembers)):
        assert len(rows) + sum(report["dropped"][name].values()) == 300
    before, after = (
        {row["variant"]: row["auc"] for row in report[f"audit_{when}"] if row["attack"] == "blind_caption"}
        for when in ("before", "after")
    )
    assert before["log_ratio"] > 0.65 and after["log_ratio"] < before["log_ratio"] - 0.05
    assert report["method"] == "matched" and report["seed"] == 0 and report["balance"]


def test_the_seed_decides_and_the_order_of_rows_does_not(mia, folder):  # noqa: F811
    def kept() -> list[str]:
        assert mia(*words(folder, "--max-rounds", 2, "--min-keep", "0.5"))[0] == 0
        return sorted(pl.read_parquet(folder / "out" / "members.parquet")["sample_id"].to_list())

    first = kept()
    for name in "mn":
        path = folder / f"{name}.parquet"
        pl.read_parquet(path).sample(fraction=1, shuffle=True, seed=3).write_parquet(path)
    assert kept() == first


def test_method_none_keeps_everything(mia, folder):  # noqa: F811
    assert mia(*words(folder, "--method", "none"))[0] == 0
    assert json.loads((folder / "out" / "report.json").read_text())["kept"] == {"members": 300, "nonmembers": 300}


def test_sanitize_refuses_what_is_no_question(mia, folder):  # noqa: F811
    refused(mia("sanitize", "--members", folder / "m.parquet"), "nothing to sanitize")
    refused(mia(*words(folder, "--metadata", folder / "x.parquet")), "nothing to sanitize")
    for flag in ("--max-rounds", "--chunk"):
        refused(mia(*words(folder, flag, 0)), f"{flag}: 0 is less than 1;")
    refused(mia(*words(folder, "--method", "magic")), "unknown value 'magic'", "matched")
    refused(mia(*words(folder, "--method", "paper")), "method 'paper' needs a text encoder", "--target")
    pl.read_parquet(folder / "m.parquet").drop("caption").write_parquet(folder / "m.parquet")
    refused(mia(*words(folder)), "tables have no column 'caption'")
    assert not (folder / "out").exists()
