"""A training step of a prototype probe: ours against the plain one (``plain_probes.py``).

The step: forward, binary cross-entropy, backward, AdamW; same features, weights, labels and dropout
for both. Ours: pooling as one operator with its own backward, the blocks mixed without their
normalised stack, AdamW's fused kernel; plain: torch's default AdamW. *peak_mb* is what the step
needs at its worst moment above features, weights, gradients and optimiser state.
Two operators are also measured alone, forward and backward: the mixing of the blocks, and the
pooling (*low*, *middle*, *high* of every prototype). On a GPU: 48 clips, the Triton kernel, and
both compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.probes.base import build_probe
from bat.probes.extremes import pool_prototypes
from bat.probes.mixing import Kernel, mix_normalised
from bat.shapes import Features
from benchmarks import plain_probes
from benchmarks.memory import peak_mb
from benchmarks.timing import medians

ABOUT = "training step; peak_mb: above features, weights, gradients and optimiser state"
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


class Sizes(NamedTuple):
    """B, L, T, F, D, K, C."""

    clips: int = 8
    blocks: int = 12
    time: int = 64
    freq: int = 8
    width: int = 768
    prototypes: int = 10_000
    classes: int = 527


TINY = Sizes(clips=2, blocks=3, time=4, freq=3, width=16, prototypes=32, classes=5)


def make_features(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Features:
    """Normal noise of the encoder's shape."""
    g = torch.Generator().manual_seed(0)
    L, B, D = sizes.blocks, sizes.clips, sizes.width
    patches = torch.empty(L, B, sizes.time, sizes.freq, D, dtype=dtype)
    for block in patches:
        block.copy_(torch.randn(block.shape, generator=g))
    cls = torch.randn(L, B, D, generator=g).to(dtype)
    return Features(patches=patches.to(device), cls=cls.to(device))


def build(
    name: str, way: str, sizes: Sizes, *, level: str, kernel: Kernel, dropout: float = 0.2
) -> nn.Module:
    """Probe ``name`` in ``way`` ours or plain; equal weights at equal sizes."""
    words: dict[str, Any] = {
        "classes": sizes.classes,
        "width": sizes.width,
        "depth": sizes.blocks,
        "level": level,
        "prototypes": sizes.prototypes,
        "dropout": dropout,
    }
    torch.manual_seed(0)
    if way == "ours":
        return build_probe(name, has_cls=True, kernel=kernel, **words)
    return plain_probes.PLAIN[name](**words)


class Step:
    """One probe, its optimiser and its batch; calling it trains a step and returns the loss."""

    def __init__(
        self,
        probe: nn.Module,
        features: Features,
        targets: Tensor,
        *,
        fused: bool,
        compiled: bool = False,
    ) -> None:
        self.probe, self.features, self.targets = probe, features, targets
        self.call = torch.compile(probe, fullgraph=True) if compiled else probe
        self.optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, fused=fused or None)
        self.device = targets.device
        self.half = features.patches.dtype == torch.bfloat16

    def __call__(self) -> Tensor:
        torch.manual_seed(0)  # of dropout
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits = self.call(self.features)
        loss = F.binary_cross_entropy_with_logits(logits.float(), self.targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def extra_mb(self) -> float:
        """Peak above features, weights, gradients and optimiser state (which a step made)."""
        self.optimizer.zero_grad()
        gradients = sum(p.numel() * p.element_size() for p in self.probe.parameters()) / 1e6
        return max(0.0, peak_mb(self, self.device) - gradients)


def step_case(
    name: str,
    sizes: Sizes,
    kind: str,
    device: torch.device,
    *,
    repeats: int,
    level: str = "clip",
    kernel: Kernel = "portable",
    compiled: bool = False,
) -> dict[str, Any]:
    """One row: probe ``name``, both ways."""
    features = make_features(sizes, TYPES[kind], device)
    frames = (sizes.time,) if level == "frame" else ()
    shape = (sizes.clips, *frames, sizes.classes)
    targets = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.01).float()
    steps = {
        way: Step(
            build(name, way, sizes, level=level, kernel=kernel).to(device),
            features,
            targets.to(device),
            fused=way == "ours",
            compiled=compiled,
        )
        for way in ("ours", "plain")
    }
    first = {way: float(step()) for way, step in steps.items()}
    label = f"{name} {level}, B {sizes.clips}, {kind}"
    label += ", Triton" * (kernel == "triton") + ", both compiled" * compiled
    row = _row(label, steps, device, repeats=repeats, peak=Step.extra_mb)
    return row | {"loss": first["ours"], "loss_difference": abs(first["ours"] - first["plain"])}


def mixing_case(
    sizes: Sizes,
    kind: str,
    device: torch.device,
    *,
    repeats: int,
    kernel: Kernel = "portable",
) -> dict[str, Any]:
    """The mixing of the blocks alone: forward, and backward to the gate."""
    patches = make_features(sizes, TYPES[kind], device).patches
    gate = torch.full((sizes.blocks,), 1 / sizes.blocks, device=device, requires_grad=True)
    up = torch.randn(patches.shape[1:], device=device)

    def way(mix: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16"):
                out = mix(patches, gate)
            return torch.autograd.grad(out, gate, up.to(out.dtype))[0]

        return call

    ways = {
        "ours": way(lambda x, a: mix_normalised(x, a, kernel=kernel)),
        "plain": way(plain_probes.mix),
    }
    label = f"mixing alone, B {sizes.clips}, {kind}" + ", Triton" * (kernel == "triton")
    return _alone(label, ways, device, repeats=repeats)


def pooling_case(
    sizes: Sizes,
    kind: str,
    device: torch.device,
    *,
    repeats: int,
    kernel: Kernel = "portable",
) -> dict[str, Any]:
    """The pooling alone: forward, and backward to tokens, prototypes and middle."""
    g = torch.Generator().manual_seed(0)
    shapes = ((sizes.clips, sizes.time * sizes.freq), (sizes.prototypes,), (sizes.clips,))
    given = [torch.randn(*s, sizes.width, generator=g).to(device).requires_grad_() for s in shapes]
    up = torch.randn(sizes.clips, sizes.prototypes, 3, generator=g).to(device)

    def way(pool: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16"):
                out = pool(*given)
            return torch.autograd.grad(out, given, up.to(out.dtype))

        return call

    ways = {
        "ours": way(lambda *x: pool_prototypes(*x, kernel=kernel)),
        "plain": way(plain_probes.pool),
    }
    label = f"pooling alone, B {sizes.clips}, {kind}" + ", Triton" * (kernel == "triton")
    return _alone(label, ways, device, repeats=repeats)


def _alone(
    label: str, ways: dict[str, Callable[[], Any]], device: torch.device, *, repeats: int
) -> dict[str, Any]:
    return _row(label, ways, device, repeats=repeats, peak=lambda call: peak_mb(call, device))


def _row(
    label: str,
    ways: dict[str, Any],
    device: torch.device,
    *,
    repeats: int,
    peak: Callable[[Any], float],
) -> dict[str, Any]:
    taken = medians(ways, repeats=repeats, title=label, device=device)
    ours, plain = (peak(ways[way]) for way in ("ours", "plain"))
    return {
        "case": label,
        "ours_ms": 1e3 * taken["ours"],
        "plain_ms": 1e3 * taken["plain"],
        "ratio": taken["plain"] / taken["ours"],
        "ours_peak_mb": ours,
        "plain_peak_mb": plain,
        "peak_share": ours / plain if plain else None,
    }


def run(*, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """The rows of this machine: CPU, or GPU where there is one."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    sizes = TINY if quick else Sizes()
    rows = []
    for kind in TYPES:
        for name in ("cgp", "protobin"):
            rows.append(step_case(name, sizes, kind, device, repeats=repeats))
    rows.append(step_case("cgp", sizes, "bf16", device, repeats=repeats, level="frame"))
    if gpu:
        large = sizes._replace(clips=3 if quick else 48)
        for name in ("cgp", "protobin"):
            for kernel in ("portable", "triton"):
                for compiled in (False, True):
                    words = {"kernel": kernel, "compiled": compiled}
                    rows.append(step_case(name, large, "bf16", device, repeats=repeats, **words))
        rows.append(mixing_case(large, "bf16", device, repeats=repeats, kernel="triton"))
        rows.append(pooling_case(large, "bf16", device, repeats=repeats, kernel="triton"))
        sizes = large
    for kind in TYPES:
        rows.append(mixing_case(sizes, kind, device, repeats=repeats))
        rows.append(pooling_case(sizes, kind, device, repeats=repeats))
    return rows
