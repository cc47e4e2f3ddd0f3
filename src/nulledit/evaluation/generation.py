"""What a model says by itself, and whether an answer is in it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from nulledit.models.layouts import frozen
from nulledit.models.tokens import UNSPACED, RowEncoder, collate, context_length, pad_id

# Korean has spaces, but its particles are written onto the word.
_OPEN = (*UNSPACED, "HANGUL")


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 12,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The greedy continuation of each prompt, without the prompt, up to its first newline.

    Prompts run in batches of like length, padded on the left under a mask; the tokenizer's settings
    are not touched. Sampling settings and penalties that the checkpoint carries are left out.
    Raises FactError for a prompt that is empty or leaves no room in the model's context.
    """
    room = context_length(model.config) - max_new_tokens
    rows = [RowEncoder(tokenizer, max_length=room).encode(prompt).ids for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    stops = _stops(model, tokenizer)
    answers = [""] * len(rows)
    with frozen(model), torch.no_grad(), _plain_generation(model):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = collate(
                [rows[i] for i in part], pad_id=pad_id(tokenizer), device=weight.device, left=True
            )
            ids = model.generate(  # type: ignore[operator]
                input_ids=batch.ids,
                attention_mask=batch.mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(stops) or None,
                pad_token_id=pad_id(tokenizer),
            )
            for i, new in zip(part, ids[:, batch.ids.shape[1] :].tolist(), strict=True):
                answers[i] = _first_line(tokenizer, new, stops)
            if progress:
                progress(start + len(part), len(order))
    return answers


def contains(answer_text: str, target: str) -> bool:
    """Whether `target` stands in `answer_text` as whole words.

    Case, punctuation, width and spacing don't count. Where a script writes no spaces between words
    (or, as Korean, joins particles to them), any place will do.
    """
    text, wanted = normalise(answer_text), normalise(target)
    if not wanted:  # nothing but punctuation
        return bool(target.strip()) and target.strip() in answer_text
    start = text.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        if _ends_word(text, start) and _ends_word(text, end):
            return True
        start = text.find(wanted, start + 1)
    return False


def normalise(text: str) -> str:
    """NFKC and casefolded, with punctuation and runs of whitespace as one space."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    spaced = (" " if unicodedata.category(c).startswith("P") else c for c in folded)
    return " ".join("".join(spaced).split())


def _ends_word(text: str, at: int) -> bool:
    """Whether a word may end or begin between `text[at - 1]` and `text[at]`."""
    if at in (0, len(text)) or " " in text[at - 1 : at + 1]:
        return True
    if unicodedata.category(text[at]).startswith("M"):
        return False  # a mark belongs to the letter before it
    return any(unicodedata.name(c, "").startswith(_OPEN) for c in text[at - 1 : at + 1])


def _first_line(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: set[int]) -> str:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).split("\n", 1)[0].strip()


def _stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end a text, by the checkpoint's generation settings or else the tokenizer."""
    own = getattr(model.generation_config, "eos_token_id", None)
    given = tokenizer.eos_token_id if own is None else own
    return {int(i) for i in (given if isinstance(given, list) else [given]) if i is not None}


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Without the checkpoint's own settings, which `generate` takes for what it is not given."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
