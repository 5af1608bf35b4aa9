"""Trains, selects and evaluates every probe with every seed in every fold (docs/method.md 5).

Candidates are trained side by side on the training clips. Each has a validation step at the end, or
every so many steps; of each method and seed the best one is selected and evaluated on the held-out
clips, once. If a protocol selects nothing there is one candidate, evaluated after its last step.
The higher main metric is better; ties go to the later step, then to the lower loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bat.config.probing import Protocol
from bat.eval.candidates import EVERY, Candidate, Look, Plan, Score, State, fresh, passes
from bat.eval.features import Source
from bat.eval.fit import Predictions, Training, fit, own_randomness, predictions
from bat.eval.results import Outcome
from bat.eval.scoring import values_of
from bat.eval.splits import Round
from bat.metrics.base import describe
from bat.probes.base import Probe
from bat.redact import one_line
from bat.seeding import derive_seed


def cross_validate(
    source: Source, rounds: Sequence[Round], methods: Sequence[str], plan: Plan
) -> list[Outcome]:
    """Trains, selects and evaluates each of ``methods`` with each seed in each of ``rounds``.

    A training that diverges at every rate has no result and is listed in ``plan.diverged``.
    """
    outcomes = []
    plan.measure(methods)
    for held in rounds:
        jobs = plan.jobs(held, methods)
        first = [job for job in jobs if plan.searches(job[1])]
        outcomes += _round(source, held, first, plan)
        if others := [job for job in jobs if job not in first]:
            found = _choices([*plan.before, *outcomes], held, plan.seed)
            outcomes += _round(source, held, others, plan, found)
    return outcomes


Choices = dict[str, dict[str, tuple[float, float]]]
"""Learning rate and weight decay by method and answer."""


def _choices(outcomes: Sequence[Outcome], held: Round, seed: int) -> Choices:
    """Returns the values that the search with ``seed`` selected in ``held``."""
    found: Choices = {}
    for o in outcomes:
        if (o.fold, o.seed) == (held.name, seed):
            pair = o.chosen["lr"], o.chosen["weight_decay"]
            found.setdefault(o.probe, {})[o.method.removeprefix(o.probe)] = pair
    return found


def _round(
    source: Source,
    held: Round,
    jobs: Sequence[tuple[str, int]],
    plan: Plan,
    given: Choices | None = None,
) -> list[Outcome]:
    """Trains, selects and evaluates ``jobs`` in one fold.

    Each answer uses the values ``given`` for it, or a search over the grid of its method.
    """
    candidates = []
    for method, seed in jobs:
        pairs = plan.grid(method)
        if given is not None:  # missing if the search diverged
            pairs = list(dict.fromkeys(given.get(method, {}).values()))
        candidates += [Candidate(method, seed, *pair, order) for order, pair in enumerate(pairs)]
    left = {job: sum(c.job == job for c in candidates) for job in jobs}
    tried = dict(left)
    plan.diverged += [(method, held.name, seed) for method, seed in jobs if not left[method, seed]]
    best: dict[tuple[str, int], dict[str, Look]] = {job: {} for job in jobs if left[job]}
    groups = list(passes(candidates, parameters=plan.parameters, memory_bytes=plan.memory_bytes))
    outcomes = []
    if plan.bar is not None and plan.bar.total:  # a search may have selected several pairs
        more = len(candidates) - sum(plan.tries(*job) for job in jobs)
        plan.bar.total += more * plan.run_steps(held)[0]
    for number, group in enumerate(groups, start=1):
        if plan.bar is not None:
            part = f", pass {number} of {len(groups)}" if len(groups) > 1 else ""
            plan.bar.set_description(f"probes, {one_line(held.name)} held out{part}")
        _train(source, held, group, best, plan, given or {})
        for candidate in group:
            left[candidate.job] -= 1
        ready = [job for job in best if not left[job]]
        looks = {job: best.pop(job) for job in ready}
        outcomes += _evaluate(source, held, looks, tried, plan)
    return outcomes


def _train(
    source: Source,
    held: Round,
    group: Sequence[Candidate],
    best: dict[tuple[str, int], dict[str, Look]],
    plan: Plan,
    given: Choices,
) -> None:
    """Trains ``group`` side by side; keeps in ``best`` the best validation step of each job and
    answer, only among those with the rate and weight decay ``given`` for it."""
    steps, warmup = plan.run_steps(held)
    trainings = {}
    for candidate in group:
        optim = candidate.optim(plan.optim)
        optim.warmup_steps = warmup
        seed = derive_seed(candidate.seed, held.name, "dropout")
        probe = fresh(plan, held, *candidate.job).to(plan.device)
        trainings[candidate] = Training(probe, optim, candidate.method, seed)
    protocol = plan.protocol or Protocol(selection="none")
    waited: dict[tuple[Candidate, str], int] = {}
    tops: dict[tuple[Candidate, str], Score] = {}

    def look(step: int, active: Sequence[Candidate]) -> set[Candidate]:
        """Runs a validation step of ``active``; returns those that no longer improve."""
        scores = _scores(source, held, {c: trainings[c].probe for c in active}, plan)
        states: dict[Candidate, State] = {}
        waiting = set(active)
        for (candidate, answer), score in scores.items():
            at = candidate, answer
            pair = candidate.lr, candidate.weight_decay
            if given and given[candidate.method][answer] != pair:
                continue
            if protocol.patience and waited.get(at, 0) >= protocol.patience:
                continue  # this answer has stopped, others of its probe have not
            kept = best[candidate.job].get(answer)
            if score is not None and Look(candidate, step, score, {}).better(kept):
                if candidate not in states:
                    states[candidate] = _state(trainings[candidate].probe)
                best[candidate.job][answer] = Look(candidate, step, score, states[candidate])
            if score is not None and (at not in tops or score > tops[at]):
                tops[at], waited[at] = score, 0
            else:
                waited[at] = waited.get(at, 0) + 1
            if not protocol.patience or waited[at] < protocol.patience:
                waiting.discard(candidate)
        return waiting

    def after_step(step: int, losses: dict[Candidate, Tensor]) -> set[Candidate]:
        plan.on_step()
        if plan.on_log and plan.log_every and (step % plan.log_every == 0 or step in (1, steps)):
            for c, value in losses.items():
                row = {"fold": held.name, "step": step, "method": c.method, "seed": c.seed}
                rate = {"lr": c.lr, "weight_decay": c.weight_decay}
                plan.on_log({**row, **rate, "loss": float(value)})
        looks = step == steps or (protocol.look_every and step % protocol.look_every == 0)
        stopped = look(step, list(losses)) if held.valid is not None and looks else set()
        if plan.bar is not None:
            plan.bar.update(len(losses) + len(stopped) * (steps - step))
        return stopped

    order = derive_seed(plan.seed, held.name, "order")
    fit(
        trainings,
        source.training(held.train, batch=plan.batch, steps=steps, seed=order),
        loss=plan.loss,
        steps=steps,
        autocast=plan.autocast,
        after_step=after_step,
    )
    if held.valid is None:
        for candidate, training in trainings.items():
            assert not best[candidate.job], "nothing chooses among candidates"
            best[candidate.job][EVERY] = Look(candidate, steps, None, _state(training.probe))


def _state(probe: Probe) -> State:
    return {k: v.detach().to("cpu", copy=True) for k, v in probe.state_dict().items()}


def _scores(
    source: Source, held: Round, probes: dict[Candidate, Probe], plan: Plan
) -> dict[tuple[Any, str], Score | None]:
    """Returns main metric and negated loss on the validation clips; None if one diverged."""
    assert held.valid is not None
    with own_randomness(torch.device(plan.device)):
        found = predictions(
            probes, source.once(held.valid, batch=plan.batch), autocast=plan.autocast
        )
    scores: dict[tuple[Any, str], Score | None] = {}
    for key, logits in found.logits.items():
        if not logits.isfinite().all():
            scores[key] = None
            continue
        assert plan.scorer is not None
        value = plan.scorer.values(logits, found, source, held.valid)[plan.chooses]
        if math.isnan(value):  # no class of the validation clips has a positive
            value = describe(plan.chooses).worst
        tokens = not found.targets.is_floating_point()  # CTC needs whole clips
        loss = 0.0 if tokens else float(plan.loss(logits, found.targets.float()))
        scores[key] = _signed(value, plan), -loss
    return scores


def _signed(value: float, plan: Plan) -> float:
    """Returns ``value`` of the selection metric, negated if lower is better (its own inverse)."""
    return value if describe(plan.chooses).better == "higher" else -value


def _evaluate(
    source: Source,
    held: Round,
    looks: dict[tuple[str, int], dict[str, Look]],
    tried: dict[tuple[str, int], int],
    plan: Plan,
) -> list[Outcome]:
    """Evaluates the selected step of each job on the held-out clips, once each.

    A job that diverged, or has an answer that did, has no results and is in ``plan.diverged``.
    """
    probes: dict[tuple[tuple[str, int], int], Probe] = {}  # one for each job and state
    for job, answers in looks.items():
        for look in answers.values():
            if (job, id(look.state)) not in probes:
                probe = fresh(plan, held, *job)
                probe.load_state_dict(look.state)
                probes[job, id(look.state)] = probe.to(plan.device).eval()
    outcomes: dict[tuple[str, int], list[Outcome]] = {job: [] for job in looks}
    sound = {job for job in looks if looks[job]}
    if probes:
        held_out = source.once(held.test, batch=plan.batch)

        def wanted(key: tuple[tuple[str, int], int], answer: str) -> bool:
            """Return True for answers selected at this state, or never selected."""
            look = looks[key[0]].get(answer) or looks[key[0]].get(EVERY)
            return look is None or id(look.state) == key[1]

        found = predictions(probes, held_out, autocast=plan.autocast, wanted=wanted)
        for (key, answer), logits in found.logits.items():
            assert isinstance(key, tuple)
            job, _ = key
            chosen = looks[job].get(answer) or looks[job].get(EVERY)
            if chosen is None or not logits.isfinite().all():
                sound.discard(job)
            elif job in sound:
                outcomes[job].append(
                    _outcome(
                        source,
                        held,
                        job,
                        answer,
                        chosen,
                        probes[key],
                        tried[job],
                        logits,
                        found,
                        plan,
                    )
                )
    for job, own in outcomes.items():
        if job not in sound:
            plan.diverged.append((job[0], held.name, job[1]))
        elif plan.on_probe is not None:
            first = next(iter(looks[job].values()))
            plan.on_probe(probes[job, id(first.state)], own)
    return [outcome for job, own in outcomes.items() if job in sound for outcome in own]


def _outcome(
    source: Source,
    held: Round,
    job: tuple[str, int],
    answer: str,
    look: Look,
    probe: Probe,
    tried: int,
    logits: Tensor,
    found: Predictions,
    plan: Plan,
) -> Outcome:
    gate = probe.layer_gate()
    method, seed = job
    resampled = None
    assert plan.scorer is not None
    computed = plan.scorer.computed(logits, found, source, held.test)
    if plan.bootstrap and "@" not in answer and describe(plan.metric).bootstrap:
        values = computed[plan.metric].replicates(
            plan.metric,
            resamples=plan.bootstrap,
            seed=derive_seed(plan.seed, held.name, "resamples"),
        )
        resampled = [round(float(v), 6) for v in values]
    return Outcome(
        method=f"{method}{answer}",
        fold=held.name,
        metrics=values_of(computed),
        gate=None if gate is None else gate.cpu().tolist(),
        seed=seed,
        probe=method,
        chosen={
            "lr": look.candidate.lr,
            "weight_decay": look.candidate.weight_decay,
            "step": look.step,
            "validation": None if look.score is None else _signed(look.score[0], plan),
            "candidates": tried,
        },
        parameters=plan.parameters[method],
        replicates=resampled,
    )
