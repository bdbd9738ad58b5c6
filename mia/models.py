"""Loading models, by safetensors only, from a local folder or the hub, and running them in safe batches.

A *source* is a diffusers folder or a hub name; a *target* is a source whose parts agree with what the attacks assume.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mia import settings, tables
from mia.compat import ensure_torchvision
from mia.errors import UserError
from mia.schedules import Schedule, flow_schedule

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MIN_BATCH = 16
WEIGHTS = ("unet", "transformer", "vae", "vqvae", "text_encoder", "text_encoder_2", "text_encoder_3")
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


def quieten() -> None:
    """Leave the log to us: no progress bars and no advice from the libraries that load models."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def device(name: str) -> torch.device:
    """The named torch device.

    Raises:
        UserError: CUDA is asked for and there is none. Never falls back in silence.
    """
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "CUDA is asked for but torch finds no CUDA device", "execution.device", "use a GPU node or 'cpu'"
        )
    found = torch.device(name)
    if found.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # who wants it says so
        if (found.index or 0) >= torch.cuda.device_count():
            there = torch.cuda.device_count()
            raise UserError(
                f"there is no {name}, only {there} CUDA devices", "execution.device", "name one that is there"
            )
    return found


def batches(rows: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers in runs of at most `size`, each with the count of rows that are real.

    Kernels for very small batches sum in another order, so a run shorter than `MIN_BATCH` is padded by repeating its
    last row. With that, results were bit-equal for every batch size, order and position tried (torch 2.13, CPU).
    """
    for start in range(0, rows, size):
        run = np.arange(start, min(start + size, rows))
        yield np.pad(run, (0, max(0, MIN_BATCH - len(run))), mode="edge"), len(run)


class Memory:
    """How large a batch a device's memory holds: found out by trying, and kept to from then on.

    No run is shorter than `smallest` rows, nor is less tried than that: as in `batches`, so that no result changes.
    Backward passes, whose rows hold several times the memory, go down to 1 and take another sum's last bits.
    """

    def __init__(self, device: object, smallest: int = MIN_BATCH) -> None:
        self.device, self.smallest, self.largest = device, smallest, 2**31

    def read(self, work: Callable[[np.ndarray, int], None], rows: int, real: int) -> None:
        """Have `work` done on a batch of which the first `real` rows count; in runs if memory does not hold it.

        Args:
            work: of row numbers of the batch, int64[run], and the count of those that are real. It is done again, on
                half as many, when it runs out of memory: so it is to keep nothing, and to count nothing, before it is
                done. A run that is too short repeats its last row.
            rows: of the batch.
            real: how many of them are not padding; a run without any is left out.

        Raises:
            UserError: not even the smallest run fits.
        """
        import torch

        start = 0
        while start < real:
            run = np.arange(start, min(start + self.largest, rows))
            padded = np.pad(run, (0, max(0, self.smallest - len(run))), mode="edge")
            try:
                work(padded, min(len(run), real - start))
            except torch.OutOfMemoryError as problem:
                self._halve(len(padded), problem)
            else:
                start += len(run)
                continue
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the attempt held went with its error

    def _halve(self, rows: int, problem: Exception) -> None:
        if rows <= self.smallest:
            what = "one image" if rows == 1 else f"{rows} rows at a time"
            raise UserError(
                f"the device's memory does not hold {what}", str(self.device), "use a larger one, or half precision"
            ) from problem
        self.largest = max(rows // 2, self.smallest)
        log.warning("%d rows do not fit into memory; going on with %d", rows, self.largest)


def locate(source: str, revision: str = "") -> pathlib.Path:
    """The folder that holds `source`: itself when it is one, else a snapshot of the hub's repository.

    Raises:
        UserError: neither a folder nor to be had from the hub; or a part that its model_index.json names is missing.
    """
    folder = pathlib.Path(source)
    if not folder.is_dir():
        # Small pixel models on the hub keep weights beside model_index.json instead of in a folder of their own.
        weights = ["diffusion_pytorch_model.safetensors", *(f"{part}/*.safetensors*" for part in WEIGHTS)]
        folder = snapshot(source, revision, weights, "targets.*.source")
    parts = pipeline_index(folder)[1]
    missing = [part for part in parts if not part_folder(folder, part).is_dir()]
    if missing:
        raise UserError(
            f"model folder lacks {', '.join(missing)}", folder,
            "give a complete diffusers folder (model_index.json, " + ", ".join(parts) + ")",
        )  # fmt: skip
    return folder


def pipeline_index(folder: pathlib.Path) -> tuple[str, list[str]]:
    """The pipeline class that a model folder says it is of, and the parts that it names and we may need.

    Raises:
        UserError: no readable model_index.json.
    """
    file = folder / "model_index.json"
    if not file.is_file():
        raise UserError("model folder lacks model_index.json", folder, "give a complete diffusers folder")
    index = part_config(folder, "", file.name)
    parts = [name for name, what in index.items() if isinstance(what, list) and name not in OPTIONAL and all(what)]
    return str(index.get("_class_name", "")), parts


def part_folder(folder: pathlib.Path, part: str) -> pathlib.Path:
    """Where a part lies: in its own folder, or beside model_index.json as in the small pixel models on the hub."""
    own, name = folder / part, "scheduler_config.json" if part == "scheduler" else "config.json"
    beside = not own.is_dir() and part in ("unet", "scheduler") and (folder / name).is_file()
    return folder if beside else own


def snapshot(source: str, revision: str, weights: list[str], where: str) -> pathlib.Path:
    """Files of a repository on the hub that are text or match `weights`: nothing pickled is even fetched."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.txt", *weights]
        return pathlib.Path(huggingface_hub.snapshot_download(source, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as problem:
        raise UserError(
            f"model '{source}' is neither a folder nor on the hub ({type(problem).__name__})",
            where, "mend the name or the revision, or download it to a folder first",
        ) from problem  # fmt: skip


def load(build: Any, folder: pathlib.Path, part: str, **options: Any) -> Any:
    """A part of a model folder as an object of the diffusers or transformers class `build`, from safetensors only.

    Raises:
        UserError: it cannot be read, or lacks weights that the class has, which the libraries would draw at random.
    """
    quieten()
    where = part_folder(folder, part)
    try:
        net, said = build.from_pretrained(
            where, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as problem:
        raise UserError(f"{part} cannot be loaded ({problem})", where, "give a complete diffusers part") from problem
    if said["missing_keys"]:
        some = sorted(said["missing_keys"])
        raise UserError(f"{part} lacks {len(some)} weights, {some[0]} among them", where, "fetch the model anew")
    return net.eval().requires_grad_(False)


def unet(folder: pathlib.Path, on: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The noise predictor, in evaluation mode, without gradients."""
    ensure_torchvision()
    from diffusers import UNet2DConditionModel

    return load(UNet2DConditionModel, folder, "unet", low_cpu_mem_usage=False).to(on, dtype)


def vae(folder: pathlib.Path, on: torch.device, dtype: torch.dtype, part: str = "vae") -> torch.nn.Module:
    """The autoencoder; `config.scaling_factor` is applied by the caller."""
    ensure_torchvision()
    from diffusers import AutoencoderKL

    return load(AutoencoderKL, folder, part, low_cpu_mem_usage=False).to(on, dtype)


def tokenizer(folder: pathlib.Path, part: str = "tokenizer", kind: str = "CLIPTokenizer") -> Any:
    """The tokenizer of a model folder, of the transformers class `kind`."""
    ensure_torchvision()
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(folder / part, local_files_only=True)
    except (OSError, ValueError) as problem:
        raise UserError(f"tokenizer cannot be loaded ({problem})", folder / part, "give its files") from problem


def text_encoder(folder: pathlib.Path, on: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The text encoder of a model folder."""
    ensure_torchvision()
    from transformers import CLIPTextModel

    return load(CLIPTextModel, folder, "text_encoder").to(on, dtype)


def text_states(
    tokenize: Any, encoder: torch.nn.Module, captions: list[str], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Last hidden states, float32[n, tokens, width], cut or padded to the model's length, and int32[n] token counts.

    A count above the model's length tells that the caption was truncated.
    """
    import torch

    states, counts = [], []
    for run, real in batches(len(captions), batch_size):
        some = [captions[i] for i in run]
        tokens = tokenize(
            some, padding="max_length", max_length=tokenize.model_max_length, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = encoder(tokens.input_ids.to(encoder.device))[0]
        states.append(hidden[:real].float().cpu().numpy())
        counts += [len(ids) for ids in tokenize(some[:real]).input_ids]
    return np.concatenate(states), np.array(counts, dtype=np.int32)


def schedule(folder: pathlib.Path, clips: bool = False) -> Schedule:
    """The schedule and prediction type of the model's own scheduler config, as DDIM reads it; or a flow's.

    `clips` admits `clip_sample`: models of pixels clip the *predicted* image to its range while sampling, which is no
    part of the forward process nor of the training loss, the two things we read. Latents have no such range.

    Raises:
        UserError: the scheduler disagrees with its own betas, predicts what we do not know, or clips latents.
    """
    ensure_torchvision()
    from diffusers import DDIMScheduler

    said = part_config(folder, "scheduler", "scheduler_config.json")
    if str(said.get("_class_name", "")).startswith("FlowMatch"):
        return flow_schedule(said.get("num_train_timesteps", settings.TRAIN_STEPS))
    ddim = _loaded_scheduler(DDIMScheduler, folder)
    if ddim.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"prediction type '{ddim.config.prediction_type}' is not supported", folder / "scheduler",
            "use a model of epsilon, v_prediction, sample or a flow",
        )  # fmt: skip
    if not clips and said.get("clip_sample", _clips_by_default(said.get("_class_name", ""))):
        raise UserError("the scheduler clips latents", folder / "scheduler", 'say "clip_sample": false in its config')
    found = ddim.alphas_cumprod.double().numpy()
    wanted = _exact(ddim.config, len(found))
    if wanted is not None:
        if not np.allclose(found, wanted, rtol=1e-4):
            raise UserError(
                f"alpha_bar(300) is {found[300]:.4f}, its betas say {wanted[300]:.4f}", folder / "scheduler",
                "mend scheduler_config.json",
            )  # fmt: skip
        found = wanted  # the scheduler's own are float32
    return Schedule(found, 1.0 if ddim.config.set_alpha_to_one else float(found[0]), ddim.config.prediction_type)


def _clips_by_default(scheduler: str) -> bool:
    """Whether a scheduler class clips unless its config says otherwise: DDIM and DDPM, not PNDM or Euler."""
    import diffusers

    return "clip_sample" in inspect.signature(getattr(diffusers, scheduler, diffusers.DDIMScheduler)).parameters


def _exact(config: Any, steps: int) -> np.ndarray | None:
    """alpha_bar in float64 from the betas that a scheduler's config states; None when they have no simple form."""
    if config.trained_betas is not None:
        return None
    if config.beta_schedule == "scaled_linear":
        return settings.alpha_bar(config.beta_start, config.beta_end, steps)
    if config.beta_schedule == "linear":
        return np.cumprod(1.0 - np.linspace(config.beta_start, config.beta_end, steps, dtype=np.float64))
    return None


def _loaded_scheduler(build: Any, folder: pathlib.Path) -> Any:
    try:
        return build.from_pretrained(part_folder(folder, "scheduler"), local_files_only=True)
    except (OSError, ValueError) as problem:
        raise UserError(f"scheduler cannot be loaded ({problem})", folder / "scheduler", "give its config") from problem


def part_hash(folder: pathlib.Path, *parts: str) -> str:
    """One hash over every weight and config file of the named parts of a model folder: 16 hex digits."""
    digest = hashlib.sha256()
    for file in sorted(path for part in parts for path in _files(folder, part)):
        if file.suffix in {".safetensors", ".json", ".txt"}:
            digest.update(f"{file.relative_to(folder)} {tables.file_hash(file)}\n".encode())
    return digest.hexdigest()[:16]


def _files(folder: pathlib.Path, part: str) -> list[pathlib.Path]:
    place = part_folder(folder, part)
    if place == folder and part:  # beside model_index.json, among the other parts
        return [folder / "config.json", *folder.glob("*.safetensors")]
    return list(place.rglob("*"))


def part_config(folder: pathlib.Path, part: str, name: str = "config.json") -> dict[str, Any]:
    """A part's own configuration file."""
    file = part_folder(folder, part) / name
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as problem:
        raise UserError(
            f"{part} configuration cannot be read ({problem})", file, "give a complete diffusers part"
        ) from problem


def torch_dtype(name: str) -> torch.dtype:
    """`float64`, `float32`, `bfloat16` or `float16` as torch knows it."""
    import torch

    return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
        name
    ]


def encoder(model: str, on: torch.device) -> tuple[Any, Any, Any, str]:
    """An open_clip model in evaluation mode, its image preprocessing, its tokenizer, and the hash of its weights.

    Args:
        model: `local-dir:FOLDER`, `hf-hub:NAME`, or `tag:ARCHITECTURE/TAG`, one of open_clip's own names, such as
            `tag:ViT-L-14/openai`. A name stands for the repository on the hub where open_clip keeps these weights;
            the repository's own configuration says the rest, but an activation that open_clip knows to be wrong for
            them is refused. The hub's names may end in `@REVISION`.

    Raises:
        UserError: no such model or folder, or no safetensors in it: weights that might be pickles are not even fetched.
    """
    ensure_torchvision()
    import open_clip

    folder = _encoder_folder(model)
    if not (folder / "open_clip_config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise UserError("folder holds no open_clip model", folder, "it needs open_clip_config.json and safetensors")
    pickles = [path.name for kind in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(kind))]
    if pickles:  # open_clip chooses among all weights it finds
        raise UserError(f"folder holds weights that may be a pickle, {pickles[0]}", folder, "keep the safetensors only")
    source = f"local-dir:{folder.resolve()}"
    try:
        net, _, preprocess = open_clip.create_model_and_transforms(source, precision="fp32")
        tokenize = open_clip.get_tokenizer(source)
    except (RuntimeError, OSError, ValueError) as problem:
        raise UserError(f"open_clip cannot load the encoder ({problem})", folder, "fetch it anew") from problem
    _refuse_other_activation(net, model)
    return net.eval().requires_grad_(False).to(on), preprocess, tokenize, state_hash(net)


def _refuse_other_activation(net: torch.nn.Module, model: str) -> None:
    """Weights load whatever the configuration beside them says; for its own names open_clip knows better."""
    import open_clip

    kind, _, name = model.partition(":")
    if kind != "tag":
        return
    found = encoder_card(net)["activation"]
    quick = open_clip.get_pretrained_cfg(*name.partition("@")[0].split("/")).get("quick_gelu", False)
    if quick != ("quick_gelu" in found):
        trained = "with" if quick else "without"
        what = f"the encoder's configuration says {found}, its weights were trained {trained} QuickGELU"
        raise UserError(what, model, "name another revision, or a local-dir:FOLDER with a mended open_clip_config.json")


def _encoder_folder(model: str) -> pathlib.Path:
    kind, _, name = model.partition(":")
    if kind not in ("local-dir", "hf-hub", "tag") or not name:
        raise UserError(
            f"encoder '{model}' is of no known kind", "embeddings.model",
            "use local-dir:FOLDER, hf-hub:NAME or tag:ARCHITECTURE/TAG",
        )  # fmt: skip
    if kind == "local-dir":
        return pathlib.Path(name)
    name, _, revision = name.partition("@")
    source = name if kind == "hf-hub" else _hub_name(name)
    return snapshot(source, revision, ["*.safetensors"], "embeddings.model")


def _hub_name(name: str) -> str:
    """The hub's repository where open_clip keeps the weights that it calls `name`."""
    import open_clip

    known = [f"{architecture}/{tag}" for architecture, tag in open_clip.list_pretrained()]
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, 3)) or "a name that open_clip lists"
        raise UserError(f"open_clip knows no '{name}'", "embeddings.model", f"use {near}")
    repository, _, file = open_clip.get_pretrained_cfg(*name.split("/"))["hf_hub"].rpartition("/")
    if not repository or file.endswith((".bin", ".pt")):  # a file of its own is a pickle
        raise UserError(f"'{name}' is not kept as safetensors", "embeddings.model", "use another, or convert a copy")
    return repository


def encoder_card(net: torch.nn.Module) -> dict[str, Any]:
    """What an open_clip model's vectors depend on beside its weights, for an output's provenance.

    `activation`: `gelu`, `gelu_tanh` or `quick_gelu`, and where the towers differ both; weights trained with one load
    with any, and give other vectors. `preprocess`: size, mean, std, interpolation, resize_mode and so on.
    """
    found = set()
    for module in net.modules():
        name = type(module).__name__
        if name == "QuickGELU":
            found.add("quick_gelu")
        elif "GELU" in name:
            found.add("gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu")
    preprocess = dict(net.visual.preprocess_cfg)  # type: ignore[arg-type, union-attr]
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in preprocess.items()}
    return {"activation": "+".join(sorted(found)), "preprocess": plain}


def state_hash(net: torch.nn.Module) -> str:
    """A hash of a network's weights wherever they came from: 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
