"""Probes against the slow references, their interface, registration and counts."""

import importlib
import re
from dataclasses import asdict

import pytest
import torch
from torch import nn

from bat.config.probing import Head
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.probes.base import ORDER, Probe, build_probe, expand, known_probes
from bat.types import Features, Grid, Needs
from tests.reference import probes as slow

L, B, T, FREQ, D, C, K = 3, 2, 4, 2, 16, 5, 7


LEVELS = [(name, level) for name, probe in known_probes().items() for level in probe.levels]
CLS = {"has_cls": True, "level": "clip"}


def _features(seed: int = 0, dtype: torch.dtype = torch.float32) -> Features:
    g = torch.Generator().manual_seed(seed)
    return Features(
        patches=torch.randn(L, B, T, FREQ, D, generator=g).to(dtype),
        cls=torch.randn(L, B, D, generator=g).to(dtype),
        entry=torch.randn(B, T, FREQ, D, generator=g).to(dtype),
    )


def _probe(name: str, *, level: str = "", has_cls: bool = True, **head: object) -> Probe:
    torch.manual_seed(0)
    level = level or ("frame" if name == "asr" else "clip")
    head = {"hidden": 6, **head} if name == "asr" else head
    encoder = BAT(width=D, depth=L, heads=2, grid=Grid(T, FREQ)) if name == "vqt" else None
    words = {"classes": C, "width": D, "depth": L, "has_cls": has_cls, "level": level}
    return build_probe(name, **words, encoder=encoder, **{"prototypes": K, **head})


def _cut(features: Features, needs: Needs, has_cls: bool) -> Features:
    """What an encoder with or without class token hands to a probe of these needs."""
    return Features(
        patches=features.patches[L - needs.blocks(L) :],
        cls=features.cls if has_cls else None,
        entry=features.entry if needs.entry else None,
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


def test_cgp_takes_the_mean_patch_of_each_block_for_a_class_token():
    features = _features()
    probe = _probe("cgp", has_cls=False, cls="mean").eval()
    with torch.no_grad():
        probe.layer_logits.copy_(torch.tensor([0.3, -1.0, 0.5]))
        weights = (probe.layer_logits, probe.prototypes, probe.fc.weight, probe.fc.bias)
        wanted = slow.cgp(features.patches, None, *weights, "clip", mean_as_cls=True)
        torch.testing.assert_close(probe(features), wanted, atol=1e-5, rtol=1e-5)
        other = _probe("cgp", has_cls=False, cls="patches").eval()
        other.load_state_dict(probe.state_dict())
        assert (other(features) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"has_cls": True, "cls": "mean"}, "head.cls=mean .* this encoder has one"),
        ({"has_cls": True, "cls": "patches"}, "head.cls=patches .* this encoder has one"),
        ({"has_cls": False, "level": "frame", "cls": "mean"}, "head.cls=mean .* level=frame"),
        ({"has_cls": False, "cls": "first"}, "head.cls=first is not known: patches or mean"),
    ],
)
def test_a_stand_in_for_a_class_token_is_not_ignored(words, message):
    with pytest.raises(UserError, match=message):
        _probe("cgp", **words)


@pytest.mark.parametrize("name", ["protobin", "protofloat"])
@pytest.mark.parametrize("level", ["clip", "frame"])
def test_prototypes_equal_the_slow_form(name, level):
    features, probe = _features(), _probe(name, level=level).eval()
    with torch.no_grad():
        weights = (probe.prototypes, probe.fc.weight, probe.fc.bias)
        wanted = slow.protobin(features.patches, *weights, level, signs=name == "protobin")
        torch.testing.assert_close(probe(features), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", ["clip", "frame"])
def test_mlp_is_what_it_says(level):
    features, probe = _features(), _probe("mlp", level=level, hidden=9).eval()
    with torch.no_grad():
        nn.init.normal_(probe.norm.weight)
        x = features.cls[-1] if level == "clip" else features.patches[-1].mean(2)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6) ** 0.5
        x = (x * probe.norm.weight + probe.norm.bias) @ probe.hidden.weight.T + probe.hidden.bias
        x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        wanted = x @ probe.fc.weight.T + probe.fc.bias
        torch.testing.assert_close(probe(features), wanted, atol=1e-5, rtol=1e-5)
    assert _probe("mlp").hidden.weight.shape == (D, D)


@pytest.mark.parametrize(
    ("name", "level", "has_cls"),
    [(*x, cls) for x in LEVELS for cls in (True, False) if cls or x[0] != "vqt"],
)  # vqt without a class token: BAT's blocks have one; what it reads is tested below
def test_what_a_probe_asks_for_is_all_it_reads(name, level, has_cls):
    """Handed that alone, its answer is the one it has from everything."""
    probe = _probe(name, level=level, has_cls=has_cls).eval()
    needs = type(probe).needs(has_cls=has_cls, level=level)
    features = _features()
    with torch.no_grad():
        assert torch.equal(probe(_cut(features, needs, has_cls)), probe(features))


def test_no_probe_asks_for_more_than_it_needs():
    """Patches cost most: none where class tokens will do, else the last block's where that will."""
    table = {
        (name, level, has_cls): known_probes()[name].needs(has_cls=has_cls, level=level)
        for name, level in LEVELS
        for has_cls in (True, False)
    }
    for (name, level, has_cls), needs in table.items():
        wants = "none" if has_cls and level == "clip" else None
        if name in ("linear", "mlp"):
            assert needs == Needs(wants or "last"), (name, level, has_cls)
        elif name in ("lcgp", "h2t", "asr"):
            assert needs == Needs(wants or "all"), (name, level, has_cls)
        else:
            blocks = "all" if name in ("cgp", "vqt") else "last"
            assert needs == Needs(blocks, entry=name == "vqt"), (name, level, has_cls)


def test_vqt_takes_the_mean_patch_without_a_class_token():
    features = _features()
    summary = _probe("vqt", has_cls=False).read(features)[0]
    torch.testing.assert_close(summary, features.patches[-1].mean((1, 2)))
    assert torch.equal(_probe("vqt").read(features)[0], features.cls[-1])


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_bf16_features_under_autocast_stay_near_float32(name, level):
    exact = _features()
    rough = _features(dtype=torch.bfloat16)
    probe = _probe(name, level=level).eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = probe(rough)
    assert out.shape == ((B, T * probe.outputs_per_patch, C) if level == "frame" else (B, C))
    torch.testing.assert_close(out.float(), probe(exact).detach(), atol=0.05, rtol=0.05)
    out.float().square().sum().backward()
    for parameter in probe.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", ["cgp", "protobin", "protofloat", "h2t"])
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


def test_unknown_probe_lists_the_known():
    with pytest.raises(UserError, match=r"probe=cpg \(did you mean 'cgp'\?\).*linear"):
        _probe("cpg")
    with pytest.raises(UserError, match=r"bat\.probes\.cgp\.Nothing"):
        _probe("bat.probes.cgp.Nothing")
    with pytest.raises(UserError, match="level=word"):
        _probe("cgp", level="word")


def test_dotted_path_is_a_probe():
    assert type(_probe("bat.probes.linear.Linear")) is known_probes()["linear"]


def test_matrices_decay_and_nothing_else():
    """The weights of linear maps, and these only, whatever the number of their axes."""
    spared = {name: {"prototypes"} for name in ("cgp", "protobin", "protofloat")}
    spared |= {"proto": {"prototypes", "raw_weights"}, "ep": {"queries"}, "vqt": {"queries"}}
    for name in known_probes():
        probe = _probe(name)
        own = {n: p for n, p in probe.named_parameters() if p.ndim > 1}
        kinds = (nn.Linear, nn.ConvTranspose1d)
        linear = {f"{n}.weight" for n, m in probe.named_modules() if isinstance(m, kinds)}
        linear |= {n for n in own if n.startswith("lstm.")}
        assert probe.no_weight_decay() == spared.get(name, set())
        assert set(own) - probe.no_weight_decay() == linear, name


def test_prototypes_a_class_or_in_total():
    for name in ("protobin", "protofloat"):
        assert len(_probe(name).prototypes) == K
        assert len(_probe(name, per_class=3).prototypes) == 3 * C
        assert _probe(name, per_class=3).fc.in_features == 3 * C
    assert len(_probe("proto").prototypes) == 20 * C  # bound to classes: never ``prototypes``
    with_them = {n for n, probe in known_probes().items() if probe.has_prototypes}
    assert with_them == {"cgp", "protobin", "protofloat", "proto"}


def test_all_is_every_probe_of_the_level_in_a_fixed_order():
    assert set(ORDER) == set(known_probes())
    assert expand(["all"], level="clip") == [name for name in ORDER if name != "asr"]
    frame = ["linear", "mlp", "lcgp", "h2t", "proto", "protofloat", "protobin", "cgp"]
    assert expand(["all"], level="frame") == frame
    assert "vqt" not in expand(["all"], level="clip", encoder=False)
    assert len(expand(["all"], level="clip", encoder=False)) == len(ORDER) - 2
    assert expand(["cgp", "mlp", "x.Y"], level="frame") == ["cgp", "mlp", "x.Y"]
    for methods in (["cgp", "cgp"], ["all", "cgp"]):
        with pytest.raises(UserError, match="names cgp more than once"):
            expand(methods, level="clip")


@pytest.mark.parametrize("name", list(known_probes()))
def test_parameter_counts_are_those_of_the_file_heads(name):
    """The file's docstring says what the settings' defaults build."""
    cls = known_probes()[name]
    text = " ".join((importlib.import_module(cls.__module__).__doc__ or "").split())
    said = re.search(r"Parameters at D = 768, C = 527, L = 12(?: \([^)]*\))?: (.+)\.$", text)
    assert said is not None, cls.__module__
    several = dict(re.findall(r"``(\w+)`` ([\d,]+)", said[1]))
    count = int((several[name] if several else said[1]).replace(",", ""))
    with torch.device("meta"):
        words = {"classes": 527, "width": 768, "depth": 12, "has_cls": True}
        encoder = BAT(depth=1) if name == "vqt" else None
        words["level"] = cls.levels[0]
        probe = build_probe(name, **words, encoder=encoder, **asdict(Head()))
    assert sum(p.numel() for p in probe.parameters()) == count
