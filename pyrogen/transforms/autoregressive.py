"""Autoregressive layers: every feature moves by a map that its parents among them set."""

__all__ = ["Autoregressive"]

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..autodiff import can_steer
from ..inputs import check_context, check_positive, is_permutation
from ..nets import MaskedMLP
from .base import Bijection, SizedBijection
from .elementwise import start_at_zero
from .univariate import AFFINE, Univariate


class Autoregressive(nn.Module):
    r"""Trainable map :math:`y_i = T(x_i; \theta_i(y_{<i}))`, with a triangular Jacobian.

    From data ``y`` to noise ``x``, and so for densities, it costs one pass of the network. From
    noise to data features are moved in turn: a pass of the network for each, of which only the
    outputs for that feature are computed. Where a feature sees only some of those before it,
    given by ``adjacency``, as many passes do as the longest chain has features. Affine maps are
    cheap: where no derivative is asked for, all features are moved again and again,
    :math:`y \leftarrow T(x; \theta(y))`, until nothing changes, which is often far sooner.
    :class:`~pyrogen.transforms.Inverse` draws in one pass. It starts as the identity.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        elementwise: Family of the maps :math:`T`.
        order: Rank of each feature, a permutation of ``range(features)``; ascending if None.
        adjacency: Features that each feature's map sees, its row of a boolean matrix of shape
            ``(features, features)``, instead of all of lower rank: any graph without cycles.
        hidden: Widths of the hidden layers of the masked network for :math:`\theta`.

    Raises:
        ValueError: If there are no features, the order is not a permutation, the adjacency has a
            cycle, both are given, or the context does not fit.

    References:
        Papamakarios, Pavlakou, Murray. Masked Autoregressive Flow for Density Estimation.
        NeurIPS 2017. arXiv:1705.07057
        Song, Meng, Liao, Ermon. Accelerating Feedforward Computation via Parallel Nonlinear
        Equation Solving. ICML 2021. arXiv:2002.03629

    Example:
        >>> layer = Autoregressive(3)
        >>> y, ladj = layer().call_and_ladj(torch.randn(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    turns: Tensor

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        elementwise: Univariate = AFFINE,
        order: Sequence[int] | None = None,
        adjacency: Tensor | None = None,
        hidden: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        check_positive("Autoregressive", feature=features)
        self.features = features
        self.context = context
        self.elementwise = elementwise
        if adjacency is None:
            adjacency = _before(order, features)
        elif order is not None:
            raise ValueError(
                "Autoregressive expected an order or an adjacency, got both. The adjacency "
                "implies an order: leave the other out."
            )
        turns = _turns(adjacency, features)
        self.sizes = [len(turn) for turn in turns]
        self.families = [elementwise.of(turn.tolist()) for turn in turns]
        self.register_buffer("turns", torch.cat(turns), persistent=False)
        self.net = MaskedMLP(adjacency, elementwise.parameters, context, hidden=hidden)
        start_at_zero(self.net)

    def forward(self, context: Tensor | None = None) -> Bijection:
        check_context(context, self.context, owner="Autoregressive")
        return _Autoregressive(self, context)


def _before(order: Sequence[int] | None, features: int) -> Tensor:
    """Adjacency in which each feature sees all of lower rank."""
    rank = torch.arange(features) if order is None else torch.as_tensor(order)
    if rank.shape != (features,) or not is_permutation(rank):
        raise ValueError(
            f"Autoregressive expected order to hold each of 0, ..., {features - 1} once, got "
            f"{rank.tolist()}. Pass a permutation such as torch.randperm(features)."
        )
    return rank[:, None] > rank


def _turns(adjacency: Tensor, features: int) -> list[Tensor]:
    """Features that can be moved together, once those of all turns before have been."""
    if adjacency.shape != (features, features) or adjacency.dtype != torch.bool:
        raise ValueError(
            f"Autoregressive expected a boolean adjacency of shape ({features}, {features}), "
            f"got {adjacency.dtype} of shape {tuple(adjacency.shape)}. Row i holds what feature "
            "i sees."
        )
    turns: list[Tensor] = []
    left = torch.ones(features, dtype=torch.bool)
    while left.any():
        ready = left & ~(adjacency & left).any(1)
        if not ready.any():
            raise ValueError(
                "Autoregressive expected an adjacency without cycles, got features that see "
                "themselves through others. Order the features and let each see earlier ones "
                "only."
            )
        turns.append(ready.nonzero().squeeze(1))
        left &= ~ready
    return turns


class _Autoregressive(SizedBijection):
    def __init__(self, layer: Autoregressive, context: Tensor | None) -> None:
        batch_shape = () if context is None else context.shape[:-1]
        super().__init__(layer.features, batch_shape, owner="Autoregressive")
        self.layer = layer
        self.context = context

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.expand(torch.broadcast_shapes(x.shape, (*self.batch_shape, 1)))
        if self.layer.elementwise.parameters > CHEAP:
            return self._in_turn(x)
        first = self._maps(x).call_and_ladj(x)
        return self._in_turn(x) if _is_differentiated(first[0]) else self._repeat(x, *first)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._maps(y).inverse_and_ladj(y)
        return x, ladj.sum(-1)

    def _maps(self, y: Tensor) -> Bijection:
        """Maps of all features, given the data ``y``."""
        family = self.layer.elementwise
        return family(self.layer.net(self._seen(y)).unflatten(-1, (-1, family.parameters)))

    def _seen(self, y: Tensor) -> Tensor:
        if self.context is None:
            return y
        batch = torch.broadcast_shapes(y.shape[:-1], self.batch_shape)
        return torch.cat([y.expand(*batch, -1), self.context.expand(*batch, -1)], dim=-1)

    def _in_turn(self, x: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        y, ladj = torch.zeros_like(x), torch.zeros_like(x[..., 0])
        for turn, family in zip(layer.turns.split(layer.sizes), layer.families, strict=True):
            params = layer.net.outputs_for(turn, self._seen(y))
            maps = family(params.unflatten(-1, (-1, family.parameters)))
            moved, moved_ladj = maps.call_and_ladj(x[..., turn])
            y, ladj = y.index_copy(-1, turn, moved), ladj + moved_ladj.sum(-1)
        return y, ladj

    def _repeat(self, x: Tensor, y: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        """Move all features at once, given the last result, until nothing changes."""
        for _ in self.layer.sizes[1:]:
            last = y
            y, ladj = self._maps(last).call_and_ladj(x)
            if can_steer(y) and torch.equal(last, y):
                break
        return y, ladj.sum(-1)


CHEAP = 2  # parameters of a map that costs less than the network that sets it


def _is_differentiated(y: Tensor) -> bool:
    return y.requires_grad or torch.autograd.forward_ad.unpack_dual(y).tangent is not None
