"""What a launcher such as `torchrun` says of this process, in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nulledit.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that were started together."""

    rank: int = 0
    """From 0; rank 0 alone writes and prints."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """On this machine, from 0: which accelerator is this one's."""
    local_size: int = 1
    """How many there are on this machine."""
    address: str = ""
    """Where they meet."""
    port: int = 0
    """Where they meet."""
    attempt: int = 0
    """How often the launcher has started them anew."""
    store_by_launcher: bool = False
    """Whether the store that they meet at lives in the launcher, or else in rank 0."""

    @classmethod
    def of(cls, environment: Mapping[str, str] | None = None) -> Launch:
        """Read `environment` (this process's own if left out); alone where it names no size."""
        given = os.environ if environment is None else environment
        if "WORLD_SIZE" not in given:
            return cls()
        size = _number(given, "WORLD_SIZE")
        if size < 2:
            return cls()
        rank = _number(given, "RANK")
        if rank >= size:
            raise ConfigError(f"RANK is {rank}, WORLD_SIZE {size}: expected ranks from 0")
        if not given.get("MASTER_ADDR"):
            raise ConfigError("WORLD_SIZE is set, MASTER_ADDR is not: start by torchrun")
        return cls(
            rank=rank,
            size=size,
            local_rank=_number(given, "LOCAL_RANK", rank),
            local_size=_number(given, "LOCAL_WORLD_SIZE", size),
            address=given["MASTER_ADDR"],
            port=_number(given, "MASTER_PORT"),
            attempt=_number(given, "TORCHELASTIC_RESTART_COUNT", 0),
            store_by_launcher=given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


def _number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = given.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"{name} is {text!r}: expected a number; start the ranks by torchrun")
    return int(text)
