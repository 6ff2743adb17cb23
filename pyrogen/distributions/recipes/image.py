"""Flows of images."""

__all__ = ["glow"]

from collections.abc import Sequence

from torch import nn
from torch.distributions import constraints

from ...transforms.image import Convolution1x1, ImageCoupling, Squeeze
from ...transforms.multiscale import MultiScale
from ...transforms.univariate import AFFINE, Univariate
from ..flow import Flow


def glow(
    image_shape: Sequence[int],
    context: int = 0,
    *,
    levels: int = 2,
    steps: int = 4,
    hidden: Sequence[int] = (64, 64),
    elementwise: Univariate = AFFINE,
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a flow of images: convolutional couplings and 1x1 convolutions at several scales.

    Draws have event shape ``image_shape``. Half of the numbers of each level are fresh noise; its
    first coupling moves them given the coarser half, so their law is learned. There is no
    activation normalisation: the 1x1 convolutions have scale and shift,
    :meth:`~pyrogen.distributions.Flow.standardize` sets the first units, and so a density never
    depends on a first batch.

    Args:
        image_shape: ``(channels, height, width)``; the sizes must divide by ``2 ** levels``.
        context: Number of features to condition on; 0 for none.
        levels: Number of scales.
        steps: Number of couplings at each scale.
        hidden: Channels within each residual block of each network.
        elementwise: Family of the maps of one number.
        support: Where each number of a draw lies.
        noise: Module whose call gives the law of the noise, of event shape
            ``(channels * height * width,)``; standard normal if None.

    Raises:
        ValueError: If the image cannot be halved that often, or there are no levels or steps.

    References:
        Kingma, Dhariwal. Glow: Generative Flow with Invertible 1x1 Convolutions.
        NeurIPS 2018. arXiv:1807.03039

    Example:
        >>> flow = glow((1, 8, 8), steps=2)
        >>> p = flow()
        >>> p.event_shape, p.log_prob(p.sample((5,))).shape
        (torch.Size([1, 8, 8]), torch.Size([5]))
    """
    if len(image_shape) != 3:
        raise ValueError(
            f"glow expected an image_shape (channels, height, width), got {tuple(image_shape)}. "
            "Grey pictures have 1 channel."
        )
    channels, height, width = image_shape
    if levels < 1 or steps < 1 or height % 2**levels or width % 2**levels:
        raise ValueError(
            f"glow expected levels and steps of at least 1 and an image whose sides halve at each "
            f"level, got {levels} levels, {steps} steps and {height} by {width}. Pass fewer "
            f"levels, or pad the image to multiples of {2 ** max(levels, 1)}."
        )
    scales: list[list[nn.Module]] = []
    for level in range(levels):  # from the data's side: each squeeze by 4, each split in half
        c = 4 * channels * 2**level
        scale: list[nn.Module] = []
        for _ in range(steps):
            scale += [
                ImageCoupling(c, context, elementwise=elementwise, hidden=hidden),
                Convolution1x1(c),
            ]
        scales.insert(0, [*scale, Squeeze()])
    return Flow(
        channels * height * width,
        [MultiScale(image_shape, scales)],
        context,
        support=support,
        noise=noise,
        event_shape=image_shape,
    )
