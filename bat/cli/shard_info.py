"""``bat-shard info``: describes the contents of shards as text and as a plot."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bat.cli import args as cli
from bat.errors import UserError

ABOUT = "Totals, labels and their balance, lengths, sample rates, codecs, splits and folds."
EPILOG = (
    "Read from the tables beside the shards: `bat-shard SHARDS` makes them where there are none."
)


def main(argv: list[str]) -> int:
    p = cli.parser("shard info", ABOUT, EPILOG)
    p.add_argument("shards", metavar="SHARDS", type=Path, help="a folder, a tar or a glob")
    p.add_argument("--plot", metavar="FILE", type=Path, help="the picture (SHARDS/info.png)")
    p.add_argument("--index-dir", metavar="DIR", type=Path, help="tables of read-only shards")
    with cli.Command(p, argv) as call:
        body(call.options)
    return call.code


def body(args: argparse.Namespace) -> None:
    from bat.report.data_plots import plot_data
    from bat.shard.info import summarise

    plot = args.plot
    if plot is None:
        if not args.shards.is_dir():
            raise UserError("--plot FILE: say where the picture goes (SHARDS is not a folder)")
        plot = args.shards / "info.png"
    if plot.suffix != ".png":
        raise UserError(f"--plot {plot}: a .png")
    summary = summarise(args.shards, index_dir=args.index_dir)
    for line in [*summary.text(), *summary.histograms()]:
        print(line)
    try:
        plot_data(
            plot,
            title=f"{args.shards.resolve().name}: {summary.headline}",
            classes=dict(zip(summary.vocabulary, summary.label_counts.tolist(), strict=True)),
            seconds=summary.seconds,
            rates=summary.rates,
            codecs=summary.codecs,
            splits=summary.splits,
            folds=summary.folds,
            labels_per_clip=summary.labels_per_clip,
        )
    except OSError as error:
        raise UserError(f"{plot} cannot be written ({error.strerror}): give --plot FILE") from error
    print(f"\npicture   {plot}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
