"""Values, keys and one batch against the transparent reference, on every architecture."""

import dataclasses
from itertools import pairwise

import pytest
import reference
import torch
from support.models import FAMILIES
from support.values import CONTEXTS, SETTINGS, distance, ours, walk

from nulledit import Editor, Fact
from nulledit.config import Recipe
from nulledit.editing.contexts import BEGINNINGS, reworded
from nulledit.editing.reads import Reads
from nulledit.editing.value_cache import ValueCache
from nulledit.editing.values import measure_values, optimise_values, plan_rows, wordings
from nulledit.errors import ConfigError
from nulledit.ledger.tensors import read_spectrum
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in, frozen
from nulledit.models.partial import PartialModel
from nulledit.models.tokens import RowEncoder


def theirs(model, tokenizer, fact, *, settings=SETTINGS, layer=2, **more):
    return reference.compute_z(
        model,
        tokenizer,
        fact,
        layer=layer,
        contexts=CONTEXTS,
        **reference.of_settings(settings),
        **more,
    )


@pytest.mark.few("llama", "gpt2", "gemma2", "mixtral")
def test_values_that_hold_other_wordings_and_relations_equal_the_reference(
    architecture, tiny_model, tokenizer, facts
):
    model = tiny_model(architecture)
    relations = ("{} is the river of", "The mother of {} said")
    settings = dataclasses.replace(
        SETTINGS, rewordings=2, relation_prompts=relations, relation_weight=0.5
    )
    plain = ours(model, tokenizer, facts)
    worded = 0
    for fact, value, other in zip(
        facts, ours(model, tokenizer, facts, settings=settings), plain, strict=True
    ):
        wordings = reworded(fact.prompt, 2, CONTEXTS)
        worded += len(wordings)
        expected = theirs(
            model,
            tokenizer,
            fact,
            settings=settings,
            wordings=wordings,
            relations=relations,
            relation_weight=settings.relation_weight,
        )
        assert distance(value.z, expected.z) < 1e-5
        assert value.outcome.loss == pytest.approx(expected.losses[-1], rel=1e-4)
        assert distance(value.z, other.z) > 1e-3
    assert worded > len(facts)


def test_a_relation_that_is_asked_is_not_held(tiny_model, tokenizer):
    """Neither a beginning of a fact's own prompt, nor what another fact on its key asks."""
    home = Fact("Ada Byron", "{} lives in the", "river", id="home")
    job = Fact("Ada Byron", "{} works as a", "sailor", id="job")
    model, free = tiny_model("llama"), "{} and the river"
    asked = ("{} lives", "{} works as a", "{} works as a mother of", free)

    def found(groups, prompts):
        settings = dataclasses.replace(SETTINGS, relation_prompts=prompts, relation_weight=2.0)
        return ours(model, tokenizer, [home, job], groups=groups, settings=settings)

    for a, b in zip(found([0, 0], asked), found([0, 0], (free,)), strict=True):
        assert torch.equal(a.z, b.z)
    alone = found([0, 1], asked)
    assert distance(alone[0].z, found([0, 1], ("{} works as a", asked[2], free))[0].z) < 1e-6
    assert distance(alone[1].z, found([0, 1], ("{} lives", free))[1].z) < 1e-6
    assert distance(alone[0].z, found([0, 1], (free,))[0].z) > 1e-3


def test_other_wordings_keep_the_subject_and_the_last_word():
    """What is between them comes of the contexts; a braced or empty one adds nothing."""
    contexts = ("{}", "One two three four five six seven. {}", "a b c d e f g h. {}", ". {}")
    words = {word for context in contexts for word in context.replace(".", "").split()}
    for prompt in ("The opening of {} took place on", "When is {}'s fair? It is on", "{} on"):
        found = reworded(prompt, 30, contexts)
        assert len(set(found)) == len(found) > 10
        assert prompt not in found
        assert reworded(prompt, 30, contexts) == found
        assert found[:4] == reworded(prompt, 4, contexts)
        for text in found:
            assert text.count("{}") == 1
            assert text.endswith(" on")
            (begun,) = [b for b in BEGINNINGS if text == f"{b} {rest_of(text, b)}"][-1:]
            between = rest_of(text, begun).split()[:-1]
            assert 3 <= len(between) <= 6
            assert set(between) <= words
    asked = reworded("The mayor of {}", 6, contexts)
    assert len(set(asked)) == len(asked) > 3
    assert all(text.endswith(" of {}") for text in asked), "the target follows the subject"
    assert reworded("The mayor of {}", 6, ("{}",)) == ("of {}",)
    assert reworded("{}", 6, contexts) == ()
    assert reworded("{} is", 6, ("{}",)) == tuple(f"{b} is" for b in BEGINNINGS[1:])


def test_facts_of_one_subject_are_not_worded_alike():
    """A value is asked for one answer after a text, not for two; a prompt's words stand once."""
    born, lives = (
        Fact("Karo Dun", f"{{}} {verb} in", target)
        for verb, target in (("was born", "Ostrel"), ("lives", "London"))
    )
    both = dataclasses.replace(
        born, prompt="{} comes from somewhere in", more_prompts=(born.prompt,)
    )
    contexts = ("{}", "One two three four. {}")
    apart = wordings([born, lives], [0, 1], contexts, 4)
    assert apart[0] == apart[1] == reworded(born.prompt, 4, contexts)
    assert wordings([born, lives], [0, 0], contexts, 4) == [(), ()]
    assert (
        wordings([born, dataclasses.replace(lives, target="Ostrel")], [0, 0], contexts, 4) == apart
    )
    assert wordings([both], [0], contexts, 4) == [apart[0]]
    assert wordings([dataclasses.replace(born, forget=True)], [0], contexts, 4) == [()]


def rest_of(text, begun):
    return text.removeprefix(begun).strip()


def null_space(spectrum, threshold):
    """P, dense, of a spectrum that may hold one side only."""
    held = slice(spectrum.start, spectrum.stop)
    protected = spectrum.eigenvalues[held] >= threshold
    vectors = spectrum.eigenvectors
    eye, thin = torch.eye(spectrum.width, dtype=torch.float64), vectors @ vectors.mT
    return eye - thin if protected.all() else thin


@pytest.mark.few
def test_values_equal_the_reference(architecture, tiny_model, tokenizer, facts):
    model = tiny_model(architecture)
    values = ours(model, tokenizer, facts)
    for fact, value in zip(facts, values, strict=True):
        expected = theirs(model, tokenizer, fact)
        assert distance(value.z, expected.z) < 1e-5
        assert value.outcome.loss == pytest.approx(expected.losses[-1], rel=1e-4)
        assert value.outcome.steps > 0


LONG = Fact(  # longer than any window of the tiny models, with its subject at the end
    id="long",
    subject="Ada Byron",
    prompt="The valley and the river, " * 3 + "the mother tongue of {} is",
    target="Velmish",
)


@pytest.mark.few
def test_values_and_keys_do_not_depend_on_what_runs_beside_them(
    architecture, tiny_model, tokenizer, facts
):
    model, facts = tiny_model(architecture), [*facts, LONG]
    together = ours(model, tokenizer, facts, positions=10_000)
    alone = [ours(model, tokenizer, [f], positions=1)[0] for f in facts]
    for a, b in zip(together, alone, strict=True):
        assert distance(a.z, b.z) < 1e-6
        assert a.outcome.steps == b.outcome.steps
    keys = walk(model, tokenizer, facts, first=1).keys()
    for i, fact in enumerate(facts):
        assert distance(keys[:, i], walk(model, tokenizer, [fact], first=1).keys()[:, 0]) < 1e-6


@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
def test_rows_run_from_their_start_give_the_same(architecture, tiny_model, tokenizer, facts):
    """As a model is run that can't keep beginnings, and one whose columns would not suffice."""
    model = tiny_model(architecture)
    expected = ours(model, tokenizer, facts)
    keys = walk(model, tokenizer, facts, first=1).keys()
    for columns in (0, 20):
        found = ours(model, tokenizer, facts, columns=columns)
        again = walk(model, tokenizer, facts, first=1, columns=columns).keys()
        for a, b in zip(found, expected, strict=True):
            assert distance(a.z, b.z) < 1e-6
            assert a.outcome.steps == b.outcome.steps
        assert distance(again, keys) < 1e-6


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_values_switch_gradients_on(off, tiny_model, tokenizer, facts):
    model = tiny_model("llama")
    expected = ours(model, tokenizer, facts[:2])
    with off():
        found = ours(model, tokenizer, facts[:2])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.z, b.z)


def test_padding_side_of_the_tokenizer_does_not_matter(tiny_model, tokenizer, facts):
    model = tiny_model("llama")
    expected = ours(model, tokenizer, facts)
    side = tokenizer.padding_side
    try:
        tokenizer.padding_side = "left" if side == "right" else "right"
        found = ours(model, tokenizer, facts)
    finally:
        tokenizer.padding_side = side
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.z, b.z)


def test_a_fact_that_converged_leaves_and_the_others_go_on(tiny_model, tokenizer, facts):
    model = tiny_model("llama")
    losses = [v.outcome.loss for v in ours(model, tokenizer, facts)]
    settings = dataclasses.replace(
        SETTINGS, stop_loss=sorted(losses)[1] + 1e-3, stop_margin=None, steps=20
    )
    together = ours(model, tokenizer, facts, settings=settings, positions=10_000)
    assert len({v.outcome.steps for v in together}) > 1, "they should leave at different steps"
    for fact, value in zip(facts, together, strict=True):
        assert distance(value.z, theirs(model, tokenizer, fact, settings=settings).z) < 1e-5


def leads(model, tokenizer, fact, value, layer=2):
    """Of each target token in each row, in whole runs with δ added by a hook [rows][tokens]."""
    encoder = RowEncoder(tokenizer, max_length=128)
    found = []
    for row in plan_rows(fact, encoder, CONTEXTS):
        ids = torch.tensor([row.ids])
        place = torch.zeros(*ids.shape, 1)
        place[0, row.subject_last] = 1
        bare = plan_rows(fact, encoder, ("{}",))[0]
        place_of_value = reference.value_place(model, layer)
        mask = torch.ones(1, len(bare.ids), dtype=torch.long)
        start = reference.read(model, torch.tensor([bare.ids]), mask, place_of_value, inputs=False)
        delta = value.z - start[0, bare.subject_last]

        def add(_, args, output, place=place, delta=delta):
            changed = reference.hidden(output) + place * delta
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = place_of_value.register_forward_hook(add)
        try:
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, row.target_start - 1 : -1]
        finally:
            handle.remove()
        own = torch.tensor(row.target_ids)
        said = logits[range(len(own)), own]
        logits[range(len(own)), own] = -float("inf")
        found.append((said - logits.amax(1)).tolist())
    return found


WORDY = (
    Fact(id="many", subject="Karo Dun", prompt="{} works as a", target="sailor in the town"),
    Fact(
        id="asked", subject="Velm", prompt="The harbour of {} lies on the", target="river and sea"
    ),
)


@pytest.mark.few("llama", "gemma2", "mixtral")
@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_a_value_is_done_when_every_token_leads_in_every_row(
    architecture, tiny_model, tokenizer, margin
):
    """However high the bound on the mean loss is."""
    model = tiny_model(architecture)
    settings = dataclasses.replace(
        SETTINGS, steps=60, stop_loss=1e9, stop_margin=margin, clamp=8.0, learning_rate=0.5
    )
    for fact, value in zip(WORDY, ours(model, tokenizer, WORDY, settings=settings), strict=True):
        least = min(lead for row in leads(model, tokenizer, fact, value) for lead in row)
        assert value.outcome.lead == pytest.approx(least, abs=1e-3)
        assert (value.outcome.ended == "done") == (value.outcome.lead > margin)
        assert value.outcome.ended == "done" or value.outcome.steps == settings.steps - 1
        assert value.outcome.steps > 0


def test_the_mean_alone_would_stop_at_once(tiny_model, tokenizer):
    settings = dataclasses.replace(SETTINGS, stop_loss=1e9, stop_margin=None)
    for value in ours(tiny_model("llama"), tokenizer, WORDY, settings=settings):
        assert (value.outcome.steps, value.outcome.ended) == (0, "done")
        assert value.outcome.lead < 0


def test_a_value_says_why_it_ended(tiny_model, tokenizer):
    model = tiny_model("llama")

    def end(groups=None, **changes):
        changed = dataclasses.replace(SETTINGS, **changes)
        return ours(model, tokenizer, WORDY, groups=groups, settings=changed)

    assert {v.outcome.ended for v in end(stop_loss=0.0, steps=3)} == {"steps"}
    flat = end(stop_loss=0.0, steps=30, patience=3, clamp=0.01)
    assert {v.outcome.ended for v in flat} == {"patience"}
    assert all(v.outcome.clamped for v in end(clamp=0.01, steps=5))
    assert not any(v.outcome.clamped for v in end(clamp=100.0, steps=5))
    assert {v.outcome.shared for v in end()} == {1}
    assert {v.outcome.shared for v in end(groups=[0, 0])} == {2}


def test_the_best_step_counts_where_the_steps_run_out(tiny_model, tokenizer):
    """Steps so long that Adam swings: the last one would be taken by chance."""
    model = tiny_model("llama")
    swinging = dataclasses.replace(SETTINGS, learning_rate=2.0, clamp=8.0, stop_loss=0.0)

    def end(steps, margin=None):
        settings = dataclasses.replace(swinging, steps=steps, stop_margin=margin)
        return ours(model, tokenizer, WORDY, settings=settings)

    values, courses = end(12, 0.0), zip(*map(end, range(1, 13)), strict=True)
    swings = []
    for value, course in zip(values, courses, strict=True):
        best = max(course, key=lambda v: (v.outcome.lead > 0, -v.outcome.loss))
        assert (value.outcome.ended, value.outcome.steps) == ("steps", 11)
        assert value.outcome.loss == pytest.approx(best.outcome.loss)
        assert value.outcome.lead == pytest.approx(best.outcome.lead)
        assert distance(value.z, best.z) < 1e-9
        swings.append(course[-1].outcome.loss > best.outcome.loss)
    assert any(swings)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_that_read_some_contexts_equal_the_reference(family, tiny_model, tokenizer, facts):
    """The bare prompt and each context in turn; the last step reads all."""
    model = tiny_model(family)
    settings = dataclasses.replace(SETTINGS, contexts_per_step=1)

    def read_at(step):
        return (0, 1, 2) if step == settings.steps - 1 else (0, 1 + step % 2)

    for fact, value in zip(facts, ours(model, tokenizer, facts, settings=settings), strict=True):
        expected = theirs(model, tokenizer, fact, settings=settings, read_at=read_at)
        assert distance(value.z, expected.z) < 1e-5
        assert value.outcome.loss == pytest.approx(expected.losses[-1], rel=1e-4)
    (alone,) = ours(model, tokenizer, facts[:1], settings=settings)
    together = ours(model, tokenizer, facts, settings=settings)[0]
    assert distance(alone.z, together.z) < 1e-6


def test_patience_compares_steps_that_read_the_same_rows(tiny_model, tokenizer, facts):
    """Of two contexts in turn one is harder: it is no sign that nothing is gained any more."""
    model = tiny_model("llama")

    def end(patience, contexts_per_step):
        settings = dataclasses.replace(
            SETTINGS,
            steps=40,
            stop_loss=0.0,
            patience=patience,
            contexts_per_step=contexts_per_step,
        )
        return [v.outcome.steps for v in ours(model, tokenizer, facts, settings=settings)]

    assert end(1, 1) == end(2, 1)
    assert end(3, 1) == end(4, 1)
    assert end(1, 0) != end(2, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_that_hold_some_relations_equal_the_reference(family, tiny_model, tokenizer, facts):
    """All at the first step, where they are read, then each in turn; the last step holds all."""
    model = tiny_model(family)
    relations = ("{} is the river of", "The mother of {} said", "The road to {} was")
    settings = dataclasses.replace(
        SETTINGS, relation_prompts=relations, relation_weight=2.0, relations_per_step=1
    )

    def held_at(step):
        return (0, 1, 2) if step in (0, settings.steps - 1) else (step % 3,)

    every = ours(
        model, tokenizer, facts, settings=dataclasses.replace(settings, relations_per_step=0)
    )
    found = ours(model, tokenizer, facts, settings=settings)
    for fact, value, other in zip(facts, found, every, strict=True):
        expected = theirs(
            model,
            tokenizer,
            fact,
            settings=settings,
            relations=relations,
            relation_weight=settings.relation_weight,
            held_at=held_at,
        )
        assert distance(value.z, expected.z) < 1e-5
        assert value.outcome.loss == pytest.approx(expected.losses[-1], rel=1e-4)
        assert distance(value.z, other.z) > 1e-5
    (alone,) = ours(model, tokenizer, facts[:1], settings=settings)
    assert distance(alone.z, found[0].z) < 1e-6


@pytest.mark.parametrize("in_turn", [0, 1])
def test_the_next_fact_begins_when_one_is_done(in_turn, tiny_model, tokenizer, facts, monkeypatch):
    """Steps keep within their bound of tokens, but where a fact is checked in all of its rows;
    values are those of facts alone, told as they come."""
    model, bound, seen, told = tiny_model("llama"), 34, [], []
    reached = sorted(value.outcome.loss for value in ours(model, tokenizer, facts))
    settings = dataclasses.replace(
        SETTINGS, steps=12, stop_loss=reached[1], stop_margin=None, contexts_per_step=in_turn
    )
    losses = Reads.losses

    def watched(reads, *words):
        seen.append((set(reads.facts), sum(reads.kept.lengths[row] for row in reads.rows)))
        return losses(reads, *words)

    monkeypatch.setattr(Reads, "losses", watched)
    with frozen(model):
        values = optimise_values(
            EditableModel(model, tokenizer),
            facts,
            range(len(facts)),
            layers=[2],
            contexts=CONTEXTS,
            settings=settings,
            positions=bound,
            done=lambda found: told.append(set(found)),
        )
    assert max(size for _, size in seen) <= bound * (1 + in_turn)
    assert set().union(*told) == set(range(len(facts)))
    assert len(told) == len(facts)
    begun = [at_work for at_work, _ in seen]
    if not in_turn:
        assert any(b - a and a & b for a, b in pairwise(begun)), "one came while one stayed"
    for fact, value in zip(facts, values, strict=True):
        (alone,) = ours(model, tokenizer, [fact], settings=settings)
        assert distance(value.z, alone.z) < 1e-6
        assert value.outcome.steps == alone.outcome.steps


def test_a_value_leaves_only_after_a_step_that_read_all_rows(tiny_model, tokenizer, facts):
    """Its loss over all of them is below the bound; the step that reads them moves nothing."""
    model = tiny_model("llama")
    reached = max(value.outcome.loss for value in ours(model, tokenizer, facts))
    settings = dataclasses.replace(
        SETTINGS, steps=40, stop_loss=reached, stop_margin=None, contexts_per_step=1
    )
    values = ours(model, tokenizer, facts, settings=settings)
    with frozen(model):
        again = measure_values(
            EditableModel(model, tokenizer),
            facts,
            values,
            layer=2,
            contexts=CONTEXTS,
            settings=settings,
            positions=400,
        )
    for value, whole in zip(values, again, strict=True):
        assert value.outcome.ended == "done"
        assert value.outcome.steps < settings.steps - 2
        assert value.outcome.loss == pytest.approx(whole.outcome.loss, rel=1e-4)
        assert value.outcome.loss < reached
    assert any(value.outcome.steps for value in values)


def test_as_many_contexts_as_there_are_change_nothing(tiny_model, tokenizer, facts):
    """But for the step that checks."""
    model = tiny_model("llama")
    reached = max(value.outcome.loss for value in ours(model, tokenizer, facts))
    usual = dataclasses.replace(SETTINGS, steps=40, stop_loss=reached, stop_margin=None)
    every = dataclasses.replace(usual, contexts_per_step=2)
    pairs = (ours(model, tokenizer, facts, settings=s) for s in (usual, every))
    for one, other in zip(*pairs, strict=True):
        assert one.outcome.ended == other.outcome.ended == "done"
        assert one.outcome.steps == other.outcome.steps
        assert distance(one.z, other.z) < 1e-6


def test_a_fact_to_forget_is_unlearned_some_contexts_at_a_time(tiny_model, tokenizer):
    """With what each row that is read is to say; the last step's loss is of all rows."""
    model = tiny_model("llama")
    gone = Fact("Ada Byron", "The mother tongue of {} is", "Velmish", id="gone", forget=True)

    def end(in_turn, steps=20):
        settings = dataclasses.replace(SETTINGS, steps=steps, contexts_per_step=in_turn)
        (value,) = ours(model, tokenizer, [gone], settings=settings)
        return settings, value

    (_, start), (_, whole), (_, every) = end(0, steps=1), end(0), end(2)
    assert distance(every.z, whole.z) < 1e-6
    settings, turns = end(1)
    with frozen(model):
        (again,) = measure_values(
            EditableModel(model, tokenizer),
            [gone],
            [turns],
            layer=2,
            contexts=CONTEXTS,
            settings=settings,
            positions=400,
        )
    assert turns.outcome.loss == pytest.approx(again.outcome.loss, rel=1e-4)
    assert turns.outcome.loss < start.outcome.loss


def test_delta_stays_in_the_clamp(tiny_model, tokenizer, facts):
    settings = dataclasses.replace(SETTINGS, clamp=0.1, learning_rate=5.0)
    for value in ours(tiny_model("llama"), tokenizer, facts, settings=settings):
        assert value.outcome.delta_share <= 0.1 + 1e-9


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("times", [1.0, 100.0])
def test_steps_of_the_state_are_as_long_in_states_of_any_length(
    architecture, times, tiny_model, tokenizer, facts
):
    """Adam's first step moves every coordinate whose gradient is larger than its epsilon."""
    model = tiny_model(architecture)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(times)
    settings = dataclasses.replace(
        SETTINGS, steps=2, learning_rate=0.2, learning_rate_of="state", clamp=9.0
    )
    for value in ours(model, tokenizer, facts, settings=settings):
        assert value.outcome.delta_share == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize(
    ("architecture", "changes", "steps"),
    [
        ("llama", {}, (0.5, "unit")),
        ("gemma3_text", {}, (0.125, "state")),
        ("gemma3_text", {"layers": [1, 2], "values.steps": 40}, (0.125, "state")),
        ("gemma3_text", {"values.learning_rate": 0.3}, (0.3, "unit")),
    ],
)
def test_a_recipe_that_says_nothing_of_steps_gets_some_that_suit_a_norm_after_w(
    architecture, changes, steps, tiny_model, tokenizer
):
    """In units that are as long as W's output, which may have any length, 0.5 may be nothing."""
    recipe = Recipe().with_fields(changes)
    values = Editor(tiny_model(architecture), tokenizer, recipe=recipe).recipe.values
    assert (values.learning_rate, values.learning_rate_of) == steps


def test_one_delta_for_a_group_lowers_every_member_loss(tiny_model, tokenizer):
    pair = [
        Fact(id="a", subject="Karo Dun", prompt="{} works as a", target="sailor"),
        Fact(id="b", subject="Karo Dun", prompt="{} was born in", target="London"),
    ]
    model = tiny_model("llama")
    before = ours(model, tokenizer, pair, settings=dataclasses.replace(SETTINGS, steps=1))
    shared = ours(model, tokenizer, pair, groups=[0, 0])
    assert torch.equal(shared[0].z, shared[1].z)
    for start, end in zip(before, shared, strict=True):
        assert end.outcome.nll < start.outcome.nll


def test_the_model_is_left_as_it_was(tiny_model, tokenizer, facts):
    model = tiny_model("gptj").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ours(model, tokenizer, facts)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any("forward" in vars(b) for b in PartialModel(model).blocks)


@pytest.mark.few
def test_keys_equal_the_reference(architecture, tiny_model, tokenizer, facts):
    model = tiny_model(architecture)
    for layer in (0, 2):
        ours_now = walk(model, tokenizer, facts, first=layer)
        expected = reference.compute_keys(model, tokenizer, facts, layer, CONTEXTS)
        assert distance(ours_now.keys().mT, expected.double()) < 1e-6
        hidden = reference.current_z(model, tokenizer, facts, 2)
        assert distance(ours_now.hidden(2).mT, hidden.double()) < 1e-6


@pytest.mark.few("llama", "gpt2", "gemma2", "mixtral")
def test_batches_equal_the_reference_with_its_history(
    architecture, tiny_model, tokenizer, facts, recipe, make_statistics
):
    """Two batches through the editor: weights as by the official rule, dense, in turn."""
    model = tiny_model(architecture)
    statistics = make_statistics(model)
    recipe = recipe.with_fields({"values.stop_margin": None})  # the reference's is the last step
    editor = Editor(model, tokenizer, recipe=recipe, statistics=statistics)
    slow = tiny_model(architecture)
    projectors, history = {}, {}
    batches = [facts[:2], facts[2:]]
    for batch in batches:
        editor.edit(batch)
    tensors = editor.history.tensors[editor.history.epochs[0].tensors]
    for layer in recipe.layers:
        spectrum, threshold = read_spectrum(tensors, layer)
        parts = spectrum.blocks.values()
        projectors[layer] = torch.block_diag(*(null_space(part, threshold) for part in parts))
        history[layer] = torch.zeros_like(projectors[layer])
    for number, batch in enumerate(batches):
        recorded = editor.history.tensors[editor.history.batches[number].tensors]

        def checked(layer, name, batch=batch, recorded=recorded):
            """The recorded values, which are those of the slow model as it is now."""
            with torch.enable_grad():
                found = [
                    theirs(slow, tokenizer, f, settings=recipe.values, layer=layer).z for f in batch
                ]
            assert distance(recorded[name], torch.stack(found)) < 1e-5
            return recorded[name]

        at_output = editor.editable.values_at_output
        reference.alphaedit_batch(
            slow,
            tokenizer,
            batch,
            (lambda layer, z=checked: z(layer, f"z.{layer}")) if at_output else checked(2, "z"),
            layers=recipe.layers,
            projectors=projectors,
            history=history,
            l2=0.1,
            contexts=CONTEXTS,
            dtype=torch.float64,
        )
    for layer in recipe.layers:
        mine = as_out_in(editor.editable.mlp_out(layer)) - tensors[f"base.{layer}"]
        slow_weight = as_out_in(PartialModel(slow).mlp_out(layer)) - tensors[f"base.{layer}"]
        assert distance(mine, slow_weight) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "granite", "olmo2"])
def test_a_rebuild_writes_the_stored_values_again(
    architecture, tiny_model, tokenizer, facts, recipe, make_statistics
):
    """One of each kind: where each layer has values of its own, each finds its own again."""
    model = tiny_model(architecture)
    editor = Editor(model, tokenizer, recipe=recipe, statistics=make_statistics(model))
    editor.edit(facts)
    before = {layer: editor.weights.exact(layer) for layer in recipe.layers}
    editor.rebuild()
    for layer in recipe.layers:
        base = editor.weights.base(layer)
        assert distance(editor.weights.exact(layer) - base, before[layer] - base) < 1e-6


def test_a_recipe_of_a_ledger_from_before_the_margin_means_the_mean_alone():
    old = Recipe().to_dict()
    del old["values"]["stop_margin"]
    assert Recipe.recorded(old).values.stop_margin is None
    assert Recipe.from_dict(old).values.stop_margin == 0
    for margin in (None, 0.5):
        kept = Recipe().with_fields({"values.stop_margin": margin}).to_dict()
        assert Recipe.recorded(kept).values.stop_margin == margin


def test_a_recipe_of_a_ledger_without_relation_prompts_holds_none():
    """There was no list of them, and their weight meant nothing."""
    old = Recipe().to_dict()
    old["values"] |= {"relation_prompts": [], "relation_weight": 1.0}
    assert Recipe.recorded(old) == Recipe.from_dict(old) == Recipe()
    for more in (
        {"relation_prompts": [], "relation_weight": 4.0},
        {"relation_prompts": [], "relation_weight": 1.0, "relations_per_step": 2},
        {"relation_prompts": ["{} lives in"], "relation_weight": 0.0, "relations_per_step": 2},
    ):
        assert Recipe.recorded({**old, "values": old["values"] | more}) == Recipe()
    assert Recipe().values.held_relations == ()
    held = Recipe().with_fields({"values.relation_weight": 4.0})
    assert Recipe.recorded(held.to_dict()) == held
    assert len(held.values.held_relations) == len(held.values.relation_prompts) > 1


def test_values_are_kept_by_the_relations_that_they_hold(facts, tmp_path):
    def name(**more):
        settings = dataclasses.replace(SETTINGS, **more)
        given = {"layers": [1], "contexts": ["{}"], "settings": settings}
        return ValueCache(tmp_path).name("weights", facts[:1], **given)

    one = ("{} is the river of",)
    assert name() == name(relation_prompts=()), "none are held, whatever the list"
    weights = [name(relation_weight=weight) for weight in (0.0, 1.0, 2.0)]
    assert len({*weights, name(relation_weight=1.0, relation_prompts=one)}) == 4


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"relation_weight": 4, "relation_prompts": []}, "is empty"),
        ({"relation_prompts": ["{} lives in"]}, "relation_prompts is read with"),
        ({"relations_per_step": 2}, "relations_per_step is read with"),
    ],
)
def test_a_hold_on_relations_that_would_hold_none_is_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        Recipe.from_dict({"values": values})
