"""Writes the generated pages of the docs site while mkdocs builds it (``hooks`` in mkdocs.yml).

Recipes come from the headers of their files (a line, ``Cost: ...``, ``Expect: ...``), settings from
the schema, notebooks from their cells; nothing that is generated is committed. A page that
``nav`` names and that is not there is left out; one that ``nav`` does not name comes under "More".
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bat need not be installed

from bat.cli import describe  # noqa: E402
from bat.config import locate  # noqa: E402

COMMANDS = ("pretrain", "probe", "finetune")
NOTES = ("Cost", "Expect")


def generated(docs: Path) -> dict[str, str]:
    """Returns the generated pages: path below ``docs`` to Markdown."""
    pages = {"recipes.md": recipes()}
    pages |= {f"settings_{command}.md": settings(command) for command in COMMANDS}
    return pages | {f"{p.stem}.md": notebook(p) for p in docs.glob("*.ipynb")}


def header(path: Path) -> tuple[str, dict[str, str], str]:
    """Returns a recipe's comment without its notes, the notes by name, and its settings."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    said, notes = [], {}
    for line in (line.removeprefix("#").strip() for line in lines[:first]):
        name, _, text = line.partition(": ")
        if name in NOTES:
            notes[name] = linked(text)
        else:
            said.append(line)
    return linked(" ".join(said)), notes, "\n".join(lines[first:])


def linked(text: str) -> str:
    """Returns ``text`` with ``docs/PAGE.md`` as a link and ``key=value`` as code."""
    text = html.escape(text, quote=False)
    text = re.sub(r"(?<![\w`.])([a-z][\w.]*=[^\s,;:)]*[^\s,;:).])", r"`\1`", text)
    return re.sub(r"docs/((\w+)\.md)", r"[\2](\1)", text)


def recipes() -> str:
    """Returns the page of recipes: a table a command, then each recipe whole."""
    parts = [
        "# Recipes\n\nA recipe is a whole run in one file; every `key=value` on the command line "
        "changes it. What a run costs and what to expect stands here where it was measured, else "
        "not. `bat recipes` prints the list, `--print-config` all values of one.\n"
    ]
    for command in COMMANDS:
        found = {
            name: header(locate.find_recipe(name, command)) for name in describe.recipes(command)
        }
        parts += [f"\n## bat-{command}\n", "| recipe | cost | expect |", "|---|---|---|"]
        for name, (_, notes, _) in found.items():
            cost, expect = (notes.get(note, "not measured").rstrip(".") for note in NOTES)
            parts.append(f"| [`{name}`](#{command}-{name}) | {cost} | {expect} |")
        for name, (said, _, text) in found.items():
            body = "\n".join(f"    {line}" for line in text.strip().splitlines())
            parts.append(f"\n### `recipe={name}` {{ #{command}-{name} }}\n\n{said}\n")
            parts.append(f'??? note "the file"\n\n    ```yaml\n{body}\n    ```\n')
    return "\n".join(parts)


def settings(command: str) -> str:
    """Returns the page of all settings of a command, by section."""
    parts = [
        f"# Settings of bat-{command}\n\n`bat {command} --settings [NAME]` prints the same. Values "
        f"are the defaults of the schema; a recipe changes some: `bat-{command} recipe=NAME "
        "--print-config`.\n"
    ]
    last = None
    for setting in describe.settings(command):
        section = setting.key.partition(".")[0] if "." in setting.key else "the run"
        if section != last:
            parts.append(f"\n## {section}\n")
            last = section
        default = f"`{setting.default}`" if setting.default else "empty"
        parts.append(f"`{setting.key}` · {html.escape(setting.kind)} · default {default}\n")
        parts.append(f":   {html.escape(setting.meaning, quote=False)}\n")
    return "\n".join(parts)


def notebook(path: Path) -> str:
    """Returns a notebook as Markdown: its text, its code, and what the code printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            said = output.get("text") or output.get("data", {}).get("text/plain") or []
            if said:
                parts.append(f"```text\n{''.join(said).rstrip()}\n```")
    return "\n\n".join([*parts, f"[The notebook]({path.name})\n"])


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fits ``nav`` to the pages that are there."""
    docs = Path(config.docs_dir)
    config.extra["pages"] = generated(docs)
    there = {p.name for p in docs.glob("*.md")} | {*config.extra["pages"]}
    config.nav = present(config.nav or [], there)
    if more := sorted(there - {*named(config.nav)}):
        config.nav.append({"More": more})
    return config


def present(nav: Any, there: set[str]) -> Any:
    """Returns ``nav`` without the pages that are not there and sections without pages."""
    if isinstance(nav, str):
        return nav if nav in there else None
    if isinstance(nav, dict):
        found = {title: present(entry, there) for title, entry in nav.items()}
        return {title: entry for title, entry in found.items() if entry} or None
    return [entry for entry in (present(entry, there) for entry in nav) if entry]


def named(nav: Any) -> Iterator[str]:
    """Yields the pages that ``nav`` names."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from named(entry)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    for path, text in config.extra["pages"].items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Shows a link that leaves docs/, to the code, as its text."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"`\1`", markdown)
