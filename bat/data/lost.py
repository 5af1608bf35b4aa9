"""What shards that are lost whole cost, told clip by clip: so that ``data.max_bad`` sees them.

Read from front to end, a shard that cannot be read, or breaks off, says nothing of how many clips
are gone: as many as the shards read whole have on average, less those it gave, at least one. Told
at once, one lost shard of thousands would look like the end of the data set; so its clips are told
evenly over the ``span`` shards that follow, those not yet read counting as good. What is told is
then, at any time, about the share of clips lost in the latest ``span`` shards.
"""

from __future__ import annotations

from collections import deque

from bat.types import Skipped

SPAN = 100
"""Shards that a process looks back over."""
LEAST_SPAN = 8
MAX_RATE = 100.0
"""Lost clips told for each one read, at most."""


class Losses:
    """The lost shards of one reader.

    Args:
        span: shards over which a loss is told.
    """

    def __init__(self, span: int) -> None:
        self._latest: deque[tuple[int, Skipped | None]] = deque(maxlen=span)
        self._span, self._whole, self._clips = span, 0, 0
        self._rate = self._debt = 0.0
        self._told = 0

    def shard(self, clips: int, broke: Skipped | None) -> None:
        """A shard gave ``clips`` and then ended, or ``broke`` off (told once already)."""
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
        """What is to be told with the next clip that is read: mostly nothing."""
        lost = [broke for _, broke in self._latest if broke is not None]
        if not lost:
            self._debt = 0.0
            return []
        self._debt += self._rate
        count = max(0, int(self._debt))
        self._debt -= count
        self._told += count
        return [lost[(self._told - i) % len(lost)] for i in range(count)]
