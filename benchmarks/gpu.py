"""What one GPU does with Stable Diffusion 1.x: its own matrix rate, the UNet, the decoder, the reference's loop, ours.

Random weights in the real shapes, random inputs; needs torch, diffusers and this package. `make bench-gpu` on a machine
with CUDA; `python -m benchmarks.gpu --toy --device cpu` runs every line of it at toy size, where no figure means
anything. MFU is the share of the matrix rate measured in the same run. Goals on an H200 (`performance.md`, E): at least
35 % for UNet and decoder, 3.5x the reference's loop at equal work, 10x without pixel error and with shared draws.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from benchmarks.features import NUMBER, ours, random_samples
from benchmarks.naive import naive
from mia import models, networks, settings
from mia.plan import DECODE_TFLOP, UNET_TFLOP

UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
VAE = {
    "sample_size": 512, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
TOY_UNET = UNET | {"sample_size": 8, "block_out_channels": (32, 32, 32, 32), "norm_num_groups": 8}
TOY_VAE = VAE | {"sample_size": 64, "block_out_channels": (16, 16, 16, 16), "norm_num_groups": 8}


def build(toy: bool, on: Any, dtype: Any) -> networks.Network:
    """A network in Stable Diffusion 1.x's shapes, weights as diffusers initialises them."""
    import torch

    models.ensure_torchvision()
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(on):
        unet = UNet2DConditionModel(**(TOY_UNET if toy else UNET))
        vae = AutoencoderKL(**(TOY_VAE if toy else VAE))
    unet, vae = (net.eval().requires_grad_(False).to(dtype) for net in (unet, vae))
    side = unet.config.sample_size
    alpha_bar = settings.alpha_bar(0.00085, 0.012)
    schedule = models.Schedule(alpha_bar, float(alpha_bar[0]))
    return networks.Network(unet, networks.Autoencoder(vae, (4, side, side), 8 * side), schedule, has_null=True)


def seconds(call: Callable[[], Any], on: Any, least: float = 1.0) -> float:
    """Mean seconds of a call, over at least `least` seconds of calls, after three that do not count."""
    import torch

    def wait() -> None:
        if on.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(1 if least < 1 else 3):
        call()
    wait()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < least:
        call()
        calls += 1
        wait()
    return (time.perf_counter() - start) / calls


def matmul_rate(on: Any, dtype: Any, n: int) -> float:
    """TFLOP/s of an n x n x n product of random matrices."""
    import torch

    a, b = (torch.randn(n, n, device=on).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, on) / 1e12


def busy(call: Callable[[], Any], on: Any) -> float:
    """Share of a call's time in which the GPU runs a kernel; the rest is the host's."""
    import torch

    if on.type != "cuda":
        return float("nan")
    start = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    wall = time.perf_counter() - start
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / wall


def main() -> None:
    """Print one line for each measurement."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--toy", action="store_true", help="toy shapes, to run the script itself")
    parser.add_argument("--images", type=int, default=16)
    chosen = parser.parse_args()
    on, dtype, least = models.device(chosen.device), models.torch_dtype(chosen.dtype), 0.05 if chosen.toy else 2.0
    name = torch.cuda.get_device_name(on) if on.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {chosen.dtype}{', toy shapes' if chosen.toy else ''}")
    rate = matmul_rate(on, dtype, 256 if chosen.toy else 8192)
    print(f"matrix product          {rate:8.1f} TFLOP/s")

    def line(what: str, rows: int, tflop: float, once: float) -> None:
        memory = torch.cuda.max_memory_allocated(on) / 2**30 if on.type == "cuda" else float("nan")
        share = "" if chosen.toy else f"  MFU {100 * rows * tflop / once / rate:5.1f} %"
        print(f"{what:24s}{rows / once:8.1f} rows/s{share}  peak {memory:.1f} GiB", flush=True)

    with torch.inference_mode():
        network = build(chosen.toy, on, dtype)
        shape, plain = network.latent_shape, network.denoiser
        for layout in ("eager", "channels_last", "compiled"):
            if layout == "channels_last":
                plain.to(memory_format=torch.channels_last)
            if layout == "compiled":
                if chosen.toy and on.type == "cpu":
                    continue  # minutes of compiling that say nothing
                network.denoiser = torch.compile(plain)
            for rows in (2,) if chosen.toy else (16, 32, 64):
                z, t = torch.randn(rows, *shape, device=on), torch.full((rows,), 301, device=on)
                told = {"states": torch.randn(rows, 77, 768, device=on, dtype=dtype)}
                line(f"UNet {layout} {rows}", rows, UNET_TFLOP, seconds(lambda: network(z, t, told), on, least))  # noqa: B023
        for rows in (1,) if chosen.toy else (4, 8, 16):
            z = torch.randn(rows, *shape, device=on)
            line(f"decode {rows}", rows, DECODE_TFLOP, seconds(lambda: network.decode(z), on, least))  # noqa: B023

    samples = random_samples(chosen.images, shape, network.side_px, 77, 768)
    of, rows = settings.SETTINGS[NUMBER], chosen.images * 5 * 10
    fast = network.denoiser
    network.denoiser = plain
    slow = naive(network, samples, of, 5)
    network.denoiser = fast
    print(f"reference loop          {2 * rows / slow:8.1f} rows/s, {slow:.1f} s, both texts and a decode at each step")
    for what, losses, texts in (("equal work", settings.LOSSES, 2), ("no pixel error", ("model_loss",), 1)):
        ours(network, samples, losses, 5, 32)
        took = ours(network, samples, losses, 5, 32)
        host = 100 * (1 - busy(lambda: ours(network, samples, losses, 5, 32), on))  # noqa: B023
        ratio = f"{texts * rows / took:8.1f} rows/s, {took:.1f} s, {slow / took:.1f}x"
        print(f"ours, {what:18s}{ratio}, host {host:.1f} % of wall")


if __name__ == "__main__":
    main()
