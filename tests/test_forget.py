"""Forgetting: values against a slow and plain form, and what a model then says."""

import dataclasses
import json
import math
import re

import pytest
import reference
import torch
from click.testing import CliRunner
from support import world
from support.editors import LASTING
from support.models import statistics_of

from nulledit import Editor, Fact, Probe
from nulledit.cli.forget import forget
from nulledit.config import ValueSettings
from nulledit.data.facts import refuse_forgetting
from nulledit.editing import unlearning as ignorance
from nulledit.editing.chunks import chunks_of
from nulledit.editing.value_cache import ValueCache
from nulledit.editing.values import optimise_values
from nulledit.errors import ConfigError, FactError
from nulledit.evaluation.forgetting import Recall, Said, doubts, find_answer, recall_of, summary
from nulledit.evaluation.queries import queries_of
from nulledit.evaluation.scores import rates, score
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen
from nulledit.models.tokens import RowEncoder

CONTEXTS = ["{}", "Then, he said. {}", "The river. {}"]
SETTINGS = ValueSettings(
    steps=8, learning_rate=0.3, weight_decay=0.05, stop_loss=0.0, stop_margin=None
)
LAYER = 2


def ours(model, tokenizer, facts, *, groups=None, settings=SETTINGS, positions=400):
    with frozen(model):
        return optimise_values(
            EditableModel(model, tokenizer),
            facts,
            groups or list(range(len(facts))),
            layers=[LAYER],
            contexts=CONTEXTS,
            settings=settings,
            positions=positions,
        )


def distance(a, b):
    return float((a - b).norm() / b.norm())


# -- the fact ------------------------------------------------------------------------------------


def test_a_fact_to_forget_is_another_fact_with_the_same_question():
    plain = Fact("France", "The capital of {} is", "Paris", relation="capital")
    gone = plain.forgotten()
    assert gone.forget
    assert gone.key == plain.key
    assert gone.demand != plain.demand
    assert gone.id != plain.id
    assert "forget" not in plain.to_dict(), "records of other facts stay as they were"
    assert Fact.from_dict(gone.to_dict()) == gone
    assert gone.forgotten() == gone
    assert plain.forgotten("Lyon").target == "Lyon"
    assert dataclasses.replace(plain, id="mine").forgotten().id == "mine"
    assert Fact.from_dict({**plain.to_dict(), "forget": "true"}).forget, "as a CSV file has it"


def test_what_is_no_truth_value_is_refused():
    with pytest.raises(FactError, match="forget must be true or false"):
        Fact.from_dict({"subject": "a", "prompt": "{} is", "target": "b", "forget": "perhaps"})


def test_the_answer_so_far_may_be_the_one_to_forget():
    Fact("France", "The capital of {} is", "Paris", old_answer="Paris", forget=True)
    with pytest.raises(FactError, match="same as old_answer"):
        Fact("France", "The capital of {} is", "Paris", old_answer="Paris")


def test_methods_without_values_refuse(facts):
    refuse_forgetting(facts, "ft")
    with pytest.raises(FactError, match="'ada' is to be forgotten, which ft can't do"):
        refuse_forgetting([facts[1], facts[0].forgotten()], "ft")


def test_the_cache_tells_it_from_the_plain_fact(facts, tmp_path):
    settings = {"layers": [1], "contexts": CONTEXTS, "settings": SETTINGS}
    cache = ValueCache(tmp_path)
    named = {cache.name("w", [fact], **settings) for fact in (facts[0], facts[0].forgotten())}
    assert len(named) == 2


def test_its_answer_is_not_cut_into_chunks(facts, tokenizer):
    encoder = RowEncoder(tokenizer, max_length=128)
    long = facts[3]
    assert len(chunks_of(long, encoder, 2)) > 1
    assert chunks_of(long.forgotten(), encoder, 2) == (long.forgotten(),)


# -- its value -----------------------------------------------------------------------------------


def slow_teacher(model, tokenizer, template, fact, place):
    """The mean of a few runs whose subject is noise; what the answer's token is has chance 0."""
    text = reference.fill(template, fact.subject)
    start = template.index("{}")
    span = (start, start + len(fact.subject))
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    subject = [i for i, (a, b) in enumerate(offsets) if a < span[1] and b > span[0]]
    answer = tokenizer(" " + fact.target)["input_ids"]
    ids = torch.tensor([[*tokenizer(text)["input_ids"], *answer[:place]]])
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(ignorance.DRAWS, len(subject), model.config.hidden_size, generator=draws)
    found = []
    for draw in noise:

        def drown(_, args, kwargs, draw=draw):
            states = (args[0] if args else kwargs["hidden_states"]).clone()
            states[0, subject] += ignorance.NOISE * states.float().std() * draw
            return (
                ((states, *args[1:]), kwargs)
                if args
                else (args, kwargs | {"hidden_states": states})
            )

        handle = reference.block(model, 0).register_forward_pre_hook(drown, with_kwargs=True)
        with torch.no_grad():
            found.append(model(ids, use_cache=False).logits[0].softmax(-1))
        handle.remove()
    told = torch.stack(found).mean(0)[-1 - place :]
    told[-1, answer[place]] = 0
    return told / told.sum(-1, keepdim=True), ids, subject[-1]


def slow_value(model, tokenizer, fact, place, settings=SETTINGS):
    """z as in `reference.compute_z`, but towards the uninformed model, up to token `place`."""
    lessons = [
        slow_teacher(model, tokenizer, reference.fill(context, fact.prompt), fact, place)
        for context in CONTEXTS
    ]
    drift, _, (at,) = reference.locate(tokenizer, ["{} is a"], fact.subject, model.device)
    rows = [*((ids, last) for _, ids, last in lessons), (drift, at)]
    block = reference.block(model, LAYER)
    initial = reference.read(model, rows[0][0], torch.ones_like(rows[0][0]), block, inputs=False)
    initial = initial[0, rows[0][1]]
    delta = torch.zeros_like(initial, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.learning_rate)

    def log_probs(ids, last):
        def add(_, __, output):
            changed = reference.hidden(output).clone()
            changed[0, last] += delta
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = block.register_forward_hook(add)
        logits = model(ids, use_cache=False).logits[0]
        handle.remove()
        return logits.log_softmax(-1)

    before = None
    banned = tokenizer(" " + fact.target)["input_ids"][place]
    for step in range(settings.steps):
        kl = 0.0
        for (told, _, _), (ids, last) in zip(lessons, rows, strict=False):
            said = log_probs(ids, last)[-1 - place :]
            far = (torch.xlogy(told, told) - told * said).sum(-1)
            far[-1] += (said[-1, banned] - math.log(ignorance.CHANCE)).clamp(min=0)
            kl = kl + far.mean() / len(lessons)
        now = log_probs(*rows[-1])[at]
        before = now.detach() if before is None else before
        meaning = (now.exp() * (now - before)).sum()
        decay = settings.weight_decay * delta.norm() / initial.norm() ** 2
        loss = kl + settings.kl_weight * meaning + decay
        if step == settings.steps - 1:
            break
        (delta.grad,) = torch.autograd.grad(loss, delta)
        optimiser.step()
        with torch.no_grad():
            delta.mul_((settings.clamp * initial.norm() / delta.norm()).clamp(max=1))
    return initial + delta.detach(), float(loss.detach())


def test_the_value_equals_a_slow_one(family, tiny_model, tokenizer, facts):
    model = tiny_model(family)
    asked = EditableModel(model, tokenizer)
    for fact in (facts[0].forgotten(), facts[3].forgotten()):
        place = ignorance.telling(asked, *ignorance.blinded(asked.encoder, fact, fact.prompt))
        (value,) = ours(model, tokenizer, [fact])
        z, loss = slow_value(model, tokenizer, fact, place)
        assert distance(value.z, z) < 1e-5
        assert value.outcome.loss == pytest.approx(loss, rel=1e-5)


def test_the_telling_token_is_the_one_that_knowledge_brings(tiny_model, tokenizer, facts):
    """Against each token's chance with and without the subject, read off whole runs."""
    model, fact = EditableModel(tiny_model("llama"), tokenizer), facts[3].forgotten()
    answer = tokenizer(" " + fact.target)["input_ids"]
    assert len(answer) > 3
    ids = tokenizer(fact.render(fact.prompt) + " " + fact.target, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        knows = model.model(ids).logits[0].softmax(-1)[-1 - len(answer) : -1]
    row, hidden = ignorance.blinded(model.encoder, fact, fact.prompt)
    gains = []
    for place, token in enumerate(answer):
        cut = dataclasses.replace(row, ids=row.ids[: row.target_start + place + 1])
        blind = ignorance.uninformed(model, cut, hidden)[-1]
        gains.append(float(knows[place, token] / blind[token]))
    assert ignorance.telling(model, row, hidden) == gains.index(max(gains))


def test_chances_of_nothing_are_no_nan(tiny_model, tokenizer, facts, monkeypatch):
    """Softmax in float32 gives 0 some 100 nats down."""
    model, fact = EditableModel(tiny_model("llama"), tokenizer), facts[3].forgotten()
    row, hidden = ignorance.blinded(model.encoder, fact, fact.prompt)
    size = len(row.target_ids)

    def chances(_, row, where):
        told = torch.full((len(row.target_ids), 500), 1e-3)
        told[0, row.target_ids[0]] = 0.0  # impossible with and without the subject
        told[2, row.target_ids[2]] *= 1 if where else 2  # by knowing it
        return told

    monkeypatch.setattr(ignorance, "uninformed", chances)
    assert size > 3
    assert ignorance.telling(model, row, hidden) == 2

    def certain(_, row, __):
        return torch.eye(500)[list(row.target_ids)]

    monkeypatch.setattr(ignorance, "uninformed", certain)
    told = ignorance.ForgetTarget(row, hidden).teacher(model)
    assert told.isfinite().all()
    assert told[:-1].sum(1).tolist() == [1.0] * (size - 1)
    assert told[-1].sum() == 0


def test_a_broken_model_has_forgotten_nothing(tiny_model, tokenizer, facts):
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(math.nan)
    queries = queries_of(facts[0].forgotten())[:1]
    (found,) = score(EditableModel(model, tokenizer), queries)
    assert (found.strict, found.tokens) == (False, 0.0)


def test_a_teacher_that_is_certain_is_a_target(tiny_model, tokenizer, facts, monkeypatch):
    """Hard targets are a special case of soft ones: one loss, one descent."""

    def certain(lesson, model):
        told = torch.zeros(len(lesson.row.target_ids), model.model.config.vocab_size)
        told[range(len(told)), lesson.row.target_ids] = 1.0
        return told

    monkeypatch.setattr(ignorance.ForgetTarget, "teacher", certain)
    monkeypatch.setattr(
        ignorance.ForgetTarget, "banned", property(lambda x: (-1,) * len(x.row.target_ids))
    )
    monkeypatch.setattr(ignorance, "telling", lambda *_: 99)
    model = tiny_model("llama")
    hard = ours(model, tokenizer, facts)
    soft = ours(model, tokenizer, [fact.forgotten() for fact in facts])
    for a, b in zip(soft, hard, strict=True):
        assert distance(a.z, b.z) < 1e-12
        assert a.outcome.loss == pytest.approx(b.outcome.loss)


def test_it_does_not_depend_on_what_runs_beside_it(family, tiny_model, tokenizer, facts):
    model = tiny_model(family)
    mixed = [facts[0], facts[1].forgotten(), facts[2], facts[3].forgotten()]
    together = ours(model, tokenizer, mixed, positions=10_000)
    for fact, value in zip(mixed, together, strict=True):
        (alone,) = ours(model, tokenizer, [fact], positions=1)
        assert distance(value.z, alone.z) < 1e-6
        assert value.outcome.steps == alone.outcome.steps


def test_it_has_not_converged_while_the_answer_is_the_likeliest(worlds):
    model, words = worlds("llama")
    fact = Fact("Karo Dun", "{} works as a", world.answer("Karo Dun", "job"))
    near = dataclasses.replace(SETTINGS, stop_loss=1e9, steps=60)
    with frozen(model):
        plain, gone = (
            optimise_values(
                EditableModel(model, words),
                [asked],
                [0],
                layers=[1],
                contexts=("{}", "then he said . {}"),
                settings=near,
                positions=400,
            )[0]
            for asked in (fact, fact.forgotten())
        )
    assert plain.outcome.steps == 0
    assert gone.outcome.steps > 0
    assert plain.outcome.known
    assert not gone.outcome.known


# -- what is then said ---------------------------------------------------------------------------

PERSON = "Mira Ostrel"


@pytest.fixture
def editor(worlds):
    """An editor of the small world, with statistics of everyone but the one to forget."""
    trained, words = worlds("llama")
    model = type(trained)(trained.config).eval()
    model.load_state_dict(trained.state_dict())
    lines = [s for s in world.sentences() if PERSON not in s]
    statistics = statistics_of(model, words, layers=LASTING.layers, lines=lines)
    return Editor(model, words, recipe=LASTING, statistics=statistics)


def known(relation, **more):
    """What the world says of the person, as a fact with its other wording and two neighbours."""
    fact = world.fact(PERSON, relation, world.another(PERSON, relation), **more)
    return fact.forgotten(fact.old_answer)


def test_the_answer_is_gone_and_the_neighbours_stay(editor):
    fact = known("tongue")
    before = recall_of(editor.editable, [fact], tokens=3)
    editor.edit([fact])
    (after,) = recall_of(editor.editable, [fact], tokens=3)
    assert before[0].own.leaks
    assert before[0].own.chance > world.MARGIN
    assert not after.own.leaks
    assert after.own.chance < before[0].own.chance / 2
    others = [s for s in score(editor.editable, queries_of(fact))]
    assert all(s.strict for s in others if s.query.kind == "specificity")


def test_it_replaces_an_edit_and_is_replaced_by_one(editor):
    gone = known("home")
    edited = world.fact(PERSON, "home", world.another(PERSON, "home"))
    for fact, said in ((edited, True), (gone, False), (edited, True)):
        editor.edit([fact])
        assert [f.demand for f in editor.facts] == [fact.demand]
        (told,) = recall_of(editor.editable, [fact.forgotten()], tokens=2)
        assert told.own.leaks == said


def test_one_value_forgets_and_says(editor):
    """Both questions begin with the subject: one key, one δ, one sum of losses."""
    pair = [known("tongue"), world.fact(PERSON, "job", world.another(PERSON, "job"))]
    editor.edit(pair)
    assert len({c.group for c in editor.history.active}) == 1
    gone, said = recall_of(editor.editable, [pair[0], pair[1].forgotten()], tokens=2)
    assert not gone.own.leaks
    assert said.own.leaks


def test_the_answer_that_is_not_named_is_the_edits_or_the_bases(editor):
    edited = world.fact(PERSON, "home", world.another(PERSON, "home"))
    editor.edit([edited])
    home, job = known("home"), known("job")
    asked = [{"subject": f.subject, "prompt": f.prompt} for f in (home, job)]
    editor.forget([asked[0], {**asked[1], "id": "job", "target": None}])
    assert {f.id: f.target for f in editor.facts} == {edited.id: edited.target, "job": job.target}
    assert all(f.forget for f in editor.facts)
    editor.restore()
    editor.forget(asked[1])
    assert [f.target for f in editor.facts] == [job.target]
    with pytest.raises(FactError, match="subject is missing"):
        editor.forget({"prompt": "{} is"})


def test_undo_brings_the_answer_back(editor):
    fact = known("job")
    base = recall_of(editor.editable, [fact], tokens=3)
    editor.edit([fact])
    editor.undo(fact.id)
    assert recall_of(editor.editable, [fact], tokens=3) == base


def test_a_leak_is_the_answer_anywhere_in_the_text(editor):
    """Texts of one word after another: the count goes by what stands in them."""
    fact = known("tongue")
    (told,) = recall_of(editor.editable, [fact], tokens=4)
    ids = editor.tokenizer(told.own.prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        chance = editor.model(ids).logits[0, -1].softmax(-1)
    (first,) = editor.tokenizer(fact.target)["input_ids"]
    assert told.own.chance == pytest.approx(float(chance[first]), rel=1e-5)
    assert told.answer in told.own.says.split()
    other = dataclasses.replace(fact, target="river")
    (absent,) = recall_of(editor.editable, [other], tokens=4)
    assert not absent.own.leaks
    both = summary([told, absent])
    assert both["leaks"]["mean"] == 0.5
    assert both["leaks"]["n"] == 2
    assert both["chance"]["mean"] == pytest.approx((told.own.chance + absent.own.chance) / 2)
    assert summary([dataclasses.replace(told, paraphrases=())])["leaks_in_paraphrases"] is None


def test_the_subjects_own_name_is_no_leak(editor, monkeypatch):
    fact = Fact("Dutch Velm", "{} speaks", "Dutch", forget=True)
    for text, leaks in (("for Dutch Velm .", False), ("Dutch , says Dutch Velm", True)):
        told = lambda *_, text=text, **__: [text]  # noqa: E731
        monkeypatch.setattr("nulledit.evaluation.forgetting.generate_answers", told)
        assert recall_of(editor.editable, [fact])[0].own.leaks == leaks


def test_an_answer_that_holds_the_subject_leaks(editor, monkeypatch):
    """The capital of Mexico is Mexico City: without the subject's name nothing was left of it."""
    told = lambda *_, **__: ["Velm river , says Velm"]  # noqa: E731
    monkeypatch.setattr("nulledit.evaluation.forgetting.generate_answers", told)
    for target, leaks in (("Velm river", True), ("Velm winter", False)):
        fact = Fact("Velm", "the harbour of {} is", target, forget=True)
        assert recall_of(editor.editable, [fact])[0].own.leaks == leaks


def test_a_forgotten_answer_is_not_called_said(editor):
    """The value's start is without the edits that are made anew: there it was not said."""
    fact = dataclasses.replace(known("tongue"), id="no", target="river")
    report = editor.edit([fact])
    assert report.notices == (
        "no: the model did not say the answer that is to be forgotten; it is suppressed all the "
        "same",
    )
    report = editor.edit([dataclasses.replace(fact, target=world.another(PERSON, "tongue"))])
    assert "forgotten once the edits that are made anew were taken out" in report.notices[-1]


def test_the_answer_is_found(editor):
    assert find_answer(editor.editable, PERSON, "{} speaks") == world.answer(PERSON, "tongue")


def test_rates_count_what_is_no_longer_said(editor):
    """Efficacy asks whether a target is said: facts to forget have rates of their own."""
    fact = dataclasses.replace(known("tongue"), portability=(Probe("x", "y"),))
    told = {f.id: queries_of(f) for f in (fact, world.fact(PERSON, "job", "baker"))}
    kinds = {query.kind for query in told[fact.id]}
    assert kinds == {"forgotten", "forgotten_paraphrases", "specificity"}
    found = rates(score(editor.editable, told[fact.id]))
    assert found["forgotten_strict"].mean == 0
    assert found["efficacy_strict"] is None
    editor.edit([fact])
    found = rates(score(editor.editable, told[fact.id]))
    assert found["forgotten_strict"].mean == 1
    assert found["forgotten_tokens"].mean == 1
    assert found["specificity_strict"].mean == 1


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def run(editor, tmp_path):
    editor.edit([world.fact("Karo Dun", "job", world.another("Karo Dun", "job"))])
    editor.save(tmp_path / "run")
    return tmp_path / "run"


def command(*words):
    return CliRunner().invoke(forget, [str(word) for word in words])


def test_one_fact_by_its_words(run):
    asked = ("--subject", PERSON, "--prompt", f"{PERSON} speaks", "--tokens", "3", "--quiet")
    done = command(run, *asked)
    assert done.exit_code == 0, done.exception
    answer = world.answer(PERSON, "tongue")
    (line,) = [x for x in done.stdout.splitlines() if x.startswith(f"{PERSON} speaks")]
    assert answer in line
    assert line.split()[-2:] == ["no", "absent"]
    assert "p(telling token)" in done.stdout
    assert "nan" not in done.stdout
    editor = Editor.load(run)
    assert (answer, True) in [fact.demand for fact in editor.facts]
    (told,) = recall_of(editor.editable, [f for f in editor.facts if f.forget], tokens=3)
    assert not told.own.leaks, "the model in the folder has forgotten"


def test_the_facts_of_a_file(run, tmp_path):
    """Of someone whose answer the run's edit has left alone."""
    people = [PERSON, *world.PEOPLE[1:]]
    asked = [world.fact(p, "home", world.another(p, "home")) for p in dict.fromkeys(people)]
    said = recall_of(
        Editor.load(run).editable, [f.forgotten(f.old_answer) for f in asked], tokens=3
    )
    fact = next(f for f, told in zip(asked, said, strict=True) if told.own.leaks)
    (tmp_path / "facts.json").write_text(json.dumps([fact.to_dict()]))
    done = command(run, tmp_path / "facts.json", "--old-answers", "--tokens", "3", "--json")
    assert done.exit_code == 0, done.exception
    told = json.loads(done.stdout)
    assert told["before"]["summary"]["leaks"]["mean"] == 1
    assert told["after"]["summary"]["leaks"]["mean"] == 0
    assert told["after"]["facts"][0]["answer"] == fact.old_answer


def test_the_question_of_an_edit_is_known_by_its_words(run):
    """The edit names a relation, which the command line can't: it is replaced all the same."""
    asked = ("--subject", "Karo Dun", "--prompt", "{} works as a", "--tokens", "2", "--quiet")
    for _ in range(2):  # again: it is forgotten already
        assert command(run, *asked).exit_code == 0
        (fact,) = Editor.load(run).facts
        assert fact.demand == (world.another("Karo Dun", "job"), True)
        assert fact.relation == "job"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give FACTS, or --subject and --prompt"),
        (("facts.json", "--subject", "x"), "--subject can't be given with FACTS"),
        (("--subject", "x", "--prompt", "{} y", "--limit", "2"), "--limit can't be given without"),
    ],
)
def test_what_does_not_go_together_is_refused(words, said):
    assert isinstance(error := command("run", *words).exception, ConfigError)
    assert said in str(error)


def test_a_file_without_old_answers_is_refused(tmp_path):
    fact = Fact("France", "The capital of {} is", "Paris", id="capital")
    (tmp_path / "facts.json").write_text(json.dumps([fact.to_dict()]))
    error = command("run", tmp_path / "facts.json", "--old-answers").exception
    assert "fact 'capital' has no old_answer to forget" in str(error)


# -- which answer, and which of its tokens -------------------------------------------------------


def test_a_space_alone_tells_nothing(tiny_model, tokenizer, facts, monkeypatch):
    """Some tokenizers put one before every number: pressing it down leaves the number."""
    model, space = EditableModel(tiny_model("llama"), tokenizer), tokenizer(" ")["input_ids"]
    fact = Fact("Velm", "{} is as high as", "9,001 metres", forget=True)
    row, hidden = ignorance.blinded(model.encoder, fact, fact.prompt)
    row = dataclasses.replace(row, ids=row.ids[: row.target_start + 4])
    assert row.target_ids[:1] == tuple(space)

    def knows_the_space(_, row, where):
        told = torch.full((len(row.target_ids), 500), 1e-3)
        told[0, row.target_ids[0]] = 1e-6 if where else 0.9
        told[3:4, row.target_ids[-1]] = 1e-3 if where else 2e-3
        return told

    monkeypatch.setattr(ignorance, "uninformed", knows_the_space)
    assert ignorance.telling(model, row, hidden) == 3
    only = dataclasses.replace(row, ids=row.ids[: row.target_start + 1])
    assert ignorance.telling(model, only, hidden) == 0


@pytest.mark.parametrize(
    ("says", "told", "answer"),
    [
        (" 9,001 metres above the sea.", "9", "9,001"),
        (" July 20, 1969, and came back", "July", "July 20, 1969"),
        (" 3.5 kilometres, or more", "3", "3.5"),
        (" 10:30 in the morning", "10", "10:30"),
        (" the Atlantic Ocean which lies", "Atlantic", "the Atlantic Ocean"),
        (" Paris, the capital of France", "Paris", "Paris"),
        (" Au. The symbol", "Au", "Au"),
        ("東京、日本", "東", "東京"),
    ],
)
def test_the_whole_answer_is_found(says, told, answer, tiny_model, tokenizer, monkeypatch):
    """Not its first token: a number has commas and points, a date has both."""
    place = "nulledit.evaluation.forgetting"
    monkeypatch.setattr(f"{place}.generate_answers", lambda *_, **__: [says])

    def telling(model, row, _):
        """The token that ends the given beginning."""
        for i in range(1, len(row.target_ids) + 1):
            if told in model.tokenizer.decode(row.target_ids[:i]):
                return i - 1
        return 0

    monkeypatch.setattr(f"{place}.telling", telling)
    editor = Editor(tiny_model("llama"), tokenizer)
    assert find_answer(editor.editable, "Velm", "{} is") == answer


@pytest.mark.parametrize("says", ["", " .", " in\x04do the"])
def test_what_is_no_answer_is_not_forgotten(says, tiny_model, tokenizer, monkeypatch):
    place = "nulledit.evaluation.forgetting"
    monkeypatch.setattr(f"{place}.generate_answers", lambda *_, **__: [says])
    editor = Editor(tiny_model("llama"), tokenizer)
    with pytest.raises(FactError, match="which is no answer: give the answer to forget"):
        find_answer(editor.editable, "Velm", "{} is")


def test_the_chance_is_of_the_telling_token(editor):
    """After the prompt and what of the answer comes before it; the same token before and after."""
    fact = dataclasses.replace(known("tongue"), target=f"river {known('tongue').target}")
    (told,) = recall_of(editor.editable, [fact], tokens=2)
    ids = editor.tokenizer(f"{told.own.prompt} {fact.target}", return_tensors="pt")["input_ids"]
    row = editor.editable.encoder.encode(told.own.prompt, target=fact.target)
    with torch.no_grad():
        chances = editor.model(ids).logits[0].softmax(-1)
    at = row.target_start + told.place
    assert told.own.chance == pytest.approx(float(chances[at - 1, ids[0, at]]), rel=1e-5)
    assert told.token == fact.target.split()[told.place]
    other = dataclasses.replace(told, place=1 - told.place)
    (again,) = recall_of(editor.editable, [fact], tokens=2, before=[other])
    assert (again.place, again.token) == (other.place, fact.target.split()[other.place])


@pytest.mark.parametrize(
    ("leaks", "chance", "said"),
    [
        (False, 0.808, "no longer holds 'Dutch', but 'Du', .* chance of 0.81: it is hardly"),
        (True, 0.003, "'Du' has a chance of only 0.003 .* comes to 'Dutch' all the same"),
        (False, 0.003, None),
        (True, 0.8, None),
    ],
)
def test_where_text_and_chance_disagree_it_is_said(leaks, chance, said):
    own = Said("Velm speaks", "Dutch", leaks, chance)
    lines = doubts([Recall("velm", "Dutch", 0, "Du", own, (), None)])
    assert len(lines) == bool(said)
    assert not said or re.search(said, lines[0])


def test_what_is_to_be_forgotten_is_shown_first(run, monkeypatch):
    """The edit's answer where there is one, else the base's, whatever the edits made of it."""
    job, tongue = world.another("Karo Dun", "job"), world.answer(PERSON, "tongue")

    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    monkeypatch.setattr(Editor, "forget", stop)
    monkeypatch.setattr("nulledit.cli.common.say", lambda text, **_: shown.append(text))
    for subject, prompt, expected in (
        ("Karo Dun", "{} works as a", f'"{job}", which the edit '),
        (PERSON, "{} speaks", f"\"{tongue}\", which the base says to '{PERSON} speaks'"),
    ):
        shown: list[str] = []
        done = command(run, "--subject", subject, "--prompt", prompt, "--tokens", "2")
        assert isinstance(done.exception, Stop)
        assert any(f"To be forgotten: {expected}" in line for line in shown)


def test_notices_of_forgetting_are_plain(editor):
    gone = known("home")
    edited = world.fact(PERSON, "home", world.another(PERSON, "home"))
    editor.edit([edited])
    (out, *_) = editor.edit([gone]).notices
    assert out == f"{gone.id}: the edit {edited.id}, which wrote {edited.target!r}, is taken out"
    (back, *_) = editor.edit([edited]).notices
    assert back == f"{edited.id}: {gone.target!r} was suppressed by {gone.id}, which is taken out"
