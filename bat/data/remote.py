"""Bytes from elsewhere: fsspec's file systems, made patient.

One thing is done here: read a file from byte ``start`` on, and when the server stalls, stops
early, drops the connection or answers 5xx, go on from where it stopped, after a pause that doubles.
A server that refuses ranges is read from the front again; a file that another has replaced in
between is not gone on with (``If-Range``, ETag). Redirects are followed on the same server, and to
hosts that ``Patience`` names. HTTP goes through fsspec's aiohttp session (its ``cat_file`` would
hold a whole shard in memory where ranges are refused); other stores are read in pieces by
``cat_file``. A server that trickles has stalled. File systems are made
once a process, so a forked loader worker has its own, and all waiting ends with the run
(``bat.data.ending``). Messages never show user names, passwords or signatures.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import fnmatch
import os
import re
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp
import fsspec
import yarl

from bat.data.ending import POLL_SECONDS, go_on, pause
from bat.data.sources import Patience, shown
from bat.redact import redact

PIECE_BYTES = 4 << 20
CRAWL_BYTES = 1 << 16
"""Less than this in ``timeout_seconds`` counts as silence."""
SLOW_BYTES, SLOW_SECONDS = 10_000, 60.0
"""Less than so many bytes a second, over so long, counts as silence too."""
PROGRESS_BYTES = 1 << 20
"""So much further, not slowly, and the count of tries begins anew."""
LONGEST_PAUSE_SECONDS = 60.0
STORE_PIECE_BYTES = 16 << 20
MAX_REDIRECTS = 10
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError)
"""Not worth another try."""
T = TypeVar("T")
Pieces = Generator[bytes, None, None]


class Stat(NamedTuple):
    size: int | None
    """Bytes; None where the server does not tell."""
    tag: str
    """Changes with the content (ETag, time of change); empty where the server tells none."""


class ChangedError(OSError):
    """The file is another one than that whose beginning was read."""


class RedirectError(OSError):
    """The server leads to another host or port, or too often."""


class _Version:
    """Which version of a file is read: ``tag`` of the first answer, or as the caller knows it."""

    def __init__(self, tag: str) -> None:
        self.tag = tag

    def hold(self, tag: str, url: str) -> None:
        """Raise ``ChangedError`` for an answer of another version; one that tells none passes."""
        if self.tag and tag and tag.removeprefix("W/") != self.tag.removeprefix("W/"):
            raise ChangedError(
                errno.EIO, f"{shown(url)} was changed on the server: start the run again"
            )
        self.tag = self.tag or tag


_systems: dict[tuple[int, str], Any] = {}


def system_of(url: str) -> Any:
    """The fsspec file system of ``url`` in this process."""
    parts = urlsplit(url)
    key = (os.getpid(), f"{parts.scheme}://{parts.netloc}")
    if key not in _systems:
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if parts.scheme in ("http", "https"):
            timeout = aiohttp.ClientTimeout(total=None)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
            options["client_kwargs"]["auto_decompress"] = False
            options["encoded"] = "%" in url
        _systems[key] = fsspec.core.url_to_fs(url, **options)[0]
    return _systems[key]


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def why(error: BaseException, url: str, patience: Patience) -> str:
    """``error`` in a few words without secrets."""
    if isinstance(error, TimeoutError):
        return f"no answer within {patience.timeout_seconds:g} s"
    if isinstance(error, aiohttp.ClientConnectorError):
        return os.strerror(error.os_error.errno) if error.os_error.errno else "no connection"
    if isinstance(error, aiohttp.ClientError):
        return "the connection broke"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = re.sub(r"://[^/@\s]*@", "://", redact(text.replace(url, shown(url))))
    return re.sub(r"\?[^\s'\"]*", "", text)[:300] or type(error).__name__


def _wait(system: Any, function: Callable[..., Any], *args: Any) -> Any:
    """The result of a coroutine of an asynchronous file system; ``OSError`` where the run ends."""
    future = asyncio.run_coroutine_threadsafe(function(*args), system.loop)
    try:
        while not concurrent.futures.wait([future], POLL_SECONDS).done:
            go_on()
    except BaseException:
        future.cancel()
        raise
    return future.result()


async def _within(seconds: float, function: Callable[..., Awaitable[T]], *args: Any) -> T:
    async with asyncio.timeout(seconds):
        return await function(*args)


class Tries:
    """Counts failures: pauses after each, raises ``OSError`` after the last, or as the run ends."""

    def __init__(self, url: str, patience: Patience) -> None:
        self.url, self.patience, self.failures = url, patience, 0

    def after(self, error: Exception) -> None:
        go_on()
        if isinstance(error, (ChangedError, RedirectError)):
            raise error
        if isinstance(error, FINAL):
            if not isinstance(error, OSError):
                raise error
            reason = "does not exist" if isinstance(error, FileNotFoundError) else "is refused"
            number = error.errno or errno.EIO
            raise type(error)(number, f"{shown(self.url)} {reason}") from None
        self.failures += 1
        if self.failures >= self.patience.retries:
            reason = f"{why(error, self.url, self.patience)} ({self.failures} tries)"
            message = f"{shown(self.url)} cannot be reached: {reason}"
            raise OSError(errno.EIO, message) from None
        seconds = self.patience.backoff_seconds * 2.0 ** min(self.failures - 1, 20)
        pause(min(seconds, LONGEST_PAUSE_SECONDS))


def patiently(attempt: Callable[[], T], url: str, patience: Patience) -> T:
    """``attempt()``, again after a failure.

    Raises:
        OSError: it stays unreachable; FileNotFoundError, PermissionError at once.
    """
    tries = Tries(url, patience)
    while True:
        try:
            return attempt()
        except Exception as error:
            tries.after(error)


async def _get(
    system: Any, url: str, headers: dict[str, str], patience: Patience
) -> aiohttp.ClientResponse:
    session = await system.set_session()
    headers = {"Accept-Encoding": "identity"} | headers
    place = first = system.encode_url(url)
    for _ in range(MAX_REDIRECTS + 1):
        async with asyncio.timeout(patience.timeout_seconds):
            answer: aiohttp.ClientResponse = await session.get(
                place, headers=headers, allow_redirects=False
            )
        if answer.status not in (301, 302, 303, 307, 308):
            break
        answer.close()
        there = place.join(yarl.URL(answer.headers.get("Location", ""), encoded=True))
        if there.scheme not in ("http", "https") or not _may_lead(there, first, patience):
            raise RedirectError(
                errno.EIO,
                f"{shown(url)} leads to another place, {shown(str(there))}: name that one, or "
                f"allow its host, data.redirects=[{there.host}]",
            )
        place = there
    else:
        raise RedirectError(errno.EIO, f"{shown(url)} leads on and on ({MAX_REDIRECTS} redirects)")
    if answer.status in (200, 206):
        return answer
    answer.close()
    if answer.status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, f"HTTP {answer.status}")
    if answer.status in (401, 403):
        raise PermissionError(errno.EACCES, f"HTTP {answer.status}")
    raise OSError(errno.EIO, f"HTTP {answer.status}")


def _may_lead(there: yarl.URL, first: yarl.URL, patience: Patience) -> bool:
    """Whether a redirect to ``there`` is followed: the same scheme, host and port, or allowed."""
    names = (f"{there.host}", f"{there.host}:{there.port}")
    return there.origin() == first.origin() or any(
        fnmatch.fnmatchcase(name, allowed) for name in names for allowed in patience.redirects
    )


def _tag(answer: aiohttp.ClientResponse) -> str:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def _extent(answer: aiohttp.ClientResponse) -> tuple[int, int | None]:
    """First byte of what follows, and bytes of the whole file."""
    if answer.status == 206:
        found = re.fullmatch(
            r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "").strip()
        )
        if found is None:
            raise OSError(errno.EIO, "an answer to another range than asked")
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


async def _gather(answer: aiohttp.ClientResponse, seconds: float) -> bytes:
    """The next up to ``PIECE_BYTES``; what came before a failure is kept, the next call fails."""
    parts: list[bytes] = []
    got = 0
    try:
        async with asyncio.timeout(seconds):
            while got < PIECE_BYTES and (data := await answer.content.read(PIECE_BYTES - got)):
                parts.append(data)
                got += len(data)
    except TimeoutError:
        if got < CRAWL_BYTES:
            raise
    except (aiohttp.ClientError, OSError):
        if not got:
            raise
    return b"".join(parts)


@contextlib.contextmanager
def _answer(url: str, headers: dict[str, str], patience: Patience) -> Iterator[tuple[Any, Any]]:
    system = system_of(url)
    answer = _wait(system, _get, system, url, headers, patience)
    try:
        yield system, answer
    finally:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            system.loop.call_soon_threadsafe(answer.close)


def _pieces(
    url: str, start: int, size: int | None, version: _Version, patience: Patience
) -> Pieces:
    """One attempt: the bytes from ``start`` on."""
    if not is_http(url):
        yield from _store_pieces(url, start, size, version, patience)
        return
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and version.tag and not version.tag.startswith("W/"):
        headers["If-Range"] = version.tag
    with _answer(url, headers, patience) as (system, answer):
        version.hold(_tag(answer), url)
        at, whole = _extent(answer)
        if at > start or (whole is not None and size is not None and whole != size):
            raise OSError(errno.EIO, f"it has {whole} bytes on the server, {size} were expected")
        while data := _wait(system, _gather, answer, patience.timeout_seconds):
            if at + len(data) > start:
                yield data[max(0, start - at) :]
            at += len(data)


def _store_pieces(
    url: str, start: int, size: int | None, version: _Version, patience: Patience
) -> Iterator[bytes]:
    system = system_of(url)
    path = system._strip_protocol(url)
    info = system.info(path)
    version.hold(_store_tag(info), url)
    end = size if size is not None else int(info["size"])
    while start < end:
        go_on()
        last = min(start + STORE_PIECE_BYTES, end)
        if system.async_impl:
            seconds = 4 * patience.timeout_seconds  # a whole piece of 16 MiB
            data = _wait(system, _within, seconds, system._cat_file, path, start, last)
        else:
            data = system.cat_file(path, start, last)  # has time limits of its own
        if not data:
            return
        start += len(data)
        yield data
    version.hold(_store_tag(system.info(path)), url)


def _store_tag(info: dict[str, Any]) -> str:
    names = ("ETag", "etag", "generation", "blob_id", "LastModified", "last_modified", "mtime")
    return str(next((info[name] for name in names if info.get(name)), ""))


def stream(
    url: str, *, start: int = 0, size: int | None = None, tag: str = "", patience: Patience
) -> Pieces:
    """The bytes of ``url`` from ``start`` on, in pieces, through stalls and broken connections.

    Args:
        size: bytes of the whole file where they are known; another number is an error.
        tag: of the version that is wanted (``stat``); empty: whichever there is at first.

    Raises:
        OSError: unreachable after ``patience.retries`` tries without progress; shorter than
            ``size``; the run ends. At once: FileNotFoundError, PermissionError; ``ChangedError``
            where the file changes in between (by its ETag, or time of change, if the server tells
            one): what came so far is of no use; ``RedirectError``.
    """
    at = counted = start
    tries, version = Tries(url, patience), _Version(tag)
    while size is None or at < size:
        try:
            with contextlib.closing(_pieces(url, at, size, version, patience)) as pieces:
                base, waited, since = at, 0.0, time.monotonic()  # the taker's time is his own
                for data in pieces:
                    at += len(data)
                    waited += time.monotonic() - since
                    slow = at - base < SLOW_BYTES * waited
                    if at - counted >= PROGRESS_BYTES and not slow:
                        counted, tries.failures = at, 0
                    yield data
                    if waited >= SLOW_SECONDS:
                        if slow and at != size:
                            rate = (at - base) / waited / 1000
                            raise OSError(errno.EIO, f"it sends {rate:.2g} kB/s only")
                        base, waited = at, 0.0
                    since = time.monotonic()
            if size is not None and at < size:
                raise OSError(errno.EIO, f"the server sent {at} of {size} bytes")
            return
        except Exception as error:
            tries.after(error)


def fetch(url: str, *, limit: int, patience: Patience) -> bytes:
    """A small file; ``OSError`` as ``stream``, or over ``limit`` bytes.

    One that changes meanwhile is read again, ``patience.retries`` times at most.
    """
    for left in reversed(range(patience.retries)):
        parts, got = [], 0
        try:
            for data in stream(url, patience=patience):
                got += len(data)
                if got > limit:
                    raise OSError(errno.EFBIG, f"{shown(url)} is larger than {limit} bytes")
                parts.append(data)
            break
        except ChangedError:
            if not left:
                raise
    return b"".join(parts)


def stat(url: str, patience: Patience) -> Stat:
    """Size and tag of a file; ``OSError`` as ``stream``."""

    def ask() -> Stat:
        if not is_http(url):
            system = system_of(url)
            info = system.info(system._strip_protocol(url))
            return Stat(info.get("size"), _store_tag(info))
        with _answer(url, {"Range": "bytes=0-0"}, patience) as (_, answer):
            return Stat(_extent(answer)[1], _tag(answer))

    return patiently(ask, url, patience)
