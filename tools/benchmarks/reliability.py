"""What a run that cannot be lost costs: checkpoints, and what is watched along the way.

*checkpoint*: how long training waits. Ours copies the state to host memory and lets a thread write,
read back, flush and rename it; plain is ``torch.save`` to a file beside, flush and rename, with
training waiting. ``safe_ms``: until ours is safe. *verify*: reading a checkpoint back, as is done
after each write and at each resume.

*checks*: the parts of a step that only watch (norm of all gradients and the decision to skip, one
micro-batch's scalars, the check for collapse over the steps between two), as a share of the step
they belong to. Parts are timed alone: a difference of two steps would drown in noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bat.config.running import Health
from bat.eval.collapse import representation
from bat.io import replace_durably
from bat.train.checkpointing import AtomicCheckpointIO, damaged
from benchmarks.step import QUICK, OursStep, settings
from benchmarks.timing import attempted, here, medians, seconds_of

ABOUT = "checkpoints: ratio = time that training waits, plain / ours; checks: share of a step"
CHECK_EVERY, CHECK_CLIPS = Health().collapse_every, 8


def state_of(ours: OursStep) -> dict[str, Any]:
    """What Lightning would save: weights, moments."""
    for group in ours.optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    return {
        "state_dict": ours.module.state_dict(),
        "optimizer_states": [ours.optimizer.state_dict()],
    }


def plain_save(state: dict[str, Any], path: Path) -> None:
    """Beside, flushed, renamed: nothing read back."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    replace_durably(temporary, path)


def checkpoint(case: str, words: list[str], *, repeats: int) -> Iterator[dict[str, Any]]:
    state = state_of(OursStep(settings([*words, "data.batch=1"]), here()))
    with tempfile.TemporaryDirectory(prefix="bat-bench-") as folder:
        path, io = (
            Path(folder) / "checkpoints" / "step-00000001.ckpt",
            AtomicCheckpointIO(background=True),
        )
        path.parent.mkdir()
        stalls, safe, plain = [], [], []
        for _ in range(repeats + 1):
            begun = seconds_of(lambda: io.save_checkpoint(state, path))
            stalls.append(begun)
            safe.append(begun + seconds_of(io.wait))
            plain.append(seconds_of(lambda: plain_save(state, path)))
        read = medians({"verify": lambda: damaged(path)}, repeats=repeats)["verify"]
        middle = [sorted(times[1:])[repeats // 2] for times in (stalls, plain, safe)]
        yield {
            "case": f"checkpoint, {case}",
            "ours_ms": 1e3 * middle[0],
            "plain_ms": 1e3 * middle[1],
            "ratio": middle[1] / middle[0],
            "safe_ms": 1e3 * middle[2],
            "verify_ms": 1e3 * read,
            "mb": path.stat().st_size / 1e6,
        }


def checks(case: str, words: list[str], *, repeats: int) -> Iterator[dict[str, Any]]:
    ours = OursStep(settings(words), here())
    module, optimizer = ours.module, ours.optimizer
    few = ours.spectrogram()[:CHECK_CLIPS]
    ours()
    ours.loss().backward()
    gradients = [(p, p.grad) for p in module.parameters() if p.grad is not None]
    encoders = module.objective.encoders().values()

    def check() -> None:
        for encoder in encoders:
            representation(encoder, few)

    def guard() -> None:
        for p, gradient in gradients:  # each step of ours drops its own
            p.grad = gradient
        module.guard.inspect(optimizer, module.parameters())

    def scalars() -> None:
        values = torch.stack([value.float() for value in module.scalars.values()])
        finite = torch.isfinite(values)
        torch.stack([values.where(finite, 0), finite.float()]).tolist()

    module.scalars = {str(i): torch.ones((), device=ours.device) for i in range(6)}
    taken = medians(
        {
            "step": ours,
            "guard": guard,
            "scalars": scalars,
            "check": check,
        },
        repeats=repeats,
        title=case,
        device=ours.device,
    )
    own = taken["guard"] + taken["scalars"] + taken["check"] / CHECK_EVERY
    yield {
        "case": f"checks, {case}",
        "step_ms": 1e3 * taken["step"],
        "guard_ms": 1e3 * taken["guard"],
        "scalars_ms": 1e3 * taken["scalars"],
        "check_ms": 1e3 * taken["check"],
        "share_percent": 100 * own / taken["step"],
    }


def run(*, repeats: int, quick: bool) -> Iterator[dict[str, Any]]:
    if quick:
        cases = [("tiny", [*QUICK, "objective.mask.views=2", "data.batch=2"])]
    elif here().type == "cuda":
        cases = [("Base, 24 clips x 16 views", ["data.batch=24"])]
    else:
        tiny = ["model=tiny", "objective.decoder=vit6h", "objective.decoder_depth=2"]
        cases = [
            ("tiny, 8 clips x 4 views", [*tiny, "data.batch=8", "objective.mask.views=4"]),
            ("Base, 1 clip x 16 views", ["data.batch=1"]),
        ]
    base = [] if not quick else QUICK
    yield from attempted(
        "checkpoint", lambda: checkpoint("tiny" if quick else "Base", base, repeats=repeats)
    )
    for case, words in cases:
        yield from attempted(
            f"checks, {case}", lambda c=case, w=words: checks(c, w, repeats=repeats)
        )
