"""The probe seam: the example of docs/add_a_probe.md, run as printed."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bat.cli import probe
from bat.probes.base import build_probe
from bat.types import Features

NAME = "my_probes.StatisticsPooling"


@pytest.fixture
def page(docs_example: Callable[[str, str], str]) -> str:
    return docs_example("add_a_probe.md", "my_probes")


def test_probe_of_the_docs__a_clip_alone_and_in_padding_is_the_same(page: str) -> None:
    made = build_probe(NAME, classes=3, width=4, depth=2, has_cls=False)
    patches = torch.randn(2, 2, 5, 3, 4)
    patches[:, 1, 2:] = 0  # the second clip has two time patches
    logits = made(Features(patches, None, valid=torch.tensor([5, 2])))
    alone = made(Features(patches[:, 1:, :2], None))
    torch.testing.assert_close(logits[1:], alone)
    z = patches[-1, 1, :2].flatten(0, 1)  # (6, D)
    x = torch.cat([z.mean(0), z.var(0, unbiased=False).sqrt()])
    torch.testing.assert_close(alone[0], made.linear(x), atol=1e-4, rtol=1e-4)


def test_probe_of_the_docs__its_command_runs_as_printed(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"^PYTHONPATH=. bat-probe (.*)$", page, re.MULTILINE)
    words = [*shlex.split(line), "out=run", "train.steps=4", "log.progress=false"]
    assert probe.main(words) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    (entry,) = summary["encoders"].values()
    assert list(entry["results"]) == ["linear", NAME]
