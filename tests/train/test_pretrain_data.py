"""Pre-training on parts, weights, mixtures, other people's shards, and ones without an index."""

from __future__ import annotations

import functools
import gzip
import json
import logging
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from bat.audio.encode import encode
from bat.data.tar import escape_key
from bat.errors import UserError
from bat.io import read_jsonl
from bat.shard.write import write_shards
from bat.tasks.base import Row
from bat.train.pretrain_data import open_stream
from bat.train.run_pretrain import pretrain
from tests.train.runs import assert_same_run, damage, run_and_cut


def make_set(
    folder: Path,
    *,
    clips: int,
    labels: tuple[str, ...] = ("noise",),
    splits: tuple[str | None, ...] = (None,),
    seed: int = 0,
) -> Path:
    """``clips`` half-second noises as shards of two or three each; labels and splits in turn."""
    audio = folder / "audio"
    audio.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(clips):
        path = audio / f"{folder.name}{i}.flac"
        wave = rng.uniform(-0.5, 0.5, 8_000)
        path.write_bytes(encode(wave, sample_rate=16_000, codec="flac"))
        label, split = labels[i % len(labels)], splits[i % len(splits)]
        rows.append(Row(path, path.stem, (label,), split=split))
    write_shards(rows, folder / "shards", shard_bytes=36_000)
    return folder / "shards"


def keys_of(stream, count: int) -> list[str]:
    """Keys of the first ``count`` micro-batches."""
    batches = iter(stream.data.train_dataloader())
    return [key for _ in range(count) for key in next(batches).keys]


def log_of(out: Path) -> str:
    return (out / "train.log").read_text()


@pytest.mark.parametrize(
    ("splits", "word", "wanted"),
    [
        (("train", "test"), "", {0, 2, 4}),
        (("train", "test"), "data.split=test", {1, 3, 5}),
        (("train", "test"), "data.split=all", set(range(6))),
        (("train-balanced", "train-unbalanced", "test"), "", {1, 4}),
        (
            ("train-balanced", "train-unbalanced", "test"),
            "data.split=train-balanced,train-unbalanced",
            {0, 1, 3, 4},
        ),
        (("north",), "", set(range(6))),
        ((None,), "", set(range(6))),
    ],
)
def test_split__takes_these_clips_and_says_which_are_left_out(
    small, tmp_path: Path, caplog, splits, word: str, wanted: set[int]
) -> None:
    shards = make_set(tmp_path / "a", clips=6, splits=splits)
    words = [f"data.shards={shards}", "data.batch=2", word]
    with caplog.at_level(logging.INFO, logger="bat"):
        stream = open_stream(small(*filter(None, words), out=tmp_path / "run"))
    assert set(keys_of(stream, 3)) == {f"a{i}" for i in wanted}
    left_out = "data.split=all takes those of" in caplog.text
    assert left_out == (not word and len(wanted) < 6)
    assert ("(north) is called train" in caplog.text) == (splits == ("north",))


@pytest.mark.parametrize(
    ("splits", "word", "said"),
    [
        (("test",), "seed=0", "the splits test 4: none of them is called train"),
        (("train", "test"), "data.split=valid", "no clip has split 'valid': the data has the spl"),
        (("train-balanced", "test"), "data.split=train", "'train': .*test 2, train-balanced 2"),
    ],
)
def test_split__what_is_not_there_is_refused(small, tmp_path: Path, splits, word, said) -> None:
    shards = make_set(tmp_path / "a", clips=4, splits=splits)
    with pytest.raises(UserError, match=said):
        open_stream(small(f"data.shards={shards}", word, out=tmp_path / "run"))


def test_mix__two_sets_train_and_resume_bit_for_bit(small, tmp_path: Path, monkeypatch) -> None:
    a, b = (make_set(tmp_path / name, clips=6, seed=i) for i, name in enumerate("ab"))
    words = (f"data.shards=[{a}, {b}]", "data.mix=[3, 1]", "data.batch=4", "train.steps=4")
    keys = keys_of(open_stream(small(*words, out=tmp_path / "run")), 4)
    assert {key[0] for key in keys} == {"a", "b"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(small(*words, out=whole))
    run_and_cut(monkeypatch, small(*words, out=parts), at=3)
    pretrain(small(*words, out=parts))
    assert_same_run(whole, parts)
    with pytest.raises(UserError, match=r"data\.mix"):
        pretrain(small(*words, "data.mix=[1, 1]", out=whole))
    order = json.loads((whole / "summary.json").read_text())["data"]["order"]
    assert order.startswith("750 in 1000 of 6 clips")


def test_balance__draws_the_rare_class_as_often(small, tmp_path: Path) -> None:
    shards = make_set(tmp_path / "a", clips=20, labels=("rare", *("c",) * 9))
    words = (f"data.shards={shards}", "data.batch=2")
    words += ("data.balance=class", "data.epoch_clips=2", "train.steps=300")
    keys = keys_of(open_stream(small(*words, out=tmp_path / "run")), 300)
    rare = np.mean([key in ("a0", "a10") for key in keys])
    assert 0.38 < rare < 0.55  # 0.5, less what drawing without replacement takes


def test_labels__of_other_sets_are_refused_or_dropped(small, tmp_path: Path) -> None:
    a, b = (make_set(tmp_path / n, clips=2, labels=(n,)) for n in ("dog", "cat"))
    words = (f"data.shards=[{a}, {b}]", "data.batch=2")
    with pytest.raises(UserError, match=r"different labels[^$]*data\.labels=drop"):
        open_stream(small(*words, out=tmp_path / "run"))
    stream = open_stream(small(*words, "data.labels=drop", out=tmp_path / "run"))
    assert stream.index is not None
    assert stream.index.classes == 0
    assert set(keys_of(stream, 2)) == {"dog0", "dog1", "cat0", "cat1"}
    with pytest.raises(UserError, match="labelled clips"):
        pretrain(small(*words, "data.labels=drop", "online.every=2", out=tmp_path / "run"))


def test_bad_clips__are_listed_in_the_folder_of_the_run(small, tmp_path: Path) -> None:
    shards = make_set(tmp_path / "a", clips=6)
    damage(shards, 1)
    out = tmp_path / "run"
    pretrain(small(f"data.shards={shards}", "data.batch=3", "data.max_bad=1", out=out))
    (bad,) = read_jsonl(out / "bad_clips.jsonl")
    assert (bad["key"], bad["shard"], bad["kind"]) == ("a1", "shard-00000.tar", "corrupt")
    with pytest.raises(UserError, match=r"Most are in shard-00000\.tar \(\d+\); all are listed in"):
        pretrain(small(f"data.shards={shards}", "data.batch=3", out=out / "again"))


def test_bad_clips__a_dry_run_names_one_if_none_can_be_read(small, tmp_path: Path) -> None:
    shards = make_set(tmp_path / "a", clips=3)
    damage(shards, 0, 1, 2)
    with pytest.raises(UserError, match=r"no clip .*the first: a\d, corrupt: .*bat-shard verify"):
        pretrain(small(f"data.shards={shards}", out=tmp_path / "run"), dry_run=True)


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
def test_compressed_shards__train_from_front_to_end_and_say_what_that_means(
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
    if workers:
        return
    keys = keys_of(stream, 3)
    assert sorted(keys) == sorted(f"z{i}" for i in range(12))  # an epoch, each once
    for word, message in (
        ("data.epoch_clips=3", r"data\.epoch_clips=3 needs an index, but .* compressed"),
        ("data.window=100", r"data\.window=100 needs an index"),
        ("online.every=1", "online probes on the training set need an index"),
    ):
        with pytest.raises(UserError, match=message):
            open_stream(small(*words, word, out=out))


def test_compressed_shards__obey_data_split(small, tmp_path: Path, packed: Path, caplog) -> None:
    parts = tmp_path / "parts"
    for i, shard in enumerate(sorted(packed.iterdir())):
        split = parts / ("test" if i == 0 else "train")
        split.mkdir(parents=True, exist_ok=True)
        shutil.copy(shard, split / shard.name)
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


def test_compressed_shards__lost_ones_stop_a_run(small, tmp_path: Path, packed: Path) -> None:
    bad = sorted(packed.iterdir())[0]
    bad.write_bytes(b"\x1f\x8b rubbish")
    words = (f"data.shards={packed}", "data.batch=4", "train.steps=100", "data.max_bad=0.14")
    out = tmp_path / "run"
    says = rf"15 of the latest \d+ shards broke off \(the last: {bad.name}, .*max_bad=0.14"
    with pytest.raises(UserError, match=says):
        pretrain(small(*words, out=out))
    (line,) = read_jsonl(out / "bad_clips.jsonl")
    assert (line["shard"], line["key"], line["kind"]) == (bad.name, "", "unreadable")


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


def test_folder__names_are_no_labels_unless_told(small, tmp_path: Path, recordings: Path) -> None:
    words = ("task=folder", f"data.root={recordings}", "data.batch=2", f"data.cache={tmp_path}")
    stream = open_stream(small(*words, out=tmp_path / "run"))
    assert stream.describe() == "8 clips (task folder; no labels)"
    with pytest.raises(UserError, match=r"data.labels=folders takes the names of the folders"):
        pretrain(small(*words, "online.every=1", out=tmp_path / "none"))
    told = (*words, "data.labels=folders", "online.every=1", "online.steps=1", "train.steps=1")
    pretrain(small(*told, out=tmp_path / "run"))
    assert "online probe: 8 clips, 2 classes: 2021-05-01, 2021-05-02" in log_of(tmp_path / "run")
    with pytest.raises(UserError, match=r"data.labels=folders is for a folder of audio"):
        open_stream(small("data.labels=folders", out=tmp_path / "run"))


def test_csv__is_read_where_it_lies_and_needs_no_labels(
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
    assert "pre-training on the 6 clips of split train" in log_of(tmp_path / "run")
    assert "online probe: 8 clips, 2 classes: a, b" in log_of(tmp_path / "run")
    csv.write_text("path,lable\na.wav,x\n")
    with pytest.raises(UserError, match="unknown column 'lable'"):
        open_stream(small(*words, out=tmp_path / "run"))


def test_online__probes_say_which_classes_cannot_be_learned(small, tmp_path: Path) -> None:
    splits = ("train",) * 6 + ("test",) * 2
    shards = make_set(tmp_path / "a", clips=8, labels=tuple("abABaabc"), splits=splits)
    words = (f"data.shards={shards}", "online.every=1", "online.steps=1", "train.steps=1")
    pretrain(small(*words, "data.batch=2", out=tmp_path / "run"))
    log = log_of(tmp_path / "run")
    assert "online probe: no training clip where they are held out" in log
    assert "'c' (the split)" in log
    assert "'A' and 'a'" in log


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards__give_the_run_over_local_ones(small, tmp_path: Path, workers: int) -> None:
    """Windows for windows, from a plain server (which knows no ranges)."""
    shards = make_set(tmp_path / "a", clips=10)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    order = ("data.shuffle=window", "data.window=4", "train.steps=4")
    remote, local, cache = tmp_path / "remote", tmp_path / "local", tmp_path / "cache"
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    words = (f"data.shards={url}", f"data.workers={workers}", f"data.cache={cache}")
    pretrain(small(*order, *words, out=remote))
    server.shutdown()
    server.server_close()
    pretrain(small(*order, f"data.shards={shards}", out=local))
    assert_same_run(remote, local)
    assert list(cache.rglob("*.tar"))
