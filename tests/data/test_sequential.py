"""Reading shards from front to end: order, dealing, faults, safety."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from bat.audio.decode import encode
from bat.data import sequential
from bat.data.index import NotIndexable, open_index
from bat.data.sequential import SequentialClips
from bat.errors import UserError
from tests.data.http_server import FaultyServer

WAV = encode(np.sin(np.arange(800) * 0.1), sample_rate=16_000, codec="wav")


def tar_bytes(members: dict[str, Any], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make(folder: Path, shards: int, clips: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for s in range(shards):
        members: dict[str, Any] = {}
        for c in range(clips):
            members |= {f"k{s}-{c}.wav": WAV, f"k{s}-{c}.json": {"label": "ab"[c % 2]}}
        (folder / f"s-{s}.tar.gz").write_bytes(gzip.compress(tar_bytes(members)))
    return folder


def keys(clips: SequentialClips, n: int) -> list[str]:
    return [clip.key for clip in itertools.islice(clips, n)]


def read_once(folder: Path, **options: Any) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Keys of one epoch in the shards' own order, and what was skipped: (key, kind, why)."""
    clips = SequentialClips(folder, shuffle_clips=1, **options)
    found = []
    for n in range(len(clips.shards)):
        found += [c.key for c in clips._clips(clips.shards[n])]
    return found, [(s.key, s.kind, s.why) for s in clips.take_skipped()]


def test_each_epoch_holds_every_clip_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    make(tmp_path, 5, 4)
    with pytest.raises(NotIndexable):
        open_index(tmp_path)
    clips = SequentialClips(tmp_path, seed=3, shuffle_clips=6)
    stream = keys(clips, 60)
    epochs = [stream[i : i + 20] for i in (0, 20, 40)]
    everything = sorted(f"k{s}-{c}" for s in range(5) for c in range(4))
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert keys(SequentialClips(tmp_path, seed=3, shuffle_clips=6), 60) == stream
    assert keys(SequentialClips(tmp_path, seed=4, shuffle_clips=6), 60) != stream
    later = keys(SequentialClips(tmp_path, seed=3, epoch=1, shuffle_clips=1), 20)
    assert sorted(later) == everything
    assert [k[:2] for k in later[::4]] == [f"k{s}" for s in clips.order(1)]


@pytest.mark.parametrize(("shards", "readers"), [(5, 1), (5, 2), (6, 3), (4, 4), (2, 3), (1, 4)])
def test_readers_share_the_work_evenly(tmp_path: Path, shards: int, readers: int) -> None:
    make(tmp_path, shards, 12)
    rounds = readers  # so many epochs are dealt whole, however the numbers divide
    seen: Counter[str] = Counter()
    for rank in range(readers):
        clips = SequentialClips(tmp_path, rank=rank, world=readers, shuffle_clips=1)
        seen.update(keys(clips, 12 * shards * rounds // readers))
    assert set(seen.values()) == {rounds}
    assert len(seen) == 12 * shards


def test_loader_workers_are_readers(tmp_path: Path) -> None:
    make(tmp_path, 4, 6)
    for world in (1, 2):
        seen: Counter[str] = Counter()
        for rank in range(world):
            clips = SequentialClips(tmp_path, rank=rank, world=world)
            loader = DataLoader(clips, batch_size=3, num_workers=2, collate_fn=list)
            batches = itertools.islice(loader, 8 // world)
            seen.update(clip.key for batch in batches for clip in batch)
        assert (len(seen), set(seen.values())) == (24, {1})


def test_labels_by_the_vocabulary_given(tmp_path: Path) -> None:
    make(tmp_path, 1, 2)
    found = {c.key: c for c in itertools.islice(SequentialClips(tmp_path, vocabulary="ba"), 2)}
    assert {key: clip.labels for key, clip in found.items()} == {"k0-0": (1,), "k0-1": (0,)}
    assert (found["k0-0"].data, found["k0-0"].codec) == (WAV, "wav")
    assert next(iter(SequentialClips(tmp_path))).labels == ()
    with pytest.raises(UserError, match="label 'b' of k0-1 is not in the vocabulary"):
        keys(SequentialClips(tmp_path, vocabulary="a"), 2)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_tar_format(tmp_path: Path, format: int) -> None:
    long = "folder/" * 12 + "x" * 60
    (tmp_path / "a.tar").write_bytes(tar_bytes({f"./{long}.wav": WAV, "b.wav": WAV}, format))
    table = open_index(tmp_path)
    assert read_once(tmp_path) == ([table.key(0), "b"], [])


def test_hostile_members_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "MAX_AUDIO_BYTES", 10_000)
    link = tarfile.TarInfo("link.wav")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = {
        "../../etc/x.wav": WAV,
        "good.wav": WAV,
        "good.json": b"[1]",
        "good.pyd": b"cos\nsystem\n",
        "good.flac": WAV,
        "link.wav": link,
        "empty.wav": b"",
        "big.wav": b"x" * 10_001,
        "big.m4a": b"x",
        "last.wav": WAV,
    }
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    found, skipped = read_once(tmp_path)
    assert found[0].startswith("______etc_x-")
    assert found[1:] == ["last"]
    assert [s[:2] for s in skipped] == [
        ("good", "corrupt"),
        ("good", "corrupt"),
        ("link", "corrupt"),
        ("empty", "empty"),
        ("big", "long"),
        ("big", "unknown"),
    ]


def test_a_shard_that_breaks_off_is_left_there(tmp_path: Path) -> None:
    whole = tar_bytes({f"{i}.wav": WAV for i in range(3)})
    member = 512 + 2048
    damaged = bytearray(whole)
    damaged[member : member + 40] = b"\xff" * 40
    huge_name = tarfile.TarInfo("x")
    huge_name.type, huge_name.size = tarfile.XHDTYPE, 7 << 30
    for name, data, kept, why in (
        ("cut", whole[: 2 * member + 600], 2, f"breaks off at byte {2 * member + 600}"),
        ("border", whole[: 2 * member], 2, f"ends at byte {2 * member} without an end mark"),
        ("damaged", bytes(damaged), 1, f"damaged at byte {member}"),
        ("none", b"not a tar at all", 0, "not a tar"),
        ("empty", b"", 0, "not a tar"),
        ("packed", gzip.compress(whole)[:-20], 2, ""),
        ("name", huge_name.tobuf() + whole, 0, f"a name of {7 << 30} bytes"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.tar").write_bytes(data)
        found, skipped = read_once(folder)
        assert len(found) >= kept, name
        assert [(s[0], s[1]) for s in skipped] == [("", "unreadable")], name
        assert why in skipped[0][2]
    labelled = {"a.wav": WAV, "a.json": {"label": "x"}, "b.wav": WAV, "b.json": {"label": "x"}}
    data = tar_bytes(labelled)
    (tmp_path / "cut/a.tar").write_bytes(data[: 2 * member + 1024 + 100])
    assert read_once(tmp_path / "cut", vocabulary="x")[0] == ["a"]  # b's label is gone
    assert read_once(tmp_path / "cut")[0] == ["a", "b"]


def test_others_go_on_where_one_shard_is_bad_and_all_bad_is_an_error(tmp_path: Path) -> None:
    make(tmp_path, 2, 3)
    (tmp_path / "s-0.tar.gz").write_bytes(b"\x1f\x8b rubbish")
    clips = SequentialClips(tmp_path, shuffle_clips=1)
    assert sorted(keys(clips, 6)) == sorted(["k1-0", "k1-1", "k1-2"] * 2)
    skipped = clips.take_skipped()
    assert {(s.shard, s.kind) for s in skipped} == {("s-0.tar.gz", "unreadable")}
    assert clips.take_skipped() == []
    (tmp_path / "s-1.tar.gz").write_bytes(b"\x1f\x8b rubbish")
    with pytest.raises(UserError, match=r"none of the 2 shards gave a clip \(s-"):
        keys(SequentialClips(tmp_path), 1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    make(tmp_path / "www", 3, 4)
    with FaultyServer(tmp_path / "www") as running:
        yield running


def test_remote_shards_through_faults(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    source = f"{server.url}/s-{{0..2}}.tar.gz"
    server.faults["s-1.tar.gz"] = ["500", "", "drop:300", "500"]
    clips = SequentialClips(source, timeout_seconds=0.5)
    assert sorted(keys(clips, 12)) == sorted(f"k{s}-{c}" for s in range(3) for c in range(4))
    assert clips.take_skipped() == []
    server.faults["s-1.tar.gz"] = ["500*"]
    clips = SequentialClips(source, timeout_seconds=0.5, retries=2)
    assert {key[:2] for key in keys(clips, 16)} == {"k0", "k2"}
    assert "cannot be reached: HTTP 500 (2 tries)" in clips.take_skipped()[0].why


@pytest.mark.parametrize("options", [{"shuffle_clips": 0}, {"epoch": -1}])
def test_mistakes(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least 1, not negative"):
        SequentialClips(make(tmp_path, 1, 1), **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="list of shards is empty"):
        SequentialClips([])


def test_the_window_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 1, 60)
    natural = {f"k0-{c}": c for c in range(60)}
    ahead = {}
    for bound in (3, 1000):
        monkeypatch.setattr(sequential, "WINDOW_BYTES", bound * len(WAV))
        for _ in range(2):
            got = keys(SequentialClips(tmp_path), 60)
            assert sorted(got) == sorted(natural)
            ahead[bound] = max(natural[key] - place for place, key in enumerate(got))
    assert ahead[3] == 3
    assert ahead[1000] > 20


def test_equal_names_in_two_folders_stay_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / name, 1, 1)
        (tmp_path / name / "s-1.tar.gz").write_bytes(b"\x1f\x8b rubbish")
    (tmp_path / "b/s-0.tar.gz").rename(tmp_path / "b/other.tar.gz")
    clips = SequentialClips(tmp_path)
    found = {clip.shard for clip in itertools.islice(clips, 4)}
    assert found == {"s-0.tar.gz", "other.tar.gz"}
    assert {s.shard for s in clips.take_skipped()} == {"a/s-1.tar.gz", "b/s-1.tar.gz"}


def test_a_row_of_dead_shards_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for s in range(20):
        (tmp_path / f"s-{s}.tar.gz").write_bytes(b"\x1f\x8b rubbish")
    monkeypatch.setattr(sequential, "SPAN", 10)
    with pytest.raises(UserError, match="none of the latest 10 shards gave a clip"):
        keys(SequentialClips(tmp_path), 1)
