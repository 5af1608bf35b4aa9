"""Which shards a user means: a folder, a tar, a glob, or braces: ``shard-{00000..00041}.tar``."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from bat.shapes import UserError


def expand(source: str | Path) -> list[Path]:
    """The shards that ``source`` names, in order.

    Raises:
        UserError: not a local path, nothing there, or a compressed tar.
    """
    text = str(source)
    if re.match(r"[a-z0-9]+:", text):
        raise UserError(f"{text!r} is not a local path: copy the shards here, then give the folder")
    braces = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if braces:
        first, last, names = braces.groups()
        width = len(first or "")
        found = names.split(",") if names else range(int(first), int(last) + 1)
        words = [f"{x:0{width}d}" if isinstance(x, int) else x for x in found]
        before, after = text[: braces.start()], text[braces.end() :]
        return [path for word in words for path in expand(before + word + after)]
    path = Path(text)
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if (path / ".bat-shard-in-progress").exists() and not (path / "manifest.json").exists():
            raise UserError(f"{path} is unfinished: run the bat-shard command that made it again")
        if not tars:
            deeper = sorted({p.parent.name for p in path.glob("*/*.tar")})
            hint = f"its sub-folders {', '.join(deeper)} do" if deeper else "bat-shard makes some"
            raise UserError(f"{path} holds no .tar shards: {hint}")
        return tars
    if not path.exists():
        found_tars = [Path(p) for p in sorted(glob.glob(text))] if glob.has_magic(text) else []
        if not found_tars:
            raise UserError(f"no shard at {text}: give a folder of .tar files, a glob or a list")
        return found_tars
    if path.suffix != ".tar":
        raise UserError(f"{path} is not a .tar: give uncompressed WebDataset shards")
    return [path]
