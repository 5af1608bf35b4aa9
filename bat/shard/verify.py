"""Verifies shards (``bat-shard verify``): reads everything again and reports all faults.

Checked for each shard: that it exists, that its hash is that of the manifest, that the table beside
it agrees with the tar, and that the manifest's counts are right. For each clip: see ``clip_check``.
For all clips together: the same audio or the same key twice, the same audio under different labels,
a clip without a label in a set where most have one, a label with two numbers.

Each process takes a part of a shard (64 MB) at a time. About 40 bytes a clip are kept for the whole
set, and the first 10,000 findings of each kind; counts are exact.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bat.data.manifest import Counts, Manifest, ShardInfo
from bat.data.table import ITS_JSON, Contents, ShardTable, read_contents, table_places, tabulate
from bat.errors import UserError
from bat.shard.clip_check import Kind, check_clip
from bat.shard.clip_compare import Clips, Comparison
from bat.shard.findings import Report
from bat.shard.info import load_table, local_shards
from bat.shard.pool import ordered_map

PART_BYTES = 64 * 2**20


class Part(NamedTuple):
    """One item of work: the hash of a tar (``number = -1``), or part ``number`` of its clips."""

    tar: Path
    number: int
    of: int


@dataclass
class Checked:
    """The findings of a process in a part."""

    sha256: str = ""
    clips: Clips = field(default_factory=Clips)
    seconds: float = 0.0
    problems: list[tuple[Kind, str, str]] = field(default_factory=list)
    """``(kind, key, why)``"""
    table: ShardTable | None = None
    """Table made from the present tar; returned with part 0."""


def verify(
    source: Path, *, index_dir: Path | None = None, jobs: int = 1, progress: bool = False
) -> Report:
    """Check the shards of a folder, of its sub-folders, of one tar, or of a glob.

    Args:
        index_dir: folder of the tables of read-only shards.
        jobs: processes.
        progress: show clips a second and the time left.

    Raises:
        UserError: no shards found.
    """
    tars = [Path(shard.place) for shard in local_shards(source)]
    report = Report(source=str(source))
    manifests: dict[Path, Manifest] = {}
    entries: dict[Path, ShardInfo] = {}
    vocabulary: list[str] | None = None
    for folder in dict.fromkeys(tar.parent for tar in tars):
        try:
            manifest = Manifest.load(folder)
        except UserError as error:
            report.add("shard", "manifest.json", "", str(error))
            continue
        if manifest is None:
            continue
        manifests[folder] = manifest
        if manifest.vocabulary:
            vocabulary = vocabulary or manifest.vocabulary
            if manifest.vocabulary != vocabulary:
                why = "its vocabulary is not that of the other folders"
                report.add("shard", f"{folder.name}/manifest.json", "", why)
        entries |= {folder / entry.name: entry for entry in manifest.shards}
        for entry in manifest.shards if source.is_dir() else ():
            if not (folder / entry.name).exists():
                report.add("shard", entry.name, "", "missing: the manifest lists it")
    checker = _Checker(report, tars, entries, manifests, index_dir)
    numbers = None if vocabulary is None else {name: i for i, name in enumerate(vocabulary)}
    results = ordered_map(
        partial(check_part, vocabulary=numbers), _parts(tars), jobs=jobs, progress=False
    )
    known = [load_table(tar, index_dir) for tar in tars] if progress else []
    total = sum(len(t.clips) for t in known if t) if all(known) else None
    from tqdm import tqdm

    try:
        with closing(results), tqdm(total=total, unit="clip", disable=not progress) as bar:
            for part, checked in zip(_parts(tars), results, strict=True):
                checker.take(part, checked)
                bar.update(len(checked.clips))
    finally:
        _contents.cache_clear()
    checker.finish(labels_held=vocabulary is not None)
    return report


def _parts(tars: list[Path]) -> Iterator[Part]:
    for tar in tars:
        yield Part(tar, -1, 0)
        of = max(1, -(-os.path.getsize(tar) // PART_BYTES)) if tar.is_file() else 1
        yield from (Part(tar, number, of) for number in range(of))


def check_part(part: Part, *, vocabulary: Mapping[str, int] | None) -> Checked:
    """Checks one part, in one process; damage is returned in ``problems``."""
    checked = Checked()
    try:
        if part.number < 0:
            with part.tar.open("rb") as file:
                checked.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            _check_clips(part, checked, vocabulary)
    except (UserError, OSError) as error:
        if part.number <= 0:
            checked.problems.append(("shard", "", str(error)))
    return checked


@lru_cache(maxsize=1)
def _contents(tar: Path) -> Contents:
    return read_contents(tar)


def _check_clips(part: Part, checked: Checked, vocabulary: Mapping[str, int] | None) -> None:
    found = _contents(part.tar)
    n = len(found.audio)
    if part.number == 0:
        checked.table = tabulate(found)
        for name, why in found.left_out.items():
            is_json = name.endswith(".json") or why.startswith(ITS_JSON)
            kind: Kind = "label" if is_json else "corrupt"
            kind = "shard" if name == "(end)" else "unread" if why.startswith("no dec") else kind
            checked.problems.append((kind, name, why))
        for key in sorted(found.metas.keys() - found.audio.keys()):
            checked.problems.append(("unread", f"{key}.json", "there is no audio of this key"))
    span = range(part.number * n // part.of, (part.number + 1) * n // part.of)
    items = list(found.audio.items())[span.start : span.stop]
    with part.tar.open("rb") as file:
        for number, (key, (member, _)) in zip(span, items, strict=True):
            data = os.pread(file.fileno(), member.size, member.offset)
            clip = check_clip(data, found.metas.get(key, {}), vocabulary)
            checked.problems += [(kind, key, why) for kind, why in clip.problems]
            checked.seconds += clip.seconds
            checked.clips.add(number, key, clip.audio_hash, clip.labels)


class _Checker:
    """Joins the results of the parts, in order."""

    def __init__(
        self,
        report: Report,
        tars: list[Path],
        entries: Mapping[Path, ShardInfo],
        manifests: Mapping[Path, Manifest],
        index_dir: Path | None,
    ) -> None:
        self.report, self.entries = report, entries
        self.manifests, self.index_dir = manifests, index_dir
        self.names = _short_names(tars)
        self.counts = {folder: Counts(m.vocabulary) for folder, m in manifests.items()}
        self.comparison = Comparison(report, tars, [self.names[tar] for tar in tars])
        self.shard = -1

    def take(self, part: Part, checked: Checked) -> None:
        tar, entry = part.tar, self.entries.get(part.tar)
        if part.number < 0:
            self.shard += 1
            self.report.shards += 1
            if entry is None and tar.parent in self.manifests:
                self._shard(tar, "the manifest does not list it")
            if entry is not None and checked.sha256 not in ("", entry.sha256):
                size = tar.stat().st_size
                told = f"; {size} bytes, not {entry.bytes}" if size != entry.bytes else ""
                self._shard(tar, f"its sha256 is not the manifest's: it was changed{told}")
            self.report.hashed += entry is not None
        for kind, key, why in checked.problems:
            self.report.add(kind, self.names[tar], key, why)
        self.report.clips += len(checked.clips)
        self.report.seconds += checked.seconds
        self.comparison.add(self.shard, checked.clips)
        if checked.table is not None:
            self._hold(tar, checked.table, entry)

    def _hold(self, tar: Path, table: ShardTable, entry: ShardInfo | None) -> None:
        """Compare the table beside the tar, and the manifest's number of clips, with the tar."""
        if entry is not None and entry.clips != len(table.clips):
            self._shard(tar, f"{len(table.clips)} clips, the manifest says {entry.clips}")
        places = table_places(tar, self.index_dir)
        saved = next(filter(None, (ShardTable.load(place, None) for place in places)), None)
        if saved is not None and (saved.tar_bytes, saved.mtime_ns) != (
            table.tar_bytes,
            table.mtime_ns,
        ):
            saved = None  # belongs to another tar, so it is not used
        if saved is not None and not (
            saved.agrees(table) and np.array_equal(saved.clips["header"], table.clips["header"])
        ):
            self._shard(tar, "the table beside it (.idx.npz) tells otherwise: remove the table")
        if tar.parent in self.counts:
            self.counts[tar.parent].add(tar.name, table)

    def _shard(self, tar: Path, why: str) -> None:
        self.report.add("shard", self.names[tar], "", why)

    def finish(self, *, labels_held: bool) -> None:
        for folder, manifest in self.manifests.items():
            if [s.name for s in self.counts[folder].shards] != [s.name for s in manifest.shards]:
                continue  # shards missing or not listed: reported already
            now = self.counts[folder].manifest(left_out=[], source="")
            for name in ("label_counts", "splits", "folds"):
                if getattr(now, name) != getattr(manifest, name):
                    why = f"its {name} are not those of the clips"
                    self.report.add("shard", f"{folder.name}/manifest.json", "", why)
        self.comparison.finish(labels_held=labels_held)


def _short_names(tars: list[Path]) -> dict[Path, str]:
    """Returns file names, with the parent folder in front where there are several folders."""
    several = len({tar.parent for tar in tars}) > 1
    return {tar: f"{tar.parent.name}/{tar.name}" if several else tar.name for tar in tars}
