"""Facts edited as plain text and in the chat template, asked in each: docs/chat.md.

    python benchmarks/chat.py FACTS.json [--limit 10] [--model smollm2-135m] [--out answers.json]

"Said" counts answers of 24 tokens to the bare instruction, where the model begins its own turn. KL
is of windows of wikitext-2's test text after token 60,000.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from nulledit.config import ChatSettings, load_recipe
from nulledit.data.readers import read_facts
from nulledit.editing.engine import EditEngine
from nulledit.evaluation import evaluate, read_windows
from nulledit.evaluation.generation import contains, generate_answers
from nulledit.evaluation.queries import queries_of
from nulledit.evaluation.scores import score
from nulledit.models.editable_model import EditableModel
from nulledit.models.load import load_model

FIRST = 60_000 // 256 + 1  # windows
DEFAULT = ChatSettings()
EDITED = {
    "not edited": False,
    "plain": None,
    "chat, subject in the user's turn": replace(DEFAULT, subject="user"),
    "chat, subject in the assistant's turn": replace(DEFAULT, subject="assistant"),
    "chat, answer at once": replace(DEFAULT, assistant="", subject="user"),
    "both": replace(DEFAULT, plain=True),
}
ASKED = {
    "plain": None,
    "template's own": replace(DEFAULT, subject="user"),
    "none": replace(DEFAULT, system="none"),
    "a helpful assistant": replace(DEFAULT, system="You are a helpful assistant."),
}


def main() -> None:
    """Edit in each form, ask in each form, print lines of a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("facts")
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", help="default: the model's")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--only", help="forms to edit in, numbers with commas")
    parser.add_argument("--asked", help="forms to ask in, numbers with commas")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    facts = [
        replace(fact, neighbours=fact.neighbours[:2])
        for fact in read_facts(given.facts, limit=given.limit, skip=given.skip).facts
    ]
    base, windows = None, ()
    said = {}
    print("| edited as | asked as | first | strict | paraphrases | neighbours | said "
          "| KL, mnat | CPU s |")  # fmt: skip
    for number, (name, settings) in enumerate(EDITED.items()):
        if number and given.only and str(number) not in given.only.split(","):
            continue
        model, tokenizer = load_model(given.model)
        start = time.process_time()
        if settings is not False:
            recipe = replace(load_recipe(given.recipe or given.model), chat=settings)
            EditEngine(model, tokenizer, recipe=recipe, name=given.model).edit(facts)
        spent = time.process_time() - start
        editable = EditableModel(model, tokenizer)
        windows = (
            windows
            or read_windows(given.data / "wikitext-2" / "test.txt", tokenizer, windows=FIRST + 20)[
                FIRST:
            ]
        )
        found = evaluate(editable, facts[:1], windows=windows, generate=False, base=base)
        base, kl = base or found, (found.summary().get("kl") or {"value": 0.0})["value"]
        for place, (asked, form) in enumerate(ASKED.items()):
            if given.asked and str(place) not in given.asked.split(","):
                continue
            rates = ask(editable.in_chat(form), facts)
            free = editable.in_chat(form and replace(form, assistant=""))
            prompts = [fact.render(fact.prompt) for fact in facts]
            answers = generate_answers(free, prompts, max_new_tokens=24)
            rates.append(sum(contains(a, f.target) for a, f in zip(answers, facts, strict=True)))
            said[f"{name} / {asked}"] = dict(zip(prompts, answers, strict=True))
            cells = " | ".join(f"{rate:g}" for rate in rates)
            print(f"| {name} | {asked} | {cells} | {kl:.3f} | {spent:.0f} |", flush=True)
    if given.out:
        with open(given.out, "w", encoding="utf-8") as file:
            json.dump(said, file, indent=1, ensure_ascii=False)


def ask(model: EditableModel, facts: list) -> list[float]:
    """Facts whose target's first token, or all its tokens, come first; shares of prompts."""
    rows = [model.encoder.encode(f.render(f.prompt), target=f.target) for f in facts]
    first = 0
    for row in rows:
        batch = model.collate([row.ids[: row.target_start]])
        with torch.no_grad():
            logits = model.logits(model.run_normed(batch)[0, -1:])
        first += int(logits.argmax()) == row.target_ids[0]
    scores = score(model, [q for f in facts for q in queries_of(f)], positions=512)
    strict = {
        kind: [s.strict for s in scores if s.query.kind == kind]
        for kind in ("efficacy", "generalization", "specificity")
    }
    shares = [sum(v) / max(len(v), 1) for v in strict.values()]
    return [first, sum(strict["efficacy"]), *(round(100 * s) for s in shares[1:])]


if __name__ == "__main__":
    main()
