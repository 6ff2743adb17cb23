"""Flows of monotone networks and polynomials: the most flexible maps of one feature."""

__all__ = ["bernstein", "gaussianization", "naf", "sospf", "triangular", "umnn"]

from collections.abc import Sequence

from torch import nn
from torch.distributions import constraints

from ...inputs import check_positive
from ...transforms import (
    Autoregressive,
    Bernstein,
    Elementwise,
    Householder,
    Integrated,
    LogisticMixture,
    SumOfSquares,
)
from ..flow import Flow
from .autoregressive import maf


def naf(
    features: int,
    context: int = 0,
    *,
    layers: int = 3,
    hidden: Sequence[int] = (64, 64),
    components: int = 8,
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a neural autoregressive flow: each feature moves by a monotone network of its own.

    Densities take one pass; draws search a root for every feature.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of autoregressive layers.
        hidden: Widths of the hidden layers of each network.
        components: Number of sigmoids of the monotone network of a feature.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are no features or no layers.

    References:
        Huang, Krueger, Lacoste, Courville. Neural Autoregressive Flows. ICML 2018.
        arXiv:1804.00779

    Example:
        >>> naf(features=3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    return maf(
        features,
        context,
        layers=layers,
        hidden=hidden,
        elementwise=LogisticMixture(components),
        support=support,
        noise=noise,
    )


def umnn(
    features: int,
    context: int = 0,
    *,
    layers: int = 3,
    hidden: Sequence[int] = (64, 64),
    units: int = 8,
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a flow of unconstrained monotone networks: each map integrates a positive network.

    Densities take one pass and a quadrature; draws search a root for every feature.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of autoregressive layers.
        hidden: Widths of the hidden layers of the networks that set the integrands.
        units: Number of units of each integrand.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are no features or no layers.

    References:
        Wehenkel, Louppe. Unconstrained Monotonic Neural Networks. NeurIPS 2019. arXiv:1908.05164

    Example:
        >>> umnn(features=3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    return maf(
        features,
        context,
        layers=layers,
        hidden=hidden,
        elementwise=Integrated(units),
        support=support,
        noise=noise,
    )


def triangular(
    features: int,
    context: int = 0,
    *,
    hidden: Sequence[int] = (64, 64),
    units: int = 16,
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    r"""Build a triangular map: the Knothe-Rosenblatt rearrangement, by one layer.

    .. math:: z_i = b_i(x_{<i}) + \int_0^{x_i} g_i(t; x_{<i})\, dt, \qquad g_i > 0

    Every law has exactly one such map to the noise, so nothing needs stacking, and each
    conditional law :math:`p(x_i \mid x_{<i})` can be read off it. Its log-determinant is a sum
    over features, and a draw searches one root for each, in turn.

    Args:
        features: Number of features; the order in which they come is that of the conditionals.
        context: Number of features to condition on; 0 for none.
        hidden: Widths of the hidden layers of the network that sets the integrands.
        units: Number of units of each integrand.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    References:
        Marzouk, Moselhy, Parno, Spantini. Sampling via Measure Transport: An Introduction.
        Handbook of Uncertainty Quantification, 2016. arXiv:1602.05023
        Wehenkel, Louppe. Unconstrained Monotonic Neural Networks. NeurIPS 2019. arXiv:1908.05164

    Example:
        >>> triangular(features=3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    layer = Autoregressive(features, context, elementwise=Integrated(units), hidden=hidden)
    return Flow(features, [layer], context, support=support, noise=noise)


def sospf(
    features: int,
    context: int = 0,
    *,
    layers: int = 3,
    hidden: Sequence[int] = (64, 64),
    degree: int = 3,
    polynomials: int = 2,
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a sum-of-squares polynomial flow: each map is an increasing polynomial.

    Densities take one pass; draws search a root for every feature.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of autoregressive layers.
        hidden: Widths of the hidden layers of each network.
        degree: Degree of the squared polynomials.
        polynomials: Number of squared polynomials.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are no features or no layers.

    References:
        Jaini, Selby, Yu. Sum-of-Squares Polynomial Flow. ICML 2019. arXiv:1905.02325

    Example:
        >>> sospf(features=3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    return maf(
        features,
        context,
        layers=layers,
        hidden=hidden,
        elementwise=SumOfSquares(degree, polynomials),
        support=support,
        noise=noise,
    )


def bernstein(
    features: int,
    context: int = 0,
    *,
    layers: int = 3,
    hidden: Sequence[int] = (64, 64),
    degree: int = 12,
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a Bernstein polynomial flow: each map is a monotone polynomial with straight tails.

    Densities take one pass; draws search a root for every feature.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of autoregressive layers.
        hidden: Widths of the hidden layers of each network.
        degree: Degree of the polynomials.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are no features or no layers.

    References:
        Ramasinghe, Fernando, Khan, Barnes. Robust Normalizing Flows using Bernstein-type
        Polynomials. BMVC 2022. arXiv:2102.03509

    Example:
        >>> bernstein(features=3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    return maf(
        features,
        context,
        layers=layers,
        hidden=hidden,
        elementwise=Bernstein(degree),
        support=support,
        noise=noise,
    )


def gaussianization(
    features: int,
    context: int = 0,
    *,
    layers: int = 6,
    hidden: Sequence[int] = (64, 64),
    components: int = 8,
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a Gaussianization flow: marginals made normal, features rotated, again and again.

    Without context it holds no networks: the features meet in trainable rotations only, each of
    at most 16 reflections.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of times that the marginals are made normal.
        hidden: Widths of the hidden layers of the networks, with context.
        components: Number of components of the mixture that stands for a marginal.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are no features or no layers.

    References:
        Meng, Song, Song, Ermon. Gaussianization Flows. AISTATS 2020. arXiv:2003.01941

    Example:
        >>> gaussianization(features=3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    check_positive("gaussianization", feature=features, layer=layers)
    family = LogisticMixture(components)
    stack: list[nn.Module] = []
    for _ in range(layers):
        stack.append(Householder(features, min(features, 16)))
        stack.append(Elementwise(features, context, elementwise=family, hidden=hidden))
    return Flow(features, stack[1:], context, support=support, noise=noise)
