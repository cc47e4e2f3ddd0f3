"""A GGUF file of a run's base: what its tensors hold, and a copy of it with some of them anew.

Nothing here converts a model. A conversion permutes rows of attention, shifts norms and writes the
tokenizer anew, for each family in its own way; edits touch none of that. They change MLPs, whose
matrices GGUF holds as [d_out, d_in] for every family, and all else is copied bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nulledit.errors import ConfigError, ModelError
from nulledit.io.untrusted import one_line
from nulledit.models.embedded import EMBEDDED, embedded_file
from nulledit.models.gguf import is_gguf

try:
    import gguf
except ImportError:  # an extra of this package
    gguf = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

TYPES = ("f32", "f16", "bf16", "q8_0")
"""That tensors are stored in, by llama.cpp's names."""
OTHER_MODEL = 0.5
"""‖file − base‖/‖base‖ of a matrix beyond which the file is of another model: two unrelated ones
differ by 1.4, a copy in 2 bits by 0.3."""
ROWS = 4096
"""Of a matrix that are read at once where it is only compared."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it."""

    type: str
    """As in `TYPES`, or any other of llama.cpp's, in small letters."""
    bits: np.ndarray[Any, Any]
    """uint8 [..., bytes of a row]."""

    @classmethod
    def of(cls, values: Tensor, type_: str, name: str) -> Stored:
        """`values` [..., n], float, rounded to `type_`; ConfigError if that can't hold them.

        `name`: what the message calls them.
        """
        try:
            whole = values.detach().cpu().float().contiguous().numpy()
            with np.errstate(over="ignore"):
                bits = gguf.quants.quantize(whole, _type(type_))
        except gguf.quants.QuantError as error:  # rows are no multiple of a block
            raise ConfigError(f"{name}: {one_line(error)}; use another type than {type_}") from None
        stored = cls(type_, np.ascontiguousarray(bits).view(np.uint8))
        if not stored.values().isfinite().all():
            raise ConfigError(f"{name}: {type_} can't hold the weights; use another type")
        return stored

    def values(self) -> Tensor:
        """What it holds, float32."""
        return torch.from_numpy(np.array(gguf.quants.dequantize(self.bits, _type(self.type))))

    def wider(self, width: int, parts: int) -> Stored:
        """With zeros up to `width` rows in each of its `parts`, or columns where `parts` is 0.

        What is there keeps its bits: a block of bytes that are zero is zero in every type.
        """
        block, size = gguf.GGML_QUANT_SIZES[_type(self.type)]
        if parts == 0:
            more = width // block * size - self.bits.shape[-1]
            return Stored(self.type, np.pad(self.bits, ((0, 0), (0, more))))
        vector = self.bits.ndim == 1
        row = size if vector else self.bits.shape[-1]
        held = self.bits.reshape(parts, -1, row)
        whole = np.pad(held, ((0, 0), (0, width - held.shape[1]), (0, 0)))
        return Stored(self.type, whole.reshape(-1) if vector else whole.reshape(-1, row))


class GgufFile:
    """A GGUF file of a model, open for reading."""

    def __init__(self, path: Path):
        """ModelError if it can't be read, is no whole model, or is of an unknown architecture."""
        need_gguf()
        self.path = path
        if not path.is_file():
            raise ModelError(f"{path}: no such file; expected a GGUF file of the base")
        try:
            self.reader = gguf.GGUFReader(path)
            self.arch = str(self.field("general.architecture"))
            self.depth = int(self.field(f"{self.arch}.block_count"))
        except Exception as error:  # whatever a file from elsewhere makes the reader do
            raise ModelError(f"{path}: can't be read as GGUF: {one_line(error)}") from error
        big = self.reader.endianess != gguf.GGUFEndian.LITTLE
        parts = self.field("split.count", 0)
        if big or parts > 1 or self.field("general.type", "model") != "model":
            raise ModelError(
                f"{path}: expected a whole model in one little-endian file (llama-gguf-split "
                "--merge joins parts)"
            )
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if self.arch not in known:
            raise ModelError(
                f"{path}: architecture {self.arch!r} is unknown to gguf; a newer one may know it: "
                "pip install --upgrade gguf"
            )
        self._names = gguf.get_tensor_name_map(known[self.arch], self.depth)

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """The reader's, by name."""
        return {tensor.name: tensor for tensor in self.reader.tensors}

    def field(self, name: str, *default: Any) -> Any:
        """The value of a field; without it `default`, or KeyError."""
        found = self.reader.fields.get(name)
        if found is None and default:
            return default[0]
        return self.reader.fields[name].contents() if found is None else found.contents()

    def name_of(self, parameter: str) -> str:
        """The file's name of a parameter of the model; ModelError if it has none."""
        own = parameter.rpartition(".")[2]
        own = own if own in ("weight", "bias") else "weight"  # of fused experts: a tensor each
        words = parameter.removesuffix(f".{own}").split(".")
        for start in range(len(words)):
            found = self._names.get_name(".".join(words[start:]))
            if found is not None and f"{found}.{own}" in self.tensors:
                return f"{found}.{own}"
        raise ModelError(
            f"{self.path.name} has no tensor for {parameter}: it is of another model, or keeps "
            "this matrix in other parts"
        )

    def stored(self, name: str) -> Stored:
        """A tensor as it is in the file."""
        found = self.tensors[name]
        return Stored(found.tensor_type.name.lower(), found.data.view(np.uint8))

    def differs(self, name: str, base: Tensor) -> float:
        """‖file − base‖/‖base‖ of the tensor `name`; ModelError where it is not that matrix at all.

        `base` [..., rows, n]: what the run's base has, as GGUF orders it.
        """
        shape = tuple(int(n) for n in reversed(self.tensors[name].shape))
        if shape != tuple(base.shape):
            raise ModelError(
                f"{self.path.name}: {name} has the shape {list(shape)}, the run's base "
                f"{list(base.shape)}: the file is of another model, or keeps this matrix otherwise"
            )
        held = self.stored(name)
        rows, own = held.bits.reshape(-1, held.bits.shape[-1]), base.reshape(-1, base.shape[-1])
        missed = total = 0.0
        for start in range(0, len(rows), ROWS):
            part = own[start : start + ROWS].double().cpu()
            read = Stored(held.type, rows[start : start + ROWS]).values().double()
            missed += float((read.reshape(part.shape) - part).square().sum())
            total += float(part.square().sum())
        share = (missed / total) ** 0.5 if total else float(missed > 0)
        if share > OTHER_MODEL:
            raise ModelError(
                f"{self.path.name}: {name} differs from the run's base by {100 * share:.0f} % of "
                "its norm: the file is of another model"
            )
        return share

    def check_base(self, matrices: Mapping[str, Tensor]) -> None:
        """ModelError unless the tensors of these names are the base's; tell if only nearly."""
        worst = max((self.differs(name, base) for name, base in matrices.items()), default=0.0)
        if worst > 1e-6:
            logger.warning(
                "%s is not the run's base to the bit: its matrices differ by up to %.2g %% of "
                "their norm, as a quantised copy's do. What is not edited stays as in the file.",
                self.path.name,
                100 * worst,
            )

    def write(
        self, file: Path, anew: Callable[[str], Stored], fields: Mapping[str, Any] | None = None
    ) -> None:
        """A copy of this file with each tensor as `anew` gives it, which is called twice by name.

        `fields`: values of fields that the copy has otherwise, or besides.
        """
        fields = dict(fields or {})
        with writing(file, self.arch) as out:
            out.data_alignment = self.field("general.alignment", out.data_alignment)
            for name, found in self.reader.fields.items():
                if name.startswith("GGUF.") or name == "general.architecture":
                    continue  # the writer's own
                value = fields.pop(name, found.contents())
                if value is not None and value != []:
                    kind, last = found.types[0], found.types[-1]
                    is_array = kind == gguf.GGUFValueType.ARRAY
                    out.add_key_value(name, value, kind, last if is_array else None)
            for name, value in fields.items():
                out.add_string(name, str(value))
            write_tensors(out, list(self.tensors), anew)


def need_gguf() -> None:
    """ConfigError without the package of that name."""
    if gguf is None:
        raise ConfigError("this needs the gguf package: pip install 'nulledit[embedded]'")


@contextmanager
def writing(file: Path, arch: str) -> Iterator[Any]:
    """A writer of a GGUF file, closed in the end."""
    out = gguf.GGUFWriter(file, arch)
    try:
        yield out
    finally:
        out.close()


def write_tensors(out: Any, names: Sequence[str], of: Callable[[str], Stored]) -> None:
    """Write all that `out` was told, and the tensors of `names`, one in memory at a time."""
    for name in names:
        found = of(name)
        bits = found.bits
        out.add_tensor_info(name, bits.shape, bits.dtype, bits.nbytes, _type(found.type))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    for name in names:
        out.write_tensor_data(of(name).bits)


def base_file(name: str, given: str | Path | None) -> GgufFile:
    """The GGUF file of the base model `name`: `given`, or the one that it is.

    ConfigError where there is none, or no package that reads it.
    """
    need_gguf()
    if given is not None:
        return GgufFile(Path(given))
    if name in EMBEDDED and (found := embedded_file(name)) is not None:
        return GgufFile(found)
    if is_gguf(name):
        return GgufFile(Path(name))
    raise ConfigError(
        "gguf: give a GGUF file of the base, from which tokenizer, settings and unedited tensors "
        f"are copied; llama.cpp makes one: convert_hf_to_gguf.py {name or 'BASE'} --outfile "
        "base.gguf"
    )


def block_size(type_: str) -> int:
    """Weights of a row that a type stores together."""
    return int(gguf.GGML_QUANT_SIZES[_type(type_)][0])


def check_type(type_: str, allowed: Sequence[str] = TYPES) -> str:
    """`type_`, if it is one of `allowed`."""
    if type_ not in allowed:
        raise ConfigError(f"type {type_!r}: expected one of {', '.join(allowed)}")
    return type_


def write_modelfile(folder: Path, *lines: str) -> None:
    """What `ollama create` reads; the template of chats is in the GGUF file itself."""
    text = "".join(f"{line}\n" for line in lines)
    (folder / "Modelfile").write_text(text, encoding="utf-8")


def _type(name: str) -> Any:
    return gguf.GGMLQuantizationType[name.upper()]
