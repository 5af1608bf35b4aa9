"""``bat-probe checkpoint=A,B,...``: encoders of several projects in one table; fine-tuning one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bat
from bat.cli import finetune, probe
from tests.encoders.test_beats import CFG, published
from tests.encoders.test_beats import tiny as tiny_beats
from tests.encoders.tiny import tiny, tiny_hf
from tests.test_weights import eat, fairseq_names

QUICK = ["recipe=toy", "log.progress=false", "hardware.precision=32-true", "data.workers=0"]
QUICK += ["train.steps=2", "train.log_every=1"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file or folder of each kind, by its name in results."""
    tmp_path = tmp_path_factory.mktemp("checkpoints")
    pytest.importorskip("transformers", reason="the extra [hf] is not installed")
    torch.save({"args": {"num_heads": 2}, "model": tiny("bat").state_dict()}, tmp_path / "ours.pt")
    torch.save({"model": fairseq_names(eat())}, tmp_path / "EAT.pt")
    torch.save({"cfg": CFG, "model": published(tiny_beats())}, tmp_path / "BEATs.pt")
    found = {name: str(tmp_path / f"{name}.pt") for name in ("ours", "EAT", "BEATs")}
    for kind in ("ast", "wav2vec2"):
        found[kind] = f"hf:{tiny_hf(kind, tmp_path / kind)}"
    front = tmp_path / "wav2vec2" / "preprocessor_config.json"
    front.write_text(front.read_text().replace("16000", "8000"))  # another rate
    return found


def test_probe__encoders_of_several_projects_are_one_table(
    checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoders = {name: bat.load_encoder(checkpoint) for name, checkpoint in checkpoints.items()}
    assert {e.sample_rate for e in encoders.values()} == {8000, 16000}
    every = [*checkpoints.values(), *(f"random:{checkpoints[n]}" for n in ("BEATs", "ast"))]
    words = [f"checkpoint={','.join(every)}", f"out={tmp_path / 'out'}", "folds=[1]"]
    words += ["bootstrap=100", "diagnostics.encoder=false", f"data.cache={tmp_path / 'cache'}"]
    assert probe.main([*QUICK, *words, "--method", "linear,cgp"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["encoders"]
    for name, encoder in encoders.items():
        assert name in printed
        for entry in (found[name], found.get(f"random-{name}", found[name])):
            assert set(entry["results"]) == {"linear", "cgp"}
            has_cls = encoder.has_cls or name == "BEATs"  # protocol=bat: its mean patch is one
            sizes = (encoder.width, encoder.depth, has_cls)
            assert (entry["width"], entry["depth"], entry["has_cls"]) == sizes
    assert {name: entry["backbone"] for name, entry in found.items()} == {
        "ours": "bat", "EAT": "eat", "BEATs": "beats", "ast": "hf", "wav2vec2": "hf",
        "random-BEATs": "beats", "random-ast": "hf",
    }  # fmt: skip
    assert probe.main(["report", str(tmp_path / "out")]) == 0
    assert "wav2vec2" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("name", ["BEATs", "wav2vec2", "ast"])
def test_finetune__trains_and_exports_it(
    checkpoints: dict[str, str], name: str, tmp_path: Path
) -> None:
    words = [f"checkpoint={checkpoints[name]}", f"out={tmp_path / 'out'}", "drop_path=0"]
    words += ["augment.spec_freq=0", "augment.spec_time=0", f"data.cache={tmp_path / 'cache'}"]
    assert finetune.main([*QUICK, *words, "folds=[1]"]) == 0
    before, after = bat.load_encoder(checkpoints[name]), bat.load_encoder(tmp_path / "out")
    assert type(after) is type(before)
    ours, theirs = after.state_dict(), before.state_dict()
    assert ours.keys() == theirs.keys()
    moved = {after.layer_of(n) for n in ours if not torch.equal(ours[n], theirs[n])}
    assert {0, 1, 2} <= moved
