"""Finds the shards that a source names, local or remote, and the splits to train on.

A source is a folder, a tar, a glob, braces (``shard-{00000..00041}.tar``), or a URL of any of these
that fsspec knows (``https://``, ``s3://``, ``gs://``, ``hf://``, ...). A folder whose sub-folders
hold the shards (``train/``, ``test/``) means all of them; the sub-folder is the split of their
clips. A remote folder holds what its ``manifest.json`` lists, or what the server lists. URLs that
would run code on this machine (chained URLs) or lead to other files (``reference:``) are refused,
and so is ``pipe:`` unless ``bat.data.pipes`` allows it.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from bat.data.pipes import PREFIX, pipes_allowed
from bat.errors import UserError
from bat.redact import redact
from bat.tasks.folder import split_of

COMPRESSED = (".tar.gz", ".tgz")
SUFFIXES = (".tar", *COMPRESSED)
REFUSED = {
    *("pipe", "reference", "generic", "data", "dir", "git", "jlab", "jupyter", "dask"),
    *("arrow_hdfs", "zip", "tar", "libarchive", "cached", "filecache", "simplecache"),
    *("blockcache", "async_wrapper", "asyncwrapper", "asynclocal"),
}
"""Protocols of fsspec that run a command, lead to other places, or are no store of shards."""
KEYLESS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl")
"""Protocols whose URLs hold no user name and password."""
SIGNATURE = re.compile(
    r"x-(amz|goog|oss|ms)-.*|sig(nature)?|expires|token|access_?token|key-pair-id|policy|se|sp|sv"
    r"|sr|st|spr|awsaccesskeyid|googleaccessid",
    re.IGNORECASE,
)
UNFINISHED = ".bat-shard-in-progress"
"""Folder in one of shards that is not complete."""
TRAIN = ("train", "train-unbalanced")
"""Splits that ``auto`` takes, in order of preference; the second is the larger one of AudioSet."""
log = logging.getLogger("bat")


class NotIndexable(UserError):  # noqa: N818
    """Shards that can only be read from front to end: see ``bat.data.sequential``."""


class RetryPolicy(NamedTuple):
    """Retries, timeouts and allowed redirects of requests to a server."""

    retries: int = 5
    """Tries before the server counts as unreachable."""
    timeout_seconds: float = 30.0
    """Longest time that the server may send nothing."""
    backoff_seconds: float = 0.5
    """Pause after the first failure; doubled after each further one."""
    redirects: tuple[str, ...] = ()
    """Hosts (``cdn.org``, ``cdn.org:8443``, ``*.cdn.org``, ``*``) that it may redirect to."""


class Shard(NamedTuple):
    """One shard as a user named it."""

    place: Path | str
    """Local path; a string is a URL."""
    split: str = ""
    """Sub-folder of the source it lies in."""
    command: bool = False
    """True if ``place`` is ``pipe:COMMAND`` and the user allowed it; set by ``find`` alone."""

    @property
    def remote(self) -> bool:
        return isinstance(self.place, str)

    @property
    def name(self) -> str:
        """The file name; without the query of a URL; nothing of a command."""
        if self.command:
            return f"pipe-{hashlib.sha256(str(self.place).encode()).hexdigest()[:8]}"
        if isinstance(self.place, Path):
            return self.place.name
        return unquote(urlsplit(self.place).path.rsplit("/", 1)[-1])

    @property
    def compressed(self) -> bool:
        return self.name.endswith(COMPRESSED)

    @property
    def identity(self) -> str:
        """The identity of the shard, which does not depend on how it was named."""
        if isinstance(self.place, Path):
            folder, name = os.path.split(self.place)
            place = f"{_resolved(folder)}/{name}"
            return os.path.realpath(place) if os.path.islink(place) else place
        return self.place if self.command else identity(self.place)

    def called(self, depth: int) -> str:
        """Returns the last ``depth`` parts of its location, the last being its name; no query."""
        if self.command:
            return self.name
        if isinstance(self.place, Path):
            folders = self.place.parent.resolve().parts
        else:
            parts = urlsplit(shown(self.place))
            folders = (parts.netloc, *unquote(parts.path).strip("/").split("/")[:-1])
        return "/".join([*folders, self.name][-depth:])


@functools.lru_cache(maxsize=64)  # a hundred thousand shards lie in a few folders
def _resolved(folder: str) -> str:
    return os.path.realpath(folder)


def names_of(shards: Sequence[Shard]) -> list[str]:
    """Returns file names, with as many parent folders as needed to make them distinct."""
    names = [shard.name for shard in shards]
    for depth in range(2, 65):
        if len(set(names)) == len(names):
            break
        names = [shard.called(depth) for shard in shards]
    return names


def is_url(source: str | Path) -> bool:
    return isinstance(source, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source) is not None


def shown(url: str) -> str:
    """Returns ``url`` for a message: no user name, password, query (signatures) or fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def identity(url: str) -> str:
    """Returns ``url`` without credentials: a shard with a new signature is the same shard."""
    query = [(k, v) for k, v in parse_qsl(urlsplit(url).query) if not SIGNATURE.fullmatch(k)]
    return shown(url) + "?" + urlencode(sorted(query))


def find(source: str | Path, policy: RetryPolicy | None = None) -> list[Shard]:
    """Returns the shards that ``source`` names, in order.

    Raises:
        UserError: nothing found, not a tar, an unfinished folder, a protocol that is refused,
            unknown or not installed, a server that cannot be reached.
    """
    text = str(source)
    if is_url(source):
        if text.startswith(PREFIX) and pipes_allowed():
            return [Shard(text, command=True)]
        text = checked_url(text)
        if text.startswith("file:"):
            return find(Path(unquote(urlsplit(text).path)))
    braces = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if braces:
        first, last, names = braces.groups()
        if names:
            words = names.split(",")
        else:
            words = [f"{x:0{len(first)}d}" for x in range(int(first), int(last) + 1)]
        before, after = text[: braces.start()], text[braces.end() :]
        return [shard for word in words for shard in find(before + word + after, policy)]
    return _remote(text, policy or RetryPolicy()) if is_url(source) else _local(Path(text), text)


def _local(path: Path, text: str) -> list[Shard]:
    if path.is_dir():
        with os.scandir(path) as entries:  # many shards: no call for each
            below = sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
        tars = [Shard(p) for p in _tars(path)]
        tars += [Shard(p, split_of(name)) for name in below for p in _tars(path / name)]
        if not tars:
            raise UserError(f"{path} holds no .tar shards: bat-shard {path} OUT makes some")
        return _one_kind(str(path), tars)
    if not path.exists():
        found = [Path(p) for p in sorted(glob.glob(text))] if glob.has_magic(text) else []
        if not found:
            hint = "give a folder of .tar files, a glob or a list"
            if text.startswith(("{'", '{"')):  # a mapping, as a recipe or a shell may write it
                hint = (
                    "YAML reads `: ` as a mapping, so put the whole into quotes of its own: "
                    "data.shards=\"'pipe:COMMAND'\""
                )
            raise UserError(f"no shard at {text}: {hint}")
        return [Shard(p) for p in found]
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path} is not a .tar: give uncompressed WebDataset shards")
    return [Shard(path)]


def _tars(folder: Path) -> list[Path]:
    """Returns the tars of ``folder``, sorted."""
    if (folder / UNFINISHED).exists() and not (folder / "manifest.json").exists():
        raise _unfinished(str(folder))
    return [folder / name for name in sorted(os.listdir(folder)) if name.endswith(SUFFIXES)]


def _unfinished(folder: str) -> UserError:
    return UserError(f"{folder} is unfinished: run the bat-shard command that made it again")


def _one_kind(folder: str, shards: list[Shard]) -> list[Shard]:
    """Returns ``shards`` of ``folder``; raises ``UserError`` if they are ambiguous."""
    kinds: dict[tuple[bool, bool], str] = {}
    for shard in shards:
        deep = f"{shard.split}/" if shard.split else ""
        kinds.setdefault((bool(deep), shard.compressed), f"{deep}{shard.name}")
    if len(kinds) > 1:
        one, other, *_ = kinds.values()
        raise UserError(
            f"{folder} holds {one} and {other}: two kinds of shards. Say which are meant, as "
            f"'{folder}/*.tar' or a sub-folder, or list both"
        )
    return shards


def checked_url(url: str) -> str:
    """Returns ``url`` with its protocol in lower case; ``UserError`` if it is not allowed."""
    protocol, rest = url.split(":", 1)
    protocol = protocol.lower()
    if protocol in REFUSED or "::" in url:
        hint = ", or say --allow-pipe to bat-pretrain" if protocol == "pipe" else ""
        raise UserError(f"{protocol}: sources are refused: give a path or a plain URL{hint}")
    if protocol in KEYLESS and re.match(r"//(?!arn:)[^/]*:[^@]*@", rest):
        raise UserError(
            f"{redact(url)}: a URL must not hold credentials, which logs would show: set them in "
            "the environment (docs/many_machines.md)"
        )
    import fsspec

    try:
        if protocol not in ("file", "local"):
            fsspec.get_filesystem_class(protocol)
    except ValueError:
        known = "http, https, s3, gs, hf, az, sftp, ... (those of fsspec)"
        raise UserError(f"unknown protocol in {shown(url)!r}: known are {known}") from None
    except ImportError as error:
        raise UserError(f"{protocol}:// needs another package: {error}") from error
    return f"{'file' if protocol == 'local' else protocol}:{rest}"


def _remote(url: str, policy: RetryPolicy) -> list[Shard]:
    """Finds a shard, a glob, or a folder (its manifest, else a listing, else its sub-folders)."""
    from bat.data.manifest import remote_manifest
    from bat.data.remote import join, listing

    path = urlsplit(url).path
    if "*" in path:
        folder, _, pattern = url.rpartition("/")
        regex = re.compile(re.escape(pattern).replace(r"\*", ".*"))
        names = [n for n in listing(folder, policy) if n.endswith(SUFFIXES) and regex.fullmatch(n)]
        if not names:
            raise UserError(f"no shard at {shown(url)}: the server lists none of that name")
        return [Shard(f"{folder}/{name}") for name in names]
    if path.endswith(SUFFIXES):
        return [Shard(url)]
    folder = url.rstrip("/")
    manifest = remote_manifest(folder, policy)
    if manifest is not None:
        return [Shard(join(folder, entry.name)) for entry in manifest.shards]
    if listing(f"{folder}/{UNFINISHED}", policy):
        raise _unfinished(shown(folder))
    found = []
    for name in listing(folder, policy):
        if name.endswith(SUFFIXES):
            found.append(Shard(f"{folder}/{name}"))
        elif name.endswith("/"):
            inside = f"{folder}/{name[:-1]}"
            begun = listing(f"{inside}/{UNFINISHED}", policy)
            if begun and remote_manifest(inside, policy) is None:
                raise _unfinished(shown(inside))
            below = listing(inside, policy)
            tars = [tar for tar in below if tar.endswith(SUFFIXES)]
            found += [Shard(f"{folder}/{name}{tar}", name[:-1]) for tar in tars]
    if not found:
        raise UserError(
            f"{shown(url)} has no manifest.json and lists no .tar: name the shards, as in "
            f"{shown(folder)}/shard-{{00000..00041}}.tar"
        )
    return _one_kind(shown(folder), found)


def check_no_train(splits: Sequence[str], counted: str) -> None:
    """Warn that ``data.split=auto`` takes all clips because none of ``TRAIN`` is among ``splits``.

    Raises ``UserError`` if some are for evaluation (``test``, ``valid``); ``counted`` describes the
    splits found.
    """
    if any(split_of(name) in ("test", "valid") for name in splits):
        raise UserError(
            f"{counted}: none of them is called train. Say which to pre-train on: "
            "data.split=NAME (several: A,B), or data.split=all, the held-out ones too"
        )
    log.warning(
        "pre-training on all clips: none of the splits (%s) is called train; data.split=NAME "
        "takes one of them",
        ", ".join(splits),
    )
