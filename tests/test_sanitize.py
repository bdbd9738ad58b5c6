"""Members that look like non-members stay, nobody is judged by a classifier that saw him, and groups stay whole."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from mia import cli, sanitize, tables
from mia.config import SanitizeOptions
from mia.errors import UserError

SMALL = SanitizeOptions(folds=3, keep_above=0.35, hidden_scale=1 / 128, max_epochs=100)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def population(seed: int = 0, n: int = 240, width: int = 48) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text states of n non-members, and of n members of which half are like them and half are not; kinds; groups."""
    r = np.random.default_rng(seed)
    kind = np.repeat(["nonmember", "alike", "unlike"], [n, n // 2, n // 2])
    states = r.normal(size=(2 * n, width)).astype(np.float32)
    states[kind == "unlike"] += 1.5
    order = r.permutation(2 * n)
    return states[order], kind[order], np.array([f"g{i:03d}" for i in range(2 * n)])


@pytest.fixture(scope="module")
def kept() -> tuple[np.ndarray, np.ndarray, list[dict]]:
    states, kind, group = population()
    return kind, *sanitize.keep_members(states, kind != "nonmember", group, SMALL, 0)


# ------------------------------------------------------------------------------------------------ three rounds


def test_the_members_kept_are_those_like_non_members(kept):
    kind, keep, _ = kept
    members = keep & (kind != "nonmember")
    assert (kind[members] == "alike").mean() > 0.95  # one half before
    assert keep[kind == "alike"].mean() > 0.5


def test_no_non_member_is_ever_dropped(kept):
    kind, keep, _ = kept
    assert keep.dtype == bool and keep[kind == "nonmember"].all()


def test_each_round_reports_what_it_did(kept):
    kind, keep, reports = kept
    assert [r["round"] for r in reports] == [1, 2, 3]
    assert reports[0]["members_in"] == 240 and {r["nonmembers"] for r in reports} == {240}
    assert [r["members_in"] for r in reports[1:]] == [r["members_kept"] for r in reports[:-1]]
    assert all(0 < r["members_kept"] <= r["members_in"] for r in reports)
    assert reports[-1]["members_kept"] == (keep & (kind != "nonmember")).sum()
    assert 0.65 < reports[0]["auc"] < 0.85  # half of the members are at AUC 1, half at AUC 0.5
    assert 0.3 < reports[-1]["auc"] < 0.65  # nothing is left to tell them by
    json.dumps(reports)


def test_the_seed_decides_and_nothing_else():
    states, kind, group = population(1, 60)
    options = SanitizeOptions(folds=2, keep_above=0.35, hidden_scale=1 / 512, max_epochs=4)

    def run(seed: int) -> list[bool]:
        return sanitize.keep_members(states, kind != "nonmember", group, options, seed)[0].tolist()

    first = run(3)
    torch.manual_seed(99)
    np.random.seed(99)
    assert run(3) == first and run(4) != first


def test_torchs_global_generator_is_left_alone():
    states, kind, group = population(1, 30)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sanitize.cross_fitted(states, kind == "nonmember", group, sanitize.ROUNDS[1], SMALL, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_high_bar_keeps_fewer_and_none_is_an_error():
    states, kind, group = population(2, 60)
    states[kind != "nonmember"] += 3  # all members unlike
    with pytest.raises(
        UserError, match="^no members are left after round 1, sanitize.keep_above, lower it, or bring more"
    ):
        sanitize.keep_members(states, kind != "nonmember", group, SMALL, 0)


def test_fewer_members_than_folds_is_an_error():
    states, kind, group = population(3, 20)
    few = (np.cumsum(kind != "nonmember") <= 2) | (kind == "nonmember")
    with pytest.raises(UserError, match="one class has 2 groups for 3 folds, sanitize.folds, lower it"):
        sanitize.keep_members(states[few], kind[few] != "nonmember", group[few], SMALL, 0)


def test_rounds_are_the_papers():
    """attacks.md 1.8: (0) linear, Adam 1e-3, batch 10 000; (1) 4096, 1e-5, 2 000; (2) 8192 -> 512, 1e-5, 128."""
    found = [(r.hidden, r.learning_rate, r.batch_size) for r in sanitize.ROUNDS]
    assert found == [((), 1e-3, 10_000), ((4096,), 1e-5, 2_000), ((8192, 512), 1e-5, 128)]


def test_networks_are_the_papers_scaled():
    def shape(net: torch.nn.Module) -> list:
        return [
            (type(m).__name__, *m.weight.shape) if isinstance(m, torch.nn.Linear) else type(m).__name__ for m in net
        ]

    one, two, three = (shape(sanitize.network(10, spec, 1 / 64)) for spec in sanitize.ROUNDS)
    between = ["LayerNorm", "Dropout", "ReLU"]
    assert one == [("Linear", 1, 10)]
    assert two == [("Linear", 64, 10), *between, ("Linear", 1, 64)]
    assert three == [("Linear", 128, 10), *between, ("Linear", 8, 128), *between, ("Linear", 1, 8)]
    assert {m.p for m in sanitize.network(10, sanitize.ROUNDS[2], 1 / 64) if isinstance(m, torch.nn.Dropout)} == {0.5}


# ------------------------------------------------------------------------------------------------ cross-fitting


def by_group(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States that name the group and nothing else; all four rows of a group have its label."""
    r = np.random.default_rng(seed)
    group = np.repeat(np.arange(50), 4)
    label = r.permutation(np.repeat([True, False], 25))[group]
    return 8 * np.eye(50, dtype=np.float32)[group], label, np.array([f"g{i}" for i in group])


def area(score: np.ndarray, label: np.ndarray) -> float:
    """AUC by counting every pair."""
    pairs = [(1.0 if a > b else 0.5 if a == b else 0.0) for a in score[label] for b in score[~label]]
    return sum(pairs) / len(pairs)


def test_a_group_is_never_on_both_sides_of_a_fold():
    """Whoever has seen one row of a group knows the others: with groups split the AUC nears 1."""
    x, label, group = by_group()
    options = SanitizeOptions(folds=4, max_epochs=60)
    whole = sanitize.cross_fitted(x, label, group, sanitize.ROUNDS[0], options, 0, 0)
    split = sanitize.cross_fitted(x, label, np.arange(200).astype(str), sanitize.ROUNDS[0], options, 0, 0)
    assert area(split, label) > 0.8 and area(whole, label) < 0.65


def test_probabilities_of_the_positive_class():
    states, kind, group = population(4, 100)
    positive = kind == "unlike"
    found = sanitize.cross_fitted(states, positive, group, sanitize.ROUNDS[0], SMALL, 0, 0)
    assert found.dtype == np.float64 and found.shape == (200,) and ((found >= 0) & (found <= 1)).all()
    assert area(found, positive) > 0.9  # high = positive


def test_both_classes_weigh_the_same():
    """Without any signal an unbalanced classifier says the share of the positive, a balanced one says a half."""
    r = np.random.default_rng(0)
    x, label = np.ones((400, 30), dtype=np.float32), r.permutation(np.repeat([True, False], [40, 360]))
    options = SanitizeOptions(max_epochs=1000)
    found = sanitize.fit_predict(x, label, x[:5], sanitize.ROUNDS[0], options, 0)
    assert found == pytest.approx(0.5, abs=0.1)


# ------------------------------------------------------------------------------------------------ finish


def pooled(groups: int = 300, seed: int = 0) -> pa.Table:
    """Groups of one to four rows: of members, of non-members, or (one in ten) of both."""
    r = np.random.default_rng(seed)
    rows = []
    for number in range(groups):
        side = [[True], [False], [True, False]][r.choice(3, p=[0.3, 0.6, 0.1])]
        for row in range(r.choice([1, 1, 1, 2, 4])):
            url, member = f"{seed} {number} {row}", bool(side[row % len(side)])
            rows.append({"sample_id": tables.sample_id(url, "c"), "url": url, "caption": "c", "sha256": "0" * 64})
            rows[-1] |= {"member": member, "group": f"group {number}"}
    return pa.Table.from_pylist(rows).sort_by("sample_id")


def finished(
    rows: pa.Table, options: SanitizeOptions = SMALL, seed: int = 0, keep: np.ndarray | None = None
) -> list[dict]:
    keep = np.ones(len(rows), dtype=bool) if keep is None else keep
    dataset = sanitize.finish(rows.filter(pa.array(keep)), options, seed)
    return tables.check(sanitize.to_attack(dataset, options, seed), "dataset").to_pylist()


@pytest.mark.parametrize("fraction", [0.5, 0.2, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_hold_whole_groups_and_the_share_asked_for_on_both_sides(fraction, seed):
    options = SanitizeOptions(calibration_fraction=fraction)
    rows = finished(pooled(), options, seed)
    parts_of: dict[str, set] = {}
    for row in rows:
        parts_of.setdefault(row["group"], set()).add(row["part"])
    assert {len(parts) for parts in parts_of.values()} == {1}
    for member in (True, False):
        mine = [row["part"] for row in rows if row["member"] == member]
        assert abs(mine.count("calibration") - fraction * len(mine)) <= 4  # a group's size
    assert {row["weight"] for row in rows} == {1.0} and {row["part"] for row in rows} == {"calibration", "test"}


def test_without_limits_every_kept_row_is_in_the_dataset_as_it_was():
    rows = pooled()
    keep = np.random.default_rng(0).random(len(rows)) < 0.7
    found = finished(rows, keep=keep)
    names = rows.column_names
    assert [{name: row[name] for name in names} for row in found] == rows.filter(pa.array(keep)).to_pylist()


@pytest.mark.parametrize("limit", [1, 30, 90, 10_000])
def test_a_side_has_at_most_so_many_samples(limit):
    rows = pooled()
    available = {side: rows["member"].to_pylist().count(side) for side in (True, False)}
    found = finished(rows, SanitizeOptions(max_per_side=limit))
    for side in (True, False):
        assert sum(row["member"] == side for row in found) == min(limit, available[side])
    assert {row["sample_id"] for row in found} <= set(rows["sample_id"].to_pylist())
    groups = [{row["group"] for row in found if row["part"] == part} for part in tables.PARTS]
    assert not groups[0] & groups[1]


def test_a_higher_limit_only_adds():
    def chosen(limit: int) -> set:
        return {row["sample_id"] for row in finished(pooled(), SanitizeOptions(max_per_side=limit))}

    assert chosen(20) < chosen(50) < chosen(0)


@pytest.mark.parametrize("limit", [0, 31, 77])
def test_row_order_changes_nothing(limit):
    rows, options = pooled(), SanitizeOptions(max_per_side=limit)
    keep = np.random.default_rng(1).random(len(rows)) < 0.8
    order = np.random.default_rng(2).permutation(len(rows))
    assert finished(rows.take(order), options, keep=keep[order]) == finished(rows, options, keep=keep)


def test_the_seed_decides_the_parts_and_the_choice():
    rows, options = pooled(), SanitizeOptions(max_per_side=50)
    assert finished(rows, options, 0) == finished(rows, options, 0) != finished(rows, options, 1)


def test_parts_do_not_follow_the_id():
    """Halves by id would be shards: a part must not be a range of the (hashed) id space."""
    rows = finished(pooled())
    first = [row["part"] for row in rows[: len(rows) // 2]].count("calibration") / (len(rows) // 2)
    assert 0.35 < first < 0.65


def test_a_group_larger_than_the_calibration_part_goes_to_test():
    rows = pooled(60).to_pylist()
    for row in rows[:80]:
        row["group"] = "giant"
    found = finished(pa.Table.from_pylist(rows))
    assert {row["part"] for row in found if row["group"] == "giant"} == {"test"}
    for row in rows:
        row["group"] = "giant"
    with pytest.raises(UserError, match="^every group is larger than the calibration part, dedup, lower its limits"):
        finished(pa.Table.from_pylist(rows))


# ------------------------------------------------------------------------------------------------ the command

FATES = {  # pool, status of the image, reason of dedup -> the line of the dropped table that counts it
    ("member", "ok", None): None,
    ("candidate", "ok", None): None,
    ("member", "http_4xx", None): ("images", "http_4xx", "member"),
    ("candidate", "timeout", None): ("images", "timeout", "candidate"),
    ("candidate", "ok", "near-duplicate"): ("dedup", "near-duplicate", "candidate"),
    ("control", "ok", None): ("dedup", "only trains a negative control", "control"),
    ("control", "dns", None): ("images", "dns", "control"),
}


def prepared(tmp_path, shards: int, each: int = 12) -> list[str]:
    """Tables with `each` rows of every fate, and the command's flags."""
    metadata, images, duplicates = [], [], []
    empty = dict.fromkeys(tables.SCHEMAS["metadata"].names)
    for (pool, status, reason), number in ((fate, i) for fate in FATES for i in range(each)):
        url = f"{pool} {status} {reason} {number}"
        name = tables.sample_id(url, f"caption {number}")
        metadata.append(
            empty | {"sample_id": name, "url": url, "caption": f"caption {number}", "source": "s", "pool": pool}
        )
        image = {"sha256": f"sha of {url}", "bytes": b"", "width": 1, "height": 1, "format": "png", "phash": 1}
        images.append({"sample_id": name, "status": status, "detail": ""} | (image if status == "ok" else {}))
        if status == "ok":
            duplicates.append({"sample_id": name, "pool": pool, "group": name, "reason": reason})
    made = {"stage": "test"}
    for name, rows in (("metadata", metadata), ("duplicates", duplicates)):
        tables.write(tmp_path / name, pa.Table.from_pylist(rows, schema=tables.SCHEMAS[name]), name, made)
    words = ["sanitize", "--metadata", str(tmp_path / "metadata"), "--duplicates", str(tmp_path / "duplicates")]
    shard = tables.shard_of([row["sample_id"] for row in images], shards)
    for number in range(shards):
        here = [row for row, s in zip(images, shard, strict=True) if s == number]
        tables.write(
            tmp_path / f"i{number}", pa.Table.from_pylist(here, schema=tables.SCHEMAS["images"]), "images", made
        )
        words += ["--images", str(tmp_path / f"i{number}")]
    for flag in ("output", "attacked-output", "selection-output", "dropped-output", "report-output"):
        words += [f"--{flag}", str(tmp_path / flag)]
    return words


def test_the_command_counts_every_row_once_and_tells_no_label(tmp_path):
    words = prepared(tmp_path, 3)
    cli.commands.main([*words, "--method", "none", "--max-per-side", "10"], standalone_mode=False)
    dataset = tables.read(tmp_path / "output", "dataset")
    dropped = tables.read(tmp_path / "dropped-output", "dropped").to_pylist()
    counted = {(row["stage"], row["reason"], row["pool"]): row["rows"] for row in dropped}
    wanted = {line: 12 for line in FATES.values() if line}
    assert counted == wanted
    assert len(dataset) + sum(counted.values()) == 12 * len(FATES)
    assert all(row["url"].startswith(("member ok", "candidate ok None")) for row in dataset.to_pylist())
    assert all(row["member"] == row["url"].startswith("member") for row in dataset.to_pylist())
    attacked = tables.read(tmp_path / "attacked-output", "dataset")
    assert set(map(str, attacked.to_pylist())) < set(map(str, dataset.to_pylist()))
    sides = attacked["member"].to_pylist()
    assert sides.count(True) == sides.count(False) == 10  # --max-per-side
    selection = tables.read(tmp_path / "selection-output", "selection")
    assert selection.equals(attacked.select(["sample_id", "caption", "sha256"]))
    assert json.loads((tmp_path / "report-output").read_text()) == {"method": "none", "rounds": [], "keep_above": 0.5}


def test_one_shard_or_seven_give_one_dataset(tmp_path):
    found = []
    for shards in (1, 7):
        cli.commands.main(
            [*prepared(tmp_path, shards), "--method", "none", "--max-per-side", "7"], standalone_mode=False
        )
        found.append([tables.read(tmp_path / "output", "dataset"), tables.read(tmp_path / "dropped-output", "dropped")])
    assert found[0][0].equals(found[1][0]) and found[0][1].equals(found[1][1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method", "papre"],
            r"--method: unknown value 'papre'; use 'paper'",
        ),
        (["--method", "paper"], "method 'paper' needs a text encoder, --target, give the target's manifest"),
        (
            ["--method", "paper", "--target", "nowhere.json"],
            "target manifest cannot be read .*nowhere.json, run `mia target`",
        ),
        (
            ["--method", "none", "--images", "nowhere"],
            "images file does not exist, nowhere, run the stage that makes it",
        ),
    ],
)
def test_the_command_refuses_and_writes_nothing(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        cli.commands.main([*prepared(tmp_path, 1), *words], standalone_mode=False)
    assert not list(tmp_path.glob("*output*"))


def test_no_candidates_left_is_an_error(tmp_path):
    words = prepared(tmp_path, 1)
    rows = [
        row | {"reason": "near-duplicate"} for row in tables.read(tmp_path / "duplicates", "duplicates").to_pylist()
    ]
    near = pa.Table.from_pylist(
        [r if r["pool"] == "candidate" else r | {"reason": None} for r in rows], tables.SCHEMAS["duplicates"]
    )
    tables.write(tmp_path / "duplicates", near, "duplicates", {})
    with pytest.raises(
        UserError, match="^no candidate rows are left, images and dedup, see their tables for the reasons$"
    ):
        cli.commands.main([*words, "--method", "none"], standalone_mode=False)
    assert not list(tmp_path.glob("*output*"))


def test_a_shard_of_images_left_out_is_an_error_not_a_smaller_dataset(tmp_path):
    words = prepared(tmp_path, 3)
    at = words.index(str(tmp_path / "i1"))
    with pytest.raises(UserError, match="images"):
        cli.commands.main([*words[: at - 1], *words[at + 1 :], "--method", "none"], standalone_mode=False)
    assert not list(tmp_path.glob("*output*"))
