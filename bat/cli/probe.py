"""``bat-probe``: trains probes on frozen encoders and reports their results.

``bat-probe report`` is a subcommand (``probe_report.py``).
"""

from __future__ import annotations

import sys

from bat.cli import args
from bat.errors import UserError

ABOUT = """\
Probe frozen encoders: many probes, seeds and encoders under one protocol, cross-validated where
the data has folds."""
EPILOG = """\
examples:
  bat-probe recipe=toy checkpoint=runs/pretrain-toy --method cgp,linear
  bat-probe recipe=esc10 checkpoint=RUN --method cgp,linear      data as RUN's config.yaml says
  bat-probe recipe=esc10 checkpoint=A,B,random --method all --seeds 5     one comparison; random:
                                                     the same architecture untrained: the baseline
  bat-probe data.csv=labels.csv checkpoint=RUN --method cgp      audio of your own: columns path,
                            label or labels; split or fold; onset, offset (with level=frame)
  bat-probe recipe=esc10 checkpoint=RUN protocol=bat             the paper's constants (or =unmute)
  bat-probe recipe=as20k checkpoint=RUN data.shards=DIR hardware=gpu weights=teacher

  bat-probe report RUN [RUN ...]                         one page and a table of finished probings

checkpoint= a run, an export, a weight file (ours or the field's), hf:FOLDER_OR_NAME (of
transformers), or random[:RUN | :S]; several with commas. The same command continues a probing; with
out= given, more methods, seeds or encoders are added to it.
key=value sets a value (see --settings and --print-config).
"""


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["report"]:
        from bat.cli.probe_report import main as report

        return report(given[1:])
    p = args.recipe_parser("probe", ABOUT, EPILOG)
    p.add_argument(
        "--method", metavar="NAME[,NAME]", help="probes to train, or all; as methods=[...]"
    )
    p.add_argument("--seeds", type=int, metavar="N", help="trainings of each probe, as seeds=N")
    args.add_trust(p)
    with args.Command(p, argv) as call:
        from bat.registry import known

        options, extra = call.options, args.trust(call.options)
        if several := [word for word in options.settings if word in known("probes")]:
            methods = ",".join([options.method or "", *several]).strip(",")
            raise UserError(f"several methods are joined by commas: --method {methods}")
        extra += [] if options.method is None else [f"methods=[{options.method}]"]
        extra += [] if options.seeds is None else [f"seeds={options.seeds}"]
        args.ready(options, "probe", extra)()
    return call.code


if __name__ == "__main__":
    sys.exit(main())
