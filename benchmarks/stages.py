"""The stages of speed.py: each runs both sides on a clock, prints rows and returns notes."""

import statistics as st

import reference
import torch
from timing import OURS, REFERENCE

from nulledit import Editor, Fact
from nulledit.config import Recipe, StatisticsSettings, ValueSettings
from nulledit.data.corpus import windows
from nulledit.editing.keys import LayerwiseForward
from nulledit.editing.values import optimise_values
from nulledit.editing.weights import EditedWeights
from nulledit.ledger.journal import Journal
from nulledit.ledger.records import Base, Column, Epoch, History, ValueOutcome
from nulledit.ledger.solver import LayerSolver
from nulledit.ledger.store import tensor_bytes
from nulledit.ledger.tensors import spectrum_tensors
from nulledit.linalg.moments import SecondMoment
from nulledit.linalg.solve import solve_update
from nulledit.linalg.spectrum import Block, Spectrum
from nulledit.models.batches import chunks_by_length
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in, write_weight
from nulledit.models.load import model_hash
from nulledit.statistics.collect import key_moments
from nulledit.statistics.found import find_statistics
from nulledit.statistics.manifest import Manifest
from nulledit.statistics.spectra import Statistics

RANDOM_THRESHOLD = 1.0  # made-up spectra: directions below it are free
BOTH = (REFERENCE, OURS)
BATCH = 100


class Setup:
    """A model, its recipe and what is asked of it."""

    def __init__(self, model, tokenizer, recipe, facts, contexts, texts, free):
        self.model, self.tokenizer, self.recipe = model, tokenizer, recipe
        self.facts, self.contexts, self.texts = facts, contexts, texts
        self.editable = EditableModel(model, tokenizer)
        self.layers = recipe.layers
        self.free = free

    def positions(self, options):
        return options.positions or self.editable.positions(200, 16384)

    def matrix(self, layer):
        return as_out_in(self.editable.mlp_out(layer))

    def statistics(self):
        """The model's own, or made-up ones where its weights are random."""
        own = model_hash(self.model)
        found = next(find_statistics(own, self.layers), None)
        if found:
            return found
        spectra = {
            i: made_up(self.matrix(i).shape[1], self.free, self.editable.device)
            for i in self.layers
        }
        manifest = Manifest("random", own, self.layers, "none", "0", StatisticsSettings(), "none")
        return Statistics(manifest, {i: s for i, s in spectra.items()})

    def walk(self, facts=None):
        return LayerwiseForward(
            self.editable,
            facts or self.facts,
            first=self.layers[0],
            contexts=self.contexts,
            bare_weight=0.5,
        )

    def ours(self, settings, facts, positions):
        return optimise_values(
            self.editable,
            facts,
            list(range(len(facts))),
            layers=self.layers[-1:],
            contexts=self.contexts,
            settings=settings,
            positions=positions,
        )

    def theirs(self, settings, facts):
        return [
            reference.compute_z(
                self.model,
                self.tokenizer,
                fact,
                layers=self.layers[-1:],
                contexts=self.contexts,
                **reference.of_settings(settings),
            )
            for fact in facts
        ]


def made_up(width, free, device="cpu", dtype=torch.float32):
    """A compact spectrum with the share `free` of its directions below `RANDOM_THRESHOLD`."""
    count = int(width * free)
    thin = min(count, width - count)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(width, thin, generator=generator).to(device)).Q
    values = torch.cat([torch.full((count,), 0.01), torch.full((width - count,), 2.0)]).double()
    start = 0 if thin == count else width - thin
    return Spectrum.joined({0: Block(values, vectors.to(dtype), start)})


# -- of a model ----------------------------------------------------------------------------------


def values(clock, setup, options):
    """A step of a fact, identical settings on both sides."""
    wanted = ValueSettings(steps=options.steps, stop_loss=0.0, patience=0)
    positions = setup.positions(options)
    for _ in range(options.repeats):
        mine = clock.time("values", OURS, lambda: setup.ours(wanted, setup.facts, positions))
        slow = clock.time("values", REFERENCE, lambda: setup.theirs(wanted, setup.facts))
    clock.row("values", "a step of a fact", len(setup.facts) * options.steps)
    worst = max(float((a.z - b.z).norm() / b.z.norm()) for a, b in zip(mine, slow, strict=True))
    return [f"values: {options.steps} steps; largest relative difference {worst:.1e}"]


def ends(clock, setup, options):
    """Both sides to their own end: the published settings against a longer step."""
    published = ValueSettings(
        steps=setup.recipe.values.steps,
        learning_rate=setup.recipe.values.learning_rate,
        patience=0,
        stop_margin=None,
    )
    fast = ValueSettings(
        steps=options.fast_steps,
        learning_rate=options.fast_rate,
        clamp=options.fast_clamp,
        patience=0,
    )
    positions = setup.positions(options)
    for _ in range(options.repeats):
        mine = clock.time("ends", OURS, lambda: setup.ours(fast, setup.facts, positions))
        slow = clock.time("ends", REFERENCE, lambda: setup.theirs(published, setup.facts))
    clock.row("ends", "a fact", len(setup.facts))
    notes = []
    reached = {
        REFERENCE: [(v.losses[-1], float(v.delta.norm() / v.initial.norm()), v.z) for v in slow],
        OURS: [(v.outcome.loss, v.outcome.delta_share, v.z) for v in mine],
    }
    spectra = setup.statistics()
    for side, found in reached.items():
        loss, share = (st.fmean(one[i] for one in found) for i in (0, 1))
        said = said_after(setup, torch.stack([z for *_, z in found]), spectra)
        notes.append(
            f"ends, {side}: mean loss {loss:.3f}, mean ‖δ‖/‖h‖ {share:.3f}; written in one batch, "
            + ", ".join(f"{kind} {100 * rate:.1f} % of {n}" for kind, (rate, n) in said.items())
        )
    return notes


def said_after(setup, zs, statistics):
    """Share of prompts whose target is the likeliest token by token, with `zs` written."""
    from nulledit.evaluation.queries import Query
    from nulledit.evaluation.scores import score

    before = {i: setup.matrix(i).clone() for i in setup.layers}
    update(None, setup, None, zs=zs, statistics=statistics)
    asked = [
        Query(f.id, kind, f.render(prompt), f.target, None)
        for f in setup.facts
        for kind, prompts in (("efficacy", [f.prompt]), ("paraphrases", f.paraphrases))
        for prompt in prompts
    ]
    found = score(setup.editable, asked, positions=2048)
    for i, weight in before.items():
        write_weight(setup.editable.mlp_out(i), weight)
    rates = {}
    for kind in ("efficacy", "paraphrases"):
        mine = [s.strict for s in found if s.query.kind == kind]
        rates[kind] = st.fmean(mine), len(mine)
    return rates


def update(clock, setup, options, *, zs=None, statistics=None):
    """Keys, residuals and solves of one batch, values made up unless given."""
    statistics = statistics or setup.statistics()
    layers, last = setup.layers, setup.layers[-1]
    base = {i: setup.matrix(i).clone() for i in layers}
    rule = setup.recipe.null_space
    metrics = {}
    for i in layers:
        spectrum = statistics.spectra[i]
        limit = rule.value if statistics.manifest.corpus != "none" else RANDOM_THRESHOLD
        metrics[i] = spectrum.preconditioner((spectrum.eigenvalues < limit).double() / 10)
    if zs is None:
        generator = torch.Generator().manual_seed(0)
        hidden = setup.walk().hidden(last).mT.cpu()
        zs = hidden + 0.5 * torch.randn(hidden.shape, generator=generator) * hidden.std()

    def fast():
        walk = setup.walk()
        for i, layer in enumerate(layers):
            keys = walk.keys().to(base[layer].device)
            missing = (zs.double().cpu().mT - walk.hidden(last).cpu()) / (len(layers) - i)
            change = solve_update(keys, missing.to(keys.device), metrics[layer])
            write_weight(setup.editable.mlp_out(layer), base[layer].double() + change)
            for _ in range(layer, layers[i + 1] if i + 1 < len(layers) else layer):
                walk.advance()

    def slow():
        history = {i: torch.zeros_like(projectors[i]) for i in layers}
        reference.alphaedit_batch(
            setup.model,
            setup.tokenizer,
            setup.facts,
            zs.to(base[last]),
            layers=layers,
            projectors=projectors,
            history=history,
            l2=10.0,
            contexts=setup.contexts,
        )

    if clock is None:
        fast()
        return []
    projectors = {}
    for i in layers:
        identity = torch.eye(base[i].shape[1], device=base[i].device)
        projectors[i] = (10 * metrics[i].apply(identity)).float()
    for _ in range(options.repeats):
        clock.time("update", OURS, fast)
        mine = {i: setup.matrix(i).clone() for i in layers}
        restore(setup, base)
        clock.time("update", REFERENCE, slow)
        gap = max(
            float((setup.matrix(i) - mine[i]).norm() / (mine[i] - base[i]).norm()) for i in layers
        )
        restore(setup, base)
    clock.row("update", f"a batch of {len(setup.facts)}")
    return [f"updates: largest relative difference {gap:.1e}"]


def restore(setup, base):
    for layer, weight in base.items():
        write_weight(setup.editable.mlp_out(layer), weight)


def statistics(clock, setup, options):
    """Moments of all layers in one pass, against one pass a layer, and against the least."""
    layers, top = setup.layers, max(setup.layers)
    texts, count = [], 0
    for text in setup.texts:
        if count < options.tokens:
            texts.append(text)
            count += len(setup.tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = list(
        windows(
            texts,
            lambda text: setup.tokenizer(text, add_special_tokens=False)["input_ids"],
            window=2048,
            packed=False,
        )
    )
    tokens = sum(map(len, rows))
    chunks = chunks_by_length([len(row) for row in rows], 2048)
    device = setup.editable.device

    def bare():
        for chunk in chunks:
            batch = setup.editable.collate([rows[i] for i in chunk])
            with torch.no_grad():
                setup.editable.run(batch, last=top)

    width = setup.matrix(top).shape[1]
    keys = torch.randn(tokens, width, device=device)
    moments = {i: SecondMoment(width, device=device) for i in layers}

    def products():
        for i in layers:
            for part in keys.split(2048):
                moments[i].update(part)

    one = "statistics"
    for _ in range(options.repeats):
        clock.time(one, OURS, lambda: key_moments(setup.editable, rows, layers))
        clock.time("forward alone", OURS, bare)
        clock.time("products alone", OURS, products)
        clock.time(
            one,
            REFERENCE,
            lambda: [
                reference.second_moment(setup.model, setup.tokenizer, texts, i, dtype=torch.float32)
                for i in layers
            ],
        )
    unit = f"1,000 of {tokens:,} tokens"
    clock.row(one, unit, tokens / 1000)
    for part in ("forward alone", "products alone"):
        clock.row(part, unit, tokens / 1000, sides=(OURS,))
    least = clock.median("forward alone", OURS) + clock.median("products alone", OURS)
    share = clock.median("forward alone", OURS) / clock.median(one, OURS)
    return [
        f"statistics of {len(layers)} layers up to {top}: {clock.median(one, OURS) / least:.2f} "
        f"times forward and products alone, at {100 * share:.0f} % of the forward pass's own rate"
    ]


def edit(clock, setup, options):
    """A batch through the editor, each stage's seconds; no early stop where weights are random."""
    content = setup.recipe.to_dict()
    made = setup.statistics()
    if made.manifest.corpus == "none":
        content["null_space"] = {"rule": "absolute", "value": RANDOM_THRESHOLD}
        content["values"] |= {"stop_loss": 0.0, "patience": 0}
    content["chunk_positions"] = options.positions
    recipe = Recipe.from_dict({k: v for k, v in content.items() if v is not None})
    editor = Editor(setup.model, setup.tokenizer, recipe=recipe, statistics=made)
    report = clock.time("edit", OURS, lambda: editor.edit(setup.facts))
    clock.row("edit", f"a batch of {len(setup.facts)}", sides=(OURS,))
    whole = clock.median("edit", OURS, wall=True)
    seconds = report.seconds | {"contexts and the rest": whole - sum(report.seconds.values())}
    parts = ", ".join(f"{k} {s:.2f} s ({100 * s / whole:.0f} %)" for k, s in seconds.items())
    return [
        f"edit: {recipe.values.steps} steps, stop at loss {recipe.values.stop_loss}; wall {parts}"
    ]


# -- of a width ----------------------------------------------------------------------------------


def shape_of(options):
    return max(1, round(options.width * 4096 / 14336)), options.width


def solve(clock, options):
    """One layer's update, 100 facts, against the dense d × d solve in float32."""
    d_out, d_in = shape_of(options)
    spectrum = made_up(d_in, options.free, options.device)
    metric = spectrum.preconditioner((spectrum.eigenvalues < RANDOM_THRESHOLD).double() / 10)
    generator = torch.Generator().manual_seed(1)
    K = torch.randn(d_in, BATCH, generator=generator).to(options.device) / 30
    R = torch.randn(d_out, BATCH, generator=generator).to(options.device)
    P = (10 * metric.apply(torch.eye(d_in, device=options.device))).float()
    history = torch.zeros_like(P)
    for _ in range(options.repeats):
        mine = clock.time("solve", OURS, lambda: solve_update(K, R, metric))
        slow = clock.time("solve", REFERENCE, lambda: reference.solve(K, R, P, history, 10.0))
    clock.row("solve", f"{d_out} x {d_in}, {BATCH} facts")
    return [f"solve: relative difference {float((mine - slow).norm() / mine.norm()):.1e}"]


def stream(clock, options):
    """One layer's update of 100 facts after none and after 9,900, and its bytes on disk."""
    d_out, d_in = shape_of(options)
    spectrum = made_up(d_in, options.free)
    recipe = Recipe.from_dict(
        {"layers": [0], "null_space": {"rule": "absolute", "value": RANDOM_THRESHOLD}}
    )
    base = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(2)) / d_in**0.5
    begun = spectrum_tensors(spectrum, RANDOM_THRESHOLD, 0, torch.float32)
    ledger = Journal(history_of(recipe, begun | {"base.0": base}))
    fold = LayerSolver(ledger, 0, torch.device(options.device))
    state = fold.fold([])
    generator = torch.Generator().manual_seed(3)
    seconds, size = [], 0
    for number in range(1, 101):
        keys = torch.randn(BATCH, d_in, generator=generator) / 30
        targets = torch.randn(BATCH, d_out, generator=generator)
        stage = {1: "first batch", 100: "hundredth batch"}.get(number, "between")
        held = ledger.history.columns
        before = state
        repeats = options.repeats if stage != "between" else 1
        for _ in range(repeats):
            state = clock.time(
                stage,
                OURS,
                lambda: fold.latest.add(before, held, keys.mT, targets.mT),  # noqa: B023
            )
        seconds.append(clock.median(stage, OURS))
        record(ledger, number, {})
        size = len(tensor_bytes({"keys.0": keys, "targets.0": targets})[1])
    for stage in ("first batch", "hundredth batch"):
        clock.row(stage, f"{d_out} x {d_in}, {BATCH} facts", sides=(OURS,))
    growth = clock.median("hundredth batch", OURS) / clock.median("first batch", OURS)
    whole = (100 * size + len(tensor_bytes(begun)[1])) / 1e9
    return [
        f"stream: one layer's solve takes {growth:.2f} times as long after 9,900 facts as after "
        f"none; 10,000 facts and the spectrum take {whole:.2f} GB on disk (W₀ not counted)"
    ]


def history_of(recipe, tensors):
    """One with an epoch of these tensors, and no batch."""
    epoch = Epoch(1, recipe.to_dict(), 0, ("{}",), {}, "epoch")
    return History(Base("", "0", "float32", recipe.to_dict(), 0)).with_epoch(epoch, tensors)


def record(ledger, number, tensors):
    """Columns of one more batch, with what is to be read of them."""
    first = len(ledger.history.columns) + 1
    made = [
        Column(id_, number, row, id_, Fact(str(id_), "{} is", "y"), ValueOutcome(0.0))
        for row, id_ in enumerate(range(first, first + BATCH))
    ]
    ledger.history = ledger.history.after("edit", made, digest=f"batch{number}", tensors=tensors)


def growth(clock, setup, options):
    """A whole update without values on the model, after no facts and after 9,900 made-up ones."""
    found = setup.statistics()
    recipe = setup.recipe
    tensors = {}
    for i in setup.layers:
        spectrum = found.spectra[i]
        tensors |= spectrum_tensors(spectrum, recipe.null_space.value, i, torch.float32)
        tensors[f"base.{i}"] = setup.matrix(i).clone()
    ledger = Journal(history_of(recipe, tensors))
    weights = EditedWeights(setup.editable, ledger)
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(len(setup.facts), setup.model.config.hidden_size, generator=generator)

    def work():
        walk = setup.walk()
        for i, layer in enumerate(setup.layers):
            keys = walk.keys()
            residual = noise.mT.double() / (len(setup.layers) - i)
            weights.write(layer, ledger.history.columns, keys, residual)
            walk.advance()

    def timed(stage):
        states = weights.states()
        for _ in range(options.repeats):
            clock.time(stage, OURS, work)
            weights.return_to(states)
        clock.row(stage, f"{len(setup.facts)} facts", sides=(OURS,))

    timed("update, first batch")
    for number in range(1, 100):
        rows = {}
        for i in setup.layers:
            d_out, d_in = setup.matrix(i).shape
            rows[f"keys.{i}"] = torch.randn(BATCH, d_in, generator=generator)
            rows[f"targets.{i}"] = torch.randn(BATCH, d_out, generator=generator)
        record(ledger, number, rows)
    weights.refresh()
    timed("update, hundredth batch")
    ratio = clock.median("update, hundredth batch", OURS) / clock.median(
        "update, first batch", OURS
    )
    return [
        f"growth: {ratio:.2f} times as long after 9,900 facts as after none, commit not counted"
    ]


def eigen(clock, options):
    """The decomposition of one moment: whole, and only its largest part by block iteration."""
    d = options.width
    generator = torch.Generator().manual_seed(5)
    # Eigenvalues that fall like those of real keys: as 1/rank, over a floor.
    keys = torch.randn(2 * d, d, generator=generator, dtype=torch.float64)
    keys *= torch.arange(1, d + 1).double().rsqrt() + 0.01
    C = (keys.mT @ keys / len(keys)).to(options.device)
    del keys
    whole = clock.time("eigh", OURS, lambda: torch.linalg.eigh(C))
    clock.row("eigh", f"{d} x {d}, float64", sides=(OURS,))
    thin = d // 25  # 4 %
    part = clock.time("partial", OURS, lambda: largest(C, thin))
    clock.row("partial", f"the {thin} largest", sides=(OURS,))
    values, vectors = part
    error = float((C @ vectors - vectors * values).norm(dim=0).max() / values.max())
    exact = whole.eigenvectors[:, -thin:]
    angle = float(torch.linalg.svdvals(exact.mT @ vectors).min())
    return [
        f"partial: largest residual {error:.1e} of the largest eigenvalue; least cosine between "
        f"the two spaces {angle:.4f}"
    ]


def largest(C, count, *, rounds=6, extra=1.5):
    """The `count` largest eigenpairs by subspace iteration (Halko et al., arXiv:0909.4061)."""
    generator = torch.Generator().manual_seed(6)
    Q = torch.randn(len(C), int(extra * count), generator=generator, dtype=torch.float64).to(C)
    for _ in range(rounds):
        Q = torch.linalg.qr(C @ Q).Q
    values, vectors = torch.linalg.eigh(Q.mT @ (C @ Q))
    return values[-count:], (Q @ vectors)[:, -count:]
