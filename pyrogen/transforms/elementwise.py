"""The layer that moves each feature by a map of its own."""

__all__ = ["Elementwise", "start_at_zero"]

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..inputs import check_context
from ..nets import MaskedLinear, mlp
from .base import Bijection
from .univariate import AFFINE, Univariate


class Elementwise(nn.Module):
    """Trainable layer that moves each feature by its own increasing map.

    Without context the parameters are learned directly, with context by a network.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        elementwise: Family of maps.
        hidden: Widths of the hidden layers of the network, with context.

    Raises:
        ValueError: If the context does not fit.

    Example:
        >>> from pyrogen.transforms import RationalQuadratic
        >>> layer = Elementwise(3, elementwise=RationalQuadratic())
        >>> y, ladj = layer().call_and_ladj(torch.randn(5, 3))
        >>> ladj.shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        elementwise: Univariate = AFFINE,
        hidden: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        self.shape = (features, elementwise.parameters)
        self.context = context
        self.elementwise = elementwise
        if context:
            self.net = start_at_zero(mlp(context, math.prod(self.shape), hidden))
        else:
            self.params = nn.Parameter(torch.zeros(self.shape))

    def forward(self, context: Tensor | None = None) -> Bijection:
        check_context(context, self.context, owner="Elementwise")

        def make() -> Bijection:
            if context is None:
                return self.elementwise(self.params)
            return self.elementwise(self.net(context).unflatten(-1, self.shape))

        return _Elementwise(make, () if context is None else context.shape[:-1])


class _Elementwise(Bijection):
    def __init__(self, make: Callable[[], Bijection], batch_shape: Sequence[int]) -> None:
        super().__init__(batch_shape)
        self.make = make

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self.make().call_and_ladj(x)
        return y, ladj.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self.make().inverse_and_ladj(y)
        return x, ladj.sum(-1)


def start_at_zero(net: nn.Sequential) -> nn.Sequential:
    """Start a network that returns zeros, so that an untrained layer is the identity.

    Its last layer is zero. The others start with rows of unit length on average, which learns
    much faster than torch's own start, a third of that; larger ones still would overfit small
    data.

    Args:
        net: Linear layers with SiLU between them.

    References:
        LeCun, Bottou, Orr, Müller. Efficient BackProp. Neural Networks: Tricks of the Trade, 1998.
    """
    *hidden, last = (layer for layer in net if isinstance(layer, nn.Linear))
    for layer in hidden:
        seen = layer.mask.sum(1) if isinstance(layer, MaskedLinear) else layer.in_features
        scale = torch.as_tensor(seen).clamp(min=1).to(layer.weight).rsqrt()
        nn.init.normal_(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(scale.unsqueeze(-1))
        nn.init.uniform_(layer.bias, -0.5, 0.5)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return net
