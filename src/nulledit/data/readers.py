"""Facts files to facts, without repetitions and contradictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nulledit.data.facts import Fact, quote
from nulledit.data.formats import SHAPES, detect_shape
from nulledit.data.parsing import Row, parse_text
from nulledit.errors import FactError
from nulledit.reading import read_text

MAX_BYTES = 512 * 2**20
"""Of a facts file: ten times CounterFact's."""

OnConflict = Literal["error", "first", "last"]


@dataclass(frozen=True)
class FactFile:
    """What a file said."""

    facts: tuple[Fact, ...]
    """In the file's order."""
    format: str
    """Shape of the records and container, such as 'counterfact-json' or 'native-csv'."""
    notices: tuple[str, ...]
    """One line for each record dropped and each choice made; nothing else was changed."""


Facts = Fact | FactFile | Mapping[str, Any] | Iterable[Fact | Mapping[str, Any]]
"""What `as_facts` reads."""


@dataclass(frozen=True)
class _Named:
    """A fact and the name of its record."""

    label: str
    fact: Fact

    def __str__(self) -> str:
        return f"{self.label} (id {self.fact.id})"


def read_facts(
    path: str | Path,
    *,
    on_conflict: OnConflict = "error",
    skip: int = 0,
    limit: int | None = None,
    known: bool = False,
) -> FactFile:
    """Facts of a YAML, JSON, JSON lines or CSV file, native or of CounterFact, EasyEdit or zsRE.

    `skip` leaves out the first records and `limit` takes so many of the rest, before repetitions
    and contradictions are looked for. Two targets for one subject and relation are an error unless
    `on_conflict` says which record counts. Records of known facts (ROME's known_1000), which have
    no target, are an error, too, unless `known` asks for them: as facts to forget.
    """
    path = Path(path)
    text = _read_text(path)
    container, rows = parse_text(text, source=str(path), suffix=path.suffix.lower())
    chosen = _select(rows, str(path), skip, limit)
    # Cells of a CSV are native by its header.
    shape = "native" if container == "csv" else _shape_of(chosen[0], str(path), known=known)
    return _collect(chosen, str(path), shape, f"{shape}-{container}", on_conflict)


def parse_records(
    records: Sequence[Mapping[str, Any]],
    *,
    source: str = "records",
    on_conflict: OnConflict = "error",
    skip: int = 0,
    limit: int | None = None,
) -> FactFile:
    """Facts of records in memory, as `read_facts` does; `source` names them in messages."""
    if isinstance(records, str | bytes | Mapping):
        raise FactError(f"{source}: expected a list of records (found {quote(records)})")
    rows = [Row(i, record) for i, record in enumerate(records)]
    if not rows:
        raise FactError(f"{source}: there are no facts")
    chosen = _select(rows, source, skip, limit)
    shape = _shape_of(chosen[0], source, known=False)
    return _collect(chosen, source, shape, shape, on_conflict)


def as_facts(given: Facts) -> FactFile:
    """Facts as a caller has them: one or several, as facts, as records of any known shape, or read.

    Repetitions and contradictions stay. FactError, which says what was found, for anything else.
    """
    if isinstance(given, FactFile):
        return given
    expected = (
        "expected facts, mappings with subject, prompt and target, or what read_facts returns"
    )
    if isinstance(given, str | bytes | Path):
        raise FactError(f"{expected} (found {quote(given)}; read a file by read_facts first)")
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


def _shape_of(row: Row, source: str, *, known: bool) -> str:
    shape = detect_shape(row.record)
    if shape == "known" and not known:
        # Read in silence as facts to forget they would be suppressed, a thousand at a time.
        raise FactError(
            f"{source}: {row.label}: has an attribute and no target (a known fact, as in ROME's "
            "known_1000): expected a target to write; only `nulledit locate` reads known facts"
        )
    return shape


def _collect(
    rows: list[Row], source: str, shape: str, format: str, on_conflict: OnConflict
) -> FactFile:
    named: list[_Named] = []
    notices: list[str] = []
    for row in rows:
        try:
            fact, found = _to_fact(row.record, shape)
        except FactError as error:
            raise FactError(f"{source}: {row.label}: {error}") from None
        notices += [f"{source}: {row.label}: {notice}" for notice in found]
        if fact is not None:
            named.append(_Named(row.label, fact))
    kept, dropped = _resolve(named, source, on_conflict)
    if not kept:
        raise FactError(f"{source}: no record has a target to write")
    return FactFile(tuple(kept), format, (*notices, *dropped))


def _to_fact(record: Any, shape: str) -> tuple[Fact | None, tuple[str, ...]]:
    if not isinstance(record, Mapping):
        raise FactError(
            f"expected a mapping with subject, prompt and target "
            f"(found {type(record).__name__} {quote(record)})"
        )
    converted = SHAPES[shape].convert(record)
    if converted.fields is None:
        return None, converted.notices
    return Fact.from_dict(converted.fields), converted.notices


def _resolve(
    named: list[_Named], source: str, on_conflict: OnConflict
) -> tuple[list[Fact], list[str]]:
    """Facts left after repetitions and contradictions, and a notice for each one dropped."""
    if on_conflict not in ("error", "first", "last"):
        raise ValueError(f"on_conflict must be 'error', 'first' or 'last', got {on_conflict!r}")
    # 'last' is 'first' read backwards.
    step = -1 if on_conflict == "last" else 1
    kept, repeats, conflicts = _keep_first(named[::step])
    if conflicts and on_conflict == "error":
        item, rival = conflicts[0]
        more = f" ({len(conflicts) - 1} more like it)" if len(conflicts) > 1 else ""
        raise FactError(f"{source}: {_clash(item, rival)}; give --on-conflict first or last{more}")
    _check_ids(kept, source)
    notices = [f"{source}: {item} repeats {twin}: dropped" for item, twin in repeats]
    for item, rival in conflicts:
        notices.append(f"{source}: {_clash(item, rival)}; {item.label} is dropped")
    return [item.fact for item in kept[::step]], notices


def _keep_first(
    named: list[_Named],
) -> tuple[list[_Named], list[tuple[_Named, _Named]], list[tuple[_Named, _Named]]]:
    """Records kept; repeated ones, and contradicting ones, each beside the record it meets."""
    kept, repeats, conflicts = [], [], []
    by_text: dict[tuple[str, str, str], _Named] = {}
    by_key: dict[tuple[str, str], _Named] = {}
    for item in named:
        fact = item.fact
        text = (fact.subject, fact.prompt, fact.target)
        rival = by_key.get(fact.key)
        if text in by_text:
            repeats.append((item, by_text[text]))
        elif rival is not None and rival.fact.target != fact.target:
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


def _check_ids(kept: list[_Named], source: str) -> None:
    by_id: dict[str, _Named] = {}
    for item in kept:
        other = by_id.setdefault(item.fact.id, item)
        if other is not item:
            raise FactError(
                f"{source}: {item.label} and {other.label} have one id, "
                f"{quote(item.fact.id)}, but say different things: expected an id for each"
            )
