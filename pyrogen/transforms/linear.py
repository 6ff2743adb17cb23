"""Linear layers: permutations, reflections, triangular factors, activation normalisation."""

__all__ = [
    "ActNorm",
    "Householder",
    "LULinear",
    "Permutation",
    "Reflections",
]

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..inputs import check_batch, check_positive, check_varied, is_permutation
from .base import Bijection, SizedBijection
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
        if not is_permutation(index):
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


class _Permutation(SizedBijection):
    def __init__(self, order: Tensor, undo: Tensor) -> None:
        super().__init__(len(order), owner="Permutation")
        self.order = order
        self.undo = undo

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., self.order], x.new_zeros(x.shape[:-1])

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y[..., self.undo], y.new_zeros(y.shape[:-1])


class Householder(nn.Module):
    r"""Trainable orthogonal map :math:`y = H_K \cdots H_1 x`, :math:`H_i = I - 2 v_i v_i^\top`.

    Lengths and volumes are kept, the log-determinant is 0, and the inverse is the transpose.
    With ``features`` reflections every orthogonal matrix of determinant
    :math:`(-1)^K` is within reach. It starts as a random one. Cost: two products with the
    ``reflections`` vectors, whatever their number, by the compact form of :class:`Reflections`.

    Args:
        features: Number of features.
        reflections: Number :math:`K` of reflections; ``features`` if None.

    Raises:
        ValueError: If there are no features or no reflections.

    References:
        Tomczak, Welling. Improving Variational Auto-Encoders using Householder Flow.
        NeurIPS workshop 2016. arXiv:1611.09630

    Example:
        >>> layer = Householder(3)
        >>> x = torch.tensor([3.0, 0.0, 4.0])
        >>> layer()(x).norm()
        tensor(5., grad_fn=<LinalgVectorNormBackward0>)
    """

    def __init__(self, features: int, reflections: int | None = None) -> None:
        super().__init__()
        reflections = features if reflections is None else reflections
        if features < 1 or reflections < 1:
            raise ValueError(
                f"Householder expected at least 1 feature and 1 reflection, got {features} and "
                f"{reflections}. For the identity leave the layer out."
            )
        self.vectors = nn.Parameter(torch.randn(reflections, features))

    def forward(self, context: Tensor | None = None) -> Bijection:
        return Reflections(self.vectors)


class Reflections(SizedBijection):
    r"""The product of reflections along given vectors, in their order.

    With the unit vectors as rows of :math:`V`, it is :math:`x - V^\top T^\top V x`, where
    :math:`T^{-1}` is upper triangular: ½ on the diagonal, :math:`V V^\top` above it.

    Args:
        vectors: Normals of the mirrors, of any length, shape ``(*batch, reflections, features)``;
            a vector of zeros reflects nothing.

    References:
        Joffrain, Low, Quintana-Ortí, van de Geijn, Van Zee. Accumulating Householder
        transformations, revisited. ACM Transactions on Mathematical Software 32(2), 2006.

    Example:
        >>> Reflections(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))(torch.tensor([1.0, 2.0]))
        tensor([-1., -2.])
    """

    def __init__(self, vectors: Tensor) -> None:
        super().__init__(vectors.shape[-1], vectors.shape[:-2], owner="Reflections")
        self.vectors = vectors

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        vectors, above = self._compact()
        return self._reflect(x, vectors, torch.linalg.solve_triangular(above, vectors, upper=True))

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        vectors, above = self._compact()
        below = above.mT
        return self._reflect(
            y, vectors, torch.linalg.solve_triangular(below, vectors, upper=False)
        )

    def columns(self, count: int) -> Tensor:
        """The first columns of the matrix, laid in rows: shape ``(*batch, count, features)``."""
        vectors, above = self._compact()
        first = torch.eye(count, vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
        return first - first @ vectors.mT @ torch.linalg.solve_triangular(
            above, vectors, upper=True
        )

    def _compact(self) -> tuple[Tensor, Tensor]:
        vectors = nn.functional.normalize(self.vectors, dim=-1)
        half = vectors.new_full(vectors.shape[-2:-1], 0.5).diag()
        return vectors, (vectors @ vectors.mT).triu(1) + half

    def _reflect(self, x: Tensor, vectors: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        if vectors.ndim == 2:  # one product for the whole batch
            y = x - x @ vectors.mT @ turned
        else:
            y = x - (x.unsqueeze(-2) @ vectors.mT @ turned).squeeze(-2)
        return y, y.new_zeros(y.shape[:-1])


class LULinear(nn.Module):
    r"""Trainable map :math:`y = LUx + b` with :math:`L` unit lower, :math:`U` upper triangular.

    The diagonal of :math:`U` is :math:`e^{d}`, so the map is always invertible and its
    log-determinant is :math:`\sum_i d_i`. It starts as the identity. Cost: two triangular
    products, or solves, of ``features ** 2`` each.

    Args:
        features: Number of features.

    Raises:
        ValueError: If there are no features.

    References:
        Oliva, Dubey, Zaheer, Póczos, Salakhutdinov, Xing, Schneider. Transformation
        Autoregressive Networks. ICML 2018. arXiv:1801.09819
        Kingma, Dhariwal. Glow: Generative Flow with Invertible 1x1 Convolutions.
        NeurIPS 2018. arXiv:1807.03039

    Example:
        >>> LULinear(2)()(torch.tensor([1.0, 2.0]))
        tensor([1., 2.], grad_fn=<AddBackward0>)
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check_positive("LULinear", feature=features)
        self.entries = nn.Parameter(torch.zeros(features, features))  # below: L, above: U
        self.log_diagonal = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, context: Tensor | None = None) -> Bijection:
        return _LULinear(self)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return :math:`L`, :math:`U` and the log-determinant of their product."""
        lower = self.entries.tril(-1) + torch.ones_like(self.bias).diag()
        upper = self.entries.triu(1) + self.log_diagonal.exp().diag()
        return lower, upper, self.log_diagonal.sum()


class _LULinear(SizedBijection):
    def __init__(self, layer: LULinear) -> None:
        super().__init__(len(layer.bias), owner="LULinear")
        self.layer = layer

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, ladj = self.layer.factors()
        if math.prod(x.shape[:-1]) < self.features:
            y = x @ upper.T @ lower.T + self.layer.bias
        else:  # a product of the factors, and one of the batch
            y = nn.functional.linear(x, lower @ upper, self.layer.bias)
        return y, ladj.expand(x.shape[:-1])

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, ladj = self.layer.factors()
        rows = (y - self.layer.bias).reshape(-1, y.shape[-1])
        rows = torch.linalg.solve_triangular(lower.T, rows, upper=True, left=False)
        rows = torch.linalg.solve_triangular(upper.T, rows, upper=False, left=False)
        return rows.reshape(y.shape), -ladj.expand(y.shape[:-1])


class ActNorm(nn.Module):
    """Trainable shift and scale, set from the first training batch that comes by.

    The first batch that is taken from data to noise in training mode leaves with mean 0 and
    standard deviation 1; from then on shift and scale are ordinary parameters. The state dict
    remembers that this has happened.

    Args:
        features: Number of features.
        shared: Number of dimensions after the features whose entries share shift and scale:
            2 for the pixels of images, whose features are channels.

    Raises:
        ValueError: If there are no features, or the first batch holds fewer than two data or a
            constant feature.

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

    def __init__(self, features: int, *, shared: int = 0) -> None:
        super().__init__()
        check_positive("ActNorm", feature=features)
        self.shared = shared
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))
        self.register_buffer("ready", torch.tensor(False))  # noqa: FBT003

    def forward(self, context: Tensor | None = None) -> Bijection:
        return _ActNorm(self)


class _ActNorm(SizedBijection):
    def __init__(self, layer: ActNorm) -> None:
        if layer.shared:
            self.domain = self.codomain = constraints.independent(
                constraints.real, 1 + layer.shared
            )
        super().__init__(len(layer.shift), owner="ActNorm")
        self.layer = layer

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self._map().call_and_ladj(x)
        return y, ladj.flatten(self._dim).sum(-1)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.layer.training and not self.layer.ready:
            self._start_from(y.detach())
        x, ladj = self._map().inverse_and_ladj(y)
        return x, ladj.flatten(self._dim).sum(-1)

    def _map(self) -> Bijection:
        shape = (-1, *[1] * self.layer.shared)
        return ShiftScale(self.layer.log_scale.view(shape), self.layer.shift.view(shape))

    def _start_from(self, y: Tensor) -> None:
        layer = self.layer
        y = y.movedim(-1 - layer.shared, -1)
        check_batch(y, layer.shift.shape, owner="ActNorm", like=layer.shift, at_least=2)
        rows = y.flatten(0, -2)
        check_varied(rows, owner="ActNorm")
        with torch.no_grad():
            layer.shift.copy_(rows.mean(0))
            layer.log_scale.copy_(rows.std(0).log())
            layer.ready.fill_(True)  # noqa: FBT003
