"""Fully connected networks, and what stands before a network."""

__all__ = ["Incomplete", "ResidualMLP", "Standardized", "TimeMLP", "mlp"]

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..inputs import check_positive


class Standardized(nn.Module):
    r"""A network that sees data in standard units: :math:`\text{net}((x - a) / b)`.

    Args:
        net: Network to feed.
        shift: What to subtract, of the shape of a datum or less.
        scale: What to divide by, likewise.

    Raises:
        ValueError: If the scale is not positive.

    Example:
        >>> net = Standardized(nn.Identity(), torch.tensor([1.0, 2.0]), torch.tensor(2.0))
        >>> net(torch.tensor([[3.0, 4.0]]))
        tensor([[1., 1.]])
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        if not (scale > 0).all():
            raise ValueError(
                f"Standardized expected a positive scale, got {scale.min().item()}. Drop constant "
                "features, or floor their scale."
            )
        self.net = net
        self.register_buffer("shift", shift.clone())
        self.register_buffer("scale", scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.shift) / self.scale)


class Incomplete(nn.Module):
    """A network that reads incomplete data, in which NaN marks a missing number.

    It sees the data with zeros in the gaps and, beside them, a mask: 1 where a number was
    observed, 0 where it is missing. Around it, ``Standardized`` fills the gaps with the mean. A
    guide whose encoder contains it accepts NaN; the model must score the observed numbers only.

    Args:
        net: Network with inputs for data and mask: ``mlp(2 * features, ...)`` for vectors.
        dim: Dimension along which the mask is laid beside the data: -1 for vectors, -3 for
            images.

    Shape:
        That of ``net``, with half of its inputs along ``dim``.

    References:
        Mattei, Frellsen. MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets.
        ICML 2019. arXiv:1812.02633
        Ma et al. EDDI: Efficient Dynamic Discovery of High-Value Information with Partial VAE.
        ICML 2019. arXiv:1809.11142

    Example:
        >>> Incomplete(nn.Identity())(torch.tensor([[3.0, torch.nan]]))
        tensor([[3., 0., 1., 0.]])
    """

    def __init__(self, net: nn.Module, *, dim: int = -1) -> None:
        super().__init__()
        self.net = net
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        missing = x.isnan()
        known = x.masked_fill(missing, 0.0)
        return self.net(torch.cat([known, (~missing).to(x)], dim=self.dim))


def mlp(
    inputs: int,
    outputs: int,
    hidden: Sequence[int] = (64, 64),
    *,
    activation: Callable[[], nn.Module] = nn.SiLU,
) -> nn.Sequential:
    """Build a fully connected network.

    Args:
        inputs: Number of inputs.
        outputs: Number of outputs.
        hidden: Widths of the hidden layers.
        activation: Makes the nonlinearity between layers.

    Raises:
        ValueError: If a hidden layer has no units.

    Example:
        >>> mlp(2, 3, hidden=(8,))(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """
    check_positive("mlp", hidden_unit=min(hidden, default=1))
    sizes = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


class ResidualMLP(nn.Module):
    r"""Fully connected residual network that knows how noisy its input is: for denoisers.

    Each block normalises its input, then scales and shifts it by what it knows of the noise level
    and the context (adaptive layer norm). The last layer starts at zero, so a preconditioned
    denoiser starts at the best linear one.

    Args:
        features: Number of features of one datum.
        context: Number of features to condition on; 0 for none.
        hidden: Width.
        blocks: Number of residual blocks, of two layers each.
        frequencies: Number of Fourier features of the noise level; angular frequencies from 0.5
            to 16, low because the level varies over a few units only.
        dropout: Probability of dropping a hidden unit in training, for small data. Call
            ``.eval()`` before a density or a draw.

    Shape:
        ``forward(x, level, context)``: ``(batch, features)``, ``(batch,)`` and
        ``(batch, context)`` to ``(batch, features)``. The level is usually
        :math:`\tfrac14 \log\sigma`.

    References:
        Peebles, Xie. Scalable diffusion models with transformers. ICCV 2023. arXiv:2212.09748

    Example:
        >>> net = ResidualMLP(2, context=3)
        >>> net(torch.zeros(5, 2), torch.zeros(5), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    frequencies: Tensor

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        hidden: int = 128,
        blocks: int = 4,
        frequencies: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-1, 4, frequencies, base=2.0))
        self.embed = nn.Sequential(
            nn.Linear(2 * frequencies + context, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
        )
        self.first = nn.Linear(features, hidden)
        self.blocks = nn.ModuleList(_AdaptiveBlock(hidden, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden)
        self.last = nn.Linear(hidden, features)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        angle = level.unsqueeze(-1) * self.frequencies
        known = [angle.cos(), angle.sin()] + ([] if context is None else [context])
        condition = self.embed(torch.cat(known, dim=-1))
        h = self.first(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.last(self.norm(h))


class _AdaptiveBlock(nn.Module):
    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.modulate = nn.Linear(hidden, 2 * hidden)
        self.inner = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(condition).chunk(2, dim=-1)
        inner = self.inner(self.norm(h) * (1 + scale) + shift)
        return h + self.outer(self.dropout(nn.functional.silu(inner)))


class TimeMLP(nn.Module):
    """Fully connected network of data, time and context: for the vector field of a flow.

    The last layer starts at zero, so an untrained flow stands still.

    Args:
        features: Number of features of one datum.
        context: Number of features to condition on; 0 for none.
        hidden: Widths of the hidden layers.
        activation: Makes the nonlinearity between layers; choose a smooth one, for the solvers.

    Shape:
        ``forward(x, t, context)``: ``(batch, features)``, ``(batch,)`` and ``(batch, context)``
        to ``(batch, features)``.

    Example:
        >>> net = TimeMLP(2, context=3)
        >>> net(torch.zeros(5, 2), torch.zeros(5), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        hidden: Sequence[int] = (64, 64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        self.net = mlp(features + 1 + context, features, hidden, activation=activation)
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        known = [x, t.unsqueeze(-1)] + ([] if context is None else [context])
        return self.net(torch.cat(known, dim=-1))
