"""Defines tasks: rows (file, key, labels, events or text, fold), targets, loss and metrics.

``bat/tasks/NAME.py`` holds ``TASK``; a dotted import path (``my_tasks.FROGS``) works wherever a
name does, so that a task can live outside this package. A task has no Dataset class.
docs/add_a_task.md has a complete example; the constants are those of docs/method.md 5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from bat import registry
from bat.errors import UserError
from bat.io import missing
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
    seconds: float | None = None
    """The clip is this much of ``path`` from ``start_seconds`` on, read by seeking, as 16-bit PCM;
    None: the file is the clip."""
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
    listed_seconds: float = 0.0
    """Length of the clip that the source states; 0: none."""
    line: int = 0
    """Line of the CSV that lists it first; 0: none."""

    @property
    def place(self) -> tuple[float, float] | None:
        """Start and length of the clip in its file, seconds; None: the file is the clip."""
        return None if self.seconds is None else (self.start_seconds, self.seconds)

    @property
    def suffix(self) -> str:
        """The suffix in lower case without a dot: ``flac``, ``wav``, ..."""
        return "wav" if self.seconds is not None else self.codec or self.path.suffix[1:].lower()

    @property
    def name(self) -> str:
        """The name of the file for messages."""
        inside = any(x is not None for x in (self.span, self.cell, self.seconds))
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
class Reading:
    """The rows and labels read from a source."""

    rows: list[Row]
    vocabulary: list[str]
    """Class names in the order of their indices."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user on how it was read."""
    left_out: list[LeftOut] = field(default_factory=list)
    """Clips that the source lists and does not hold."""

    @property
    def events(self) -> dict[str, tuple[Event, ...]] | None:
        """Events by the rows' keys; None if no row has any."""
        found = {row.key: row.events for row in self.rows if row.events is not None}
        return found or None

    @property
    def lines(self) -> dict[str, int]:
        """The line of the CSV that lists each clip first, by the rows' keys."""
        return {row.key: row.line for row in self.rows}


@dataclass(frozen=True)
class Task:
    """Rows and constants; ``open`` reads the rows with the checks common to all tasks."""

    name: str
    rows: Callable[[Path], list[Row] | Reading]
    """Reads the data set at a path; a ``Reading`` if it has notes, clips left out, or an order of
    classes that is neither ``vocabulary`` nor the sorted names."""
    target: Target
    loss: str = ""
    """``ce``, ``bce``, ``asl`` or ``ctc``; empty: that of ``USUAL``."""
    metrics: tuple[str, ...] = ()
    """Names of metrics (``bat.metrics.base.find_metric``); settings are selected by the first
    (unless ``selects`` names another), which reports also show first. Empty: those of
    ``USUAL``."""
    frames: int | None = None
    """Spectrogram frames of every clip, as in the papers for their tasks: shorter clips are padded
    with zero frames, which the encoder attends to. None: each clip is encoded at its own length."""
    per_class: int = 20
    """Prototypes per class that *Unmute the Patch Tokens* (arXiv 2509.24901) uses for the task."""
    classes: int | None = None
    """Number of classes where the task fixes it."""
    vocabulary: Sequence[str] | None = None
    """Class names in the order of their indices; None: the labels that occur, sorted."""
    label_sets: tuple[frozenset[str], ...] = ()
    """The class names of the published files, in each of their spellings; empty: any names."""
    adapts: bool = False
    """True if the data determine ``target`` (custom data), see ``settle``."""
    make: Callable[[Path], None] | None = None
    """Writes the task's synthetic clips to a folder, which ``rows`` then reads, if no data are
    given; writing them again gives the same bytes."""
    statistics: str = "audioset"
    """Data set whose statistics standardise the clips in a Kaldi front end, where the checkpoint
    does not record its own: a name of ``bat.audio.frontend.STATISTICS``."""
    layout: tuple[str, ...] = ()
    """Patterns that match files in the folder of the published data, or the folder itself, and
    nothing else: ``bat-shard`` knows the task by them. Empty: it is named there."""
    detection: Detection = Detection()  # noqa: RUF009  (immutable)
    """Constants of target ``events``."""
    selects: str = ""
    """Metric that selects settings and steps on validation clips, one of ``metrics``; empty: the
    first of them."""
    tokens: Literal["characters", "words"] = "characters"
    """Units of the text of target ``tokens``; words are separated by blanks."""
    symbols: str = ""
    """Characters that a head gives, in the order of its outputs from 1 on: texts are lower-cased,
    others in them dropped. Empty: those of the training texts, sorted."""

    def __post_init__(self) -> None:
        loss, metrics = USUAL[self.target]
        object.__setattr__(self, "loss", self.loss or loss)
        object.__setattr__(self, "metrics", self.metrics or metrics)

    @property
    def metric(self) -> str:
        """The name of the main metric's value."""
        return self.metrics[0].rpartition(".")[2]

    @property
    def selection_metric(self) -> str:
        """The name of the value that selects on validation clips."""
        return (self.selects or self.metrics[0]).rpartition(".")[2]

    @property
    def multi_label(self) -> bool:
        """True if a clip may carry several labels, or none."""
        return self.target != "class"

    def asking(self, target: Target, *, metrics: tuple[str, ...] = ()) -> Task:
        """Returns this task with another target and that target's usual loss and metrics."""
        if target == self.target:
            return self
        return replace(self, target=target, loss="", metrics=metrics, selects="")

    def text_of(self, text: str) -> str:
        """Returns ``text`` as it is asked for: of ``symbols`` alone, if the task has some."""
        return "".join(c for c in text.lower() if c in self.symbols) if self.symbols else text

    def open(self, root: str | Path) -> Reading:
        """Reads the data set at ``root``.

        Raises:
            UserError: missing root, no rows, a duplicate key, another number of classes, a label
                that the vocabulary lacks.
        """
        root = Path(root)
        if not root.exists():
            raise UserError(f"{missing(root)}: give the folder of task {self.name!r}")
        found = self.rows(root)
        if not isinstance(found, Reading):
            labels = (label for row in found for label in row.labels)
            found = Reading(found, list(self.vocabulary or in_order(labels)))
        if not found.rows:
            raise UserError(f"{root} has no clips for task {self.name!r}")
        seen: set[str] = set()
        names = set(found.vocabulary)
        for row in found.rows:
            if row.key in seen:
                raise UserError(f"{row.key!r} is listed twice in {root}: keep one line of it")
            seen.add(row.key)
            for event in row.events or ():
                onset, offset = event.onset_seconds, event.offset_seconds
                if not 0 <= onset < offset < math.inf:
                    raise UserError(
                        f"{root}: clip {row.key!r} has an event from {onset:g} to {offset:g} s: an "
                        "onset is not negative, and the offset is after it"
                    )
            if not names.issuperset(row.labels):
                label = next(label for label in row.labels if label not in names)
                raise UserError(f"{root}: label {label!r} is not among the {len(names)} classes")
        if self.classes is not None and len(names) != self.classes:
            raise UserError(
                f"{root} has {len(names)} classes, task {self.name!r} has {self.classes}: "
                f"choose the task that fits, or task=folder for labels of your own"
            )
        return found

    def read(self, root: str | Path) -> tuple[list[Row], list[str]]:
        """Returns the rows and class names that ``open`` reads."""
        found = self.open(root)
        return found.rows, found.vocabulary

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


def load_task(name: str) -> Task:
    """Returns the task called ``name``: a file of this folder, or a dotted ``package.module.TASK``.

    Raises ``UserError`` that lists the known ones.
    """
    return registry.find_object(name, Task, folder="tasks", key="task")


def in_order(names: Iterable[str]) -> list[str]:
    """Returns ``names``, each once, sorted; by value if all of them are numbers."""
    known = set(names)
    if all(re.fullmatch(r"[+-]?\d{1,15}(\.\d{1,15})?", name, re.ASCII) for name in known):
        return sorted(known, key=lambda name: (float(name), name))
    return sorted(known)
