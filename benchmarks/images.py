"""The download stage against a server on this machine: images per second and core, and memory for 1x and 4x the rows.

Pictures are 40-100 KB JPEGs, as on the web; the client decodes and hashes each. What is divided by is the client's CPU
time, for server and client share the cores. Goal: 80 images/s/core. Source: img2dataset's README, 1350/s on 16 cores.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import multiprocessing
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa

from mia import images, tables
from mia.config import ImagesOptions

ROWS, GOAL = 1000, 80.0
PICTURES = 64  # different ones; the server repeats them


def picture(rng: np.random.Generator) -> bytes:
    """A JPEG of blurred colours and noise."""
    from PIL import Image

    width, height = int(rng.integers(380, 640)), int(rng.integers(300, 520))
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = smooth + rng.integers(-12, 12, smooth.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def serve(port: multiprocessing.Queue) -> None:
    """Answers `/NUMBER` from memory, with no more HTTP than it takes, so that the client is what is measured."""
    rng = np.random.default_rng(0)
    pictures = [picture(rng) for _ in range(PICTURES)]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = pictures[int(head.split(b" ", 2)[1][1:]) % PICTURES]
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


def download(port: int, rows: int) -> None:
    """Fetch `rows` images in this process, as the command does, and print what it took as JSON."""
    urls = [f"http://127.0.0.1:{port}/{i}" for i in range(rows)]
    metadata = pa.table({"sample_id": [tables.sample_id(url, "") for url in urls], "url": urls}).sort_by("sample_id")
    options = ImagesOptions(allow_private_hosts=(f"127.0.0.1:{port}",))
    started, busy = time.perf_counter(), time.process_time()
    with (
        tempfile.TemporaryFile(buffering=0) as spool,
        tempfile.TemporaryDirectory() as folder,
    ):
        path = pathlib.Path(folder) / "images.parquet"
        found = images.stream(metadata, options, images.Pace(per_host=32), spool=spool)
        tables.write_batches(path, found, "images", {})
        ok = tables.read(path, "images", ("sample_id", "status"))["status"].to_pylist().count("ok")
    peak = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    took = {"ok": ok, "wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - busy}
    json.dump({**took, "peak_mib": int(peak.split()[1]) / 1024}, sys.stdout)


def main() -> None:
    """Print the figures."""
    log = logging.getLogger("bench")
    port: multiprocessing.Queue = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(port,), daemon=True)
    server.start()
    number, peaks = port.get(timeout=60), []
    for rows in (ROWS, 4 * ROWS):
        command = [sys.executable, "-m", "benchmarks.images", str(number), str(rows)]
        took = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert took["ok"] == rows, took
        rate = rows / took["cpu_s"]
        log.info("%d images: %.0f images/s/core (goal %.0f, ratio %.1f), %.1f s wall, peak memory %.0f MiB",
                 rows, rate, GOAL, rate / GOAL, took["wall_s"], took["peak_mib"])  # fmt: skip
        peaks.append(took["peak_mib"])
    log.info("peak memory, 4x the rows over 1x: ratio %.2f", peaks[1] / peaks[0])
    server.terminate()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        download(*map(int, sys.argv[1:]))
    else:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        main()
