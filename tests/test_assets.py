"""What the package ships fits together."""

from importlib import resources

import pytest

from nulledit import read_facts
from nulledit.config import load_recipe, shipped_recipes
from nulledit.evaluation.preservation import shipped_text
from nulledit.ledger.update_solver import LayerPreconditioners
from nulledit.linalg.spectrum import RULES
from nulledit.models.embedded import EMBEDDED
from nulledit.statistics.found import find_statistics, named_statistics
from nulledit.statistics.spectra import Statistics

ASSETS = resources.files("nulledit") / "assets"


@pytest.mark.parametrize("name", shipped_recipes())
def test_recipes_load_and_read_back(name):
    recipe = load_recipe(name)
    assert bool(recipe.layers) == (name != "default")  # which has them by depth
    assert type(recipe).from_dict(recipe.to_dict()) == recipe


def test_shipped_statistics_serve_the_shipped_recipe_and_the_published_layers():
    statistics = Statistics.load(ASSETS / "statistics" / "smollm2-135m.safetensors")
    manifest = statistics.manifest
    assert (manifest.corpus, manifest.tokens) == ("valid.txt", 272569)
    assert statistics.checked  # it has its hash
    for name in ("smollm2-135m", "smollm2-135m-published"):
        recipe = load_recipe(name).with_fields({"method.name": "alphaedit"})
        for layer in recipe.layers:
            spectrum = statistics.spectra[layer]
            rule = recipe.null_space
            threshold = RULES[rule.rule](spectrum.eigenvalues, rule.value)
            found = LayerPreconditioners.of(recipe, spectrum, threshold)
            assert 0 < found.own.rank < spectrum.d_in


def test_every_embedded_model_has_a_recipe():
    for name in EMBEDDED:
        assert load_recipe(name).method.name == "gated"


def test_what_the_shipped_recipe_needs_is_there():
    """Gated edits are in the last of its layers, of whose inputs statistics come along."""
    recipe = load_recipe("smollm2-135m")
    assert recipe.method.name == "gated"
    statistics = Statistics.load(ASSETS / "statistics" / "smollm2-135m-inputs.safetensors")
    assert statistics.manifest.inputs
    assert recipe.layers[-1] in statistics.spectra


def test_example_facts_are_complete():
    facts = read_facts(ASSETS / "facts" / "examples.yaml").facts
    assert len(facts) == 25
    assert len({f.subject for f in facts}) == 25
    assert sum(" " in f.target or f.target[-1].isdigit() for f in facts) >= 10
    for fact in facts:
        assert fact.old_answer
        assert len(fact.paraphrases) >= 2
        assert len(fact.neighbours) >= 2
        assert all(n.answer for n in fact.neighbours)


def test_preservation_text_is_of_the_promised_size():
    assert 18_000 < len(shipped_text().encode()) < 22_000


def test_the_name_of_a_model_shows_the_statistics_of_its_keys():
    found = named_statistics("smollm2-135m")
    assert not found.manifest.inputs
    inputs = find_statistics(found.manifest.model_hash, [5], inputs=True)
    assert next(inputs).manifest.inputs
