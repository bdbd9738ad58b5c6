"""`mia.images` and `mia.fetching` against real servers here, `mia.pixels` against hand-made files and torchvision."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import datetime
import email.utils
import errno
import gzip
import hashlib
import io
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import imagehash
import numpy as np
import pyarrow as pa
import pytest
from aiohttp import web
from PIL import Image

from mia import fetching, images, pixels, tables
from mia.compat import ensure_torchvision
from mia.config import ImagesOptions
from mia.errors import UserError

MAX_BYTES, MAX_PIXELS = 200_000, 1_000_000


def picture(mode: str = "RGB", size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Smooth colours, so that lossy formats and hashes are stable."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=2).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


JPEG = encoded(picture(), "JPEG", quality=90)


def png_header(width: int, height: int) -> bytes:
    """A few bytes of PNG that promise `width` x `height` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------ servers


class Server:
    """An aiohttp server on 127.0.0.1 in a thread of its own. `hits` counts requests by path."""

    def __init__(self) -> None:
        self.hits: collections.Counter[str] = collections.Counter()
        self.headers: dict[str, str] = {}
        self.chunks_sent = 0
        self.starts: list[float] = []
        self.busy = self.busiest = 0  # requests to /nap at one time
        self.nap_s, self.retry_after = 0.0, ""
        self.redirect_to = ""
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/{name}", self._answer)
        app.router.add_get("/hop/{left}", self._hop)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def _hop(self, request: web.Request) -> web.Response:
        self.hits[request.path] += 1
        left = int(request.match_info["left"])
        return web.Response(status=302, headers={"Location": f"/hop/{left - 1}" if left else "/good.jpg"})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.hits[request.path] += 1
        self.headers = dict(request.headers)
        name = request.match_info["name"]
        special: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
            "slow": self._slow,
            "trickle": self._trickle,
            "endless": self._endless,
            "recovers": self._recovers,
            "nap": self._nap,
            "busy": self._busy,
        }
        if name in special:
            return await special[name](request)
        return self._fixed(name, request)

    def _fixed(self, name: str, request: web.Request) -> web.Response:
        if name.isdigit():
            return web.Response(status=int(name), body=JPEG)
        redirects = {"loop": "/loop", "to": self.redirect_to, "no-location": ""}
        if name in redirects:
            return web.Response(status=301, headers={"Location": redirects[name]} if redirects[name] else {})
        if name.startswith("robots"):
            return web.Response(body=JPEG, headers={"X-Robots-Tag": request.query["tag"]})
        if name.startswith("tdm"):
            return web.Response(body=JPEG, headers={"TDM-Reservation": request.query["value"]})
        if name.startswith("gzip"):
            plain = JPEG if name == "gzip" else bytes(50 * MAX_BYTES)
            return web.Response(body=gzip.compress(plain), headers={"Content-Encoding": "gzip"})
        bodies = {
            "good.jpg": JPEG,
            "grey.jpg": encoded(picture("L"), "JPEG"),
            "cmyk.jpg": encoded(picture("CMYK"), "JPEG"),
            "palette.png": encoded(picture("P"), transparency=3),
            "animated.gif": encoded(picture(), "GIF", save_all=True, append_images=[picture().rotate(90)]),
            "truncated.jpg": JPEG[: len(JPEG) * 9 // 10],
            "stump.jpg": JPEG[:20],
            "bomb.png": png_header(60_000, 60_000),
            "middling-bomb.png": png_header(10_000, 10_000),
            "html.jpg": b"<!doctype html><title>Not here</title>",
            "empty.jpg": b"",
            "large.jpg": JPEG + bytes(MAX_BYTES),
        }
        return web.Response(body=bodies[name], content_type="image/jpeg")

    async def _slow(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(5)
        return web.Response(body=JPEG)

    async def _trickle(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for byte in JPEG:
            await response.write(bytes([byte]))
            await asyncio.sleep(0.02)
        return response

    async def _endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        self.chunks_sent = 0
        for _ in range(10_000):
            await response.write(JPEG.ljust(50_000, b"\0"))
            self.chunks_sent += 1
        return response

    async def _nap(self, request: web.Request) -> web.StreamResponse:
        self.starts.append(time.monotonic())
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        await asyncio.sleep(self.nap_s)
        self.busy -= 1
        return web.Response(body=JPEG)

    async def _busy(self, request: web.Request) -> web.StreamResponse:
        """Turns the first caller away and says when to come back."""
        self.starts.append(time.monotonic())
        headers = {"Retry-After": self.retry_after}
        return web.Response(status=429 if self.hits[request.path] == 1 else 200, body=JPEG, headers=headers)

    async def _recovers(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=503 if self.hits[request.path] < 3 else 200, body=JPEG)


@pytest.fixture(scope="module")
def started() -> Iterator[Server]:
    server = Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(started: Server) -> Server:
    started.hits.clear()
    started.starts.clear()
    started.busiest = 0
    return started


@pytest.fixture
def neighbour() -> Iterator[Server]:
    """A second server, which no test allows."""
    server = Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "BACKOFF_S", 0.005)


@contextlib.contextmanager
def raw_server(answer: bytes) -> Iterator[int]:
    """The port of a socket that answers every request with these bytes and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65_536)
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def metadata(urls: list[str]) -> pa.Table:
    return pa.table({"sample_id": [tables.sample_id(url, str(i)) for i, url in enumerate(urls)], "url": urls})


def options(server: Server | None = None, **changes: object) -> ImagesOptions:
    allowed = (f"127.0.0.1:{server.port}",) if server else ()
    defaults: dict = {"allow_private_hosts": allowed, "max_bytes": MAX_BYTES, "max_pixels": MAX_PIXELS}
    return ImagesOptions(**{**defaults, **changes})


def fetch_one(url: str, chosen: ImagesOptions, **kwargs: object) -> dict:
    table = images.fetch(metadata([url]), chosen, **kwargs)
    tables.check(table, "images")
    (row,) = table.to_pylist()
    assert all(row[name] is None for name in ("sha256", "bytes", "width", "phash")) == (row["status"] != "ok")
    assert row["detail"].isprintable() and (row["detail"] == "") == (row["status"] == "ok")
    return row


# ------------------------------------------------------------------------------------------------ what is kept


def test_good_image_is_kept_byte_for_byte(server: Server) -> None:
    row = fetch_one(server.url("/good.jpg"), options(server))
    assert (row["status"], row["bytes"], row["sha256"]) == ("ok", JPEG, hashlib.sha256(JPEG).hexdigest())
    assert (row["width"], row["height"], row["format"]) == (48, 32, "jpeg")
    assert row["phash"] == int(str(imagehash.phash(Image.open(io.BytesIO(JPEG)))), 16)
    assert server.hits["/good.jpg"] == 1


def test_request_says_who_asks_and_no_more(server: Server) -> None:
    fetch_one(server.url("/good.jpg").replace("127", "someone:secret@127"), options(server))
    assert not {"Authorization", "Cookie", "Referer"} & server.headers.keys()
    assert server.headers["User-Agent"].startswith("mia/") and "respects opt-out" in server.headers["User-Agent"]
    assert (server.headers["Accept"], server.headers["Accept-Encoding"]) == ("*/*", "identity")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/grey.jpg", "jpeg"),
        ("/cmyk.jpg", "jpeg"),
        ("/palette.png", "png"),
        ("/animated.gif", "gif"),
        ("/gzip", "jpeg"),
    ],
)
def test_other_modes_and_encodings(server: Server, path: str, kind: str) -> None:
    row = fetch_one(server.url(path), options(server))
    assert (row["status"], row["format"], row["width"], row["height"]) == ("ok", kind, 48, 32)
    assert row["phash"] == int(str(imagehash.phash(pixels.decode(row["bytes"], MAX_PIXELS))), 16)


# ------------------------------------------------------------------------------------------------ what is not


@pytest.mark.parametrize(
    ("path", "status", "detail", "hits"),
    [
        ("/404", "http_4xx", "404", 1),
        ("/410", "http_4xx", "410", 1),
        ("/999", "http_4xx", "999", 1),
        ("/429", "http_4xx", "429", 3),
        ("/500", "http_5xx", "500", 3),
        ("/503", "http_5xx", "503", 3),
        ("/204", "not_an_image", "empty", 1),
        ("/no-location", "not_an_image", "301", 1),
        ("/html.jpg", "not_an_image", "format", 1),
        ("/empty.jpg", "not_an_image", "empty", 1),
        ("/truncated.jpg", "undecodable", "truncated", 1),
        ("/stump.jpg", "undecodable", "", 1),
        ("/bomb.png", "too_many_pixels", "60000 x 60000", 1),
        ("/middling-bomb.png", "too_many_pixels", "10000 x 10000", 1),
        ("/large.jpg", "too_large", str(MAX_BYTES), 1),
        ("/gzip-bomb", "too_large", str(MAX_BYTES), 1),
        ("/endless", "too_large", str(MAX_BYTES), 1),
        ("/loop", "too_many_redirects", "5", 6),
    ],
)
def test_each_failure_has_its_status(server: Server, path: str, status: str, detail: str, hits: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = fetch_one(server.url(path), options(server))
    assert row["status"] == status and detail in row["detail"]
    assert server.hits[path] == hits


def test_oversized_stream_is_cut_off(server: Server) -> None:
    fetch_one(server.url("/endless"), options(server))
    assert server.chunks_sent < 1000


@pytest.mark.parametrize("path", ["/slow", "/trickle"])
def test_timeout_is_total_and_retried(server: Server, path: str) -> None:
    started = time.monotonic()
    assert fetch_one(server.url(path), options(server), timeout_s=0.2)["status"] == "timeout"
    assert server.hits[path] == 3 and time.monotonic() - started < 3


def test_waiting_for_a_turn_is_no_timeout(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images at a time from a host that needs 0.2 s each; the last waits 0.8 s, its time-out is 0.5 s."""

    async def nap(request: web.Request) -> web.Response:
        await asyncio.sleep(0.2)
        return web.Response(body=JPEG)

    monkeypatch.setattr(server, "_slow", nap)
    table = images.fetch(metadata([server.url("/slow")] * 10), options(server), timeout_s=0.5, per_host=2)
    assert set(table["status"].to_pylist()) == {"ok"} and server.hits["/slow"] == 10


def test_transient_failure_recovers(server: Server) -> None:
    assert fetch_one(server.url("/recovers"), options(server))["status"] == "ok"
    assert server.hits["/recovers"] == 3


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    row = fetch_one(f"http://127.0.0.1:{port}/", options(allow_private_hosts=("127.0.0.1",)))
    assert (row["status"], row["detail"]) == ("connection", "could not connect")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + JPEG[:100],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"220 mail.example ESMTP\x07\r\n",
    ],
)
def test_broken_answers(answer: bytes) -> None:
    with raw_server(answer) as port:
        row = fetch_one(f"http://127.0.0.1:{port}/", options(allow_private_hosts=("127.0.0.1",)))
    assert (row["status"], row["detail"]) == ("connection", "answer cut short or malformed")


def test_plain_server_behind_https(server: Server) -> None:
    row = fetch_one(f"https://127.0.0.1:{server.port}/good.jpg", options(server))
    assert (row["status"], row["detail"]) == ("connection", "no trusted TLS connection")


def test_unknown_host_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def resolve(self: object, host: str, port: int = 0, family: int = 0) -> list:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or\x1b[31m service\nnot known")

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", resolve)
    row = fetch_one("http://no-such-host.example/a.jpg", options())
    assert (row["status"], asked) == ("dns", ["no-such-host.example"] * 3)
    assert row["detail"] == "Name or [31m service not known"


@pytest.mark.parametrize("host", ["a..b.example", "x" * 64 + ".example"])
def test_impossible_host_name(host: str) -> None:
    assert fetch_one(f"http://{host}/", options())["status"] == "dns"


@pytest.mark.parametrize(
    "url",
    ["", "no-scheme", "ftp://example.org/a.jpg", "data:image/png;base64,AAAA", "gopher://example.org/", "http:///a.jpg",
     "http://[::1", "http://[]@", "http://a b/", "http://a\x00b/", "http://a\r\nX: y/", "http://example.org:99999/",
     "javascript:\x1b[0malert(1)", "file:a.jpg", "FILE:///etc/passwd"],
)  # fmt: skip
def test_other_schemes_and_malformed_urls_are_refused(url: str) -> None:
    assert fetch_one(url, options())["status"] == "refused"


@pytest.mark.parametrize("tag", ["noai", "NoAI, nofollow", "noimageai", "noindex", "all, noimageindex", "mia: noai",
                                 "unavailable_after: 1 Jan 2030, noai", "noai, max-snippet: 3"])  # fmt: skip
def test_opt_out_is_respected(server: Server, tag: str) -> None:
    assert fetch_one(server.url(f"/robots?tag={tag}"), options(server))["status"] == "opted_out"


@pytest.mark.parametrize("tag", ["nofollow", "otherbot: noai, noindex", "all", "max-image-preview: large"])
def test_other_directives_are_no_opt_out(server: Server, tag: str) -> None:
    assert fetch_one(server.url(f"/robots?tag={tag}"), options(server))["status"] == "ok"


@pytest.mark.parametrize(("value", "status"), [("1", "opted_out"), ("0", "ok"), ("", "ok")])
def test_rights_reserved_for_text_and_data_mining(server: Server, value: str, status: str) -> None:
    assert fetch_one(server.url(f"/tdm?value={value}"), options(server))["status"] == status


# ------------------------------------------------------------------------------------------------ manners, deadline


def test_so_many_requests_at_once_at_one_host(server: Server) -> None:
    server.nap_s = 0.05
    images.fetch(metadata([server.url("/nap")] * 12), options(server), concurrency=12, per_host=3)
    assert server.hits["/nap"] == 12 and server.busiest == 3


def test_requests_to_one_host_start_apart(server: Server) -> None:
    server.nap_s = 0.0
    images.fetch(metadata([server.url("/nap")] * 4), options(server), host_delay_s=0.15)
    gaps = np.diff(sorted(server.starts))
    assert len(gaps) == 3 and gaps.min() > 0.1


def test_a_host_that_asks_for_a_rest_gets_it(server: Server) -> None:
    server.retry_after = "1"
    table = images.fetch(metadata([server.url("/busy")] * 3), options(server), per_host=1)
    assert table["status"].to_pylist() == ["ok"] * 3 and server.hits["/busy"] == 4
    assert server.starts[1] - server.starts[0] > 0.9


def test_a_host_that_asks_for_a_long_rest_is_left_alone(server: Server) -> None:
    """The others in the queue are told without asking it again; a later run asks again."""
    server.retry_after = "3600"
    urls = [server.url("/busy")] * 3 + [server.url("/good.jpg", "localhost")]
    chosen = options(server, allow_private_hosts=("127.0.0.1", "localhost"))
    table = images.fetch(metadata(urls), chosen, per_host=1)
    assert table["status"].to_pylist() == ["http_4xx"] * 3 + ["ok"] and server.hits["/busy"] == 1
    assert not any(fetching.is_final(row["status"], row["detail"]) for row in table.to_pylist()[:3])


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("", 0), ("0", 0), ("120", 120), ("-5", 0), ("soon", 0), ("1e9", 0), ("\u00b2", 0), ("9" * 99, 0),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 21 Oct 2015 07:28:00 -0000", 0)],
)  # fmt: skip
def test_reading_retry_after(header: str, seconds: float) -> None:
    assert fetching._rest_s(header) == seconds


def test_reading_retry_after_as_a_date() -> None:
    ahead = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5))
    assert 290 < fetching._rest_s(ahead) <= 300


def test_deadline_of_the_shard(server: Server) -> None:
    urls = [server.url("/good.jpg"), server.url("/slow"), server.url("/slow"), server.url("/404")]
    started = time.monotonic()
    rows = images.fetch(metadata(urls), options(server), concurrency=1, deadline_s=0.7).to_pylist()
    assert time.monotonic() - started < 3
    assert [row["status"] for row in rows] == ["ok", "timeout", "timeout", "timeout"]
    assert {row["detail"] for row in rows[1:]} == {"not finished before the deadline of the shard"}
    assert server.hits["/404"] == 0


def test_no_host_in_reach_is_an_error_of_ours(server: Server) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = [f"http://127.0.0.1:{unused.getsockname()[1]}/{i}.jpg" for i in range(10)]
        chosen = options(allow_private_hosts=("127.0.0.1",))
        with pytest.raises(UserError, match=r"none of 10 images .*connection.*network is down"):
            images.fetch(metadata(dead), chosen)
        assert set(images.fetch(metadata(dead[:9]), chosen)["status"].to_pylist()) == {"connection"}
        table = images.fetch(metadata([*dead, server.url("/404")]), chosen)
        assert table["status"].to_pylist() == ["connection"] * 10 + ["http_4xx"]


def test_rows_that_no_host_was_asked_for_do_not_speak_against_the_network(server: Server) -> None:
    """A deadline that ends all, and names that cannot be, are not the network's fault; a tenth timeout in full is."""
    slow = metadata([server.url("/slow")] * 20)
    rows = images.fetch(slow, options(server), concurrency=2, deadline_s=0.2).to_pylist()
    assert {row["detail"] for row in rows} == {"not finished before the deadline of the shard"}
    assert set(images.fetch(metadata(["http://a..b.example/"] * 20), options())["status"].to_pylist()) == {"dns"}
    with pytest.raises(UserError, match=r"none of \d\d images .*timeout.*network is down"):
        images.fetch(slow, options(server), concurrency=5, per_host=5, timeout_s=0.05, deadline_s=0.65)


def test_all_links_dead_is_said(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "mia.images"):
        images.fetch(metadata([server.url("/404")] * 12), options(server))
    assert "12 images: 12 http_4xx" in caplog.text and "not one image is left" in caplog.text


# ------------------------------------------------------------------------------------------------ redirects, addresses


def test_redirect_chain_up_to_the_limit(server: Server) -> None:
    row = fetch_one(server.url("/hop/4"), options(server))
    assert (row["status"], row["bytes"]) == ("ok", JPEG)
    assert fetch_one(server.url("/hop/5"), options(server))["status"] == "too_many_redirects"
    assert fetch_one(server.url("/hop/0"), options(server, max_redirects=0))["status"] == "too_many_redirects"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "2130706433", "0x7f000001", "127.1"])
def test_redirect_inside_never_reaches_the_server(server: Server, neighbour: Server, host: str) -> None:
    server.redirect_to = neighbour.url("/good.jpg", host)
    row = fetch_one(server.url("/to"), options(server))
    assert (row["status"], server.hits["/to"], neighbour.hits.total()) == ("blocked_address", 1, 0)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://example.org/a.jpg", "data:image/png,abc", "http://[x"])
def test_redirect_to_another_scheme_is_refused(server: Server, target: str) -> None:
    server.redirect_to = target
    assert fetch_one(server.url("/to"), options(server, allow_local_files=True))["status"] == "refused"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "LOCALHOST", "127.0.0.1.", "2130706433", "017700000001", "0x7f000001",
     "0x7f.0.0.1", "0177.0.0.1", "127.1", "0", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::127.0.0.1]",
     "[fe80::1%25lo]", "①②⑦.0.0.1", "user:secret@127.0.0.1"],
)  # fmt: skip
def test_this_machine_is_blocked_in_every_spelling(server: Server, host: str) -> None:
    assert fetch_one(server.url("/good.jpg", host), options())["status"] == "blocked_address"
    assert not server.hits


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", "172.16.0.1", "192.168.1.1", "127.255.0.1", "169.254.169.254", "100.100.100.200", "192.0.0.192",
     "168.63.129.16", "224.0.1.1", "240.0.0.1", "255.255.255.255", "0.0.0.0", "198.18.0.1", "fc00::1", "fd00:ec2::254",
     "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "::1", "::", "::ffff:10.0.0.1", "64:ff9b::10.0.0.1",
     "2002:7f00:1::", "2001:db8::1", "1.2.3", "01.2.3.4", "example.org"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not fetching._is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_addresses_that_are_public(address: str) -> None:
    assert fetching._is_public(address)


def test_a_name_with_one_private_address_is_blocked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(self: object, host: str, port: int = 0, family: int = 0) -> list:
        common = {"hostname": host, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
        return [{**common, "host": "8.8.8.8"}, {**common, "host": "127.0.0.1"}]

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", resolve)
    assert fetch_one(server.url("/good.jpg", "rebind.example"), options(server))["status"] == "blocked_address"
    assert not server.hits


def test_a_name_that_changes_its_mind_is_asked_once(
    server: Server, neighbour: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address that was checked is the one connected to; a second answer, which leads elsewhere, is never sought."""
    answers = ["127.0.0.1", "127.0.0.2"]

    async def resolve(self: object, host: str, port: int = 0, family: int = 0) -> list:
        common = {"hostname": host, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
        return [{**common, "host": answers.pop(0)}]

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", resolve)
    monkeypatch.setattr(fetching, "_is_public", lambda address: address == "127.0.0.1")
    table = images.fetch(metadata([server.url("/good.jpg", "rebind.example")] * 3), options(), concurrency=1)
    assert table["status"].to_pylist() == ["ok"] * 3 and answers == ["127.0.0.2"]


@pytest.mark.parametrize("entry", ["localhost", "localhost:{port}", "LocalHost"])
def test_allowed_names(server: Server, entry: str) -> None:
    chosen = options(allow_private_hosts=(entry.format(port=server.port),))
    assert fetch_one(server.url("/good.jpg", "localhost"), chosen)["status"] == "ok"
    assert fetch_one(server.url("/good.jpg", "127.0.0.1"), chosen)["status"] == "blocked_address"


def test_an_allowed_port_allows_no_other(server: Server, neighbour: Server) -> None:
    assert fetch_one(neighbour.url("/good.jpg"), options(server))["status"] == "blocked_address"


# ------------------------------------------------------------------------------------------------ local files


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a b.jpg").write_bytes(JPEG)
    (tmp_path / "large.jpg").write_bytes(JPEG + bytes(MAX_BYTES))
    (tmp_path / "empty.jpg").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("file:sub/a%20b.jpg", "ok"),
        ("file:sub/a b.jpg", "ok"),
        ("file://{root}/sub/a%20b.jpg", "ok"),
        ("file:{root}/sub/a%20b.jpg", "ok"),
        ("file://localhost{root}/sub/a%20b.jpg", "ok"),
        ("file:missing.jpg", "not_found"),
        ("file:sub", "not_found"),
        ("file:sub/a%00b.jpg", "not_found"),
        ("file:large.jpg/x", "not_found"),
        ("file:" + "x" * 300, "not_found"),
        ("file:///dev/zero", "not_found"),
        ("file:large.jpg", "too_large"),
        ("file:empty.jpg", "not_an_image"),
        ("file://elsewhere/sub/a.jpg", "refused"),
        ("file://[x", "refused"),
    ],
)
def test_local_files(folder: pathlib.Path, url: str, status: str) -> None:
    url = url.format(root=folder)
    row = fetch_one(url, options(allow_local_files=True), root=folder)
    assert row["status"] == status and (status != "ok" or row["bytes"] == JPEG)
    assert fetch_one(url, options(), root=folder)["status"] == "refused"


# ------------------------------------------------------------------------------------------------ the table


def test_same_table_for_any_concurrency_and_order(server: Server, folder: pathlib.Path) -> None:
    paths = [
        "/good.jpg",
        "/404",
        "/palette.png",
        "/html.jpg",
        "/hop/2",
        "/loop",
        "/large.jpg",
        "/truncated.jpg",
        "/500",
    ]
    urls = [server.url(path) for path in paths] * 8 + ["file:sub/a b.jpg", "file:none", "http://localhost/", "nothing"]
    chosen = options(server, allow_local_files=True)
    alone, together = (images.fetch(metadata(urls), chosen, concurrency=n, root=folder) for n in (1, 64))
    assert alone.schema.equals(tables.SCHEMAS["images"]) and alone.num_rows == len(urls)
    assert alone["sample_id"].to_pylist() == metadata(urls)["sample_id"].to_pylist()
    assert alone.equals(together)
    backwards = images.fetch(metadata(urls).take(list(range(len(urls)))[::-1]), chosen, root=folder)
    assert tables.check(backwards, "images").equals(tables.check(alone, "images"))
    assert set(alone["status"].to_pylist()) <= set(tables.IMAGE_STATUSES)


def test_many_chunks_and_no_rows(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "GROUP_ROWS", 2)
    table = images.fetch(metadata([server.url("/good.jpg")] * 5), options(server))
    assert table["bytes"].num_chunks == 3 and table["bytes"].to_pylist() == [JPEG] * 5
    nothing = images.fetch(metadata(["x"]).slice(0, 0), options())
    assert nothing.num_rows == 0 and nothing.schema.equals(tables.SCHEMAS["images"])


def streamed(urls: list[str], chosen: ImagesOptions, **more: Any) -> pa.Table:
    batches = images.stream(metadata(urls), chosen, images.Pace(), **more)
    return pa.Table.from_batches(batches, schema=tables.SCHEMAS["images"])


@pytest.mark.parametrize(
    ("status", "detail", "final"),
    [("ok", "", True), ("http_4xx", "HTTP 404", True), ("http_4xx", "HTTP 429", False), ("http_5xx", "HTTP 503", False),
     ("dns", "x", False), ("timeout", "x", False), ("connection", "x", False), ("too_large", "x", True),
     ("blocked_address", "x", True), ("opted_out", "x", True), ("undecodable", "x", True),
     ("dns", "malformed host name", True), ("connection", "no trusted TLS connection", True),
     ("dns", "Name or service not known", False), ("connection", "could not connect", False)],
)  # fmt: skip
def test_what_another_run_would_change(status: str, detail: str, final: bool) -> None:
    assert fetching.is_final(status, detail) == final


def test_a_second_run_asks_only_for_what_may_have_changed(server: Server) -> None:
    urls = [server.url(path) for path in ("/good.jpg", "/404", "/recovers", "/html.jpg", "/nap", "/large.jpg")]
    chosen = options(server)
    server.nap_s = 5.0
    server.hits["/recovers"] = -10
    pace = images.Pace(timeout_s=0.2)
    first = list(images.stream(metadata(urls), chosen, pace))
    assert first[0]["status"].to_pylist() == ["ok", "http_4xx", "http_5xx", "not_an_image", "timeout", "too_large"]
    server.hits.clear()
    server.hits["/recovers"] = 2
    server.nap_s = 0.0
    stranger = pa.RecordBatch.from_pylist([{**first[0].to_pylist()[0], "sample_id": "f" * 32}], first[0].schema)
    second = streamed(urls, chosen, previous=[stranger, *first])
    assert server.hits == {"/recovers": 3, "/nap": 1}
    server.hits["/recovers"] = 2
    assert second.equals(streamed(urls, chosen))
    assert streamed(urls, chosen, previous=second.to_batches()).equals(second)


def test_a_second_run_leaves_alone_what_lasts_whatever_its_status(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No TLS where it should be, and a name that cannot be, were given up at once: a later run gives them up too."""
    secure = server.url("/good.jpg").replace("http:", "https:")
    urls, chosen = [secure, "http://a..b.example/", server.url("/500")], options(server)
    first = list(images.stream(metadata(urls), chosen, images.Pace()))
    assert first[0]["status"].to_pylist() == ["connection", "dns", "http_5xx"]
    asked = []
    fetch_row = fetching._Fetcher.row

    async def noted(self: fetching._Fetcher, url: str) -> fetching.Row:
        asked.append(url)
        return await fetch_row(self, url)

    monkeypatch.setattr(fetching._Fetcher, "row", noted)
    assert streamed(urls, chosen, previous=first).to_batches() == first
    assert asked == [server.url("/500")]


def test_earlier_rows_speak_for_the_network(server: Server) -> None:
    """On a second run all that is asked for may be dead hosts, which is no reason to suspect the network."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        urls = [f"http://127.0.0.1:{unused.getsockname()[1]}/{i}.jpg" for i in range(10)] + [server.url("/good.jpg")]
        chosen = options(allow_private_hosts=("127.0.0.1",))
        first = list(images.stream(metadata(urls), chosen, images.Pace()))
        server.hits.clear()
        assert streamed(urls, chosen, previous=first)["status"].to_pylist() == ["connection"] * 10 + ["ok"]
        assert not server.hits


def test_a_spool_on_disk_changes_nothing(
    server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [server.url(path) for path in ("/good.jpg", "/grey.jpg", "/404", "/cmyk.jpg", "/palette.png")] * 5
    monkeypatch.setattr(images, "GROUP_BYTES", 3 * len(JPEG))
    with (tmp_path / "spool").open("w+b", buffering=0) as file:
        on_disk = list(images.stream(metadata(urls), options(server), images.Pace(concurrency=3), spool=file))
        assert file.tell() > 10 * len(JPEG)
    in_memory = list(images.stream(metadata(urls), options(server), images.Pace()))
    assert len(on_disk) > 2 and all(a.equals(b) for a, b in zip(on_disk, in_memory, strict=True))


def test_a_full_disk_ends_in_one_line(server: Server) -> None:
    urls = [server.url("/good.jpg"), server.url("/slow")]
    with (
        pathlib.Path("/dev/full").open("r+b", buffering=0) as full,
        pytest.raises(UserError, match=r"cannot be kept on disk, No space left on device, free space"),
    ):
        streamed(urls, options(server), spool=full)


def test_memory_does_not_grow_with_the_images(
    server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 images of 150 KB, 30 MB in all."""

    async def padded(request: web.Request) -> web.Response:
        return web.Response(body=JPEG.ljust(150_000, b"\0"))

    monkeypatch.setattr(server, "_slow", padded)
    monkeypatch.setattr(images, "GROUP_BYTES", 1_000_000)
    rows = metadata([server.url("/slow")] * 200)
    tracemalloc.start()
    with (tmp_path / "spool").open("w+b", buffering=0) as file:
        for batch in images.stream(rows, options(server), images.Pace(concurrency=4), spool=file):
            assert set(batch["status"].to_pylist()) == {"ok"}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.fixture
def command(server: Server, tmp_path: pathlib.Path) -> Callable[[str], list[str]]:
    """The command line that fetches good images and one from /slow."""
    urls = [server.url(path) for path in ["/good.jpg"] * 5 + ["/404", "/slow"]]
    plain = {"caption": "a", "source": "s", "pool": "member"}
    rows = [{"sample_id": tables.sample_id(url, str(i)), "url": url, **plain} for i, url in enumerate(urls)]
    table = pa.Table.from_pylist(rows, schema=tables.SCHEMAS["metadata"])
    tables.write(tmp_path / "metadata.parquet", table, "metadata", {})

    def line(output: str) -> list[str]:
        flags = {"--metadata": tmp_path / "metadata.parquet", "--output": tmp_path / "out" / output,
                 "--allow-private-hosts": f"127.0.0.1:{server.port}"}  # fmt: skip
        return [sys.executable, "-m", "mia", "images", *(str(word) for pair in flags.items() for word in pair)]

    return line


def test_killed_in_the_middle_of_a_shard(
    server: Server, command: Callable[[str], list[str]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stands where the shard should be, and the next run writes what an undisturbed one does."""

    async def quick(request: web.Request) -> web.Response:
        return web.Response(body=JPEG)

    with subprocess.Popen(command("a.parquet"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not server.hits["/slow"] and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not list(tmp_path.glob("out/*.parquet"))
    monkeypatch.setattr(server, "_slow", quick)
    for name in ("a.parquet", "b.parquet"):
        subprocess.run(command(name), check=True, capture_output=True)
    assert (tmp_path / "out" / "a.parquet").read_bytes() == (tmp_path / "out" / "b.parquet").read_bytes()
    assert tables.read(tmp_path / "out" / "a.parquet", "images")["status"].to_pylist().count("ok") == 6


def test_resumed_on_the_command_line(
    server: Server, command: Callable[[str], list[str]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = subprocess.run([*command("a.parquet"), "--timeout-s", "0.2"], capture_output=True, text=True)
    assert first.returncode == 0 and "1 timeout" in first.stderr
    server.hits.clear()
    server.nap_s = 0.0
    monkeypatch.setattr(server, "_slow", server._nap)
    again = [*command("b.parquet"), "--previous", str(tmp_path / "out" / "a.parquet")]
    subprocess.run(again, check=True, capture_output=True)
    assert server.hits == {"/slow": 1}
    assert tables.read(tmp_path / "out" / "b.parquet", "images")["status"].to_pylist().count("ok") == 6
    refused = subprocess.run([*again, "--max-bytes", "999"], capture_output=True, text=True)
    assert refused.returncode == 2 and "fetched under other options" in refused.stderr.splitlines()[-1]


def test_earlier_images_of_another_version_or_other_options_are_refused(
    server: Server, command: Callable[[str], list[str]], tmp_path: pathlib.Path
) -> None:
    """Rows that another version of the stage called final may not be so in this one."""
    subprocess.run([*command("a.parquet"), "--timeout-s", "0.2"], check=True, capture_output=True)
    first = tmp_path / "out" / "a.parquet"
    table, made = tables.read(first, "images"), tables.provenance(first)
    for change in ({"version": made["version"] + 1}, {"version": None}, {"config_hash": "0" * 16}):
        tables.write(first, table, "images", made | change)
        again = [*command("b.parquet"), "--previous", str(first)]
        server.hits.clear()
        done = subprocess.run(again, capture_output=True, text=True)
        line = "error: earlier images were fetched under other options or by another version, "
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(line)
        assert not server.hits and not (tmp_path / "out" / "b.parquet").exists()
    tables.write(first, table, "images", made)
    subprocess.run([*again, "--timeout-s", "0.2"], check=True, capture_output=True)
    assert set(server.hits) == {"/slow"}


def test_full_disk_on_the_command_line(command: Callable[[str], list[str]], tmp_path: pathlib.Path) -> None:
    """No file of the process may grow beyond 1,000 bytes."""
    program = (
        "import resource, runpy, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "runpy.run_module('mia', run_name='__main__')"
    )
    line = [sys.executable, "-c", program, *command("a.parquet")[3:], "--timeout-s", "1"]
    done = subprocess.run(line, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and "disk" in last and "start again" in last
    assert not list((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------------------------ the probe


def test_probe_rows_stand_for_every_pool() -> None:
    ids = [f"{i:032x}" for i in range(100)]
    pools = ["member"] * 60 + ["candidate"] * 37 + ["control"] * 3
    table = pa.table({"sample_id": ids, "pool": pools}).take(np.random.default_rng(0).permutation(100))
    chosen = images.probe_rows(table, 20)
    counts = collections.Counter(chosen["pool"].to_pylist())
    assert counts["control"] == 3 and sorted((counts["candidate"], counts["member"])) == [8, 9]
    expected = {*ids[: counts["member"]], *ids[60 : 60 + counts["candidate"]], *ids[97:]}
    assert set(chosen["sample_id"].to_pylist()) == expected
    assert images.probe_rows(table.slice(0, 5), 20).num_rows == 5


# ------------------------------------------------------------------------------------------------ what is a bug


def test_a_bug_is_not_a_status(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(fetching.pixels, "decode", broken)
    with pytest.raises(ZeroDivisionError):
        images.fetch(metadata([server.url("/good.jpg"), server.url("/slow")]), options(server))


def test_running_out_of_file_descriptors_stops_the_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_more(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("aiohttp.connector.aiohappyeyeballs.start_connection", no_more)
    with pytest.raises(UserError, match="ulimit"):
        images.fetch(metadata([server.url("/good.jpg")]), options(server))


# ------------------------------------------------------------------------------------------------ pixels


def test_transparency_becomes_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 0, 0, 255), (200, 0, 0, 0), (0, 0, 0, 128)])
    decoded = pixels.decode(encoded(image), MAX_PIXELS)
    assert (decoded.mode, decoded.format) == ("RGB", "PNG")
    assert np.asarray(decoded).tolist() == [[[200, 0, 0], [255, 255, 255], [127, 127, 127]]]


def test_palette_transparency_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    decoded = pixels.decode(encoded(image, transparency=1), MAX_PIXELS)
    assert np.asarray(decoded).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_sixteen_bit_grey_keeps_the_high_byte() -> None:
    image = Image.fromarray(np.array([[0, 255, 0x1234, 0xFFFF]], dtype=np.uint16))
    decoded = pixels.decode(encoded(image), MAX_PIXELS)
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 0, 0x12, 255]


def test_orientation_stays_and_the_first_frame_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels.decode(encoded(picture(), "JPEG", exif=exif), MAX_PIXELS).size == (48, 32)
    gif = encoded(
        Image.new("RGB", (4, 4), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")]
    )
    assert pixels.decode(gif, MAX_PIXELS).getpixel((0, 0)) == (255, 0, 0)


def test_cmyk_is_close_to_its_source() -> None:
    decoded = pixels.decode(encoded(picture("CMYK"), "JPEG", quality=95), MAX_PIXELS)
    assert np.abs(np.asarray(decoded, dtype=int) - np.asarray(picture(), dtype=int)).mean() < 5


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_every_format_and_every_way_to_break_it_off(kind: str) -> None:
    data = encoded(picture(), kind)
    assert pixels.decode(data, 48 * 32).format == kind
    with pytest.raises(pixels.ImageError, match="too_many_pixels"):
        pixels.decode(data, 48 * 32 - 1)
    for length in range(0, len(data) * 3 // 4, max(1, len(data) // 50)):
        with pytest.raises(pixels.ImageError) as caught:
            pixels.decode(data[:length], MAX_PIXELS)
        assert caught.value.status == "undecodable" or length < 16


@pytest.mark.parametrize(
    "data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"P6 1 1 255\n\0\0\0", b"<svg/>"]
)
def test_no_reader_beyond_those_of_the_web(data: bytes) -> None:
    with pytest.raises(pixels.ImageError, match="not_an_image"):
        pixels.decode(data, MAX_PIXELS)


def test_detail_is_one_short_plain_line() -> None:
    error = pixels.ImageError("undecodable", "a\x00b\r\n\tc\x1b[31m\u202e d" + "x" * 999)
    assert error.detail.startswith("a b c [31m d") and error.detail.isprintable() and len(error.detail) == 200


def test_centre_square_by_hand() -> None:
    """Side 2 of a 4 x 2 image: no scaling, columns 1 and 2."""
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    square = pixels.centre_square(image, 2)
    assert square.dtype == np.uint8 and square.flags.writeable
    assert square.tolist() == np.arange(24).reshape(2, 4, 3)[:, 1:3].tolist()
    # Halved with the weights 1, 3, 3, 1 over 8, at the left end 3, 3, 1 over 7: 3/7, 4/8, 4/8 and 4/7 of 140.
    stripes = Image.fromarray(np.tile(np.array([0, 140], np.uint8), (8, 4))[..., None].repeat(3, 2))
    assert pixels.centre_square(stripes, 4)[0, :, 0].tolist() == [60, 70, 70, 80]


@pytest.mark.parametrize("size", [(48, 32), (33, 97), (64, 64), (5, 7), (500, 40), (40, 501), (31, 30)])
@pytest.mark.parametrize("side", [32, 37])
def test_centre_square_is_torchvision(size: tuple[int, int], side: int) -> None:
    ensure_torchvision()
    from torchvision import transforms

    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    bilinear = transforms.InterpolationMode.BILINEAR
    oracle = transforms.Compose([transforms.Resize(side, bilinear, antialias=True), transforms.CenterCrop(side)])
    np.testing.assert_array_equal(pixels.centre_square(image, side), np.asarray(oracle(image)))


def test_centre_square_of_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 31, 3), dtype=np.uint8)
    for image in (Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2))):
        cut = pixels.centre_square(image, 32)
        with monkeypatch.context() as patch:
            patch.setattr(pixels, "_LONGEST_STRIP", 1000)
            whole = pixels.centre_square(image, 32)
        assert np.abs(cut.astype(int) - whole).max() <= 1
    assert pixels.centre_square(Image.new("RGB", (1, 900_000), "red"), 64).tolist() == [[[255, 0, 0]] * 64] * 64
