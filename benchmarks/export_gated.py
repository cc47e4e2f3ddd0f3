"""The price of a gated edit's adapter: KL and rates in the base's shape, and sizes.

    python benchmarks/export_gated.py RUN --text valid.txt --judge test.txt
    python benchmarks/export_gated.py --llama

RUN is a folder of gated edits that `nulledit edit` made; it is only read. Units are chosen on
--text; KL from the base is measured on 40 windows of 256 tokens of --judge. --llama: 100 random
neurons in one block of LLaMA3-8B's shape (random weights), as an adapter that PEFT loads.
"""

import argparse
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nulledit import Editor
from nulledit.evaluation import evaluate, read_windows
from nulledit.evaluation.reading import read
from nulledit.export import write_lora
from nulledit.export.lora import adapter_config, adapter_tensors
from nulledit.export.neuron_factors import neuron_factors
from nulledit.export.ranks import served_rank
from nulledit.export.same_shape import Places
from nulledit.export.updates import write_json
from nulledit.linalg.neurons import Neurons
from nulledit.models.editable_model import EditableModel

MB = 1e6
RATES = ("efficacy", "efficacy_strict", "generalization_strict", "specificity")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.run:
        of_run(options)
    if options.llama:
        of_llama()


def of_run(options):
    """Base, grown and same-shape model on text and facts, and the adapter's size."""
    editor = Editor.load(options.run)
    windows = read_windows(options.judge, editor.tokenizer, windows=40)
    places = Places(editor, options.text)
    with editor.base_weights():
        base = read(editor.editable, windows, keep=True)
    print(f"replaced units hold {100 * places.layers[0].share:.2g} % of their block's energy")
    print("| model | KL, mnat (worst 1 %) |\n| --- | --- |")
    tell(editor, windows, base, "grown")
    with places.taken():
        tell(editor, windows, base, "the base's shape")
    rates(editor, "grown")
    with places.taken():
        rates(editor, "the base's shape")
    with tempfile.TemporaryDirectory() as scratch:
        done = write_lora(editor, Path(scratch) / "lora", text=options.text)
        print(f"adapter of rank {done.rank}: {done.bytes / MB:.2f} MB; {done.cost}")


def tell(editor, windows, base, name):
    kl = read(editor.editable, windows, base=base).kl
    cells = f"{kl.value:.2f} ± {kl.standard_error:.2f} ({100 * kl.worst_share:.0f} %)"
    print(f"| {name} | {cells} |", flush=True)


def rates(editor, name):
    found = evaluate(editor.editable, list(editor.facts)).summary()["rates"]
    shown = (
        f"{kind} {100 * found[kind]['mean']:.1f} ± {100 * found[kind]['standard_error']:.1f}"
        for kind in RATES
    )
    print(f"{name}: {', '.join(shown)}", flush=True)


def of_llama(n=100):
    """Time and size of the adapter; PEFT's model against the formula."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=256,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    words = {f"w{i}": i for i in range(400)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
    )
    editable = EditableModel(model, tokenizer)
    form, inputs = editable.form(0), torch.randn(4096, n, dtype=torch.float64)
    rows, factors = (torch.randn(n, 4096, dtype=torch.float64) / 16 for _ in range(2))
    neurons = Neurons(rows, None, factors, torch.randn(4096, n, dtype=torch.float64) / 8)
    at = torch.randperm(form.width)[:n].sort().values
    editor = SimpleNamespace(
        model=model,
        editable=editable,
        history=SimpleNamespace(active=()),
        weights=SimpleNamespace(recorded=lambda *_: (inputs, None)),
        base_weights=nullcontext,
    )
    places = SimpleNamespace(neurons={0: neurons}, places=lambda _layer: at)
    ids = torch.randint(400, (4, 32))
    with torch.no_grad():
        bare = model(input_ids=ids).logits
        with form.replaced(at, neurons):
            expected = model(input_ids=ids).logits
    for dtype in (torch.float32, torch.bfloat16):
        start = time.process_time()
        layers, _ = neuron_factors(editor, places, dtype)
        rank = served_rank(max(s.report.rank for s in layers))
        with tempfile.TemporaryDirectory() as scratch:
            write_json(Path(scratch) / "adapter_config.json", adapter_config("", layers, rank))
            file = Path(scratch) / "adapter_model.safetensors"
            save_file(adapter_tensors(layers, rank), file, {"format": "pt"})
            spent, size = time.process_time() - start, file.stat().st_size
            adapted = peft.PeftModel.from_pretrained(model, scratch)
            with torch.no_grad():
                found = adapted(input_ids=ids).logits
            model = adapted.unload()
        gap = float((found - expected).abs().max() / expected.abs().max())
        moved = float((bare - expected).abs().max() / expected.abs().max())
        print(
            f"{n} neurons, {form.width} units on {form.d}, {dtype}: rank {rank}, "
            f"{size / MB:.1f} MB, {spent:.1f} CPU-s; logits in PEFT off by {gap:.1e} of the "
            f"largest (without the adapter {moved:.1e})",
            flush=True,
        )


if __name__ == "__main__":
    main()
