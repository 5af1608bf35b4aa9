"""Records what each loader process reads and since when, for the message of a stalled run.

There is one row for the training process and one for each loader worker, in shared memory and
without a lock: (item that is read, start time), written by the process before it reads and readable
by all. A row that is read while it is written may mix two clips, which affects only the message.
The item is a clip's id, or a shard's number where shards are read sequentially. Times are
``time.monotonic_ns``, one clock for all processes of a machine.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from bat.errors import UserError

IDLE = -1


class Reading(NamedTuple):
    """The item that one process is reading."""

    reader: str
    """``worker 1``, or ``the training process`` where that decodes."""
    what: int
    """Clip id or number of the shard."""
    seconds: float
    """Time since the read began."""


def as_user_error(error: Exception) -> Exception:
    """Returns ``error``, or a ``UserError`` if torch reports that shared memory ran out."""
    text = str(error)
    if "shared memory" not in text and "</torch_" not in text:
        return error
    return UserError(
        f"shared memory is full ({text.strip().splitlines()[-1]}): loader processes hand over "
        "batches in /dev/shm. Give it more (docker run --shm-size=8g), lower data.batch, or set "
        "data.workers=0"
    )


class Heartbeat:
    """Rows of the training process and of ``workers`` loader processes, idle at first."""

    def __init__(self, workers: int) -> None:
        assert workers >= 0
        try:
            self._shared = torch.full((workers + 1, 2), IDLE).share_memory_()  # (R, 2) int64
        except RuntimeError as error:
            raise as_user_error(error) from error
        self._rows: np.ndarray = self._shared.numpy()

    def __getstate__(self) -> dict[str, Any]:
        return {"_shared": self._shared}  # passed by handle; an array would be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shared = state["_shared"]
        self._rows = self._shared.numpy()

    def reads(self, what: int) -> None:
        """Record that this process begins to read ``what``."""
        row = _row()
        self._rows[row, 1] = time.monotonic_ns()
        self._rows[row, 0] = what

    def rests(self) -> None:
        """Record that this process has made its batch."""
        self._rows[_row(), 0] = IDLE

    def clear(self) -> None:
        """Mark all rows as idle, when the loader processes have ended."""
        self._rows[:, 0] = IDLE

    def worker(self, number: int) -> int | None:
        """Returns what worker ``number`` reads; None if it reads nothing or has no row."""
        row = number + 1
        what = int(self._rows[row, 0]) if row < len(self._rows) else IDLE
        return None if what == IDLE else what

    def readings(self) -> list[Reading]:
        """Returns the readings of all busy processes, longest first."""
        now, found = time.monotonic_ns(), []
        for row, (what, since) in enumerate(self._rows.tolist()):
            if what != IDLE:
                reader = f"worker {row - 1}" if row else "the training process"
                found.append(Reading(reader, what, max(0.0, (now - since) / 1e9)))
        return sorted(found, key=lambda reading: -reading.seconds)


def _row() -> int:
    worker = get_worker_info()
    return 0 if worker is None else worker.id + 1
