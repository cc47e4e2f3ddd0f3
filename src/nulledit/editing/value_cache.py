"""Optimised values kept on disk, by a hash of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nulledit.config import ChatSettings, ValueSettings
from nulledit.data.facts import Fact
from nulledit.editing.descent import Value
from nulledit.io.files import replacing
from nulledit.ledger.records import ValueOutcome

FORMAT = 3  # raise it when the same inputs come to give other values


class ValueCache:
    """One file per group of facts that share a δ."""

    def __init__(self, folder: Path):
        """`folder` is made when the first value is kept."""
        self.folder = folder

    def name(
        self,
        model: str,
        facts: Sequence[Fact],
        *,
        layers: Sequence[int],
        contexts: Sequence[str],
        settings: ValueSettings,
        chat: ChatSettings | None = None,
    ) -> str:
        """The hash of one group's request; `model` names the weights and how they read it."""
        used: dict[str, Any] = asdict(settings)
        for elsewhere in (
            "norm_anchor",
            "at",
            "rounds",
            "chunk_tokens",
        ):  # they act before or after
            used.pop(elsewhere)
        if settings.learning_rate_of == "unit":  # as before there was a choice
            used.pop("learning_rate_of")
        if not settings.held_relations:  # as before there was a list of them
            used |= {"relation_prompts": (), "relation_weight": 1.0}
        for name in ("contexts_per_step", "relations_per_step"):
            if not used[name]:  # as before there was one
                used.pop(name)
        if settings.rewordings:
            used["rewordings"] = ["words between", settings.rewordings]  # others came before
        asked = [
            [fact.subject, list(fact.prompts), fact.target, *(["forget"] if fact.forget else [])]
            for fact in facts
        ]
        where = layers[0] if len(layers) == 1 else list(layers)  # as before there were several
        content = [FORMAT, model, where, list(contexts), used, asked]
        if chat:  # left out otherwise, so that values of plain text are found where they were
            content.append(chat.to_dict())
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def get(self, name: str) -> list[Value] | None:
        """The group's values, or None where none are kept (or the file is damaged)."""
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as opened:
                z = opened.get_tensor("z")
                notes = json.loads(opened.metadata()["values"])
            return [
                Value(row, ValueOutcome.from_dict(note)) for row, note in zip(z, notes, strict=True)
            ]
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            return None

    def put(self, name: str, values: Sequence[Value]) -> None:
        """Keep a group's values."""
        self.folder.mkdir(parents=True, exist_ok=True)
        notes = [value.outcome.to_dict() for value in values]
        z = torch.stack([value.z.detach().cpu() for value in values])
        with replacing(self.folder / f"{name}.safetensors") as partial:
            save_file({"z": z}, partial, metadata={"values": json.dumps(notes)})
