"""Where names end in a text: a stand-in for the last tokens of subjects, which nobody labelled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

BEGINS = re.compile(r"(?:^|[.!?:\n]['\"”’)]*)\s*$")
"""What stands before the first word of a sentence, whose capital says nothing."""


def name_ends(pieces: Sequence[str]) -> list[bool]:
    """For each of a text's `pieces`, its tokens as text, whether a name ends in it.

    A name is a run of capitalised words with a space or a hyphen between them; a single one at the
    beginning of a sentence is none. Of scripts without capitals nothing is found.
    """
    text = "".join(pieces)
    runs: list[list[re.Match[str]]] = [[]]
    for word in re.finditer(r"\w+", text):
        if not word.group()[0].isupper():
            runs.append([])
        elif runs[-1] and text[runs[-1][-1].end() : word.start()] in (" ", "-"):
            runs[-1].append(word)
        else:
            runs.append([word])
    ends, found, at = list(accumulate(map(len, pieces))), [False] * len(pieces), 0
    for run in runs:
        if not run or (len(run) == 1 and BEGINS.search(text[: run[0].start()][-8:])):
            continue
        while ends[at] < run[-1].end():
            at += 1
        found[at] = True
    return found


class NameEnds:
    """Finds the last tokens of names among ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """By the texts of single tokens; what takes several tokens a character is no letter."""
        self.tokenizer = tokenizer
        self._known: dict[int, str] = dict.fromkeys(tokenizer.all_special_ids, "\n")

    def __call__(self, windows: Sequence[Sequence[int]], length: int) -> Tensor:
        """Where names end in `windows`, as a mask [windows, length] on the CPU."""
        found = torch.zeros(len(windows), length, dtype=torch.bool)
        for row, window in enumerate(windows):
            found[row, : len(window)] = torch.tensor(name_ends([self._piece(i) for i in window]))
        return found

    def _piece(self, token: int) -> str:
        if token not in self._known:
            text = str(self.tokenizer.decode([token]))
            spaced = str(self.tokenizer.convert_ids_to_tokens(token)).startswith("▁")
            self._known[token] = " " + text if spaced and not text.startswith(" ") else text
        return self._known[token]
