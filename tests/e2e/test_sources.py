"""Sources in the workflow: one job a file, killed and resumed, and the configurations of workflow/config/."""

from __future__ import annotations

import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import polars as pl
import pytest
import yaml

from mia import tables
from mia.config import sources
from tests.conftest import ROOT
from tests.hub import COMMIT, OLD, Hub, serving

pytestmark = pytest.mark.slow

REPO = "laion/tiny"
WHOLE = "results/x/metadata.parquet"


def rows(name: str, n: int = 30, **names: str) -> pl.DataFrame:
    """Rows under the names that a source has for url and caption."""
    frame = pl.DataFrame(
        {"url": [f"http://{name}/{i}" for i in range(n)], "caption": [f"drawing {i} of {name}" for i in range(n)],
         "width": [10 if i % 3 == 0 else 640 for i in range(n)], "height": [480] * n}
    )  # fmt: skip
    return frame.rename(names)


def parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


class Slow(Hub):
    """A hub that does not answer for its file `b` before it is told to."""

    free = threading.Event()

    def do_GET(self) -> None:  # noqa: N802
        if "part-b" in self.path:
            self.free.wait(120)
        super().do_GET()


class Run:
    """A folder in which the workflow runs on sources of two kinds: a hub on this machine, and local files."""

    def __init__(self, folder: pathlib.Path, endpoint: str) -> None:
        self.folder, self.endpoint = folder, endpoint
        (folder / "data").mkdir(exist_ok=True)
        rows("csv", url="link", caption="text").write_csv(folder / "data" / "c.csv")
        rows("json").write_ndjson(folder / "data" / "d.jsonl")

    def config(self) -> dict:
        config = yaml.safe_load((ROOT / "config.yaml").read_text())
        config["name"] = "x"
        config["select"] = {"min_side_px": 16}
        same = {name: name for name in ("url", "caption", "width", "height")}
        config["metadata"] = {
            "sources": {
                "member": [f"hf://datasets/{REPO}@{COMMIT}/part-{part}.parquet" for part in "ab"],
                "candidate": [
                    {"file": "data/c.csv", "columns": same | {"url": "link", "caption": "text"}}, "data/d.jsonl",
                ],
            },
            "columns": same,
        }  # fmt: skip
        return config

    def start(self, config: dict, *arguments: str, **more: object) -> subprocess.Popen:
        (self.folder / "x.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        # No path of this test's own may reach a job: what is imported is the checkout, in its own Python.
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.folder / "hf"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        words = ["snakemake", "-s", str(ROOT / "Snakefile"), "--configfile", "x.yaml", *arguments]
        return subprocess.Popen(
            words, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def snakemake(self, config: dict, *arguments: str) -> tuple[int, str]:
        run = self.start(config, *arguments)
        text, _ = run.communicate(timeout=300)
        return run.returncode, text

    def make(self, config: dict) -> str:
        code, text = self.snakemake(config, "--cores", "2", "--show-failed-logs", "--rerun-incomplete", WHOLE)
        assert code == 0, text[-3000:]
        return text

    def reruns(self, config: dict) -> set[str]:
        """The outputs of the `select` jobs that a run would start, and `metadata` if it would be."""
        code, text = self.snakemake(config, "-n", WHOLE)
        assert code == 0, text[-3000:]
        found = re.findall(r"output: results/x/selected/(\w+/\d+)\.parquet", text)
        return set(found) | ({"metadata"} if re.search(r"^(local)?rule metadata:", text, re.M) else set())

    def outputs(self) -> dict[str, bytes]:
        folder = self.folder / "results" / "x"
        found = [*folder.glob("selected/*/*.parquet"), *folder.glob("dropped/*.parquet"), folder / "metadata.parquet"]
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Iterator[Run]:
    """A run that was killed while it fetched the second file, and then finished."""
    files = {(REPO, at, f"part-{part}.parquet"): parquet(rows(part + at[0])) for part in "ab" for at in (COMMIT, OLD)}
    with serving(files, Slow) as (handler, endpoint):
        run = Run(tmp_path_factory.mktemp("killed"), endpoint)
        started = run.start(run.config(), "--cores", "2", WHOLE)
        selected = run.folder / "results/x/selected"
        others = [selected / name for name in ("member/0.parquet", "candidate/0.parquet", "candidate/1.parquet")]
        end = time.monotonic() + 120
        while not all(path.is_file() for path in others):
            assert started.poll() is None and time.monotonic() < end, started.communicate(timeout=5)[0]
            time.sleep(0.1)
        time.sleep(1)  # snakemake notes the last one as finished
        os.killpg(started.pid, signal.SIGKILL)
        started.communicate()
        before = {path: path.stat().st_mtime_ns for path in others}
        assert not (selected / "member/1.parquet").exists()
        code, text = run.snakemake(run.config(), "--unlock")
        assert code == 0, text
        Slow.free.set()
        text = run.make(run.config())
        assert {path: path.stat().st_mtime_ns for path in others} == before, "what was finished is not made again"
        assert len(re.findall(r"^(?:local)?rule select:", text, re.M)) == 1
        run.handler = handler
        yield run


def test_killed_and_resumed_gives_the_bytes_of_a_run_that_was_not(done, tmp_path):
    other = Run(tmp_path, done.endpoint)
    other.make(other.config())
    assert other.outputs() == done.outputs() and len(done.outputs()) == 6


def test_every_source_is_in_the_table_by_its_own_columns_and_name(done):
    found = tables.read(done.folder / WHOLE, "metadata").to_pylist()
    hub = {f"hf://datasets/{REPO}@{COMMIT}/part-{part}.parquet" for part in "ab"}
    assert {(row["pool"], row["source"]) for row in found} == {
        *(("member", name) for name in hub), ("candidate", "c"), ("candidate", "d"),
    }  # fmt: skip
    assert len(found) == 4 * 20 and {row["width"] for row in found} == {640}
    dropped = tables.read(done.folder / "results/x/dropped/metadata.parquet", "dropped").to_pylist()
    assert {(row["stage"], row["reason"], row["pool"], row["rows"]) for row in dropped} == {
        ("select", "too small", "member", 20), ("select", "too small", "candidate", 20),
    }  # fmt: skip


def test_a_second_run_does_nothing(done):
    assert done.reruns(done.config()) == set()


def test_another_entry_reruns_only_its_own_file_and_what_follows(done):
    config = done.config()
    config["metadata"]["sources"]["member"][1] = f"hf://datasets/{REPO}@{OLD}/part-b.parquet"
    assert done.reruns(config) == {"member/1", "metadata"}
    config = done.config()
    config["metadata"]["sources"]["candidate"][0]["columns"]["similarity"] = "width"
    assert done.reruns(config) == {"candidate/0", "metadata"}
    config = done.config()
    config["metadata"]["sources"]["candidate"].append("data/d.jsonl")
    assert done.reruns(config) == {"candidate/2", "metadata"}
    config["metadata"]["sources"]["candidate"].pop()
    config["metadata"]["min_caption_chars"] = 2
    assert done.reruns(config) == {"metadata"}


def test_a_local_file_that_changed_is_read_again_and_no_other(done):
    file = done.folder / "data" / "d.jsonl"
    before, times = file.read_bytes(), file.stat()
    rows("json", 31).write_ndjson(file)
    try:
        assert done.reruns(done.config()) == {"candidate/1", "metadata"}
    finally:
        file.write_bytes(before)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert done.reruns(done.config()) == set()


def test_a_filter_of_select_reruns_every_file(done):
    config = done.config()
    config["select"]["min_side_px"] = 20
    assert done.reruns(config) == {"member/0", "member/1", "candidate/0", "candidate/1", "metadata"}


def test_a_commit_to_be_filled_in_stops_the_run_with_the_line_to_write(done, tmp_path):
    run = Run(tmp_path, done.endpoint)
    config = run.config()
    config["metadata"]["sources"]["member"] = [f"hf://datasets/{REPO}@COMMIT/part-a.parquet"]
    code, text = run.snakemake(config, "-n", WHOLE)
    assert code == 0, text
    code, text = run.snakemake(config, "--cores", "1", "--retries", "0", "results/x/selected/member/0.parquet")
    line = f"error: 'COMMIT' is no commit of 40 hex digits, so the source may change, hf://datasets/{REPO}@COMMIT/"
    assert code != 0 and line in text and f"write hf://datasets/{REPO}@{COMMIT}/part-a.parquet" in text, text


# ------------------------------------------------------------------------------------------------ our configurations


@pytest.mark.parametrize("path", sorted((ROOT / "workflow" / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_of_ours_builds_its_jobs_without_network(path, tmp_path):
    """Local files are inputs, so something must stand there; files on the hub are none."""
    config = yaml.safe_load(path.read_text())
    config["shards"] = 5  # planning takes time with the square of it: every shard searches all members' shards
    files = [one["file"] for pool in sources(config).values() for one in pool]
    local = [tmp_path / file for file in files if not file.startswith("hf:")]
    for file in local:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    run = Run(tmp_path, "http://127.0.0.1:9")  # where no one listens
    code, text = run.snakemake(config, "-n")
    assert code == 0, text[-3000:]
    counts = dict(re.findall(r"^(\w+)\s+(\d+)$", text.split("Job stats:")[-1].split("total")[0], re.M))
    assert int(counts["select"]) == len(files) and int(counts["images"]) == config["shards"]
    assert ("COMMIT" in path.read_text()) == (path.stem in ("laion-mi", "relaion"))
