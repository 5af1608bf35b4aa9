"""Query tuning against the paper's numbers; its gradients against autograd through all tokens."""

import copy

import pytest
import torch
from torch import nn

from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.nn.attention import take
from bat.probes.base import build_probe
from bat.types import Features, Grid
from tests.golden_files import Golden
from tests.reference import probes as slow

CASES = [(length, gate) for length in ("long", "short") for gate in ("gate", "nogate")]


def _encoder(**keywords) -> BAT:
    torch.manual_seed(0)
    return BAT(**{"width": 16, "depth": 3, "heads": 4, "grid": Grid(4, 8), **keywords}).eval()


def _probe(encoder, **head):
    torch.manual_seed(1)
    words = {"classes": 5, "width": encoder.width, "depth": encoder.depth, "has_cls": True}
    return build_probe("vqt", **words, encoder=encoder, **{"queries": 3, **head})


def _golden_encoder(data, gate):
    weights = data.under("vit/w/")
    if gate == "nogate":
        weights = {n: t for n, t in weights.items() if ".attn.gate." not in n}
    return BAT.from_weights(weights, config=None, heads=4).eval()


def _golden_probe(data, encoder, **head):
    probe = _probe(encoder, **head).eval()
    named = {"queries": "vqt", "fc.weight": "head.1.weight", "fc.bias": "head.1.bias"}
    named |= {"norm.weight": "head.0.weight", "norm.bias": "head.0.bias"}
    state = {n: data[f"vit/vqt_w/{named[n]}"] for n in probe.state_dict()}
    probe.load_state_dict(state)
    return probe


@pytest.mark.parametrize(("length", "gate"), CASES)
def test_golden_features_and_logits(golden, length, gate):
    data = Golden(golden / "heads_tiny.npz")
    encoder = _golden_encoder(data, gate)
    probe = _golden_probe(data, encoder)
    with torch.no_grad():
        features = encoder.features(data[f"vit/x_{length}"], entry=True)
        parts = probe.read(features)
        logits = probe(features)
    close, case = {"atol": 1e-4, "rtol": 0}, f"vit/{length}_{gate}"
    torch.testing.assert_close(torch.cat(parts, -1), data[f"{case}/vqt_features_unnormalised"],
                               **close)  # fmt: skip
    normed = torch.cat([nn.functional.normalize(p, dim=-1) for p in parts], -1)
    torch.testing.assert_close(normed, data[f"{case}/vqt_features"], **close)
    torch.testing.assert_close(logits, data[f"{case}/vqt_logits"], **close)
    if (length, gate) == ("short", "gate"):
        wanted = data[f"{case}/vqt_logits_without_head_norm"]
        for words in ({"norm": False}, {"norm": True, "vqt_norm": False}):
            bare = _golden_probe(data, encoder, **words)
            with torch.no_grad():
                torch.testing.assert_close(bare(features), wanted, **close)


@pytest.mark.parametrize("gate", ["gate", "nogate"])
def test_golden_features_of_some_tokens_only(golden, gate):
    """The reference keeps 20 of the 56 patches; to the probe they are a clip of 20 patches."""
    data = Golden(golden / "heads_tiny.npz")
    encoder = _golden_encoder(data, gate)
    with torch.no_grad():
        tokens = take(encoder.embed_patches(data["vit/x_short"]), data["vit/ids_keep_sorted_short"])
        layers = torch.stack([x for x, _ in encoder.layers(tokens)])  # (L, B, 21, D)
        entry = encoder.enter(tokens)[:, 1:]
        features = Features(layers[:, :, 1:, None], layers[:, :, 0], entry[:, :, None])
        parts = _golden_probe(data, encoder).read(features)
    normed = torch.cat([nn.functional.normalize(p, dim=-1) for p in parts], -1)
    torch.testing.assert_close(
        normed, data[f"vit/short_{gate}/vqt_features_masked"], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("frames", [32, 64, 112])  # below one chunk, one, 64 + 48
@pytest.mark.parametrize(
    "keywords",
    [{}, {"gate": False}, {"norm_order": "pre", "pre_norm": False}, {"layer_scale": 0.3}],
    ids=["base", "no gate", "pre-norm", "layer scale"],
)
def test_gradients_of_queries_equal_autograd_through_every_token(frames, keywords):
    encoder = _encoder(**keywords).double()
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):  # zero at the start
            nn.init.normal_(parameter, std=0.3)
    spectrogram = torch.rand(2, 1, frames, 128, dtype=torch.float64)
    queries = torch.randn(3, 2, 16, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        features = encoder.features(spectrogram, entry=True)
    became = encoder.query_blocks(queries, features)
    wanted = slow.query_blocks(encoder, spectrogram, queries)
    torch.testing.assert_close(became, wanted)
    weight = torch.randn_like(became)
    got, right = (torch.autograd.grad((x * weight).sum(), queries)[0] for x in (became, wanted))
    torch.testing.assert_close(got, right)
    assert right.abs().max() > 1e-2


def test_nothing_of_the_encoder_is_trained_saved_moved_or_copied():
    encoder = _encoder()
    assert all(p.requires_grad for p in encoder.parameters())
    before = {n: t.clone() for n, t in encoder.state_dict().items()}
    probe = _probe(encoder)
    with torch.no_grad():
        features = encoder.features(torch.rand(2, 1, 112, 128), entry=True)
    probe(features).square().sum().backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(p.grad.abs().max() > 0 for p in probe.parameters())
    assert set(probe.state_dict()) == {"queries", "norm.weight", "norm.bias", "fc.weight",
                                       "fc.bias"}  # fmt: skip
    assert list(probe.modules()).count(encoder) == 0
    again = copy.deepcopy(probe)
    assert again.queries is not probe.queries
    probe.train()
    assert not encoder.training
    assert torch.equal(again.eval()(features), probe.eval()(features))
    again.double()
    assert encoder.cls_token.dtype == torch.float32
    assert all(torch.equal(t, before[n]) for n, t in encoder.state_dict().items())


def test_bf16_features_under_autocast_stay_near_float32():
    encoder = _encoder()
    probe = _probe(encoder).eval()
    spectrogram = torch.rand(2, 1, 64, 128)
    with torch.no_grad():
        exact = encoder.features(spectrogram, entry=True)
    rough = Features(*(None if x is None else x.bfloat16() for x in exact))
    with torch.autocast("cpu", torch.bfloat16):
        logits = probe(rough)
    torch.testing.assert_close(logits.float(), probe(exact), atol=0.03, rtol=0.03)
    assert probe(rough).dtype == torch.float32  # stored in 16 bits, probed in 32
    torch.testing.assert_close(probe(rough), probe(exact), atol=0.03, rtol=0.03)
    logits.sum().backward()
    assert probe.queries.grad.dtype == torch.float32
    assert probe.queries.grad.isfinite().all()


def test_queries_start_uniform_within_the_bound():
    start = _probe(_encoder(), queries=400).queries.detach()
    assert start.shape == (3, 400, 16)
    bound = (6 / (3 * 256 + 16)) ** 0.5
    assert 0.999 * bound < start.abs().max() <= bound
    assert float(start.std()) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_it_needs_an_encoder_that_can_be_queried():
    words = {"classes": 5, "width": 16, "depth": 3, "has_cls": True}
    with pytest.raises(UserError, match="vqt is made of the frozen encoder, and there is none"):
        build_probe("vqt", **words)

    class Other(nn.Module):
        has_queries = False

    with pytest.raises(UserError, match=r"vqt is not defined for this encoder \(Other\)"):
        build_probe("vqt", **words, encoder=Other())
    with pytest.raises(UserError, match="vqt is not defined at frame level"):
        build_probe("vqt", **words, encoder=_encoder(), level="frame")
