"""Flows of autoregressive layers: the best densities for their size."""

__all__ = ["maf"]

from collections.abc import Sequence

from torch.distributions import constraints

from ...transforms import Autoregressive, Univariate
from ...transforms.univariate import AFFINE
from ..flow import Flow


def maf(
    features: int,
    context: int = 0,
    *,
    layers: int = 5,
    hidden: Sequence[int] = (64, 64),
    elementwise: Univariate = AFFINE,
    support: constraints.Constraint = constraints.real,
) -> Flow:
    """Build a masked autoregressive flow: the best density for its size, slow to draw from.

    The order of the features alternates between ascending and descending. With
    ``elementwise=RationalQuadratic()`` it is the autoregressive neural spline flow.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of autoregressive layers.
        hidden: Widths of the hidden layers of each network.
        elementwise: Family of the maps of one feature.
        support: Where draws lie.

    References:
        Papamakarios, Pavlakou, Murray. Masked Autoregressive Flow for Density Estimation.
        NeurIPS 2017. arXiv:1705.07057

    Example:
        >>> maf(features=3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    up = range(features)
    stack = (
        Autoregressive(
            features,
            context,
            elementwise=elementwise,
            order=up[::-1] if i % 2 else up,
            hidden=hidden,
        )
        for i in range(layers)
    )
    return Flow(features, stack, context, support=support)
