"""Long targets in chunks: each chunk is written at the end of what stands before it.

AnyEdit (arXiv:2502.05628): one key can't hold a paragraph, so a target is cut and every chunk gets
a key and a value of its own, the first at the subject's last token, each further one at the last
token of the chunk before. All chunks are optimised on the true text before them.
"""

from __future__ import annotations

import re
from dataclasses import replace

from nulledit.data.facts import SLOT, Fact
from nulledit.models.tokens import RowEncoder


def chunks_of(fact: Fact, encoder: RowEncoder, tokens: int) -> tuple[Fact, ...]:
    """`fact` as one request per chunk of at most about `tokens` tokens; itself if its target fits.

    Cuts are at single spaces, so what has none stays whole, be it longer, and so does a text with
    braces, which would look like a slot. So does an answer to forget: none of it is to be written.
    """
    words = re.split(r"(?<=\S) (?=\S)", fact.target)
    short = tokens == 0 or len(words) < 2 or _length(encoder, fact.target) <= tokens
    if fact.forget or short or any(brace in fact.target for brace in "{}"):
        return (fact,)
    chunks: list[str] = []
    for word in words:
        longer = f"{chunks[-1]} {word}" if chunks else word
        if chunks and _length(encoder, longer) <= tokens:
            chunks[-1] = longer
        else:
            chunks.append(word)
    return tuple(_request(fact, chunks, i) for i in range(len(chunks)))


def _request(fact: Fact, chunks: list[str], number: int) -> Fact:
    """Chunk `number` as a fact about the word in front of it."""
    if number == 0:
        return replace(fact, target=chunks[0], old_answer=None)
    head, _, last = " ".join(chunks[:number]).rpartition(" ")
    before = [" ".join(filter(None, (fact.render(p), head))) for p in fact.prompts]
    prompts = [f"{text.replace(SLOT, '')} {SLOT}" for text in before]
    return replace(
        fact.bare,
        subject=last,
        prompt=prompts[0],
        more_prompts=tuple(prompts[1:]),
        target=chunks[number],
        old_answer=None,
    )


def _length(encoder: RowEncoder, text: str) -> int:
    return len(encoder.tokenizer(" " + text, add_special_tokens=False)["input_ids"])
