"""Losses of the tasks (docs/method.md 5): cross-entropy, binary cross-entropy, asymmetric, CTC.

Every loss takes logits (..., C) and targets (..., C) in [0, 1] (one-hot, multi-hot or mixed) and
returns a float32 scalar, the mean over examples: ``ce`` sums over classes, ``bce`` and ``asl``
average over them. The asymmetric loss is timm's with the focusing weight kept out of the
gradient, as in the reference: gamma- = 1, gamma+ = 0, no clipping.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bat.errors import UserError

Loss = Callable[[Tensor, Tensor], Tensor]


@functools.cache
def _asymmetric_of_timm() -> Loss:
    from timm.loss import AsymmetricLossMultiLabel  # imported here: importing timm takes a second

    loss: Loss = AsymmetricLossMultiLabel(
        gamma_neg=1, gamma_pos=0, clip=0, disable_torch_grad_focal_loss=True, reduction="mean"
    )
    return loss


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes cross-entropy with target distributions (..., C)."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.float().flatten(0, -2))


def binary(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes binary cross-entropy, averaged over classes."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float())


def asymmetric(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes the asymmetric loss, gamma- = 1, gamma+ = 0 (arXiv 2009.14119; golden section 8)."""
    return _asymmetric_of_timm()(logits, targets)


NOTHING = -1
"""Padding value of token targets."""


def ctc(logits: Tensor, targets: Tensor, *, inside: Tensor | None = None) -> Tensor:
    """Computes connectionist temporal classification with blank 0: each clip's loss divided by its
    target length, then the mean over clips. Clips too short for their target count as 0.

    Args:
        logits: (B, T, C). targets: (B, U) int64 from 1 on, ``NOTHING`` after each clip's last.
        inside: (B, T) True for valid time patches, from the first on; None: all.
    """
    B, T = logits.shape[:2]
    steps = logits.new_full((B,), T).long() if inside is None else inside.sum(1)
    lengths = (targets != NOTHING).sum(1)
    each = F.ctc_loss(
        logits.float().log_softmax(-1).transpose(0, 1),
        targets.clamp(min=0),
        steps,
        lengths,
        reduction="none",
        zero_infinity=True,
    )  # (B,)
    return (each / lengths.clamp(min=1)).mean()


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "bce": binary, "asl": asymmetric}


def loss_for(task: Any, name: str = "task") -> Loss:
    """Returns the loss ``name``, or for ``task`` the loss of ``task.loss``.

    Raises ``UserError`` for cross-entropy on a task with several labels a clip.
    """
    chosen = task.loss if name == "task" else name
    if chosen == "ctc":
        return ctc
    if chosen not in LOSSES:
        raise UserError(f"loss={chosen} is not known: {', '.join(LOSSES)} or task")
    if task.target == "tokens":
        raise UserError(f"loss={chosen} takes labels, task {task.name} has texts: say loss=task")
    if chosen == "ce" and task.target != "class":
        raise UserError(f"loss=ce takes one label a clip, task {task.name} has several: bce or asl")
    return LOSSES[chosen]


def against(loss: Loss, logits: Tensor, targets: Tensor, *, inside: Tensor | None = None) -> Tensor:
    """Computes ``loss`` of logits (B, C) or (B, T, C) against targets, by their shape:

    (B, C): labels of clips, compared with the mean of frame-level logits over time (``to_clip``).
    (B, T, C): labels of time patches; NaN ones are ignored.
    (B, U) whole numbers: tokens, for ``ctc``.
    """
    if not targets.is_floating_point():
        return ctc(logits, targets, inside=inside)
    if targets.ndim == 3:
        kept = ~targets.isnan().any(-1)  # (B, T)
        return loss(logits[kept], targets[kept])
    return loss(to_clip(logits, inside) if targets.ndim < logits.ndim else logits, targets)


def to_clip(logits: Tensor, inside: Tensor | None = None) -> Tensor:
    """Maps (B, T, C) to (B, C), the mean over time; (B, C) is unchanged.

    ``inside`` (B, T): True for valid time patches (``Features.inside``); None: all.
    """
    if logits.ndim != 3:
        return logits
    if inside is None:
        return logits.float().mean(1)
    total = logits.float().masked_fill(~inside[..., None], 0.0).sum(1)
    return total / inside.sum(1, keepdim=True)
