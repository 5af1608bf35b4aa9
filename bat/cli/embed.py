"""``bat-embed``: embeds audio with a frozen encoder."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from bat.cli import args as cli
from bat.cli.parts import add_parts, spread

ABOUT = """\
Embed audio with a frozen encoder: a vector a clip, a window, or a time patch. The same command
continues an interrupted one; what cannot be read is listed in OUT.skipped.csv."""
EPILOG = """\
examples:
  bat-embed recordings/ --checkpoint RUN --out embeddings.parquet
  bat-embed clips.csv more/*.wav --checkpoint RUN --out embeddings.npz --pool mean --layer all
  bat-embed shards/ --checkpoint beats.pt --out frames/ --level frame --window 10 --hop 5
  bat-embed clips/ --checkpoint RUN --out e.csv --layer gate --head PROBE/heads/RUN/cgp-1-0
  torchrun --nproc-per-node 8 -m bat.cli.embed clips/ --checkpoint RUN --out embeddings.parquet
  bat-embed s3://bucket/shards --checkpoint RUN --out s3://bucket/embeddings --part 3/64

PATHS: audio files, folders (recursive), CSVs with a column path, shards (tars). --out: .parquet,
.npz, .csv, or a folder: one .npy a recording (docs/embed.md). A recording that is longer than the
encoder takes at once is cut into windows, each with its start and end.
"""


def main(argv: list[str] | None = None) -> int:
    p = cli.parser("embed", ABOUT, EPILOG)
    p.add_argument("paths", metavar="PATH", nargs="+", help="files, folders, CSVs, shards")
    p.add_argument("--checkpoint", required=True, help="a run, an export or a weight file")
    p.add_argument("--out", required=True, metavar="FILE|DIR", help=".parquet, .npz, .csv, folder")
    p.add_argument("--weights", choices=("student", "teacher"), default="student")
    p.add_argument("--level", choices=("clip", "frame"), default="clip", help="(clip)")
    p.add_argument("--layer", default="last", metavar="last|all|N|gate", help="blocks (last)")
    p.add_argument("--pool", choices=("cls", "mean", "cgp"), help="(cls where there is one)")
    p.add_argument("--head", metavar="HEAD", help="of a probe run, for --layer gate, --pool cgp")
    add_reading(p)
    with cli.Command(p, argv) as call:
        from bat.logs import start_logging

        start_logging()
        options = call.options
        gpu = not options.device.startswith("cpu")
        spread(options, "bat.cli.embed:_embed", cpus=max(1, options.workers), gpu=gpu)
        _embed(options)
    return call.code


def _embed(options: argparse.Namespace) -> None:
    from bat.interfaces.embed import embed_files

    embed_files(**reading(options))


def reading(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of ``embed_files`` or ``predict_files``."""
    given = {k: v for k, v in vars(options).items() if k not in ("debug", "on", "parts", "join")}
    return {**given, "join_only": options.join}


def add_reading(p: argparse.ArgumentParser) -> None:
    """Adds the flags that ``bat-embed`` and ``bat-predict`` share."""
    p.add_argument("--window", metavar="SECONDS|whole", help="(the longest that the model takes)")
    p.add_argument("--hop", type=float, metavar="SECONDS", help="from window to window (window)")
    p.add_argument("--batch", type=int, default=32, metavar="N", help="windows at once (32)")
    p.add_argument("--workers", type=int, default=2, metavar="N", help="decoding processes (2)")
    p.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="(auto)")
    p.add_argument("--bf16", action="store_true", help="compute in bfloat16 (float32)")
    add_parts(p)


if __name__ == "__main__":
    sys.exit(main())
