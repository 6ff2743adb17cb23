"""Flows of residual layers: cheap draws that know their density, for guides."""

__all__ = ["planar", "radial", "sylvester"]

from collections.abc import Sequence

from torch import nn
from torch.distributions import constraints

from ...inputs import check_positive
from ...transforms.residual import Planar, Radial, Sylvester
from ..flow import Flow


def planar(
    features: int,
    context: int = 0,
    *,
    layers: int = 16,
    hidden: Sequence[int] = (64, 64),
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a flow of planar layers: the fewest parameters, two vectors a layer.

    With a context every layer's parameters are predicted from it, by a network of its own.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of layers.
        hidden: Widths of the hidden layers of each network, with context.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are no features or no layers.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015.
        arXiv:1505.05770

    Example:
        >>> planar(features=1)().log_prob(torch.zeros(5, 1)).shape
        torch.Size([5])
    """
    check_positive("planar", feature=features, layer=layers)
    stack = (Planar(features, context, hidden=hidden) for _ in range(layers))
    return Flow(features, stack, context, support=support, noise=noise)


def radial(
    features: int,
    context: int = 0,
    *,
    layers: int = 16,
    hidden: Sequence[int] = (64, 64),
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a flow of radial layers, each of which pulls or pushes around a centre.

    With a context every layer's parameters are predicted from it, by a network of its own.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of layers.
        hidden: Widths of the hidden layers of each network, with context.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are no features or no layers.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015.
        arXiv:1505.05770

    Example:
        >>> radial(features=2)().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """
    check_positive("radial", feature=features, layer=layers)
    stack = (Radial(features, context, hidden=hidden) for _ in range(layers))
    return Flow(features, stack, context, support=support, noise=noise)


def sylvester(
    features: int,
    context: int = 0,
    *,
    layers: int = 8,
    units: int | None = None,
    hidden: Sequence[int] = (64, 64),
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a flow of Sylvester layers with Householder reflections: planar flows made wide.

    With a context every layer's parameters are predicted from it, by a network of its own.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of layers.
        units: Number of directions that a layer moves along; ``min(features, 8)`` if None.
        hidden: Widths of the hidden layers of each network, with context.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are no features or no layers.

    References:
        van den Berg, Hasenclever, Tomczak, Welling. Sylvester Normalizing Flows for Variational
        Inference. UAI 2018. arXiv:1803.05649

    Example:
        >>> sylvester(features=3, context=2)(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 3])
    """
    check_positive("sylvester", feature=features, layer=layers)
    stack = (Sylvester(features, context, units=units, hidden=hidden) for _ in range(layers))
    return Flow(features, stack, context, support=support, noise=noise)
