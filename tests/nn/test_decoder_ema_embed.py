"""Position code, decoders, EMA: numbers."""

import json

import pytest
import torch
from torch import nn

from bat.nn.decoder import CNNDecoder, ViTDecoder, place
from bat.nn.ema import ema_decay, ema_update
from bat.nn.embed import position_code
from bat.nn.masking import inverse_block_mask
from bat.shapes import Grid
from tests.golden_files import Golden

GRID = Grid(6, 4)


def views(rows: int = 4, grid: Grid = GRID):
    return inverse_block_mask(rows, grid, generator=torch.Generator().manual_seed(0))


def test_layouts_are_the_stated_bijection_of_each_other() -> None:
    grid = Grid(64, 8)
    reference, faithful = (position_code(32, grid, layout)[0] for layout in ("reference", "grid"))
    for t, f in ((0, 0), (1, 0), (8, 3), (63, 7), (10, 5)):
        cell_f, cell_t = t // 8, 8 * (t % 8) + f  # SPEC section 2
        assert torch.equal(reference[t * 8 + f], faithful[cell_t * 8 + cell_f])


def test_golden_position_rows_and_columns(golden) -> None:
    data = Golden(golden / "encoder_tiny.npz")
    code = position_code(768, Grid(64, 8))[0]
    rows = data["pos768_rows_0_1_63_64_65_511"]
    torch.testing.assert_close(code[[0, 1, 63, 64, 65, 511]], rows, atol=1e-5, rtol=0)
    columns = data["pos768_col_0_191_192_383_384_767"]
    torch.testing.assert_close(code[:, [0, 191, 192, 383, 384, 767]], columns, atol=1e-5, rtol=0)
    torch.testing.assert_close(position_code(48, GRID), data["w/pos_embed"], atol=1e-6, rtol=0)


def test_place_puts_visible_tokens_where_they_belong() -> None:
    v = views()
    visible = torch.arange(4 * v.keep_ids.shape[1]).float().view(4, -1, 1).expand(-1, -1, 3)
    canvas = place(visible, v, torch.full((1, 1, 3), -1.0))
    assert torch.equal(canvas[~v.mask].view(4, -1, 3), visible)
    assert (canvas[v.mask] == -1).all()


@pytest.mark.parametrize("width", [None, 48])
def test_decoders_give_a_prediction_for_every_patch(width: int | None) -> None:
    v = views()
    visible = torch.randn(4, v.keep_ids.shape[1], 32)
    for decoder in (
        ViTDecoder(32, GRID, width=width, depth=1, heads=4),
        CNNDecoder(32, GRID, width=width, depth=2),
    ):
        assert decoder(visible, v).shape == (4, 24, 32)


def test_cnn_decoder_is_local_in_time_and_frequency() -> None:
    """One 3 x 3 layer: a visible token reaches its neighbours only."""
    decoder = CNNDecoder(16, GRID, depth=1)
    v = views(1)
    base = torch.zeros(1, v.keep_ids.shape[1], 16)
    changed = base.clone()
    changed[0, 0] = 1
    moved = (decoder(changed, v) - decoder(base, v)).abs().sum(-1)[0] > 1e-6
    t0, f0 = divmod(int(v.keep_ids[0, 0]), 4)
    for i in moved.nonzero()[:, 0].tolist():
        t, f = divmod(i, 4)
        assert abs(t - t0) <= 1
        assert abs(f - f0) <= 1


def test_ema_averages_parameters_and_buffers_and_copies_integers() -> None:
    teacher, student = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        student.weight.fill_(3.0)
        student.running_mean.fill_(5.0)
        student.num_batches_tracked.fill_(7)
    ema_update(teacher, student, 0.75)
    assert teacher.weight.tolist() == [1.5] * 3
    assert teacher.running_mean.tolist() == [1.25] * 3
    assert int(teacher.num_batches_tracked) == 7


def test_golden_ema_schedule(golden) -> None:
    schedules = json.loads((golden / "schedules.json").read_text())
    for name in ("ema_ssl_yaml", "ema_small"):
        case = schedules[name]
        for updates, expected in case["rows"]:
            decay = ema_decay(updates, start=case["start"], end=case["end"], steps=case["warmup"])
            # the table is float32: its neighbours are 6e-8 apart
            assert decay == pytest.approx(expected, abs=6.1e-8), updates
