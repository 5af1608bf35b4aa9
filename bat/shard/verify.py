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
import io
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bat.data.manifest import Counts, Manifest, ShardInfo
from bat.data.parts import WHOLE, Part, run
from bat.data.sources import shown
from bat.data.store import Store
from bat.data.table import ITS_JSON, ShardTable, read_contents, table_places, tabulate
from bat.errors import UserError
from bat.shard.clip_check import Kind, check_clip
from bat.shard.findings import Report
from bat.shard.info import fetched, folder_of, plain_shards, saved_table
from bat.shard.pool import ordered_map


def verify(
    source: Path | str,
    *,
    index_dir: Path | None = None,
    jobs: int = 1,
    progress: bool = False,
    state: Path | str | None = None,
    part: Part = WHOLE,
    join_only: bool = False,
) -> Report | None:
    """Check the shards of a folder, of its sub-folders, of one tar, or of a glob, here or remote.

    Args:
        index_dir: folder of the tables of read-only shards.
        jobs: processes; each takes a shard at a time.
        state: folder for the findings of the parts; needed with these.
        part, join_only: see ``bat.data.parts.run``.

    Returns:
        The report; None if shards of other parts are missing.

    Raises:
        UserError: no shards found.
    """
    job = _Checks(source, index_dir=index_dir, jobs=jobs, progress=progress)
    if part == WHOLE and not join_only:
        return job.report(job.check(range(job.units)))
    assert state is not None
    job.state = Store(state)
    return run(job, part, join_only=join_only)


class _Checks:
    """The shards of ``source`` as units of work (``bat.data.parts.Job``)."""

    noun = "shards"

    def __init__(
        self, source: Path | str, *, index_dir: Path | None, jobs: int, progress: bool
    ) -> None:
        self.shards = plain_shards(source)
        self.places = [shard.place for shard in self.shards]
        self.jobs, self.progress, self.index_dir = jobs, progress, index_dir
        self.state = Store("")
        self.before = Report(source=shown(str(source)))
        is_whole = not isinstance(source, Path) or source.is_dir()
        self.sizes = {f: Store(f).sizes() for f in dict.fromkeys(map(folder_of, self.places))}
        self.manifests = _manifests(self.before, self.sizes, is_whole=is_whole)
        found = (m.vocabulary for m in self.manifests.values() if m.vocabulary)
        self.vocabulary = next(found, None)

    @property
    def units(self) -> int:
        return len(self.shards)

    def check(self, units: Sequence[int]) -> Iterator[_Checked]:
        """Yields the findings in each of ``units``."""
        from tqdm import tqdm

        names = self.vocabulary
        ids = None if names is None else {name: i for i, name in enumerate(names)}
        look = partial(_check_shard, vocabulary=ids, index_dir=self.index_dir)
        places = [self.places[unit] for unit in units]
        with closing(ordered_map(look, places, jobs=self.jobs)) as results:
            yield from tqdm(results, total=len(units), unit="shard", disable=not self.progress)

    def _file(self, unit: int) -> str:
        """Returns the name of the findings in a shard as it is now."""
        place = self.places[unit]
        found = place.stat() if isinstance(place, Path) else None
        size = self.sizes[folder_of(place)].get(self.shards[unit].name)
        said = [str(place), size, found.st_mtime_ns if found else 0, self.vocabulary]
        return f"{unit:05d}-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}.npz"

    def finished(self) -> Report | None:
        return None

    def listed(self) -> set[int]:
        names = self.state.sizes()
        return {unit for unit in range(self.units) if self._file(unit) in names}

    def intact(self, unit: int) -> bool:
        return True

    def do(self, units: Sequence[int]) -> None:
        for unit, checked in zip(units, self.check(units), strict=True):
            self.state.write(self._file(unit), checked.to_bytes())

    def join(self) -> Report | None:
        files = map(self._file, range(self.units))
        try:
            report = self.report(_Checked.of(self.state.read(file)) for file in files)
        except FileNotFoundError:  # another part has joined them
            return None
        self.state.clear()
        return report

    def report(self, found: Iterable[_Checked]) -> Report:
        """Joins the findings in all shards."""
        report, manifests = self.before, self.manifests
        entries = {(f, entry.name): entry for f, m in manifests.items() for entry in m.shards}
        counts = {folder: Counts(manifest.vocabulary) for folder, manifest in manifests.items()}
        several, clips = len(self.sizes) > 1, _Clips()
        for shard, checked in zip(self.shards, found, strict=True):
            folder = folder_of(shard.place)
            name = f"{_name(folder)}/{shard.name}" if several else shard.name
            entry, table, problems = (
                entries.get((folder, shard.name)),
                checked.table,
                checked.problems,
            )
            report.shards += 1
            report.hashed += entry is not None
            if entry is None and folder in manifests:
                problems.append(("shard", "", "the manifest does not list it"))
            if entry is not None:
                problems += _contradictions(entry, checked)
            if table is not None:
                report.clips += len(table.clips)
                report.seconds += checked.seconds
                if folder in counts:
                    counts[folder].add(shard.name, table)
                clips.add(name, checked, table)
            for kind, key, why in problems:
                report.add(kind, name, key, why)
        for folder, manifest in manifests.items():
            if [s.name for s in counts[folder].shards] != [s.name for s in manifest.shards]:
                continue  # shards missing or not listed: reported already
            total = counts[folder].manifest(left_out=[], source="")
            for name in ("label_counts", "splits", "folds"):
                if getattr(total, name) != getattr(manifest, name):
                    why = f"its {name} are not those of the clips"
                    report.add("shard", f"{_name(folder)}/manifest.json", "", why)
        clips.compare(report, has_vocabulary=self.vocabulary is not None)
        return report


def _name(folder: Path | str) -> str:
    return str(folder).rpartition("/")[2]


def _manifests(
    report: Report, sizes: Mapping[Path | str, Mapping[str, int]], *, is_whole: bool
) -> dict[Path | str, Manifest]:
    """Returns the manifests of folders with files of ``sizes``; reports those that contradict one
    another, and missing shards."""
    manifests: dict[Path | str, Manifest] = {}
    vocabulary: list[str] = []
    for folder, files in sizes.items():
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
            report.add("shard", f"{_name(folder)}/manifest.json", "", why)
        for entry in manifest.shards if is_whole and files else ():
            if entry.name not in files:
                report.add("shard", entry.name, "", "missing: the manifest lists it")
    return manifests


@dataclass
class _Checked:
    """The findings of a process in one shard. n clips."""

    problems: list[tuple[Kind, str, str]] = field(default_factory=list)
    """``(kind, key, why)``"""
    sha256: str = ""
    size: int = 0
    table: ShardTable | None = None
    """Table made from the present tar; None: it cannot be read."""
    seconds: float = 0.0
    audio: list[int] = field(default_factory=list)  # (n) hashes of the samples, 0 for none
    label_ids: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    """``{(label, label_id): [number of clips, index of the first]}``"""

    def to_bytes(self) -> bytes:
        """Returns the content of a file that ``of`` reads."""
        head = [self.problems, self.sha256, self.size, self.seconds, [*self.label_ids.items()]]
        table = b"" if self.table is None else self.table.to_bytes()
        file = io.BytesIO()
        np.savez(
            file,
            head=np.frombuffer(json.dumps(head).encode(), np.uint8),
            table=np.frombuffer(table, np.uint8),
            audio=np.array(self.audio, np.uint64),
        )
        return file.getvalue()

    @classmethod
    def of(cls, data: bytes) -> _Checked:
        with np.load(io.BytesIO(data)) as held:
            problems, sha256, size, seconds, labels = json.loads(held["head"].tobytes())
            saved = held["table"].tobytes()
            return cls(
                problems=[(kind, key, why) for kind, key, why in problems],
                sha256=sha256,
                size=size,
                table=ShardTable.load(io.BytesIO(saved), None) if saved else None,
                seconds=seconds,
                audio=held["audio"].tolist(),
                label_ids={(name, number): counts for (name, number), counts in labels},
            )


def _check_shard(
    place: Path | str, *, vocabulary: Mapping[str, int] | None, index_dir: Path | None
) -> _Checked:
    """Reads one shard, in one process; damage is returned in ``problems``."""
    checked = _Checked()
    try:
        with fetched(place) as tar:
            _check_tar(checked, tar, vocabulary)
            if checked.table is not None and _is_stale(place, index_dir, checked.table):
                why = "the table beside it (.idx.npz) tells otherwise: remove the table"
                checked.problems.append(("shard", "", why))
    except (UserError, OSError) as error:
        checked.problems.append(("shard", "", str(error)))
    return checked


def _check_tar(checked: _Checked, tar: Path, vocabulary: Mapping[str, int] | None) -> None:
    try:
        with tar.open("rb") as file:
            checked.size = os.fstat(file.fileno()).st_size
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


def _kind_of(member: str, why: str) -> Kind:
    """Returns the kind of problem that a member left out is."""
    if member == "(end)":
        return "shard"
    if why.startswith("no decoder"):
        return "unread"
    return "label" if member.endswith(".json") or why.startswith(ITS_JSON) else "corrupt"


def _contradictions(entry: ShardInfo, checked: _Checked) -> Iterator[tuple[Kind, str, str]]:
    """Yields the problems of a shard that is not as its manifest says."""
    if checked.sha256 not in ("", entry.sha256):
        size = checked.size
        sizes = f"; {size} bytes, not {entry.bytes}" if size != entry.bytes else ""
        yield "shard", "", f"its sha256 is not the manifest's: it was changed{sizes}"
    if checked.table is not None and entry.clips != len(checked.table.clips):
        yield "shard", "", f"{len(checked.table.clips)} clips, the manifest says {entry.clips}"


def _is_stale(place: Path | str, index_dir: Path | None, table: ShardTable) -> bool:
    """Returns True if a table was saved for this very tar and differs from ``table``."""
    if isinstance(place, Path):
        places = table_places(place, index_dir)
        saved = next(filter(None, (ShardTable.load(path, None) for path in places)), None)
    else:
        saved = saved_table(place)
        table = replace(table, mtime_ns=saved.mtime_ns) if saved else table
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
