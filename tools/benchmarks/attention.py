"""Attention kernels at the shapes of a Base step: each ``model.attention`` against ``eager``.

Forward and backward (the teacher: forward alone) in bfloat16, on a CPU in float32; ``ours_ms`` is
the kernel, ``plain_ms`` is ``eager`` in turns with it, ``graph_ms`` the kernel replayed as a CUDA
graph. ``tflops`` counts ``4 m n d`` a head and query set, 3.5 times that with the backward pass.
``difference`` is relative, of the output, to the same inputs in float32 by ``eager``;
``device_kernel`` is the kernel in which the device spends most of a forward pass. A backend that
does not apply is a row that says why it was ``refused``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl, restore_flash_attention_impl

from bat.errors import UserError
from bat.nn.attention import Backend, attend, describe, facts_of
from benchmarks.timing import error_line, here, medians

ABOUT = "attention kernels, forward and backward; ratio = eager / this"
CALLS = 5
"""In a row for one measurement, so that the device does not wait for the host each time."""
GROUPS: tuple[tuple[Backend, ...], ...] = (("auto", "sdpa", "cudnn", "flash"), ("flash4",))
"""Timed in turns; flash-attn-4 takes the place of PyTorch's own while it is active."""


class Shape(NamedTuple):
    """(rows, heads, queries or keys, channels of a head)."""

    name: str
    rows: int
    queries: int
    keys: int
    backward: bool = True
    heads: int = 12
    channels: int = 64

    def flop(self) -> float:
        whole = 4 * self.rows * self.heads * self.queries * self.keys * self.channels
        return whole * (3.5 if self.backward else 1)


def shapes(clips: int, views: int = 16) -> list[Shape]:
    """Returns the shapes of a step of Base: 512 patches, 102 of them visible."""
    rows = clips * views
    return [
        Shape("student, visible tokens", rows, 103, 103),
        Shape("teacher, whole clips", clips, 513, 513, backward=False),
        Shape("decoder", rows, 512, 512),
        Shape("decoder, last block", rows, 410, 512),
        Shape("cross decoder", rows, 410, 103),
    ]


class Call:
    """One forward, and backward where the shape says so, of one backend on fixed inputs."""

    def __init__(self, shape: Shape, inputs: list[Tensor], backend: Backend) -> None:
        *self.inputs, self.up = inputs
        for x in self.inputs:
            x.requires_grad_(shape.backward)
        self.shape, self.backend = shape, backend

    def forward(self) -> Tensor:
        return attend(*self.inputs, self.backend)

    def __call__(self) -> None:
        out = self.forward()
        if self.shape.backward:
            torch.autograd.grad(out, self.inputs, self.up)


def graphed(call: Call) -> Callable[[], None]:
    """Records ``call`` as a CUDA graph; returns its replay."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def device_kernel(call: Call) -> str | None:
    """Returns the name of the kernel that takes the device longest; None without a GPU."""
    if not call.up.is_cuda:
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        call.forward()
        torch.cuda.synchronize()
    events = [e for e in profiled.key_averages() if e.self_device_time_total > 0]
    return max(events, key=lambda e: e.self_device_time_total).key[:90] if events else None


def compare(shape: Shape, *, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Yields a row for each backend of one shape."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    g = torch.Generator(device).manual_seed(0)
    lengths = (shape.queries, shape.keys, shape.keys, shape.queries)
    sizes = [(shape.rows, shape.heads, n, shape.channels) for n in lengths]
    inputs = [torch.randn(size, generator=g, device=device).to(dtype) for size in sizes]
    few = [x[:2].detach().float() for x in inputs]
    exact = attend(*few[:3], "eager")
    eager = Call(shape, inputs, "eager")
    for group in GROUPS:
        calls, rows, graphs = {}, {}, {}
        for name in group:
            case = {"case": f"{shape.name}, {name}"}
            call = Call(shape, inputs, name)
            try:
                got = call.forward().detach()[:2].float()
                call()
                rows[name] = case | {
                    "difference": float((got - exact).norm() / exact.norm()),
                    "kernel": describe(name, facts_of(device), dtype, shape.channels),
                    "device_kernel": device_kernel(call),
                }
                calls[name] = call
            except UserError as error:
                yield case | {"refused": str(error)}
            except Exception as error:  # the other backends still count
                yield case | {"error": error_line(error)}
        for name in calls if gpu else ():
            try:
                graphs[f"{name}, graph"] = graphed(calls[name])
            except Exception as error:
                rows[name]["note"] = f"no CUDA graph: {error_line(error)}"
        if calls:
            many = {
                name: lambda call=call: [call() for _ in range(CALLS)]
                for name, call in ({"eager": eager} | calls | graphs).items()
            }
            taken = medians(many, repeats=repeats, title=shape.name, device=device)
            for name in calls:
                seconds, plain = taken[name] / CALLS, taken["eager"] / CALLS
                graph = taken.get(f"{name}, graph")
                yield rows[name] | {
                    "ours_ms": 1e3 * seconds,
                    "plain_ms": 1e3 * plain,
                    "ratio": plain / seconds,
                    "graph_ms": 1e3 * graph / CALLS if graph else None,
                    "tflops": shape.flop() / seconds / 1e12,
                }
        if current_flash_attention_impl() is not None:
            restore_flash_attention_impl()


def run(*, repeats: int, quick: bool) -> Iterator[dict[str, Any]]:
    device = here()
    for shape in shapes(24 if device.type == "cuda" else 1):
        if quick:
            shape = shape._replace(rows=2, queries=9, keys=7, heads=2, channels=8)
        yield from compare(shape, device=device, repeats=repeats)
