"""EAT's and SSLAM's losses against loops over clips, patches and channels; their runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bat.config.compose import compose
from bat.config.schema import Pretrain
from bat.encoders import eat
from bat.encoders.base import MaskableEncoder
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.io import read_jsonl
from bat.nn.decoder import CNNDecoder
from bat.nn.embed import position_code
from bat.objectives.base import Objective
from bat.objectives.eat import EAT
from bat.objectives.masked_latent import Mask, MaskedLatent
from bat.objectives.sslam import SSLAM, mixed_ids, stripes
from bat.train.run_pretrain import pretrain
from bat.types import Grid, WaveBatch
from tests.train.runs import assert_same_run, run_and_cut, weights

GRID = Grid(16, 2)
CLOSE = {"atol": 1e-5, "rtol": 0}


def tiny(kind: type[MaskedLatent], **settings) -> MaskedLatent:
    torch.manual_seed(0)
    encoder = BAT(width=32, depth=3, heads=4, grid=GRID, gate=False)
    config = kind.Config(decoder_depth=2, mask=Mask(views=2, block=2), **settings)
    assert not [*config.problems(), *config.problems_with(width=32, tokens=GRID.tokens)]
    model = kind.build(config, encoder, seed=3)
    for parameter in model.teacher.parameters():  # a teacher that is not the student
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def clips(count: int = 3) -> Tensor:
    return torch.rand(count, 1, 256, 32, generator=torch.Generator().manual_seed(5))


def standard(values: Tensor) -> Tensor:
    """A vector, biased variance, eps 1e-5 inside the root."""
    return (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()


def rule(encoder: MaskableEncoder, tokens: Tensor, *, last: bool = False) -> Tensor:
    """EAT's target (n, D) of one clip's embedded patches (n, D), of all blocks or the last."""
    layers = [mlp[0, 1:] for _, mlp in encoder.layers(tokens[None])]
    layers = layers[-1:] if last else layers
    mean = torch.stack([torch.stack([standard(c) for c in h.T], 1) for h in layers]).mean(0)
    return torch.stack([standard(row) for row in mean])


def error(x: Tensor, y: Tensor) -> float:
    """EAT's e(x, y) = sum_d (x_d - y_d)^2 / sqrt(D)."""
    return float(((x - y) ** 2).sum() / len(x) ** 0.5)


def eats_sums(model: EAT, x: Tensor, wanted: list[Tensor], whole: list[Tensor], views) -> tuple:
    """The local sum, its number of patches and the global sum, as EAT's code has them."""
    torch.manual_seed(7)
    cls, predictions = model.student.predict(x, views)
    local, count, global_ = 0.0, 0, 0.0
    for row, ids in enumerate(views.masked_ids.tolist()):
        clip = row // model.mask.views
        for i, patch in enumerate(ids):
            local, count = local + error(predictions[row, i], wanted[clip][patch]), count + 1
        global_ += error(cls[row], whole[clip].mean(0))
    return local, count, global_


@torch.no_grad()
def test_eat__loss_is_that_of_its_code() -> None:
    """n masked patches: (local sum + n * global sum) / n; the weight is the views of a device."""
    model = tiny(EAT, global_weight=6.0)  # 3 clips x 2 views
    assert isinstance(model, EAT)
    x, views = clips(), model.draw_views(torch.arange(3))
    wanted = [rule(model.teacher.encoder, t) for t in model.teacher.encoder.embed_patches(x)]
    torch.testing.assert_close(model.targets(x)[0], torch.stack(wanted), **CLOSE)
    local, n, global_ = eats_sums(model, x, wanted, wanted, views)
    torch.manual_seed(7)
    losses = model.losses(x, views)
    assert float(losses.total) == pytest.approx((local + n * global_) / n, rel=1e-5)
    assert float(losses.local) == pytest.approx(local / n / 32**0.5, rel=1e-5)


def test_eat__masked_places_hold_fresh_noise_and_visible_ones_their_token() -> None:
    torch.manual_seed(0)
    decoder = CNNDecoder(32, Grid(64, 8), depth=1, noise=0.01)
    assert not any("mask_token" in name for name, _ in decoder.named_parameters())
    seen: list[Tensor] = []
    decoder.convs[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    views = tiny(EAT, noise=0.0).draw_views(torch.arange(1))  # any masks; here of its own grid
    decoder.grid = GRID
    visible = torch.ones(2, views.keep_ids.shape[1], 32)
    for _ in range(2):
        decoder(visible, views)
    flat = [x.flatten(2).transpose(1, 2) for x in seen]  # (rows, N, D)
    assert all(torch.equal(x[~views.mask], torch.ones_like(x[~views.mask])) for x in flat)
    noise = torch.stack([x[views.mask] for x in flat])
    assert float(noise.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert not torch.equal(noise[0], noise[1])


def test_eat__base_decoder_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        decoder = CNNDecoder(768, Grid(64, 8), depth=6, noise=0.01)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (decoder.convs, decoder.out_proj)]
    assert sizes == [1_995_264, 590_592]


def test_eat__encoder_starts_and_is_coded_as_published() -> None:
    torch.manual_seed(0)
    encoder = eat.EAT(width=96, depth=1, heads=4, grid=Grid(8, 4))
    code = position_code(96, Grid(8, 4), "eat")[0]
    torch.testing.assert_close(encoder.pos_embed[0], code)
    assert torch.equal(code[0 * 4 + 1, :48], code[5 * 4 + 1, :48])  # the same frequency
    assert torch.equal(code[5 * 4 + 0, 48:], code[5 * 4 + 3, 48:])  # the same time
    assert float(encoder.cls_token.detach().std()) == pytest.approx(1, abs=0.2)
    assert float(encoder.blocks[0].mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@torch.no_grad()
def test_sslam__losses_are_those_of_the_loop() -> None:
    model = tiny(SSLAM)
    assert isinstance(model, SSLAM)
    x, positions = clips(), torch.arange(3)
    views, mixed = model.draw_views(positions), model.draw_mixed(positions)
    teacher, mixtures = model.teacher.encoder, []
    for b in range(3):
        own, partner = x[b, 0], x[b - 1, 0]
        rows = [
            torch.maximum(own[t], partner[t]) if mixed[b, t // 16] else own[t] for t in range(256)
        ]
        mixtures.append(torch.stack(rows)[None])
    both = torch.cat([x, torch.stack(mixtures)])
    torch.testing.assert_close(model.with_mixtures(x, mixed), both)
    tokens = teacher.embed_patches(both)
    wanted = [rule(teacher, t) for t in tokens]
    whole = [rule(teacher, t, last=True) for t in tokens]
    sources = []
    for b in range(3):
        ids = [i for i in range(GRID.tokens) if mixed[b, i // GRID.freq]]
        target = wanted[b].clone()
        target[ids] = (wanted[b][ids] + rule(teacher, tokens[(b - 1) % 3][ids])) / 2
        sources.append(target)
    y, means, s = model.mixture_targets(x, mixed)
    torch.testing.assert_close(y, torch.stack(wanted), **CLOSE)
    torch.testing.assert_close(means, torch.stack([g.mean(0) for g in whole]), **CLOSE)
    torch.testing.assert_close(s, torch.stack(sources), **CLOSE)

    doubled = type(views)(views.keep_ids.repeat(2, 1), views.mask.repeat(2, 1))
    local, n, global_ = eats_sums(model, both, wanted, whole, doubled)
    torch.manual_seed(7)
    _, predictions = model.student.predict(both, doubled)
    rows = [(r, b) for b in range(3) for r in (2 * b, 2 * b + 1)]
    each = [
        error(predictions[6 + r, i], sources[b][patch])
        for r, b in rows
        for i, patch in enumerate(views.masked_ids[r].tolist())
    ]
    torch.manual_seed(7)
    got = model.mixture_losses(x, mixed, views, y, means, s)
    expected = local / n + sum(each) / len(each) + 192 * global_ / 12
    assert float(got["loss"]) == pytest.approx(expected, rel=1e-5)


def test_sslam__stripes_are_two_of_240_frames_drawn_from_seed_and_position() -> None:
    both = stripes(Grid(64, 8), torch.arange(5_000))
    assert (both.sum(1) == 30).all()  # 34 of 64 time patches are mixed
    first = both.int().argmax(1)
    assert set(first.tolist()) == set(range(32))
    assert not both[:, 63].any()  # the last stripe starts at 48 at the latest
    assert both[:, 62].any()
    model = tiny(SSLAM)
    assert isinstance(model, SSLAM)
    assert torch.equal(model.draw_mixed(torch.tensor([4, 9])).flip(0), model.draw_mixed(
        torch.tensor([9, 4])))  # fmt: skip
    mixed = model.draw_mixed(torch.arange(4))
    ids = mixed_ids(mixed, GRID.freq)
    for row in range(4):
        named = [i for i in range(GRID.tokens) if mixed[row, i // GRID.freq]]
        assert ids[row].tolist() == named


def test_sslam__one_clip_cannot_be_mixed() -> None:
    model = tiny(SSLAM)
    batch = WaveBatch(
        torch.zeros(1, 16_000), torch.tensor([16_000]), torch.zeros(1, 0), ["a"], torch.zeros(1), []
    )
    with pytest.raises(UserError, match=r"data\.batch"):
        model(batch)


@pytest.mark.parametrize("word", ["objective.noise=0.1", "objective.decoder_kernel=5"])
def test_eat_settings__of_the_convolutions_are_refused_without_them(word: str) -> None:
    words = ["recipe=toy", "objective=eat", "objective.decoder=cross", word]
    with pytest.raises(UserError, match=word.split("=")[0]):
        compose(Pretrain, "pretrain", words)


def run_of(name: str, out: Path, cache: Path, *words: str, steps: int = 4) -> Pretrain:
    small = ["recipe=toy", f"objective={name}", "model.width=48", "model.depth=2", "model.heads=2"]
    small += ["objective.decoder_depth=1", "objective.mask.views=2", f"train.steps={steps}"]
    small += ["train.save_every=2", "train.log_every=1", "log.progress=false", f"out={out}"]
    small += ["online.every=4", "online.steps=2", "online.folds=1", f"data.cache={cache}"]
    return compose(Pretrain, "pretrain", [*small, *words])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eat", "sslam"])
def test_run__resumes_bit_for_bit_exports_and_is_probed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cache = tmp_path / "whole", tmp_path / "shards"
    pretrain(run_of(name, whole, cache))
    run_and_cut(monkeypatch, run_of(name, tmp_path / "parts", cache), at=3)
    pretrain(run_of(name, tmp_path / "parts", cache))
    assert_same_run(whole, tmp_path / "parts")
    assert {n.partition(".")[0] for n in weights(whole)} == {"student", "teacher"}
    rows = [r for r in read_jsonl(whole / "metrics.jsonl") if "loss" in r]
    assert ("loss_source" in rows[0]) == (name == "sslam")
    summary = json.loads((whole / "summary.json").read_text())
    assert [r["step"] for r in summary["online"]] == [0, 4]
    stage = run_of("sslam", tmp_path / "stage2", cache, f"init={whole}", steps=1)
    pretrain(stage)  # SSLAM goes on from either
    assert (tmp_path / "stage2" / "export" / "model.safetensors").is_file()


def built(words: list[str]) -> Objective:
    from bat.train.pretrain import build_objective

    small = ["model.width=48", "model.depth=2", "model.heads=4", "data.root=x"]
    with torch.device("meta"):
        return build_objective(compose(Pretrain, "pretrain", [*words, *small]))


@pytest.mark.parametrize("recipe", ["eat-as2m", "sslam-as2m", "mae-as2m"])
def test_recipe__builds_what_it_names(recipe: str) -> None:
    model = built([f"recipe={recipe}", "objective.decoder_width=48"])
    assert type(model).__name__.lower() == recipe.partition("-")[0]
    encoder = model.encoders()["student"]
    assert not encoder.gate
    assert type(encoder.frontend).__name__ == "KaldiFbank"
    assert (encoder.frontend.mean, encoder.frontend.std) == (-4.268, 4.569)
