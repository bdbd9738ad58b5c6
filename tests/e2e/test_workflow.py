"""The workflow itself: a small real run, then what a change reruns, by dry runs on its results."""

from __future__ import annotations

import copy
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

AFTER_DEDUP = {
    "matches", "links", "dedup", "train", "target", "sanitize", "distance", "audit", "latents", "features", "scores",
    "evaluation", "report", "all",
}  # fmt: skip
CORES = 2
RESUMABLE = ("--cores", str(CORES), "--rerun-incomplete")


def small() -> dict:
    """The example's configuration, cut to what runs in a minute or two."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    config["name"] = "small"
    config["shards"] = 1
    config["metadata"]["max_rows_per_pool"] = 150
    config["sanitize"] |= {"max_rounds": 2, "folds": 2, "max_per_side": 110}
    config["features"] |= {"settings": [18, 16], "draws": 1}
    config["scores"] |= {"trees": [5, 10], "folds": 3, "attacks": ["loss_threshold", "random_forest"]}
    config["audit"] |= {"folds": 3}
    config["evaluation"] |= {"fpr_targets": [0.05, 0.01], "bootstrap": 100, "permutations": 100}
    models = config["train"]["models"]
    models["trained_on_members"] |= {"checkpoints": [0, 3], "block_out_channels": [16, 32]}
    models["trained_on_neither"] |= {"checkpoints": [3], "block_out_channels": [16, 32]}
    config["targets"] = {
        "main": {"role": "main", "source": "results/small/models/trained_on_members/step-00003", "step": 3},
        "neither": {
            "role": "negative_control", "encoders_of": "main",
            "source": "results/small/models/trained_on_neither/step-00003",
        },
    }  # fmt: skip
    return config


class Checkout:
    """A copy of the repository in which a run may be made and things may be changed."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.results = folder, folder / "results/small"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")
        for name in filter(None, listed):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def snakemake(self, config: dict, *arguments: str) -> subprocess.CompletedProcess:
        """A run to its end."""
        with self.started(config, *arguments) as run:
            out, err = run.communicate()
        return subprocess.CompletedProcess(run.args, run.returncode, out, err)

    def started(self, config: dict, *arguments: str, **how: Any) -> subprocess.Popen:
        """A run that goes on; `how` as `Popen` takes it."""
        file = self.folder / "small.yaml"
        text = yaml.safe_dump(config, sort_keys=False)
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)
        environment = os.environ | {
            "PYTHONPATH": str(self.folder), "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        words = ["snakemake", "--configfile", "small.yaml", *arguments]
        return subprocess.Popen(words, cwd=self.folder, env=environment, **pipes | how)

    def outputs(self) -> dict[pathlib.PurePath, bytes]:
        """Every file of the results but logs, which tell of time, and what is hidden: unfinished, or snakemake's."""
        files = [file for file in self.results.rglob("*") if file.is_file()]
        found = {file.relative_to(self.results): file.read_bytes() for file in files}
        return {name: data for name, data in found.items() if not re.match(r"logs/|(.*/)?\.", name.as_posix())}

    def finished(self) -> dict[pathlib.PurePath, int]:
        """When each job that is done was so: its benchmark, the last file that snakemake writes, and the time of it."""
        return {file.relative_to(self.results): file.stat().st_mtime_ns for file in self.results.rglob("logs/**/*.tsv")}

    def reruns(self, config: dict) -> dict[str, int]:
        """Rule -> number of jobs that a run would start."""
        run = self.snakemake(config, "-n")
        assert run.returncode == 0, run.stdout + run.stderr
        if "Nothing to be done" in run.stdout + run.stderr:
            return {}
        stats = (run.stdout + run.stderr).split("Job stats:")[-1].split("total")[0]
        return {rule: int(count) for rule, count in re.findall(r"^(\w+)\s+(\d+)$", stats, re.M)}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Checkout:
    checkout = Checkout(tmp_path_factory.mktemp("checkout"))
    run = checkout.snakemake(small(), "--cores", "2", "--show-failed-logs")
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    return checkout


def test_a_finished_run_has_its_report_and_nothing_more_to_do(done):
    assert (done.folder / "results/small/report.html").stat().st_size > 10_000
    assert done.reruns(small()) == {}


def test_batch_size_reruns_nothing(done):
    config = small()
    config["execution"] |= {"batch_size": 7, "concurrency": 3, "timeout_s": 5}
    assert done.reruns(config) == {}


def test_an_attacks_option_reruns_scores_evaluation_and_report(done):
    config = small()
    config["scores"]["trees"] = [11]
    assert done.reruns(config) == {"scores": 2, "evaluation": 2, "report": 1, "all": 1}


FLOW = (
    "select", "metadata", "probe", "images", "attrition", "embeddings", "neighbours", "matches", "links", "dedup",
    "train", "target", "sanitize", "distance", "audit", "latents", "features", "scores", "evaluation", "report", "all",
)  # fmt: skip


@pytest.mark.parametrize(
    ("section", "option", "value", "first"),
    [
        ("metadata", "min_caption_chars", 2, "metadata"), ("images", "max_pixels", 10**6, "probe"),
        ("neighbours", "k", 3, "neighbours"), ("dedup", "max_hamming", 5, "matches"),
        ("sanitize", "step", 0.25, "sanitize"), ("distance", "permutations", 50, "distance"),
        ("audit", "top_features", 7, "audit"), ("features", "draws", 2, "features"),
        ("scores", "standardize", False, "scores"), ("evaluation", "confidence", 0.9, "audit"),
    ],
)  # fmt: skip
def test_an_option_reruns_its_own_stage_and_none_before_it(done, section, option, value, first):
    config = small()
    config[section][option] = value
    found = done.reruns(config)
    assert found.pop(first) and found["report"] == 1 and not set(found) & set(FLOW[: FLOW.index(first)])


def test_another_setting_extracts_only_its_own_block(done):
    config = small()
    config["features"]["settings"] = [18, 16, 15]
    assert done.reruns(config) == {"features": 2, "scores": 2, "evaluation": 2, "report": 1, "all": 1}


def test_another_attack_extracts_only_the_block_it_needs(done):
    config = small()
    config["scores"]["attacks"] = [*config["scores"]["attacks"], "sima"]
    assert done.reruns(config) == {"features": 2, "scores": 2, "evaluation": 2, "report": 1, "all": 1}
    shown = done.snakemake(config, "-n").stdout
    assert set(re.findall(r"block=([\w.-]+)", shown)) == {"clean"}


@pytest.mark.parametrize(
    ("option", "value"), [("generations", 9), ("crops", [70]), ("latent_shift_index", 3), ("text_shift_scale", 2.0)]
)
def test_an_option_that_no_extracted_block_looks_at_reruns_nothing(done, option, value):
    config = small()
    config["features"][option] = value
    assert done.reruns(config) == {}


def test_raising_a_stages_version_reruns_it_and_all_after_it(done):
    module = done.folder / "mia" / "config.py"
    before = module.read_text()
    head, tail = before.split("class DedupOptions", 1)
    raised = re.sub(r"version: ClassVar\[int\] = \d+", "version: ClassVar[int] = 99", tail, count=1)
    module.write_text(f"{head}class DedupOptions{raised}")
    try:
        assert set(done.reruns(small())) == AFTER_DEDUP
    finally:
        module.write_text(before)
    assert done.reruns(small()) == {}


def test_another_threshold_searches_no_neighbours_again(done):
    config = small()
    config["dedup"]["max_distance"] = 0.4
    assert set(done.reruns(config)) == AFTER_DEDUP


@pytest.mark.parametrize("shards", [1, 2, 3, 6])
def test_every_two_shards_meet_in_one_job_and_jobs_have_equal_work(done, shards):
    run = done.snakemake(small() | {"shards": shards, "name": "cut"}, "-n", "results/cut/duplicates.parquet")
    jobs = re.findall(r"rule links:\n\s+input: (.*)", run.stdout + run.stderr)
    read = [[int(number) for number in re.findall(r"embeddings/(\d+)\.parquet", job)] for job in jobs]
    met = sorted(tuple(sorted((own, other))) for own, *others in read for other in [own, *others])
    assert met == [(i, j) for i in range(shards) for j in range(i, shards)]
    assert max(map(len, read)) - min(map(len, read)) <= 1


def test_latents_and_features_are_given_no_file_with_a_label(done):
    run = done.snakemake(small(), "-n", "--forceall")
    inputs = re.findall(r"rule (latents|features):\n\s+input: (.*)", run.stdout + run.stderr)
    assert len(inputs) == 3
    for _, files in inputs:
        for file in files.split(", "):
            assert re.search(r"\.selection\.parquet|/images/|/latents/|/targets/", file), file


def test_a_mistake_in_the_configuration_is_one_line(done):
    config = copy.deepcopy(small())
    config["dedup"]["max_distnace"] = config["dedup"].pop("max_distance")
    run = done.snakemake(config, "-n")
    assert run.returncode != 0
    assert "unknown key 'max_distnace'; use 'max_distance'" in run.stderr
    assert "Traceback" not in run.stderr


def test_lint_finds_nothing(done):
    run = done.snakemake(small(), "--lint")
    assert run.returncode == 0, run.stdout + run.stderr


def test_snakemakes_own_report_holds_the_figures(done):
    run = done.snakemake(small(), "--report", "archive.html")
    assert run.returncode == 0, run.stderr
    archive = (done.folder / "archive.html").read_text()
    assert "roc" in archive
    assert "method matched, pairs within 0.25 log-odds" in archive and "a member stays above" not in archive


def test_results_are_the_same_bytes_from_one_shard_and_from_three(done, tmp_path):
    other = Checkout(tmp_path)
    run = other.snakemake(small() | {"shards": 3}, "--cores", "2", "results/small/scores/main.parquet")
    assert run.returncode == 0, run.stderr[-2000:]
    import pyarrow.parquet as pq

    one, three = (pq.read_table(at.results / "scores/main.parquet") for at in (done, other))
    assert one.replace_schema_metadata(None).equals(three.replace_schema_metadata(None))


def killed_after(jobs: int, checkout: Checkout) -> dict[pathlib.PurePath, int]:
    """Starts a run and kills it with all its jobs, without notice, once so many are done; those, as `finished` does."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with checkout.started(small(), *RESUMABLE, **quiet) as run:
        while len(checkout.finished()) < jobs:
            assert run.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
        time.sleep(1)  # snakemake notes the last one as finished, and the next are under way
        os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    return checkout.finished()


def test_killed_at_many_moments_a_run_ends_in_the_same_bytes(done, tmp_path):
    """A kill costs the jobs under way and no others, and what it leaves is hidden: no output holds another byte."""
    checkout = Checkout(tmp_path)
    before: dict[pathlib.PurePath, int] = {}
    for jobs in range(3, len(done.finished()), 7):
        now = killed_after(jobs, checkout)
        assert sum(now[name] != at for name, at in before.items()) <= CORES, "what was finished is made again"
        before = now
        assert checkout.snakemake(small(), "--unlock").returncode == 0
    run = checkout.snakemake(small(), *RESUMABLE)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    one, other = done.outputs(), checkout.outputs()
    assert one.keys() == other.keys() and len(one) > 50
    assert [name for name in one if one[name] != other[name]] == []
