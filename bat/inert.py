"""What ``bat.restricted`` unpickles into, and how tensors and arrays are made from it.

A ``Record`` stands for whatever a pickle names: the name, what it was called with, what was set on
it. It does nothing. The classes are closed: a pickle's BUILD opcode, which may set attributes on
anything within its reach, cannot change them. ``tensor_of``, ``array_of`` and ``scalar_of`` hold
every number of a record to the bytes that are there before they make something of them.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

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


class Refused(ValueError):  # noqa: N818
    """A weight file that is not read; the message says why."""


class _Closed(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise Refused(f"it would change {cls.__name__}.{name}")

    def __delattr__(cls, name: str) -> None:
        raise Refused(f"it would remove {cls.__name__}.{name}")


class Record(metaclass=_Closed):
    """One object of a pickle: its class or function ``path``, ``args``, ``state`` and ``items``."""

    __slots__ = ("args", "items", "state")
    path: ClassVar[str]
    args: tuple[Any, ...]
    items: list[tuple[Any, Any]]
    state: Any

    def __new__(cls, *args: Any, **keywords: Any) -> Record:
        made = super().__new__(cls)
        made.args, made.items, made.state = args, list(keywords.items()), None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append((len(self.items), value))

    add = append


@functools.lru_cache(maxsize=4096)
def record_class(path: str) -> type[Record]:
    """The class of records of ``module.name``."""
    made: Any = _Closed(path, (Record,), {"__slots__": (), "path": path})
    return cast("type[Record]", made)


def whole(value: Any, what: str) -> int:
    """A count from a file."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise Refused(f"it is damaged: {what} of {value!r:.40}")
    return value


def counts(values: Any, what: str) -> tuple[int, ...]:
    """Counts from a file, one an axis."""
    if not isinstance(values, (tuple, list)) or len(values) > 64:
        raise Refused(f"it is damaged: {what} of {values!r:.40}")
    return tuple(whole(value, what) for value in values)


def storage_of(data: bytes, kind: str, count: int) -> Tensor:
    """The ``count`` elements that ``data`` holds: (count,)."""
    dtype = STORAGES[kind]
    if len(data) != whole(count, "a storage") * dtype.itemsize:
        raise Refused(f"it is damaged: {len(data)} bytes for {count} elements of a {kind}")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def tensor_of(args: list[Any]) -> Tensor:
    """The tensor of ``(storage, offset, size, stride, ...)``; shares the storage's memory."""
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
        raise Refused(f"it holds numpy values of type {code!r:.40}, not numbers or text")
    return np.dtype(code if order in ("=", "|") else f"{order}{code}")


def _bytes_of(data: Any) -> bytes:
    if isinstance(data, str):  # written by Python 2
        data = data.encode("latin1")
    if not isinstance(data, (bytes, bytearray)):
        raise Refused(f"it is damaged: numpy values in a {type(data).__name__}")
    return bytes(data)


def scalar_of(dtype: Any, data: Any) -> Any:
    """A number or text of Python, from a numpy scalar."""
    return array_of((1, (), dtype, False, data)).item()


def array_of(state: Any) -> np.ndarray:
    """The array of ``(version, shape, dtype, column-major, bytes)``."""
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], np.dtype):
        raise Refused("it is damaged: a numpy array without content")
    shape, dtype, data = counts(state[1], "a shape"), state[2], _bytes_of(state[4])
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise Refused(f"it is damaged: {len(data)} bytes for a numpy array of {shape}")
    flat = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if state[3] else "C").copy()
