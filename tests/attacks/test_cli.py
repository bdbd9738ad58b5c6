"""`mia scores` with attacks on evidence and `mia list-attacks`: from files to a table, and what can go wrong."""

from __future__ import annotations

import json
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mia import attacks, tables
from mia.__main__ import main
from mia.attacks.evidence import Evidence
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
         "block 'crop-82' was not extracted, features, run `mia features --block crops --probes crops`"),
        ("loss", ("clean.parquet",), "block 'noised' was not extracted"),
        ("secm", ("clean.parquet",), "unknown value 'secm'; use 'secmi' or 'secmi_nn' or 'sima'"),
        ("loss_threshold", ("clean.parquet",), "setting 18 was not extracted"),
        ("secmi", ("clean.parquet", "other.parquet"), "features differ in unet: abc and xyz"),
        ("secmi", ("clean.parquet", "seed.parquet"), "features differ in seed: 0 and 1"),
        ("secmi", ("clean.parquet", "shape.parquet"), "features differ in latent_shape"),
        ("secmi", ("none.parquet",), "features do not say the shape of their latents"),
        ("secmi", ("clean.parquet", "clean.parquet"), "rows of block 'secmi' stand twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_ends_with_one_line(mia, folder, names, files, said):
    write(folder / "other.parquet", ("noised",), unet="xyz")
    write(folder / "seed.parquet", ("noised",), seed=1)
    write(folder / "shape.parquet", ("noised",), latent_shape=[4, 64, 64])
    write(folder / "none.parquet", ("noised",), latent_shape=None)
    code, out, err = mia(*words(folder, names, *files))
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")
    assert said in err, err


def test_the_list_is_aligned_and_whole(mia):
    code, out, err = mia("list-attacks")
    lines = out.splitlines()
    assert (code, err) == (0, "") and len(lines) == 1 + len(attacks.REGISTRY)
    at = lines[0].index("access")
    for line, attack in zip(lines[1:], attacks.REGISTRY.values(), strict=True):
        assert line.split()[0].removesuffix("[_null]") == attack.name
        assert line[at:].split()[0] == attack.access and attack.paper in line
