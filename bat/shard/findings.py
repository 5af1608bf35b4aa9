"""Reports what ``verify`` finds in shards, for people and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from bat.redact import one_line
from bat.shard.clip_check import Kind
from bat.shard.info import duration

KEPT = 10_000
FATAL: tuple[Kind, ...] = ("shard", "corrupt", "label")
"""Kinds of problems that make a set unfit for training."""
MEANING: dict[Kind, str] = {
    "shard": "shards not as their manifest or table says",
    "corrupt": "clips that cannot be decoded whole",
    "label": "clips wrongly labelled, or whose JSON is untrue",
    "silent": "clips without a sample above -60 dBFS",
    "clipped": "clips with over 0.1 % of samples cut off at full scale",
    "duplicate": "clips whose audio or key is there already",
    "unread": "members that are left out",
}


class Problem(NamedTuple):
    kind: Kind
    shard: str
    key: str
    """Key of the clip; empty: the shard itself."""
    why: str


@dataclass
class Report:
    """The report of ``verify``."""

    source: str
    shards: int = 0
    hashed: int = 0
    """Number of shards whose hash a manifest gives."""
    clips: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    """``{kind: count}``"""
    problems: list[Problem] = field(default_factory=list)
    """The first ``KEPT`` of each kind."""

    def add(self, kind: Kind, shard: str, key: str, why: str, *, times: int = 1) -> None:
        if self.counts[kind] < KEPT:
            self.problems.append(Problem(kind, one_line(shard), one_line(key), one_line(why)))
        self.counts[kind] += times

    @property
    def ok(self) -> bool:
        """True if nothing is corrupt, changed or wrongly labelled."""
        return not any(self.counts[kind] for kind in FATAL)

    def text(self, *, listed: int = 10) -> list[str]:
        """Returns lines for people: each kind with its first ``listed`` findings."""
        against = f", {self.hashed} of them against the manifest's sha256"
        lines = [
            f"read      {self.clips} clips ({duration(self.seconds)}) of {self.shards} shards"
            + (against if self.hashed else "; no manifest.json tells their hashes")
        ]
        for kind, meaning in MEANING.items():
            count = self.counts[kind]
            lines.append(f"{kind:<9} {count}" + (f": {meaning}" if count else ""))
            found = [p for p in self.problems if p.kind == kind][:listed]
            lines += [f"  {p.shard}{'/' if p.key else ''}{p.key}: {p.why}" for p in found]
            if count > len(found) > 0:
                lines.append(f"  ... and {count - len(found)} more (--json FILE lists them)")
        return lines

    def json(self) -> str:
        """Returns the report as one JSON object."""
        fields: dict[str, Any] = {k: v for k, v in asdict(self).items() if k != "problems"}
        fields["seconds"] = round(self.seconds, 3)
        fields["counts"] = {kind: self.counts[kind] for kind in MEANING}
        fields["ok"] = self.ok
        fields["problems"] = [problem._asdict() for problem in self.problems]
        return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"
