"""Features in memory and features made anew: the same batches, nothing disturbed."""

import numpy as np
import pytest
import torch

from bat.backbones.bat import BAT
from bat.data.bad_clips import BadClips
from bat.data.index import Index, open_index
from bat.data.module import eval_loader
from bat.data.toy import make_toy
from bat.shapes import Grid, UserError
from bat.train.features import FeatureBank, FeatureStream, bank_bytes, encode, evaluating

FRAMES, SECONDS = 32, 0.3


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    return open_index(make_toy(tmp_path_factory.mktemp("toy"), seconds=SECONDS))


@pytest.fixture(scope="module")
def backbone() -> BAT:
    torch.manual_seed(0)
    return BAT(width=16, depth=3, heads=2, grid=Grid(2, 8), drop_path=0.5).eval()


def _bank(backbone, index, ids=None, **settings) -> FeatureBank:
    ids = np.arange(len(index)) if ids is None else np.asarray(ids)
    loader = eval_loader(index, ids, batch=4, sample_rate=16000, clip_seconds=SECONDS)
    return FeatureBank.extract(backbone, loader, ids=ids, frames=FRAMES, **settings)


def _stream(backbone, index, **settings) -> FeatureStream:
    return FeatureStream(backbone, index, frames=FRAMES, clip_seconds=SECONDS, **settings)


def test_bank_holds_every_block_of_every_clip(backbone, index):
    bank = _bank(backbone, index)
    assert bank.patches.shape == (10, 3, 2, 8, 16)
    assert bank.cls.shape == (10, 3, 16)
    assert bank.keys == [index.key(i) for i in range(10)]
    assert bank.targets.argmax(1).tolist() == [index.labels(i)[0] for i in range(10)]
    size = bank.patches.nbytes + bank.cls.nbytes
    assert size == bank_bytes(backbone, 10, frames=FRAMES, dtype=torch.float32)


def test_bank_and_stream_give_the_same_batches(backbone, index):
    ids = np.array([7, 1, 4, 2, 9])
    for kind, words in (("training", {"steps": 4, "seed": 3}), ("once", {})):
        bank = getattr(_bank(backbone, index, ids), kind)(ids, batch=2, **words)
        stream = getattr(_stream(backbone, index), kind)(ids, batch=2, **words)
        count = 0
        for (a, ya), (b, yb) in zip(bank, stream, strict=True):
            torch.testing.assert_close(a.patches, b.patches, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(a.cls, b.cls, atol=1e-5, rtol=1e-5)
            assert torch.equal(ya, yb)
            count += 1
        assert count == (4 if kind == "training" else 3)


def test_bank_is_stored_in_the_autocast_type(backbone, index):
    bank = _bank(backbone, index, autocast=torch.bfloat16)
    assert bank.patches.dtype == bank.cls.dtype == torch.bfloat16
    exact = _bank(backbone, index)
    torch.testing.assert_close(bank.patches.float(), exact.patches, atol=0.1, rtol=0.1)


def test_once_leaves_out_clips_the_bank_lacks(backbone, index):
    bank = _bank(backbone, index, [3, 5, 8])
    found = [y for _, y in bank.once(np.array([5, 6, 8]), batch=8)]
    assert torch.equal(found[0], bank.targets[1:])


def test_unreadable_clips_are_skipped_counted_and_limited(backbone, index, monkeypatch):
    read = index.read

    def broken(i):
        clip = read(i)
        return clip if i != 2 else type(clip)(clip.key, b"nonsense", clip.codec, clip.labels)

    monkeypatch.setattr(index, "read", broken)
    bad = BadClips(max_bad=0.2)
    bank = _bank(backbone, index, bad_clips=bad)
    assert bank.ids.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert list(bank.skipped) == [index.key(2)]
    assert bad.summary().startswith("1 of 10 clips unreadable")
    with pytest.raises(UserError, match=r"max_bad=0\.05"):
        _bank(backbone, index, bad_clips=BadClips(max_bad=0.05))


def test_roll_changes_training_batches_only(backbone, index):
    ids = np.arange(4)
    plain, rolled = _stream(backbone, index), _stream(backbone, index, roll=True)
    a, b = (next(s.training(ids, batch=2, steps=1, seed=0))[0] for s in (plain, rolled))
    assert not torch.equal(a.patches, b.patches)
    a, b = (next(s.once(ids, batch=2))[0] for s in (plain, rolled))
    assert torch.equal(a.patches, b.patches)


def test_extraction_leaves_modes_and_generators_alone(backbone, index):
    backbone.train()
    backbone.blocks[1].eval()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    bank = _bank(backbone, index)
    assert torch.equal(torch.rand(3), wanted)
    assert backbone.training
    assert not backbone.blocks[1].training
    backbone.eval()
    assert torch.equal(
        bank.patches, _bank(backbone, index).patches
    )  # no drop path while extracting
    assert not bank.patches.requires_grad


def test_evaluating_restores_after_an_error():
    module = torch.nn.Dropout()

    def fails() -> None:
        with evaluating(module):
            assert not module.training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert module.training


def test_features_that_are_not_finite_are_an_error(index):
    backbone = BAT(width=16, depth=1, heads=2, grid=Grid(2, 8))
    torch.nn.init.constant_(backbone.blocks[0].norm2.bias, torch.nan)
    loader = eval_loader(index, np.arange(2), batch=2, sample_rate=16000, clip_seconds=SECONDS)
    with pytest.raises(UserError, match="not finite"):
        encode(backbone, next(iter(loader)), frames=FRAMES)


def test_random_offset_moves_short_training_clips_only(backbone, index):
    def batches(kind, **settings):
        stream = FeatureStream(backbone, index, frames=64, clip_seconds=0.6, **settings)
        words = {"steps": 1, "seed": 0} if kind == "training" else {}
        return next(getattr(stream, kind)(np.arange(4), batch=4, **words))[0].patches

    assert torch.equal(batches("once"), batches("once", random_offset=True))
    assert not torch.equal(batches("training"), batches("training", random_offset=True))
