"""What a model says by itself, and whether an answer is in it."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from nulledit.data.facts import Fact, quote
from nulledit.errors import FactError
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen
from nulledit.models.tokens import UNSPACED, Row, RowEncoder, check_embedded

# Korean has spaces, but its particles are written onto the word.
_OPEN = (*UNSPACED, "HANGUL")

_AGAIN = re.compile(r"(\S.*?\S)(?: ?\1){2,}")

ANSWER_TOKENS = 12  # of an answer, if none that its fact names needs more
SPARE_TOKENS = 4  # beyond a right one, so that what follows it is seen

Watch = Callable[[list[int]], bool]
"""The new ids of a row so far -> whether it ends there."""


def generate_answers(
    model: EditableModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int] = ANSWER_TOKENS,
    first_line: bool = True,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    heard: Callable[[str], None] | None = None,
) -> list[str]:
    """The greedy continuation of each prompt, without the prompt, up to its first newline.

    With `first_line=False` it goes on over newlines. `max_new_tokens` may be given for each prompt.
    `heard`, of one prompt alone, receives the answer so far after every token.

    Prompts run in batches of like length, padded on the left under a mask; the tokenizer's settings
    are not touched. Sampling settings and penalties that the checkpoint carries are left out.
    Raises FactError for a prompt that is empty or leaves no room in the model's context.
    """
    given = max_new_tokens
    most = [given] * len(prompts) if isinstance(given, int) else list(given)
    rows = [
        model.encoder.leaving(room).encode(prompt).ids
        for prompt, room in zip(prompts, most, strict=True)
    ]
    stops = _stops(model)
    answers = [""] * len(rows)

    def said(ids: list[int]) -> str:
        text = _until_stop(model.tokenizer, ids, stops)
        return (text.split("\n", 1)[0] if first_line else text).strip()

    def watch(ids: list[int]) -> bool:
        if heard is not None:
            heard(said(ids))
        return False

    for part in _batches(rows, batch_size, progress):
        held = [rows[i] for i in part]
        longest = max(most[i] for i in part)
        new = _continue(model, held, longest, stops=sorted(stops), watch=heard and watch)
        for i, ids in zip(part, new, strict=True):
            answers[i] = said(ids[: most[i]])
    return answers


def generate_reply(
    model: EditableModel,
    row: Row,
    *,
    max_new_tokens: int,
    first_line: bool = False,
    tell: Callable[[str], None] = lambda piece: None,
) -> str:
    """The greedy continuation of one row, told piece by piece as it is made.

    The pieces together are the text. It ends at a token that ends a text or, in the chat template,
    a turn; with `first_line` at a newline. White space around it is left out.
    """
    stops = _stops(model) | _turn_end(model)
    told = ""

    def text_of(ids: list[int]) -> tuple[str, bool]:
        whole = _until_stop(model.tokenizer, ids, stops)
        line, newline, _ = whole.partition("\n")
        return (line if first_line else whole).strip(), bool(first_line and newline)

    def watch(ids: list[int]) -> bool:
        nonlocal told
        text, ended = text_of(ids)
        if text.startswith(told) and not text.endswith("\ufffd"):  # half of a character
            tell(text[len(told) :])
            told = text
        return ended

    (new,) = _continue(model, [row.ids], max_new_tokens, stops=sorted(stops), watch=watch)
    text, _ = text_of(new)
    tell(text[len(told) :])
    return text


def generate_texts(
    model: EditableModel,
    prompts: Sequence[str],
    *,
    length: int = 100,
    top_k: int = 5,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """A sampled text of `length` tokens for each prompt, which it begins with.

    Each token is drawn from the `top_k` likeliest ones by their probabilities; an end-of-text token
    does not end the text (and is left out of it), as in ROME's and MEMIT's generation. A prompt's
    draws come from `seed` and the prompt itself, so a text depends neither on the other prompts nor
    on the batch, and two models are compared under the same draws. Raises FactError for a prompt of
    `length` tokens or more.
    """
    length = min(length, model.context)
    rows = [prompt_ids(model.tokenizer, prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, rows, strict=True):
        check_embedded(ids, model.vocabulary, model.tokenizer)
        if len(ids) >= length:
            raise FactError(
                f"prompt of {len(ids)} tokens leaves no room in a text of {length}: shorten it "
                f"(found {quote(prompt)})"
            )
    texts = [""] * len(rows)
    for part in _batches(rows, batch_size, progress):
        held = [rows[i] for i in part]
        draw = TopK([_generator(seed, prompts[i]) for i in part], top_k)
        new = _continue(model, held, length - min(map(len, held)), draw=draw)
        for i, more in zip(part, new, strict=True):
            texts[i] = _decode(model.tokenizer, [*rows[i], *more][:length])
    return texts


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """Token ids of a prompt to go on from, of any length."""
    return RowEncoder(tokenizer, max_length=sys.maxsize).encode(prompt).ids


def fact_answers(
    model: EditableModel,
    facts: Sequence[Fact],
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What the model says by itself to each fact's own prompt, with room for its answers."""
    prompts = [fact.render(fact.prompt) for fact in facts]
    room = [answer_room(model.encoder, fact) for fact in facts]
    return generate_answers(model, prompts, max_new_tokens=room, progress=progress)


def answer_room(encoder: RowEncoder, fact: Fact) -> int:
    """Tokens that an answer gets: enough for the fact's old one, or a right one and then some.

    An old answer that the base gave within `ANSWER_TOKENS` makes for no longer answers.
    """
    named = [*fact.answers, *([] if fact.old_answer is None else [fact.old_answer])]
    rows = encoder.tokenizer([" " + text for text in named], add_special_tokens=False)["input_ids"]
    lengths = [len(row) for row in rows]
    return max(ANSWER_TOKENS, max(lengths[: len(fact.answers)]) + SPARE_TOKENS, *lengths)


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


def says(answer_text: str, target: str) -> bool:
    """Whether an answer says `target` and does not go on repeating itself."""
    return contains(answer_text, target) and not loops(answer_text, target)


def loops(answer_text: str, target: str = "") -> bool:
    """Whether something of two letters or more is said three times on end.

    What `target` itself repeats, as a number may, does not count.
    """
    again = _AGAIN.search(normalise(answer_text))
    return again is not None and again[0] not in normalise(target)


def says_any(answer_text: str, targets: Iterable[str]) -> bool:
    """Whether an answer says one of `targets`, as `says` has it."""
    return any(says(answer_text, target) for target in targets)


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


def _batches(
    rows: Sequence[tuple[int, ...]], size: int, progress: Callable[[int, int], None] | None
) -> Iterator[list[int]]:
    """Indices of rows of like length, `size` at a time; `progress` is called as each is done."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
        if progress:
            progress(min(start + size, len(order)), len(order))


def _continue(
    model: EditableModel,
    rows: Sequence[tuple[int, ...]],
    new_tokens: int,
    *,
    stops: list[int] | None = None,
    draw: LogitsProcessor | None = None,
    watch: Watch | None = None,
) -> list[list[int]]:
    """The ids that the model puts after each row: the likeliest ones, or those that `draw` leaves.

    At most `new_tokens` a row; all of them without `stops`. `watch`, of one row alone, is given its
    new ids after every token.
    """
    batch, own = model.collate(rows, left=True), model.model
    with frozen(own), torch.no_grad(), _plain_generation(own):
        ids = own.generate(  # type: ignore[operator]
            input_ids=batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=model.pad_id,
            logits_processor=LogitsProcessorList([draw] if draw else []),
            stopping_criteria=watch and _watching(batch.ids.shape[1], watch),
        )
    new: list[list[int]] = ids[:, batch.ids.shape[1] :].tolist()
    return new


def _watching(start: int, watch: Watch) -> StoppingCriteriaList:
    """`watch` as `generate` asks it; `start`: where a row's new ids begin."""

    def criterion(ids: Tensor, _scores: Tensor, **_options: Any) -> Tensor:
        return torch.full((len(ids),), watch(ids[0, start:].tolist()), device=ids.device)

    return StoppingCriteriaList([criterion])


class TopK(LogitsProcessor):
    """Leaves one of the k likeliest tokens, drawn by its probability among them, row by row.

    The largest of log-probability + Gumbel noise is such a draw. Noise goes by rank and comes from
    a row's own generator, so that a row's draws are its own in any batch.
    """

    def __init__(self, generators: Sequence[torch.Generator], k: int):
        self.generators, self.k = generators, k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` [rows, vocabulary] with all but the drawn token at -inf."""
        top = scores.topk(min(self.k, scores.shape[-1]), dim=-1)
        waits = [torch.empty(self.k).exponential_(generator=g) for g in self.generators]
        noise = -torch.stack(waits).log()[:, : top.values.shape[1]].to(top.values.device)
        chosen = (top.values.float() + noise).argmax(-1, keepdim=True)
        left = torch.full_like(scores, -torch.inf)
        return left.scatter(-1, top.indices.gather(-1, chosen), 0.0)


def _generator(seed: int, prompt: str) -> torch.Generator:
    digest = sha256(f"{seed}\0{prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def _until_stop(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: set[int]) -> str:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return _decode(tokenizer, ids[:end])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def _stops(model: EditableModel) -> set[int]:
    """Ids that end a text, by the checkpoint's generation settings or else the tokenizer."""
    own = getattr(model.model.generation_config, "eos_token_id", None)
    given = model.tokenizer.eos_token_id if own is None else own
    return {int(i) for i in (given if isinstance(given, list) else [given]) if i is not None}


def _turn_end(model: EditableModel) -> set[int]:
    """Id of the special token with which the chat template ends a turn; none for plain text."""
    form, tokenizer = model.encoder.chat, model.tokenizer
    ids = tokenizer(form.end, add_special_tokens=False)["input_ids"] if form and form.end else []
    return set(ids[:1]) & set(tokenizer.added_tokens_decoder)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Without the checkpoint's own settings, which `generate` takes for what it is not given."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
