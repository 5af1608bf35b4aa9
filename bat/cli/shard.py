"""``bat-shard``: a folder of audio, or a CSV, becomes shards with a manifest."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from bat.cli import args as cli
from bat.shapes import UserError

if TYPE_CHECKING:
    from bat.data.manifest import Manifest
    from bat.tasks.base import Row

ABOUT = "Write audio files as WebDataset shards (KEY.flac + KEY.json) with an index and a manifest."
EPILOG = """\
examples:
  bat-shard recordings/ shards/                      any folder; sub-folder names become labels
  bat-shard clips.csv shards/                        columns path, label or labels, fold, split
  bat-shard ESC-50/ shards/ --task esc50             a data set in its published layout
  bat-shard recordings/ shards/ --codec flac --sample-rate 16000
"""


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser("shard", ABOUT, EPILOG)
    p.add_argument("source", metavar="FOLDER|CSV", type=Path, help="where the audio is")
    p.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    p.add_argument(
        "--task", default="folder", metavar="NAME", help="how labels and folds are read (folder)"
    )
    p.add_argument(
        "--codec",
        default="keep",
        choices=("keep", "flac", "wav", "ogg"),
        help="keep the files' bytes, or encode them as mono (keep)",
    )
    p.add_argument("--sample-rate", type=int, metavar="HZ", help="resample to this (as it is)")
    p.add_argument(
        "--shard-mb", type=float, default=1000, metavar="N", help="largest shard, MB (1000)"
    )
    p.add_argument("--dry-run", action="store_true", help="say what would be written")
    return p


def body(args: argparse.Namespace) -> None:
    from bat.tasks.base import load_task

    if args.shard_mb <= 0:
        raise UserError(f"--shard-mb {args.shard_mb:g} must be positive")
    if args.sample_rate is not None and not 1000 <= args.sample_rate <= 768_000:
        raise UserError(f"--sample-rate {args.sample_rate}: in Hz, 1000 to 768000")
    task = load_task(args.task)
    rows, vocabulary = task.read(args.source)
    if args.task == "folder":
        for name in ("meta/esc50.csv", "meta.csv"):
            if (args.source / name).is_file():
                hint = f"{args.source / name} exists: --task esc50 or esc10 reads labels from it"
                print(f"bat-shard: note: {hint}", file=sys.stderr)
                break
    if args.dry_run:
        _describe(rows, vocabulary)
        print(f"dry run: nothing was written to {args.out}")
        return

    from bat.data.manifest import Manifest
    from bat.data.shards import write_shards

    complete = Manifest.load(args.out) is not None
    manifest = write_shards(
        rows,
        args.out,
        codec=args.codec,
        sample_rate=args.sample_rate,
        shard_bytes=round(args.shard_mb * 1e6),
        vocabulary=vocabulary,
        progress=True,
    )
    if complete:
        print(f"{args.out} was complete already: nothing written")
    _report(manifest, rows, args.out)


def _labels(rows: list[Row], vocabulary: list[str]) -> str:
    count = Counter(label for row in rows for label in row.labels)
    if not count:
        return "none (fine for pre-training)"
    shown = ", ".join(f"{name} {n}" for name, n in count.most_common(5))
    return f"{len(vocabulary)} classes ({shown}{', ...' if len(count) > 5 else ''})"


def _describe(rows: list[Row], vocabulary: list[str]) -> None:
    sizes = [row.path.stat().st_size for row in rows if row.path.is_file()]
    suffixes = Counter(row.path.suffix[1:].lower() for row in rows)
    print(f"clips     {len(rows)} ({', '.join(f'{n} {s}' for s, n in suffixes.most_common())})")
    print(f"size      {sum(sizes) / 1e6:.1f} MB" + _missing(len(rows) - len(sizes)))
    print(f"labels    {_labels(rows, vocabulary)}")
    folds = sorted({row.fold for row in rows if row.fold is not None})
    print(f"folds     {', '.join(map(str, folds)) or 'none'}")


def _missing(count: int) -> str:
    return f", {count} files missing" if count else ""


def _report(manifest: Manifest, rows: list[Row], out: Path) -> None:
    kinds = Counter(entry["reason"].split(":", 1)[0] for entry in manifest.left_out)
    why = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    absent = {entry["key"] for entry in manifest.left_out}
    rows = [row for row in rows if row.key not in absent]
    hours = manifest.seconds / 3600
    length = f"{hours:.1f} h" if hours >= 1 else f"{manifest.seconds:.1f} s"
    print(f"clips     {manifest.clips} ({length})")
    print(f"shards    {len(manifest.shards)} ({manifest.bytes / 1e6:.2f} MB) in {out}")
    print(f"labels    {_labels(rows, manifest.vocabulary)}")
    left = f"{len(manifest.left_out)} ({why}): listed in {out / 'manifest.json'}" if why else "0"
    print(f"left out  {left}")
    print(f"next      bat-pretrain recipe=as2m data.shards={out}")


def main(argv: list[str] | None = None) -> int:
    return cli.run(body, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
