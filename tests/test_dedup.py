"""Near-duplicates and groups against plain loops over every pair, and the rules at the edges of the thresholds."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mia import cli, dedup, tables
from mia.config import DedupOptions
from mia.errors import UserError

LOOSE = DedupOptions(max_distance=0.5, max_hamming=6)


def sample(*rows: tuple) -> dedup.Sample:
    """Rows of (id, pool, caption, vector, hash)."""
    ids, pools, captions, vectors, hashes = zip(*rows, strict=True)
    return dedup.Sample(
        np.array(ids, dtype=object), np.array(pools, dtype=object), np.array(captions, dtype=object),
        np.array(vectors, dtype=np.float32), np.array(hashes, dtype=np.uint64),
    )  # fmt: skip


def angle(degrees: float) -> tuple[float, float]:
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def far(number: int) -> int:
    """Hashes of 64 bits that differ from each other in many bits."""
    return int(np.random.default_rng(number).integers(0, 2**63)) * 2 + number % 2


def found(samples: dedup.Sample, options: DedupOptions = LOOSE) -> dict[str, dict]:
    table = dedup.deduplicate(samples, options)
    return {row["sample_id"]: row for row in tables.check(table, "duplicates").to_pylist()}


def crowd(seed: int, n: int = 90) -> dedup.Sample:
    """Clusters of look-alikes in five dimensions, hashes of a few flipped bits, and few captions, over three pools."""
    r = np.random.default_rng(seed)
    centres = r.normal(size=(14, 5))
    which = r.integers(0, 14, n)
    x = centres[which] + r.normal(size=(n, 5)) * r.choice([0.02, 0.2, 0.5], (n, 1))
    base = np.array([far(i) for i in range(20)], dtype=np.uint64)[r.integers(0, 20, n)]
    flips = [sum(1 << int(b) for b in r.choice(64, r.integers(0, 9), replace=False)) for _ in range(n)]
    pools = r.choice(["member", "candidate", "control"], n)
    captions = [["A cat", "a CAT", "dog"][i] if i < 3 else f"caption {j}" for j, i in enumerate(r.integers(0, 25, n))]
    ids = [tables.sample_id(f"{seed} {i}", captions[i]) for i in range(n)]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return sample(*zip(ids, pools, captions, unit, [int(b) ^ f for b, f in zip(base, flips, strict=True)], strict=True))


# ------------------------------------------------------------------------------------------------ oracles


def distance(a: np.ndarray, b: np.ndarray) -> float:
    lengths = [math.sqrt(sum(float(p) ** 2 for p in x)) for x in (a, b)]
    return math.sqrt(sum((float(p) / lengths[0] - float(q) / lengths[1]) ** 2 for p, q in zip(a, b, strict=True)))


def differing(a: int, b: int) -> int:
    return bin(int(a) ^ int(b)).count("1")


def oracle(samples: dedup.Sample, options: DedupOptions) -> dict[str, dict]:
    against = {"member": (), "candidate": ("member",), "control": ("member", "candidate")}
    rows, n = {}, len(samples.ids)
    for i in range(n):
        others = [j for j in range(n) if samples.pools[j] in against[samples.pools[i]]]
        row = {"distance": None, "hamming": None, "method": None, "reason": None, "nearest_id": None}
        if others:
            by_distance = min(others, key=lambda j: distance(samples.embeddings[i], samples.embeddings[j]))
            by_bits = min(others, key=lambda j: differing(samples.phash[i], samples.phash[j]))
            row["distance"] = distance(samples.embeddings[i], samples.embeddings[by_distance])
            row["hamming"] = differing(samples.phash[i], samples.phash[by_bits])
            clip, bits = row["distance"] < options.max_distance, row["hamming"] <= options.max_hamming
            row["method"] = {(1, 1): "clip+phash", (1, 0): "clip", (0, 1): "phash", (0, 0): None}[clip, bits]
            row["reason"] = "near-duplicate" if clip or bits else None
            row["nearest_id"] = samples.ids[by_bits if bits and not clip else by_distance]
        rows[samples.ids[i]] = row
    group = {i: i for i in range(n)}
    kept = [i for i in range(n) if rows[samples.ids[i]]["reason"] is None]
    changing = True
    while changing:  # spread the smallest id along every link until nothing changes
        changing = False
        for i in kept:
            for j in kept:
                linked = (
                    distance(samples.embeddings[i], samples.embeddings[j]) < options.max_distance
                    or differing(samples.phash[i], samples.phash[j]) <= options.max_hamming
                    or samples.captions[i].casefold() == samples.captions[j].casefold()
                )
                if linked and samples.ids[group[i]] < samples.ids[group[j]]:
                    group[j], changing = group[i], True
    return {name: row | {"group": samples.ids[group[i]]} for i, (name, row) in enumerate(rows.items())}


# ------------------------------------------------------------------------------------------------ hashes


def test_hamming_nearest_agrees_with_strings_of_bits():
    r = np.random.default_rng(1)
    a, b = (r.integers(0, 2**64, size, dtype=np.uint64) for size in (50, 33))
    index, bits = dedup.hamming_nearest(a, b)
    for row in range(50):
        every = [sum(p != q for p, q in zip(f"{a[row]:064b}", f"{other:064b}", strict=True)) for other in b]
        assert (index[row], bits[row]) == (every.index(min(every)), min(every))
    assert bits.dtype == np.int64


def test_hamming_is_the_same_in_any_blocks(monkeypatch):
    r = np.random.default_rng(2)
    a, b = (r.integers(0, 2**64, size, dtype=np.uint64) for size in (50, 33))
    whole = dedup.hamming_nearest(a, b)
    samples = crowd(5)
    table = dedup.deduplicate(samples, LOOSE)
    for pairs in (1, 100, 33 * 7):
        monkeypatch.setattr(dedup, "PAIRS", pairs)
        parts = dedup.hamming_nearest(a, b)
        assert (parts[0] == whole[0]).all() and (parts[1] == whole[1]).all()
        assert dedup.deduplicate(samples, LOOSE).equals(table)


def test_hamming_by_hand():
    every = np.array([0, 2**64 - 1, 2**63], dtype=np.uint64)
    index, bits = dedup.hamming_nearest(np.array([0b111, 2**64 - 2, 2**63 + 1], dtype=np.uint64), every)
    assert index.tolist() == [0, 1, 2] and bits.tolist() == [3, 1, 1]


# ------------------------------------------------------------------------------------------------ whole table


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options", [LOOSE, DedupOptions(0.2, 2), DedupOptions(0.9, -1), DedupOptions(0.0, 8)], ids=str)
def test_the_table_agrees_with_loops_over_all_pairs(seed, options):
    samples = crowd(seed)
    rows, wanted = found(samples, options), oracle(samples, options)
    assert set(rows) == set(wanted)
    for name, want in wanted.items():
        row = rows[name]
        assert {k: row[k] for k in ("hamming", "method", "reason", "group")} == {
            k: want[k] for k in ("hamming", "method", "reason", "group")
        }
        assert row["distance"] == (None if want["distance"] is None else pytest.approx(want["distance"], abs=1e-7))
        assert row["nearest_id"] == want["nearest_id"]


def test_the_crowd_is_no_easy_case():
    rows = oracle(crowd(0), LOOSE).values()
    assert {row["method"] for row in rows} == {None, "clip", "phash", "clip+phash"}
    groups = [row["group"] for row in rows]
    assert 3 < max(groups.count(g) for g in groups) < 40


@pytest.mark.parametrize("seed", [0, 1])
def test_row_order_changes_no_row(seed):
    samples = crowd(seed)
    order = np.random.default_rng(9).permutation(len(samples.ids))
    shuffled = dedup.Sample(*(getattr(samples, field.name)[order] for field in dataclasses.fields(samples)))
    before, after = found(samples), found(shuffled)
    for name, row in before.items():
        near, close = row.pop("distance"), after[name].pop("distance")
        assert (near is None) == (close is None) and (near is None or close == pytest.approx(near, abs=1e-7))
        assert row == after[name]


# ------------------------------------------------------------------------------------------------ the rules, by hand


def test_the_paper_keeps_a_candidate_at_the_threshold_and_drops_one_below():
    """arXiv 2306.12983: a non-member iff the distance between unit vectors is at least the threshold."""
    edge = float(np.sqrt(2))
    rows = found(
        sample(
            ("m", "member", "m", (3, 0), far(1)), ("at", "candidate", "at", (0, 2), far(2)),
            ("below", "candidate", "below", (1e-6, 2), far(3)),
        ),
        DedupOptions(edge, -1),
    )  # fmt: skip
    assert rows["at"]["distance"] == edge and rows["at"]["reason"] is None and rows["at"]["method"] is None
    assert rows["below"]["reason"] == "near-duplicate" and rows["below"]["method"] == "clip"
    assert rows["m"]["group"] == "m"  # the same rule links look-alikes: m is not in the group of "at"


def test_a_hash_is_alike_up_to_its_limit_and_minus_one_switches_it_off():
    def with_bits(bits: int, limit: int) -> str | None:
        samples = sample(("m", "member", "m", (1, 0), 0), ("c", "candidate", "c", (-1, 0), 2**bits - 1))
        return found(samples, DedupOptions(0.5, limit))["c"]["method"]

    assert [with_bits(bits, 6) for bits in (0, 6, 7, 63)] == ["phash", "phash", None, None]
    assert [with_bits(bits, 0) for bits in (0, 1)] == ["phash", None]
    assert with_bits(0, -1) is None
    apart = sample(("a", "member", "a", (1, 0), 0), ("b", "member", "b", (-1, 0), 0))
    assert found(apart, DedupOptions(0.5, -1))["b"]["group"] == "b" and found(apart, LOOSE)["b"]["group"] == "a"


def test_a_distance_of_zero_switches_the_embedding_off():
    same = sample(("m", "member", "m", (1, 0), far(1)), ("c", "candidate", "c", (1, 0), far(2)))
    assert found(same, DedupOptions(0.0, -1))["c"]["reason"] is None
    assert found(same, DedupOptions(1e-6, -1))["c"]["reason"] == "near-duplicate"


def test_candidates_are_held_against_members_and_controls_against_both():
    rows = found(
        sample(
            ("m1", "member", "1", angle(0), far(1)), ("m2", "member", "2", angle(1), far(2)),
            ("c1", "candidate", "3", angle(90), far(3)), ("c2", "candidate", "4", angle(91), far(4)),
            ("k1", "control", "5", angle(180), far(5)), ("k2", "control", "6", angle(181), far(6)),
            ("k3", "control", "7", angle(92), far(7)), ("k4", "control", "8", angle(2), far(8)),
            ("c3", "candidate", "9", angle(-1), far(9)), ("c4", "candidate", "10", angle(182), far(10)),
        )
    )  # fmt: skip
    dropped = {name for name, row in rows.items() if row["reason"]}
    assert dropped == {"k3", "k4", "c3"} | {"k1", "k2"}  # c4 is a candidate, so k1 and k2 go, and c4 stays
    assert rows["m1"]["distance"] is None and rows["m1"]["nearest_id"] is None and rows["m1"]["hamming"] is None
    assert rows["c2"]["nearest_id"] == "m2" and rows["k3"]["nearest_id"] == "c2"
    assert rows["c2"]["distance"] == pytest.approx(2 * math.sin(math.radians(45)), abs=1e-6)


def test_members_are_never_dropped_not_even_for_each_other():
    r = np.random.default_rng(0)
    rows = found(sample(*((f"m{i}", "member", "same", angle(r.normal()), 7) for i in range(30))))
    assert {row["reason"] for row in rows.values()} == {None}
    assert {row["group"] for row in rows.values()} == {"m0"}


def test_without_a_pool_to_hold_against_nothing_is_dropped():
    rows = found(sample(("c", "candidate", "a", (1, 0), 1), ("k", "control", "b", (0, 1), far(1))))
    assert rows["c"]["distance"] is None and rows["c"]["reason"] is None
    assert rows["k"]["distance"] == pytest.approx(math.sqrt(2), abs=1e-6)
    alone = found(sample(("only", "candidate", "a", (1, 0), 1)))
    assert alone["only"]["group"] == "only" and alone["only"]["nearest_id"] is None


def test_a_chain_of_links_of_three_kinds_is_one_group_named_by_its_smallest_id():
    chain = [
        ("d", "member", "one", angle(0), far(1)), ("c", "member", "two", angle(20), far(2)),  # alike to CLIP: 0.347
        ("b", "member", "three", angle(120), far(2) ^ 0b1),  # c's hash but for a bit
        ("a", "candidate", "THREE", angle(240), far(4)),  # b's caption
        ("e", "candidate", "else", angle(300), far(5)),
    ]  # fmt: skip
    for rows in (chain, chain[::-1], [chain[i] for i in (2, 4, 0, 3, 1)]):
        assert {name: row["group"] for name, row in found(sample(*rows)).items()} == dict(
            zip("abcde", "aaaae", strict=True)
        )


def test_a_dropped_sample_links_nobody():
    rows = found(
        sample(
            ("m", "member", "m", angle(0), far(1)), ("x", "candidate", "x", angle(20), far(2)),  # dropped, near both
            ("c", "candidate", "c", angle(40), far(3)),
        )
    )  # fmt: skip
    assert rows["x"]["reason"] and rows["x"]["group"] == "x"
    assert rows["c"]["reason"] is None and rows["c"]["group"] == "c" and rows["m"]["group"] == "m"


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("A Cat", "a cAT", True), ("STRASSE", "straße", True), ("ΣΑΣ", "σας", True), ("a cat", "a cat.", False),
        ("a cat", "a  cat", False), ("é", "e", False),
    ],
)  # fmt: skip
def test_captions_are_identical_by_casefold(one, two, same):
    rows = found(sample(("a", "member", one, (1, 0), far(1)), ("b", "candidate", two, (-1, 0), far(2))))
    assert rows["b"]["reason"] is None  # one caption groups, it does not drop
    assert rows["b"]["group"] == ("a" if same else "b")


def test_the_method_says_what_found_it_and_nearest_is_who_it_was():
    members = [("m1", "member", "1", angle(0), 0), ("m2", "member", "2", angle(90), 2**64 - 1)]
    rows = found(
        sample(
            *members, ("both", "candidate", "3", angle(1), 1), ("clip", "candidate", "4", angle(1), 2**32 - 1),
            ("hash", "candidate", "5", angle(200), 2**64 - 2), ("none", "candidate", "6", angle(180), 2**32 - 1),
        )
    )  # fmt: skip
    assert {n: (rows[n]["method"], rows[n]["nearest_id"]) for n in ("both", "clip", "hash", "none")} == {
        "both": ("clip+phash", "m1"), "clip": ("clip", "m1"), "hash": ("phash", "m2"), "none": (None, "m2")
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the command


def written(tmp_path, samples: dedup.Sample, shards: int, dead: tuple[str, ...] = ()) -> list[str]:
    """The tables that the command reads, and its flags; `dead` samples have no image."""
    made = {"stage": "test"}
    about = {"sample_id": samples.ids, "url": samples.ids, "caption": samples.captions, "pool": samples.pools}
    about |= {"source": ["s"] * len(samples.ids)}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in about.items()})
    for field in tables.SCHEMAS["metadata"]:
        if field.name not in table.column_names:
            table = table.append_column(field.name, pa.nulls(len(table), field.type))
    tables.write(tmp_path / "metadata", table, "metadata", made)
    words = ["dedup", "--metadata", str(tmp_path / "metadata"), "--output", str(tmp_path / "out")]
    shard, ok = tables.shard_of(list(samples.ids), shards), ~np.isin(samples.ids, dead)
    for number in range(shards):
        here = np.flatnonzero(shard == number)
        rows = []
        for i in here:
            picture = {
                "sha256": "0",
                "bytes": b"",
                "width": 1,
                "height": 1,
                "format": "png",
                "phash": int(samples.phash[i]),
            }
            rows.append(
                {"sample_id": samples.ids[i], "status": "ok" if ok[i] else "http_4xx", "detail": ""}
                | (picture if ok[i] else {})
            )
        images = pa.Table.from_pylist(rows, schema=tables.SCHEMAS["images"])
        vector = tables.vector_column(samples.embeddings[here[ok[here]]].astype(np.float16))
        ids = pa.array(samples.ids[here[ok[here]]], pa.string())
        tables.write(tmp_path / f"i{number}-{shards}", images, "images", made)
        embedded = pa.table({"sample_id": ids, "image": vector, "text": vector})
        tables.write(tmp_path / f"e{number}-{shards}", embedded, "embeddings", made)
        words += [
            "--images",
            str(tmp_path / f"i{number}-{shards}"),
            "--embeddings",
            str(tmp_path / f"e{number}-{shards}"),
        ]
    return words


def test_one_shard_or_seven_give_one_table_without_the_dead(tmp_path):
    samples = crowd(3)
    dead = tuple(samples.ids[:5])
    alive = dedup.Sample(*(getattr(samples, field.name)[5:] for field in dataclasses.fields(samples)))
    tables_found = []
    for shards in (1, 7):
        cli.commands.main(written(tmp_path, samples, shards, dead), standalone_mode=False)
        tables_found.append(tables.read(tmp_path / "out", "duplicates"))
    assert tables_found[0].equals(tables_found[1])
    rows = {row["sample_id"]: row for row in tables_found[0].to_pylist()}
    half = dataclasses.replace(alive, embeddings=alive.embeddings.astype(np.float16).astype(np.float32))
    wanted = oracle(half, DedupOptions())
    assert {name: row["reason"] for name, row in rows.items()} == {name: row["reason"] for name, row in wanted.items()}
    assert {name: row["group"] for name, row in rows.items()} == {name: row["group"] for name, row in wanted.items()}


def test_shards_in_any_order_give_the_same_bytes(tmp_path):
    words = written(tmp_path, crowd(3), 5)
    cli.commands.main(words, standalone_mode=False)
    wanted = (tmp_path / "out").read_bytes()
    pairs = [words[5:][i : i + 2] for i in range(0, len(words) - 5, 2)]
    cli.commands.main([*words[:5], *(word for pair in reversed(pairs) for word in pair)], standalone_mode=False)
    assert (tmp_path / "out").read_bytes() == wanted


# ------------------------------------------------------------------------------------------------ shard by shard


def call(*words: object) -> None:
    cli.commands.main([str(word) for word in words], standalone_mode=False)


def flagged(flag: str, paths: list) -> list:
    return [word for path in paths for word in (flag, path)]


def in_jobs(folder: pathlib.Path, words: list[str], shards: int, *options: object) -> list:
    """Runs what the workflow runs before `dedup`; returns the words of `dedup`."""
    images, embeddings = ([folder / f"{kind}{n}-{shards}" for n in range(shards)] for kind in "ie")
    near, links = ([folder / f"{kind}{n}" for n in range(shards)] for kind in ("near", "links"))
    for own, output in zip(embeddings, near, strict=True):
        call(
            "neighbours", *words[1:3], *flagged("--embeddings", embeddings), "--own", own, "--output", output, "--k", 2
        )
    given = [*flagged("--images", images), *flagged("--embeddings", embeddings), *flagged("--neighbours", near)]
    call("matches", *words[1:3], *given, "--output", folder / "matches", *options)
    for number, output in enumerate(links):
        met = flagged("--other", embeddings[:number])
        call("links", "--matches", folder / "matches", "--own", embeddings[number], *met, "--output", output, *options)
    return ["dedup", *words[1:5], "--matches", folder / "matches", *flagged("--links", links[::-1]), *options]


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("options", [LOOSE, DedupOptions(0.2, 2), DedupOptions(0.9, -1), DedupOptions(0.0, 8)], ids=str)
def test_jobs_of_any_number_give_the_table_of_one(tmp_path, seed, shards, options):
    samples = crowd(seed)
    words = written(tmp_path, samples, shards)
    chosen = ["--max-distance", str(options.max_distance), "--max-hamming", str(options.max_hamming)]
    call(*words, *chosen)
    whole = tables.read(tmp_path / "out", "duplicates")
    last = in_jobs(tmp_path, words, shards, *chosen)
    call(*last)
    assert tables.read(tmp_path / "out", "duplicates").equals(whole)
    half = dataclasses.replace(samples, embeddings=samples.embeddings.astype(np.float16).astype(np.float32))
    wanted = oracle(half, options)
    assert {row["sample_id"]: row["group"] for row in whole.to_pylist()} == {n: w["group"] for n, w in wanted.items()}
    before = (tmp_path / "out").read_bytes()
    call(*last)
    assert (tmp_path / "out").read_bytes() == before


def test_in_jobs_too_a_dropped_sample_links_nobody(tmp_path):
    named = {i: tables.sample_id(i, "c") for i in "mxc"}
    samples = sample(
        (named["m"], "member", "m", angle(0), far(1)), (named["x"], "candidate", "x", angle(20), far(2)),
        (named["c"], "candidate", "c", angle(40), far(3)),
    )  # fmt: skip
    call(*in_jobs(tmp_path, written(tmp_path, samples, 2), 2))
    rows = {row["sample_id"]: row for row in tables.read(tmp_path / "out", "duplicates").to_pylist()}
    assert rows[named["x"]]["reason"] and not rows[named["c"]]["reason"]
    assert all(row["group"] == name for name, row in rows.items())


def other_matches(folder: pathlib.Path, words: list) -> list:
    table = tables.read(folder / "matches", "matches")
    made = tables.provenance(folder / "matches") | {"seed": 1}
    tables.write(folder / "matches", table, "matches", made)
    return words


def other_option(folder: pathlib.Path, words: list) -> list:
    return [*words, "--max-distance", 0.4]


def other_version(folder: pathlib.Path, words: list) -> list:
    made = tables.provenance(folder / "links1") | {"version": 1}
    tables.write(folder / "links1", tables.read(folder / "links1", "links"), "links", made)
    return words


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder, words: words[:-2], "pairs of shards that were not compared: 1, 2 links tables, give those of"),
        (lambda folder, words: [*words[:-6], *words[-4:]], "pairs of shards that were not compared: 3, 2 links tables"),
        (other_matches, "links were made of other matches, .*links2, run `mia links` again"),
        (other_option, "made under other options or by another version, .*matches, use the same, or make it anew"),
        (other_version, "made under other options or by another version, .*links1, use the same, or make it anew"),
        (lambda folder, words: words[:-6], "nothing to group, or in two ways, --images and --embeddings, --matches"),
        (lambda folder, words: words[:5], "nothing to group, or in two ways, "),
        (lambda folder, words: [*words, "--embeddings", folder / "e0-3"], "nothing to group, or in two ways, "),
        (lambda folder, words: (folder / "links1").unlink() or words, "Parquet file does not exist, .*links1, run the"),
    ],
)
def test_dedup_refuses_links_that_do_not_fit(harm, message, tmp_path):
    words = harm(tmp_path, in_jobs(tmp_path, written(tmp_path, crowd(3), 3), 3))
    with pytest.raises(UserError, match=message) as caught:
        call(*words)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_links_of_other_embeddings_or_options_are_refused(tmp_path):
    in_jobs(tmp_path, written(tmp_path, crowd(3), 2), 2)
    written(tmp_path, crowd(4), 3)
    words = ["links", "--matches", tmp_path / "matches", "--output", tmp_path / "out"]
    for own, other in (("e0-2", "e1-3"), ("e1-3", "e0-2")):
        with pytest.raises(UserError, match="embeddings are not those that were matched, .*e1-3, run `mia matches` ag"):
            call(*words, "--own", tmp_path / own, "--other", tmp_path / other)
    with pytest.raises(UserError, match="matches were made under other options or by another version, .*matches, use"):
        call(*words, "--own", tmp_path / "e0-2", "--max-hamming", 5)
    with pytest.raises(UserError, match="links table has two rows with one key"):
        call(*words, "--own", tmp_path / "e0-2", *flagged("--other", [tmp_path / "e1-2"] * 2))
    assert not (tmp_path / "out").exists()


def test_matches_of_strangers_are_refused(tmp_path):
    in_jobs(tmp_path, written(tmp_path, crowd(3), 2), 2)
    given = [*written(tmp_path, crowd(4), 2)[1:3], "--output", tmp_path / "out", "--neighbours", tmp_path / "near0"]
    shards = [*flagged("--images", [tmp_path / "i0-2"]), *flagged("--embeddings", [tmp_path / "e0-2"])]
    with pytest.raises(UserError, match="neighbours were searched for other embeddings, .*near0, run `mia neighbours`"):
        call("matches", *given, *shards)


# ------------------------------------------------------------------------------------------------ bad embeddings


def unlike(tmp_path) -> None:
    table = tables.read(tmp_path / "e1-2", "embeddings")
    ids, wide = table["sample_id"], tables.vector_column(np.ones((len(table), 9), np.float16))
    tables.write(tmp_path / "e1-2", pa.table({"sample_id": ids, "image": wide, "text": wide}), "embeddings", {})


def ragged(tmp_path) -> None:
    table = tables.read(tmp_path / "e1-2", "embeddings")
    lists = pa.array(table["image"].to_pylist(), pa.list_(pa.float16()))
    pq.write_table(table.set_column(1, "image", lists), tmp_path / "e1-2")


def twice(tmp_path) -> None:
    shutil.copy(tmp_path / "e0-2", tmp_path / "e1-2")


def imageless(tmp_path) -> None:
    pq.write_table(tables.read(tmp_path / "e1-2", "embeddings").drop("image"), tmp_path / "e1-2")


def infinite(tmp_path) -> None:
    table = tables.read(tmp_path / "e1-2", "embeddings")
    spoilt = tables.vectors(table["image"], np.float16).copy()
    spoilt[0, 0] = np.inf
    pq.write_table(table.set_column(1, "image", tables.vector_column(spoilt)), tmp_path / "e1-2")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (unlike, "embeddings are 9 wide, others .*, .*e1-2, use one encoder"),
        (ragged, "embeddings column 'image' is list<.*, .*e1-2, make it anew"),
        (twice, "embeddings table has two rows with one key, [0-9a-f]{32}, give every shard once"),
        (imageless, "embeddings table has no column 'image', .*e1-2"),
        (infinite, "the vector of .* holds NaN, infinity or too large a number"),
        (lambda folder: (folder / "e1-2").unlink(), "embeddings file does not exist, .*e1-2"),
    ],
)
def test_the_command_refuses_embeddings_that_do_not_fit(harm, message, tmp_path):
    words = written(tmp_path, crowd(3), 2)
    harm(tmp_path)
    with pytest.raises(UserError, match=message):
        cli.commands.main(words, standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_the_command_reads_no_text_vectors(tmp_path):
    words = written(tmp_path, crowd(3), 2)
    cli.commands.main(words, standalone_mode=False)
    wanted = tables.read(tmp_path / "out", "duplicates")
    for number in range(2):
        path = tmp_path / f"e{number}-2"
        pq.write_table(tables.read(path, "embeddings").drop("text"), path)
    cli.commands.main(words, standalone_mode=False)
    assert tables.read(tmp_path / "out", "duplicates").equals(wanted)


def test_the_command_refuses_embeddings_without_their_images(tmp_path):
    words = written(tmp_path, crowd(3), 2)
    without = words.index(str(tmp_path / "i1-2"))
    with pytest.raises(
        UserError, match="a table lacks a sample that another one has, [0-9a-f]{32}, make both from the same"
    ):
        cli.commands.main(words[: without - 1] + words[without + 1 :], standalone_mode=False)
    assert not (tmp_path / "out").exists()
