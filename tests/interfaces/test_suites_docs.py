"""Runs the examples of docs/evaluation_suites.md where the package is installed."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from bat.cli import export
from tests.conftest import DOCS
from tests.interfaces.suite_encoders import batch, clip, saved

SECTIONS = {"HEAR": None, "X-ARES": "xares", "s3prl": "s3prl.nn", "MTEB": "mteb"}


@pytest.mark.parametrize("heading", SECTIONS)
def test_docs__examples_run(
    heading: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not DOCS.is_dir():
        pytest.skip("docs/ is not here: only a checkout has it")
    text = (DOCS / "evaluation_suites.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {heading}\b.*?(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
    (line,) = re.findall(r"```bash\n(bat-export .*?) &&", section)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 7

    monkeypatch.chdir(tmp_path)
    saved("bat", tmp_path / "runs" / "pretrain-toy" / "export")
    assert export.main(shlex.split(line)[1:]) == 0
    name = re.findall(r"pretrain_toy_[0-9a-f]{8}", (capsys.readouterr().out + _written(tmp_path)))[
        0
    ]
    code = code.replace("pretrain_toy_1a2b3c4d", name)
    code = code.replace("Toy1a2b3c4d", f"Toy{name[-8:-7].upper()}{name[-7:]}")

    package = SECTIONS[heading]
    if package is not None:
        try:
            importlib.import_module(package)
        except Exception as error:  # s3prl raises AttributeError beside a later torchaudio
            pytest.skip(f"{package} is not installed, or does not import: {error}")
    monkeypatch.syspath_prepend(str(tmp_path / "suite"))
    for module in (name, "hubconf"):  # of another suite
        monkeypatch.delitem(sys.modules, module, raising=False)
    clips = [clip(0.5), clip(1.0)]
    names = {"audio": batch(clips), "lengths": torch.tensor([8000, 16000])}
    exec(code, names)
    found = {"HEAR": "frames", "X-ARES": "frames", "s3prl": "states", "MTEB": "results"}[heading]
    assert found in names


def _written(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted((folder / "suite").glob("*.py")))
