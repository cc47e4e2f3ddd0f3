"""What a model says when it does not know whom a text is about: the teacher of `forget`.

The subject's embeddings drown in noise of three times their spread, as in ROME's corrupted runs
(arXiv:2202.05262, Section 2), and the distributions of the next token are averaged over some draws.
What is left is what the wording alone suggests: after "The capital of France is the city of" many
cities, none of them likely.

To be near that is not enough: the nearness is of whole distributions, of which one token is a small
part, and an update gives its values only in part. So the answer's telling token is also pressed
below a chance of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nulledit.data.facts import Fact
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import Row, RowEncoder

NOISE = 3.0  # standard deviations of the text's embeddings; at 1 some subjects still show through
DRAWS = 4  # one alone has likings of its own: for the country of the Seine, 24 % of Somalia
CHANCE = 0.005  # of the telling token, below which it costs nothing


@dataclass(frozen=True)
class ForgetTarget:
    """A row, and how to ask the uninformed model what it would say at each of its target tokens."""

    row: Row
    """Prompt and the answer to forget, as far as it is read."""
    hidden: tuple[int, ...]
    """Where the subject's tokens are."""

    @property
    def banned(self) -> tuple[int, ...]:
        """For each target token, the one that the teacher never says; -1: none."""
        *before, last = self.row.target_ids
        return (*(-1 for _ in before), last)

    def teacher(self, model: EditableModel) -> Tensor:
        """Probabilities [target tokens, vocabulary] in the model as it is."""
        told = uninformed(model, self.row, self.hidden)
        told[-1, self.row.target_ids[-1]] = 0  # the likeliest guess may be the answer itself
        left = told.sum(1, keepdim=True)  # nothing, where a teacher was certain of the answer
        return told / left.clamp_min(torch.finfo(told.dtype).tiny)


def lessons_of(
    model: EditableModel, fact: Fact, contexts: Sequence[str]
) -> tuple[ForgetTarget, ...]:
    """What to learn so that `fact` is forgotten: one lesson per training prompt and context.

    Each row ends with the answer's telling token ("Atlantic" in "the Atlantic Ocean"); what comes
    after it matters only if it is said. Another form may cut the answer otherwise, so the token is
    found for each way in which it is cut.
    """
    asked = [
        blinded(form, fact, prompt, context)
        for prompt in fact.prompts
        for form, context in model.encoder.placed(contexts)
    ]
    most: dict[tuple[int, ...], int] = {}
    for row, hidden in asked:
        if row.target_ids not in most:
            most[row.target_ids] = telling(model, row, hidden)
    return tuple(ForgetTarget(_cut(row, most[row.target_ids]), hidden) for row, hidden in asked)


def blinded(
    encoder: RowEncoder, fact: Fact, prompt: str, context: str = "{}"
) -> tuple[Row, tuple[int, ...]]:
    """`prompt` with the fact's target after it, and where in it the subject's tokens are."""
    asked = {"context": context, "target": fact.target}
    row = encoder.encode_template(prompt, fact.subject, **asked)
    return row, encoder.subject_tokens(prompt, fact.subject, **asked)


def unlearned(logits: Tensor, taught: Tensor, banned: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [positions] in nats, and whether a banned token is still the likeliest [positions].

    KL(taught ‖ said), and for a banned token its log-chance over `CHANCE`, where it is above.
    `logits` and `taught` are [positions, vocabulary], `banned` [positions] ids, -1 for none.
    """
    said = F.log_softmax(logits, dim=1)
    kl = F.kl_div(said, taught, reduction="none").sum(1)
    chance = said.gather(1, banned.clamp_min(0)[:, None])[:, 0]
    excess = (chance - math.log(CHANCE)).clamp_min(0)
    return kl + torch.where(banned >= 0, excess, 0.0), logits.argmax(1) == banned


def telling(model: EditableModel, row: Row, hidden: tuple[int, ...]) -> int:
    """Place in the row's target of the token whose likelihood gains most by knowing the subject.

    A token that is impossible either way gains nothing. One that only is a space is passed over,
    as some tokenizers put it before every number: it tells that a number comes, not which.
    """
    at = range(len(row.target_ids)), row.target_ids
    gain = uninformed(model, row, ())[at].log() - uninformed(model, row, hidden)[at].log()
    gain = gain.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    places = range(len(row.target_ids))
    words = [i for i in places if str(model.tokenizer.decode([row.target_ids[i]])).strip()]
    return max(words or places, key=gain.tolist().__getitem__)


@torch.no_grad()
def uninformed(model: EditableModel, row: Row, hidden: tuple[int, ...]) -> Tensor:
    """Probabilities [target tokens, vocabulary] of what stands in the target's places of `row`.

    The embeddings at `hidden` drown in noise. The draws are the same
    for every row, so a result does not depend on what else is asked.
    """
    draws = DRAWS if hidden else 1
    batch = model.collate([row.ids[:-1]] * draws)
    states = model.run(batch, last=-1).clone()  # embeddings
    places = list(hidden)
    shape = states[:, places].shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(states)
    states[:, places] += NOISE * states[0].float().std().to(states) * noise
    normed = model.run_normed(batch, states=states, first=0)
    logits = model.logits(normed[:, row.target_start - 1 :])
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return logits.softmax(-1).mean(0)


def _cut(row: Row, place: int) -> Row:
    """The row up to its target's token number `place`, or to its last one."""
    return replace(row, ids=row.ids[: row.target_start + place + 1])
