"""What is tried on a model when it is taken up; hybrids, and models whose blocks differ."""

import dataclasses
import logging

import pytest
import reference
import torch
from click.testing import CliRunner
from support.cli import MAKE_KEYS
from support.locating import SPREAD, question
from support.models import RECIPE, statistics_of, untabled
from support.values import CONTEXTS, distance, ours, walk

from nulledit import Editor
from nulledit.cli.main import cli
from nulledit.config import Layout, Recipe, ValueSettings
from nulledit.errors import ModelError
from nulledit.models import trial
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import find_layout, listed
from nulledit.models.partial import PartialModel
from nulledit.tracing.trace import TraceSettings, trace

FEW = ValueSettings(steps=4, learning_rate=0.3, weight_decay=0.05)
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
DELTA = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
HALF = ["linear_attention", "full_attention"] * 2
HYBRIDS = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32},
    "granitemoehybrid": {
        **MAMBA,
        **LOCAL,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"] * 2,
        "residual_multiplier": 0.5,
    },
    "jamba": {
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 4,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "lfm2": {"full_attn_idxs": [1, 3], "block_auto_adjust_ff_dim": False},
    "minimax": {**LOCAL, "layer_types": HALF, "block_size": 8},
    "qwen3_5_text": {**DELTA, "layer_types": HALF},
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32, "layer_types": HALF},
}


def hybrid(kind):
    """A tiny model of a family with recurrent blocks; its experts by the kernel for float64."""
    model = untabled(kind, num_key_value_heads=1, head_dim=8, **HYBRIDS[kind]).double()
    model.config._experts_implementation = "eager"
    return model


@pytest.mark.few("qwen3_next", "falcon_h1", "lfm2", of="kind")
@pytest.mark.parametrize("kind", HYBRIDS)
def test_values_and_keys_of_a_hybrid_equal_the_reference(
    kind, tokenizer, facts, caplog, monkeypatch
):
    model, facts = hybrid(kind), facts[1:3]
    monkeypatch.setitem(reference.FAMILIES, kind, dataclasses.astuple(find_layout(model)))
    with caplog.at_level(logging.WARNING, "nulledit"):
        assert EditableModel(model, tokenizer).columns == 0
        assert EditableModel(model, tokenizer).columns == 0
    told = [r.getMessage() for r in caplog.records if "from its start" in r.getMessage()]
    assert len(told) == 1
    assert f"'{kind}' can't be run after kept beginnings" in told[0]
    values = ours(model, tokenizer, facts, settings=FEW, layer=1)
    for fact, value in zip(facts, values, strict=True):
        expected = reference.compute_z(
            model,
            tokenizer,
            fact,
            layer=1,
            contexts=CONTEXTS,
            steps=FEW.steps,
            lr=FEW.learning_rate,
            clamp=FEW.clamp,
            kl_weight=FEW.kl_weight,
            decay=FEW.weight_decay,
            stop_loss=FEW.stop_loss,
        )
        assert distance(value.z, expected.z) < 1e-5
    keys = reference.compute_keys(model, tokenizer, facts, 1, CONTEXTS)
    assert distance(walk(model, tokenizer, facts, first=1).keys().mT, keys.double()) < 1e-6


def test_a_hybrid_is_edited_and_undone(tokenizer, facts):
    model = hybrid("qwen3_5_text")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    editor = Editor(model, tokenizer, recipe=RECIPE, statistics=statistics_of(model, tokenizer))
    report = editor.edit(facts)
    assert all(c.outcome.steps for c in report.columns)
    editor.undo(*[fact.id for fact in facts])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_restorations_run_from_the_start_are_the_same(tiny_model, tokenizer):
    model = EditableModel(tiny_model("llama"), tokenizer)
    settings = TraceSettings(draws=2, window=2)
    expected = trace(model, question(), settings, spread=SPREAD)
    model.columns = 0
    found = trace(model, question(), settings, spread=SPREAD)
    for kind, effects in expected.effects.items():
        torch.testing.assert_close(found.effects[kind], effects)


def mixing_rows(block):
    """A block whose rows see each other, as where experts have room for so many tokens only."""
    own = block.forward

    def forward(hidden_states, *args, **kwargs):
        return own(hidden_states + hidden_states.mean(0, keepdim=True), *args, **kwargs)

    return forward


def without_gradient(block):
    own = block.forward
    return lambda *args, **kwargs: own(*args, **kwargs).detach()


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        (mixing_rows, "block 2 run by itself, with another row beside, gives other states"),
        (without_gradient, "can't be run a block at a time.*does not require grad"),
    ],
)
def test_a_model_that_values_could_not_rely_on_is_refused(spoiled, says, tiny_model, tokenizer):
    model = tiny_model("llama")
    block = model.model.layers[2]
    block.forward = spoiled(block)
    with pytest.raises(ModelError, match=says) as caught:
        EditableModel(model, tokenizer)
    assert "\n" not in str(caught.value)


def test_statistics_are_refused_before_the_text_is_read(
    tiny_model, tokenizer, tmp_path, monkeypatch
):
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff\xfe no text")

    def refused(_trial):
        raise ModelError("it can't be run")

    monkeypatch.setattr(trial._Trial, "passed", refused)
    command = [*MAKE_KEYS, str(tmp_path / "m"), "--text", str(text), "--layers", "1"]
    ran = CliRunner().invoke(cli, [*command, "--out", str(tmp_path / "s")])
    assert (ran.exit_code, "it can't be run" in ran.output) == (2, True)
    assert not (tmp_path / "s").exists()


MIXED = {
    "deepseek_v3": {
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "ernie4_5_moe": {
        "num_key_value_heads": 1,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
}


@pytest.mark.parametrize("kind", MIXED)
def test_dense_blocks_below_the_edited_ones_do_not_matter(kind, tokenizer, facts):
    model = untabled(kind, **MIXED[kind])
    partial = PartialModel(model)
    assert partial.layout == Layout("model.layers", "mlp.experts")
    assert [partial.fits(layer) for layer in range(4)] == [False, True, True, True]
    statistics = statistics_of(model, tokenizer, (1, 2))
    editor = Editor(model, tokenizer, recipe=RECIPE, statistics=statistics)
    editor.edit(facts[:2])
    assert len(editor.facts) == 2


def test_layers_that_the_layout_does_not_hold_for_are_refused_with_a_way_that_works(tokenizer):
    model = untabled("deepseek_v3", **MIXED["deepseek_v3"])
    recipe = dataclasses.replace(RECIPE, layers=(0, 1))
    with pytest.raises(ModelError, match=r"block 0 has no module mlp.experts; blocks 1 to 3 ha"):
        Editor(model, tokenizer, recipe=recipe)
    assert Editor(model, tokenizer, recipe=dataclasses.replace(RECIPE, layers=(1, 2)))
    dense = Recipe.from_dict(
        {**RECIPE.to_dict(), "layers": [0]}
        | {"layout": {"blocks": "model.layers", "mlp_out": "mlp.down_proj", "output": "plain"}}
    )
    assert Editor(model, tokenizer, recipe=dense).recipe.layers == (0,)
    with pytest.raises(ModelError, match=r"block 1 has no module mlp.down_proj; block 0 have it"):
        Editor(model, tokenizer, recipe=dataclasses.replace(dense, layers=(1,)))


def test_layers_chosen_by_depth_are_those_that_hold(tokenizer):
    model = untabled("deepseek_v3", **MIXED["deepseek_v3"])
    recipe = dataclasses.replace(RECIPE, layers=())
    assert Editor(model, tokenizer, recipe=recipe).recipe.layers == (1, 2)


def test_a_scale_of_one_is_plain(tiny_model):
    """Granite's own default; its layout says scaled."""
    model = tiny_model("granite")
    for block in model.model.layers:
        block.residual_multiplier = 1.0
    partial = PartialModel(model)
    partial.mlp_out(1)
    assert partial.scale(1) == 1.0


def test_a_place_in_a_sequential_is_no_expert():
    """CTRL writes its positions into what it is given, too."""
    model = untabled("ctrl", n_embd=16, n_layer=4, n_head=2, dff=48, n_positions=128)
    partial = PartialModel(model)
    assert partial.layout == Layout("transformer.h", "ffn.2")
    partial.mlp_out(1)


def test_a_list_of_projections_is_no_list_of_blocks():
    model = untabled(
        "gemma3n_text",
        num_key_value_heads=1,
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=400,
        altup_num_inputs=2,
        laurel_rank=4,
        num_kv_shared_layers=0,
        intermediate_size=[48] * 4,
        layer_types=["full_attention"] * 4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    says = r"no list of decoder blocks.*model.layers are given \[2, 2, 2, 16\]$"
    with pytest.raises(ModelError, match=says):
        PartialModel(model)


def test_a_piece_beyond_the_embedding_is_named(tiny_model, tokenizer):
    model = tiny_model("llama")
    model.resize_token_embeddings(300)
    editor = Editor(model, tokenizer, recipe=RECIPE)
    assert editor.editable.encoder.encode("abc").ids
    says = "piece 'ther' in 'The mother tongue' has number 397.*embeds 300.*tokenizer's 400"
    with pytest.raises(ModelError, match=says):
        editor.editable.encoder.encode("The mother tongue")
    with pytest.raises(ModelError, match="embeds 300 pieces"):
        statistics_of(model, tokenizer)


def test_layers_in_words():
    assert listed([3]) == "block 3"
    assert listed([1, 2, 3]) == "blocks 1 to 3"
    assert listed([0, 2]) == "blocks 0, 2"
