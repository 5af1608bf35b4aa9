"""BEATs against the paper's numbers, a second implementation, and slow versions of its parts."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bat
from bat import weights as files
from bat.encoders import beats
from bat.encoders.beats import BEATs
from bat.errors import UserError
from bat.probes.base import build_probe
from bat.types import Features
from tests.golden_files import Golden

CLOSE = {"atol": 1e-4, "rtol": 0}
CFG = {
    **{"encoder_layers": 2, "encoder_embed_dim": 48, "encoder_ffn_embed_dim": 64},
    **{"encoder_attention_heads": 4, "embed_dim": 24, "activation_fn": "gelu"},
    **{"layer_norm_first": False, "deep_norm": True, "conv_bias": False, "conv_pos": 128},
    **{"conv_pos_groups": 16, "relative_position_embedding": True, "num_buckets": 320},
    **{"max_distance": 800, "gru_rel_pos": True, "input_patch_size": 16, "dropout": 0.1},
    **{"encoder_layerdrop": 0.05, "finetuned_model": False, "predictor_class": 527},
}


def tiny(seed: int = 0, **words: Any) -> BEATs:
    torch.manual_seed(seed)
    sizes = {"width": 48, "depth": 2, "heads": 4, "embed_width": 24, "mlp_width": 64}
    model = BEATs(**{**sizes, **words}).eval()
    for name, p in model.named_parameters():  # biases, tables and norms that matter
        if p.dim() == 1 or "relative" in name or "grep" in name:
            nn.init.normal_(p, 1.0 * ("norm.weight" in name), 0.5)
    return model


def published(model: BEATs) -> dict[str, Tensor]:
    """The names of a published file, the table under every layer."""
    theirs = {own: name for name, own in reversed(beats.NAMES.items()) if "param" not in name}
    state = {}
    for name, tensor in model.state_dict().items():
        begin = next((own for own in theirs if name.startswith(own)), "")
        state[theirs.get(begin, "") + name.removeprefix(begin)] = tensor
    table = state.pop("relative_bias.weight")
    for b in range(model.depth):
        state[f"encoder.layers.{b}.self_attn.relative_attention_bias.weight"] = table.clone()
    return state


def same(found: nn.Module, wanted: nn.Module) -> bool:
    ours, theirs = found.state_dict(), wanted.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def mean_as_class(encoder: Any) -> BEATs:
    config = {**encoder.config(), "cls": "mean"}
    return BEATs.from_weights(encoder.state_dict(), config=config, heads=None).eval()


@pytest.mark.parametrize("case", ["short", "full", "long"])
def test_golden__tokens_and_means_of_all_blocks(golden: Path, case: str) -> None:
    data = Golden(golden / "beats_tiny.npz")
    encoder = bat.load_encoder(golden / "checkpoint_beats_tiny.pt")
    assert (type(encoder), encoder.has_cls) == (BEATs, False)
    with torch.no_grad():
        assert encoder.features(data[f"{case}/x"]).cls is None
        found = mean_as_class(encoder).features(data[f"{case}/x"])
    patches = found.patches.permute(0, 1, 4, 2, 3)  # (L, B, D, T, F)
    patches = patches[:, :, :, ::8] if case == "full" else patches
    torch.testing.assert_close(patches, data[f"{case}/patch_tokens"], **CLOSE)
    torch.testing.assert_close(found.cls, data[f"{case}/cls_tokens"], **CLOSE)


@pytest.mark.parametrize("cls", ["none", "mean"])
def test_golden__cgp_on_it(golden: Path, cls: str) -> None:
    """With the means as class tokens, or with ``head.cls=mean``."""
    data = Golden(golden / "beats_tiny.npz")
    encoder: Any = bat.load_encoder(golden / "checkpoint_beats_tiny.pt")
    encoder = mean_as_class(encoder) if cls == "mean" else encoder
    shape = {"width": 64, "depth": 3, "has_cls": encoder.has_cls, "prototypes": 8, "classes": 5}
    probe = build_probe("cgp", **shape, cls=None if encoder.has_cls else "mean").eval()
    own = {"layer_logits": "block_attention", "prototypes": "prototype_vectors"}
    weights = {n: data[f"cgp/w/{own.get(n, n)}"] for n in probe.state_dict()}
    weights["prototypes"] = weights["prototypes"].flatten(1)
    probe.load_state_dict(weights)
    with torch.no_grad():
        logits = probe(encoder.features(data["short/x"]))
    torch.testing.assert_close(logits, data["cgp/logits"], **CLOSE)


def test_openbeats__gives_the_same_tokens_of_all_blocks(tmp_path: Path) -> None:
    theirs = pytest.importorskip("openbeats.beats_encoder", reason="openbeats is not installed")
    sizes = {**CFG, "encoder_layers": 4, "encoder_embed_dim": 96, "encoder_ffn_embed_dim": 192}
    worst, seen = 0.0, list[Tensor]()
    for seed in range(2):
        torch.manual_seed(seed)
        # reads beats_config only; layer-wise decay and dropouts act in training alone
        oracle = theirs.BeatsEncoder(1, beats_config=sizes, fbank_mean=0.0, fbank_std=0.5).eval()
        for name, p in oracle.named_parameters():
            if p.dim() == 1 or "relative" in name or "grep" in name:
                nn.init.normal_(p, 1.0 * ("norm.weight" in name), 0.5)
        model = {n: t for n, t in oracle.state_dict().items() if "_pad." not in n}
        torch.save({"cfg": sizes, "model": model}, tmp_path / "w.pt")
        ours = bat.load_encoder(tmp_path / "w.pt")
        for layer in oracle.encoder.layers:
            layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0].transpose(0, 1)))
        for patches in (1, 6, 31, 64, 65, 100):
            x = torch.randn(2, 1, 16 * patches, 128)
            parts = []
            with torch.no_grad():
                found = ours.features(x).patches.flatten(2, 3)  # (L, B, N, D)
                for chunk in x.split(64 * 16, dim=2):  # it has no chunks of its own
                    seen.clear()
                    oracle.extract_features(chunk[:, 0], skip_fbank_extraction=True)
                    parts.append(torch.stack(seen))
            wanted = torch.cat(parts, dim=2)
            torch.testing.assert_close(found, wanted, **CLOSE)
            worst = max(worst, float((found - wanted).abs().max()))
        wave = 0.1 * torch.randn(2, 400 + 160 * (16 * 7 - 1))  # 7 patches without a rest
        oracle.fbank_mean, oracle.fbank_std = 15.41663, 6.55582
        seen.clear()
        with torch.no_grad():
            oracle.extract_features(wave)
            found = ours(wave).patches.flatten(2, 3)
        torch.testing.assert_close(found, torch.stack(seen), **CLOSE)
    print(f"largest difference {worst:.1e}")


def test_file__published_and_fine_tuned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, model = tmp_path / "BEATs.pt", published(tiny())
    torch.save({"cfg": CFG, "model": model}, path)
    assert same(bat.load_encoder(path), tiny())
    tuned = {**model, "predictor.weight": torch.ones(527, 48), "predictor.bias": torch.ones(527)}
    torch.save({"cfg": {**CFG, "finetuned_model": True}, "label_dict": {0: "/m/09x0r"},
                "model": tuned}, path)  # fmt: skip
    assert same(bat.load_encoder(path), tiny())
    assert "set aside, no part of the encoder: predictor.weight" in caplog.text
    again = {n.replace("weight_g", "parametrizations.weight.original0")
             .replace("weight_v", "parametrizations.weight.original1"): t
             for n, t in model.items()}  # fmt: skip
    torch.save({"state_dict": {f"model.{n}": t.half() for n, t in again.items()}}, path)
    found = bat.load_encoder(path)
    assert "states no cfg" in caplog.text
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    for name, tensor in tiny().state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.half().float()), name
    with pytest.raises(UserError, match="teacher"):
        bat.load_encoder(path, weights="teacher")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(({n: v}, rf"{n}={v!r} \(here") for n, v in {
            "deep_norm": False, "max_distance": 1280, "conv_pos": 95, "activation_fn": "relu",
            "encoder_layers": 3, "encoder_attention_heads": 8, "num_buckets": 32,
        }.items()),
        *(({n: None}, rf"{n}=.* \(here") for n in beats.ABSENT),
    ],
)  # fmt: skip
def test_file__of_another_model_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    cfg = {n: v for n, v in {**CFG, **change}.items() if v is not None}
    torch.save({"cfg": cfg, "model": published(tiny())}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=said):
        bat.load_encoder(tmp_path / "w.pt")


def test_file__weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    table = "encoder.layers.1.self_attn.relative_attention_bias.weight"
    norm = "encoder.layers.1.fc1.bias"
    for change, said in (
        ({table: torch.ones(320, 4)}, rf"{table} is not the table"),
        ({norm: None}, r"missing: blocks\.1\.fc1\.bias"),
        ({"encoder.layers.7.fc1.bias": torch.ones(64)}, "numbered up to 7"),
        ({"surprise": torch.ones(1)}, "unexpected: surprise"),
        ({"post_extract_proj.weight": torch.ones(3)}, "embed_proj.weight missing or of another"),
        ({"encoder.pos_conv.0.weight_v": torch.ones(48, 3, 64)}, r"shape: pos_v is \(48, 3, 64\)"),
    ):
        state = {n: t for n, t in {**published(tiny()), **change}.items() if t is not None}
        torch.save({"cfg": CFG, "model": state}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=said):
            bat.load_encoder(tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"blocks\.2\.fc1"):  # before anything of 10^9 is built
        BEATs.from_weights(
            tiny().state_dict(), config={**tiny().config(), "width": 16_384, "depth": 50},
            heads=None,
        )  # fmt: skip


def test_export__keeps_weights_and_settings(tmp_path: Path) -> None:
    model = tiny(cls="mean", frontend={"kind": "beats", "statistics": "esc50"})
    weights = {"student": model.state_dict()}
    files.export(tmp_path, backbone="beats", encoder=model.config(), weights=weights, meta={})
    found = bat.load_encoder(tmp_path)
    assert (found.config(), same(found, model)) == (model.config(), True)
    wave = torch.randn(1, 9000)
    assert torch.equal(found(wave).cls, model(wave).cls)


def test_buckets__are_exact_near_and_logarithmic_far() -> None:
    for r in (-2000, -800, -799, -81, -80, -79, -1, 0, 1, 79, 80, 81, 200, 511, 799, 800, 5000):
        near = abs(r)
        if near >= 80:
            near = min(159, 80 + math.floor(math.log(near / 80) / math.log(10) * 80))
        assert beats._bucket(torch.tensor([r])).item() == near + 160 * (r > 0), r


def slow_attention(attn: beats.SelfAttention, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
    heads = []
    for h in range(attn.heads):
        d = x.shape[-1] // attn.heads
        own = slice(h * d, (h + 1) * d)
        q, k, v = (
            attn.q_proj(x)[..., own],
            attn.k_proj(memory)[..., own],
            attn.v_proj(memory)[..., own],
        )
        s = attn.grep_linear(q)
        g1, g2 = s[..., :4].sum(-1).sigmoid(), s[..., 4:].sum(-1).sigmoid()
        gate = g1 * (g2 * attn.grep_a[0, h, 0, 0] - 1) + 2
        scores = q @ k.transpose(1, 2) / d**0.5 + gate[..., None] * bias[h]
        heads.append(scores.softmax(-1) @ v)
    return attn.out_proj(torch.cat(heads, -1))


@pytest.mark.parametrize("mask", [1, 1 << 24])  # one clip at a time, all at once
def test_attention__values_and_gradients_do_not_depend_on_the_groups(
    mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beats, "MASK", mask)
    attn = tiny().blocks[0].self_attn
    x, bias = torch.randn(3, 24, 48, requires_grad=True), torch.randn(4, 24, 24, requires_grad=True)
    grads = []
    for out in (attn(x, bias, x), slow_attention(attn, x, x, bias)):
        out.square().sum().backward()
        grads.append([out, x.grad, bias.grad, *(p.grad for p in attn.parameters())])
        grads[-1] = [g.detach().clone() for g in grads[-1]]
        x.grad = bias.grad = None
        attn.zero_grad()
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("frames", [48, 1040])  # one chunk; 64 time patches and one
def test_queries__stand_in_front_of_the_tokens_and_change_none(frames: int) -> None:
    encoder, q = tiny(), 3
    x = torch.randn(2, 1, frames, 128)
    queries = torch.randn(2, q, 48, requires_grad=True)
    with torch.no_grad():
        features = encoder.features(x, entry=True)
    found = encoder.query_blocks(queries, features)
    found.square().sum().backward()
    assert queries.grad is not None
    assert all(p.grad is None for p in encoder.parameters())
    with torch.no_grad():
        for b, block in enumerate(encoder.blocks):
            before = features.entry if b == 0 else features.patches[b - 1]
            results = []
            for t, chunk in enumerate(before.split(64, dim=1)):
                z = chunk.flatten(1, 2)  # (B, N, D)
                numbers = torch.arange(q + z.shape[1])
                both = torch.cat([queries[b].expand(2, -1, -1), z], dim=1)
                bias = encoder.bias(numbers, numbers[q:])
                y = block.self_attn_layer_norm(
                    block.c * both + slow_attention(block.self_attn, both, z, bias)
                )
                mlp = block.fc2(nn.functional.gelu(block.fc1(y)))
                y = block.final_layer_norm(block.c * y + mlp)
                after = features.patches[b][:, 64 * t : 64 * t + 64].flatten(1, 2)
                torch.testing.assert_close(y[:, q:], after, **CLOSE)
                results.append(y[:, :q])
            torch.testing.assert_close(found[b], torch.stack(results).mean(0), **CLOSE)


def test_queries__of_clips_of_several_lengths_read_their_own() -> None:
    encoder, wave = tiny(), torch.randn(3, 16000)
    lengths = torch.tensor([16000, 4800, 9000])
    queries = torch.randn(2, 2, 48)
    with torch.no_grad():
        x = encoder.inputs(wave, lengths)
        batch = encoder.features_alone(x, encoder.time_patches(lengths), entry=True)
        found = encoder.query_blocks(queries, batch)
        for row, samples in enumerate(lengths.tolist()):
            alone: Features = encoder.features(encoder.inputs(wave[row, :samples]), entry=True)
            wanted = encoder.query_blocks(queries, alone)[:, 0]
            torch.testing.assert_close(found[:, row], wanted, atol=1e-5, rtol=1e-5)


def test_parameters__count_layers_decay_and_first_values() -> None:
    with torch.device("meta"):
        base = BEATs()
    assert sum(p.numel() for p in base.parameters()) == pytest.approx(90.3e6, abs=0.1e6)
    assert len(base.state_dict()) + 11 == 250  # files list the table twelve times
    layers = {n: base.layer_of(n) for n, _ in base.named_parameters()}
    assert layers["relative_bias.weight"] == layers["blocks.0.fc1.bias"] == 1
    assert {n for n, layer in layers.items() if layer == 0} == {
        n for n in layers if n.startswith(("patch_embed", "embed_", "pos_"))
    }
    assert layers["blocks.11.self_attn.grep_a"] == 12
    assert base.no_weight_decay() == {
        "relative_bias.weight", *(f"blocks.{b}.self_attn.grep_a" for b in range(12))
    }  # fmt: skip
    torch.manual_seed(0)
    model = BEATs(width=96, depth=2, heads=4, embed_width=64, mlp_width=256)
    attn = copy.deepcopy(model.blocks[1]).self_attn
    for weight, std in (
        (attn.q_proj.weight, (2 / 192) ** 0.5),
        (attn.out_proj.weight, 16**-0.25 * (2 / 192) ** 0.5),
        (model.blocks[0].fc1.weight, 16**-0.25 * (2 / 352) ** 0.5),
        (model.relative_bias.weight, 0.02),
        (model.pos_v, (4 / (128 * 96)) ** 0.5),
    ):
        assert weight.detach().std().item() == pytest.approx(std, rel=0.05)
    assert torch.equal(attn.grep_a, torch.ones(1, 4, 1, 1))
    assert not model.pos_bias.any()
    torch.testing.assert_close(model.pos_g, model.pos_v.norm(dim=(0, 1), keepdim=True))
