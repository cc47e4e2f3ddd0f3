"""Bridge to EleutherAI's lm-evaluation-harness: its tasks, asked of a model in memory."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.data.facts import quote, suggest
from nulledit.errors import ConfigError
from nulledit.io.settings import check_whole
from nulledit.models.layouts import frozen

_STDERR = "_stderr"


def harness_results(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """What `model`, as it is now, makes of the harness's `tasks` (names or patterns as "blimp_*").

    By task or group: "n" (documents asked; None for a group), "shots", "version" and "metrics",
    where each is "metric,filter" -> {"value", "standard_error", "higher_is_better"}, as the harness
    names them; a number it does not give is None. `limit` documents a task; `num_fewshot` None is
    the task's own choice; `include_path`: a folder with more tasks; `seed` draws the examples.

    The harness's own tasks are fetched from the Hugging Face Hub. Raises ConfigError if it is not
    installed, for an unknown task, one whose data can't be had, or settings out of range.
    """
    _check(tasks, limit, num_fewshot, batch_size)
    check_whole("seed", seed)
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"{include_path}: no such folder: expected one with tasks in YAML files")
    lm_eval = _module("lm_eval")
    manager = _module("lm_eval.tasks").TaskManager(
        include_path=None if include_path is None else str(include_path)
    )
    names = _known(tasks, manager)
    with frozen(model):
        wrapped = _module("lm_eval.models.huggingface").HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it gets a padding token
            batch_size=batch_size,
        )
        try:
            results = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=names,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
                task_manager=manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except OSError as error:  # what the Hub's and the data sets' errors have in common
            raise ConfigError(
                f"the data of {', '.join(names)} can't be had ({error}): connect to the network, "
                "or give a folder with tasks of your own as include_path"
            ) from error
        except ValueError as error:  # as for a task asked for twice, by itself and in a group
            raise ConfigError(
                f"lm-evaluation-harness refuses {', '.join(names)}: {error}"
            ) from error
    return trim(results)


def trim(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics of the harness's result, without its configurations and environment."""
    counts, shots = results.get("n-samples", {}), results.get("n-shot", {})
    return {
        task: {
            "n": counts.get(task, {}).get("effective"),
            "shots": shots.get(task),
            "version": results.get("versions", {}).get(task),
            "metrics": _metrics(found, results.get("higher_is_better", {}).get(task, {})),
        }
        for task, found in {**results["results"], **results.get("groups", {})}.items()
    }


def _metrics(found: dict[str, Any], better: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The harness writes "acc,none" beside "acc_stderr,none", and text such as the task's alias."""
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith(_STDERR):
            metrics[key] = {
                "value": _number(value),
                "standard_error": _number(found.get(f"{name}{_STDERR},{kind}")),
                "higher_is_better": better.get(name),
            }
    return metrics


def _number(value: Any) -> float | None:
    """`value` if it is a finite number; the harness says "N/A" for an error it can't give."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def check_tasks(tasks: Sequence[str]) -> None:
    """ConfigError if the harness is not installed, or lacks one of `tasks`."""
    _known(tasks, _module("lm_eval.tasks").TaskManager(include_path=None))


def _known(tasks: Sequence[str], manager: Any) -> list[str]:
    """Names of the harness that `tasks` match, each once."""
    names: dict[str, None] = {}
    for task in tasks:
        matched = manager.match_tasks([task])
        if not matched:
            raise ConfigError(
                f"lm-evaluation-harness has no task {quote(task)}"
                f"{suggest(task, manager.all_tasks)}; `lm-eval ls tasks` lists them"
            )
        names.update(dict.fromkeys(matched))
    return list(names)


def _check(
    tasks: Sequence[str], limit: int | None, num_fewshot: int | None, batch_size: int
) -> None:
    if isinstance(tasks, str) or not tasks:
        raise ConfigError(f"tasks are {quote(tasks)}; expected a list of one or more names")
    smallest = {"limit": (limit, 1), "num_fewshot": (num_fewshot, 0), "batch_size": (batch_size, 1)}
    for name, (value, least) in smallest.items():
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; expected {least} or more")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            "this needs EleutherAI's lm-evaluation-harness: pip install 'nulledit[harness]' "
            f"({error})"
        ) from error
