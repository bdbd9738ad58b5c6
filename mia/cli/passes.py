"""The jobs that are no walk: gradients, generations and variations, each a pass of its own over a shard's samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from mia import blackbox, gradients, noise_optimisation, services, tables, walks
from mia.config import FeaturesOptions
from mia.errors import UserError
from mia.walks import Counts

if TYPE_CHECKING:
    from mia.attacks import Attack
    from mia.captions import Captions
    from mia.networks import Network
    from mia.reader import Samples

GRADIENT_PASSES = {
    "gsa": "gsa", "gradient_masking": "gradient-masking", "noise_optimisation": "noise-optimisation"
}  # fmt: skip


class Work(NamedTuple):
    """For one image: rows, decodes and pictures; encodes, backward passes, and those of them that go to weights."""

    counts: Counts
    encodes: int = 0
    backwards: int = 0
    to_weights: int = 0


def planned(options: FeaturesOptions, has_null: bool = True) -> Work:
    """What the passes among the probes of `options` cost for one image."""
    chosen = [GRADIENT_PASSES[name] for name in options.probes if name in GRADIENT_PASSES]
    white = gradients.planned(chosen, _gradients(options), 1)
    asked = _asked(options)
    drawn = services.planned(_sampling(options, "generations", has_null), asked["generations"])
    varied = services.planned(
        _sampling(options, "variations", has_null), variations=asked["variations"], strength=_pictures(options).strength
    )
    rows, decodes = white.unet_rows + drawn.unet_rows + varied.unet_rows, drawn.decodes + varied.decodes
    to_weights = gradients.planned([name for name in chosen if name == "gsa"], _gradients(options), 1).backwards
    return Work(Counts(rows, decodes, sum(asked.values())), varied.encodes, white.backwards, to_weights)


def as_run(attack: Attack, jobs: Mapping[str, FeaturesOptions], has_null: bool = True) -> Attack:
    """An attack of the registry, its costs those under the options of the jobs that were run, by name.

    As it is where its job was not among them, or where none of their options changes what it costs.
    """
    if attack.unet_rows is None:
        return _of_settings(attack, jobs, has_null)
    jobs_of = {probe: jobs[walks.job_of(probe)] for probe in attack.probes if walks.job_of(probe) in jobs}
    if attack.every_draw and "noised" in jobs_of:
        return _grown(attack, jobs_of["noised"].draws, FeaturesOptions().draws)
    if attack.every_crop and "crops" in jobs_of:
        looked_at = 1 + len(jobs_of["crops"].crops)  # the image and its crops
        return dataclasses.replace(_grown(attack, looked_at, attack.encodes), encodes=looked_at)
    job = jobs_of.get(attack.probes[0])
    if job is None or attack.probes[0] not in walks.PASSES or not attack.unet_rows:
        return attack
    pictures = min(job.generations, attack.pictures or job.generations)
    work = planned(dataclasses.replace(job, probes=attack.probes, generations=pictures), has_null)
    return dataclasses.replace(
        attack, unet_rows=work.counts.unet_rows, decodes=work.counts.decodes, backwards=work.backwards,
        encodes=work.encodes or attack.encodes,
    )  # fmt: skip


def _grown(attack: Attack, times: int, usual: int) -> Attack:
    """With rows in proportion to how many draws or pictures there are instead of the usual number."""
    return dataclasses.replace(attack, unet_rows=(attack.unet_rows or 0) * times // usual)


def _of_settings(attack: Attack, jobs: Mapping[str, FeaturesOptions], has_null: bool) -> Attack:
    """What all the settings that were read cost; unknown where none was."""
    each = [dataclasses.replace(job, probes=()) for job in jobs.values() if job.settings]
    if not each:
        return attack
    whole = sum((walks.planned(job, has_null) for job in each), Counts())
    return dataclasses.replace(attack, unet_rows=whole.unet_rows, decodes=whole.decodes)


def _asked(options: FeaturesOptions) -> dict[str, int]:
    return {name: getattr(options, name) if name in options.probes else 0 for name in ("generations", "variations")}


def _gradients(options: FeaturesOptions) -> gradients.Options:
    steps = options.gradient_timesteps
    dtype = "float32" if options.dtype in ("float32", "float64") else "bfloat16"  # float16 overflows in gradients
    return gradients.Options(gsa_timesteps=steps, masking_timesteps=steps, dtype=dtype)


def _pictures(options: FeaturesOptions) -> blackbox.Options:
    return blackbox.Options(variations=options.variations, generations=options.generations)


def _sampling(options: FeaturesOptions, block: str, has_null: bool) -> services.Sampling:
    """Variations are asked for without a caption, so that guidance would mix the empty prompt with itself."""
    weight = services.Sampling().guidance_scale if block == "generations" and has_null else 0.0
    return services.Sampling(steps=options.generation_steps, guidance_scale=weight)


def read_gradients(
    network: Network, samples: Samples, options: FeaturesOptions, seed: int, batch_size: int, progress: Callable
) -> tuple[pa.Table, Counts]:
    """The blocks `gsa1`, `gsa2`, `gradient-masking` and `noise-optimisation`, as far as they are asked for."""
    import torch

    def condition(rows: np.ndarray) -> dict[str, Any]:
        return {name: values[torch.from_numpy(samples.text["caption"][rows])] for name, values in on_device.items()}

    on_device = {name: value.to(network.device) for name, value in samples.condition.items()}
    mine = gradients.Samples(samples.ids, samples.latents["image"], condition, seed)
    denoiser, chosen = gradients.Denoiser.of(network), _gradients(options)
    bands = tables.bands(samples.latents["image"].shape[1])
    passes = [GRADIENT_PASSES[name] for name in options.probes if name != "noise_optimisation"]
    found: list[pa.Table] = []
    rows = 0
    if passes:
        backward = gradients.backward(denoiser, mine, chosen, passes, progress)
        found += gradients.backward_rows(backward, samples.ids, bands).values()
        rows += backward.counts.unet_rows
    if "noise_optimisation" in options.probes:
        optimised = noise_optimisation.optimise(denoiser, mine, chosen, batch_size, progress)
        found.append(noise_optimisation.optimised_rows(optimised, samples.ids, chosen.noise_timestep, bands))
        rows += optimised.counts.unet_rows
    return pa.concat_tables(found), Counts(rows, 0)


def read_pictures(
    block: str, network: Network, samples: Samples, names: list[str], squares: np.ndarray, prompts: Captions,
    encoder: blackbox.Encoder | None, options: FeaturesOptions, seed: int, progress: Callable,
) -> tuple[pa.Table, Counts]:  # fmt: skip
    """The block `generations` or `variations`, from a pipeline here or from the service that the options name.

    Variations are asked for with the empty prompt: the caption might tell members by itself. `encoder` compares
    generations. What is asked is counted, budget or none: a service charges for it.
    """
    local = services.LocalService.of(
        network, _conditions(prompts, network), _sampling(options, block, network.has_null)
    )
    asked_of = services.HttpService(options.service) if options.service else local
    service = services.Budgeted(asked_of, options.query_budget)
    bands = tables.bands(samples.latents["image"].shape[1])
    if encoder is None:
        empty = [""] * len(names)
        table = blackbox.variations(
            service, samples.ids, squares, empty, _pictures(options), seed, bands, progress
        )  # fmt: skip
    else:
        table = blackbox.generations(
            service, samples.ids, list(squares), names, encoder, _pictures(options), seed, bands, progress
        )
    return table, Counts(local.counts.unet_rows, local.counts.decodes, service.images, service.queries)


def _conditions(prompts: Captions, network: Network) -> Callable[[list[str]], dict[str, Any]]:
    """Prompts -> what the denoiser takes; each distinct prompt is encoded once."""
    import torch

    known: dict[str, dict[str, np.ndarray]] = {}

    def encode(texts: list[str]) -> dict[str, Any]:
        for text in texts:
            if text not in known:
                rows = prompts.encode([text], 1) if text or not prompts.has_null else prompts.null(1)
                known[text] = {name: value for name, value in rows.items() if name != "n_tokens"}
        joined = {name: np.concatenate([known[text][name] for text in texts]) for name in known[texts[0]]}
        return {name: torch.from_numpy(value).to(network.device) for name, value in joined.items()}

    return encode


def encoder(name: str, device: Any, batch_size: int) -> tuple[blackbox.Encoder, str]:
    """The open_clip model that compares generations, and the hash of its weights."""
    from mia import models

    if not name:
        raise UserError("generations are compared by an encoder", "--encoder", "name an open_clip model")
    net, preprocess, tokenize, weights = models.encoder(name, device)
    return blackbox.Encoder(net, preprocess, tokenize, batch_size), weights
