"""Speed of bat against the plain way to do the same, both in one run.

    uv run python tools/bench.py masks cgp --json out.json

Parts (``tools/benchmarks/``): ``step``, ``changes`` (our step with one thing done the plain way),
``decoders`` (cheaper ones), ``attention`` (kernels), ``masks``, ``cgp``, ``laboratory`` (all probes
at once), ``frontend``, ``stream``, ``reliability`` (checkpoints, and what is watched).
Each case is timed alternately, *ours* and *plain*, after a warm-up; numbers are medians over the
repeats. *Plain* is an honest rendition of how the paper's implementation organises the work, held
by tests to the same numbers. Absolute times hang on the machine; the ratios are the result. Memory
is that of tensors, in MB of 1e6 bytes, above what lay there before (``stream``: resident, MiB).
``--json`` writes ``{device, versions, results: [{part, case, ours_ms, plain_ms, ratio,
ours_peak_mb, plain_peak_mb, ...}]}``, after every row. A case that fails becomes ``{part, case,
error}``; the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where bat is only checked out
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

PARTS = (
    *("step", "changes", "decoders", "attention", "masks", "cgp", "laboratory", "frontend"),
    *("stream", "reliability"),
)
PACKAGES = (
    "torch",
    "torchaudio",
    "flash-attn",
    "flash-attn-4",
    "lightning",
    "numpy",
    "soundfile",
    "soxr",
    "librosa",
    "webdataset",
)
WIDEST = 130
"""Characters of a table's line."""
TOLD = ("error", "refused", "note")
"""Sentences of a row: below the table."""


def device_name() -> str:
    """The GPU where there is one, else the CPU and its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = next(x.split(":", 1)[1].strip() for x in text.splitlines() if "model name" in x)
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one part as text: a line a case, or a column a case where lines grow too long."""
    columns = list(dict.fromkeys(c for row in rows for c in row if c not in ("part", *TOLD)))
    cells = [columns] + [[_cell(row.get(c)) for c in columns] for row in rows]
    lines = _lines(cells)
    if len(lines[0]) > WIDEST:
        lines = _lines([list(column) for column in zip(*cells, strict=True)])
    told = [f"{row['case']}: {key}: {row[key]}" for row in rows for key in TOLD if key in row]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *told])


def _lines(cells: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="of each case (7)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1")
    from benchmarks.timing import attempted

    device = device_name()
    print(f"{device}\n")
    report: dict[str, Any] = {"device": device, "versions": versions(), "results": []}
    for name in args.parts:
        part = importlib.import_module(f"benchmarks.{name}")
        measure = functools.partial(part.run, repeats=args.repeats, quick=args.quick)
        rows = []
        for row in attempted(f"{name}, outside its cases", measure):
            rows.append({"part": name, **row})
            report["results"].append(rows[-1])
            if args.json:  # after every row: what stops this program later loses nothing
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {part.ABOUT}\n\n{table(rows)}\n", flush=True)
    failed = [row["case"] for row in report["results"] if "error" in row]
    if failed:
        print(f"bench: error: failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
