"""``bat-export``: writes an encoder in the format of another library."""

from __future__ import annotations

import sys

from bat.cli import args

ABOUT = "Write an encoder, with its head after fine-tuning, in the format of another library."
EPILOG = """\
formats:
{formats}

examples:
  bat-export hf runs/pretrain-toy bat-toy        AutoModel.from_pretrained("bat-toy", ...)
  bat-export onnx runs/finetune-toy/fold-1 toy   toy/model.onnx: waveform in, scores out

CHECKPOINT: a run, an export, a fold of a fine-tuning or a weight file. OUT: a new folder.
Guide: docs/interfaces.md.
"""


def main(argv: list[str] | None = None) -> int:
    from bat.interfaces import formats

    known = formats()
    width = max(map(len, known), default=0)
    lines = [f"  {name:<{width}}  {about}" for name, about in known.items()]
    p = args.parser("export", ABOUT, EPILOG.format(formats="\n".join(lines)))
    p.add_argument("format", metavar="FORMAT", help=", ".join(known))
    p.add_argument("checkpoint", metavar="CHECKPOINT")
    p.add_argument("out", metavar="OUT")
    with args.Command(p, argv) as call:
        from bat.interfaces import export

        options = call.options
        out = export(options.format, options.checkpoint, options.out)
        print(f"wrote {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
    return call.code


if __name__ == "__main__":
    sys.exit(main())
