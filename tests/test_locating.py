"""Causal tracing against the whole model run once for each restoration; what it suggests."""

import csv
import json

import pytest
import reference_tracing
import torch
import yaml
from support import world as w
from support.cli import done, refused
from support.locating import SPREAD, question
from support.models import MORE, build_model

from nulledit import Fact
from nulledit.config import Recipe
from nulledit.errors import ConfigError, FactError, ModelError
from nulledit.models.editable_model import EditableModel
from nulledit.tracing import TraceSettings, ask, locate, suggest, trace
from nulledit.tracing.trace import PLACES, noise_of, spread_of


def expected(model, q, settings, spread=SPREAD):
    width = model.get_input_embeddings().weight.shape[1]
    return reference_tracing.trace(
        model,
        q.ids,
        q.answer,
        subject=slice(q.first, q.last + 1),
        noise=settings.noise * spread * noise_of(q, width, settings).double(),
        window=settings.window,
    )


def check(model, q, settings):
    found = trace(model, q, settings, spread=SPREAD)
    clean, corrupted, effects = expected(model.model, q, settings)
    assert found.clean == pytest.approx(clean, abs=1e-9)
    assert found.corrupted == pytest.approx(corrupted, abs=1e-9)
    assert found.tokens == (*range(q.first, q.last + 1), len(q.ids) - 1)
    for kind in ("state", "mlp"):
        scale = effects[kind].abs().max()
        assert scale > 1e-5, "a restoration that does nothing proves nothing"
        apart = float((found.effects[kind] - effects[kind]).abs().max())
        assert apart < 1e-6 * scale + 2e-10, "Cohere's norms are float32 in any model: 1.6e-10"
    return found


@pytest.mark.few("llama", "gemma2", "mixtral")
@pytest.mark.parametrize("window", [1, 3])
def test_effects_equal_one_whole_run_a_restoration(architecture, window, tokenizer):
    model = EditableModel(build_model(architecture), tokenizer)
    check(model, question(), TraceSettings(draws=2, window=window))


@pytest.mark.few("llama", "gemma2", "mixtral")
@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 2), (5, 5)])
def test_wherever_the_subject_stands(architecture, first, last, tokenizer):
    model = EditableModel(build_model(architecture), tokenizer)
    check(model, question(first, last), TraceSettings(draws=1, window=2))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("falcon", {"alibi": True}),
        ("falcon", {"parallel_attn": False, "bias": True}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
        ("gemma2", {"sliding_window": 3}),
        ("gemma3_text", {"sliding_window": 3}),
        ("gpt_neo", {"window_size": 3}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("mistral", {"sliding_window": 3}),
        ("stablelm", {"use_parallel_residual": True}),
    ],
)
def test_other_members_of_the_families(kind, more, tokenizer, monkeypatch):
    """Attention that sees no further than three tokens, or that stands beside the MLP or before."""
    monkeypatch.setitem(MORE, kind, {**MORE.get(kind, {}), **more})
    model = EditableModel(build_model(kind), tokenizer)
    check(model, question(), TraceSettings(draws=2, window=2))


def test_effects_do_not_depend_on_what_runs_together(tokenizer):
    model = EditableModel(build_model("llama"), tokenizer)
    whole, parts = (
        trace(model, question(), TraceSettings(window=2, positions=n), spread=SPREAD)
        for n in (10_000, 1)
    )
    for kind in ("state", "mlp"):
        torch.testing.assert_close(whole.effects[kind], parts.effects[kind])


def test_the_model_is_as_before(tokenizer):
    model = build_model("gpt2").train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    asked = EditableModel(model, tokenizer)
    trace(asked, question(), TraceSettings(window=2), spread=SPREAD)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_read_at_the_end_is_whole(tokenizer):
    """After the last block, the prompt's last state is the answer's; others reach no answer."""
    model, q = EditableModel(build_model("gptj"), tokenizer), question()
    found = trace(model, q, TraceSettings(window=2), spread=SPREAD)
    assert float(found.effects["state"][-1, -1]) == found.clean - found.corrupted
    assert not found.effects["state"][:-1, -1].any()


def test_more_noise_draws_average(tokenizer):
    model, q = EditableModel(build_model("llama"), tokenizer), question()
    draws = [
        trace(model, q, TraceSettings(draws=n, window=2), spread=SPREAD).corrupted for n in (1, 2)
    ]
    assert draws[0] != draws[1]
    settings = TraceSettings(draws=2)
    assert torch.equal(noise_of(q, 16, settings)[:1], noise_of(q, 16, TraceSettings(draws=1)))
    other = TraceSettings(draws=2, seed=1)
    assert not torch.equal(noise_of(q, 16, settings), noise_of(q, 16, other))


def test_places_of_long_and_short_subjects(tokenizer):
    model = EditableModel(build_model("llama"), tokenizer)
    found = trace(model, question(1, 4), TraceSettings(window=2), spread=SPREAD)
    places = found.at_places("mlp")
    assert set(places) == set(PLACES)
    torch.testing.assert_close(places[PLACES[1]], found.effects["mlp"][1:3].mean(0))
    torch.testing.assert_close(places[PLACES[2]], found.effects["mlp"][3])
    for first, names in ((4, PLACES[2:]), (3, (PLACES[0], *PLACES[2:]))):
        short = trace(model, question(first, 4), TraceSettings(window=2), spread=SPREAD)
        assert set(short.at_places("state")) == set(names)


def test_windows_as_published():
    assert TraceSettings().size(48) == 10
    assert TraceSettings().size(30) == 6
    assert TraceSettings(window=3).blocks(0, 6) == range(2)
    assert TraceSettings(window=4).blocks(3, 6) == range(1, 5)
    assert TraceSettings(window=4).blocks(5, 6) == range(3, 6)
    for wrong in ({"draws": 0}, {"noise": -1}, {"window": -1}):
        with pytest.raises(ConfigError):
            TraceSettings(**wrong)


# -- which facts -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(worlds):
    return worlds("llama")


def known_facts(people, wrong=0):
    facts = [w.fact(p, r, w.another(p, r)) for p in people for r in w.RELATIONS]
    lies = [
        Fact(f.subject, f.prompt, f.old_answer, id=f.id, old_answer=f.target) for f in facts[:wrong]
    ]
    return lies + facts[wrong:]


def test_only_what_the_model_says_is_traced(world):
    model, words = world
    unnamed = Fact(w.PEOPLE[3], "{} speaks", "Quechua", id="unnamed")
    gone = Fact(w.PEOPLE[4], "{} speaks", w.answer(w.PEOPLE[4], "tongue"), id="gone", forget=True)
    ends = Fact(w.PEOPLE[5], "the river and {}", "Quechua", id="ends")
    facts = [*known_facts(w.PEOPLE[:2], wrong=2), unnamed, gone, ends]
    found = ask(EditableModel(model, words), facts)
    assert found.unknown == (facts[0].id, facts[1].id)
    assert found.at_the_end == ("ends",)
    assert (len(found.known), found.asked, found.unnamed) == (6, 8, 1)
    by_id = {q.fact_id: q for q in found.known}
    assert by_id["unnamed"].text == w.answer(w.PEOPLE[3], "tongue")
    assert by_id["gone"].text == w.answer(w.PEOPLE[4], "tongue")
    for q in found.known:
        said = model(torch.tensor([q.ids])).logits[0, -1].argmax()
        assert q.answer == int(said)
        assert words.decode(q.ids[q.first : q.last + 1]) in w.PEOPLE


def test_the_subject_begins_where_its_first_byte_does(tokenizer):
    model = EditableModel(build_model("llama"), tokenizer)
    for subject, prompt in (("東京", "The harbour of {} lies"), ("Émile", "{} was born in")):
        [q] = ask(model, [Fact(subject, prompt, "x")]).known
        text = tokenizer.decode(q.ids[q.first : q.last + 1]).strip()
        assert text == subject


def test_few_facts_are_refused_unless_asked(world):
    model = EditableModel(*world)
    facts = known_facts(w.PEOPLE[:1], wrong=1)
    with pytest.raises(FactError, match=r"2 of 3 facts.*at least 20"):
        locate(model, facts)
    with pytest.raises(FactError, match="1 of 2 facts"):
        locate(model, facts[:2], least=1)
    assert len(locate(model, facts, TraceSettings(window=1), least=2).traces) == 2


def test_the_world_is_found_where_it_was_put(world):
    """Its first two blocks move nothing between tokens: names are looked up at the subject."""
    model = EditableModel(*world)
    found = locate(model, known_facts(w.PEOPLE[:8]), TraceSettings(window=1))
    assert found.questions.asked == len(found.traces) == 24
    assert found.clean.mean > 0.8
    assert found.corrupted.mean < found.clean.mean
    means = {(e.kind, e.place, e.layer): e.rate.mean for e in found.effects()}
    total = found.clean.mean - found.corrupted.mean
    last, end = PLACES[2:]
    assert means["state", end, 0] == pytest.approx(0, abs=1e-6), "nothing has been moved yet"
    assert means["state", end, 1] == pytest.approx(0, abs=1e-6)
    assert means["state", end, 5] == pytest.approx(total)
    assert abs(means["mlp", last, 5]) < 1e-6
    assert all(e.rate.n == 24 for e in found.effects())
    assert spread_of(model, found.questions.known) == found.spread


# -- what is suggested -----------------------------------------------------------------------


def bump(peak, facts=30, depth=20, height=0.3, noise=0.02):
    torch.manual_seed(0)
    layers = torch.arange(depth)
    effects = height * torch.exp(-((layers - peak) ** 2) / 8.0)
    return effects + noise * torch.randn(facts, depth)


def test_five_layers_that_end_at_the_peak():
    found = suggest(bump(9), lowest=1)
    assert found.layers == (5, 6, 7, 8, 9)
    assert found.recipe_line == "layers: [5, 6, 7, 8, 9]"
    assert found.low <= found.peak <= found.high
    assert found.high - found.low <= 2
    assert suggest(bump(2), lowest=1).layers == (0, 1, 2)


def test_neither_windows_with_the_first_block_nor_the_last_count():
    assert suggest(bump(19), lowest=1).peak < 19
    effects = bump(9) + bump(0, height=5.0)
    assert suggest(effects, lowest=0).peak == 0
    assert suggest(effects, lowest=8).peak == 9
    settings = TraceSettings(window=6)
    lowest = settings.lowest(20)
    assert [0 in settings.blocks(i, 20) for i in (lowest - 1, lowest)] == [True, False]
    with pytest.raises(ValueError, match="no peak"):
        suggest(effects, lowest=19)


def test_no_layers_without_a_peak():
    found = suggest(bump(9, height=0.0, noise=1.0) - 1, lowest=1)
    assert found.layers == ()
    assert found.recipe_line == ""


def test_a_flat_trace_says_how_unsure_it_is():
    found = suggest(0.2 + 0.05 * bump(9, height=0.0, noise=1.0), lowest=1)
    assert found.layers
    assert found.high - found.low > 5


def test_a_window_must_leave_something_to_compare(world):
    model, facts = EditableModel(*world), known_facts(w.PEOPLE[:8])
    with pytest.raises(ConfigError, match="--window of at most 7"):
        locate(model, facts, TraceSettings(window=8))
    assert len(locate(model, facts[:2], TraceSettings(window=7, draws=1), least=2).traces) == 2
    short = EditableModel(build_model("llama", layers=2), world[1])
    with pytest.raises(ModelError, match="the model has 2, expected 3 or more"):
        locate(short, facts)


def test_a_model_that_could_not_be_edited_is_refused_before_it_is_asked(world, monkeypatch):
    """OPT with its norm after the sum: what is put back would be no state of the stream."""
    monkeypatch.setitem(MORE, "opt", {**MORE["opt"], "do_layer_norm_before": False})
    model = EditableModel(build_model("opt"), world[1])
    with pytest.raises(ModelError, match="enters the residual stream normed, not plain"):
        locate(model, [])


def test_what_is_not_finite_is_refused(world):
    model, facts = EditableModel(*world), known_facts(w.PEOPLE[:1])[:2]
    with pytest.raises(ConfigError, match=r"with noise 1e\+300 .* smaller --noise"):
        locate(model, facts, TraceSettings(noise=1e300), least=2)
    broken = build_model("llama")
    broken.lm_head.weight.data[0] = float("nan")
    model = EditableModel(broken, world[1])
    with pytest.raises(ModelError, match="logits are not finite: its weights"):
        trace(model, question(), TraceSettings(), spread=SPREAD)


# -- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("locate")
    model, words = world
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    facts = known_facts(w.PEOPLE[:8], wrong=3)
    (folder / "facts.json").write_text(json.dumps([f.to_dict() for f in facts]))
    return folder


def test_a_folder_with_all_that_was_promised(place, tmp_path):
    out = tmp_path / "trace"
    asked = ("locate", place / "model", place / "facts.json", "--out", out, "--quiet")
    said = done(*asked, "--window", "1").stdout
    assert "21 of 24 facts" in said
    assert "2301.04213" in said or "No layers are suggested" in said
    names = {"report.md", "heatmap.png", "heatmap.svg", "effects.csv", "facts.csv", "summary.json"}
    assert {p.name for p in out.iterdir()} == names
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["facts"]["known"], summary["facts"]["asked"]) == (21, 24)
    assert len(summary["facts"]["unknown"]) == 3
    assert summary["settings"] | {"draws": 3, "noise": 3.0, "window": 1} == summary["settings"]
    assert summary["seconds"]["cpu_per_fact"] > 0
    if summary["suggestion"]["layers"]:
        line = summary["suggestion"]["recipe_line"]
        assert line in (out / "report.md").read_text()
        assert Recipe.from_dict(yaml.safe_load(line)).layers
    with (out / "effects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 6, "two kinds, three places of two-token subjects, six layers"
    assert {row["n"] for row in rows} == {"21"}
    assert "is not empty" in refused(*asked)


def test_the_command_refuses_in_one_line(place, tmp_path, monkeypatch):
    asked = ("locate", place / "model", place / "facts.json", "--out", tmp_path / "t", "--quiet")
    assert "1 of 4 facts" in refused(*asked, "--limit", "4")
    assert "--window" in refused(*asked, "--window", "20")
    assert "noise is -1" in refused(*asked, "--noise", "-1")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "can't write in" in refused(*asked)
    monkeypatch.undo()
    assert not (tmp_path / "t").exists()
    few = json.loads(
        done(*asked, "--skip", "3", "--limit", "4", "--at-least", "4", "--json").stdout
    )
    assert few["facts"]["known"] == 4


def test_known_facts_are_read_and_nowhere_else(place, tmp_path):
    """ROME's known_1000 has an answer and nothing to write: `edit` must refuse it."""
    records = [
        {"known_id": i, "subject": f.subject, "attribute": f.old_answer, "prompt": f.prompt}
        | {"template": "", "prediction": "", "relation_id": "P1"}
        for i, f in enumerate(known_facts(w.PEOPLE[:2]))
    ]
    (tmp_path / "known.json").write_text(json.dumps(records))
    asked = ("locate", place / "model", tmp_path / "known.json", "--at-least", "2", "--draws", "1")
    found = json.loads(done(*asked, "--out", tmp_path / "t", "--quiet", "--json").stdout)
    assert found["facts"]["known"] == found["facts"]["asked"] == len(records) == 6
    assert found["facts"]["without_an_answer"] == 0
    asked = ("edit", tmp_path / "known.json", "--model", place / "model", "--out", tmp_path / "run")
    assert "only `nulledit locate` reads known facts" in refused(*asked, "--quiet")


def test_a_recipe_tells_the_layout(place, tmp_path):
    (tmp_path / "r.yaml").write_text("layout: {blocks: model.layers, mlp_out: mlp.c_missing}")
    asked = ("locate", place / "model", place / "facts.json", "--out", tmp_path / "t", "--quiet")
    assert "has no module mlp.c_missing" in refused(*asked, "--recipe", tmp_path / "r.yaml")
