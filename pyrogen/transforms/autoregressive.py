"""Autoregressive layers: every feature moves by a map that its parents among them set."""

__all__ = ["Autoregressive"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..inputs import check_context
from ..nets import masked_mlp
from .base import Bijection
from .elementwise import start_at_zero
from .univariate import AFFINE, Univariate


class Autoregressive(nn.Module):
    r"""Trainable map :math:`y_i = T(x_i; \theta_i(y_{<i}))`, with a triangular Jacobian.

    From data ``y`` to noise ``x``, and so for densities, it costs one pass of the network. From
    noise to data it repeats :math:`y \leftarrow T(x; \theta(y))`, of which the :math:`k`-th
    repeat makes the first :math:`k` features exact, until nothing changes: at most ``features``
    passes, often far fewer. Where a feature sees only some of those before it, given by
    ``adjacency``, as many passes do as the longest chain has features. When the draw is
    differentiated all passes are made, so derivatives of every order are exact; where that is
    the hot path, prefer :class:`~pyrogen.transforms.Coupling`, or
    :class:`~pyrogen.transforms.Inverse`, which draws in one pass. It starts as the identity.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        elementwise: Family of the maps :math:`T`.
        order: Rank of each feature, a permutation of ``range(features)``; ascending if None.
        adjacency: Features that each feature's map sees, its row of a boolean matrix of shape
            ``(features, features)``, instead of all of lower rank: any graph without cycles.
        hidden: Widths of the hidden layers of the masked network for :math:`\theta`.

    Raises:
        ValueError: If the order is not a permutation, the adjacency has a cycle, both are given,
            or the context does not fit.

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
        self.passes = _longest_chain(adjacency, features)
        self.net = start_at_zero(
            masked_mlp(adjacency, elementwise.parameters, context, hidden=hidden)
        )

    def forward(self, context: Tensor | None = None) -> Bijection:
        check_context(context, self.context, owner="Autoregressive")
        shape = (self.features, self.elementwise.parameters)

        def conditioner(y: Tensor) -> Bijection:
            if context is not None:
                batch = torch.broadcast_shapes(y.shape[:-1], context.shape[:-1])
                y = torch.cat([y.expand(*batch, -1), context.expand(*batch, -1)], dim=-1)
            return self.elementwise(self.net(y).unflatten(-1, shape))

        batch_shape = () if context is None else context.shape[:-1]
        return _Autoregressive(conditioner, self.passes, batch_shape)


def _before(order: Sequence[int] | None, features: int) -> Tensor:
    """Adjacency in which each feature sees all of lower rank."""
    rank = torch.arange(features) if order is None else torch.as_tensor(order)
    if not torch.equal(rank.sort().values, torch.arange(features)):
        raise ValueError(
            f"Autoregressive expected order to hold each of 0, ..., {features - 1} once, got "
            f"{rank.tolist()}. Pass a permutation such as torch.randperm(features)."
        )
    return rank[:, None] > rank


def _longest_chain(adjacency: Tensor, features: int) -> int:
    """Number of features in the longest chain of parents: the passes that make all exact."""
    if adjacency.shape != (features, features) or adjacency.dtype != torch.bool:
        raise ValueError(
            f"Autoregressive expected a boolean adjacency of shape ({features}, {features}), "
            f"got {adjacency.dtype} of shape {tuple(adjacency.shape)}. Row i holds what feature "
            "i sees."
        )
    step = adjacency.double()
    reached = torch.eye(features).double()
    for length in range(1, features + 1):
        reached = ((reached @ step) > 0).double()
        if not reached.any():
            return length
    raise ValueError(
        "Autoregressive expected an adjacency without cycles, got features that see themselves "
        "through others. Order the features and let each see earlier ones only."
    )


class _Autoregressive(Bijection):
    def __init__(
        self,
        conditioner: Callable[[Tensor], Bijection],
        passes: int,
        batch_shape: Sequence[int],
    ) -> None:
        super().__init__(batch_shape)
        self.conditioner = conditioner
        self.passes = passes

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self.conditioner(x).call_and_ladj(x)
        for _ in range(1, self.passes):
            last = y
            y, ladj = self.conditioner(last).call_and_ladj(x)
            if _settled(last, y):
                break
        return y, ladj.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self.conditioner(y).inverse_and_ladj(y)
        return x, ladj.sum(-1)


def _settled(last: Tensor, y: Tensor) -> bool:
    """Whether a repeat changed nothing, and no derivative could still be on its way."""
    if y.requires_grad or torch.autograd.forward_ad.unpack_dual(y).tangent is not None:
        return False
    try:
        return torch.equal(last, y)
    except RuntimeError:  # within vmap the values of one datum cannot steer the loop of all
        return False
