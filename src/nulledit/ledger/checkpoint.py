"""The edited model as an ordinary Hugging Face folder, derived from the ledger.

The folder carries the ledger's state id. Only the files that hold edited matrices are rewritten
when the state changes, each under a temporary name that is renamed over the old one; the state id
comes last, so that a folder whose id is not the ledger's is known to need rewriting.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.errors import LedgerError
from nulledit.files import replacing, replacing_folder, write_text

STATE_FILE = "nulledit.json"


def state_of(folder: Path) -> tuple[str, str] | None:
    """The ledger state that the model in `folder` was written for, and its base's hash.

    The state is empty while files are being rewritten. None if the folder is not one of ours.
    """
    try:
        found = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return str(found["state"]), str(found["base"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    state_id: str,
    base_hash: str,
    edited: list[str],
) -> None:
    """Bring `folder` to the weights of `model`; `edited` names the parameters that edits change.

    LedgerError if something else lies there: it is not overwritten.
    """
    found = state_of(folder)
    if found == (state_id, base_hash):
        return
    if folder.exists() and any(folder.iterdir()) and (found is None or found[1] != base_hash):
        raise LedgerError(f"{folder}: holds another model; move it away or choose another folder")
    files = _files_of(folder, edited)
    if files is None:
        with replacing_folder(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            _write_state(partial, state_id, base_hash)
        return
    parameters = dict(model.named_parameters())
    _write_state(folder, "", base_hash)  # an id may come back by undo: none holds in between
    for file, names in files.items():
        _rewrite(file, {name: parameters[name].data for name in names})
    _write_state(folder, state_id, base_hash)


def _files_of(folder: Path, names: list[str]) -> dict[Path, list[str]] | None:
    """Which file holds which of `names`; None if the folder is no model with all of them."""
    if not (folder / "config.json").is_file():
        return None
    files: dict[Path, list[str]] = {}
    missing = set(names)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                held = missing & set(opened.keys())
        except (OSError, SafetensorError):
            return None
        if held:
            files[file] = sorted(held)
            missing -= held
    return None if missing else files


def _rewrite(file: Path, replaced: dict[str, torch.Tensor]) -> None:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    for name, tensor in replaced.items():
        if tensors[name].shape != tensor.shape:
            raise LedgerError(f"{file}: {name} has another shape than the model's")
        tensors[name] = tensor.detach().to(tensors[name].dtype).cpu().contiguous()
    with replacing(file) as partial:
        save_file(tensors, partial, metadata)


def _write_state(folder: Path, state_id: str, base_hash: str) -> None:
    write_text(folder / STATE_FILE, json.dumps({"state": state_id, "base": base_hash}) + "\n")
