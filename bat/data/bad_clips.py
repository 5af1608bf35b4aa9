"""Counts and lists unreadable clips, and raises when there are too many of them."""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bat.errors import UserError
from bat.io import filter_jsonl, read_jsonl
from bat.redact import redact_tree
from bat.types import Skipped, WaveBatch

log = logging.getLogger("bat")

SHARDS_NAMED = 3
RECENT_CLIPS = 10_000


class BadClips:
    """A tally over batches: ``seen`` clips asked for, ``kinds`` of failures, ``keys`` and reasons.

    Args:
        max_bad: fraction of ``seen`` above which ``check`` raises.
        check_after: clips seen before ``check`` evaluates; ``check(final=True)`` always does.
        file: ``bad_clips.jsonl``, to which each bad clip is added once: ``{key, shard, kind, why,
            position}``. Lines of an earlier run in the same folder are kept.
    """

    KEYS_KEPT = 10_000

    def __init__(
        self, *, max_bad: float = 0.05, check_after: int = 100, file: Path | None = None
    ) -> None:
        if not 0 <= max_bad <= 1:
            raise UserError(f"max_bad={max_bad} is a fraction: it must lie in [0, 1]")
        self.max_bad, self.check_after, self.file = max_bad, check_after, file
        self.seen = 0
        self.kinds: Counter[str] = Counter()
        self.shards: Counter[str] = Counter()
        """Number of failures of each shard."""
        self.keys: dict[str, str] = {}
        """``{key: "kind: why"}``: each bad clip once, the first ``KEYS_KEPT`` of them."""
        self._recent: deque[tuple[int, int]] = deque()  # (seen, bad) of the latest batches
        self._recent_seen = self._recent_bad = 0
        self._listed: set[tuple[Any, Any]] | None = None

    @property
    def bad(self) -> int:
        """Number of failures; a clip that is read again counts again."""
        return self.kinds.total()

    def add(self, batch: WaveBatch) -> None:
        self._count(len(batch.keys) + len(batch.skipped), len(batch.skipped))
        for clip in batch.skipped:
            self.kinds[clip.kind] += 1
            self.shards[clip.shard] += 1
            if len(self.keys) < self.KEYS_KEPT:
                self.keys.setdefault(clip.key, f"{clip.kind}: {clip.why}")
        if batch.skipped and self.file is not None:
            self._list(self.file, batch.skipped)

    def _count(self, seen: int, bad: int) -> None:
        self.seen += seen
        self._recent.append((seen, bad))
        self._recent_seen, self._recent_bad = self._recent_seen + seen, self._recent_bad + bad
        while self._recent_seen - self._recent[0][0] >= RECENT_CLIPS:
            old_seen, old_bad = self._recent.popleft()
            self._recent_seen -= old_seen
            self._recent_bad -= old_bad

    def _list(self, file: Path, clips: list[Skipped]) -> None:
        """Add those of ``clips`` that ``file`` does not list yet; repairs a truncated last line."""
        if self._listed is None:
            if file.is_file():
                filter_jsonl(file, lambda row: isinstance(row, dict))
            self._listed = {(row.get("shard"), row.get("key")) for row in read_jsonl(file)}
        lines = []
        for clip in clips:
            if (clip.shard, clip.key) not in self._listed:
                self._listed.add((clip.shard, clip.key))
                said = redact_tree(clip._asdict())
                lines.append(json.dumps(said, ensure_ascii=False) + "\n")
        if lines:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a", encoding="utf-8", errors="backslashreplace") as out:
                    out.write("".join(lines))
            except OSError as error:  # a full disk does not end the run; the counts are kept
                log.warning("cannot write %s (%s): %s", file, error, "".join(lines).strip())

    def check(self, *, final: bool = False) -> None:
        """Raise UserError where more than ``max_bad`` of the clips seen were unreadable.

        The fraction is taken over all clips and over the latest ``RECENT_CLIPS``, so that a disk
        that fails late is noticed too.
        """
        recent = self._recent_seen >= RECENT_CLIPS
        late = recent and self._recent_bad > self.max_bad * self._recent_seen
        enough = final or self.seen >= self.check_after
        if enough and (late or self.bad > self.max_bad * self.seen):
            key, why = next(iter(self.keys.items()))
            latest = f"; of the latest {self._recent_seen} {self._recent_bad}" if late else ""
            listed = f"; all are listed in {self.file}" if self.file is not None else ""
            raise UserError(
                f"{self.summary()}{latest}: more than max_bad={self.max_bad:g} (the first: {key}, "
                f"{why}). Most are in {self._worst()}{listed}. Check the data (shards: bat-shard "
                "verify DIR), or raise data.max_bad"
            )

    def _worst(self) -> str:
        named = ", ".join(f"{name} ({n})" for name, n in self.shards.most_common(SHARDS_NAMED))
        more = len(self.shards) - SHARDS_NAMED
        return named + (f" and {more} others" if more > 0 else "")

    def summary(self) -> str:
        """Returns one line: ``3 of 400 clips unreadable (2 corrupt, 1 truncated)``."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.kinds.items()))
        return f"{self.bad} of {self.seen} clips unreadable" + (f" ({kinds})" if kinds else "")

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "kinds": dict(self.kinds),
            "shards": dict(self.shards),
            "keys": dict(self.keys),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.kinds = state["seen"], Counter(state["kinds"])
        self.shards, self.keys = Counter(state["shards"]), dict(state["keys"])


def merged_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merges the ``BadClips.state_dict`` of all ranks."""
    merged: dict[str, Any] = {"seen": sum(state["seen"] for state in states)}
    for name in ("kinds", "shards"):
        counts: Counter[str] = Counter()
        for state in states:
            counts.update(state[name])
        merged[name] = dict(counts)
    merged["keys"] = {key: why for state in states for key, why in state["keys"].items()}
    return merged
