"""Gated edits against AlphaEdit: values once, both solves, rates and KL (a first look)."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from nulledit import Editor
from nulledit.config import load_recipe
from nulledit.data.corpus import windows as cut
from nulledit.data.readers import read_facts
from nulledit.editing.contexts import make_contexts
from nulledit.editing.keys import LayerwiseForward
from nulledit.editing.values import bare_leads, optimise_values
from nulledit.evaluation import evaluate, read_windows
from nulledit.evaluation.reading import read
from nulledit.methods.gates import GateSettings, InputStatistics, make_gates, solve_columns
from nulledit.models.mlp import ACTIVATIONS, Neurons, find_form
from nulledit.models.layouts import frozen


def main():
    p = argparse.ArgumentParser()
    p.add_argument("facts", type=Path)
    p.add_argument("--data", type=Path, default=Path("/work/shared/data"))
    p.add_argument("--layer", type=int, default=5)
    p.add_argument("--limit", type=int)
    p.add_argument("--text-tokens", type=int, default=50_000)
    p.add_argument("--windows", type=int, default=40)
    p.add_argument("--first", type=int, default=0)
    p.add_argument("--beta", type=float, default=20)
    p.add_argument("--theta", type=float, default=0.5)
    p.add_argument("--ridge", type=float, default=0.05)
    p.add_argument("--widening", type=float, default=0.1)
    p.add_argument("--set", action="append", default=[])
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--values", type=Path)
    p.add_argument("--generate", action="store_true")
    o = p.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe("smollm2-135m").with_fields(
        {"layers": f"[{o.layer}]", **dict(w.split("=", 1) for w in o.set)}
    )
    editor = Editor.from_pretrained("smollm2-135m", recipe=recipe, dtype="float32")
    model, L = editor.editable, o.layer
    facts = list(read_facts(o.facts, limit=o.limit, on_conflict="first").facts)
    form = find_form(model, L)
    print(form.activation, form.width, form.biased)
    stats = input_statistics(o, model, form, L)
    with frozen(model.model):
        contexts = make_contexts(model, recipe.contexts, seed=0)
        test = read_windows(o.data / "wikitext-2" / "test.txt", editor.tokenizer, windows=o.first + o.windows)[o.first:]
        base = read(model, test, keep=True)
        walk = LayerwiseForward(model, facts, first=L, contexts=contexts, bare_weight=recipe.contexts.bare_weight)
        inputs = mlp_inputs(walk, form)
        hidden = walk.hidden(L)
        z = values_of(o, model, facts, contexts, recipe, L)
        settings = GateSettings(o.beta, o.theta, o.ridge, o.widening)
        act = ACTIVATIONS[form.activation]
        for number in range(o.rounds):
            t = time.process_time()
            gates = make_gates(inputs, stats, settings, act, biased=form.biased, gated=form.factor is not None)
            neurons = Neurons(gates.rows, gates.biases, gates.factors, torch.zeros(hidden.shape[0], len(facts), dtype=torch.float64))
            A = form.units(neurons, inputs).mT  # [facts, neurons]
            residual = (z - hidden) / model.scale(L)
            neurons = replace(neurons, columns=solve_columns(A, residual, settings.ridge))
            form.put(neurons)
            print("solve cpu s", round(time.process_time() - t, 3), "off-diagonal max", float((A - torch.diag(A.diag())).abs().max()))
            leads = bare_leads(model, facts, positions=2000)
            failing = [i for i, x in enumerate(leads) if x <= (recipe.values.stop_margin or 0)]
            print("round", number, "leading", sum(x > 0 for x in leads), "with margin", len(facts) - len(failing))
            if number + 1 == o.rounds or not failing:
                break
            found = optimise_values(model, [facts[i] for i in failing], list(range(len(failing))), layer=L, contexts=contexts, settings=recipe.values, positions=200)
            now = LayerwiseForward(model, facts, first=L, contexts=contexts, bare_weight=0.5).hidden(L)
            for i, v in zip(failing, found, strict=True):
                z[:, i] = z[:, i] + (v.z.double() - now[:, i])
        found = evaluate(model, facts, windows=test, generate=o.generate, base=base)
    told = found.summary()
    for name, rate in told["rates"].items():
        if rate:
            print(f"{name:28s} {100 * rate['mean']:.1f} ± {100 * (rate['standard_error'] or 0):.1f}")
    print("KL", told["kl"], "ppl", told["perplexity"])
    rows = found.rows()
    for f in facts:
        if not rows[f.id]["efficacy_strict"]:
            print("MISS", f.id, f.prompt, "|", f.target, "|", rows[f.id].get("answer"))


def input_statistics(o, model, form, L):
    file = Path(f"/tmp/exp/inputs.{L}.{o.text_tokens}.pt")
    if file.exists():
        return InputStatistics(**torch.load(file))
    text = (o.data / "wikitext-2" / "train.txt")
    if not text.exists():
        text = next((o.data / "wikitext-2").glob("*val*"))
    wins = read_windows(text, model.tokenizer, windows=o.text_tokens // 256)
    d = model.model.config.hidden_size
    C, mu, n = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64), 0
    seen = []
    handle = form.driven.module.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    with torch.no_grad():
        for i in range(0, len(wins), 8):
            seen.clear()
            model.run(model.collate(wins[i:i + 8]), last=L)
            x = seen[-1][:, 1:].reshape(-1, d).double()
            C += x.mT @ x
            mu += x.sum(0)
            n += len(x)
    handle.remove()
    C, mu = C / n, mu / n
    print("tokens", n, "constant", float(mu @ torch.linalg.solve(C, mu)))
    torch.save({"moment": C, "mean": mu}, file)
    return InputStatistics(C, mu)


def mlp_inputs(walk, form):
    """Mean inputs [d, n] as keys are averaged."""
    total, front = None, walk._front(walk.layer)
    for chunk in walk.chunks:
        seen = []
        handle = form.driven.module.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
        walk._step(chunk, front)
        handle.remove()
        x = seen[-1]
        at = x[torch.arange(len(x)), chunk.last].double()
        if total is None:
            total = torch.zeros(walk.n, x.shape[-1], dtype=torch.float64)
        total.index_add_(0, walk.owner[chunk.rows], at * walk.weight[chunk.rows, None])
    return total.mT


def values_of(o, model, facts, contexts, recipe, L):
    if o.values and o.values.exists():
        return torch.load(o.values)
    t = time.process_time()
    found = optimise_values(model, facts, list(range(len(facts))), layer=L, contexts=contexts, settings=recipe.values, positions=200)
    print("values: cpu s a fact", (time.process_time() - t) / len(facts), "steps", sum(v.outcome.steps for v in found) / len(facts))
    z = torch.stack([v.z.double() for v in found], dim=1)
    if o.values:
        torch.save(z, o.values)
    return z


main()
