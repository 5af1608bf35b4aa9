"""One rule for all encoders: what a clip becomes depends on that clip alone.

Every file of ``bat/encoders`` is tested with the keywords of ``tests/encoders/tiny.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bat import registry
from bat.encoders.base import Encoder
from tests.encoders.tiny import TINY, tiny

CLOSE = {"float32": {"atol": 1e-5, "rtol": 1e-5}, "bfloat16": {"atol": 2e-2, "rtol": 2e-2}}
SECONDS = (0.3, 1.0, 5.0)


def test_table__has_every_encoder() -> None:
    assert sorted([*TINY, "hf"]) == registry.known("encoders")


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", TINY)  # those of transformers: test_hf.py
def test_clips__alone_and_in_a_padded_batch_are_equal(name: str, dtype: str) -> None:
    check(tiny(name), dtype)


def check(encoder: Encoder, dtype: str) -> None:
    """Clips of several lengths, alone and in batches with different padding, are equal."""
    noise = torch.Generator().manual_seed(1)
    for parameter in encoder.parameters():  # norms and biases that differ from token to token
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3, generator=noise)
    lengths = torch.tensor([int(s * encoder.sample_rate) for s in (*SECONDS, 1.0)])
    waves = 0.1 * torch.randn(len(lengths), int(lengths.max()), generator=noise)
    waves[1, lengths[1] :] = 0  # trailing zeros of one row, garbage behind the others
    waves[0, lengths[0] :] = 1e4
    half, close = dtype == "bfloat16", CLOSE[dtype]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        batch = encoder(waves, lengths)
        assert batch.valid is not None
        assert (batch.cls is not None) == encoder.has_cls
        assert batch.patches.isfinite().all()
        spread = batch.patches[-1, -1].std(0).mean()
        assert spread > 1e-3  # tokens differ, or nothing below could fail
        for row, samples in enumerate(lengths.tolist()):
            alone = encoder(waves[row : row + 1, :samples])
            T = alone.patches.shape[2]
            assert T == batch.valid[row] == encoder.time_patches(samples)
            torch.testing.assert_close(batch.patches[:, row, :T], alone.patches[:, 0], **close)
            assert not batch.patches[:, row, T:].any()
            if encoder.has_cls:
                torch.testing.assert_close(batch.cls[:, row], alone.cls[:, 0], **close)
        longer = encoder(torch.cat([waves, torch.zeros(4, 9000)], dim=1), lengths)
    T = batch.patches.shape[2]
    torch.testing.assert_close(longer.patches[:, :, :T], batch.patches, **close)
    assert not longer.patches[:, :, T:].any()
