"""Writes and reads a checkpoint as a folder to which every process adds its part.

    step-00000004.ckpt/
        shard-00001-model-00001-of-00001.safetensors    tensors, or parts of them, a file a process
        rest.pt         all else: progress, settings, the names of the tensors in order
        parts.json      size and CRC-32 of every file, written last

``torch.distributed.checkpoint`` plans who writes which part (a tensor that several processes hold
is written once) and reads the parts that a process needs, whatever their number was. Its
safetensors storage is used, since its own keeps a pickle. Tensors are named ``state_dict/NAME`` and
``optimizer_states/OPTIMISER/PARAMETER/MOMENT``.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bat.io import replacing, write_json
from bat.train.processes import Ranks

REST, PARTS = "rest.pt", "parts.json"


def write_parts(checkpoint: Mapping[str, Any], folder: Path, ranks: Ranks) -> None:
    """Writes ``checkpoint`` to ``folder``, and the checksums of its files. **Every rank must call
    it**, with its own parts of the tensors (DTensors) and the same names; the rest is rank 0's.

    Raises ``OSError`` on every rank if any rank could not write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.api import CheckpointException

    tensors, rest = _split(checkpoint)

    def write_own() -> None:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=ranks.group())
        except CheckpointException as error:  # no subclass of Exception; the first says enough
            raise OSError(str(next(iter(error.failures.values()))[0])) from error
        if ranks.rank == 0:
            with replacing(folder / REST) as temporary:
                torch.save({**rest, "names": list(tensors)}, temporary)
        paths = [*folder.glob(f"shard-{ranks.rank + 1:05d}-*")]
        paths += [folder / REST] * (ranks.rank == 0)
        own.update({path.name: (path.stat().st_size, _crc(path)) for path in paths})

    def write_sums() -> None:
        if ranks.rank == 0:
            write_json(folder / PARTS, sums)

    own: dict[str, tuple[int, int]] = {}
    together(ranks, write_own)
    sums = {name: found for part in ranks.gather(own) for name, found in part.items()}
    together(ranks, write_sums)


def together(ranks: Ranks, do: Callable[[], None]) -> None:
    """Calls ``do`` on every rank and raises ``OSError`` on all if it failed on any."""
    failure = ""
    try:
        do()
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError on a full disk
        failure = str(error) or repr(error)
    if said := [text for text in ranks.gather(failure) if text]:
        raise OSError(said[0])


def read_parts(folder: Path, like: Callable[[str], Tensor | None] = lambda name: None) -> Any:
    """Returns the checkpoint in ``folder``: tensors of which ``like(name)`` is a DTensor of the
    same shape as its part of them, others whole. Each process reads for itself.

    Raises ``OSError`` for a file without its checksum, ``ValueError`` if tensors are missing.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    if damage := damaged_part(folder):
        raise OSError(damage)
    rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    names = rest.pop("names")
    reader = HuggingFaceStorageReader(str(folder))
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    if odd := sorted(set(names) ^ set(stored)):
        raise ValueError(f"{folder}: its files do not hold {odd[0]} and {len(odd) - 1} more")
    size = sum(found.size.numel() * found.properties.dtype.itemsize for found in stored.values())
    if size > sum(file.stat().st_size for file in folder.iterdir()):
        raise ValueError(f"{folder}: tensors of {size} bytes are more than its files hold")
    tensors = {}
    for name in names:
        part, found = like(name), stored[name]
        if part is not None and hasattr(part, "to_local") and part.shape == found.size:
            tensors[name] = torch.empty_like(part)
        else:
            tensors[name] = torch.empty(found.size, dtype=found.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return _join(tensors, rest)


def damaged_part(folder: Path, *, sizes_only: bool = False) -> str:
    """Returns what is wrong with the files of ``folder``; empty if nothing is."""
    try:
        for name, (size, crc) in json.loads((folder / PARTS).read_text()).items():
            path = folder / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if not sizes_only and _crc(path) != crc:
                return f"{name} does not have its checksum"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits into tensors by name, and the rest without them."""
    tensors = {f"state_dict/{name}": t for name, t in checkpoint["state_dict"].items()}
    for o, optimizer in enumerate(checkpoint["optimizer_states"]):
        for parameter, moments in optimizer["state"].items():
            for name, t in moments.items():
                tensors[f"optimizer_states/{o}/{parameter}/{name}"] = t
    assert all(isinstance(t, Tensor) for t in tensors.values()), "a state that is no tensor"
    rest = {
        **checkpoint,
        "state_dict": {},
        "optimizer_states": [{**state, "state": {}} for state in checkpoint["optimizer_states"]],
    }
    return tensors, rest


def _join(tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``_split``."""
    for path, tensor in tensors.items():
        kind, _, name = path.partition("/")
        if kind == "state_dict":
            rest[kind][name] = tensor
        else:
            o, parameter, moment = name.split("/")
            rest[kind][int(o)]["state"].setdefault(int(parameter), {})[moment] = tensor
    return rest
