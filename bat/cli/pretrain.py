"""``bat-pretrain``: pre-trains an encoder without labels."""

from __future__ import annotations

import sys

from bat.cli import args

ABOUT = "Pre-train an encoder: masked latent regression with an EMA teacher, or another objective."
EPILOG = """\
examples:
  bat-pretrain recipe=toy                              ten synthetic clips, a minute on two cores
  bat-pretrain data.root=recordings/                   your own audio, any folder, no labels; model,
                                                       batch and steps are proposed
  bat-pretrain data.root=recordings/ init=CHECKPOINT   the same, from weights (run, export, file)
  bat-pretrain recipe=esc10 data.root=DIR              audio/*.ogg + meta.csv
  bat-pretrain recipe=as2m data.shards=DIR hardware=ddp
  bat-pretrain recipe=as2m data.shards=DIR model=S train.steps=100000 out=runs/s
  bat-pretrain recipe=as2m --plan --on h100x8          time, memory and data rates, on paper

key=value sets a value (see --settings); model=S, hardware=ddp, objective=mae pick a fragment.
out= an existing run continues it.
"""


def main(argv: list[str] | None = None) -> int:
    p = args.recipe_parser("pretrain", ABOUT, EPILOG)
    p.add_argument(
        "--allow-pipe", action="store_true", help="run the commands of data.shards=pipe:COMMAND"
    )
    p.add_argument(
        "--plan", action="store_true", help="estimate time, memory and data rates, and stop"
    )
    p.add_argument(
        "--on", metavar="DEVICE[xN[xNODES]]", help="hardware of --plan: h100x8, a100x8x4, cpu"
    )
    p.add_argument(
        "--assume", action="append", default=[], metavar="NAME=VALUE",
        help="for --plan, several: mfu, tflops, loader, clip_kb, network, link, store, overhead",
    )  # fmt: skip
    with args.Command(p, argv) as call:
        if call.options.plan:
            from bat import api
            from bat.train.plan import plan

            config = api.settle("pretrain", call.options.settings, check=False)
            print(plan(config, call.options.on, call.options.assume))
            return 0
        if call.options.on or call.options.assume:
            p.error("--on and --assume are for --plan")
        args.ready(call.options, "pretrain", [], allow_pipe=call.options.allow_pipe)()
    return call.code


if __name__ == "__main__":
    sys.exit(main())
