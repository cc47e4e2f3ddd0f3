"""Evaluation against slow, plain computations of the same numbers."""

import json
import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from nulledit import Editor, Fact, Probe
from nulledit.errors import FactError, StatisticsError
from nulledit.evaluation import (
    Query,
    Rate,
    Score,
    contains,
    evaluate,
    generate_answers,
    paired_bootstrap,
    perplexity,
    preservation_error,
    preservation_report,
    queries_of,
    rates,
    read_windows,
    score,
    shipped_corpus,
    shipped_text,
)
from nulledit.evaluation import perplexity as perplexity_function
from nulledit.evaluation.generation import answer_room
from nulledit.evaluation.stats import growth_of, paired_interval, power_of, rank_correlation
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in
from nulledit.models.tokens import RowEncoder
from nulledit.runs.measure import check_lengths
from nulledit.statistics.collect import key_moments

ADA = Fact(
    id="ada",
    subject="Ada Byron",
    prompt="The mother tongue of {} is",
    target="Velmish",
    old_answer="English",
    paraphrases=("{} speaks", "At home, in London, {} speaks the language"),
    neighbours=(
        Probe("The mother tongue of Karo Dun is", "English"),
        Probe("People in Velm speak", "velmish"),
        Probe("The winters are"),
    ),
)
KARO = Fact(id="karo", subject="Karo Dun", prompt="{} works as a", target="sailor in London")


@pytest.fixture
def model(tiny_model, family, tokenizer):
    return EditableModel(tiny_model(family), tokenizer)


@pytest.fixture
def llama(tiny_model, tokenizer):
    return EditableModel(tiny_model("llama"), tokenizer)


@pytest.fixture
def rel(family):
    """GPT-J computes its attention in float32 whatever its weights are."""
    return 1e-6 if family == "gptj" else 1e-10


@pytest.fixture
def editor(tiny_model, tokenizer, recipe, make_statistics):
    model = tiny_model("llama")
    return Editor(model, tokenizer, recipe=recipe, statistics=make_statistics(model))


def losses(model, ids):
    """Loss of each token of one row but the first, and the likeliest token in its place."""
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).logits[0, :-1]
    log_probabilities = logits.log_softmax(-1)
    return -log_probabilities[range(len(ids) - 1), ids[1:]], logits.argmax(-1)


def plain_score(model, prompt, answer):
    ids = model.tokenizer(f"{prompt} {answer}")["input_ids"]
    n = len(ids) - len(model.tokenizer(prompt)["input_ids"])
    nll, best = losses(model, ids)
    hits = [a == b for a, b in zip(best[-n:].tolist(), ids[-n:], strict=True)]
    return float(nll[-n:].mean()), sum(hits) / n


def made(fact_id, kind, preferred, strict, tokens=None):
    query = Query(fact_id, kind, "prompt", "answer", None if preferred is None else "other")
    tokens = float(strict) if tokens is None else tokens
    return Score(query, 1.0, None if preferred is None else 2.0, preferred, strict, tokens)


def test_a_fact_is_asked_about_as_counterfact_does():
    efficacy, first, second, same, target = queries_of(ADA)
    assert efficacy == Query(
        "ada", "efficacy", "The mother tongue of Ada Byron is", "Velmish", "English"
    )
    assert (first.kind, first.prompt, first.other) == (
        "generalization",
        "Ada Byron speaks",
        "English",
    )
    assert second.prompt == "At home, in London, Ada Byron speaks the language"
    assert (same.kind, same.answer, same.other) == ("specificity", "English", "Velmish")
    assert (target.answer, target.other) == ("velmish", None)
    assert queries_of(KARO) == (
        Query("karo", "efficacy", "Karo Dun works as a", "sailor in London", None),
    )


def test_scores_are_those_of_the_whole_model_one_row_at_a_time(model, rel):
    queries = [query for fact in (ADA, KARO) for query in queries_of(fact)]
    model.model.train()
    for item in score(model, queries):
        model.model.eval()
        query = item.query
        nll, tokens = plain_score(model, query.prompt, query.answer)
        assert item.answer_nll == pytest.approx(nll, rel=rel)
        assert item.tokens == tokens
        assert item.strict == (tokens == 1)
        if query.other is None:
            assert item.other_nll is None
            assert item.preferred is None
        else:
            other, _ = plain_score(model, query.prompt, query.other)
            assert item.other_nll == pytest.approx(other, rel=rel)
            assert item.preferred == (nll < other)


def test_scoring_leaves_the_model_as_it_was(tiny_model, tokenizer):
    model = EditableModel(tiny_model("gpt2").train(), tokenizer)
    queries = queries_of(ADA)
    first = score(model, queries)
    assert model.model.training
    assert all(p.requires_grad and p.grad is None for p in model.model.parameters())
    assert first == score(model, queries)  # no dropout


def test_scores_depend_neither_on_the_chunk_nor_on_other_rows(model, rel):
    padded = EditableModel(model.model, model.tokenizer)
    padded.pad_id = 7
    queries = [query for fact in (ADA, KARO) for query in queries_of(fact)]
    whole = score(model, queries)
    for other in (
        score(padded, queries),
        score(padded, queries, positions=1),
        score(model, queries, positions=40),
        [score(model, [query])[0] for query in queries],
        score(model, queries[::-1])[::-1],
    ):
        for a, b in zip(whole, other, strict=True):
            assert (a.query, a.preferred, a.tokens) == (b.query, b.preferred, b.tokens)
            assert a.answer_nll == pytest.approx(b.answer_nll, rel=rel)
            assert (a.other_nll or 0) == pytest.approx(b.other_nll or 0, rel=rel)


def test_strict_means_every_token_is_the_likeliest(model, tokenizer):
    """An answer made of what the model says itself is strict; with a token changed it is not."""
    prompt = tokenizer("The river flows to the")["input_ids"]
    ids = list(prompt)
    for _ in range(3):
        _, best = losses(model, [*ids, 0])
        ids.append(int(best[-1]))

    class Given(RowEncoder):
        def encode(self, text, **more):
            row = super().encode(text, **more)
            answer = ids[len(prompt) :] if more["target"] == "own" else [*ids[len(prompt) : -1], 5]
            return type(row)((*prompt, *answer), -1, len(prompt))

    queries = [
        Query("a", "efficacy", "The river flows to the", answer, None) for answer in ("own", "not")
    ]
    scores = score(model.asked(Given(tokenizer, max_length=128)), queries, positions=8)
    assert [item.strict for item in scores] == [True, ids[-1] == 5]
    assert [item.tokens for item in scores] == [1, 1 if ids[-1] == 5 else pytest.approx(2 / 3)]


def test_a_token_in_front_of_texts_is_not_scored(tiny_model, tokenizer):
    """The published zsRE code counts it as a target's token where the tokenizer adds one."""
    model = tiny_model("llama")
    fronted = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<|end|>",
    )
    fronted.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    query = Query("a", "efficacy", "The river flows to the", "sea of English", None)
    (item,) = score(EditableModel(model, fronted), [query])
    target = tokenizer(" sea of English")["input_ids"]
    hits = []
    for i in range(len(target)):
        text = query.prompt + tokenizer.decode(target[:i])
        ids = fronted(text)["input_ids"]
        assert ids[0] == 0
        with torch.no_grad():
            hits.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()) == target[i])
    assert item.tokens == sum(hits) / len(hits)


def test_an_input_that_begins_another_is_not_run_by_itself(llama, tokenizer):
    ran, run = [], llama.run_normed
    llama.run_normed = lambda batch: (ran.extend(batch.mask.sum(1).tolist()), run(batch))[1]
    ends = []
    queries = [Query("a", "efficacy", "The river", "is English", "is English Velmish")] * 3
    first, *_ = score(llama, queries, progress=lambda *n: ends.append(n))
    assert ran == [len(tokenizer("The river is English Velmish")["input_ids"]) - 1]
    assert ends == [(2, 2)]
    plain = plain_score(llama, "The river", "is English")
    assert (first.answer_nll, first.tokens) == (pytest.approx(plain[0]), plain[1])
    assert score(llama, []) == []


def test_a_prompt_too_long_names_its_fact(llama, tokenizer):
    narrow = llama.asked(RowEncoder(tokenizer, max_length=4))
    with pytest.raises(FactError, match=r"fact 'ada', efficacy: prompt of \d+ tokens"):
        score(narrow, queries_of(ADA))


def test_a_broken_model_prefers_nothing(llama):
    with torch.no_grad():
        llama.model.model.norm.weight.fill_(math.nan)
    scores = score(llama, queries_of(ADA))
    assert not any(item.preferred or item.strict or item.tokens for item in scores)
    found = perplexity(llama, [[1, 2, 3], [3, 4]])
    assert math.isnan(found.value)


def test_rates_are_means_over_facts_of_the_facts_own_means():
    scores = [
        made("a", "specificity", True, True),
        made("a", "specificity", True, False),
        made("a", "specificity", False, False),
        made("a", "specificity", None, False),
        made("b", "specificity", False, True),
        made("c", "specificity", None, True),
    ]
    found = rates(scores)
    per_fact = [2 / 3, 0.0]  # c has no preference, and a's fourth has none
    assert found["specificity"] == Rate(
        pytest.approx(1 / 3), pytest.approx(statistics.stdev(per_fact) / math.sqrt(2)), 2
    )
    strict = [1 / 4, 1.0, 1.0]
    assert found["specificity_strict"].mean == pytest.approx(0.75)
    spread = sum((x - 0.75) ** 2 for x in strict) / 2
    assert found["specificity_strict"].standard_error == pytest.approx(math.sqrt(spread / 3))
    assert found["specificity_strict"].n == 3
    parts = [made("a", "efficacy", None, False, 0.25), made("b", "efficacy", None, True)]
    assert rates(parts)["efficacy_tokens"] == Rate(0.625, pytest.approx(0.375), 2)


def test_what_the_facts_lack_is_none():
    found = rates([made("a", "efficacy", None, True)])
    assert found["efficacy_strict"].mean == 1
    assert math.isnan(found["efficacy_strict"].standard_error)
    absent = set(found) - {"efficacy_strict", "efficacy_tokens"}
    assert len(absent) == 7
    assert all(found[name] is None for name in absent)
    with pytest.raises(ValueError, match="at least one"):
        Rate.of([])


def test_generation_in_batches_is_generation_one_at_a_time(model, tokenizer):
    prompts = [
        "The river",
        "Because the harbour of Velm lies on the coast, people there",
        "Ada Byron",
        "I know that Karo Dun works as a",
    ]
    state = (tokenizer.padding_side, tokenizer.pad_token, model.model.generation_config.to_dict())
    alone = [generate_answers(model, [prompt])[0] for prompt in prompts]
    ends = []
    assert alone == generate_answers(
        model, prompts, batch_size=3, progress=lambda *counts: ends.append(counts)
    )
    assert ends == [(3, 4), (4, 4)]
    assert state == (
        tokenizer.padding_side,
        tokenizer.pad_token,
        model.model.generation_config.to_dict(),
    )
    for prompt, answer in zip(prompts, alone, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(12):
            _, best = losses(model, [*ids, 0])
            if int(best[-1]) == 0:
                break
            ids.append(int(best[-1]))
        assert answer == tokenizer.decode(ids[start:]).split("\n")[0].strip()
    assert len(set(alone)) > 1


def test_each_answer_gets_its_own_room_whatever_runs_beside_it(model):
    prompts, room = ["The river", "Ada Byron", "I know that Karo Dun works as a"], [3, 20, 8]
    together = generate_answers(model, prompts, max_new_tokens=room)
    for prompt, most, answer in zip(prompts, room, together, strict=True):
        assert [answer] == generate_answers(model, [prompt], max_new_tokens=most)


def test_an_answer_that_fits_the_context_once_is_let_in(tokenizer):
    """Its room is for saying it, not for scoring it and saying it, too."""
    fact = Fact(id="velm", subject="Velm", prompt="{} is a", target="river " * 40)
    asked = SimpleNamespace(encoder=RowEncoder(tokenizer, max_length=128))
    editor = SimpleNamespace(editable=asked)
    room = answer_room(asked.encoder, fact)
    assert 128 // 2 < room < 120
    check_lengths(editor, [fact])
    asked.encoder = RowEncoder(tokenizer, max_length=room)
    with pytest.raises(FactError, match=f"velm, efficacy: .* no room for an answer of {room}"):
        check_lengths(editor, [fact])


def test_a_long_target_can_be_said_whole(tokenizer):
    """And so can an old answer, or another one that is accepted."""
    encoder, long = RowEncoder(tokenizer, max_length=128), ("river and valley " * 12).strip()
    own = tokenizer(" " + long, add_special_tokens=False)["input_ids"]
    fact = Fact(subject="Velm", prompt="{} is a", target="river")
    assert answer_room(encoder, fact) == 12
    for longer in ({"target": long}, {"old_answer": long}, {"target_aliases": (long,)}):
        assert answer_room(encoder, replace(fact, **longer)) >= len(own) > 12


def test_generation_is_greedy_whatever_the_checkpoint_asks_for(llama):
    plain = generate_answers(llama, ["The river", "Ada"])
    own = llama.model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty = True, 50.0, 9.0
    own.no_repeat_ngram_size = 1
    assert generate_answers(llama, ["The river", "Ada"]) == plain
    assert llama.model.generation_config is own
    assert generate_answers(llama, []) == []
    with pytest.raises(FactError, match="no room for an answer of 100"):
        generate_answers(llama, ["river " * 60], max_new_tokens=100)


def test_an_answer_stops_at_its_first_newline_and_at_the_end_token(llama, tokenizer):
    said = tokenizer(" London.\n Paris")["input_ids"]

    def generate(input_ids, **_):
        return torch.cat([input_ids, torch.tensor([said] * len(input_ids))], 1)

    llama.model.generate = generate
    assert generate_answers(llama, ["In"]) == ["London."]
    said = [*tokenizer(" London")["input_ids"], 0, *tokenizer(" Paris")["input_ids"]]
    assert generate_answers(llama, ["In"]) == ["London"]


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("the city of Paris, in France", "Paris", True),
        ("PARIS", "paris", True),
        ("parisian life", "Paris", False),
        ("in comparison, and in Paris", "Paris", True),
        ("Saint-Pierre  and\tMiquelon", "saint pierre and miquelon", True),
        ("“O’Brien”", "O'Brien", True),
        ("Straße", "STRASSE", True),
        ("ｆｕｌｌ ｗｉｄｔｈ", "full width", True),
        ("cafe\u0301 noir", "café", True),
        ("1969", "196", False),
        ("東京都に住んで", "東京", True),
        ("これはIBMの製品", "IBM", True),
        ("서울은 큰", "서울", True),
        ("อยู่ในกรุงเทพมหานคร", "กรุงเทพ", True),
        ("C++", "C", False),
        ("", "Paris", False),
        ("Paris", "", False),
        ("wait ...", "...", True),
    ],
)
def test_containment(text, target, expected):
    assert contains(text, target) is expected


def test_perplexity_is_that_of_the_whole_model_one_window_at_a_time(
    model, tokenizer, monkeypatch, rel
):
    ids = tokenizer("Because the harbour of Velm lies on the coast, people speak Velmish. " * 4)
    ids = ids["input_ids"]
    windows = [ids[:20], ids[20:37], ids[37:60], ids[5:7], [3]]
    plain = [losses(model, w)[0] for w in windows[:4]]
    sums = torch.stack([x.sum() for x in plain])
    tokens = torch.tensor([len(x) for x in plain]).double()
    mean = sums.sum() / tokens.sum()
    error = ((sums - mean * tokens) ** 2).sum().mul(4 / 3).sqrt() / tokens.sum()
    found = perplexity(model, windows)
    assert found.value == pytest.approx(float(mean.exp()), rel=rel)
    assert found.standard_error == pytest.approx(float(mean.exp() * error), rel=rel)
    assert found.tokens == 19 + 16 + 22 + 1
    monkeypatch.setitem(perplexity_function.__globals__, "POSITIONS", 1)
    monkeypatch.setattr("nulledit.evaluation.scores.LOGIT_POSITIONS", 3)
    assert perplexity(model, windows).value == pytest.approx(found.value)
    assert math.isnan(perplexity(model, windows[:1]).standard_error)
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(model, [[3]])


def test_the_standard_error_of_equal_windows_is_that_of_their_mean(tiny_model, tokenizer):
    windows = torch.randint(1, 400, (6, 9), generator=torch.manual_seed(0)).tolist()
    model = EditableModel(tiny_model("gpt2"), tokenizer)
    means = [float(losses(model, window)[0].mean()) for window in windows]
    found = perplexity(model, windows)
    expected = found.value * statistics.stdev(means) / math.sqrt(6)
    assert found.standard_error == pytest.approx(expected)


def test_windows_are_cut_from_the_text_as_one_stream(tokenizer, tmp_path):
    text = "The river flows to the sea.\n \n\nPeople speak Velmish there.\n" * 40
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    ids = tokenizer(text)["input_ids"]
    full = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    assert read_windows(file, tokenizer, windows=3, window=16) == full[:3]
    assert read_windows(file, tokenizer, windows=10**4, window=16) == full
    with pytest.raises(StatisticsError, match="less text"):
        read_windows(file, tokenizer, window=len(ids) + 1)


def test_windows_begin_as_the_tokenizer_begins_texts(tokenizer, tmp_path):
    class Beginning:
        def __call__(self, text, add_special_tokens=True, **more):
            ids = tokenizer(text)["input_ids"]
            return {"input_ids": [0, *ids, 0] if add_special_tokens else ids}

    file = tmp_path / "text.txt"
    file.write_text("The river flows to the sea.\n" * 20, encoding="utf-8")
    ids = tokenizer(file.read_text())["input_ids"]
    windows = read_windows(file, Beginning(), windows=2, window=9)
    assert windows == [[0, *ids[:8]], [0, *ids[8:16]]]


def test_preservation_is_the_ratio_of_norms_on_explicit_keys():
    generator = torch.manual_seed(1)
    W, D = torch.randn(2, 5, 8, dtype=torch.float64, generator=generator)
    windows = list(torch.randn(6, 5, 8, dtype=torch.float64, generator=generator))
    K = torch.cat(windows).mT
    error, standard_error = preservation_error(W, W + D, windows)
    assert error == pytest.approx(float((D @ K).norm() / (W @ K).norm()), rel=1e-12)
    assert preservation_error(W, W, windows) == (0, 0)
    assert all(math.isnan(x) for x in preservation_error(W, W + D, [torch.zeros(3, 8)]))
    assert math.isnan(preservation_error(W, W + D, windows[:1])[1])
    # the delta method against leaving one window out in turn
    left = [preservation_error(W, W + D, windows[:i] + windows[i + 1 :])[0] for i in range(6)]
    spread = 5 / 6 * sum((x - sum(left) / 6) ** 2 for x in left)
    assert standard_error == pytest.approx(spread**0.5, rel=0.2)


def test_the_report_is_the_ratio_on_the_base_models_own_keys(
    family, tiny_model, tokenizer, recipe, make_statistics, facts
):
    model = tiny_model(family)
    editor = Editor(model, tokenizer, recipe=recipe, statistics=make_statistics(model))
    windows = [tokenizer(f"{name} went to the sea in winter")["input_ids"] for name in "ABC"]
    keys = {layer: [] for layer in recipe.layers}
    for window in windows:
        with editor.editable.reading_keys(recipe.layers) as found, torch.no_grad():
            model(torch.tensor([window]))
        for layer in recipe.layers:
            keys[layer].append(found[layer][0].mT)
    base = {layer: as_out_in(editor.editable.mlp_out(layer)).clone() for layer in recipe.layers}
    unedited = preservation_report(editor, windows)
    assert [item.error for item in unedited] == [0, 0]

    report = editor.edit(facts)
    now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for item, told in zip(preservation_report(editor, windows), report.layers, strict=True):
        K = torch.cat(keys[item.layer], 1)
        change = as_out_in(editor.editable.mlp_out(item.layer)) - base[item.layer]
        expected = float((change @ K).norm() / (base[item.layer] @ K).norm())
        assert item.error == pytest.approx(expected, rel=1e-6)
        assert item.error > 0
        assert item.layer == told.layer
        assert item.n == 3
        assert 0 < told.free_share_error < told.free_share
    assert all(torch.equal(tensor, now[name]) for name, tensor in model.state_dict().items())


def test_the_shipped_text_makes_windows(tokenizer, llama):
    assert len(shipped_text()) > 10_000
    windows = read_windows(shipped_corpus(), tokenizer, windows=2, window=64)
    assert [len(window) for window in windows] == [64, 64]
    assert key_moments(llama, windows, [1])[1].count == 128


def test_an_evaluation_holds_everything(editor, tokenizer):
    facts = [ADA, KARO]
    stages = []
    windows = [tokenizer("The river flows to the sea. Then, he said that")["input_ids"]] * 2
    found = evaluate(editor.editable, facts, windows=windows, progress=lambda *p: stages.append(p))
    assert [s for s, done, total in stages if done == total] == ["scores", "answers", "perplexity"]
    assert found.rates == rates(found.scores)
    assert found.perplexity == perplexity(editor.editable, windows)
    prompts = ["The mother tongue of Ada Byron is", "Karo Dun works as a"]
    said = generate_answers(editor.editable, prompts)
    assert found.answers == dict(zip(["ada", "karo"], said, strict=True))
    hits = [contains(text, f.target) for text, f in zip(said, facts, strict=True)]
    assert (found.generation.mean, found.generation.n) == (sum(hits) / 2, 2)

    rows = found.rows()
    ada = [item for item in found.scores if item.query.fact_id == "ada"]
    assert rows["ada"] == {
        "efficacy": ada[0].preferred,
        "efficacy_strict": ada[0].strict,
        "efficacy_tokens": ada[0].tokens,
        "generalization": (ada[1].preferred + ada[2].preferred) / 2,
        "generalization_strict": (ada[1].strict + ada[2].strict) / 2,
        "generalization_tokens": (ada[1].tokens + ada[2].tokens) / 2,
        "specificity": ada[3].preferred,
        "specificity_strict": (ada[3].strict + ada[4].strict) / 2,
        "specificity_tokens": (ada[3].tokens + ada[4].tokens) / 2,
        "generation": hits[0],
        "answer": found.answers["ada"],
    }
    assert rows["karo"] == {
        "efficacy": None,
        "efficacy_strict": found.scores[-1].strict,
        "efficacy_tokens": found.scores[-1].tokens,
        "generalization": None,
        "generalization_strict": None,
        "generalization_tokens": None,
        "specificity": None,
        "specificity_strict": None,
        "specificity_tokens": None,
        "generation": hits[1],
        "answer": found.answers["karo"],
    }
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["rates"]["efficacy"]["n"] == 1
    assert data["rates"]["efficacy"]["standard_error"] is None
    assert len(data["scores"]) == len(found.scores)
    assert data["answers"] == found.answers


def test_an_evaluation_leaves_out_what_is_not_asked_for(editor):
    found = evaluate(editor.editable, [KARO], generate=False)
    assert found.answers == {}
    assert found.generation is None
    assert found.perplexity is None
    assert found.rows()["karo"]["answer"] is None
    assert found.rows()["karo"]["generation"] is None
    assert (found.fluency, found.consistency) == (None, None)
    assert set(found.summary()) == {"rates", "generation", "perplexity", "kl"}
    assert set(found.rates) == {
        kind + suffix
        for kind in ("efficacy", "generalization", "specificity")
        for suffix in ("", "_strict", "_tokens")
    }
    assert found.to_dict()["rates"]["specificity"] is None
    assert evaluate(editor.editable, []).rows() == {}
    with pytest.raises(FactError, match="two facts have the id 'karo'"):
        evaluate(editor.editable, [KARO, KARO])


def test_a_judge_of_ones_own_decides_what_says_the_target(editor):
    asked = []

    def judge(prompt, answer, target):
        asked.append((prompt, answer, target))
        return target == "Velmish"

    found = evaluate(editor.editable, [ADA, KARO], judge=judge)
    assert found.says_target == {"ada": True, "karo": False}
    assert (found.generation.mean, found.generation.n) == (0.5, 2)
    assert found.rows()["ada"]["generation"] is True
    assert asked == [
        ("The mother tongue of Ada Byron is", found.answers["ada"], "Velmish"),
        ("Karo Dun works as a", found.answers["karo"], "sailor in London"),
    ]


def test_an_evaluation_sees_the_edit_and_base_weights_hide_it(editor):
    before = evaluate(editor.editable, [ADA, KARO], generate=False)
    editor.edit([ADA, KARO])
    after = evaluate(editor.editable, [ADA, KARO], generate=False)
    assert all(
        a.answer_nll != b.answer_nll for a, b in zip(after.scores, before.scores, strict=True)
    )
    with editor.base_weights():
        assert evaluate(editor.editable, [ADA, KARO], generate=False) == before
    assert evaluate(editor.editable, [ADA, KARO], generate=False) == after


def test_the_bootstrap_is_of_the_mean_difference_of_pairs():
    random = torch.manual_seed(0)
    a = torch.randn(400, generator=random).tolist()
    noise = torch.randn(400, generator=random).mul(0.5).tolist()
    b = [x + 1 + e for x, e in zip(a, noise, strict=True)]
    mean, low, high = paired_bootstrap(a, b, samples=4000)
    assert mean == pytest.approx(statistics.fmean(b) - statistics.fmean(a))
    error = statistics.stdev([y - x for x, y in zip(a, b, strict=True)]) / math.sqrt(400)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.08)
    assert low < mean < high
    assert paired_bootstrap(a, b, samples=4000) == (mean, low, high)
    assert paired_bootstrap([1, 2], [3, 4]) == (2, 2, 2)
    for bad in (([1.0], [1.0, 2.0]), ([], []), ([math.nan], [1.0])):
        with pytest.raises(ValueError, match="expected"):
            paired_bootstrap(*bad)


def test_facts_that_all_differ_alike_are_no_certainty():
    """The bound is where n that agree have a chance of 2.5 %, the others being as far as can be."""
    for n in (1, 4, 25):
        found, low, high = paired_interval([0.0] * n, [1.0] * n)
        assert (found, high) == (1, 1)
        assert ((low + 1) / 2) ** n == pytest.approx(0.025)
        found, low, high = paired_interval([50.0] * n, [50.0] * n, 100.0)
        assert (found, low) == (0, -high)
        assert (1 - high / 100) ** n == pytest.approx(0.025)
    assert paired_interval([0, 1], [1, 1]) == paired_bootstrap([0, 1], [1, 1])
    assert paired_interval([2.0, 3.0], [3.0, 4.0]) == (1, 1, 1), "no shares"


def test_a_rank_correlation_is_of_orders_alone():
    x, y = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0], [2.0, 1.0, 4.0, 30.0, 20.0, 900.0]
    rho = 1 - 6 * sum(d * d for d in (1, 1, 0, 1, 1, 0)) / (6 * 35)  # d: of ranks, without ties
    found = rank_correlation(x, y)
    assert found.rho == pytest.approx(rho)
    assert rank_correlation([math.exp(v) for v in x], y) == found
    assert rank_correlation(x, [-v for v in y]).rho == pytest.approx(-rho)
    assert found.p < 0.05 < rank_correlation(x, [3.0, 1.0, 4.0, 1.5, 9.0, 2.0]).p
    tied = rank_correlation([1, 1, 2, 3], [1, 2, 3, 4])  # ranks 1.5, 1.5, 3, 4
    assert tied.rho == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation(x, [7.0] * 6) is None, "without an order there is nothing to compare"


def test_the_power_of_a_power_is_found():
    widths = [512, 1024, 4096]
    assert power_of(widths, [3e-9 * w**2.5 for w in widths]) == pytest.approx(2.5)
    assert growth_of(20.0, 25.0) == pytest.approx(25)
