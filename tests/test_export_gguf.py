"""GGUF: the run's model in a copy of the base's file, and its edits as an adapter of it."""

import copy
import json
import re

import pytest
import torch
from click.testing import CliRunner
from support.exports import gap, logits
from support.gguf import read_back, tensors_of, write_base
from support.models import LINES, RECIPE, build_model, statistics_of

from nulledit import Editor, Fact
from nulledit.cli.export import export
from nulledit.errors import ConfigError, LedgerError, ModelError
from nulledit.export.write import write_export

gguf = pytest.importorskip("gguf")

FAMILIES = ("llama", "qwen2", "gemma2", "gemma3_text", "gpt2", "phi3")
"""Permuted heads, plain, norms stored plus one, Conv1D with biases, gate and up in one matrix."""
FACTS = [
    Fact(id="ada", subject="Ada Byron", prompt="The mother tongue of {} is", target="Velmish"),
    Fact(id="zola", subject="Émile Zola", prompt="{} was born in", target="Ostrel"),
    Fact(id="velm", subject="Velm", prompt="The harbour of {} lies on the", target="river"),
]
RECIPES = {
    "alphaedit": RECIPE.with_fields({"values.steps": 4}),
    "gated": RECIPE.with_fields({"method.name": "gated", "layers": [1], "values.steps": 4}),
}


class Place:
    """An edited tiny model, its base as GGUF, and a text."""

    def __init__(self, folder, model, tokenizer, method, type_="F32"):
        recipe = RECIPES[method]
        self.run, self.file, self.text = folder / "run", folder / "base.gguf", folder / "text.txt"
        self.text.write_text("\n".join(LINES * 8), encoding="utf-8")
        write_base(model, self.file, type_)
        self.base = copy.deepcopy(model).double()
        self.editor = Editor(
            model,
            tokenizer,
            recipe=recipe,
            statistics=statistics_of(
                model, tokenizer, layers=recipe.layers, inputs=method == "gated"
            ),
        )
        self.editor.edit(FACTS)

    def written(self, folder, kind="gguf", **options):
        return write_export(self.editor, folder, kind, gguf=self.file, **options)

    def edited(self):
        return copy.deepcopy(self.editor.model).double()


@pytest.fixture(scope="module")
def places(tmp_path_factory, tokenizer):
    made = {}

    def get(family="llama", method="alphaedit"):
        if (family, method) not in made:
            folder = tmp_path_factory.mktemp("gguf")
            model = build_model(family, dtype=torch.float32)
            made[family, method] = Place(folder, model, tokenizer, method)
        return made[family, method]

    return get


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tokenizer):
    """`packed("gated")`: a run whose base is what a file in four bits holds."""
    made = {}

    def get(method):
        if method not in made:
            folder = tmp_path_factory.mktemp("packed")
            plain = build_model("llama", dtype=torch.float32, hidden=64)
            file = write_base(plain, folder / "plain.gguf", "Q4_1")
            model = read_back(file, plain).float()
            made[method] = Place(folder, model, tokenizer, method)
            made[method].file = file
        return made[method]

    return get


# -- the whole model -------------------------------------------------------------------------


@pytest.mark.few("llama", "gpt2", of="family")
@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_is_the_edited_model_as_transformers_reads_it(family, method, places, tmp_path):
    place = places(family, method)
    done = place.written(tmp_path / "out", tensor_type="f32")
    read = read_back(tmp_path / "out" / "model.gguf", place.base)
    assert gap(logits(read), logits(place.edited())) < 1e-10
    assert gap(logits(place.base), logits(place.edited())) > 1e-4
    assert done.cost is None, "nothing is lost in float32"
    assert all(layer.update_share > 0 and layer.rounding_share < 1e-6 for layer in done.layers)


@pytest.mark.parametrize("method", RECIPES)
def test_what_is_not_edited_keeps_its_bits(method, packed, tmp_path):
    place = packed(method)
    place.written(tmp_path / "out")
    before, after = tensors_of(place.file), tensors_of(tmp_path / "out" / "model.gguf")
    assert list(before) == list(after)
    changed = {name for name in before if before[name] != after[name]}
    blocks = "012" if method == "gated" else "12"
    if method == "alphaedit":
        assert changed == {f"blk.{i}.ffn_down.weight" for i in (1, 2)}
        return
    assert changed == {f"blk.{i}.ffn_{m}.weight" for i in range(4) for m in ("up", "gate", "down")}
    types = {name: after[name][0] for name in changed}
    assert {n for n, kind in types.items() if kind == "F16"} == {
        f"blk.1.ffn_{m}.weight" for m in ("up", "gate", "down")
    }, blocks
    assert set(types.values()) == {"F16", "Q4_1"}, "zeros are added to packed rows as they are"
    read = read_back(tmp_path / "out" / "model.gguf", place.base)
    width = place.base.config.intermediate_size
    for number in (0, 2, 3):
        own, wide = place.base.model.layers[number].mlp, read.model.layers[number].mlp
        assert torch.equal(wide.up_proj.weight[:width], own.up_proj.weight)
        assert torch.equal(wide.down_proj.weight[:, :width], own.down_proj.weight)
        for rest in (wide.up_proj.weight[width:], wide.down_proj.weight[:, width:]):
            assert rest.numel()
            assert not rest.any()


def test_fields_and_tokens_are_the_base_s(packed, tmp_path):
    place = packed("gated")
    place.written(tmp_path / "out")
    before, after = (
        {n: f.contents() for n, f in gguf.GGUFReader(file).fields.items()}
        for file in (place.file, tmp_path / "out" / "model.gguf")
    )
    said = {n for n in after if n.startswith("nulledit.")}
    assert after["nulledit.state"] == place.editor.history.state_id
    changed = {n for n in before if before[n] != after[n]}
    assert changed == {"llama.feed_forward_length", "GGUF.kv_count"}
    assert after["llama.feed_forward_length"] == 256, "192 and 3, in whole 64s"
    assert set(after) - set(before) == said


def test_a_base_that_says_its_width_by_block_is_answered_so(tmp_path, tokenizer, monkeypatch):
    def by_block(writer, width, once=gguf.GGUFWriter.add_feed_forward_length):
        once(writer, [width] * 4)

    monkeypatch.setattr(gguf.GGUFWriter, "add_feed_forward_length", by_block)
    place = Place(tmp_path, build_model("llama", dtype=torch.float32), tokenizer, "gated")
    place.written(tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["llama.feed_forward_length"].contents() == [64] * 4, "48 and 3, in whole 64s"


def test_the_same_shape_is_that_of_the_checkpoint(places, tmp_path):
    place = places("llama", "gated")
    done = place.written(tmp_path / "out", tensor_type="f32", same_shape=True, text=place.text)
    plain = write_export(
        place.editor, tmp_path / "plain", "checkpoint", same_shape=True, text=place.text
    )
    assert done.same_shape == plain.same_shape
    read = read_back(tmp_path / "out" / "model.gguf", place.base)
    whole = type(place.base).from_pretrained(tmp_path / "plain", dtype=torch.float64)
    assert read.config.intermediate_size == place.base.config.intermediate_size
    assert gap(logits(read), logits(whole)) < 1e-10
    card = (tmp_path / "out" / "README.md").read_text()
    assert "in the place of the least used" in card


@pytest.mark.parametrize("method", RECIPES)
def test_the_price_of_a_type_is_that_of_the_file(method, packed, tmp_path):
    """What the run's facts lose is asked of the weights that the file holds."""
    place = packed(method)
    for type_ in ("f16", "q8_0", "bf16"):
        done = place.written(tmp_path / type_, tensor_type=type_)
        read = read_back(tmp_path / type_ / "model.gguf", place.base).float()
        losses = [loss_of(read, place.editor, fact) for fact in FACTS]
        assert done.cost.stored_nll == pytest.approx(sum(losses) / len(FACTS), rel=1e-4)
        own = [loss_of(place.editor.model, place.editor, fact) for fact in FACTS]
        assert done.cost.exact_nll == pytest.approx(sum(own) / len(FACTS), rel=1e-4)
        assert {layer.rounding_share > 1e-6 for layer in done.layers} == {True}
        assert losses != own


@torch.no_grad()
def loss_of(model, editor, fact):
    """Of a fact's target, nats a token."""
    row = editor.editable.encoder.encode(fact.render(fact.prompt), target=fact.target)
    said = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    places = range(row.target_start - 1, len(row.ids) - 1)
    each = [float(said[p, i]) for p, i in zip(places, row.target_ids, strict=True)]
    return -sum(each) / len(each)


def test_the_run_is_as_before(places, tmp_path):
    place = places("llama", "gated")
    before = {n: t.clone() for n, t in place.editor.model.state_dict().items()}
    place.written(tmp_path / "a", tensor_type="f16")
    place.written(tmp_path / "b", same_shape=True, text=place.text)
    after = place.editor.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_experts_are_one_tensor(tmp_path, tokenizer):
    model = build_model("qwen3_moe", dtype=torch.float32)
    place = Place(tmp_path, model, tokenizer, "alphaedit")
    place.written(tmp_path / "out", tensor_type="f32")
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    for layer in (1, 2):
        held = torch.from_numpy(read[f"blk.{layer}.ffn_down_exps.weight"].data.copy())
        assert torch.equal(held, model.model.layers[layer].mlp.experts.down_proj)
        assert not torch.equal(held.double(), place.base.model.layers[layer].mlp.experts.down_proj)
    with pytest.raises(ConfigError, match="a GGUF adapter for a mixture of experts"):
        place.written(tmp_path / "lora", "gguf-lora")


# -- the adapter -----------------------------------------------------------------------------


def with_adapter(base, file, like):
    """`base` as llama.cpp has it with the adapter: W + alpha / rank · BA in each matrix."""
    fields = {n: f.contents() for n, f in gguf.GGUFReader(file).fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == like.config.model_type
    factors = {t.name: torch.from_numpy(t.data.copy()).double() for t in
               gguf.GGUFReader(file).tensors}  # fmt: skip
    model = copy.deepcopy(base)
    for name in {n.rpartition(".")[0] for n in factors}:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        block, kind = re.fullmatch(r"blk\.(\d+)\.ffn_(up|gate|down)\.weight", name).groups()
        weight = model.model.layers[int(block)].mlp.get_submodule(f"{kind}_proj").weight
        weight.data += fields["adapter.lora.alpha"] / b.shape[1] * b @ a
    return model


def test_an_adapter_is_the_edited_model(places, tmp_path):
    place = places("llama")
    done = place.written(tmp_path / "out", "gguf-lora")
    assert done.rank == len(FACTS), "llama.cpp takes any rank, so nothing is padded"
    adapted = with_adapter(place.base, tmp_path / "out" / "adapter.gguf", place.base)
    assert gap(logits(adapted), logits(place.edited())) < 1e-5
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert f"FROM {place.file}\nADAPTER ./adapter.gguf\n" in modelfile


def test_an_adapter_of_neurons_is_the_same_shape(places, tmp_path):
    place = places("llama", "gated")
    done = place.written(tmp_path / "out", "gguf-lora", text=place.text)
    assert done.same_shape is not None
    adapted = with_adapter(place.base, tmp_path / "out" / "adapter.gguf", place.base)
    place.written(tmp_path / "same", same_shape=True, text=place.text, tensor_type="f32")
    same = read_back(tmp_path / "same" / "model.gguf", place.base)
    assert gap(logits(adapted), logits(same)) < 1e-5


def test_factors_are_those_of_peft_s_adapter(places, tmp_path):
    from safetensors.torch import load_file

    place = places("llama")
    place.written(tmp_path / "gguf", "gguf-lora", rank=2)
    write_export(place.editor, tmp_path / "peft", "lora", rank=2)
    plain = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for tensor in gguf.GGUFReader(tmp_path / "gguf" / "adapter.gguf").tensors:
        block, side = tensor.name.split(".")[1], tensor.name[-1]
        name = f"base_model.model.model.layers.{block}.mlp.down_proj.lora_{side.upper()}.weight"
        held = torch.from_numpy(tensor.data.copy())
        own = plain[name][:2] if side == "a" else plain[name][:, :2]
        assert torch.equal(held, own)


# -- what is refused -------------------------------------------------------------------------


def refused(place, tmp_path, error, match, kind="gguf", file=None, **options):
    with pytest.raises(error, match=match):
        write_export(place.editor, tmp_path / "x", kind, gguf=file or place.file, **options)
    assert not (tmp_path / "x").exists()


def test_a_run_without_a_file_says_how_to_make_one(places, tmp_path):
    for kind in ("gguf", "gguf-lora"):
        with pytest.raises(ConfigError, match=r"gguf: give a GGUF file .* convert_hf_to_gguf\.py"):
            write_export(places().editor, tmp_path / "x", kind)


def test_a_file_of_another_model_is_refused(places, tmp_path):
    place = places()
    other = build_model("llama", dtype=torch.float32, seed=5)
    unlike = write_base(other, tmp_path / "unlike.gguf")
    larger = build_model("llama", dtype=torch.float32, hidden=32)
    wide = write_base(larger, tmp_path / "wide.gguf")
    plain = write_base(build_model("gpt2", dtype=torch.float32), tmp_path / "gpt2.gguf")
    for kind in ("gguf", "gguf-lora"):
        refused(place, tmp_path, ModelError, "of another model", kind, unlike)
        refused(place, tmp_path, ModelError, r"shape \[32, 96\]", kind, wide)
        refused(place, tmp_path, ModelError, r"shape \[16, 64\]", kind, plain)
    gated = places("llama", "gated")
    refused(gated, tmp_path, ModelError, r"has no tensor for model\S+gate_proj", file=plain)


def test_what_is_no_whole_model_is_refused(places, tmp_path):
    place = places()
    missing, broken, text = (tmp_path / n for n in ("none.gguf", "broken.gguf", "text.gguf"))
    broken.write_bytes(place.file.read_bytes()[:200])
    text.write_text("no model")
    refused(place, tmp_path, ModelError, "no such file", file=missing)
    refused(place, tmp_path, ModelError, "can't be read as GGUF", file=broken)
    refused(place, tmp_path, ModelError, "can't be read as GGUF", file=text)
    part = write_base(place.base.float(), tmp_path / "part.gguf", split__count=2)
    place.base.double()
    refused(place, tmp_path, ModelError, "llama-gguf-split --merge", file=part)
    place.written(tmp_path / "adapter", "gguf-lora")
    adapter = tmp_path / "adapter" / "adapter.gguf"
    refused(place, tmp_path, ModelError, "can't be read as GGUF", file=adapter)


def test_a_type_that_does_not_hold_the_weights_is_refused(places, tmp_path):
    refused(places(), tmp_path, ConfigError, "use another type than q8_0", tensor_type="q8_0")
    refused(places(), tmp_path, ConfigError, "expected one of f32", tensor_type="q4_k")
    refused(
        places(), tmp_path, ConfigError, "one of f32, f16, bf16", "gguf-lora", tensor_type="q8_0"
    )


def test_neurons_with_thresholds_are_no_adapter(places, tmp_path, monkeypatch):
    place = places("gpt2", "gated")
    measured = "nulledit.export.gguf_lora.adapter_factors"
    monkeypatch.setattr(measured, lambda *_, **__: pytest.fail("measured before it was refused"))
    refused(place, tmp_path, ConfigError, "no place for the biases", "gguf-lora", text=place.text)


def test_options_go_with_what_they_are_for(places, tmp_path):
    refused(places(), tmp_path, ConfigError, "for gated edits", same_shape=True)
    refused(places(), tmp_path, ConfigError, "goes with same_shape", text=places().text)


def test_without_edits_there_is_nothing(tmp_path, tokenizer):
    for method in RECIPES:
        folder = tmp_path / method
        folder.mkdir()
        place = Place(folder, build_model("llama", dtype=torch.float32), tokenizer, method)
        place.editor.undo(*[fact.id for fact in FACTS])
        refused(place, tmp_path, LedgerError, "nothing is edited")


def test_a_copy_in_fewer_bits_is_told_of(places, packed, tmp_path, caplog):
    place = places()
    place.written(tmp_path / "exact")
    assert "not the run's base" not in caplog.text
    plain = packed("alphaedit").base
    half = write_base(plain.half().float(), tmp_path / "half.gguf", "F16")
    plain.double()
    write_export(packed("alphaedit").editor, tmp_path / "near", "gguf", gguf=half)
    assert "is not the run's base to the bit" in caplog.text


# -- the command -----------------------------------------------------------------------------


def test_the_command_says_how_to_start_it(places, tmp_path):
    place = places()
    place.editor.save(place.run)

    def said(*words):
        result = CliRunner().invoke(export, [str(place.run), *map(str, words)])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.stdout

    whole = said("--as", "gguf", "--gguf", place.file, "--out", tmp_path / "g", "--type", "f32")
    assert "GGUF, its edited matrices in f32: " in whole
    assert f"llama-cli -m {tmp_path / 'g'}/model.gguf" in whole
    assert (tmp_path / "g" / "Modelfile").read_text() == "FROM ./model.gguf\n"
    adapter = said("--as", "gguf-lora", "--gguf", place.file, "--out", tmp_path / "a")
    assert "GGUF adapter of rank 3 in f32: " in adapter
    assert f"--lora {tmp_path / 'a'}/adapter.gguf" in adapter
    peft = said("--as", "lora", "--out", tmp_path / "p q")
    assert f"--lora-modules '{f'edits={tmp_path}/p q'}'" in peft
    assert f"hf upload NAME '{tmp_path}/p q'" in peft
    assert "--enable-lora --max-lora-rank 8 " in peft
    assert "sglang" in peft
    found = json.loads(
        said("--as", "gguf", "--gguf", place.file, "--out", tmp_path / "j", "--json")
    )
    assert found["dtype"] == "f16"
    assert {layer["rank"] for layer in found["layers"]} == {0}
