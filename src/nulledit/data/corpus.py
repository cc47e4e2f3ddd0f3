"""Texts for statistics and perplexity: files, folders, JSONL, a streamed dataset; in windows.

Nothing is held but a line, its tokens and a window, so a corpus may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from nulledit.errors import StatisticsError

DATASET = "datasets:"
MAX_LINE = 2**27
"""Characters of a line, which is held whole. A corpus may be of any length; text8 has 100 million
in one line."""
PIECE = 2**16
"""Characters that are tokenised at once: of a longer line, tokens would take a hundred times its
size. It is cut in front of a space."""
SHARD = re.compile(r"(.*?)-?(\d+)-of-(\d+)(?:\.\w+)*")
"""How shards are named: text-00001-of-00007.jsonl."""


@dataclass(frozen=True)
class Corpus:
    """A source of texts and what identifies its content."""

    name: str
    """File name or dataset name, without a machine's folders."""
    sha256: str
    """Hash of the files; for a streamed dataset, of its name, split and revision."""
    texts: Callable[[], Iterator[str]]
    """Starts reading from the first text; a line of a file, or one document of a dataset."""


def open_corpus(source: str | Path) -> Corpus:
    """A corpus from a text file, a JSONL file with `text` fields, a folder of such, or a dataset.

    A dataset of the `datasets` library is streamed: `datasets:NAME[:CONFIG[:SPLIT]]`, for English
    Wikipedia `datasets:wikimedia/wikipedia:20231101.en`. Raises StatisticsError.
    """
    if str(source).startswith(DATASET):
        return _dataset(str(source).removeprefix(DATASET))
    path, files = Path(source), find_files(source)
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise StatisticsError(f"{file}: cannot be read: {error.strerror}") from None
    return Corpus(path.name, digest.hexdigest(), lambda: _texts_of(files))


def find_files(source: str | Path) -> list[Path]:
    """The files of a corpus, none of them read; none of a dataset. Raises StatisticsError."""
    if str(source).startswith(DATASET):
        return []
    path = Path(source)
    if path.is_dir():
        kinds = (".txt", ".jsonl", ".md")
        files = sorted(f for f in path.rglob("*") if f.suffix in kinds and f.is_file())
        if not files:
            raise StatisticsError(f"{path}: no .txt, .md or .jsonl file in this folder")
        _check_shards(path, files)
    elif path.is_file():
        files = [path]
    else:
        kind = "not a regular file" if path.exists() else "no such file or folder"
        raise StatisticsError(f"{path}: {kind}")
    return files


def _check_shards(folder: Path, files: Iterable[Path]) -> None:
    """StatisticsError if one of files that are numbered as `3-of-7` is missing."""
    found: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        named = SHARD.fullmatch(file.name)
        if named and len(named[2]) <= 9 and len(named[3]) <= 9:
            found.setdefault((file.parent, named[1], int(named[3])), set()).add(int(named[2]))
    for (_, name, count), numbers in found.items():
        if len(numbers) < count:
            first = 0 if 0 in numbers else 1
            gap = next(i for i in range(first, first + count) if i not in numbers)
            raise StatisticsError(
                f"{folder}: shard {gap} of {count} of {name or 'its text'} is missing; "
                f"expected {count} files, found {len(numbers)}"
            )


def _texts_of(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        try:
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(_bounded(lines, file), 1):
                    if file.suffix == ".jsonl":
                        if line.strip():
                            yield from _json_text(line, f"{file}: line {number}").splitlines(True)
                    else:
                        yield line
        except UnicodeDecodeError as error:
            raise StatisticsError(f"{file}: not a text file in UTF-8") from error


def _bounded(lines: TextIO, file: Path) -> Iterator[str]:
    """Lines as by iteration, but never more than MAX_LINE characters at once."""
    number = 0
    while line := lines.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise StatisticsError(
                f"{file}: line {number} has more than {MAX_LINE} characters: expected line breaks"
            )
        yield line


def _pieces(text: str) -> Iterator[str]:
    """`text`, in parts of at most PIECE characters; cut in front of spaces, where there are any."""
    at = 0
    while len(text) - at > PIECE:
        space = text.rfind(" ", at + 1, at + PIECE)
        cut = space if space > 0 else at + PIECE
        yield text[at:cut]
        at = cut
    yield text[at:]


def _json_text(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StatisticsError(f'{where}: expected JSON with a "text" field') from error
    if not isinstance(text, str):
        raise StatisticsError(f"{where}: text is {type(text).__name__}; expected a string")
    return text


def _dataset(name: str) -> Corpus:
    try:
        import datasets
    except ImportError as error:
        raise StatisticsError(
            f"{DATASET}{name} needs the datasets library: pip install 'nulledit[datasets]'"
        ) from error
    parts = name.split(":")
    path, config = parts[0], parts[1] if len(parts) > 1 and parts[1] else None
    split = parts[2] if len(parts) > 2 else "train"
    try:
        stream = datasets.load_dataset(path, config, split=split, streaming=True)
    except Exception as error:  # the library raises many kinds for a name it can't reach
        reason = " ".join(str(error).split())[:200]
        raise StatisticsError(f"can't open dataset {name!r}: {reason}") from error
    version = str(stream.info.version)
    digest = hashlib.sha256(f"{name} {split} {version}".encode()).hexdigest()

    def texts() -> Iterator[str]:
        for record in stream:
            if not isinstance(record.get("text"), str):
                raise StatisticsError(f"{DATASET}{name}: a record has no text in the field 'text'")
            yield from record["text"].splitlines(True)

    return Corpus(name, digest, texts)


def windows(
    texts: Iterable[str],
    tokenize: Callable[[str], list[int]],
    *,
    window: int,
    packed: bool,
    first: list[int] | None = None,
) -> Iterator[list[int]]:
    """Token windows of at most `window` ids.

    Packed: the texts as one stream, cut into full windows and one shorter last one. Otherwise each
    text by itself, cut where it is longer. Every window begins with the ids in `first` (a
    beginning-of-text token, where the model expects one). Blank texts are left out.
    """
    start = list(first or [])
    room = window - len(start)
    if room < 1:
        raise StatisticsError(f"a window of {window} tokens has no room for text")
    held: list[int] = []
    for text in texts:
        if not text.strip():
            continue
        for piece in _pieces(text if packed else text.rstrip("\r\n")):
            held += tokenize(piece)
            at = 0
            while len(held) - at >= room:
                yield start + held[at : at + room]
                at += room
            held = held[at:]
        if not packed and held:
            yield start + held
            held = []
    if held:
        yield start + held
