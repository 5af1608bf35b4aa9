"""Plays order, shard cache and fetching of large data sets on many ranks, without audio.

    uv run python tools/simulate.py start --clips 1000 1e6 1e8    # measured: opening an index
    uv run python tools/simulate.py order --clips 1e6 --ranks 8 512 4096
    uv run python tools/simulate.py fetch --clips 1e8 --ranks 8 64 512 4096
    uv run python tools/simulate.py plot --out docs/scale.png

``start`` writes a synthetic data set (sparse tars, tables made up as they are read) and its index
by the real ``open_index``; then a process of its own opens it as a rank does, up to the numbers of
the first batch, and is measured. ``order`` walks whole epochs through the real ``bat.data.plan``
and counts every clip; some ranks are compared with the real sampler. ``fetch`` follows the reads of
one node through a least-recently-used cache of whole shards. Results are added to ``--json``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bat.data.index import open_index
from bat.data.manifest import Manifest, ShardInfo
from bat.data.plan import Plan, make_plan
from bat.data.stream import PlanSampler
from bat.data.table import CLIP, ShardTable
from bat.io import write_json

CLIP_BYTES = 320_000
"""A 10-s clip at 16 kHz as FLAC."""
BATCH = 32
"""Clips of a micro-batch on one rank."""
DEVICES = 8
"""Ranks of a node."""


# ---- start


def table_of(tar: Path, clips: int) -> ShardTable:
    """A table as ``bat-shard`` makes it, of clips that are not there."""
    number = int(tar.stem.rpartition("-")[2])
    table, within = rows_of(clips)
    keys = np.full((clips, 11), ord("-"), np.uint8)  # SHARD-CLIP, six and four digits
    keys[:, :6] = np.frombuffer(f"{number:06d}".encode(), np.uint8)
    keys[:, 7:] = within
    return ShardTable(
        tar_bytes=clips * (CLIP_BYTES + 1024),
        clips=table,
        labels=(np.arange(clips) % 8).astype(np.int32),
        keys=keys.ravel(),
        names=[f"class {i}" for i in range(8)],
        ids=list(range(8)),
    )


@functools.lru_cache(maxsize=2)
def rows_of(clips: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of every shard of so many clips, and the digits of the clips' numbers."""
    table = np.zeros(clips, CLIP)
    table["offset"] = np.arange(clips) * (CLIP_BYTES + 1024) + 512
    table["size"], table["frames"], table["rate"], table["key"] = CLIP_BYTES, 160_000, 16_000, 11
    table["fold"], table["split"], table["labels"] = -1, -1, 1
    tens = 10 ** np.arange(3, -1, -1)
    return table, (np.arange(clips)[:, None] // tens % 10 + ord("0")).astype(np.uint8)


def write_set(folder: Path, clips: int, per_shard: int) -> None:
    """Sparse tars, empty table files and a manifest of ``clips`` clips."""
    folder.mkdir(parents=True)
    shards = []
    for number in tqdm(range(-(-clips // per_shard)), desc="tars", leave=False):
        count = min(per_shard, clips - number * per_shard)
        path = folder / f"shard-{number:06d}.tar"
        with path.open("wb") as file:
            file.truncate(count * (CLIP_BYTES + 1024))
        path.with_suffix(".idx.npz").touch()
        shards.append(ShardInfo(path.name, count, path.stat().st_size, "", 10.0 * count))
    names = [f"class {i}" for i in range(8)]
    said: dict[str, Any] = {"clips": clips, "seconds": 10.0 * clips, "bytes": 0, "label_counts": []}
    for name in ("splits", "folds", "rates"):
        said[name] = {}
    Manifest(shards=shards, vocabulary=names, left_out=[], source="simulated", **said).save(folder)


def private_mb() -> float:
    """Memory of this process that is its own: resident anonymous pages, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("RssAnon:"))) / 1024


def open_as_rank(folder: Path, per_shard: int, shuffle: str, ranks: int) -> dict[str, float]:
    """Opens the index, makes the order and the first batch of one rank, as a run does.

    Seconds of this process's CPU and by the clock, and private memory before and after.
    """

    def table(tar: Path, entry: ShardInfo, cache: Path) -> ShardTable:
        return table_of(tar, entry.clips)

    before, clock, cpu = private_mb(), time.perf_counter(), time.process_time()
    with mock.patch("bat.data.index.local_table", table):
        index = open_index(folder / "shards", cache=folder / "cache")
    opened = time.process_time()
    how: Any = shuffle
    plan = make_plan(index, seed=0, shuffle=how)
    plan.identity()
    sampler = PlanSampler(
        plan,
        batch=BATCH,
        batches=1,
        rank=ranks - 1,
        world=ranks,
        batches_done=lambda: len(index) * 2 // 5 // (BATCH * ranks),  # resumed within an epoch
    )
    for _, clip in next(iter(sampler)):
        index.key(clip), index.targets(clip)
    return {
        "seconds": round(time.perf_counter() - clock, 3),
        "cpu seconds": round(time.process_time() - cpu, 3),
        "cpu seconds, index alone": round(opened - cpu, 3),
        "private MB": round(private_mb() - before, 1),
        "private MB of the process": round(private_mb(), 1),
    }


def check_start(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for clips in args.clips:
        folder = args.folder / f"{clips}-{args.per_shard}"
        if not (folder / "shards/manifest.json").exists():
            write_set(folder / "shards", clips, args.per_shard)
        first = None
        for shuffle in ("auto", "window"):
            command = [sys.executable, __file__, "_rank", str(folder), str(args.per_shard)]
            for _ in range(1 if first else 2):  # the first of all writes the index
                done = subprocess.run(
                    [*command, shuffle, "4096"], check=True, stdout=subprocess.PIPE
                )
                row = json.loads(done.stdout)
                first = first or row
            used = sum(f.stat().st_size for f in (folder / "cache").rglob("*.bin"))
            yield {
                "clips": clips,
                "shards": -(-clips // args.per_shard),
                "shuffle": shuffle,
                "index bytes": used,
                "first start": first,
                **row,
            }


# ---- order


def global_batches(plan: Plan, size: int, first: int = 0) -> Iterator[np.ndarray]:
    """The clips (size,) of micro-batch ``first``, ``first + 1``, ... of all ranks together; those
    of rank r are every ``ranks``-th from the r-th on."""
    for k in itertools.count(first):
        yield plan.clips(np.arange(k * size, (k + 1) * size))


def real_batch(plan: Plan, size: int, ranks: int, rank: int, k: int) -> list[int]:
    """The clips of micro-batch k on one rank, as the sampler of a run gives them."""
    how: Any = {"rank": rank, "world": ranks, "batches_done": lambda: k}
    (items,) = PlanSampler(plan, batch=size // ranks, batches=1, **how)
    return [clip for _, clip in items]


def check_order(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Walks an epoch, on half the ranks after two fifths of it; the batches keep their size."""
    for clips, ranks in itertools.product(args.clips, args.ranks):
        size = BATCH * ranks
        shard = np.repeat(np.arange(-(-clips // args.per_shard), dtype=np.int32), args.per_shard)
        for shuffle in ("keyed", "window"):
            how: Any = {"window": 8192, "shard": shard} if shuffle == "window" else {"keyed": True}
            plan = Plan(clips, seed=0, **how)
            batches = -(-clips // size)
            cut, seen = batches * 2 // 5, np.zeros(clips, bool)
            draw, same = np.random.default_rng(0), True
            start = time.process_time()
            bar = tqdm(range(batches), desc=f"{clips} clips, {ranks} ranks, {shuffle}", leave=False)
            batch = np.empty(0, np.int64)
            for k, batch in zip(bar, global_batches(plan, size), strict=False):
                seen[batch[: clips - k * size]] = True
                if k in (0, cut - 1, cut, batches - 1):
                    world = ranks if k < cut else max(1, ranks // 2)
                    for rank in {0, world - 1, *draw.integers(0, world, 4).tolist()}:
                        same &= batch[rank::world].tolist() == real_batch(
                            plan, size, world, rank, k
                        )
            walked = time.process_time() - start
            start = time.process_time()
            next(global_batches(Plan(clips, seed=0, **how), size, cut))
            yield {
                "clips": clips,
                "ranks": ranks,
                "shuffle": shuffle,
                "once an epoch": int(seen.sum()),
                "sampled ranks equal the sampler": same,
                "clips twice in the batch over the epoch's end": size - len(np.unique(batch)),
                "cpu seconds to resume": round(time.process_time() - start, 3),
                "cpu microseconds a clip": round(walked / clips * 1e6, 3),
            }


# ---- fetch


def follow_node(
    plan: Plan, shard: np.ndarray, *, ranks: int, cache_shards: int, batches: int
) -> dict[str, float]:
    """Follows what the first node reads in ``batches`` micro-batches, through a cache of whole
    shards, least recently used out first; and how the batches of all nodes are mixed."""
    size, devices = BATCH * ranks, min(DEVICES, ranks)
    number, held = int(shard[-1]) + 1, OrderedDict[int, None]()
    reads = fetches = hits = 0
    distinct, common, distance, before = [], [], [], None
    for batch in itertools.islice(global_batches(plan, size), batches):
        here = shard[batch]
        for one in here.reshape(BATCH, ranks)[:, :devices].ravel().tolist():
            reads += 1
            if one in held:
                hits += 1
                held.move_to_end(one)
                continue
            fetches += 1
            held[one] = None
            if len(held) > cache_shards:
                held.popitem(last=False)
        of_batch = np.unique(here)
        distinct.append(len(of_batch))
        if before is not None:
            common.append(len(np.intersect1d(of_batch, before[1])) / len(of_batch))
            distance.append(np.abs(here.astype(float) - before[0]).mean() / (number / 3))
        before = here, of_batch
    even = number * -np.expm1(size * np.log1p(-1 / number)) if number > 1 else 1.0
    return {
        "bytes fetched per byte read": fetches * len(shard) / number / reads,
        "hit rate": hits / reads,
        "shards of a batch": float(np.mean(distinct)),
        "of those of an even batch": float(np.mean(distinct)) / even,
        "shards common with the next batch": float(np.mean(common)),
        "distance to the next batch": float(np.mean(distance)),
    }


def check_fetch(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for clips in args.clips:
        shard = np.repeat(np.arange(-(-clips // args.per_shard), dtype=np.int32), args.per_shard)
        cases = list(itertools.product(args.windows, args.ranks))
        for window, ranks in tqdm(cases, desc=f"fetch, {clips} clips", leave=False):
            plan = Plan(clips, seed=0, window=window, shard=shard)
            size = BATCH * ranks
            batches = min(clips // size, max(4, 4 * window // size + 1))
            cache = int(args.cache_gb * 1e9 / CLIP_BYTES / args.per_shard)
            found = follow_node(plan, shard, ranks=ranks, cache_shards=cache, batches=batches)
            yield {
                "clips": clips,
                "per shard": args.per_shard,
                "window": window,
                "ranks": ranks,
                "cache GB": args.cache_gb,
                "batches": batches,
                **{name: round(value, 4) for name, value in found.items()},
            }


# ---- picture


def plot(rows: dict[str, list[dict[str, Any]]], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    for axis, name, limit in (
        (axes[0, 0], "cpu seconds", 10),
        (axes[0, 1], "private MB", 200),
    ):
        for shuffle in ("auto", "window"):
            mine = sorted((r["clips"], r[name]) for r in rows["start"] if r["shuffle"] == shuffle)
            axis.loglog(*zip(*mine, strict=True), "o-", label=f"shuffle={shuffle}")
        axis.axhline(limit, color="grey", ls="--", lw=1)
        axis.set(xlabel="clips", ylabel=f"{name} of a rank's start", title="measured")
        axis.legend(frameon=False)
    for window in sorted({r["window"] for r in rows["fetch"]}):
        same = (window, rows["fetch"][0]["clips"])
        mine = [r for r in rows["fetch"] if (r["window"], r["clips"]) == same]
        nodes = [max(1, r["ranks"] // DEVICES) for r in mine]
        for axis, name in (
            (axes[1, 0], "bytes fetched per byte read"),
            (axes[1, 1], "of those of an even batch"),
        ):
            axis.loglog(nodes, [r[name] for r in mine], "o-", label=f"window {window:,}")
    axes[1, 0].axhline(1, color="grey", ls="--", lw=1, label="clip by clip")
    axes[1, 0].set(
        xlabel="nodes of 8", ylabel="bytes fetched per byte read", title="simulated, whole shards"
    )
    axes[1, 1].set(
        xlabel="nodes of 8", ylabel="shards of a batch / of an even one", title="simulated"
    )
    for axis in axes[1]:
        axis.legend(frameon=False)
    figure.savefig(out, dpi=110)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["_rank"]:
        folder, per_shard, shuffle, ranks = words[1:]
        print(json.dumps(open_as_rank(Path(folder), int(per_shard), shuffle, int(ranks))))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def count(text: str) -> int:
        return int(float(text))

    parser.add_argument("what", choices=["start", "order", "fetch", "plot"])
    parser.add_argument("--clips", type=count, nargs="+", default=[100_000], metavar="N")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], metavar="N")
    parser.add_argument("--windows", type=count, nargs="+", default=[8192], metavar="N")
    parser.add_argument("--per-shard", type=count, default=1000, metavar="N", help="clips (1000)")
    parser.add_argument("--cache-gb", type=float, default=100.0, metavar="GB", help="a node (100)")
    parser.add_argument("--folder", type=Path, default=Path("simulated"), help="for start")
    parser.add_argument("--json", type=Path, default=Path("simulated.json"), metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("scale.png"), help="of plot")
    args = parser.parse_args(words)
    rows = json.loads(args.json.read_text()) if args.json.exists() else {}
    if args.what == "plot":
        plot(rows, args.out)
        return 0
    check = {"start": check_start, "order": check_order, "fetch": check_fetch}[args.what]
    wrong = False
    for row in check(args):
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        wrong |= row.get("once an epoch", row["clips"]) != row["clips"]
        wrong |= not row.get("sampled ranks equal the sampler", True)
        rows.setdefault(args.what, []).append(row)
        write_json(args.json, rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
