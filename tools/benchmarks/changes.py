"""What each change gave: our step against itself with one thing done the plain way.

All share one model, batch and optimiser state, nothing is compiled, and all take turns. *plain* is
the step without the change that the row names (with the option, for activation checkpointing);
differences of a few per cent are noise on a busy machine. A way that fails its first step takes no
turn and is a row with its ``error``. ``loss_difference`` is relative, on the
same masks: these are changes of how, not of what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bat.nn.attention import Attention, take
from bat.nn.block import blocks_of
from bat.nn.decoder import ViTDecoder, place
from bat.nn.embed import PatchEmbed
from bat.objectives import masked_latent
from bat.types import Views
from benchmarks.memory import peak_mb
from benchmarks.step import PLACE, QUICK, OursStep, settings
from benchmarks.timing import attempted, here, medians

ABOUT = "the pre-training step, one thing done the plain way; ratio = without / with"


def attention_by(backend: str) -> Callable[[OursStep], Any]:
    """The blocks' attention by another kernel."""

    @contextlib.contextmanager
    def change(step: OursStep) -> Iterator[None]:
        blocks = blocks_of(step.module)
        was = [block.attn.backend for block in blocks]
        for block in blocks:
            block.attn.backend = backend  # type: ignore[assignment]
        try:
            yield
        finally:
            for block, old in zip(blocks, was, strict=True):
                block.attn.backend = old

    return change


@contextlib.contextmanager
def recomputed(step: OursStep) -> Iterator[None]:
    """Activation checkpointing of the trained blocks."""
    blocks = [b for b in blocks_of(step.module) if any(p.requires_grad for p in b.parameters())]
    for block in blocks:
        block.recompute = True
    try:
        yield
    finally:
        for block in blocks:
            block.recompute = False


def replaced(owner: Any, name: str, other: Any) -> Callable[[OursStep], Any]:
    """A method replaced meanwhile."""
    return lambda step: mock.patch.object(owner, name, other)


def all_patches(decoder: ViTDecoder, visible: Tensor, views: Views) -> Tensor:
    """Every block of the decoder, and its output, on every patch of every view."""
    tokens = decoder.pos_embed.shape[1]
    x = place(decoder.in_proj(visible), views.keep_ids, decoder.mask_token[0].expand(tokens, -1))
    x = x + decoder.pos_embed
    for block in decoder.blocks:
        x, _ = block(x)
    return take(decoder.out_proj(x), views.masked_ids)


def apart(attention: Attention, x: Tensor, at: Tensor | None = None) -> Tensor:
    """Two products, for q, k, v and for the gate."""
    out = attention._mix(*attention.qkv(x).chunk(3, dim=-1), attention.gate(x))  # type: ignore[misc]
    return out if at is None else take(out, at)


def convolved(embed: PatchEmbed, x: Tensor) -> Tensor:
    return embed.proj(x).flatten(2).transpose(1, 2)


@torch.no_grad()
def one_by_one(
    teacher: nn.Module, student: nn.Module, decay: float, *, skip: Tensor | None = None
) -> None:
    del skip  # no step of the benchmark is skipped
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.mul_(decay).add_(fast, alpha=1 - decay)
    for slow, fast in zip(teacher.buffers(), student.buffers(), strict=True):
        slow.mul_(decay).add_(fast, alpha=1 - decay)


@contextlib.contextmanager
def default_adamw(step: OursStep) -> Iterator[None]:
    """AdamW as PyTorch makes it: not fused."""
    groups = step.optimizer.param_groups
    was = [group["fused"] for group in groups]
    for group in groups:
        group["fused"] = None
    try:
        yield
    finally:
        for group, old in zip(groups, was, strict=True):
            group["fused"] = old


CHANGES: dict[str, Callable[[OursStep], Any]] = {
    "attention by PyTorch's kernel (sdpa)": attention_by("sdpa"),
    "attention by matmul, softmax, matmul": attention_by("eager"),
    "decoder over all patches": replaced(ViTDecoder, "forward", all_patches),
    "q, k, v apart from the gate": replaced(Attention, "forward", apart),
    "patches embedded by convolution": replaced(PatchEmbed, "forward", convolved),
    "AdamW not fused": default_adamw,
    "EMA one by one": replaced(masked_latent, "ema_update", one_by_one),
    "activation checkpointing (option)": recomputed,
}


def run(*, repeats: int, quick: bool) -> Iterator[dict[str, Any]]:
    device = here()
    batch = "data.batch=24" if device.type == "cuda" else "data.batch=1"
    words = [*QUICK, "data.batch=2", "objective.mask.views=2"] if quick else [batch]
    step = OursStep(settings(words), device)
    step()  # from here on the optimiser's state is there

    def loss() -> float:
        return step.loss(PLACE).item()

    def changed(change: Callable[[OursStep], Any], call: Callable[[], Any]) -> Callable[[], Any]:
        def run_changed() -> Any:
            with change(step):
                return call()

        return run_changed

    expected = loss()

    def differs(name: str) -> list[dict[str, Any]]:
        found = changed(CHANGES[name], loss)()
        return [{"case": name, "loss_difference": abs(found - expected) / expected}]

    def peaks(name: str) -> list[dict[str, Any]]:
        return [{"plain_peak_mb": peak_mb(changed(CHANGES[name], step), device)}]

    rows: dict[str, dict[str, Any]] = {}
    for measure in (differs, peaks):  # the second makes steps
        for name in CHANGES:
            if "error" in rows.get(name, {}):
                continue
            (row,) = attempted(name, lambda measure=measure, name=name: measure(name))
            rows[name] = rows.get(name, {}) | row
            if "error" in row:
                yield row
                step.optimizer.zero_grad()  # what it left half-way
    able = [name for name, row in rows.items() if "error" not in row]
    ways: dict[str, Callable[[], Any]] = {"ours": step}
    ways |= {name: changed(CHANGES[name], step) for name in able}
    ours_peak = peak_mb(step, device)
    taken = medians(ways, repeats=repeats, title="changes", device=device)
    for name in able:
        yield {
            "case": name,
            "ours_ms": 1e3 * taken["ours"],
            "plain_ms": 1e3 * taken[name],
            "ratio": taken[name] / taken["ours"],
            "ours_peak_mb": ours_peak,
            "plain_peak_mb": rows[name]["plain_peak_mb"],
            "loss_difference": rows[name]["loss_difference"],
        }
