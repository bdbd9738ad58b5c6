"""The paper's settings and the probes of later attacks, each written as the plain loop that it is.

A walk asks a `Ledger` for noised latents, predictions and steps. The ledger knows each quantity by how it came about,
so that two walks that ask for the same one share it. By itself it computes nothing and only counts, which is the plan;
`mia.reader.Reader` computes. Draws of noise are walked side by side; a walk does not know how many there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from mia import settings
from mia.config import FeaturesOptions
from mia.errors import UserError
from mia.settings import Setting

CAPTION, EMPTY, IMAGE = "caption", "empty", "image"
PROMPTS = ("prompt-1", "prompt-2", "prompt-3")

CLEAN_TIMESTEPS = tuple(range(0, 200, 10))  # SimA's official list; SecMI's chain begins with its first
GRID = (1, 51, 101, 141, 201, 301, 401, 441, 451, 461, 501, 601, 701, 801, 901)
PIA_TIMESTEPS, PIAN_TIMESTEPS = (100, 200, 300, 400, 500), (200,)
SECMI_LAST, SECMI_STEP = 140, 10  # t_sec of the official Stable Diffusion code, and its step k
PROMPT_TIMESTEPS = (441, 451, 461)
CROP_TIMESTEPS = (101, 201, 301, 401)
STEPBACK_TIMESTEP = 51  # the column that CopyMark calls the 50th step
AGGREGATION_START, AGGREGATION_STEPS = 101, 5


@dataclasses.dataclass(frozen=True)
class Value:
    """A quantity: its number in its ledger, and where it is computed its tensor.

    `output` is what the network itself said, when `tensor` is the noise that follows from it.
    """

    number: int
    tensor: Any = None
    output: Any = None


@dataclasses.dataclass
class Counts:
    """Work done: rows through the denoiser (a guided evaluation is two) and latents through the decoder.

    Of a service, pictures asked for and the queries that they came in; queries are no part of a plan, for how many
    share the work decides them.
    """

    unet_rows: int = 0
    decodes: int = 0
    pictures: int = 0
    queries: int = dataclasses.field(default=0, compare=False)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.unet_rows + other.unet_rows, self.decodes + other.decodes, self.pictures + other.pictures,
            self.queries + other.queries,
        )  # fmt: skip

    def __mul__(self, times: int) -> Counts:
        return Counts(self.unet_rows * times, self.decodes * times, self.pictures * times, self.queries * times)


class Ledger:
    """Knows each quantity once and counts those that cost; computes nothing."""

    def __init__(self, options: FeaturesOptions, has_null: bool = True):
        self.options, self.has_null = options, has_null
        self.counts = Counts()
        self._known: dict[tuple, Value] = {}

    def clean(self, source: str = IMAGE) -> Value:
        """z0 of the image, or of a crop."""
        return self._once("clean", source)

    def noise(self) -> Value:
        """This draw's eps."""
        return self._once("noise")

    def noised(self, level: int, source: str = IMAGE) -> Value:
        """z0 noised with eps to `level`."""
        return self.mixed(self.noise(), level, source)

    def mixed(self, noise: Value, level: int, source: str = IMAGE) -> Value:
        """alpha(level) z0 + sigma(level) `noise`."""
        return self._once("mixed", noise, level, source)

    def shifted(self, z: Value, by: float) -> Value:
        """`z` with fresh noise of standard deviation `by` added."""
        return self._once("shifted", z, by)

    def unit(self, e: Value) -> Value:
        """`e` scaled to the mean absolute value of a standard normal, sqrt(2 / pi)."""
        return self._once("unit", e)

    def step(self, z: Value, e: Value, t: int, to: int) -> Value:
        """The deterministic (DDIM, Euler) step from `t` to `to` along `e`; below 0 every timestep is the same."""
        return self._once("step", z, e, t, max(to, -1))

    def guided(self, cond: Value, null: Value | None, weight: float) -> Value:
        """Classifier-free guidance; without the empty prompt's prediction, the caption's as it is."""
        return cond if null is None else self._once("guided", cond, null, weight)

    def predict(self, z: Value, t: int, *texts: str, text_shift: float = 0.0) -> list[Value]:
        """The noise predicted in `z` at `t` under each of `texts`; what is not known yet comes from one call.

        A model that knows no empty prompt (unconditional) has no such prediction: ask with `CAPTION` alone.
        """
        keys = [("predict", z.number, t, text, text_shift) for text in texts]
        asked = [text for key, text in zip(keys, texts, strict=True) if key not in self._known]
        if asked:
            for text, (e, output) in zip(asked, self._predict(z, t, asked, text_shift), strict=True):
                self._known["predict", z.number, t, text, text_shift] = Value(len(self._known), e, output)
            self._count(unet_rows=len(asked))
        return [self._known[key] for key in keys]

    def texts(self, null: bool) -> tuple[str, ...]:
        """The caption, and the empty prompt if `null` and the model has one."""
        return (CAPTION, EMPTY) if null and self.has_null else (CAPTION,)

    def losses(self, block: str, t: int, cond: Value, prev: Value | None) -> None:
        """Keep the requested losses, low = member.

        Model loss holds the caption's prediction, before guidance, against the *initial* noise; latent error holds the
        step's result `prev`, at the next lower level, against z0; pixel error the decoded `prev` against the image.
        """
        pixel = None
        if "pixel_error" in self.options.losses and prev is not None:
            known = len(self._known)
            pixel = self._once("pixel_error", prev)
            self._count(decodes=len(self._known) - known)
        self._keep_losses(block, t, cond, prev, pixel)

    def statistics(
        self, block: str, t: int, noise: Value | None, cond: Value | None, null: Value | None, source: str = IMAGE
    ) -> None:
        """Keep Gram matrix, norms and bands of z0, `noise` and the predictions. Nothing to count."""

    def latent_error(self, block: str, t: int, a: Value, b: Value, kept_map: bool = False) -> None:
        """Keep the mean square of a - b, and with `kept_map` their absolute difference, at most 16 a side."""

    def spread(self, block: str, t: int, values: list[Value]) -> None:
        """Keep the mean L2 distance of all pairs of `values`."""

    def _once(self, name: str, *arguments: Any) -> Value:
        key = (name, *(a.number if isinstance(a, Value) else a for a in arguments))
        if key not in self._known:
            self._known[key] = Value(len(self._known), self._compute(name, arguments))
        return self._known[key]

    def _count(self, unet_rows: int = 0, decodes: int = 0) -> None:
        self.counts += Counts(unet_rows, decodes)

    def _compute(self, name: str, arguments: tuple) -> Any:
        """The tensor of a new quantity."""

    def _predict(self, z: Value, t: int, texts: list[str], text_shift: float) -> Iterable[tuple[Any, Any]]:
        """(noise, the network's own output) under each of `texts`, by one call."""
        return [(None, None)] * len(texts)

    def _keep_losses(self, block: str, t: int, cond: Value, prev: Value | None, pixel: Value | None) -> None: ...


def timesteps(of: Setting, options: FeaturesOptions) -> tuple[int, ...]:
    """The setting's timesteps in the requested variant.

    Raises:
        UserError: the authors' committed code walks none in this setting.
    """
    found = of.timesteps(options.timesteps)
    if not found:
        raise UserError(
            f"setting {of.number} has no timesteps as committed", "features.timesteps", "use 'reconstructed'"
        )
    return found


def needs_null(of: Setting, options: FeaturesOptions) -> bool:
    """Model loss scores the caption branch before guidance, so only the other losses need the empty prompt."""
    return of.guidance_scale != 0 and bool({"latent_error", "pixel_error"} & set(options.losses))


def setting(w: Ledger, of: Setting) -> None:
    """One of the 18 settings: its losses at each of its timesteps. Source: arXiv 2306.12983; `attacks.md` 1.1.

    In an iterative setting each step starts from the last one's result, in the others from z0 noised anew.
    """
    steps, options = timesteps(of, w.options), w.options
    z = w.noised(of.start_noise_step)
    for index, t in enumerate(steps):
        if not of.iterative:
            z = w.noised(of.level(t))
        elif of.latent_shift and index == options.latent_shift_index:
            z = w.shifted(z, options.latent_shift_by)
        goes_on = of.iterative and index < len(steps) - 1
        asked = needs_null(of, options) or (of.guided and goes_on)
        cond, *null = w.predict(z, t, *w.texts(asked), text_shift=of.text_shift * options.text_shift_scale)
        prev = None
        if goes_on or set(options.losses) != {"model_loss"}:
            prev = w.step(z, w.guided(cond, null[0] if null else None, of.guidance_scale), t, t - of.step)
        w.losses(settings.own_block(of), t, cond, prev)
        if goes_on and prev is not None:
            z = prev


def grid(w: Ledger) -> None:
    """z0 noised to level t and told t, for every t that a setting or the probe `noised` reads.

    Read before the settings, so that both texts come from one call; with `noised`, statistics are kept of each.
    """
    null: dict[int, bool] = {}
    for of in (settings.setting(number) for number in w.options.settings):
        if of.shares_grid:
            for t in timesteps(of, w.options):
                null[t] = null.get(t, False) or needs_null(of, w.options)
    if "noised" in w.options.probes:
        null |= dict.fromkeys(GRID, True)
    for t in sorted(null):
        cond, *empty = w.predict(w.noised(t), t, *w.texts(null[t]))
        if "noised" in w.options.probes:
            w.statistics("noised", t, w.noise(), cond, empty[0] if empty else None)


def clean(w: Ledger) -> None:
    """The clean latent told that it is at t. Source: SimA, arXiv 2509.25003."""
    for t in CLEAN_TIMESTEPS:
        cond, *empty = w.predict(w.clean(), t, *w.texts(True))
        w.statistics("clean", t, None, cond, empty[0] if empty else None)


def pia(w: Ledger, normalised: bool = False) -> None:
    """z0 noised with the model's own prediction at t = 0, under each text. Source: arXiv 2305.18355, eq. 11 and 13."""
    name, steps = ("pian", PIAN_TIMESTEPS) if normalised else ("pia", PIA_TIMESTEPS)
    for text in w.texts(True):
        (e0,) = w.predict(w.clean(), 0, text)
        e0 = w.unit(e0) if normalised else e0
        for t in steps:
            (e,) = w.predict(w.mixed(e0, t), t, text)
            block = name if text == CAPTION else f"{name}-null"
            w.statistics(block, t, e0, *((e, None) if text == CAPTION else (None, e)))


def secmi(w: Ledger) -> None:
    """Deterministic inversion, and one step back from each point of it, under each text. Source: arXiv 2302.01316.

    z0 stands for the state at t = 0. The step back from t + k needs the prediction that the next step up needs too.
    """
    for text in w.texts(True):
        y = w.clean()
        for t in range(0, SECMI_LAST + 1, SECMI_STEP):
            (e,) = w.predict(y, t, text)
            up = w.step(y, e, t, t + SECMI_STEP)
            (e_up,) = w.predict(up, t + SECMI_STEP, text)
            back = w.step(up, e_up, t + SECMI_STEP, t)
            w.latent_error("secmi" if text == CAPTION else "secmi-null", t, back, y, kept_map=t == SECMI_LAST)
            y = up


def prompts(w: Ledger) -> None:
    """The noised latent under shortened captions. Source: CLiD, arXiv 2405.14800; eps and t as in `noised`."""
    for t in PROMPT_TIMESTEPS:
        for name, e in zip(PROMPTS, w.predict(w.noised(t), t, *PROMPTS), strict=True):
            w.statistics(name, t, w.noise(), e, None)


def crops(w: Ledger) -> None:
    """Crops of the image, resized and noised with the image's own eps. Source: PFAMI, arXiv 2308.12143."""
    for percent in w.options.crops:
        name = f"crop-{percent}"
        for t in CROP_TIMESTEPS:
            cond, *empty = w.predict(w.noised(t, name), t, *w.texts(True))
            w.statistics(name, t, w.noise(), cond, empty[0] if empty else None, name)


def stepback(w: Ledger) -> None:
    """One step up from a randomly noised latent and back: what CopyMark calls SecMI. Source: `attacks.md` 2.2."""
    t, z = STEPBACK_TIMESTEP, w.noised(STEPBACK_TIMESTEP)
    for text in w.texts(True):
        (e,) = w.predict(z, t, text)
        up = w.step(z, e, t, t + SECMI_STEP)
        (e_up,) = w.predict(up, t + SECMI_STEP, text)
        back = w.step(up, e_up, t + SECMI_STEP, t)
        w.latent_error("stepback" if text == CAPTION else "stepback-null", t, back, z)


def aggregation(w: Ledger) -> None:
    """Successive predictions on the way down from a noised latent. Source: arXiv 2510.21783."""
    for text in w.texts(True):
        z, t, found = w.noised(AGGREGATION_START), AGGREGATION_START, list[Value]()
        for _ in range(AGGREGATION_STEPS):
            found += w.predict(z, t, text)
            z, t = w.step(z, found[-1], t, t - SECMI_STEP), t - SECMI_STEP
        w.spread("aggregation" if text == CAPTION else "aggregation-null", AGGREGATION_START, found)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A walk beside the settings: the job that it belongs to and whether every draw takes it or the first alone."""

    job: str
    walk: Callable[[Ledger], None]
    every_draw: bool = False


PROBES: dict[str, Probe] = {
    "noised": Probe(settings.NOISED, lambda w: None, every_draw=True),  # widens the grid
    "stepback": Probe(settings.NOISED, stepback),
    "aggregation": Probe(settings.NOISED, aggregation),
    "clean": Probe("clean", clean),
    "pia": Probe("clean", pia),
    "pian": Probe("clean", lambda w: pia(w, normalised=True)),
    "secmi": Probe("clean", secmi),
    "prompts": Probe("prompts", prompts),
    "crops": Probe("crops", crops),
}


# Probes that are no walk but a pass of its own -> the job that does it.
PASSES = {
    "gsa": "gradients", "gradient_masking": "gradients", "noise_optimisation": "gradients",
    "generations": "generations", "variations": "variations",
}  # fmt: skip


def jobs(options: FeaturesOptions) -> dict[str, FeaturesOptions]:
    """The jobs that settings and probes need, each once, with what of `options` concerns it: no more may rerun it."""
    found: dict[str, tuple[list[int], list[str]]] = {}
    for number in options.settings:
        found.setdefault(settings.job_of(settings.setting(number)), ([], []))[0].append(number)
    for name in options.probes:
        found.setdefault(job_of(name), ([], []))[1].append(name)
    return {
        job: _own(dataclasses.replace(options, settings=tuple(sorted(numbers)), probes=tuple(sorted(probes))))
        for job, (numbers, probes) in sorted(found.items())
    }


def _own(options: FeaturesOptions) -> FeaturesOptions:
    """Options of a job; those that it does not look at stand at their defaults."""
    plain, looked_at = FeaturesOptions(), looks_at(options)
    unused = (field.name for field in dataclasses.fields(options) if field.name not in looked_at)
    return dataclasses.replace(options, **{name: getattr(plain, name) for name in unused})


def looks_at(options: FeaturesOptions) -> set[str]:
    """Names of the options that the settings and probes among them look at."""
    chosen, probes = [settings.setting(number) for number in options.settings], set(options.probes)
    pictures = bool(probes & {"generations", "variations"})
    looks = {
        "settings": True, "probes": True, "dtype": True, "tf32": True,
        "draws": draws(dataclasses.replace(options, draws=2)) > 1, "posterior": bool(chosen or probes & set(PROBES)),
        "losses": bool(chosen), "timesteps": bool(chosen), "text_shift_scale": any(of.text_shift for of in chosen),
        "latent_shift_index": any(of.latent_shift for of in chosen),
        "latent_shift_by": any(of.latent_shift for of in chosen), "crops": "crops" in probes,
        "gradient_timesteps": bool(probes & {"gsa", "gradient_masking"}), "variations": "variations" in probes,
        "generations": "generations" in probes, "generation_steps": "generations" in probes, "service": pictures,
        "query_budget": pictures,
    }  # fmt: skip
    return {name for name, does in looks.items() if does}


def job_of(name: str) -> str:
    """The job that does a probe.

    Raises:
        UserError: there is no such probe.
    """
    if name not in (*PROBES, *PASSES):
        raise UserError(f"unknown probe '{name}'", "features.probes", f"use {', '.join((*PROBES, *PASSES))}")
    return PASSES[name] if name in PASSES else PROBES[name].job


def walk(w: Ledger, first_draw: bool) -> None:
    """Everything that one job reads for a draw; the options hold the settings and probes of one job."""
    chosen = [settings.setting(number) for number in w.options.settings]
    if "noised" in w.options.probes or any(of.shares_grid for of in chosen):
        grid(w)
    for of in sorted(chosen, key=lambda s: not needs_null(s, w.options)):  # so that both texts come from one call
        setting(w, of)
    for probe in walked(w.options):
        if first_draw or probe.every_draw:
            probe.walk(w)


def walked(options: FeaturesOptions) -> list[Probe]:
    """The probes of `options` that are walks."""
    return [PROBES[name] for name in options.probes if name in PROBES]


def draws(options: FeaturesOptions) -> int:
    """How many draws the job walks: all, or the first alone where nothing in it needs more."""
    return options.draws if options.settings or any(probe.every_draw for probe in walked(options)) else 1


def planned(options: FeaturesOptions, has_null: bool = True) -> Counts:
    """The work of one job for one image."""
    first, other = Ledger(options, has_null), Ledger(options, has_null)
    walk(first, first_draw=True)
    walk(other, first_draw=False)
    return first.counts + other.counts * (draws(options) - 1)
