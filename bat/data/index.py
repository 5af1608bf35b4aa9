"""The index of a data set: every clip of every shard, in a few numpy arrays.

It takes about 70 bytes a clip and consists of arrays alone (``bat.data.columns``): those of a small
set in memory, which forked workers share; those of a large one in files in the cache folder, which
one process writes at the first start while the others wait, and all map. ``read`` is one ``pread``,
of the shard or, for a remote shard, of its copy in the local cache.
Clips are ordered by the sorted shards and by the members within them; a clip's number is its id
everywhere in ``bat.data``. ``hash`` covers the content (keys, sizes, labels, folds, vocabulary) but
not where the shards lie: equal hashes make equal streams.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bat.audio.decode import Source
from bat.audio.part import FilePart
from bat.data.columns import (
    OF_TABLES,
    PIECE,
    Columns,
    Mapped,
    Writer,
    content_hash,
    gather,
    joined,
    portable,
    shared,
)
from bat.data.local_shards import local_table, manifest_entries, stamps
from bat.data.manifest import joint_vocabulary
from bat.data.sources import NotIndexable, RetryPolicy, Shard, find, names_of
from bat.data.table import VERSION, ShardTable
from bat.data.tar import BLOCK
from bat.errors import UserError
from bat.tasks.base import AUDIO_SUFFIXES
from bat.tasks.events import Event, from_json
from bat.types import Clip

if TYPE_CHECKING:
    from bat.data.remote_shards import RemoteShards

CACHE_BYTES = 100_000_000_000
BY_CLIP_NODES = 4
"""Machines from which clips of remote shards are read one by one (docs/scale.md)."""
THREADS = 16
"""Threads that read tables."""
SHARDS_AHEAD = 256
"""Shards whose tables are read together."""
BY_SEEKING = 1 << 20
"""Size in bytes of a clip from which its windows are read by seeking, not from the whole of it."""


class Index:
    """Every clip of a data set, n clips in m shards; made by ``open_index``.

    ``shard, offset, size, frames, rate, codec, fold, split, source``: (n,) each; ``frames`` at the
    file's own ``rate``, -1 and 0 where unknown; ``fold`` and ``split`` (index into ``splits``) -1
    where there is none; ``source``: index of the source given to ``open_index``, ascending.
    ``label_ids`` (flat) and ``label_ptr`` (n + 1,): labels as CSR, indices into ``vocabulary``;
    ``key_bytes`` and ``key_ptr`` likewise; ``header``: checksums. ``shard_bytes``: (m,). ``events``
    ``{clip: (Event, ...)}`` and ``texts`` ``{clip: text}`` of the clips that have them.

    Args:
        head, columns: as ``bat.data.columns.gather`` returns them.
    """

    shard: np.ndarray
    source: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    frames: np.ndarray
    rate: np.ndarray
    codec: np.ndarray
    fold: np.ndarray
    split: np.ndarray
    header: np.ndarray
    label_ids: np.ndarray
    label_ptr: np.ndarray
    key_bytes: np.ndarray
    key_ptr: np.ndarray
    shard_bytes: np.ndarray

    def __init__(
        self,
        head: dict[str, Any],
        columns: Columns,
        *,
        shards: Sequence[Shard],
        remote_shards: RemoteShards | None = None,
    ) -> None:
        vars(self).update(columns)
        self.vocabulary: list[str] = head["vocabulary"]
        self.splits: list[str] = head["splits"]
        self.left_out: dict[str, str] = head["left_out"]
        self.most_labels: int = head["most_labels"]
        """Greatest number of labels of a clip."""
        self.events: dict[int, tuple[Event, ...]] = {
            i: tuple(filter(None, map(from_json, events))) for i, events in head["events"].items()
        }
        self.texts: dict[int, str] = head["texts"]
        if "hash" in head:
            vars(self)["hash"] = head["hash"]
        self._paths = [
            str(shard.place) for shard in shards
        ]  # paths as objects take four times more
        self._names = names_of(shards)
        self._remote_shards = remote_shards
        self.recordings: np.ndarray | None = None
        """(n,) number, before cutting, of the recording that each window is cut from; None: the
        clips are not cut into windows."""
        self.starts: np.ndarray | None = None
        """(n,) first sample of each window, at the file's rate (``bat.data.windows``); None: the
        clips are not cut into windows."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: portable(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            vars(self)[name] = value.open() if isinstance(value, Mapped) else value

    def take(self, rows: np.ndarray) -> None:
        """Replaces the clips by those of ``rows`` (m,), which may repeat; all but their labels."""
        for name in ("shard", "source", "split", *OF_TABLES):
            setattr(self, name, getattr(self, name)[rows])
        self.recordings = rows
        vars(self).pop("hash", None)

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
        return content_hash(vars(self))

    def key(self, i: int) -> str:
        """Returns the key of clip ``i``; that of a window ends in ``@`` and its first sample."""
        key, start = self.recording_key(i), 0 if self.starts is None else int(self.starts[i])
        return f"{key}@{start}" if start else key

    def recording_key(self, i: int) -> str:
        """Returns the key of the recording that window ``i`` is cut from; else of clip ``i``."""
        row = i if self.recordings is None else int(self.recordings[i])
        return self.key_bytes[self.key_ptr[row] : self.key_ptr[row + 1]].tobytes().decode("ascii")

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
        chosen = [self.splits.index(part) for part in wanted]
        pieces = range(0, len(self), PIECE)
        found = (np.flatnonzero(np.isin(self.split[i : i + PIECE], chosen)) + i for i in pieces)
        return joined(found, beside=self.split, name="-".join(map(str, ["split", *chosen])))

    def counted_splits(self) -> str:
        """Returns ``the data has the splits test 80, train 320``."""
        counts = [f"{name} {int((self.split == i).sum())}" for i, name in enumerate(self.splits)]
        bare = int((self.split < 0).sum())
        counts += [f"{bare} clips without a split"] if bare and counts else []
        given = ", ".join(counts)
        return f"the data has the splits {given}" if counts else f"none of its {bare} clips has one"

    def place(self, number: int) -> Path | None:
        """Returns the path of shard ``number``; None if it is remote."""
        if self._remote_shards is not None and number in self._remote_shards.shards:
            return None
        return Path(self._paths[number])

    def read(self, i: int) -> Clip:
        """Reads the encoded clip ``i``.

        Raises:
            OSError: its shard cannot be read or reached, ends before the clip does, or is not the
                one that was indexed: the clip's header in the tar is compared.
        """
        number, size = int(self.shard[i]), int(self.size[i]) + BLOCK
        offset = int(self.offset[i]) - BLOCK
        place = self.place(number)
        if place is not None:
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
        if zlib.crc32(header) != self.header[i]:
            name = self.shard_name(i)
            raise OSError(5, f"{name} has another clip here: it was changed since it was indexed")

    def audio(self, i: int) -> Source:
        """Returns the encoded clip ``i``; of a window of a large local one its place, to be read by
        seeking. Raises as ``read``.
        """
        place, size = self.place(int(self.shard[i])), int(self.size[i])
        offset = int(self.offset[i])
        if self.starts is None or size < BY_SEEKING or place is None:
            return self.read(i).data
        with place.open("rb", buffering=0) as file:
            header, end = os.pread(file.fileno(), BLOCK, offset - BLOCK), file.seek(0, os.SEEK_END)
        self._check(i, header, complete=end >= offset + size)
        return FilePart(place, offset, size)

    def share_among(self, nodes: int) -> None:
        """Prepare for a run on so many machines, each of which reads one ``nodes``-th of every
        shard: from ``BY_CLIP_NODES`` on, clips of remote shards that do not fit the cache are read
        one by one, since each machine would fetch every shard in every epoch."""
        if self._remote_shards is not None:
            self._remote_shards.by_clip = nodes >= BY_CLIP_NODES and not self.fits

    def prefetch(self, shards: Sequence[int]) -> None:
        """Prefetch remote ``shards`` into the cache in the background, in order.

        Returns at once and replaces the shards of an earlier call that have not been started.
        Fetches as many as the cache holds; local shards and those already in the cache cost
        nothing.
        """
        if self._remote_shards is not None:
            self._remote_shards.prefetch(shards)


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
    identities = [shard.identity for shard in given]
    seen = Counter(identities)
    for shard, place in zip(given, identities, strict=True):
        if seen[place] > 1:
            raise UserError(
                f"shard {shard.name} is listed twice: each clip counts once, see data.mix"
            )
        if shard.command:
            raise NotIndexable(f"{shard.name} is what a command writes")
        if shard.compressed:
            raise NotIndexable(f"{shard.name} is compressed: give uncompressed WebDataset shards")
    entries, vocabularies = manifest_entries(given, whole=[Path(s) for s in sources])
    remote_shards = None
    if any(shard.remote for shard in given):
        from bat.data.remote_shards import RemoteShards

        remote_shards = RemoteShards(given, cache=cache, cache_bytes=cache_bytes, policy=policy)
        vocabularies += remote_shards.vocabularies
    remote = {} if remote_shards is None else remote_shards.shards

    def table(number: int) -> ShardTable:
        place = given[number].place
        if isinstance(place, Path):
            return local_table(place, entries.get(str(place)), cache)
        assert remote_shards is not None
        return remote_shards.table(number)

    def state() -> str:
        """Returns a digest of the shards and their tables as they are now."""
        said = [
            [source, shard.split, *([remote[i].file] if i in remote else stamps(shard.place))]
            for i, (shard, source) in enumerate(zip(given, numbers, strict=True))
        ]
        text = json.dumps([VERSION, AUDIO_SUFFIXES, vocabularies, said])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def make(writer: Writer) -> tuple[dict[str, Any], Columns]:
        with ThreadPoolExecutor(THREADS) as pool:
            made = (
                each
                for i in range(0, len(given), SHARDS_AHEAD)
                for each in pool.map(table, range(len(given))[i : i + SHARDS_AHEAD])
            )
            joint = partial(joint_vocabulary, given=vocabularies) if labels == "same" else None
            return gather(given, numbers, made, vocabulary=joint, writer=writer)

    places = hashlib.sha256(os.fsencode("\0".join([labels, *identities]))).hexdigest()
    name = f"index-{places[:16]}"
    head, columns = shared(cache, name, state=state, make=make)
    if not len(columns["offset"]):
        raise UserError(
            f"{given[0].name}{' and the other shards' if len(given) > 1 else ''} hold no audio "
            f"({', '.join(AUDIO_SUFFIXES)})"
        )
    return Index(head, columns, shards=given, remote_shards=remote_shards)
