"""Posteriors of each datum's own: no encoder, one row of a table for every datum."""

__all__ = ["Local"]

from collections.abc import Callable
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from .families import Family
from .per_datum import PerDatum


class Local(PerDatum):
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

    def joint(self, rows: Tensor) -> dist.TorchDistribution:
        """Return the law of a datum's unconstrained latents, side by side in the model's order.

        Args:
            rows: Numbers of data in the plate, integers of shape ``(batch,)``.

        Returns:
            Distribution of batch shape ``(len(rows),)`` and event shape ``(latents,)``.

        Raises:
            RuntimeError: If the guide has not seen a run of its model.
            TypeError: If the rows are not integers.
            ValueError: If the guide has no such rows.
        """
        return self._family(self._look_up(self._known(rows)))

    def posterior(self, rows: Tensor) -> dict[str, dist.TorchDistribution]:
        """Return the posterior of every site of some data, batch shape ``(len(rows), *inner)``.

        Args:
            rows: Numbers of data in the plate, integers of shape ``(batch,)``.

        Raises:
            RuntimeError: If the guide has not seen a run of its model.
            NotImplementedError: If the family ties several sites, or the cells of a plate.
            TypeError: If the rows are not integers.
            ValueError: If the guide has no such rows.
        """
        return self._posterior(self._look_up(self._known(rows)))

    def _build(self, like: Tensor, *args: Any, **kwargs: Any) -> None:
        with poutine.block():
            plate = self._create_plates(*args, **kwargs)[self._plate]
        cast(_Table, self._encoder).build(plate.size, self._family.outputs, like)

    def _read(self, plate: Any, *args: Any, **kwargs: Any) -> Tensor:
        if plate.size != len(self.table):
            raise ValueError(
                f"Local holds the posteriors of {len(self.table)} data, and plate {plate.name!r} "
                f"has {plate.size}. Make a new guide for other data, or use Amortized."
            )
        numbers = self._look_up(plate.indices)
        return numbers.reshape(len(numbers), *[1] * (-plate.dim - 1), -1)

    def _look_up(self, rows: Tensor) -> Tensor:
        return self.table[rows.to(self.table.device)]

    def _known(self, rows: Tensor) -> Tensor:
        """The rows, if there are such; those of a plate are."""
        data = len(self.table)
        if not isinstance(rows, Tensor) or rows.dtype != torch.long or rows.ndim != 1:
            got = type(rows).__name__
            if isinstance(rows, Tensor):
                got = f"{rows.dtype} of shape {tuple(rows.shape)}"
            raise TypeError(
                f"Local expected the numbers of data, integers of shape (batch,), got {got}. Pass "
                "rows of the plate, such as torch.arange(10)."
            )
        if rows.numel() and not 0 <= rows.min() <= rows.max() < data:
            raise ValueError(
                f"Local holds the posteriors of {data} data, got rows from {int(rows.min())} to "
                f"{int(rows.max())}. Pass rows in 0, ..., {data - 1}, or use Amortized."
            )
        return rows


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
