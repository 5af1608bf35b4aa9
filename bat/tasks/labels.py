"""What the labels of a source are called: mids and numbers become the names of the classes.

Files read (``labels_of``): ``class_labels_indices.csv`` of AudioSet (``index,mid,display_name``),
``label_descriptors.csv`` of EAT and FSD50K's ``vocabulary.csv`` (no header; a number, a mid, a
name, in any order), AudioSet's ``ontology.json``, a text file with one name a line. The first, the
second and the last number the classes, so the vocabulary is theirs; the ontology does not, and the
vocabulary is what occurs, sorted.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bat.shapes import UserError
from bat.tasks.base import LeftOut, Row

BESIDE = ("class_labels_indices.csv", "label_descriptors.csv", "ontology.json")
"""Label files that are found without being named, the first of them first."""
MAX_FILE_BYTES = 64 << 20


def is_mid(text: str) -> bool:
    """Whether ``text`` is a machine id such as ``/m/09x0r`` or ``/t/dd00088``."""
    return re.fullmatch(r"/[a-z]{1,2}/[\w-]+", text, re.ASCII) is not None


@dataclass(frozen=True)
class Labels:
    """Names of classes and what else stands for them; ``labels_of`` reads it."""

    path: Path
    names: tuple[str, ...]
    mids: tuple[str, ...] = ()
    """Of ``names``, one each; empty: none."""
    numbers: tuple[int, ...] = ()
    """Of ``names``, ascending; empty: the classes have no order of their own."""

    def translate(self, rows: Iterable[Row]) -> list[Row]:
        """``rows`` with names for labels, and mids where they are known.

        Raises:
            UserError: a label that is neither a name, nor a mid, nor a number of these.
        """
        known = {str(n): i for i, n in enumerate(self.numbers)}
        known |= {mid: i for i, mid in enumerate(self.mids)}
        known |= {name: i for i, name in enumerate(self.names)}
        # one entry for all rows with these labels: memory for two million rows
        done: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...]]] = {}
        found = []
        for row in rows:
            if row.labels not in done:
                try:
                    places = list(dict.fromkeys([known[label] for label in row.labels]))
                except KeyError as error:
                    raise self._unknown(error.args[0], row) from None
                mids = tuple(self.mids[i] for i in places) if self.mids else ()
                done[row.labels] = tuple(self.names[i] for i in places), mids
            names, mids = done[row.labels]
            found.append(replace(row, labels=names, mids=mids))
        return found

    def vocabulary(self, rows: Iterable[Row]) -> list[str]:
        """Class names in the order of their indices, for translated ``rows``."""
        return list(self.names) if self.numbers else names_met(rows)

    def _unknown(self, label: str, row: Row) -> UserError:
        close = difflib.get_close_matches(label, [*self.names, *self.mids], 1)
        what = f" (did you mean {close[0]!r}?)" if close else ""
        return UserError(
            f"label {label!r} of {row.name} is not in {self.path.name}{what}: give the label file "
            f"that belongs to the clips"
        )


def names_met(rows: Iterable[Row]) -> list[str]:
    """The labels that occur, sorted; by value where all are whole numbers."""
    met = {label for row in rows for label in row.labels}
    if all(re.fullmatch(r"\d{1,9}", label, re.ASCII) for label in met):
        return sorted(met, key=lambda label: (int(label), label))
    return sorted(met)


@dataclass(frozen=True)
class Reading:
    """What a reader of sources found."""

    rows: list[Row]
    vocabulary: list[str]
    """Class names in the order of their indices."""
    notes: list[str]
    """What a user should know of how it was read."""
    left_out: list[LeftOut] = field(default_factory=list)
    """What the source lists and does not hold."""


def named(rows: list[Row], labels: Labels | None, beside: Path) -> Reading:
    """``rows`` with names for labels: those of ``labels``, or of the label file in ``beside``
    where every label is a mid, or as they are.

    Raises:
        UserError: as ``Labels.translate``.
    """
    notes = []
    if labels is None:
        met = {label for row in rows for label in row.labels}
        if met and all(map(is_mid, met)):
            labels = labels_beside(beside)
            notes.append(
                f"labels are mids: names are those of {labels.path}"
                if labels
                else "labels are mids: --labels class_labels_indices.csv gives their names"
            )
        if labels is None:
            return Reading(rows, names_met(rows), notes)
    rows = labels.translate(rows)
    if not labels.numbers:
        notes.append(
            f"{labels.path.name} has no order of classes: they are those that occur, by name"
        )
    return Reading(rows, labels.vocabulary(rows), notes)


def by_number(pairs: set[tuple[str, int]]) -> list[str] | None:
    """Class names in the order of the numbers that their publisher gave them, ``class N`` for one
    that does not occur; None where a label has no number (-1), or has two, or shares one.
    """
    names, numbers = {name for name, _ in pairs}, {number for _, number in pairs}
    if not pairs or not len(pairs) == len(names) == len(numbers):
        return None
    if min(numbers) < 0 or max(numbers) >= 100_000:
        return None
    found = {number: name for name, number in pairs}
    return [found.get(i, f"class {i}") for i in range(max(numbers) + 1)]


def labels_beside(folder: Path) -> Labels | None:
    """The label file that lies in ``folder``, if one of the well-known ones does."""
    paths = [folder / name for name in BESIDE if (folder / name).is_file()]
    return labels_of(paths[0]) if paths else None


def labels_of(path: Path) -> Labels:
    """Read a label file; its form is told by its content.

    Raises:
        UserError: missing, none of the forms above, or a name or number twice.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a file that names the classes")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: not a label file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            labels = _ontology(path, json.loads(text))
        elif path.suffix.lower() == ".csv":
            labels = _csv(path, list(csv.reader(text.splitlines(), skipinitialspace=True)))
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
            labels = Labels(path, tuple(names), numbers=tuple(range(len(names))))
    except UserError:
        raise
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{path} is not a label file in UTF-8 ({error})") from error
    if not labels.names:
        raise UserError(f"{path} names no classes")
    for values in (labels.names, labels.mids, labels.numbers):
        twice = _twice(values)
        if twice is not None:
            raise UserError(f"{path} lists {twice!r} twice: keep one of them")
    return labels


def _ontology(path: Path, entries: object) -> Labels:
    """``[{"id": mid, "name": ...}, ...]``; a name of several classes gets its mid added."""
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
    """A number and a name a line, and a mid in all lines or in none; a header at will."""
    entries: list[tuple[int, str, str]] = []
    for number, line in enumerate(lines):
        cells = [cell.strip() for cell in line if cell.strip()]
        ids = [cell for cell in cells if re.fullmatch(r"\d{1,9}", cell, re.ASCII)]
        mids = [cell for cell in cells if is_mid(cell)]
        if not cells or (number == 0 and not ids):
            continue
        rest = [cell for cell in cells if cell not in mids]
        if ids:
            rest.remove(ids[0])
        if not ids or len(mids) > 1 or len(rest) != 1:
            raise UserError(
                f"{path}: {','.join(line)!r} is not 'index,mid,name' (or 'index,name'): give "
                f"class_labels_indices.csv, or a text file with one name a line"
            )
        entries.append((int(ids[0]), mids[0] if mids else "", rest[0]))
    entries.sort()
    given = tuple(mid for _, mid, _ in entries if mid)
    if given and len(given) < len(entries):
        bare = next(name for _, mid, name in entries if not mid)
        raise UserError(f"{path}: {bare!r} has no mid, others have one")
    return Labels(path, tuple(e[2] for e in entries), given, tuple(e[0] for e in entries))


def _twice(values: Sequence[str] | Sequence[int]) -> str | int | None:
    seen: set[str | int] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
