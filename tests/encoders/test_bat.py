"""The encoder against the golden vectors and its own promises; what query tuning takes of it."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bat.encoders.base import Encoder, find_encoder
from bat.encoders.bat import BAT
from bat.encoders.strict import load_strictly
from bat.errors import UserError
from bat.nn.block import DropPath
from bat.types import Grid, Views
from tests.golden_files import Golden

CASES = [
    (gate, order, pre, scale)
    for gate in (1, 0)
    for order, pre, scale in ((0, 1, 0), (1, 0, 0), (0, 0, 0), (0, 1, 1))
]


def tiny(**keywords) -> BAT:
    torch.manual_seed(0)
    return BAT(**{"width": 32, "depth": 2, "heads": 4, "grid": Grid(4, 8), **keywords}).eval()


@pytest.mark.parametrize(("gate", "order", "pre", "scale"), CASES)
def test_golden_encoder__student_and_teacher(
    golden, gate: int, order: int, pre: int, scale: int
) -> None:
    data = Golden(golden / "encoder_tiny.npz")
    case = f"gate{gate}_normfirst{order}_prenorm{pre}_layerscale{scale}"
    used = set(data.meta["cases"][case]["weights_used"])
    weights = {n: t for n, t in data.under("w/").items() if n in used}
    model = BAT(
        width=48,
        depth=3,
        heads=4,
        grid=Grid(6, 4),
        gate=bool(gate),
        norm_order="pre" if order else "post",
        pre_norm=bool(pre),
        layer_scale=0.1 if scale else None,
    ).eval()
    load_strictly(model, weights, case)

    x, keep = data["x"], data["ids_keep_sorted"]
    with torch.no_grad():
        cls, patches = model.encode_views(x, Views(keep, data["mask"].bool()))
        full = model.features(x)
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(cls, data[f"{case}/student_cls"], **close)
    torch.testing.assert_close(patches, data[f"{case}/student_patches"], **close)
    torch.testing.assert_close(full.cls[-1], data[f"{case}/student_unmasked_cls"], **close)
    flat = full.patches.flatten(2, 3)  # (L, B, N, D)
    torch.testing.assert_close(flat[-1], data[f"{case}/student_unmasked_patches"], **close)
    torch.testing.assert_close(full.cls[-1], data[f"{case}/teacher_cls"], **close)
    torch.testing.assert_close(flat, data[f"{case}/teacher_features"], **close)


def test_golden_encoder__inner_details(golden) -> None:
    data = Golden(golden / "encoder_tiny.npz")
    used = set(data.meta["cases"]["gate1_normfirst0_prenorm1_layerscale0"]["weights_used"])
    model = BAT(width=48, depth=3, heads=4, grid=Grid(6, 4)).eval()
    load_strictly(model, {n: t for n, t in data.under("w/").items() if n in used}, "golden")
    tokens = data["detail_tokens_into_block0"]
    with torch.no_grad():
        found = {
            "detail_patch_embed": model.patch_embed(data["x"]),
            "detail_block0_attention_out": model.blocks[0].attn(tokens),
            "detail_block0_out": model.blocks[0](tokens)[0],
        }
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, data[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("gate", [True, False])
def test_golden_encoder__long_and_short_inputs(golden, gate: bool) -> None:
    data = Golden(golden / "heads_tiny.npz")
    weights = {n: t for n, t in data.under("vit/w/").items() if gate or ".attn.gate." not in n}
    model = BAT.from_weights(weights, config=None, heads=4).eval()
    assert model.depth == 2
    close = {"atol": 1e-4, "rtol": 0}
    checked = 0
    for length in ("long", "short"):
        with torch.no_grad():
            features = model.features(data[f"vit/x_{length}"])
        end = f"{length}_{'gate' if gate else 'nogate'}/patch_path_patch_tokens"
        for name in data.file.files:
            if name.startswith("vit/") and name.endswith(end):
                expected = data[name].permute(0, 1, 3, 4, 2)  # (L, B, D, T, F) -> (L, B, T, F, D)
                torch.testing.assert_close(features.patches, expected, **close)
                cls = data[name.replace("patch_path_patch_tokens", "patch_path_cls_tokens")]
                torch.testing.assert_close(features.cls, cls, **close)
                checked += 1
    assert checked == 2


def test_state_dict__names_are_the_papers() -> None:
    """A contract: other people's converters hang on these names."""
    names = set(tiny().state_dict())
    block = {
        f"{part}.{leaf}"
        for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "attn.gate", "mlp.fc1", "mlp.fc2")
        for leaf in ("weight", "bias")
    }
    outside = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    outside |= {"pre_norm.weight", "pre_norm.bias"}
    assert names == outside | {f"blocks.{b}.{n}" for b in range(2) for n in block}


def test_golden_base__names_and_counts(golden) -> None:
    from bat.nn.decoder import ViTDecoder

    schedules = json.loads((golden / "schedules.json").read_text())
    with torch.device("meta"):
        encoder, decoder = BAT(), ViTDecoder(768, Grid(64, 8))
    state = {f"encoder.{n}": t for n, t in encoder.state_dict().items()}
    state |= {f"decoder.{n}": t for n, t in decoder.state_dict().items()}
    as_first = {re.sub(r"blocks\.\d+", "blocks.0", n) for n in state}  # the file lists block 0
    assert as_first == set(schedules["paper_config_state_names"])
    counts = schedules["paper_config_param_counts"]
    assert sum(t.numel() for t in encoder.state_dict().values()) == counts["encoder"]
    assert sum(t.numel() for t in decoder.state_dict().values()) == counts["decoder"]
    trainable = sum(p.numel() for m in (encoder, decoder) for p in m.parameters())
    assert trainable == counts["student_trainable"]


def test_golden_base__initialisation_in_distribution(golden) -> None:
    from bat.nn.decoder import ViTDecoder

    schedules = json.loads((golden / "schedules.json").read_text())
    expected = schedules["init_stats_student_dim192"]
    torch.manual_seed(0)
    depth = 1 + max(int(n.split(".")[2]) for n in expected if n.startswith("encoder.blocks"))
    decoder_depth = 1 + max(int(n.split(".")[2]) for n in expected if n.startswith("decoder.bl"))
    parts = {
        "encoder": BAT(width=192, depth=depth, heads=3),
        "decoder": ViTDecoder(192, Grid(64, 8), depth=decoder_depth),
    }
    for part, module in parts.items():
        for name, tensor in module.state_dict().items():
            want = expected[f"{part}.{name}"]
            assert list(tensor.shape) == want["shape"], name
            scale = max(abs(want["max"]), abs(want["min"]), 1e-9)
            n = tensor.numel()
            assert float(tensor.std(unbiased=False)) == pytest.approx(
                want["std"], abs=0.02 * scale + 3 * want["std"] / (2 * n) ** 0.5
            ), name
            assert float(tensor.mean()) == pytest.approx(
                want["mean"], abs=1e-6 + 7 * want["std"] / n**0.5
            ), name


@pytest.mark.parametrize("kind", ["bat", "eat", "beats"])
def test_forward__waveform_in_features_out_with_every_front_end(kind: str) -> None:
    model = tiny(frontend={"kind": kind})
    with torch.no_grad():
        features = model(torch.randn(2, 16000) * 0.1)  # 101 frames -> 112 -> 7 time patches
        assert model(torch.randn(50) * 0.1).patches.shape == (2, 1, 1, 8, 32)
    assert features.patches.shape == (2, 2, 7, 8, 32)
    assert features.cls.shape == (2, 2, 32)
    assert model.hop_seconds == 0.16


def rates(model: BAT) -> list[float]:
    return [float(b.drop_path.rate) for b in model.blocks]


def test_drop_path__rises_linearly_from_zero(golden) -> None:
    model = BAT(width=32, depth=5, heads=4, grid=Grid(4, 8), drop_path=0.2)
    assert rates(model) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    model.set_drop_path(0.4)
    assert rates(model) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    expected = json.loads((golden / "schedules.json").read_text())
    model = BAT(width=16, depth=12, heads=2, grid=Grid(2, 2), drop_path=0.1)
    assert rates(model) == pytest.approx(expected["drop_path_rate_0.1_depth12_by_block"], abs=1e-7)


def test_drop_path__drops_whole_clips_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(20_000, 2, 3))
    kept = out[:, 0, 0]
    assert torch.equal(out, kept[:, None, None].expand_as(out))
    assert sorted(kept.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert float(kept.mean()) == pytest.approx(1, abs=0.02)  # deviation 0.004
    x = torch.ones(3, 2)
    assert torch.equal(drop.eval()(x), x)


def test_compile__one_graph_for_all_blocks_whatever_their_drop_path() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = BAT(width=16, depth=12, heads=2, grid=Grid(2, 8), drop_path=0.2).train()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    model.features(torch.rand(1, 1, 32, 128))
    assert counter.frame_count == 1


def test_config__builds_the_same_model_again() -> None:
    model = tiny(gate=False, pos_layout="grid", frontend={"hop_length": 80, "pad": "waveform"})
    again = BAT.from_weights(
        model.state_dict(), config=json.loads(json.dumps(model.config())), heads=None
    )
    assert again.config() == model.config()
    x = torch.rand(1, 1, 64, 128)
    assert torch.equal(again.eval().features(x).patches, model.features(x).patches)


def test_load_strictly__lists_everything_and_loads_nothing() -> None:
    model = tiny()
    state = {n: t + 1 for n, t in model.state_dict().items()}
    del state["cls_token"]
    state["surprise"] = torch.zeros(2)
    state["pre_norm.weight"] = torch.zeros(3)
    before = model.pre_norm.bias.clone()
    with pytest.raises(UserError) as caught:
        load_strictly(model, state, "the file")
    message = str(caught.value)
    assert "missing: cls_token" in message
    assert "unexpected: surprise" in message
    assert "shape: pre_norm.weight is (3,) in the file, (32,) here" in message
    assert torch.equal(model.pre_norm.bias, before)


def test_features__of_a_wrong_shape_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"60 frames x 128 mels"):
        tiny().features(torch.rand(1, 1, 60, 128))


def test_find_encoder__unknown_lists_the_known_and_dotted_is_imported() -> None:
    with pytest.raises(UserError, match=r"encoder=bert.*bat, .*eat"):
        find_encoder("bert")
    assert find_encoder("bat.encoders.bat.BAT") is BAT
    with pytest.raises(UserError, match=r"os\.system is not a subclass"):
        find_encoder("os.system")


def test_compile__has_no_graph_breaks() -> None:
    model = tiny()
    x = torch.rand(2, 1, 64, 128)
    compiled = torch.compile(lambda s: model.features(s), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).patches, model.features(x).patches)


def test_entry__is_what_the_first_block_takes_and_class_tokens_are_each_chunks() -> None:
    model = tiny()
    x = torch.rand(2, 1, 112, 128)  # 4 + 3 time patches
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        features = model.features(x, entry=True)
        parts = [model.features(chunk, entry=True) for chunk in x.split(64, dim=2)]
        plain = model.features(x)
    assert parts[0].entry.shape == (2, 4, 8, 32)
    assert torch.equal(parts[0].entry.flatten(1, 2), seen[0][:, 1:])
    assert parts[0].pieces is None  # one chunk
    assert torch.equal(features.entry, torch.cat([p.entry for p in parts], 1))
    assert torch.equal(features.pieces, torch.stack([p.cls for p in parts], 2))
    torch.testing.assert_close(features.cls, (parts[0].cls + parts[1].cls) / 2)
    assert plain.entry is None
    assert plain.pieces is None
    assert torch.equal(plain.patches, features.patches)


def test_query_blocks__cost_a_small_part_of_a_forward_pass() -> None:
    model = BAT(width=768, depth=1).eval()
    x, queries = torch.rand(1, 1, 1024, 128), torch.randn(1, 10, 768, requires_grad=True)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        features = model.features(x, entry=True)
    with FlopCounterMode(display=False) as tuning:
        model.query_blocks(queries, features).sum().backward()
    assert 0 < tuning.get_total_flops() < 0.1 * forward.get_total_flops()


def test_query_blocks__are_not_defined_for_every_encoder() -> None:
    class Other(BAT):
        query_blocks = Encoder.query_blocks

    model = Other(width=32, depth=1, heads=4, grid=Grid(4, 8))
    with pytest.raises(UserError, match="Other has no query_blocks: vqt is not defined"):
        model.query_blocks(torch.randn(1, 2, 32), model.features(torch.rand(1, 1, 64, 128)))
