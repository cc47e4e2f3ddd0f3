"""Do facts hold, and what do they cost other text and other facts of their subjects?

Rates and KL along a stream of batches.

    python benchmarks/holding.py benchmarks/facts/everyday-reporting.yaml --data ../shared/data

A row of Markdown a stage (after each batch), and with --out every number as JSON. Windows of
wikitext-2's test text before token 20,000 are for choosing settings, those after token 60,000 for
reporting.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch

from nulledit import Editor
from nulledit.config import load_recipe
from nulledit.data.readers import read_facts
from nulledit.evaluation import evaluate, gates_of, read_windows, retry_failing
from nulledit.evaluation.capability import capability
from nulledit.evaluation.stats import Rate
from nulledit.evaluation.tasks import read_tasks

WINDOW = 256
HEAD = (
    *("facts", "strict", "of the first batch", "said"),
    *("paraphrases, strict", "neighbours, strict"),
    *("other relations kept", "KL there, nat"),
    *("KL, mnat (worst 1 %)", "perplexity", "tasks", "steps", "CPU s a fact"),
)
FIRST = {"choosing": 0, "reporting": 60_000 // WINDOW + 1}  # windows


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("facts", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", help="default: the model's")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="take one fact of so many")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--retry", type=int, default=0)
    parser.add_argument(
        "--look-back", action="store_true", help="retry earlier batches' facts, too"
    )
    parser.add_argument("--text", choices=FIRST, default="choosing")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--no-answers", action="store_true", help="ask for no free generation")
    parser.add_argument("--each", action="store_true", help="all measures after each batch")
    parser.add_argument("--capability", type=Path, metavar="DIR", help="the six tasks, too")
    parser.add_argument("--items", type=int, default=100, help="of each task")
    parser.add_argument("--show", action="store_true", help="a line for each fact")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--value-cache", type=Path)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def shown(rate, scale=100, digits=1):
    if rate is None:
        return "–"
    mean, error = scale * rate["mean"], scale * (rate["standard_error"] or 0)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def main():
    options = arguments()
    torch.set_num_threads(options.threads)
    editor = Editor.from_pretrained(
        options.model, recipe=recipe_of(options), dtype="float32", value_cache=options.value_cache
    )
    given = {"skip": options.skip, "on_conflict": "first"}
    facts = list(read_facts(options.facts, limit=options.limit, **given).facts)[:: options.every]
    text = options.data / "wikitext-2" / "test.txt"
    first = FIRST[options.text]
    windows = read_windows(text, editor.tokenizer, windows=first + options.windows)[first:]
    items = read_tasks(options.capability, limit=options.items) if options.capability else ()
    base = evaluate(editor.editable, facts, windows=windows, generate=False)
    size = options.batch_size
    print(f"| {' | '.join(HEAD)} |\n{'| --- ' * len(HEAD)}|", flush=True)
    stages, spent = [{**unedited(base), "capability": able(editor, items)}], 0.0
    print(row(stages[0]), flush=True)
    for start in range(0, len(facts), size):
        batch = facts[start : start + size]
        begun = time.process_time()
        editor.edit(batch, shuffle=False)
        if options.retry:
            again = facts[: start + size] if options.look_back else batch
            retry_failing(editor, again, options.retry)
        spent += time.process_time() - begun
        last = start + size >= len(facts)
        found = stage(editor, facts[: start + size], windows, base, spent, options, last)
        stages.append({**found, "capability": able(editor, items if options.each or last else ())})
        print(row(stages[-1]), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            content = {"facts": options.facts.name, "settings": options.set, "text": options.text,
                       "recipe": editor.recipe.to_dict(), "stages": stages}  # fmt: skip
            options.out.write_text(json.dumps(content, indent=1, ensure_ascii=False))


def recipe_of(options):
    recipe = load_recipe(options.recipe or options.model)
    return recipe.with_fields(dict(word.split("=", 1) for word in options.set))


def stage(editor, facts, windows, base, spent, options, last):
    """What holds after a batch: all measures at the end of the stream, strict efficacy before.

    All of them after each with --each.
    """
    whole = last or options.each
    asked = facts if whole else [fact.bare for fact in facts]
    generate = whole and not options.no_answers
    found = evaluate(
        editor.editable,
        asked,
        windows=windows,
        generate=generate,
        base=base,
        gates=gates_of(editor.weights),
    )
    told = found.summary()
    columns = {c.fact.id: c.outcome for c in editor.history.present}
    rows = found.rows()
    kinds = Counter(f.relation for f in facts)
    by_kind = {
        kind: Rate.of([float(rows[f.id]["efficacy_strict"]) for f in facts if f.relation == kind])
        for kind, n in kinds.items()
        if kind and n > 1 and len(kinds) < len(facts) / 2
    }
    if last and options.show:
        for f in facts:
            mark = "ok  " if rows[f.id]["efficacy_strict"] else "MISS"
            lead = columns[f.id].lead or 0.0
            print(f"{mark} {f.relation or '':10.10s} {f.id:28.28s} {columns[f.id].ended:8s} "
                  f"{lead:6.2f} {rows[f.id]['generalization_strict']} {f.target!r} -> "
                  f"{rows[f.id]['answer']!r}")  # fmt: skip
    first = facts[: options.batch_size]
    return {
        "n": len(facts),
        **told,
        "first_batch": vars(Rate.of([float(rows[f.id]["efficacy_strict"]) for f in first])),
        "by_kind": {kind: vars(rate) for kind, rate in by_kind.items()},
        "steps": sum((o.steps or 0) + 1 for o in columns.values()) / len(columns),
        "ended": Counter(o.ended for o in columns.values()),
        "delta_share": sum(o.delta_share or 0.0 for o in columns.values()) / len(columns),
        "cpu_seconds_a_fact": spent / len(facts),
        "update": [layer.update_share for layer in editor.weights.reports()],
    }


def able(editor, items):
    """Accuracy on each task and on all items; None where none were asked."""
    if not items:
        return None
    found = capability(editor.editable, items)
    right = [float(item.predicted == item.answer) for task in found.values() for item in task.items]
    return {
        "all": vars(Rate.of(right)),
        "probability": vars(Rate.of([i.probability for t in found.values() for i in t.items])),
        **{name: task.summary() for name, task in found.items()},
    }


def unedited(base):
    """The model before the stream, asked the same."""
    return {
        "n": 0,
        **base.summary(),
        "kl": {"value": 0.0, "standard_error": 0.0, "worst_share": 0.0},
        "first_batch": None,
        "steps": 0.0,
        "cpu_seconds_a_fact": 0.0,
    }


def row(found):
    rates, kl = found["rates"], found["kl"]
    cells = [
        str(found["n"]),
        shown(rates["efficacy_strict"]),
        shown(found["first_batch"]),
        shown(found["generation"]),
        shown(rates["generalization_strict"]),
        shown(rates["specificity_strict"]),
        shown(found.get("relation_specificity")),
        shown(found.get("relation_kl"), scale=1, digits=2),
        f"{kl['value']:.1f} ± {kl['standard_error']:.1f} ({100 * kl['worst_share']:.0f} %)",
        f"{found['perplexity']['value']:.2f}",
        shown(found["capability"] and found["capability"]["all"]),
        f"{found['steps']:.1f}",
        f"{found['cpu_seconds_a_fact']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
