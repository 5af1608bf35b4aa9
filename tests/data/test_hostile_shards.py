"""Shards made to harm: bounds on what they may hold, and names that lead nowhere."""

from __future__ import annotations

import io
import json
import logging
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.audio.decode import encode
from bat.cli.shard import main as shard_main
from bat.data import remote, sequential, table, table_sets
from bat.data.bad_clips import BadClips
from bat.data.index import open_index
from bat.data.manifest import Manifest
from bat.data.remote import listing, why
from bat.data.sequential import SequentialClips
from bat.data.sources import RetryPolicy
from bat.data.table import read_contents
from bat.errors import UserError
from bat.logs import start_logging
from bat.shard.in_place import index_in_place
from bat.shard.rows import open_rows
from bat.types import Skipped, WaveBatch
from tests.data.http_server import FaultyServer

WAV = encode(np.ones(160, np.float32) * 0.1, sample_rate=16_000, codec="wav")


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


NAMES = ["../../up.wav", "/etc/abs.wav", "a/../../b.wav", "c\nd\x1b[2J.wav", "~/e.wav", "...x.wav"]


def test_member_names_never_become_paths(tmp_path: Path) -> None:
    path = tar(tmp_path / "in/s.tar", [(name, WAV) for name in NAMES])
    with tarfile.open(path, "a") as file:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"link-{kind.decode()}.wav")
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    index = open_index(path, cache=tmp_path / "cache")
    keys = [index.key(i) for i in range(len(index))]
    assert len(set(keys)) == len(NAMES)
    assert all(key.replace("-", "").replace("_", "").isalnum() for key in keys)
    assert [index.read(i).data for i in range(len(index))] == [WAV] * len(NAMES)
    clips = iter(SequentialClips([path], shuffle_clips=1))
    assert [next(clips).key for _ in NAMES] == keys
    assert sorted(read_contents(path).left_out.values()) == ["not a regular file"] * 4
    made = set(tmp_path.rglob("*")) - set(before)
    assert {p.name for p in made} <= {"s.idx.npz", "cache"}


def test_a_shard_of_too_many_members_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "MAX_MEMBERS", 4)
    good = tar(tmp_path / "good.tar", [(f"{i}.wav", WAV) for i in range(5)])
    assert len(read_contents(good).audio) == 5
    for name, data in (("a", WAV), ("b", b"")):
        path = tar(tmp_path / f"{name}.tar", [(f"{i}.wav", data) for i in range(6)])
        with pytest.raises(UserError, match=r"\.tar has more than 4 members: split it"):
            read_contents(path)


def test_a_shard_of_too_much_json_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "MAX_ALL_JSON_BYTES", 100)
    path = tar(
        tmp_path / "a.tar", [(f"{i}.json", b'{"x": "' + b"y" * 41 + b'"}') for i in range(2)]
    )
    assert len(read_contents(path).metas) == 2
    path = tar(
        tmp_path / "b.tar", [(f"{i}.json", b'{"x": "' + b"y" * 42 + b'"}') for i in range(2)]
    )
    with pytest.raises(UserError, match="more than 100 bytes of JSON"):
        read_contents(path)


def test_of_json_the_fields_that_are_read_are_kept_within_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"label": ["a", {"b": 1}], "fold": 2, "split": ["x"], "original_data": {"y": [1]}}
    told = {"num_samples": {"z": 0}, "id": "k", "original_data": {"class_labels": ["d"], "e": 0}}
    junk = {f"field {i}": [[]] * 1000 for i in range(100)}
    path = tar(
        tmp_path / "a.tar",
        [(f"{i}.json", json.dumps(junk | more).encode()) for i, more in enumerate((said, told))],
    )
    assert read_contents(path).metas == {
        "0": {"label": ["a", {}], "fold": 2, "split": []},
        "1": {"num_samples": {}, "id": "k", "original_data": {"class_labels": ["d"]}},
    }
    many = json.dumps({"label": [f"{i:x}" for i in range(100_000)]}).encode()
    path = tar(tmp_path / "b.tar", [(f"{i}.json", many) for i in range(8)])
    tracemalloc.start()
    monkeypatch.setattr(table, "MAX_KEPT_BYTES", 20 << 20)
    with pytest.raises(UserError, match=r"b\.tar has labels and other fields .*20971520 bytes"):
        read_contents(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20


def test_json_out_of_bounds_is_left_out_with_its_clip(tmp_path: Path) -> None:
    bad = [
        b"[" * 100_000,
        b'{"num_samples": 1' + b"0" * 5000 + b"}",
        b"{" + b" " * table.MAX_JSON_BYTES + b"}",
        b'{"label": [1e999, {}, null], "num_samples": -5, "sample_rate": NaN, "fold": true}',
    ]
    members = [x for i, text in enumerate(bad) for x in ((f"{i}.wav", WAV), (f"{i}.json", text))]
    path = tar(tmp_path / "a.tar", members)
    index = open_index(path)
    assert [index.key(i) for i in range(len(index))] == ["3"]
    assert index.frames.tolist() == [-1]
    assert sorted(index.left_out) == ["a.tar/0.wav", "a.tar/1.wav", "a.tar/2.wav"]
    clips = iter(sequential_clips := SequentialClips([path], shuffle_clips=1))
    assert next(clips).key == "3"
    assert len(sequential_clips.take_skipped()) == 3


def test_more_class_names_than_a_row_of_targets_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_sets, "MAX_CLASSES", 3)
    labels = json.dumps({"label": ["a", "b", "c", "d"]}).encode()
    path = tar(tmp_path / "a.tar", [("x.wav", WAV), ("x.json", labels)])
    with pytest.raises(UserError, match=r"have 4 class names, more than 3.*data\.labels=drop"):
        open_index(path)
    assert open_index(path, labels="drop").classes == 0


def test_tar__forged_sizes_end_in_one_error(tmp_path: Path) -> None:
    """A long name of a gigabyte; a size that leads back, in a pax header."""
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    forged = {"long": long.tobuf()}
    for size in ("-1", "-5000"):
        back = tarfile.TarInfo("x.wav")
        back.pax_headers = {"size": size}
        forged[f"back{size}"] = back.tobuf(tarfile.PAX_FORMAT)
    for name, head in forged.items():
        path = tmp_path / f"{name}.tar"
        good = tar(tmp_path / "good.tar", [("a.wav", WAV)]).read_bytes()[:1024]
        path.write_bytes(good + head + bytes(1 << 16))
        tracemalloc.start()
        with pytest.raises(UserError, match="is damaged at byte"):
            open_index(path)
        clips = SequentialClips([path], shuffle_clips=1)
        assert next(iter(clips)).key == "a"
        next(found := iter(clips))
        next(found)
        assert "damaged" in clips.take_skipped()[0].why
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 16 << 20


def test_members_that_are_no_clips_do_not_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "MAX_UNFIT", 5)
    empty = [(f"{i}.wav", b"") for i in range(5)]
    path = tar(tmp_path / "a.tar", [("x.wav", WAV), *empty, ("y.wav", WAV)])
    clips = SequentialClips([path], shuffle_clips=1)
    found = iter(clips)
    assert [next(found).key for _ in range(3)] == ["x"] * 3
    assert "5 members in a row are no clips" in {skip.why for skip in clips.take_skipped()}
    path = tar(tmp_path / "b.tar", [("x.wav", WAV), *empty[:4], ("y.wav", WAV), *empty[:4]])
    found = iter(SequentialClips([path], shuffle_clips=1))
    assert [next(found).key for _ in range(4)] == ["x", "y", "x", "y"]
    path = tar(tmp_path / "c.tar", [*empty[:4], ("x.wav", WAV), *empty[:4], ("y.wav", WAV)])
    found = iter(SequentialClips([path], shuffle_clips=1))
    assert [next(found).key for _ in range(4)] == ["x", "y", "x", "y"]


GOOD: dict[str, Any] = {
    "shards": [{"name": "a.tar", "clips": 1, "bytes": 9, "sha256": "", "seconds": 0.5}],
    "clips": 1,
    "seconds": 0.5,
    "bytes": 9,
    "vocabulary": ["dog"],
    "label_counts": [1],
    "splits": {"train": 1},
    "folds": {"1": 1},
    "rates": {"16000": 1},
    "left_out": [{"key": "k", "file": "f", "reason": "r"}],
    "source": "0",
    "version": 2,
}


def test_a_manifest_is_held_to_its_types(tmp_path: Path) -> None:
    def load(**changed: Any) -> Manifest | None:
        (tmp_path / "manifest.json").write_text(json.dumps({**GOOD, **changed}))
        return Manifest.load(tmp_path)

    assert load() is not None
    shard = GOOD["shards"][0]
    names = [{**shard, "name": name} for name in ("../a.tar", "a/b.tar", "..", "", 5, None, "a\0")]
    sizes = [{**shard, "bytes": size} for size in (-1, "9", 1.5, True, 1 << 63)]
    others = [{**shard, "clips": -1}, {**shard, "seconds": "x"}, {**shard, "sha256": "../x"}, []]
    wrong: list[dict[str, Any]] = [{"shards": [entry]} for entry in names + sizes + others]
    wrong += [{"vocabulary": [1]}, {"vocabulary": "dog"}, {"label_counts": ["1"]}, {"clips": "1"}]
    wrong += [{"splits": {"train": "1"}}, {"splits": []}, {"left_out": [5]}, {"left_out": [[{}]]}]
    for changed in wrong:
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            load(**changed)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged"):
        Manifest.load(tmp_path)


def test_lists_and_messages_show_no_credentials(tmp_path: Path) -> None:
    import torch

    skipped = Skipped(
        "k", "a.tar", "unreadable", "https://u:pa55@h/a.tar?X-Amz-Signature=5ecret", 3
    )
    batch = WaveBatch(
        waves=torch.zeros(0, 1),
        lengths=torch.zeros(0, dtype=torch.int64),
        targets=torch.zeros(0, 0),
        keys=[],
        positions=torch.zeros(0, dtype=torch.int64),
        skipped=[skipped],
    )
    BadClips(file=tmp_path / "bad_clips.jsonl").add(batch)
    line = json.loads((tmp_path / "bad_clips.jsonl").read_text())
    assert line["why"] == "https://***@h/a.tar?***"
    error = RuntimeError(
        "at https://u:pa55@h/ with Authorization: Bearer abc.def and hf_" + "a1" * 12
    )
    text = why(error, "https://h/a.tar", RetryPolicy())
    assert "pa55" not in text
    assert "abc.def" not in text
    assert "a1a1" not in text


def test_a_remote_listing_is_bounded_and_leads_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    for name in ("b&amp;.tar", "a.tar", ".hidden.tar", "x.txt"):
        tar(folder / name.replace("&amp;", "&"), [("x.wav", WAV)])
    links = ["../up.tar", "http://elsewhere/c.tar", "/s/d.tar", "e/f.tar", "g.tar?x=1", "file:///h"]
    with FaultyServer(tmp_path) as server:
        page = "".join(f"<A class='x'\nHREF = '{link}'>{link}</a>" for link in links)
        base = f"{server.url}/s"
        assert listing(base, RetryPolicy()) == ["a.tar", "b&.tar", "x.txt"]
        monkeypatch.setattr(remote, "read", lambda url, **_: (page + "<a ").encode())
        assert listing(base, RetryPolicy()) == ["d.tar", "g.tar"]
        monkeypatch.undo()
        monkeypatch.setattr(remote, "MAX_LISTING_BYTES", 20)
        with pytest.raises(UserError, match=r"/s/ is larger than 20 bytes"):
            listing(base, RetryPolicy())


def test_labels_in_json_are_read_as_in_every_source(tmp_path: Path) -> None:
    """Lists in text, missing values, numbers in their order; whatever the path to the index."""
    labels = ["['10', '9']", "nan", 9.0, ["2", "\ud800"]]
    members = []
    for i, label in enumerate(labels):
        members += [(f"c{i}.wav", WAV), (f"c{i}.json", json.dumps({"label": label}).encode())]
    path = tar(tmp_path / "s.tar", members)
    index = open_index(path)
    found = [{index.vocabulary[c] for c in index.labels(i)} for i in range(4)]
    assert found == [{"10", "9"}, set(), {"9"}, {"2", "\\ud800"}]
    assert [row.labels for row in open_rows(path).rows][1:3] == [(), ("9",)]
    only = tar(tmp_path / "n.tar", [m for m in members if m[0][1] in "012"])
    assert open_index(only).vocabulary == ["9", "10"]


EVIL = "\x1b[31mred\x07"


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """Labels, ids, splits and member names hold terminal escapes and halves of characters."""
    members = []
    for i in range(4):
        meta = {"label": [["\ud800", EVIL][i % 2]], "id": f"\ud800{i}", "mid": "\ud800"}
        data = json.dumps(meta | {"split": "\ud800" if i else EVIL}).encode()
        members += [(f"{i}\udcff{EVIL}.wav", WAV), (f"{i}\udcff{EVIL}.json", data)]
    return tar(tmp_path / "evil/s.tar", [*members, (f"x\udcff{EVIL}.m4a", b"x")]).parent


def test_hostile_names__index_hash_and_tables_hold_them_spelled_out(evil: Path) -> None:
    for _ in range(2):  # scanned, then from the saved table
        index = open_index(evil)
        assert index.vocabulary == ["\\ud800", "\\x1b[31mred\\x07"]
        assert sorted(index.splits) == ["\\ud800", "\\x1b[31mred\\x07"]
        assert len(index.hash) == 64


def test_hostile_names__saved_tables_and_manifests_are_not_trusted(tmp_path: Path) -> None:
    labels = [(f"{i}.json", json.dumps({"label": "ab"[i]}).encode()) for i in range(2)]
    evil = tar(tmp_path / "s.tar", [("0.wav", WAV), ("1.wav", WAV), *labels]).parent
    index_in_place(evil)
    saved = table.ShardTable.load(evil / "s.idx.npz", evil / "s.tar")
    assert saved is not None
    saved.names = [EVIL, "\ud800"]
    saved.save(evil / "s.idx.npz")
    again = table.ShardTable.load(evil / "s.idx.npz", evil / "s.tar")
    assert again is None  # labels that the tar does not have
    manifest = json.loads((evil / "manifest.json").read_text())
    manifest["vocabulary"] = [EVIL, "\ud800"]
    (evil / "manifest.json").write_text(json.dumps(manifest))
    loaded = Manifest.load(evil)
    assert loaded is not None
    assert loaded.vocabulary == ["\\x1b[31mred\\x07", "\\ud800"]


@pytest.mark.parametrize(
    "words",
    ["info DIR", "verify DIR --jobs 1 --json OUT.json", "DIR --jobs 1", "DIR OUT --split train"],
)
def test_hostile_names__no_command_crashes_or_lets_an_escape_through(
    evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    words = words.replace("DIR", str(evil)).replace("OUT", str(tmp_path / "out"))
    assert shard_main(words.split()) in (0, 1, 2)
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    (printed.out + printed.err).encode()
    for file in (*tmp_path.rglob("*.json"), *tmp_path.rglob("*.md")):
        assert EVIL not in file.read_text()


def test_hostile_names__a_folder_of_such_files_is_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dog\udcff", EVIL):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / f"{name}.wav").write_bytes(WAV)
    assert shard_main([str(tmp_path / "in"), str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert open_index(tmp_path / "out").vocabulary == ["\\x1b[31mred\\x07", "dog\\xff"]
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err


def test_hostile_names__a_log_spells_them_out(evil: Path, tmp_path: Path) -> None:
    start_logging(tmp_path)
    logging.getLogger("bat").warning("left out: %s", f"{EVIL}\ud800")
    assert "left out: \\x1b[31mred\\x07\\ud800" in (tmp_path / "train.log").read_text()
