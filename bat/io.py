"""Files written whole or not at all, and files of JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a half-written last line is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def filter_jsonl(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows that are not to ``keep``, and a half-written last line; all or nothing."""
    rows = [row for row in read_jsonl(path) if keep(row)]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    replace_durably(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    replace_durably(temporary, path)


def replace_durably(temporary: Path, target: Path) -> None:
    """Flush ``temporary`` to disk, then rename it over ``target`` (same folder): all or nothing,
    after a power cut too."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError:  # a file system without: the file itself is whole in any case
        pass
    finally:
        os.close(folder)
