"""Weight files of PyTorch, read without running anything and within bounds.

``torch.load(weights_only=True)`` is not used: it has no bounds (a file of a few bytes can take all
time and memory), and it refuses the field's older files, which hold ``argparse.Namespace``,
omegaconf, fairseq or numpy objects beside the tensors (SPEC section 7). Harmless here, since:

1. Nothing is imported because a file says so: a short list of names is known, and the packages
   ``FIELD``, whose objects become placeholders. Any other name ends the reading.
2. Unpickling makes records that do nothing (``bat.inert``), neither tensors nor arrays. Those are
   made afterwards, from numbers that were held to the bytes that are there.
3. Opcodes, bytes, depth and what is copied are bounded; only text and short numbers are hashed.

Read are torch's zip format and the older one. TorchScript, tars and compressed zips are refused.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from bat.inert import (
    STORAGES,
    Name,
    Record,
    Refused,
    array_of,
    bytes_of,
    dtype_of,
    said,
    scalar_of,
    storage_of,
    tensor_of,
    unpickle,
    whole,
)

MAX_DEPTH = 100
MAX_COPIED = 1 << 28
"""Bytes of text, arrays and lists that a file may have copied; an entry of a list counts 64."""
MAX_KEY = 1 << 60
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
FIELD = ("argparse", "omegaconf", "fairseq")
"""Packages whose objects lie in the field's files. None of them is imported."""
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
TYPED = "torch._tensor._rebuild_from_type_v2"
DICTS = tuple(f"collections.{name}" for name in ("OrderedDict", "defaultdict", "Counter"))
DICTS += ("builtins.dict",)
LISTS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
SIMPLE = {str, bytes, bytearray, bool, int, float, complex}
TEXTS, CONTENTS = (str, bytes, bytearray), (list, tuple, dict, set, frozenset)
ENCODED = {"_codecs.encode": bytes, "builtins.bytes": bytes, "builtins.bytearray": bytearray}
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
BUFFERS = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
KNOWN = {
    *(*TENSORS, *PARAMETERS, TYPED, *DICTS, *SCALARS, *ARRAYS, *BUFFERS),
    *("numpy.dtype", "numpy.ndarray", "pathlib.Path", "pathlib.PosixPath"),
    *(f"builtins.{name}" for name in (*LISTS, "object", "int", "float", "bool", "str", "complex")),
    *(*ENCODED, "copyreg._reconstructor", "typing.Any", "torch.Size"),
    *("torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "torch._utils._get_layout"),
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
    state: Any = field(default=None, repr=False)
    """Its attributes, where the file gives them: plain values and placeholders."""


def read(path: Path) -> Any:
    """What a PyTorch file holds: tensors, arrays, plain containers and values, placeholders.

    Keys other than text and short numbers become placeholders.

    Raises:
        Refused: a name that is not on the list, or a file that is damaged or of another kind.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            start = file.read(512)
            file.seek(0)
            if start[257:262] == b"ustar":
                raise Refused("it is a tar, as torch wrote before 0.2")
            return _read_zip(file) if start[:4] == b"PK\x03\x04" else _read_legacy(file)
        except (Refused, OSError):
            raise
        except Exception as error:  # a damaged file can lead to any
            raise Refused(f"it is damaged ({type(error).__name__}: {error!s:.200})") from error


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as packed:
        held = {entry.filename: entry for entry in packed.infolist()}
    if sum(entry.file_size for entry in held.values()) > file.seek(0, io.SEEK_END):
        raise Refused("its parts are compressed or overlap")
    found = [name for name in held if name.endswith("/data.pkl") and name.count("/") == 1]
    root = found[0].removesuffix("data.pkl") if len(found) == 1 else None
    if root is None or f"{root}constants.pkl" in held:
        raise Refused("it is a zip of something else than torch.save makes")

    def content(name: str) -> bytearray:
        entry = held.get(f"{root}{name}")
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"its {name[:40]} is missing or compressed")
        file.seek(entry.header_offset)
        signature, name_size, extra_size = struct.unpack("<4s22xHH", file.read(30))
        if signature != b"PK\x03\x04" or entry.flag_bits & 1:
            raise Refused("it is damaged or encrypted")
        file.seek(name_size + extra_size, io.SEEK_CUR)
        return _exactly(file, entry.file_size)

    if f"{root}byteorder" in held:
        _check_order(content("byteorder").decode("ascii", "replace"))
    records, _ = _unpickle(io.BytesIO(content("data.pkl")))
    return _Settling(lambda key: content(f"data/{key}")).settle(records)


def _read_legacy(file: BinaryIO) -> Any:
    if [_plain(file), _plain(file)] != [MAGIC, PROTOCOL]:
        raise Refused("it is not a file that torch.save made")
    _check_order("little" if _plain(file).get("little_endian", True) is True else "big")
    records, storages = _unpickle(file)
    held: dict[str, bytearray] = {}
    for key in _plain(file):
        kind, count = storages[_key_of(key)]
        if int.from_bytes(file.read(8), "little") != count:
            raise Refused("it is damaged: a tensor has another size than it says")
        held[_key_of(key)] = _exactly(file, count * STORAGES[kind].itemsize)
    return _Settling(held.__getitem__).settle(records)


def _exactly(file: BinaryIO, size: int) -> bytearray:
    at = file.tell()
    left = file.seek(0, io.SEEK_END) - at
    file.seek(at)
    data = bytearray(min(size, left))
    if file.readinto(data) != size:  # type: ignore[attr-defined]
        raise Refused("it is damaged: it breaks off")
    return data


def _check_order(order: str) -> None:
    if order != sys.byteorder or order != "little":
        raise Refused(f"it was written on a machine of {order[:40]} byte order")


def _plain(file: BinaryIO) -> Any:
    """The pickle that begins here, without storages."""
    return _Settling(dict[str, bytearray]().__getitem__).settle(_unpickle(file)[0])


def _unpickle(file: BinaryIO) -> tuple[Any, dict[str, tuple[str, int]]]:
    """Records, plain containers and values; and (kind, elements) of each storage, by its key."""
    storages: dict[str, tuple[str, int]] = {}

    def stored(told: Any) -> Record:
        if not isinstance(told, tuple) or len(told) not in (5, 6) or told[0] != "storage":
            raise Refused("it refers to something else than the storage of a tensor")
        if told[5:] not in ((), (None,)):
            raise Refused("it holds views of storages, as torch wrote before 1.0")
        kind, key, count = told[1], _key_of(told[2]), whole(told[4], "a storage")
        name = kind.path.rpartition(".")[2] if isinstance(kind, Name) else said(kind)
        if name not in STORAGES or storages.setdefault(key, (name, count)) != (name, count):
            raise Refused(f"it is damaged: a storage that is a {name}")
        return Record(_STORAGE, (name, key, count))

    return unpickle(file, known=_known, stored=stored), storages


def _known(module: str, name: str) -> Name:
    module = PYTHON_2.get(module, module)
    path = PYTHON_2_TYPES.get(f"{module}.{name}", f"{module}.{name}")
    if "." in name or not (path in KNOWN or module.split(".")[0] in FIELD):
        raise Refused(f"it asks for {path!r}, which is not among the harmless names")
    return Name(path)


def _key_of(told: Any) -> str:
    if type(told) not in (str, int):
        raise Refused(f"it is damaged: a storage called {said(told)}")
    return str(told)


class _Settling:
    """From records to tensors, arrays and plain values; each object once."""

    def __init__(self, storage: Callable[[str], bytearray]) -> None:
        self._storage = storage
        self._storages: dict[str, Tensor] = {}
        self._done: dict[int, Any] = {}
        self._open: set[int] = set()
        self._kept: list[Any] = []  # alive, so that no other object gets its id
        self._copied = 0

    def settle(self, found: Any, depth: int = 0) -> Any:
        if found is None or type(found) in SIMPLE:
            return found
        if depth > MAX_DEPTH:
            raise Refused(f"it is nested more than {MAX_DEPTH} deep")
        if id(found) in self._done:
            return self._done[id(found)]
        if id(found) in self._open:  # a node of omegaconf names its parent
            if isinstance(found, Record) and not found.path.startswith(
                ("builtins.", "collections.")
            ):
                return Placeholder(found.path)
            raise Refused("it holds a container that contains itself")
        self._kept.append(found)
        self._open.add(id(found))
        self._done[id(found)] = self._made(found, depth + 1)
        self._open.discard(id(found))
        return self._done[id(found)]

    def _made(self, found: Any, depth: int) -> Any:
        if isinstance(found, Record):
            return self._of_record(found, depth)
        if isinstance(found, Name):
            return Placeholder(found.path)
        assert isinstance(found, (list, tuple)), type(found)
        return type(found)([self.settle(x, depth) for x in found])

    def _of_record(self, found: Record, depth: int) -> Any:
        path, name = found.path, found.path.rpartition(".")[2]
        if path == _STORAGE:
            kind, key, count = found.args
            if key not in self._storages:
                self._storages[key] = storage_of(self._storage(key), kind, count)
            return self._storages[key]
        if path == TYPED:  # (function, type, its arguments, attributes)
            function, _, args, _ = found.args
            if not isinstance(function, Name) or function.path not in TENSORS + PARAMETERS:
                raise Refused("it holds a kind of tensor that is not known")
            return self.settle(Record(function.path, tuple(args[:8])), depth)
        args = [self.settle(x, depth) for x in found.args]
        items = [(self.settle(k, depth), self.settle(v, depth)) for k, v in found.items]
        state = self.settle(found.state, depth)
        self._copy(*args)
        first = args[0] if args else ()
        if path == "copyreg._reconstructor" and isinstance(first, Placeholder):
            return Placeholder(first.name, state)
        if path in DICTS:
            given = args[-1] if args and isinstance(args[-1], CONTENTS) else ()
            pairs = given.items() if isinstance(given, dict) else given
            return {_hashed(k): v for k, v in (*pairs, *items)}
        if path.startswith("builtins.") and name in LISTS and isinstance(first, CONTENTS):
            values = [*first, *(x for _, x in items)]
            return LISTS[name](map(_hashed, values) if "set" in name else values)
        if path in TENSORS:
            return tensor_of(args)
        if path in PARAMETERS and isinstance(first, Tensor):
            return first
        if path == "numpy.dtype":
            return dtype_of(args, state)
        if path in SCALARS and len(args) == 2 and isinstance(first, np.dtype):
            return scalar_of(first, args[1])
        if path in ARRAYS:
            self._copy(*(state if isinstance(state, tuple) and len(state) == 5 else ()))
            return array_of(state)
        if path in BUFFERS and len(args) == 4:  # (bytes, type, shape, order)
            return array_of((1, args[2], args[1], args[3] == "F", first))
        if path in ENCODED and args[1:] in ([], ["latin1"], ["latin-1"]):
            return ENCODED[path](bytes_of(first or b""))
        if path == "torch.Size" and isinstance(first, CONTENTS):
            return tuple(first)
        return Placeholder(path, state)

    def _copy(self, *values: Any) -> None:
        for x in values:
            if isinstance(x, (*TEXTS, *CONTENTS)):
                self._copied += len(x) * (1 if isinstance(x, TEXTS) else 64)
        if self._copied > MAX_COPIED:
            raise Refused(f"it would be copied beyond {MAX_COPIED} bytes")


def _hashed(value: Any) -> Any:
    """``value`` as a key whose hash takes no time and is not chosen by the file."""
    short = not isinstance(value, int) or abs(value) < MAX_KEY
    if value is None or (short and isinstance(value, (str, bytes, int, float, Placeholder))):
        return value
    return Placeholder(type(value).__name__, value)
