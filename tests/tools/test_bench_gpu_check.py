"""``gpu_check.py`` on the CPU: its items at tiny sizes, its clock, its processes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "bench.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("gpu_check")


def test_items__run_at_tiny_sizes(gpu_check: ModuleType, capsys) -> None:
    names = ["attention", "variants"]  # the others are parts of bench.py, with their tests
    gpu_check.work(names, repeats=1, quick=True)
    printed = capsys.readouterr().out.splitlines()
    first, *messages = [json.loads(line) for line in printed if line.startswith("{")]
    assert first["machine"]["versions"]["torch"].startswith("2.11")
    assert [m["end"] for m in messages if "end" in m] == names
    rows = [m["row"] for m in messages if "row" in m]
    assert {row["part"] for row in rows} == set(names)
    assert not [row for row in rows if "error" in row]
    kernels = [row for row in rows if row["part"] == "attention" and "refused" not in row]
    assert {row["case"].split(", ")[-1] for row in kernels} >= {"auto", "sdpa"}
    for row in kernels:
        assert row["difference"] < 1e-5
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"])
    small, large, fit = [row for row in rows if row["part"] == "variants"]
    waves = 2 * 2 * 16_000 * 4 / 1e6  # two more of 2 s
    assert large["held_mb"] == pytest.approx(small["held_mb"] + waves)
    assert small["clips_per_second"] == pytest.approx(2e3 / small["ours_ms"])
    assert "mfu_peak" in small
    assert fit["largest_batch_80_gb"] > fit["largest_batch_24_gb"] > 0


def test_peak__is_looked_up_by_the_name_of_the_device(gpu_check: ModuleType) -> None:
    peak_of = importlib.import_module("benchmarks.flops").peak_of
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == 989e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("AMD EPYC") is None


def test_largest_batch__by_the_line_through_two(gpu_check: ModuleType) -> None:
    largest_batch = importlib.import_module("gpu_items").largest_batch
    # 2,000 MB and 500 MB a clip; 24 GB less 1 GB kept free
    assert largest_batch((10, 7_000.0), (20, 12_000.0), 24) == 42
    assert largest_batch((10, 7_000.0), (20, 12_000.0), 2) == 0


FAKE = """
import json, os, sys, time
say = lambda **m: print(json.dumps(m), flush=True)
say(machine={"device": "a", "gpu": True})
print("a remark of a library")
for name in sys.argv[1].split(","):
    say(begin=name)
    say(row={"part": name, "case": "first"})
    if name == "cgp":
        os._exit(3)
    if name == "step":
        time.sleep(60)
    if name == "decoders":
        say(row={"part": name, "case": "second", "error": "no"})
    say(end=name)
    if name == "decoders":
        break
"""
"""A worker whose ``step`` does not end, whose ``cgp`` takes it along, whose ``decoders`` fails."""


def report_of(gpu_check: ModuleType, monkeypatch, out: Path, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(
        gpu_check, "command_of", lambda names, args: [sys.executable, "-c", FAKE, ",".join(names)]
    )
    assert gpu_check.main(["--json", str(out), *words]) == 1
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # replaced, nothing beside
    return json.loads(out.read_text())


def test_check__an_item_that_fails_costs_only_itself(
    gpu_check: ModuleType, monkeypatch, tmp_path: Path
) -> None:
    limited = gpu_check.ITEMS["step"]._replace(limit_seconds=0.5)
    monkeypatch.setitem(gpu_check.ITEMS, "step", limited)
    monkeypatch.setattr(gpu_check, "START_SECONDS", 1.0)
    items = "--items=cgp,step,decoders,attention"
    report = report_of(gpu_check, monkeypatch, tmp_path / "gpu.json", items)
    assert report["complete"]
    assert report["not_run"] == []
    assert report["failed"]["cgp"] == "its process ended with 3"
    assert report["failed"]["step"].startswith("stopped after its limit")
    assert report["failed"]["decoders: second"] == "no"
    assert "attention" not in report["failed"]
    parts = [row["part"] for row in report["results"]]
    assert parts == ["cgp", "step", "decoders", "decoders", "attention"]  # the rows before are kept
    assert set(report["seconds"]) == {"cgp", "step", "decoders", "attention"}
    assert report["device"] == "a"


def test_check__what_no_time_is_left_for_is_named(
    gpu_check: ModuleType, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 0.1)
    items = ("--items=attention,step,decoders", "--minutes=0.05")
    report = report_of(gpu_check, monkeypatch, tmp_path / "gpu.json", *items)
    assert not report["complete"]
    assert report["cut_off"] == "0.05 minutes were over"
    assert report["not_run"] == ["decoders"]
    assert [row["part"] for row in report["results"]] == ["attention", "step"]
    with pytest.raises(SystemExit):
        gpu_check.main(["--items", "steps"])
    with pytest.raises(SystemExit):
        gpu_check.main(["--device", "cpu"])  # real sizes take days there


def test_check__sigterm_keeps_what_was_measured(gpu_check: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    script = (
        f"import sys, gpu_check; fake = {FAKE!r}\n"
        "gpu_check.command_of = lambda n, a: [sys.executable, '-c', fake, ','.join(n)]\n"
        f"sys.exit(gpu_check.main({['--json', str(out), '--items=attention,step']!r}))"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=TOOLS, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if '"step"' in line:  # its first row: it will never end
                process.terminate()
                break
        assert process.wait(timeout=30) == 1
    report = json.loads(out.read_text())
    assert report["cut_off"] == "SIGTERM"
    assert not report["complete"]
    assert report["not_run"] == ["step"]
    assert [row["part"] for row in report["results"]] == ["attention", "step"]
