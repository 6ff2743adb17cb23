"""The cost of carrying one set of draws onto another along lines."""

__all__ = ["sliced_wasserstein", "wasserstein_1d"]

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..inputs import check_batch
from .ipm import two_sets

BLOCK = 2**24  # projected values held at once: 64 MB in float32


def check_order(order: float, *, owner: str) -> None:
    """Refuse a concave cost, for which sorting is not optimal."""
    if not order >= 1:
        raise ValueError(f"{owner} expected order >= 1, got {order}. Choose 1 or 2.")


def line_cost(x: Tensor, y: Tensor, order: float) -> Tensor:
    """Mean cost between equal quantiles of the last dimension."""
    n, m = x.shape[-1], y.shape[-1]
    x, y = x.sort(-1).values, y.sort(-1).values
    if n == m:
        return ((x - y).abs() ** order).mean(-1)
    # Quantile functions are steps that jump at multiples of 1/n and 1/m: count in units of 1/nm.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    ends = ends.to(x.device)
    length = ends.diff(prepend=ends.new_zeros(1)).to(x.dtype) / (n * m)
    apart = x[..., (ends - 1) // m] - y[..., (ends - 1) // n]
    return (length * apart.abs() ** order).sum(-1)


def wasserstein_1d(x: Tensor, y: Tensor, *, order: float = 1.0) -> Tensor:
    r"""Exact Wasserstein distance on the line, raised to its order.

    .. math:: W_p^p = \int_0^1 |F_x^{-1}(u) - F_y^{-1}(u)|^p\, du

    No root is taken, so the gradient is finite where the sets coincide.
    Cost: O((n + m) log(n + m)).

    Args:
        x: Draws, shape ``(*batch, n)``: one set per batch element.
        y: Other draws, shape ``(*batch, m)``; m may differ from n.
        order: The exponent :math:`p \ge 1`.

    Shape:
        Output: ``(*batch)``, in units of the data to the power ``order``.

    Raises:
        TypeError: If a set is not a tensor of floating point.
        ValueError: If a set is empty or not finite, dtypes differ, or ``order`` is below 1.

    Example:
        >>> wasserstein_1d(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 6.0, 5.0, 6.0]))
        tensor(5.)
    """
    check_order(order, owner="wasserstein_1d")
    check_batch(x, (), owner="wasserstein_1d")
    check_batch(y, (), owner="wasserstein_1d", like=x)
    return line_cost(x, y, order)


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, projections: int = 256, order: float = 2.0
) -> Tensor:
    r"""Wasserstein distance along random directions, raised to its order, on average.

    .. math:: \mathrm{SW}_p^p = E_{u}\, W_p^p(u \cdot x, u \cdot y),
        \qquad u \text{ uniform on the unit sphere}

    Unbiased in the directions, drawn anew at each call; its standard error falls as
    ``projections ** -0.5``. A shift by :math:`\delta` in d features gives :math:`|\delta|^2/d`
    at order 2. On one feature it is exact and draws nothing.
    Cost: O(projections · (n + m) · (features + log(n + m))).

    Args:
        x: Set of draws, shape ``(n, *event)``.
        y: Other set, shape ``(m, *event)``; m may differ from n.
        projections: Number of directions.
        order: The exponent :math:`p \ge 1`.

    Raises:
        TypeError: If a set is not a tensor of floating point.
        ValueError: If a set is empty, shapes, dtypes or values do not fit, or a number is below 1.

    References:
        Bonneel, Rabin, Peyré, Pfister. Sliced and Radon Wasserstein Barycenters of Measures.
        Journal of Mathematical Imaging and Vision 2015.

    Example:
        >>> x = torch.randn(100, 3)
        >>> sliced_wasserstein(x, x.flip(0))
        tensor(0.)
    """
    check_order(order, owner="sliced_wasserstein")
    if projections < 1:
        raise ValueError(
            f"sliced_wasserstein expected projections >= 1, got {projections}. Try 256."
        )
    x, y = two_sets(x, y, owner="sliced_wasserstein")
    if x.shape[1] == 1:
        return line_cost(x[:, 0], y[:, 0], order)
    directions = normalize(torch.randn(projections, x.shape[1]).to(x), dim=-1)
    rows = max(1, BLOCK // (len(x) + len(y)))
    costs = [line_cost(u @ x.mT, u @ y.mT, order) for u in directions.split(rows)]
    return torch.cat(costs).mean()
