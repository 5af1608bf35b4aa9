"""Weight files of PyTorch by strangers: what is read of them, what is refused, what never runs."""

from __future__ import annotations

import argparse
import builtins
import collections
import functools
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


@pytest.mark.parametrize("zipped", FORMATS)
def test_foreign_objects__do_not_keep_the_tensors_from_being_read(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fairseq = types.ModuleType("fairseq")

    class DictConfig:
        def __init__(self, content: Any) -> None:
            self.content = content

    class Choice(str):
        def __reduce__(self) -> tuple[Any, ...]:
            return Choice, (str(self),)

    for made in (DictConfig, Choice):
        made.__module__, made.__qualname__ = fairseq.__name__, made.__name__
        setattr(fairseq, made.__name__, made)
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "bf16": torch.randn(5).bfloat16(),
        "transposed": base.t(),
        "part": base[1:, 2:4],
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    node = DictConfig({"lr": 0.1})
    node.content["child"] = DictConfig(node)  # names its parent
    held = {
        "model": collections.OrderedDict(tensors),
        "args": argparse.Namespace(lr=0.5, betas=(0.9, 0.95), out=Path("runs/x")),
        "cfg": node,
        "criterion": Choice("mse"),
        "loss": np.float64(1.25),
        "table": np.arange(6, dtype=np.int16).reshape(2, 3),
        "counts": collections.defaultdict(int, {"a": 3}),
        "seen": {1, 2},
    }
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fairseq", fairseq)
        path = saved(tmp_path / "old.pt", held, zipped)
    found = checkpoint.read_tensors(path)
    assert "fairseq" not in sys.modules
    assert list(found["model"]) == list(tensors)
    for name, tensor in tensors.items():
        assert found["model"][name].dtype == tensor.dtype, name
        assert torch.equal(found["model"][name], tensor), name
    assert (found["seen"], found["counts"]) == ({1, 2}, {"a": 3})
    for name in ("args", "cfg", "criterion", "loss", "table"):  # empty: nothing was kept of them
        assert type(found[name]).__name__ == "_StandIn"
        assert not vars(found[name])
    with pytest.raises(pickle.UnpicklingError):  # the stand-ins are forgotten after a file
        torch.load(path, weights_only=True)


ATTACKS = {
    "os.system": (lambda p: Calls(os.system, f"touch {p}"), r"posix\.system"),
    "eval": (lambda p: Calls(builtins.eval, f"open({str(p)!r},'w')"), "eval"),
    "open": (lambda p: Calls(builtins.open, str(p), "w"), r"io\.open"),
    "getattr": (lambda p: Calls(getattr, "x", "upper"), "getattr"),
    "__import__": (lambda p: Calls(builtins.__import__, "antigravity"), "__import__"),
    "torch.load": (lambda p: Calls(torch.load, str(p)), r"torch\.serialization\.load"),
    "torch's own loader": (
        lambda p: Calls(torch.storage._load_from_bytes, b""),  # not held to weights_only
        r"torch\.storage\._load_from_bytes",
    ),
    "partial": (lambda p: Calls(functools.partial, os.system), r"functools\.partial"),
}


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize("name", ATTACKS)
def test_attack__is_refused_by_name_and_does_not_run(
    tmp_path: Path, name: str, zipped: bool
) -> None:
    attack, asked = ATTACKS[name]
    trace = tmp_path / "owned"
    evil = {"args": argparse.Namespace(), "model": {}, "x": attack(trace)}
    path = saved(tmp_path / "evil.pt", evil, zipped)
    modules = set(sys.modules)
    with pytest.raises(UserError, match=rf"without running code.*asks for .*{asked}"):
        checkpoint.read_tensors(path)
    assert not trace.exists()
    assert set(sys.modules) == modules


def calling(path: Path, module: str, name: str, word: str) -> Path:
    """A file of ``{"x": module.name(word)}``."""
    text = b"X" + struct.pack("<I", len(word)) + word.encode()
    call = f"c{module}\n{name}\n".encode() + text + b"\x85R"
    return with_pickle(path, b"\x80\x02}X\x01\x00\x00\x00x" + call + b"s.")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "serialization.os.system"),
        ("builtins", "object.__subclasses__"),
        ("argparse_evil", "run"),
        ("xargparse", "run"),
        ("torch", "__builtins__"),
        ("", "os"),
    ],
)
def test_names__that_look_alike_are_refused(tmp_path: Path, module: str, name: str) -> None:
    with pytest.raises(UserError, match="cannot be read without running code"):
        checkpoint.read_tensors(calling(tmp_path / "w.pt", module, name, "touch x"))


@pytest.mark.parametrize(
    ("module", "name"),
    [("argparse", "_sys.modules"), ("collections", "_sys"), ("fairseq", "run"), ("numpy", "load")],
)
def test_stand_in__does_nothing_and_imports_nothing(
    tmp_path: Path, module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder called ``fairseq`` in the path of imports would run when imported."""
    trace = tmp_path / "owned"
    (tmp_path / "fairseq").mkdir()
    (tmp_path / "fairseq/__init__.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = calling(tmp_path / "w.pt", module, name, f"touch {trace}")
    assert type(checkpoint.read_tensors(path)["x"]).__name__ == "_StandIn"
    assert not trace.exists()


def test_tensor__is_held_to_the_bytes_that_are_there(tmp_path: Path) -> None:
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    good = checkpoint.read_tensors(torch_file(tmp_path / "w.pt", rebuilt(1, (3,), (1,)), numbers))
    assert good["x"].tolist() == [2, 3, 4]
    for case in ((2, (3,), (1,), 4), (0, (1 << 40,), (1,), 1 << 40)):  # storage beyond the file
        path = torch_file(tmp_path / "w.pt", rebuilt(*case), numbers)
        with pytest.raises(UserError, match="cannot be read"):
            checkpoint.read_tensors(path)


def test_tensor__that_repeats_a_few_numbers_is_refused(tmp_path: Path) -> None:
    """No bytes in the file, terabytes once it is copied."""
    held = {"cls_token": torch.ones(1).expand(1, 1, 1 << 40), "pos_embed": torch.ones(1, 1, 4)}
    with pytest.raises(UserError, match="repeat a few numbers up to 4398046511120 bytes"):
        checkpoint.read_encoder(saved(tmp_path / "w.pt", held))
    base = torch.ones(1 << 16)
    views = {"cls_token": torch.ones(1), **{f"x{i}": base[:] for i in range(8)}}
    with pytest.raises(UserError, match="repeat a few numbers"):
        checkpoint.read_encoder(saved(tmp_path / "w.pt", views))


@pytest.mark.parametrize(
    "value",
    [torch.ones(2, 2).to_sparse(), torch.empty(2, device="meta"), [torch.ones(2)], np.ones(2)],
)
def test_tensor__no_plain_one_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    held = {"cls_token": torch.ones(1, 1, 4), "blocks.0.odd": value}
    with pytest.raises(UserError, match=r"blocks\.0\.odd|cannot be read"):
        checkpoint.read_encoder(saved(tmp_path / "w.pt", held))


@pytest.mark.parametrize("zipped", FORMATS)
def test_file__cut_anywhere_is_refused_with_a_reason(tmp_path: Path, zipped: bool) -> None:
    held = {"args": argparse.Namespace(a=1), "model": {"w": torch.randn(40)}}
    whole = saved(tmp_path / "whole.pt", held, zipped).read_bytes()
    for size in range(0, len(whole) - 1, 97):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.pt (cannot be read|is damaged)"):
            checkpoint.read_tensors(tmp_path / "cut.pt")


def test_file__with_a_flipped_bit_of_the_weights_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", {"w": torch.ones(1000), "v": torch.ones(10)})
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<f", 1.0) * 1000) + 402
    data[at] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["w"].sum() != 1000  # torch does not look
    with pytest.raises(UserError, match=r"w\.pt is damaged: .*data/0 does not have its checksum"):
        checkpoint.read_tensors(path)


def test_file__that_torch_would_unpack_or_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with tarfile.open(tmp_path / "tar.pt", "w") as tar:
        tar.add(tmp_path / "x", "storages")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    for name, said in (("tar.pt", "without running code"), ("script.pt", "torch.save it again")):
        with pytest.raises(UserError, match=said):
            checkpoint.read_tensors(tmp_path / name)


def test_file__gives_no_more_bytes_than_it_has(tmp_path: Path) -> None:
    """Zips that torch reads: packed again with compression; parts that lie over each other."""
    good = saved(tmp_path / "w.pt", {"x": torch.zeros(1 << 16), "y": torch.zeros(1 << 16)})
    with zipfile.ZipFile(good) as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as file:
        for name in whole.namelist():
            kind = zipfile.ZIP_DEFLATED if name.endswith("data/1") else zipfile.ZIP_STORED
            file.writestr(zipfile.ZipInfo(name), whole.read(name), kind)
    with zipfile.ZipFile(tmp_path / "lap.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        file.writestr("archive/data/0", bytes(1 << 16))
        first = file.getinfo("archive/data/0")
        for i in range(1, 4):
            again = zipfile.ZipInfo(f"archive/data/{i}")
            again.file_size = again.compress_size = first.file_size
            again.header_offset, again.CRC = first.header_offset, first.CRC
            file.filelist.append(again)
    for name in ("bomb.pt", "lap.pt"):
        with pytest.raises(UserError, match="compressed or overlap"):
            checkpoint.read_tensors(tmp_path / name)
