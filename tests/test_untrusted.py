"""Files from anywhere: nothing in them is run, none of them hangs, none steers what we write."""

import ast
import json
import os
import pickle
import random
import re
import struct
import time
import tracemalloc
import unicodedata
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from support.cli import MAKE_KEYS
from support.facts import FOREIGN, OSLO, ROME, WRITTEN, one_line
from support.models import LINES, RECIPE, build_model
from support.runs import summary, write_a_run

from nulledit.cli.common import echo, emit, say
from nulledit.cli.evaluation_tables import read_references
from nulledit.cli.main import _describe, cli
from nulledit.cli.run_page import page_of
from nulledit.config import Recipe, StatisticsSettings, load_recipe, shipped_recipes
from nulledit.data import Fact, corpus, read_facts
from nulledit.editing.engine import EditEngine
from nulledit.errors import (
    ConfigError,
    FactError,
    ModelError,
    NullEditError,
    ReportError,
    StatisticsError,
)
from nulledit.evaluation.drift import read_texts
from nulledit.evaluation.tasks import read_tasks
from nulledit.io import untrusted as reading
from nulledit.io.files import replacing, replacing_folder
from nulledit.io.jsonfiles import as_json
from nulledit.io.text import markdown, plain
from nulledit.linalg.spectrum import Spectrum
from nulledit.models.load import load_model
from nulledit.report.document import (
    Code,
    Column,
    Details,
    Document,
    Example,
    Examples,
    FigureSpec,
    Heading,
    Items,
    Picture,
    Status,
    Study,
    StudyTable,
    Text,
    Value,
)
from nulledit.report.html import html_page
from nulledit.report.markdown import markdown_page
from nulledit.report.points import Point
from nulledit.report.study import read_study, study_document, write_study
from nulledit.report.terminal import on_terminal
from nulledit.runs.document import RunFolder, run_document
from nulledit.runs.folder import read_json, read_lines
from nulledit.runs.limits import load_limits
from nulledit.runs.pages import Result
from nulledit.runs.report import collect
from nulledit.statistics.manifest import HASHES, Manifest
from nulledit.statistics.spectra import Statistics
from nulledit.statistics.tensor_files import save_alone
from nulledit.studies.scale import load_scale
from nulledit.studies.stream import StreamPlan

SOURCE = Path(__file__).parents[1] / "src" / "nulledit"


def refusal(kind, call, *args, **more):
    """The one line that a call is refused with."""
    with pytest.raises(kind) as caught:
        call(*args, **more)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 1500
    return said


# -- nothing is run ------------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "os.system"),
    *("torch.hub.load", "numpy.load", "np.load", "torch.jit.load"),
}


def slips_of(tree):
    """What in a module's syntax could run what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        yield from (f"import of {n}" for n in names if n in FORBIDDEN_MODULES | FORBIDDEN_CALLS)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in FORBIDDEN_CALLS:
            yield called
        if called == "yaml.load":
            yield "yaml.load, where reading.parse_yaml is meant"
        for word in node.keywords:
            literal = word.value.value if isinstance(word.value, ast.Constant) else None
            if word.arg in ("trust_remote_code", "allow_pickle") and literal is True:
                yield f"{word.arg}=True"
            if word.arg in ("use_safetensors", "weights_only", "shell") and literal is (
                word.arg == "shell"
            ):
                yield f"{word.arg}={literal}"
        if called.endswith("Model.from_pretrained") or called.endswith("LM.from_pretrained"):
            given = {word.arg for word in node.keywords}
            if not {"use_safetensors", "gguf_file"} & given:
                yield "from_pretrained without use_safetensors"


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_no_source_runs_what_a_file_says(file):
    assert not list(slips_of(ast.parse(file.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from torch import load",
        "import torch\ntorch.load(file)",
        "yaml.load(text, yaml.Loader)",
        "eval(text)",
        "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained(x)",
        "AutoModelForCausalLM.from_pretrained(x, use_safetensors=False)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_static_test_finds_slips(text):
    assert list(slips_of(ast.parse(text)))


def test_code_of_a_model_is_not_run_unless_asked_for():
    def options(command):
        for option in command.params:
            if option.name == "trust_remote_code":
                yield option
        for inner in getattr(command, "commands", {}).values():
            yield from options(inner)

    found = list(options(cli))
    assert len(found) >= 3
    context = click.Context(cli)
    assert all(isinstance(o, click.Option) and o.is_flag for o in found)
    assert not any(o.get_default(context) for o in found)
    for call in (load_model, EditEngine.from_pretrained, EditEngine.load):
        assert call.__kwdefaults__["trust_remote_code"] is False


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def good_model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "good"
    build_model("llama", dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(good_model, tmp_path):
    """A copy of a tiny model's folder, to spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in good_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change_config(folder, **more):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def test_a_pickle_of_weights_is_refused_unread(model_folder, tmp_path):
    (model_folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (model_folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
        said = refusal(ModelError, load_model, str(model_folder))
        assert "no weights in safetensors" in said
        assert name in said
        assert "can run any code" in said
        assert not (tmp_path / "mark").exists()
        (model_folder / name).unlink()


def test_a_pickle_beside_safetensors_is_left_alone(model_folder, tmp_path):
    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    load_model(str(model_folder))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "shard", ["pytorch_model.bin", "../out.safetensors", "/etc/x.safetensors", "..\\x", 7, None]
)
def test_a_list_of_weights_leads_to_no_pickle_and_not_out(model_folder, tmp_path, shard):
    (model_folder / "model.safetensors").rename(tmp_path / "out.safetensors")
    (model_folder / "other.safetensors").write_bytes((tmp_path / "out.safetensors").read_bytes())
    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    weights = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": shard}})
    for name in ("model.safetensors.index.json", "given.safetensors.index.json"):
        (model_folder / name).write_text(weights)
        said = refusal(ModelError, load_model, str(model_folder))
        assert "expected a .safetensors file" in said
        (model_folder / name).unlink()
        change_config(model_folder, transformers_weights="given.safetensors.index.json")
    change_config(model_folder, transformers_weights=shard or "adapter_model.bin")
    refusal(ModelError, load_model, str(model_folder))
    assert not (tmp_path / "mark").exists()


SPOILED = {
    "an adapter": ("adapter_config.json", b'{"base_model_name_or_path": "evil"}', "is an adapter"),
    "cut weights": ("model.safetensors", None, "can't load"),
    "no weights": ("model.safetensors", b"", "can't load"),
    "a head of 2^60 bytes": ("model.safetensors", struct.pack("<Q", 2**60) + b"{}", "can't load"),
    "a deep config": ("config.json", b'{"a":' * 100_000, "can't load"),
    "a config that is a list": ("config.json", b"[]", "can't load"),
    "a config of other types": (
        "config.json",
        b'{"model_type": "llama", "hidden_size": "x", "num_attention_heads": 0}',
        "can't load",
    ),
    "an index that is a list": ("model.safetensors.index.json", b"[]", "names of weights"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_model_is_refused_in_one_line(model_folder, name):
    file, content, expected = SPOILED[name]
    held = (model_folder / file).read_bytes() if (model_folder / file).exists() else b""
    (model_folder / file).write_bytes(held[:-100] if content is None else content)
    assert expected in refusal(ModelError, load_model, str(model_folder))


def test_files_of_a_model_that_would_not_end_are_refused(model_folder):
    (model_folder / "config.json").unlink()
    os.mkfifo(model_folder / "config.json")
    assert "config.json" in refusal(ModelError, load_model, str(model_folder))
    (model_folder / "config.json").unlink()
    os.truncate(os.open(model_folder / "config.json", os.O_CREAT | os.O_RDWR), 2**40)
    assert "config.json" in refusal(ModelError, load_model, str(model_folder))


def test_code_that_comes_with_a_model_is_not_run(model_folder, tmp_path):
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_config(model_folder, auto_map=names, model_type="evil")
    (model_folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    said = refusal(ModelError, load_model, str(model_folder))
    assert "--trust-remote-code" in said
    assert not (tmp_path / "mark").exists()


# -- sizes, devices, pipes -----------------------------------------------------------------------


def run_lines(folder):
    return read_lines(folder)


def summary_of(folder):
    return read_json(folder, "summary.json", None)


READERS = {
    "facts": ("facts.yaml", FactError, read_facts),
    "recipe": ("recipe.yaml", ConfigError, load_recipe),
    "results": ("results.jsonl", ReportError, lambda file: read_lines(file.parent)),
    "summary": (
        *("summary.json", ReportError),
        lambda file: read_json(file.parent, "summary.json", None),
    ),
    "statistics": ("stats.safetensors", StatisticsError, Statistics.load),
    "manifest": ("stats/manifest.json", StatisticsError, lambda file: Statistics.load(file.parent)),
    "corpus": ("text.jsonl", StatisticsError, lambda file: list(corpus.open_corpus(file).texts())),
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(name, tmp_path):
    file, kind, read = READERS[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    assert "not a regular file" in refusal(kind, read, path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "not a regular file" in refusal(kind, read, path)


@pytest.mark.parametrize("name", [n for n in READERS if n != "statistics"])
def test_a_file_without_an_end_is_refused_unread(name, tmp_path, monkeypatch):
    """A hole of 1 TiB: anything that reads it whole dies."""
    monkeypatch.setattr(corpus.hashlib, "file_digest", lambda *_: corpus.hashlib.sha256())
    file, kind, read = READERS[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as opened:
        opened.truncate(2**40)
    if name == "corpus":  # of any length, but not in one line
        monkeypatch.setattr(corpus, "MAX_LINE", 1000)
    assert re.search(r"expected at most \d+|line breaks", refusal(kind, read, path))


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "x/" * 5000, "\ud800"])
def test_names_that_no_file_can_have(path):
    for kind, read in ((FactError, read_facts), (ConfigError, load_recipe)):
        with pytest.raises(kind, match=r"no such file|cannot be read|no recipe"):
            read(path)


# -- YAML, JSON, CSV -----------------------------------------------------------------------------

LAUGHS = "a: &a [x,x]\n" + "".join(
    f"{q}: &{q} [*{p},*{p}]\n" for p, q in pairwise("abcdefghijklmn")
)
BOMBS = {
    "aliases": (LAUGHS * 1, "aliases"),
    "an alias of itself": ("a: &a [*a]\n", "aliases"),
    "merge keys": ("a: &a {x: 1}\nb: {<<: *a}\n", "aliases"),
    "deep": ("[" * 100_000, "nested deeper"),
    "deep by lines": ("".join(" " * i + "a:\n" for i in range(1000)), "nested deeper"),
    "key twice": ("layers: [1]\nlayers: [2]\n", "stands twice"),
    "Python": ("!!python/object/apply:os.mkdir ['mark']\n", "tags are not allowed"),
    "a tag of YAML": ("layers: !!set {1, 2}\n", "tags are not allowed"),
    "number": ("batch_size: " + "1" * 5000, "number of 5000 characters"),
    "hexadecimal": ("batch_size: 0x" + "f" * 100_000, "number of"),
    "base 60": ("batch_size: 1" + ":1" * 300_000, "number of"),
    "float of base 60": ("same_key: 1" + ":1" * 300_000 + ".5", "number of"),
    "no date": ("batch_size: 2021-13-45\n", "month"),
    "bytes": ("batch_size: \0\n", "not a text file"),
    "key that is a list": ("{[1]: 2}\n", "unhashable"),
    "documents": ("--- 1\n--- 2\n", "another document"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("reader", ["facts", "recipe"])
def test_a_yaml_bomb_does_not_go_off(name, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, expected = BOMBS[name]
    _, kind, read = READERS[reader]
    file = tmp_path / "file.yaml"
    file.write_text(text if reader == "recipe" else f"#\n{text}")
    tracemalloc.start()
    start = time.process_time()
    said = refusal(kind, read, file)
    spent, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert expected in said
    assert spent < 5
    assert peak < 50e6
    assert not (tmp_path / "mark").exists()


def test_changes_of_a_recipe_are_read_as_carefully():
    for value in ("2021-13-45", "*a", "!!python/name:os.system", "[" * 5000, "1" + ":1" * 99_999):
        refusal(ConfigError, Recipe().with_fields, {"batch_size": value})


def test_many_values_are_refused_before_they_are_built(monkeypatch, tmp_path):
    monkeypatch.setattr(reading, "MAX_YAML_NODES", 1000)
    (tmp_path / "b.yaml").write_text("facts:\n" + "- a\n" * 1500)
    assert "more than 1000 values" in refusal(FactError, read_facts, tmp_path / "b.yaml")
    monkeypatch.setattr(reading, "MAX_VALUES", 1000)
    for name, text in {
        "a.json": "[" + "[]," * 2000 + "[]]",
        "a.jsonl": '{"a": 1}\n' * 2000,
        "a.csv": "subject,prompt,target\n" + "," * 2000,
        "a.yaml": "facts: [" + "a," * 2000 + "]",
    }.items():
        (tmp_path / name).write_text(text)
        said = refusal(FactError, read_facts, tmp_path / name)
        assert "1000" in said


def test_shipped_recipes_pass_the_same_reader():
    assert all(load_recipe(name) for name in shipped_recipes())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"version": NaN}', "no number of JSON"),
        ('{"version": -Infinity}', "no number of JSON"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ("1" * 5000, "digits"),
        ("{", "not JSON"),
        ("", "not JSON"),
        ("\ufeff[]", "not the summary"),
        (b"\xff\xfe{}", "not UTF-8"),
        ("[]", "not the summary"),
        ('{"a":' * 500 + "1" + "}" * 500, "not the summary"),
    ],
)
def test_a_bad_summary_is_refused(tmp_path, text, expected):
    (tmp_path / "summary.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in refusal(ReportError, summary_of, tmp_path)


def test_no_measure_is_called_as_the_answer_is(tmp_path):
    told = summary()
    told["runs"][0]["after"]["rates"]["answer"] = {"mean": 1.0, "standard_error": None, "n": 1}
    (tmp_path / "summary.json").write_text(json.dumps(told))
    assert "not the summary" in refusal(ReportError, summary_of, tmp_path)


@pytest.mark.parametrize("kl", [{}, 3, {"value": "<b>", "standard_error": None}])
def test_a_kl_that_is_no_measure_is_refused(tmp_path, kl):
    told = summary()
    told["runs"][0]["after"]["kl"] = kl
    (tmp_path / "summary.json").write_text(json.dumps(told))
    assert "not the summary" in refusal(ReportError, summary_of, tmp_path)


# -- statistics ----------------------------------------------------------------------------------

WIDTH = 6


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    """A small compact file: bytes of its head as data, and of its tensors."""
    keys = torch.randn(40, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    manifest = Manifest("tiny", "h" * 64, (0, 2), "c", "0", StatisticsSettings(), "float64", 40, 1)
    spectra = {i: Spectrum.of((i + 1) * keys.mT @ keys / 40) for i in (0, 2)}
    file = tmp_path_factory.mktemp("statistics") / "a.safetensors"
    Statistics(manifest, spectra).save_compact(file, {0: 1.0, 2: 0.8})
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def pack(head, body):
    raw = json.dumps(head).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def spoil(compact, *path, value=None, metadata=None):
    """The file with one place of its head changed, or of JSON inside its metadata."""
    head = json.loads(json.dumps(compact[0]))
    place = head
    if metadata:
        place = json.loads(head["__metadata__"][metadata])
    inner = place
    for name in path[:-1]:
        inner = inner[name]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    if metadata:
        head["__metadata__"][metadata] = json.dumps(place)
    return pack(head, compact[1])


def sign(file):
    """Give a file that can be opened the hash of what it holds, as who manipulates it can."""
    try:
        with safe_open(file, "pt") as opened:
            told = {n: text for n, text in opened.metadata().items() if n != HASHES}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError:
        return
    save_alone(file, tensors, told)


def test_the_unspoiled_statistics_are_read(compact, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(pack(*compact))
    assert set(Statistics.load(tmp_path / "a.safetensors").spectra) == {0, 2}


HEADS = {
    "a huge shape": (("eigenvalues.0", "shape"), {"value": [2**40]}, "no readable"),
    "a shape that overflows": (
        ("eigenvectors.0", "shape"),
        {"value": [2**62, 2**62]},
        "no readable",
    ),
    "an empty shape of any width": (
        ("eigenvectors.2", "shape"),
        {"value": [2**60, 0]},
        "layer 2|no readable",
    ),
    "another dtype": (("eigenvalues.0", "dtype"), {"value": "I64"}, "of I64; expected floats"),
    "another layer": (
        ("layers",),
        {"value": [0, 7], "metadata": "manifest"},
        "first eigenvector of layer 7",
    ),
    "no manifest": (("__metadata__", "manifest"), {}, "no manifest"),
    "a manifest that is a list": (("__metadata__", "manifest"), {"value": "[]"}, "no manifest"),
    "a deep manifest": (("__metadata__", "manifest"), {"value": "[" * 99_999}, "nested too deeply"),
    "no starts": (("__metadata__", "starts"), {}, "first eigenvector"),
    "starts that are a list": (("__metadata__", "starts"), {"value": "[1]"}, "starts"),
    "a start below 0": (("0",), {"value": -1, "metadata": "starts"}, "layer 0 has"),
    "a start that is a text": (("0",), {"value": "1", "metadata": "starts"}, "first eigenvector"),
    "a start too high": (("0",), {"value": WIDTH, "metadata": "starts"}, "layer 0 has"),
    "another format": (("format",), {"value": "\n" * 9 + "x" * 9999, "metadata": "manifest"}, "x…"),
    "layers twice": (("layers",), {"value": [0, 0], "metadata": "manifest"}, "layers are"),
    "layers below 0": (("layers",), {"value": [-1], "metadata": "manifest"}, "layers are"),
    "layers that are a text": (("layers",), {"value": "02", "metadata": "manifest"}, "layers is"),
    "no hash": (("model_hash",), {"metadata": "manifest"}, "no manifest"),
    "a hash that is a number": (
        ("model_hash",),
        {"value": 7, "metadata": "manifest"},
        "model_hash",
    ),
    "a dtype that steers": (
        ("dtype",),
        {"value": "float32\x1b[31m", "metadata": "manifest"},
        "dtype is .*expected plain ASCII",
    ),
    "other settings": (
        ("settings", "window"),
        {"value": "x" * 9999, "metadata": "manifest"},
        "settings.window",
    ),
    "a setting too many": (("settings", "evil"), {"value": 1, "metadata": "manifest"}, "unknown"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_manipulated_head_of_statistics_is_refused(compact, tmp_path, name):
    path, change, expected = HEADS[name]
    file = tmp_path / "a.safetensors"
    file.write_bytes(spoil(compact, *path, **change))
    sign(file)
    said = refusal(StatisticsError, Statistics.load, file)
    assert re.search(expected.replace("x…", "x "), said), said


def test_a_changed_head_of_possible_statistics_has_another_hash(compact, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(spoil(compact, "tokens", value=41, metadata="manifest"))
    assert "damaged or changed" in refusal(StatisticsError, Statistics.load, file)
    sign(file)
    assert Statistics.load(file).manifest.tokens == 41


def spectrum_with(**change):
    """Tensors of a full spectrum of layer 0, one of them replaced."""
    values, vectors = torch.arange(1.0, WIDTH + 1).double(), torch.eye(WIDTH)
    return {"eigenvalues.0": values, "eigenvectors.0": vectors} | {
        f"{name}.0": tensor for name, tensor in change.items()
    }


VALUES = torch.arange(1.0, WIDTH + 1)
NUMBERS = {
    "nan among the eigenvalues": {"eigenvalues": VALUES / torch.tensor([1, 1, 0.0, 1, 1, 1]) * 0},
    "infinity": {"eigenvalues": VALUES / torch.tensor([1, 1, 1, 1, 1, 0.0])},
    "a negative one": {"eigenvalues": VALUES - 2},
    "not ascending": {"eigenvalues": VALUES.flip(0)},
    "all zero": {"eigenvalues": VALUES * 0},
    "a sum that overflows": {"eigenvalues": torch.full((WIDTH,), 1e308, dtype=torch.float64)},
    "none": {"eigenvalues": VALUES[:0], "eigenvectors": torch.eye(WIDTH)[:0, :0]},
    "a matrix of eigenvalues": {"eigenvalues": torch.eye(WIDTH)},
    "one number": {"eigenvalues": torch.tensor(1.0)},
    "whole numbers": {"eigenvalues": torch.arange(WIDTH)},
    "eigenvectors of another width": {"eigenvectors": torch.eye(WIDTH + 1)},
    "too many eigenvectors": {"eigenvectors": torch.eye(WIDTH).repeat(1, 2)},
    "nan among the eigenvectors": {"eigenvectors": torch.eye(WIDTH) * torch.nan},
    "long eigenvectors": {"eigenvectors": 2 * torch.eye(WIDTH)},
    "zero eigenvectors": {"eigenvectors": 0 * torch.eye(WIDTH)},
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kind", ["folder", "compact"])
def test_numbers_that_are_no_spectrum_are_refused(compact, tmp_path, name, kind):
    manifest = json.loads(compact[0]["__metadata__"]["manifest"]) | {"layers": [0]}
    tensors = spectrum_with(**NUMBERS[name])
    if kind == "folder":
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        save_file(tensors, tmp_path / "spectra.safetensors")
        refusal(StatisticsError, Statistics.load, tmp_path)
    else:
        told = {"manifest": json.dumps(manifest), "starts": '{"0": 0}'}
        save_file(tensors, tmp_path / "a.safetensors", told)
        refusal(StatisticsError, Statistics.load, tmp_path / "a.safetensors")


def test_a_layer_without_tensors_is_named(compact, tmp_path):
    manifest = json.loads(compact[0]["__metadata__"]["manifest"]) | {"layers": [0, 7]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    save_file(spectrum_with(), tmp_path / "spectra.safetensors")
    assert "has no tensor eigenvalues.7" in refusal(StatisticsError, Statistics.load, tmp_path)


def test_eigenvectors_that_repeat_are_no_basis(compact, tmp_path):
    same = torch.eye(WIDTH)[:, :1].repeat(1, WIDTH)
    manifest = json.loads(compact[0]["__metadata__"]["manifest"]) | {"layers": [0]}
    told = {"manifest": json.dumps(manifest), "starts": '{"0": 0}'}
    save_file(spectrum_with(eigenvectors=same), tmp_path / "a.safetensors", told)
    assert "not orthogonal" in refusal(StatisticsError, Statistics.load, tmp_path / "a.safetensors")


def test_truncated_statistics_are_refused_at_every_length(compact, tmp_path):
    raw = pack(*compact)
    file = tmp_path / "a.safetensors"
    for length in (*range(0, len(raw), 61), len(raw) - 1):
        file.write_bytes(raw[:length])
        refusal(StatisticsError, Statistics.load, file)


# -- HTML ----------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title></textarea></table><svg/onload=alert(1)>",
    "javascript:alert(1)",
    "]]><!-- --><![CDATA[<b>x</b>]]>",
    "&lt;b&gt; &amp; &#60;b&#62; &#x3c;b",
    "\u202eright to left\u2066\u2067\u2068\u2069\u202a\u202b\u202c\u202d",
    "\x1b]0;title\x07\x1b[2J\x1b[31mred\x9b31m\x9d0;x\x9c",
    "zero\u200bwidth\u2060\ufeff\xadand \U000e0041 tags",
    "line\nfeed\r\nreturn\rand\ttab\x0b\x0c\x85\u2028\u2029",
    "| pipe | `code` | *bold* _it_ ~no~ # head\\",
    "[link](javascript:alert(1)) ![i](http://e.org/x.png) <http://e.org> https://e.org www.e.org",
    "- [ ] task",
    "1. one",
    "=== --- +++",
    "---",
    "$x^2$ \\(x\\) $$\\evil$$ {{ template }} ${7*7} {% x %}",
    "../../etc/passwd",
    "C:\\windows\\system32",
    "\ud800 lone \udfff",
    "=HYPERLINK(1)",
    "long" * 1000,
    "___",
    "e\u0301" + "\u0301" * 300,
    "",
    " ",
]
BENIGN = "words"
# Categories that steer: control, format (but for the joiners of scripts), surrogates, separators.
STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")


def steering(text, *, allowed="\n"):
    return {
        c for c in text if unicodedata.category(c) in STEERING and c not in allowed + "\u200c\u200d"
    }


class Skeleton(HTMLParser):
    """Elements and attribute names of a page, in order, and its addresses and text."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.shape, self.addresses, self.text = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, name, attributes):
        self.shape.append((name, *[key for key, _ in attributes]))
        self.addresses += [v for k, v in attributes if k in ("href", "src", "srcset", "action")]

    def handle_endtag(self, name):
        self.shape.append(f"/{name}")

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.shape.append("comment")

    def handle_decl(self, decl):
        self.shape.append(("declaration", decl))

    def unknown_decl(self, data):
        self.shape.append("declaration")

    def handle_pi(self, data):
        self.shape.append("instruction")


def study_of(text):
    """A study in which every text that is free is `text`, and is not empty."""
    text = text if text.strip() else "x" + text
    columns = (Column("a", text), Column("b", text, "high", "%"))
    rows = ({"a": text, "b": Value(1.0, 0.5, 3)}, {"a": f"{text}2", "b": Value(2.0, 0.1, 3)})
    labels = {"x": text, "y": text}
    points = tuple(Point(x, 1.0, 0.1, 3, series=text, panel=text) for x in (1.0, 2.0))
    return Study(
        name="name",
        title=text,
        question=text,
        scale=text,
        settings={text: {text: [text, 1]}},
        environment=({text: text, "model": text, "device": text},),
        seconds={"wall": 1.0},
        shows=text,
        cannot_show=text,
        notices=(text, text),
        tables=(StudyTable("table", text, text, columns, rows),),
        figures=(FigureSpec("figure", text, "lines", "x", "y", labels=labels, points=points),),
        examples=(
            Example(text, text, text, text, text, True),
            Example(text, text, text, None, text, False),
        ),
        nulledit=text,
    )


@pytest.fixture(scope="module", autouse=True)
def quick_figures():
    """Figures have tests of their own (test_study.py); here one picture does for all."""
    from nulledit.report import html as module

    kept = module.as_image
    module.as_image = lambda _figure: ("image/png", b"\x89PNG")
    yield
    module.as_image = kept


def skeleton_of(text):
    about = text if text.strip() else "x"
    document = study_document(study_of(text), about, about)
    return Skeleton(html_page(text, [document, document]))


@pytest.fixture(scope="module")
def benign():
    return skeleton_of(BENIGN)


def without_marks(shape):
    """Less the marks of targets, which a text that is cut may have lost."""
    return [part for part in shape if part not in (("mark",), "/mark")]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t)[:30])
def test_no_element_and_no_attribute_comes_from_the_data(text, benign):
    found = skeleton_of(text)
    assert without_marks(found.shape) == without_marks(benign.shape)
    assert all(
        a.startswith(("data:image/png;base64,", "data:text/csv;", "#")) for a in found.addresses
    )
    assert not steering(found.text)
    if text.strip():
        assert plain(text)[:600] in found.text


def line_of(i, text):
    row = {"efficacy": True, "answer": text}
    return {
        **{"id": f"{text}{i}", "run": 1, "batch": 1, "column": i},
        **{"prompt": text, "target": text, "before": row, "after": row},
        **{"says_target": i > 0, "outcome": {text: text}},
    }


def page_of_run(told, lines):
    run = RunFolder(told["version"], told, lines, {}, [])
    return markdown_page(run_document(run))


def page_of_study(study):
    return markdown_page(study_document(study))


def summary_with(text):
    told = summary(notices=[text] * 3, text=text, time=text, seconds={text: 1.0})
    base = {"model": text, "hash": text, "dtype": text}
    return told | {"version": text, "state": text, "base": base}


@pytest.mark.parametrize("text", HOSTILE[:3] + HOSTILE[8:12], ids=lambda t: ascii(t)[:30])
def test_a_run_folder_with_hostile_texts_makes_a_plain_page(text, tmp_path):
    pages = []
    for name, told in (("plain", BENIGN), ("hostile", text)):
        folder = write_a_run(tmp_path / name, [line_of(i, told) for i in range(3)])
        (folder / "summary.json").write_text(as_json(summary_with(told)))
        (folder / "environment.json").write_text(as_json([{told: told, "model": told}]))
        (folder / "recipe.yaml").write_text(yaml.safe_dump({plain(told): plain(told)}))
        pages.append(Skeleton(html_page("Title", collect([folder]).documents())))
    assert pages[0].shape == pages[1].shape
    assert not steering(pages[1].text)


def test_a_folder_with_a_hostile_name(tmp_path):
    folder = write_a_run(tmp_path / "a<b onload=x>\x1b[31m\u202e", [line_of(1, BENIGN)])
    (folder / "summary.json").write_text(as_json(summary_with(BENIGN)))
    plain_one = write_a_run(tmp_path / "plain", [line_of(1, BENIGN)])
    (plain_one / "summary.json").write_text(as_json(summary_with(BENIGN)))
    pages = [Skeleton(html_page("T", collect([f]).documents())) for f in (folder, plain_one)]
    assert pages[0].shape == pages[1].shape
    assert not steering(pages[0].text)


# -- Markdown ------------------------------------------------------------------------------------

SPECIAL = "\\`*_{}[]<>|#~&!$"


def bones(page):
    """What has a meaning in a page of Markdown, line by line, without words and numbers."""
    lines = []
    for line in page.split("\n"):
        bare = re.sub(r"\\[!-/:-@\[-`{-~]", "x", line)
        start = re.match(r"\s*(#+ |[-+] |\d+[.)] |=+\s*$|-{3,}\s*$)?", bare)
        kept = "".join(c for c in bare if c in SPECIAL)
        lines.append((start[1] or "", kept, "://" in bare, "www." in bare))
    return lines


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t)[:30])
def test_nothing_in_a_page_of_markdown_comes_from_the_data(text):
    lines = [line_of(i, text) for i in range(3)]
    expected = [line_of(i, BENIGN) for i in range(3)]
    found = page_of_run(summary_with(text), lines)
    assert bones(found) == bones(page_of_run(summary_with(BENIGN), expected))
    assert not steering(found)
    if text.strip():
        assert bones(page_of_study(study_of(text))) == bones(page_of_study(study_of(BENIGN)))
        assert not steering(page_of_study(study_of(text)))


def document_of(text):
    """A document of every kind of part, in which every text that is free is `text`."""
    return Document(
        text,
        (
            Heading(text),
            *(Text(text, tone) for tone in ("", "strong", "question", "quiet")),
            Items((text, (text, text)), title=text, tone="note"),
            Items(((text, text),), tone="limits"),
            Picture("a.png", text),
            Examples(text, (Example(text, text, text, text, text, True),)),
            Details(text, ({text: text}, {text: f"{text}2"})),
            StudyTable("t", text, text, (Column("a", text),), ({"a": Status(text, "bad")},)),
        ),
    )


@pytest.mark.parametrize("text", [t for t in HOSTILE if t.strip()], ids=lambda t: ascii(t)[:30])
def test_every_kind_of_part_is_plain_wherever_it_is_shown(text):
    found, expected = (Skeleton(html_page(t, [document_of(t)])) for t in (text, BENIGN))
    assert without_marks(found.shape) == without_marks(expected.shape)
    assert not steering(found.text)
    page = markdown_page(document_of(text))
    assert bones(page) == bones(markdown_page(document_of(BENIGN)))
    code = Document("t", (Code(f"{text}\n```\n<b>"),))
    skeleton = Skeleton(html_page("t", [code]))
    assert "b" not in {part[0] for part in skeleton.shape}
    shown = [on_terminal(d, columns=60) for d in (document_of(text), code)]
    assert not steering("".join([page, markdown_page(code), skeleton.text, *shown]))


@given(
    st.text(alphabet=st.sampled_from(" \n\tab1.)-+=*_`<>[]()|#~&!$\\:/w@\x1b\u202e"), max_size=30)
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_text_has_a_meaning_in_markdown(text):
    shown = markdown(text)
    assert bones(f"{shown} end") == [("", "", False, False)]
    back = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", shown)
    assert back == plain(text).lstrip()  # and nothing else was changed


# -- the console ---------------------------------------------------------------------------------


def invoke(*words):
    return CliRunner().invoke(cli, [str(w) for w in words])


def quiet_console(result):
    assert not steering(result.stdout + result.stderr), ascii(result.output)
    return result


ANSI = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202eevil\u2066\u200b"
SHOWABLE = "\u202eevil\u2066\u200b\ufeff\u2028"  # what a fact may hold


def test_facts_check_prints_nothing_that_steers(tmp_path):
    good = {"subject": f"Rome{SHOWABLE}", "prompt": "{} is in", "target": f"x{SHOWABLE}"}
    files = {
        "good.json": [good | {"id": f"a{SHOWABLE}"}, good | {"id": f"b{SHOWABLE}"}],
        "clash.json": [good, good | {"target": f"y{SHOWABLE}"}],
        "control.json": [good | {"target": ANSI}],
        "field.json": [good | {ANSI: 1}],
        "number.json": [good | {"target": {ANSI: ANSI}}],
        "slot.json": [good | {"prompt": f"no slot {SHOWABLE}"}],
        "twice.json": '[{"\x7f\u202e": 1, "\x7f\u202e": 2}]',
        "broken.json": f"[{{{SHOWABLE}",
        "broken.yaml": f"- {SHOWABLE}: [\n",
        "tag.yaml": f"- !{SHOWABLE} x\n",
        "header.csv": f"subject,prompt,{SHOWABLE}\x1b[31m\n",
        f"na{SHOWABLE}\x1b[31mme.json": [good],
    }
    said = ""
    for name, content in files.items():
        file = tmp_path / name
        text = content if isinstance(content, str) else json.dumps(content)
        file.write_text(text, encoding="utf-8")
        result = quiet_console(invoke("facts", "check", file))
        assert result.exit_code in (0, 2), result.exception
        assert len(result.stderr.splitlines()) <= 2
        said += result.output
        quiet_console(invoke("facts", "check", file, "--json"))
    assert "\\u202e" in said


def test_json_on_the_console_steers_nothing_and_loses_nothing(capsys):
    data = {ANSI: [ANSI, *HOSTILE], "x": {"y": SHOWABLE}}
    emit(data)
    out = capsys.readouterr().out
    assert not steering(out)
    assert json.loads(out) == data


@given(st.text(max_size=20))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_json_is_the_same_data(text):
    assert json.loads(as_json({text: [text]}, indent=None)) == {text: [text]}
    shown = as_json(text)
    assert not steering(shown) - {c for c in shown if unicodedata.category(c) == "Cf"}


def test_notices_and_pages_steer_nothing(capsys):
    say(f"Note: {ANSI}", quiet=False)
    echo(f"one {ANSI}\ntwo")
    told = capsys.readouterr()
    assert not steering(told.out + told.err)
    assert told.out.count("\n") == told.err.count("\n") + 1 == 2


def printed(result):
    return "\n\n".join(map(on_terminal, page_of(result)))


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t)[:30])
def test_what_edit_prints_of_facts_and_answers_is_plain(text):
    lines = [line_of(i, text) for i in range(30)]
    told = summary(notices=[text])
    page = printed(Result(Path("run"), told, lines))
    assert not steering(page)
    expected = printed(Result(Path("run"), told, [line_of(i, BENIGN) for i in range(30)]))
    assert len(page.split("\n")) == len(expected.split("\n"))
    assert max(map(len, page.split("\n"))) < 1000


def test_an_error_is_one_plain_line(tmp_path):
    for words in (
        ("facts", "check", tmp_path / f"no{ANSI}.json"),
        ("edit", tmp_path / "x", "--model", f"m{ANSI}", "--out", tmp_path / "r"),
        ("report", tmp_path / f"no\n{SHOWABLE}", "--quiet"),
        ("edit", tmp_path / "x", "--set", f"{ANSI}=1", "--model", "m", "--out", tmp_path / "r"),
        (f"no{ANSI}",),
        ("facts", "check", f"--no{ANSI}"),
    ):
        result = quiet_console(invoke(*words))
        assert result.exit_code == 2
        assert len(result.stderr.split("\n")) == 2


# -- paths ---------------------------------------------------------------------------------------

NAMES = [
    *("../../out", "/tmp/out", "..", ".", "a/b", "a\\b", "C:\\out", "CON", "nul.txt", "~", "-rf"),
    *("$(touch out)", "`touch out`", "x" * 200, "%2e%2e%2f", "a:b", "*", "?", " ", "\u202eout"),
]


@pytest.mark.parametrize("words", [("facts", "check"), ("edit", "--model", "x", "--out", "y")])
def test_no_error_fills_the_terminal(words):
    for long in ("x" * 9000, "x/" * 4000, "\n".join("abc" * 900)):
        result = invoke(*words, long)
        assert result.exit_code == 2
        assert len(result.stderr) < 2500


@pytest.mark.parametrize("way", [replacing, replacing_folder])
def test_a_full_disk_is_named(way, tmp_path):
    with pytest.raises(OSError, match="No space") as caught, way(tmp_path / "result"):
        raise OSError(28, "No space left on device")
    assert _describe(caught.value) == (f"{tmp_path / 'result'}: No space left on device", 2)


def test_files_that_are_named_by_hand_have_safe_names(tmp_path):
    columns = (Column("a", "a"),)
    for name in [*NAMES, "a\0b", "a\nb", "x" * 5000 + "/"]:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            continue
        with pytest.raises(ValueError, match="expected letters"):
            FigureSpec(name, "c", "lines", "x", "y")
        with pytest.raises(ValueError, match="expected letters"):
            StudyTable(name, "t", "c", columns, ())


def test_a_study_folder_reads_no_figure_from_elsewhere(tmp_path):
    folder = tmp_path / "study"
    write_study(folder, study_of(BENIGN))
    (tmp_path / "out.csv").write_text((folder / "figures/figure.csv").read_text())
    told = json.loads((folder / "study.json").read_text())
    told["figures"][0]["name"] = "../../out"
    (folder / "study.json").write_text(json.dumps(told))
    assert "expected letters" in refusal(ReportError, read_study, folder)


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory, good_model):
    """A run of facts with hostile ids, relations and texts: its place, and what was said."""
    place = tmp_path_factory.mktemp("paths") / "a" / "b"
    place.mkdir(parents=True)
    (place / "corpus.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    recipe = RECIPE.with_fields({"values.steps": 2, "batch_size": 40})
    (place / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    records = [
        {
            "id": name if name.strip() else "space",
            "subject": f"Ada {i}{SHOWABLE if i == 0 else ''}",
            "prompt": "The mother tongue of {} is",
            "target": f"Velmish{HOSTILE[i % 7]}",
            "relation": name if name.strip() else "space",
        }
        for i, name in enumerate(NAMES[:12])
    ]
    (place / "facts.json").write_text(json.dumps(records), encoding="utf-8")
    words = ("--model", good_model, "--recipe", place / "recipe.yaml", "--stats", place / "stats")
    before = everything(place)
    done = [
        invoke(
            *(*MAKE_KEYS, good_model, "--text", place / "corpus.txt", "--layers", "1-2"),
            *("--window", "64", "--out", place / "stats"),
        ),
        invoke("edit", place / "facts.json", *words, "--out", place / "run"),
    ]
    done.append(invoke("ask", place / "run", f"The mother tongue of Ada 0{SHOWABLE} is"))
    done.append(invoke("report", place / "run"))
    for result in done:
        assert result.exit_code == 0, result.exception or result.stderr
    return place, done, everything(place) - before


def everything(place):
    """Every path up to two folders above `place`, and of the working folder."""
    roots = (place.parents[1], Path.cwd())
    return {p for root in roots for p in root.rglob("*") if ".git" not in p.parts}


def test_facts_lead_no_file_out_of_the_run(hostile_run):
    place, _, new = hostile_run
    inside = {
        p for p in new if (place / "run") in (p, *p.parents) or (place / "stats") in p.parents
    }
    others = {p for p in new - inside if p.suffix not in (".pyc", ".lock")}
    assert others <= {place / "stats", Path.cwd() / "__pycache__"}, others
    fixed = re.compile(r"[A-Za-z0-9_.-]+")
    assert all(fixed.fullmatch(p.name) for p in inside), inside
    ids = {json.loads(line)["id"] for line in (place / "run/results.jsonl").open()}
    assert "../../out" in ids  # and they were there to lead away


def test_the_console_and_the_pages_of_that_run_are_plain(hostile_run):
    place, done, _ = hostile_run
    for result in done:
        quiet_console(result)
    page = Skeleton((place / "run/report.html").read_text())
    assert not {"script", "svg"} & {s[0] for s in page.shape if isinstance(s, tuple)}
    assert not any(a.startswith("on") for s in page.shape if isinstance(s, tuple) for a in s[1:])
    assert not steering((place / "run/report.md").read_text())


def test_a_streams_folder_is_named_by_a_hash():
    facts = tuple(
        Fact(**(ROME | {"subject": f"s{i}", "id": n})) for i, n in enumerate(NAMES) if n.strip()
    )
    for name in NAMES:
        plan = StreamPlan(name, Recipe(), facts, 5)
        assert re.fullmatch(r"[0-9a-f]+", plan.digest("0" * 64))


# -- fuzzing -------------------------------------------------------------------------------------

TOKENS = [
    *("[", "{", "]", "}", "&a ", "*a", "!!python/object:x ", "!!int ", "\0", "\x1b[31m", "NaN"),
    *("1e999", "9" * 400, '"', "'", "\r", "\n", "- ", ": ", "? ", "<<: ", "1:1:1", "0x_", "0b_"),
    *("2021-13-45", "2001-12-14t21:59:43.10-99:99", "\\ud800", "|\n", ">\n", "%YAML 9", "---\n"),
    *("...", "#", ",", "{}", "null", "true", "=", "~", ".inf", "\x85", "\u2028", "!", "@", "\t"),
    *("{} {}", "0o8", "._", "1_", "\ufeff", "\u202e", "subject", "target", "facts", "locality"),
]
RAW = [token.encode() for token in TOKENS] + [b"\xff", b"\xc3", b"\xed\xa0\x80", bytes(8)]
JUNK = [
    *(None, True, 0, -1, 1e308, 10**30, "", "x", "{}", "a\0", "\u202e", "answer", 1.5),
    *([], {}, ["x"], {"x": 1}, [[[]]], {"": None}),
]


def mutated(draw, raw):
    """Bytes with up to five cuts, repetitions and insertions."""
    for _ in range(draw.randint(1, 5)):
        start = draw.randint(0, len(raw))
        end = min(len(raw), start + draw.randint(0, 30))
        middle = draw.choice(
            [b"", raw[start:end] * 2, draw.choice(RAW), raw[start:end] + draw.choice(RAW)]
        )
        raw = raw[:start] + middle + raw[end:]
    return raw


def places(value, path=()):
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*path, key))


def reshaped(draw, value):
    """JSON data with up to three of its values replaced, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, 3)):
        path = draw.choice(list(places(value)))
        junk = json.loads(json.dumps(draw.choice(JUNK)))
        if not path:
            value = junk if draw.random() < 0.1 else value
            continue
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        how = draw.randint(0, 3)
        if how == 0:
            del inner[path[-1]]
        elif how == 1 and isinstance(inner, dict):
            inner[draw.choice(["answer", "extra", ""])] = junk
        else:
            inner[path[-1]] = junk
    return value


def survives(read):
    """A value, or a NullEditError of one line: nothing else."""
    said = ""
    try:
        read()
    except NullEditError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 2500


FUZZ = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    "database": None,
}
SEEDS = {name: text.encode() for name, text in WRITTEN.items()}
SEEDS |= {f"{name} lines": (one_line(r) * 2).encode() for name, r in FOREIGN.items()}
SEEDS["native lines"] = (one_line(ROME) + one_line(OSLO)).encode()
RECIPE_TEXT = (SOURCE / "assets/recipes/smollm2-135m.yaml").read_bytes()
randoms = st.integers(0, 2**32).map(random.Random)


@given(randoms, st.sampled_from([".yaml", ".json", ".csv", ""]))
@settings(max_examples=300, **FUZZ)
def test_fuzzed_facts(tmp_path, draw, suffix):
    file = tmp_path / f"facts{suffix}"
    file.write_bytes(mutated(draw, SEEDS[draw.choice(sorted(SEEDS))]))
    survives(lambda: read_facts(file))


@given(randoms, st.sampled_from(sorted(FOREIGN)))
@settings(max_examples=150, **FUZZ)
def test_fuzzed_records(tmp_path, draw, shape):
    records = reshaped(draw, draw.choice([[FOREIGN[shape]], {"facts": [ROME, OSLO]}]))
    for name, text in (("a.json", json.dumps(records)), ("a.yaml", yaml.safe_dump(records))):
        (tmp_path / name).write_text(text)
        survives(lambda file=tmp_path / name: read_facts(file))


@given(st.binary(max_size=60), st.sampled_from([".yaml", ".json", ".csv", ".safetensors"]))
@settings(max_examples=100, **FUZZ)
def test_random_bytes(tmp_path, raw, suffix):
    file = tmp_path / f"file{suffix}"
    file.write_bytes(raw)
    survives(lambda: read_facts(file))
    survives(lambda: load_recipe(file))
    survives(lambda: Statistics.load(file))


@given(randoms)
@settings(max_examples=100, **FUZZ)
def test_fuzzed_recipes(tmp_path, draw):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(mutated(draw, RECIPE_TEXT))
    survives(lambda: load_recipe(file))
    file.write_text(yaml.safe_dump(reshaped(draw, yaml.safe_load(RECIPE_TEXT))))
    survives(lambda: load_recipe(file))


@given(randoms)
@settings(max_examples=200, **FUZZ)
def test_fuzzed_statistics(tmp_path, compact, draw):
    head, body = json.loads(json.dumps(compact[0])), compact[1]
    how = draw.randint(0, 4)
    if how == 0:
        raw = mutated(draw, pack(head, body))
    elif how == 1:
        raw = pack(reshaped(draw, head), body)
    elif how == 2:
        raw = pack(head, mutated(draw, body)[: len(body)].ljust(len(body), b"\x7f"))
    else:
        name = ("manifest", "starts")[how - 3]
        head["__metadata__"][name] = json.dumps(
            reshaped(draw, json.loads(head["__metadata__"][name]))
        )
        raw = pack(head, body)
    file = tmp_path / "a.safetensors"
    file.write_bytes(raw)
    survives(lambda: Statistics.load(file))


@given(randoms)
@settings(max_examples=100, **FUZZ)
def test_fuzzed_corpora(tmp_path, draw):
    file = tmp_path / "a.jsonl"
    file.write_bytes(mutated(draw, b'{"text": "a b"}\n{"text": "b\\nc"}\n'))
    survives(lambda: list(corpus.open_corpus(file).texts()))


@given(randoms)
@settings(max_examples=40, **FUZZ)
def test_fuzzed_run_folders(tmp_path, draw):
    parts = {
        "summary.json": summary(),
        "environment.json": [{"run": 1, "device": "cpu", "model": "m"}],
        "results.jsonl": [line_of(i, BENIGN) for i in range(2)],
    }
    chosen = draw.choice(sorted(parts))
    parts[chosen] = reshaped(draw, parts[chosen])
    for name, value in parts.items():
        lines = value if name == "results.jsonl" and isinstance(value, list) else [value]
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
    if draw.random() < 0.2:
        raw = mutated(draw, (tmp_path / chosen).read_bytes())
        (tmp_path / chosen).write_bytes(raw)
    survives(lambda: page_of_run(read_json(tmp_path, "summary.json", None), read_lines(tmp_path)))
    survives(lambda: collect([tmp_path]))


# -- what the patch for the other files adds ------------------------------------------------------


def test_commands_write_results_through_one_door():
    """`echo` makes each line plain; `click.echo` would let a terminal's codes pass."""
    doors = {"common.py": 3, "main.py": 1}  # echo, emit and say; the line of an error
    for file in sorted((SOURCE / "cli").glob("*.py")):
        used = file.read_text(encoding="utf-8").count("click.echo(")
        if file.name in ("report.py", "stats.py", "study.py", "edit.py", "evaluate.py", "info.py"):
            assert used == 0, file
        elif file.name in doors:
            assert used == doors[file.name], file


@pytest.mark.parametrize("name", BOMBS)
def test_a_yaml_bomb_in_a_scale_or_in_limits_does_not_go_off(name, tmp_path):
    text, expected = BOMBS[name]
    (tmp_path / "file.yaml").write_text(text)
    for read in (load_scale, load_limits):
        assert expected in refusal(ConfigError, read, str(tmp_path / "file.yaml"))


@pytest.mark.parametrize("name", BOMBS)
def test_a_yaml_bomb_in_a_runs_folder_does_not_go_off(name, tmp_path):
    text, expected = BOMBS[name]
    write_a_run(tmp_path / "run", [line_of(1, BENIGN)])
    (tmp_path / "run/recipe.yaml").write_text(text)
    assert expected in refusal(ReportError, collect, [tmp_path / "run"])


@pytest.mark.parametrize("content", ["[1]", "method: x", "7", "method: [a]"])
def test_a_recipe_of_another_kind_in_a_runs_folder(content, tmp_path):
    write_a_run(tmp_path / "run", [line_of(1, BENIGN)])
    (tmp_path / "run/recipe.yaml").write_text(content)
    assert "not a recipe" in refusal(ReportError, collect, [tmp_path / "run"])


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, study_of(BENIGN))
    return folder


@given(randoms)
@settings(max_examples=100, **FUZZ)
def test_fuzzed_study_folders(tmp_path, study_folder, draw):
    told = json.loads((study_folder / "study.json").read_text())
    points = (study_folder / "figures/figure.csv").read_bytes()
    (tmp_path / "figures").mkdir(exist_ok=True)
    if draw.random() < 0.7:
        told = reshaped(draw, told)
    else:
        points = mutated(draw, points)
    (tmp_path / "study.json").write_text(json.dumps(told))
    (tmp_path / "figures/figure.csv").write_bytes(points)

    def pages():
        for document in collect([tmp_path]).documents():
            html_page("Title", [document])
            markdown_page(document)
            on_terminal(document, columns=60, colour=True)

    survives(pages)


@pytest.mark.parametrize("text", ["[" * 99_999, "{", '{"a": NaN}', '{"a": ["b", 1]}', "[]", "\0"])
def test_other_json_files_are_read_as_carefully(text, tmp_path):
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(NullEditError):
        read_references(str(file))
    with pytest.raises(NullEditError):
        read_texts(file, None)
    (tmp_path / "sst.jsonl").write_text(text)
    with pytest.raises(NullEditError):
        read_tasks(tmp_path, names=["sst"], limit=1, seed=0)
