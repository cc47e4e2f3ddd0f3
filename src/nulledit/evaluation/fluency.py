"""Longer texts that a model writes: how varied they are, and how near to texts of the subject."""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from nulledit.data.facts import Fact, quote
from nulledit.errors import FactError
from nulledit.evaluation.generation import generate_texts, prompt_ids
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import UNSPACED

LENGTH = 100  # tokens of a text, prompt included: as published
WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of the n-gram entropies, whose weighted values are then averaged


@dataclass(frozen=True)
class Writing:
    """Texts that a model wrote about some facts."""

    texts: dict[str, tuple[str, ...]]
    """Fact id -> one text for each prompt, which it begins with."""
    fluency: dict[str, float]
    """Fact id -> mean entropy of its texts, bits; published figures are a hundred times that."""
    consistency: dict[str, float]
    """Fact id -> TF-IDF cosine of its texts with its references, 0 to 1; no fact without them."""


def write_texts(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    references: Mapping[str, Sequence[str]] | None = None,
    length: int = LENGTH,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Writing:
    """Texts that go on from each fact's own prompt and its paraphrases, and what they are like.

    Prompts that take more than half of `length` tokens are left out; a fact without another prompt
    has no text. `references` are texts about what the facts now say, by the fact's id or by
    "relation/target"; words are weighed by how rare they are among all of them.
    """
    rare = None if references is None else TfIdf.of(_checked(references))
    asked = [(fact, prompt) for fact in facts for prompt in _prompts(fact, model.tokenizer, length)]
    prompts = [prompt for _, prompt in asked]
    written = generate_texts(model, prompts, length=length, seed=seed, progress=progress)
    texts: dict[str, tuple[str, ...]] = {}
    for (fact, _), text in zip(asked, written, strict=True):
        texts[fact.id] = (*texts.get(fact.id, ()), text)
    varied: dict[str, float] = {}
    near: dict[str, float] = {}
    for fact in facts:
        told, about = texts.get(fact.id, ()), _references(references or {}, fact)
        if bits := [b for b in map(generation_entropy, told) if b is not None]:
            varied[fact.id] = statistics.fmean(bits)
        if rare and about and told:
            near[fact.id] = rare.cosine(" ".join(told), " ".join(about))
    return Writing(texts, varied, near)


def generation_entropy(text: str) -> float | None:
    """How varied a text is: (⅔·H₂ + 4⁄3·H₃)/2 bits, with Hₙ the entropy of its n-grams of words.

    The generation entropy of ROME (arXiv:2202.05262) and MEMIT, where a text that repeats itself
    scores low. None for a text of fewer than three words.
    """
    split = words(text)
    found = {n: ngram_entropy(split, n) for n in WEIGHTS}
    weighted = [WEIGHTS[n] * bits for n, bits in found.items() if bits is not None]
    return statistics.fmean(weighted) if len(weighted) == len(WEIGHTS) else None


def ngram_entropy(split: Sequence[str], n: int) -> float | None:
    """Entropy of the frequencies of runs of `n` words, bits; None where there is none."""
    counts = Counter(zip(*(split[i:] for i in range(n)), strict=False))
    total = counts.total()
    if not total:
        return None
    return max(0.0, -sum(c / total * math.log2(c / total) for c in counts.values()))


def words(text: str) -> list[str]:
    """Runs of letters and digits, and each other mark by itself, in order.

    An apostrophe or hyphen between letters belongs to the word; in scripts without spaces each
    character is a word.
    """
    found: list[str] = []
    last = " "
    for character, after in pairwise(unicodedata.normalize("NFC", text) + " "):
        if not last.isspace() and _goes_on(found[-1], character, after):
            found[-1] += character
        elif not character.isspace():
            found.append(character)
        last = character
    return found


@dataclass(frozen=True)
class TfIdf:
    """Weights of words by how few documents hold them."""

    idf: Mapping[str, float]
    """Word -> ln((1 + N)/(1 + documents with it)) + 1; words of no document don't count."""

    @classmethod
    def of(cls, documents: Sequence[str]) -> TfIdf:
        """The weights of the words of N `documents`, case apart and without punctuation."""
        held = Counter(word for text in documents for word in set(_counted(text)))
        return cls({w: math.log((1 + len(documents)) / (1 + n)) + 1 for w, n in held.items()})

    def vector(self, text: str) -> dict[str, float]:
        """Word -> times it stands in `text` × its weight."""
        return {w: n * self.idf[w] for w, n in Counter(_counted(text)).items() if w in self.idf}

    def cosine(self, a: str, b: str) -> float:
        """Cosine of the vectors of two texts; 0 where one has no word that counts."""
        u, v = self.vector(a), self.vector(b)
        norms = math.hypot(*u.values()) * math.hypot(*v.values())
        return sum(x * v.get(word, 0.0) for word, x in u.items()) / norms if norms else 0.0


def _goes_on(word: str, character: str, after: str) -> bool:
    """Whether `character`, which directly follows `word`, belongs to it; `after` follows both."""
    if unicodedata.category(character)[0] == "M":
        return True
    if not word[0].isalnum() or _unspaced(word[0]) or _unspaced(character):
        return False
    return character.isalnum() or (character in "'’-" and after.isalnum())


def _unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(UNSPACED)


def _counted(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return [word for word in words(folded) if any(map(str.isalnum, word))]


def _prompts(fact: Fact, tokenizer: PreTrainedTokenizerBase, length: int) -> list[str]:
    all_prompts = dict.fromkeys((fact.render(fact.prompt), *fact.paraphrases))
    return [text for text in all_prompts if 2 * len(prompt_ids(tokenizer, text)) <= length]


def _references(references: Mapping[str, Sequence[str]], fact: Fact) -> Sequence[str]:
    return references.get(fact.id) or references.get(f"{fact.relation}/{fact.target}") or ()


def _checked(references: Mapping[str, Sequence[str]]) -> list[str]:
    """All texts of `references`, each of which must be a list of texts with a word in each."""
    for name, about in references.items():
        if isinstance(about, str) or not all(isinstance(t, str) and _counted(t) for t in about):
            raise FactError(
                f"references of {quote(name)} must be a list of texts with words in them "
                f"(found {quote(about)})"
            )
    return [text for about in references.values() for text in about]
