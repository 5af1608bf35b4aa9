"""The benchmark runs and writes what it promises; its ways do the same work; no time is judged."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
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


def test_a_case_that_fails_costs_only_itself(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out.json"
    written: list[int] = []  # rows in the file when the next one is measured
    for name in ("masks", "frontend"):
        part = importlib.import_module(f"benchmarks.{name}")

        def medians(*args, title: str, usual=part.medians, **words):
            written.append(len(json.loads(out.read_text())["results"]) if out.exists() else 0)
            if title.startswith(("mask,", "one pass")):
                raise RuntimeError("no kernel\nand more about it")
            return usual(*args, title=title, **words)

        monkeypatch.setattr(part, "medians", medians)
    words = ["--quick", "--repeats", "1", "--json", str(out)]
    assert bench.main(["masks", "frontend", *words]) == 1
    rows = json.loads(out.read_text())["results"]
    assert written == [0, 1, 2, 3]  # every row was written before the next was measured
    assert [("error" in row) for row in rows] == [True, False, False, True]
    assert rows[0]["error"] == rows[3]["error"] == "RuntimeError: no kernel"
    assert set(rows[0]) == {"part", "case", "error"}
    said = capsys.readouterr()
    assert "mask, 8 rows of 64 x 8: error: RuntimeError: no kernel" in said.out
    assert "and more about it" in said.err  # the traceback
    assert "failed: mask, 8 rows of 64 x 8; one pass, 2 clips" in said.err


def test_a_part_that_fails_outside_its_cases_leaves_the_next(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken():
        raise OSError("no device")

    monkeypatch.setattr(importlib.import_module("benchmarks.masks"), "here", broken)
    out = tmp_path / "out.json"
    words = ["--quick", "--repeats", "1", "--json", str(out)]
    assert bench.main(["masks", "frontend", *words]) == 1
    rows = json.loads(out.read_text())["results"]
    assert [row["part"] for row in rows] == ["masks", "frontend", "frontend"]
    assert rows[0]["error"] == "OSError: no device"


@pytest.mark.parametrize(
    "part", ["step", "changes", "masks", "cgp", "frontend", "stream", "reliability"]
)
def test_every_part_gives_its_rows_one_by_one(bench: ModuleType, part: str) -> None:
    assert part in bench.PARTS
    rows = importlib.import_module(f"benchmarks.{part}").run(repeats=1, quick=True)
    assert isinstance(rows, Iterator)


def test_an_unknown_part_is_named(bench: ModuleType, capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main(["strem"])
    assert "invalid choice: 'strem'" in capsys.readouterr().err
    assert "bench" in sys.modules
