"""Indexes one shard: the place of each clip's bytes and the content of its JSON.

A shard is a plain WebDataset tar: ``KEY.flac`` + ``KEY.json`` side by side. Its ``ShardTable`` lets
training read by ``pread`` without parsing a tar; it lies beside the shard as
``shard-00000.idx.npz``. ``scan`` makes it for any shard, of bat or foreign: regular members only,
suffixes of an allow-list, size caps, no pickle, nothing unpacked. A foreign JSON seldom gives the
length of a clip: ``scan(probe=True)`` reads it from the clips themselves.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bat.audio.decode import DecodeError
from bat.audio.decode import probe as read_header
from bat.data.clip_fields import CLIP as CLIP
from bat.data.clip_fields import MAX_AUDIO_BYTES as MAX_AUDIO_BYTES
from bat.data.clip_fields import UNREADABLE as UNREADABLE
from bat.data.clip_fields import parse, sound
from bat.data.tar import BLOCK, Member, members, sample_key, write_atomic
from bat.errors import UserError
from bat.redact import one_line
from bat.tasks.base import AUDIO_SUFFIXES, UNDECODED_SUFFIXES, no_decoder
from bat.tasks.labels import names_of

VERSION = 3
MAX_JSON_BYTES = 1 << 20
MAX_TABLE_BYTES = 1 << 28
MAX_MEMBERS = 1 << 21
"""Limit on clips, JSON members and members left out of one shard."""
MAX_ALL_JSON_BYTES = 1 << 29
"""Limit on the JSON bytes of one shard as it is read."""
MAX_KEPT_BYTES = 1 << 28
"""Limit on the memory for the content of a shard's JSON."""
ITS_JSON = "its JSON cannot be read"
"""Reason why a clip is left out that would otherwise have no labels."""
MEMBERS_LOOKED_AT = 8
"""Members around a clip that are searched for its JSON."""
MAX_NAME = 512
"""Characters of a member's name in the list of clips left out."""


@dataclass
class ShardTable:
    """The places of the clips of one shard and the content of their JSON."""

    tar_bytes: int
    clips: np.ndarray  # (n,) CLIP
    labels: np.ndarray  # int32, flat: indices into ``names``, ``clips["labels"]`` each
    keys: np.ndarray  # uint8, flat: ``clips["key"]`` bytes each
    names: list[str]
    """Labels of this shard."""
    ids: list[int]
    """``label_id`` of each of ``names`` as its publisher numbered it; -1 if unnumbered."""
    splits: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """``{member: reason}``"""
    sha256: str = ""
    """SHA-256 of the tar, if its writer recorded it."""
    mtime_ns: int = 0
    """Modification time of the tar when the table was made."""
    events: dict[str, list[Any]] = field(default_factory=dict)
    """Events by key, of the clips that have some: ``[[onset_seconds, offset_seconds, [name]]]``."""
    texts: dict[str, str] = field(default_factory=dict)
    """Transcripts by key."""

    def key_list(self) -> list[str]:
        """The keys (n)."""
        text, ends = self.keys.tobytes().decode("ascii"), np.cumsum(self.clips["key"], dtype=int)
        return [text[end - size : end] for end, size in zip(ends, self.clips["key"], strict=True)]

    def save(self, path: Path) -> None:
        """Write atomically (temporary file, fsync, ``os.replace``)."""
        names = ["tar_bytes", "mtime_ns", "names", "ids", "splits", "left_out", "sha256"]
        names += [name for name in ("events", "texts") if getattr(self, name)]
        text = json.dumps({"version": VERSION, **{name: getattr(self, name) for name in names}})
        buffer = io.BytesIO()
        np.savez(
            buffer,
            head=np.frombuffer(text.encode(), np.uint8),
            clips=self.clips,
            labels=self.labels,
            keys=self.keys,
        )
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, tar: Path | None) -> ShardTable | None:
        """Returns the table saved at ``path`` if it describes the shard ``tar`` as it is now, else
        None.

        Checked: the range of all numbers; size and modification time of the tar; the headers of the
        first, middle and last clip, and their labels where the JSON is beside the clip. With
        ``tar=None`` only the numbers.
        """
        try:
            with zipfile.ZipFile(path) as packed:  # checked before numpy unpacks anything
                if sum(member.file_size for member in packed.infolist()) > MAX_TABLE_BYTES:
                    return None
            with np.load(path, allow_pickle=False) as file:
                head = json.loads(file["head"].tobytes())
                clips, labels, keys = file["clips"], file["labels"], file["keys"]
            if head.pop("version") != VERSION or clips.dtype != CLIP:
                return None
            table = cls(clips=clips, labels=labels, keys=keys, **head)
            fits = sound(**vars(table)) and (tar is None or table._describes(tar))
            if not fits:
                return None
            table.names, table.splits = ([*map(one_line, t)] for t in (table.names, table.splits))
            return table
        except (*UNREADABLE, UserError):
            return None

    def _describes(self, tar: Path) -> bool:
        clips, n = self.clips, len(self.clips)
        keys, last_labels = self.key_list(), np.cumsum(clips["labels"], dtype=int)
        with tar.open("rb") as file:
            now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != (self.tar_bytes, self.mtime_ns):
                return False
            for i in sorted({0, n // 2, n - 1}) if n else ():
                head = os.pread(file.fileno(), BLOCK, int(clips["offset"][i]) - BLOCK)
                if zlib.crc32(head) != clips["header"][i]:
                    return False
                begin = int(clips["offset"][i - 1] + clips["size"][i - 1]) if i else 0
                begin = -(-begin // BLOCK) * BLOCK
                for member in itertools.islice(members(file, tar, begin), MEMBERS_LOOKED_AT):
                    if member.name.lower().endswith(".json") and sample_key(member.name) == keys[i]:
                        meta, _ = parse(os.pread(file.fileno(), member.size, member.offset))
                        ids = self.labels[last_labels[i] - clips["labels"][i] : last_labels[i]]
                        if [name for name, _ in parse_labels(meta)] != [self.names[k] for k in ids]:
                            return False
                        break
        return True

    def agrees(self, now: ShardTable) -> bool:
        """Return True if ``now`` describes the same tar; ``self`` alone may know a length."""
        if self.clips.shape != now.clips.shape:
            return False
        same = all(
            np.array_equal(self.clips[name], now.clips[name])
            for name in ("offset", "size", "codec", "fold", "split", "labels", "key")
        )
        known = now.clips["frames"] > 0
        return (
            same
            and np.array_equal(self.clips["frames"][known], now.clips["frames"][known])
            and np.array_equal(self.labels, now.labels)
            and np.array_equal(self.keys, now.keys)
            and (self.names, self.ids, self.splits) == (now.names, now.ids, now.splits)
            and (self.events, self.texts) == (now.events, now.texts)
        )


def parse_labels(meta: dict[str, Any]) -> list[tuple[str, int]]:
    """Returns ``[(name, label_id or -1), ...]`` of a sample's JSON (docs/data.md).

    Read: ``label`` (or ``labels``) and ``label_id``, each a list or a single value;
    ``original_data.class_labels`` (LAION). Names are normalised by ``bat.tasks.labels.names_of``;
    numbers replace missing names.
    """
    original = meta.get("original_data")
    nested = original.get("class_labels") if isinstance(original, dict) else None
    given, numbers = meta.get("label", meta.get("labels", nested)), meta.get("label_id")
    names = names_of(given)
    numbers = numbers if isinstance(numbers, list) else [numbers]
    ids = [x for x in numbers if isinstance(x, int) and 0 <= x < 1 << 31]
    if not names and not given:
        names = [str(x) for x in ids]
    if len(ids) != len(names):
        ids = [-1] * len(names)
    return list(dict(zip(names, ids, strict=True)).items())


def _whole(value: Any, default: int, limit: int) -> int:
    ok = isinstance(value, (int, float)) and value == value and 0 <= value < limit
    return int(value) if ok else default


@dataclass
class Contents:
    """The contents of a shard: its clips and their JSON, by key, in the order of the clips."""

    tar_bytes: int
    mtime_ns: int
    audio: dict[str, tuple[Member, str]]
    """Member and suffix of each file."""
    metas: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    """``{member: reason}``"""


def read_contents(path: Path) -> Contents:
    """Read the headers and JSON members of a shard; no audio is read.

    Raises:
        UserError: missing file, not a tar, more in it than ``MAX_MEMBERS``, ``MAX_ALL_JSON_BYTES``
            or ``MAX_KEPT_BYTES``.
    """
    found = Contents(0, 0, {}, {}, {})
    audio, metas, left_out = found.audio, found.metas, found.left_out
    useless: dict[str, tuple[str, str]] = {}  # JSON by key: its name, and why it cannot be read
    text_bytes = kept_bytes = 0
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            end = found.tar_bytes = status.st_size
            found.mtime_ns = status.st_mtime_ns
            for member in members(file, path):
                if len(audio) + len(metas) + len(left_out) + len(useless) > MAX_MEMBERS:
                    raise UserError(f"shard {path} has more than {MAX_MEMBERS} members: split it")
                suffix = os.path.splitext(member.name)[1][1:].lower()
                if suffix in UNDECODED_SUFFIXES:
                    left_out[member.name[:MAX_NAME]] = no_decoder(suffix)
                if suffix != "json" and suffix not in AUDIO_SUFFIXES:
                    continue
                key, name = sample_key(member.name), member.name[:MAX_NAME]
                cap = MAX_JSON_BYTES if suffix == "json" else MAX_AUDIO_BYTES
                why = ""
                if not member.regular:
                    why = "not a regular file"
                elif member.offset + member.size > end:
                    why = "cut short: the tar ends before it"
                elif member.size == 0:
                    why = "empty"
                elif member.size > cap:
                    why = f"larger than {cap} bytes"
                if key in (metas if suffix == "json" else audio):
                    left_out[name] = "a second one of this key"
                elif why and suffix == "json":
                    useless[key] = name, why
                elif why:
                    left_out[name] = why
                elif suffix != "json":
                    audio[key] = (member, suffix)
                else:
                    text_bytes += member.size
                    if text_bytes > MAX_ALL_JSON_BYTES:
                        what = f"more than {MAX_ALL_JSON_BYTES} bytes of JSON"
                        raise UserError(f"shard {path} has {what}: split it")
                    try:
                        text = os.pread(file.fileno(), member.size, member.offset)
                        metas[key], size = parse(text)
                    except (ValueError, TypeError, RecursionError):
                        useless[key] = name, "not a JSON object"
                        continue
                    kept_bytes += size
                    if kept_bytes > MAX_KEPT_BYTES:
                        what = f"labels and other fields of more than {MAX_KEPT_BYTES} bytes"
                        raise UserError(f"shard {path} has {what} in its JSON: split it")
            if end >= BLOCK and os.pread(file.fileno(), BLOCK, end - BLOCK).strip(b"\0"):
                left_out["(end)"] = "no end marker: the tar may be cut short"
                last = next(reversed(audio), "")
                if metas and last not in metas:
                    useless.setdefault(last, ("", "the tar ends before it"))
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
    for key, (name, why) in useless.items():
        if key in audio and key not in metas:
            member, _ = audio.pop(key)
            left_out[member.name[:MAX_NAME]] = f"{ITS_JSON}: {why}"
        else:
            left_out[name] = why
    return found


def scan(path: Path, sha256: str = "", *, probe: bool = False) -> ShardTable:
    """Returns the table of a shard, made from its headers and JSON members.

    Args:
        sha256: of the tar, if known.
        probe: open each clip whose JSON does not give its length and rate, and read them from its
            header. A clip that does not open keeps ``frames = -1``; memory: one clip.

    Raises:
        UserError: missing file, or not a tar.
    """
    table = tabulate(read_contents(path), sha256)
    if probe:
        ask_clips(path, table.clips)
    return table


def tabulate(found: Contents, sha256: str = "") -> ShardTable:
    """Converts ``Contents`` to arrays."""
    names: dict[str, int] = {}
    ids: list[int] = []
    splits: dict[str, int] = {}
    clips = np.zeros(len(found.audio), CLIP)
    labels: list[int] = []
    for i, (key, (member, suffix)) in enumerate(found.audio.items()):
        meta = found.metas.get(key, {})
        pairs = parse_labels(meta)[: (1 << 16) - 1]
        for name, number in pairs:
            if names.setdefault(name, len(names)) == len(ids):
                ids.append(number)
            elif ids[names[name]] != number:
                ids[names[name]] = -1
            labels.append(names[name])
        split = meta.get("split")
        known = isinstance(split, str) and (split in splits or len(splits) < 127)
        clips[i] = (
            member.offset,
            member.size,
            _whole(meta.get("num_samples"), -1, 1 << 62) or -1,
            _whole(meta.get("sample_rate"), 0, 1 << 31),
            AUDIO_SUFFIXES.index(suffix),
            _whole(meta.get("fold"), -1, 1 << 15),
            splits.setdefault(str(split), len(splits)) if known else -1,
            len(pairs),
            len(key),
            member.header,
        )
    keys = np.frombuffer("".join(found.audio).encode("ascii"), np.uint8)
    flat = np.array(labels, np.int32)
    return ShardTable(
        tar_bytes=found.tar_bytes,
        clips=clips,
        labels=flat,
        keys=keys,
        names=list(names),
        ids=ids,
        splits=list(splits),
        left_out=found.left_out,
        sha256=sha256,
        mtime_ns=found.mtime_ns,
        events={
            key: [[*event[:2], list(event.labels)] for event in found.metas[key]["events"]]
            for key in found.audio
            if "events" in found.metas.get(key, {})
        },
        texts={
            key: found.metas[key]["text"]
            for key in found.audio
            if "text" in found.metas.get(key, {})
        },
    )


def ask_clips(path: Path, clips: np.ndarray) -> int:
    """Fill ``frames`` and ``rate`` where they are unknown, from the clips' own headers.

    Returns:
        The number of clips completed; those that do not open stay unknown.
    """
    filled = 0
    with path.open("rb") as file:
        for i in np.flatnonzero((clips["frames"] < 0) | (clips["rate"] == 0)):
            size, offset = int(clips["size"][i]), int(clips["offset"][i])
            try:
                info = read_header(os.pread(file.fileno(), size, offset))
            except DecodeError:
                continue
            if not info.frames:
                continue
            if clips["frames"][i] < 0:
                clips["frames"][i] = info.frames
            clips["rate"][i] = info.sample_rate
            filled += 1
    return filled
