"""Values of several blocks that are optimised together (`values.at: joint`)."""

import dataclasses

import pytest
import reference
import torch
from support.models import LINES, RECIPE, statistics_of
from support.values import CONTEXTS, SETTINGS, distance, ours

from nulledit import Editor, Fact, Recipe
from nulledit.errors import ConfigError

LAYERS = (0, 2)
"""Not neighbours: a block between them is run with the first δ in it."""


def slow(model, tokenizer, fact, settings=SETTINGS, layers=LAYERS):
    """z [layers, d] and its loss: the whole model, one fact at a time, a hook a block."""
    target = tokenizer(" " + fact.target.strip(), add_special_tokens=False)["input_ids"]
    told = tokenizer.decode(target[:-1])
    rewriting = [reference.fill(context, fact.prompt) + told for context in CONTEXTS]
    ids, mask, at = reference.locate(
        tokenizer, [*rewriting, settings.kl_prompt], fact.subject, model.device
    )
    places = [reference.value_place(model, layer) for layer in layers]
    deltas = None
    standing = {}

    def hook(k):
        def add(_module, _args, output):
            changed = reference.hidden(output)
            if deltas is not None:
                moved = torch.zeros_like(changed)
                moved[range(len(at)), at] = deltas[k] * units[k]
                changed = changed + moved
            standing[k] = changed[0, at[0]]
            return (changed, *output[1:]) if isinstance(output, tuple | list) else changed

        return add

    handles = [place.register_forward_hook(hook(k)) for k, place in enumerate(places)]

    def run():
        return model(input_ids=ids, attention_mask=reference.unpadded(mask)).logits.log_softmax(-1)

    try:
        with torch.no_grad():
            before = run()[-1, at[-1]]
        block = reference.block(model, layers[0])
        state = reference.read(model, ids, mask, block, inputs=False)[0, at[0]].norm()
        lengths = torch.stack([standing[k].norm() for k in range(len(layers))])
        normed = reference.FAMILIES[model.config.model_type][2] == "normed"
        units = lengths / (state if normed else lengths[0])
        deltas = torch.zeros(len(layers), len(standing[0]), dtype=torch.float64)
        deltas.requires_grad_()
        adam = torch.optim.Adam([deltas], lr=settings.learning_rate)
        for step in range(settings.steps):
            log_p, nll = run(), 0
            for row in range(len(rewriting)):
                end = int(mask[row].sum())
                said = log_p[row, end - len(target) : end]
                nll = nll - said[range(len(target)), target].mean() / len(rewriting)
            now = log_p[-1, at[-1]]
            drift = (now.exp() * (now - before)).sum()  # KL(new ‖ old)
            penalty = settings.weight_decay * deltas.norm(dim=1).sum() / state**2
            loss = nll + settings.kl_weight * drift + penalty
            if step == settings.steps - 1:
                break
            (deltas.grad,) = torch.autograd.grad(loss, deltas)
            adam.step()
            with torch.no_grad():
                most = settings.clamp * state
                deltas *= (most / deltas.norm(dim=1, keepdim=True)).clamp(max=1)
        return torch.stack([standing[k].detach() for k in range(len(layers))]), loss.item()
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.few("llama", "olmo2", of="family")
@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "gemma2", "olmo2", "gptj"])
def test_they_are_those_of_a_plain_descent(family, tiny_model, tokenizer, facts):
    """A δ a block, all at once, in the whole model; with steps that meet the clamp, too."""
    model = tiny_model(family)
    for settings in (SETTINGS, dataclasses.replace(SETTINGS, learning_rate=2.0, clamp=0.5)):
        found = ours(model, tokenizer, facts, settings=settings, layers=LAYERS)
        for fact, value in zip(facts, found, strict=True):
            z, loss = slow(model, tokenizer, fact, settings)
            assert value.z.shape == z.shape
            assert distance(value.z, z) < 1e-5
            assert value.outcome.loss == pytest.approx(loss, rel=1e-5)


def test_they_do_not_depend_on_what_runs_beside_them(tiny_model, tokenizer, facts):
    model = tiny_model("olmo2")
    together = ours(model, tokenizer, facts, layers=LAYERS, positions=10_000)
    for fact, value in zip(facts, together, strict=True):
        (alone,) = ours(model, tokenizer, [fact], layers=LAYERS, positions=1)
        assert distance(value.z, alone.z) < 1e-8


def test_facts_that_share_a_value_share_every_block_s(tiny_model, tokenizer):
    """One δ a block, and each fact's own states below it."""
    pair = [
        Fact("Ada Byron", "{} lives in the", "river", id="home"),
        Fact("Ada Byron", "{} works as a", "sailor", id="job"),
    ]
    first, second = ours(tiny_model("llama"), tokenizer, pair, groups=[0, 0], layers=LAYERS)
    assert distance(first.z, second.z) < 1e-8  # the same words before and in the subject
    alone, _ = ours(tiny_model("llama"), tokenizer, pair, layers=LAYERS)
    assert distance(alone.z, first.z) > 1e-3


def joint(model, tokenizer, *, cache=None, **changes):
    recipe = RECIPE.with_fields(
        {"layers": LAYERS, "values.at": "joint", "contexts.texts": CONTEXTS, **changes}
    )
    statistics = statistics_of(model, tokenizer, LAYERS, lines=LINES * 2)
    return Editor(model, tokenizer, recipe=recipe, statistics=statistics, value_cache=cache)


@pytest.mark.parametrize("family", ["llama", "granite", "olmo2"])
def test_each_block_is_written_whole(family, tiny_model, tokenizer, facts):
    """With nothing to preserve, and keys of the bare prompts, every z stands where it was asked."""
    model = tiny_model(family)
    free = {"method.name": "memit", "method.moment_weight": 1e-9, "contexts.texts": ["{}"]}
    editor = joint(model, tokenizer, **free)
    editor.edit(facts)
    held = editor.history.tensors[editor.history.batches[0].tensors]
    for layer in LAYERS:
        now = reference.current_z(model, tokenizer, editor.facts, layer)
        assert distance(now.double(), held[f"z.{layer}"].double()) < 1e-3


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_they_are_undone_rebuilt_and_kept(
    family, tiny_model, tokenizer, facts, tmp_path, monkeypatch
):
    model = tiny_model(family)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    editor = joint(model, tokenizer, cache=tmp_path)
    editor.edit(facts)
    edited = {name: t.clone() for name, t in model.state_dict().items()}
    editor.rebuild()
    for name, tensor in model.state_dict().items():
        assert distance(tensor - before[name], edited[name] - before[name]) < 1e-6 or tensor.equal(
            before[name]
        )
    editor.restore()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())

    def asked(_model, given, *_args, **_options):
        assert not given, "a value that is kept was optimised again"
        return []

    monkeypatch.setattr("nulledit.editing.batch_values.optimise_values", asked)
    again = joint(tiny_model(family), tokenizer, cache=tmp_path)
    again.edit(facts)
    assert all(tensor.equal(edited[name]) for name, tensor in again.model.state_dict().items())


def test_one_block_is_as_last(tiny_model, tokenizer, facts):
    weights = []
    for at in ("last", "joint"):
        model = tiny_model("llama")
        joint(model, tokenizer, **{"layers": (2,), "values.at": at}).edit(facts)
        weights.append(model.state_dict())
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())


def test_a_norm_anchor_is_refused():
    with pytest.raises(ConfigError, match=r"set values\.at to each"):
        Recipe.from_dict({"values": {"at": "joint", "norm_anchor": True}})
