"""A CSV of custom data: what is read, and that every mistake is named with its line."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from bat.audio.decode import DecodeError, decode
from bat.data.files import index_files, read_row
from bat.errors import UserError
from bat.tasks import folder
from bat.tasks.base import Reading, load_task
from bat.tasks.csv import read
from bat.tasks.events import Event, digest
from bat.tasks.tables import numbered_lines

UNLABELLED = partial(read, labelled=False)
BOTH = pytest.mark.parametrize("reader", [read, UNLABELLED])


def lay(folder: Path, text: str | bytes, *files: str) -> Path:
    """``labels.csv`` of ``text`` in ``folder``, beside empty ``files``."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "labels.csv").write_bytes(data)
    return folder / "labels.csv"


def test_read__one_label_a_clip(tmp_path: Path) -> None:
    text = 'path,label,fold\n"a, 1.wav","Speech, male",1\n\nsub/b.flac,Dog,0\n'
    found = read(lay(tmp_path, text, "a, 1.wav", "sub/b.flac"))
    assert [(r.path, r.key, r.labels, r.fold, r.line) for r in found.rows] == [
        (tmp_path / "a, 1.wav", "a, 1", ("Speech, male",), 1, 2),
        (tmp_path / "sub/b.flac", "sub__b", ("Dog",), 0, 4),
    ]
    assert found == Reading(found.rows, ["Dog", "Speech, male"], [])
    assert found.events is None


@pytest.mark.parametrize("cells", ["a; b,Training", '"a,b",train'])
def test_read__several_labels_and_splits(tmp_path: Path, cells: str) -> None:
    text = f"path,labels,split\n1.wav,{cells}\n2.wav,b,eval\n"
    found = read(lay(tmp_path, text, "1.wav", "2.wav"))
    assert [(r.labels, r.split) for r in found.rows] == [(("a", "b"), "train"), (("b",), "test")]
    task = load_task("csv").settle([len(row.labels) for row in found.rows])
    assert (task.multi_label, task.loss, task.metric) == (True, "bce", "map")


def test_read__parts_of_a_file_are_clips_and_are_read_by_seeking(tmp_path: Path) -> None:
    wave = np.arange(32_000) / 65536
    soundfile.write(tmp_path / "long.wav", wave, 16_000)
    soundfile.write(tmp_path / "b.wav", wave, 16_000)
    lines = [
        "path,label,clip start,clip_end",
        "long.wav,a,0,0.5",
        "long.wav,b,0.5,1.25",
        "b.wav,a,,",
    ]
    found = read(lay(tmp_path, "\n".join([*lines, "long.wav,a,1.5,2.5"])))
    assert [(r.key, r.labels, r.place) for r in found.rows] == [
        ("long__0-500ms", ("a",), (0.0, 0.5)), ("long__500-1250ms", ("b",), (0.5, 0.75)),
        ("b", ("a",), None), ("long__1500-2500ms", ("a",), (1.5, 1.0)),
    ]  # fmt: skip
    assert any("keeps parts of one file on one side" in note for note in found.notes)
    part = decode(read_row(found.rows[1]), sample_rate=16_000)
    np.testing.assert_allclose(part, wave[8_000:20_000], atol=1.01 / 32768)
    with pytest.raises(DecodeError, match=r"ends at 2 s, its part at 2\.5 s"):
        read_row(found.rows[3])
    index, left_out = index_files(found.rows, found.vocabulary)
    assert ([index.key(i) for i in range(3)], len(index)) == ([r.key for r in found.rows[:3]], 3)
    assert left_out[0].reason.startswith("truncated")
    assert UNLABELLED(tmp_path / "labels.csv").rows[1].place == (0.5, 0.75)


def test_read__text_instead_of_labels(tmp_path: Path) -> None:
    found = read(lay(tmp_path, "path,transcript\na.wav,Hi there\nb.wav,no\n", "a.wav", "b.wav"))
    assert [(r.text, r.labels) for r in found.rows] == [("Hi there", ()), ("no", ())]


def test_read__keys_are_unique_and_short(tmp_path: Path) -> None:
    """Absolute paths too; ``d/x__y`` and ``d/x/y`` would have the same key."""
    files = ("d/x__y.wav", "d/x/y.wav")
    text = "path,label\n" + "".join(f"{tmp_path / name},{i}\n" for i, name in enumerate(files))
    source = lay(tmp_path, text, *files)
    assert [r.key for r in read(source).rows] == ["x__y.wav", "x__y.wav#2"]
    whole = str(tmp_path / "d/x__y.wav").replace("/", "__")
    assert UNLABELLED(source).rows[0].key == whole  # as it is written


EVENTS = """path,label,onset,offset,split
a.wav,dog,0.5,1,train
b.wav,,,,test
a.wav,cat,0,0.25,train
a.wav,dog,2.0,2.5,train
"""


@BOTH
def test_read__events_of_a_clip_are_joined_and_their_labels_too(
    tmp_path: Path, reader: Any
) -> None:
    found = reader(lay(tmp_path, EVENTS, "a.wav", "b.wav"))
    if reader is read:
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
    assert found.lines == {"a": 2, "b": 3}


def test_digest__follows_times_and_labels_alone(tmp_path: Path) -> None:
    texts = [EVENTS, EVENTS.replace("offset,split\n", "offset,split\n\n")]  # the same, other lines
    texts += [EVENTS.replace("0.25", "0.26"), EVENTS.replace("cat", "cow")]
    events = [read(lay(tmp_path, text, "a.wav", "b.wav")).events for text in texts]
    same, again, *others = [digest(found) for found in events if found is not None]
    assert same == again
    assert len({same, *others}) == 3


def test_read__mids_get_their_names(tmp_path: Path) -> None:
    text = "path,labels\na.wav,/m/1;/m/2\nb.wav,/m/2\n"
    source = lay(tmp_path, text, "a.wav", "b.wav")
    assert "class_labels_indices.csv beside them" in read(source).notes[0]
    names = "index,mid,display_name\n0,/m/2,Dog\n1,/m/1,Cat\n"
    (tmp_path / "class_labels_indices.csv").write_text(names)
    found = read(source)
    assert found.vocabulary == ["Dog", "Cat"]
    assert found.rows[0].labels == ("Cat", "Dog")


T = "path,label,onset,offset\n"
MISTAKES = [
    ("path,lable\na.wav,x\n", r"unknown column 'lable' \(did you mean 'label'"),
    (",path,label\n0,a.wav,x\n", "column '' has no name: remove it .*index=False"),
    ("path,label,label\na.wav,x,y\n", "column 'label' is there twice"),
    ("path,label,labels\na.wav,x,y\n", "both 'label' and 'labels'"),
    ("path,label,fold,split\na.wav,x,1,train\n", "both 'fold' and 'split'"),
    ("path,text,onset,offset\na.wav,x,1,2\n", "both 'text' and 'onset'"),
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
    ("path,labels\na.wav,x\nb.wav,['x' 'y']\n", "line 3: .* is no list of labels: write"),
    ("path,filename,label\na.wav,b.wav,x\n", "'path' and 'filename' are both read as 'path'"),
    ("path,dog,lable\na.wav,1,0\nb.wav,0,1\n", "unknown column 'dog'"),
    ("path,dog,cat\na.wav,1,0\nb.wav,0,2\n", "unknown column 'dog'"),
    ("path,dog\na.wav,1\nb.wav,0\n", "unknown column 'dog'"),
    ("path,label,dog,cat\na.wav,x,1,0\nb.wav,y,0,1\n", "unknown column 'dog'"),
    ("path,dog,cat\na.wav,0,0\nb.wav,0,0\n", "no column 'label'"),
    ("path,label\na.wav,x\nb.wav,y,z\n", "line 3 has 3 cells, the header has 2: .*quotes"),
    ('path,label\na.wav,x\nb.wav,"y\n', "line 3 is not CSV"),
    ("path,label\na.wav,x\n\nb.wav,y\n./a.wav,y\n", r"line 5: './a.wav' is .* in line 2: keep"),
    ("path,label\na.wav,x\nb.wav,x\n", "has one class, 'x': a classifier needs two"),
    ("path,label,fold\na.wav,x,1\nb.wav,y,\n", "line 3: no fold: give every line one"),
    ("path,label,fold\na.wav,x,1\nb.wav,y,1.5\n", "line 3: fold '1.5' is not a whole number"),
    ("path,label,fold\na.wav,x,1\nb.wav,y,40000\n", "line 3: fold '40000' is not"),
    ("path,label,split\na.wav,x,train\nb.wav,y,later\n", "line 3: split 'later' is not known"),
    ("path,text\na.wav,x\nb.wav,\n", "line 3: no text"),
    (T + "a.wav,x,0,1\nb.wav,y,1,\n", "line 3: no offset: an event needs onset and offset"),
    (T + "a.wav,x,0,1\nb.wav,y,,\n", "line 3: no onset"),
    (T + "a.wav,x,0,1\nb.wav,,0,1\n", "line 3: no label: .*has a path alone"),
    (T + "a.wav,x,0,1\nb.wav,y,zero,1\n", "line 3: onset 'zero' is not a time"),
    (T + "a.wav,x,0,1\nb.wav,y,0,nan\n", "line 3: offset 'nan' is not a time"),
    (T + "a.wav,x,0,1\nb.wav,y,-1,1\n", "line 3: onset '-1' is not a time"),
    (T + "a.wav,x,0,1\nb.wav,y,2,2\n", "line 3: offset 2 is not after onset 2: .*duration"),
    (T + "a.wav,x,0,1\na.wav,,,\n", "line 3: 'a.wav' is in line 2 too, and one of the two"),
    (T + "a.wav,,,\nb.wav,,,\n", "has no label"),
    ("path,label,clip_start\na.wav,x,1\n", "'clip_start' without 'clip_end'"),
    ("path,label,clip_start,clip_end\na.wav,x,1,1\n", "line 2: clip_start '1', clip_end '1'"),
    ("path,label,clip_start,clip_end\na.wav,x,,1\n", "line 2: clip_start '', clip_end '1'"),
    (T.replace("path", "path,clip_start,clip_end") + "a.wav,0,1,x,0,1\n", "beside 'onset'"),
    (
        "path,label,clip_start,clip_end\na.wav,x,0,1\na.wav,y,0,1\n",
        "line 3: 'a.wav' is there already, in line 2",
    ),
    (
        "path,label,onset,offset,fold\na.wav,x,0,1,0\na.wav,y,0,1,2\n",
        "line 3: fold 2 of 'a.wav', which has fold 0 in line 2",
    ),
    (b"path,label\na.wav,x\nb.wav,caf\xe9\n", "line 3 is not UTF-8 .byte 0xe9.: save"),
    ("path,label\na.wav,x\n".encode("utf-16"), "line 1 is not UTF-8"),
]


@pytest.mark.parametrize(("text", "says"), MISTAKES)
def test_read__mistakes_are_named_with_their_line(
    tmp_path: Path, text: str | bytes, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        read(lay(tmp_path, text, "a.wav", "b.wav"))


def test_read__missing_files_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    lines = "".join(f"no/{i}.wav,{i % 2},0,1\nno/{i}.wav,2,2,3\n" for i in range(7))
    source = lay(tmp_path, f"{T}a.wav,x,0,1\n{lines}", "a.wav")
    with pytest.raises(UserError) as caught:
        read(source)
    said = str(caught.value)
    assert "7 of its 8 audio files do not exist (line 3: 'no/0.wav', line 4:" in said
    assert "line 7: 'no/2.wav', ...)" in said
    assert f"relative to {tmp_path}" in said


def test_read__odd_paths_are_pointed_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"have / for \\"):
        read(lay(tmp_path, "path,label\nwav\\a.wav,x\n", "wav/a.wav"))
    with pytest.raises(UserError, match="'wav' is a folder, and a line names a file"):
        read(lay(tmp_path, "path,label\nwav,x\n", "wav/a.wav"))
    with pytest.raises(UserError, match=r"is a folder: name the CSV in it, or say task=folder"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"none\.csv does not exist"):
        read(tmp_path / "none.csv")


def test_numbered_lines__count_empty_lines_and_line_breaks_in_quotes(tmp_path: Path) -> None:
    columns, lines = numbered_lines(lay(tmp_path, b'\xef\xbb\xbfa , b\r\n\n"x\ny",1\n,\nz\n'))
    assert columns == ["a", "b"]
    assert lines == [(4, {"a": "x\ny", "b": "1"}), (6, {"a": "z", "b": ""})]


@BOTH
@pytest.mark.parametrize(
    ("text", "labels", "says"),
    [
        ("Path,Label \na.wav,x\nb.wav,y\n", [("x",), ("y",)], "'Path' as 'path', 'Label' as"),
        ("filename,category\na.wav,x\nb.wav,y\n", [("x",), ("y",)], "'category' as 'label'"),
        ("path,label\na.wav,x;y\nb.wav,z\n", [("x;y",), ("z",)], "'x;y' is one"),
        ("path,dog,cat\na.wav,1,0\nb.wav,1,1\n", [("dog",), ("dog", "cat")], "classes: dog, cat"),
        ("path,dog,cat\na.wav,1.0,False\nb.wav,0,TRUE\n", [("dog",), ("cat",)], "0 and 1"),
        ("path,dog,cat,cow\na.wav,1,0,0\nb.wav,0,1,0\n", [("dog",), ("cat",)], "no clip is of cow"),
        (
            'path,label\na.wav,"[\'dog\', \'cat\']"\nb.wav,"[""dog""]"\n',
            [("dog", "cat"), ("dog",)],
            "",
        ),
        ("path,labels\na.wav,\"['a;b', 'c']\"\nb.wav,\"c,d\"\n", [("a;b", "c"), ("c", "d")], ""),
        ("path,labels\na.wav,x;y\nb.wav,nan\n", [("x", "y"), ()], "1 lines say .*missing.*line 3"),
    ],
)
def test_read__columns_and_labels_are_read_alike_whether_required_or_not(
    tmp_path: Path, reader: Any, text: str, labels: list[Any], says: str
) -> None:
    found = reader(lay(tmp_path, text, "a.wav", "b.wav"))
    assert [row.labels for row in found.rows] == labels
    assert re.search(says, "\n".join(found.notes))
    assert found.notes or not says


def test_read__unlabelled_clips_and_any_split_where_labels_are_optional(tmp_path: Path) -> None:
    text = "path,label,fold,split\n1.wav,,1,eval\n2.wav,Dog,,Train\nnowhere.wav,Dog,2,\n"
    source = lay(tmp_path, text, "1.wav", "2.wav")
    for reader in (UNLABELLED, folder.read):
        found = reader(source)
        assert [(r.key, r.labels, r.fold, r.split) for r in found.rows] == [
            ("1", (), 1, "eval"),  # the split as it is given
            ("2", ("Dog",), None, "Train"),
            ("nowhere", ("Dog",), 2, None),
        ]
    with pytest.raises(UserError, match="1 of its 1 audio files do not exist"):
        UNLABELLED(lay(tmp_path, "path\nnowhere.wav\n"))
    with pytest.raises(UserError, match=r"fold 'x' is not a whole number"):
        UNLABELLED(lay(tmp_path, "path,fold\n1.wav,x\n"))
