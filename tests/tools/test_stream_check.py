"""The check of the stream checks: it counts what loaders deliver, and a clip twice is noticed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from bat.data.stream import PlanSampler
from tests.toy import make_toy_shards

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "stream_check.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    found = importlib.import_module("stream_check")
    monkeypatch.setattr(found, "GLOBAL_BATCH", 8)
    monkeypatch.setattr(found, "PAIRS", [((1, 2), (2, 0)), ((8, 0), (1, 1))])
    return found


def test_every_clip_once_simulated_and_read(tool: ModuleType, tmp_path: Path, capsys) -> None:
    shards = make_toy_shards(tmp_path / "toy", seconds=0.5)
    out = tmp_path / "out.json"
    words = ["--shards", "2", "--audio", str(shards), "--json", str(out)]
    assert tool.main(words) == 0
    assert "every clip exactly once in every case" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [row["once"] for row in report["simulated"]] == [2000, 2000]
    assert [row["once"] for row in report["real"]] == [10, 10]
    assert report["times"]["start-up on 2 shards, 2000 clips"]["seconds"] > 0


def test_a_position_given_twice_is_noticed(tool: ModuleType, tmp_path: Path, monkeypatch) -> None:
    original = PlanSampler.__iter__

    def twice(self):
        batches = original(self)
        first = next(batches)
        yield from [first, first]
        yield from batches

    monkeypatch.setattr(PlanSampler, "__iter__", twice)
    assert tool.main(["--shards", "1"]) == 1
