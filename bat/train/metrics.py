"""What a classifier is judged by (SPEC section 5): accuracy, macro mAP, macro F1 at 0.5.

torchmetrics computes them, in float64 so that confident logits do not tie. A class without a
positive clip has no average precision: it is left out of the macro means and reported, never
silently zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision, binary_f1_score

from bat.shapes import UserError


def evaluate(logits: Tensor, targets: Tensor, *, multi_label: bool) -> dict[str, Any]:
    """Metrics of logits (n, C) against targets (n, C) in {0, 1}.

    One label a clip: ``accuracy`` and ``map`` (of softmax probabilities). Several: ``map`` and
    ``f1`` (of sigmoid probabilities, threshold 0.5). Both: ``absent``, the indices of classes that
    no clip has and that the means therefore leave out. Fractions, not percent; outputs
    that are not finite raise ``UserError``.
    """
    if not logits.isfinite().all():
        raise UserError(
            "the classifier's outputs are not finite: training diverged; lower optim.lr"
        )
    logits, hard = logits.detach().double().cpu(), (targets.detach().cpu() >= 0.5).long()
    present = hard.any(0).nonzero().flatten().tolist()  # classes with a positive
    scores = logits.sigmoid() if multi_label else logits.softmax(1)
    found: dict[str, Any] = {}
    if not multi_label:
        found["accuracy"] = float((logits.argmax(1) == hard.argmax(1)).double().mean())
    found["map"] = _mean(binary_average_precision(scores[:, c], hard[:, c]) for c in present)
    if multi_label:
        found["f1"] = _mean(binary_f1_score(scores[:, c], hard[:, c]) for c in present)
    found["absent"] = [c for c in range(logits.shape[1]) if c not in set(present)]
    return found


def _mean(values: Iterable[Tensor]) -> float:
    found = [float(v) for v in values]
    return sum(found) / len(found) if found else math.nan


def summarise(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of a metric over folds; one fold has deviation 0."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0
