"""A recipe for a model on given facts: search on some of them, evidence from the others."""

from nulledit.tuning.measure import Bench, Measured
from nulledit.tuning.objective import Outcome, choose, difference, score, score_error
from nulledit.tuning.search import Candidate, Search, TuneSettings, Tuning, Untried
from nulledit.tuning.split import Split, split_facts

__all__ = [
    "Bench",
    "Candidate",
    "Measured",
    "Outcome",
    "Search",
    "Split",
    "TuneSettings",
    "Tuning",
    "Untried",
    "choose",
    "difference",
    "score",
    "score_error",
    "split_facts",
]
