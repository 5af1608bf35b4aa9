"""Weight files that ``torch.load(weights_only=True)`` refuses, read without running anything.

Paper-era and fairseq files hold ``argparse.Namespace``, omegaconf, fairseq or numpy objects beside
the tensors (SPEC section 7). Three things make such a pickle harmless here:

1. Nothing is imported because a file says so: ``find_class`` knows a short list of names, and the
   packages ``FIELD``, whose objects become placeholders. Any other name ends the reading.
2. Unpickling makes records that do nothing (``bat.inert``), neither tensors nor arrays. Those are
   made afterwards, from numbers that were held to the bytes that are there.
3. The opcodes are looked through first: those that reach past ``find_class``, or that would
   allocate memory out of proportion, are refused.

Departure: torch's own reader is not lent an unpickler (``pickle_module``): it would keep
TorchScript, tar files, ``set_`` and hooks within a file's reach. Read here are torch's zip format
and the older one; what either holds in bytes is what is allocated.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from bat.inert import (
    STORAGES,
    Record,
    Refused,
    array_of,
    dtype_of,
    record_class,
    scalar_of,
    storage_of,
    tensor_of,
    whole,
)

MAX_PICKLE_BYTES = 1 << 28
MAX_DEPTH = 100
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
FIELD = ("argparse", "omegaconf", "fairseq")
"""Packages whose objects lie in the field's files. None of them is imported."""
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
TYPED = "torch._tensor._rebuild_from_type_v2"
DICTS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict")
LISTS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
BUFFERS = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
KNOWN = {
    *(*TENSORS, *PARAMETERS, TYPED, *DICTS, *SCALARS, *ARRAYS, *BUFFERS),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"builtins.{name}" for name in (*LISTS, "object", "int", "float", "bool", "str", "bytes")),
    *("builtins.complex", "_codecs.encode", "copyreg._reconstructor", "typing.Any", "torch.Size"),
    *("torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "torch._utils._get_layout"),
    *("pathlib.Path", "pathlib.PosixPath"),
    *(f"{module}.{name}" for module in ("torch", "torch.cuda") for name in STORAGES),
    *(str(dtype) for dtype in STORAGES.values()),
}
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
PYTHON_2_TYPES = {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}
_STORAGE = "(storage)"


@dataclass(frozen=True, eq=False)
class Placeholder:
    """An object of a class that was not imported."""

    name: str
    """``argparse.Namespace``, ..."""
    state: Any = None
    """Its attributes, where the file gives them: plain values and placeholders."""


def read(path: Path) -> Any:
    """What a PyTorch file holds: tensors, arrays, plain containers and values, placeholders.

    Raises:
        Refused: a name that is not on the list, or a file that is damaged or of another kind.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            start = file.read(4)
            file.seek(0)
            return _read_zip(file) if start == b"PK\x03\x04" else _read_legacy(file)
        except (Refused, OSError):
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise Refused(f"it is damaged ({type(error).__name__}: {error!s:.200})") from error


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as packed:
        held = {entry.filename: entry for entry in packed.infolist()}
        found = [name for name in held if name.endswith("/data.pkl") and name.count("/") == 1]
        root = found[0].removesuffix("data.pkl") if len(found) == 1 else None
        if root is None or f"{root}constants.pkl" in held:
            raise Refused("it is a zip of something else than torch.save makes")

        def content(name: str) -> bytes:
            entry = held.get(f"{root}{name}")
            if entry is None or entry.compress_type != zipfile.ZIP_STORED:
                raise Refused(f"its {name} is missing or compressed")
            return packed.read(entry)

        if f"{root}byteorder" in held:
            _check_order(content("byteorder").decode("ascii", "replace"))
        if held[found[0]].file_size > MAX_PICKLE_BYTES:
            raise Refused(f"its pickle is larger than {MAX_PICKLE_BYTES} bytes")
        records = _unpickle(content("data.pkl"))[0]
        return _Settling(lambda key: content(f"data/{key}")).settle(records)


def _read_legacy(file: BinaryIO) -> Any:
    if [_unpickle(_one_pickle(file))[0] for _ in range(2)] != [MAGIC, PROTOCOL]:
        raise Refused("it is not a file that torch.save made")
    about = _unpickle(_one_pickle(file))[0]
    _check_order("little" if about.get("little_endian", True) is True else "big")
    records, storages = _unpickle(_one_pickle(file))
    held: dict[str, bytes] = {}
    for key in _unpickle(_one_pickle(file))[0]:
        kind, count = storages[str(key)]
        if int.from_bytes(file.read(8), "little") != count:
            raise Refused("it is damaged: a tensor has another size than it says")
        held[str(key)] = _exactly(file, count * STORAGES[kind].itemsize)
    return _Settling(held.__getitem__).settle(records)


def _exactly(file: BinaryIO, size: int) -> bytes:
    at = file.tell()
    if file.seek(0, io.SEEK_END) - at < size:
        raise Refused("it is damaged: it breaks off")
    file.seek(at)
    return file.read(size)


def _check_order(order: str) -> None:
    if order != sys.byteorder or order != "little":
        raise Refused(f"it was written on a machine of {order} byte order")


def _one_pickle(file: BinaryIO) -> bytes:
    """The bytes of the pickle that begins here."""
    start = file.tell()
    for _, _, at in pickletools.genops(file):
        if (at or 0) - start > MAX_PICKLE_BYTES:
            raise Refused(f"its pickle is larger than {MAX_PICKLE_BYTES} bytes")
    size = file.tell() - start
    file.seek(start)
    return file.read(size)


def _unpickle(data: bytes) -> tuple[Any, dict[str, tuple[str, int]]]:
    """Records, plain containers and values; and (kind, elements) of each storage, by its key."""
    for count, (op, argument, _) in enumerate(pickletools.genops(data)):
        if op.name in ("EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"):
            raise Refused(f"its pickle has the opcode {op.name}")
        if op.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count + 256:
            raise Refused("it is damaged: its pickle counts beyond its length")
    unpickler = _Unpickler(io.BytesIO(data), encoding="latin1")
    return unpickler.load(), unpickler.storages


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self.storages: dict[str, tuple[str, int]] = {}

    def find_class(self, module: str, name: str) -> type[Record]:
        module = PYTHON_2.get(module, module)
        path = PYTHON_2_TYPES.get(f"{module}.{name}", f"{module}.{name}")
        in_field = module.split(".")[0] in FIELD
        if "." in name or not (path in KNOWN or in_field):
            raise Refused(f"it asks for {path[:200]!r}, which is not among the harmless names")
        return record_class(path)

    def persistent_load(self, said: Any) -> Record:
        if not isinstance(said, tuple) or len(said) not in (5, 6) or said[0] != "storage":
            raise Refused("it refers to something else than the storage of a tensor")
        if said[5:] not in ((), (None,)):
            raise Refused("it holds views of storages, as torch wrote before 1.0")
        kind, key, count = said[1], str(said[2]), whole(said[4], "a storage")
        name = kind.path.rpartition(".")[2] if isinstance(kind, type(Record)) else ""
        if name not in STORAGES or self.storages.setdefault(key, (name, count)) != (name, count):
            raise Refused(f"it is damaged: a storage that is a {name or said[1]!r:.40}")
        return record_class(_STORAGE)(name, key, count)


class _Settling:
    """From records to tensors, arrays and plain values; each object once."""

    def __init__(self, storage: Callable[[str], bytes]) -> None:
        self._storage = storage
        self._storages: dict[str, Tensor] = {}
        self._done: dict[int, Any] = {}
        self._open: set[int] = set()
        self._kept: list[Any] = []  # alive, so that no other object gets its id

    def settle(self, found: Any, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise Refused(f"it is nested more than {MAX_DEPTH} deep")
        if id(found) in self._done:
            return self._done[id(found)]
        if id(found) in self._open:  # a node of omegaconf names its parent
            if isinstance(found, Record):
                return Placeholder(found.path)
            raise Refused("it holds a container that contains itself")
        self._kept.append(found)
        self._open.add(id(found))
        made = self._made(found, depth + 1)
        self._open.discard(id(found))
        self._done[id(found)] = made
        return made

    def _made(self, found: Any, depth: int) -> Any:
        if isinstance(found, Record):
            return self._of_record(found, depth)
        if isinstance(found, type) and issubclass(found, Record):
            return Placeholder(found.path)
        if type(found) is dict:
            return {self.settle(k, depth): self.settle(v, depth) for k, v in found.items()}
        if type(found) in (list, tuple, set, frozenset):
            return type(found)([self.settle(x, depth) for x in found])
        if found is None or type(found) in (str, bytes, bytearray, bool, int, float, complex):
            return found
        raise Refused(f"it holds a {type(found).__name__}")

    def _of_record(self, found: Record, depth: int) -> Any:
        path, name = found.path, found.path.rpartition(".")[2]
        if path == _STORAGE:
            kind, key, count = found.args
            if key not in self._storages:
                self._storages[key] = storage_of(self._storage(key), kind, count)
            return self._storages[key]
        if path == TYPED:  # (function, type, its arguments, attributes)
            function, _, args, _ = found.args
            if not isinstance(function, type(Record)) or function.path not in TENSORS + PARAMETERS:
                raise Refused("it holds a kind of tensor that is not known")
            return self.settle(function(*args), depth)
        args = [self.settle(x, depth) for x in found.args]
        if path == "copyreg._reconstructor" and args and isinstance(args[0], Placeholder):
            return Placeholder(args[0].name, self.settle(found.state, depth))
        if path in DICTS:
            pairs = args[-1] if args and isinstance(args[-1], (dict, list, tuple)) else ()
            items = {self.settle(k, depth): self.settle(v, depth) for k, v in found.items}
            return dict(pairs) | items
        if path.startswith("builtins.") and name in LISTS:
            return LISTS[name](args[0] if args else ())
        if path in TENSORS:
            return tensor_of(args)
        if path in PARAMETERS and args and isinstance(args[0], Tensor):
            return args[0]
        if path == "numpy.dtype":
            return dtype_of(args, self.settle(found.state, depth))
        if path in SCALARS and len(args) == 2 and isinstance(args[0], np.dtype):
            return scalar_of(args[0], args[1])
        if path in ARRAYS:
            return array_of(self.settle(found.state, depth))
        if path in BUFFERS and len(args) == 4:  # (bytes, type, shape, order)
            return array_of((1, args[2], args[1], args[3] == "F", args[0]))
        if path == "_codecs.encode" and args[1:] == ["latin1"] and isinstance(args[0], str):
            return args[0].encode("latin1")
        if path == "torch.Size":
            return tuple(args[0]) if args else ()
        return Placeholder(path, self.settle(found.state, depth))
