"""Families of diffusion models: which one a folder is of, whether its parts fit, and how to load them.

A family is told by the pipeline class in model_index.json; everything else, prediction type, schedule, scaling and
sizes, is read from the configurations of the model's own parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from typing import TYPE_CHECKING, Any

from mia import adapters, captions, models, networks, settings, tables
from mia.compat import ensure_torchvision
from mia.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Family:
    """What all models of one kind have in common.

    Attributes:
        name: as it stands in the target's manifest.
        pipelines: classes in model_index.json.
        classes: for each part that is needed, the classes that its own configuration may name; of a scheduler, none.
        optional: parts that may be absent.
        denoiser, autoencoder: names of the two parts; without an autoencoder, the model's latents are pixels.
        network: how the denoiser is called.
        betas: first and last beta of the `scaled_linear` schedule that the family was published with, where it has one.
        flow: whether it is trained by flow matching; otherwise by diffusion.
    """

    name: str
    pipelines: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    denoiser: str = "unet"
    autoencoder: str = "vae"
    network: type[networks.Network] = networks.Network
    betas: tuple[float, float] | None = None
    flow: bool = False

    @property
    def encoders(self) -> tuple[str, ...]:
        """The parts that turn images and captions into what the denoiser takes."""
        return tuple(part for part in self.classes if part not in (self.denoiser, "scheduler"))


STABLE_BETAS = (0.00085, 0.012)  # alpha_bar(300) = 0.5905
_KL, _TOKENS, _CLIP, _POOLED = ("AutoencoderKL",), (), ("CLIPTextModel",), ("CLIPTextModelWithProjection",)

FAMILIES = (
    Family(
        "stable-diffusion", ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
        {"unet": ("UNet2DConditionModel",), "vae": _KL, "text_encoder": _CLIP, "tokenizer": _TOKENS, "scheduler": ()},
        betas=STABLE_BETAS,
    ),
    Family(
        "stable-diffusion-xl", ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        {"unet": ("UNet2DConditionModel",), "vae": _KL, "text_encoder": _CLIP, "tokenizer": _TOKENS,
         "text_encoder_2": _POOLED, "tokenizer_2": _TOKENS, "scheduler": ()},
        network=networks.SdxlNetwork, betas=STABLE_BETAS,
    ),
    Family(
        "stable-diffusion-3", ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        {"transformer": ("SD3Transformer2DModel",), "vae": _KL, "text_encoder": _POOLED, "tokenizer": _TOKENS,
         "text_encoder_2": _POOLED, "tokenizer_2": _TOKENS, "text_encoder_3": ("T5EncoderModel",),
         "tokenizer_3": _TOKENS, "scheduler": ()},
        optional=("text_encoder_3", "tokenizer_3"), denoiser="transformer", network=networks.Sd3Network, flow=True,
    ),
    Family(
        "unconditional-latent", ("LDMPipeline", "LatentDiffusionUncondPipeline"),
        {"unet": ("UNet2DModel",), "vqvae": ("VQModel", "AutoencoderKL"), "scheduler": ()},
        autoencoder="vqvae", network=networks.UnconditionalNetwork,
    ),
    Family(
        "class-conditional-latent", ("DiTPipeline",),
        {"transformer": ("DiTTransformer2DModel", "Transformer2DModel"), "vae": _KL, "scheduler": ()},
        denoiser="transformer", network=networks.ClassNetwork,
    ),
    Family(
        "pixel", ("DDPMPipeline", "DDIMPipeline"), {"unet": ("UNet2DModel",), "scheduler": ()},
        autoencoder="", network=networks.UnconditionalNetwork,
    ),
)  # fmt: skip


def detect(folder: pathlib.Path) -> Family:
    """The family of a model folder.

    Raises:
        UserError: its pipeline is of no family known, or a part is missing or of another class than the family's.
    """
    pipeline, parts = models.pipeline_index(folder)
    known = {name: family for family in FAMILIES for name in family.pipelines}
    if pipeline not in known:
        raise UserError(
            f"pipeline class '{pipeline}' is of no known family", folder / "model_index.json",
            "use a model of " + ", ".join(known),
        )  # fmt: skip
    family = known[pipeline]
    missing = [part for part in family.classes if part not in (*parts, *family.optional)]
    if missing:
        raise UserError(f"{pipeline} lacks {', '.join(missing)}", folder / "model_index.json", "give a complete folder")
    for part, wanted in family.classes.items():
        if part in parts and wanted:
            check_class(folder, part, wanted)
    return dataclasses.replace(family, classes={part: family.classes[part] for part in family.classes if part in parts})


def check_class(folder: pathlib.Path, part: str, wanted: tuple[str, ...]) -> str:
    """The class that a part's configuration names.

    Raises:
        UserError: it is none of those `wanted`.
    """
    config = models.part_config(folder, part)
    found = config.get("_class_name") or (config.get("architectures") or wanted)[0]
    if found not in wanted:
        raise UserError(
            f"{part} is a {found}, this family's is a {' or '.join(wanted)}", models.part_folder(folder, part),
            "is it another model's?",
        )  # fmt: skip
    return found


def find(source: str, revision: str = "", unet: str = "", lora: str = "") -> Target:
    """The target at `source`, a diffusers folder or a hub name, with what is put upon it.

    Args:
        source: a complete model.
        revision: the hub's; empty takes its newest.
        unet: a fine-tuned denoiser that takes the place of the base's: its folder, a model folder, or a hub name, which
            may end in `@REVISION`.
        lora: low-rank additions to the weights: a safetensors file, a folder with one, or a hub name with one.

    Raises:
        UserError: not to be had, incomplete, or of no known family.
    """
    folder = models.locate(source, revision)
    family = detect(folder)
    target = Target(folder, family, _finetuned(unet, family) if unet else None, _lora(lora) if lora else None)
    target.check()
    return target


def of_manifest(about: dict[str, Any]) -> Target:
    """The target that a manifest (the content of `mia target`'s output) tells of."""
    return find(about["source"], about["revision"], about.get("finetuned", ""), about.get("lora", ""))


def _finetuned(unet: str, family: Family) -> pathlib.Path:
    folder = pathlib.Path(unet)
    if not folder.is_dir():
        weights = [f"{family.denoiser}/*.safetensors*", "diffusion_pytorch_model*.safetensors*"]
        folder = models.snapshot(*_at_revision(unet), weights, "targets.*.unet")
    if (folder / family.denoiser).is_dir():
        folder = folder / family.denoiser
    if not (folder / "config.json").is_file():
        raise UserError(f"folder holds no {family.denoiser}", folder, "it needs config.json and safetensors")
    check_class(folder, "", family.classes[family.denoiser])
    return folder


def _lora(lora: str) -> pathlib.Path:
    place = pathlib.Path(lora)
    if not place.exists():
        place = models.snapshot(*_at_revision(lora), ["*.safetensors"], "targets.*.lora")
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise UserError(f"{len(files)} LoRA files", place, "give one file in safetensors")
    return files[0]


def _at_revision(name: str) -> tuple[str, str]:
    source, _, revision = name.partition("@")
    return source, revision


@dataclasses.dataclass(frozen=True)
class Target:
    """The files of one target, and how they are loaded.

    Attributes:
        folder: the model, or the base on which `unet` and `lora` stand.
        family: what it is.
        unet: folder of a denoiser that takes the place of the base's.
        lora: file of low-rank additions.
    """

    folder: pathlib.Path
    family: Family
    unet: pathlib.Path | None = None
    lora: pathlib.Path | None = None

    def check(self) -> None:
        """Hold the parts to each other.

        Raises:
            UserError: a denoiser that takes other latents than the autoencoder gives, is told what we cannot tell it,
                or has another shape than the base's.
        """
        config, base = self._denoiser_config(), models.part_config(self.folder, self.family.denoiser)
        differs = [key for key in _SHAPE if config.get(key) != base.get(key)]
        if differs:
            raise UserError(
                f"{differs[0]} is {config.get(differs[0])}, the base's is {base.get(differs[0])}", self.unet,
                "give the base that it was trained from",
            )  # fmt: skip
        where = self.unet or models.part_folder(self.folder, self.family.denoiser)
        side = config.get("sample_size")
        if not isinstance(side, int):
            raise UserError(f"sample_size is {side}", where, "use a model of square images")
        channels = (
            self._code_config().get("latent_channels", config.get("in_channels")) if self.family.autoencoder else 3
        )
        if config.get("in_channels") != channels:
            raise UserError(
                f"the denoiser takes {config.get('in_channels')} channels, images have {channels} here", where,
                "use a text-to-image model, none for inpainting or depth",
            )  # fmt: skip
        strange = self._adapted() - set(self.family.classes)
        if strange:
            fix = "give the base it was trained on"
            raise UserError(f"LoRA is for {sorted(strange)[0]}, which {self.family.name} lacks", self.lora, fix)
        if config.get("num_class_embeds") or config.get("class_embed_type"):
            raise UserError("the denoiser wants a class that its pipeline does not give", where, "use another model")

    def hashes(self) -> dict[str, str]:
        """16 hex digits each: `unet`, over the denoiser's files, and `encoders`, over those of all other parts.

        A LoRA counts for each of the two that it changes.
        """
        denoiser = models.part_hash(self.unet, "") if self.unet else models.part_hash(self.folder, self.family.denoiser)
        encoders = models.part_hash(self.folder, *self.family.encoders)
        if self._is_pair():  # the null condition is not in any part's files
            encoders = _digest(encoders, f"zeros {self._zeros()}")
        if self.lora is not None:
            change, parts = tables.file_hash(self.lora), self._adapted()
            denoiser = _digest(denoiser, change) if self.family.denoiser in parts else denoiser
            encoders = _digest(encoders, change) if parts & set(self.family.encoders) else encoders
        return {"unet": denoiser, "encoders": encoders}

    def hold(self, about: dict[str, Any], *what: str) -> None:
        """Refuse files that are not those that the manifest `about` was made from, `unet` or `encoders`.

        Raises:
            UserError: they changed since.
        """
        found = self.hashes()
        for name in what:
            if found[name] != about[name]:
                raise UserError(
                    f"{name} is {found[name]}, the manifest says {about[name]}", self.folder, "run `mia target` again"
                )

    def card(self) -> dict[str, Any]:
        """What the manifest says of the model beside its hashes: family, schedule and sizes."""
        schedule, (shape, side) = self.schedule(), self.sizes()
        level = (
            {"sigma_500": round(float(schedule.sigma(500)), 6)}
            if schedule.prediction == "flow"
            else {"alpha_bar_300": round(float(schedule.at(300)), 6)}
        )
        return {
            "family": self.family.name, "prediction": schedule.prediction, "train_steps": schedule.train_steps,
            "latent_shape": list(shape), "side_px": side, **level,
        }  # fmt: skip

    def schedule(self) -> models.Schedule:
        """The model's own schedule.

        Raises:
            UserError: it is not the one that the family states.
        """
        schedule = models.schedule(self.folder, clips=not self.family.autoencoder)
        where = models.part_folder(self.folder, "scheduler")
        if (schedule.prediction == "flow") != self.family.flow:
            raise UserError(
                f"the scheduler's prediction is {schedule.prediction}, which {self.family.name} does not know", where,
                "mend scheduler_config.json",
            )  # fmt: skip
        if self.family.betas is not None:
            wanted = settings.alpha_bar(*self.family.betas, schedule.train_steps)
            if abs(schedule.at(300) - wanted[300]) > 1e-4:
                raise UserError(
                    f"alpha_bar(300) is {schedule.at(300):.4f}, {self.family.name} states {wanted[300]:.4f}", where,
                    "mend scheduler_config.json",
                )  # fmt: skip
        return schedule

    def sizes(self) -> tuple[tuple[int, int, int], int]:
        """The latents' shape (channels, height, width), and the images' side in pixels."""
        config = self._denoiser_config()
        side, depth = config["sample_size"], len(self._code_config().get("block_out_channels", "1")) - 1
        return (config["in_channels"], side, side), side * 2**depth

    def _adapted(self) -> set[str]:
        """The parts that the LoRA changes."""
        return adapters.parts(self.lora, self.family.denoiser) if self.lora else set()

    def _denoiser_config(self) -> dict[str, Any]:
        folder, part = (self.unet, "") if self.unet else (self.folder, self.family.denoiser)
        return models.part_config(folder, part)

    def _code_config(self) -> dict[str, Any]:
        return models.part_config(self.folder, self.family.autoencoder) if self.family.autoencoder else {}

    def autoencoder(self, on: torch.device, dtype: torch.dtype) -> networks.Autoencoder:
        """The frozen autoencoder; in float32 where it says of itself that half precision overflows."""
        import torch

        shape, side = self.sizes()
        part = self.family.autoencoder
        if not part:
            return networks.Pixels(side, shape[0], on)
        config = self._code_config()
        if config.get("force_upcast") and dtype == torch.float16:
            dtype = torch.float32
        name = check_class(self.folder, part, self.family.classes[part])
        kind = networks.VqAutoencoder if name == "VQModel" else networks.Autoencoder
        return kind(self._diffusers(self.folder, part, name).to(on, dtype), shape, side)

    def network(self, on: torch.device, dtype: torch.dtype) -> networks.Network:
        """Denoiser, autoencoder and schedule, ready to be called."""
        part = self.family.denoiser
        folder, place = (self.unet, "") if self.unet else (self.folder, part)
        denoiser = self._diffusers(folder, place, check_class(folder, place, self.family.classes[part]))
        if self.lora is not None:
            adapters.merge(self.lora, part, denoiser)
        has_null = "text_encoder" in self.family.classes or self.family.network is networks.ClassNetwork
        return self.family.network(denoiser.to(on, dtype), self.autoencoder(on, dtype), self.schedule(), has_null)

    def captions(self, on: torch.device) -> captions.Captions:
        """What turns captions into conditions, in float32."""
        parts = [part for part in self.family.classes if part.startswith("text_encoder")]
        if self.family.network is networks.ClassNetwork:
            return captions.ClassNumbers(self._denoiser_config()["num_embeds_ada_norm"])
        if not parts:
            return captions.Captions()
        encoders = [self._text_encoder(part, on) for part in parts]
        tokenizers = [self._tokenizer(part.replace("text_encoder", "tokenizer")) for part in parts]
        if self.family.flow:
            return captions.ClipPairAndT5(tokenizers, encoders, self._denoiser_config()["joint_attention_dim"])
        if self._is_pair():
            return captions.ClipPair(tokenizers, encoders, zeros=self._zeros())
        return captions.ClipText(tokenizers[0], encoders[0])

    def _is_pair(self) -> bool:
        return self.family.network is networks.SdxlNetwork

    def _zeros(self) -> bool:
        """Whether SDXL's null condition is all zeros."""
        return models.part_config(self.folder, "", "model_index.json").get("force_zeros_for_empty_prompt", True)

    def _diffusers(self, folder: pathlib.Path, part: str, name: str) -> Any:
        ensure_torchvision()
        import diffusers

        return models.load(getattr(diffusers, name), folder, part, low_cpu_mem_usage=False)

    def _text_encoder(self, part: str, on: torch.device) -> Any:
        ensure_torchvision()
        import torch
        import transformers

        name = check_class(self.folder, part, self.family.classes[part])
        encoder = models.load(getattr(transformers, name), self.folder, part).to(torch.float32)
        if self.lora is not None:
            adapters.merge(self.lora, part, encoder)
        return encoder.to(on)

    def _tokenizer(self, part: str) -> Any:
        return models.tokenizer(self.folder, part, "T5TokenizerFast" if part == "tokenizer_3" else "CLIPTokenizer")


_SHAPE = ("in_channels", "out_channels", "sample_size", "cross_attention_dim", "joint_attention_dim", "num_classes")


def _digest(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
