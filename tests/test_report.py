"""Tables, figures and the page of a run."""

import json
from types import SimpleNamespace

import pytest
from support.runs import KL, LAYER, line, rate, side, summary

from nulledit import Fact
from nulledit.errors import ReportError
from nulledit.evaluation.queries import Query
from nulledit.io.jsonfiles import as_json, write
from nulledit.io.text import markdown, plain, shorten, width
from nulledit.report.cells import heads, shown
from nulledit.report.document import (
    KINDS,
    Choice,
    Document,
    FigureSpec,
    Listing,
    Status,
    StudyTable,
)
from nulledit.report.figures import figure_of
from nulledit.report.images import as_png, as_svg
from nulledit.report.markdown import markdown_page
from nulledit.report.points import Point
from nulledit.report.tables import as_markdown, as_text, percent
from nulledit.report.terminal import has_colours, on_terminal
from nulledit.runs.document import RunFolder, run_document
from nulledit.runs.folder import fact_line, read_lines, write_run
from nulledit.runs.holding import neighbours_changed
from nulledit.runs.tables import answers_table, layers_table, rate_rows, rates_spec, rates_tables


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\x9b31m\x00", "\\x9b31m\\x00"),
        ("\u2028\ud800", "\\u2028\\ud800"),
        ("Émile 東京 ‍ की", "Émile 東京 ‍ की"),
    ],
)
def test_plain_text_can_not_steer_a_terminal(text, shown):
    assert plain(text) == shown


def test_markdown_has_no_meaning_left():
    text = "| `x` <b> [a](b) *c* _d_ # e"
    shown = markdown(text)
    assert "\\|" in shown
    assert "\\<b\\>" in shown
    assert "\\[a\\]" in shown


def text_table(head, *rows):
    return StudyTable.of("table", "", head, rows)


def test_columns_stand_under_each_other_in_wide_scripts():
    table = as_text(text_table(["subject", "n"], ["東京", "1"], ["Zoe\u0301", "22"], ["Лев", "3"]))
    lines = table.split("\n")
    assert {width(text) for text in lines} == {width(lines[0])}
    assert width("東京") == 4
    assert width("e\u0301") == 1


def test_a_long_cell_is_cut_by_its_width():
    assert shorten("東京東京", 5) == "東京…"
    assert shorten("short", 5) == "short"


def test_a_cell_with_a_bar_does_not_break_a_markdown_table():
    table = as_markdown(text_table(["a", "b"], ["x | y", "2"]))
    assert table.split("\n")[1] == "| --- | ---: |"
    assert table.split("\n")[2] == "| x \\| y | 2 |"


def cells(*tables):
    """Heads and, by the first cell, the rest of each row, as they are shown."""
    rows = {str(row[0]): [str(c) for c in row[1:]] for t in tables for row in shown(t)}
    return [heads(table) for table in tables], rows


def page_of(told, lines):
    return markdown_page(run_document(RunFolder("run", told, lines, {}, [])), figures="figure")


def test_what_the_data_lacks_is_absent():
    head, rows = cells(*rates_tables({"before": side(0.04), "after": side(1.0)}))
    assert head == [["", "before", "after", "n"]]
    assert rows["efficacy, preference (%)"] == ["4.0 ± 4.0", "100.0 ± 4.0", "25"]
    assert rows["generalization, preference (%)"] == ["absent", "absent", ""]
    assert rows["specificity, strict (%)"] == ["50.0", "50.0", "1"]  # one fact has no error
    assert not [name for name in rows if name.startswith(("KL", "perplexity"))]
    _, rows = cells(*rates_tables({"after": side(1.0)}, absent=False))
    assert "generalization, preference (%)" not in rows


def test_kl_is_told_from_a_base_that_has_none():
    perplexity = {"value": 20.5, "standard_error": 1.25, "tokens": 4335}
    sides = {"before": side(0.04, perplexity), "after": side(1.0, perplexity, KL)}
    _, rows = cells(*rates_tables(sides))
    assert rows["perplexity"] == ["20.50 ± 1.25"] * 2
    assert rows["KL per token (mnat)"] == ["0.00", "18.62 ± 2.13"]
    assert rows["KL, share of the worst 1 % (%)"] == ["absent", "32.00"]
    sides["after"]["kl"] = KL | {"value": None, "worst_share": None}
    _, rows = cells(*rates_tables(sides))
    assert rows["KL per token (mnat)"][1] == "not finite"


def test_rounding_is_shown_where_there_is_some():
    assert "rounding/‖Δ‖" not in heads(layers_table([LAYER]))
    (head,), rows = cells(layers_table([LAYER | {"rounding_share": 0.01, "error": None}]))
    assert head[-1] == "rounding/‖Δ‖"
    assert rows["4"][0] == "absent"


def test_a_figure_has_its_numbers_and_saves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sides = {"before": side(0.04), "after": side(1.0)}
    assert len(rate_rows(sides)) == 8  # two metrics of three, two scores, two sides
    spec = rates_spec(sides)
    figure = figure_of(spec, spec.points)
    assert len(figure.axes) == 2
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [4.0, 75.0, 100.0, 75.0]  # side by side, metric by metric
    as_svg(figure)
    assert not list(tmp_path.iterdir())


def test_a_figure_of_nothing_is_drawn():
    spec = rates_spec({})
    assert as_png(figure_of(spec, spec.points)).startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("label", "most"), [("rate (%)", 100.0), ("KL (mnat)", 1.0)])
def test_zeros_have_an_axis_of_their_unit(kind, label, most):
    x = ("a", "b") if kind in ("bars", "intervals") else (1, 2)
    points = tuple(Point(at, 0.0, 0.0, series="one", panel=p) for p in ("p", "q") for at in x)
    spec = FigureSpec("f", "", kind, "x", "y", labels={"x": "", "y": label}, points=points)
    for axes in figure_of(spec, points).axes:
        low, high = axes.get_xlim() if kind == "intervals" else axes.get_ylim()
        assert high == (1.0 if kind == "intervals" else most)
        assert -1.0 <= low / high <= 0.0


def test_bars_stand_on_zero_and_panels_of_one_scale_keep_it():
    heights = {"p": (2.0, 90.0), "q": (30.0, 100.0), "r": (0.0, -3.0)}
    points = tuple(
        Point(x, y, 4.0, series="one", panel=p)
        for p, pair in heights.items()
        for x, y in zip("ab", pair, strict=True)
    )
    for panels, bottom in (("pq", 0.0), ("pqr", None)):
        mine = [point for point in points if point.panel in panels]
        spec = FigureSpec("f", "", "bars", "x", "y", points=tuple(mine))
        for axes, panel in zip(figure_of(spec, mine).axes, panels, strict=True):
            low, high = axes.get_ylim()
            assert high >= max(heights[panel]) + 4.0
            assert low == bottom or (bottom is None and low <= min(heights[panel]))


def test_a_listing_is_its_table_where_nothing_can_be_chosen():
    table = text_table(["fact", "holds"], ["one", Status("ok", "good", "and why")], ["two", "no"])
    listing = Listing(table, (("Show", (Choice("all"), Choice("good", (0,)))),))
    assert on_terminal(listing) == on_terminal(table)
    page = markdown_page(Document("A", (listing,)))
    assert "| one | ok |" in page
    assert [row["0"] for row in listing.only("good").rows] == ["one"]
    assert Document("A", (Listing(text_table(["fact"]), ()),)).parts == ()


def test_rates_of_further_prompts_have_their_rows():
    more = side(1.0)
    more["rates"] |= {"portability": rate(0.5), "efficacy_tokens": rate(0.9)}
    _, labels = cells(*rates_tables({"after": more}))
    assert "portability, preference (%)" in labels
    assert not any("tokens" in label for label in labels)


def test_the_page_shows_answers_and_tables():
    page = page_of(summary(), [line(1), line(2, says=False)])
    assert "| efficacy, preference (%) | 4.0 ± 4.0 | 100.0 ± 4.0 | 25 |" in page
    assert "20.50 ± 1.25" in page
    assert "Paris \\| or\\\\x1b" in page
    assert "\x1b" not in page
    assert "| ok |" in page
    assert "| prefers |" in page


def test_the_page_of_a_run_without_evaluation():
    bare = line(1) | {"before": None, "after": None}
    page = page_of(summary(before=None, after=None, text=None, layers=[]), [bare])
    assert "Not evaluated" in page
    assert "figure.png" not in page


def test_a_folder_is_written_whole(tmp_path):
    lines = [line(1), line(2)]
    write_run(tmp_path, recipe="l2: 1\n", environments=[{"run": 1}], lines=lines, summary=summary())
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        *("recipe.yaml", "environment.json", "results.jsonl", "summary.json", "report.md"),
        *("figure.png", "figure.svg", "figure.csv"),
    }
    assert read_lines(tmp_path) == lines
    table = (tmp_path / "figure.csv").read_text().splitlines()
    assert table[0] == "metric,score,side,mean,standard_error,n"
    assert len(table) == 9


def test_a_line_names_the_neighbours_that_changed_and_the_relation(tmp_path):
    fact = Fact(id="a", subject="Velm", prompt="{} is a", target="town", relation="P31")
    column = SimpleNamespace(fact=fact, batch=1, id=1, outcome=SimpleNamespace(to_dict=dict))
    moved = [(Query("a", "specificity", f"{x} is", "old", None), x == "Ost") for x in ("Ost", "Us")]
    told = fact_line(column, 1, None, None, says_target=None, moved=moved)
    assert told["neighbours"] == {"lost": [["Us is", "old"]], "gained": [["Ost is", "old"]]}
    assert told["relation"] == "P31"
    (tmp_path / "results.jsonl").write_text(as_json(told, indent=None))
    assert read_lines(tmp_path) == [told]
    for wrong in ({"lost": []}, {"lost": [["x"]], "gained": []}, {"lost": 1, "gained": []}, []):
        (tmp_path / "results.jsonl").write_text(as_json(told | {"neighbours": wrong}, indent=None))
        with pytest.raises(ReportError, match="no result of a fact"):
            read_lines(tmp_path)


def test_a_neighbour_lost_and_one_gained_are_a_change():
    sides = {"before": {"specificity_strict": 0.5}, "after": {"specificity_strict": 0.5}}
    old, same = line(1) | sides, {"lost": [], "gained": []}
    both = {"lost": [["Us is", "old"]], "gained": [["Ost is", "old"]]}
    assert neighbours_changed([old, old | {"neighbours": same}]) == 0
    assert neighbours_changed([old | {"neighbours": both}]) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    write(file, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_json_has_null_for_what_is_not_finite():
    data = {"a": float("nan"), "b": [float("inf"), 1.0], "c": None, "d": "é"}
    assert json.loads(as_json(data)) == {"a": None, "b": [None, 1.0], "c": None, "d": "é"}


def test_one_fact_has_no_standard_error():
    assert percent({"mean": 1.0, "standard_error": float("nan"), "n": 1}) == "100.0"
    assert percent({"mean": 0.5, "standard_error": 0.1, "n": 2}) == "50.0 ± 10.0"


# -- the terminal ----------------------------------------------------------------------------------

ANSWERS = [line(1, prompt="東京 is a city in the land of"), line(2, says=False)]
LONG = [x | {"after": x["after"] | {"answer": "Madrid, as everyone knows. " * 9}} for x in ANSWERS]
STORY = text_table(
    ["event", "time (UTC)", "what", "method", "facts", "in the model"],
    ["1", "2026-01-01 00:00:00", "edit", "alphaedit", "+ " + "ada, lyra, " * 20, "1024"],
)


@pytest.mark.parametrize("columns", [80, 60, 40])
@pytest.mark.parametrize(
    ("table", "numbers"),
    [
        (answers_table(LONG), ()),
        (layers_table([LAYER] * 2), ("0.0123", "0.200", "0.500", "100 of 1536")),
        (STORY, ("1024",)),
    ],
)
def test_a_table_fits_the_terminal_and_no_number_is_cut(table, numbers, columns):
    whole, text = as_text(table), as_text(table, columns=columns)
    assert max(map(width, whole.split("\n"))) > 60
    assert max(map(width, text.split("\n"))) <= columns
    assert all(text.count(number) == whole.count(number) for number in numbers)


def test_columns_stay_under_each_other_where_texts_are_cut():
    head, rule, *rows = as_text(answers_table(LONG), columns=80).split("\n")
    assert width(head) <= width(rule) == 80
    assert [
        width(row[: row.index(end)]) for row, end in zip(rows, ("ok", "prefers"), strict=True)
    ] == [73] * 2
    assert rows[0].startswith("東京 is a ")
    assert all("…" in row for row in rows)


def test_rows_become_blocks_where_columns_do_not_fit():
    lines = as_text(layers_table([LAYER | {"rounding_share": 0.25}]), columns=40).split("\n")
    assert lines[0] == "layer 4"
    assert lines[-1].split() == ["rounding/‖Δ‖", "0.250"]
    assert all(line.startswith("  ") for line in lines[1:])


def test_a_column_may_be_empty():
    table = text_table(["limit", "", ""], ["kl", Status("ok", "good"), ""], ["growth", "", ""])
    assert as_text(table).split("\n")[2:] == ["kl      ok", "growth"]
    assert as_text(text_table(["", ""], ["", ""]), columns=20) == "\n\n"


def test_a_status_is_coloured_and_nothing_else():
    text = as_text(answers_table(ANSWERS), colour=True)
    assert "\x1b[32mok\x1b[0m" in text
    assert "\x1b[33mprefers\x1b[0m" in text
    assert text.count("\x1b") == 4
    assert "or\\x1b[31m so" in text
    block = as_text(answers_table(LONG), columns=40, colour=True)
    assert "\x1b[32mok\x1b[0m" in block


@pytest.mark.parametrize(
    ("terminal", "asked", "coloured"),
    [(True, None, True), (True, "1", False), (False, None, False)],
)
def test_colours_are_for_a_terminal_that_wants_them(monkeypatch, terminal, asked, coloured):
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: terminal))
    monkeypatch.delenv("NO_COLOR", raising=False)
    if asked:
        monkeypatch.setenv("NO_COLOR", asked)
    assert has_colours() == coloured


def test_stdout_that_is_no_terminal_has_no_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(width, as_text(answers_table(LONG)).split("\n"))) > 80
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    assert max(map(width, as_text(answers_table(LONG)).split("\n"))) <= 60


def test_a_document_is_shown_whole_on_a_terminal():
    run = RunFolder("A run", summary(), ANSWERS, {}, [])
    text = on_terminal(run_document(run), columns=80)
    assert text.startswith("A run\n\n2 facts in tiny")
    for part in (
        "2 of 2 facts hold.",
        "Rates\n",
        "efficacy, preference (%)",
        "ok: says the target",
    ):
        assert part in text or part.startswith("2 of 2"), part
    assert "\x1b" not in text
