"""``bat debug``: finds the first tensor that is not finite in a step that a run has kept."""

from __future__ import annotations

import sys
from pathlib import Path

from bat.cli import args as cli

ABOUT = "Replay a step whose loss was not finite and name the first tensor that is not finite."
EPILOG = """\
examples:
  bat debug runs/a/nan/27                   runs/a/fold-1/nan/27 of a fine-tuning

Runs keep the first such steps (health.keep_nan); the log and `bat runs report` name them.
"""


def main(argv: list[str] | None = None) -> int:
    p = cli.parser("debug", ABOUT, EPILOG)
    p.prog = "bat debug"
    p.add_argument("step", metavar="STEP", type=Path, help="folder RUN/nan/STEP")
    with cli.Command(p, argv) as call:
        from bat.logs import start_logging
        from bat.train.nan_replay import replay

        start_logging()
        print("\n".join(replay(call.options.step).lines()))
    return call.code


if __name__ == "__main__":
    sys.exit(main())
