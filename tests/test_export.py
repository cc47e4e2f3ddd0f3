"""Edits as artefacts: adapter, delta and checkpoint give the run's model, or say what they miss."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.exports import gap, logits
from support.models import FAMILIES, LINES, RECIPE, build_model, statistics_of
from transformers import AutoModelForCausalLM

from nulledit import Editor, Fact, NullEditError
from nulledit.cli.apply import apply
from nulledit.cli.export import cost_lines, exactly, export
from nulledit.config import Recipe
from nulledit.errors import ConfigError, LedgerError, ModelError
from nulledit.evaluation.queries import Query
from nulledit.evaluation.scores import probabilities
from nulledit.export import (
    apply_delta,
    put_delta,
    remove_delta,
    write_checkpoint,
    write_delta,
    write_lora,
)
from nulledit.export.base_name import hub_id
from nulledit.export.card import SHOWN, _cost
from nulledit.export.delta import read_delta
from nulledit.export.factors import factorise, ordered_sum, relative_error
from nulledit.export.ranks import SERVED, padded, served_rank
from nulledit.export.updates import Export, shard_bytes
from nulledit.models.editable_model import EditableModel
from nulledit.models.load import load_model, model_hash
from nulledit.statistics.collect import key_moments
from nulledit.statistics.spectra import Statistics

peft = pytest.importorskip("peft")
LENGTH = 12  # tokens of a text


# -- factors ---------------------------------------------------------------------------------


def product(d_out, d_in, rank, *, seed=0, spread=1e4):
    """A matrix of `rank`, singular values from 1 to 1/`spread`."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64)).Q
        for d in (d_out, d_in)
    )
    return left * torch.logspace(0, -torch.tensor(spread).log10(), rank).double() @ right.mT


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (33, 33)])
@pytest.mark.parametrize("rank", [1, 7, 33])
def test_an_update_of_low_rank_is_its_factors(shape, rank):
    update = product(*shape, rank)
    found = factorise(update, columns=rank + 2)
    assert (found.rank, found.of) == (rank, rank)
    assert found.exact
    assert found.error == pytest.approx(float((update - found.left @ found.right).norm()), abs=1e-9)
    again = factorise(update, columns=rank + 2)
    assert torch.equal(found.left, again.left), "the same call gives the same bits"


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_a_cut_is_the_best_of_its_rank(shape):
    torch.manual_seed(0)
    full = torch.randn(shape, dtype=torch.float64)
    for update, columns in ((product(*shape, 12, spread=10), 12), (full, 3)):
        values = torch.linalg.svdvals(update)
        for rank in (1, 5, 11):
            found = factorise(update, columns=columns, most=rank)
            best = float(values[rank:].norm() / values.norm())
            assert found.rank == rank
            assert found.error == pytest.approx(best, rel=1e-6)
            assert not found.exact
    assert factorise(full, columns=3, full_rank=6).rank == 6
    assert factorise(full, columns=3, full_rank=6).of == 20


def test_what_rounding_added_is_no_rank():
    base = 100 * torch.randn(30, 60, dtype=torch.float64)
    update = 1e-3 * product(30, 60, 4, spread=10)
    noisy = (base + update) - base
    noise = torch.finfo(torch.float64).eps * float(base.norm())
    assert factorise(noisy, columns=10, noise=noise).rank == 4


def test_no_update_has_no_factors():
    found = factorise(torch.zeros(5, 7, dtype=torch.float64), columns=3)
    assert (found.rank, found.error) == (0, 0.0)


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 12), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_the_ordered_sum_adds_one_term_after_the_other(d_out, d_in, rank, seed):
    torch.manual_seed(seed)
    base, left, right = torch.randn(d_out, d_in), torch.randn(d_out, rank), torch.randn(rank, d_in)
    slow = torch.zeros(d_out, d_in, dtype=torch.float64)
    for k in range(rank):
        slow = slow + torch.outer(left[:, k].double(), right[k].double())
    assert torch.equal(ordered_sum(base, left, right), slow + base.double())


def test_relative_error_over_many_rows():
    update = torch.randn(600, 5, dtype=torch.float64)
    left, right = torch.randn(600, 2), torch.randn(2, 5)
    gap = (update - left.double() @ right.double()).norm() / update.norm()
    assert relative_error(update, left, right) == pytest.approx(float(gap))


def test_ranks_are_padded_with_nothing():
    assert [served_rank(r) for r in (1, 2, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]
    assert served_rank(SERVED[-1] + 1) == 513, "only neurons come to that, and are never cut"
    left, right = torch.randn(4, 3), torch.randn(3, 6)
    wide = padded(left, right, 8)
    assert [tuple(t.shape) for t in wide] == [(4, 8), (8, 6)]
    assert torch.allclose(wide[0] @ wide[1], left @ right)


# -- a run of each family --------------------------------------------------------------------


class Place:
    """An edited tiny model, its base in a folder, and the run's folder."""

    def __init__(self, folder, model, tokenizer, recipe, statistics, facts):
        self.folder, self.base, self.run = folder, folder / "base", folder / "run"
        model.save_pretrained(self.base, max_shard_size="20KB")
        tokenizer.save_pretrained(self.base)
        self.editor = Editor(
            model, tokenizer, recipe=recipe, statistics=statistics, name=str(self.base)
        )
        self.editor.edit(facts)

    def base_model(self, dtype=None):
        return load_model(str(self.base), dtype=dtype or self.editor.history.base.dtype)[0]


@pytest.fixture(scope="module")
def places(tmp_path_factory, tokenizer):
    """`places("gpt2", torch.float32)`: made when first asked for."""
    made = {}

    def get(family="llama", dtype=torch.float64, facts=None, recipe=RECIPE, key=""):
        name = (family, dtype, key)
        if name not in made:
            model = build_model(family, dtype=dtype)
            place = Place(
                tmp_path_factory.mktemp("export"),
                model,
                tokenizer,
                recipe.with_fields({"values.steps": 4}),
                statistics_of(model, tokenizer),
                facts or FACTS,
            )
            made[name] = place
        return made[name]

    return get


FACTS = [
    Fact(id="ada", subject="Ada Byron", prompt="The mother tongue of {} is", target="Velmish"),
    Fact(id="zola", subject="Émile Zola", prompt="{} was born in", target="Ostrel"),
    Fact(id="velm", subject="Velm", prompt="The harbour of {} lies on the", target="river"),
]


@pytest.mark.parametrize("write", [write_lora, write_delta, write_checkpoint])
def test_no_export_names_a_folder_of_the_machine(write, tokenizer, tmp_path):
    """What is shared says what the base is called, not where it lay."""
    home = tmp_path / "somebody" / "models" / "base"
    model = build_model("llama", dtype=torch.float32)
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    statistics = statistics_of(model, tokenizer)
    editor = Editor(model, tokenizer, recipe=RECIPE, statistics=statistics, name=str(home))
    editor.edit(FACTS[:1])
    write(editor, tmp_path / "out")
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert b"somebody" not in file.read_bytes(), file.name
    if write is not write_checkpoint:  # which needs no base to be loaded
        assert '"base"' in (tmp_path / "out/README.md").read_text()


# -- LoRA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_the_edited_model_in_peft(family, places, tmp_path):
    place = places(family)
    done = write_lora(place.editor, tmp_path / "adapter", dtype="float64")
    assert done.rank == 8
    assert done.cost is None
    assert all(layer.rank == layer.of == len(FACTS) for layer in done.layers)
    assert all(layer.error < 1e-10 for layer in done.layers)
    assert done.bytes == sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (family == "gpt2"), "PEFT mends it, servers may not"
    edited = logits(place.editor.model)
    base = place.base_model()
    unedited = logits(base)
    assert gap(unedited, edited) > 1e-3
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    bare = {name for name, m in adapted.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert bare == {layer.parameter.removesuffix(".weight") for layer in done.layers}
    assert gap(logits(adapted), edited) < 1e-10
    merged = adapted.merge_and_unload()
    assert gap(logits(merged), edited) < 1e-10
    for layer in done.layers:
        exact = place.editor.model.get_parameter(layer.parameter)
        assert torch.allclose(merged.get_parameter(layer.parameter), exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_coarser_factors_cost_is_said(dtype, places, tmp_path):
    """A number rounded to a dtype is off by at most half its eps; a product of two by eps."""
    place = places("gpt2", torch.float32)
    done = write_lora(place.editor, tmp_path / "adapter", dtype=dtype)
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert all(0 < layer.error < eps for layer in done.layers)
    assert all(layer.key_error > 0 for layer in done.layers)
    assert (done.cost is not None) == (dtype != "float32")
    base = place.base_model()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    # The adapter adds BAx to W₀x where the run's model rounds W₀ + Δ: each to eps of its dtype,
    # through four blocks.
    assert gap(logits(adapted), logits(place.editor.model)) < 100 * eps


def test_an_adapter_cut_by_rank_says_what_it_misses(places, tmp_path):
    place = places("llama")
    editor = place.editor
    before = model_hash(editor.model)
    done = write_lora(editor, tmp_path / "adapter", rank=1, dtype="float64")
    assert done.rank == 1
    assert model_hash(editor.model) == before, "measuring leaves the model as it was"
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for layer in done.layers:
        module = f"base_model.model.{layer.parameter.removesuffix('.weight')}"
        update = editor.weights.exact(layer.layer) - editor.weights.base(layer.layer)
        stored = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        best = torch.linalg.svdvals(update)
        assert layer.error == pytest.approx(float((update - stored).norm() / update.norm()))
        assert layer.error == pytest.approx(float(best[1:].norm() / best.norm()))
        keys = editor.history.column_tensor(editor.history.active, f"keys.{layer.layer}").mT
        missed = float(((update - stored) @ keys).norm() / (update @ keys).norm())
        assert layer.key_error == pytest.approx(missed)
    adapted = peft.PeftModel.from_pretrained(place.base_model(), tmp_path / "adapter")
    cost, facts = done.cost, editor.facts
    assert cost.facts == len(facts)
    for model, nll, strict in (
        (editor.model, cost.exact_nll, cost.exact_strict),
        (adapted, cost.stored_nll, cost.stored_strict),
    ):
        losses = [target_loss(model, editor, fact) for fact in facts]
        assert nll == pytest.approx(sum(loss for loss, _ in losses) / len(facts), rel=1e-5)
        assert strict == sum(said for _, said in losses)
    assert cost.worst > 0


@torch.no_grad()
def target_loss(model, editor, fact):
    """Mean loss of a fact's target, and whether it is said, one text at a time."""
    row = editor.editable.encoder.encode(fact.render(fact.prompt), target=fact.target)
    found = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    told = [found[p] for p in range(row.target_start - 1, len(row.ids) - 1)]
    hits = [int(t.argmax()) == i for t, i in zip(told, row.target_ids, strict=True)]
    return -sum(float(t[i]) for t, i in zip(told, row.target_ids, strict=True)) / len(told), all(
        hits
    )


def test_a_full_rank_update_is_cut_and_said_so(places, tmp_path, recipe):
    changed = recipe.with_fields({"method": {"name": "rect", "moment_weight": 20.0, "keep": 0.4}})
    place = places("llama", recipe=changed, key="rect")
    done = write_lora(place.editor, tmp_path / "adapter", rank=4, dtype="float64")
    assert all(layer.rank == 4 and layer.of == 16 and layer.error > 0.01 for layer in done.layers)
    assert done.cost is not None
    whole = write_delta(place.editor, tmp_path / "delta", dtype="float64")
    assert all(layer.rank == 16 for layer in whole.layers), "all there is, below 512"
    assert all(layer.error < 1e-10 for layer in whole.layers)
    said = CliRunner().invoke(
        export, [str(save(place)), "--as", "delta", "--rank", "2", "--out", str(tmp_path / "cut")]
    )
    assert "Cut, so not exact: layer 1 (2 of 16), 2 (2 of 16)." in said.stdout
    assert "Facts that hold by argmax: " in said.stdout


def test_more_columns_than_servers_take_are_cut(places, tmp_path, monkeypatch):
    from nulledit.export import lora, ranks

    for module in (lora, ranks):
        monkeypatch.setattr(module, "SERVED", (1, 2))
    done = write_lora(places().editor, tmp_path / "adapter")
    assert done.rank == 2
    assert all((layer.rank, layer.of) == (2, len(FACTS)) for layer in done.layers)
    assert done.cost.facts == len(FACTS)


def test_a_fact_to_be_forgotten_holds_if_it_is_not_said(places, monkeypatch):
    from nulledit.export.updates import facts_cost, stored_layers, with_stored

    editor = places().editor
    layers = stored_layers(editor, rank=1, dtype=torch.float64)
    plain = facts_cost(editor, with_stored(editor, layers))
    columns = tuple(replace(c, fact=c.fact.forgotten()) for c in editor.history.columns)
    monkeypatch.setattr(editor._journal, "history", replace(editor.history, columns=columns))
    other = facts_cost(editor, with_stored(editor, layers))
    assert other.exact_strict == len(FACTS) - plain.exact_strict
    assert other.worst == plain.worst
    assert math.isnan(other.exact_nll)
    said = cost_lines(other)
    assert f"{other.exact_strict} in the run's model" in said[0]
    assert said[1].startswith("Loss of the forgotten answers: largest change ")
    assert "nan" not in "".join(said) + _cost(Export("lora", Path(), (), "x", 0, cost=other))
    assert "mean loss of the new answers" in _cost(Export("lora", Path(), (), "x", 0, cost=plain))


def save(place):
    """The place's run folder."""
    if not place.run.exists():
        place.editor.save(place.run)
    return place.run


def test_a_rank_servers_do_not_take_is_refused(places, tmp_path):
    with pytest.raises(ConfigError, match="expected 1 to 512"):
        write_lora(places().editor, tmp_path / "adapter", rank=513)
    assert not (tmp_path / "adapter").exists()


# -- delta -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_goes_on_and_comes_off_to_the_bit(family, dtype, places, tmp_path):
    place = places(family, dtype)
    editor, run = place.editor, save(place)
    done = write_delta(editor, tmp_path / "delta", dtype="float64")
    assert done.same_as_run
    assert done.differing == 0
    applied = apply_delta(tmp_path / "delta", place.base, tmp_path / "on", max_shard_size="20KB")
    assert applied.hash == model_hash(editor.model)
    assert len(list((tmp_path / "on").glob("model-*.safetensors"))) > 1, "sharded"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "on", dtype="auto")
    assert model.dtype == dtype
    assert model_hash(model) == applied.hash
    mark = json.loads((tmp_path / "on" / "nulledit-delta.json").read_text())
    assert mark["base_hash"] == editor.history.base.hash
    for number, origin in enumerate(({"base": place.base}, {"run": run})):
        out = tmp_path / f"off{number}"
        off = remove_delta(tmp_path / "delta", tmp_path / "on", out, **origin)
        assert off.hash == editor.history.base.hash == model_hash(load_model(str(out))[0])
        assert not (out / "nulledit-delta.json").exists()


def test_a_float32_delta_counts_what_differs(places, tmp_path):
    place = places("llama", torch.float32)
    done = write_delta(place.editor, tmp_path / "delta", dtype="float32")
    apply_delta(tmp_path / "delta", place.base, tmp_path / "on")
    model = load_model(str(tmp_path / "on"))[0].state_dict()
    edited = place.editor.model.state_dict()
    assert done.differing == sum(int((model[k] != edited[k]).sum()) for k in edited)
    assert done.same_as_run == (done.differing == 0)
    for layer in done.layers:
        gaps = (model[layer.parameter] - edited[layer.parameter]).abs()
        assert float(gaps.max()) <= 2 * torch.finfo(torch.float32).eps * float(
            edited[layer.parameter].abs().max()
        )


def test_a_delta_is_not_put_on_anything_else(places, tmp_path):
    place, other = places("llama", torch.float32), places("gpt2", torch.float32)
    write_delta(place.editor, tmp_path / "delta")
    with pytest.raises(ModelError, match="it is of another model"):
        apply_delta(tmp_path / "delta", other.base, tmp_path / "on")
    model, tokenizer = load_model(str(place.base))
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(tmp_path / "near")
    tokenizer.save_pretrained(tmp_path / "near")
    with pytest.raises(ModelError, match="is not the base of this delta"):
        apply_delta(tmp_path / "delta", tmp_path / "near", tmp_path / "on")
    with pytest.raises(ModelError, match="is not the base with this delta"):
        remove_delta(tmp_path / "delta", place.base, tmp_path / "off", base=place.base)
    apply_delta(tmp_path / "delta", place.base, tmp_path / "on")
    with pytest.raises(LedgerError, match="needs W₀"):
        remove_delta(tmp_path / "delta", tmp_path / "on", tmp_path / "off")
    with pytest.raises(ModelError, match="is not the base of this delta"):
        remove_delta(tmp_path / "delta", tmp_path / "on", tmp_path / "off", base=tmp_path / "near")
    with pytest.raises(LedgerError, match="the run of another base"):
        remove_delta(tmp_path / "delta", tmp_path / "on", tmp_path / "off", run=save(other))
    with pytest.raises(ModelError, match="has this delta on it already"):
        apply_delta(tmp_path / "delta", tmp_path / "on", tmp_path / "twice")
    with pytest.raises(LedgerError, match="exists already"):
        apply_delta(tmp_path / "delta", place.base, tmp_path / "on")
    assert not (tmp_path / "off").exists()
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"


@pytest.fixture
def delta(places, tmp_path):
    """A good delta that may be damaged."""
    write_delta(places("llama", torch.float32).editor, tmp_path / "delta", dtype="float32")
    return tmp_path / "delta"


def rewrite(delta, **changes):
    file = delta / "manifest.json"
    content = json.loads(file.read_text())
    for name, value in changes.items():
        content[name] = value
    file.write_text(json.dumps(content))


def test_damage_is_found_by_hash(delta):
    file = delta / "delta.safetensors"
    raw = file.read_bytes()
    for place in (0, 9, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(LedgerError, match=r"delta\.safetensors: damaged: its hash is"):
            read_delta(delta)
    for other in (raw[:-1], raw + b"\0", b""):
        file.write_bytes(other)
        with pytest.raises(LedgerError, match=r"delta\.safetensors: damaged: it has \d+ bytes"):
            read_delta(delta)
    file.unlink()
    with pytest.raises(LedgerError, match="missing, but the manifest names it"):
        read_delta(delta)


def test_a_size_is_refused_before_it_is_read(delta, monkeypatch):
    from nulledit.export import delta as module

    monkeypatch.setattr(module, "sha256_of", lambda _: pytest.fail("it was read"))
    file = delta / "delta.safetensors"
    size = 2**40
    with file.open("r+b") as opened:
        opened.truncate(size)  # sparse: a terabyte on no disk
    with pytest.raises(LedgerError, match="damaged: it has 1099511627776 bytes"):
        read_delta(delta)
    rewrite(delta, bytes=size)
    with pytest.raises(LedgerError, match="but the shapes need"):
        read_delta(delta)
    layers = json.loads((delta / "manifest.json").read_text())["layers"]
    layers[0]["shape"] = [2**30, 2**30]
    rewrite(delta, layers=layers)
    with pytest.raises(LedgerError, match="shape is 1073741824; expected a whole number"):
        read_delta(delta)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "not the manifest of a delta"),
        ({"version": 3}, "format version 3; this nulledit reads 1 and 2"),
        ({"layers": []}, r"layers is \[\]; expected some"),
        ({"layers": "x"}, "layers is 'x'; expected a list"),
        ({"layers": [1]}, "layers is 1; expected named settings"),
        ({"base_hash": "../../etc/passwd"}, "base_hash is .*; expected a SHA-256"),
        ({"dtype": "object"}, "dtype is 'object'; expected one of"),
        ({"dtype": ["float32"]}, "dtype is .*; expected one of"),
        ({"facts": [1]}, "facts is 1; expected text"),
        ({"bytes": True}, "bytes is True; expected a whole number"),
        ({"sha256": None}, "sha256 is None; expected a SHA-256"),
    ],
)
def test_a_bad_manifest_is_named(changes, said, delta):
    rewrite(delta, **changes)
    with pytest.raises(LedgerError, match=said):
        read_delta(delta)


def test_tensors_that_are_not_the_manifests(delta):
    file = delta / "delta.safetensors"
    good = load_file(file)

    def refused(tensors, said):
        from nulledit.io.files import sha256_of

        save_file(tensors, file)
        rewrite(delta, sha256=sha256_of(file), bytes=file.stat().st_size)
        with pytest.raises(LedgerError, match=said):
            read_delta(delta)

    name = next(iter(good))
    refused({**good, "more": torch.zeros(1)}, "other tensors than the manifest names")
    refused({**good, name: good[name].mT.contiguous()}, "another shape")
    refused({**good, name: good[name] * torch.nan}, "not of finite float32 numbers")
    refused({**good, name: good[name].view(torch.int32)}, "not of finite float32 numbers")
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    from nulledit.io.files import sha256_of

    rewrite(delta, sha256=sha256_of(file), bytes=file.stat().st_size)
    with pytest.raises(LedgerError, match="not a safetensors file"):
        read_delta(delta)


def test_a_forged_result_is_not_written(delta, places, tmp_path):
    rewrite(delta, result_hash="0" * 64)
    with pytest.raises(NullEditError, match="do not belong together") as found:
        apply_delta(delta, places("llama", torch.float32).base, tmp_path / "on")
    assert found.value.exit_code == 1
    assert not (tmp_path / "on").exists()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_manifest_is_read_or_refused_in_one_line(tmp_path_factory, places, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        write_delta(places("llama", torch.float32).editor, folder)
    text = (folder / "manifest.json").read_text()
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    junk = data.draw(st.text(max_size=12))
    other = folder.with_name("fuzzed-other")
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(folder, other)
    changed = (text[:start] + junk + text[end:]).encode("utf-8", "surrogatepass")
    (other / "manifest.json").write_bytes(changed)
    said = ""
    try:
        read_delta(other)
    except LedgerError as error:
        said = str(error)
    assert "\n" not in said


# -- checkpoint ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [
        (7, 7),
        ("7", 7),
        ("20KB", 20_000),
        ("5GiB", 5 * 2**30),
        ("3MB", 3_000_000),
        ("2TB", 2 * 10**12),
    ],
)
def test_a_shard_size_is_bytes_or_a_text_of_them(size, bytes_):
    assert shard_bytes(size) == bytes_


@pytest.mark.parametrize("size", ["0", 0, -1, "5B", "GB", "5 GB", "1e9", "5gb", "5GiBs", True])
def test_another_shard_size_is_refused(size):
    with pytest.raises(ConfigError, match="expected bytes, or a size"):
        shard_bytes(size)


@pytest.mark.parametrize("size", [20_000, "20000", "20KiB"])
def test_a_checkpoint_has_shards_of_any_size_that_may_be_asked(size, places, tmp_path):
    write_checkpoint(places("llama").editor, tmp_path / "model", max_shard_size=size)
    files = list((tmp_path / "model").glob("model-*.safetensors"))
    assert len(files) > 1
    assert Editor.from_pretrained(str(tmp_path / "model")).editable.depth > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_the_runs_model(family, places, tmp_path):
    place = places(family, torch.bfloat16)
    done = write_checkpoint(place.editor, tmp_path / "model", max_shard_size="20KB")
    model, tokenizer = load_model(str(tmp_path / "model"))
    assert model.dtype == torch.bfloat16
    assert model_hash(model) == model_hash(place.editor.model)
    assert tokenizer("Ada Byron")["input_ids"] == place.editor.tokenizer("Ada Byron")["input_ids"]
    files = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(files) > 1
    held = {name for file in files for name in safe_open(file, "pt").keys()}
    tied = model.config.tie_word_embeddings
    assert ("lm_head.weight" in held) == (not tied), "tied weights are stored once"
    for layer in done.layers:
        exact, base = (
            place.editor.weights.exact(layer.layer),
            place.editor.weights.base(layer.layer),
        )
        rounding = (exact.to(torch.bfloat16).double() - exact).norm() / (exact - base).norm()
        assert layer.rounding_share == pytest.approx(float(rounding))


NASTY = [
    "<script>alert(1)</script>",
    "](javascript:alert(1)) [x](http://e.x)",
    "| a | b |\n| --- | --- |",
    "![x](http://e.x/x.png) http://e.x www.e.x",
    "`code` **bold** $$x$$ \u202e <!-- -->",
    "```\n---\nlicense: evil\n---",
]


def test_untrusted_facts_stay_text_in_the_card(places, tmp_path):
    facts = [
        Fact(id=f"n{i} {text[:3]}".strip(), subject=f"S{i} {text}", prompt="{} is", target=f"x {i}")
        for i, text in enumerate(NASTY)
    ]
    place = places("llama", facts=facts, key="nasty")
    write_checkpoint(place.editor, tmp_path / "model", run="../`x`\n# run")
    text = (tmp_path / "model" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"library_name", "pipeline_tag", "tags"}
    tokens = list(walk(MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)))
    kinds = {token.type for token in tokens}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "strong_open", "hr"}
    rows = sum(token.type == "tr_open" for token in tokens)
    layers = len(place.editor.weights.layers)
    assert rows == (1 + 6) + (1 + len(facts)) + (1 + layers), "no row came from a fact"
    assert sum(token.type == "heading_open" for token in tokens) == 7
    shown = "".join(token.content for token in tokens if token.type == "text")
    assert "alert(1)" in shown
    assert "\u202e" not in text


def walk(tokens):
    for token in tokens:
        yield token
        yield from walk(token.children or [])


def test_the_card_says_what_was_done(places, tmp_path):
    many = [
        Fact(id=f"f{i}", subject=f"Person {i} Dun", prompt="{} works as a", target="sailor")
        for i in range(SHOWN + 3)
    ]
    changed = {"values.steps": 1, "batch_size": 100}

    place = places("llama", facts=many, recipe=RECIPE.with_fields(changed), key="many")
    rate = {"mean": 0.5, "standard_error": 0.1, "n": 4}
    side = {"rates": {"efficacy": rate}, "generation": None, "perplexity": None}
    state = place.editor.history.state_id
    call = {"facts": 4, "before": side, "after": side, "state": state}
    summary = {"state": state, "runs": [call]}
    for number, (given_summary, said) in enumerate(
        [
            (summary, "An evaluation of this state"),
            ({**summary, "runs": [call | {"state": "x"}]}, "of an earlier state of the run"),
            (None, None),
            ({"runs": [{"before": 1, "after": 2}]}, None),
            ([], None),
        ]
    ):
        folder = tmp_path / str(number)
        write_checkpoint(place.editor, folder, summary=given_summary)
        text = (folder / "README.md").read_text()
        assert (said in text) if said else ("## Measures" not in text)
        for word in (state, place.editor.history.base.hash, "alphaedit", "3 more", "undo"):
            assert word in text, word
        assert text.count("works as a") == SHOWN


def test_only_what_can_be_on_the_hub_is_named_as_a_base(tmp_path, monkeypatch):
    assert hub_id("gpt2") == "gpt2"
    assert hub_id("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert hub_id("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for name in ("", str(tmp_path), "a/b/c", "x: y", "a\nb", "../x"):
        assert hub_id(name) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert hub_id("gpt2") is None


# -- whatever the kind -----------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_lora, write_delta, write_checkpoint])
def test_nothing_is_overwritten(write, places, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file"):
        with pytest.raises(LedgerError, match="exists already"):
            write(places().editor, tmp_path / name)
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(LedgerError, match="exists already"):
            write(places().editor, tmp_path / name)
    with pytest.raises(LedgerError, match="file is no folder"):
        write(places().editor, tmp_path / "file" / "deep" / "out")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["mine"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "pipe").is_fifo()
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"


def test_without_edits_there_is_nothing_to_export(tiny_model, tokenizer, recipe, tmp_path):
    editor = Editor(tiny_model("llama"), tokenizer, recipe=recipe)
    for write in (write_lora, write_delta):
        with pytest.raises(LedgerError, match="nothing is edited"):
            write(editor, tmp_path / "out")
    write_checkpoint(editor, tmp_path / "out")
    assert model_hash(load_model(str(tmp_path / "out"))[0]) == editor.history.base.hash


def test_the_commands(places, tmp_path):
    place = places("gpt2", torch.float32)
    run = save(place)
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}

    def done(command, *words):
        result = CliRunner().invoke(command, [str(w) for w in words])
        assert result.exit_code == 0, result.output or result.exception
        return result.stdout

    text = done(export, run, "--as", "lora", "--out", tmp_path / "lora")
    assert "Adapter of rank 8 in float32" in text
    assert "‖Δ−BA‖/‖Δ‖" in text
    plain = json.loads(done(export, run, "--out", tmp_path / "delta", "--json"))
    assert (plain["kind"], plain["same_as_run"]) == ("delta", True), "what is exact is the default"
    assert [layer["rank"] for layer in plain["layers"]] == [len(FACTS)] * 2
    text = done(export, run, "--as", "checkpoint", "--out", tmp_path / "model", "-q")
    assert "rounding/‖Δ‖" in text
    done(apply, tmp_path / "delta", place.base, "--out", tmp_path / "on")
    words = (tmp_path / "delta", tmp_path / "on", "--remove", "--out", tmp_path / "off")
    assert "bit for bit" in done(apply, *words, "--run", run)
    after = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    assert after == before, "the run is only read"
    for command, refused, said in (
        (apply, (*words, "--run", run, "--base", run), "give either --base"),
        (apply, words, "give either --base"),
        (apply, (*words[:2], "--out", tmp_path / "x", "--base", run), "go with --remove"),
        (export, (run, "--as", "lora", "--out", "x", "--max-shard-size", "1GB"), "--max-shard"),
        (export, (run, "--as", "checkpoint", "--out", "x", "--rank", "4"), "--rank can't be"),
        (export, (run, "--as", "lora", "--out", tmp_path / "lora"), "exists already"),
        (export, (run, "--as", "checkpoint", "--out", "x", "--max-shard-size", "big"), "5GB"),
        (apply, (*words[:2], "--out", tmp_path / "x", "--max-shard-size", "0GB"), "5GB"),
    ):
        result = CliRunner().invoke(command, [str(w) for w in refused])
        assert isinstance(result.exception, NullEditError)
        assert said in str(result.exception)


def test_bits_are_not_promised_of_full_rank(places, tmp_path, recipe):
    changed = recipe.with_fields({"method": {"name": "ft", "steps": 3}})
    place = places("llama", torch.float32, recipe=changed, key="ft")
    done = write_delta(place.editor, tmp_path / "delta")
    assert all(layer.of == min(layer.shape) for layer in done.layers)
    assert exactly(done) == ""
    thin = write_delta(places("llama", torch.float32).editor, tmp_path / "thin", dtype="float32")
    assert "gives it to the bit" in exactly(thin)


def test_the_card_names_the_run_it_lies_in(places, tmp_path, monkeypatch):
    monkeypatch.chdir(save(places("gpt2", torch.float32)))
    result = CliRunner().invoke(export, [".", "--as", "lora", "--out", str(tmp_path / "lora")])
    assert result.exit_code == 0, result.output or result.exception
    assert "nulledit undo run ID..." in (tmp_path / "lora" / "README.md").read_text()


def test_a_comparison_shows_the_prompt_that_it_asked(places, recipe):
    """One answer, written by one and suppressed by the other, whose facts are worded otherwise."""
    from nulledit.runs.diff import _question, difference

    fact = replace(FACTS[0], relation="known")
    worded = replace(fact.forgotten(), prompt=f"People say of {fact.prompt}")
    editors = []
    for asked in (fact, worded):
        model, tokenizer = load_model(str(places("llama").base))
        kept = statistics_of(model, tokenizer)
        editors.append(Editor(model, tokenizer, recipe=recipe, statistics=kept))
        editors[-1].edit([asked])
    editor, other = editors
    (item,) = difference(editor, other.history).facts
    shown = _question(item, fact.target).removesuffix(f" {fact.target}")
    query = Query("0", "efficacy", shown, fact.target, None)
    assert item.probabilities[fact.target][0] == probabilities(editor.editable, [query])[0]


def test_a_delta_goes_on_where_the_recipe_says_that_w_is(tokenizer, tmp_path):
    """No table and no tracing finds it there."""
    w = "self_attn.o_proj"
    layout = {"blocks": "model.layers", "mlp_out": w, "output": "plain"}
    recipe = Recipe.from_dict({**RECIPE.to_dict(), "layers": [1], "layout": layout})
    model = build_model("llama")
    rows = [tokenizer(line)["input_ids"] for line in LINES]
    moments = key_moments(EditableModel(model, tokenizer, recipe.layout), rows, (1,))
    manifest = replace(statistics_of(model, tokenizer, (1,)).manifest, mlp_out=w)
    kept = Statistics(manifest, {i: found.spectrum() for i, found in moments.items()})
    editor = Editor(model, tokenizer, recipe=recipe, statistics=kept)
    editor.edit(FACTS[:1])
    editor.export(tmp_path / "delta")
    plain = build_model("llama")
    put_delta(plain, tmp_path / "delta")
    assert model_hash(plain) == read_delta(tmp_path / "delta").manifest.result_hash


def test_a_comparison_that_fails_leaves_the_model_as_it_was(places, monkeypatch, recipe):
    """The other ledger edits a layer that this one does not: it must be the base's again."""
    from nulledit.runs import diff as module

    place = places("llama")
    editor, held = place.editor, model_hash(place.editor.model)
    model, tokenizer = load_model(str(place.base))
    fields = {"values.steps": 4, "layers": [0]}
    moved = statistics_of(model, tokenizer)
    other = Editor(model, tokenizer, recipe=recipe.with_fields(fields), statistics=moved)
    other.edit(FACTS[:1])
    assert other.history.layers == (0,)
    assert 0 not in editor.history.layers
    calls = []

    def fails(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [0.0] * 9

    monkeypatch.setattr(module, "probabilities", fails)
    with pytest.raises(KeyboardInterrupt):
        module.difference(editor, other.history)
    assert model_hash(editor.model) == held
