"""``bat-shard``: converts data sets into shards with a manifest, or indexes them in place.

``bat-shard SOURCE OUT`` writes shards, ``bat-shard SHARDS`` indexes them in place, ``bat-shard
verify`` and ``bat-shard info`` read them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bat.cli import args as cli
from bat.cli.parts import add_parts, place, spread
from bat.errors import UserError
from bat.redact import printable
from bat.shard.pool import cores

if TYPE_CHECKING:
    from bat.shard.info import Summary
    from bat.shard.rows import Rows
    from bat.tasks.base import Row

ABOUT = "Write audio as WebDataset shards (KEY.flac + KEY.json) with an index and a manifest."
EPILOG = """\
examples:
  bat-shard recordings/ shards/                      any folder; sub-folder names become labels
  bat-shard clips.csv shards/                        columns path, label or labels, fold, split
  bat-shard URBAN-SED_v2.0.0/ shards/                a data set known by its published layout
  bat-shard FROGS/ shards/ --task my_tasks.FROGS     one that is not
  bat-shard audioset/ shards/ --codec flac --sample-rate 16000      its CSVs beside its clips
  bat-shard recordings/ shards/ --clip-seconds 10 --splits train=0.9,test=0.1
  bat-shard shards-of-others/                        index WebDataset shards where they lie
  bat-shard recordings/ s3://bucket/set --part 3/64  one of 64 parts, on any machine; --on ray: all
  bat-shard verify shards/                           read everything again, report what is wrong
  bat-shard info shards/                             totals as text, histograms as a picture

SOURCE: a folder of audio, a CSV, AudioSet's CSVs, EAT manifests (.tsv + .lbl), parquet, shards.
A source with splits is written as OUT/SPLIT/. A folder called verify or info: ./verify, ./info.
"""
VERIFY = "Read all shards again: hashes, every clip decoded, its JSON, duplicates among all clips."
VERIFY_EPILOG = """\
exit code: 0; 1 where a shard is not what its manifest says, a clip is corrupt or wrongly labelled
(silent, clipped and duplicate clips are reported only); 2 where nothing could be checked.
"""
INFO = "Totals, labels and their balance, lengths, sample rates, codecs, splits and folds."
INFO_EPILOG = (
    "Read from the tables beside the shards: `bat-shard SHARDS` makes them where there are none."
)
LARGE = 100_000
"""Number of clips from which the paper's pre-training (Base, 400,000 steps) is suggested."""
CODECS = ("keep", "flac", "opus", "wav", "ogg")


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["verify"]:
        return _verify(given[1:])
    if given[:1] == ["info"]:
        return _info(given[1:])
    with cli.Command(build_parser(), given) as call:
        from bat.logs import start_logging

        start_logging()
        if call.options.out is None:
            _index(call.options)
        else:
            _spread(call.options, "bat.cli.shard:_pack")
            _pack(call.options)
    return call.code


def _spread(options: argparse.Namespace, task: str) -> None:
    if options.on and getattr(options, "dry_run", False):
        raise UserError("--dry-run and --on: give one of them")
    if options.jobs is None:
        options.jobs = 1 if options.on else cores()
    spread(options, task, cpus=max(1, options.jobs))


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser("shard", ABOUT, EPILOG)
    p.usage = "bat-shard SOURCE OUT [options] | bat-shard SHARDS | bat-shard verify|info SHARDS"
    p.add_argument("source", metavar="SOURCE", type=Path, help="where the audio is")
    p.add_argument("out", metavar="OUT", type=place, nargs="?", help="folder or URL for the shards")
    p.add_argument("--task", metavar="NAME", help="the task that reads SOURCE (looks at its files)")
    p.add_argument(
        "--labels", metavar="FILE", type=Path, help="names the classes: CSV, ontology.json or text"
    )
    p.add_argument("--split", metavar="NAME", help="write this split alone")
    p.add_argument(
        "--codec",
        choices=CODECS,
        default="keep",
        help="keep the files' bytes, or encode them anew (keep)",
    )
    p.add_argument("--sample-rate", type=int, metavar="HZ", help="resample to this (as it is)")
    p.add_argument("--channels", choices=("mono", "keep"), help="(mono where a clip is encoded)")
    p.add_argument("--clip-seconds", type=float, metavar="S", help="cut longer recordings")
    p.add_argument(
        "--min-seconds", type=float, metavar="S", help="leave out what is shorter (half a clip)"
    )
    p.add_argument("--shard-mb", type=float, metavar="N", help="size of a shard, MB (1000)")
    p.add_argument("--folds", type=int, metavar="N", help="deal the clips into N folds")
    p.add_argument("--splits", metavar="NAME=PART,...", help="deal them: train=0.9,test=0.1")
    p.add_argument("--dry-run", action="store_true", help="say what would be written")
    _add_jobs(p)
    _add_index_dir(p)
    add_parts(p)
    return p


def _add_jobs(p: argparse.ArgumentParser) -> None:
    p.add_argument("--jobs", type=int, metavar="N", help="processes (cores; on Ray 1 a part)")


def _add_index_dir(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--index-dir", metavar="DIR", type=Path, help="in place: for the tables of read-only shards"
    )


def _note(text: str) -> None:
    print(f"bat-shard: note: {printable(text)}", file=sys.stderr)


def _asked(args: argparse.Namespace) -> list[str]:
    """Returns the given flags that change the output."""
    names = ("labels", "split", "codec", "sample_rate", "channels", "clip_seconds", "min_seconds",
             "shard_mb", "folds", "splits")  # fmt: skip
    given = [name for name in names if getattr(args, name) not in (None, "keep")]
    return [f"--{name.replace('_', '-')}" for name in given]


def _index(args: argparse.Namespace) -> None:
    from bat.shard.in_place import index_in_place
    from bat.shard.info import summarise
    from bat.shard.rows import detect
    from bat.tasks.labels import doubts

    flags = _asked(args) + [f"--{n}" for n in ("part", "join", "on", "parts") if getattr(args, n)]
    flags += ["--task"] * (args.task not in (None, "shards"))
    if flags or (args.source.exists() and detect(args.source) != "shards"):
        why = f"{flags[0]} needs it" if flags else f"{args.source} holds no .tar to index in place"
        raise UserError(f"give OUT, the folder for the shards: {why}")
    if args.dry_run:
        print("\n".join(summarise(args.source, index_dir=args.index_dir).text()))
        print("dry run: nothing was written")
        return
    jobs = cores() if args.jobs is None else args.jobs
    done = index_in_place(args.source, index_dir=args.index_dir, jobs=jobs, progress=True)
    for note in done.notes:
        _note(note)
    summary = summarise(args.source, index_dir=args.index_dir)
    for line in [*summary.text(), *(f"note      {doubt}" for doubt in doubts(summary.vocabulary))]:
        print(line)
    kept = done.shards - done.written
    print(f"indexed   {done.written} shards" + (f", {kept} were indexed already" if kept else ""))
    if done.unreadable:
        first = "{file}/{key}".format(**done.unreadable[0])
        kinds = _kinds(done.unreadable)
        print(f"damaged   {len(done.unreadable)} ({kinds}; the first: {first})")
    for path in done.manifests:
        print(f"manifest  {path}")
    cache = [f"data.cache={args.index_dir}"] if args.index_dir else []
    print(f"next      {next_command(summary, args.source, '', *cache)}")


def _pack(args: argparse.Namespace) -> None:
    from bat.data.manifest import Manifest
    from bat.data.store import Store
    from bat.shard.info import summarise
    from bat.shard.listing import NAME, write_listing
    from bat.shard.pack import Recipe
    from bat.shard.rows import open_rows
    from bat.shard.write import write_shards

    if args.index_dir is not None:
        raise UserError("--index-dir is for indexing in place: leave OUT away, or leave it away")
    megabytes = 1000 if args.shard_mb is None else args.shard_mb
    if not 0 < megabytes < 1e9 or args.jobs < 1:
        raise UserError(f"--shard-mb {megabytes:g} and --jobs {args.jobs} must be positive")
    options = {
        name: getattr(args, name)
        for name in ("codec", "sample_rate", "channels", "clip_seconds", "min_seconds")
    }
    Recipe(**options)  # checks them before anything is read
    args.out = Store(args.out).place  # a URL without a slash at its end
    found = open_rows(args.source, task=args.task, labels=args.labels, split=args.split)
    if found.kind == "shards" and not _asked(args):
        raise UserError(
            f"{args.source} holds shards already: `bat-shard {args.source}` indexes them in place; "
            f"to write them anew ask for a codec, rate, channels, cutting, size, folds or splits"
        )
    for note in found.notes:
        _note(note)
    folders = _folders(args, found)
    if args.dry_run:
        _describe(folders, found.vocabulary)
        print(f"dry run: nothing was written to {args.out}")
        return
    first, entries, incomplete = next(iter(folders)), [], False
    by_split = {_name(folder): folder for folder in folders}
    for folder, rows in folders.items():
        was_complete = Manifest.load(folder) is not None
        if len(folders) > 1:
            print(f"bat-shard: {folder}: {len(rows)} files", file=sys.stderr)
        manifest = write_shards(
            rows,
            folder,
            **options,
            shard_bytes=round(megabytes * 1e6),
            vocabulary=found.vocabulary,
            left_out=[  # the first folder also lists those of no folder
                e for e in found.left_out if by_split.get(e.split or "", first) == folder
            ],
            jobs=args.jobs,
            progress=args.progress,
            part=args.part,
            join_only=args.join,
        )
        if manifest is None:
            incomplete = True
            continue
        entries += manifest.left_out
        if was_complete:
            print(f"{folder} was complete already: nothing written")
    if incomplete:
        return
    summary = summarise(args.out)
    for line in summary.text():
        if not line.startswith("left out"):
            print(line + f" in {args.out}" * line.startswith("shards"))
    where = f"{args.out}/manifest.json" if args.out in folders else f"manifest.json of {args.out}/*"
    print(f"left out  {f'{len(entries)} ({_kinds(entries)}): listed in {where}' if entries else 0}")
    if args.clip_seconds is None and any(row.listed_seconds for row in found.rows):
        for line in write_listing(args.out, folders, found.left_out):
            print(f"listing   {line} ({args.out}/{NAME})")
    print(f"next      {next_command(summary, args.out, found.kind)}")


def _name(folder: Path | str) -> str:
    return str(folder).rpartition("/")[2]


def _folders(args: argparse.Namespace, found: Rows) -> dict[Path | str, list[Row]]:
    """Returns the rows of each output folder, with folds and splits assigned."""
    from bat.data.store import Store
    from bat.shard.assign import assign_folds, assign_splits

    rows = found.rows
    for flag, value in (("folds", args.folds), ("splits", args.splits)):
        if value is not None and any(getattr(row, flag[:-1]) is not None for row in rows):
            _note(f"--{flag} deals the clips anew: the {flag} of {args.source} are not kept")
    if args.splits is not None:
        rows = assign_splits(rows, parse_splits(args.splits))
    if args.folds is not None:
        rows = assign_folds(rows, args.folds)
    store = Store(args.out)
    if all(row.split is None for row in rows):
        below = next(iter(sorted(store.local.glob("*/*.tar"))), None) if store.local else None
        if below is not None:
            raise UserError(f"{args.out} holds shards in {below.parent.name}/: give another folder")
        return {store.place: rows}
    if any(name.endswith(".tar") for name in store.sizes()):
        raise UserError(f"{args.out} holds shards without splits: give another folder")
    folders: dict[Path | str, list[Row]] = {}
    for row in rows:
        folders.setdefault(store.place_of(row.split or "unsplit"), []).append(row)
    return folders


def parse_splits(text: str) -> dict[str, float]:
    """Parses ``train=0.9,test=0.1`` into a dict; the parts are checked elsewhere."""
    parts: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        try:
            part = float(value)
        except ValueError:
            raise UserError(
                f"--splits {text!r}: write NAME=PART,..., as train=0.9,test=0.1"
            ) from None
        if name.strip() in parts:
            raise UserError(f"--splits {text!r}: {name.strip()!r} is there twice")
        parts[name.strip()] = part
    return parts


def _describe(folders: dict[Path | str, list[Row]], vocabulary: list[str]) -> None:
    """Prints what would be written."""
    import numpy as np

    from bat.shard.info import balance

    rows = [row for some in folders.values() for row in some]
    paths = {row.path for row in rows if row.span is None and row.cell is None}
    sizes = [row.span[1] for row in rows if row.span is not None]
    sizes += [path.stat().st_size for path in paths if path.is_file()]
    absent = sum(not path.is_file() for path in paths)
    suffixes = Counter(row.suffix for row in rows)
    print(f"clips     {len(rows)} ({', '.join(f'{n} {s}' for s, n in suffixes.most_common())})")
    if sizes:
        print(f"size      {sum(sizes) / 1e6:.1f} MB" + (f", {absent} files missing" * (absent > 0)))
    count = Counter(label for row in rows for label in row.labels)
    print(f"labels    {len(vocabulary)} classes" if count else "labels    none")
    if count:
        print("\n".join(balance(vocabulary, np.array([count[name] for name in vocabulary]))))
    folds = Counter(row.fold for row in rows if row.fold is not None)
    print(f"folds     {', '.join(f'{k} {n}' for k, n in sorted(folds.items())) or 'none'}")
    if len(folders) > 1 or rows[0].split is not None:
        shown = ", ".join(f"{_name(folder)} {len(some)}" for folder, some in folders.items())
        print(f"splits    {shown}")


def _kinds(entries: Sequence[dict[str, str]]) -> str:
    kinds = Counter(entry["reason"].split(":", 1)[0] for entry in entries)
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())


def next_command(summary: Summary, shards: Path | str, kind: str, *more: str) -> str:
    """Returns the suggested pre-training of ``shards``: the paper's for a large set, else that of
    ESC-50 or ESC-10 (tiny, for two cores), with online probes if clips can be held out."""
    from bat.data.sources import TRAIN

    words = [f"recipe={kind if kind in ('esc10', 'esc50') else 'esc10'}"]
    if summary.clips >= LARGE:
        words = ["recipe=as2m"]
    elif words == ["recipe=esc10"] and kind != "esc10":
        words += ["task=folder"]
    splits = set(summary.splits)
    if splits and not splits & {*TRAIN}:
        words.append(f"data.split={'train-balanced' if 'train-balanced' in splits else 'all'}")
    can_hold_out = len(summary.folds) > 1 or {"train", "test"} <= splits
    is_labelled = (summary.label_counts > 0).sum() > 1
    if summary.clips < LARGE and not (is_labelled and (can_hold_out or not splits)):
        words += ["online.every=0"]
    return "bat-pretrain " + shlex.join([*words, f"data.shards={shards}", *more])


def _verify(argv: list[str]) -> int:
    """Reads shards, reports problems and returns 1 if any is serious."""
    p = cli.parser("shard verify", VERIFY, VERIFY_EPILOG)
    p.add_argument("shards", metavar="SHARDS", type=place, help="a folder, a URL, a tar or a glob")
    p.add_argument("--json", metavar="FILE", type=Path, help="write all findings there")
    _add_jobs(p)
    _add_index_dir(p)
    add_parts(p)
    is_fit: bool | None = True
    with cli.Command(p, argv) as call:
        from bat.logs import start_logging

        start_logging()
        args = call.options
        if args.json is not None and not args.json.parent.is_dir():
            raise UserError(f"--json {args.json}: {args.json.parent} is not a folder")
        if args.json is None and (args.part or args.join or args.on):
            raise UserError(
                "--part, --join, --on: give --json FILE; the parts' findings lie beside it"
            )
        _spread(args, "bat.cli.shard:_check")
        is_fit = _check(args)
    return call.code or int(is_fit is False)


def _check(args: argparse.Namespace) -> bool | None:
    """Verifies; returns True if the shards are fit for training, None if parts are missing."""
    from bat.io import write_atomic
    from bat.shard.verify import verify

    report = verify(
        args.shards,
        index_dir=args.index_dir,
        jobs=args.jobs,
        progress=args.progress,
        state=args.json.with_name(f"{args.json.name}.parts") if args.json else None,
        part=args.part,
        join_only=args.join,
    )
    if report is None:
        return None
    print("\n".join(report.text()))
    print("verdict   " + ("fit for training" if report.ok else "not fit: see above"))
    if args.json is not None:
        write_atomic(args.json, report.json().encode())
        print(f"listed    {args.json}")
    return report.ok


def _info(argv: list[str]) -> int:
    """Describes shards in text and draws their histograms."""
    p = cli.parser("shard info", INFO, INFO_EPILOG)
    p.add_argument("shards", metavar="SHARDS", type=place, help="a folder, a URL, a tar or a glob")
    p.add_argument("--plot", metavar="FILE", type=Path, help="the picture (SHARDS/info.png)")
    _add_index_dir(p)
    with cli.Command(p, argv) as call:
        from bat.report.data_plots import plot_data
        from bat.shard.info import summarise

        args = call.options
        if args.plot is None and not (isinstance(args.shards, Path) and args.shards.is_dir()):
            raise UserError("--plot FILE: say where the picture goes (SHARDS is not a folder)")
        plot = args.plot or args.shards / "info.png"
        if plot.suffix != ".png":
            raise UserError(f"--plot {plot}: a .png")
        summary = summarise(args.shards, index_dir=args.index_dir)
        print("\n".join(summary.text()))
        plot_data(
            plot,
            title=f"{_name(Path(args.shards).resolve())}: {summary.headline}",
            classes=dict(zip(summary.vocabulary, summary.label_counts.tolist(), strict=True)),
            seconds=summary.seconds,
            rates=summary.rates,
            codecs=summary.codecs,
            splits=summary.splits,
            folds=summary.folds,
            labels_per_clip=summary.labels_per_clip,
        )
        print(f"picture   {plot}")
    return call.code


if __name__ == "__main__":
    sys.exit(main())
