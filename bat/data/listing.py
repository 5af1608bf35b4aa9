"""What a remote folder holds: by its ``manifest.json``, or by what its server lists."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from urllib.parse import quote, unquote

from bat.data.manifest import Manifest
from bat.data.remote import fetch, is_http, patiently, system_of
from bat.data.sources import SUFFIXES, Patience, shown
from bat.shapes import UserError

MAX_MANIFEST_BYTES = 1 << 28


def join(folder: str, name: str) -> str:
    return f"{folder}/{quote(name) if is_http(folder) else name}"


def listing(folder: str, patience: Patience) -> list[str]:
    """Names in a remote folder, sorted, those of sub-folders with a slash; empty where unknown.

    Raises:
        UserError: the server cannot be reached.
    """

    def ask() -> list[str]:
        system = system_of(folder, listing=True)
        if is_http(folder):
            prefix = folder + "/"
            found = [link.split("?")[0].split("#")[0] for link in system.ls(prefix, detail=False)]
            return [link.removeprefix(prefix) for link in found if link.startswith(prefix)]
        entries = system.ls(system._strip_protocol(folder), detail=True)
        names = [e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries]
        deep = [e["type"] == "directory" for e in entries]
        return [name + "/" * is_folder for name, is_folder in zip(names, deep, strict=True)]

    try:
        names = patiently(ask, folder, patience)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(error.strerror) from None
    return sorted({n for n in names if re.fullmatch(r"[^/]+/?", n) and not n.startswith(".")})


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
