"""Commands that load a model, as a user runs them: one clear line, exit code 2, nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pyarrow as pa
import pytest

from mia import tables
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
    assert tables.read(world / "features.parquet", "features").num_rows == 6  # grid and setting, three images
    code, line = features(world, "--losses", "model_los")
    assert code == 2
    assert line == "error: --losses[0]: unknown value 'model_los'; use 'model_loss'"


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
