"""``gpu_check.py`` on the CPU: its rows, its clock, its child processes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "bench.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("gpu_check")


def test_items__run_and_a_failed_one_costs_only_itself(
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
    assert [row["part"] for row in report["results"]] == ["masks"] * 2 + ["memory"] * 3
    small, large, fit = report["results"][2:]
    assert large["in_all_mb"] > small["in_all_mb"] == small["held_mb"] + small["ours_peak_mb"]
    assert fit["largest_batch_80_gb"] > fit["largest_batch_24_gb"] > 0
    assert set(report["seconds"]) == {"nonsense", "masks", "memory"}


def test_items__what_does_not_fit_the_time_is_skipped_and_listed(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "gpu.json"
    with pytest.raises(SystemExit):
        gpu_check.main(["--items", "steps"])
    items = importlib.import_module("gpu_items")
    # 2,000 MB and 500 MB a clip; 24 GB less 1 GB kept free
    assert items.largest_batch((10, 7_000.0), (20, 12_000.0), 24) == 42
    assert items.largest_batch((10, 7_000.0), (20, 12_000.0), 2) == 0
    check = gpu_check.Check(out, minutes=1, settings={"repeats": 1, "quick": False})
    check.item("step")  # expects more than a minute
    report = json.loads(out.read_text())
    assert report["results"] == []
    assert list(report["skipped"]) == ["step"]
    assert "60 s were left" in report["skipped"]["step"]
    assert check.worker is None


def test_worker__silent_or_dead_child_is_noticed(gpu_check: ModuleType) -> None:
    from multiprocessing import Pipe

    worker = object.__new__(gpu_check.Worker)
    worker.pipe, other = Pipe()
    assert worker.answer(0.01) == ("late", "stopped after its limit of 0 s")
    other.send(("row", {"case": 1}))
    assert worker.answer(1) == ("row", {"case": 1})

    class Dead:
        exitcode = -9

        def join(self, seconds: float) -> None: ...

    worker.process = Dead()
    died = ("failed", "its process died with exit code -9")
    worker.ask("masks")  # never read: the other end's close resets the pipe
    other.close()
    assert worker.answer(1) == died  # ConnectionResetError
    worker.ask("masks")  # BrokenPipeError
    assert worker.answer(1) == died  # EOFError


def test_worker__one_that_died_between_items_costs_one(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    check = gpu_check.Check(
        tmp_path / "gpu.json", minutes=5, settings={"repeats": 1, "quick": True}
    )
    try:
        check.item("masks")
        check.worker.process.kill()
        check.worker.process.join()
        check.item("frontend")
        check.item("masks")
    finally:
        check.end()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["failed"] == {"frontend": "its process died with exit code -9"}
    assert [row["part"] for row in report["results"]] == ["masks"] * 4


def test_items__what_matters_most_fits_one_run(gpu_check: ModuleType) -> None:
    wanted = ["masks", "frontend", "step", "memory", "cgp", "sdpa", "flash", "cudnn"]
    items = gpu_check.ITEMS
    assert list(items)[: len(wanted)] == wanted
    expected = sum(items[name].expected_seconds for name in wanted)
    left = 60 * gpu_check.MINUTES - gpu_check.TEST_SECONDS
    assert expected + gpu_check.END_SECONDS < left
    later = ",".join(list(items)[len(wanted) :])
    gpu_items = importlib.import_module("gpu_items")
    assert all(f"--items {later}``" in m.__doc__ for m in (gpu_check, gpu_items))
    assert all(item.limit_seconds > item.expected_seconds for item in items.values())
