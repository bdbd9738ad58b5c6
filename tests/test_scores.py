"""`mia.scores`: by hand on a small features table, and the forest's promises about labels, folds and order."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pytest

from mia import scores, tables
from mia.config import ScoresOptions
from mia.errors import UserError

SMALL = ScoresOptions(attacks=("random_forest",), folds=3, trees=(10,), max_depths=(2, 4))


def table(rows: list[tuple]) -> pl.DataFrame:
    names = ("sample_id", "block", "timestep", "draw", "model_loss", "latent_error", "pixel_error")
    kinds = (pl.String, pl.String, pl.Int32, pl.Int32, pl.Float64, pl.Float64, pl.Float64)
    return pl.DataFrame(rows, schema=dict(zip(names, kinds, strict=True)), orient="row")


HAND = table([
    ("a", "setting-18", 301, 0, 0.5, 10.0, None),
    ("a", "setting-18", 301, 1, 1.5, 14.0, None),
    ("a", "setting-18", 301, 2, 4.0, 6.0, None),
    ("b", "setting-18", 301, 0, 4.0, 1.0, None),
    ("b", "setting-18", 301, 1, 8.0, 2.0, None),
    ("b", "setting-18", 301, 2, 3.0, 3.0, None),
    ("a", "setting-16", 1, 0, 0.25, 3.0, None),
    ("a", "setting-16", 1, 1, 0.75, 5.0, None),
    ("b", "setting-16", 1, 0, 7.0, 0.0, None),
    ("b", "setting-16", 1, 1, 9.0, 0.0, None),
    ("a", "noised", 1, 0, 99.0, 99.0, None),
    ("b", "noised", 1, 0, 99.0, 99.0, None),
])  # fmt: skip
LABELS = pl.DataFrame({"sample_id": ["a", "b"], "group": ["a", "b"], "member": [True, False]})


def as_dict(found: pl.DataFrame) -> dict[tuple[str, str, str], float]:
    rows = found.select("sample_id", "attack", "variant", "score").rows()
    assert len({row[:3] for row in rows}) == len(rows)
    return {row[:3]: row[3] for row in rows}


def test_mean_over_draws_with_its_sign_changed_under_the_right_names():
    options = ScoresOptions(attacks=("loss_threshold",))
    found = scores.attack_scores(HAND, LABELS, (18, 16), options, seed=0)
    assert found.columns == tables.SCHEMAS["scores"].names
    assert as_dict(found) == {
        ("a", "baseline_loss_threshold", "model_loss@301"): -2.0,
        ("b", "baseline_loss_threshold", "model_loss@301"): -5.0,
        ("a", "baseline_loss_threshold", "latent_error@301"): -10.0,
        ("b", "baseline_loss_threshold", "latent_error@301"): -2.0,
        ("a", "reversed_noising", "model_loss@001"): -0.5,
        ("b", "reversed_noising", "model_loss@001"): -8.0,
        ("a", "reversed_noising", "latent_error@001"): -4.0,
        ("b", "reversed_noising", "latent_error@001"): 0.0,
    }


def test_only_the_settings_asked_for_are_scored():
    found = scores.attack_scores(HAND, LABELS, (18,), ScoresOptions(attacks=("loss_threshold",)), seed=0)
    assert set(found["attack"]) == {"baseline_loss_threshold"} and len(found) == 4


def test_an_attack_by_threshold_reads_no_label():
    options = ScoresOptions(attacks=("loss_threshold",))
    found = scores.attack_scores(HAND, LABELS, (18, 16), options, seed=0)
    other = LABELS.with_columns(member=pl.Series([False, None]))
    assert as_dict(found) == as_dict(scores.attack_scores(HAND, other, (18, 16), options, seed=5))


def test_low_loss_scores_high():
    found = as_dict(scores.attack_scores(HAND, LABELS, (18,), ScoresOptions(attacks=("loss_threshold",)), seed=0))
    name = ("baseline_loss_threshold", "model_loss@301")
    assert found["a", *name] > found["b", *name]


@pytest.mark.parametrize(
    ("options", "numbers", "words"),
    [
        (("loss_threshold",), (18, 1), ("setting 1 was not extracted", "mia features --settings 1")),
        (("loss_threshold",), (18, 99), ("unknown setting 99", "use 1 to 18")),
        (("loss_treshold",), (18,), ("unknown attack 'loss_treshold'", "scores.attacks", "loss_threshold")),
        ((), (18,), ("no attack is asked for", "scores.attacks")),
        (("loss_threshold",), (), ("and no setting", "features.settings")),
        (("random_forest",), (18,), ("2 labelled samples", "random_forest", "50 are needed")),
    ],
)
def test_what_cannot_be_scored_is_said(options, numbers, words):
    with pytest.raises(UserError) as problem:
        scores.attack_scores(HAND, LABELS, numbers, ScoresOptions(attacks=options), seed=0)
    assert all(word in str(problem.value) for word in words)


# The forest


def population(n: int, signal: float, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame, np.ndarray]:
    """Features and labels of n samples, half calibration (known) and half test (null), and the truth; groups of two.

    `signal` lowers the model loss of members at one timestep of three; the other columns are noise.
    """
    generator = np.random.default_rng(seed)
    member = np.repeat(generator.permutation(np.arange(n // 2) % 2 == 0), 2)
    calibration = np.repeat(generator.permutation(np.arange(n // 2) % 4 < 2), 2)
    ids = [f"{i:04d}" for i in range(n)]
    rows = []
    for i in range(n):
        for timestep in (1, 101, 201):
            shift = signal * member[i] * (timestep == 101)
            for draw in range(2):
                loss = 2 + generator.normal(scale=0.5) - shift
                rows.append((ids[i], "setting-16", timestep, draw, loss, generator.normal(), None))
    known = [bool(m) if c else None for m, c in zip(member, calibration, strict=True)]
    labels = pl.DataFrame({"sample_id": ids, "group": [f"g{i // 2}" for i in range(n)], "member": known})
    return table(rows), labels, member


def forest(features: pl.DataFrame, labels: pl.DataFrame, seed: int = 0, options: ScoresOptions = SMALL) -> np.ndarray:
    found = scores.attack_scores(features, labels, (16,), options, seed).sort("sample_id")
    assert set(found["attack"]) == {"random_forest"} and set(found["variant"]) == {"all"}
    assert found["sample_id"].to_list() == labels["sample_id"].sort().to_list()
    return found["score"].to_numpy()


def pairs_auc(score: np.ndarray, member: np.ndarray) -> float:
    above, below = score[member][:, None], score[~member]
    return float((above > below).mean() + (above == below).mean() / 2)


def test_it_learns_a_planted_signal_and_carries_it_to_the_test_part():
    features, labels, member = population(200, signal=1.0)
    score = forest(features, labels)
    assert score.min() >= 0 and score.max() <= 1
    test = labels["member"].is_null().to_numpy()
    assert pairs_auc(score[test], member[test]) > 0.8
    assert pairs_auc(score[~test], member[~test]) > 0.8


def test_labels_without_meaning_stay_at_chance_in_the_calibration_part():
    """In sample a forest finds such labels perfectly; out of fold it cannot."""
    aucs = []
    for seed in range(3):
        features, labels, member = population(160, signal=0.0, seed=seed)
        known = labels["member"].is_not_null().to_numpy()
        aucs.append(pairs_auc(forest(features, labels)[known], member[known]))
    assert 0.3 < np.mean(aucs) < 0.7 and max(aucs) < 0.8, aucs


def test_two_copies_of_an_image_in_one_group_do_not_tell_each_others_label():
    """Copies with one random label each pair: folds that split groups would find the label, folds by group cannot."""
    features, labels, member = population(160, signal=0.0, seed=3)
    pair = pl.col("sample_id").cast(pl.Int32) // 2
    losses = ("model_loss", "latent_error")
    twins = features.with_columns(pl.col(loss).first().over(pair, "timestep", "draw") for loss in losses)
    deep = dataclasses.replace(SMALL, folds=4, max_depths=(16,))
    known = labels["member"].is_not_null().to_numpy()
    apart = forest(twins, labels, options=deep)
    alone = forest(twins, labels.with_columns(group="sample_id"), options=deep)
    assert pairs_auc(apart[known], member[known]) < 0.75
    assert pairs_auc(alone[known], member[known]) > 0.95


def test_test_labels_and_test_features_reach_no_calibration_score():
    features, labels, _ = population(120, signal=0.5)
    score = forest(features, labels)
    test = labels["member"].is_null().to_numpy()
    strange = pl.when(pl.col("sample_id").is_in(labels.filter(pl.col("member").is_null())["sample_id"].to_list()))
    changed = features.with_columns(strange.then(pl.col("model_loss") * -3).otherwise("model_loss").alias("model_loss"))
    again = forest(changed, labels)
    np.testing.assert_array_equal(again[~test], score[~test])
    assert (again[test] != score[test]).any()


def test_test_groups_reach_no_score():
    features, labels, _ = population(120, signal=0.5)
    one = pl.when(pl.col("member").is_null()).then(pl.lit("one"))
    renamed = labels.with_columns(one.otherwise("group").alias("group"))
    np.testing.assert_array_equal(forest(features, labels), forest(features, renamed))


def test_a_test_sample_may_have_no_row_among_the_labels():
    features, labels, _ = population(120, signal=0.5)
    found = scores.attack_scores(features, labels.drop_nulls("member"), (16,), SMALL, 0).sort("sample_id")
    np.testing.assert_array_equal(found["score"].to_numpy(), forest(features, labels))


def test_the_order_of_rows_and_of_calls_changes_nothing():
    features, labels, _ = population(120, signal=0.5)
    score = forest(features, labels)
    for seed in range(3):
        shuffled = features.sample(fraction=1, shuffle=True, seed=seed)
        np.testing.assert_array_equal(forest(shuffled, labels.sample(fraction=1, shuffle=True, seed=seed)), score)


def test_the_seed_decides():
    features, labels, _ = population(120, signal=0.5)
    np.testing.assert_array_equal(forest(features, labels, seed=1), forest(features, labels, seed=1))
    assert (forest(features, labels, seed=1) != forest(features, labels, seed=2)).any()


def test_a_sample_that_lacks_a_timestep_is_named():
    features, labels, _ = population(120, signal=0.5)
    partial = features.filter(~((pl.col("sample_id") == "0007") & (pl.col("timestep") == 101)))
    with pytest.raises(UserError, match="1 samples lack some of the losses, 0007"):
        forest(partial, labels)


def test_49_labels_are_too_few_and_50_are_enough():
    features, labels, _ = population(140, signal=1.0)
    known = labels.drop_nulls("member").with_columns(group="sample_id")
    with pytest.raises(UserError, match="49 labelled samples.*50 are needed"):
        scores.attack_scores(features, known.head(49), (16,), SMALL, 0)
    assert len(scores.attack_scores(features, known.head(50), (16,), SMALL, 0)) == 140


@pytest.mark.parametrize(
    ("kept", "words"),
    [(0, "all labelled samples are non-members"), (2, "one class has 2 groups for 3 folds, scores.f")],
)
def test_too_few_labels_of_one_side_are_refused_before_the_folds_fail(kept, words):
    features, labels, _ = population(240, signal=1.0)
    known = labels.with_columns(group="sample_id").drop_nulls("member")
    few = pl.concat([known.filter(~pl.col("member")), known.filter(pl.col("member")).head(kept)])
    with pytest.raises(UserError, match=words):
        scores.attack_scores(features, few, (16,), SMALL, 0)
    enough = pl.concat([known.filter(~pl.col("member")), known.filter(pl.col("member")).head(4)])
    assert len(scores.attack_scores(features, enough, (16,), SMALL, 0)) == 240


def test_both_attacks_in_one_table_that_the_schema_accepts():
    features, labels, _ = population(120, signal=0.5)
    options = dataclasses.replace(SMALL, attacks=("loss_threshold", "random_forest"))
    found = scores.attack_scores(features, labels, (16,), options, 0)
    assert set(found["attack"]) == {"reversed_noising", "random_forest"}
    schema = tables.SCHEMAS["scores"]
    assert tables.check(found.to_arrow().cast(schema), "scores").num_rows == 120 * (3 * 2 + 1)
