"""Defines tasks: rows (file, key, labels, events or text, fold), targets, loss and metrics.

The file name is the registration: ``bat/tasks/NAME.py`` holds ``TASK``. A dotted import path
(``mylab.tasks.frogs``, a module with a ``TASK``) works wherever a name does, so that a task can
live outside this package. A task has no Dataset class. docs/add_a_task.md has a complete example;
the constants are those of docs/method.md 5.
"""

from __future__ import annotations

import csv
import importlib
import io
import os
import pkgutil
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from bat.errors import UserError
from bat.tasks.events import Detection, Event

Target = Literal["class", "tags", "events", "tokens"]
"""Target of a clip: one label (class); any number of labels (tags); sounds with onset and offset
(events); a sequence of tokens, that is a transcript (tokens)."""
USUAL: dict[Target, tuple[str, tuple[str, ...]]] = {
    "class": ("ce", ("accuracy", "map", "f1")),
    "tags": ("bce", ("map", "f1", "auroc")),
    "events": ("bce", ("event_f1", "segment_f1", "map")),
    "tokens": ("ctc", ("token_error_rate", "wer", "cer")),
}
"""Loss and metrics of a task that names none."""

AUDIO_SUFFIXES = (
    *("flac", "mp3", "ogg", "opus", "wav"),
    *("aif", "aifc", "aiff", "au", "avr", "caf", "htk", "iff", "ircam", "mp1", "mp2", "mpga"),
    *("nist", "oga", "paf", "pvf", "rf64", "sds", "sf", "snd", "sph", "svx", "voc", "w64", "wave"),
    *("wve", "xi"),
)
"""Suffixes that libsndfile reads. A shard's table holds indices into this list: add at its end."""
UNDECODED_SUFFIXES = (
    *("3gp", "aac", "ac3", "amr", "ape", "asf", "dff", "dsf", "eac3", "m4a", "m4b", "mka", "mkv"),
    *("mp4", "mpc", "pcm", "ra", "raw", "sd2", "shn", "spx", "tak", "tta", "weba", "webm", "wma"),
    *("wv",),
)
"""Suffixes of audio that libsndfile cannot read: found, and left out with a reason of its own."""


def no_decoder(suffix: str) -> str:
    """Returns the reason why a clip with one of ``UNDECODED_SUFFIXES`` is left out."""
    return f"no decoder for {suffix}: convert it with ffmpeg"


def as_text(name: str) -> str:
    """Returns a file's name as text: bytes of it that are not UTF-8 become ``\\xNN``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Row:
    """One audio file of a task, before it is in a shard."""

    path: Path
    key: str
    """Unique in the task; becomes the sample key (escaped if necessary)."""
    labels: tuple[str, ...]
    """Names of the classes; empty: unlabelled."""
    fold: int | None = None
    """Cross-validation fold, from 1."""
    split: str | None = None
    """``train``, ``test`` or any other name of the source."""
    start_seconds: float = 0.0
    """Start of the clip in the recording it was cut from."""
    mids: tuple[str, ...] = ()
    """Machine ids of ``labels`` where the source has them (AudioSet)."""
    span: tuple[int, int] | None = None
    """``(offset, size)``: the file is these bytes of ``path`` (a member of a tar)."""
    cell: tuple[int, int] | None = None
    """``(row group, row)``: the file is this cell of the parquet file ``path``."""
    codec: str = ""
    """Suffix of the bytes where ``path`` does not have it."""
    events: tuple[Event, ...] | None = None
    """Sounds with onset and offset; ``labels`` is then the union of their labels. None: unknown."""
    text: str | None = None
    """The transcript; None: there is none."""

    @property
    def suffix(self) -> str:
        """The suffix in lower case without a dot: ``flac``, ``wav``, ..."""
        return self.codec or self.path.suffix[1:].lower()

    @property
    def name(self) -> str:
        """The name of the file for messages."""
        inside = self.span is not None or self.cell is not None
        name = as_text(self.path.name)
        return f"{name}/{self.key}" if inside else name


class LeftOut(NamedTuple):
    """A clip that the source names and that is not among its rows, or not in the shards."""

    key: str
    file: str
    reason: str
    split: str | None = None
    """Split that the clip would have had."""


@dataclass(frozen=True)
class Task:
    """Rows and constants. ``read`` is ``rows`` with the checks common to all tasks."""

    name: str
    rows: Callable[[Path], list[Row]]
    target: Target
    loss: str = ""
    """``ce``, ``bce``, ``asl`` or ``ctc``; empty: that of ``USUAL``."""
    metrics: tuple[str, ...] = ()
    """Names of metrics (``bat.metrics.base.find_metric``); settings are selected by the first,
    which reports also show first. Empty: those of ``USUAL``."""
    frames: int | None = None
    """Spectrogram frames of every clip, as in the papers for their tasks: shorter clips are padded
    with zero frames, which the encoder attends to. None: each clip is encoded at its own length."""
    per_class: int = 20
    """Prototypes per class that *Unmute the Patch Tokens* (arXiv 2509.24901) uses for the task."""
    classes: int | None = None
    """Number of classes where the task fixes it; ``read`` checks it."""
    vocabulary: Callable[[Path], list[str]] | None = None
    """Class names in the order of their indices; None: the labels that occur, sorted."""
    left_out: Callable[[Path], list[LeftOut]] | None = None
    """Clips that the source lists and does not hold; None: none, or unknown."""
    label_sets: tuple[frozenset[str], ...] = ()
    """The class names of the published files, in each of their spellings; empty: any names."""
    adapts: bool = False
    """True if the data determine ``target`` (custom data), see ``settle``."""
    make: Callable[[Path], None] | None = None
    """Writes the task's synthetic clips to a folder, which ``rows`` then reads, if no data are
    given; writing them again gives the same bytes."""
    detection: Detection = Detection()  # noqa: RUF009  (immutable)
    """Constants of target ``events``."""
    tokens: Literal["characters", "words"] = "characters"
    """Units of the text of target ``tokens``; words are separated by blanks."""

    def __post_init__(self) -> None:
        loss, metrics = USUAL[self.target]
        object.__setattr__(self, "loss", self.loss or loss)
        object.__setattr__(self, "metrics", self.metrics or metrics)

    @property
    def metric(self) -> str:
        """The name of the main metric's value."""
        return self.metrics[0].rpartition(".")[2]

    @property
    def multi_label(self) -> bool:
        """True if a clip may carry several labels, or none."""
        return self.target != "class"

    def asking(self, target: Target, *, metrics: tuple[str, ...] = ()) -> Task:
        """Returns this task with another target and that target's usual loss and metrics."""
        if target == self.target:
            return self
        return replace(self, target=target, loss="", metrics=metrics)

    def read(self, root: str | Path) -> tuple[list[Row], list[str]]:
        """Returns rows and class names of the data set at ``root``.

        Raises:
            UserError: missing root, no rows, a duplicate key, another number of classes, a label
                that the vocabulary lacks.
        """
        root = Path(root)
        if not root.exists():
            raise UserError(f"{root} does not exist: give the folder of task {self.name!r}")
        rows = self.rows(root)
        if not rows:
            raise UserError(f"{root} has no clips for task {self.name!r}")
        seen: set[str] = set()
        for row in rows:
            if row.key in seen:
                raise UserError(f"{row.key!r} is listed twice in {root}: keep one line of it")
            seen.add(row.key)
        found = in_order(label for row in rows for label in row.labels)
        names = self.vocabulary(root) if self.vocabulary else found
        unknown = [label for label in found if label not in set(names)]
        if unknown:
            raise UserError(f"{root}: label {unknown[0]!r} is not among the {len(names)} classes")
        if self.classes is not None and len(names) != self.classes:
            raise UserError(
                f"{root} has {len(names)} classes, task {self.name!r} has {self.classes}: "
                f"choose the task that fits, or task=folder for labels of your own"
            )
        return rows, names

    def settle(self, labels_per_clip: Iterable[int]) -> Task:
        """Returns the task for a data set whose clips have these numbers of labels.

        Raises:
            UserError: several labels on a clip of a task with one label a clip.
        """
        if self.multi_label or max(labels_per_clip, default=0) <= 1:
            return self
        if not self.adapts:
            raise UserError(
                f"task {self.name!r} takes one label a clip, the data has clips with several: "
                f"use task=folder or a multi-label task"
            )
        return self.asking("tags")


NO_TASKS = ("base", "events", "labels", "losses", "synthetic")
"""Files of this folder that are not tasks."""


def known_tasks() -> list[str]:
    """Returns the names of the tasks in ``bat/tasks``."""
    import bat.tasks

    names = (m.name for m in pkgutil.iter_modules(bat.tasks.__path__))
    return sorted(name for name in names if name not in NO_TASKS)


def load_task(name: str) -> Task:
    """Returns the task called ``name``: a file of ``bat/tasks`` or a dotted import path.

    Raises:
        UserError: unknown name (lists the known ones), or a module without ``TASK``.
    """
    module = name if "." in name else f"bat.tasks.{name}"
    known = ", ".join(known_tasks())
    if "." not in name and name not in known_tasks():
        raise UserError(f"no task {name!r}: known are {known}; or give a dotted import path")
    try:
        task = getattr(importlib.import_module(module), "TASK", None)
    except ImportError as error:
        raise UserError(f"task {name!r} cannot be imported ({error}); known are {known}") from error
    if not isinstance(task, Task):
        raise UserError(f"{module} has no TASK of type bat.tasks.base.Task; known are {known}")
    return task


def csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields number and cells of each line of a CSV (the first is 1), values stripped.

    Empty lines are skipped.

    Raises:
        UserError: no such file, not UTF-8 text, quotes that do not close.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder: name the CSV in it, or say task=folder data.root={path}"
        )
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a CSV")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save the file as "
            "'CSV UTF-8'"
        ) from error
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        for raw in reader:
            cells = [cell.strip() for cell in raw]
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV ({error})") from error


def numbered_lines(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Returns the columns of a CSV, and its lines with their numbers (a header is line 1), values
    stripped.

    Empty lines are skipped; missing cells at the end of a line are empty.

    Raises:
        UserError: as ``csv_cells``, and for a line with more cells than the header.
    """
    cells = csv_cells(path)
    _, columns = next(cells, (0, []))
    lines = []
    for number, line in cells:
        if len(line) > len(columns):
            raise UserError(
                f"{path} line {number} has {len(line)} cells, the header has {len(columns)}: "
                'put a value that holds a comma between quotes ("a, b")'
            )
        filled = [*line, *[""] * (len(columns) - len(line))]
        lines.append((number, dict(zip(columns, filled, strict=True))))
    return columns, lines


def read_csv(path: Path, required: Iterable[str]) -> list[dict[str, str]]:
    """Reads the lines of a CSV with a header, values stripped.

    Raises:
        UserError: as ``numbered_lines``, and where a column of ``required`` is missing.
    """
    columns, lines = numbered_lines(path)
    missing = [c for c in required if c not in columns]
    if missing:
        raise UserError(
            f"{path} lacks column {missing[0]!r}; it has: {', '.join(columns) or 'nothing'}"
        )
    return [cells for _, cells in lines]


def in_order(names: Iterable[str]) -> list[str]:
    """Returns ``names``, each once, sorted; by value if all of them are numbers."""
    known = set(names)
    if all(re.fullmatch(r"[+-]?\d{1,15}(\.\d{1,15})?", name, re.ASCII) for name in known):
        return sorted(known, key=lambda name: (float(name), name))
    return sorted(known)


def other_form(path: str | Path) -> str:
    """Returns a remark for a message about a missing file if a file of that name exists in the
    other Unicode form (macOS writes an accent as a character of its own); else nothing."""
    folder, name = os.path.split(path)
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, name)
        if other != name and os.path.isfile(os.path.join(folder, other)):
            return f" ({name!r} exists in Unicode form {form}: write it so, or rename the file)"
    return ""


def whole_number(value: str, *, column: str, path: Path) -> int:
    """Converts ``value`` to an int; raises a UserError that names the file and the column."""
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{path}: {column} {value!r} is not a whole number") from None
