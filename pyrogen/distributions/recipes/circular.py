"""Flows on circles and tori, beside the line."""

__all__ = ["ncsf"]

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ...inputs import check_positive
from ...transforms import Coupling, Elementwise, Permutation
from ...transforms.spline import SPLINE, CircularSpline, RationalQuadratic
from ...transforms.univariate import PerFeature
from ..flow import Flow
from ..noise import CircularNoise
from ..supports import angles_of, circular

_CIRCULAR = CircularSpline()


def ncsf(
    features: int,
    context: int = 0,
    *,
    layers: int = 4,
    hidden: Sequence[int] = (64, 64),
    spline: CircularSpline = _CIRCULAR,
    linear: RationalQuadratic = SPLINE,
    support: constraints.Constraint = circular,
) -> Flow:
    """Build a neural circular spline flow: couplings that move angles round the circle.

    The noise is uniform on each circle. Networks see the cosine and sine of an angle, so the
    density has no seam at pi. One feature, with nothing to couple to, is moved by splines alone.

    Args:
        features: Number of features of the noise.
        context: Number of features to condition on; 0 for none.
        layers: Number of couplings; each moves half of the features.
        hidden: Widths of the hidden layers of each network.
        spline: Family of the maps of angles.
        linear: Family of the maps of the other features.
        support: ``circular`` for angles from -pi to pi; for angles beside other features,
            ``stack([circular, real, ...], dim=-1)``.

    Raises:
        ValueError: If there are no layers, or no feature of the support is an angle.

    References:
        Rezende, Papamakarios, Racaniere, Albergo, Kanwar, Shanahan, Cranmer. Normalizing Flows
        on Tori and Spheres. ICML 2020. arXiv:2002.02428

    Example:
        >>> torus = ncsf(features=2)
        >>> torus().log_prob(torch.tensor([3.0, -3.0]))  # still uniform: -2 log(2 pi)
        tensor(-3.6758, grad_fn=<...>)
    """
    check_positive("ncsf", feature=features, layer=layers)
    angles = angles_of(support, features)
    if not angles.any():
        raise ValueError(
            f"ncsf expected a support with angles, got {support}. Mark them by "
            "pyrogen.distributions.circular, or use nsf."
        )
    family = [spline if angle else linear for angle in angles.tolist()]
    noise = CircularNoise(angles)
    if features == 1:
        stack = [Elementwise(1, context, elementwise=spline, hidden=hidden) for _ in range(layers)]
        return Flow(1, stack, context, support=support, noise=noise)
    order = list(range(features))
    parts: list[nn.Module] = []
    for i in range(layers):
        flip = bool(i % 2)
        half = features - features // 2 if flip else features // 2
        left, right = order[:half], order[half:]
        kept, moved = (right, left) if flip else (left, right)
        parts.append(
            Coupling(
                features,
                context,
                elementwise=PerFeature([family[j] for j in moved]),
                flip=flip,
                hidden=hidden,
                embedding=_Periodic(angles[kept]),
            )
        )
        if flip and features > 2:  # a fixed riffle, as the roles of features must be known here
            riffle = [*range(0, features, 2), *range(1, features, 2)]
            parts.append(Permutation(riffle))
            order = [order[j] for j in riffle]
    back = sorted(range(features), key=order.__getitem__)
    if order != sorted(order):
        parts.append(Permutation(back))
    return Flow(features, parts, context, support=support, noise=noise)


class _Periodic(nn.Module):
    """Cosine and sine of angles, beside the other features."""

    angles: Tensor
    others: Tensor

    def __init__(self, angles: Tensor) -> None:
        super().__init__()
        self.register_buffer("angles", angles.nonzero().squeeze(-1), persistent=False)
        self.register_buffer("others", (~angles).nonzero().squeeze(-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angle = x[..., self.angles]
        return torch.cat([angle.cos(), angle.sin(), x[..., self.others]], dim=-1)
