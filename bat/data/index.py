"""The index of a data set: every clip of every shard, in a few numpy arrays (STACK section 2).

About 70 bytes a clip and nothing but arrays, so that forked workers share it. ``read`` is one
``pread``. The order of clips is that of the sorted shards and of the members in them; a clip's
number is its id everywhere in ``bat.data``. ``hash`` is over the content (keys, sizes, labels,
folds, vocabulary), not over where the shards lie: equal hashes make equal streams.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bat.data.manifest import Manifest
from bat.data.sources import expand
from bat.data.table import ShardTable, scan
from bat.shapes import Clip, UserError
from bat.tasks.base import AUDIO_SUFFIXES

MAX_OPEN_FILES = 256


class _Files:
    """File descriptors by path: each process its own, the least recently used one closed."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._pid = os.getpid()

    def pread(self, path: Path, size: int, offset: int) -> bytes:
        if self._pid != os.getpid():  # forked: pread would be safe, eviction by two would not
            self._open, self._pid = OrderedDict(), os.getpid()
        fd = self._open.get(path)
        if fd is None:
            fd = self._open[path] = os.open(path, os.O_RDONLY)
            if len(self._open) > MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(path)
        return os.pread(fd, size, offset)

    def __reduce__(self) -> tuple[type[_Files], tuple[()]]:
        return type(self), ()


class Index:
    """Every clip of a data set; ``open_index`` makes it. n clips:

    ``shard, offset, size, frames, rate, codec, fold, split``: (n,) each; ``frames`` at the file's
    own ``rate``, -1 and 0 where unknown; ``fold`` and ``split`` (index into ``splits``) -1 where
    there is none. ``label_ids`` flat, ``label_ptr`` (n + 1,): labels as CSR, into ``vocabulary``.
    """

    def __init__(
        self, *, paths: Sequence[Path], tables: Sequence[ShardTable], vocabulary: Sequence[str]
    ) -> None:
        self.paths = list(paths)
        self.vocabulary = list(vocabulary)
        self.splits = sorted({name for t in tables for name in t.splits})
        self.left_out = {
            f"{path.name}/{name}": reason
            for path, table in zip(paths, tables, strict=True)
            for name, reason in table.left_out.items()
        }
        clips = np.concatenate([t.clips for t in tables])
        self.shard = np.repeat(
            np.arange(len(tables), dtype=np.int32), [len(t.clips) for t in tables]
        )
        self.offset = np.ascontiguousarray(clips["offset"])
        self.size = np.ascontiguousarray(clips["size"])
        self.frames = np.ascontiguousarray(clips["frames"])
        self.rate = np.ascontiguousarray(clips["rate"])
        self.codec = np.ascontiguousarray(clips["codec"])
        self.fold = np.ascontiguousarray(clips["fold"])
        numbers = {name: i for i, name in enumerate(self.vocabulary)}
        parts, splits = [], []
        for table in tables:
            to_global = np.array([numbers[name] for name in table.names], np.int32)
            parts.append(to_global[table.labels])
            where = np.array([*(self.splits.index(name) for name in table.splits), -1], np.int8)
            splits.append(where[table.clips["split"]])  # -1 picks the last: none
        self.split = np.concatenate(splits)
        self.label_ids = np.concatenate(parts)
        self.label_ptr = _pointers(clips["labels"])
        self._keys = np.concatenate([t.keys for t in tables])
        self._key_ptr = _pointers(clips["key"])
        self._files = _Files()

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def classes(self) -> int:
        return len(self.vocabulary)

    @property
    def labels_per_clip(self) -> np.ndarray:  # (n,)
        return np.diff(self.label_ptr)

    @property
    def folds(self) -> list[int]:
        """The folds that occur, ascending; empty without folds."""
        return [int(f) for f in np.unique(self.fold) if f >= 0]

    @functools.cached_property
    def hash(self) -> str:
        digest = hashlib.sha256("\0".join([*self.vocabulary, "", *self.splits]).encode())
        for array in (self._keys, self._key_ptr, self.size, self.frames, self.rate, self.fold):
            digest.update(array.tobytes())
        for array in (self.split, self.label_ids, self.label_ptr):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def key(self, i: int) -> str:
        return self._keys[self._key_ptr[i] : self._key_ptr[i + 1]].tobytes().decode("ascii")

    def labels(self, i: int) -> tuple[int, ...]:
        return tuple(self.label_ids[self.label_ptr[i] : self.label_ptr[i + 1]].tolist())

    def targets(self, i: int) -> np.ndarray:
        """Multi-hot labels: (C,) float32."""
        hot = np.zeros(self.classes, np.float32)
        hot[self.label_ids[self.label_ptr[i] : self.label_ptr[i + 1]]] = 1.0
        return hot

    def clips_in_fold(self, fold: int) -> np.ndarray:
        """Ids of the clips of ``fold``, ascending; UserError where there are none."""
        if fold not in self.folds:
            raise UserError(f"no clip has fold {fold}: folds are {self.folds or 'not given'}")
        return np.flatnonzero(self.fold == fold)

    def clips_not_in_fold(self, fold: int) -> np.ndarray:
        """Ids of the clips of the other folds; clips without a fold are in none."""
        self.clips_in_fold(fold)
        return np.flatnonzero((self.fold != fold) & (self.fold >= 0))

    def clips_in_split(self, name: str) -> np.ndarray:
        """Ids of the clips of a split such as ``train``; UserError where there are none."""
        if name not in self.splits:
            raise UserError(f"no clip has split {name!r}: splits are {self.splits or 'not given'}")
        return np.flatnonzero(self.split == self.splits.index(name))

    def read(self, i: int) -> Clip:
        """The encoded clip ``i``.

        Raises:
            OSError: its shard cannot be read, or ends before the clip does.
        """
        path, size = self.paths[self.shard[i]], int(self.size[i])
        data = self._files.pread(path, size, int(self.offset[i]))
        if len(data) != size:
            raise OSError(5, f"{path.name} ends inside the clip: it was cut since it was indexed")
        return Clip(self.key(i), data, AUDIO_SUFFIXES[self.codec[i]], self.labels(i))


def _pointers(counts: np.ndarray) -> np.ndarray:
    """(n,) counts -> (n + 1,) int64 offsets."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def open_index(shards: str | Path | Sequence[str | Path], *, cache: Path | None = None) -> Index:
    """The index of a set of shards.

    Args:
        shards: a folder, a tar, a glob, a brace pattern (``shard-{00000..00041}.tar``), or a
            list of such. Tables beside the shards are used where they fit and made where not.
        cache: where a table goes that cannot be written beside its shard (read-only folder);
            None: such tables are made anew each time.

    Raises:
        UserError: nothing there, something that is not a plain tar, a shard that differs from its
            manifest, data sets with different vocabularies.
    """
    sources = [shards] if isinstance(shards, (str, Path)) else list(shards)
    paths = [path for source in sources for path in expand(source)]
    if not paths:
        raise UserError("the list of shards is empty: give a folder, a glob or shard-{0..9}.tar")
    twice = {str(p) for p in paths if paths.count(p) > 1} if len(set(paths)) < len(paths) else None
    if twice:
        raise UserError(f"shard {min(twice)} is listed twice")
    manifests = {folder: Manifest.load(folder) for folder in dict.fromkeys(p.parent for p in paths)}
    for folder, manifest in manifests.items():
        whole = any(Path(s) == folder for s in sources)
        missing = (
            [s.name for s in manifest.shards if not (folder / s.name).exists()] if manifest else []
        )
        if whole and missing:
            raise UserError(f"{folder} lacks {missing[0]}, which its manifest.json lists")
    tables = [_table(path, manifests[path.parent], cache) for path in paths]
    if not sum(len(t.clips) for t in tables):
        raise UserError(
            f"{paths[0]}{' and the other shards' if len(paths) > 1 else ''} hold no audio "
            f"({', '.join(AUDIO_SUFFIXES)})"
        )
    given = [m.vocabulary for m in manifests.values() if m is not None and m.vocabulary]
    return Index(paths=paths, tables=tables, vocabulary=_vocabulary(tables, given))


def _table(path: Path, manifest: Manifest | None, cache: Path | None) -> ShardTable:
    """The table of one shard, read or made, held to the manifest where it lists the shard."""
    entry = next((s for s in manifest.shards if s.name == path.name), None) if manifest else None
    size = path.stat().st_size
    if entry is not None and size != entry.bytes:
        raise UserError(
            f"{path} has {size} bytes, its manifest.json says {entry.bytes}: copy it again"
        )
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    places = [path.with_suffix(".idx.npz")]
    if cache is not None:
        places.append(Path(cache) / f"{path.stem}-{digest}.idx.npz")
    for place in places:
        table = ShardTable.load(place, path)
        if table is not None and (entry is None or table.sha256 in ("", entry.sha256)):
            break
    else:
        table = scan(path, entry.sha256 if entry else "")
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                table.save(place)
                break
            except OSError:
                continue
    if entry is not None and len(table.clips) != entry.clips:
        raise UserError(
            f"{path} has {len(table.clips)} clips, its manifest.json says {entry.clips}: "
            f"copy it again"
        )
    return table


def _vocabulary(tables: Sequence[ShardTable], given: Sequence[list[str]]) -> list[str]:
    """Class names in the order of their indices.

    From the manifests where there are some; else by ``label_id`` where every label has one and
    they agree (a number that does not occur is called ``class N``); else the names, sorted.
    """
    names = {name for table in tables for name in table.names}
    if given:
        for other in given[1:]:
            if other != given[0]:
                odd = sorted(set(other) ^ set(given[0]))
                what = f"{odd[0]!r} is in one only" if odd else "the order differs"
                raise UserError(
                    f"the data sets have different labels ({what}): write them with one vocabulary"
                )
        strange = sorted(names - set(given[0]))
        if strange:
            raise UserError(f"label {strange[0]!r} is not in the manifest's vocabulary")
        return list(given[0])
    pairs = {pair for t in tables for pair in zip(t.names, t.ids, strict=True)}
    ids = {number for _, number in pairs}
    if pairs and len(pairs) == len(names) == len(ids) and min(ids) >= 0 and max(ids) < 100_000:
        by_id = {number: name for name, number in pairs}
        return [by_id.get(i, f"class {i}") for i in range(max(ids) + 1)]
    return sorted(names)
