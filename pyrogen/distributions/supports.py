"""Where draws of a flow lie: from a constraint to the bijection that the reals take to it.

Constraints of torch and Pyro are accepted as they stand, also those whose own transform falls
short: several constraints side by side (``stack``, ``cat``), triangular and positive definite
matrices, positive ordered vectors. :data:`circular` is added, for angles.
"""

__all__ = ["Charted", "agree", "angles_of", "circular", "from_reals", "strictly_inside"]

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Size, Tensor
from torch.distributions import Transform, biject_to, transform_to
from torch.distributions.transforms import identity_transform

from ..transforms import Bijection, Wrapped
from .charts import (
    Correlation,
    CorrelationMatrix,
    LowerTriangular,
    PositiveDefinite,
    PositiveOrdered,
    StickBreaking,
)


class _Circular(constraints.Constraint):
    """Angles in radians, from -pi to pi: both ends are one point."""

    event_dim = 0

    def check(self, value: Tensor) -> Tensor:
        return value.abs() <= _PI  # both ends: they are one point, and rounding meets either


_PI = torch.tensor(math.pi).item()  # rounded up, as single precision does
circular = _Circular()


class Charted(constraints.Constraint):
    """A constraint together with the bijection from the reals onto it.

    ``biject_to`` gives that bijection, so that NUTS and every automatic guide of Pyro can work
    on a site that has this support.

    Args:
        constraint: What values must satisfy.
        chart: Bijection from the reals.

    Example:
        >>> from torch.distributions import biject_to, constraints
        >>> support = from_reals(constraints.lower_cholesky).codomain
        >>> biject_to(support)(torch.zeros(3))
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(self, constraint: constraints.Constraint, chart: Bijection) -> None:
        self.constraint = constraint
        self.chart = chart
        self.event_dim = chart.codomain.event_dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self.constraint.check(value)

    def __repr__(self) -> str:
        return repr(self.constraint)


@biject_to.register(Charted)
@transform_to.register(Charted)
def _chart(constraint: Charted) -> Bijection:
    return constraint.chart


@biject_to.register(_Circular)
@transform_to.register(_Circular)
def _cut_open(constraint: _Circular) -> Transform:
    return biject_to(constraints.interval(-math.pi, math.pi))  # what a sampler on the reals sees


def from_reals(support: constraints.Constraint, *, keep_angles: bool = False) -> Bijection:
    r"""Find the bijection from the reals onto a support.

    Simplices and matrices come from vectors. Their densities are those of the free coordinates:
    all probabilities but the last, the entries below the diagonal, and the diagonal where it is
    free. Pyro's ``Dirichlet``, ``LKJCholesky``, ``LKJ`` and ``Wishart`` use the same. Correlation
    matrices of ten rows or more need double precision, or ``corr_cholesky``: rounded to single
    precision, those that are nearly singular are no longer positive definite.

    Args:
        support: Constraint, such as ``positive``, ``interval(a, b)``, ``simplex``, ``circular``,
            ``corr_cholesky``, or the ``support`` of a distribution. ``stack([...], dim=-1)``
            gives each feature its own, ``cat([...], dim=-1, lengths=[...])`` each slice.
        keep_angles: Leave circular features as they are, for layers that move the circle onto
            itself; otherwise they come from a line, and the circle is cut at pi.

    Raises:
        TypeError: If the support is no constraint.
        ValueError: If the support is discrete, has bounds that are not known yet, or is no image
            of the reals.

    Example:
        >>> from torch.distributions import constraints
        >>> mixed = constraints.stack([constraints.real, constraints.positive], dim=-1)
        >>> from_reals(mixed)(torch.zeros(2))
        tensor([0., 1.])
    """
    if not isinstance(support, constraints.Constraint):
        raise TypeError(
            f"Flow expected a constraint for its support, got {support!r}. Pass one of "
            "torch.distributions.constraints, such as constraints.positive."
        )
    support = _plain(support)
    if isinstance(support, constraints.stack | constraints.cat):
        parts = _parts(support)
        chart = _Sliced([(from_reals(part), size) for part, size in parts])
        charted = Charted(_Slices(parts), chart)
        pieces = [(from_reals(part, keep_angles=keep_angles), size) for part, size in parts]
        return _Sliced(pieces, codomain=charted)
    if isinstance(support, _Circular):
        return Wrapped(identity_transform if keep_angles else biject_to(support), codomain=support)
    for kind, make in _OWN:
        if isinstance(support, type(kind)):
            return make()
    _refuse_unmapped(support)
    try:
        transform = biject_to(support)
    except NotImplementedError as error:
        advice = (
            "A flow is a density: for integers, add uniform noise in [0, 1) and use "
            "interval(low, high)."
            if support.is_discrete
            else "Where there is such a map, register it by torch.distributions.biject_to."
        )
        raise ValueError(
            f"Flow expected a support that the reals map onto, got {support}. {advice}"
        ) from error
    if isinstance(transform, Bijection):
        return transform
    return Wrapped(transform, codomain=support)


def _charted(support: constraints.Constraint, make: Callable[[], Bijection]) -> Bijection:
    """A bijection whose codomain knows it, for constraints that torch has no transform for."""
    bijection, chart = make(), make()
    bijection.codomain = Charted(support, chart)
    return bijection


_OWN: tuple[tuple[constraints.Constraint, Callable[[], Bijection]], ...] = (
    (constraints.simplex, StickBreaking),
    (constraints.corr_cholesky, Correlation),
    (constraints.corr_matrix, CorrelationMatrix),
    (constraints.lower_cholesky, lambda: _charted(constraints.lower_cholesky, LowerTriangular)),
    (
        constraints.positive_definite,
        lambda: _charted(constraints.positive_definite, PositiveDefinite),
    ),
    (
        constraints.positive_ordered_vector,
        lambda: _charted(constraints.positive_ordered_vector, PositiveOrdered),
    ),
)


def _refuse_unmapped(support: constraints.Constraint) -> None:
    if constraints.is_dependent(support):
        raise ValueError(
            "Flow expected a support that the reals map onto, got one that depends on "
            "parameters. Take it from an instance, such as dist.Uniform(0.0, 1.0).support."
        )
    if isinstance(support, type(constraints.sphere)):
        raise ValueError(
            "Flow expected a support that the reals map onto, got the sphere, which is none. "
            "Use pyrogen.distributions.circular for angles."
        )


def _plain(support: constraints.Constraint) -> constraints.Constraint:
    """The constraint of one event, with numbers for bounds: they follow any device and dtype."""
    while isinstance(support, constraints.independent | Charted):  # a flow sums over its event
        support = support.constraint if isinstance(support, Charted) else support.base_constraint
    if isinstance(support, _Slices):
        parts, lengths = zip(*support.parts, strict=True)
        return constraints.cat(list(parts), dim=-1, lengths=list(lengths))
    bounds = {name: bound for name, bound in vars(support).items() if isinstance(bound, Tensor)}
    if not bounds:
        return support
    shape = torch.broadcast_shapes(*(bound.shape for bound in bounds.values()))
    if len(shape) > 1:
        raise ValueError(
            f"Flow expected bounds for each feature, shape (features,), got {tuple(shape)}. "
            "Choose the bounds of one event."
        )
    rows = [bound.detach().expand(shape).reshape(-1).tolist() for bound in bounds.values()]
    each = [_with(support, dict(zip(bounds, row, strict=True))) for row in zip(*rows, strict=True)]
    return constraints.stack(each, dim=-1) if shape else each[0]


def _with(support: constraints.Constraint, bounds: dict[str, float]) -> constraints.Constraint:
    new = type(support).__new__(type(support))
    vars(new).update(vars(support) | bounds)
    return new


Parts = list[tuple[constraints.Constraint, int]]


def _parts(support: Any) -> Parts:
    """Slices of the last dimension of a draw: the constraint of each, and its length."""
    if support.dim != -1:
        raise ValueError(
            f"Flow expected features in the last dimension, got a support with "
            f"dim={support.dim}. Pass dim=-1."
        )
    parts = [_plain(part) for part in support.cseq]
    if isinstance(support, constraints.stack):
        if any(part.event_dim for part in parts):
            raise ValueError(
                "Flow expected a stack of constraints of single features. Join vectors by "
                "constraints.cat([...], dim=-1, lengths=[...])."
            )
        runs = [list(run) for _, run in groupby(parts, key=_kind)]  # one transform for each run
        return [(run[0], len(run)) for run in runs]
    if any(part.event_dim > 1 for part in parts):
        raise ValueError(
            "Flow expected features and vectors side by side, got a matrix among them. Give the "
            "matrix a flow and a site of its own."
        )
    return list(zip(parts, support.lengths, strict=True))


def _kind(support: constraints.Constraint) -> tuple:
    return type(support), tuple(vars(support).items())


class _Slices(constraints.Constraint):
    event_dim = 1

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        valid = torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device)
        for (part, _), piece in zip(self.parts, self.split(value), strict=True):
            good = part.check(piece)
            valid = valid & (good if good.ndim < piece.ndim else good.all(-1))
        return valid

    def split(self, value: Tensor) -> Sequence[Tensor]:
        return value.split([size for _, size in self.parts], dim=-1)

    def __repr__(self) -> str:
        return f"cat({[part for part, _ in self.parts]}, {[size for _, size in self.parts]})"


class _Sliced(Bijection):
    """Bijections side by side, each on its slice of the last dimension."""

    def __init__(
        self,
        parts: list[tuple[Bijection, int]],
        *,
        codomain: constraints.Constraint = constraints.real_vector,
    ) -> None:
        super().__init__()
        self.parts = [part for part, _ in parts]
        self.sizes = [size for _, size in parts]
        self.free = [part.inverse_shape((size,))[-1] for part, size in parts]
        self.codomain = codomain

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pieces = zip(self.parts, x.split(self.free, dim=-1), strict=True)
        return self._join([(part, *part.call_and_ladj(piece)) for part, piece in pieces])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        pieces = zip(self.parts, y.split(self.sizes, dim=-1), strict=True)
        return self._join([(part, *part.inverse_and_ladj(piece)) for part, piece in pieces])

    @staticmethod
    def _join(pieces: list[tuple[Bijection, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        ladj = [ladj if part.domain.event_dim else ladj.sum(-1) for part, _, ladj in pieces]
        return torch.cat([value for _, value, _ in pieces], dim=-1), sum(ladj[1:], ladj[0])

    def forward_shape(self, shape: Iterable[int]) -> Size:
        return self._swap(shape, self.free, self.sizes)

    def inverse_shape(self, shape: Iterable[int]) -> Size:
        return self._swap(shape, self.sizes, self.free)

    @staticmethod
    def _swap(shape: Iterable[int], old: list[int], new: list[int]) -> Size:
        *batch, size = shape
        if size != sum(old):
            raise ValueError(f"The constraints side by side need {sum(old)} features, got {size}.")
        return Size((*batch, sum(new)))


def angles_of(support: constraints.Constraint, features: int) -> Tensor:
    """Which features of the noise are angles, shape ``(features,)``.

    Example:
        >>> from torch.distributions import constraints
        >>> angles_of(constraints.stack([circular, constraints.real], dim=-1), 2)
        tensor([ True, False])
    """
    support = _plain(support)
    if isinstance(support, constraints.stack | constraints.cat):
        parts = _parts(support)
        free = [from_reals(part).inverse_shape((size,))[-1] for part, size in parts]
        return torch.cat([angles_of(part, n) for (part, _), n in zip(parts, free, strict=True)])
    return torch.full((features,), isinstance(support, _Circular))


def strictly_inside(support: constraints.Constraint, x: Tensor) -> Tensor:
    """Which data lie off the borders of intervals, where torch's inverse clamps: ``(data,)``."""
    support = _plain(support)
    if isinstance(support, constraints.stack | constraints.cat):
        parts = _parts(support)
        pieces = zip(parts, x.split([size for _, size in parts], dim=-1), strict=True)
        inside = [strictly_inside(part, piece) for (part, _), piece in pieces]
        return torch.stack(inside).all(0)
    if isinstance(support, constraints.interval | constraints.half_open_interval):
        within = (x > support.lower_bound) & (x < support.upper_bound)
        return within.reshape(len(x), -1).all(-1)
    return torch.ones(len(x), dtype=torch.bool, device=x.device)


def agree(one: Any, other: Any) -> bool:
    """Whether two constraints are the same: torch compares them by identity only."""
    if one is other:
        return True
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(agree, one, other))
    if isinstance(one, Charted):
        return agree(one.constraint, other)
    if isinstance(other, Charted):
        return agree(one, other.constraint)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        sizes = zip(reversed(one.shape), reversed(other.shape), strict=False)
        return all(a == b or 1 in (a, b) for a, b in sizes) and bool((one == other).all())
    if isinstance(one, constraints.Constraint):
        mine, theirs = vars(one), vars(other)
        return type(one) is type(other) and agree(list(mine.values()), list(theirs.values()))
    return bool(one == other)
