"""Which draw of noise goes with which datum: the shorter the paths, the straighter the flow.

The data keep their places, and so their contexts; the noise is given out anew. A coupling changes
the path between the laws, not the laws themselves: that of the noise must stay what it was, also
for every context alone.
"""

__all__ = ["IndependentCoupling", "MinibatchCoupling", "OptimalTransport", "SchroedingerBridge"]

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

CONTEXT_WEIGHT = 100.0
Pair = tuple[Tensor, Tensor]


class MinibatchCoupling(ABC):
    """How the data and the noise of a batch are paired."""

    @abstractmethod
    def __call__(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """Rows of ``z``, in the order of the data they go with.

        Args:
            x: Data, shape ``(batch, features)``, in standardised units.
            z: Noise, of the shape of ``x``.
            context: Shape ``(batch, context)``, or None.
        """


@dataclass(frozen=True)
class IndependentCoupling(MinibatchCoupling):
    """As they come: each datum with a draw of its own.

    Example:
        >>> x, z = torch.randn(5, 2), torch.randn(5, 2)
        >>> IndependentCoupling()(x, z, None) is z
        True
    """

    def __call__(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        return z


def _blocks(x: Tensor, z: Tensor, context: Tensor | None, size: int, weight: float) -> list[Pair]:
    """Points whose squared distances are the costs: blocks of one size, and the rest.

    Every draw of noise carries the context of the datum it came with. Shapes are
    ``(blocks, size, coordinates)``.
    """
    if context is not None:
        own = _standardized(context) * math.sqrt(weight)
        x, z = torch.cat([x, own], dim=-1), torch.cat([z, own], dim=-1)
    size = min(size, len(x))
    whole = len(x) - len(x) % size
    pairs = [(x[:whole].unflatten(0, (-1, size)), z[:whole].unflatten(0, (-1, size)))]
    return pairs if whole == len(x) else [*pairs, (x[whole:].unsqueeze(0), z[whole:].unsqueeze(0))]


def _standardized(context: Tensor) -> Tensor:
    scale = context.std(0) if len(context) > 1 else torch.ones_like(context[0])
    return (context - context.mean(0)) / torch.where(scale > 0, scale, 1.0)


def _check(owner: object, block: int, weight: float) -> None:
    if block < 1:
        raise ValueError(f"{type(owner).__name__} expected block >= 1, got {block}.")
    if not 0 <= weight < math.inf:
        raise ValueError(f"{type(owner).__name__} expected context_weight >= 0, got {weight}.")


@dataclass(frozen=True)
class OptimalTransport(MinibatchCoupling):
    r"""The permutation of the noise that makes the sum of squared lengths least, block by block.

    .. math:: \min_\pi \sum_i |x_i - z_{\pi(i)}|^2 + w\,|c_i - c_{\pi(i)}|^2

    Exact within each block of consecutive rows, so shuffle the data. Every draw of noise is used
    once, so a batch keeps all of its noise. With contexts c, in units of their standard deviation
    over the batch, noise moves between data of near contexts only: without that (w = 0) the law
    of the noise would depend on the context, and the flow would start from the wrong one.

    Cost: block \*\* 2 times the batch, on the CPU; at 64 about half as much as a step of a small
    network on two features.

    Args:
        block: Number of data paired at once.
        context_weight: The weight w: at 100, a standard deviation of a context feature weighs as
            much as ten of a datum's.

    Raises:
        ValueError: If the block is empty or the weight negative.
        ImportError: If SciPy is not installed.

    References:
        Tong, Fatras, Malkin, Huguet, Zhang, Rector-Brooks, Wolf, Bengio. Improving and
        generalizing flow-based generative models with minibatch optimal transport. TMLR 2024.
        arXiv:2302.00482
        Pooladian, Ben-Hamu, Domingo-Enrich, Amos, Lipman, Chen. Multisample flow matching:
        straightening flows with minibatch couplings. ICML 2023. arXiv:2304.14772
        Kerrigan, Migliorini, Smyth. Dynamic conditional optimal transport through simulation-free
        flows. NeurIPS 2024. arXiv:2404.04240

    Example:
        >>> x, z = torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [1.0]])
        >>> OptimalTransport()(x, z, None)
        tensor([[1.],
                [4.]])
    """

    block: int = 64
    context_weight: float = CONTEXT_WEIGHT

    def __post_init__(self) -> None:
        _check(self, self.block, self.context_weight)

    @torch.no_grad()
    def __call__(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError as error:
            raise ImportError(
                "OptimalTransport needs SciPy, which comes with ArviZ: pip install scipy."
            ) from error
        order: list[Tensor] = []
        start = 0
        for pair in _blocks(x, z, context, self.block, self.context_weight):
            for cost in _easy_costs(*pair).cpu().numpy():
                _, columns = linear_sum_assignment(cost)
                order.append(torch.from_numpy(columns) + start)
                start += len(columns)
        return z[torch.cat(order).to(z.device)]


def _easy_costs(x: Tensor, z: Tensor) -> Tensor:
    r"""Costs with the least permutation of the squared distances, found in a third of the time.

    What depends on the row or on the column alone decides nothing. Only :math:`-2x\cdot z`
    remains, which does not change when x is divided by what z is multiplied with; and among the
    costs that agree in it, those of centred points of one scale leave the search least to do.
    """
    x, z = x - x.mean(-2, keepdim=True), z - z.mean(-2, keepdim=True)
    squares = [v.square().sum(-2, keepdim=True) for v in (x, z)]
    ratio = (squares[1] / squares[0]) ** 0.25
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
    cost = torch.cdist(x * ratio, z / ratio).square()
    cost = cost - cost.amin(-1, keepdim=True)
    return cost - cost.amin(-2, keepdim=True)


@dataclass(frozen=True)
class SchroedingerBridge(MinibatchCoupling):
    r"""Pairs drawn from the entropic plan: the ends of a Schrödinger bridge.

    The plan minimises, within each block,

    .. math:: \mathbb E_\pi |x - z|^2 + 2\sigma^2\, \mathrm{KL}(\pi \,\|\, p \otimes q)

    by Sinkhorn's iteration in the log domain; every datum then draws its noise from its row. Use
    it with :class:`Bridge` of the same ``sigma``. As ``sigma`` falls it tends to
    :class:`OptimalTransport`, which is cheaper below 0.1.

    Cost: block times the batch per iteration; ten of them for a ``sigma`` of one, hundreds for a
    small one or with contexts.

    Args:
        sigma: Standard deviation of the Brownian motion over unit time, in standardised units.
        block: Number of data paired at once.
        context_weight: What squared distances of contexts count, as in
            :class:`OptimalTransport`.
        iterations: Most iterations; they stop when no row misses its share by more than a
            hundredth.

    Raises:
        ValueError: If ``sigma`` is not positive, the block is empty or the weight negative.
        FloatingPointError: If the plan does not settle.

    References:
        Tong, Malkin, Fatras, Atanackovic, Zhang, Huguet, Wolf, Bengio. Simulation-free
        Schrödinger bridges via score and flow matching. AISTATS 2024. arXiv:2307.03672
        Peyré, Cuturi. Computational optimal transport. Foundations and Trends in Machine Learning
        2019. arXiv:1803.00567

    Example:
        >>> x, z = torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [1.0]])
        >>> SchroedingerBridge(0.5)(x, z, None)
        tensor([[1.],
                [4.]])
    """

    sigma: float = 1.0
    block: int = 64
    context_weight: float = CONTEXT_WEIGHT
    iterations: int = 2000

    def __post_init__(self) -> None:
        _check(self, self.block, self.context_weight)
        if not 0 < self.sigma < math.inf:
            raise ValueError(
                f"SchroedingerBridge expected sigma > 0, got {self.sigma}. For no noise "
                "at all use OptimalTransport."
            )

    @torch.no_grad()
    def __call__(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        order: list[Tensor] = []
        start = 0
        for a, b in _blocks(x, z, context, self.block, self.context_weight):
            plan = sinkhorn(
                torch.cdist(a, b).square(), 2 * self.sigma**2, iterations=self.iterations
            )
            partner = torch.multinomial(plan.exp().flatten(0, 1), 1).reshape(plan.shape[:-1])
            first = start + a.shape[1] * torch.arange(len(a), device=x.device).unsqueeze(-1)
            order.append((partner + first).flatten())
            start += a.shape[0] * a.shape[1]
        return z[torch.cat(order)]


def sinkhorn(
    cost: Tensor, regularization: float, *, iterations: int = 2000, tolerance: float = 1e-2
) -> Tensor:
    r"""Logarithm of the plan that minimises cost plus ``regularization`` times its KL divergence.

    .. math:: \log\pi_{ij} = f_i + g_j - C_{ij}/\varepsilon, \qquad
        f_i = -\log n - \log\sum_j e^{g_j - C_{ij}/\varepsilon}

    and g likewise, in turns: marginals are uniform, exactly in the columns.

    Args:
        cost: Cost of each pair, shape ``(*batch, n, n)``.
        regularization: The weight :math:`\varepsilon`, in units of the cost.
        iterations: Most iterations.
        tolerance: How much a row's sum may miss 1/n, relatively.

    Raises:
        FloatingPointError: If the tolerance is not reached.

    Example:
        >>> sinkhorn(torch.zeros(2, 2), 1.0).exp()
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]])
    """
    kernel, share = -cost / regularization, -math.log(cost.shape[-1])
    f = share - kernel.logsumexp(-1, keepdim=True)
    missed = math.inf
    for _ in range(iterations):
        g = share - (kernel + f).logsumexp(-2, keepdim=True)
        rows = (kernel + g).logsumexp(-1, keepdim=True)
        missed = (f + rows - share).abs().max().item()
        if missed <= tolerance:
            return kernel + f + g
        f = share - rows
    raise FloatingPointError(
        f"sinkhorn expected to settle in {iterations} iterations, but rows still miss their share "
        f"by {missed:.2g}. Raise sigma or iterations, or use OptimalTransport."
    )
