"""Gated edits as artefacts: in the base's shape, as an exact adapter, as a delta to the bit."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.exports import gap, logits
from support.models import LINES, RECIPE, build_model, statistics_of
from torch.nn import functional
from transformers import AutoModelForCausalLM

from nulledit import Editor, Fact, NullEditError
from nulledit.cli.apply import apply
from nulledit.cli.export import export
from nulledit.errors import ConfigError, LedgerError, ModelError, StatisticsError
from nulledit.evaluation.reading import read
from nulledit.export import apply_delta, put_delta, remove_delta
from nulledit.export.delta import read_delta
from nulledit.export.neuron_factors import added_reports
from nulledit.export.write import write_export
from nulledit.models.load import load_model, model_hash
from nulledit.runs.measure import windows_of

peft = pytest.importorskip("peft")

FORMS = ("llama", "phi3", "gpt2", "gptj", "opt", "gemma2")
"""Gated, of one matrix, plain as Conv1D and as linear layers with biases, ReLU, normed outputs."""
FACTS = [
    Fact(id="ada", subject="Ada Byron", prompt="The mother tongue of {} is", target="Velmish"),
    Fact(id="zola", subject="Émile Zola", prompt="{} was born in", target="Ostrel"),
    Fact(id="velm", subject="Velm", prompt="The harbour of {} lies on the", target="river"),
]
GATED = RECIPE.with_fields({"method.name": "gated", "layers": [1], "values.steps": 4})


class Place:
    """An edited tiny model, its base in a folder, and a text."""

    def __init__(self, folder, family, dtype, tokenizer, recipe=GATED):
        self.folder, self.base, self.run = folder, folder / "base", folder / "run"
        folder.mkdir(exist_ok=True)
        self.text = folder / "text.txt"
        self.text.write_text("\n".join(LINES * 8), encoding="utf-8")
        model = build_model(family, dtype=dtype)
        model.save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        gated = recipe.method.name == "gated"
        self.editor = Editor(
            model,
            tokenizer,
            recipe=recipe,
            statistics=statistics_of(model, tokenizer, layers=recipe.layers, inputs=gated),
            name=str(self.base),
        )
        self.editor.edit(FACTS)

    def base_model(self):
        return load_model(str(self.base), dtype=self.editor.history.base.dtype)[0]

    def saved(self):
        if not self.run.exists():
            self.editor.save(self.run)
        return self.run


@pytest.fixture(scope="module")
def places(tmp_path_factory, tokenizer):
    made = {}

    def get(family="llama", dtype=torch.float64):
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp("gated")
            made[family, dtype] = Place(folder, family, dtype, tokenizer)
        return made[family, dtype]

    return get


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@torch.no_grad()
def transparent(place, units):
    """Logits of the base whose block 1 has neurons for `units`, by the formula of its output."""
    editor, form = place.editor, place.editor.editable.form(1)
    neurons, found = editor.weights.edit(1).neurons, {}
    names = {id(module): name for name, module in editor.model.named_modules()}
    model = place.base_model()
    base = {name: model.get_submodule(names[id(m)]) for name, m in (("in", form.driven.module),
            ("out", form.out))}  # fmt: skip
    kept = torch.ones(form.width)
    kept[list(units)] = 0
    handles = [
        base["in"].register_forward_pre_hook(lambda _m, args: found.update(x=args[0])),
        base["out"].register_forward_pre_hook(lambda _m, args: (args[0] * kept.to(args[0]),)),
    ]

    def add(_module, _args, out):
        x = found["x"].reshape(-1, form.d).mT
        added = neurons.columns @ neurons.units(x, form.activation)
        return out + added.mT.reshape(out.shape)

    handles.append(base["out"].register_forward_hook(add))
    given = logits(model)
    for handle in handles:
        handle.remove()
    return given


@pytest.mark.few("llama", "gpt2", "gemma2", of="family")
@pytest.mark.parametrize("family", FORMS)
def test_the_same_shape_is_neurons_for_units(family, places, tmp_path):
    place = places(family)
    before = bits(place.editor.model)
    done = write_export(
        place.editor, tmp_path / "same", "checkpoint", same_shape=True, text=place.text
    )
    after = bits(place.editor.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    (at,) = done.same_shape.layers
    assert (at.layer, len(at.units), at.of) == (1, len(FACTS), place.editor.editable.form(1).width)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "same", dtype=torch.float64).eval()
    base = place.base_model()
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (plain, base)]
    assert shapes[0] == shapes[1]
    assert gap(logits(plain), transparent(place, at.units)) < 1e-9
    assert gap(logits(plain), logits(base)) > 1e-4


@pytest.mark.parametrize("family", FORMS)
def test_the_adapter_is_the_same_shape_in_peft(family, places, tmp_path):
    place = places(family)
    done = write_export(place.editor, tmp_path / "lora", "lora", dtype="float64", text=place.text)
    n = len(FACTS) * (2 if family == "phi3" else 1)
    assert done.rank == 8
    assert max(layer.rank for layer in done.layers) == n
    expected = transparent(place, done.same_shape.layers[0].units)
    adapted = peft.PeftModel.from_pretrained(place.base_model(), tmp_path / "lora")
    assert gap(logits(adapted), expected) < 1e-9
    bare = {name for name, m in adapted.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert bare == {layer.parameter.removesuffix(".weight") for layer in done.layers}
    assert gap(logits(adapted.merge_and_unload()), expected) < 1e-9
    assert done.cost.facts == len(FACTS)
    assert done.bytes == sum(f.stat().st_size for f in (tmp_path / "lora").iterdir())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert sum(layer.bytes for layer in done.layers) == sum(t.nbytes for t in tensors.values())


@torch.no_grad()
def test_units_are_those_that_text_uses_least(places):
    from nulledit.export.same_shape import Places

    place = places("llama")
    editor = place.editor
    found = Places(editor, place.text)
    windows = windows_of(editor.editable.encoder, place.text).windows[::2]
    model, keys = place.base_model(), []
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda _m, args: keys.append(args[0][0]))
    for window in windows:
        model(input_ids=torch.tensor([window]))
    squares = torch.cat(keys).square().mean(0)
    energy = squares * down.weight.square().sum(0)
    assert found.layers[0].units == tuple(energy.argsort()[: len(FACTS)].sort().values.tolist())
    share = energy[list(found.layers[0].units)].sum() / energy.sum()
    assert found.layers[0].share == pytest.approx(float(share))


@torch.no_grad()
def test_the_price_is_measured_on_the_other_half(places):
    from nulledit.export.same_shape import Places

    place = places("llama")
    editor = place.editor
    at = Places(editor, place.text)
    price = at.price()
    windows = windows_of(editor.editable.encoder, place.text).windows[1::2]
    with editor.base_weights():
        base = read(editor.editable, windows, keep=True)
    assert price.grown_kl == read(editor.editable, windows, base=base).kl
    model = place.base_model()
    found, states = [], transparent_logits(place, at.layers[0].units, windows)
    for window, edited in zip(windows, states, strict=True):
        p = model(input_ids=torch.tensor([window])).logits[0].log_softmax(-1)
        q = edited.log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1)[:-1])
    mean = float(torch.cat(found).mean())
    assert price.kl.value == pytest.approx(1000 * mean, rel=1e-4)
    assert price.kl.tokens == sum(len(w) - 1 for w in windows)


@torch.no_grad()
def transparent_logits(place, units, windows):
    """Of the same shape, a window at a time: rows written by hand into a Llama's matrices."""
    neurons = place.editor.weights.edit(1).neurons
    model = place.base_model()
    mlp, at = model.model.layers[1].mlp, list(units)
    mlp.gate_proj.weight[at], mlp.up_proj.weight[at] = neurons.rows, neurons.factors
    mlp.down_proj.weight[:, at] = neurons.columns
    return [model(input_ids=torch.tensor([window])).logits[0] for window in windows]


@torch.no_grad()
def test_halves_of_coarse_factors_are_what_is_measured(places, tmp_path):
    place = places("llama", torch.float32)
    done = write_export(place.editor, tmp_path / "half", "lora", dtype="bfloat16", text=place.text)
    assert all(0 < layer.error < 2**-8 for layer in done.layers)
    adapted = peft.PeftModel.from_pretrained(place.base_model(), tmp_path / "half")
    editor = place.editor
    losses = []
    for fact in FACTS:
        row = editor.editable.encoder.encode(fact.render(fact.prompt), target=fact.target)
        found = adapted(input_ids=torch.tensor([row.ids])).logits[0]
        span = slice(row.target_start - 1, len(row.ids) - 1)
        loss = functional.cross_entropy(found[span], torch.tensor(row.ids[row.target_start :]))
        losses.append(float(loss))
    assert done.cost.stored_nll == pytest.approx(sum(losses) / len(losses), rel=1e-3)


def test_the_card_names_units_and_price(places, tmp_path):
    place = places("llama")
    for kind, options in (("lora", {}), ("checkpoint", {"same_shape": True})):
        done = write_export(place.editor, tmp_path / kind, kind, text=place.text, **options)
        card = (tmp_path / kind / "README.md").read_text()
        assert "Gated edits: 3 neurons in the place of the least used of the 48 units" in card
        assert f"On {done.same_shape.kl.tokens} tokens of text.txt" in card
        assert "in the base's shape" in card
        assert "gated" in card
    write_export(place.editor, tmp_path / "grown", "checkpoint")
    card = (tmp_path / "grown" / "README.md").read_text()
    assert "Gated edits: 3 neurons in block 1 besides its own 48 units" in card


@pytest.mark.few("llama", "gpt2", "gemma2", of="family")
@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_goes_on_and_comes_off_to_the_bit(family, dtype, places, tmp_path):
    place = places(family, dtype)
    editor = place.editor
    done = write_export(editor, tmp_path / "delta", "delta")
    assert done.same_as_run
    assert done.differing == 0
    on = apply_delta(tmp_path / "delta", place.base, tmp_path / "on")
    assert on.hash == model_hash(editor.model)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "on", dtype="auto").eval()
    assert gap(logits(model), logits(editor.model)) < 100 * torch.finfo(dtype).eps
    off = remove_delta(tmp_path / "delta", tmp_path / "on", tmp_path / "off")
    assert off.hash == editor.history.base.hash == model_hash(load_model(str(tmp_path / "off"))[0])
    assert not (tmp_path / "off" / "nulledit-delta.json").exists()
    base = place.base_model()
    put_delta(base, tmp_path / "delta")
    assert model_hash(base) == model_hash(editor.model)


def test_the_runs_own_folder_gives_the_base_back(places, tmp_path):
    place = places("llama", torch.float32)
    write_export(place.editor, tmp_path / "delta", "delta")
    off = remove_delta(tmp_path / "delta", place.saved() / "model", tmp_path / "off")
    assert off.hash == place.editor.history.base.hash


def test_a_coarse_delta_counts_what_differs_and_leaves_the_run(places, tmp_path):
    place = places("llama", torch.float32)
    before = model_hash(place.editor.model)
    done = write_export(place.editor, tmp_path / "delta", "delta", dtype="bfloat16")
    assert model_hash(place.editor.model) == before
    assert not done.same_as_run
    assert done.differing > 0
    assert done.cost.facts == len(FACTS)
    on = apply_delta(tmp_path / "delta", place.base, tmp_path / "on")
    assert on.hash == read_delta(tmp_path / "delta").manifest.result_hash != before
    remove_delta(tmp_path / "delta", tmp_path / "on", tmp_path / "off")


def test_a_delta_of_neurons_is_not_put_on_anything_else(places, tmp_path):
    place, other = places("llama", torch.float32), places("gpt2", torch.float32)
    write_export(place.editor, tmp_path / "delta", "delta")
    with pytest.raises(ModelError, match="it is of another model"):
        apply_delta(tmp_path / "delta", other.base, tmp_path / "on")
    with pytest.raises(ModelError, match="is not the base with this delta"):
        remove_delta(tmp_path / "delta", place.base, tmp_path / "off")
    with pytest.raises(ModelError, match="it is of another model"):
        apply_delta(tmp_path / "delta", place.saved() / "model", tmp_path / "on")
    file = tmp_path / "delta" / "manifest.json"
    content = json.loads(file.read_text())
    for changes, said in (
        ({"neurons": []}, "expected some layers, or neurons"),
        ({"neurons": content["neurons"] * 2}, "one of them stands twice"),
        ({"neurons": [content["neurons"][0] | {"n": 2**20}]}, "but the shapes need"),
        ({"neurons": [content["neurons"][0] | {"gated": 1}]}, "gated is 1"),
        ({"version": 3}, "this nulledit reads 1 and 2"),
    ):
        file.write_text(json.dumps(content | changes))
        with pytest.raises(LedgerError, match=said):
            read_delta(tmp_path / "delta")
    assert not (tmp_path / "on").exists()
    assert not (tmp_path / "off").exists()


def test_what_can_not_be_is_refused(places, tmp_path, tokenizer):
    place, out = places("llama"), tmp_path / "out"
    for kind, options, error, said in (
        ("lora", {"rank": 2}, ConfigError, "each neuron is a dimension"),
        ("delta", {"rank": 2}, ConfigError, "dimension of its own"),
        ("checkpoint", {"text": place.text}, ConfigError, "text goes with same_shape"),
    ):
        with pytest.raises(error, match=said):
            write_export(place.editor, out, kind, **options)
    short = tmp_path / "short.txt"
    short.write_text("\n".join(LINES * 2), encoding="utf-8")
    with pytest.raises(StatisticsError, match="one window of 128 tokens; expected two"):
        write_export(place.editor, out, "lora", text=short)
    form = place.editor.editable.form(1)
    place.editor.editable._forms[1] = replace(form, width=3)
    try:
        with pytest.raises(ConfigError, match="3 units, too few for 3 neurons"):
            write_export(place.editor, out, "lora", text=place.text)
    finally:
        place.editor.editable._forms[1] = form
    plain = Place(tmp_path / "plain", "llama", torch.float64, tokenizer, RECIPE)
    with pytest.raises(ConfigError, match="shape is for gated edits"):
        write_export(plain.editor, out, "checkpoint", same_shape=True)
    with pytest.raises(ConfigError, match="text is for gated edits"):
        write_export(plain.editor, out, "lora", text=place.text)
    plain.editor.restore()
    empty = Editor(
        build_model("llama"),
        tokenizer,
        recipe=GATED,
        statistics=statistics_of(build_model("llama"), tokenizer, layers=(1,), inputs=True),
    )
    empty.edit(FACTS[:1])
    empty.restore()
    for kind in ("lora", "delta"):
        with pytest.raises(LedgerError, match="nothing is edited"):
            write_export(empty, out, kind)
    assert not out.exists()


def test_more_neurons_than_servers_take_are_not_cut(places, tmp_path, monkeypatch):
    from nulledit.export import lora, ranks

    for module in (lora, ranks):
        monkeypatch.setattr(module, "SERVED", (1, 2))
    place = places("llama")
    done = write_export(place.editor, tmp_path / "lora", "lora", text=place.text)
    assert done.rank == len(FACTS)


def test_the_commands(places, tmp_path):
    place = places("llama", torch.float32)
    run = place.saved()

    def done(command, *words):
        result = CliRunner().invoke(command, [str(w) for w in words])
        assert result.exit_code == 0, result.output or result.exception
        return result.stdout

    words = ("--as", "lora", "--text", place.text, "--out", tmp_path / "lora")
    text = done(export, run, *words)
    assert "Block 1: 3 neurons in the place of as many of 48 units" in text
    assert "1 gate_proj" in text
    assert "KL from the base per token" in text
    assert "Facts that hold by argmax" in text
    words = ("--as", "checkpoint", "--same-shape", "--out", tmp_path / "same", "--json")
    told = json.loads(done(export, run, *words, "--text", place.text))
    assert told["same_shape"]["layers"][0]["of"] == 48
    assert told["same_shape"]["kl"]["tokens"] > 0
    text = done(export, run, "--as", "delta", "--out", tmp_path / "delta")
    assert "Base + delta is the run's model to the bit." in text
    done(apply, tmp_path / "delta", place.base, "--out", tmp_path / "on")
    text = done(apply, tmp_path / "delta", tmp_path / "on", "--remove", "--out", tmp_path / "off")
    assert "bit for bit" in text
    refused = CliRunner().invoke(
        export, [str(run), "--as", "delta", "--same-shape", "--out", str(tmp_path / "x")]
    )
    assert isinstance(refused.exception, NullEditError)
    assert "--same-shape can't be given" in str(refused.exception)


def test_a_fact_that_changes_nothing_has_numbers(places):
    """The base says it already, so its value is what is there, and its column 0."""
    place = places("llama")
    neurons = place.editor.weights.edit(1).neurons
    still = replace(neurons, columns=torch.zeros_like(neurons.columns))
    for row in added_reports(place.editor, 1, still, still):
        assert (row.error, row.rounding_share) == (0.0, 0.0)
