"""Editors of the models that know the small world."""

from nulledit import Editor
from nulledit.config import Recipe
from support import world
from support.models import statistics_of

LASTING = Recipe.from_dict(
    {
        "layers": [0, 1],
        "values": {
            **{"steps": 60, "learning_rate": 0.2, "weight_decay": 1.0, "clamp": 3.0},
            **{"stop_margin": 0.5, "rounds": 6},  # as shipped: no edit hangs on a rounding
        },
        "contexts": {"texts": ["{}", "then he said . {}", "the river is long . {}"]},
        "null_space": {"rule": "leakage", "value": 0.001},
        "method": {"l2": 1e-3},
    }
)
"""So much that every edit holds, whatever `--world-seed`."""
WORLD = Recipe.from_dict(
    {
        "layers": [0, 1],
        "values": {"steps": 60, "learning_rate": 0.2, "weight_decay": 0.1, "clamp": 6.0},
        "contexts": {"texts": ["{}", "then he said . {}"]},
        "null_space": {"rule": "leakage", "value": 0.05},
        "method": {"l2": 1e-3},
    }
)
"""Quicker, and enough for most."""


def in_the_world(known, recipe=WORLD, **changes):
    """An editor of a fresh copy of a known world, (model, tokenizer); a recipe with `changes`."""
    model = type(known[0])(known[0].config).eval()
    model.load_state_dict(known[0].state_dict())
    statistics = statistics_of(model, known[1], layers=(0, 1), lines=world.sentences())
    recipe = recipe.with_fields({k.replace("__", "."): v for k, v in changes.items()})
    return Editor(model, known[1], recipe=recipe, statistics=statistics)
