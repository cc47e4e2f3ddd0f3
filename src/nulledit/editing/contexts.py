"""Other ways to a subject: texts of the model's own before a prompt, and other wordings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nulledit.config import ContextSettings
from nulledit.errors import ConfigError
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import beginning

TOP_K = 5  # as published
BEGINNINGS = ("{}", "The {}", "About {}:", "In the case of {},", "{} is", "{} was")
"""Of wordings, in turn."""


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


def reworded(prompt: str, n: int, contexts: Sequence[str]) -> tuple[str, ...]:
    """At most `n` other wordings of a prompt with one slot for its subject, all different.

    A beginning with the subject, up to six words of one of the `contexts`, and the prompt's last
    word, as the target follows it; where it follows the subject, these words and the one before
    the subject come first. Nothing else is left of how the fact was put, so a value that holds here
    hangs on its subject. It is no sense, and costs no model. The same prompt has the same wordings,
    whatever the fact. Words are what spaces part.
    """
    before, after = prompt.split("{}")
    words, subject_last = after.split() or before.split(), not after.strip()
    texts = [context.split("{}")[0].strip(" .").split() for context in contexts]
    fillers = [text for text in texts if text] or [[]]
    found = dict.fromkeys([prompt])
    for i in range(n if words else 0):
        filler = fillers[i % len(fillers)][3 * i % 4 :][: 3 + i % 4]
        begun = BEGINNINGS[i % len(BEGINNINGS)].split()
        worded = [*filler, words[-1], "{}"] if subject_last else [*begun, *filler, words[-1]]
        found[" ".join(worded)] = None
    return tuple(found)[1:]
