"""`nulledit ui` in a real Chromium: edit a fact, see it hold, undo, see it gone; faults, clicks.

Needs playwright (pip), Chromium, and the extra ui. NULLEDIT_AXE names axe.min.js, NULLEDIT_SHOTS a
folder that gets pictures of every page.
"""

import os
import random
import re
import threading
from pathlib import Path

import pytest
from support.browser import IN_A_BROWSER, LOOKS, chromium, serious
from support.cli import edit_all

from nulledit import Run

pytest.importorskip("starlette", reason="needs the extra ui")
pytest.importorskip("playwright", reason="needs playwright")
import uvicorn
from playwright import sync_api

from nulledit.ledger.store import Store
from nulledit.ui import serve as serving
from nulledit.ui.view import View

PATHS = ("/", "/fact?id=ada", "/try", "/edit", "/retry", "/timeline", "/numbers", "/jobs")
SECONDS = 120_000  # milliseconds that a job may take on a busy machine

pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def served(place, tmp_path, monkeypatch):
    """A run's page on a port of its own: folder and address."""
    folder, known, servers = edit_all(place, tmp_path / "run"), threading.Event(), []
    told = []

    class Server(uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(serving.uvicorn, "Server", Server)

    def ready(address):
        told.append(address)
        known.set()

    thread = threading.Thread(
        target=serving.serve,
        args=(folder, lambda talk: Run.open(folder, talk=talk)),
        kwargs={"name": "run", "port": 0, "ready": ready},
    )
    thread.start()
    assert known.wait(60)
    yield folder, told[0]
    servers[0].should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def opened(browser, address, look="wide", **more):
    """A tab, and whatever its console complains of."""
    faults = []
    page = browser.new_context(**LOOKS[look], **more).new_page()
    page.set_default_timeout(SECONDS)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.goto(address)
    return page, faults


def root_of(address):
    return address.split("/?")[0]


def events(folder):
    return Store(folder / "ledger").events()


def fill(page, **given):
    for name, value in given.items():
        page.fill(f"#{name}", value)


def test_a_fact_is_edited_seen_undone_and_seen_gone(browser, served):
    folder, address = served
    page, faults = opened(browser, address)
    page.click("nav >> text=Edit")
    fill(page, subject="Lyra Holm", prompt="{} plays the", target="flute")
    page.click("button:has-text('Preview')")
    page.click("button:has-text('Write it')")  # there when the preview is over: by itself
    page.wait_for_selector("text=See what undoing it would move")
    assert events(folder) == 3
    page.click("nav >> text=Facts")
    assert page.locator("td:has-text('flute')").count() >= 1
    page.check(f"input[aria-label='Choose {View(folder).facts()[-1].id}']")
    page.click("text=See what undoing the chosen")
    page.click("button:has-text('Undo now')")
    page.click("text=Take it back >> visible=true", trial=True)
    page.click("nav >> text=Facts")
    assert page.locator("td:has-text('flute')").count() == 0
    assert events(folder) == 4
    assert faults == []


def test_all_works_by_keyboard_and_without_scripts(browser, served):
    _, address = served
    page, _ = opened(browser, address, java_script_enabled=False)
    page.goto(f"{root_of(address)}/try")
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text() == "To the content"
    page.focus("#prompt")
    page.keyboard.type("The mother tongue of Ada Byron is")
    page.keyboard.press("Tab")
    page.keyboard.type("Velmish")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=p(target)")  # the page loads itself again until then
    page.goto(f"{root_of(address)}/?q=velmish&sort=id")
    assert page.locator("tbody tr").count() == 1


def test_a_closed_page_leaves_what_was_begun(browser, served):
    folder, address = served
    page, _ = opened(browser, address)
    page.goto(f"{root_of(address)}/edit")
    fill(page, subject="Lyra Holm", prompt="{} plays the", target="flute")
    page.click("button:text-is('Write')", no_wait_after=True)
    page.wait_for_url("**/jobs/*")
    page.close()
    other, _ = opened(browser, address)
    other.goto(f"{root_of(address)}/jobs")
    other.click("text=/^Write /")
    other.wait_for_selector("text=See what undoing it would move")
    assert events(folder) == 3


def test_a_dropped_file_is_taken_and_its_errors_are_beside_it(browser, served):
    folder, address = served
    page, faults = opened(browser, address)
    page.goto(f"{root_of(address)}/edit")
    page.evaluate(
        """() => {
          const given = new DataTransfer();
          given.items.add(new File(['- {subject: A, prompt: "{} is"}'], "bad.yaml"));
          document.querySelector("[data-drop]").dispatchEvent(
            new DragEvent("drop", {dataTransfer: given, bubbles: true, cancelable: true}));
        }"""
    )
    page.click("button:text-is('Write')")
    assert "record 1" in page.inner_text("#file-wrong-1")
    assert events(folder) == 2
    assert [f for f in faults if "422" not in f] == []


@pytest.mark.parametrize("look", LOOKS)
def test_every_page_fits_its_window_and_has_a_name_for_each_control(browser, served, look):
    _, address = served
    page, faults = opened(browser, address, look)
    page.click("nav >> text=Numbers")
    page.click("text=Check the default limits")
    page.wait_for_selector("text=not measured")
    for path in (*PATHS, page.url.removeprefix(root_of(address))):
        page.goto(root_of(address) + path)
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{path} is {wide} pixels wider than its window"
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("input:not([type=hidden]), select, textarea")]
              .filter((e) => !e.labels.length && !e.ariaLabel).map((e) => e.outerHTML)"""
        )
        assert unnamed == [], path
        assert page.locator("h1").count() == 1
        if place := os.environ.get("NULLEDIT_SHOTS"):
            name = re.sub(r"\W+", "-", path).strip("-") or "facts"
            page.screenshot(path=Path(place) / f"{name}-{look}.png", full_page=True)
        if axe := os.environ.get("NULLEDIT_AXE"):
            assert serious(page, Path(axe).read_text()) == [], path
    assert faults == []


def test_fifty_clicks_in_any_order_show_no_fault(browser, served):
    folder, address = served
    page, faults = opened(browser, address)
    chance = random.Random(0)
    clicked = []
    while len(clicked) < 50:
        found = page.locator("main a:visible, main button:visible, nav a:visible").all()
        try:  # a page whose job ends loads itself again, and what was found is gone
            one = chance.choice(found)
            clicked.append(one.inner_text(timeout=2000))
            for field in page.locator("#subject, #prompt, #target, input[type=search]").all():
                if chance.random() < 0.5:
                    field.fill(chance.choice(["Velm", "{} is", "<b>x", "Ada Byron is"]))
            one.click(no_wait_after=True, timeout=2000)
        except (sync_api.Error, IndexError):
            continue
        page.wait_for_selector("h1")
        said = page.inner_text("body")
        assert "Traceback" not in said, clicked
        assert "unexpected" not in said, (clicked, said)
    assert [f for f in faults if not re.search(r"409|422|clipboard", f, re.IGNORECASE)] == []
    for _ in range(SECONDS // 1000):  # whatever was begun last may still be written
        page.goto(f"{root_of(address)}/jobs")
        if page.inner_text(".now") == "ready":
            break
        page.wait_for_timeout(1000)
    page.close()
    assert Run.open(folder).verify().passed
