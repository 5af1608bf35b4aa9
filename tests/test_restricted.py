"""Weight files that ``weights_only`` refuses: what is read of them, and what never runs."""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import os
import pickle
import struct
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bat import checkpoint, inert, restricted
from bat.inert import Record
from bat.restricted import Placeholder, Refused
from bat.shapes import UserError

FORMATS = [True, False]  # zip, legacy


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


@pytest.fixture
def absent_packages(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of fairseq with classes like theirs, to be removed once the file is written."""
    fairseq = types.ModuleType("fairseq.data.dictionary")

    class Dictionary:
        def __init__(self) -> None:
            self.symbols = ["<s>", "a"]

    class DictConfig:
        def __init__(self, content: dict[str, Any], parent: Any = None) -> None:
            self.content, self.parent = content, parent

    class Choice(str):
        def __reduce__(self) -> tuple[Any, ...]:
            return Choice, (str(self),)

    for made, module in ((Dictionary, fairseq), (DictConfig, fairseq), (Choice, fairseq)):
        made.__module__, made.__qualname__ = module.__name__, made.__name__
        setattr(module, made.__name__, made)
    for name in ("fairseq", "fairseq.data"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, fairseq.__name__, fairseq)
    return fairseq


@pytest.mark.parametrize("zipped", FORMATS)
def test_a_paper_era_file_gives_its_tensors_and_plain_settings(
    tmp_path: Path, zipped: bool, absent_packages: types.ModuleType
) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "half": torch.randn(3, 2).half(),
        "bf16": torch.randn(5).bfloat16(),
        "transposed": base.t(),
        "part": base[1:, 2:4],
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]),
        "repeated": torch.ones(1).expand(4, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    node = absent_packages.DictConfig({"lr": 0.1})
    node.content["child"] = absent_packages.DictConfig({"depth": 12}, node)  # names its parent
    numbers = np.arange(6, dtype=np.int16).reshape(2, 3)
    held = {
        "model": collections.OrderedDict(tensors),
        "args": argparse.Namespace(lr=0.5, betas=(0.9, 0.95), out=Path("runs/x")),
        "cfg": node,
        "task_state": {"dictionary": absent_packages.Dictionary()},
        "criterion": absent_packages.Choice("mse"),
        "loss": np.float64(1.25),
        "table": numbers,
        "fortran": np.asfortranarray(numbers),
        "counts": collections.defaultdict(int, {"a": 3}),
        "seen": {1, 2},
    }
    path = saved(tmp_path / "old.pt", held, zipped)
    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
        del sys.modules[name]
    found = checkpoint.read_tensors(path)
    assert "fairseq" not in sys.modules
    assert list(found["model"]) == list(tensors)
    for name, tensor in tensors.items():
        got = found["model"][name]
        assert got.dtype == tensor.dtype, name
        assert torch.equal(got, tensor), name
        assert not got.requires_grad
    assert found["model"]["part"].data_ptr() == found["model"]["transposed"].data_ptr() + 4 * 8
    assert found["args"].name == "argparse.Namespace"
    assert found["args"].state["lr"] == 0.5
    assert found["args"].state["betas"] == (0.9, 0.95)
    assert isinstance(found["args"].state["out"], Placeholder)
    child = found["cfg"].state["content"]["child"]
    assert child.state["content"] == {"depth": 12}
    assert child.state["parent"].state is None  # cut here
    assert found["task_state"]["dictionary"].state == {"symbols": ["<s>", "a"]}
    assert found["criterion"].name == "fairseq.data.dictionary.Choice"
    assert (found["loss"], type(found["loss"])) == (1.25, float)
    for name in ("table", "fortran"):
        assert found[name].dtype == np.int16
        np.testing.assert_array_equal(found[name], numbers)
    assert (found["counts"], found["seen"]) == ({"a": 3}, {1, 2})


@pytest.mark.parametrize("zipped", FORMATS)
def test_tensors_with_attributes_keep_their_values_apart(tmp_path: Path, zipped: bool) -> None:
    tensors = [torch.full((2,), float(i)) for i in range(64)]
    for tensor in tensors:
        tensor.note = argparse.Namespace()  # type: ignore[attr-defined]
    found = checkpoint.read_tensors(saved(tmp_path / "w.pt", dict(enumerate(tensors)), zipped))
    assert [found[i].tolist() for i in range(64)] == [[i, i] for i in range(64)]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    args = argparse.Namespace(lr=0.5)
    held = {"args": args, "x": np.float32(0.5), "a": np.ones(3), "s": {4}, "b": b"\xff\x00"}
    path = with_pickle(tmp_path / "w.pt", pickle.dumps(held, protocol=protocol))
    found = restricted.read(path)
    assert found["args"].name == "argparse.Namespace"
    assert found["args"].state == {"lr": 0.5}
    assert (found["x"], found["s"], found["b"]) == (0.5, {4}, b"\xff\x00")
    np.testing.assert_array_equal(found["a"], np.ones(3))


def test_an_encoder_of_a_fairseq_file_loads(golden: Path, tmp_path: Path) -> None:
    import bat

    state = torch.load(golden / "checkpoint_eat_tiny.pt", weights_only=True)["model"]
    held = {"args": argparse.Namespace(lr=np.float64(1)), "model": state}
    with pytest.raises(pickle.UnpicklingError):
        torch.load(saved(tmp_path / "eat.pt", held), weights_only=True)
    encoder = bat.load_encoder(tmp_path / "eat.pt", heads=4)
    wanted = bat.load_encoder(golden / "checkpoint_eat_tiny.pt", heads=4)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name


class Calls:
    """Pickled as a call of ``function`` with ``args``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def loads_in_torch(path: Path) -> Any:
    from torch.storage import _load_from_bytes  # runs torch.load without weights_only

    buffer = io.BytesIO()
    torch.save(Calls(os.system, f"touch {path}"), buffer)
    return Calls(_load_from_bytes, buffer.getvalue())


ATTACKS = {
    "os.system": (lambda p: Calls(os.system, f"touch {p}"), r"posix\.system"),
    "builtins.eval": (lambda p: Calls(builtins.eval, f"open({str(p)!r},'w')"), r"builtins\.eval"),
    "builtins.exec": (lambda p: Calls(builtins.exec, f"open({str(p)!r},'w')"), r"builtins\.exec"),
    "builtins.open": (lambda p: Calls(builtins.open, str(p), "w"), r"_?io\.open"),
    "getattr": (lambda p: Calls(getattr, "x", "upper"), r"builtins\.getattr"),
    "__import__": (lambda p: Calls(builtins.__import__, "antigravity"), "builtins.__import__"),
    "torch's own loader": (loads_in_torch, r"torch\.storage\._load_from_bytes"),
    "torch.load": (lambda p: Calls(torch.load, str(p)), r"torch\.serialization\.load"),
    "torch.hub": (lambda p: Calls(torch.hub.load, "a/b", "c"), r"torch\.hub\.load"),
    "np.load": (lambda p: Calls(np.load, str(p)), r"numpy\.load"),
    "partial": (lambda p: Calls(__import__("functools").partial, os.system), "functools.partial"),
}


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_file_that_would_run_something_is_refused_by_name(
    tmp_path: Path, name: str, zipped: bool
) -> None:
    attack, named = ATTACKS[name]
    trace = tmp_path / "owned"
    evil = {"args": argparse.Namespace(), "model": {}, "x": attack(trace)}
    path = saved(tmp_path / "evil.pt", evil, zipped)
    modules = set(sys.modules)
    with pytest.raises(UserError, match=rf"without running code.*asks for '{named}'"):
        checkpoint.read_tensors(path)
    assert not trace.exists()
    assert set(sys.modules) == modules


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


STACK_GLOBAL, REDUCE, BUILD, EMPTY_DICT = b"\x93", b"R", b"b", b"}"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("argparse", "_sys.modules"),
        ("argparse", "Namespace.__init__"),
        ("collections", "_sys"),
        ("torch", "serialization.os.system"),
        ("torch.serialization", "os.system"),
        ("argparse._os", "system.x"),
        ("builtins", "object.__subclasses__"),
        ("argparse_evil", "run"),
        ("torch", "__builtins__"),
        ("", "os"),
    ],
)
def test_names_with_dots_reach_nothing(tmp_path: Path, module: str, name: str) -> None:
    path = with_pickle(tmp_path / "w.pt", opcodes(text(module), text(name), STACK_GLOBAL))
    with pytest.raises(Refused, match="not among the harmless names"):
        restricted.read(path)


def test_names_of_the_field_are_never_imported(tmp_path: Path) -> None:
    """A folder called ``fairseq`` in the path of imports would run when imported."""
    trace = tmp_path / "owned"
    package = tmp_path / "fairseq"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(trace)!r}, 'w')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        call = [text("fairseq"), text("run"), STACK_GLOBAL, text(f"touch {trace}"), b"\x85", REDUCE]
        found = restricted.read(with_pickle(tmp_path / "w.pt", opcodes(*call)))
    finally:
        sys.path.remove(str(tmp_path))
    assert (found.name, found.state) == ("fairseq.run", None)
    assert not trace.exists()
    assert "fairseq" not in sys.modules


@pytest.mark.parametrize("slots", [False, True])
def test_a_pickle_cannot_change_what_it_can_name(tmp_path: Path, slots: bool) -> None:
    """BUILD sets attributes on anything, classes too."""
    call = [text("argparse"), text("Namespace"), STACK_GLOBAL]
    change = [EMPTY_DICT, text("path"), text("owned"), b"s"]
    state = [b"N", *change, b"\x86"] if slots else change
    path = with_pickle(tmp_path / "w.pt", opcodes(*call, *state, BUILD))
    with pytest.raises(Refused):
        restricted.read(path)
    assert inert.record_class("argparse.Namespace").path == "argparse.Namespace"
    with pytest.raises(Refused, match="would change"):
        setattr(inert.record_class("argparse.Namespace"), "path", "owned")  # noqa: B010
    with pytest.raises(Refused, match="would change"):
        Record.__setstate__ = None  # type: ignore[method-assign, assignment]


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


def test_a_tensor_is_held_to_the_bytes_that_are_there(tmp_path: Path) -> None:
    storage = struct.pack("<4f", 1, 2, 3, 4)
    good = restricted.read(torch_file(tmp_path / "w.pt", rebuilt(1, (3,), (1,)), storage))
    assert good.tolist() == [2, 3, 4]
    wrong = [
        (2, (3,), (1,), 4),  # beyond the end
        (0, (2, 2), (3, 1), 4),
        (-1, (1,), (1,), 4),
        (0, (2,), (-1,), 4),
        (0, (1 << 40,), (0,), 4),  # no bytes in the file, terabytes once it is copied
        (0, (2, 2), (1,), 4),
        (0, (4,), (1,), 5),  # a storage larger than its bytes
        (0, (4,), (1,), 3),
    ]
    for numbers in wrong:
        path = torch_file(tmp_path / "w.pt", rebuilt(*numbers), storage)
        with pytest.raises(Refused, match="damaged"):
            restricted.read(path)


def test_numpy_objects_are_refused(tmp_path: Path) -> None:
    held = {"args": argparse.Namespace(), "x": np.array([{}, None], dtype=object)}
    with pytest.raises(UserError, match="numpy values of type 'O8'"):
        checkpoint.read_tensors(saved(tmp_path / "w.pt", held))


def test_pickles_out_of_proportion_are_refused_before_they_are_read(tmp_path: Path) -> None:
    bomb = opcodes(b"N", b"r\xff\xff\xff\x7f")  # a memo of 2^31 places
    with pytest.raises(Refused, match="counts beyond its length"):
        restricted.read(with_pickle(tmp_path / "w.pt", bomb))
    with pytest.raises(Refused, match="opcode EXT1"):
        restricted.read(with_pickle(tmp_path / "w.pt", opcodes(b"\x82\x01")))
    deep = opcodes(b"]" * 5000 + b"a" * 4999)
    with pytest.raises(Refused, match="nested more than"):
        restricted.read(with_pickle(tmp_path / "w.pt", deep))
    itself = opcodes(b"]", b"\x94", b"h\x00", b"a")
    with pytest.raises(Refused, match="contains itself"):
        restricted.read(with_pickle(tmp_path / "w.pt", itself))


def test_doubling_lists_take_no_time(tmp_path: Path) -> None:
    """Forty lists of twice the one before: 2^40 places for who walks them all."""
    data = b"]" + b"".join(b"\x94h" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(40))
    found = restricted.read(with_pickle(tmp_path / "w.pt", opcodes(data)))
    assert found[0] is found[1]


@pytest.mark.parametrize("zipped", FORMATS)
def test_a_file_cut_anywhere_is_refused_with_a_reason(tmp_path: Path, zipped: bool) -> None:
    held = {"args": argparse.Namespace(a=1), "model": {"w": torch.randn(40)}}
    whole = saved(tmp_path / "whole.pt", held, zipped).read_bytes()
    for size in range(0, len(whole) - 1, 7):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.pt cannot be read without running code"):
            checkpoint.read_tensors(tmp_path / "cut.pt")


def test_archives_that_torch_would_unpack_or_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with tarfile.open(tmp_path / "w.pt", "w") as tar:
        tar.add(tmp_path / "x", "storages")
    with pytest.raises(UserError, match="is a tar"):
        checkpoint.read_tensors(tmp_path / "w.pt")
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(scripted, tmp_path / "script.pt")
    with pytest.raises(UserError, match="something else than torch"):
        checkpoint.read_tensors(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(UserError, match="compressed"):
        checkpoint.read_tensors(tmp_path / "bomb.pt")
