"""Commands that read the model: latents, features. Neither is given any file that holds a label."""

from __future__ import annotations

import pathlib
from typing import Any

import click
import pyarrow.compute as pc

from mia import settings, tables
from mia.cli import common
from mia.cli.common import batch_option, device_option, one, seed_option, stage_options
from mia.errors import UserError


def _hold(folder: pathlib.Path, about: dict, what: str, parts: tuple[str, ...]) -> None:
    """Refuse a model folder whose parts are not those that the manifest was made from."""
    from mia import models

    found = models.part_hash(folder, *parts)
    if found != about[what]:
        raise UserError(f"{what} is {found}, the manifest says {about[what]}", folder, "run `mia target` again")


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

    from mia import latents as stage
    from mia import models

    folder, about = common.target_folder(target)
    _hold(folder, about, "encoders", models.ENCODERS)
    on = models.device(device)
    autoencoder = models.vae(folder, on, torch.float32)
    tokenize, text = models.tokenizer(folder), models.text_encoder(folder, on, torch.float32)
    rows = tables.read(selection, "selection")
    here = tables.read(images, "images", columns=("sample_id",))["sample_id"]
    rows = rows.filter(pc.is_in(rows["sample_id"], here.combine_chunks()))
    data = common.image_bytes([images], rows["sample_id"].to_pylist())
    side = stage.side_px(models.part_config(folder, "unet")["sample_size"], autoencoder)
    found, texts = stage.encode(
        rows, data, autoencoder, tokenize, text, side, batch_size, progress=common.progress("latents")
    )
    made = common.made_by(
        "latents", options, None, [selection, images], encoders=about["encoders"], device=device, dtype="float32",
        side_px=side, text_width=models.part_config(folder, "text_encoder")["hidden_size"],
        truncated_captions=int((texts["n_tokens"].to_numpy() > tokenize.model_max_length).sum()),
        libraries=models.LIBRARIES,
    )  # fmt: skip
    tables.write(texts_output, texts, "texts", made)
    tables.write(output, found, "latents", made)


@click.command()
@one("--latents", "One shard of the latents table.")
@one("--texts", "The same shard's text states.")
@one("--images", "The same shard's images, for pixel error.")
@one("--target", "The target's manifest.")
@click.option("--block", required=True, help="`noised`, or `setting-NN` for a trajectory.")
@seed_option
@device_option
@batch_option
@one("--output", "The features table of this block and shard.")
@stage_options("features")
def features(
    latents: Any, texts: Any, images: Any, target: Any, block: str, seed: int, device: str, batch_size: int,
    output: Any, options: Any,
) -> None:  # fmt: skip
    """Read losses and statistics off the model at every timestep of one block of settings."""
    from mia import features as stage
    from mia import models

    _check_options(options, block)
    folder, about = common.target_folder(target)
    _hold(folder, about, "unet", ("unet",))
    made_of = tables.provenance(latents)
    if made_of.get("encoders") != about["encoders"]:
        raise UserError("latents were made by another model's encoders", latents, "make them with this target's")
    on, dtype = models.device(device), models.torch_dtype(options.dtype)
    unet, schedule = models.unet(folder, on, dtype), models.schedule(folder)
    autoencoder = models.vae(folder, on, dtype)
    samples = _samples(latents, texts, images, made_of, autoencoder, options)
    engine = stage.Engine(unet, autoencoder, schedule, samples, options, seed)
    found = stage.extract(engine, block, options.settings, batch_size, common.progress(f"features {block}"))
    wanted = stage.plan(block, options.settings, options, len(samples.ids))
    if engine.counts != wanted:
        raise AssertionError(f"planned {wanted}, did {engine.counts}")
    made = common.made_by(
        "features", options, seed, [latents, texts, images], unet=about["unet"], encoders=about["encoders"],
        block=block, device=device,
        unet_rows=engine.counts.unet_rows, decodes=engine.counts.decodes, libraries=models.LIBRARIES,
    )  # fmt: skip
    tables.write(output, found, "features", made)


def _check_options(options: Any, block: str) -> None:
    for name, chosen, known in (
        ("losses", options.losses, settings.LOSSES), ("timesteps", (options.timesteps,), settings.VARIANTS),
        ("block", (block,), settings.blocks(options.settings)),
        ("dtype", (options.dtype,), ("float64", "float32", "bfloat16", "float16")),
    ):  # fmt: skip
        wrong = [value for value in chosen if value not in known]
        if wrong:
            raise UserError(f"unknown {name} '{wrong[0]}'", f"--{name}", f"use {', '.join(known)}")


def _samples(latents: Any, texts: Any, images: Any, made_of: dict, autoencoder: Any, options: Any) -> Any:
    """One shard ready for the engine; pixels only when pixel error asks for them."""
    import torch

    from mia import features as stage
    from mia import latents as encoding

    rows, known = tables.read(latents, "latents"), tables.read(texts, "texts")
    ids = rows["sample_id"].to_pylist()
    z0 = encoding.latent_tensor(rows, autoencoder)
    states, caption = encoding.state_tensor(rows, known, made_of["text_width"])
    pixels = None
    if "pixel_error" in options.losses:
        data = common.image_bytes([images], ids)
        squares = encoding.squares(data, ids, made_of["side_px"])
        pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).float()
    return stage.Samples(ids, z0, states, caption, pixels)
