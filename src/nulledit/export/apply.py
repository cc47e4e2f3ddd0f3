"""A delta put on its base, and taken off again; the result is an ordinary Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.config import Layout
from nulledit.editing.engine import EditEngine
from nulledit.errors import CheckFailed, LedgerError, ModelError
from nulledit.export.delta import Delta, Manifest, read_delta, read_manifest
from nulledit.export.factors import ordered_sum
from nulledit.export.updates import refuse_existing, shard_bytes, write_json
from nulledit.io.files import replacing_folder
from nulledit.models.dense import is_quantised
from nulledit.models.layouts import (
    as_out_in,
    check_layout,
    find_layout,
    mlp_out,
    parameter_name,
    write_weight,
)
from nulledit.models.load import load_model, model_hash
from nulledit.models.mlp import MlpForm, find_form, find_forms
from nulledit.models.partial import PartialModel
from nulledit.models.quantized import make_editable
from nulledit.models.saving import save_weights
from nulledit.models.widths import narrowed, one_width

MARK_FILE = "nulledit-delta.json"


@dataclass(frozen=True)
class Applied:
    """What was written."""

    folder: Path
    """An ordinary Hugging Face model."""
    removed: bool
    """Whether the delta was taken off."""
    hash: str
    """Of the model's weights, as the manifest foretold."""
    facts: int
    """How many are in the delta."""
    same_as_run: bool
    """Whether it is the run's model to the bit; with `removed`, False."""


def apply_delta(
    delta: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    max_shard_size: str | int = "50GB",
    trust_remote_code: bool = False,
) -> Applied:
    """Write base + delta to `out`, in the base's dtype.

    The delta is checked by its hashes, the base by its own, and the result against the manifest:
    the sum is taken in a fixed order, so that its bits are those of the exporting machine.
    LedgerError, ModelError and CheckFailed say what does not fit; nothing is written then.
    """
    out = Path(out)
    most = shard_bytes(max_shard_size)
    refuse_existing(out)
    found = read_delta(delta)
    manifest = found.manifest
    model, tokenizer = _load(base, manifest, trust_remote_code)
    _check_base(model, manifest, base)
    blocks = PartialModel(model, manifest.layout)
    forms = find_forms(blocks, range(blocks.depth)) if manifest.neurons else {}
    _put(blocks, found, forms)
    _check_result(model, manifest.result_hash)
    mark = {
        "delta": manifest.sha256,
        "state": manifest.state,
        "base": manifest.base,
        "base_hash": manifest.base_hash,
        "result_hash": manifest.result_hash,
    }
    with one_width(model, list(forms.values())) if forms else nullcontext():
        _write(model, tokenizer, out, mark, most)
    same = manifest.result_hash == manifest.run_hash
    return Applied(out, False, manifest.result_hash, len(manifest.facts), same)


def remove_delta(
    delta: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    run: str | Path | None = None,
    max_shard_size: str | int = "50GB",
    trust_remote_code: bool = False,
) -> Applied:
    """Write `model`, a base with this delta on it, without it to `out`: the base, bit for bit.

    Subtracting would leave rounding behind, so W₀ itself is put back: from `base`, whose hash must
    match, or from the ledger of `run`. Only the delta's manifest is read. Refused without either,
    where `model` is not base + delta, and where the result is not the base. Neurons of gated edits
    leave W₀ in `model` as it was and are cut off: neither `base` nor `run` is read.
    """
    out = Path(out)
    most = shard_bytes(max_shard_size)
    refuse_existing(out)
    manifest = read_manifest(Path(delta))
    if not manifest.neurons and (base is None) == (run is None):
        raise LedgerError(
            "taking a delta off needs W₀: give either the base or the run whose ledger holds it"
        )
    held, tokenizer = _load(model, manifest, trust_remote_code, grown=True)
    blocks = PartialModel(held, manifest.layout)
    if manifest.neurons:  # padding goes first
        narrowed(blocks, manifest.neurons[0].width, {e.layer: e.n for e in manifest.neurons})
    if model_hash(held) not in (manifest.result_hash, manifest.run_hash):
        raise ModelError(
            f"{model}: is not the base with this delta on it (expected weights "
            f"{manifest.result_hash[:12]}); only such a model can be taken back"
        )
    if manifest.neurons:
        narrowed(blocks, manifest.neurons[0].width)
    else:
        for layer, weight in _originals(manifest, base, run, trust_remote_code).items():
            write_weight(blocks.mlp_out(layer), weight)
    _check_result(held, manifest.base_hash)
    _write(held, tokenizer, out, None, most)
    return Applied(out, True, manifest.base_hash, len(manifest.facts), False)


def _layout(model: PreTrainedModel, manifest: Manifest) -> Layout:
    """Where the delta's matrices are in `model`."""
    named = manifest.layout
    return check_layout(model, named) if named else find_layout(model)


def check_fits(
    model: PreTrainedModel, manifest: Manifest, name: object, *, grown: bool = False
) -> None:
    """ModelError unless `model` has the matrices that the delta names, in its shapes.

    `grown`: with neurons of a delta on it, or others.
    """
    layout = _layout(model, manifest)
    for block in manifest.neurons:
        form = find_form(PartialModel(model, manifest.layout), block.layer)
        parameter = parameter_name(model, layout, block.layer)
        its = (parameter, form.d, form.units.biased, form.units.gated)
        fits = form.width >= block.width if grown else form.width == block.width
        if its != (block.parameter, block.d, block.biased, block.gated) or not fits:
            raise ModelError(
                f"{name}: has an MLP of {form.width} units on {form.d} where the delta has neurons "
                f"for {block.parameter} with {block.width} on {block.d}: it is of another model"
            )
    for entry in manifest.layers:
        found = parameter_name(model, layout, entry.layer)
        shape = tuple(as_out_in(mlp_out(model, layout, entry.layer)).shape)
        if found != entry.parameter or shape != entry.shape:
            raise ModelError(
                f"{name}: has {found} {list(shape)} where the delta has {entry.parameter} "
                f"{list(entry.shape)}: it is of another model"
            )


def _put(blocks: PartialModel, found: Delta, forms: Mapping[int, MlpForm]) -> None:
    """Write what `found` holds into its base."""
    for layer, (left, right) in found.factors.items():
        module = blocks.mlp_out(layer)
        write_weight(module, ordered_sum(as_out_in(module), left, right))
    for layer, neurons in found.neurons.items():
        forms[layer].put(neurons)


def _load(
    name: str | Path, manifest: Manifest, trust_remote_code: bool, *, grown: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options = {"dtype": manifest.base_dtype, "trust_remote_code": trust_remote_code}
    model, tokenizer = load_model(str(name), **options)  # type: ignore[arg-type]
    layout = _layout(model, manifest)
    if any(is_quantised(mlp_out(model, layout, entry.layer)) for entry in manifest.layers):
        raise ModelError(
            f"{name}: is quantised, so no model folder can be written with the delta; put it on in "
            "memory (nulledit.export.put_delta), or load an adapter made by export --as lora"
        )
    check_fits(model, manifest, name, grown=grown)
    return model, tokenizer


def _originals(
    manifest: Manifest, base: str | Path | None, run: str | Path | None, trust_remote_code: bool
) -> dict[int, Tensor]:
    """W₀ by layer."""
    if base is not None:
        return _from_base(base, manifest, trust_remote_code)
    assert run is not None
    return _from_run(run, manifest, trust_remote_code)


def _from_base(base: str | Path, manifest: Manifest, trust_remote_code: bool) -> dict[int, Tensor]:
    model, _ = _load(base, manifest, trust_remote_code)
    _check_base(model, manifest, base)
    layout = _layout(model, manifest)
    return {e.layer: as_out_in(mlp_out(model, layout, e.layer)) for e in manifest.layers}


def _from_run(run: str | Path, manifest: Manifest, trust_remote_code: bool) -> dict[int, Tensor]:
    editor = EditEngine.load(run, trust_remote_code=trust_remote_code)
    found = editor.history.base.hash
    if found != manifest.base_hash:
        raise LedgerError(
            f"{run}: its base has hash {found[:12]}, the delta's {manifest.base_hash[:12]}: it is "
            "the run of another base"
        )
    missing = [e.layer for e in manifest.layers if e.layer not in editor.weights.layers]
    if missing:
        raise LedgerError(f"{run}: its ledger holds no W₀ of layers {missing}; give the base")
    return {e.layer: editor.weights.base(e.layer) for e in manifest.layers}


def _check_base(model: PreTrainedModel, manifest: Manifest, name: object) -> None:
    found, expected = model_hash(model), manifest.base_hash
    if found == expected:
        return
    if found in (manifest.result_hash, manifest.run_hash):
        raise ModelError(f"{name}: has this delta on it already; give the base without it")
    raise ModelError(
        f"{name}: is not the base of this delta: its weights have hash {found[:12]}, expected "
        f"{expected[:12]}"
    )


def _check_result(model: PreTrainedModel, expected: str) -> None:
    found = model_hash(model)
    if found != expected:
        raise CheckFailed(
            f"the result has hash {found[:12]}, the delta's manifest says {expected[:12]}; nothing "
            "was written: delta and manifest do not belong together"
        )


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    mark: dict[str, Any] | None,
    max_shard_size: int,
) -> None:
    with replacing_folder(out) as partial:
        save_weights(model, partial, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(partial)
        if mark:
            write_json(partial / MARK_FILE, mark)


def put_delta(model: PreTrainedModel, delta: str | Path) -> None:
    """Put a delta on its base in memory; `model` is changed. For quantised bases, too.

    Of those the matrices in question become dense first, as when they were edited. Neurons make an
    MLP wider than the model's configuration says: `apply_delta` writes such a model. LedgerError
    and ModelError say what does not fit; the model is as before then.
    """
    found = read_delta(delta)
    manifest = found.manifest
    digest = model_hash(model)
    if digest != manifest.base_hash:
        raise ModelError(
            f"the model is not the base of {delta}: its weights have hash {digest[:12]}, expected "
            f"{manifest.base_hash[:12]}"
        )
    layout = _layout(model, manifest)
    make_editable(model, layout, [entry.layer for entry in manifest.layers], digest)
    check_fits(model, manifest, "the model")
    blocks = PartialModel(model, manifest.layout)
    _put(blocks, found, {e.layer: find_form(blocks, e.layer) for e in manifest.neurons})
