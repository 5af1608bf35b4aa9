"""Reads remote files by fsspec: whole files, small ones, streams, listings.

A file is fetched whole and compared with the size and the version (ETag or modification time) it
should have; after a failure it is fetched again from its start, so two versions are never joined.
Redirects are followed on the same server, and to hosts that the policy names. File systems are
made once a process: a forked loader worker has its own. Messages show no user names, passwords or
signatures.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import io
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import fsspec
import yarl

from bat.data.sources import RetryPolicy, shown
from bat.errors import UserError
from bat.redact import redact

PIECE_BYTES = 4 << 20
LONGEST_PAUSE_SECONDS = 60.0
FULL = (errno.ENOSPC, errno.EDQUOT)
TAGS = ("ETag", "etag", "generation", "blob_id", "Last-Modified", "LastModified", "last_modified",
        "mtime")  # fmt: skip
T = TypeVar("T")


class Stat(NamedTuple):
    size: int | None
    """Size in bytes; None if the server does not report it."""
    tag: str
    """Changes with the content (ETag, modification time); empty if the server reports none."""


class RefusedError(OSError):
    """A file of another version than requested, or a redirect to a host that is not allowed."""


FINAL = (RefusedError, FileNotFoundError, PermissionError, IsADirectoryError, ImportError)
"""Errors after which no further try is made."""
HTTP_ERRORS = (aiohttp.ClientError, TimeoutError, OSError)
ACCESS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (of a store that is not "
    "Amazon's also AWS_ENDPOINT_URL)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
}
"""Ways to give credentials, by protocol."""
_KEYS = f"the store does not accept these credentials: {ACCESS['s3']}"
REMEDIES = {
    "NoSuchBucket": "this bucket does not exist: make it, or correct its name; for a store that is "
    "not Amazon's set AWS_ENDPOINT_URL",
    "NoCredentialsError": f"there are no credentials: {ACCESS['s3']}",
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"), _KEYS),
    **dict.fromkeys(("InvalidToken", "InvalidClientTokenId"), _KEYS),
}
"""Errors of an object store that no other try mends, with what to do."""
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory")
"""Protocols whose uploads appear whole or not at all."""
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
            raise RefusedError(
                errno.EIO,
                f"{shown(str(asked.url))} leads to another place, {shown(str(there))}: name that "
                f"one, or allow its host, data.redirects=[{there.host}]",
            )

    guard = aiohttp.TraceConfig()
    guard.on_request_redirect.append(check)
    return guard


def _cause(error: Exception, url: str) -> Exception:
    """Returns the actual cause of ``error``, with a message where it is final."""
    if (code := _store_code(error)) in REMEDIES:
        return UserError(f"{shown(url)}: {REMEDIES[code]} ({code})")
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, HTTP_ERRORS):
        error = error.__cause__  # fsspec reports any failure of ``info`` like this
    if isinstance(error, aiohttp.TooManyRedirects):
        return RefusedError(errno.EIO, f"{shown(url)} leads on and on: too many redirects")
    status = error.status if isinstance(error, aiohttp.ClientResponseError) else 0
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(errno.ENOENT, f"{shown(url)} does not exist")
    if isinstance(error, (PermissionError, IsADirectoryError)) or status in (401, 403):
        return PermissionError(errno.EACCES, f"{shown(url)} is refused")
    return OSError(errno.EIO, f"HTTP {status}") if status else error


def _store_code(error: BaseException) -> str:
    """Returns the code of an error of botocore; empty for others."""
    for found in (error, error.__cause__):
        if type(found).__name__ in REMEDIES:
            return type(found).__name__
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def remedy(url: str) -> str:
    """Returns how credentials for ``url`` are given."""
    protocol = urlsplit(url).scheme
    return ACCESS.get(protocol, f"give credentials as fsspec's {protocol} file system takes them")


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


def attempt(action: Callable[[], T], url: str, policy: RetryPolicy) -> T:
    """Calls ``action()``, and again after a failure, with pauses that double.

    Raises:
        OSError: it stays unreachable. Immediately: one of ``FINAL``, a full disk.
    """
    tries, pause = 0, policy.backoff_seconds
    while True:
        try:
            return action()
        except Exception as raised:
            error = _cause(raised, url)
        tries += 1
        if isinstance(error, (UserError, *FINAL)) or (
            isinstance(error, OSError) and error.errno in FULL
        ):
            raise error
        if tries >= policy.retries:
            reason = f"{why(error, url, policy)} ({tries} tries)"
            raise OSError(errno.EIO, f"{shown(url)} cannot be reached: {reason}")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _info(url: str, policy: RetryPolicy) -> Stat:
    system, path = _system_of(url, policy)
    info = system.info(path)
    tag = next((str(info[name]) for name in TAGS if info.get(name)), "")
    return Stat(info.get("size"), tag.removeprefix("W/"))


def stat(url: str, policy: RetryPolicy) -> Stat:
    """Returns size and tag of a file; raises ``OSError`` as ``attempt``."""
    return attempt(lambda: _info(url, policy), url, policy)


def download(url: str, path: Path, *, size: int, tag: str = "", policy: RetryPolicy) -> None:
    """Fetch a whole file to ``path``.

    Args:
        size: bytes that it must have.
        tag: tag of the requested version (``stat``); empty: any.

    Raises:
        OSError: as ``attempt``; ``RefusedError`` if the server has another version.
    """

    def fetch() -> None:
        system, name = _system_of(url, policy)
        system.get_file(name, os.fspath(path))
        if tag and _info(url, policy).tag not in ("", tag):
            message = f"{shown(url)} was changed on the server: start the run again"
            raise RefusedError(errno.EIO, message)
        got = path.stat().st_size
        if got != size:
            raise OSError(errno.EIO, f"the server sent {got} bytes, {size} were expected")

    attempt(fetch, url, policy)


def _open(url: str, policy: RetryPolicy) -> Any:
    system, path = _system_of(url, policy)
    return system.open(path, "rb", **({"block_size": 0} if is_http(url) else {}))


@contextlib.contextmanager
def opened(url: str, policy: RetryPolicy) -> Iterator[io.BufferedReader]:
    """Opens ``url`` to be read from front to end; a broken connection is not resumed.

    Raises:
        OSError: as ``attempt`` at the start; where the connection breaks.
    """
    with attempt(lambda: _open(url, policy), url, policy) as file:
        try:
            yield io.BufferedReader(file, 1 << 17)
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = why(error, url, policy)
            raise OSError(errno.EIO, f"{shown(url)} broke off: {reason}") from None


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


def read_part(url: str, *, offset: int, size: int, policy: RetryPolicy) -> bytes:
    """Reads ``size`` bytes of a file; of a server that sends no parts, the whole file.

    Raises ``OSError`` as ``attempt``.
    """

    def fetch() -> bytes:
        system, path = _system_of(url, policy)
        return bytes(system.cat_file(path, start=offset, end=offset + size))

    return attempt(fetch, url, policy)


def upload(path: Path, url: str, policy: RetryPolicy) -> None:
    """Uploads a file so that it appears at ``url`` whole or not at all; raises as ``attempt``."""
    size = path.stat().st_size

    def send() -> None:
        system, name = _system_of(url, policy)
        whole = urlsplit(url).scheme in OBJECT_STORES
        there = name if whole else f"{name}.{secrets.token_hex(8)}.tmp"
        if there != name:
            system.makedirs(system._parent(name), exist_ok=True)
        system.put_file(os.fspath(path), there)
        if there != name:
            system.mv(there, name)
        if (got := system.info(name)["size"]) != size:
            raise OSError(errno.EIO, f"{got} bytes arrived, {size} were sent")

    attempt(send, url, policy)


def remove(url: str, policy: RetryPolicy) -> None:
    """Removes a file if it exists; raises as ``attempt``."""
    system, name = _system_of(url, policy)
    with contextlib.suppress(FileNotFoundError):
        attempt(lambda: system.rm_file(name), url, policy)


def sizes(folder: str, policy: RetryPolicy) -> dict[str, int]:
    """Returns ``{name: bytes}`` of the files in a remote folder, sorted; of a web server, whose
    lists give no sizes, nothing. Raises as ``attempt``."""
    if is_http(folder):
        return {}
    system, name = _system_of(folder, policy)
    try:
        found = attempt(lambda: system.ls(name, detail=True), folder, policy)
    except FileNotFoundError:
        return {}
    files = {e["name"].rpartition("/")[2]: int(e["size"]) for e in found if e["type"] == "file"}
    return dict(sorted(files.items()))


def join(folder: str, name: str) -> str:
    """Returns the URL of file ``name`` in ``folder``."""
    return f"{folder}/{quote(name) if is_http(folder) else name}"


def listing(folder: str, policy: RetryPolicy) -> list[str]:
    """Returns the names in a remote folder, sorted, sub-folders with a slash; empty where unknown.

    Raises:
        UserError: the server cannot be reached.
    """

    def ask() -> set[str]:
        system, path = _system_of(f"{folder}/", policy)
        names = set()
        for entry in system.ls(path, detail=True):
            parent, _, name = entry["name"].rstrip("/").rpartition("/")
            if not is_http(folder) or parent == folder:  # a page may link to anywhere
                names.add(name + "/" * (entry["type"] == "directory"))
        return names

    try:
        names = attempt(ask, folder, policy)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(error.strerror) from None
    return sorted(n for n in names if re.fullmatch(r"[^/?#]+/?", n) and not n.startswith("."))
