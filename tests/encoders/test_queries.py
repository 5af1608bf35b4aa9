"""What query tuning takes from the encoder; ``tests/probes/test_vqt.py``: what it makes of it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bat.encoders.base import Encoder
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.types import Grid
from tests.encoders.test_bat import tiny


def test_entry_is_what_the_first_block_takes() -> None:
    model = tiny()
    x = torch.rand(2, 1, 64, 128)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        features = model.features(x, entry=True)
        plain = model.features(x)
    assert features.entry.shape == (2, 4, 8, 32)
    assert torch.equal(features.entry.flatten(1, 2), seen[0][:, 1:])
    assert features.pieces is None  # one chunk
    assert plain.entry is None
    assert torch.equal(plain.patches, features.patches)


def test_entry_and_class_tokens_of_each_chunk_of_a_long_clip() -> None:
    model = tiny()
    x = torch.rand(2, 1, 112, 128)  # 4 + 3 time patches
    with torch.no_grad():
        features = model.features(x, entry=True)
        parts = [model.features(chunk, entry=True) for chunk in x.split(64, dim=2)]
        plain = model.features(x)
    assert torch.equal(features.entry, torch.cat([p.entry for p in parts], 1))
    assert torch.equal(features.pieces, torch.stack([p.cls for p in parts], 2))
    torch.testing.assert_close(features.cls, (parts[0].cls + parts[1].cls) / 2)
    assert plain.pieces is None


def test_queries_cost_a_small_part_of_a_forward_pass() -> None:
    model = BAT(width=768, depth=1).eval()
    x, queries = torch.rand(1, 1, 1024, 128), torch.randn(1, 10, 768, requires_grad=True)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        features = model.features(x, entry=True)
    with FlopCounterMode(display=False) as tuning:
        model.query_blocks(queries, features).sum().backward()
    assert 0 < tuning.get_total_flops() < 0.1 * forward.get_total_flops()


def test_a_backbone_without_query_blocks_says_so() -> None:
    class Other(BAT):
        has_queries = False
        query_blocks = Encoder.query_blocks

    model = Other(width=32, depth=1, heads=4, grid=Grid(4, 8))
    with pytest.raises(UserError, match="Other has no query_blocks: vqt is not defined"):
        model.query_blocks(torch.randn(1, 2, 32), model.features(torch.rand(1, 1, 64, 128)))
