"""What a base or its edited model makes of a text is read once, and found to the bit."""

import os

import pytest
import torch
from support.models import RECIPE, build_model, statistics_of

from nulledit import Editor
from nulledit.evaluation import base_reading, edited_reading, gates_of, read
from nulledit.evaluation import kept_reading as kept
from nulledit.io.files import cache_folder

WINDOWS = [[5, 9, 12, 7, 30], [4, 8, 15], [3]]
OTHERS = [[5, 9, 12, 7, 31], [4, 8, 15]]


@pytest.fixture(autouse=True)
def each_is_worth_it(monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "WORTH", 0.0)
    monkeypatch.setenv("NULLEDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(tokenizer, recipe, make_statistics):
    def editor(dtype=torch.float32, seed=0):
        model = build_model("llama", dtype=dtype, seed=seed)
        return Editor(model, tokenizer, recipe=recipe, statistics=make_statistics(model))

    return editor


@pytest.fixture
def passes(monkeypatch):
    """Windows of each text that was read, not found."""
    told = []

    def reading(model, windows, **options):
        told.append(len(windows))
        return read(model, windows, **options)

    monkeypatch.setattr(kept, "read", reading)
    return told


def files():
    return sorted((cache_folder() / "readings").glob("*"))


def same(a, b):
    return (
        a.windows == b.windows
        and all((x == y).all() for x, y in zip(a.losses, b.losses, strict=True))
        and all(torch.equal(x, y) for x, y in zip(a.states, b.states, strict=True))
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_found_by_another_editor_to_the_bit(make, passes, dtype):
    told = []
    first = base_reading(make(dtype), WINDOWS, progress=lambda *done: told.append(done))
    assert told, "a reading tells how far it is"
    editor = make(dtype)
    again = base_reading(editor, WINDOWS, progress=lambda *done: pytest.fail(str(done)))
    assert passes == [3]
    assert same(first, again)
    now = read(editor.editable, WINDOWS, base=again)
    assert (now.kl.value, now.kl.standard_error) == (0, 0)
    assert now.perplexity == again.perplexity


def test_it_is_of_the_base_whatever_was_edited(make, facts, passes):
    before = base_reading(make(), WINDOWS)
    editor = make()
    editor.edit(facts[:2])
    assert same(before, base_reading(editor, WINDOWS))
    assert passes == [3]
    files()[0].unlink()
    assert same(before, base_reading(editor, WINDOWS)), "read anew, on the base's weights"
    assert read(editor.editable, WINDOWS, base=before).kl.value > 0


def test_another_model_text_or_arithmetic_is_read_anew(make, passes):
    editor = make()
    base_reading(editor, WINDOWS)
    base_reading(editor, OTHERS)
    base_reading(make(seed=1), WINDOWS)
    base_reading(make(torch.bfloat16), WINDOWS)
    editor.model.config.rope_theta = 5.0
    base_reading(editor, WINDOWS)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(threads + 1)
        base_reading(editor, WINDOWS)
        torch.set_float32_matmul_precision("high")
        base_reading(editor, WINDOWS)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    assert len(passes) == len(files()) == 7


def test_a_damaged_one_is_read_anew_and_mended(make, passes):
    editor = make()
    first = base_reading(editor, WINDOWS)
    whole = files()[0].read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        files()[0].write_bytes(broken)
        assert same(first, base_reading(editor, WINDOWS))
        assert files()[0].read_bytes() == whole
    assert len(passes) == 4


def test_the_one_used_longest_ago_goes_first(make, passes, monkeypatch):
    monkeypatch.setattr(kept, "KEPT", 2)
    editor = make()
    texts = [[[i, 7, 9]] for i in range(3)]
    for age, text in enumerate(texts[:2]):
        before = set(files())
        base_reading(editor, text)
        (new,) = set(files()) - before
        os.utime(new, (1000 + age, 1000 + age))
    base_reading(editor, texts[0])  # found, so it is the newest
    base_reading(editor, texts[2])
    assert len(files()) == 2
    base_reading(editor, texts[0])
    assert len(passes) == 3
    base_reading(editor, texts[1])
    assert len(passes) == 4


def test_quick_ones_are_not_kept(make, monkeypatch):
    monkeypatch.setattr(kept, "WORTH", 1000.0)
    base_reading(make(), WINDOWS)
    assert not files()


def test_a_folder_that_cannot_be_written_stops_nothing(make, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    assert len(base_reading(make(), WINDOWS).states) == 2


def test_nothing_is_kept_of_a_quantised_base(make):
    """Another recipe makes other matrices of it dense, and those round otherwise."""
    editor = make()
    object.__setattr__(editor.history.base, "quantized", "own")
    base_reading(editor, WINDOWS)
    assert not files()


@pytest.fixture
def gated(tokenizer):
    """An editor of gated edits on the same tiny model."""

    def editor():
        model = build_model("llama", dtype=torch.float32)
        statistics = statistics_of(model, tokenizer, (1,), inputs=True)
        recipe = RECIPE.with_fields({"layers": [1], "method.name": "gated"})
        return Editor(model, tokenizer, recipe=recipe, statistics=statistics)

    return editor


def alike(a, b):
    return (
        a.windows == b.windows
        and all((x == y).all() for x, y in zip(a.losses, b.losses, strict=True))
        and all((x == y).all() for x, y in zip(a.apart, b.apart, strict=True))
        and a.opening == b.opening
    )


def asked(editor, windows=WINDOWS):
    return edited_reading(
        editor, windows, base_reading(editor, windows), gates=gates_of(editor.weights)
    )


def test_an_edited_model_s_is_found_after_loading(gated, facts, passes, tmp_path):
    editor = gated()
    editor.edit(facts)
    first = asked(editor)
    plain = read(
        editor.editable,
        WINDOWS,
        base=base_reading(editor, WINDOWS),
        gates=gates_of(editor.weights),
    )
    assert first.opening.gates == len(facts)
    assert first.kl.value > 0
    assert alike(first, plain)
    editor.save(tmp_path / "run")  # from where the configuration says its architecture, too
    for _ in range(2):
        assert alike(first, asked(Editor.load(tmp_path / "run")))
    assert passes == [3] * 4


def test_every_state_of_the_edits_has_its_own(gated, facts, passes):
    """And one that was there before is found again: after undo, or a trial that was thrown away."""
    editor = gated()
    none = asked(editor)
    assert none.kl.value == 0
    assert none.opening is None
    editor.edit(facts[:2])
    two = asked(editor)
    with editor.trial():
        editor.edit(facts[2:])
        more = asked(editor)
        assert not alike(two, more)
    assert alike(two, asked(editor))
    editor.restore()
    assert alike(none, asked(editor))
    assert passes == [3] * 4  # the base, and three states


def test_a_model_that_something_else_changed_is_read_as_it_is(make, facts, passes):
    editor = make()
    editor.edit(facts[:2])
    first = asked(editor)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.3.mlp.up_proj.weight"):
        weight = editor.model.get_parameter(name)
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.5)
        changed = asked(editor)
        assert not alike(first, changed)
        with torch.no_grad():
            weight.copy_(before)
        assert alike(first, asked(editor)), "and nothing of that was kept"
    assert passes == [3] * 4
