"""``bench.py changes``: every change acts, changes no number, and is taken back afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def changes(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    import benchmarks.changes as module

    return module


def small(changes: Any) -> Any:
    words = [*changes.QUICK, "data.batch=2", "objective.mask.views=2", "hardware.precision=32-true"]
    return changes.OursStep(changes.settings(words), torch.device("cpu"))


def operators(call) -> list[str]:
    """Names of the operators that ``call`` runs, forward and backward."""
    with torch.profiler.profile() as profiled:
        call()
    return sorted(e.name for e in profiled.events() if e.name.startswith(("aten::", "bat::")))


def test_each_change_acts_keeps_the_loss_and_is_taken_back(changes: Any) -> None:
    step = small(changes)
    step()
    usual = operators(step)
    for name, change in changes.CHANGES.items():
        before = step.loss(1).item()
        with change(step):
            assert step.loss(1).item() == pytest.approx(before, rel=1e-5), name
            done = operators(step)
        if name != "attention by PyTorch's kernel (sdpa)":  # what auto is in float32
            assert done != usual, name
        assert operators(step) == usual, name
        assert step.loss(1).item() < before, name  # two steps were made


def test_rows(changes: Any) -> None:
    rows = [*changes.run(repeats=1, quick=True)]
    assert [row["case"] for row in rows] == list(changes.CHANGES)
    assert all(row["loss_difference"] < 2e-3 for row in rows)  # bf16
    assert len({row["ours_ms"] for row in rows}) == 1


def test_a_change_is_taken_back_where_the_step_fails(changes: Any) -> None:
    step = small(changes)
    step()
    usual = operators(step)
    for name, change in changes.CHANGES.items():
        with pytest.raises(torch.OutOfMemoryError), change(step):
            raise torch.OutOfMemoryError
        assert operators(step) == usual, name


def test_a_change_that_fails_costs_only_itself(changes: Any, monkeypatch) -> None:
    def full(*args: Any, **words: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    recompute = "activation checkpointing (option)"
    names = (recompute, "EMA one by one")
    monkeypatch.setattr(changes, "CHANGES", {name: changes.CHANGES[name] for name in names})
    monkeypatch.setattr("bat.nn.block.checkpoint", full)
    rows = [*changes.run(repeats=1, quick=True)]
    assert rows[0] == {"case": recompute, "error": "torch.OutOfMemoryError: CUDA out of memory"}
    assert [row["case"] for row in rows] == list(names)
    assert rows[1]["loss_difference"] < 2e-3
