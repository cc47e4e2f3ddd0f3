"""Statistics: the right numbers, resumable, refused where they don't belong."""

import dataclasses
import json
import sys
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nulledit.cli.main import cli
from nulledit.config import StatisticsSettings
from nulledit.data.corpus import open_corpus, windows
from nulledit.errors import StatisticsError
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import LAYOUTS, mlp_out
from nulledit.models.load import model_hash
from nulledit.statistics import collect as module
from nulledit.statistics.collect import collect
from nulledit.statistics.found import find_statistics
from nulledit.statistics.manifest import Manifest
from nulledit.statistics.merge import merge_statistics
from nulledit.statistics.spectra import Statistics

SETTINGS = StatisticsSettings(window=16)
TEXT = (
    "The river flows to the sea.\n\nAda Byron lives in London, and Karo Dun works as a baker.\n" * 6
)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return open_corpus(tmp_path / "text.txt")


@pytest.fixture
def run(tiny_model, tokenizer, corpus, tmp_path):
    def run(settings=SETTINGS, family="llama", folder="out", **options):
        model = tiny_model(family)
        return model, collect(
            EditableModel(model, tokenizer),
            options.pop("corpus", corpus),
            settings,
            layers=(0, 2),
            name="tiny",
            model_hash=model_hash(model),
            folder=tmp_path / folder,
            **options,
        )

    return run


def plain_moment(model, rows, layer, *, first=0):
    """E[k kᵀ], one window after the other through the whole model."""
    keys = []
    hook = mlp_out(model, LAYOUTS[model.config.model_type], layer).register_forward_pre_hook(
        lambda _m, a: keys.append(a[0][0, first:])
    )
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    hook.remove()
    K = torch.cat(keys).double()
    return K.mT @ K / len(K), len(K)


@pytest.mark.parametrize(
    "settings",
    [
        StatisticsSettings(window=16),
        StatisticsSettings(window=16, packing="lines"),
        StatisticsSettings(window=16, count_first=False),
    ],
    ids=["packed", "lines", "without position 0"],
)
def test_moments_are_the_plain_ones(family, run, tokenizer, corpus, settings):
    model, found = run(settings, family)
    rows = list(
        windows(
            corpus.texts(),
            lambda t: tokenizer(t)["input_ids"],
            window=16,
            packed=settings.packing == "packed",
        )
    )
    for layer in (0, 2):
        expected, count = plain_moment(model, rows, layer, first=0 if settings.count_first else 1)
        spectrum = found.spectra[layer]
        Q = spectrum.whole().eigenvectors
        rebuilt = Q @ torch.diag(spectrum.eigenvalues) @ Q.mT
        torch.testing.assert_close(rebuilt, expected, rtol=1e-6, atol=1e-8)
        assert found.manifest.tokens == count


def test_moments_do_not_depend_on_what_runs_together(run):
    _, one = run(folder="a", positions=16)
    _, all_ = run(folder="b", positions=100_000)
    for layer in (0, 2):
        torch.testing.assert_close(one.spectra[layer].eigenvalues, all_.spectra[layer].eigenvalues)


def test_an_interrupted_run_goes_on(run, tmp_path, monkeypatch):
    _, expected = run(folder="whole", positions=16)
    counted = []

    def dies(_stage, done, _total):
        counted.append(done)
        if len(counted) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(folder="cut", positions=16, progress=dies)
    assert (tmp_path / "cut/partial.safetensors").is_file()
    again = []
    _, found = run(folder="cut", positions=16, progress=lambda _stage, done, _: again.append(done))
    # How much was saved by then is the pace's affair.
    assert again[0] > counted[0], "windows that were counted are not run again"
    assert found.manifest.tokens == expected.manifest.tokens
    for layer in (0, 2):
        torch.testing.assert_close(
            found.spectra[layer].eigenvalues, expected.spectra[layer].eigenvalues
        )
    assert not (tmp_path / "cut/partial.safetensors").exists()


@pytest.fixture
def cut(run, tmp_path, monkeypatch):
    """A folder with the partial sums of a run that was interrupted."""

    def dies(*_told):
        if (tmp_path / "cut/partial.safetensors").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "SAVE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            run(folder="cut", positions=16, progress=dies)
    return tmp_path / "cut"


def flipped(file, at):
    """`file` with one byte of it changed, and put back afterwards."""
    raw = file.read_bytes()
    at %= len(raw)
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def refused_at_every_byte(file, read, step):
    """Whatever is changed in `file`, `read` refuses it in one line that names it or its folder."""
    raw = file.read_bytes()
    for at in (*range(0, len(raw), step), len(raw) - 1):
        file.write_bytes(flipped(file, at))
        with pytest.raises(StatisticsError) as caught:
            read()
        assert str(file.parent) in str(caught.value)
        assert "\n" not in str(caught.value)
        file.write_bytes(raw)
    read()


def test_one_changed_byte_of_any_file_is_refused(run, tmp_path, two_texts):
    made = run(corpus=two_texts["a"])[1]
    run(corpus=two_texts["b"], folder="b")
    made.save_compact(tmp_path / "small/compact.safetensors", {0: 1e-2, 2: 1e-2})
    folder = tmp_path / "out"
    small = tmp_path / "small/compact.safetensors"

    def merge():
        for file in (tmp_path / "merged").glob("*"):
            file.unlink()
        merge_statistics([folder, tmp_path / "b"], tmp_path / "merged")

    refused_at_every_byte(folder / "manifest.json", lambda: Statistics.load(folder), 97)
    refused_at_every_byte(folder / "spectra.safetensors", lambda: Statistics.load(folder), 4999)
    refused_at_every_byte(small, lambda: Statistics.load(small), 1999)
    refused_at_every_byte(folder / "moments.safetensors", merge, 17_989)
    again = lambda: run(corpus=two_texts["a"])  # noqa: E731
    refused_at_every_byte(folder / "moments.safetensors", again, 39_989)


def test_a_changed_byte_of_partial_sums_is_refused(run, cut):
    file, raw = cut / "partial.safetensors", (cut / "partial.safetensors").read_bytes()
    for at in range(0, len(raw), 19_997):
        file.write_bytes(flipped(file, at))
        with pytest.raises(StatisticsError, match="cut"):
            run(folder="cut", positions=16)
        assert not (cut / "manifest.json").exists()
        file.write_bytes(raw)
    run(folder="cut", positions=16)


def test_swapped_eigenvectors_are_refused_by_the_command_line(run, tmp_path):
    run()
    file = tmp_path / "out/spectra.safetensors"
    tensors = load_file(file)
    tensors["eigenvectors.0"] = tensors["eigenvectors.0"].flip(1).contiguous()
    save_file(tensors, file)
    result = CliRunner().invoke(cli, ["stats", "show", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {file}: damaged or changed: its SHA-256")
    assert result.stderr.count("\n") == 1


def test_statistics_from_before_there_were_hashes_load_and_say_so(run, cut, tmp_path, caplog):
    _, made = run()
    assert Statistics.load(tmp_path / "out").checked
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    del manifest["sha256"]
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    made.save_compact(tmp_path / "small.safetensors", {0: 1e-2, 2: 1e-2})
    unhashed(tmp_path / "small.safetensors")
    unhashed(cut / "partial.safetensors")
    for path in (tmp_path / "out", tmp_path / "small.safetensors"):
        caplog.clear()
        found = Statistics.load(path)
        assert not found.checked
        assert found.manifest == made.manifest
        assert f"{path}: made before hashes were kept" in caplog.text
        shown = CliRunner().invoke(cli, ["stats", "show", str(path)]).stdout
        assert "no hashes to check them by" in shown
    caplog.clear()
    run(folder="cut", positions=16)
    assert "partial.safetensors: made before hashes were kept" in caplog.text
    assert Statistics.load(tmp_path / "cut").checked


def unhashed(file):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    del metadata["sha256"]
    save_file(load_file(file), file, metadata)


def test_a_token_budget_ends_the_run(run):
    _, found = run(StatisticsSettings(window=16, tokens=100), positions=16)
    assert 100 <= found.manifest.tokens < 120


def test_fewer_tokens_than_the_width_are_refused(run, tmp_path):
    (tmp_path / "short.txt").write_text("The river.")
    with pytest.raises(StatisticsError, match=r"gives \d+ tokens; the keys are 48 wide"):
        run(corpus=open_corpus(tmp_path / "short.txt"))


def test_full_and_compact_files_read_back(run, tmp_path):
    _, made = run()
    full = Statistics.load(tmp_path / "out")
    assert full.manifest == made.manifest
    thresholds = {layer: float(made.spectra[layer].eigenvalues[30]) for layer in (0, 2)}
    made.save_compact(tmp_path / "small.safetensors", thresholds)
    small = Statistics.load(tmp_path / "small.safetensors")
    assert small.manifest == made.manifest
    keys = torch.randn(48, 5, dtype=torch.float64)
    for layer, threshold in thresholds.items():
        gains = (made.spectra[layer].eigenvalues < threshold).double()
        exact = made.spectra[layer].preconditioner(gains).apply(keys)
        found = small.spectra[layer].preconditioner(
            (small.spectra[layer].eigenvalues < threshold).double()
        )
        assert (found.apply(keys) - exact).norm() / exact.norm() < 5e-3, "half precision"
    size = (tmp_path / "out/spectra.safetensors").stat().st_size
    assert (tmp_path / "small.safetensors").stat().st_size < size / 3


def test_statistics_of_another_model_or_layer_are_refused(run, tiny_model):
    model, made = run()
    made.check(model_hash(model), [0, 2])
    with pytest.raises(StatisticsError, match=r"statistics are of tiny \(weights"):
        made.check(model_hash(tiny_model("llama", seed=3)), [0])
    with pytest.raises(StatisticsError, match=r"layers \[1\] are needed"):
        made.check(model_hash(model), [0, 1])


def test_the_cache_finds_them_again(tiny_model, tokenizer, corpus):
    model = tiny_model("llama")
    hash_ = model_hash(model)
    assert not list(find_statistics(hash_, [0]))
    made = collect(
        EditableModel(model, tokenizer),
        corpus,
        StatisticsSettings(window=16),
        layers=(0, 2),
        name="tiny",
        model_hash=hash_,
    )
    assert [s.manifest for s in find_statistics(hash_, [0])] == [made.manifest]
    assert not list(find_statistics(hash_, [1]))
    assert not list(find_statistics("other", [0]))


def test_what_is_no_statistics_file_is_refused(tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(StatisticsError, match="no readable statistics"):
        Statistics.load(tmp_path / "junk.safetensors")
    with pytest.raises(StatisticsError, match="no readable"):
        Statistics.load(tmp_path / "missing.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StatisticsError, match="no readable manifest"):
        Statistics.load(tmp_path / "folder")
    (tmp_path / "folder/manifest.json").write_text('{"format": 1}')
    with pytest.raises(StatisticsError, match="no manifest"):
        Statistics.load(tmp_path / "folder")


def test_other_statistics_in_the_folder_are_not_overwritten(run):
    run()
    with pytest.raises(StatisticsError, match="holds other statistics"):
        run(StatisticsSettings(window=8))


def test_corpora(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/b.txt").write_text("two\n")
    (tmp_path / "folder/a.jsonl").write_text('{"text": "one\\nand more"}\n\n')
    assert list(open_corpus(tmp_path / "folder").texts()) == ["one\n", "and more", "two\n"]
    hashes = {open_corpus(tmp_path / "folder").sha256}
    (tmp_path / "folder/b.txt").write_text("three\n")
    hashes.add(open_corpus(tmp_path / "folder").sha256)
    assert len(hashes) == 2
    for name, content, words in (
        ("bad.jsonl", b'{"txt": 1}\n', 'line 1: expected JSON with a "text" field'),
        ("bad.txt", b"\xff\xfe\x00", "not a text file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StatisticsError, match=words):
            list(open_corpus(tmp_path / name).texts())
    with pytest.raises(StatisticsError, match="no such file"):
        open_corpus(tmp_path / "nowhere")


def test_a_dataset_is_streamed_by_name(monkeypatch):
    asked = {}

    class Stream(list):
        info = SimpleNamespace(version="1.0.0")

    def load_dataset(path, config, *, split, streaming):
        asked.update(path=path, config=config, split=split, streaming=streaming)
        if path == "nobody/nothing":
            raise FileNotFoundError("no such\ndataset")
        return Stream([{"text": "one\ntwo"}, {"text": "three"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = open_corpus("datasets:wikimedia/wikipedia:20231101.en")
    assert list(corpus.texts()) == ["one\n", "two", "three"]
    assert asked == {
        "path": "wikimedia/wikipedia",
        "config": "20231101.en",
        "split": "train",
        "streaming": True,
    }
    with pytest.raises(
        StatisticsError, match="can't open dataset 'nobody/nothing': no such dataset"
    ):
        open_corpus("datasets:nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(StatisticsError, match=r"nulledit\[datasets\]"):
        open_corpus("datasets:wikimedia/wikipedia")


def test_windows_lose_no_token():
    texts = ["ab", "  ", "cdefg"]
    assert list(windows(texts, list, window=3, packed=True)) == [list("abc"), list("def"), ["g"]]
    assert list(windows(texts, list, window=3, packed=False)) == [
        list("ab"),
        list("cde"),
        list("fg"),
    ]
    led = list(windows(texts, list, window=3, packed=True, first=["^"]))
    assert led == [["^", *"ab"], ["^", *"cd"], ["^", *"ef"], ["^", "g"]]


def test_manifest_round_trip():
    manifest = Manifest("m", "h", (1, 2), "c", "d", StatisticsSettings(tokens=5), "float32", 7, 2)
    assert Manifest.from_json(manifest.to_json(), "here") == manifest
    older = dataclasses.replace(manifest, format=0)
    with pytest.raises(StatisticsError, match="format 0"):
        Manifest.from_json(older.to_json(), "here")


def test_a_long_line_is_tokenised_in_pieces_and_loses_no_token(monkeypatch):
    monkeypatch.setattr("nulledit.data.corpus.PIECE", 10)
    text = "the river flows to the sea and Ostrelostrelostrel lies there\n"
    sizes = []

    def tokenize(piece):
        sizes.append(len(piece))
        return list(piece)

    for packed in (True, False):
        found = list(windows([text, "ab\n"], tokenize, window=7, packed=packed))
        expected = [text + "ab\n"] if packed else [text.rstrip(), "ab"]
        assert ["".join(w) for w in found] == [
            t[i : i + 7] for t in expected for i in range(0, len(t), 7)
        ]
    assert max(sizes) <= 10


def test_reading_holds_no_more_than_a_line_and_the_tokens_of_a_piece(tmp_path):
    file = tmp_path / "large.txt"
    with file.open("w") as out:
        for _ in range(4):
            out.write("the river " * 50_000 + "\n")
    corpus = open_corpus(file)
    tracemalloc.start()
    try:
        count = sum(len(w) for w in windows(corpus.texts(), str.split, window=512, packed=True))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 400_000
    assert peak < 4 * 2**20  # a line's tokens alone take 6 million


def test_a_missing_shard_is_named(tmp_path):
    folder = tmp_path / "wiki"
    folder.mkdir()
    for number in (0, 1, 3):
        (folder / f"text-0000{number}-of-00004.txt").write_text("one\n")
    with pytest.raises(StatisticsError, match=r"wiki: shard 2 of 4 of text is missing; expected 4"):
        open_corpus(folder)
    (folder / "text-00002-of-00004.txt").write_text("two\n")
    assert list(open_corpus(folder).texts()) == ["one\n", "one\n", "two\n", "one\n"]


@pytest.fixture
def two_texts(tmp_path):
    lines = TEXT.splitlines(keepends=True)
    for name, part in (("a", lines[:7]), ("b", lines[7:]), ("both", lines)):
        (tmp_path / f"{name}.txt").write_text("".join(part))
    return {name: open_corpus(tmp_path / f"{name}.txt") for name in ("a", "b", "both")}


def test_merged_statistics_are_those_of_one_pass(run, two_texts, tmp_path):
    settings = StatisticsSettings(window=16, packing="lines")
    made = {name: run(settings, folder=name, corpus=c)[1] for name, c in two_texts.items()}
    found = merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert found.manifest.tokens == made["both"].manifest.tokens
    assert found.manifest.windows == made["both"].manifest.windows
    assert [s.corpus for s in found.manifest.sources] == ["a.txt", "b.txt"]
    assert found.manifest.corpus == "a.txt + b.txt"
    one, two = (load_file(tmp_path / f / "moments.safetensors") for f in ("merged", "both"))
    for name in ("sum.0", "sum.2"):
        assert (one[name] - two[name]).norm() / two[name].norm() < 1e-12
    for layer in (0, 2):
        torch.testing.assert_close(
            found.spectra[layer].eigenvalues, made["both"].spectra[layer].eigenvalues
        )
    assert Statistics.load(tmp_path / "merged").manifest == found.manifest
    again = merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert again.manifest == found.manifest


def test_statistics_that_do_not_add_up_are_refused(run, two_texts, tmp_path):
    a, b = two_texts["a"], two_texts["b"]
    lines = StatisticsSettings(window=16, packing="lines")
    run(lines, folder="a", corpus=a)
    run(lines, folder="b", corpus=b)
    merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    run(StatisticsSettings(window=8, packing="lines"), folder="window", corpus=b)
    run(StatisticsSettings(window=16), folder="packing", corpus=b)
    run(StatisticsSettings(window=16, packing="lines", count_first=False), folder="p", corpus=b)
    run(lines, "gpt2", folder="model", corpus=b)
    for other, words in (
        ("window", "the window 8, there 16"),
        ("packing", "packing packed, there lines"),
        ("p", "position 0 counted False, there True"),
        ("model", "the model's weights"),
        ("a", r"both are of a\.txt, whose keys would count twice"),
        ("ab", r"both are of a\.txt"),
        ("nowhere", "no such folder"),
        ("a.txt", "is a compact file, which holds no sums"),
    ):
        with pytest.raises(StatisticsError, match=words):
            merge_statistics([tmp_path / "a", tmp_path / other], tmp_path / "new")
        assert not (tmp_path / "new").exists()
    with pytest.raises(StatisticsError, match="two or more"):
        merge_statistics([tmp_path / "a"], tmp_path / "new")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("")
    with pytest.raises(StatisticsError, match="is there already"):
        merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "taken")


def test_the_command_merges(run, two_texts, tmp_path):
    lines = StatisticsSettings(window=16, packing="lines")
    made = [run(lines, folder=n, corpus=two_texts[n])[1].manifest.tokens for n in ("a", "b")]
    words = ["stats", "merge", *(str(tmp_path / n) for n in ("a", "b"))]
    more = ["--out", str(tmp_path / "ab"), "--compact", str(tmp_path / "ab.safetensors"), "--json"]
    result = CliRunner().invoke(cli, [*words, *more])
    assert result.exit_code == 0, result.stderr
    manifest = json.loads(result.stdout)["manifest"]
    assert [s["tokens"] for s in manifest["sources"]] == made
    assert Statistics.load(tmp_path / "ab.safetensors").manifest.tokens == sum(made)
    result = CliRunner().invoke(cli, [*words, str(tmp_path / "a"), *more])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
