"""The encoder seam: encoders without class token or frequency axis, the example of the docs."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bat
from bat.cli import finetune, probe
from bat.encoders.base import Encoder, find_encoder
from bat.errors import UserError
from bat.probes.base import build_probe, known_probes, takes_encoder
from bat.types import Features


@pytest.fixture
def page(docs_example: Callable[[str, str], str]) -> str:
    return docs_example("add_an_encoder.md", "my_encoders")


@pytest.fixture
def example(page: str) -> type[Encoder]:
    return find_encoder("my_encoders.FrameTransformer")


def kinds(example: type[Encoder]) -> dict[str, Encoder]:
    """One encoder of each kind: F = 1 or 4, with a class token or without."""

    class Bands(example):  # type: ignore[valid-type, misc]
        def features(self, inputs: Tensor, *, entry: bool = False) -> Features:
            patches = super().features(inputs).patches  # (L, B, T, 1, D)
            return Features(torch.cat([patches * k for k in (1, 2, -1, 3)], dim=3), None)

    class WithClass(example):  # type: ignore[valid-type, misc]
        has_cls = True

        def features(self, inputs: Tensor, *, entry: bool = False) -> Features:
            patches = super().features(inputs).patches
            return Features(patches, patches.mean((2, 3)))

    torch.manual_seed(0)
    made = {"frames": example(), "bands": Bands(), "class": WithClass()}
    return {name: encoder.eval() for name, encoder in made.items()}


WAVES = torch.randn(3, 16000, generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([16000, 5000, 4800])


def test_features__a_clip_is_what_it_is_alone(example: type[Encoder]) -> None:
    for encoder in kinds(example).values():
        together = encoder(WAVES, LENGTHS)
        assert together.valid.tolist() == [50, 16, 15]
        for row, length in enumerate(LENGTHS):
            alone = encoder(WAVES[row : row + 1, :length])
            own = together.clip(row)
            torch.testing.assert_close(own.patches, alone.patches, atol=1e-5, rtol=0)
            if encoder.has_cls:
                torch.testing.assert_close(own.cls, alone.cls, atol=1e-5, rtol=0)


def test_probes__take_every_kind_of_encoder(example: type[Encoder]) -> None:
    for kind, encoder in kinds(example).items():
        with torch.no_grad():
            features = encoder(WAVES, LENGTHS)
        shape = {"width": encoder.width, "depth": encoder.depth, "has_cls": encoder.has_cls}
        for name, cls in known_probes().items():
            for level in cls.levels:
                head = {"classes": 3, "level": level, "prototypes": 5, "hidden": 6, **shape}
                if takes_encoder(cls):
                    with pytest.raises(UserError, match="vqt"):
                        build_probe(name, encoder=encoder, **head)
                    continue
                made = build_probe(name, **head)
                logits = made(features)
                wanted = (3, 3) if level == "clip" else (3, 50 * cls.outputs_per_patch, 3)
                assert logits.shape == wanted, (
                    kind,
                    name,
                )
                logits.sum().backward()
                moved = any(p.grad is not None and p.grad.any() for p in made.parameters())
                assert moved, (kind, name)


def test_commands__probe_tune_export_and_load_an_encoder_from_outside(
    example: type[Encoder], page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three commands of the page, run as printed but for fewer steps."""
    monkeypatch.chdir(tmp_path)
    torch.save(example(depth=3).state_dict(), "weights.pt")
    with pytest.raises(UserError, match=r"unexpected: blocks\.2"):
        bat.load_encoder("my_encoders.FrameTransformer:weights.pt")  # strictly, and of depth 2
    torch.save(example().state_dict(), "weights.pt")
    page = page.replace("\\\n", "")
    lines = re.findall(r"^PYTHONPATH=. bat-(\S+) (.*)$", page, re.MULTILINE)
    assert [command for command, _ in lines] == ["probe", "probe", "finetune"]
    quick = ["train.steps=2", "log.progress=false", "hardware.precision=32-true", "data.workers=0"]
    for number, (command, line) in enumerate(lines):
        words = [*shlex.split(line), f"out={tmp_path / str(number)}", *quick]
        words += ["bootstrap=100", "diagnostics.encoder=false"] * (command == "probe")
        assert {"probe": probe, "finetune": finetune}[command].main(words) == 0, line
    made = json.loads((tmp_path / "1" / "summary.json").read_text())
    (entry,) = made["encoders"].values()
    assert entry["backbone"] == "my_encoders.FrameTransformer"
    assert set(entry["results"]) == {"linear", "cgp"}
    assert probe.main(["report", str(tmp_path / "1")]) == 0
    assert "FrameTransformer" in (tmp_path / "1" / "report.html").read_text()
    fold = sorted((tmp_path / "2").glob("fold-*/export"))[0]
    with pytest.raises(UserError, match=r"my_encoders\.FrameTransformer:.*fold"):
        bat.load_encoder(fold)  # a file alone imports nothing
    tuned = bat.load_encoder(f"my_encoders.FrameTransformer:{fold}")
    assert type(tuned) is example
    before = torch.load("weights.pt", weights_only=True)
    assert any(not torch.equal(before[n], p) for n, p in tuned.state_dict().items())
