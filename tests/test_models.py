"""Layouts, partial runs and loading."""

import dataclasses
import json
import random
from itertools import combinations, pairwise

import pytest
import torch
from support.models import NORMED
from torch.nn import functional
from transformers import AutoConfig

from nulledit.config import Placement
from nulledit.errors import ConfigError, ModelError
from nulledit.models.batches import Batch, collate, runs_by_length, share_beginnings
from nulledit.models.layouts import (
    as_out_in,
    find_layout,
    frozen,
    mlp_out,
    parameter_name,
    stored_weight,
    write_weight,
)
from nulledit.models.load import load_model, model_hash
from nulledit.models.partial import PartialModel
from nulledit.models.placement import chosen
from nulledit.models.tokens import context_length

ROWS = [[5, 9, 13, 20, 7], [8, 3], [30, 31, 32]]
CPU = torch.device("cpu")


def whole_states(model, row):
    """Hidden states after every block, the plain way."""
    partial, found = PartialModel(model), []
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in partial.blocks
    ]
    logits = model(torch.tensor([row])).logits[0]
    for handle in handles:
        handle.remove()
    return [f[0] for f in found], logits


SHARING = [(7, 8, 9, 3), (7, 8, 9, 4, 5), (7, 8), (2, 2, 2), (2, 2, 2, 6), (5, 1)]
LABELS = ["a", "a", "b", "c", "c", "d"]
LIMITS = [3, 4, 1, 1, 3, 0]


def cost_of(runs, lengths, worth):
    return sum(len(run) * max(lengths[i] for i in run) + worth for run in runs)


@pytest.mark.parametrize("worth", [0, 1, 5, 30, 10_000])
def test_runs_by_length_cost_least_of_all_cuts(worth):
    """Of all ways to cut the rows in their order of length; each row is in one run."""
    for seed in range(20):
        draw = random.Random(seed)
        lengths = [draw.choice([1, 2, 3, 7, 9, 30]) for _ in range(draw.randint(1, 9))]
        runs = runs_by_length(lengths, worth)
        assert sorted(i for run in runs for i in run) == list(range(len(lengths)))
        assert all(run == sorted(run) for run in runs)
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        least = min(
            cost_of([order[a:b] for a, b in pairwise([0, *cuts, len(order)])], lengths, worth)
            for n in range(len(order))
            for cuts in combinations(range(1, len(order)), n)
        )
        assert cost_of(runs, lengths, worth) == least
    assert runs_by_length([4, 1, 4, 1], 0) == [[1, 3], [0, 2]]
    assert runs_by_length([4, 1, 4, 1], 6) in ([[1, 3], [0, 2]], [[0, 1, 2, 3]])
    assert runs_by_length([4, 1, 4, 1], 7) == [[0, 1, 2, 3]]


def test_rows_are_cut_after_what_their_label_has_in_common():
    shared = share_beginnings(SHARING, LABELS, LIMITS, columns=9, pad_id=0, device=CPU)
    assert shared.cuts == [3, 3, 1, 1, 1, 0]
    for i, row in enumerate(SHARING):
        stem = shared.stems.ids[shared.stem[i]][shared.stems.mask[shared.stem[i]].bool()]
        rest = shared.rests.ids[i][shared.rests.mask[i].bool()]
        assert (*stem.tolist(), *rest.tolist()) == row
        places = shared.rests.positions[i][: len(rest)]
        assert places.tolist() == list(range(shared.cuts[i], len(row)))


@pytest.fixture
def in_float64(monkeypatch):
    """Norms and softmax that families compute in float32 keep float64.

    Their rounding depends on how long a row is and on the processor; beside it no equality of
    rows could be told to more than six digits.
    """
    softmax, as_float = functional.softmax, torch.Tensor.float

    def exact_softmax(x, dim=None, dtype=None, **more):
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **more)

    monkeypatch.setattr(functional, "softmax", exact_softmax)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else as_float(x)
    )


@torch.no_grad()
def test_rows_after_shared_stems_are_the_whole_rows(architecture, tiny_model, in_float64):
    """Also those with a stem of no token; and what is recorded after a prefix joins it."""
    partial = PartialModel(tiny_model(architecture))
    whole = partial.run(collate(SHARING, pad_id=0, device=CPU))
    shared = share_beginnings(SHARING, LABELS, LIMITS, columns=9, pad_id=0, device=CPU)
    stems = partial.record_prefix(shared.stems).select(shared.stem)
    after = partial.run(stems.before(shared.rests), prefix=stems)
    heads = Batch(*(t[:, :1] for t in vars(shared.rests).values()))
    longer = stems.then(partial.record_prefix(heads, prefix=stems))
    tails = Batch(*(t[:, 1:] for t in vars(shared.rests).values()))
    further = partial.run(longer.before(tails), prefix=longer)
    for i, (row, cut) in enumerate(zip(SHARING, shared.cuts, strict=True)):
        torch.testing.assert_close(after[i, : len(row) - cut], whole[i, cut : len(row)])
        torch.testing.assert_close(further[i, : len(row) - cut - 1], whole[i, cut + 1 : len(row)])


@torch.no_grad()
def test_beginnings_of_unequal_length_are_the_whole_rows(architecture, tiny_model, in_float64):
    """Rows longer than a window, stems of 14, 3 and no tokens, heads of 1 to 6 after them."""
    partial = PartialModel(tiny_model(architecture))
    words = [3 + 7 * i % 390 for i in range(60)]
    rows = [words[:24], [*words[:14], *words[30:41]], words[40:52], [*words[40:43], *words[:9]]]
    rows.append(words[50:60])
    labels, limits = [0, 0, 1, 1, 2], [23, 23, 11, 11, 0]
    whole = partial.run(collate(rows, pad_id=0, device=CPU))
    shared = share_beginnings(rows, labels, limits, columns=99, pad_id=0, device=CPU)
    assert shared.cuts == [14, 14, 3, 3, 0]
    stems = partial.record_prefix(shared.stems).select(shared.stem)
    after = partial.run(stems.before(shared.rests), prefix=stems)
    more = [1, 5, 2, 6, 3]  # of each row, in the head
    rests = [row[cut:] for row, cut in zip(rows, shared.cuts, strict=True)]
    heads = collate([rest[:n] for rest, n in zip(rests, more, strict=True)], pad_id=0, device=CPU)
    heads = dataclasses.replace(heads, positions=shared.rests.positions[:, : heads.ids.shape[1]])
    longer = stems.then(partial.record_prefix(heads, prefix=stems))
    tails = collate([rest[n:] for rest, n in zip(rests, more, strict=True)], pad_id=0, device=CPU)
    starts = torch.tensor(shared.cuts) + torch.tensor(more)
    tails = dataclasses.replace(tails, positions=tails.positions + starts[:, None])
    further = partial.run(longer.before(tails), prefix=longer)
    for i, (row, cut) in enumerate(zip(rows, shared.cuts, strict=True)):
        torch.testing.assert_close(after[i, : len(row) - cut], whole[i, cut : len(row)])
        start = cut + more[i]
        torch.testing.assert_close(further[i, : len(row) - start], whole[i, start : len(row)])


def test_nothing_is_shared_where_columns_would_not_suffice():
    """One row's long beginning beside another's long rest: some families' masks are of one size."""
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
    shared = share_beginnings(rows, [0, 1], [5, 1], columns=10, pad_id=0, device=CPU)
    assert shared.cuts == [5, 1]
    shared = share_beginnings(rows, [0, 1], [5, 1], columns=9, pad_id=0, device=CPU)
    assert shared.cuts == [0, 0]
    assert shared.stems.ids.shape == (2, 0)
    assert shared.rests.mask.sum() == 12


@torch.no_grad()
def test_partial_runs_are_the_model(architecture, tiny_model):
    """Any span, from ids or kept states, gives the model's own numbers."""
    model = tiny_model(architecture)
    partial = PartialModel(model)
    batch = collate(ROWS, pad_id=0, device=CPU)
    states = partial.run(batch, last=1)
    upper = partial.run(batch, states=states, first=2, last=2)
    normed = partial.run_normed(batch, states=states, first=2)
    for i, row in enumerate(ROWS):
        expected, logits = whole_states(model, row)
        n = len(row)
        torch.testing.assert_close(states[i, :n], expected[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(upper[i, :n], expected[2], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(partial.logits(normed[i, :n]), logits, rtol=1e-5, atol=1e-5)
    embedded = partial.run(batch, last=-1)
    again = partial.run(batch, states=embedded, first=0, last=1)
    torch.testing.assert_close(again, states, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_kept_prefixes_are_the_model(architecture, tiny_model):
    model = tiny_model(architecture)
    partial = PartialModel(model)
    cuts = [2, 0, 1]
    states = partial.run(collate(ROWS, pad_id=0, device=CPU), last=1)
    heads = collate([r[:c] for r, c in zip(ROWS, cuts, strict=True)], pad_id=0, device=CPU)
    tails = collate([r[c:] for r, c in zip(ROWS, cuts, strict=True)], pad_id=0, device=CPU)
    prefix = partial.record_prefix(heads, states[:, :2], first=2)
    kept = torch.zeros(3, tails.ids.shape[1], states.shape[-1], dtype=states.dtype)
    for i, (row, cut) in enumerate(zip(ROWS, cuts, strict=True)):
        kept[i, : len(row) - cut] = states[i, cut : len(row)]
    for _ in range(2):  # the prefix is not used up
        batch = Batch(
            tails.ids,
            torch.cat([prefix.mask, tails.mask], 1),
            tails.positions + torch.tensor(cuts)[:, None],
        )
        normed = partial.run_normed(batch, states=kept, first=2, prefix=prefix)
    for i, (row, cut) in enumerate(zip(ROWS, cuts, strict=True)):
        _, logits = whole_states(model, row)
        found = partial.logits(normed[i, : len(row) - cut])
        torch.testing.assert_close(found, logits[cut:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_do_not_depend_on_their_padding_or_on_other_rows(architecture, tiny_model):
    partial = PartialModel(tiny_model(architecture, dtype=torch.float32))
    right = partial.run(collate(ROWS, pad_id=0, device=CPU), last=2)
    left = partial.run(collate(ROWS, pad_id=0, device=CPU, left=True), last=2)
    for i, row in enumerate(ROWS):
        alone = partial.run(collate([row], pad_id=0, device=CPU), last=2)[0]
        for found in (right[i, : len(row)], left[i, -len(row) :]):
            assert float((found - alone).norm() / alone.norm()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_writing_a_value_moves_the_layer_by_exactly_the_residual(architecture, dtype, tiny_model):
    """W + r kᵀ/‖k‖², over the family's scale, changes what stands where values do at k by r.

    That is the block's output, or where a norm follows W its input, by which the block's output
    then is as foreseen.
    """
    partial = PartialModel(tiny_model(architecture, dtype=dtype))
    batch = collate([ROWS[0]], pad_id=0, device=CPU)
    with partial.reading_keys([1]) as keys:
        hidden, before = (t[0, 3] for t in partial.run_to_values(batch, layer=1))
    key = keys[1][0, 3].double()
    residual = torch.linspace(-4, 4, len(before), dtype=torch.float64)
    step = torch.outer(residual / partial.scale(1), key) / key.square().sum()
    module = partial.mlp_out(1)
    write_weight(module, as_out_in(module) + step.to(partial.model.dtype))
    hidden_now, after = (t[0, 3] for t in partial.run_to_values(batch, layer=1))
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.1}
    torch.testing.assert_close((after - before).double(), residual, **close)
    foreseen = partial.with_value(1, hidden, before, residual)
    torch.testing.assert_close(hidden_now, foreseen, **close)
    if architecture in NORMED:
        assert not torch.allclose((hidden_now - hidden).double(), residual, **close)
        assert hidden_now.shape == after.shape
    else:
        assert torch.equal(hidden_now, after)


def test_a_square_weight_keeps_its_orientation():
    """GPT-2 stores [d_in, d_out]; with d_in = d_out only the module's type can tell."""
    from transformers.pytorch_utils import Conv1D

    conv, linear = Conv1D(6, 6), torch.nn.Linear(6, 6, bias=False)
    x = torch.randn(6)
    torch.testing.assert_close(as_out_in(conv) @ x + conv.bias, conv(x))
    torch.testing.assert_close(as_out_in(linear) @ x, linear(x))


def test_names_and_layers(architecture, tiny_model):
    model = tiny_model(architecture)
    layout, names = find_layout(model), dict(model.named_parameters())
    assert names[parameter_name(model, layout, 1)] is stored_weight(mlp_out(model, layout, 1))
    partial = PartialModel(model)
    assert partial.layout == layout
    assert names[partial.parameter_name(1)] is stored_weight(partial.mlp_out(1))
    with pytest.raises(ModelError, match="layers 0 to 3"):
        mlp_out(model, layout, 4)


@pytest.mark.parametrize(
    ("kind", "more", "length"),
    [
        ("llama", {"max_position_embeddings": 77}, 77),
        ("gpt2", {"n_positions": 78}, 78),
        ("mpt", {"max_seq_len": 79}, 79),
        ("gemma3", {"text_config": {"max_position_embeddings": 4096}}, 4096),
        ("bloom", {}, 2048),
    ],
)
def test_the_context_is_what_the_text_configuration_says(kind, more, length):
    assert context_length(AutoConfig.for_model(kind, **more)) == length


def test_an_integer_weight_is_refused():
    module = torch.nn.Linear(4, 4, bias=False)
    module.weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        as_out_in(module)


def test_frozen_undoes_itself(tiny_model):
    model = tiny_model("llama").train()
    model.lm_head.weight.requires_grad_(False)
    with frozen(model):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert model.training
    assert model.model.norm.weight.requires_grad
    assert not model.lm_head.weight.requires_grad


def test_load_from_a_folder_and_refuse_what_is_no_model(tiny_model, tokenizer, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded, words = load_model(str(tmp_path / "m"))
    assert model_hash(loaded) == model_hash(model)
    assert words("Ada")["input_ids"] == tokenizer("Ada")["input_ids"]
    half, _ = load_model(str(tmp_path / "m"), dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    for place in (tmp_path / "nothing", "./nothing", "a/b/c", "nothing/"):
        with pytest.raises(ModelError, match=f"{place}: there is no such folder"):
            load_model(str(place))
    with pytest.raises(ModelError, match=r"config.json: is a file; expected one of"):
        load_model(str(tmp_path / "m" / "config.json"))
    with pytest.raises(ModelError, match="can't load"):
        load_model("nobody/nothing")
    with pytest.raises(ModelError, match="unknown dtype 'int3'"):
        load_model(str(tmp_path / "m"), dtype="int3")
    with pytest.raises(ModelError, match="can't use device"):
        load_model(str(tmp_path / "m"), device="nonsense")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="no decoder-only"):
        load_model(str(tmp_path / "bert"))


def test_hash_sees_one_changed_weight_and_ignores_order(tiny_model):
    model = tiny_model("gpt2")
    before = model_hash(model)
    assert model_hash(tiny_model("gpt2")) == before
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1e-6
    assert model_hash(model) != before


def test_an_accelerator_is_taken_unless_another_device_is_named(monkeypatch):
    monkeypatch.setattr("nulledit.models.placement.accelerators", lambda: ("cuda", 2))
    assert chosen(None, None) == chosen("auto", None) == Placement("sequential")
    assert chosen("cpu", None) == "cpu"
    assert chosen(Placement("balanced"), None) == Placement("balanced")
    assert chosen(None, "auto") == Placement("auto")
    assert chosen(None, {"": "cpu"}) == Placement({"": "cpu"})
    with pytest.raises(ConfigError, match="device or device_map, not both"):
        chosen("cpu", "auto")
    monkeypatch.setattr("nulledit.models.placement.accelerators", lambda: None)
    assert chosen(None, None) is chosen("auto", None) is None


def test_where_a_model_is_loaded_changes_none_of_its_weights(tiny_model, tokenizer, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ways = ({}, {"device": "auto"}, {"device_map": "sequential"}, {"device_map": {"": "cpu"}})
    for way in ways:
        loaded, _ = load_model(str(tmp_path), revision="main", **way)
        assert model_hash(loaded) == model_hash(model)
        assert all("_hf_hook" not in vars(m) for m in loaded.modules()), "on one device"
