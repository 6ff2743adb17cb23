"""Probes against scikit-learn, active units against a known encoder, information against truth."""

import dataclasses
import math

import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from pyrogen.evaluation import (
    active_units,
    linear_probe,
    mutual_information,
    wilson_interval,
)
from pyrogen.evaluation.representation import fit_logistic
from pyrogen.targets import LinearGaussian


def digits():
    data = load_digits()
    order = torch.randperm(len(data.target))
    z, label = torch.tensor(data.data).float()[order], torch.tensor(data.target)[order]
    return z[:600, ::3], label[:600], z[600:], label[600:]


def test_fit_is_scikit_learns():
    z, label, _, _ = digits()
    z = ((z - z.mean(0)) / (z.std(0) + 0.1)).double()
    weight = fit_logistic(torch.cat([z, z.new_ones(len(z), 1)], 1), label, 10, 0.01)
    oracle = LogisticRegression(C=1 / (0.01 * len(z)), tol=1e-8, max_iter=5000).fit(z, label)
    assert torch.allclose(weight[:-1].T, torch.tensor(oracle.coef_), atol=1e-3)


def test_accuracy_on_digits_is_scikit_learns():
    z, label, test_z, test_label = digits()
    test_z = test_z[:, ::3]
    verdict = linear_probe(z, label, test_z, test_label)
    centre, scale = z.mean(0), z.std(0) + 1e-6
    oracle = LogisticRegression(max_iter=2000).fit((z - centre) / scale, label)
    expected = oracle.score((test_z - centre) / scale, test_label)
    assert abs(verdict.accuracy - expected) < 0.02
    assert verdict.interval[0] < verdict.accuracy < verdict.interval[1]
    assert verdict.sizes == (600, len(test_label))


def gaussian_classes(n):
    """Two unit Gaussians at distance 2: the best accuracy is Phi(1)."""
    label = torch.randint(2, (n,))
    return torch.randn(n, 5) + 2 * label[:, None] * torch.eye(5)[0], label


def test_accuracy_reaches_the_bayes_rate_but_no_more():
    verdict = linear_probe(*gaussian_classes(2000), *gaussian_classes(20_000))
    assert abs(verdict.accuracy - 0.5 * (1 + math.erf(1 / 2**0.5))) < 0.015
    assert abs(verdict.chance - 0.5) < 0.02


def test_noise_gives_chance():
    label = (torch.rand(2000) > 0.3).long()
    z = torch.randn(2000, 4)
    verdict = linear_probe(z[:500], label[:500], z[500:], label[500:])
    assert verdict.chance > 0.65
    assert abs(verdict.accuracy - verdict.chance) < 0.03
    assert verdict.penalty > 1e-4


def test_probe_ignores_units_names_of_classes_and_constant_features():
    (z, label), (test_z, test_label) = gaussian_classes(200), gaussian_classes(300)
    torch.manual_seed(1)
    verdict = linear_probe(z, label, test_z, test_label)

    def changed(z):
        units = torch.tensor([1e-5, 1e4, 1.0, 1.0, 1.0])
        return torch.cat([z.double() * units - 7, torch.full((len(z), 1), 3.0)], 1)

    torch.manual_seed(1)
    same = linear_probe(changed(z), 9 - 4 * label, changed(test_z), 9 - 4 * test_label)
    assert same.accuracy == pytest.approx(verdict.accuracy, abs=0.004)


def test_unseen_class_is_an_error():
    z, label = gaussian_classes(100)
    verdict = linear_probe(z, label, z, torch.full_like(label, 7))
    assert verdict.accuracy == verdict.chance == 0.0
    assert verdict.interval[0] == 0.0 < verdict.interval[1]


def test_probe_is_learned_under_no_grad_and_leaves_no_gradient():
    z, label = gaussian_classes(100)
    z.requires_grad_()
    with torch.no_grad():
        assert linear_probe(z, label, z, label).accuracy > 0.6
    linear_probe(z, label, z, label)
    assert z.grad is None


def test_verdict_reads_as_a_sentence_and_is_frozen():
    verdict = linear_probe(*gaussian_classes(50), *gaussian_classes(60))
    assert str(verdict).startswith(
        f"Linear probe from 50 data, on 60: accuracy {verdict.accuracy:.3f}"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.accuracy = 1.0


def test_wilson_interval_is_its_root():
    """Its ends are the proportions whose own z-score of the observed one is 1.96."""
    for p in wilson_interval(0.3, 40):
        assert abs(0.3 - p) / math.sqrt(p * (1 - p) / 40) == pytest.approx(1.959964, rel=1e-5)


def test_active_units_counts_variances_above_the_threshold():
    means = torch.randn(5000, 4) * torch.tensor([0.12, 0.08, 0.0, 2.0])
    assert active_units(means) == 2
    assert active_units(means, threshold=1.0) == 1
    assert active_units(means + 100) == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_labels": torch.zeros(20)}, TypeError, "integer labels, got torch.float32"),
        ({"train_labels": [0] * 20}, TypeError, "integer labels, got list"),
        ({"train_labels": torch.zeros(3).long()}, ValueError, "20 labels"),
        ({"test_labels": torch.zeros(3).long()}, ValueError, "5 labels"),
        ({"train_labels": torch.zeros(20).long()}, ValueError, "at least two classes"),
        ({"train_z": torch.full((20, 2), torch.nan)}, ValueError, "40 NaN"),
        ({"test_z": torch.ones(5, 3)}, ValueError, r"got \(5, 3\)"),
        ({"test_z": torch.ones(5, 5, 2)}, ValueError, "Flatten batch dimensions"),
        ({"test_z": torch.ones(5, 2).double()}, ValueError, "holds torch.float32"),
        ({"train_z": torch.ones(4, 2)}, ValueError, "at least 10 data, got 4"),
        ({"train_z": torch.ones(20, 2).long()}, TypeError, "floating-point"),
    ],
)
def test_bad_probes_are_refused(changes, error, message):
    given = {
        "train_z": torch.randn(20, 2),
        "train_labels": torch.arange(20) % 2,
        "test_z": torch.randn(5, 2),
        "test_labels": torch.arange(5) % 2,
    }
    with pytest.raises(error, match=message):
        linear_probe(**given | changes)


def test_bad_means_are_refused():
    with pytest.raises(ValueError, match="at least 2 data, got 1"):
        active_units(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"expected shape \(n, latents\)"):
        active_units(torch.ones(5, 2, 2))
    with pytest.raises(TypeError, match="floating-point"):
        active_units(torch.ones(5, 2).long())


def coded(n, noise=0.3):
    """Exact posteriors of a linear Gaussian model, and the information they carry."""
    weight = torch.tensor([[1.0, 0.5], [0.0, 2.0], [-1.0, 1.0]])
    z = torch.randn(n, 2)
    x = z @ weight.T + noise * torch.randn(n, 3)
    posterior = LinearGaussian(weight, noise).posterior(x)
    truth = torch.logdet(torch.eye(2) + weight.T @ weight / noise**2).item() / 2
    return posterior, truth


def test_bounds_enclose_the_information_of_a_linear_gaussian_model():
    posterior, truth = coded(3000)
    verdict = mutual_information(posterior, draws=2)
    assert verdict.lower - 4 * verdict.error < truth < verdict.upper + 4 * verdict.error
    assert abs(verdict.lower - truth) < 0.15
    assert 0 < verdict.upper - verdict.lower < 0.15
    assert verdict.cap == pytest.approx(math.log(3000))


def test_few_data_show_a_wide_gap_around_the_information():
    verdicts = []
    for _ in range(200):
        posterior, truth = coded(20)
        verdicts.append(mutual_information(posterior))
    lower = sum(v.lower for v in verdicts) / 200
    upper = sum(v.upper for v in verdicts) / 200
    assert lower < truth - 0.1
    assert upper > truth + 0.1


def test_its_error_is_that_of_the_lower_bound():
    """Over 300 data sets; the ratio of deviations has a standard error of 4 %."""
    verdicts = [mutual_information(coded(200)[0]) for _ in range(300)]
    spread = torch.tensor([v.lower for v in verdicts]).std().item()
    assert spread / (sum(v.error for v in verdicts) / 300) == pytest.approx(1.0, abs=0.17)


def test_information_of_bits_is_exact_by_enumeration():
    """Half the data say 0 with probability 0.9, half 1: the lower bound is that of a channel."""
    p = torch.tensor([0.1, 0.9]).repeat(50)
    posterior = dist.Bernoulli(p[:, None]).to_event(1)
    verdict = mutual_information(posterior, draws=2000)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert verdict.lower == pytest.approx(math.log(2) - entropy, abs=0.005)
    right, wrong = (49 * 0.9 + 50 * 0.1) / 99, (49 * 0.1 + 50 * 0.9) / 99
    exact = 0.9 * math.log(0.9 / right) + 0.1 * math.log(0.1 / wrong)
    assert verdict.upper == pytest.approx(exact, abs=0.005)


def test_a_code_that_ignores_its_datum_carries_nothing():
    verdict = mutual_information(dist.Normal(torch.zeros(50, 2), 1.0).to_event(1))
    assert verdict.lower == pytest.approx(0, abs=1e-6)
    assert verdict.upper == pytest.approx(0, abs=1e-6)


def test_perfect_codes_show_the_log_of_their_number():
    posterior = dist.Normal(torch.arange(30.0)[:, None], 0.01).to_event(1)
    verdict = mutual_information(posterior)
    assert verdict.lower == pytest.approx(math.log(30))
    assert verdict.upper > 1000


def test_information_is_the_same_in_pieces_and_in_other_coordinates():
    posterior, _ = coded(100)
    torch.manual_seed(1)
    whole = mutual_information(posterior)
    torch.manual_seed(1)
    assert mutual_information(posterior, batch_size=7).lower == pytest.approx(whole.lower)
    torch.manual_seed(1)
    bent = dist.TransformedDistribution(posterior, [dist.transforms.ExpTransform()])
    assert mutual_information(bent).lower == pytest.approx(whole.lower, abs=1e-3)


def test_information_reads_as_a_sentence():
    assert str(mutual_information(coded(50)[0])).startswith("Mutual information between ")


def test_bad_posteriors_are_refused():
    with pytest.raises(ValueError, match=r"batch shape \(n,\), got \(\)"):
        mutual_information(dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"got \(5, 2\). Pass guide.joint"):
        mutual_information(dist.Normal(torch.zeros(5, 2), 1.0))
    with pytest.raises(ValueError, match=r"at least two data.*got \(1,\)"):
        mutual_information(dist.Normal(torch.zeros(1), 1.0))
    with pytest.raises(ValueError, match="draws and batch_size >= 1, got 0"):
        mutual_information(dist.Normal(torch.zeros(5), 1.0), draws=0)
    with pytest.raises(FloatingPointError, match="not finite"):
        mutual_information(
            dist.Uniform(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 6.0]), validate_args=False)
        )
