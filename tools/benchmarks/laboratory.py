"""Many probes at once: one training step of ``bat-probe``'s loop, the features made for each batch.

Ours: the frozen encoder once a batch, every probe on its features (``bat.eval.fit.fit``).
Plain: one probe after the other, the encoder run for each, as separate commands do. Besides:
``features_ms``, ``probes_ms`` all probes on features that are there, ``dearest`` and its
``dearest_ms`` alone, features included; ``times_dearest`` ours over that, and ``own_work``:
``probes_ms`` over the dearest's own training, which no sharing of features makes smaller.

The case ``half a second`` is a first probe of short clips: ``linear``, ``mlp`` and ``cgp`` at three
rates each, float32 features that lie in memory. Plain: an optimiser a training and PyTorch's own
seeding, CGP as in ``plain_probes.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bat.config.sections import Optim
from bat.encoders.bat import BAT
from bat.eval.fit import Training, fit
from bat.nn.losses import LOSSES
from bat.probes.base import Probe, build_probe, expand
from bat.types import Features, Grid
from benchmarks.plain_probes import PlainCGP
from benchmarks.timing import attempted, here, medians

ABOUT = "all probes at once: ratio = one after the other, each with its own features / ours"


class Sizes(NamedTuple):
    width: int = 768
    blocks: int = 12
    heads: int = 12
    time: int = 64
    clips: int = 48
    prototypes: int = 10_000
    classes: int = 527


ESC10 = Sizes(width=192, blocks=6, heads=3, time=32, clips=48, prototypes=500, classes=10)
SHORT = Sizes(width=192, blocks=6, heads=3, time=4, clips=48, prototypes=1000, classes=6)
QUICK = Sizes(width=16, blocks=2, heads=2, time=2, clips=2, prototypes=8, classes=3)
OPTIM = Optim(lr=1e-3, decay="matrices", warmup_steps=0)


def measure(case: str, sizes: Sizes, *, repeats: int) -> Iterator[dict[str, Any]]:
    device = here()
    torch.manual_seed(0)
    grid = Grid(sizes.time, 8)
    encoder = BAT(width=sizes.width, depth=sizes.blocks, heads=sizes.heads, grid=grid)
    encoder = encoder.eval().requires_grad_(False).to(device)
    spectrogram = torch.rand(sizes.clips, 1, 16 * sizes.time, 128, device=device)
    targets = (torch.rand(sizes.clips, sizes.classes, device=device) < 0.1).float()
    names = expand(["all"], level="clip")

    @torch.no_grad()
    def features() -> Features:
        with torch.autocast(device.type, torch.bfloat16):
            made = encoder.features(spectrogram, entry=True)
        return Features(*(None if x is None else x.bfloat16() for x in made))  # type: ignore[arg-type]

    def build(name: str) -> Probe:
        return build_probe(
            name,
            classes=sizes.classes,
            width=sizes.width,
            depth=sizes.blocks,
            has_cls=True,
            encoder=encoder,
            prototypes=sizes.prototypes,
        ).to(device)

    stored = features()
    probes = {name: build(name) for name in names}

    def train(chosen: list[str], batches: list[Features]) -> None:
        fit(
            {name: Training(probes[name], OPTIM, name, 0) for name in chosen},
            iter([(batch, targets) for batch in batches]),
            loss=LOSSES["bce"],
            steps=len(batches),
            autocast=torch.bfloat16,
        )

    # moments are made in the first step of an optimiser: two steps less one are a step
    ways = {"features": lambda: features(), "all, 1": lambda: train(names, [stored]),
            "all, 3": lambda: train(names, [stored] * 3)}  # fmt: skip
    for name in names:
        ways[f"{name}, 1"] = lambda name=name: train([name], [stored])
        ways[f"{name}, 3"] = lambda name=name: train([name], [stored] * 3)
    gc.collect()
    taken = medians(ways, repeats=repeats, title=case, device=device)
    own = {name: (taken[f"{name}, 3"] - taken[f"{name}, 1"]) / 2 for name in names}
    together = (taken["all, 3"] - taken["all, 1"]) / 2
    dearest = max(own, key=lambda name: own[name])
    ours, alone = taken["features"] + together, taken["features"] + own[dearest]
    plain = len(names) * taken["features"] + sum(own.values())
    yield {
        "case": case,
        "probes": len(names),
        "ours_ms": 1e3 * ours,
        "plain_ms": 1e3 * plain,
        "ratio": plain / ours,
        "features_ms": 1e3 * taken["features"],
        "probes_ms": 1e3 * together,
        "dearest": dearest,
        "dearest_ms": 1e3 * alone,
        "times_dearest": ours / alone,
        "own_work": together / own[dearest],
    }


def measure_short(case: str, sizes: Sizes, *, repeats: int) -> Iterator[dict[str, Any]]:
    device = here()
    torch.manual_seed(0)
    stored = Features(
        torch.randn(sizes.blocks, sizes.clips, sizes.time, 8, sizes.width, device=device),
        torch.randn(sizes.blocks, sizes.clips, sizes.width, device=device),
    )
    targets = torch.eye(sizes.classes, device=device)[torch.arange(sizes.clips) % sizes.classes]
    shape: dict[str, Any] = {"classes": sizes.classes, "width": sizes.width, "depth": sizes.blocks}
    names = [(name, lr) for name in ("linear", "mlp", "cgp") for lr in (1e-3, 4e-3, 1.6e-2)]

    def build(name: str) -> Probe:
        return build_probe(name, **shape, has_cls=True, prototypes=sizes.prototypes).to(device)

    def plain(name: str) -> torch.nn.Module:
        if name != "cgp":
            return build(name)
        return PlainCGP(**shape, level="clip", prototypes=sizes.prototypes, dropout=0.2).to(device)

    ours = {key: Training(build(key[0]), replace(OPTIM, lr=key[1]), key[0], 0) for key in names}
    theirs = [plain(name) for name, _ in names]
    loss = LOSSES["ce"]

    def train(steps: int) -> None:
        fit(ours, iter([(stored, targets)] * steps), loss=loss, steps=steps)

    def train_plainly(steps: int) -> None:
        adam = [
            torch.optim.AdamW(probe.parameters(), lr=lr)
            for probe, (_, lr) in zip(theirs, names, strict=True)
        ]
        for step in range(steps):
            for probe, optimizer in zip(theirs, adam, strict=True):
                torch.manual_seed(step)
                optimizer.zero_grad()
                loss(probe.train()(stored), targets).backward()
                optimizer.step()

    ways = {"ours, 1": lambda: train(1), "ours, 6": lambda: train(6),
            "plain, 1": lambda: train_plainly(1), "plain, 6": lambda: train_plainly(6)}  # fmt: skip
    taken = medians(ways, repeats=repeats, title=case, device=device)
    own, other = ((taken[f"{way}, 6"] - taken[f"{way}, 1"]) / 5 for way in ("ours", "plain"))
    yield {
        "case": case,
        "probes": len(names),
        "ours_ms": 1e3 * own,
        "plain_ms": 1e3 * other,
        "ratio": other / own,
    }


def run(*, repeats: int, quick: bool) -> Iterator[dict[str, Any]]:
    cases = {"quick": QUICK} if quick else {"ESC-10, tiny": ESC10, "AudioSet, Base": Sizes()}
    for case, sizes in cases.items():
        yield from attempted(case, lambda c=case, s=sizes: measure(c, s, repeats=repeats))
    case, sizes = "half a second", SHORT._replace(prototypes=8) if quick else SHORT
    yield from attempted(case, lambda: measure_short(case, sizes, repeats=repeats))
