"""A stream of edits in batches, judged after each: all facts so far, the oldest, perplexity.

    python benchmarks/stream.py FACTS --out FOLDER --text FILE [--skip 500] [--limit 500]
        [--recipe smollm2-135m] [--set values.clamp=0.5] [--batch-size 100] [--threads 1]

One JSON line per batch goes to FOLDER/stream.jsonl. Interrupted, the same command goes on: the
ledger in FOLDER holds the finished batches, and their lines are not made again.
"""

import argparse
import json
import random
import resource
import time
from pathlib import Path

import torch

from nulledit import Editor, load_recipe, read_facts
from nulledit.evaluation.metrics import rates, score
from nulledit.evaluation.perplexity import perplexity, read_windows
from nulledit.evaluation.protocols import queries_of
from nulledit.models.layouts import frozen
from nulledit.models.tokens import pad_id


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("facts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", default="smollm2-135m")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    found = read_facts(
        options.facts, skip=options.skip, limit=options.limit, on_conflict="first"
    ).facts
    queue = list(found)
    random.Random(options.seed).shuffle(queue)
    if (options.out / "ledger/ledger.db").is_file():
        editor = Editor.load(options.out)
    else:
        changes = dict(change.split("=", 1) for change in options.set)
        recipe = load_recipe(options.recipe).with_fields(changes)
        editor = Editor.from_pretrained(options.model, recipe=recipe, seed=options.seed)
        options.out.mkdir(parents=True, exist_ok=True)
        editor.attach(options.out)
    windows = read_windows(options.text, editor.tokenizer, windows=40, window=256)
    lines = options.out / "stream.jsonl"
    told = len(lines.read_text().splitlines()) if lines.is_file() else 0
    base = None
    with editor.base_weights(), frozen(editor.model):
        base = perplexity(editor.partial, windows, pad_id(editor.tokenizer))
        if not told:
            first = rates(judge(editor, queue))
            write(lines, {"edits": 0, "perplexity": base.value, **shown(first)})
            told = 1
    size = options.batch_size
    for number in range(1, -(-len(queue) // size) + 1):
        if number < told:
            continue
        done = queue[: number * size]
        cpu = time.process_time()
        report = editor.edit(done[(number - 1) * size :], batch_size=size, shuffle=False)
        cpu = time.process_time() - cpu
        with frozen(editor.model):
            scores = judge(editor, done)
            now = perplexity(editor.partial, windows, pad_id(editor.tokenizer))
        oldest = {fact.id for fact in queue[:size]}
        cohort = rates(s for s in scores if s.query.fact_id in oldest)
        write(
            lines,
            {
                "edits": len(done),
                "perplexity": now.value,
                "growth": now.value / base.value - 1,
                **shown(rates(scores)),
                **{f"oldest_{k}": v for k, v in shown(cohort).items()},
                "update_share": [round(layer.update_share, 4) for layer in report.layers],
                "free_share": [round(layer.free_share, 4) for layer in report.layers],
                "delta_share": sum(c.outcome["delta_share"] for c in report.columns) / size,
                "steps": sum(c.outcome["steps"] for c in report.columns) / size,
                "cpu_seconds": round(cpu, 1),
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            },
        )


def judge(editor, facts):
    """Scores of every query of `facts`."""
    queries = [query for fact in facts for query in queries_of(fact)]
    return score(
        editor.partial, editor.encoder, queries, pad_id=pad_id(editor.tokenizer), positions=512
    )


def shown(found):
    """Means, standard errors and n, for JSON."""
    return {
        name: {"mean": rate.mean, "se": rate.standard_error, "n": rate.n}
        for name, rate in found.items()
        if rate
    }


def write(file, line):
    """One more line, on disk and on the screen."""
    with file.open("a") as opened:
        opened.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
