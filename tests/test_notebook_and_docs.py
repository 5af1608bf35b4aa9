"""The notebook and the page on Python run as they stand, but for fewer steps."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bat
from bat.tasks.synthetic import write_wav
from tests.conftest import DOCS

FEWER = {
    '"steps": 40': '"steps": 3',
    '"width": 96, "depth": 4, "heads": 4': '"width": 48, "depth": 2, "heads": 2',
    '"epochs": 10, "min_steps": 60': '"epochs": 1, "min_steps": 5',
    "range(12)": "range(6)",
}


def _page(name: str) -> str:
    if not DOCS.is_dir():
        pytest.skip("docs/ is not here: only a checkout has it")
    return (DOCS / name).read_text(encoding="utf-8")


def test_notebook__runs_and_draws(tmp_path: Path) -> None:
    book = json.loads(_page("quickstart.ipynb"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    for shown, fewer in FEWER.items():
        assert shown in code
        code = code.replace(shown, fewer)
    assert "IPython" not in code  # nor magics: it is plain Python
    code += "\nassert '<img' in run._repr_html_() and '<img' in found._repr_html_()\n"
    (tmp_path / "book.py").write_text(code)
    root = str(DOCS.parent)
    env = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    words = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "book.py"], **words)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert re.search(r"^quickstart +cgp +[\d.]+ %$", done.stdout, re.MULTILINE)
    assert "(24, 48) 0.0" in done.stdout
    assert (tmp_path / "embeddings.png").stat().st_size > 5_000
    made = (tmp_path / "runs/quickstart/plots/masks.png").read_bytes()
    assert made.startswith(b"\x89PNG")
    assert len(made) > 5_000


def test_page__its_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recordings").mkdir()
    rng = np.random.default_rng(0)
    wave = rng.standard_normal(16_000).astype(np.float32) / 10
    names = [f"{'ab'[i % 2]}{i // 2 or ''}" for i in range(8)]
    for name in names:
        write_wav(tmp_path / "recordings" / f"{name}.wav", wave * rng.uniform(0.5, 1.0))
    rows = [f"recordings/{name}.wav,{name[0]},{i // 2 % 2}" for i, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,fold", *rows]))
    tiny = {"model.width": 48, "model.depth": 2, "model.heads": 2, "objective.mask.views": 1,
            "objective.decoder_depth": 1, "data.clip_seconds": 1, "data.batch": 4,
            "data.workers": 0, "train.steps": 2}  # fmt: skip
    short = {"train.epochs": 1, "train.min_steps": 2, "head.prototypes": 8, "data.workers": 0,
             "data.clip_seconds": 1, "protocol.lrs": [1e-3], "protocol.prototype_lrs": [],
             "folds": [0], "diagnostics.encoder": False}  # fmt: skip
    tuned = {"train.steps": 2, "data.workers": 0, "data.batch": 4, "data.clip_seconds": 1,
             "folds": [0]}  # fmt: skip
    _with(monkeypatch, "pretrain", tiny)
    _with(monkeypatch, "probe", short)
    _with(monkeypatch, "finetune", tuned, drop=("train",))
    found: dict[str, Any] = {"wave": wave, "torch": torch}
    for block in re.findall(r"```python\n(.*?)```", _page("python.md"), re.DOTALL):
        exec(block, found)
    assert [row["method"] for row in found["found"].table] == ["cgp", "linear"]
    assert found["found"].out == Path("runs/x")
    assert len(found["answers"][0]["scores"]) == 2
    assert found["vectors"].shape == (2, 48)
    assert found["features"].patches.shape[:2] == (2, 1)


def _with(
    patch: pytest.MonkeyPatch, name: str, more: dict[str, Any], drop: tuple[str, ...] = ()
) -> None:
    """Gives ``bat.NAME`` more settings, and takes some keywords from it."""
    real = getattr(bat, name)

    @functools.wraps(real)
    def call(settings: Any = None, /, **keywords: Any) -> Any:
        kept = {key: value for key, value in keywords.items() if key not in drop}
        return real({**more, **(settings or {})}, **kept)

    patch.setattr(bat, name, call)
