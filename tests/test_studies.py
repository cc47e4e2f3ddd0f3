"""Studies on a tiny model that knows a small world: shared, resumed, and honest about gaps."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from support import world
from support.models import statistics_of

from nulledit import Editor
from nulledit.config import Recipe, StatisticsSettings, layers_by_depth
from nulledit.editing import batch_values
from nulledit.errors import ConfigError, ModelError, StatisticsError
from nulledit.evaluation.runner import evaluate
from nulledit.linalg.spectrum import RULES
from nulledit.methods import find_method
from nulledit.report.document import Study, Value
from nulledit.report.points import Point
from nulledit.report.study import read_study
from nulledit.statistics.manifest import read_manifest
from nulledit.statistics.spectra import Statistics
from nulledit.studies import categories
from nulledit.studies.build import along, head, labels, lines
from nulledit.studies.context import Lab, Sources
from nulledit.studies.declaration import Cells, Part, StudySpec, Table
from nulledit.studies.estimate import estimate
from nulledit.studies.questions import FACTS, NORMS
from nulledit.studies.registry import STUDIES, find_study, register, run_study
from nulledit.studies.results import (
    Spot,
    best_and_worst,
    extremes,
    numbers,
    quantity,
    update_share,
)
from nulledit.studies.scale import Scale, load_scale
from nulledit.studies.stream import Stream, Workbench, shuffled

RECIPE = Recipe.from_dict(
    {
        "layers": [0, 1],
        "values": {"steps": 6, "learning_rate": 0.2, "weight_decay": 1.0, "clamp": 3.0},
        "contexts": {"texts": ["{}", "then he said . {}"]},
        "null_space": {"rule": "leakage", "value": 0.01},
        "method": {"l2": 1e-3},
    }
)
ARMS = {
    "alphaedit": {},
    "memit": {"method.name": "memit", "method.moment_weight": 0.1},
    "rome": {"method.name": "rome", "layers": [1]},
    "ft": {"method.name": "ft", "layers": [1]},
}
SMALL = {
    "table1": {"arms": ["alphaedit", "rome", "ft"], "zsre_arms": ["alphaedit"], "zsre": 4},
    "projection": {"arms": ["memit"], "projections": ["inside", "after"]},
    "capability": {"arms": ["alphaedit", "memit"], "ask_every": 6, "items": 4},
    "drift": {"arms": ["alphaedit", "memit"], "prompts": 8},
    "categories": {"arms": ["alphaedit"], "items": 4, "smallest": 3, "leak_prompts": 8},
    "threshold": {"thresholds": [0.01], "leakages": [0.1], "softness": [2]},
    "preservation": {"penalties": [0.1]},
    "corpus": {"tokens": [300, 600]},
    "scale": {
        "arms": ["alphaedit"],
        "arm": "alphaedit",
        "batch_sizes": [2, 4],
        "zsre": 4,
        "ask_every": 6,
        "widths": [32, 64],
        "expansion": 2,
        "solve_facts": 4,
    },
    "order": {"arms": ["alphaedit"]},
    "collapse": {
        "arms": ["alphaedit"],
        "oldest": 4,
        "growth": 1e9,
        "loss": 1e3,
        "healthy_growth": 1e8,
        "healthy_loss": 999,
    },
    "instead": {"arms": ["alphaedit"], "crowds": [0, 1], "facts": 6},
    "compare": {"arms": ["memit", "local", "alphaedit", "prompt"], "facts": 6, "answers": 6},
}
SHARED = {"facts": 12, "skip": 0, "batch_size": 6, "windows": 2, "answers": 3, "fluency": 2}


@pytest.fixture(scope="module")
def words(worlds):
    return worlds("llama")[1]


@pytest.fixture(scope="module")
def known(worlds):
    return worlds("llama")[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of the world in the forms that studies read."""
    folder = tmp_path_factory.mktemp("data")
    facts = [
        world.fact(person, relation, world.another(person, relation))
        for person in world.PEOPLE[:6]
        for relation in world.RELATIONS
    ]
    (folder / "facts.json").write_text(json.dumps([f.to_dict() for f in facts]))
    zsre = [
        {
            "subject": f.subject,
            "src": f.render(f.prompt),
            "rephrase": f.paraphrases[0],
            "alt": f.target,
            "answers": [f.old_answer],
            "loc": f"nq question: {f.neighbours[0].prompt}",
            "loc_ans": f.neighbours[0].answer,
        }
        for f in facts[::3]
    ]
    (folder / "zsre.json").write_text(json.dumps(zsre))
    (folder / "text.txt").write_text("\n".join(world.sentences()))
    prompts = [{"prompt": t.format(p)} for p in world.PEOPLE[6:] for t in ("{} speaks",)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    tasks = folder / "tasks"
    tasks.mkdir()
    pairs = [("Karo Dun speaks Latin", 1), ("the river is long", 0)] * 4
    for name in ("sst2", "cola"):
        lines = [json.dumps({"sentence": s, "label": y}) for s, y in pairs]
        (tasks / f"{name}.jsonl").write_text("\n".join(lines))
    for name in ("mrpc", "rte"):
        lines = [
            json.dumps({"sentence1": s, "sentence2": s, "label": y, "idx": i})
            for i, (s, y) in enumerate(pairs)
        ]
        (tasks / f"{name}.jsonl").write_text("\n".join(lines))
    nli = [
        json.dumps({"sentence1": s, "sentence2": s, "label": ["not_entailment", "entailment"][y]})
        for s, y in pairs
    ]
    (tasks / "nli.jsonl").write_text("\n".join(nli))
    mmlu = [
        json.dumps({"question": s, "subject": "x", "choices": ["a", "b", "c", "d"], "answer": y})
        for s, y in pairs
    ]
    (tasks / "mmlu.jsonl").write_text("\n".join(mmlu))
    return Sources(
        facts=str(folder / "facts.json"),
        zsre=str(folder / "zsre.json"),
        text=str(folder / "text.txt"),
        corpus=str(folder / "text.txt"),
        capability=str(tasks),
        prompts=str(folder / "prompts.json"),
    )


@pytest.fixture(scope="module")
def lab_in(known, words, data):
    """Makes a lab for a study on a fresh copy of the model, its work in a folder."""
    statistics = statistics_of(known, words, layers=(0, 1), lines=world.sentences())

    def make(work, name, *, sources=data, **changes):
        model = type(known)(known.config).eval()
        model.load_state_dict(known.state_dict())
        settings = {**SHARED, **SMALL[name], **changes}
        scale = Scale("small", ARMS, {name: settings})
        return Lab(Workbench(model, words, work, name=""), RECIPE, scale, settings, sources)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nulledit.editing.session.find_statistics", lambda *_, **__: [statistics])
        yield make


@pytest.fixture
def make_lab(lab_in, tmp_path):
    """The same, its work in the test's folder; `work` is shared unless given."""

    def make(name, *, work="work", **changes):
        return lab_in(tmp_path / work, name, **changes)

    return make


@dataclasses.dataclass(frozen=True)
class Finished:
    """A study that was run from nothing, for tests that only read it or go on from its work."""

    size: dict
    """What was estimated before."""
    made: Study
    out: Path
    work: Path


@pytest.fixture(scope="module")
def finished(lab_in, tmp_path_factory):
    """Runs a study once for all tests: `finished("table1")`."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp(name)
        lab = lab_in(folder / "work", name)
        size = estimate(lab, find_study(name).work(lab))
        made = run_study(find_study(name), lab, folder / "out")
        return Finished(size, made, folder / "out", folder / "work")

    return run


@pytest.mark.few("corpus", "drift", "instead", of="name")
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_makes_its_folder(name, finished, lab_in):
    study = finished(name)
    assert study.size["seconds_in_all"] >= 0
    assert study.size["to_edit"] > 0
    read = read_study(study.out)
    assert read.tables
    assert read.shows
    assert read.cannot_show
    assert [t.name for t in read.tables] == [t.name for t in study.made.tables]
    for table in read.tables:
        keys = {column.key for column in table.columns}
        assert ("perplexity" in keys) == ("kl" in keys)
        for row in table.rows if "kl" in keys else ():
            edited = "unedited" not in row.values() and row.get("perplexity") is not None
            assert row.get("kl") is None or (row["kl"].mean > 0) == edited
            assert row.get("kl") is not None or not edited
    assert (study.out / "study.md").is_file()
    for figure in read.figures:
        assert figure.points
        assert (study.out / "figures" / f"{figure.name}.png").stat().st_size > 1000
    if name != "corpus":  # whose statistics are made on the way
        again = lab_in(study.work, name)
        assert estimate(again, find_study(name).work(again))["to_edit"] == 0


def test_a_finished_study_is_not_edited_again(finished, lab_in, tmp_path, monkeypatch):
    first = finished("table1")

    def refuse(*_args, **_kwargs):
        raise AssertionError("edited again")

    monkeypatch.setattr("nulledit.editing.session.EditSession.batch", refuse)
    second = run_study(find_study("table1"), lab_in(first.work, "table1"), tmp_path)
    assert [t.rows for t in first.made.tables] == [t.rows for t in second.tables]
    assert [f.points for f in first.made.figures] == [f.points for f in second.figures]


@pytest.mark.slow
def test_an_interrupted_stream_goes_on_to_the_same_numbers(
    finished, make_lab, tmp_path, monkeypatch
):
    commit = Stream.edit
    batches = []

    def stopping(self, progress=None):
        def tell(stage, done, total):
            if stage == "edited":
                batches.append(done)
                if len(batches) == 3:  # after the first batch of the second arm
                    raise KeyboardInterrupt

        commit(self, tell)

    monkeypatch.setattr(Stream, "edit", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_study(find_study("table1"), make_lab("table1"), tmp_path / "out")
    monkeypatch.setattr(Stream, "edit", commit)
    rest = run_study(find_study("table1"), make_lab("table1"), tmp_path / "out")

    def numbers(study):
        return [
            {k: v for k, v in row.items() if k != "seconds"} for t in study.tables for row in t.rows
        ]

    assert numbers(finished("table1").made) == numbers(rest)


def test_a_checkpoint_is_the_stream_that_ended_there(make_lab):
    lab = make_lab("table1", work="long")
    queue = lab.facts(12)
    for arm in ARMS:
        plan = lab.plan(arm, queue)
        long = lab.edited(plan)
        early = FACTS.answer(lab, plan, 6, long)
        with long.at(6) as editor:
            held = {layer: editor.weights.exact(layer).clone() for layer in editor.weights.layers}
        plan = lab.plan(arm, queue[:6])
        short = lab.edited(plan)
        for layer, weight in held.items():
            there = short.editor.weights.exact(layer)
            assert float((weight - there).norm() / there.norm()) < 1e-5
        assert FACTS.answer(lab, plan, 6, short) == early


def test_arms_share_the_values_of_their_first_batch(make_lab, monkeypatch):
    asked = []
    optimise = batch_values.optimise_values

    def counting(model, facts, *args, **kwargs):
        asked.append(len(facts))
        return optimise(model, facts, *args, **kwargs)

    monkeypatch.setattr(batch_values, "optimise_values", counting)
    lab = make_lab("projection", work="values")
    queue = lab.facts(6)
    lab.edited(lab.plan("alphaedit", queue))
    lab.edited(lab.plan("memit", queue))
    assert asked == [6, 0]
    lab.edited(lab.plan("memit", queue, recipe=RECIPE.with_fields({"values.steps": 7})))
    assert asked == [6, 0, 6], "other settings are other values"


def test_a_longer_stream_goes_on_from_a_shorter_one(make_lab, monkeypatch):
    asked = []
    optimise = batch_values.optimise_values

    def counting(model, facts, *args, **kwargs):
        asked.extend(fact.id for fact in facts)
        return optimise(model, facts, *args, **kwargs)

    monkeypatch.setattr(batch_values, "optimise_values", counting)
    lab = make_lab("table1", work="fork")
    queue = lab.facts(12)
    alone = lab.edited(lab.plan("rome", queue))
    expected = {i: alone.editor.weights.exact(i).clone() for i in alone.editor.weights.layers}
    at_once = list(asked)
    lab = make_lab("table1", work="forked")
    lab.edited(lab.plan("rome", queue[:6]))
    before = len(asked)
    longer = lab.edited(lab.plan("rome", queue))
    assert asked[len(at_once) :] == at_once, "what was edited is not edited again"
    assert before < len(asked)
    for layer, weight in expected.items():
        assert torch.equal(longer.editor.weights.exact(layer), weight)
    with longer.at(6) as editor:
        assert len(editor.history.active_as_of(6)) == 6


def test_a_longer_queue_begins_with_a_shorter_one():
    one = world.fact("Ada Velm", "job", "smith")
    facts = [dataclasses.replace(one, id=f"{i}") for i in range(9)]
    short, long = (shuffled(facts[:n], 0, block=3) for n in (6, 9))
    assert long[:6] == short
    assert short != facts[:6]
    assert shuffled(facts, 1, block=3) != long


def test_the_model_is_as_before_when_a_lab_is_cleared(make_lab, known):
    lab = make_lab("table1")
    lab.edited(lab.plan("alphaedit", lab.facts(6)))
    lab.bench.clear()
    for name, weight in lab.bench.model.model.state_dict().items():
        assert weight.equal(known.state_dict()[name])


def test_what_the_data_lack_is_absent(make_lab, data, tmp_path):
    bare = [
        {"id": f"f{i}", "subject": p, "prompt": "{} speaks", "target": world.another(p, "tongue")}
        for i, p in enumerate(world.PEOPLE)
    ]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    sources = Sources(facts=str(tmp_path / "bare.json"))
    lab = make_lab("table1", sources=sources, work="bare", arms=["alphaedit"], facts=6)
    study = run_study(find_study("table1"), lab, tmp_path / "out")
    table = study.tables[0]
    keys = {column.key for column in table.columns}
    assert "generalization" not in keys
    assert "specificity_tokens" not in keys
    assert "perplexity" not in keys
    assert "efficacy_strict" in keys
    assert any("zsre" in notice for notice in study.notices)


def test_bad_input_is_refused_by_name(make_lab, data):
    with pytest.raises(ConfigError, match="did you mean 'table1'"):
        find_study("tabel1")
    with pytest.raises(ConfigError, match=r"has 18 facts.*needs 40.*--set facts=18"):
        make_lab("table1", facts=40).facts(40)
    lab = make_lab("table1")
    with pytest.raises(ConfigError, match="did you mean 'memit'"):
        lab.plan("memti", [])
    with pytest.raises(ConfigError, match="expected memit\\+ one of"):
        lab.plan("memit+sideways", [])
    with pytest.raises(ConfigError, match="needs --capability"):
        find_study("capability").check(Sources(facts=data.facts))
    with pytest.raises(ConfigError, match="no such file"):
        find_study("table1").check(Sources(facts="nowhere.json"))
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        load_scale("small").of("table1", {"batchsize": 3})
    with pytest.raises(ConfigError, match="no scale"):
        load_scale("medium")


@pytest.mark.parametrize("name", ["small", "paper"])
def test_shipped_scales_have_every_study_and_only_known_arms(name):
    scale = load_scale(name)
    assert set(scale.studies) == {n for n, spec in STUDIES.items() if not spec.settings}
    for settings in scale.studies.values():
        for key in ("arms", "zsre_arms"):
            for arm in settings.get(key, ()):
                scale.recipe(RECIPE.with_fields({"layers": [3, 4, 5]}), arm)
    for arm in scale.arms:
        recipe = scale.recipe(RECIPE.with_fields({"layers": [3, 4, 5]}), arm)
        find_method(recipe.method.name).read(recipe.method)


# -- a study of one's own --------------------------------------------------------------------------

UPDATE = Cells(head("update", "update"), update_share)
STEPS = StudySpec(
    name="steps",
    title="Steps of the search",
    question="How many steps does a value need?",
    needs=("facts",),
    cannot_show="Other models.",
    settings={"facts": 6, "skip": 0, "batch_size": 3, "steps": [1, 6]},
    parts=(
        Part(
            lambda lab, queue: [
                lab.plan({"values.steps": n}, queue, label=f"{n} steps")
                for n in lab.settings["steps"]
            ],
            asked=(FACTS, NORMS),
            tables=(
                Table(
                    "steps",
                    "Steps on {data}",
                    "After {edits} edits in batches of {batch_size}.",
                    (labels("arm"), "efficacy_strict", "generation", UPDATE),
                ),
            ),
            figures=(lines("steps", "All so far.", "%", along({"": update_share})),),
            shows=best_and_worst("efficacy_strict"),
        ),
    ),
)


def test_a_new_study_is_one_declaration(make_lab, known, words, data, tmp_path, monkeypatch):
    monkeypatch.setattr("nulledit.studies.registry.STUDIES", dict(STUDIES))
    assert find_study(register(STEPS).name) is STEPS
    with pytest.raises(ConfigError, match="a study 'steps' is registered already"):
        register(dataclasses.replace(STEPS))
    lab = make_lab("order")
    lab.scale = STEPS.scaled(Scale("small", ARMS, {}))
    lab.settings = lab.scale.of("steps", {"facts": 4})
    assert estimate(lab, STEPS.work(lab))["streams"] == 2
    (table,) = run_study(STEPS, lab, tmp_path / "out").tables
    assert [row["arm"] for row in table.rows] == ["unedited", "1 steps", "6 steps"]
    assert "generation" not in {column.key for column in table.columns}, "nobody was asked"
    assert (table.title, table.caption) == ("Steps on facts.json", "After 4 edits in batches of 3.")
    queue, statistics = lab.facts(4), statistics_of(known, words, (0, 1), world.sentences())
    for steps, row in zip((1, 6), table.rows[1:], strict=True):
        model = type(known)(known.config).eval()
        model.load_state_dict(known.state_dict())
        recipe = RECIPE.with_fields({"values.steps": steps})
        editor = Editor(model, words, recipe=recipe, statistics=statistics, seed=0)
        editor.edit(queue, batch_size=3, shuffle=False)
        found = evaluate(editor.editable, queue, generate=False).rates["efficacy_strict"]
        assert row["efficacy_strict"] == Value.percent(found)
        shares = [report.update_share for report in editor.weights.reports()]
        assert row["update"] == pytest.approx(100 * max(shares), rel=1e-4)
    (figure,) = read_study(tmp_path / "out").figures
    assert [p.y for p in figure.points] == pytest.approx([r["update"] for r in table.rows[1:]])


def test_a_model_without_layers_in_its_recipe_gets_them_by_depth(make_lab):
    lab = make_lab("order")
    lab.recipe = dataclasses.replace(RECIPE, layers=())
    lab.fit(["alphaedit"])
    assert lab.recipe.layers == layers_by_depth(lab.bench.model.depth)
    assert any("by depth" in notice for notice in lab.notices)
    lab.scale = dataclasses.replace(lab.scale, arms={"far": {"layers": [40]}})
    with pytest.raises(ModelError, match="arm far: layer 40 is out of range"):
        lab.fit(["far"])


# -- what a study says -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "paper"])
def test_an_arm_called_alphaedit_is_alphaedit(name):
    base = Recipe.from_dict({"layers": [1], "method": {"name": "memit"}})
    assert load_scale(name).recipe(base, "alphaedit").method.name == "alphaedit"


def test_changes_of_zero_have_no_rank_correlation():
    points = [Point(x, 0.0, series="relation") for x in range(8)]
    assert "+1.00" not in categories._correlation(points)


def test_a_tie_has_no_single_leader():
    rows = {"a": {"efficacy_strict": True}, "b": {"efficacy_strict": True}}
    spots = [Spot(label, 2, {"facts": rows}) for label in ("first", "second")]
    assert extremes(numbers(spots, quantity("efficacy_strict"))) == "100.0 % with first, second"


def test_leaks_depend_on_how_many_prompts_are_read(make_lab, monkeypatch):
    asked = []
    monkeypatch.setattr(
        categories, "_free_share", lambda editor, texts: asked.append(len(texts)) or 0.0
    )
    found = {}
    for most in (2, 8):
        lab = make_lab("categories", leak_prompts=most)
        plan = lab.plan("alphaedit", lab.facts(12))
        found[most] = len(categories.LEAKS.answer(lab, plan, 12, lab.edited(plan)))
        assert len(asked) == found[most], "every group is asked again for another number"
        assert max(asked) == most if most == 2 else max(asked) > 2
        asked.clear()


def test_drift_of_arms_with_other_layers(make_lab, tmp_path):
    lab = make_lab("drift", arms=["alphaedit", "low"])
    lab.scale = dataclasses.replace(lab.scale, arms={**lab.scale.arms, "low": {"layers": [0]}})
    run_study(find_study("drift"), lab, tmp_path / "out")


def test_categories_of_facts_without_neighbours(make_lab, data, tmp_path):
    facts = [{**r, "neighbours": []} for r in json.loads(open(data.facts).read())]
    file = tmp_path / "bare.json"
    file.write_text(json.dumps(facts))
    lab = make_lab("categories", sources=dataclasses.replace(data, facts=str(file)))
    run_study(find_study("categories"), lab, tmp_path / "out")


def test_corpus_says_how_many_tokens_there_were(make_lab, tmp_path):
    lab = make_lab("corpus", tokens=[300, 10_000_000])
    study = run_study(find_study("corpus"), lab, tmp_path / "out")
    xs = {p.x for f in study.figures if f.name == "corpus" for p in f.points}
    assert 10_000_000 not in xs


def test_corpus_knows_the_models_room_and_what_the_rule_protects(make_lab, tmp_path):
    lab = make_lab("corpus", tokens=[300])
    study = run_study(find_study("corpus"), lab, tmp_path / "out")
    context = lab.bench.base.model.config.max_position_embeddings
    (folder,) = (tmp_path / "work" / "statistics").iterdir()
    assert read_manifest(folder)[0].settings.window == context < StatisticsSettings().window
    assert any(f"windows of {context} tokens" in notice for notice in lab.notices)
    spectrum = Statistics.load(folder).spectra[0]
    rule = lab.recipe.null_space
    threshold = RULES[rule.rule](spectrum.eigenvalues, rule.value)
    assert study.tables[0].rows[1]["protected"] == spectrum.protected(threshold)


def test_preservation_without_a_text_names_no_leader(make_lab, data, tmp_path):
    lab = make_lab("preservation", sources=dataclasses.replace(data, text=None))
    study = run_study(find_study("preservation"), lab, tmp_path / "out")
    assert "with none" not in study.shows


def test_fluency_that_is_asked_for_is_shown(finished):
    assert SHARED["fluency"]
    assert any(c.key == "fluency" for t in finished("table1").made.tables for c in t.columns)


def test_seconds_of_values_are_of_those_optimised_here(make_lab):
    lab = make_lab("table1")
    queue = lab.facts(6)
    own = lab.edited(lab.plan("alphaedit", queue)).seconds("values")
    assert own > 0
    taken_over = lab.edited(lab.plan("memit", queue))
    assert taken_over.seconds("values") is None
    assert taken_over.seconds("keys", "solve") > 0


def test_a_study_says_how_it_was_run(make_lab, tmp_path):
    lab = make_lab("order")
    lab.seed, lab.scale = 3, dataclasses.replace(lab.scale, name="mine")
    study = run_study(find_study("order"), lab, tmp_path / "out")
    assert study.environment[0]["seed"] == 3
    assert study.scale != "small"


def test_time_that_an_interruption_took_with_it_is_absent(make_lab):
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


def test_a_comparison_has_every_method_and_every_answer(finished):
    study = finished("compare").made
    methods, differences, answers = study.tables
    names = ["memit", "local", "alphaedit", "prompt"]
    assert [row["arm"] for row in methods.rows] == ["unedited", *names]
    assert [row["method"] for row in differences.rows] == names[1:]
    assert [c.title for c in answers.columns] == ["prompt", "target", "unedited", *names]
    assert len(answers.rows) == 6
    for name, row in zip(names, methods.rows[1:], strict=True):
        said = [answer[f"by {name}"] for answer in answers.rows]
        right = [text.startswith("✓") for text in said]
        assert row["held"] == f"{sum(right)} of 6"
        for answer, text, holds in zip(answers.rows, said, right, strict=True):
            assert (answer["target"] in text) >= holds
        assert (row.get("kl") is None) == (name == "prompt"), "the prompt changes no weights"
    assert f"memit: {methods.rows[1]['held']}" in study.shows
    (figure,) = study.figures
    assert {p.series for p in figure.points} == set(names[1:])


def test_methods_that_statistics_do_not_serve_are_absent(make_lab, tmp_path, monkeypatch):
    lab = make_lab("compare")
    check = lab.bench.check

    def refusing(plan):
        if plan.label == "memit":
            raise StatisticsError("these do not serve memit")
        check(plan)

    monkeypatch.setattr(lab.bench, "check", refusing)
    study = run_study(find_study("compare"), lab, tmp_path / "out")
    assert [row["arm"] for row in study.tables[0].rows][1:] == ["local", "alphaedit", "prompt"]
    assert "memit is absent: these do not serve memit" in study.notices
    lab = make_lab("compare", arms=["memit", "local"])
    monkeypatch.setattr(lab.bench, "check", refusing)
    with pytest.raises(StatisticsError, match="memit is absent"):
        run_study(find_study("compare"), lab, tmp_path / "none")


def test_a_method_that_is_left_alone_has_no_differences(make_lab, tmp_path, monkeypatch):
    """Whether it was named alone, or statistics serve no other."""
    lab = make_lab("compare", arms=["memit", "alphaedit"])
    check = lab.bench.check

    def refusing(plan):
        if plan.label == "memit":
            raise StatisticsError("these do not serve memit")
        check(plan)

    monkeypatch.setattr(lab.bench, "check", refusing)
    left = run_study(find_study("compare"), lab, tmp_path / "left")
    assert "memit is absent: these do not serve memit" in left.notices
    named = run_study(
        find_study("compare"), make_lab("compare", arms=["alphaedit"]), tmp_path / "named"
    )
    for study in (left, named):
        assert [table.name for table in study.tables] == ["methods", "answers"]
        assert [row["arm"] for row in study.tables[0].rows] == ["unedited", "alphaedit"]
        assert not study.figures


def test_statistics_are_checked_as_an_edit_would(make_lab, monkeypatch):
    lab = make_lab("compare")
    plan = lab.plan("alphaedit", lab.facts(6))
    lab.bench.check(plan)
    assert not (lab.bench.folder / "streams").exists()
    monkeypatch.setattr("nulledit.editing.session.find_statistics", lambda *_, **__: [])
    with pytest.raises(StatisticsError, match="no statistics"):
        lab.bench.check(plan)


def test_an_arm_may_name_its_block_by_place_and_be_a_recipe(tmp_path):
    scale, base = load_scale("small"), RECIPE.with_fields({"layers": [2, 5, 6]})
    places = [scale.recipe(base, arm).layers for arm in ("rome", "ft", "emmet", "memit")]
    assert places == [(5,), (5,), (6,), (2, 5, 6)]
    file = tmp_path / "mine.yaml"
    file.write_text(base.with_fields({"layers": [1], "method.name": "rome"}).to_yaml())
    assert scale.recipe(base, str(file)).layers == (1,)
    with pytest.raises(ConfigError, match=r"unknown arm 'rom'.*did you mean 'rome'"):
        scale.recipe(base, "rom")


@pytest.mark.parametrize(
    "change", [{"facts": -2}, {"batch_size": 0}, {"batch_size": -1}, {"ask_every": 0}, {"skip": -1}]
)
def test_settings_out_of_range_are_one_line(change, make_lab, tmp_path):
    with pytest.raises(ConfigError):
        run_study(find_study("table1"), make_lab("table1", **change), tmp_path / "out")
