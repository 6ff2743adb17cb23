"""Flows of residual layers: cheap draws that know their density, for guides."""

__all__ = ["planar", "radial", "sylvester"]

from collections.abc import Sequence

from torch.distributions import constraints

from ...transforms.residual import Planar, Radial, Sylvester
from ..flow import Flow


def planar(
    features: int,
    context: int = 0,
    *,
    layers: int = 16,
    hidden: Sequence[int] = (64, 64),
    support: constraints.Constraint = constraints.real,
) -> Flow:
    """Build a flow of planar layers: the fewest parameters, two vectors a layer.

    With a context every layer's parameters are predicted from it, by a network of its own.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of layers.
        hidden: Widths of the hidden layers of each network, with context.
        support: Where draws lie.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015.
        arXiv:1505.05770

    Example:
        >>> planar(features=1)().log_prob(torch.zeros(5, 1)).shape
        torch.Size([5])
    """
    stack = (Planar(features, context, hidden=hidden) for _ in range(layers))
    return Flow(features, stack, context, support=support)


def radial(
    features: int,
    context: int = 0,
    *,
    layers: int = 16,
    hidden: Sequence[int] = (64, 64),
    support: constraints.Constraint = constraints.real,
) -> Flow:
    """Build a flow of radial layers, each of which pulls or pushes around a centre.

    With a context every layer's parameters are predicted from it, by a network of its own.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of layers.
        hidden: Widths of the hidden layers of each network, with context.
        support: Where draws lie.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015.
        arXiv:1505.05770

    Example:
        >>> radial(features=2)().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """
    stack = (Radial(features, context, hidden=hidden) for _ in range(layers))
    return Flow(features, stack, context, support=support)


def sylvester(
    features: int,
    context: int = 0,
    *,
    layers: int = 8,
    units: int | None = None,
    hidden: Sequence[int] = (64, 64),
    support: constraints.Constraint = constraints.real,
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

    References:
        van den Berg, Hasenclever, Tomczak, Welling. Sylvester Normalizing Flows for Variational
        Inference. UAI 2018. arXiv:1803.05649

    Example:
        >>> sylvester(features=3, context=2)(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 3])
    """
    stack = (Sylvester(features, context, units=units, hidden=hidden) for _ in range(layers))
    return Flow(features, stack, context, support=support)
