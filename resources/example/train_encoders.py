# ruff: noqa: T201  (a script: it reports by printing)
"""Train the example's two tiny encoders: an image-text encoder (open_clip) and an image autoencoder (diffusers).

    PYTHONPATH=. python resources/example/train_encoders.py vae clip similarity report

Neither sees a pool: both train on one shuffled union of every usable public-domain drawing, as `build_corpus.collect`
renders it from the openclipart packages. That includes the drawings no pool took, and excludes the planted copies.
Captions are the English ones that `build_corpus.write_caption` gives each drawing.

`vae` writes encoders/vae, `clip` writes encoders/clip, `similarity` fills the parquet files' similarity column with
the cosine between each stored image and its caption, and `report` prints the numbers that README.md quotes.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import build_corpus
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch.nn import functional

from mia.compat import ensure_torchvision

ensure_torchvision()

import open_clip  # noqa: E402  (needs the shim)
from diffusers import AutoencoderKL  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
VAE_SIZE, CLIP_SIZE, CANVAS = 32, 64, 72

VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 16, 32],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": VAE_SIZE,
    "mid_block_add_attention": False,
}
CLIP_CONFIG: dict[str, dict[str, Any]] = {
    "model_cfg": {
        "embed_dim": 64,
        "quick_gelu": False,
        "vision_cfg": {"image_size": CLIP_SIZE, "patch_size": 8, "width": 64, "head_width": 16, "layers": 3},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


# --------------------------------------------------------------------------------------------------------------------
# Shared
# --------------------------------------------------------------------------------------------------------------------


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1] from equally large images."""
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).div(127.5).sub(1).contiguous()


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """`steps` batches of indices, epoch after epoch in a new order."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator)
        yield order[:size]
        order = order[size:]


def optimise(
    parameters: list[torch.nn.Parameter],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    count: int,
    args: argparse.Namespace,
    *,
    batch: int,
    rate: float,
    steps: int,
    decay: float = 0.0,
) -> None:
    """AdamW with a short warm-up and a cosine learning-rate schedule."""
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    generator = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()
    for step, rows in enumerate(batches(count, batch, steps, generator)):
        loss = loss_of(rows)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - start:.0f} s", flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Autoencoder
# --------------------------------------------------------------------------------------------------------------------


def centre_crops(images: list[Image.Image]) -> torch.Tensor:
    return to_tensor([ImageOps.fit(image, (VAE_SIZE, VAE_SIZE), Image.Resampling.BICUBIC) for image in images])


def train_vae(images: list[Image.Image], args: argparse.Namespace) -> None:
    """Reconstruction (L1 and L2) plus a whiff of KL, on centre crops, flipped and with their channels permuted."""
    torch.manual_seed(args.seed)
    pixels = centre_crops(images)
    vae: Any = AutoencoderKL(**VAE_CONFIG)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        x = pixels[rows]
        x = x.flip(-1) if torch.rand(()) < 0.5 else x
        x = x.flip(-2) if torch.rand(()) < 0.25 else x
        x = x[:, torch.randperm(3)] if torch.rand(()) < 0.5 else x
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        return error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().mean()

    optimise(list(vae.parameters()), loss_of, len(pixels), args, batch=64, rate=args.vae_rate, steps=args.vae_steps)
    vae.eval()
    with torch.inference_mode():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(256)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.half().save_pretrained(args.encoders / "vae")


def report_vae(images: list[Image.Image], folder: pathlib.Path) -> None:
    """Reconstruction error, latent scale and speed of the stored autoencoder, on the images given."""
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()
    pixels = centre_crops(images)
    with torch.inference_mode():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(64)])
        decoded = torch.cat([vae.decode(part).sample for part in latents.split(64)]).clamp(-1, 1)
        error = (decoded - pixels).abs().mean() * 127.5
        per_image = (decoded - pixels).abs().mean((1, 2, 3)) * 127.5
    scaled = latents * vae.config.scaling_factor
    parameters = sum(p.numel() for p in vae.parameters())
    print(f"vae: {parameters} parameters, scaling_factor {vae.config.scaling_factor}, L1 {error:.2f} of 255")
    print("vae: L1 quantiles", [round(q, 1) for q in per_image.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()])
    print("vae: scaled latent mean", scaled.mean((0, 2, 3)).tolist(), "std", scaled.std((0, 2, 3)).tolist())
    for name, call in (("encode", lambda: vae.encode(pixels[:64])), ("decode", lambda: vae.decode(latents[:64]))):
        print(f"vae: {name} {milliseconds(call) / 64:.3f} ms per image, batch 64, {torch.get_num_threads()} threads")


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


# --------------------------------------------------------------------------------------------------------------------
# Image-text encoder
# --------------------------------------------------------------------------------------------------------------------


def squashed(image: Image.Image) -> Image.Image:
    """The whole image as a square, a little larger than the encoder's input, as material for `augment`."""
    return image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)


def warp(x: torch.Tensor, size: int) -> torch.Tensor:
    """Random crop or padding of each side, white outside; `x` is (N, 3, H, W) in [-1, 1]."""
    n = len(x)
    low = torch.tensor([-1.15, -1.05]) + torch.rand(n, 2) * torch.tensor([0.25, 0.15])
    high = torch.tensor([0.90, 0.90]) + torch.rand(n, 2) * torch.tensor([0.25, 0.15])
    theta = torch.zeros(n, 2, 3)
    theta[:, :, :2] = torch.diag_embed((high - low) / 2)
    theta[:, :, 2] = (high + low) / 2
    grid = functional.affine_grid(theta, [n, 3, size, size], align_corners=False)
    return 1 - functional.grid_sample(1 - x, grid, padding_mode="zeros", align_corners=False)


def recolour(x: torch.Tensor) -> torch.Tensor:
    """Random brightness, contrast, saturation and hue (a rotation in the YIQ plane), per image."""
    n = len(x)
    forward = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    angle = torch.empty(n).uniform_(-0.8, 0.8)
    turn = torch.zeros(n, 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = torch.cos(angle)
    turn[:, 1, 2], turn[:, 2, 1] = -torch.sin(angle), torch.sin(angle)
    turn[:, 1:] *= torch.empty(n, 1, 1).uniform_(0.8, 1.2)
    matrix = torch.linalg.inv(forward) @ turn @ forward
    light = (x + 1) / 2
    light = torch.einsum("nij,njhw->nihw", matrix, light) * torch.empty(n, 1, 1, 1).uniform_(0.7, 1.05)
    return (light * 2 - 1).clamp(-1, 1)


def block_noise(x: torch.Tensor) -> torch.Tensor:
    """What JPEG does: quantise each 8x8 block's cosine coefficients, coarser towards high frequencies."""
    n, c, h, w = x.shape
    k = torch.arange(8.0)
    dct = torch.cos(math.pi * (2 * k[None] + 1) * k[:, None] / 16) * torch.where(k[:, None] > 0, 0.5, 0.5**1.5)
    step = (0.02 + 0.02 * (k[:, None] + k[None])) * torch.empty(n, 1, 1, 1, 1, 1).uniform_(0.1, 2.0)
    blocks = x.reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    coefficients = torch.round(dct @ blocks @ dct.T / step) * step
    return (dct.T @ coefficients @ dct).transpose(3, 4).reshape(n, c, h, w).clamp(-1, 1)


def rescale(x: torch.Tensor) -> torch.Tensor:
    """Down to a random smaller size and back up."""
    small = int(torch.randint(CLIP_SIZE // 2, CLIP_SIZE, ()))
    down = functional.interpolate(x, size=small, mode="bilinear", antialias=True, align_corners=False)
    return functional.interpolate(down, size=CLIP_SIZE, mode="bilinear", align_corners=False)


def augment(x: torch.Tensor) -> torch.Tensor:
    """One random view of each image, as copies on the web differ. Each step spares a part of the batch."""
    x = warp(x, CLIP_SIZE)
    for step, chance in ((recolour, 0.7), (rescale, 0.4), (block_noise, 0.4)):
        chosen = torch.rand(len(x)) < chance
        x = x.clone()
        x[chosen] = step(x[chosen])
    return x


def contrast(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Symmetric cross-entropy: row i of `a` belongs to row i of `b` and to no other (CLIP's loss)."""
    logits = scale * a @ b.T
    target = torch.arange(len(a))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def nt_xent(a: torch.Tensor, b: torch.Tensor, temperature: float) -> torch.Tensor:
    """SimCLR's loss: a view's other view against every other view in the batch."""
    views = torch.cat([a, b])
    logits = (views @ views.T / temperature).fill_diagonal_(float("-inf"))
    return functional.cross_entropy(logits, torch.arange(len(views)).roll(len(a)))


def save_clip(model: torch.nn.Module, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG, indent=2) + "\n")
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def train_clip(images: list[Image.Image], captions: list[str], args: argparse.Namespace) -> None:
    """CLIP's loss on image and caption, plus SimCLR's on two views of the image, so that copies land close."""
    torch.manual_seed(args.seed)
    pixels = to_tensor([squashed(image) for image in images])
    tokens = open_clip.tokenize(captions)
    model = open_clip.CLIP(**CLIP_CONFIG["model_cfg"]).train()

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        views = augment(pixels[rows].repeat(2, 1, 1, 1))
        first, second = model.encode_image(views, normalize=True).chunk(2)
        text = model.encode_text(tokens[rows], normalize=True)
        scale = model.logit_scale.exp().clamp(max=50)
        pairing = (contrast(first, text, scale) + contrast(second, text, scale)) / 2
        return args.pairing_weight * pairing + nt_xent(first, second, args.temperature)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimise(
        parameters, loss_of, len(pixels), args,
        batch=args.clip_batch, rate=args.clip_rate, steps=args.clip_steps, decay=0.05,
    )  # fmt: skip
    save_clip(model.eval(), args.encoders / "clip")


@torch.inference_mode()
def embed(model: open_clip.CLIP, preprocess: Callable, urls: list[str]) -> torch.Tensor:
    """Unit embeddings of stored images, through the preprocessing that the encoder's folder prescribes."""
    paths = [build_corpus.ROOT / url.removeprefix("file:") for url in urls]
    pixels = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in paths])
    return torch.cat([model.encode_image(part, normalize=True) for part in pixels.split(256)])


def load_clip(folder: pathlib.Path) -> tuple[open_clip.CLIP, Callable, Callable]:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


def fill_similarity(folder: pathlib.Path) -> None:
    """Write the cosine of image and caption into every pool's parquet file."""
    model, preprocess, tokenizer = load_clip(folder)
    for pool in build_corpus.POOLS:
        table = pq.read_table(HERE / f"{pool}.parquet")
        images = embed(model, preprocess, table["URL"].to_pylist())
        with torch.inference_mode():
            texts = model.encode_text(tokenizer(table["TEXT"].to_pylist()), normalize=True)
        cosine = [round(float(value), 4) for value in (images * texts).sum(1)]
        column = table.schema.get_field_index("similarity")
        table = table.set_column(column, "similarity", pa.array(cosine, pa.float64()))
        pq.write_table(table, HERE / f"{pool}.parquet", compression="zstd")


def report_clip(folder: pathlib.Path) -> None:
    """How well a distance of 0.5 finds the planted copies, and how many other candidates it catches."""
    model, preprocess, _ = load_clip(folder)
    tables = {name: pq.read_table(HERE / f"{name}.parquet") for name in ("members", "candidates", "planted")}
    urls = {name: tables[name]["URL"].to_pylist() for name in ("members", "candidates")}
    members, candidates = (embed(model, preprocess, urls[name]) for name in ("members", "candidates"))
    distances = torch.cdist(candidates, members)
    truth = {row["candidate_url"]: row for row in tables["planted"].to_pylist()}
    place = {url: i for i, url in enumerate(urls["members"])}
    is_planted = torch.tensor([url in truth for url in urls["candidates"]])
    own = {
        url: distances[i, place[truth[url]["member_url"]]].item()
        for i, url in enumerate(urls["candidates"]) if url in truth
    }  # fmt: skip
    nearest = distances[~is_planted].min(1).values
    within = torch.pdist(members)
    print(f"clip: recall of planted pairs at 0.5: {np.mean([d < 0.5 for d in own.values()]):.3f} of {len(own)}")
    print(f"clip: other candidates below 0.5: {(nearest < 0.5).sum()} of {len(nearest)}")
    print(
        "clip: nearest-member distance, other candidates:", quantiles(nearest), "all member pairs:", quantiles(within)
    )
    for kind in build_corpus.TRANSFORMS:
        those = torch.tensor([own[url] for url, row in truth.items() if row["transform"] == kind])
        print(f"clip:   {kind}: {(those < 0.5).sum()} of {len(those)}, largest distance {those.max():.2f}")
    for pool in build_corpus.POOLS:
        similarity = pq.read_table(HERE / f"{pool}.parquet")["similarity"].to_numpy()
        print(f"clip: similarity of {pool}:", quantiles(torch.from_numpy(similarity)))


def quantiles(values: torch.Tensor) -> list[float]:
    values = values.double()[: 2**24]
    return [round(q, 3) for q in np.quantile(values.numpy(), [0.01, 0.05, 0.25, 0.5, 0.75, 0.95]).tolist()]


# --------------------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=["vae", "clip", "similarity", "report"])
    parser.add_argument("--openclipart", type=pathlib.Path, default=pathlib.Path("/usr/share/openclipart"))
    parser.add_argument("--encoders", type=pathlib.Path, default=HERE / "encoders", help="folder of both encoders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vae-steps", type=int, default=800)
    parser.add_argument("--vae-rate", type=float, default=2e-3)
    parser.add_argument("--clip-steps", type=int, default=800)
    parser.add_argument("--clip-rate", type=float, default=2e-3)
    parser.add_argument("--clip-batch", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.07, help="of the loss between two views of an image")
    parser.add_argument("--pairing-weight", type=float, default=0.3, help="of the loss between image and caption")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.encoders = args.encoders.resolve()
    torch.set_num_threads(args.threads)
    drawings = build_corpus.collect(args.openclipart, build_corpus.SIZE)
    images = [image for _, image in drawings]
    captions = [build_corpus.write_caption(d, build_corpus.seeded(args.seed, "caption", d.path)) for d, _ in drawings]
    if "vae" in args.stages:
        train_vae(images, args)
    if "clip" in args.stages:
        train_clip(images, captions, args)
    if "similarity" in args.stages:
        fill_similarity(args.encoders / "clip")
    if "report" in args.stages:
        report_vae(images, args.encoders / "vae")
        report_clip(args.encoders / "clip")


if __name__ == "__main__":
    main()
