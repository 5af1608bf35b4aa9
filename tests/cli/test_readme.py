"""The commands in README.md and docs/ are ones that the program takes."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from bat.tasks.synthetic import write_wav

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("pretrain", "probe", "finetune")
NAMES = [f"bat-{name}" for name in (*RECIPES, "shard", "export", "embed", "predict")]


def commands() -> list[list[str]]:
    """The words of every ``bat-NAME ...`` in the code blocks, comments and pipes left away."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|;|\|", line.partition(" #")[0]):
                    words = shlex.split(part) if "bat-" in part else []
                    start = next((i for i, w in enumerate(words) if w in NAMES), None)
                    if start is not None and not {"...", "recipe=<TAB>", "init=CHECKPOINT"} & {
                        *words
                    }:
                        found.append(words[start:])
    return found


def test_readme__its_commands_are_found() -> None:
    assert {words[0] for words in commands()} == {*NAMES}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command__is_understood(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "recordings").mkdir()
    write_wav(tmp_path / "recordings" / "a.wav", np.zeros(16_000))
    monkeypatch.chdir(tmp_path)
    command, given = words[0].removeprefix("bat-"), words[1:]
    main = importlib.import_module(f"bat.cli.{command}").main
    if command in RECIPES and given[:1] != ["report"]:
        if any(re.search(r"my_\w+\.", word) for word in given):
            pytest.skip("names code of the page's example, which the test of that page runs")
        assert main([*given, "--print-config"]) == 0, capsys.readouterr().err
        return
    with pytest.raises(SystemExit):
        main([*(given[:1] if given[:1] in (["verify"], ["info"], ["report"]) else []), "--help"])
    said = capsys.readouterr().out
    assert all(word.split("=")[0] in said for word in given if word.startswith("--"))
