"""One shard's job from files to a features table: loads the target, prepares samples, shares out the devices."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from mia import captions, families, latents, models, pixels, settings, tables, walks
from mia.cli import common, passes
from mia.config import FeaturesOptions
from mia.errors import UserError
from mia.features import extract
from mia.walks import Counts

if TYPE_CHECKING:
    import torch

    from mia.networks import Autoencoder, Network
    from mia.reader import Samples


CAPTIONED = ("prompts", "generations", "variations")  # blocks that put captions through the text encoder anew


@dataclasses.dataclass(frozen=True)
class Shard:
    """What one job reads: files, the target's manifest, the job and its options."""

    latents: pathlib.Path
    texts: pathlib.Path
    images: pathlib.Path
    selection: pathlib.Path | None
    about: dict[str, Any]
    block: str
    options: FeaturesOptions
    seed: int
    encoder: str = ""


class Part(NamedTuple):
    """What was read, of how many samples, off a network of which latents' shape and with a null condition?

    `encoder` is the hash of the encoder that compared generations, empty where none did.
    """

    table: pa.Table
    counts: Counts
    samples: int
    latent_shape: list[int]
    has_null: bool
    encoder: str = ""


def read(shard: Shard, devices: Sequence[str], batch_size: int, compiled: bool, progress: Callable = iter) -> Part:
    """What a shard's job reads.

    With several devices each reads a part of the samples in a process of its own; the table is the same.

    Raises:
        UserError: a device that is not there, a model that changed behind its manifest, more pictures than the budget
            holds, or what `extract` says.
        AssertionError: the work done is not the work planned.
    """
    for name in devices:
        models.device(name)
    _require_budget(shard)
    if len(devices) == 1:
        parts = [_part(shard, devices[0], 0, 1, batch_size, compiled, progress)]
    else:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(len(devices), spawn) as pool:
            jobs = [
                pool.submit(_part, shard, name, part, len(devices), batch_size, compiled)
                for part, name in enumerate(devices)
            ]
            parts = [job.result() for job in progress(jobs)]
    counts = sum((part.counts for part in parts), Counts())
    samples = sum(part.samples for part in parts)
    wanted = _planned(shard.options, parts[0].has_null) * samples
    if counts != wanted:
        raise AssertionError(f"planned {wanted}, did {counts}")
    whole = tables.check(pa.concat_tables([part.table for part in parts]), "features")
    return parts[0]._replace(table=whole, counts=counts, samples=samples)


def _planned(options: FeaturesOptions, has_null: bool) -> Counts:
    """The work for one image; of a service elsewhere only the pictures are ours to see."""
    once = walks.planned(options, has_null) + passes.planned(options, has_null).counts
    return Counts(pictures=once.pictures) if options.service else once


def _require_budget(shard: Shard) -> None:
    """Stop before any device asks for a picture when all of them together would exceed the shard's budget."""
    budget, samples = shard.options.query_budget, tables.read(shard.latents, "latents", ("sample_id",)).num_rows
    asked = passes.planned(shard.options).counts.pictures * samples
    if 0 < budget < asked:
        raise UserError(
            f"{asked} pictures of {samples} samples would exceed the budget of {budget}", "features.query_budget",
            "raise it, or ask for fewer, or of more shards",
        )  # fmt: skip


def _part(
    shard: Shard, device: str, part: int, parts: int, batch_size: int, compiled: bool, progress: Callable = iter
) -> Part:
    """Every `parts`-th sample from `part` on, read on one device."""
    import torch

    on = models.device(device)
    if on.type == "cuda":
        torch.cuda.set_device(on)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = shard.options.tf32
    model = families.of_manifest(shard.about)
    model.hold(shard.about, "unet")
    half = shard.block == "gradients" and shard.options.dtype == "float16"  # its gradients overflow
    network = model.network(on, models.torch_dtype("bfloat16" if half else shard.options.dtype))
    if on.type == "cuda":
        network.denoiser.to(memory_format=torch.channels_last)
    if compiled:
        network.denoiser = torch.compile(network.denoiser, dynamic=False)
    prompts = model.captions(on) if shard.block in CAPTIONED else None
    coder = model.autoencoder(on, torch.float32) if shard.block == "crops" else network.autoencoder
    found, seed = samples(shard, network, coder, prompts, part, parts), shard.seed
    options = shard.options  # its budget is the shard's; that all parts together keep to it was asked before the first
    judge, weights = passes.encoder(shard.encoder, on, batch_size) if shard.block == "generations" else (None, "")
    if shard.block == "gradients":
        table, counts = passes.read_gradients(network, found, options, seed, batch_size, progress)
    elif shard.block in ("generations", "variations") and prompts is not None:
        squares = _squares(shard, found.ids, network)
        table, counts = passes.read_pictures(
            shard.block, network, found, _captions(shard, found.ids), squares, prompts, judge, options, seed, progress
        )  # fmt: skip
    else:
        table, counts = extract(network, found, options, seed, batch_size, progress)
    return Part(table, counts, len(found.ids), list(network.latent_shape), network.has_null, weights)


def samples(
    shard: Shard, network: Network, coder: Autoencoder, prompts: captions.Captions | None, part: int = 0, parts: int = 1
) -> Samples:
    """One shard's samples ready for the engine: latents, conditions, and what its block needs besides."""
    import torch

    from mia.reader import Samples

    rows, texts = tables.read(shard.latents, "latents"), tables.read(shard.texts, "texts")
    rows = rows.take(np.arange(part, rows.num_rows, parts))
    ids = rows["sample_id"].to_pylist()
    mean, logvar = latents.posterior(rows, network.latent_shape)
    condition, caption = latents.conditions(rows, texts, tables.provenance(shard.latents).get("text_width", 0))
    shifts = any(settings.setting(number).text_shift for number in shard.options.settings)
    if (shifts or shard.block == "prompts") and "states" not in condition:
        what = "shortened captions" if shard.block == "prompts" else "settings that shift text states"
        raise UserError(f"{what} need a model that reads text", shard.about["source"], "leave them out for this target")
    text, posteriors, shown = {"caption": caption}, {"image": (mean, logvar)}, None
    if "pixel_error" in shard.options.losses and shard.options.settings:
        shown = torch.from_numpy(_squares(shard, ids, network)).permute(0, 3, 1, 2).float()
    if "crops" in shard.options.probes:
        squares = _squares(shard, ids, network)
        for percent in shard.options.crops:
            posteriors[f"crop-{percent}"] = _crops(squares, percent, coder)
    if prompts is not None and shard.block == "prompts":
        names = _captions(shard, ids)
        condition, more = _with_prompts(condition, names, prompts)
        text |= more
    z0 = {source: network.scaled(mean) for source, (mean, _) in posteriors.items()}
    spread = {}
    if shard.options.posterior == "sample":
        spread = {
            source: network.scaled(mean + (logvar / 2).exp()) - z0[source]
            for source, (mean, logvar) in posteriors.items()
        }
    return Samples(ids, z0, condition, text, shown, spread)


def _squares(shard: Shard, ids: Sequence[str], network: Network) -> np.ndarray:
    return latents.squares(common.image_bytes([shard.images], ids), list(ids), network.side_px)


def _crops(squares: np.ndarray, percent: int, coder: Autoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance, unscaled, of the middle `percent` of each side of the images, enlarged to the whole."""
    import torch

    side = squares.shape[1]
    kept = max(1, round(side * percent / 100))
    first = (side - kept) // 2
    middle = squares[:, first : first + kept, first : first + kept]
    x = np.stack([pixels.resized(image, side) for image in middle]) if len(middle) else squares
    found = [torch.empty(2, 0, *coder.latent_shape)]
    for run, real in models.batches(len(x), models.MIN_BATCH):
        batch = torch.from_numpy(x[run]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            found.append(torch.stack(coder.encode(batch))[:, :real].cpu())
    mean, logvar = torch.cat(found, 1).half().float()  # in float32 and rounded as the image's own were
    return mean, logvar


def _captions(shard: Shard, ids: Sequence[str]) -> list[str]:
    rows = tables.read(shard.selection, "selection", columns=("sample_id", "caption")).to_pydict()
    known = dict(zip(rows["sample_id"], rows["caption"], strict=True))
    return [known[i] for i in ids]


def shortened(caption: str, third: int) -> str:
    """The caption without its first (1), middle (2) or last (3) third of characters. Source: CLiD, simple clipping."""
    cut = [round(len(caption) * part / 3) for part in range(4)]
    return caption[: cut[third - 1]] + caption[cut[third] :]


def _with_prompts(
    condition: dict[str, torch.Tensor], names: list[str], prompts: captions.Captions
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """The condition with the shortened captions' rows before the null row; each sample's row for each third."""
    import torch

    short = [[shortened(name, third) for name in names] for third in (1, 2, 3)]
    distinct = sorted({caption for some in short for caption in some})
    place = {caption: row for row, caption in enumerate(distinct)}
    encoded = prompts.encode(distinct, 64) if distinct else {}
    start = len(next(iter(condition.values()))) - 1
    grown = {}
    for name, values in condition.items():
        more = torch.from_numpy(encoded[name]).to(values.dtype) if distinct else values[:0]
        grown[name] = torch.cat([values[:-1], more, values[-1:]])
    rows = {
        f"prompt-{k}": np.array([start + place[c] for c in some], dtype=np.int64) for k, some in enumerate(short, 1)
    }
    return grown, rows
