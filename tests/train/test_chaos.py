"""Two faults on a toy run; it ends as one that was left alone (more: tools/chaos.py)."""

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
def test_chaos__after_two_faults_the_weights_are_those_of_an_undisturbed_run(
    chaos: ModuleType, tmp_path: Path
) -> None:
    results = chaos.Chaos(tmp_path, faults=2, seed=5, steps=24, words=[]).run()
    codes = {fault["kind"]: fault["exit_code"] for fault in results["each"]}
    assert codes == {"flip": -9, "group": 75}
    assert results["clips_used"] == 24 * 4
    assert results["clips_lost"] == 0


def test_chaos__run_that_differs_is_noticed(chaos: ModuleType, tmp_path: Path) -> None:
    """The comparison itself: another seed is another run."""
    made = chaos.Chaos(tmp_path, faults=1, seed=0, steps=4, words=["data.workers=0"])
    for out, word in ((tmp_path / "whole", "seed=0"), (made.out, "seed=1")):
        assert main([*made.words, f"out={out}", word]) == 0
    with pytest.raises(AssertionError, match="weights differ"):
        made.compare()
