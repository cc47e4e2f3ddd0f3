"""Values and keys of a tiny model, and how far they are from those expected."""

from nulledit.config import ValueSettings
from nulledit.editing.keys import LayerwiseForward
from nulledit.editing.values import optimise_values
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen

CONTEXTS = ["{}", "Then, he said. {}", "The river. {}"]


SETTINGS = ValueSettings(steps=8, learning_rate=0.3, weight_decay=0.05, stop_margin=None)


def taken_up(model, tokenizer, columns):
    """The model, with room for so many columns after a kept prefix; None: as it is."""
    whole = EditableModel(model, tokenizer)
    whole.columns = whole.columns if columns is None else columns
    return whole


def ours(
    model,
    tokenizer,
    facts,
    *,
    groups=None,
    settings=SETTINGS,
    positions=400,
    layer=2,
    layers=None,
    columns=None,
):
    with frozen(model):
        return optimise_values(
            taken_up(model, tokenizer, columns),
            facts,
            groups or list(range(len(facts))),
            layers=layers or [layer],
            contexts=CONTEXTS,
            settings=settings,
            positions=positions,
        )


def walk(model, tokenizer, facts, *, first, columns=None):
    return LayerwiseForward(
        taken_up(model, tokenizer, columns),
        facts,
        first=first,
        contexts=CONTEXTS,
        bare_weight=0.5,
        positions=50,
    )


def distance(a, b):
    return float((a - b).norm() / b.norm())
