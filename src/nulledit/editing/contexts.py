"""Prefix contexts: short texts of the model's own in front of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.config import ContextSettings

TOP_K = 5  # as published


@torch.no_grad()
def make_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
    contexts = ["{}"]
    device = model.get_input_embeddings().weight.device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for i in range(settings.count):
            start = settings.starts[i % len(settings.starts)]
            coded = tokenizer(start, return_tensors="pt").to(device)
            ids: Tensor = model.generate(  # type: ignore[operator]
                input_ids=coded["input_ids"],
                attention_mask=coded["attention_mask"],
                max_new_tokens=settings.tokens,
                min_new_tokens=settings.tokens,
                do_sample=True,
                top_k=TOP_K,
                temperature=1.0,
                top_p=1.0,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )
            text = str(tokenizer.decode(ids[0], skip_special_tokens=True))
            plain = " ".join(text.replace("{", " ").replace("}", " ").split())
            contexts.append(f"{plain}. {{}}")
    return tuple(contexts)
