"""`mia.formats`: one table from Parquet, CSV or named arrays, and what is no table."""

from __future__ import annotations

import pathlib

import numpy as np
import polars as pl
import pytest

from mia import formats
from mia.errors import UserError

IDS = np.array(["b", "a", "c"])


def test_arrays_become_columns_variants_and_means_over_draws(tmp_path):
    losses = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4)
    np.savez(
        tmp_path / "s.npz", sample_id=IDS, member=np.array([True, False, True]), one=np.array([0.5, 1.5, 2.5]),
        noise_loss=losses, norm=np.ones((3, 2)), timesteps=np.array([301, 1]),
    )  # fmt: skip
    found = formats.read(tmp_path / "s.npz")
    assert found.columns == ["sample_id", "member", "one", "noise_loss/301", "noise_loss/001", "norm/301", "norm/001"]
    assert found["sample_id"].to_list() == ["b", "a", "c"] and found["member"].dtype == pl.Boolean
    assert found["noise_loss/301"].to_list() == [1.5, 9.5, 17.5] and found["noise_loss/301"].dtype == pl.Float64


def test_without_names_rows_and_variants_are_numbered(tmp_path):
    np.savez_compressed(tmp_path / "s.npz", member=np.array([True, False]), x=np.zeros((2, 2)))
    found = formats.read(tmp_path / "s.npz")
    assert found.columns == ["sample_id", "member", "x/000", "x/001"]
    assert found["sample_id"].to_list() == ["00000000", "00000001"]


def test_csv_and_parquet_are_read_as_they_are(tmp_path):
    table = pl.DataFrame({"sample_id": ["a", "b"], "member": [True, False], "s": [0.1, 1 / 3]})
    table.write_csv(tmp_path / "s.csv")
    table.write_parquet(tmp_path / "s.parquet")
    assert formats.read(tmp_path / "s.csv").equals(table) and formats.read(tmp_path / "s.parquet").equals(table)


def written(path: pathlib.Path, **arrays: np.ndarray) -> pathlib.Path:
    np.savez(path, allow_pickle=True, **arrays)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "none.npz", "table does not exist"),
        (lambda p: p, "table does not exist"),
        (lambda p: (p / "x.npz", (p / "x.npz").write_text("no"))[0], "cannot be read as npz"),
        (lambda p: (p / "x.parquet", (p / "x.parquet").write_text("no"))[0], "cannot be read as Parquet"),
        (lambda p: (p / "x.csv", (p / "x.csv").write_bytes(b""))[0], "cannot be read as CSV"),
        (lambda p: written(p / "o.npz", x=np.array([{}, {}], dtype=object)), "cannot be read as npz"),
        (lambda p: written(p / "l.npz", x=np.zeros(3), member=np.ones(2, bool)), "arrays differ in length"),
        (
            lambda p: written(p / "t.npz", x=np.zeros((3, 2)), timesteps=np.array([1])),
            "1 timesteps for 2 columns of 'x'",
        ),
        (lambda p: written(p / "s.npz", x=np.float64(3)), "arrays differ in length"),
        (lambda p: written(p / "d.npz", x=np.zeros((3, 2)), timesteps=np.array([1, 1])), "different whole numbers"),
        (lambda p: written(p / "z.npz", x=np.zeros((3, 2)), timesteps=np.int64(1)), "different whole numbers"),
        (lambda p: written(p / "n.npz", x=np.zeros((3, 2, 0))), "arrays differ in length"),
        (lambda p: written(p / "i.npz", x=np.zeros(3), sample_id=np.zeros((3, 2))), "sample_id is no list"),
        (lambda p: (p / "e.npz", (p / "e.npz").write_bytes(b""))[0], "cannot be read as npz"),
        (lambda p: ((p / "one.npz"), np.save((p / "one.npz").open("wb"), np.zeros(3)))[0], "cannot be read as npz"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path, make, words):
    with pytest.raises(UserError, match=words) as problem:
        formats.read(make(tmp_path))
    assert "\n" not in str(problem.value)


def test_no_pickle_is_ever_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "exploded",))

    np.savez(tmp_path / "b.npz", x=np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as npz"):
        formats.read(tmp_path / "b.npz")
    assert not (tmp_path / "exploded").exists()
