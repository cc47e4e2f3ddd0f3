"""Models of unknown families: traced, used with a notice, or refused; a recipe's layout."""

import dataclasses
import logging

import pytest
import torch
from support.models import ARCHITECTURES, LINES, RECIPE, SIZES, WIDE, untabled
from transformers import AutoConfig, AutoModelForCausalLM

from nulledit import Editor
from nulledit.config import Layout, Recipe
from nulledit.editing.merge import conflicts
from nulledit.errors import ConfigError, LedgerError, ModelError, StatisticsError
from nulledit.models import layouts
from nulledit.models.batches import collate
from nulledit.models.editable_model import EditableModel
from nulledit.models.hooks import hooked
from nulledit.models.layout_tracing import probe
from nulledit.models.layouts import LAYOUTS, check_layout, find_layout, parameter_name
from nulledit.models.partial import PartialModel
from nulledit.statistics.collect import key_moments


def test_tracing_finds_what_the_table_says(architecture, tiny_model):
    assert probe(tiny_model(architecture)) == LAYOUTS[architecture]


def test_nothing_is_traced_without_weights():
    with torch.device("meta"):
        model = untabled("starcoder2")
    with pytest.raises(ModelError, match=r"can't be traced without its weights; .* in the recipe"):
        find_layout(model)
    layout = check_layout(model, Layout("model.layers", "mlp.c_proj"))
    assert parameter_name(model, layout, 1) == "model.layers.1.mlp.c_proj.weight"


def test_every_architecture_of_the_table_is_tested():
    assert {*ARCHITECTURES, *WIDE} == set(LAYOUTS)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("granite", torch.bfloat16), ("olmo2", torch.float16), ("gemma2", torch.bfloat16)],
)
def test_the_entry_is_seen_in_two_byte_dtypes(architecture, dtype, tiny_model):
    partial = PartialModel(tiny_model(architecture, dtype=dtype))
    partial.mlp_out(2)  # as declared
    expected = 0.4 if architecture == "granite" else 1.0
    assert partial.scale(2) == pytest.approx(expected, rel=1e-3)


def test_an_unknown_family_is_used_with_a_notice(tokenizer, facts, caplog, make_statistics):
    """Starcoder2 is not in the table: biases on W, GELU, grouped queries."""
    model = untabled("starcoder2", num_key_value_heads=1)
    assert find_layout(model) == Layout("model.layers", "mlp.c_proj")
    statistics = make_statistics(model)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "nulledit"):
        editor = Editor(model, tokenizer, recipe=RECIPE, statistics=statistics)
    told = [r.getMessage() for r in caplog.records if "not in the table" in r.getMessage()]
    assert len(told) == 1
    assert "'starcoder2'" in told[0]
    assert "mlp.c_proj, which enters the residual stream plain" in told[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = editor.edit(facts)
    assert all(c.outcome.loss > 0 for c in report.columns)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"model.layers.{i}.mlp.c_proj.weight" for i in RECIPE.layers}
    editor.undo(*[fact.id for fact in facts])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("olmoe", Layout("model.layers", "mlp.experts")),
        ("phimoe", Layout("model.layers", "mlp.experts")),
        ("granitemoe", Layout("model.layers", "block_sparse_moe.experts", "scaled")),
    ],
)
def test_experts_of_an_unknown_family_are_found(kind, layout):
    number = "num_experts" if kind == "olmoe" else "num_local_experts"
    more = {"residual_multiplier": 0.5} if kind == "granitemoe" else {}
    model = untabled(kind, **more, **{number: 4, "num_experts_per_tok": 2}, num_key_value_heads=1)
    partial = PartialModel(model)
    assert partial.layout == layout
    partial.mlp_out(2)


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        ("bert", {"is_decoder": False}, "no decoder.*encoder-only"),
        (
            "dbrx",  # experts that are neither modules nor stacked in three dimensions
            {
                **{"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
                "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
                "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1},
            },
            r"experts' matrices \(ffn.experts.mlp.w1.*are of a kind that can't be edited",
        ),
        ("mamba", {}, "no MLP output matrix.*in mixer, which looks at other tokens, too: no MLP$"),
    ],
)
def test_a_model_without_the_matrix_is_refused_in_one_line(kind, more, says):
    model = untabled(kind, **more)
    with pytest.raises(ModelError, match=f"'{kind}' is not known.*{says}") as caught:
        PartialModel(model)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_encoder_decoder_is_refused(tiny_model):
    model = tiny_model("llama")
    model.config.model_type, model.config.is_encoder_decoder = "other", True
    with pytest.raises(ModelError, match="has an encoder"):
        PartialModel(model)


def test_a_norm_after_the_sum_is_edited_where_the_layout_says_so():
    """OPT-350m norms the stream itself after each block; values are of what that norm is given."""
    sizes = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **sizes)).eval()
    with pytest.raises(ModelError, match=r"normed, not plain.*layout with output: normed"):
        PartialModel(model).mlp_out(1)
    partial = PartialModel(model, dataclasses.replace(LAYOUTS["opt"], output="normed"))
    batch = collate([[3, 9, 4]], pad_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        hidden, given = partial.run_to_values(batch, layer=1)
        delta = torch.linspace(-1, 1, 16)
        with hooked(partial.mlp_out(1), lambda _m, _a, output: output + delta):
            moved, now = partial.run_to_values(batch, layer=1)
        torch.testing.assert_close(now - given, delta.expand_as(given), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(partial.with_value(1, hidden, given, delta), moved)


@pytest.mark.parametrize(
    ("layout", "error", "says"),
    [
        ({"blocks": "model.blocks", "mlp_out": "mlp.down_proj"}, ModelError, "no list of blocks"),
        ({"blocks": "model.layers", "mlp_out": "mlp.out"}, ModelError, "no module mlp.out; its"),
        ({"blocks": "model.layers", "mlp_out": "self_attn"}, ModelError, "neither plain"),
        ({"blocks": "model.layers", "mlp_out": "mlp.act_fn"}, ModelError, "neither plain"),
        ({"blocks": "model.layers", "mlp_out": "mlp"}, ModelError, "no weight matrix"),
        ({"blocks": "model.layers"}, ConfigError, "layout.mlp_out is ''"),
        ({"blocks": "a..b", "mlp_out": "c"}, ConfigError, "expected a path"),
        (
            {"blocks": "model.layers", "mlp_out": "mlp.down_proj", "output": "normed"},
            ModelError,
            "enters the residual stream plain, not normed.*; give the recipe .* output: plain$",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout, error, says, tiny_model, tokenizer):
    def edit_by(given):
        recipe = Recipe.from_dict({**RECIPE.to_dict(), "layout": given})
        return Editor(tiny_model("llama"), tokenizer, recipe=recipe)

    with pytest.raises(error, match=says):
        edit_by(layout)


def test_a_recipes_layout_goes_before_table_and_tracing(
    tiny_model, tokenizer, facts, make_statistics, tmp_path, monkeypatch
):
    """Attention's output matrix in the place of W: used, recorded, found again; never mixed up."""
    layout = {"blocks": "model.layers", "mlp_out": "self_attn.o_proj", "output": "plain"}
    recipe = Recipe.from_dict({**RECIPE.to_dict(), "layout": layout})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert "layout" not in RECIPE.to_dict(), "recipes recorded before are as they were"
    model = tiny_model("llama", dtype=torch.float32)
    given = dict(vars(model))
    usual = make_statistics(model)
    with pytest.raises(StatisticsError, match="keys of the usual matrix"):
        Editor(model, tokenizer, recipe=recipe, statistics=usual).edit(facts)
    editable = EditableModel(model, tokenizer, recipe.layout)
    moments = key_moments(editable, [tokenizer(line)["input_ids"] for line in LINES], (1, 2))
    own = dataclasses.replace(
        usual,
        spectra={layer: moment.spectrum() for layer, moment in moments.items()},
        manifest=dataclasses.replace(usual.manifest, layers=(1, 2), mlp_out=editable.named_matrix),
    )
    assert own.manifest.mlp_out == "self_attn.o_proj"
    editor = Editor(model, tokenizer, recipe=recipe, statistics=own)
    editor.edit(facts)
    assert editor.editable.parameter_name(1) == "model.layers.1.self_attn.o_proj.weight"
    assert vars(model) == given, "the model object is told nothing"
    assert PartialModel(model).parameter_name(1) == "model.layers.1.mlp.down_proj.weight"
    editor.save(tmp_path / "run")
    again = Editor.load(tmp_path / "run")
    assert again.editable.layout == recipe.layout
    assert again.undo(facts[0].id).removed == (facts[0].id,)
    with pytest.raises(ConfigError, match="layout is another"):
        again.next_epoch(dataclasses.replace(recipe, layout=LAYOUTS["llama"]))
    again.next_epoch(RECIPE)
    assert again.recipe.layout == recipe.layout
    other = Editor(tiny_model("llama", dtype=torch.float32), tokenizer, recipe=RECIPE)
    with pytest.raises(LedgerError, match="different layouts"):
        conflicts(editor.history, other.history)
    monkeypatch.delitem(layouts.LAYOUTS, "llama")
    assert find_layout(other.model) == Layout("model.layers", "mlp.down_proj")
