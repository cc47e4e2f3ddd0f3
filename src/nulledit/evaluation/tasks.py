"""The tasks of the general-capability test, as data, and their items from JSONL files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from string import Formatter
from typing import Any

from nulledit.data.facts import quote, suggest
from nulledit.errors import ConfigError, FactError
from nulledit.io.untrusted import MAX_LINES, json_problem, read_text


@dataclass(frozen=True)
class Task:
    """A question with a fixed set of answers, asked about records of one form."""

    name: str
    """Also the file's name without its suffix."""
    prompt: str
    """Format string over a record's fields; a choice follows it."""
    passage: str
    """Field whose text may lose its beginning where a prompt is too long for the model."""
    answer: str
    """Field that holds the right answer's label."""
    labels: tuple[int | str, ...]
    """What may stand in that field."""
    choices: tuple[str, ...]
    """How each label is said, in the order of `labels`."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of a record that the prompt shows."""
        names = (name for _, name, _, _ in Formatter().parse(self.prompt) if name)
        return tuple(dict.fromkeys(name.partition("[")[0] for name in names))

    def render(self, record: Mapping[str, Any], **instead: str) -> str:
        """The prompt about `record`, texts without outer whitespace; `instead` replaces fields."""
        shown = {
            name: text.strip() if isinstance(text, str) else [part.strip() for part in text]
            for name, text in {name: record[name] for name in self.fields}.items()
        }
        return self.prompt.format(**{**shown, **instead})


# Prompts and words of the published code (jianghoucheng/AlphaEdit, glue_eval), with the space in
# front of an answer left to the tokeniser. In GLUE's RTE label 0 is entailment, hence "True"; the
# published code has it the other way round.
TASKS = {
    task.name: task
    for task in (
        Task(
            name="sst2",
            prompt="Review : {sentence}\nSentiment :",
            passage="sentence",
            answer="label",
            labels=(0, 1),
            choices=("negative", "positive"),
        ),
        Task(
            name="mrpc",
            prompt="Are the sentences paraphrases of each other.\n"
            "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nAnswer:",
            passage="sentence1",
            answer="label",
            labels=(0, 1),
            choices=("No", "Yes"),
        ),
        Task(
            name="cola",
            prompt="Is this sentence linguistically acceptable?\nSentence: {sentence}\nAnswer:",
            passage="sentence",
            answer="label",
            labels=(0, 1),
            choices=("No", "Yes"),
        ),
        Task(
            name="rte",
            prompt="{sentence1}\nquestion: {sentence2} True or False?\nanswer:",
            passage="sentence1",
            answer="label",
            labels=(0, 1),
            choices=("True", "False"),
        ),
        Task(
            name="mmlu",
            prompt="Question: {question}\n(A) {choices[0]}\n(B) {choices[1]}\n(C) {choices[2]}\n"
            "(D) {choices[3]}\nAnswer:",
            passage="question",
            answer="answer",
            labels=(0, 1, 2, 3),
            choices=("A", "B", "C", "D"),
        ),
        Task(
            name="nli",
            prompt="{sentence1} entails the {sentence2} True or False? Answer:",
            passage="sentence1",
            answer="label",
            labels=("entailment", "not_entailment"),
            choices=("True", "False"),
        ),
    )
}


@dataclass(frozen=True)
class Item:
    """One record, read as one question of a task."""

    task: Task
    """What is asked."""
    id: str
    """Task and line of the file, such as "sst2/12"."""
    record: Mapping[str, Any]
    """As it stood in the file."""
    answer: int
    """Place of the right answer among the task's choices."""


def read_tasks(
    folder: str | Path,
    names: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Item]:
    """Items of `names` (all tasks by default) from `folder`/NAME.jsonl, `limit` of each.

    The order is drawn by `seed` and goes round the classes, so that the first items of a task are
    balanced for any `limit`: then what a predictor gets that always says one thing does not vary
    with the draw. A class that runs out leaves the rest to the others. A smaller `limit` gives the
    first items of a larger one. Raises ConfigError for an unknown name, FactError for a bad file.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected 1 or more items of each task")
    items: list[Item] = []
    for name in dict.fromkeys(TASKS if names is None else names):
        if name not in TASKS:
            raise ConfigError(
                f"no task {quote(name)}{suggest(name, TASKS)}; known are {', '.join(TASKS)}"
            )
        found = list(_read(TASKS[name], Path(folder) / f"{name}.jsonl"))
        items += islice(_balanced(found, f"{seed}/{name}"), limit)
    return items


def _read(task: Task, file: Path) -> Iterator[Item]:
    """The items of `file` in its order."""
    if not file.is_file():
        raise FactError(f"{file}: no such file: expected one record of {task.name} a line")
    text = read_text(file, most=MAX_LINES, error=FactError, what="file of items")
    lines = text.split("\n")  # U+2028 may stand in a JSON text
    found = False
    for number, line in enumerate(lines, 1):
        if line.strip():
            found = True
            yield _item(task, f"{task.name}/{number}", line, f"{file}: line {number}")
    if not found:
        raise FactError(f"{file}: holds no records")


def _item(task: Task, id_: str, line: str, where: str) -> Item:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FactError(f"{where}: broken JSON: {json_problem(error)}") from None
    for name in (*task.fields, task.answer):
        if not isinstance(record, dict) or name not in record:
            raise FactError(f"{where}: no field {name!r}: expected a record of {task.name}")
    label = record[task.answer]
    if label not in task.labels:
        expected = ", ".join(map(repr, task.labels))
        raise FactError(f"{where}: {task.answer} is {quote(label)}; expected one of {expected}")
    try:
        task.render(record)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise FactError(
            f"{where}: can't fill the prompt of {task.name}: expected text in "
            f"{', '.join(task.fields)} (found {quote({f: record[f] for f in task.fields})})"
        ) from None
    return Item(task, id_, record, task.labels.index(label))


def _balanced(items: Sequence[Item], seed: str) -> Iterator[Item]:
    """`items` in a drawn order that takes one of each class in turn."""
    draw = random.Random(seed)
    classes: dict[int, list[Item]] = {}
    for item in items:
        classes.setdefault(item.answer, []).append(item)
    for members in classes.values():
        draw.shuffle(members)
    for turn in zip_longest(*classes.values()):
        present = [item for item in turn if item is not None]
        draw.shuffle(present)
        yield from present
