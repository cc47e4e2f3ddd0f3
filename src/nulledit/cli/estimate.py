"""Time and memory of an edit, from the model's shape, the facts' lengths and this machine's speed.

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
block that fits runs of the embedded model. Expect them to be right within a factor of 2.
Peak memory: weights twice while they load or are saved, or weights, float64 copies of W₀ and W, the
held eigenvectors and one chunk's activations.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nulledit.config import Layout, Recipe, ValueSettings, layers_by_depth
from nulledit.data.facts import Fact
from nulledit.editing.batch import ACCELERATOR_POSITIONS, CPU_POSITIONS
from nulledit.editing.stronger import stronger
from nulledit.errors import ModelError, NullEditError
from nulledit.evaluation.forms import other_system
from nulledit.evaluation.queries import queries_of
from nulledit.io.text import count
from nulledit.models.embedded import EMBEDDED, embedded_folder
from nulledit.models.experts import count_and_width, is_experts
from nulledit.models.layouts import (
    as_out_in,
    blocks_of,
    check_layout,
    find_layout,
    holding,
    mlp_out,
)
from nulledit.models.tokens import RowEncoder
from nulledit.parallel.accelerators import default_device
from nulledit.report.tables import as_text
from nulledit.runs.measure import windows_of

OVERHEAD = 2.0  # a block's time over its matrix products' alone
DECODING = 4.0  # a token made one at a time over one of many read together
ANSWER = 12  # tokens
RUNTIME = 0.6e9  # bytes that python, torch and transformers take
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """What of a model decides the cost."""

    blocks: int
    block: int  # parameters of one that a token meets
    parameters: int
    width: int
    d_in: int
    d_out: int
    vocabulary: int
    experts: int  # that W is made of; 1: none
    normed: bool  # a norm follows W, so each layer has values of its own
    bytes: int  # per parameter


@dataclass(frozen=True)
class Costs:
    """Seconds of each stage, for all facts unless another thing is said."""

    keys: float
    """Of one pass over the batches."""
    begin: float
    """Of a pass's values, before their first step."""
    step: float
    """Of a step of all values."""
    solve: float
    """Of one pass."""
    queries: float
    """To score every prompt."""
    bare: float
    """To score the facts' own prompts."""
    answer: float
    """To say one answer."""
    token: float
    """To read one token of a text, with its logits."""
    below: float
    """To read one up to the last edited layer."""
    logits: float
    """Of one token whose hidden state is there."""

    def passes(self, steps: int, n: int) -> float:
        """`n` passes over the batches, of so many steps each."""
        return n * (self.keys + self.begin + steps * self.step + self.solve)

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


def estimate(
    name: str,
    facts: Sequence[Fact],
    recipe: Recipe | None,
    *,
    dtype: str | None,
    given: dict[str, Any],
) -> dict[str, Any]:
    """Seconds per stage and peak bytes of `nulledit edit` on these facts; loads no weights."""
    recipe = recipe or Recipe()
    device = given["device"]
    device = device if isinstance(device, str) and device != "auto" else default_device()
    shape, encoder, depth = _shape(name, dtype, given["trust_remote_code"], recipe.layout)
    encoder = encoder.in_chat(recipe.chat)
    layers = recipe.layers or layers_by_depth(depth)
    if layers[-1] >= depth - 1:
        raise ModelError(
            f"layer {layers[-1]} is out of range: layers 0 to {depth - 2} can be edited"
        )
    rows = _count_rows(facts, encoder, recipe)
    speeds = _speed(shape, device), _speed(shape, device, torch.float64)
    costs = _costs(shape, recipe, layers, depth, rows, len(facts), speeds)
    seconds = {"load and save": 6 + 4 * shape.parameters * shape.bytes / 1e9}
    if given["old_answers"]:
        lacking = sum(fact.old_answer is None and not fact.forget for fact in facts)
        seconds["old answers"] = lacking * costs.answer
    seconds |= costs.of_edit(recipe.values, given["retry"], len(facts))
    if not given["no_evaluate"]:
        windows = sum(map(len, windows_of(encoder, given["text"]).windows))
        forms = 2 if other_system(encoder) else 1
        asked = 2 * forms * (costs.queries + len(facts) * costs.answer)
        seconds["evaluation"] = asked + windows * (2 * costs.token + costs.below + costs.logits)
    return {
        "facts": len(facts),
        "batches": -(-len(facts) // recipe.batch_size),
        "layers": list(layers),
        "rows": rows["rows"],
        "tokens": rows["tokens"],
        "gflops": round(speeds[0] / 1e9, 1),
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "seconds_in_all": round(sum(seconds.values()), 1),
        "peak_bytes": int(_memory(shape, recipe, len(layers), len(facts), rows, device)),
    }


def as_page(size: dict[str, Any]) -> str:
    """What `edit --dry-run` prints."""
    cells: list[Sequence[str]] = [[k, f"{v:.1f}"] for k, v in size["seconds"].items()]
    cells.append(["in all", f"{size['seconds_in_all']:.1f}"])
    return (
        f"{count(size['facts'], 'fact')} in {count(size['batches'], 'batch')}, layers "
        f"{', '.join(map(str, size['layers']))}; {count(size['rows'], 'row')} with "
        f"{size['tokens']} tokens; {size['gflops']} GFLOP/s measured\n\n"
        f"{as_text((['stage', 'seconds'], cells))}\n\n"
        f"Peak memory: about {size['peak_bytes'] / 1e9:.1f} GB. Nothing was edited; whether there "
        "are statistics was not looked up."
    )


def _shape(
    name: str, dtype: str | None, trust: bool, layout: Layout | None
) -> tuple[Shape, RowEncoder, int]:
    source = name
    if name in EMBEDDED:
        try:
            source = str(embedded_folder(name))
        except ModelError:
            source = EMBEDDED[name].hub
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except NullEditError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"can't read the configuration of {name!r}: {reason}") from error
    layout = check_layout(model, layout) if layout else find_layout(model)
    blocks = blocks_of(model, layout)
    layer = holding(model, layout)[0]
    module = mlp_out(model, layout, layer)
    weight = as_out_in(module)
    experts = count_and_width(module)[0] if is_experts(module) else 1
    block = sum(p.numel() for p in blocks[layer].parameters())
    if experts > 1:  # of these a token meets few
        met = getattr(config, "num_experts_per_tok", experts)
        block -= sum(p.numel() for p in module.parameters()) * (experts - met) // experts
    kind = dtype or str(config.dtype or "float32").removeprefix("torch.")
    shape = Shape(
        blocks=len(blocks),
        block=block,
        parameters=sum(p.numel() for p in model.parameters()),
        width=weight.shape[0],
        d_in=weight.shape[1],
        d_out=weight.shape[0],
        vocabulary=model.get_output_embeddings().weight.shape[0],
        experts=experts,
        normed=layout.output == "normed",
        bytes=BYTES.get(kind, 4),
    )
    return shape, RowEncoder.of(model, tokenizer), len(blocks)


def _costs(
    shape: Shape,
    recipe: Recipe,
    layers: Sequence[int],
    depth: int,
    rows: dict[str, int],
    n: int,
    speeds: tuple[float, float],
) -> Costs:
    """Of `n` facts with so many `rows`; `speeds` are the model's and float64's."""
    block = 2 * shape.block * OVERHEAD / speeds[0]
    logits = 2 * shape.width * shape.vocabulary / speeds[0]
    token = block * depth + logits
    last = layers[-1]
    begin = step = 0.0
    for layer in layers if shape.normed or recipe.values.at == "each" else (last,):
        upper = depth - 1 - layer
        begin += block * (rows["tokens"] * (layer + 1) + rows["heads"] * upper)
        step += 2 * (block * rows["tails"] * upper + logits * rows["reads"])
    through = layers[0] + 2 * len(layers)
    bare = sum(last + 1 - layer for layer in layers)
    return Costs(
        keys=block * rows["heads"] * (through + bare / rows["contexts"]),
        begin=begin,
        step=step,
        solve=_solving(shape, recipe.batch_size, len(layers), n) / speeds[1],
        queries=block * depth * rows["asked"] + logits * rows["scored"],
        bare=block * depth * rows["own"] + logits * rows["own_scored"],
        answer=ANSWER * (block * depth * DECODING + logits),
        token=token,
        below=block * (last + 1),
        logits=logits,
    )


def _solving(shape: Shape, size: int, layers: int, n: int) -> float:
    """Operations of the solves of `n` facts in batches of `size`."""
    operations = 0.0
    for done in range(size, n + size, size):
        m = min(done, n)
        per_layer = 2 * shape.d_in**2 / shape.experts * m + 2 * m**2 * shape.d_in + m**3 / 3
        operations += layers * (per_layer + 4 * shape.d_out * shape.d_in * m)
    return operations


def _count_rows(facts: Sequence[Fact], encoder: RowEncoder, recipe: Recipe) -> dict[str, int]:
    """Tokens that each stage runs: whole rows, before the subject's end, after it; logits read."""
    settings = recipe.contexts
    prefixes = (
        [len(encoder.encode(t).ids) for t in settings.texts[1:]]
        if settings.texts
        else ([settings.tokens + 2] * settings.count)
    )
    contexts = 1 + len(prefixes)
    counts = dict.fromkeys(("rows", "tokens", "heads", "tails", "reads"), 0)
    counts |= dict.fromkeys(("asked", "scored", "own", "own_scored"), 0)
    counts["contexts"] = contexts
    for fact in facts:
        for prompt in fact.prompts:
            row = encoder.encode_template(prompt, fact.subject, target=fact.target)
            counts["rows"] += contexts
            counts["tokens"] += contexts * len(row.ids) + sum(prefixes)
            counts["heads"] += contexts * (row.subject_last + 1) + sum(prefixes)
            counts["tails"] += contexts * (len(row.ids) - row.subject_last)
            counts["reads"] += contexts * len(row.target_ids)
        counts["rows"] += 1  # the drift row
        counts["tails"] += 1
        counts["reads"] += 1
        for query in queries_of(fact):
            for answer in query.said:
                row = encoder.encode(query.prompt, target=answer)
                counts["asked"] += len(row.ids)
                counts["scored"] += len(row.target_ids)
                if query.kind == "efficacy":
                    counts["own"] += len(row.ids)
                    counts["own_scored"] += len(row.target_ids)
    return counts


def _speed(shape: Shape, device: str, dtype: torch.dtype | None = None) -> float:
    """Operations per second of a product of the model's sizes on this machine, over 0.3 s."""
    kind = dtype or (torch.float32 if shape.bytes == 4 else torch.bfloat16)
    if device == "mps" and kind == torch.float64:
        device = "cpu"
    try:
        a = torch.randn(CPU_POSITIONS, shape.d_out, device=device, dtype=kind)
        b = torch.randn(shape.d_out, shape.d_in // shape.experts, device=device, dtype=kind)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"can't use device {device!r}: {str(error).splitlines()[0]}") from error
    a @ b
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.3:
        (a @ b).sum().item()  # waits for the device
        done += 1
    return 2 * a.shape[0] * b.numel() * done / (time.perf_counter() - start)


def _memory(
    shape: Shape, recipe: Recipe, layers: int, n: int, rows: dict[str, int], device: str
) -> float:
    """Peak bytes: the larger of loading and editing."""
    weights = float(shape.parameters * shape.bytes)
    matrix = shape.d_in * shape.d_out
    positions = recipe.chunk_positions or (
        CPU_POSITIONS if device == "cpu" else ACCELERATOR_POSITIONS
    )
    activations = positions * shape.blocks * (12 * shape.width + 6 * shape.d_in) * 4
    logits = 4 * positions * shape.vocabulary * 4
    held = layers * (2 * 8 * matrix + 4 * matrix + 12 * shape.d_in**2 // shape.experts // 2)
    batch = min(n, recipe.batch_size)
    columns = 8 * layers * n * (shape.d_in + shape.d_out)
    states = 4 * shape.width * rows["heads"] * batch / max(n, 1)
    return RUNTIME + max(2 * weights, weights + held + columns + states + activations + logits)
