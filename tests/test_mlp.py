"""Neurons of their own in an MLP: every architecture gives what the formula says."""

import copy

import pytest
import torch
from support.models import EXPERTS, build_model

from nulledit.errors import ModelError
from nulledit.linalg.neurons import Neurons
from nulledit.models.editable_model import EditableModel
from nulledit.models.mlp import find_form


def neurons_for(form, model, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    d = model.model.config.hidden_size

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Neurons(
        rows=drawn(n, d),
        biases=drawn(n) if form.units.biased else None,
        factors=drawn(n, d) if form.factor else None,
        columns=drawn(d, n),
    )


def written_and_inputs(model, form, layer):
    """W's output and the MLP's input [d, tokens] of a run."""
    found = {}
    handles = [
        form.driven.module.register_forward_pre_hook(lambda _m, a: found.update(x=a[0].clone())),
        form.out.register_forward_hook(lambda _m, _a, o: found.update(out=o.clone())),
    ]
    with torch.no_grad():
        states = model.run(model.collate([[3, 14, 15, 92, 65, 35], [8, 9, 79]]), last=layer)
    for handle in handles:
        handle.remove()
    flat = {name: t.reshape(-1, t.shape[-1]).mT for name, t in found.items()}
    return flat["out"], flat["x"], states


def test_neurons_add_what_they_give_and_leave_the_bits_of_before(architecture, tokenizer):
    model = EditableModel(build_model(architecture), tokenizer)
    if architecture in EXPERTS:
        with pytest.raises(ModelError, match="block 1 is a mixture of experts"):
            find_form(model, 1)
        return
    form = find_form(model, 1)
    before = copy.deepcopy(model.model.state_dict())
    out, inputs, states = written_and_inputs(model, form, 1)
    for n, seed in ((3, 0), (5, 1)):  # the second in the place of the first
        neurons = neurons_for(form, model, n, seed)
        form.put(neurons)
        found, same, _ = written_and_inputs(model, form, 1)
        torch.testing.assert_close(same, inputs, rtol=0, atol=0)
        expected = out + neurons.columns @ neurons.units(inputs, form.activation)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert form.holds(neurons)
        assert not form.holds(None)
    assert find_form(model, 1).width == form.width + 5  # a grown block is a block
    form.put(None)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(written_and_inputs(model, form, 1)[2], states, rtol=0, atol=0)
