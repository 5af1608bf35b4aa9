"""A pickle machine that only makes records; how tensors and arrays are made from them.

Written here instead of ``pickle.Unpickler``: nothing that a file names is imported or called,
nothing is hashed, and every opcode is counted, so that time and memory are in proportion to the
pickle. A ``Record`` is what a pickle would have called: the name, what it was called with, what
was set on it. ``tensor_of``, ``array_of`` and ``scalar_of`` hold every number of a record to the
bytes that are there before they make something of them.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

MAX_PICKLE_BYTES = 1 << 26
MAX_OPCODES = 1 << 20
MAX_ARGS = 64
"""Of one call. Arguments are copied, and many calls can share them."""
MAX_NAME = 200
MAX_VIEW_ELEMENTS = 1 << 24
"""A tensor may repeat (stride 0) the elements of a smaller storage up to so many."""
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_DICT": "builtins.dict", "EMPTY_SET": "builtins.set"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_CALLS = {"REDUCE", "NEWOBJ"}


class Refused(ValueError):  # noqa: N818
    """A weight file that is not read; the message says why."""


@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """A class or function that a pickle names, ``module.name``."""

    path: str


@dataclass(eq=False, slots=True)
class Record:
    """A call of ``path``, or a dictionary or set: ``items`` are pairs, (None, x) of a set."""

    path: str
    args: tuple[Any, ...] = ()
    items: list[tuple[Any, Any]] = field(default_factory=list)
    state: Any = None


class _Bounded:
    """Reads no more than ``MAX_PICKLE_BYTES``, and nothing past the end of the pickle."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.left = file, MAX_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        return self._take(self.file.read(min(size, self.left + 1)))

    def readline(self) -> bytes:
        return self._take(self.file.readline(self.left + 1))

    def _take(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise Refused(f"its pickle is larger than {MAX_PICKLE_BYTES} bytes")
        return data


def unpickle(
    file: BinaryIO, *, known: Callable[[str, str], Name], stored: Callable[[Any], Record]
) -> Any:
    """The pickle that begins here, as values, lists, tuples, ``Name`` and ``Record``.

    ``known(module, name)`` gives the name or refuses it; ``stored(what is said)`` a storage.
    Raises ``Refused``, or whatever a damaged pickle leads to (``ValueError``, ``IndexError``, ...).
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def taken(at: int) -> list[Any]:
        items = stack[at:]
        del stack[at:]
        return items

    def add(items: list[tuple[Any, Any]]) -> None:
        if not isinstance(stack[-1], Record):
            raise Refused("it is damaged: it fills something else than a container")
        stack[-1].items.extend(items)

    source: Any = _Bounded(file)
    for count, (opcode, value, _) in enumerate(pickletools.genops(source)):
        if count > MAX_OPCODES:
            raise Refused(f"its pickle has more than {MAX_OPCODES} opcodes")
        match opcode.name:
            case op if op in _VALUES:
                stack.append(value)
            case op if op in _PUTS:
                memo[value] = stack[-1]
            case op if op in _GETS:
                stack.append(memo[value])
            case op if op in _CONSTANTS:
                stack.append(_CONSTANTS[op])
            case op if op in _TUPLES:
                stack.append(tuple(taken(len(stack) - _TUPLES[op])))
            case op if op in _EMPTY:
                stack.append(Record(_EMPTY[op]))
            case op if op in _CALLS:
                function, args = taken(len(stack) - 2)
                if not isinstance(function, Name) or type(args) is not tuple:
                    raise Refused("it is damaged: it calls something that has no name")
                if len(args) > MAX_ARGS:
                    raise Refused(f"it calls {function.path} with more than {MAX_ARGS} arguments")
                stack.append(Record(function.path, args))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(taken(marks.pop())))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(taken(marks.pop()))
            case "DICT":
                items = taken(marks.pop())
                pairs = list(zip(items[::2], items[1::2], strict=True))
                stack.append(Record("builtins.dict", items=pairs))
            case "FROZENSET":
                stack.append(Record("builtins.frozenset", (taken(marks.pop()),)))
            case "SETITEM":
                pair = taken(len(stack) - 2)
                add([(pair[0], pair[1])])
            case "SETITEMS":
                items = taken(marks.pop())
                add(list(zip(items[::2], items[1::2], strict=True)))
            case "APPEND" | "APPENDS" | "ADDITEMS" as op:
                items = taken(len(stack) - 1 if op == "APPEND" else marks.pop())
                if type(stack[-1]) is list:
                    stack[-1].extend(items)
                else:
                    add([(None, item) for item in items])
            case "BUILD":
                state = stack.pop()
                add([])
                stack[-1].state = state
            case "GLOBAL":
                stack.append(_name(str(value).split(" ", 1), known))
            case "STACK_GLOBAL":
                stack.append(_name(taken(len(stack) - 2), known))
            case "BINPERSID":
                stack.append(stored(stack.pop()))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "DUP":
                stack.append(stack[-1])
            case "POP" if not (marks and marks[-1] == len(stack)):
                stack.pop()
            case "POP":
                marks.pop()
            case "POP_MARK":
                taken(marks.pop())
            case "PROTO" | "FRAME" | "STOP":
                pass
            case op:
                raise Refused(f"its pickle has the opcode {op}")
    return stack.pop()


def _name(told: list[Any], known: Callable[[str, str], Name]) -> Name:
    module, name = told
    if not (isinstance(module, str) and isinstance(name, str)):
        raise Refused("it is damaged: it names something by what is no text")
    if len(module) + len(name) > MAX_NAME:
        raise Refused(f"it asks for {module[:40]!r}..., a name of more than {MAX_NAME} characters")
    return known(module, name)


def said(value: Any) -> str:
    """A value of a file for a message. Containers and long numbers are not written out."""
    if isinstance(value, str):
        return repr(value[:40])
    return repr(value) if isinstance(value, int) and abs(value) < 1 << 64 else type(value).__name__


def whole(value: Any, what: str) -> int:
    """A count from a file."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise Refused(f"it is damaged: {what} of {said(value)}")
    return value


def counts(values: Any, what: str) -> tuple[int, ...]:
    """Counts from a file, one an axis."""
    if not isinstance(values, (tuple, list)) or len(values) > 64:
        raise Refused(f"it is damaged: {what} of {said(values)}")
    return tuple(whole(value, what) for value in values)


def storage_of(data: bytearray, kind: str, count: int) -> Tensor:
    """The ``count`` elements that ``data`` holds, in its memory: (count,)."""
    dtype = STORAGES[kind]
    if len(data) != whole(count, "a storage") * dtype.itemsize:
        raise Refused(f"it is damaged: {len(data)} bytes for {count} elements of a {kind}")
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def tensor_of(args: list[Any]) -> Tensor:
    """The tensor of ``(storage, offset, size, stride, requires_grad, hooks, metadata)``.

    It shares the storage's memory.
    """
    if any(args[6:]):
        raise Refused("it holds a tensor with metadata, a conjugate or negative view")
    storage, offset, size, stride = (*args, None, None, None, None)[:4]
    size, stride = counts(size, "a size"), counts(stride, "a stride")
    if not isinstance(storage, Tensor) or len(size) != len(stride):
        raise Refused("it is damaged: a tensor without a storage or strides")
    last = whole(offset, "an offset") + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    elements = math.prod(size)
    if elements and (last >= len(storage) or elements > max(len(storage), MAX_VIEW_ELEMENTS)):
        raise Refused(f"it is damaged: a tensor of {size} over {len(storage)} elements")
    return storage.as_strided(size, stride, offset if elements else 0)


def dtype_of(args: list[Any], state: Any) -> np.dtype[Any]:
    """The numpy type that ``numpy.dtype(*args)`` with this state was."""
    code = args[0] if args else None
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
    if (
        not isinstance(code, str)
        or not re.fullmatch(r"[biufcSU]\d{1,9}", code)
        or (order not in ("<", ">", "=", "|"))
    ):
        raise Refused(f"it holds numpy values of type {said(code)}, not numbers or text")
    return np.dtype(code if order in ("=", "|") else f"{order}{code}")


def bytes_of(data: Any) -> bytes:
    """The bytes that were written as bytes, or as text by Python 2 and by protocols up to 2."""
    if isinstance(data, str):
        data = data.encode("latin1")
    if not isinstance(data, (bytes, bytearray)):
        raise Refused(f"it is damaged: bytes in a {type(data).__name__}")
    return bytes(data)


def scalar_of(dtype: Any, data: Any) -> Any:
    """A number or text of Python, from a numpy scalar."""
    return array_of((1, (), dtype, False, data)).item()


def array_of(state: Any) -> np.ndarray:
    """The array of ``(version, shape, dtype, column-major, bytes)``."""
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], np.dtype):
        raise Refused("it is damaged: a numpy array without content")
    shape, dtype, data = counts(state[1], "a shape"), state[2], bytes_of(state[4])
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise Refused(f"it is damaged: {len(data)} bytes for a numpy array of {shape}")
    flat = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if state[3] else "C").copy()
