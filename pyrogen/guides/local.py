"""Posteriors of each datum's own: no encoder, one row of a table for every datum."""

__all__ = ["Local", "VariationalEM"]

from collections.abc import Callable
from typing import Any, cast

import torch
from pyro import poutine
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from .amortized import Amortized
from .families import Family
from .refined import At, refine
from .refinement import Refinement


class Local(Amortized):
    r"""Posterior of the local latents of a plate, with parameters of its own for each datum.

    .. math:: q(z_i) = q_{\lambda_i}(z_i), \qquad i = 1, \dots, N,

    where an :class:`~pyrogen.guides.Amortized` guide has :math:`\lambda_i = e(x_i)`: no encoder
    limits it, and nothing is known of a new datum. A table holds one row :math:`\lambda_i` for
    each datum of the plate in full; a subsample of the plate picks its rows. All rows start at
    zero.

    As an ordinary guide it is trained with the model, by any loss. An optimizer with momentum
    then moves rows whose datum is not in the minibatch; :class:`VariationalEM` does not.

    Args:
        model: Model whose latents all lie in one plate, once those outside are hidden by
            ``poutine.block``. Minibatches are subsamples of the plate:
            ``pyro.plate("data", n, subsample=rows)``.
        family: Laws to choose from; :class:`~pyrogen.guides.Diagonal` if None.
        plate: Name of the data's plate. If None, of those that hold every latent, the one that is
            subsampled, or else the outermost.
        create_plates: As in Pyro's autoguides.

    Raises:
        NotImplementedError: If a latent is discrete or global, or no plate holds all latents.
        ValueError: If no latent is found, or the plate's size is not that of the first run.

    References:
        Hoffman, Blei, Wang, Paisley. Stochastic Variational Inference. JMLR 2013. arXiv:1206.7051
        Ranganath, Gerrish, Blei. Black Box Variational Inference. AISTATS 2014. arXiv:1401.0118

    Example:
        >>> def model(x, rows=None):
        ...     with pyro.plate("data", len(x), subsample=rows) as rows:
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])
        >>> guide = Local(model).setup(torch.zeros(100))
        >>> guide(torch.zeros(100), torch.tensor([7, 3]))["z"].shape
        torch.Size([2])
        >>> guide.posterior(torch.tensor([7]))["z"].stddev.shape
        torch.Size([1])
    """

    def __init__(
        self,
        model: Callable,
        *,
        family: Family | None = None,
        plate: str | None = None,
        create_plates: Callable | None = None,
    ) -> None:
        super().__init__(model, _Table(), family=family, plate=plate, create_plates=create_plates)

    @property
    def table(self) -> nn.Parameter:
        """The numbers of every datum, shape ``(data, family.outputs)``.

        Raises:
            RuntimeError: If the guide has not seen a run of its model.
        """
        self._refuse_unseen()
        return cast(_Table, self._encoder).rows

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        trace = cast(Any, self.prototype_trace)
        value = next(trace.iter_stochastic_nodes())[1]["value"]
        with poutine.block():
            plate = self._create_plates(*args, **kwargs)[self._plate]
        cast(_Table, self._encoder).build(plate.size, self._family.outputs, value)

    def _read(self, plate: Any, *args: Any, **kwargs: Any) -> Tensor:
        if plate.size != len(self.table):
            raise ValueError(
                f"Local holds the posteriors of {len(self.table)} data, and plate {plate.name!r} "
                f"has {plate.size}. Make a new guide for other data, or use Amortized."
            )
        return self._encode(plate.indices, None, plate_dim=plate.dim)

    def _encode(self, x: Tensor, context: Tensor | None, *, plate_dim: int) -> Tensor:
        if x.dtype != torch.long or x.ndim != 1:
            raise TypeError(
                f"Local expected the numbers of data, integers of shape (batch,), got {x.dtype} "
                f"of shape {tuple(x.shape)}. Pass rows of the plate, such as torch.arange(10)."
            )
        rows = self.table[x.to(self.table.device)]
        return rows.reshape(len(x), *[1] * (-plate_dim - 1), -1)


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


class _Table(nn.Module):
    """Rows of numbers, zero at first, for as many data as the first run shows."""

    def build(self, data: int, outputs: int, like: Tensor) -> None:
        if "rows" not in self._parameters:
            self.rows = nn.Parameter(like.new_zeros(data, outputs))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Build the table that was saved, if the model has not run yet."""
        rows = state_dict.get(f"{prefix}rows")
        if rows is not None:
            self.build(len(rows), rows.shape[1], rows)
        super()._load_from_state_dict(state_dict, prefix, *args)
