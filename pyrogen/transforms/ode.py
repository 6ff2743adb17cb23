r"""Solvers of ordinary differential equations :math:`\mathrm dx/\mathrm dt = f(t, x)`, row by row.

A solver is an object: ``solver(field, x, start, stop, *held)`` carries every row of ``x`` from the
time ``start`` to the time ``stop``, in either direction. Plain autograd goes through every step,
so the result is differentiable as often as the field is, and its derivatives are those of the
numbers returned. What happens to a row never depends on the other rows.
"""

__all__ = ["DormandPrince", "Euler", "Midpoint", "RungeKutta4", "Solver"]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..autodiff import can_steer
from .recompute import Function, parameters_of, recomputed
from .tableaux import EIGHT, FIVE

Field = Callable[..., Tensor]
"""Map ``(t, x, *held)`` to the rate of ``x``; ``t`` has shape ``(rows,)``, the others a first
dimension of rows, each independent of the others. The same weights act at all times."""


class Solver(ABC):
    """How to follow a vector field."""

    @abstractmethod
    def __call__(
        self, field: Field, x: Tensor, start: float, stop: float, *held: Tensor
    ) -> Tensor:
        """Carry ``x`` from the time ``start`` to the time ``stop``.

        Args:
            field: Map ``(t, x, *held)`` to rates of the shape of ``x``, each row by itself.
            x: Initial values, shape ``(rows, features)``.
            start: Time to start at.
            stop: Time to stop at; less than ``start`` to go back.
            *held: What belongs to each row and stays as it is, shape ``(rows, *any)``.

        Returns:
            Final values, of the shape of ``x``.
        """

    @abstractmethod
    def refined(self, dtype: torch.dtype) -> Self:
        """A solver whose error is a small part of this one's: the difference tells the error."""


def _combine(x: Tensor, h: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Take x + h times the weighted slopes; a weight of zero costs nothing."""
    total = sum(w * k for w, k in zip(weights, slopes, strict=False) if w)
    return x + h.unsqueeze(-1) * total


def _recomputed(step: Function, field: Field, *inputs: Tensor) -> Function:
    """A step that is computed anew on the way back, where there may be one."""
    if not torch.is_grad_enabled():
        return step
    row = [v[:1] for v in inputs]
    return recomputed(step, parameters_of(lambda *row: (field(*row),), row))


@dataclass(frozen=True)
class _FixedSteps(Solver, ABC):
    """Explicit Runge-Kutta on a uniform grid, by its tableau."""

    order: ClassVar[int]
    nodes: ClassVar[tuple[float, ...]]
    stages: ClassVar[tuple[tuple[float, ...], ...]]
    weights: ClassVar[tuple[float, ...]]

    steps: int
    checkpointed: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"{type(self).__name__} expected steps >= 1, got {self.steps}.")

    def refined(self, dtype: torch.dtype) -> Self:
        return replace(self, steps=2 * self.steps)

    def __call__(
        self, field: Field, x: Tensor, start: float, stop: float, *held: Tensor
    ) -> Tensor:
        h = x.new_full((len(x),), (stop - start) / self.steps)

        def step(t: Tensor, x: Tensor, *held: Tensor) -> tuple[Tensor, ...]:
            slopes: list[Tensor] = []
            for node, weights in zip(self.nodes, self.stages, strict=True):
                point = _combine(x, h, weights, slopes) if slopes else x
                slopes.append(field(t + node * h, point, *held))
            return (_combine(x, h, self.weights, slopes),)

        t = x.new_full((len(x),), start)
        advance = _recomputed(step, field, t, x, *held) if self.checkpointed else step
        for i in range(self.steps):
            t = x.new_full((len(x),), start + i * ((stop - start) / self.steps))
            (x,) = advance(t, x, *held)
        return x


@dataclass(frozen=True)
class Euler(_FixedSteps):
    """Straight lines: of order one.

    Cost: one call of the field per step.

    Args:
        steps: Number of steps.
        checkpointed: Whether to keep only the state between steps and to compute each step anew
            on the way back: memory that hardly grows with ``steps``, for a third more time.

    Raises:
        ValueError: If there is no step.

    Example:
        >>> Euler(100)(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0)
        tensor([[0.3660]])
    """

    order = 1
    nodes = (0.0,)
    stages = ((),)
    weights = (1.0,)


@dataclass(frozen=True)
class Midpoint(_FixedSteps):
    """The slope halfway through each step: of order two.

    Cost: two calls of the field per step.

    Args:
        steps: Number of steps.
        checkpointed: Whether to keep only the state between steps and to compute each step anew
            on the way back: memory that hardly grows with ``steps``, for a third more time.

    Raises:
        ValueError: If there is no step.

    Example:
        >>> Midpoint(50)(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0)
        tensor([[0.3679]])
    """

    order = 2
    nodes = (0.0, 0.5)
    stages = ((), (0.5,))
    weights = (0.0, 1.0)


@dataclass(frozen=True)
class RungeKutta4(_FixedSteps):
    """The classical method, of order four: for training, where its cost is known in advance.

    Cost: four calls of the field per step.

    Args:
        steps: Number of steps.
        checkpointed: Whether to keep only the state between steps and to compute each step anew
            on the way back: memory that hardly grows with ``steps``, for a third more time.

    Raises:
        ValueError: If there is no step.

    Example:
        >>> RungeKutta4(8)(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0)
        tensor([[0.3679]])
    """

    order = 4
    nodes = (0.0, 0.5, 0.5, 1.0)
    stages = ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0))
    weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


@dataclass(frozen=True)
class DormandPrince(Solver):
    r"""High order with an error estimate that sets the step of every row.

    A step of size h is kept if its estimated error is at most
    :math:`\text{tolerance}\,(1 + |x|)` in every feature; the next one is
    :math:`0.9\,h\,(\text{tolerance}/\text{error})^{1/\text{order}}`. Rows move with steps of
    their own and leave the batch when they arrive, so a value never depends on its batch mates.
    Derivatives are those of the steps taken, with their sizes held.

    Cost: six calls of the field per step at order five, twelve at order eight, which takes fewer
    steps; kept or not.

    Args:
        tolerance: Error of one step, relative to 1 + \|x\|; None for 1e-6 in single and 1e-11 in
            double precision.
        order: Order of convergence, 5 or 8; None for 5 in single and 8 in double precision.
        steps: Most steps that a row may try.
        checkpointed: Whether to keep only the state between steps and to compute each step anew
            on the way back.

    Raises:
        ValueError: If the tolerance is not positive, the order not known, or there is no step.
        FloatingPointError: If a row does not arrive within ``steps``, or its step vanishes.
        NotImplementedError: Within ``torch.vmap``.

    References:
        Dormand, Prince. A family of embedded Runge-Kutta formulae. Journal of Computational and
        Applied Mathematics 1980.
        Hairer, Nørsett, Wanner. Solving ordinary differential equations I: nonstiff problems.
        Springer 1993.

    Example:
        >>> DormandPrince()(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0)
        tensor([[0.3679]])
    """

    tolerance: float | None = None
    order: int | None = field(default=None, kw_only=True)
    steps: int = field(default=1000, kw_only=True)
    checkpointed: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise ValueError(f"DormandPrince expected tolerance > 0, got {self.tolerance}.")
        if self.steps < 1:
            raise ValueError(f"DormandPrince expected steps >= 1, got {self.steps}.")
        if self.order not in (None, 5, 8):
            raise ValueError(f"DormandPrince expected order 5 or 8, got {self.order}.")

    def refined(self, dtype: torch.dtype) -> Self:
        return replace(self, tolerance=self._tolerance(dtype) / 30)

    def _tolerance(self, dtype: torch.dtype) -> float:
        if self.tolerance is not None:
            return self.tolerance
        return max(10 * torch.finfo(dtype).eps, 1e-11)

    def __call__(
        self, field: Field, x: Tensor, start: float, stop: float, *held: Tensor
    ) -> Tensor:
        if start == stop or not len(x):
            return x
        tolerance, span = self._tolerance(x.dtype), abs(stop - start)
        sign = math.copysign(1.0, stop - start)
        order = self.order or (5 if torch.finfo(x.dtype).eps > 1e-10 else 8)
        tableau = FIVE if order == 5 else EIGHT

        def step(
            t: Tensor, h: Tensor, x: Tensor, first: Tensor, *held: Tensor
        ) -> tuple[Tensor, ...]:
            h = sign * h
            slopes, point = [first], x
            for node, weights in zip(tableau.nodes, tableau.stages, strict=True):
                point = _combine(x, h, weights, slopes)
                slopes.append(field(t + node * h, point, *held))
            size = tolerance * (1 + torch.maximum(x.abs(), point.abs())).detach()
            ratios = [
                (_combine(torch.zeros_like(x), h, weights, slopes).detach().abs() / size).amax(-1)
                for weights in tableau.errors
            ]
            return point, slopes[-1], _error(*ratios)

        t = x.new_full((len(x),), start)
        slope = field(t, x, *held)
        steerable = all(map(can_steer, (slope, x, *held)))
        if not (steerable or torch.compiler.is_compiling()):  # which can pause
            raise NotImplementedError(
                "DormandPrince chooses its steps by values, which vmap hides. Pass a batch, or "
                "choose a solver of fixed steps such as RungeKutta4."
            )
        attempt = _recomputed(step, field, t, x, *held) if self.checkpointed else step
        h = _first_step(x.detach(), slope.detach(), tolerance ** (1 / order), span)
        rows = torch.arange(len(x), device=x.device)
        arrived: list[tuple[Tensor, Tensor]] = []

        for _ in range(self.steps):
            left = (stop - t).abs()
            last = h >= left * (1 - 1e-6)
            h = torch.where(last, left, h)
            new, end, ratio = attempt(t, h, x, slope, *held)
            good = ratio <= 1  # and so not NaN
            kept = good.nonzero().squeeze(-1)
            if len(kept) == len(x):
                x, slope = new, end
            elif len(kept):
                if ratio.isfinite().all():
                    new, end = new[kept], end[kept]
                else:  # a row that overflows must not spoil the gradients of the others
                    new, end, _ = attempt(*(v[kept] for v in (t, h, x, slope, *held)))
                x, slope = x.index_copy(0, kept, new), slope.index_copy(0, kept, end)
            t = torch.where(good, torch.where(last, stop, t + sign * h), t)
            growth = 0.9 * ratio.clamp(min=1e-9) ** (-1 / order)
            h = h * growth.nan_to_num(nan=0.2, posinf=0.2).clamp(0.2, 5.0)

            home = good & last
            if home.any():
                arrived.append((rows[home], x[home]))
                on = ~home
                rows, t, h, x, slope = (v[on] for v in (rows, t, h, x, slope))
                held = tuple(v[on] for v in held)
            if not len(rows):
                place = torch.cat([index for index, _ in arrived]).argsort()
                return torch.cat([value for _, value in arrived])[place]
            if (h < 16 * torch.finfo(h.dtype).eps * span).any():
                break
        raise FloatingPointError(
            f"DormandPrince gave up on {len(rows)} rows, one of them at t={t[0].item():.3g} with "
            f"steps of {h[0].item():.1e} for a tolerance of {tolerance:g}. Train the field with "
            "RegularizedLikelihood, loosen the tolerance, or raise steps; a field that is not "
            "finite fails always."
        )


def _error(fine: Tensor, coarse: Tensor | None = None) -> Tensor:
    """Error of a step in units of what is allowed, from one estimate or from two."""
    if coarse is None:
        return fine
    both = (fine.square() + coarse.square() / 100).sqrt()
    return torch.where(fine > 0, fine.square() / both, fine)


def _first_step(x: Tensor, slope: Tensor, part: float, span: float) -> Tensor:
    """Guess a step; too large a one costs a second try, no accuracy."""
    reach = ((1 + x.abs()) / slope.abs()).nan_to_num(nan=0.0).amin(-1)
    return (part * reach).clamp(1e-4 * span, span / 4)
