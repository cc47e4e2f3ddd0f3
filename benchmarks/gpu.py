"""The table of one accelerator: edits, statistics and the decomposition, at published sizes.

    python benchmarks/gpu.py --out docs/gpu.md
    python benchmarks/gpu.py --small --device cpu --out page.md    # the same at the size of a test

Models of the shapes of LLaMA3-8B and Qwen3-8B with random weights, in bfloat16, need no network and
no data: facts are made up, and text is the one that comes with nulledit. Numbers are kept in a JSON
file beside the page as they come, and the same command goes on with those that are missing.
"""

import argparse
import gc
import json
from pathlib import Path

import shapes
import stages
import torch
from timing import OURS, Clock, threads

from nulledit import Editor, Fact
from nulledit.config import StatisticsSettings, layers_by_depth, load_recipe
from nulledit.evaluation.preservation import shipped_corpus
from nulledit.models.editable_model import EditableModel
from nulledit.models.load import model_hash
from nulledit.statistics.collect import key_moments
from nulledit.statistics.manifest import Manifest
from nulledit.statistics.spectra import Statistics

MODELS = ("llama3-8b", "qwen3-8b")
METHODS = ("alphaedit", "gated")
FULL = {"facts": 100, "tokens": 65536, "width": 14336, "steps": 25, "changes": None}
SMALL = {"facts": 4, "tokens": 512, "width": 64, "steps": 2, "changes": shapes.SMALL}
WINDOW = 2048
STAGES = ("keys", "values", "solve", "the rest")
FREE = 0.3  # share of directions that made-up spectra leave free


def arguments(given):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="the page")
    return parser.parse_args(given)


class Table:
    """Rows by name, kept as they come."""

    def __init__(self, file):
        self.file = file
        self.rows = json.loads(file.read_text()) if file.exists() else {}

    def row(self, name, measure):
        """What `measure` returns, if no earlier run has measured it."""
        if name not in self.rows:
            self.rows[name] = measure()
            self.file.write_text(json.dumps(self.rows, indent=1))
            print(name, self.rows[name], flush=True)
        return self.rows[name]


def main(given=None):
    options = arguments(given)
    size = SMALL if options.small else FULL
    said, device = threads(options.threads), torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    table, clock = Table(options.out.with_suffix(".json")), Clock(device)
    table.row("machine", lambda: f"{where}, {said}")
    for name in MODELS:
        rows = [f"{name}, {method}" for method in METHODS] + [f"{name}, statistics"]
        if all(row in table.rows for row in rows):
            continue
        setup = Setup(name, device, size)
        for method in METHODS:
            table.row(
                f"{name}, {method}", lambda m=method, s=setup: edited(clock, s, m, size["facts"])
            )
        table.row(f"{name}, statistics", lambda s=setup: statistics(clock, s, size["tokens"]))
        del setup
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    table.row("eigh", lambda: decomposed(clock, device, size["width"]))
    options.out.write_text(page(table.rows, size), encoding="utf-8")


class Setup:
    """A model of random weights, and what it is edited by."""

    def __init__(self, name, device, size):
        texts = list(shipped_corpus().texts())
        self.tokenizer = shapes.tokenizer_of(texts)
        self.model = shapes.random_model(
            name, dtype=torch.bfloat16, device=device, changes=size["changes"]
        )
        self.editable = EditableModel(self.model, self.tokenizer)
        self.layers = layers_by_depth(self.editable.depth)
        self.steps = size["steps"]
        ids = self.tokenizer(" ".join(texts), add_special_tokens=False)["input_ids"]
        self.ids = ids * (-(-size["tokens"] // len(ids)))

    def rows(self, tokens):
        """Windows of so many tokens in all."""
        window = min(WINDOW, tokens // 2)
        return [self.ids[i : i + window] for i in range(0, tokens, window)]

    def recipe(self, method):
        """LLaMA3-8B's published one with this method, each value taking all of its steps."""
        changes = {
            "layers": list(self.layers),
            "null_space": {"rule": "absolute", "value": stages.RANDOM_THRESHOLD},
            "values.steps": self.steps,
            "values.stop_loss": 0.0,
            "values.patience": 0,
            "method.name": method,
        }
        return load_recipe("llama3-8b").with_fields(changes)

    def statistics(self, method):
        """Of keys made-up ones; of inputs the library's own, of twice as many tokens as needed."""
        own, inputs = model_hash(self.model), method == "gated"
        layers = self.layers[-1:] if inputs else self.layers
        if inputs:
            tokens = 2 * (self.model.config.hidden_size + 1)
            moments = key_moments(self.editable, self.rows(tokens), layers, inputs=True)
            spectra = {layer: moment.spectrum() for layer, moment in moments.items()}
        else:
            width = self.editable.width(layers[0])
            spectra = {i: stages.made_up(width, FREE, self.editable.device) for i in layers}
        manifest = Manifest(
            "random", own, layers, "none", "0", StatisticsSettings(), "none", inputs=inputs
        )
        return Statistics(manifest, spectra)


def edited(clock, setup, method, n):
    """Seconds to write a batch of `n` facts, by stage, once two have warmed the device up."""
    names = [f"Person {i} of Velm" for i in range(n + 2)]
    facts = [Fact(name, "{} works in the city of", "Lyon") for name in names]
    editor = Editor(
        setup.model,
        setup.tokenizer,
        recipe=setup.recipe(method),
        statistics=setup.statistics(method),
    )
    editor.edit(facts[n:])
    report = clock.time(method, OURS, lambda: editor.edit(facts[:n]))
    editor.restore()
    whole = clock.wall[method, OURS].pop()
    stages_of = report.seconds | {"the rest": whole - sum(report.seconds.values())}
    return {"seconds": whole, "stages": stages_of, "peak": clock.peak.pop((method, OURS))}


def statistics(clock, setup, tokens):
    """Tokens a second of keys' moments in all layers, and of the forward pass to the highest."""
    rows = setup.rows(tokens)

    def bare():
        with torch.no_grad():
            for row in rows:
                setup.editable.run(setup.editable.collate([row]), last=setup.layers[-1])

    def moments():
        key_moments(setup.editable, rows, setup.layers)

    found = {}
    for name, work in (("forward", bare), ("statistics", moments)):
        work()
        clock.time(name, OURS, work)
        found[name] = tokens / clock.wall[name, OURS].pop()
        found[f"{name} peak"] = clock.peak.pop((name, OURS))
    return found


def decomposed(clock, device, width):
    """Seconds of one decomposition on the device, float64."""
    keys = torch.randn(width, width, dtype=torch.float64, device=device)
    moment = keys.mT @ keys / width
    del keys
    clock.time("eigh", OURS, lambda: torch.linalg.eigh(moment))
    return {"width": width, "seconds": clock.wall["eigh", OURS].pop()}


def page(rows, size):
    """The table as Markdown."""
    lines = [
        "# One accelerator",
        "",
        f"`python benchmarks/gpu.py`: {rows['machine']}. Models of random weights, bfloat16; wall",
        f"seconds of one run; {size['facts']} facts in a batch, {size['steps']} steps a value.",
        "",
        "| model | method | s | " + " | ".join(STAGES) + " | peak, GiB |",
        "| --- | --- |" + " ---: |" * (len(STAGES) + 2),
    ]
    for name in MODELS:
        for method in METHODS:
            found = rows[f"{name}, {method}"]
            shares = (
                f"{found['stages'].get(stage, 0.0):.2f} "
                f"({100 * found['stages'].get(stage, 0.0) / found['seconds']:.0f} %)"
                for stage in STAGES
            )
            lines.append(
                f"| {name} | {method} | {found['seconds']:.2f} | {' | '.join(shares)} | "
                f"{found['peak']:.1f} |"
            )
    lines += [
        "",
        "Statistics of all edited layers' keys, and the forward pass alone to the highest of them:",
        "",
        "| model | tokens/s | forward alone | share | peak, GiB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in MODELS:
        found = rows[f"{name}, statistics"]
        lines.append(
            f"| {name} | {found['statistics']:,.0f} | {found['forward']:,.0f} | "
            f"{100 * found['statistics'] / found['forward']:.0f} % | "
            f"{found['statistics peak']:.1f} |"
        )
    eigh = rows["eigh"]
    lines += ["", f"`eigh` of {eigh['width']:,} in float64: {eigh['seconds']:.2f} s.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
