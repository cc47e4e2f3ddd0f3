"""What one run of a model shows: how W's output enters the stream, and an unknown family's layout.

Nothing here knows a family's name. A model is run on a few tokens; what its modules were given and
gave back decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nulledit.config import Layout
from nulledit.errors import ModelError
from nulledit.models.experts import count_and_width, gives_w_times_key, is_experts
from nulledit.models.hooks import states_of
from nulledit.models.placement import brought_in, input_device

SIZES = (1024.0, -512.0)
"""Of what is added to W's output: far above its own, so that a two-byte dtype's rounding of the
stream does not hide it, and within float16; two, since after a norm the change is not twice."""
MISSED = 0.01  # share of a change that its explanation may miss, beside the rounding
HOW_TO = 'if it is there, name it in the recipe: "layout: {blocks: ..., mlp_out: ...}"'

Output = Literal["plain", "scaled", "normed"]


@dataclass(frozen=True)
class Entry:
    """How one block's W enters the residual stream, as seen."""

    output: Output | None
    """As in `Layout`; None where none of them explains what was seen."""
    scale: float = 1.0
    """The block's output changes by this times a change of W's."""
    norm: nn.Module | None = None
    """The norm between W and the block's output; it may be given more than what W writes."""
    share: float = 1.0
    """What the norm gives is multiplied by this on its way into the block's output."""
    as_tuple: bool = False
    """Whether the block returns a tuple (older families) or a tensor."""
    linear: bool = True
    """Whether W's output is W times the key; looked at where keys are computed, of experts."""


@dataclass
class _Seen:
    """What was seen of one block, [3, d]: nothing moved, and both sizes."""

    rows: list[int]
    written: Tensor | None = None  # W's output, as moved
    given: list[tuple[nn.Module, Tensor]] = field(default_factory=list)  # moved likewise, to whom
    out: Tensor | None = None
    as_tuple: bool = False
    linear: bool = True


@torch.no_grad()
def entries(
    model: PreTrainedModel, body: nn.Module, blocks: Sequence[nn.Module], mlp_out: str
) -> list[Entry]:
    """How W (`mlp_out` inside a block) of each of `blocks`, which `body` runs, enters the stream.

    One run of one token in 1 + 2 len(blocks) rows. In two rows of its own each block's W is moved
    far away, by two sizes; what the block gives there, against row 0, is what the stream takes.
    """
    seen = [_Seen([0, 2 * i + 1, 2 * i + 2]) for i in range(len(blocks))]
    rows = 1 + 2 * len(blocks)
    with _watched(model) as handles:
        for i, block in enumerate(blocks):
            handles.append(block.register_forward_hook(_leaving(seen[i], rows)))
            for module in block.modules():
                if module is not block and not isinstance(module, nn.Dropout | nn.Identity):
                    handles.append(module.register_forward_pre_hook(_receiving(seen[i])))
            try:
                module = block.get_submodule(mlp_out)
                hook = _pushing(seen[i])
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
            except AttributeError:
                continue  # a block of another kind
        try:
            body(input_ids=_ids(model, [[_token(model)]] * rows), use_cache=False)
        except TypeError as error:
            raise ModelError(
                f"model type {model.config.model_type!r}: {type(body).__name__}, which runs the "
                "blocks, takes no input ids; expected a decoder-only language model, whose blocks "
                "lie beside its embedding"
            ) from error
    return [_entry(s) for s in seen]


def body_of(model: PreTrainedModel, blocks: str) -> nn.Module:
    """The innermost module around the blocks at `blocks` that takes ids, else the one right there.

    Some families have one that runs the blocks inside the one that embeds the ids.
    """
    path = beside = blocks.rpartition(".")[0]
    while path:
        if "input_ids" in signature(model.get_submodule(path).forward).parameters:
            return model.get_submodule(path)
        path = path.rpartition(".")[0]
    return model.get_submodule(beside)


def _leaving(seen: _Seen, rows: int) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.as_tuple = isinstance(output, tuple | list)
        out = states_of(output)
        if isinstance(out, Tensor) and out.shape[:2] == (rows, 1):
            seen.out = out.reshape(rows, -1)[seen.rows]

    return hook


def _pushing(seen: _Seen) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        if is_experts(module):
            with brought_in(module):
                seen.linear = gives_w_times_key(module, args, kwargs, output)
        flat = output.reshape(-1, output.shape[-1]).clone()
        if len(flat) <= seen.rows[-1]:
            return output  # an expert, which sees some tokens only
        generator = torch.Generator().manual_seed(0)
        push = torch.randn(flat.shape[1], generator=generator, dtype=torch.float64)
        for row, size in zip(seen.rows[1:], SIZES, strict=True):
            flat[row] += size * push.to(flat)
        seen.written = flat[seen.rows]  # a copy: some models add to W's output in place
        return flat.view(output.shape)

    return hook


def _receiving(seen: _Seen) -> Any:
    """Notes a module that is given what W wrote, or the sum of that and of something else."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if seen.written is None or not args:
            return
        given = args[0]
        if isinstance(given, Tensor) and given.shape[-1:] == seen.written.shape[-1:]:
            rows = given.reshape(-1, given.shape[-1])
            if len(rows) > seen.rows[-1]:
                held = rows[seen.rows].clone()
                moved, wanted = (t[1:].double() - t[:1].double() for t in (held, seen.written))
                allowed = MISSED + 4 * torch.finfo(given.dtype).eps
                if float((moved - wanted.to(moved)).norm()) <= allowed * float(wanted.norm()):
                    seen.given.append((module, held))

    return hook


def _token(model: PreTrainedModel) -> int:
    """A token that is no padding, which some families embed as nought."""
    return 2 if getattr(model.config.get_text_config(), "pad_token_id", None) == 1 else 1


def _entry(seen: _Seen) -> Entry:
    """The simplest explanation of what the block gave where W's output was moved."""
    found = Entry(None, as_tuple=seen.as_tuple, linear=seen.linear)
    if seen.out is None or seen.written is None or seen.out.shape != seen.written.shape:
        return found
    out, written = seen.out, seen.written.to(seen.out.device)
    change, moved = (t[1:].double() - t[:1].double() for t in (out, written))
    rounding = 4 * torch.finfo(out.dtype).eps * out.double().norm(dim=1)[1:]

    def explains(expected: Tensor) -> bool:
        size = expected.norm(dim=1)
        missed = (change - expected).norm(dim=1)
        return bool((missed < MISSED * size + rounding.minimum(size / 4)).all())

    if explains(moved):
        return replace(found, output="plain")
    scale = float((change * moved).sum() / moved.square().sum())
    if explains(scale * moved):
        return replace(found, output="scaled", scale=scale)
    for module, given in seen.given:
        try:
            normed = module(given)
        except (TypeError, IndexError, RuntimeError, ValueError):
            continue  # it takes more than states, or states of whole rows
        if isinstance(normed, Tensor) and normed.shape == out.shape:
            normed = normed.to(out.device).double()
            moved = normed[1:] - normed[:1]
            share = float((change * moved).sum() / moved.square().sum())
            share = 1.0 if explains(moved) else share
            if explains(share * moved):
                return replace(found, output="normed", norm=module, share=share)
    return found


@dataclass
class _Call:
    """One call of a module."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(repr=False)
    output: Any

    @property
    def states(self) -> Tensor | None:
        """What it was given first."""
        first = self.args[0] if self.args else self.kwargs.get("hidden_states")
        return first if isinstance(first, Tensor) else None


@torch.no_grad()
def probe(model: PreTrainedModel) -> Layout:
    """The layout of a model of an unknown family, traced in one run.

    The blocks are the longest list of modules that run once, in turn, from hidden states to hidden
    states of one shape. W is the last matrix that maps a wider width to the hidden one in a part
    of a block that works on each token alone, which attention does not. Where blocks differ, dense
    ones below ones with experts for one, W is what most of them have, and of the others the layout
    does not hold. ModelError with what was found where there is none, or where `entries` can't
    explain how its output enters the stream.
    """
    kind = f"model type {model.config.model_type!r} is not known"
    if model.config.is_encoder_decoder:
        raise ModelError(f"{kind} and has an encoder; expected a decoder-only language model")
    if input_device(model).type == "meta":
        raise ModelError(f"{kind}, and can't be traced without its weights; {HOW_TO}")
    calls: list[_Call] = []
    last = min(2, model.config.get_text_config().vocab_size - 1)
    with _watched(model) as handles:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(_listing(calls, name), with_kwargs=True))
        ids = _ids(model, [[0, 1], [0, last]])
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except Exception as error:  # anything can go wrong in code that nobody has seen
            said = " ".join(str(error).split())[:200]
            raise ModelError(f"{kind}, and can't be run on two tokens: {said}") from error
        blocks, runs = _blocks(kind, model, calls)
        _check_causal(kind, _tensor(runs[-1].output)[:, 0])
        mlp_out = _usual_writer(kind, runs, calls)
    body = body_of(model, blocks)
    found = entries(model, body, [run.module for run in runs], mlp_out)
    outputs = [entry.output for entry in found if entry.output]
    if not outputs:
        raise ModelError(
            f"{kind}: tracing found {mlp_out} in {blocks}, but what it writes enters the residual "
            "stream neither plain, nor scaled, nor normed (another part of the block works on it); "
            "can't edit it"
        )
    usual = max(dict.fromkeys(outputs), key=outputs.count)
    return Layout(blocks, mlp_out, "scaled" if {*outputs} == {"plain", "scaled"} else usual)


def _check_causal(kind: str, ends: Tensor) -> None:
    """ModelError if states [2, d] of one token with different tokens after it differ."""
    rounding = min(0.01, 16 * torch.finfo(ends.dtype).eps)
    if float((ends[0] - ends[1]).norm()) > rounding * float(ends[0].norm()):
        raise ModelError(
            f"{kind} and is no decoder: what it makes of a token depends on the token after it "
            "(encoder-only); expected a decoder-only language model"
        )


def _listing(calls: list[_Call], name: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(name, module, args, kwargs, output))

    return hook


def _blocks(kind: str, model: PreTrainedModel, calls: Sequence[_Call]) -> tuple[str, list[_Call]]:
    """Path of the list of decoder blocks, and the blocks' calls; ModelError without one."""
    best: tuple[str, list[_Call]] = "", []
    other = ""  # what a list was given that would be the best one
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not all(any(m.children()) for m in module):
            continue  # blocks have parts; a list of projections is none of them
        runs = [call for call in calls if any(call.module is member for member in module)]
        shapes = {_shape(call.states) for call in runs} | {_shape(call.output) for call in runs}
        if len(runs) > 1 and [call.module for call in runs] != list(module) and not best[1]:
            more = len(runs) > len(module)
            other = (
                f"; those of {path} run {'several times' if more else 'in part, or not in turn'}"
            )
        if [call.module for call in runs] != list(module) or len(runs) <= len(best[1]):
            continue
        if len(shapes) == 1 and len(next(iter(shapes))) == 3:
            best = path, runs
        elif len(runs) > 1:
            other = f"; those of {path} are given {list(_shape(runs[0].states))}"
    if not best[1]:
        raise ModelError(
            f"{kind}, and tracing found no list of decoder blocks that run once, in turn, from one "
            f"stream of states [rows, tokens, width] to such states{other or '; ' + HOW_TO}"
        )
    return best


def _usual_writer(kind: str, runs: Sequence[_Call], calls: Sequence[_Call]) -> str:
    """Path in a block of the matrix that writes its MLP's output, in most blocks."""
    found: dict[tuple[Any, ...], str | ModelError] = {}  # by what a block is made of
    paths: list[str] = []
    for run in runs:
        parts = tuple((name, type(part)) for name, part in run.module.named_modules())
        if parts not in found:
            try:
                found[parts] = _last_writer(kind, run, calls)
            except ModelError as error:
                found[parts] = error
        path = found[parts]
        if isinstance(path, str):
            paths.append(path)
    if not paths:
        refused = next(iter(found.values()))
        assert isinstance(refused, ModelError)
        raise refused
    return max(dict.fromkeys(reversed(paths)), key=paths.count)  # of as many, the upper blocks'


def _last_writer(kind: str, block: _Call, calls: Sequence[_Call]) -> str:
    """Path in `block` of the matrix that writes its MLP's output."""
    assert block.states is not None
    hidden = block.states.shape[-1]
    start = f"{block.name}."
    inside = [call for call in calls if call.name.startswith(start)]
    writers, experts, alone = [], [], {}
    for call in inside:
        weight = getattr(call.module, "weight", None)
        given, made = _shape(call.states), _shape(call.output)
        if is_experts(call.module) and made[-1:] == (hidden,):
            count, width = count_and_width(call.module)
            experts.append((call.name.removeprefix(start), hidden, count * width))
            continue
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not given or not made:
            continue
        if given[-1] == made[-1]:
            continue
        part = call.name.removeprefix(start).split(".")[0]
        if part not in alone:
            alone[part] = all(_is_tokenwise(c) for c in inside if c.name == start + part)
        if alone[part]:
            writers.append((call.name.removeprefix(start), made[-1], given[-1]))
    writers = experts or writers  # those that are routed to, and not one that all share
    wanted = [name for name, out, given in writers if out == hidden and given > hidden]
    if not wanted:
        listed = [f"{name} [{out} x {given}]" for name, out, given in writers]
        told = ", ".join([*listed[:6], "…"] if len(listed) > 6 else listed) or "none"
        mixing = [part for part, is_alone in alone.items() if not is_alone]
        raise ModelError(
            f"{kind}, and {block.name} has no MLP output matrix [{hidden} x more than {hidden}]; "
            f"the matrices that tracing found in its MLP: {told}; "
            f"{_advice(block.module, mixing if not writers else [])}"
        )
    name = wanted[-1]
    if _is_one_of_many(block.module, name) or wanted.count(name) > 1:
        raise ModelError(
            f"{kind}, and the MLP of {block.name} has several output matrices (experts?), the last "
            f"of them {name}; expected one; {_advice(block.module)}"
        )
    return name


def _advice(block: nn.Module, mixing: Sequence[str] = ()) -> str:
    """What to do about a block without a W that tracing can find.

    `mixing`: parts that look at other tokens, where all its matrices are in such.
    """
    convolutions = nn.Conv1d | nn.Conv2d
    loose = [
        f"{path}.{name}"
        for path, module in block.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 or (p.ndim == 2 and name != "weight")
        if min(p.shape) > 1 and not isinstance(module, convolutions)
    ]
    if loose and not mixing:
        named = ", ".join(loose[:3])
        return f"its experts' matrices ({named}) are of a kind that can't be edited"
    if mixing:
        return f"its matrices are in {', '.join(mixing)}, which looks at other tokens, too: no MLP"
    return HOW_TO


def _is_one_of_many(block: nn.Module, name: str) -> bool:
    """Whether the path leads through a list of modules, as to one of several experts."""
    parts = name.split(".")
    above = (block.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))
    return any(isinstance(module, nn.ModuleList) for module in above)


def _is_tokenwise(call: _Call) -> bool:
    """Whether a part of a block, run again with another first token, gives the same for the next.

    One that is given rows without their places ([tokens, d]) can't mix them.
    """
    states = call.states
    if states is None:
        return False
    if states.ndim < 3:
        return True
    changed = states.clone()
    changed[:, 0] = changed[:, 0].flip(-1) + 1
    args, kwargs = call.args, call.kwargs
    if args:
        args = (changed, *args[1:])
    else:
        kwargs = {**kwargs, "hidden_states": changed}
    before = _tensor(call.module(*call.args, **call.kwargs))
    after = _tensor(call.module(*args, **kwargs))
    return torch.allclose(before[:, 1], after[:, 1], rtol=1e-3, atol=1e-6)


def _tensor(output: Any) -> Tensor:
    found = states_of(output)
    assert isinstance(found, Tensor)
    return found


def _shape(value: Any) -> tuple[int, ...]:
    found = states_of(value) if isinstance(value, Tensor) or value else None
    return tuple(found.shape) if isinstance(found, Tensor) else ()


def _ids(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, device=input_device(model))


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[Any]]:
    """Evaluation mode inside; afterwards as before, with the hooks in the list removed."""
    was_training = model.training
    handles: list[Any] = []
    model.eval()
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
