"""Statistics of keys and of inputs in one pass: those of two, whatever ends it in between."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.cli import done, refused
from support.models import LINES, RECIPE, build_model
from support.ranks import launch

from nulledit import Editor
from nulledit.config import StatisticsSettings
from nulledit.data.corpus import open_corpus
from nulledit.errors import StatisticsError
from nulledit.linalg.spectrum import Block, Spectrum
from nulledit.methods.gates import GateSettings, TextInputs, gate_directions
from nulledit.models.editable_model import EditableModel
from nulledit.models.load import model_hash
from nulledit.parallel.ranks import Ranks
from nulledit.statistics import collect as module
from nulledit.statistics import sums as sums_module
from nulledit.statistics.collect import collect, collect_together
from nulledit.statistics.found import check_there, find_statistics
from nulledit.statistics.spectra import Statistics

BOTH = ("keys", "inputs")
SETTINGS = [
    StatisticsSettings(window=16),
    StatisticsSettings(window=16, packing="lines", tokens=1100),
    StatisticsSettings(window=16, count_first=False, names=True),
]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(LINES * 12), encoding="utf-8")
    return open_corpus(tmp_path / "text.txt")


@pytest.fixture
def passes(tokenizer, corpus, tmp_path):
    """Reads the text of one model: `passes(of, folder)`."""
    model = EditableModel(build_model("llama"), tokenizer)
    given = {"layers": (0, 2), "name": "tiny", "model_hash": model_hash(model.model)}

    def read(of, folder, settings=SETTINGS[0], **more):
        place = tmp_path / folder if folder else None
        given_here = {**given, "folder": place, "positions": 48, **more}
        if isinstance(of, str):
            return collect(model, corpus, settings, inputs=of == "inputs", **given_here)
        return collect_together(Ranks(), model, corpus, settings, of=of, **given_here)

    return read


def same_statistics(folder, expected, layers=(0, 2)):
    told = [json.loads((place / "manifest.json").read_text()) for place in (folder, expected)]
    for manifest in told:
        del manifest["sha256"]  # where it went on, sums are in another order
    assert told[0] == told[1]
    a, b = (load_file(place / "moments.safetensors") for place in (folder, expected))
    assert a.keys() == b.keys() == {f"sum.{i}" for i in layers}
    for name, total in b.items():
        assert float((a[name] - total).norm() / total.norm()) < 1e-12


def content(found):
    return found.manifest, {i: s.eigenvalues.tolist() for i, s in found.spectra.items()}


@pytest.mark.parametrize("settings", SETTINGS)
def test_one_pass_equals_two(passes, tmp_path, settings):
    together = passes(BOTH, "both", settings)
    assert tuple(together) == BOTH
    for kind in BOTH:
        alone = passes(kind, kind, settings)
        same_statistics(tmp_path / "both" / kind, tmp_path / kind)
        assert content(alone) == content(together[kind])
    assert together["keys"].manifest.windows == together["inputs"].manifest.windows


def test_one_pass_runs_the_model_once(passes, tmp_path, monkeypatch):
    runs = []
    run = EditableModel.run
    monkeypatch.setattr(EditableModel, "run", lambda *a, **k: runs.append(1) or run(*a, **k))
    passes("keys", "keys")
    alone = len(runs)
    passes(BOTH, "both")
    assert len(runs) - alone <= alone + 2, "besides finding the form of two MLPs"


@pytest.mark.parametrize("calls", [3, 4])
def test_a_pass_that_ends_between_two_savings_goes_on(passes, tmp_path, monkeypatch, calls):
    """Each kind is saved by itself: one may be ahead, and nothing of it is counted twice."""
    save, saved = sums_module.save_alone, []

    def dies(*args):
        saved.append(args)
        if len(saved) == calls:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(module, "SORTED_TOKENS", 256)
    monkeypatch.setattr(module._Pace, "due", lambda _self: True)
    with monkeypatch.context() as patch:
        patch.setattr(sums_module, "save_alone", dies)
        with pytest.raises(KeyboardInterrupt):
            passes(BOTH, "cut")
    begun = []
    passes(BOTH, "cut", progress=lambda _stage, tokens, _total: begun.append(tokens))
    whole = []
    passes(BOTH, "whole", progress=lambda _stage, tokens, _total: whole.append(tokens))
    assert len(begun) < len(whole)
    for kind in BOTH:
        same_statistics(tmp_path / "cut" / kind, tmp_path / "whole" / kind)
        assert not (tmp_path / "cut" / kind / "partial.safetensors").exists()


def test_what_one_kind_has_is_not_read_again(passes, tmp_path, monkeypatch):
    """Also where its own pass was cut off, and where it is complete."""

    def dies(*_told):
        if (tmp_path / "cut/inputs/partial.safetensors").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "SAVE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            passes("inputs", "cut/inputs", progress=dies)
    passes("keys", "whole/keys")
    for folder in ("cut", "whole"):
        passes(BOTH, folder)
        for kind in BOTH:
            passes(kind, f"{folder}-{kind}")
            same_statistics(tmp_path / folder / kind, tmp_path / f"{folder}-{kind}")


def test_the_cache_finds_each(passes):
    found = passes(BOTH, None)
    for kind in BOTH:
        digest = found[kind].manifest.model_hash
        again = list(find_statistics(digest, (0, 2), inputs=kind == "inputs"))
        assert [content(s) for s in again] == [content(found[kind])]


def test_what_tokens_are_worth_is_counted_by_expert(passes):
    """An expert is given some of the tokens, for directions of its own."""
    dense = passes("keys", "dense")
    n, d = dense.manifest.tokens, 48
    assert (dense.excess(), dense.excess(2)) == (d / (n - d), d / (2 * n - d))
    blocks = {i: Block.of(torch.eye(8, dtype=torch.float64)) for i in (0, 1)}
    mixture = {0: Spectrum.joined(blocks, tokens=(12, 20, 3))}  # the third is left alone
    found = replace(dense, spectra=mixture)
    assert (found.excess(), found.excess(2)) == (8 / (16 - 8), 8 / (32 - 8))
    few = {0: Spectrum.joined(blocks, tokens=(8, 8, 3))}
    assert replace(dense, spectra=few).excess() is None
    assert replace(dense, spectra=dense.spectra | mixture).excess() == max(1.0, d / (n - d))


@pytest.mark.parametrize("kind", BOTH)
def test_a_folder_of_one_kind_is_known_without_its_tensors(passes, tmp_path, kind):
    passes(BOTH, "both")
    shutil.copytree(tmp_path / "both" / kind, tmp_path / "made" / kind)
    for tensors in (tmp_path / "made" / kind).glob("*.safetensors"):
        tensors.write_bytes(b"")
    check_there(tmp_path / "made")
    for manifest in (tmp_path / "made").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(StatisticsError, match="no readable manifest"):
        check_there(tmp_path / "made")


def test_a_compact_file_of_inputs_serves_gates(passes, tmp_path):
    found = passes("inputs", "full", StatisticsSettings(window=64))
    found.save_compact(tmp_path / "small", {})
    small = Statistics.load(tmp_path / "small")
    assert (small.manifest, small.checked) == (found.manifest, True)
    width = 17
    held = load_file(tmp_path / "small")["inverse.2"]
    assert (held.dtype, len(held)) == (torch.float16, width * (width - 1) // 2)
    generator = torch.Generator().manual_seed(0)
    for layer, spectrum in found.spectra.items():
        full, read = TextInputs.of(spectrum), TextInputs.of(small.spectra[layer])
        inputs = torch.linalg.cholesky(full.moment) @ torch.randn(
            width - 1, 6, generator=generator, dtype=torch.float64
        )
        a, b = (gate_directions(text.moment, inputs, GateSettings()) for text in (full, read))
        drive, moved = ((g * (full.moment @ g)).sum(0).sqrt() for g in (a, b - a))
        assert float((moved / drive).max()) < 2e-3, "what text drives the gate with"
        torch.testing.assert_close(read.energies(inputs), full.energies(inputs), rtol=5e-3, atol=0)


def test_a_wrong_compact_file_of_inputs_is_refused(passes, tmp_path):
    passes("inputs", "full").save_compact(tmp_path / "small", {})
    with safe_open(tmp_path / "small", "pt") as opened:
        metadata = opened.metadata()
    whole = load_file(tmp_path / "small")
    del metadata["sha256"]
    for name, change, words in (
        ("inverse.0", lambda t: t[1:], "inverse.0 has the shape"),
        ("inverse.0", lambda t: t * torch.inf, "not finite"),
        ("diagonals.0", lambda t: t[:1], "diagonals.0 has the shape"),
        ("diagonals.0", lambda t: -t, "not all above 0"),
        ("diagonals.0", lambda t: t * 1e-300, "no second moment"),
        ("diagonals.0", lambda t: t[:, :0], "0 wide"),
    ):
        wrong = {**whole, name: change(whole[name]).contiguous()}
        save_file(wrong, tmp_path / "wrong", metadata)
        with pytest.raises(StatisticsError, match=words):
            Statistics.load(tmp_path / "wrong")


@pytest.fixture
def commands(place, tmp_path):
    """The words of `stats make` of both kinds."""
    return (
        *("stats", "make", place / "model", "--text", place / "corpus.txt", "--layers", "1-2"),
        *("--window", "16", "--keys", "--inputs", "--out", tmp_path / "both"),
    )


def test_the_command_makes_both_and_edit_takes_what_it_needs(place, commands, tmp_path):
    told = json.loads(done(*commands, "--json", "--quiet").stdout)
    assert list(told) == ["keys", "inputs"]
    assert [told[kind]["manifest"]["inputs"] for kind in told] == [False, True]
    shown = json.loads(done("stats", "show", tmp_path / "both", "--json").stdout)
    assert shown == told
    alone = json.loads(done("stats", "show", tmp_path / "both/inputs", "--json").stdout)
    assert alone == told["inputs"]
    assert done("stats", "show", tmp_path / "both").stdout.count("layer") >= 2
    said = refused(*commands, "--compact", tmp_path / "small", "--quiet")
    assert "--compact is a file of one kind" in said
    for method, width in (("alphaedit", 48), ("gated", 17)):
        editor = Editor.from_pretrained(
            str(place / "model"),
            recipe=RECIPE.with_fields({"method": {"name": method}, "layers": [1]}),
            statistics=tmp_path / "both",
        )
        editor.edit({"subject": "Ada Byron", "prompt": "{} lives in", "target": "Velm"})
        held = editor.history.tensors[editor.history.epoch.tensors]
        assert max(len(t) for name, t in held.items() if name.startswith("eigenvalues")) == width
    assert Statistics.load(tmp_path / "both").manifest.inputs is False
    assert Statistics.load(tmp_path / "both", kind="inputs").manifest.inputs is True


def test_two_ranks_make_both_and_go_on(tokenizer, corpus, tmp_path):
    """One is killed after it has saved keys a second time, and before it has saved inputs."""
    build_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    make = ("stats", "make", tmp_path / "model", "--text", tmp_path / "text.txt", "--window", "16")
    make += ("--layers", "1-2", "--quiet", "--out")
    both = (*make, tmp_path / "both", "--keys", "--inputs")
    often = {
        "nulledit.statistics.collect:ROUND": 1,
        "nulledit.statistics.collect:SAVE_EVERY": 0.0,
        "nulledit.statistics.collect:SORTED_TOKENS": 256,
    }
    dies = (0, "nulledit.statistics.sums:save_alone", 4)
    ranks = launch(tmp_path, both, both, dies=dies, before=often)
    assert ranks[0].code == -9
    assert (tmp_path / "both/inputs/partial.safetensors").is_file()
    ranks = launch(tmp_path, both, both, before=often)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    for kind in BOTH:
        done(*make, tmp_path / kind, f"--{kind}")
        same_statistics(tmp_path / "both" / kind, tmp_path / kind, (1, 2))
