"""The search against all distances in plain loops; groups, hashes, files of references, and the command."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mia import cli, dedup, search, tables
from mia.cli import neighbours as cli_neighbours
from mia.config import DedupOptions
from mia.errors import UserError


def vectors(seed: int, n: int, width: int = 12, dtype: type = np.float32) -> np.ndarray:
    """Vectors of many lengths around a few centres, with exact copies among them."""
    r = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(8, width))
    x = centres[r.integers(0, 8, n)] + r.normal(size=(n, width)) * r.choice([0.0, 0.01, 0.3], (n, 1))
    return (x * r.uniform(0.5, 2, (n, 1))).astype(dtype)


def names(seed: int, n: int) -> np.ndarray:
    return np.array([f"{i:05d}" for i in np.random.default_rng(seed).permutation(n)], dtype=object)


def in_parts(ids: np.ndarray, x: np.ndarray, size: int) -> search.Reference:
    parts = [x[start : start + size] for start in range(0, len(x), size)]
    return search.Reference(
        "x", pa.array(ids, pa.string()), [len(p) for p in parts], [lambda p=p: p for p in parts]
    )  # fmt: skip


def found(queries: np.ndarray, reference: search.Reference, k: int) -> list[tuple]:
    ids = np.array([f"q{i:04d}" for i in range(len(queries))], dtype=object)
    table = search.neighbours(ids, reference, *search.top_k(queries, reference, k))
    return [tuple(row.values()) for row in table.to_pylist()]


# ------------------------------------------------------------------------------------------------ oracles


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """By the definition, in float64, alone: no other vector can have a part in it."""
    return float(search.distances(a[None], np.array([0]), b[None], np.array([0]))[0])


def nearest(queries: np.ndarray, ids: np.ndarray, x: np.ndarray, k: int) -> list[tuple]:
    rows = []
    for number, query in enumerate(queries):
        every = sorted((distance(query, other), name) for other, name in zip(x, ids, strict=True))
        rows += [(f"q{number:04d}", rank, name, d) for rank, (d, name) in enumerate(every[:k], 1)]
    return rows


def bits(a: int, b: int) -> int:
    return bin(int(a) ^ int(b)).count("1")


# ------------------------------------------------------------------------------------------------ distances


def test_distance_agrees_with_the_formula_and_is_zero_for_copies_of_any_length_by_two():
    a, b = vectors(0, 60, 768), vectors(1, 60, 768)
    unit = [x.astype(float) / np.linalg.norm(x.astype(float), axis=1, keepdims=True) for x in (a, b)]
    rows = np.arange(60)
    assert search.distances(a, rows, b, rows) == pytest.approx(np.linalg.norm(unit[0] - unit[1], axis=1), abs=1e-14)
    assert (search.distances(a, rows, 4 * a, rows) == 0).all()
    opposite = search.distances(a, rows, -a, rows)
    assert opposite == pytest.approx(2)


@pytest.mark.parametrize("width", [1, 2, 5, 768, 1024])
def test_a_distance_has_the_same_bits_in_any_company(width):
    a, b = vectors(0, 300, width) + 3, vectors(1, 300, width) + 3
    i, j = np.divmod(np.arange(0, 90_000, 7), 300)
    together = search.distances(a, i, b, j)
    some = np.random.default_rng(0).permutation(len(i))[:200]
    assert [distance(a[i[s]], b[j[s]]) for s in some] == together[some].tolist()
    assert (search.distances(b, j, a, i) == together).all()  # whichever is the query


def test_unit_vectors_have_length_one_and_margin_covers_what_blas_does():
    x = search.unit(vectors(0, 2000, 768), "x")
    assert x.dtype == np.float32 and np.linalg.norm(x, axis=1) == pytest.approx(1, abs=1e-6)
    exact = x[:50].astype(np.float64) @ x.T.astype(np.float64)
    assert abs(x[:50] @ x.T - exact).max() < search.margin(768) / 4


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (0, "has no length"),
        (np.nan, "holds NaN"),
        (np.inf, "holds NaN, infinity"),
        (1e30, "holds NaN, infinity or too large a number"),
    ],
)
def test_a_vector_without_direction_is_named(value, what):
    x = np.ones((5, 3), np.float32)
    x[3] = value
    with pytest.raises(UserError, match=f"the vector of row 3 {what}.*, shard 7, mend or drop the row"):
        search.unit(x, "shard 7")
    with pytest.raises(UserError, match=f"the vector of d {what}"):
        search.top_k(np.ones((1, 3), np.float32), in_parts(np.array(list("abcde")), x, 2), 1)


def test_another_width_is_refused():
    with pytest.raises(UserError, match="vectors have 4 entries, the queries' have 3, x, embed both with one model"):
        search.top_k(np.ones((1, 3), np.float32), in_parts(np.array(["a"]), np.ones((1, 4), np.float32), 1), 1)


# ------------------------------------------------------------------------------------------------ top k


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 4, 200])
def test_top_k_is_the_oracles_to_the_bit_for_any_block_and_order(monkeypatch, dtype, k):
    queries, x, ids = vectors(1, 23, dtype=dtype), vectors(2, 150, dtype=dtype), names(0, 150)
    queries[:5] = x[:5]
    wanted = nearest(queries, ids, x, k)
    assert [row[3] for row in wanted].count(0.0) >= 5
    for size, shape, pairs in ((150, (1024, 4096), 2**22), (7, (5, 3), 2**22), (64, (8, 10), 1), (150, (23, 16), 40)):
        monkeypatch.setattr(search, "QUERIES", shape[0])
        monkeypatch.setattr(search, "TILE", shape[1])
        monkeypatch.setattr(search, "PAIRS", pairs)
        assert found(queries, in_parts(ids, x, size), k) == wanted
        order = np.random.default_rng(size).permutation(150)
        assert found(queries, in_parts(ids[order], x[order], size), k) == wanted


@pytest.mark.parametrize("shards", [1, 2, 7, 150])
def test_any_shards_in_any_order_merge_to_one_table(monkeypatch, shards):
    queries, x, ids = vectors(1, 23), vectors(2, 150), names(0, 150)
    wanted = nearest(queries, ids, x, 4)
    cut = np.array_split(np.random.default_rng(shards).permutation(150), shards)
    query_ids = np.array([f"q{i:04d}" for i in range(23)], dtype=object)
    parts = [search.in_memory("x", ids[rows], x[rows]) for rows in cut]
    pieces = [search.neighbours(query_ids, part, *search.top_k(queries, part, 4)) for part in parts]
    for merged in (2**24, 50):
        monkeypatch.setattr(search, "MERGED", merged)
        for order in (pieces, pieces[::-1]):
            assert [tuple(row.values()) for row in search.merge(order, 4).to_pylist()] == wanted
    assert [r for r in wanted if r[1] == 1] == [tuple(r.values()) for r in search.merge(pieces, 1).to_pylist()]


def test_ties_go_to_the_smaller_id_even_in_a_crowd_of_equals(monkeypatch):
    monkeypatch.setattr(search, "PAIRS", 100)
    x, ids = np.ones((500, 4), np.float32), names(3, 500)
    rows = found(np.ones((3, 4), np.float32), in_parts(ids, x, 90), 3)
    assert [row[2] for row in rows] == ["00000", "00001", "00002"] * 3 and {row[3] for row in rows} == {0.0}


def test_tables_are_merged_few_at_a_time(monkeypatch):
    """Of 50 tables of 40 rows, no more than twice the result waits, or `MERGED` beside it."""
    r = np.random.default_rng(1)
    ids = [f"{i:032x}" for i in range(40)]
    columns = [
        [ids, np.ones(40, np.int32), [f"{shard:02}-{i % 3}" for i in range(40)], r.integers(0, 9, 40) / 4]
        for shard in range(50)
    ]
    parts = [pa.table([pa.array(c) for c in some], schema=search.SCHEMAS["neighbours"]) for some in columns]
    once, sizes, plain = search.merge(parts, 2), [], search._first
    monkeypatch.setattr(search, "_first", lambda table, k: sizes.append(len(table)) or plain(table, k))
    for merged in (1, 100, 10_000):
        monkeypatch.setattr(search, "MERGED", merged)
        assert search.merge(iter(parts), 2).equals(once) and once.num_rows == 80
        assert max(sizes) <= max(merged + 80 + 40, 80 + 80 + 40) and (sum(sizes) < 8_000 or merged > 1)
        sizes.clear()


def test_nothing_to_search_or_to_ask_is_an_empty_table():
    x = np.ones((3, 4), np.float32)
    assert found(x[:0], search.in_memory("x", names(0, 3), x), 2) == []
    assert found(x, search.in_memory("x", names(0, 0), x[:0]), 2) == []
    assert len(search.merge([], 3)) == 0 and search.merge([], 3).schema == tables.SCHEMAS["neighbours"]


def test_only_some_rows_are_searched():
    x, ids = vectors(2, 150), names(0, 150)
    keep = np.random.default_rng(0).random(150) < 0.3
    queries = vectors(1, 9)
    for size in (150, 40, 1):
        assert found(queries, search.only(in_parts(ids, x, size), keep), 5) == nearest(queries, ids[keep], x[keep], 5)
    assert found(queries, search.only(in_parts(ids, x, 40), np.zeros(150, bool)), 5) == []


def test_planted_near_duplicates_are_found_at_real_width():
    r = np.random.default_rng(0)
    x = r.normal(size=(3000, 768)).astype(np.float16)
    planted = r.permutation(3000)[:100]
    queries = (x[planted] + 0.1 * r.normal(size=(100, 768))).astype(np.float16)
    rows, far = search.top_k(queries, search.in_memory("x", names(0, 3000), x), 2)
    assert (rows[:, 0] == planted).all() and (far[:, 0] < 0.2).all() and (far[:, 1] > 1).all()


def clustered(n: int) -> tuple[np.ndarray, search.Reference]:
    r = np.random.default_rng(0)
    x = (r.normal(size=(300, 16))[r.integers(0, 300, n)] + 0.1 * r.normal(size=(n, 16))).astype(np.float32)
    return x[:200] + np.float32(0.01), in_parts(names(0, n), x, 1500)


def test_the_approximate_search_finds_nearly_all_and_has_exact_distances():
    queries, reference = clustered(4000)
    rows, far = search.approximate_top_k(queries, reference, 5, 16)
    wanted_rows, wanted = search.top_k(queries, reference, 5)
    recall = search.recall(queries, reference, far[:, 0])
    assert recall == (rows[:, 0] == wanted_rows[:, 0]).mean() >= 0.99
    same = rows == wanted_rows
    assert (far[same] == wanted[same]).all() and (np.diff(far, axis=1) >= 0).all() and (far >= wanted).all()
    assert (
        search.recall(queries, reference, wanted[:, 0]) == 1 and search.recall(queries, reference, far[:, 0] + 1) == 0
    )


def test_without_faiss_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    queries, reference = clustered(2000)
    with pytest.raises(
        UserError, match="approximate search needs faiss, x, run `pip install faiss-cpu`, or raise neigh"
    ):
        search.approximate_top_k(queries, reference, 5, 4)


# ------------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize("radius", [0.0, 0.3, 0.9, 2.1])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_radius_join_is_the_oracles_for_any_block(monkeypatch, radius, dtype):
    x = vectors(3, 90, dtype=dtype)
    wanted = {
        (i, j): d for i in range(90) for j in range(i + 1, 90) if (d := distance(x[i], x[j])) < radius
    }  # fmt: skip
    for queries, tile in ((1024, 4096), (7, 5), (64, 16), (90, 90)):
        monkeypatch.setattr(search, "QUERIES", queries)
        monkeypatch.setattr(search, "TILE", tile)
        rows = [row for chunk in search.radius_pairs(x, radius) for row in zip(*chunk, strict=True)]
        assert len(rows) == len(wanted) and {(i, j): d for i, j, d in rows} == wanted


@pytest.mark.parametrize("radius", [0.0, 0.9, 2.1])
def test_the_join_with_others_is_the_oracles_for_any_block(monkeypatch, radius):
    x, y = vectors(3, 50), vectors(4, 70)
    wanted = {(i, j): d for i in range(50) for j in range(70) if (d := distance(x[i], y[j])) < radius}
    for queries, tile in ((1024, 4096), (7, 5), (64, 16)):
        monkeypatch.setattr(search, "QUERIES", queries)
        monkeypatch.setattr(search, "TILE", tile)
        rows = [row for chunk in search.radius_pairs(x, radius, others=y) for row in zip(*chunk, strict=True)]
        assert len(rows) == len(wanted) and {(i, j): d for i, j, d in rows} == wanted


def meetings(shards: int) -> list[list[int]]:
    """Shards that each job reads, its own first, so that every two meet in one job."""
    return [[own, *range(own)] for own in range(shards)]


def plain_groups(x: np.ndarray, radius: float) -> list[int]:
    """The first row that a chain of close pairs leads to."""
    group = list(range(len(x)))
    for i, j in itertools.combinations(range(len(x)), 2):
        if distance(x[i], x[j]) < radius and group[i] != group[j]:
            old, new = sorted((group[i], group[j]))[::-1]
            group = [new if label == old else label for label in group]
    return group


@pytest.mark.parametrize("shards", [1, 2, 5, 90])
@pytest.mark.parametrize("radius", [0.0, 0.05, 0.3, 2.1])
def test_links_of_any_shards_in_any_order_make_the_oracles_groups(monkeypatch, shards, radius):
    x, ids = vectors(3, 90, dtype=np.float16), names(0, 90)
    wanted = plain_groups(x, radius)
    order = np.random.default_rng(shards).permutation(90)
    for rows in (order, np.sort(order)):
        cut = np.array_split(rows, shards)
        made = []
        for own, *others in meetings(shards):
            rest = [in_parts(ids[cut[other]], x[cut[other]], 7) for other in others]
            made.append(search.links(pa.array(ids[cut[own]], pa.string()), x[cut[own]], rest, radius))
            assert len(made[-1]) <= sum(len(cut[number]) for number in (own, *others))
        for merged in (2**24, 10):
            monkeypatch.setattr(search, "MERGED", merged)
            linked = search.Components(90)
            search.link_found(linked, pa.array(ids, pa.string()), made[::-1])
            assert search.firsts(linked.labels()).tolist() == wanted


def test_a_row_that_joins_two_groups_of_another_shard_joins_them():
    x = np.array([[1, 0], [0, 1], [1, 1]], np.float32)  # the first two are near the third, not each other
    between = in_parts(np.array(["c"], dtype=object), x[2:], 1)
    made = search.links(pa.array(["a", "b"]), x[:2], [between], 1.0)
    linked = search.Components(3)
    search.link_found(linked, pa.array(["a", "b", "c"]), [made])
    assert len(set(linked.labels())) == 1 and len(made) == 2


def test_links_of_thousands_of_copies_are_few_and_soon_found():
    x = np.tile(vectors(0, 1), (6_000, 1))
    ids = pa.array([f"{i:04d}" for i in range(6_000)])
    others = [search.Reference("x", ids[3_000:], [3_000], [lambda: x[3_000:]])]
    made = search.links(ids[:3_000], x[:3_000], others, 0.5)
    assert len(made) == 5_999
    linked = search.Components(6_000)
    search.link_found(linked, ids, [made])
    assert len(set(linked.labels())) == 1


def test_links_of_another_width_or_of_strangers_are_refused():
    ids, x = pa.array(["a", "b"]), np.ones((2, 3), np.float32)
    with pytest.raises(UserError, match="vectors have 4 entries, the queries' have 3, x, embed both with one model"):
        search.links(ids, x, [in_parts(np.array(["c"]), np.ones((1, 4), np.float32), 1)], 0.5)
    with pytest.raises(UserError, match="a links table has a sample that was not kept, b, make links of these matches"):
        search.link_found(search.Components(1), ids[:1], [search.links(ids, x, [], 0.5)])


def test_links_make_groups_and_a_chain_is_one(monkeypatch):
    monkeypatch.setattr(search, "ROWS", 1)  # compress at every step
    groups = search.Components(7)
    for i, j in ((0, 1), (1, 2), (5, 4), (4, 5)):
        groups.link(np.array([i]), np.array([j]))
    label = groups.labels()
    assert label[0] == label[1] == label[2] and label[4] == label[5] and len(set(label)) == 4
    assert groups.apart(np.array([0, 0]), np.array([2, 3])).tolist() == [False, True]
    groups.link(np.array([2]), np.array([5]))
    assert len(set(groups.labels())) == 3


def test_some_rows_of_a_matrix_are_joined_as_their_copy_is(monkeypatch):
    monkeypatch.setattr(search, "TILE", 8)
    x, rows = vectors(3, 90), np.random.default_rng(1).permutation(90)[:50]
    view = search.Rows(x, rows)
    assert view.shape == (50, x.shape[1]) and len(view) == 50 and (view[2:5] == x[rows[2:5]]).all()
    found = [[part.tolist() for part in chunk] for chunk in search.radius_pairs(view, 0.9)]
    assert found == [[part.tolist() for part in chunk] for chunk in search.radius_pairs(x[rows], 0.9)] and found


def test_near_links_are_the_components_of_all_close_pairs():
    x = vectors(3, 90)
    linked, plain = search.Components(90), list(range(90))
    search.link_near(linked, x, 0.3)
    for i in range(90):
        for j in range(90):
            if distance(x[i], x[j]) < 0.3 and plain[i] != plain[j]:
                plain = [plain[i] if label == plain[j] else label for label in plain]
    label = linked.labels()
    same = [(label[i] == label[j]) == (plain[i] == plain[j]) for i in range(90) for j in range(90)]
    assert all(same) and 1 < len(set(plain)) < 60


@pytest.mark.parametrize("most", [*range(9), 17, 64])
def test_bands_find_every_pair_of_hashes(most):
    r = np.random.default_rng(most)
    base = r.integers(0, 2**64, 12, dtype=np.uint64)
    flips = [sum(1 << int(b) for b in r.choice(64, r.integers(0, 10), replace=False)) for _ in range(150)]
    hashes = np.unique(base[r.integers(0, 12, 150)] ^ np.array(flips, dtype=np.uint64))
    got = {tuple(sorted(p)) for i, j in search.hamming_pairs(hashes, most) for p in zip(i.tolist(), j.tolist())}  # noqa: B905
    n = len(hashes)
    assert got == {(i, j) for i in range(n) for j in range(i + 1, n) if bits(hashes[i], hashes[j]) <= most}
    assert len(got) >= most


def test_equal_hashes_are_linked_unless_switched_off():
    hashes = np.array([7, 9, 7, 2**63, 9], dtype=np.uint64)
    for most, groups in ((-1, 5), (0, 3), (2, 3), (3, 1)):
        linked = search.Components(5)
        search.link_hashes(linked, hashes, most)
        assert len(set(linked.labels())) == groups
    search.link_hashes(search.Components(0), hashes[:0], 6)


def test_a_crowd_of_copies_is_one_group_and_soon_found():
    linked = search.Components(6_000)
    search.link_near(linked, np.tile(vectors(0, 1), (6_000, 1)), 0.5)
    search.link_hashes(linked, np.zeros(6_000, np.uint64), 6)
    assert len(set(linked.labels())) == 1


# ------------------------------------------------------------------------------------------------ the command

WIDTH = 12


def written(folder: pathlib.Path, shards: int = 2) -> tuple[list[str], dedup.Sample]:
    """Metadata and embeddings of 60 samples in three pools; the words of a command that asks for their neighbours."""
    pools = np.array(["member", "candidate", "control"], dtype=object)[np.random.default_rng(5).integers(0, 3, 60)]
    ids = np.array([tables.sample_id(str(i), "c") for i in range(60)], dtype=object)
    order = np.argsort(ids)
    ids, pools, x = ids[order], pools[order], vectors(4, 60, dtype=np.float16)
    schema = tables.SCHEMAS["metadata"]
    rows = [{"sample_id": i, "url": i, "caption": i, "source": "s", "pool": p} for i, p in zip(ids, pools, strict=True)]
    tables.write(folder / "m", pa.Table.from_pylist(rows, schema=schema), "metadata", {"stage": "test"})
    words = ["neighbours", "--metadata", str(folder / "m"), "--output", str(folder / "out"), "--k", "3"]
    for number, here in enumerate(np.array_split(np.random.default_rng(0).permutation(60), shards)):
        column = tables.vector_column(x[here])
        table = pa.table({"sample_id": pa.array(ids[here], pa.string()), "image": column, "text": column})
        tables.write(folder / f"e{number}", table, "embeddings", {"weights": "w"})
        words += ["--embeddings", str(folder / f"e{number}")]
    return words, dedup.Sample(ids, pools, ids, x, np.arange(60, dtype=np.uint64) << np.uint64(7))


def run(words: list[str], folder: pathlib.Path) -> list[dict]:
    cli.commands.main(words, standalone_mode=False)
    return tables.read(folder / "out", "neighbours").to_pylist()


def own(folder: pathlib.Path, shards: int) -> list[str]:
    return [word for number in range(shards) for word in ("--own", str(folder / f"e{number}"))]


@pytest.mark.parametrize("shards", [1, 3])
def test_the_command_holds_each_pool_against_those_before_it(tmp_path, shards):
    words, samples = written(tmp_path, shards)
    rows, wanted = run(words + own(tmp_path, shards), tmp_path), []
    for i, pool in enumerate(samples.pools):
        against = np.isin(samples.pools, {"candidate": ["member"], "control": ["member", "candidate"]}.get(pool, []))
        if against.any():
            near = nearest(samples.embeddings[i : i + 1], samples.ids[against], samples.embeddings[against], 3)
            wanted += [(samples.ids[i], *row[1:]) for row in near]
    assert [tuple(row.values()) for row in rows] == wanted
    assert tables.provenance(tmp_path / "out")["method"] == "exact"


def test_vectors_of_members_are_no_queries(tmp_path):
    words, samples = written(tmp_path, 3)
    paths = tuple(tmp_path / f"e{number}" for number in range(3))
    asked = np.flatnonzero(samples.pools != "member")
    ids, pools, x = cli_neighbours._queries(tmp_path / "m", paths, ["candidate", "control"])
    assert ids.tolist() == samples.ids[asked].tolist() and pools.tolist() == samples.pools[asked].tolist()
    assert np.array_equal(x, samples.embeddings[asked]) and x.base.nbytes == x.nbytes
    candidate = next(path for path in paths if set(tables.read(path, "embeddings")["sample_id"].to_pylist()) & set(ids))
    with pytest.raises(UserError, match="two rows with one key"):
        run([*words, *own(tmp_path, 3), "--embeddings", str(candidate)], tmp_path)
    narrow = tables.vector_column(samples.embeddings[asked[:1], :5])
    other = pa.table({"sample_id": pa.array(ids[:1], pa.string()), "image": narrow, "text": narrow})
    tables.write(tmp_path / "e1", other, "embeddings", {"weights": "w"})
    with pytest.raises(UserError, match="embeddings files differ in columns or types"):
        run([*words, *own(tmp_path, 1)], tmp_path)


def laion(folder: pathlib.Path, number: str, x: np.ndarray, ids: bool = True) -> None:
    np.save(folder / f"img_emb_{number}.npy", x)
    if ids:
        columns = {"url": [f"u{number}-{i}" for i in range(len(x))], "caption": [f"c{i}" for i in range(len(x))]}
        pq.write_table(pa.table(columns | {"NSFW": ["UNLIKELY"] * len(x)}), folder / f"metadata_{number}.parquet")


def test_published_embeddings_are_searched_in_any_number_of_shards(tmp_path):
    words, samples = written(tmp_path)
    x = vectors(8, 70, dtype=np.float16)
    laion(tmp_path, "0000", x[:50])
    laion(tmp_path, "0001", x[50:].astype(np.float32))
    published = [[*words, "--reference", str(tmp_path / f"img_emb_000{i}.npy")] for i in (0, 1)]
    both = [*published[0], *published[1][-2:]]
    asked = np.flatnonzero(samples.pools != "member")
    ids = [tables.sample_id(f"u000{int(i >= 50)}-{i % 50}", f"c{i % 50}") for i in range(70)]
    near = nearest(samples.embeddings[asked], np.array(ids, dtype=object), x, 3)
    wanted = [(samples.ids[asked[int(row[0][1:])]], *row[1:]) for row in near]
    rows = run([*both, "--reference-metadata", str(tmp_path)], tmp_path)
    assert [tuple(row.values()) for row in rows] == wanted
    pieces = []
    for one in published:
        run([*one, "--reference-metadata", str(tmp_path)], tmp_path)
        pieces.append(tables.read(tmp_path / "out", "neighbours"))
    assert search.merge(pieces, 3).to_pylist() == rows
    named = run(both, tmp_path)
    assert [row["distance"] for row in named] == [row["distance"] for row in rows]
    assert {row["reference_id"].split("#")[0] for row in named} == {"img_emb_0000", "img_emb_0001"}


def test_large_arrays_are_read_in_blocks(tmp_path, monkeypatch):
    words, _ = written(tmp_path)
    laion(tmp_path, "1", vectors(8, 70, dtype=np.float16), ids=False)
    words += ["--reference", str(tmp_path / "img_emb_1.npy")]
    whole = run(words, tmp_path)
    monkeypatch.setattr(search, "ROWS", 16)
    assert run(words, tmp_path) == whole


def test_above_the_limit_the_search_is_approximate_and_the_table_says_how_good(tmp_path, capsys):
    words, _ = written(tmp_path)
    laion(tmp_path, "1", np.random.default_rng(0).normal(size=(3000, WIDTH)).astype(np.float16), ids=False)
    words += ["--reference", str(tmp_path / "img_emb_1.npy")]
    exact = run(words, tmp_path)
    close = run([*words, "--exact-below", "2999", "--probes", "1024", "--recall-queries", "5"], tmp_path)
    made = tables.provenance(tmp_path / "out")
    assert made["method"] == "approximate" and 0.9 <= made["recall_at_1"] <= 1
    assert "approximate, recall@1" in capsys.readouterr().err and len(close) == len(exact)


def no_metadata(folder: pathlib.Path) -> None:
    laion(folder, "1", vectors(0, 5), ids=False)


def short_metadata(folder: pathlib.Path) -> None:
    laion(folder, "1", vectors(0, 5))
    np.save(folder / "img_emb_1.npy", vectors(0, 6))


def truncated(folder: pathlib.Path) -> None:
    laion(folder, "1", vectors(0, 50))
    data = (folder / "img_emb_1.npy").read_bytes()
    (folder / "img_emb_1.npy").write_bytes(data[:-100])


def spoilt(value: float, row: int = 3) -> Callable:
    def make(folder: pathlib.Path) -> None:
        x = vectors(0, 5)
        x[row] = value
        laion(folder, "1", x)

    return make


WRONG = {
    "missing": (lambda folder: None, "reference cannot be read as npy .*No such file.*img_emb_1.npy, fetch it anew"),
    "no metadata": (no_metadata, "file does not exist, .*metadata_1.parquet, run the stage"),
    "short metadata": (short_metadata, "metadata have 5 rows for 6 vectors, .*metadata_1.parquet, fetch both anew"),
    "truncated": (truncated, "reference cannot be read as npy .*img_emb_1.npy, fetch it anew"),
    "width": (
        lambda f: laion(f, "1", vectors(0, 5, 7)),
        "vectors have 7 entries, the queries' have 12, .*img_emb_1.npy",
    ),
    "kind": (
        lambda f: laion(f, "1", np.ones((3, 4), int)),
        r"reference is int64\[3, 4\], .*img_emb_1.npy, give float16",
    ),
    "NaN": (spoilt(np.nan), "the vector of [0-9a-f]{32} holds NaN.*img_emb_1.npy, mend"),
    "zero": (spoilt(0), "the vector of [0-9a-f]{32} has no length, .*img_emb_1.npy, mend"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_reference_is_one_clear_line(tmp_path, case):
    make, line = WRONG[case]
    words, _ = written(tmp_path)
    make(tmp_path)
    words += ["--reference", str(tmp_path / "img_emb_1.npy"), "--reference-metadata", str(tmp_path)]
    with pytest.raises(UserError, match=line) as error:
        run(words, tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "0"], "--k: 0 is less than 1; training images kept for each candidate, from 1 to 1024"),
        (["--k", "1025"], "--k: 1025 is greater than 1024"),
        (["--recall-queries", "0"], "--recall-queries: 0 is less than 1; queries searched exactly as well"),
        (["--probes", "0"], "--probes: 0 is less than 1; cells of 1,024"),
        (["--exact-below", "-1"], "--exact-below: -1 is less than 0"),
    ],
)
def test_a_number_out_of_range_is_one_line(words, message, tmp_path):
    given, _ = written(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        run([*given, *own(tmp_path, 2), *words], tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_command_refuses_another_model_and_nothing_to_search(tmp_path):
    words, _ = written(tmp_path)
    with pytest.raises(UserError, match="nothing to search, --own and --reference, give at least one file"):
        run(words, tmp_path)
    column = tables.vector_column(np.ones((1, WIDTH), np.float16))
    alien = pa.table({"sample_id": ["0" * 32], "image": column, "text": column})
    tables.write(tmp_path / "alien", alien, "embeddings", {"weights": "other"})
    with pytest.raises(UserError, match="embedded with another model than .*alien, embed both with one model"):
        run([*words, "--reference", str(tmp_path / "alien")], tmp_path)
    tables.write(tmp_path / "alien", alien, "embeddings", {"weights": "w"})
    with pytest.raises(UserError, match="the metadata table lacks a sample of the embeddings, 0000"):
        run([*words, "--own", str(tmp_path / "alien")], tmp_path)


# ------------------------------------------------------------------------------------------------ in dedup


def test_dedup_decides_alike_with_neighbours_of_our_own_from_elsewhere(tmp_path):
    words, samples = written(tmp_path)
    run(words + own(tmp_path, 2), tmp_path)
    near = tables.read(tmp_path / "out", "neighbours")
    options = DedupOptions(0.3, 2)
    assert dedup.deduplicate(samples, options, search.merge([near], 1)).equals(dedup.deduplicate(samples, options))


def test_a_neighbour_from_elsewhere_drops_a_candidate(tmp_path):
    words, samples = written(tmp_path)
    victim = np.flatnonzero(samples.pools == "candidate")[0]
    laion(tmp_path, "1", samples.embeddings[[victim]], ids=False)
    run([*words, "--reference", str(tmp_path / "img_emb_1.npy")], tmp_path)
    table = dedup.deduplicate(samples, DedupOptions(1e-9, -1), tables.read(tmp_path / "out", "neighbours"))
    row = table.to_pylist()[victim]
    assert (row["distance"], row["nearest_id"], row["reason"]) == (0.0, "img_emb_1#0", "near-duplicate")


def test_neighbours_of_strangers_are_refused(tmp_path):
    _, samples = written(tmp_path)
    alien = pa.table([["f" * 32], pa.array([1], pa.int32()), ["r"], [0.1]], schema=tables.SCHEMAS["neighbours"])
    with pytest.raises(UserError, match="a neighbours table has a sample that the embeddings lack, ffff"):
        dedup.deduplicate(samples, DedupOptions(), alien)


def test_the_curve_counts_candidates_and_expects_the_papers_share():
    rows = [("candidate", d, m) for d, m in ((0.05, "clip"), (0.1, "clip+phash"), (0.25, "clip"), (0.45, "clip"))]
    rows += [
        ("candidate", 0.7, "phash"),
        ("candidate", 0.9, None),
        ("candidate", None, None),
        ("control", 0.01, "clip"),
    ]
    columns = dict(zip(("pool", "distance", "method"), map(list, zip(*rows, strict=True)), strict=True))
    duplicates = pa.table(columns)
    curve = {round(row["threshold"], 2): row for row in dedup.threshold_curve(duplicates).to_pylist()}
    assert len(curve) == 20 and [curve[t]["within"] for t in (0.05, 0.1, 0.15, 0.5, 1.0)] == [0, 1, 2, 4, 6]
    assert [curve[t]["dropped"] for t in (0.05, 0.1, 0.5, 1.0)] == [2, 3, 5, 6]
    assert curve[0.5]["true_duplicates"] == pytest.approx(1 + 0.96 + 0.64 + 0.08)
    assert curve[0.15]["true_duplicates"] == pytest.approx(1.96) and curve[0.55]["true_duplicates"] is None
    bins = dedup.checked_bins(duplicates).to_pylist()
    assert [b["candidates"] for b in bins] == [1, 1, 1, 0, 1]
    assert sum(b["true_duplicates"] for b in bins) == pytest.approx(curve[0.5]["true_duplicates"])
