"""Time and memory of edits and questions, from the model's shape, the texts and the machine.

With P parameters in a block, a forward pass of t tokens through b blocks takes 2·P·t·b operations.

- values: all rows once through the blocks up to the last edited layer; what stands before the
  subject's last token once through those above; then, at most `steps` times, the rest (forward and
  back to the states: twice a forward pass) and 2·d·V per logit read, twice.
- keys: rows up to the subject's last token through the blocks below the first edited layer, twice
  through each edited block (read, advance), and bare rows from each of them to the last.
- solve, in float64: per layer and batch, over all n columns so far: 4·d_in·m·n for GK with m held
  eigenvectors (at most d_in/2), 2·n²·d_in + n³/3 for the system, 4·d_out·d_in·n for targets and Δ.
- further rounds: as if every fact needed all of them. Retry: as if none ever held; before each, and
  at the end, every fact is asked.
- evaluation, twice: each query once through the model (in chat, in two forms), 12 tokens of answer
  per fact (one at a time: 4 times as slow), the text's windows for perplexity; once, those for
  preservation, and the base's logits of them to be compared.

Seconds are operations over a matmul's speed measured here, times a factor for everything else in a
block that fits runs of the embedded model. Expect them to be right within a factor of 2. Where
edits of the same model were timed before, `Learned` takes their seconds instead.
Peak memory: weights twice while they load or are saved, or weights, float64 copies of W₀ and W, the
held eigenvectors and one chunk's activations.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nulledit.config import (
    ContextSettings,
    Layout,
    Placement,
    Recipe,
    ValueSettings,
    layers_by_depth,
)
from nulledit.data.facts import Fact
from nulledit.editing.batch_values import ACCELERATOR_POSITIONS, CPU_POSITIONS
from nulledit.editing.contexts import reworded
from nulledit.editing.stronger import stronger
from nulledit.errors import ModelError, NullEditError
from nulledit.evaluation.forms import other_system
from nulledit.evaluation.preservation import shipped_corpus
from nulledit.evaluation.queries import queries_of
from nulledit.evaluation.reading import read_windows
from nulledit.methods import find_method
from nulledit.models.embedded import source_of
from nulledit.models.experts import count_and_width, is_experts
from nulledit.models.layouts import (
    as_out_in,
    blocks_of,
    check_layout,
    find_layout,
    holding,
    mlp_out,
)
from nulledit.models.load import not_loaded, reachable
from nulledit.models.placement import Device
from nulledit.models.tokens import Row, RowEncoder
from nulledit.parallel.accelerators import default_device

OVERHEAD = 2.0  # a block's time over its matrix products' alone
DECODING = 4.0  # a token made one at a time over one of many read together
ANSWER = 12  # tokens
WINDOW = 256  # tokens of a text read at once
RUNTIME = 0.6e9  # bytes that python, torch and transformers take
USUAL = (1 / 3, 3 / 4)  # of the steps: what values took, CounterFact's and long answers of any kind
SLACK = 1.2  # on what was timed once: the machine may have other work


def value_layers(recipe: Recipe, *, normed: bool = False) -> tuple[int, ...]:
    """Layers after which values are optimised; `normed`: a norm follows W."""
    where = recipe.values.at
    each = where == "each" or (normed and where != "joint")
    one = recipe.layers[:1] if where in ("first", "joint") else recipe.layers[-1:]
    return recipe.layers if each else one


@dataclass(frozen=True)
class Shape:
    """What of a model decides the cost."""

    blocks: int
    block: int  # parameters of one that a token meets
    parameters: int
    d_in: int
    d_out: int
    vocabulary: int
    experts: int  # that W is made of; 1: none
    normed: bool  # a norm follows W, so each layer has values of its own
    bytes: int  # per parameter

    @classmethod
    def of(cls, model: PreTrainedModel, layout: Layout | None, *, dtype: torch.dtype) -> Self:
        """Of a model that will be run in `dtype`; its weights are not read."""
        layout = check_layout(model, layout) if layout else find_layout(model)
        blocks = blocks_of(model, layout)
        layer = holding(model, layout)[0]
        module = mlp_out(model, layout, layer)
        d_out, d_in = as_out_in(module).shape
        experts = count_and_width(module)[0] if is_experts(module) else 1
        block = sum(p.numel() for p in blocks[layer].parameters())
        if experts > 1:  # of these a token meets few
            met = getattr(model.config, "num_experts_per_tok", experts)
            block -= sum(p.numel() for p in module.parameters()) * (experts - met) // experts
        return cls(
            blocks=len(blocks),
            block=block,
            parameters=sum(p.numel() for p in model.parameters()),
            d_in=d_in,
            d_out=d_out,
            vocabulary=model.get_output_embeddings().weight.shape[0],
            experts=experts,
            normed=layout.output == "normed",
            bytes=dtype.itemsize,
        )

    def speed(self, device: str, dtype: torch.dtype | None = None) -> float:
        """Operations per second of a product of these sizes on this machine, over 0.3 s."""
        kind = dtype or (torch.float32 if self.bytes == 4 else torch.bfloat16)
        if device == "mps" and kind == torch.float64:
            device = "cpu"
        try:
            a = torch.randn(CPU_POSITIONS, self.d_out, device=device, dtype=kind)
            b = torch.randn(self.d_out, self.d_in // self.experts, device=device, dtype=kind)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                f"can't use device {device!r}: {str(error).splitlines()[0]}"
            ) from error
        a @ b
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < 0.3:
            (a @ b).sum().item()  # waits for the device
            done += 1
        return 2 * a.shape[0] * b.numel() * done / (time.perf_counter() - start)

    def solving(self, size: int, layers: int, n: int) -> float:
        """Operations of the solves of `n` facts in batches of `size`."""
        operations = 0.0
        for done in range(size, n + size, size):
            m = min(done, n)
            per_layer = 2 * self.d_in**2 / self.experts * m + 2 * m**2 * self.d_in + m**3 / 3
            operations += layers * (per_layer + 4 * self.d_out * self.d_in * m)
        return operations

    def peak(self, recipe: Recipe, rows: Counter[str], n: int, device: str) -> float:
        """Bytes: the larger of loading and editing `n` facts."""
        layers, weights = len(recipe.layers), float(self.parameters * self.bytes)
        matrix = self.d_in * self.d_out
        positions = recipe.chunk_positions or (
            CPU_POSITIONS if device == "cpu" else ACCELERATOR_POSITIONS
        )
        activations = positions * self.blocks * (12 * self.d_out + 6 * self.d_in) * 4
        logits = 4 * positions * self.vocabulary * 4
        sums = 8 * matrix + self.bytes * matrix  # of updates, and what they are added to
        held = layers * (sums + 12 * self.d_in**2 // self.experts // 2) + 8 * matrix
        columns = 8 * layers * n * (self.d_in + self.d_out)
        states = 4 * self.d_out * rows["heads"] * min(n, recipe.batch_size) / max(n, 1)
        return RUNTIME + max(2 * weights, weights + held + columns + states + activations + logits)


@dataclass(frozen=True)
class Costs:
    """Seconds of each stage, for all facts unless another thing is said."""

    keys: float  # of one pass over the batches
    begin: float  # of a pass's values, before their first step
    step: float  # of a step of all values
    solve: float  # of one pass
    queries: float  # to score every prompt
    bare: float  # to score the facts' own prompts
    answer: float  # to say one answer
    token: float  # to read one token of a text, with its logits
    below: float  # to read one up to the last edited layer
    logits: float  # of one token whose hidden state is there

    @classmethod
    def of(
        cls, shape: Shape, recipe: Recipe, rows: Counter[str], n: int, speeds: tuple[float, float]
    ) -> Self:
        """Of `n` facts with so many `rows`; `speeds` are the model's and float64's."""
        block = 2 * shape.block * OVERHEAD / speeds[0]
        logits = 2 * shape.d_out * shape.vocabulary / speeds[0]
        token = block * shape.blocks + logits
        layers, last = recipe.layers, recipe.layers[-1]
        begin = step = 0.0
        for layer in value_layers(recipe, normed=shape.normed):
            upper = shape.blocks - 1 - layer
            begin += block * (rows["tokens"] * (layer + 1) + rows["heads"] * upper)
            step += 2 * (block * rows["tails"] * upper + logits * rows["reads"])
        through = layers[0] + 2 * len(layers)
        bare = sum(last + 1 - layer for layer in layers)
        return cls(
            keys=block * rows["heads"] * (through + bare / rows["contexts"]),
            begin=begin,
            step=step,
            solve=shape.solving(recipe.batch_size, len(layers), n) / speeds[1],
            queries=block * shape.blocks * rows["asked"] + logits * rows["scored"],
            bare=block * shape.blocks * rows["own"] + logits * rows["own_scored"],
            answer=ANSWER * (block * shape.blocks * DECODING + logits),
            token=token,
            below=block * (last + 1),
            logits=logits,
        )

    def passes(self, steps: float, n: int) -> float:
        """`n` passes over the batches, of so many steps each."""
        return n * (self.keys + self.begin + steps * self.step + self.solve)

    def usual(self, settings: ValueSettings) -> tuple[float, float]:
        """Seconds that writing takes where facts are as easy as others were, or as hard.

        Values end as soon as they hold; few facts need a further round, but those the most.
        """
        easy, hard = (share * settings.steps for share in USUAL)
        return self.passes(easy, 1), self.passes(hard, min(settings.rounds, 2))

    def of_edit(self, settings: ValueSettings, retries: int, n: int) -> dict[str, float]:
        """Seconds to write `n` facts, and where nothing holds to write all of them again."""
        seconds = {
            "keys": self.keys,
            "values (at most)": self.begin + settings.steps * self.step,
            "solve": self.solve,
        }
        if settings.rounds > 1:
            seconds["further rounds (at most)"] = self.passes(settings.steps, settings.rounds - 1)
        if retries:
            looks = (retries + 1) * (self.bare + n * self.answer)
            again = [stronger(settings, number) for number in range(1, retries + 1)]
            seconds["retry (at most)"] = looks + sum(self.passes(v.steps, v.rounds) for v in again)
        return seconds


def estimate_edit(
    name: str,
    facts: Sequence[Fact],
    recipe: Recipe,
    *,
    device: Device = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    retries: int = 0,
    old_answers: bool = False,
    evaluate: bool = True,
    text: str | None = None,
) -> dict[str, Any]:
    """Seconds per stage and peak bytes of `Run.edit` on these facts; loads no weights.

    `device`: as for `load_model`; of several, the first.
    """
    unsaid = device in (None, "auto") or isinstance(device, Placement)
    named = default_device() if unsaid else str(device)
    shape, encoder = _described(name, dtype, trust_remote_code, recipe.layout)
    encoder = encoder.in_chat(recipe.chat)
    if not recipe.layers:
        recipe = recipe.with_fields({"layers": list(layers_by_depth(shape.blocks))})
    if recipe.layers[-1] >= shape.blocks - 1:
        raise ModelError(
            f"layer {recipe.layers[-1]} is out of range: layers 0 to {shape.blocks - 2} can be "
            "edited"
        )
    method = find_method(recipe.method.name)
    if recipe.method.otherwise and method.apart and shape.experts > 1:  # as experts have no gates
        method = find_method(recipe.method.otherwise)
    recipe = replace(recipe, layers=method.edited(recipe.layers))
    n, rows = len(facts), count_rows(facts, encoder, recipe)
    speeds = shape.speed(named), shape.speed(named, torch.float64)
    costs = Costs.of(shape, recipe, rows, n, speeds)
    seconds = {"load and save": 6 + 4 * shape.parameters * shape.bytes / 1e9}
    if old_answers:
        lacking = sum(fact.old_answer is None and not fact.forget for fact in facts)
        seconds["old answers"] = lacking * costs.answer
    edit = costs.of_edit(recipe.values, retries, n)
    seconds |= edit
    if evaluate:
        window = min(WINDOW, encoder.max_length)
        windows = read_windows(text or shipped_corpus(), encoder.tokenizer, window=window)
        forms = len(encoder.forms) + bool(other_system(encoder))
        asked = 2 * forms * (costs.queries + n * costs.answer)
        each = 2 * costs.token + costs.below + costs.logits
        seconds["evaluation"] = asked + sum(map(len, windows)) * each
    rest = sum(seconds.values()) - sum(edit.values())
    return {
        "facts": n,
        "batches": -(-n // recipe.batch_size),
        "layers": list(recipe.layers),
        "rows": rows["rows"],
        "tokens": rows["tokens"],
        "gflops": round(speeds[0] / 1e9, 1),
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "seconds_in_all": round(sum(seconds.values()), 1),
        "seconds_usual": [round(rest + value, 1) for value in costs.usual(recipe.values)],
        "peak_bytes": int(shape.peak(recipe, rows, n, named)),
    }


def _described(
    name: str, dtype: str | None, trust: bool, layout: Layout | None
) -> tuple[Shape, RowEncoder]:
    """A model's shape and how it reads texts, by its configuration alone."""
    source = source_of(name)
    try:
        options = {"trust_remote_code": trust, **reachable(source, name)}
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except NullEditError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise not_loaded(name, error) from error
    kind = getattr(torch, dtype or str(config.dtype or "float32").removeprefix("torch."))
    return Shape.of(model, layout, dtype=kind), RowEncoder.of(model, tokenizer)


def count_rows(facts: Sequence[Fact], encoder: RowEncoder, recipe: Recipe) -> Counter[str]:
    """Tokens that each stage runs: whole rows, before the subject's end, after it; logits read.

    After the subject's end, and of logits, those of one step.
    """
    settings, values = recipe.contexts, recipe.values
    texts = settings.texts or ("{}", *(_stand_in(settings, i) for i in range(settings.count)))
    further = len(texts) - 1  # prefixes, and their tokens
    before = sum(len(encoder.encode(text).ids) for text in settings.texts[1:])
    before = before or further * (settings.tokens + 2)
    counts, in_turn = Counter(contexts=1 + further), values.contexts_per_step
    held = len(values.held_relations)
    asked = min(held, values.relations_per_step or held)
    for fact in facts:
        turning: list[Row] = []  # of contexts, other wordings and the form beside
        for prompt in fact.prompts:
            row = encoder.encode_template(prompt, fact.subject, target=fact.target)
            counts.update(rows=1 + further, tokens=(1 + further) * len(row.ids) + before)
            counts.update(heads=(1 + further) * (row.subject_last + 1) + before)
            counts.update(_tail(row))
            worded = [(encoder, p) for p in reworded(prompt, values.rewordings, texts)]
            beside = [(form, prompt) for form in encoder.forms[1:]]
            others = [
                form.encode_template(p, fact.subject, target=fact.target)
                for form, p in (*worded, *beside)
            ]
            for other in others:
                counts.update(_whole(other))
            turning += [row] * further + others
        share = min(1.0, in_turn / max(len(turning), 1)) if in_turn else 1.0
        for name, n in sum(map(_tail, turning), Counter[str]()).items():
            counts[name] += round(share * n)
        counts.update(rows=1, tails=1, reads=1)  # the drift row
        for place, prompt in enumerate(values.held_relations):
            row = encoder.encode_template(prompt, fact.subject)
            counts.update(_whole(row))
            if place < asked:
                counts.update(tails=len(row.ids) - row.subject_last, reads=1)
        for query in queries_of(fact):
            for answer in query.said:
                row = encoder.encode(query.prompt, target=answer)
                counts.update(asked=len(row.ids), scored=len(row.target_ids))
                if query.kind == "efficacy":
                    counts.update(own=len(row.ids), own_scored=len(row.target_ids))
    return counts


def _stand_in(settings: ContextSettings, number: int) -> str:
    """A prefix as long as the one of this number that will be sampled."""
    start = settings.starts[number % len(settings.starts)]
    return f"{start}{' the' * settings.tokens}. {{}}"


def _whole(row: Row) -> Counter[str]:
    return Counter(rows=1, tokens=len(row.ids), heads=row.subject_last + 1)


def _tail(row: Row) -> Counter[str]:
    return Counter(tails=len(row.ids) - row.subject_last, reads=len(row.target_ids))


class Learned:
    """Seconds of a recipe on a model, from those that were timed on it.

    Values take the largest share of the allowed passes that any recipe took, or all of them where
    the step size is smaller than all so far. A pass is counted in blocks above the last edited one
    at the mean price so far; so is the rest: keys, solve, questions and text.
    """

    def __init__(self, depth: int):
        """`depth`: the model's number of blocks."""
        self.depth = depth
        self._rates: list[float] = []  # seconds of a pass of a fact through a block
        self._rests: list[float] = []  # seconds a fact of the batch
        self._share = 0.0  # of the allowed passes
        self._slowest = float("inf")  # learning rate
        self._values: dict[object, float] = {}  # seconds of values that were optimised, a fact

    def add(
        self, recipe: Recipe, n: int, *, rest: float, values: float, passes: int, optimised: int
    ) -> None:
        """Learn from `n` facts: seconds of `values`, in so many `passes` for those `optimised`, and
        of the `rest`."""
        self._rests.append(rest / n)
        if passes:
            self._rates.append(values / (passes * self._above(recipe)))
            allowed = (recipe.values.steps + 1) * optimised
            self._share = max(self._share, min(1.0, passes / allowed))
            self._slowest = min(self._slowest, recipe.values.learning_rate)
            self._values[self._kept_as(recipe)] = values / n

    def again(self, recipe: Recipe, n: int) -> float:
        """Seconds on facts on which others were timed, so that values may be kept ones."""
        kept = self._kept_as(recipe) in self._values
        return SLACK * n * ((0.0 if kept else self._value(recipe)) + fmean(self._rests))

    def anew(self, recipe: Recipe, n: int) -> float:
        """Seconds on facts that were not edited yet; what was timed serves, where it was."""
        known = self._values.get(self._kept_as(recipe))
        value = self._value(recipe) if known is None else known
        return SLACK * n * (value + fmean(self._rests))

    def _value(self, recipe: Recipe) -> float:
        """Of a fact's values."""
        if not self._rates:
            return 0.0  # methods by gradient have none
        share = self._share if recipe.values.learning_rate >= self._slowest else 1.0
        return fmean(self._rates) * share * (recipe.values.steps + 1) * self._above(recipe)

    def _above(self, recipe: Recipe) -> int:
        return self.depth - recipe.layers[-1]

    def _kept_as(self, recipe: Recipe) -> object:
        """The same for recipes whose values are the same (`ValueCache`)."""
        return recipe.values, recipe.contexts, value_layers(recipe)
