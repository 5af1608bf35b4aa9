"""Weight files of PyTorch by strangers: what is read of them, what is refused, what never runs."""

from __future__ import annotations

import argparse
import builtins
import collections
import functools
import gzip
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

from bat import weights as checkpoint
from bat.errors import UserError
from tests.torch_files import FORMATS, Calls, rebuilt, saved, torch_file, with_pickle


@pytest.fixture
def absent_package(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
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

    for made in (Dictionary, DictConfig, Choice):
        made.__module__, made.__qualname__ = fairseq.__name__, made.__name__
        setattr(fairseq, made.__name__, made)
    for name in ("fairseq", "fairseq.data"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, fairseq.__name__, fairseq)
    return fairseq


@pytest.mark.parametrize("zipped", FORMATS)
def test_a_file_of_the_field_gives_its_tensors(
    tmp_path: Path, zipped: bool, absent_package: types.ModuleType
) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "half": torch.randn(3, 2).half(),
        "bf16": torch.randn(5).bfloat16(),
        "transposed": base.t(),
        "part": base[1:, 2:4],
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    node = absent_package.DictConfig({"lr": 0.1})
    node.content["child"] = absent_package.DictConfig({"depth": 12}, node)  # names its parent
    held = {
        "model": collections.OrderedDict(tensors),
        "args": argparse.Namespace(lr=0.5, betas=(0.9, 0.95), out=Path("runs/x")),
        "cfg": node,
        "task_state": {"dictionary": absent_package.Dictionary()},
        "criterion": absent_package.Choice("mse"),
        "loss": np.float64(1.25),
        "table": np.arange(6, dtype=np.int16).reshape(2, 3),
        "counts": collections.defaultdict(int, {"a": 3}),
        "seen": {1, 2},
        "step": 7,
    }
    path = saved(tmp_path / "old.pt", held, zipped)
    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
        del sys.modules[name]
    found = checkpoint.read_tensors(path)
    assert "fairseq" not in sys.modules
    assert list(found["model"]) == list(tensors)
    for name, tensor in tensors.items():
        assert found["model"][name].dtype == tensor.dtype, name
        assert torch.equal(found["model"][name], tensor), name
    assert (found["step"], found["seen"], found["counts"]) == (7, {1, 2}, {"a": 3})
    for name in ("args", "cfg", "criterion", "loss", "table"):  # empty: nothing was kept of them
        assert type(found[name]).__name__ == "_StandIn"
        assert not vars(found[name])


def test_stand_ins_are_forgotten_after_a_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", {"args": argparse.Namespace(lr=1)})
    checkpoint.read_tensors(path)
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
def test_unusual_pickle_protocols_are_refused_with_a_remedy(tmp_path: Path, protocol: int) -> None:
    torch.save({"x": [torch.ones(2), 1]}, tmp_path / "w.pt", pickle_protocol=protocol)
    with pytest.raises(UserError, match=r"torch\.save it again, with its usual pickle_protocol"):
        checkpoint.read_tensors(tmp_path / "w.pt")


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
    "partial": (lambda p: Calls(functools.partial, os.system), "functools.partial"),
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
    with pytest.raises(UserError, match=rf"without running code.*asks for .*{named}"):
        checkpoint.read_tensors(path)
    assert not trace.exists()
    assert set(sys.modules) == modules


def named(module: str, name: str, *call: bytes) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"".join(call) + b"."


def calling(path: Path, module: str, name: str, word: bytes) -> Path:
    """A file of ``{"x": module.name(word)}``."""
    text = b"X" + struct.pack("<I", len(word)) + word
    call = named(module, name, text + b"\x85R")[2:-1]
    return with_pickle(path, b"\x80\x02}X\x01\x00\x00\x00x" + call + b"s.")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "serialization.os.system"),
        ("torch.serialization", "os.system"),
        ("builtins", "object.__subclasses__"),
        ("argparse_evil", "run"),
        ("xargparse", "run"),
        ("torch", "__builtins__"),
        ("", "os"),
        ("os", "system"),
    ],
)
def test_names_that_look_alike_are_refused(tmp_path: Path, module: str, name: str) -> None:
    path = calling(tmp_path / "w.pt", module, name, b"touch x")
    with pytest.raises(UserError, match="cannot be read without running code"):
        checkpoint.read_tensors(path)


@pytest.mark.parametrize(
    ("module", "name"),
    [("argparse", "_sys.modules"), ("collections", "_sys"), ("fairseq", "run"), ("numpy", "load")],
)
def test_a_stand_in_does_nothing(tmp_path: Path, module: str, name: str) -> None:
    trace = tmp_path / "owned"
    path = calling(tmp_path / "w.pt", module, name, f"touch {trace}".encode())
    assert type(checkpoint.read_tensors(path)["x"]).__name__ == "_StandIn"
    assert not trace.exists()


def test_packages_of_the_field_are_never_imported(tmp_path: Path) -> None:
    """A folder called ``fairseq`` in the path of imports would run when imported."""
    trace, package = tmp_path / "owned", tmp_path / "fairseq"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(trace)!r}, 'w')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        data = b"\x80\x02}X\x01\x00\x00\x00xcfairseq\nrun\n)Rs."
        found = checkpoint.read_tensors(with_pickle(tmp_path / "w.pt", data))
    finally:
        sys.path.remove(str(tmp_path))
    assert type(found["x"]).__name__ == "_StandIn"
    assert not trace.exists()
    assert "fairseq" not in sys.modules


def test_a_pickle_cannot_change_what_it_can_name(tmp_path: Path) -> None:
    """BUILD sets attributes on anything, classes too; a stand-in keeps none."""
    state = b"}X\x04\x00\x00\x00pathX\x05\x00\x00\x00ownedsb"
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read_tensors(
            with_pickle(tmp_path / "w.pt", named("argparse", "Namespace", state))
        )
    assert not hasattr(argparse.Namespace, "path")
    assert not hasattr(checkpoint._StandIn, "path")


def test_a_tensor_is_held_to_the_bytes_that_are_there(tmp_path: Path) -> None:
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    good = checkpoint.read_tensors(torch_file(tmp_path / "w.pt", rebuilt(1, (3,), (1,)), numbers))
    assert good["x"].tolist() == [2, 3, 4]
    wrong = [
        (2, (3,), (1,), 4),  # beyond the end
        (0, (2, 2), (3, 1), 4),
        (-1, (1,), (1,), 4),
        (0, (2,), (-1,), 4),
        (0, (2, 2), (1,), 4),
        (0, (1 << 20,), (1,), 1 << 20),  # a storage larger than the file
        (0, (1 << 40,), (1,), 1 << 40),
    ]
    for case in wrong:
        path = torch_file(tmp_path / "w.pt", rebuilt(*case), numbers)
        with pytest.raises(UserError, match="cannot be read"):
            checkpoint.read_tensors(path)


def test_a_tensor_that_repeats_a_few_numbers_is_refused(tmp_path: Path) -> None:
    """No bytes in the file, terabytes once it is copied."""
    held = {"cls_token": torch.ones(1).expand(1, 1, 1 << 40), "pos_embed": torch.ones(1, 1, 4)}
    with pytest.raises(UserError, match="repeat a few numbers up to 4398046511120 bytes"):
        checkpoint.read_encoder(saved(tmp_path / "w.pt", held))
    views = {f"blocks.{i}.w": torch.ones(1 << 20)[:] for i in range(2)}
    base = torch.ones(1 << 16)
    views = {"cls_token": torch.ones(1), **{f"x{i}": base[:] for i in range(8)}}
    with pytest.raises(UserError, match="repeat a few numbers"):
        checkpoint.read_encoder(saved(tmp_path / "w.pt", views))


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 2).to_sparse(),
        torch.empty(2, device="meta"),
        [torch.ones(2)],
        np.ones(2),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    ],
)
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    held = {"cls_token": torch.ones(1, 1, 4), "blocks.0.odd": value}
    with pytest.raises(UserError, match=r"blocks\.0\.odd|cannot be read"):
        bat_load(saved(tmp_path / "w.pt", held))


def bat_load(path: Path) -> Any:
    import bat

    return bat.load_encoder(path)


@pytest.mark.parametrize("zipped", FORMATS)
def test_a_file_cut_anywhere_is_refused_with_a_reason(tmp_path: Path, zipped: bool) -> None:
    held = {"args": argparse.Namespace(a=1), "model": {"w": torch.randn(40)}}
    whole = saved(tmp_path / "whole.pt", held, zipped).read_bytes()
    for size in range(0, len(whole) - 1, 29):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.pt (cannot be read|is damaged)"):
            checkpoint.read_tensors(tmp_path / "cut.pt")


def test_a_flipped_bit_of_the_weights_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", {"w": torch.ones(1000), "v": torch.ones(10)})
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<f", 1.0) * 1000) + 402
    data[at] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["w"].sum() != 1000  # torch does not look
    with pytest.raises(UserError, match=r"w\.pt is damaged: .*data/0 does not have its checksum"):
        checkpoint.read_tensors(path)


def test_archives_that_torch_would_unpack_or_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with tarfile.open(tmp_path / "w.pt", "w") as tar:
        tar.add(tmp_path / "x", "storages")
    with pytest.raises(UserError, match="is a tar"):
        checkpoint.read_tensors(tmp_path / "w.pt")
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(scripted, tmp_path / "script.pt")
    with pytest.raises(UserError, match="is a TorchScript program"):
        checkpoint.read_tensors(tmp_path / "script.pt")


def test_a_file_gives_no_more_bytes_than_it_has(tmp_path: Path) -> None:
    """Zips that torch reads: packed again with compression; parts that lie over each other."""
    good = saved(tmp_path / "w.pt", {"x": torch.zeros(1 << 16), "y": torch.zeros(1 << 16)})
    for all_packed in (True, False):
        with zipfile.ZipFile(good) as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as file:
            for name in whole.namelist():
                packed = all_packed or name.endswith("data/1")
                kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
                file.writestr(zipfile.ZipInfo(name), whole.read(name), kind)
        with pytest.raises(UserError, match="compressed"):
            checkpoint.read_tensors(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "lap.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        file.writestr("archive/data/0", bytes(1 << 16))
        for i in range(1, 4):
            twin = zipfile.ZipInfo(f"archive/data/{i}")
            first = file.getinfo("archive/data/0")
            twin.file_size = twin.compress_size = first.file_size
            twin.header_offset, twin.CRC = first.header_offset, first.CRC
            file.filelist.append(twin)
    with pytest.raises(UserError, match="overlap"):
        checkpoint.read_tensors(tmp_path / "lap.pt")


def test_a_large_pickle_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_PICKLE", 1000)
    with pytest.raises(UserError, match="its pickle is larger than 1000 bytes"):
        checkpoint.read_tensors(saved(tmp_path / "w.pt", {"x": "y" * 1000}))


def test_a_packed_tar_is_not_unpacked_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``tarfile`` would read a member's name of any size out of a gzip of a few bytes."""
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("it was opened as a tar"))
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    (tmp_path / "w.pt").write_bytes(gzip.compress(header.tobuf()))
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read_tensors(tmp_path / "w.pt")
