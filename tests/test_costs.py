"""Costs by block against a slow form that runs one text at a time; what they suggest."""

import csv
import json

import pytest
import torch
import yaml
from support.cli import done, refused
from support.models import LINES, build_model

from nulledit import Fact
from nulledit.cli.tune import _traced
from nulledit.config import ChatSettings, ContextSettings, Recipe
from nulledit.editing.keys import LayerwiseForward
from nulledit.errors import ConfigError, FactError, StatisticsError
from nulledit.methods.gates import GateSettings, TextInputs, gated_neurons
from nulledit.models.editable_model import EditableModel
from nulledit.tracing import CostSettings, cheapest, cost_of, measure_costs
from nulledit.tracing.cost_passes import Passes, _chances
from nulledit.tracing.costs import RIDGE, energies

WINDOW = 24
SETTINGS = CostSettings(windows=3, tokens=200, window=WINDOW)
CONTEXTS = ("{}", "Then, he said. {}", "The river. {}")


@pytest.fixture(scope="module")
def windows(tokenizer):
    ids = tokenizer(" ".join(LINES * 6))["input_ids"]
    return [ids[at : at + WINDOW] for at in range(0, WINDOW * 14, WINDOW)]


@pytest.fixture
def told(facts):
    """Facts with words before their subjects."""
    return [
        Fact(f.subject, f"I know that {f.prompt}", f.target, id=f.id, paraphrases=f.paraphrases)
        for f in facts
    ]


class Watched:
    """What one run of the model gives, block by block, with its graph."""

    def __init__(self, model, ids):
        self.hidden, self.keys, self.inputs, self.written = [], [], [], []
        handles = []
        for layer, block in enumerate(model.blocks):
            out, driven = model.mlp_out(layer), model.form(layer).driven.module

            def keep(found, what):
                def hook(_module, args, output):
                    value = args[0] if what == "given" else output
                    found.append(value[0] if isinstance(value, tuple) else value)

                return hook

            handles += [
                block.register_forward_hook(keep(self.hidden, "made")),
                out.register_forward_hook(keep(self.keys, "given")),
                out.register_forward_hook(keep(self.written, "made")),
                driven.register_forward_hook(keep(self.inputs, "given")),
            ]
        self.logits = model.model(torch.tensor([ids])).logits[0]
        for handle in handles:
            handle.remove()
        self.values = self.written if model.values_at_output else self.hidden

    def at(self, kind, layer):
        states = getattr(self, kind)[layer]
        return states.reshape(-1, states.shape[-1])


def slow(model, facts, windows):
    """Sensitivity, and costs by keys and inputs, one text at a time."""
    sums, seen = {}, 0
    for ids in windows[:-3]:
        run = Watched(model, ids)
        seen += len(ids) - 1
        for kind in ("keys", "inputs"):
            for layer in range(model.depth):
                rows = run.at(kind, layer)[1:].detach()
                sums[kind, layer] = sums.get((kind, layer), 0) + rows.T @ rows
    squared = [[] for _ in range(model.depth)]
    for number, ids in enumerate(windows[-3:]):
        run = Watched(model, ids)
        odds = run.logits.double().softmax(-1).cumsum(-1)
        drawn = (odds < _chances(len(ids), 0, number)[:, None]).sum(-1)
        total = run.logits.log_softmax(-1)[range(len(ids)), drawn].sum()
        for layer in range(model.depth):
            [by] = torch.autograd.grad(total, run.values[layer], retain_graph=True)
            squared[layer].append(
                by.reshape(len(ids), -1)[1:].square().sum(1).mean() / by.shape[-1]
            )
    found = {}
    for layer in range(model.depth):
        found["sensitivity", layer] = float(sum(squared[layer]) / 3)
        for kind in ("keys", "inputs"):
            C = sums[kind, layer] / seen
            C = torch.linalg.inv(C + RIDGE * C.diagonal().mean() * torch.eye(len(C)))
            costs = []
            for fact in facts:
                mean, prompts = 0, fact.prompts
                for prompt in prompts:
                    for context, weight in zip(CONTEXTS, (0.5, 0.25, 0.25), strict=True):
                        row = model.encoder.encode_template(prompt, fact.subject, context=context)
                        run = Watched(model, row.ids)
                        at = run.at(kind, layer)[row.subject_last].detach()
                        mean = mean + weight * at / len(prompts)
                row = model.encoder.encode_template(fact.prompt, fact.subject)
                h = Watched(model, row.ids).at("values", layer)[row.subject_last].detach()
                costs.append(float(h @ h / (mean @ C @ mean)) * found["sensitivity", layer])
            found[kind, layer] = sum(costs) / len(costs)
    return found


DENSE = ("llama", "gpt2", "gptj", "falcon", "opt", "phi3", "cohere", "granite", "gemma2", "olmo2")


@pytest.mark.few("llama", "gpt2", "falcon", "granite", "olmo2", of="kind")
@pytest.mark.parametrize("kind", DENSE)
def test_costs_equal_one_text_at_a_time(kind, tokenizer, windows, told):
    model = EditableModel(build_model(kind, layers=3), tokenizer)
    found = measure_costs(model, told[:2], windows, SETTINGS, contexts=CONTEXTS)
    expected = slow(model, told[:2], windows)
    close = 1e-4 if kind == "cohere" else 1e-6  # its norms are float32 in any model
    assert [block.layer for block in found.blocks] == [0, 1, 2]
    for block in found.blocks:
        for name in ("sensitivity", "keys", "inputs"):
            rate = getattr(block, name)
            assert rate.mean == pytest.approx(expected[name, block.layer], rel=close), name
            assert rate.mean > 0


def test_drives_are_of_the_gates_that_edits_make(tokenizer, windows, told):
    """s of a gate's own subject is 1; what text and other facts reach is counted as it is."""
    model = EditableModel(build_model("llama", layers=3), tokenizer)
    found = measure_costs(model, told, windows, SETTINGS, contexts=CONTEXTS)
    passes = Passes(model, [], [1], 4096, lambda *_: None)
    X = passes.subjects(told, CONTEXTS, 0.5).inputs[1]
    rows = [Watched(model, ids).at("inputs", 1)[1:].detach() for ids in windows]
    text, held = torch.cat(rows[:-3]), torch.cat(rows[-3:])
    C = text.T @ text / len(text)
    given = TextInputs(C + RIDGE * C.diagonal().mean() * torch.eye(len(C)), text.mean(0))
    form = model.form(1).units
    neurons, _ = gated_neurons(X, torch.zeros(16, len(told)), given, form, GateSettings())
    factors = neurons.factors / (neurons.factors @ X).diagonal()[:, None]  # s = 1 at its subject
    s, among = held @ factors.T, factors @ X
    drives = found.blocks[1].gates
    assert drives.text == pytest.approx(float(s.square().mean(0).sqrt().median()), rel=1e-3)
    assert drives.text_open == pytest.approx(float((s > 0.5).double().mean()), abs=1e-9)
    assert drives.text_rare == pytest.approx(float(s.amax(0).median()), rel=1e-3)
    among.fill_diagonal_(-1)
    assert drives.rival == pytest.approx(float(among.max()), rel=1e-3)
    pairs = len(told) * (len(told) - 1)
    assert drives.facts_open == pytest.approx(int((among > 0.5).sum()) / pairs)


def test_one_subject_is_no_rival_of_its_own(tokenizer, windows, told):
    model = EditableModel(build_model("llama", layers=3), tokenizer)
    ada = told[0]
    twin = Fact(ada.subject, ada.prompt, "river", id="twin")
    alone = measure_costs(model, [ada, twin], windows, SETTINGS)
    assert alone.blocks[0].gates.rivals is None
    assert alone.blocks[0].gates.facts_open == 0
    three = measure_costs(model, [ada, twin, told[2]], windows, SETTINGS)
    assert three.blocks[0].gates.rival < 0.99, "a twin drives the gate as the fact itself does"


def test_neither_what_runs_together_nor_the_order_of_facts_matters(tokenizer, windows, told):
    model = EditableModel(build_model("gpt2", layers=3), tokenizer)
    one, other = (
        measure_costs(
            model,
            facts,
            windows,
            CostSettings(windows=3, tokens=200, window=WINDOW, positions=positions),
            contexts=CONTEXTS,
        )
        for facts, positions in ((told, 1), (told[::-1], 10_000))
    )
    for a, b in zip(one.blocks, other.blocks, strict=True):
        for name in ("sensitivity", "keys", "inputs"):
            assert getattr(a, name).mean == pytest.approx(getattr(b, name).mean, rel=1e-7)
        for name in ("text", "text_rare", "text_open", "facts_open", "rival"):
            assert getattr(a.gates, name) == pytest.approx(getattr(b.gates, name), rel=1e-5)
    seed = CostSettings(windows=3, tokens=200, window=WINDOW, seed=1)
    again = measure_costs(model, told, windows, seed, contexts=CONTEXTS)
    assert again.blocks[0].sensitivity.mean != one.blocks[0].sensitivity.mean


@pytest.mark.few
def test_what_is_read_at_subjects_is_what_edits_read(architecture, tokenizer, told):
    model = EditableModel(build_model(architecture), tokenizer)
    gated = {
        form.out: i for i in range(4) for form in model.forms() if form.out is model.mlp_out(i)
    }
    inputs = sorted(gated.values())
    found = Passes(model, [1, 3], inputs, 30, lambda *_: None).subjects(told, CONTEXTS, 0.5)
    for columns, of_inputs in ((found.keys, False), (found.inputs, True)):
        for layer, read in columns.items():
            walk = LayerwiseForward(
                model, told, first=0, contexts=CONTEXTS, bare_weight=0.5, inputs=of_inputs
            )
            for _ in range(layer):
                walk.advance()
            torch.testing.assert_close(read, walk.keys(), rtol=1e-5, atol=1e-7)
            h = walk.hidden(layer).square().sum(0)
            torch.testing.assert_close(found.squares[layer], h, rtol=1e-5, atol=1e-7)


def test_sensitivity_is_how_fast_kl_grows(tokenizer, windows):
    """Σ KL of what is predicted, of a small δ in any direction at one token: ½ ‖δ‖² tr(S)/d."""
    model, ids, n = EditableModel(build_model("llama"), tokenizer), windows[0][:8], 512
    passes = Passes(model, [], [], 4096, lambda *_: None)
    told = passes.gradients([ids] * n, [1], {}, 0)[1]  # a window's draws are its own
    expected = sum(told) / n
    generator = torch.Generator().manual_seed(0)
    delta = torch.zeros(n, len(ids), 16, dtype=torch.float64)
    at = 1 + torch.arange(n) % (len(ids) - 1)
    small = 1e-3 * torch.randn(n, 16, generator=generator, dtype=torch.float64)
    delta[range(n), at] = small
    batch = model.collate([ids] * n)
    with torch.no_grad():
        states = model.run(batch, last=1)
        base, moved = (
            model.logits(model.run_normed(batch, states=given, first=2)).log_softmax(-1)
            for given in (states, states + delta)
        )
    kl = (base.exp() * (base - moved)).sum(-1).sum(1)
    found = float((2 * kl / small.square().sum(1)).mean())
    assert found == pytest.approx(expected, rel=0.25)


def test_experts_have_keys_and_no_gates(tokenizer, windows, told):
    model = EditableModel(build_model("mixtral"), tokenizer)
    found = measure_costs(model, told, windows, SETTINGS)
    assert all(b.inputs is None and b.gates is None and b.keys.mean > 0 for b in found.blocks)
    assert found.suggestion.gated is None
    assert found.suggestion.layers
    keys = torch.randn(4 * 48, 3, dtype=torch.float64)
    passes = Passes(model, [1], [], 4096, lambda *_: None)
    moment = passes.text(windows).keys[1]
    parts = 0
    for i, block in enumerate(moment.value):
        part = keys[48 * i : 48 * (i + 1)]
        if moment.tokens[i] >= 48:
            ridge = RIDGE * block.diagonal().mean() * torch.eye(48)
            parts = parts + (part * torch.linalg.solve(block + ridge, part)).sum(0)
    torch.testing.assert_close(energies(moment, keys), parts)
    without = CostSettings(windows=3, tokens=200, window=WINDOW, keys=False)
    with pytest.raises(Exception, match="leave out --inputs"):
        measure_costs(model, told, windows, without)


def test_the_model_is_as_before(tokenizer, windows, told):
    model = build_model("gpt2").train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        measure_costs(EditableModel(model, tokenizer), told, windows, SETTINGS)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_two_byte_weights_are_measured(tokenizer, windows, told):
    exact, rounded = (
        measure_costs(
            EditableModel(build_model("llama", dtype=dtype), tokenizer), told, windows, SETTINGS
        )
        for dtype in (torch.float64, torch.bfloat16)
    )
    for a, b in zip(exact.blocks, rounded.blocks, strict=True):
        assert b.inputs.mean == pytest.approx(a.inputs.mean, rel=0.5)
        assert b.gates.text == pytest.approx(a.gates.text, rel=0.2)


def test_subjects_on_the_first_token_do_not_count(tokenizer, windows, told):
    model = EditableModel(build_model("llama", layers=3), tokenizer)
    sink = Fact("I", "{} speak", "Velmish", id="sink")
    found = measure_costs(model, [sink, *told], windows, SETTINGS)
    assert found.at_first_token == ("sink",)
    assert found.facts == len(told)
    without = measure_costs(model, told, windows, SETTINGS)
    assert found.blocks == without.blocks
    with pytest.raises(FactError, match="first token"):
        measure_costs(model, [sink], windows, SETTINGS)


def test_too_little_text_is_refused(tokenizer, told, tmp_path):
    model = EditableModel(build_model("llama", layers=3), tokenizer)
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    bare = ContextSettings(count=0)
    with pytest.raises(StatisticsError, match=r"text.txt: has \d+ windows of 24 tokens, expected"):
        cost_of(model, told, tmp_path / "text.txt", bare, SETTINGS)
    few = CostSettings(windows=2, tokens=20, window=WINDOW)
    with pytest.raises(StatisticsError, match=r"23 tokens .* 48 wide .* more --tokens"):
        cost_of(model, told, tmp_path / "text.txt", bare, few)
    with pytest.raises(ConfigError, match="windows is 1; expected 2"):
        CostSettings(windows=1)


# -- what is suggested -----------------------------------------------------------------------


def test_the_span_is_the_cheapest_block_and_its_like():
    keys = dict(enumerate([30, 11, 7.8, 7.7, 6.9, 7.7, 9.8, 12, 6.95]))
    inputs = dict(enumerate([9, 8, 7, 6, 5, 6, 7, 8, 1]))
    found = cheapest(keys, inputs, depth=9)
    assert found.layers == (2, 3, 4, 5), "the last block has nothing above it, and 9.8 is dear"
    assert found.gated == 4
    assert Recipe.from_dict(yaml.safe_load(found.recipe_line)).layers == found.layers
    gated = Recipe.from_dict(yaml.safe_load(found.gated_line))
    assert (gated.method.name, gated.layers) == ("gated", (4,))


def test_a_flat_floor_gives_a_span_of_the_cheapest_few():
    costs = dict(enumerate([1.1, 1.05, 1.02, 1.0, 1.01, 1.03, 1.2, 1.0]))
    assert cheapest(costs, {}, depth=20).layers == (1, 2, 3, 4, 5)
    assert cheapest(costs, {}, depth=20, count=2).layers == (3, 4)
    assert cheapest({5: 1.0, 7: 1.0}, {}, depth=20).layers == (5,), "7 is no neighbour"
    nothing = cheapest({}, {}, depth=20)
    assert (nothing.layers, nothing.gated, nothing.recipe_line, nothing.gated_line) == (
        (),
        None,
        "",
        "",
    )


# -- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("costs")
    build_model("llama", dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(LINES * 30))
    facts = [
        {"subject": s, "prompt": "I know that {} works as a", "target": "baker"}
        for s in ("Ada Byron", "Karo Dun", "Velm", "Ostrel")
    ]
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


def asked(place, out):
    return (
        *("locate", place / "model", place / "facts.json", "--by", "cost", "--out", out),
        *("--text", place / "text.txt", "--tokens", 400, "--windows", 3, "--quiet"),
    )


def test_a_folder_with_all_that_was_promised(place, tmp_path):
    out = tmp_path / "costs"
    said = done(*asked(place, out)).stdout
    names = {"report.md", "costs.png", "costs.svg", "costs.csv", "summary.json"}
    assert {p.name for p in out.iterdir()} == names
    summary = json.loads((out / "summary.json").read_text())
    assert summary["by"] == "cost"
    assert summary["facts"]["counted"] == 4
    suggestion, page = summary["suggestion"], (out / "report.md").read_text()
    for line in (suggestion["recipe_line"], suggestion["gated"]["recipe_line"]):
        assert line in page
        assert all(part in said for part in line.splitlines())
    with (out / "costs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["0", "1", "2", "3"]
    assert float(rows[1]["keys.mean"]) == summary["blocks"][1]["keys"]["mean"]
    assert _traced(out) == tuple(suggestion["layers"]), "`tune --trace` takes the folder"
    assert "is not empty" in refused(*asked(place, out))


def test_the_same_call_gives_the_same_numbers(place, tmp_path):
    one, other = (
        json.loads(done(*asked(place, tmp_path / name), "--json").stdout) for name in "ab"
    )
    assert one.pop("seconds") != other.pop("seconds")
    assert one == other


def test_inputs_alone(place, tmp_path):
    found = json.loads(done(*asked(place, tmp_path / "c"), "--inputs", "--json").stdout)
    assert found["suggestion"]["layers"] == []
    assert found["suggestion"]["gated"]["layer"] in (0, 1, 2)
    page = (tmp_path / "c" / "report.md").read_text()
    assert "neuron" in page
    assert "cost in W" not in page


def test_options_of_the_other_way_are_refused(place, tmp_path):
    by = ("locate", place / "model", place / "facts.json", "--out", tmp_path / "t", "--quiet")
    assert "--text belongs to --by cost" in refused(*by, "--text", place / "text.txt")
    assert "--draws belongs to --by trace" in refused(*by, "--by", "cost", "--draws", 2)
    assert "--by cost needs --text" in refused(*by, "--by", "cost")
    gone = ("--by", "cost", "--text", place / "gone.txt")
    assert "no such file" in refused(*by, *gone)
    assert not (tmp_path / "t").exists()


def test_a_recipe_in_chat_reads_subjects_in_the_template(tokenizer, windows, told):
    from copy import deepcopy

    words = deepcopy(tokenizer)
    words.chat_template = "{% for m in messages %}The {{ m.role }}: {{ m.content }}{% endfor %}"
    model = EditableModel(build_model("llama", layers=3), words)
    plain = measure_costs(model, told, windows, SETTINGS)
    chat = measure_costs(model.in_chat(ChatSettings()), told, windows, SETTINGS)
    assert chat.blocks[1].sensitivity == plain.blocks[1].sensitivity, "text is no chat"
    assert chat.blocks[1].inputs.mean != plain.blocks[1].inputs.mean
