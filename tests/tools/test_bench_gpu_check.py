"""``gpu_check.py`` on the CPU: its rows, its clock, its processes."""

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
    # the process of this item does not know it and fails
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


def test_items__what_does_not_fit_the_time_is_skipped_or_stopped(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--items", "steps"])
    items = importlib.import_module("gpu_items")
    # 2,000 MB and 500 MB a clip; 24 GB less 1 GB kept free
    assert items.largest_batch((10, 7_000.0), (20, 12_000.0), 24) == 42
    assert items.largest_batch((10, 7_000.0), (20, 12_000.0), 2) == 0
    check = gpu_check.Check(tmp_path / "gpu.json", minutes=1, repeats=1, quick=False)
    check.item("step")  # expects more than a minute
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["results"] == []
    assert list(report["skipped"]) == ["step"]
    assert "60 s were left" in report["skipped"]["step"]
    script = "print('row', flush=True); import time; time.sleep(60)"
    assert gpu_check.run(["-c", script], 2) == (None, ["row"], [])


def test_items__what_matters_most_fits_one_run(gpu_check: ModuleType) -> None:
    wanted = ["masks", "frontend", "step", "memory", "cgp", "sdpa", "flash", "cudnn"]
    items = gpu_check.ITEMS
    assert list(items)[: len(wanted)] == wanted
    expected = sum(items[name].expected_seconds for name in wanted)
    assert expected < 60 * gpu_check.MINUTES - gpu_check.TEST_SECONDS - 10
    later = ",".join(list(items)[len(wanted) :])
    gpu_items = importlib.import_module("gpu_items")
    assert all(f"--items {later}``" in m.__doc__ for m in (gpu_check, gpu_items))
    assert all(item.limit_seconds > item.expected_seconds for item in items.values())
