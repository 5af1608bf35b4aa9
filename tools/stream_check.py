"""Is every clip seen exactly once an epoch, whoever reads, also over interruptions? And how fast?

    uv run python tools/stream_check.py                    # two million simulated clips
    uv run python tools/stream_check.py --audio DIR        # and really reading the shards in DIR

Simulated: 2,000 shards of 1,000 clips (sparse tars with real headers, real index files): start-up,
one epoch's order, resuming at clip 1,900,000; then loaders of 1, 2, 8 and 64 ranks with 0 to 16
worker processes each deliver clip numbers, are stopped on the way, and go on with another number
of ranks; each clip of the epoch is counted. With ``--audio``, the same is counted over the clips of
a folder of shards that were read, decoded and batched. Exits 1 where a count is not one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bat.data.index import Index, open_index
from bat.data.loader import as_it_is, worker_init
from bat.data.plan import Plan
from bat.data.stream import ClipDataset, Item, PlanSampler
from bat.data.table import CLIP, ShardTable

GLOBAL_BATCH = 192
PAIRS = [  # ranks and workers before the interruption, and after it
    ((1, 0), (1, 16)),
    ((1, 3), (2, 0)),
    ((2, 1), (8, 2)),
    ((2, 16), (1, 0)),
    ((8, 0), (64, 1)),
    ((8, 16), (8, 5)),
    ((64, 0), (2, 4)),
    ((64, 2), (64, 0)),
]


class Numbers(Dataset):
    """Delivers the clip numbers themselves."""

    def __getitems__(self, items: list[Item]) -> list[int]:
        return [clip for _, clip in items]

    def __getitem__(self, item: Item) -> list[int]:
        return self.__getitems__([item])


def as_list(batch: list[int]) -> list[int]:
    return batch


def delivered(
    plan: Plan, first: int, last: int, *, ranks: int, workers: int, make: Callable[[], Any]
) -> Iterator[Any]:
    """What loaders of ``ranks`` ranks deliver of global batches ``first .. last - 1``."""
    for rank in range(ranks):
        sampler = PlanSampler(
            plan,
            batch=GLOBAL_BATCH // ranks,
            batches=10 * last,  # more than are taken: loaders are broken off while they fetch
            rank=rank,
            world=ranks,
            batches_done=lambda: first,
        )
        dataset, collate = make()
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=worker_init,
        )
        yield from itertools.islice(loader, last - first)


def seen_once(
    plan: Plan,
    *,
    make: Callable[[], Any],
    pairs: Sequence[Any],
    count: Callable[[Any], list[int]],
) -> list[dict[str, Any]]:
    """Read one epoch in two parts, for each of ``pairs``; how often was each clip seen?"""
    rows = []
    batches = -(-len(plan) // GLOBAL_BATCH)  # the last reaches into the next epoch
    for (ranks, workers), (then_ranks, then_workers) in pairs:
        cut = max(1, batches * 2 // 5)
        seen = np.zeros(len(plan) + 1, np.int64)
        start = time.perf_counter()
        parts = ((0, cut, ranks, workers), (cut, batches, then_ranks, then_workers))
        for first, last, r, w in parts:
            for batch in delivered(plan, first, last, ranks=r, workers=w, make=make):
                np.add.at(seen, count(batch), 1)
        extra = batches * GLOBAL_BATCH - len(plan)
        next_epoch = plan.order(1)[:extra]
        seen[next_epoch] -= 1
        rows.append(
            {
                "ranks x workers": f"{ranks} x {workers}, then {then_ranks} x {then_workers}",
                "clips": len(plan),
                "once": int((seen[: len(plan)] == 1).sum()),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        print("  " + "  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def simulate(folder: Path, *, shards: int, clips: int) -> None:
    """Sparse tars with a real first, middle and last header, and a full index file each."""
    size = 320_000  # about a 10-s FLAC clip at 16 kHz
    step = 512 + -(-size // 512) * 512
    for n in range(shards):
        keys = [f"Y{n:05d}-{i:05d}" for i in range(clips)]
        table = np.zeros(clips, CLIP)
        table["offset"] = np.arange(clips) * step + 512
        table["size"], table["frames"], table["rate"], table["key"] = size, 160_000, 16_000, 12
        table["fold"], table["split"], table["labels"] = -1, -1, 2
        table["header"] = zlib.crc32(bytes(512))  # of a hole
        path = folder / f"shard-{n:05d}.tar"
        with path.open("wb") as file:
            for i in (0, clips // 2, clips - 1):
                info = tarfile.TarInfo(f"{keys[i]}.flac")
                info.size = size
                header = info.tobuf(tarfile.USTAR_FORMAT)
                table["header"][i] = zlib.crc32(header)
                file.seek(i * step)
                file.write(header)
            file.truncate(clips * step + 1024)
        labels = (np.arange(2 * clips, dtype=np.int32) * 7 + n) % 527
        ShardTable(
            tar_bytes=clips * step + 1024,
            clips=table,
            labels=labels,
            keys=np.frombuffer("".join(keys).encode(), np.uint8),
            names=[f"class {i}" for i in range(527)],
            ids=list(range(527)),
            mtime_ns=path.stat().st_mtime_ns,
        ).save(path.with_suffix(".idx.npz"))


def timed(
    what: str, limit_seconds: float, function: Callable[[], Any], report: dict[str, Any]
) -> Any:
    start = time.perf_counter()
    result = function()
    seconds = round(time.perf_counter() - start, 3)
    report[what] = {"seconds": seconds, "limit": limit_seconds}
    print(f"  {what}: {seconds} s (at most {limit_seconds:g})", flush=True)
    return result


def check_times(folder: Path, *, shards: int, clips: int) -> dict[str, Any]:
    report: dict[str, Any] = {}
    total = shards * clips
    simulate(folder, shards=shards, clips=clips)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = folder / "cache"
    index: Index = timed(
        f"start-up on {shards} shards, {total} clips",
        5,
        lambda: open_index(folder, cache=cache),
        report,
    )
    report["index, peak MB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"  index: at most {report['index, peak MB']:.0f} MB at its peak")
    index = timed("start-up again", 5, lambda: open_index(folder, cache=cache), report)
    timed("order of an epoch, exact", 2, lambda: Plan(total, seed=0).order(3), report)
    window = Plan(total, seed=0, window=8192, shard=index.shard)
    timed("order of an epoch, windows of 8192", 2, lambda: window.order(3), report)
    tenth = Plan(total, seed=0, weights=1 + np.arange(total) % 97, epoch_clips=total // 10)
    timed("order of an epoch, a tenth by weight", 2, lambda: tenth.order(3), report)

    def resume() -> list[Item]:
        again = open_index(folder, cache=cache)
        plan = Plan(len(again), seed=0)
        done = total * 95 // 100 // GLOBAL_BATCH
        sampler = PlanSampler(plan, batch=GLOBAL_BATCH, batches=1, batches_done=lambda: done)
        items = next(iter(sampler))
        for _, clip in items:
            again.read(clip)
        return items

    timed(f"resume at clip {total * 95 // 100}, first batch read", 10, resume, report)
    return report


def check_audio(folder: Path) -> list[dict[str, Any]]:
    """Counts how often each clip in the shards of ``folder`` is read in an epoch."""
    index = open_index(folder)
    number = {index.key(i): i for i in range(len(index))}
    shards = int(index.shard.max()) + 1
    print(f"{len(index)} clips in {shards} shards, read, decoded (1-s crops) and batched:")
    failures: Counter[str] = Counter()
    rows: Counter[str] = Counter()

    def make() -> tuple[ClipDataset, Any]:
        return ClipDataset(index, sample_rate=16_000, clip_seconds=1.0), as_it_is

    def count(batch: Any) -> list[int]:
        failures.update(clip.kind for clip in batch.skipped)
        assert batch.waves.shape[1] == 16_000
        rows["silent"] += int((batch.waves.abs().amax(1) == 0).sum())  # ESC pads with zeros
        rows["heard"] += len(batch.keys)
        return [number[key] for key in batch.keys]

    found = seen_once(Plan(len(index), seed=0), make=make, pairs=PAIRS, count=count)
    print(
        f"  unreadable: {dict(failures) or 'none'}; {rows['silent']} of {rows['heard']} rows silent"
    )
    assert rows["silent"] < rows["heard"] / 2, "decoding gives silence"
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--audio", type=Path, metavar="DIR", help="a folder of shards to read too")
    parser.add_argument("--shards", type=int, default=2_000, metavar="N", help="simulated (2000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    with tempfile.TemporaryDirectory(prefix="bat-stream-") as name:
        folder = Path(name)
        (folder / "simulated").mkdir()
        print("times:")
        times = check_times(folder / "simulated", shards=args.shards, clips=1_000)
        plan = Plan(args.shards * 1_000, seed=0)
        print(f"{len(plan)} simulated clips:")
        simulated = seen_once(
            plan, make=lambda: (Numbers(), as_list), pairs=PAIRS, count=lambda batch: batch
        )
        real = check_audio(args.audio) if args.audio else []
    if args.json:
        report = {"times": times, "simulated": simulated, "real": real}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    slow = [what for what, x in times.items() if isinstance(x, dict) and x["seconds"] > x["limit"]]
    if slow:
        print(f"TOO SLOW: {', '.join(slow)}")
    wrong = [row for row in [*simulated, *real] if row["once"] != row["clips"]]
    print("every clip exactly once in every case" if not wrong else f"WRONG: {wrong}")
    return 1 if wrong or slow else 0


if __name__ == "__main__":
    sys.exit(main())
