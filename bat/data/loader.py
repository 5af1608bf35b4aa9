"""A loader that outlives its workers: one that dies is replaced, and no batch is lost or repeated.

``workers.py`` notices a death; the next ``next()`` makes new workers and hands them first the
batches that were handed out and never arrived. What a batch holds depends on its places in the plan
alone, so the stream goes on as if nothing had happened. Shards read from front to end have no
places: ``renew`` gives that dataset a new beginning.

Bounded: workers that keep dying mean that the machine or a file is to blame, not chance.
An exception that a worker raises is not a death and comes through as it is.
"""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from bat.data.board import as_user_error
from bat.data.stream import Item, as_it_is
from bat.data.workers import Deaths, Workers, worker_init
from bat.errors import UserError
from bat.types import WaveBatch

log = logging.getLogger("bat")

SPAN = 1000
"""Micro-batches within which deaths are counted together."""
RESTARTS = 10
"""Deaths replaced within ``SPAN``, where no setting says how many."""


class Restarts:
    """Counts deaths, tells of them, and says when there are too many.

    Args:
        limit: deaths replaced within ``SPAN`` micro-batches (``health.worker_restarts``); one more
            raises. None: ``RESTARTS``, which no setting changes.
        where: what a worker was reading when it died, or None.
        note: what the replacement means for the stream, after a semicolon.
    """

    def __init__(
        self,
        limit: int | None = None,
        *,
        where: Callable[[int], str | None] = lambda worker: None,
        note: str = "no batch is lost or repeated",
    ) -> None:
        if limit is not None and limit < 0:
            raise UserError(f"worker_restarts={limit} must not be negative")
        self.limit = RESTARTS if limit is None else limit
        self.bound = str(RESTARTS) if limit is None else f"health.worker_restarts={limit}"
        self.where, self.note = where, note
        self.tell: Callable[[str], None] | None = None
        """Called with each replacement's line, in place of a warning in the log."""
        self.count = 0
        """Replacements so far."""
        self.batches = 0
        """Micro-batches that came."""
        self._recent: deque[int] = deque()  # ``batches`` at each

    def died(self, deaths: Deaths) -> None:
        """Workers died.

        Raises:
            UserError: too many have, or the system let none be started.
        """
        who = ", ".join(self._who(*death) for death in deaths)
        self._recent.append(self.batches)
        while self.batches - self._recent[0] >= SPAN:
            self._recent.popleft()
        if len(self._recent) > self.limit:
            raise UserError(
                f"loader workers died {len(self._recent)} times within {SPAN} micro-batches, the "
                f"last time {who}: more than {self.bound}. Most likely "
                "memory ran out: lower data.workers or data.cache_waves_gb, or give more shared "
                "memory (/dev/shm; docker run --shm-size). If it was the same clip each time, "
                "that file is to blame: look at it with bat-shard verify"
            )
        self.count += 1
        line = f"a loader was replaced: {who}; {self.note} (replacement {self.count})"
        if self.tell is None:
            log.warning("%s", line)
        else:
            self.tell(line)

    def _who(self, worker: int, code: int) -> str:
        if code < 0:
            with suppress(ValueError):
                how = f"was killed by {signal.Signals(-code).name}"
                return f"worker {worker} {how}{self._at(worker)}"
            return f"worker {worker} was killed by signal {-code}{self._at(worker)}"
        return f"worker {worker} ended with exit code {code}{self._at(worker)}"

    def _at(self, worker: int) -> str:
        where = self.where(worker)
        return f" at {where}" if where else ""


class Replay(Sampler[list[Item]]):
    """The batches of ``sampler``; a second iterator begins with those that never arrived."""

    def __init__(self, sampler: Sampler[list[Item]]) -> None:
        self.sampler = sampler
        self.begin()

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def begin(self) -> None:
        """Forget what was; ``sampler`` from its start."""
        self._rest = iter(self.sampler)
        self._waiting: deque[list[Item]] = deque()  # handed out, not arrived
        self._arrived = 0

    def arrived(self) -> None:
        """The first of those that wait has come."""
        self._waiting.popleft()
        self._arrived += 1

    def __iter__(self) -> Iterator[list[Item]]:
        number = self._arrived
        while True:
            if number - self._arrived == len(self._waiting):
                try:
                    self._waiting.append(next(self._rest))
                except StopIteration:
                    return
            yield self._waiting[number - self._arrived]
            number += 1


class LastingLoader(DataLoader[WaveBatch]):
    """``DataLoader`` over whole batches, whose workers are replaced when they die.

    Args:
        sampler: of the batches of a map-style ``dataset``; None for an iterable one.
        workers: loader processes; 0 decodes in this process.
        restarts: counts and bounds replacements.
        renew: called before new workers start, for a dataset without places.

    Raises:
        UserError: from ``next()``: too many deaths.
    """

    def __init__(
        self,
        dataset: Dataset[WaveBatch],
        sampler: Sampler[list[Item]] | None = None,
        *,
        workers: int,
        restarts: Restarts,
        pin_memory: bool = False,
        renew: Callable[[], None] | None = None,
    ) -> None:
        self.replay = None if sampler is None else Replay(sampler)
        self.restarts, self.renew = restarts, renew
        of_batches: dict[str, Any] = (
            {"batch_size": None} if self.replay is None else {"batch_sampler": self.replay}
        )
        super().__init__(
            dataset,
            **of_batches,
            collate_fn=as_it_is,
            num_workers=workers,
            worker_init_fn=worker_init,
            persistent_workers=workers > 0 and sampler is not None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # it draws a seed: never from the run's own state
        )

    def __iter__(self) -> Iterator[WaveBatch]:  # type: ignore[override]
        if self.replay is not None:
            self.replay.begin()
        return _Batches(self)

    def _get_iterator(self) -> _BaseDataLoaderIter:
        if self.num_workers == 0:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        return Workers(self)

    def start(self) -> _BaseDataLoaderIter:
        """An iterator from where ``replay`` stands; workers that wait are used again."""
        try:
            return super().__iter__()
        except Exception as error:  # torch wakes persistent workers here
            return self.start_again(self._iterator, error)

    def start_again(
        self, broken: _BaseDataLoaderIter | None, error: Exception
    ) -> _BaseDataLoaderIter:
        """A new iterator after ``error``; raises it where it was not a worker's death."""
        deaths = broken.deaths() if isinstance(broken, Workers) else []
        if not isinstance(broken, Workers) or not deaths:
            raise as_user_error(error)
        broken.abandon()
        self._iterator = None
        self.restarts.died(deaths)
        if self.renew is not None:
            self.renew()
        return self.start()


class _Batches(Iterator[WaveBatch]):
    """One pass over a loader."""

    def __init__(self, loader: LastingLoader) -> None:
        self.loader = loader
        self.batches = loader.start()

    def __next__(self) -> WaveBatch:
        while True:
            try:
                batch: WaveBatch = next(self.batches)
            except StopIteration:
                raise
            except Exception as error:
                self.batches = self.loader.start_again(self.batches, error)
                continue
            if self.loader.replay is not None:
                self.loader.replay.arrived()
            self.loader.restarts.batches += 1
            return batch
