"""What a run that cannot be lost does on a GPU alone: decisions and copies without waiting."""

from __future__ import annotations

import pytest
import torch

from bat.nn.masking import inverse_block_mask, row_seeds
from bat.nn.optim import adamw, param_groups
from bat.train.checkpointing import snapshot
from bat.train.guard import Guard
from bat.types import Grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_masks_of_a_clip_are_the_same_on_the_cpu_and_the_gpu() -> None:
    clips = torch.arange(1000, 1024)
    drawn = [
        inverse_block_mask(24 * 16, Grid(64, 8), seeds=row_seeds(7, clips.to(device), 16))
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(drawn[0].keep_ids, drawn[1].keep_ids.cpu())


def test_a_step_is_skipped_on_the_device() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(8, 8).cuda()
    optimizer, guard = adamw(param_groups(module, weight_decay=0.05), lr=0.1), Guard(1.0)
    for poisoned in (False, True, False):
        before = module.weight.detach().clone()
        module.zero_grad()
        (module(torch.ones(4, 8, device="cuda")).square().mean()).backward()
        if poisoned:
            module.weight.grad[0, 0] = torch.nan
        torch.cuda.set_sync_debug_mode("error")  # raises where the host would wait
        try:
            guard.inspect(optimizer, module.parameters())
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(before, module.weight) is poisoned


def test_a_snapshot_is_of_the_moment() -> None:
    weight = torch.ones(1 << 20, device="cuda")
    held = snapshot({"w": weight})["w"]
    weight.zero_()
    assert held.device.type == "cpu"
    assert bool((held == 1).all())
