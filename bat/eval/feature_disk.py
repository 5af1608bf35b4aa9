"""Stores frozen features on disk: raw files that are memory-mapped, and a JSON file with checksums.

    FOLDER/KEY/patches.bin  (n, L', T, F, D)   cls.bin  entry.bin  pieces.bin   likewise
               meta.json    shapes, type, unreadable clips; of each clip its place among those asked
                            for, its samples, and the CRC-32 of these and its records
    FOLDER/KEY.part         the same while it is written; renamed when it is whole
    FOLDER/KEY.lock         held by the process that writes it; others wait for it

KEY is a hash of everything the features depend on. Reading maps the files, so that only the clips
of a batch are copied.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from bat.data.bad_clips import BadClips
from bat.errors import UserError
from bat.eval.encoding import clips_first
from bat.types import Features, WaveBatch

log = logging.getLogger("bat")

FORMAT = 2
META = "meta.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHECK_BYTES = 256_000_000
"""Bytes verified against their checksums when a cache is opened; all of a smaller cache."""


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


def read(folder: Path) -> Stored | None:
    """Returns the features in ``folder``; None if there are none.

    Damaged features are removed, with a warning.
    """
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        dtype, clips = DTYPES[meta["dtype"]], np.array(meta["clips"], np.int64).reshape(-1, 3)
        raw = {}
        for name, shape in meta["shapes"].items():
            size = math.prod(shape) * dtype.itemsize
            raw[name] = _mapped(folder / f"{name}.bin", (len(clips), size))
        checked = _check(raw, clips)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the features in %s are damaged and made anew: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)  # readers keep what they have mapped
        return None
    log.info("features of %d clips in %s, checksums of %d right", len(clips), folder, checked)
    tensors = {
        name: (raw[name].view(dtype) if math.prod(shape) else torch.empty(0, dtype=dtype)).view(
            len(clips), *shape
        )
        for name, shape in meta["shapes"].items()
    }
    return Stored(tensors, clips[:, 0], torch.from_numpy(clips[:, 1]), meta["bad_clips"])


def write(
    folder: Path, batches: Iterable[tuple[Features, Tensor, WaveBatch]], *, bad: BadClips
) -> None:
    """Writes the features of ``batches`` to ``folder``, whose lock this process holds.

    ``bad`` is complete when ``batches`` end. After any error nothing is left behind. Raises
    ``UserError`` if the disk is full.
    """
    part = _part(folder)
    shutil.rmtree(part, ignore_errors=True)
    meta: dict[str, Any] = {"shapes": {}, "dtype": "", "clips": []}
    files: dict[str, BinaryIO] = {}
    try:
        for features, _, batch in batches:
            with _disk_errors(folder):
                part.mkdir(exist_ok=True)
                clips = [*zip(batch.positions.tolist(), batch.lengths.tolist(), strict=True)]
                sums = [_checksum(place, length) for place, length in clips]
                for name, tensor in clips_first(features).items():
                    if name not in files:
                        files[name] = (part / f"{name}.bin").open("wb")
                        meta["shapes"][name] = list(tensor.shape[1:])
                        meta["dtype"] = str(tensor.dtype).removeprefix("torch.")
                    # by plain writes: a full disk kills a process that writes to a mapping
                    for row, record in enumerate(tensor.cpu().contiguous()):
                        data = record.view(torch.uint8).numpy().tobytes()
                        files[name].write(data)
                        sums[row] = zlib.crc32(data, sums[row])
                meta["clips"] += [[*clip, crc] for clip, crc in zip(clips, sums, strict=True)]
        with _disk_errors(folder):
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            meta["bad_clips"] = bad.state_dict()
            (part / META).write_text(json.dumps(meta) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    finally:
        for file in files.values():
            with suppress(OSError):  # of a full disk, said before
                file.close()
        shutil.rmtree(part, ignore_errors=True)  # renamed if whole


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the lock of ``folder``; waits while another process holds it.

    Raises ``UserError`` if it cannot be written to.
    """
    lock = _lock(folder)
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process makes the features in %s: waiting for it", folder)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sweep(root: Path) -> None:
    """Removes what processes that died have left below ``root``."""
    for part in root.glob("*.part"):
        with suppress(Timeout), _lock(part.with_suffix("")).acquire(timeout=0):
            shutil.rmtree(part, ignore_errors=True)


def _part(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.part")


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f"{folder.name}.lock"))


def _checksum(place: int, length: int) -> int:
    """Returns the CRC-32 of a clip's place and samples, from which that of its records goes on."""
    return zlib.crc32(f"{place} {length}".encode())


def _mapped(path: Path, shape: tuple[int, int]) -> Tensor:
    """Maps a file as (clips, bytes) uint8, read-only, so that it may be larger than memory."""
    if path.stat().st_size != math.prod(shape):
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {math.prod(shape)}")
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    with warnings.catch_warnings():  # torch 2.11: "not writable"; features are never written to
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.memmap(path, np.uint8, "r", shape=shape))


def _check(raw: dict[str, Tensor], clips: np.ndarray) -> int:
    """Compares clips (n, 3) with their checksums: all, or ``CHECK_BYTES`` of them, the first and
    the last with others drawn anew each time. Returns their number; raises ``ValueError``."""
    size = sum(tensor.shape[1] for tensor in raw.values())
    rows = np.arange(len(clips))
    if len(clips) * size > CHECK_BYTES:
        drawn = np.random.default_rng().permutation(rows)[: max(1, CHECK_BYTES // size)]
        rows = np.unique([0, len(clips) - 1, *drawn])
    for row in rows.tolist():
        place, length, wanted = clips[row].tolist()
        crc = _checksum(place, length)
        for tensor in raw.values():
            crc = zlib.crc32(tensor[row].numpy().data, crc)
        if crc != wanted:
            raise ValueError(f"clip {row} has another checksum")
    return len(rows)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns errors of the file system into a ``UserError`` with a remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "the disk is full" if full else "nothing can be written there"
        raise UserError(
            f"features.folder={folder.parent}: {what} ({error.strerror or error}). Make room, "
            "point features.folder to another disk, or say features.cache=off"
        ) from error
