"""bat: one command for all, its lists and settings, completion; nothing of it imports torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bat.cli import bat, describe, pretrain, probe
from bat.config import locate
from bat.config.compose import compose, to_dict
from bat.probes.base import known_probes
from bat.registry import known


def test_bat__a_command_is_a_file_of_cli(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"pretrain", "finetune", "probe", "shard"} <= set(bat.commands())
    with pytest.raises(SystemExit, match="0"):
        bat.main(["shard", "--help"])
    assert "usage: bat-shard" in capsys.readouterr().out
    assert bat.main(["prob"]) == 2
    assert "did you mean 'probe'?" in capsys.readouterr().err


def test_lists__have_a_line_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(describe.components("probes")) == set(known_probes())
    for folder in ("probes", "tasks", "encoders", "objectives"):
        assert all(len(line) > 15 for line in describe.components(folder).values()), folder
    for command in describe.SCHEMAS:
        assert list(describe.recipes(command)) == locate.known_recipes(command)
        assert all(len(line) > 15 for line in describe.recipes(command).values()), command
    for name in ("recipes", "methods", "tasks", "encoders", "objectives"):
        assert bat.main([name]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in [*known("tasks"), *known_probes(), "own"])


@pytest.mark.parametrize("command", describe.SCHEMAS)
def test_settings__are_those_of_the_schema_and_all_have_a_meaning(command: str) -> None:
    found = {s.key: s for s in describe.settings(command)}
    config = compose(describe.SCHEMAS[command], command, ["recipe=toy"])

    def keys(tree: dict, prefix: str = "") -> set[str]:
        below = {k: v for k, v in tree.items() if isinstance(v, dict)}
        own = {prefix + k for k in tree.keys() - below.keys()}
        return own.union(*(keys(v, f"{prefix}{k}.") for k, v in below.items()))

    assert keys(to_dict(config)) <= set(found)
    assert {k for k in found if not k.startswith("objective.")} <= keys(to_dict(config))
    assert [key for key, s in found.items() if not s.meaning] == []
    odd = re.compile(r"Annotated|Literal|Range|Positive|Zero|None|be ")
    assert [key for key, s in found.items() if odd.search(s.kind)] == []


def test_settings__show_type_range_unit_default(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in {
        ("data.clip_seconds",): "data.clip_seconds=10.0 float, positive, in s",
        ("objective.ema.start",): "objective.ema.start=0.9998 float, in [0, 1]",
        ("gate",): "model.gate=true true | false",
    }.items():
        with pytest.raises(SystemExit, match="0"):
            pretrain.main(["--settings", *words])
        assert expected in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="2"):
        probe.main(["--settings", "dat"])
    assert "did you mean data?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bat pro", ["probe"]),
        ("bat-probe recipe=es", ["recipe=esc10", "recipe=esc50"]),
        ("/some/where/bat-probe recipe=toy optim.l", ["optim.lr=", "optim.layer_decay="]),
        ("bat probe model.nothing", []),
        ("bat-probe --method cgp,lin", ["cgp,linear"]),
        ("bat-finetune hardware=ddp task=toy_t", ["task=toy_tokens"]),
        ("bat-pretrain model.norm_order=", ["model.norm_order=post", "model.norm_order=pre"]),
        ("bat-pretrain --allow", ["--allow-pipe"]),
        ("bat-pretrain recipe=toy checkpoint=ru", []),
    ],
)
def test_complete__offers_what_fits(line: str, expected: list[str]) -> None:
    assert bat.complete(line) == expected


def test_completion__bash_replaces_what_follows_the_last_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "done").write_bytes(_run("completion", "bash"))
    line = "bat-probe recipe=esc1"
    script = f"source {tmp_path}/done; COMP_LINE='{line}' COMP_POINT={len(line)}; _bat; "
    done = subprocess.run(
        ["bash", "-c", script + 'printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True
    )
    assert done.stdout.split() == ["esc10"], done.stderr


def _run(*words: str) -> bytes:
    command = [sys.executable, "-X", "importtime", "-m", "bat.cli.bat", *words]
    done = subprocess.run(command, capture_output=True, env=os.environ, check=True)
    imported = set(re.findall(r"\| +(\w+)\n", done.stderr.decode()))
    assert "bat" in imported
    assert not imported & {"torch", "numpy", "lightning"}
    return done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["probe", "--help"],
        ["pretrain", "--settings"],
        ["recipes"],
        ["methods"],
        ["--complete", "bat pro"],
    ],
)
def test_help__imports_nothing_heavy(words: list[str]) -> None:
    assert _run(*words)
