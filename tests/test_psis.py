"""Pareto-smoothed weights against ArviZ, known tails and hand-made corner cases."""

import importlib
import math
import warnings

import pytest
import torch
from torch.distributions import Normal, Pareto, StudentT

from pyrogen.evaluation import effective_sample_size, khat_threshold, psis

LAWS = {
    "light": lambda shape: torch.randn(shape, dtype=torch.float64),
    "heavy": lambda shape: 3 * torch.randn(shape, dtype=torch.float64),
    "cauchy": lambda shape: StudentT(1.0).sample(shape).double(),
    "bounded": lambda shape: torch.rand(shape, dtype=torch.float64).log(),
    "underflowing": lambda shape: 100 * torch.randn(shape, dtype=torch.float64),
    "half zero": lambda shape: (
        torch.randn(shape).double().masked_fill(torch.rand(shape) < 0.5, -torch.inf)
    ),
}


def arviz_psis(log_weights):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz

        smooth, khat = arviz.psislw(log_weights.numpy().copy())
    return torch.as_tensor(smooth), torch.as_tensor(khat)


@pytest.mark.parametrize("draws", [5, 21, 100, 1000, 4000])
@pytest.mark.parametrize("law", LAWS)
def test_agrees_with_arviz(law, draws):
    log_weights = LAWS[law]((5, draws))
    smooth, khat = psis(log_weights)
    expected, expected_khat = arviz_psis(log_weights)
    assert torch.allclose(smooth.exp(), expected.exp(), rtol=0, atol=1e-10)
    assert torch.equal(khat.isinf(), expected_khat.isinf())
    finite = khat.isfinite()
    assert torch.allclose(khat[finite], expected_khat[finite], atol=1e-8)


def test_agrees_with_arviz_on_ties_up_to_which_tied_draw_gets_what():
    log_weights = torch.randn(4, 1000, dtype=torch.float64).mul(4).round()
    smooth, khat = psis(log_weights)
    expected, expected_khat = arviz_psis(log_weights)
    assert torch.allclose(khat, expected_khat)
    assert torch.allclose(smooth.sort().values, expected.sort().values)


@pytest.mark.parametrize("k", [0.3, 0.6, 0.9])
def test_khat_is_the_shape_of_a_pareto_tail(k):
    """The prior draws k towards 1/2 by 10 in 509; a fit has a standard error of (1 + k)/22."""
    log_weights = Pareto(1.0, 1 / k).sample((50, 28_500)).double().log()
    khat = psis(log_weights)[1]
    n = 507
    expected = (n * k + 5) / (n + 10)
    assert (khat.mean() - expected).abs() < 5 * (1 + k) / n**0.5 / 50**0.5 + 0.01


def test_khat_of_a_gaussian_proposal_orders_its_widths():
    z = torch.randn(4000)
    khat = [
        psis(Normal(0.0, 1.0).log_prob(s * z) - Normal(0.0, s).log_prob(s * z))[1]
        for s in (1.2, 0.8, 0.5)
    ]
    assert khat[0] < 0.1 < khat[1] < 0.7 < khat[2]


def test_smoothing_lowers_the_error_of_an_estimate():
    """E[w] z^2 under N(0, 1) by a proposal N(0, 0.7), whose weights have k = 0.51."""
    z = 0.7 * torch.randn(400, 1000, dtype=torch.float64)
    log_weights = Normal(0.0, 1.0).log_prob(z) - Normal(0.0, 0.7).log_prob(z)
    error = [
        ((w * z.square()).sum(1) - 1).square().mean()
        for w in (log_weights.softmax(1), psis(log_weights)[0].exp())
    ]
    assert error[1] < error[0]


def test_smoothed_weights_keep_order_and_never_exceed_the_largest_raw_weight():
    log_weights = 3 * torch.randn(3, 500, dtype=torch.float64)
    smooth = psis(log_weights)[0]
    assert torch.equal(smooth.argsort(1), log_weights.argsort(1)) or torch.all(
        smooth.gather(1, log_weights.argsort(1)).diff(dim=1) >= 0
    )
    assert torch.allclose(smooth.logsumexp(1), torch.zeros(3).double(), atol=1e-12)
    body = log_weights.argsort(1)[:, :1]
    ratio = smooth.amax(1, keepdim=True) - smooth.gather(1, body)
    raw = log_weights.amax(1, keepdim=True) - log_weights.gather(1, body)
    assert torch.all(ratio <= raw + 1e-9)


def test_rows_do_not_see_each_other(monkeypatch):
    log_weights = torch.randn(2, 3, 200).masked_fill(torch.rand(2, 3, 200) < 0.9, -torch.inf)
    log_weights[0] = torch.randn(3, 200)
    smooth, khat = psis(log_weights)
    assert smooth.shape == (2, 3, 200)
    assert khat.shape == (2, 3)
    assert torch.allclose(smooth[1, 2], psis(log_weights[1, 2])[0])
    monkeypatch.setattr(importlib.import_module("pyrogen.evaluation.psis"), "ROWS", 2)
    assert torch.allclose(psis(log_weights)[1], khat)


def test_a_constant_in_log_weights_changes_nothing():
    log_weights = 2 * torch.randn(300, dtype=torch.float64)
    smooth, khat = psis(log_weights + 1e4)
    assert torch.allclose(smooth, psis(log_weights)[0], atol=1e-8)
    assert torch.allclose(khat, psis(log_weights)[1], atol=1e-8)


def test_equal_weights_have_no_tail():
    log_weights, khat = psis(torch.full((500,), -1000.0))
    assert khat == -torch.inf
    assert torch.allclose(log_weights.exp(), torch.full((500,), 1 / 500))


def test_rounding_of_equal_weights_is_not_a_tail():
    assert psis(-3 + 1e-6 * torch.randn(4000))[1] < 0.5


def test_the_scale_of_tiny_differences_does_not_matter():
    differences = torch.randn(1000, dtype=torch.float64)
    expected = psis(1e-6 * differences)[1]
    assert torch.allclose(psis(1e-18 * differences)[1], expected, atol=1e-4)


def test_float32_weights_are_smoothed_in_float64():
    log_weights = 3 * torch.randn(4, 1000)
    smooth, khat = psis(log_weights)
    exact, exact_khat = psis(log_weights.double())
    assert torch.equal(smooth, exact.float())
    assert torch.equal(khat, exact_khat.float())


def test_one_draw_that_holds_all_the_weight_is_not_trusted():
    log_weights = torch.zeros(1000)
    log_weights[3] = 100.0
    smooth, khat = psis(log_weights)
    assert khat == torch.inf
    assert smooth[3] == 0.0


def test_few_draws_are_normalised_only():
    log_weights = torch.randn(20)
    smooth, khat = psis(log_weights)
    assert khat == torch.inf
    assert torch.allclose(smooth, log_weights.log_softmax(0))
    assert psis(torch.randn(21))[1].isfinite()
    assert torch.equal(psis(torch.tensor([-3.0]))[0], torch.zeros(1))


def test_zero_weights_stay_zero():
    log_weights = torch.randn(200)
    log_weights[::2] = -torch.inf
    smooth, khat = psis(log_weights)
    assert torch.equal(smooth[::2].exp(), torch.zeros(100))
    assert khat.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_no_gradient_flows(dtype):
    log_weights = torch.randn(100, dtype=dtype, requires_grad=True)
    before = log_weights.detach().clone()
    for result in (*psis(log_weights), effective_sample_size(log_weights)):
        assert result.dtype == dtype
        assert not result.requires_grad
    assert torch.equal(log_weights.detach(), before)


def test_effective_sample_size_is_its_formula():
    w = torch.rand(3, 50, dtype=torch.float64)
    expected = w.sum(1).square() / w.square().sum(1)
    assert torch.allclose(effective_sample_size(w.log() - 800), expected)
    assert effective_sample_size(torch.zeros(7)) == 7


def test_threshold_grows_to_seven_tenths():
    assert khat_threshold(1000) == pytest.approx(1 - 1 / 3)
    assert khat_threshold(2154) < 0.7 == khat_threshold(2155)
    assert math.isclose(khat_threshold(10), 0.0, abs_tol=1e-12)
    with pytest.raises(ValueError, match="draws >= 2, got 1"):
        khat_threshold(1)


@pytest.mark.parametrize("door", [psis, effective_sample_size])
@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.tensor([0.0, torch.nan]), ValueError, "below infinity, got NaN or inf"),
        (torch.tensor([0.0, torch.inf]), ValueError, "below infinity, got NaN or inf"),
        (torch.full((2, 3), -torch.inf), ValueError, "only zeros"),
        (torch.zeros(3).long(), TypeError, "floating-point"),
        ([0.0], TypeError, "expected a tensor, got list"),
        (torch.tensor(0.0), ValueError, "expected a batch"),
        (torch.zeros(0), ValueError, "at least 1 data, got 0"),
    ],
)
def test_bad_weights_are_refused(door, weights, error, message):
    with pytest.raises(error, match=message) as refusal:
        door(weights)
    assert door.__name__ in str(refusal.value)
