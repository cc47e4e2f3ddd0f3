"""Time causal tracing against one whole run a restoration, on the embedded model.

    python benchmarks/tracing.py [--facts 3] [--draws 3] [--window 6]

The first example facts, the same noise on both sides; CPU seconds of this process. Prints a row per
fact with the ratio and the largest difference between the two sides' effects.
"""

import argparse
import time
from importlib import resources

import reference_tracing

from nulledit import read_facts
from nulledit.models.editable_model import EditableModel
from nulledit.models.load import load_model
from nulledit.tracing import TraceSettings, ask, trace
from nulledit.tracing.trace import noise_of, spread_of


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--facts", type=int, default=3)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--window", type=int, default=6)
    args = parser.parse_args()
    model = EditableModel(*load_model("smollm2-135m"))
    with resources.as_file(resources.files("nulledit") / "assets/facts/examples.yaml") as file:
        facts = read_facts(file, limit=args.facts).facts
    known = ask(model, facts).known
    spread = spread_of(model, known)
    settings = TraceSettings(draws=args.draws, window=args.window)
    width = model.model.config.hidden_size
    print("| fact | tokens restored | reference, CPU s | nulledit, CPU s | ratio | apart |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for question in known:
        start = time.process_time()
        ours = trace(model, question, settings, spread=spread)
        middle = time.process_time()
        _, _, theirs = reference_tracing.trace(
            model.model,
            question.ids,
            question.answer,
            subject=slice(question.first, question.last + 1),
            noise=settings.noise * spread * noise_of(question, width, settings),
            window=args.window,
        )
        slow, fast = time.process_time() - middle, middle - start
        apart = max(float((ours.effects[k] - theirs[k]).abs().max()) for k in theirs)
        print(
            f"| {question.fact_id} | {len(ours.tokens)} | {slow:.1f} | {fast:.2f} | "
            f"{slow / fast:.1f} | {apart:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
