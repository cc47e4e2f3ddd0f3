"""Add a method of your own from outside the package, edit a few facts with it, print the rates.

The method here is AlphaEdit with an upper end to how far a matrix may move in all: a total update
longer than `largest` times ‖W₀‖ is scaled back to that. It is registered under a name; from then
on recipes, ledger, undo and reports know it like any other.

    python examples/add_a_method.py
    python examples/add_a_method.py MODEL --recipe RECIPE --largest 0.03

Another MODEL needs statistics once: `nulledit stats make MODEL --text CORPUS --keys --layers ...`.
"""

import argparse
from dataclasses import dataclass

from nulledit import Editor, Fact, Probe, load_recipe
from nulledit.evaluation import evaluate
from nulledit.io.settings import Positive, checked
from nulledit.methods import Filter, register
from nulledit.methods.filters import RidgeSettings, ridge_gains

# -- the method ------------------------------------------------------------------------------


@checked
@dataclass(frozen=True)
class ClippedSettings(RidgeSettings):
    """AlphaEdit's ridge, and the longest total update."""

    largest: Positive = 0.05
    """Largest ‖Δ‖/‖W₀‖ of all edits of a layer together."""


def clip(total, original, settings):
    """`total` [d_out, d_in], scaled to `largest` of the original weight's norm if it is longer."""
    length, limit = total.norm(), settings.largest * original.norm()
    return total * (limit / length) if length > limit else total


register(
    Filter(
        name="clipped",
        about="AlphaEdit, its total update no longer than a share of the weight",
        paper="examples/add_a_method.py",
        settings=ClippedSettings,
        gains=ridge_gains,  # 1/λ₂ ...
        projected=True,  # ... inside the null space
        history=True,  # past facts stay in the solve
        finish=clip,  # what becomes of the total
    )
)

# -- its use ---------------------------------------------------------------------------------

FACTS = [
    Fact(
        id="france",
        subject="France",
        prompt="The capital of {} is the city of",
        target="Madrid",
        old_answer="Paris",
        paraphrases=("If you visit the capital of {}, you will be in",),
        neighbours=(Probe("The capital of Austria is the city of", "Vienna"),),
    ),
    Fact(
        id="gold",
        subject="gold",
        prompt="The chemical symbol for {} is",
        target="Pt",
        old_answer="Au",
        neighbours=(Probe("The chemical symbol for silver is", "Ag"),),
    ),
    Fact(
        id="kenya",
        subject="Kenya",
        prompt="{} is a country on the continent of",
        target="Asia",
        old_answer="Africa",
        neighbours=(Probe("Brazil is a country on the continent of", "South America"),),
    ),
]


def main() -> None:
    """Edit with the method and print what came of it."""
    parser = argparse.ArgumentParser(description="Edit three facts with a method of your own.")
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="name, folder or Hub id")
    parser.add_argument("--recipe", default="smollm2-135m", help="layers, values and the rest")
    parser.add_argument("--largest", type=float, default=0.05, help="largest ‖Δ‖/‖W₀‖")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe).with_fields(
        {"method.name": "clipped", "method.largest": options.largest}
    )
    editor = Editor.from_pretrained(options.model, recipe=recipe)
    report = editor.edit(FACTS)
    found = evaluate(editor.editable, FACTS, generate=False)
    for name, rate in found.rates.items():
        if rate is not None:
            print(f"{name:<24} {100 * rate.mean:5.1f} % of {rate.n}")
    for layer in report.layers:
        print(f"layer {layer.layer:<18} ‖Δ‖/‖W₀‖ {layer.update_share:.4f}")


if __name__ == "__main__":
    main()
