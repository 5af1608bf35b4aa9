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
        from bat.config.schema import Pretrain

        options = call.options
        options.settings += args.own_recipe(options, among=("data.root", "data.csv"))
        proposed = []
        from bat.config.compose import compose_early

        # before torch is imported, for the objective's settings
        if (early := compose_early(Pretrain, "pretrain", options.settings)) is not None:
            if not options.print_config:
                from bat.eval.run_folder import check_first

                check_first(early)
            if early.recipe == "own":
                from bat.logs import start_logging
                from bat.train.proposals import propose

                start_logging()
                proposed = propose(early, options.settings)
        config = args.configure(options, Pretrain, "pretrain", proposed)
        if config is None:
            return call.code
        from bat.data.pipes import allow_pipes
        from bat.train.run_pretrain import pretrain

        allow_pipes(options.allow_pipe)
        pretrain(config, dry_run=options.dry_run, force=options.force)
    return call.code


if __name__ == "__main__":
    sys.exit(main())
