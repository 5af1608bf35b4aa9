"""``gpu_check.py`` on the CPU: its rows, its clock, its child processes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "bench.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("gpu_check")


def test_items_run_and_a_failed_one_costs_only_itself(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # the child process does not know this item: it fails there, and another child goes on
    items = {"nonsense": gpu_check.ITEMS["masks"], **gpu_check.ITEMS}
    monkeypatch.setattr(gpu_check, "ITEMS", items)
    out = tmp_path / "gpu.json"
    words = ["--self-test", "--items", "nonsense,masks,memory", "--json", str(out)]
    assert gpu_check.main(words) == 1
    report = json.loads(out.read_text())
    assert list(report["failed"]) == ["nonsense"]
    assert "KeyError" in report["failed"]["nonsense"]
    assert [row["part"] for row in report["results"]] == ["masks", "memory", "memory", "memory"]
    small, large, fit = report["results"][1:]
    assert large["in_all_mb"] > small["in_all_mb"] == small["held_mb"] + small["ours_peak_mb"]
    assert fit["largest_batch_80_gb"] > fit["largest_batch_24_gb"] > 0
    assert set(report["seconds"]) == {"nonsense", "masks", "memory"}


def test_what_does_not_fit_the_time_is_skipped_and_listed(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "gpu.json"
    check = gpu_check.Check(out, minutes=1, settings={"repeats": 1, "quick": False})
    check.item("step")  # expects more than a minute
    report = json.loads(out.read_text())
    assert report["results"] == []
    assert list(report["skipped"]) == ["step"]
    assert "60 s were left" in report["skipped"]["step"]
    assert check.worker is None


def test_a_silent_or_dead_child_is_noticed(gpu_check: ModuleType) -> None:
    from multiprocessing import Pipe

    worker = object.__new__(gpu_check.Worker)
    worker.pipe, other = Pipe()
    assert worker.answer(0.01) == ("late", "stopped after its limit of 0 s")
    other.send(("row", {"case": 1}))
    assert worker.answer(1) == ("row", {"case": 1})

    class Dead:
        exitcode = -9

        def join(self) -> None: ...

    worker.process = Dead()
    other.close()
    assert worker.answer(1) == ("failed", "its process died with exit code -9")


def test_the_largest_batch_is_on_the_line(gpu_check: ModuleType) -> None:
    del gpu_check
    items = importlib.import_module("gpu_items")
    # 2,000 MB and 500 MB a clip; 24 GB less 1 GB kept free
    assert items.largest_batch((10, 7_000.0), (20, 12_000.0), 24) == 42
    assert items.largest_batch((10, 7_000.0), (20, 12_000.0), 2) == 0


def test_every_item_is_asked_for_by_name(gpu_check: ModuleType, capsys) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--items", "steps"])
    assert "unknown item 'steps'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu_check.main(["--json", "/nonexistent/out.json"]) == 2
