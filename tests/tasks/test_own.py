"""A CSV of one's own: what is read, and that every mistake is named with its line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bat.errors import UserError
from bat.tasks import folder
from bat.tasks.base import load_task, numbered_lines
from bat.tasks.events import Event, digest
from bat.tasks.own import read


def lay(folder: Path, text: str | bytes, *files: str) -> Path:
    """``labels.csv`` of ``text`` in ``folder``, beside empty ``files``."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "labels.csv").write_bytes(data)
    return folder / "labels.csv"


def test_one_label_a_clip(tmp_path: Path) -> None:
    text = 'path,label,fold\n"a, 1.wav","Speech, male",1\n\nsub/b.flac,Dog,0\n'
    found = read(lay(tmp_path, text, "a, 1.wav", "sub/b.flac"))
    assert [(r.path, r.key, r.labels, r.fold, r.split) for r in found.rows] == [
        (tmp_path / "a, 1.wav", "a, 1", ("Speech, male",), 1, None),
        (tmp_path / "sub/b.flac", "sub__b", ("Dog",), 0, None),
    ]
    assert (found.vocabulary, found.events, found.notes) == (["Dog", "Speech, male"], None, [])


@pytest.mark.parametrize("cells", ["a; b,Training", '"a,b",train'])
def test_several_labels_and_splits(tmp_path: Path, cells: str) -> None:
    found = read(
        lay(tmp_path, f"path,labels,split\n1.wav,{cells}\n2.wav,b,eval\n", "1.wav", "2.wav")
    )
    assert [(r.labels, r.split) for r in found.rows] == [(("a", "b"), "train"), (("b",), "test")]


def test_a_byte_order_mark_blanks_and_crlf_are_harmless(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbfpath , label\r\n a.wav , x\r\nb.wav, y \r\n"
    assert [r.labels for r in read(lay(tmp_path, data, "a.wav", "b.wav")).rows] == [("x",), ("y",)]


def test_a_label_with_a_semicolon_is_one_class_and_that_is_said(tmp_path: Path) -> None:
    found = read(lay(tmp_path, "path,label\na.wav,x;y\nb.wav,z\n", "a.wav", "b.wav"))
    assert found.vocabulary == ["x;y", "z"]
    assert "'x;y' is one" in found.notes[0]


def test_keys_are_unique_and_short(tmp_path: Path) -> None:
    """Absolute paths too; ``d/x__y`` and ``d/x/y`` would have the same key."""
    files = ("d/x__y.wav", "d/x/y.wav")
    text = "".join(f"{tmp_path / name},{i}\n" for i, name in enumerate(files))
    rows = read(lay(tmp_path, f"path,label\n{text}", *files)).rows
    assert [r.key for r in rows] == ["x__y.wav", "x__y.wav#2"]


EVENTS = """path,label,onset,offset,split
a.wav,dog,0.5,1,train
b.wav,,,,test
a.wav,cat,0,0.25,train
a.wav,dog,2.0,2.5,train
"""


def test_events_are_joined_and_their_labels_too(tmp_path: Path) -> None:
    found = read(lay(tmp_path, EVENTS, "a.wav", "b.wav"))
    assert [(r.key, r.labels, r.split) for r in found.rows] == [
        ("a", ("dog", "cat"), "train"),
        ("b", (), "test"),
    ]
    assert found.events == {
        "a": (
            Event(0.5, 1.0, ("dog",), 2),
            Event(0.0, 0.25, ("cat",), 4),
            Event(2.0, 2.5, ("dog",), 5),
        ),
        "b": (),
    }


def test_the_digest_of_events_follows_times_and_labels_alone(tmp_path: Path) -> None:
    def of(text: str) -> str:
        events = read(lay(tmp_path, text, "a.wav", "b.wav")).events
        assert events is not None
        return digest(events)

    assert of(EVENTS) == of(EVENTS.replace("offset,split\n", "offset,split\n\n"))
    others = [EVENTS.replace("0.25", "0.26"), EVENTS.replace("cat", "cow")]
    assert len({of(EVENTS), *map(of, others)}) == 3


def test_mids_get_their_names(tmp_path: Path) -> None:
    text = "path,labels\na.wav,/m/1;/m/2\nb.wav,/m/2\n"
    source = lay(tmp_path, text, "a.wav", "b.wav")
    assert "class_labels_indices.csv beside the CSV gives their names" in read(source).notes[0]
    names = "index,mid,display_name\n0,/m/2,Dog\n1,/m/1,Cat\n"
    (tmp_path / "class_labels_indices.csv").write_text(names)
    found = read(source)
    assert found.vocabulary == ["Dog", "Cat"]
    assert found.rows[0].labels == ("Cat", "Dog")


def test_the_task_adapts(tmp_path: Path) -> None:
    source = lay(tmp_path, "path,labels\na.wav,x\nb.wav,x;y\n", "a.wav", "b.wav")
    rows, names = load_task("own").read(source)
    assert names == ["x", "y"]
    task = load_task("own").settle([len(row.labels) for row in rows])
    assert (task.multi_label, task.loss, task.metric) == (True, "bce", "map")


T = "path,label,onset,offset\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,lable\na.wav,x\n", r"unknown column 'lable' \(did you mean 'label'"),
        ("path,label,colour\na.wav,x,red\n", r"unknown column 'colour'; known are"),
        (",path,label\n0,a.wav,x\n", "column '' has no name: remove it .*index=False"),
        ("path,label,label\na.wav,x,y\n", "column 'label' is there twice"),
        ("path,label,labels\na.wav,x,y\n", "both 'label' and 'labels'"),
        ("path,label,fold,split\na.wav,x,1,train\n", "both 'fold' and 'split'"),
        ("path,label,onset\na.wav,x,1\n", "'onset' without 'offset'"),
        ("path,label,offset\na.wav,x,1\n", "'offset' without 'onset'"),
        ("label\nx\n", r"no column 'path' \(it has: label\)"),
        ("path\na.wav\n", "no column 'label'"),
        ("", "no column 'path'"),
        ("path;label\na.wav;x\n", "line 1: the columns are separated by semicolons .*Excel"),
        ("path\tlabel\na.wav\tx\n", "separated by tabs"),
        ("path,label\n", "lists no clips"),
        ("path,label\na.wav,x\n,y\n", "line 3: no path"),
        ("path,label\na.wav,x\nb.wav,\n", "line 3: no label"),
        ("path,label\na.wav,x\nb.wav,NaN\n", "line 3: no label"),
        ('path,label\na.wav,x\nb.wav,"[x, y]"\n', r"line 3: '\[x, y\]' is no list of labels"),
        ("path,labels\na.wav,x\nb.wav,['x' 'y']\n", "line 3: .* is no list of labels: write"),
        ("path,filename,label\na.wav,b.wav,x\n", "'path' and 'filename' are both read as 'path'"),
        ("path,category,target\na.wav,x,1\n", "'category' and 'target' are both read as 'label'"),
        ("path,dog,lable\na.wav,1,0\nb.wav,0,1\n", "unknown column 'dog'"),
        ("path,dog,cat\na.wav,1,0\nb.wav,0,2\n", "unknown column 'dog'"),
        ("path,dog,cat\na.wav,1,0\nb.wav,0,\n", "unknown column 'dog'"),
        ("path,dog\na.wav,1\nb.wav,0\n", "unknown column 'dog'"),
        ("path,label,dog,cat\na.wav,x,1,0\nb.wav,y,0,1\n", "unknown column 'dog'"),
        ("path,dog,cat\na.wav,0,0\nb.wav,0,0\n", "no column 'label'"),
        ("path,label\na.wav,x\nb.wav,y,z\n", "line 3 has 3 cells, the header has 2: .*quotes"),
        ('path,label\na.wav,x\nb.wav,"y\n', "line 3 is not CSV"),
        ("path,label\na.wav,x\n\nb.wav,y\n./a.wav,y\n", r"line 5: './a.wav' is .* in line 2: keep"),
        ("path,label\na.wav,x\nb.wav,x\n", "has one class, 'x': a classifier needs two"),
        ("path,label,fold\na.wav,x,1\nb.wav,y,\n", "line 3: no fold: give every line one"),
        ("path,label,fold\na.wav,x,1\nb.wav,y,1.5\n", "line 3: fold '1.5' is not a whole number"),
        ("path,label,fold\na.wav,x,1\nb.wav,y,-1\n", "line 3: fold '-1' is not"),
        ("path,label,fold\na.wav,x,1\nb.wav,y,40000\n", "line 3: fold '40000' is not"),
        ("path,label,split\na.wav,x,train\nb.wav,y,later\n", "line 3: split 'later' is not known"),
        (T + "a.wav,x,0,1\nb.wav,y,1,\n", "line 3: no offset: an event needs onset and offset"),
        (T + "a.wav,x,0,1\nb.wav,y,,2\n", "line 3: no onset"),
        (T + "a.wav,x,0,1\nb.wav,y,,\n", "line 3: no onset"),
        (T + "a.wav,x,0,1\nb.wav,,0,1\n", "line 3: no label: .*has a path alone"),
        (T + "a.wav,x,0,1\nb.wav,y,zero,1\n", "line 3: onset 'zero' is not a time"),
        (T + "a.wav,x,0,1\nb.wav,y,0,nan\n", "line 3: offset 'nan' is not a time"),
        (T + "a.wav,x,0,1\nb.wav,y,-1,1\n", "line 3: onset '-1' is not a time"),
        (T + "a.wav,x,0,1\nb.wav,y,2,2\n", "line 3: offset 2 is not after onset 2: .*duration"),
        (T + "a.wav,x,0,1\na.wav,,,\n", "line 3: 'a.wav' is in line 2 too, and one of the two"),
        (T + "a.wav,,,\na.wav,,,\n", "line 3: 'a.wav' is in line 2 too"),
        (T + "a.wav,,,\nb.wav,,,\n", "has no labels"),
        (
            "path,label,onset,offset,fold\na.wav,x,0,1,0\na.wav,y,0,1,2\n",
            "line 3: fold 2 of 'a.wav', which has fold 0 in line 2",
        ),
        (b"path,label\na.wav,x\nb.wav,caf\xe9\n", "line 3 is not UTF-8 .byte 0xe9.: save"),
        ("path,label\na.wav,x\n".encode("utf-16"), "line 1 is not UTF-8"),
    ],
)
def test_mistakes(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read(lay(tmp_path, text, "a.wav", "b.wav"))


def test_all_missing_files_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    lines = "".join(f"no/{i}.wav,{i % 2}\n" for i in range(7))
    source = lay(tmp_path, f"path,label\na.wav,x\n{lines}", "a.wav")
    with pytest.raises(UserError) as caught:
        read(source)
    said = str(caught.value)
    assert "7 of its 8 audio files do not exist (line 3: 'no/0.wav', line 4:" in said
    assert "line 7: 'no/4.wav', ...)" in said
    assert f"relative to {tmp_path}" in said


def test_missing_files_of_many_events_count_once(tmp_path: Path) -> None:
    source = lay(tmp_path, T + "a.wav,x,0,1\nb.wav,y,0,1\nb.wav,y,2,3\n", "a.wav")
    with pytest.raises(UserError, match="1 of its 2 audio files do not exist"):
        read(source)


def test_what_is_odd_about_missing_files_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"have / for \\"):
        read(lay(tmp_path, "path,label\nwav\\a.wav,x\n", "wav/a.wav"))
    with pytest.raises(UserError, match="'wav' is a folder, and a line names a file"):
        read(lay(tmp_path, "path,label\nwav,x\n", "wav/a.wav"))


def test_folders_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder: name the CSV in it, or say task=folder"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"none\.csv does not exist"):
        read(tmp_path / "none.csv")


def test_line_numbers_survive_empty_lines_and_line_breaks_in_quotes(tmp_path: Path) -> None:
    columns, lines = numbered_lines(lay(tmp_path, 'a,b\n\n"x\ny",1\n,\nz\n'))
    assert columns == ["a", "b"]
    assert lines == [(4, {"a": "x\ny", "b": "1"}), (6, {"a": "z", "b": ""})]


def test_clips_know_the_line_they_are_first_listed_in(tmp_path: Path) -> None:
    text = "path,label,onset,offset\nb.wav,x,0,1\n\na.wav,y,0,1\nb.wav,y,1,2\n"
    found = read(lay(tmp_path, text, "a.wav", "b.wav"))
    assert found.lines == {"b": 2, "a": 4}


@pytest.mark.parametrize("reader", [lambda path: read(path), folder.read])
@pytest.mark.parametrize(
    ("text", "labels", "says"),
    [
        ("Path,Label \na.wav,x\nb.wav,y\n", [("x",), ("y",)], "'Path' as 'path', 'Label' as"),
        ("filename,category\na.wav,x\nb.wav,y\n", [("x",), ("y",)], "'category' as 'label'"),
        ("path,dog,cat\na.wav,1,0\nb.wav,1,1\n", [("dog",), ("dog", "cat")], "classes: dog, cat"),
        ("path,dog,cat\na.wav,1.0,False\nb.wav,0,TRUE\n", [("dog",), ("cat",)], "0 and 1"),
        (
            "path,dog,cat,cow\na.wav,1,0,0\nb.wav,0,1,0\n",
            [("dog",), ("cat",)],
            "no clip is of cow: left out",
        ),
        (
            'path,label\na.wav,"[\'dog\', \'cat\']"\nb.wav,"[""dog""]"\n',
            [("dog", "cat"), ("dog",)],
            "",
        ),
        (
            "path,labels\na.wav,\"['a;b', 'c']\"\nb.wav,\"c,d\"\n",
            [("a;b", "c"), ("c", "d")],
            "",
        ),
        ("path,labels\na.wav,x;y\nb.wav,nan\n", [("x", "y"), ()], "1 lines say .*missing.*line 3"),
    ],
)
def test_columns_and_labels__read_alike_by_every_reader_of_csvs(
    tmp_path: Path, reader: Callable[[Path], Any], text: str, labels: list[Any], says: str
) -> None:
    found = reader(lay(tmp_path, text, "a.wav", "b.wav"))
    assert [row.labels for row in found.rows] == labels
    assert re.search(says, "\n".join(found.notes))
    assert found.notes or not says


def test_numbers_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    text = "path,label\na.wav,10\nb.wav,9\nc.wav,-1\n"
    assert read(lay(tmp_path, text, "a.wav", "b.wav", "c.wav")).vocabulary == ["-1", "9", "10"]


@pytest.mark.parametrize("reader", [lambda path: read(path), folder.read])
def test_a_file_in_the_other_unicode_form_is_pointed_at(
    tmp_path: Path, reader: Callable[[Path], Any]
) -> None:
    nfc, nfd = unicodedata.normalize("NFC", "é.wav"), unicodedata.normalize("NFD", "é.wav")
    with pytest.raises(UserError, match="exists in Unicode form NFD"):
        reader(lay(tmp_path, f"path,label\n{nfc},x\n", nfd))
