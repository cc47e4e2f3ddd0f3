"""A report in a real Chromium, without scripts: what is chosen, what scrolls, what is printed.

Needs playwright (pip) and Chromium. NULLEDIT_AXE names axe.min.js, NULLEDIT_SHOTS a folder that
gets pictures of the page.
"""

import itertools
import os
from pathlib import Path

import pytest
from support.browser import IN_A_BROWSER, LOOKS, chromium, serious
from support.runs import line, write_a_run

from nulledit.report.html import html_page
from nulledit.runs.report import collect

pytest.importorskip("playwright", reason="needs playwright")

pytestmark = IN_A_BROWSER
SIDEWAYS = """() => [...document.querySelectorAll(".scroll, .card")].filter(
  (e) => e.checkVisibility() && !e.closest("details:not([open])")).map((e) => [
  e.scrollWidth - e.clientWidth, e.querySelector(".sideways").offsetHeight])"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    base, folders = tmp_path_factory.mktemp("report"), []
    for name, rest in (("one", 3), ("two", 2)):
        rows = []
        for i in range(120):
            told = line(i, says=i % rest > 0, prompt=f"The mother tongue of Person {i} is")
            why = {"line": "says ' English' where ' Velmish' should stand", "causes": []}
            told["diagnosis"] = None if i % rest else why
            rows.append(told | {"relation": f"P{i % 12}", "active": i != 1})
        folders.append(write_a_run(base / name, rows))
    page = base / "report.html"
    page.write_text(html_page("Report", collect(folders).documents()), encoding="utf-8")
    return page


def opened(browser, file, look="wide", **more):
    page = browser.new_context(**LOOKS[look], **more).new_page()
    page.goto(file.as_uri())
    return page


def rows(page):
    """Of the listing of the first run."""
    return page.locator("#part-2 .listing tbody tr:visible").count()


def says(page, number):
    """Whether a list says, to whoever reads or hears it, that so many are shown.

    It is a counter of the style; what is heard follows a moment later.
    """
    session = page.context.new_cdp_session(page)
    for _ in range(100):
        told = session.send("Accessibility.getFullAXTree")["nodes"]
        texts = [n["name"]["value"] for n in told if n.get("role", {}).get("value") == "StaticText"]
        if any(a == str(number) and "shown" in b for a, b in itertools.pairwise(texts)):
            return True
        page.wait_for_timeout(100)
    return False


def test_facts_are_chosen_without_scripts_by_mouse_and_keyboard(browser, file):
    page = opened(browser, file, java_script_enabled=False)
    assert rows(page) == 119
    assert says(page, 119)
    page.click("#part-2 label:has-text('do not hold')")
    assert rows(page) == 40
    assert says(page, 40)
    page.click("#part-2 summary:has-text('Relation')")
    page.click("#part-2 label:has-text('P3')")
    assert rows(page) == 10
    assert says(page, 10)
    page.keyboard.press("ArrowUp")
    assert rows(page) == 0  # another relation: none of its facts is among them
    page.focus("#part-2 fieldset:has-text('Show') input:checked")
    page.keyboard.press("ArrowUp")
    assert rows(page) == 10
    assert page.locator("#part-3 .listing tbody tr:visible").count() == 119  # another listing
    page.click("#part-1 label:has-text('hold in one, not in two')")
    assert page.locator("#part-1 .listing tbody tr:visible").count() == 40


def test_print_has_every_fact_whatever_is_chosen(browser, file):
    page = opened(browser, file)
    page.click("#part-2 label:has-text('do not hold')")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 720, "height": 1000})  # A4, less its margins
    assert rows(page) == 120
    for side in ("Height", "Width"):
        beyond = f"e => e.scroll{side} - e.client{side}"
        assert page.locator("#part-2 .listing .scroll").evaluate(beyond) <= 0, side
    assert page.locator(".choices:visible, .sideways:visible").count() == 0


@pytest.mark.parametrize("look", LOOKS)
def test_what_scrolls_says_so_and_the_page_fits_its_window(browser, file, look):
    page = opened(browser, file, look)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    page.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    found = page.evaluate(SIDEWAYS)
    assert found
    for beyond, said in found:
        assert (said >= 20) == (beyond > 3), (beyond, said)
    assert any(said for _, said in found) == (look == "phone")
    if place := os.environ.get("NULLEDIT_SHOTS"):
        page.screenshot(path=Path(place) / f"report-{look}.png", full_page=True)
    if axe := os.environ.get("NULLEDIT_AXE"):
        assert serious(page, Path(axe).read_text()) == []


def test_a_page_of_thousands_of_facts_stays_short(browser, tmp_path):
    lines = [line(i, prompt=f"The mother tongue of Person {i} is") for i in range(3000)]
    lines[7]["says_target"] = False
    file = tmp_path / "report.html"
    file.write_text(
        html_page("", collect([write_a_run(tmp_path / "run", lines)]).documents()),
        encoding="utf-8",
    )
    page = opened(browser, file)
    assert page.evaluate("document.documentElement.scrollHeight") < 5000
    page.click("label:has-text('do not hold')")
    assert page.locator(".listing tbody tr:visible").count() == 1
