"""The HTML page: well formed, of one piece, deaf to what names hold."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bat.report.html import table, tag
from bat.report.page import Picture, write_page
from bat.report.plots import plot_layer_gates
from tests.report.probe_summaries import summary

HOSTILE = "<script>alert('x')</script> & \"quoted\" </td>"
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Checks that tags are balanced; keeps text, attributes and images."""

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


def test_tags_are_balanced_and_names_stay_text(hostile: str) -> None:
    read = Reader(hostile)
    assert "script" not in read.tags
    assert "<script" not in hostile.lower()
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert read.text.count(HOSTILE) > 20
    assert set(read.tags) <= {
        "html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "h3", "p", "ul",
        "li", "a", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "details",
        "summary", "figure", "img", "figcaption",
    }  # fmt: skip


def test_nothing_is_asked_of_the_network(hostile: str) -> None:
    read = Reader(hostile)
    for name, value in read.attributes:
        if name in ("src", "srcset", "href", "data", "action", "poster", "background"):
            assert value.startswith(("data:image/png;base64,", "#")), value[:60]
    style = hostile[hostile.index("<style>") : hostile.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = [value for name, value in read.attributes if value.startswith("default-src")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_pictures_are_within_and_have_words(hostile: str, png: Path) -> None:
    images = Reader(hostile).images
    assert [image["alt"] for image in images] == [
        "Layer gates",
        f"Layer gates: {HOSTILE}",
        "Layer gates: A",
    ]
    data = (images[0]["src"] or "").removeprefix("data:image/png;base64,")
    assert base64.b64decode(data) == png.read_bytes()


def test_links_lead_to_sections(hostile: str) -> None:
    read = Reader(hostile)
    links = [value for name, value in read.attributes if name == "href"]
    places = [f"#{value}" for name, value in read.attributes if name == "id"]
    assert links == places == ["#s1", "#s2"]


def test_the_page_holds_every_number(tmp_path: Path) -> None:
    given = summary(seeds=[0, 1])
    read = Reader(write_page(tmp_path / "p.html", title="t", summaries=[given]).read_text())
    rows = {tuple(row[:4]): row[4:] for row in read.rows if len(row) == 4 + 6}  # six metrics
    for name, encoder in given["encoders"].items():
        for method, entry in encoder["results"].items():
            for fold, seeds in entry["folds"].items():
                for seed, found in seeds.items():
                    shown = rows[name, method, fold, seed]
                    assert shown[0] == f"{100 * found['accuracy']:.2f}"
                    assert shown[1] == f"{100 * found['map']:.2f}"
            if entry["gate"]:
                [gate] = [r for r in read.rows if r[:3] == [name, method, "10"]]
                first = [values[0] for values in entry["gate"].values()]
                assert gate[3] == f"{sum(first) / len(first):.3f}"
    assert ["1-17367-A-10", "the flac stream is cut off"] in read.rows
    assert ["seconds", "641.5"] in read.rows


def test_classes_start_with_the_hardest_and_end_with_those_without_a_clip(tmp_path: Path) -> None:
    given = summary(encoders=["A"], methods=["cgp"], folds=["1"], seeds=[0])
    found = given["encoders"]["A"]["results"]["cgp"]["folds"]["1"]["0"]["per_class"]
    found |= {"ap": [0.5, 0.125, None, 0.25, 1.0], "positives": [8, 7, 0, 6, 5]}
    read = Reader(write_page(tmp_path / "p.html", title="t", summaries=[given]).read_text())
    start = read.rows.index(["class", "clips held out", "A: cgp"])
    assert read.rows[start + 1 : start + 6] == [
        ["rain", "7", "12.50"],
        ["baby", "6", "25.00"],
        ["dog", "8", "50.00"],
        ["clock", "5", "100.00"],
        ["sea", "0", "–"],  # noqa: RUF001
    ]


def test_blocks_show_what_was_measured_only(tmp_path: Path) -> None:
    given = summary(encoders=["A"], depth=2)
    insight = given["encoders"]["A"]["insight"]
    insight |= {"sinks": {"gate on": [0.25, 0.5], "gate off": [0.75, 0.5], "uniform": 0.01}}
    read = Reader(write_page(tmp_path / "p.html", title="t", summaries=[given]).read_text())
    [header] = [row for row in read.rows if row[0] == "block"]
    assert header[:3] == ["block", "sink, gate on", "sink, gate off"]
    assert not [name for name in header if "class token" in name]  # all None
    first, second = (row for row in read.rows if len(row) == len(header) and row[1] in
                     ("0.250", "0.500"))  # fmt: skip
    assert [first[:3], second[:3]] == [["1", "0.250", "0.750"], ["2", "0.500", "0.500"]]
    del given["encoders"]["A"]["insight"]
    text = write_page(tmp_path / "p.html", title="t", summaries=[given]).read_text()
    assert "Blocks of" not in text


def test_text_is_escaped_unless_it_was_made_here() -> None:
    assert tag("p", "<b>", tag("b", "&")) == "<p>&lt;b&gt;<b>&amp;</b></p>"
    assert tag("a", "x", href='" onclick="y') == '<a href="&quot; onclick=&quot;y">x</a>'
    made = table(["a", "b"], [["x", "1"]], best={(0, 1)}, tints={(0, 1): 2.0})
    assert re.search(r'<td class="best tint" style="--v:1\.000">1</td>', made)


def test_settings_of_heads_and_rates_are_listed(tmp_path: Path) -> None:
    path = write_page(tmp_path / "r.html", title="r", summaries=[summary(encoders=["A"])])
    rows = Reader(path.read_text(encoding="utf-8")).rows
    for line in (
        ["head.prototypes", "10000"],
        ["head.per_class", "–"],  # noqa: RUF001
        ["optim.lr", "0.001"],
        ["clip_seconds", "5.0"],
        ["data", "89abcdef"],
    ):
        assert line in rows
    [header] = [row for row in rows if row[0] == "encoder" and "digest" in row]
    [line] = [row for row in rows if row[0] == "A" and len(row) == len(header)]
    assert dict(zip(header, line, strict=True))["frames"] == "512"
