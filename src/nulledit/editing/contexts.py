"""Other ways to a subject: short texts of the model's own before a prompt, and other wordings."""

from __future__ import annotations

import random
import re

import torch
from torch import Tensor

from nulledit.config import ContextSettings
from nulledit.errors import ConfigError
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import beginning

TOP_K = 5  # as published
LEFT_OUT = 0.3
"""Share of a prompt's words that a rewording leaves out."""
MOVED = 0.5
"""Share of rewordings in which words before the subject come after it."""
TRIES = 4
"""Draws for each rewording; short prompts have few that differ."""


@torch.no_grad()
def make_contexts(
    model: EditableModel,
    settings: ContextSettings,
    *,
    seed: int,
) -> tuple[str, ...]:
    """Templates with one slot, the bare "{}" first, then sampled prefixes ("I look at the. {}").

    Top-5 sampling from `settings.starts`, as published, but seeded, and by the model's own
    `generate`. The global random state is as before afterwards.
    """
    if settings.texts:
        return settings.texts
    contexts, most = ["{}"], model.context
    tokenizer, device = model.tokenizer, model.device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for i in range(settings.count):
            start = settings.starts[i % len(settings.starts)]
            words = tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"]
            begun = beginning(tokenizer) + list(words)
            if not begun:
                raise ConfigError(
                    f"contexts.starts: {start!r} gives no token, and this tokenizer has none of a "
                    "beginning: give a word"
                )
            if (length := len(begun) + settings.tokens) > most:
                raise ConfigError(
                    f"contexts.tokens is {settings.tokens}: a text of {length} tokens is longer "
                    f"than the model's context of {most}"
                )
            coded = torch.tensor([begun], device=device)
            ids: Tensor = model.model.generate(  # type: ignore[operator]
                input_ids=coded,
                attention_mask=torch.ones_like(coded),
                max_new_tokens=settings.tokens,
                min_new_tokens=settings.tokens,
                do_sample=True,
                top_k=TOP_K,
                temperature=1.0,
                top_p=1.0,
                pad_token_id=model.pad_id,
            )
            text = str(tokenizer.decode(ids[0], skip_special_tokens=True))
            plain = " ".join(text.replace("{", " ").replace("}", " ").split())
            contexts.append(f"{plain}. {{}}")
    return tuple(contexts)


def reworded(prompt: str, n: int) -> tuple[str, ...]:
    """At most `n` other wordings of a prompt with one slot for its subject, all different.

    Words are left out, and words before the subject may come after it; at least half of each side
    stays, and the last word last, as the target follows it. It is broken English that keeps the
    relation, and costs no model. What touches the slot ("{}'s") stays there, so a prompt without
    spaces has none. The same prompt has the same wordings, whatever the fact.
    """
    before, after = prompt.split("{}")
    before, left = _parted(before[::-1])
    before, left = before[::-1], left[::-1]
    after, right = _parted(after)
    words, draw = after.split(), random.Random(prompt)
    found = dict.fromkeys([prompt])

    def kept(words: list[str]) -> list[str]:
        out = [i for i in range(len(words)) if draw.random() < LEFT_OUT]
        out = out[: len(words) // 2]
        return [word for i, word in enumerate(words) if i not in out]

    for _ in range(TRIES * n):
        first, last = kept(before.split()), kept(words[:-1]) + words[-1:]
        if first and last and draw.random() < MOVED:
            cut = draw.randrange(len(first))
            first, last = first[:cut], first[cut:] + last
        found[" ".join([*first, f"{left}{{}}{right}", *last])] = None
    return tuple(found)[1 : n + 1]


def _parted(text: str) -> tuple[str, str]:
    """`text` from its first space on, and what is before that."""
    touching = re.match(r"\S*", text)
    assert touching is not None
    return text[touching.end() :], touching.group()
