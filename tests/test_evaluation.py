"""`mia.evaluation`: what is chosen where, which rows come out, and every table it must refuse."""

from __future__ import annotations

import itertools
import pathlib

import numpy as np
import polars as pl
import pytest

from mia import evaluation, metrics, tables
from mia.config import EvaluationOptions
from mia.errors import UserError

OPTIONS = EvaluationOptions(fpr_targets=(0.05, 0.01), bootstrap=100)
NAMES = [("blind_caption", "all"), ("forest", "all"), ("noising", "loss@001"), ("noising", "loss@101")]


def population(n: int = 240, seed: int = 0) -> pl.DataFrame:
    """A dataset table: both sides in both parts, groups of two."""
    generator = np.random.default_rng(seed)
    return pl.DataFrame({
        "sample_id": [f"{i:032x}" for i in generator.permutation(n)],
        "member": np.arange(n) // 2 % 2 == 0,
        "group": [f"g{i // 2:03d}" for i in range(n)],
        "part": np.where(np.arange(n) < n // 2, "calibration", "test"),
    })  # fmt: skip


def scored(shifts: dict[tuple[str, str], tuple[float, float]], dataset: pl.DataFrame, seed: int = 1) -> pl.DataFrame:
    """A scores table: each attack and variant with its shift of members in calibration and in test."""
    generator = np.random.default_rng(seed)
    member, test = dataset["member"].to_numpy(), (dataset["part"] == "test").to_numpy()
    parts = []
    for (attack, variant), (calibration_shift, test_shift) in shifts.items():
        shift = np.where(test, test_shift, calibration_shift) * member
        score = generator.normal(size=len(dataset)) + shift
        rows = dataset.select("sample_id", attack=pl.lit(attack), variant=pl.lit(variant))
        parts.append(rows.with_columns(score=pl.Series(score)))
    return pl.concat(parts)


SHIFTS = dict(zip(NAMES, [(9.0, 9.0), (0.5, 0.5), (2.0, 0.0), (0.0, 9.0)], strict=True))


def result(
    scores: pl.DataFrame, dataset: pl.DataFrame, options: EvaluationOptions = OPTIONS, seed: int = 0
) -> pl.DataFrame:
    table = tables.check(evaluation.evaluate(evaluation.join(scores, dataset), options, seed), "metrics")
    return pl.DataFrame(pl.from_arrow(table))


def chosen(found: pl.DataFrame) -> dict[str, str]:
    rows = found.filter(pl.col("method") == "holdout").select("attack", "variant").unique().rows()
    assert len({attack for attack, _ in rows}) == len(rows), "one variant for each attack"
    return dict(rows)


# What is chosen


def test_a_column_perfect_on_test_but_poor_on_calibration_is_not_chosen():
    dataset = population()
    found = result(scored(SHIFTS, dataset), dataset)
    assert chosen(found) == {
        "blind_caption": "all", "forest": "all", "noising": "loss@001", evaluation.CHOSEN: "noising loss@001",
    }  # fmt: skip
    perfect = found.filter(pl.col("variant") == "loss@101", pl.col("metric") == "auc")
    assert perfect["value"].to_list() == [1.0] and perfect["method"].to_list() == ["as_is"]
    honest = found.filter(pl.col("attack") == evaluation.CHOSEN, pl.col("part") == "test", pl.col("metric") == "auc")
    assert 0.3 < honest["value"].item() < 0.7, "the choice must be paid for on test"


def test_the_choice_is_the_best_by_hand_and_ties_go_by_auc():
    dataset = population(seed=2)
    shifts = {("a", f"v{i}"): (0.2 * i % 0.7, 0.0) for i in range(8)} | {("b", f"v{i}"): (0.4, 0.0) for i in range(4)}
    scores = scored(shifts, dataset, seed=3)
    calibration = scores.join(dataset.filter(part="calibration"), on="sample_id")
    merit = {}
    for name, rows in calibration.group_by("attack", "variant"):
        inside, outside = rows.filter(pl.col("member"))["score"], rows.filter(~pl.col("member"))["score"]
        threshold = outside.sort(descending=True)[3]  # 60 non-members: three false positives are 5 %
        merit[name] = (int((inside > threshold).sum()), sum(int((outside < s).sum()) for s in inside))
    best = {attack: max((m, v) for (a, v), m in merit.items() if a == attack)[1] for attack in "ab"}
    over_all = max(merit, key=lambda name: merit[name])
    assert chosen(result(scores, dataset)) == best | {evaluation.CHOSEN: " ".join(over_all)}


def test_test_scores_and_test_labels_change_no_choice():
    dataset = population(400)
    scores = scored({("a", f"v{i}"): (0.3, 0.3) for i in range(12)}, dataset)
    picked = chosen(result(scores, dataset))
    test_ids = dataset.filter(part="test")["sample_id"]
    in_test = pl.col("sample_id").is_in(test_ids.to_list())
    for seed in range(4):
        permuted = scores.with_columns(
            pl.when(in_test).then(pl.col("score").shuffle(seed) * 5).otherwise("score").alias("score")
        )
        assert chosen(result(permuted, dataset)) == picked
        relabelled = dataset.with_columns(
            pl.when(part="test").then(pl.col("member").reverse()).otherwise("member").alias("member")
        )
        assert chosen(result(permuted, relabelled)) == picked


def test_calibration_scores_do_change_the_choice():
    dataset = population(400)
    better = {("a", "v0"): (0.0, 1.0), ("a", "v1"): (2.0, 1.0)}
    assert chosen(result(scored(better, dataset), dataset))["a"] == "v1"
    swapped = {("a", "v0"): (2.0, 1.0), ("a", "v1"): (0.0, 1.0)}
    assert chosen(result(scored(swapped, dataset), dataset))["a"] == "v0"


def test_calibration_scores_change_no_number_of_the_test_part():
    dataset = population()
    scores = scored(SHIFTS, dataset)
    other = scored({name: (-3.0, test) for name, (_, test) in SHIFTS.items()}, dataset)
    as_is = pl.col("method") == "as_is"
    assert result(scores, dataset).filter(as_is).equals(result(other, dataset).filter(as_is))


def test_equal_rates_are_told_apart_by_auc():
    dataset = population()
    low = pl.col("member").cast(pl.Float64) - 9 * (pl.col("group").rank("dense") % 7 == 0)  # a few of each side last
    top = pl.when(pl.col("group").is_in(["g001", "g061"])).then(99.0)  # a non-member's pair before all, in each part
    table = dataset.with_columns(x=top.otherwise(-pl.col("member").cast(pl.Float64)), y=top.otherwise(low))
    scores = pl.concat(
        table.select("sample_id", attack=pl.lit("a"), variant=pl.lit(name), score=column)
        for name, column in (("1", pl.col("x")), ("2", pl.col("y")))
    )
    options = EvaluationOptions(fpr_targets=(0.02,), bootstrap=100)  # one false positive allowed, two stand before all
    found = result(scores, dataset, options)
    assert set(found.filter(metric="tpr")["value"]) == {0.0} and chosen(found)["a"] == "2"


def test_of_equal_columns_the_first_by_name_is_taken():
    dataset = population()
    one = scored({("b", "x"): (1.0, 1.0)}, dataset)
    same = pl.concat(
        [one.with_columns(attack=pl.lit(a), variant=pl.lit(v)) for a, v in (("b", "x"), ("b", "w"), ("a", "z"))]
    )
    assert chosen(result(same, dataset)) == {"a": "z", "b": "w", evaluation.CHOSEN: "a z"}


def test_blind_attacks_alone_have_no_best_over_all():
    dataset = population()
    scores = scored({("blind_caption", "all"): (1.0, 1.0), ("blind_image", "all"): (1.0, 1.0)}, dataset)
    assert chosen(result(scores, dataset)) == {"blind_caption": "all", "blind_image": "all"}


# Which rows, and what is in them


def test_rows_are_complete_and_each_stands_once():
    dataset = population()
    found = result(scored(SHIFTS, dataset), dataset)
    measures = [("auc", None), ("tpr", 0.05), ("tpr", 0.01)]
    best = chosen(found)
    wanted = {(a, v, "test", "as_is", *m) for (a, v), m in itertools.product(NAMES, measures)}
    wanted |= {(a, v, p, "holdout", *m) for (a, v), p, m in itertools.product(best.items(), tables.PARTS, measures)}
    rows = found.select("attack", "variant", "part", "method", "metric", "fpr_target").rows()
    assert len(rows) == len(set(rows)) and set(rows) == wanted


def test_every_number_is_that_of_the_metric_on_its_own_part():
    dataset = population()
    scores = scored(SHIFTS, dataset)
    found = result(scores, dataset)
    for row in found.filter(pl.col("attack") != evaluation.CHOSEN).iter_rows(named=True):
        mine = scores.filter(attack=row["attack"], variant=row["variant"])
        mine = mine.join(dataset.filter(part=row["part"]), on="sample_id")
        score, member = mine["score"].to_numpy(), mine["member"].to_numpy()
        assert (row["n_members"], row["n_nonmembers"]) == (60, 60)
        if row["metric"] == "auc":
            assert row["value"] == metrics.auc(score, member) and row["fpr_realized"] is None
        elif row["fpr_target"] == 0.01:
            assert row["value"] is None and "100 are needed" in row["note"]
        else:
            at = metrics.tpr_at_fpr(score, member, 0.05)
            assert (row["value"], row["fpr_realized"], row["threshold"]) == (at.tpr, at.fpr, at.threshold)
        if row["value"] is not None:
            assert row["ci_low"] <= row["value"] <= row["ci_high"]


def test_the_best_over_all_is_the_chosen_attacks_own_numbers_again():
    dataset = population()
    found = result(scored(SHIFTS, dataset), dataset).filter(pl.col("method") == "holdout").drop("variant")
    best = found.filter(pl.col("attack") == evaluation.CHOSEN).drop("attack")
    assert best.equals(found.filter(pl.col("attack") == "noising").drop("attack"))


def test_without_a_calibration_part_nothing_is_chosen():
    dataset = population().with_columns(part=pl.lit("test"))
    found = result(scored(SHIFTS, dataset), dataset)
    assert set(found["method"]) == {"as_is"} and set(found["part"]) == {"test"} and len(found) == 3 * len(NAMES)


def test_intervals_follow_the_groups():
    dataset = population(400)
    scores = scored({("a", "v"): (0.5, 0.5)}, dataset)
    pair = dataset.with_row_index().select("sample_id", pair=pl.col("index") // 2)
    twins = scores.join(pair, on="sample_id", maintain_order="left").with_columns(pl.col("score").first().over("pair"))
    options = EvaluationOptions(fpr_targets=(0.05,), bootstrap=1000)
    width = {}
    for name, data in (("grouped", dataset), ("alone", dataset.with_columns(group="sample_id"))):
        row = result(twins, data, options).filter(pl.col("metric") == "auc", pl.col("method") == "as_is")
        width[name] = (row["ci_high"] - row["ci_low"]).item()
    assert width["grouped"] == pytest.approx(2**0.5 * width["alone"], rel=0.15)


def test_confidence_widens_and_the_seed_moves_only_the_intervals():
    dataset = population()
    scores = scored(SHIFTS, dataset)
    narrow = result(scores, dataset, EvaluationOptions(fpr_targets=(0.05,), bootstrap=200, confidence=0.5))
    wide = result(scores, dataset, EvaluationOptions(fpr_targets=(0.05,), bootstrap=200, confidence=0.99))
    assert (narrow["ci_low"] >= wide["ci_low"]).all() and (narrow["ci_high"] <= wide["ci_high"]).all()
    one, again, two = (result(scores, dataset, seed=s) for s in (1, 1, 2))
    assert one.equals(again) and not one.equals(two)
    assert one.drop("ci_low", "ci_high").equals(two.drop("ci_low", "ci_high"))


def written(path: pathlib.Path, table: object) -> bytes:
    tables.write(path, table, "metrics", {"stage": "evaluation"})
    return path.read_bytes()


def test_shuffled_rows_give_the_same_bytes(tmp_path):
    dataset = population()
    scores = scored(SHIFTS, dataset)
    wide = dataset.select("sample_id", "member").with_columns(
        a=pl.Series(np.random.default_rng(0).normal(size=len(dataset)).round(1)),
        b=pl.Series(np.arange(len(dataset)) / 7),
    )
    first = None
    for seed in (None, 0, 1, 2):

        def shuffled(table: pl.DataFrame, seed: int | None = seed) -> pl.DataFrame:
            return table if seed is None else table.sample(fraction=1, shuffle=True, seed=seed)

        long = evaluation.evaluate(evaluation.join(shuffled(scores), shuffled(dataset)), OPTIONS, 0)
        pair = evaluation.from_wide(shuffled(wide[:120]), shuffled(wide[120:]))
        both = written(tmp_path / "l", long), written(tmp_path / "w", evaluation.evaluate(pair, OPTIONS, 0))
        first = first or both
        assert both == first


# Tables with a column for each score


def wide(n: int = 100, seed: int = 0, prefix: str = "s") -> pl.DataFrame:
    generator = np.random.default_rng(seed)
    member = np.arange(n) % 2 == 0
    ids = [f"{prefix}{i}" for i in range(n)]
    return pl.DataFrame({"sample_id": ids, "member": member, "t1": generator.normal(size=n), "t2": member + 0.0})


def test_each_float_column_is_an_attack():
    found = evaluation.from_wide(wide(), None)
    assert found.names == [("t1", ""), ("t2", "")] and set(found.part) == {"test"}
    np.testing.assert_array_equal(found.scores, wide().select("t1", "t2").to_numpy())
    np.testing.assert_array_equal(found.member, wide()["member"].to_numpy())
    assert found.group.tolist() == wide()["sample_id"].to_list()


def test_single_precision_integers_for_ids_and_another_order_of_columns_are_all_right():
    single = wide().with_columns(pl.col("t1", "t2").cast(pl.Float32))
    other = wide(prefix="c").select("t2", "member", "t1", "sample_id")
    found = evaluation.from_wide(single, other)
    assert found.scores.dtype == np.float64 and found.scores.shape == (200, 2)
    np.testing.assert_array_equal(found.scores[:100, 0], other["t1"].to_numpy())
    numbered = wide().with_columns(sample_id=pl.int_range(100))
    assert len(evaluation.from_wide(numbered, wide(prefix="c")).scores) == 200


def test_flipped_losses_find_members_low():
    table = wide().with_columns(t2=-pl.col("t2"))
    found = evaluation.flipped(evaluation.from_wide(table, None))
    rows = pl.DataFrame(pl.from_arrow(evaluation.evaluate(found, EvaluationOptions((0.1,), bootstrap=100), 0)))
    assert rows.filter(attack="t2")["value"].to_list() == [1.0, 1.0]


def test_choices_among_columns_are_made_on_the_calibration_table():
    test, calibration = wide(seed=1), wide(seed=2, prefix="c").with_columns(t2="t1", t1="t2")
    found = pl.DataFrame(pl.from_arrow(evaluation.evaluate(evaluation.from_wide(test, calibration), OPTIONS, 0)))
    assert chosen(found) == {"t1": "", "t2": "", evaluation.CHOSEN: "t1"}


# Tables it must refuse


def first(column: str, value: object) -> pl.Expr:
    return pl.when(pl.int_range(pl.len()) == 0).then(pl.lit(value)).otherwise(column).alias(column)


BAD_WIDE = {
    "no ids": (lambda t: t.drop("sample_id"), "test scores have no column 'sample_id', --scores"),
    "no labels": (lambda t: t.drop("member"), "test scores have no column 'member', --scores"),
    "labels as text": (lambda t: t.with_columns(pl.col("member").cast(pl.String)), "test column 'member' is String"),
    "labels as 0 and 1": (lambda t: t.with_columns(pl.col("member").cast(pl.Int64)), "test column 'member' is Int64"),
    "a label missing": (lambda t: t.with_columns(first("member", None)), "test column 'member' has empty values"),
    "an id missing": (lambda t: t.with_columns(first("sample_id", None)), "test column 'sample_id' has empty values"),
    "NaN": (lambda t: t.with_columns(first("t2", float("nan"))), "test column 't2' holds NaN, infinity or nothing"),
    "infinity": (lambda t: t.with_columns(first("t2", float("-inf"))), "column 't2' holds NaN, infinity or nothing"),
    "a score missing": (lambda t: t.with_columns(first("t1", None)), "test column 't1' holds NaN, infinity or nothing"),
    "strings": (lambda t: t.with_columns(pl.col("t2").cast(pl.String)), "test column 't2' is String, --scores, make"),
    "no score": (lambda t: t.drop("t1", "t2"), "scores have no float column, --scores"),
    "an id twice": (lambda t: pl.concat([t, t[:1]]), "2 rows share a sample_id, s0"),
    "nothing": (lambda t: t[:0], "the test part holds one side only"),
    "members only": (lambda t: t.filter("member"), "the test part holds one side only"),
    "non-members only": (lambda t: t.filter(~pl.col("member")), "the test part holds one side only"),
}  # fmt: skip


def evaluated(test: pl.DataFrame, calibration: pl.DataFrame | None) -> None:
    evaluation.evaluate(evaluation.from_wide(test, calibration), OPTIONS, 0)


@pytest.mark.parametrize("name", BAD_WIDE)
def test_bad_wide_tables_are_refused_with_the_column_and_the_table(name):
    broken, words = BAD_WIDE[name]
    with pytest.raises(UserError) as problem:
        evaluated(broken(wide()), None)
    assert words in str(problem.value) and "\n" not in str(problem.value)


@pytest.mark.parametrize("name", [name for name in BAD_WIDE if name not in ("no score", "nothing")])
def test_the_calibration_table_is_held_to_the_same(name):
    broken, words = BAD_WIDE[name]
    words = words.replace("test ", "calibration ").replace("--scores", "--calibration")
    with pytest.raises(UserError) as problem:
        evaluated(wide(prefix="t"), broken(wide()))
    assert words in str(problem.value)


@pytest.mark.parametrize(
    ("test", "calibration"), [(wide().drop("t1"), wide(prefix="c")), (wide(), wide(prefix="c").drop("t1"))]
)
def test_both_tables_hold_the_same_columns(test, calibration):
    with pytest.raises(UserError, match="have no column 't1'"):
        evaluated(test, calibration)


def test_a_sample_in_both_parts_is_refused():
    with pytest.raises(UserError, match=r"200 rows share a sample_id, s0, each sample once, in one part"):
        evaluated(wide(), wide(seed=5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (EvaluationOptions(fpr_targets=()), "evaluation.fpr_targets"),
        (EvaluationOptions(fpr_targets=(0.01, 0.0)), "evaluation.fpr_targets"),
        (EvaluationOptions(fpr_targets=(1.4,)), "evaluation.fpr_targets"),
        (EvaluationOptions(fpr_targets=(-0.1,)), "evaluation.fpr_targets"),
        (EvaluationOptions(fpr_targets=(float("nan"),)), "evaluation.fpr_targets"),
        (EvaluationOptions(confidence=0.0), "evaluation.confidence"),
        (EvaluationOptions(confidence=95.0), "evaluation.confidence"),
        (EvaluationOptions(bootstrap=0), "evaluation.bootstrap"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        evaluation.evaluate(evaluation.from_wide(wide(), None), options, 0)


# Scores and labels that do not belong together


def test_a_sample_without_a_score_is_named():
    dataset = population()
    scores = scored(SHIFTS, dataset)
    lost = dataset["sample_id"].sort()[3]
    partial = scores.filter(~((pl.col("sample_id") == lost) & (pl.col("variant") == "loss@101")))
    with pytest.raises(UserError, match=f"noising loss@101 has no score for 1 samples, {lost}"):
        evaluation.join(partial, dataset)
    with pytest.raises(UserError, match=f"has no score for 1 samples, {lost}"):
        evaluation.join(scores.filter(pl.col("sample_id") != lost), dataset)


def test_a_scored_sample_outside_the_dataset_is_named():
    dataset = population()
    scores = scored(SHIFTS, dataset)
    stray = dataset["sample_id"].sort()[7]
    with pytest.raises(UserError, match=f"1 scored samples are not in the dataset, {stray}"):
        evaluation.join(scores, dataset.filter(pl.col("sample_id") != stray))


def test_rows_are_joined_by_id_not_by_place():
    dataset = population()
    scores = scored(SHIFTS, dataset)
    found = evaluation.join(scores.sample(fraction=1, shuffle=True, seed=4), dataset.reverse())
    rows = dataset.sort("sample_id")
    assert found.names == sorted(NAMES)
    assert found.member.tolist() == rows["member"].to_list() and found.group.tolist() == rows["group"].to_list()
    for column, (attack, variant) in enumerate(found.names):
        wanted = rows.join(scores.filter(attack=attack, variant=variant), on="sample_id", maintain_order="left")[
            "score"
        ]
        assert found.scores[:, column].tolist() == wanted.to_list()


@pytest.mark.parametrize("part", tables.PARTS)
@pytest.mark.parametrize("side", [True, False])
def test_a_part_with_one_side_only_is_named(part, side):
    dataset = population().filter(~((pl.col("part") == part) & (pl.col("member") == side)))
    with pytest.raises(UserError, match=f"the {part} part holds one side only"):
        result(scored(SHIFTS, dataset), dataset)


def test_a_dataset_without_a_test_part_is_refused():
    dataset = population().with_columns(part=pl.lit("calibration"))
    with pytest.raises(UserError, match="the test part holds one side only"):
        result(scored(SHIFTS, dataset), dataset)
