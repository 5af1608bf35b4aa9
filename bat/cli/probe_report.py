"""``bat-probe report``: writes an HTML page and a Markdown table of probe runs."""

from __future__ import annotations

import argparse
import sys

from bat.cli import args as cli

ABOUT = "Runs of bat-probe side by side: one self-contained HTML page and a table for a paper."
EPILOG = """\
examples:
  bat-probe report runs/probe-esc10-A               writes report.html and report.md into it
  bat-probe report runs/probe-esc10-A runs/probe-esc10-B --out compared

Runs of the same task are put side by side; other tasks get sections of their own.
"""


def main(argv: list[str]) -> int:
    p = cli.parser("probe report", ABOUT, EPILOG)
    p.add_argument("runs", metavar="RUN", nargs="+", help="folders of bat-probe runs (their out=)")
    p.add_argument(
        "--out",
        metavar="FOLDER",
        help="where the report goes (the run's folder; probe-report for several runs)",
    )
    with cli.Command(p, argv) as call:
        body(call.options)
    return call.code


def body(args: argparse.Namespace) -> None:
    from bat.eval.report import report

    made = report(args.runs, out=args.out)
    print(made.text)
    print(f"\npage      {made.html}\ntable     {made.markdown}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
