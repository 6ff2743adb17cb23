"""How far apart two sets of draws are, as seen by the functions of a kernel's unit ball."""

__all__ = [
    "Distance",
    "Gaussian",
    "InverseMultiquadric",
    "Kernel",
    "Laplace",
    "Mixture",
    "Polynomial",
    "RationalQuadratic",
    "energy_distance",
    "mmd",
    "mmd_v",
]

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..inputs import check_batch

BLOCK = 2**24  # kernel entries held at once: 64 MB in float32


def two_sets(x: Tensor, y: Tensor, *, owner: str, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Check two sets of events and flatten each to ``(n, features)``."""
    check_batch(x, getattr(x, "shape", ())[1:], owner=owner, at_least=at_least)
    check_batch(y, x.shape[1:], owner=owner, at_least=at_least)
    if y.ndim != x.ndim:
        raise ValueError(
            f"{owner} expected sets of shape (n, {', '.join(map(str, x.shape[1:]))}), "
            f"got {tuple(y.shape)}. Flatten its batch dimensions into one."
        )
    if y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"{owner} expected two sets of one dtype and device, got {x.dtype} on {x.device} and "
            f"{y.dtype} on {y.device}. Convert one of them: y.to(x)."
        )
    if not x.shape[1:].numel():
        raise ValueError(
            f"{owner} expected at least one feature, got shape {tuple(x.shape)}. Pass data."
        )
    return x.reshape(len(x), -1), y.reshape(len(y), -1)


def euclidean(x: Tensor, y: Tensor) -> Tensor:
    """Distances without the expansion |x|² + |y|² - 2xy, which is wrong where they are small."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def positive(value: float | Tensor, *, name: str, owner: "Kernel") -> float | Tensor:
    """Refuse a width or power that is not positive."""
    if not bool(torch.as_tensor(value).gt(0).all()):
        raise ValueError(
            f"{type(owner).__name__} expected {name} > 0, got {value}. Pass a positive number."
        )
    return value


class Kernel(ABC):
    """A similarity of two points; call it on two sets for all pairs at once."""

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Kernel between each of ``x``, shape ``(n, features)``, and ``y``; shape ``(n, m)``."""


class Gaussian(Kernel):
    r"""The kernel :math:`\exp(-\|x - y\|^2 / 2 w^2)`.

    Args:
        width: Length :math:`w > 0` over which points are alike, in units of the data.

    Example:
        >>> Gaussian(1.0)(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[0.3679]])
    """

    def __init__(self, width: float | Tensor) -> None:
        self.width = positive(width, name="width", owner=self)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (-(euclidean(x, y) / self.width).square() / 2).exp()


class Laplace(Kernel):
    r"""The kernel :math:`\exp(-\|x - y\|_1 / w)`, rough, so sensitive to single features.

    Args:
        width: Length :math:`w > 0`, in units of the data summed over features.
    """

    def __init__(self, width: float | Tensor) -> None:
        self.width = positive(width, name="width", owner=self)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (-torch.cdist(x, y, p=1.0) / self.width).exp()


class RationalQuadratic(Kernel):
    r"""The kernel :math:`(1 + \|x - y\|^2 / 2 a w^2)^{-a}`: Gaussians of many widths.

    Args:
        width: Length :math:`w > 0`, in units of the data.
        power: Rate :math:`a > 0` of decay; the Gaussian kernel as it grows.
    """

    def __init__(self, width: float | Tensor, *, power: float = 1.0) -> None:
        self.width = positive(width, name="width", owner=self)
        self.power = positive(power, name="power", owner=self)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        squared = (euclidean(x, y) / self.width).square()
        return (-self.power * (squared / (2 * self.power)).log1p()).exp()


class InverseMultiquadric(Kernel):
    r"""The kernel :math:`(1 + \|x - y\|^2 / w^2)^{-1/2}`.

    Args:
        width: Length :math:`w > 0`, in units of the data.
    """

    def __init__(self, width: float | Tensor) -> None:
        self.width = positive(width, name="width", owner=self)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (1 + (euclidean(x, y) / self.width).square()).rsqrt()


class Polynomial(Kernel):
    r"""The kernel :math:`(x \cdot y / d + 1)^p` on :math:`d` features; it compares p moments.

    The squared MMD of the third degree on image features is the kernel inception distance.

    Args:
        degree: Number :math:`p` of moments compared.

    References:
        Binkowski, Sutherland, Arbel, Gretton. Demystifying MMD GANs. ICLR 2018. arXiv:1801.01401
    """

    def __init__(self, degree: int = 3) -> None:
        self.degree = positive(degree, name="degree", owner=self)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT / x.shape[-1] + 1) ** self.degree


class Distance(Kernel):
    r"""The kernel :math:`-\|x - y\|^p`, conditionally positive; its squared MMD is the energy.

    Args:
        power: Exponent :math:`0 < p < 2`.
    """

    def __init__(self, power: float = 1.0) -> None:
        if not 0 < power < 2:
            raise ValueError(
                f"Distance expected 0 < power < 2, got {power}. "
                "At 2 it would compare means only; choose 1."
            )
        self.power = power

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return -(euclidean(x, y) ** self.power)


class Mixture(Kernel):
    """The mean of several kernels, usually of several widths.

    Args:
        kernels: Kernels to average.

    Example:
        >>> kernel = Mixture(Gaussian(0.5), Gaussian(1.0), Gaussian(2.0))
        >>> kernel(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([[1.]])
    """

    def __init__(self, *kernels: Kernel) -> None:
        if not kernels:
            raise ValueError("Mixture expected at least one kernel, got none. Pass Gaussian(1.0).")
        self.kernels = kernels

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        total = self.kernels[0](x, y)
        for kernel in self.kernels[1:]:
            total = total + kernel(x, y)
        return total / len(self.kernels)


def pair_mean(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Mean of k over all pairs; summed in float64, since MMD is a small difference of means."""
    rows = max(1, BLOCK // len(y))
    total = x.new_zeros((), dtype=torch.float64)
    for block in x.split(rows):
        total = total + kernel(block, y).sum(dtype=torch.float64)
    return total / (len(x) * len(y))


def distinct_mean(x: Tensor, kernel: Kernel) -> Tensor:
    """Mean of k over pairs of two different draws of one set, in float64."""
    total = x.new_zeros((), dtype=torch.float64)
    rows = max(1, BLOCK // len(x))
    for first, block in zip(range(0, len(x), rows), x.split(rows), strict=True):
        gram = kernel(block, x)
        total = total + gram.sum(dtype=torch.float64)
        total = total - gram.diagonal(offset=first).sum(dtype=torch.float64)
    return total / (len(x) * (len(x) - 1))


def mmd(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    r"""Squared maximum mean discrepancy, estimated without bias (the U-statistic).

    .. math:: \mathrm{MMD}^2 = E\,k(x, x') + E\,k(y, y') - 2 E\,k(x, y)

    It is a square: no root is taken, so its gradient is finite where the sets coincide. Being
    unbiased it is negative about half of the time when both laws are one.
    Cost: O((n + m)²) kernel values in blocks of 2²⁴; only the gradient needs all at once.

    Args:
        x: Set of draws, shape ``(n, *event)``, n at least 2.
        y: Other set, shape ``(m, *event)``, m at least 2.
        kernel: Similarity of two flattened events.

    Raises:
        TypeError: If a set is not a tensor of floating point.
        ValueError: If a set has fewer than two draws, or shapes, dtypes or values do not fit.

    References:
        Gretton, Borgwardt, Rasch, Schölkopf, Smola. A Kernel Two-Sample Test. JMLR 2012.

    Example:
        >>> mmd(torch.randn(500, 2), torch.randn(500, 2) + 1, Gaussian(1.0)) > 0.05
        tensor(True)
    """
    x, y = two_sets(x, y, owner="mmd", at_least=2)
    within = distinct_mean(x, kernel) + distinct_mean(y, kernel)
    return (within - 2 * pair_mean(x, y, kernel)).to(x.dtype)


def mmd_v(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    r"""Squared MMD of the two empirical laws themselves (the V-statistic).

    Never negative for a positive kernel, and zero for equal sets; as an estimate for the laws
    behind the sets it is too large by :math:`E[k(x, x) - k(x, x')]/n`, and the same for y.

    Args:
        x: Set of draws, shape ``(n, *event)``.
        y: Other set, shape ``(m, *event)``.
        kernel: Similarity of two flattened events.

    Raises:
        TypeError: If a set is not a tensor of floating point.
        ValueError: If a set is empty, or shapes, dtypes or values do not fit.

    Example:
        >>> x = torch.randn(100, 2)
        >>> mmd_v(x, x, Gaussian(1.0))
        tensor(0.)
    """
    x, y = two_sets(x, y, owner="mmd_v")
    within = pair_mean(x, x, kernel) + pair_mean(y, y, kernel)
    return (within - 2 * pair_mean(x, y, kernel)).to(x.dtype)


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    r"""Energy distance of two laws, from draws, without bias.

    .. math:: 2 E\|x - y\| - E\|x - x'\| - E\|y - y'\|

    It has no width to choose, and is a squared MMD: of :class:`Distance`.
    Cost: as :func:`mmd`.

    Args:
        x: Set of draws, shape ``(n, *event)``, n at least 2.
        y: Other set, shape ``(m, *event)``, m at least 2.

    Returns:
        Scalar, in units of the data.

    Raises:
        TypeError: If a set is not a tensor of floating point.
        ValueError: If a set has fewer than two draws, or shapes, dtypes or values do not fit.

    References:
        Székely, Rizzo. Energy statistics: A class of statistics based on distances.
        Journal of Statistical Planning and Inference 2013.

    Example:
        >>> energy_distance(torch.zeros(2, 1), torch.ones(2, 1))
        tensor(2.)
    """
    x, y = two_sets(x, y, owner="energy_distance", at_least=2)
    return mmd(x, y, Distance())
