"""ENCORE's early stop against a plain loop in float64: whole runs, δ added by a hook."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support import world
from support.editors import sayable

from nulledit import Fact
from nulledit.config import Recipe, ValueSettings
from nulledit.editing.values import optimise_values, plan_rows
from nulledit.errors import ConfigError
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen
from nulledit.models.tokens import RowEncoder

LAYER = 1
CONTEXTS = ("{}", "then he said . {}", "she said . {}")
SETTINGS = ValueSettings(
    steps=60, learning_rate=0.2, weight_decay=0.1, clamp=6.0, stop_loss=0.0, stop_margin=None
)


@pytest.fixture(scope="module")
def known(worlds):
    model, tokenizer = worlds("llama")
    return copy.deepcopy(model).double(), tokenizer


def edits(n=4):
    return [world.fact(p, "home", world.another(p, "home")) for p in world.PEOPLE[:n]]


def plain(known, fact, settings, times, contexts=CONTEXTS):
    """z, updates, and whether each row said the target at each step, by the published rule."""
    model, tokenizer = known
    encoder = RowEncoder(tokenizer, max_length=64)
    rows = plan_rows(fact, encoder, contexts)
    delta, place = None, 0

    def add(_module, _args, output):
        nonlocal delta
        states = output[0] if isinstance(output, tuple) else output
        if delta is None:
            start.append(states[0, place].detach().clone())
            delta = torch.zeros_like(start[0], requires_grad=True)
        one = F.one_hot(torch.tensor(place), states.shape[1])[None, :, None].to(states)
        moved = states + one * delta
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    start, said, meant, adam = [], [], None, None
    handle = model.get_submodule("model.layers")[LAYER].register_forward_hook(add)
    try:
        for step in range(settings.steps):
            losses, right = [], []
            for row in rows:
                place = row.subject_last
                logits = model(torch.tensor([row.ids])).logits[0, row.target_start - 1 : -1]
                target = torch.tensor(row.target_ids)
                losses.append(F.cross_entropy(logits, target))
                right.append(bool((logits.argmax(1) == target).all()))
            said.append(right)
            drift = encoder.encode_template(settings.kl_prompt, fact.subject)
            place = drift.subject_last
            now = model(torch.tensor([drift.ids])).logits[0, place].log_softmax(0)
            meant = now.detach() if meant is None else meant
            loss = (
                torch.stack(losses).mean() + settings.kl_weight * (now.exp() * (now - meant)).sum()
            )
            loss = loss + settings.weight_decay * delta.norm() / start[0].norm().square()
            looked_at = [all(row[1:] or row) for row in said]
            if times and sum(looked_at) == times:
                break
            if loss < settings.stop_loss or step == settings.steps - 1:
                break
            adam = adam or torch.optim.Adam([delta], lr=settings.learning_rate)
            (delta.grad,) = torch.autograd.grad(loss, delta)
            adam.step()
            most = settings.clamp * start[0].norm()
            if delta.norm() > most:
                delta.data.mul_(most / delta.norm())
    finally:
        handle.remove()
    return start[0] + delta.detach(), step, said


def ours(known, facts, settings, *, groups=None, contexts=CONTEXTS):
    model, tokenizer = known
    with frozen(model):
        return optimise_values(
            EditableModel(model, tokenizer),
            facts,
            groups or range(len(facts)),
            layers=[LAYER],
            contexts=contexts,
            settings=settings,
            positions=400,
        )


@pytest.mark.parametrize("times", [1, 3])
def test_a_value_ends_at_so_many_steps_at_which_every_context_says_the_target(known, times):
    settings = dataclasses.replace(SETTINGS, stop_when_likeliest=times)
    facts = sayable(known, 2, contexts=CONTEXTS)
    for fact, value in zip(facts, ours(known, facts, settings), strict=True):
        z, steps, said = plain(known, fact, settings, times)
        assert (value.outcome.steps, value.outcome.ended) == (steps, "likeliest")
        assert torch.allclose(value.z, z, atol=1e-5)
        assert sum(all(row[1:]) for row in said) == times


def test_the_bare_prompt_is_not_looked_at(known):
    """Where it comes to the target last, the value ends without it."""
    settings = dataclasses.replace(SETTINGS, stop_when_likeliest=1, learning_rate=0.01)
    contexts = ("{}", "she said . {}")
    runs = ((fact, plain(known, fact, settings, 1, contexts)) for fact in edits(12))
    late = ((fact, z, steps) for fact, (z, steps, said) in runs if said[-1] == [False, True])
    fact, z, steps = next(late)  # which facts they are is the world's affair
    value = ours(known, [fact], settings, contexts=contexts)[0]
    assert value.outcome.steps == steps
    assert torch.allclose(value.z, z, atol=1e-5)
    assert value.outcome.lead < 0


def test_without_contexts_the_bare_prompt_decides(known):
    settings = dataclasses.replace(SETTINGS, stop_when_likeliest=2)
    value = ours(known, edits(1), settings, contexts=("{}",))[0]
    _, steps, said = plain(known, edits(1)[0], settings, 2, ("{}",))
    assert (value.outcome.steps, value.outcome.ended) == (steps, "likeliest")
    assert [row[0] for row in said].count(True) == 2


def test_facts_on_one_key_end_together(known):
    """Not before each is said; some person's two are, by one δ."""
    settings = dataclasses.replace(SETTINGS, stop_when_likeliest=1)
    contexts = CONTEXTS[:2]  # the others' words are not the world's
    for person in world.PEOPLE:
        facts = [
            Fact(person, "{} was born in", world.answer(person, "home")),  # said from the start
            world.fact(person, "tongue", world.another(person, "tongue")),
        ]
        together = ours(known, facts, settings, groups=[0, 0], contexts=contexts)
        assert len({value.outcome.steps for value in together}) == 1
        if together[0].outcome.ended == "likeliest":
            break
    first, new = ours(known, facts, settings, contexts=contexts)
    assert first.outcome.steps == 0 < new.outcome.steps
    assert together[0].outcome.steps > 0
    assert [value.outcome.ended for value in together] == ["likeliest"] * 2


def test_recipes_say_how_many_steps():
    for wrong in (True, 1.5, -1):
        with pytest.raises(ConfigError, match="stop_when_likeliest"):
            Recipe().with_fields({"values.stop_when_likeliest": wrong})
    old = Recipe().to_dict()
    for switch in (False, True):  # as ledgers before held it
        old["values"]["stop_when_likeliest"] = switch
        assert Recipe.recorded(old).values.stop_when_likeliest == int(switch)


def said_with(known, row, added):
    """Whether `row` says its target with `added` to the subject's state, and that state before."""
    seen = []

    def add(_module, _args, output):
        states = (output[0] if isinstance(output, tuple) else output).clone()
        seen.append(states[0, row.subject_last].detach().clone())
        states[0, row.subject_last] += added
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = known[0].get_submodule("model.layers")[LAYER].register_forward_hook(add)
    logits = known[0](torch.tensor([row.ids])).logits[0, row.target_start - 1 : -1]
    handle.remove()
    return bool((logits.argmax(1) == torch.tensor(row.target_ids)).all()), seen[0]


@pytest.mark.parametrize("times", [1, 3])
def test_what_leaves_says_its_target_in_every_context_also_where_steps_read_some(known, times):
    settings = dataclasses.replace(SETTINGS, stop_when_likeliest=times, contexts_per_step=1)
    facts, encoder = edits(12), RowEncoder(known[1], max_length=64)
    for fact, value in zip(facts, ours(known, facts, settings), strict=True):
        rows = plan_rows(fact, encoder, CONTEXTS)
        _, h = said_with(known, rows[0], 0.0)
        assert value.outcome.ended == "likeliest"
        assert all(said_with(known, row, value.z - h)[0] for row in rows[1:])
