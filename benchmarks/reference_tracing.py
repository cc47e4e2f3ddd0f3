"""Causal tracing the slow and plain way: what `nulledit locate` is compared with.

Follows ROME (arXiv:2202.05262, Section 2 and Appendix B) literally: the whole model, from the first
token on, for every restoration, one draw of the noise at a time. Nothing is imported from nulledit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from reference import block, hidden, mlp_out
from torch import Tensor, nn


@torch.no_grad()
def answer_probability(
    model: nn.Module,
    ids: Sequence[int],
    answer: int,
    *,
    subject: slice,
    noise: Tensor | None = None,
    states: Sequence[tuple[int, int, Tensor]] = (),
    mlps: Sequence[tuple[int, int, Tensor]] = (),
) -> float:
    """p(answer) after the prompt `ids`.

    `noise` [subject tokens, d] is added to the subject's embeddings. `states` and `mlps` name
    (layer, token, vector): the output of a block, or of its MLP's output matrix, is replaced there.
    """

    def corrupt(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, subject] += noise
        return output

    def replace(token: int, vector: Tensor) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden(output).view(len(ids), -1)[token] = vector  # OPT's W is given no first axis

        return hook

    with ExitStack() as stack:
        if noise is not None:
            embedding = model.get_input_embeddings()
            stack.callback(embedding.register_forward_hook(corrupt).remove)
        for places, module_of in ((states, block), (mlps, mlp_out)):
            for layer, token, vector in places:
                hook = replace(token, vector)
                stack.callback(module_of(model, layer).register_forward_hook(hook).remove)
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0, -1]
    return float(logits.double().softmax(-1)[answer])


@torch.no_grad()
def clean_run(model: nn.Module, ids: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer, the block's output and its MLP's, each [tokens, d], of the prompt as it is."""
    depth = model.config.num_hidden_layers
    states: list[Tensor] = [torch.empty(0)] * depth
    mlps: list[Tensor] = [torch.empty(0)] * depth

    def keep(place: list[Tensor], layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            place[layer] = hidden(output).view(len(ids), -1).clone()  # Falcon adds to W's in place

        return hook

    with ExitStack() as stack:
        for i in range(depth):
            stack.callback(block(model, i).register_forward_hook(keep(states, i)).remove)
            stack.callback(mlp_out(model, i).register_forward_hook(keep(mlps, i)).remove)
        model(input_ids=torch.tensor([list(ids)]))
    return states, mlps


def trace(
    model: nn.Module,
    ids: Sequence[int],
    answer: int,
    *,
    subject: slice,
    noise: Tensor,
    window: int,
) -> tuple[float, float, dict[str, Tensor]]:
    """p(answer) clean and corrupted, and indirect effects [tokens, layers] of states and MLPs.

    `noise` [draws, subject tokens, d]. Tokens are the subject's and the prompt's last.
    """
    states, mlps = clean_run(model, ids)
    depth, tokens = len(states), [*range(subject.start, subject.stop), len(ids) - 1]
    ask = {"model": model, "ids": ids, "answer": answer, "subject": subject}
    clean = answer_probability(**ask)
    corrupted = torch.tensor([answer_probability(**ask, noise=n) for n in noise]).mean()
    found = {
        kind: torch.zeros(len(tokens), depth, dtype=torch.float64) for kind in ("state", "mlp")
    }
    for row, token in enumerate(tokens):
        for layer in range(depth):
            low, high = max(0, layer - window // 2), min(depth, layer - (-window // 2))
            one = [(layer, token, states[layer][token])]
            several = [(i, token, mlps[i][token]) for i in range(low, high)]
            for n in noise:
                found["state"][row, layer] += answer_probability(**ask, noise=n, states=one)
                found["mlp"][row, layer] += answer_probability(**ask, noise=n, mlps=several)
    return clean, float(corrupted), {k: v / len(noise) - corrupted for k, v in found.items()}
