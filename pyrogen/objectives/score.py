"""Score matching: learning to denoise is learning the score."""

__all__ = ["DenoisingScore", "UniformTime", "edm_weight"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributions import LogNormal

from ..distributions.diffusion import Diffusion
from ..inputs import check_batch, check_context
from ..paths import GaussianPath


class NoiseLevels(Protocol):
    """Law of the noise level, by its quantiles: any continuous ``torch.distributions`` law has."""

    def icdf(self, value: Tensor, /) -> Tensor:
        """Noise levels at the quantiles ``value`` in (0, 1)."""


@dataclass(frozen=True)
class UniformTime:
    r"""Noise levels :math:`\sigma_t/\alpha_t` at a uniform time of a path, as DDPM and others do.

    Args:
        path: From data to noise.
        low: Smallest noise level, in units of the standardised data.
        high: Largest noise level, in units of the standardised data; the path's, if less.

    Example:
        >>> from pyrogen.paths import Linear
        >>> UniformTime(Linear()).icdf(torch.tensor([0.5]))
        tensor([0.9795])
    """

    path: GaussianPath
    low: float = 2e-3
    high: float = 80.0

    def icdf(self, value: Tensor) -> Tensor:
        high = self.path.ratio(value.new_ones(())).clamp(max=self.high)
        start, stop = self.path.time(value.new_tensor(self.low)), self.path.time(high)
        return self.path.ratio(start + (stop - start) * value)


def edm_weight(sigma: Tensor) -> Tensor:
    r"""Weight :math:`(1 + \sigma^2)/\sigma^2`: every noise level starts at a loss of one."""
    return 1 + sigma.square().reciprocal()


class DenoisingScore(nn.Module):
    r"""Mean squared error of a denoiser, weighted over noise levels.

    .. math:: \mathbb E_{\sigma, x, \varepsilon} \big[ w(\sigma) \tfrac1d
        \lVert D(x + \sigma\varepsilon, \sigma) - x \rVert^2 \big]

    in standardised units. By the identity of denoising score matching this differs by a constant
    from :math:`\sigma^4 w/d` times the squared error of the score
    :math:`(D - x_\sigma)/\sigma^2`, so the minimiser is the true score. The default weight gives
    the network's own target unit variance, hence a loss of one to start with at every level, with
    no unit. In nats: with the weight :math:`d/\sigma^2` and :math:`\log\sigma` uniform on an
    interval of length L, L times the loss bounds the Kullback-Leibler divergence to the reverse
    SDE's draws, up to a constant.

    Noise levels are stratified over the batch: one in each of its equal quantiles.

    Args:
        diffusion: Holds the denoiser, the shift and the scale.
        noise: Law of :math:`\sigma`, with ``icdf``; None for the log-normal law of
            :math:`\log\sigma \sim \mathcal N(-1.2, 1.2^2)`. Widen it (1.8) if the density
            matters and the data have sharp features.
        weight: Map :math:`w` from noise levels to positive weights.

    Shape:
        ``forward(x, context)``: ``(*batch, *event_shape)`` and ``(*batch, context)`` to ``()``.

    Raises:
        TypeError: If ``x`` is not of floating point.
        ValueError: If ``x`` or ``context`` does not have the shape, dtype or values expected.

    References:
        Vincent. A connection between score matching and denoising autoencoders. Neural
        Computation 2011.
        Karras, Aittala, Aila, Laine. Elucidating the design space of diffusion-based generative
        models. NeurIPS 2022. arXiv:2206.00364
        Song, Durkan, Murray, Ermon. Maximum likelihood training of score-based diffusion models.
        NeurIPS 2021. arXiv:2101.09258

    Example:
        >>> from pyrogen.distributions import Diffusion
        >>> from pyrogen.nets import ResidualMLP
        >>> x = torch.randn(4096, 2)
        >>> loss = DenoisingScore(Diffusion(ResidualMLP(2), (2,)))(x)
        >>> round(loss.item(), 1)  # the best linear denoiser, on normal data
        1.0
    """

    def __init__(
        self,
        diffusion: Diffusion,
        *,
        noise: NoiseLevels | None = None,
        weight: Callable[[Tensor], Tensor] = edm_weight,
    ) -> None:
        super().__init__()
        self.diffusion = diffusion
        self.noise = LogNormal(-1.2, 1.2) if noise is None else noise
        self.weight = weight

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        d = self.diffusion
        check_batch(x, d.event_shape, owner="DenoisingScore", like=d.shift)
        check_context(context, d.context, owner="DenoisingScore")
        batch = x.shape[: x.ndim - len(d.event_shape)]
        if context is not None and context.shape[:-1] != batch:
            raise ValueError(
                f"DenoisingScore expected one context per datum, got {tuple(context.shape)} for "
                f"data of shape {tuple(x.shape)}. Pass a context of shape (*batch, context)."
            )
        sigma = self._levels(batch, x)
        wide = sigma.reshape(*batch, *(1,) * len(d.event_shape))
        clean = (x - d.shift) / d.scale
        error = d.denoise(clean + wide * torch.randn_like(clean), sigma, context) - clean
        return (self.weight(wide) * error.square()).mean()

    def _levels(self, batch: torch.Size, x: Tensor) -> Tensor:
        n = batch.numel()
        strata = torch.randperm(n, device=x.device) + torch.rand(n, dtype=x.dtype, device=x.device)
        margin = torch.finfo(x.dtype).eps  # a quantile of 0 or 1 has no finite level
        return self.noise.icdf((strata / n).clamp(margin, 1 - margin)).to(x).reshape(batch)
