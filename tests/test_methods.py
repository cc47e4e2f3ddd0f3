"""Every method against its own paper's formula, written with d_in x d_in matrices; undo; edges."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from nulledit import Fact
from nulledit.cli.main import cli
from nulledit.config import MethodSettings, Recipe, load_recipe, shipped_recipes
from nulledit.errors import ConfigError, LedgerError, NoRoomError
from nulledit.ledger.records import Base, Column, Epoch, History, ValueOutcome
from nulledit.ledger.solver import LayerSolver
from nulledit.ledger.tensors import recorded, spectrum_tensors
from nulledit.ledger.update_solver import LayerPreconditioners
from nulledit.linalg.postprocess import keep_largest, restrain
from nulledit.linalg.solve import solve_update
from nulledit.linalg.spectrum import Block, Spectrum
from nulledit.methods import (
    METHODS,
    Filter,
    LayerProblem,
    Method,
    NoSettings,
    Registry,
    Solve,
    change_recipe,
    find_method,
    method,
)
from nulledit.methods.neurons import chosen_neurons
from nulledit.methods.registry import closed_form, ones

D, OUT, N, THRESHOLD = 24, 10, 3, 0.1
SETTINGS = {
    "alphaedit": {"l2": 0.3},
    "memit": {"moment_weight": 20.0},
    "memit-history": {"moment_weight": 20.0},
    "rlsedit": {"moment_weight": 20.0, "l2": 0.3},
    "encore": {"moment_weight": 20.0, "l2": 0.3},
    "betaedit": {"moment_weight": 20.0, "l2": 0.3},
    "soft": {"l2": 0.3, "softness": 2.0},
    "rome": {},
    "emmet": {},
    "rect": {"moment_weight": 20.0, "keep": 0.4},
    "prune": {"moment_weight": 20.0, "base": 1.5},
    "nse": {"moment_weight": 20.0, "neurons": 0.8},
    "evoedit": {"l2": 0.3},
    "ft": {"steps": 6, "learning_rate": 0.05, "weight_decay": 0.1, "norm_constraint": 0.15},
}
NAMES = sorted(SETTINGS)
CLOSED = [n for n in NAMES if not find_method(n).by_gradient]
EYE = torch.eye(D, dtype=torch.float64)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASIS = torch.linalg.qr(draw(D, D, seed=0)).Q
VALUES = torch.logspace(-3, 1, D, dtype=torch.float64)
C = BASIS @ torch.diag(VALUES) @ BASIS.mT
P = BASIS[:, VALUES < THRESHOLD] @ BASIS[:, VALUES < THRESHOLD].mT
W0 = 0.3 * draw(OUT, D, seed=1)
PROTECTED = BASIS[:, VALUES >= THRESHOLD] @ draw(int((VALUES >= THRESHOLD).sum()), 7, seed=2)


def quadratic(keys, targets):
    """A stand-in for the targets' loss: half the mean squared error at the keys."""

    def loss(weight):
        error = weight @ keys - targets
        return float(error.square().mean() / 2), error @ keys.mT / error.numel()

    return loss


class Stream:
    """Batches written one after another through the ledger's fold, by one method."""

    def __init__(self, name, batches=3, *, projection="own", keys=None, **constants):
        method = {"name": name, "projection": projection, **(SETTINGS.get(name, {}) | constants)}
        recipe = find_method(name).filled(Recipe.from_dict({"layers": [0], "method": method}))
        spectrum = Spectrum.of(C)
        tensors = spectrum_tensors(spectrum, THRESHOLD, 0, torch.float64) | {"base.0": W0}
        epoch = Epoch(1, recipe.to_dict(), 0, ("{}",), {}, "epoch")
        self.history = History(Base("", "0", "float64", {}, 0)).with_epoch(epoch, tensors)
        self.fold = LayerSolver(self, 0, torch.device("cpu"))
        self.state = self.fold.fold([])
        for i in range(batches):
            self.write(draw(D, N, seed=10 + i) if keys is None else keys[i], seed=20 + i)

    def write(self, keys, seed):
        residual = 3 * draw(OUT, keys.shape[1], seed=seed)
        targets = self.state.weight @ keys + residual
        before, id_ = self.state, len(self.history.batches) + 1
        self.state = self.fold.latest.add(
            before, self.history.columns, keys, targets, target_loss=quadratic(keys, targets)
        )
        rows = {"keys.0": keys.mT, "targets.0": targets.mT}
        if self.fold.latest.method.by_gradient:
            rows["update.0"] = self.state.total - before.total
        made = []
        for row in range(keys.shape[1]):
            number = len(self.history.columns) + 1 + row
            fact = Fact(id=str(number), subject="x", prompt="{} is", target="y")
            made.append(Column(number, id_, row, number, fact, ValueOutcome(0.0)))
        self.history = self.history.after("edit", made, digest=f"batch{id_}", tensors=rows)

    def batches(self, columns=None):
        """(K, absolute V) of each batch, of `columns` only."""
        chosen = self.history.columns if columns is None else columns
        numbers = sorted({c.batch for c in chosen})
        return [recorded(self.history, [c for c in chosen if c.batch == n], 0) for n in numbers]


# -- the papers, plainly ---------------------------------------------------------------------


def paper(name, batches, **constants):
    """W after `batches` of (K, V) by the method's own rule."""
    s = find_method(name).read(MethodSettings(name, constants=SETTINGS[name] | constants))
    W, past, P_left, total = W0.clone(), torch.zeros(D, D, dtype=torch.float64), P, 0 * W0
    S_inverse = torch.linalg.inv(s.moment_weight * C + s.l2 * EYE) if name == "rlsedit" else None
    for K, V in batches:
        R, KK = V - W @ K, K @ K.mT
        if name == "alphaedit":  # official code: the sum of past K Kᵀ inside the system
            W = W + R @ K.mT @ P @ torch.linalg.inv(past @ P + KK @ P + s.l2 * EYE)
        elif name == "memit":  # Eq. 14
            W = W + R @ K.mT @ torch.linalg.inv(s.moment_weight * C + KK)
        elif name == "memit-history":
            W = W + R @ K.mT @ torch.linalg.inv(s.moment_weight * C + past + KK)
        elif name == "rlsedit":  # recursive least squares by Woodbury
            gain = (
                S_inverse
                @ K
                @ torch.linalg.inv(
                    torch.eye(K.shape[1], dtype=torch.float64) + K.mT @ S_inverse @ K
                )
            )
            W = W + R @ gain.mT
            S_inverse = S_inverse - gain @ K.mT @ S_inverse
        elif name == "encore":  # its code: the sum of all earlier K Kᵀ joins the second moment
            W = W + R @ K.mT @ torch.linalg.inv(s.moment_weight * C + past + KK + s.l2 * EYE)
        elif name == "betaedit":
            system = (s.moment_weight * C + past + KK) @ P + s.l2 * EYE
            W = W + R @ K.mT @ P @ torch.linalg.inv(system)
        elif name == "soft":
            G = torch.diag(1 / (s.l2 * (1 + (VALUES / THRESHOLD) ** s.softness)))
            G = BASIS @ G @ BASIS.mT
            W = W + R @ K.mT @ torch.linalg.inv(torch.linalg.inv(G) + past + KK)
        elif name == "rome":
            for k, v in zip(K.mT, V.mT, strict=True):
                u = torch.linalg.inv(C) @ k
                W = W + torch.outer(v - W @ k, u) / (k @ u)
        elif name == "emmet":
            inverse = torch.linalg.inv(C)
            W = W + R @ torch.linalg.inv(K.mT @ inverse @ K) @ K.mT @ inverse
        elif name == "rect":
            delta = R @ K.mT @ torch.linalg.inv(s.moment_weight * C + KK)
            relative = (delta / W).abs()
            least = relative.flatten().sort(descending=True).values[round(s.keep * OUT * D) - 1]
            W = W + torch.where(relative >= least, delta, torch.zeros_like(delta))
        elif name == "prune":
            total = total + R @ K.mT @ torch.linalg.inv(s.moment_weight * C + KK)
            U, sigma, Vh = torch.linalg.svd(total, full_matrices=False)
            top = torch.linalg.svdvals(W0)[0]
            restrained = [
                math.log(x, s.base) - math.log(top, s.base) + top if x > top else x for x in sigma
            ]
            W = W0 + U @ torch.diag(torch.tensor(restrained, dtype=torch.float64)) @ Vh
        elif name == "nse":
            activation = K.abs().sum(1)
            order, chosen = activation.argsort(descending=True).tolist(), []
            while activation[chosen].sum() < s.neurons * activation.sum():
                chosen.append(order[len(chosen)])
            system = (s.moment_weight * C + past + KK)[chosen][:, chosen]
            delta = torch.zeros_like(W)
            delta[:, chosen] = R @ K[chosen].mT @ torch.linalg.inv(system)
            W = W + delta
        elif name == "evoedit":
            W = W + R @ K.mT @ P_left @ torch.linalg.inv(KK @ P_left + s.l2 * EYE)
            Q = torch.linalg.qr(P_left @ K).Q
            P_left = P_left - Q @ Q.mT
        elif name == "ft":
            start, first, second = W, 0 * W, 0 * W
            for t in range(1, s.steps + 1):
                gradient = (W @ K - V) @ K.mT / V.numel() + s.weight_decay * W
                first = 0.9 * first + 0.1 * gradient
                second = 0.999 * second + 0.001 * gradient**2
                root = (second / (1 - 0.999**t)).sqrt() + 1e-8
                W = W - s.learning_rate * (first / (1 - 0.9**t)) / root
                W = start + (W - start).clamp(-s.norm_constraint, s.norm_constraint)
        past = past + KK
    return W


def gap(a, b):
    """Relative difference of two weights, to the size of the update."""
    return float((a - b).norm() / (b - W0).norm())


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_its_papers_formula(name):
    stream = Stream(name)
    assert gap(stream.state.weight, paper(name, stream.batches())) < 1e-8
    folded = stream.fold.fold(stream.history.columns)
    assert gap(folded.weight, stream.state.weight) < 1e-10
    if stream.fold.latest.recursive:  # goes on from batch to batch in a fold as in the run
        assert torch.equal(folded.weight, stream.state.weight)


def test_every_method_of_the_table_is_tested_here():
    assert {m.name for m in METHODS} >= set(NAMES)
    ours = {m.name for m in METHODS if m.settings.__module__.startswith("nulledit.")}
    assert ours == {*NAMES, "gated"}  # no update of W: its formula is in test_gated.py


def test_no_two_methods_are_the_same():
    weights = {name: Stream(name, 2).state.weight for name in NAMES}
    for a in NAMES:
        for b in NAMES:
            one = {a, b} <= {"encore", "rlsedit"}  # the same solve; ENCORE's values stop earlier
            assert a == b or one == (gap(weights[a], weights[b]) < 1e-3), (a, b)


def test_alphaedit_with_c_inside_is_its_formula():
    """MEMIT with history in the null space's own coordinates, three batches; and a recipe of it."""
    stream, U, W, past = Stream("memit-history", projection="inside"), BASIS[:, VALUES < 0.1], W0, 0
    for K, V in stream.batches():
        past = past + K @ K.mT
        system = U.mT @ (20.0 * C + past) @ U
        W = W + (V - W @ K) @ K.mT @ U @ torch.linalg.inv(system) @ U.mT
    assert gap(stream.state.weight, W) < 1e-8
    assert gap(Stream("alphaedit").state.weight, W) > 1e-3
    shipped = load_recipe("llama3-8b-inside")
    assert (shipped.method.name, shipped.method.projection) == ("memit-history", "inside")
    assert find_method("memit-history").read(shipped.method).moment_weight == 15000


def batch_ridge(name, batches, tau, rho):
    """W after `batches`, each by R Kᵀ (A + K T Kᵀ)⁻¹, A with all keys before; dense."""
    s, W = SETTINGS[name], W0
    A = s["l2"] * torch.linalg.pinv(P) if name == "alphaedit" else s["moment_weight"] * C
    free = BASIS[:, VALUES < THRESHOLD] if name == "alphaedit" else EYE
    for K, V in batches:
        n = K.shape[1]
        T = tau * torch.eye(n, dtype=torch.float64) + rho / n * torch.ones(n, n).double()
        system = free.mT @ (A + K @ T @ K.mT) @ free
        W = W + (V - W @ K) @ K.mT @ free @ torch.linalg.inv(system) @ free.mT
        A = A + K @ K.mT  # T is of its own batch alone
    return W


@pytest.mark.parametrize(("tau", "rho"), [(0.5, 2.5), (0.3, 0.0), (1.0, 2.0)])
@pytest.mark.parametrize("name", ["alphaedit", "memit-history"])
def test_a_ridge_that_knows_the_batch_is_its_formula(name, tau, rho):
    stream = Stream(name, tau=tau, rho=rho)
    assert gap(stream.state.weight, batch_ridge(name, stream.batches(), tau, rho)) < 1e-8
    assert gap(stream.state.weight, Stream(name).state.weight) > 1e-2
    assert torch.equal(stream.fold.fold(stream.history.columns).weight, stream.state.weight)
    staying = [c for c in stream.history.columns if c.id not in (2, 4, 6)]
    without = batch_ridge(name, stream.batches(staying), tau, rho)
    assert gap(stream.fold.fold(staying).weight, without) < 1e-8
    assert gap(batch_ridge(name, stream.batches(), 1.0, 0.0), paper(name, stream.batches())) < 1e-8


def guarded(name, batches, guard, most, tau):
    """W after `batches`, each with D = I + λ·diag(largest cosines) on the past keys; dense."""
    s, W, past = SETTINGS[name], W0, torch.zeros(D, 0, dtype=torch.float64)
    A = s["l2"] * torch.linalg.pinv(P) if name == "alphaedit" else s["moment_weight"] * C
    free = BASIS[:, VALUES < THRESHOLD] if name == "alphaedit" else EYE
    for K, V in batches:
        weights = torch.ones(past.shape[1], dtype=torch.float64)
        if past.shape[1]:
            cosines = torch.cosine_similarity(past[:, :, None], K[:, None], dim=0).max(1).values
            near = cosines.argsort(descending=True)[:most]
            weights[near] += guard * cosines[near].clamp_min(0)
        system = free.mT @ (A + past @ torch.diag(weights) @ past.mT + tau * K @ K.mT) @ free
        W = W + (V - W @ K) @ K.mT @ free @ torch.linalg.inv(system) @ free.mT
        past = torch.cat([past, K], dim=1)
    return W


@pytest.mark.parametrize(("guard", "most", "tau"), [(8.0, 4, 1.0), (3.0, 100, 0.5), (3.0, 1, 1.0)])
@pytest.mark.parametrize("name", ["alphaedit", "memit-history"])
def test_endangered_facts_weigh_more_by_their_formula(name, guard, most, tau):
    stream = Stream(name, guard=guard, guarded=most, tau=tau)
    assert gap(stream.state.weight, guarded(name, stream.batches(), guard, most, tau)) < 1e-8
    assert torch.equal(stream.fold.fold(stream.history.columns).weight, stream.state.weight)
    staying = [c for c in stream.history.columns if c.id not in (2, 4, 6)]
    without = guarded(name, stream.batches(staying), guard, most, tau)
    assert gap(stream.fold.fold(staying).weight, without) < 1e-8


def test_a_guard_holds_old_facts_faster():
    keys = [draw(D, N, seed=10)]
    keys.append(keys[0] + 0.5 * draw(D, N, seed=11))
    moved = []
    for guard in (0.0, 1.0, 10.0):
        stream = Stream("memit-history", 2, keys=keys, guard=guard)
        first = stream.fold.fold([c for c in stream.history.columns if c.batch == 1]).weight
        moved.append(float(((stream.state.weight - first) @ keys[0]).norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[2] < 0.5 * moved[0]


@pytest.mark.parametrize("name", ["alphaedit", "memit-history"])
def test_a_filter_alone_knows_the_batchs_ridge_too(name):
    stream = Stream(name, 1, tau=0.5, rho=2.5)
    (K, V) = stream.batches()[0]
    update = find_method(name).update(problem_of(stream, K, V - W0 @ K))
    assert gap(W0 + update, stream.state.weight) < 1e-10


def compensated(name, batches):
    """W and W − E A⁻¹ after `batches`, with E and A written out; dense."""
    s, W, A, E = SETTINGS[name], W0, SETTINGS[name]["moment_weight"] * C, 0 * W0
    for K, V in batches:
        A = A + K @ K.mT
        delta = ((V - W @ K) @ K.mT - E) @ torch.linalg.inv(A)
        if name == "rect":
            relative = (delta / W).abs()
            least = relative.flatten().sort(descending=True).values[round(s["keep"] * OUT * D) - 1]
            written = torch.where(relative >= least, delta, torch.zeros_like(delta))
        else:
            written = W0 + restrain(W - W0 + delta, W0, s["base"]) - W
        W, E = W + written, (written - delta) @ A
    return W, W - E @ torch.linalg.inv(A)


@pytest.mark.parametrize("gone", [set(), {2}, {2, 4, 6}, {1, 2, 3}])
@pytest.mark.parametrize("name", ["rect", "prune"])
def test_compensation_is_its_formula_and_keeps_the_joint_solution(name, gone):
    stream = Stream(name, compensate=True)
    if name == "prune":  # so much that something is restrained
        assert gap(stream.state.weight, W0 + stream.state.total) > 1e-2
    staying = [c for c in stream.history.columns if c.id not in gone]
    state = stream.fold.fold(staying)
    W, joint = compensated(name, stream.batches(staying))
    assert gap(state.weight, W) < 1e-8
    assert gap(W0 + state.total, joint) < 1e-8
    assert gap(joint, paper("memit-history", stream.batches(staying))) < 1e-8
    if not gone:
        assert torch.equal(state.weight, stream.state.weight)
        assert gap(W, Stream(name).state.weight) > 1e-2


@pytest.mark.parametrize("projection", ["none", "inside", "after"])
@pytest.mark.parametrize("name", ["rect", "prune"])
def test_compensation_keeps_out_of_what_a_projection_protects(name, projection):
    total = Stream(name, compensate=True, projection=projection).state.weight - W0
    leak = (total @ PROTECTED).norm() / (total.norm() * PROTECTED.norm())
    assert (leak < 1e-10) == (projection != "none")


@pytest.mark.parametrize("projection", ["none", "inside", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_meets_every_projection(name, projection):
    stream = Stream(name, projection=projection)
    total = stream.state.weight - W0
    assert torch.isfinite(total).all()
    assert total.norm() > 0
    leak = (total @ PROTECTED).norm() / (total.norm() * PROTECTED.norm())
    if projection == "none":
        assert leak > 1e-4
    else:
        assert leak < 1e-10
        torch.testing.assert_close(total @ P, total, rtol=0, atol=1e-10 * float(total.norm()))


@pytest.mark.parametrize("name", CLOSED)
def test_inside_and_after_are_two_different_updates(name):
    inside, after = (Stream(name, projection=p).state.weight for p in ("inside", "after"))
    assert gap(inside, after) > 1e-3


@pytest.mark.parametrize("name", [n for n in CLOSED if n not in ("rect", "nse", "prune")])
def test_inside_is_the_method_in_the_null_spaces_own_coordinates(name):
    stream = Stream(name, 1, projection="inside")
    (K, V), free = stream.batches()[0], BASIS[:, VALUES < THRESHOLD]
    method = find_method(name)
    settings = stream.fold.latest.settings
    values = VALUES[VALUES < THRESHOLD]
    small = Spectrum.joined({0: Block(values, torch.eye(len(values)).double())})
    metric = small.preconditioner(method.gains(values, THRESHOLD, settings))
    problem = LayerProblem(
        layer=0,
        weight=W0 @ free,
        original=W0 @ free,
        keys=free.mT @ K,
        residual=V - W0 @ K,
        past_keys=K[: len(values), :0],
        spectrum=small,
        preconditioner=metric,
        projector=metric,
        projection="none",
        settings=settings,
    )
    assert gap(W0 + method.update(problem) @ free.mT, stream.state.weight) < 1e-8


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("gone", [{2}, {2, 4, 6}, {1, 2, 3}])
def test_undo_is_the_papers_sequence_without_the_facts(name, gone):
    stream = Stream(name)
    staying = [c for c in stream.history.columns if c.id not in gone]
    assert gap(stream.fold.fold(staying).weight, paper(name, stream.batches(staying))) < 1e-8
    assert torch.equal(stream.fold.fold([]).weight, W0)


def test_a_fine_tuned_batch_can_only_leave_whole():
    stream = Stream("ft")
    columns = stream.history.columns
    without = stream.fold.fold([c for c in columns if c.batch != 2]).weight
    second = stream.history.tensors["batch2"]["update.0"]
    torch.testing.assert_close(without, stream.state.weight - second)
    with pytest.raises(LedgerError, match="batch 2 was written as one update by ft"):
        stream.fold.fold([c for c in columns if c.id != 4])


@pytest.mark.parametrize("name", CLOSED)
def test_linear_methods_say_so_and_the_others_are_not(name):
    stream, method = Stream(name, 1), find_method(name)
    problem = problem_of(stream)

    def added(residual):
        update = method.update(replace(problem, residual=residual))
        return method.finish(update, W0, problem.settings) if method.finish else update

    one, two = (3 * draw(OUT, N, seed=s) for s in (31, 32))
    error = (added(one + two) - added(one) - added(two)).norm() / added(one).norm()
    assert (error < 1e-10) == method.linear


def problem_of(stream, keys=None, residual=None, past=None, **changes):
    """A problem on W₀ as the stream's fold would pose it."""
    fold = stream.fold
    keys = draw(D, N, seed=10) if keys is None else keys
    return LayerProblem(
        layer=0,
        weight=W0,
        original=W0,
        keys=keys,
        residual=3 * draw(OUT, keys.shape[1], seed=30) if residual is None else residual,
        past_keys=keys[:, :0] if past is None else past,
        spectrum=fold.latest.preconditioners.spectrum,
        preconditioner=fold.latest.preconditioners.own,
        projector=fold.latest.preconditioners.projector,
        projection=fold.latest.method.projection(fold.latest.recipe.method),
        settings=fold.latest.settings,
        **changes,
    )


# -- equality --------------------------------------------------------------------------------


@given(st.integers(1, 12), st.sampled_from(["none", "inside"]))
def test_emmet_meets_every_value_and_moves_c_least(n, projection):
    stream = Stream("emmet", 0, projection=projection)
    problem = problem_of(stream, draw(D, n, seed=n))
    update = find_method("emmet").update(problem)
    torch.testing.assert_close(update @ problem.keys, problem.residual, rtol=1e-6, atol=1e-6)
    if projection == "none":  # anything else that meets them costs more
        aside = draw(OUT, D, seed=3) @ (EYE - problem.keys @ torch.linalg.pinv(problem.keys))
        for other in (update + 1e-3 * aside, update - 1e-3 * aside):
            assert torch.trace(other @ C @ other.mT) > torch.trace(update @ C @ update.mT)


def test_rome_realises_its_one_key_exactly():
    stream = Stream("rome", 0)
    problem = problem_of(stream, draw(D, 1, seed=5))
    update = find_method("rome").update(problem)
    torch.testing.assert_close(update @ problem.keys, problem.residual)
    assert torch.linalg.matrix_rank(update) == 1


@given(st.sampled_from([0.0, 1e-14, 1e-9, 1e-4]))
def test_keys_that_are_nearly_one_stay_finite(apart):
    key, other = draw(D, 1, seed=5), draw(D, 1, seed=6)
    keys = torch.cat([key, key + apart * other], 1)
    for name in CLOSED:
        update = find_method(name).update(problem_of(Stream(name, 0), keys))
        assert torch.isfinite(update).all(), name
    rome = find_method("rome").update(problem := problem_of(Stream("rome", 0), keys))
    torch.testing.assert_close(rome @ keys[:, 1], problem.residual[:, 1])


def test_emmet_gives_equal_keys_their_mean_and_says_so(caplog):
    key, other = draw(D, 1, seed=5), draw(D, 1, seed=6)
    problem = problem_of(Stream("emmet", 0), torch.cat([key, other, key], 1))
    written = find_method("emmet").update(problem) @ problem.keys
    R = problem.residual
    torch.testing.assert_close(written[:, 0], (R[:, 0] + R[:, 2]) / 2)
    torch.testing.assert_close(written[:, 1], R[:, 1])
    assert "layer 0: 1 of 3 keys depend on the others" in caplog.text


def test_emmet_with_more_keys_than_directions_is_least_squares(caplog):
    """Nearest in the norm in which every key is one long in C⁻¹."""
    keys = draw(D, 2 * D, seed=4)
    problem = problem_of(Stream("emmet", 0), keys)
    error = find_method("emmet").update(problem) @ keys - problem.residual
    lengths = (keys * torch.linalg.solve(C, keys)).sum(0).sqrt()
    assert ((error / lengths) @ (keys / lengths).mT).norm() < 1e-6 * error.norm()
    assert f"{D} of {2 * D} keys" in caplog.text


@given(st.floats(1e-3, 1e4))
def test_emmet_with_a_ridge_is_memit(ridge):
    emmet = find_method("emmet").update(problem_of(Stream("emmet", 0, ridge=ridge)))
    memit = find_method("memit").update(problem_of(Stream("memit", 0, moment_weight=ridge)))
    assert gap(W0 + emmet, W0 + memit) < 1e-8


@pytest.mark.parametrize("name", ["rome", "emmet"])
def test_a_key_without_a_free_part_is_not_written(name):
    stream = Stream(name, 0, projection="inside")
    keys = torch.cat([PROTECTED[:, :1], draw(D, 1, seed=5)], 1)
    problem = problem_of(stream, keys)
    update = find_method(name).update(problem)
    assert (update @ keys[:, 0]).norm() < 1e-9
    torch.testing.assert_close(update @ keys[:, 1], problem.residual[:, 1])
    alone = find_method(name).update(problem_of(stream, PROTECTED[:, :2]))
    assert alone.norm() == 0


def test_rome_without_the_moment_takes_c_as_one():
    problem = problem_of(Stream("rome", 0, moment=False), k := draw(D, 1, seed=5))
    expected = problem.residual @ k.mT / k.square().sum()
    torch.testing.assert_close(find_method("rome").update(problem), expected)


# -- rect and prune --------------------------------------------------------------------------


@given(st.floats(0.01, 1.0))
def test_rect_keeps_exactly_the_largest_relative_changes(share):
    memit = find_method("memit").update(problem_of(Stream("memit", 0)))
    update = find_method("rect").update(problem_of(Stream("rect", 0, keep=share)))
    kept = update != 0
    assert int(kept.sum()) == max(round(share * OUT * D), 1)
    torch.testing.assert_close(update[kept], memit[kept])
    relative = (memit / W0).abs()
    assert kept.all() or relative[kept].min() >= relative[~kept].max()


def test_a_weight_of_zero_counts_as_changed_most_and_nothing_is_nan():
    weight = torch.ones(2, 3, dtype=torch.float64)
    weight[0, 0] = 0
    update = torch.full((2, 3), 5.0, dtype=torch.float64)
    update[0, 0], update[1, 1] = 0.1, 0
    kept = keep_largest(update, weight, 1 / 6)
    assert kept.nonzero().tolist() == [[0, 0]]
    assert keep_largest(update, torch.zeros_like(weight), 1.0).equal(update)


@given(st.floats(0.1, 20), st.sampled_from([1.2, math.e]))
def test_prune_moves_singular_values_and_nothing_else(scale, base):
    update, top = scale * draw(OUT, D, seed=8), torch.linalg.svdvals(W0)[0]
    result = restrain(update, W0, base)
    before, after = torch.linalg.svdvals(update), torch.linalg.svdvals(result)
    expected = torch.where(before > top, (before / top).log() / math.log(base) + top, before)
    torch.testing.assert_close(after, expected.sort(descending=True).values)
    if before[0] <= top:
        assert result is update
    null = EYE - torch.linalg.pinv(update) @ update
    assert (result @ null).norm() < 1e-10 * result.norm()


def test_prune_restrains_the_total_not_each_batch():
    keys = [draw(D, N, seed=10)] * 3
    stream = Stream("prune", keys=keys)
    total = stream.state.total
    assert torch.linalg.svdvals(total)[0] > torch.linalg.svdvals(W0)[0]
    torch.testing.assert_close(stream.state.weight, W0 + restrain(total, W0, 1.5))


# -- neurons ---------------------------------------------------------------------------------


@given(st.floats(0.01, 1.0), st.integers(1, 5))
def test_nse_takes_the_fewest_neurons_that_hold_the_share(share, n):
    keys = draw(D, n, seed=n)
    activation = keys.abs().sum(1)
    chosen = chosen_neurons(keys, share)
    held = activation[chosen].sum()
    assert held >= share * activation.sum() * (1 - 1e-12)
    fewer = activation.sort(descending=True).values[: len(chosen) - 1].sum()
    assert fewer < share * activation.sum()


def test_nse_touches_the_chosen_neurons_only():
    stream = Stream("nse", 1, neurons=0.5)
    chosen = chosen_neurons(stream.batches()[0][0], 0.5)
    touched = (stream.state.weight != W0).any(0).nonzero().squeeze(1)
    assert touched.tolist() == chosen.tolist()
    assert len(chosen) < D / 2


def test_nse_on_all_neurons_is_memit_with_history():
    nse, memit = Stream("nse", neurons=1.0), Stream("memit-history")
    assert gap(nse.state.weight, memit.state.weight) < 1e-8


@pytest.mark.parametrize("projection", ["none", "inside", "after"])
def test_nse_refuses_a_compact_spectrum_at_the_start(projection):
    method = {"name": "nse", "projection": projection}
    recipe = Recipe.from_dict({"layers": [0], "method": method})
    compact = Spectrum.of(C).compact(THRESHOLD, dtype=torch.float64)
    with pytest.raises(LookupError, match="eigenvectors"):
        LayerPreconditioners.of(recipe, compact, THRESHOLD)


# -- evoedit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["none", "inside"])
def test_evoedit_leaves_what_earlier_batches_wrote(projection):
    stream = Stream("evoedit", projection=projection)
    first, _ = stream.batches()[0]
    earlier = stream.fold.fold([c for c in stream.history.columns if c.batch == 1]).weight
    torch.testing.assert_close(stream.state.weight @ first, earlier @ first)


def test_evoedit_says_when_no_room_is_left_and_goes_on_after_an_undo():
    stream, room = Stream("evoedit"), int((VALUES < THRESHOLD).sum())
    while (left := room - len(stream.history.columns)) > 0:
        stream.write(draw(D, min(N, left), seed=50 + left), seed=9)
    taken = stream.history.columns
    fresh = draw(D, 2, seed=91)
    with pytest.raises(NoRoomError, match=f"edits before have taken all {room} free directions"):
        stream.fold.latest.add(stream.state, taken, fresh, draw(OUT, 2, seed=92))
    state = stream.fold.fold(taken[1:])
    assert stream.fold.latest.add(state, taken[1:], fresh, draw(OUT, 2, seed=92)).total.norm() > 0


def test_evoedit_refuses_a_key_that_earlier_edits_use_up():
    stream = Stream("evoedit", 2)
    mix = stream.batches()[0][0] @ draw(N, 1, seed=3)
    keys = torch.cat([draw(D, 1, seed=4), mix], 1)
    with pytest.raises(NoRoomError, match="taken all that 1 of 2 new keys could use"):
        stream.fold.latest.add(stream.state, stream.history.columns, keys, draw(OUT, 2, seed=92))


def test_evoedit_does_not_blame_earlier_edits_for_a_protected_key():
    """Nothing in the null space to begin with: a void edit, as AlphaEdit's; reports show it."""
    stream = Stream("evoedit", 1)
    key = PROTECTED[:, :1]
    state = stream.fold.latest.add(stream.state, stream.history.columns, key, draw(OUT, 1, seed=92))
    assert (state.total - stream.state.total).norm() < 1e-9


# -- fine-tuning -----------------------------------------------------------------------------


def test_fine_tuning_stays_in_its_box_and_stops_when_done():
    stream = Stream("ft", 0, steps=400, weight_decay=0.0, norm_constraint=0.02)
    K = draw(D, N, seed=10)
    asked = []

    def loss(weight):
        asked.append(quadratic(K, near)(weight)[0])
        return quadratic(K, near)(weight)

    near = W0 @ K + 0.05 * draw(OUT, N, seed=3)
    update = find_method("ft").update(problem_of(stream, K, target_loss=loss))
    assert len(asked) == 1, "already below the stop loss"
    assert update.norm() == 0
    near, asked = W0 @ K + 3 * draw(OUT, N, seed=3), []
    update = find_method("ft").update(problem_of(stream, K, target_loss=loss))
    assert update.abs().max() <= 0.02 + 1e-12
    assert asked[-1] < asked[0]
    free = Stream("ft", 0, steps=400, weight_decay=0.0, norm_constraint=0.0)
    asked = []
    find_method("ft").update(problem_of(free, K, target_loss=loss))
    assert len(asked) < 400
    assert asked[-1] < 1e-2 <= asked[-2]


def test_fine_tuning_without_a_loss_is_a_slip():
    with pytest.raises(ValueError, match="target_loss"):
        find_method("ft").update(problem_of(Stream("ft", 0)))


# -- the table -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("emmet", {"ridge": -1}),
        ("rome", {"moment": 3}),
        ("rect", {"keep": 0}),
        ("rect", {"keep": 1.1}),
        ("rect", {"moment_weight": 0}),
        ("alphaedit", {"tau": 0}),
        ("memit-history", {"rho": -1}),
        ("memit-history", {"guard": -1}),
        ("alphaedit", {"guarded": 0}),
        ("prune", {"base": 1.0}),
        ("nse", {"neurons": 1.5}),
        ("nse", {"neuron": 0.5}),
        ("ft", {"steps": 0}),
        ("ft", {"norm_constraint": -0.1}),
        ("evoedit", {"l2": 0}),
    ],
)
def test_bad_settings_are_refused_by_name(name, constants):
    with pytest.raises(ConfigError, match=next(iter(constants))):
        find_method(name).read(MethodSettings(name, constants=constants))


@pytest.mark.parametrize("recipe", shipped_recipes())
@pytest.mark.parametrize("method", [method.name for method in METHODS])
def test_a_shipped_recipe_changes_to_any_method(method, recipe):
    """Settings of values that the new one can't use stay behind, and the others stay."""
    held = load_recipe(recipe)
    changed = change_recipe(held, {"method.name": method})
    find_method(method).check(changed)
    assert changed.values.steps == held.values.steps


def test_settings_that_someone_names_do_not_stay_behind():
    held = Recipe.from_dict({"values": {"rounds": 6, "relation_weight": 4}})
    for name in ("ft", "nse"):
        named = {"method.name": name, "values.rounds": 3}
        with pytest.raises(ConfigError, match=r"values\.rounds"):
            find_method(name).check(change_recipe(held, named))
    assert change_recipe(held, {"method.name": "memit"}).values == held.values
    same = Recipe.from_dict({"method": {"name": "ft"}, "values": {"rounds": 6}})
    with pytest.raises(ConfigError, match=r"values\.rounds"):
        find_method("ft").check(change_recipe(same, {"method.name": "ft"}))


def test_the_table_suggests_near_names_and_takes_each_once():
    with pytest.raises(ConfigError, match="did you mean 'alphaedit'"):
        find_method("alfaedit")
    table = Registry()
    table.add(find_method("memit"))
    with pytest.raises(ConfigError, match="registered already"):
        table.add(find_method("memit"))


def test_a_method_of_ones_own_is_a_row():
    """An update of half size: what any function of a problem can do, projection included."""
    half = Solve(
        name="half",
        about="half of MEMIT",
        paper="-",
        settings=find_method("memit").settings,
        gains=find_method("memit").gains,
        solve=lambda p: solve_update(p.keys, p.residual, p.preconditioner) / 2,
    )
    problem = replace(problem_of(Stream("memit", 0)), projection="after")
    torch.testing.assert_close(half.update(problem), find_method("memit").update(problem) / 2)


def test_a_filter_cant_have_a_solve_of_its_own_and_a_method_needs_a_kind():
    """So that a history of one's own never takes the slow way unless it is declared a `Solve`."""
    row = {"about": "-", "paper": "-", "settings": NoSettings}
    with pytest.raises(TypeError, match="solve"):
        Filter(name="own", gains=ones, solve=closed_form, history=True, **row)
    with pytest.raises(TypeError, match="gains"):
        Filter(name="own", **row)
    with pytest.raises(ConfigError, match="own: make it a Filter, a Solve, a Descent or a Gate"):
        Registry().add(Method(name="own", solve=closed_form, **row))


def test_a_solve_with_history_is_the_joint_solve_that_a_filter_does_batch_by_batch(registry):
    alphaedit = find_method("alphaedit")
    asked = []

    @method(
        "anew", settings=alphaedit.settings, gains=alphaedit.gains, projected=True, history=True
    )
    def solve(problem):
        asked.append(problem.keys.shape[1])
        return closed_form(problem)

    anew, filtered = Stream("anew", l2=0.3), Stream("alphaedit")
    assert (anew.fold.latest.recursive, filtered.fold.latest.recursive) == (False, True)
    assert gap(anew.state.weight, filtered.state.weight) < 1e-10
    assert asked == [N, 2 * N, 3 * N], "all facts so far, with every batch"
    assert "anew with every batch" in invoke("anew").stdout


@pytest.mark.parametrize("projection", ["own", "after"])
def test_a_filter_with_history_and_a_finish_is_the_finish_of_the_joint_solve(registry, projection):
    def clip(total, original, settings):
        return total * (0.05 * original.norm() / total.norm())

    METHODS.add(replace(find_method("memit-history"), name="clipped", finish=clip))
    clipped = Stream("clipped", moment_weight=20.0, projection=projection)
    K, V = (torch.cat(found, dim=1) for found in zip(*clipped.batches(), strict=True))
    joint = solve_update(K, V - W0 @ K, clipped.fold.latest.preconditioners.own)
    joint = joint @ P if projection == "after" else joint
    assert gap(clipped.state.weight, W0 + clip(joint, W0, None)) < 1e-10
    assert torch.equal(clipped.fold.fold(clipped.history.columns).weight, clipped.state.weight)


# -- documents and the command line ----------------------------------------------------------

PAGES = Path(__file__).parents[1] / "docs" / "methods"


def page_of(method):
    return PAGES / f"{method.page or method.name}.md"


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_page_with_its_settings_and_source(name):
    method = find_method(name)
    text, listed = page_of(method).read_text(), (PAGES / "README.md").read_text()
    assert method.paper.removeprefix("arXiv:") in text or method.paper.startswith("docs/")
    assert f"({page_of(method).name})" in listed
    for setting, default in method.constants().items():
        row = next(r for r in text.splitlines() if r.startswith(f"| `{setting}`"))
        shown = row.split("|")[2].strip().replace(",", "")
        words = {math.e: "e"} if not isinstance(default, bool) else {True: "true", False: "false"}
        assert shown == words.get(default, shown)
        if default not in words:
            assert float(shown) == default


def test_defaults_are_those_of_the_published_settings_files():
    published = {"betaedit": {"moment_weight": 3000, "l2": 10}}
    for name, constants in published.items():
        assert find_method(name).constants() == constants


@pytest.mark.parametrize("name", NAMES)
def test_a_filled_recipe_reads_back_as_recorded_whatever_the_defaults_become(name):
    filled = find_method(name).filled(Recipe.from_dict({"method": {"name": name}}))
    assert filled.method.constants == find_method(name).constants()
    assert Recipe.recorded(filled.to_dict()).method == filled.method


def test_a_ledger_of_before_constants_were_recorded_means_the_defaults_of_then():
    def old(**method):
        recipe = Recipe.recorded({"layers": [0], "method": method})
        found = find_method(recipe.method.name)
        settings = found.read(recipe.method)
        return settings, found.keeps(settings)

    assert old(name="betaedit")[0].moment_weight == 15000
    assert old(name="betaedit", moment_weight=7)[0].moment_weight == 7
    assert not old(name="encore", moment_weight=20.0, l2=0.3)[1]
    assert old(name="encore", history=True)[1]
    assert old(name="rlsedit")[1]
    assert not old(name="memit")[1]


def test_encore_of_before_it_had_history_folds_as_it_did_then():
    stream, s = Stream("encore", history=False), SETTINGS["encore"]
    W = W0
    for K, V in stream.batches():  # each batch on its own
        system = s["moment_weight"] * C + K @ K.mT + s["l2"] * EYE
        W = W + (V - W @ K) @ K.mT @ torch.linalg.inv(system)
    assert gap(stream.state.weight, W) < 1e-8
    assert torch.equal(stream.fold.fold(stream.history.columns).weight, stream.state.weight)


def invoke(*words):
    return CliRunner().invoke(cli, ["methods", *words])


def test_the_command_lists_every_method_with_defaults():
    said = invoke().stdout
    for name in NAMES:
        assert re.search(rf"^{name} ", said, re.M)
    assert "moment_weight=15000, compensate=false, keep=0.4" in said
    listed = json.loads(invoke("--json").stdout)
    assert [m["name"] for m in listed] == [m.name for m in METHODS]
    assert all(s["about"] for m in listed for s in m["settings"]), "a setting without a docstring"


def test_the_command_tells_one_method_in_detail_or_suggests_a_near_one():
    said = invoke("rect").stdout
    assert "keep (default 0.4)" in said
    assert "moment_weight (default 15000)" in said, "settings it builds on are shown too"
    assert json.loads(invoke("rome", "--json").stdout)["traits"]["one_by_one"] is True
    wrong = invoke("prun")
    assert wrong.exit_code == 2
    assert "did you mean 'prune'" in wrong.stderr


# -- methods of one's own --------------------------------------------------------------------


@pytest.fixture
def registry():
    """What a test registers is gone afterwards."""
    with METHODS.restored():
        yield


def test_a_plain_function_becomes_a_method(registry):
    @method("least-squares", paper="a textbook")
    def solve(problem: LayerProblem) -> torch.Tensor:
        """The shortest update that writes every residual."""
        return problem.residual @ torch.linalg.pinv(problem.keys)

    found = find_method("least-squares")
    assert found.about == "The shortest update that writes every residual"
    stream = Stream("least-squares")
    K, V = stream.batches()[-1]
    assert torch.allclose(stream.state.weight @ K, V, atol=1e-8)
    with pytest.raises(ConfigError, match="registered already"):
        method("least-squares")(solve)


@pytest.fixture
def package(tmp_path, monkeypatch, registry):
    """Installs a package whose entry point is `value`, with `source` as its module."""

    def install(source, value="offered:METHODS"):
        (tmp_path / "offered.py").write_text(source, encoding="utf-8")
        about = tmp_path / "offered-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[nulledit.methods]\nmine = {value}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "offered", raising=False)

    return install


def test_methods_of_an_installed_package_are_seen_by_the_command_line(package):
    package(
        "from dataclasses import replace\n"
        "from nulledit.methods import find_method\n"
        "METHODS = [replace(find_method('memit'), name='memit-again')]\n"
    )
    assert find_method("memit-again").gains is find_method("memit").gains
    assert "memit-again" in {row["name"] for row in json.loads(invoke("--json").stdout)}


def test_a_module_may_register_its_own(package):
    package(
        "from nulledit.methods import method\n"
        "@method('nothing')\n"
        "def nothing(problem):\n    return 0 * problem.weight\n",
        "offered",
    )
    assert find_method("nothing").paper == ""


def test_a_package_that_fails_is_named_in_one_line(package):
    package("raise RuntimeError('broken\\nin two lines')")
    with pytest.raises(ConfigError, match=r"offered:METHODS offers.*broken in two lines") as caught:
        find_method("no-such-method")
    assert "\n" not in str(caught.value)
