"""Estimates what a pre-training takes on given hardware: time, memory, loader, store; on paper.

    compute   FLOP of a step / (devices x peak x MFU)
    network   bytes of gradients, and of weights where they are split, over the slower link
    loader    clips of a step / (loader processes x clips a second of one)
    store     bytes of these clips / bytes a second of the nodes
    step      the longest of the four, since they overlap (without loader processes compute and
              loader do not)

A ring of n sends 2 (n - 1) / n of the gradients (all-reduce), or (n - 1) / n of what it gathers or
scatters; between nodes it goes through the network of a node, within one over the devices' link.
Memory of a device, in float32: weights 4 bytes a parameter, gradients 4, AdamW's moments 8, the
teacher 4, all divided among the devices that split them, and what a step makes besides, counted
once on fake tensors for one clip (``bat.train.cost``) and taken times the batch.

Each number says where it comes from: counted (from the model), measured (on this machine), given
(by the recipe or ``--assume``), data sheet, assumed. docs/planning.md compares with measurements.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from bat.config.schema import Hardware, Pretrain
from bat.errors import UserError
from bat.eval.hardware import has_fast_bfloat16
from bat.train.cost import DEVICES, Device, StepCount, count_step, device_called
from bat.train.pretrain import build_objective
from bat.train.processes import nodes, with_batch, world_size

STRATEGIES = ("ddp", "fsdp", "hsdp")


@dataclass
class Assumptions:
    """Numbers that neither the model nor the recipe gives; each ``--assume NAME=VALUE``."""

    tflops: float | None = None
    """Peak of a device in TFLOP/s, instead of the data sheet's or the measured one."""
    mfu: float = 0.4
    """Share of the peak that a step reaches (a CPU: of a large matrix product, see CPU_MFU)."""
    loader: float = 4200.0
    """Seconds of audio that a loader process decodes a second (measured: 16 kHz FLAC, 10-s clips
    in 2.39 ms on a core of an AMD EPYC, docs/benchmarks.md; 44.1 kHz stereo Ogg: 620)."""
    clip_kb: float = 26.0
    """Kilobytes of a second of audio in the store (measured: FLAC, 16 kHz)."""
    network: float = 50.0
    """GB/s of a node to the others, one way (one adapter of 400 Gbit/s)."""
    link: float | None = None
    """GB/s of a device to those of its node, one way, instead of the data sheet's."""
    store: float = 1.0
    """GB/s at which a node reads shards."""
    overhead: float = 1.5
    """GB of a GPU that the driver and its libraries take."""


CPU_MFU = 0.6
"""``mfu`` on a CPU unless it is given (docs/planning.md)."""


@dataclass(frozen=True)
class Place:
    """Devices of one kind on one or several nodes."""

    name: str
    device: Device
    devices: int
    """On each node."""
    nodes: int

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


def place(on: str | None, hardware: Hardware | None = None) -> Place:
    """Parses ``DEVICE[xDEVICES[xNODES]]``; None: this machine, as ``hardware`` uses it.

    Raises ``UserError`` for a device that is not known.
    """
    if on is None:
        hardware = hardware or Hardware()
        count = nodes(hardware)
        devices = world_size(hardware) // count
        if hardware.accelerator == "cpu" or not torch.cuda.is_available():
            return Place("cpu", _this_cpu(devices), devices, count)
        called = torch.cuda.get_device_name()
        here = device_called(called)
        if here is None:
            raise UserError(f"{called} is not known: say --on DEVICE, one of {', '.join(DEVICES)}")
        name = next(name for name, device in DEVICES.items() if device is here)
        gb = torch.cuda.get_device_properties(0).total_memory / 1e9
        return Place(name, replace(here, gb=gb), devices, count)
    names, times = "|".join([*DEVICES, "cpu"]), r"(?:x([1-9]\d*))?"
    found = re.fullmatch(f"({names}){times}{times}", on.lower())
    if found is None:
        raise UserError(
            f"--on {on}: say DEVICE, DEVICExDEVICES or DEVICExDEVICESxNODES, DEVICE one of "
            f"{', '.join(DEVICES)}, cpu"
        )
    name, devices, count = found[1], int(found[2] or 1), int(found[3] or 1)
    device = DEVICES[name] if name != "cpu" else _this_cpu(devices)
    return Place(name, device, devices, count)


def _this_cpu(processes: int) -> Device:
    """Returns the share of each of ``processes`` of this machine's CPU: TFLOP/s of a matrix product
    on torch's threads, in the type that ``hardware.precision=auto`` chooses here, and memory."""
    half = has_fast_bfloat16("cpu")
    a = torch.randn(768, 768).to(torch.bfloat16 if half else torch.float32)
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    tflops = 2 * 768**3 / statistics.median(seconds[2:]) / 1e12
    source = "measured here: a matrix product"
    return Device("cpu", tflops / processes, memory / processes, 10.0, source)


def assumptions(words: list[str], where: Place) -> tuple[Assumptions, set[str]]:
    """Parses ``NAME=VALUE`` words; returns the names that are given, too.

    Raises ``UserError`` naming the known names.
    """
    known = {f.name for f in fields(Assumptions)}
    given: dict[str, float] = {}
    for word in (w for text in words for w in text.split(",")):
        name, _, value = word.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            given[name] = 0.0
        if name not in known or not given[name] > 0:
            raise UserError(
                f"--assume {word}: say NAME=VALUE with a positive number and one of "
                f"{', '.join(sorted(known))}"
            )
    usual = {"mfu": CPU_MFU, "overhead": 0.4} if where.is_cpu else {}
    return Assumptions(**{**usual, **given}), set(given)


def on_place(config: Pretrain, where: Place) -> Pretrain:
    """Returns ``config`` with the hardware of ``where``, and the batch that follows from it.

    Raises ``UserError`` for float32 on a GPU, whose peak is not in the table.
    """
    hardware = config.hardware
    precision, strategy = hardware.precision, hardware.strategy
    if precision == "auto" or (hardware.accelerator == "cpu" and not where.is_cpu):
        half = not where.is_cpu or has_fast_bfloat16("cpu")
        precision = "bf16-mixed" if half else "32-true"
    if precision == "32-true" and not where.is_cpu:
        raise UserError(
            f"hardware.precision=32-true on {where.name}: only peaks in bfloat16 are known; say "
            "hardware.precision=bf16-mixed"
        )
    if strategy == "auto":
        strategy = "ddp"
    changed: Hardware = replace(
        hardware,
        accelerator="cpu" if where.is_cpu else "gpu",
        devices=str(where.devices),
        num_nodes=where.nodes,
        precision=precision,
        strategy=strategy,
    )
    return with_batch(replace(config, hardware=changed))


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    trained: int
    frozen: int
    """The teacher's, buffers included."""
    largest: int
    """Parameters of the largest unit that FSDP gathers."""


def sizes(config: Pretrain) -> Sizes:
    """Counts parameters on the meta device."""
    with torch.device("meta"):
        objective = build_objective(config)

    def count(module: torch.nn.Module, trained: bool) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad == trained)

    buffers = sum(b.numel() for b in objective.buffers())
    units = [count(unit, True) + count(unit, False) for unit in objective.units()]
    return Sizes(count(objective, True), count(objective, False) + buffers, max(units, default=0))


def activations(config: Pretrain, size: Sizes, step: StepCount) -> tuple[float, float]:
    """Returns the bytes that a clip adds to a step, and those of the weights' bfloat16 copies."""
    casts = 2.0 * size.trained if config.hardware.precision == "bf16-mixed" else 0.0
    return step.bytes - casts, casts


def memory(
    config: Pretrain, where: Place, strategy: str, size: Sizes, step: StepCount, overhead: float
) -> dict[str, float]:
    """Returns the bytes of one device by part."""
    split = {"ddp": 1, "fsdp": where.devices * where.nodes, "hsdp": where.devices}[strategy]
    whole = config.train.accumulate > 1 or split == 1  # gradients are summed before they are sent
    a_clip, casts = activations(config, size, step)
    return {
        "weights": 4 * size.trained / split,
        "gradients": 4 * size.trained / (1 if whole else split),
        "optimiser": 8 * size.trained / split,
        "teacher": 4 * size.frozen / split,
        "units gathered": 0 if split == 1 else 3 * 4 * size.largest,  # this, the next, a gradient
        "activations": a_clip * config.data.batch + casts,
        "driver": overhead * 1e9,
    }


def network_seconds(
    config: Pretrain, where: Place, strategy: str, size: Sizes, link: float, network: float
) -> float:
    """Returns the seconds of a step that the slower link of a ring is busy."""
    gradients, times = 4 * size.trained, config.train.accumulate
    gathered = 4 * (2 * size.trained + size.frozen) * times  # forward, backward; the teacher once

    def ring(n: int, among: int, scattered: float) -> float:
        """``scattered``: bytes gathered or scattered among ``among``, once."""
        return scattered * (among - 1) / among * (n > 1)

    devices, nodes = where.devices, where.nodes
    world = devices * nodes
    if strategy == "ddp":
        inside = between = ring(world, world, 2 * gradients)
    elif strategy == "fsdp":
        inside = between = ring(world, world, gathered + gradients)
    else:
        inside = ring(devices, devices, gathered + gradients)
        between = ring(nodes, nodes, 2 * gradients)
    return max(inside / (link * 1e9), (between if nodes > 1 else 0) / (network * 1e9))


def plan(config: Pretrain, on: str | None = None, assume: list[str] | None = None) -> str:
    """Returns the estimate as text.

    Raises:
        UserError: a device or a name that is not known, a batch that does not divide.
    """
    where = place(on, config.hardware)
    assumed, given = assumptions(assume or [], where)
    config = on_place(config, where)
    hardware, device = config.hardware, where.device
    size = sizes(config)
    two = count_step(config, clips=2, recompute=hardware.activation_checkpointing)
    _, casts = activations(config, size, two)  # held once, whatever the batch
    step = StepCount(two.flop // 2, int((two.bytes + casts) / 2))
    world, clips = where.devices * where.nodes, config.data.batch * config.train.accumulate
    every, seconds = clips * world, config.data.clip_seconds

    def source(name: str, otherwise: str = "assumed") -> str:
        return "given" if name in given else otherwise

    peak, link = assumed.tflops or device.tflops, assumed.link or device.link
    loaders = config.data.workers * world
    rate = (loaders or world) * assumed.loader / seconds  # clips a second
    size_mb = assumed.clip_kb * seconds / 1e3
    times = {
        "compute": step.flop * clips / (peak * assumed.mfu * 1e12),
        "network": network_seconds(config, where, hardware.strategy, size, link, assumed.network),
        "loader": every / rate,
        "store": every * size_mb / (assumed.store * 1e3 * where.nodes),
    }
    bound = max(times, key=lambda name: times[name])
    total = times[bound]
    if not loaders:
        total = times["compute"] + times["loader"]
    hours = config.train.steps * total / 3600
    sheet = source("tflops", device.source)
    means = {
        "compute": f"{step.flop * every / 1e12:.3g} TFLOP (counted) / ({world} x {peak:.3g} TFLOP/s"
        f" ({sheet}) x MFU {assumed.mfu:.2g} ({source('mfu')}))",
        "network": f"{hardware.strategy}, {link:g} GB/s within a node "
        f"({source('link', 'assumed' if where.is_cpu else device.source)}), "
        f"{assumed.network:g} between ({source('network')})",
        "loader": f"{loaders or 'no'} loader processes (given) at {assumed.loader:g} s of audio a "
        f"second ({source('loader', 'measured, docs/benchmarks.md')})",
        "store": f"{size_mb:.3g} MB a clip ({source('clip_kb', 'measured: FLAC')}), "
        f"{assumed.store:g} GB/s a node ({source('store')})",
    }
    lines = [
        f"plan      recipe {config.recipe} on {world} x {where.name} ({where.nodes} node"
        f"{'s' * (where.nodes > 1)}), {hardware.precision}, {hardware.strategy}",
        f"model     {size.trained / 1e6:.1f} M trained, {size.frozen / 1e6:.1f} M other numbers "
        "(counted)",
        f"step      {every} clips: {config.data.batch} x {config.train.accumulate} micro-batches x "
        f"{world} devices, {step.flop / 1e12:.4g} TFLOP a clip (counted"
        f"{', blocks recomputed' * hardware.activation_checkpointing})",
        *(f"  {name:<8}{spent:9.4f} s   {means[name]}" for name, spent in times.items()),
        f"bound by  {bound}: {_short(1 / total)} steps/s, {_short(every / total)} clips/s",
        f"cost      {config.train.steps} steps in {_short(hours)} h, {_short(hours * world)} "
        f"{'CPU' if where.is_cpu else 'GPU'}-hours",
        f"loader    {_short(every / total * seconds / assumed.loader)} cores needed in all; "
        f"store {_short(every / total * size_mb)} MB/s",
        *_memory_lines(config, where, size, step, assumed.overhead),
    ]
    return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _memory_lines(
    config: Pretrain, where: Place, size: Sizes, step: StepCount, overhead: float
) -> list[str]:
    """Returns the table of memory by part and strategy."""
    world = where.devices * where.nodes
    ways = STRATEGIES[: 3 if where.nodes > 1 else 2 if world > 1 else 1]
    tables: dict[str, dict[str, float]] = {
        way: memory(config, where, way, size, step, overhead) for way in ways
    }
    marks = [f"{way}{' *' * (way == config.hardware.strategy)}" for way in ways]
    lines = [
        f"memory    GB a device (of {where.device.gb:.0f})  " + "".join(f"{m:>10}" for m in marks)
    ]
    notes: dict[str, Any] = {
        "activations": "counted",
        "units gathered": "assumed",
        "driver": "assumed",
    }
    for part in tables[ways[0]]:
        row = "".join(f"{tables[way][part] / 1e9:10.2f}" for way in ways)
        lines.append(f"  {part:<30}{row}   {notes.get(part, 'counted')}")
    totals = [sum(tables[way].values()) for way in ways]
    lines.append(f"  {'total':<30}" + "".join(f"{total / 1e9:10.2f}" for total in totals))
    fixed = [t - tables[way]["activations"] for t, way in zip(totals, ways, strict=True)]
    a_clip, casts = activations(config, size, step)
    free = [where.device.gb * 1e9 - held - casts for held in fixed]
    most = [max(0, int(left / a_clip)) for left in free]
    lines.append(f"  {'largest micro-batch':<30}" + "".join(f"{n:10d}" for n in most))
    return lines
