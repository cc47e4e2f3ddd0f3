"""Compare with what the published code computed on the embedded model.

    python benchmarks/golden.py --data ../shared/data [--facts 100] [--threads 1]

Prints one row per quantity: second moment, keys, residuals, update, values; then the edited model's
rates beside those of the published update, fact by fact (paired bootstrap).
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from nulledit import Editor, Recipe, read_facts
from nulledit.config import StatisticsSettings, ValueSettings
from nulledit.data.corpus import open_corpus
from nulledit.editing.keys import LayerwiseForward
from nulledit.editing.values import optimise_values
from nulledit.evaluation.queries import queries_of
from nulledit.evaluation.scores import per_fact, rates, score
from nulledit.evaluation.stats import paired_bootstrap
from nulledit.linalg.solve import solve_update
from nulledit.linalg.spectrum import Spectrum
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen, write_weight
from nulledit.models.load import load_model, model_hash
from nulledit.statistics.collect import collect

LAYERS = (4, 5, 6, 7, 8)
OURS = "nulledit, statistics from valid.txt"


def relative(found, expected):
    """‖found − expected‖/‖expected‖."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=100, help="values compared (default 100)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    golden = load_file(options.data / "golden/smollm2-alphaedit-100.safetensors")
    contexts = json.loads((options.data / "counterfact/derived-100-contexts.json").read_text())
    facts = read_facts(options.data / "counterfact/derived-100.json").facts
    model = EditableModel(*load_model("smollm2-135m"))

    print("| quantity | agreement |\n| --- | --- |", flush=True)
    with frozen(model.model):
        statistics = collect(
            model,
            open_corpus(options.data / "golden/paragraphs.txt"),
            StatisticsSettings(packing="lines", window=2048),
            layers=LAYERS,
            name="smollm2-135m",
            model_hash=model_hash(model.model),
        )
        for layer in LAYERS:
            found = statistics.spectra[layer].eigenvalues.flip(0)
            expected = golden[f"eigenvalues.{layer}"].double()
            worst = float(((found - expected).abs() / expected).max())
            print(f"| eigenvalues, layer {layer}: worst relative difference | {worst:.1e} |")
        walk = LayerwiseForward(model, facts, first=4, contexts=contexts, bare_weight=0.5)
        print(f"| keys, layer 4 | {relative(walk.keys().mT, golden['keys.4']):.1e} |")
        residual = (golden["values"].double().mT - walk.hidden(8)) / len(LAYERS)
        print(f"| residuals, layer 4 | {relative(residual.mT, golden['residual.4']):.1e} |")
        spectrum: Spectrum = statistics.spectra[4]
        metric = spectrum.preconditioner((spectrum.eigenvalues < 0.02).double() / 10)
        update = solve_update(golden["keys.4"].mT, golden["residual.4"].mT, metric)
        expected = golden["update.4.left"].double() @ golden["update.4.right"].double()
        print(f"| update, layer 4, from the given | {relative(update, expected):.1e} |", flush=True)
        start = time.process_time()
        values = optimise_values(
            model,
            facts[: options.facts],
            list(range(options.facts)),
            layers=[8],
            contexts=contexts,
            settings=ValueSettings(steps=15, stop_margin=None),
            positions=200,
        )
        seconds = time.process_time() - start
    each = torch.tensor([relative(v.z, golden["values"][i]) for i, v in enumerate(values)])
    print(f"| values: median of {len(each)} facts | {each.median():.1e} |")
    print(f"| values: worst | {each.max():.1e} |")
    steps = sum(v.outcome.steps + 1 for v in values)
    print(f"| values: CPU-seconds a step of a fact | {seconds / steps:.3f} |")
    if options.facts < len(facts):
        return

    recipe = Recipe.from_dict(
        {"layers": list(LAYERS), "values": {"steps": 15}, "contexts": {"texts": contexts}}
    )
    valid = collect(
        model,
        open_corpus(options.data / "wikitext-2/valid.txt"),
        StatisticsSettings(),
        layers=(3, *LAYERS),
        name="smollm2-135m",
        model_hash=model_hash(model.model),
    )
    queries = [query for fact in facts for query in queries_of(fact)]

    def judge():
        with frozen(model.model):
            scores = score(model, queries, positions=512)
        return rates(scores), per_fact(scores)

    rows = {"before": judge()}
    for layer in LAYERS:
        update = golden[f"update.{layer}.left"] @ golden[f"update.{layer}.right"]
        weight = model.mlp_out(layer).weight
        write_weight(model.mlp_out(layer), weight.data.double() + update.double())
    rows["published"] = judge()
    editor = Editor(*load_model("smollm2-135m"), recipe=recipe, statistics=valid)
    model = editor.editable
    editor.edit(facts)
    rows[OURS] = judge()

    names = [n for n, rate in rows["before"][0].items() if rate]
    print("\n| model | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for name, (found, _) in rows.items():
        cells = [f"{100 * found[n].mean:.1f} ± {100 * found[n].standard_error:.1f}" for n in names]
        print(f"| {name} | " + " | ".join(cells) + " |")
    cells = []
    for n in names:
        a, b = rows["published"][1][n], rows[OURS][1][n]
        both = [f.id for f in facts if f.id in a and f.id in b]
        mean, low, high = paired_bootstrap([a[i] for i in both], [b[i] for i in both])
        cells.append(f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
    print("| difference to published, 95 % | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
