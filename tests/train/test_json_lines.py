"""metrics.jsonl: rewinding, half-written lines, a full disk."""

import json
import resource
from pathlib import Path

import pytest

from bat.io import read_jsonl
from bat.train.trainer import JsonLines


def test_rewinding_drops_what_comes_after_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in (1, 2, 3):
        lines.log_metrics({"loss": step / 2, "bad": float("nan")}, step=step)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    lines.rewind(2)
    wanted = [{"step": 1, "loss": 0.5, "bad": None}, {"step": 2, "loss": 1.0, "bad": None}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == wanted
    lines.rewind(0)
    assert path.read_text() == ""


def test_lines_that_a_full_disk_refused_are_written_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.log_metrics({"loss": 1.0}, step=1)
    size = path.stat().st_size
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, old[1]))  # room for half a line
    try:
        lines.log_metrics({"loss": 2.0}, step=2)
        lines.log_metrics({"loss": 3.0}, step=3)
        assert path.stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    lines.log_metrics({"loss": 4.0}, step=4)
    assert [r["loss"] for r in read_jsonl(path)] == [1.0, 2.0, 3.0, 4.0]
