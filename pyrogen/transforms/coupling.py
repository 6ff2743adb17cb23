"""Coupling layers: one half of the features sets how the other half moves."""

__all__ = ["Coupling"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..inputs import check_context
from ..nets import mlp
from .base import Bijection
from .elementwise import start_at_zero
from .univariate import AFFINE, Univariate


class Coupling(nn.Module):
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
        super().__init__()
        if features < 2:
            raise ValueError(
                f"Coupling expected at least 2 features, got {features}. For one feature use "
                "Elementwise or Autoregressive."
            )
        kept, moved = features // 2, features - features // 2
        self.sizes = (moved, kept) if flip else (kept, moved)
        self.shape = (moved, elementwise.parameters)
        self.context = context
        self.elementwise = elementwise
        self.flip = flip
        self.embedding = nn.Identity() if embedding is None else embedding
        seen = self.embedding(torch.zeros(kept)).shape[-1]
        self.net = start_at_zero(mlp(seen + context, moved * elementwise.parameters, hidden))

    def forward(self, context: Tensor | None = None) -> Bijection:
        check_context(context, self.context, owner="Coupling")

        def conditioner(a: Tensor) -> Bijection:
            a = self.embedding(a)
            if context is not None:
                batch = torch.broadcast_shapes(a.shape[:-1], context.shape[:-1])
                a = torch.cat([a.expand(*batch, -1), context.expand(*batch, -1)], dim=-1)
            return self.elementwise(self.net(a).unflatten(-1, self.shape))

        batch_shape = () if context is None else context.shape[:-1]
        return _Coupling(conditioner, self.sizes, batch_shape, flip=self.flip)


class _Coupling(Bijection):
    def __init__(
        self,
        conditioner: Callable[[Tensor], Bijection],
        sizes: tuple[int, int],
        batch_shape: Sequence[int],
        *,
        flip: bool,
    ) -> None:
        super().__init__(batch_shape)
        self.conditioner = conditioner
        self.sizes = sizes
        self.flip = flip

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self._split(x)
        b, ladj = self.conditioner(a).call_and_ladj(b)
        return self._join(a, b), ladj.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self._split(y)
        b, ladj = self.conditioner(a).inverse_and_ladj(b)
        return self._join(a, b), ladj.sum(-1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = x.split(self.sizes, dim=-1)
        return (right, left) if self.flip else (left, right)

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        a = a.expand(*b.shape[:-1], -1)
        return torch.cat([b, a] if self.flip else [a, b], dim=-1)
