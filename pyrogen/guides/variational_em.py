"""Posteriors that follow the model: each made best for it before it moves."""

__all__ = ["VariationalEM"]

from typing import Any, cast

import torch
from pyro import poutine
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from .at import At, refine
from .local import Local
from .refinement import Refinement


class VariationalEM(nn.Module):
    r"""Loss of the model at the posteriors that are best for it: optimise these, then it.

    For each minibatch, with the model's parameters :math:`\theta` as they are,

    .. math:: \lambda_i \leftarrow \text{steps of descent on } L_i(\theta, \lambda_i)
        \quad\text{for its data } i, \qquad \text{then return }
        \sum_i L_i(\theta, \lambda_i),

    whose gradient in :math:`\theta` is that of the bound at the :math:`\lambda_i` reached. They
    are kept, and descent goes on from them when the datum comes again. It starts with an optimizer
    of its own each time, so the rows of all other data stay where they are. What the posteriors
    share, such as the flow of a :class:`~pyrogen.guides.FlowFamily`, moves with the model.

    In evaluation mode the posteriors stay as they are.

    Cost: one run of guide and model per step of descent, and one for the loss.

    Args:
        bound: ``loss(model, guide)`` with a guide that is :class:`Local`.
        refinement: The steps, such as :class:`~pyrogen.guides.Descent`. Its loss may be another.

    Raises:
        TypeError: If the guide is not :class:`Local`.
        FloatingPointError: If the steps diverge.

    References:
        Neal, Hinton. A View of the EM Algorithm that Justifies Incremental, Sparse, and Other
        Variants. Learning in Graphical Models, 1998.
        Ranganath, Gerrish, Blei. Black Box Variational Inference. AISTATS 2014. arXiv:1401.0118

    Example:
        >>> from pyrogen.guides import Descent
        >>> from pyrogen.objectives import ELBO
        >>> loc = nn.Parameter(torch.zeros(()))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> loss, x = ELBO(), torch.tensor([3.0, 5.0])
        >>> em = VariationalEM(loss(model, Local(model)), Descent(loss, steps=100, lr=0.2))
        >>> em(x).backward()
        >>> loc.grad < -3.0  # the sum of loc - z, where z is near x / 2
        tensor(True)
    """

    def __init__(self, bound: ELBOModule, refinement: Refinement) -> None:
        super().__init__()
        if not isinstance(bound, ELBOModule):
            raise TypeError(
                f"VariationalEM expected a bound of a model and a guide, got "
                f"{type(bound).__name__}. Pass loss(model, guide)."
            )
        guide = bound.guide
        if not isinstance(guide, Local):
            raise TypeError(
                f"VariationalEM expected a bound whose guide is Local, got "
                f"{type(guide).__name__}. To refine what an encoder says, use Refined."
            )
        self.bound = bound
        self.refinement = refinement
        self._at = (At(guide),)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        guide, (at,) = cast(Local, self.bound.guide), self._at
        guide.setup(*args, **kwargs)
        with poutine.block():
            plate = guide._create_plates(*args, **kwargs)[guide._plate]
            numbers = guide._read(plate, *args, **kwargs).detach()
        if self.training:
            numbers = refine(at, self.refinement, numbers, plate, args, kwargs).detach()
            with torch.no_grad():
                guide.table[plate.indices] = numbers.reshape(len(numbers), -1)
        at.setup(*args, **kwargs)
        with at.holding(numbers, plate):
            loss = cast(Any, self.bound.elbo)
            return loss.differentiable_loss(self.bound.model, at, *args, **kwargs)
