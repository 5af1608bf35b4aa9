"""Reads the labels of a source: texts, lists and numbers become names of classes.

``names_of`` reads every label, from any source (a CSV, JSON, parquet, a folder's name); ``doubts``
reports class names that look unintended.

Files that name classes (``labels_of``): ``class_labels_indices.csv`` of AudioSet
(``index,mid,display_name``), ``label_descriptors.csv`` of EAT and FSD50K's ``vocabulary.csv`` (no
header; a number, a mid, a name, in any order), AudioSet's ``ontology.json``, a text file with one
name a line. The first, the second and the last number the classes, so the vocabulary is theirs; the
ontology does not, so the vocabulary is the labels that occur, sorted.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bat.errors import UserError
from bat.redact import one_line
from bat.tasks.base import Reading, Row, in_order
from bat.tasks.tables import csv_cells

BESIDE = ("class_labels_indices.csv", "label_descriptors.csv", "ontology.json")
"""Label files that are found without being named, in order of preference."""
MAX_FILE_BYTES = 64 << 20
MISSING = ("", "nan", "<na>")
"""Texts that pandas and numpy write for a missing value, in lower case; they are no label."""
PERHAPS_MISSING = ("none", "null", "na", "n/a", "-")
_ITEM = r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|-?\d+(?:\.\d+)?)"
_LIST = re.compile(rf"\[\s*(?:{_ITEM}\s*(?:,\s*{_ITEM}\s*)*)?\]", re.DOTALL)
"""A list as Python or JSON writes it. Commas are required: Python would join ``'a' 'b'``."""


def names_of(value: Any) -> list[str]:
    """Returns the labels in ``value``: a text, a number, or a list of such.

    A text that is a list as Python or JSON writes it (``"['dog', 'cat']"``) gives its items;
    missing values (``MISSING``, NaN) and other types give no label; ``3.0`` is ``3``. Control
    characters, and surrogates that cannot be encoded, are escaped (``\\x1b``).
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    found = []
    for item in values:
        inner = items_of(item) if isinstance(item, str) else None
        found += [_name(x) for x in ([item] if inner is None else inner)]
    return [name for name in found if name]


def items_of(text: str) -> list[Any] | None:
    """Returns the items of a list that is written as text; None if it is no such list."""
    text = text.strip()
    if not _LIST.fullmatch(text):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return list(parse(text))
        except (ValueError, SyntaxError):
            continue
    return None


def _name(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int, float)):
        return ""
    name = str(value)
    return "" if name.strip().lower() in MISSING else one_line(name)


def cell_names(text: str, separator: str | None) -> tuple[str, ...]:
    """Returns the labels of a cell, each once: those of a list (``names_of``), or between
    separators.

    Raises:
        ValueError: it looks like a list and is none (``[dog, cat]``, ``['dog' 'cat']``).
    """
    items = items_of(text)
    if items is None and re.fullmatch(r"\[.*[,;'\"].*\]", text, re.DOTALL):
        raise ValueError(
            f"{text!r} is no list of labels: write ['a', 'b'], or a;b in a column 'labels'"
        )
    several = [text] if separator is None or items is not None else text.split(separator)
    return tuple(dict.fromkeys(names_of([part.strip() for part in several])))


def doubts(names: Sequence[str]) -> list[str]:
    """Returns a sentence for each likely mistake in class names: two spellings of one class, words
    for a missing value, brackets."""
    alike = defaultdict(list)
    for name in names:
        alike[_alike(name)].append(name)
    found = []
    several = [spellings for spellings in alike.values() if len(spellings) > 1]
    if several:
        shown = "; ".join(" and ".join(map(_spelled, spellings)) for spellings in several[:3])
        found.append(
            f"{len(several)} class(es) in several spellings, taken for different ones: {shown}"
            f"{'; ...' if len(several) > 3 else ''}. Write them alike if they are the same"
        )
    missing = [n for n in names if n.lower() in PERHAPS_MISSING]
    if missing:
        shown = ", ".join(map(repr, missing[:3]))
        found.append(
            f"a class is called {shown}: if that is a missing value, leave the label empty"
        )
    lists = [n for n in names if n[:1] in "[({" and n[-1:] in "])}"]
    if lists:
        shown = ", ".join(map(repr, lists[:3]))
        found.append(f"a class is called {shown}: if that is a list, write ['a', 'b']")
    return found


def _alike(name: str) -> str:
    """Returns the same for names that differ in case, blanks, Unicode form, or as ``1``, ``01``."""
    if re.fullmatch(r"[+-]?\d{1,15}(\.\d{1,15})?", name, re.ASCII):
        return str(float(name))
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name).casefold()).strip()


def _spelled(name: str) -> str:
    """Formats as ``'café'``; with escapes where it is not in the usual Unicode form, NFC."""
    usual = unicodedata.is_normalized("NFC", name)
    return repr(name) if usual else f"{name!a} (not in Unicode form NFC)"


def held_out_alone(rows: Iterable[Row]) -> list[str]:
    """Returns a sentence for the classes that occur only in clips of ``test`` or ``valid``."""
    splits = defaultdict(set)
    for row in rows:
        for label in row.labels:
            splits[label].add(row.split)
    alone = in_order(n for n, where in splits.items() if where <= {"test", "valid"})
    if not alone or len(alone) == len(splits):
        return []
    more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
    return [
        f"{len(alone)} class(es) have no clip but in the splits test or valid, so nothing to be "
        f"learned from: {', '.join(map(repr, alone[:3]))}{more}"
    ]


def classes_in_words(names: Sequence[str], *, most: int = 10) -> str:
    """Formats as ``3 classes: cat, dog, frog``, of more than ``most`` the first; ``no labels``."""
    if not names:
        return "no labels"
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} classes: {', '.join(names[:most])}{more}"


def is_mid(text: str) -> bool:
    """Return True if ``text`` is a machine id such as ``/m/09x0r`` or ``/t/dd00088``."""
    return re.fullmatch(r"/[a-z]{1,2}/[\w-]+", text, re.ASCII) is not None


@dataclass(frozen=True)
class Labels:
    """Names of classes with their mids and numbers; read by ``labels_of``."""

    path: Path
    names: tuple[str, ...]
    mids: tuple[str, ...] = ()
    """The mid of each of ``names``; empty: none."""
    numbers: tuple[int, ...] = ()
    """The number of each of ``names``, ascending; empty: the classes have no order of their own."""

    def translate(self, rows: Iterable[Row]) -> list[Row]:
        """Returns ``rows`` with names for labels, and mids where they are known.

        Raises:
            UserError: a label that is neither a name, nor a mid, nor a number of these.
        """
        known = {str(n): i for i, n in enumerate(self.numbers)}
        known |= {mid: i for i, mid in enumerate(self.mids)}
        known |= {name: i for i, name in enumerate(self.names)}
        # one entry for all rows with equal labels, to save memory with two million rows
        done: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...]]] = {}
        found = []
        for row in rows:
            if row.labels not in done:
                unknown = next((label for label in row.labels if label not in known), None)
                if unknown is not None:
                    close = difflib.get_close_matches(unknown, [*self.names, *self.mids], 1)
                    hint = f" (did you mean {close[0]!r}?)" if close else ""
                    raise UserError(
                        f"label {unknown!r} of {row.name} is not in {self.path.name}{hint}: give "
                        "the label file that belongs to the clips"
                    )
                places = list(dict.fromkeys(known[label] for label in row.labels))
                mids = tuple(self.mids[i] for i in places) if self.mids else ()
                done[row.labels] = tuple(self.names[i] for i in places), mids
            names, mids = done[row.labels]
            found.append(replace(row, labels=names, mids=mids))
        return found

    def vocabulary(self, rows: Iterable[Row]) -> list[str]:
        """Returns class names in the order of their indices, for translated ``rows``."""
        met = (label for row in rows for label in row.labels)
        return list(self.names) if self.numbers else in_order(met)


def named(rows: list[Row], labels: Labels | None, beside: Path) -> Reading:
    """Returns ``rows`` with names for labels.

    The names are those of ``labels``, or of the label file in ``beside`` if every label is a mid,
    or the labels unchanged.

    Raises:
        UserError: as ``Labels.translate``.
    """
    notes = []
    met = {label for row in rows for label in row.labels}
    if labels is None and met and all(map(is_mid, met)):
        labels = labels_beside(beside)
        notes.append(
            f"labels are mids: names are those of {labels.path}"
            if labels
            else "labels are mids: class_labels_indices.csv beside them (bat-shard: --labels) "
            "gives their names"
        )
    if labels is None:
        return Reading(rows, in_order(met), notes)
    rows = labels.translate(rows)
    if not labels.numbers:
        notes.append(
            f"{labels.path.name} has no order of classes: they are those that occur, by name"
        )
    return Reading(rows, labels.vocabulary(rows), notes)


def by_number(pairs: set[tuple[str, int]]) -> list[str] | None:
    """Returns class names in the order of their publisher's numbers, ``class N`` for missing
    numbers.

    Returns None if a label has no number (-1), or has two, or shares one.
    """
    names, numbers = {name for name, _ in pairs}, {number for _, number in pairs}
    if not pairs or not len(pairs) == len(names) == len(numbers):
        return None
    if min(numbers) < 0 or max(numbers) >= 100_000:
        return None
    found = {number: name for name, number in pairs}
    return [found.get(i, f"class {i}") for i in range(max(numbers) + 1)]


def labels_beside(folder: Path) -> Labels | None:
    """Returns the label file in ``folder``, if there is one of the well-known ones."""
    paths = [folder / name for name in BESIDE if (folder / name).is_file()]
    return labels_of(paths[0]) if paths else None


def labels_of(path: Path) -> Labels:
    """Read a label file; its form is recognised by its content.

    Raises:
        UserError: missing, none of the forms above, or a duplicate name or number.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a file that names the classes")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: not a label file")
    try:
        if path.suffix.lower() == ".csv":
            labels = _csv(path, [cells for _, cells in csv_cells(path)])
        elif path.suffix.lower() == ".json":
            labels = _ontology(path, json.loads(path.read_text(encoding="utf-8-sig")))
        else:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            names = [line.strip() for line in lines if line.strip()]
            labels = Labels(path, tuple(names), numbers=tuple(range(len(names))))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a label file in UTF-8 ({error})") from error
    if not labels.names:
        raise UserError(f"{path} names no classes")
    labels = replace(
        labels, names=tuple(map(one_line, labels.names)), mids=tuple(map(one_line, labels.mids))
    )
    for values in (labels.names, labels.mids, labels.numbers):
        twice = next((value for value, count in Counter(values).items() if count > 1), None)
        if twice is not None:
            raise UserError(f"{path} lists {twice!r} twice: keep one of them")
    return labels


def _ontology(path: Path, entries: object) -> Labels:
    """Reads ``[{"id": mid, "name": ...}, ...]``; a name of several classes gets its mid added."""
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("id"), str) and isinstance(e.get("name"), str)
        for e in entries
    ):
        raise UserError(f'{path} is not an ontology: a list of {{"id": "/m/...", "name": "..."}}')
    names = [e["name"] for e in entries]
    many = {name for name, count in Counter(names).items() if count > 1}
    clear = (f"{e['name']} ({e['id']})" if e["name"] in many else e["name"] for e in entries)
    return Labels(path, tuple(clear), mids=tuple(e["id"] for e in entries))


def _csv(path: Path, lines: Sequence[Sequence[str]]) -> Labels:
    """Reads a number and a name a line, and a mid in all lines or none; the header is optional."""
    entries: list[tuple[int, str, str]] = []
    for number, line in enumerate(lines):
        cells = [cell for cell in line if cell]
        ids = [cell for cell in cells if re.fullmatch(r"\d{1,9}", cell, re.ASCII)]
        mids = [cell for cell in cells if is_mid(cell)]
        if number == 0 and not ids:
            continue
        rest = [cell for cell in cells if cell not in mids]
        if ids:
            rest.remove(ids[0])
        has_mid = bool(entries[0][1]) if entries else bool(mids)
        if not ids or len(rest) != 1 or len(mids) > 1 or bool(mids) != has_mid:
            raise UserError(
                f"{path}: {','.join(line)!r} is not 'index,mid,name' (or, like all lines, "
                f"'index,name'): give class_labels_indices.csv, or a text file, a name a line"
            )
        entries.append((int(ids[0]), mids[0] if mids else "", rest[0]))
    entries.sort()
    given = tuple(mid for _, mid, _ in entries if mid)
    return Labels(path, tuple(e[2] for e in entries), given, tuple(e[0] for e in entries))
