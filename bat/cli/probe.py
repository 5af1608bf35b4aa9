"""bat-probe: train probes on a frozen encoder and say what they find, and where."""

from __future__ import annotations

import argparse
import sys

from bat.cli import args

ABOUT = "Probe a frozen encoder: linear, lcgp, cgp, protobin, cross-validated where data has folds."
EPILOG = """\
examples:
  bat-probe recipe=toy checkpoint=runs/pretrain-toy --method cgp,linear
  bat-probe recipe=esc10 checkpoint=RUN --method cgp,linear      data as RUN's config.yaml says
  bat-probe recipe=esc10 checkpoint=random:RUN data.root=DIR     the untrained control
  bat-probe recipe=as20k checkpoint=RUN data.shards=DIR hardware=gpu weights=teacher

checkpoint= a run, an export, a weight file (ours or the field's), or random[:RUN | :S].
key=value sets a value (see --print-config).
"""


def main(argv: list[str] | None = None) -> int:
    p = args.recipe_parser("probe", ABOUT, EPILOG)
    p.add_argument("--method", metavar="NAME[,NAME]", help="probes to train, as methods=[...]")
    p.add_argument("--seeds", type=int, metavar="N", help="trainings of each probe, as seeds=N")
    return args.run(_body, p, argv)


def _body(options: argparse.Namespace) -> None:
    from bat.config.schema import Probe

    extra = [] if options.method is None else [f"methods=[{options.method}]"]
    extra += [] if options.seeds is None else [f"seeds={options.seeds}"]
    words = {word.partition("=")[0] for word in options.settings}
    if "data.csv" in words and "recipe" not in words:
        extra.append("recipe=own")
    config = args.configure(options, Probe, "probe", extra)
    if config is None:
        return
    from bat.train.run_probe import probe

    probe(config, dry_run=options.dry_run, force=options.force)


if __name__ == "__main__":
    sys.exit(main())
