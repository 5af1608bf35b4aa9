"""Statistics of an encoder against plain formulas, nothing disturbed; the clips that are drawn."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bat.encoders.bat import BAT
from bat.encoders.eat import EAT
from bat.errors import UserError
from bat.eval import diagnostics as diagnostics
from bat.eval.collapse import effective_rank
from bat.eval.diagnostics import best_clips, encoder_statistics, prototype_maps
from bat.eval.features import encode
from bat.nn.attention import Attention
from bat.nn.sinks import sink_share
from bat.probes.base import build_probe
from bat.probes.maps import evidence
from bat.types import Grid, WaveBatch

FRAMES = 32
SAMPLES = 31 * 160
"""Of 32 frames."""
L, D = 3, 16


def encoder(kind: type[BAT] = BAT, **settings: Any) -> BAT:
    torch.manual_seed(0)
    made = kind(width=D, depth=L, heads=2, grid=Grid(2, 8), **settings)
    for block in made.blocks:
        nn.init.uniform_(block.norm2.weight, 0.5, 2)  # norms differ from token to token
    return made


def waves(clips: int = 6) -> Tensor:
    """Noise of different colours: (n, S)."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(clips, SAMPLES, generator=g)
    colour = torch.linspace(0, 0.95, clips)[:, None]
    return 0.1 * (noise + 3 * colour * noise.cumsum(1) / 30).clamp(-5, 5)


def batches(sound: Tensor, *, batch: int = 4, lengths: Tensor | None = None) -> Iterator[WaveBatch]:
    every = torch.full((len(sound),), sound.shape[1]) if lengths is None else lengths
    for start in range(0, len(sound), batch):
        rows = slice(start, start + batch)
        ids = range(len(sound))[rows]
        yield WaveBatch(
            waves=sound[rows],
            lengths=every[rows],
            targets=torch.zeros(len(ids), 2),
            keys=[f"clip{i}" for i in ids],
            positions=torch.tensor(ids),
            skipped=[],
        )


def test_encoder_statistics__equal_the_plain_formulas() -> None:
    backbone, sound = encoder(), waves()
    found = encoder_statistics(backbone, batches(sound), frames=FRAMES)
    features = backbone.eval()(sound, frames=FRAMES)
    assert found["clips"] == 6
    assert features.cls is not None
    stacks = {"patches": features.patches.flatten(2, 3), "cls": features.cls[:, :, None]}
    for kind, stack in stacks.items():
        for block, y in enumerate(stack.detach().double()):  # (B, n, D)
            norm = y.norm(dim=-1)
            wanted = [norm.mean(), norm.std(correction=0), norm.max()]
            assert found["norms"][kind][block] == pytest.approx([float(w) for w in wanted], 1e-4)
            content = y - y.mean(0)
            between = content.square().sum() / (5 * y[0].numel())
            whole = y - y.mean((0, 1)) if kind == "patches" else y
            spread = float((between / whole.square().mean()).sqrt())
            assert found["spread"][kind][block] == pytest.approx(spread, 1e-4)
            wanted_rank = effective_rank(content.flatten(0, 1))
            assert found["rank"][kind][block] == pytest.approx(wanted_rank, 1e-4)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@torch.no_grad()
def shares(backbone: BAT, sound: Tensor) -> list[float]:
    """Sink shares by hand, block after block."""
    x = backbone.enter(backbone.embed_patches(backbone.eval().inputs(sound, frames=FRAMES)))
    found = []
    for block in backbone.blocks:
        seen = x if block.norm_order == "post" else block.norm1(x)
        found.append(float(sink_share(block.attn, seen).mean()))
        x, _ = block(x)
    return found


@pytest.mark.parametrize("order", ["post", "pre"])
def test_encoder_statistics__sinks_with_gates_trained_and_open(order: str) -> None:
    backbone, sound = encoder(norm_order=order), waves()
    for block in backbone.blocks:
        nn.init.normal_(block.attn.gate.weight, std=0.5)
        nn.init.normal_(block.attn.qkv.weight, std=0.4)
    plain = encoder(gate=False, norm_order=order)
    plain.load_state_dict({n: v for n, v in backbone.state_dict().items() if ".gate." not in n})
    found = encoder_statistics(backbone, batches(sound), frames=FRAMES)["sinks"]
    assert found["gate on"] == pytest.approx(shares(backbone, sound), 1e-4)
    assert found["gate off"] == pytest.approx(shares(plain, sound), 1e-4)
    assert found["gate on"][0] == pytest.approx(found["gate off"][0], 1e-6)  # of the same input
    assert abs(found["gate on"][2] - found["gate off"][2]) > 1e-3
    assert found["uniform"] == pytest.approx(1 / 17)


def test_encoder_statistics__encoder_without_gates() -> None:
    found = encoder_statistics(encoder(EAT), batches(waves()), frames=FRAMES)
    assert found["sinks"]["gate off"] is None
    assert min(found["sinks"]["gate on"]) > found["sinks"]["uniform"]


def test_encoder_statistics__do_not_depend_on_the_batch() -> None:
    backbone, sound = encoder(), waves(40)  # more tokens than are kept for the rank
    few = encoder_statistics(backbone, batches(sound, batch=9), frames=FRAMES)
    many = encoder_statistics(backbone, batches(sound, batch=40), frames=FRAMES)
    assert few["rank"]["patches"] == pytest.approx(many["rank"]["patches"], 1e-4)
    assert few["spread"]["patches"] == pytest.approx(many["spread"]["patches"], 1e-4)
    assert few["sinks"]["gate on"] == pytest.approx(many["sinks"]["gate on"], 1e-5)


def test_encoder_statistics__clips_of_different_lengths() -> None:
    """Without ``frames``: attention, too, is over the clip's own patches."""
    backbone, sound = encoder(), waves()
    lengths = torch.tensor([SAMPLES, 12 * 160, SAMPLES, 12 * 160, 12 * 160, SAMPLES])
    few, many = (
        encoder_statistics(backbone, batches(sound, batch=n, lengths=lengths), frames=None)
        for n in (1, 6)
    )
    for name in ("norms", "sinks"):
        for kind, found in few[name].items():
            wanted = many[name][kind]
            if isinstance(found, list):
                found, wanted = torch.tensor(found), torch.tensor(wanted)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert many["sinks"]["uniform"] == pytest.approx((1 / 17 + 1 / 9) / 2)
    alone = torch.cat([
        backbone.eval()(wave[:n]).patches[-1].detach().flatten(0, 2)
        for wave, n in zip(sound, lengths.tolist(), strict=True)
    ])  # fmt: skip
    norm = alone.norm(dim=-1)
    assert many["norms"]["patches"][-1][0] == pytest.approx(float(norm.mean()), 1e-5)
    assert many["norms"]["patches"][-1][2] == pytest.approx(float(norm.max()), 1e-5)


def test_encoder_statistics__padding_is_excluded() -> None:
    backbone, sound = encoder(), waves()
    lengths = torch.full((6,), SAMPLES)
    lengths[3:] = 12 * 160  # 13 frames: one time patch of two
    found = encoder_statistics(backbone, batches(sound, lengths=lengths), frames=FRAMES)
    patches = backbone.eval()(sound, lengths, frames=FRAMES).patches[-1].detach()  # (B, T, F, D)
    norm = torch.cat([patches[:3].flatten(0, 2), patches[3:, 0].flatten(0, 1)]).norm(dim=-1)
    assert found["norms"]["patches"][-1][0] == pytest.approx(float(norm.mean()), 1e-5)
    assert found["norms"]["patches"][-1][2] == pytest.approx(float(norm.max()), 1e-5)
    rows = torch.cat(
        [
            (patches[:, 0] - patches[:, 0].mean(0)).flatten(0, 1),
            (patches[:3, 1] - patches[:3, 1].mean(0)).flatten(0, 1),
        ]
    )
    assert found["rank"]["patches"][-1] == pytest.approx(effective_rank(rows), 1e-4)


def test_encoder_statistics__first_chunk_of_a_long_clip() -> None:
    backbone = encoder()
    long = torch.cat([waves(), waves().flip(0)], dim=1)
    found = encoder_statistics(backbone, batches(long), frames=2 * FRAMES)
    spectrogram = backbone.inputs(long, frames=2 * FRAMES)[:, :, :FRAMES]
    norm = backbone.eval().features(spectrogram).patches.norm(dim=-1).flatten(1).mean(1)
    assert [row[0] for row in found["norms"]["patches"]] == pytest.approx(norm.tolist(), 1e-5)
    assert found["sinks"]["uniform"] == pytest.approx(1 / 17)


def test_encoder_statistics__change_no_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone, sound = encoder(drop_path=0.3).train(), waves()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    gates = [block.attn.gate for block in backbone.blocks]
    random = torch.get_rng_state()
    encoder_statistics(backbone, batches(sound), frames=FRAMES)
    calls = 0

    def fail(*_: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == L + 2:  # in the second block, the gates being open
            assert all(block.attn.gate is None for block in backbone.blocks)
            raise RuntimeError("out of memory")
        return torch.ones(4, 2)

    monkeypatch.setattr(diagnostics, "sink_share", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        encoder_statistics(backbone, batches(sound), frames=FRAMES)
    assert list(backbone.state_dict()) == list(before)
    assert all(torch.equal(value, before[n]) for n, value in backbone.state_dict().items())
    assert all(block.attn.gate is gate for block, gate in zip(backbone.blocks, gates, strict=True))
    assert not any(block.attn._forward_pre_hooks for block in backbone.blocks)
    assert backbone.training
    assert torch.equal(torch.get_rng_state(), random)


def test_encoder_statistics__no_rank_of_silence_or_few_clips() -> None:
    backbone = encoder()
    nothing = {"patches": [None] * L, "cls": [None] * L}
    silence = encoder_statistics(backbone, batches(torch.zeros(6, SAMPLES)), frames=FRAMES)
    assert (silence["rank"], silence["spread"]) == (nothing, nothing)
    four = encoder_statistics(backbone, batches(waves(4)), frames=FRAMES)
    assert four["rank"] == nothing
    assert min(four["spread"]["patches"]) > 0.01
    one = encoder_statistics(backbone, batches(waves(1)), frames=FRAMES)
    assert (one["rank"], one["spread"]) == (nothing, nothing)
    assert one["norms"]["patches"][0][0] > 0
    with pytest.raises(UserError, match="none of the clips"):
        encoder_statistics(backbone, [], frames=FRAMES)


class Other(BAT):
    """An encoder of another making: no class token, no attention of ours."""

    has_cls = False

    def features(self, spectrogram: Tensor, **_: Any) -> Any:
        whole = super().features(spectrogram)
        return whole._replace(cls=None)


def test_encoder_statistics__encoder_without_our_attention() -> None:
    other = encoder(Other)
    other.extra = Attention(D, 2)  # not one a block
    found = encoder_statistics(other, batches(waves()), frames=FRAMES)
    assert found["sinks"] is None
    assert [found[name]["cls"] for name in ("norms", "rank", "spread")] == [None] * 3
    assert len(found["rank"]["patches"]) == L


def test_best_clips__highest_score_of_each_class() -> None:
    targets = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1.0]])
    logits = torch.tensor([[1, 9, 9, 9], [2, 0, 9, 9], [9, -1, 9, 9], [9, -2, 9, 3.0]])
    assert best_clips(logits, targets, count=9) == [(0, 1), (1, 1), (3, 3)]
    assert best_clips(logits, targets, count=1) == [(1, 1)]  # class 1 has most clips


def test_prototype_maps__skip_unreadable_clips() -> None:
    backbone, sound = encoder(), waves()
    lengths = torch.full((6,), SAMPLES)
    lengths[5] = 1600
    torch.manual_seed(2)
    probe = build_probe("cgp", classes=4, width=D, depth=L, has_cls=True, prototypes=20)
    readable = [0, 1, 3, 4, 5]
    whole = next(batches(sound, batch=6, lengths=lengths))
    batch = WaveBatch(
        waves=whole.waves[readable],
        lengths=lengths[readable],
        targets=whole.targets[readable],
        keys=[whole.keys[i] for i in readable],
        positions=torch.tensor(readable),
        skipped=[],
    )
    found = prototype_maps(
        probe.train(),
        backbone,
        [batch],
        classes=[0, 1, 2, 3, 0, 2],
        labels=["w", "x", "y", "z"],
        frames=FRAMES,
    )
    assert probe.training
    assert [(m["key"], m["label"]) for m in found] == [
        ("clip0", "w"), ("clip1", "x"), ("clip3", "z"), ("clip4", "w"), ("clip5", "y")
    ]  # fmt: skip
    features = encode(backbone.eval(), batch, frames=FRAMES)
    with torch.no_grad():
        logits = probe.eval()(features)
    for row, class_id in enumerate([0, 1, 3, 0, 2]):
        m = found[row]
        wanted = evidence(probe, features, class_id).map[row]
        torch.testing.assert_close(torch.from_numpy(m["evidence"]), wanted, atol=1e-5, rtol=1e-4)
        assert m["logit"] == pytest.approx(float(logits[row, class_id]), abs=1e-4)
        assert m["spectrogram"].shape == (FRAMES, 128)
        assert m["hop_ms"] == 10
    assert [m["seconds"] for m in found] == pytest.approx([0.31] * 4 + [0.1])
    own = prototype_maps(
        probe, backbone, [batch], classes=[0, 1, 2, 3, 0, 2], labels=["w", "x", "y", "z"],
        frames=None,
    )  # fmt: skip
    assert [m["spectrogram"].shape[0] for m in own] == [32, 32, 32, 32, 16]
    alone = backbone(batch.waves[4, : batch.lengths[4]])
    wanted = evidence(probe, alone, 2).map[0]
    torch.testing.assert_close(torch.from_numpy(own[4]["evidence"]), wanted, atol=1e-5, rtol=1e-4)
