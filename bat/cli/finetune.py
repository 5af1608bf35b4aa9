"""``bat-finetune``: trains an encoder and a classifier on labels, one fold after another."""

from __future__ import annotations

import sys

from bat.cli import args

ABOUT = "Fine-tune an encoder on a labelled task, cross-validated where the data has folds."
EPILOG = """\
examples:
  bat-finetune recipe=toy checkpoint=runs/pretrain-toy
  bat-finetune recipe=esc10 checkpoint=RUN                       data as RUN's config.yaml says
  bat-finetune recipe=esc10 checkpoint=random:RUN data.root=DIR  from scratch: the baseline
  bat-finetune data.csv=labels.csv checkpoint=RUN                audio and labels of your own
  bat-finetune recipe=as20k checkpoint=RUN data.shards=DIR hardware=ddp

checkpoint= a run, an export, a weight file (ours or the field's), hf:FOLDER_OR_NAME (of
transformers), or random[:RUN | :S].
key=value sets a value (see --settings); out= an existing run continues it.
"""


def main(argv: list[str] | None = None) -> int:
    p = args.recipe_parser("finetune", ABOUT, EPILOG)
    args.add_trust(p)
    with args.Command(p, argv) as call:
        args.ready(call.options, "finetune", args.trust(call.options))()
    return call.code


if __name__ == "__main__":
    sys.exit(main())
