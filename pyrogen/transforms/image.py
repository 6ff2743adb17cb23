"""Layers on images: squeezes, 1x1 convolutions and convolutional couplings."""

__all__ = ["IMAGE", "Convolution1x1", "ImageCoupling", "Squeeze"]

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ..inputs import check_positive
from ..nets.convolutional import Batched
from .base import Bijection, SizedBijection
from .coupling import Halves
from .linear import LULinear, Reflections
from .univariate import AFFINE, Univariate

IMAGE = constraints.independent(constraints.real, 3)  # (channels, height, width)


class Squeeze(nn.Module):
    r"""Fixed reordering: a quarter of the channels becomes a picture of twice the size.

    From data to noise, ``(channels, 2 * height, 2 * width)`` is squeezed to
    ``(4 * channels, height, width)``, so that a network that reads neighbours sees farther. Of
    the four pixels of a square, the two on the diagonal go to the first half of the channels and
    the others to the second: a coupling of halves next to a squeeze is that of a checkerboard.

    Raises:
        ValueError: If the channels do not divide by 4, or height and width by 2.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP. ICLR 2017.
        arXiv:1605.08803

    Example:
        >>> Squeeze()().inv(torch.arange(4.0).reshape(1, 2, 2)).flatten()
        tensor([0., 3., 1., 2.])
    """

    def forward(self, context: Tensor | None = None) -> Bijection:
        return _Squeeze()


class _Squeeze(Bijection):
    domain = IMAGE
    codomain = IMAGE

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.forward_shape(x.shape)
        a, d, b, c = x.chunk(4, dim=-3)
        rows = [torch.stack(pair, dim=-1).flatten(-2) for pair in ((a, b), (c, d))]
        y = torch.stack(rows, dim=-2).flatten(-3, -2)
        return y, x.new_zeros(x.shape[:-3])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self.inverse_shape(y.shape)
        top, bottom = y[..., ::2, :], y[..., 1::2, :]
        parts = [top[..., ::2], bottom[..., 1::2], top[..., 1::2], bottom[..., ::2]]
        return torch.cat(parts, dim=-3), y.new_zeros(y.shape[:-3])

    def forward_shape(self, shape: Iterable[int]) -> Size:
        *batch, channels, height, width = shape
        if channels % 4:
            raise ValueError(
                f"Squeeze expected channels in multiples of 4 on the side of the noise, got "
                f"{channels}. Give the data twice the height and width, and a quarter of them."
            )
        return Size((*batch, channels // 4, 2 * height, 2 * width))

    def inverse_shape(self, shape: Iterable[int]) -> Size:
        *batch, channels, height, width = shape
        if height % 2 or width % 2:
            raise ValueError(
                f"Squeeze halves height and width, got {height} by {width}. Pad the images to "
                "even sizes."
            )
        return Size((*batch, 4 * channels, height // 2, width // 2))


class Convolution1x1(nn.Module):
    r"""Trainable map :math:`y = QLUx + b` of the channels of every pixel.

    :math:`Q` is an orthogonal matrix that is drawn at the start and kept, :math:`L` unit lower
    and :math:`U` upper triangular with diagonal :math:`e^d`, so the log-determinant is
    :math:`\text{height} \cdot \text{width} \cdot \sum_i d_i`. It starts as :math:`Q`. Cost: one
    product of ``channels ** 2`` for each pixel, either way.

    Args:
        channels: Number of channels.

    Raises:
        ValueError: If there are no channels.

    References:
        Kingma, Dhariwal. Glow: Generative Flow with Invertible 1x1 Convolutions.
        NeurIPS 2018. arXiv:1807.03039

    Example:
        >>> layer = Convolution1x1(4)
        >>> y, ladj = layer().call_and_ladj(torch.randn(5, 4, 2, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 4, 2, 3]), torch.Size([5]))
    """

    mirrors: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive("Convolution1x1", channel=channels)
        self.linear = LULinear(channels)
        # Reflections, and not their product, which is orthogonal only in the precision it is in
        self.register_buffer("mirrors", torch.randn(channels, channels))

    def forward(self, context: Tensor | None = None) -> Bijection:
        return _Convolution1x1(self)

    def rotation(self) -> Tensor:
        """Return :math:`Q`."""
        return Reflections(self.mirrors).columns(len(self.mirrors)).T


class _Convolution1x1(SizedBijection):
    domain = IMAGE
    codomain = IMAGE

    def __init__(self, layer: Convolution1x1) -> None:
        super().__init__(len(layer.mirrors), owner="Convolution1x1")
        self.layer = layer

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, ladj = self.layer.linear.factors()
        y = _mix(self.layer.rotation() @ lower @ upper, x) + self._bias()
        return y, (ladj * math.prod(x.shape[-2:])).expand(x.shape[:-3])

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper, ladj = self.layer.linear.factors()
        back = torch.linalg.solve_triangular(lower, self.layer.rotation().T, upper=False)
        back = torch.linalg.solve_triangular(upper, back, upper=True)
        x = _mix(back, y - self._bias())
        return x, (-ladj * math.prod(y.shape[-2:])).expand(y.shape[:-3])

    def _bias(self) -> Tensor:
        return self.layer.linear.bias[:, None, None]


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.flatten(-2)).unflatten(-1, x.shape[-2:])


class ImageCoupling(Halves):
    r"""Trainable map :math:`(a, b) \mapsto (a, T(b; \theta(a)))` of the halves of the channels.

    :math:`\theta` is a residual convolutional network that keeps the picture's size; a context
    enters it as constant channels. Both directions are one pass. It starts as the identity.

    Args:
        channels: Number of channels, at least 2.
        context: Number of features to condition on; 0 for none.
        elementwise: Family of the maps :math:`T`.
        flip: Move the first half instead of the second.
        hidden: Channels within each residual block of the network for :math:`\theta`; the first
            is also the number between blocks.

    Shape:
        Images ``(*batch, channels, height, width)`` of any height and width.

    Raises:
        ValueError: If there are fewer than 2 channels, no hidden layers, or the context does not
            fit.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP. ICLR 2017.
        arXiv:1605.08803

    Example:
        >>> layer = ImageCoupling(4, context=3)
        >>> y, ladj = layer(torch.zeros(3)).call_and_ladj(torch.randn(5, 4, 8, 8))
        >>> y.shape, ladj.shape
        (torch.Size([5, 4, 8, 8]), torch.Size([5]))
    """

    domain = IMAGE

    def __init__(
        self,
        channels: int,
        context: int = 0,
        *,
        elementwise: Univariate = AFFINE,
        flip: bool = False,
        hidden: Sequence[int] = (64, 64),
    ) -> None:
        if channels < 2:
            raise ValueError(
                f"ImageCoupling expected at least 2 channels, got {channels}. Put a Squeeze "
                "between it and the data."
            )
        super().__init__(channels, context, elementwise=elementwise, flip=flip)
        self.net = _same_size(channels // 2 + context, math.prod(self.shape), hidden)

    def maps(self, a: Tensor, context: Tensor | None) -> Bijection:
        if context is not None:
            batch = torch.broadcast_shapes(a.shape[:-3], context.shape[:-1])
            known = context[..., None, None].expand(*batch, -1, *a.shape[-2:])
            a = torch.cat([a.expand(*batch, -1, -1, -1), known], dim=-3)
        return self.elementwise(self.net(a).unflatten(-3, self.shape).movedim(-3, -1))


class _Residual(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(channels, inner, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(inner, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def _same_size(inputs: int, outputs: int, hidden: Sequence[int]) -> nn.Module:
    """Build a residual convolutional network that keeps the picture's size and starts at zero."""
    if not hidden:
        raise ValueError(
            "ImageCoupling expected at least one hidden layer, got none. Pass hidden=(64,)."
        )
    check_positive("ImageCoupling", hidden_channel=min(hidden))
    width = hidden[0]
    blocks = [_Residual(width, inner) for inner in hidden]
    last = nn.Conv2d(width, outputs, 1)
    for weight in last.parameters():
        nn.init.zeros_(weight)
    net = nn.Sequential(nn.Conv2d(inputs, width, 1), *blocks, nn.SiLU(), last)
    return Batched(net, event_dim=3)
