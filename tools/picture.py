"""Draws docs/streams.svg, the README's picture, from the first table of docs/streams.md."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
COLOURS = {"AlphaEdit": "#9a6b1f", "MEMIT with history": "#8a4a8a", "gated": "#1f6f9a"}
INK = "#777777"  # of axes and words: read on a light page and on a dark one


def table(text):
    """{(measure, method): [(facts, mean, error)]} of the first Markdown table."""
    rows = [line.strip("| \n").split("|") for line in text.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in rows[0]]
    found = {}
    for row in rows[2:]:
        facts = row[0].strip().replace(",", "")
        if not facts.isdecimal():
            break
        for name, cell in zip(head[1:], row[1:], strict=True):
            measure, method = name.rsplit(", ", 1)
            if numbers := [float(n) for n in re.findall(r"[\d.]+", cell)]:  # a dash: not measured
                found.setdefault((measure, method), []).append((int(facts), *numbers))
    return found


def main():
    plt.rcParams |= {
        "svg.hashsalt": "nulledit",
        "svg.fonttype": "none",
        "font.size": 10,
        "text.color": INK,
    }
    plt.rcParams |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    found = table((DOCS / "streams.md").read_text(encoding="utf-8"))
    figure, panels = plt.subplots(1, 2, figsize=(7.6, 2.7), layout="constrained")
    for (measure, method), points in found.items():
        panel = panels[int(measure.startswith("KL"))]
        facts, means, errors = zip(*points, strict=True)
        panel.errorbar(
            facts, means, yerr=errors, color=COLOURS[method], marker="o", ms=4, label=method
        )
    titles = ("new facts that hold (strict, %)", "change of other text (KL, mnat a token)")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10, color=INK)
        panel.set_xlabel("edits in one stream")
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(INK)
    panels[0].set_ylim(0, 105)
    panels[0].legend(frameon=False, labelcolor="linecolor", loc="lower left")
    panels[1].set_yscale("log")
    panels[1].set_ylim(1, 500)
    figure.savefig(DOCS / "streams.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
