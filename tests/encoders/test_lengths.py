"""What a clip becomes depends on that clip alone: batches of several lengths against one clip."""

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from bat.encoders.base import Encoder
from bat.encoders.bat import BAT
from bat.encoders.eat import EAT
from bat.nn.losses import against, cross_entropy, to_clip
from bat.probes.base import Probe, build_probe, known_probes
from bat.probes.curve import LinearCurve
from bat.probes.maps import evidence
from bat.types import Features, Grid

L, D, C, K = 3, 16, 5, 7
LENGTHS = torch.tensor([16000, 300, 9000, 16000, 5200, 9100, 2561, 11000])
"""7, 1, 4, 7, 3, 4, 2 and 5 time patches; a chunk has 4."""
PATCHES = torch.tensor([7, 1, 4, 7, 3, 4, 2, 5])
LEVELS = [(name, level) for name, probe in known_probes().items() for level in probe.levels]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class NoClassToken(BAT):
    """An encoder of patches alone."""

    has_cls = False

    def features(self, spectrogram: torch.Tensor, *, entry: bool = False) -> Features:
        return super().features(spectrogram, entry=entry)._replace(cls=None, pieces=None)


ENCODERS = {
    "gated": partial(BAT),
    "norm first": partial(BAT, norm_order="pre"),
    "no class token": partial(NoClassToken),
    "silence to the last frame": partial(BAT, frontend={"pad": "waveform"}),
    "silence to half a second": partial(BAT, frontend={"pad": "clip", "clip_seconds": 0.5}),
    "eat, ungated": partial(EAT, frontend={"kind": "eat", "pad": "waveform"}),
}


def _encoder(name: str = "gated", **words: Any) -> Encoder:
    torch.manual_seed(0)
    made = ENCODERS[name](width=D, depth=L, heads=2, grid=Grid(4, 8), **words)
    for block in made.blocks:
        nn.init.normal_(block.norm2.weight, 1, 0.5)  # norms differ from token to token
    return made.eval()


def _waves() -> torch.Tensor:
    """(B, S): clips with noise, not zeros, behind their ends, which must have no effect."""
    return 0.1 * torch.randn(len(LENGTHS), 16000, generator=torch.Generator().manual_seed(1))


@cache
def _made(kind: str) -> tuple[Encoder, Features, list[Features]]:
    """An encoder, its features of the batch and of each clip alone, with what enters the blocks."""
    encoder, waves = _encoder(kind), _waves()
    patches = encoder.time_patches(LENGTHS)
    with torch.no_grad():
        x = encoder.inputs(waves, LENGTHS)
        alone = [
            encoder.features(encoder.inputs(wave[:samples]), entry=True)
            for wave, samples in zip(waves, LENGTHS.tolist(), strict=True)
        ]
        return encoder, encoder.features_alone(x, patches, entry=True), alone


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder__clips_of_several_lengths_are_what_they_are_alone(name):
    encoder = _encoder(name)
    with torch.no_grad():
        batch = encoder(_waves(), LENGTHS)
        for row, samples in enumerate(LENGTHS.tolist()):
            alone = encoder(_waves()[row, :samples])
            T = alone.patches.shape[2]
            assert batch.valid[row] == T
            assert alone.valid is None
            torch.testing.assert_close(batch.patches[:, row, :T], alone.patches[:, 0], **CLOSE)
            assert not batch.patches[:, row, T:].any()
            if encoder.has_cls:
                torch.testing.assert_close(batch.cls[:, row], alone.cls[:, 0], **CLOSE)
            torch.testing.assert_close(batch.clip(row).patches, alone.patches, **CLOSE)
    if "silence to half" in name:
        assert batch.valid.tolist() == [7, 4, 4, 7, 4, 4, 4, 5]
    elif name in ("gated", "norm first"):
        assert torch.equal(batch.valid, PATCHES)


def test_encoder__a_fixed_number_of_frames_is_attended_to():
    """The papers' protocol: zero frames to the end, whatever else is in the batch."""
    encoder = _encoder()
    with torch.no_grad():
        batch = encoder(_waves(), LENGTHS, frames=112)
        alone = encoder(_waves()[4:5, : LENGTHS[4]], frames=112)
        own = encoder(_waves()[4:5, : LENGTHS[4]])
    assert batch.valid is None
    torch.testing.assert_close(batch.cls[:, 4], alone.cls[:, 0], **CLOSE)
    assert (alone.cls - own.cls).abs().max() > 1e-2


def test_encoder__clips_of_one_length_run_at_once(monkeypatch):
    encoder, calls = _encoder(), []
    whole = encoder.features
    monkeypatch.setattr(encoder, "features", lambda x, **k: calls.append(len(x)) or whole(x, **k))
    full = torch.full_like(LENGTHS, 16000)
    assert encoder(_waves(), full).valid is None
    encoder(_waves(), LENGTHS)
    assert calls == [8, 1, 1, 1, 2, 1, 2]


def test_encoder__gradients_are_those_of_the_clips_alone():
    encoder, waves, lengths = _encoder(), _waves()[1:5], LENGTHS[1:5]
    encoder(waves, lengths).cls.square().sum().backward()
    found = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    for wave, samples in zip(waves, lengths.tolist(), strict=True):
        encoder(wave[:samples]).cls.square().sum().backward()
    for name, grad in found.items():
        wanted = encoder.get_parameter(name).grad
        torch.testing.assert_close(grad, wanted, atol=1e-3, rtol=1e-3, msg=name)


def test_queries__read_their_own_clip():
    encoder, batch, alone = _made("gated")
    queries = torch.randn(L, 2, D, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = encoder.query_blocks(queries, batch)  # (L, B, q, D)
        for row, one in enumerate(alone):
            wanted = encoder.query_blocks(queries, one)
            torch.testing.assert_close(found[:, row], wanted[:, 0], **CLOSE)


def _probe(name: str, level: str, encoder: Encoder, **head: Any) -> Probe:
    torch.manual_seed(0)
    shape = {"classes": C, "width": D, "depth": L, "has_cls": encoder.has_cls, "level": level}
    if name == "curve":
        return LinearCurve(**shape).eval()
    return build_probe(
        name, **shape, encoder=encoder, **{"prototypes": K, "hidden": D, **head}
    ).eval()


def _cases() -> list[tuple[str, str, str, dict[str, Any]]]:
    """(encoder, probe, level, head)"""
    found = [("gated", name, level, {}) for name, level in [*LEVELS, ("curve", "clip")]]
    found += [("no class token", name, "clip", {}) for name in ("linear", "h2t", "ep", "cgp")]
    return [
        *found,
        ("gated", "curve", "frame", {}),
        ("no class token", "cgp", "clip", {"cls": "mean"}),
    ]


@pytest.mark.parametrize(("kind", "name", "level", "head"), _cases())
def test_probe__clips_of_several_lengths_are_what_they_are_alone(kind, name, level, head):
    """Answers and gradients, of clips and, where there are some, of time patches."""
    encoder, batch, alone = _made(kind)
    probe = _probe(name, level, encoder, **head)
    labels = nn.functional.one_hot(torch.arange(len(LENGTHS)) % C, C).float()
    loss = partial(against, cross_entropy, inside=probe.inside(batch))
    probe.training_loss(loss, probe(batch), labels).backward()
    found = {n: p.grad.clone() for n, p in probe.named_parameters() if p.grad is not None}
    probe.zero_grad()
    blocks = probe.answers(probe(batch)).values()  # (B, C) or (B, T, C)
    for row, one in enumerate(alone):
        T = one.patches.shape[2]
        for block, wanted in zip(blocks, probe.answers(probe(one)).values(), strict=True):
            own = block[row, : T * probe.outputs_per_patch] if level == "frame" else block[row]
            torch.testing.assert_close(own, wanted[0], **CLOSE)
            clip = to_clip(block, probe.inside(batch))[row]
            torch.testing.assert_close(clip, to_clip(wanted)[0], **CLOSE)
        target = labels[row : row + 1]
        value = probe.training_loss(partial(against, cross_entropy), probe(one), target)
        (value / len(LENGTHS)).backward()
    for parameter, grad in found.items():
        wanted = probe.get_parameter(parameter).grad
        torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-4, msg=parameter)


@pytest.mark.parametrize(("name", "level"), [(n, v) for n, v in LEVELS if n in ("cgp", "proto")])
def test_evidence__is_that_of_the_clip_alone(name, level):
    encoder, batch, alone = _made("gated")
    probe = _probe(name, level, encoder)
    found = evidence(probe, batch, 1, top=2)
    for row, one in enumerate(alone):
        wanted, T = evidence(probe, one, 1, top=2), int(PATCHES[row])
        torch.testing.assert_close(found.map[row, :T], wanted.map[0], **CLOSE)
        assert not found.map[row, T:].any()
        assert torch.equal(found.prototypes[row], wanted.prototypes[0])
