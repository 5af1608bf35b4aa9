"""Probes against the slow references, their interface, registration and counts."""

import pytest
import torch

from bat.probes.base import Probe, build_probe, known_probes
from bat.shapes import Features, UserError
from tests.reference import probes as slow

L, B, T, FREQ, D, C, K = 3, 2, 4, 2, 16, 5, 7


def _features(seed: int = 0, dtype: torch.dtype = torch.float32) -> Features:
    g = torch.Generator().manual_seed(seed)
    return Features(
        patches=torch.randn(L, B, T, FREQ, D, generator=g).to(dtype),
        cls=torch.randn(L, B, D, generator=g).to(dtype),
    )


def _probe(name: str, *, level: str = "clip", has_cls: bool = True, **head: object) -> Probe:
    torch.manual_seed(0)
    return build_probe(
        name, classes=C, width=D, depth=L, has_cls=has_cls, level=level, prototypes=K, **head
    )


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("level", ["clip", "frame"])
def test_cgp_equals_the_slow_form(level, has_cls):
    features = _features()
    probe = _probe("cgp", level=level, has_cls=has_cls).eval()
    with torch.no_grad():
        probe.layer_logits.copy_(torch.tensor([0.3, -1.0, 0.5]))
        wanted = slow.cgp(
            features.patches,
            features.cls if has_cls else None,
            probe.layer_logits,
            probe.prototypes,
            probe.fc.weight,
            probe.fc.bias,
            level,
        )
        torch.testing.assert_close(probe(features), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", ["clip", "frame"])
def test_protobin_equals_the_slow_form(level):
    features, probe = _features(), _probe("protobin", level=level).eval()
    with torch.no_grad():
        wanted = slow.protobin(
            features.patches, probe.prototypes, probe.fc.weight, probe.fc.bias, level
        )
        torch.testing.assert_close(probe(features), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "lcgp", "cgp", "protobin"])
@pytest.mark.parametrize("level", ["clip", "frame"])
def test_bf16_features_under_autocast_stay_near_float32(name, level):
    exact = _features()
    rough = _features(dtype=torch.bfloat16)
    probe = _probe(name, level=level).eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = probe(rough)
    assert out.shape == ((B, T, C) if level == "frame" else (B, C))
    torch.testing.assert_close(out.float(), probe(exact).detach(), atol=0.05, rtol=0.05)
    out.float().square().sum().backward()
    for parameter in probe.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", ["cgp", "protobin"])
def test_the_last_layer_of_few_rows_is_float32_under_autocast(name):
    """No copy of its wide weight in autocast's type; at frame level, of many rows, there is one."""
    features = _features(dtype=torch.bfloat16)
    for level, dtype in (("clip", torch.float32), ("frame", torch.bfloat16)):
        probe, seen = _probe(name, level=level).eval(), []
        probe.fc.register_forward_hook(lambda *x, seen=seen: seen.append(x[2].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            probe(features)
        assert seen == [dtype]


def test_gates_start_uniform_and_sum_to_one():
    for name in ("lcgp", "cgp"):
        gate = _probe(name).layer_gate()
        assert gate.tolist() == pytest.approx([1 / L] * L)
        assert not gate.requires_grad
    assert _probe("linear").layer_gate() is None
    assert _probe("protobin").layer_gate() is None
    assert _probe("cgp").layer_logits.tolist() == [1, 1, 1]
    assert _probe("lcgp").layer_logits.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["cgp", "protobin"])
@pytest.mark.parametrize("level", ["clip", "frame"])
def test_a_probe_compiles_whole_and_equals_itself(name, level):
    """No graph break: pooling and mixing are one node each, forward and backward."""
    torch._dynamo.reset()
    features = _features()
    probe = _probe(name, level=level, dropout=0.0)
    compiled = torch.compile(probe, backend="aot_eager", fullgraph=True)
    grads = []
    for call in (probe, compiled):
        probe.zero_grad()
        out = call(features)
        out.square().sum().backward()
        grads.append([out.detach(), *(p.grad for p in probe.parameters())])
    for eager, whole in zip(*grads, strict=True):
        torch.testing.assert_close(whole, eager, atol=1e-6, rtol=1e-5)


def test_a_compiled_probe_runs_under_autocast():
    torch._dynamo.reset()
    probe = _probe("cgp").eval()
    compiled = torch.compile(probe, backend="aot_eager", fullgraph=True)
    features = _features(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(features), probe(features), atol=2e-2, rtol=2e-2)


def test_dropout_acts_in_training_only():
    features = _features()
    for name in known_probes():
        probe = _probe(name, dropout=0.5)
        assert not torch.equal(probe(features), probe(features)), name
        probe.eval()
        assert torch.equal(probe(features), probe(features)), name


def test_kernel_reaches_the_pooling():
    for name in ("cgp", "protobin"):
        with pytest.raises(UserError, match="kernel=fast is not known"):
            _probe(name, kernel="fast")(_features())


def test_unknown_probe_lists_the_known():
    with pytest.raises(UserError, match=r"unknown probe 'cpg'\. Did you mean 'cgp'\?.*linear"):
        _probe("cpg")
    with pytest.raises(UserError, match="cannot be imported"):
        _probe("bat.probes.cgp.Nothing")
    with pytest.raises(UserError, match="level=word"):
        _probe("cgp", level="word")


def test_dotted_path_is_a_probe():
    assert type(_probe("bat.probes.linear.Linear")) is known_probes()["linear"]


def test_names_that_do_not_decay_exist():
    for name in known_probes():
        probe = _probe(name)
        assert probe.no_weight_decay() <= set(dict(probe.named_parameters()))


@pytest.mark.parametrize(
    ("name", "count"),
    [("linear", 406_799), ("lcgp", 406_811), ("cgp", 23_490_539), ("protobin", 12_950_527)],
)
def test_parameter_counts_are_those_of_the_file_heads(name, count):
    with torch.device("meta"):
        probe = build_probe(name, classes=527, width=768, depth=12, has_cls=True)
    assert sum(p.numel() for p in probe.parameters()) == count
