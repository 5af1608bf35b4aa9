"""The toy set: balanced, deterministic, read as a task, and its kinds can be told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bat.audio.decode import decode, probe
from bat.data.index import Index
from bat.data.toy import KINDS, make_toy, toy_wave
from bat.errors import UserError


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_toy__ten_clips_five_kinds_two_folds_two_shards(toy_index: Index) -> None:
    assert len(toy_index) == 10
    assert toy_index.vocabulary == sorted(KINDS)
    assert len(toy_index.shard_bytes) >= 2
    for fold in (1, 2):
        kinds = sorted(toy_index.labels(i) for i in toy_index.clips_in_fold(fold))
        assert kinds == [(c,) for c in range(5)]
    for i in range(10):
        clip = toy_index.read(i)
        assert clip.key.startswith(toy_index.vocabulary[clip.labels[0]])
        info = probe(clip.data)
        assert (info.codec, info.sample_rate, info.frames) == ("flac", 16_000, 8_000)
        assert np.abs(decode(clip.data, sample_rate=16_000)).max() == pytest.approx(0.8, abs=1e-4)


def test_toy__same_seed_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert make_toy(tmp_path / name, seconds=0.2) == tmp_path / name
    assert files(tmp_path / "a") == files(tmp_path / "b")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a/audio").iterdir()}
    make_toy(tmp_path / "a", seconds=0.2)
    assert {p: p.stat().st_mtime_ns for p in before} == before  # not written again
    other = make_toy(tmp_path / "c", seconds=0.2, seed=1)
    assert not set(files(other).values()) & set(files(tmp_path / "a/audio").values())


def test_toy__kinds_differ_and_clips_of_a_kind_too() -> None:
    def spectrum(kind: str, number: int) -> np.ndarray:
        wave = toy_wave(kind, seed=0, number=number, seconds=1.0)
        assert wave.dtype == np.float32
        power = np.abs(np.fft.rfft(wave.reshape(10, -1), axis=1)) ** 2  # (10, bins)
        return np.log(power + 1e-3).std(axis=0)  # how much each band moves

    for kind in KINDS:
        one, two = (toy_wave(kind, seed=0, number=n, seconds=0.5) for n in (0, 5))
        assert np.corrcoef(one, two)[0, 1] < 0.9
    flat = {kind: spectrum(kind, 0).mean() for kind in KINDS}
    assert flat["tone"] < flat["noise"]


@pytest.mark.parametrize("change", [{"clips": 7}, {"clips": 5}, {"seconds": 0.01}])
def test_toy__impossible_toys(tmp_path: Path, change: dict[str, float]) -> None:
    with pytest.raises(UserError, match="clips of 0"):
        make_toy(tmp_path, **change)  # type: ignore[arg-type]
