"""Every method through the editor, and the options that any of them can use."""

import copy
import dataclasses
import random

import pytest
import torch
from safetensors.torch import save_file
from support.editors import LASTING, in_the_world, sayable
from support.models import FAMILIES, RECIPE, build_model, statistics_of
from tokenizers import processors
from torch._subclasses.fake_tensor import FakeTensorMode

from nulledit import Editor, Fact
from nulledit.editing import values as values_module
from nulledit.editing.chunks import chunks_of
from nulledit.editing.descent import Value
from nulledit.editing.keys import LayerwiseForward, WalksTogether
from nulledit.editing.target_loss import WeightLoss
from nulledit.editing.value_cache import ValueCache
from nulledit.editing.values import bare_leads, optimise_values, plan_rows
from nulledit.errors import ConfigError, FactError, StatisticsError
from nulledit.ledger.records import ValueOutcome
from nulledit.ledger.tensors import recorded
from nulledit.methods import METHODS, Gate, find_method
from nulledit.models.layouts import as_out_in, frozen
from nulledit.models.tokens import RowEncoder

# Small models: constants of about the size of their second moments.
CONSTANTS = {
    "memit": {"method.moment_weight": 0.1},
    "memit-history": {"method.moment_weight": 0.1},
    "rlsedit": {"method.moment_weight": 0.1, "method.l2": 0.1},
    "encore": {"method.moment_weight": 0.1, "method.l2": 0.1},
    "betaedit": {"method.moment_weight": 0.1, "method.l2": 0.1},
    "rect": {"method.moment_weight": 0.1},
    "prune": {"method.moment_weight": 0.1},
    "nse": {"method.moment_weight": 0.1},
    "ft": {"method.steps": 3, "method.learning_rate": 0.01, "method.norm_constraint": 0.02},
    "alphaedit": {"method.l2": 0.1},
    "evoedit": {"method.l2": 0.1},
    "soft": {"method.l2": 0.1},
}
NAMES = [method.name for method in METHODS]
FEW = ("alphaedit", "memit", "rect", "nse", "evoedit", "gated", "ft")
"""One of each kind: with history and without, linear or not, rewinding, gates, by gradient."""


def recipe_of(name, **changes):
    given = {k.replace("__", "."): v for k, v in changes.items()}
    return RECIPE.with_fields({"method.name": name, **CONSTANTS.get(name, {}), **given})


@pytest.fixture
def make(tokenizer):
    def editor(recipe, family="llama", **given):
        model = build_model(family)
        gated = isinstance(find_method(recipe.method.name), Gate)
        statistics = statistics_of(model, tokenizer, inputs=gated)
        return Editor(model, tokenizer, recipe=recipe, statistics=statistics, **given)

    return editor


def weights(editor):
    return {i: as_out_in(editor.editable.mlp_out(i)).clone() for i in editor.recipe.layers}


def gap(a, b):
    return max(float((a[i] - b[i]).norm() / a[i].norm()) for i in a)


@pytest.mark.few(*FEW, of="name")
@pytest.mark.parametrize("projection", ["own", "none", "inside", "after"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "gated"])  # see test_gated.py
def test_every_method_edits_undoes_and_comes_back(name, projection, make, facts, tmp_path):
    family = FAMILIES[NAMES.index(name) % len(FAMILIES)]
    editor = make(recipe_of(name, method__projection=projection), family)
    before = weights(editor)
    editor.edit(facts, batch_size=2, shuffle=False)
    edited = weights(editor)
    assert gap(before, edited) > 1e-6
    editor.attach(tmp_path)
    resumed = Editor.resume(tmp_path, build_model(family), editor.tokenizer)
    assert gap(edited, weights(resumed)) < 1e-12
    with editor.base_weights():
        assert gap(before, weights(editor)) == 0
    assert gap(edited, weights(editor)) == 0
    editor.undo(facts[1].id)
    assert [f.id for f in editor.facts if f.id == facts[1].id] == []
    editor.undo(*[f.id for f in editor.facts])
    assert gap(before, weights(editor)) == 0


@pytest.mark.parametrize("name", [m.name for m in METHODS if not m.history and not m.by_gradient])
def test_undo_without_history_solves_the_later_batches_again(name, make, facts):
    editor = make(recipe_of(name))
    editor.edit(facts, batch_size=1, shuffle=False)
    by_id = {c.fact.id: c for c in editor.history.active}
    editor.undo(facts[1].id)
    left = [by_id[f.id] for f in facts if f.id != facts[1].id]
    for layer in editor.recipe.layers:
        fold = editor.weights._solver(layer)
        state = fold.fold(())
        for i, column in enumerate(left):
            state = fold.latest.add(state, left[:i], *recorded(editor.history, [column], layer))
        found = editor.weights.exact(layer)
        assert float((found - state.weight).norm() / state.weight.norm()) < 1e-12


OFTEN = ("alphaedit", "memit-history", "rome", "ft", "gated")  # one of each kind of solve
STORIES = [
    pytest.param(name, chunks, marks=[pytest.mark.slow] * (name not in OFTEN[: 2 if chunks else 5]))
    for chunks in (0, 2)
    for name in NAMES
    if not (chunks and name in ("ft", "gated"))  # they have no chunks
]


@pytest.mark.few(*FEW, of="name")
@pytest.mark.parametrize(("name", "chunks"), STORIES)
def test_any_story_is_replayed_to_the_bit(name, chunks, make, facts, tmp_path):
    editor = make(recipe_of(name, values__chunk_tokens=chunks, values__steps=2))
    editor.attach(tmp_path)
    draw = random.Random(f"{name}{chunks}")
    pool = []
    for f in facts:
        rel = f.relation or "r0"
        for j, target in enumerate([f.target, "red green blue", "one"]):
            pool.append(
                Fact(
                    subject=f.subject,
                    prompt=f.prompt,
                    target=target,
                    relation=rel,
                    id=f"{f.id}-{j}",
                )
            )
        pool.append(
            Fact(
                subject=f.subject,
                prompt=f.prompt + " then",
                target="tea",
                relation="other",
                id=f"{f.id}-o",
            )
        )
    seen = {}
    log = []
    for _ in range(9):
        held = [f.id for f in editor.facts]
        if held and draw.random() < 0.4:
            ids = draw.sample(held, min(len(held), draw.choice([1, 1, 2])))
            log.append(("undo", ids))
            editor.undo(*ids)
        else:
            chosen = {f.key: f for f in draw.sample(pool, 3)}
            chosen = [f for f in chosen.values()]
            log.append(("edit", [f.id for f in chosen]))
            editor.edit(chosen, batch_size=2, shuffle=draw.random() < 0.5)
        now = weights(editor)
        seen[len(editor.history.events)] = now
        keys = [f.key for f in editor.facts]
        assert len(set(keys)) == len(keys), log
        ids = [f.id for f in editor.facts]
        assert len(set(ids)) == len(ids), log
    for event, then in seen.items():
        with editor.as_of(event):
            again = weights(editor)
        worst = max(float((again[i] - then[i]).abs().max()) for i in then)
        assert worst < 1e-9, (event, worst, log)
    other = Editor.resume(tmp_path, build_model("llama"), editor.tokenizer)
    for event, then in seen.items():
        with other.as_of(event):
            again = weights(other)
        worst = max(float((again[i] - then[i]).abs().max()) for i in then)
        assert worst < 1e-9, ("resumed", event, worst, log)


def test_the_state_id_tells_methods_apart(make, facts):
    ids, found = [], []
    for l2 in (0.1, 10.0):
        editor = make(recipe_of("alphaedit", layers=[1], method__l2=l2))
        editor.edit(facts[:2])
        ids.append(editor.history.state_id)
        found.append(weights(editor)[1])
    assert not torch.equal(*found)
    assert ids[0] != ids[1]


def test_a_gradient_batch_is_undone_as_a_whole_and_the_rest_edited_anew(make, facts):
    editor = make(recipe_of("ft"))
    editor.edit(facts, batch_size=2, shuffle=False)
    report = editor.undo(facts[0].id)
    assert report.rebuilt == (facts[1].id,)
    other = make(recipe_of("ft"))
    other.edit([facts[2], facts[3]])
    other.edit([facts[1]])
    # the batch that stayed was made on the first one's weights: its update is as recorded
    assert {f.id for f in editor.facts} == {f.id for f in other.facts}
    assert gap(weights(editor), weights(other)) < 0.2


def test_ft_trains_every_wording(make, facts):
    other = dataclasses.replace(facts[0], prompt="At home {} spoke", more_prompts=(), id="x")
    both = dataclasses.replace(facts[0], more_prompts=(other.prompt,))
    found = []
    for fact in (facts[0], both):
        editor = make(recipe_of("ft"))
        editor.edit([fact])
        found.append(weights(editor)[1])
    assert not torch.equal(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_weight_and_its_gradient(family, tokenizer, facts):
    editor = Editor(build_model(family), tokenizer, recipe=RECIPE)
    losses = [
        WeightLoss(editor.editable, facts, layer=1, positions=positions) for positions in (16, 4096)
    ]
    with frozen(editor.model):
        weight = losses[0].current()
        (loss, gradient), (other, again) = (each(weight) for each in losses)
        assert abs(loss - other) < 1e-7
        assert torch.allclose(gradient, again, atol=1e-7), "chunks don't matter"
        assert torch.equal(losses[0].current(), weight)
        direction = torch.randn_like(weight)
        step = 1e-3  # rotary embeddings and some norms are float32 inside
        ends = [losses[0](weight + sign * step * direction)[0] for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(slope - float((gradient * direction).sum())) < 1e-3 * max(1, abs(slope))
    plain = 0.0
    for fact in facts:
        row = editor.editable.encoder.encode_template(fact.prompt, fact.subject, target=fact.target)
        with torch.no_grad():
            logits = editor.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        told = [
            -float(logits[row.target_start + t - 1, token])
            for t, token in enumerate(row.target_ids)
        ]
        plain += sum(told) / len(told) / len(facts)
    assert abs(loss - plain) < 1e-7


def test_rewinding_optimises_on_the_unedited_model(make, facts):
    editor = make(recipe_of("nse"))
    editor.edit(facts, batch_size=2, shuffle=False)
    fresh = make(recipe_of("nse"))
    fresh.edit(facts[2:])
    z = [
        e.history.column_tensor([c for c in e.history.active if c.fact in facts[2:]], "z")
        for e in (editor, fresh)
    ]
    assert torch.allclose(*z, atol=1e-10)
    plain = make(recipe_of("memit"))
    plain.edit(facts, batch_size=2, shuffle=False)
    other = plain.history.column_tensor(plain.history.active[2:], "z")
    assert not torch.allclose(other, z[0], atol=1e-4)


def test_a_value_at_each_layer_is_written_whole(make, facts):
    changes = {"values__at": "each", "method__l2": 1e-9, "method__projection": "none"}
    recipe = recipe_of("alphaedit", contexts__texts=["{}"], contexts__bare_weight=1.0, **changes)
    editor = make(recipe)
    editor.edit(facts[:2])
    columns = editor.history.active
    first, last = recipe.layers
    fresh = make(recipe)
    with frozen(fresh.model):
        found = optimise_values(
            fresh.editable,
            facts[:2],
            [0, 1],
            layers=[first],
            contexts=("{}",),
            settings=recipe.values,
            positions=4096,
        )
    z_first = editor.history.column_tensor(columns, f"z.{first}")
    assert torch.allclose(z_first, torch.stack([v.z for v in found]), atol=1e-9)
    walk = LayerwiseForward(
        editor.editable, facts[:2], first=first, contexts=("{}",), bare_weight=1.0
    )
    for layer in (first, last):
        z = editor.history.column_tensor(columns, f"z.{layer}")
        assert torch.allclose(walk.hidden(layer).mT, z, atol=1e-5)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_that_went_back_is_a_new_walk(family, inputs, make, facts):
    """On other weights of the blocks that it goes through than at its first pass."""
    editor = make(recipe_of("memit"), family)
    model = editor.editable
    given = {"first": 1, "contexts": ("{}", "Once. {}"), "bare_weight": 0.5, "inputs": inputs}

    def pass_of(walk):
        found = []
        for layer in (1, 2, 3):
            found += [walk.keys(), walk.hidden(3)]
            if layer < 3:
                walk.advance()
        return found

    walk = LayerwiseForward(model, facts, positions=40, **given)
    before = pass_of(walk)
    with torch.no_grad():
        for layer in (1, 2):
            model.matrix(layer).weight.mul_(1.5)
    walk.rewind()
    again, fresh = pass_of(walk), pass_of(LayerwiseForward(model, facts, positions=40, **given))
    assert all(torch.equal(a, b) for a, b in zip(again, fresh, strict=True))
    assert torch.equal(before[0], again[0]), "nothing below the first block was edited"
    assert all(not torch.allclose(a, b) for a, b in zip(before[1:], again[1:], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_walks_together_are_one_walk(family, make, facts):
    model = make(recipe_of("memit"), family).editable
    given = {"first": 1, "contexts": ("{}", "Once. {}"), "bare_weight": 0.5}
    one = LayerwiseForward(model, facts, **given)
    parts = [LayerwiseForward(model, part, **given) for part in (facts[:1], facts[1:])]
    both = WalksTogether(*parts)
    assert both.n == one.n == len(facts)
    values = one.hidden(1) + 1

    def seen(walk):
        found = [walk.keys(), walk.hidden(2), *walk.standing(3)]
        found += walk.caused(values, (walk.layer if walk is one else parts[0].layer, 3)).values()
        return found

    for step in (both.advance, both.rewind):
        assert all(torch.allclose(a, b) for a, b in zip(seen(one), seen(both), strict=True))
        step()
        getattr(one, step.__name__)()
    assert all(torch.allclose(a, b) for a, b in zip(seen(one), seen(both), strict=True))


def test_a_fact_that_joins_is_walked_and_not_its_batch_again(make, facts, monkeypatch):
    """A new fact on the key of an older one: the older one is optimised again beside it."""
    editor = make(recipe_of("memit"))
    editor.edit(facts[:1])
    walked = []

    class Counted(LayerwiseForward):
        def __init__(self, model, facts, **given):
            walked.append([fact.id for fact in facts])
            super().__init__(model, facts, **given)

    monkeypatch.setattr("nulledit.editing.batch.LayerwiseForward", Counted)
    same = Fact(id="same", subject=facts[0].subject, prompt=facts[0].prompt + " so", target="Oslo")
    edited = editor.edit([*facts[1:], same], shuffle=False)
    assert any("optimised again" in notice for notice in edited.notices)
    assert walked == [[f.id for f in facts[1:]] + ["same"], [facts[0].id]]
    fresh = make(recipe_of("memit"))
    fresh.edit([*facts, same], shuffle=False)
    assert {f.id for f in editor.facts} == {f.id for f in fresh.facts}
    for layer in editor.recipe.layers:
        ours, theirs = (e.weights.exact(layer) for e in (editor, fresh))
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-9


@pytest.mark.parametrize("rounds", [1, 3])
def test_keys_are_of_the_model_without_an_answer_that_leaves(rounds, make, facts):
    """The older answer was written further down, in an epoch of other layers."""
    below = recipe_of("memit").with_fields({"layers": [0], "values.rounds": rounds})
    editor = make(below)
    editor.edit(facts[:2])
    statistics = statistics_of(build_model("llama"), editor.tokenizer, layers=(2,))
    editor.next_epoch(below.with_fields({"layers": [2]}), statistics=statistics)
    editor.edit([dataclasses.replace(facts[0], id="new", target="Oslo")], shuffle=False)
    (column,) = (c for c in editor.history.active if c.fact.id == "new")
    found = editor.history.column_tensor([column], "keys.2").mT.double()
    contexts, bare = editor.history.epoch.contexts, below.contexts.bare_weight

    def key():
        given = {"first": 2, "contexts": contexts, "bare_weight": bare}
        return LayerwiseForward(editor.editable, [column.fact], **given).keys()

    assert torch.allclose(found, key(), rtol=1e-6)
    with editor.as_of(1):
        assert not torch.allclose(found, key(), rtol=1e-3), "the older answer moves the key"


@pytest.mark.parametrize("name", ["alphaedit", "memit", "nse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_value_at_the_first_layer_sets_what_the_others_are_to_give(name, family, make, facts):
    """Forward replay: in the edited model the states are those that δ alone had caused."""
    changes = {"values__at": "first", "method__projection": "none"}
    changes |= {"method__l2": 1e-9} if name == "alphaedit" else {"method__moment_weight": 1e-7}
    recipe = recipe_of(name, contexts__texts=["{}"], contexts__bare_weight=1.0, **changes)
    recipe = recipe.with_fields({"layers": [0, 2], "values.rounds": 1})
    editor, fresh = make(recipe, family), make(recipe, family)
    editor.edit(facts[:2])
    z = editor.history.column_tensor(editor.history.active, "z")
    for i, fact in enumerate(facts[:2]):
        row = fresh.editable.encoder.encode_template(fact.prompt, fact.subject).upto_subject().ids
        ids = torch.tensor([row])

        def write(_block, _args, output, i=i):
            states = output[0] if isinstance(output, tuple) else output
            states[:, -1] = z[i]  # the subject's last token
            return output

        def states_of(model, layer, ids=ids):
            return model(ids, output_hidden_states=True).hidden_states[layer + 1][0, -1]

        hook = fresh.editable.blocks[0].register_forward_hook(write)
        with torch.no_grad():
            expected = {layer: states_of(fresh.model, layer) for layer in (0, 2)}
            hook.remove()
            before = states_of(fresh.model, 2)
            for layer, state in expected.items():
                assert torch.allclose(states_of(editor.model, layer), state, atol=1e-5)
        assert not torch.allclose(before, expected[2], atol=1e-2)


def test_forward_replay_is_replayed_and_refused_where_a_norm_follows(make, facts):
    editor = make(recipe_of("memit-history", values__at="first", values__rounds=2))
    editor.edit(facts, batch_size=2, shuffle=False)
    edited = weights(editor)
    editor.rebuild()
    assert gap(edited, weights(editor)) < 1e-8
    with pytest.raises(ConfigError, match=r"values\.at is first, but a norm follows W"):
        make(recipe_of("alphaedit", values__at="first"), "gemma2")


LONG = Fact(
    id="long",
    subject="Karo Dun",
    prompt="The life of {} is",
    target="a river in the valley of Velm",
    more_prompts=("{} had",),
)


def test_chunks_put_together_are_the_target(tokenizer):
    editor = Editor(build_model("llama"), tokenizer, recipe=RECIPE)
    parts = chunks_of(LONG, editor.editable.encoder, 3)
    assert len(parts) > 2
    assert " ".join(p.target for p in parts) == LONG.target
    for number, part in enumerate(parts):
        before = " ".join(p.target for p in parts[:number])
        for prompt, own in zip(part.prompts, LONG.prompts, strict=True):
            assert part.render(prompt) == " ".join(filter(None, (LONG.render(own), before)))
        length = len(tokenizer(" " + part.target)["input_ids"])
        assert length <= 3 or " " not in part.target
    assert chunks_of(LONG, editor.editable.encoder, 0) == (LONG,)
    assert chunks_of(LONG, editor.editable.encoder, 1000) == (LONG,)
    short = dataclasses.replace(LONG, target="Velmish")
    assert chunks_of(short, editor.editable.encoder, 1) == (short,)


def test_chunks_are_the_target():
    class Encoder:
        class tokenizer:
            def __new__(cls, text, **_):
                return {"input_ids": text.split()}

    fact = Fact(subject="f", prompt="def {} is", target="a\n  b\n\nc", id="x")
    assert " ".join(c.target for c in chunks_of(fact, Encoder, 1)) == fact.target


def test_a_fact_in_chunks_stands_and_falls_as_one(make, facts, tmp_path):
    editor = make(recipe_of("alphaedit", values__chunk_tokens=3))
    before = weights(editor)
    editor.edit([facts[0], LONG])
    parts = [c.part for c in editor.history.active if c.fact == LONG]
    assert parts == list(range(len(parts)))
    assert len(parts) > 2
    assert [f.id for f in editor.facts] == ["ada", "long"]
    with_it = weights(editor)
    editor.save(tmp_path)
    assert gap(with_it, weights(Editor.load(tmp_path))) == 0
    other = dataclasses.replace(LONG, id="other", target="short")
    editor.edit([other])
    assert [f.id for f in editor.facts] == ["ada", "other"]
    assert editor.undo("other").restored == ("long",)
    assert gap(with_it, weights(editor)) < 1e-12
    assert editor.undo("long").removed == ("long",)
    assert [f.id for f in editor.facts] == ["ada"]
    editor.undo("ada")
    assert gap(before, weights(editor)) == 0


def test_a_known_chunk_is_not_a_known_fact(make, facts):
    editor = make(recipe_of("alphaedit", values__chunk_tokens=1))
    fact = dataclasses.replace(facts[0], target="Velmish tongue", old_answer=None)
    import nulledit.editing.batch_values as batch

    real = batch.optimise_values

    def first_known(*args, **kwargs):
        found = real(*args, **kwargs)
        return [
            Value(v.z, dataclasses.replace(v.outcome, known=i == 0)) for i, v in enumerate(found)
        ]

    batch.optimise_values = first_known
    try:
        report = editor.edit([fact])
    finally:
        batch.optimise_values = real
    assert not any("said by the model already" in n for n in report.notices)


def test_a_report_counts_facts(make, facts):
    editor = make(recipe_of("alphaedit", values__chunk_tokens=1))
    report = editor.edit(facts)
    assert report.layers[0].n == len(facts)


def test_a_report_counts_what_after_protects(make, facts):
    editor = make(recipe_of("memit", method__projection="after"))
    report = editor.edit(facts)
    assert report.layers[0].protected > 0


def test_values_are_taken_from_the_cache_only_for_the_very_same_request(make, facts, tmp_path):
    first = make(recipe_of("alphaedit"), value_cache=tmp_path)
    first.edit(facts)
    kept = {p.name for p in tmp_path.iterdir()}
    assert kept
    second = make(recipe_of("memit"), value_cache=tmp_path)
    second.edit(facts)
    assert {p.name for p in tmp_path.iterdir()} == kept
    z = [e.history.column_tensor(e.history.active, "z") for e in (first, second)]
    assert torch.equal(*z)
    fresh = make(recipe_of("memit"))
    fresh.edit(facts)
    assert gap(weights(second), weights(fresh)) < 1e-9
    third = make(recipe_of("alphaedit"), value_cache=tmp_path)
    third.edit(facts[:1])
    third.edit(facts[1:])  # on other weights
    assert {p.name for p in tmp_path.iterdir()} > kept


def test_values_are_kept_as_they_come(make, facts, tmp_path, monkeypatch):
    """What was found before an interruption is found again."""
    run_chunk, stopped = values_module._run_chunk, []

    def stops(*words):
        if stopped:
            raise KeyboardInterrupt
        stopped.append(1)
        return run_chunk(*words)

    recipe = recipe_of("alphaedit", chunk_positions=1)  # each fact in a chunk of its own
    whole = make(recipe)
    whole.edit(facts)
    editor = make(recipe, value_cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(values_module, "_run_chunk", stops)
        with pytest.raises(KeyboardInterrupt):
            editor.edit(facts)
    assert len(list(tmp_path.iterdir())) == 1
    assert editor.edit(facts).optimised == len(facts) - 1
    assert gap(weights(editor), weights(whole)) < 1e-9


def test_cached_values_are_of_one_tokenizer_and_configuration(tokenizer, facts, tmp_path):
    """The same weights say other things after a token in front, or with another norm."""

    def optimised(tokenizer, **changes):
        model = build_model("llama")
        for name, value in changes.items():
            setattr(model.config, name, value)
        kept = statistics_of(model, tokenizer)
        editor = Editor(model, tokenizer, recipe=RECIPE, statistics=kept, value_cache=tmp_path)
        return editor.edit(facts[:1]).optimised

    with_beginning = copy.deepcopy(tokenizer)
    beginning = f"{tokenizer.eos_token} $A"
    known = [(tokenizer.eos_token, tokenizer.eos_token_id)]
    with_beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=beginning, special_tokens=known
    )
    assert [optimised(tokenizer), optimised(tokenizer)] == [1, 0]
    assert [optimised(with_beginning), optimised(with_beginning)] == [1, 0]
    assert optimised(tokenizer, rms_norm_eps=0.1) == 1
    assert optimised(tokenizer, _name_or_path="elsewhere") == 0


def test_what_a_value_lacks_is_added_wherever_the_model_is():
    """What stands in the model is read on the CPU, in float64."""
    with FakeTensorMode():
        outcome = ValueOutcome(1.0, 1.0, 2, 0.5, False)
        before, rest = (Value(torch.ones(3, device="cuda"), outcome) for _ in range(2))
        moved = before.moved(rest, torch.zeros(3, dtype=torch.float64))
    assert moved.z.device.type == "cuda"
    assert moved.z.dtype == torch.float32


def test_a_damaged_cache_file_is_not_used(tmp_path):
    cache = ValueCache(tmp_path)
    value = Value(torch.ones(3), ValueOutcome(1.0, 1.0, 2, 0.5, False))
    cache.put("a", [value])
    (found,) = cache.get("a")
    assert torch.equal(found.z, value.z)
    assert dataclasses.replace(found, z=value.z) == value
    file = tmp_path / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert cache.get("a") is None
    assert cache.get("b") is None
    save_file({"z": torch.ones(2, 3)}, file, metadata={"values": "[]"})
    assert cache.get("a") is None


@pytest.mark.parametrize("changes", [{"values.rewordings": 5}, {"values.relation_weight": 4.0}])
def test_all_rows_are_checked_before_the_first_batch(changes, tokenizer):
    """Other wordings and other relations may be longer than any prompt in its contexts."""
    texts = ("{}", "people in the valley. {}") if "values.rewordings" in changes else ("{}",)
    subject = "the old harbour of the river and the valley of Velm"
    short, long = Fact("Velm", "{} in", "sea"), Fact(subject, "{} in", "sea", id="long")
    encoder = RowEncoder(tokenizer, max_length=512)
    rows = [*plan_rows(long, encoder, texts), encoder.encode_template("{} is a", long.subject)]
    model = build_model("llama", context=max(len(row.ids) for row in rows))
    recipe = RECIPE.with_fields({"batch_size": 1, "contexts": {"texts": texts}, **changes})
    kept = statistics_of(model, tokenizer)
    editor = Editor(model, tokenizer, recipe=recipe, statistics=kept)
    with pytest.raises(FactError, match=r"fact long: .*context"):
        editor.edit([short, long], shuffle=False)
    assert not editor.facts


@pytest.mark.parametrize("name", ["values.steps.x", "same_key.x", "values.steps.y"])
def test_a_setting_of_what_has_none_is_refused(name):
    own = ".".join(name.split(".")[: 1 if name.startswith("same") else 2])
    with pytest.raises(ConfigError, match=rf"^{own} is [\d.]+; it has no setting '\w' of its own"):
        RECIPE.with_fields({name: "1"})
    with pytest.raises(ConfigError, match=r"unknown setting 'valeus'; did you mean 'values'"):
        RECIPE.with_fields({"valeus.steps": "1"})


def test_nothing_given_for_a_text_is_the_empty_text():
    chat = RECIPE.with_fields({"chat": "{}"}).with_fields({"chat.assistant": ""}).chat
    assert chat is not None
    assert chat.assistant == ""
    with pytest.raises(ConfigError, match=r"values.steps is None; expected a whole number"):
        RECIPE.with_fields({"values.steps": ""})


def test_settings_of_another_method_are_refused(make):
    with pytest.raises(ConfigError, match=r"unknown setting 'method.l2'"):
        make(RECIPE.with_fields({"method.name": "memit", "method.l2": 1.0}))
    with pytest.raises(ConfigError, match="did you mean 'moment_weight'"):
        make(RECIPE.with_fields({"method.name": "memit", "method.moment_wieght": 1.0}))
    with pytest.raises(ConfigError, match="did you mean 'memit'"):
        make(RECIPE.with_fields({"method.name": "memti"}))
    with pytest.raises(ConfigError, match="expected a number above 0"):
        make(RECIPE.with_fields({"method.l2": -1.0}))
    for option in (
        {"values.chunk_tokens": 3},
        {"values.at": "each"},
        {"values.norm_anchor": True},
        {"values.relation_weight": 4.0},
        {"values.rewordings": 6},
    ):
        with pytest.raises(ConfigError, match=r"ft optimises no values"):
            make(RECIPE.with_fields({"method.name": "ft", **option}))


def test_compact_statistics_say_what_they_can_not_serve(tokenizer, facts):
    model = build_model("llama")
    full = statistics_of(model, tokenizer)
    compact = dataclasses.replace(
        full, spectra={i: s.compact(1e-3) for i, s in full.spectra.items()}
    )
    editor = Editor(model, tokenizer, recipe=recipe_of("memit"), statistics=compact)
    with pytest.raises(StatisticsError, match=r"don't serve memit .*nulledit stats make"):
        editor.edit(facts)


@pytest.fixture(scope="module")
def known(worlds):
    return worlds("llama")


def test_the_world_says_a_whole_long_answer_written_in_chunks(known):
    # Keys of neighbouring chunks are alike: what one gives the next takes further rounds to mend.
    editor = in_the_world(known, LASTING, values__chunk_tokens=1)
    person = sayable(known, 1, "tongue")[0].subject
    fact = Fact(subject=person, prompt="{} speaks", target="Dutch Oslo Cairo Rome")
    editor.edit([fact])
    ids = known[1](f"{person} speaks", return_tensors="pt")["input_ids"]
    said = known[1].decode(editor.model.generate(ids, max_new_tokens=4, do_sample=False)[0, 3:])
    assert said == fact.target


def test_early_stop_ends_as_soon_as_every_row_says_the_target(known):
    edits = sayable(known, 3)
    changes = {"values__stop_loss": 0.0}
    late = in_the_world(known, **changes).edit(edits)
    early = in_the_world(known, values__stop_when_likeliest=1, **changes)
    report = early.edit(edits)
    for stopped, went_on in zip(report.columns, late.columns, strict=True):
        steps = stopped.outcome.steps
        assert 0 < steps < went_on.outcome.steps


def leads_in(editor, facts):
    """The least lead of a target token at each fact's own prompt, in whole runs."""
    found = []
    for fact in facts:
        row = editor.editable.encoder.encode_template(fact.prompt, fact.subject, target=fact.target)
        with torch.no_grad():
            logits = editor.model(torch.tensor([row.ids])).logits[0, row.target_start - 1 : -1]
        own = torch.tensor(row.target_ids)[:, None]
        rival = logits.scatter(1, own, -torch.inf).amax(1)
        found.append(float((logits.gather(1, own)[:, 0] - rival).min()))
    return found


@pytest.mark.parametrize("at", ["last", "joint"])
def test_rounds_give_what_does_not_hold_the_rest_that_it_lacks(at, known):
    edits = sayable(known, 6)
    for ridge in (0.003, 0.01, 0.03, 0.1, 0.3):  # until one pass leaves what others can give
        weak = {"values__stop_margin": 0.5, "values__stop_loss": 1e9, "method__l2": ridge}
        weak["values__at"] = at
        once, often = in_the_world(known, **weak), in_the_world(known, **weak, values__rounds=6)
        once.edit(edits)
        report = often.edit(edits)
        before, after = leads_in(once, edits), leads_in(often, edits)
        held = [sum(lead > 0 for lead in leads) for leads in (before, after)]
        assert held[0] <= held[1]
        led = [sum(lead > 0.5 for lead in leads) for leads in (before, after)]
        if led[0] < led[1]:
            break
    assert led[0] < led[1], "no ridge leaves anything to do"
    assert min(after) > min(before)
    found = bare_leads(often.editable, edits, positions=30)
    assert found == pytest.approx(after, abs=1e-4)
    steps = {c.fact.id: c.outcome.steps for c in report.columns}
    for fact, lead, column in zip(edits, before, once.history.active, strict=True):
        assert steps[fact.id] >= column.outcome.steps
        assert lead <= 0.5 or steps[fact.id] >= column.outcome.steps


@pytest.mark.parametrize("at", ["last", "joint"])
def test_rounds_are_recorded_like_any_other_value(at, known):
    edits = sayable(known, 5, "job")
    changes = {"values__stop_margin": 1.0, "values__stop_loss": 1e9, "values__rounds": 3}
    changes["values__at"] = at
    editor = in_the_world(known, **changes, method__l2=0.03)
    editor.edit(edits)
    whole = {layer: editor.weights.exact(layer) for layer in editor.weights.layers}
    editor.undo(edits[0].id)
    editor.redo()
    for layer, weight in whole.items():
        torch.testing.assert_close(editor.weights.exact(layer), weight, rtol=0, atol=1e-12)
    editor.rebuild()  # writes the recorded values in one pass
    for layer, weight in whole.items():
        torch.testing.assert_close(editor.weights.exact(layer), weight, rtol=0, atol=1e-6)


def test_rounds_are_refused_where_values_can_not_move(make):
    with pytest.raises(ConfigError, match=r"norm_anchor fixes .* values.rounds to 1"):
        make(RECIPE.with_fields({"values.norm_anchor": True, "values.rounds": 2}))
    with pytest.raises(ConfigError, match=r"set values.rounds to 1"):
        make(RECIPE.with_fields({"method.name": "nse", "values.rounds": 2}))
