"""Convex and closed-form heads against scikit-learn, float64 and their own definitions."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from pipeline.linear import logistic
from pipeline.linear.logistic import Objective, Standardised, logistic_regression
from pipeline.linear.moments import class_moments
from pipeline.rebalance.methods import linear_families
from pipeline.rebalance.methods.adjustment import adjusted, mean_directions, with_directions
from pipeline.rebalance.methods.api import Stage1
from pipeline.rebalance.methods.discriminant import gaussian_discriminants, with_prior
from pipeline.rebalance.methods.ensemble import (
    balanced_nll,
    fold,
    stacking_shares,
    temperature,
)
from pipeline.rebalance.methods.linear_families import LINEAR_FAMILIES

COUNTS = np.array([120, 60, 25, 12, 6, 3])
CLASSES, WIDTH = len(COUNTS), 9


def labelled_features(seed=0, dtype=np.float64):
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(CLASSES), COUNTS))
    centres = np.random.default_rng(9).normal(size=(CLASSES, WIDTH))
    x = np.abs(centres[labels] + 0.7 * random.normal(size=(len(labels), WIDTH))) * np.logspace(-1, 1, WIDTH)
    x[:, 3] = 2.5  # a constant feature
    x[:, 5] = 0.0  # a dead one
    return torch.tensor(x.astype(dtype)), torch.tensor(labels)


def in_blocks(x, y, rows=50):
    return lambda: iter(list(zip(x.split(rows), y.split(rows), strict=True)))


X, Y = labelled_features()
N = torch.tensor(COUNTS, dtype=torch.float64)


def standardised(x):
    scale = x.std(0, unbiased=False)
    return ((x - x.mean(0)) / torch.where(scale > 1e-9, scale, 1.0)).numpy(), torch.where(scale > 1e-9, scale, 1.0)


@pytest.mark.parametrize("resident", [True, False])
def test_every_optimum_is_that_of_scikit_learn(resident):
    rhos, l2s = (0.0, 0.5, 1.0), (1e-3, 1.0, 0.03)
    ours = logistic_regression(
        in_blocks(X, Y),
        N,
        WIDTH,
        rhos=rhos,
        l2s=l2s,
        prior=False,
        tolerance=1e-9,
        dtype=torch.float64,
        resident=resident,
    )
    z, scale = standardised(X)
    for i, rho in enumerate(rhos):
        weight = COUNTS[Y] ** -rho
        weight = weight / weight.mean()
        for j, l2 in enumerate(l2s):
            model = LogisticRegression(C=1 / (l2 * len(Y)), tol=1e-10, max_iter=100_000).fit(z, Y, sample_weight=weight)
            reached = ours.weight[i, j] * scale
            assert torch.dist(reached, torch.tensor(model.coef_)) < 1e-4 * np.linalg.norm(model.coef_)
            logits = X @ ours.weight[i, j].T + ours.bias[i, j]
            np.testing.assert_allclose(logits.softmax(1), model.predict_proba(z), atol=1e-5)
            assert ours.weight[i, j][:, [3, 5]].abs().max() < 1e-12
    assert ours.gradient.max() <= 1e-9


def test_the_prior_in_the_loss_shifts_the_bias_alone():
    head = logistic_regression(in_blocks(X, Y), N, WIDTH, rhos=(0.3,), l2s=(0.1,), tolerance=1e-10, dtype=torch.float64)
    weight, bias = head.weight[0, 0].requires_grad_(), head.bias[0, 0].requires_grad_()
    scale, log_prior = standardised(X)[1], (N / N.sum()).log()
    w = N.double()[Y] ** -0.3
    each = torch.nn.functional.cross_entropy(X @ weight.T + bias + 0.7 * log_prior, Y, reduction="none")
    loss = (w * each).sum() / w.sum() + 0.05 * (weight * scale).square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-8


def test_gradient_product_and_preconditioner_are_those_of_autograd(monkeypatch):
    moments = class_moments(in_blocks(X, Y), N, WIDTH)
    share = torch.stack([torch.ones(CLASSES), 1 / N]).double()
    share /= (share * N).sum(1, keepdim=True)
    theta = 0.3 * torch.randn(2, CLASSES, WIDTH + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = (X - moments.mean) / moments.scale
    settings = torch.arange(2)
    for resident, cached_bytes in ((True, 1 << 30), (True, 3000), (False, 0)):
        data = Standardised(in_blocks(X, Y), moments, torch.float64, torch.float64, resident=resident)
        rotated = z @ data.axes

        def loss(t, rotated=rotated):
            each = (rotated @ t[..., :-1].mT + t[:, None, :, -1]).log_softmax(2)
            fit = -(share[:, Y] * each[:, torch.arange(len(Y)), Y]).sum()
            return fit + 0.05 * t[..., :-1].square().sum()

        objective = Objective(data, share, lambda t: t, cached_bytes)
        point = objective.at(theta, 0.1, settings)
        gradient = torch.func.grad(loss)(theta)
        torch.testing.assert_close(point.loss.sum(), loss(theta))
        torch.testing.assert_close(point.gradient, gradient)
        hessian = torch.autograd.functional.hessian(loss, theta).reshape(theta.numel(), -1)
        product = (hessian @ gradient.flatten()).view_as(theta)
        torch.testing.assert_close(objective.product(gradient, 0.1, point, fast=True), product)
        blocks = hessian.view(2, CLASSES, WIDTH + 1, 2, CLASSES, WIDTH + 1)
        blocks = torch.stack([torch.stack([blocks[s, c, :, s, c] for c in range(CLASSES)]) for s in range(2)])
        for most in (7, len(Y)):
            monkeypatch.setattr(logistic, "SAMPLES", most)
            preconditioner = objective.preconditioner(0.1, point)
            units = torch.eye(WIDTH + 1, dtype=torch.float64).expand(2, CLASSES, -1, -1)
            approximate = torch.stack([preconditioner(unit) for unit in units.unbind(2)], 3).inverse()
            diagonal = blocks.diagonal(dim1=2, dim2=3)
            if most == len(
                Y
            ):  # every sample stands exactly, but the bias has no penalty: the preconditioner adds a small one
                approximate[..., -1, -1] -= 0.01 * diagonal[..., -1]
                torch.testing.assert_close(approximate, blocks)
            else:
                torch.testing.assert_close(approximate.diagonal(dim1=2, dim2=3), diagonal)
                assert (torch.linalg.eigvalsh(approximate) > 0).all()


def test_single_precision_with_bfloat16_products_reaches_the_same_optimum():
    settings = {"rhos": (0.0, 1.0), "l2s": (0.1, 1e-3)}
    exact = logistic_regression(in_blocks(X, Y), N, WIDTH, tolerance=1e-9, dtype=torch.float64, **settings)
    low = logistic_regression(
        in_blocks(X.float(), Y), N, WIDTH, tolerance=1e-6, product_dtype=torch.bfloat16, **settings
    )
    assert torch.dist(low.weight, exact.weight) < 1e-4 * exact.weight.norm()


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("split", [180, 0])
def test_two_ranks_solve_what_one_does(split, resident):
    """Rows are split between two ranks; with a split of 0 one of them has none."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    barrier, slots = Barrier(2), [None, None]
    settings = {"rhos": (0.5,), "l2s": (0.1, 0.01), "dtype": torch.float64, "tolerance": 1e-7}

    def rank(i):
        def reduce(tensor):
            slots[i] = tensor
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        rows = (slice(0, split), slice(split, None))[i]
        samples = in_blocks(X[rows], Y[rows])
        return logistic_regression(samples, N, WIDTH, resident=resident, reduce=reduce, **settings)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2))
    alone = logistic_regression(in_blocks(X, Y), N, WIDTH, **settings)
    assert torch.equal(first.weight, second.weight)
    torch.testing.assert_close(first.weight, alone.weight, rtol=1e-4, atol=1e-5)


def test_a_class_without_samples_is_refused():
    with pytest.raises(ValueError, match="class 1 has no sample"):
        logistic_regression(in_blocks(X, Y), torch.tensor([3, 0]), WIDTH)


def test_moments_are_those_of_numpy_around_a_far_mean():
    far = X + 1000.0
    moments = class_moments(in_blocks(far, Y), N, WIDTH)
    covariances = [np.cov(far[c == Y].numpy().T, bias=True) for c in range(CLASSES)]
    np.testing.assert_allclose(moments.mean, far.mean(0))
    np.testing.assert_allclose(moments.total, np.cov(far.numpy().T, bias=True), atol=1e-8)
    np.testing.assert_allclose(moments.within, np.average(covariances, axis=0, weights=COUNTS), atol=1e-8)
    np.testing.assert_allclose(moments.within_by_class, np.mean(covariances, axis=0), atol=1e-8)
    assert moments.scale[3] == moments.scale[5] == 1


def test_a_discriminant_is_scikit_learns_without_shrinkage_and_the_formula_with_it():
    z, _ = standardised(X)
    alive = [i for i in range(WIDTH) if i not in (3, 5)]
    moments = class_moments(in_blocks(X[:, alive], Y), N, len(alive))
    weight, bias = gaussian_discriminants(moments, shrinkages=(0.0, 0.3))
    logits = torch.einsum("nd,acd->anc", X[:, alive], weight) + with_prior(bias, N, 1.0)[:, None]
    model = LinearDiscriminantAnalysis(solver="lsqr").fit(z[:, alive], Y)
    np.testing.assert_allclose(logits[0].softmax(1), model.predict_proba(z[:, alive]), atol=1e-9)
    covariance = 0.7 * model.covariance_ + 0.3 * np.trace(model.covariance_) / len(alive) * np.eye(len(alive))
    solved = np.linalg.solve(covariance, model.means_.T)
    expected = z[:, alive] @ solved - 0.5 * np.diag(model.means_ @ solved) + np.log(COUNTS / COUNTS.sum())
    np.testing.assert_allclose(logits[1].softmax(1), torch.tensor(expected).softmax(1), atol=1e-9)


def test_a_discriminant_survives_dead_features_and_takes_classes_alike_when_told():
    moments = class_moments(in_blocks(X, Y), N, WIDTH)
    by_image, by_class = (gaussian_discriminants(moments, by_class=b, shrinkages=(0.0, 0.1)) for b in (False, True))
    for weight, bias in (by_image, by_class):
        assert weight.isfinite().all()
        assert bias.isfinite().all()
        assert weight[..., [3, 5]].abs().max() < 1e-8
    assert not torch.allclose(by_image[0], by_class[0])


def test_adjustment_and_means_are_linear_and_decide_like_the_cosine():
    torch.testing.assert_close(adjusted(torch.zeros(6), N, 2.0), -2 * (N / N.sum()).log())
    moments = class_moments(in_blocks(X, Y), N, WIDTH)
    weight, bias = mean_directions(in_blocks(X, Y), moments)
    unit = torch.nn.functional.normalize(X - X.mean(0), dim=1)
    centres = torch.stack([unit[c == Y].mean(0) for c in range(CLASSES)])
    cosine = unit @ torch.nn.functional.normalize(centres, dim=1).T
    assert torch.equal((X @ weight.T + bias).argmax(1), cosine.argmax(1))
    head = torch.full((CLASSES, WIDTH), 2 / 3, dtype=torch.float64), torch.ones(CLASSES, dtype=torch.float64)
    mixed = with_directions(*head, (weight, bias), 0.5)  # rows of norm 2
    torch.testing.assert_close(X @ mixed[0].T + mixed[1], X @ head[0].T + head[1] + X @ weight.T + bias)


def test_the_temperature_minimises_the_balanced_likelihood():
    logits = 3 * torch.randn(200, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.where(torch.arange(200) % 3 == 0, logits.argmax(1), torch.arange(200) % CLASSES)
    best = temperature(logits, labels)
    losses = {t: balanced_nll(logits, labels, 1 / t) for t in (best * 0.98, best, best * 1.02)}
    assert min(losses, key=losses.get) == best
    for factor in (1e-2, 10, 30):
        assert temperature(factor * logits, labels) == pytest.approx(factor * best, rel=1e-4)
    right = torch.nn.functional.one_hot(labels, CLASSES).double()
    assert 1e-3 <= temperature(right, labels) < 0.05  # nothing limits the confidence of a perfect head


def test_an_ensemble_is_one_layer_with_the_mean_of_its_members_logits():
    generator = torch.Generator().manual_seed(2)
    members = [
        (torch.randn(6, 9, generator=generator).double(), torch.randn(6, generator=generator).double()) for _ in "abc"
    ]
    weight, bias = fold(members, (1.0, 2.0, 4.0), (1.0, 1.0, 2.0))
    logits = sum(a / t * (X @ w.T + b) for (w, b), t, a in zip(members, (1, 2, 4), (0.25, 0.25, 0.5), strict=True))
    torch.testing.assert_close((X @ weight.T + bias).softmax(1), logits.softmax(1))
    assert weight.mean(0).abs().max() < 1e-12


def test_a_far_start_is_no_stall():
    """From all-zero class vectors the gradient first grows while the loss falls, on wide features with many classes."""
    random = np.random.default_rng(3)
    counts = torch.tensor(np.geomspace(200, 2, 40).astype(int), dtype=torch.float64)
    labels = torch.tensor(np.repeat(np.arange(40), counts.numpy().astype(int)))
    x = torch.tensor(np.maximum(random.normal(size=(40, 200))[labels] + random.normal(size=(len(labels), 200)), 0))
    head = logistic_regression(
        in_blocks(x, labels, 512), counts, 200, l2s=(0.2, 1e-4), tolerance=1e-7, dtype=torch.float64
    )
    assert head.gradient.max() <= 1e-7


def test_every_family_gives_the_heads_of_its_grid_in_order(monkeypatch):
    """A grid solved together gives at each point the head that the point alone gives."""
    monkeypatch.setattr(linear_families, "TOLERANCE", 1e-6)
    stage1 = Stage1(N, torch.ones(CLASSES, WIDTH, dtype=torch.float64), torch.zeros(CLASSES, dtype=torch.float64))
    for rule in LINEAR_FAMILIES:
        grid = [rule.grid[-1], rule.grid[0], rule.grid[len(rule.grid) // 2]]
        together = rule.layers(stage1, in_blocks(X, Y), grid)
        for values, (weight, bias) in zip(grid, together, strict=True):
            [(alone_weight, alone_bias)] = rule.layers(stage1, in_blocks(X, Y), [values])
            # the solver stops at a gradient of 1e-6, which leaves 1e-6 / l2 = 2e-3 at the smallest l2 of 5e-4
            assert (weight - alone_weight).norm() < 1e-2 * alone_weight.norm(), rule.name
            difference = bias - alone_bias
            difference -= difference.mean()  # softmax does not see what all classes share
            assert difference.norm() < 1e-2 * (1 + alone_bias.norm()), rule.name


def test_stacking_prefers_the_better_member_and_its_prior_equal_shares():
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(120) % 6
    noise = torch.randn(2, 120, 6, generator=generator, dtype=torch.float64)
    logits = 2 * torch.nn.functional.one_hot(labels, 6) + noise * torch.tensor([0.5, 3.0])[:, None, None]
    shares = stacking_shares(logits, labels, pseudo_samples=1)
    assert shares[0] > 0.8
    assert shares.sum() == pytest.approx(1)
    torch.testing.assert_close(
        stacking_shares(logits, labels, pseudo_samples=1e6), torch.full((2,), 0.5).double(), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        stacking_shares(logits.flip(0), labels, pseudo_samples=1), shares.flip(0), atol=1e-4, rtol=0
    )
