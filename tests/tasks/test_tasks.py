"""Tasks: how they are found, what they read, and what they say when it is not there."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bat import registry
from bat.errors import UserError
from bat.tasks.base import LeftOut, load_task
from tests.shard.files import lay


def test_load_task__every_file_of_the_room_is_a_task_named_like_it() -> None:
    names = registry.known("tasks")
    assert {"audioset", "csv", "esc50", "folder", "librispeech", "scv2", "toy_tokens"} <= {*names}
    for name in names:
        assert load_task(name).name == name


def test_load_task__unknown_names_and_dotted_paths_of_other_things_are_refused() -> None:
    with pytest.raises(UserError, match=r"task=esc51 .*'esc50'.* audioset, csv, eat, esc10, esc50"):
        load_task("esc51")
    with pytest.raises(UserError, match=r"task=bat\.types\.Grid is not a bat\.tasks\.base\.Task"):
        load_task("bat.types.Grid")
    with pytest.raises(UserError, match=r"cannot import task=mylab\.none"):
        load_task("mylab.none")


def test_settle__a_single_label_task_refuses_several_labels() -> None:
    assert load_task("esc50").settle([1, 1, 0]).loss == "ce"
    assert load_task("audioset").settle([3]).loss == "asl"
    tags = load_task("folder").settle([1, 2])
    assert (tags.multi_label, tags.loss, tags.metric) == (True, "bce", "map")
    with pytest.raises(UserError, match="one label a clip"):
        load_task("esc50").settle([1, 2])


ESC50_META = "filename,fold,target,category,esc10,src_file,take\n" + "".join(
    f"{fold}-{c}-A.wav,{fold},{c},class{c:02d},{c < 10},{c},A\n"
    for fold in range(1, 6)
    for c in range(50)
)


@pytest.fixture
def esc50(tmp_path: Path) -> Path:
    names = [line.split(",")[0] for line in ESC50_META.splitlines()[1:]]
    return lay(tmp_path, {"meta/esc50.csv": ESC50_META} | {f"audio/{n}": "" for n in names})


def test_esc10__has_400_rows_10_labels_5_folds_of_80(esc10: Path) -> None:
    rows, names = load_task("esc10").read(esc10)
    assert len({row.key for row in rows}) == len(rows) == 400
    assert Counter(row.fold for row in rows) == dict.fromkeys(range(1, 6), 80)
    assert Counter(row.labels for row in rows) == {(name,): 40 for name in names}
    assert all(row.path.is_file() for row in rows)
    own, in_esc50 = load_task("esc10").label_sets
    (published,) = load_task("esc50").label_sets
    assert own == set(names)
    assert in_esc50 < published
    assert (len(in_esc50), len(published)) == (10, 50)
    with pytest.raises(UserError, match="10 classes, task 'esc50' has 50"):
        load_task("esc50").read(esc10)


def test_esc50__reads_its_published_layout_and_esc10_its_part_of_it(esc50: Path) -> None:
    rows, names = load_task("esc50").read(esc50)
    assert (len(rows), len(names)) == (250, 50)
    rows, names = load_task("esc10").read(esc50)
    assert (len(rows), len(names), names[0]) == (50, 10, "class00")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("filename,fold\n", "lacks column 'category'; it has: filename, fold"),
        ("filename,fold,category\n1-0-A.wav,one,dog\n", "fold 'one' is not a whole number"),
        ("filename,fold,category\n1-0-A.wav,1,\n", "'1-0-A.wav' has no category"),
        ("filename,fold,category\nx.wav,1,dog\n", "1 of 1 clips .*x.wav"),
        (None, "neither meta/esc50.csv nor meta.csv"),
    ],
)
def test_esc50__mistakes(esc50: Path, text: str | None, says: str) -> None:
    (esc50 / "meta/esc50.csv").unlink()
    if text is not None:
        lay(esc50, {"meta/esc50.csv": text})
    with pytest.raises(UserError, match=says):
        load_task("esc50").read(esc50)


def test_folder__labels_are_sub_folders(tmp_path: Path) -> None:
    lay(
        tmp_path,
        dict.fromkeys(("dog/1.wav", "dog/1.mp3", "dog/2.FLAC", "cat/1.wav", "x/n.txt"), ""),
    )
    found = load_task("folder").open(tmp_path)
    assert [(r.key, r.labels) for r in found.rows] == [
        ("cat__1", ("cat",)),
        ("dog__1.mp3", ("dog",)),  # two files that differ in suffix
        ("dog__1.wav", ("dog",)),
        ("dog__2", ("dog",)),
    ]
    assert found.vocabulary == ["cat", "dog"]


@pytest.mark.parametrize("files", [("a.wav", "b.ogg"), ("audio/a.wav", "audio/b.ogg")])
def test_folder__without_sub_folders_is_unlabelled(tmp_path: Path, files: tuple[str, ...]) -> None:
    lay(tmp_path, dict.fromkeys(files, ""))
    rows, names = load_task("folder").read(tmp_path)
    assert ([row.labels for row in rows], names) == ([(), ()], [])


def test_folder__of_splits_has_the_names_that_training_looks_for(tmp_path: Path) -> None:
    said = {
        "train": ("Train", "training"),
        "valid": ("val", "Valid", "VALIDATION", "dev"),
        "test": ("Testing", "TEST", "eval", "evaluation"),
    }
    names = [name for group in said.values() for name in group]
    lay(tmp_path / "plain", {f"{name}/{name}.wav": "" for name in names})
    rows, _ = load_task("folder").read(tmp_path / "plain")
    assert {r.path.stem: (r.split, r.labels) for r in rows} == {
        name: (split, ()) for split, group in said.items() for name in group
    }
    lay(tmp_path / "b", dict.fromkeys(("train/dog/1.wav", "train/cat/1.wav", "Test/dog/2.wav"), ""))
    rows, _ = load_task("folder").read(tmp_path / "b")
    assert [(r.key, r.labels, r.split) for r in rows] == [
        ("Test__dog__2", ("dog",), "test"),
        ("train__cat__1", ("cat",), "train"),
        ("train__dog__1", ("dog",), "train"),
    ]
    lay(tmp_path / "b", {"cat/1.wav": ""})  # not all of it lies in splits: these are labels
    assert {r.split for r in load_task("folder").read(tmp_path / "b")[0]} == {None}


def test_folder__what_cannot_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="has no audio"):
        load_task("folder").read(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_task("folder").read(tmp_path / "none")
    lay(tmp_path, {"a/1.wav": "", "b/1.wav": ""})
    with pytest.raises(UserError, match="neither a folder nor a"):
        load_task("folder").read(tmp_path / "a/1.wav")
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"folder .*/b cannot be read: Permission denied"):
        load_task("folder").read(tmp_path)


@pytest.fixture
def audioset(tmp_path: Path) -> Path:
    classes = "index,mid,display_name\n" + "".join(f'{i},/m/{i},"Sound, {i}"\n' for i in range(527))
    head = "# Segments\n# num=2\n# YTID, start_seconds, end_seconds, positive_labels\n"
    return lay(
        tmp_path,
        {
            "class_labels_indices.csv": classes,
            "balanced_train_segments.csv": head
            + '--PJ_abc, 30.000, 40.000, "/m/526,/m/3"\nnotThere, 0.000, 10.000, "/m/1"\n',
            "eval_segments.csv": head + 'xyz-1, 5.000, 15.000, "/m/0"\n',
            "clips/Y--PJ_abc.flac": "",
            "clips/eval/xyz-1_5000.wav": "",
        },
    )


def test_audioset__reads_its_own_csvs_and_lists_absent_clips_once(audioset: Path) -> None:
    again = 'notThere, 0.000, 10.000, "/m/1"\nxyz-1, 70.000, 80.000, "/m/0"\n'
    with (audioset / "balanced_train_segments.csv").open("a") as file:
        file.write(again)  # the second is found by another table's line
    found = load_task("audioset").open(audioset)
    assert len(found.vocabulary) == 527
    assert found.vocabulary[526] == "Sound, 526"  # the official order, not the alphabetical one
    assert [(r.key, r.labels, r.mids, r.split, r.start_seconds) for r in found.rows] == [
        ("Y--PJ_abc", ("Sound, 526", "Sound, 3"), ("/m/526", "/m/3"), "train-balanced", 30.0),
        ("Yxyz-1", ("Sound, 0",), ("/m/0",), "test", 5.0),
    ]
    assert found.left_out == [LeftOut("YnotThere", "YnotThere", "no file", "train-balanced")]
    assert found.notes == ["1 of 5 segments have no audio file: left out"]
    alone = load_task("audioset").open(audioset / "eval_segments.csv")
    assert ([r.key for r in alone.rows], len(alone.vocabulary)) == (["Yxyz-1"], 527)


def test_audioset__has_a_split_for_each_of_its_tables(audioset: Path) -> None:
    line = ', 0.000, 10.000, "/m/1"\n'
    text = f"un-1{line}un-2{line}--PJ_abc{line}"
    lay(audioset, {"unbalanced_train_segments.csv": text, "mine_segments.csv": f"own-1{line}"})
    lay(audioset, dict.fromkeys(("un-1.wav", "own-1.wav"), ""))
    found = load_task("audioset").open(audioset)
    assert {row.key: row.split for row in found.rows} == {
        "Y--PJ_abc": "train-balanced",
        "Yun-1": "train-unbalanced",
        "Yown-1": "mine",
        "Yxyz-1": "test",
    }
    assert LeftOut("Yun-2", "Yun-2", "no file", "train-unbalanced") in found.left_out
    said = "1 clips are in two tables: they have the split of the first (Y--PJ_abc: train-balanced)"
    assert said in found.notes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"class_labels_indices.csv": None}, "class_labels_indices.csv does not exist"),
        (
            {"class_labels_indices.csv": "index,mid,display_name\n0,/m/0,x\n"},
            "'/m/526' of Y--PJ_abc",
        ),
        ({"eval_segments.csv": "xyz-1, 5.000\n"}, "is not 'YTID, start, end"),
        ({"eval_segments.csv": "caf\udce9"}, "eval_segments.csv line 1 is not UTF-8"),
        ({"clips/Y--PJ_abc.flac": None, "clips/eval/xyz-1_5000.wav": None}, "none of the 3 segm"),
        ({"eval_segments.csv": None, "balanced_train_segments.csv": None}, "no .*_segments.csv"),
    ],
)
def test_audioset__mistakes(audioset: Path, change: dict[str, str | None], says: str) -> None:
    for name, text in change.items():
        (audioset / name).unlink()
        if text is not None:
            (audioset / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=says):
        load_task("audioset").read(audioset)


def test_audioset__with_its_ontology_alone_has_the_classes_that_occur(audioset: Path) -> None:
    (audioset / "class_labels_indices.csv").unlink()
    mids = ("/m/526", "/m/3", "/m/1", "/m/0", "/m/77")
    names = ("zebra", "ant", "bee", "ant", "never")
    entries = [{"id": m, "name": n, "child_ids": []} for m, n in zip(mids, names, strict=True)]
    lay(audioset, {"ontology.json": json.dumps(entries)})
    found = load_task("audioset").rows(audioset)
    # /m/1 occurs in a segment whose clip is absent; two classes called ant are told apart
    assert found.vocabulary == ["ant (/m/0)", "ant (/m/3)", "bee", "zebra"]
    assert [(r.labels, r.mids) for r in found.rows] == [
        (("zebra", "ant (/m/3)"), ("/m/526", "/m/3")),
        (("ant (/m/0)",), ("/m/0",)),
    ]
    assert "ontology.json has no order of classes: they are the 4" in found.notes[1]
