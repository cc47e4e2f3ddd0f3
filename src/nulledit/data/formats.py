"""Other projects' records turned into native ones: one row of names for each project.

A new format is a row of `SHAPES`. Questions beside the fact are read under all names that the rows
share, whichever the format is. What nobody reads is named once a file (`views.Coverage`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nulledit.data.facts import FIELDS, REQUIRED, SLOT, as_template, clean_text, quote
from nulledit.data.views import ANSWERS, IDS, PROMPTS, Coverage, Names, View, blank, flat
from nulledit.errors import FactError

Record = Mapping[str, Any]
NATURAL_QUESTION = "nq question: "


@dataclass(frozen=True)
class Questions:
    """Where prompts and their answers stand side by side."""

    prompts: str
    """One prompt, or a list of them."""
    answers: Names = ()
    """For one prompt all that is right, for a list of prompts as many answers."""
    shared: bool = False
    """All texts at all of `answers` are right for each of the prompts."""


NEIGHBOURS = (
    Questions("locality_prompt", ("locality_ground_truth", "locality_answer")),
    Questions("loc", ("loc_ans",)),
    Questions("locality_question", ("locality_answer",)),
)
PORTABILITY = (
    Questions("portability_prompt", ("portability_ground_truth",)),
    Questions("mhop", ("mhop_ans",)),
    Questions("questions", ("new_answer", "new_answer_alias"), shared=True),
    Questions("sub_question", ("sub_answer",)),
    Questions("onehop_question", ("onehop_answer",)),
    Questions("inverse_question", ("inverse_answer",)),
    Questions("reversed_relation_question", ("subject",)),
    Questions("alter_question", ("answer",)),
    *(Questions(f"question_{n}hop", (f"answer_{n}hop",)) for n in range(2, 7)),
)
OTHER_RELATIONS = "Relation_Specificity"
"""The block of `locality` whose questions are about the fact's own subject."""
PARAPHRASES = (
    *("rephrase_prompt", "rephrase", "paraphrase_prompts", "paraphrased_question"),
    *("para_question", "personas"),
)


@dataclass(frozen=True)
class Shape:
    """Where the records of one project hold what a fact needs; of several names the first counts.

    Blocks of questions at `locality` and `portability` are read in every shape.
    """

    title: str
    """As its authors call it."""
    subject: Names = ("subject",)
    prompt: Names = ("prompt",)
    target: Names = ("target_new",)
    """Several answers there are all right; the first is written."""
    old_answer: Names = ()
    core: str = ""
    """The mapping that holds subject, prompt and answers, or a list of such: a fact each."""
    core_paraphrases: Names = ()
    """Further wordings in that mapping."""
    neighbours: tuple[Questions, ...] = NEIGHBOURS
    same_answer: str = ""
    """Prompts about other subjects that have the old answer, too."""
    forget: bool = False
    """The answer is what the model says now."""
    lacks: str = ""
    """What these records do not have, and why they are refused."""

    @property
    def essential(self) -> set[str]:
        """Names by which the shape is told from others."""
        if self.core:
            return {self.core}
        return {*self.subject, *self.prompt, *self.target, *self.old_answer}

    @property
    def known(self) -> set[str]:
        """All names that are read at the top of a record."""
        asked = (*self.neighbours, *PORTABILITY)
        beside = {q.prompts for q in asked} | {name for q in asked for name in q.answers}
        beside |= {*PARAPHRASES, *IDS, *RELATIONS, "locality", "portability"}
        return self.essential | beside | ({self.same_answer} if self.same_answer else set())


RELATIONS = ("relation_id", "relation")
NATIVE = "native"
KNOWN = "known"

SHAPES = {
    "counterfact": Shape(
        "CounterFact (arXiv:2202.05262), MQuAKE (arXiv:2305.14795) or AKEW (arXiv:2402.18909)",
        old_answer=("target_true",),
        core="requested_rewrite",
        core_paraphrases=("question",),
        same_answer="neighborhood_prompts",
    ),
    "easyedit": Shape(
        "EasyEdit or KnowEdit (arXiv:2401.01286)",
        old_answer=("ground_truth", "target_old", "target_true"),
        same_answer="neighborhood_prompts",
    ),
    "zsre": Shape(
        "zsRE as split for MEND (arXiv:2110.11309)",
        prompt=("src",),
        target=("alt",),
        old_answer=("answers",),
    ),
    "wikibigedit": Shape("WikiBigEdit (arXiv:2503.05683)", prompt=("update",), target=("ans",)),
    "ultraedit": Shape("UltraEditBench (arXiv:2505.14679)", target=("ans",)),
    "qaedit": Shape("QAEdit (arXiv:2502.11177)", target=("target",), old_answer=("ground_truth",)),
    "wikibio": Shape(
        "KnowEdit's WikiBio (arXiv:2401.01286)",
        subject=("concept",),
        prompt=("text",),
        target=("labels",),
    ),
    "hallueditbench": Shape(
        "HalluEditBench (arXiv:2410.16251)", prompt=("question",), target=("object",)
    ),
    "questions": Shape(
        "UnKE (arXiv:2405.15349) or a list of questions and answers",
        prompt=("question",),
        target=("answer",),
        lacks="UnKE and EditEverything name no subject: add a field subject that the question "
        "contains",
    ),
    "rippleedits": Shape(
        "RippleEdits (arXiv:2307.12976)",
        core="edit",
        lacks="it names subject and target by Wikidata's numbers only; KnowEdit's wiki_counterfact "
        "has such facts with their texts",
    ),
    KNOWN: Shape("ROME's known_1000 (arXiv:2202.05262)", target=("attribute",), forget=True),
}


_QUESTIONS = (*NEIGHBOURS, *PORTABILITY)
SEVERAL = {
    *(*PARAPHRASES, "neighborhood_prompts", "locality", "portability"),
    *(name for row in _QUESTIONS for name in (row.prompts, *row.answers)),
} - {name for shape in SHAPES.values() for name in shape.essential}
"""Names under which a cell of a table may hold several texts."""
KNOWN_NAMES = {*FIELDS, *(name for shape in SHAPES.values() for name in shape.known)}
"""Names of any format."""


@dataclass(frozen=True)
class Converted:
    """A record in native fields, and what the user should know of it."""

    facts: tuple[dict[str, Any], ...]
    """Native records; none where the record asks for no edit."""
    notices: tuple[str, ...] = ()
    """Choices made for this record."""


def detect_shape(names: Iterable[object]) -> str:
    """Name of the shape that most of a record's essential names, then most of all, belong to."""
    keys = set(names)
    found = {name: (len(s.essential & keys), len(s.known & keys)) for name, s in SHAPES.items()}
    for name, shape in SHAPES.items():
        if shape.core and shape.core in keys:
            found[name] = (len(FIELDS), 0)
    native = (len(essential_names(NATIVE) & keys), len(set(FIELDS) & keys))
    return max([NATIVE, *SHAPES], key=lambda name: found.get(name, native))


def essential_names(shape: str) -> set[str]:
    """Names that tell a shape from others."""
    return set(REQUIRED) if shape == NATIVE else SHAPES[shape].essential


def convert(record: object, shape: Shape, coverage: Coverage) -> Converted:
    """Native records of another project's one; a FactError names the record's own field."""
    outer = View(record, coverage)
    cores = outer.inside(shape.core) if shape.core else [outer]
    facts: list[dict[str, Any]] = []
    notices: list[str] = []
    for i, core in enumerate(cores):
        fields, said = _fact(core, shape)
        notices += said
        if not fields:
            continue
        fields |= _identity(outer, core, number=i + 1 if len(cores) > 1 else 0)
        fields |= _questions(outer, core, shape, first=i == 0, fields=fields)
        facts.append(fields)
    return Converted(tuple(facts), tuple(notices))


def _fact(core: View, shape: Shape) -> tuple[dict[str, Any], list[str]]:
    """Subject, prompt, target and old answer; nothing where there is no target to write."""
    given = next((name for name in shape.target if name in core.value), None)
    if given and core.get(*shape.target)[1] is None:
        return {}, [f"{core.place(given)} is empty: left out, there is no target"]
    subject = core.text(shape.subject)
    place, found = core.need(shape.target)
    if not (answers := flat(found, place)):
        raise FactError(f"{place} holds no text (found {quote(found)})")
    target, *aliases = answers
    prompt_place = core.need(shape.prompt)[0]
    prompt, subject, notices = _template(core.text(shape.prompt), subject, prompt_place)
    fields: dict[str, Any] = {"subject": subject, "prompt": prompt, "target": target}
    if aliases:
        fields["target_aliases"] = aliases
    if shape.forget:
        fields["forget"] = True
    if old := core.answers(shape.old_answer) if shape.old_answer else []:
        same = [text for text in old if text.casefold() == target.casefold()]
        if same:
            said = f"{place} is the old answer {quote(same[0])}: kept, without an old answer"
            notices.append(said)
        else:
            fields["old_answer"] = old[0]
    return fields, notices


def _template(prompt: str, subject: str, place: str) -> tuple[str, str, list[str]]:
    """`prompt` with one slot, and the subject as it is spelled there: of several places the first.

    Nobody marks slots by hand in files of thousands of cases, so a choice beats a refusal here.
    """
    if SLOT in prompt or prompt.count(subject) == 1:
        return as_template(prompt, subject, place), subject, []
    if subject not in prompt:
        found = re.search(re.escape(subject), prompt, re.IGNORECASE)
        if not found:
            return as_template(prompt, subject, place), subject, []
        spelled = found.group()
        notice = f"{place} spells the subject {quote(spelled)}: it is taken so"
        return prompt[: found.start()] + SLOT + prompt[found.end() :], spelled, [notice]
    notice = f"{place} contains the subject {quote(subject)} more than once: the first is taken"
    return prompt.replace(subject, SLOT, 1), subject, [notice]


def _identity(outer: View, core: View, *, number: int) -> dict[str, Any]:
    """Id and relation; `number` tells the facts of one record apart."""
    fields: dict[str, Any] = {}
    place, given = outer.get(*IDS)
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    if given is not None:
        fields["id"] = clean_text(given, place) + (f"-{number}" if number else "")
    relation = core.get(*RELATIONS)[1]
    return fields if relation is None else fields | {"relation": relation}


def _questions(
    outer: View, core: View, shape: Shape, *, first: bool, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """What is asked beside the fact; what a record of several facts asks is asked of the first."""
    asked: dict[str, Any] = {"paraphrases": core.all_texts(shape.core_paraphrases)}
    target = fields["target"]
    if aliases := [*fields.get("target_aliases", ()), *_hop_aliases(outer, target)]:
        asked["target_aliases"] = aliases
    if not first:
        return asked
    asked["paraphrases"] += outer.all_texts(PARAPHRASES)
    local = list(_all(outer, shape.neighbours, "locality"))
    own = [probe for block, probe in local if block == OTHER_RELATIONS]
    neighbours = [probe for block, probe in local if block != OTHER_RELATIONS]
    if shape.same_answer:
        old = core.answers(shape.old_answer)
        prompts = outer.all_texts((shape.same_answer,))
        neighbours += [{"prompt": prompt} | _right(old) for prompt in prompts]
    for probe in neighbours:
        probe["prompt"] = _question(probe["prompt"])
    portability = [probe for _, probe in _all(outer, PORTABILITY, "portability")]
    left_out = sum("answer" not in probe for probe in portability)
    if left_out:
        reason = "questions of portability have no answer and were left out"
        outer.coverage.left_out[reason] += left_out
    asked["neighbours"] = neighbours
    asked["other_relations"] = own
    asked["portability"] = [probe for probe in portability if "answer" in probe]
    return asked


def _all(
    outer: View, rows: Iterable[Questions], blocks: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions, each with the name of its block, empty for none."""
    for row in rows:
        for probe in _probes(outer, (row.prompts,), row.answers, shared=row.shared):
            yield "", probe
    for name, block in outer.blocks(blocks):
        for probe in _probes(block, PROMPTS, ANSWERS):
            yield name, probe


def _probes(
    view: View, prompt_names: Names, answer_names: Names, *, shared: bool = False
) -> Iterator[dict[str, Any]]:
    """Prompts with all their right answers."""
    place, value = view.get(*prompt_names)
    prompts = _each(value, place) if isinstance(value, list | tuple) else flat(value, place)
    if not prompts:
        return
    if shared or len(prompts) == 1:
        given = view.all_texts(answer_names) if shared else view.answers(answer_names)
        answers = [given] * len(prompts)
    else:
        answers = _pairwise(view, answer_names, len(prompts), place)
    for prompt, right in zip(prompts, answers, strict=True):
        if prompt:
            yield {"prompt": prompt} | _right(right)


def _right(answers: list[str]) -> dict[str, Any]:
    first = {"answer": answers[0]} if answers else {}
    return first | ({"aliases": answers[1:]} if answers[1:] else {})


def _each(values: Sequence[Any], place: str) -> list[str]:
    """The texts of a list; an empty one keeps its place beside the answers."""
    found = ["" if blank(v) else clean_text(v, f"{place}[{i}]") for i, v in enumerate(values)]
    return found if any(found) else []


def _pairwise(view: View, names: Names, count: int, prompts_place: str) -> list[list[str]]:
    place, value = view.get(*names)
    if value is None:
        return [[]] * count
    held = value if isinstance(value, list | tuple) else [value]
    if len(held) != count:
        raise FactError(
            f"{place} has {len(held)} texts and {prompts_place} {count}: expected as many"
        )
    return [flat(item, f"{place}[{i}]") for i, item in enumerate(held)]


def _hop_aliases(outer: View, target: str) -> list[str]:
    """Other names of the target that MQuAKE gives beside the hop that asks for it."""
    found: list[str] = []
    hops = outer.get("new_single_hops")[1]
    for hop in hops if isinstance(hops, list) else []:
        if isinstance(hop, Mapping) and hop.get("answer") == target:
            found += flat(hop.get("answer_alias"), "new_single_hops.answer_alias")
    return [text for text in dict.fromkeys(found) if text != target]


def _question(prompt: str) -> str:
    """zsRE's unrelated question with its mark, as in the loader of ROME, MEMIT and AlphaEdit."""
    lacks = prompt.startswith(NATURAL_QUESTION) and not prompt.endswith("?")
    return prompt + "?" if lacks else prompt
