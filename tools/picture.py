"""Draws docs/streams.svg, the README's picture, from the first table of docs/streams.md."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
COLOURS = {"AlphaEdit": "#9a6b1f", "gated": "#1f6f9a"}
INK = "#777777"  # of axes and words: read on a light page and on a dark one


def table(text):
    """{(measure, method): [(facts, mean, error)]} of the first Markdown table."""
    rows = [line.strip("| \n").split("|") for line in text.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in rows[0]]
    found = {}
    for row in rows[2:]:
        if not re.fullmatch(r"\d+", row[0].strip()):
            break
        for name, cell in zip(head[1:], row[1:], strict=True):
            measure, method = name.rsplit(", ", 1)
            mean, error = (float(n) for n in re.findall(r"[\d.]+", cell))
            found.setdefault((measure, method), []).append((int(row[0]), mean, error))
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
        panel.errorbar(facts, means, yerr=errors, color=COLOURS[method], marker="o", capsize=3)
        up = method == "gated" or measure.startswith("KL")
        panel.annotate(
            method,
            (facts[1], means[1]),
            xytext=(0, 9 if up else -16),
            textcoords="offset points",
            color=COLOURS[method],
            ha="center",
        )
    titles = ("new facts that hold (strict, %)", "change of other text (KL, mnat a token)")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10, color=INK)
        panel.set_xlabel("real updates, in batches of 100")
        panel.set_xticks([100, 200, 300])
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(INK)
    panels[0].set_ylim(0, 112)
    panels[1].set_yscale("log")
    panels[1].set_ylim(0.01, 200)
    figure.savefig(DOCS / "streams.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
