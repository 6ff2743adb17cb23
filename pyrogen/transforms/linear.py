"""Linear layers: permutations, triangular factors, and activation normalisation."""

__all__ = ["ActNorm", "LULinear", "Permutation"]

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ..inputs import check_batch, check_varied
from .base import Bijection
from .univariate import ShiftScale


class Permutation(nn.Module):
    """Fixed reordering of the features: feature ``i`` of the result is ``order[i]`` of the input.

    Args:
        order: A permutation of ``range(features)``.

    Raises:
        ValueError: If ``order`` is not a permutation.

    Example:
        >>> Permutation.reverse(3)()(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 2., 1.])
    """

    order: Tensor
    undo: Tensor

    def __init__(self, order: Sequence[int] | Tensor) -> None:
        super().__init__()
        index = torch.as_tensor(order)
        integers = index.ndim == 1 and not index.is_floating_point()
        if not integers or sorted(index.tolist()) != list(range(len(index))):
            raise ValueError(
                f"Permutation expected each of 0, ..., features - 1 once, got {index.tolist()}. "
                "Use Permutation.reverse or Permutation.random."
            )
        self.register_buffer("order", index)
        self.register_buffer("undo", index.argsort())

    @classmethod
    def reverse(cls, features: int) -> Self:
        """Last feature first."""
        return cls(torch.arange(features).flip(0))

    @classmethod
    def random(cls, features: int) -> Self:
        """An order drawn now and kept from then on."""
        return cls(torch.randperm(features))

    def forward(self, context: Tensor | None = None) -> Bijection:
        return _Permutation(self.order, self.undo)


class _Permutation(Bijection):
    def __init__(self, order: Tensor, undo: Tensor) -> None:
        super().__init__()
        self.order = order
        self.undo = undo

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., self.order], x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y[..., self.undo], y.new_zeros(y.shape[:-1])


class LULinear(nn.Module):
    r"""Trainable map :math:`y = LUx + b` with :math:`L` unit lower, :math:`U` upper triangular.

    The diagonal of :math:`U` is :math:`e^{d}`, so the map is always invertible and its
    log-determinant is :math:`\sum_i d_i`. It starts as the identity. Cost: two triangular
    products, or solves, of ``features ** 2`` each.

    Args:
        features: Number of features.

    References:
        Oliva, Dubey, Zaheer, Póczos, Salakhutdinov, Xing, Schneider. Transformation
        Autoregressive Networks. ICML 2018. arXiv:1801.09819
        Kingma, Dhariwal. Glow: Generative Flow with Invertible 1x1 Convolutions.
        NeurIPS 2018. arXiv:1807.03039

    Example:
        >>> LULinear(2)()(torch.tensor([1.0, 2.0]))
        tensor([1., 2.], grad_fn=<AddBackward0>)
    """

    below: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("below", torch.ones(features, features).tril(-1), persistent=False)
        self.entries = nn.Parameter(torch.zeros(features, features))  # below: L, above: U
        self.log_diagonal = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, context: Tensor | None = None) -> Bijection:
        return _LULinear(self)


class _LULinear(Bijection):
    def __init__(self, layer: LULinear) -> None:
        super().__init__()
        self.layer = layer

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, bias, ladj = self._factors()
        return x @ upper.T @ lower.T + bias, ladj.expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, bias, ladj = self._factors()
        rows = (y - bias).reshape(-1, y.shape[-1])
        rows = torch.linalg.solve_triangular(lower.T, rows, upper=True, left=False)
        rows = torch.linalg.solve_triangular(upper.T, rows, upper=False, left=False)
        return rows.reshape(y.shape), -ladj.expand(y.shape[:-1])

    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        layer, diagonal = self.layer, self.layer.log_diagonal
        lower = layer.entries * layer.below + torch.eye(len(diagonal)).to(diagonal)
        upper = layer.entries * layer.below.T + diagonal.exp().diag()
        return lower, upper, layer.bias, diagonal.sum()


class ActNorm(nn.Module):
    """Trainable shift and scale, set from the first training batch that comes by.

    The first batch that is taken from data to noise in training mode leaves with mean 0 and
    standard deviation 1; from then on shift and scale are ordinary parameters. The state dict
    remembers that this has happened.

    Args:
        features: Number of features.

    Raises:
        ValueError: If the first batch holds fewer than two data, or a constant feature.

    References:
        Kingma, Dhariwal. Glow: Generative Flow with Invertible 1x1 Convolutions.
        NeurIPS 2018. arXiv:1807.03039

    Example:
        >>> layer = ActNorm(2)
        >>> layer().inv(torch.tensor([[1.0, 20.0], [3.0, 40.0]])).detach()
        tensor([[-0.7071, -0.7071],
                [ 0.7071,  0.7071]])
    """

    ready: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))
        self.register_buffer("ready", torch.tensor(False))  # noqa: FBT003

    def forward(self, context: Tensor | None = None) -> Bijection:
        return _ActNorm(self)


class _ActNorm(Bijection):
    def __init__(self, layer: ActNorm) -> None:
        super().__init__()
        self.layer = layer

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self._map().call_and_ladj(x)
        return y, ladj.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.layer.training and not self.layer.ready:
            self._start_from(y.detach())
        x, ladj = self._map().inverse_and_ladj(y)
        return x, ladj.sum(-1)

    def _map(self) -> Bijection:
        return ShiftScale(self.layer.log_scale, self.layer.shift)

    def _start_from(self, y: Tensor) -> None:
        layer = self.layer
        check_batch(y, layer.shift.shape, owner="ActNorm", like=layer.shift, at_least=2)
        rows = y.flatten(0, -2)
        check_varied(rows, owner="ActNorm")
        with torch.no_grad():
            layer.shift.copy_(rows.mean(0))
            layer.log_scale.copy_(rows.std(0).log())
            layer.ready.fill_(True)  # noqa: FBT003
