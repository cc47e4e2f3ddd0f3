"""`nulledit report`: the HTML page of runs and studies."""

import base64
import html
import json
import re
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from support.runs import RECIPE, line, summary, write_a_run
from support.studies import BAD, lines, spec, study, table

from nulledit.cli.main import cli
from nulledit.errors import ReportError
from nulledit.evaluation.stats import paired_bootstrap
from nulledit.io.jsonfiles import as_json
from nulledit.report.captions import chosen_examples, duration, flat
from nulledit.report.document import (
    Choice,
    Column,
    Document,
    Example,
    Listing,
    StudyTable,
    Value,
)
from nulledit.report.html import html_page
from nulledit.report.markdown import markdown_page
from nulledit.report.study import study_document, write_study
from nulledit.runs.compare import comparison
from nulledit.runs.document import run_document, run_study
from nulledit.runs.folder import read_run, write_run
from nulledit.runs.report import collect

TEXT = {"perplexity", "kl", "kl_worst"}
VOID = {"meta", "img", "source", "br", "input"}


class Reader(HTMLParser):
    """What a browser sees: tags with their attributes, text, and whether tags are closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes for found, attributes in self.tags if found == name]


def page_of(*studies, title="Report"):
    documents = [study_document(one, "What was run.", "folder") for one in studies]
    return Reader(html_page(title, documents))


def scored(i, efficacy, generalization, **more):
    row = {"efficacy": efficacy, "generalization": generalization, "answer": "Madrid."}
    return line(i) | {"before": {"efficacy": False, "answer": "Paris."}, "after": row} | more


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that share facts 1 to 4; the second has lost two of them."""
    base = tmp_path_factory.mktemp("runs")
    first = [scored(i, True, 0.5) for i in range(5)]
    second = [scored(i, i > 2, None if i == 4 else 0.75, says_target=i > 2) for i in range(1, 7)]
    write_run(
        base / "one",
        recipe=RECIPE,
        environments=[{"run": 1, "device": "cpu"}],
        lines=first,
        summary=summary(),
    )
    return base / "one", write_a_run(base / "two", second)


# -- the page ------------------------------------------------------------------------------------


def test_a_page_stands_alone():
    page = page_of(study())
    assert page.open == []
    assert not page.all("script")
    assert not page.all("link")
    addresses = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "srcset", "href")
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not any(key.startswith("on") for _, held in page.tags for key in held)


def test_nothing_given_is_markup():
    odd = study(
        title=BAD,
        question=BAD,
        shows=BAD,
        settings={BAD: {BAD: BAD}},
        environment=({BAD: BAD},),
        notices=(BAD,),
        tables=(table((BAD, BAD)),),
        figures=(spec("lines", *lines(BAD, panel=BAD), caption=BAD, labels={"x": BAD, "y": BAD}),),
        examples=(Example(BAD, BAD, BAD, BAD, BAD, True), Example(BAD, BAD, BAD, None, "", False)),
    )
    page = page_of(odd, odd, title=BAD)
    assert page.open == []
    assert not page.all("script")
    assert page.text.count("<script>alert(1)</script>") > 30
    pictures = [held["src"] for held in page.all("img")]
    assert all(b"<script" not in base64.b64decode(p.partition(",")[2]) for p in pictures)


def test_tables_mark_the_best_and_show_errors_small():
    found = table(("a", Value(90.0, 2.0, 9)), ("b", Value(88.5, 0.1, 9)), ("c", None))
    page = html_page("", [study_document(study(tables=(found,), figures=(), examples=()), "")])
    assert re.search(r'class="best">90.0</span><span class="mark"[^>]*>●</span>', page)
    assert re.search(r'>88.5</span><span class="mark"[^>]*>○</span>', page)
    assert re.search(r"<small[^>]*>± 2.0</small>", page)
    assert '<td class="num absent">absent</td>' in page
    assert "● best, ○ within one standard error of the best" in page
    assert "n = 9" in page


def test_a_figure_has_its_caption_and_its_numbers():
    one = study()
    page = page_of(one)
    assert len(page.all("img")) == len(one.figures)
    assert page.all("img")[0]["alt"] == "What happens. n = 200."
    link = next(held for held in page.all("a") if held.get("download") == "stream.csv")
    table_of = base64.b64decode(link["href"].partition(",")[2]).decode().splitlines()
    assert table_of[0] == "x,y,error,n,series,panel"
    assert len(table_of) == 1 + len(one.figures[0].points)


def test_several_parts_have_a_table_of_contents():
    bare = study(title="First", figures=())
    page = page_of(bare, study(title="Second", figures=()), title="Both")
    links = [held["href"] for held in page.all("a") if held["href"].startswith("#")]
    assert links == [f"#{held['id']}" for held in page.all("section")]
    assert len(page.all("h1")) == 1
    assert not page_of(bare).all("nav")


def test_settings_and_environment_are_folded():
    page = page_of(study(figures=()))
    assert len(page.all("details")) == 2
    assert "recipe.layers" in page.text
    assert all("open" not in held for held in page.all("details"))


class Listed:
    """The rows of a page's first listing, and which of them its style shows for what is chosen."""

    def __init__(self, page):
        part = page[page.index('<div class="listing"') :]
        part = part[: part.index("</table>")]
        self.rows = [
            (set(classes.split()), html.unescape(re.sub(r"<[^>]+>", " ", row)))
            for classes, row in re.findall(
                r'<tr(?: class="([^"]*)")?>(<th scope="row".*?)</tr>', part, re.DOTALL
            )
        ]
        self.options = {
            html.unescape(text).strip(): (name, int(n))
            for name, text, n in re.findall(
                r'class="c(\d+-\d+)"(?: checked)?> (.*?) <small>(\d+)</small>', part
            )
        }
        (style,) = re.findall(r"@media screen \{\n((?:\.listing.*?\n)*)\}", page, re.DOTALL)
        rule = r"\.listing:has\(\.c(\S+):checked\) tbody tr:not\(\.r(\S+)\) \{ display: none; \}"
        self.hiding = dict(re.findall(rule, style))
        assert len(self.hiding) == len(style.splitlines())

    def rows_shown(self):
        """Of the first option of each choice."""
        return self.shown(*(name for name, (at, _) in self.options.items() if at.endswith("-0")))

    def shown(self, *chosen):
        """The rows that are left; each option must say how many it has by itself."""
        names = [self.options[option][0] for option in chosen]
        return [
            text
            for classes, text in self.rows
            if all(f"r{self.hiding[n]}" in classes for n in names if n in self.hiding)
        ]


def a_run_of_many(folder):
    """Facts of every outcome, two relations, two calls; one was taken out."""
    rows = []
    for i in range(120):
        said, kept = i % 3 != 0, i % 5 != 0
        after = {"efficacy": True, "efficacy_strict": i % 2 == 0, "generation": said, "answer": "x"}
        rows.append(
            line(i, says=said, prompt=f"Fact number {i} is")
            | {
                "after": after | {"specificity_strict": 1.0 if kept else 0.5},
                "before": {"efficacy": False, "specificity_strict": 1.0, "answer": "y"},
                "relation": "P36" if i < 20 else None,
                "active": i != 1,
                "neighbours": {"lost": [] if kept else [["Rome is", "old"]], "gained": []},
            }
        )
    return write_a_run(folder, rows), rows


def test_every_fact_is_listed_and_each_option_shows_its_own(tmp_path):
    folder, rows = a_run_of_many(tmp_path / "run")
    page = html_page("", collect([folder]).documents())
    listed = Listed(page)
    assert len(listed.rows) == 120
    held = [i for i, row in enumerate(rows) if row["says_target"] and i != 1]
    wanted = {
        ("in the model",): [i for i in range(120) if i != 1],
        ("hold",): held,
        ("do not hold",): [i for i in range(120) if i % 3 == 0],
        ("by argmax",): [i for i in range(120) if i % 6 == 0],
        ("prefers",): [i for i in range(120) if i % 6 == 3],
        ("taken out",): [1],
        ("changed",): [i for i in range(120) if i % 5 == 0],
        ("P36",): list(range(20)),
        ("hold", "changed", "P36"): [5, 10],
    }
    for options, expected in wanted.items():
        found = [int(re.search(r"number (\d+) is", row)[1]) for row in listed.shown(*options)]
        assert found == expected, options
        if len(options) == 1:
            assert listed.options[options[0]][1] == len(expected)
    assert "ok" not in listed.options  # the same facts as "hold"
    assert "lost: Rome is … old" in listed.shown("changed")[0]
    assert re.search(r"\.listing:has[^}]*}\n}\n</style>", page), "in @media screen: print has all"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_facts_are_listed_a_row_each(n):
    """Other tables of few rows and many columns are turned."""
    rows = [[f"fact {i}", *(f"{name} {i}" for name in "abcdef")] for i in range(n)]
    table = StudyTable.of("facts", "Every fact", ("fact", *"abcdef"), rows)
    choices = (("which", (Choice("all"), Choice("first", (0,)))),)
    part = Listing(table, choices)
    page = html_page("", [Document("A run", (part,))])
    assert [row.split()[1] for _, row in Listed(page).rows] == [str(i) for i in range(n)]


def test_an_option_is_chosen_by_a_labelled_radio_of_its_own_listing(tmp_path):
    one, _ = a_run_of_many(tmp_path / "one")
    two, _ = a_run_of_many(tmp_path / "two")
    page = Reader(html_page("", collect([one, two]).documents()))
    radios = [held for held in page.all("input") if held["type"] == "radio"]
    groups = {}
    for held in radios:
        groups.setdefault(held["name"], []).append("checked" in held)
    assert len(groups) == 1 + 2 * 3
    assert all(checked[0] and sum(checked) == 1 for checked in groups.values())
    assert len(page.all("label")) == len(radios)
    assert len(page.all("fieldset")) == len(page.all("legend")) == len(groups)


def test_rare_relations_are_chosen_together_and_none_is_markup(tmp_path):
    rows = [scored(i, True, 1.0, relation=f"P{i // 2}") for i in range(100)]
    rows[0]["relation"] = BAD
    page = html_page("", collect([write_a_run(tmp_path / "run", rows)]).documents())
    listed = Listed(page)
    assert len(listed.options) < 45
    assert sum(n for name, (_, n) in listed.options.items() if name != "any") == 100
    assert len(listed.shown("others")) == listed.options["others"][1] > 0
    assert BAD not in page


def test_few_rows_of_many_columns_are_turned():
    columns = [Column(f"c{i}", f"measure {i}", better="high") for i in range(9)]
    row = {f"c{i}": Value(float(i), 0.5, 5) for i in range(1, 9)}
    found = StudyTable(
        "wide", "", "", tuple(columns), ({"c0": "one", **row}, {"c0": "two", **row, "c3": 1.0})
    )
    page = html_page("", [study_document(study(tables=(found,), figures=(), examples=()), "")])
    body = page[page.index("<thead>") : page.index("</tbody>")]
    assert re.findall(r'<th scope="col"[^>]*>(.*?)</th>', body)[1:] == ["one", "two"]
    assert body.count('<th scope="row"') == 8
    assert re.search(r"measure 3.*?best\">3.0.*?>1.0<", body, re.DOTALL)
    assert page.count("scroll sideways") == page.count('class="scroll"')


def test_no_absolute_path_is_on_a_page(tmp_path):
    """Of the model, statistics, files and the folders themselves: only names."""
    home = "/home/someone/models"
    notices = ["layers are wrong: `nulledit stats make /home/someone/models/m --text T`"]
    folders = []
    for above in ("a", "b"):
        folder = tmp_path / above / "run"
        folder.parent.mkdir()
        write_a_run(folder, [scored(1, True, 1.0, prompt="/usr/bin/env is")], notices=notices)
        told = json.loads((folder / "summary.json").read_text())
        told["base"]["model"] = f"{home}/my model"
        (folder / "summary.json").write_text(as_json(told))
        (folder / "environment.json").write_text(as_json([{"model": f"{home}/my model"}]))
        folders.append(folder)
    write_study(
        tmp_path / "study",
        study(
            figures=(),
            settings={"data": {"text": f"{home}/t.txt", "files": [f"{home}/f.yaml", "g.yaml"]}},
            environment=({"model": f"{home}/m", "device": "cpu"},),
            notices=(f"lora is absent: {home}/stats: no such file",),
        ),
    )
    documents = collect([*folders, tmp_path / "study"]).documents()
    page = Reader(html_page("", documents)).text
    assert page.count("/usr/bin/env is") >= 3  # a fact's own words stay
    assert "my model" in page
    assert "f.yaml, g.yaml" in page
    assert [document.title for document in documents][1:3] == ["a/run", "b/run"]
    for text in (page, *(markdown_page(document) for document in documents)):
        assert "someone" not in text
        assert str(tmp_path) not in text


def test_examples_come_in_turn_from_each_arm():
    held = [Example("a", f"p{i}", "t", "b", "a", True) for i in range(9)]
    held += [Example("b", "q", "t", "b", "a", True), Example("b", "r", "t", "b", "a", False)]
    good, bad = chosen_examples(held)
    assert (good.title, bad.title) == ("5 of 10 edits that hold", "1 edit that fails")
    assert [e.prompt for e in good.items] == ["p0", "q", "p1", "p2", "p3"]


def test_words():
    assert [duration(s) for s in (0.42, 59, 60, 3599.9, 39960)] == [
        *("0.4 s", "59 s", "1 min", "1 h", "11 h 6 min"),
    ]
    assert flat({"a": {"b": [1, 2]}, "c": None, "d": True, "e": {}}) == {
        **{"a.b": "1, 2", "c": "none", "d": "yes", "e": "none"},
    }


# -- runs ----------------------------------------------------------------------------------------


def test_a_run_is_a_study_with_its_rates_and_answers(runs):
    found = run_study(read_run(runs[0], "one"))
    rows = {row["measure"]: row for row in found.tables[0].rows}
    assert rows["efficacy, preference (%)"]["after"] == Value(100.0, 4.0, 25)
    assert rows["efficacy, preference (%)"]["difference"] == "+100.0 [−4.4, +100.0]"  # of five
    assert rows["generalization, preference (%)"]["after"] is None  # the summary lacks it
    assert found.examples[0] == Example("", "France is", "Madrid", "Paris.", "Madrid.", True)
    assert found.settings == {"method": {"name": "alphaedit"}, "layers": [3, 4]}


def test_numbers_of_an_earlier_state_are_not_those_of_the_run(tmp_path):
    for name, state in (("now", summary()["state"]), ("changed", "of before")):
        write_a_run(tmp_path / name, [line(1), line(2)], state=state)
    now, changed = (run_page_of(tmp_path / name) for name in ("now", "changed"))
    assert "KL on other text" in now.partition("Run 1")[0]
    assert "has changed since it was evaluated" not in now
    assert "KL on other text" not in changed.partition("Run 1")[0]
    assert "has changed since it was evaluated" in changed


def run_page_of(folder):
    run = read_run(folder, folder.name)
    return markdown_page(run_document(run, run_study(run)))


def test_runs_are_compared_on_the_facts_they_share(runs):
    a, b = (read_run(folder, folder.name) for folder in runs)
    for run in (a, b):
        run.summary["runs"][-1]["after"]["rates"]["generalization"] = {
            **{"mean": 0.5, "standard_error": 0.1, "n": 5}
        }
    compared = comparison([a, b])
    rows = compared.tables[0].rows
    assert [row["efficacy"].mean for row in rows] == [100.0, 50.0]  # facts 1 to 4
    assert [row["efficacy"].n for row in rows] == [4, 4]
    assert [row["kl"].mean for row in rows] == [18.62, 18.62]
    assert [row["kl_worst"] for row in rows] == [32.0, 32.0]
    points = {point.x: point for point in compared.figures[0].points}
    expected = paired_bootstrap([100.0] * 4, [0.0, 0.0, 100.0, 100.0])
    found = points["efficacy, preference"]
    assert (found.y, found.low, found.high) == expected
    assert points["generalization, preference"].n == 3  # fact 4 lacks it in one


def test_two_runs_are_side_by_side_fact_by_fact(runs):
    collected = collect(runs)
    page = html_page("", collected.documents())
    listed = Listed(page)
    assert len(listed.rows) == 7  # f0 in the first alone, f5 and f6 in the second
    counts = {name: n for name, (_, n) in listed.options.items()}
    assert counts == {
        **{"all": 7, "hold in both": 2, "hold in one, not in another": 2, "hold in neither": 0},
        **{"hold in one, not in two": 2, "hold in two, not in one": 0, "not in every run": 3},
    }
    (row,) = [text for text in listed.shown("hold in one, not in two") if "f1" in text]
    assert row.split()[-4:] == ["Madrid.", "ok", "Madrid.", "missed"]
    assert len([text for text in listed.shown("not in every run") if "not in it" in text]) == 3
    text = Reader(page).text
    assert "2 hold in both" in text
    assert "one: 5 of 5 facts hold." in text
    assert "KL on other text 19 mnat a token" in text
    told = collected.to_dict()["comparison"]["facts"]
    assert [told[1][key] for key in ("says_1", "holds_1", "holds_2")] == ["Madrid.", "ok", "missed"]
    assert told[0]["holds_2"] == "not in it"


@pytest.mark.parametrize("n", [1, 2])
def test_a_list_of_few_facts_has_a_row_for_each(tmp_path, n):
    rows = [scored(i, i > 0, 1.0, says_target=i > 0) for i in range(n)]
    folders = [write_a_run(tmp_path / name, rows) for name in ("one", "two")]
    for documents in (collect(folders[:1]).documents(), collect(folders).documents()):
        listed = Listed(html_page("", documents))
        assert [re.search(r"f\d", row)[0] for row in listed.rows_shown()] == [
            f"f{i}" for i in range(n)
        ]


def test_what_makes_runs_no_equals_is_said(tmp_path):
    folders = []
    for name in ("one", "two"):
        folder = write_a_run(tmp_path / name, [scored(1, True, 1.0)], text=f"{name}.txt")
        told = json.loads((folder / "summary.json").read_text())
        told["base"]["hash"] = name * 20
        (folder / "summary.json").write_text(as_json(told))
        folders.append(folder)
    notices = comparison([read_run(folder, folder.name) for folder in folders]).notices
    assert "different bases" in notices[0]
    assert "different texts" in notices[1]


def test_runs_without_a_common_fact_are_no_contest(tmp_path):
    one = write_a_run(tmp_path / "one", [scored(1, True, 0.5)])
    other = write_a_run(tmp_path / "other", [scored(2, False, 0.5)])
    compared = comparison([read_run(f, f.name) for f in (one, other)])
    assert "share no fact" in compared.notices[0]
    of_facts = [c for c in compared.tables[0].columns[2:] if c.key not in TEXT]
    assert of_facts
    assert all(column.better is None for column in of_facts)
    assert compared.figures == ()


def test_other_text_has_a_table_of_its_own(tmp_path):
    folder = write_a_run(tmp_path, [scored(1, True, 1.0)])
    (text,) = [t for t in run_study(read_run(folder, "run")).tables if t.name == "text-1"]
    rows = {row["measure"]: row for row in text.rows}
    kl = rows["KL per token (mnat)"]
    assert (kl["before"], kl["after"]) == (Value(0.0, None, 4335), Value(18.62, 2.134, 4335))
    assert rows["KL, share of the worst 1 % (%)"]["after"] == 32.0


def test_facts_that_were_undone_are_left_out(tmp_path):
    folder = write_a_run(tmp_path, [scored(1, True, 1.0), scored(2, True, 1.0, active=False)])
    assert len(run_study(read_run(folder, "run")).examples) == 1


def test_a_run_without_evaluation_has_a_page(tmp_path):
    bare = [line(1) | {"before": None, "after": None}]
    write_a_run(tmp_path, bare, before=None, after=None, text=None, layers=[])
    page = html_page("", collect([tmp_path]).documents())
    assert "Not evaluated" in page


# -- the command ---------------------------------------------------------------------------------


def report(*words):
    return CliRunner().invoke(cli, ["report", *map(str, words)])


def test_one_folder_has_its_page_inside(runs):
    done = report(runs[0])
    assert done.exit_code == 0, done.output
    assert str(runs[0] / "report.html") in done.stdout
    assert Reader((runs[0] / "report.html").read_text()).all("h1")
    assert report(runs[0]).exit_code == 0  # again, over our own page


def test_runs_and_studies_share_a_page(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / "stream", study(figures=()))
    done = report(*runs, "stream", "stream/", "--json", "-q")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [f["kind"] for f in data["folders"]] == ["run", "run", "study"]  # each once
    assert data["comparison"]["figures"][0]["points"]
    assert data["folders"][2]["tables"][0]["rows"][0]["rate"]["mean"] == 99.0
    text = (tmp_path / "report.html").read_text()
    assert text.index("Runs compared") < text.index("A long stream")


def test_the_comparison_is_printed(runs, tmp_path):
    """A line a measure: as a row for each run it would be wider than any terminal."""
    done = report(*runs, "--out", tmp_path / "page.html", "-q")
    assert done.exit_code == 0, done.output
    shown = done.stdout.split("\n\n")[0].splitlines()

    def cells(measure):
        (found,) = (line for line in shown if line.startswith(measure))
        return re.split(r"\s{2,}", found.removeprefix(measure).strip())[-2:]

    assert cells("run ") == [folder.name for folder in runs]
    assert cells("efficacy, preference") == ["100.0 ± 0.0 ●", "50.0 ± 28.9"]
    assert cells("seconds of editing") == ["1.5", "1.5"]
    assert "Difference from" in done.stdout
    assert "Hold in one run, not in another" in done.stdout
    assert max(map(len, shown)) < 100
    alone = report(runs[0], "-q")
    assert alone.stdout.splitlines() == [alone.stdout.strip()], "nothing to compare"


def test_another_file_is_not_overwritten(runs, tmp_path):
    file = tmp_path / "mine.html"
    file.write_text("<p>mine</p>")
    done = report(runs[0], "--out", file)
    assert done.exit_code == 2
    assert "--force" in done.stderr
    assert file.read_text() == "<p>mine</p>"
    assert report(runs[0], "--out", file, "--force").exit_code == 0
    assert "nulledit" in file.read_text()
    assert report(runs[0], "--out", tmp_path).exit_code == 2


def test_a_folder_that_is_neither_is_refused(tmp_path, runs):
    for folder, said in ((tmp_path, "no run and no study"), (tmp_path / "none", "no folder")):
        with pytest.raises(ReportError, match=said):
            collect([folder])
    (tmp_path / "summary.json").write_text(as_json({"runs": []}))
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ReportError, match="not the summary of a run"):
        collect([tmp_path])
    assert report(tmp_path).exit_code == 2
