"""What forms give: one fact or a file of them, checked as `nulledit facts check` does."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from nulledit.data.facts import REQUIRED, Fact, Probe, clean_text, quote
from nulledit.data.readers import CHOICE, FactFile, read_facts
from nulledit.errors import BadRecordsError, FactError, NullEditError
from nulledit.ledger.records import History

LISTS = ("paraphrases", "neighbours")
"""Fields of one entry a line."""
FIELDS = (*REQUIRED, "old_answer", "id", "relation", *LISTS)
"""Of a fact, as its form has them."""
ANSWERED = "=>"
"""Parts a neighbour's prompt from its answer."""
SUFFIXES = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".tsv")
MOST_PROBLEMS = 50  # shown of a file


@dataclass(frozen=True)
class Checked:
    """A form that was read: facts, or what is wrong with it."""

    facts: FactFile | None = None
    errors: Mapping[str, tuple[str, ...]] | None = None
    """Field -> what is wrong with it; `file` for those of a file."""

    @property
    def whole(self) -> FactFile:
        """The facts; FactError where there are none."""
        if self.facts is None:
            raise FactError("nothing that can be written was given")
        return self.facts


def read_fact(given: Mapping[str, str]) -> Checked:
    """One fact of a form's texts."""
    record: dict[str, Any] = {name: given.get(name, "").strip() or None for name in FIELDS}
    errors: dict[str, tuple[str, ...]] = {}
    for name in REQUIRED:
        try:
            clean_text(record[name], name)
        except FactError as error:
            errors[name] = (str(error),)
    for name in LISTS:
        lines = [line.strip() for line in (record[name] or "").splitlines() if line.strip()]
        record[name] = list(map(_probe, lines)) if name == "neighbours" else lines
    if given.get("forget"):
        record |= {"forget": True, "old_answer": None}
    if not errors:
        try:
            return Checked(FactFile((Fact.from_dict(record),), "form", ()))
        except FactError as error:
            field = re.match(r"[a-z_]+", str(error))
            name = field[0] if field and field[0] in FIELDS else "subject"
            errors[name] = (str(error),)
    return Checked(errors=errors)


def read_upload(name: str, content: bytes) -> Checked:
    """The facts of a file that was given; its own name stands in what is said of it."""
    own = PurePath(name.replace("\\", "/")).name or "the file"
    suffix = PurePath(own).suffix.lower()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"facts{suffix if suffix in SUFFIXES else '.yaml'}"
        path.write_bytes(content)

        def said(text: str) -> str:
            return text.replace(str(path), own)

        try:
            found = read_facts(path)
        except BadRecordsError as error:
            problems = [said(problem).removesuffix(CHOICE) for problem in error.problems]
            if (more := len(problems) - MOST_PROBLEMS) > 0:
                problems[MOST_PROBLEMS:] = [f"and {more} more"]
            return Checked(errors={"file": tuple(problems)})
        except NullEditError as error:
            return Checked(errors={"file": (said(str(error)),)})
    notices = tuple(said(notice) for notice in found.notices)
    return Checked(replace(found, notices=notices))


def filled(fact: Fact) -> dict[str, str]:
    """A form's texts for a fact that is known; its id, unless it was given one, is left open."""
    given = {name: getattr(fact, name) or "" for name in FIELDS if name not in LISTS}
    given["paraphrases"] = "\n".join(fact.paraphrases)
    given["neighbours"] = "\n".join(map(_line, fact.neighbours))
    if fact.id == replace(fact, id="").id:
        given["id"] = ""
    return given


def in_its_place(checked: Checked, history: History | None) -> Checked:
    """A form's fact with what the one in its place, in the model, has besides its fields."""
    if checked.facts is None or history is None:
        return checked
    known = {column.fact.key: column.fact for column in history.present}
    facts = (_with_unshown(f, known[f.key]) if f.key in known else f for f in checked.facts.facts)
    return replace(checked, facts=replace(checked.facts, facts=tuple(facts)))


def taken(checked: Checked, history: History | None, field: str) -> dict[str, tuple[str, ...]]:
    """Under `field`, the ids that facts of another question have in the ledger."""
    if checked.facts is None or history is None:
        return {}
    owners = {column.fact.id: column.fact for column in history.columns}
    found = tuple(
        f"id {quote(fact.id)} is that of another fact, about {quote(owner.subject)}: choose "
        "another, or leave it open"
        for fact in checked.facts.facts
        if (owner := owners.get(fact.id)) and owner.key != fact.key
    )
    return {field: found} if found else {}


def _with_unshown(fact: Fact, known: Fact) -> Fact:
    """`fact` of a form with what `known`, which it takes the place of, has besides its fields.

    What belongs to an answer stays only with that answer.
    """
    same = fact.target == known.target
    probes = {(probe.prompt, probe.answer): probe for probe in known.neighbours}
    return replace(
        fact,
        more_prompts=known.more_prompts,
        other_relations=known.other_relations,
        neighbours=tuple(probes.get((p.prompt, p.answer), p) for p in fact.neighbours),
        target_aliases=known.target_aliases if same else (),
        portability=known.portability if same and not fact.forget else (),
    )


def _line(probe: Probe) -> str:
    """What `_probe` reads as this one."""
    parted = bool(probe.answer) or ANSWERED in probe.prompt
    return f"{probe.prompt} {ANSWERED} {probe.answer or ''}".rstrip() if parted else probe.prompt


def _probe(line: str) -> dict[str, str]:
    prompt, arrow, answer = line.rpartition(ANSWERED)
    if not arrow or not answer.strip():
        return {"prompt": prompt.strip() if arrow else line}
    return {"prompt": prompt.strip(), "answer": answer.strip()}
