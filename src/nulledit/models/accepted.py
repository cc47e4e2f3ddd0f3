"""What an editor takes as its model, and what it says of everything else."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.errors import ModelError

WRAPPERS = ("module", "_orig_mod")  # DataParallel and its kin; torch.compile
MERGE = (
    "merge it first by peft's merge_and_unload (if it came by model.add_adapter: save it and load "
    "it by PeftModel.from_pretrained(BASE, FOLDER)), or edit the base without it"
)


def check_model(model: object) -> None:
    """ModelError unless `model` is one of transformers' own, as it is, without an adapter in it."""
    name = type(model).__name__
    if isinstance(model, str):
        raise ModelError(
            f"model is the text {model!r}; expected a model in memory: for a name or a folder call "
            "Editor.from_pretrained"
        )
    if isinstance(model, nn.Module):
        refuse_adapters(model)
    if not isinstance(model, PreTrainedModel):
        wrapped = (w for w in WRAPPERS if isinstance(getattr(model, w, None), PreTrainedModel))
        inner = next(wrapped, "")
        unwrap = f": give the model inside it, as model.{inner}" if inner else ""
        raise ModelError(f"model is a {name}; expected a PreTrainedModel of transformers{unwrap}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} has an encoder (its config says so); expected a decoder-only language model"
        )
    if not model.can_generate():
        raise ModelError(
            f"{name} has no head that says tokens; load the model by AutoModelForCausalLM or by "
            "nulledit's load_model"
        )


def check_tokenizer(tokenizer: object) -> None:
    """ModelError unless `tokenizer` is one of transformers' own."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    inner = isinstance(getattr(tokenizer, "tokenizer", None), PreTrainedTokenizerBase)
    hint = ": give its tokenizer, as processor.tokenizer" if inner else ""
    raise ModelError(
        f"tokenizer is a {type(tokenizer).__name__}; expected a tokenizer of transformers{hint}"
    )


def refuse_adapters(model: nn.Module) -> None:
    """ModelError if peft has put an adapter into `model`.

    Its matrices act through the adapter, and `save_pretrained` writes that instead of the model.
    """
    for path, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "peft":
            where = path or type(module).__name__
            raise ModelError(f"the model has an adapter in it (at {where}): {MERGE}")
