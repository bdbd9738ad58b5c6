"""Commands that read the model: latents, features. Neither is given any file that holds a label."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click
import pyarrow.compute as pc

from mia import tables
from mia.cli import common
from mia.cli.common import batch_option, device_option, one, seed_option, stage_options
from mia.errors import UserError

if TYPE_CHECKING:
    from mia.walks import Counts


USUAL_STD = (0.5, 2.0)  # of scaled latents: wide enough for small shards, narrow enough for a factor left out


@click.command()
@one("--selection", "The samples, without labels.")
@one("--images", "One shard of the images table.")
@one("--target", "The target's manifest.")
@device_option
@batch_option
@one("--output", "The latents table of this shard.")
@one("--texts-output", "Text states, once for each caption of this shard, and the empty prompt's.")
@stage_options("latents")
def latents(
    selection: Any, images: Any, target: Any, device: str, batch_size: int, output: Any, texts_output: Any, options: Any
) -> None:
    """Encode a shard's images and captions once."""
    import torch

    from mia import families, models
    from mia import latents as stage

    about = common.manifest(target)
    model = families.of_manifest(about)
    model.hold(about, "encoders")
    on = models.device(device)
    autoencoder, captions = model.autoencoder(on, torch.float32), model.captions(on)
    rows = tables.read(selection, "selection")
    here = tables.read(images, "images", columns=("sample_id",))["sample_id"]
    rows = rows.filter(pc.is_in(rows["sample_id"], here.combine_chunks()))
    data = common.image_bytes([images], rows["sample_id"].to_pylist())
    found, texts, enlarged = stage.encode(rows, data, autoencoder, captions, batch_size, common.progress("latents"))
    spread = stage.spread(found, autoencoder)
    made = common.made_by(
        "latents", options, None, [selection, images], encoders=about["encoders"], device=device, dtype="float32",
        side_px=autoencoder.side_px, latent_shape=list(autoencoder.latent_shape), text_width=captions.width,
        truncated_captions=int((texts["n_tokens"].to_numpy() > captions.limit).sum()), enlarged_images=enlarged,
        latent_std=spread, libraries=models.LIBRARIES,
    )  # fmt: skip
    tables.write(texts_output, texts, "texts", made)
    tables.write(output, found, "latents", made)
    if spread is not None and model.family.autoencoder and not USUAL_STD[0] <= spread <= USUAL_STD[1]:
        common.say(
            f"warning: latents of {found.num_rows} images have a standard deviation of {spread:.2f} after scaling, "
            f"usual is about 1; is scaling_factor {autoencoder.scaling:g} this autoencoder's, {model.folder}?"
        )


@click.command()
@one("--latents", "One shard of the latents table.")
@one("--texts", "The same shard's text states.")
@one("--images", "The same shard's images, for pixel error and crops.")
@one("--selection", "The samples' captions, for `prompts`, `generations` and `variations`.", required=False)
@one("--target", "The target's manifest.")
@click.option("--block", required=True, help="One of the jobs that `mia plan` names, such as `noised` or `start-300`.")
@click.option("--encoder", default="", help="The open_clip model that compares generations.")
@seed_option
@click.option("--device", default="cpu", help="Torch device, or several between commas; never falls back in silence.")
@batch_option
@click.option("--compile/--no-compile", "compiled", default=False, help="Compile the denoiser; minutes at the start.")
@one("--output", "The features table of this block and shard.")
@stage_options("features")
def features(
    latents: Any, texts: Any, images: Any, selection: Any, target: Any, block: str, encoder: str, seed: int,
    device: str, batch_size: int, compiled: bool, output: Any, options: Any,
) -> None:  # fmt: skip
    """Read losses and statistics off the model at every timestep of one block of settings and probes."""
    from mia import models, walks
    from mia.cli.reading import CAPTIONED, Shard, read

    about = common.manifest(target)
    jobs = walks.jobs(options)
    if block not in jobs:
        raise UserError(
            f"no setting or probe asked for is read in block '{block}'", "--block", f"use {', '.join(jobs)}"
        )
    if tables.provenance(latents).get("encoders") != about["encoders"]:
        raise UserError("latents were made by another model's encoders", latents, "make them with this target's")
    if block in CAPTIONED and selection is None:
        raise UserError(f"block '{block}' needs the captions", "--selection", "give the selection table")
    shard = Shard(latents, texts, images, selection, about, block, jobs[block], seed, encoder)
    found = read(shard, device.split(","), batch_size, compiled, common.progress(f"features {block}"))
    inputs = [latents, texts, images, *([selection] if block in CAPTIONED else [])]
    made = common.made_by(
        "features", jobs[block], seed, inputs, unet=about["unet"], encoders=about["encoders"], block=block,
        device=device.split(",")[0].split(":")[0], latent_shape=found.latent_shape,
        has_null=found.has_null, **dataclasses.asdict(found.counts), libraries=models.LIBRARIES,
        **({"encoder": found.encoder} if found.encoder else {}),
    )  # fmt: skip
    tables.write(output, found.table, "features", made)
    common.say(f"features {block}: {found.samples} samples, {_told(found.counts)}")


def _told(counts: Counts) -> str:
    work = f"{counts.unet_rows} rows through the denoiser, {counts.decodes} decodes"
    return f"{work}, {counts.pictures} pictures in {counts.queries} queries" if counts.pictures else work
