"""Keys and residuals, layer by layer, while the layers are being edited.

The published code runs the whole model twice per layer, once for keys and once for residuals. Here
the states at the first edited block's input are kept, up to each subject's last token; each block
is then run as its turn comes. What the prompts of a prefix context have in common, the context as
a rule, is run once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.data.facts import Fact
from nulledit.models.batches import Batch, Shared, chunks_by_length, share_beginnings
from nulledit.models.editable_model import EditableModel
from nulledit.models.prefix import Prefix

CPU_POSITIONS = 1024  # of more, what the blocks hold in between is new memory each time
ACCELERATOR_POSITIONS = 8192


@dataclass
class _Chunk:
    batch: Batch  # after their stems; the mask is its own
    states: Tensor  # at the input of the block whose turn it is [rows, length, d]
    last: Tensor  # index of the subject's last token [rows]
    rows: Tensor  # place of each row in the whole walk [rows]
    stem: Tensor  # index of each row's stem [rows]


class LayerwiseForward:
    """The facts' prompts on their way up through the edited blocks."""

    def __init__(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        *,
        first: int,
        contexts: Sequence[str],
        bare_weight: float,
        positions: int | None = None,
        inputs: bool = False,
    ):
        """Bring `facts` to the input of block `first`.

        `inputs`: what stands for the keys is the MLP's input and not W's, as gated edits need.

        `contexts`: templates, the bare "{}" first; it weighs `bare_weight` in the mean key, the
        others share the rest. A form beside the model's own weighs as much as that. `positions`
        bounds the tokens that run together; by default as many as suit the device.
        """
        self.model, self.layer, self.inputs = model, first, inputs
        positions = positions or model.positions(CPU_POSITIONS, ACCELERATOR_POSITIONS)
        self._keys: Tensor | None = None  # of the block whose turn it is
        rows: list[tuple[int, ...]] = []
        owner: list[int] = []
        labels: list[int] = []
        weight: list[float] = []
        self.bare: list[int] = []  # fact -> row of its first prompt, bare
        others, placed = len(contexts) - 1, model.encoder.placed(contexts)
        shares = [bare_weight, *[(1 - bare_weight) / others] * others] if others else [1.0]
        shares += [1.0] * (len(placed) - len(contexts))
        parts = len(model.encoder.forms)
        for i, fact in enumerate(facts):
            self.bare.append(len(rows))
            for prompt in fact.prompts:
                for c, (form, context) in enumerate(placed):
                    row = form.encode_template(prompt, fact.subject, context=context)
                    rows.append(row.upto_subject().ids)
                    owner.append(i)
                    labels.append(c)
                    weight.append(shares[c] / (parts * len(fact.prompts)))
        self.n = len(facts)
        self.owner = torch.tensor(owner)
        self.weight = torch.tensor(weight, dtype=torch.float64)
        upto = [len(row) - 1 for row in rows]
        shared = share_beginnings(
            rows, labels, upto, columns=model.columns, pad_id=model.pad_id, device=model.device
        )
        with torch.no_grad():
            self.stems, self.stem_states = shared.stems, self._begun(shared.stems)
            front = model.record_prefix(shared.stems, last=first - 1)
            lengths = [len(row) - cut for row, cut in zip(rows, shared.cuts, strict=True)]
            self.chunks = [
                self._start(shared, lengths, chunk, front)
                for chunk in chunks_by_length(lengths, positions)
            ]
        self._begin = first, self.stem_states, [chunk.states for chunk in self.chunks]
        self._first_keys: Tensor | None = None

    def _begun(self, batch: Batch, prefix: Prefix | None = None) -> Tensor:
        """States at the first block's input; nothing where there is no token."""
        if batch.ids.shape[1] == 0:
            return torch.empty(0)
        return self.model.run(batch, last=self.layer - 1, prefix=prefix)

    def _start(
        self, shared: Shared, lengths: Sequence[int], places: Sequence[int], front: Prefix
    ) -> _Chunk:
        index = torch.tensor(places, device=self.model.device)
        longest = max(lengths[i] for i in places)
        batch = Batch(*(t[index, :longest] for t in vars(shared.rests).values()))
        stem = shared.stem[index]
        prefix = front.select(stem)
        states = self._begun(prefix.before(batch), prefix)
        last = torch.tensor([lengths[i] - 1 for i in places], device=self.model.device)
        return _Chunk(batch, states, last, torch.tensor(places), stem)

    def _front(self, last: int) -> Prefix:
        """The stems' keys and values from the block whose turn it is to block `last`."""
        return self.model.record_prefix(self.stems, self.stem_states, first=self.layer, last=last)

    @torch.no_grad()
    def keys(self) -> Tensor:
        """Mean keys K [d_in, n] of the block whose turn it is; its own edit leaves them alone."""
        if self._keys is not None:
            return self._keys
        found: Tensor | None = None
        front = self._front(self.layer)
        reading = self.model.reading_inputs if self.inputs else self.model.reading_keys
        for chunk in self.chunks:
            with reading([self.layer]) as read:
                self._step(chunk, front)
            keys = read[self.layer]
            at_last = keys[torch.arange(len(keys)), chunk.last.to(keys.device)].cpu().double()
            if found is None:
                found = torch.zeros(self.n, keys.shape[-1], dtype=torch.float64)
            found.index_add_(0, self.owner[chunk.rows], at_last * self.weight[chunk.rows, None])
        assert found is not None
        self._keys = found.mT
        if self.layer == self._begin[0]:
            self._first_keys = self._keys
        return self._keys

    def hidden(self, layer: int) -> Tensor:
        """What stands now where values of `layer` do [d, n]: bare prompts, subject's last token.

        The hidden state after the block; where a norm stands between W and the stream, W's output.
        """
        return self.standing(layer)[0]

    @torch.no_grad()
    def standing(self, layer: int) -> tuple[Tensor, Tensor]:
        """`hidden`, and what W's output v₀ adds to it at the same places, [d, n] each."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for facts, last, batch, states, prefix in self._bare_rows(self._front(layer)):
            with self.model.reading_output(layer) as written:
                _, out = self.model.run_to_values(
                    batch, states=states, first=self.layer, layer=layer, prefix=prefix
                )
            at = torch.arange(len(facts)), last.to(out.device)
            output = written[0].view(out.shape).to(out.device)
            pairs = zip(*(t[at].cpu().double() for t in (out, output)), strict=True)
            found.update(zip(facts, pairs, strict=True))
        columns = [found[i] for i in range(self.n)]
        hidden = torch.stack([h for h, _ in columns], dim=1)
        output = torch.stack([w for _, w in columns], dim=1)
        return hidden, self.model.scale(layer) * output

    @torch.no_grad()
    def caused(self, values: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """States [d, n] after each of `layers`, where `values` [d, n] stand after the first.

        Bare prompts, subject's last token; the model is as it is now.
        """
        found = {layer: values.new_empty(values.shape).double() for layer in layers}
        for facts, last, batch, states, prefix in self._bare_rows(self._front(layers[-1])):
            first = self.layer
            for layer in layers:
                states = self.model.run(
                    batch, states=states, first=first, last=layer, prefix=prefix
                ).clone()
                at = torch.arange(len(facts)), last.to(states.device)
                if layer == layers[0]:
                    states[at] = values[:, facts].mT.to(states)
                found[layer][:, facts] = states[at].mT.to(found[layer])
                first = layer + 1
        return found

    def _bare_rows(
        self, front: Prefix
    ) -> Iterator[tuple[list[int], Tensor, Batch, Tensor, Prefix]]:
        """Bare prompts: facts, subjects' last tokens, rows, states now, what is before them."""
        place = {row: i for i, row in enumerate(self.bare)}
        for chunk in self.chunks:
            mine = [i for i, row in enumerate(chunk.rows.tolist()) if row in place]
            if not mine:
                continue
            index = torch.tensor(mine, device=chunk.batch.ids.device)
            length = int(chunk.last[index].max()) + 1
            batch = Batch(*(t[index, :length] for t in vars(chunk.batch).values()))
            states = chunk.states[index.to(chunk.states.device), :length]
            prefix = front.select(chunk.stem[index])
            facts = [place[int(chunk.rows[i])] for i in mine]
            yield facts, chunk.last[index], prefix.before(batch), states, prefix

    @torch.no_grad()
    def advance(self) -> None:
        """Run the block whose turn it is, with its weights as they are now; the next one's turn."""
        front = self._front(self.layer)
        for chunk in self.chunks:
            chunk.states = self._step(chunk, front)
        if self.stems.ids.shape[1]:
            here = self.layer
            self.stem_states = self.model.run(
                self.stems, states=self.stem_states, first=here, last=here
            )
        self.layer += 1
        self._keys = None

    def rewind(self) -> None:
        """Back to the input of the first block, which no edit of it or of those above changes."""
        self.layer, self.stem_states, states = self._begin
        self._keys = self._first_keys
        for chunk, there in zip(self.chunks, states, strict=True):
            chunk.states = there

    def _step(self, chunk: _Chunk, front: Prefix) -> Tensor:
        """The chunk's states after the block whose turn it is."""
        prefix = front.select(chunk.stem)
        return self.model.run(
            prefix.before(chunk.batch),
            states=chunk.states,
            first=self.layer,
            last=self.layer,
            prefix=prefix,
        )


class WalksTogether:
    """Several walks as one, over the facts of each in turn; it gives what one walk would."""

    def __init__(self, *walks: Walk):
        """`walks` are at the same block."""
        self.walks = walks
        self.n: int = sum(walk.n for walk in walks)

    def keys(self) -> Tensor:
        """Mean keys [d_in, n]."""
        return torch.cat([walk.keys() for walk in self.walks], dim=1)

    def hidden(self, layer: int) -> Tensor:
        """What stands now where values of `layer` do [d, n]."""
        return self.standing(layer)[0]

    def standing(self, layer: int) -> tuple[Tensor, Tensor]:
        """`hidden`, and what W's output adds to it, [d, n] each."""
        hidden, added = zip(*(walk.standing(layer) for walk in self.walks), strict=True)
        return torch.cat(hidden, dim=1), torch.cat(added, dim=1)

    def caused(self, values: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """States [d, n] after each of `layers`, where `values` [d, n] stand after the first."""
        parts = values.split([walk.n for walk in self.walks], dim=1)
        found = [walk.caused(part, layers) for walk, part in zip(self.walks, parts, strict=True)]
        return {layer: torch.cat([part[layer] for part in found], dim=1) for layer in layers}

    def advance(self) -> None:
        """Run the block whose turn it is."""
        for walk in self.walks:
            walk.advance()

    def rewind(self) -> None:
        """Back to the input of the first block."""
        for walk in self.walks:
            walk.rewind()


Walk = LayerwiseForward | WalksTogether
