"""Reads remote files by fsspec: whole files, small ones, listings.

A file is fetched whole in one request and compared with the size and version (ETag or modification
time) it should have; a truncated file is fetched again from its start, so two versions are never
joined. Failures are retried according to the ``RetryPolicy``. HTTP redirects are followed on the
same server, and to hosts that the policy names. File systems are made once a process: a forked
loader worker has its own. Messages show no user names, passwords or signatures.
"""

from __future__ import annotations

import errno
import fnmatch
import html
import os
import re
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import aiohttp
import fsspec
import yarl

from bat.data.sources import RetryPolicy, shown
from bat.errors import UserError
from bat.redact import redact

PIECE_BYTES = 4 << 20
LONGEST_PAUSE_SECONDS = 60.0
MAX_LISTING_BYTES = 1 << 24
FULL = (errno.ENOSPC, errno.EDQUOT)
TAGS = ("ETag", "etag", "generation", "blob_id", "Last-Modified", "LastModified", "last_modified",
        "mtime")  # fmt: skip
T = TypeVar("T")


class Stat(NamedTuple):
    size: int | None
    """Size in bytes; None if the server does not report it."""
    tag: str
    """Changes with the content (ETag, modification time); empty if the server reports none."""


class ChangedError(OSError):
    """The file on the server has another version than the requested one."""


class RedirectError(OSError):
    """The server redirects to another host or port, or too often."""


_systems: dict[Any, Any] = {}


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _system_of(url: str, policy: RetryPolicy) -> tuple[Any, str]:
    """Returns the fsspec file system of ``url`` in this process, and its name for the file."""
    parts = urlsplit(url)
    key = (os.getpid(), parts.scheme, parts.netloc, policy)
    if key not in _systems:
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if is_http(url):
            seconds = policy.timeout_seconds
            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(sock_connect=seconds, sock_read=seconds),
                "trust_env": True,
                "auto_decompress": False,
                "headers": {"Accept-Encoding": "identity"},
                "trace_configs": [_redirect_guard(policy)],
            }
            options["encoded"] = "%" in url
        _systems[key] = fsspec.core.url_to_fs(url, **options)[0]
    system = _systems[key]
    return system, system._strip_protocol(url)


def _redirect_guard(policy: RetryPolicy) -> aiohttp.TraceConfig:
    """Returns a trace that raises before a redirect to a host that is not allowed is followed."""

    async def check(session: Any, context: Any, asked: Any) -> None:
        there = asked.url.join(yarl.URL(asked.response.headers.get("Location", ""), encoded=True))
        names = (f"{there.host}", f"{there.host}:{there.port}")
        allowed = there.scheme in ("http", "https") and (
            there.origin() == asked.url.origin()
            or any(fnmatch.fnmatchcase(n, pattern) for n in names for pattern in policy.redirects)
        )
        if not allowed:
            raise RedirectError(
                errno.EIO,
                f"{shown(str(asked.url))} leads to another place, {shown(str(there))}: name that "
                f"one, or allow its host, data.redirects=[{there.host}]",
            )

    guard = aiohttp.TraceConfig()
    guard.on_request_redirect.append(check)
    return guard


def why(error: BaseException, url: str, policy: RetryPolicy) -> str:
    """Returns a short description of ``error`` without secrets."""
    if isinstance(error, TimeoutError):
        return f"no answer within {policy.timeout_seconds:g} s"
    if isinstance(error, aiohttp.ClientConnectorError):
        return os.strerror(error.os_error.errno) if error.os_error.errno else "no connection"
    if isinstance(error, aiohttp.ClientError):
        return "the connection broke"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = re.sub(r"://[^/@\s]*@", "://", redact(text.replace(url, shown(url))))
    return re.sub(r"\?[^\s'\"]*", "", text)[:300] or type(error).__name__


def _cause(error: Exception, url: str) -> Exception:
    """Returns the actual cause where fsspec reports that the file does not exist."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, aiohttp.TooManyRedirects):
        return RedirectError(errno.EIO, f"{shown(url)} leads on and on: too many redirects")
    if isinstance(error, aiohttp.ClientResponseError):
        text = f"HTTP {error.status}"
        if error.status in (404, 410):
            return FileNotFoundError(errno.ENOENT, text)
        if error.status in (401, 403):
            return PermissionError(errno.EACCES, text)
        return OSError(errno.EIO, text)
    return error


def attempt(action: Callable[[], T], url: str, policy: RetryPolicy) -> T:
    """Calls ``action()``, and again after a failure, with pauses that double.

    Raises:
        OSError: it stays unreachable. Immediately: FileNotFoundError, PermissionError,
            ``ChangedError``, ``RedirectError``, a full disk.
    """
    tries = 0
    while True:
        try:
            return action()
        except Exception as raised:
            error = _cause(raised, url)
            if isinstance(error, (ChangedError, RedirectError, ImportError)):
                raise error from None
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
                reason = "does not exist" if isinstance(error, FileNotFoundError) else "is refused"
                number = error.errno or errno.EIO
                raise type(error)(number, f"{shown(url)} {reason}") from None
            tries += 1
            if tries >= policy.retries:
                reason = f"{why(error, url, policy)} ({tries} tries)"
                message = f"{shown(url)} cannot be reached: {reason}"
                raise OSError(errno.EIO, message) from None
        seconds = policy.backoff_seconds * 2.0 ** min(tries - 1, 20)
        time.sleep(min(seconds, LONGEST_PAUSE_SECONDS))


def _info(url: str, policy: RetryPolicy) -> Stat:
    system, path = _system_of(url, policy)
    info = system.info(path)
    tag = next((str(info[name]) for name in TAGS if info.get(name)), "")
    return Stat(info.get("size"), tag.removeprefix("W/"))


def stat(url: str, policy: RetryPolicy) -> Stat:
    """Returns size and tag of a file; raises ``OSError`` as ``attempt``."""
    return attempt(lambda: _info(url, policy), url, policy)


def _check(url: str, tag: str, policy: RetryPolicy) -> None:
    """Raise ``ChangedError`` if the server has another version than ``tag``."""
    if tag and _info(url, policy).tag not in ("", tag):
        message = f"{shown(url)} was changed on the server: start the run again"
        raise ChangedError(errno.EIO, message)


def download(url: str, path: Path, *, size: int, tag: str = "", policy: RetryPolicy) -> None:
    """Fetch a whole file to ``path``.

    Args:
        size: bytes that it must have.
        tag: tag of the requested version (``stat``); empty: any.

    Raises:
        OSError: as ``attempt``.
    """

    def fetch() -> None:
        system, name = _system_of(url, policy)
        system.get_file(name, os.fspath(path))
        _check(url, tag, policy)
        got = path.stat().st_size
        if got != size:
            raise OSError(errno.EIO, f"the server sent {got} bytes, {size} were expected")

    attempt(fetch, url, policy)


def _open(url: str, policy: RetryPolicy) -> Any:
    system, path = _system_of(url, policy)
    return system.open(path, "rb", **({"block_size": 0} if is_http(url) else {}))


def stream(url: str, policy: RetryPolicy) -> Generator[bytes, None, None]:
    """Yields the bytes of ``url`` in pieces, from front to end; a broken connection is not resumed.

    Raises:
        OSError: as ``attempt`` at the start; where the connection breaks, or too little is
            received.
    """
    size = stat(url, policy).size
    got = 0
    with attempt(lambda: _open(url, policy), url, policy) as file:
        while True:
            try:
                data = file.read(PIECE_BYTES)
            except Exception as error:
                text = why(_cause(error, url), url, policy)
                raise OSError(errno.EIO, f"{shown(url)} broke off: {text}") from None
            if not data:
                break
            got += len(data)
            yield data
    if size not in (None, got):
        raise OSError(errno.EIO, f"{shown(url)} broke off: {got} of {size} bytes came")


def read(url: str, *, limit: int, policy: RetryPolicy) -> bytes:
    """Reads a small file; raises ``OSError`` as ``attempt``, or if it is over ``limit`` bytes."""

    def fetch() -> bytes:
        parts, got = [], 0
        with _open(url, policy) as file:
            while got <= limit and (data := file.read(min(PIECE_BYTES, limit + 1 - got))):
                parts.append(data)
                got += len(data)
        return b"".join(parts)

    data = attempt(fetch, url, policy)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"{shown(url)} is larger than {limit} bytes")
    return data


def join(folder: str, name: str) -> str:
    """Returns the URL of file ``name`` in ``folder``."""
    return f"{folder}/{quote(name) if is_http(folder) else name}"


def listing(folder: str, policy: RetryPolicy) -> list[str]:
    """Returns the names in a remote folder, sorted, sub-folders with a slash; empty where unknown.

    Raises:
        UserError: the server cannot be reached.
    """

    def ask() -> list[str]:
        system, path = _system_of(folder, policy)
        entries = system.ls(path, detail=True)
        names = [e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries]
        deep = [e["type"] == "directory" for e in entries]
        return [name + "/" * is_folder for name, is_folder in zip(names, deep, strict=True)]

    try:
        names = _links(folder, policy) if is_http(folder) else attempt(ask, folder, policy)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(error.strerror) from None
    return sorted({n for n in names if re.fullmatch(r"[^/]+/?", n) and not n.startswith(".")})


def _links(folder: str, policy: RetryPolicy) -> list[str]:
    """Returns the links on the page of an HTTP folder that lie below it. (fsspec's own reading has
    no size bound.)"""
    page = read(f"{folder}/", limit=MAX_LISTING_BYTES, policy=policy).decode("utf-8", "replace")
    targets = re.findall(
        r"<a\s[^<>]{0,500}?href\s*=\s*[\"']([^\"'<>]{1,2000})", page, re.IGNORECASE
    )
    found = [urljoin(f"{folder}/", html.unescape(target)) for target in targets]
    plain = [re.split(r"[?#]", link, maxsplit=1)[0] for link in found]
    return [link.removeprefix(f"{folder}/") for link in plain if link.startswith(f"{folder}/")]
