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

import importlib.util
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from bat.errors import UserError
from bat.interfaces.parts import Parts, open_csv

NAMES_AT_ONCE = 4096


class Rows(NamedTuple):
    """Output rows of a part."""

    recording: NDArray[np.int64]  # (R,)
    start: NDArray[np.float64]  # (R,)
    end: NDArray[np.float64]  # (R,)
    embedding: NDArray[np.float32]  # (R, ...)


def check_format(out: str | Path) -> None:
    """Raises ``UserError`` for an ``out`` with an unknown suffix, or if pyarrow is missing."""
    suffix = Path(out).suffix
    if suffix and suffix not in WRITERS:
        raise UserError(
            f"--out {out}: known are {', '.join(WRITERS)}, or a name without suffix: a folder"
        )
    if suffix and Path(out).is_dir():
        raise UserError(f"--out {out} is a folder: its name must have no suffix")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"--out {out} needs pyarrow: pip install 'bat-audio[parquet]'")


def write_table(compute: Any, parts: Parts, path: Path) -> None:
    """Writes embeddings (of an ``Embedder``) in the format that the settings name."""
    hop_seconds = compute.backbone.hop_seconds if compute.level == "frame" else None
    kind = parts.job.settings["format"]
    if kind == "folder":
        _folder(parts, path)
    else:
        WRITERS[kind](parts, path, hop_seconds)


def rows_of(parts: Parts, hop_seconds: float | None) -> Iterator[Rows]:
    """Yields the output rows of each part; without ``hop_seconds`` one a window."""
    windows = parts.job.windows
    for window, values in parts:
        start, end = windows.times(window)
        if hop_seconds is not None:
            nth = np.arange(len(window)) - np.searchsorted(window, window)  # patch of its window
            start = start + nth * hop_seconds
            end = np.minimum(start + hop_seconds, end)
        yield Rows(windows.recording(window), start, end, values)


def _parquet(parts: Parts, path: Path, hop_seconds: float | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for recording, start, end, values in rows_of(parts, hop_seconds):
            names = [parts.job.recordings.names[i] for i in recording.tolist()]
            columns: dict[str, Any] = {"path": names, "start": start, "end": end}
            one = values.ndim == 2
            for number, block in enumerate(np.moveaxis(values[:, None] if one else values, 1, 0)):
                flat = pa.array(np.ascontiguousarray(block).reshape(-1))
                made = pa.FixedSizeListArray.from_arrays(flat, block.shape[1])
                columns["embedding" if one else f"layer_{number + 1}"] = made
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _csv(parts: Parts, path: Path, hop_seconds: float | None) -> None:
    blocks = rows_of(parts, hop_seconds)
    first = next(blocks)
    each = [f"e{d}" for d in range(1, first.embedding.shape[-1] + 1)]
    if first.embedding.ndim == 3:
        each = [f"l{b}_{name}" for b in range(1, first.embedding.shape[1] + 1) for name in each]
    with open_csv(path, "path", "start", "end", *each) as table:
        for block in (first, *blocks):
            for i, start, end, values in zip(*block, strict=True):
                numbers = (f"{x:.9g}" for x in (start, end, *values.reshape(-1).tolist()))
                table.writerow((parts.job.recordings.names[i], *numbers))


def _npz(parts: Parts, path: Path, hop_seconds: float | None) -> None:
    names = parts.job.recordings.names
    text = f"U{max(map(len, names))}"
    paths = (
        np.array(names[at : at + NAMES_AT_ONCE], text) for at in range(0, len(names), NAMES_AT_ONCE)
    )
    total = sum(map(len, parts.windows()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, "path", paths, len(names))
        for name in Rows._fields:
            arrays = (getattr(rows, name) for rows in rows_of(parts, hop_seconds))
            _add(archive, name, arrays, total)


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
    totals = np.zeros(len(recordings.names), np.int64)
    for window in parts.windows():
        np.add.at(totals, windows.recording(window), 1)
    used: set[str] = set()
    last, name, row = -1, "", 0
    header = ("file", "path", "row", "rows", "start", "end")
    with open_csv(folder / "index.csv", *header) as table:
        for window, values in parts:
            own, at = np.unique(window, return_index=True)
            times = (t.tolist() for t in windows.times(own))
            of = windows.recording(own).tolist()
            for i, part, start, end in zip(of, np.split(values, at[1:]), *times, strict=True):
                if i != last:
                    last, row, key = i, 0, recordings.key(i)
                    name = key if len(key) <= 200 and key not in used else f"{key[-190:]}#{i}"
                    used.add(name)
                with (folder / f"{name}.npy").open("ab" if row else "wb") as file:
                    if not row:
                        _header(file, part, int(totals[i]))
                    file.write(np.ascontiguousarray(part).tobytes())
                place = (f"{name}.npy", recordings.names[i], row, len(part))
                table.writerow((*place, f"{start:.9g}", f"{end:.9g}"))
                row += len(part)


WRITERS: dict[str, Callable[[Parts, Path, float | None], None]] = {
    ".parquet": _parquet,
    ".npz": _npz,
    ".csv": _csv,
}
