"""All encoders of the pre-norm ViT family: a clip alone and in a batch, rebuilding, commands."""

import json
from pathlib import Path

import pytest
import torch

from bat.cli import probe
from bat.encoders.base import find_encoder
from bat.errors import UserError
from tests.encoders.vits import CLOSE, VITS, clip, made

every_encoder = pytest.mark.parametrize("name", VITS)


@every_encoder
def test_vit__a_clip_is_what_it_is_alone(name: str) -> None:
    """0.3, 1 and 5 s, in chunks and without, noise behind their ends; the first is quiet and ends
    in silence, the last is loud."""
    encoder = made(name)
    clips = [clip(seconds, seed=i) for i, seconds in enumerate((0.3, 1.0, 5.0))]
    clips[0] *= 1e-3
    clips[0][3000:] = 0
    clips[2] *= 20
    lengths = torch.tensor([len(wave) for wave in clips])
    waves = 3 * torch.randn(3, 80000, generator=torch.Generator().manual_seed(9))
    for row, wave in enumerate(clips):
        waves[row, : len(wave)] = wave
    with torch.no_grad():
        batch = encoder(waves, lengths)
        for row, wave in enumerate(clips):
            alone, own = encoder(wave), batch.clip(row)
            assert batch.valid[row] == alone.patches.shape[2]
            torch.testing.assert_close(own.patches, alone.patches, **CLOSE)
            if encoder.has_cls:
                torch.testing.assert_close(own.cls, alone.cls, **CLOSE)


@every_encoder
def test_vit__config_and_weights_rebuild_it(name: str, tmp_path: Path) -> None:
    encoder = made(name, drop_path=0.25)
    config = json.loads(json.dumps(encoder.config()))
    again = find_encoder(name).from_weights(encoder.state_dict(), config=config, heads=None)
    assert again.config() == encoder.config()
    assert again.blocks[1].drop_path.rate == 0.25
    with torch.no_grad():
        assert torch.equal(again.eval()(clip(0.4)).patches, encoder(clip(0.4)).patches)
    for wrong, message in (
        ({"depth": 3}, r"missing: blocks\.2"),
        ({"depth": 10**6}, "depth="),
        ({"width": 16384}, "shape: "),  # nothing of that size is built
        ({"colour": 1}, "colour"),
    ):
        with pytest.raises(UserError, match=message):
            find_encoder(name).from_weights(
                encoder.state_dict(), config={**config, **wrong}, heads=None
            )


@every_encoder
def test_vit__layers_and_decay_of_parameters(name: str) -> None:
    encoder = made(name)
    layers = {n: encoder.layer_of(n) for n, _ in encoder.named_parameters()}
    assert {n.split(".")[0] for n, layer in layers.items() if layer == 3} == {"norm"}
    for n, layer in layers.items():
        assert layer == (int(n.split(".")[1]) + 1 if n.startswith("blocks.") else layer)
        assert layer == 0 or n.startswith(("blocks.", "norm."))
    assert encoder.no_weight_decay() <= set(encoder.state_dict())
    tokens = {n for n, p in encoder.named_parameters() if "token" in n or "pos_embed" in n}
    assert tokens <= encoder.no_weight_decay()


@every_encoder
def test_vit__gradients_reach_every_parameter(name: str) -> None:
    encoder = made(name, drop_path=0.1).train()
    found = encoder(clip(0.9, seed=1)[None].expand(2, -1))
    (found.patches[-1].square().sum() + found.patches[0].sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())


def test_probe__takes_files_of_every_encoder(tmp_path: Path) -> None:
    """One table of four files, each known by its names and with a front end of its own."""
    files = []
    for name in VITS:
        encoder = made(name)
        state = encoder.state_dict()
        if name == "m2d":
            state |= {"norm_stats": torch.tensor([-6.0, 4.0])}
        torch.save({"model": state}, tmp_path / f"{name}.pth")
        files.append(str(tmp_path / f"{name}.pth"))
    quick = ["train.steps=2", "log.progress=false", "hardware.precision=32-true", "data.workers=0"]
    words = ["recipe=toy", f"checkpoint={','.join(files)}", "heads=2", f"out={tmp_path / 'run'}"]
    words += [*quick, "bootstrap=100", "diagnostics.encoder=false", "--method", "linear"]
    assert probe.main(words) == 0
    made_by = json.loads((tmp_path / "run" / "summary.json").read_text())["encoders"]
    names = [entry["backbone"] for entry in made_by.values()]
    assert names == list(VITS)
    assert all("linear" in entry["results"] for entry in made_by.values())


@every_encoder
def test_find_encoder__knows_its_name_and_the_defaults_are_base(name: str) -> None:
    with torch.device("meta"):
        encoder = find_encoder(name)()
    assert (encoder.width, encoder.depth, encoder.heads) == (768, 12, 12)
