"""Images from a vector of noise that enters scale by scale."""

__all__ = ["MultiScale"]

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Size, Tensor, nn

from .base import Bijection
from .image import IMAGE


class MultiScale(nn.Module):
    r"""A flow of images from a vector of noise, which enters scale by scale.

    The first scale makes a small image of its share of the noise. Each further one lays fresh
    channels of noise, as many as there are, beside those of the scale before: so half of the
    numbers skip the layers of every coarser scale. A coupling that opens a scale and moves the
    second half of the channels is the learned law of the fresh ones given the rest.

    Args:
        image_shape: ``(channels, height, width)`` of the data.
        scales: Layers on images for each scale, in order from noise to data, coarsest first;
            every layer but :class:`Squeeze` keeps the shape.

    Shape:
        Noise ``(*batch, channels * height * width)`` to images ``(*batch, *image_shape)``.

    Raises:
        ValueError: If there are no scales, or the image cannot be halved often enough.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP. ICLR 2017.
        arXiv:1605.08803
        Kingma, Dhariwal. Glow: Generative Flow with Invertible 1x1 Convolutions.
        NeurIPS 2018. arXiv:1807.03039

    Example:
        >>> from pyrogen.transforms.image import Convolution1x1, ImageCoupling, Squeeze
        >>> coarse = [Convolution1x1(8), Squeeze()]
        >>> fine = [ImageCoupling(4), Squeeze()]
        >>> layer = MultiScale((1, 8, 8), [coarse, fine])
        >>> layer()(torch.randn(5, 64)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(self, image_shape: Sequence[int], scales: Iterable[Iterable[nn.Module]]) -> None:
        super().__init__()
        self.image_shape = Size(image_shape)
        self.scales = nn.ModuleList(nn.ModuleList(scale) for scale in scales)
        if len(self.image_shape) != 3 or min(self.image_shape) < 1 or not len(self.scales):
            raise ValueError(
                f"MultiScale expected an image_shape (channels, height, width) and at least one "
                f"scale, got {tuple(image_shape)} and {len(self.scales)}. Pass both."
            )

    def forward(self, context: Tensor | None = None) -> Bijection:
        scales = [
            [layer(context) for layer in cast(nn.ModuleList, scale)] for scale in self.scales
        ]
        batch_shape = () if context is None else context.shape[:-1]
        return _MultiScale(scales, self.image_shape, batch_shape)


class _MultiScale(Bijection):
    codomain = IMAGE

    def __init__(
        self,
        scales: list[list[Bijection]],
        image_shape: Size,
        batch_shape: Sequence[int],
    ) -> None:
        super().__init__(batch_shape)
        self.scales = scales
        self.image_shape = image_shape
        self.fresh: list[Size] = []  # shape of the noise that enters at each scale
        shape = image_shape
        for scale in reversed(scales[1:]):
            for layer in reversed(scale):
                shape = layer.inverse_shape(shape)
            shape = shape[-3:]
            if shape[0] % 2:
                raise ValueError(
                    f"MultiScale halves the channels between scales, got {shape[0]} of them. "
                    "End each scale with a Squeeze."
                )
            shape = Size((shape[0] // 2, *shape[1:]))
            self.fresh.insert(0, shape)
        for layer in reversed(scales[0]):
            shape = layer.inverse_shape(shape)
        self.fresh.insert(0, shape[-3:])

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.forward_shape(x.shape)
        parts = x.split([shape.numel() for shape in self.fresh], dim=-1)
        total = x.new_zeros(x.shape[:-1])
        image: Tensor | None = None
        for part, shape, scale in zip(parts, self.fresh, self.scales, strict=True):
            fresh = part.unflatten(-1, shape)
            if image is None:
                image = fresh
            else:
                fresh = fresh.expand(*image.shape[:-3], -1, -1, -1)
                image = torch.cat([image, fresh], dim=-3)
            for layer in scale:
                image, ladj = layer.call_and_ladj(image)
                total = total + ladj
        assert image is not None
        return image, total

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self.inverse_shape(y.shape)
        parts: list[Tensor] = []
        total = y.new_zeros(y.shape[:-3])
        for i, scale in reversed(list(enumerate(self.scales))):
            for layer in reversed(scale):
                y, ladj = layer.inverse_and_ladj(y)
                total = total + ladj
            if i:
                y, fresh = y.chunk(2, dim=-3)
                parts.insert(0, fresh.flatten(-3))
        parts.insert(0, y.flatten(-3))
        batch = y.shape[:-3]  # the coarsest scale has seen every layer
        return torch.cat([part.expand(*batch, -1) for part in parts], dim=-1), total

    def forward_shape(self, shape: Iterable[int]) -> Size:
        *batch, features = shape
        if features != self.image_shape.numel():
            raise ValueError(
                f"MultiScale expected noise of {self.image_shape.numel()} numbers, got "
                f"{features}. That many make an image of shape {tuple(self.image_shape)}."
            )
        return torch.broadcast_shapes(batch, self.batch_shape) + self.image_shape

    def inverse_shape(self, shape: Iterable[int]) -> Size:
        shape = Size(shape)
        if shape[-3:] != self.image_shape:
            raise ValueError(
                f"MultiScale expected images of shape {tuple(self.image_shape)}, got "
                f"{tuple(shape)}. Reshape the data, or rebuild the layer for this shape."
            )
        batch = torch.broadcast_shapes(shape[:-3], self.batch_shape)
        return Size((*batch, self.image_shape.numel()))
