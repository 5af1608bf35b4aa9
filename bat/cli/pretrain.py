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

key=value sets a value (see --settings); model=S, hardware=ddp, objective=mae pick a fragment.
out= an existing run continues it.
"""


def main(argv: list[str] | None = None) -> int:
    p = args.recipe_parser("pretrain", ABOUT, EPILOG)
    p.add_argument(
        "--allow-pipe", action="store_true", help="run the commands of data.shards=pipe:COMMAND"
    )
    with args.Command(p, argv) as call:
        args.ready(call.options, "pretrain", [], allow_pipe=call.options.allow_pipe)()
    return call.code


if __name__ == "__main__":
    sys.exit(main())
