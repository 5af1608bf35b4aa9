"""Random numbers that are functions of (seed, number) alone, and a permutation made of them."""

from __future__ import annotations

import math

import numpy as np

ORDER, CROP, ROLL, STAND_IN, OFFSET, CHOICE, SHARDS, MIX, NOISE = range(9)
"""Independent random streams of one seed."""

ROUNDS = 8
"""Rounds of ``permuted``."""


def philox(seed: int, number: int, purpose: int, start: int = 0) -> np.random.Philox:
    """Returns the random bits of (seed, number) for one purpose, from the ``start``-th on.

    Raw bits of a counter-based generator are the same in every numpy version; its ``Generator``
    methods are not guaranteed to be, and a resumed run must not depend on an upgrade.
    """
    key = np.array([seed, number], np.uint64)
    bits = np.random.Philox(key=key, counter=np.array([start // 4, 0, 0, purpose], np.uint64))
    bits.random_raw(start % 4, output=False)  # a count gives four numbers
    return bits


def below(n: int, bits: np.random.Philox) -> int:
    """Draws uniformly from ``0 .. n - 1``."""
    return int(bits.random_raw()) * n >> 64


def normal(n: int, bits: np.random.Philox) -> np.ndarray:
    """Draws from N(0, 1), two of 64 bits (Box-Muller): (n,) float32."""
    raw = bits.random_raw((n + 1) // 2)
    radius = np.sqrt(-2.0 * np.log(((raw >> np.uint64(32)) + 0.5) * 2.0**-32))
    angle = (raw & np.uint64(0xFFFFFFFF)) * (np.pi * 2.0**-31)
    pairs = radius * np.array([np.cos(angle), np.sin(angle)])
    return pairs.ravel()[:n].astype(np.float32)


def permuted(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Returns the images (m,) int64 of ``places`` (m,) under a bijection of ``0 .. n - 1``.

    A Feistel network over pairs ``(x, y)`` of ``0 .. a - 1`` and ``0 .. b - 1``, ``a b >= n``: the
    rounds add to x a hash of y modulo a, and to y a hash of x modulo b, in turn. What leaves
    ``0 .. n - 1`` (fewer than one in sqrt(n)) is sent through again until it is back.

    Args:
        keys: (ROUNDS,) uint64, random.
    """
    b = math.isqrt(n - 1) + 1
    wide, high = np.array([-(-n // b), b], np.uint64), np.uint64(32)
    out, todo = np.array(places, np.uint64), np.arange(len(places))
    while len(todo):
        pair = list(np.divmod(out[todo], wide[1]))
        for number, key in enumerate(keys):
            side = number % 2
            hashed = (pair[1 - side] ^ key) * np.uint64(0x9E3779B97F4A7C15)
            hashed = (hashed ^ (hashed >> high)) * np.uint64(0xD6E8FEB86659FD93)
            moved = pair[side] + ((hashed >> high) * wide[side] >> high)
            pair[side] = np.where(moved >= wide[side], moved - wide[side], moved)
        out[todo] = pair[0] * wide[1] + pair[1]
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)
