"""Trains, selects and evaluates every probe with every seed in every fold (docs/method.md 5).

Candidates are trained side by side on the training clips. Each has a validation step at the end, or
every so many steps; of each method and seed the best one is selected and evaluated on the held-out
clips, once. If a protocol selects nothing there is one candidate, evaluated after its last step.
The higher main metric is better; ties go to the later step, then to the lower loss.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from bat.config.probing import Protocol
from bat.eval.candidates import EVERY, Candidate, Plan, Score, State, Validation, fresh, passes
from bat.eval.features import Source
from bat.eval.fit import Predictions, Training, fit, predictions, preserve_rng_state
from bat.eval.results import FoldResult
from bat.eval.scoring import values_of
from bat.eval.splits import Split
from bat.metrics.base import describe
from bat.probes.base import Probe
from bat.redact import one_line
from bat.seeding import derive_seed

Job = tuple[str, int]
"""Method and seed."""
Selected = dict[str, dict[str, tuple[float, float]]]
"""Learning rate and weight decay by method and answer (``Probe.answers``)."""


def cross_validate(
    source: Source, splits: Sequence[Split], methods: Sequence[str], plan: Plan
) -> list[FoldResult]:
    """Trains, selects and evaluates each of ``methods`` with each seed in each of ``splits``.

    A training that diverges at every rate has no result and is listed in ``plan.diverged``.
    """
    fold_results: list[FoldResult] = []
    plan.measure(methods)
    for held in splits:
        jobs = plan.jobs(held, methods)
        searching = [job for job in jobs if plan.searches(job[1])]
        fold_results += _Fold(source, held, plan).run(searching)
        if others := [job for job in jobs if job not in searching]:
            selected: Selected = {}
            for o in (*plan.before, *fold_results):
                if (o.fold, o.seed) == (held.name, plan.seed):
                    pair = o.selected["lr"], o.selected["weight_decay"]
                    selected.setdefault(o.probe, {})[o.method.removeprefix(o.probe)] = pair
            fold_results += _Fold(source, held, plan, selected).run(others)
    return fold_results


class _Fold:
    """Trainings of one fold and their evaluation.

    ``given``: the values that the first seed has selected; None: the grid of each method is
    searched.
    """

    def __init__(
        self, source: Source, held: Split, plan: Plan, given: Selected | None = None
    ) -> None:
        self.source, self.held, self.plan, self.given = source, held, plan, given
        self.protocol = plan.protocol or Protocol(selection="none")
        self.best: dict[Job, dict[str, Validation]] = {}
        """The best validation step so far, by answer."""
        self.tried: Counter[Job] = Counter()
        """Number of candidates."""

    def run(self, jobs: Sequence[Job]) -> list[FoldResult]:
        plan, bar = self.plan, self.plan.bar
        candidates = []
        for method, seed in jobs:
            pairs = plan.grid(method)
            if self.given is not None:
                pairs = list(dict.fromkeys(self.given.get(method, {}).values()))
            if pairs:
                self.best[method, seed] = {}
            else:  # the search of the first seed diverged
                plan.diverged.append((method, self.held.name, seed))
            candidates += [Candidate(method, seed, *pair, i) for i, pair in enumerate(pairs)]
        self.tried.update(candidate.job for candidate in candidates)
        if bar is not None and bar.total:  # a search may have selected several pairs
            more = len(candidates) - sum(plan.tries(*job) for job in jobs)
            bar.total += more * plan.run_steps(self.held)[0]
        groups = list(
            passes(candidates, parameters=plan.parameters, memory_bytes=plan.memory_bytes)
        )
        left = self.tried.copy()
        fold_results = []
        for number, group in enumerate(groups, start=1):
            if bar is not None:
                part = f", pass {number} of {len(groups)}" if len(groups) > 1 else ""
                bar.set_description(f"probes, {one_line(self.held.name)} held out{part}")
            self._train(group)
            left.subtract(candidate.job for candidate in group)
            fold_results += self._evaluate([job for job in self.best if not left[job]])
        return fold_results

    def _train(self, group: Sequence[Candidate]) -> None:
        """Trains ``group`` side by side; keeps the best validation steps in ``self.best``."""
        plan, held, protocol = self.plan, self.held, self.protocol
        steps, warmup = plan.run_steps(held)
        trainings = {}
        for candidate in group:
            optim = candidate.optim(plan.optim)
            optim.warmup_steps = warmup
            seed = derive_seed(candidate.seed, held.name, "dropout")
            probe = fresh(plan, held, *candidate.job).to(plan.device)
            trainings[candidate] = Training(probe, optim, candidate.method, seed)
        without_gain: Counter[tuple[Candidate, str]] = Counter()  # validation steps in a row
        tops: dict[tuple[Candidate, str], Score] = {}

        def validate(step: int, active: Collection[Candidate]) -> set[Candidate]:
            """Runs a validation step of ``active``; returns those that no longer improve."""
            scores = self._scores({c: trainings[c].probe for c in active})
            states: dict[Candidate, State] = {}
            stopped = set(active)
            for (candidate, answer), score in scores.items():
                at, best = (candidate, answer), self.best[candidate.job]
                pair = candidate.lr, candidate.weight_decay
                if self.given and self.given[candidate.method][answer] != pair:
                    continue
                if protocol.patience and without_gain[at] >= protocol.patience:
                    continue  # this answer has stopped, others of its probe have not
                better = Validation(candidate, step, score, {}).better(best.get(answer))
                if score is not None and better:
                    if candidate not in states:
                        states[candidate] = _state(trainings[candidate].probe)
                    best[answer] = Validation(candidate, step, score, states[candidate])
                if score is not None and (at not in tops or score > tops[at]):
                    tops[at], without_gain[at] = score, 0
                else:
                    without_gain[at] += 1
                if not protocol.patience or without_gain[at] < protocol.patience:
                    stopped.discard(candidate)
            return stopped

        def after_step(step: int, losses: dict[Candidate, Tensor]) -> set[Candidate]:
            plan.on_step()
            if (
                plan.on_log
                and plan.log_every
                and (step % plan.log_every == 0 or step in (1, steps))
            ):
                for c, value in losses.items():
                    row = {"fold": held.name, "step": step, "method": c.method, "seed": c.seed}
                    rate = {"lr": c.lr, "weight_decay": c.weight_decay}
                    plan.on_log({**row, **rate, "loss": float(value)})
            due = step == steps or (protocol.look_every and step % protocol.look_every == 0)
            stopped = validate(step, losses) if held.valid is not None and due else set()
            if plan.bar is not None:
                plan.bar.update(len(losses) + len(stopped) * (steps - step))
            return stopped

        order = derive_seed(plan.seed, held.name, "order")
        fit(
            trainings,
            self.source.training(held.train, batch=plan.batch, steps=steps, seed=order),
            loss=plan.loss,
            steps=steps,
            autocast=plan.autocast,
            after_step=after_step,
        )
        if held.valid is None:
            for candidate, training in trainings.items():
                assert not self.best[candidate.job], "nothing selects among candidates"
                last = Validation(candidate, steps, None, _state(training.probe))
                self.best[candidate.job][EVERY] = last

    def _scores(self, probes: dict[Candidate, Probe]) -> dict[tuple[Candidate, str], Score | None]:
        """Returns main metric and negated loss on the validation clips; None if one diverged."""
        plan, valid = self.plan, self.held.valid
        assert valid is not None
        assert plan.scorer is not None
        with preserve_rng_state(torch.device(plan.device)):
            found = predictions(
                probes, self.source.once(valid, batch=plan.batch), autocast=plan.autocast
            )
        scores: dict[tuple[Candidate, str], Score | None] = {}
        for (candidate, answer), logits in found.logits.items():
            assert isinstance(candidate, Candidate)
            if not logits.isfinite().all():
                scores[candidate, answer] = None
                continue
            value = plan.scorer.value(plan.selection_metric, logits, found, self.source, valid)
            if math.isnan(value):  # no class of the validation clips has a positive
                value = describe(plan.selection_metric).worst
            tokens = not found.targets.is_floating_point()  # CTC needs whole clips
            loss = 0.0 if tokens else float(plan.loss(logits, found.targets.float()))
            scores[candidate, answer] = self._signed(value), -loss
        return scores

    def _signed(self, value: float) -> float:
        """Returns ``value`` of the selection metric, negated if lower is better (its own
        inverse)."""
        return value if describe(self.plan.selection_metric).better == "higher" else -value

    def _evaluate(self, jobs: Sequence[Job]) -> list[FoldResult]:
        """Evaluates the selected step of each job on the held-out clips, once each.

        A job that diverged, or has an answer that did, has no results and is in ``plan.diverged``.
        """
        plan, held = self.plan, self.held
        steps_of = {job: self.best.pop(job) for job in jobs}
        probes: dict[tuple[Job, int], Probe] = {}  # one for each job and state
        for job, answers in steps_of.items():
            for best_step in answers.values():
                if (job, id(best_step.state)) not in probes:
                    probe = fresh(plan, held, *job)
                    probe.load_state_dict(best_step.state)
                    probes[job, id(best_step.state)] = probe.to(plan.device).eval()

        def selected(job: Job, answer: str) -> Validation | None:
            return steps_of[job].get(answer) or steps_of[job].get(EVERY)

        def wanted(key: tuple[Job, int], answer: str) -> bool:
            """Return True for answers selected at this state, or never selected."""
            best_step = selected(key[0], answer)
            return best_step is None or id(best_step.state) == key[1]

        fold_results: dict[Job, list[FoldResult]] = {job: [] for job in jobs}
        diverged = {job for job in jobs if not steps_of[job]}
        if probes:
            batches = self.source.once(held.test, batch=plan.batch)
            found = predictions(probes, batches, autocast=plan.autocast, wanted=wanted)
            for (key, answer), logits in found.logits.items():
                assert isinstance(key, tuple)
                job = key[0]
                best = selected(job, answer)
                if best is None or not logits.isfinite().all():
                    diverged.add(job)
                elif job not in diverged:
                    fold_result = self._fold_result(job, answer, best, probes[key], logits, found)
                    fold_results[job].append(fold_result)
                    if plan.on_result is not None:
                        plan.on_result(fold_result, logits, found, held)
        for job in jobs:
            if job in diverged:
                plan.diverged.append((job[0], held.name, job[1]))
            elif plan.on_probe is not None:
                first = next(iter(steps_of[job].values()))
                plan.on_probe(probes[job, id(first.state)], fold_results[job])
        return [
            fold_result for job in jobs if job not in diverged for fold_result in fold_results[job]
        ]

    def _fold_result(
        self,
        job: Job,
        answer: str,
        best_step: Validation,
        probe: Probe,
        logits: Tensor,
        found: Predictions,
    ) -> FoldResult:
        plan, held, gate = self.plan, self.held, probe.layer_gate()
        assert plan.scorer is not None
        computed = plan.scorer.computed(logits, found, self.source, held.test)
        resampled = None
        if plan.bootstrap and "@" not in answer and describe(plan.metric).bootstrap:
            seed = derive_seed(plan.seed, held.name, "resamples")
            values = computed[plan.metric].replicates(
                plan.metric, resamples=plan.bootstrap, seed=seed
            )
            resampled = [round(float(v), 6) for v in values]
        return FoldResult(
            method=f"{job[0]}{answer}",
            fold=held.name,
            metrics=values_of(computed),
            gate=None if gate is None else gate.cpu().tolist(),
            seed=job[1],
            probe=job[0],
            selected={
                "lr": best_step.candidate.lr,
                "weight_decay": best_step.candidate.weight_decay,
                "step": best_step.step,
                "validation": None if best_step.score is None else self._signed(best_step.score[0]),
                "candidates": self.tried[job],
            },
            parameters=plan.parameters[job[0]],
            replicates=resampled,
        )


def _state(probe: Probe) -> State:
    return {k: v.detach().to("cpu", copy=True) for k, v in probe.state_dict().items()}
