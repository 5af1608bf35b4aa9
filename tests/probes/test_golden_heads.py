"""Every head of the paper, and CTC, against its own code: logits and every gradient."""

import numpy as np
import pytest
import torch

from bat.nn.losses import NOTHING, ctc
from bat.probes.base import build_probe
from bat.probes.extremes import signs_of
from bat.types import Features

NAMES = {
    "fc.weight": "fc.weight",
    "fc.bias": "fc.bias",
    "norm.weight": "ln.weight",
    "norm.bias": "ln.bias",
    "layer_logits": "block_attention",
    "prototypes": "prototype_vectors",
}
CASES = [
    (f"{reference}_{kind}{suffix}", name, kind, bool(suffix))
    for reference, name in (("linear", "linear"), ("linear_cgp", "lcgp"), ("h2t", "h2t"))
    for kind in ("cls", "avg", "frame")
    for suffix in ("", "_norm")
]
CASES += [(f"cgp_{kind}", "cgp", kind, False) for kind in ("cls", "avg", "frame")]
CASES += [(f"protobin_{kind}", "protobin", kind, False) for kind in ("clip", "frame")]


@pytest.fixture(scope="module")
def heads(golden):
    return dict(np.load(golden / "heads_tiny.npz", allow_pickle=False))


def _arrays(heads, case):
    return {k.removeprefix(f"{case}/"): torch.from_numpy(np.asarray(v))
            for k, v in heads.items() if k.startswith(f"{case}/")}  # fmt: skip


@pytest.mark.parametrize(("case", "name", "kind", "norm"), CASES, ids=[c[0] for c in CASES])
def test_head_equals_reference(heads, case, name, kind, norm):
    array = _arrays(heads, case)
    cls = torch.from_numpy(heads["cls_tokens"]).requires_grad_()  # (L, B, D)
    patches = torch.from_numpy(heads["patch_tokens"]).requires_grad_()  # (L, B, D, T, F)
    probe = build_probe(
        name,
        classes=5,
        width=16,
        depth=3,
        has_cls=kind != "avg",
        level="frame" if kind == "frame" else "clip",
        prototypes=20,
        norm=norm,
        dropout=0.2,
    ).eval()
    probe.load_state_dict(
        {own: array[f"w/{theirs}"].flatten(2).squeeze(-1) if own == "prototypes"
         else array[f"w/{theirs}"] for own, theirs in NAMES.items() if f"w/{theirs}" in array}
    )  # fmt: skip
    logits = probe(Features(patches=patches.permute(0, 1, 3, 4, 2), cls=cls))
    torch.testing.assert_close(logits, array["logits"], atol=1e-5, rtol=1e-5)

    (logits * array["probe"]).sum().backward()
    for own, parameter in probe.named_parameters():
        wanted = array[f"grad/{NAMES[own]}"].view(parameter.shape)
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-5, rtol=1e-4, msg=own)
    for key, tensor in (("cls_tokens", cls), ("patch_tokens", patches)):
        if f"grad_in/{key}" in array:
            wanted = array[f"grad_in/{key}"]
            torch.testing.assert_close(tensor.grad, wanted, atol=1e-5, rtol=1e-4, msg=key)
        else:
            assert tensor.grad is None or not tensor.grad.any()


@pytest.mark.parametrize("case", [c[0] for c in CASES if c[1] == "h2t"])
def test_group_lasso_equals_reference_and_joins_the_loss(heads, case):
    array = _arrays(heads, case)
    probe = build_probe("h2t", classes=5, width=16, depth=3, has_cls=True, lasso=0.5)
    with torch.no_grad():
        probe.fc.weight.copy_(array["w/fc.weight"])
    penalty = probe.penalty()
    torch.testing.assert_close(penalty, array["lasso_penalty"], atol=1e-5, rtol=1e-6)

    def zero(logits, targets):
        return (logits - targets).sum()

    nothing = torch.zeros(2, 5)
    value = probe.training_loss(zero, nothing, nothing)
    torch.testing.assert_close(value, 0.5 * penalty)
    value.backward()
    torch.testing.assert_close(
        probe.fc.weight.grad, 0.5 * array["lasso_grad"], atol=1e-6, rtol=1e-5
    )


def test_signs_are_the_reference_s_and_never_zero(heads):
    x = torch.from_numpy(heads["protobin_sign/in"])
    assert torch.equal(signs_of(x), torch.from_numpy(heads["protobin_sign/out"]))
    assert signs_of(torch.tensor([0.0, -0.0])).tolist() == [1, 1]


def test_asr__equals_the_reference_and_padding_changes_nothing(heads):
    """The paper's head, whose LSTM is 8 wide in the golden file: log-probabilities, gradients."""
    array = _arrays(heads, "asr")
    patches = torch.from_numpy(heads["patch_tokens"]).requires_grad_()  # (L, B, D, T, F)
    probe = build_probe("asr", classes=5, width=16, depth=3, has_cls=True, level="frame", hidden=8)
    theirs = {"norm": "ln", "layer_logits": "block_attention"}
    names = {n: n.replace(n.split(".")[0], theirs.get(n.split(".")[0], n.split(".")[0]))
             for n in probe.state_dict()}  # fmt: skip
    assert probe.layer_logits.tolist() == [1, 1, 1]
    probe.load_state_dict({own: array[f"w/{name}"] for own, name in names.items()})
    tokens = patches.permute(0, 1, 3, 4, 2)  # (L, B, T, F, D)
    found = probe.eval()(Features(tokens, None)).log_softmax(-1)  # (B, 8 T, C)
    torch.testing.assert_close(found.transpose(0, 1), array["log_probs"], atol=1e-5, rtol=1e-5)
    (found.transpose(0, 1) * array["probe"]).sum().backward()
    for own, parameter in probe.named_parameters():
        wanted = array[f"grad/{names[own]}"]
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-5, rtol=1e-4, msg=own)
    wanted = array["grad_in/patch_tokens"]
    torch.testing.assert_close(patches.grad, wanted, atol=1e-5, rtol=1e-4)

    with torch.no_grad():
        padded = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, 3))  # 3 patches of padding
        padded[:, 1, 2:] = 7.0  # the second clip has two patches, its padding any value
        features = Features(padded, None, valid=torch.tensor([4, 2]))
        batch = probe(features)
        torch.testing.assert_close(batch[:1, :32], probe(Features(tokens[:, :1], None)))
        torch.testing.assert_close(batch[1:, :16], probe(Features(tokens[:, 1:, :2], None)))
    assert probe.inside(features).sum(1).tolist() == [32, 16]


def test_ctc__equals_the_reference(golden):
    file = np.load(golden / "losses.npz", allow_pickle=False)
    array = {k: torch.from_numpy(np.asarray(file[f"ctc/{k}"])) for k in (
        "logits", "targets", "input_lengths", "target_lengths", "loss", "grad_logits")}  # fmt: skip
    logits = array["logits"].transpose(0, 1).requires_grad_()  # (B, T, C)
    inside = torch.arange(24) < array["input_lengths"][:, None]
    targets = array["targets"].masked_fill(
        torch.arange(5) >= array["target_lengths"][:, None], NOTHING
    )
    loss = ctc(logits, targets, inside=inside)
    torch.testing.assert_close(loss, array["loss"], atol=1e-5, rtol=1e-5)
    loss.backward()
    wanted = array["grad_logits"].transpose(0, 1)
    torch.testing.assert_close(logits.grad, wanted, atol=1e-5, rtol=1e-4)
