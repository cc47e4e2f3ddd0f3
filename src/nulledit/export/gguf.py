"""The edited model as a GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nulledit._version import __version__
from nulledit.editing.call_log import Progress
from nulledit.editing.engine import EditEngine
from nulledit.errors import LedgerError, ModelError
from nulledit.export.card import write_card
from nulledit.export.gguf_file import (
    GgufFile,
    Stored,
    base_file,
    block_size,
    check_type,
    write_modelfile,
)
from nulledit.export.same_shape import Places
from nulledit.export.updates import (
    MEASURED_ABOVE,
    Export,
    LayerExport,
    facts_cost,
    refuse_existing,
    with_weights,
    write_origin,
)
from nulledit.export.write import check_method
from nulledit.io.files import replacing_folder
from nulledit.models.experts import count_and_width, is_experts
from nulledit.models.layouts import as_out_in
from nulledit.models.quantized import refuse_dense
from nulledit.models.widths import MULTIPLE

MODEL_FILE = "model.gguf"


def write_gguf(
    editor: EditEngine,
    folder: str | Path,
    *,
    tensor_type: str = "f16",
    gguf: str | Path | None = None,
    same_shape: bool = False,
    text: str | Path | None = None,
    run: str = "RUN",
    summary: Any = None,
    given: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write the run's model to `folder` as `model.gguf`, with a card and Ollama's Modelfile.

    It is a copy of `gguf`, a GGUF file of the base (None: the one that the run was begun from), in
    which the edited matrices are those of the run's model in `tensor_type`, one of `TYPES`; all
    other tensors keep their bits, whatever their type. Gated edits make MLPs wider, those of other
    blocks by zeros; `same_shape` and `text` are as in `write_checkpoint`. If `tensor_type` does not
    hold the matrices to float32's rounding, the edited facts are asked again.

    LedgerError if nothing is edited or `folder` is taken, ConfigError without a file of the base or
    if `tensor_type` can't hold the weights, ModelError if the file is of another model.
    """
    folder = Path(folder)
    check_type(tensor_type)
    options = {"same_shape": same_shape, "text": text}
    check_method("gguf", options, gated=editor.weights.grown)
    refuse_existing(folder)
    refuse_dense(editor.model, "exported as GGUF")
    editor.weights.check_unchanged()
    source = base_file(editor.history.base.model, gguf)
    places = Places(editor, text, progress) if same_shape else None
    matrices = list(_matrices(editor, source, all_blocks=places is None))
    with editor.base_weights():
        base = {m.name: m.values().double().cpu() for m in matrices if m.edited}
        source.check_base(base)
    width = _width(source, matrices, tensor_type) if editor.weights.grown and not places else None
    with places.taken() if places else nullcontext():
        layers, made = _made(matrices, base, tensor_type, width)
    if not layers:
        raise LedgerError("nothing is edited in this run: there is nothing to export")
    cost = None
    if places or any(layer.rounding_share > MEASURED_ABOVE for layer in layers):
        cost = facts_cost(editor, _held(places, matrices, made), progress)
    price = places.price() if places else None
    written = Export("gguf", folder, layers, tensor_type, 0, cost=cost, same_shape=price)
    with replacing_folder(folder) as partial:
        _write(source, partial / MODEL_FILE, matrices, made, width, editor)
        write_modelfile(partial, f"FROM ./{MODEL_FILE}")
        write_origin(editor, partial, "gguf", given)
        write_card(partial, editor, written, run=run, summary=summary)
        size = sum(file.stat().st_size for file in partial.iterdir())
    return replace(written, bytes=size)


@dataclass(frozen=True)
class _Matrix:
    """A parameter of the model that the file may not have as the base has it."""

    layer: int
    """Block number."""
    module: nn.Module
    """What holds it."""
    bias: bool
    """Whether it is the module's bias, and not its weight."""
    parameter: str
    """Its name in the state dict."""
    name: str
    """Its name in the file."""
    parts: int
    """Parts of its rows that a wider MLP makes longer; 0: it is columns that it adds."""
    edited: bool
    """Whether it is one of an edited block."""

    def values(self) -> Tensor:
        """As the model holds it now, in GGUF's order: [d_out, d_in], of experts [e, d_out, d_in],
        or [d_out]."""
        if self.bias:
            assert isinstance(self.module.bias, nn.Parameter)
            return self.module.bias.data
        weight = as_out_in(self.module)
        if is_experts(self.module):
            return weight.unflatten(1, count_and_width(self.module)).permute(1, 0, 2)
        return weight

    def out_in(self, values: Tensor) -> Tensor:
        """What `values` would be as the module's weight [d_out, d_in]."""
        return values.permute(1, 0, 2).flatten(1) if values.ndim == 3 else values

    def own_width(self, values: Tensor) -> int:
        """Units that `values` are of."""
        return values.shape[-1] if self.parts == 0 else len(values) // self.parts

    def sized(self, values: Tensor, width: int) -> Tensor:
        """`values` for `width` units: zeros added, or cut off."""
        more = width - self.own_width(values)
        if self.parts == 0:
            return torch.nn.functional.pad(values, (0, more))
        held = values.unflatten(0, (self.parts, -1))
        return torch.nn.functional.pad(held, [0, 0] * (held.ndim - 2) + [0, more]).flatten(0, 1)


def _matrices(editor: EditEngine, source: GgufFile, *, all_blocks: bool) -> Iterator[_Matrix]:
    """Those of edited blocks; where edits make them wider, of `all_blocks`."""
    model, edited = editor.editable, set(editor.weights.layers)
    if not editor.weights.grown:
        for layer in sorted(edited):
            name = model.parameter_name(layer)
            yield _Matrix(layer, model.matrix(layer), False, name, source.name_of(name), 0, True)
        return
    names = {id(module): name for name, module in editor.model.named_modules()}
    for layer in range(model.depth) if all_blocks else sorted(edited):
        try:
            form = model.form(layer)
        except ModelError as error:
            raise ModelError(
                f"block {layer} can't be made wider, and GGUF has one width for all: use "
                f"same_shape ({error})"
            ) from error
        makers = [rows for rows in (form.driven, form.factor) if rows is not None]
        modules = {id(rows.module): (rows.module, rows.parts) for rows in makers}
        for module, parts in [*modules.values(), (form.out, 0)]:
            for own in ("weight", "bias")[: 2 if parts and _biased(module) else 1]:
                name = f"{names[id(module)]}.{own}"
                found = source.name_of(name)
                yield _Matrix(layer, module, own == "bias", name, found, parts, layer in edited)


def _biased(module: nn.Module) -> bool:
    return isinstance(getattr(module, "bias", None), nn.Parameter)


def _width(source: GgufFile, matrices: Sequence[_Matrix], tensor_type: str) -> int:
    """One width for all blocks that takes the widest, in whole blocks of every type."""
    held = source.field(f"{source.arch}.feed_forward_length", None)
    widths = set(held if isinstance(held, list) else [held])  # some families say it by block
    own = {m.own_width(m.values()) for m in matrices if not m.edited}
    if len(widths) > 1 or own - widths:
        raise ModelError(
            f"{source.path.name} says that MLPs have {held} units, the model has {sorted(own)}: "
            "use same_shape, which leaves that as it is"
        )
    types = {tensor_type, *(source.stored(m.name).type for m in matrices if m.parts == 0)}
    multiple = math.lcm(MULTIPLE, *map(block_size, types))
    widest = max(m.own_width(m.values()) for m in matrices)
    return -(-widest // multiple) * multiple


def _made(
    matrices: Sequence[_Matrix], base: Mapping[str, Tensor], tensor_type: str, width: int | None
) -> tuple[tuple[LayerExport, ...], dict[str, Stored]]:
    """Edited matrices that differ from the `base`'s, as stored, and the numbers of each."""
    layers: list[LayerExport] = []
    made: dict[str, Stored] = {}
    for matrix in (m for m in matrices if m.edited):
        now, before = matrix.values().double().cpu(), base[matrix.name]
        if width is not None:
            now, before = matrix.sized(now, width), matrix.sized(before, width)
        change = float((now - before).norm())
        if not change and width is None:
            continue
        # llama.cpp adds biases in f32 alone.
        stored = Stored.of(now, "f32" if matrix.bias else tensor_type, matrix.parameter)
        made[matrix.name] = stored
        if change and not matrix.bias:
            shape = matrix.out_in(now).shape
            rounding = float((stored.values().double() - now).norm())
            layers.append(
                LayerExport(
                    layer=matrix.layer,
                    parameter=matrix.parameter,
                    shape=(shape[0], shape[1]),
                    rank=0,
                    of=0,
                    error=0.0,
                    key_error=0.0,
                    update_share=change / float(before.norm()),
                    rounding_share=rounding / change,
                    bytes=stored.bits.nbytes,
                )
            )
    return tuple(layers), made


@contextmanager
def _held(
    places: Places | None, matrices: Sequence[_Matrix], made: Mapping[str, Stored]
) -> Iterator[None]:
    """The model with the matrices that were `made` inside."""
    with places.taken() if places else nullcontext():
        weights = []
        for matrix in (m for m in matrices if m.name in made and not m.bias):
            values = made[matrix.name].values()
            own = matrix.sized(values, matrix.own_width(matrix.values()))
            weights.append((matrix.module, matrix.out_in(own)))
        with with_weights(weights):
            yield


def _write(
    source: GgufFile,
    file: Path,
    matrices: Sequence[_Matrix],
    made: Mapping[str, Stored],
    width: int | None,
    editor: EditEngine,
) -> None:
    """The copy of `source`; in blocks that no edit is in, MLPs are as wide, by zeros."""
    parts = {m.name: m.parts for m in matrices}

    def anew(name: str) -> Stored:
        if name in made:
            return made[name]
        stored = source.stored(name)
        return stored if width is None or name not in parts else stored.wider(width, parts[name])

    fields: dict[str, Any] = {
        "nulledit.version": __version__,
        "nulledit.state": editor.history.state_id,
        "nulledit.base_hash": editor.history.base.hash,
    }
    if width is not None:
        name = f"{source.arch}.feed_forward_length"
        by_block = source.field(name, None)
        fields[name] = [width] * len(by_block) if isinstance(by_block, list) else width
    source.write(file, anew, fields)
