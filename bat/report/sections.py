"""Merges summaries of probe runs into one section per task with all its encoders.

A summary is the content of ``summary.json`` as written by ``bat-probe``: plain numbers, metrics as
fractions. Runs of the same task, level, metric, labels and control are merged, so that encoders
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
    def __missing__(self, name: str) -> str:  # of a metric from outside bat
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


class Gap(NamedTuple):
    """Comparison of an encoder's best probe with its fine-tuning, as fractions."""

    encoder: str
    method: str
    mean: float
    finetuned: float


class Gain(NamedTuple):
    """Comparison of a probe with its random-init baseline, an encoder of the same shape."""

    row: Row
    control: Row
    paired: dict[str, Any] | None
    """``{"difference", "interval"}`` on the same held-out clips, if known."""


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
    def level(self) -> str:
        return str(self.summaries[0]["level"])

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
        return str(self.summaries[0]["control"]) == "permuted"

    @property
    def title(self) -> str:
        """Title for a heading."""
        level = "" if self.level == "clip" else f", {self.level} level"
        return f"{self.task}{level}" + (" with permuted labels" if self.permuted else "")

    @property
    def methods(self) -> list[str]:
        """Probe names in the order of the runs, without those of single blocks (``curve@3``)."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def rows(self) -> list[Row]:
        """Every probe of every encoder, in the order of the runs."""
        return [
            Row(name, method, entry)
            for name, encoder in self.encoders.items()
            for method, entry in encoder["results"].items()
            if "@" not in method
        ]

    @property
    def ranking(self) -> list[Row]:
        """Rows sorted from the best; NaN means come last."""
        sign = -1 if self.lower else 1

        def place(row: Row) -> float:
            value = row.entry["mean"].get(self.metric)
            return math.inf if value is None or math.isnan(value) else -sign * value

        return sorted(self.rows, key=place)

    @property
    def metrics(self) -> list[str]:
        """Metrics that any probe was evaluated with, the main one first."""
        there = dict.fromkeys(m for row in self.rows for m in row.entry["mean"])
        found = [m for m in TITLES if m in there] + [m for m in there if m not in TITLES]
        return sorted(found, key=lambda m: m != self.metric)

    def pairs(self) -> list[tuple[Row, Row]]:
        """Returns the comparisons shown: the best of all with every other, each encoder's best
        with its others, every probe with its random-init baseline."""
        groups = [self.ranking]
        groups += [[r for r in self.ranking if r.encoder == name] for name in self.encoders]
        found = [(group[0], row) for group in groups for row in group[1:]]
        found += [(gain.row, gain.control) for gain in self.gains()]
        return list({self._names(*pair): pair for pair in found}.values())

    def difference(self, one: Row, other: Row) -> dict[str, Any] | None:
        """Returns ``{"difference", "interval"}`` of ``one`` minus ``other``, paired on the same
        resamples of the held-out clips. Available within one run only, for ``pairs``."""
        if len(self.summaries) > 1:
            return None
        return self._differences.get(self._names(one, other))

    @functools.cached_property
    def _differences(self) -> dict[tuple[str, ...], dict[str, Any]]:
        given = self.summaries[0].get("differences") or []
        return {(*d["of"], *d["minus"]): d for d in given}

    @staticmethod
    def _names(one: Row, other: Row) -> tuple[str, str, str, str]:
        return one.encoder, one.method, other.encoder, other.method

    def leads(self, row: Row, others: Iterable[Row]) -> bool:
        """Returns True if ``row`` beats each of ``others`` by the whole paired interval."""
        found = [self.difference(row, other) for other in others]
        ends = [None if d is None else d["interval"] for d in found]
        better = [e is not None and (e[1] < 0 if self.lower else e[0] > 0) for e in ends]
        return bool(better) and all(better)

    def best(self, encoder: str) -> Row | None:
        """Returns the best probe of one encoder."""
        return next((row for row in self.ranking if row.encoder == encoder), None)

    def gaps(self) -> list[Gap]:
        """Returns the gaps of all encoders that were both probed and fine-tuned."""
        found = []
        for name, encoder in self.encoders.items():
            row, tuned = self.best(name), encoder.get("finetuned")
            if row is not None and tuned is not None:
                found.append(Gap(name, row.method, row.entry["mean"][self.metric], tuned))
        return found

    def gains(self) -> list[Gain]:
        """Returns the gains of all probes that have a random-init baseline."""
        found = []
        for row in self.rows:
            control = self._control(row)
            if control is not None:
                found.append(Gain(row, control, self.difference(row, control)))
        return found

    def _control(self, row: Row) -> Row | None:
        encoder, shape = self.encoders[row.encoder], ("backbone", "width", "depth")
        if is_control(encoder):
            return None
        for name, other in self.encoders.items():
            same = all(other.get(key) == encoder.get(key) for key in shape)
            if is_control(other) and same and row.method in other["results"]:
                return Row(name, row.method, other["results"][row.method])
        return None

    def class_precision(self, row: Row) -> list[float | None]:
        """Returns each class's average precision, mean over folds and seeds where it is defined."""
        judged = [m["per_class"]["ap"] for m in _each(row) if m.get("per_class")]
        columns = [[v for v in column if v is not None] for column in zip(*judged, strict=True)]
        return [sum(c) / len(c) if c else None for c in columns]

    def absent(self) -> list[str]:
        """Returns the classes without a held-out clip in some fold."""
        found = sorted({c for row in self.rows for m in _each(row) for c in m.get("absent", ())})
        return [self.labels[c] for c in found]

    def deviation(self) -> set[str]:
        """Returns what deviations are taken over: ``seeds``, ``folds``, ``none``."""
        return {str(row.entry["std_over"]) for row in self.rows}


def is_control(encoder: Mapping[str, Any]) -> bool:
    """Returns True if an encoder's weights are untrained."""
    return str(encoder["checkpoint"]).partition(":")[0] == "random"


def sections(summaries: Sequence[dict[str, Any]]) -> list[Section]:
    """Merges runs of one task without changing the summaries; ``run`` is the optional name."""
    found: dict[Any, Section] = {}
    for summary in summaries:
        same = tuple(str(summary[key]) for key in ("task", "level", "metric", "control"))
        section = found.setdefault((same, tuple(summary["labels"])), Section([]))
        section.summaries.append(summary)
        for name, encoder in summary["encoders"].items():
            _add(section, str(name), encoder, run=str(summary.get("run", "another run")))
    for section in found.values():
        section.differ = _differing(section.summaries)
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


def _differing(summaries: Sequence[dict[str, Any]]) -> list[str]:
    if len(summaries) < 2:
        return []
    found = []
    views = {
        "the clips held out": lambda s: [s["clips"], s["rounds"]],
        "the data (other clips, labels or folds)": lambda s: s.get("data"),
        "seeds": lambda s: s["seeds"],
        "how the number comes about": lambda s: s["how"],
        "the version of bat": lambda s: s["version"],
    }
    for what, view in views.items():
        if any(view(s) != view(summaries[0]) for s in summaries[1:]):
            found.append(what)
    for key in SETTINGS:
        found += _unlike(key, [s.get(key) for s in summaries])
    for part in PARTS:
        given = [s[part] for s in summaries if part in s]
        if 0 < len(given) < len(summaries):
            found.append(f"{part} (unknown of {len(summaries) - len(given)})")
        for key in dict.fromkeys(key for values in given for key in values):
            found += _unlike(f"{part}.{key}", [values.get(key) for values in given])
    windows: dict[str, list[Any]] = {}
    for name, encoder in (item for s in summaries for item in s["encoders"].items()):
        windows.setdefault(f"{encoder['digest']} {name}", []).append(encoder.get("frames"))
    for place, frames in windows.items():
        found += _unlike(f"frames of {place.partition(' ')[2]}", frames)
    return found


def _unlike(name: str, values: Sequence[Any]) -> list[str]:
    """Returns ``name (3, null)`` if values differ, else nothing."""
    words = dict.fromkeys("null" if value is None else str(value) for value in values)
    return [f"{name} ({', '.join(words)})"] if len(words) > 1 else []


def _each(row: Row) -> list[dict[str, Any]]:
    return [metrics for seeds in row.entry["folds"].values() for metrics in seeds.values()]
