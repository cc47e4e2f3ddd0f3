"""What a model makes of windows of a text: perplexity, and how far it is from its base.

Per token, KL(base ‖ edited) of the next token's distribution: never negative and without a first
order, so it tells edits apart whose perplexity differs by noise. A base and an edited model differ
in blocks only, so what is kept of the base is its normed states; its logits are made again, a few
positions at a time, when the edited model's are there to be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nulledit.data.corpus import Corpus, open_corpus
from nulledit.errors import StatisticsError
from nulledit.evaluation.opening import Gates, Opening, opened_on, opening_of
from nulledit.evaluation.scores import token_losses
from nulledit.evaluation.stats import exponential, mean_of
from nulledit.models.batches import chunks_by_length
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen
from nulledit.models.tokens import beginning

POSITIONS = 2048  # tokens that run together
LOGITS = 2**24  # of each model that are held at once to be compared: 64 MB of float32
WORST = 0.01  # of the tokens, whose share of the whole is reported
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


@dataclass(frozen=True)
class Divergence:
    """How far a model's next token is from its base's on a text."""

    value: float
    """Mean over tokens of KL(base ‖ model), thousandths of a nat; 0 without edits."""
    standard_error: float
    """Of `value`, over windows (delta method); nan for one window."""
    worst_share: float
    """Share of the sum that the worst 1 % of tokens hold (rounded up), 0 to 1; 0 if all is 0."""
    tokens: int
    """Tokens compared."""


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


@dataclass(frozen=True, eq=False, repr=False)
class Reading:
    """What a model, as it was, made of windows of text."""

    windows: tuple[tuple[int, ...], ...]
    """Token ids; each window predicts its own from the second on."""
    losses: tuple[np.ndarray, ...]
    """By window, each predicted token's negative log-probability, nats."""
    apart: tuple[np.ndarray, ...] | None = None
    """By window, each predicted token's KL(base ‖ this model), nats; None without a base."""
    states: tuple[Tensor, ...] | None = None
    """By window, the normed states that predict [tokens, d], on the CPU; None if not kept."""
    opening: Opening | None = None
    """How often gates open at the tokens that predict; None where no gate was asked for."""

    def __repr__(self) -> str:
        return f"<Reading of {len(self.windows)} windows: {self.perplexity!r}>"

    @property
    def perplexity(self) -> Perplexity:
        """Of all windows."""
        mean, error, tokens = mean_of(self.losses)
        value = exponential(mean)
        return Perplexity(value, value * error, tokens)

    @property
    def kl(self) -> Divergence | None:
        """Over all windows; None without a base."""
        return None if self.apart is None else divergence(self.apart)


def read(
    model: EditableModel,
    windows: Sequence[Sequence[int]],
    *,
    base: Reading | None = None,
    keep: bool = False,
    gates: Gates | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reading:
    """Read `windows` of token ids with the model as it is; those of one token are left out.

    With `base`, a reading of the same windows that the model without its edits kept, each token is
    compared with it. `keep` the states for that: width times tokens numbers in the model's dtype,
    where logits of all tokens at once would be the vocabulary's size times tokens. `gates` of the
    model are watched on the way. Results don't depend on how windows are put together. ValueError
    for a base of other windows.
    """
    texts = tuple(tuple(ids) for ids in windows if len(ids) > 1)
    if not texts:
        raise ValueError("perplexity needs a window of two tokens or more")
    if base is not None and (base.states is None or base.windows != texts):
        raise ValueError("the base has to have read the same windows, and to have kept its states")
    losses, apart = [np.empty(0)] * len(texts), [np.empty(0)] * len(texts)
    kept: dict[int, Tensor] = {}
    opened: dict[int, Tensor] = {}
    done = 0
    with frozen(model.model), torch.no_grad():
        for chunk, states, open_here in _read_chunks(model, texts, gates):
            lengths = [len(texts[i]) - 1 for i in chunk]
            targets = torch.tensor([token for i in chunk for token in texts[i][1:]])
            if base is None or base.states is None:
                loss, _ = token_losses(model, states, targets)
            else:
                before = torch.cat([base.states[i] for i in chunk])
                loss, moved = _compare(model, before, states, targets)
                for i, part in zip(chunk, moved.split(lengths), strict=True):
                    apart[i] = part.double().numpy()
            for i, part in zip(chunk, loss.split(lengths), strict=True):
                losses[i] = part.double().numpy()
            if keep:
                kept |= dict(zip(chunk, states.cpu().split(lengths), strict=True))
            if open_here is not None:
                opened |= dict(zip(chunk, open_here.split(lengths), strict=True))
            done += len(chunk)
            if progress:
                progress(done, len(texts))
    return Reading(
        texts,
        tuple(losses),
        None if base is None else tuple(apart),
        tuple(kept[i] for i in range(len(texts))) if keep else None,
        opening_of(gates, [opened[i] for i in range(len(texts))]) if gates else None,
    )


def perplexity(
    model: EditableModel,
    windows: Sequence[Sequence[int]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `windows` of token ids; each window predicts its own tokens from the second on.

    The standard error takes windows for independent draws: of the ratio (sum of losses)/(tokens)
    over windows, times the perplexity.
    """
    return read(model, windows, progress=progress).perplexity


def divergence(apart: Sequence[np.ndarray]) -> Divergence:
    """From each token's KL in nats, by window."""
    mean, error, tokens = mean_of(apart)
    found = np.sort(np.concatenate(apart))
    total, worst = float(found.sum()), float(found[-math.ceil(WORST * tokens) :].sum())
    share = worst / total if total else 0.0
    return Divergence(1000 * mean, 1000 * error, share, tokens)


def _read_chunks(
    model: EditableModel, windows: Sequence[Sequence[int]], gates: Gates | None
) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
    """Places of windows that run together, their normed states [tokens, d], one by one, and which
    `gates` are open there [tokens, n].
    """
    for chunk in chunks_by_length([len(ids) for ids in windows], POSITIONS):
        rows = [windows[i][:-1] for i in chunk]
        batch = model.collate(rows)
        real = batch.mask.bool()
        with opened_on(model, gates) as opened:
            normed = model.run_normed(batch)  # [rows, length, d]
        yield chunk, normed[real.to(normed.device)], opened(real) if gates else None


def _compare(
    model: EditableModel, base: Tensor, now: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses [n] of `targets` [n] after the states `now` [n, d], and KL(base ‖ now) [n], nats."""
    losses, apart = [], []
    for at, log_p, log_q in side_by_side(model, base, now):
        ids = targets[at].to(log_q.device)
        losses.append(-log_q.gather(1, ids[:, None])[:, 0].cpu())
        apart.append(divergences(log_p, log_q).cpu())
    return torch.cat(losses), torch.cat(apart)


def side_by_side(
    model: EditableModel, base: Tensor, now: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Log-probabilities [m, vocabulary] after normed states `base` and `now` [n, d], in parts.

    Each part with its place among the n.
    """
    size = max(1, LOGITS // model.model.config.get_text_config().vocab_size)
    for first in range(0, len(now), size):
        at = slice(first, first + size)
        before = _log_probabilities(model, base[at].to(now.device))
        yield at, before, _log_probabilities(model, now[at])


def _log_probabilities(model: EditableModel, states: Tensor) -> Tensor:
    logits = model.logits(states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def divergences(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) [n] of log-probabilities [n, vocabulary].

    As the sum of p (log p − log q) + q − p, whose terms are not negative: what the logarithms have
    in common of their rounding falls out, which alone is 1e-6 nats in float32.
    """
    p = log_p.exp()
    terms = (log_p - log_q).mul_(p).add_(log_q.exp()).sub_(p)
    terms.masked_fill_(log_p.isneginf(), 0)  # tokens that the model never gives
    return terms.sum(-1).clamp_min(0)


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
