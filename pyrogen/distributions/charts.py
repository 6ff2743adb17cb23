"""Bijections from real vectors onto simplices, ordered vectors and matrices.

Each works without cancellation: what is left of a stick, or of a row, is a sum of the entries that
follow and never a difference from one, so both directions keep single precision.
"""

__all__ = [
    "Correlation",
    "CorrelationMatrix",
    "LowerTriangular",
    "PositiveDefinite",
    "PositiveOrdered",
    "StickBreaking",
]

import math
from abc import abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Size, Tensor

from ..transforms import Bijection


class StickBreaking(Bijection):
    r"""From real vectors onto the simplex: each number breaks its part off what is left.

    .. math:: y_i = \sigma(x_i - \log(K - i)) \prod_{j < i} \big(1 - \sigma(x_j - \log(K - j))\big)

    The same map as torch's ``StickBreakingTransform``; zeros give the centre.

    Example:
        >>> StickBreaking()(torch.zeros(2))
        tensor([0.3333, 0.3333, 0.3333])
    """

    codomain = constraints.simplex

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x - _centre(x)
        taken, left = F.logsigmoid(x), F.logsigmoid(-x)
        before = F.pad(left.cumsum(-1), (1, 0))
        y = (F.pad(taken, (0, 1)) + before).exp()
        return y, (taken + left + before[..., :-1]).sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rest = _sum_of_later(y)[..., :-1]  # not 1 - cumsum, which cancels
        x = y[..., :-1].log() - rest.log()
        ladj = -(F.logsigmoid(x) + y[..., 1:].flip(-1).cumsum(-1).flip(-1).log()).sum(-1)
        return x + _centre(x), ladj

    def forward_shape(self, shape: Iterable[int]) -> Size:
        *batch, size = shape
        return Size((*batch, size + 1))

    def inverse_shape(self, shape: Iterable[int]) -> Size:
        *batch, size = shape
        return Size((*batch, size - 1))


class PositiveOrdered(Bijection):
    r"""From real vectors onto positive ascending ones, :math:`y_i = \sum_{j \le i} e^{x_j}`.

    Pyro's own map is an exponential of exponentials, which overflows at moderate numbers.
    """

    codomain = constraints.ordered_vector

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.exp().cumsum(-1), x.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = y.diff(dim=-1, prepend=torch.zeros_like(y[..., :1])).log()
        return x, -x.sum(-1)


class LowerTriangular(Bijection):
    """From real vectors onto lower triangular matrices with a positive diagonal, row by row."""

    codomain = constraints.lower_cholesky

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower = _to_lower(x, 0)
        log_diagonal = lower.diagonal(dim1=-2, dim2=-1)
        return lower.tril(-1) + log_diagonal.exp().diag_embed(), log_diagonal.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        log_diagonal = _log_diagonal(y)
        x = _from_lower(y.tril(-1) + log_diagonal.diag_embed(), 0)
        return x, -log_diagonal.sum(-1)

    def forward_shape(self, shape: Iterable[int]) -> Size:
        return _matrix_shape(shape, 0)

    def inverse_shape(self, shape: Iterable[int]) -> Size:
        return _vector_shape(shape, 0)


class Correlation(Bijection):
    r"""From real vectors onto Cholesky factors of correlation matrices.

    .. math:: L_{ij} = \tanh(x_{ij}) \prod_{k < j} \mathrm{sech}(x_{ik}), \qquad
        L_{ii} = \prod_{k < i} \mathrm{sech}(x_{ik})

    The same map as torch's ``CorrCholeskyTransform``, which clips at the borders.
    """

    codomain = constraints.corr_cholesky

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = _to_lower(x, -1)
        log_sech = math.log(2) + x - F.softplus(2 * x)  # zero above the diagonal
        before = F.pad(log_sech.cumsum(-1)[..., :-1], (1, 0)).exp()
        y = (x.tanh() + _eye(x)) * before
        return y, (self._weight(x) * log_sech).sum((-2, -1))

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = y.tril()
        left = _sum_of_later(y.square()) + torch.ones_like(y).triu()  # 1 where it is not used
        x = (y.tril(-1) / left.sqrt()).asinh()
        log_sech = math.log(2) + x - F.softplus(2 * x)
        return _from_lower(x, -1), -(self._weight(x) * log_sech).sum((-2, -1))

    @staticmethod
    def _weight(x: Tensor) -> Tensor:
        """How often each sech counts: twice for itself, once for each later entry of its row."""
        i = torch.arange(x.shape[-1], device=x.device)
        return (i[:, None] - i + 1).to(x.dtype).tril(-1)

    def forward_shape(self, shape: Iterable[int]) -> Size:
        return _matrix_shape(shape, -1)

    def inverse_shape(self, shape: Iterable[int]) -> Size:
        return _vector_shape(shape, -1)


class _Gram(Bijection):
    """The square of the Cholesky factor that ``root`` makes."""

    root: Bijection

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, ladj = self.root.call_and_ladj(x)
        square = lower @ lower.mT
        return self._tidy((square + square.mT) / 2), ladj + self._ladj(_log_diagonal(lower))

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        lower, info = torch.linalg.cholesky_ex(y)
        # NaN and no exception: a sampler takes it for a divergence, and validation comes before.
        lower = lower.masked_fill((info > 0)[..., None, None], torch.nan)
        x, ladj = self.root.inverse_and_ladj(lower)
        return x, ladj - self._ladj(_log_diagonal(lower))

    @abstractmethod
    def _ladj(self, log_diagonal: Tensor) -> Tensor:
        """Log-determinant of squaring a factor of this diagonal."""

    def _tidy(self, square: Tensor) -> Tensor:
        return square

    def forward_shape(self, shape: Iterable[int]) -> Size:
        return self.root.forward_shape(shape)

    def inverse_shape(self, shape: Iterable[int]) -> Size:
        return self.root.inverse_shape(shape)


class PositiveDefinite(_Gram):
    """From real vectors onto positive definite matrices."""

    codomain = constraints.positive_definite
    root = LowerTriangular()

    def _ladj(self, log_diagonal: Tensor) -> Tensor:
        return log_diagonal.shape[-1] * math.log(2) + _countdown(log_diagonal, 0)


class CorrelationMatrix(_Gram):
    """From real vectors onto correlation matrices.

    With many rows they are nearly singular. Of those that standard normal numbers give, a tenth at
    12 rows and nine tenths at 20 are no longer positive definite once their entries, however well
    computed, are rounded to single precision. :class:`Correlation` keeps what they lose.
    """

    codomain = constraints.corr_matrix
    root = Correlation()

    def _ladj(self, log_diagonal: Tensor) -> Tensor:
        return _countdown(log_diagonal, 1)

    def _tidy(self, square: Tensor) -> Tensor:
        return square.tril(-1) + square.triu(1) + _eye(square)  # the diagonal is 1, not nearly 1


def _countdown(x: Tensor, end: int) -> Tensor:
    """Sum of the entries, the last ``1 - end`` times and each other once more than the next."""
    weight = torch.arange(x.shape[-1], 0, -1, device=x.device) - end
    return (weight.to(x.dtype) * x).sum(-1)


def _log_diagonal(lower: Tensor) -> Tensor:
    return lower.diagonal(dim1=-2, dim2=-1).log()


def _centre(x: Tensor) -> Tensor:
    """Log-odds of leaving as much for each of those that follow."""
    return torch.arange(x.shape[-1], 0, -1, device=x.device).to(x.dtype).log()


def _sum_of_later(y: Tensor) -> Tensor:
    return F.pad(y[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)


def _eye(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _side(entries: int, offset: int) -> int:
    """Rows of a matrix with so many entries on and below the diagonal, or below it."""
    entries = int(entries)  # a tensor while torch.jit traces
    side = round((0.25 + 2 * entries) ** 0.5 - 0.5) - offset
    if entries < 1 or side * (side + 1 + 2 * offset) // 2 != entries:
        inside = "below the diagonal" if offset else "on and below the diagonal"
        raise ValueError(
            f"A matrix of n rows has {'n (n - 1)' if offset else 'n (n + 1)'} / 2 entries "
            f"{inside}, got {entries}."
        )
    return side


def _to_lower(x: Tensor, offset: int) -> Tensor:
    side = _side(x.shape[-1], offset)
    i, j = torch.tril_indices(side, side, offset, device=x.device)
    where = torch.zeros(side * side, dtype=torch.long, device=x.device)
    where[i * side + j] = torch.arange(x.shape[-1], device=x.device)
    return x[..., where].unflatten(-1, (side, side)).tril(offset)


def _from_lower(y: Tensor, offset: int) -> Tensor:
    i, j = torch.tril_indices(y.shape[-2], y.shape[-1], offset, device=y.device)
    return y[..., i, j]


def _matrix_shape(shape: Iterable[int], offset: int) -> Size:
    *batch, entries = shape
    side = _side(entries, offset)
    return Size((*batch, side, side))


def _vector_shape(shape: Iterable[int], offset: int) -> Size:
    *batch, rows, columns = shape
    if rows != columns:
        raise ValueError(f"Expected a square matrix, got {rows} rows and {columns} columns.")
    return Size((*batch, rows * (rows + 1 + 2 * offset) // 2))
