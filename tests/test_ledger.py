"""Living with edits: undo, redo, restore, epochs, rebuild, merge and trials."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.models import RECIPE, build_model, statistics_of

from nulledit import Editor, Fact
from nulledit.config import Recipe
from nulledit.editing.descent import Value
from nulledit.editing.merge import conflicts, newest
from nulledit.errors import ConfigError, FactError, LedgerError, NoRoomError, StatisticsError
from nulledit.ledger.solver import LayerSolver
from nulledit.ledger.store import Store
from nulledit.ledger.tensors import read_spectrum
from nulledit.ledger.update_solver import LayerPreconditioners

OTHERS = {
    "history": {"method": {"name": "memit-history", "moment_weight": 3.0}},
    "plain": {"method": {"name": "memit", "moment_weight": 5.0}},
    "tighter": {"null_space": {"rule": "leakage", "value": 0.1}},
    "elsewhere": {"layers": [0, 1]},
}
SUBJECTS = ["Ada Byron", "Karo Dun", "Velm", "Émile Zola", "the river"]
PROMPTS = ["I know that {} is", "Then {} said"]
TARGETS = ["English", "sailor", "London"]
ASKED = st.lists(
    st.tuples(st.sampled_from(SUBJECTS), st.sampled_from(PROMPTS)),
    min_size=1,
    max_size=3,
    unique=True,
)


def changed(recipe, changes):
    return Recipe.from_dict({**recipe.to_dict(), **changes})


def dense(preconditioner):
    block = preconditioner.blocks[0]
    U, g, r = block.vectors, block.gains, block.outer_gain
    eye = torch.eye(len(U), dtype=torch.float64)
    return r * eye + U @ torch.diag(g - r) @ U.mT


def slow_fold(history, layer):
    """W of the active columns: epoch after epoch, batch after batch, dense d_in × d_in matrices."""
    W = history.original(layer).double()
    past = []
    for epoch in history.epochs:
        if layer not in epoch.recipe.layers:
            continue
        recipe = epoch.recipe
        read = read_spectrum(history.tensors[epoch.tensors], layer)
        G = dense(LayerPreconditioners.of(recipe, *read).own)
        keeps = recipe.method.name != "memit"
        mine = [c for c in history.active if history.epoch_of(c) == epoch.id]
        for number in sorted({c.batch for c in mine}):
            batch = [c for c in mine if c.batch == number]
            K = history.column_tensor(batch, f"keys.{layer}").mT.double()
            V = history.column_tensor(batch, f"targets.{layer}").mT.double()
            held = [K, *(past if keeps else [])]
            A = torch.cat(held, dim=1)
            R = torch.cat([V - W @ K, *(torch.zeros(len(W), k.shape[1]) for k in held[1:])], dim=1)
            system = torch.eye(len(G), dtype=torch.float64) + A @ A.mT @ G
            W = W + R.double() @ A.mT @ G @ torch.linalg.inv(system)
            past = [*past, K]
    return W


def gap(editor, layer, expected):
    base = editor.history.original(layer).double()
    scale = max(float((expected - base).norm()), 1e-6 * float(base.norm()))
    return float((editor.weights.exact(layer) - expected).norm()) / scale


def weights(editor):
    return {k: v.clone() for k, v in editor.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def make_editor(tokenizer):
    def make(recipe=RECIPE, dtype=torch.float64, family="llama", **options):
        model = build_model(family, dtype=dtype)
        statistics = options.pop("statistics", None) or statistics_of(model, tokenizer)
        return Editor(model, tokenizer, recipe=recipe, statistics=statistics, **options)

    return make


# -- any sequence of changes -----------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """Edits, undos, redos, replacements, epochs, saving and loading, in any order."""

    tokenizer = None

    def __init__(self):
        super().__init__()
        model = build_model("llama")
        self.base = {k: v.clone() for k, v in model.state_dict().items()}
        self.statistics = statistics_of(model, self.tokenizer)
        self.editor = Editor(model, self.tokenizer, recipe=RECIPE, statistics=self.statistics)
        self.folder = tempfile.TemporaryDirectory()
        self.expected = {}  # question -> target, as a plain dictionary would have it

    def teardown(self):
        self.folder.cleanup()

    @initialize(asked=ASKED, answer=st.sampled_from(TARGETS))
    def begin(self, asked, answer):
        self.edit(asked, answer)

    @rule(asked=ASKED, answer=st.sampled_from(TARGETS))
    def edit(self, asked, answer):
        facts = [Fact(subject=s, prompt=p, target=answer) for s, p in asked]
        self.editor.edit(facts)
        self.expected |= {fact.key: answer for fact in facts}

    @rule(name=st.sampled_from(sorted(OTHERS)), asked=ASKED, answer=st.sampled_from(TARGETS))
    def edit_in_an_epoch(self, name, asked, answer):
        recipe = changed(RECIPE, OTHERS[name])
        if recipe != self.editor.recipe:
            self.editor.next_epoch(recipe, statistics=self.statistics)
        self.edit(asked, answer)

    @precondition(lambda self: self.editor.facts)
    @rule(data=st.data())
    def undo_and_redo(self, data):
        chosen = data.draw(st.sampled_from(self.editor.facts))
        before, state = weights(self.editor), self.editor.history.state_id
        self.editor.undo(chosen.id)
        assert chosen not in self.editor.facts
        if data.draw(st.booleans()):
            self.editor.redo()
            assert self.editor.history.state_id == state
            assert same(weights(self.editor), before)
        else:
            self.expected = {f.key: f.target for f in self.editor.facts}

    @precondition(lambda self: len(self.editor.facts) > 1)
    @rule()
    def undo_in_any_order(self):
        """Two undos, in one order and in the other."""
        a, b = self.editor.facts[0].id, self.editor.facts[-1].id
        ends, facts, rebuilt = [], [], 0
        for order in ((a, b), (b, a)):
            with self.editor.trial():
                for id_ in order:
                    if id_ in {f.id for f in self.editor.facts}:
                        rebuilt += len(self.editor.undo(id_).rebuilt)
                ends.append([self.editor.weights.exact(i) for i in self.editor.weights.layers])
                facts.append({f.key for f in self.editor.facts})
        assert facts[0] == facts[1]
        if not rebuilt:  # values that are optimised again depend on the weights at that time
            for x, y in zip(*ends, strict=True):
                assert float((x - y).norm()) <= 1e-10 * float(x.norm())

    @precondition(lambda self: self.editor.facts)
    @rule()
    def restore_and_redo(self):
        before = weights(self.editor)
        self.editor.restore()
        assert same(weights(self.editor), self.base)
        self.editor.redo()
        assert same(weights(self.editor), before)

    @precondition(lambda self: self.editor.history.epochs)
    @rule()
    def save_and_load(self):
        before, state = weights(self.editor), self.editor.history.state_id
        self.editor.save(self.folder.name)
        self.editor = Editor.load(self.folder.name)
        self.editor._session.statistics = self.statistics
        assert self.editor.history.state_id == state
        assert same(weights(self.editor), before)

    @invariant()
    def weights_are_the_slow_fold(self):
        for layer in self.editor.weights.layers:
            assert gap(self.editor, layer, slow_fold(self.editor.history, layer)) < 1e-8

    @invariant()
    def the_facts_are_those_of_a_dictionary(self):
        assert {f.key: f.target for f in self.editor.facts} == self.expected


def test_any_sequence_of_changes_is_the_slow_fold_of_what_is_left(tokenizer):
    Life.tokenizer = tokenizer
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=10,
            stateful_step_count=10,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


# -- what undo must not do -------------------------------------------------------------------


def answered(target, id="a", **more):
    return Fact(id=id, subject="Ada Byron", prompt="{} speaks", target=target, **more)


def test_an_answer_that_was_given_twice_is_undone_step_by_step(make_editor):
    editor = make_editor()
    states = [weights(editor)]
    for target in ("Latin", "Greek", "Latin", "Greek"):
        editor.edit([answered(target)])
        states.append(weights(editor))
    for expected in reversed(states[:-1]):
        report = editor.undo("a")
        assert same(weights(editor), expected)
        assert bool(editor.facts) == any("undo again" in n for n in report.notices)
    assert editor.facts == []


def test_an_answer_given_twice_beside_another_on_its_key(make_editor):
    editor = make_editor()
    mate = Fact(id="mate", subject="Ada Byron", prompt="{} is a", target="sailor")
    editor.edit([answered("Latin"), mate])
    editor.edit([answered("Greek")])
    editor.undo("mate")  # the answer alone, optimised again
    editor.edit([answered("Latin")])
    for left in ("Greek", "Latin"):
        editor.undo("a")
        assert [f.target for f in editor.facts] == [left]
    editor.undo("a")
    assert editor.facts == []


def test_undo_stays_in_its_epoch_though_another_is_due(make_editor, tokenizer, tmp_path):
    editor = make_editor()
    mate = Fact(id="mate", subject="Ada Byron", prompt="{} is a", target="sailor")
    editor.edit([answered("Latin"), mate])
    due = changed(RECIPE, OTHERS["elsewhere"] | OTHERS["plain"])
    editor.next_epoch(due, statistics=statistics_of(build_model("llama"), tokenizer))
    assert editor.undo("a").rebuilt == ("mate",)
    editor.rebuild()
    assert len(editor.history.epochs) == 1
    assert editor.recipe == due
    editor.save(tmp_path)
    assert same(weights(Editor.load(tmp_path)), weights(editor))
    editor.edit([answered("Greek", id="new")])
    assert [list(e.recipe.layers) for e in editor.history.epochs] == [[1, 2], [0, 1]]


@pytest.mark.parametrize("change", ["undo", "edit"])
def test_what_is_to_be_forgotten_is_never_written_by_gradient(make_editor, tokenizer, change):
    editor = make_editor()
    mate = Fact(id="mate", subject="Ada Byron", prompt="{} is a", target="sailor")
    editor.edit([answered("Latin", forget=True), mate])
    editor.next_epoch(
        changed(RECIPE, {"method": {"name": "ft"}}),
        statistics=statistics_of(build_model("llama"), tokenizer),
    )
    editor.edit([Fact(id="karo", subject="Karo Dun", prompt="{} works as a", target="sailor")])
    before = weights(editor)
    asked = "mate" if change == "undo" else [replace(mate, target="river")]
    with pytest.raises(FactError, match="a: to be forgotten"):
        getattr(editor, change)(asked)
    assert same(weights(editor), before)
    assert {f.id for f in editor.facts} == {"a", "mate", "karo"}
    editor.undo("a", "mate")
    assert {f.id for f in editor.facts} == {"karo"}


@pytest.mark.parametrize("change", ["undo", "redo", "restore"])
def test_what_cannot_be_solved_does_not_reach_the_ledger(
    make_editor, facts, tmp_path, monkeypatch, change
):
    editor = make_editor()
    editor.edit(facts)
    editor.attach(tmp_path)
    if change == "redo":
        editor.undo("ada")
    before, state, events = weights(editor), editor.history.state_id, len(editor.history.events)
    held = {c.id for c in editor.history.active}
    fold = LayerSolver.fold

    def fails(self, columns):
        if {c.id for c in columns} != held:
            raise NoRoomError("no room left")
        return fold(self, columns)

    monkeypatch.setattr(LayerSolver, "fold", fails)
    with pytest.raises(NoRoomError):
        getattr(editor, change)(*(["ada"] if change == "undo" else []))
    assert editor.history.state_id == state
    assert same(weights(editor), before)
    assert Store(tmp_path / "ledger").events() == events


# -- redo ------------------------------------------------------------------------------------


def test_redo_takes_undos_back_one_by_one_and_stops_at_an_edit(make_editor, facts):
    editor = make_editor()
    editor.edit(facts[:3])
    whole = weights(editor)
    editor.undo(facts[0].id)
    one = weights(editor)
    editor.undo(facts[1].id)
    report = editor.redo()
    assert report.restored == (facts[1].id,)
    assert same(weights(editor), one)
    editor.redo()
    assert same(weights(editor), whole)
    with pytest.raises(LedgerError, match="nothing to redo"):
        editor.redo()
    editor.undo(facts[0].id)
    editor.edit(facts[3:])
    with pytest.raises(LedgerError, match="last change is no undo"):
        editor.redo()
    editor.redo(facts[0].id)
    assert {f.id for f in editor.facts} == {f.id for f in facts}
    with pytest.raises(LedgerError, match="is in the model"):
        editor.redo(facts[0].id)
    with pytest.raises(LedgerError, match="no fact 'nobody'"):
        editor.redo("nobody")


def test_redo_of_a_named_fact_brings_its_shared_value_back(make_editor):
    together = [
        Fact(id="a", subject="Velm", prompt="{} lies on the", target="river"),
        Fact(id="b", subject="Velm", prompt="{} speaks", target="English"),
    ]
    editor = make_editor()
    editor.edit(together)
    before = weights(editor)
    assert editor.undo("a").rebuilt == ("b",)
    report = editor.redo("a")
    assert set(report.restored) == {"a", "b"}
    assert report.rebuilt == ()
    assert same(weights(editor), before)


def test_redo_of_an_answer_takes_the_other_answer_out(make_editor, facts):
    editor = make_editor()
    first = facts[0]
    second = replace(first, id="again", target="sailor")
    editor.edit([first])
    before = weights(editor)
    editor.edit([second])
    editor.undo("again")
    assert [f.id for f in editor.facts] == [first.id]
    assert same(weights(editor), before)
    editor.redo("again")
    assert [f.id for f in editor.facts] == ["again"]
    editor.redo(first.id)
    assert same(weights(editor), before)


# -- epochs ----------------------------------------------------------------------------------


def test_an_epoch_of_the_same_recipe_changes_nothing(make_editor, facts):
    straight, cut = make_editor(), make_editor()
    for editor in (straight, cut):
        editor.edit(facts[:2])
        if editor is cut:
            editor.next_epoch(RECIPE, statistics=statistics_of(build_model("llama"), cut.tokenizer))
        editor.edit(facts[2:])
    assert len(cut.history.epochs) == 2
    for undone in ((), (facts[0].id,), (facts[3].id,)):
        for editor in (straight, cut):
            if undone:
                editor.undo(*undone)
        for layer in straight.weights.layers:
            assert gap(cut, layer, straight.weights.exact(layer)) < 1e-10


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_undo_across_epochs_and_after_loading(make_editor, tokenizer, facts, tmp_path, name):
    statistics = statistics_of(build_model("llama"), tokenizer)
    editor = make_editor(statistics=statistics)
    base = weights(editor)
    editor.edit(facts[:2])
    before = weights(editor)
    editor.next_epoch(changed(RECIPE, OTHERS[name]), statistics=statistics)
    editor.edit(facts[2:])
    editor.save(tmp_path / "run")
    loaded = Editor.load(tmp_path / "run")
    assert loaded.recipe == editor.recipe
    assert same(weights(loaded), weights(editor))
    loaded.undo(facts[0].id)
    for layer in loaded.weights.layers:
        assert gap(loaded, layer, slow_fold(loaded.history, layer)) < 1e-8
    loaded.redo()
    loaded.undo(facts[2].id, facts[3].id)
    assert same(weights(loaded), before)
    loaded.undo(facts[0].id, facts[1].id)
    assert same(weights(loaded), base)


def test_an_epoch_whose_first_batch_fails_was_never_there(
    make_editor, tokenizer, facts, monkeypatch
):
    statistics = statistics_of(build_model("llama"), tokenizer)
    editor = make_editor(statistics=statistics)
    editor.edit(facts[:2])
    before, state = weights(editor), editor.history.state_id
    editor.next_epoch(changed(RECIPE, OTHERS["elsewhere"]), statistics=statistics)
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise RuntimeError("on the way")

        patch.setattr("nulledit.editing.batch_values.optimise_values", fail)
        with pytest.raises(RuntimeError):
            editor.edit(facts[2:])
    assert same(weights(editor), before)
    assert editor.history.state_id == state
    assert len(editor.history.epochs) == 1
    editor.edit(facts[2:])
    assert len(editor.history.epochs) == 2


def test_statistics_of_the_edited_model_serve_a_new_epoch_only(make_editor, tokenizer, facts):
    editor = make_editor()
    editor.edit(facts[:2])
    refreshed = statistics_of(editor.model, tokenizer)
    editor.next_epoch(RECIPE, statistics=refreshed)
    editor.edit(facts[2:])
    assert [e.statistics["model_hash"] for e in editor.history.epochs] == [
        editor.history.base.hash,
        refreshed.manifest.model_hash,
    ]


@pytest.mark.parametrize("method", ["alphaedit", "gated"])
def test_a_new_epoch_takes_the_statistics_of_the_run(method, make_editor, tokenizer, facts):
    """Where they have the kind and the layers."""
    recipe = RECIPE.with_fields({"method.name": method})
    shown = statistics_of(build_model("llama"), tokenizer, inputs=method == "gated")
    editor = make_editor(recipe, statistics=shown)
    editor.edit(facts[:2])
    editor.next_epoch(recipe.with_fields({"values.steps": 2}), statistics=None)
    editor.edit(facts[2:])
    first, then = editor.history.epochs
    assert first.statistics == then.statistics
    tensors = [editor.history.tensors[epoch.tensors] for epoch in (first, then)]
    (one, low), (other, cut) = (read_spectrum(of, first.layers[-1]) for of in tensors)
    torch.testing.assert_close(one.eigenvalues, other.eigenvalues)
    assert low == cut


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"layers": [0, 1]}, "preserved keys"), ({"method.name": "gated"}, "MLP inputs")],
)
def test_statistics_of_a_run_serve_no_other_layers_and_no_other_kind(
    fields, said, make_editor, facts
):
    editor = make_editor()
    editor.edit(facts[:2])
    editor.next_epoch(RECIPE.with_fields(fields), statistics=None)
    with pytest.raises(StatisticsError, match=f"no statistics of this model's {said}"):
        editor.check_statistics()


# -- rebuild and merge -----------------------------------------------------------------------


def fresh_run(make_editor, batches, values, monkeypatch, recipe=RECIPE):
    """The batches on a new model, with the values given."""

    def given(_model, facts, _groups, **_):
        return [values[fact.key] for fact in facts]

    editor = make_editor(recipe)
    with monkeypatch.context() as patch:
        patch.setattr("nulledit.editing.batch_values.optimise_values", given)
        for batch in batches:
            editor.edit(batch)
    return editor


def values_of(*histories):
    return {
        c.fact.key: Value(z, c.outcome)
        for h in histories
        for c in h.active
        for z in h.column_tensor([c], "z")
    }


@pytest.mark.parametrize("name", ["alphaedit", "memit", "rome"])
def test_rebuild_is_a_fresh_run_with_the_same_values(make_editor, facts, monkeypatch, name):
    recipe = changed(RECIPE, {"method": {"name": name}})
    editor = make_editor(recipe)
    editor.edit(facts[:2])
    editor.edit(facts[2:])
    editor.undo(facts[0].id)
    values, left = values_of(editor.history), weights(editor)
    report = editor.rebuild()
    assert set(report.rebuilt) == {f.id for f in facts[1:]}
    assert not same(weights(editor), left), "the undone fact had left its trace in later keys"
    fresh = fresh_run(make_editor, [[facts[1]], facts[2:]], values, monkeypatch, recipe)
    for layer in fresh.weights.layers:
        assert gap(editor, layer, fresh.weights.exact(layer)) < 1e-8
    assert [e.kind for e in editor.history.events] == ["edit"] * (4 if name == "rome" else 2) + [
        "undo",
        "rebuild",
    ]


def test_rebuild_with_values_is_a_fresh_run(make_editor, facts):
    editor, fresh = make_editor(), make_editor()
    editor.edit(facts[:2])
    editor.edit(facts[2:])
    editor.undo(facts[0].id)
    editor.rebuild(values=True)
    fresh.edit(facts[1:2])
    fresh.edit(facts[2:])
    for layer in fresh.weights.layers:
        assert gap(editor, layer, fresh.weights.exact(layer)) < 1e-8


def test_rebuild_over_epochs_is_a_fresh_run_over_epochs(make_editor, tokenizer, facts, tmp_path):
    statistics = statistics_of(build_model("llama"), tokenizer)
    editor, fresh = (make_editor(statistics=statistics) for _ in range(2))
    for chosen, first in ((editor, facts[:2]), (fresh, facts[1:2])):
        chosen.edit(first)
        chosen.next_epoch(changed(RECIPE, OTHERS["elsewhere"]), statistics=statistics)
        chosen.edit(facts[2:])
    editor.undo(facts[0].id)
    editor.rebuild(values=True)
    for layer in fresh.weights.layers:
        assert gap(editor, layer, fresh.weights.exact(layer)) < 1e-8
        assert gap(editor, layer, slow_fold(editor.history, layer)) < 1e-8
    editor.save(tmp_path / "run")
    assert same(weights(Editor.load(tmp_path / "run")), weights(editor))
    editor.undo(facts[1].id)
    for layer in fresh.weights.layers:
        assert gap(editor, layer, slow_fold(editor.history, layer)) < 1e-8


def test_merged_ledgers_are_a_fresh_run_of_both(make_editor, facts, monkeypatch):
    first, second = make_editor(), make_editor()
    first.edit(facts[:2])
    second.edit(facts[2:])
    second.undo(facts[3].id)
    values = values_of(first.history, second.history)
    first.merge(second.history)
    fresh = fresh_run(make_editor, [facts[:2], facts[2:3]], values, monkeypatch)
    for layer in fresh.weights.layers:
        assert gap(first, layer, fresh.weights.exact(layer)) < 1e-8
    assert [e.kind for e in first.history.events] == ["edit", "merge"]


def test_conflicts_are_listed_and_decided(make_editor, facts):
    first, second = make_editor(), make_editor()
    mine, theirs = facts[0], replace(facts[0], id="theirs", target="sailor")
    other = replace(facts[1], id=facts[2].id)  # another question under an id that is taken
    first.edit([mine, facts[2]])
    second.edit([theirs, other, facts[3]])
    found = conflicts(first.history, second.history)
    assert [(c.first, c.second) for c in found] == [(mine, theirs)]
    before, state = weights(first), first.history.state_id
    with pytest.raises(LedgerError, match=r"1 conflict.* not decided.*Velmish.*sailor"):
        first.merge(second.history)
    with pytest.raises(ConfigError, match="expected first, second, neither"):
        first.merge(second.history, decide={"theirs": "both"})
    assert same(weights(first), before)
    assert first.history.state_id == state
    assert newest(first.history, second.history)(found[0]) in ("first", "second")
    for choice, there in (("first", "ada"), ("second", "theirs"), ("neither", None)):
        with first.trial():
            report = first.merge(second.history, decide={"theirs": choice})
            names = {f.id for f in first.facts}
            assert names == {"velm", "velm-2", "karo"} | ({there} if there else set())
            assert any("named velm-2" in notice for notice in report.notices)
    assert same(weights(first), before)


def test_merging_facts_on_one_key_makes_them_one_group(make_editor):
    first, second = make_editor(), make_editor()
    first.edit([Fact(id="a", subject="Velm", prompt="{} lies on the", target="river")])
    second.edit([Fact(id="b", subject="Velm", prompt="{} speaks", target="English")])
    report = first.merge(second.history)
    assert any("on the same key" in notice for notice in report.notices)
    a, b = first.history.active
    assert (a.batch, a.group) == (b.batch, b.group)


def test_only_edits_of_one_model_can_be_merged(make_editor, facts):
    first, second = make_editor(), make_editor(family="gpt2")
    first.edit(facts[:1])
    second.edit(facts[1:2])
    with pytest.raises(LedgerError, match="different bases"):
        first.merge(second.history)


# -- trials ----------------------------------------------------------------------------------


def test_a_trial_leaves_no_trace_unless_it_is_kept(make_editor, facts, tmp_path):
    editor = make_editor(dtype=torch.float32)
    editor.edit(facts[:2])
    editor.save(tmp_path / "run")
    before, files = weights(editor), content(tmp_path)
    with editor.trial():
        editor.edit(facts[2:])
        editor.undo(facts[0].id)
        assert not same(weights(editor), before)
    assert same(weights(editor), before)
    assert content(tmp_path) == files
    with editor.trial() as trial:
        editor.edit(facts[2:], batch_size=1)
        assert content(tmp_path) == files
        trial.keep()
    assert len(editor.history.events) == 3
    assert Store(tmp_path / "run" / "ledger").load().state_id == editor.history.state_id


def test_a_trial_that_an_error_ends_leaves_no_other_recipe(make_editor, facts, tmp_path):
    """Though nothing reached the history, which then equals what is stored."""
    editor = make_editor()
    editor.edit(facts[:1])
    editor.save(tmp_path / "run")
    before = editor.recipe

    def stopped():
        with editor.trial():
            editor.next_epoch(changed(before, {"batch_size": 7}))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert editor.recipe == before


def test_a_trial_of_the_first_edit_leaves_the_base(make_editor, facts):
    editor = make_editor()
    before = weights(editor)
    with editor.trial():
        editor.edit(facts)
    assert same(weights(editor), before)
    assert editor.history.counts == (0, 0, 0, 0)
    editor.edit(facts)
    other = make_editor()
    other.edit(facts)
    assert same(weights(editor), weights(other))


def test_a_commit_that_fails_takes_all_of_it_back(make_editor, facts, tmp_path, monkeypatch):
    editor = make_editor()
    editor.edit(facts)
    editor.undo(facts[0].id)
    editor.save(tmp_path / "run")
    before, files = weights(editor), content(tmp_path)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(Store, "commit", full)
        for change in (editor.rebuild, editor.redo, editor.restore):
            with pytest.raises(OSError, match="No space left"):
                change()
            assert same(weights(editor), before)
            assert content(tmp_path) == files
    editor.rebuild()
    assert Store(tmp_path / "run" / "ledger").load().state_id == editor.history.state_id


def content(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()
    }


@pytest.mark.parametrize(
    ("method", "projection"),
    [("alphaedit", "own"), ("memit-history", "none"), ("memit", "after"), ("soft", "inside")],
)
def test_leakage_is_the_dense_trace(make_editor, tokenizer, facts, method, projection):
    recipe = changed(RECIPE, {"method": {"name": method, "projection": projection}})
    statistics = statistics_of(build_model("llama"), tokenizer)
    editor = make_editor(recipe, statistics=statistics)
    editor.edit(facts[:1])
    layer = editor.weights.layers[0]
    spectrum = statistics.spectra[layer]
    _, threshold = read_spectrum(editor.history.tensors[editor.history.epoch.tensors], layer)
    found = LayerPreconditioners.of(recipe, spectrum, threshold)
    Q = spectrum.whole().eigenvectors.double()
    C, G = Q @ torch.diag(spectrum.eigenvalues) @ Q.mT, dense(found.own)
    written = dense(found.projector) @ G if projection == "after" else G
    top = torch.linalg.eigvalsh((written + written.mT) / 2).max()
    expected = float(torch.trace(written @ C) / (top * torch.trace(C)))
    assert 0 < expected < 1
    assert editor.weights.leakage(layer) == pytest.approx(expected, abs=1e-9)


def test_statistics_of_a_run_in_another_format_are_passed_over(make_editor, facts):
    editor = make_editor()
    editor.edit(facts[:2])
    editor.history.epoch.statistics["format"] = 0
    editor.next_epoch(RECIPE.with_fields({"values.steps": 2}), statistics=None)
    with pytest.raises(StatisticsError, match="no statistics of this model's preserved keys"):
        editor.edit(facts[2:])
