"""The attacks: what each needs, what it costs, and the module that turns stored features into scores.

Grey-box attacks that read a caption run twice: under the caption as `<name>`, under the empty prompt as `<name>_null`.
The two are separate attacks in the scores, so that choosing a variant never mixes them; `pairs` and `caption_driven`
put them side by side.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from mia.attacks.calibration import Calibration
    from mia.attacks.evidence import Evidence

ACCESS = ("black", "grey", "white")
TWIN = "_null"
# Probe -> the blocks it makes; `*` stands for any ending.
PROBES: dict[str, tuple[str, ...]] = {
    "clean": ("clean",), "pia": ("pia", "pia-null"), "pian": ("pian", "pian-null"), "secmi": ("secmi", "secmi-null"),
    "noised": ("noised",), "prompts": ("prompt-*",), "stepback": ("stepback", "stepback-null"),
    "aggregation": ("aggregation", "aggregation-null"),
    "crops": ("crop-*",), "gsa": ("gsa1", "gsa2"), "gradient_masking": ("gradient-masking",),
    "noise_optimisation": ("noise-optimisation",), "generations": ("generations",), "variations": ("variations",),
    "settings": ("setting-*",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack; costs are for one image under the defaults of `FeaturesOptions`, its twin included.

    Under other options they are what `mia.cli.passes.as_run` makes of them.

    Attributes:
        name: As asked for, and as it stands in the scores.
        access: One of `ACCESS`.
        probes: What must be extracted, names of `PROBES`.
        unet_rows: Rows through the UNet that its scores rest on, were it run alone; None: as the settings say.
        decodes: VAE decodes; None: as the settings and losses say.
        encodes: VAE encodes.
        backwards: Backward passes through the UNet.
        to_weights: Whether these go on to its weights, which doubles their work, or to its input alone.
        labels: Whether labelled samples are needed.
        paper: Where it is from.
        summary: What it measures.
        module: In `mia.attacks`; empty where `mia.scores` computes it from the settings' losses.
        options: What differs from the module's defaults.
        every_draw: Whether it reads every draw of the noised grid, so that its rows grow with them.
        fewest_draws: Of the noised grid; with fewer it would be another statistic.
        every_crop: Whether it reads every crop, so that its rows and encodes grow with them.
        pictures: Generations that it looks at, the first ones; 0: all there are.
        no_twin: Why it does not run under the empty prompt, too; empty where it does.
    """

    name: str
    access: str
    probes: tuple[str, ...]
    unet_rows: int | None
    paper: str
    summary: str
    module: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: bool = False
    decodes: int | None = 0
    encodes: int = 1
    backwards: int = 0
    to_weights: bool = False
    every_draw: bool = False
    fewest_draws: int = 1
    every_crop: bool = False
    pictures: int = 0
    no_twin: str = ""

    @property
    def paired(self) -> bool:
        """Whether it runs under the empty prompt, too."""
        return not self.no_twin


TENS = tuple(range(1, 1000, 100))
NOISED = ("noised",)
CDI, COPYMARK = "arXiv 2411.12858 (CDI)", "arXiv 2410.03640 (CopyMark)"
PFAMI, CLID, SETTINGS = "arXiv 2308.12143", "arXiv 2405.14800", "arXiv 2306.12983"
GSA, PANG = "arXiv 2308.06405", "arXiv 2312.08207"
# Why there is no twin under the empty prompt.
OF_SETTINGS = "the settings are the paper's, with the caption"
OF_BOTH = "its score rests on what the caption changes"
OF_GRADIENTS = "gradients are taken under the caption alone"
OF_PICTURES = "the pictures are made from the caption"


def _setting(name: str, summary: str, labels: bool = True) -> Attack:
    return Attack(
        name, "grey", ("settings",), None, SETTINGS, summary, labels=labels, decodes=None, no_twin=OF_SETTINGS
    )


def _pfami(name: str, summary: str, **options: Any) -> Attack:
    # 4 timesteps, original and one crop, caption and empty prompt. The ports take the original's noise of draw 1.
    return Attack(
        name, "grey", ("noised", "crops"), 16, PFAMI, summary, "pfami", options, encodes=2,
        fewest_draws=options.get("draw", 0) + 1, every_crop=options.get("nearest") == 0,
    )  # fmt: skip


def _clid(name: str, rows: int, probes: tuple[str, ...], summary: str, **options: Any) -> Attack:
    options = {"name": name, **options}
    return Attack(name, "grey", probes, rows, CLID, summary, "clid", options, labels=True, no_twin=OF_BOTH)


def _generated(name: str, paper: str, summary: str, module: str, **more: Any) -> Attack:
    # 3 pictures of 50 guided steps.
    costs: dict[str, Any] = {"unet_rows": 300, "decodes": 3, "no_twin": OF_PICTURES} | more
    return Attack(name, "black", ("generations",), paper=paper, summary=summary, module=module, encodes=0, **costs)


def _fsca(name: str, part: str, summary: str, **more: Any) -> Attack:
    options = {"name": name, "part": part}
    return _generated(name, "arXiv 2506.11434", summary, "fsca", options=options, labels=True, **more)


REGISTRY: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        _setting("loss_threshold", "each loss of each setting by threshold", labels=False),
        _setting("logistic_regression", "logistic regression on all losses"),
        _setting("decision_tree", "a tree on all losses"),
        _setting("random_forest", "a forest on all losses"),
        _setting("neural_net", "a perceptron on all losses"),
        _setting("boosting", "boosted trees on all losses"),
        Attack("loss", "grey", NOISED, 150, "arXiv 2301.13188", "denoising loss at each timestep", "loss",
               {"mean_over": TENS}, every_draw=True),
        Attack("denoising_loss", "grey", NOISED, 10, CDI, "L2 norm at t = 101, mean over draws", "loss",
               {"statistic": "l2", "timesteps": (101,)}, every_draw=True),
        Attack("multiple_loss", "grey", NOISED, 20, CDI, "L2 norm at ten timesteps, one draw", "loss",
               {"statistic": "l2", "timesteps": TENS, "draws": 1}),
        Attack("summed_loss", "grey", NOISED, 20, COPYMARK, "SSE summed over t up to 501, one draw", "loss",
               {"statistic": "sum", "timesteps": (51, 101, 141, 201, 301, 401, 441, 451, 461, 501), "draws": 1}),
        Attack("secmi", "grey", ("secmi",), 32, "arXiv 2302.01316", "step forth and back on the inversion path",
               "secmi"),
        Attack("secmi_nn", "grey", ("secmi",), 32, "arXiv 2302.01316", "a perceptron on SecMI's error map",
               "secmi_nn", labels=True),
        Attack("secmi_copymark", "grey", ("stepback",), 4, COPYMARK, "step forth and back from a random noising",
               "secmi", {"block": "stepback"}),
        Attack("pia", "grey", ("pia",), 12, "arXiv 2305.18355", "distance to the noise predicted at 0", "pia"),
        Attack("pian", "grey", ("pian",), 4, "arXiv 2305.18355", "the same, that noise scaled to a unit Gaussian",
               "pia", {"block": "pian"}),
        _pfami("pfami", "relative rise of the loss by a crop, shared noise"),
        _pfami("pfami_copymark", "the same over all crops, own noise each", kind="copymark", draw=1, nearest=0),
        _pfami("pfami_clid", "rise of the loss by a crop, own noise each", kind="clid", draw=1),
        _pfami("pfami_sima", "square of that rise", kind="sima", draw=1),
        Attack("sima", "grey", ("clean",), 40, "arXiv 2509.25003", "size of the prediction on the clean latent",
               "sima"),
        Attack("sima_mc", "grey", NOISED, 150, "arXiv 2509.25003", "size of the prediction on noised latents", "sima",
               {"block": "noised"}, every_draw=True),
        _clid("clid", 15, ("noised", "prompts"), "loss, and its rise without the caption"),
        _clid("clid_vector", 15, ("noised", "prompts"), "boosted trees on the same", form="vector"),
        _clid("clid_null", 6, NOISED, "the same by the empty prompt alone", prompts=()),
        Attack("noise_aggregation", "grey", ("aggregation",), 10, "arXiv 2510.21783",
               "distance between successive predictions", "aggregation"),
        Attack("frequency_low", "grey", NOISED, 150, "arXiv 2505.20955", "loss in the low frequencies", "frequency",
               {"band": "low"}, every_draw=True),
        Attack("frequency_high", "grey", NOISED, 150, "arXiv 2505.20955", "loss in the high frequencies", "frequency",
               {"band": "high"}, every_draw=True),
        Attack("memorisation", "grey", NOISED, 150, "Wen et al., ICLR 2024", "norm of the guidance direction",
               "memorisation", every_draw=True, no_twin=OF_BOTH),
        Attack("quantile_regression", "grey", ("secmi", "clean"), 32, "arXiv 2312.05140",
               "SecMI's error against images as hard", "quantile", labels=True),
        Attack("gsa1", "white", ("gsa",), 10, GSA, "norms of the summed gradient, boosted trees", "gsa",
               labels=True, backwards=10, to_weights=True, no_twin=OF_GRADIENTS),
        Attack("gsa2", "white", ("gsa",), 10, GSA, "mean norms of gradients, boosted trees", "gsa",
               {"block": "gsa2"}, labels=True, backwards=10, to_weights=True, no_twin=OF_GRADIENTS),
        Attack("gradient_masking", "white", ("gradient_masking",), 20, CDI, "restoring what the loss rests on",
               "gradient_masking", backwards=10, no_twin=OF_GRADIENTS),
        Attack("noise_optimisation", "white", ("noise_optimisation",), 6, CDI, "how far noise must move to fit",
               "noise_optimisation", backwards=5, no_twin=OF_GRADIENTS),
        Attack("rediffuse", "black", ("variations",), 10, "arXiv 2405.20771", "likeness of the mean variation",
               "rediffuse", decodes=10, encodes=10, no_twin="variations are asked for without a caption"),
        _generated("pang", PANG, "likeness of generations", "pang", pictures=3),
        _generated("pang_classifier", PANG, "a perceptron on the same", "pang_classifier", labels=True, pictures=3),
        _fsca("fsca", "all", "consistency of generations, image and caption"),
        _fsca("fsca_model", "model", "the same, without what no model enters"),
        _fsca("blind_pair", "pair", "blind: cosine of caption and image alone", unet_rows=0, decodes=0,
              no_twin="no model enters it"),
    )
}  # fmt: skip


def attack(name: str) -> Attack:
    """The attack of this name.

    Raises:
        UserError: there is none; names the nearest.
    """
    from mia.errors import UserError

    if name not in REGISTRY:
        near = difflib.get_close_matches(name, list(REGISTRY), n=3, cutoff=0.5)
        raise UserError(f"unknown attack '{name}'", "scores.attacks", f"use {near or list(REGISTRY)}")
    return REGISTRY[name]


def named(text: str) -> tuple[str, ...]:
    """The attacks that `text` names: `all`, `none`, one of `ACCESS`, or names between commas.

    Raises:
        UserError: a word that is none of these; names the nearest.
    """
    if text in ("none", "all", *ACCESS):
        return tuple(name for name, a in REGISTRY.items() if text == "all" or a.access == text)
    return tuple(attack(word.strip()).name for word in text.split(",") if word.strip())


def probes(names: Iterable[str]) -> tuple[str, ...]:
    """What must be extracted for these attacks, each probe once, in the order of `PROBES`."""
    needed = {probe for name in names for probe in attack(name).probes}
    return tuple(probe for probe in PROBES if probe in needed)


def blocks(names: Iterable[str]) -> tuple[str, ...]:
    """The blocks these attacks read; a name that ends in `*` stands for all that begin so."""
    return tuple(block for probe in probes(names) for block in PROBES[probe])


def run(name: str, evidence: Evidence, calibration: Calibration | None = None) -> Iterator[tuple[str, str, np.ndarray]]:
    """(attack, variant, float64[n]) for every variant of an attack and of its twin, high = member.

    Raises:
        UserError: an unknown name, a block that was not extracted, too few labels, a score that is not finite.
    """
    import numpy as np

    from mia.errors import UserError

    this = attack(name)
    module = importlib.import_module(f"mia.attacks.{this.module}")
    for suffix, options in _runs(this, module):
        if suffix == TWIN and not evidence.has_null:  # an unconditional model has no empty prompt
            continue
        fitted = (calibration,) if this.labels else ()
        for variant, score in module.scores(evidence, options, *fitted).items():
            bad = np.flatnonzero(~np.isfinite(score))
            if len(bad):
                where = f"attack '{name}{suffix}', variant '{variant}', sample {evidence.ids[bad[0]]}"
                raise UserError(f"{len(bad)} of {len(score)} scores are not finite", where, "extract its blocks anew")
            yield name + suffix, variant, np.asarray(score, dtype=np.float64)


def _runs(this: Attack, module: Any) -> Iterator[tuple[str, Any]]:
    yield "", module.Options(**this.options)
    if this.paired:
        options = dict(this.options)
        if "name" in {field.name for field in dataclasses.fields(module.Options)}:
            options["name"] = this.name + TWIN
        yield TWIN, module.Options(**options, condition="null")


TWINS = {name + TWIN: name for name, this in REGISTRY.items() if this.paired}


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """(under the caption, under the empty prompt) for the attacks of which the scores hold both."""
    here = set(names)
    return [(n, n + TWIN) for n in REGISTRY if REGISTRY[n].paired and {n, n + TWIN} <= here]


def caption_driven(
    pair: tuple[np.ndarray, np.ndarray], member: np.ndarray, group: np.ndarray, level: float = 0.05
) -> tuple[bool, float, float]:
    """Whether an attack does better for seeing the caption: yes or no, the gain in AUC, its one-sided p-value.

    Of one pair that was asked about; whoever goes through many adjusts their p-values (`resampling.holm`).

    A gain is no flaw in itself: captions are part of what a model learns. Where a blind classifier tells the captions
    of the two sides apart, it is not to be counted as membership.

    Args:
        pair: Scores of the same samples under the caption and under the empty prompt, float64[n] each.
        member: bool[n].
        group: str[n], near-duplicates.
        level: Of the test.
    """
    from mia import resampling

    gain, p = resampling.paired_auc(*pair, member, group)
    return p <= level, gain, p
