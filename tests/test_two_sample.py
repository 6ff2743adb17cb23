"""Level, power and corner cases of the two-sample tests."""

import dataclasses
import math

import pytest
import torch
from sklearn.datasets import load_digits

from pyrogen.divergences import Gaussian, Laplace, Polynomial, mmd
from pyrogen.evaluation import classifier_test, mmd_test, two_sample


def blobs(n, ratio):
    """Grid of 25 Gaussians at spacing 10, with the given ratio of eigenvalues."""
    r = (ratio - 1) / (ratio + 1)
    factor = torch.linalg.cholesky(torch.tensor([[1.0, r], [r, 1.0]]))
    return 10.0 * torch.randint(5, (n, 2)) + torch.randn(n, 2) @ factor.T


def median_test(x, y):
    width = torch.pdist(torch.cat([x, y])).median().item()
    return mmd_test(x, y, permutations=99, kernels=[Gaussian(width)])


@pytest.mark.parametrize("kernel", [Gaussian(1.0), Polynomial(2)], ids=["gaussian", "square"])
def test_statistic_is_the_standardised_mmd(kernel):
    """With one kernel, permuted statistics are the MMD of permuted sets."""
    x, y = torch.randn(8, 2).double(), torch.randn(5, 2).double() + 0.5
    torch.manual_seed(3)
    verdict = mmd_test(x, y, permutations=2000, kernels=[kernel])
    pooled = torch.cat([x, y])
    null = torch.stack(
        [mmd(*pooled[torch.randperm(13)].split([8, 5]), kernel) for _ in range(2000)]
    )
    expected = (mmd(x, y, kernel) - null.mean()) / null.std()
    assert verdict.statistic == pytest.approx(expected.item(), rel=0.1)
    assert abs(verdict.p_value - (null >= mmd(x, y, kernel)).double().mean()) < 0.05


def test_p_value_counts_the_observed_labels():
    """At the largest statistic p is 1 / (1 + B), never 0."""
    assert mmd_test(torch.zeros(20, 1), torch.ones(20, 1), permutations=19).p_value == 0.05
    verdict = classifier_test(torch.zeros(20, 1), torch.ones(20, 1), permutations=19)
    assert (verdict.accuracy, verdict.auc, verdict.p_value) == (1.0, 1.0, 0.05)
    assert verdict.interval[1] == pytest.approx(1.0)


def test_ties_count_against_rejection():
    """Two against two: 2 of the 6 splits separate them, so p tends to 1/3 and never below."""
    x, y = torch.tensor([[0.0], [0.1]]), torch.tensor([[5.0], [5.1]])
    verdict = mmd_test(x, y, permutations=6000)
    assert abs(verdict.p_value - 1 / 3) < 5 * math.sqrt(2 / 9 / 6000)


@pytest.mark.parametrize("test", [mmd_test, classifier_test])
def test_identical_draws_are_never_told_apart(test):
    verdict = test(torch.ones(20, 3), torch.ones(30, 3), permutations=19)
    assert verdict.p_value == 1.0


def test_identical_draws_give_an_accuracy_of_a_half():
    verdict = classifier_test(torch.ones(23, 3), torch.ones(31, 3), permutations=19)
    assert (verdict.accuracy, verdict.auc) == (0.5, 0.5)


@pytest.mark.parametrize("test", [mmd_test, classifier_test])
@pytest.mark.parametrize(
    "draw",
    [
        lambda n: torch.randn(n, 3),
        lambda n: torch.randint(3, (n, 3)).float(),  # ties
        lambda n: torch.randn(n, 1).div(torch.rand(n, 1).square()),  # heavy tails
    ],
    ids=["gaussian", "ties", "heavy"],
)
def test_level_holds_under_the_null(test, draw):
    """Rejections at 5 % are at most Binomial(200, 0.05); above 21 once in 4000 seeds."""
    rejections = [test(draw(15), draw(25), permutations=19).p_value <= 0.05 for _ in range(200)]
    assert sum(rejections) <= 21
    assert sum(rejections) >= 1  # a test that never rejects has no use; once in 10 000 seeds


@pytest.mark.slow
@pytest.mark.parametrize("test", [mmd_test, classifier_test])
def test_level_holds_over_two_thousand_nulls(test):
    """0.05 plus or minus four standard errors of 0.0049: fails once in 16 000 seeds.

    A test of discrete accuracies may fall below.
    """
    p = [
        test(torch.randn(30, 2), torch.randn(30, 2), permutations=99).p_value for _ in range(2000)
    ]
    size = sum(value <= 0.05 for value in p) / len(p)
    assert 0.02 < size < 0.05 + 4 * 0.0049


@pytest.mark.slow
def test_accuracy_interval_covers_a_half_under_the_null():
    """95 % of the time; 400 nulls, and four standard errors of 0.011 below."""
    covered = []
    for _ in range(400):
        low, high = classifier_test(
            torch.randn(40, 4), torch.randn(60, 4), permutations=99
        ).interval
        covered.append(low <= 0.5 <= high)
    assert sum(covered) / len(covered) > 0.95 - 4 * 0.011


def test_accuracy_of_a_shift_is_near_the_bayes_rate():
    """Two unit Gaussians at distance 2: at best accuracy Phi(1), AUC Phi(sqrt 2)."""
    verdict = classifier_test(torch.randn(500, 2), torch.randn(500, 2) + 2**0.5, permutations=99)
    assert abs(verdict.accuracy - 0.8413) < 0.04
    assert abs(verdict.auc - 0.9214) < 0.03
    assert verdict.interval[0] < 0.8413 < verdict.interval[1]
    assert verdict.p_value == 0.01


def test_sizes_do_not_move_the_threshold():
    """Balanced accuracy of unequal sets; always naming the larger would give 0.5."""
    verdict = classifier_test(torch.randn(60, 2), torch.randn(600, 2) + 2**0.5, permutations=99)
    assert verdict.accuracy > 0.75
    assert verdict.sizes == (60, 600)


def test_classifier_sees_one_feature_among_many():
    """Where kernels of all features at once are nearly blind."""
    x, y = torch.randn(300, 20), torch.randn(300, 20)
    y[:, 3] *= 3
    assert classifier_test(x, y, permutations=199).p_value == 0.005


def test_classifier_sees_interplay_with_equal_margins():
    x = torch.randn(300, 3)
    y = torch.randn(300, 3)
    y[:, 1] = 0.9 * y[:, 0] + math.sqrt(1 - 0.81) * y[:, 1]
    assert classifier_test(x, y, permutations=199).p_value == 0.005


def test_draws_of_gaussians_are_told_from_real_images():
    """64 pixels against a rounded Gaussian of the same moments; random forests get 0.96."""
    images = torch.tensor(load_digits().data).float()[torch.randperm(1797)]
    rest = images[360:]
    values, vectors = torch.linalg.eigh(torch.cov(rest.T))
    noise = torch.randn(360, 64) * values.clamp_min(0).sqrt()
    fake = (rest.mean(0) + noise @ vectors.T).round().clamp(0, 16)
    verdict = classifier_test(images[:360], fake, permutations=99)
    assert verdict.accuracy > 0.94
    assert verdict.interval[0] > 0.9


def test_pooled_units_have_unit_variance_and_no_constants():
    x = torch.randn(30, 3) * torch.tensor([1.0, 1e-30, 1e30]) + torch.tensor([1e3, 0.0, 0.0])
    x = torch.cat([x, torch.full((30, 1), 1e20)], 1)
    z = two_sample.pooled_units(x[:10], x[10:])
    assert torch.allclose(z.square().mean(0), torch.ones(3).double())
    assert torch.allclose(z.mean(0), torch.zeros(3).double(), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_mmd_test_needs_no_units(scale):
    x, y = torch.randn(100, 2), torch.randn(100, 2) + 0.7
    units = torch.tensor([scale, 1.0])
    torch.manual_seed(1)
    p = mmd_test(x, y, permutations=99)
    torch.manual_seed(1)
    scaled = mmd_test(x * units, y * units, permutations=99)
    assert scaled.statistic == pytest.approx(p.statistic, rel=1e-3)
    assert p.p_value == 0.01


def test_blobs_are_told_apart_where_the_median_width_is_blind():
    """Ratio 10, 300 draws: aggregated widths reject, the median width is at its level."""
    verdicts = [(blobs(300, 1), blobs(300, 10)) for _ in range(5)]
    aggregated = [mmd_test(x, y, permutations=99).p_value <= 0.1 for x, y in verdicts]
    median = [median_test(x, y).p_value <= 0.1 for x, y in verdicts]
    assert sum(aggregated) >= 4
    assert sum(median) <= 2


@pytest.mark.slow
def test_power_on_blobs():
    """Ratio 6, 500 draws: the best single width rejects 90 %, the median width 5 %."""
    pairs = [(blobs(500, 1), blobs(500, 6)) for _ in range(12)]
    assert sum(mmd_test(x, y, permutations=99).p_value <= 0.1 for x, y in pairs) >= 7
    assert sum(median_test(x, y).p_value <= 0.1 for x, y in pairs) <= 5


@pytest.mark.parametrize("test", [mmd_test, classifier_test])
def test_same_seed_gives_the_same_verdict(test):
    x, y = torch.randn(30, 2), torch.randn(30, 2) + 0.2
    torch.manual_seed(5)
    first = test(x, y, permutations=99)
    torch.manual_seed(5)
    assert test(x, y, permutations=99) == first
    torch.manual_seed(5)
    assert test(x.double(), y.double(), permutations=99).p_value == first.p_value


@pytest.mark.parametrize("test", [mmd_test, classifier_test])
def test_constant_features_and_event_shapes_do_not_matter(test):
    x, y = torch.randn(30, 4), torch.randn(30, 4) + 0.3
    torch.manual_seed(5)
    first = test(x, y, permutations=99)
    padded = [torch.cat([s, torch.full((30, 2), 7.0)], 1).reshape(30, 2, 3) for s in (x, y)]
    torch.manual_seed(5)
    again = test(*padded, permutations=99)
    assert again.p_value == first.p_value
    assert str(again) == str(first)


def test_gradients_are_not_kept():
    x = torch.randn(30, 2, requires_grad=True)
    mmd_test(x, x.detach() + 1, permutations=19)
    classifier_test(x, x.detach() + 1, permutations=19)
    assert x.grad is None


def test_folds_are_stratified_and_permutations_stay_inside_them():
    fold = two_sample.stratified_folds(50, 25, 5)
    assert torch.equal(fold[:50].bincount(), torch.full((5,), 10))
    assert torch.equal(fold[50:].bincount(), torch.full((5,), 5))
    label = torch.cat([torch.ones(50), torch.zeros(25)])
    labels = two_sample.permuted_labels(label, fold, 300)
    assert torch.equal(labels[:, 0], label)
    for k in range(5):
        assert torch.equal(labels[fold == k].sum(0), torch.full((301,), 10.0))
    assert torch.all((labels[:, 1:].mean(1) - 2 / 3).abs() < 5 * math.sqrt(2 / 9 / 300))


def test_scores_come_from_the_other_folds_only():
    """Changing the labels of a fold must not change that fold's own scores."""
    z, fold = torch.randn(40, 2, dtype=torch.float64), torch.arange(40) % 4
    target = torch.randn(40, 1, dtype=torch.float64)
    changed = torch.where(fold[:, None] == 2, -target, target)
    before, after = (two_sample.held_out_scores(z, t, fold) for t in (target, changed))
    assert torch.equal(before[fold == 2], after[fold == 2])
    assert not torch.allclose(before[fold == 1], after[fold == 1])


def test_verdicts_read_as_sentences_and_are_frozen():
    verdict = mmd_test(torch.randn(20, 2), torch.randn(30, 2) + 5, permutations=19)
    assert str(verdict).startswith("MMD test of 20 against 30 draws: statistic ")
    assert str(verdict).endswith("p = 0.05 (19 permutations)")
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.p_value = 0.0
    verdict = classifier_test(torch.randn(20, 2), torch.randn(30, 2) + 9, permutations=19)
    assert str(verdict).startswith("Classifier test of 20 against 30 draws: accuracy 1.000 [0.")
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.p_value = 0.0


@pytest.mark.parametrize("test", [mmd_test, classifier_test])
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.ones(9, 2), torch.ones(9, 3), ValueError, r"got \(9, 3\)"),
        (torch.ones(9, 2), torch.ones(9, 2).double(), ValueError, "one dtype and device"),
        (torch.ones(9, 2).int(), torch.ones(9, 2), TypeError, "floating-point data"),
        (torch.full((9, 2), torch.nan), torch.ones(9, 2), ValueError, "18 NaN"),
        (torch.ones(9, 2), torch.ones(1, 2), ValueError, "needs at least . data, got 1"),
    ],
)
def test_bad_sets_are_refused(test, x, y, error, message):
    with pytest.raises(error, match=message) as refusal:
        test(x, y)
    assert test.__name__ in str(refusal.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: mmd_test(x, x, permutations=18), "permutations >= 19, got 18"),
        (lambda x: classifier_test(x, x, permutations=0), "permutations >= 19, got 0"),
        (lambda x: mmd_test(x, x, kernels=[]), "expected kernels, got none"),
        (lambda x: classifier_test(x, x, folds=1), "folds >= 2, got 1"),
        (lambda x: classifier_test(x, x, folds=10), "needs at least 10 data, got 9"),
    ],
)
def test_bad_choices_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(9, 2))


def test_kernels_can_be_chosen():
    x, y = torch.randn(50, 2), torch.randn(50, 2) + 2
    assert mmd_test(x, y, permutations=19, kernels=[Gaussian(1.0), Laplace(1.0)]).p_value == 0.05


def test_draws_that_no_permutation_tells_apart_are_a_tie():
    x = torch.eye(30)[torch.randperm(30)]
    verdict = mmd_test(x[:15], x[15:], permutations=99)
    assert verdict.p_value == 1
