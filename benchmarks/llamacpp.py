"""What a real llama.cpp makes of the GGUF exports of a run, against the edited model itself.

    python benchmarks/llamacpp.py RUN [--facts N]

RUN is a folder that `nulledit edit` made on a model whose GGUF file is known; it is only read.
Prints a Markdown table: for each way to hand the edits over, how many facts are said greedily, how
many answers are token for token those of the edited model, and how far the targets'
log-probabilities are from its own. llama.cpp is run by a Python that has llama-cpp-python: this
one, or the one that NULLEDIT_LLAMA_PYTHON names.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from served import compared, own_answers, rows_of

VARIABLE = "NULLEDIT_LLAMA_PYTHON"


def python():
    """The Python to run llama.cpp by; None where it is not to be had."""
    given = os.environ.get(VARIABLE)
    return given or (sys.executable if importlib.util.find_spec("llama_cpp") else None)


def answers(model, rows, *, adapter=None, texts=()):
    """Of each row (ids of a prompt, ids of a target): log-probability of the target, and the
    tokens that are said, greedily, in its place. Of each text: its tokens."""
    request = {"model": str(model), "rows": rows, "texts": list(texts)}
    if adapter is not None:
        request["adapter"] = str(adapter)
    done = subprocess.run(
        [python(), __file__, "--answer"], input=json.dumps(request), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return [(row["log"], row["said"]) for row in found["rows"]], found["texts"]


def answer():
    """The other end of `answers`, which knows nothing of nulledit."""
    import numpy as np
    from llama_cpp import Llama

    request = json.load(sys.stdin)
    llm = Llama(
        request["model"],
        lora_path=request.get("adapter"),
        logits_all=True,
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )

    def after(ids):
        """Log-probabilities of the next token after each [tokens, vocabulary]."""
        llm.reset()
        llm.eval(ids)
        logits = np.array(llm.scores[: len(ids)], dtype=np.float64)
        logits -= logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    rows = []
    for prompt, target in request["rows"]:
        found = after(prompt + target[:-1])[len(prompt) - 1 :]
        told, said = float(found[np.arange(len(target)), target].sum()), []
        for _ in target:
            said.append(int(after(prompt + said)[-1].argmax()))
        rows.append({"log": told, "said": said})
    texts = [llm.tokenize(text.encode(), add_bos=False) for text in request["texts"]]
    print(json.dumps({"rows": rows, "texts": texts}))


def in_float32(editor, file):
    """The run's base as a GGUF file whose weights are all float32."""
    from nulledit.export.gguf_file import Stored, base_file

    source = base_file(editor, None)
    source.write(file, lambda name: Stored.of(source.stored(name).values(), "f32", name))
    return file


def main():
    from nulledit import Run

    run, most = sys.argv[1], int(sys.argv[3]) if "--facts" in sys.argv else None
    editor = Run.open(run).editor
    rows = rows_of(editor)[:most]
    own = own_answers(editor.model, rows)
    head = "file of the base | edits | facts said | answers as its own | log p: mean, largest gap"
    print(f"| {head} | MB |\n|{' --- |' * 6}")

    def tell(base, edits, found, size=""):
        print(f"| {base} | {edits} | {compared(found, own, rows)} | {size} |", flush=True)

    tell("", "the edited model, torch", own)
    with tempfile.TemporaryDirectory() as place:
        from nulledit.export.gguf_file import base_file

        folder = Path(place)
        files = {
            "float32": (in_float32(editor, folder / "base.gguf"), ("f32",)),
            "as it came": (base_file(editor, None).path, ("f16", "q8_0")),
        }
        for name, (base, types) in files.items():
            tell(name, "none", answers(base, rows)[0])
            for type_ in types:
                out = folder / f"{name} {type_}"
                done = editor.export(out, "gguf", gguf=base, tensor_type=type_)
                found = answers(out / "model.gguf", rows)[0]
                tell(name, f"gguf, {type_}", found, f"{done.bytes / 1e6:.1f}")
            done = editor.export(folder / f"{name} lora", "gguf-lora", gguf=base)
            adapter = folder / f"{name} lora" / "adapter.gguf"
            size = f"{done.bytes / 1e6:.1f}"
            tell(name, "gguf-lora", answers(base, rows, adapter=adapter)[0], size)


if __name__ == "__main__":
    answer() if "--answer" in sys.argv else main()
