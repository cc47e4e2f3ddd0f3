"""Sizes of ledger, adapter and delta, and what each of them misses.

    python benchmarks/export.py RUN [--texts 8] [--ranks 8 64 256] [--threads 1] [--no-llama]

RUN is a folder that `nulledit edit` made; it is only read. Prints Markdown tables: files; logits of
base + adapter (through PEFT) against the edited model, in float32 and in float64; facts with the
adapter cut to smaller ranks; what rounding to bfloat16 and float16 would cost; and the synthetic
update of one matrix in LLaMA3-8B's shape, 100 random keys.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
from torch.nn.functional import pad

from nulledit.editing.engine import EditEngine
from nulledit.evaluation.preservation import shipped_corpus
from nulledit.evaluation.reading import read_windows
from nulledit.export import apply_delta, write_delta, write_lora
from nulledit.export.factors import factorise, ordered_sum, relative_error
from nulledit.export.ranks import served_rank
from nulledit.export.updates import update_and_base
from nulledit.linalg.preconditioner import BlockGains, SpectralPreconditioner
from nulledit.linalg.solve import solve_update
from nulledit.models.layouts import find_layout, mlp_out, write_weight
from nulledit.models.load import load_model

WINDOW = 64  # tokens of a text
MB = 1e6


def table(head, rows):
    print(f"\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def timed(call):
    """What `call` returns, and its CPU-seconds: other processes may share the cores."""
    start = time.process_time()
    found = call()
    return found, time.process_time() - start


def files(editor, run, scratch):
    """Sizes of everything that holds the edits, and how long each takes to write."""
    facts = len(editor.facts)
    rows = [
        ["model (RUN/model)", "", f"{size_of(run / 'model') / MB:.1f}", "", ""],
        ["ledger (RUN/ledger)", "", f"{size_of(run / 'ledger') / MB:.2f}", "", ""],
    ]
    for name, write, dtype in (
        ("LoRA", write_lora, "float32"),
        ("LoRA", write_lora, "bfloat16"),
        ("LoRA", write_lora, "float64"),
        ("delta", write_delta, "float32"),
        ("delta", write_delta, "float64"),
    ):
        out = scratch / f"{name}-{dtype}"
        done, seconds = timed(lambda w=write, o=out, d=dtype: w(editor, o, dtype=d))
        rank = done.rank or max(layer.rank for layer in done.layers)
        worst = max(layer.error for layer in done.layers)
        bits = "" if done.same_as_run is None else f"; {done.differing:,} weights differ"
        row = [f"{name}, {dtype}", rank, f"{done.bytes / MB:.2f}", f"{worst:.1e}{bits}"]
        rows.append([*row, f"{seconds:.1f}"])
    table([f"{facts} facts", "rank", "MB", "‖Δ − BA‖/‖Δ‖, worst layer", "CPU-s"], rows)


@torch.no_grad()
def logits(model, ids):
    return torch.cat([model(input_ids=row[None]).logits.double() for row in ids])


def differences(editor, scratch, texts):
    """Base + adapter through PEFT against the edited model."""
    windows = read_windows(shipped_corpus(), editor.tokenizer, window=WINDOW)[:texts]
    ids = torch.tensor(windows)
    name = editor.history.base.model
    edited = logits(editor.model, ids)
    base, _ = load_model(name, dtype=editor.history.base.dtype)
    plain = logits(base, ids)
    rows = [row_of("base, no adapter", plain, edited)]
    for dtype in ("float32", "bfloat16"):
        base, _ = load_model(name, dtype=editor.history.base.dtype)
        adapted = peft.PeftModel.from_pretrained(base, scratch / f"LoRA-{dtype}").eval()
        rows.append(row_of(f"base + LoRA in {dtype}", logits(adapted, ids), edited))
        merged = adapted.merge_and_unload()
        rows.append(row_of(f"the same, merged, {dtype}", logits(merged, ids), edited))
    double, _ = load_model(name, dtype=editor.history.base.dtype)
    double = double.double()
    layout = find_layout(double)
    for layer in editor.weights.layers:
        write_weight(mlp_out(double, layout, layer), editor.weights.exact(layer))
    exact = logits(double, ids)
    rows.append(row_of("the edited model against W₀ + Δ in float64", edited, exact))
    for layer in editor.weights.layers:
        write_weight(mlp_out(double, layout, layer), editor.weights.base(layer))
    adapted = peft.PeftModel.from_pretrained(double, scratch / "LoRA-float64").eval()
    rows.append(row_of("all in float64: base + LoRA against W₀ + Δ", logits(adapted, ids), exact))
    std = float(edited.std())
    print(
        f"\n{len(ids)} texts of {WINDOW} tokens; logits have |x| ≤ {float(edited.abs().max()):.1f}"
    )
    print(f"and a standard deviation of {std:.2f}.")
    table(["logits", "largest difference", "mean", "same argmax"], rows)


def row_of(name, found, expected):
    gaps = (found - expected).abs()
    same = float((found.argmax(-1) == expected.argmax(-1)).double().mean())
    return [name, f"{float(gaps.max()):.2g}", f"{float(gaps.mean()):.2g}", f"{100 * same:.2f} %"]


def cuts(editor, scratch, ranks):
    """The adapter at ranks below the number of columns."""
    rows = []
    for rank in [r for r in ranks if r < len(editor.history.active)]:
        done = write_lora(editor, scratch / f"cut-{rank}", rank=rank)
        errors = [max(getattr(x, n) for x in done.layers) for n in ("error", "key_error")]
        cost = done.cost
        rows.append(
            [
                *(rank, f"{done.bytes / MB:.2f}", *(f"{e:.3f}" for e in errors)),
                f"{cost.stored_strict} of {cost.facts} ({cost.exact_strict} uncut)",
                f"{cost.stored_nll:.3f} ({cost.exact_nll:.3f} uncut)",
            ]
        )
    if rows:
        head = ["rank", "MB", "‖Δ − BA‖/‖Δ‖", "at the keys", "facts by argmax", "nats a token"]
        table(head, rows)


def rounding(editor):
    """‖rounding‖/‖Δ‖ if the base were kept in half precision, after the first n facts."""
    columns = editor.history.active
    rows = []
    for n in [n for n in (1, 25, 100, len(columns)) if n <= len(columns)]:
        with editor.weights.holding(columns[:n]):
            for dtype in (torch.bfloat16, torch.float16):
                shares = []
                for layer in editor.weights.layers:
                    update, base = update_and_base(editor, layer)
                    exact = base.to(dtype).double() + update
                    shares.append(float((exact.to(dtype).double() - exact).norm() / update.norm()))
                name = str(dtype).removeprefix("torch.")
                told = ", ".join(f"{x:.3g}" for x in shares)
                rows.append([n, name, told])
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]
    layers = ", ".join(map(str, editor.weights.layers))
    table(["facts", "dtype", f"‖rounding‖/‖Δ‖, layers {layers}"], rows)


def llama(facts=100, d_out=4096, d_in=14336):
    """Factors of one matrix's update in LLaMA3-8B's shape, by a closed form with random keys."""
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    keys = torch.randn(d_in, facts, **draw)
    residual = torch.randn(d_out, facts, **draw)
    base = (0.02 * torch.randn(d_out, d_in, generator=generator)).bfloat16().double()
    none = torch.zeros(d_in, 0).double()
    identity = SpectralPreconditioner({0: BlockGains(none, none[0], 0.1)}, d_in, d_in)
    update = (base + solve_update(keys, residual, identity)) - base
    noise = torch.finfo(base.dtype).eps * float(base.norm())
    found, seconds = timed(lambda: factorise(update, columns=facts, noise=noise))
    rank = served_rank(found.rank)
    print(f"\nOne matrix of {d_out} × {d_in}, {facts} facts: rank {found.rank}, residual")
    print(f"{found.error:.1e}; factors in {seconds:.1f} CPU-s.")
    rows = []
    for name, dtype, width in (
        ("LoRA", torch.float32, rank),
        ("LoRA", torch.bfloat16, rank),
        ("delta", torch.float32, found.rank),
        ("delta", torch.float64, found.rank),
    ):
        left = pad(found.left, (0, width - found.rank)).to(dtype)
        right = pad(found.right, (0, 0, 0, width - found.rank)).to(dtype)
        held = (left.nbytes + right.nbytes) / MB
        error = relative_error(update, left, right)
        rows.append([name, str(dtype).removeprefix("torch."), width, f"{held:.2f}", f"{error:.1e}"])
    rows.append(["the matrix", "bfloat16", "", f"{base.numel() * 2 / MB:.1f}", ""])
    table(["", "dtype", "rank", "MB", "‖Δ − BA‖/‖Δ‖"], rows)
    total, seconds = timed(lambda: ordered_sum(base, found.left, found.right))
    gap = float(((total - base) - update).abs().max())
    print(
        f"\nPutting it on W₀ in a fixed order: {seconds:.1f} CPU-s (largest difference {gap:.0e})."
    )
    mask = torch.rand(update.shape, generator=generator) < 0.5
    found, seconds = timed(lambda: factorise(update * mask, columns=facts))
    print(f"A full-rank update (half of its entries dropped) cut to {found.rank} of {found.of}:")
    print(f"{seconds:.0f} CPU-s, ‖Δ − BA‖/‖Δ‖ {found.error:.2f}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--texts", type=int, default=8, help="of 64 tokens (default 8)")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64, 256], help="to cut to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-llama", action="store_true", help="leave the synthetic layer out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, peft {peft.__version__}, {options.threads} thread(s)")
    editor = EditEngine.load(options.run)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        files(editor, options.run, scratch)
        base = editor.history.base.model
        done, seconds = timed(lambda: apply_delta(scratch / "delta-float64", base, scratch / "on"))
        same = "the run's model to the bit" if done.same_as_run else "not the run's model"
        print(f"\nApplying the float64 delta: {seconds:.1f} CPU-s; {same}.")
        differences(editor, scratch, options.texts)
        cuts(editor, scratch, options.ranks)
    rounding(editor)
    if not options.no_llama:
        del editor
        gc.collect()
        llama()


if __name__ == "__main__":
    main()
