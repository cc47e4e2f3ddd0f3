"""What thousands of edits cost beside their values: by batch, and to take one back.

    python benchmarks/many.py ../shared/data/counterfact/counterfact-edit.json

Values are made up, since they cost the same at any number: states of the usual length in random
directions. A line a batch: CPU seconds a fact, and wall seconds of its keys and of the solve. Then
wall seconds to undo a fact of the first, the middle and the last batch, and to redo it.
"""

import argparse
import time
from pathlib import Path
from unittest import mock

import torch

from nulledit import Editor
from nulledit.config import load_recipe
from nulledit.data.readers import read_facts
from nulledit.editing.descent import Value
from nulledit.ledger.records import ValueOutcome


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("facts", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="gated")
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--length", type=float, default=96.0, help="of a value")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def made_up(length, width):
    """What stands for `optimise_values`."""
    draw = torch.Generator().manual_seed(0)

    def values(_model, facts, _groups, **_options):
        z = torch.randn(len(facts), width, generator=draw)
        z *= length / z.norm(dim=1, keepdim=True)
        return [Value(row, ValueOutcome(0.0, 0.0, 0, 1.0, False, "done", 1.0)) for row in z]

    return values


def main():
    options = arguments()
    torch.set_num_threads(options.threads)
    changes = {"method.name": options.method, "values.rounds": 1}
    recipe = load_recipe(options.model).with_fields(changes)
    editor = Editor.from_pretrained(options.model, recipe=recipe, dtype="float32")
    facts = list(read_facts(options.facts, limit=options.limit, on_conflict="first").facts)
    width = editor.model.config.hidden_size
    stand_in = made_up(options.length, width)
    print("| facts | CPU s a fact | keys, wall s | solve, wall s |\n| --- | --- | --- | --- |")
    with mock.patch("nulledit.editing.batch_values.optimise_values", stand_in):
        for start in range(0, len(facts), options.batch_size):
            batch = facts[start : start + options.batch_size]
            begun = time.process_time()
            report = editor.edit(batch, shuffle=False)
            whole = time.process_time() - begun
            cells = (whole, report.seconds["keys"], report.seconds["solve"])
            cells = (f"{seconds / len(batch):.4f}" for seconds in cells)
            print(f"| {start + len(batch)} | {' | '.join(cells)} |", flush=True)
        print("\n| fact | undo, wall s | redo |\n| --- | --- | --- |")
        for place in (0, len(facts) // 2, len(facts) - 1):
            seconds = []
            for work in (lambda name=facts[place].id: editor.undo(name), editor.redo):
                begun = time.perf_counter()
                work()
                seconds.append(f"{time.perf_counter() - begun:.3f}")
            print(f"| {place + 1} of {len(facts)} | {' | '.join(seconds)} |", flush=True)


if __name__ == "__main__":
    main()
