"""Time the library against the transparent reference, in one run, on the embedded model.

    python benchmarks/speed.py --data ../shared/data [--facts 20] [--steps 15] [--repeats 3]

Identical settings and facts on both sides; CPU seconds of this process, medians over repeats, the
two sides taking turns. Prints one row per stage with the ratio.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import reference
import torch

from nulledit import read_facts
from nulledit.config import ValueSettings, load_recipe
from nulledit.data.corpus import open_corpus, windows
from nulledit.editing.keys import Walk
from nulledit.editing.statistics import find_statistics, key_moments
from nulledit.editing.values import optimise_values
from nulledit.linalg.solve import solve_update
from nulledit.linalg.spectrum import Spectrum
from nulledit.models.layouts import as_out_in, frozen, write_weight
from nulledit.models.load import load_model, model_hash
from nulledit.models.partial import PartialModel
from nulledit.models.tokens import RowEncoder, pad_id

LAYERS = (4, 5, 6, 7, 8)


class Clock:
    """CPU and wall seconds by side and stage."""

    def __init__(self):
        self.cpu, self.wall = {}, {}

    def time(self, side, stage, work):
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        self.cpu.setdefault((side, stage), []).append(time.process_time() - cpu)
        self.wall.setdefault((side, stage), []).append(time.perf_counter() - wall)
        return result

    def row(self, stage, unit, per=1.0):
        slow, fast = (
            statistics.median(self.cpu[s, stage]) / per for s in ("reference", "nulledit")
        )
        walls = [statistics.median(self.wall[s, stage]) / per for s in ("reference", "nulledit")]
        runs = len(self.cpu["nulledit", stage])
        print(
            f"| {stage}, {unit} | {slow:.3f} | {fast:.3f} | {slow / fast:.1f} | "
            f"{walls[0]:.3f} | {walls[1]:.3f} | {runs} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument(
        "--steps", type=int, default=15, help="forward passes per fact (default 15)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lines", type=int, default=60, help="texts for statistics (default 60)")
    parser.add_argument("--values-only", action="store_true", help="stop after the values")
    parser.add_argument("--whole", type=int, default=4, help="facts optimised to their end")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    contexts = json.loads((options.data / "counterfact/derived-100-contexts.json").read_text())
    facts = read_facts(options.data / "counterfact/derived-100.json", limit=options.facts).facts
    model, tokenizer = load_model("smollm2-135m")
    partial, padding = PartialModel(model), pad_id(tokenizer)
    encoder = RowEncoder(tokenizer, max_length=8192)
    settings = ValueSettings(steps=options.steps, stop_loss=0.0)
    base = {layer: as_out_in(partial.mlp_out(layer)).clone() for layer in LAYERS}
    spectra = next(find_statistics(model_hash(model), LAYERS)).spectra
    shipped = load_recipe("smollm2-135m")
    clock = Clock()
    print(
        f"{options.facts} facts, {options.steps} forward passes a fact, {options.threads} thread(s)"
    )
    print("| stage | reference CPU s | nulledit CPU s | ratio | reference wall s | wall s | runs |")
    print("| --- | --- | --- | --- | --- | --- | --- |")

    def fast_values():
        return optimise_values(
            partial,
            encoder,
            facts,
            list(range(len(facts))),
            layer=LAYERS[-1],
            contexts=contexts,
            settings=settings,
            positions=200,
            pad_id=padding,
        )

    def slow_values():
        return [
            reference.compute_z(
                model,
                tokenizer,
                fact,
                layer=LAYERS[-1],
                contexts=contexts,
                steps=settings.steps,
                lr=settings.learning_rate,
                clamp=settings.clamp,
                kl_weight=settings.kl_weight,
                decay=settings.weight_decay,
                stop_loss=0.0,
            )
            for fact in facts
        ]

    def fast_end(some, layer, wanted):
        found = optimise_values(
            partial,
            encoder,
            some,
            list(range(len(some))),
            layer=layer,
            contexts=contexts,
            settings=wanted,
            positions=200,
            pad_id=padding,
        )
        return [(v.loss, v.delta_share) for v in found]

    def slow_end(some, layer, wanted):
        found = [
            reference.compute_z(
                model,
                tokenizer,
                fact,
                layer=layer,
                contexts=contexts,
                steps=wanted.steps,
                lr=wanted.learning_rate,
                clamp=wanted.clamp,
                kl_weight=wanted.kl_weight,
                decay=wanted.weight_decay,
                stop_loss=wanted.stop_loss,
            )
            for fact in some
        ]
        return [(v.losses[-1], float(v.delta.norm() / v.initial.norm())) for v in found]

    with frozen(model):
        for _ in range(options.repeats):
            values = clock.time("nulledit", "values", fast_values)
            expected = clock.time("reference", "values", slow_values)
        worst = max(
            float((a.z - b.z).norm() / b.z.norm()) for a, b in zip(values, expected, strict=True)
        )
        clock.row("values", "a step of a fact", options.facts * options.steps)

        if options.values_only:
            print(f"\nlargest relative difference of values: {worst:.1e}")
            return
        zs = torch.stack([v.z for v in values])
        metrics, projectors = {}, {}
        for layer in LAYERS:
            spectrum: Spectrum = spectra[layer]
            metrics[layer] = spectrum.metric((spectrum.eigenvalues < 0.02).double() / 10)
            U = metrics[layer].vectors.double()
            projectors[layer] = (torch.eye(spectrum.d_in, dtype=torch.float64) - U @ U.mT).float()

        def restore():
            for layer in LAYERS:
                write_weight(partial.mlp_out(layer), base[layer])

        def fast_update():
            walk = Walk(
                partial,
                encoder,
                facts,
                first=LAYERS[0],
                contexts=contexts,
                bare_weight=0.5,
                pad_id=padding,
            )
            for i, layer in enumerate(LAYERS):
                keys = walk.keys()
                residual = (zs.double().mT - walk.hidden(LAYERS[-1])) / (len(LAYERS) - i)
                update = solve_update(keys, residual, metrics[layer])
                write_weight(partial.mlp_out(layer), base[layer].double() + update)
                walk.advance()

        def slow_update():
            history = {layer: torch.zeros_like(projectors[layer]) for layer in LAYERS}
            reference.alphaedit_batch(
                model,
                tokenizer,
                facts,
                zs,
                layers=LAYERS,
                projectors=projectors,
                history=history,
                l2=10.0,
                contexts=contexts,
            )

        for _ in range(options.repeats):
            clock.time("nulledit", "keys, residuals and solve", fast_update)
            mine = {layer: as_out_in(partial.mlp_out(layer)).clone() for layer in LAYERS}
            restore()
            clock.time("reference", "keys, residuals and solve", slow_update)
            gap = max(
                float(
                    (as_out_in(partial.mlp_out(layer)) - mine[layer]).norm()
                    / (mine[layer] - base[layer]).norm()
                )
                for layer in LAYERS
            )
            restore()
        clock.row("keys, residuals and solve", f"a batch of {options.facts}")

        texts = [
            t for t in open_corpus(options.data / "golden/paragraphs.txt").texts() if t.strip()
        ]
        texts = [t.rstrip("\n") for t in texts[: options.lines]]
        rows = list(
            windows(
                texts,
                lambda t: tokenizer(t, add_special_tokens=False)["input_ids"],
                window=2048,
                packed=False,
            )
        )
        tokens = sum(map(len, rows))
        for _ in range(options.repeats):
            clock.time(
                "nulledit",
                "statistics of five layers",
                lambda: key_moments(partial, tokenizer, rows, LAYERS),
            )
            clock.time(
                "reference",
                "statistics of five layers",
                lambda: [
                    reference.second_moment(model, tokenizer, texts, i, dtype=torch.float32)
                    for i in LAYERS
                ],
            )
        clock.row("statistics of five layers", f"1,000 of {tokens} tokens", tokens / 1000)
        print("\n| values to their end | CPU s a fact | mean loss | mean ‖δ‖/‖h‖ |")
        print("| --- | --- | --- | --- |")
        some = facts[: options.whole]
        for name, layer, wanted in (
            ("published settings", 8, ValueSettings(steps=15)),
            ("shipped recipe", shipped.layers[-1], shipped.values),
        ):
            for side, work in (("reference", slow_end), ("nulledit", fast_end)):
                cpu = time.process_time()
                ends = work(some, layer, wanted)
                cpu = (time.process_time() - cpu) / len(some)
                loss = statistics.fmean(loss for loss, _ in ends)
                share = statistics.fmean(share for _, share in ends)
                print(f"| {name}, {side} | {cpu:.2f} | {loss:.4f} | {share:.4f} |", flush=True)
    print(f"\nlargest relative difference: values {worst:.1e}, updates {gap:.1e}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of this process: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
