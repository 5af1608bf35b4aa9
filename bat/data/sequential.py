"""Shards that cannot be indexed, read from front to end, endlessly: **not exactly resumable**.

For compressed tars, and remote ones without tables that the cache cannot hold. Nothing is kept on
disk. The order of the shards is a function of (seed, epoch); the clips of a shard come in its own
order, mixed within a window of ``shuffle_clips``. The shards of one epoch after the other are dealt
over the readers (rank x worker), so all read equally much however the numbers divide; where there
are fewer shards than readers, each reads all and takes every n-th clip. Where a reader stands is
known to nobody: a resumed run begins with the shards of another ``epoch``.

A sample is ``KEY.flac`` + ``KEY.json`` side by side, as WebDataset writes them; the rules of
``bat.data.table`` hold (regular members, known suffixes, size caps, no pickle). A shard that breaks
off is left there; it, and each member that is no use, is counted in ``take_skipped``.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from bat.data.plan import ORDER, below, philox
from bat.data.sources import Patience, Shard, find
from bat.data.table import MAX_AUDIO_BYTES, MAX_JSON_BYTES, parse_labels
from bat.data.tar import BLOCK, MAX_EXTENDED_BYTES, Member, pax_records, parse_header, sample_key
from bat.shapes import Clip, Skipped, UserError
from bat.tasks.base import AUDIO_SUFFIXES, UNDECODED_SUFFIXES, no_decoder

WINDOW = 100
"""Random stream of the window's shuffling (those of ``bat.data.plan`` are below)."""
MAX_SHARD_BYTES = 1 << 38
"""A shard that unpacks to more is left there."""
SKIP_BYTES = 1 << 20


class SequentialClips(IterableDataset[Clip]):
    """Endless clips of ``shards``, each epoch's once over all readers.

    Args:
        shards: as ``open_index`` takes them, compressed tars too.
        seed, epoch: of the order; ``epoch`` is the first one to read.
        rank, world: this process among those that train.
        vocabulary: class names in the order of their indices; empty: clips come without labels.
        shuffle_clips: how many encoded clips a reader holds to mix them.

    Raises:
        UserError: nothing there; while reading: a label that ``vocabulary`` lacks, or not one clip
            in as many shards as there are.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        vocabulary: Sequence[str] = (),
        shuffle_clips: int = 256,
        retries: int = 5,
        timeout_seconds: float = 30.0,
    ) -> None:
        if shuffle_clips < 1 or epoch < 0:
            raise UserError(f"{shuffle_clips=}, {epoch=}: at least 1, not negative")
        assert 0 <= rank < world
        self.patience = Patience(retries, timeout_seconds)
        sources = [shards] if isinstance(shards, (str, Path)) else list(shards)
        self.shards = [shard for source in sources for shard in find(source, self.patience)]
        if not self.shards:
            raise UserError("the list of shards is empty: give a folder, a glob or a URL")
        self.seed, self.epoch, self.rank, self.world = seed, epoch, rank, world
        self.classes = {name: i for i, name in enumerate(vocabulary)}
        self.shuffle_clips = shuffle_clips
        self._skipped: list[Skipped] = []
        self._yielded = 0

    def take_skipped(self) -> list[Skipped]:
        """What was no use since the last call, in this process; ``position``: clips before it."""
        taken, self._skipped = self._skipped, []
        return taken

    def __iter__(self) -> Iterator[Clip]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, readers = self.rank * workers + number, self.world * workers
        window: list[Clip] = []
        bits, last = philox(self.seed, reader, WINDOW), self.epoch
        for epoch, clip in self._dealt(reader, readers):
            while window and epoch != last:  # an epoch's end empties the window
                yield self._out(window, below(len(window), bits))
            last = epoch
            window.append(clip)
            if len(window) >= self.shuffle_clips:
                yield self._out(window, below(len(window), bits))

    def _out(self, window: list[Clip], i: int) -> Clip:
        window[i], window[-1] = window[-1], window[i]
        self._yielded += 1
        return window.pop()

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of the shards as ``epoch`` reads them: (m,) int64."""
        return np.argsort(philox(self.seed, epoch, ORDER).random_raw(len(self.shards)))

    def _dealt(self, reader: int, readers: int) -> Iterator[tuple[int, Clip]]:
        """(epoch, clip): what this reader reads, without end."""
        count = len(self.shards)
        all_read_all = count < readers
        place, barren = (0 if all_read_all else reader), 0
        while True:
            epoch, i = divmod(place, count)
            epoch += self.epoch
            shard = self.shards[int(self.order(epoch)[i])]
            found = 0
            for n, clip in enumerate(self._clips(shard)):
                found += 1
                if not all_read_all or (n + i + epoch) % readers == reader:
                    yield epoch, clip
            barren = 0 if found else barren + 1
            if barren >= count:
                why = self._skipped[-1].why if self._skipped else "they hold no audio"
                raise UserError(f"none of the {count} shards gave a clip ({shard.name}: {why})")
            place += 1 if all_read_all else readers

    def _skip(self, shard: Shard, key: str, kind: str, why: str) -> None:
        self._skipped.append(Skipped(key, shard.name, kind, why, self._yielded))

    def _clips(self, shard: Shard) -> Iterator[Clip]:
        """The clips of one shard, as far as it can be read."""
        sample = _Sample("", "", b"", {})
        try:
            with _open(shard, self.patience) as file:
                for member, data in _members(file):
                    suffix = os.path.splitext(member.name)[1][1:].lower()
                    key = sample_key(member.name)
                    reason = _unfit(member, suffix)
                    if reason:
                        self._skip(shard, key, *reason)
                    elif suffix == "json" or suffix in AUDIO_SUFFIXES:
                        if key != sample.key:
                            if sample.data:
                                yield self._clip(shard, sample)
                            sample = _Sample(key, "", b"", {})
                        content = data()
                        if suffix == "json":
                            sample = sample._replace(meta=self._meta(shard, key, content))
                        elif not sample.data:
                            sample = sample._replace(codec=suffix, data=content)
                        else:
                            self._skip(shard, key, "corrupt", "a second one of this key")
        except (OSError, EOFError, zlib.error) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._skip(shard, "", "unreadable", why)
            if self.classes and not sample.meta:  # its labels may be in what is missing
                sample = sample._replace(data=b"")
        if sample.data:
            yield self._clip(shard, sample)

    def _meta(self, shard: Shard, key: str, text: bytes) -> dict[str, Any]:
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            self._skip(shard, key, "corrupt", "not a JSON object")
            return {}

    def _clip(self, shard: Shard, sample: _Sample) -> Clip:
        names = [name for name, _ in parse_labels(sample.meta)] if self.classes else []
        for name in names:
            if name not in self.classes:
                raise UserError(f"label {name!r} of {sample.key} is not in the vocabulary")
        labels = tuple(self.classes[name] for name in names)
        return Clip(sample.key, sample.data, sample.codec, labels, shard.name)


class _Sample(NamedTuple):
    key: str
    codec: str
    data: bytes
    meta: dict[str, Any]


def _unfit(member: Member, suffix: str) -> tuple[str, str] | None:
    """(kind, why) of a member that should be a clip's and cannot be."""
    if suffix in UNDECODED_SUFFIXES:
        return "unknown", no_decoder(suffix)
    if suffix != "json" and suffix not in AUDIO_SUFFIXES:
        return None
    if not member.regular:
        return "corrupt", "not a regular file"
    if member.size == 0:
        return "empty", "the file is empty"
    cap = MAX_JSON_BYTES if suffix == "json" else MAX_AUDIO_BYTES
    return ("long", f"larger than {cap} bytes") if member.size > cap else None


class _Pieces(io.RawIOBase):
    """Bytes that come in pieces, as a file."""

    def __init__(self, pieces: Generator[bytes, None, None]) -> None:
        self._pieces, self._left = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if not self._left:
            self._left = memoryview(next(self._pieces, b""))
        n = min(len(target), len(self._left))
        target[:n], self._left = self._left[:n], self._left[n:]
        return n

    def close(self) -> None:
        self._pieces.close()
        super().close()


@contextlib.contextmanager
def _open(shard: Shard, patience: Patience) -> Iterator[io.BufferedIOBase]:
    """The tar as it unpacks; gzip is told by its first bytes."""
    with contextlib.ExitStack() as stack:
        file: io.BufferedReader
        if isinstance(shard.place, Path):
            file = stack.enter_context(shard.place.open("rb"))
        else:
            from bat.data.remote import stat, stream

            size = stat(shard.place, patience).size
            pieces = stream(shard.place, size=size, patience=patience)
            file = stack.enter_context(io.BufferedReader(_Pieces(pieces), 1 << 17))
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        yield stack.enter_context(gzip.GzipFile(fileobj=file)) if packed else file


def _members(file: io.BufferedIOBase) -> Iterator[tuple[Member, Any]]:
    """(member, how to read it now) of a tar that cannot be gone back in.

    Raises:
        OSError: not a tar, damaged, or it ends too early.
    """
    at, longer = 0, dict[str, str]()

    def take(size: int) -> bytes:
        nonlocal at
        data = file.read(size)
        at += len(data)
        if len(data) != size:
            raise OSError(5, f"it breaks off at byte {at}")
        return data

    while True:
        if at > MAX_SHARD_BYTES:
            raise OSError(27, f"it unpacks to more than {MAX_SHARD_BYTES} bytes")
        block = file.read(BLOCK)
        if not block:
            raise OSError(5, f"it ends at byte {at} without an end mark: it may be cut short")
        if not block.strip(b"\0") and at and len(block) == BLOCK:
            return
        parsed = parse_header(block, at)
        if parsed is None:
            raise OSError(5, f"it is damaged at byte {at}" if at else "it is not a tar")
        at += BLOCK
        member, kind = parsed
        if kind in (b"x", b"L"):
            if member.size > MAX_EXTENDED_BYTES:
                raise OSError(5, f"it is damaged at byte {at}: a name of {member.size} bytes")
            data = take(-(-member.size // BLOCK) * BLOCK)[: member.size]
            try:
                longer = pax_records(data) if kind == b"x" else {"path": data.rstrip(b"\0").decode()}
                longer["size"] = str(int(longer.get("size", -1)))
            except (ValueError, IndexError) as error:
                raise OSError(5, f"it is damaged at byte {at}: {error}") from error
            continue
        size = int(longer.get("size", -1))
        size = size if size >= 0 else member.size
        end = at + -(-size // BLOCK) * BLOCK
        named = member._replace(name=longer.get("path", member.name), size=size)
        longer = {}
        yield named, lambda size=size: take(size)
        while at < end:
            take(min(SKIP_BYTES, end - at))
