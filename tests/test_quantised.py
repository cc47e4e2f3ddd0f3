"""Quantised bases: what is edited becomes dense in memory, all else stays as it is."""

import copy
import json

import pytest
import torch
from support.cli import MAKE_KEYS, done, refused
from support.models import RECIPE, build_model, statistics_of
from torch import nn

from nulledit import Editor
from nulledit.errors import LedgerError, ModelError
from nulledit.export import put_delta, write_checkpoint, write_delta, write_lora
from nulledit.models.batches import collate
from nulledit.models.dense import Dense, dense_of
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import LAYOUTS, as_out_in, mlp_out
from nulledit.models.load import model_hash
from nulledit.models.partial import PartialModel
from nulledit.models.quantized import make_editable
from nulledit.runs.verify import verify
from nulledit.statistics.collect import collect

CPU = torch.device("cpu")
LLAMA = LAYOUTS["llama"]


class Int8(nn.Module):
    """Weight-only 8-bit: a row of whole numbers and its step."""

    def __init__(self, weight, bias=None):
        super().__init__()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), False)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), False)

    def matrix(self):
        return self.weight.to(self.scale) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.matrix().to(x), self.bias)


class Int4(nn.Module):
    """Weight-only 4-bit: two numbers a byte, groups of eight; the bias is no parameter."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.shape = weight.shape
        groups = weight.reshape(-1, 8)
        scale = groups.abs().amax(1, keepdim=True) / 7
        numbers = ((groups / scale).round() + 8).to(torch.uint8).reshape(-1, 2)
        self.register_buffer("qweight", numbers[:, 0] << 4 | numbers[:, 1])
        self.register_buffer("scale", scale)
        self.register_buffer("offset", torch.zeros(weight.shape[0]) if bias is None else bias)

    def matrix(self):
        numbers = torch.stack([self.qweight >> 4, self.qweight & 15], dim=1)
        groups = (numbers.to(self.scale) - 8).reshape(-1, 8) * self.scale
        return groups.reshape(self.shape)

    def forward(self, x):
        return nn.functional.linear(x, self.matrix().to(x), self.offset.to(x))


def quantised(kind, family="llama", dtype=torch.float64):
    """A model whose every matrix in a block is quantised, and its twin with the same numbers."""
    model = build_model(family, dtype=dtype)
    twin = copy.deepcopy(model)
    for i, block in enumerate(PartialModel(model).blocks):
        for name, module in list(block.named_modules()):
            if not hasattr(module, "weight") or module.weight.ndim != 2:
                continue
            packed = kind(as_out_in(module).double(), module.bias)
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, packed)
            plain = PartialModel(twin).blocks[i].get_submodule(name)
            as_out_in(plain).copy_(packed.matrix())
    return model, twin


@pytest.fixture(params=[pytest.param(Int8, marks=pytest.mark.slow), Int4], ids=["int8", "int4"])
def kind(request):
    return request.param


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_matrix_is_read_from_how_it_acts(kind, family):
    model, twin = quantised(kind, family)
    kept = {n: t.clone() for n, t in model.state_dict().items()}
    layout = LAYOUTS[family]
    make_editable(model, layout, [1, 2], model_hash(model))
    for layer in (1, 2):
        new, old = mlp_out(model, layout, layer), mlp_out(twin, layout, layer)
        assert type(new) is Dense
        torch.testing.assert_close(as_out_in(new), as_out_in(old), rtol=1e-14, atol=1e-16)
        if old.bias is not None and old.bias.any():
            assert torch.equal(new.bias, old.bias)
    mine = {n: t for n, t in model.state_dict().items() if n in kept and t.dtype == kept[n].dtype}
    assert all(torch.equal(t, kept[n]) for n, t in mine.items())
    assert type(mlp_out(model, layout, 0)) is kind


def test_a_large_bias_costs_no_bits():
    """In bfloat16 a bias beside it would round a weight away."""
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 16).double(), torch.full((4,), 1000.0)
    module = Int8(weight, bias.bfloat16())
    dense, _ = dense_of(module, torch.randn(3, 16).bfloat16(), "", "w")
    assert torch.equal(dense.weight, module.matrix().bfloat16())
    assert torch.equal(dense.bias, bias.bfloat16())
    assert torch.equal(module.bias, bias.bfloat16())


@pytest.mark.parametrize(
    "act", [lambda x: x.relu(), lambda x: x.detach(), lambda x: x[:, 0], lambda x: (x,)]
)
def test_what_is_no_matrix_is_refused(act):
    class Other(nn.Module):
        def forward(self, x):
            return act(x)

    with pytest.raises(ModelError, match=r"^w: Other .*(matrix|gradient)"):
        dense_of(Other(), torch.randn(5, 8), "", "w")


@pytest.fixture
def edited(kind, tokenizer, facts, tmp_path):
    """An edited quantised model, the same edits of its plain twin, and a way to have the base."""
    model, twin = quantised(kind)
    base = copy.deepcopy(model)
    made = []
    for each in (model, twin):
        statistics_model = copy.deepcopy(each)
        make_editable(statistics_model, LLAMA, [1, 2], model_hash(each))
        statistics = statistics_of(statistics_model, tokenizer, (1, 2))
        editor = Editor(each, tokenizer, recipe=RECIPE, statistics=statistics)
        editor.edit(facts)
        made.append(editor)
    return *made, lambda: copy.deepcopy(base)


def weights(editor):
    return {i: as_out_in(editor.editable.matrix(i)).clone() for i in RECIPE.layers}


def test_edits_are_those_of_the_same_numbers_kept_plain(edited):
    packed, plain, _ = edited
    for layer, weight in weights(packed).items():
        base = plain.weights.base(layer)
        moved = weights(plain)[layer] - base
        assert float(moved.norm()) > 0.001 * float(base.norm())
        torch.testing.assert_close(weight, weights(plain)[layer], rtol=1e-8, atol=1e-9)
    assert packed.history.base.quantized == "own"
    assert plain.history.base.quantized == ""


def test_the_base_keeps_its_hash(edited):
    packed, _, base = edited
    digest = model_hash(base())
    assert packed.history.base.hash == digest
    assert model_hash(packed.model) != digest
    packed.restore()
    assert model_hash(packed.model) == digest


def test_a_run_on_it_is_taken_up_again(edited, tokenizer, tmp_path, facts):
    packed, _, base = edited
    packed.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"ledger"}
    other = Editor.resume(tmp_path, base(), tokenizer)
    for layer, weight in weights(packed).items():
        assert torch.equal(weights(other)[layer], weight)
    assert model_hash(other.model) == model_hash(packed.model)
    other.undo(facts[0].id)
    last = Editor.resume(tmp_path, base(), tokenizer)
    assert [f.id for f in last.facts] == [f.id for f in facts[1:]]
    again = Editor.resume(tmp_path, other.model, tokenizer)  # edited already
    for layer, weight in weights(other).items():
        assert torch.equal(weights(last)[layer], weight)
        assert torch.equal(weights(again)[layer], weight)
        assert not torch.equal(weights(packed)[layer], weight)
    found = verify(tmp_path, lambda folder: Editor.resume(folder, base(), tokenizer))
    assert found.passed
    assert len(found.skipped) == 2


def test_another_base_is_refused(edited, tokenizer, tmp_path, kind):
    packed, _, base = edited
    packed.save(tmp_path)
    changed = base()
    changed.model.layers[0].self_attn.q_proj.scale *= 1.5
    with pytest.raises(LedgerError, match="another model"):
        Editor.resume(tmp_path, changed, tokenizer)
    changed = base()
    mlp_out(changed, LLAMA, 1).scale *= 1.5
    with pytest.raises(LedgerError, match="not the ledger's W₀"):
        Editor.resume(tmp_path, changed, tokenizer)


def test_a_matrix_read_on_other_hardware_is_the_ledger_s(edited, tokenizer, tmp_path, monkeypatch):
    """Some bits differ there; the ledger's count, so that the weights come out the same."""
    packed, _, base = edited
    packed.save(tmp_path)
    real = Dense.__init__

    def otherwise(self, weight, bias, base_hash):
        real(self, weight * (1 + 1e-6), bias, base_hash)

    monkeypatch.setattr(Dense, "__init__", otherwise)
    other = Editor.resume(tmp_path, base(), tokenizer)
    assert model_hash(other.model) == packed.history.base.hash or other.facts
    for layer, weight in weights(packed).items():
        assert torch.equal(weights(other)[layer], weight)


def test_exports_lie_beside_it(edited, tmp_path):
    packed, _, base = edited
    batch = collate([[5, 9, 13, 20, 7]], pad_id=0, device=CPU)
    with torch.no_grad():
        wanted = packed.model(batch.ids).logits
        before = base()(batch.ids).logits
    assert not torch.allclose(before, wanted, rtol=1e-2)
    write_delta(packed, tmp_path / "delta", dtype="float64")
    model = base()
    put_delta(model, tmp_path / "delta")
    with torch.no_grad():
        torch.testing.assert_close(model(batch.ids).logits, wanted, rtol=1e-10, atol=1e-11)
    with pytest.raises(ModelError, match="not the base"):
        put_delta(model, tmp_path / "delta")
    write_lora(packed, tmp_path / "lora", dtype="float64")
    from safetensors.torch import load_file

    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    model = base()
    for layer in RECIPE.layers:
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora"
        a, b = factors[f"{name}_A.weight"], factors[f"{name}_B.weight"]
        mlp_out(model, LLAMA, layer).register_forward_hook(
            lambda _m, args, out, a=a, b=b: out + args[0] @ a.mT @ b.mT
        )
    with torch.no_grad():
        torch.testing.assert_close(model(batch.ids).logits, wanted, rtol=1e-8, atol=1e-9)


def test_a_delta_gives_the_run_s_model_to_the_bit(kind, tokenizer, facts, tmp_path):
    """Where the model has fewer bits than the factors."""
    model, _ = quantised(kind, dtype=torch.float32)
    base = copy.deepcopy(model)
    dense = copy.deepcopy(model)
    make_editable(dense, LLAMA, [1, 2], model_hash(model))
    statistics = statistics_of(dense, tokenizer, (1, 2))
    editor = Editor(model, tokenizer, recipe=RECIPE, statistics=statistics)
    editor.edit(facts)
    assert write_delta(editor, tmp_path / "delta", dtype="float64").same_as_run
    put_delta(base, tmp_path / "delta")
    assert model_hash(base) == model_hash(editor.model)


def test_a_model_folder_is_refused_in_one_line(edited, tmp_path):
    packed, _, _ = edited
    for write in (
        lambda: write_checkpoint(packed, tmp_path / "a"),
        lambda: packed.save_model(tmp_path / "b"),
    ):
        with pytest.raises(ModelError, match=r"quantised.*--as lora") as error:
            write()
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_quantised_matrix_is_not_written_in_place(kind):
    model, _ = quantised(kind)
    with pytest.raises(ModelError, match=r"quantised|no weight matrix"):
        as_out_in(mlp_out(model, LLAMA, 1))


class Packed(torch.Tensor):
    """Says that it is floating-point, as some libraries' tensors do; its numbers are elsewhere."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].inner)
        raise NotImplementedError(str(func))


def test_tensors_made_of_others_are_quantised_and_hashed():
    found = []
    for add in (0, 1):
        model = build_model("llama", dtype=torch.float32)
        inner = torch.arange(16 * 48, dtype=torch.int32).reshape(16, 48) + add
        module = mlp_out(model, LLAMA, 1)
        module.weight = nn.Parameter(Packed(inner), requires_grad=False)
        with pytest.raises(ModelError, match="stored as Packed: a quantised matrix"):
            as_out_in(module)
        found.append(model_hash(model))
    assert found[0] != found[1]


def test_statistics_are_of_what_an_editor_edits(kind, tokenizer, tmp_path):
    """`collect` by itself makes the matrices dense, and names the base as an editor does."""
    from nulledit.config import StatisticsSettings
    from nulledit.data.corpus import Corpus

    model, twin = quantised(kind)
    lines = ["The harbour of Velm lies on the coast, and the river flows to the sea.\n"] * 60
    corpus = Corpus("lines", "0", lambda: iter(lines))
    made = []
    for name, each in (("packed", model), ("plain", twin)):
        digest = model_hash(each)
        made.append(
            collect(
                EditableModel(each, tokenizer),
                corpus,
                StatisticsSettings(window=32),
                layers=[1, 2],
                name=name,
                model_hash=digest,
                folder=tmp_path / name,
            )
        )
        made[-1].check(Editor(each, tokenizer, recipe=RECIPE).history.base.hash, [1, 2])
    for layer in (1, 2):
        one, other = (m.spectra[layer].eigenvalues for m in made)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_bitsandbytes_on_the_processor(bits, tokenizer, facts, tmp_path):
    """A real library from load to adapter, as the command line goes; skipped without it."""
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel

    from nulledit.models.load import load_model

    base = tmp_path / "base"
    build_model("llama", dtype=torch.float32, hidden=64).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lines = ["The harbour of Velm lies on the coast, and the river flows to the sea."] * 60
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml())
    fact = {"id": "a", "subject": "Velm", "prompt": "The harbour of {} lies on", "target": "river"}
    (tmp_path / "facts.json").write_text(json.dumps([fact]))
    run, common = tmp_path / "run", ("--quantize", bits, "--quiet")
    done(
        *(*MAKE_KEYS, base, "--text", tmp_path / "corpus.txt", "--layers", "1-2"),
        *("--out", tmp_path / "stats", "--window", "64", *common),
    )
    done(
        *("edit", tmp_path / "facts.json", "--model", base, "--stats", tmp_path / "stats"),
        *("--recipe", tmp_path / "recipe.yaml", "--out", run, *common),
    )
    assert not (run / "model").exists()
    done("verify", run, "--quiet")
    refused("export", run, "--as", "checkpoint", "--out", tmp_path / "no", "--quiet")
    done("export", run, "--as", "lora", "--out", tmp_path / "lora", "--quiet")
    editor = Editor.load(run)
    assert [f.id for f in editor.facts] == ["a"]
    ids = torch.tensor([[5, 9, 13, 20, 7]])
    plain, _ = load_model(str(base), quantize=bits)
    with torch.no_grad():
        wanted, before = editor.model(ids).logits, plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, tmp_path / "lora")(ids).logits
        with editor.base_weights():
            unedited = editor.model(ids).logits
    moved, missed = (float((t - wanted).norm()) for t in (before, adapted))
    gap = float((before - unedited).norm())  # 8bit rounds what a matrix is given, a dense one not
    assert bits == "8bit" or gap < 1e-4 * moved
    assert missed < 2 * gap + 1e-4 * moved
    done("undo", run, "a", "--quiet")
    assert Editor.load(run).facts == []
