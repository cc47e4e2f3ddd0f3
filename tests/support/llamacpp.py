"""What a real llama.cpp makes of a GGUF file, run by a Python that has llama-cpp-python.

That may be another one than the tests': its path is in NULLEDIT_LLAMA_PYTHON. As a script this
reads a JSON request on stdin and answers on the last line of stdout.
"""

import importlib.util
import json
import os
import subprocess
import sys

VARIABLE = "NULLEDIT_LLAMA_PYTHON"


def python():
    """The Python to run it by; None where llama.cpp is not to be had."""
    given = os.environ.get(VARIABLE)
    return given or (sys.executable if importlib.util.find_spec("llama_cpp") else None)


def answers(model, rows, *, adapter=None, texts=()):
    """Of each row (ids of a prompt, ids of a target): log-probability of the target, and the
    tokens that are said, greedily, in its place. Of each text: its tokens."""
    request = {"model": str(model), "rows": rows, "texts": list(texts)}
    if adapter is not None:
        request["adapter"] = str(adapter)
    done = subprocess.run(
        [python(), __file__], input=json.dumps(request), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return [(row["log"], row["said"]) for row in found["rows"]], found["texts"]


def main():
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


if __name__ == "__main__":
    main()
