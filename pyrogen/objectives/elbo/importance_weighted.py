"""Power means of the importance weights: the importance-weighted, Rényi and χ bounds."""

__all__ = ["ChiSquared", "ImportanceWeighted", "Renyi"]

import math
from abc import abstractmethod

import torch
from torch import Tensor

from .gradients import Gradient
from .multi_sample import MultiSample

NEAR_ELBO = 0.1  # powers below it leave nothing of log K, which would cancel


class PowerMean(MultiSample):
    r"""The logarithm of a power mean, :math:`\frac1t \log \frac1K \sum_k w_k^t`."""

    @property
    @abstractmethod
    def power(self) -> float:
        """The exponent :math:`t`."""

    def value(self, log_weight: Tensor) -> Tensor:
        x = self.power * log_weight
        if abs(self.power) > NEAR_ELBO:
            return (x.logsumexp(0) - math.log(len(x))) / self.power
        top = x.detach().amax(0)
        top = torch.where(top.isfinite(), top, 0.0)
        return (top + (x - top).expm1().mean(0).log1p()) / self.power

    def path_weight(self, log_weight: Tensor) -> Tensor:
        own = (self.power * log_weight).softmax(0)
        return own - self.power * own * (1 - own)

    def model_weight(self, log_weight: Tensor) -> Tensor:
        return (self.power * log_weight).softmax(0)

    def leave_one_out(self, log_weight: Tensor) -> Tensor:
        """Return the bound of the particles but one, for each one, at linear cost.

        Sums over the earlier and over the later particles, so that no rounding lets a particle
        into its own baseline.
        """
        x = self.power * log_weight
        none = torch.full_like(x[:1], -math.inf)
        earlier = torch.cat([none, x[:-1].logcumsumexp(0)])
        later = torch.cat([x[1:].flip(0).logcumsumexp(0).flip(0), none])
        others = torch.logaddexp(earlier, later) - math.log(len(x) - 1)
        return torch.where(others.isfinite(), others / self.power, 0.0)


class ImportanceWeighted(PowerMean):
    r"""The importance-weighted bound, per datum, nearer to the evidence with every particle.

    .. math:: L_K = \sum_i s\, E \log \frac1K \sum_{k=1}^K w_{ik}, \qquad
        w_{ik} = \frac{p(x_i, z_{ik})}{q(z_{ik})}, \qquad L_1 \le L_K \le \log p(x).

    The sum over :math:`i` runs over the cells of the vectorized plates that hold *every* site of
    model and guide: given the parameters they are independent, so each has a bound of its own.
    With a site outside, the weights are joint and :math:`i` takes one value. The subsampling scale
    :math:`s` stands outside the logarithm and all particles see one subsample, so that the
    estimate is a bound in expectation. A ``poutine.scale`` that every site shares stands outside
    too; one that they do not share tempers densities, inside.

    The gradient is unbiased. Draws by ``rsample`` are differentiated along their path; for others
    the score of draw :math:`k` is multiplied by the bound less that of the other draws, which
    leaves the mean as it is: VIMCO. The signal-to-noise ratio of the plain path gradient falls
    with :math:`K`; with ``gradient=DoublyReparameterized()``, which is DReG, it grows.

    Cost: ``num_particles`` runs of guide and model, or one vectorized run.

    Args:
        num_particles: Number :math:`K` of draws in each average.
        gradient: How the gradient is estimated; by default :class:`Reparameterized`.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.
        retain_graph: Passed to ``backward`` by ``loss_and_grads``.

    Raises:
        ValueError: If ``num_particles`` is not a positive integer.
        NotImplementedError: If a subsampled plate does not hold every site: its scale would stand
            inside the logarithm, and the result would not be a bound.

    References:
        Burda, Grosse, Salakhutdinov. Importance Weighted Autoencoders. ICLR 2016. arXiv:1509.00519
        Mnih, Rezende. Variational Inference for Monte Carlo Objectives. ICML 2016.
        arXiv:1602.06725
        Tucker, Lawson, Gu, Maddison. Doubly Reparameterized Gradient Estimators for Monte Carlo
        Objectives. ICLR 2019. arXiv:1810.04152

    Example:
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> exact = -dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(1.0))
        >>> loss = ImportanceWeighted(10_000, vectorize_particles=True).loss(model, guide)
        >>> print(f"{loss:.2f} {exact:.2f}")
        1.52 1.52
    """

    @property
    def power(self) -> float:
        return 1.0


class Renyi(PowerMean):
    r"""The variational Rényi bound, per datum.

    .. math:: L_\alpha = \sum_i s\, E\, \frac{1}{1 - \alpha} \log \frac1K \sum_k w_{ik}^{1-\alpha}

    It falls with :math:`\alpha`: :math:`\alpha = 0` is :class:`ImportanceWeighted`,
    :math:`\alpha \to 1` the ELBO. With :math:`\alpha > 1` the guide seeks a mode, with
    :math:`\alpha < 1` it covers mass; with :math:`\alpha < 0` it is an upper bound as
    :math:`K \to \infty`, and for that minimise :class:`ChiSquared`. The gradient is that of the
    bound with :math:`K` particles, without bias, whatever the sites of the guide.

    Cost: ``num_particles`` runs of guide and model, or one vectorized run.

    Args:
        num_particles: Number :math:`K` of draws in each average.
        alpha: Order of the divergence, below or above 1.
        gradient: How the gradient is estimated; by default :class:`Reparameterized`.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.
        retain_graph: Passed to ``backward`` by ``loss_and_grads``.

    Raises:
        ValueError: If ``alpha`` is 1, or ``num_particles`` not a positive integer.
        NotImplementedError: If a subsampled plate does not hold every site.

    References:
        Li, Turner. Rényi Divergence Variational Inference. NeurIPS 2016. arXiv:1602.02311

    Example:
        >>> from pyrogen.objectives import DoublyReparameterized
        >>> loss = Renyi(8, alpha=0.5, gradient=DoublyReparameterized())
    """

    def __init__(
        self,
        num_particles: int = 2,
        *,
        alpha: float,
        gradient: Gradient | None = None,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        if not math.isfinite(alpha) or alpha == 1:
            raise ValueError(
                f"Renyi expected a finite alpha other than 1, got {alpha}. The limit alpha = 1 is "
                "ELBO."
            )
        super().__init__(
            num_particles,
            gradient=gradient,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        self.alpha = alpha

    @property
    def power(self) -> float:
        return 1.0 - self.alpha


class ChiSquared(PowerMean):
    r"""The χ upper bound on the evidence, CUBO, per datum: it falls as the guide covers mass.

    .. math:: U_n = \sum_i s\, E\, \frac1n \log \frac1K \sum_k w_{ik}^n

    The loss is :math:`+U_n`: minimising it lowers :math:`\chi^n(p \,\|\, q)`. It bounds the
    evidence from above as :math:`K \to \infty`; with few particles it may stand below. The model's
    parameters would fall with it: learn them by a lower bound, and the guide alone by this.

    Cost: ``num_particles`` runs of guide and model, or one vectorized run.

    Args:
        num_particles: Number :math:`K` of draws in each average.
        order: Exponent :math:`n > 1`.
        gradient: How the gradient is estimated; by default :class:`Reparameterized`.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.
        retain_graph: Passed to ``backward`` by ``loss_and_grads``.

    Raises:
        ValueError: If ``order`` is not above 1, or ``num_particles`` not a positive integer.
        NotImplementedError: If a subsampled plate does not hold every site.

    References:
        Dieng, Tran, Ranganath, Paisley, Blei. Variational Inference via χ Upper Bound
        Minimization. NeurIPS 2017. arXiv:1611.00328

    Example:
        >>> loss = ChiSquared(64, vectorize_particles=True)
    """

    sign = 1.0  # an upper bound

    def __init__(
        self,
        num_particles: int = 2,
        *,
        order: float = 2.0,
        gradient: Gradient | None = None,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        if not 1 < order < math.inf:
            raise ValueError(
                f"ChiSquared expected an order above 1, got {order}. Pass 2 for the divergence "
                "of its name."
            )
        super().__init__(
            num_particles,
            gradient=gradient,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        self.order = order

    @property
    def power(self) -> float:
        return self.order
