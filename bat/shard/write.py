"""Writes shards: files of any folder become WebDataset tars with a manifest (docs/data.md).

``shard-%05d.tar`` holds ``KEY.ext`` + ``KEY.json`` (``id, label, label_id, sample_rate,
num_samples, start_seconds`` and, if present, ``mid, fold, split, events, text``), beside it its
index (``table.py``). ``manifest.json`` is written last, so a set that has one is complete. Each
clip is decoded once before it is written (``pack.py``), so a shard holds only readable clips; the
others are listed in the manifest with their reasons.

Which rows go into which shard is planned before (``plan.py``), so the same files and options give
the same bytes, with any number of processes and parts and after any interruption. A shard of which
no clip can be read is not written: its number is missing. Until the manifest is there, the folder
``.bat-shard-in-progress`` marks the set as unfinished and holds a record of each shard that is
finished, written when its tar and index are on disk.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from bat.data.manifest import Counts, Manifest, source_hash
from bat.data.parts import WHOLE, Part, run
from bat.data.sources import UNFINISHED
from bat.data.store import Store
from bat.data.table import ShardTable, scan
from bat.data.tar import escape_key
from bat.errors import UserError
from bat.lock import hold
from bat.shard.pack import Channels, Codec, Packed, Recipe, Work, pack
from bat.shard.plan import numbered, plan, works_between
from bat.shard.pool import ordered_map
from bat.tasks.base import LeftOut, Row
from bat.tasks.events import as_json

THREADS = 16
"""Threads that read records when all are joined."""


def write_shards(
    rows: Sequence[Row],
    out: Path | str,
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
    part: Part = WHOLE,
    join_only: bool = False,
) -> Manifest | None:
    """Write ``rows`` to ``out`` as shards of about ``shard_bytes`` (one clip at least).

    Args:
        out: a folder, or the URL of one.
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
        part, join_only: see ``bat.data.parts.run``.

    Returns:
        The manifest; that of ``out`` itself if the same set is already complete; None if shards of
        other parts are missing. Shards that an interrupted call finished are kept.

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
    store = Store(out)
    alone = part == WHOLE and not join_only and store.local is not None
    try:
        with hold(store.local) if alone and store.local is not None else nullcontext():
            manifest = _complete(store, source)
            if manifest is None:
                job = _Shards(
                    store,
                    rows,
                    recipe,
                    label_ids,
                    source=source,
                    shard_bytes=shard_bytes,
                    left_out=left_out,
                    jobs=jobs,
                    progress=progress,
                )
                try:
                    return run(job, part, join_only=join_only)
                finally:
                    has_tars = any(name.endswith(".tar") for name in store.sizes())
                    if alone and not has_tars and not job.listed():
                        job.state.clear()
            store.below(UNFINISHED).clear()
            return manifest
    except OSError as error:
        raise UserError(f"{store} cannot be written: {error.strerror}") from error


def _complete(store: Store, source: str) -> Manifest | None:
    """Returns the manifest of a folder if it holds this set already; None if it is to be written.

    Raises:
        UserError: it holds another set, a damaged one, or shards of another program.
    """
    manifest, sizes = Manifest.load(store.place), store.sizes()
    if manifest is None:
        has_shards = any(name.endswith(".tar") for name in sizes) or "manifest.json" in sizes
        if has_shards and UNFINISHED not in sizes and not store.below(UNFINISHED).sizes():
            raise UserError(
                f"{store} holds shards that bat-shard did not write: give another folder"
            )
        return None
    if manifest.source != source:
        raise UserError(
            f"{store} already holds a complete set of {manifest.clips} clips from other files or "
            f"options: give another folder, or remove it"
        )
    damage = manifest.damage(sizes)
    if damage is not None:
        raise UserError(
            f"{store} holds this set, but {damage}: copy it again, or remove the folder and run "
            f"the same command to write it anew"
        )
    return manifest


class _Shards:
    """The shards of ``rows`` as units of work (``bat.data.parts.Job``).

    A finished shard has a record in the folder ``UNFINISHED``: the hash of its tar (empty where no
    clip of it can be read, and there is none) and the clips left out. Its name has a hash of all
    that determines the shards.
    """

    noun = "shards"

    def __init__(
        self,
        store: Store,
        rows: Sequence[Row],
        recipe: Recipe,
        label_ids: dict[str, int],
        *,
        source: str,
        shard_bytes: int,
        left_out: Sequence[LeftOut],
        jobs: int,
        progress: bool,
    ) -> None:
        self.store, self.state, self.source = store, store.below(UNFINISHED), source
        self.rows, self.recipe, self.label_ids = rows, recipe, label_ids
        self.left_out, self.jobs, self.progress = left_out, jobs, progress
        self.begins = plan(rows, recipe, shard_bytes)
        self.numbered = numbered(rows, recipe)
        said = json.dumps([source, self.begins])
        self.id = hashlib.sha256(said.encode()).hexdigest()[:16]
        self._check_others()

    def _check_others(self) -> None:
        """Raises ``UserError`` for finished shards of another set."""
        if self.state.local is not None and self.state.local.is_file():  # of an older bat
            self.state.local.unlink()
            self.state.write("begun", b"")
        names = [name for name in self.state.sizes() if name.endswith(".json")]
        if others := sum(not name.endswith(f"-{self.id}.json") for name in names):
            raise UserError(
                f"{self.store} holds {others} finished shards of an interrupted run with other "
                f"files or options: run that command again, or remove the folder"
            )

    @property
    def units(self) -> int:
        return len(self.begins) - 1

    def finished(self) -> Manifest | None:
        return _complete(self.store, self.source)

    def _record(self, unit: int) -> str:
        return f"{_name(unit)}-{self.id}.json"

    def listed(self) -> set[int]:
        names = self.state.sizes()
        return {unit for unit in range(self.units) if self._record(unit) in names}

    def intact(self, unit: int) -> bool:
        return self._read(unit) is not None

    def _read(self, unit: int) -> tuple[list[dict[str, str]], ShardTable | None] | None:
        """Returns the clips left out of a shard and its table, None if it is empty; None if it is
        not as it was written."""
        try:
            record = json.loads(self.state.read(self._record(unit)))
            left_out, sha256 = list(record["left_out"]), record["sha256"]
            if not sha256:
                return left_out, None
            saved = io.BytesIO(self.store.read(f"{_name(unit)}.idx.npz"))
            tar = None if self.store.local is None else self.store.local / f"{_name(unit)}.tar"
            table = ShardTable.load(saved, tar)
        except UserError:  # the store cannot be reached
            raise
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (left_out, table) if table is not None and table.sha256 == sha256 else None

    def do(self, units: Sequence[int]) -> None:
        """Writes shards; a failure leaves finished ones."""
        from tqdm import tqdm

        if units:
            self.state.write("begun", b"")
        sent: deque[tuple[int, int, Work]] = deque()  # to the processes, and not yet returned

        def works() -> Iterator[Work]:
            for unit in units:
                places = self.begins[unit : unit + 2]
                for r, work in works_between(self.rows, self.recipe, *places):
                    sent.append((unit, r, work))
                    yield work

        ends = (self.begins[unit : unit + 2] for unit in units)
        total = sum(max(1, end.row - begin.row) for begin, end in ends)
        form = "{l_bar}{bar}| {elapsed}<{remaining}"
        bar = tqdm(total=total, bar_format=form, disable=not self.progress)
        results = ordered_map(partial(pack, recipe=self.recipe), works(), jobs=self.jobs)

        def clips() -> Iterator[tuple[int, int, Work, list[Packed | LeftOut]]]:
            for found in results:
                unit, r, work = sent.popleft()
                bar.update(min((work.stop - work.first) / work.count, total - bar.n))
                yield unit, r, work, found
            bar.update(total - bar.n)

        with closing(results), bar:
            for unit, found in itertools.groupby(clips(), key=lambda item: item[0]):
                self._write(unit, ((r, work, clip) for _, r, work, some in found for clip in some))

    def _write(self, unit: int, clips: Iterator[tuple[int, Work, Packed | LeftOut]]) -> None:
        """Writes one shard: the tar, its table, its record."""
        left_out, name, table = [], _name(unit), None
        with ExitStack() as stack:
            tar: Any = None
            for r, work, clip in clips:
                if isinstance(clip, Packed):
                    clip = _with_events_inside(clip, work)
                if isinstance(clip, LeftOut):
                    left_out.append(_listed(clip))
                    continue
                if tar is None:
                    path = stack.enter_context(self.store.put(f"{name}.tar"))
                    tar = _tar_writer(stack.enter_context(path.open("wb")))
                    stack.callback(tar.tarstream.close)
                text = json.dumps(_meta(clip, work.row, self.label_ids), ensure_ascii=False)
                meta = text.encode("utf-8", "backslashreplace")  # a lone surrogate as in JSON
                key = escape_key(f"{clip.id}#{r}" if r in self.numbered else clip.id)
                tar.write({"__key__": key, clip.suffix: clip.data, "json": meta})
            if tar is not None:
                tar.close()
                tar.stream.close()
                with path.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                table = scan(path, sha256)
        if table is not None:
            if self.store.local is None:
                table.mtime_ns = 0  # known to the store alone
            self.store.write(f"{name}.idx.npz", table.to_bytes())
        record = {"sha256": table.sha256 if table else "", "left_out": left_out}
        self.state.write(self._record(unit), json.dumps(record).encode())

    def join(self) -> Manifest:
        """Writes the manifest, and removes records and files of shards that never were finished."""
        counts, entries = Counts(list(self.label_ids)), [*map(_listed, self.left_out)]
        listed = len(entries)
        with ThreadPoolExecutor(THREADS) as pool:
            for unit, found in enumerate(pool.map(self._read, range(self.units))):
                if found is None and (made := self.finished()) is not None:
                    return made  # joined by another process
                if found is None:
                    self.state.remove([self._record(unit)])
                    raise UserError(
                        f"{self.store}: {_name(unit)} is not as it was written: run the same "
                        "command, it is made anew"
                    )
                left_out, table = found
                entries += left_out
                if table is not None:
                    counts.add(f"{_name(unit)}.tar", table)
        if not counts.shards:
            self.state.clear()
            first = entries[listed]
            raise UserError(
                f"none of the {len(self.rows)} clips can be read (the first: {first['file']}, "
                f"{first['reason']})"
            )
        keep = {Path(shard.name).stem for shard in counts.shards}
        ours = re.compile(r"(shard-\d{5,})\.(tar|idx\.npz)")
        found_files = ((name, ours.fullmatch(name)) for name in self.store.sizes())
        self.store.remove(name for name, ours in found_files if ours and ours[1] not in keep)
        manifest = counts.manifest(left_out=entries, source=self.source)
        data = manifest.text().encode("utf-8", "backslashreplace")  # a lone surrogate as in JSON
        self.store.write("manifest.json", data)
        self.store.sweep("shard-*", "manifest.json")
        self.state.clear()
        return manifest


def _name(unit: int) -> str:
    return f"shard-{unit:05d}"


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
