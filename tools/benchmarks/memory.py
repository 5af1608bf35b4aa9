"""Peak of tensor memory during a call, above what lay there before it.

CUDA: ``max_memory_allocated``. CPU: exact, from the allocator's own events (the profiler's
``[memory]`` records: every tensor allocated or freed, summed in time order). Not resident memory,
which counts pages that the allocator keeps and misses reuse. Not counted: scratch that oneDNN, MKL
or cuDNN take for themselves.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import profile

MB = 1e6


def peak_mb(call: Callable[[], Any], device: torch.device | str) -> float:
    """MB (1e6 bytes) that ``call()`` needs at its worst moment beyond what was there; at least 0.

    ``call`` runs once. Tensors that it leaves alive count as its own; tensors from before that it
    frees make room.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before) / MB
    with profile(profile_memory=True) as profiled:
        call()
    results = profiled.kineto_results
    assert results is not None, "the profiler recorded nothing"
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    changes.sort(key=lambda change: change[0])  # stable: equal times keep their order
    return max([0, *accumulate(nbytes for _, nbytes in changes)]) / MB
