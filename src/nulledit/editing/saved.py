"""What `Editor.save` left in a folder: the ledger, and the base of its edits, loaded again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.editing.weights import EditedWeights
from nulledit.errors import LedgerError, ModelError
from nulledit.io.files import recover_folder
from nulledit.ledger.model_folder import as_listed, write_model
from nulledit.ledger.records import History
from nulledit.ledger.store import Store
from nulledit.methods import find_method
from nulledit.models.dense import Dense
from nulledit.models.gguf import is_gguf, kept_folder
from nulledit.models.layouts import check_layout, find_layout, mlp_out, write_weight
from nulledit.models.load import QUANTIZE, load_model, model_hash
from nulledit.models.partial import PartialModel
from nulledit.models.quantized import make_editable
from nulledit.models.widths import narrowed


class SavedEdits:
    """A folder's ledger, and where its model is loaded from."""

    def __init__(self, folder: Path):
        """LedgerError if there is no ledger, or nothing to load its base from."""
        self.store, self.model_folder = Store(folder / "ledger"), folder / "model"
        self.history = self.store.load()
        recover_folder(self.model_folder)
        kept = (self.model_folder / "config.json").is_file()
        self.source = str(self.model_folder) if kept else self.history.base.model
        if not self.source:
            raise LedgerError(f"{folder}: has no model, and its base was an object in memory")

    def load_model(self, **placing: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The folder's own model, edited as it is, or the base from where it was first loaded.

        `placing`: as for `models.load.load_model`.
        """
        base = self.history.base
        own = self.source == str(self.model_folder)
        return load_model(
            self.source if own else self._base_source(),
            dtype=base.dtype,
            quantize=base.quantized if base.quantized in QUANTIZE else "",
            revision=None if own else base.revision or None,
            **placing,
        )

    def _base_source(self) -> str:
        """Where the base is: a GGUF file's conversion in the cache, wherever the file is now."""
        base = self.history.base
        if not is_gguf(base.model):
            if Path(base.model).is_absolute() and not Path(base.model).exists():
                raise ModelError(
                    f"{base.model}: there is no such folder, from which the run's base was loaded: "
                    "put it back, or take the run up with the base in memory (Editor.resume)"
                )
            return base.model
        if kept := kept_folder(base.file_sha256):
            return str(kept)
        if not Path(base.model).is_file():
            raise ModelError(
                f"{base.model}: no such file, and the cache has no conversion of it (sha256 "
                f"{base.file_sha256[:12]}): put it back, or load it once from where it is now, by "
                "any command with that path as its model"
            )
        return base.model

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Errors inside say how to go on where the model in the folder is not what was written."""
        try:
            yield
        except (ModelError, LedgerError) as error:
            own, base = self.model_folder, self.history.base.model
            if self.source != str(own) or not base or as_listed(own):
                raise
            raise type(error)(
                f"{error}; move {own} away to have it written anew from the base "
                f"({base}) and the ledger"
            ) from error


def write_edited(weights: EditedWeights, folder: Path) -> None:
    """Write the edited model to `folder`, named by the ledger's state."""
    history = weights.history
    with weights.as_saved() as names:
        write_model(
            weights.model.model,
            weights.model.tokenizer,
            folder,
            state_id=history.state_id,
            base_hash=history.base.hash,
            edited=list(names),
            whole=weights.grown,
        )


def check_base(found: str, history: History, source: str) -> None:
    """LedgerError unless `found`, the hash of a model without its edits, is that of the base."""
    if found != history.base.hash:
        raise LedgerError(
            f"{source}: its weights without the edits have hash {found[:12]}, the ledger's base "
            f"has {history.base.hash[:12]}: this is another model, or one changed by hand"
        )


def put_back(model: PreTrainedModel, history: History, source: str) -> None:
    """Write W₀ of the ledger into `model`: it is the base then, if it is what was edited.

    LedgerError for a quantised base that is another one; `source` names the model.
    """
    layout = history.base.recipe.layout
    layout = find_layout(model) if layout is None else check_layout(model, layout)
    if history.epochs and find_method(history.epoch.recipe.method.name).apart:
        narrowed(PartialModel(model, layout), history.original(history.layers[0]).shape[1])
    packed = model_hash(model) if history.base.quantized else ""
    make_editable(model, layout, history.layers, packed)
    for layer in history.layers:
        module = mlp_out(model, layout, layer)
        if not isinstance(module, Dense):
            write_weight(module, history.original(layer))
        elif not module.begin_from(history.original(layer)):
            raise LedgerError(
                f"{source}: its matrix of layer {layer} is not the ledger's W₀: this is "
                "another model, or one changed by hand"
            )
