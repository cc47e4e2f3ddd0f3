"""Where the library is added to: a format and a family in one file, a measure in two.

Of methods `test_examples.py` and `test_methods.py` show it, of studies `test_studies.py`, of
options and exports `test_cli_places.py`.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import RECIPE, untabled

import nulledit
from nulledit import Editor
from nulledit.config import Layout
from nulledit.models import layouts

SOURCE = Path(nulledit.__file__).parent
FORMAT = """\
import sys
from nulledit import read_facts

found = read_facts(sys.argv[1])
(fact,) = found.facts
print(found.format, fact.subject, fact.prompt, fact.target, fact.old_answer, sep="|")
"""
MEASURE = """\
import json
from nulledit.evaluation.comparison import Comparison
from nulledit.evaluation.queries import Query
from nulledit.evaluation.runner import Evaluation
from nulledit.evaluation.scores import Score, rates
from nulledit.report.tables import as_text
from nulledit.runs.tables import rates_tables
from nulledit.studies.results import Spot, quantity

def side(answer):
    query = Query("ada", "efficacy", "Ada lives in", "Oslo", "Rome")
    scores = (Score(query, 0.5, 1.0, True, True, 1.0),)
    return Evaluation(scores, {"ada": answer}, rates(scores), None, None)

before, after = side("Rome, of course"), side("Oslo")
print(json.dumps({
    "summary": after.summary()["brevity"],
    "row": after.rows()["ada"]["brevity"],
    "change": Comparison(before, after).changes()["brevity"].mean,
    "page": after._repr_html_(),
    "table": "".join(map(as_text, rates_tables({"edited": after.summary()}))),
    "study": quantity("brevity")(Spot("edited", found={"facts": after.rows()})).mean,
}))
"""


@pytest.fixture
def told(tmp_path):
    """What a program prints with a copy of the package that has more lines: file, place, line."""

    def run(program, *added, words=()):
        shutil.copytree(SOURCE, tmp_path / "nulledit", ignore=shutil.ignore_patterns("*.pyc"))
        for name, after, line in added:
            file = tmp_path / "nulledit" / name
            source = file.read_text(encoding="utf-8")
            assert source.count(f"{after}\n") == 1
            file.write_text(source.replace(f"{after}\n", f"{after}\n{line}\n"), encoding="utf-8")
        found = subprocess.run(
            [sys.executable, "-c", program, *map(str, words)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        assert found.returncode == 0, found.stderr
        return found.stdout

    return run


def test_a_facts_format_is_a_row(told, tmp_path):
    record = {"who": "Ada", "asks": "Ada lives in", "new": "Oslo", "was": "Rome"}
    (tmp_path / "facts.json").write_text(json.dumps([record]))
    names = 'subject=("who",), prompt=("asks",), target=("new",), old_answer=("was",)'
    row = f'    "mine": Shape("Mine", {names}),'
    found = told(FORMAT, ("data/formats.py", "SHAPES = {", row), words=[tmp_path / "facts.json"])
    assert found == "mine-json|Ada|{} lives in|Oslo|Rome\n"


def test_a_measure_is_a_row_and_a_function(told):
    """Evaluations, their changes and pages, a run's tables and those of studies have it then."""
    row = '    Measure("brevity", "short answers", unit="words", digits=2),'
    function = "        return {'brevity': {i: len(x.split()) for i, x in self.answers.items()}}\n"
    by_fact = (
        '        """Measure -> fact id -> value, of those that no query of an answer gives."""'
    )
    found = json.loads(
        told(
            MEASURE,
            ("evaluation/measures.py", '    Measure("consistency", "consistency"),', row),
            ("evaluation/runner.py", by_fact, function),
        )
    )
    assert found["summary"]["mean"] == found["row"] == 1
    assert found["change"] == -2
    assert "short answers (words)" in found["page"]
    assert "short answers (words)" in found["table"]
    assert found["study"] == 1


def test_a_family_is_a_row(tokenizer, facts, make_statistics, monkeypatch, caplog):
    """Nothing is traced, so nobody is told of it; edits are written where the row says."""
    monkeypatch.setattr(layouts, "probe", lambda model: pytest.fail("it is in the table"))
    monkeypatch.setitem(layouts.LAYOUTS, "starcoder2", Layout("model.layers", "mlp.c_proj"))
    model = untabled("starcoder2", num_key_value_heads=1)
    with caplog.at_level(logging.WARNING, "nulledit"):
        editor = Editor(model, tokenizer, recipe=RECIPE, statistics=make_statistics(model))
    assert "not in the table" not in caplog.text
    before = {name: value.clone() for name, value in model.state_dict().items()}
    editor.edit(facts)
    changed = {n for n, value in model.state_dict().items() if not value.equal(before[n])}
    assert changed == {f"model.layers.{i}.mlp.c_proj.weight" for i in RECIPE.layers}
