"""What is trained side by side: every probe, with every seed, rate and weight decay of its grid.

A candidate's random numbers hang on its method, seed and round alone, so that candidates of one
method and seed differ in nothing but rate and decay, and may be trained together or in several
passes (``passes``) with the same result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bat.config.probing import Protocol
from bat.config.sections import Optim
from bat.eval.fit import own_randomness
from bat.eval.results import Outcome
from bat.eval.scoring import Scorer
from bat.eval.splits import Round
from bat.nn.losses import Loss
from bat.probes.base import Probe
from bat.seeding import derive_seed

BYTES_A_PARAMETER = 16
"""Weight, gradient and two moments in float32."""


@dataclass(frozen=True)
class Candidate:
    """One training: ``method`` with ``seed``, at ``lr`` and ``weight_decay``."""

    method: str
    seed: int
    lr: float
    weight_decay: float
    order: int = 0
    """Place in its grid."""

    @property
    def job(self) -> tuple[str, int]:
        """What it competes for: candidates of one job are chosen among."""
        return self.method, self.seed

    def optim(self, base: Optim) -> Optim:
        """``base`` with this candidate's values."""
        return replace(base, lr=self.lr, weight_decay=self.weight_decay)


def grid(protocol: Protocol | None, optim: Optim, *, prototypes: bool) -> list[tuple[float, float]]:
    """Pairs (rate, weight decay) that ``protocol`` tries; without one, or where it chooses
    nothing, that of ``optim`` alone. ``prototypes``: of a probe that has some.
    """
    if protocol is None or protocol.selection == "none":
        return [(optim.lr, optim.weight_decay)]
    rates = list(protocol.prototype_lrs) if prototypes else []
    rates = rates or list(protocol.lrs) or [optim.lr]
    decays = list(protocol.weight_decays) or [optim.weight_decay]
    if not protocol.sobol:
        return list(itertools.product(rates, decays))
    points = torch.quasirandom.SobolEngine(2).draw(protocol.sobol + 1)[1:].tolist()  # not (0, 0)
    return [(_between(rates, a), _between(decays, b)) for a, b in points]


def _between(values: Sequence[float], share: float) -> float:
    """The point at ``share`` of the way from the least to the greatest, on a log scale."""
    low, high = math.log(min(values)), math.log(max(values))
    return math.exp(low + share * (high - low))


def passes(
    candidates: Sequence[Candidate], *, parameters: dict[str, int], memory_bytes: float
) -> Iterator[list[Candidate]]:
    """``candidates`` in order, in groups that need at most ``memory_bytes``, one each at least.

    ``parameters``: of each method.
    """
    group: list[Candidate] = []
    taken = 0
    for candidate in candidates:
        size = BYTES_A_PARAMETER * parameters[candidate.method]
        if group and taken + size > memory_bytes:
            yield group
            group, taken = [], 0
        group.append(candidate)
        taken += size
    if group:
        yield group


State = dict[str, Tensor]
Score = tuple[float, float]
"""The metric that chooses, minus it where lower is better, and minus the loss."""


EVERY = "*"
"""Stands for all answers of a probe."""


@dataclass
class Look:
    """A candidate after so many steps, as the validation clips saw it."""

    candidate: Candidate
    step: int
    score: Score | None
    """None where nothing chooses."""
    state: State

    def better(self, other: Look | None) -> bool:
        """Whether this look is chosen before ``other``: by the metric; of equal ones the later
        step (as the reference does), then the lower loss, then the earlier in the grid, whatever
        was trained first."""
        if other is None or self.score is None or other.score is None:
            return other is None
        (mine, loss), (theirs, other_loss) = self.score, other.score
        places = -self.candidate.order, -other.candidate.order
        return (mine, self.step, loss, places[0]) > (theirs, other.step, other_loss, places[1])


@dataclass
class Plan:
    """What of a round does not change from pass to pass."""

    build: Callable[[str], Probe]
    loss: Loss
    optim: Optim
    steps: int
    """Optimiser steps of a round, unless ``epochs`` says how many passes over its clips."""
    batch: int
    multi_label: bool
    metric: str = "accuracy"
    """The main one."""
    scorer: Scorer | None = None
    """Metrics of predictions; None: those of labels."""
    epochs: float = 0.0
    min_steps: int = 0
    """The least that ``epochs`` come to."""
    seed: int = 0
    """Of the order of the clips; and with the numbers after it, of initialisation and dropout."""
    seeds: int = 1
    protocol: Protocol | None = None
    bootstrap: int = 0
    memory_bytes: float = 8e9
    autocast: torch.dtype | None = None
    device: torch.device | str = "cpu"
    bar: tqdm[Any] | None = None
    """Moves on with every step of every candidate, ``steps_left`` of them."""
    log_every: int = 0
    on_log: Callable[[dict[str, Any]], None] | None = None
    """Gets ``{"fold", "step", "method", "seed", "lr", "weight_decay", "loss"}`` every
    ``log_every`` steps."""
    on_probe: Callable[[Probe, list[Outcome]], None] | None = None
    """Gets each judged probe with its outcomes."""
    on_step: Callable[[], None] = lambda: None
    """Called after each step; may end it all by raising."""
    before: Sequence[Outcome] = ()
    """Outcomes of an earlier run, whose choices the other seeds take (``protocol.search``)."""
    done: Callable[[str, str, int], bool] = lambda method, fold, seed: False
    """Whether a method, in a round, with a seed needs no training."""
    diverged: list[tuple[str, str, int]] = field(default_factory=list)
    """Method, round and seed of what diverged at every rate; filled in."""
    parameters: dict[str, int] = field(default_factory=dict)
    """Of each method; filled in."""
    prototypes: dict[str, bool] = field(default_factory=dict)
    """Whether each method has some; filled in."""

    def __post_init__(self) -> None:
        if self.scorer is None:
            self.scorer = Scorer((self.metric,), multi_label=self.multi_label)

    @property
    def chooses(self) -> str:
        """The metric that candidates are chosen by."""
        return "map" if self.protocol and self.protocol.metric == "map" else self.metric

    def grid(self, method: str) -> list[tuple[float, float]]:
        """Rates and weight decays that are tried."""
        return grid(self.protocol, self.optim, prototypes=self.prototypes[method])

    def measure(self, methods: Sequence[str]) -> None:
        """Fill in ``parameters`` and ``prototypes`` of ``methods``."""
        for method in (m for m in methods if m not in self.parameters):
            with own_randomness(torch.device(self.device)):
                probe = self.build(method)
            self.parameters[method] = sum(p.numel() for p in probe.parameters())
            self.prototypes[method] = probe.has_prototypes

    def jobs(self, held: Round, methods: Sequence[str]) -> list[tuple[str, int]]:
        """Method and seed of each training that is left to do in a round."""
        seeds = range(self.seed, self.seed + self.seeds)
        return [(m, s) for m in methods for s in seeds if not self.done(m, held.name, s)]

    def searches(self, seed: int) -> bool:
        """Whether a seed searches the grid, or takes what the first seed's search selected."""
        return not self.protocol or self.protocol.search == "each" or seed == self.seed

    def tries(self, method: str, seed: int) -> int:
        """Candidates of a job; one where the first seed's search has yet to say."""
        return len(self.grid(method)) if self.searches(seed) else 1

    def steps_left(self, rounds: Sequence[Round], methods: Sequence[str]) -> int:
        """Optimiser steps of all candidates that are left to train in ``rounds``."""
        self.measure(methods)
        tries = (
            self.run_steps(held)[0] * self.tries(*job)
            for held in rounds
            for job in self.jobs(held, methods)
        )
        return sum(tries)

    def diverged_line(self) -> str:
        """What diverged, and what to do about it."""
        jobs = ", ".join(f"{m} ({fold} held out, seed {seed})" for m, fold, seed in self.diverged)
        methods = dict.fromkeys(method for method, _, _ in self.diverged)
        rates = sorted({lr for method in methods for lr, _ in self.grid(method)})
        return (
            f"diverged at every rate tried ({', '.join(f'{lr:g}' for lr in rates)}): {jobs}; lower "
            "optim.lr or protocol.lrs"
        )

    def run_steps(self, held: Round) -> tuple[int, int]:
        """Optimiser steps and warm-up steps of a round."""
        if not self.epochs:
            return self.steps, self.optim.warmup_steps
        steps = max(1, self.min_steps, math.ceil(self.epochs * len(held.train) / self.batch))
        return steps, min(self.optim.warmup_steps, steps // 10)


def fresh(plan: Plan, held: Round, method: str, seed: int) -> Probe:
    """An untrained probe: that of its method, seed and round, whatever else is trained."""
    with own_randomness(torch.device(plan.device)):
        torch.manual_seed(derive_seed(seed, held.name, method, "init"))
        return plan.build(method)
