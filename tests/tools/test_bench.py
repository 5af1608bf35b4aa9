"""The benchmark runs and writes what it promises; its ways do the same work; no time is judged."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "bench.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("bench")


def test_stream_writes_its_figures(bench: ModuleType, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.json"
    assert bench.main(["stream", "--quick", "--repeats", "1", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert set(figures) == {"device", "versions", "results"}
    assert figures["versions"]["torch"].startswith("2.11")
    assert len(figures["results"]) == 4
    for row in figures["results"]:
        assert row["part"] == "stream"
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"])
        assert row["of_limit"] == pytest.approx(row["limit_ms"] / row["ours_ms"])
    assert "flac 16k mono, 2-s crops" in capsys.readouterr().out


def test_ours_and_plain_read_the_same_waves(bench: ModuleType, tmp_path: Path) -> None:
    stream = importlib.import_module("benchmarks.stream")
    for codec, rate, channels in (("flac", 16_000, 1), ("ogg", 44_100, 2)):
        folder = tmp_path / codec
        folder.mkdir()
        paths = stream.make_clips(folder, codec=codec, rate=rate, channels=channels, count=2)
        shards = stream.make_shards(paths, folder / "shards")
        ours = stream.ours_loader(shards, None, batch=2, batches=1, workers=0)
        (batch,) = list(ours)
        ((plain, lengths),) = list(stream.plain_loader(paths, None, batch=2))
        assert batch.waves.shape == plain.shape == (2, 160_000)
        assert batch.lengths.tolist() == lengths.tolist() == [160_000] * 2
        spectra = [np.abs(np.fft.rfft(w.numpy())) for w in (batch.waves, plain)]  # roll: no matter
        a, b = (s[np.argsort(s[:, 1:100].sum(1))] for s in spectra)  # the order neither
        assert np.abs(a - b).max() < 1e-2 * np.abs(a).max()


def test_an_unknown_part_is_named(bench: ModuleType, capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main(["strem"])
    assert "invalid choice: 'strem'" in capsys.readouterr().err
    assert "bench" in sys.modules
