"""Runs the examples of the README's section "Use it elsewhere" where the packages are installed.

That of ONNX, whose export takes longer, runs in ``test_onnx.py``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from bat.cli import export
from tests.conftest import DOCS
from tests.interfaces.suite_encoders import batch, clip, saved

PACKAGES = {
    "hf": "transformers",
    "hear": None,
    "xares": None,
    "mteb": "mteb",
}


def example(name: str) -> tuple[str, str]:
    """The folder and the code of the README's example of a format."""
    readme = DOCS.parent / "README.md"
    if not readme.is_file():
        pytest.skip("README.md is not here: only a checkout has it")
    text = readme.read_text(encoding="utf-8")
    ((out, code),) = re.findall(
        rf"```python\n# bat-export {name} RUN (\S+?)[: ][^\n]*\n(.*?)```", text, re.DOTALL
    )
    assert len([line for line in code.splitlines() if line]) <= 5
    return out, code


@pytest.mark.parametrize("name", PACKAGES)
def test_readme__example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if PACKAGES[name] is not None:
        pytest.importorskip(PACKAGES[name], reason=f"an extra of the format {name}")
    out, code = example(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / out))
    saved("bat", tmp_path / "runs" / "pretrain-toy" / "export")
    assert export.main([name, "runs/pretrain-toy", out]) == 0
    for made in re.findall(r"pretrain_toy_[0-9a-f]{8}", capsys.readouterr().out)[:1]:
        monkeypatch.delitem(sys.modules, made, raising=False)  # that of another suite
        code = code.replace("pretrain_toy_1a2b3c4d", made)
        code = code.replace("Toy1a2b3c4d", f"Toy{made[-8].upper()}{made[-7:]}")
    clips = [clip(0.5), clip(1.0)]
    found = {
        "audio": batch(clips),
        "wave": clips[0].numpy(),
    }
    exec(code, found)
    (result,) = {"tokens", "scene", "frames", "results"} & found.keys()
    if isinstance(found[result], torch.Tensor):
        assert found[result].isfinite().all()
        assert len(found[result]) == (1 if name == "hf" else 2)
