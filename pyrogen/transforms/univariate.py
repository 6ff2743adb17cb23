"""Families of increasing maps of one variable: what layers predict the parameters of.

A family says how many parameters one feature needs, and makes an elementwise bijection of given
parameters. Coupling and autoregressive layers take a family and predict its parameters;
:class:`~pyrogen.transforms.Elementwise` learns them. In every family, parameters of zero give
the identity.
"""

__all__ = ["Affine", "Shift", "ShiftScale", "Univariate", "bounded"]

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints

from .base import Bijection


def bounded(x: Tensor, limit: float) -> Tensor:
    """Squash smoothly into ``(-limit, limit)``, with slope 1 at zero."""
    return x * torch.rsqrt(1 + (x / limit).square())


class Univariate(ABC):
    """A family of increasing maps of the line, given by real parameters; zero is the identity."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Number of parameters of one feature."""

    @abstractmethod
    def __call__(self, params: Tensor) -> Bijection:
        """Make an elementwise bijection of ``params``, shape ``(*shape, parameters)``."""


@dataclass(frozen=True)
class Affine(Univariate):
    r"""Maps :math:`x \mapsto e^{s} x + t`, with :math:`|s|` kept below ``bound``.

    Args:
        bound: Largest log-scale, reached smoothly; it keeps both directions finite.

    Example:
        >>> affine = Affine()(torch.zeros(3, 2))
        >>> affine(torch.ones(3))
        tensor([1., 1., 1.])
    """

    bound: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.bound < math.inf:
            raise ValueError(f"Affine expected a positive bound, got {self.bound}. Try 3.")

    @property
    def parameters(self) -> int:
        return 2

    def __call__(self, params: Tensor) -> Bijection:
        log_scale, shift = params.unbind(-1)
        return ShiftScale(bounded(log_scale, self.bound), shift)


@dataclass(frozen=True)
class Shift(Univariate):
    r"""Maps :math:`x \mapsto x + t`, which keep volume: the additive couplings of NICE.

    References:
        Dinh, Krueger, Bengio. NICE: Non-linear Independent Components Estimation. ICLR 2015
        workshop. arXiv:1410.8516

    Example:
        >>> shift = Shift()(torch.ones(3, 1))
        >>> shift.call_and_ladj(torch.ones(3))
        (tensor([2., 2., 2.]), tensor([0., 0., 0.]))
    """

    @property
    def parameters(self) -> int:
        return 1

    def __call__(self, params: Tensor) -> Bijection:
        (shift,) = params.unbind(-1)
        return ShiftScale(torch.zeros_like(shift), shift)


class ShiftScale(Bijection):
    """The elementwise map ``exp(log_scale) * x + shift``."""

    domain = constraints.real
    codomain = constraints.real

    def __init__(self, log_scale: Tensor, shift: Tensor) -> None:
        super().__init__(log_scale.shape)
        self.log_scale = log_scale
        self.shift = shift

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * self.log_scale.exp() + self.shift
        return y, self.log_scale.expand_as(y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = (y - self.shift) * (-self.log_scale).exp()
        return x, -self.log_scale.expand_as(x)


AFFINE = Affine()  # the default of layers and recipes
