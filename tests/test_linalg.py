"""Moments, spectra and the solve, by their properties, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nulledit.linalg import solve as solve_module
from nulledit.linalg.moments import SecondMoment
from nulledit.linalg.preconditioner import BlockGains, SpectralPreconditioner
from nulledit.linalg.solve import RecursiveState, gram, room_left, solve_update
from nulledit.linalg.spectrum import (
    Spectrum,
    threshold_absolute,
    threshold_leakage,
    threshold_median,
)

settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fixed")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum_of(d=12, seed=0):
    """A second moment with eigenvalues 10^-3 to 10."""
    basis = torch.linalg.qr(draw(d, d, seed=seed)).Q
    values = torch.logspace(-3, 1, d, dtype=torch.float64)
    return Spectrum.of(basis @ torch.diag(values) @ basis.mT)


def dense_projector(spectrum, threshold):
    free = spectrum.whole().eigenvectors[:, spectrum.eigenvalues < threshold]
    return free @ free.mT


def null_space_metric(spectrum, threshold, l2):
    return spectrum.preconditioner((spectrum.eigenvalues < threshold).double() / l2)


@pytest.mark.parametrize("n", [1, 3, 4, 11])
def test_a_symmetric_product_is_the_product(n, monkeypatch):
    monkeypatch.setattr(solve_module, "SQUARE", 4)
    matrix = draw(7, n)
    for given_as in (matrix, matrix.mT.contiguous().mT):
        found = gram(given_as)
        torch.testing.assert_close(found, matrix.mT @ matrix, rtol=1e-13, atol=1e-13)
        assert torch.equal(found[4:8, :4], found[:4, 4:8].mT)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 64))
def test_moment_does_not_depend_on_batches_or_chunk(sizes, chunk):
    keys = draw(sum(sizes), 5)
    whole = keys.mT @ keys / len(keys)
    moment = SecondMoment(5, chunk=chunk)
    for part in keys.split(sizes):
        moment.update(part)
    assert moment.count == len(keys)
    torch.testing.assert_close(moment.value, whole, rtol=1e-12, atol=1e-12)


def test_float32_products_keep_small_eigenvalues():
    """Eigenvalues six orders below the largest, from float32 keys, to 1e-3."""
    d, n = 32, 20_000
    scales = torch.logspace(0, -3, d, dtype=torch.float64)
    keys = (draw(n, d) * scales).float()
    exact = torch.linalg.eigvalsh(keys.double().mT @ keys.double() / n)
    found = torch.linalg.eigvalsh(SecondMoment(d).update(keys).value)
    assert ((found - exact).abs() / exact).max() < 1e-3


def test_moment_refuses_another_width():
    with pytest.raises(ValueError, match="width 4"):
        SecondMoment(4).update(draw(3, 5))


@pytest.mark.parametrize("threshold", [2e-3, 0.02, 0.5, 5.0])
def test_metric_is_the_dense_filter(threshold):
    spectrum = spectrum_of()
    metric = null_space_metric(spectrum, threshold, l2=4.0)
    P = dense_projector(spectrum, threshold)
    keys = draw(12, 3, seed=1)
    torch.testing.assert_close(metric.apply(keys), P @ keys / 4)
    share = (P @ keys).square().sum(0) / keys.square().sum(0)
    torch.testing.assert_close(metric.null_space_share(keys), share)
    assert metric.rank == int((spectrum.eigenvalues < threshold).sum())
    assert metric.blocks[0].vectors.shape[1] <= 6, "the thinner side is held"


def test_any_filter_on_a_full_spectrum():
    spectrum = spectrum_of()
    gains = 1 / (1 + spectrum.eigenvalues)
    Q = spectrum.whole().eigenvectors
    keys = draw(12, 3)
    torch.testing.assert_close(
        spectrum.preconditioner(gains).apply(keys), Q @ torch.diag(gains) @ Q.mT @ keys
    )


def test_compact_spectrum_serves_its_threshold_and_refuses_others():
    spectrum = spectrum_of()
    compact = spectrum.compact(0.5, dtype=torch.float64)
    keys = draw(12, 3)
    for threshold in (0.5, 2.0):  # fewer protected directions than are held: a subset of them
        expected = null_space_metric(spectrum, threshold, 1.0).apply(keys)
        torch.testing.assert_close(null_space_metric(compact, threshold, 1.0).apply(keys), expected)
    with pytest.raises(LookupError, match="eigenvectors"):
        null_space_metric(compact, 0.02, 1.0)
    with pytest.raises(LookupError):
        compact.preconditioner(1 / (1 + spectrum.eigenvalues))


def test_half_precision_is_made_orthonormal_again():
    thin = spectrum_of(40).compact(0.5).blocks[0].orthonormal()
    U = thin.eigenvectors
    torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1], dtype=torch.float64))
    exact = spectrum_of(40).compact(0.5, dtype=torch.float64).blocks[0].eigenvectors
    assert (U @ U.mT - exact @ exact.mT).norm() / exact.shape[1] ** 0.5 < 2e-3


@given(st.floats(0.001, 0.9), st.booleans())
def test_leakage_rule_keeps_its_promise(share, massive):
    values = torch.logspace(-3, 0, 50, dtype=torch.float64)
    if massive:
        values = torch.cat([values, torch.tensor([1000.0], dtype=torch.float64)])
    threshold = threshold_leakage(values, share)
    counted = values[:50]
    assert counted[counted < threshold].sum() / counted.sum() <= share
    more = counted[counted <= threshold].sum() / counted.sum()
    assert more > share or threshold > counted.max()
    assert not massive or values[-1] >= threshold, "a massive direction is always protected"


@given(st.floats(1e-3, 1e3))
def test_scale_free_rules_do_not_see_the_scale(scale):
    values = torch.logspace(-3, 1, 41, dtype=torch.float64)
    for rule, value in ((threshold_leakage, 0.1), (threshold_median, 2.0)):
        assert int((values < rule(values, value)).sum()) == int(
            (values * scale < rule(values * scale, value)).sum()
        )
    assert threshold_absolute(values, 0.02) == 0.02


def test_solve_equals_alphaedit_dense_form():
    """arXiv:2410.02355: Δ = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + λ I)⁻¹, batch after batch."""
    spectrum, l2, threshold = spectrum_of(30), 0.7, 0.05
    P = dense_projector(spectrum, threshold)
    metric = null_space_metric(spectrum, threshold, l2)
    W0, eye = draw(8, 30, seed=5), torch.eye(30, dtype=torch.float64)
    weight, history = W0.clone(), torch.zeros(30, 30, dtype=torch.float64)
    keys, targets = [], []
    for batch in range(5):
        K = draw(30, 4, seed=10 + batch)
        R = draw(8, 4, seed=20 + batch)
        keys.append(K)
        targets.append(weight @ K + R)
        dense = R @ K.mT @ P @ torch.linalg.inv(history @ P + K @ K.mT @ P + l2 * eye)
        weight += dense
        history += K @ K.mT
        if batch == 0:
            torch.testing.assert_close(solve_update(K, R, metric), dense, rtol=1e-8, atol=1e-8)
        joint_keys, joint = torch.cat(keys, 1), torch.cat(targets, 1)
        folded = W0 + solve_update(joint_keys, joint - W0 @ joint_keys, metric)
        assert (folded - weight).norm() / weight.norm() < 1e-10
    # Without one column it is the sequence that never had that fact, its targets as recorded.
    rest = [i for i in range(joint_keys.shape[1]) if i != 6]
    dropped = W0 + solve_update(joint_keys[:, rest], (joint - W0 @ joint_keys)[:, rest], metric)
    K = joint_keys[:, rest]
    R = (joint - W0 @ joint_keys)[:, rest]
    dense = W0 + R @ K.mT @ P @ torch.linalg.inv(K @ K.mT @ P + l2 * eye)
    assert (dropped - dense).norm() / dense.norm() < 1e-10


def test_solve_is_the_minimum_and_stays_in_the_null_space():
    spectrum, l2 = spectrum_of(20), 0.3
    metric = null_space_metric(spectrum, 0.1, l2)
    P = dense_projector(spectrum, 0.1)
    K, R = draw(20, 5), draw(6, 5, seed=3)
    delta = solve_update(K, R, metric)
    torch.testing.assert_close(delta @ P, delta)
    variable = delta.clone().requires_grad_(True)
    loss = (variable @ P @ K - R).square().sum() + l2 * (variable @ P).square().sum()
    (gradient,) = torch.autograd.grad(loss, variable)
    assert gradient.norm() < 1e-8 * R.norm()


def test_solve_does_not_depend_on_the_order_of_facts_and_survives_equal_keys():
    metric = null_space_metric(spectrum_of(20), 0.5, 1e-6)
    K, R = draw(20, 5), draw(6, 5, seed=3)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        solve_update(K, R, metric), solve_update(K[:, order], R[:, order], metric)
    )
    doubled = solve_update(torch.cat([K, K], 1), torch.cat([R, R], 1), metric)
    assert torch.isfinite(doubled).all()
    torch.testing.assert_close(doubled @ K, solve_update(K, R, metric) @ K, rtol=1e-4, atol=1e-4)


def test_no_room_left_gives_no_update():
    none = torch.empty(20, 0, dtype=torch.float64)
    metric = SpectralPreconditioner({0: BlockGains(none, none[0], 0.0)}, 20, 20)
    assert metric.rank == 0
    assert solve_update(draw(20, 3), draw(6, 3), metric).norm() == 0


def test_room_left_is_the_dense_trace_and_runs_from_one_to_none():
    metric = null_space_metric(spectrum_of(), 0.5, l2=0.1)
    G = metric.apply(torch.eye(12, dtype=torch.float64))
    K = draw(12, 4)
    S = K.mT @ G @ K
    taken = torch.trace(S @ torch.linalg.inv(torch.eye(4, dtype=torch.float64) + S))
    assert room_left(metric, K) == pytest.approx(1 - float(taken) / metric.rank, abs=1e-12)
    assert room_left(metric, K[:, :0]) == 1
    assert 1 > room_left(metric, K) > room_left(metric, 10 * draw(12, 9)) > 0
    assert room_left(metric, 1e2 * draw(12, 40)) == pytest.approx(0, abs=1e-3)
    assert math.isnan(room_left(null_space_metric(spectrum_of(), 0.0, l2=0.1), K))


@pytest.mark.parametrize("kind", ["cut", "cut, other side", "slope", "wide"])
@pytest.mark.parametrize("sizes", [[5, 3], [1] * 9, [3, 1, 4, 3], [7, 5, 9, 2, 3], [30, 1, 3]])
def test_batches_after_one_another_equal_the_joint_solve(kind, sizes, monkeypatch):
    """Also past as many columns as the keys are wide, and in blocks of every kind."""
    d, out, spectrum = 12, 6, spectrum_of()
    s = spectrum.eigenvalues
    metric = {
        "cut": lambda: null_space_metric(spectrum, 0.5, l2=0.1),
        "cut, other side": lambda: null_space_metric(spectrum, float(s[2]), l2=0.1),
        "slope": lambda: spectrum.preconditioner(1 / (1 + s)),
        "wide": lambda: spectrum.preconditioner(1 / s.clamp_min(1e-4 * float(s[-1]))),
    }[kind]()
    monkeypatch.setattr(solve_module, "BLOCK", 4)
    W, remaining = draw(out, d, seed=5), RecursiveState(metric)
    K, V = draw(d, sum(sizes)), draw(out, sum(sizes), seed=3)
    total, done = torch.zeros_like(W), 0
    for n in sizes:
        new = slice(done, done + n)
        update, remaining = remaining.write(K[:, new], V[:, new] - (W + total) @ K[:, new])
        total, done = total + update, done + n
        joint = solve_update(K[:, :done], V[:, :done] - W @ K[:, :done], metric)
        assert (total - joint).norm() < 1e-10 * joint.norm()
        assert remaining.taken == pytest.approx((1 - room_left(metric, K[:, :done])) * metric.rank)
    assert (remaining.dense is not None) == (done > len(metric.coordinates(K)))


@pytest.mark.parametrize(("free", "m"), [(4, 4), (8, 12)])
def test_coordinates_are_along_a_null_space_that_is_the_thinner_side(free, m):
    spectrum, K = spectrum_of(), draw(12, 3)
    threshold = float(spectrum.eigenvalues[free])
    metric = null_space_metric(spectrum, threshold, l2=0.1)
    inside = metric.coordinates(K)
    assert inside.shape == (m, 3)
    kept = dense_projector(spectrum, threshold) @ K if m == free else K
    torch.testing.assert_close(metric.expand(inside), kept)
    torch.testing.assert_close(metric.coordinates(kept), inside)


def test_spectrum_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        Spectrum.of(torch.full((3, 3), math.nan))
