"""Coupling layers: one half of the features sets how the other half moves."""

__all__ = ["Coupling", "Halves"]

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..inputs import check_context
from ..nets import mlp
from .base import Bijection, SizedBijection
from .elementwise import start_at_zero
from .univariate import AFFINE, Univariate


class Halves(nn.Module, ABC):
    """What couplings of vectors and of images share: which half moves, and by which family.

    Subclasses set ``net``.

    Args:
        features: Number of features of a vector, or channels of an image.
        context: Number of features to condition on; 0 for none.
        elementwise: Family of the maps of the half that moves.
        flip: Move the first half instead of the second.
    """

    domain: constraints.Constraint = constraints.real_vector
    net: nn.Module

    def __init__(
        self, features: int, context: int, *, elementwise: Univariate, flip: bool
    ) -> None:
        super().__init__()
        kept, moved = features // 2, features - features // 2
        self.sizes = (moved, kept) if flip else (kept, moved)
        self.shape = (moved, elementwise.parameters)
        self.context = context
        self.elementwise = elementwise
        self.flip = flip

    @abstractmethod
    def maps(self, a: Tensor, context: Tensor | None) -> Bijection:
        """Return the elementwise maps of the half that moves, given the half that stays.

        Args:
            a: What stays, with its batch first.
            context: Shape ``(*batch, context)``, or None.
        """

    def forward(self, context: Tensor | None = None) -> Bijection:
        check_context(context, self.context, owner=type(self).__name__)
        return _Coupling(self, context)


class Coupling(Halves):
    r"""Trainable map :math:`(a, b) \mapsto (a, T(b; \theta(a)))`; both directions are one pass.

    It starts as the identity. One layer leaves ``a`` where it is: stack layers with ``flip``
    alternating, or with permutations between them.

    Args:
        features: Number of features, at least 2.
        context: Number of features to condition on; 0 for none.
        elementwise: Family of the maps :math:`T`.
        flip: Move the first half instead of the second.
        hidden: Widths of the hidden layers of the network for :math:`\theta`.
        embedding: What the network sees of ``a``: module ``(*batch, kept) -> (*batch, any)``,
            such as the cosine and sine of angles; ``a`` itself if None.

    Raises:
        ValueError: If there are fewer than 2 features, or the context does not fit.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP. ICLR 2017.
        arXiv:1605.08803

    Example:
        >>> layer = Coupling(4, context=2)
        >>> y, ladj = layer(torch.zeros(2)).call_and_ladj(torch.randn(5, 4))
        >>> y.shape, ladj.shape
        (torch.Size([5, 4]), torch.Size([5]))
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        elementwise: Univariate = AFFINE,
        flip: bool = False,
        hidden: Sequence[int] = (64, 64),
        embedding: nn.Module | None = None,
    ) -> None:
        if features < 2:
            raise ValueError(
                f"Coupling expected at least 2 features, got {features}. For one feature use "
                "Elementwise or Autoregressive."
            )
        super().__init__(features, context, elementwise=elementwise, flip=flip)
        self.embedding = nn.Identity() if embedding is None else embedding
        seen = features // 2 if embedding is None else _outputs(embedding, features // 2)
        self.net = start_at_zero(mlp(seen + context, math.prod(self.shape), hidden))

    def maps(self, a: Tensor, context: Tensor | None) -> Bijection:
        a = self.embedding(a)
        if context is not None:
            batch = torch.broadcast_shapes(a.shape[:-1], context.shape[:-1])
            a = torch.cat([a.expand(*batch, -1), context.expand(*batch, -1)], dim=-1)
        return self.elementwise(self.net(a).unflatten(-1, self.shape))


def _outputs(net: nn.Module, inputs: int) -> int:
    """Number of outputs of a network, asked of it where and in the precision that it lives."""
    tensors = chain(net.parameters(), net.buffers())
    like = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
    with torch.no_grad():
        return net(like.new_zeros(inputs)).shape[-1]


class _Coupling(SizedBijection):
    def __init__(self, layer: Halves, context: Tensor | None) -> None:
        self.domain = self.codomain = layer.domain
        batch_shape = () if context is None else context.shape[:-1]
        super().__init__(sum(layer.sizes), batch_shape, owner=type(layer).__name__)
        self.layer = layer
        self.context = context

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self._split(x)
        b, ladj = self.layer.maps(a, self.context).call_and_ladj(b)
        return self._join(a, b), ladj.flatten(self._dim).sum(-1)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self._split(y)
        b, ladj = self.layer.maps(a, self.context).inverse_and_ladj(b)
        return self._join(a, b), ladj.flatten(self._dim).sum(-1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = x.split(self.layer.sizes, dim=self._dim)
        return (right, left) if self.layer.flip else (left, right)

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        a = a.expand(*b.shape[: self._dim], *a.shape[self._dim :])
        return torch.cat([b, a] if self.layer.flip else [a, b], dim=self._dim)
