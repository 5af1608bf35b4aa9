"""Verifies shards (``bat-shard verify``): reads everything again and reports all faults.

Checked for each shard: that it exists, that its hash is that of the manifest, that the table beside
it agrees with the tar, and that the manifest's counts are right. For each clip: see ``clip_check``.
For all clips together: the same audio or the same key twice, the same audio under different labels,
a clip without a label in a set where most have one, a label with two numbers.

Audio is compared by hashes of 64 bits (two million clips: a chance of one in ten million for a
false duplicate). The tables, keys and hashes of the whole set are kept in memory, and the first
10,000 findings of each kind; counts are exact.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bat.data.manifest import Counts, Manifest, ShardInfo
from bat.data.table import ITS_JSON, ShardTable, read_contents, table_places, tabulate
from bat.errors import UserError
from bat.redact import one_line
from bat.shard.clip_check import Kind, check_clip
from bat.shard.info import duration, local_shards
from bat.shard.pool import ordered_map

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


def verify(
    source: Path, *, index_dir: Path | None = None, jobs: int = 1, progress: bool = False
) -> Report:
    """Check the shards of a folder, of its sub-folders, of one tar, or of a glob.

    Args:
        index_dir: folder of the tables of read-only shards.
        jobs: processes; each takes a shard at a time.

    Raises:
        UserError: no shards found.
    """
    from tqdm import tqdm

    tars = [Path(shard.place) for shard in local_shards(source)]
    report = Report(source=str(source))
    manifests = _manifests(report, tars, is_whole=source.is_dir())
    vocabulary = next((m.vocabulary for m in manifests.values() if m.vocabulary), None)
    label_ids = None if vocabulary is None else {name: i for i, name in enumerate(vocabulary)}
    entries = {f / entry.name: entry for f, m in manifests.items() for entry in m.shards}
    counts = {folder: Counts(manifest.vocabulary) for folder, manifest in manifests.items()}
    several = len({tar.parent for tar in tars}) > 1
    clips = _Clips()
    results = ordered_map(partial(_check_shard, vocabulary=label_ids), tars, jobs=jobs)
    with closing(results):
        shown = tqdm(results, total=len(tars), unit="shard", disable=not progress)
        for tar, checked in zip(tars, shown, strict=True):
            name = f"{tar.parent.name}/{tar.name}" if several else tar.name
            entry, table = entries.get(tar), checked.table
            report.shards += 1
            report.hashed += entry is not None
            problems = checked.problems
            if entry is None and tar.parent in manifests:
                problems.append(("shard", "", "the manifest does not list it"))
            if entry is not None:
                problems += _contradictions(entry, tar, checked)
            if table is not None:
                report.clips += len(table.clips)
                report.seconds += checked.seconds
                if _is_stale(table_places(tar, index_dir), table):
                    why = "the table beside it (.idx.npz) tells otherwise: remove the table"
                    problems.append(("shard", "", why))
                if tar.parent in counts:
                    counts[tar.parent].add(tar.name, table)
                clips.add(name, checked, table)
            for kind, key, why in problems:
                report.add(kind, name, key, why)
    for folder, manifest in manifests.items():
        if [s.name for s in counts[folder].shards] != [s.name for s in manifest.shards]:
            continue  # shards missing or not listed: reported already
        found = counts[folder].manifest(left_out=[], source="")
        for name in ("label_counts", "splits", "folds"):
            if getattr(found, name) != getattr(manifest, name):
                why = f"its {name} are not those of the clips"
                report.add("shard", f"{folder.name}/manifest.json", "", why)
    clips.compare(report, has_vocabulary=vocabulary is not None)
    return report


def _manifests(report: Report, tars: Sequence[Path], *, is_whole: bool) -> dict[Path, Manifest]:
    """Returns the manifests of the folders of ``tars``; reports those that contradict one another,
    and missing shards."""
    manifests: dict[Path, Manifest] = {}
    vocabulary: list[str] = []
    for folder in dict.fromkeys(tar.parent for tar in tars):
        try:
            manifest = Manifest.load(folder)
        except UserError as error:
            report.add("shard", "manifest.json", "", str(error))
            continue
        if manifest is None:
            continue
        manifests[folder] = manifest
        vocabulary = vocabulary or manifest.vocabulary
        if manifest.vocabulary not in ([], vocabulary):
            why = "its vocabulary is not that of the other folders"
            report.add("shard", f"{folder.name}/manifest.json", "", why)
        for entry in manifest.shards if is_whole else ():
            if not (folder / entry.name).exists():
                report.add("shard", entry.name, "", "missing: the manifest lists it")
    return manifests


@dataclass
class _Checked:
    """The findings of a process in one shard. n clips."""

    problems: list[tuple[Kind, str, str]] = field(default_factory=list)
    """``(kind, key, why)``"""
    sha256: str = ""
    table: ShardTable | None = None
    """Table made from the present tar; None: it cannot be read."""
    seconds: float = 0.0
    audio: list[int] = field(default_factory=list)  # (n) hashes of the samples, 0 for none
    label_ids: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    """``{(label, label_id): [number of clips, index of the first]}``"""


def _check_shard(tar: Path, *, vocabulary: Mapping[str, int] | None) -> _Checked:
    """Reads one shard, in one process; damage is returned in ``problems``."""
    checked = _Checked()
    try:
        with tar.open("rb") as file:
            checked.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            found = read_contents(tar)
            for name, why in found.left_out.items():
                checked.problems.append((_kind_of(name, why), name, why))
            for key in sorted(found.metas.keys() - found.audio.keys()):
                checked.problems.append(("unread", f"{key}.json", "there is no audio of this key"))
            for i, (key, (member, _)) in enumerate(found.audio.items()):
                data = os.pread(file.fileno(), member.size, member.offset)
                clip = check_clip(data, found.metas.get(key, {}), vocabulary)
                checked.problems += [(kind, key, why) for kind, why in clip.problems]
                checked.seconds += clip.seconds
                checked.audio.append(clip.audio_hash)
                for label in clip.labels:
                    checked.label_ids.setdefault(label, [0, i])[0] += 1
        checked.table = tabulate(found)
    except (UserError, OSError) as error:
        checked.problems.append(("shard", "", str(error)))
    return checked


def _kind_of(member: str, why: str) -> Kind:
    """Returns the kind of problem that a member left out is."""
    if member == "(end)":
        return "shard"
    if why.startswith("no decoder"):
        return "unread"
    return "label" if member.endswith(".json") or why.startswith(ITS_JSON) else "corrupt"


def _contradictions(
    entry: ShardInfo, tar: Path, checked: _Checked
) -> Iterator[tuple[Kind, str, str]]:
    """Yields the problems of a shard that is not as its manifest says."""
    if checked.sha256 not in ("", entry.sha256):
        size = tar.stat().st_size
        sizes = f"; {size} bytes, not {entry.bytes}" if size != entry.bytes else ""
        yield "shard", "", f"its sha256 is not the manifest's: it was changed{sizes}"
    if checked.table is not None and entry.clips != len(checked.table.clips):
        yield "shard", "", f"{len(checked.table.clips)} clips, the manifest says {entry.clips}"


def _is_stale(places: Sequence[Path], table: ShardTable) -> bool:
    """Returns True if a table was saved for this very tar and differs from ``table``."""
    saved = next(filter(None, (ShardTable.load(place, None) for place in places)), None)
    if saved is None or (saved.tar_bytes, saved.mtime_ns) != (table.tar_bytes, table.mtime_ns):
        return False
    same_headers = np.array_equal(saved.clips["header"], table.clips["header"])
    return not (saved.agrees(table) and same_headers)


class _Clip(NamedTuple):
    """A clip as it is named in the report."""

    shard: str
    key: str
    labels: list[str]
    split: str
    fold: int


class _Clips:
    """All clips of the set, to be compared with each other."""

    def __init__(self) -> None:
        self.shards: list[tuple[str, ShardTable]] = []
        self.ends: list[int] = []  # (shards) index of the first clip of the next shard
        self.keys: list[str] = []  # (n)
        self.audio: list[int] = []  # (n)
        self.label_ids: dict[tuple[str, int], list[int]] = {}

    def add(self, name: str, checked: _Checked, table: ShardTable) -> None:
        for label, (count, first) in checked.label_ids.items():
            self.label_ids.setdefault(label, [0, len(self.keys) + first])[0] += count
        self.shards.append((name, table))
        self.keys += table.key_list()
        self.audio += checked.audio
        self.ends.append(len(self.keys))

    def __getitem__(self, index: int) -> _Clip:
        shard = bisect_right(self.ends, index)
        name, table = self.shards[shard]
        at = index - self.ends[shard] + len(table.clips)
        clip, before = table.clips[at], int(table.clips["labels"][:at].sum(dtype=np.int64))
        return _Clip(
            shard=name,
            key=self.keys[index],
            labels=[table.names[k] for k in table.labels[before : before + clip["labels"]]],
            split=table.splits[clip["split"]] if clip["split"] >= 0 else name.rpartition("/")[0],
            fold=int(clip["fold"]),
        )

    def compare(self, report: Report, *, has_vocabulary: bool) -> None:
        """Adds the findings to the report.

        Args:
            has_vocabulary: True if each clip's labels were already checked against one.
        """
        for i, first in _repeated(np.array(self.audio, np.uint64)):
            if not self.audio[i]:  # nothing to compare
                continue
            one, other = self[i], self[first]
            where = f"{other.shard}/{other.key}"
            why = f"the same audio as {where}{_leak(one, other)}"
            report.add("duplicate", one.shard, one.key, why)
            if set(one.labels) != set(other.labels):
                labels, others = (", ".join(c.labels) or "unlabelled" for c in (one, other))
                why = f"labelled {labels}; {where}, the same audio, has {others}"
                report.add("label", one.shard, one.key, why)
        for i, first in _repeated(np.array(self.keys, "S")):
            if self.audio[i] != self.audio[first] or not self.audio[i]:  # else reported already
                one, other = self[i], self[first]
                why = f"the key is taken by {other.shard}/{other.key}{_leak(one, other)}"
                report.add("duplicate", one.shard, one.key, why)
        counts = [table.clips["labels"] for _, table in self.shards]
        bare = np.flatnonzero(np.concatenate(counts) == 0).tolist() if counts else []
        for i in bare if 2 * len(bare) < len(self.keys) else ():
            why = "no label, where most clips have one"
            report.add("label", self[i].shard, self[i].key, why)
        if not has_vocabulary:
            self._compare_label_ids(report)

    def _compare_label_ids(self, report: Report) -> None:
        """Reports labels with two numbers, and numbers with two labels: those of most clips are
        taken to be right."""
        number_of: dict[str, int] = {}
        name_of: dict[int, str] = {}
        pairs = sorted(self.label_ids.items(), key=lambda pair: (-pair[1][0], pair[0]))
        for (name, number), (count, i) in pairs:
            if number < 0:
                continue
            if number_of.setdefault(name, number) != number:
                why = f"label_id {number} for {name!r}, mostly {number_of[name]}"
            elif name_of.setdefault(number, name) != name:
                why = f"label_id {number} for {name!r} and {name_of[number]!r}"
            else:
                continue
            report.add("label", self[i].shard, self[i].key, why, times=count)


def _repeated(values: np.ndarray) -> Iterator[tuple[int, int]]:  # (n,)
    """Yields ``(i, first)`` for each value that occurred before, in the order of i."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = order[np.searchsorted(ordered, ordered)]
    is_later = first != order
    pairs = np.stack([order[is_later], first[is_later]], 1)
    yield from pairs[np.argsort(pairs[:, 0])].tolist()


def _leak(one: _Clip, other: _Clip) -> str:
    """Returns a remark if two clips lie in different splits or folds (a leak of test data)."""
    if one.split != other.split:
        return f" (leak: splits {other.split or 'none'} and {one.split or 'none'})"
    return f" (leak: folds {other.fold} and {one.fold})" if one.fold != other.fold else ""
