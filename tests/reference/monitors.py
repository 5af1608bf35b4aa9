"""kNN, RankMe and LiDAR as their papers write them: loops, no shortcuts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def knn(train: Tensor, labels: Tensor, queries: Tensor, *, k: int) -> Tensor:
    """Label average of each query's k nearest clips by cosine, weights softmax(cosine / 0.07)."""
    rows = []
    for query in queries.double():
        pairs = []
        for vector, label in zip(train.double(), labels.double(), strict=True):
            pairs.append((float(query @ vector / (query.norm() * vector.norm())), label))
        nearest = sorted(pairs, key=lambda pair: -pair[0])[:k]
        weights = [math.exp(cosine / 0.07) for cosine, _ in nearest]
        total = sum(w * label for w, (_, label) in zip(weights, nearest, strict=True))
        rows.append(total / sum(weights))
    return torch.stack(rows)


def rankme(x: Tensor, *, eps: float) -> float:
    """exp(- sum p ln p), p = s / sum s + eps, s the singular values; not centred."""
    values = torch.linalg.svdvals(x.double()).tolist()
    shares = [s / sum(values) + eps for s in values]
    return math.exp(-sum(p * math.log(p) for p in shares))


def lidar(views: Tensor, *, delta: float, eps: float) -> float:
    """Clip by clip, with the inverse square root of S_w written out."""
    views = views.double()
    n, q, D = views.shape
    means = [clip.mean(0) for clip in views]
    middle = sum(means) / n
    between = sum(torch.outer(m - middle, m - middle) for m in means) / (n - 1)
    within = torch.zeros(D, D).double()
    for clip, mean in zip(views, means, strict=True):
        for view in clip:
            within += torch.outer(view - mean, view - mean) / (n * (q - 1))
    values, vectors = torch.linalg.eigh(within + delta * torch.eye(D).double())
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    found = [max(0.0, v) + eps for v in torch.linalg.eigvalsh(root @ between @ root).tolist()]
    shares = [v / sum(found) for v in found]
    return math.exp(-sum(p * math.log(p) for p in shares))
