"""The masked autoencoder: its loss against a loop, its masks, and a run of it."""

import json
from pathlib import Path

import pytest
import torch

import bat
from bat.config.compose import compose
from bat.config.schema import Finetune, Pretrain, Probe
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.io import read_jsonl
from bat.nn.block import blocks_of
from bat.objectives.mae import MAE, patch_targets
from bat.train.run_pretrain import pretrain
from bat.types import Grid
from tests.reference import mae as slow
from tests.train.runs import assert_same_run, run_and_cut, weights

GRID = Grid(6, 4)


def tiny(seed: int = 0, **settings) -> MAE:
    torch.manual_seed(0)
    config = MAE.Config(decoder_depth=1, decoder_heads=2, **settings)
    assert not [*config.problems_with(width=32, tokens=GRID.tokens)]
    return MAE.build(config, BAT(width=32, depth=2, heads=4, grid=GRID), seed=seed)


def clips(count: int = 3) -> torch.Tensor:
    """(count, 1, 96, 64)"""
    return torch.rand(count, 1, 96, 64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("width", [None, 16])
def test_mae_loss__equals_the_loop(width: int | None) -> None:
    model = tiny(decoder_width=width)
    views = model.draw_views(torch.arange(3))
    with torch.no_grad():
        _, visible = model.student.encoder.encode_views(clips(), views)
        predictions = model.student.decoder(visible, views)
        got = model.reconstruction_loss(clips(), views)
    assert predictions.shape == (3, 24 - int(24 * (1 - 0.8)), 256)
    assert float(got) == pytest.approx(slow.loss(clips(), predictions, views.mask, patch=16), 1e-5)


def test_mae_targets__are_the_patches_in_the_order_of_tokens() -> None:
    x = clips(1)
    targets = patch_targets(x, 16)
    square = x[0, 0, 16:32, 32:48]  # time 1, frequency 2
    wanted = (square - square.mean()) / (square.var(correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(targets[0, 1 * 4 + 2].view(16, 16), wanted, atol=1e-5, rtol=0)
    assert float(patch_targets(torch.full((1, 1, 32, 32), 3.0), 16).abs().max()) == 0


def test_mae_loss__is_one_for_a_constant_prediction_and_trains_every_part() -> None:
    model = tiny()
    views = model.draw_views(torch.arange(3))
    loss = model.reconstruction_loss(clips(), views)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.nn.init.zeros_(model.student.decoder.out_proj.weight)
    assert model.reconstruction_loss(clips(), views).item() == pytest.approx(1, abs=1e-3)


def test_mae_masks__depend_on_seed_and_position_alone_and_are_uniform() -> None:
    model = tiny(mask_ratio=0.5)

    def kept(positions: list[int], model: MAE = model) -> torch.Tensor:
        return model.draw_views(torch.tensor(positions)).keep_ids

    both = kept([7, 8])
    assert torch.equal(both.flip(0), kept([8, 7]))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, kept([7, 8], tiny(seed=1, mask_ratio=0.5)))
    shown = (~model.draw_views(torch.arange(20_000)).mask).float()  # 12 of 24 patches
    assert float((shown.mean(0) - 0.5).abs().max()) < 0.02  # 5 deviations
    together = (shown.T @ shown / len(shown))[0, 1:]  # with any other patch alike
    assert float((together - 12 / 24 * 11 / 23).abs().max()) < 0.02


def test_mae_units__hold_each_block_once() -> None:
    model = tiny()
    parts = [part for unit in model.units() for part in blocks_of(unit)]
    assert sorted(map(id, parts)) == sorted(map(id, blocks_of(model)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective.mask_ratio=1.5"], "objective.mask_ratio=1.5"),
        (["objective.mask_ratio=0.999"], "keeps 0 of 104 patches"),
        (["objective.decoder_heads=0"], "objective.decoder_heads=0"),
        (["objective.decoder_width=20"], "multiple of 4 and of objective.decoder_heads=8"),
        (["objective.decoder_widht=24"], "did you mean 'objective.decoder_width'"),
        (["objective.target=mlp"], "unknown key 'objective.target'"),
    ],
)
def test_mae_settings__what_is_wrong_is_named(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(Pretrain, "pretrain", ["recipe=toy", "objective=mae", *words])
    assert said in str(caught.value)


def mae_run(out: Path, cache: Path, *words: str) -> Pretrain:
    small = ["recipe=toy", "objective=mae", "model.width=48", "model.depth=2", "model.heads=2"]
    small += ["objective.decoder_depth=1", "objective.decoder_heads=4", "train.steps=4"]
    small += ["train.save_every=2", "train.log_every=1", "log.progress=false", f"out={out}"]
    small += ["online.every=4", "online.steps=2", "online.folds=1", f"data.cache={cache}"]
    return compose(Pretrain, "pretrain", [*small, *words])


def test_mae_run__resumes_bit_for_bit_exports_and_is_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bat.eval.probe import probe
    from bat.train.finetune import finetune

    whole, cache = tmp_path / "whole", tmp_path / "shards"
    pretrain(mae_run(whole, cache))
    run_and_cut(monkeypatch, mae_run(tmp_path / "parts", cache), at=3)
    pretrain(mae_run(tmp_path / "parts", cache))
    assert_same_run(whole, tmp_path / "parts")
    assert {n.partition(".")[0] for n in weights(whole)} == {"student"}
    rows = [r for r in read_jsonl(whole / "metrics.jsonl") if "loss" in r]
    assert 0.5 < rows[0]["loss"] < 3
    assert "loss_local" not in rows[0]
    assert (whole / "plots" / "masks.png").is_file()
    summary = json.loads((whole / "summary.json").read_text())
    assert [r["step"] for r in summary["online"]] == [0, 4]
    looked = [r for r in read_jsonl(whole / "metrics.jsonl") if "health/student_rank" in r]
    assert looked
    assert "health/teacher_rank" not in looked[0]

    with pytest.raises(UserError, match=r"no teacher.*weights=student"):
        bat.load_encoder(whole, weights="teacher")
    exported = bat.load_encoder(whole).state_dict()
    saved = bat.load_encoder(whole / "checkpoints" / "last.ckpt", heads=2).state_dict()
    assert all(torch.equal(exported[n], saved[n]) for n in exported)
    common = [f"checkpoint={whole}", f"data.cache={cache}", "train.steps=2"]
    probe(
        compose(
            Probe, "probe", ["recipe=toy", *common, f"out={tmp_path / 'p'}", "methods=[linear]"]
        )
    )
    finetune(compose(Finetune, "finetune", ["recipe=toy", *common, f"out={tmp_path / 'f'}"]))
