"""`mia report` on small tables made by the real writers and the real evaluation."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from click.testing import CliRunner

from mia import attacks, distance, evaluation, rng, scored, summary, tables
from mia import report as stage
from mia import verdict as verdicts
from mia.cli import common
from mia.cli import report as cli_report
from mia.cli.report import report
from mia.config import (
    DedupOptions,
    DistanceOptions,
    EmbeddingsOptions,
    EvaluationOptions,
    FeaturesOptions,
    SanitizeOptions,
)
from mia.errors import UserError

N = 240  # samples a side in the dataset; half of them in each part
CAPTION = "a most secret caption of a lighthouse"
SPACES, SIDES = ("image", "text"), ("member", "candidate")
TIMESTEPS = {"partial_denoising": (51, 176, 301), "reversed_noising_regular_cfg": (1, 301, 601, 901)}
TIMESTEPS |= {"reversed_noising": (1, 301, 601, 901), "baseline_loss_threshold": (301,)}
TARGETS = {
    "memorised": {"role": "main", "source": "models/members/step-01200", "step": 1200},
    "untrained": {"role": "negative_control", "source": "models/members/step-00000", "step": 0},
    "neither": {"role": "negative_control", "source": "models/neither/step-01200"},
    "step_00300": {"role": "checkpoint", "source": "models/members/step-00300", "step": 300},
}
STRENGTH = {"memorised": 4.0, "step_00300": 0.9}
FIGURES = (
    "roc",
    "controls",
    "costs",
    "tpr_by_timestep",
    "tpr_by_step",
    "embedding_scatter",
    "distances",
    "dedup_distances",
)
OPTIONS = EvaluationOptions(bootstrap=200, permutations=200)


class World:
    """A run's folder of tables: 240 members and 240 non-members, 40 planted duplicates, up to four targets."""

    def __init__(self, folder: pathlib.Path, targets: dict = TARGETS) -> None:
        self.folder, self.targets, self.random = folder, targets, rng.stream(0, "report", purpose="test")
        self.urls = {side: [f"https://host.test/{side}/{i}.jpg" for i in range(N + 60)] for side in SIDES}
        self.pools = {url: side for side, urls in self.urls.items() for url in urls}
        self.ids = {url: tables.sample_id(url, f"{CAPTION} {url}") for url in self.pools}
        self.write_pools()
        self.write_embeddings()
        self.write_duplicates()
        self.datasets = {split: self.write_dataset(split) for split in ("unsanitized", "sanitized")}
        self.put("attacked/sanitized.parquet", "dataset", self.datasets["sanitized"], SanitizeOptions(), "sanitize")
        for split, dataset in (self.datasets | {"attacked": self.datasets["sanitized"]}).items():
            self.write_audit(split, dataset, 0.6 if split == "unsanitized" else 0.05)
        collected = pl.DataFrame([{"sample_id": self.ids[u], "member": p == "member"} for u, p in self.pools.items()])
        for split, rows in (self.datasets | {"collected": collected}).items():
            self.write_distances(split, rows)
        self.controls: dict[str, scored.Scored] = {}
        for name, about in sorted(targets.items(), key=lambda item: item[1]["role"] != "negative_control"):
            self.write_target(name, about)

    def put(self, path: str, name: str, rows: Any, options: object = None, stage: str = "") -> None:
        """Write a table from dicts, a data frame or an Arrow table, by the real writer."""
        if isinstance(rows, pl.DataFrame):
            schema = pa.schema([tables.SCHEMAS[name].field(c).with_nullable(True) for c in rows.columns])
            rows = rows.to_arrow().cast(schema)
        elif isinstance(rows, list):
            rows = pa.Table.from_pylist(rows, schema=tables.SCHEMAS[name])
        tables.write(self.folder / path, rows, name, common.made_by(stage or name, options, 7, []))

    def put_json(self, path: str, content: dict) -> None:
        (self.folder / path).parent.mkdir(exist_ok=True)
        (self.folder / path).write_text(json.dumps(content))

    def write_pools(self) -> None:
        rows = [{"sample_id": self.ids[u], "url": u, "pool": p, "source": "test"} for u, p in self.pools.items()]
        self.put("metadata.parquet", "metadata", [row | {"caption": f"{CAPTION} {row['url']}"} for row in rows])
        names, early = tables.SCHEMAS["dropped"].names, [("metadata", "language", "candidate", 31)]
        late = [("dedup", "near-duplicate", "candidate", 43), ("images", "undecodable", "member", 1)]
        for name, counts in (("metadata", early), ("sanitized", late)):
            self.put(f"dropped/{name}.parquet", "dropped", [dict(zip(names, row, strict=True)) for row in counts])
        alive = {
            "pool": "member",
            "status": "ok",
            "rows": 9,
            "total": 10,
            "share": 0.9,
            "ci_low": 0.55,
            "ci_high": 0.99,
        }
        self.put("attrition.parquet", "attrition", [alive, alive | {"pool": "candidate"}])
        self.put_json("attrition.json", {"statement": "Links of members and of candidates live alike."})
        done = {"round": 1, "members_in": 300, "members_kept": 260, "nonmembers": 240, "auc": 0.61}
        self.put_json("dataset/sanitized.json", {"method": "paper", "keep_above": 0.5, "rounds": [done]})

    def write_embeddings(self) -> None:
        member = np.array([pool == "member" for pool in self.pools.values()])
        vectors = self.random.normal(size=(len(member), 2, 8)) + 0.35 * member[:, None, None]
        vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
        self.vectors = dict(zip(self.ids.values(), vectors, strict=True))
        ids = np.array(sorted(self.vectors))
        for shard in range(2):
            mine = ids[tables.shard_of(list(ids), 2) == shard]
            found = np.array([self.vectors[i] for i in mine], np.float16)
            columns = {space: tables.vector_column(found[:, k]) for k, space in enumerate(SPACES)}
            table = pa.table({"sample_id": mine.tolist(), **columns})
            self.put(f"embeddings/{shard}.parquet", "embeddings", table, EmbeddingsOptions("hf-hub:some/encoder"))

    def write_duplicates(self) -> None:
        """40 planted candidates, of which 38 are found, one for another member; 5 more candidates are dropped."""
        rows = [{"sample_id": self.ids[u], "pool": p, "group": self.ids[u]} for u, p in self.pools.items()]
        planted = [("https://host.test/filtered.jpg", self.urls["member"][0], "crop", True)]
        planted += [(self.urls["candidate"][42], "https://host.test/filtered-too.jpg", "crop", True)]
        for k, row in enumerate(rows[N + 60 :]):
            found = k < 38 or 40 <= k < 45
            distance = self.random.uniform(0.05, 0.45) if found else self.random.normal(1.1, 0.15)
            row |= {"nearest_id": self.ids[self.urls["member"][k]], "distance": distance, "hamming": 9}
            if found:
                method = "phash" if k == 0 else "clip+phash" if k % 2 else "clip"
                row |= {"method": method, "reason": "near-duplicate"}
            if k < 40:
                pair = self.urls["candidate"][k], self.urls["member"][k or 1]
                planted.append((*pair, ("crop", "rescale")[k % 2], k % 3 == 0))
        self.put("duplicates.parquet", "duplicates", rows, DedupOptions())
        columns = ["candidate_url", "member_url", "transform", "same_caption"]
        pl.DataFrame(planted, schema=columns, orient="row").write_parquet(self.folder / "planted.parquet")

    def write_dataset(self, split: str) -> pl.DataFrame:
        start, rows = 0 if split == "unsanitized" else 50, []
        for side in SIDES:
            for i, url in enumerate(self.urls[side][start : start + N]):
                about = {"caption": f"{CAPTION} {url}", "sha256": "0" * 64, "weight": 1.0, "member": side == "member"}
                name = {"sample_id": self.ids[url], "url": url, "group": self.ids[url]}
                rows.append(name | about | {"part": tables.PARTS[i % 2]})
        dataset = pl.DataFrame(rows)
        self.put(f"dataset/{split}.parquet", "dataset", dataset, SanitizeOptions(), "sanitize")
        return dataset

    def scored(self, dataset: pl.DataFrame, names: list[tuple[str, str, float]]) -> pl.DataFrame:
        member, parts = dataset["member"].to_numpy(), []
        for attack, variant, strength in names:
            score = pl.Series(self.random.normal(size=len(member)) + strength * member)
            parts.append(dataset.select("sample_id", attack=pl.lit(attack), variant=pl.lit(variant), score=score))
        return pl.concat(parts)

    def write_scores(
        self, dataset: pl.DataFrame, names: list, scores_path: str, metrics_path: str, *rivals: Any
    ) -> scored.Scored:
        scores = self.scored(dataset, names)
        self.put(scores_path, "scores", scores)
        truth = dataset.select("sample_id", "member", "group", "part")
        joined = scored.join(scored.columns(scores, scores_path), truth)
        self.put(metrics_path, "metrics", evaluation.evaluate(joined, OPTIONS, 7, *rivals), OPTIONS, "evaluation")
        return joined

    def write_audit(self, split: str, dataset: pl.DataFrame, strength: float) -> None:
        names = [(f"blind_{kind}", "all", strength) for kind in ("caption", "image", "metadata")]
        self.blind = self.write_scores(dataset, names, f"audit/{split}.scores.parquet", f"audit/{split}.parquet")
        said = {"weight": 0.5, "member_mean": 0.25, "nonmember_mean": 0.125, "auc": 0.5625}
        telling = [
            said | {"attack": f"blind_{kind}", "variant": "all", "rank": rank, "feature": f"{kind} feature {rank}"}
            for kind in ("caption", "image", "metadata") for rank in range(1, 9)
        ]  # fmt: skip
        self.put(f"audit/{split}.telling.parquet", "telling", telling)

    def write_distances(self, split: str, rows: pl.DataFrame) -> None:
        vectors = np.array([self.vectors[i] for i in rows["sample_id"]])
        spaces = {space: vectors[:, k] for k, space in enumerate(SPACES)}
        found = distance.distances(spaces, rows["member"].to_numpy(), 7, permutations=20)
        self.put(f"distance/{split}.parquet", "distance", found, DistanceOptions())

    def write_target(self, name: str, about: dict) -> None:
        full, strength, names = about["role"] != "checkpoint", STRENGTH.get(name, 0.0), []
        for attack, steps in TIMESTEPS.items():
            if full or attack in ("baseline_loss_threshold", "reversed_noising"):
                for loss, part in zip(summary.LOSSES, (1.0, 0.8, 0.6), strict=True):
                    names += [(attack, f"{loss}@{t:03d}", part * strength * np.exp(-t / 600)) for t in steps]
        names += [("random_forest", "all", strength * 1.1)] if full else []
        paths = f"scores/{name}.parquet", f"evaluation/{name}.parquet"
        rivals = self.blind, {other: s for other, s in self.controls.items() if other != name}
        found = self.write_scores(self.datasets["sanitized"], names, *paths, *rivals)
        if about["role"] == "negative_control":
            self.controls[name] = found
        kinds = {f.name: f.type for f in tables.SCHEMAS["features"]} | {
            "bands": pa.list_(pa.float64(), tables.bands(3))
        }
        empty = pa.table({column: pa.array([], kind) for column, kind in kinds.items()})
        self.put(f"features/{name}/noised/0.parquet", "features", empty, FeaturesOptions())
        made = {"unet": "ab12cd34ef567890" * 4, "encoders": "9" * 64, "libraries": {"torch": "2.13.0"}}
        known = {"source": about["source"], "revision": "", "alpha_bar_300": 0.590501, "train_steps": 1000}
        self.put_json(f"targets/{name}.json", made | known)

    def arguments(self, output: pathlib.Path, planted: bool = True) -> list[str]:
        truth = self.folder / "planted.parquet" if planted else ""
        flags = {"results": self.folder, "targets": json.dumps(self.targets), "planted": truth}
        flags |= {"output": output / "report.html"}
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def report(self, output: pathlib.Path, planted: bool = True) -> str:
        CliRunner().invoke(report, self.arguments(output, planted), catch_exceptions=False)
        return (output / "report.html").read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("run") / "demo")


@pytest.fixture(scope="module")
def built(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    output = tmp_path_factory.mktemp("first")
    return output, world.report(output)


class Parsed(html.parser.HTMLParser):
    """Open tags, text, and everything a page might fetch; complains when tags do not balance."""

    VOID = frozenset(("meta", "br", "img", "link", "hr", "input"))
    FETCHES = frozenset(("src", "srcset", "href", "xlink:href", "data", "action", "poster"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in self.FETCHES and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {name}={value}")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.rows and any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] += data


def csv_rows(output: pathlib.Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "tables" / f"{name}.csv").read_text().splitlines()))


def metric(world: World, target: str, attack: str, fpr: float | None) -> dict:
    rows = tables.read(world.folder / f"evaluation/{target}.parquet", "metrics").to_pylist()
    wanted = {"attack": attack, "method": "holdout", "part": "test", "fpr_target": fpr}
    wanted["metric"] = "auc" if fpr is None else "tpr"
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


def test_every_figure_and_table_is_there(built: tuple[pathlib.Path, str]) -> None:
    output, page = built
    for name in FIGURES:
        svg, pdf = (output / f"figures/{name}.{kind}" for kind in ("svg", "pdf"))
        assert svg.read_bytes().startswith(b"<?xml") and pdf.read_bytes().startswith(b"%PDF")
        assert b"<image" not in svg.read_bytes() and f'id="{name}-caption"' in page
    assert len(csv_rows(output, "all_metrics")) > 500
    for path in (output / "tables").iterdir():
        assert path.suffix == ".csv" and path.read_text().count("\n") >= 2, path


def test_page_fetches_nothing_and_balances(built: tuple[pathlib.Path, str]) -> None:
    page = built[1]
    parsed = Parsed(page)
    assert parsed.fetched == [] and not {"script", "img", "image", "link", "iframe", "object"} & set(parsed.tags)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.tags.count("svg") == len(FIGURES)


def test_no_caption_or_url_of_the_data(built: tuple[pathlib.Path, str]) -> None:
    output, _ = built
    for path in output.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"lighthouse" not in content and b"host.test" not in content, path


def test_printed_numbers_are_the_metrics(world: World, built: tuple[pathlib.Path, str]) -> None:
    rows = [[" ".join(cell.split()) for cell in row] for row in Parsed(built[1]).rows]
    for attack in (*TIMESTEPS, "random_forest", evaluation.CHOSEN):
        auc, tpr = (metric(world, "memorised", attack, fpr) for fpr in (None, 0.01))
        printed = next(row for row in rows if row[0] == summary.attack_label(attack))
        assert printed[2] == "{value:.3f} [{ci_low:.3f}, {ci_high:.3f}]".format(**auc)
        low, high = (f"{100 * tpr[end]:.1f}" for end in ("ci_low", "ci_high"))
        assert printed[3] == f"{100 * tpr['value']:.1f} % [{low}, {high}]"
        assert printed[5] == f"{auc['n_members']} / {auc['n_nonmembers']}" == "120 / 120"


def test_csv_keeps_full_precision(world: World, built: tuple[pathlib.Path, str]) -> None:
    rows = {(row["target"], row["attack"]): row for row in csv_rows(built[0], "attacks")}
    row = rows["neither", "partial_denoising"]
    auc = metric(world, "neither", "partial_denoising", None)
    assert float(row["auc"]) == auc["value"] and float(row["auc_high"]) == auc["ci_high"]


def test_the_roc_figure_shows_few_curves_of_the_study_alone(world: World) -> None:
    results = cli_report._results(world.folder, cli_report._targets(json.dumps(world.targets)), "")
    rows = results.main.metrics.filter(method="holdout", part="calibration", metric="tpr", fpr_target=0.01)
    reported = rows.filter(pl.col("attack").is_in([*TIMESTEPS, "random_forest"])).sort("value", descending=True)
    assert reported["value"][1] > reported["value"][2]  # no tie at the cut
    assert set(summary.leading(results, 2)) == set(reported["attack"][:2])
    others = pl.col("attack").replace({reported["attack"][0]: "sima"})
    main = dataclasses.replace(results.main, metrics=results.main.metrics.with_columns(others))
    without = dataclasses.replace(results, targets=results.targets | {main.name: main})
    assert set(summary.leading(without, 99)) == {*TIMESTEPS, "random_forest"} - {reported["attack"][0]}


def test_blank_value_says_why(world: World, built: tuple[pathlib.Path, str]) -> None:
    note = metric(world, "memorised", "random_forest", 0.001)["note"]
    assert "1000 are needed" in note and note in built[1]
    row = next(row for row in Parsed(built[1]).rows if row[0] == "Random forest")
    assert re.fullmatch(r"\N{EN DASH}[a-z]", row[4].strip())
    blank = next(r for r in csv_rows(built[0], "attacks") if r["attack"] == "random_forest")
    assert blank["tpr_at_0.001"] == "" and blank["tpr_at_0.001_note"] == note


def test_comparison_stands_beside_controls_and_blind(world: World, built: tuple[pathlib.Path, str]) -> None:
    rows = {(row["attack"], row["metric"]): row for row in csv_rows(built[0], "comparison")}
    row = rows["reversed_noising", "auc"]
    assert float(row["control_untrained"]) == metric(world, "untrained", "reversed_noising", None)["value"]
    blind = [r for r in csv_rows(built[0], "blind_audits") if r["split"] == "attacked"]
    assert row["blind"] in {r["auc"] for r in blind}
    mine = metric(world, "memorised", "reversed_noising", None)
    assert (float(row["p"]), float(row["p_shift"])) == (mine["p_adjusted"], mine["p_shift"])
    assert row["verdict"] == mine["verdict"] == "signal"
    printed = next(r for r in Parsed(built[1]).rows if r[0] == "Reversed noising" and r[1] == "AUC")
    assert printed[-1] == "signal" and printed[-3] == f"{mine['p_adjusted']:.3f}"


def test_attacks_fitted_on_labels_are_marked_and_the_others_not(world: World, built: tuple[pathlib.Path, str]) -> None:
    """Knowledge tells attacks apart (pitfall 10): each has its access, and a star if labelled samples fitted it."""
    lineup = csv_rows(built[0], "lineup")
    fitted = {row["attack"]: row["labels"].lower() == "true" for row in lineup}
    assert fitted == {name: attacks.REGISTRY[name].labels if name in attacks.REGISTRY else False for name in fitted}
    assert len(set(fitted.values())) == 2 and all(row["access"] for row in lineup)
    rows = Parsed(built[1]).rows
    first = next(i for i, row in enumerate(rows) if row[:2] == ["Attack", "Access"]) + 1
    assert [row[0].endswith("*") for row in rows[first : first + len(lineup)]] == list(fitted.values())


def test_protocols_stand_side_by_side_with_the_selection_gain(world: World, built: tuple[pathlib.Path, str]) -> None:
    rows = tables.read(world.folder / "evaluation/memorised.parquet", "metrics").to_pylist()
    wanted = {
        (row["method"], row["metric"]): row for row in rows
        if row["attack"] == "reversed_noising" and row["fpr_target"] == 0.01 and row["part"] != "calibration"
    }  # fmt: skip
    row = next(
        r for r in csv_rows(built[0], "protocols") if (r["attack"], r["fpr_target"]) == ("reversed_noising", "0.01")
    )
    for method in ("holdout", "crossfit", "paper"):
        assert float(row[method]) == wanted[method, "tpr"]["value"]
    paper = wanted["paper", "tpr"]
    assert (float(row["paper_std"]), float(row["p_best"])) == (paper["std"], paper["p_value"])
    assert float(row["selection_gain"]) == float(row["paper"]) - float(row["holdout"])
    printed = [r for r in Parsed(built[1]).rows if r[0] == "Reversed noising" and len(r) == 6 and "%" in r[1]]
    assert [f"{100 * float(row['selection_gain']):+.1f}" in r for r in printed].count(True) == 1


def test_the_page_names_the_most_telling_features_and_the_file_all(built: tuple[pathlib.Path, str]) -> None:
    rows = csv_rows(built[0], "telling")
    assert [r["rank"] for r in rows[:8]] == [str(k) for k in range(1, 9)] and len(rows) == 24
    printed = {r[1] for r in Parsed(built[1]).rows if len(r) == 6}
    assert {f"caption feature {k}" for k in range(1, 6)} <= printed and "caption feature 6" not in printed


def test_dedup_recall_and_precision(built: tuple[pathlib.Path, str]) -> None:
    output, page = built
    rows = {r["by"]: r for r in csv_rows(output, "dedup_recall")}
    found = rows["all planted"]
    assert [found[column] for column in ("planted", "found", "recall")] == ["40", "38", "0.95"]
    assert found["right"] == "37"  # one is dropped for another member than its own
    assert {name for name in rows if name.startswith("transform")} == {"transform: crop", "transform: rescale"}
    methods = {r["method"]: (int(r["planted"]), int(r["other"])) for r in csv_rows(output, "dedup_methods")}
    assert methods["kept"] == (2, 255) and sum(p for p, _ in methods.values()) == 40
    text = " ".join(page.split())
    assert "42 near-duplicates of members were planted among the candidates; 40 reached this stage together" in text
    assert "43 were dropped, 38 of them planted: a precision of 88.4 %" in text


def test_what_the_authors_judged_by_eye_names_their_encoder_and_this_runs(built: tuple[pathlib.Path, str]) -> None:
    text = " ".join(built[1].split())
    for table in ("Table 12", "Table 13"):
        caption = text.split(f"{table}.")[1].split("</caption>")[0]
        assert "OpenAI&rsquo;s CLIP ViT-L/14; this run&rsquo;s are of <code>hf-hub:some/encoder</code>" in caption


def test_distances_stand_at_each_moment_with_their_p_values(world: World, built: tuple[pathlib.Path, str]) -> None:
    output, page = built
    rows = csv_rows(output, "distances")
    assert list(dict.fromkeys(row["split"] for row in rows)) == ["collected", "unsanitized", "sanitized"]
    for row in (row for row in rows if row["metric"] == "kernel"):
        where = {"space": row["space"], "metric": "kernel"}
        kept = tables.read(world.folder / f"distance/{row['split']}.parquet", "distance").to_pylist()
        (stored,) = (one for one in kept if where.items() <= one.items())
        assert [float(row[name]) for name in ("value", "ci_low", "p_value")] == [
            stored[name] for name in ("value", "ci_low", "p_value")
        ]
    text = " ".join(page.split())
    assert "Before dedup: 300 members, 300 non-members; after: 240 and 240; sanitized: 240 and 240." in text


def test_what_matching_could_not_hide_is_said(world: World) -> None:
    results = cli_report._results(world.folder, cli_report._targets(json.dumps(world.targets)), "")
    last = {"limit": 0.52, "tpr_limit": 0.02, "auc": {"words": 0.5234, "statistics": 0.51, "trees": 0.5}}
    last["tpr"] = {"words": 0.05, "statistics": 0.031, "trees": 0.02}
    for method, said in (("paper", []), ("matched", ["words has an AUC of 0.523, above 0.520",
                                                     "statistics has a TPR of 3.1 %, above 2.0 %"])):  # fmt: skip
        rounds = {"method": method, "rounds": [{"auc": {"words": 0.9}}, last]}
        assert summary.told_apart(dataclasses.replace(results, rounds=rounds)) == said


def test_wilson_interval() -> None:
    low, high = summary.wilson(38, 40)
    assert (round(low, 4), round(high, 4)) == (0.8350, 0.9862)  # by hand: (38 + z^2/2 -+ ...) / (40 + z^2)
    assert summary.wilson(5, 5)[1] == 1.0 and summary.wilson(0, 5)[0] == 0.0


def test_same_bytes_in_another_process(world: World, built: tuple[pathlib.Path, str], tmp_path: pathlib.Path) -> None:
    code = "import sys; from mia.cli.report import report; report(sys.argv[1:])"
    command = [sys.executable, "-c", code, *world.arguments(tmp_path)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "12345"})
    first = {p.relative_to(built[0]): p.read_bytes() for p in built[0].rglob("*") if p.is_file()}
    second = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize(
    "gone", ["evaluation/neither.parquet", "distance/collected.parquet", "targets/memorised.json", "duplicates.parquet"]
)
def test_missing_table_is_one_clear_error(world: World, tmp_path: pathlib.Path, gone: str) -> None:
    path, aside = world.folder / gone, tmp_path / "aside"
    path.rename(aside)
    try:
        with pytest.raises(UserError, match=path.name):
            world.report(tmp_path / "out")
    finally:
        aside.rename(path)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, pathlib.Path, str]:
    """A public model that leaks nothing: no step, no control, no planted truth, and sanitization by method `none`."""
    world = World(tmp_path_factory.mktemp("run") / "public", {"public": {"role": "main", "source": "maker/model"}})
    world.put_json("dataset/sanitized.json", {"method": "none", "keep_above": 0.5, "rounds": []})
    output = tmp_path_factory.mktemp("bare")
    return world, output, world.report(output, planted=False)


def test_what_is_absent_is_said(bare: tuple[World, pathlib.Path, str]) -> None:
    _, output, page = bare
    text = " ".join(page.split())
    assert "Fewer than two targets state a training step." in text
    assert "no planted duplicates are known for this run" in text and "method none, which has no rounds" in text
    assert "No negative control was attacked" in text
    assert Parsed(page).tags.count("svg") == len(FIGURES) - 1
    for name in FIGURES:
        assert (output / f"figures/{name}.svg").stat().st_size > 1000 and (output / f"figures/{name}.pdf").is_file()


def test_the_verdict_is_the_evaluations(built: tuple[pathlib.Path, str], bare: tuple[World, pathlib.Path, str]) -> None:
    assert re.search(
        "<strong>Membership signal: in AUC and TPR at 1 % FPR, the attack chosen on calibration .* beats chance",
        built[1],
    )
    said = "<strong>No membership signal: .* is not distinguishable from chance in AUC and TPR at 1 % FPR."
    assert re.search(said, bare[2])


Ends = tuple[float, float]
FAIR = (0.4, 0.6)


def verdict_of(auc: str | None, tpr: str | None, control: Ends | None) -> verdicts.Verdict:
    """What is said of these verdicts on AUC and on TPR at 50 % FPR, beside a control with this interval in both."""

    def target(name: str, role: str, ends: Ends, drawn: tuple[str | None, str | None]) -> summary.Target:
        metrics = pl.concat([metrics_of(attack, ends, drawn) for attack in (summary.CHOSEN, "random_forest")])
        return summary.Target(name, role, None, {}, metrics, None)

    targets = {"m": target("m", "main", (0.7, 0.8), (auc, tpr))}
    targets |= {"c": target("c", "negative_control", control, ("chance", "chance"))} if control else {}
    made = {"evaluation": {"options": {"fpr_targets": [0.5], "confidence": 0.95}}}
    blind = {"attacked": metrics_of("blind_caption", FAIR, (None, None))}
    given = {"targets": targets, "audits": blind, "made": made}
    absent = {f.name: None for f in dataclasses.fields(summary.Results) if f.name not in given}
    return verdicts.verdict(summary.Results(**absent, **given))


def metrics_of(attack: str, ends: Ends, drawn: tuple[str | None, str | None]) -> pl.DataFrame:
    named = {"attack": attack, "variant": "random_forest all", "part": "test", "method": "holdout", "note": ""}
    row = named | {"value": sum(ends) / 2, "ci_low": ends[0], "ci_high": ends[1], "n_members": 9, "n_nonmembers": 9}
    row |= {"p_adjusted": 0.0125, "p_shift": 0.25}
    rows = [
        row | {"metric": metric, "fpr_target": target, "verdict": said}
        for (metric, target), said in zip((("auc", None), ("tpr", 0.5)), drawn, strict=True)
    ]
    kinds = {"fpr_target": pl.Float64, "verdict": pl.String}
    return pl.DataFrame(rows, infer_schema_length=None, schema_overrides=kinds)


@pytest.mark.parametrize(
    "auc, tpr, control, level, said",
    [
        ("signal", "signal", FAIR, "signal", "None of 2 intervals of attacks on negative controls leaves chance."),
        ("chance", "chance", FAIR, "none", "not distinguishable from chance in AUC and TPR at 50 % FPR"),
        ("explained by shift", "explained by shift", FAIR, "shift", "not all that sees no membership"),
        ("explained by shift", "chance", FAIR, "shift", "TPR at 50 % FPR: chance (p = 0.013 against chance, p = 0.250"),
        ("signal", "explained by shift", FAIR, "undecided", "AUC: signal (p = 0.013 against chance, p = 0.250 aga"),
        ("signal", "chance", (0.52, 0.65), "undecided", "Of 2 intervals of attacks on negative controls 2 leave"),
        ("signal", "signal", (0.2, 0.3), "signal", "(luck alone lets one do so in about 5 % of models): c, random"),
        (None, None, None, "undecided", "No negative control was attacked"),
    ],
)
def test_verdict_levels(auc: str | None, tpr: str | None, control: Ends | None, level: str, said: str) -> None:
    found = verdict_of(auc, tpr, control)
    assert found.level == level and said in " ".join(found.sentences)


@pytest.mark.parametrize(
    "targets, said",
    [
        ('{"a": {"role": "boss"}}', "unknown role 'boss'"),
        ('{"a": {"role": "checkpoint"}}', "0 targets have role 'main'"),
        ('{"a": {', "targets are not JSON"),
        ("no/such.json", "JSON cannot be read"),
    ],
)
def test_targets_are_checked(targets: str, said: str, tmp_path: pathlib.Path) -> None:
    arguments = [f"--results={tmp_path}", f"--targets={targets}", f"--output={tmp_path / 'report.html'}"]
    with pytest.raises(UserError, match=said):
        CliRunner().invoke(report, arguments, catch_exceptions=False)


def test_planted_truth_is_checked(world: World, tmp_path: pathlib.Path) -> None:
    pl.DataFrame({"candidate_url": ["x"]}).write_parquet(tmp_path / "planted.parquet")
    arguments = [*world.arguments(tmp_path), "--planted", str(tmp_path / "planted.parquet")]
    with pytest.raises(UserError, match="no column 'member_url'"):
        CliRunner().invoke(report, arguments, catch_exceptions=False)


def test_principal_components_match_a_rotated_ellipse() -> None:
    random = rng.stream(1, "ellipse")
    spread = random.normal(size=(4000, 3)) * [3.0, 1.0, 0.1]
    turn = np.linalg.qr(random.normal(size=(3, 3)))[0]
    place, shares = stage.principal_components(spread @ turn.T + 5, spread @ turn.T + 5)
    assert np.allclose(np.abs(np.corrcoef(place[:, 0], spread[:, 0])[0, 1]), 1, atol=1e-3)
    assert shares == pytest.approx((9 / 10.01, 1 / 10.01), abs=0.02)


def test_command_imports_no_matplotlib_or_torch_until_it_runs() -> None:
    code = "import sys, mia.cli.report; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = "import sys, mia.report; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
