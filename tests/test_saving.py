"""What is taken at the door, what is noticed before it is overwritten, and what was saved."""

import inspect
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from support.models import RECIPE, build_model, config_of, statistics_of
from transformers import LlamaForSequenceClassification, Mistral3Config
from transformers import Mistral3ForConditionalGeneration as Mistral3

import nulledit
from nulledit import Editor, Fact, evaluation, export, read_facts, runs
from nulledit.errors import ConfigError, FactError, LedgerError, ModelError
from nulledit.models.load import load_model, model_hash
from nulledit.models.saving import save_weights
from nulledit.models.unchanged import bit_sums
from nulledit.statistics.collect import collect
from nulledit.statistics.merge import merge_statistics
from nulledit.statistics.spectra import Statistics


def edited(model, tokenizer, facts=()):
    editor = Editor(model, tokenizer, recipe=RECIPE, statistics=statistics_of(model, tokenizer))
    if facts:
        editor.edit(facts)
    return editor


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


# -- the door ------------------------------------------------------------------------------------


def lora():
    return LoraConfig(r=2, target_modules=["q_proj"])


class Compiled(torch.nn.Module):
    """As torch.compile wraps it; that takes seconds to import."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


def with_adapter(model):
    model.add_adapter(lora())
    return model


def with_parametrization(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)
    return model


@pytest.mark.parametrize(
    ("wrapped", "said"),
    [
        (lambda _: "smollm2-135m", "the text 'smollm2-135m'.*Editor.from_pretrained"),
        (lambda _: None, "model is a NoneType; expected a PreTrainedModel"),
        (torch.nn.DataParallel, "DataParallel.*give the model inside it, as model.module"),
        (Compiled, "give the model inside it, as model._orig_mod"),
        (lambda model: model.model, "LlamaModel has no head"),
        (lambda model: LlamaForSequenceClassification(model.config), "has no head"),
        (with_adapter, r"adapter in it \(at model.layers.0.self_attn.q_proj\).*merge_and_unload"),
        (lambda model: get_peft_model(model, lora()), "adapter in it.*merge_and_unload"),
        (with_parametrization, "computes its weight from other parameters"),
    ],
)
def test_what_is_no_plain_model_is_refused_with_the_way_out(wrapped, said, tokenizer):
    with pytest.raises(ModelError, match=said):
        Editor(wrapped(build_model("llama")), tokenizer, recipe=RECIPE)


def test_a_merged_adapter_is_taken(tokenizer):
    model = get_peft_model(build_model("llama"), lora()).merge_and_unload()
    Editor(model, tokenizer, recipe=RECIPE)


def test_statistics_are_not_made_of_what_is_refused(tokenizer):
    with pytest.raises(ModelError, match="adapter"):
        statistics_of(with_adapter(build_model("llama")), tokenizer)


def test_other_arguments_of_other_kinds_are_refused():
    class Processor:
        tokenizer = None

    with pytest.raises(ModelError, match="tokenizer is a str"):
        Editor(build_model("llama"), "gpt2")
    with pytest.raises(ModelError, match="tokenizer is a Processor"):
        Editor(build_model("llama"), Processor())


def test_a_recipe_is_one_or_names_one(tokenizer):
    with pytest.raises(ConfigError, match=r"recipe is a dict.*Recipe.from_dict"):
        Editor(build_model("llama"), tokenizer, recipe=RECIPE.to_dict())


def test_facts_come_in_any_plain_form(tokenizer, tmp_path, facts):
    """One, several, mappings of any known shape, and what was read, make the same edit."""
    fact = facts[1]
    record = {"subject": fact.subject, "prompt": fact.prompt, "target": fact.target}
    theirs = {**record, "target_new": fact.target, "ground_truth": "Paris"}
    del theirs["target"]
    (tmp_path / "facts.yaml").write_text(f"facts: [{record}]", encoding="utf-8")
    fact = Fact(**record)
    made = set()
    for given in (
        *(fact, [fact], (f for f in [fact]), record, [record], [theirs]),
        read_facts(tmp_path / "facts.yaml"),
    ):
        editor = edited(build_model("llama"), tokenizer)
        (column,) = editor.edit(given).columns
        made.add((column.fact.key, column.fact.demand, model_hash(editor.model)))
    assert len(made) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("no-such.yaml", "no-such.yaml"),
        (b"facts.yaml", "a file's path"),
        (3, "found int 3"),
        (None, "found NoneType"),
        ([3], r"facts\[0\] int 3"),
        ([["Velm", "{} is a", "town"]], r"facts\[0\] list"),
        ({"subject": "Velm", "prompt": "{} is a"}, "target is missing"),
        ([{"subject": "Velm", "prompt": "{} is a", "target": ""}], r"facts\[0\].*target is empty"),
    ],
)
def test_what_are_no_facts_is_said_in_one_line(given, said, tokenizer):
    editor = edited(build_model("llama"), tokenizer)
    finds = said == "target is missing"  # what is to be forgotten without one is asked for
    for call in (editor.edit,) if finds else (editor.edit, editor.forget):
        with pytest.raises(FactError, match=said) as caught:
            call(given)
        assert "\n" not in str(caught.value)
    assert not editor.history.events


def test_facts_may_be_a_file(tokenizer, tmp_path):
    file = tmp_path / "facts.yaml"
    file.write_text("- {subject: Velm, prompt: '{} is a', target: town}\n", encoding="utf-8")
    for given in (file, str(file)):
        editor = edited(build_model("llama"), tokenizer)
        assert [c.fact.subject for c in editor.edit(given).columns] == ["Velm"]


def test_notices_of_records_are_in_the_report(tokenizer):
    record = {"subject": "Velm", "prompt": "Velm is a", "target_new": "town", "ground_truth": "bay"}
    report = edited(build_model("llama"), tokenizer).edit([record, {**record}])
    assert any("repeats" in notice for notice in report.notices)


def test_public_paths_may_be_text():
    """No parameter of a public function takes a Path alone."""
    own = [*vars(Editor).items(), *vars(Statistics).items()]
    doors = [d for name, d in own if name.startswith("__") or not name.startswith("_")]
    doors += [collect, merge_statistics]
    for module in (nulledit, evaluation, export, runs):
        doors += [getattr(module, name) for name in module.__all__]
    results = (nulledit.NullEditError, nulledit.Export)  # an error, and what an export returns
    doors = [d for d in doors if d not in results]
    functions = {getattr(d, "__func__", d) for d in doors if callable(getattr(d, "__func__", d))}
    seen = 0
    for function in functions:
        for parameter in inspect.signature(function).parameters.values():
            if "Path" in str(parameter.annotation):
                seen += 1
                assert "str" in str(parameter.annotation), f"{function.__name__}: {parameter}"
    assert seen > 10


def test_a_model_is_saved_where_text_says(tokenizer, facts, tmp_path):
    model = build_model("llama")
    edited(model, tokenizer, facts[:1]).save_model(str(tmp_path / "model"))
    again, _ = load_model(str(tmp_path / "model"))
    assert model_hash(again) == model_hash(model)


# -- what something else wrote -------------------------------------------------------------------

CALLS = {
    "edit": lambda editor, _: editor.edit(Fact("Velm", "{} is a", "town")),
    "undo": lambda editor, _: editor.undo("ada"),
    "restore": lambda editor, _: editor.restore(),
    "rebuild": lambda editor, _: editor.rebuild(),
    "trial": lambda editor, _: editor.trial().__enter__(),
    "base_weights": lambda editor, _: editor.base_weights().__enter__(),
    "as_of": lambda editor, _: editor.as_of(0).__enter__(),
    "save": lambda editor, folder: editor.save(folder),
    "checkpoint": lambda editor, folder: export.write_checkpoint(editor, folder / "out"),
}


def nudge(weight):
    weight.data.view(-1)[-1] *= 1 + 1e-12


def swap(weight):
    weight.data[[0, 1]] = weight.data[[1, 0]]


def test_a_change_from_elsewhere_is_not_overwritten(tokenizer, facts, tmp_path):
    model = build_model("llama")
    editor = edited(model, tokenizer, facts[:1])
    events = len(editor.history.events)
    for weight, change in itertools.product(
        (
            model.model.layers[1].mlp.down_proj.weight,  # edited
            model.model.layers[0].mlp.down_proj.weight,
            model.model.embed_tokens.weight,
        ),
        (nudge, swap),
    ):
        before = weight.detach().clone()
        change(weight)
        changed = weight.detach().clone()
        for call in CALLS.values():
            with pytest.raises(LedgerError, match=r"changed by something else.*new Editor"):
                call(editor, tmp_path)
            assert torch.equal(weight, changed)
        weight.data.copy_(before)
    assert len(editor.history.events) == events
    assert not list(tmp_path.iterdir())
    editor.edit(facts)
    editor.save(tmp_path)


def test_both_ways_out_lead_out(tokenizer, facts):
    model = build_model("llama")
    editor = edited(model, tokenizer, facts[:1])
    weight = model.model.layers[1].mlp.down_proj.weight
    before = weight.detach().clone()
    weight.data += 1
    editor.weights.refresh()
    assert torch.equal(weight, before)
    editor.edit(facts[1:])
    weight.data += 1
    changed = weight.detach().clone()
    other = edited(model, tokenizer, facts[:1])
    other.restore()
    assert torch.equal(weight, changed)


def test_a_change_before_the_first_edit_is_noticed(tokenizer, facts):
    """W₀ would be another than the base's hash says, and the run could not be loaded."""
    model = build_model("llama")
    editor = edited(model, tokenizer)
    model.model.layers[1].mlp.down_proj.weight.data += 1
    with pytest.raises(LedgerError, match="changed by something else"):
        editor.edit(facts)


def test_an_adapter_that_came_later_is_refused(tokenizer, facts, tmp_path):
    model = build_model("llama")
    editor = edited(model, tokenizer, facts[:1])
    with_adapter(model)
    for call in ("edit", "save"):
        with pytest.raises(ModelError, match="adapter"):
            CALLS[call](editor, tmp_path)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_see_every_bit_and_every_place(dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(97, 53, bias=False).to(dtype)
    flat, bits = model.weight.data.view(-1), {8: torch.int64, 4: torch.int32, 2: torch.int16}
    before = bit_sums(model)
    for place in (0, 1, len(flat) // 2, len(flat) - 1):
        word = flat[place : place + 1].view(bits[dtype.itemsize])
        word ^= 1
        assert bit_sums(model) != before
        word ^= 1
    for a, b in ((0, 1), (3, 300), (0, len(flat) - 1)):
        flat[[a, b]] = flat[[b, a]]
        assert bit_sums(model) != before
        flat[[a, b]] = flat[[b, a]]
    assert bit_sums(model) == before


def test_sums_do_not_need_a_whole_word():
    """A parameter may be a part of another tensor."""
    flat = torch.arange(12.0)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(flat[1:8])
    alone = torch.nn.Module()
    alone.weight = torch.nn.Parameter(flat[1:8].clone())
    assert bit_sums(model) == bit_sums(alone)


# -- what was saved ------------------------------------------------------------------------------


def tied_by_hand(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def untied_by_hand(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)


@pytest.mark.parametrize(("tied", "change"), [(False, tied_by_hand), (True, untied_by_hand)])
def test_ties_made_by_hand_are_saved_as_they_are(tied, change, tokenizer, facts, tmp_path):
    config = config_of("llama")
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = type(build_model("llama"))(config).double().eval()
    change(model)
    editor = edited(model, tokenizer, facts[:2])
    editor.save(tmp_path)
    for _ in range(2):  # written whole, then in part
        again = Editor.load(tmp_path)
        assert torch.equal(logits(again.model), logits(model))
        editor.undo(editor.facts[0].id)
        editor.save(tmp_path)
    out = export.write_checkpoint(editor, tmp_path / "out").folder
    assert torch.equal(logits(load_model(str(out))[0]), logits(model))


def test_every_architecture_is_found_again(architecture, tmp_path):
    """What the look at the files expects is what transformers writes, for all of them."""
    model = build_model(architecture)
    save_weights(model, tmp_path)
    again, _ = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert model_hash(again) == model_hash(model)


@pytest.mark.parametrize("fault", ["lost", "changed", "cast", "no configuration"])
def test_what_was_written_otherwise_is_not_kept(fault, tokenizer, facts, tmp_path, monkeypatch):
    model = build_model("llama")
    editor = edited(model, tokenizer, facts[:1])
    plain = type(model).save_pretrained

    def spoiled(self, folder, **options):
        plain(self, folder, **options)
        file = folder / "model.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        if fault == "lost":
            del tensors["model.norm.weight"]
        elif fault == "changed":
            nudge(tensors["model.norm.weight"])
        elif fault == "cast":
            tensors = {name: tensor.float() for name, tensor in tensors.items()}
        else:
            (folder / "config.json").unlink()
        save_file(tensors, file, metadata)

    monkeypatch.setattr(type(model), "save_pretrained", spoiled)
    with pytest.raises(ModelError, match="not the model in memory"):
        editor.save(tmp_path / "run")
    with pytest.raises(ModelError, match="not the model in memory"):
        export.write_checkpoint(editor, tmp_path / "out")
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    editor.save(tmp_path / "run")
    assert Editor.load(tmp_path / "run").facts == editor.facts


def test_a_model_that_also_reads_images_is_loaded_again(tokenizer, facts, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
    config = Mistral3Config(
        text_config={**sizes, "model_type": "mistral", "vocab_size": 400, "num_hidden_layers": 4}
        | {"num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.25},
        vision_config={**sizes, "model_type": "pixtral", "num_hidden_layers": 1}
        | {"image_size": 32, "patch_size": 16},
        image_token_index=5,
    )
    model = Mistral3(config).eval()
    editor = edited(model, tokenizer, facts[:1])
    editor.save(tmp_path)
    again = Editor.load(tmp_path)
    assert type(again.model) is Mistral3
    assert torch.equal(logits(again.model), logits(model))
    assert again.facts == editor.facts


def test_a_full_disk_is_said_with_the_folder(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = build_model("llama")
    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(ModelError, match=r"mine: can't be written: .*No space left on device"):
        save_weights(model, tmp_path / "mine")
