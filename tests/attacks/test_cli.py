"""`mia scores` with attacks on evidence and `mia list-attacks`: from files to a table, and what can go wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mia import attacks, tables, walks
from mia.__main__ import main
from mia.attacks.evidence import Evidence
from mia.cli import common
from mia.cli.attacks import MAY_DIFFER
from mia.config import FeaturesOptions
from tests.attacks.world import arrow, memorising_world, rows_of

WORLD, MEMBER = memorising_world(n=120)
ROWS = rows_of(WORLD)


@pytest.fixture
def mia(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mia", *(str(word) for word in words)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "clean.parquet", ("clean", "pia", "pian", "secmi"))
    write(tmp_path / "noised.parquet", ("noised", "prompt", "stepback", "aggregation"))
    ids, n = WORLD.ids, len(WORLD.ids)
    part = np.where(np.arange(n) % 2 == 0, "calibration", "test")
    dataset = pa.table([ids, ids, ids, ids, MEMBER, ids, part, np.ones(n)], schema=tables.SCHEMAS["dataset"])
    tables.write(tmp_path / "dataset.parquet", dataset, "dataset", {})
    return tmp_path


def write(path, starts, **made):
    """Features as the engine leaves them: one file for each job."""
    table = arrow([row for row in ROWS if row["block"].startswith(starts)])
    made = {"unet": "abc", "seed": 0, "latent_shape": list(WORLD.shape)} | made
    pq.write_table(table.replace_schema_metadata({tables.PROVENANCE_KEY: json.dumps(made).encode()}), path)


def words(folder, names, *files):
    features = [w for file in files for w in ("--features", folder / file)]
    common = ("--dataset", folder / "dataset.parquet", "--settings", "18", "--folds", 3, "--attacks", names)
    return ["scores", *features, *common, "--output", folder / "s.parquet"]


def test_files_become_scores(mia, folder):
    both = ("noised.parquet", "clean.parquet")
    assert mia(*words(folder, "secmi,pia,clid,loss", *both)) == (0, "", "")
    found = pl.DataFrame(pl.from_arrow(tables.read(folder / "s.parquet", "scores")))
    assert set(found["attack"]) == {"secmi", "secmi_null", "pia", "pia_null", "clid", "loss", "loss_null"}
    direct = {(a, v): s for a, v, s in attacks.run("secmi", Evidence([arrow(ROWS)], WORLD.shape))}
    stored = found.filter(attack="secmi", variant="error@140").sort("sample_id")["score"].to_numpy()
    np.testing.assert_array_equal(stored, direct["secmi", "error@140"])
    assert mia(*words(folder, "loss,clid,pia,secmi", *both[::-1]))[0] == 0
    again = pl.DataFrame(pl.from_arrow(tables.read(folder / "s.parquet", "scores")))
    assert again.equals(found)


@pytest.mark.parametrize(
    ("names", "files", "said"),
    [
        ("pfami", ("clean.parquet", "noised.parquet"),
         "block 'crop-82' was not extracted, features, run `mia features --block crops --probes crops --crops 82`"),
        ("loss", ("clean.parquet",), "block 'noised' was not extracted"),
        ("secm", ("clean.parquet",), "unknown value 'secm'; use 'secmi' or 'secmi_nn' or 'sima'"),
        ("loss_threshold", ("clean.parquet",), "setting 18 was not extracted"),
        ("secmi", ("none.parquet",), "features do not say the shape of their latents"),
        ("secmi", ("clean.parquet", "clean.parquet"), "rows of block 'secmi' stand twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_ends_with_one_line(mia, folder, names, files, said):
    write(folder / "none.parquet", ("noised",), latent_shape=None)
    code, out, err = mia(*words(folder, names, *files))
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")
    assert said in err, err


def job(name: str, **changed) -> dict:
    """The options of a job as its features' provenance has them."""
    chosen = FeaturesOptions(
        settings=(18, 3, 4), draws=3,
        probes=("noised", "clean", "crops", "gsa", "generations", "variations"),
    )  # fmt: skip
    return dataclasses.asdict(walks.jobs(dataclasses.replace(chosen, **changed))[name])


# Each fact: a job that looks at it, another value of it, and as what it stands in the file.
OPTION_FACTS = [
    ("noised", "draws", 2), ("noised", "timesteps", "committed"), ("noised", "posterior", "sample"),
    ("noised", "dtype", "bfloat16"), ("noised", "tf32", True), ("crops", "posterior", "sample"),
    ("crops", "crops", (75,)), ("start-300", "latent_shift_index", 5), ("start-300", "latent_shift_by", 0.5),
    ("start-300-text-0.1", "text_shift_scale", 2.0), ("gradients", "gradient_timesteps", (1, 501)),
    ("variations", "variations", 2), ("generations", "generations", 2), ("generations", "generation_steps", 10),
    ("generations", "service", "https://example.org"), ("clean", "tf32", True),
]  # fmt: skip
MODEL_FACTS = [
    ("unet", "xyz"), ("encoders", "xyz"), ("seed", 1), ("latent_shape", [4, 64, 64]), ("version", 1),
    ("encoder", "xyz"),
]  # fmt: skip


def test_every_fact_is_among_those_tried():
    compared = {field.name for field in dataclasses.fields(FeaturesOptions)} - MAY_DIFFER
    assert compared == {name for _, name, _ in OPTION_FACTS}
    assert all(name in walks.looks_at(common.features_options({"options": job(of)})) for of, name, _ in OPTION_FACTS)


def refused(mia, folder, fact):
    code, out, err = mia(*words(folder, "secmi", "clean.parquet", "a.parquet", "b.parquet"))
    assert code == 2 and out == "" and len(err.splitlines()) == 1, err
    assert err.startswith(f"error: features differ in {fact}: ") and "b.parquet, give one target's features" in err
    assert not (folder / "s.parquet").exists()


@pytest.mark.parametrize(("of", "fact", "other"), OPTION_FACTS)
def test_shards_read_under_other_options_are_refused(mia, folder, of, fact, other):
    write(folder / "a.parquet", ("noised",), options=job(of))
    write(folder / "b.parquet", ("noised",), options=job(of, **{fact: other}))
    write(folder / "clean.parquet", ("clean",), options=job("clean"))
    refused(mia, folder, fact)


@pytest.mark.parametrize(("fact", "other"), MODEL_FACTS)
def test_features_of_another_model_are_refused(mia, folder, fact, other):
    known = {"encoder": "abc", "encoders": "abc", "version": FeaturesOptions.version}
    for name, more in (("clean", {}), ("a", {}), ("b", {fact: other})):
        write(folder / f"{name}.parquet", (name,), **known | more)
    refused(mia, folder, fact)


def test_a_job_that_does_not_look_at_an_option_goes_with_any_value_of_it(mia, folder):
    """Of `posterior: sample` and 3 draws the job of gradients knows nothing, nor that of pictures."""
    of = {"posterior": "sample", "gradient_timesteps": (1, 501)}
    for name in ("clean", "noised", "gradients", "variations"):
        write(folder / f"{name}.parquet", (name, "secmi") if name == "clean" else (name,), options=job(name, **of))
    made = tables.provenance(folder / "gradients.parquet")["options"]
    assert (made["posterior"], made["draws"]) == ("mode", FeaturesOptions().draws)
    files = ("clean.parquet", "noised.parquet", "gradients.parquet", "variations.parquet")
    assert mia(*words(folder, "secmi,loss", *files)) == (0, "", "")


def test_the_list_is_aligned_and_whole(mia):
    code, out, err = mia("list-attacks")
    lines = out.splitlines()
    assert (code, err) == (0, "") and len(lines) == 1 + len(attacks.REGISTRY) + 1
    at = lines[0].index("access")
    assert "5 draws, crops of 82 %, 10 variations, 3 generations (FSCA's authors: 64) of 50 steps" in lines[-1]
    for line, attack in zip(lines[1:-1], attacks.REGISTRY.values(), strict=True):
        assert line.split()[0].removesuffix("[_null]") == attack.name
        assert line[at:].split()[0] == attack.access and attack.paper in line


def costs(text, name):
    """Rows, decodes and encodes that the list prints."""
    return next([int(n) for n in re.findall(r" (\d+)(?= )", line)[:3]] for line in text.splitlines() if name in line)


def test_the_list_and_the_plan_agree_at_the_same_options(mia):
    more = ("--generations", 64, "--crops", "70,82,95")
    listed = mia("list-attacks", *more)[1]
    assert costs(mia("list-attacks")[1], "fsca ") == [300, 3, 0]
    assert costs(listed, "fsca ") == [6400, 64, 0] and costs(listed, "pang ") == [300, 3, 0]
    assert costs(listed, "pfami_copymark") == [32, 0, 4] and costs(listed, "pfami_clid") == [16, 0, 2]
    planned = mia("plan", "--settings", "none", "--attacks", "fsca", *more)[1]
    assert re.search(r"for one image +6400 +6400 +64 +64$", planned, re.MULTILINE)
    planned = mia("plan", "--settings", "none", "--attacks", "pfami", *more)[1]
    assert "encodes 4" in planned and re.search(r"crops: crops +24 ", planned)
    assert mia("list-attacks", "--crops", "100")[2].startswith("error: --crops[0]: 100 is greater than 99")
