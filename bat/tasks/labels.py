"""Reads the labels of a source: texts, lists and numbers become names of classes.

``names_of`` reads every label, from any source (a CSV, JSON, parquet, a folder's name);
``listed_clips`` reads a user's CSV with its columns; ``doubts`` reports class names that look
unintended.

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from bat.errors import UserError
from bat.redact import one_line
from bat.tasks.base import LeftOut, Row, csv_cells, in_order, numbered_lines

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
        inner = _items(item) if isinstance(item, str) else None
        found += [_name(x) for x in ([item] if inner is None else inner)]
    return [name for name in found if name]


def _items(text: str) -> list[Any] | None:
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
    items = _items(text)
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
    twins = [several for several in alike.values() if len(several) > 1]
    if twins:
        shown = "; ".join(" and ".join(map(_spelled, several)) for several in twins[:3])
        found.append(
            f"{len(twins)} class(es) in several spellings, taken for different ones: {shown}"
            f"{'; ...' if len(twins) > 3 else ''}. Write them alike if they are the same"
        )
    for words, why in (
        ([n for n in names if n.lower() in PERHAPS_MISSING],
         "if that is a missing value, leave the label empty"),
        ([n for n in names if n[:1] in "[({" and n[-1:] in "])}"],
         "if that is a list, write ['a', 'b']"),
    ):  # fmt: skip
        if words:
            found.append(f"a class is called {', '.join(map(repr, words[:3]))}: {why}")
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
        """Returns class names in the order of their indices, for translated ``rows``."""
        return list(self.names) if self.numbers else names_met(rows)

    def _unknown(self, label: str, row: Row) -> UserError:
        close = difflib.get_close_matches(label, [*self.names, *self.mids], 1)
        what = f" (did you mean {close[0]!r}?)" if close else ""
        return UserError(
            f"label {label!r} of {row.name} is not in {self.path.name}{what}: give the label file "
            f"that belongs to the clips"
        )


def names_met(rows: Iterable[Row]) -> list[str]:
    """Returns the labels that occur, sorted; by value if all are numbers."""
    return in_order(label for row in rows for label in row.labels)


@dataclass(frozen=True)
class Reading:
    """The rows and labels read from a source."""

    rows: list[Row]
    vocabulary: list[str]
    """Class names in the order of their indices."""
    notes: list[str]
    """Notes for the user on how it was read."""
    left_out: list[LeftOut] = field(default_factory=list)
    """Clips that the source lists and does not hold."""


def named(rows: list[Row], labels: Labels | None, beside: Path) -> Reading:
    """Returns ``rows`` with names for labels.

    The names are those of ``labels``, or of the label file in ``beside`` if every label is a mid,
    or the labels unchanged.

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
        twice = _twice(values)
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


COLUMNS = ("path", "label", "labels", "fold", "split", "onset", "offset", "text")
ALSO_CALLED = {
    **dict.fromkeys(("file", "filename", "filepath", "audio", "wav", "clip", "fname"), "path"),
    **dict.fromkeys(("class", "category", "target", "tag", "eventlabel", "classname"), "label"),
    **dict.fromkeys(("classes", "categories", "targets", "tags"), "labels"),
    **dict.fromkeys(("transcript", "transcription", "sentence"), "text"),
    **dict.fromkeys(("set", "subset", "partition"), "split"),
    **dict.fromkeys(("start", "begin", "starttime", "onsettime", "startseconds"), "onset"),
    **dict.fromkeys(("end", "stop", "endtime", "offsettime", "endseconds"), "offset"),
}
"""Other names of the columns, in lower case without ``_``, ``-`` and blanks."""
ZEROS, ONES = ("0", "0.0", "false"), ("1", "1.0", "true")
"""Cells of a one-hot column, in lower case."""

Line = tuple[int, dict[str, str]]


class Listed(NamedTuple):
    """A user's CSV, with its columns renamed to those of ``COLUMNS``."""

    columns: list[str]
    lines: list[Line]
    """``(number, cells)``"""
    labels: list[tuple[str, ...]]
    """Labels of each line; empty: none."""
    notes: list[str]
    """Notes for the user on how it was read."""


def listed_clips(path: Path, known: Sequence[str] = COLUMNS) -> Listed:
    """Read a CSV whose columns are those of ``known``, or are named as in ``ALSO_CALLED``, in any
    case.

    Without a column of labels, two or more columns of 0 and 1 are read as one class each.

    Raises:
        UserError: no such file or not a CSV, an unknown or duplicate column, no ``path`` in the
            header or in a line, a cell that looks like a list and is none.
    """
    given, raw = numbered_lines(path)
    columns, notes = _columns(given, path, known)
    classes = _one_hot(given, columns, raw)
    unknown = next((c for c in given if c not in columns and c not in classes), None)
    if unknown is not None:
        raise UserError(f"{path} line 1: {_unknown(unknown, known)}")
    if "path" not in columns.values():
        raise UserError(
            f"{path} line 1: no column 'path' (it has: {', '.join(given) or 'nothing'}): name the "
            "audio files in one"
        )
    if {"label", "labels"} <= set(columns.values()):
        raise UserError(f"{path} line 1: both 'label' and 'labels': keep one of them")
    if not raw:
        raise UserError(f"{path} lists no clips: below its header, give a line a clip")
    lines = [(n, {new: cells[old] for old, new in columns.items()}) for n, cells in raw]
    for number, line in lines:
        if not line["path"]:
            raise UserError(f"{path} line {number}: no path")
    if classes:
        notes.append(f"columns of 0 and 1 are classes: {', '.join(classes)}")
        found = [tuple(c for c in classes if cells[c].lower() in ONES) for _, cells in raw]
        never = [c for c in classes if not any(c in names for names in found)]
        if never:
            notes.append(f"no clip is of {', '.join(never)}: left out of the classes")
        labels = [tuple(map(one_line, names)) for names in found]
    else:
        labels, said = _cells(lines, path)
        notes += said
    return Listed(list(columns.values()), lines, labels, notes)


def _columns(
    given: Sequence[str], path: Path, known: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Returns ``{name in the file: name in known}`` of the columns that are known, and notes."""
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(given) == 1 and separator in given[0]:
            raise UserError(
                f"{path} line 1: the columns are separated by {name} ({given[0]!r}): save the file "
                "with commas (Excel and LibreOffice: 'CSV UTF-8', field separator ',')"
            )
    found: dict[str, str] = {}
    for column in given:
        if given.count(column) > 1 and column:
            raise UserError(f"{path} line 1: column {column!r} is there twice: keep one of them")
        plain = _plain(column)
        name = plain if plain in known else ALSO_CALLED.get(plain, "")
        if name in known:
            other = next((old for old, new in found.items() if new == name), None)
            if other is not None:
                raise UserError(
                    f"{path} line 1: columns {other!r} and {column!r} are both read as {name!r}: "
                    "keep one of them"
                )
            found[column] = name
    renamed = [f"{old!r} as {new!r}" for old, new in found.items() if old != new]
    return found, [f"columns read: {', '.join(renamed)}"] if renamed else []


def _plain(column: str) -> str:
    return re.sub("[_ -]", "", column.lower())


def _one_hot(given: Sequence[str], columns: dict[str, str], lines: Sequence[Line]) -> list[str]:
    """Returns the columns that are classes: all others, if they hold only 0 and 1."""
    others = [c for c in given if c not in columns]
    names = (*COLUMNS, *ALSO_CALLED)
    if {"label", "labels"} & set(columns.values()) or len(others) < 2 or not lines:
        return []
    plain = all(c and not difflib.get_close_matches(_plain(c), names, 1, 0.8) for c in others)
    cells = (line[c].lower() for _, line in lines for c in others)
    return others if plain and all(cell in (*ZEROS, *ONES) for cell in cells) else []


def _unknown(column: str, known: Sequence[str]) -> str:
    if not column or column.startswith("Unnamed:"):
        return (
            f"column {column!r} has no name: remove it (pandas: to_csv(..., index=False); a comma "
            "at the end of the header makes one too)"
        )
    meant = next(iter(difflib.get_close_matches(_plain(column), known, n=1)), None)
    hint = f" (did you mean {meant!r}?)" if meant else ""
    return f"unknown column {column!r}{hint}; known are {', '.join(known)}. Rename or remove it"


def _cells(lines: Sequence[Line], path: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """Returns the labels of each line, of column ``label`` or ``labels``, and notes."""
    column = "label" if "label" in lines[0][1] else "labels"
    texts = [line.get(column, "") for _, line in lines]
    separator = None
    if column == "labels":
        separator = ";" if any(";" in text and _items(text) is None for text in texts) else ","
    labels = []
    for (number, _), text in zip(lines, texts, strict=True):
        try:
            labels.append(cell_names(text, separator))
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}") from None
    notes = []
    joined = next((text for text in texts if ";" in text and _items(text) is None), None)
    if joined is not None and column == "label":
        notes.append(f"column 'label' has one class a line: {joined!r} is one; else say 'labels'")
    absent = [
        n for (n, _), text in zip(lines, texts, strict=True) if text and text.lower() in MISSING
    ]
    if absent:
        notes.append(f"{len(absent)} lines say that the label is missing (nan; line {absent[0]})")
    return labels, notes
