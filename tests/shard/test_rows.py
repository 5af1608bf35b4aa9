"""Sources to rows: what each is taken for, what it holds, and the bytes of a row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bat.data.files import read_row
from bat.data.tar import escape_key
from bat.errors import UserError
from bat.shard.rows import detect, open_rows
from bat.tasks.base import LeftOut, load_task
from bat.tasks.parquet import parquet_files
from tests.shard.files import lay, write_tar
from tests.tasks.layouts import MAKERS

SEGMENTS = '# Segments\n# num\n# YTID, start\nabc, 30.000, 40.000, "/m/1"\n'
CLASSES = "index,mid,display_name\n0,/m/0,Speech\n1,/m/1,Dog\n"
META = "filename,fold,category\n" + "".join(
    f"{name}.wav,1,{name}\n" for name in sorted(load_task("esc10").label_sets[1])
)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"a/1.wav": "", "b/2.wav": ""}, "folder"),
        ({"x-0.tar": "", "1.wav": ""}, "shards"),
        ({"train/x-0.tar": "", "test/x-0.tar": ""}, "shards"),
        ({"eval_segments.csv": SEGMENTS, "Yabc.wav": ""}, "audioset"),
        ({"train.tsv": "/root\na.wav\t16000\n", "a.wav": ""}, "eat"),
        ({"train.tsv": "path\tlabel\na.wav\tdog\n", "a.wav": ""}, "folder"),
        ({"data/x/train-0.parquet": ""}, "parquet"),
        ({"meta.csv": META, "audio/dog.wav": ""}, "esc10"),
        ({"meta.csv": META.replace("dog", "cow"), "audio/cow.wav": ""}, "folder"),
        ({"meta.csv": "filename,fold,category\n", "audio/cow.wav": ""}, "folder"),
        ({"meta.csv": "filename,\0\n", "audio/cow.wav": ""}, "folder"),
        ({"clips.csv": "path\na.wav\n", "a.wav": ""}, "folder"),
        ({".cache/x.tar": "", ".hidden.parquet": "", "a.wav": ""}, "folder"),
    ],
)
def test_detect__folder(tmp_path: Path, files: dict[str, str], kind: str) -> None:
    assert detect(lay(tmp_path, files)) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("clips.csv", "folder"),
        ("x.tar", "shards"),
        ("x.tar.gz", "shards"),
        ("x.tsv", "eat"),
        ("x.parquet", "parquet"),
        ("eval_segments.csv", "audioset"),
        ("none-*.tar", "shards"),
        ("none-{0..9}.tar", "shards"),
        ("none-*.parquet", "parquet"),
    ],
)
def test_detect__file_or_pattern(tmp_path: Path, name: str, kind: str) -> None:
    if "none" not in name:
        lay(tmp_path, {name: ""})
    assert detect(tmp_path / name) == kind


def test_open_rows__csv_with_mids_numbers_and_names(tmp_path: Path) -> None:
    text = "path,labels,split\na.wav,/m/1;0,train\nb.wav,Speech,test\n"
    lay(tmp_path, {"clips.csv": text, "a.wav": "a", "b.wav": "bb", "classes.csv": CLASSES})
    found = open_rows(tmp_path / "clips.csv", labels=tmp_path / "classes.csv")
    assert (found.kind, found.vocabulary) == ("csv", ["Speech", "Dog"])
    assert [(r.labels, r.mids) for r in found.rows] == [
        (("Dog", "Speech"), ("/m/1", "/m/0")),
        (("Speech",), ("/m/0",)),
    ]
    test = open_rows(tmp_path / "clips.csv", labels=tmp_path / "classes.csv", split="test")
    assert [r.key for r in test.rows] == ["b"]
    assert test.vocabulary == ["Speech", "Dog"]
    with pytest.raises(UserError, match="no split 'dev': it has test, train"):
        open_rows(tmp_path / "clips.csv", split="dev")
    lay(tmp_path, {"clips.csv": "path,label\na.wav,Cow\n"})
    with pytest.raises(UserError, match=r"label 'Cow' of a\.wav is not in classes\.csv"):
        open_rows(tmp_path / "clips.csv", labels=tmp_path / "classes.csv")


def test_open_rows__audioset_with_another_label_file(tmp_path: Path) -> None:
    lay(tmp_path, {"eval_segments.csv": SEGMENTS, "x/Yabc.wav": ""})
    with pytest.raises(UserError, match=r"class_labels_indices\.csv does not exist"):
        open_rows(tmp_path)
    lay(tmp_path, {"x/labels.csv": CLASSES})
    found = open_rows(tmp_path, labels=tmp_path / "x/labels.csv")
    assert (found.kind, found.vocabulary) == ("audioset", ["Speech", "Dog"])
    assert [(r.key, r.labels, r.split, r.start_seconds) for r in found.rows] == [
        ("Yabc", ("Dog",), "test", 30.0)
    ]


def test_open_rows__published_layouts_are_used_unless_told_otherwise(tmp_path: Path) -> None:
    names = [line.split(",")[0] for line in META.splitlines()[1:]]
    lay(tmp_path, {"meta.csv": META} | {f"audio/{name}": "" for name in names})
    found = open_rows(tmp_path)
    assert (found.kind, len(found.rows), len(found.vocabulary)) == ("esc10", 10, 10)
    assert found.rows[0].fold == 1
    assert "--task folder reads it plainly" in found.notes[0]
    plain = open_rows(tmp_path, task="folder")
    assert (plain.kind, plain.vocabulary) == ("folder", [])
    assert "--task esc50 or esc10 reads labels from it" in plain.notes[0]
    with pytest.raises(UserError, match="10 classes, task 'esc50' has 50"):
        open_rows(tmp_path, task="esc50")
    (tmp_path / "ten.txt").write_text("\n".join(sorted({n[:-4] for n in names}, reverse=True)))
    found = open_rows(tmp_path, labels=tmp_path / "ten.txt")
    assert found.vocabulary[0] == "sneezing"


@pytest.mark.parametrize("task", MAKERS)
def test_detect__a_published_layout_of_each_event_task(task: str, tmp_path: Path) -> None:
    assert detect(MAKERS[task](tmp_path)) == task
    found = open_rows(tmp_path)
    assert found.kind == task
    assert any(f"those of task {task}" in note for note in found.notes)
    for inner in tmp_path.glob("tasks/*"):  # HEAR's
        assert detect(inner) == task


@pytest.mark.parametrize(("task", "files"), [
    ("scv2", ["validation_list.txt", "testing_list.txt", "_background_noise_/x.wav"]),
    ("librispeech", ["train-clean-100/x", "dev-clean/x", "test-clean/x"]),
])  # fmt: skip
def test_detect__a_published_layout_of_speech(task: str, files: list[str], tmp_path: Path) -> None:
    assert detect(lay(tmp_path, dict.fromkeys(files, ""))) == task


def test_open_rows__a_setting_in_place_of_the_source_is_pointed_at() -> None:
    with pytest.raises(UserError, match=r"'recipe=scv2' is a setting .*bat-shard DIR OUT"):
        open_rows(Path("recipe=scv2"))


def test_open_rows__csv_in_the_folder_is_pointed_at(tmp_path: Path) -> None:
    lay(tmp_path, {"clips.csv": "\ufeffpath, label\na.wav,x\n", "a.wav": ""})
    assert "clips.csv lists files: give it as the source" in open_rows(tmp_path).notes[0]


CONFIT: dict[str, bytes | dict[str, Any]] = {
    "Yb.wav": b"RIFFb",
    "Yb.json": {"id": "Yb", "label": ["Dog", "Speech"], "label_id": [2, 0]},
    "Ya.wav": b"RIFF-a",
    "Ya.json": {"id": "Ya", "label": ["Dog"], "label_id": [2]},
}


def test_open_rows__confit_shards_with_splits_in_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/shard-00000.tar", CONFIT)
    write_tar(tmp_path / "test/shard-00000.tar", {"Yc.wav": b"RIFFc", "Yc.json": {"label_id": [0]}})
    found = open_rows(tmp_path, split="train")
    assert found.kind == "shards"
    assert [(r.key, r.labels, r.split, r.suffix, read_row(r)) for r in found.rows] == [
        ("Yb", ("Dog", "Speech"), "train", "wav", b"RIFFb"),
        ("Ya", ("Dog",), "train", "wav", b"RIFF-a"),
    ]
    assert open_rows(tmp_path / "train").vocabulary == ["Speech", "class 1", "Dog"]
    assert [r.split for r in open_rows(tmp_path / "train").rows] == [None, None]
    assert open_rows(tmp_path / "t*/shard-00000.tar").rows[0].key == "Yc"
    lay(tmp_path, {"names.txt": "Speech\nCat\nDog\n"})
    found = open_rows(tmp_path, labels=tmp_path / "names.txt")
    assert found.vocabulary == ["Speech", "Cat", "Dog"]
    assert [r.labels for r in found.rows] == [("Speech",), ("Dog", "Speech"), ("Dog",)]


def test_open_rows__fields_of_our_shards_and_laions(tmp_path: Path) -> None:
    meta = {
        "id": "song.v3",
        "label": ["Dog"],
        "mid": ["/m/1"],
        "fold": 2,
        "split": "dev",
        "start_seconds": 20.5,
    }
    key = escape_key("song.v3")
    laion = {"text": ["a bark"], "tag": [], "original_data": {"class_labels": ["Bark"]}}
    write_tar(
        tmp_path / "a.tar",
        {
            f"{key}.flac": b"fLaC",
            f"{key}.json": meta,
            "1.flac": b"fLaC1",
            "1.json": laion,
            "2.flac": b"fLaC2",
            "2.json": {"text": "no label", "id": "../../x", "start_seconds": "soon"},
            "3.m4a": b"ftyp",
        },
    )
    found = open_rows(tmp_path / "a.tar")
    assert found.vocabulary == ["Bark", "Dog"]
    first, second, third = found.rows
    assert (first.key, first.mids, first.fold, first.split) == ("song.v3", ("/m/1",), 2, "dev")
    assert first.start_seconds == 20.5
    assert (second.labels, second.key) == (("Bark",), "1")
    assert (third.labels, third.key, third.start_seconds) == ((), "2", 0.0)
    assert "1 members of the shards left out: no decoder for m4a" in found.notes[0]
    why = "no decoder for m4a: convert it with ffmpeg"
    assert found.left_out == [LeftOut("3", "a.tar/3.m4a", why)]
    assert first.name == "a.tar/song.v3"


def test_open_rows__splits_of_folders_by_either_name(tmp_path: Path) -> None:
    for folder in ("training", "Dev", "other"):
        write_tar(tmp_path / folder / "s.tar", {f"{folder}.flac": b"x", f"{folder}.m4a": b"y"})
    found = open_rows(tmp_path)
    assert {r.key: r.split for r in found.rows} == {
        "training": "train",
        "Dev": "valid",
        "other": "other",
    }
    for split in ("dev", "valid"):
        found = open_rows(tmp_path, split=split)
        assert [r.key for r in found.rows] == ["Dev"]
        assert [entry.split for entry in found.left_out] == ["valid"]
    with pytest.raises(UserError, match="no split 'eval': it has other, train, valid"):
        open_rows(tmp_path, split="eval")


def test_open_rows__keys_of_several_shards_are_told_apart(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for i in range(2):
            write_tar(tmp_path / split / f"s{i}.tar", {"0.flac": b"x", f"{split}{i}.flac": b"y"})
    keys = [row.key for row in open_rows(tmp_path).rows]
    assert keys == [
        "test__s0__0",
        "test0",
        "test__s1__0",
        "test1",
        "train__s0__0",
        "train0",
        "train__s1__0",
        "train1",
    ]
    lay(tmp_path, {"clips.csv": "path\nx.wav\nx.wav\n", "x.wav": ""})
    with pytest.raises(UserError, match=r"'x\.wav' is listed twice in .*clips\.csv"):
        open_rows(tmp_path / "clips.csv")


def test_open_rows__shards_and_parquet_in_linked_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "disk/s.tar", {"0.flac": b"x"})
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train").symlink_to("../disk")
    found = open_rows(tmp_path / "set")
    assert (found.kind, [row.split for row in found.rows]) == ("shards", ["train"])
    (tmp_path / "disk/s.tar").rename(tmp_path / "disk/s.parquet")
    assert detect(tmp_path / "set") == "parquet"
    assert parquet_files(tmp_path / "set") == [tmp_path / "set/train/s.parquet"]


def test_open_rows__split_that_could_leave_the_folder_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.flac": b"x", "0.json": {"split": "../../etc"}})
    with pytest.raises(UserError, match=r"split '\.\./\.\./etc' cannot be the name of a folder"):
        open_rows(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "nowhere does not exist"),
        ("s3://bucket/x.tar", "is not a path of this machine"),
        ("pipe:cat x.tar", "is not a path of this machine"),
        ("x-*.tar", "no shard at"),
        ("x-*.parquet", "no parquet file at"),
    ],
)
def test_open_rows__missing_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        open_rows(Path(name))


def test_open_rows__shards_without_audio_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.txt": b"x"})
    with pytest.raises(UserError, match="its 1 shards hold no audio"):
        open_rows(tmp_path)


def test_import__loads_no_torch_and_no_pyarrow() -> None:
    code = (
        "import sys, bat.shard.rows, bat.shard.assign; "
        "sys.exit(', '.join({'torch', 'pyarrow', 'webdataset'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_open_rows__notes_on_classes(tmp_path: Path) -> None:
    text = "path,label,split\na.wav,Dog,train\nb.wav,dog,train\nc.wav,cow,test\n"
    source = lay(tmp_path, {"x.csv": text, "a.wav": "", "b.wav": "", "c.wav": ""})
    notes = " ".join(open_rows(source / "x.csv").notes)
    assert "'Dog' and 'dog'" in notes
    assert "1 class(es) have no clip but in the splits test or valid" in notes
    assert "'cow'" in notes


def test_open_rows__notes_on_folder_names(tmp_path: Path) -> None:
    source = lay(tmp_path, {"2021-05/a.wav": "", "nan/b.wav": "", "site/\u00e9.wav": ""})
    (source / "site/e\u0301.wav").touch()
    found = open_rows(source)
    assert found.vocabulary == ["2021-05", "site"]
    assert "labels are the names of the folders (2 classes: 2021-05, site)" in found.notes
    assert any("differ in Unicode form alone" in note for note in found.notes)
