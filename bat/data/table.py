"""Indexes one shard: the place of each clip's bytes and the content of its JSON.

A shard is a plain WebDataset tar: ``KEY.flac`` + ``KEY.json`` side by side. Its ``ShardTable`` lets
training read by ``pread`` without parsing a tar; it lies beside the shard as
``shard-00000.idx.npz``. ``scan`` makes it for any shard, of bat or foreign: regular members only,
suffixes of an allow-list, size bounds, no pickle, nothing unpacked. A table may come from an
untrusted source too: each number is held to its range before it is used. A foreign JSON seldom
gives the length of a clip: ``scan(probe=True)`` reads it from the clips themselves.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bat.audio.decode import DecodeError
from bat.audio.decode import probe as read_header
from bat.data.clip_json import parse, parse_labels
from bat.data.tar import BLOCK, Member, members, sample_key
from bat.errors import UserError
from bat.io import write_atomic
from bat.redact import one_line
from bat.tasks.base import AUDIO_SUFFIXES, UNDECODED_SUFFIXES, no_decoder
from bat.tasks.events import from_json

VERSION = 3
MAX_AUDIO_BYTES = 1 << 30
MAX_JSON_BYTES = 1 << 20
MAX_ALL_JSON_BYTES = 1 << 29
"""Limit on the JSON bytes of one shard."""
MAX_TABLE_BYTES = 1 << 28
MAX_MEMBERS = 1 << 21
"""Limit on the members of one shard."""
MAX_NAME = 512
"""Characters of a member's name in the list of clips left out."""
ITS_JSON = "its JSON cannot be read"
"""Reason why a clip is left out that would otherwise have no labels."""
UNREADABLE = (
    *(OSError, ArithmeticError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError),
)
"""Exceptions that numpy, zipfile and json raise on damaged or foreign files."""
_PARSING = threading.Lock()
"""Held while numpy parses a header: Python 3.11's parser fails where several threads use it."""
KEY_BYTES = np.zeros(256, bool)
KEY_BYTES[list(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")] = True
CLIP = np.dtype(
    [
        ("offset", "<i8"),  # of the audio bytes in the tar
        ("size", "<i8"),
        ("frames", "<i8"),  # at ``rate``; -1 unknown
        ("rate", "<i4"),  # 0 unknown
        ("codec", "u1"),  # index into AUDIO_SUFFIXES
        ("fold", "<i2"),  # -1 none
        ("split", "i1"),  # index into ``splits``; -1 none
        ("labels", "<u2"),  # number of labels
        ("key", "u1"),  # length of the key, bytes
        ("header", "<u4"),  # CRC-32 of its header in the tar
    ]
)


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
        write_atomic(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """Returns the content of the table's file."""
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
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path | io.BytesIO, tar: Path | None) -> ShardTable | None:
        """Returns the table saved at ``path`` (or in memory) if it describes the shard ``tar`` as
        it is now, else None.

        Checked: the range of all numbers; size and modification time of the tar; the headers of the
        first, middle and last clip. With ``tar=None`` only the numbers.
        """
        try:
            with zipfile.ZipFile(path) as packed:  # checked before numpy unpacks anything
                if sum(member.file_size for member in packed.infolist()) > MAX_TABLE_BYTES:
                    return None
            if isinstance(path, io.BytesIO):
                path.seek(0)
            with _PARSING, np.load(path, allow_pickle=False) as file:
                head = json.loads(file["head"].tobytes())
                clips, labels, keys = file["clips"], file["labels"], file["keys"]
            if head.pop("version") != VERSION:
                return None
            table = cls(clips=clips, labels=labels, keys=keys, **head)
            if not table._is_valid() or (tar is not None and not table._describes(tar)):
                return None
            for texts in (table.names, table.splits):
                if not "".join(texts).isprintable():
                    texts[:] = map(one_line, texts)
            return table
        except UNREADABLE:
            return None

    def _is_valid(self) -> bool:
        """Return True if all values are within their ranges; raises ``UNREADABLE`` on wrong types.

        Clips must lie one after the other, and each label must belong to a clip.
        """
        clips, labels, keys, tar_bytes = self.clips, self.labels, self.keys, self.tar_bytes
        ends = clips["offset"] + clips["size"]
        texts = [*self.names, *self.splits, *self.left_out.values(), *self.texts.values()]
        return (
            [array.dtype for array in (clips, labels, keys)] == [CLIP, np.int32, np.uint8]
            and clips.ndim == labels.ndim == keys.ndim == 1
            and {*map(type, (tar_bytes, self.mtime_ns, *self.ids))} == {int}
            and {*map(type, (self.sha256, *texts))} == {str}
            and all(isinstance(events, list) for events in self.events.values())
            and all(from_json(event) for events in self.events.values() for event in events)
            and len(self.names) == len(self.ids)
            and _within(clips["size"], 1, min(MAX_AUDIO_BYTES, tar_bytes))
            and _within(clips["offset"], BLOCK, tar_bytes - clips["size"])
            and _within(clips["offset"][1:], ends[:-1] + BLOCK, tar_bytes)
            and _within(clips["frames"], -1, 1 << 62)
            and _within(clips["rate"], 0, 1 << 31)
            and _within(clips["codec"], 0, len(AUDIO_SUFFIXES) - 1)
            and _within(clips["fold"], -1, 1 << 15)
            and _within(clips["split"], -1, len(self.splits) - 1)
            and _within(clips["key"], 1, 80)
            and _within(labels, 0, len(self.names) - 1)
            and bool(np.bincount(labels, minlength=len(self.names)).all())
            and int(clips["labels"].sum(dtype=int)) == len(labels)
            and int(clips["key"].sum(dtype=int)) == len(keys)
            and bool(KEY_BYTES[keys].all())
        )

    def _describes(self, tar: Path) -> bool:
        n = len(self.clips)
        with tar.open("rb") as file:
            now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != (self.tar_bytes, self.mtime_ns):
                return False
            return all(
                zlib.crc32(os.pread(file.fileno(), BLOCK, int(clip["offset"]) - BLOCK))
                == clip["header"]
                for clip in (self.clips[[0, n // 2, n - 1]] if n else ())
            )

    def agrees(self, now: ShardTable) -> bool:
        """Return True if ``now`` describes the same tar; ``self`` alone may know a length."""
        fields = ("offset", "size", "codec", "fold", "split", "labels", "key")
        known = now.clips["frames"] > 0
        return (
            self.clips.shape == now.clips.shape
            and all(np.array_equal(self.clips[name], now.clips[name]) for name in fields)
            and np.array_equal(self.clips["frames"][known], now.clips["frames"][known])
            and np.array_equal(self.labels, now.labels)
            and np.array_equal(self.keys, now.keys)
            and (self.names, self.ids, self.splits) == (now.names, now.ids, now.splits)
            and (self.events, self.texts) == (now.events, now.texts)
        )


def _within(values: np.ndarray, low: int | np.ndarray, high: int | np.ndarray) -> bool:
    return bool(((values >= low) & (values <= high)).all())


def table_places(tar: Path, folder: Path | None) -> list[Path]:
    """Returns the possible places of the table of ``tar``: beside it, then in a folder for
    read-only shards."""
    places = [tar.with_suffix(".idx.npz")]
    if folder is not None:
        digest = hashlib.sha256(os.fsencode(tar.resolve())).hexdigest()[:12]
        places.append(folder / f"{tar.stem}-{digest}.idx.npz")
    return places


def load_table(tar: Path, folder: Path | None = None) -> ShardTable | None:
    """Returns the saved table of ``tar`` that describes it as it is now, if there is one."""
    tables = (ShardTable.load(place, tar) for place in table_places(tar, folder))
    return next(filter(None, tables), None)


def _whole(value: Any, default: int, limit: int) -> int:
    ok = isinstance(value, (int, float)) and value == value and 0 <= value < limit
    return int(value) if ok else default


def unusable(member: Member, suffix: str) -> tuple[str, str] | None:
    """Returns (kind, why) of a member that should be a clip or its JSON and cannot be; None for any
    other."""
    if suffix in UNDECODED_SUFFIXES:
        return "unknown", no_decoder(suffix)
    if suffix != "json" and suffix not in AUDIO_SUFFIXES:
        return None
    if not member.regular:
        return "corrupt", "not a regular file"
    if member.size == 0:
        return "empty", "empty"
    limit = MAX_JSON_BYTES if suffix == "json" else MAX_AUDIO_BYTES
    return ("long", f"larger than {limit} bytes") if member.size > limit else None


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
        UserError: missing file, not a tar, more in it than ``MAX_MEMBERS`` or
            ``MAX_ALL_JSON_BYTES``.
    """
    found = Contents(0, 0, {}, {}, {})
    audio, metas, left_out = found.audio, found.metas, found.left_out
    damaged: dict[str, tuple[str, str]] = {}  # JSON by key: its name, and why it cannot be read
    text_bytes = 0
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            end = found.tar_bytes = status.st_size
            found.mtime_ns = status.st_mtime_ns
            for number, member in enumerate(members(file, path)):
                if number >= MAX_MEMBERS:
                    raise UserError(f"shard {path} has more than {MAX_MEMBERS} members: split it")
                suffix = os.path.splitext(member.name)[1][1:].lower()
                if suffix not in ("json", *AUDIO_SUFFIXES, *UNDECODED_SUFFIXES):
                    continue
                key, name = sample_key(member.name), member.name[:MAX_NAME]
                _, why = unusable(member, suffix) or ("", "")
                if not why and member.offset + member.size > end:
                    why = "cut short: the tar ends before it"
                if suffix in UNDECODED_SUFFIXES:
                    left_out[name] = why
                elif key in (metas if suffix == "json" else audio):
                    left_out[name] = "a second one of this key"
                elif why and suffix == "json":
                    damaged[key] = name, why
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
                        metas[key] = parse(os.pread(file.fileno(), member.size, member.offset))
                    except (ValueError, TypeError, RecursionError):
                        damaged[key] = name, "not a JSON object"
            if end >= BLOCK and os.pread(file.fileno(), BLOCK, end - BLOCK).strip(b"\0"):
                left_out["(end)"] = "no end marker: the tar may be cut short"
                last = next(reversed(audio), "")
                if metas and last not in metas:
                    damaged.setdefault(last, ("", "the tar ends before it"))
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
    for key, (name, why) in damaged.items():
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
    metas = {key: found.metas.get(key, {}) for key in found.audio}
    for i, (key, (member, suffix)) in enumerate(found.audio.items()):
        meta = metas[key]
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
    return ShardTable(
        tar_bytes=found.tar_bytes,
        clips=clips,
        labels=np.array(labels, np.int32),
        keys=np.frombuffer("".join(found.audio).encode("ascii"), np.uint8),
        names=list(names),
        ids=ids,
        splits=list(splits),
        left_out=found.left_out,
        sha256=sha256,
        mtime_ns=found.mtime_ns,
        events={
            key: [[*event[:2], list(event.labels)] for event in meta["events"]]
            for key, meta in metas.items()
            if "events" in meta
        },
        texts={key: meta["text"] for key, meta in metas.items() if "text" in meta},
    )


def ask_clips(path: Path, clips: np.ndarray) -> int:
    """Fill ``frames`` and ``rate`` where they are unknown, from the clips' own headers; clips that
    do not open stay unknown. Returns the number of clips completed."""
    filled = 0
    with path.open("rb") as file:
        for i in np.flatnonzero((clips["frames"] < 0) | (clips["rate"] == 0)):
            size, offset = int(clips["size"][i]), int(clips["offset"][i])
            try:
                info = read_header(os.pread(file.fileno(), size, offset))
            except DecodeError:
                continue
            if info.frames:
                if clips["frames"][i] < 0:
                    clips["frames"][i] = info.frames
                clips["rate"][i] = info.sample_rate
                filled += 1
    return filled
