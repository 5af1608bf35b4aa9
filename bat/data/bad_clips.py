"""Counting unreadable clips, and when there are too many of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bat.shapes import UserError, WaveBatch


class BadClips:
    """A tally over batches: ``seen`` clips asked for, ``kinds`` of failures, ``keys`` and reasons.

    Args:
        max_bad: fraction of ``seen`` above which ``check`` raises.
        judge_after: clips seen before ``check`` judges; ``check(final=True)`` always does.
    """

    KEYS_KEPT = 10_000

    def __init__(self, *, max_bad: float = 0.05, judge_after: int = 100) -> None:
        if not 0 <= max_bad <= 1:
            raise UserError(f"max_bad={max_bad} is a fraction: it must lie in [0, 1]")
        self.max_bad, self.judge_after = max_bad, judge_after
        self.seen = 0
        self.kinds: Counter[str] = Counter()
        self.keys: dict[str, str] = {}
        """``{key: "kind: why"}``, each bad clip once, the first ``KEYS_KEPT`` of them."""

    @property
    def bad(self) -> int:
        """Failures counted; a clip that is met again counts again."""
        return self.kinds.total()

    def add(self, batch: WaveBatch) -> None:
        self.seen += len(batch.keys) + len(batch.skipped)
        for key, why in batch.skipped.items():
            self.kinds[why.split(":", 1)[0]] += 1
            if len(self.keys) < self.KEYS_KEPT:
                self.keys.setdefault(key, why)

    def check(self, *, final: bool = False) -> None:
        """Raise UserError where more than ``max_bad`` of the clips seen were unreadable."""
        if (final or self.seen >= self.judge_after) and self.bad > self.max_bad * self.seen:
            key, why = next(iter(self.keys.items()))
            raise UserError(
                f"{self.summary()}: more than max_bad={self.max_bad:g} (the first: {key}, {why}). "
                f"Check the data, or raise data.max_bad"
            )

    def summary(self) -> str:
        """One line: ``3 of 400 clips unreadable (2 corrupt, 1 short)``."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.kinds.items()))
        return f"{self.bad} of {self.seen} clips unreadable" + (f" ({kinds})" if kinds else "")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "kinds": dict(self.kinds), "keys": dict(self.keys)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.kinds = state["seen"], Counter(state["kinds"])
        self.keys = dict(state["keys"])
