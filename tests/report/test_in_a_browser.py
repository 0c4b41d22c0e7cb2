"""The page in a browser: everything is drawn, nothing complains, nothing is cut off, tasks are found."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed_eg.report.facts import read_run
from distributed_eg.report.page import page_of, plotly_js
from tests.report.browser import IS_MISSING, Browser, open_browser
from tests.report.made_runs import make_run

pytestmark = [
    pytest.mark.skipif(IS_MISSING, reason="needs Debian's chromium and chromium-driver"),
    pytest.mark.filterwarnings("ignore"),
]
AXE = "axe-core@4.14.1"
DRAWN = "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.main-svg').length > 0)"
BACK = "return document.querySelector('.plot .main-svg').style.background"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as window:
        yield window


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about two runs, of which one is too long for bars."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [read_run(str(make_run(folder / str(n), n, name="things {}").uri)) for n in (8, 50)]
    (folder / "page.html").write_text(page_of(runs, plotly_js()), encoding="utf-8")
    return folder / "page.html"


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, as npm gives it."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "pack", "--silent", "--fetch-retries=0", AXE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        pytest.skip(f"npm gives no {AXE}: {done.stderr.strip()[-200:]}")
    with tarfile.open(folder / done.stdout.strip()) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file is not None
        return file.read().decode()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 390])
def test_axe_finds_nothing(browser: Browser, page: Path, axe: str, width: int, scheme: str) -> None:
    browser.show(page, width=width, scheme=scheme)
    browser.wait_for(DRAWN, all)
    browser.run("for (const folded of document.querySelectorAll('details')) folded.open = true")
    browser.run(axe + "; window.found = null; axe.run().then(result => { window.found = result.violations })")
    browser.wait_for("return window.found !== null", bool, 120)
    told = "return window.found.map(v => [v.impact, v.id, v.nodes.slice(0, 3).map(n => n.html.slice(0, 200))])"
    assert browser.run(told) == []


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_every_figure_is_drawn_and_nothing_is_cut_off(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.show(page, width=width, scheme=scheme)
    browser.wait_for(DRAWN, lambda drawn: len(drawn) == 11 and all(drawn))
    assert browser.run("return document.documentElement.scrollWidth") == width
    edges = "return [...document.querySelectorAll('.plot .main-svg')].map(s => s.getBoundingClientRect().right)"
    assert max(browser.run(edges)) <= width
    assert browser.complaints() == []


def test_figures_follow_the_theme(browser: Browser, page: Path) -> None:
    browser.show(page, width=1100, scheme="light")
    browser.wait_for(BACK, lambda back: back == "rgb(255, 255, 255)")
    browser.theme("dark")
    browser.wait_for(BACK, lambda back: back == "rgb(20, 23, 27)")


def test_a_search_marks_tasks_in_tables_tree_and_figures(browser: Browser, page: Path) -> None:
    browser.show(page, width=1100, scheme="light")
    browser.run(
        "const field = document.getElementById('search'); field.value = 'things 41';"
        "field.dispatchEvent(new Event('input'))"
    )
    browser.wait_for("return document.getElementById('found').textContent", lambda text: text == "1 found")
    rows = "return [...document.querySelectorAll('tr[data-task]:not([hidden])')].map(row => row.dataset.task)"
    assert set(browser.run(rows)) == {"41"}
    assert browser.run("return [...document.querySelectorAll('.tree .hit')].map(e => e.dataset.task)") == ["41"]
    shapes = "return [...document.querySelectorAll('.plot')].map(p => p.layout.shapes.length)"
    assert sorted(browser.run(shapes)) == [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2]
    assert browser.complaints() == []


def test_on_paper_it_is_light_and_whole(browser: Browser, page: Path) -> None:
    browser.show(page, width=1100, scheme="dark")
    browser.wait_for(DRAWN, all)
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(BACK) == "rgb(255, 255, 255)"
    assert browser.run("return document.querySelectorAll('details:not([open])').length") == 0
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(BACK) == "rgb(20, 23, 27)"
    assert browser.run("return document.querySelectorAll('details[open]').length") == 0
