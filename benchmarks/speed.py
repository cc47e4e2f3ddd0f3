"""Time the library, stage by stage, in one run.

    python benchmarks/speed.py --data ../shared/data [--stages values,ends,update,statistics]
    python benchmarks/speed.py --data ../shared/data --stages solve,stream,eigen --width 14336
    python benchmarks/speed.py --data ../shared/data --model llama3-8b --dtype bfloat16 \
        --device cuda --stages edit,statistics

The model is the embedded one, or one of random weights in the shape of a published recipe's. Where
there is a reference (benchmarks/reference.py: the published algorithm as its code runs it), both
sides get the same facts and settings and take turns. CPU seconds are of this process, medians over
`--repeats`; ratios are of CPU seconds, on an accelerator of wall seconds. Stages:

    values      a step of a fact
    ends        values to an equal loss: published settings against --fast-rate,
                --fast-steps and --fast-clamp
    update      keys, residuals and solves of a batch
    statistics  second moments of the recipe's layers; also against a bare forward pass and the
                products alone
    solve       one layer's update at --width, against the dense d x d solve
    growth      an update without values after 0 and after 9,900 made-up facts
    stream      one layer's solve after 0 and 9,900 facts at --width; bytes on disk
    eigen       the decomposition at --width, whole and partial
    edit        a batch of --facts through Editor.edit, by stage (no reference)
"""

import argparse
import json
from pathlib import Path

import shapes
import stages
import torch
from timing import Clock, threads

from nulledit import read_facts
from nulledit.config import load_recipe
from nulledit.models.layouts import frozen
from nulledit.models.load import load_model

OF_A_MODEL = {
    "values": stages.values,
    "ends": stages.ends,
    "update": stages.update,
    "statistics": stages.statistics,
    "growth": stages.growth,
    "edit": stages.edit,
}
OF_A_WIDTH = {"solve": stages.solve, "stream": stages.stream, "eigen": stages.eigen}


def options_of():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stages", default="values,update,statistics")
    parser.add_argument("--model", default="smollm2-135m", help="or " + ", ".join(shapes.SHAPES))
    parser.add_argument("--recipe", help="default: the model's published settings")
    parser.add_argument("--blocks", type=int, help="of a model of random weights; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=15, help="forward passes a fact")
    parser.add_argument("--fast-rate", type=float, default=1.0, help="step size of stage `ends`")
    parser.add_argument("--fast-steps", type=int, default=10)
    parser.add_argument("--fast-clamp", type=float, default=0.7)
    parser.add_argument("--tokens", type=int, default=8000, help="of stage `statistics`")
    parser.add_argument("--positions", type=int, help="tokens that run together; default: own")
    parser.add_argument("--width", type=int, default=14336, help="d_in; d_out is 4096/14336 of it")
    parser.add_argument("--free", type=float, default=0.3, help="share of free directions")
    return parser.parse_args()


def main():
    options = options_of()
    said = threads(options.threads)
    wanted = options.stages.split(",")
    unknown = set(wanted) - set(OF_A_MODEL) - set(OF_A_WIDTH)
    if unknown:
        raise SystemExit(f"unknown stages {sorted(unknown)}")
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{options.model}, {options.dtype}, {where}, {said}\n")
    clock = Clock(device)
    if any(stage in OF_A_MODEL for stage in wanted):
        setup = setup_of(options, device)
    clock.head()
    notes = []
    for stage in wanted:
        if stage in OF_A_WIDTH:
            notes += OF_A_WIDTH[stage](clock, options)
        else:
            with frozen(setup.model):
                notes += OF_A_MODEL[stage](clock, setup, options)
    print("\n" + "\n".join(f"- {note}" for note in notes))


def setup_of(options, device):
    folder = options.data / "counterfact"
    contexts = json.loads((folder / "derived-100-contexts.json").read_text())
    facts = read_facts(folder / "derived-100.json", limit=options.facts).facts
    dtype = getattr(torch, options.dtype)
    texts = (options.data / "golden/paragraphs.txt").read_text(encoding="utf-8").splitlines()
    texts = [text for text in texts if text.strip()]
    if options.model in shapes.SHAPES:
        recipe = load_recipe(options.recipe or options.model)
        tokenizer = shapes.tokenizer_of(texts)
        model = shapes.random_model(
            options.model, dtype=dtype, device=device, blocks=options.blocks
        )
    else:
        recipe = load_recipe(options.recipe or f"{options.model}-published")
        model, tokenizer = load_model(options.model, device=options.device, dtype=options.dtype)
    return stages.Setup(model, tokenizer, recipe, facts, contexts, texts, options.free)


if __name__ == "__main__":
    main()
