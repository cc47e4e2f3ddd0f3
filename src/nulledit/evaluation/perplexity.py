"""Perplexity on windows of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from nulledit.data.corpus import Corpus, open_corpus
from nulledit.errors import StatisticsError
from nulledit.evaluation.metrics import token_losses
from nulledit.models.layouts import frozen
from nulledit.models.partial import PartialModel
from nulledit.models.tokens import beginning, chunks_by_length, collate

POSITIONS = 2048  # tokens that run together
MARGIN = 64  # tokens read past the last window: where a text is cut off, its last ones may differ


@dataclass(frozen=True)
class Perplexity:
    """How surprising a text is."""

    value: float
    """exp of the mean negative log-probability of a token."""
    standard_error: float
    """Of `value`, over windows (delta method); nan for one window."""
    tokens: int
    """Tokens predicted."""


def read_windows(
    source: str | Path | Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int = 40,
    window: int = 256,
) -> list[list[int]]:
    """The first `windows` full windows of `window` token ids of a text read as one stream.

    The text is tokenised as one, blank lines included: so 20 windows of 256 from wikitext-2's test
    file give 39.56 for the unedited embedded model, as in the figures we compare with. Each window
    begins with the tokenizer's beginning-of-text token, if it has one in front of every text. Fewer
    windows come back if the text has fewer; StatisticsError if it has none.
    """
    corpus = source if isinstance(source, Corpus) else open_corpus(source)
    first = beginning(tokenizer)
    room = window - len(first)
    if room < 1:
        raise StatisticsError(f"a window of {window} tokens has no room for text")
    ids = _stream(corpus, tokenizer, windows * room)
    found = [first + ids[at : at + room] for at in range(0, len(ids) - room + 1, room)][:windows]
    if not found:
        raise StatisticsError(f"{corpus.name}: has less text than one window of {window} tokens")
    return found


def perplexity(
    model: PartialModel,
    windows: Sequence[Sequence[int]],
    pad_id: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `windows` of token ids; each window predicts its own tokens from the second on.

    The standard error takes windows for independent draws: of the ratio (sum of losses)/(tokens)
    over windows, times the perplexity.
    """
    windows = [ids for ids in windows if len(ids) > 1]
    if not windows:
        raise ValueError("perplexity needs a window of two tokens or more")
    losses = np.zeros(len(windows))  # nats, summed over each window
    done = 0
    with frozen(model.model), torch.no_grad():
        for chunk in chunks_by_length([len(ids) for ids in windows], POSITIONS):
            rows = [windows[i] for i in chunk]
            batch = collate([ids[:-1] for ids in rows], pad_id=pad_id, device=model.device)
            normed = model.run_normed(batch)  # [rows, length, d]
            targets = torch.tensor([token for ids in rows for token in ids[1:]])
            part, _ = token_losses(model, normed[batch.mask.bool().to(normed.device)], targets)
            split = part.double().split([len(ids) - 1 for ids in rows])
            losses[chunk] = [float(loss.sum()) for loss in split]
            done += len(rows)
            if progress:
                progress(done, len(windows))
    return _of_sums(losses, np.array([len(ids) - 1 for ids in windows]))


def _of_sums(losses: np.ndarray, tokens: np.ndarray) -> Perplexity:
    """From each window's summed loss [n] and its number of predicted tokens [n]."""
    n, total = len(losses), int(tokens.sum())
    mean = float(losses.sum()) / total
    value = math.exp(mean) if mean < 700 else math.inf  # nan stays nan
    if n == 1:
        return Perplexity(value if not math.isnan(mean) else math.nan, math.nan, total)
    spread = float(np.sqrt(n / (n - 1) * np.square(losses - mean * tokens).sum())) / total
    return Perplexity(value if not math.isnan(mean) else math.nan, value * spread, total)


def _stream(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[int]:
    """Ids of the beginning of a text: `tokens` or more, unless it has fewer."""
    texts = corpus.texts()
    held = ""
    goal = 8 * (tokens + MARGIN)  # characters; enough for English, doubled for where it is not
    while True:
        parts, length = [held], len(held)
        for text in texts:
            parts.append(text if text.endswith("\n") else text + "\n")
            length += len(parts[-1])
            if length >= goal:
                break
        held = "".join(parts)
        ids = list(tokenizer(held, add_special_tokens=False, verbose=False)["input_ids"])
        if length < goal or len(ids) >= tokens + MARGIN:
            return ids
        goal *= 2
