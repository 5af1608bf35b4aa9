"""Files of PyTorch made byte by byte, as no ``torch.save`` would make them."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from bat import restricted

FORMATS = [True, False]  # zip, legacy
STACK_GLOBAL, REDUCE, BUILD, EMPTY_DICT = b"\x93", b"R", b"b", b"}"


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def saved(path: Path, held: Any, zipped: bool = True) -> Path:
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    return path


def with_pickle(path: Path, data: bytes, *, zipped: bool = True) -> Path:
    """A torch file around ``data`` as its pickle."""
    if zipped:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", data)
            file.writestr("archive/version", "3\n")
    else:
        about = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
        head = [restricted.MAGIC, restricted.PROTOCOL, about]
        parts = [pickle.dumps(x, protocol=2) for x in head]
        path.write_bytes(b"".join([*parts, data, pickle.dumps([], protocol=2)]))
    return path


class Calls:
    """Pickled as a call of ``function`` with ``args``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def rebuilt(offset: int, size: tuple[int, ...], stride: tuple[int, ...], count: int = 4) -> bytes:
    """A pickle of a tensor over a storage of ``count`` floats, with numbers of our choice."""

    from torch._utils import _rebuild_tensor_v2

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            said = ("storage", torch.FloatStorage, "0", "cpu", count)
            return said if isinstance(thing, Storage) else None

    out = io.BytesIO()
    pickler = Pickler(out, protocol=2)
    pickler.dump(Calls(_rebuild_tensor_v2, Storage(), offset, size, stride, False, {}))
    return out.getvalue()


def torch_file(path: Path, data: bytes, storage: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/data/0", storage)
    return path


def doubling(times: int = 60) -> bytes:
    """Tuples of twice the one before: 2^60 places for who hashes, prints or walks them all."""
    return b")" + b"2\x86" * times


def called(name: str, *args: bytes) -> bytes:
    module, _, name = name.rpartition(".")
    return text(module) + text(name) + STACK_GLOBAL + b"(" + b"".join(args) + b"t" + REDUCE


def storage(key: bytes, kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + text("storage") + kind + key + text("cpu") + b"K\x01tQ"
