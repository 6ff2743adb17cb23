"""Families of increasing maps of one variable: what layers predict the parameters of.

A family says how many parameters one feature needs, and makes an elementwise bijection of given
parameters. Coupling and autoregressive layers take a family and predict its parameters;
:class:`~pyrogen.transforms.Elementwise` learns them. Parameters of zero give the identity, in
every family that contains it.
"""

__all__ = [
    "Affine",
    "Inverted",
    "PerFeature",
    "Shift",
    "ShiftScale",
    "Stacked",
    "Univariate",
    "bounded",
]

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints

from .base import Bijection, Composed


def bounded(x: Tensor, limit: float) -> Tensor:
    """Squash smoothly into ``(-limit, limit)``, with slope 1 at zero."""
    return limit * (x / torch.hypot(x, torch.full_like(x, limit)))  # no square that overflows


class Univariate(ABC):
    """A family of increasing maps of one variable, given by real parameters."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Number of parameters of one feature."""

    @abstractmethod
    def __call__(self, params: Tensor) -> Bijection:
        """Make an elementwise bijection of ``params``, shape ``(*shape, parameters)``."""

    def of(self, features: Sequence[int]) -> "Univariate":
        """Return the family for some of the features, given by their indices."""
        return self


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
        log_scale, shift = params.movedim(-1, 0)  # a cheaper gradient than unbind's
        return ShiftScale(self.bound * (log_scale / self.bound).tanh(), shift)


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
        ladj = -self.log_scale
        x = (y - self.shift) * ladj.exp()
        return x, ladj.expand_as(x)


@dataclass(frozen=True)
class Inverted(Univariate):
    """The inverse maps of a family.

    What was closed form from data to noise becomes closed form from noise to data: densities of
    data are fast in the one, draws in the other, as a guide needs them.

    Args:
        family: Family to turn round; it is used with the same parameters.

    Example:
        >>> x, params = torch.randn(3), torch.randn(3, 2)
        >>> torch.equal(Inverted(Affine())(params)(x), Affine()(params).inv(x))
        True
    """

    family: Univariate

    @property
    def parameters(self) -> int:
        return self.family.parameters

    def of(self, features: Sequence[int]) -> Univariate:
        return Inverted(self.family.of(features))

    def __call__(self, params: Tensor) -> Bijection:
        return self.family(params).inv


class Stacked(Univariate):
    """Maps of several families one after the other, with their parameters side by side.

    Args:
        families: Families in the order in which their maps are applied from noise to data.

    Raises:
        TypeError: If one is not a family.
        ValueError: If there are none.

    Example:
        >>> family = Stacked(Affine(), Affine())
        >>> family.parameters
        4
        >>> family(torch.zeros(3, 4))(torch.ones(3))
        tensor([1., 1., 1.])
    """

    def __init__(self, *families: Univariate) -> None:
        _check_families("Stacked", families)
        self.families = families

    @property
    def parameters(self) -> int:
        return sum(family.parameters for family in self.families)

    def of(self, features: Sequence[int]) -> Univariate:
        return Stacked(*(family.of(features) for family in self.families))

    def __call__(self, params: Tensor) -> Bijection:
        parts = params.split([family.parameters for family in self.families], dim=-1)
        return Composed([family(part) for family, part in zip(self.families, parts, strict=True)])


class PerFeature(Univariate):
    """A family of its own for each feature, such as circular ones beside unbounded ones.

    All features are given the number of parameters that the largest family needs; the others
    leave the last of theirs unused. Features of the same family object are moved together.

    Args:
        families: Family of each feature, in the order of the features that the layer moves.

    Raises:
        TypeError: If one is not a family.
        ValueError: If there are none, or not as many as the layer moves features.

    Example:
        >>> from pyrogen.transforms import RationalQuadratic
        >>> family = PerFeature([Affine(), RationalQuadratic(), Affine()])
        >>> family.parameters
        23
        >>> family(torch.zeros(3, 23))(torch.ones(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(self, families: Sequence[Univariate]) -> None:
        self.families = tuple(families)
        _check_families("PerFeature", self.families)
        self.most = max(family.parameters for family in self.families)
        self.groups: dict[Univariate, list[int]] = {}
        for i, family in enumerate(self.families):
            self.groups.setdefault(family, []).append(i)

    @property
    def parameters(self) -> int:
        return self.most

    def of(self, features: Sequence[int]) -> Univariate:
        part = PerFeature([self.families[i] for i in features])
        part.most = self.most
        return part

    def __call__(self, params: Tensor) -> Bijection:
        features = params.shape[-2] if params.ndim > 1 else 0
        if features != len(self.families):
            raise ValueError(
                f"PerFeature holds {len(self.families)} families, got parameters of {features} "
                "features. Give a family to each feature that the layer moves."
            )
        if len(self.groups) == 1:
            family = self.families[0]
            return family(params[..., : family.parameters])
        parts = [
            (group, family(params[..., group, : family.parameters]))
            for family, group in self.groups.items()
        ]
        return _PerFeature(parts, params.shape[:-1])


class _PerFeature(Bijection):
    def __init__(
        self, parts: Sequence[tuple[list[int], Bijection]], batch_shape: Sequence[int]
    ) -> None:
        super().__init__(batch_shape)
        self.parts = parts
        groups = [group for group, _ in parts]
        order = [i for group in groups for i in group]
        self.place = sorted(range(len(order)), key=order.__getitem__)
        domains = [part.domain for group, part in parts for _ in group]
        codomains = [part.codomain for group, part in parts for _ in group]
        self.domain = constraints.cat([domains[i] for i in self.place], dim=-1)
        self.codomain = constraints.cat([codomains[i] for i in self.place], dim=-1)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._join([part.call_and_ladj(x[..., group]) for group, part in self.parts])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._join([part.inverse_and_ladj(y[..., group]) for group, part in self.parts])

    def _join(self, moved: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        values, ladjs = zip(*moved, strict=True)
        return torch.cat(values, -1)[..., self.place], torch.cat(ladjs, -1)[..., self.place]


def _check_families(owner: str, families: Sequence[Univariate]) -> None:
    if not families:
        raise ValueError(f"{owner} expected at least one family, got none.")
    for family in families:
        if not isinstance(family, Univariate):
            raise TypeError(
                f"{owner} expected families such as Affine(), got {type(family).__name__}. "
                "Pass an object, not a class."
            )


AFFINE = Affine()  # the default of layers and recipes
