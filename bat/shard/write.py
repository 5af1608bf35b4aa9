"""Writes shards: files of any folder become WebDataset tars with a manifest (docs/data.md).

``shard-%05d.tar`` holds ``KEY.ext`` + ``KEY.json`` (``id, label, label_id, sample_rate,
num_samples, start_seconds`` and, if present, ``mid, fold, split, events, text``), beside it its
index (``table.py``). ``manifest.json`` is written last, so a set that has one is complete. Each
clip is decoded once before it is written (``pack.py``), so a shard holds only readable clips; the
others are listed in the manifest with their reasons.

The same files and options give the same bytes, with any number of processes and after any
interruption. Until the manifest is there, ``.bat-shard-in-progress`` marks the folder as unfinished
and is a journal: its first line describes what is written, each later one a finished shard and
where the next one starts. A line is written when its shard and the shard's index are on disk, so
the finished shards of a killed run are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bat.data.manifest import Counts, Manifest, source_hash
from bat.data.table import ShardTable, scan
from bat.data.tar import BLOCK, escape_key
from bat.errors import UserError
from bat.io import replace_durably, write_atomic
from bat.lock import hold
from bat.shard.pack import Channels, Codec, Packed, Recipe, Work, pack, works_of
from bat.shard.pool import ordered_map
from bat.tasks.base import LeftOut, Row
from bat.tasks.events import as_json

MARKER = ".bat-shard-in-progress"


def write_shards(
    rows: Sequence[Row],
    out: Path,
    *,
    codec: Codec = "keep",
    sample_rate: int | None = None,
    channels: Channels | None = None,
    clip_seconds: float | None = None,
    min_seconds: float | None = None,
    shard_bytes: int = 1_000_000_000,
    vocabulary: Sequence[str] | None = None,
    left_out: Sequence[LeftOut] = (),
    jobs: int = 1,
    progress: bool = False,
) -> Manifest:
    """Write ``rows`` to ``out`` as shards of at most ``shard_bytes`` (one clip at least).

    Args:
        codec: ``keep`` the files as they are, or re-encode (16-bit for FLAC and WAV).
        sample_rate: Hz of the stored clips; None: unchanged.
        channels: ``mono`` mixes, ``keep`` does not; None: mono where a clip is encoded, and no
            reason to encode one.
        clip_seconds: cut recordings longer than this (by over 2 %) into pieces of this length,
            which are encoded (``keep``: as FLAC); None: no cutting.
        min_seconds: leave out shorter clips; None: none, except the last piece of a cut recording
            if it is under half of ``clip_seconds``.
        vocabulary: class names in the order of their ids; None: the labels that occur, sorted.
        left_out: clips that the source lists and does not hold, for the manifest's list.
        jobs: processes that decode and encode.

    Returns:
        The manifest; that of ``out`` itself if the same set is already complete. Shards that an
        interrupted call finished are kept.

    Raises:
        UserError: nothing readable, a label outside the vocabulary, ``out`` in use otherwise or
            damaged, an option that cannot be met, a process that died.
    """
    recipe = Recipe(codec, sample_rate, channels, clip_seconds, min_seconds)
    if shard_bytes < 1 or jobs < 1:
        raise UserError(f"shard_bytes={shard_bytes} and jobs={jobs} must be positive")
    if not rows:
        raise UserError("there are no clips to write")
    found = sorted({label for row in rows for label in row.labels})
    label_ids = {name: i for i, name in enumerate(found if vocabulary is None else vocabulary)}
    for label in found:
        if label not in label_ids:
            raise UserError(f"label {label!r} is not among the {len(label_ids)} classes given")
    options = asdict(recipe) | {"shard_bytes": shard_bytes}
    source = source_hash(rows, vocabulary=list(label_ids), **options)
    try:
        with hold(out):
            manifest = _complete(out, source)
            if manifest is None:
                writer = _Writer(out, source, recipe, shard_bytes, label_ids)
                manifest = writer.write(rows, left_out, jobs, progress)
            (out / MARKER).unlink(missing_ok=True)
            return manifest
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error


def _complete(out: Path, source: str) -> Manifest | None:
    """Returns the manifest of ``out`` if it holds this set already; None if it is to be written.

    Raises:
        UserError: it holds another set, a damaged one, or shards of another program.
    """
    manifest = Manifest.load(out)
    if manifest is None:
        has_shards = any(out.glob("*.tar")) or (out / "manifest.json").exists()
        if has_shards and not (out / MARKER).exists():
            raise UserError(f"{out} holds shards that bat-shard did not write: give another folder")
        return None
    if manifest.source != source:
        raise UserError(
            f"{out} already holds a complete set of {manifest.clips} clips from other files or "
            f"options: give another folder, or remove it"
        )
    damage = manifest.damage(out)
    if damage is not None:
        raise UserError(
            f"{out} holds this set, but {damage}: copy it again, or remove the folder and run "
            f"the same command to write it anew"
        )
    return manifest


class _Place(NamedTuple):
    """The first clip that is not in the finished shards."""

    row: int = 0
    work: int = 0
    """Number of the work within the row (``pack.works_of``)."""
    clip: int = 0
    """Number of the clip within the work (``pack.pack``), counting those left out."""


class _Writer:
    """Fills one shard after the other, from the position in the journal."""

    def __init__(
        self, out: Path, source: str, recipe: Recipe, shard_bytes: int, label_ids: dict[str, int]
    ) -> None:
        self.out, self.source, self.recipe = out, source, recipe
        self.shard_bytes, self.label_ids = shard_bytes, label_ids
        self.counts = Counts(list(label_ids))
        self.keys: set[str] = set()
        self.left_out: list[dict[str, str]] = []
        self.tar: Any = None
        """webdataset's ``TarWriter`` of the shard that is being written."""
        self.tar_bytes = 0
        self.start = _Place()
        self._resume()
        self.journalled = len(self.left_out)

    def _resume(self) -> None:
        """Takes over the finished shards of an interrupted run and removes what it left unfinished.

        Raises:
            UserError: they were made from other files or with other options.
        """
        theirs, kept = None, []
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged from here on
            head, *lines = (self.out / MARKER).read_bytes().splitlines()
            theirs = json.loads(head)["source"]
            for line in lines:
                entry, tar = json.loads(line), self._path()
                table = ShardTable.load(tar.with_suffix(".idx.npz"), tar)
                place, left_out = _Place(*map(int, entry["next"])), list(entry["left_out"])
                if table is None or table.sha256 != entry["sha256"]:
                    break
                kept.append(line)
                self.start = place
                self.left_out += left_out
                self.counts.add(tar.name, table)
                self.keys.update(table.key_list())
        if kept and theirs != self.source:
            raise UserError(
                f"{self.out} holds {len(kept)} finished shards of an interrupted run with other "
                f"files or options: run that command again, or remove the folder"
            )
        self._sweep()
        head = json.dumps({"source": self.source}).encode()
        write_atomic(self.out / MARKER, b"".join(line + b"\n" for line in [head, *kept]))

    def _path(self) -> Path:
        """Returns the path of the shard that comes next."""
        return self.out / f"shard-{len(self.counts.shards):05d}.tar"

    def _sweep(self) -> None:
        """Removes files of unfinished shards."""
        keep = {Path(shard.name).stem for shard in self.counts.shards}
        for pattern in ("shard-*.tar", "shard-*.idx.npz", ".*.tmp"):
            for path in self.out.glob(pattern):
                if path.name.split(".")[0] not in keep:
                    path.unlink()

    def write(
        self, rows: Sequence[Row], left_out: Sequence[LeftOut], jobs: int, progress: bool
    ) -> Manifest:
        """Writes the shards and the manifest. A failure leaves finished shards or nothing."""
        try:
            self._fill(rows, jobs, progress)
            if not self.counts.shards:
                first = self.left_out[0]
                raise UserError(
                    f"none of the {len(rows)} clips can be read (the first: {first['file']}, "
                    f"{first['reason']})"
                )
            entries = [*map(_listed, left_out), *self.left_out]
            manifest = self.counts.manifest(left_out=entries, source=self.source)
            manifest.save(self.out)
            return manifest
        except BaseException:
            if self.tar is not None:
                with suppress(OSError):
                    self.tar.close()
                with suppress(OSError):
                    self.tar.stream.close()
            self._sweep()
            if not self.counts.shards:
                (self.out / MARKER).unlink(missing_ok=True)
            raise

    def _fill(self, rows: Sequence[Row], jobs: int, progress: bool) -> None:
        from tqdm import tqdm

        sent: deque[tuple[int, int, Work]] = deque()  # to the processes, and not yet returned

        def works() -> Iterator[Work]:
            for r in range(self.start.row, len(rows)):
                for w, work in enumerate(works_of(rows[r], self.recipe)):
                    if (r, w) >= self.start[:2]:
                        sent.append((r, w, work))
                        yield work

        form = "{l_bar}{bar}| {elapsed}<{remaining}"
        first = self.start
        bar = tqdm(total=len(rows), initial=first.row, bar_format=form, disable=not progress)
        results = ordered_map(partial(pack, recipe=self.recipe), works(), jobs=jobs)
        with closing(results), bar:
            for clips in results:
                r, w, work = sent.popleft()
                skip = first.clip if (r, w) == first[:2] else 0
                for i, clip in enumerate(clips[skip:], start=skip):
                    if isinstance(clip, Packed):
                        clip = _with_events_inside(clip, work)
                    if isinstance(clip, LeftOut):
                        self.left_out.append(_listed(clip))
                    else:
                        self._add(clip, work.row, _Place(r, w, i))
                share = (work.stop - work.first) / work.count
                bar.update(min(share, len(rows) - bar.n))  # rounding of the sum
        if self.tar is not None:
            self._finish(_Place(len(rows)))

    def _add(self, clip: Packed, row: Row, place: _Place) -> None:
        text = json.dumps(_meta(clip, row, self.label_ids), ensure_ascii=False)
        meta = text.encode("utf-8", "backslashreplace")  # a lone surrogate is escaped as in JSON
        size = sum(-(-len(part) // BLOCK) * BLOCK + BLOCK for part in (clip.data, meta))
        if self.tar is not None and self.tar_bytes + size > self.shard_bytes:
            self._finish(place)
        key = escape_key(clip.id)
        if key in self.keys:
            key = escape_key(f"{clip.id}#{len(self.keys)}")
        self.keys.add(key)
        if self.tar is None:
            temporary = self._path().with_name(f".{self._path().name}.tmp")
            self.tar, self.tar_bytes = _tar_writer(temporary.open("wb")), 0
        self.tar.write({"__key__": key, clip.suffix: clip.data, "json": meta})
        self.tar_bytes += size

    def _finish(self, place: _Place) -> None:
        """Closes and indexes the shard, then records it; ``place``: of the first clip after it."""
        assert self.tar is not None
        self.tar.close()
        self.tar.stream.close()
        self.tar = None
        path = self._path()
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        table = scan(temporary, sha256)
        replace_durably(temporary, path)
        table.save(path.with_suffix(".idx.npz"))
        new = self.left_out[self.journalled :]
        line = json.dumps({"next": place, "sha256": sha256, "left_out": new})
        with (self.out / MARKER).open("ab") as journal:
            journal.write(line.encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.journalled = len(self.left_out)
        self.counts.add(path.name, table)


def _tar_writer(file: BinaryIO) -> Any:
    """Returns webdataset's writer of a tar whose bytes depend on the samples alone."""
    os.environ.setdefault("WDS_SECURE", "1")  # no shell from URLs, no pickle
    from webdataset import TarWriter  # imports torch: not before the first clip

    return TarWriter(file, user="bat", group="bat", mode=0o644, mtime=0, encoder=False)


def _listed(entry: LeftOut) -> dict[str, str]:
    """Returns the manifest's entry for a clip left out."""
    return {"key": entry.key, "file": entry.file, "reason": entry.reason}


def _with_events_inside(clip: Packed, work: Work) -> Packed | LeftOut:
    """Returns ``clip``, or why it is left out if an event begins after its recording has ended."""
    end = clip.frames / clip.rate
    if work.info is not None:  # one piece of several
        end = work.info.frames / work.info.sample_rate
    for event in work.row.events or ():
        if event.onset_seconds >= end:
            line = f" (line {event.line})" if event.line else ""
            why = f"begins at {event.onset_seconds:g} s{line}, the recording has {end:.6g} s"
            return LeftOut(clip.id, work.row.name, f"late: an event {why}")
    return clip


def _meta(clip: Packed, row: Row, label_ids: dict[str, int]) -> dict[str, Any]:
    """Returns the clip's JSON. A piece of a recording has the events within it and their labels,
    and no text, which belongs to the whole."""
    begin, seconds = clip.start_seconds - row.start_seconds, clip.frames / clip.rate
    is_piece = clip.id != row.key
    events = row.events
    if events is not None and is_piece:
        events = tuple(e for event in events if (e := event.within(begin, seconds)) is not None)
        labels = dict.fromkeys(label for event in events for label in event.labels)
        row = replace(row, labels=tuple(labels), mids=())
    meta: dict[str, Any] = {
        "id": clip.id,
        "label": list(row.labels),
        "label_id": [label_ids[label] for label in row.labels],
        "sample_rate": clip.rate,
        "num_samples": clip.frames,
        "start_seconds": clip.start_seconds,
    }
    optional = {
        "mid": list(row.mids) or None,
        "fold": row.fold,
        "split": row.split,
        "events": None if events is None else [as_json(event) for event in events],
        "text": None if is_piece else row.text,
    }
    return meta | {name: value for name, value in optional.items() if value is not None}
