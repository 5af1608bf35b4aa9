"""DESED (Turpault et al. 2019): 10 classes of domestic sounds in clips of 10 s, strong and weak.

Reads every table below ``metadata/`` (``.tsv``, or ``.csv``, separated by tabs), whose audio lies
at the same place below ``audio/``: ``metadata/train/weak.tsv`` lists ``audio/train/weak/``,
``metadata/validation/validation.tsv`` ``audio/validation/`` (or ``validation/validation/``),
``metadata/train/synthetic21_train/soundscapes.tsv`` the folder ``soundscapes/`` there.

======================================  =========  ==============================================
table                                   split      columns
======================================  =========  ==============================================
``train/weak``                          ``weak``   ``filename, event_labels`` (commas), no times
``train/`` synthetic soundscapes        ``train``  ``filename, onset, offset, event_label``; a line
                                                   with a name alone is a clip without events
``validation/`` synthetic soundscapes   ``valid``  the same
``validation/validation``               ``test``   the same: the 1,168 recorded clips on which
                                                   results on DESED are reported
``eval/public``                         ``public`` the same; not used unless it is asked for
======================================  =========  ==============================================

Parts of other tables (``test_dcase2018``, ``eval_dcase2018``) and tables without labels are not
read. Recorded clips come from a video site, and many are gone: files that do not exist are left out
and counted. ``data.split=train,weak`` trains on both (level=clip: weak labels have no times).
"""

from __future__ import annotations

import functools
from pathlib import Path

from bat.errors import UserError
from bat.tasks.base import LeftOut, Reading, Row
from bat.tasks.events import Event
from bat.tasks.published import UNKNOWN, Mistakes, event_task, find_root, row_of
from bat.tasks.tables import numbered_lines

PUBLISHED = (
    "desed (DESED: recorded clips by the project's own script, synthetic soundscapes Zenodo "
    "3702397, public evaluation Zenodo 3588172; their folders audio and metadata merged)"
)
CLASSES = (
    *("Alarm_bell_ringing", "Blender", "Cat", "Dishes", "Dog", "Electric_shaver_toothbrush"),
    *("Frying", "Running_water", "Speech", "Vacuum_cleaner"),
)
PARTS = ("test_dcase2018", "eval_dcase2018")
"""Tables whose lines are in ``validation/validation`` too."""


def split_of(table: Path) -> str | None:
    """Returns the split of a table by its path below ``metadata``; None: it is not read."""
    first, name = table.parts[0], table.stem
    if name in PARTS or name == "unlabel_in_domain":
        return None
    if first == "train":
        return "weak" if name == "weak" else "train"
    if first == "validation":
        return "test" if name == "validation" else "valid"
    return "public" if (first, name) == ("eval", "public") else None


def find_clip(root: Path, table: Path, name: str) -> Path | None:
    """Returns the clip ``name`` of ``table`` (a path below ``metadata``), if it is there."""
    place = root / "audio" / table.with_suffix("")
    folders = [place, *list(place.parents)[: len(table.parts) - 1]]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def rows(root: Path) -> Reading:
    root = find_root(root, ("metadata", "audio"), PUBLISHED)
    mistakes = Mistakes(root, PUBLISHED)
    found: list[Row] = []
    left_out: list[LeftOut] = []
    meta = root / "metadata"
    tables = [path for suffix in ("tsv", "csv") for path in sorted(meta.rglob(f"*.{suffix}"))]
    read = {t: split for t in (p.relative_to(meta) for p in tables) if (split := split_of(t))}
    for table, split in read.items():
        columns, lines = numbered_lines(meta / table, delimiter="\t")
        weak = "event_labels" in columns
        needed = {"filename", *(("event_labels",) if weak else ("onset", "offset", "event_label"))}
        if not needed <= set(columns):
            lacks = ", ".join(sorted(needed - set(columns)))
            raise UserError(f"{meta / table} lacks {lacks}: it has {', '.join(columns)}")
        clips: dict[str, list[Event]] = {}
        tags: dict[str, list[str]] = {}
        for number, cells in lines:
            at = f"metadata/{table} line {number}"
            events = clips.setdefault(cells["filename"], [])
            if weak:
                names = [label.strip() for label in cells["event_labels"].split(",")]
                for label in set(names) - set(CLASSES):
                    mistakes.add(UNKNOWN, f"{label!r}, {at}")
                tags[cells["filename"]] = names
            elif cells["event_label"].lower() not in ("", "nan"):  # else without events
                times = cells["onset"], cells["offset"]
                event = mistakes.event(*times, cells["event_label"], known=CLASSES, at=at)
                events += [event] if event else []
        place = "-".join(table.with_suffix("").parts)
        locate = functools.partial(find_clip, root, table)
        for name, events in clips.items():
            file, key = locate(name), f"{place}-{Path(name).stem}"
            if file is None:
                left_out.append(LeftOut(key, f"{table.with_suffix('')}/{name}", "no file", split))
            elif weak:
                found.append(Row(file, key, tuple(tags[name]), split=split))
            else:
                found.append(row_of(file, key, events, split=split))
    mistakes.check()
    if not found:
        raise UserError(
            f"{root} has {len(read)} tables of {PUBLISHED}, and none of the {len(left_out)} clips "
            "that they list: put the audio at the same places below audio/; bat downloads nothing"
        )
    notes = [f"{len(left_out)} clips that the tables list have no file"] if left_out else []
    return Reading(found, list(CLASSES), notes, left_out)


TASK = event_task("desed", rows, CLASSES, layout=("metadata/validation/*", "audio/validation"))
