"""Tuning: facts that don't mix, an honest choice, a budget that holds, a recipe that reads back."""

import copy
import csv
import dataclasses
import json
import math
import shutil
import statistics
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner
from support.cli import MAKE_KEYS
from support.models import LINES, RECIPE, build_model, statistics_of

from nulledit import Editor, Fact, Probe
from nulledit.cli.main import cli
from nulledit.config import Recipe, load_recipe
from nulledit.errors import FactError, StatisticsError
from nulledit.evaluation.reading import Divergence
from nulledit.evaluation.runner import evaluate
from nulledit.methods import find_method
from nulledit.models.layouts import as_out_in
from nulledit.tuning import (
    Bench,
    Measured,
    Outcome,
    Search,
    TuneSettings,
    Untried,
    choose,
    difference,
    score,
    score_error,
    split_facts,
)
from nulledit.tuning.moves import moves, stages_of
from nulledit.tuning.search import BOUND, NO_TIME
from nulledit.tuning.split import Split

PLACES = ["London", "Ostrel", "Paris", "Velm"]
START = RECIPE.with_fields({"values.steps": 4})


def named(i, **more):
    return Fact(
        id=f"f{i}",
        subject=more.pop("subject", f"Karo {chr(65 + i % 26)}{i}"),
        prompt=more.pop("prompt", "{} works in the town of"),
        target=PLACES[i % 4],
        old_answer=PLACES[(i + 1) % 4],
        paraphrases=(f"The town of Karo {chr(65 + i % 26)}{i} is",),
        neighbours=(Probe(f"Ada {i} was born in", PLACES[(i + 2) % 4]),),
        **more,
    )


FACTS = [named(i) for i in range(24)]


# -- facts -----------------------------------------------------------------------------------


def test_sides_share_no_subject_and_hold_every_fact_once():
    facts = [
        *FACTS,
        *(named(i, prompt="{} lives in", subject=f"KARO  {chr(65 + i)}{i}") for i in range(6)),
    ]
    facts = [dataclasses.replace(f, id=f"g{i}") for i, f in enumerate(facts)]
    split = split_facts(facts)
    sides = [
        {" ".join(f.subject.casefold().split()) for f in s} for s in (split.tuning, split.report)
    ]
    assert not sides[0] & sides[1]
    assert {f.id for f in (*split.tuning, *split.report)} == {f.id for f in facts}
    assert abs(len(split.tuning) - len(split.report)) <= 2
    assert split.left_out == 0


def test_the_split_is_by_the_seed_and_not_by_the_file_s_order():
    def ids(split):
        return {f.id for f in split.tuning}, {f.id for f in split.report}

    assert ids(split_facts(FACTS)) == ids(split_facts(FACTS[::-1]))
    assert ids(split_facts(FACTS)) != ids(split_facts(FACTS, seed=1))
    some = split_facts(FACTS, count=20)
    assert (len(some.tuning), len(some.report), some.left_out) == (10, 10, 4)


def test_a_question_asked_twice_counts_once():
    twice = [*FACTS, dataclasses.replace(FACTS[0], id="again")]
    split = split_facts(twice)
    assert len(split.tuning) + len(split.report) == 24
    assert split.left_out == 1


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (FACTS[:19], "10 or more on each side"),
        ([], "0 facts to tune on"),
        ([named(i, subject="Ada") for i in range(30)], "of 30, apart by subject"),
        ([*FACTS, FACTS[0].forgotten()], "1 of 25 facts are to be forgotten"),
    ],
)
def test_too_few_facts_and_facts_to_forget_are_refused(facts, said):
    with pytest.raises(FactError, match=said):
        split_facts(facts)


# -- objective -------------------------------------------------------------------------------


def outcome(values, drift=(0.0, 0.0), **more):
    """Efficacy by fact; paraphrases and neighbours where given."""
    kinds = {"efficacy": values, **more}
    return Outcome({k: {f"f{i}": x for i, x in enumerate(v)} for k, v in kinds.items()}, drift)


def test_score_is_a_harmonic_mean_less_the_drift():
    it = outcome([1, 0.5], (0.02, 0.04), paraphrases=[0.5, 0.5], neighbours=[0.2, 0.6])
    assert score(it, 2.0) == pytest.approx(3 / (1 / 0.75 + 2 + 1 / 0.4) - 0.06)
    assert score(outcome([1, 1], neighbours=[0.5]), 2.0) == 1.0  # of one fact alone: not counted
    assert score(outcome([1, 1], (math.nan, 0.0))) == -math.inf


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [0.1, 0.9, 0.4, 0.7, 0.3]
    expected = statistics.stdev(values) / math.sqrt(5)
    assert score_error(outcome(values)) == pytest.approx(expected)
    drift = (0.01, 0.05, 0.02)
    one = [0.5] * 5
    expected = 2.0 * statistics.stdev(drift) / math.sqrt(3)
    assert score_error(outcome(one, drift), 2.0) == pytest.approx(expected)


def test_a_difference_is_paired():
    a, b = [0.1, 0.9, 0.4, 0.7], [0.0, 0.8, 0.3, 0.6]
    apart, error = difference(outcome(a), outcome(b))
    assert apart == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-12)  # though each alone is uncertain by 0.17
    gap = [x - y for x, y in zip(a, [0.3, 0.5, 0.4, 0.1], strict=True)]
    _, error = difference(outcome(a), outcome([0.3, 0.5, 0.4, 0.1]))
    assert error == pytest.approx(statistics.stdev(gap) / 2)


def test_of_a_tie_the_gentler_wins_and_of_equals_the_cheaper():
    strong = outcome([1, 1, 1, 0.8, 0.6], (0.010, 0.030))
    gentle = outcome([1, 1, 0.7, 0.9, 0.7], (0.001, 0.001))
    weak = outcome([0.2, 0.1, 0.3, 0.2, 0.1], (0.0, 0.0))
    apart, error = difference(strong, gentle, 0.1)
    assert 0 < apart < error
    assert choose([strong, gentle, weak], [1, 1, 1], 0.1) == 1  # the gentlest of all is no tie
    assert choose([gentle, strong, gentle], [3, 1, 2], 0.1) == 2
    assert choose([gentle, gentle], [1, 1]) == 0


def test_no_row_of_ties_leads_away_from_the_best():
    noise = [0.2, -0.2, 0.2, -0.2, 0.1, -0.1]
    row = [
        outcome([0.75 - 0.07 * i + (n if i % 2 else -n) for n in noise], (0.01 / (i + 1),) * 2)
        for i in range(6)
    ]
    for one, next_one in pairwise(row):
        apart, error = difference(one, next_one)
        assert apart < error
    taken = choose(row, [1] * 6)
    apart, error = difference(row[0], row[taken])
    assert apart == 0 or apart < error
    assert taken < 5


# -- moves -----------------------------------------------------------------------------------


def test_only_what_the_method_reads_is_varied():
    def stages(**changes):
        return stages_of(START.with_fields(changes))

    assert stages() == ("step size", "clamp", "layers", "threshold")
    assert stages(**{"method.name": "soft"}) == stages()
    assert "threshold" not in stages(**{"method.name": "memit"})
    assert find_method("ft").by_gradient
    assert stages(**{"method.name": "ft"})[0] == "layers"


def test_layers_stay_inside_the_model_and_given_ones_come_first():
    recipe = START.with_fields({"layers": [0, 1]})
    found = [m.recipe.layers for m in moves("layers", recipe, 4, [(2,)])]
    assert found == [(2,), (1, 2), (1,)]
    assert all(m.recipe != recipe for s in stages_of(recipe) for m in moves(s, recipe, 4))


def test_a_move_changes_one_coordinate():
    for stage, fields in {
        "step size": {"values.learning_rate", "values.steps"},
        "clamp": {"values.clamp"},
        "threshold": {"null_space.value"},
    }.items():
        found = list(moves(stage, START, 4))
        assert len(found) > 1
        for move in found:
            new, old = move.recipe.to_dict(), START.to_dict()
            for field in fields:
                part, name = field.split(".")
                old[part][name] = new[part][name]
            assert new == old


# -- measuring -------------------------------------------------------------------------------


@pytest.fixture
def editor(tokenizer, tmp_path):
    return Editor(
        build_model("llama"), tokenizer, recipe=START, seed=3, value_cache=tmp_path / "values"
    )


@pytest.fixture
def bench(editor, tokenizer):
    windows = [tokenizer(line)["input_ids"] for line in LINES]
    return Bench(editor, windows, statistics=statistics_of(editor.model, tokenizer))


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_measured_is_what_an_edit_does_and_nothing_of_it_stays(bench, editor, tokenizer):
    before = bits(editor.model)
    recipe = START.with_fields({"contexts": {"count": 2, "tokens": 3}})  # sampled by the seed
    found = bench.measure(recipe, FACTS[:6])
    assert all(torch.equal(before[n], t) for n, t in editor.model.state_dict().items())
    assert not editor.history.events
    assert editor.recipe == find_method("alphaedit").filled(START)

    plain = Editor(
        build_model("llama"),
        tokenizer,
        recipe=recipe,
        seed=3,
        statistics=statistics_of(build_model("llama"), tokenizer),
    )
    plain.edit(FACTS[:6], batch_size=6, shuffle=False)
    asked = evaluate(plain.editable, FACTS[:6], generate=False).rows()
    for fact in FACTS[:6]:
        row = asked[fact.id]
        for kind, name in (("efficacy", "efficacy"), ("paraphrases", "generalization")):
            share = (row[name] + row[f"{name}_tokens"]) / 2
            assert found.outcome.facts[kind][fact.id] == share
        assert found.outcome.facts["neighbours"][fact.id] == row["specificity"]
    shares = [layer.update_share for layer in plain.weights.reports()]
    assert found.update_share == pytest.approx(max(shares), rel=1e-9)

    # KL and perplexity, window by window, by the model's own forward pass.
    kl, losses = [], []
    with torch.no_grad():
        for line in LINES:
            ids = torch.tensor([tokenizer(line)["input_ids"]])
            base, now = (m(ids).logits[0, :-1].log_softmax(-1) for m in (editor.model, plain.model))
            kl.append(float((base.exp() * (base - now)).sum(-1).mean()))
            loss = [-x.gather(1, ids[0, 1:, None]).sum() for x in (base, now)]
            losses.append((*map(float, loss), ids.shape[1] - 1))
    assert found.outcome.drift == pytest.approx(kl, rel=1e-6)
    tokens = sum(n for *_, n in losses)
    growth = math.exp(sum(now - base for base, now, _ in losses) / tokens) - 1
    assert found.growth == pytest.approx(growth, rel=1e-6)
    each = sum(mean * n for mean, (*_, n) in zip(kl, losses, strict=True)) / tokens
    assert found.kl.value == pytest.approx(1000 * each, rel=1e-6)
    assert max(kl) > 1e-6  # there was something to measure


def test_values_are_kept_where_they_are_the_same(bench):
    first = bench.measure(START, FACTS[:4])
    assert first.optimised == 4
    assert first.passes >= 4
    same = {"null_space.value": 0.1}, {"layers": [2]}
    for changes in same:
        found = bench.measure(START.with_fields(changes), FACTS[:4])
        assert (found.optimised, found.passes) == (0, 0)
    assert bench.measure(START.with_fields({"values.clamp": 0.5}), FACTS[:4]).optimised == 4
    assert bench.measure(START, FACTS[:4]).outcome == first.outcome


def test_a_recipe_that_ruins_the_model_is_measured(bench, monkeypatch):
    """A growth too large for a float is infinite."""
    low = [loss - 1000 for loss in bench.base.losses]
    monkeypatch.setattr(bench, "base", dataclasses.replace(bench.base, losses=low))
    assert bench.measure(START, FACTS[:2]).growth == math.inf


def test_a_method_by_gradient_is_measured_without_values(bench):
    found = bench.measure(START.with_fields({"method.name": "ft", "method.steps": 2}), FACTS[:2])
    assert (found.optimised, found.passes, found.value_seconds) == (0, 0, 0.0)
    assert found.update_share > 0


def test_missing_statistics_leave_the_model_as_it_was(bench, editor, tokenizer):
    weight = as_out_in(editor.editable.mlp_out(1)).clone()
    bench.statistics = statistics_of(editor.model, tokenizer, layers=(1, 2))
    with pytest.raises(StatisticsError, match="nulledit stats make"):
        bench.measure(START.with_fields({"layers": [0, 1]}), FACTS[:4])
    assert torch.equal(as_out_in(editor.editable.mlp_out(1)), weight)
    assert bench.measure(START, FACTS[:4]).optimised == 4


# -- search ----------------------------------------------------------------------------------


class Made:
    """A bench of numbers: a best learning rate and clamp, a clock that every step moves."""

    depth = 10

    def __init__(self, best=2.0, clamp=0.5, missing=(), slow=1.0):
        self.best, self.clamp, self.missing, self.slow = best, clamp, missing, slow
        self.now, self.asked = 0.0, []
        self.kept = set()

    def clock(self):
        return self.now

    def measure(self, recipe, facts):
        if any(layer in self.missing for layer in recipe.layers):
            raise StatisticsError("no statistics: run `nulledit stats make`")
        self.asked.append((recipe, tuple(facts)))
        v = recipe.values
        off = abs(math.log2(v.learning_rate / self.best)) + 2 * abs(v.clamp - self.clamp)
        key = (v, recipe.layers[-1], facts)
        passes = 0 if key in self.kept else v.steps * len(facts)
        self.kept.add(key)
        seconds = 0.02 * self.slow * passes + 0.5 * len(facts)
        self.now += seconds
        values = {f.id: max(0.0, 0.9 - 0.1 * off) for f in facts}
        return Measured(
            Outcome({"efficacy": values}, (0.01, 0.01)),
            0.01,
            Divergence(10.0, 0.0, 0.3, 9),
            0.1,
            passes,
            len(facts) if passes else 0,
            seconds,
            0.02 * self.slow * passes,
            seconds,
        )

    def unedited(self, facts):
        self.now += 0.2 * len(facts)
        return Outcome({"efficacy": {f.id: 0.0 for f in facts}}, (0.0, 0.0))


SPLIT = Split(tuple(FACTS[:12]), tuple(FACTS[12:]))
FROM = Recipe.from_dict({"layers": [3, 4, 5], "values": {"steps": 20, "clamp": 0.75}})


def searched(bench, **settings):
    return Search(bench, SPLIT, TuneSettings(**settings), clock=bench.clock).run(FROM)


def test_the_search_finds_what_is_better_in_several_coordinates():
    found = searched(Made(), seconds=1e6)
    assert found.winner.recipe.values.learning_rate == 2.0
    assert found.winner.recipe.values.clamp == pytest.approx(0.5, abs=0.02)
    assert found.gain[0] > 0.2
    assert not found.untried
    names = [json.dumps(c.recipe.to_dict(), sort_keys=True) for c in found.candidates]
    assert len(set(names)) == len(names)
    first = list(dict.fromkeys(c.stage for c in found.candidates))
    assert first == ["", "step size", "clamp", "layers", "threshold"]


def test_nothing_is_chosen_by_the_report_facts_and_the_winner_is_judged_once():
    bench = Made()
    found = searched(bench, seconds=1e6)
    sides = [facts for _, facts in bench.asked]
    assert bench.asked[1] == (FROM, SPLIT.report)
    assert bench.asked[-1] == (found.winner.recipe, SPLIT.report)
    assert sides[:1] + sides[2:-1] == [SPLIT.tuning] * len(found.candidates)
    # Whatever the report facts say, the same is chosen.
    other = Search(Made(), Split(SPLIT.tuning, tuple(FACTS[:2])), TuneSettings(seconds=1e6))
    assert other.run(FROM).winner.recipe == found.winner.recipe


@pytest.mark.parametrize("seconds", [60, 90, 120, 150, 200])
def test_the_budget_holds(seconds):
    bench = Made()
    found = searched(bench, seconds=seconds)
    assert bench.now <= seconds
    assert found.seconds == bench.now
    assert len(found.candidates) > (seconds > 80)
    assert {u.reason for u in found.untried} == {NO_TIME}
    more = searched(Made(), seconds=seconds + 100)
    assert len(more.candidates) > len(found.candidates)


def test_what_there_was_no_time_for_is_said_and_cheaper_ones_are_tried_still():
    bench = Made(slow=20)
    found = searched(bench, seconds=700)
    assert bench.now <= 700
    assert found.untried
    tried = {c.label for c in found.candidates}
    assert not tried & {u.label for u in found.untried}
    assert "layers 4-5" in tried  # on kept values


def test_a_bound_by_number_and_a_budget_too_small():
    found = searched(Made(), seconds=1e6, candidates=2)
    assert len(found.candidates) == 3
    assert {u.reason for u in found.untried} == {BOUND}
    bare = searched(Made(), seconds=0.1)
    assert len(bare.candidates) == 1
    assert bare.chosen == 0
    assert bare.judged is bare.started


def test_candidates_without_statistics_are_left_out_with_the_command():
    found = searched(Made(missing=(2, 6, 7)), seconds=1e6)
    lacking = [u for u in found.untried if "nulledit stats make" in u.reason]
    assert {u.label for u in lacking} >= {"layers 4-6", "layers 2-4", "layers 2-5"}
    with pytest.raises(StatisticsError):
        searched(Made(missing=(5,)), seconds=1e6)


def test_every_candidate_is_told():
    told = []
    search = Search(Made(), SPLIT, TuneSettings(candidates=1), tell=lambda d, at: told.append(d))
    found = search.run(FROM)
    assert [d for d in told if not isinstance(d, Untried)] == list(found.candidates)
    assert [d for d in told if isinstance(d, Untried)] == list(found.untried)


# -- the command -----------------------------------------------------------------------------


def invoke(*words):
    return CliRunner().invoke(cli, [str(w) for w in words])


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a tiny model, its statistics, a recipe and facts."""
    folder = tmp_path_factory.mktemp("tune")
    build_model("llama", dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "corpus.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    (folder / "start.yaml").write_text(START.to_yaml(), encoding="utf-8")
    records = [fact.to_dict() for fact in FACTS]
    (folder / "facts.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "few.json").write_text(json.dumps(records[:12]), encoding="utf-8")
    made = invoke(
        *(*MAKE_KEYS, folder / "model", "--text", folder / "corpus.txt"),
        *("--layers", "0-2", "--window", "64", "--out", folder / "stats", "--quiet"),
    )
    assert made.exit_code == 0, made.stderr
    return folder


def options(place):
    return ("--start", place / "start.yaml", "--stats", place / "stats", "--quiet")


def test_the_recipe_reads_back_and_gives_what_the_report_says(place, tmp_path):
    out = tmp_path / "tuned.yaml"
    (tmp_path / "summary.json").write_text('{"suggestion": {"layers": [0, 1, 2]}}')
    result = invoke(
        *("tune", place / "model", place / "facts.json", "--out", out, *options(place)),
        *("--candidates", "3", "--minutes", "60", "--seed", "1", "--layers", "1", "--json"),
        *("--trace", tmp_path),
    )
    assert result.exit_code == 0, result.stderr or result.exception
    told = json.loads(result.stdout)
    recipe = load_recipe(out)
    assert recipe.to_dict() == told["recipe"]
    with (tmp_path / "tuned.tune.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["facts"] for r in rows][:4] == ["tuning"] * 4
    assert not set(told["facts"]["tuning"]) & set(told["facts"]["report"])
    page = (tmp_path / "tuned.tune.md").read_text(encoding="utf-8")
    for id_ in (*told["facts"]["tuning"], *told["facts"]["report"]):
        assert f"- {id_}: " in page
    for candidate in told["candidates"]:
        assert f"| {candidate['changed']} |" in page
    for untried in told["not_tried"]:
        assert untried["label"] in page
    assert {"layers 1", "layers 0-2"} <= {untried["label"] for untried in told["not_tried"]}

    edited = Editor.from_pretrained(
        str(place / "model"), recipe=out, statistics=place / "stats", seed=1
    )
    asked = [f for f in FACTS if f.id in told["facts"]["report"]]
    asked.sort(key=lambda f: told["facts"]["report"].index(f.id))
    edited.edit(asked, batch_size=len(asked), shuffle=False)
    rows = evaluate(edited.editable, asked, generate=False).rows()
    mean = statistics.fmean(rows[f.id]["specificity"] for f in asked)
    assert told["report"]["chosen"]["neighbours"] == pytest.approx(mean)
    shares = [(rows[f.id]["efficacy"] + rows[f.id]["efficacy_tokens"]) / 2 for f in asked]
    assert told["report"]["chosen"]["efficacy"] == pytest.approx(statistics.fmean(shares))


def test_a_chat_model_is_tuned_in_its_template(place, tmp_path, tokenizer):
    shutil.copytree(place / "model", tmp_path / "model")
    words = copy.deepcopy(tokenizer)
    words.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    words.save_pretrained(tmp_path / "model")
    result = invoke(
        *("tune", tmp_path / "model", place / "facts.json", "--out", tmp_path / "tuned.yaml"),
        *(*options(place), "--chat", "--candidates", "1"),
    )
    assert result.exit_code == 0, result.stderr or result.exception
    assert load_recipe(tmp_path / "tuned.yaml").chat is not None
    for part in ("Candidates, in their order", "─────", f"Recipe: {tmp_path / 'tuned.yaml'}"):
        assert part in result.stdout, "sentences, tables and where they are"


def test_the_same_seed_tunes_the_same(place, tmp_path):
    found = []
    for name in ("a", "b"):
        result = invoke(
            *("tune", place / "model", place / "facts.json", "--out", tmp_path / f"{name}.yaml"),
            *(*options(place), "--candidates", "2", "--json"),
        )
        told = json.loads(result.stdout)
        for row in told["candidates"]:
            del row["seconds"], row["cpu_seconds"]
        found.append((told["candidates"], told["chosen"], told["facts"]))
    assert found[0] == found[1]


def test_what_tune_refuses_in_one_line(place, tmp_path):
    (tmp_path / "there.yaml").write_text("kept")
    (tmp_path / "half.tune.md").write_text("kept")
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "summary.json").write_text('{"suggestion": {"layers": []}}')
    out = ("--out", tmp_path / "new.yaml", *options(place))
    facts, model = place / "facts.json", place / "model"
    cases = {
        "10 or more on each side": (place / "few.json", *out),
        "each side; give more": (facts, *out, "--facts", "19"),
        "there already": (facts, "--out", tmp_path / "there.yaml"),
        "half.tune.md: is there": (facts, "--out", tmp_path / "half.yaml"),
        "ends in .yaml": (facts, "--out", tmp_path / "recipe"),
        "out of range": (facts, *out, "--layers", "2-9"),
        "is the model's last": (facts, *out, "--layers", "3"),
        "expected numbers": (facts, *out, "--layers", "x"),
        "suggests no layers": (facts, *out, "--trace", tmp_path / "trace"),
        "no such file": (facts, *out, "--trace", tmp_path / "nowhere"),
        "expected a yaml file, or default, gemma3-270m": (facts, *out, "--start", "nothing"),
        "--text nothing: no such": (facts, *out, "--text", "nothing"),
        "Invalid value for '--minutes'": (facts, *out, "--minutes", "0"),
        "none.json: no such file": (tmp_path / "none.json", *out),
    }
    for said, words in cases.items():
        result = invoke("tune", model, *words)
        assert result.exit_code == 2, (said, result.output, result.exception)
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert said.lower() in lines[0].lower()
    assert not (tmp_path / "new.yaml").exists()
    assert (tmp_path / "there.yaml").read_text() == "kept"
