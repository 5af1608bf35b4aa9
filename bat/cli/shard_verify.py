"""``bat-shard verify``: reads shards, reports problems and exits with 1 if any is serious."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bat.cli import args as cli
from bat.errors import UserError

ABOUT = "Read all shards again: hashes, every clip decoded, its JSON, twins among all clips."
EPILOG = """\
exit code: 0; 1 where a shard is not what its manifest says, a clip is corrupt or wrongly labelled
(silent, clipped and duplicate clips are reported only); 2 where nothing could be checked.
"""


def main(argv: list[str]) -> int:
    from bat.cli.shard import add_jobs

    p = cli.parser("shard verify", ABOUT, EPILOG)
    p.add_argument("shards", metavar="SHARDS", type=Path, help="a folder, a tar or a glob")
    p.add_argument("--json", metavar="FILE", type=Path, help="write all findings there")
    p.add_argument("--index-dir", metavar="DIR", type=Path, help="tables of read-only shards")
    add_jobs(p)
    fit = True

    def body(args: argparse.Namespace) -> None:
        nonlocal fit
        fit = _body(args)

    with cli.Command(p, argv) as call:
        body(call.options)
    return call.code or int(not fit)


def _body(args: argparse.Namespace) -> bool:
    from bat.data.tar import write_atomic
    from bat.shard.verify import verify

    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: {args.json.parent} is not a folder")
    report = verify(args.shards, index_dir=args.index_dir, jobs=args.jobs, progress=True)
    for line in report.text():
        print(line)
    print("verdict   " + ("fit for training" if report.ok else "not fit: see above"))
    if args.json is not None:
        try:
            write_atomic(args.json, report.json().encode())
        except OSError as error:
            raise UserError(f"--json {args.json} cannot be written: {error.strerror}") from error
        print(f"listed    {args.json}")
    return report.ok


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
