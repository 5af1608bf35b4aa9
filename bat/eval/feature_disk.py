"""Stores frozen features on disk: raw files that are memory-mapped, and a JSON file with checksums.

    FOLDER/KEY/patches.bin  (n, L', T, F, D)   cls.bin  entry.bin  pieces.bin   likewise
               clips.bin    (n, 2) int64: place of the clip among those asked for, its samples
               crc.bin      (n, files) uint32: CRC-32 of each clip's record in each file above
               meta.json    what they were made from, shapes, unreadable clips; written last

KEY is a hash of everything the features depend on (``facts``). A folder without ``meta.json`` is
incomplete. The process that writes it holds a lock (``lock.py``); another process that needs the
same features waits for it. Records are written by plain writes, since a full disk kills a process
that writes to a mapping, and they are flushed to disk before ``meta.json`` is written. Reading maps
the files, so that only the clips of a batch are copied.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bat.data.bad_clips import BadClips
from bat.data.tar import write_atomic
from bat.errors import UserError
from bat.eval.encoding import clips_first
from bat.lock import LOCK, hold
from bat.types import Features, WaveBatch

log = logging.getLogger("bat")

FORMAT = 1
META, CLIPS, CRC = "meta.json", "clips.bin", "crc.bin"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KEY = re.compile("[0-9a-f]{20}")
CHECK_BYTES = 256_000_000
"""Bytes verified against their checksums when a cache is opened; all of a smaller cache."""
WAIT_SECONDS = 1.0
"""Seconds between checks if another process is done."""


class Damaged(Exception):  # noqa: N818
    """Raised for a damaged cache; its text names the damage."""


class Stored(NamedTuple):
    """An open cache of n clips."""

    tensors: dict[str, Tensor]
    """Tensors by name in ``Features``, clips first: mapped from disk, read-only."""
    places: np.ndarray
    """Position of each clip among those asked for, (n,) int64."""
    lengths: Tensor
    """Lengths in samples, (n,) int64."""
    bad_clips: dict[str, Any]
    """``BadClips.state_dict()`` of the clips that could not be read."""


def folder_for(root: Path, facts: dict[str, Any]) -> Path:
    """Returns the folder below ``root`` of features made from ``facts`` (JSON values)."""
    text = json.dumps([FORMAT, facts], sort_keys=True)
    return root / hashlib.sha256(text.encode()).hexdigest()[:20]


def read(folder: Path, facts: dict[str, Any], *, again: bool = False) -> Stored | None:
    """Returns the features in ``folder``; None if there are none.

    None also if they are damaged, which is warned of once (not with ``again``).
    """
    try:
        return _opened(folder, facts)
    except (Damaged, OSError) as error:
        if not again:
            log.warning("the features in %s are made anew: %s", folder, error)
        return None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the lock of ``folder``, created if missing; waits while another process holds it.

    Raises ``UserError`` if it cannot be written to.
    """
    said = False
    with ExitStack() as stack:
        while True:
            try:
                with _told(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(hold(folder))
                break
            except UserError as error:
                cause = error.__cause__
                gone = isinstance(cause, FileNotFoundError)  # swept between mkdir and lock
                held = isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EAGAIN)
                if not gone and not (held and os.access(folder, os.W_OK)):
                    with _told(folder):
                        raise cause or error from None
                if held and not said:
                    holder = str(error).partition(": ")[0].removeprefix("out=")
                    log.info("%s, which makes the features wanted here: waiting", holder)
                    said = True
            time.sleep(WAIT_SECONDS)
        yield


def write(
    folder: Path,
    facts: dict[str, Any],
    batches: Iterable[tuple[Features, Tensor, WaveBatch]],
    *,
    bad: BadClips,
) -> None:
    """Writes the features of ``batches`` to ``folder``, whose lock this process holds.

    ``bad`` is complete when ``batches`` end. After any error nothing is left behind. Raises
    ``UserError`` if the disk is full.
    """
    _clear(folder)
    shapes: dict[str, list[int]] = {}
    dtype = ""
    places: list[tuple[int, int]] = []
    sums: list[list[int]] = []
    try:
        with ExitStack() as stack:
            files: dict[str, BinaryIO] = {}

            def put(name: str, data: np.ndarray) -> None:
                with _told(folder):
                    if name not in files:
                        raw = (folder / name).open("wb", buffering=0)
                        files[name] = stack.enter_context(raw)
                    rest = data.reshape(-1).view(np.uint8).data
                    while rest:
                        rest = rest[files[name].write(rest) :]

            for features, _, batch in batches:
                rows: list[list[int]] = [[] for _ in batch.keys]
                for name, tensor in clips_first(features).items():
                    shapes[name], dtype = list(tensor.shape[1:]), str(tensor.dtype)[6:]
                    raw = tensor.cpu().contiguous().view(torch.uint8).numpy()
                    put(f"{name}.bin", raw)
                    for row, record in zip(rows, raw, strict=True):
                        row.append(zlib.crc32(record.data))
                sums += rows
                places += zip(batch.positions.tolist(), batch.lengths.tolist(), strict=True)
            small = {CLIPS: np.array(places, "<i8"), CRC: np.array(sums, "<u4")}
            for name, array in small.items():
                put(name, array)
            meta = {
                "format": FORMAT,
                "facts": facts,
                "clips": len(places),
                "dtype": dtype,
                "shapes": shapes,
                "crc32": {name: zlib.crc32(array.data) for name, array in small.items()},
                "bad_clips": bad.state_dict(),
                "made": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
            with _told(folder):
                for file in files.values():
                    os.fsync(file.fileno())
                write_atomic(folder / META, (json.dumps(meta, indent=1) + "\n").encode())
    except BaseException:
        _clear(folder)
        raise


def sweep(root: Path) -> None:
    """Removes incomplete folders below ``root`` that no process holds (their writers died)."""
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if not KEY.fullmatch(folder.name) or (folder / META).exists():
            continue
        with contextlib.suppress(UserError, OSError):  # held by another, or not ours
            with hold(folder):
                if not (folder / META).exists():
                    _clear(folder)
            folder.rmdir()  # kept if complete or just entered by another process


def bytes_in(root: Path) -> int:
    """Returns the bytes of all features below ``root``."""
    return sum(file.stat().st_size for file in root.glob("*/*.bin"))


def _opened(folder: Path, facts: dict[str, Any]) -> Stored | None:
    """Reads as ``read`` does, but raises ``Damaged`` or ``OSError``."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        made, found, clips = meta["format"], meta["facts"], int(meta["clips"])
        crc32, bad_clips, dtype = meta["crc32"], meta["bad_clips"], DTYPES[meta["dtype"]]
        shapes = {name: [int(n) for n in shape] for name, shape in meta["shapes"].items()}
        other = [name for name, value in facts.items() if found.get(name) != value]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{META} is damaged ({type(error).__name__}: {error})") from error
    if made != FORMAT:
        raise Damaged(f"they are of format {made}, this version of bat has format {FORMAT}")
    if other:
        raise Damaged(f"they were made from something else ({', '.join(other)})")
    record = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}  # bytes
    sizes = {f"{name}.bin": clips * size for name, size in record.items()}
    sizes |= {CLIPS: 16 * clips, CRC: 4 * clips * len(shapes)}
    for name, size in sizes.items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            has = "is missing" if there is None else f"has {there} bytes instead of {size}"
            raise Damaged(f"{name} {has}")
    small = {name: (folder / name).read_bytes() for name in (CLIPS, CRC)}
    for name, data in small.items():
        if zlib.crc32(data) != crc32[name]:
            raise Damaged(f"{name} is damaged (its checksum is another)")
    raw = {name: _mapped(folder / f"{name}.bin", (clips, size)) for name, size in record.items()}
    sums = np.frombuffer(small[CRC], "<u4").reshape(clips, len(shapes))
    checked = _check(raw, sums)
    log.info("features of %d clips in %s, checksums of %d right", clips, folder, checked)
    pairs = np.frombuffer(small[CLIPS], "<i8").reshape(clips, 2).copy()
    tensors = {
        name: (raw[name].view(dtype) if record[name] else torch.empty(0, dtype=dtype)).view(
            clips, *shape
        )
        for name, shape in shapes.items()
    }
    return Stored(tensors, pairs[:, 0], torch.from_numpy(pairs[:, 1]), bad_clips)


def _mapped(path: Path, shape: tuple[int, int]) -> Tensor:
    """Maps a file as (clips, bytes) uint8, read-only, so that it may be larger than memory."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    with warnings.catch_warnings():  # torch 2.11: "not writable"; features are never written to
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.memmap(path, np.uint8, "r", shape=shape))


def _check(raw: dict[str, Tensor], sums: np.ndarray) -> int:
    """Compares clips with their checksums (clips, files): all, or ``CHECK_BYTES`` of them, the
    first and the last with others drawn anew each time. Returns their number; raises
    ``Damaged``."""
    clips = len(sums)
    size = sum(tensor.shape[1] for tensor in raw.values())
    rows = np.arange(clips)
    if clips * size > CHECK_BYTES:
        drawn = np.random.default_rng().permutation(clips)[: max(1, CHECK_BYTES // size)]
        rows = np.unique([0, clips - 1, *drawn])
    for row in rows.tolist():
        for wanted, (name, tensor) in zip(sums[row], raw.items(), strict=True):
            if zlib.crc32(tensor[row].numpy().data) != wanted:
                raise Damaged(f"{name}.bin is damaged at clip {row} (its checksum is another)")
    return len(rows)


def _clear(folder: Path) -> None:
    """Removes the files of ``folder``, ``meta.json`` first; readers keep what they have mapped."""
    (folder / META).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != LOCK and path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turns errors of the file system into a ``UserError`` with a remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "the disk is full" if full else "nothing can be written there"
        raise UserError(
            f"features.folder={folder.parent}: {what} ({error.strerror or error}). "
            + ("Make room, point" if full else "Point")
            + " features.folder to another disk, or say features.cache=off"
        ) from error
