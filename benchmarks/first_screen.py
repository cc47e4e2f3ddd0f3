"""Seconds from `nulledit ui MODEL --out RUN` to the first edited answer in a real browser.

    python benchmarks/first_screen.py [--model smollm2-135m]

Needs the extra ui, playwright and Chromium. Prints JSON: seconds since the command at which the
address was printed, the first screen was there, the edited answer was read on the page, and the
edit was evaluated; processor seconds of the server, which a busy machine does not stretch; clicks.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

FACT = {"subject": "France", "prompt": "The capital of {} is the city of", "target": "Madrid"}
PATIENCE = 1_800_000  # milliseconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "nulledit", "ui", model, "--out", f"{folder}/run", "-q"]
        begun, found = time.perf_counter(), {"load_average": os.getloadavg()[0]}
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

        def note(name):
            seconds = round(time.perf_counter() - begun, 1)
            found[name] = {"seconds": seconds, "cpu_seconds": cpu_seconds(server.pid)}

        try:
            address = re.search(r"http://\S+", server.stdout.readline())[0]
            note("address")
            visit(address, note)
        finally:
            server.terminate()
            server.wait(60)
    print(json.dumps({"model": model, "clicks": 2, **found}, indent=1))


def visit(address, note):
    """Write one fact and wait for what the edited model says."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        note("first_screen")
        page.click("text=Write one")
        for name, text in FACT.items():
            page.fill(f"#{name}", text)
        page.click("button:text-is('Write')")
        page.wait_for_selector("li:has-text('Written.')")
        note("edited_answer")
        page.wait_for_selector("button:has-text('See what undoing')")
        note("evaluated")
        browser.close()


def cpu_seconds(pid):
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return round(sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"), 1)


if __name__ == "__main__":
    main()
