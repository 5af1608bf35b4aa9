"""Lists the candidates of the search: each probe with each seed, rate and decay of its grid.

The random numbers of a candidate depend only on its method, seed and fold. Candidates of one method
and seed therefore differ only in rate and decay, and can be trained together or in several passes
(``passes``) with the same result.
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
from bat.eval.fit import Predictions, preserve_rng_state
from bat.eval.results import FoldResult
from bat.eval.scoring import Scorer
from bat.eval.splits import Split
from bat.nn.losses import Loss
from bat.probes.base import Probe
from bat.seeding import derive_seed

BYTES_A_PARAMETER = 16
"""Bytes per parameter: weight, gradient and two moments in float32."""


@dataclass(frozen=True)
class Candidate:
    """One training run of ``method`` with ``seed``, at ``lr`` and ``weight_decay``."""

    method: str
    seed: int
    lr: float
    weight_decay: float
    order: int = 0
    """Position in its grid."""

    @property
    def job(self) -> tuple[str, int]:
        """The pair (method, seed); one candidate is selected per job."""
        return self.method, self.seed

    def optim(self, base: Optim) -> Optim:
        """Returns ``base`` with this candidate's learning rate and weight decay."""
        return replace(base, lr=self.lr, weight_decay=self.weight_decay)


def grid(protocol: Protocol | None, optim: Optim, *, prototypes: bool) -> list[tuple[float, float]]:
    """Returns the pairs (learning rate, weight decay) that ``protocol`` tries.

    Without a protocol, or where it selects nothing, the only pair is that of ``optim``.
    ``prototypes``: the probe has prototypes.
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
    """Returns the point at ``share`` of the way from the least to the greatest, on a log scale."""
    low, high = math.log(min(values)), math.log(max(values))
    return math.exp(low + share * (high - low))


def passes(
    candidates: Sequence[Candidate], *, parameters: dict[str, int], memory_bytes: float
) -> Iterator[list[Candidate]]:
    """Yields ``candidates`` in order, in groups of at least one that need at most ``memory_bytes``.

    ``parameters``: number of parameters per method.
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
"""The selection metric, negated where lower is better, and the negated loss."""


EVERY = "*"
"""Key that stands for all answers of a probe."""


@dataclass
class Validation:
    """Result of one validation step of a candidate."""

    candidate: Candidate
    step: int
    score: Score | None
    """Validation score; None where nothing is selected."""
    state: State

    def better(self, other: Validation | None) -> bool:
        """Return True if this validation step is preferred to ``other``.

        The metric decides; ties go to the later step (as in the reference), then to the lower loss,
        then to the earlier candidate of the grid, independent of the order of training.
        """
        if other is None or self.score is None or other.score is None:
            return other is None
        (mine, loss), (theirs, other_loss) = self.score, other.score
        places = -self.candidate.order, -other.candidate.order
        return (mine, self.step, loss, places[0]) > (theirs, other.step, other_loss, places[1])


@dataclass
class Plan:
    """Settings and callbacks that are the same for all passes of a fold."""

    build: Callable[[str], Probe]
    loss: Loss
    optim: Optim
    steps: int
    """Optimiser steps per fold, unless ``epochs`` gives the number of passes over its clips."""
    batch: int
    multi_label: bool
    metric: str = "accuracy"
    """Main metric."""
    selects: str = ""
    """Metric that selects; empty: the main metric."""
    scorer: Scorer | None = None
    """Scorer of the predictions; None: metrics of labels."""
    epochs: float = 0.0
    min_steps: int = 0
    """Lower bound on the steps that ``epochs`` amount to."""
    seed: int = 0
    """Seed of the clip order; it and the numbers after it seed initialisation and dropout."""
    seeds: int = 1
    protocol: Protocol | None = None
    bootstrap: int = 0
    memory_bytes: float = 8e9
    autocast: torch.dtype | None = None
    device: torch.device | str = "cpu"
    bar: tqdm[Any] | None = None
    """Progress bar, advanced by every step of every candidate (``steps_left`` in total)."""
    log_every: int = 0
    on_log: Callable[[dict[str, Any]], None] | None = None
    """Callback that receives ``{"fold", "step", "method", "seed", "lr", "weight_decay", "loss"}``
    every ``log_every`` steps."""
    on_probe: Callable[[Probe, list[FoldResult]], None] | None = None
    """Callback that receives each evaluated probe with its results."""
    on_result: Callable[[FoldResult, Tensor, Predictions, Split], None] | None = None
    """Callback that receives each result with the logits (n, C) that it is of."""
    on_step: Callable[[], None] = lambda: None
    """Callback after each step; it may stop the run by raising."""
    before: Sequence[FoldResult] = ()
    """Results of an earlier run; other seeds use its selected values (``protocol.search``)."""
    done: Callable[[str, str, int], bool] = lambda method, fold, seed: False
    """Predicate (method, fold, seed); True if no training is needed."""
    diverged: list[tuple[str, str, int]] = field(default_factory=list)
    """Method, fold and seed of trainings that diverged at every rate; filled in."""
    parameters: dict[str, int] = field(default_factory=dict)
    """Number of parameters per method; filled in."""
    prototypes: dict[str, bool] = field(default_factory=dict)
    """True for each method that has prototypes; filled in."""

    def __post_init__(self) -> None:
        if self.scorer is None:
            self.scorer = Scorer((self.metric,), multi_label=self.multi_label)

    @property
    def selection_metric(self) -> str:
        """The metric by which candidates are selected."""
        if self.protocol and self.protocol.metric == "map":
            return "map"
        return self.selects or self.metric

    def grid(self, method: str) -> list[tuple[float, float]]:
        """Returns the learning rates and weight decays that are tried."""
        return grid(self.protocol, self.optim, prototypes=self.prototypes[method])

    def measure(self, methods: Sequence[str]) -> None:
        """Fills in ``parameters`` and ``prototypes`` of ``methods``."""
        for method in (m for m in methods if m not in self.parameters):
            with preserve_rng_state(torch.device(self.device)):
                probe = self.build(method)
            self.parameters[method] = sum(p.numel() for p in probe.parameters())
            self.prototypes[method] = probe.has_prototypes

    def jobs(self, held: Split, methods: Sequence[str]) -> list[tuple[str, int]]:
        """Returns method and seed of each training that is still to be done in a fold."""
        seeds = range(self.seed, self.seed + self.seeds)
        return [(m, s) for m in methods for s in seeds if not self.done(m, held.name, s)]

    def searches(self, seed: int) -> bool:
        """Return True if a seed searches the grid, False if it takes the first seed's selection."""
        return not self.protocol or self.protocol.search == "each" or seed == self.seed

    def tries(self, method: str, seed: int) -> int:
        """Returns the number of candidates of a job; 1 before the first seed's search is done."""
        return len(self.grid(method)) if self.searches(seed) else 1

    def steps_left(self, splits: Sequence[Split], methods: Sequence[str]) -> int:
        """Returns the optimiser steps of all candidates still to be trained in ``splits``."""
        self.measure(methods)
        tries = (
            self.run_steps(held)[0] * self.tries(*job)
            for held in splits
            for job in self.jobs(held, methods)
        )
        return sum(tries)

    def diverged_line(self) -> str:
        """Returns a message that names what diverged and suggests a remedy."""
        jobs = ", ".join(f"{m} ({fold} held out, seed {seed})" for m, fold, seed in self.diverged)
        methods = dict.fromkeys(method for method, _, _ in self.diverged)
        rates = sorted({lr for method in methods for lr, _ in self.grid(method)})
        return (
            f"diverged at every rate tried ({', '.join(f'{lr:g}' for lr in rates)}): {jobs}; lower "
            "optim.lr or protocol.lrs"
        )

    def run_steps(self, held: Split) -> tuple[int, int]:
        """Returns the optimiser steps and warm-up steps of a fold."""
        if not self.epochs:
            return self.steps, self.optim.warmup_steps
        steps = max(1, self.min_steps, math.ceil(self.epochs * len(held.train) / self.batch))
        return steps, min(self.optim.warmup_steps, steps // 10)


def fresh(plan: Plan, held: Split, method: str, seed: int) -> Probe:
    """Builds an untrained probe; its weights depend only on method, seed and fold."""
    with preserve_rng_state(torch.device(plan.device)):
        torch.manual_seed(derive_seed(seed, held.name, method, "init"))
        return plan.build(method)
