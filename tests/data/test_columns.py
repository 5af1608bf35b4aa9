"""Large indexes in mapped files: made once, equal to those in memory, opened without reading."""

from __future__ import annotations

import errno
import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bat.data import columns, local_shards
from bat.data.index import Index, open_index
from bat.data.plan import make_plan
from bat.data.windows import cut_into_windows, fill_lengths
from bat.errors import UserError
from tests.shard.files import WAV, confit, write_tar

ARRAYS = ["shard", "source", "offset", "size", "frames", "rate", "codec", "fold", "split"]
ARRAYS += ["header", "label_ids", "label_ptr", "key_bytes", "key_ptr", "shard_bytes"]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(5):
        members: dict[str, object] = {}
        for i in range(number):  # the first has none
            label = {"Dog": 1} if i % 2 else {"Speech": 0, "Music": 3}
            members |= confit(f"Y{number}_{i}", label)
        members[f"e{number}.wav"] = WAV
        members[f"e{number}.json"] = {"text": "said", "split": "own", "fold": 2}
        folder = "train" if number < 3 else "test"
        write_tar(tmp_path / f"set/{folder}/shard-{number}.tar", members)
    return tmp_path / "set"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every index a large one."""
    monkeypatch.setattr(columns, "MAX_MEMORY_BYTES", 100)


def is_mapped(index: Index) -> bool:
    return isinstance(index.offset.base, np.memmap)


def same(one: Index, other: Index) -> bool:
    return (
        all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)
        and all(getattr(one, name).dtype == getattr(other, name).dtype for name in ARRAYS)
        and (one.vocabulary, one.splits) == (other.vocabulary, other.splits)
        and (one.texts, one.events, one.left_out) == (other.texts, other.events, other.left_out)
        and (one.hash, one.most_labels) == (other.hash, other.most_labels)
        and [one.read(i) for i in range(len(one))] == [other.read(i) for i in range(len(one))]
    )


@pytest.mark.parametrize("labels", ["same", "drop"])
def test_mapped_index__equals_the_one_in_memory(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str
) -> None:
    how = {"labels": labels, "cache": tmp_path / "cache"}
    there = open_index(shards, **how)  # type: ignore[arg-type]
    assert not is_mapped(there)
    assert not list((tmp_path).glob("cache/index-*"))
    monkeypatch.setattr(columns, "MAX_MEMORY_BYTES", 100)
    first = open_index(shards, **how)  # type: ignore[arg-type]
    monkeypatch.setattr("bat.data.index.local_table", None)  # not needed any more
    monkeypatch.setattr(columns, "content_hash", None)
    again = open_index(shards, **how)  # type: ignore[arg-type]
    assert is_mapped(first)
    assert is_mapped(again)
    assert not again.offset.flags.writeable
    monkeypatch.undo()
    assert same(there, first)
    assert same(there, again)


def test_mapped_index__keeps_the_clips_of_a_split(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = open_index(shards)
    monkeypatch.setattr(columns, "MAX_MEMORY_BYTES", 100)
    index = open_index(shards, cache=tmp_path / "c")
    for _ in range(2):
        for names in ("own", "train", "test,own"):
            ids = index.clips_in_split(names)
            assert isinstance(ids.base, np.memmap)
            assert ids.tolist() == there.clips_in_split(names).tolist()
    plan = make_plan(index, index.clips_in_split("train"), seed=0)
    assert sorted(plan.clips(np.arange(3)).tolist()) == there.clips_in_split("train").tolist()


def test_index__content_hash_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """A change here breaks running resumes."""
    one = {"split": "own", "fold": 2, "label": ["Dog"], "num_samples": 1000, "sample_rate": 8000}
    members = confit("Ya-_1", {"Speech": 0, "Music": 3}) | {"Yz.wav": WAV, "Yz.json": one}
    write_tar(tmp_path / "train/a.tar", members)
    write_tar(tmp_path / "test/b.tar", confit("Yb", {"Dog": 1}) | {"Yc.wav": WAV})
    assert open_index(tmp_path).hash[:16] == "07e91f6846dbe19f"
    assert open_index(tmp_path, labels="drop").hash[:16] == "0c2d1ebdf70d182f"


def test_mapped_index__is_sent_by_name_and_changes_in_memory(
    shards: Path, tmp_path: Path, small: None
) -> None:
    index = open_index(shards, cache=tmp_path / "cache")
    sent = pickle.dumps(index)
    assert index.key_bytes.tobytes() not in sent
    copy = pickle.loads(sent)
    assert is_mapped(copy)
    assert same(index, copy)
    fill_lengths(copy)
    assert (copy.frames > 0).all()
    assert (index.frames < 0).all()
    assert copy.hash != index.hash
    cut_into_windows(copy, float(copy.seconds[0]) / 3)
    assert len(copy) == 3 * len(index)
    assert same(index, open_index(shards, cache=tmp_path / "cache"))


def test_mapped_index__full_disk_is_named(
    shards: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(columns, "_save", full)
    with pytest.raises(UserError, match=r"c has no room for the index .* data\.cache"):
        open_index(shards, cache=tmp_path / "c")
    assert [p.suffix for p in (tmp_path / "c").iterdir()] in ([], [".lock"])


def test_mapped_index__of_a_changed_set_is_made_anew(
    shards: Path, tmp_path: Path, small: None
) -> None:
    cache = tmp_path / "cache"
    before = open_index(shards, cache=cache)
    write_tar(shards / "test/shard-4.tar", {"new.wav": WAV})
    os.utime(shards / "test/shard-4.tar", ns=(1, 1))
    after = open_index(shards, cache=cache)
    assert len(after) == len(before) - 4
    assert len(list(cache.glob("index-*-*"))) == 1  # the old one is gone, and still mapped here
    assert before.key(0) == after.key(0)
    (column,) = cache.glob("index-*-*/offset.bin")
    column.unlink()  # not whole: made again
    column.touch()
    assert same(after, open_index(shards, cache=cache))


def test_mapped_index__is_made_by_one_process_while_others_wait(
    shards: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, original = list[int](), columns._save

    def save(*given: object) -> None:
        made.append(1)
        time.sleep(0.2)
        original(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(columns, "_save", save)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: open_index(shards, cache=tmp_path / "c"), range(3)))
    assert made == [1]
    assert all(same(found[0], other) for other in found)
    assert not list(tmp_path.glob("c/*.tmp"))


def test_mapped_index__interrupted_or_unwritable(
    shards: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(local_shards.ShardTable, "load", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_index(shards, cache=tmp_path / "c")
    assert not list(tmp_path.glob("c/index-*-*"))
    assert is_mapped(open_index(shards, cache=tmp_path / "c"))
    (tmp_path / "file").touch()
    assert not is_mapped(open_index(shards, cache=tmp_path / "file/c"))  # held in memory instead
    (head,) = tmp_path.glob("c/index-*-*/head.json")
    assert json.loads(head.read_text())["columns"]["rate"] == ["<i4", 15]
