"""AlphaEdit the slow and plain way: what the library's fast path is compared with.

Follows MEMIT (arXiv:2210.07229) and AlphaEdit (arXiv:2410.02355) literally: one fact at a time, the
whole model for every reading, logits at every position, one dense d_in x d_in solve per layer.
Nothing is imported from nulledit. A fact is any object with `.subject`, `.prompt` (a template with
one "{}") and `.target`. A context is a template with one "{}" too; contexts[0] is the bare "{}".

On the model's side tensors are rows [..., d]; in the algebra keys and residuals are columns [d, n].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LLAMA = ("model.layers", "mlp.down_proj", "plain")
EXPERTS = ("model.layers", "mlp.experts", "plain")
FAMILIES = {  # model_type: list of blocks, MLP output matrix in a block, how it enters the stream
    "llama": LLAMA,
    "gpt2": ("transformer.h", "mlp.c_proj", "plain"),
    "gptj": ("transformer.h", "mlp.fc_out", "plain"),
    "cohere": LLAMA,
    "falcon": ("transformer.h", "mlp.dense_4h_to_h", "plain"),
    "gpt_neo": ("transformer.h", "mlp.c_proj", "plain"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h", "plain"),
    "mistral": LLAMA,
    "mixtral": EXPERTS,
    "opt": ("model.decoder.layers", "fc2", "plain"),
    "phi3": LLAMA,
    "qwen2": LLAMA,
    "qwen2_moe": EXPERTS,
    "qwen3": LLAMA,
    "qwen3_moe": EXPERTS,
    "stablelm": LLAMA,
    "granite": ("model.layers", "mlp.down_proj", "scaled"),
    "gemma2": ("model.layers", "mlp.down_proj", "normed"),
    "gemma3_text": ("model.layers", "mlp.down_proj", "normed"),
    "olmo2": ("model.layers", "mlp.down_proj", "normed"),
}
Fact = Any  # whatever has .subject, .prompt and .target


class Value(NamedTuple):
    """An optimised value z = initial + delta, and the loss of each step it took."""

    z: Tensor  # [d]
    delta: Tensor  # [d]
    initial: Tensor  # h0 [d]
    losses: list[float]  # one a forward pass; the last one is z's own


class LayerUpdate(NamedTuple):
    """What one batch did to one layer."""

    keys: Tensor  # K [d_in, n]
    residual: Tensor  # R [d_out, n], already divided over the layers left
    update: Tensor  # Δ [d_out, d_in], whatever the module's own orientation


def block(model: nn.Module, layer: int) -> nn.Module:
    """The decoder block number `layer`."""
    return model.get_submodule(FAMILIES[model.config.model_type][0])[layer]


def mlp_out(model: nn.Module, layer: int) -> nn.Module:
    """The module whose weight is edited in `layer`: the MLP's output matrix."""
    return block(model, layer).get_submodule(FAMILIES[model.config.model_type][1])


def value_place(model: nn.Module, layer: int) -> nn.Module:
    """The module whose output a value replaces: the block, or, after which a norm comes, W."""
    normed = FAMILIES[model.config.model_type][2] == "normed"
    return mlp_out(model, layer) if normed else block(model, layer)


def multiplier(model: nn.Module) -> float:
    """What W's output is multiplied by on its way into the stream."""
    scaled = FAMILIES[model.config.model_type][2] == "scaled"
    return model.config.residual_multiplier if scaled else 1.0


def virtual_keys(experts: nn.Module, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """[p_1 k_1; ...; p_E k_E] of each token [tokens, E * d_in], zero where it is not routed.

    With W = [W_1 ... W_E] the experts' joint output is W times that: the key of the whole layer.
    """
    count, _, width = experts.down_proj.shape
    keys = []
    for state, chosen, shares in zip(states, index, weights, strict=True):
        blocks = [torch.zeros(width, dtype=states.dtype) for _ in range(count)]
        for expert, share in zip(chosen.tolist(), shares, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ state).chunk(2)
            blocks[expert] = share * experts.act_fn(gate) * up
        keys.append(torch.cat(blocks))
    return torch.stack(keys)


def diagonal_blocks(moment: Tensor, width: int) -> Tensor:
    """`moment` without what it says of two experts' keys at one token."""
    experts = torch.arange(len(moment), device=moment.device) // width
    return moment * (experts[:, None] == experts)


def add_to_weight(module: nn.Module, update: Tensor) -> None:
    """Add Δ [d_out, d_in], or [d_out, E * d_in], to the module's weight as it is stored."""
    if hasattr(module, "down_proj"):
        for weight, part in zip(
            module.down_proj, update.split(module.down_proj.shape[2], dim=1), strict=True
        ):
            weight += part.to(weight)
        return
    transposed = type(module).__name__ == "Conv1D"  # GPT-2 keeps [d_in, d_out]
    module.weight += (update.mT if transposed else update).to(module.weight)


def hidden(output: Any) -> Tensor:
    """The hidden states of a block's output, which is a tensor or a tuple by version."""
    return output[0] if isinstance(output, tuple | list) else output


def pad(tokenizer: Any, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [n, T] of `texts`, each tokenised on its own, padded right.

    Special tokens are the tokenizer's default. Padding is id 0 under a zero mask: causal attention
    keeps it away from every position before it, so its id is without meaning.
    """
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = [row + [0] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def fill(template: str, subject: str) -> str:
    """`template` with `subject` in it."""
    return template.replace("{}", subject, 1)


def subject_last(tokenizer: Any, template: str, subject: str) -> int:
    """Index of the token that holds the last character of the subject.

    If a character is spread over several tokens, the last of them; if that token holds more than
    the subject ("!" merged with a following ","), that token all the same.
    """
    char = template.index("{}") + len(subject) - 1
    offsets = tokenizer(fill(template, subject), return_offsets_mapping=True)["offset_mapping"]
    return max(i for i, (start, end) in enumerate(offsets) if start <= char < end)


def locate(
    tokenizer: Any, templates: Sequence[str], subject: str, device: torch.device
) -> tuple[Tensor, Tensor, list[int]]:
    """Ids, mask [n, T] and index of the subject's last token of each template, filled."""
    ids, mask = pad(tokenizer, [fill(template, subject) for template in templates], device)
    return ids, mask, [subject_last(tokenizer, template, subject) for template in templates]


class Enough(Exception):
    """Ends a forward pass whose remainder nobody reads."""


def unpadded(mask: Tensor) -> Tensor:
    """Ones: pads are on the right, where no token sees them, and one whose window holds pads alone
    would give NaN in every position of its row."""
    return torch.ones_like(mask)


@torch.no_grad()
def read(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    module: nn.Module,
    *,
    inputs: bool,
    stop: bool = False,
) -> Tensor:
    """What enters (or leaves) `module` at all positions [n, T, d].

    As in the published code the whole model runs, logits and all; with `stop`, which that code has
    for statistics alone, the forward pass ends at the module.
    """
    found = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        given = virtual_keys(module, *args) if hasattr(module, "down_proj") else args[0]
        found.append((given if inputs else hidden(output)).reshape(*ids.shape, -1))
        if stop:
            raise Enough

    handle = module.register_forward_hook(hook)
    try:
        model(input_ids=ids, attention_mask=unpadded(mask), use_cache=False)
    except Enough:
        pass
    finally:
        handle.remove()
    return found[0]


def second_moment(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    layer: int,
    *,
    batch_size: int = 10,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """C = mean of k kᵀ [d_in, d_in] over all positions of `texts`, summed in `dtype`."""
    texts = sorted(texts, key=lambda text: len(tokenizer(text)["input_ids"]))
    module, total, count = mlp_out(model, layer), 0, 0
    for start in range(0, len(texts), batch_size):
        ids, mask = pad(tokenizer, texts[start : start + batch_size], model.device)
        keys = read(model, ids, mask, module, inputs=True, stop=True)  # [n, T, d_in]
        keys = keys[mask.bool()].to(dtype)  # [tokens, d_in]
        total, count = total + keys.mT @ keys, count + len(keys)
    return total / count


def projector(moment: Tensor, threshold: float) -> Tensor:
    """P = U Uᵀ, U the eigenvectors of `moment` whose eigenvalue is below `threshold`; float64.

    A float32 `eigh` turns eigenvectors across the threshold where eigenvalues lie close to it.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    U = vectors[:, values < threshold]
    return U @ U.mT


def of_settings(settings: Any) -> dict[str, float]:
    """A recipe's settings of values by the names that `compute_z` has for them."""
    return {
        "steps": settings.steps,
        "lr": settings.learning_rate,
        "clamp": settings.clamp,
        "kl_weight": settings.kl_weight,
        "decay": settings.weight_decay,
        "stop_loss": settings.stop_loss,
    }


def compute_z(
    model: nn.Module,
    tokenizer: Any,
    fact: Fact,
    *,
    layer: int,
    contexts: Sequence[str],
    steps: int,
    lr: float,
    clamp: float,
    kl_weight: float,
    decay: float,
    stop_loss: float,
    kl_prompt: str = "{} is a",
    wordings: Sequence[str] = (),
    relations: Sequence[str] = (),
    relation_weight: float = 0.0,
    read_at: Callable[[int], Sequence[int]] | None = None,
    held_at: Callable[[int], Sequence[int]] | None = None,
) -> Value:
    """The hidden state after block `layer` at the subject's last token that makes `fact` true.

    With a norm after W, W's output, and δ in units in which that is as long as the hidden state.

    One δ is added there in every prompt; Adam lowers the mean negative log-probability per target
    token over the contexts + kl_weight·KL(new ‖ initial) of the token after the subject in
    `kl_prompt` + decay·‖δ‖/‖h0‖²; ‖δ‖ stays below clamp·‖h0‖. h0 is read in the bare context.

    `wordings`: further prompts of the fact. `relations`: prompts at whose ends a mean KL(new ‖
    initial) of the next token is added, times `relation_weight`. `read_at`: of contexts and
    wordings those that a step's loss is of, by number; `held_at`: of relations; None: all.
    """
    target = tokenizer(" " + fact.target.strip(), add_special_tokens=False)["input_ids"]
    told = tokenizer.decode(target[:-1])  # the prompts contain the target but for its last token
    prompts = [*(fill(context, fact.prompt) for context in contexts), *wordings]
    rewriting = [prompt + told for prompt in prompts]
    templates = [*rewriting, *relations, kl_prompt]
    ids, mask, at = locate(tokenizer, templates, fact.subject, model.device)

    initial = read(model, ids, mask, value_place(model, layer), inputs=False)[0, at[0]]  # h0 [d]
    state = read(model, ids, mask, block(model, layer), inputs=False)[0, at[0]]
    unit = initial.norm() / state.norm()  # 1 where they are the same
    place = torch.zeros(*ids.shape, 1, dtype=initial.dtype, device=model.device)
    place[range(len(at)), at] = 1
    delta = torch.zeros_like(initial, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=lr)

    def add_delta(_: nn.Module, args: Any, output: Any) -> Any:
        changed = hidden(output) + place * delta * unit
        return (changed, *output[1:]) if isinstance(output, tuple | list) else changed

    losses, initial_log_probs, initial_told = [], None, None
    ends = mask.sum(1)[len(rewriting) : -1] - 1  # of the other relations
    handle = value_place(model, layer).register_forward_hook(add_delta)
    try:
        for step in range(steps):
            logits = model(input_ids=ids, attention_mask=unpadded(mask), use_cache=False).logits
            log_probs = logits.log_softmax(-1)  # [prompts, T, vocabulary]
            nll, rows = 0, range(len(rewriting)) if read_at is None else read_at(step)
            for row in rows:
                end = int(mask[row].sum())  # the last len(target) positions predict the target
                predicted = log_probs[row, end - len(target) : end]
                nll = nll - predicted[range(len(target)), target].sum() / len(target)
            new_log_probs = log_probs[-1:, at[-1]]
            initial_log_probs = new_log_probs.detach() if step == 0 else initial_log_probs
            kl = F.kl_div(initial_log_probs, new_log_probs, log_target=True, reduction="batchmean")
            penalty = decay * delta.norm() / state.norm() ** 2
            loss = nll / len(rows) + kl_weight * kl + penalty
            if relations:
                told = log_probs[len(rewriting) + torch.arange(len(ends)), ends]
                initial_told = told.detach() if step == 0 else initial_told
                at_step = list(range(len(told)) if held_at is None else held_at(step))
                held = F.kl_div(
                    initial_told[at_step], told[at_step], log_target=True, reduction="batchmean"
                )
                loss = loss + relation_weight * held

            losses.append(loss.item())
            if losses[-1] < stop_loss or step == steps - 1:
                break
            (delta.grad,) = torch.autograd.grad(loss, delta)
            optimizer.step()
            with torch.no_grad():
                delta.mul_((clamp * state.norm() / delta.norm()).clamp(max=1))
    finally:
        handle.remove()
    delta = delta.detach() * unit
    return Value(initial + delta, delta, initial, losses)


def compute_keys(
    model: nn.Module, tokenizer: Any, facts: Sequence[Fact], layer: int, contexts: Sequence[str]
) -> Tensor:
    """Keys [n, d_in]: half the bare context, half the mean over the others."""
    keys = []
    for fact in facts:
        templates = [fill(context, fact.prompt) for context in contexts]
        ids, mask, at = locate(tokenizer, templates, fact.subject, model.device)
        rows = read(model, ids, mask, mlp_out(model, layer), inputs=True)[range(len(at)), at]
        keys.append(rows[0] if len(rows) == 1 else (rows[0] + rows[1:].mean(0)) / 2)
    return torch.stack(keys)


def current_z(model: nn.Module, tokenizer: Any, facts: Sequence[Fact], layer: int) -> Tensor:
    """What stands now where values of `layer` do [n, d]: subject's last token, bare prompts."""
    states = []
    for fact in facts:
        ids, mask, at = locate(tokenizer, [fact.prompt], fact.subject, model.device)
        states.append(read(model, ids, mask, value_place(model, layer), inputs=False)[0, at[0]])
    return torch.stack(states)


def solve(K: Tensor, R: Tensor, P: Tensor, history: Tensor, l2: float) -> Tensor:
    """Δ [d_out, d_in] with (P (K Kᵀ + history) + l2·I) Δᵀ = P K Rᵀ.

    The minimum of ‖ΔK − R‖² + tr(Δ history Δᵀ) + l2·‖Δ‖² over Δ = ΔP.
    """
    identity = torch.eye(len(P), dtype=P.dtype, device=P.device)
    return torch.linalg.solve(P @ (K @ K.mT + history) + l2 * identity, P @ K @ R.mT).mT


@torch.no_grad()
def alphaedit_batch(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    zs: Tensor | Callable[[int], Tensor],
    *,
    layers: Sequence[int],
    projectors: dict[int, Tensor],
    history: dict[int, Tensor],
    l2: float,
    contexts: Sequence[str],
    dtype: torch.dtype = torch.float32,
) -> dict[int, LayerUpdate]:
    """Write `zs` [n, d] into `layers`, lowest first; the last one is where the zs were optimised.

    With a norm after W each layer has zs of its own, asked for when those below are written.

    Changes the model's weights, and adds this batch's K Kᵀ to `history` (zeros to begin with).
    """
    done = {}
    for i, layer in enumerate(layers):
        K = compute_keys(model, tokenizer, facts, layer, contexts).mT.to(dtype)
        if callable(zs):
            missing = zs(layer) - current_z(model, tokenizer, facts, layer)
        else:
            missing = zs - current_z(model, tokenizer, facts, layers[-1])
        R = (missing / (len(layers) - i) / multiplier(model)).mT.to(dtype)
        update = solve(K, R, projectors[layer].to(dtype), history[layer].to(dtype), l2)
        module = mlp_out(model, layer)
        add_to_weight(module, update)
        done[layer] = LayerUpdate(K, R, update)
    for layer in layers:  # read once more, as published, though no edit changed them since
        K = compute_keys(model, tokenizer, facts, layer, contexts).mT
        history[layer] += (K @ K.mT).to(history[layer])
    return done
