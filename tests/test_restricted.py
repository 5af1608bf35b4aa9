"""Weight files of PyTorch: what is read of them, and what never runs."""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bat import checkpoint, restricted
from bat.restricted import Placeholder, Refused
from bat.shapes import UserError
from tests.torch_files import (
    BUILD,
    EMPTY_DICT,
    FORMATS,
    REDUCE,
    STACK_GLOBAL,
    Calls,
    opcodes,
    saved,
    text,
    with_pickle,
)


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
        "tally": collections.Counter("aab"),
        "raw": bytearray(b"\xff\x00"),
        "nothing": (b"", bytearray()),
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
    assert found["tally"] == {"a": 2, "b": 1}
    assert (found["raw"], found["nothing"]) == (bytearray(b"\xff\x00"), (b"", bytearray()))


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
    held |= {"ba": bytearray(b"\xff"), "n": [None, True, -5, 1 << 70, 0.25, "\u20ac"], "l": {}}
    held |= {"f": frozenset({"x"}), "c": collections.Counter("aab"), "t": (1, (2, 3, 4, 5))}
    held["again"] = held["n"]
    path = with_pickle(tmp_path / "w.pt", pickle.dumps(held, protocol=protocol))
    found = restricted.read(path)
    assert found["args"].name == "argparse.Namespace"
    assert found["args"].state == {"lr": 0.5}
    assert (found["x"], found["s"], found["b"]) == (0.5, {4}, b"\xff\x00")
    np.testing.assert_array_equal(found["a"], np.ones(3))
    for name in ("ba", "n", "l", "f", "c", "t"):
        assert found[name] == held[name], name
        assert type(found[name]) in (type(held[name]), dict), name
    assert found["again"] is found["n"]


def test_a_pickle_may_take_back_what_it_put(tmp_path: Path) -> None:
    """As pickles of tuples that contain themselves do."""
    data = opcodes(b"K\x07", b"(0", b"NN0", b"(NN1", b"2\x860N", b"0")
    assert pickle.loads(data) == 7
    assert restricted.read(with_pickle(tmp_path / "w.pt", data)) == 7


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


def test_only_names_are_called(tmp_path: Path) -> None:
    made = [text("argparse"), text("Namespace"), STACK_GLOBAL, b")", REDUCE]
    for call in (b")" + REDUCE, b")\x81", b"N" + REDUCE):
        with pytest.raises(Refused, match="calls something that has no name"):
            restricted.read(with_pickle(tmp_path / "w.pt", opcodes(*made, call)))
