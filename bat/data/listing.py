"""What a remote folder holds: by its ``manifest.json``, or by what its server lists."""

from __future__ import annotations

import html
import re
import tempfile
from pathlib import Path
from urllib.parse import quote, unquote, urljoin

from bat.data.manifest import Manifest
from bat.data.remote import fetch, is_http, patiently, system_of
from bat.data.sources import SUFFIXES, Patience, shown
from bat.errors import UserError

MAX_MANIFEST_BYTES = 1 << 28
MAX_LISTING_BYTES = 1 << 24


def join(folder: str, name: str) -> str:
    return f"{folder}/{quote(name) if is_http(folder) else name}"


def listing(folder: str, patience: Patience) -> list[str]:
    """Names in a remote folder, sorted, those of sub-folders with a slash; empty where unknown.

    Raises:
        UserError: the server cannot be reached.
    """

    def ask() -> list[str]:
        system = system_of(folder)
        entries = system.ls(system._strip_protocol(folder), detail=True)
        names = [e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries]
        deep = [e["type"] == "directory" for e in entries]
        return [name + "/" * is_folder for name, is_folder in zip(names, deep, strict=True)]

    try:
        names = _links(folder, patience) if is_http(folder) else patiently(ask, folder, patience)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(error.strerror) from None
    return sorted({n for n in names if re.fullmatch(r"[^/]+/?", n) and not n.startswith(".")})


def _links(folder: str, patience: Patience) -> list[str]:
    """What the page of an HTTP folder links to, below it. (fsspec's own reading has no bound.)"""
    page = fetch(f"{folder}/", limit=MAX_LISTING_BYTES, patience=patience).decode(
        "utf-8", "replace"
    )
    targets = re.findall(
        r"<a\s[^<>]{0,500}?href\s*=\s*[\"']([^\"'<>]{1,2000})", page, re.IGNORECASE
    )
    found = [urljoin(f"{folder}/", html.unescape(target)) for target in targets]
    plain = [re.split(r"[?#]", link, maxsplit=1)[0] for link in found]
    return [link.removeprefix(f"{folder}/") for link in plain if link.startswith(f"{folder}/")]


def manifest_of(folder: str, patience: Patience) -> Manifest | None:
    """The manifest of a remote folder; None where there is none.

    Raises:
        UserError: damaged, or the server cannot be reached.
    """
    try:
        data = fetch(f"{folder}/manifest.json", limit=MAX_MANIFEST_BYTES, patience=patience)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return None
    except OSError as error:
        raise UserError(error.strerror) from None
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "manifest.json").write_bytes(data)
        try:
            manifest = Manifest.load(Path(name))
        except UserError as error:
            raise UserError(str(error).replace(name, shown(folder))) from None
    for entry in manifest.shards if manifest else ():
        if not re.fullmatch(r"[^/\\]+", entry.name) or not unquote(entry.name).endswith(SUFFIXES):
            raise UserError(f"{shown(folder)}/manifest.json lists {entry.name!r}: not a shard")
    return manifest
