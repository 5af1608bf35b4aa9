"""Files of PyTorch made byte by byte, as no ``torch.save`` would make them."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

FORMATS = [True, False]  # zip, legacy


def saved(path: Path, held: Any, zipped: bool = True) -> Path:
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    return path


def with_pickle(path: Path, data: bytes) -> Path:
    """A torch file around ``data`` as its pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
    return path


class Calls:
    """Pickled as a call of ``function`` with ``args``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def rebuilt(offset: int, size: tuple[int, ...], stride: tuple[int, ...], count: int = 4) -> bytes:
    """A pickle of ``{"x": tensor}`` over a storage of ``count`` floats."""
    from torch._utils import _rebuild_tensor_v2

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            said = ("storage", torch.FloatStorage, "0", "cpu", count)
            return said if isinstance(thing, Storage) else None

    out = io.BytesIO()
    pickler = Pickler(out, protocol=2)
    pickler.dump({"x": Calls(_rebuild_tensor_v2, Storage(), offset, size, stride, False, {})})
    return out.getvalue()


def torch_file(path: Path, data: bytes, storage: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/data/0", storage)
        file.writestr("archive/version", "3\n")
    return path
