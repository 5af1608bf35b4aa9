"""Shards made to harm: bounds on what they may hold, and names that lead nowhere."""

from __future__ import annotations

import json
import logging
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from bat.cli.shard import main as shard_main
from bat.data import manifest, table
from bat.data.index import open_index
from bat.data.manifest import Manifest
from bat.data.table import ShardTable, read_contents
from bat.errors import UserError
from bat.logs import start_logging
from bat.shard.in_place import index_in_place
from bat.shard.rows import open_rows
from tests.data.test_sequential import read_once
from tests.shard.files import WAV, write_tar


def test_members__that_harm_are_left_out_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "MAX_AUDIO_BYTES", 10_000)
    names = ["../../up.wav", "/etc/abs.wav", "a/../../b.wav", "c\nd\x1b[2J.wav", "~/e.wav"]
    links = {}
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        links[kind] = tarfile.TarInfo(f"link-{kind.decode()}.wav")
        links[kind].type, links[kind].linkname = kind, "/etc/passwd"
    harmful = {
        "good.wav": WAV,
        "good.json": b"[1, 2]",
        "good.pyd": b"cos\nsystem\n",
        "good.flac": WAV,
        "empty.wav": b"",
        "big.wav": bytes(10_001),
        "video.m4a": b"x",
        "huge.json": b" " * (table.MAX_JSON_BYTES + 1),
        "deep.json": b"[" * 200_000,
        "odd.wav": WAV,
        "odd.json": {"fold": "x", "num_samples": -3, "sample_rate": 1e99, "label": {"a": 1}},
    }
    path = write_tar(tmp_path / "in/s.tar", dict.fromkeys(names, WAV) | links | harmful)
    before = set(tmp_path.rglob("*"))
    index = open_index(path, cache=tmp_path / "cache")
    assert {p.name for p in set(tmp_path.rglob("*")) - before} <= {"s.idx.npz", "cache"}
    keys = [index.key(i) for i in range(len(index))]
    assert len(set(keys)) == len(names) + 1
    assert all(key.replace("-", "").replace("_", "").isalnum() for key in keys)
    assert [index.read(i).data for i in range(len(index))] == [WAV] * len(keys)
    assert (index.frames[-1], index.rate[-1], index.fold[-1], index.vocabulary) == (-1, 0, -1, [])
    left_out = {name.removeprefix("s.tar/"): why for name, why in index.left_out.items()}
    assert left_out == {
        **{info.name: "not a regular file" for info in links.values()},
        "good.wav": "its JSON cannot be read: not a JSON object",
        "good.flac": "a second one of this key",
        "empty.wav": "empty",
        "big.wav": "larger than 10000 bytes",
        "video.m4a": "no decoder for m4a: convert it with ffmpeg",
        "huge.json": f"larger than {table.MAX_JSON_BYTES} bytes",
        "deep.json": "not a JSON object",
    }
    found, skipped = read_once(path)
    assert found == keys
    assert {key for key, _, _ in skipped} == {name.rpartition(".")[0] for name in left_out}


@pytest.mark.parametrize(
    ("bound", "value", "members", "says"),
    [
        ("MAX_MEMBERS", 4, {f"{i}.wav": WAV for i in range(5)}, "more than 4 members: split it"),
        (
            "MAX_ALL_JSON_BYTES",
            100,
            {f"{i}.json": b'{"x": "' + b"y" * 42 + b'"}' for i in range(2)},
            "more than 100 bytes of JSON",
        ),
    ],
)
def test_shard__of_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int, members: Any, says: str
) -> None:
    path = write_tar(tmp_path / "a.tar", members)
    read_contents(path)
    monkeypatch.setattr(table, bound, value)
    with pytest.raises(UserError, match=rf"a\.tar has {says}"):
        read_contents(path)


def test_json__of_its_fields_those_that_are_read_are_kept(tmp_path: Path) -> None:
    said = {"label": ["a", {"b": 1}], "fold": 2, "split": ["x"], "original_data": {"y": [1]}}
    told = {"num_samples": {"z": 0}, "id": "k", "original_data": {"class_labels": ["d"], "e": 0}}
    junk = {f"field {i}": [[]] for i in range(100)}
    path = write_tar(tmp_path / "a.tar", {"0.json": junk | said, "1.json": junk | told})
    assert read_contents(path).metas == {
        "0": {"label": ["a", {}], "fold": 2, "split": []},
        "1": {"num_samples": {}, "id": "k", "original_data": {"class_labels": ["d"]}},
    }


def test_json__out_of_bounds_is_left_out_with_its_clip(tmp_path: Path) -> None:
    bad = [
        b"[" * 100_000,
        b'{"num_samples": 1' + b"0" * 5000 + b"}",
        b"{" + b" " * table.MAX_JSON_BYTES + b"}",
        b'{"label": [1e999, {}, null], "num_samples": -5, "sample_rate": NaN, "fold": true}',
    ]
    members = {}
    for i, text in enumerate(bad):
        members |= {f"{i}.wav": WAV, f"{i}.json": text}
    path = write_tar(tmp_path / "a.tar", members)
    index = open_index(path)
    assert [index.key(i) for i in range(len(index))] == ["3"]
    assert index.frames.tolist() == [-1]
    assert sorted(index.left_out) == ["a.tar/0.wav", "a.tar/1.wav", "a.tar/2.wav"]
    found, skipped = read_once(path)
    assert (found, len(skipped)) == (["3"], 3)


def test_class_names__more_than_a_row_of_targets_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MAX_CLASSES", 3)
    path = write_tar(tmp_path / "a.tar", {"x.wav": WAV, "x.json": {"label": ["a", "b", "c", "d"]}})
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
    good = write_tar(tmp_path / "good/a.tar", {"a.wav": b"x" * 512}).read_bytes()[:1024]
    for name, head in forged.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(good + head + bytes(1 << 16))
        tracemalloc.start()
        with pytest.raises(UserError, match="is damaged at byte"):
            open_index(path)
        ((found,), ((_, kind, why),)) = read_once(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (found, kind) == ("a", "unreadable")
        assert "damaged" in why
        assert peak < 16 << 20


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


def test_manifest__is_held_to_its_types(tmp_path: Path) -> None:
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


def test_labels__in_json_are_read_as_in_every_source(tmp_path: Path) -> None:
    """Lists in text, missing values, numbers in their order; whatever the path to the index."""
    members: dict[str, Any] = {}
    for i, label in enumerate(["['10', '9']", "nan", 9.0, ["2", "\ud800"]]):
        members |= {f"c{i}.wav": WAV, f"c{i}.json": {"label": label}}
    path = write_tar(tmp_path / "s.tar", members)
    index = open_index(path)
    found = [{index.vocabulary[c] for c in index.labels(i)} for i in range(4)]
    assert found == [{"10", "9"}, set(), {"9"}, {"2", "\\ud800"}]
    assert [row.labels for row in open_rows(path).rows][1:3] == [(), ("9",)]
    only = write_tar(tmp_path / "n.tar", {k: v for k, v in members.items() if k[1] in "012"})
    assert open_index(only).vocabulary == ["9", "10"]


# ---- names with control characters


EVIL = "\x1b[31mred\x07"


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """Labels, ids, splits and member names hold terminal escapes and halves of characters."""
    members: dict[str, Any] = {}
    for i in range(4):
        meta = {"label": [["\ud800", EVIL][i % 2]], "id": f"\ud800{i}", "mid": "\ud800"}
        split = {"split": "\ud800" if i else EVIL}
        members |= {f"{i}\udcff{EVIL}.wav": WAV, f"{i}\udcff{EVIL}.json": meta | split}
    members[f"x\udcff{EVIL}.m4a"] = b"x"
    return write_tar(tmp_path / "evil/s.tar", members, tarfile.PAX_FORMAT).parent


def test_hostile_names__index_tables_and_manifests_hold_them_spelled_out(evil: Path) -> None:
    for _ in range(2):  # scanned, then from the saved table
        index = open_index(evil)
        assert index.vocabulary == ["\\ud800", "\\x1b[31mred\\x07"]
        assert sorted(index.splits) == ["\\ud800", "\\x1b[31mred\\x07"]
        assert len(index.hash) == 64
    index_in_place(evil)
    saved = ShardTable.load(evil / "s.idx.npz", evil / "s.tar")
    assert saved is not None
    saved.names = [EVIL, "\ud800"]
    saved.save(evil / "s.idx.npz")
    again = ShardTable.load(evil / "s.idx.npz", evil / "s.tar")
    assert again is not None
    assert again.names == ["\\x1b[31mred\\x07", "\\ud800"]
    fields = json.loads((evil / "manifest.json").read_text()) | {"vocabulary": [EVIL, "\ud800"]}
    (evil / "manifest.json").write_text(json.dumps(fields))
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


def test_hostile_names__folder_of_such_files_is_packed_and_the_log_spells_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dog\udcff", EVIL):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / f"{name}.wav").write_bytes(WAV)
    assert shard_main([str(tmp_path / "in"), str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert open_index(tmp_path / "out").vocabulary == ["\\x1b[31mred\\x07", "dog\\xff"]
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    start_logging(tmp_path)
    logging.getLogger("bat").warning("left out: %s", f"{EVIL}\ud800")
    assert "left out: \\x1b[31mred\\x07\\ud800" in (tmp_path / "train.log").read_text()
