"""Reads shards that cannot be indexed from front to end, endlessly: **not exactly resumable**.

It is used for compressed tars, the output of commands (``pipe:``), and remote tars without tables
that the cache cannot hold. Nothing is kept on disk. The order of the shards is a function of (seed,
epoch); the clips of a shard come in the order of the shard, mixed within a window of
``shuffle_clips`` and at most ``WINDOW_BYTES``. The shards of consecutive epochs are dealt over the
readers (rank x worker), so all read equally much for any numbers; where there are fewer shards than
readers, each reads all and takes every n-th clip. The position of a reader is not recorded: a
resumed run begins with the shards of another ``epoch``.

A sample is ``KEY.flac`` + ``KEY.json`` side by side, as WebDataset writes them; the rules of
``bat.data.table`` hold (regular members, known suffixes, size caps, no pickle). Reading of a shard
that breaks off ends there. In ``take_skipped`` it counts as approximately the number of clips that
are lost (``Losses``), and each unusable member counts as one. Clips of other splits are skipped
without being counted.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from bat.data.plan import ORDER, below, philox
from bat.data.sources import RetryPolicy, Shard, find, shown
from bat.data.splits import split_of
from bat.data.table import ITS_JSON, MAX_AUDIO_BYTES, MAX_JSON_BYTES, parse_labels
from bat.data.tar import Member, sample_key
from bat.data.tar_stream import open_stream, stream_members
from bat.errors import UserError
from bat.tasks.base import AUDIO_SUFFIXES, UNDECODED_SUFFIXES, no_decoder
from bat.types import Clip, Skipped

WINDOW = 100
"""Random stream of the window's shuffling (lower numbers are those of ``bat.data.plan``)."""
WINDOW_BYTES = 1 << 28
"""Bytes of encoded clips that a reader holds to mix them; fewer long recordings fit."""
MAX_UNFIT = 10_000
"""Number of consecutive unusable members after which reading of a shard ends."""


class SequentialClips(IterableDataset[Clip]):
    """Endless clips of ``shards``; each epoch's clips occur once over all readers.

    Args:
        shards: as ``open_index`` takes them, compressed tars too; or ``Shard``.
        splits: splits of the clips to read, ``""`` for clips without one; None: all clips. See
            ``bat.data.splits``.
        seed, epoch: of the order; ``epoch`` is the first one to read.
        rank, world: index of this process and number of the training processes.
        vocabulary: class names in the order of their indices; empty: clips have no labels.
        shuffle_clips: number of encoded clips that a reader holds to mix them.

    Raises:
        UserError: no shards found; while reading: a label that ``vocabulary`` lacks, not one clip
            (of ``splits``) in all shards, ``SPAN`` unreadable shards in a row.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path | Shard],
        *,
        splits: Collection[str] | None = None,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        vocabulary: Sequence[str] = (),
        shuffle_clips: int = 256,
        retries: int = 5,
        timeout_seconds: float = 30.0,
        redirects: Sequence[str] = (),
    ) -> None:
        if shuffle_clips < 1 or epoch < 0:
            raise UserError(f"{shuffle_clips=}, {epoch=}: at least 1, not negative")
        assert 0 <= rank < world
        self.policy = RetryPolicy(retries, timeout_seconds, redirects=tuple(redirects))
        sources = [shards] if isinstance(shards, (str, Path)) else list(shards)
        self.shards = [
            shard
            for source in sources
            for shard in ([source] if isinstance(source, Shard) else find(source, self.policy))
        ]
        if not self.shards:
            raise UserError("the list of shards is empty: give a folder, a glob or a URL")
        self.splits = splits
        self._names = _names(self.shards)
        self.seed, self.epoch, self.rank, self.world = seed, epoch, rank, world
        self.classes = {name: i for i, name in enumerate(vocabulary)}
        self.shuffle_clips = shuffle_clips
        self._skipped: list[Skipped] = []
        self._broke: Skipped | None = None  # error at which the latest shard ended, if any
        self._unfit = 0  # consecutive unusable members
        self._others: set[str] = set()  # splits skipped
        self._losses = Losses(SPAN)
        self._yielded = 0

    def take_skipped(self) -> list[Skipped]:
        """Returns this process's skipped clips since the last call; ``position``: clips before."""
        taken, self._skipped = self._skipped, []
        return taken

    def __iter__(self) -> Iterator[Clip]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, readers = self.rank * workers + number, self.world * workers
        span = math.ceil(min(len(self.shards), SPAN) / workers)
        self._losses = Losses(max(span, LEAST_SPAN))
        window, held = list[Clip](), 0
        bits, last = philox(self.seed, reader, WINDOW), self.epoch
        for epoch, clip in self._dealt(reader, readers):
            while window and epoch != last:  # an epoch's end empties the window
                yield self._out(window, below(len(window), bits))
            held, last = len(clip.data) + (held if window else 0), epoch
            window.append(clip)
            while len(window) >= self.shuffle_clips or (window and held > WINDOW_BYTES):
                out = self._out(window, below(len(window), bits))
                held -= len(out.data)
                yield out

    def _out(self, window: list[Clip], i: int) -> Clip:
        window[i], window[-1] = window[-1], window[i]
        self._yielded += 1
        self._skipped += self._losses.due()
        return window.pop()

    def order(self, epoch: int) -> np.ndarray:
        """Returns the numbers of the shards in the order of ``epoch``: (m,) int64."""
        return np.argsort(philox(self.seed, epoch, ORDER).random_raw(len(self.shards)))

    def _dealt(self, reader: int, readers: int) -> Iterator[tuple[int, Clip]]:
        """Yields (epoch, clip) that this reader reads, without end."""
        count = len(self.shards)
        all_read_all = count < readers
        place, barren, dead = (0 if all_read_all else reader), set[Shard](), 0
        while True:
            epoch, i = divmod(place, count)
            epoch += self.epoch
            shard = self.shards[int(self.order(epoch)[i])]
            found = 0
            for n, clip in enumerate(self._clips(shard)):
                found += 1
                if not all_read_all or (n + i + epoch) % readers == reader:
                    yield epoch, clip
            self._losses.shard(found, self._broke)
            barren = set() if found else barren | {shard}
            dead = dead + 1 if self._broke and not found else 0
            if len(barren) == count or dead >= SPAN:
                raise UserError(self._nothing(shard, dead))
            place += 1 if all_read_all else readers

    def _nothing(self, shard: Shard, dead: int) -> str:
        """Returns the reason why reading ends without any clip."""
        if self._others and self._broke is None:
            wanted = " or ".join(repr(name) for name in sorted(self.splits or ()) if name)
            splits = sorted(self._others - {""}) or "not given"
            return f"no clip has split {wanted}: splits are {splits}"
        why = self._skipped[-1].why if self._skipped else "they hold no audio"
        which = f"latest {dead}" if dead >= SPAN else str(len(self.shards))
        where = f"{self._names[shard]}: {why}"
        return f"none of the {which} shards gave a clip ({where}): check the shards"

    def _skip(self, shard: Shard, key: str, kind: str, why: str) -> None:
        self._unfit += 1
        self._skipped.append(Skipped(key, self._names[shard], kind, why, self._yielded))

    def _clips(self, shard: Shard) -> Iterator[Clip]:
        """Yields the clips of one shard, as far as it can be read."""
        sample = _Sample("", "", b"", {})
        self._broke, self._unfit = None, 0
        try:
            with open_stream(shard, self.policy) as file:
                for member, data in stream_members(file):
                    suffix = os.path.splitext(member.name)[1][1:].lower()
                    key = sample_key(member.name)
                    if self._unfit >= MAX_UNFIT:
                        raise OSError(5, f"{MAX_UNFIT} members in a row are no clips")
                    reason = _unfit(member, suffix)
                    if suffix == "json" or (suffix in AUDIO_SUFFIXES and not reason):
                        if key != sample.key:
                            if self._wanted(shard, sample):
                                yield self._clip(shard, sample)
                            sample = _Sample(key, "", b"", {})
                        meta = None if reason or suffix != "json" else _object(data())
                        if meta is not None:
                            sample = sample._replace(meta=meta)
                        elif suffix == "json":  # a clip without labels, or of an unknown split
                            reason = reason or ("corrupt", "not a JSON object")
                            self._skip(shard, key, reason[0], f"{ITS_JSON}: {reason[1]}")
                            sample = sample._replace(useless=True)
                        elif not sample.data:
                            sample = sample._replace(codec=suffix, data=data())
                            self._unfit = 0
                        else:
                            self._skip(shard, key, "corrupt", "a second one of this key")
                    elif reason:
                        self._skip(shard, key, *reason)
        except (OSError, EOFError, zlib.error) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._skip(shard, "", "unreadable", why)
            self._broke = self._skipped[-1]
            if (self.classes or self.splits is not None) and not sample.meta:
                sample = sample._replace(data=b"")  # label and split may be in what is missing
        if self._wanted(shard, sample):
            yield self._clip(shard, sample)

    def _wanted(self, shard: Shard, sample: _Sample) -> bool:
        if self.splits is None or sample.useless or not sample.data:
            return bool(sample.data) and not sample.useless
        split = split_of(sample.meta, shard)
        if split not in self.splits:
            self._others.add(split)
        return split in self.splits

    def _clip(self, shard: Shard, sample: _Sample) -> Clip:
        names = [name for name, _ in parse_labels(sample.meta)] if self.classes else []
        for name in names:
            if name not in self.classes:
                raise UserError(f"label {name!r} of {sample.key} is not in the vocabulary")
        labels = tuple(self.classes[name] for name in names)
        return Clip(sample.key, sample.data, sample.codec, labels, self._names[shard])


def _names(shards: Sequence[Shard]) -> dict[Shard, str]:
    """Returns file names, with their folders where two shards share one."""
    often = Counter(shard.name for shard in shards)

    def longer(place: Path | str) -> str:
        parts = place.parts if isinstance(place, Path) else shown(place).split("/")
        return "/".join(parts[-2:])

    return {s: s.name if often[s.name] == 1 or s.command else longer(s.place) for s in shards}


class _Sample(NamedTuple):
    key: str
    codec: str
    data: bytes
    meta: dict[str, Any]
    useless: bool = False
    """True if its JSON cannot be read."""


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None


def _unfit(member: Member, suffix: str) -> tuple[str, str] | None:
    """Returns (kind, why) of a member that should be a clip and cannot be; None for any other."""
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


SPAN = 100
"""Number of latest shards over which losses are averaged in a process."""
LEAST_SPAN = 8
MAX_RATE = 100.0
"""Greatest number of lost clips reported for each clip read."""


class Losses:
    """Reports the clips of lost shards gradually, so that ``data.max_bad`` takes them into account.

    The number of clips in a lost shard is unknown. It is estimated as the mean number in shards
    read whole, minus the clips that were read from it, and at least one. Reported at once, one lost
    shard of thousands would look like the end of the data set; so its clips are reported evenly
    over the ``span`` shards that follow, and shards not yet read count as good. At any time the
    reports thus give approximately the share of clips lost in the latest ``span`` shards.

    Args:
        span: shards over which a loss is reported.
    """

    def __init__(self, span: int) -> None:
        self._latest: deque[tuple[int, Skipped | None]] = deque(maxlen=span)
        self._span, self._whole, self._clips = span, 0, 0
        self._rate = self._debt = 0.0
        self._told = 0

    def shard(self, clips: int, broke: Skipped | None) -> None:
        """Record that a shard gave ``clips`` and ended, or ``broke`` off (reported once
        already)."""
        self._latest.append((clips, broke))
        if broke is None:
            self._whole, self._clips = self._whole + 1, self._clips + clips
        else:
            self._debt -= 1
        mean = self._clips / self._whole if self._whole else 1.0
        missing = sum(max(1.0, mean - n) for n, lost in self._latest if lost)
        there = sum(n for n, _ in self._latest) + mean * (self._span - len(self._latest))
        self._rate = min(missing / max(there, 1.0), MAX_RATE)

    def due(self) -> list[Skipped]:
        """Returns the losses to report with the next clip that is read; usually none."""
        lost = [broke for _, broke in self._latest if broke is not None]
        if not lost:
            self._debt = 0.0
            return []
        self._debt += self._rate
        count = max(0, int(self._debt))
        self._debt -= count
        self._told += count
        return [lost[(self._told - i) % len(lost)] for i in range(count)]
