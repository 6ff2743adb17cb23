"""Probes against scikit-learn and known accuracies; active units against a known encoder."""

import dataclasses
import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from pyrogen.evaluation import active_units, linear_probe, wilson_interval
from pyrogen.evaluation.representation import fit_logistic


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
