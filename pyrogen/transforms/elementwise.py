"""The layer that moves each feature by a map of its own."""

__all__ = ["Elementwise", "start_at_zero"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..inputs import check_context, check_positive
from ..nets import MaskedLinear, mlp
from .base import Bijection, SizedBijection
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
        ValueError: If there are no features, or the context does not fit.

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
        check_positive("Elementwise", feature=features)
        self.shape = (features, elementwise.parameters)
        self.context = context
        self.elementwise = elementwise
        if context:
            self.net = start_at_zero(mlp(context, math.prod(self.shape), hidden))
        else:
            self.params = nn.Parameter(torch.zeros(self.shape))

    def forward(self, context: Tensor | None = None) -> Bijection:
        check_context(context, self.context, owner="Elementwise")
        return _Elementwise(self, context)


class _Elementwise(SizedBijection):
    def __init__(self, layer: Elementwise, context: Tensor | None) -> None:
        batch_shape = () if context is None else context.shape[:-1]
        super().__init__(layer.shape[0], batch_shape, owner="Elementwise")
        self.layer = layer
        self.context = context

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self._maps().call_and_ladj(x)
        return y, ladj.sum(-1)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._maps().inverse_and_ladj(y)
        return x, ladj.sum(-1)

    def _maps(self) -> Bijection:
        layer = self.layer
        if self.context is None:
            return layer.elementwise(layer.params)
        return layer.elementwise(layer.net(self.context).unflatten(-1, layer.shape))


FIRST = 1.4  # gain of the layer that sees the data


def start_at_zero(net: nn.Sequential) -> nn.Sequential:
    """Start a network that returns zeros, so that an untrained layer is the identity.

    Its last layer is zero. Hidden ones start with rows of unit length on average, where torch's
    own have 0.58, and so learn much faster; the first with longer ones, and biases that spread its
    units over inputs of unit scale. Longer rows still would overfit small data.

    Args:
        net: Linear layers with SiLU between them.

    References:
        LeCun, Bottou, Orr, Müller. Efficient BackProp. Neural Networks: Tricks of the Trade, 1998.
    """
    *hidden, last = (layer for layer in net if isinstance(layer, nn.Linear))
    for i, layer in enumerate(hidden):
        gain, spread = (1.0, 0.5) if i else (FIRST, FIRST * math.sqrt(1.5))
        seen = layer.mask.sum(1) if isinstance(layer, MaskedLinear) else layer.in_features
        scale = gain * torch.as_tensor(seen).clamp(min=1).to(layer.weight).rsqrt()
        nn.init.normal_(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(scale.unsqueeze(-1))
        nn.init.uniform_(layer.bias, -spread, spread)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return net
