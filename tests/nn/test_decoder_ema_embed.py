"""Position code, decoders, EMA: numbers."""

import json

import pytest
import timm.layers
import torch
from torch import nn

from bat.nn.block import Mlp
from bat.nn.decoder import CNNDecoder, ViTDecoder, place
from bat.nn.ema import ema_decay, ema_update
from bat.nn.embed import PatchEmbed, position_code
from bat.nn.masking import inverse_block_mask
from bat.types import Grid
from tests.golden_files import Golden
from tests.reference.decoder import all_patches

GRID = Grid(6, 4)


def views(rows: int = 4, grid: Grid = GRID):
    return inverse_block_mask(rows, grid, generator=torch.Generator().manual_seed(0))


def test_position_code__layouts_are_the_stated_bijection_of_each_other() -> None:
    grid = Grid(64, 8)
    reference, faithful = (position_code(32, grid, layout)[0] for layout in ("reference", "grid"))
    for t, f in ((0, 0), (1, 0), (8, 3), (63, 7), (10, 5)):
        cell_f, cell_t = t // 8, 8 * (t % 8) + f  # docs/method.md 2
        assert torch.equal(reference[t * 8 + f], faithful[cell_t * 8 + cell_f])


def test_golden_position_code__rows_and_columns(golden) -> None:
    data = Golden(golden / "encoder_tiny.npz")
    code = position_code(768, Grid(64, 8))[0]
    rows = data["pos768_rows_0_1_63_64_65_511"]
    torch.testing.assert_close(code[[0, 1, 63, 64, 65, 511]], rows, atol=1e-5, rtol=0)
    columns = data["pos768_col_0_191_192_383_384_767"]
    torch.testing.assert_close(code[:, [0, 191, 192, 383, 384, 767]], columns, atol=1e-5, rtol=0)
    torch.testing.assert_close(position_code(48, GRID), data["w/pos_embed"], atol=1e-6, rtol=0)


def test_patch_embed__equals_the_strided_convolution() -> None:
    embed, x = PatchEmbed(4, 12).double(), torch.randn(3, 1, 24, 16, dtype=torch.float64)
    expected = embed.proj(x).flatten(2).transpose(1, 2)  # time-major
    torch.testing.assert_close(embed(x), expected, atol=1e-12, rtol=0)
    timms = timm.layers.PatchEmbed(img_size=(24, 16), patch_size=4, in_chans=1, embed_dim=12)
    assert set(timms.state_dict()) == set(embed.state_dict())


def test_mlp__is_timms() -> None:
    ours, timms = Mlp(8, 20), timm.layers.Mlp(8, 20)
    timms.load_state_dict(ours.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(ours(x), timms(x))


def test_place__puts_visible_tokens_where_they_belong() -> None:
    v = views()
    visible = torch.arange(4 * v.keep_ids.shape[1]).float().view(4, -1, 1).expand(-1, -1, 3)
    canvas = place(visible, v.keep_ids, torch.full((24, 3), -1.0))
    assert torch.equal(canvas[~v.mask].view(4, -1, 3), visible)
    assert (canvas[v.mask] == -1).all()


@pytest.mark.parametrize("width", [None, 48])
def test_decoders__give_a_prediction_for_every_masked_patch(width: int | None) -> None:
    v = views()
    visible = torch.randn(4, v.keep_ids.shape[1], 32)
    masked = 24 - v.keep_ids.shape[1]
    for decoder in (
        ViTDecoder(32, GRID, width=width, depth=1, heads=4),
        CNNDecoder(32, GRID, width=width, depth=2),
    ):
        assert decoder(visible, v).shape == (4, masked, 32)


@pytest.mark.parametrize(
    ("depth", "width", "gate"), [(1, None, True), (3, 24, True), (2, 24, False)]
)
def test_vit_decoder__equals_the_one_that_computes_everything(
    depth: int, width: int | None, gate: bool
) -> None:
    """First block shared by the mask tokens, last block where it is looked at: same numbers."""
    torch.manual_seed(0)
    decoder = ViTDecoder(32, GRID, width=width, depth=depth, heads=4, gate=gate).double()
    for name, parameter in decoder.named_parameters():  # norms and biases that are not 1 and 0
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "weight" in name else 0.0, 0.3)
    v = views()
    visible = torch.randn(4, v.keep_ids.shape[1], 32, dtype=torch.float64, requires_grad=True)
    out = decoder(visible, v)
    expected = all_patches(decoder, visible, v)[v.mask].view_as(out)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    inputs = [visible, *decoder.parameters()]
    weight = torch.randn_like(out)
    fast = torch.autograd.grad((out * weight).sum(), inputs)
    slow = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


def test_masked_ids__are_those_the_mask_names() -> None:
    v = views(5, Grid(16, 8))
    for row in range(5):
        assert v.masked_ids[row].tolist() == v.mask[row].nonzero()[:, 0].tolist()


def test_cnn_decoder__is_local_in_time_and_frequency() -> None:
    """One 3 x 3 layer: a visible token reaches its neighbours only."""
    decoder = CNNDecoder(16, GRID, depth=1)
    v = views(1)
    base = torch.zeros(1, v.keep_ids.shape[1], 16)
    changed = base.clone()
    changed[0, 0] = 1
    moved = (decoder(changed, v) - decoder(base, v)).abs().sum(-1)[0] > 1e-6  # (N - n,)
    assert moved.any()
    t0, f0 = divmod(int(v.keep_ids[0, 0]), 4)
    for i in v.masked_ids[0][moved].tolist():
        t, f = divmod(i, 4)
        assert abs(t - t0) <= 1
        assert abs(f - f0) <= 1


def test_ema__averages_parameters_and_buffers_and_copies_integers() -> None:
    teacher, student = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        student.weight.fill_(3.0)
        student.running_mean.fill_(5.0)
        student.num_batches_tracked.fill_(7)
    ema_update(teacher, student, 0.75)
    assert teacher.weight.tolist() == [1.5] * 3
    assert teacher.running_mean.tolist() == [1.25] * 3
    assert int(teacher.num_batches_tracked) == 7


def test_golden_ema__schedule(golden) -> None:
    schedules = json.loads((golden / "schedules.json").read_text())
    for name in ("ema_ssl_yaml", "ema_small"):
        case = schedules[name]
        for updates, expected in case["rows"]:
            decay = ema_decay(updates, start=case["start"], end=case["end"], steps=case["warmup"])
            # the table is float32: its neighbours are 6e-8 apart
            assert decay == pytest.approx(expected, abs=6.1e-8), updates
