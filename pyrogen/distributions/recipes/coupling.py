"""Flows of couplings: fast both ways."""

__all__ = ["nice", "nsf", "realnvp"]

from collections.abc import Sequence

from torch import nn
from torch.distributions import constraints

from ...inputs import check_positive
from ...transforms import Coupling, Elementwise, LULinear, Permutation, Shift, Univariate
from ...transforms.spline import SPLINE
from ...transforms.univariate import AFFINE
from ..flow import Flow


def nice(
    features: int,
    context: int = 0,
    *,
    layers: int = 8,
    hidden: Sequence[int] = (64, 64),
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a flow of additive couplings: volume is kept until a last scale of each feature.

    Its density is the noise's along a warped grid: the least that a flow can do, and the most
    robust.

    Args:
        features: Number of features, at least 2.
        context: Number of features to condition on; 0 for none.
        layers: Number of couplings; each moves half of the features.
        hidden: Widths of the hidden layers of each network.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are fewer than 2 features, or no layers.

    References:
        Dinh, Krueger, Bengio. NICE: Non-linear Independent Components Estimation. ICLR 2015
        workshop. arXiv:1410.8516

    Example:
        >>> nice(features=3)().sample((5,)).shape
        torch.Size([5, 3])
    """
    check_positive("nice", feature=features, layer=layers)
    stack: list[nn.Module] = [Elementwise(features, context, hidden=hidden)]
    stack += _alternating(features, context, layers=layers, elementwise=Shift(), hidden=hidden)
    return Flow(features, stack, context, support=support, noise=noise)


def realnvp(
    features: int,
    context: int = 0,
    *,
    layers: int = 8,
    hidden: Sequence[int] = (64, 64),
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a flow of affine couplings: fast both ways, smooth, and the plainest.

    Args:
        features: Number of features, at least 2.
        context: Number of features to condition on; 0 for none.
        layers: Number of couplings; each moves half of the features.
        hidden: Widths of the hidden layers of each network.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are fewer than 2 features, or no layers.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP. ICLR 2017.
        arXiv:1605.08803

    Example:
        >>> realnvp(features=3)().sample((5,)).shape
        torch.Size([5, 3])
    """
    check_positive("realnvp", feature=features, layer=layers)
    stack = _alternating(features, context, layers=layers, elementwise=AFFINE, hidden=hidden)
    return Flow(features, stack, context, support=support, noise=noise)


def nsf(
    features: int,
    context: int = 0,
    *,
    layers: int = 4,
    hidden: Sequence[int] = (64, 64),
    elementwise: Univariate = SPLINE,
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a flow of spline couplings with linear layers between: fast both ways, and sharp.

    Args:
        features: Number of features, at least 2.
        context: Number of features to condition on; 0 for none.
        layers: Number of couplings; each moves half of the features.
        hidden: Widths of the hidden layers of each network.
        elementwise: Family of the maps of one feature.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    Raises:
        ValueError: If there are fewer than 2 features, or no layers.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019.
        arXiv:1906.04032

    Example:
        >>> flow = nsf(features=2, support=constraints.positive)
        >>> bool((flow().sample((100,)) > 0).all())
        True
    """
    check_positive("nsf", feature=features, layer=layers)
    stack: list[nn.Module] = []
    for i in range(layers):
        stack.append(
            Coupling(features, context, elementwise=elementwise, flip=bool(i % 2), hidden=hidden)
        )
        stack.append(LULinear(features))
    return Flow(features, stack, context, support=support, noise=noise)


def _alternating(
    features: int, context: int, *, layers: int, elementwise: Univariate, hidden: Sequence[int]
) -> list[nn.Module]:
    """Couplings that move each half in turn, and the features shuffled after each pair."""
    stack: list[nn.Module] = []
    for i in range(layers):
        if i and i % 2 == 0:
            stack.append(Permutation.random(features))
        stack.append(
            Coupling(features, context, elementwise=elementwise, flip=bool(i % 2), hidden=hidden)
        )
    return stack
