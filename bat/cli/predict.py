"""``bat-predict``: predicts with heads of bat-probe and bat-finetune."""

from __future__ import annotations

import argparse
import sys

from bat.cli import args as cli
from bat.cli.embed import add_reading, reading
from bat.cli.parts import spread

ABOUT = """\
Predict with a fine-tuned model or a probe: scores of its labels, events with onset and offset, or
text. The same command continues an interrupted one."""
EPILOG = """\
examples:
  bat-predict recordings/ --checkpoint FINETUNED/fold-1 --out scores.csv
  bat-predict clips.csv --checkpoint FINETUNED --average --out best.csv --top 3
  bat-predict long.flac --checkpoint PROBE/heads/ENCODER/cgp-1-0 --out scores.csv --average-windows
  bat-predict day.wav --checkpoint PROBE_OF_EVENTS --out events.csv --threshold 0.4 --median 5

PATHS: audio files, folders (recursive), CSVs with a column path, shards (tars). Windows are as long
as the clips that the head was trained on (docs/embed.md).
"""


def main(argv: list[str] | None = None) -> int:
    p = cli.parser("predict", ABOUT, EPILOG)
    p.add_argument("paths", metavar="PATH", nargs="+", help="files, folders, CSVs, shards")
    p.add_argument("--checkpoint", required=True, help="a run, a fold or a head")
    p.add_argument("--out", required=True, metavar="FILE.csv")
    p.add_argument("--average", action="store_true", help="mean scores of the run's folds")
    p.add_argument("--encoder", metavar="PATH", help="a probe's encoder, if it was moved")
    p.add_argument(
        "--answer", choices=("scores", "events", "text"), help="(as the head was trained)"
    )
    p.add_argument("--top", type=int, metavar="K", help="the K best labels, a line each (all)")
    p.add_argument("--threshold", type=float, metavar="P", help="of events (the task's, 0.5)")
    p.add_argument("--median", type=int, metavar="N", help="filter, time patches (the task's, 3)")
    p.add_argument("--average-windows", action="store_true", help="one line a recording")
    add_reading(p)
    with cli.Command(p, argv) as call:
        from bat.logs import start_logging

        start_logging()
        options = call.options
        gpu = not options.device.startswith("cpu")
        spread(options, "bat.cli.predict:_predict", cpus=max(1, options.workers), gpu=gpu)
        _predict(options)
    return call.code


def _predict(options: argparse.Namespace) -> None:
    from bat.interfaces.predict import predict_files

    predict_files(**reading(options))


if __name__ == "__main__":
    sys.exit(main())
