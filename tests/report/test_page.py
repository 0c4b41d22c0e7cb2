"""The page: what it says of runs, in its HTML and in the JSON of its figures."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from distributed_eg.report.facts import read_run
from distributed_eg.report.page import NO_EVALUATION, page_of
from tests.report.made_runs import make_run


class Page(HTMLParser):
    """A parsed page: its text, tables, links, trees, and figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.places: list[str] = []
        self.depths: dict[int, int] = {}
        self.sources: list[str] = []
        self._script = ""
        self.feed(text)
        self.figures: dict[str, Any] = json.loads(self._script)
        self.text = " ".join(" ".join(self.words).split())
        assert [tag for tag in self.open if tag not in ("meta", "link", "input")] == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "a":
            self.links.append(named["href"] or "")
        if named.get("class") == "plot":
            self.places.append(named["id"] or "")
        if tag == "span" and "data-task" in named:
            self.depths[int(named["data-task"] or "")] = self.open.count("ul")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self._script = self._script or data
            return
        if "style" not in self.open:
            self.words.append(data)
        if {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += data

    def table(self, *headings: str) -> list[list[str]]:
        """The rows of the first table that has these headings."""
        return next(rows[1:] for rows in self.tables if {*headings} <= {*rows[0]})

    def figure(self, title: str) -> dict[str, Any]:
        """The first figure whose horizontal axis has this title."""
        return next(f for f in self.figures.values() if f["layout"]["xaxis"]["title"]["text"] == title)


def page(*paths: Path) -> Page:
    return Page(page_of([read_run(str(path)) for path in paths], "/* the library */"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "run", 8)
    return tmp_path / "run"


def test_every_figure_has_its_place_and_nothing_comes_from_elsewhere(run: Path) -> None:
    found = page(run)
    assert found.places == list(found.figures)
    assert len(found.places) == 5
    assert all(source.startswith("data:") for source in found.sources)


def test_accuracies_stand_in_tiles_figure_table_and_csv(run: Path) -> None:
    found = page(run)
    assert "gate accuracy 0.900 expert accuracy 0.800 end to end accuracy 0.750" in found.text
    rows = found.table("task", "classes", "stream")
    assert rows[3] == ["3", "103", "3, 7", "test", "20", "0.900", "0.800", "0.750", "0.050"]
    figure = found.figure("task")
    assert {trace["name"]: trace["y"][3] for trace in figure["data"]} == {
        "gate": 0.9,
        "expert": 0.8,
        "end to end": 0.75,
    }
    (link,) = found.links
    saved = list(csv.reader(io.StringIO(unquote(link.partition(",")[2]))))
    assert saved[0][:3] == ["task", "label", "classes"]
    assert len(saved) == 9
    assert saved[4][5:8] == ["0.9", "0.8", "0.75"]


def test_the_tree_says_who_came_from_whom_how_and_who_else_would_have_been_as_good(run: Path) -> None:
    found = page(run)
    assert found.depths[0] == 2  # below the root
    assert found.depths[4] == found.depths[0] + 1  # came from task 0
    assert found.depths[3] == found.depths[1] + 1
    assert "fine-tuned 0.600 3 3, 7 ≈ as related to 2" in found.text
    assert "LwF 0.946 4 4, 9" in found.text
    assert "≈ marks the" in found.text


def test_heat_maps_have_the_clustered_order_and_confusion_the_counts(run: Path) -> None:
    found = page(run)
    confusion = found.figure("task whose expert answered")
    order = confusion["data"][0]["y"]
    assert sorted(order) == [str(task) for task in range(8)]
    assert abs(order.index("0") - order.index("4")) == 1
    row = dict(zip(confusion["data"][0]["x"], confusion["data"][0]["text"][order.index("6")], strict=True))
    assert {task: count for task, count in row.items() if count} == {"6": 18, "7": 2}
    (related,) = [f for f in found.figures.values() if f["data"][0].get("texttemplate") == "%{z:.2f}"]
    z, names = related["data"][0]["z"], related["data"][0]["x"]
    assert z[names.index("4")][names.index("0")] == z[names.index("0")][names.index("4")] == 0.946
    assert z[names.index("0")][names.index("0")] is None


def test_calibration_timeline_workers_settings_and_hashes(run: Path) -> None:
    found = page(run)
    assert "Expected calibration error" in found.text
    assert found.figure("mean confidence")["data"][1]["x"]
    stages = found.figure("seconds of work")
    assert [trace["name"] for trace in stages["data"]] == ["features", "autoencoder", "relate", "expert"]
    assert stages["data"][3]["base"] == [6.0, 6.0, 16.0, 16.0, 26.0, 26.0, 36.0, 36.0]
    assert found.table("worker", "share idle") == [["w0", "16", "32.000", "0.158"], ["w1", "16", "32.000", "0.158"]]
    assert ["method.seed", "7"] in found.table("setting", "value")
    assert ["libraries.torch", "2.0"] in found.table("version or kind")
    assert "ab" * 32 in found.table("autoencoder", "expert")[0]


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 3, name="</script><script>alert({})</script>")
    found = page(tmp_path / "run")
    assert "</script><script>alert(1)</script>" in found.text
    assert found.table("task", "classes", "stream")[2][2] == "</script><script>alert(2)</script>, 5"


def test_a_run_without_an_evaluation_says_so_and_shows_the_rest(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 3, evaluated=False)
    found = page(tmp_path / "run")
    assert NO_EVALUATION in found.text
    assert len(found.places) == 3


def test_a_run_of_one_task_has_nothing_to_relate(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1)
    found = page(tmp_path / "run")
    assert "Not known: no held-out images" in found.text
    assert len(found.places) == 3


def test_several_runs_stand_in_one_table_and_one_figure(run: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "other", 3)
    make_run(tmp_path / "third", 2, evaluated=False)
    found = page(run, tmp_path / "other", tmp_path / "third")
    rows = found.table("run", "gate accuracy")
    assert [row[:2] for row in rows] == [["run", "8"], ["other", "3"], ["third", "2"]]
    assert [row[2] for row in rows] == ["0.900", "0.900", ""]
    figure = found.figure("task label")
    assert [trace["name"] for trace in figure["data"]] == ["run", "other", "third"]
    assert [trace["y"][3] for trace in figure["data"]] == [0.75, None, None]
    assert found.places == list(found.figures)


def test_a_long_run_stays_below_ten_megabytes(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 120, families=12)
    text = page_of([read_run(str(tmp_path / "run"))], "")
    pairs = 120 * 120
    # What grows with the square of the tasks, at 500 of them, beside plotly.js of 4.8 MB.
    assert len(text) / pairs * 500**2 < 5e6
