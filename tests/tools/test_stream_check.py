"""The check of the stream checks: it counts what loaders deliver, and a clip twice is noticed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bat.audio.encode import encode
from bat.data.stream import PlanSampler

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "stream_check.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    found = importlib.import_module("stream_check")
    monkeypatch.setattr(found, "GLOBAL_BATCH", 16)
    monkeypatch.setattr(found, "PAIRS", [((1, 2), (2, 0)), ((8, 0), (1, 1))])
    return found


def test_every_clip_once_simulated_and_read(tool: ModuleType, tmp_path: Path, capsys) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    for i in range(3):
        wave = np.random.default_rng(i).uniform(-0.5, 0.5, 20_000)
        (audio / f"{i}.wav").write_bytes(encode(wave, sample_rate=16_000, codec="wav"))
    out = tmp_path / "out.json"
    words = ["--shards", "2", "--audio", str(audio), "--clips", "50", "--json", str(out)]
    assert tool.main(words) == 0
    assert "every clip exactly once in every case" in capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert [row["once"] for row in figures["simulated"]] == [2000, 2000]
    assert [row["once"] for row in figures["real"]] == [51, 51]
    assert figures["times"]["start-up on 2 shards, 2000 clips"]["seconds"] > 0


def test_a_position_given_twice_is_noticed(tool: ModuleType, tmp_path: Path, monkeypatch) -> None:
    original = PlanSampler.__iter__

    def twice(self):
        batches = original(self)
        first = next(batches)
        yield from [first, first]
        yield from batches

    monkeypatch.setattr(PlanSampler, "__iter__", twice)
    assert tool.main(["--shards", "1"]) == 1
