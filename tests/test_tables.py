"""Schemas, checks, ids and shards, and Parquet files: whole, alike for like content, saying how they were made."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mia import tables
from mia.cli import common
from mia.config import DedupOptions
from mia.errors import UserError

MADE_BY = {"stage": "test", "version": 1, "seed": 0}
NAMES = sorted(tables.SCHEMAS)


def column(name: str, field: pa.Field, rows: int) -> pa.Array:
    """Values of the field's type, all different but where a fixed list allows only one."""
    allowed = tables.CATEGORIES.get(name, {}).get(field.name)
    if allowed:
        return pa.array([allowed[0]] * rows, pa.string())
    numbers = np.arange(rows)
    if pa.types.is_fixed_size_list(field.type) or isinstance(field.type, pa.ListType):
        width = field.type.list_size if pa.types.is_fixed_size_list(field.type) and field.type.list_size > 0 else 3
        matrix = (numbers[:, None] + np.arange(width)).astype(field.type.value_type.to_pandas_dtype())
        found = tables.vector_column(matrix)
        one_width = pa.types.is_fixed_size_list(field.type) or field.type in (tables.VECTOR, tables.BANDS)
        return found if one_width else found.cast(field.type)
    if pa.types.is_string(field.type):
        return pa.array([f"{field.name}-{i}" for i in numbers])
    if pa.types.is_large_binary(field.type):
        return pa.array([bytes([i]) for i in numbers], pa.large_binary())
    if pa.types.is_boolean(field.type):
        return pa.array(numbers % 2 == 0)
    return pa.array(numbers.astype(field.type.to_pandas_dtype()))


def example(name: str, rows: int = 4) -> pa.Table:
    return pa.table({field.name: column(name, field, rows) for field in tables.SCHEMAS[name]})


def replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cases(wanted) -> list[tuple[str, str]]:
    """(table, column) for every column of every schema whose field is `wanted`."""
    return [(name, field.name) for name in NAMES for field in tables.SCHEMAS[name] if wanted(field)]


def is_vector(field: pa.Field) -> bool:
    return pa.types.is_fixed_size_list(field.type) or isinstance(field.type, pa.ListType)


def is_float(field: pa.Field) -> bool:
    return pa.types.is_floating(field.type)


# ------------------------------------------------------------------------------------------------ ids and shards


@pytest.mark.parametrize(
    ("url", "caption", "sha256"),
    [  # printf 'URL\nCAPTION' | sha256sum
        ("http://example.org/a.jpg", "A cat", "e8b7a9c14a1a51d2877f79e5beab63898adde77594e212600f5c8c13d637f15b"),
        (
            "https://é.example/ü?x=1&y=2",
            "猫 – “cat”",
            "5a3daa171f51a7da7a87b37dc77099600bdd1e5398ba79c2d04d2b15264538a3",
        ),
        ("", "", "01ba4719c80b6fe911b091a7c05124b64eeece964e09c058ef8f9805daca546b"),
    ],
)
def test_sample_id_is_the_first_128_bits_of_coreutils_sha256(url, caption, sha256):
    assert tables.sample_id(url, caption) == sha256[:32]


def test_caption_id_has_a_value_for_the_empty_prompt():
    assert tables.caption_id("A cat") == "a7a8377f6368041e92240492d76e6861"
    assert tables.caption_id("") == "e3b0c44298fc1c149afbf4c8996fb924"


IDS = [tables.sample_id(f"http://host/{i}", "caption") for i in range(7000)]


@pytest.mark.parametrize("shards", [1, 2, 7, 100_000])
def test_shards_are_equal_ranges_of_the_id_space(shards):
    oracle = [int(Fraction(int(i[:8], 16), 2**32) * shards) for i in IDS]
    assert tables.shard_of(IDS, shards).tolist() == oracle
    in_order = tables.shard_of(sorted(IDS), shards)
    assert (np.diff(in_order) >= 0).all()
    assert tables.shard_of(["0" * 32, "f" * 32], shards).tolist() == [0, shards - 1]


def test_seven_shards_partition_what_one_holds_and_are_even():
    shard = tables.shard_of(IDS, 7)
    parts = [{i for i, s in zip(IDS, shard, strict=True) if s == number} for number in range(7)]
    assert set().union(*parts) == set(IDS) and sum(map(len, parts)) == len(IDS)
    assert all(850 < len(part) < 1150 for part in parts)  # binomial(7000, 1/7): mean 1000, deviation 29
    assert set(tables.shard_of(IDS, 1).tolist()) == {0}


def test_a_sample_keeps_its_shard_in_any_company():
    assert tables.shard_of(IDS[5:9][::-1], 7).tolist() == tables.shard_of(IDS, 7)[5:9][::-1].tolist()


# ------------------------------------------------------------------------------------------------ check


@pytest.mark.parametrize("name", NAMES)
def test_a_good_table_is_put_in_schema_order_and_sorted_by_its_key(name):
    good = example(name)
    shuffled = good.take([2, 0, 3, 1]).select(good.column_names[::-1]).append_column("extra", pa.array([1, 2, 3, 4]))
    assert tables.check(shuffled, name).equals(good)
    assert tables.check(good.slice(0, 0), name).num_rows == 0


@pytest.mark.parametrize(("name", "missing"), cases(lambda field: True))
def test_a_missing_column_is_refused(name, missing):
    with pytest.raises(UserError, match=f"^{name} table has no column '{missing}', somewhere, columns: "):
        tables.check(example(name).drop_columns([missing]), name, "somewhere")


@pytest.mark.parametrize(("name", "wrong"), cases(lambda field: True))
def test_a_wrong_type_is_refused(name, wrong):
    table = replaced(example(name), wrong, pa.array([{"a": 1}] * 4))
    with pytest.raises(UserError, match=re.escape(f"{name} column '{wrong}' is struct<a: int64>, here, make it ")):
        tables.check(table, name, "here")


@pytest.mark.parametrize(
    ("name", "wrong", "values"),
    [
        ("embeddings", "image", pa.array([[1.0, 2.0]] * 4, pa.list_(pa.float16()))),  # not of fixed size
        ("embeddings", "image", pa.array([[1.0, 2.0]] * 4, pa.list_(pa.float32(), 2))),  # not float16
        ("features", "gram", pa.array([[1.0] * 9] * 4, pa.list_(pa.float64(), 9))),  # nine numbers, not ten
        ("scores", "score", pa.array([1.0] * 4, pa.float32())),
        ("dataset", "member", pa.array([1, 0, 1, 0])),
        ("images", "phash", pa.array([1] * 4, pa.int64())),
    ],
)
def test_a_nearly_right_type_is_refused(name, wrong, values):
    with pytest.raises(UserError, match=f"{name} column '{wrong}' is .*make it "):
        tables.check(replaced(example(name), wrong, values), name)


def test_vectors_may_have_any_length_but_one_for_all():
    for width in (1, 5):
        matrix = np.ones((2, width), np.float16)
        table = pa.table(
            {"sample_id": ["a", "b"], "image": tables.vector_column(matrix), "text": tables.vector_column(matrix)}
        )
        assert tables.check(table, "embeddings")["image"].type.list_size == width


@pytest.mark.parametrize(("name", "empty"), cases(lambda field: not field.nullable))
def test_a_null_in_a_required_column_is_refused(name, empty):
    good = example(name)
    values = pa.chunked_array([good[empty].chunk(0).slice(0, 3), pa.nulls(1, good[empty].type)])
    with pytest.raises(UserError, match=f"^{name} column '{empty}' has 1 empty values"):
        tables.check(replaced(good, empty, values), name)


@pytest.mark.parametrize(("name", "empty"), cases(lambda field: field.nullable))
def test_a_null_in_an_optional_column_is_allowed(name, empty):
    good = example(name)
    found = tables.check(replaced(good, empty, pa.nulls(4, good[empty].type)), name)
    assert found[empty].null_count == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "wrong"), cases(is_float))
def test_nan_and_infinity_are_refused_by_the_key_of_their_row(name, wrong, bad):
    good = example(name)
    values = good[wrong].to_pylist()
    values[2] = bad
    table = replaced(good, wrong, pa.array(values, good[wrong].type)).take([3, 2, 1, 0])
    with pytest.raises(UserError) as caught:
        tables.check(table, name, "file")
    assert f"{name} column '{wrong}' holds NaN or infinity, file {{" in str(caught.value)
    for part in tables.key(name):
        if part != wrong:
            assert f"'{part}': {good[part][2].as_py()!r}" in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
@pytest.mark.parametrize(("name", "wrong"), cases(is_vector))
def test_a_vector_that_is_not_all_numbers_is_refused_but_an_optional_one_may_have_empty_entries(name, wrong, bad):
    good = example(name)
    values = good[wrong].to_pylist()
    values[1][-1] = bad
    if bad is None and tables.SCHEMAS[name].field(wrong).nullable:
        found = tables.check(replaced(good, wrong, pa.array(values, good[wrong].type)), name)
        assert found[wrong][1].as_py()[-1] is None
        return
    with pytest.raises(UserError, match=f"{name} column '{wrong}' holds NaN or infinity, .*{tables.key(name)[0]}-1"):
        tables.check(replaced(good, wrong, pa.array(values, good[wrong].type)), name)


def test_a_null_vector_before_a_bad_one_does_not_shift_the_row_named():
    good = example("features")
    values = [None, [None, *[0.0] * 9], [0.0] * 9 + [float("nan")], [0.0] * 10]
    with pytest.raises(UserError, match="'sample_id': 'sample_id-2'"):
        tables.check(replaced(good, "gram", pa.array(values, tables.GRAM)), "features")


@pytest.mark.parametrize("name", NAMES)
def test_two_rows_with_one_key_are_refused(name):
    good = example(name)
    with pytest.raises(UserError) as caught:
        tables.check(good.take([0, 3, 1, 2, 3]), name)
    assert f"{name} table has two rows with one key" in str(caught.value)
    assert all(repr(good[part][3].as_py()) in str(caught.value) for part in tables.key(name))


@pytest.mark.parametrize("name", [name for name in NAMES if len(tables.key(name)) > 1])
def test_rows_that_differ_in_any_part_of_the_key_are_two(name):
    for part in tables.key(name):
        good = example(name, 2)
        for other in set(tables.key(name)) - {part}:
            good = replaced(good, other, good[other].combine_chunks().take(pa.array([0, 0])))
        assert tables.check(good, name).num_rows == 2


def test_two_metrics_without_an_fpr_target_have_one_key():
    auc = example("metrics", 2)
    for name in tables.key("metrics"):
        auc = replaced(auc, name, auc[name].combine_chunks().take(pa.array([0, 0])))
    auc = replaced(auc, "fpr_target", pa.nulls(2, pa.float64()))
    with pytest.raises(UserError, match="metrics table has two rows with one key.*'fpr_target': None"):
        tables.check(auc, "metrics")
    one_of_each = replaced(auc, "fpr_target", pa.array([None, 0.01]))
    assert tables.check(one_of_each, "metrics").num_rows == 2


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, column_name) for name, columns in tables.CATEGORIES.items() for column_name in columns]
)
def test_a_value_outside_its_fixed_list_is_refused(name, wrong):
    good = example(name)
    allowed = tables.CATEGORIES[name][wrong]
    with pytest.raises(UserError, match=re.escape(f"{name} column '{wrong}' holds ['Member'], use {list(allowed)}")):
        tables.check(replaced(good, wrong, pa.array([allowed[0], "Member", allowed[0], allowed[0]])), name)
    everything = example(name, len(allowed))
    assert tables.check(replaced(everything, wrong, pa.array(allowed)), name).num_rows == len(allowed)


def test_the_schemas_of_the_design_have_its_columns():
    """design.md section 4: the columns that matter."""
    wanted = {
        "metadata": "url caption language width height aesthetic similarity punsafe pwatermark source pool",
        "images": "status detail sha256 bytes width height format phash",
        "embeddings": "image text",
        "duplicates": "nearest_id distance method reason",
        "dataset": "url caption sha256 member group part weight",
        "latents": "mean logvar",
        "scores": "attack variant score",
        "metrics": "value ci_low ci_high n_members n_nonmembers fpr_target fpr_realized threshold method",
    }
    for name, columns in wanted.items():
        assert set(columns.split()) <= set(tables.SCHEMAS[name].names), name
    assert tables.key("features") == ("sample_id", "block", "timestep", "draw")
    assert tables.key("scores") == ("sample_id", "attack", "variant")
    label_free = ("selection", "latents", "texts", "features", "images", "embeddings")
    assert not any({"member", "pool", "part", "group"} & set(tables.SCHEMAS[name].names) for name in label_free)


# ------------------------------------------------------------------------------------------------ vectors


def test_vectors_undo_vector_column_in_chunks_and_slices():
    matrix = np.arange(24, dtype=np.float16).reshape(6, 4)
    whole = tables.vector_column(matrix)
    chunked = pa.chunked_array([whole.slice(0, 2), whole.slice(2, 4)])
    assert tables.vectors(chunked, np.float64).tolist() == matrix.tolist()
    assert tables.vectors(whole.slice(3, 2)).tolist() == matrix[3:5].tolist()
    assert tables.vectors(whole).dtype == np.float32
    assert tables.vectors(tables.vector_column(matrix.T)).tolist() == matrix.T.tolist()  # not contiguous


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", NAMES)
def test_a_table_comes_back_as_it_was_written(name, tmp_path):
    tables.write(tmp_path / "new" / "folder" / "t.parquet", example(name), name, MADE_BY)
    assert tables.read(tmp_path / "new" / "folder" / "t.parquet", name).equals(example(name))
    assert tables.provenance(tmp_path / "new" / "folder" / "t.parquet") == MADE_BY


@pytest.mark.parametrize("name", ["metadata", "embeddings", "features", "metrics"])
def test_shuffled_rows_and_other_chunks_give_the_same_bytes(name, tmp_path):
    good = example(name, 50)
    order = np.random.default_rng(0).permutation(50)
    pieces = pa.concat_tables([good.take(order[:13]), good.take(order[13:])])
    tables.write(tmp_path / "a", good, name, MADE_BY)
    tables.write(tmp_path / "b", pieces, name, MADE_BY)
    tables.write(
        tmp_path / "c", pieces.replace_schema_metadata({"pandas": "junk"}), name, dict(reversed(MADE_BY.items()))
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_a_bad_table_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "t.parquet"
    tables.write(path, example("scores"), "scores", MADE_BY)
    before = path.read_bytes()
    bad = replaced(example("scores"), "score", pa.array([1.0, float("nan"), 3.0, 4.0]))
    with pytest.raises(UserError, match="NaN or infinity"):
        tables.write(path, bad, "scores", MADE_BY)
    assert path.read_bytes() == before and names(tmp_path) == ["t.parquet"]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk"), tables.replacing(path) as temporary:
        assert temporary.parent == tmp_path and temporary != path
        temporary.write_bytes(b"half")
        raise RuntimeError("disk")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["t.parquet"]


def test_a_target_that_cannot_be_replaced_leaves_no_part_file(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        tables.write(tmp_path / "folder", example("scores"), "scores", MADE_BY)
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["inside"]


def test_the_new_file_is_whole_when_it_appears_and_readable_by_others(tmp_path):
    path = tmp_path / "t"
    with tables.replacing(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and path.stat().st_mode & 0o777 == 0o644


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path):
    path = tmp_path / "t"
    tables.write(path, example("scores", 50), "scores", MADE_BY)
    before = path.read_bytes()
    with path.open("rb") as reader:
        tables.write(path, example("scores", 2), "scores", MADE_BY)
        assert reader.read() == before != path.read_bytes()


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys; from mia import tables\n"
        "with tables.replacing(sys.argv[1]) as part:\n"
        "    part.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9 and path.read_bytes() == b"old"


def test_several_shards_read_as_one_table_whatever_their_order(tmp_path):
    good = example("scores", 9)
    tables.write(tmp_path / "one", good, "scores", MADE_BY)
    shards = []
    for number, rows in enumerate(([8, 1], [0, 7, 2, 3], [], [5, 4, 6])):
        shards.append(tmp_path / f"{number}")
        tables.write(shards[-1], good.take(pa.array(rows, pa.int64())), "scores", MADE_BY | {"shard": number})
    one = tables.read(tmp_path / "one", "scores")
    assert tables.read(shards, "scores").equals(one) and tables.read(tuple(shards[::-1]), "scores").equals(one)
    some = tables.read(shards, "scores", columns=("sample_id", "score"))
    assert some.equals(one.select(["sample_id", "score"]))


def test_a_row_in_two_shards_is_refused_by_name(tmp_path):
    for number in range(2):
        tables.write(tmp_path / f"{number}", example("scores"), "scores", MADE_BY)
    with pytest.raises(UserError, match="two rows with one key, .*/0 and 1 more {'sample_id': 'sample_id-0'"):
        tables.read([tmp_path / "0", tmp_path / "1"], "scores")


def test_shards_of_two_models_are_refused(tmp_path):
    for width in (3, 4):
        vector = tables.vector_column(np.ones((1, width), np.float16))
        table = pa.table({"sample_id": [f"of {width}"], "image": vector, "text": vector})
        tables.write(tmp_path / f"{width}", table, "embeddings", MADE_BY)
    for columns in (None, ("sample_id", "image")):
        with pytest.raises(UserError, match="embeddings files differ in columns or types, .*/3 and 1 more"):
            tables.read([tmp_path / "3", tmp_path / "4"], "embeddings", columns)


def test_a_truncated_file_is_refused_wherever_it_breaks_off(tmp_path):
    tables.write(tmp_path / "whole", example("embeddings", 40), "embeddings", MADE_BY)
    data = (tmp_path / "whole").read_bytes()
    for size in sorted({0, 1, 4, 8, *range(12, len(data), len(data) // 25), len(data) - 1}):
        (tmp_path / "part").write_bytes(data[:size])
        for read in (
            lambda: tables.read(tmp_path / "part", "embeddings"),
            lambda: tables.provenance(tmp_path / "part"),
        ):
            with pytest.raises(UserError, match="cannot be read as Parquet .*/part, make it anew") as caught:
                read()
            assert "\n" not in str(caught.value)


def test_a_damaged_page_is_refused(tmp_path):
    tables.write(tmp_path / "t", example("embeddings", 40), "embeddings", MADE_BY)
    data = bytearray((tmp_path / "t").read_bytes())
    data[10:40] = bytes(30)
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(UserError, match="embeddings file cannot be read as Parquet"):
        tables.read(tmp_path / "t", "embeddings")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=re.escape(f"scores file does not exist, {path}, run the stage")):
            tables.read(path, "scores")
        with pytest.raises(UserError, match="does not exist"):
            tables.provenance(path)


def test_reading_a_part_of_another_table_names_the_missing_column(tmp_path):
    tables.write(tmp_path / "t", example("scores"), "scores", MADE_BY)
    with pytest.raises(UserError, match="images table has no column 'status', .*/t, is it another table?"):
        tables.read(tmp_path / "t", "images", columns=("sample_id", "status"))


def test_a_file_of_strangers_is_checked_when_read(tmp_path):
    pq.write_table(example("scores").drop_columns(["variant"]), tmp_path / "t")
    with pytest.raises(UserError, match=f"scores table has no column 'variant', {tmp_path}/t"):
        tables.read(tmp_path / "t", "scores")
    assert tables.provenance(tmp_path / "t") == {}


# ------------------------------------------------------------------------------------------------ provenance


def test_provenance_names_inputs_by_content_and_holds_no_path_and_no_time(tmp_path):
    found = []
    for place, clock in (("here", 1_000_000_000), ("there", 1_700_000_000)):
        folder = tmp_path / place
        folder.mkdir()
        for name in ("a", "b"):
            (folder / name).write_text(name)
            os.utime(folder / name, (clock, clock))
        paths = [folder / "a", folder / "b"]
        made = common.made_by("dedup", DedupOptions(), 3, paths if place == "here" else paths[::-1], device="cpu")
        tables.write(folder / "t.parquet", example("scores"), "scores", made)
        found.append(((folder / "t.parquet").read_bytes(), made))
    assert found[0] == found[1]
    data, made = found[0]
    assert str(tmp_path).encode() not in data and os.uname().nodename.encode() not in data
    assert made["stage"] == "dedup" and made["version"] == DedupOptions.version and made["seed"] == 3
    assert made["options"] == {"max_distance": 0.5, "max_hamming": 6} and made["device"] == "cpu"
    # printf a | sha256sum; printf b | sha256sum
    assert made["inputs"] == ["3e23e8160039594a", "ca978112ca1bbdca"]
    assert {"mia", "numpy", "pyarrow"} <= set(made["libraries"])
    assert tables.provenance(tmp_path / "here" / "t.parquet") == made


def test_provenance_differs_by_option_seed_input_and_stage(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")

    def made(stage: str = "dedup", options: object = DedupOptions(), seed: int = 0, name: str = "a") -> str:  # noqa: B008
        return json.dumps(common.made_by(stage, options, seed, [tmp_path / name]), sort_keys=True)

    all_of_them = [made(), made("audit"), made(options=DedupOptions(max_hamming=5)), made(seed=1), made(name="b")]
    assert len(set(all_of_them)) == 5
    hashes = [json.loads(text)["config_hash"] for text in all_of_them]
    assert hashes[0] == hashes[3] == hashes[4] != hashes[2]


def test_file_hash_is_coreutils_sha256(tmp_path):
    path: pathlib.Path = tmp_path / "file"
    path.write_bytes(b"http://example.org/a.jpg\nA cat")
    assert tables.file_hash(path) == "e8b7a9c14a1a51d2877f79e5beab63898adde77594e212600f5c8c13d637f15b"


def selection(*ids: int) -> pa.RecordBatch:
    names = [f"{i:032x}" for i in ids]
    columns = {"sample_id": names, "caption": ["a"] * len(ids), "sha256": names}
    return pa.RecordBatch.from_pydict(columns, schema=tables.SCHEMAS["selection"])


def test_batches_are_read_as_they_were_written(tmp_path):
    path, whole = tmp_path / "a.parquet", tmp_path / "b.parquet"
    assert tables.write_batches(path, [selection(1, 2), selection(), selection(3)], "selection", MADE_BY) == 3
    tables.write(whole, pa.Table.from_batches([selection(1, 2, 3)]), "selection", MADE_BY)
    assert pq.ParquetFile(path).num_row_groups == 2 and tables.provenance(path) == MADE_BY
    assert tables.read(path, "selection").equals(tables.read(whole, "selection"))
    assert [batch.num_rows for batch in tables.batches([path, whole], "selection", 2)] == [2, 1, 2, 1]
    with pytest.raises(UserError, match="no column"):
        list(tables.batches([path], "images"))


def test_batches_do_not_gather_the_whole_file(tmp_path):
    """Of 20 groups of 1 MB each, no more than a few are in Arrow's memory."""
    rows = [
        {"sample_id": f"{i:032x}", "status": "ok", "detail": "", "bytes": np.random.default_rng(i).bytes(10**6)}
        for i in range(20)
    ]
    groups = (pa.RecordBatch.from_pylist([row], schema=tables.SCHEMAS["images"]) for row in rows)
    tables.write_batches(tmp_path / "a", groups, "images", MADE_BY)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in tables.batches([tmp_path / "a"], "images", 1)]
    assert len(held) == 20 and max(held) < 8e6


@pytest.mark.parametrize("second", [(2, 3), (0,)])
def test_batches_out_of_order_are_refused(tmp_path, second):
    with pytest.raises(UserError, match="out of order"):
        tables.write_batches(tmp_path / "a", [selection(1, 2), selection(*second)], "selection", MADE_BY)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no room on the disk"), tables.replacing(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shards", [1, 3, 7, 1000])
def test_the_bounds_of_shards_hold_the_ids_that_shard_of_gives_them(shards):
    edges = [number for shard in range(0, shards, max(1, shards // 7)) for number in (
        -(-(shard << 32) // shards), -(-((shard + 1) << 32) // shards) - 1)]  # fmt: skip
    ids = [f"{number:08x}{tail}" for number in {0, 2**32 - 1, *edges} for tail in ("0" * 24, "f" * 24)]
    for sample_id, shard in zip(ids, tables.shard_of(ids, shards), strict=True):
        for other in {int(shard), 0, shards - 1}:
            first, last = tables.ids_of(other, shards)
            assert (first <= sample_id <= last) == (other == shard)


def test_rows_between_two_ids_are_those_of_the_whole_table_and_few_are_read(tmp_path, monkeypatch):
    ids = sorted(tables.sample_id(f"u{i}", "c") for i in range(900))
    rows = [{"sample_id": i, "url": "u", "caption": "c", "source": "s", "pool": "member"} for i in ids]
    whole = pa.Table.from_pylist(rows, schema=tables.SCHEMAS["metadata"])
    path = tmp_path / "m.parquet"
    pq.write_table(whole, path, row_group_size=50)
    read = []
    real = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_groups", lambda self, groups, **how: read.append(groups) or real(self, groups, **how)
    )
    for shards in (1, 4, 90):
        for shard in range(shards):
            found = tables.between(path, "metadata", *tables.ids_of(shard, shards))
            wanted = whole.filter(pa.array(tables.shard_of(ids, shards) == shard))
            assert found.to_pylist() == wanted.to_pylist()
            assert len(read[-1]) <= 18 / shards + 2
    assert tables.between(path, "metadata", "", "", ("sample_id", "caption")).num_rows == 0
    with pytest.raises(UserError, match="metadata table has no column 'colour'"):
        tables.between(path, "metadata", "", "", ("sample_id", "colour"))


def test_a_row_group_of_metadata_is_no_larger_than_a_shard(tmp_path):
    for name, rows in (("metadata", 8_192), ("selection", 65_536)):
        text = pa.array([f"{i:032x}" for i in range(70_000)])
        empty = {field.name: pa.nulls(len(text), field.type) for field in tables.SCHEMAS[name]}
        full = {field.name: text for field in tables.SCHEMAS[name] if not field.nullable}
        pool = {"pool": pa.array(["member"] * len(text))} if name == "metadata" else {}
        tables.write(tmp_path / name, pa.table({**empty, **full, **pool}), name, MADE_BY)
        assert pq.ParquetFile(tmp_path / name).metadata.row_group(0).num_rows == rows
