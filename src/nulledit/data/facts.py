"""A fact to write into a model, and the checks on its texts."""

from __future__ import annotations

import datetime
import difflib
import hashlib
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from nulledit.errors import FactError

SLOT = "{}"
MAX_ID_CHARACTERS = 200
MAX_TEXT = 100_000
"""Characters of one text of a fact, some 25,000 tokens."""
# Control characters (category Cc) but newline and tab, and lone surrogates: slips of encoding.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# What YAML makes of an unquoted 1969, 1.5, yes or 1969-07-20.
_NOT_QUOTED = (bool, int, float, datetime.date)
_TRUTHS = {"true": True, "false": False}  # CSV has no truth values of its own
_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = 60


def quote(value: object) -> str:
    """`value` as one short line for a message."""
    return _shortener.repr(value).replace("\n", " ")


def suggest(name: object, known: Iterable[str]) -> str:
    """' (did you mean ...?)' if `name` is near one of `known`, else nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def clean_text(value: object, field: str) -> str:
    """`value` without outer whitespace, or a FactError that names `field`."""
    if value is None:
        raise FactError(f"{field} is missing or empty: expected text")
    if isinstance(value, _NOT_QUOTED):
        kind = type(value).__name__
        raise FactError(f"{field} must be text: write it in quotes (found {kind} {quote(value)})")
    if not isinstance(value, str):
        raise FactError(f"{field} must be text (found {type(value).__name__} {quote(value)})")
    if len(value) > MAX_TEXT:
        raise FactError(
            f"{field} has {len(value)} characters: expected at most {MAX_TEXT} "
            f"(found {quote(value[:100])})"
        )
    if found := _FORBIDDEN.search(value):
        point = ord(found.group())
        kind = "lone surrogate" if point >= 0xD800 else "control character"
        raise FactError(
            f"{field} holds the {kind} U+{point:04X} at character {found.start()}: "
            f"only newline and tab are allowed"
        )
    if not (text := value.strip()):
        raise FactError(f"{field} is empty: expected text")
    return text


def as_template(prompt: str, subject: str, field: str) -> str:
    """`prompt` with exactly one slot, put where the subject stands if there is none yet."""
    slots = prompt.count(SLOT)
    if slots == 1:
        return prompt
    if slots > 1:
        raise FactError(
            f"{field} has {slots} slots {{}}: expected exactly one (found {quote(prompt)})"
        )
    start = prompt.find(subject)
    if start < 0:
        raise FactError(
            f"{field} has no slot {{}} and does not contain the subject {quote(subject)}: "
            f"write {{}} where the subject stands (found {quote(prompt)})"
        )
    if prompt.find(subject, start + 1) >= 0:
        raise FactError(
            f"{field} contains the subject {quote(subject)} more than once: "
            f"mark one of them with {{}} (found {quote(prompt)})"
        )
    return prompt[:start] + SLOT + prompt[start + len(subject) :]


@dataclass(frozen=True)
class Probe:
    """A further prompt and the answer that the edited model should give to it."""

    prompt: str
    """Full text, no slot."""
    answer: str | None = None
    """What should follow; None where unknown."""
    aliases: tuple[str, ...] = ()
    """Other answers that are as right."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", clean_text(self.prompt, "prompt"))
        if self.answer is not None:
            object.__setattr__(self, "answer", clean_text(self.answer, "answer"))
        aliases = _aliases(self.aliases, "aliases", self.answer)
        if aliases and self.answer is None:
            raise FactError("answer is missing or empty: expected text, as there are aliases")
        object.__setattr__(self, "aliases", aliases)

    @classmethod
    def from_value(cls, value: object, field: str) -> Probe:
        """A probe from a probe, plain text or a mapping with `prompt`, `answer` and `aliases`."""
        if isinstance(value, Probe):
            return value
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, Mapping):
            raise FactError(
                f"{field} must be text or a mapping with prompt and answer (found {quote(value)})"
            )
        _refuse_unknown(value, ("prompt", "answer", "aliases"), f"{field}.")
        try:
            return cls(value.get("prompt"), value.get("answer"), value.get("aliases") or ())  # type: ignore[arg-type]
        except FactError as error:
            raise FactError(f"{field}.{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The native record; fields that say nothing are left out."""
        record: dict[str, Any] = {"prompt": self.prompt}
        if self.answer is not None:
            record["answer"] = self.answer
        if self.aliases:
            record["aliases"] = list(self.aliases)
        return record


@dataclass(frozen=True, repr=False)
class Fact:
    """Subject, prompt and target: after the edit the model answers the prompt with the target.

    With `forget` it is the other way round: the target is what the model says now and should no
    longer say.
    """

    subject: str
    """What the fact is about."""
    prompt: str
    """Template with one slot `{}`; a text that names the subject once is turned into one."""
    target: str
    """The answer to write, or to suppress."""
    id: str = ""
    """Name in ledgers and reports; by default a hash of subject, prompt and target (and of
    `forget`)."""
    old_answer: str | None = None
    """The answer before the edit."""
    relation: str | None = None
    """Name of the relation, such as Wikidata's P103; None where unknown."""
    more_prompts: tuple[str, ...] = ()
    """Further templates to train on, each with one slot."""
    paraphrases: tuple[str, ...] = ()
    """Full texts that ask the same, to evaluate on; a slot in them is filled in."""
    neighbours: tuple[Probe, ...] = ()
    """Prompts about something else whose answers must stay."""
    other_relations: tuple[Probe, ...] = ()
    """Prompts about something else of the subject, where the model should say what it says now."""
    portability: tuple[Probe, ...] = ()
    """Prompts that follow from the fact, each with the answer it should have after the edit."""
    forget: bool = False
    """Suppress the target, with nothing in its place: the model is to answer as if it did not know
    the subject."""
    target_aliases: tuple[str, ...] = ()
    """Other answers that are as right as the target, which is the one to be written."""

    def __post_init__(self) -> None:
        if not isinstance(self.forget, bool):
            raise FactError(f"forget must be true or false (found {quote(self.forget)})")
        subject = clean_text(self.subject, "subject")
        if SLOT in subject or subject.startswith("}") or subject.endswith("{"):
            # Filled in, it would look like a slot again.
            raise FactError(
                f"subject must not hold {{}}, begin with }} or end with {{ (found {quote(subject)})"
            )
        clean: dict[str, Any] = {
            "subject": subject,
            "prompt": as_template(clean_text(self.prompt, "prompt"), subject, "prompt"),
            "target": clean_text(self.target, "target"),
            **self._clean_lists(subject),
        }
        for name in ("old_answer", "relation"):
            if getattr(self, name) is not None:
                clean[name] = clean_text(getattr(self, name), name)
        if not self.forget:  # what is to be forgotten may well be the answer so far
            _check_target(clean["target"], clean.get("old_answer"))
        default = _default_id(clean, forget=self.forget)
        clean["id"] = default if self.id == "" else _clean_id(self.id)
        for name, value in clean.items():
            object.__setattr__(self, name, value)

    def _clean_lists(self, subject: str) -> dict[str, Any]:
        return {
            "more_prompts": tuple(
                as_template(text, subject, f"more_prompts[{i}]")
                for i, text in enumerate(_texts(self.more_prompts, "more_prompts"))
            ),
            "paraphrases": tuple(
                text.replace(SLOT, subject) for text in _texts(self.paraphrases, "paraphrases")
            ),
            "neighbours": _probes(self.neighbours, "neighbours"),
            "other_relations": _probes(self.other_relations, "other_relations"),
            "portability": _probes(self.portability, "portability", answered=True),
            "target_aliases": _aliases(self.target_aliases, "target_aliases", self.target),
        }

    def __repr__(self) -> str:
        sign = "not " if self.forget else ""
        return f"<Fact {self.id}: {quote(self.render(self.prompt))} {sign}{quote(self.target)}>"

    @property
    def prompts(self) -> tuple[str, ...]:
        """All templates to train on, the main one first."""
        return (self.prompt, *self.more_prompts)

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers that are right after the edit, the target first."""
        return (self.target, *self.target_aliases)

    @property
    def relation_key(self) -> str:
        """What is said of the subject: the relation, or the prompt where none is given."""
        return self.prompt if self.relation is None else self.relation

    @property
    def key(self) -> tuple[str, str]:
        """Subject and relation; two facts of one key and different targets contradict."""
        return self.subject, self.relation_key

    @property
    def demand(self) -> tuple[str, bool]:
        """Target and `forget`: two facts of one key agree only if these are the same."""
        return self.target, self.forget

    @property
    def bare(self) -> Fact:
        """The fact without what is asked beside its own prompt."""
        return replace(self, paraphrases=(), neighbours=(), other_relations=(), portability=())

    def forgotten(self, answer: str | None = None) -> Fact:
        """The fact that suppresses `answer` to this question, by default this fact's target.

        What is asked about it afterwards stays the same; what follows from the target does not
        follow any more. An id that was given is kept, another one is derived anew.
        """
        own = self.id != _default_id(vars(self), forget=self.forget)
        return replace(
            self,
            id=self.id if own else "",
            target=self.target if answer is None else answer,
            old_answer=None,
            portability=(),
            target_aliases=self.target_aliases if answer is None else (),
            forget=True,
        )

    def render(self, template: str) -> str:
        """`template` with the subject in its slot; other braces are left alone."""
        return template.replace(SLOT, self.subject, 1)

    def to_dict(self) -> dict[str, Any]:
        """The native record; fields that say nothing are left out."""
        record: dict[str, Any] = {name: getattr(self, name) for name in ("id", *REQUIRED)}
        for name in ("old_answer", "relation"):
            if getattr(self, name) is not None:
                record[name] = getattr(self, name)
        for name in ("target_aliases", "more_prompts", "paraphrases"):
            if getattr(self, name):
                record[name] = list(getattr(self, name))
        for name in PROBES:
            if probes := getattr(self, name):
                record[name] = [probe.to_dict() for probe in probes]
        if self.forget:  # left out otherwise, so that the records of other facts stay as they were
            record["forget"] = True
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fact:
        """The fact of a native record; null stands for a field left out."""
        if not isinstance(record, Mapping):
            raise FactError(
                f"expected a mapping with subject, prompt and target (found {quote(record)})"
            )
        _refuse_unknown(record, FIELDS)
        for name in REQUIRED:
            if name not in record:
                raise FactError(f"{name} is missing (found the fields {quote(list(record))})")
        given = {k: v for k, v in record.items() if v is not None or k in REQUIRED}
        if "forget" in given:
            given["forget"] = _TRUTHS.get(str(given["forget"]).casefold(), given["forget"])
        return cls(**given)


def refuse_forgetting(facts: Iterable[Fact], who: str) -> None:
    """FactError if one of `facts` is to be forgotten, which `who` cannot do."""
    for fact in facts:
        if fact.forget:
            raise FactError(
                f"fact {quote(fact.id)} is to be forgotten, which {who} can't do: it only writes "
                "answers. Take a method that optimises values, or leave the fact out"
            )


FIELDS = tuple(field.name for field in fields(Fact))
PROBES = ("neighbours", "other_relations", "portability")
"""Fields of prompts with answers."""
REQUIRED = ("subject", "prompt", "target")


def _refuse_unknown(record: Mapping[Any, Any], known: tuple[str, ...], path: str = "") -> None:
    for name in record:
        if name not in known:
            raise FactError(
                f"unknown field {path}{quote(name)}{suggest(name, known)}; "
                f"expected {', '.join(known)}"
            )


def _items(value: object, field: str) -> Iterable[Any]:
    if not isinstance(value, list | tuple):
        raise FactError(f"{field} must be a list (found {type(value).__name__} {quote(value)})")
    return value


def _texts(value: object, field: str) -> list[str]:
    return [clean_text(item, f"{field}[{i}]") for i, item in enumerate(_items(value, field))]


def _aliases(value: object, field: str, answer: str | None) -> tuple[str, ...]:
    """The texts of `value` that are not the answer again."""
    return tuple(t for t in dict.fromkeys(_texts(value, field)) if t != (answer or "").strip())


def _probes(value: object, field: str, *, answered: bool = False) -> tuple[Probe, ...]:
    """The probes of `field`; an answer that is missing is an error if they must be `answered`."""
    found = []
    for i, item in enumerate(_items(value, field)):
        probe = Probe.from_value(item, f"{field}[{i}]")
        if answered:
            clean_text(probe.answer, f"{field}[{i}].answer")
        found.append(probe)
    return tuple(found)


def _check_target(target: str, old_answer: str | None) -> None:
    if old_answer is not None and target.casefold() == old_answer.casefold():
        raise FactError(
            f"target {quote(target)} is the same as old_answer {quote(old_answer)}: "
            f"expected a new answer"
        )


def _clean_id(value: object) -> str:
    text = clean_text(value, "id")
    if "\n" in text or "\t" in text:
        raise FactError(f"id must be one line without tabs (found {quote(text)})")
    if len(text) > MAX_ID_CHARACTERS:
        raise FactError(
            f"id has {len(text)} characters: expected at most {MAX_ID_CHARACTERS} "
            f"(found {quote(text)})"
        )
    return text


def _default_id(clean: Mapping[str, Any], *, forget: bool) -> str:
    content = "\0".join(clean[name] for name in REQUIRED)  # no text may hold a NUL
    content += "\0forget" if forget else ""
    return "f" + hashlib.sha256(content.encode()).hexdigest()[:10]
