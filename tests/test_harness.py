"""The bridge to lm-evaluation-harness, on a stand-in that answers as the harness does."""

import fnmatch
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from nulledit.errors import ConfigError
from nulledit.evaluation.harness import harness_results, trim

# As the harness (0.4.13) writes it, with what `trim` should leave out.
RESULTS = {
    "results": {
        "arc": {
            "name": "arc",
            "alias": "arc",
            "sample_len": 40,
            "acc,none": 0.775,
            "acc_stderr,none": 0.0669,
            "acc_norm,none": 0.7,
            "acc_norm_stderr,none": "N/A",
        },
        "ppl": {"alias": "ppl", "word_perplexity,none": float("inf"), "samples": 4},
    },
    "groups": {"science": {"alias": "science", "acc,none": 0.5, "acc_stderr,none": 0.2}},
    "n-samples": {"arc": {"original": 900, "effective": 40}},
    "n-shot": {"arc": 2, "science": 2},
    "versions": {"arc": 1.0},
    "higher_is_better": {"arc": {"acc": True, "acc_norm": True}, "ppl": {"word_perplexity": False}},
    "configs": {"arc": {"doc_to_text": "x"}},
    "date": 1.0,
}


class StandIn:
    """The four names of the harness that the bridge uses; notes what it is called with."""

    def __init__(self, monkeypatch, fails=None):
        self.asked, self.wrapped, self.paths, self.fails = [], [], [], fails
        core, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
        huggingface = ModuleType("lm_eval.models.huggingface")
        core.simple_evaluate = self.evaluate
        tasks.TaskManager = self.manager
        huggingface.HFLM = self.wrap
        for module in (core, tasks, ModuleType("lm_eval.models"), huggingface):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def manager(self, include_path=None):
        self.paths.append(include_path)
        known = ["arc", "hellaswag", "ppl", "science"]
        return SimpleNamespace(
            all_tasks=known,
            match_tasks=lambda names: [k for k in known for n in names if fnmatch.fnmatch(k, n)],
        )

    def wrap(self, **given):
        given["tokenizer"].pad_token = "<|pad|>"
        self.wrapped.append(given)
        return self

    def evaluate(self, **given):
        assert given.pop("model") is self
        assert not self.wrapped[-1]["pretrained"].training
        self.asked.append(given)
        if self.fails:
            raise self.fails
        return RESULTS


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama")


def test_the_result_is_cut_to_metrics_with_their_errors():
    found = trim(RESULTS)
    assert found["arc"] == {
        "n": 40,
        "shots": 2,
        "version": 1.0,
        "metrics": {
            "acc,none": {"value": 0.775, "standard_error": 0.0669, "higher_is_better": True},
            "acc_norm,none": {"value": 0.7, "standard_error": None, "higher_is_better": True},
        },
    }
    ppl = {"value": None, "standard_error": None, "higher_is_better": False}
    assert found["ppl"]["metrics"] == {"word_perplexity,none": ppl}
    assert (found["science"]["n"], found["science"]["metrics"]["acc,none"]["value"]) == (None, 0.5)
    json.dumps(found, allow_nan=False)


def test_the_model_in_memory_is_asked_and_left_as_it_was(monkeypatch, model, tokenizer, tmp_path):
    harness = StandIn(monkeypatch)
    model.train()
    before = tokenizer.pad_token
    found = harness_results(
        model,
        tokenizer,
        ["arc", "p*", "ppl"],
        limit=40,
        num_fewshot=2,
        batch_size=4,
        include_path=tmp_path,
    )
    assert found == trim(RESULTS)
    assert harness.wrapped[0]["pretrained"] is model
    assert harness.wrapped[0]["batch_size"] == 4
    (asked,) = harness.asked
    assert asked["tasks"] == ["arc", "ppl"]
    assert (asked["limit"], asked["num_fewshot"]) == (40, 2)
    assert harness.paths == [str(tmp_path)]
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert tokenizer.pad_token == before


def test_a_missing_harness_is_named_with_the_command(monkeypatch, model, tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'nulledit\[harness\]'"):
        harness_results(model, tokenizer, ["arc"])


def test_unknown_tasks_get_near_names(monkeypatch, model, tokenizer):
    harness = StandIn(monkeypatch)
    with pytest.raises(ConfigError, match=r"no task 'hellaswagg' \(did you mean 'hellaswag'\?\)"):
        harness_results(model, tokenizer, ["arc", "hellaswagg"])
    assert not harness.wrapped


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": []}, "one or more names"),
        ({"tasks": "arc"}, "expected a list"),
        ({"limit": 0}, "limit is 0; expected 1 or more"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"include_path": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_bad_settings_are_named(monkeypatch, model, tokenizer, given, message):
    StandIn(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        harness_results(model, tokenizer, **{"tasks": ["arc"], **given})


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "data of arc can't be had .no route.: connect"),
        (ValueError("Duplicate task 'arc'"), "refuses arc: Duplicate task"),
    ],
)
def test_what_the_harness_cannot_do_is_one_line(monkeypatch, model, tokenizer, error, message):
    StandIn(monkeypatch, fails=error)
    with pytest.raises(ConfigError, match=message):
        harness_results(model, tokenizer, ["arc"])
