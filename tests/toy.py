"""The toy set as shards."""

from pathlib import Path

from bat.data.toy import make_toy
from bat.shard.write import write_shards
from bat.tasks.base import load_task


def make_toy_shards(
    root: str | Path, *, clips: int = 10, seed: int = 0, seconds: float = 2.0
) -> Path:
    """Write the toy set to ``root`` and return its folder of two shards or more."""
    rows, names = load_task("toy").read(make_toy(root, clips=clips, seed=seed, seconds=seconds))
    half = sum(row.path.stat().st_size for row in rows) // 2
    write_shards(rows, Path(root) / "shards", vocabulary=names, shard_bytes=half)
    return Path(root) / "shards"
