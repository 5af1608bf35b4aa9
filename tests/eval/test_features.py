"""Features in memory and features made anew: the same batches, nothing disturbed."""

import numpy as np
import pytest
import torch

from bat.data.bad_clips import BadClips
from bat.data.stream import eval_loader
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.features import FeatureBank, FeatureStream, encode, to_device
from bat.types import Features, Grid, Needs, WaveBatch
from tests.eval.conftest import SECONDS

FRAMES = 32


def _bank(backbone, index, ids=None, **settings) -> FeatureBank:
    ids = np.arange(len(index)) if ids is None else np.asarray(ids)
    return FeatureBank.extract(_stream(backbone, index, **settings), ids, batch=4)


def _stream(backbone, index, **settings) -> FeatureStream:
    words = {"frames": FRAMES, "clip_seconds": SECONDS, **settings}
    return FeatureStream(backbone, index, **words)


def _two(index) -> WaveBatch:
    loader = eval_loader(index, np.arange(2), batch=2, sample_rate=16000, clip_seconds=SECONDS)
    return next(iter(loader))


def _same_batches(bank, stream, *, tolerance=1e-5) -> int:
    """Compare two sources' batches; how many there were."""
    count = 0
    for (a, wanted_a), (b, wanted_b) in zip(bank, stream, strict=True):
        for name in Features._fields:
            one, other = getattr(a, name), getattr(b, name)
            assert (one is None) == (other is None), name
            if one is not None:
                assert one.dtype == other.dtype, name
                torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
        assert torch.equal(wanted_a, wanted_b)
        count += 1
    return count


@pytest.mark.parametrize(
    ("needs", "blocks"),
    [(Needs("last"), 1), (Needs("none"), 0), (Needs("all", entry=True), 3)],
)
def test_bank__same_batches_as_stream(backbone, index, needs, blocks):
    ids = np.array([7, 1, 4, 2, 9])
    bank = _bank(backbone, index, ids, needs=needs)
    stream = _stream(backbone, index, needs=needs)
    assert bank.patches.shape == (5, blocks, 2, 8, 16)
    assert (bank.entry is not None) == needs.entry
    first = next(bank.once(ids, batch=2))[0]
    assert first.patches.shape == (blocks, 2, 2, 8, 16)
    assert first.cls.shape == (3, 2, 16)
    for kind, words in (("training", {"steps": 4, "seed": 3}), ("once", {})):
        pair = (getattr(source, kind)(ids, batch=2, **words) for source in (bank, stream))
        assert _same_batches(*pair) == (4 if kind == "training" else 3)


def test_encode__keeps_what_is_needed(backbone, index):
    batch = _two(index)
    whole = backbone(batch.waves, batch.lengths, frames=FRAMES)
    last = encode(backbone, batch, frames=FRAMES, needs=Needs("last"))
    assert torch.equal(last.patches, whole.patches[-1:])
    assert torch.equal(last.cls, whole.cls)
    assert last.patches.untyped_storage().nbytes() == last.patches.nbytes  # no view of all
    half = encode(backbone, batch, frames=FRAMES, autocast=torch.bfloat16)
    assert half.patches.dtype == half.cls.dtype == torch.bfloat16


def test_bank__class_tokens_of_chunks(backbone, index):
    bank = _bank(backbone, index, [0, 1], needs=Needs("all", entry=True), frames=64)
    assert bank.pieces.shape == (2, 3, 2, 16)
    assert bank.entry.shape == (2, 4, 8, 16)
    features, _ = next(bank.once(np.array([1]), batch=1))
    torch.testing.assert_close(features.pieces.mean(2), features.cls, atol=1e-6, rtol=1e-6)
    assert features.entry.shape == (1, 4, 8, 16)
    moved = to_device(features, torch.device("meta"))
    assert all(t.is_meta for t in moved if t is not None)


def test_long_clips__start_in_bank_and_stream(backbone, index):
    """Trained on and evaluated from their start, as the reference's test clips are."""
    ids = np.arange(4)
    stream = _stream(backbone, index, clip_seconds=0.2)
    bank = FeatureBank.extract(stream, ids, batch=4, index=index)
    words = {"batch": 2, "steps": 3, "seed": 0}
    assert _same_batches(bank.training(ids, **words), stream.training(ids, **words)) == 3
    (short,) = stream.loader(ids, batch=4)
    (long,) = _stream(backbone, index, clip_seconds=0.5).loader(ids, batch=4)
    assert torch.equal(short.waves, long.waves[:, : short.waves.shape[1]])
    assert short.waves.abs().sum(1).min() > 0


@pytest.fixture
def damaged(index, monkeypatch) -> int:
    """A clip that cannot be read."""
    read = index.read

    def broken(i):
        clip = read(i)
        return clip if i != 2 else type(clip)(clip.key, b"nonsense", clip.codec, clip.labels)

    monkeypatch.setattr(index, "read", broken)
    return 2


def test_bank__unreadable_clips_are_counted_and_limited(backbone, index, damaged):
    bad = BadClips(max_bad=0.2)
    bank = _bank(backbone, index, bad_clips=bad)
    assert bank.ids.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert list(bank.skipped) == [index.key(damaged)]
    assert bad.summary().startswith("1 of 10 clips unreadable")
    with pytest.raises(UserError, match=r"max_bad=0\.05"):
        _bank(backbone, index, bad_clips=BadClips(max_bad=0.05))
    with pytest.raises(UserError, match="none of the 1 clips can be read: 1 of 1"):
        _bank(backbone, index, [damaged])
    with pytest.raises(UserError, match="none of the 1 clips to train on can be read"):
        next(bank.training(np.array([damaged]), batch=1, steps=1, seed=0))


def test_bank__same_substitutes_as_stream(backbone, index, damaged):
    ids, words = np.array([1, damaged, 6]), {"batch": 2, "steps": 6, "seed": 2}
    bank, stream = _bank(backbone, index, ids), _stream(backbone, index)
    assert _same_batches(bank.training(ids, **words), stream.training(ids, **words)) == 6
    assert all(len(y) == 2 for _, y in bank.training(ids, **words))


def test_stream__roll_changes_training_batches_only(backbone, index):
    ids = np.arange(4)
    plain, rolled = _stream(backbone, index), _stream(backbone, index, roll=True)
    a, b = (next(s.training(ids, batch=2, steps=1, seed=0))[0] for s in (plain, rolled))
    assert not torch.equal(a.patches, b.patches)
    a, b = (next(s.once(ids, batch=2))[0] for s in (plain, rolled))
    assert torch.equal(a.patches, b.patches)


def test_bank__extraction_changes_no_state(backbone, index):
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


def _poisoned(where: str) -> BAT:
    """An encoder that makes NaN of the patch tokens of its batch's second clip."""
    backbone = BAT(width=16, depth=3, heads=2, grid=Grid(2, 8)).eval()

    def poison(module, args, output):
        out = output[0] if isinstance(output, tuple) else output
        out[1, 3:, 5] = torch.nan

    at = backbone.patch_embed if where == "entry" else backbone.blocks[int(where)]
    at.register_forward_hook(poison)
    return backbone


@pytest.mark.parametrize(
    ("where", "needs", "said"),
    [
        ("1", Needs(), "block 2 of 3"),
        ("1", Needs("last"), "block 3 of 3"),  # class tokens have it in block 3 as well
        ("entry", Needs("none", entry=True), "the tokens before the first block"),
    ],
)
def test_encode__not_finite_names_clip_and_block(index, where, needs, said):
    batch = _two(index)
    with pytest.raises(UserError, match=f"not finite: clip {index.key(1)}, {said}; .*damaged"):
        encode(_poisoned(where), batch, frames=FRAMES, needs=needs)


def test_encode__not_finite_names_a_remedy(index):
    batch = _two(index)
    with pytest.raises(UserError, match="precision=32-true"):
        encode(_poisoned("1"), batch, frames=FRAMES, autocast=torch.bfloat16)
    batch.waves[0, 100] = torch.inf
    with pytest.raises(UserError, match=f"clip {index.key(0)}, .*not finite .*check the data"):
        encode(BAT(width=16, depth=1, heads=2, grid=Grid(2, 8)), batch, frames=FRAMES)


def test_stream__random_offset_moves_training_clips_only(backbone, index):
    def batches(kind, **settings):
        stream = _stream(backbone, index, frames=64, clip_seconds=0.6, **settings)
        words = {"steps": 1, "seed": 0} if kind == "training" else {}
        return next(getattr(stream, kind)(np.arange(4), batch=4, **words))[0].patches

    assert torch.equal(batches("once"), batches("once", random_offset=True))
    assert not torch.equal(batches("training"), batches("training", random_offset=True))
