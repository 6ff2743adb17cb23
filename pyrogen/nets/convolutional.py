"""Convolutional networks between images and vectors."""

__all__ = ["Batched", "conv_decoder", "conv_encoder"]

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class Batched(nn.Module):
    """A network that takes one batch dimension, applied over any number of them.

    Args:
        net: Network of one batch dimension.
        event_dim: Number of dimensions of one datum.

    Example:
        >>> Batched(nn.Conv2d(1, 2, 3), event_dim=3)(torch.zeros(5, 4, 1, 8, 8)).shape
        torch.Size([5, 4, 2, 6, 6])
    """

    def __init__(self, net: nn.Module, event_dim: int) -> None:
        super().__init__()
        self.net = net
        self.event_dim = event_dim

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - self.event_dim]
        y = self.net(x.reshape(-1, *x.shape[x.ndim - self.event_dim :]))
        return y.reshape(*batch, *y.shape[1:])


def _halved(image_shape: Sequence[int], times: int) -> tuple[int, int, int]:
    channels, height, width = image_shape
    if height % 2**times or width % 2**times:
        raise ValueError(
            f"{times} layers halve height and width {times} times, got an image of {height} by "
            f"{width}. Pass fewer channels, or pad the image to multiples of {2**times}."
        )
    return channels, height // 2**times, width // 2**times


def conv_encoder(
    image_shape: Sequence[int], outputs: int, *, channels: Sequence[int] = (32, 64)
) -> nn.Module:
    """Build a convolutional network from images to vectors; each layer halves the image.

    Args:
        image_shape: ``(channels, height, width)``; the sizes must divide by 2 for every layer.
        outputs: Number of outputs.
        channels: Channels of the layers, in order.

    Shape:
        ``(*batch, channels, height, width)`` to ``(*batch, outputs)``.

    Raises:
        ValueError: If the image cannot be halved that often.

    Example:
        >>> conv_encoder((1, 8, 8), 10)(torch.zeros(3, 5, 1, 8, 8)).shape
        torch.Size([3, 5, 10])
    """
    depth, height, width = _halved(image_shape, len(channels))
    layers: list[nn.Module] = []
    for a, b in pairwise([depth, *channels]):
        layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.SiLU()]
    layers += [nn.Flatten(), nn.Linear([depth, *channels][-1] * height * width, outputs)]
    return Batched(nn.Sequential(*layers), event_dim=3)


def conv_decoder(
    inputs: int, image_shape: Sequence[int], *, channels: Sequence[int] = (64, 32)
) -> nn.Module:
    """Build a convolutional network from vectors to images; each layer doubles the image.

    Args:
        inputs: Number of inputs.
        image_shape: ``(channels, height, width)``; the sizes must divide by 2 for every layer.
        channels: Channels of the layers, in order.

    Shape:
        ``(*batch, inputs)`` to ``(*batch, channels, height, width)``.

    Raises:
        ValueError: If the image cannot be halved that often.

    Example:
        >>> conv_decoder(10, (1, 8, 8))(torch.zeros(3, 5, 10)).shape
        torch.Size([3, 5, 1, 8, 8])
    """
    depth, height, width = _halved(image_shape, len(channels))
    first = [*channels, depth][0]
    layers: list[nn.Module] = [nn.Linear(inputs, first * height * width)]
    layers += [nn.Unflatten(1, (first, height, width))]
    for a, b in pairwise([*channels, depth]):
        layers += [nn.SiLU(), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1)]
    return Batched(nn.Sequential(*layers), event_dim=1)
