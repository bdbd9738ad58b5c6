"""Commands that load a model, as a user runs them: one clear line, exit code 2, nothing half-written."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pytest

from mia import rows, services, tables, walks
from mia.cli import reading
from mia.config import FeaturesOptions
from mia.errors import UserError
from tests.conftest import ROOT, picture

URLS = [f"file:{i}.png" for i in range(3)]
IDS = [tables.sample_id(url, "a dog") for url in URLS]


def mia(*arguments: object) -> tuple[int, str]:
    """Exit code and the last line of what the command said."""
    command = [sys.executable, "-m", "mia", *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run.returncode, (run.stderr.strip().splitlines() or [""])[-1]


@pytest.fixture
def world(tmp_path, tiny_target):
    """A copied target, three images, and their selection, as tables."""
    shutil.copytree(tiny_target, tmp_path / "model")
    rows = [
        {"sample_id": i, "status": "ok", "detail": "", "sha256": "0" * 64, "bytes": picture(k), "width": 40,
         "height": 47, "format": "png", "phash": k}
        for k, i in enumerate(IDS)
    ]  # fmt: skip
    images = pa.Table.from_pylist(rows, schema=tables.SCHEMAS["images"])
    tables.write(tmp_path / "images.parquet", images, "images", {})
    selection = pa.table({"sample_id": IDS, "caption": ["a dog"] * 3, "sha256": ["0" * 64] * 3})
    tables.write(tmp_path / "selection.parquet", selection, "selection", {})
    return tmp_path


def manifest(world) -> tuple[int, str]:
    return mia("target", "--source", world / "model", "--output", world / "target.json")


def latents(world) -> tuple[int, str]:
    return mia(
        "latents", "--selection", world / "selection.parquet", "--images", world / "images.parquet",
        "--target", world / "target.json", "--output", world / "latents.parquet",
        "--texts-output", world / "texts.parquet",
    )  # fmt: skip


def features(world, *more: str) -> tuple[int, str]:
    return mia(
        "features", "--latents", world / "latents.parquet", "--texts", world / "texts.parquet",
        "--images", world / "images.parquet", "--target", world / "target.json", "--block", "noised",
        "--settings", "18", "--draws", "1", "--output", world / "features.parquet", *more,
    )  # fmt: skip


def test_from_a_folder_to_features(world):
    assert manifest(world)[0] == latents(world)[0] == features(world)[0] == 0
    made = tables.provenance(world / "features.parquet")
    assert (made["unet_rows"], made["decodes"]) == (6, 3)
    assert str(world) not in str(made)
    assert tables.read(world / "features.parquet", "features").num_rows == 3  # one timestep and draw of three images
    code, line = features(world, "--losses", "model_los")
    assert code == 2
    assert line == "error: --losses[0]: unknown value 'model_los'; use 'model_loss'"


def read(world, block: str, probes: str, *more: object, output: str = "features") -> tuple[int, str]:
    return mia(
        "features", "--latents", world / "latents.parquet", "--texts", world / "texts.parquet",
        "--images", world / "images.parquet", "--target", world / "target.json", "--block", block,
        "--settings", "", "--probes", probes, "--draws", "2", "--output", world / f"{output}.parquet", *more,
    )  # fmt: skip


def test_every_kind_of_block_is_read(world):
    assert manifest(world)[0] == latents(world)[0] == 0
    selection = ("--selection", world / "selection.parquet")
    found = {}
    for block, probes, more in (
        ("crops", "crops", ()), ("prompts", "prompts", selection),
        ("gradients", "gsa,gradient_masking,noise_optimisation", ("--gradient-timesteps", "101,501")),
        ("variations", "variations", (*selection, "--variations", "2")),
    ):  # fmt: skip
        code, line = read(world, block, probes, *more)
        assert code == 0, line
        made, table = tables.provenance(world / "features.parquet"), tables.read(world / "features.parquet", "features")
        assert made["latent_shape"] == [4, 8, 8]
        found[block] = (made["unet_rows"] // 3, made["decodes"] // 3, sorted(set(table["block"].to_pylist())))
    assert found == {
        "crops": (8, 0, ["crop-82"]), "prompts": (9, 0, ["prompt-1", "prompt-2", "prompt-3"]),
        # two backward passes and two masked inputs; six evaluations of the optimisation
        "gradients": (2 + 2 + 6, 0, ["gradient-masking", "gsa1", "gsa2", "noise-optimisation"]),
        "variations": (2, 2, ["variations"]),  # one step each, without guidance
    }  # fmt: skip


def test_two_devices_give_what_one_gives(world):
    assert manifest(world)[0] == latents(world)[0] == 0
    assert read(world, "clean", "pia", output="one")[0] == 0
    code, line = read(world, "clean", "pia", "--device", "cpu,cpu", "--batch-size", "5", output="two")
    assert code == 0, line
    assert (world / "one.parquet").read_bytes() == (world / "two.parquet").read_bytes()


def test_a_budget_is_the_shards_however_many_devices_share_it(world):
    """3 samples of 2 variations are 6 pictures; of two devices one asks for 4 of them and the other for 2."""
    assert manifest(world)[0] == latents(world)[0] == 0
    asked = ("--selection", world / "selection.parquet", "--variations", "2", "--device", "cpu,cpu", "--query-budget")
    code, line = read(world, "variations", "variations", *asked, "5")
    wanted = "error: 6 pictures of 3 samples would exceed the budget of 5, features.query_budget, raise it"
    assert code == 2 and line.startswith(wanted), line
    assert read(world, "variations", "variations", *asked, "6")[0] == 0
    made = tables.provenance(world / "features.parquet")
    assert (made["decodes"], made["pictures"], made["queries"]) == (6, 6, 2)


@pytest.fixture
def service():
    """The address of a service that makes black pictures, and how many it was asked for by each query."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            count = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompts"])
            asked.append(count)
            self.send_response(200)
            self.end_headers()
            black = services._png(np.zeros((32, 32, 3), np.uint8))
            self.wfile.write(json.dumps({"images": [black] * count}).encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_what_a_service_elsewhere_is_asked_is_counted_without_a_budget(world, service):
    """3 samples of 7 variations, 16 pictures a query: 21 in 2. The rows and decodes are the service's own."""
    assert manifest(world)[0] == latents(world)[0] == 0
    selection = ("--selection", world / "selection.parquet")
    address, asked = service
    code, line = read(world, "variations", "variations", *selection, "--variations", "7", "--service", address)
    assert code == 0, line
    assert line == ("features variations: 3 samples, 0 rows through the denoiser, 0 decodes, 21 pictures in 2 queries")
    made = tables.provenance(world / "features.parquet")
    assert [made[name] for name in ("unet_rows", "decodes", "pictures", "queries")] == [0, 0, 21, 2]
    assert asked == [16, 5]
    clip = f"local-dir:{ROOT / 'resources/example/encoders/clip'}"
    more = (*selection, "--generations", "2", "--service", address, "--encoder", clip)
    code, line = read(world, "generations", "generations", *more)
    assert code == 0 and line.endswith(" 6 pictures in 1 queries"), line
    made = tables.provenance(world / "features.parquet")
    assert (made["pictures"], made["queries"], asked[2:]) == (6, 1, [6])
    assert len(made["encoder"]) == 16  # the weights that compared the pictures


@pytest.mark.parametrize(
    ("service", "did", "wanted"),
    [
        ("https://example.org", {"pictures": 13}, "pictures=14"),
        ("", {"unet_rows": 14, "decodes": 14, "pictures": 13}, "unet_rows=14, decodes=14, pictures=14"),
    ],
)
def test_pictures_that_were_not_planned_are_a_bug(tmp_path, monkeypatch, service, did, wanted):
    chosen = FeaturesOptions(settings=(), probes=("variations",), variations=2, service=service)
    none = tmp_path / "none"
    shard = reading.Shard(none, none, none, None, {}, "variations", chosen, 0)
    monkeypatch.setattr(reading, "_require_budget", lambda shard: None)
    for missing in (0, 1):
        counts = dataclasses.replace(walks.Counts(**did), pictures=14 - missing, queries=1)
        part = reading.Part(rows.features_rows("variations", [], 50, 0, 5), counts, 7, [4, 8, 8], True)
        monkeypatch.setattr(reading, "_part", lambda *words, part=part: part)
        with pytest.raises(AssertionError, match=wanted) if missing else contextlib.nullcontext():
            reading.read(shard, ["cpu"], 16, False)


@pytest.mark.parametrize(
    ("budget", "options", "asked"),
    [
        (0, {"probes": ("variations",), "variations": 10}, None),  # no limit
        (70, {"probes": ("variations",), "variations": 10}, None),  # just enough for 7 samples
        (69, {"probes": ("variations",), "variations": 10}, 70),
        (1, {"probes": ("variations",), "variations": 1}, 7),  # fewer than samples, or than devices
        (21, {"probes": ("generations",), "generations": 3}, None),
        (20, {"probes": ("generations",), "generations": 3}, 21),
        (1, {"probes": ("clean",)}, None),  # asks for none
    ],
)
def test_a_budget_by_hand(tmp_path, budget, options, asked):
    """Each shard has its own; what its 7 samples ask for is known, and refused, before the first request."""
    ids = [tables.sample_id(str(i), "") for i in range(7)]
    half = tables.vector_column(np.zeros((7, 4), np.float16))
    rows = pa.table({"sample_id": ids, "caption_id": ids, "mean": half, "logvar": half})
    tables.write(tmp_path / "latents.parquet", rows, "latents", {})
    chosen = FeaturesOptions(settings=(), query_budget=budget, **options)
    none = tmp_path / "none"
    shard = reading.Shard(tmp_path / "latents.parquet", none, none, None, {}, "", chosen, 0)
    said = f"{asked} pictures of 7 samples would exceed the budget of {budget}"
    with pytest.raises(UserError, match=said) if asked else contextlib.nullcontext():
        reading._require_budget(shard)


@pytest.mark.parametrize(
    ("block", "probes", "more", "message"),
    [
        ("clean", "piano", (), "error: unknown probe 'piano', features.probes, use noised, "),
        ("clean", "crops", (), "error: no setting or probe asked for is read in block 'clean', --block, use crops"),
        ("prompts", "prompts", (), "error: block 'prompts' needs the captions, --selection, give the selection table"),
        ("crops", "crops", ("--crops", "100"), "error: --crops[0]: 100 is greater than 99"),
        ("clean", "clean", ("--device", "cuda"), "error: CUDA is asked for but torch finds no CUDA device"),
    ],
)
def test_a_block_that_cannot_be_read_is_one_line(world, block, probes, more, message):
    assert manifest(world)[0] == latents(world)[0] == 0
    code, line = read(world, block, probes, *more)
    assert code == 2 and line.startswith(message), line
    assert not (world / "features.parquet").exists()


def test_a_corrupt_shard_of_latents(world):
    assert manifest(world)[0] == latents(world)[0] == 0
    whole = (world / "latents.parquet").read_bytes()
    (world / "latents.parquet").write_bytes(whole[: len(whole) // 2])
    code, line = read(world, "clean", "clean")
    assert code == 2 and line.startswith("error: Parquet file cannot be read as Parquet") and "latents.parquet" in line


def test_a_target_that_lacks_a_part(world):
    shutil.rmtree(world / "model" / "vae")
    code, line = manifest(world)
    assert code == 2
    assert line.startswith("error: model folder lacks vae, ")
    assert not (world / "target.json").exists()


def test_a_checkpoint_that_yields_nan(world):
    from safetensors.torch import load_file, save_file

    file = next((world / "model" / "unet").glob("*.safetensors"))
    weights = load_file(file)
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, file)
    assert manifest(world)[0] == latents(world)[0] == 0
    code, line = features(world)
    assert code == 2
    assert (
        line.startswith("error: the model gives a model_loss that is not finite") or "bands that is not finite" in line
    )
    assert any(name in line for name in IDS)
    assert not list(world.glob("*features*"))


def test_weights_that_changed_behind_the_manifest(world):
    from safetensors.torch import load_file, save_file

    assert manifest(world)[0] == latents(world)[0] == 0
    file = next((world / "model" / "unet").glob("*.safetensors"))
    weights = load_file(file)
    weights["conv_out.bias"] += 1
    save_file(weights, file)
    code, line = features(world)
    assert code == 2
    assert "the manifest says" in line and "run `mia target` again" in line
