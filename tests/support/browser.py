"""How pages are looked at in a browser."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
IN_A_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
"""Marks of a file of such tests."""
LOOKS = {
    "wide": {"viewport": {"width": 1100, "height": 760}},
    "phone": {"viewport": {"width": 420, "height": 800}},
    "dark": {"viewport": {"width": 1100, "height": 760}, "color_scheme": "dark"},
}


@contextmanager
def chromium():
    """A browser without a window."""
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def serious(page, axe):
    """What axe-core finds that is serious or worse. Debugging scripts pass a page's policy."""
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    return [
        (f["id"], [n["html"] for n in f["nodes"]][:3])
        for f in found
        if f["impact"] in ("serious", "critical")
    ]
