"""Writes shards: files of any folder become WebDataset tars with a manifest (docs/data.md).

``shard-%05d.tar`` holds ``KEY.ext`` + ``KEY.json`` (``id, label, label_id, sample_rate,
num_samples, start_seconds`` and, if present, ``mid, fold, split``), beside it its index
(``table.py``). ``manifest.json`` is written last, so a set that has one is complete. Each clip is
decoded once before it is written (``pack.py``), so a shard holds only readable clips; the others
are listed in the manifest with their reasons. The same files and options give the same bytes, with
any number of processes and after any interruption (``journal.py``): rows in their order, one time
stamp, no user. A clip is written to disk immediately (``shard_file.py``), so memory does not grow
with the shard. A complete set is not written again, unless its shards differ from the manifest.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from bat.data.manifest import Counts, Manifest, source_hash
from bat.data.tar import BLOCK, escape_key
from bat.errors import UserError
from bat.shard.journal import MARKER as MARKER
from bat.shard.journal import Finished, Journal, Place, claimed
from bat.shard.pack import Channels, Codec, Outcome, Packed, Recipe, Work, pack, works_of
from bat.shard.pool import ordered_map
from bat.shard.shard_file import ShardFile
from bat.tasks.base import LeftOut, Row
from bat.tasks.events import as_json


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
    mend: bool = False,
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
        mend: repair a complete set whose shards are damaged by writing it again; otherwise that is
            an error.
        jobs: processes that decode and encode.

    Returns:
        The manifest; that of ``out`` itself if the same set is already complete. Shards that an
        interrupted call finished are kept.

    Raises:
        UserError: nothing readable, a label outside the vocabulary, ``out`` in use otherwise or
            damaged, an option that cannot be met, a process that died.
    """
    recipe = Recipe(codec, sample_rate, channels, clip_seconds, min_seconds)
    recipe.check()
    if shard_bytes < 1 or jobs < 1:
        raise UserError(f"shard_bytes={shard_bytes} and jobs={jobs} must be positive")
    if not rows:
        raise UserError("there are no clips to write")
    met = sorted({label for row in rows for label in row.labels})
    names = {name: i for i, name in enumerate(met if vocabulary is None else vocabulary)}
    for label in met:
        if label not in names:
            raise UserError(f"label {label!r} is not among the {len(names)} classes given")
    source = _source(rows, recipe, shard_bytes, list(names))
    done = _complete(out, source, mend)
    if done is not None:
        return done
    with claimed(out, source) as journal:
        done = _complete(out, source, mend)  # another process may have finished it meanwhile
        if done is not None:
            return done
        done = Manifest.load(out)
        if done is not None and done.source == source:  # damaged: treated as not complete
            (out / "manifest.json").unlink()
        elif done is not None:
            raise UserError(
                f"{out} already holds a complete set of {done.clips} clips from other files or "
                f"options: give another folder, or remove it"
            )
        manifest = _Writer(journal, recipe, shard_bytes, names).write(rows, jobs, progress)
        manifest = replace(manifest, left_out=[*map(_listed, left_out), *manifest.left_out])
        manifest.save(out)
    return manifest


def _complete(out: Path, source: str, mend: bool) -> Manifest | None:
    """Returns the manifest of ``out`` if it holds this set; None also if it is to be repaired."""
    done = Manifest.load(out)
    damage = None if done is None or done.source != source else done.damage(out)
    if damage is not None and not mend:
        raise UserError(
            f"{out} holds this set, but {damage}: copy it again, or remove the folder and run "
            f"the same command to write it anew"
        )
    return done if done is not None and done.source == source and damage is None else None


class _Writer:
    """Fills one shard after the other, from the position in the journal."""

    def __init__(
        self, journal: Journal, recipe: Recipe, shard_bytes: int, names: dict[str, int]
    ) -> None:
        self.journal, self.recipe, self.shard_bytes = journal, recipe, shard_bytes
        self.names = names
        self.counts = Counts(list(names))
        self.keys: set[str] = set()
        self.left_out: list[dict[str, str]] = []
        self.recorded = 0  # number of left_out in the journal
        self.shard: ShardFile | None = None
        self.start = Place()
        for finished, table in journal.resume():
            self.counts.add(finished.name, table)
            self.keys.update(table.key_list())
            self.left_out += finished.left_out
            self.start = finished.next
        self.recorded = len(self.left_out)

    def write(self, rows: Sequence[Row], jobs: int, progress: bool) -> Manifest:
        from tqdm import tqdm

        given: deque[tuple[int, int, Work]] = deque()  # sent to the processes, not yet returned

        ended = -1  # the row that has no further clips

        def works() -> Iterator[Work]:
            for r in range(self.start.row, len(rows)):
                for w, work in enumerate(works_of(rows[r], self.recipe)):
                    if r == ended:
                        break
                    if (r, w) >= self.start[:2]:
                        given.append((r, w, work))
                        yield work

        form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        begun = self.start.row
        bar = tqdm(total=len(rows), initial=begun, bar_format=form, disable=not progress)
        before = len(self.keys)
        results = ordered_map(partial(pack, recipe=self.recipe), works(), jobs=jobs)
        try:
            with closing(results), bar:
                for outcome in results:
                    r, w, work = given.popleft()
                    if r == ended:  # sent before that was known
                        continue
                    self._take(outcome, work.row, r, w)
                    seconds = max(bar.format_dict["elapsed"], 1e-3)
                    new = len(self.keys) - before
                    bar.set_postfix_str(f"{new / seconds:.1f} clips/s", refresh=False)
                    bar.update(min(work.share, len(rows) - bar.n))  # rounding of the sum
                    if outcome.ended:
                        ended = r
                        bar.update(max(0, r + 1 - bar.n))
            if self.shard is not None:
                self._finish(Place(len(rows)))
        finally:
            if self.shard is not None:
                with suppress(OSError):
                    self.shard.file.close()
        if not self.counts.shards:
            first = self.left_out[0]
            raise UserError(
                f"none of the {len(rows)} clips can be read (the first: {first['file']}, "
                f"{first['reason']})"
            )
        return self.counts.manifest(left_out=self.left_out, source=self.journal.source)

    def _take(self, outcome: Outcome, row: Row, r: int, w: int) -> None:
        skip = self.start.clip if (r, w) == self.start[:2] else 0
        for i, clip in enumerate(outcome.clips[skip:], start=skip):
            if isinstance(clip, Packed):
                self._add(clip, row, Place(r, w, i))
            else:
                self.left_out.append(_listed(clip))

    def _add(self, clip: Packed, row: Row, place: Place) -> None:
        text = json.dumps(_meta(clip, row, self.names), ensure_ascii=False)
        meta = text.encode("utf-8", "backslashreplace")  # a lone surrogate is escaped as in JSON
        size = sum(-(-len(part) // BLOCK) * BLOCK + BLOCK for part in (clip.data, meta))
        if self.shard is not None and self.shard.bytes + size > self.shard_bytes:
            self._finish(place)
        key = escape_key(clip.id)
        if key in self.keys:
            key = escape_key(f"{clip.id}#{len(self.keys)}")
        self.keys.add(key)
        if self.shard is None:
            self.shard = ShardFile(self.journal.out, len(self.counts.shards))
        self.shard.add(key, clip, meta)

    def _finish(self, place: Place) -> None:
        assert self.shard is not None
        table = self.shard.finish()
        name = self.shard.path.name
        self.counts.add(name, table)
        self.journal.add(Finished(name, place, self.left_out[self.recorded :]), table)
        self.recorded = len(self.left_out)
        self.shard = None


def _listed(entry: LeftOut) -> dict[str, str]:
    """Returns the manifest's entry for a clip left out."""
    return {"key": entry.key, "file": entry.file, "reason": entry.reason}


def _meta(clip: Packed, row: Row, names: dict[str, int]) -> dict[str, Any]:
    """Returns the clip's JSON. A piece of a recording has the events within it and their labels,
    and no text, which belongs to the whole."""
    begin, seconds = clip.start_seconds - row.start_seconds, clip.frames / clip.rate
    piece = clip.id != row.key
    events = row.events
    if events is not None and piece:
        events = tuple(e for event in events if (e := event.within(begin, seconds)) is not None)
        met = dict.fromkeys(label for event in events for label in event.labels)
        row = replace(row, labels=tuple(met), mids=())
    meta: dict[str, Any] = {
        "id": clip.id,
        "label": list(row.labels),
        "label_id": [names[label] for label in row.labels],
        "sample_rate": clip.rate,
        "num_samples": clip.frames,
        "start_seconds": clip.start_seconds,
    }
    optional: dict[str, Any] = {"mid": list(row.mids) or None, "fold": row.fold, "split": row.split}
    optional["events"] = None if events is None else [as_json(event) for event in events]
    optional["text"] = None if piece else row.text
    return meta | {k: v for k, v in optional.items() if v is not None}


def _source(
    rows: Sequence[Row], recipe: Recipe, shard_bytes: int, vocabulary: Sequence[str]
) -> str:
    options = asdict(recipe) | {"shard_bytes": shard_bytes}
    return source_hash(rows, vocabulary=vocabulary, **options)
