"""Steps on the numbers that describe posteriors, out of sight of all that is around."""

__all__ = ["At", "refine"]

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import _DIM_ALLOCATOR
from torch import Tensor, nn

from .per_datum import PerDatum
from .refinement import Refinement


class At(PerDatum):
    """A guide's posteriors at numbers that are given: what steps are taken on.

    Args:
        guide: The guide in question.
    """

    def __init__(self, guide: PerDatum) -> None:
        super().__init__(
            guide.model,
            nn.Identity(),
            family=guide.family,
            plate=guide.plate,
            create_plates=self._as_held,
        )
        self._held: tuple[Any, ...] = ()

    @contextmanager
    def holding(self, numbers: Tensor, plate: Any) -> Iterator[None]:
        """Be the posterior of these numbers, one row for each datum that ``plate`` shows."""
        before, self._held = self._held, (numbers, plate)
        try:
            yield
        finally:
            self._held = before

    def _read(self, plate: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self._held[0]

    def _as_held(self, *args: Any, **kwargs: Any) -> Any:
        _, plate = self._held
        return pyro.plate(plate.name, plate.size, subsample=plate.indices, dim=plate.dim)


def refine(
    at: At,
    refinement: Refinement,
    start: Tensor,
    plate: Any,
    args: tuple,
    kwargs: dict,
    *,
    noise: AbstractContextManager | None = None,
) -> Tensor:
    """Take the steps of a refinement for the data that a plate shows, out of all handlers' sight.

    Args:
        at: The guide, to be held at the numbers in question.
        refinement: The steps.
        start: Numbers to start from, as the guide reads them.
        plate: The data's plate.
        args: Arguments of the model.
        kwargs: Keywords of the model.
        noise: What to be in while the steps are made.

    Raises:
        NotImplementedError: If the numbers are those of several draws of what is given.
        FloatingPointError: If they diverge.
    """
    if start.ndim - 1 > -plate.dim:
        raise NotImplementedError(
            f"{type(refinement).__name__} expected one row of numbers for each of "
            f"{plate.subsample_size} data, got {tuple(start.shape)}: one for each of many draws "
            "of the sites given. Draw them one at a time: vectorize_particles=False."
        )
    share = poutine.scale(scale=plate.subsample_size / plate.size)  # each datum counts once
    model, guide = share(at.model), share(at)
    loss = cast(Any, refinement.loss)

    def objective(numbers: Tensor) -> Tensor:
        _check_finite(numbers, refinement)
        with at.holding(numbers, plate):
            return loss.differentiable_loss(model, guide, *args, **kwargs)

    with _alone(), torch.enable_grad():
        at.setup(*args, **kwargs)
        if math.isinf(loss.max_plate_nesting):
            objective(start.detach())  # the first run looks at the plates, with noise of its own
        with noise or nullcontext():
            end = refinement(objective, start)
    _check_finite(end, refinement)
    return end


def _check_finite(numbers: Tensor, refinement: Refinement) -> None:
    if not numbers.isfinite().all():
        raise FloatingPointError(
            f"{type(refinement).__name__} diverged within {refinement.steps} steps. Lower its "
            "learning rate, or look for NaN in the data."
        )


@contextmanager
def _alone() -> Iterator[None]:
    """Run what is inside as if nothing were around it: no handler, and no plate."""
    around, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        with poutine.block():
            yield
    finally:
        _DIM_ALLOCATOR._stack = around
