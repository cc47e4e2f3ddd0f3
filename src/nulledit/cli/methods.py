"""`nulledit methods`: the table of methods, and one of them in detail."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
from typing import TYPE_CHECKING, Any

from nulledit.cli.command import Call, command
from nulledit.cli.options import arg

if TYPE_CHECKING:
    from nulledit.methods import Method
    from nulledit.report.document import Document, Part

TRAITS = {
    "history": "past facts stay in the solve: batches equal one joint solve, in any order",
    "projected": "solves inside the null space, as published",
    "linear": "the update is linear in what is missing at the keys",
    "one_by_one": "edits facts one at a time, each on the model that the one before left",
    "rewinds": "optimises values on the unedited model",
    "by_gradient": "finds the update by gradient descent; a batch is undone as a whole",
}


@command("Methods, their settings and sources.", arg("name", "[NAME]"))
def methods(call: Call) -> None:
    """All methods in a table, or one by NAME with its settings. More in docs/methods/.

    A recipe names its method and sets its constants beside the name: `method: {name: memit,
    moment_weight: 20000}`; all but gated take `projection: none`, `inside` or `after`.

    \b
    $ nulledit methods
    $ nulledit methods memit
    """
    call.prepare()
    from nulledit.methods import METHODS, find_method

    if call.name is not None:
        found = describe(find_method(call.name))
        return call.show(found, lambda: page(found))
    rows = [describe(method) for method in METHODS]
    return call.show(rows, lambda: table(rows))


def describe(method: Method) -> dict[str, Any]:
    """All that is said of a method, as plain data."""
    docs = field_docs(method.settings)
    settings = [
        {"name": name, "default": default, "about": docs.get(name, "")}
        for name, default in method.constants().items()
    ]
    ours = method.settings.__module__.startswith("nulledit.")
    return {
        "name": method.name,
        "about": method.about,
        "paper": method.paper,
        "traits": {trait: getattr(method, trait) for trait in TRAITS},
        "settings": settings,
        "cost": method.cost,
        "page": f"docs/methods/{method.page or method.name}.md" if ours else None,
    }


def table(found: list[dict[str, Any]]) -> list[Part]:
    """One line a method, and one below that says what it does."""
    from nulledit.report.document import Items, StudyTable

    shown = ("history", "projected", "linear")
    rows = [
        [m["name"], *("yes" if m["traits"][trait] else "-" for trait in shown), m["paper"]]
        for m in found
    ]
    said = []
    for m in found:
        own = ", ".join(f"{s['name']}={_plain(s['default'])}" for s in m["settings"])
        settings = f" Settings: {own}." if own else ""
        said.append((m["name"], f"{m['about']}. A batch costs: {m['cost']}.{settings}"))
    return [
        StudyTable.of("methods", "", ("method", *shown, "paper"), rows),
        Items(tuple((trait, TRAITS[trait]) for trait in shown)),
        Items(tuple(said)),
    ]


def page(method: dict[str, Any]) -> Document:
    """One method in detail."""
    from nulledit.report.document import Document, Items

    settings = method["settings"]
    return Document(
        f"{method['name']}: {method['about']}",
        (
            Items(tuple((k, method[k]) for k in ("paper", "page", "cost") if method[k])),
            Items(tuple(said for trait, said in TRAITS.items() if method["traits"][trait])),
            Items(
                tuple(
                    (f"{s['name']} (default {_plain(s['default'])})", s["about"]) for s in settings
                )
            ),
        ),
    )


def field_docs(settings: type) -> dict[str, str]:
    """The docstring under each field of a settings dataclass and of those it builds on.

    Empty for a class whose source is not at hand, such as one typed into a console.
    """
    docs: dict[str, str] = {}
    for cls in reversed(settings.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value == math.e:
        return "e"
    return f"{value:g}" if isinstance(value, float) else str(value)
