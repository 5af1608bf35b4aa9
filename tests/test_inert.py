"""Weight files made to take all time or memory, or to give what is not theirs: the bounds."""

from __future__ import annotations

import argparse
import gzip
import pickle
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bat import checkpoint, inert, restricted
from bat.restricted import Placeholder, Refused
from bat.shapes import UserError
from tests.torch_files import (
    FORMATS,
    REDUCE,
    called,
    doubling,
    opcodes,
    rebuilt,
    saved,
    storage,
    text,
    torch_file,
    with_pickle,
)


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


def test_pickles_out_of_proportion_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match="opcode EXT1"):
        restricted.read(with_pickle(tmp_path / "w.pt", opcodes(b"\x82\x01")))
    monkeypatch.setattr(inert, "MAX_OPCODES", 1000)
    for opcode in (b"N", b"\x94", b"\x8f", b"c_codecs\nencode\n"):  # a set of Python has 216 bytes
        many = opcodes(b"]", opcode * 1000)
        with pytest.raises(Refused, match="more than 1000 opcodes"):
            restricted.read(with_pickle(tmp_path / "w.pt", many))
    monkeypatch.undo()
    long = opcodes(called(f"fairseq.{'x' * 200}"))
    with pytest.raises(Refused, match="a name of more than 200"):
        restricted.read(with_pickle(tmp_path / "w.pt", long))
    deep = opcodes(b"]" * 5000 + b"a" * 4999)
    with pytest.raises(Refused, match="nested more than"):
        restricted.read(with_pickle(tmp_path / "w.pt", deep))
    itself = opcodes(b"]", b"\x94", b"h\x00", b"a")
    with pytest.raises(Refused, match="contains itself"):
        restricted.read(with_pickle(tmp_path / "w.pt", itself))


@pytest.mark.parametrize("zipped", FORMATS)
def test_doubling_tuples_take_no_time(tmp_path: Path, zipped: bool) -> None:
    """What hashed, compared or printed one of them would not end here."""
    tensor = [b"K\x00", b"K\x01\x85", b"K\x01\x85", b"\x89", b"N"]
    wrong = {
        "a storage called tuple": storage(doubling()),
        "a storage that is a tuple": storage(text("0"), doubling()),
        "an offset of tuple": called(
            "torch._utils._rebuild_tensor_v2", storage(text("0")), doubling(), *tensor[1:]
        ),
        "a size of tuple": called(
            "torch._utils._rebuild_tensor_v2",
            storage(text("0")),
            tensor[0],
            doubling(),
            *tensor[2:],
        ),
        "type tuple": called("numpy.dtype", doubling()),
    }
    for message, data in wrong.items():
        path = torch_file(tmp_path / "w.pt", opcodes(data), bytes(4))
        if not zipped:
            with_pickle(path, opcodes(data), zipped=False)
            message = "damaged|type tuple"
        with pytest.raises(Refused, match=message):
            restricted.read(path)
    found = restricted.read(with_pickle(path, opcodes(doubling()), zipped=zipped))
    assert found[0] is found[1]


@pytest.mark.parametrize("fill", ["dict", "set", "frozenset", "Counter"])
def test_a_key_that_could_not_be_hashed_in_time_is_a_placeholder(tmp_path: Path, fill: str) -> None:
    data = {
        "dict": b"}" + doubling() + b"Ns",
        "set": b"\x8f(" + doubling() + b"\x90",
        "frozenset": b"(" + doubling() + b"\x91",
        "Counter": called("collections.Counter", b"}" + doubling() + b"K\x01s"),
    }[fill]
    path = with_pickle(tmp_path / "w.pt", opcodes(b"}", text("x"), data, b"s"))
    (key,) = restricted.read(path)["x"]
    assert (key.name, len(key.state)) == ("tuple", 2)
    with pytest.raises(UserError, match="not tensors: x"):
        checkpoint.read_encoder(path)
    with_pickle(path, opcodes(data))
    with pytest.raises(UserError, match=r"not tensors: Placeholder.name=|not a mapping"):
        checkpoint.read_encoder(path)


def test_keys_made_to_share_a_hash_are_placeholders(tmp_path: Path) -> None:
    """Numbers that are equal modulo 2^61 - 1 have the hash 0: time squared in a dictionary."""
    held = dict.fromkeys(range(0, 4 * sys.hash_info.modulus, sys.hash_info.modulus))
    found = restricted.read(with_pickle(tmp_path / "w.pt", pickle.dumps(held)))
    assert [getattr(key, "state", key) for key in found] == list(held)
    assert len({hash(key) for key in found}) == len(held) > 1


def test_what_is_copied_of_one_object_is_bounded(tmp_path: Path) -> None:
    """A megabyte that is named 400 times."""
    shared = {
        "_codecs.encode": pickle.dumps("a" * (1 << 20))[2:-1] + b"\x94",
        "builtins.bytes": pickle.dumps(b"a" * (1 << 20))[2:-1] + b"\x94",
        "builtins.list": b"](" + b"N" * (1 << 14) + b"e\x94",
        "builtins.set": b"](" + b"N" * (1 << 14) + b"e\x94",
        "collections.OrderedDict": b"](" + b"NN\x86" * (1 << 14) + b"e\x94",
    }
    for name, data in shared.items():
        encoding = text("latin1") if name == "_codecs.encode" else b""
        calls = b"".join(called(name, b"h\x00", encoding) for _ in range(400))
        path = with_pickle(tmp_path / "w.pt", opcodes(data, b"0(", calls, b"t"))
        with pytest.raises(Refused, match="copied beyond"):
            restricted.read(path)
    many = opcodes(b"(" + b"N" * 65 + b"t\x94", called("fairseq.x")[:-3], b"h\x00" + REDUCE)
    with pytest.raises(Refused, match="more than 64 arguments"):
        restricted.read(with_pickle(tmp_path / "w.pt", many))


def test_numbers_that_would_allocate_do_not(tmp_path: Path) -> None:
    size = b"J\xff\xff\xff\x7f"
    with pytest.raises(Refused, match="bytes in a int"):
        restricted.read(with_pickle(tmp_path / "w.pt", opcodes(called("builtins.bytearray", size))))
    found = restricted.read(with_pickle(tmp_path / "w.pt", opcodes(called("torch.Tensor", size))))
    assert isinstance(found, Placeholder)


def test_views_with_metadata_are_refused(tmp_path: Path) -> None:
    numbers = torch.tensor([1 + 2j, 3 - 1j])
    for view in (numbers.conj(), numbers.conj().imag):  # conjugate; negative
        path = saved(tmp_path / "w.pt", {"x": view, "args": argparse.Namespace()})
        with pytest.raises(UserError, match="a tensor with metadata"):
            checkpoint.read_tensors(path)
    found = checkpoint.read_tensors(saved(tmp_path / "w.pt", {"x": numbers}))
    assert torch.equal(found["x"], numbers)


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


def test_a_file_gives_no_more_bytes_than_it_has(tmp_path: Path) -> None:
    """Zips that torch reads: packed again with compression; parts that lie over each other."""
    good = saved(tmp_path / "w.pt", {"x": torch.zeros(1 << 16), "y": torch.zeros(1 << 16)})
    for all_packed in (True, False):
        with zipfile.ZipFile(good) as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as file:
            for name in whole.namelist():
                packed = all_packed or name.endswith("data/1")
                kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
                file.writestr(zipfile.ZipInfo(name), whole.read(name), kind)
        assert torch.load(tmp_path / "bomb.pt", weights_only=True)["y"].sum() == 0
        with pytest.raises(UserError, match="compressed"):
            checkpoint.read_tensors(tmp_path / "bomb.pt")
    noise = saved(tmp_path / "w.pt", {"x": torch.randint(256, (99,), dtype=torch.uint8)})
    with zipfile.ZipFile(noise) as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as file:
        for name in whole.namelist():  # packing makes this part longer: no size tells
            kind = zipfile.ZIP_DEFLATED if name.endswith("data/0") else zipfile.ZIP_STORED
            file.writestr(zipfile.ZipInfo(name), whole.read(name), kind)
    with pytest.raises(UserError, match="data/0 is missing or compressed"):
        checkpoint.read_tensors(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "lap.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))
        file.writestr("archive/data/0", bytes(1 << 16))
        for i in range(1, 4):
            twin = zipfile.ZipInfo(f"archive/data/{i}")
            first = file.getinfo("archive/data/0")
            twin.file_size = twin.compress_size = first.file_size
            twin.header_offset, twin.CRC = first.header_offset, first.CRC
            file.filelist.append(twin)
    with pytest.raises(UserError, match="overlap"):
        checkpoint.read_tensors(tmp_path / "lap.pt")


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


def test_a_pickle_is_read_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inert, "MAX_PICKLE_BYTES", 1000)
    for zipped in FORMATS:
        for data in (pickle.dumps("x" * 1000), b"\x80\x04V" + b"x" * 1000):  # its end is far off
            with pytest.raises(Refused, match="larger than 1000 bytes"):
                restricted.read(with_pickle(tmp_path / "w.pt", data, zipped=zipped))
