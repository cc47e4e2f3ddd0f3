"""Editors of the models that know the small world."""

from nulledit import Editor
from nulledit.config import Recipe
from nulledit.editing.values import optimise_values
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen
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


def sayable(known, n, relation="home", contexts=WORLD.contexts.texts, *, slow=False):
    """`n` edits of a world whose targets some value makes it say by a margin, in `contexts`, too.

    Which facts a world this small keeps where no value reaches them is an affair of its training.
    `slow`: those that take the most steps, instead of the first ones.
    """
    model, words = known
    edits = [world.fact(p, relation, world.another(p, relation)) for p in world.PEOPLE]
    settings = WORLD.with_fields({"values.stop_margin": 0.5, "values.stop_loss": 1.0}).values
    with frozen(model):
        values = optimise_values(
            EditableModel(model, words),
            edits,
            range(len(edits)),
            layers=[WORLD.layers[-1]],
            contexts=contexts,
            settings=settings,
            positions=400,
        )
    done = [(f, v) for f, v in zip(edits, values, strict=True) if v.outcome.ended == "done"]
    found = [f for f, v in sorted(done, key=lambda x: -x[1].outcome.steps if slow else 0)]
    assert len(found) >= n, f"a world where values say {len(found)} of {len(edits)} facts"
    return found[:n]
