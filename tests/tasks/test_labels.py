"""Labels and label files: each form, each mistake, and what stands for what."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from bat.errors import UserError
from bat.tasks.base import Row, in_order
from bat.tasks.labels import (
    by_number,
    cell_names,
    doubts,
    held_out_alone,
    is_mid,
    labels_of,
    named,
    names_of,
)

FORMS = {
    "indices.csv": 'index,mid,display_name\n1,/t/dd1,Dog\n0,/m/09x0r,"Speech, male"\n',
    "label_descriptors.csv": '0,/m/09x0r,"Speech, male"\n1,/t/dd1,"Dog"\n',
    "vocabulary.csv": '0,"Speech, male",/m/09x0r\n1,Dog,/t/dd1\n',
    "ontology.json": (
        '[{"id": "/m/09x0r", "name": "Speech, male"}, {"id": "/t/dd1", "name": "Dog"}]'
    ),
}


def write(root: Path, name: str, text: str) -> Path:
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def row(*labels: str) -> Row:
    return Row(path=Path("a.wav"), key="a", labels=labels)


@pytest.mark.parametrize("name", FORMS)
def test_labels_of__reads_names_and_mids_of_every_form(tmp_path: Path, name: str) -> None:
    labels = labels_of(write(tmp_path, name, FORMS[name]))
    assert labels.names == ("Speech, male", "Dog")
    assert labels.mids == ("/m/09x0r", "/t/dd1")
    (found,) = labels.translate([row("/t/dd1", "Speech, male", "Dog")])
    assert found.labels == ("Dog", "Speech, male")  # Dog once: its mid and its name are one label
    assert found.mids == ("/t/dd1", "/m/09x0r")
    if name != "ontology.json":
        assert labels.vocabulary([found]) == ["Speech, male", "Dog"]
        assert labels.translate([row("1")])[0].labels == ("Dog",)
    else:  # no order of its own
        assert labels.vocabulary([found]) == ["Dog", "Speech, male"]
        with pytest.raises(UserError, match=r"label '1' of a\.wav is not in"):
            labels.translate([row("1")])


def test_labels_of__names_are_numbered_and_a_name_goes_before_a_number(tmp_path: Path) -> None:
    labels = labels_of(write(tmp_path, "names.txt", "\ufeffSpeech\n\n dog \n0\n"))
    found = labels.translate([row("1"), row("0"), row("2"), row()])
    assert [(r.labels, r.mids) for r in found] == [(("dog",), ()), *[(("0",), ())] * 2, ((), ())]
    assert labels.vocabulary(found) == ["Speech", "dog", "0"]
    with pytest.raises(UserError, match=r"label 'Speach' of a.wav .* \(did you mean 'Speech'\?\)"):
        labels.translate([row("dog"), row("Speach")])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.csv", "index,mid,name\n0,/m/1,a\n0,/m/2,b\n", "lists 0 twice"),
        ("x.csv", "0,/m/1,a\n1,/m/1,b\n", "lists '/m/1' twice"),
        ("x.csv", "0,/m/1,a\n1,b\n", "'1,b' is not 'index,mid,name'"),
        ("x.csv", "0,/m/1,Speech, male\n", "'0,/m/1,Speech,male' is not 'index,mid,name'"),
        ("x.csv", "path,label\na.wav,dog\n", "'a.wav,dog' is not 'index,mid,name'"),
        ("x.csv", "index,mid,name\n", "names no classes"),
        ("x.txt", "a\nb\na\n", "lists 'a' twice"),
        ("x.json", '{"0": "dog"}', "is not an ontology"),
        ("x.json", '[{"id": 1, "name": "x"}]', "is not an ontology"),
        ("x.json", "[" * 100_000, "not a label file"),
        ("x.json", '["a', "not a label file"),
    ],
)
def test_labels_of__damaged_files_are_named(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        labels_of(write(tmp_path, name, text))
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a label file in UTF-8"):
        labels_of(tmp_path / "x.bin")
    with pytest.raises(UserError, match="does not exist"):
        labels_of(tmp_path / "none.csv")


def test_named__mids_get_names_of_the_file_beside_and_nothing_else_does(tmp_path: Path) -> None:
    rows = [row("/t/dd1"), row()]
    assert named(rows, None, tmp_path).vocabulary == ["/t/dd1"]
    assert "labels are mids: class_labels_indices.csv" in named(rows, None, tmp_path).notes[0]
    write(tmp_path, "label_descriptors.csv", FORMS["label_descriptors.csv"])
    found = named(rows, None, tmp_path)
    assert [r.labels for r in found.rows] == [("Dog",), ()]
    assert found.vocabulary == ["Speech, male", "Dog"]
    mixed = [row("/t/dd1"), row("Cow")]
    assert named(mixed, None, tmp_path).vocabulary == ["/t/dd1", "Cow"]  # as they stand


def test_orders_of_names() -> None:
    assert in_order(["10", "9", "2", "-1"]) == ["-1", "2", "9", "10"]
    assert in_order(["10", "9", "b"]) == ["10", "9", "b"]
    assert by_number({("b", 0), ("a", 2)}) == ["b", "class 1", "a"]
    for pairs in ({("b", 0), ("b", 2)}, {("b", 0), ("a", 0)}, {("b", 0), ("a", -1)}, set()):
        assert by_number(pairs) is None


def test_is_mid__by_its_form() -> None:
    assert all(map(is_mid, ("/m/09x0r", "/t/dd00088", "/g/122z_qxw")))
    assert not any(map(is_mid, ("m/1", "/m/", "Dog")))


LISTS = {
    "['dog', 'cat']": ["dog", "cat"],
    '["dog","cat"]': ["dog", "cat"],
    "['it\\'s', \"b\", 3]": ["it's", "b", "3"],
    '["caf\\u00e9"]': ["café"],
    "[]": [],
    "NaN": [],
    "<NA>": [],
    "": [],
    "[noise]": ["[noise]"],
    "Speech, male": ["Speech, male"],
    "\ud800": ["\\ud800"],
    "\x1b[31mred\n": ["\\x1b[31mred\\n"],
}


@pytest.mark.parametrize("text", LISTS)
def test_names_of__text_is_a_list_a_name_or_missing(text: str) -> None:
    assert names_of(text) == LISTS[text]
    "".join(names_of(text)).encode()


def test_names_of__values_of_json_and_parquet() -> None:
    found = names_of([3.0, 7, "x", "['a', 'b']", None, float("nan"), {}])
    assert found == ["3", "7", "x", "a", "b"]
    assert names_of(float("nan")) == names_of(None) == []


@pytest.mark.parametrize("text", ["[dog, cat]", "['dog' 'cat']", "['dog', cat]", "[dog; cat]"])
def test_cell_names__what_looks_like_a_list_and_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no list of labels"):
        cell_names(text, ";")


def test_doubts__spellings_missing_values_and_brackets_are_named() -> None:
    nfc, nfd = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    said = " ".join(doubts(["Dog", "dog", "cat", nfc, nfd, "1", "01", "None", "[x]"]))
    for part in ("3 class", "'Dog' and 'dog'", r"'e\u0301'", "'1' and '01'", "'None'", "'[x]'"):
        assert part in said
    assert doubts(["cat", "dog", "Speech, male", "2", "10"]) == []


def test_held_out_alone__names_the_classes_that_training_clips_lack() -> None:
    rows = [
        replace(row(*names), split=split)
        for names, split in ((("a", "b"), "train"), (("b", "c"), "test"), (("d",), "valid"))
    ]
    (said,) = held_out_alone(rows)
    assert "2 class(es)" in said
    assert said.endswith("'c', 'd'")
    assert held_out_alone(rows[:1]) == held_out_alone(rows[1:2]) == []
