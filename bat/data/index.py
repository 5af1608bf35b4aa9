"""The index of a data set: every clip of every shard, in a few numpy arrays.

It takes about 70 bytes a clip and consists of arrays alone, so that forked workers share it.
``read`` is one ``pread``, of the shard or, for a remote shard, of its copy in the local cache.
Clips are ordered by the sorted shards and by the members within them; a clip's number is its id
everywhere in ``bat.data``. ``hash`` covers the content (keys, sizes, labels, folds, vocabulary) but
not where the shards lie: equal hashes make equal streams.
"""

from __future__ import annotations

import functools
import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from bat.audio.decode import Source
from bat.audio.part import FilePart
from bat.data.manifest import Manifest, ShardInfo, joint_vocabulary
from bat.data.sources import NotIndexable, RetryPolicy, Shard, find, names_of
from bat.data.table import ShardTable, scan, table_places
from bat.data.tar import BLOCK
from bat.errors import UserError
from bat.tasks.base import AUDIO_SUFFIXES
from bat.tasks.events import Event, from_json
from bat.types import Clip

if TYPE_CHECKING:
    from bat.data.remote_shards import RemoteShards

CACHE_BYTES = 100_000_000_000
BY_SEEKING = 1 << 20
"""Size in bytes of a clip from which its windows are read by seeking, not from the whole of it."""


class Index:
    """Every clip of a data set, n clips in m shards; made by ``open_index``.

    ``shard, offset, size, frames, rate, codec, fold, split, source``: (n,) each; ``frames`` at the
    file's own ``rate``, -1 and 0 where unknown; ``fold`` and ``split`` (index into ``splits``) -1
    where there is none; ``source``: index of the source given to ``open_index``. ``label_ids``
    (flat) and ``label_ptr`` (n + 1,): labels as CSR, indices into ``vocabulary``. ``shard_bytes``:
    (m,). ``events`` ``{clip: (Event, ...)}`` and ``texts`` ``{clip: text}`` of the clips that have
    them.
    """

    def __init__(
        self,
        *,
        shards: Sequence[Shard],
        tables: Sequence[ShardTable],
        vocabulary: Sequence[str] | None,
        sources: Sequence[int],
        remote_shards: RemoteShards | None = None,
    ) -> None:
        self.paths = [shard.place for shard in shards]
        self.vocabulary = list(vocabulary or ())
        self._names = names_of(shards)
        self.left_out = {
            f"{shard}/{name}": reason
            for shard, table in zip(self._names, tables, strict=True)
            for name, reason in table.left_out.items()
        }
        clips = np.concatenate([t.clips for t in tables])
        counts = [len(t.clips) for t in tables]
        self.shard = np.repeat(np.arange(len(tables), dtype=np.int32), counts)
        self.source = np.repeat(np.asarray(sources, np.int16), counts)
        self.shard_bytes = np.array([t.tar_bytes for t in tables], np.int64)
        self.offset = np.ascontiguousarray(clips["offset"])
        self.size = np.ascontiguousarray(clips["size"])
        self.frames = np.ascontiguousarray(clips["frames"])
        self.rate = np.ascontiguousarray(clips["rate"])
        self.codec = np.ascontiguousarray(clips["codec"])
        self.fold = np.ascontiguousarray(clips["fold"])
        self._header = np.ascontiguousarray(clips["header"])
        self.splits, self.split = _splits(shards, tables)
        self.events: dict[int, tuple[Event, ...]] = {}
        self.texts: dict[int, str] = {}
        if vocabulary is None:  # labels dropped
            self.label_ids, self.label_ptr = np.empty(0, np.int32), np.zeros(len(clips) + 1, int)
        else:
            numbers = {name: i for i, name in enumerate(self.vocabulary)}
            to_global = (np.array([numbers[name] for name in t.names], np.int32) for t in tables)
            flat = [to[table.labels] for to, table in zip(to_global, tables, strict=True)]
            self.label_ids, self.label_ptr = np.concatenate(flat), _pointers(clips["labels"])
            self._add_events_and_texts(tables)
        self._keys = np.concatenate([t.keys for t in tables])
        self._key_ptr = _pointers(clips["key"])
        self._remote_shards = remote_shards
        self.recordings: np.ndarray | None = None
        """(n,) number, before cutting, of the recording that each window is cut from; None: the
        clips are not cut into windows."""
        self.starts: np.ndarray | None = None
        """(n,) first sample of each window, at the file's rate (``bat.data.windows``); None: the
        clips are not cut into windows."""

    def take(self, rows: np.ndarray) -> None:
        """Replaces the clips by those of ``rows`` (m,), which may repeat; all but their labels."""
        for name in ("shard", "source", "offset", "size", "frames", "rate", "codec", "fold"):
            setattr(self, name, getattr(self, name)[rows])
        self._header, self.split, self.recordings = self._header[rows], self.split[rows], rows

    def _add_events_and_texts(self, tables: Sequence[ShardTable]) -> None:
        first = 0
        for table in tables:
            keys = table.key_list() if table.events or table.texts else ()
            for i, key in enumerate(keys, start=first):
                if key in table.events:
                    made = map(from_json, table.events[key])
                    self.events[i] = tuple(event for event in made if event is not None)
                if key in table.texts:
                    self.texts[i] = table.texts[key]
            first += len(table.clips)

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def classes(self) -> int:
        return len(self.vocabulary)

    @property
    def remote(self) -> bool:
        """True if some shards are remote and read through the local cache."""
        return self._remote_shards is not None

    @property
    def fits(self) -> bool:
        """True if the local cache holds all remote shards at once, or if there are none."""
        return self._remote_shards is None or self._remote_shards.fits

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of remote shards that the local cache may hold; None if there are none."""
        return None if self._remote_shards is None else self._remote_shards.cache.max_bytes

    @property
    def labels_per_clip(self) -> np.ndarray:  # (n,)
        return np.diff(self.label_ptr)

    @property
    def seconds(self) -> np.ndarray:
        """Length of each clip (n,), in seconds; 0 if unknown."""
        known = (self.frames > 0) & (self.rate > 0)
        return np.where(known, self.frames / np.maximum(self.rate, 1), 0.0)

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
        if self.starts is not None:
            digest.update(self.starts.tobytes())
        return digest.hexdigest()

    def key(self, i: int) -> str:
        """Returns the key of clip ``i``; that of a window ends in ``@`` and its first sample."""
        key, start = self.recording_key(i), 0 if self.starts is None else int(self.starts[i])
        return f"{key}@{start}" if start else key

    def recording_key(self, i: int) -> str:
        """Returns the key of the recording that window ``i`` is cut from; else of clip ``i``."""
        row = i if self.recordings is None else int(self.recordings[i])
        return self._keys[self._key_ptr[row] : self._key_ptr[row + 1]].tobytes().decode("ascii")

    def shard_name(self, i: int) -> str:
        """Returns the name of the shard that clip ``i`` lies in, with its folders where two shards
        share it."""
        return self._names[self.shard[i]]

    def labels(self, i: int) -> tuple[int, ...]:
        return tuple(self.label_ids[self.label_ptr[i] : self.label_ptr[i + 1]].tolist())

    def targets(self, i: int) -> np.ndarray:
        """Returns multi-hot labels: (C,) float32."""
        hot = np.zeros(self.classes, np.float32)
        hot[self.label_ids[self.label_ptr[i] : self.label_ptr[i + 1]]] = 1.0
        return hot

    def clips_in_fold(self, fold: int) -> np.ndarray:
        """Returns the ids of the clips of ``fold``, ascending; UserError if there are none."""
        if fold not in self.folds:
            raise UserError(f"no clip has fold {fold}: folds are {self.folds or 'not given'}")
        return np.flatnonzero(self.fold == fold)

    def clips_not_in_fold(self, fold: int) -> np.ndarray:
        """Returns the ids of the clips of the other folds; clips without a fold are in none."""
        self.clips_in_fold(fold)
        return np.flatnonzero((self.fold != fold) & (self.fold >= 0))

    def clips_in_split(self, name: str) -> np.ndarray:
        """Returns the ids of the clips of a split such as ``train``, or of several (``a,b``),
        ascending; raises UserError if one of them has no clips."""
        wanted = [part.strip() for part in name.split(",")]
        absent = next((part for part in wanted if part not in self.splits), None)
        if absent is not None:
            raise UserError(
                f"no clip has split {absent!r}: {self.counted_splits()}. data.split=NAME names one "
                "of these, or several: A,B"
            )
        return np.flatnonzero(np.isin(self.split, [self.splits.index(part) for part in wanted]))

    def counted_splits(self) -> str:
        """Returns ``the data has the splits test 80, train 320``."""
        counts = [f"{name} {int((self.split == i).sum())}" for i, name in enumerate(self.splits)]
        bare = int((self.split < 0).sum())
        counts += [f"{bare} clips without a split"] if bare and counts else []
        given = ", ".join(counts)
        return f"the data has the splits {given}" if counts else f"none of its {bare} clips has one"

    def read(self, i: int) -> Clip:
        """Reads the encoded clip ``i``.

        Raises:
            OSError: its shard cannot be read or reached, ends before the clip does, or is not the
                one that was indexed: the clip's header in the tar is compared.
        """
        number, size = int(self.shard[i]), int(self.size[i]) + BLOCK
        offset = int(self.offset[i]) - BLOCK
        place = self.paths[number]
        if isinstance(place, Path):
            with place.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        else:
            assert self._remote_shards is not None
            data = self._remote_shards.pread(number, size, offset)
        self._check(i, data[:BLOCK], complete=len(data) == size)
        codec = AUDIO_SUFFIXES[self.codec[i]]
        return Clip(self.key(i), data[BLOCK:], codec, self.labels(i), self.shard_name(i))

    def _check(self, i: int, header: bytes, *, complete: bool) -> None:
        """Raises ``OSError`` if a clip was cut, or its header in the tar is not the indexed one."""
        if not complete:
            name = self.shard_name(i)
            raise OSError(5, f"{name} ends inside the clip: it was cut since it was indexed")
        if zlib.crc32(header) != self._header[i]:
            name = self.shard_name(i)
            raise OSError(5, f"{name} has another clip here: it was changed since it was indexed")

    def audio(self, i: int) -> Source:
        """Returns the encoded clip ``i``; of a window of a large local one its place, to be read by
        seeking. Raises as ``read``.
        """
        place, size, offset = self.paths[self.shard[i]], int(self.size[i]), int(self.offset[i])
        if self.starts is None or size < BY_SEEKING or not isinstance(place, Path):
            return self.read(i).data
        with place.open("rb", buffering=0) as file:
            header, end = os.pread(file.fileno(), BLOCK, offset - BLOCK), file.seek(0, os.SEEK_END)
        self._check(i, header, complete=end >= offset + size)
        return FilePart(place, offset, size)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Prefetch remote ``shards`` into the cache in the background, in order.

        Returns at once and replaces the shards of an earlier call that have not been started.
        Fetches as many as the cache holds; local shards and those already in the cache cost
        nothing.
        """
        if self._remote_shards is not None:
            self._remote_shards.prefetch(shards)


def _pointers(counts: np.ndarray) -> np.ndarray:
    """Converts (n,) counts to (n + 1,) int64 offsets."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _splits(shards: Sequence[Shard], tables: Sequence[ShardTable]) -> tuple[list[str], np.ndarray]:
    """Returns the names of the splits that occur, sorted, and their indices (n,) int16; the
    sub-folder is the split where a clip's JSON names none."""
    listed = [[*table.splits, shard.split] for shard, table in zip(shards, tables, strict=True)]
    numbers = {name: i for i, name in enumerate(sorted({n for names in listed for n in names}))}
    parts = [
        np.array([numbers[name] for name in names], np.int16)[table.clips["split"]]  # -1: the last
        for names, table in zip(listed, tables, strict=True)
    ]
    split = np.concatenate(parts)
    occur = np.zeros(len(numbers), bool)
    occur[split] = True
    occur[[numbers[""]] if "" in numbers else []] = False
    renumber = np.where(occur, np.cumsum(occur) - 1, -1).astype(np.int16)
    return [name for name, i in numbers.items() if occur[i]], renumber[split]


def open_index(
    shards: str | Path | Sequence[str | Path],
    *,
    cache: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
    labels: Literal["same", "drop"] = "same",
    retries: int = 5,
    timeout_seconds: float = 30.0,
    redirects: Sequence[str] = (),
) -> Index:
    """Returns the index of a set of shards.

    Args:
        shards: a folder, a tar, a glob, a brace pattern (``shard-{00000..00041}.tar``), a URL of
            these (``https://``, ``s3://``, ...), or a list of such. Tables beside the shards are
            used if they match and made otherwise.
        cache: folder for copies of remote shards, and for tables that cannot be written beside
            their shards. None: ``$XDG_CACHE_HOME/bat`` for remote shards; tables of a read-only
            folder are made anew each time.
        cache_bytes: bytes of remote shards that the cache may hold.
        labels: ``same``: all sources have one vocabulary; ``drop``: the labels are dropped.
        retries: tries before a remote shard counts as unreachable.
        timeout_seconds: longest time that a server may send nothing.
        redirects: hosts that a server may redirect to, besides itself: ``cdn.org``, ``*.cdn.org``.

    Raises:
        NotIndexable: compressed shards, those of a command; remote ones without tables that the
            cache cannot hold.
        UserError: no shards found, a file that is not a plain tar, a shard that differs from its
            manifest, data sets with different vocabularies, an unreachable server.
    """
    if retries < 1 or timeout_seconds <= 0 or cache_bytes < 0:
        values = f"{retries=}, {timeout_seconds=:g}, {cache_bytes=}"
        raise UserError(f"{values}: at least 1, more than 0, at least 0")
    policy = RetryPolicy(retries, timeout_seconds, redirects=tuple(redirects))
    sources = [shards] if isinstance(shards, (str, Path)) else list(shards)
    found = [(shard, i) for i, source in enumerate(sources) for shard in find(source, policy)]
    given, numbers = [shard for shard, _ in found], [i for _, i in found]
    if not found:
        raise UserError("the list of shards is empty: give a folder, a glob or shard-{0..9}.tar")
    seen = Counter(shard.identity for shard in given)
    for shard in given:
        if seen[shard.identity] > 1:
            raise UserError(
                f"shard {shard.name} is listed twice: each clip counts once, see data.mix"
            )
        if shard.command:
            raise NotIndexable(f"{shard.name} is what a command writes")
        if shard.compressed:
            raise NotIndexable(f"{shard.name} is compressed: give uncompressed WebDataset shards")
    tables, vocabularies = _local_tables(given, whole=[Path(s) for s in sources], cache=cache)
    remote_shards = None
    if any(shard.remote for shard in given):
        from bat.data.remote_shards import RemoteShards

        remote_shards = RemoteShards(given, cache=cache, cache_bytes=cache_bytes, policy=policy)
        tables |= remote_shards.tables()
        vocabularies += remote_shards.vocabularies
    ordered = [tables[i] for i in range(len(given))]
    if not sum(len(t.clips) for t in ordered):
        raise UserError(
            f"{given[0].name}{' and the other shards' if len(given) > 1 else ''} hold no audio "
            f"({', '.join(AUDIO_SUFFIXES)})"
        )
    names = joint_vocabulary(ordered, vocabularies) if labels == "same" else None
    return Index(
        shards=given, tables=ordered, vocabulary=names, sources=numbers, remote_shards=remote_shards
    )


def _local_tables(
    shards: Sequence[Shard], *, whole: Sequence[Path], cache: Path | None
) -> tuple[dict[int, ShardTable], list[list[str]]]:
    """Returns ``{number: table}`` of the local ones of ``shards``, and their manifests'
    vocabularies.

    Args:
        whole: folders that must hold all shards listed in their manifests, or in those below them.
        cache: folder for a table that cannot be written beside its shard.

    Raises:
        UserError: a shard that is missing, not a tar, or different from its manifest.
    """
    local = {i: shard.place for i, shard in enumerate(shards) if isinstance(shard.place, Path)}
    vocabularies: list[list[str]] = []
    entries: dict[Path, ShardInfo] = {}
    for folder in dict.fromkeys(path.parent for path in local.values()):
        manifest = Manifest.load(folder)
        if manifest is None:
            continue
        if manifest.vocabulary:
            vocabularies.append(manifest.vocabulary)
        listed = {folder / entry.name: entry for entry in manifest.shards}
        entries |= listed
        if folder in whole or folder.parent in whole:
            for path in listed:
                if not path.exists():
                    raise UserError(
                        f"{folder} lacks {path.name}, which its manifest.json lists: copy it "
                        f"again, or remove the folder and run the bat-shard command that made it"
                    )
    return {i: _local_table(path, entries.get(path), cache) for i, path in local.items()}, (
        vocabularies
    )


def _local_table(path: Path, entry: ShardInfo | None, cache: Path | None) -> ShardTable:
    """Returns the table of a local shard, read or made, and held to its ``entry`` of a manifest.

    If the tar has another modification time (a copy) but the same content, the lengths of the old
    table are kept.
    """
    size = path.stat().st_size
    if entry is not None and size != entry.bytes:
        raise UserError(
            f"{path} has {size} bytes, its manifest.json says {entry.bytes}: copy it again"
        )
    places = table_places(path, cache)
    tables = (ShardTable.load(place, path) for place in places)
    table = next(
        (t for t in tables if t and (entry is None or t.sha256 in ("", entry.sha256))), None
    )
    if table is None:
        table = scan(path, entry.sha256 if entry else "")
        before = next(filter(None, (ShardTable.load(place, None) for place in places)), None)
        if before is not None and before.agrees(table):
            for name in ("frames", "rate"):
                unknown = table.clips[name] <= 0
                table.clips[name][unknown] = before.clips[name][unknown]
        elif before is not None and entry is not None and before.sha256 == entry.sha256:
            raise UserError(
                f"{path} was changed since its manifest.json was written: copy it again, or remove "
                f"the manifest and run bat-shard {path.parent}"
            )
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                table.save(place)
                break
            except OSError:
                continue
    if entry is not None and len(table.clips) != entry.clips:
        raise UserError(
            f"{path} has {len(table.clips)} clips, its manifest.json says {entry.clips}: copy it "
            "again"
        )
    return table
