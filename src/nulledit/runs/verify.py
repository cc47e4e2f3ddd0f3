"""Whether a run is what its ledger says: every hash, and the weights computed again.

The ledger's commit is the one moment that counts; the model folder is derived from it. What an
interrupted write left behind is therefore no fault: it is finished first, and said so.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nulledit.editing.engine import EditEngine
from nulledit.editing.saved import write_edited
from nulledit.errors import LedgerError, NullEditError
from nulledit.io.files import recover_folder, sha256_of
from nulledit.io.text import count
from nulledit.ledger.model_folder import (
    STATE_FILE,
    FolderState,
    as_saved,
    files_in,
    files_with,
    read_state,
)
from nulledit.ledger.records import History
from nulledit.ledger.store import DIGEST, Store

DATABASE, TENSORS, FILES = "database", "tensor files", "model files"
BASE, MATRICES = "base", "edited matrices"
KINDS = {
    DATABASE: "hash as listed; columns are what the events leave",
    TENSORS: "hash as named",
    FILES: f"hash as listed in {STATE_FILE}",
    BASE: "hash as recorded, with W₀ put back",
    MATRICES: "equal to base and ledger, computed again",
}
# What solving in float64 in another order may change, as a share of the largest weight. Less than
# a unit in the last place of float32, so it counts for float64 models only.
SOLVED_ALIKE = 1e-10
BITS = "bit for bit"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    kind: str
    """One of KINDS."""
    name: str
    """Which, by its path in the run folder or its layer."""
    problem: str = ""
    """What is wrong, in a sentence that names it; empty if nothing is."""
    remark: str = ""
    """What is worth saying although nothing is wrong."""


@dataclass(repr=False)
class Verification:
    """What `verify` found."""

    checks: list[Check] = field(default_factory=list)
    """In the order they were made."""
    finished: list[str] = field(default_factory=list)
    """Interrupted writes that were finished."""
    mentioned: list[str] = field(default_factory=list)
    """Files that the run does not know; no fault."""
    skipped: tuple[str, ...] = ()
    """Kinds that were not looked at, because of what is wrong with the files."""

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong."""
        return [check.problem for check in self.checks if check.problem]

    @property
    def passed(self) -> bool:
        """Whether nothing is."""
        return not self.problems

    def __repr__(self) -> str:
        found = "; ".join(self.problems) or "nothing is wrong"
        return f"<Verification of {count(len(self.checks), 'thing')}: {found}>"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "passed": self.passed,
            "problems": self.problems,
            "finished": self.finished,
            "mentioned": self.mentioned,
            "not_checked": list(self.skipped),
            "checks": [asdict(check) for check in self.checks],
        }

    def of(self, kind: str) -> list[Check]:
        """The checks of one kind."""
        return [check for check in self.checks if check.kind == kind]

    def says(self, kind: str) -> str:
        """One line on a kind: what holds, or what was not looked at."""
        if kind in self.skipped:
            return "not checked: put right what is wrong with the files first"
        found = self.of(kind)
        wrong = [check for check in found if check.problem]
        remarks = list(dict.fromkeys(check.remark for check in found if check.remark))
        if wrong:
            return "wrong: " + ", ".join(check.name for check in wrong)
        if not found:
            return "none"
        return KINDS[kind] + (f" ({'; '.join(remarks)})" if remarks else "")


def verify(run: str | Path, load: Callable[[Path], EditEngine] = EditEngine.load) -> Verification:
    """Check the run folder `run`; `load` makes an editor of it.

    Every file is looked at, whatever is wrong with the others; the weights are computed again only
    if all are right. LedgerError if there is no ledger, or another process is writing to it.
    """
    run = Path(run)
    store, folder, found = Store(run / "ledger"), run / "model", Verification()
    if not store.exists:
        raise LedgerError(f"{run}: no run here (expected {store.database})")
    with _alone(store) as may_write:
        if may_write and recover_folder(folder):
            found.finished.append(f"{folder}: put in its place; a write of it was interrupted")
        history = _check_ledger(run, store, found, may_write=may_write)
        if history is not None and history.base.quantized:  # there is no model folder
            found.skipped = (FILES, MATRICES)
            if found.passed:
                _check_base(run, history, load, found)
            return found
        state = _check_folder(run, folder, found)
        if history is None or state is None or not found.passed:
            found.skipped = (BASE, MATRICES)
            return found
        if state.base != history.base.hash:
            problem = f"{folder}: is of base {state.base[:12]}, expected {history.base.hash[:12]}"
            found.checks.append(Check(BASE, "model", problem))
            found.skipped = (MATRICES,)
            return found
        editor = _check_base(run, history, load, found)
        if editor is None:
            found.skipped = (MATRICES,)
            return found
        if state.state != history.state_id:
            _finish(run, folder, editor, found, may_write=may_write)
        if found.passed:
            found.checks += _compare(folder, editor)
    return found


def _check_base(
    run: Path, history: History, load: Callable[[Path], EditEngine], found: Verification
) -> EditEngine | None:
    """The loaded run, if its base is the ledger's."""
    try:
        editor = load(run)
    except NullEditError as error:
        found.checks.append(Check(BASE, "model", str(error)))
        return None
    found.checks.append(Check(BASE, history.base.hash[:12]))
    return editor


def _check_ledger(
    run: Path, store: Store, found: Verification, *, may_write: bool
) -> History | None:
    history, name = None, _name(run, store.database)
    try:
        if may_write:
            store.settle()
        history = store.read()
        found.checks.append(Check(DATABASE, name))
    except LedgerError as error:
        found.checks.append(Check(DATABASE, name, str(error)))
    if history is None:
        files = sorted(store.tensors.glob("*.safetensors"))
        digests = [file.stem for file in files if DIGEST.fullmatch(file.stem)]
    else:
        digests = [e.tensors for e in history.epochs] + [b.tensors for b in history.batches]
        found.mentioned += [
            f"{file}: no batch names it; the next write removes it"
            for file in store.unnamed(history)
        ]
    for digest in dict.fromkeys(digests):
        problem = ""
        try:
            store.check_tensors(digest)
        except LedgerError as error:
            problem = str(error)
        found.checks.append(Check(TENSORS, _name(run, store.tensor_file(digest)), problem))
    return history


def _check_folder(run: Path, folder: Path, found: Verification) -> FolderState | None:
    """What the model folder says of itself, if every file in it is as listed there."""
    name = _name(run, folder / STATE_FILE)
    if not folder.is_dir():
        problem = (
            f"{folder}: missing; Editor.load({str(run)!r}).save({str(run)!r}) writes it from the "
            "base and the ledger, and so does the next edit or undo"
        )
        found.checks.append(Check(FILES, _name(run, folder), problem))
        return None
    try:
        state = read_state(folder)
    except LedgerError as error:
        found.checks.append(Check(FILES, name, str(error)))
        return None
    if state is None:
        problem = (
            f"{folder / STATE_FILE}: missing: the folder holds another model, or is damaged; move "
            "it away and have it written anew"
        )
        found.checks.append(Check(FILES, name, problem))
        return None
    found.checks.append(Check(FILES, name))
    for listed, hashes in state.files.items():
        found.checks.append(
            Check(FILES, _name(run, folder / listed), _damage(folder, listed, hashes))
        )
    found.mentioned += [
        f"{folder / other}: nulledit did not write it"
        for other in files_in(folder)
        if other not in state.files
    ]
    return state


def _damage(folder: Path, name: str, hashes: tuple[str, ...]) -> str:
    try:
        digest = sha256_of(folder / name)
    except OSError:
        return (
            f"{folder / name}: missing, but {STATE_FILE} lists it; put back a copy, or move the "
            "folder away and have it written anew"
        )
    if digest in hashes:
        return ""
    expected = " or ".join(one[:12] for one in hashes)
    return (
        f"{folder / name}: damaged: its hash is {digest[:12]}, expected {expected}; put back a "
        "copy, or move the folder away and have it written anew"
    )


def _finish(
    run: Path, folder: Path, editor: EditEngine, found: Verification, *, may_write: bool
) -> None:
    """Bring a model that an interrupted write left behind to the ledger's state."""
    if not may_write:
        problem = f"{folder}: behind the ledger, and the folder can't be written"
        found.checks.append(Check(FILES, _name(run, folder), problem))
        return
    write_edited(editor.weights, folder)
    found.finished.append(
        f"{folder}: was behind the ledger (its write was interrupted, or is yet to come): the "
        "edited matrices were rewritten"
    )
    found.checks[:] = [check for check in found.checks if check.kind != FILES]
    found.mentioned.clear()
    _check_folder(run, folder, found)


def _compare(folder: Path, editor: EditEngine) -> list[Check]:
    """The edited matrices on disk beside those computed from base and ledger."""
    with editor.weights.as_saved() as names:
        return _compared(folder, editor, names)


def _compared(folder: Path, editor: EditEngine, names: dict[str, int]) -> list[Check]:
    parameters = as_saved(editor.model, list(names))
    files = files_with(folder, list(parameters))
    if files is None:
        return [Check(MATRICES, "model", f"{folder}: lacks an edited matrix")]
    checks: dict[int, Check] = {}
    for file, held in files.items():
        with safe_open(file, "pt") as opened:
            for name in held:
                whole, part = parameters[name]
                found, layer = opened.get_tensor(name), names[whole]
                expected = part.to(found.dtype).cpu()
                check = _same(f"layer {layer}", found, expected, f"{file}: {name}")
                before = checks.get(layer, check)  # an expert's: the worst of the layer is reported
                worse = bool(check.problem) > bool(before.problem) or before.remark == BITS
                checks[layer] = check if worse else before
    return [checks[layer] for layer in sorted(checks)]


def _same(name: str, found: Tensor, expected: Tensor, where: str) -> Check:
    if found.shape != expected.shape:
        return Check(
            MATRICES, name, f"{where} is {tuple(found.shape)}, not {tuple(expected.shape)}"
        )
    if torch.equal(found, expected):
        return Check(MATRICES, name, remark=BITS)
    one, other = _ordered(found), _ordered(expected)
    near = (one == other) | (one == other + 1) | (one + 1 == other)
    gap = (found.double() - expected.double()).abs()
    alike = gap <= SOLVED_ALIKE * expected.double().abs().max()
    wrong = int((~(near | alike)).sum())
    different = int((found != expected).sum())
    if wrong:
        problem = (
            f"{where}: {different} of {found.numel()} numbers are not what base and ledger give, "
            f"by up to {float(gap.max()):.3g}"
        )
        return Check(MATRICES, name, problem)
    unit = "one unit in the last place" if bool(near.all()) else f"{SOLVED_ALIKE:g}"
    return Check(MATRICES, name, remark=f"{different} numbers differ by at most {unit}")


def _ordered(values: Tensor) -> Tensor:
    """Integers in the order of the floating-point numbers, one apart for neighbours."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = values.element_size()
    raw = values.contiguous().view(kinds[size]).to(torch.int64)
    magnitude = raw & ((1 << (8 * size - 1)) - 1)
    return torch.where(raw < 0, -magnitude, magnitude)


@contextmanager
def _alone(store: Store) -> Iterator[bool]:
    """No other writer inside; whether this process may write: not in a folder without the right."""
    with ExitStack() as stack:
        try:
            stack.enter_context(store.writing())
            may_write = True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            may_write = False
        yield may_write


def _name(run: Path, path: Path) -> str:
    return path.relative_to(run).as_posix()
