"""Merges summaries of probe runs into one section per task with all its encoders.

A summary is the content of ``summary.json`` as written by ``bat-probe``: plain numbers, metrics as
fractions. Runs of the same task, level, metric, labels and permutation are merged, so that encoders
probed in separate runs are compared. Differences between such runs (data, folds, protocol, heads,
rates, seeds) are listed, since their numbers are then not of one protocol. The methods of an
encoder that occurs twice (same weights) are merged; other weights with its name are renamed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bat.metrics.base import describe, families


class _Titles(dict[str, str]):
    def __missing__(self, name: str) -> str:  # a metric from outside bat
        return describe(name).title


TITLES = _Titles({name: describe(name).title for name in families()})
"""Metrics in column order; most are fractions, shown in percent (``describe``)."""
SETTINGS = ("steps", "epochs", "min_steps", "batch", "clip_seconds", "precision", "confidence")
PARTS = ("protocol", "head", "optim")
"""Keys of a summary that must be equal for two runs to have one protocol."""


class Row(NamedTuple):
    """One probe of one encoder."""

    encoder: str
    method: str
    entry: dict[str, Any]
    """Its ``results`` in the summary: ``mean``, ``std``, ``interval``, ``folds``, ..."""

    @property
    def trainings(self) -> list[dict[str, Any]]:
        """Metrics of every fold and seed."""
        return [metrics for seeds in self.entry["folds"].values() for metrics in seeds.values()]


@dataclass
class Section:
    """The runs of one task."""

    summaries: list[dict[str, Any]]
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Encoders as in the summaries, under unique names."""
    differ: list[str] = field(default_factory=list)
    """Descriptions of the differences between the runs."""

    @property
    def task(self) -> str:
        return str(self.summaries[0]["task"])

    @property
    def metric(self) -> str:
        return str(self.summaries[0]["metric"])

    @property
    def lower(self) -> bool:
        """True if a lower value of the main metric is better."""
        first = self.summaries[0]
        return str(first.get("better") or describe(self.metric).better) == "lower"

    @property
    def labels(self) -> list[str]:
        return [str(label) for label in self.summaries[0]["labels"]]

    @property
    def permuted(self) -> bool:
        return bool(self.summaries[0]["permute_labels"])

    @property
    def title(self) -> str:
        """Title for a heading."""
        level = str(self.summaries[0]["level"])
        title = self.task if level == "clip" else f"{self.task}, {level} level"
        return f"{title} with permuted labels" if self.permuted else title

    @property
    def rows(self) -> list[Row]:
        """Every probe of every encoder in the order of the runs; no single blocks (``curve@3``)."""
        return [
            Row(name, method, entry)
            for name, encoder in self.encoders.items()
            for method, entry in encoder["results"].items()
            if "@" not in method
        ]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def ranking(self) -> list[Row]:
        """Rows sorted from the best; NaN means come last."""

        def place(row: Row) -> float:
            value = row.entry["mean"].get(self.metric)
            if value is None or math.isnan(value):
                return math.inf
            return float(value) if self.lower else -float(value)

        return sorted(self.rows, key=place)

    @property
    def metrics(self) -> list[str]:
        """Metrics of any probe, the main one first."""
        there = dict.fromkeys(m for row in self.rows for m in row.entry["mean"])
        found = [m for m in TITLES if m in there] + [m for m in there if m not in TITLES]
        return sorted(found, key=lambda m: m != self.metric)

    def pairs(self) -> list[tuple[Row, Row]]:
        """Returns the comparisons shown: the best of all with every other, each encoder's best
        with its others, every probe with its random-init baseline."""
        groups = [self.ranking]
        groups += [[r for r in self.ranking if r.encoder == name] for name in self.encoders]
        found = [(group[0], row) for group in groups for row in group[1:]]
        found += self.baselines()
        return list({(*a[:2], *b[:2]): (a, b) for a, b in found}.values())

    def difference(self, one: Row, other: Row) -> dict[str, Any] | None:
        """Returns ``{"difference", "interval"}`` of ``one`` minus ``other``, paired on the same
        resamples of the held-out clips. Available within one run only, for ``pairs``."""
        if len(self.summaries) > 1:
            return None
        return self._differences.get((*one[:2], *other[:2]))

    @functools.cached_property
    def _differences(self) -> dict[tuple[str, ...], dict[str, Any]]:
        given = self.summaries[0].get("differences") or []
        return {(*d["of"], *d["minus"]): d for d in given}

    def leads(self, row: Row, others: Iterable[Row]) -> bool:
        """Returns True if ``row`` beats each of ``others`` by the whole paired interval."""
        found = [self.difference(row, other) for other in others]
        ends = [None if d is None else d["interval"] for d in found]
        better = [e is not None and (e[1] < 0 if self.lower else e[0] > 0) for e in ends]
        return bool(better) and all(better)

    def best(self, encoder: str) -> Row | None:
        """Returns the best probe of one encoder."""
        return next((row for row in self.ranking if row.encoder == encoder), None)

    def baselines(self) -> list[tuple[Row, Row]]:
        """Returns probes with the same probe on the random-init encoder of the same shape."""
        found = []
        for row in self.rows:
            encoder = self.encoders[row.encoder]
            for name, other in self.encoders.items():
                alike = all(other.get(k) == encoder.get(k) for k in ("backbone", "width", "depth"))
                entry = other["results"].get(row.method)
                if entry and alike and is_random(other) and not is_random(encoder):
                    found.append((row, Row(name, row.method, entry)))
                    break
        return found

    def class_precision(self, row: Row) -> list[float | None]:
        """Returns each class's average precision, mean over folds and seeds where it is defined."""
        given = [m["per_class"]["ap"] for m in row.trainings if m.get("per_class")]
        columns = [[v for v in column if v is not None] for column in zip(*given, strict=True)]
        return [sum(c) / len(c) if c else None for c in columns]

    def absent(self) -> list[str]:
        """Returns the classes without a held-out clip in some fold."""
        found = {c for row in self.rows for m in row.trainings for c in m.get("absent", ())}
        return [self.labels[c] for c in sorted(found)]


def is_random(encoder: Mapping[str, Any]) -> bool:
    """Returns True if an encoder's weights are untrained."""
    return str(encoder["checkpoint"]).partition(":")[0] == "random"


def sections(summaries: Sequence[dict[str, Any]]) -> list[Section]:
    """Merges runs of one task without changing the summaries; ``run`` is the optional name."""
    found: dict[Any, Section] = {}
    for summary in summaries:
        same = tuple(str(summary[key]) for key in ("task", "level", "metric", "permute_labels"))
        section = found.setdefault((same, tuple(summary["labels"])), Section([]))
        section.summaries.append(summary)
        for name, encoder in summary["encoders"].items():
            _add(section, str(name), encoder, run=str(summary.get("run", "another run")))
    for section in found.values():
        section.differ = _differences(section.summaries)
    return list(found.values())


def _add(section: Section, name: str, encoder: dict[str, Any], *, run: str) -> None:
    there = section.encoders.get(name)
    if there is not None:
        same = there["digest"] == encoder["digest"] and there.get("width") == encoder.get("width")
        if same and not set(there["results"]) & set(encoder["results"]):
            section.encoders[name] = there | {"results": there["results"] | encoder["results"]}
            return
        name = f"{name} ({run})"
        while name in section.encoders:
            name += "'"
    section.encoders[name] = encoder


def _differences(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Returns what the runs do not have in common; settings with their values."""
    views = {
        "the clips held out": lambda s: [s["clips"], s["splits"]],
        "the data (other clips, labels or folds, or files and shards)": lambda s: s.get("data"),
        "seeds": lambda s: s["seeds"],
        "how the number comes about": lambda s: s["how"],
        "the version of bat": lambda s: s["version"],
    }
    found = [
        what
        for what, view in views.items()
        if any(view(s) != view(summaries[0]) for s in summaries[1:])
    ]
    settings: dict[str, list[Any]] = {key: [s.get(key) for s in summaries] for key in SETTINGS}
    for part in PARTS:
        given = [s.get(part) or {} for s in summaries]
        for key in dict.fromkeys(key for values in given for key in values):
            settings[f"{part}.{key}"] = [values.get(key) for values in given]
    frames: dict[tuple[str, str], list[Any]] = {}
    for name, encoder in (item for s in summaries for item in s["encoders"].items()):
        frames.setdefault((name, encoder["digest"]), []).append(encoder.get("frames"))
    for name, values in [*settings.items(), *((f"frames of {k[0]}", v) for k, v in frames.items())]:
        words = dict.fromkeys("null" if value is None else str(value) for value in values)
        if len(words) > 1:
            found.append(f"{name} ({', '.join(words)})")
    return found
