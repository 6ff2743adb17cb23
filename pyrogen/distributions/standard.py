"""Units in which data have mean 0 and standard deviation 1: what every ``standardize`` does."""

__all__ = ["standard_units"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from ..inputs import check_batch, check_varied
from .supports import strictly_inside


@torch.no_grad()
def standard_units(
    x: Tensor,
    event_shape: Sequence[int],
    *,
    owner: str,
    like: Tensor,
    support: constraints.Constraint = constraints.real,
    to_real: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of data, feature by feature, once mapped to the reals.

    Args:
        x: Data, shape ``(*batch, *event_shape)``, at least two.
        event_shape: Shape of one datum.
        owner: Name of the class that asks, for the messages.
        like: Tensor whose dtype and device the data must share.
        support: Where data lie.
        to_real: Map from the support to the reals; None for the identity.

    Raises:
        TypeError: If the data are not of floating point.
        ValueError: If the data do not fit, leave the support or lie on its border, are fewer
            than two, or have a constant feature.
    """
    check_batch(x, event_shape, owner=owner, like=like, at_least=2)
    x = x.detach().reshape(-1, *event_shape)
    free = x if to_real is None else to_real(x)
    inside = free.isfinite().reshape(len(x), -1).all(-1)
    inside &= support.check(x).reshape(len(x), -1).all(-1)
    inside &= strictly_inside(support, x)  # where the inverse clamps, its scale is its own
    if not inside.all():
        raise ValueError(
            f"{owner} expected data inside its support {support}, got {int((~inside).sum())} "
            "outside or on its border. Rescale them, or choose another support."
        )
    check_varied(free, owner=owner)
    return free.mean(0), free.std(0)
