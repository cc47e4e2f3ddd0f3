"""Facts files to facts, without repetitions and contradictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nulledit.data.facts import Fact, quote
from nulledit.data.formats import KNOWN, NATIVE, SHAPES, Converted, convert, detect_shape
from nulledit.data.parsing import Parsed, parse_text
from nulledit.data.views import Coverage, Row
from nulledit.errors import BadRecordsError, FactError
from nulledit.io.untrusted import one_line, read_text

MAX_BYTES = 512 * 2**20
"""Of a facts file: ten times CounterFact's."""
LOOKED_AT = 20  # records that decide a file's format

OnConflict = Literal["error", "first", "last"]
CHOICE = "; give --on-conflict first or last"
"""What the command line can do about a contradiction."""


@dataclass(frozen=True)
class FactFile:
    """What a file said."""

    facts: tuple[Fact, ...]
    """In the file's order."""
    format: str
    """Shape of the records and container, such as 'counterfact-json' or 'native-csv'."""
    notices: tuple[str, ...]
    """One line for each record dropped and each choice made, and for what was not read."""
    bad: tuple[str, ...] = ()
    """Why records were left out, one line each."""

    @property
    def counts(self) -> dict[str, int]:
        """How many facts have what."""
        found = self.facts
        return {
            "facts": len(found),
            "with_old_answer": sum(f.old_answer is not None for f in found),
            "with_target_aliases": sum(bool(f.target_aliases) for f in found),
            "with_paraphrases": sum(bool(f.paraphrases) for f in found),
            "with_neighbours": sum(any(p.answer for p in f.neighbours) for f in found),
            "with_other_relations": sum(bool(f.other_relations) for f in found),
            "with_portability": sum(bool(f.portability) for f in found),
            "with_more_prompts": sum(bool(f.more_prompts) for f in found),
            "subjects": len({f.subject for f in found}),
            "relations": len({f.relation_key for f in found}),
        }


Facts = str | Path | Fact | FactFile | Mapping[str, Any] | Iterable[Fact | Mapping[str, Any]]
"""What `as_facts` reads."""


@dataclass(frozen=True)
class _Named:
    """A fact and the record it comes from."""

    parsed: Parsed
    row: Row
    fact: Fact

    def __str__(self) -> str:
        return self.parsed.label(self.row, self.fact.id)


def read_facts(
    path: str | Path,
    *,
    on_conflict: OnConflict = "error",
    skip: int = 0,
    limit: int | None = None,
    known: bool = False,
    skip_bad: bool = False,
) -> FactFile:
    """Facts of a YAML, JSON, JSON lines or CSV file: nulledit's own records, or those of a project
    of `formats.SHAPES`.

    `skip` leaves out the first records and `limit` takes so many of the rest, before repetitions
    and contradictions are looked for. Two targets for one subject and relation are an error unless
    `on_conflict` says which record counts. Records that can't be read are an error, a
    BadRecordsError that holds all of them, unless `skip_bad` leaves them out. Records of known
    facts (ROME's known_1000), which have no target, are an error, too, unless `known` asks for
    them: as facts to forget; those that contradict all stay then, as nothing is to be written.
    """
    path = Path(path)
    text = _read_text(path)
    parsed = parse_text(text, source=str(path), suffix=path.suffix.lower())
    return _collect(parsed, str(path), on_conflict, skip, limit, known=known, skip_bad=skip_bad)


def parse_records(
    records: Sequence[Mapping[str, Any]],
    *,
    source: str = "records",
    on_conflict: OnConflict = "error",
    skip: int = 0,
    limit: int | None = None,
    skip_bad: bool = False,
) -> FactFile:
    """Facts of records in memory, as `read_facts` does; `source` names them in messages."""
    if isinstance(records, str | bytes | Mapping):
        raise FactError(f"{source}: expected a list of records (found {quote(records)})")
    parsed = Parsed("", [Row(i, record) for i, record in enumerate(records)])
    if not parsed.rows:
        raise FactError(f"{source}: there are no facts")
    return _collect(parsed, source, on_conflict, skip, limit, known=False, skip_bad=skip_bad)


def as_facts(given: Facts) -> FactFile:
    """Facts as a caller has them: one or several, as facts, as records of any known shape, a file.

    Repetitions and contradictions stay. FactError, which says what was found, for anything else.
    """
    if isinstance(given, FactFile):
        return given
    if isinstance(given, str | Path):
        return read_facts(given)
    expected = "expected facts, mappings with subject, prompt and target, or a file's path"
    if isinstance(given, bytes):
        raise FactError(f"{expected} (found {quote(given)})")
    alone = isinstance(given, Fact | Mapping)
    if not alone and not isinstance(given, Iterable):
        raise FactError(f"{expected} (found {type(given).__name__} {quote(given)})")
    facts: list[Fact] = []
    notices: list[str] = []
    items: Iterable[Any] = [given] if isinstance(given, Fact | Mapping) else given
    for i, item in enumerate(items):
        if isinstance(item, Fact):
            facts.append(item)
        elif isinstance(item, Mapping):
            read = parse_records([item], source="the fact" if alone else f"facts[{i}]")
            facts += read.facts
            notices += read.notices
        else:
            where = f"as facts[{i}] {type(item).__name__} {quote(item)}"
            raise FactError(f"{expected} (found {where})")
    return FactFile(tuple(facts), "given", tuple(notices))


def _read_text(path: Path) -> str:
    text = read_text(path, most=MAX_BYTES, error=FactError, what="facts file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _select(rows: list[Row], source: str, skip: int, limit: int | None) -> list[Row]:
    if skip < 0 or (limit is not None and limit < 1):
        raise ValueError(f"skip must be at least 0 and limit at least 1, got {skip} and {limit}")
    if skip >= len(rows):
        raise FactError(f"{source}: has {len(rows)} records: skipping {skip} leaves none")
    return rows[skip:] if limit is None else rows[skip : skip + limit]


def _shape_of(rows: Sequence[Row], source: str, *, known: bool) -> str:
    """The shape of a file, by the names in its first records."""
    records = [row.record for row in rows[:LOOKED_AT] if isinstance(row.record, Mapping)]
    shape = detect_shape(name for record in records for name in record)
    if shape == KNOWN and not known:
        # Read in silence as facts to forget they would be suppressed, a thousand at a time.
        raise FactError(
            f"{source}: looks like {SHAPES[shape].title}, whose records have an attribute and no "
            "target: expected a target to write; only `nulledit locate` reads known facts"
        )
    return shape


def _collect(
    parsed: Parsed,
    source: str,
    on_conflict: OnConflict,
    skip: int,
    limit: int | None,
    *,
    known: bool,
    skip_bad: bool,
) -> FactFile:
    if on_conflict not in ("error", "first", "last"):
        raise ValueError(f"on_conflict must be 'error', 'first' or 'last', got {on_conflict!r}")
    rows = _select(parsed.rows, source, skip, limit)
    shape = _shape_of(rows, source, known=known)
    coverage = Coverage()
    named: list[_Named] = []
    notices, bad = list(parsed.notices), []
    for row in rows:
        try:
            facts, said = _facts_of(row, shape, coverage)
        except FactError as error:
            bad.append(one_line(f"{parsed.label(row)}: {error}"))
            continue
        notices += [one_line(f"{source}: {parsed.label(row)}: {notice}") for notice in said]
        named += [_Named(parsed, row, fact) for fact in facts]
    kept, dropped, clashes = _resolve(named, source, on_conflict, known=shape == KNOWN)
    kept, twins = _without_twins(kept)
    bad += twins
    if clashes or (bad and not skip_bad):
        read_as = SHAPES[shape].title if bad and shape != NATIVE else ""
        raise BadRecordsError(source, (*bad, *clashes), skippable=len(bad), read_as=read_as)
    if not kept:
        raise FactError(f"{source}: no record has a target to write" + _reason(bad))
    notices += dropped
    if bad:
        notices.append(f"{source}: {len(bad)} of {len(rows)} records are bad and were left out")
        notices += [f"{source}: {line}: left out" for line in bad]
    notices += [f"{source}: {said}" for said in (*coverage.notices(), *_unanswered(kept))]
    format = "-".join(part for part in (shape, parsed.container) if part)
    return FactFile(tuple(item.fact for item in kept), format, tuple(notices), tuple(bad))


def _facts_of(row: Row, shape: str, coverage: Coverage) -> tuple[tuple[Fact, ...], tuple[str, ...]]:
    if row.problem:
        raise FactError(row.problem)
    if not isinstance(row.record, Mapping):
        raise FactError(
            f"expected a mapping with subject, prompt and target "
            f"(found {type(row.record).__name__} {quote(row.record)})"
        )
    if shape == NATIVE:
        return (Fact.from_dict(row.record),), ()
    try:
        converted: Converted = convert(row.record, SHAPES[shape], coverage)
    except FactError as error:
        lacks = SHAPES[shape].lacks
        if lacks and "subject" in str(error):
            raise FactError(f"{error}: {lacks}") from None
        raise
    return tuple(map(Fact.from_dict, converted.facts)), converted.notices


def _reason(bad: Sequence[str]) -> str:
    return f": {bad[0]}" + (f" ({len(bad) - 1} more)" if bad[1:] else "") if bad else ""


def _unanswered(kept: Sequence[_Named]) -> list[str]:
    """That neighbours without an answer are never scored."""
    n = sum(probe.answer is None for item in kept for probe in item.fact.neighbours)
    return [f"{n} neighbours have no answer: they are never scored"] if n else []


# --- Repetitions and contradictions ---------------------------------------------------------


def _resolve(
    named: list[_Named], source: str, on_conflict: OnConflict, *, known: bool
) -> tuple[list[_Named], list[str], list[str]]:
    """Facts left after repetitions and contradictions, a notice for each one dropped, and
    contradictions that nobody decided; `known` facts are only asked about, so these stay."""
    # 'last' is 'first' read backwards.
    step = -1 if on_conflict == "last" else 1
    both = known and on_conflict == "error"
    kept, repeats, conflicts = _keep_first(named[::step], both=both)
    notices = [f"{source}: {item} repeats {twin}: dropped" for item, twin in repeats]
    if on_conflict == "error":
        return kept, notices, [one_line(_clash(*pair) + CHOICE) for pair in conflicts]
    for item, rival in conflicts:
        notices.append(one_line(f"{source}: {_clash(item, rival)}; {item} is dropped"))
    return kept[::step], notices, []


def _keep_first(
    named: list[_Named], *, both: bool
) -> tuple[list[_Named], list[tuple[_Named, _Named]], list[tuple[_Named, _Named]]]:
    """Records kept; repeated ones, and contradicting ones, each beside the record it meets.

    `both`: of those that contradict, too, all are kept.
    """
    kept, repeats, conflicts = [], [], []
    by_text: dict[tuple[str, str, str], _Named] = {}
    by_key: dict[tuple[str, str], _Named] = {}
    for item in named:
        fact = item.fact
        text = (fact.subject, fact.prompt, fact.target)
        rival = by_key.get(fact.key)
        if text in by_text:
            repeats.append((item, by_text[text]))
        elif not both and rival is not None and rival.fact.target != fact.target:
            conflicts.append((item, rival))
        else:
            kept.append(item)
            by_text[text] = item
            by_key.setdefault(fact.key, item)
    return kept, repeats, conflicts


def _clash(item: _Named, rival: _Named) -> str:
    fact = item.fact
    what = "prompt" if fact.relation is None else "relation"
    return (
        f"{item} and {rival} contradict: for the subject {quote(fact.subject)} and the {what} "
        f"{quote(fact.relation_key)} they say {quote(fact.target)} and {quote(rival.fact.target)}"
    )


def _without_twins(kept: list[_Named]) -> tuple[list[_Named], list[str]]:
    """Facts whose ids are their own, and a line for each one that has another's."""
    by_id: dict[str, _Named] = {}
    twins = []
    for item in kept:
        other = by_id.setdefault(item.fact.id, item)
        if other is not item:
            twins.append(
                f"{item} and {other} have one id, {quote(item.fact.id)}, but say different "
                "things: expected an id for each"
            )
    return list(by_id.values()), twins
