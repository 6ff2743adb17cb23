"""What a representation has learned: how much of it is used, and what can be read off it."""

__all__ = [
    "InformationVerdict",
    "ProbeVerdict",
    "active_units",
    "linear_probe",
    "mutual_information",
]

import math
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..inputs import check_batch
from .two_sample import wilson_interval

PENALTIES = (
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1.0,
    10.0,
)  # of the mean loss in nats, on standardised features


@dataclass(frozen=True)
class ProbeVerdict:
    """What :func:`linear_probe` found.

    Attributes:
        accuracy: Fraction of the test data whose class is read off correctly.
        interval: 95 % interval of the accuracy over test sets of this size.
        chance: Accuracy of always naming the most frequent training class.
        penalty: Weight of the squared coefficients, chosen on held-out training data.
        sizes: Number of training and of test data.
    """

    accuracy: float
    interval: tuple[float, float]
    chance: float
    penalty: float
    sizes: tuple[int, int]

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"Linear probe from {self.sizes[0]} data, on {self.sizes[1]}: "
            f"accuracy {self.accuracy:.3f} [{low:.3f}, {high:.3f}], chance {self.chance:.3f}"
        )


def active_units(means: Tensor, *, threshold: float = 0.01) -> int:
    r"""Number of latent dimensions that depend on the data.

    .. math:: \#\{u : \mathrm{Var}_x\, E_{q(z|x)}[z_u] > \text{threshold}\}

    Args:
        means: Posterior mean of each datum, shape ``(n, latents)``, n at least 2.
        threshold: Least variance of an active unit, in units of the prior's variance.

    Raises:
        TypeError: If ``means`` is not a tensor of floating point.
        ValueError: If there are fewer than two data, or values are not finite.

    References:
        Burda, Grosse, Salakhutdinov. Importance Weighted Autoencoders. ICLR 2016. arXiv:1509.00519

    Example:
        >>> active_units(torch.randn(100, 3) * torch.tensor([1.0, 0.5, 0.01]))
        2
    """
    check_batch(means, getattr(means, "shape", ())[1:], owner="active_units", at_least=2)
    if means.ndim != 2:
        raise ValueError(
            f"active_units expected shape (n, latents), got {tuple(means.shape)}. "
            "Flatten the latent dimensions."
        )
    return int((means.double().var(0) > threshold).sum())


@dataclass(frozen=True)
class InformationVerdict:
    """What :func:`mutual_information` found, in nats.

    Attributes:
        lower: Estimate that is on average at most the information, and at most ``cap``.
        upper: Estimate that is on average at least the information.
        error: Standard error of ``lower`` over data sets of this size.
        cap: Log of the number of data: more cannot be told apart with them.
    """

    lower: float
    upper: float
    error: float
    cap: float

    def __str__(self) -> str:
        return (
            f"Mutual information between {self.lower:.2f} ± {self.error:.2f} and "
            f"{self.upper:.2f} nats (at most {self.cap:.2f} can be seen)"
        )


@torch.no_grad()
def mutual_information(
    posterior: TorchDistribution, *, draws: int = 1, batch_size: int = 256
) -> InformationVerdict:
    r"""Bound what a code says about its datum, :math:`I(x; z)` under :math:`p(x)\,q(z \mid x)`.

    .. math:: \mathrm E \log \frac{q(z_i \mid x_i)}{\frac1n \sum_{j} q(z_i \mid x_j)}
        \;\le\; I(x; z) \;\le\;
        \mathrm E \log \frac{q(z_i \mid x_i)}{\frac1{n-1} \sum_{j \ne i} q(z_i \mid x_j)},
        \qquad z_i \sim q(z \mid x_i).

    The mean of the posteriors stands for the aggregated posterior. The left side estimates the
    index-code information of these data without bias, and cannot exceed :math:`\log n`: where
    it comes near, only more data can tell. The right side is large there, for one gap costs
    much.

    Cost: ``draws`` :math:`\times n^2` densities.

    Args:
        posterior: :math:`q(z \mid x)` of all data, of batch shape ``(n,)`` with n at least 2, such
            as ``guide.joint(x)``. A bijection of ``z`` changes nothing.
        draws: Draws of each posterior.
        batch_size: Draws worked on at once, each against all data.

    Raises:
        ValueError: If there are fewer than two data, or the posterior has another batch shape.
        FloatingPointError: If a density is not finite.

    References:
        Hoffman, Johnson. ELBO surgery: yet another way to carve up the variational evidence
        lower bound. NIPS workshop 2016.
        Poole, Ozair, van den Oord, Alemi, Tucker. On Variational Bounds of Mutual Information.
        ICML 2019. arXiv:1905.06922

    Example:
        >>> x = torch.randn(1000, 1)  # z = x + noise: information is log(1 + 1/0.1**2) / 2 = 2.31
        >>> print(mutual_information(dist.Normal(x, 0.1).to_event(1)))
        Mutual information between 2.35 ± 0.03 and 2.37 nats (at most 6.91 can be seen)
    """
    if len(posterior.batch_shape) != 1 or posterior.batch_shape[0] < 2:
        raise ValueError(
            "mutual_information expected one posterior for each of at least two data, batch shape "
            f"(n,), got {tuple(posterior.batch_shape)}. Pass guide.joint(x), or add to_event."
        )
    if draws < 1 or batch_size < 1:
        raise ValueError(
            f"mutual_information expected draws and batch_size >= 1, got {draws} and "
            f"{batch_size}. Pass positive numbers."
        )
    (n,) = posterior.batch_shape
    lower, upper = [], []
    for _ in range(draws):
        z = posterior.sample()
        for rows in torch.arange(n).split(batch_size):
            density = posterior.log_prob(z[rows].unsqueeze(1)).double()  # (rows, n)
            own = density[torch.arange(len(rows)), rows].clone()
            lower.append(own - density.logsumexp(1) + math.log(n))
            density[torch.arange(len(rows)), rows] = -math.inf
            upper.append(own - density.logsumexp(1) + math.log(n - 1))
    below, above = (torch.cat(terms).reshape(draws, n).mean(0) for terms in (lower, upper))
    if not (below.isfinite().all() and above.isfinite().all()):
        raise FloatingPointError(
            "mutual_information met a density that is not finite: some code is impossible under "
            "every other datum's posterior, or a posterior is broken. Widen the posteriors."
        )
    # To first order the shared denominators average out, so terms count as independent.
    error = below.std() / math.sqrt(n)
    return InformationVerdict(below.mean().item(), above.mean().item(), error.item(), math.log(n))


def fit_logistic(z: Tensor, target: Tensor, classes: int, penalty: float) -> Tensor:
    """Weights of a multinomial logistic regression, shape ``(features, classes)``; convex."""
    weight = z.new_zeros(z.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # The last row is the intercept, which is not shrunk.
        loss = cross_entropy(z @ weight, target) + penalty / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def check_labels(labels: Tensor, z: Tensor, *, owner: str) -> None:
    """Refuse labels that are not one integer for each row of ``z``."""
    if not isinstance(labels, Tensor) or labels.dtype.is_floating_point or labels.dtype.is_complex:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{owner} expected integer labels, got {got}. Convert them by y.long().")
    if labels.shape != z.shape[:1]:
        raise ValueError(
            f"{owner} expected {len(z)} labels of shape ({len(z)},), got {tuple(labels.shape)}. "
            "Pass one class for each datum."
        )


def linear_probe(
    train_z: Tensor, train_labels: Tensor, test_z: Tensor, test_labels: Tensor
) -> ProbeVerdict:
    """Read classes off a representation by logistic regression.

    Multinomial, with a ridge penalty chosen among six on a random fifth of the training data, then
    fitted to all of it by L-BFGS in float64. Features are standardised by the training data; one
    that is constant there is ignored.

    Args:
        train_z: Representations to learn from, shape ``(n, *event)``, n at least 10.
        train_labels: Their classes, any integers, shape ``(n,)``.
        test_z: Other representations, shape ``(m, *event)``.
        test_labels: Their classes, shape ``(m,)``; one unseen in training counts as an error.

    Raises:
        TypeError: If representations are not of floating point, or labels not integers.
        ValueError: If there are fewer than ten training data or two classes, or shapes, dtypes
            or values do not fit.

    References:
        Alain, Bengio. Understanding intermediate layers using linear classifier probes. 2016.
        arXiv:1610.01644

    Example:
        >>> z = torch.randn(300, 2)
        >>> verdict = linear_probe(
        ...     z[:200], (z[:200, 0] > 0).int(), z[200:], (z[200:, 0] > 0).int()
        ... )
        >>> verdict.accuracy > 0.9
        True
    """
    owner = "linear_probe"
    check_batch(train_z, getattr(train_z, "shape", ())[1:], owner=owner, at_least=10)
    check_batch(test_z, train_z.shape[1:], owner=owner, like=train_z)
    if test_z.ndim != train_z.ndim:
        raise ValueError(
            f"{owner} expected test data like training data {tuple(train_z.shape)}, "
            f"got {tuple(test_z.shape)}. Flatten batch dimensions into one."
        )
    check_labels(train_labels, train_z, owner=owner)
    check_labels(test_labels, test_z, owner=owner)
    classes, target = train_labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"{owner} expected at least two classes, got one. Pass more data.")

    train, test = (z.detach().reshape(len(z), -1).double() for z in (train_z, test_z))
    varied = (train != train[:1]).any(0)
    train, test = train[:, varied], test[:, varied]
    mean, scale = train.mean(0), train.std(0)
    train, test = (
        torch.cat([(z - mean) / scale, z.new_ones(len(z), 1)], dim=1) for z in (train, test)
    )

    order = torch.randperm(len(train)).to(train.device)
    held, kept = order[: len(train) // 5], order[len(train) // 5 :]
    losses = []
    for penalty in PENALTIES:
        weight = fit_logistic(train[kept], target[kept], len(classes), penalty)
        losses.append(cross_entropy(train[held] @ weight, target[held]).item())
    penalty = PENALTIES[losses.index(min(losses))]
    weight = fit_logistic(train, target, len(classes), penalty)
    correct = classes[(test @ weight).argmax(1)] == test_labels
    accuracy = correct.double().mean().item()
    return ProbeVerdict(
        accuracy=accuracy,
        interval=wilson_interval(accuracy, len(test)),
        chance=(test_labels == classes[target.bincount().argmax()]).double().mean().item(),
        penalty=penalty,
        sizes=(len(train), len(test)),
    )
