"""The bound on the probability of whole numbers, as a loss."""

__all__ = ["Dequantization"]

from torch import Tensor, nn

from ..distributions.dequantized import Dequantized
from .likelihood import check_law


class Dequantization(nn.Module):
    r"""Mean negative bound on the log-probability of whole numbers, in nats.

    .. math:: -\frac1n \sum_i \log \frac1K \sum_{j=1}^K
        \frac{p(k_i + u_{ij})}{q(u_{ij} \mid k_i)}, \qquad u_{ij} \sim q(u \mid k_i)

    It moves the flow :math:`p` and the proposal :math:`q` together. Divide by
    :math:`D \log 2`, or use ``pyrogen.evaluation.bits_per_dim``, for bits per dimension.

    Args:
        dequantized: The law to fit, with its proposal.
        particles: Number :math:`K` of fractions for each datum.

    Shape:
        ``forward(k, context)``: ``(*batch, *event)`` and ``(*batch, context)`` to ``()``.

    Raises:
        TypeError: If ``k`` is not of floating point.
        ValueError: If shapes or dtypes do not fit, or ``k`` is not finite or not whole.

    References:
        Ho, Chen, Srinivas, Duan, Abbeel. Flow++: Improving Flow-Based Generative Models with
        Variational Dequantization and Architecture Design. ICML 2019. arXiv:1902.00275

    Example:
        >>> from pyrogen.distributions import nsf
        >>> from pyrogen.distributions.dequantized import Dequantized
        >>> Dequantization(Dequantized(nsf(2)))(torch.zeros(5, 2)).shape
        torch.Size([])
    """

    def __init__(self, dequantized: Dequantized, *, particles: int = 1) -> None:
        super().__init__()
        if particles < 1:
            raise ValueError(f"Dequantization expected particles >= 1, got {particles}.")
        self.dequantized = dequantized
        self.particles = particles

    def forward(self, k: Tensor, context: Tensor | None = None) -> Tensor:
        p = self.dequantized(context)
        like = next(self.dequantized.parameters(), None)
        check_law(p, k, like=like, owner="Dequantization")
        return -p.bound(k, particles=self.particles).mean()
