"""Reads and writes small JSON files beside results, which a resumed run uses if still valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bat.io import write_json


def write_note(file: Path, made_from: dict[str, Any], content: dict[str, Any]) -> None:
    """Writes ``content`` and what it depends on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"made_from": made_from, "content": content})


def read_note(file: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the content; None if the file is missing, damaged, or made from something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return dict(found["content"]) if found["made_from"] == made_from else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
