"""Models whose parts lie on several devices, or are offloaded until they work."""

import copy
import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    add_hook_to_module,
    attach_align_device_hook,
)
from accelerate.utils import PrefixedDataset
from support.cli import MAKE_KEYS, RECORDS, done, refused
from support.locating import question
from support.models import LINES, RECIPE, build_model, statistics_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from nulledit import Editor
from nulledit.cli.common import own_device
from nulledit.config import Placement
from nulledit.editing.contexts import make_contexts
from nulledit.editing.kept_rows import Job, KeptRows
from nulledit.editing.keys import LayerwiseForward
from nulledit.editing.reads import Reads
from nulledit.editing.values import plan_rows
from nulledit.errors import ConfigError, ModelError
from nulledit.evaluation.generation import generate_answers
from nulledit.ledger.epoch_solver import EpochSolver
from nulledit.linalg.moments import SecondMoment
from nulledit.models.batches import collate
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import LAYOUTS, as_out_in, mlp_out, parameter_name
from nulledit.models.load import load_model, model_hash
from nulledit.models.partial import PartialModel
from nulledit.models.placement import devices_of, is_offloaded, make_resident
from nulledit.parallel.ranks import Ranks
from nulledit.statistics.collect import key_moments
from nulledit.tracing import TraceSettings, trace

ROWS = [[5, 9, 13, 20, 7], [8, 3], [30, 31, 32]]
CPU = torch.device("cpu")
LLAMA = LAYOUTS["llama"]


def parts_of(model, *, disk):
    """A device map by parts: blocks numbered in `disk`, the embedding and the head on disk."""
    layout = PartialModel(model).layout
    body = layout.blocks.rpartition(".")[0]
    parts = {}
    for name, module in model.get_submodule(body).named_children():
        path = f"{body}.{name}"
        if path == layout.blocks:
            parts |= {f"{path}.{i}": "disk" if i in disk else "cpu" for i in range(len(module))}
        else:
            embedding = module is model.get_input_embeddings()
            parts[path] = "disk" if embedding else "cpu"
    for name, _ in model.named_children():
        if name != body.partition(".")[0]:
            parts[name] = "disk"
    return parts


def on_disk(model, folder, disk=(1, 2)):
    """A copy with some parts on disk."""
    copied = copy.deepcopy(model)
    skip = copied._skip_keys_device_placement
    parts = parts_of(model, disk=disk)
    return dispatch_model(copied, parts, offload_dir=str(folder), skip_keys=skip)


def offloaded(model, folder):
    """A copy all of which waits on the CPU's side."""
    return cpu_offload(copy.deepcopy(model), execution_device=CPU)


WAYS = (on_disk, offloaded)


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request):
    return request.param


@pytest.mark.few
@torch.no_grad()
def test_a_split_model_is_the_model(architecture, tiny_model, tmp_path, way):
    """Spans, kept prefixes, keys and logits; with hooks that bring each module's weights in."""
    plain = tiny_model(architecture)
    found = []
    for model in (plain, way(plain, tmp_path)):
        partial = PartialModel(model)
        batch = collate(ROWS, pad_id=0, device=partial.device)
        states = partial.run(batch, last=0)
        with partial.reading_keys([1, 2]) as keys:
            upper = partial.run(batch, states=states, first=1, last=2)
        normed = partial.run_normed(batch, states=upper, first=3)
        prefix = partial.record_prefix(batch, states, first=1)
        again = partial.run_normed(
            collate(ROWS, pad_id=0, device=partial.device),
            states=states,
            first=1,
        )
        found.append([states, upper, keys[1], keys[2], normed, partial.logits(normed), again])
        found[-1] += [t for e in prefix.entries if e for t in e]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.few
def test_a_split_model_has_the_plain_one_s_hash(architecture, tiny_model, tmp_path, way):
    plain = tiny_model(architecture)
    model = way(plain, tmp_path)
    assert is_offloaded(model)
    assert model_hash(model) == model_hash(plain)
    PartialModel(model)  # a pass takes tied placeholders apart
    assert model_hash(model) == model_hash(plain)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
def test_tied_weights_count_once_wherever_they_are(family, place, tmp_path):
    """Together in memory or each offloaded by itself, beside blocks on disk."""
    plain = build_model(family, dtype=torch.float32)
    plain.config.tie_word_embeddings = True
    plain.tie_weights()
    plain.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    head = plain.get_output_embeddings().weight
    assert head.data_ptr() == plain.get_input_embeddings().weight.data_ptr()
    parts = {
        part: device if ".1" in part or ".2" in part else place
        for part, device in parts_of(plain, disk=(1, 2)).items()
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", device_map=parts)
    assert is_offloaded(model)
    for _ in range(2):
        assert model_hash(model) == model_hash(plain)
        PartialModel(model)


@pytest.fixture(params=["llama", pytest.param("gpt2", marks=pytest.mark.slow), "gemma2"])
def kind(request):
    return request.param


def test_edits_of_a_split_model_are_the_plain_one_s(
    kind, tiny_model, tokenizer, facts, tmp_path, way
):
    plain = tiny_model(kind)
    statistics = statistics_of(plain, tokenizer)
    found = []
    for model in (plain, way(plain, tmp_path / "off")):
        editor = Editor(model, tokenizer, recipe=RECIPE, statistics=statistics)
        report = editor.edit(facts)
        editor.undo(facts[0].id)
        found.append((editor, report, model_hash(model)))
    (one, first, hash_of_one), (other, second, hash_of_other) = found
    assert [c.outcome for c in first.columns] == [c.outcome for c in second.columns]
    for layer in RECIPE.layers:
        mine, theirs = (as_out_in(e.editable.matrix(layer)) for e in (one, other))
        assert not torch.equal(mine, one.weights.base(layer))
        assert torch.equal(mine, theirs)
    assert hash_of_one == hash_of_other
    assert one.history.base.hash == other.history.base.hash
    assert is_offloaded(other.model)
    said = [
        generate_answers(editor.editable, ["The river flows to the"], max_new_tokens=4)
        for editor in (one, other)
    ]
    assert said[0] == said[1]


def test_descent_on_a_weight_of_a_split_model(tiny_model, tokenizer, facts, tmp_path, way):
    plain = tiny_model("llama")
    statistics = statistics_of(plain, tokenizer)
    recipe = RECIPE.with_fields({"method.name": "ft", "layers": [1]})
    found = []
    for model in (plain, way(plain, tmp_path / "off")):
        editor = Editor(model, tokenizer, recipe=recipe, statistics=statistics)
        editor.edit(facts[:2])
        found.append(as_out_in(editor.editable.matrix(1)).clone())
    assert torch.equal(*found)


def test_statistics_contexts_and_traces_of_a_split_model(tiny_model, tokenizer, tmp_path, way):
    plain = tiny_model("llama")
    found = []
    for model in (plain, way(plain, tmp_path / "off")):
        make_resident(model, parameter_name(model, LLAMA, 1).removesuffix(".weight"))
        editable = EditableModel(model, tokenizer)
        moments = key_moments(editable, ROWS, [1])
        settings = replace(RECIPE.contexts, texts=(), count=2, tokens=4)
        texts = make_contexts(editable, settings, seed=1)
        told = trace(editable, question(), TraceSettings(draws=2), spread=0.3)
        found.append((moments[1].value, texts, told))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    for kind, effects in found[0][2].effects.items():
        assert torch.equal(effects, found[1][2].effects[kind])


# -- what is brought in ----------------------------------------------------------------------


class Counting:
    """A map of offloaded weights that counts what is asked of it."""

    def __init__(self, weights):
        self.weights, self.asked = weights, []

    def __getitem__(self, name):
        self.asked.append(name)
        return self.weights[name]

    def __contains__(self, name):
        return name in self.weights

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


def counted(model):
    """`model` with all weights offloaded, and the map that they are taken from."""
    weights = Counting({n: t.clone() for n, t in model.state_dict().items()})
    device = torch.device("cpu")
    attach_align_device_hook(model, execution_device=device, offload=True, weights_map=weights)
    return model, weights


@torch.no_grad()
def test_only_blocks_that_run_are_brought_in(tiny_model):
    model, weights = counted(tiny_model("llama"))
    partial = PartialModel(model)
    batch = collate(ROWS, pad_id=0, device=CPU)
    states = partial.run(batch, last=0)
    weights.asked.clear()
    partial.run(batch, states=states, first=1, last=1)
    blocks = {name.split(".")[2] for name in weights.asked if ".layers." in name}
    assert blocks == {"1"}
    weights.asked.clear()
    partial.logits(states)
    assert set(weights.asked) == {"lm_head.weight"}


def test_an_edited_matrix_stays(tiny_model):
    """Brought in once; what is written is neither lost nor written through to the map."""
    model, weights = counted(tiny_model("llama"))
    name = parameter_name(model, LLAMA, 1)
    make_resident(model, name.removesuffix(".weight"))
    before = weights.weights[name].clone()
    view = as_out_in(mlp_out(model, LLAMA, 1))
    view += 1.0
    weights.asked.clear()
    with torch.no_grad():
        model(input_ids=torch.tensor([ROWS[0]]))
    assert name not in weights.asked
    assert torch.equal(as_out_in(mlp_out(model, LLAMA, 1)), before + 1.0)
    assert torch.equal(weights.weights[name], before)
    other = parameter_name(model, LLAMA, 2)
    assert other in weights.asked


def test_an_edited_matrix_stays_with_what_is_brought_in_together(tiny_model):
    """Where a whole block is brought in by one hook, the block stays."""
    plain = tiny_model("llama")
    model = copy.deepcopy(plain)
    block = model.model.layers[1]
    add_hook_to_module(
        block, AlignDevicesHook(execution_device="cpu", offload=True, place_submodules=True)
    )
    assert is_offloaded(block)
    make_resident(model, "model.layers.1.mlp.down_proj")
    assert not is_offloaded(block)
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        as_out_in(mlp_out(model, LLAMA, 1)).add_(1.0)
        as_out_in(mlp_out(plain, LLAMA, 1)).add_(1.0)
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_gradients_do_not_keep_offloaded_weights(tiny_model):
    """Between forward and backward no weight of a block is alive but those that stay."""
    model, weights = counted(tiny_model("llama").requires_grad_(False))
    partial = PartialModel(model)
    batch = collate(ROWS, pad_id=0, device=CPU)
    with torch.no_grad():
        states = partial.run(batch, last=0)
    sizes = {t.shape for n, t in weights.weights.items() if ".layers." in n and t.ndim == 2}
    held = {t.data_ptr() for t in weights.weights.values()}

    def alive():
        gc.collect()
        return sum(
            type(o) is torch.nn.Parameter
            and o.device.type == "cpu"
            and o.shape in sizes
            and o.data_ptr() not in held
            for o in gc.get_objects()
        )

    copied = Copying(weights)
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        if hook is not None:
            hook.weights_map = PrefixedDataset(copied, hook.weights_map.prefix)
    before, gradients = alive(), []
    for grows in (True, False):
        given = states.clone().requires_grad_(True)
        if grows:
            found = model.model(inputs_embeds=given, attention_mask=batch.mask)[0]
        else:
            found = partial.run_normed(batch, states=given, first=1)
        kept = alive() - before
        assert (kept > 0) == grows, kept
        (gradient,) = torch.autograd.grad(found.square().sum(), given)
        gradients.append(gradient)
        del found
    plain = PartialModel(build_model("llama").requires_grad_(False))
    given = states.clone().requires_grad_(True)
    found = plain.run_normed(batch, states=given, first=1)
    (expected,) = torch.autograd.grad(found.square().sum(), given)
    assert torch.equal(gradients[1], expected)


class Copying(Counting):
    """Gives copies, as a move to another device does."""

    def __getitem__(self, name):
        return self.weights[name].clone()


# -- several devices -------------------------------------------------------------------------


class Placing(TorchFunctionMode):
    """`torch.tensor` makes a real tensor first, which forgets the number of a CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            made = func(*args, **kwargs)
            return torch.empty(made.shape, dtype=made.dtype, device=device)
        return func(*args, **kwargs)


def spread(model, tokenizer):
    """Fake `model`: no data, but each tensor has a device and refuses to meet another's.

    The embedding and the head are on one device, the blocks on three, none as its neighbour.
    """
    partial = EditableModel(model, tokenizer)  # looks at numbers, so before
    partial.vocabulary = None  # to compare ids with
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        body = partial.layout.blocks.rpartition(".")[0]
        parts = {f"{body}.{name}": 0 for name, _ in model.get_submodule(body).named_children()}
        parts |= {name: 0 for name, _ in model.named_children() if name != body.split(".")[0]}
        parts |= {f"{partial.layout.blocks}.{i}": place for i, place in enumerate((0, 1, 2, 1))}
        del parts[partial.layout.blocks]
        for path, place in parts.items():  # a part of a part comes after it
            device = torch.device("cpu", 1 + place)
            for _, module in model.get_submodule(path).named_modules():
                for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                    if tensor is not None:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        if name in module._parameters:
                            module._parameters[name] = torch.nn.Parameter(fake, False)
                        else:
                            module._buffers[name] = fake
            for module in model.get_submodule(path).modules():
                hook = AlignDevicesHook(skip_keys=model._skip_keys_device_placement)
                add_hook_to_module(module, hook)
                hook.execution_device = device
        hook = AlignDevicesHook(io_same_device=True, skip_keys=model._skip_keys_device_placement)
        add_hook_to_module(model, hook)
        hook.execution_device = torch.device("cpu", 1)
    return partial, mode


@pytest.mark.few("llama", "gemma2", of="family")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma2", "opt", "granite"])
def test_no_tensor_meets_one_of_another_device(family, tokenizer, facts, monkeypatch):
    # A fake mask has no numbers to look at: prefixes are always put in order.
    monkeypatch.setattr("nulledit.models.prefix.padded_after", lambda _mask: True)
    model = build_model(family, dtype=torch.float32).requires_grad_(False)
    partial, mode = spread(model, tokenizer)
    with mode, Placing():
        assert str(partial.device) == "cpu:1"
        batch = collate(ROWS, pad_id=0, device=partial.device)
        with torch.no_grad():
            states, _ = partial.run_to_values(batch, layer=1)
            with partial.reading_keys([1, 2]) as keys:
                partial.run(batch, states=states, first=1, last=2)
            assert {keys[i].device.index for i in (1, 2)} == {2, 3}
            normed = partial.run_normed(batch, states=states, first=2)
            partial.logits(normed)
            walk = LayerwiseForward(
                partial,
                facts,
                first=1,
                contexts=("{}", "Then. {}"),
                bare_weight=0.5,
            )
            assert str(walk.keys().device) == "cpu"
            walk.advance()
        jobs = [
            Job(fact.id, plan_rows(fact, partial.encoder, ("{}", "Then. {}")), (), (0, 1), None, i)
            for i, fact in enumerate(facts)
        ]
        kept = KeptRows(partial, jobs, [1])
        width = kept.start.shape[-1]
        deltas = [torch.zeros(1, width, device=kept.start.device, requires_grad=True) for _ in jobs]
        nll, drift, *_ = Reads(kept, [0, 2]).losses(deltas, {})
        used = [deltas[0], deltas[2]]
        gradients = torch.autograd.grad((nll + drift).sum(), used)
        assert {str(g.device) for g in gradients} == {str(kept.start.device)}


# -- two-byte weights ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_solves_are_exact_and_round_once(dtype, tokenizer, facts, tmp_path, monkeypatch):
    """Keys come in two bytes; sums and solves are float64; W = round(W₀ + Δ)."""
    model = build_model("llama", dtype=dtype)
    read = []
    real = SecondMoment.update
    monkeypatch.setattr(
        SecondMoment, "update", lambda self, keys: (read.append(keys.clone()), real(self, keys))
    )
    moment = key_moments(EditableModel(model, tokenizer), ROWS, [1])[1]
    keys = torch.cat([k.reshape(-1, k.shape[-1]) for k in read])
    assert keys.dtype == dtype
    assert moment.value.dtype == torch.float64
    expected = keys.double().mT @ keys.double() / len(keys)
    assert float((moment.value - expected).norm()) < 1e-5 * float(expected.norm())
    monkeypatch.undo()
    statistics = statistics_of(model, tokenizer)
    solved = []
    add = EpochSolver.add

    def adding(self, *args, **kwargs):
        solved.append(add(self, *args, **kwargs))
        return solved[-1]

    monkeypatch.setattr(EpochSolver, "add", adding)
    editor = Editor(model, tokenizer, recipe=RECIPE, statistics=statistics)
    report = editor.edit(facts, batch_size=2)
    assert len(solved) >= 4
    for state in solved:
        assert {t.dtype for t in (state.total, state.edit.delta, state.weight)} == {torch.float64}
        assert state.start.base.dtype == dtype, "one float64 matrix a layer"
        assert not torch.equal(state.total.float().double(), state.total)
    for layer, told in zip(RECIPE.layers, report.layers, strict=True):
        exact, base = editor.weights.exact(layer), editor.weights.base(layer)
        stored = as_out_in(editor.editable.matrix(layer))
        assert stored.dtype == dtype
        assert torch.equal(stored, exact.to(dtype))
        assert not torch.equal(stored.double(), exact)
        share = (exact.to(dtype).double() - exact).norm() / (exact - base).norm()
        assert told.rounding_share == pytest.approx(float(share))
    editor.save(tmp_path / "run")
    again = Editor.load(tmp_path / "run")
    for layer in RECIPE.layers:  # nothing of the first batch's rounding is in the second's solve
        assert torch.equal(again.weights.exact(layer), editor.weights.exact(layer))


# -- loading, and the command line -----------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("large") / "model"
    build_model("llama", dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def split_map(disk=(1, 2)):
    blocks = {f"model.layers.{i}": "disk" if i in disk else "cpu" for i in range(4)}
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return {**dict.fromkeys(names, "cpu"), **blocks}


@pytest.mark.parametrize(
    "placement",
    [
        Placement(split_map()),
        Placement("auto", {"cpu": 40_000}),
        Placement("sequential", {"cpu": 40_000}),
        Placement("cpu"),
    ],
    ids=lambda p: str(p.device_map)[:10],
)
def test_a_placed_model_is_the_plain_one(saved, placement):
    plain, _ = load_model(str(saved))
    model, _ = load_model(str(saved), device=placement)
    assert is_offloaded(model) == (placement.device_map != "cpu")
    assert devices_of(model) == (("cpu", "offloaded") if is_offloaded(model) else ("cpu",))
    assert model_hash(model) == model_hash(plain)
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_runs_of_split_models_are_kept_and_taken_up(saved, tokenizer, facts, tmp_path):
    """Also where weights on disk are read from the very files that a save rewrites."""
    plain, _ = load_model(str(saved))
    statistics = statistics_of(plain, tokenizer)
    placement, found = Placement(split_map()), []
    for device in (None, placement):
        run = tmp_path / f"run-{device is None}"
        editor = Editor.from_pretrained(
            str(saved), recipe=RECIPE, statistics=statistics, device=device
        )
        editor.edit(facts[:2])
        editor.save(run)
        other = Editor.load(run, device=device)
        other.undo(facts[0].id)
        other.save(run)
        assert is_offloaded(other.model) == (device is not None)
        last = Editor.load(run)
        found.append(model_hash(last.model))
        assert model_hash(other.model) == found[-1]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("placement", "told"),
    [
        (Placement("moon"), "no device"),
        (Placement({"model": "cpu", "lm_head": "moon"}), "lm_head"),
        (Placement({"model": True}), "no device"),
        (Placement({}), "empty"),
        (Placement("cpu", {"cpu": "1GB"}), "max_memory"),
        (Placement("meta"), "no device"),
    ],
)
def test_a_place_that_is_none_is_refused(saved, placement, told):
    with pytest.raises(ConfigError, match=told):
        load_model(str(saved), device=placement)


def test_a_model_without_data_is_refused(tiny_model):
    model = tiny_model("llama").to("meta")
    with pytest.raises(ModelError, match="no data"):
        make_resident(model, "model.layers.1.mlp.down_proj")


@pytest.mark.slow
def test_the_command_line_spreads_a_model(saved, tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    (tmp_path / "map.json").write_text(json.dumps(split_map()))
    (tmp_path / "facts.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    recipe = RECIPE.with_fields({"values.steps": 2, "batch_size": 2})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    spread, found = ("--device-map", tmp_path / "map.json"), []
    for name, placing in (("plain", ()), ("split", spread)):
        stats, run = tmp_path / f"stats-{name}", tmp_path / name
        done(
            *(*MAKE_KEYS, saved, "--text", tmp_path / "corpus.txt", "--layers", "1-2"),
            *("--window", "64", "--out", stats, "--quiet", *placing),
        )
        done(
            *("edit", tmp_path / "facts.json", "--model", saved, "--stats", stats, "--out", run),
            *("--recipe", tmp_path / "recipe.yaml", "--quiet", *placing),
        )
        done("evaluate", run, "--quiet", *placing)
        done("undo", run, "ada", "--quiet", *placing)
        found.append(json.loads((run / "model" / "nulledit.json").read_text()))
        environment = json.loads((run / "environment.json").read_text())
        assert environment[0]["device"] == ("cpu, offloaded" if placing else "cpu")
    weights = [
        {n: h for n, h in state["files"].items() if n.endswith(".safetensors")} for state in found
    ]
    assert weights[0] == weights[1]
    assert found[0]["state"] == found[1]["state"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--device-map", "nowhere"), "no device"),
        (("--device-map", "none.json"), "no such file"),
        (("--device-map", "cpu", "--device", "cpu"), "not both"),
        (("--device-map", "auto", "--max-memory", "much"), "--max-memory"),
        (("--max-memory", "cpu=1GiB"), "go with --device-map"),
    ],
)
def test_bad_placing_is_one_line(saved, tmp_path, words, told):
    (tmp_path / "facts.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    run = ("--out", tmp_path / "run", "--layers", "1", "--quiet")
    line = refused("edit", tmp_path / "facts.json", "--model", saved, *run, *words)
    assert told in line


ENCODERS = {
    "bert": {},
    "electra": {"embedding_size": 16},
    "xlm-roberta": {},
    "modernbert": dict.fromkeys(("cls_token_id", "sep_token_id", "pad_token_id"), 0),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_are_refused_in_one_line(kind, tokenizer, tmp_path):
    config = AutoConfig.for_model(
        kind,
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        **{**ENCODERS[kind], "bos_token_id": 0, "eos_token_id": 0},
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "facts.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    run = ("--out", tmp_path / "run", "--layers", "1", "--quiet")
    line = refused("edit", tmp_path / "facts.json", "--model", tmp_path / "model", *run)
    assert "decoder-only language model" in line


def test_several_ranks_spread_no_model():
    assert own_device(Ranks(), Placement("auto")) == Placement("auto")
    alone = SimpleNamespace(alone=False)
    with pytest.raises(ConfigError, match="several ranks"):
        own_device(alone, Placement("auto"))
