"""Small JSON files beside results that a run which goes on reads back, if they still hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bat.io import write_json


def write_note(file: Path, made_from: dict[str, Any], content: dict[str, Any]) -> None:
    """Write ``content`` and what it hangs on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"made_from": made_from, "content": content})


def read_note(file: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The content, or None where there is none, it is damaged, or was made from something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return dict(found["content"]) if found["made_from"] == made_from else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
