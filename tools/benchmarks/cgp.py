"""A training step of a prototype probe: ours against the plain one (``plain_probes.py``).

The step: forward, binary cross-entropy, backward, AdamW; same features, weights, labels and dropout
for both. Ours: pooling as one operator with its own backward, the blocks mixed without their
normalised stack, AdamW's fused kernel; plain: torch's default AdamW. *peak_mb* is what the step
needs above features, weights, gradients and optimiser state (``Step.extra_mb``).
Two operators are also measured alone, forward and backward: the mixing of the blocks, and the
pooling (*low*, *middle*, *high* of every prototype). On a GPU: 48 clips, both compiled. A case
that fails is a row with its ``error``; the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bat.probes.base import build_probe
from bat.probes.extremes import pool_prototypes
from bat.probes.mixing import mix_normalised
from bat.types import Features
from benchmarks import plain_probes
from benchmarks.memory import peak_mb
from benchmarks.timing import here, medians

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
    """Normal noise of the encoder's shape, made on ``device``."""
    g = torch.Generator(device).manual_seed(0)
    L, B, D = sizes.blocks, sizes.clips, sizes.width
    patches = torch.empty(L, B, sizes.time, sizes.freq, D, dtype=dtype, device=device)
    for block in patches:
        block.copy_(torch.randn(block.shape, generator=g, device=device))
    cls = torch.randn(L, B, D, generator=g, device=device).to(dtype)
    return Features(patches=patches, cls=cls)


def build(name: str, way: str, sizes: Sizes, *, level: str, dropout: float = 0.2) -> nn.Module:
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
        return build_probe(name, has_cls=True, **words)
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

    def loss(self) -> Tensor:
        torch.manual_seed(0)  # of dropout
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            logits = self.call(self.features)
        return F.binary_cross_entropy_with_logits(logits.float(), self.targets)

    def __call__(self) -> Tensor:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def extra_mb(self) -> float:
        """Most that forward, backward or AdamW need above features, weights, gradients and state.

        Gradients are taken off where they exist: not from the forward's peak, from the backward's
        all of them, of AdamW's none (they and its state lie there before). Call it after a step.
        """
        self.optimizer.zero_grad()
        forward = peak_mb(self.loss, self.device)
        gradients = sum(p.numel() * p.element_size() for p in self.probe.parameters()) / 1e6
        backward = peak_mb(lambda: self.loss().backward(), self.device) - gradients
        return max(forward, backward, peak_mb(self.optimizer.step, self.device))


class Case(NamedTuple):
    """One row. ``what``: a probe's training step, or ``mixing`` or ``pooling`` alone."""

    what: str
    sizes: Sizes
    kind: str
    level: str = "clip"
    compiled: bool = False

    def label(self) -> str:
        level = "alone" if self.what in ALONE else self.level
        more = ", both compiled" * self.compiled
        return f"{self.what} {level}, B {self.sizes.clips}, {self.kind}{more}"

    def row(self, features: Features, *, repeats: int) -> dict[str, Any]:
        """Both ways measured on ``features`` (of this case's sizes and kind)."""
        return ALONE.get(self.what, step_row)(self, features, repeats=repeats)


def step_row(case: Case, features: Features, *, repeats: int) -> dict[str, Any]:
    """The training step of a probe."""
    device, sizes = features.patches.device, case.sizes
    frames = (sizes.time,) if case.level == "frame" else ()
    shape = (sizes.clips, *frames, sizes.classes)
    targets = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.01).float()
    steps = {
        way: Step(
            build(case.what, way, sizes, level=case.level).to(device),
            features,
            targets.to(device),
            fused=way == "ours",
            compiled=case.compiled,
        )
        for way in ("ours", "plain")
    }
    first = {way: float(step()) for way, step in steps.items()}
    row = _compare(case, steps, device, repeats=repeats, peak=Step.extra_mb)
    return row | {"loss": first["ours"], "loss_difference": abs(first["ours"] - first["plain"])}


def mixing_row(case: Case, features: Features, *, repeats: int) -> dict[str, Any]:
    """The mixing of the blocks alone: forward, and backward to the gate."""
    patches, L = features.patches, case.sizes.blocks
    gate = torch.full((L,), 1 / L, device=patches.device, requires_grad=True)
    return _alone(
        case,
        lambda x: mix_normalised(patches, x),
        lambda x: plain_probes.mix(patches, x),
        [gate],
        repeats=repeats,
    )


def pooling_row(case: Case, features: Features, *, repeats: int) -> dict[str, Any]:
    """The pooling alone, of float32 tokens: forward, and backward to tokens, prototypes, middle."""
    device, sizes = features.patches.device, case.sizes
    g = torch.Generator(device).manual_seed(0)
    shapes = ((sizes.clips, sizes.time * sizes.freq), (sizes.prototypes,), (sizes.clips,))
    given = [
        torch.randn(*s, sizes.width, generator=g, device=device).requires_grad_() for s in shapes
    ]
    return _alone(
        case,
        lambda *x: pool_prototypes(*x),
        plain_probes.pool,
        given,
        repeats=repeats,
    )


ALONE = {"mixing": mixing_row, "pooling": pooling_row}


def _alone(
    case: Case,
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    given: list[Tensor],
    *,
    repeats: int,
) -> dict[str, Any]:
    """Two forms of one operator, forward and backward to all that is ``given``."""
    device = given[0].device
    with torch.no_grad():
        up = torch.randn_like(ours(*given))

    def way(form: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.autocast(device.type, torch.bfloat16, enabled=case.kind == "bf16"):
                out = form(*given)
            return torch.autograd.grad(out, given, up.to(out.dtype))

        return call

    ways = {"ours": way(ours), "plain": way(plain)}
    return _compare(case, ways, device, repeats=repeats, peak=lambda call: peak_mb(call, device))


def _compare(
    case: Case,
    ways: dict[str, Any],
    device: torch.device,
    *,
    repeats: int,
    peak: Callable[[Any], float],
) -> dict[str, Any]:
    taken = medians(ways, repeats=repeats, title=case.label(), device=device)
    ours, plain = (peak(ways[way]) for way in ("ours", "plain"))
    return {
        "case": case.label(),
        "ours_ms": 1e3 * taken["ours"],
        "plain_ms": 1e3 * taken["plain"],
        "ratio": taken["plain"] / taken["ours"],
        "ours_peak_mb": ours,
        "plain_peak_mb": plain,
        "peak_share": ours / plain if plain else None,
    }


def cases(*, gpu: bool, quick: bool) -> list[Case]:
    """Those of a CPU or a GPU; equal sizes and kinds lie together."""
    sizes = TINY if quick else Sizes()
    probes, alone = ("cgp", "protobin"), tuple(ALONE)
    if not gpu:
        found = [Case(what, sizes, kind) for kind in TYPES for what in (*probes, *alone)]
        return [*found, Case("cgp", sizes, "bf16", level="frame")]
    large = sizes._replace(clips=3 if quick else 48)
    found = [Case(what, sizes, kind) for kind in TYPES for what in probes]
    found += [Case("cgp", sizes, "bf16", level="frame")]
    found += [Case(what, large, "float32") for what in alone]
    found += [
        Case(what, large, "bf16", compiled=compiled)
        for what in probes
        for compiled in (False, True)
    ]
    return [*found, *(Case(what, large, "bf16") for what in alone)]


def run(*, repeats: int, quick: bool, only: str = "") -> Iterator[dict[str, Any]]:
    """The rows of this machine, CPU or GPU, each as soon as it is measured.

    A case that raises becomes ``{"case", "error"}``. ``only``: the cases of this probe, the large
    ones first.
    """
    device = here()
    features, made = None, None
    found = cases(gpu=device.type == "cuda", quick=quick)
    if only:
        found = sorted((c for c in found if c.what == only), key=lambda c: -c.sizes.clips)
    for case in found:
        try:
            if features is None or made != (case.sizes, case.kind):
                features = None  # room for the next
                features = make_features(case.sizes, TYPES[case.kind], device)
                made = (case.sizes, case.kind)
            row = case.row(features, repeats=repeats)
        except Exception as error:  # of any kind: the other cases still count
            said = str(error).strip().splitlines() or [""]
            row = {"case": case.label(), "error": f"{type(error).__name__}: {said[0]}"}
        yield row
