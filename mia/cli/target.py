"""Commands that make or fetch the model under attack: train, target."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from typing import Any

import click
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from mia import tables
from mia.cli import common
from mia.cli.common import many, one, seed_option, stage_options
from mia.errors import UserError


@click.command()
@one("--metadata", "The metadata table; its pools say what the model is trained on.")
@many("--images", "images", "Shards of the images table.")
@click.option("--duplicates", type=common.PATH, help="The duplicates table: a control leaves out what it drops.")
@click.option("--text-tower", required=True, help="open_clip model whose text tower becomes the text encoder.")
@one("--vae", "Folder of the frozen AutoencoderKL.")
@seed_option
@one("--output-dir", "Folder for the checkpoints, each an ordinary diffusers folder `step-NNNNN`.")
@stage_options("train")
def train(
    metadata: Any, images: Any, duplicates: Any, text_tower: str, vae: Any, seed: int, output_dir: Any, options: Any
) -> None:
    """Train the example's UNet on one pool and keep checkpoints; text encoder and VAE stay as they are."""
    import torch

    from mia import captions as texting
    from mia import latents, models, networks, toy
    from mia import train as stage

    on, dtype = models.device("cpu"), torch.float32
    ids, captions = _training_set(metadata, images, duplicates, options)
    clip, _, _, _ = models.encoder(text_tower, on)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(dir=output_dir.parent, prefix=f".{output_dir.name}."))
    try:
        toy.write_tokenizer(work / "tokenizer")
        text, schedule = toy.clip_text_model(clip), toy.schedule()
        selection = pa.table({"sample_id": ids, "caption": captions})
        coder = networks.Autoencoder.of(models.vae(vae.parent, on, dtype, vae.name))
        found, texts, _ = latents.encode(
            selection, common.image_bytes(images, ids), coder, texting.ClipText(models.tokenizer(work), text), 64
        )
        z0 = coder.scaled(latents.posterior(found, coder.latent_shape)[0])
        condition, caption = latents.conditions(found, texts, text.config.hidden_size)
        states = torch.cat([condition["states"][caption], condition["states"][-1:]])
        unet = stage.new_unet(z0.shape[1], z0.shape[2], text.config.hidden_size, options, seed)
        for step, trained in stage.train(unet, z0, states, schedule, options, seed, common.progress("train")):
            toy.write_pipeline(work / f"step-{step:05d}", clip, vae, trained)
        shutil.rmtree(work / "tokenizer")
        shutil.rmtree(output_dir, ignore_errors=True)
        work.chmod(0o755)
        work.rename(output_dir)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _training_set(metadata: Any, images: Any, duplicates: Any, options: Any) -> tuple[list[str], list[str]]:
    rows = pl.from_arrow(tables.read(metadata, "metadata", columns=("sample_id", "caption", "pool")))
    usable = tables.read(list(images), "images", columns=("sample_id", "status"))
    usable = usable.filter(pc.equal(usable["status"], "ok"))["sample_id"].to_pylist()
    assert isinstance(rows, pl.DataFrame)
    rows = rows.filter(pl.col("pool") == options.pool, pl.col("sample_id").is_in(usable))
    if duplicates is not None and options.pool != "member":
        near = tables.read(duplicates, "duplicates", columns=("sample_id", "reason"))
        dropped = near.filter(pc.is_valid(near["reason"]))["sample_id"].to_pylist()
        rows = rows.filter(~pl.col("sample_id").is_in(dropped))
    if options.max_images:
        rows = rows.head(options.max_images)
    if rows.is_empty():
        raise UserError(
            f"pool '{options.pool}' has no usable image to train on", metadata, "see the images table's status"
        )
    return rows["sample_id"].to_list(), rows["caption"].to_list()


@click.command()
@click.option("--source", required=True, help="A diffusers folder or a hub name.")
@click.option("--revision", default="", help="The hub's revision; empty takes its newest and records which.")
@click.option("--unet", default="", help="A fine-tuned denoiser in the base's place: folder, or hub NAME[@REVISION].")
@click.option("--lora", default="", help="A LoRA upon the base: a safetensors file, or hub NAME[@REVISION].")
@one("--output", "The target's manifest: source, revision, family, weight hashes, schedule check.")
def target(source: str, revision: str, unet: str, lora: str, output: Any) -> None:
    """Fetch a model, check that its parts fit together, and write down exactly which one it is."""
    from mia import families, models

    model = families.find(source, revision, unet, lora)
    resolved = revision or (model.folder.name if model.folder.parent.name == "snapshots" else "")
    common.write_json(output, {
        "source": source, "revision": resolved, **model.hashes(), **model.card(),
        **({"finetuned": unet} if unet else {}), **({"lora": lora} if lora else {}),
        "libraries": tables.library_versions(models.LIBRARIES),
    })  # fmt: skip
