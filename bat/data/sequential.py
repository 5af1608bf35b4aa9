"""Trains on shards that cannot be indexed, from front to end: **not exactly resumable**.

It is used for compressed tars, the output of commands (``pipe:``), and remote tars without tables
that the cache cannot hold. Nothing is kept on disk. The order of the shards is a function of (seed,
epoch); the clips of a shard come in the order of the shard, mixed within a window of
``shuffle_clips`` and at most ``WINDOW_BYTES``. The shards of consecutive epochs are dealt over the
readers (rank x worker), so all read equally much for any numbers; where there are fewer shards than
readers, each reads all and takes every n-th clip. The position of a reader is not recorded: a
resumed run begins with the shards of another ``epoch``.

A sample is ``KEY.flac`` + ``KEY.json`` side by side, as WebDataset writes them; the rules of
``bat.data.table`` hold (regular members, known suffixes, size bounds, no pickle). Reading of a
shard that breaks off ends there.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import logging
import os
import zlib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Unpack

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from bat.audio.decode import DecodeError, decode_into
from bat.data.clip_json import parse
from bat.data.draws import ORDER, below, philox
from bat.data.loader import IDLE, Heartbeat, Loader
from bat.data.module import StreamData
from bat.data.pipes import PREFIX, output_of
from bat.data.sources import TRAIN, RetryPolicy, Shard, check_no_train, find, names_of
from bat.data.stream import BatchRows, ClipReader, ClipSettings, clip_samples
from bat.data.table import ITS_JSON, unusable
from bat.data.tar import ForwardFile, read_members, sample_key
from bat.errors import UserError
from bat.redact import one_line
from bat.tasks.base import AUDIO_SUFFIXES
from bat.types import Clip, Skipped, WaveBatch

WINDOW = 100
"""Random stream of the window's shuffling (lower numbers are those of ``bat.data.draws``)."""
WINDOW_BYTES = 1 << 28
"""Bytes of encoded clips that a reader holds to mix them; fewer long recordings fit."""
LATEST_SHARDS = 100
"""Latest shards of a reader of which ``max_bad`` may break off."""
TOO_MANY_IN_A_ROW = 1000
log = logging.getLogger("bat")


@contextlib.contextmanager
def open_stream(shard: Shard, policy: RetryPolicy) -> Iterator[BinaryIO]:
    """Opens the unpacked bytes of a shard; gzip is recognised by its first bytes."""
    with contextlib.ExitStack() as stack:
        file: Any
        if shard.command:
            file = stack.enter_context(output_of(str(shard.place).removeprefix(PREFIX)))
        elif isinstance(shard.place, Path):
            file = stack.enter_context(shard.place.open("rb"))
        else:
            from bat.data.remote import opened

            file = stack.enter_context(opened(shard.place, policy))
        if file.peek(2)[:2] == b"\x1f\x8b":
            file = gzip.GzipFile(fileobj=file)
        yield file


@dataclass
class _Sample:
    key: str = ""
    codec: str = ""
    data: bytes = b""
    meta: dict[str, Any] | None = field(default_factory=dict)
    """None: its JSON cannot be read, so its split is not known."""


class SequentialBatches(ClipReader, IterableDataset[WaveBatch]):
    """Endless batches of decoded clips; each epoch's clips occur once over all readers.

    Args:
        splits: splits of the clips to read, ``""`` for clips without one; None: all clips.
        seed, epoch: of the order; ``epoch`` is the first one to read.
        rank, world: index of this process and number of the training processes.
        shuffle_clips: number of encoded clips that a reader holds to mix them.
        max_bad: share of the latest shards that may break off.
        settings: what is read of a clip, see ``ClipSettings`` (no offset, no cache).

    Raises:
        UserError: while reading: not one clip (of ``splits``) in all shards, too many shards that
            break off, too many unreadable clips in a row.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        batch: int,
        splits: Collection[str] | None = None,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle_clips: int = 256,
        max_bad: float = 0.05,
        policy: RetryPolicy | None = None,
        heartbeat: Heartbeat | None = None,
        **settings: Unpack[ClipSettings],
    ) -> None:
        super().__init__(seed=seed, **settings)
        self.shards, self.names, self.splits = list(shards), names_of(shards), splits
        self.epoch, self.rank, self.world = epoch, rank, world
        self.batch, self.shuffle_clips, self.max_bad = batch, shuffle_clips, max_bad
        self.policy, self.heartbeat = policy or RetryPolicy(), heartbeat
        self._other_splits: set[str] = set()

    def __iter__(self) -> Iterator[WaveBatch]:
        reader, readers = self._reader()
        count, failures, items = 0, 0, self._shuffled()
        while True:
            rows, keys, positions = (
                BatchRows(self.batch, self.clip_samples),
                list[str](),
                list[int](),
            )
            skipped: list[Skipped] = []
            while len(keys) < self.batch:
                item = next(items)
                position = count * readers + reader
                if isinstance(item, Clip):
                    count += 1
                    try:
                        how, _ = self.segment(item.data, position)
                        place = functools.partial(self.place, position)
                        rows.keep(*decode_into(rows.next, item.data, place=place, **how))
                        keys.append(item.key)
                        positions.append(position)
                        failures = 0
                        continue
                    except DecodeError as error:
                        item = Skipped(item.key, item.shard, error.kind, str(error), position)
                skipped.append(item._replace(position=position))
                failures += 1
                if failures > TOO_MANY_IN_A_ROW:
                    raise UserError(
                        f"{failures} unreadable clips in a row (the last: {item.key}, {item.why}): "
                        "check the shards"
                    )
            self._reads(IDLE)
            waves, lengths = rows.tensors()
            yield WaveBatch(
                waves=waves,  # (B, S)
                lengths=lengths,
                targets=torch.zeros(self.batch, 0),
                keys=keys,
                positions=torch.tensor(positions, dtype=torch.int64),
                skipped=skipped,
            )

    def _reader(self) -> tuple[int, int]:
        """Returns the number of this reader and how many there are."""
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        return self.rank * workers + number, self.world * workers

    def _reads(self, what: int) -> None:
        if self.heartbeat is not None:
            self.heartbeat.reads(what)

    def _shuffled(self) -> Iterator[Clip | Skipped]:
        """Yields the clips that this reader reads, mixed within a window of an epoch."""
        window, held = list[Clip](), 0
        bits, last = philox(self.seed, self._reader()[0], WINDOW), self.epoch

        def drawn() -> Clip:
            i = below(len(window), bits)
            window[i], window[-1] = window[-1], window[i]
            return window.pop()

        for epoch, item in self._dealt():
            if isinstance(item, Skipped):
                yield item
                continue
            while window and epoch != last:  # an epoch's end empties the window
                yield drawn()
            held, last = len(item.data) + (held if window else 0), epoch
            window.append(item)
            while len(window) >= self.shuffle_clips or (window and held > WINDOW_BYTES):
                out = drawn()
                held -= len(out.data)
                yield out

    def order(self, epoch: int) -> np.ndarray:
        """Returns the numbers of the shards in the order of ``epoch``: (m,) int64."""
        return np.argsort(philox(self.seed, epoch, ORDER).random_raw(len(self.shards)))

    def _dealt(self) -> Iterator[tuple[int, Clip | Skipped]]:
        """Yields (epoch, clip) that this reader reads, without end."""
        (reader, readers), count = self._reader(), len(self.shards)
        shared = count < readers  # each reads all shards
        place, barren = (0 if shared else reader), set[int]()
        broken: deque[bool] = deque(maxlen=LATEST_SHARDS)
        while True:
            epoch, i = divmod(place, count)
            epoch += self.epoch
            number = int(self.order(epoch)[i])
            found, broke = 0, ""
            self._reads(number)
            for item in self._clips(number):
                if isinstance(item, Clip):
                    found += 1
                    if shared and (found - 1 + i + epoch) % readers != reader:
                        continue
                elif not item.key:
                    broke = item.why
                yield epoch, item
                self._reads(number)
            barren = set() if found else barren | {number}
            broken.append(bool(broke))
            name, latest = self.names[number], sum(broken)
            if latest > self.max_bad * LATEST_SHARDS and self.max_bad < 1:
                raise UserError(
                    f"{latest} of the latest {len(broken)} shards broke off (the last: {name}, "
                    f"{broke}), more than max_bad={self.max_bad:g}: check the shards"
                )
            if len(barren) == count:
                why = f"the last: {name}, {broke}" if broke else "they hold no audio"
                if self._other_splits and not broke:
                    splits = ", ".join(sorted(self._other_splits - {""})) or "not given"
                    wanted = " or ".join(repr(name) for name in sorted(self.splits or ()) if name)
                    why = f"none has split {wanted}; splits are {splits}; see data.split"
                raise UserError(f"none of the {count} shards gave a clip ({why})")
            place += 1 if shared else readers

    def _clips(self, number: int) -> Iterator[Clip | Skipped]:
        """Yields the clips of one shard as far as it can be read, and what is wrong with the others
        (without a key: the error at which the shard ends)."""
        shard, name = self.shards[number], self.names[number]
        sample = _Sample()

        def skip(key: str, kind: str, why: str) -> Skipped:
            return Skipped(key, name, kind, why, 0)

        def finished() -> Iterator[Clip]:
            if sample.data and self._is_wanted(sample, shard):
                yield Clip(sample.key, sample.data, sample.codec, (), name)

        try:
            with open_stream(shard, self.policy) as file:
                source = ForwardFile(file)
                for member in read_members(source):
                    suffix = os.path.splitext(member.name)[1][1:].lower()
                    key = sample_key(member.name)
                    problem = unusable(member, suffix)
                    if problem and suffix != "json":
                        yield skip(key, *problem)
                    elif suffix == "json" or suffix in AUDIO_SUFFIXES:
                        if key != sample.key:
                            yield from finished()
                            sample = _Sample(key)
                        if suffix != "json" and sample.data:
                            yield skip(key, "corrupt", "a second one of this key")
                        elif suffix != "json":
                            sample.codec, sample.data = suffix, source.take(member.size)
                        else:
                            try:
                                sample.meta = None if problem else parse(source.take(member.size))
                            except (ValueError, TypeError, RecursionError):
                                problem, sample.meta = ("corrupt", "not a JSON object"), None
                            if problem:
                                yield skip(key, problem[0], f"{ITS_JSON}: {problem[1]}")
        except (OSError, EOFError, zlib.error) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            yield skip("", "unreadable", why)
            if self.splits is not None and not sample.meta:
                return  # its split may be in what is missing
        yield from finished()

    def _is_wanted(self, sample: _Sample, shard: Shard) -> bool:
        if sample.meta is None or self.splits is None:
            return sample.meta is not None
        said = sample.meta.get("split")
        split = one_line(said) if isinstance(said, str) and said else shard.split
        if split not in self.splits:
            self._other_splits.add(split)
        return split in self.splits


class SequentialData(StreamData):
    """Training stream over ``shards`` read from front to end, without labels.

    Args:
        shards: as ``open_index`` takes them, compressed tars too.
        split: a name, several (``a,b``), ``all``, or ``auto``: see ``selected``.
        batch, seed, workers, max_bad, out, settings: as ``AudioData``.
        retries, timeout_seconds, redirects: of remote shards, as ``open_index``.

    Raises:
        UserError: no shards found, only splits for evaluation, a value out of range.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        *,
        batch: int,
        split: str = "auto",
        seed: int = 0,
        workers: int = 0,
        max_bad: float = 0.05,
        out: Path | None = None,
        retries: int = 5,
        timeout_seconds: float = 30.0,
        redirects: Sequence[str] = (),
        **settings: Unpack[ClipSettings],
    ) -> None:
        super().__init__(batch=batch, max_bad=max_bad, workers=workers, out=out)
        self.policy = RetryPolicy(retries, timeout_seconds, redirects=tuple(redirects))
        found = [shard for source in shards for shard in find(source, self.policy)]
        if not found:
            raise UserError("the list of shards is empty: give a folder, a glob or a URL")
        self.shards, self.splits = selected(found, split)
        self.seed, self.settings = seed, settings
        self.clip_samples = clip_samples(settings["clip_seconds"], settings["sample_rate"])

    def _batches(self, *, epoch: int) -> SequentialBatches:
        rank, world = self._ranks()
        return SequentialBatches(
            self.shards,
            batch=self.batch,
            splits=self.splits,
            seed=self.seed,
            epoch=epoch,
            rank=rank,
            world=world,
            max_bad=self.bad_clips.max_bad,
            policy=self.policy,
            heartbeat=self.heartbeat,
            **self.settings,
        )

    def named(self, what: int) -> str:
        return self.shards[what].name

    def first_batch(self) -> WaveBatch:
        return next(iter(self._batches(epoch=0)))

    @functools.cached_property
    def hash(self) -> str:
        """Hash of the names of the shards, the sizes of the local ones, and the splits, at first
        use."""
        digest = hashlib.sha256(repr(self.splits and sorted(self.splits)).encode())
        for shard in self.shards:
            size = -1
            if isinstance(shard.place, Path) and shard.place.exists():
                size = shard.place.stat().st_size
            digest.update(os.fsencode(f"\0{shard.split}/{shard.name}\0{size}"))
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        order = "front to end, not exactly resumable"
        return {"hash": self.hash, "shards": len(self.shards), "order": order}

    def train_dataloader(self) -> Loader:
        self._recount()
        # the first epoch to read: differs between resumes, does not count epochs
        return self._loader(self._batches(epoch=self.batches_done()))

    def _identity(self) -> dict[str, Any]:
        return {
            "reading": "front to end",
            "data set": self.hash[:16],
            "seed": self.seed,
        }


def selected(shards: list[Shard], split: str) -> tuple[list[Shard], frozenset[str] | None]:
    """Returns the shards to open, and the splits of the clips to keep (``""``: clips without one);
    None: all clips.

    Sub-folders name splits at once; the JSON of the clips is known only as they are read.
    ``auto`` takes the first of ``TRAIN`` that is a sub-folder, all clips where the sub-folders have
    other names (``check_no_train``), and without sub-folders the clips of ``TRAIN`` and those
    without a split.
    """
    if split == "all":
        return shards, None
    folders = {shard.split for shard in shards if shard.split}
    if split != "auto":
        names = {part.strip() for part in split.split(",")}
    elif folders.intersection(TRAIN):
        names = {next(name for name in TRAIN if name in folders)}
        others = ", ".join(sorted(folders - names)) or "other splits"
        log.info("pre-training on split %s; data.split=all takes %s too", *names, others)
    elif folders:
        splits = sorted(folders)
        check_no_train(splits, f"the data has the splits {', '.join(splits)}")
        return shards, None
    else:
        return shards, frozenset(["", *TRAIN])
    if names <= folders:
        shards = [shard for shard in shards if shard.split in ("", *names)]
    return shards, frozenset(names)
