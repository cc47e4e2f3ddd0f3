"""The examples run as a reader would run them, on a tiny model."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.cli import MAKE_KEYS
from support.models import LINES, RECIPE, build_model

from nulledit import methods
from nulledit.cli.main import cli
from nulledit.methods import METHODS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def own_methods():
    """What an example registers is gone afterwards."""
    with METHODS.restored():
        yield


@pytest.fixture
def model(tokenizer, tmp_path):
    """A folder with a tiny model whose statistics are in the cache, and a recipe."""
    folder = tmp_path / "model"
    build_model("llama", dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "corpus.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    recipe = RECIPE.with_fields({"values.steps": 5})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    words = [*MAKE_KEYS, folder, "--text", tmp_path / "corpus.txt"]
    words += ["--layers", "1-2", "--window", "64", "--quiet"]
    assert CliRunner().invoke(cli, [str(w) for w in words]).exit_code == 0
    return folder


@pytest.mark.parametrize("largest", ["0.02", "100"])
def test_a_method_from_outside_edits_within_its_bound(
    model, own_methods, monkeypatch, capsys, largest
):
    script = EXAMPLES / "add_a_method.py"
    words = [str(model), "--recipe", str(model.parent / "recipe.yaml"), "--largest", largest]
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"^efficacy +\d+\.\d % of 3$", said, re.M)
    shares = [float(x) for x in re.findall(r"‖Δ‖/‖W₀‖ ([\d.]+)", said)]
    assert len(shares) == 2
    if largest == "0.02":
        assert shares == pytest.approx([0.02, 0.02], abs=1e-4), "the bound is met and not passed"
    else:
        assert all(0.02 < share < 100 for share in shares), "unbounded it would go further"
    assert methods.find_method("clipped").paper == "examples/add_a_method.py"
    listed = CliRunner().invoke(cli, ["methods", "clipped"]).stdout
    assert "largest (default 0.05)" in listed
    assert "docs/methods" not in listed, "it has no page"
