"""Inverse block masks the slow way: one row after another, one patch after another."""

import random


def blocks_around(centres: list[int], time: int, freq: int, block: int) -> set[int]:
    kept = set()
    back, ahead = block // 2, (block - 1) // 2
    for centre in centres:
        t0, f0 = divmod(centre, freq)
        for t in range(t0 - back, t0 + ahead + 1):
            for f in range(f0 - back, f0 + ahead + 1):
                if 0 <= t < time and 0 <= f < freq:
                    kept.add(t * freq + f)
    return kept


def inverse_block_mask(
    time: int, freq: int, keep_ratio: float, block: int, adjust: float, rng: random.Random
) -> list[int]:
    """Kept ids of one row, ascending."""
    patches = time * freq
    keep = int(patches * keep_ratio)
    count = int(patches * (keep_ratio + adjust) / block**2)
    kept = blocks_around([rng.randrange(patches) for _ in range(count)], time, freq, block)
    while len(kept) > keep:
        kept.remove(rng.choice(sorted(kept)))
    while len(kept) < keep:
        kept.add(rng.choice([p for p in range(patches) if p not in kept]))
    return sorted(kept)
