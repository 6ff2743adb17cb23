r"""f-divergences: convex generators f with f(1) = 0, as functions of the log-ratio log p/q.

.. math:: D_f(p \,\|\, q) = E_q\, f\Big(\frac{p}{q}\Big)

In terms of the log-ratio they neither overflow where f does not, nor divide by zero.
"""

__all__ = [
    "alpha_divergence",
    "jensen_shannon",
    "kl",
    "neyman",
    "pearson",
    "reverse_kl",
    "squared_hellinger",
]

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus


def kl(log_ratio: Tensor) -> Tensor:
    r"""KL(p‖q): :math:`f(u) = u \log u`.

    Example:
        >>> kl(torch.tensor([2.0, 0.5]).log())
        tensor([ 1.3863, -0.3466])
    """
    return log_ratio.exp() * log_ratio


def reverse_kl(log_ratio: Tensor) -> Tensor:
    r"""KL(q‖p): :math:`f(u) = -\log u`.

    Example:
        >>> reverse_kl(torch.tensor([2.0, 0.5]).log())
        tensor([-0.6931,  0.6931])
    """
    return -log_ratio


def pearson(log_ratio: Tensor) -> Tensor:
    r"""χ²(p‖q): :math:`f(u) = (u - 1)^2`.

    Example:
        >>> pearson(torch.tensor([2.0, 0.5]).log())
        tensor([1.0000, 0.2500])
    """
    return log_ratio.expm1().square()


def neyman(log_ratio: Tensor) -> Tensor:
    r"""χ²(q‖p): :math:`f(u) = (u - 1)^2 / u`.

    Example:
        >>> neyman(torch.tensor([2.0, 0.5]).log())
        tensor([0.5000, 0.5000])
    """
    return (log_ratio / 2).sinh().square() * 4


def squared_hellinger(log_ratio: Tensor) -> Tensor:
    r"""H²(p, q): :math:`f(u) = (\sqrt u - 1)^2`, twice the convention with a half.

    Example:
        >>> squared_hellinger(torch.tensor([4.0, 0.25]).log())
        tensor([1.0000, 0.2500])
    """
    return (log_ratio / 2).expm1().square()


def jensen_shannon(log_ratio: Tensor) -> Tensor:
    r"""Jensen-Shannon: :math:`f(u) = \frac u2 \log u - \frac{1 + u}{2} \log \frac{1 + u}{2}`.

    Half of KL(p‖m) plus half of KL(q‖m) with m the mean of both; at most log 2.

    Example:
        >>> jensen_shannon(torch.tensor([2.0, 0.5]).log())
        tensor([0.0849, 0.0425])
    """
    first = log_ratio.exp() * (math.log(2) - softplus(-log_ratio))
    return (first + math.log(2) - softplus(log_ratio)) / 2


def alpha_divergence(alpha: float) -> Callable[[Tensor], Tensor]:
    r"""Amari's family: :math:`f(u) = \frac{u^\alpha - 1 - \alpha (u - 1)}{\alpha (\alpha - 1)}`.

    It tends to KL(p‖q) as :math:`\alpha \to 1`, to KL(q‖p) as :math:`\alpha \to 0`; at one half it
    is twice the squared Hellinger distance.

    Args:
        alpha: Order, neither 0 nor 1.

    Raises:
        ValueError: If ``alpha`` is 0 or 1.

    Example:
        >>> alpha_divergence(0.5)(torch.tensor([4.0, 0.25]).log())
        tensor([2.0000, 0.5000])
    """
    if not math.isfinite(alpha) or alpha in (0, 1):
        raise ValueError(
            f"alpha_divergence expected alpha other than 0 and 1, got {alpha}. The limits are "
            "reverse_kl and kl."
        )

    def f(log_ratio: Tensor) -> Tensor:
        linear = alpha * torch.expm1(log_ratio)
        return (torch.expm1(alpha * log_ratio) - linear) / (alpha * (alpha - 1))

    return f
