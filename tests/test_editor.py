"""The editor: what an engineer relies on."""

import dataclasses
import itertools
import random
from contextlib import contextmanager

import pytest
import torch

from nulledit import Editor, Fact, NullEditError
from nulledit.baselines.lora import LoraSettings
from nulledit.config import (
    ContextSettings,
    NullSpaceSettings,
    Recipe,
    StatisticsSettings,
    ValueSettings,
)
from nulledit.errors import ConfigError, FactError, LedgerError, ModelError, StatisticsError
from nulledit.io.files import replacing
from nulledit.io.settings import read_settings
from nulledit.ledger.records import History
from nulledit.ledger.store import Store
from nulledit.ledger.tensors import read_spectrum
from nulledit.ledger.update_solver import LayerPreconditioners
from nulledit.methods import METHODS, find_method
from nulledit.methods.registry import Method
from nulledit.runs.verify import verify
from nulledit.tracing.trace import TraceSettings


@pytest.fixture
def make_editor(tiny_model, tokenizer, recipe, make_statistics):
    def make(family="llama", dtype=torch.float64, recipe=recipe, **options):
        model = tiny_model(family, dtype=dtype)
        return Editor(model, tokenizer, recipe=recipe, statistics=make_statistics(model), **options)

    return make


def weights(editor):
    return {k: v.clone() for k, v in editor.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def gap(editor, other):
    """Largest relative difference of the edited matrices, before rounding, to the updates' size."""
    worst = 0.0
    for layer in editor.recipe.layers:
        base = editor.history.tensors[editor.history.epochs[0].tensors][f"base.{layer}"].double()
        mine, theirs = editor.weights.exact(layer), other.weights.exact(layer)
        worst = max(worst, float((mine - theirs).norm() / (theirs - base).norm()))
    return worst


@pytest.mark.few
def test_only_the_named_matrices_change(architecture, make_editor, facts):
    editor = make_editor(architecture)
    before = weights(editor)
    report = editor.edit(facts)
    changed = {k for k, v in editor.model.state_dict().items() if not torch.equal(v, before[k])}
    assert len(changed) == len(editor.recipe.layers)
    assert [c.fact for c in report.columns] == facts
    for layer in report.layers:
        assert layer.update_share > 0
        assert 0 < layer.free_share <= 1


@pytest.mark.few
def test_undo_everything_restores_the_base_bit_exactly(architecture, make_editor, facts):
    for dtype in (torch.float64, torch.bfloat16):
        editor = make_editor(architecture, dtype)
        before = weights(editor)
        editor.edit(facts[:3])
        editor.edit(facts[3:])
        assert not same(before, weights(editor))
        editor.undo(*[f.id for f in facts])
        assert same(before, weights(editor))
        assert editor.facts == []


def test_undo_is_the_solve_without_the_column_in_any_order(make_editor, facts):
    ids = [f.id for f in facts]
    ends = []
    for order in itertools.permutations(ids[:3], 2):
        editor = make_editor()
        editor.edit(facts, batch_size=2, shuffle=False)
        report = [editor.undo(id_) for id_ in order]
        assert [r.removed for r in report] == [(order[0],), (order[1],)]
        assert len(report[0].moved) == 3
        ends.append((set(order), editor))
    for (ids_a, a), (ids_b, b) in itertools.combinations(ends, 2):
        if ids_a == ids_b:
            assert gap(a, b) < 1e-10
    # and that solve is the plain closed form on the recorded columns that are left
    ids_a, editor = ends[0]
    for layer in editor.recipe.layers:
        tensors = editor.history.tensors[editor.history.epochs[0].tensors]
        base = tensors[f"base.{layer}"]
        spectrum, threshold = read_spectrum(tensors, layer)
        own = LayerPreconditioners.of(editor.recipe, spectrum, threshold).own.blocks[0]
        U, g, rest = own.vectors, own.gains, own.outer_gain
        G = rest * torch.eye(len(U), dtype=torch.float64) + U @ torch.diag(g - rest) @ U.mT
        K = editor.history.column_tensor(editor.history.active, f"keys.{layer}").mT
        V = editor.history.column_tensor(editor.history.active, f"targets.{layer}").mT
        eye = torch.eye(len(G), dtype=torch.float64)
        dense = base + (V - base @ K) @ K.mT @ G @ torch.linalg.inv(eye + K @ K.mT @ G)
        assert float((editor.weights.exact(layer) - dense).norm() / (dense - base).norm()) < 1e-8


def test_undo_of_what_is_not_there_is_refused(make_editor, facts):
    editor = make_editor()
    with pytest.raises(LedgerError, match=r"'x' in the model: there are no facts in it$"):
        editor.undo("x")
    editor.edit(facts[:1])
    before = weights(editor)
    with pytest.raises(LedgerError, match="no fact 'nobody'"):
        editor.undo("nobody")
    editor.undo(facts[0].id)
    with pytest.raises(LedgerError, match="no fact"):
        editor.undo(facts[0].id)
    editor.edit(facts[:1])
    assert same(before, weights(editor)), "editing again after an undo starts from the base"


@pytest.mark.few
def test_batches_before_and_after_saving_and_loading(architecture, make_editor, facts, tmp_path):
    straight = make_editor(architecture, torch.float32)
    straight.edit(facts[:2])
    straight.edit(facts[2:])
    straight.undo(facts[1].id)

    broken = make_editor(architecture, torch.float32)
    broken.edit(facts[:2])
    broken.save(tmp_path / "run")
    loaded = Editor.load(tmp_path / "run")
    assert same(weights(loaded), weights(broken))
    loaded.edit(facts[2:])
    loaded.undo(facts[1].id)
    loaded.save(tmp_path / "run")
    again = Editor.load(tmp_path / "run")
    assert same(weights(straight), weights(again))
    assert again.facts == straight.facts
    assert again.history.state_id == straight.history.state_id


@pytest.mark.parametrize(
    ("name", "then", "now"),
    [
        ("encore", {"history": False}, {"history": True}),
        ("betaedit", {"moment_weight": 15000.0}, {"moment_weight": 3000.0}),
    ],
)
def test_a_ledger_without_constants_keeps_its_weights_and_goes_on_as_it_began(
    make_editor, recipe, facts, tmp_path, monkeypatch, name, then, now
):
    """Loading, writing again, undoing, redoing and verifying, as its earlier version did."""

    def begin(**constants):
        method = Recipe.from_dict({"method": {"name": name} | constants}).method
        editor = make_editor(recipe=dataclasses.replace(recipe, method=method), seed=3)
        editor.edit(facts[:2])
        editor.edit(facts[2:3])
        return editor

    def go_on(editor):
        editor.edit(facts[3:])
        editor.retry("zola")
        editor.undo("ada", "velm")
        editor.redo("velm")
        return editor

    with monkeypatch.context() as earlier:
        earlier.setattr(Method, "filled", lambda self, recipe: recipe)
        old = begin()
    assert set(old.history.epochs[0].stored["method"]) == {"name", "projection"}
    old.save(tmp_path / "run")
    assert verify(tmp_path / "run", Editor.load).passed
    loaded = Editor.load(tmp_path / "run")
    as_then, as_now = begin(**then), begin(**now)
    assert gap(loaded, as_then) < 1e-9
    assert gap(loaded, as_now) > 1e-5
    assert gap(go_on(loaded), go_on(as_then)) < 1e-9
    loaded.save(tmp_path / "run")
    assert verify(tmp_path / "run", Editor.load).passed
    again = Editor.load(tmp_path / "run")
    assert gap(again, as_then) < 1e-9


def test_the_saved_model_is_a_plain_hugging_face_model(family, make_editor, facts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    editor = make_editor(family, torch.float32)
    editor.edit(facts)
    editor.save(tmp_path / "run")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")(
        "Then, he", return_tensors="pt"
    )
    assert torch.equal(plain(tokens["input_ids"]).logits, editor.model(tokens["input_ids"]).logits)
    assert type(plain) is type(editor.model)


def test_model_folder_follows_the_ledger(make_editor, facts, tmp_path):
    editor = make_editor("llama", torch.float32)
    editor.edit(facts[:2])
    editor.save(tmp_path / "run")
    stamp = (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns
    editor.save_model(tmp_path / "run/model")
    assert (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns == stamp, "nothing to do"
    editor.edit(facts[2:])  # the ledger is ahead of the model now, as after a crash
    later = Editor.load(tmp_path / "run")
    assert same(weights(later), weights(editor))
    later.save_model(tmp_path / "run/model")
    assert same(weights(Editor.load(tmp_path / "run")), weights(editor))


def test_a_model_changed_by_hand_is_refused(make_editor, facts, tmp_path):
    editor = make_editor("llama", torch.float32)
    editor.edit(facts)
    editor.save(tmp_path / "run")
    with torch.no_grad():
        editor.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    editor.model.save_pretrained(tmp_path / "run/model")
    with pytest.raises(LedgerError, match="another model"):
        Editor.load(tmp_path / "run")


def test_a_damaged_tensor_is_found(make_editor, facts, tmp_path):
    editor = make_editor("llama", torch.float32)
    editor.edit(facts)
    editor.save(tmp_path / "run")
    victim = sorted((tmp_path / "run/ledger/tensors").iterdir())[0]
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    with pytest.raises(LedgerError, match="damaged"):
        Editor.load(tmp_path / "run")


RELATIONS = [
    Fact(id="job", subject="Karo Dun", prompt="{} works as a", target="river"),
    Fact(id="home", subject="Karo Dun", prompt="{} was born in", target="Paris"),
    Fact(id="tongue", subject="Karo Dun", prompt="{} speaks", target="English"),
]


def test_undo_of_one_on_a_shared_key_is_a_fresh_run_of_the_others(make_editor):
    editor = make_editor()
    editor.edit(RELATIONS)
    report = editor.undo("home")
    assert set(report.rebuilt) == {"job", "tongue"}
    fresh = make_editor()
    fresh.edit([RELATIONS[0], RELATIONS[2]])
    assert gap(editor, fresh) < 1e-6


def test_undo_of_the_fact_that_joined_brings_the_first_state_back(make_editor):
    editor = make_editor()
    editor.edit(RELATIONS[:1])
    before = weights(editor)
    editor.edit(RELATIONS[1:2])
    report = editor.undo("home")
    assert report.restored == ("job",)
    assert report.rebuilt == ()
    assert same(before, weights(editor))


def test_a_new_answer_is_as_if_the_older_had_never_been(make_editor):
    editor = make_editor()
    old = RELATIONS[0]
    new = dataclasses.replace(old, id="job-2", target="sailor")
    editor.edit([old])
    first = weights(editor)
    report = editor.edit([new])
    assert "the older answer 'river' of job is replaced" in report.notices[0]
    assert [f.id for f in editor.facts] == ["job-2"]
    fresh = make_editor()
    fresh.edit([new])
    assert gap(editor, fresh) < 1e-6
    undone = editor.undo("job-2")
    assert undone.restored == ("job",)
    assert same(first, weights(editor))


@pytest.mark.parametrize(
    ("subject", "prompt"),
    [
        ("東京タワー", "{}は"),
        ("Москва", "Город {} стоит на реке"),
        ("Karo Dun", "Karo Dun says that {} lives in"),
        ("Émile Zola!", "{}, who wrote, was born in"),
        ("x", "{}"),
        ("🦊", "The {} is"),
    ],
)
def test_subjects_of_all_kinds(make_editor, subject, prompt):
    editor = make_editor()
    report = editor.edit([Fact(id="f", subject=subject, prompt=prompt, target="London")])
    value = report.columns[0].outcome
    assert value.steps > 0
    assert 0 < value.delta_share <= editor.recipe.values.clamp + 1e-9


def test_a_queue_has_an_order_of_its_own_by_seed(make_editor, facts):
    many = [
        dataclasses.replace(f, id=f"{f.id}{i}", subject=f"{f.subject} {i}")
        for i in range(2)
        for f in facts
    ]
    orders = []
    for seed, queue in ((1, many), (1, many), (2, many)):
        editor = make_editor(seed=seed)
        editor.edit(queue, batch_size=4)
        orders.append([f.id for f in editor.facts])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(f.id for f in many)
    plain = make_editor()
    plain.edit(many, batch_size=4, shuffle=False)
    assert [f.id for f in plain.facts] == [f.id for f in many]


def test_an_interruption_leaves_the_last_finished_batch(make_editor, facts, tmp_path):
    editor = make_editor("llama", torch.float32)
    editor.attach(tmp_path / "run")

    def stop(stage, done, total):
        if stage == "values" and editor.history.batches:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editor.edit(facts, batch_size=2, shuffle=False, progress=stop)
    assert [f.id for f in editor.facts] == [f.id for f in facts[:2]]
    expected = make_editor("llama", torch.float32)
    expected.edit(facts[:2])
    assert same(weights(editor), weights(expected))
    history = Store(tmp_path / "run/ledger").load()
    assert [c.fact.id for c in history.active] == [f.id for f in facts[:2]]
    editor.edit(facts[2:])
    expected.edit(facts[2:])
    assert same(weights(editor), weights(expected)), "and it goes on as if nothing had happened"


def test_an_interrupted_queue_goes_on_to_the_same_end(make_editor, facts):
    """The same call again: facts done are left out, the rest comes in the batches it would have."""
    many = [
        dataclasses.replace(f, id=f"{f.id}{i}", subject=f"{f.subject} {i}")
        for i in range(2)
        for f in facts
    ]
    straight, broken = make_editor(), make_editor()
    straight.edit(many, batch_size=3)

    def stop(stage, done, total):
        if stage == "values" and len(broken.history.batches) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.edit(many, batch_size=3, progress=stop)
    broken.edit(many, batch_size=3)
    assert same(weights(broken), weights(straight))
    assert broken.history.state_id == straight.history.state_id


def test_an_interruption_just_after_the_commit_counts_as_committed(
    make_editor, facts, tmp_path, monkeypatch
):
    editor = make_editor("llama", torch.float32)
    editor.attach(tmp_path / "run")
    real = Store.commit

    def late(self, *args):
        real(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", late)
        with pytest.raises(KeyboardInterrupt):
            editor.edit(facts[:2])
    assert len(editor.facts) == 2
    editor.edit(facts[2:])
    assert Store(tmp_path / "run/ledger").load().state_id == editor.history.state_id


def test_a_store_that_refuses_leaves_everything_as_it_was(
    make_editor, facts, tmp_path, monkeypatch
):
    editor = make_editor("llama", torch.float32)
    editor.attach(tmp_path / "run")
    editor.edit(facts[:2])
    before, state = weights(editor), editor.history.state_id

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nulledit.ledger.store.tensor_bytes", full)
        with pytest.raises(OSError, match="No space"):
            editor.edit(facts[2:])
    assert same(before, weights(editor))
    assert editor.history.state_id == state == Store(tmp_path / "run/ledger").load().state_id
    editor.edit(facts[2:])
    assert len(editor.facts) == len(facts)


def test_two_writers_on_one_ledger_are_told(make_editor, facts, tmp_path):
    editor = make_editor("llama", torch.float32)
    editor.edit(facts[:1])
    editor.save(tmp_path / "run")
    one, two = Editor.load(tmp_path / "run"), Editor.load(tmp_path / "run")
    one.edit(facts[1:2])
    with pytest.raises(LedgerError, match="another process"):
        two.edit(facts[2:])
    assert [c.fact.id for c in Store(tmp_path / "run/ledger").load().active] == ["ada", "zola"]


def test_bad_input_is_refused_before_anything_changes(make_editor, facts):
    editor = make_editor()
    before = weights(editor)
    long = Fact(id="long", subject="Velm", prompt="{} " + "is far and " * 60, target="Rome")
    with pytest.raises(
        FactError, match=r"fact long: prompt of \d+ tokens, the target's included, is longer"
    ):
        editor.edit([*facts, long])
    with pytest.raises(FactError, match="contradict"):
        editor.edit([facts[0], dataclasses.replace(facts[0], id="other", target="Ostrel")])
    editor.edit(facts[:1])
    with pytest.raises(FactError, match="id 'ada' names two facts"):
        editor.edit([dataclasses.replace(facts[1], id="ada")])
    editor.undo("ada")
    assert same(before, weights(editor))


def test_layers_and_statistics_must_fit(tiny_model, tokenizer, recipe, make_statistics, facts):
    model = tiny_model("llama")
    for layers, words in (((9,), "out of range"), ((3,), "the model's last")):
        with pytest.raises(ModelError, match=words):
            Editor(model, tokenizer, recipe=dataclasses.replace(recipe, layers=layers))
    others = make_statistics(tiny_model("llama", seed=1))
    with pytest.raises(StatisticsError, match="the model's weights are"):
        Editor(model, tokenizer, recipe=recipe, statistics=others).edit(facts)
    few = make_statistics(model, layers=(1,))
    with pytest.raises(StatisticsError, match=r"layers \[2\] are needed"):
        Editor(model, tokenizer, recipe=recipe, statistics=few).edit(facts)
    with pytest.raises(StatisticsError, match="nulledit stats make"):
        Editor(model, tokenizer, recipe=recipe).edit(facts)


@pytest.mark.parametrize(
    ("value", "words"), [(1e9, "nothing is protected"), (1e-12, "no room left")]
)
def test_a_null_space_without_sense_is_warned_of(make_editor, recipe, facts, caplog, value, words):
    space = dataclasses.replace(recipe.null_space, rule="absolute", value=value)
    editor = make_editor(recipe=dataclasses.replace(recipe, null_space=space))
    editor.edit(facts[:1])
    assert words in caplog.text


def test_wordings_of_one_answer_are_one_fact_however_batches_are_cut(make_editor):
    one = Fact(id="one", subject="Karo Dun", prompt="{} works as a", target="baker", relation="job")
    two = dataclasses.replace(one, id="two", prompt="The work of {} is that of a")
    new = dataclasses.replace(one, id="new", target="sailor")
    together, apart = make_editor(), make_editor()
    report = together.edit([one, two])
    assert report.notices[0] == "two: another wording of one, edited as one fact"
    apart.edit([one])
    apart.edit([two])
    assert together.facts == apart.facts
    assert together.facts[0].prompts == (one.prompt, two.prompt)
    for editor in (together, apart):
        editor.edit([new])
        assert editor.facts == [new], "no wording of the older answer is left"
    assert gap(together, apart) < 1e-6


def test_group_mates_of_a_replaced_answer_are_optimised_again(make_editor):
    """The value they shared said the older answer too; replacing it elsewhere must not leave it."""
    job, home = (dataclasses.replace(f, relation=f.id) for f in RELATIONS[:2])
    new = dataclasses.replace(job, id="job-2", prompt="Then, the work of {} is", target="sailor")
    editor = make_editor()
    editor.edit([job, home])
    editor.edit([new])
    fresh = make_editor()
    fresh.edit([home, new])
    assert {f.id for f in editor.facts} == {"home", "job-2"}
    assert gap(editor, fresh) < 1e-6


def test_undoing_two_at_once_is_undoing_one_after_the_other(make_editor, facts):
    newer = [
        dataclasses.replace(f, id=f"{f.id}-2", target="sea", old_answer=None) for f in facts[:2]
    ]
    once, twice = make_editor(), make_editor()
    for editor in (once, twice):
        editor.edit(facts)
        editor.edit(newer)
    report = once.undo("ada-2", "zola-2")
    twice.undo("ada-2")
    twice.undo("zola-2")
    assert report.rebuilt == ()
    assert same(weights(once), weights(twice))
    assert {f.id for f in once.facts} == {f.id for f in facts}


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_keep_their_promises(make_editor, recipe, facts, seed, tmp_path):
    """Edits, new answers, undoing, saving and loading in any order, on keys shared and not.

    Per question the answers form a stack: an edit puts one on top, undoing takes it away and the
    one behind is true again. The weights are always the fold of what is active.
    """
    chance = random.Random(seed)
    quick = dataclasses.replace(recipe, values=dataclasses.replace(recipe.values, steps=3))
    editor = make_editor("llama", torch.float32, recipe=quick)
    base = weights(editor)
    questions = [*RELATIONS, *facts[:3]]
    stacks = {f.key: [] for f in questions}
    for number in range(9):
        tops = [stack[-1] for stack in stacks.values() if stack]
        if tops and chance.random() < 0.45:
            gone = chance.sample(tops, k=min(len(tops), chance.choice([1, 1, 2])))
            editor.undo(*[f.id for f in gone])
            for fact in gone:
                stacks[fact.key].pop()
        else:
            batch = [
                dataclasses.replace(
                    f, id=f"{f.id}.{number}", target=f"town {number}", old_answer=None
                )
                for f in chance.sample(questions, k=chance.choice([1, 2, 3]))
            ]
            editor.edit(batch)
            for fact in batch:
                stacks[fact.key].append(fact)
        if number == 5:
            editor.save(tmp_path / "run")
            editor = Editor.load(tmp_path / "run")
        expected = {stack[-1].id for stack in stacks.values() if stack}
        assert {f.id for f in editor.facts} == expected
        assert len(editor.facts) == len(expected)
        before = weights(editor)
        editor.weights.refresh()
        assert same(before, weights(editor))
    while editor.facts:
        editor.undo(*[f.id for f in editor.facts])
    assert same(base, weights(editor))


def test_a_loss_that_is_not_finite_is_refused(
    tiny_model, tokenizer, recipe, make_statistics, facts
):
    broken = tiny_model("llama", dtype=torch.float64)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")  # no key is made of it: statistics are whole
    editor = Editor(broken, tokenizer, recipe=recipe, statistics=make_statistics(broken))
    with pytest.raises(ModelError, match=r"fact ada: the loss is not finite at step 0; load"):
        editor.edit(facts)
    assert editor.facts == []


def test_a_ledger_begun_before_the_first_edit(make_editor, facts, tmp_path, recipe):
    editor = make_editor("llama", torch.float32, seed=7)
    assert editor.edit([]).columns == ()
    editor.save(tmp_path / "run")
    loaded = Editor.load(tmp_path / "run")
    assert (loaded.seed, loaded.recipe) == (7, find_method("alphaedit").filled(recipe))
    long = Fact(id="long", subject="Velm", prompt="{} " + "is far and " * 60, target="Rome")
    with pytest.raises(FactError):
        editor.edit([long])
    editor.edit(facts)
    assert Store(tmp_path / "run/ledger").load().state_id == editor.history.state_id
    with pytest.raises(ConfigError, match="batch_size is -1"):
        editor.edit(facts, batch_size=-1)


def test_saving_elsewhere_again_and_never_over_another_model(make_editor, facts, tmp_path):
    editor = make_editor("llama", torch.float32)
    editor.edit(facts[:1])
    editor.save(tmp_path / "a")
    for part in (facts[1:2], facts[2:3]):
        editor.edit(part)
        editor.save(tmp_path / "b")
        assert same(weights(Editor.load(tmp_path / "b")), weights(editor))
    other = make_editor("gpt2", torch.float32)
    other.model.save_pretrained(tmp_path / "c/model")
    with pytest.raises(LedgerError, match="holds another model"):
        editor.save(tmp_path / "c")


def test_a_half_rewritten_model_is_never_taken_for_whole(make_editor, facts, tmp_path, monkeypatch):
    """State ids come back by undo; one that was interrupted in between must not."""
    editor = make_editor("llama", torch.float32)
    editor.edit(facts[:1])
    editor.save(tmp_path / "run")
    editor.edit(facts[1:2])

    @contextmanager
    def full(file):
        with replacing(file) as partial:
            yield partial
        if file.suffix == ".safetensors":
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nulledit.ledger.model_folder.replacing", full)
        with pytest.raises(OSError, match="No space"):
            editor.save(tmp_path / "run")
    editor.undo(facts[1].id)
    editor.save(tmp_path / "run")
    assert same(weights(Editor.load(tmp_path / "run")), weights(editor))
    plain = type(editor.model).from_pretrained(tmp_path / "run/model")
    assert same(plain.state_dict(), weights(editor))


def test_base_weights_are_there_inside_only(make_editor, facts):
    editor = make_editor()
    base = weights(editor)
    editor.edit(facts)
    edited = weights(editor)
    with editor.base_weights():
        assert same(base, weights(editor))
    assert same(edited, weights(editor))


def test_independent_editors_share_nothing(make_editor, facts):
    one = make_editor()
    one.edit(facts)
    two = make_editor()
    assert isinstance(two.history, History)
    assert two.history.columns == ()
    two.edit(facts)
    assert same(weights(one), weights(two))
    assert issubclass(LedgerError, NullEditError)


@pytest.mark.parametrize("number", [-1, 2**63, pytest.param(10**5000, id="long"), 1.5, True, "1"])
def test_a_seed_or_batch_size_that_a_ledger_cannot_hold_is_refused(
    make_editor, facts, number, tiny_model, tokenizer, recipe
):
    with pytest.raises(ConfigError, match=r"^seed is .{1,40}; expected a whole number from 0"):
        Editor(tiny_model("llama"), tokenizer, recipe=recipe, seed=number)
    with pytest.raises(ConfigError, match=r"^seed is"):
        Editor.from_pretrained("no such model", seed=number)
    with pytest.raises(ConfigError, match=r"^batch_size is .{1,40}; expected a whole number"):
        make_editor().edit(facts, batch_size=number)


def test_the_largest_seed_and_batch_size_are_kept(make_editor, facts, tmp_path):
    editor = make_editor(seed=2**63 - 1)
    editor.edit(facts[:1], batch_size=2**63 - 1)
    editor.save(tmp_path / "run")
    assert Editor.load(tmp_path / "run").seed == 2**63 - 1


def test_a_ledger_whose_seed_is_below_zero_still_loads(make_editor, facts, tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr("nulledit.editing.engine.check_whole", lambda *_, **__: None)
        editor = make_editor(seed=-1)
    editor.edit(facts[:1])
    editor.save(tmp_path / "run")
    assert Editor.load(tmp_path / "run").seed == -1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_contexts_longer_than_the_model_reads_are_refused(make_editor, recipe, facts, family):
    sampled = recipe.with_fields({"contexts.texts": [], "contexts.tokens": 2**62})
    with pytest.raises(ConfigError, match=r"contexts.tokens is 4\d+: .* context of \d+$"):
        make_editor(family, recipe=sampled).edit(facts)


SETTINGS = (
    *(Recipe, ValueSettings, ContextSettings, NullSpaceSettings, StatisticsSettings),
    *(LoraSettings, TraceSettings, *(method.settings for method in METHODS)),
)
NUMBERS = [
    pytest.param(kind, field.name, id=f"{kind.__name__}.{field.name}")
    for kind in dict.fromkeys(SETTINGS)
    for field in dataclasses.fields(kind)
    if isinstance(field.default, int | float) and not isinstance(field.default, bool)
]


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_a_number_that_no_setting_can_have_is_refused_in_one_line(kind, name):
    for number in (10**400, 10**5000, -(10**400), float("nan"), float("inf"), True, [1], "many"):
        for make in (lambda data: kind(**data), lambda data: read_settings(kind, data, "")):
            with pytest.raises(ConfigError) as refused:
                make({name: number})
            assert name in str(refused.value)
            assert len(str(refused.value)) < 150
    if isinstance(kind.__dataclass_fields__[name].default, int):
        for number in (2**63, 2.5):
            with pytest.raises(ConfigError, match=f"{name} is .*expected"):
                kind(**{name: number})


@pytest.mark.parametrize("given", [{"layers": [1]}, 3, [1.0], torch.eye(2)])
def test_statistics_of_another_kind_are_refused_at_the_door(make_editor, tiny_model, given):
    editor = make_editor()
    with pytest.raises(
        StatisticsError, match=r"^statistics is a \w+; expected Statistics or their"
    ):
        Editor(editor.model, editor.tokenizer, recipe=editor.recipe, statistics=given)
    for wrong, said in ((given, "expected Statistics or their folder"), ("", "name is empty")):
        with pytest.raises(StatisticsError, match=said):
            editor.next_epoch(editor.recipe, statistics=wrong)


def test_a_fact_where_its_id_is_expected_is_said_so(make_editor, facts):
    editor = make_editor()
    editor.edit(facts[:2])
    for change in (editor.undo, editor.retry, editor.redo):
        with pytest.raises(
            LedgerError, match=r"^expected the ids of facts, as text \(found a Fact"
        ):
            change(facts[0])
