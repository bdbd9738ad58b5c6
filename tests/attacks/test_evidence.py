"""`mia.attacks.evidence`: the table's rows find their places, and what is not there is said with the command for it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mia import tables
from mia.attacks import PROBES, evidence, gram
from mia.attacks.evidence import SOURCES, Evidence, command
from mia.errors import UserError
from tests.attacks.world import GRID, alpha, arrow, random_world, rows_of, sigma, vector_rows

WORLD = random_world()
ROWS = rows_of(WORLD)
TABLE = arrow(ROWS)


def one(**values):
    return {"sample_id": "a", "block": "noised", "timestep": 1, "draw": 0, **values}


def test_names_are_the_engines():
    pairs = [f"{a}_{b}" for i, a in enumerate(evidence.OPERANDS) for b in evidence.OPERANDS[i:]]
    assert tuple(pairs) == tables.GRAM_NAMES


def test_arrays_are_placed_by_sample_timestep_and_draw():
    found = Evidence([TABLE], WORLD.shape)
    assert found.ids.tolist() == WORLD.ids and len(found) == 6 and found.elements == 32
    assert found.timesteps("noised") == GRID and found.draws("noised") == (0, 1)
    t = GRID.index(301)
    cond = WORLD.model(4, WORLD.noised(4, 301, 1), 301, "cond")
    null = WORLD.model(4, WORLD.noised(4, 301, 1), 301, "null")
    four = [WORLD.z0[4], WORLD.eps[4, 1], null, cond]
    by_hand = [[np.sum(a * b) for a in four] for b in four]
    np.testing.assert_allclose(found.gram("noised")[4, t, 1], by_hand, rtol=1e-12)
    np.testing.assert_allclose(found.gram("noised", [301])[4, 0, 1], by_hand, rtol=1e-12)
    np.testing.assert_allclose(found.product("noised", "cond", "eps")[4, t, 1], by_hand[1][3], rtol=1e-12)
    np.testing.assert_allclose(found.distance("noised", "cond", "eps")[4, t, 1], np.sum((cond - four[1]) ** 2))
    np.testing.assert_allclose(found.norm("noised", "null_eps_l5")[4, t, 1], np.sum(np.abs(null - four[1]) ** 5))
    np.testing.assert_allclose(
        found.bands("noised", [301])[4, 0, 1, :2], np.sum((cond - four[1]) ** 2, axis=(1, 2)), rtol=1e-12
    )
    np.testing.assert_allclose(
        found.bands("noised", [301], "null")[4, 0, 1, :2], np.sum((null - four[1]) ** 2, axis=(1, 2)), rtol=1e-12
    )
    assert found.bands("noised").shape == found.bands("noised", condition="null").shape == (6, 15, 2, 3)
    assert found.losses("secmi", "latent_error").shape == (6, 15, 1)
    assert found.vectors("secmi").shape == (6, 1, 1, 32) and found.vectors("secmi").dtype == np.float32


def test_bands_of_the_caption_alone_are_not_taken_for_both():
    """As files of an earlier version hold them."""
    old = pa.Table.from_pylist([{**row, "bands": row["bands"][:3]} for row in ROWS if row["block"] == "noised"],
                               pa.schema([f if f.name != "bands" else pa.field("bands", pa.list_(pa.float64(), 3))
                                          for f in TABLE.schema]))  # fmt: skip
    found = Evidence([old], WORLD.shape)
    assert found.bands("noised").shape == (6, 15, 2, 3)
    with pytest.raises(UserError, match="block 'noised' holds no bands of 'null', features, run `mia features"):
        found.bands("noised", condition="null")


@pytest.mark.parametrize("parts", [1, 7])
def test_order_shards_and_other_blocks_change_nothing(parts):
    generator = np.random.default_rng(0)
    extra = [{**r, "block": "setting-16"} for r in ROWS if r["block"] == "noised"]
    mixed = arrow(ROWS + extra).take(generator.permutation(len(ROWS) + len(extra)))
    cuts = np.linspace(0, len(mixed), parts + 1).astype(int)
    shards = [mixed.slice(a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    left, right = Evidence(shards, WORLD.shape), Evidence([TABLE], WORLD.shape)
    for block in right.blocks:
        if not block.startswith(("secmi", "stepback", "aggregation")):
            np.testing.assert_array_equal(left.gram(block), right.gram(block))
            np.testing.assert_array_equal(left._column(block, "norms"), right._column(block, "norms"))
    np.testing.assert_array_equal(left.vectors("secmi"), right.vectors("secmi"))
    np.testing.assert_array_equal(left.losses("secmi", "latent_error"), right.losses("secmi", "latent_error"))


def test_fixed_size_vectors_with_empty_rows_read_as_lists_do():
    rows = [
        one(vector=[1.0, 2.0]),
        one(timestep=2),
        one(sample_id="b", vector=[3.0, 4.0]),
        one(sample_id="b", timestep=2),
    ]
    table = arrow(rows)
    fixed = pa.array([r.get("vector") for r in rows], pa.list_(pa.float32(), 2))
    both = [Evidence([t], (1, 1, 2)) for t in (table, table.set_column(10, "vector", fixed))]
    for found in both:
        np.testing.assert_array_equal(found.vectors("noised"), [[[[1, 2]]], [[[3, 4]]]])


def test_files_are_read_by_blocks(tmp_path):
    pq.write_table(TABLE.slice(0, 400), tmp_path / "a.parquet")
    pq.write_table(TABLE.slice(400).drop_columns("pixel_error"), tmp_path / "b.parquet")
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    found = evidence.read(paths, WORLD.shape, ("noised", "prompt-*"))
    assert found.blocks == ("noised", "prompt-1", "prompt-2", "prompt-3")
    whole = Evidence([TABLE], WORLD.shape)
    np.testing.assert_array_equal(found.gram("noised"), whole.gram("noised"))
    assert evidence.read(paths, WORLD.shape).blocks == whole.blocks
    pq.write_table(TABLE.drop_columns("draw"), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="features table has no column 'draw', .*c.parquet"):
        evidence.read([tmp_path / "c.parquet"], WORLD.shape)


@pytest.mark.parametrize(
    ("rows", "ask", "words"),
    [
        ([one(), one(sample_id="b", timestep=2)], lambda e: e.timesteps("noised"),
         "2 of 4 rows of block 'noised' are missing, sample a, timestep 2, draw 0, .*--block noised --probes noised"),
        ([one(), one()], lambda e: e.draws("noised"), "1 of 1 rows of block 'noised' stand twice, sample a"),
        ([one(), one(sample_id="b", block="clean")], lambda e: e.timesteps("noised"), "missing, sample b"),
        ([one()], lambda e: e.gram("pia-null"),
         "block 'pia-null' was not extracted, features, run `mia features --block clean --probes pia`"),
        ([one()], lambda e: e.at("noised", [1, 2]), "block 'noised' has no timestep 2"),
        ([one(gram=[1.0] * 10), one(sample_id="b", gram=[1.0] * 9 + [None])],
         lambda e: e.product("noised", "cond", "cond"), "holds no product cond.cond, sample b, timestep 1"),
        ([one(model_loss=1.0)], lambda e: e.gram("noised"), "block 'noised' holds no 'gram'"),
        ([one()], lambda e: e.losses("noised", "latent_error"), "holds no latent_error|holds no 'latent_error'"),
        ([one(vector=[1.0]), one(sample_id="b", vector=[1.0, 2.0])], lambda e: e.vectors("noised"), "several lengths"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(rows, ask, words):
    with pytest.raises(UserError, match=words):
        ask(Evidence([arrow(rows)], (2, 4, 4)))


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("clean", "clean --probes clean"), ("pia", "clean --probes pia"), ("pian-null", "clean --probes pian"),
        ("secmi-null", "clean --probes secmi"), ("prompt-2", "prompts --probes prompts"),
        ("crop-82", "crops --probes crops --crops 82"), ("gsa2", "gradients --probes gsa"),
        ("gradient-masking", "gradients --probes gradient_masking"),
        ("noise-optimisation", "gradients --probes noise_optimisation"), ("stepback", "noised --probes stepback"),
    ],
)  # fmt: skip
def test_the_command_that_makes_a_block(block, words):
    assert command(block) == f"mia features --block {words}"


def test_every_probes_blocks_have_a_command_that_names_it():
    for probe, blocks in PROBES.items():
        for block in blocks:
            if probe != "settings":
                assert f"--probes {probe}" in command(block.replace("*", "1")), block
    assert command("setting-07") == "mia features --settings 7"
    assert {probe for _, probe in SOURCES.values()} == set(PROBES) - {"settings"}


@pytest.mark.parametrize("weight", [0.0, 1.0, 7.5, 100.0])
@pytest.mark.parametrize(("t", "stride"), [(301, 20), (501, 100), (1, 100)])
def test_the_latent_error_of_any_guidance_and_step_from_the_gram_matrix(weight, t, stride):
    """Against the step itself."""
    found = Evidence([TABLE], WORLD.shape)
    errors = gram.latent_error(
        found.gram("noised", [t])[:, 0], alpha(t), sigma(t), alpha(t - stride), sigma(t - stride), weight
    )
    model = gram.model_error(found.gram("noised", [t])[:, 0], weight)
    for i in range(6):
        for draw in range(2):
            z = WORLD.noised(i, t, draw)
            cond, null = WORLD.model(i, z, t, "cond"), WORLD.model(i, z, t, "null")
            g = null + weight * (cond - null) if weight else cond
            prev = alpha(t - stride) * (z - sigma(t) * g) / alpha(t) + sigma(t - stride) * g
            np.testing.assert_allclose(errors[i, draw], np.sum((prev - WORLD.z0[i]) ** 2), rtol=1e-9)
            np.testing.assert_allclose(model[i, draw], np.sum((WORLD.eps[i, draw] - g) ** 2), rtol=1e-9)


def test_a_guidance_of_nothing_needs_no_empty_prompt():
    g = np.full((4, 4), np.nan)
    g[np.ix_([0, 1, 3], [0, 1, 3])] = np.eye(3)
    assert np.isfinite(gram.latent_error(g, 0.8, 0.6, 0.9, 0.4, 0.0))
    assert np.isnan(gram.latent_error(g, 0.8, 0.6, 0.9, 0.4, 7.5))


def test_vectors_of_draws_keep_their_order():
    kept = np.arange(24, dtype=float).reshape(2, 3, 4)
    found = Evidence([arrow(vector_rows("generations", kept)[::-1])], (2, 4, 4))
    np.testing.assert_array_equal(found.vectors("generations")[:, 0], kept)
