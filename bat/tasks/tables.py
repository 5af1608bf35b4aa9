"""Reads CSV files, for all tasks: lines with their numbers, values stripped, mistakes named."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from bat.errors import UserError
from bat.io import missing


def csv_cells(path: Path, *, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yields number and cells of each line of a CSV (the first is 1), values stripped.

    Empty lines are skipped. Cells of tables with other separators are split at ``delimiter``.

    Raises:
        UserError: no such file, not UTF-8 text, quotes that do not close.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder: name the CSV in it, or say task=folder data.root={path}"
        )
    if not path.is_file():
        raise UserError(f"{missing(path)}: name a CSV")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save the file as "
            "'CSV UTF-8'"
        ) from error
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        skipinitialspace=delimiter == ",",
        strict=True,
    )
    try:
        for raw in reader:
            cells = [cell.strip() for cell in raw]
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV ({error})") from error


def numbered_lines(
    path: Path, *, delimiter: str = ","
) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Returns the columns of a CSV, and its lines with their numbers (a header is line 1).

    Missing cells at the end of a line are empty.

    Raises:
        UserError: as ``csv_cells``, and for a line with more cells than the header.
    """
    cells = csv_cells(path, delimiter=delimiter)
    _, columns = next(cells, (0, []))
    lines = []
    for number, line in cells:
        if len(line) > len(columns):
            raise UserError(
                f"{path} line {number} has {len(line)} cells, the header has {len(columns)}: "
                'put a value that holds a comma between quotes ("a, b")'
            )
        filled = [*line, *[""] * (len(columns) - len(line))]
        lines.append((number, dict(zip(columns, filled, strict=True))))
    return columns, lines


def read_csv(path: Path, required: Iterable[str]) -> list[dict[str, str]]:
    """Reads the lines of a CSV with a header.

    Raises:
        UserError: as ``numbered_lines``, and where a column of ``required`` is missing.
    """
    columns, lines = numbered_lines(path)
    missing = [c for c in required if c not in columns]
    if missing:
        raise UserError(
            f"{path} lacks column {missing[0]!r}; it has: {', '.join(columns) or 'nothing'}"
        )
    return [cells for _, cells in lines]


def whole_number(value: str, *, column: str, path: Path) -> int:
    """Converts ``value`` to an int; raises a UserError that names the file and the column."""
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{path}: {column} {value!r} is not a whole number") from None
