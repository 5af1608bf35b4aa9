"""AdamW, parameter groups and learning rate: linear warm-up, then cosine (docs/method.md 3 to 5).

The rate is a plain function of the optimiser step, set at the start of each batch by ``set_lr``:
no scheduler object, hence no state to save or resume. A parameter group has its
``scale`` (layer-wise decay), which multiplies both rate and floor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn


def warmup_cosine(
    step: int,
    *,
    lr: float,
    warmup_steps: int,
    total_steps: int,
    min_lr: float = 0.0,
    scale: float = 1.0,
    hold_steps: int = 0,
) -> float:
    """Returns the learning rate of the update after ``step`` updates.

    ``lr step / warmup_steps`` up to and at ``warmup_steps``, ``lr`` for ``hold_steps`` more, then
    half a cosine to 0 at ``total_steps``; never below ``min_lr``; all times ``scale``. Past
    ``total_steps`` the cosine continues (it rises), as in the reference (golden section 7).
    """
    plateau = warmup_steps + hold_steps
    if step <= warmup_steps and warmup_steps > 0:
        factor = step / warmup_steps
    elif step <= plateau:
        factor = 1.0
    elif total_steps <= plateau:
        factor = 0.0
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (step - plateau) / (total_steps - plateau)))
    return max(min_lr * scale, lr * factor * scale)


def layer_scale(layer: int, *, depth: int, decay: float) -> float:
    """Returns ``decay^(L + 1 - layer)``: 0 embedding, b + 1 block b, L + 1 head and rest."""
    return decay ** (depth + 1 - layer)


def param_groups(
    module: nn.Module,
    *,
    weight_decay: float,
    decay: Literal["all", "matrices"] = "all",
    no_decay: Collection[str] = (),
    layer_decay: float = 1.0,
    layer_of: Callable[[str], int] | None = None,
    depth: int = 0,
) -> list[dict[str, Any]]:
    """Groups trainable parameters by ``weight_decay`` and ``scale``.

    ``decay``: ``all`` parameters decay (the paper's pre-training), or ``matrices``: those with two
    or more axes that ``no_decay`` does not name. ``layer_of(name)`` and ``depth`` L give the
    scale by ``layer_scale`` if ``layer_decay`` < 1. Group keys: ``params`` (name, parameter)
    pairs, as torch's optimisers take them, ``weight_decay``, ``scale``.
    """
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = decay == "all" or (parameter.ndim > 1 and name not in no_decay)
        scale = 1.0
        if layer_decay != 1:
            assert layer_of is not None, "layer-wise decay needs layer_of"
            scale = layer_scale(layer_of(name), depth=depth, decay=layer_decay)
        groups[scale, weight_decay if decays else 0.0].append((name, parameter))
    return [
        {"params": named, "weight_decay": wd, "scale": scale}
        for (scale, wd), named in groups.items()
    ]


def adamw(
    groups: list[dict[str, Any]],
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """Builds AdamW over ``param_groups``, with PyTorch's fused kernel if available (CPU, CUDA).

    On a CPU the fused kernel takes a third of the default's time.
    """
    parameters: list[Tensor] = [p for g in groups for _, p in g["params"]]
    fused = bool(parameters) and all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


def set_lr(
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    lr: float,
    warmup_steps: int,
    total_steps: int,
    min_lr: float = 0.0,
) -> float:
    """Sets every group's rate for the update after ``step`` updates; returns the unscaled rate.

    Call it at the start of a batch with the trainer's ``global_step``.
    """
    schedule: dict[str, Any] = {
        "lr": lr,
        "warmup_steps": warmup_steps,
        "total_steps": total_steps,
        "min_lr": min_lr,
    }
    for group in optimizer.param_groups:
        group["lr"] = warmup_cosine(step, scale=group.get("scale", 1.0), **schedule)
    return warmup_cosine(step, **schedule)
