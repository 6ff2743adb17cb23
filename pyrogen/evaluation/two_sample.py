"""Do two sets of draws come from one law? Tests whose level holds at every sample size."""

__all__ = ["ClassifierVerdict", "MMDVerdict", "classifier_test", "mmd_test", "wilson_interval"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ..divergences.ipm import Gaussian, Kernel, Laplace, two_sets

RIDGE = 0.3  # noise variance of the classifier, next to a kernel of height 1
ROUNDING = 1e-9  # statistics this close are ties, which count against rejection


@dataclass(frozen=True)
class MMDVerdict:
    """What :func:`mmd_test` found.

    Attributes:
        statistic: Largest MMD over the kernels, in standard deviations of the null.
        p_value: Probability, were the laws one, of a statistic as large.
        permutations: Number of permutations behind the p-value.
        sizes: Number of draws in each set.
    """

    statistic: float
    p_value: float
    permutations: int
    sizes: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"MMD test of {self.sizes[0]} against {self.sizes[1]} draws: "
            f"statistic {self.statistic:.2f}, p = {self.p_value:.3g} "
            f"({self.permutations} permutations)"
        )


@dataclass(frozen=True)
class ClassifierVerdict:
    """What :func:`classifier_test` found.

    Attributes:
        accuracy: Held-out accuracy, mean of the two sets'; 0.5 when the laws are one.
        interval: 95 % interval of the accuracy.
        auc: Probability that a draw of the first set scores above one of the second.
        p_value: Probability, were the laws one, of an accuracy as high.
        permutations: Number of permutations behind the p-value.
        sizes: Number of draws in each set.
    """

    accuracy: float
    interval: tuple[float, float]
    auc: float
    p_value: float
    permutations: int
    sizes: tuple[int, int]

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"Classifier test of {self.sizes[0]} against {self.sizes[1]} draws: "
            f"accuracy {self.accuracy:.3f} [{low:.3f}, {high:.3f}], AUC {self.auc:.3f}, "
            f"p = {self.p_value:.3g} ({self.permutations} permutations)"
        )


def wilson_interval(proportion: float, size: float, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion seen in ``size`` independent trials, always within [0, 1].

    References:
        Wilson. Probable Inference, the Law of Succession, and Statistical Inference.
        Journal of the American Statistical Association 1927.

    Example:
        >>> low, high = wilson_interval(0.5, 100)
        >>> f"{low:.3f} {high:.3f}"
        '0.404 0.596'
    """
    z2 = NormalDist().inv_cdf(0.5 + level / 2) ** 2
    centre = (proportion + z2 / (2 * size)) / (1 + z2 / size)
    spread = proportion * (1 - proportion) / size + z2 / (4 * size**2)
    half = math.sqrt(z2 * spread) / (1 + z2 / size)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def pooled_units(x: Tensor, y: Tensor) -> Tensor:
    """Both sets in one tensor, float64, each feature of unit variance; constant ones dropped.

    It sees the pooled draws only, so it cannot favour either set: permutations stay exact.
    """
    pooled = torch.cat([x, y]).double()
    pooled = pooled[:, (pooled != pooled[:1]).any(0)]
    pooled = pooled / pooled.abs().amax(0)  # at most 1, so that no square overflows
    centred = pooled - pooled.mean(0)
    return centred / centred.square().mean(0).sqrt()


def width_ladder(distances: Tensor, steps: int) -> list[float]:
    """Widths in a geometric row, from half the gap of neighbours to twice the far distances."""
    nearest = distances.where(distances > 0, torch.inf).amin(1)
    low, high = nearest.median() / 2, 2 * distances.amax(1).median()
    return torch.logspace(low.log10().item(), high.log10().item(), steps).tolist()


def default_kernels(z: Tensor) -> list[Kernel]:
    """Gaussian and Laplace kernels of ten widths each, for pooled draws ``(n, features)``."""
    smooth = [Gaussian(width) for width in width_ladder(torch.cdist(z, z), 10)]
    return [*smooth, *(Laplace(width) for width in width_ladder(torch.cdist(z, z, p=1.0), 10))]


def check_permutations(permutations: int, *, owner: str) -> None:
    """Refuse so few permutations that no p-value could reach 5 %."""
    if permutations < 19:
        raise ValueError(
            f"{owner} expected permutations >= 19, got {permutations}: "
            "the p-value could not reach 0.05. Use 999."
        )


def exact_p_value(statistics: Tensor) -> float:
    """(1 + number as large) / (1 + permutations) of the first entry among the others."""
    as_large = statistics[1:] >= statistics[0] - ROUNDING
    return (1 + int(as_large.sum())) / len(statistics)


@torch.no_grad()
def mmd_test(
    x: Tensor,
    y: Tensor,
    *,
    permutations: int = 999,
    kernels: Sequence[Kernel] | None = None,
) -> MMDVerdict:
    r"""Test that two sets of draws come from one law, by kernels of all widths at once.

    Each kernel's unbiased squared MMD is standardised by its mean and deviation over permutations
    of the pooled draws; the largest is compared with the largest of each permutation,

    .. math:: T = \max_k \frac{\mathrm{MMD}^2_k - \mu_k}{\sigma_k}, \qquad
        p = \frac{1 + \#\{b : T_b \ge T\}}{1 + B}.

    The p-value is exact: :math:`P(p \le \alpha) \le \alpha` at every size and dimension, for
    independent draws. By default the kernels are Gaussian and Laplace at ten widths each, from
    the nearest neighbours to the whole cloud of the standardised data: one width, such as the
    median distance, is blind to differences at other scales. A change in one of many features is
    better seen by :func:`classifier_test`.
    Cost: O((n + m)² · permutations) for each kernel, memory O((n + m)²).

    Args:
        x: Independent draws, shape ``(n, *event)``, n at least 2. A constant feature is ignored.
        y: Other draws, shape ``(m, *event)``, m at least 2.
        permutations: Number of permutations; p is at least 1 / (1 + permutations).
        kernels: Kernels of the flattened events, with widths in units of the data. They may
            depend on the pooled draws only, or the level is lost.

    Raises:
        TypeError: If a set is not a tensor of floating point.
        ValueError: If a set has fewer than two draws, or shapes, dtypes or values do not fit.

    References:
        Gretton, Borgwardt, Rasch, Schölkopf, Smola. A Kernel Two-Sample Test. JMLR 2012.
        Schrab, Kim, Albert, Laurent, Guedj, Gretton. MMD Aggregated Two-Sample Test. JMLR 2023.
        arXiv:2110.15073

    Example:
        >>> verdict = mmd_test(torch.randn(100, 2), 2 * torch.randn(100, 2))
        >>> verdict.p_value
        0.001
    """
    x, y = two_sets(x, y, owner="mmd_test", at_least=2)
    check_permutations(permutations, owner="mmd_test")
    n, m = sizes = len(x), len(y)
    if kernels is None:
        z = pooled_units(x, y)
        kernels = default_kernels(z) if z.shape[1] else []
    else:
        z = torch.cat([x, y]).double()
        if not kernels:
            raise ValueError(
                "mmd_test expected kernels, got none. Leave them out for the default."
            )
    if not kernels:  # every draw is the same point
        return MMDVerdict(0.0, 1.0, permutations, sizes)

    chosen = torch.rand(1 + permutations, n + m, dtype=torch.float64).argsort(1)[:, :n]
    chosen[0] = torch.arange(n)
    inside = z.new_zeros(1 + permutations, n + m).scatter_(1, chosen.to(z.device), 1.0).T

    largest = z.new_full((1 + permutations,), -torch.inf)
    for kernel in kernels:
        gram = kernel(z, z).fill_diagonal_(0.0)
        xx = (inside * (gram @ inside)).sum(0)
        xy = gram.sum(0) @ inside - xx
        yy = gram.sum() - 2 * xy - xx
        squared = xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)
        # The observed labels are one more permutation: they enter mean and deviation alike.
        spread = squared.std()
        spread = spread.where(spread > 1e-12 * gram.abs().mean(), torch.inf)  # rounding: all tie
        largest = torch.maximum(largest, (squared - squared.mean()) / spread)
    return MMDVerdict(largest[0].item(), exact_p_value(largest), permutations, sizes)


def stratified_folds(n: int, m: int, folds: int) -> Tensor:
    """Random fold of each pooled draw, each set spread evenly, shape ``(n + m,)``."""
    return (
        torch.cat([torch.arange(n)[torch.randperm(n)], torch.arange(m)[torch.randperm(m)]]) % folds
    )


def permuted_labels(label: Tensor, fold: Tensor, permutations: int) -> Tensor:
    """Labels, then their permutations within folds, shape ``(n + m, 1 + permutations)``."""
    by_fold = fold.argsort(stable=True)
    keys = torch.rand(1 + permutations, len(label), dtype=torch.float64) + fold
    shuffled = keys.argsort(1)
    shuffled[0] = by_fold
    return (
        torch.empty_like(shuffled, dtype=label.dtype)
        .scatter_(1, by_fold.expand_as(shuffled), label[shuffled])
        .T
    )


def held_out_scores(z: Tensor, target: Tensor, fold: Tensor) -> Tensor:
    """Kernel ridge predictions of each target, less its mean, by the other folds."""
    distances = torch.cdist(z, z, p=1.0)
    width = distances[distances > 0].median().item() if z.shape[1] else 1.0
    # Three scales of a rough product kernel: one for broad shifts, two for fine structure.
    gram = (
        sum(((-s * distances / width).exp() for s in (1, 4, 16)), torch.zeros_like(distances)) / 3
    )
    scores = torch.empty_like(target)
    for k in range(int(fold.max()) + 1):
        out, rest = fold == k, fold != k
        noisy = gram[rest][:, rest]
        noisy.diagonal().add_(RIDGE)
        # Centred by the labels seen, the threshold is at equal densities whatever the sizes, and
        # a fold that holds more of one set does not tilt the others against it.
        seen = target[rest] - target[rest].mean(0)
        weight = torch.cholesky_solve(seen, torch.linalg.cholesky(noisy))
        scores[out] = gram[out][:, rest] @ weight
    return scores


@torch.no_grad()
def classifier_test(
    x: Tensor, y: Tensor, *, folds: int = 5, permutations: int = 999
) -> ClassifierVerdict:
    r"""Test that two sets come from one law, by how well a classifier tells them apart.

    A kernel ridge classifier is fitted to all folds but one and scores that one, for each fold.
    Its kernel is a mean of three Laplace kernels of the standardised features, rough enough for
    structure in single features and for their interplay. As its predictions are linear in the
    labels, it is refitted to every permutation of the labels (within folds) at the cost of a
    matrix product, so the p-value is exact, :math:`p = (1 + \#\{b : A_b \ge A\}) / (1 + B)`.

    The interval is Wilson's, with the number of draws divided by the excess of the permutations'
    variance over the binomial's, about 1.6: folds that trained each other err together, and
    a plain binomial interval would be too short by a fifth.
    Cost: O((n + m)³ + (n + m)² · permutations), memory O((n + m)²): a second for a thousand draws;
    pass subsets of more than some five thousand.

    Args:
        x: Independent draws, shape ``(n, *event)``. A constant feature is ignored.
        y: Other draws, shape ``(m, *event)``; m may differ from n.
        folds: Number of folds, at least 2 and at most n and m.
        permutations: Number of permutations; p is at least 1 / (1 + permutations).

    Raises:
        TypeError: If a set is not a tensor of floating point.
        ValueError: If a set has fewer draws than folds, or shapes, dtypes or values do not fit.

    References:
        Lopez-Paz, Oquab. Revisiting Classifier Two-Sample Tests. ICLR 2017. arXiv:1610.06545

    Example:
        >>> verdict = classifier_test(torch.randn(200, 2), torch.randn(200, 2) + 1)
        >>> verdict.accuracy > 0.7, verdict.p_value
        (True, 0.001)
    """
    if folds < 2:
        raise ValueError(f"classifier_test expected folds >= 2, got {folds}. Use 5.")
    x, y = two_sets(x, y, owner="classifier_test", at_least=folds)
    check_permutations(permutations, owner="classifier_test")
    n, m = sizes = len(x), len(y)
    z = pooled_units(x, y)
    fold = stratified_folds(n, m, folds)
    label = torch.cat([torch.ones(n), torch.zeros(m)]).double()
    labels = permuted_labels(label, fold, permutations).to(z.device)
    fold = fold.to(z.device)

    scores = held_out_scores(z, labels, fold)
    called = torch.where(scores.abs() <= ROUNDING, 0.5, (scores > 0).double())
    accuracy = ((called * labels).sum(0) / n + ((1 - called) * (1 - labels)).sum(0) / m) / 2

    gap = scores[:n, :1] - scores[n:, 0]
    ranked = torch.where(gap.abs() <= ROUNDING, 0.5, (gap > 0).double())
    auc = ranked[fold[:n, None] == fold[n:]].mean()

    trials = 4 * n * m / (n + m)  # of a binomial with the variance of the mean of two accuracies
    excess = max(1.0, 4 * trials * accuracy[1:].var().item())
    return ClassifierVerdict(
        accuracy=accuracy[0].item(),
        interval=wilson_interval(accuracy[0].item(), trials / excess),
        auc=auc.item(),
        p_value=exact_p_value(accuracy),
        permutations=permutations,
        sizes=sizes,
    )
