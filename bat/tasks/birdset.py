"""BirdSet (Rauch et al. 2024): species of birds in 5-s clips of soundscapes; eight sets.

``data.root`` is the folder of a set as published, ``NAME/``, the folder that holds it, or the
Hugging Face hub's cached folder (``datasets--...``): ``NAME_metadata_train.parquet`` and
``NAME_metadata_test_5s.parquet`` beside ``NAME_train_shard_0001.tar.gz``, ... and
``NAME_test5s_shard_0001.tar.gz``, ... A row's file is the member of a shard with the base name of
its ``filepath``, its labels are ``ebird_code_multilabel`` (none: a clip without birds).

Splits: ``train``, recordings of any length, and ``test``, the 5-s clips (``test_5s``). There is no
validation split. Soundscapes as a whole (``test``) are not read.

A ``.tar.gz`` cannot be read at random, so each is unpacked once to a ``.tar`` beside it (Ogg gains
nothing from gzip: it takes as much again), which is read by index. Where a ``.tar`` is there it is
used as it is. Without shards, audio files anywhere below the folder of the set are taken.

Classes: in their published order for HSN; for others in that of ``NAME_ebird_codes.json`` (of
BirdSet's repository, ``resources/ebird_codes``) in the folder, the one above or in
``resources/ebird_codes`` below it; else those of a ClassLabel in the metadata; else the labels that
occur, sorted, with a note.
"""

from __future__ import annotations

import functools
import gzip
import json
import logging
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from bat.errors import UserError
from bat.io import replace_durably, temporary
from bat.tasks.base import LeftOut, Reading, Row, Task, in_order
from bat.tasks.folder import find_audio
from bat.tasks.parquet import read_columns

log = logging.getLogger("bat")


class Published(NamedTuple):
    """Sizes of a set as published."""

    train: int
    test: int
    classes: int


SETS = {
    "hsn": Published(5_460, 12_000, 21),
    "per": Published(16_802, 15_120, 132),
    "nes": Published(16_117, 24_480, 89),
    "uhh": Published(3_626, 36_637, 27),
    "nbp": Published(24_327, 563, 51),
    "pow": Published(14_911, 4_560, 48),
    "ssw": Published(28_403, 205_200, 81),
    "sne": Published(19_390, 23_756, 56),
}
"""Tasks and the sizes of their sets."""
HSN = (
    *("gcrfin", "whcspa", "amepip", "sposan", "rocwre", "brebla", "daejun", "foxspa", "clanut"),
    *("moublu", "casfin", "mallar3", "herthr", "amerob", "yerwar", "yelwar", "dusfly", "mouchi"),
    *("orcwar", "warvir", "norfli"),
)
"""Classes of HSN in their published order, which is also that of their numbers."""
PARTS = {"train": ("train", "train"), "test": ("test_5s", "test5s")}
"""Names of each split in the metadata's and the shards' file names."""
LABELS = "ebird_code_multilabel"
WHERE = "the folder {} of DBD-research-group/BirdSet on the Hugging Face hub (CC-BY-NC)"
Place = tuple[Path, tuple[int, int] | None]
"""A file, and the bytes of it that are the clip (None: all)."""


def birdset(name: str) -> Task:
    """Returns the task of the set ``name`` (``HSN``, ...)."""
    return Task(
        name=name.lower(),
        rows=functools.partial(read, name=name),
        target="tags",
        metrics=("map", "f1"),
        frames=512,
        statistics="hsn",
        label_sets=(frozenset(HSN),) if name == "HSN" else (),
    )


def set_in(root: Path) -> str | None:
    """Returns the task whose metadata lie in the folder ``root``, if there is one."""
    return next((n for n in SETS if any(root.glob(f"{n.upper()}_metadata_*.parquet"))), None)


def read(root: Path, *, name: str) -> Reading:
    """Reads the recordings and test clips of the set ``name``; unpacks its shards if necessary.

    Raises:
        UserError: metadata or all audio of a split missing, damaged files, an unknown label.
    """
    folder = find_set(root, name)
    tables = {split: _table(folder, name, PARTS[split][0]) for split in PARTS}
    codes = _codes(root, folder, name)
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    notes: list[str] = []
    order = codes
    for split, (table, listed, classes) in tables.items():
        names = codes or classes
        order = order or classes
        places = find_clips(folder, name, PARTS[split][1])
        found = 0
        for cells in listed:
            file = PurePosixPath(str(cells["filepath"]))
            labels = tuple(
                dict.fromkeys(_label(x, names, table, file) for x in cells[LABELS] or ())
            )
            place = places.get(file.name)
            if place is None:
                left_out.append(LeftOut(file.stem, file.name, "no file", split))
                continue
            found += 1
            codec = file.suffix[1:].lower()
            rows.append(Row(place[0], file.stem, labels, split=split, span=place[1], codec=codec))
        said = f"{found} of the {len(listed)} clips that {table.name} lists"
        shards = f"{name}_{PARTS[split][1]}_shard_*.tar.gz"
        if not found:
            raise UserError(
                f"{folder} has the audio of none of the {len(listed)} clips that {table.name} "
                f"lists: put {shards} there, from {WHERE.format(name)}"
            )
        if found < len(listed):
            notes.append(f"{said} have audio, the others are left out: is one of {shards} missing?")
        published = getattr(SETS[name.lower()], split)
        if len(listed) != published:
            notes.append(f"{table.name} lists {len(listed)} clips, {published} were published")
    if order is None:
        order = in_order(label for row in rows for label in row.labels)
        notes.append(
            f"classes are the {len(order)} that occur, by name: {name}_ebird_codes.json (of "
            "BirdSet's repository, resources/ebird_codes) beside the metadata has their order"
        )
    return Reading(rows, list(order), notes, left_out)


def find_set(root: Path, name: str) -> Path:
    """Returns the folder that holds the metadata of the set ``name``."""
    hub = "datasets--DBD-research-group--BirdSet"
    snapshots = [*root.glob("snapshots/*"), *root.glob(f"{hub}/snapshots/*")]
    places = [root, root / name, *(snapshot / name for snapshot in sorted(snapshots))]
    wanted = [f"{name}_metadata_{part}.parquet" for part, _ in PARTS.values()]
    missing = {place: [n for n in wanted if not (place / n).is_file()] for place in places}
    best = min(places, key=lambda place: len(missing[place]))
    if missing[best]:
        raise UserError(
            f"{best} lacks {' and '.join(missing[best])}: give the folder of the set {name}, from "
            f"{WHERE.format(name)}, with its {name}_train_shard_*.tar.gz and "
            f"{name}_test5s_shard_*.tar.gz"
        )
    return best


def find_clips(folder: Path, name: str, part: str) -> dict[str, Place]:
    """Returns the places of the audio files of a part by their base names.

    They are members of its shards, or files below ``folder`` where it has no shards.
    """
    pattern = f"{name}_{part}_shard_*.tar"
    tars = {*folder.glob(pattern), *map(unpacked, sorted(folder.glob(f"{pattern}.gz")))}
    found: dict[str, Place] = {}
    for tar in sorted(tars):
        try:
            with tarfile.open(tar, "r:") as file:
                for member in file:
                    if member.isreg():
                        span = (member.offset_data, member.size)
                        found.setdefault(PurePosixPath(member.name).name, (tar, span))
        except (tarfile.TarError, OSError) as error:
            raise UserError(
                f"{tar} is not a readable tar ({error}): remove it; of a damaged .tar.gz beside it "
                "get another copy"
            ) from error
    if not tars:
        found = {path.name: (path, None) for path in find_audio(folder)[0]}
    return found


def unpacked(archive: Path) -> Path:
    """Returns the ``.tar`` beside ``X.tar.gz``, made of it if it is not there.

    Raises:
        UserError: the archive is damaged, or the tar cannot be written.
    """
    tar = archive.with_suffix("")
    if tar.is_file():
        return tar
    log.info("unpacking %s to %s, once: a .tar.gz cannot be read at random", archive, tar.name)
    part = temporary(tar)
    try:
        with gzip.open(archive) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        replace_durably(part, tar)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}): get another copy of it") from error
    except OSError as error:
        raise UserError(
            f"{archive} cannot be unpacked beside itself ({error.strerror or error}): make the "
            f"folder writable, free the space, or link its files into a folder of your own"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return tar


def _table(
    folder: Path, name: str, part: str
) -> tuple[Path, list[dict[str, Any]], list[str] | None]:
    path = folder / f"{name}_metadata_{part}.parquet"
    return (path, *read_columns(path, ("filepath", LABELS), label=LABELS))


def _codes(root: Path, folder: Path, name: str) -> Sequence[str] | None:
    """Returns the classes in their official order; None if it is unknown."""
    if name == "HSN":
        return HSN
    places = (
        folder,
        folder.parent,
        root / "resources/ebird_codes",
        folder / "resources/ebird_codes",
    )
    path = next((p for p in (f / f"{name}_ebird_codes.json" for f in places) if p.is_file()), None)
    if path is None:
        return None
    try:
        named = {int(n): str(code) for n, code in json.loads(path.read_bytes())["id2label"].items()}
        if sorted(named) != list(range(len(named))) or len(set(named.values())) < len(named):
            raise ValueError("numbers from 0 on, each with a name of its own")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{path} is not {{"id2label": {{"0": code, ...}}}}: {error}') from error
    return [named[number] for number in range(len(named))]


def _label(value: Any, names: Sequence[str] | None, table: Path, file: PurePosixPath) -> str:
    """Returns the name of a label, which may be a number of ``names``."""
    if isinstance(value, int) and names is not None and 0 <= value < len(names):
        return names[value]
    if isinstance(value, str) and (names is None or value in names):
        return value
    known = "no names of classes are known" if names is None else f"not among {len(names)} classes"
    raise UserError(
        f"{table}: {file.name} has the label {value!r}, {known}: give the NAME_ebird_codes.json "
        "and the metadata of the same set"
    )
