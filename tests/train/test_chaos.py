"""Ten faults on a toy run; it ends as one that was left alone (tools/chaos.py)."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from bat.cli.pretrain import main

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (TOOLS / "chaos.py").is_file():
        pytest.skip("tools/ is not here: only a checkout has it")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("chaos")


@pytest.mark.slow
def test_after_ten_faults_the_weights_are_those_of_an_undisturbed_run(
    chaos: ModuleType, tmp_path: Path
) -> None:
    figures = chaos.Chaos(tmp_path, faults=10, seed=5, steps=80, words=[]).run()
    assert {fault["kind"] for fault in figures["each"]} == set(chaos.KINDS)
    assert figures["clips_used"] == 80 * 4
    assert figures["clips_lost"] == 0
    assert figures["weight_bytes_that_differ"] == 0
    codes = {fault["kind"]: fault["exit_code"] for fault in figures["each"]}
    assert codes == {
        "kill": -9,
        "term": 75,
        "group": 75,
        "disk": 2,
        "truncate": -9,
        "flip": -9,
        "worker": 75,
    }


def test_a_run_that_differs_is_noticed(chaos: ModuleType, tmp_path: Path) -> None:
    """The comparison itself: another seed is another run."""
    made = chaos.Chaos(tmp_path, faults=1, seed=0, steps=4, words=["data.workers=0"])
    for out, word in ((tmp_path / "whole", "seed=0"), (made.out, "seed=1")):
        assert main([*made.words, f"out={out}", word]) == 0
    with pytest.raises(AssertionError, match="weights differ"):
        made.compare()
