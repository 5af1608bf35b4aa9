"""``bat runs``: a table of runs, a comparison, and the page of a training."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bat.cli import args as cli
from bat.errors import UserError

if TYPE_CHECKING:
    from bat.report.runs import Run

ABOUT = "All runs below a folder, what differs between some, and a page of one."
EPILOG = """\
examples:
  bat runs                                  all runs below runs/, a line each
  bat runs experiments --json
  bat runs compare runs/a runs/b            settings that differ; curves in compare.png (--out FILE)
  bat runs report runs/a                    one HTML page of a training, runs/a/report.html

state: running, interrupted (the same command continues it), failed (its train.log says why), done.
"""


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    what = given[0] if given[:1] in (["compare"], ["report"]) else ""
    p = cli.parser("runs", ABOUT, EPILOG)
    p.prog = f"bat runs {what}".strip()
    if what == "compare":
        p.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs")
        p.add_argument("--out", metavar="FILE", type=Path, default=Path("compare.png"), help=".png")
    elif what == "report":
        p.add_argument("run", metavar="RUN", type=Path, help="folder of a training")
        p.add_argument("--out", metavar="FILE", type=Path, help="the page (RUN/report.html)")
    else:
        p.usage = f"{p.prog} [FOLDER] [--json] | compare RUN RUN ... | report RUN"
        p.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path("runs"))
        p.add_argument("--json", action="store_true", help="a list of objects, for programs")
    with cli.Command(p, given[1:] if what else given) as call:
        from bat.report import runs
        from bat.report.tables import aligned

        args = call.options
        if what == "compare":
            some = [runs.Run(path) for path in args.runs]
            if args.out.suffix != ".png":
                raise UserError(f"--out {args.out}: a .png")
            print(aligned(runs.differences(some)))
            print(f"\npicture   {runs.compare(some, args.out)}")
        elif what == "report":
            print(f"page      {_page(runs.Run(args.run), args.out)}")
        else:
            facts = [run.facts() for run in runs.find_runs(args.folder)]
            if not facts and not args.json:
                raise UserError(f"there are no runs below {args.folder}: bat runs FOLDER")
            text = json.dumps(facts, indent=1) if args.json else None
            print(text or aligned(runs.table(facts, args.folder)))
    return call.code


def _page(run: Run, out: Path | None) -> Path:
    from bat import __version__
    from bat.cli.describe import SCHEMAS
    from bat.config.compose import from_yaml, words_of
    from bat.report.training import write_training_page

    if run.kind == "probe":
        raise UserError(f"{run.path} is a probe run: say bat-probe report {run.path}")
    try:
        config = from_yaml(SCHEMAS[run.kind], run.path / "config.yaml")
        words = words_of(config, run.kind)
    except UserError:  # of another version
        words = None
    said = (
        shlex.join(words) if words else f"recipe={run.config['recipe']}  # and the settings below"
    )
    used = run.summary.get("version")
    lines = [f"# bat {used}" if used else f"# not finished; this page is of bat {__version__}"]
    if data := run.summary.get("data"):
        lines.append(f"# data: {data if isinstance(data, str) else data.get('hash')}")
    return write_training_page(
        run, out or run.path / "report.html", [*lines, f"bat-{run.kind} {said}"]
    )


if __name__ == "__main__":
    sys.exit(main())
