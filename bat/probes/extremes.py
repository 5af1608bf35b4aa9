"""Prototype pooling: lowest, middle and highest similarity of a group of tokens to each prototype.

With ``n(p) = p / ||p||`` and groups of M tokens (a clip's patches; at frame level a time patch's):

    out[g, k] = [min_m tokens[g, m] . n(p_k),  middle[g] . n(p_k),  max_m tokens[g, m] . n(p_k)]

(docs/method.md 4, "Cost of CGP"). A plain implementation stores the similarities (G, M, K),
computes three products of their size, and also keeps ``n(p)`` and its gradient. Here similarities
are computed for a few prototypes at a time and only the index tables are kept; the gradient passes
through the picked tokens only, so backward is O(G K D), not O(G M K D). A positive factor changes
neither minimum nor maximum: the product is with p itself, and out is divided by its norms. Backward
sums the picked tokens, a, and projects in place: ``(a - (a . n(p)) n(p)) / ||p||``. Such sums are
computed by ``embedding_bag``, in a fixed order: bit-for-bit repeatable. If a group has few tokens
(frame level) the picks are no longer sparse: a matrix product sums them.

Registered as a PyTorch library operator (``bat::pool_prototypes``), so that ``torch.compile``
treats each call as one node.

Departure: of exactly equal similarities the first token gets the whole gradient, as with
``torch.min(dim=...)``; ``torch.amin`` would share it out evenly.
Under autocast the product runs in autocast's type (float32 accumulation inside it); norms, values
and sums are float32 (float64 of float64 tokens).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bat.probes.mixing import EPS, sum_type

BLOCK_ELEMENTS = 2**21
"""Similarities computed at a time: 8 MB in float32, within a CPU's cache; a GPU takes 16x."""
CPU_ROWS = 1024
"""Prototypes whose gradient is projected at a time: 3 MB of float32 at D = 768."""
DENSE_TOKENS = 12
"""Largest group, in tokens, whose picks are summed by a matrix product."""
NUMPY_TOKENS = 16
"""Tokens per thread above which NumPy finds an extreme faster than PyTorch on a CPU."""


def pool_prototypes(
    tokens: Tensor,
    prototypes: Tensor,
    middle: Tensor | None = None,
    *,
    low: bool = True,
    signs: bool = False,
) -> Tensor:
    """Returns the features of each prototype: (G, M, D), (K, D), (G, D) -> (G, K, P), float32.

    P is 1 to 3: the minimum if ``low``, the product with ``middle`` if given, the maximum.
    ``signs``: the prototypes are replaced by their signs (+1 where >= 0, else -1) over sqrt(D), and
    the gradient passes to the real values unchanged (straight through).
    """
    device = tokens.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
    out, _ = torch.ops.bat.pool_prototypes(tokens, prototypes, middle, low, signs, kind)
    return out


def _blocks(tokens: Tensor, prototypes: Tensor) -> Iterator[slice]:
    """Yields slices of prototypes that are processed together."""
    size = BLOCK_ELEMENTS * (1 if tokens.device.type == "cpu" else 16)
    step = max(1, size // max(1, tokens.shape[0] * tokens.shape[1]))
    for start in range(0, len(prototypes), step):
        yield slice(start, start + step)


def signs_of(x: Tensor) -> Tensor:
    """Returns +1 where ``x >= 0``, else -1, in x's type."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _as_used(prototypes: Tensor, signs: bool) -> Tensor:
    """Returns the matrix whose rows are multiplied: the prototypes, or their signs."""
    return signs_of(prototypes) if signs else prototypes


def _norms(used: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the norm of each row, (k,)."""
    return torch.linalg.vector_norm(used, dim=-1, dtype=dtype).clamp_(min=EPS)


_SCHEMA = (
    "(Tensor tokens, Tensor prototypes, Tensor? middle, bool low, bool signs, ScalarType kind) "
    "-> (Tensor, Tensor)"
)


@torch.library.custom_op("bat::pool_prototypes", mutates_args=(), schema=_SCHEMA)
def _pool(
    tokens: Tensor,
    prototypes: Tensor,
    middle: Tensor | None,
    low: bool,
    signs: bool,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns features (G, K, P) and picked tokens (K, E, G) int32, E = 2 if ``low``, else 1."""
    out, picks = _fake_pool(tokens, prototypes, middle, low, signs, kind)
    G, M, D = tokens.shape
    with torch.autocast(tokens.device.type, enabled=False):  # types are set by ``kind``
        rows = tokens.reshape(G * M, D).to(kind)  # (G M, D)
        centre = None if middle is None else middle.to(kind)
        for block in _blocks(tokens, prototypes):
            used = _as_used(prototypes[block], signs)  # (k, D)
            norm = _norms(used, out.dtype)
            used = used.to(kind)
            s = (used @ rows.T).view(-1, G, M)  # (k, G, M)
            ends = [_end(s, low=True), _end(s)] if low else [_end(s)]
            del s  # freed before the next block
            for e, (values, index) in enumerate(ends):
                picks[block, e] = index
                out[:, block, -1 if e == len(ends) - 1 else 0] = values.T
            if centre is not None:
                out[:, block, int(low)] = centre @ used.T
            out[:, block] /= norm[:, None]
    return out, picks


def _end(s: Tensor, *, low: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the minimum or maximum of the last axis and its first index.

    (k, G, M) -> twice (k, G).
    """
    few = s.shape[-1] <= NUMPY_TOKENS * torch.get_num_threads()
    if few or s.device.type != "cpu" or s.dtype == torch.bfloat16:
        return tuple(s.min(-1) if low else s.max(-1))  # type: ignore[return-value]
    index = torch.from_numpy(
        (s.numpy().argmin if low else s.numpy().argmax)(-1)
    )  # the first NaN, if any
    return s.gather(-1, index.unsqueeze(-1)).squeeze(-1), index


@_pool.register_fake
def _fake_pool(
    tokens: Tensor,
    prototypes: Tensor,
    middle: Tensor | None,
    low: bool,
    signs: bool,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor]:
    G, K, E = tokens.shape[0], prototypes.shape[0], 1 + low
    out = tokens.new_empty(G, K, E + (middle is not None), dtype=sum_type(tokens))
    return out, tokens.new_empty(K, E, G, dtype=torch.int32)


_SCHEMA = (
    "(Tensor grad, Tensor tokens, Tensor prototypes, Tensor? middle, Tensor picks, bool signs, "
    "ScalarType kind, bool[] wanted) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("bat::pool_prototypes_backward", mutates_args=(), schema=_SCHEMA)
def _pool_backward(
    grad: Tensor,
    tokens: Tensor,
    prototypes: Tensor,
    middle: Tensor | None,
    picks: Tensor,
    signs: bool,
    kind: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients of tokens, prototypes, middle; an empty tensor if not ``wanted``."""
    E = picks.shape[1]
    weight = grad.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)  # (K, P, G)
    with torch.autocast(tokens.device.type, enabled=False):  # as in the forward
        for block in _blocks(tokens, prototypes):
            norm = _norms(_as_used(prototypes[block], signs), weight.dtype)
            weight[block] /= norm[:, None, None]
        ends = weight if middle is None else weight[:, 2 - E :: 2].contiguous()  # (K, E, G)
        dense = tokens.shape[1] <= DENSE_TOKENS
        sums, product = (_dense_sums, kind) if dense else (_sparse_sums, grad.dtype)
        to_tokens, to_prototypes = sums(
            ends, picks, tokens, prototypes, signs=signs, kind=kind, wanted=wanted
        )
        to_middle = grad.new_empty(0)
        if middle is not None:
            centre = weight[:, E - 1].to(product)  # (K, G)
            if wanted[2]:
                to_middle = centre.T @ _as_used(prototypes, signs).to(product)
            if wanted[1]:
                for block in _blocks(tokens, prototypes):
                    to_prototypes[block] += centre[block] @ middle.to(product)
            to_middle = to_middle.to(middle.dtype)
        if wanted[1]:
            _project(to_prototypes, prototypes, signs)
    return to_tokens.to(tokens.dtype), to_prototypes.to(prototypes.dtype), to_middle


def _sparse_sums(
    weight: Tensor,
    picks: Tensor,
    tokens: Tensor,
    prototypes: Tensor,
    *,
    signs: bool,
    kind: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Returns weighted sums of the picked tokens (K, D), and of the prototypes by the token they
    picked (G, M, D)."""
    G, M, D = tokens.shape
    K, bag = len(weight), weight[0].numel()
    to_tokens, to_prototypes = weight.new_empty(0), weight.new_empty(0)
    row = (picks + M * torch.arange(G, dtype=picks.dtype, device=picks.device)).view(K, bag)
    if wanted[1]:
        source = tokens.reshape(G * M, D).to(weight.dtype)
        to_prototypes = F.embedding_bag(
            row, source, mode="sum", per_sample_weights=weight.reshape(K, bag)
        )
    if wanted[0]:
        row, order = row.view(-1).sort(stable=True)
        to_tokens = F.embedding_bag(
            order // bag,  # the prototype of each pick
            _as_used(prototypes, signs).to(weight.dtype),
            offsets=torch.searchsorted(
                row, torch.arange(G * M, dtype=row.dtype, device=row.device)
            ),
            mode="sum",
            per_sample_weights=weight.reshape(-1)[order],
        ).view(G, M, D)
    return to_tokens, to_prototypes


def _dense_sums(
    weight: Tensor,
    picks: Tensor,
    tokens: Tensor,
    prototypes: Tensor,
    *,
    signs: bool,
    kind: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Returns the same by products with the dense weights, in ``kind``: (k, G M) at a time."""
    G, M, D = tokens.shape
    to_tokens = weight.new_zeros((G * M, D) if wanted[0] else 0)
    to_prototypes = weight.new_empty((len(weight), D) if wanted[1] else 0)
    rows = tokens.reshape(G * M, D).to(kind)
    for block in _blocks(tokens, prototypes):
        given = weight[block].to(kind).unsqueeze(-1)  # (k, E, G, 1)
        spread = given.new_zeros(len(given), G, M)  # (k, G, M)
        for e in range(given.shape[1]):
            spread.scatter_add_(2, picks[block, e, :, None].long(), given[:, e])
        flat = spread.flatten(1)
        if wanted[1]:
            to_prototypes[block] = flat @ rows
        if wanted[0]:
            to_tokens += flat.T @ _as_used(prototypes[block], signs).to(kind)
    return to_tokens.view((G, M, D) if wanted[0] else 0), to_prototypes


def _project(grad: Tensor, prototypes: Tensor, signs: bool) -> None:
    """Projects through ``n``, in place; ``grad`` (K, D) is divided by the norms already."""
    step = CPU_ROWS if grad.device.type == "cpu" else max(1, len(grad))
    for rows, p in zip(grad.split(step), prototypes.split(step), strict=True):
        used = _as_used(p, signs).to(grad.dtype)
        norm = torch.linalg.vector_norm(used, dim=-1)
        along = torch.linalg.vecdot(rows, used) / norm.square()
        rows.addcmul_(used, along.where(norm > EPS, 0.0).unsqueeze(-1), value=-1)


@_pool_backward.register_fake
def _(
    grad: Tensor,
    tokens: Tensor,
    prototypes: Tensor,
    middle: Tensor | None,
    picks: Tensor,
    signs: bool,
    kind: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    given = (tokens, prototypes, grad.new_empty(0) if middle is None else middle)
    return tuple(  # type: ignore[return-value]
        x.new_empty(x.shape if want else 0) for x, want in zip(given, wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, prototypes, middle, _, ctx.signs, ctx.kind = inputs
    ctx.save_for_backward(tokens, prototypes, middle, output[1])


def _back(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    grads = torch.ops.bat.pool_prototypes_backward(
        grad, *ctx.saved_tensors, ctx.signs, ctx.kind, wanted
    )
    given = [g if want else None for g, want in zip(grads, wanted, strict=True)]
    return (*given, None, None, None)


_pool.register_autograd(_back, setup_context=_save)
