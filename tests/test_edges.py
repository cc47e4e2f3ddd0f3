"""Edges of studies and batches that a review found broken."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from conftest import FAMILIES  # noqa: F401
from test_studies import data, known, make_lab, words  # noqa: F401

from nulledit.config import Recipe, StatisticsSettings
from nulledit.data.facts import Fact
from nulledit.report.points import Point
from nulledit.studies import side_effects as behaviour
from nulledit.studies.methods_table import _leaders
from nulledit.studies.registry import find_study, run_study
from nulledit.studies.scale import load_scale


@pytest.mark.parametrize("name", ["small", "paper"])
def test_an_arm_called_alphaedit_is_alphaedit(name):
    base = Recipe.from_dict({"layers": [1], "method": {"name": "memit"}})
    assert load_scale(name).recipe(base, "alphaedit").method.name == "alphaedit"


def test_changes_of_zero_have_no_rank_correlation():
    points = [Point(x, 0.0, series="relation") for x in range(8)]
    assert "+1.00" not in behaviour._correlation(points)


def test_a_tie_has_no_single_leader():
    rows = {"a": {"efficacy_strict": True}, "b": {"efficacy_strict": True}}
    arms = [
        SimpleNamespace(label=label, end=rows, checkpoints=[2], text={2: None})
        for label in ("first", "second")
    ]
    assert "highest with first (" not in _leaders(arms, None)


def test_leaks_depend_on_how_many_prompts_are_read(make_lab, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr(
        behaviour, "_free_share", lambda editor, texts: asked.append(len(texts)) or 0.0
    )
    found = {}
    for most in (2, 8):
        lab = make_lab("categories", leak_prompts=most)
        (plan, *_) = behaviour.plans_of(lab)
        found[most] = behaviour._leaks(lab, lab.edited(plan), {"g": list("abcdefghij")})
    assert asked == [2, 8]


def test_drift_of_arms_with_other_layers(make_lab, tmp_path):  # noqa: F811
    lab = make_lab("drift", arms=["alphaedit", "low"])
    lab.scale = dataclasses.replace(lab.scale, arms={**lab.scale.arms, "low": {"layers": [0]}})
    run_study(find_study("drift"), lab, tmp_path / "out")


def test_categories_of_facts_without_neighbours(make_lab, data, tmp_path):  # noqa: F811
    facts = [{**r, "neighbours": []} for r in json.loads(open(data.facts).read())]
    file = tmp_path / "bare.json"
    file.write_text(json.dumps(facts))
    lab = make_lab("categories", sources=dataclasses.replace(data, facts=str(file)))
    run_study(find_study("categories"), lab, tmp_path / "out")


def test_corpus_says_how_many_tokens_there_were(make_lab, tmp_path):  # noqa: F811
    lab = make_lab("corpus", tokens=[300, 10_000_000])
    study = run_study(find_study("corpus"), lab, tmp_path / "out")
    xs = {p.x for f in study.figures if f.name == "corpus" for p in f.points}
    assert 10_000_000 not in xs


def test_corpus_takes_windows_that_the_model_has_room_for(make_lab, tmp_path):  # noqa: F811
    from nulledit.statistics.manifest import read_manifest

    lab = make_lab("corpus", tokens=[300])
    run_study(find_study("corpus"), lab, tmp_path / "out")
    context = lab.bench.base.model.config.max_position_embeddings
    (folder,) = (tmp_path / "work" / "statistics").iterdir()
    assert read_manifest(folder)[0].settings.window == context < StatisticsSettings().window
    assert any(f"windows of {context} tokens" in notice for notice in lab.notices)


def test_corpus_says_what_the_rule_protects(make_lab, tmp_path):  # noqa: F811
    from nulledit.linalg.spectrum import RULES
    from nulledit.statistics.spectra import Statistics

    lab = make_lab("corpus", tokens=[300])
    study = run_study(find_study("corpus"), lab, tmp_path / "out")
    (folder,) = (tmp_path / "work" / "statistics").iterdir()
    spectrum = Statistics.load(folder).spectra[0]
    rule = lab.recipe.null_space
    threshold = RULES[rule.rule](spectrum.eigenvalues, rule.value)
    assert study.tables[0].rows[1]["protected"] == spectrum.protected(threshold)


def test_preservation_without_a_text_names_no_leader(make_lab, data, tmp_path):  # noqa: F811
    lab = make_lab("preservation", sources=dataclasses.replace(data, text=None))
    study = run_study(find_study("preservation"), lab, tmp_path / "out")
    assert "with none" not in study.shows


def test_fluency_that_is_asked_for_is_shown(make_lab, tmp_path):  # noqa: F811
    study = run_study(find_study("table1"), make_lab("table1", fluency=2), tmp_path / "out")
    assert any(c.key == "fluency" for t in study.tables for c in t.columns)


def test_seconds_of_values_are_of_those_optimised_here(make_lab):  # noqa: F811
    lab = make_lab("table1")
    queue = lab.facts(6)
    own = lab.edited(lab.plan("alphaedit", queue)).seconds("values")
    assert own > 0
    taken_over = lab.edited(lab.plan("memit", queue))
    assert taken_over.seconds("values") is None
    assert taken_over.seconds("keys", "solve") > 0


def test_chunks_are_the_target():
    from nulledit.editing.chunks import chunks_of

    class Encoder:
        class tokenizer:
            def __new__(cls, text, **_):
                return {"input_ids": text.split()}

    fact = Fact(subject="f", prompt="def {} is", target="a\n  b\n\nc", id="x")
    assert " ".join(c.target for c in chunks_of(fact, Encoder, 1)) == fact.target


import random  # noqa: E402

import torch  # noqa: E402
from conftest import build_model  # noqa: E402
from test_batch import NAMES, make, recipe_of, weights  # noqa: E402, F401

from nulledit import Editor  # noqa: E402

STORIES = [(name, chunks) for name in NAMES for chunks in (0, 2) if (name, chunks) != ("ft", 2)]


@pytest.mark.parametrize(("name", "chunks"), STORIES)
def test_any_story_is_replayed_to_the_bit(name, chunks, make, facts, tmp_path):  # noqa: F811
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


def test_the_state_id_tells_methods_apart(make, facts):  # noqa: F811
    ids, found = [], []
    for l2 in (0.1, 10.0):
        editor = make(recipe_of("alphaedit", layers=[1], method__l2=l2))
        editor.edit(facts[:2])
        ids.append(editor.history.state_id)
        found.append(weights(editor)[1])
    assert not torch.equal(*found)
    assert ids[0] != ids[1]


def test_a_report_counts_what_after_protects(make, facts):  # noqa: F811
    editor = make(recipe_of("memit", method__projection="after"))
    report = editor.edit(facts)
    assert report.layers[0].protected > 0


def test_a_report_counts_facts(make, facts):  # noqa: F811
    editor = make(recipe_of("alphaedit", values__chunk_tokens=1))
    report = editor.edit(facts)
    assert report.layers[0].n == len(facts)


def test_a_study_says_how_it_was_run(make_lab, tmp_path):  # noqa: F811
    lab = make_lab("order")
    lab.seed, lab.scale = 3, dataclasses.replace(lab.scale, name="mine")
    study = run_study(find_study("order"), lab, tmp_path / "out")
    assert study.environment[0]["seed"] == 3
    assert study.scale != "small"


def test_time_that_an_interruption_took_with_it_is_absent(make_lab):  # noqa: F811
    lab = make_lab("table1", batch_size=6, facts=6)
    plan = lab.plan("rome", lab.facts(6))
    begun = []

    def stop(stage, at, total):
        if stage == "batches":
            begun.append(at)
            if len(begun) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.bench.stream(plan).edit(stop)
    stream = lab.bench.stream(plan)
    stream.edit()
    assert stream.seconds("keys", "solve") is None
    assert len(stream.editor.facts) == 6


@pytest.mark.parametrize(
    "change", [{"facts": -2}, {"batch_size": 0}, {"batch_size": -1}, {"ask_every": 0}, {"skip": -1}]
)
def test_settings_out_of_range_are_one_line(change, make_lab, tmp_path):  # noqa: F811
    from nulledit.errors import ConfigError

    with pytest.raises(ConfigError):
        run_study(find_study("table1"), make_lab("table1", **change), tmp_path / "out")


def test_a_known_chunk_is_not_a_known_fact(make, facts):  # noqa: F811
    editor = make(recipe_of("alphaedit", values__chunk_tokens=1))
    fact = dataclasses.replace(facts[0], target="Velmish tongue", old_answer=None)
    import nulledit.editing.batch as batch

    real = batch.optimise_values

    def first_known(*args, **kwargs):
        found = real(*args, **kwargs)
        return [dataclasses.replace(v, known=i == 0) for i, v in enumerate(found)]

    batch.optimise_values = first_known
    try:
        report = editor.edit([fact])
    finally:
        batch.optimise_values = real
    assert not any("said by the model already" in n for n in report.notices)


def test_ft_trains_every_wording(make, facts):  # noqa: F811
    other = dataclasses.replace(facts[0], prompt="At home {} spoke", more_prompts=(), id="x")
    both = dataclasses.replace(facts[0], more_prompts=(other.prompt,))
    found = []
    for fact in (facts[0], both):
        editor = make(recipe_of("ft"))
        editor.edit([fact])
        found.append(weights(editor)[1])
    assert not torch.equal(*found)
