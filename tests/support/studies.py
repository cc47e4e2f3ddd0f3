"""Studies as a report reads them, written by hand."""

from nulledit.report.document import Column, Example, FigureSpec, Study, StudyTable, Value
from nulledit.report.points import Point

BAD = "<script>alert(1)</script> $x_{ \x1b[31m & _"


def table(*values, better="high", digits=1):
    rows = [{"method": name, "rate": value} for name, value in values]
    columns = (Column("method", "method"), Column("rate", "rate", better, "%", digits))
    return StudyTable("final", "At the end", "Means over facts.", columns, tuple(rows))


def spec(kind, *points, **more):
    named = {"name": "stream", "caption": "What happens", "x": "edits", "y": "rate"}
    return FigureSpec(**{**named, "kind": kind, "points": points, **more})


def lines(series, *, panel="", at=(100, 200, 300), start=90.0):
    return [Point(x, start - i, 1.5, 200, series, panel) for i, x in enumerate(at)]


def study(**more):
    figures = (
        spec("lines", *lines("alphaedit"), *lines("memit", start=80.0), labels={"y": "rate (%)"}),
        spec(
            "intervals",
            Point("efficacy", -1.0, None, 50, "memit", low=-3.0, high=0.5),
            Point("specificity", None),
            name="pairs",
        ),
    )
    given = {
        "name": "stream",
        "title": "A long stream",
        "question": "Which one lasts?",
        "scale": "small",
        "settings": {"facts": 200, "recipe": {"layers": [3, 4]}},
        "environment": ({"model": "tiny", "device": "cpu"},),
        "seconds": {"wall": 61.0, "cpu": 3700.0},
        "shows": "Something.",
        "cannot_show": "Everything.",
        "notices": ("one notice",),
        "tables": (table(("alphaedit", Value(99.0, 0.5, 200)), ("memit", 98.7), ("rect", None)),),
        "figures": figures,
        "examples": (Example("memit", "The sky is", "green", "blue", "green.", True),),
    }
    return Study(**{**given, **more})
