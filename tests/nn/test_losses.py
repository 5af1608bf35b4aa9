"""Losses against golden section 8: value and gradient."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bat.errors import UserError
from bat.nn.losses import LOSSES, against, asymmetric, binary, cross_entropy, loss_for, to_clip


@pytest.fixture(scope="module")
def vectors(golden):
    stored = dict(np.load(golden / "losses.npz", allow_pickle=False))
    return {k: torch.from_numpy(v) for k, v in stored.items() if k != "meta_json"}


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize(("loss", "case"), [(asymmetric, "asl_bat"), (binary, "bce")])
def test_golden_losses__binary(vectors, loss, case, targets):
    logits = vectors["logits"].clone().requires_grad_()
    value = loss(logits, vectors[targets])
    torch.testing.assert_close(value, vectors[f"{case}/{targets}/loss"], atol=1e-6, rtol=1e-6)
    value.backward()
    torch.testing.assert_close(logits.grad, vectors[f"{case}/{targets}/grad"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["int", "mixed"])
def test_golden_losses__cross_entropy(vectors, kind):
    logits = vectors["ce_logits"].clone().requires_grad_()
    one_hot = torch.nn.functional.one_hot(vectors["ce_labels"], 9).float()
    value = cross_entropy(logits, one_hot if kind == "int" else vectors["ce_mixed_targets"])
    torch.testing.assert_close(value, vectors[f"ce_smooth0.0/{kind}/loss"], atol=1e-6, rtol=1e-6)
    value.backward()
    wanted = vectors[f"ce_smooth0.0/{kind}/grad"]
    torch.testing.assert_close(logits.grad, wanted, atol=1e-6, rtol=1e-5)


def test_losses__are_float32_from_bf16_logits():
    logits = torch.randn(3, 4).bfloat16()
    for name, loss in LOSSES.items():
        assert loss(logits, torch.eye(4)[:3]).dtype == torch.float32, name


def test_against__frame_logits_against_clip_labels_are_averaged_over_time():
    logits, targets = torch.randn(2, 5, 3), torch.eye(3)[:2]
    assert torch.equal(against(binary, logits, targets), binary(logits.mean(1), targets))
    frames = torch.rand(2, 5, 3).round()
    assert torch.equal(against(binary, logits, frames), binary(logits, frames))
    assert torch.equal(to_clip(targets), targets)
    assert against(cross_entropy, logits, frames).ndim == 0


def test_loss_for__takes_the_tasks_own_or_the_named_one():
    task = SimpleNamespace(name="birds", loss="asl", target="tags")
    assert loss_for(task) is asymmetric
    assert loss_for(task, "bce") is binary
    with pytest.raises(UserError, match="task birds has several"):
        loss_for(task, "ce")
    with pytest.raises(UserError, match="loss=mse is not known"):
        loss_for(task, "mse")
