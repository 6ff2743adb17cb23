"""Flows of autoregressive layers: the best densities for their size."""

__all__ = ["iaf", "maf"]

from collections.abc import Sequence

from torch import nn
from torch.distributions import constraints

from ...inputs import check_positive
from ...transforms import Autoregressive, Inverse, LULinear, Univariate
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
    noise: nn.Module | None = None,
) -> Flow:
    """Build a masked autoregressive flow: the best density for its size, slow to draw from.

    The order of the features alternates between ascending and descending, and linear layers mix
    them in between. With ``elementwise=RationalQuadratic()`` it is the autoregressive neural
    spline flow.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of autoregressive layers.
        hidden: Widths of the hidden layers of each network.
        elementwise: Family of the maps of one feature.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are no features or no layers.

    References:
        Papamakarios, Pavlakou, Murray. Masked Autoregressive Flow for Density Estimation.
        NeurIPS 2017. arXiv:1705.07057

    Example:
        >>> maf(features=3)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    check_positive("maf", feature=features, layer=layers)
    stack: list[nn.Module] = []
    for layer in _alternating(
        features, context, layers=layers, elementwise=elementwise, hidden=hidden
    ):
        stack += [layer, Inverse(LULinear(features))]  # a product to score, a solve to draw
    return Flow(features, stack, context, support=support, noise=noise)


def iaf(
    features: int,
    context: int = 0,
    *,
    layers: int = 5,
    hidden: Sequence[int] = (64, 64),
    elementwise: Univariate = AFFINE,
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build an inverse autoregressive flow: one pass to draw and score the draw, for guides.

    A given value takes as many passes to score as it has features, or until nothing changes. For
    data use :func:`maf`, its mirror image.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        layers: Number of autoregressive layers.
        hidden: Widths of the hidden layers of each network.
        elementwise: Family of the maps of one feature.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are no features or no layers.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling. Improving Variational Inference
        with Inverse Autoregressive Flow. NeurIPS 2016. arXiv:1606.04934

    Example:
        >>> x, log_prob = iaf(features=3)().rsample_and_log_prob((5,))
        >>> x.shape, log_prob.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    check_positive("iaf", feature=features, layer=layers)
    stack: list[nn.Module] = []
    for layer in _alternating(
        features, context, layers=layers, elementwise=elementwise, hidden=hidden
    ):
        stack += [Inverse(layer), LULinear(features)]
    return Flow(features, stack, context, support=support, noise=noise)


def _alternating(
    features: int, context: int, *, layers: int, elementwise: Univariate, hidden: Sequence[int]
) -> list[nn.Module]:
    """Autoregressive layers in ascending and descending order, in turn."""
    up = range(features)
    return [
        Autoregressive(
            features,
            context,
            elementwise=elementwise,
            order=up[::-1] if i % 2 else up,
            hidden=hidden,
        )
        for i in range(layers)
    ]
