"""The folder of a study, the marks in its tables, and its figures."""

import json
import math
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from support.studies import BAD, lines, spec, study, table

from nulledit.errors import ReportError
from nulledit.report import images
from nulledit.report.cells import BEST, TIE, heads, notes, shown
from nulledit.report.colours import FIXED, styles
from nulledit.report.document import Column, Value
from nulledit.report.figures import figure_of
from nulledit.report.images import as_image, as_svg
from nulledit.report.points import Point
from nulledit.report.study import read_study, write_study


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, study(title="A | <b> stream"))
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A study of one's own to spoil."""
    return shutil.copytree(written, tmp_path / "study")


# -- the folder ----------------------------------------------------------------------------------


def test_a_study_is_read_back_as_it_was_written(written):
    assert read_study(written) == study(title="A | <b> stream")
    names = {str(p.relative_to(written)) for p in written.rglob("*") if p.is_file()}
    drawn = {f"figures/{n}.{k}" for n in ("stream", "pairs") for k in ("csv", "png", "svg")}
    assert names == {"study.json", "study.md"} | drawn


def test_what_is_not_finite_is_null_and_read_as_absent(tmp_path):
    odd = table(("a", Value(math.nan, math.inf, 3)), ("b", 1.0))
    points = (Point(1.0, math.nan, math.inf), Point(2.0, 5.0))
    write_study(tmp_path, study(tables=(odd,), figures=(spec("lines", *points),)))
    assert "NaN" not in (tmp_path / "study.json").read_text()
    back = read_study(tmp_path)
    assert back.tables[0].rows[0]["rate"] == Value(None, None, 3)
    assert back.figures[0].points == (Point(1.0, None), Point(2.0, 5.0))


def test_names_with_commas_and_quotes_survive_the_csv(tmp_path):
    point = Point('a, "b"\nc', 1.0, series="memit, λ₀ = 15", panel="x,y")
    write_study(tmp_path, study(figures=(spec("bars", point),)))
    assert read_study(tmp_path).figures[0].points == (point,)


def test_another_format_is_refused_with_what_to_do(tmp_path):
    write_study(tmp_path, study(figures=()))
    file = tmp_path / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 7}))
    with pytest.raises(ReportError, match=r"format 7.* reads 1.*run the study again"):
        read_study(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("tables"), "tables"),
        (lambda d: d.update(more=1), "unknown keys"),
        (lambda d: d["figures"][0].update(kind="pie"), "pie"),
        (lambda d: d["figures"][0].update(name="../../secret"), "secret"),
        (lambda d: d["tables"][0]["rows"].append({"other": 1}), "other"),
    ],
)
def test_a_broken_study_is_refused(folder, change, said):
    file = folder / "study.json"
    plain = json.loads(file.read_text())
    change(plain)
    file.write_text(json.dumps(plain))
    with pytest.raises(ReportError, match=said):
        read_study(folder)


def test_a_missing_file_is_named(folder):
    (folder / "figures" / "pairs.csv").unlink()
    with pytest.raises(ReportError, match=r"pairs\.csv is missing"):
        read_study(folder)
    (folder / "study.json").unlink()
    with pytest.raises(ReportError, match="no study here"):
        read_study(folder)


def test_the_markdown_page_has_the_same_content(written):
    page = (written / "study.md").read_text()
    assert "# A \\| \\<b\\> stream" in page
    assert "| alphaedit | 99.0 ± 0.5 ● |" in page
    assert "](figures/stream.png)" in page
    assert "1 min 1 s of wall time" in page
    assert "| memit | The sky is | green | blue | green. |" in page


def test_a_rate_is_a_value_in_percent():
    rate = {"mean": 0.975, "standard_error": None, "n": 1}
    assert Value.percent(rate) == Value(97.5, None, 1)
    assert Value.percent(None) is None


# -- marks ---------------------------------------------------------------------------------------


def marks(found):
    return [row[1].mark for row in shown(found)]


def test_ties_within_a_standard_error_of_the_best_are_marked_weaker():
    found = table(("a", Value(90.0, 2.0, 9)), ("b", Value(88.1, 0.1, 9)), ("c", Value(87.9, 9, 9)))
    assert marks(found) == [BEST, TIE, ""]
    lowest = table(("a", Value(3.0, 0.5, 9)), ("b", Value(3.4, 1, 9)), ("c", 4.0), better="low")
    assert marks(lowest) == [BEST, TIE, ""]


def test_the_unedited_model_is_no_competitor():
    found = table(("unedited", 99.0), ("a", 80.0), ("b", 70.0))
    assert marks(found) == ["", BEST, ""]
    assert any("unedited" in note for note in notes(found))


def test_no_contest_has_no_mark():
    assert marks(table(("a", 1.0), ("b", 1.0))) == ["", ""]
    assert marks(table(("a", 1.0), ("b", None))) == ["", ""]
    assert marks(table(("a", 1.0), ("b", 2.0), better=None)) == ["", ""]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.none() | st.integers(0, 9)), min_size=2, max_size=8),
    st.sampled_from(["high", "low"]),
)
def test_marks_equal_a_plain_search(pairs, better):
    values = [Value(mean, error, 5) for mean, error in pairs]
    found = marks(table(*((f"m{i}", v) for i, v in enumerate(values)), better=better, digits=0))
    means = [mean for mean, _ in pairs]
    top = max(means) if better == "high" else min(means)
    error = max((e or 0) for m, e in pairs if m == top)
    expected = [BEST if m == top else TIE if abs(m - top) <= error else "" for m in means]
    assert found == (expected if len(set(means)) > 1 else [""] * len(means))


def test_n_is_shown_once_where_it_is_the_same():
    same = table(("a", Value(1.0, 0.1, 50)), ("b", Value(2.0, 0.1, 50)))
    assert "n = 50" in notes(same)
    assert [str(cell) for cell in shown(same)[0]] == ["a", "1.0 ± 0.1"]
    other = table(("a", Value(1.0, 0.1, 50)), ("b", Value(2.0, 0.1, 49)))
    assert [str(cell) for cell in shown(other)[1]] == ["b", "2.0 ± 0.1 ●", "49"]
    assert heads(other)[-1] == "n"
    assert not any(note.startswith("n =") for note in notes(other))
    columns = (*other.columns, Column("more", "more"))
    both = replace(other, columns=columns, rows=({**other.rows[0], "more": Value(3, 1, 7)},) * 2)
    assert [cell.n for cell in shown(replace(both, rows=(*both.rows, other.rows[1])))[0]] == [
        *("", "50", ""),
    ]


def test_small_numbers_are_not_shown_as_zero():
    cells = [
        row[1].text for row in shown(table(("a", 0.0004), ("b", 0.0), ("c", -0.5), ("d", 3e7)))
    ]
    assert cells == ["0.0004", "0.0", "−0.5", "3e+07"]


# -- figures -------------------------------------------------------------------------------------


def draw(kind, *points, **more):
    return figure_of(spec(kind, **more), points)


def test_a_method_has_one_colour_whatever_is_beside_it():
    alone, among = styles(["memit"]), styles(["x", "rect", "alphaedit", "MEMIT"])
    assert alone["memit"] == among["MEMIT"] == FIXED["memit"]
    assert styles(["my method"]) == styles(["my method"])
    many = styles([f"method {i}" for i in range(6)] + list("alphaedit memit rect".split()))
    assert len({style.colour for style in many.values()}) == 9


def test_lines_have_their_points_and_error_bars():
    figure = draw("lines", *lines("alphaedit"), *lines("memit", start=80.0))
    bars = figure.axes[0].containers
    assert [c.get_label() for c in bars] == ["alphaedit", "memit"]
    for container, start in zip(bars, (90.0, 80.0), strict=True):
        assert container.lines[0].get_ydata().tolist() == [start, start - 1, start - 2]
        low, high = container.lines[2][0].get_segments()[0][:, 1]
        assert high - low == pytest.approx(3.0)  # two standard errors
    assert to_hex(bars[1].lines[0].get_color()) == FIXED["memit"].colour


def test_the_unedited_model_is_a_grey_line_without_markers():
    figure = draw("lines", *lines("memit"), Point(0, 89.0, 0.5, 9, "unedited"))
    line = next(x for x in figure.axes[0].lines if x.get_label() == "unedited")
    assert line.get_color() == "#8c8c8c"
    assert line.get_marker() == "None"


def test_a_far_unedited_model_does_not_flatten_the_others():
    far = [Point(x, 1.0, 0.1, 9, "unedited") for x in (100, 200, 300)]
    axes = draw("lines", *lines("memit"), *far).axes[0]
    assert axes.get_ylim()[0] > 50
    assert [t.get_text() for t in axes.texts] == ["unedited: 1 ↓"]


def test_bars_are_grouped_and_have_their_number_where_there_is_room():
    points = [Point(f"task {i}", 50.0 + i, 1.0, 9, m) for i in range(6) for m in ("rect", "memit")]
    many, few = draw("bars", *points).axes[0], draw("bars", *points[:4]).axes[0]
    assert [p.get_height() for p in few.patches] == [50.0, 51.0, 50.0, 51.0]
    assert (len(many.patches), len(few.patches)) == (12, 4)
    assert [len(axes.texts) for axes in (many, few)] == [12, 4]
    points += [Point(f"task {i}", 60.0, 1.0, 9, m) for i in range(6) for m in ("prune", "rome")]
    assert not draw("bars", *points).axes[0].texts


def test_intervals_are_hollow_where_they_reach_zero():
    points = [
        Point("a", -1.0, None, 9, "memit", low=-3.0, high=0.5),
        Point("b", 2.0, 0.5, 9, "memit"),
    ]
    axes = draw("intervals", *points).axes[0]
    faces = [to_hex(c.lines[0].get_markerfacecolor()) for c in axes.containers]
    assert faces == ["#ffffff", FIXED["memit"].colour]
    ends = [c.lines[2][0].get_segments()[0][:, 0].tolist() for c in axes.containers]
    assert ends[0] == pytest.approx([-3.0, 0.5])
    assert ends[1] == pytest.approx([2 - 0.98, 2 + 0.98], abs=1e-3)


def test_clouds_share_their_axes():
    points = [
        Point(float(i), i + shift, None, 9, side, panel)
        for panel, shift in (("memit", 0), ("rect", 20))
        for side in ("before", "after")
        for i in range(5)
    ]
    axes = draw("scatter", *points).axes
    assert [ax.get_title(loc="left") for ax in axes] == ["memit", "rect"]
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert all(len(c.get_offsets()) == 5 for ax in axes for c in ax.collections)


def test_many_series_have_their_legend_outside():
    figure = draw("lines", *(p for i in range(8) for p in lines(f"method {i}")))
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert len(figure.legends[0].get_texts()) == 8
    for axes in figure.axes:
        assert not legend.overlaps(axes.get_tightbbox())
        assert axes.get_window_extent().height > 0.4 * figure.bbox.height


def test_a_logarithmic_axis_is_one():
    axes = draw("lines", *lines("memit"), log=("y",)).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")


@pytest.mark.parametrize("kind", ["lines", "bars", "scatter", "intervals"])
def test_text_in_a_figure_is_only_text(kind):
    x = 1.0 if kind == "scatter" else BAD
    points = [Point(x, 1.0, 0.1, 9, series, BAD) for series in (BAD, "_b")]
    raw = as_svg(draw(kind, *points, labels={"x": BAD, "y": BAD}))
    root = ElementTree.fromstring(raw)  # or it is no XML
    assert not [e for e in root.iter() if e.tag.endswith("script")]
    told = " ".join(e.text or "" for e in root.iter() if e.tag.endswith("text"))
    assert "alert(1)</script> $x_{" in told
    assert raw == as_svg(draw(kind, *points, labels={"x": BAD, "y": BAD}))


def test_a_large_drawing_becomes_pixels(monkeypatch):
    figure = draw("lines", *lines("memit"))
    assert as_image(figure)[0] == "image/svg+xml"
    monkeypatch.setattr(images, "LARGEST_SVG", 1000)
    kind, raw = as_image(figure)
    assert kind == "image/png"
    assert raw.startswith(b"\x89PNG")


def test_slips_of_a_writer_are_told():
    with pytest.raises(ValueError, match="expected letters"):
        spec("lines", name="a/b")
    with pytest.raises(ValueError, match="twice"):
        study(figures=(spec("lines"), spec("bars")))
    with pytest.raises(ValueError, match="better"):
        replace(Column("a", "a"), better="more")
