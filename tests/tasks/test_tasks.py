"""Tasks: what they read, and what they say when it is not there."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bat.errors import UserError
from bat.tasks import audioset as audioset_module
from bat.tasks.base import LeftOut, known_tasks, load_task


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


ESC50_META = "filename,fold,target,category,esc10,src_file,take\n" + "".join(
    f"{fold}-{c}-A.wav,{fold},{c},class{c:02d},{c < 10},{c},A\n"
    for fold in range(1, 6)
    for c in range(50)
)


@pytest.fixture
def esc50(tmp_path: Path) -> Path:
    names = [line.split(",")[0] for line in ESC50_META.splitlines()[1:]]
    return lay(tmp_path, {"meta/esc50.csv": ESC50_META} | {f"audio/{n}": "" for n in names})


def test_esc10_has_400_rows_10_labels_5_folds_of_80(esc10: Path) -> None:
    rows, names = load_task("esc10").read(esc10)
    assert len(rows) == 400
    assert len({row.key for row in rows}) == 400
    assert len(names) == 10
    assert Counter(row.fold for row in rows) == dict.fromkeys(range(1, 6), 80)
    assert Counter(row.labels for row in rows) == {(name,): 40 for name in names}
    assert all(row.path.is_file() for row in rows)


def test_esc50_reads_its_published_layout_and_esc10_its_part_of_it(esc50: Path) -> None:
    rows, names = load_task("esc50").read(esc50)
    assert (len(rows), len(names)) == (250, 50)
    rows, names = load_task("esc10").read(esc50)
    assert (len(rows), len(names)) == (50, 10)
    assert names[0] == "class00"


def test_esc50_on_esc10_data_names_the_number_of_classes(esc10: Path) -> None:
    with pytest.raises(UserError, match="10 classes, task 'esc50' has 50"):
        load_task("esc50").read(esc10)


@pytest.mark.parametrize(
    ("remove", "says"),
    [
        ("meta/esc50.csv", "neither meta/esc50.csv nor meta.csv"),
        ("audio/1-0-A.wav", "1 of 250 clips .*1-0-A.wav"),
    ],
)
def test_esc50_says_what_is_missing(esc50: Path, remove: str, says: str) -> None:
    (esc50 / remove).unlink()
    with pytest.raises(UserError, match=says):
        load_task("esc50").read(esc50)


def test_esc50_says_which_column_is_missing_and_which_value_is_wrong(esc50: Path) -> None:
    (esc50 / "meta/esc50.csv").write_text("filename,fold\n")
    with pytest.raises(UserError, match="lacks column 'category'; it has: filename, fold"):
        load_task("esc50").read(esc50)
    (esc50 / "meta/esc50.csv").write_text("filename,fold,category\n1-0-A.wav,one,dog\n")
    with pytest.raises(UserError, match="fold 'one' is not a whole number"):
        load_task("esc50").read(esc50)


def test_folder_labels_by_subfolder(tmp_path: Path) -> None:
    lay(tmp_path, dict.fromkeys(("dog/1.wav", "dog/2.FLAC", "cat/1.wav", "cat/no.txt"), ""))
    rows, names = load_task("folder").read(tmp_path)
    assert [(r.key, r.labels) for r in rows] == [
        ("cat__1", ("cat",)),
        ("dog__1", ("dog",)),
        ("dog__2", ("dog",)),
    ]
    assert names == ["cat", "dog"]


@pytest.mark.parametrize("files", [("a.wav", "b.ogg"), ("audio/a.wav", "audio/b.ogg")])
def test_folder_without_subfolders_is_unlabelled(tmp_path: Path, files: tuple[str, ...]) -> None:
    lay(tmp_path, dict.fromkeys(files, ""))
    rows, names = load_task("folder").read(tmp_path)
    assert [row.labels for row in rows] == [(), ()]
    assert names == []


def test_folder_takes_train_and_test_for_splits(tmp_path: Path) -> None:
    lay(tmp_path, dict.fromkeys(("train/dog/1.wav", "train/cat/1.wav", "Test/dog/2.wav"), ""))
    rows, _ = load_task("folder").read(tmp_path)
    assert [(r.key, r.labels, r.split) for r in rows] == [
        ("Test__dog__2", ("dog",), "test"),
        ("train__cat__1", ("cat",), "train"),
        ("train__dog__1", ("dog",), "train"),
    ]
    lay(tmp_path / "plain", dict.fromkeys(("train/1.wav", "test/1.wav"), ""))
    rows, _ = load_task("folder").read(tmp_path / "plain")
    assert [(r.labels, r.split) for r in rows] == [((), "test"), ((), "train")]
    lay(tmp_path, {"cat/1.wav": ""})  # not all of it lies in splits: these are labels
    assert {r.split for r in load_task("folder").read(tmp_path)[0]} == {None}


def test_folders_of_splits_get_the_names_that_training_looks_for(tmp_path: Path) -> None:
    said = {
        "train": ("Train", "training"),
        "valid": ("val", "Valid", "VALIDATION", "dev"),
        "test": ("Testing", "TEST", "eval", "evaluation"),
    }
    lay(tmp_path, {f"{folder}/{folder}.wav": "" for group in said.values() for folder in group})
    rows, _ = load_task("folder").read(tmp_path)
    assert {r.path.stem: r.split for r in rows} == {
        folder: split for split, group in said.items() for folder in group
    }
    lay(tmp_path, {"clips.csv": "path,split\neval/eval.wav,eval\nTrain/Train.wav,Train\n"})
    rows, _ = load_task("folder").read(tmp_path / "clips.csv")
    assert [r.split for r in rows] == ["eval", "Train"]  # a column stays as it is given


def test_folder_keeps_files_apart_that_differ_in_suffix(tmp_path: Path) -> None:
    lay(tmp_path, dict.fromkeys(("x/a.wav", "x/a.mp3", "y/b.wav"), ""))
    rows, _ = load_task("folder").read(tmp_path)
    assert sorted(row.key for row in rows) == ["x__a.mp3", "x__a.wav", "y__b"]


def test_csv_with_one_label_keeps_its_commas(tmp_path: Path) -> None:
    text = 'path, label, fold, split\nwav/1.wav,"Speech, male",1,train\nwav/2.wav,Dog,2,test\n'
    lay(tmp_path, {"clips.csv": text, "wav/1.wav": "", "wav/2.wav": ""})
    rows, names = load_task("folder").read(tmp_path / "clips.csv")
    assert names == ["Dog", "Speech, male"]
    assert [(r.key, r.labels, r.fold, r.split) for r in rows] == [
        ("wav__1", ("Speech, male",), 1, "train"),
        ("wav__2", ("Dog",), 2, "test"),
    ]


@pytest.mark.parametrize(
    ("first", "labels"), [("a; b", ("a", "b")), ('"a,b"', ("a", "b")), ("", ())]
)
def test_csv_with_several_labels(tmp_path: Path, first: str, labels: tuple[str, ...]) -> None:
    lay(tmp_path, {"clips.csv": f"path,labels\n1.wav,{first}\n2.wav,b\n", "1.wav": ""})
    rows, _ = load_task("folder").read(tmp_path / "clips.csv")
    assert rows[0].labels == labels
    task = load_task("folder").settle([len(row.labels) for row in rows])
    assert task.multi_label == (len(labels) > 1)
    assert (task.loss, task.metric) == (("bce", "map") if task.multi_label else ("ce", "accuracy"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("place,label\na.wav,x\n", "unknown column 'place'.*known are path, label"),
        ("path,lable\na.wav,x\n", "unknown column 'lable' .*'label'.*; known are path, label"),
        ("path,label\na.wav,x\nb.wav,\"['x', y]\"\n", "line 3: .* is no list of labels"),
        ("path,label,labels\na.wav,x,y\n", "both 'label' and 'labels'"),
        ("path,label\n", "lists no clips"),
        ("path,label\nnowhere.wav,x\n", "none of the 1 files .* relative to the CSV"),
        ("path,label\na.wav,x\na.wav,y\n", "'a.wav' is listed twice"),
    ],
)
def test_csv_mistakes(tmp_path: Path, text: str, says: str) -> None:
    lay(tmp_path, {"clips.csv": text, "a.wav": ""})
    with pytest.raises(UserError, match=says):
        load_task("folder").read(tmp_path / "clips.csv")


def test_a_folder_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path, {"a/1.wav": "", "b/1.wav": ""})
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"folder .*/b cannot be read: Permission denied"):
        load_task("folder").read(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no audio"):
        load_task("folder").read(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_task("folder").read(tmp_path / "none")
    with pytest.raises(UserError, match="neither a folder nor a"):
        load_task("folder").read(lay(tmp_path, {"x.wav": ""}) / "x.wav")


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


def test_audioset_reads_its_own_csvs_and_leaves_absent_clips_out(audioset: Path) -> None:
    rows, names = load_task("audioset").read(audioset)
    assert len(names) == 527
    assert names[526] == "Sound, 526"  # the official order, not the alphabetical one
    assert [(r.key, r.labels, r.mids, r.split, r.start_seconds) for r in rows] == [
        ("Y--PJ_abc", ("Sound, 526", "Sound, 3"), ("/m/526", "/m/3"), "train-balanced", 30.0),
        ("Yxyz-1", ("Sound, 0",), ("/m/0",), "test", 5.0),
    ]


def test_audioset_lists_what_is_absent(audioset: Path) -> None:
    """Once each, and not what another table's line finds."""
    again = 'notThere, 0.000, 10.000, "/m/1"\nxyz-1, 70.000, 80.000, "/m/0"\n'
    with (audioset / "balanced_train_segments.csv").open("a") as file:
        file.write(again)
    found = audioset_module.read(audioset)
    assert found.left_out == [LeftOut("YnotThere", "YnotThere", "no file", "train-balanced")]
    assert found.notes[0] == "1 of 5 segments have no audio file: left out"
    task = load_task("audioset")
    assert task.left_out is not None
    assert task.left_out(audioset) == found.left_out


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
def test_audioset_mistakes(audioset: Path, change: dict[str, str | None], says: str) -> None:
    for name, text in change.items():
        if text is None:
            (audioset / name).unlink()
        else:
            (audioset / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=says):
        load_task("audioset").read(audioset)


@pytest.fixture
def ontology(audioset: Path) -> Path:
    (audioset / "class_labels_indices.csv").unlink()
    mids = ("/m/526", "/m/3", "/m/1", "/m/0", "/m/77")
    names = ("zebra", "ant", "bee", "ant", "never")
    entries = [{"id": m, "name": n, "child_ids": []} for m, n in zip(mids, names, strict=True)]
    return lay(audioset, {"ontology.json": json.dumps(entries)})


def test_audioset_with_its_ontology_alone_has_the_classes_that_occur(ontology: Path) -> None:
    found = audioset_module.read(ontology)
    # /m/1 occurs in a segment whose clip is absent; two classes called ant are told apart
    assert found.vocabulary == ["ant (/m/0)", "ant (/m/3)", "bee", "zebra"]
    assert [(r.labels, r.mids) for r in found.rows] == [
        (("zebra", "ant (/m/3)"), ("/m/526", "/m/3")),
        (("ant (/m/0)",), ("/m/0",)),
    ]
    assert found.notes[0] == "1 of 3 segments have no audio file: left out"
    assert "ontology.json has no order of classes: they are the 4" in found.notes[1]
    assert load_task("audioset").vocabulary(ontology) == found.vocabulary


def test_audioset_by_one_of_its_csvs(audioset: Path) -> None:
    found = audioset_module.read(audioset / "eval_segments.csv")
    assert [r.key for r in found.rows] == ["Yxyz-1"]
    assert len(found.vocabulary) == 527


def test_every_file_of_the_room_is_a_task_named_like_it() -> None:
    names = ["audioset", "eat", "esc10", "esc50", "folder", "own", "parquet"]
    assert known_tasks() == [*names, "toy", "toy_events", "toy_tokens"]
    for name in known_tasks():
        assert load_task(name).name == name


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="no task 'esc51': known are audioset, eat, esc10, esc50"):
        load_task("esc51")
    with pytest.raises(UserError, match="no TASK"):
        load_task("bat.types")
    with pytest.raises(UserError, match="cannot be imported"):
        load_task("mylab.none")


def test_a_task_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from bat.tasks.esc50 import TASK as T\nimport dataclasses\n"
    lay(tmp_path, {"outside_lab/frogs.py": text + "TASK = dataclasses.replace(T, name='frogs')\n"})
    monkeypatch.syspath_prepend(tmp_path)
    assert load_task("outside_lab.frogs").name == "frogs"
    sys.modules.pop("outside_lab.frogs", None)


def test_a_single_label_task_refuses_several_labels() -> None:
    assert load_task("esc50").settle([1, 1, 0]).loss == "ce"
    assert load_task("audioset").settle([3]).loss == "asl"
    with pytest.raises(UserError, match="one label a clip"):
        load_task("esc50").settle([1, 2])


def test_esc_label_sets_hold_the_classes_of_the_published_files(esc10: Path) -> None:
    own, in_esc50 = load_task("esc10").label_sets
    (esc50,) = load_task("esc50").label_sets
    assert (len(own), len(in_esc50), len(esc50)) == (10, 10, 50)
    assert in_esc50 < esc50
    assert own == set(load_task("esc10").read(esc10)[1])


def test_audioset_has_a_split_for_each_of_its_tables(audioset: Path) -> None:
    line = ', 0.000, 10.000, "/m/1"\n'
    text = f"un-1{line}un-2{line}--PJ_abc{line}"
    lay(audioset, {"unbalanced_train_segments.csv": text, "mine_segments.csv": f"own-1{line}"})
    lay(audioset, dict.fromkeys(("un-1.wav", "own-1.wav"), ""))
    found = audioset_module.read(audioset)
    assert {row.key: row.split for row in found.rows} == {
        "Y--PJ_abc": "train-balanced",
        "Yun-1": "train-unbalanced",
        "Yown-1": "mine",
        "Yxyz-1": "test",
    }
    assert LeftOut("Yun-2", "Yun-2", "no file", "train-unbalanced") in found.left_out
    said = "1 clips are in two tables: they have the split of the first (Y--PJ_abc: train-balanced)"
    assert said in found.notes
