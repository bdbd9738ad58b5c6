"""`mia.attrition` against counts done by hand, scipy, and the textbook's examples; and its two commands."""

from __future__ import annotations

import itertools
import json
import pathlib

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from scipy import stats

from mia import attrition, images, metrics, tables
from mia.cli import attrition as commands
from mia.errors import UserError

# Agresti (1990), page 232: penicillin at five levels, given at once or late; cured and died.
RABBITS = np.array([[[0, 6], [0, 5]], [[3, 3], [0, 6]], [[6, 0], [2, 4]], [[5, 1], [6, 0]], [[2, 0], [5, 0]]])
# Bickel et al. (1975): admitted and rejected, men and women, in the six departments of Berkeley.
BERKELEY = np.array(
    [
        [[512, 313], [89, 19]],
        [[353, 207], [17, 8]],
        [[120, 205], [202, 391]],
        [[138, 279], [131, 244]],
        [[53, 138], [94, 299]],
        [[22, 351], [24, 317]],
    ]
)


def rows(*groups: tuple[str, str, str, int]) -> tuple[pa.Table, pa.Table]:
    """Metadata and images tables with `n` rows of each (pool, host, status, n)."""
    each = [(pool, host, status) for pool, host, status, n in groups for _ in range(n)]
    urls = [f"http://{host}/{i}.jpg" for i, (_, host, _) in enumerate(each)]
    ids = [tables.sample_id(url, "") for url in urls]
    metadata = pa.table({"sample_id": ids, "url": urls, "pool": [pool for pool, _, _ in each]})
    images = pa.table({"sample_id": ids[::-1], "status": [status for _, _, status in each][::-1]})
    return metadata, images


def joined(*groups: tuple[str, str, str, int]) -> pl.DataFrame:
    metadata, images = rows(*groups)
    return attrition.joined(metadata.to_batches(max_chunksize=3), images)


# ------------------------------------------------------------------------------------------------ rows and rates


def test_joining_finds_hosts_and_survivors() -> None:
    urls = ["http://Me@WWW.Example.ORG:8080/a", "file:a.jpg", "http://[::1", " https://b.example.co.uk./x", "nothing"]
    ids = [f"{i:032x}" for i in range(5)]
    metadata = pa.table({"sample_id": ids, "url": urls, "pool": ["member"] * 5})
    images = pa.table({"sample_id": ids, "status": ["ok", "dns", "ok", "ok", "refused"]})
    found = attrition.joined(metadata.to_batches(), images)
    assert found["host"].to_list() == ["www.example.org", "", "", "b.example.co.uk", ""]
    assert found["top_level_domain"].to_list() == ["org", "", "", "uk", ""]
    assert found["survived"].to_list() == [True, False, True, True, False]


def test_a_missing_shard_is_named() -> None:
    metadata, images = rows(("member", "a.org", "ok", 5))
    with pytest.raises(UserError, match=r"2 of 5 samples have no status.*give every shard"):
        attrition.joined(metadata.to_batches(), images.slice(2))


def test_rates_by_hand() -> None:
    """A status that one pool has is counted, as zero, in the others, with an interval."""
    found = attrition.rates(
        joined(("member", "a.org", "ok", 3), ("member", "a.org", "dns", 1), ("candidate", "a.org", "ok", 2))
    )
    assert [tuple(row.values())[:5] for row in found.to_pylist()] == [
        ("candidate", "dns", 0, 2, 0.0),
        ("candidate", "ok", 2, 2, 1.0),
        ("member", "dns", 1, 4, 0.25),
        ("member", "ok", 3, 4, 0.75),
    ]
    # Clopper and Pearson with k = 0 of n = 2: 1 - 0.025 ** (1 / 2)
    assert found["ci_high"][0].as_py() == pytest.approx(1 - 0.025**0.5) and found["ci_low"][0].as_py() == 0
    assert (found["ci_low"][2].as_py(), found["ci_high"][2].as_py()) == pytest.approx((0.0063, 0.8059), abs=5e-5)


# ------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("counts", [[[8, 2], [1, 5]], [[90, 10], [80, 20]], [[5, 0], [3, 2]], [[7, 0], [4, 0]]])
def test_fisher_is_scipy(counts: list[list[int]]) -> None:
    assert attrition.fisher(np.array(counts)).p_value == stats.fisher_exact(counts)[1]


def test_tea_by_hand() -> None:
    """Fisher's lady, 3 of 4 right: odds 9, p = 34/70, log odds have variance 1/3 + 1 + 1 + 1/3."""
    found = attrition.fisher(np.array([[3, 1], [1, 3]]))
    assert found.odds_ratio == pytest.approx(9) and found.p_value == pytest.approx(34 / 70)
    spread = np.exp(1.959963984540054 * np.sqrt(8 / 3))
    assert (found.ci_low, found.ci_high) == pytest.approx((9 / spread, 9 * spread))


def test_odds_with_an_empty_cell_or_column() -> None:
    found = attrition.fisher(np.array([[5, 0], [3, 2]]))
    assert found.odds_ratio == pytest.approx(5.5 * 2.5 / (0.5 * 3.5)) and found.ci_low < 1 < found.ci_high
    assert attrition.fisher(np.array([[7, 0], [4, 0]])) == attrition.Odds(None, None, None, 1.0, 1, 11)


def test_mantel_haenszel_of_the_textbook() -> None:
    """The figures of R's `mantelhaen.test` for both examples of its help page. Two levels of RABBITS say nothing."""
    found = attrition.mantel_haenszel(RABBITS)
    assert (found.odds_ratio, found.ci_low, found.ci_high) == pytest.approx((7, 1.026713, 47.725133), abs=5e-6)
    assert found.p_value == pytest.approx(0.04747, abs=5e-6) and (found.strata, found.rows) == (3, 36)
    found = attrition.mantel_haenszel(BERKELEY)
    assert (found.odds_ratio, found.ci_low, found.ci_high) == pytest.approx((0.9046968, 0.7719074, 1.0603298), abs=5e-7)
    assert found.p_value == pytest.approx(0.2323, abs=5e-5) and found.strata == 6


def test_mantel_haenszel_by_hand() -> None:
    """One stratum: the ratio is the table's own. Excess 8 - 10 * 9 / 16, variance 10 * 6 * 9 * 7 / (16^2 * 15)."""
    found = attrition.mantel_haenszel(np.array([[[8, 2], [1, 5]]]))
    statistic = (8 - 90 / 16 - 0.5) ** 2 / (10 * 6 * 9 * 7 / (256 * 15))
    assert found.odds_ratio == pytest.approx(20) and found.p_value == pytest.approx(stats.chi2.sf(statistic, 1))


def test_mantel_haenszel_without_information() -> None:
    nothing = attrition.Odds(None, None, None, None, 0, 0)
    assert attrition.mantel_haenszel(np.array([[[5, 5], [0, 0]], [[0, 3], [0, 4]], [[2, 0], [1, 0]]])) == nothing
    perfect = attrition.mantel_haenszel(np.array([[[5, 0], [0, 5]]]))
    assert perfect.odds_ratio is None and perfect.p_value < 0.05


def test_difference_of_shares_of_the_source() -> None:
    """Newcombe (1998), table II, method 10: 56/70 - 48/80, 9/10 - 3/10, 5/56 - 0/29 and 10/10 - 0/10."""
    for counts, expected in (
        ([[56, 14], [48, 32]], (0.0524, 0.3339)),
        ([[9, 1], [3, 7]], (0.1705, 0.8090)),
        ([[5, 51], [0, 29]], (-0.0381, 0.1926)),
        ([[10, 0], [0, 10]], (0.6075, 1.0)),
    ):
        assert attrition.difference_interval(np.array(counts)) == pytest.approx(expected, abs=5e-5)


# ------------------------------------------------------------------------------------------------ the finding


def test_no_difference_is_no_evidence() -> None:
    found = attrition.survival(
        joined(
            *[(pool, "a.org", status, n) for pool in ("member", "candidate") for status, n in (("ok", 80), ("dns", 20))]
        )
    )
    assert not found["predicts"] and found["auc"] == 0.5 and found["overall"]["odds_ratio"] == pytest.approx(1)
    assert found["auc_ci_low"] < 0.5 < found["auc_ci_high"]
    assert found["statement"].startswith(
        "No evidence that survival predicts membership: 80.0% of 100 members and 80.0%"
    )


def test_difference_on_one_host() -> None:
    """90 of 100 against 70 of 100: odds ratio 27/7, AUC 0.6; the control pool has no say."""
    data = joined(
        ("member", "a.org", "ok", 90), ("member", "a.org", "http_4xx", 10),
        ("candidate", "a.org", "ok", 70), ("candidate", "a.org", "timeout", 30),
        ("control", "a.org", "dns", 500),
    )  # fmt: skip
    found = attrition.survival(data)
    assert found["predicts"] and found["overall"]["odds_ratio"] == pytest.approx(27 / 7)
    assert found["overall"]["p_value"] == stats.fisher_exact([[90, 10], [70, 30]])[1]
    sides = data.filter(pl.col("pool") != "control")
    member = (sides["pool"] == "member").to_numpy()
    assert found["auc"] == pytest.approx(metrics.auc(sides["survived"].to_numpy().astype(float), member))
    assert found["within"]["host"]["strata"] == found["within"]["top_level_domain"]["strata"] == 1
    assert "same host, too" in found["statement"] and "biased sample" in found["statement"]
    json.dumps(found, allow_nan=False)


def test_difference_between_hosts_only() -> None:
    """Each host loses both sides alike, but members are from the host that lives: Simpson's paradox undone."""
    found = attrition.survival(
        joined(
            ("member", "a.org", "ok", 180), ("member", "a.org", "dns", 20),
            ("candidate", "a.org", "ok", 18), ("candidate", "a.org", "dns", 2),
            ("member", "b.com", "ok", 10), ("member", "b.com", "dns", 10),
            ("candidate", "b.com", "ok", 100), ("candidate", "b.com", "dns", 100),
        )
    )  # fmt: skip
    assert found["predicts"] and found["overall"]["odds_ratio"] > 4
    assert found["within"]["host"]["odds_ratio"] == pytest.approx(1) and found["within"]["host"]["p_value"] > 0.9
    assert found["within"]["host"]["rows"] == 440 and "different hosts" in found["statement"]


def test_hosts_that_cannot_be_compared() -> None:
    found = attrition.survival(
        joined(("member", "a.org", "ok", 50), ("candidate", "b.org", "ok", 20), ("candidate", "b.org", "dns", 30))
    )
    assert found["predicts"] and found["within"]["host"]["p_value"] is None
    assert found["within"]["top_level_domain"]["strata"] == 1 and "No host has both sides" in found["statement"]


def test_all_dead_and_one_side_missing() -> None:
    found = attrition.survival(joined(("member", "a.org", "dns", 5), ("candidate", "a.org", "dns", 5)))
    assert not found["predicts"] and found["overall"]["odds_ratio"] is None and found["auc"] == 0.5
    with pytest.raises(UserError, match="no row is of pool 'candidate'"):
        attrition.survival(joined(("member", "a.org", "ok", 5)))


# ------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def files(tmp_path: pathlib.Path) -> pathlib.Path:
    """metadata.parquet with two pools of 15, half of whose local images exist, and their images in two shards."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "there.png")
    plain = {"caption": "a", "source": "s"}
    metadata, images = [], []
    for i in range(30):
        name, pool = "there.png" if i < 15 else f"gone{i}.png", ("member", "candidate")[i % 2]
        metadata.append({"sample_id": f"{i:032x}", "url": f"file:{name}", "pool": pool, **plain})
        images.append({"sample_id": f"{i:032x}", "status": "ok" if i < 15 else "not_found", "detail": ""})
    schema = tables.SCHEMAS["metadata"]
    tables.write(tmp_path / "metadata.parquet", pa.Table.from_pylist(metadata, schema=schema), "metadata", {})
    for shard in (0, 1):
        table = pa.Table.from_pylist(images[shard::2], schema=tables.SCHEMAS["images"])
        tables.write(tmp_path / f"{shard}.parquet", table, "images", {})
    return tmp_path


def test_attrition_command(files: pathlib.Path) -> None:
    flags = ["--metadata", "metadata.parquet", "--images", "0.parquet", "--images", "1.parquet"]
    flags = [str(files / word) if word.endswith("parquet") else word for word in flags]
    written = [(files / f"{i}.out.parquet", files / f"{i}.json") for i in range(2)]
    for table, report in written:
        line = [*flags, "--output", str(table), "--report-output", str(report)]
        CliRunner().invoke(commands.attrition, line, catch_exceptions=False)
    (table, report), (again, _) = written
    assert table.read_bytes() == again.read_bytes()
    assert [row["rows"] for row in pq.read_table(table).to_pylist()] == [8, 7, 7, 8]
    assert json.loads(report.read_text())["pools"]["member"] == {"rows": 15, "survived": 8, "share": 8 / 15}
    assert tables.provenance(table)["stage"] == "attrition"


def test_probe_command(files: pathlib.Path) -> None:
    line = ["--metadata", str(files / "metadata.parquet"), "--root", str(files), "--output", str(files / "probe.json")]
    done = CliRunner().invoke(commands.probe, [*line, "--allow-local-files"], catch_exceptions=False)
    counts = json.loads((files / "probe.json").read_text())
    assert counts == {"candidate": {"ok": 7, "not_found": 3}, "member": {"ok": 8, "not_found": 2}}
    assert "candidate: 3 not_found, 7 ok" in done.output


def test_a_probe_in_batches_tries_the_rows_that_stand_for_all(files: pathlib.Path, monkeypatch) -> None:
    """A pool that comes late, and another that ends early, as in a table of many batches."""
    path, schema = files / "metadata.parquet", tables.SCHEMAS["metadata"]
    rows = tables.read(path, "metadata").to_pylist()
    for i, row in enumerate(rows):
        row["pool"] = "candidate" if i in (0, 25, 29) else "control" if i > 26 else "member"
    whole = pa.Table.from_pylist(rows, schema=schema)
    tables.write(path, whole, "metadata", {})
    tried = []
    plain = images.fetch
    monkeypatch.setattr(images, "fetch", lambda rows, *args, **more: tried.append(rows) or plain(rows, *args, **more))
    for batch, count in itertools.product((1, 4, 100), (1, 5, 9, 20, 40)):
        monkeypatch.setattr(commands, "BATCH", batch)
        line = ["--metadata", str(path), "--root", str(files), "--allow-local-files", "--count", str(count)]
        CliRunner().invoke(commands.probe, line, catch_exceptions=False)
        assert tried.pop()["sample_id"].equals(images.probe_rows(whole, count)["sample_id"]), (batch, count)


def test_probe_of_nothing_but_dead_links(files: pathlib.Path) -> None:
    line = ["--metadata", str(files / "metadata.parquet"), "--root", str(files), "--count", "4"]
    with pytest.raises(UserError, match=r"none of 4 URLs gives an image: refused \(local files are not allowed\)"):
        CliRunner().invoke(commands.probe, line, catch_exceptions=False)
