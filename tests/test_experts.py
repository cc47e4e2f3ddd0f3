"""Mixtures of experts: one matrix, keys with a block for each expert, moments in blocks."""

import copy
import dataclasses
import json
import logging

import pytest
import reference
import tiny_models
import torch
from safetensors.torch import load_file
from support.exports import gap, logits
from support.models import RECIPE, build_model, statistics_of
from torch import nn
from transformers import AutoModelForCausalLM

from nulledit import Editor
from nulledit.config import StatisticsSettings
from nulledit.data.corpus import open_corpus
from nulledit.editing.target_loss import WeightLoss
from nulledit.errors import ConfigError, ModelError, StatisticsError
from nulledit.export import apply_delta, remove_delta, write_checkpoint, write_delta, write_lora
from nulledit.linalg.moments import SecondMoment
from nulledit.linalg.solve import room_left, solve_update
from nulledit.linalg.spectrum import RULES, Spectrum
from nulledit.methods import METHODS
from nulledit.models.batches import collate
from nulledit.models.editable_model import EditableModel
from nulledit.models.experts import gives_w_times_key, is_experts, keys_of
from nulledit.models.layouts import (
    LAYOUTS,
    as_out_in,
    as_stored,
    frozen,
    mlp_out,
    turned,
    write_weight,
)
from nulledit.models.load import model_hash
from nulledit.models.partial import PartialModel
from nulledit.runs.verify import MATRICES, verify
from nulledit.statistics import collect as statistics_module
from nulledit.statistics.collect import collect, key_moments
from nulledit.statistics.manifest import read_manifest, write_manifest
from nulledit.statistics.merge import merge_statistics
from nulledit.statistics.spectra import Statistics

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
TEXT = (
    "The river flows to the sea.\n\nAda Byron lives in London, and Karo Dun works as a baker.\n" * 6
)
ROWS = [[5, 9, 13, 20, 7], [8, 3], [30, 31, 32]]
CPU = torch.device("cpu")


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return request.param


def keys_from(model, rows, *, left=False, layer=1):
    """Keys of each row's tokens."""
    partial = PartialModel(model)
    batch = collate(rows, pad_id=0, device=CPU, left=left)
    with torch.no_grad(), partial.reading_keys([layer]) as found:
        partial.run(batch, last=layer)
    return [k[m.bool()] for k, m in zip(found[layer], batch.mask, strict=True)]


# -- the matrix and its keys -----------------------------------------------------------------


def test_keys_do_not_depend_on_padding_or_other_rows(mixture):
    model = build_model(mixture)
    for left in (False, True):
        for row, found in zip(ROWS, keys_from(model, ROWS, left=left), strict=True):
            torch.testing.assert_close(found, keys_from(model, [row])[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kernel", ["eager", "batched_mm", "grouped_mm"])
@torch.no_grad()
def test_every_kernel_gives_what_is_written(mixture, kernel):
    """Three facts at once, so that experts are shared: W's output moves by each one's residual."""
    model = build_model(mixture, dtype=torch.float32)
    model.set_experts_implementation(kernel)
    module = mlp_out(model, LAYOUTS[mixture], 1)
    outputs = []
    module.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    ids = torch.tensor([[5, 9, 13]])
    keys = keys_from(model, ids.tolist())[0].double()  # [3, d_in]
    residual = torch.randn(keys.shape[0], model.config.hidden_size, dtype=torch.float64)
    model(ids)
    write_weight(module, as_out_in(module).double() + residual.mT @ torch.linalg.pinv(keys.mT))
    model(ids)
    before, after = outputs[-2:]
    torch.testing.assert_close((after - before).double(), residual, rtol=1e-3, atol=1e-3)


class Turned(nn.Module):
    """Experts kept as [E, d_in, d_out], as some families have them, and without gates."""

    is_transposed, has_gate, act_fn, _apply_gate = True, False, nn.ReLU(), None

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 4, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for t, (experts, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for e, p in zip(experts, weights, strict=True):
                out[t] += p * self.act_fn(hidden_states[t] @ self.up_proj[e]) @ self.down_proj[e]
        return out


@torch.no_grad()
def test_either_orientation_is_one_matrix():
    torch.manual_seed(0)
    module = Turned()
    given = (torch.randn(5, 4), torch.tensor([[0, 2], [1, 2], [0, 1], [2, 2], [0, 1]]))
    given = (*given, torch.rand(5, 2))
    assert is_experts(module)
    matrix, keys = as_out_in(module), keys_of(module, given, {})
    torch.testing.assert_close(keys @ matrix.mT, module(*given))
    names = dict(zip(("top_k_weights", "top_k_index"), given[:0:-1], strict=True))
    assert torch.equal(keys_of(module, given[:1], names), keys)
    assert gives_w_times_key(module, given, {}, module(*given))
    assert not gives_w_times_key(module, given, {}, module(*given) + 0.1)
    assert torch.equal(as_stored(module, matrix), module.down_proj)
    assert torch.equal(turned(module, as_stored(module, 2 * matrix)), 2 * matrix)
    with pytest.raises(ValueError, match=r"expected a weight \(4, 18\)"):
        write_weight(module, matrix.mT)


def test_experts_that_do_more_are_refused(tokenizer, facts, monkeypatch):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    plain = MixtralExperts.forward
    monkeypatch.setattr(MixtralExperts, "forward", lambda *a, **k: plain(*a, **k) + 1)
    model = build_model("mixtral")
    with pytest.raises(ModelError, match=r"mlp.experts of block 1 writes is not its experts'"):
        Editor(model, tokenizer, recipe=RECIPE).edit(facts)


def test_a_dense_block_among_them_is_refused_alone(tokenizer, facts):
    """Qwen's MoE families may have plain MLPs in some blocks."""
    from transformers import AutoConfig

    config = build_model("qwen3_moe").config.to_dict()
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**config, "mlp_only_layers": [2]}), experts_implementation="eager"
    ).double()
    with pytest.raises(
        ModelError, match=r"block 2 has no module mlp.experts; blocks 0, 1, 3 have it"
    ):
        Editor(model, tokenizer, recipe=RECIPE)
    recipe = dataclasses.replace(RECIPE, layers=(0, 1))
    statistics = statistics_of(model, tokenizer, (0, 1))
    editor = Editor(model, tokenizer, recipe=recipe, statistics=statistics)
    assert all(layer.update_share > 0 for layer in editor.edit(facts).layers)


# -- statistics ------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return open_corpus(tmp_path / "text.txt")


def made(model, tokenizer, corpus, folder, **options):
    return collect(
        EditableModel(model, tokenizer),
        corpus,
        StatisticsSettings(window=16),
        layers=(0, 2),
        name="tiny",
        model_hash=model_hash(model),
        folder=folder,
        **options,
    )


def same(a, b):
    return a.tokens == b.tokens and all(
        torch.equal(a.blocks[i].eigenvalues, b.blocks[i].eigenvalues)
        and (a.blocks[i].eigenvectors - b.blocks[i].eigenvectors).abs().max() < 1e-6
        for i in a.blocks
    )


def test_moments_are_the_diagonal_blocks_of_the_plain_one(mixture, tokenizer, corpus, tmp_path):
    model = build_model(mixture)
    found = made(model, tokenizer, corpus, tmp_path / "out")
    texts = [line for line in corpus.texts() if line.strip()]
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]]
    windows = [stream[i : i + 16] for i in range(0, len(stream), 16)]
    for layer, spectrum in found.spectra.items():
        module, keys = reference.mlp_out(model, layer), []
        for window in windows:
            ids = torch.tensor([window])
            keys.append(reference.read(model, ids, torch.ones_like(ids), module, inputs=True)[0])
        K = torch.cat(keys)
        assert found.manifest.tokens == len(K)
        plain = reference.diagonal_blocks(K.mT @ K / len(K), spectrum.width)
        blocks = plain.unflatten(0, (-1, spectrum.width)).unflatten(2, (-1, spectrum.width))
        counts = (K.unflatten(1, (-1, spectrum.width)) != 0).any(2).sum(0).tolist()
        assert spectrum.tokens == tuple(counts)
        assert list(spectrum.blocks) == [i for i, n in enumerate(counts) if n >= spectrum.width]
        for i, block in spectrum.blocks.items():
            rebuilt = block.eigenvectors @ torch.diag(block.eigenvalues) @ block.eigenvectors.mT
            torch.testing.assert_close(rebuilt, blocks[i, :, i], rtol=1e-6, atol=1e-8)


def test_statistics_read_back_and_go_on(tokenizer, corpus, tmp_path, monkeypatch):
    model = build_model("qwen3_moe")
    found = made(model, tokenizer, corpus, tmp_path / "out", positions=16)
    again = Statistics.load(tmp_path / "out")
    assert again.manifest == found.manifest
    assert all(same(again.spectra[i], found.spectra[i]) for i in found.spectra)
    thresholds = {i: RULES["leakage"](s.eigenvalues, 0.2) for i, s in found.spectra.items()}
    found.save_compact(tmp_path / "small.safetensors", thresholds)
    small = Statistics.load(tmp_path / "small.safetensors")
    keys = torch.randn(found.spectra[0].d_in, 5, dtype=torch.float64)
    for i, threshold in thresholds.items():
        whole, thin = (s.spectra[i] for s in (found, small))
        a, b = (
            s.preconditioner((s.eigenvalues < threshold).double()).apply(keys)
            for s in (whole, thin)
        )
        assert (a - b).norm() / a.norm() < 5e-3, "half precision"
    counted = []

    def dies(_stage, done, _total):
        counted.append(done)
        if len(counted) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(statistics_module, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        made(model, tokenizer, corpus, tmp_path / "cut", positions=16, progress=dies)
    resumed = made(model, tokenizer, corpus, tmp_path / "cut", positions=16)
    for i, spectrum in found.spectra.items():
        assert resumed.spectra[i].tokens == spectrum.tokens
        torch.testing.assert_close(resumed.spectra[i].eigenvalues, spectrum.eigenvalues)


def test_merged_statistics_count_each_experts_tokens(tokenizer, corpus, tmp_path):
    lines = list(corpus.texts())
    model, parts = build_model("mixtral"), []
    for name, part in (("a", lines[::2]), ("b", lines[1::2])):
        (tmp_path / f"{name}.txt").write_text("".join(part))
        parts.append(made(model, tokenizer, open_corpus(tmp_path / f"{name}.txt"), tmp_path / name))
    merged = merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    files = (load_file(tmp_path / name / "moments.safetensors") for name in ("a", "b", "merged"))
    sums = [tensors["sum.2"] for tensors in files]
    torch.testing.assert_close(sums[0] + sums[1], sums[2])
    for i, spectrum in merged.spectra.items():
        counted = zip(*(part.spectra[i].tokens for part in parts), strict=True)
        assert spectrum.tokens == tuple(map(sum, counted))


def test_a_spectrum_that_a_file_lacks_is_missed(tokenizer, corpus, tmp_path):
    from safetensors.torch import save_file

    made(build_model("mixtral"), tokenizer, corpus, tmp_path / "out")
    file = tmp_path / "out/spectra.safetensors"
    tensors = load_file(file)
    expert = next(n for n in tensors if n.startswith("eigenvalues.0.")).removeprefix("eigenvalues.")
    save_file({n: t for n, t in tensors.items() if not n.endswith(f".{expert}")}, file)
    manifest, hashes = read_manifest(tmp_path / "out")
    write_manifest(tmp_path / "out", manifest, list(hashes))
    with pytest.raises(StatisticsError, match=r"layer 0: expected spectra, 48 wide, of the expe"):
        Statistics.load(tmp_path / "out")


def test_too_short_a_text_for_every_expert(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("The river flows to the sea.")
    with pytest.raises(StatisticsError, match=r"tokens to the expert with most of them; the keys"):
        made(build_model("mixtral"), tokenizer, open_corpus(tmp_path / "short.txt"), tmp_path / "o")


def test_an_expert_with_too_few_tokens_is_left_alone(tokenizer, facts, caplog):
    """What was not sampled would pass for null space."""
    model = build_model("mixtral")
    rows = [tokenizer("The river flows to the sea. Karo Dun works as a baker.")["input_ids"]] * 4
    moments = key_moments(EditableModel(model, tokenizer), rows, (0, 1, 2))
    usual = statistics_of(model, tokenizer)
    spectra = {i: m.spectrum() for i, m in moments.items()}
    closed = {i: [e for e, n in enumerate(s.tokens) if n < s.width] for i, s in spectra.items()}
    assert any(closed[i] for i in RECIPE.layers)
    statistics = dataclasses.replace(usual, spectra=spectra)
    layout = LAYOUTS["mixtral"]
    before = {i: mlp_out(model, layout, i).down_proj.detach().clone() for i in RECIPE.layers}
    with caplog.at_level(logging.WARNING, "nulledit"):
        editor = Editor(model, tokenizer, recipe=RECIPE, statistics=statistics)
        editor.edit(facts)
    for i in RECIPE.layers:
        told = f"layer {i}: {len(closed[i])} of 4 experts are left alone"
        assert (told in caplog.text) == bool(closed[i])
        for expert in range(4):
            kept = torch.equal(mlp_out(model, layout, i).down_proj[expert], before[i][expert])
            assert kept == (expert in closed[i])


# -- linear algebra --------------------------------------------------------------------------


def blocks_and_dense(count=3, width=8, few=2):
    """A spectrum of blocks of which the last is closed, and the dense moment of the others."""
    torch.manual_seed(0)
    moment, rows = SecondMoment(width, count), []
    for i in range(count):
        n = few if i == count - 1 else 5 * width
        block = torch.zeros(n, count, width, dtype=torch.float64)
        block[:, i] = torch.randn(n, width, dtype=torch.float64) * torch.logspace(0, -2, width)
        rows.append(block.flatten(1))
    K = torch.cat(rows)
    for part in K.split(17):
        moment.update(part)
    return moment.spectrum(), K.mT @ K / len(K)


def test_blocks_are_the_dense_matrix():
    spectrum, C = blocks_and_dense()
    open_ = C[:16, :16]
    dense = Spectrum.of(open_)
    assert (spectrum.d_in, spectrum.closed, spectrum.tokens) == (24, 1, (40, 40, 2))
    torch.testing.assert_close(spectrum.eigenvalues, dense.eigenvalues, rtol=1e-9, atol=1e-12)
    K, R = torch.randn(24, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    inside = torch.cat([K[:16], torch.zeros_like(K[16:])])
    for threshold in (RULES[rule](spectrum.eigenvalues, 0.2) for rule in RULES):
        assert spectrum.protected(threshold) == dense.protected(threshold) + 8
        assert spectrum.leakage(threshold) == pytest.approx(dense.leakage(threshold))
        for gains_of in (lambda s: (s < threshold).double() / 10, lambda s: 1 / (3 * s)):  # noqa: B023
            gains, whole = gains_of(spectrum.eigenvalues), gains_of(dense.eigenvalues)
            metric, expected = spectrum.preconditioner(gains), dense.preconditioner(whole)
            torch.testing.assert_close(metric.apply(K)[:16], expected.apply(K[:16]))
            assert not metric.apply(K)[16:].any()
            assert metric.rank == expected.rank
            part = K[:16].square().sum(0) / K.square().sum(0)
            share = expected.null_space_share(K[:16]) * part
            torch.testing.assert_close(metric.null_space_share(K), share)
            update = solve_update(K, R, metric)
            torch.testing.assert_close(update[:, :16], solve_update(K[:16], R, expected))
            assert not update[:, 16:].any()
            assert room_left(metric, K) == pytest.approx(room_left(expected, inside[:16]))
            Z = metric.weigh(metric.coordinates(K))
            short = expected.weigh(expected.coordinates(K[:16]))
            torch.testing.assert_close(metric.expand(Z), metric.apply(K))
            assert metric.inverse_trace(Z) == pytest.approx(expected.inverse_trace(short))
            kept = spectrum.reduced(gains)
            torch.testing.assert_close(kept.preconditioner(gains).apply(K), metric.apply(K))


def test_a_residual_is_spread_by_what_each_expert_can_take():
    spectrum, _ = blocks_and_dense(few=99)
    metric = spectrum.preconditioner(
        (spectrum.eigenvalues < spectrum.eigenvalues.median()).double()
    )
    key = torch.randn(24, 1, dtype=torch.float64)
    key[8:16] = 0  # not routed to the second
    residual = torch.randn(4, 1, dtype=torch.float64)
    update = solve_update(key, residual, metric)
    weighted = metric.apply(key)
    for rows in torch.arange(24).split(8):
        share = float(key[rows].mT @ weighted[rows]) / (1 + float(key.mT @ weighted))
        torch.testing.assert_close(update[:, rows] @ key[rows], share * residual)
    assert not update[:, 8:16].any()


def test_what_is_left_out_is_bounded():
    """‖Σ_e Δ_e k_e‖² <= m Σ_e ‖Δ_e k_e‖² for m experts a token."""
    torch.manual_seed(0)
    keys = torch.zeros(50, 6, 4, dtype=torch.float64)
    for token in keys:
        token[torch.randperm(6)[:2]] = torch.randn(2, 4, dtype=torch.float64)
    K = keys.flatten(1)
    moment = SecondMoment(4, 6).update(K)
    blocks = torch.block_diag(*(moment.sum / moment.count))
    update = torch.randn(3, 24, dtype=torch.float64)
    true = (K @ update.mT).square().sum() / len(K)
    assert true <= 2 * torch.trace(update @ blocks @ update.mT)


def test_no_open_expert_is_no_spectrum():
    with pytest.raises(StatisticsError, match=r"no expert was given as many tokens .*got 3: use a"):
        Spectrum({}, 4, (3, 1))


# -- edits -----------------------------------------------------------------------------------


@pytest.mark.few("alphaedit", "memit-history", "gated", "ft", "nse", "rome", of="method")
@pytest.mark.parametrize("method", [m.name for m in METHODS])
def test_every_method_works_or_says_why_not(method, tokenizer, facts):
    model = build_model("qwen2_moe")
    recipe = dataclasses.replace(
        RECIPE, method=dataclasses.replace(RECIPE.method, name=method, constants={})
    )
    if method == "gated":
        with pytest.raises(ModelError, match=r"block 2 is a mixture of experts.*alphaedit"):
            Editor(model, tokenizer, recipe=recipe, statistics=statistics_of(model, tokenizer))
        return
    editor = Editor(model, tokenizer, recipe=recipe, statistics=statistics_of(model, tokenizer))
    before = model_hash(model)
    if method == "nse":
        with pytest.raises(StatisticsError, match="diagonal blocks only: use another one"):
            editor.edit(facts)
        assert model_hash(model) == before
        return
    report = editor.edit(facts)
    assert all(layer.update_share > 0 for layer in report.layers)
    editor.undo(*[f.id for f in facts])
    assert model_hash(model) == before


def test_only_experts_that_the_subject_is_routed_to_change(mixture, tokenizer, facts):
    model = build_model(mixture)
    recipe = dataclasses.replace(RECIPE, layers=(1,)).with_fields({"contexts.texts": ["{}"]})
    before = mlp_out(model, LAYOUTS[mixture], 1).down_proj.detach().clone()
    row = tokenizer("The mother tongue of Ada Byron")["input_ids"]
    routed = keys_from(model, [row])[0][-1].unflatten(0, (len(before), -1)).any(1)
    assert int(routed.sum()) == model.config.num_experts_per_tok
    editor = Editor(model, tokenizer, recipe=recipe, statistics=statistics_of(model, tokenizer))
    editor.edit(facts[:1])
    for expert, weight in enumerate(editor.editable.matrix(1).down_proj):
        assert torch.equal(weight, before[expert]) == (not routed[expert])


def test_the_gradient_of_targets_is_that_of_the_whole_matrix(tokenizer, facts):
    model = build_model("qwen3_moe")
    with frozen(model):
        loss = WeightLoss(EditableModel(model, tokenizer), facts, layer=1, positions=10_000)
        weight = loss.current()
        _, gradient = loss(weight)
        step = 1e-4 * torch.randn_like(weight)  # norms and routers run in float32
        higher, lower = loss(weight + step)[0], loss(weight - step)[0]
    assert (higher - lower) / 2 == pytest.approx(float((gradient * step).sum()), rel=1e-2)
    assert torch.equal(loss.current(), weight)


@pytest.fixture(params=["mixtral", "qwen2_moe"])
def place(request, tokenizer, facts, tmp_path):
    """An edited run of a float32 model whose base lies in a folder of several files."""
    model = build_model(request.param, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "base")
    editor = Editor(
        model,
        tokenizer,
        recipe=RECIPE.with_fields({"values.steps": 4}),
        statistics=statistics_of(model, tokenizer),
        name=str(tmp_path / "base"),
    )
    editor.edit(facts[:2])
    editor.save(tmp_path / "run")
    editor.edit(facts[2:])
    editor.save(tmp_path / "run")
    return editor, tmp_path


def files_at(folder):
    """The tensors of all files, by their names there."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def weights_at(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_saved_model_has_the_names_of_the_family(place):
    """transformers takes experts apart when it saves; the folder is rewritten in those parts."""
    editor, folder = place
    state = editor.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in weights_at(folder / "run/model").items())
    names = {n for f in (folder / "run/model").glob("*.safetensors") for n in load_file(f)}
    assert names == {n for f in (folder / "base").glob("*.safetensors") for n in load_file(f)}
    assert not any(name.endswith("experts.down_proj") for name in names)
    found = verify(folder / "run", Editor.load)
    assert found.passed
    assert [check.name for check in found.of(MATRICES)] == ["layer 1", "layer 2"]


def test_exports(place, tmp_path):
    editor, folder = place
    state = editor.model.state_dict()
    write_checkpoint(editor, tmp_path / "checkpoint")
    assert all(torch.equal(t, state[n]) for n, t in weights_at(tmp_path / "checkpoint").items())
    done = write_delta(editor, tmp_path / "delta")
    assert all(layer.rank <= 4 for layer in done.layers)
    apply_delta(tmp_path / "delta", folder / "base", tmp_path / "applied")
    for name, tensor in weights_at(tmp_path / "applied").items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-6)
    remove_delta(tmp_path / "delta", tmp_path / "applied", tmp_path / "bare", run=folder / "run")
    base = weights_at(folder / "base")
    assert all(torch.equal(t, base[n]) for n, t in weights_at(tmp_path / "bare").items())


def test_an_adapter_is_the_edited_model_in_peft(place, tmp_path):
    """Each expert has factors of its own, of as many dimensions as facts are routed to it."""
    editor, folder = place
    peft = pytest.importorskip("peft")
    done = write_lora(editor, tmp_path / "adapter", dtype="float64")
    for layer in done.layers:
        module = editor.editable.matrix(layer.layer)
        update = editor.weights.exact(layer.layer) - editor.weights.base(layer.layer)
        ranks = [
            int(torch.linalg.matrix_rank(part)) for part in update.chunk(len(module.down_proj), 1)
        ]
        assert layer.of == max(ranks)
        assert layer.error < 1e-10
        assert layer.key_error < 1e-10
    base = AutoModelForCausalLM.from_pretrained(folder / "base", experts_implementation="eager")
    unedited = logits(base)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    editor.model.set_experts_implementation("eager")
    edited = logits(editor.model)
    assert gap(unedited, edited) > 1e-4
    assert gap(logits(adapted), edited) < 1e-5
    assert gap(logits(adapted.merge_and_unload()), edited) < 1e-5
    assert gap(logits(adapted.unload()), edited) < 1e-5


def test_an_adapter_for_servers_names_each_expert(place, tmp_path):
    """Under the names of the family's files, whose difference the products are."""
    editor, folder = place
    done = editor.export(tmp_path / "adapter", "lora", dtype="float64", experts="each")
    assert done.for_servers
    write_checkpoint(editor, tmp_path / "whole")
    before, after = files_at(folder / "base"), files_at(tmp_path / "whole")
    found = load_file(tmp_path / "adapter/adapter_model.safetensors")
    prefix, pairs = "base_model.model.", set()
    for name, right in found.items():
        if not name.endswith(".lora_A.weight"):
            continue
        own = name.removeprefix(prefix).replace(".lora_A", "")
        pairs.add(own)
        left = found[name.replace("lora_A", "lora_B")]
        difference = after[own].double() - before[own].double()
        torch.testing.assert_close(left @ right, difference, rtol=0, atol=1e-6)
    assert sum(layer.bytes for layer in done.layers) == sum(t.nbytes for t in found.values())
    assert all(layer.bytes for layer in done.layers)
    edited = tuple(f"layers.{layer}." for layer in editor.weights.layers)
    expected = {n for n in before if ".experts." in n and any(part in n for part in edited)}
    assert pairs == expected, "every matrix of every expert of an edited layer"
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert set(config["target_modules"]) == {name.split(".")[-2] for name in expected}
    assert "target_parameters" not in config
    assert "vllm serve" in (tmp_path / "adapter/README.md").read_text()


def test_adapters_of_experts_without_names(tokenizer, facts, tmp_path):
    """Files of some families hold all experts in one tensor, as [d_in, d_out]."""
    peft = pytest.importorskip("peft")
    model = tiny_models.build("gpt_oss")
    statistics = statistics_of(model, tokenizer)
    recipe = RECIPE.with_fields({"values.steps": 4})
    editor = Editor(model, tokenizer, recipe=recipe, statistics=statistics)
    base = copy.deepcopy(model)
    editor.edit(facts[:2])
    write_lora(editor, tmp_path / "adapter", dtype="float64")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert gap(logits(adapted), logits(editor.model)) < 1e-5
    with pytest.raises(ConfigError, match=r"files of gpt_oss have no names for single experts"):
        write_lora(editor, tmp_path / "each", experts="each")
    assert not (tmp_path / "each").exists()


def test_only_mixtures_have_experts_to_name(tokenizer, facts, tmp_path, monkeypatch):
    measured = "nulledit.export.lora.adapter_factors"
    monkeypatch.setattr(measured, lambda *_, **__: pytest.fail("measured before it was refused"))
    model = build_model("llama")
    editor = Editor(model, tokenizer, recipe=RECIPE, statistics=statistics_of(model, tokenizer))
    editor.edit(facts[:1])
    with pytest.raises(ConfigError, match="this run edits none"):
        write_lora(editor, tmp_path / "adapter", experts="each")
