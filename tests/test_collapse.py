"""The study of collapse: streams end where they break, and signs are judged on other facts."""

import dataclasses
import json
import math

import pytest
import torch
from support import world
from support.models import statistics_of

from nulledit.config import Recipe
from nulledit.errors import ConfigError
from nulledit.evaluation.hidden_norms import edit_rows
from nulledit.evaluation.reading import perplexity, read
from nulledit.report.study import read_study
from nulledit.studies.collapse import COLLAPSE
from nulledit.studies.context import Lab, Sources
from nulledit.studies.follow import follow
from nulledit.studies.registry import run_study
from nulledit.studies.results import Spot, divergence, growth, number, quantity
from nulledit.studies.scale import Scale
from nulledit.studies.signs import (
    AT_EDITS,
    ON_TEXT,
    SIGNS,
    Bounds,
    thresholds_of,
    warnings_on,
)
from nulledit.studies.stream import Stream, StreamPlan, Workbench

RECIPE = Recipe.from_dict(
    {
        "layers": [0, 1],
        "values": {"steps": 6, "learning_rate": 0.2, "weight_decay": 1.0, "clamp": 3.0},
        "contexts": {"texts": ["{}", "then he said . {}"]},
        "null_space": {"rule": "leakage", "value": 0.05},
        "method": {"l2": 1e-3},
    }
)
ARMS = {"own": {}, "wild": {"values.clamp": 100.0, "values.learning_rate": 10.0}}
SETTINGS = {
    "arms": ["wild", "own"],
    "facts": 9,
    "skip": 0,
    "batch_size": 3,
    "oldest": 4,
    "growth": 25,
    "loss": 50,
    "healthy_growth": 10,
    "healthy_loss": 20,
    "windows": 2,
}
NEVER = {"growth": 1e9, "loss": 1e3, "healthy_growth": 1e8, "healthy_loss": 999}
AT_ONCE = {"growth": 1e-9, "loss": 1e-9, "healthy_growth": 1e-10, "healthy_loss": 1e-10}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collapse")
    facts = [
        world.fact(person, relation, world.another(person, relation))
        for person in world.PEOPLE[:6]
        for relation in world.RELATIONS
    ]
    (folder / "facts.json").write_text(json.dumps([f.to_dict() for f in facts]))
    (folder / "text.txt").write_text("\n".join(world.sentences()))
    return Sources(facts=str(folder / "facts.json"), text=str(folder / "text.txt"))


@pytest.fixture
def make_lab(worlds, data, tmp_path, monkeypatch):
    known, words = worlds("llama")
    statistics = statistics_of(known, words, layers=(0, 1), lines=world.sentences())
    monkeypatch.setattr(
        "nulledit.editing.session.find_statistics", lambda *_, **__: iter([statistics])
    )

    def make(work="work", **changes):
        model = type(known)(known.config).eval()
        model.load_state_dict(known.state_dict())
        settings = {**SETTINGS, **changes}
        scale = Scale("small", ARMS, {"collapse": settings})
        bench = Workbench(model, words, tmp_path / work, name="")
        return Lab(bench, RECIPE, scale, settings, data)

    return make


FACTS = [world.fact(p, r, world.another(p, r)) for p in world.PEOPLE for r in world.RELATIONS]
PLAN = StreamPlan("made up", RECIPE, tuple(FACTS[:9]), 3)
UNEDITED = Spot(
    "unedited",
    found={
        AT_EDITS.name: [1.0, 1.0],
        ON_TEXT.name: [1.0, 1.0],
        "text": {"perplexity": {"value": 100.0}, "kl": None},
    },
)


def checkpoint(edits, *, room=1.0, norm=0.1, grown=0.1, text=0.0, oldest=1.0, perplexity=0.0):
    found = {
        "room": {"0": room},
        "norms": {"0": norm},
        AT_EDITS.name: [1 + grown, 1 + grown],
        ON_TEXT.name: [1 + text, 1 + text],
        "facts": {fact.id: {"efficacy_strict": oldest} for fact in PLAN.facts},
        "text": {
            "perplexity": {"value": None if perplexity is None else 100.0 + perplexity},
            "kl": None,
        },
    }
    return Spot("made up", edits, found, UNEDITED, PLAN)


BOUNDS = Bounds(25, 50, 10, 20, oldest=3)


def plans_of(lab):
    return COLLAPSE.parts[0].plans(lab)


def course(lab):
    """The first stream, asked along."""
    return follow(lab, COLLAPSE.parts[0]).arms[0]


# -- what counts as collapsed --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "broken", "well"),
    [
        (checkpoint(9), False, True),
        (checkpoint(9, perplexity=9.9), False, True),
        (checkpoint(9, perplexity=10.0), False, False),
        (checkpoint(9, perplexity=25.0), True, False),
        (checkpoint(9, perplexity=None), True, False),
        (checkpoint(9, perplexity=math.nan), True, False),
        (checkpoint(9, oldest=0.65), False, True),
        (checkpoint(9, oldest=0.64), False, False),
        (checkpoint(9, oldest=0.41), False, False),
        (checkpoint(9, oldest=0.40), True, False),
    ],
)
def test_collapse_is_counted_from_what_the_oldest_began_with(now, broken, well):
    first = checkpoint(3, oldest=0.8)
    if BOUNDS.held(now).mean == 1.0:
        now = dataclasses.replace(now, found={**now.found, "facts": first.found["facts"]})
    along = (first, now)
    assert (bool(BOUNDS.cause(along)), BOUNDS.well(along, now)) == (broken, well)


def test_a_threshold_is_the_sign_s_value_when_the_stream_was_last_well():
    first = (
        checkpoint(3, room=0.9, norm=0.2),
        checkpoint(6, room=0.8, norm=0.4, perplexity=5.0),
        checkpoint(9, room=0.7, norm=0.6, perplexity=15.0),
        checkpoint(12, room=0.6, norm=0.8, perplexity=30.0),
    )
    thresholds = thresholds_of(first, BOUNDS)
    assert thresholds["room"] == pytest.approx(80)
    assert thresholds["norm"] == pytest.approx(40)
    warned = {w["name"]: w for w in warnings_on(first, BOUNDS, thresholds)}
    room = warned["room"]
    assert (room["crossed"], room["before"]) == (9, 3), "at once after the last well"
    other = (
        checkpoint(3, room=0.75, norm=0.2),
        checkpoint(6, room=0.7, norm=math.nan),
        checkpoint(9, room=0.6, norm=0.3, perplexity=30.0),
    )
    warned = {w["name"]: w for w in warnings_on(other, BOUNDS, thresholds)}
    assert (warned["room"]["crossed"], warned["room"]["before"]) == (3, 6)
    assert (warned["norm"]["crossed"], warned["norm"]["before"]) == (6, 3), "not a number warns"
    assert (warned["at_edits"]["crossed"], warned["at_edits"]["before"]) == (None, None)


def test_a_stream_that_held_sets_no_threshold():
    held = (checkpoint(3), checkpoint(6))
    never_well = (checkpoint(3, perplexity=30.0),)
    for first in (held, never_well):
        thresholds = thresholds_of(first, BOUNDS)
        assert set(thresholds) == {s.name for s in SIGNS}
        assert set(thresholds.values()) == {None}
        assert all(w["crossed"] is None for w in warnings_on(held, BOUNDS, thresholds))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"growth": 0}, "growth is 0; expected a number of % above 0"),
        ({"loss": "half"}, "loss is 'half'"),
        ({"healthy_growth": 30}, "must lie below"),
        ({"healthy_loss": math.nan}, "healthy_loss is nan"),
        ({"oldest": 0}, "oldest is 0"),
        ({"oldest": True}, "oldest is True"),
    ],
)
def test_bad_settings_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        Bounds.of({**SETTINGS, **changes})


# -- streams -------------------------------------------------------------------------------------


def test_every_stream_has_records_of_its_own(make_lab):
    plans = plans_of(make_lab(arms=["own", "wild"]))
    questions = [fact.key for plan in plans for fact in plan.facts]
    assert len(set(questions)) == len(questions) == 18
    (alone,) = plans_of(make_lab(arms=["own"]))
    assert alone.facts == plans[0].facts, "an arm more does not change those before"
    labels = [plan.label for plan in plans_of(make_lab(arms=["own", "own"]))]
    assert len(set(labels)) == 2


def test_a_stream_ends_where_it_collapses(make_lab):
    whole = course(make_lab(arms=["wild"], **NEVER))
    assert [spot.at for spot in whole] == [3, 6, 9]
    assert not Bounds.of({**SETTINGS, **NEVER}).cause(whole)
    other = make_lab("other", arms=["wild"], **AT_ONCE)
    broken, bounds = course(other), Bounds.of(other.settings)
    assert bounds.collapsed(broken) == broken[-1].at < 9
    kept = other.bench.stream(broken[-1].plan)
    assert len(kept.editor.facts) == broken[-1].at, "nothing was edited after the collapse"
    assert [spot.found for spot in broken] == [spot.found for spot in whole[: len(broken)]]


def test_a_checkpoint_says_what_the_model_there_does(make_lab):
    lab = make_lab(arms=["own"], **NEVER)
    found = course(lab)[1]
    plan, windows = found.plan, lab.windows()
    with lab.bench.stream(plan).at(6) as editor:
        with editor.base_weights():
            before = read(editor.editable, windows, keep=True)
        after = perplexity(editor.editable, windows).value
        moved = read(editor.editable, windows, base=before).kl
        rows = edit_rows(editor.editable, plan.facts[:6])
        now = _norms(editor, rows)
    lab.bench.clear()
    base = perplexity(lab.bench.model, windows).value
    grown = now / _norms(lab.bench.base, rows) - 1
    assert growth(found) == pytest.approx(100 * (after / base - 1))
    assert divergence(found).mean == pytest.approx(moved.value)
    at_edits = next(sign.quantity for sign in SIGNS if sign.name == "at_edits")
    assert number(at_edits(found)) == pytest.approx(100 * float(grown.mean()), rel=1e-4)
    short = dataclasses.replace(plan, facts=plan.facts[:6])
    reports = make_lab("short", arms=["own"]).edited(short).editor.weights.reports()
    for report in reports:
        assert found.found["room"][str(report.layer)] == pytest.approx(report.room)
        share = found.found["norms"][str(report.layer)]
        assert share == pytest.approx(report.update_share, rel=1e-4)
    assert quantity("efficacy_strict")(found).n == 6
    assert Bounds.of(lab.settings).held(found).n == 4


@torch.no_grad()
def _norms(editor, rows):
    states = [
        editor.model(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0, -1]
        for row in rows
    ]
    return torch.stack(states).double().norm(dim=1)


def test_an_interrupted_stream_goes_on_to_the_same_numbers(make_lab, monkeypatch):
    def numbers(work):
        return [spot.found for spot in course(make_lab(work, arms=["wild"], **NEVER))]

    whole = numbers("whole")
    measure, asked = Stream.measure, []

    def stopping(self, facts, name, *args):
        asked.append(name)
        if len(asked) == 8:  # at the second checkpoint, after its batch
            raise KeyboardInterrupt
        return measure(self, facts, name, *args)

    monkeypatch.setattr(Stream, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        numbers("cut")
    monkeypatch.setattr(Stream, "measure", measure)
    assert numbers("cut") == whole

    def refuse(*_args, **_kwargs):
        raise AssertionError("edited again")

    monkeypatch.setattr("nulledit.editing.batch.BatchWriter.write", refuse)
    assert numbers("cut") == whole


def test_the_study_tells_who_set_the_thresholds_and_who_judged(make_lab, tmp_path):
    run_study(COLLAPSE, make_lab(growth=1.0, healthy_growth=0.999), tmp_path / "out")
    study = read_study(tmp_path / "out")
    table = study.tables[0]
    streams = list(dict.fromkeys(row["stream"] for row in table.rows))
    assert streams[0].endswith("(sets the thresholds)")
    assert streams[1].startswith("own")
    assert len(table.rows) == 2 * len(SIGNS)
    assert {t.name for t in study.tables} == {"warnings", "stream-1", "stream-2"}
    assert {f.name for f in study.figures} == {"signs", "outcomes"}
    assert "wild" in study.shows
    held = [n for n in study.notices if "had not collapsed" in n]
    assert len(held) == sum("no collapse" in row["cause"] for row in table.rows) // len(SIGNS)
