"""Fetch one image after another from the web, politely and safely: what was received, or why nothing was.

URLs come from strangers. An address inside the machine or its network is refused after name resolution and at every
redirect, sizes are capped before memory is spent, and only Pillow's readers for web formats ever see the bytes.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import email.utils
import errno
import hashlib
import ipaddress
import logging
import math
import pathlib
import re
import socket
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import aiohttp
import imagehash
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult

from mia import __version__, pixels
from mia.config import ImagesOptions
from mia.errors import UserError
from mia.pixels import ImageError

logger = logging.getLogger(__name__)

USER_AGENT = f"mia/{__version__} (+research; respects opt-out)"
ROBOT = "mia"  # the name by which an X-Robots-Tag can address us alone
OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex"})  # Source: img2dataset, its default directives
ATTEMPTS = 3
BACKOFF_S = 0.25  # before the second attempt, doubled before each later one; no jitter, so that runs are alike
LONGEST_REST_S = 60.0  # a host that asks (Retry-After) for a longer rest is left alone until the next run
DECODERS = 4  # threads; each may hold one image of `max_pixels` several times over
DNS_CACHE_S = 300
KEEP_ALIVE_S = 2.0  # idle connections to thousands of hosts would use up the file descriptors
MAX_HEADER_BYTES = 65_536  # aiohttp's 8 KiB is less than some security-policy headers
REDIRECTS = frozenset({301, 302, 303, 307, 308})

TRANSIENT = frozenset({"timeout", "connection", "dns", "http_5xx"})
_PASSING = frozenset({408, 425, 429})  # too slow, too early, too many: of the 4xx, those that invite another attempt
MALFORMED_HOST, UNTRUSTED = "malformed host name", "no trusted TLS connection"
_LASTING = frozenset({MALFORMED_HOST, UNTRUSTED})  # details that last, though others of their status may pass

_HOST = re.compile(r"[a-zA-Z0-9._:%-]+")  # as yarl leaves it: lower case, international names encoded
# What the library takes for public: Oracle's metadata service and its kin in the IETF protocol block, Azure's host
# agent, and the old site-local addresses.
_CLOSED_NETWORKS = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "168.63.129.16/32", "fec0::/10")))
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # an IPv4 address in the last 32 bits
# X-Robots-Tag directives that are followed by a colon themselves; any other word before a colon names a robot.
_VALUED_DIRECTIVES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
# A file that cannot be there or is not ours to read. Any other failure is the disk's and must stop the run.
_NO_SUCH_FILE = frozenset({errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})

_T = TypeVar("_T")
Row = Mapping[str, Any]  # the columns of an image but for its id


class _TransientError(ImageError):
    """A cause that may pass: another attempt is worth its while, after the rest in seconds that the host asked for."""

    def __init__(self, status: str, detail: str, rest_s: float = 0.0) -> None:
        super().__init__(status, detail)
        self.rest_s = rest_s


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast and how long to ask. Changes no row of a server that answers in time.

    `concurrency`: images in flight at once, all hosts together. `per_host`: of them, at one host; requests there start
    at least `host_delay_s` apart. `timeout_s`: for one attempt at one URL, with name lookup and redirects, without the
    wait for a turn at its host. `deadline_s`: for all rows; those unfinished by then are `timeout`.
    """

    concurrency: int = 32
    timeout_s: float = 30.0
    deadline_s: float = math.inf
    per_host: int = 8
    host_delay_s: float = 0.0


def is_final(status: str, detail: str) -> bool:
    """Whether a later run would find the same, as far as anyone can tell: only other causes are worth another try."""
    return detail in _LASTING or (status not in TRANSIENT and detail not in {f"HTTP {code}" for code in _PASSING})


async def fetch_all(
    todo: dict[int, str], keep: Callable[[int, Row], None], options: ImagesOptions, pace: Pace, root: pathlib.Path
) -> None:
    """Calls `keep` with the number and the columns of each image in `todo`, as they come, until the deadline.

    Raises:
        UserError: the machine ran out of file descriptors.
    """
    # Name lookups block a thread each and may take seconds: on threads of their own they never hold up decoding.
    lookups = concurrent.futures.ThreadPoolExecutor(pace.concurrency, "lookup")
    asyncio.get_running_loop().set_default_executor(lookups)
    queue = iter(todo.items())

    async def work(fetcher: _Fetcher) -> None:
        for index, url in queue:  # shared by all workers: each takes the next
            keep(index, await fetcher.row(url))

    with concurrent.futures.ThreadPoolExecutor(DECODERS, "decode") as decoders:
        guard = _GuardedResolver(options.allow_private_hosts)
        async with _session(guard, pace.concurrency) as session:
            fetcher = _Fetcher(options, pace, root, session, guard, decoders)
            try:
                async with _until(pace.deadline_s), asyncio.TaskGroup() as group:
                    for _ in range(min(pace.concurrency, len(todo))):
                        group.create_task(work(fetcher))
            except ExceptionGroup as several:
                raise several.exceptions[0] from None  # the first to fail stops the others


@contextlib.asynccontextmanager
async def _until(deadline_s: float) -> AsyncIterator[None]:
    """Stops the block at the deadline, without an error."""
    clock = asyncio.timeout(None if math.isinf(deadline_s) else deadline_s)
    try:
        async with clock:
            yield
    except TimeoutError:
        if not clock.expired():
            raise
        logger.warning("the deadline of %g s has passed; rows not finished can be fetched by another run", deadline_s)


def _session(guard: _GuardedResolver, concurrency: int) -> aiohttp.ClientSession:
    """A session that keeps no cookies and reads no environment, so that no row depends on another or on the machine.

    It uses no proxy, which would look up names itself, unchecked. It sends `Accept: */*`, as the crawlers behind the
    training sets did: a server that could choose might send another encoding of the picture.
    """
    connector = aiohttp.TCPConnector(
        limit=concurrency,  # `_Host` limits each host
        resolver=guard,
        ttl_dns_cache=DNS_CACHE_S,
        keepalive_timeout=KEEP_ALIVE_S,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None),  # `_Fetcher` keeps the time
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
    )


class _Host:
    """The turns at one host: so many at once, and a pause between the starts of two."""

    def __init__(self, pace: Pace) -> None:
        self.slots, self.delay_s, self.free_at = asyncio.Semaphore(pace.per_host), pace.host_delay_s, 0.0
        self.clock = asyncio.get_running_loop().time
        self.closed: _TransientError | None = None

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        async with self.slots:
            while (wait_s := self.free_at - self.clock()) > 0:  # others may have moved it meanwhile
                await asyncio.sleep(wait_s)
            if self.closed:
                raise _TransientError(self.closed.status, self.closed.detail, self.closed.rest_s)
            self.free_at = self.clock() + self.delay_s
            yield

    def rest(self, problem: _TransientError) -> None:
        """Gives the host the rest it asked for; when that is too long, no row of this run asks again."""
        if problem.rest_s > LONGEST_REST_S:
            self.closed = problem
        else:
            self.free_at = max(self.free_at, self.clock() + problem.rest_s)


class _Fetcher:
    """One run: the session, the threads that decode, and the turns at each host."""

    def __init__(
        self,
        options: ImagesOptions,
        pace: Pace,
        root: pathlib.Path,
        session: aiohttp.ClientSession,
        guard: _GuardedResolver,
        decoders: concurrent.futures.Executor,
    ) -> None:
        self.options, self.pace, self.root = options, pace, root
        self.session, self.guard, self.decoders = session, guard, decoders
        self.hosts: dict[str | None, _Host] = collections.defaultdict(lambda: _Host(pace))

    async def row(self, url: str) -> Row:
        """The columns of one image, or its status and detail."""
        url = url.strip()
        try:
            if url[:5].lower() == "file:":
                data = await self._in_thread(_read_local, url, self.root, self.options)
            else:
                data = await self._download(url)
            return await self._in_thread(_described, data, self.options.max_pixels)
        except ImageError as problem:
            return {"status": problem.status, "detail": problem.detail}

    async def _in_thread(self, function: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self.decoders, function, *args)

    async def _download(self, url: str) -> bytes:
        for attempt in range(1, ATTEMPTS):
            try:
                return await self._attempt(url)
            except _TransientError as problem:
                if problem.rest_s > LONGEST_REST_S:
                    raise
                await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
        return await self._attempt(url)

    async def _attempt(self, url: str) -> bytes:
        """The body at the end of the redirects."""
        target = _parsed(url)
        clock, left_s = asyncio.get_running_loop().time, self.pace.timeout_s
        for _ in range(self.options.max_redirects + 1):
            self._refuse_unless_http(target)
            host = self.hosts[target.raw_host]
            async with host.turn():  # the wait is no fault of the server's, so the clock stands
                started = clock()
                try:
                    answer = await self._get(target, left_s)
                except _TransientError as problem:
                    host.rest(problem)
                    raise
                left_s -= clock() - started
            if isinstance(answer, bytes):
                return answer
            target = _parsed(answer, target)
        raise ImageError("too_many_redirects", f"more than {self.options.max_redirects}")

    def _refuse_unless_http(self, target: yarl.URL) -> None:
        """Checked before every request, as is the address: by the resolver for a name, here for a number."""
        if target.scheme not in ("http", "https"):
            raise ImageError("refused", f"scheme '{target.scheme}' is not fetched")
        host = target.raw_host or ""
        if not _HOST.fullmatch(host):
            raise ImageError("refused", "URL without a well-formed host")
        if _is_numeric(host):
            self.guard.check(host, host, target.port)

    async def _get(self, target: yarl.URL, timeout_s: float) -> bytes | str:
        """The body behind one URL, or the text of its redirect."""
        with _causes_told_apart():
            async with asyncio.timeout(timeout_s), self.session.get(target, allow_redirects=False) as response:
                _check_status(response.status, response.headers.get("Retry-After", ""))
                _check_consent(response)
                if response.status not in REDIRECTS:
                    return await self._body(response)
                if "Location" not in response.headers:
                    raise ImageError("not_an_image", f"HTTP {response.status} without a location")
                return response.headers["Location"]

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        limit = self.options.max_bytes
        if (response.content_length or 0) > limit:
            raise ImageError("too_large", f"more than {limit} bytes")
        data = bytearray()
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > limit:
                raise ImageError("too_large", f"more than {limit} bytes")
        return bytes(data)


@contextlib.contextmanager
def _causes_told_apart() -> Iterator[None]:
    """Turns what aiohttp raises into an `ImageError`. All else is a bug and passes.

    The details are fixed texts: whether a hang-up shows as a reset, a short body or a malformed answer is chance.
    """
    try:
        yield
    except TimeoutError as problem:
        raise _TransientError("timeout", "no complete answer in time") from problem
    except aiohttp.InvalidURL as problem:
        raise ImageError("refused", "malformed URL") from problem
    except aiohttp.ClientSSLError as problem:
        raise ImageError("connection", UNTRUSTED) from problem
    except aiohttp.ClientConnectorError as problem:
        if problem.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError("too many open files", "", "lower the concurrency or raise `ulimit -n`") from problem
        raise _TransientError("connection", "could not connect") from problem
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, aiohttp.ClientResponseError) as problem:
        raise _TransientError("connection", "answer cut short or malformed") from problem


def _check_status(status: int, retry_after: str) -> None:
    if 500 <= status < 600:
        raise _TransientError("http_5xx", f"HTTP {status}", _rest_s(retry_after))
    if status in _PASSING:
        raise _TransientError("http_4xx", f"HTTP {status}", _rest_s(retry_after))
    if status >= 400:  # above 599 too: some sites turn robots away with 999
        raise ImageError("http_4xx", f"HTTP {status}")


def _rest_s(retry_after: str) -> float:
    """Seconds that the header asks for; 0 for none, or what is neither a number nor a date. Source: RFC 9110, 10.2.3"""
    if re.fullmatch(r"[0-9]{1,9}", retry_after):
        return float(retry_after)
    try:
        asked = email.utils.parsedate_to_datetime(retry_after)
        return max(0.0, (asked - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or a date without a zone
        return 0.0


def _check_consent(response: aiohttp.ClientResponse) -> None:
    """Whoever reserves an image, by X-Robots-Tag or by the TDM Reservation Protocol (W3C), keeps it."""
    if _opted_out(response.headers.getall("X-Robots-Tag", [])):
        raise ImageError("opted_out", "X-Robots-Tag")
    if response.headers.get("TDM-Reservation", "").strip() == "1":
        raise ImageError("opted_out", "TDM-Reservation")


def _opted_out(headers: list[str]) -> bool:
    """Whether an X-Robots-Tag, addressed to all or to us, forbids the use.

    Source: img2dataset, `is_disallowed`; unlike it, a directive with a value of its own does not hide the others.
    """
    for header in headers:
        robot = ""
        for part in header.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon and name.strip() not in _VALUED_DIRECTIVES:
                robot, part = name.strip(), rest
            if robot in ("", ROBOT) and part.strip() in OPT_OUT:
                return True
    return False


def _parsed(text: str, base: yarl.URL | None = None) -> yarl.URL:
    """The absolute URL, without the name and password it may hold: they are not ours to use."""
    try:
        url = yarl.URL(text)
        return (base.join(url) if base else url).with_user(None)
    except (ValueError, IndexError) as problem:  # yarl's parser trips over "http://[]@"
        raise ImageError("refused", "malformed URL") from problem


class _GuardedResolver(AbstractResolver):
    """The system's name lookup, refusing names that lead inside; aiohttp connects to the very addresses checked here.

    Raises:
        ImageError: `dns` or `blocked_address`. aiohttp passes it on untouched.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        self.allowed = frozenset(name.lower() for name in allowed)
        self.lookup = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        try:
            found = await self.lookup.resolve(host, port, family)
        except socket.gaierror as problem:
            raise _TransientError("dns", problem.strerror or "no such host") from problem
        except ValueError as problem:  # a label too long, empty, or with a null in it
            raise ImageError("dns", MALFORMED_HOST) from problem
        if not found:
            raise _TransientError("dns", "no usable address")
        for result in found:
            self.check(result["host"], host, port)
        return found

    def check(self, address: str, host: str, port: int | None) -> None:
        """Refuses `address`, which `host` stands for, unless it is public or the host is allowed."""
        name = f"[{host}]" if ":" in host else host
        if self.allowed.isdisjoint({host, name, f"{name}:{port}"}) and not _is_public(address):
            raise ImageError("blocked_address", f"{host} is not a public address")

    async def close(self) -> None:
        await self.lookup.close()


def _is_numeric(host: str) -> bool:
    """Whether a host is, or may be taken for, an IP address, for which aiohttp asks no resolver.

    Source: WHATWG URL standard, "ends in a number" checker. No top-level domain is a number.
    """
    last = host.rstrip(".").rpartition(".")[2]
    return ":" in host or last.isdigit() or last.startswith("0x")


def _is_public(address: str) -> bool:
    """Whether a numeric address lies on the open internet; one in a form only some parsers accept does not.

    An IPv6 address that carries an IPv4 address (mapped, 6to4, NAT64) is judged by that.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        ip = inner or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip)
    if any(ip in network for network in _CLOSED_NETWORKS):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _read_local(url: str, root: pathlib.Path, options: ImagesOptions) -> bytes:
    """The file a `file:` URL names; `root` is where a relative one starts."""
    if not options.allow_local_files:
        raise ImageError("refused", "local files are not allowed")
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as problem:
        raise ImageError("refused", "malformed URL") from problem
    if parts.netloc not in ("", "localhost"):
        raise ImageError("refused", "file on another host")
    path = root / urllib.parse.unquote(parts.path)
    try:
        if not path.is_file():  # a device or a pipe might never end
            raise ImageError("not_found", "no such file")
        with path.open("rb") as file:
            data = file.read(options.max_bytes + 1)
    except OSError as problem:
        if problem.errno not in _NO_SUCH_FILE:
            raise
        raise ImageError("not_found", problem.strerror or "") from problem
    if len(data) > options.max_bytes:
        raise ImageError("too_large", f"more than {options.max_bytes} bytes")
    return data


def _described(data: bytes, max_pixels: int) -> Row:
    image = pixels.decode(data, max_pixels)
    return {
        "status": "ok",
        "detail": "",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": data,
        "width": image.width,
        "height": image.height,
        "format": (image.format or "").lower(),
        "phash": int(str(imagehash.phash(image)), 16),
    }
