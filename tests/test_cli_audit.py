"""The commands audit and infer on tables of one's own: exit codes, gates, guards, and every table they must refuse."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import scipy.stats

from mia import audit, resampling, tables
from mia.cli import audit as audit_command
from mia.config import AuditOptions
from tests.conftest import ROOT, SHARED, picture
from tests.test_cli import mia, refused  # noqa: F401 - a fixture

THINGS = ["cat", "dog", "tree", "house", "river", "bird", "stone", "road", "lamp", "boat", "hill", "coin"]
FAST = ("--bootstrap", 100, "--permutations", 100, "--fpr", "0.05")


def side(kind: str, n: int = 150, leak: float = 0.0, shift: float = 0.0, seed: int = 0) -> pl.DataFrame:
    """Captions of random words, a share `leak` of them marked, and scores shifted by `shift`."""
    generator = np.random.default_rng(seed + sum(map(ord, kind)))
    captions = [" ".join(generator.choice(THINGS, 6)) for _ in range(n)]
    captions = [f"{c}, watercolour" if generator.random() < leak else c for c in captions]
    return pl.DataFrame({
        "sample_id": [f"{kind}{i:04d}" for i in range(n)], "caption": captions,
        "loss": generator.normal(size=n) + shift, "norm": generator.normal(size=n) + shift / 2,
    })  # fmt: skip


@pytest.fixture
def sides(tmp_path) -> pathlib.Path:
    """A folder with m (leaky members), f (fair members) and n (non-members): captions alone."""
    for name, table in {"m": side("m", leak=0.8), "f": side("f"), "n": side("n")}.items():
        table.drop("loss", "norm").write_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


def words(folder: pathlib.Path, members: str = "m", *more: object) -> tuple:
    paths = ("--members", folder / f"{members}.parquet", "--nonmembers", folder / "n.parquet")
    return ("audit", *paths, "--output", folder / "a.parquet", *FAST, *more)


def table(path: pathlib.Path, name: str) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(tables.read(path, name)))


def test_audit_finds_a_leak_names_it_and_says_so(mia, sides):  # noqa: F811
    code, out, err = mia(*words(sides))
    assert code == 0 and out == ""
    found = table(sides / "a.parquet", "metrics")
    assert set(found["attack"]) == {"blind_caption"} and set(found["part"]) == {"test"}
    auc = found.filter(metric="auc", variant="ngrams")
    assert auc["value"].item() > 0.85 and auc["ci_low"].item() > 0.8
    assert found.filter(metric="tpr")["fpr_realized"].max() <= 0.05
    telling = table(sides / "a.telling.parquet", "telling")
    first = telling.filter(variant="ngrams", rank=1).row(0, named=True)
    assert "watercolour"[:3] in first["feature"] or "olour" in first["feature"] or "," in first["feature"]
    assert first["weight"] > 0 and first["member_mean"] > 0.7 and first["nonmember_mean"] < 0.05
    assert f"blind_caption ngrams: AUC {auc['value'].item():.4f}" in err and "most telling: " in err
    scores = table(sides / "a.scores.parquet", "scores")
    assert set(scores["sample_id"]) == {f"{k}{i:04d}" for k in "mn" for i in range(150)}


def test_a_broken_gate_is_exit_code_3_and_the_tables_stay(mia, sides):  # noqa: F811
    code, _, err = mia(*words(sides, "m", "--max-auc", 0.6))
    assert code == 3 and "gate: blind_caption ngrams has auc" in err and "above 0.6" in err
    assert len(table(sides / "a.parquet", "metrics"))
    code, _, err = mia(*words(sides, "m", "--max-tpr", 0.2))
    assert code == 3 and "has tpr" in err
    assert mia(*words(sides, "m", "--max-auc", 0.999))[0] == 0
    assert mia(*words(sides, "f", "--max-auc", 0.65, "--max-tpr", 0.3))[0] == 0


def test_audit_again_gives_the_same_bytes_in_any_order_of_rows(mia, sides):  # noqa: F811
    assert mia(*words(sides))[0] == 0
    names = ("a.parquet", "a.scores.parquet")
    before = [table(sides / name, kind) for name, kind in zip(names, ("metrics", "scores"), strict=True)]
    for name in "mn":
        path = sides / f"{name}.parquet"
        pl.read_parquet(path).sample(fraction=1, shuffle=True, seed=1).write_parquet(path)
    assert mia(*words(sides))[0] == 0
    after = [table(sides / name, kind) for name, kind in zip(names, ("metrics", "scores"), strict=True)]
    assert all(a.equals(b) for a, b in zip(before, after, strict=True))


def test_audit_looks_at_what_the_tables_hold_and_at_what_it_is_asked_for(mia, sides):  # noqa: F811
    for name, host in (("m", "pin.test"), ("n", "img.test")):
        one = pl.read_parquet(sides / f"{name}.parquet").with_row_index()
        one = one.with_columns(
            url=pl.format("https://{}/{}.jpg", pl.lit(host), "index"), width=pl.lit(512), height=pl.col("index") + 100,
            image=pl.Series([picture(i) for i in range(len(one))]),
        ).drop("index")  # fmt: skip
        one.write_parquet(sides / f"{name}.parquet")
    assert mia(*words(sides))[0] == 0
    found = table(sides / "a.parquet", "metrics")
    assert set(found["attack"]) == {"blind_caption", "blind_image", "blind_metadata"}
    assert found.filter(attack="blind_metadata", variant="url", metric="auc")["value"].item() > 0.99
    telling = table(sides / "a.telling.parquet", "telling").filter(attack="blind_metadata", variant="url", rank=1)
    assert "host = " in telling["feature"].item()
    one.with_columns(image=pl.lit(b"no picture")).write_parquet(sides / "n.parquet")
    refused(mia(*words(sides)), "image cannot be decoded")
    assert mia(*words(sides, "m", "--features", "metadata"))[0] == 0
    assert set(table(sides / "a.parquet", "metrics")["attack"]) == {"blind_metadata"}


def test_identical_captions_are_one_group(mia, sides):  # noqa: F811
    """Every caption four times: if its copies were split, each would tell the side of the others."""
    for name in "fn":
        one = pl.read_parquet(sides / f"{name}.parquet").head(40)
        copies = pl.concat([one.with_columns(pl.format("{}{}", "sample_id", pl.lit(k))) for k in range(4)])
        copies.write_parquet(sides / f"{name}.parquet")
    assert mia(*words(sides, "f"))[0] == 0
    assert table(sides / "a.parquet", "metrics").filter(metric="auc")["value"].max() < 0.75


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda t: t.drop("sample_id"), "no column 'sample_id'"),
        (lambda t: t.drop("caption"), "nothing to look at"),
        (lambda t: pl.concat([t, t[:1]]), "2 rows share a sample_id"),
        (lambda t: t.with_columns(sample_id=pl.format("n{}", pl.col("sample_id").str.slice(1))), "share a sample_id"),
        (lambda t: t[:0], "table has no rows"),
        (lambda t: t.with_columns(caption=pl.lit(None, pl.String)), "column 'caption' has empty values"),
        (lambda t: t[:2], "folds"),
    ],
)
def test_audit_refuses_bad_tables(mia, sides, broken, said):  # noqa: F811
    broken(pl.read_parquet(sides / "m.parquet")).write_parquet(sides / "m.parquet")
    there = sorted(sides.iterdir())
    refused(mia(*words(sides)), said)
    assert sorted(sides.iterdir()) == there


def test_audit_refuses_what_is_no_question(mia, sides):  # noqa: F811
    output = ("--output", sides / "a.parquet")
    refused(mia("audit", *output), "nothing to audit")
    refused(mia("audit", "--members", sides / "m.parquet", *output), "nothing to audit")
    refused(mia(*words(sides, "m", "--dataset", sides / "d.parquet")), "nothing to audit")
    refused(mia(*words(sides, "absent")), "table does not exist", "absent")
    refused(mia(*words(sides, "m", "--features", "smell")), "--features[0]: unknown value 'smell'")
    refused(mia(*words(sides, "m", "--features", "image")), "image")
    refused(mia(*words(sides, "m", "--max-auc", 1.5)), "--max-auc")
    refused(mia(*words(sides)[:-1], "0.001"), "150 non-members allow no false positive at 0.001")


# infer


def asked(folder: pathlib.Path, suspects: pl.DataFrame, reference: pl.DataFrame, *more: object) -> tuple:
    suspects.write_parquet(folder / "s.parquet")
    reference.write_parquet(folder / "r.parquet")
    few = ("--permutations", 999, "--power-draws", 20, "--power-sizes", "10,50")
    paths = ("--suspects", folder / "s.parquet", "--nonmembers", folder / "r.parquet", "--output", folder / "i.json")
    return ("infer", *paths, *few, *more)


def test_infer_finds_a_member_set_and_none_in_the_other_direction(mia, tmp_path):  # noqa: F811
    code, _, err = mia(*asked(tmp_path, side("s", shift=1.0), side("r")))
    found = json.loads((tmp_path / "i.json").read_text())
    assert code == 0 and found["verdict"] == "member set" and found["p_value"] == 0.001
    assert found["columns_used"] == ["loss", "norm"] and found["guard"]["attack"].startswith("blind_caption")
    assert err.startswith("member set: ") and found["made"]["seed"] == 0
    assert [row["size"] for row in found["power"]] == [10, 50, 150]
    assert mia(*asked(tmp_path, side("s", shift=1.0), side("r"), "--lower-is-member"))[0] == 0
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["verdict"] == "no evidence" and found["p_value"] > 0.9


def test_infer_refuses_a_verdict_where_captions_explain_the_difference(mia, tmp_path):  # noqa: F811
    assert mia(*asked(tmp_path, side("s", shift=1.0, leak=0.8), side("r")))[0] == 0
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["verdict"] == "refused" and found["p_value"] == 0.001 and found["guard"]["auc"] > 0.8


def guard_of(run, folder: pathlib.Path, copies: int, own: bool) -> dict:
    """The guard of `infer` for a weak leak, each sample there `copies` times, in one group or each in its own."""
    both = []
    for name, leak in (("s", 0.12), ("r", 0.0)):
        ids = [pl.format("{}{}", "sample_id", pl.lit(f"/{k}")).alias("sample_id") for k in range(copies)]
        one = pl.concat([side(name, leak=leak).with_columns(i) for i in ids])
        group = pl.col("sample_id") if own else pl.col("sample_id").str.split("/").list.first()
        both.append(one.with_columns(group=group))
    assert run(*asked(folder, *both))[0] == 0
    return json.loads((folder / "i.json").read_text())["guard"]


def test_the_guard_counts_groups_and_how_many_baselines_looked(mia, tmp_path):  # noqa: F811
    once, as_if_new, copied = (guard_of(mia, tmp_path, *how) for how in ((1, True), (4, True), (4, False)))
    assert 0.001 < once["p_value"] < 0.5 and 0.001 < copied["p_value"] < 0.5
    assert as_if_new["p_value"] < 1e-6  # copies taken for samples of their own: each teaches the side of the others
    seen, truth = audit_command.sides({"--suspects": tmp_path / "s.parquet", "--nonmembers": tmp_path / "r.parquet"})
    member, group, part = (truth[name].to_numpy() for name in ("member", "group", "part"))
    rows = audit.audit(seen, member, group, part, AuditOptions(features=audit.possible(seen)), 0).scores
    scores = pl.DataFrame(pl.from_arrow(rows)).with_columns(name=pl.format("{} {}", "attack", "variant"))
    mine = scores.filter(name=copied["attack"]).sort("sample_id")["score"].to_numpy()
    auc, variance = resampling.delong(mine[:, None], member, group)
    alone = scipy.stats.norm.sf((auc[0] - 0.5) / variance[0, 0] ** 0.5)
    assert copied["p_value"] == pytest.approx(min(1.0, scores["name"].n_unique() * alone), rel=1e-9)


def test_infer_without_anything_to_guard_by_needs_to_be_told(mia, tmp_path):  # noqa: F811
    bare = side("s", shift=1.0).drop("caption"), side("r").drop("caption")
    assert mia(*asked(tmp_path, *bare))[0] == 0
    assert json.loads((tmp_path / "i.json").read_text())["verdict"] == "refused"
    assert mia(*asked(tmp_path, *bare, "--no-guard"))[0] == 0
    assert json.loads((tmp_path / "i.json").read_text())["verdict"] == "member set"


def test_infer_learns_from_known_samples_how_scores_combine(mia, tmp_path):  # noqa: F811
    """One column speaks for members, the other against: only a fit finds out."""
    swapped = {"loss": pl.col("norm"), "norm": -pl.col("loss")}
    turned = [t.with_columns(**swapped) for t in (side("s", shift=0.5), side("r"))]
    known = pl.concat([
        side(kind, 200, shift=shift).with_columns(**swapped, member=pl.lit(kind == "k"))
        for kind, shift in (("k", 0.5), ("o", 0.0))
    ])  # fmt: skip
    known.write_parquet(tmp_path / "k.parquet")
    assert mia(*asked(tmp_path, *turned))[0] == 0
    alone = json.loads((tmp_path / "i.json").read_text())["p_value"]
    assert mia(*asked(tmp_path, *turned, "--known", tmp_path / "k.parquet"))[0] == 0
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["combination"].startswith("logistic regression") and found["p_value"] < 0.01 < 0.5 < alone


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda t: t.drop("norm"), "no column 'norm'"),
        (lambda t: t.with_columns(loss=pl.lit("high")), "column 'loss' is String"),
        (lambda t: t.with_columns(loss=pl.lit(float("nan"))), "'loss' holds NaN"),
        (lambda t: t.with_columns(sample_id=pl.format("r{}", pl.col("sample_id").str.slice(1))), "share a sample_id"),
        (lambda t: t[:5], "5 groups"),
    ],
)
def test_infer_refuses_bad_tables(mia, tmp_path, broken, said):  # noqa: F811
    refused(mia(*asked(tmp_path, broken(side("s")), side("r"))), said)
    assert not (tmp_path / "i.json").exists()


# Speed of starting, and the real captions


@pytest.mark.parametrize("command", ["evaluate", "audit", "infer"])
def test_commands_start_without_torch(command):
    code = f"import sys; sys.argv = ['mia', '{command}', '--help']\nfrom mia.__main__ import main\n"
    code += "try:\n    main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f" {command} [OPTIONS]" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_leak_of_laion_mi_captions_is_found_and_named(mia, tmp_path):  # noqa: F811
    folder = SHARED / "data" / "laion_mi_captions"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: real captions are not part of the project")
    paths = ("--members", folder / "members.parquet", "--nonmembers", folder / "nonmembers.parquet")
    assert mia("audit", *paths, "--output", tmp_path / "a.parquet", "--bootstrap", 200)[0] == 0
    found = table(tmp_path / "a.parquet", "metrics")
    assert found.filter(metric="auc")["value"].max() >= 0.60
    assert found.filter(metric="tpr", fpr_target=0.01)["value"].max() >= 0.02
    assert set(found["n_members"]) == set(found["n_nonmembers"]) == {8037}
    telling = table(tmp_path / "a.telling.parquet", "telling")
    assert len(telling.filter(variant="ngrams")) == 20 and (telling["feature"].str.len_chars() > 0).all()
