"""Pre-training on parts, weights, mixtures, other people's shards, and ones without an index."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bat.audio.encode import encode
from bat.data.index import open_index
from bat.data.tar import escape_key
from bat.errors import UserError
from bat.io import read_jsonl
from bat.shard.write import write_shards
from bat.tasks.base import Row
from bat.train.pretrain import Pretraining
from bat.train.pretrain_data import open_stream
from bat.train.run_pretrain import pretrain

PARTS = {
    "both": ("train", "test"),
    "three": ("train-balanced", "train-unbalanced", "test"),
}


def make_set(
    folder: Path, *, clips: int, label: str = "noise", split: str | None = None, seed: int = 0
) -> Path:
    """``clips`` half-second noises as shards of two or three each."""
    audio = folder / "audio"
    audio.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(clips):
        path = audio / f"{folder.name}{i}.flac"
        wave = rng.uniform(-0.5, 0.5, 8_000)
        path.write_bytes(encode(wave, sample_rate=16_000, codec="flac"))
        where = split
        if split in PARTS:
            where = PARTS[split][i % len(PARTS[split])]
        rows.append(Row(path, path.stem, (label,), split=where))
    write_shards(rows, folder / "shards", shard_bytes=36_000)
    return folder / "shards"


def keys_of(stream, count: int) -> list[str]:
    """Keys of the first ``count`` micro-batches."""
    batches = iter(stream.data.train_dataloader())
    return [key for _ in range(count) for key in next(batches).keys]


def test_auto_leaves_the_test_split_out_and_says_so(small, tmp_path: Path, caplog) -> None:
    shards = make_set(tmp_path / "a", clips=8, split="both")
    words = (f"data.shards={shards}", "data.batch=4")
    with caplog.at_level(logging.INFO, logger="bat"):
        stream = open_stream(small(*words, out=tmp_path / "run"))
    assert "the 4 clips of split train; data.split=all takes those of test too" in caplog.text
    assert set(keys_of(stream, 2)) == {"a0", "a2", "a4", "a6"}
    for split, wanted in (("test", {1, 3, 5, 7}), ("all", set(range(8)))):
        stream = open_stream(small(*words, f"data.split={split}", out=tmp_path / "run"))
        assert set(keys_of(stream, 2)) == {f"a{i}" for i in wanted}
    with pytest.raises(
        UserError, match="no clip has split 'valid': the data has the splits test 4, train 4"
    ):
        open_stream(small(*words, "data.split=valid", out=tmp_path / "run"))


def test_auto_refuses_held_out_splits_alone(small, tmp_path: Path) -> None:
    shards = make_set(tmp_path / "a", clips=4, split="test")
    with pytest.raises(UserError, match="the splits test 4: none of them is called train"):
        open_stream(small(f"data.shards={shards}", "data.batch=4", out=tmp_path / "run"))


def test_auto_warns_where_no_split_is_called_train(small, tmp_path: Path, caplog) -> None:
    shards = make_set(tmp_path / "a", clips=4, split="north")
    stream = open_stream(small(f"data.shards={shards}", "data.batch=4", out=tmp_path / "run"))
    assert [r.levelname for r in caplog.records if "(north) is called train" in r.message] == [
        "WARNING"
    ]
    assert "data.split=NAME" in caplog.text
    assert set(keys_of(stream, 1)) == {"a0", "a1", "a2", "a3"}
    caplog.clear()
    bare = make_set(tmp_path / "b", clips=2)
    for words in ((f"data.shards={shards}", "data.split=all"), (f"data.shards={bare}",)):
        open_stream(small(*words, "data.batch=2", out=tmp_path / "run"))
    assert "called train" not in caplog.text


def test_a_mixture_of_two_sets_trains_and_resumes_bit_for_bit(
    small, tmp_path: Path, monkeypatch
) -> None:
    a, b = (make_set(tmp_path / name, clips=6, seed=i) for i, name in enumerate("ab"))
    words = (f"data.shards=[{a}, {b}]", "data.mix=[3, 1]", "data.batch=4", "train.steps=4")
    stream = open_stream(small(*words, out=tmp_path / "run"))
    keys = keys_of(stream, 4)
    assert {key[0] for key in keys} == {"a", "b"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(small(*words, out=whole))
    step = Pretraining.training_step

    def cut_short(self, batch, batch_idx):
        if batch_idx == 3:
            raise InterruptedError
        return step(self, batch, batch_idx)

    with monkeypatch.context() as m:
        m.setattr(Pretraining, "training_step", cut_short)
        with pytest.raises(InterruptedError):
            pretrain(small(*words, out=cut))
    pretrain(small(*words, out=cut))
    a, b = (load_file(out / "export" / "model.safetensors") for out in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(UserError, match=r"data\.mix"):
        pretrain(small(*words, "data.mix=[1, 1]", out=whole))
    assert read_jsonl(whole / "metrics.jsonl")[-1]["loss"] > 0
    order = json.loads((whole / "summary.json").read_text())["data"]["order"]
    assert order.startswith("750 in 1000 of 6 clips")


def test_balance_draws_the_rare_class_as_often(small, tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(20):
        path = audio / f"{i}.flac"
        path.write_bytes(encode(rng.uniform(-0.5, 0.5, 800), sample_rate=16_000, codec="flac"))
        rows.append(Row(path, f"{'rare' if i < 2 else 'common'}{i}", ("rare" if i < 2 else "c",)))
    write_shards(rows, tmp_path / "shards")
    words = (f"data.shards={tmp_path / 'shards'}", "data.batch=2")
    words += ("data.balance=class", "data.epoch_clips=2", "train.steps=300")
    stream = open_stream(small(*words, out=tmp_path / "run"))
    rare = [key.startswith("rare") for key in keys_of(stream, 300)]
    assert 0.38 < np.mean(rare) < 0.55  # 0.5, less what drawing without replacement takes


def test_sets_with_other_labels_are_refused_or_read_without(small, tmp_path: Path) -> None:
    a = make_set(tmp_path / "a", clips=2, label="dog")
    b = make_set(tmp_path / "b", clips=2, label="cat")
    words = (f"data.shards=[{a}, {b}]", "data.batch=2")
    with pytest.raises(UserError, match="different labels") as caught:
        open_stream(small(*words, out=tmp_path / "run"))
    assert "data.labels=drop" in str(caught.value)
    stream = open_stream(small(*words, "data.labels=drop", out=tmp_path / "run"))
    assert stream.index is not None
    assert stream.index.classes == 0
    assert set(keys_of(stream, 2)) == {"a0", "a1", "b0", "b1"}
    with pytest.raises(UserError, match="labelled clips"):
        pretrain(small(*words, "data.labels=drop", "online.every=2", out=tmp_path / "run"))


def test_bad_clips_are_listed_in_the_run_s_folder(small, tmp_path: Path) -> None:
    shards = make_set(tmp_path / "a", clips=6)
    index = open_index(shards)
    with index.paths[0].open("r+b") as file:  # type: ignore[union-attr]
        file.seek(int(index.offset[1]))
        file.write(b"\0" * int(index.size[1]))
    out = tmp_path / "run"
    pretrain(small(f"data.shards={shards}", "data.batch=3", "data.max_bad=1", out=out))
    (bad,) = read_jsonl(out / "bad_clips.jsonl")
    assert (bad["key"], bad["shard"], bad["kind"]) == ("a1", "shard-00000.tar", "corrupt")
    again = out / "again"
    with pytest.raises(UserError, match=r"Most are in shard-00000\.tar \(\d+\); all are listed in"):
        pretrain(small(f"data.shards={shards}", "data.batch=3", out=again))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Shards of 12 clips, gzipped: nothing can index them."""
    shards = make_set(tmp_path / "z", clips=12)
    folder = tmp_path / "packed"
    folder.mkdir()
    for tar in shards.glob("*.tar"):
        with tar.open("rb") as raw, gzip.open(folder / f"{tar.name}.gz", "wb") as out:
            shutil.copyfileobj(raw, out)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_compressed_shards_train_from_front_to_end_and_say_what_that_means(
    small, tmp_path: Path, packed: Path, capsys, workers: int
) -> None:
    out = tmp_path / "run"
    words = [f"data.shards={packed}", "data.batch=4", f"data.workers={workers}"]
    stream = open_stream(small(*words, out=out))
    pretrain(small(*words, out=out))
    said = capsys.readouterr().err
    assert "NOT exactly the uninterrupted one" in said
    assert "front to end (NOT exactly resumable)" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["data"]["order"] == "front to end, not exactly resumable"
    assert summary["bad_clips"]["seen"] == 24
    keys = keys_of(stream, 3)
    if workers == 0:
        assert sorted(keys) == sorted(f"z{i}" for i in range(12))  # an epoch, each once
    more = small(*words, "train.steps=9", out=tmp_path / "other")
    pretrain(more)  # and a run that goes on
    with pytest.raises(UserError, match=r"data\.epoch_clips=3 needs an index, but .* compressed"):
        open_stream(small(*words, "data.epoch_clips=3", out=out))
    with pytest.raises(UserError, match=r"data\.window=100 needs an index"):
        open_stream(small(*words, "data.window=100", out=out))
    with pytest.raises(UserError, match="online probes on the training set need an index"):
        open_stream(small(*words, "online.every=1", out=out))


def test_packed_shards_obey_data_split(small, tmp_path: Path, packed: Path, caplog) -> None:
    parts = tmp_path / "parts"
    for name in ("train", "test"):
        (parts / name).mkdir(parents=True)
    for i, shard in enumerate(sorted(packed.iterdir())):
        shutil.copy(shard, parts / ("test" if i == 0 else "train") / shard.name)
    count = len(list(packed.iterdir()))
    words = (f"data.shards={parts}", "data.batch=2")
    with caplog.at_level(logging.INFO, logger="bat"):
        stream = open_stream(small(*words, out=tmp_path / "run"))
    assert "split train; data.split=all takes test too" in caplog.text
    assert stream.data.facts()["shards"] == count - 1
    held = set(keys_of(open_stream(small(*words, "data.split=test", out=tmp_path / "run")), 6))
    assert 2 <= len(held) <= 4
    assert set(keys_of(stream, 12)) == {f"z{i}" for i in range(12)} - held
    with pytest.raises(UserError, match="none has split 'valid'; splits are test, train"):
        keys_of(open_stream(small(*words, "data.split=valid", out=tmp_path / "run")), 1)


def test_lost_packed_shards_stop_a_run(small, tmp_path: Path, packed: Path) -> None:
    bad = sorted(packed.iterdir())[0]
    bad.write_bytes(b"\x1f\x8b rubbish")
    words = (f"data.shards={packed}", "data.batch=4", "train.steps=100", "data.max_bad=0.14")
    out = tmp_path / "run"
    says = rf"15 of the latest \d+ shards broke off \(the last: {bad.name}, .*max_bad=0.14"
    with pytest.raises(UserError, match=says):
        pretrain(small(*words, out=out))
    (line,) = read_jsonl(out / "bad_clips.jsonl")
    assert (line["shard"], line["key"], line["kind"]) == (bad.name, "", "unreadable")


def test_audiosets_unbalanced_split_is_taken_and_both_where_told(
    small, tmp_path: Path, caplog
) -> None:
    shards = make_set(tmp_path / "a", clips=6, split="three")
    words = (f"data.shards={shards}", "data.batch=2")
    both = "data.split=train-balanced,train-unbalanced"
    for more, wanted in (((), {1, 4}), ((both,), {0, 1, 3, 4})):
        with caplog.at_level(logging.INFO, logger="bat"):
            stream = open_stream(small(*words, *more, out=tmp_path / "run"))
        assert set(keys_of(stream, 2)) == {f"a{i}" for i in wanted}
    assert "the 2 clips of split train-unbalanced; data.split=all takes those of" in caplog.text
    with pytest.raises(UserError, match=r"'train': .*test 2, train-balanced 2, train-unbalanced 2"):
        open_stream(small(*words, "data.split=train", out=tmp_path / "run"))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noises in folders called by dates."""
    root = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for i in range(8):
        path = root / f"2021-05-0{i % 2 + 1}" / f"{i}.flac"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(rng.uniform(-0.5, 0.5, 8_000), sample_rate=16_000, codec="flac"))
    return root


def test_names_of_folders_are_no_labels_unless_told(
    small, tmp_path: Path, recordings: Path, caplog
) -> None:
    words = ("task=folder", f"data.root={recordings}", "data.batch=2", f"data.cache={tmp_path}")
    stream = open_stream(small(*words, out=tmp_path / "run"))
    assert stream.index is not None
    assert stream.index.classes == 0
    assert stream.describe() == "8 clips (task folder; no labels)"
    with pytest.raises(UserError, match=r"data.labels=folders takes the names of the folders"):
        pretrain(small(*words, "online.every=1", out=tmp_path / "none"))
    told = (*words, "data.labels=folders")
    stream = open_stream(small(*told, out=tmp_path / "run"))
    classes = "2 classes: 2021-05-01, 2021-05-02"
    assert stream.describe() == f"8 clips (task folder; {classes})"
    run = small(*told, "online.every=1", "online.steps=1", "train.steps=1", out=tmp_path / "run")
    pretrain(run)
    log = (tmp_path / "run/train.log").read_text()
    assert f"online probe: 8 clips, {classes}" in log


def test_open_stream__csv_is_read_where_it_lies_and_needs_no_labels(
    small, tmp_path: Path, recordings: Path
) -> None:
    files = sorted(recordings.rglob("*.flac"))
    csv = tmp_path / "mine.csv"
    csv.write_text("path\n" + "".join(f"{file}\n" for file in files))
    cache = tmp_path / "cache"
    words = (f"data.csv={csv}", "data.batch=2", f"data.cache={cache}")
    stream = open_stream(small(*words, out=tmp_path / "run"))
    assert stream.describe() == "8 clips (task csv; no labels)"
    assert sorted(keys_of(stream, 4)) == sorted(
        escape_key(str(f)[1:-5].replace("/", "__")) for f in files
    )
    assert [path.suffix for path in cache.iterdir()] == [".json"]  # no shards
    splits = ("training", "training", "training", "Eval")
    lines = [f"{file},{'ab'[i % 2]},{splits[i // 2]}\n" for i, file in enumerate(files)]
    csv.write_text("path,label,split\n" + "".join(lines))
    words += ("online.every=1", "online.steps=1", "train.steps=1")
    pretrain(small(*words, out=tmp_path / "run"))
    log = (tmp_path / "run/train.log").read_text()
    assert "pre-training on the 6 clips of split train" in log
    assert "online probe: 8 clips, 2 classes: a, b" in log
    csv.write_text("path,lable\na.wav,x\n")
    with pytest.raises(UserError, match="unknown column 'lable'"):
        open_stream(small(*words, out=tmp_path / "run"))


def test_data_labels_folders_is_for_folders(small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.labels=folders is for a folder of audio"):
        open_stream(small("data.labels=folders", out=tmp_path / "run"))


def test_online_probes_say_which_classes_cannot_be_learned(small, tmp_path: Path, caplog) -> None:
    folder = tmp_path / "a"
    make_set(folder, clips=8)
    rows = [
        Row(path, path.stem, ("abABaabc"[i],), split=("train", "train", "train", "test")[i // 2])
        for i, path in enumerate(sorted((folder / "audio").iterdir()))
    ]
    shards = tmp_path / "shards"
    write_shards(rows, shards, shard_bytes=36_000)
    words = (f"data.shards={shards}", "online.every=1", "online.steps=1", "train.steps=1")
    pretrain(small(*words, "data.batch=2", out=tmp_path / "run"))
    log = (tmp_path / "run/train.log").read_text()
    assert "online probe: no training clip where they are held out" in log
    assert "'c' (the only round)" in log
    assert "'A' and 'a'" in log
