"""Writes embeddings as Parquet, NPZ, CSV or a folder of arrays, part after part.

A row is a window, or at frame level a time patch, of shape (D,), or (L, D) for all blocks:

``.parquet``  columns ``path``, ``start``, ``end`` (seconds) and ``embedding``, or ``layer_1`` ..
              ``layer_L``: lists of D float32
``.npz``      ``path`` (n,) of the recordings; ``recording`` (R,) index into it, ``start``, ``end``
              (R,), ``embedding`` (R, ...) float32
``.csv``      ``path,start,end,e1..eD`` (``l1_e1`` ..), numbers that read back to the same float32
a folder      ``KEY.npy`` (rows, ...) of each recording, and ``index.csv``: a line a window with its
              file, path, first row, rows, start and end
"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from bat.errors import UserError
from bat.interfaces.parts import Block, Parts

FORMATS = (".parquet", ".npz", ".csv")
NAMES_AT_ONCE = 4096


class Rows(NamedTuple):
    """Output rows of a part."""

    recording: NDArray[np.int64]  # (R,)
    start: NDArray[np.float64]  # (R,)
    end: NDArray[np.float64]  # (R,)
    values: NDArray[np.float32]  # (R, ...)


def writer_for(out: Path, *, hop_seconds: float | None) -> Callable[[Parts, Path], None]:
    """Returns the function that writes ``out``; ``hop_seconds`` of time patches at frame level.

    Raises ``UserError`` for an unknown suffix or if pyarrow is missing.
    """
    if not out.suffix:
        return lambda parts, path: _folder(parts, path)
    if out.suffix not in FORMATS:
        raise UserError(
            f"--out {out}: known are {', '.join(FORMATS)}, or a name without suffix: a folder"
        )
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: its name must have no suffix")
    if out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"--out {out} needs pyarrow: pip install 'bat-audio[parquet]'"
            ) from error
    write = {".parquet": _parquet, ".npz": _npz, ".csv": _csv}[out.suffix]
    return lambda parts, path: write(parts, path, hop_seconds)


def rows_of(parts: Parts, block: Block, hop_seconds: float | None) -> Rows:
    """Returns the output rows of a block; without ``hop_seconds`` one a window."""
    windows = parts.job.windows
    start, end = windows.times(block.rows)
    recording = windows.recording(block.rows)
    if hop_seconds is None:
        return Rows(recording, start, end, block.values)
    recording = np.repeat(recording, block.counts)
    start, end = np.repeat(start, block.counts), np.repeat(end, block.counts)
    first = np.repeat(np.cumsum(block.counts) - block.counts, block.counts)
    start = start + (np.arange(len(start)) - first) * hop_seconds
    return Rows(recording, start, np.minimum(start + hop_seconds, end), block.values)


def _parquet(parts: Parts, path: Path, hop_seconds: float | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for block in parts:
            rows = rows_of(parts, block, hop_seconds)
            columns: dict[str, Any] = {
                "path": pa.array([parts.job.recordings.name(i) for i in rows.recording.tolist()]),
                "start": pa.array(rows.start),
                "end": pa.array(rows.end),
            }
            blocks = rows.values[:, None] if rows.values.ndim == 2 else rows.values
            for number in range(blocks.shape[1]):
                name = "embedding" if rows.values.ndim == 2 else f"layer_{number + 1}"
                flat = pa.array(np.ascontiguousarray(blocks[:, number]).reshape(-1))
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, blocks.shape[2])
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _csv(parts: Parts, path: Path, hop_seconds: float | None) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        header = False
        for block in parts:
            rows = rows_of(parts, block, hop_seconds)
            if not header:
                D = rows.values.shape[-1]
                each = [f"e{d}" for d in range(1, D + 1)]
                if rows.values.ndim == 3:
                    blocks = range(1, rows.values.shape[1] + 1)
                    each = [f"l{block}_{name}" for block in blocks for name in each]
                writer.writerow(("path", "start", "end", *each))
                header = True
            for i, start, end, values in zip(*rows, strict=True):
                numbers = (f"{x:.9g}" for x in values.reshape(-1).tolist())
                name = parts.job.recordings.name(int(i))
                writer.writerow((name, f"{start:.9g}", f"{end:.9g}", *numbers))


def _npz(parts: Parts, path: Path, hop_seconds: float | None) -> None:
    total = sum(int(count.sum()) for _, count in parts.counts())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, "path", _names(parts), len(parts.job.recordings))
        for name in ("recording", "start", "end", "values"):
            arrays = (getattr(rows_of(parts, block, hop_seconds), name) for block in parts)
            _add(archive, "embedding" if name == "values" else name, arrays, total)


def _names(parts: Parts) -> Iterator[NDArray[np.str_]]:
    recordings = parts.job.recordings
    n = len(recordings)
    longest = max(len(recordings.name(i)) for i in range(n))
    for at in range(0, n, NAMES_AT_ONCE):
        names = [recordings.name(i) for i in range(at, min(at + NAMES_AT_ONCE, n))]
        yield np.array(names, f"U{longest}")


def _add(archive: zipfile.ZipFile, name: str, arrays: Iterator[NDArray[Any]], total: int) -> None:
    """Adds ``arrays``, of ``total`` rows together, as one array ``name``."""
    info = zipfile.ZipInfo(f"{name}.npy")  # its date is 1980: the same bytes each time
    with archive.open(info, "w", force_zip64=True) as file:
        for number, array in enumerate(arrays):
            if not number:
                _header(file, array, total)
            file.write(np.ascontiguousarray(array).tobytes())


def _header(file: Any, array: NDArray[Any], total: int) -> None:
    descr = npy.dtype_to_descr(array.dtype)
    shape = (total, *array.shape[1:])
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


def _folder(parts: Parts, folder: Path) -> None:
    """Writes ``KEY.npy`` of each recording, opened where its first window is."""
    recordings, windows = parts.job.recordings, parts.job.windows
    totals = np.zeros(len(recordings), np.int64)
    for rows, count in parts.counts():
        np.add.at(totals, windows.recording(rows), count)
    used: set[str] = set()
    last, name, row = -1, "", 0
    index = folder / "index.csv"
    with index.open("w", encoding="utf-8", errors="backslashreplace", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(("file", "path", "row", "rows", "start", "end"))
        for block in parts:
            of = windows.recording(block.rows).tolist()
            begin = (np.cumsum(block.counts) - block.counts).tolist()
            times = zip(*windows.times(block.rows), strict=True)
            for i, at, count, (start, end) in zip(
                of, begin, block.counts.tolist(), times, strict=True
            ):
                values = block.values[at : at + count]
                if i != last:
                    last, name, row = i, _file_name(recordings.key(i), i, used), 0
                with (folder / name).open("ab" if row else "wb") as file:
                    if not row:
                        _header(file, values, int(totals[i]))
                    file.write(np.ascontiguousarray(values).tobytes())
                path = recordings.name(i)
                writer.writerow((name, path, row, count, f"{start:.9g}", f"{end:.9g}"))
                row += count


def _file_name(key: str, i: int, used: set[str]) -> str:
    name = key if len(key) <= 200 and key not in used else f"{key[-190:]}#{i}"
    used.add(name)
    return f"{name}.npy"
