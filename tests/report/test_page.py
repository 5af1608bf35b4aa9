"""The HTML page: well formed, self-contained, safe whatever names hold."""

import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bat.report.page import Picture, write_page
from bat.report.plots import plot_layer_gates
from tests.report.probe_summaries import summary

HOSTILE = "<script>alert('x')</script> & \"quoted\" </td>"
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Checks that tags are balanced; keeps text, attributes, images and rows of tables."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.images: list[dict[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def read(tmp_path: Path, given: dict[str, Any]) -> Reader:
    path = write_page(tmp_path / "p.html", title="t", summaries=[given])
    return Reader(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gates = {"cgp": [[0.2, 0.8], [0.3, 0.7]]}
    return plot_layer_gates(gates, tmp_path_factory.mktemp("plots") / "layer-gates.png")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, png: Path) -> str:
    """A page of two tasks in which every name is hostile."""
    given = summary(encoders=[HOSTILE, "random"], labels=["dog", "rain", "sea", HOSTILE, "clock"])
    given["run"] = HOSTILE
    given["encoders"][HOSTILE]["bad_clips"]["keys"] = {HOSTILE: HOSTILE}
    given["protocol"][HOSTILE] = HOSTILE
    given["encoders"][HOSTILE] |= {"checkpoint": HOSTILE, "cls_rule": HOSTILE, "weights": HOSTILE}
    other = summary(task=HOSTILE, encoders=["A"], methods=["cgp"]) | {"run": "other"}
    pictures = {HOSTILE: [Picture(png), Picture(png, HOSTILE)], "other": [Picture(png, "A")]}
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, title=HOSTILE, summaries=[given, other], pictures=pictures)
    return path.read_text(encoding="utf-8")


def test_write_page__tags_are_balanced_and_names_stay_text(hostile: str) -> None:
    read = Reader(hostile)
    assert "<script" not in hostile.lower()
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert read.text.count(HOSTILE) > 20
    assert set(read.tags) <= {
        "html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "h3", "p", "ul",
        "li", "a", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "details",
        "summary", "figure", "img", "figcaption",
    }  # fmt: skip


def test_write_page__nothing_is_requested(hostile: str) -> None:
    read = Reader(hostile)
    for name, value in read.attributes:
        if name in ("src", "srcset", "href", "data", "action", "poster", "background"):
            assert value.startswith(("data:image/png;base64,", "#")), value[:60]
    style = hostile[hostile.index("<style>") : hostile.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = [value for name, value in read.attributes if value.startswith("default-src")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_write_page__plots_are_embedded_and_links_lead_to_sections(hostile: str, png: Path) -> None:
    read = Reader(hostile)
    alt = ["Layer gates", f"Layer gates: {HOSTILE}", "Layer gates: A"]
    assert [image["alt"] for image in read.images] == alt
    data = (read.images[0]["src"] or "").removeprefix("data:image/png;base64,")
    assert base64.b64decode(data) == png.read_bytes()
    links = [value for name, value in read.attributes if name == "href"]
    assert links == [f"#{value}" for name, value in read.attributes if name == "id"]
    assert links == ["#s1", "#s2"]


def test_write_page__every_number_and_setting_is_shown(tmp_path: Path) -> None:
    given = summary(seeds=[0, 1])
    page = read(tmp_path, given)
    rows = {tuple(row[:4]): row[4:] for row in page.rows if len(row) == 4 + 6 + 3}
    for name, encoder in given["encoders"].items():
        for method, entry in encoder["results"].items():
            for fold, seeds in entry["folds"].items():
                for seed, found in seeds.items():
                    numbers = [f"{100 * found[m]:.2f}" for m in ("accuracy", "map")]
                    shown = rows[name, method, fold, seed]
                    assert shown[:2] + shown[-3:] == [*numbers, "0.001", "0.05", "400"]
    for line in (
        ["1-17367-A-10", "the flac stream is cut off"],
        ["seconds", "641.5"],
        ["head.prototypes", "10000"],
        ["head.per_class", "–"],  # noqa: RUF001
        ["optim.lr", "0.001"],
        ["data", "89abcdef"],
    ):
        assert line in page.rows
    [header] = [row for row in page.rows if row[0] == "encoder" and "digest" in row]
    line = page.rows[page.rows.index(header) + 1]
    assert dict(zip(header, line, strict=True))["frames"] == "512"


def test_write_page__classes_start_with_the_hardest(tmp_path: Path) -> None:
    given = summary(encoders=["A"], methods=["cgp"], folds=["1"], seeds=[0])
    found = given["encoders"]["A"]["results"]["cgp"]["folds"]["1"]["0"]["per_class"]
    found |= {"ap": [0.5, 0.125, None, 0.25, 1.0], "positives": [8, 7, 0, 6, 5]}
    page = read(tmp_path, given)
    start = page.rows.index(["class", "clips held out", "A: cgp"])
    assert page.rows[start + 1 : start + 6] == [
        ["rain", "7", "12.50"],
        ["baby", "6", "25.00"],
        ["dog", "8", "50.00"],
        ["clock", "5", "100.00"],
        ["sea", "0", "–"],  # noqa: RUF001
    ]


def test_write_page__only_measured_diagnostics_are_shown(tmp_path: Path) -> None:
    given = summary(encoders=["A"], depth=2)
    diagnostics = given["encoders"]["A"]["diagnostics"]
    diagnostics |= {"sinks": {"gate on": [0.25, 0.5], "gate off": [0.75, 0.5], "uniform": 0.01}}
    page = read(tmp_path, given)
    [header] = [row for row in page.rows if row[0] == "block"]
    assert header[:3] == ["block", "sinks, gate on", "sinks, gate off"]
    assert "rank, cls" not in header  # all None
    lines = [row[:3] for row in page.rows if len(row) == len(header) and row is not header]
    assert [r for r in lines if r[0] in "12"] == [["1", "0.25", "0.75"], ["2", "0.5", "0.5"]]
    del given["encoders"]["A"]["diagnostics"]
    assert "Blocks of" not in read(tmp_path, given).text
