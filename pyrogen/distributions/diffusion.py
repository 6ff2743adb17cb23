"""Diffusion models: noise carried back to data by a learned denoiser."""

__all__ = ["Denoiser", "Diffused", "Diffusion", "ExactDenoiser", "Preconditioned"]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ..inputs import check_batch, check_context
from ..paths import EDM, GaussianPath
from ..transforms.recompute import parameters_of, recomputed
from ..transforms.trace import ExactTrace, Hutchinson, Trace, quadratic_forms
from .samplers import Multistep, Sampler
from .standard import standard_units

EXACT_UP_TO = 64  # dimensions; beyond, an exact trace costs more than its error is worth
COTANGENTS_AT_ONCE = 4096  # rows of one batch of derivatives: bounds the memory of a density


class Denoiser(nn.Module, ABC):
    """Expected data given noisy data: ``denoiser(x_t, sigma, context)``.

    Shape:
        ``x_t``: ``(batch, *event)``, standardised data plus ``sigma`` times standard noise;
        ``sigma``: ``(batch,)``; ``context``: ``(batch, context)`` or None; result as ``x_t``.
    """

    @abstractmethod
    def forward(self, x_t: Tensor, sigma: Tensor, context: Tensor | None) -> Tensor:
        """Return the expected data."""


class ExactDenoiser(Denoiser):
    """A known denoiser, used as it stands.

    Args:
        function: Map ``(x_t, sigma, context) -> x``, as :class:`Denoiser` has it.

    Example:
        >>> standard_normal = ExactDenoiser(lambda x, s, context: x / (1 + s[:, None] ** 2))
        >>> Diffusion(standard_normal, (2,))().log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x_t: Tensor, sigma: Tensor, context: Tensor | None) -> Tensor:
        return self.function(x_t, sigma, context)


class Preconditioned(Denoiser):
    r"""A network that sees inputs of unit variance and predicts targets of unit variance.

    .. math:: D(x, \sigma) = \frac{x}{1 + \sigma^2} + \frac{\sigma}{\sqrt{1 + \sigma^2}}
        \, F\Big(\frac{x}{\sqrt{1 + \sigma^2}}, \tfrac14\log\sigma\Big)

    for data of unit variance. At :math:`F = 0` this is the best linear denoiser.

    Args:
        net: Network ``(x, level, context) -> F``, such as :class:`~pyrogen.nets.ResidualMLP`.

    References:
        Karras, Aittala, Aila, Laine. Elucidating the design space of diffusion-based generative
        models. NeurIPS 2022. arXiv:2206.00364
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x_t: Tensor, sigma: Tensor, context: Tensor | None) -> Tensor:
        s = sigma.reshape(-1, *(1,) * (x_t.ndim - 1))
        total = (1 + s.square()).sqrt()
        prediction = self.net(x_t / total, sigma.log() / 4, context)
        if prediction.shape != x_t.shape:
            raise ValueError(
                f"The denoiser's network expected to return shape {tuple(x_t.shape)}, as its "
                f"input, got {tuple(prediction.shape)}. Change its last layer."
            )
        return x_t / total.square() + s / total * prediction


class Diffusion(nn.Module):
    r"""A trainable diffusion model; call it to get the distribution.

    Data are standardised, then noised along a Gaussian path. A denoiser gives the score at every
    noise level, and the score gives the way back, either random or by the probability-flow ODE.
    All paths agree in variance-exploding units, in which the denoiser and the samplers work; the
    path names the clock of :meth:`score` and ends at the highest noise level.

    Args:
        net: Network ``(x, level, context) -> F``, to be preconditioned; or a :class:`Denoiser`,
            used as it stands.
        event_shape: Shape of one datum.
        context: Number of features to condition on; 0 for none.
        path: From data to noise.
        sampler: From noise to data.
        trace: Of the density's Jacobians; None for exact up to 64 dimensions, then 16 random
            probes.
        low: Smallest noise level, in units of the standardised data: at most a hundredth of
            their finest feature.
        high: Largest noise level, in units of the standardised data; the path's, if that is less.
            A conditional mean m, in the same units, puts the log-density about m / high off.
        steps: Number of steps of the density's ODE, at least 5; its error falls with their fourth
            power.

    Shape:
        ``forward(context)``: ``(*batch, context)`` to a distribution of that batch shape.

    Raises:
        ValueError: If the context does not have the width announced, or the levels are not in
            order.

    References:
        Karras, Aittala, Aila, Laine. Elucidating the design space of diffusion-based generative
        models. NeurIPS 2022. arXiv:2206.00364
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole. Score-based generative modeling through
        stochastic differential equations. ICLR 2021. arXiv:2011.13456

    Example:
        >>> from pyrogen.nets import ResidualMLP
        >>> diffusion = Diffusion(ResidualMLP(2, context=3), (2,), context=3)
        >>> p = diffusion(torch.zeros(5, 3))
        >>> p.batch_shape, p.event_shape, p.sample().shape
        (torch.Size([5]), torch.Size([2]), torch.Size([5, 2]))
        >>> with torch.no_grad():
        ...     p.log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int],
        context: int = 0,
        *,
        path: GaussianPath | None = None,
        sampler: Sampler | None = None,
        trace: Trace | None = None,
        low: float = 2e-3,
        high: float = 80.0,
        steps: int = 64,
    ) -> None:
        super().__init__()
        self.denoiser = net if isinstance(net, Denoiser) else Preconditioned(net)
        self.event_shape = Size(event_shape)
        self.context = context
        self.path = EDM() if path is None else path
        self.sampler = Multistep() if sampler is None else sampler
        few = self.event_shape.numel() <= EXACT_UP_TO
        self.trace = trace if trace is not None else ExactTrace() if few else Hutchinson()
        self.low = low
        self.high = min(high, self.path.ratio(torch.ones((), dtype=torch.float64)).item())
        self.steps = steps
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(
                f"Diffusion expected noise levels 0 < low < high, got low={low} and high="
                f"{self.high}, which is at most the end of {self.path}."
            )
        if steps < 5:
            raise ValueError(f"Diffusion expected steps >= 5, got {steps}.")
        self.register_buffer("shift", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))

    def standardize(self, x: Tensor) -> Self:
        """Set shift and scale to the mean and the standard deviation of data, feature by feature.

        Args:
            x: Data, shape ``(*batch, *event_shape)``, at least two of them.
        """
        shift, scale = standard_units(x, self.event_shape, owner="Diffusion", like=self.shift)
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        return self

    def denoise(self, x_t: Tensor, sigma: Tensor, context: Tensor | None = None) -> Tensor:
        """Expected standardised data, in variance-exploding units.

        Args:
            x_t: Standardised data plus noise, shape ``(*batch, *event_shape)``.
            sigma: Noise levels, broadcastable to ``(*batch,)``.
            context: Broadcastable to ``(*batch, context)``.
        """
        check_context(context, self.context, owner="Diffusion", like=self.shift)
        batch = x_t.shape[: x_t.ndim - len(self.event_shape)]
        if context is not None:
            context = context.expand(*batch, -1).reshape(-1, self.context)
        if sigma.ndim > len(batch):
            raise ValueError(
                f"Diffusion expected noise levels of shape {tuple(batch)} at most, got "
                f"{tuple(sigma.shape)}. One level goes with one datum."
            )
        clean = self.denoiser(
            x_t.reshape(-1, *self.event_shape), sigma.expand(batch).reshape(-1), context
        )
        return clean.reshape(x_t.shape)

    def score(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Gradient of :math:`\log p_t` on the path, in standardised units.

        Args:
            x_t: :math:`\alpha_t` times the standardised data plus :math:`\sigma_t` times noise,
                shape ``(*batch, *event_shape)``.
            t: Times in (0, 1], broadcastable to ``(*batch,)``; less than 1 where the path ends at
                alpha = 0 (``Linear``, ``Cosine``).
            context: Broadcastable to ``(*batch, context)``.
        """
        alpha, sigma = self.path(t)
        wide = (..., *(None,) * len(self.event_shape))
        clean = self.denoise(x_t / alpha[wide], sigma / alpha, context)
        return (alpha[wide] * clean - x_t) / sigma[wide].square()

    def forward(self, context: Tensor | None = None) -> "Diffused":
        check_context(context, self.context, owner="Diffusion", like=self.shift)
        return Diffused(self, context)


class Diffused(dist.TorchDistribution):
    r"""Law of the draws of a diffusion model at its smallest noise level.

    The density is that of the *probability-flow ODE* of the model's denoiser,

    .. math:: \mathrm dx = (x - D(x, \sigma)) \,\mathrm d\log\sigma, \qquad
        \log p(x) = \log \mathcal N(x_{\max}; 0, \sigma_{\max}^2 + 1)
        + \int (d - \operatorname{tr}\partial_x D) \,\mathrm d\log\sigma

    in standardised units. Deterministic samplers draw from that law up to their own error;
    stochastic ones from that of the reverse SDE, which is the same for an exact denoiser only.
    The variance at the start is that of noised standardised data, not of the noise alone.

    Cost of a density: ``steps + 1`` traces, and ``4 steps`` calls of the denoiser, in chunks. Its
    gradient costs about four times that, and little memory: each step is computed anew on the way
    back. Use ``torch.no_grad()`` where you need none.

    Args:
        diffusion: The model.
        context: Features to condition on, shape ``(*batch_shape, context)``, or None.
        batch_shape: None for that of the context.
    """

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True

    def __init__(
        self,
        diffusion: Diffusion,
        context: Tensor | None = None,
        *,
        batch_shape: Sequence[int] | None = None,
    ) -> None:
        if batch_shape is None:
            batch_shape = () if context is None else context.shape[:-1]
        super().__init__(Size(batch_shape), diffusion.event_shape, validate_args=False)
        self.diffusion = diffusion
        self.context = context

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> "Diffused":
        context = None if self.context is None else self.context.expand(*batch_shape, -1)
        return Diffused(self.diffusion, context, batch_shape=batch_shape)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def noise(self) -> dist.TorchDistribution:
        """Law of the noise from which the sampler starts, in standardised units."""
        zero = torch.zeros_like(self.diffusion.shift).expand(self.batch_shape + self.event_shape)
        return dist.Normal(zero, math.hypot(self.diffusion.high, 1.0)).to_event(self.event_dim)

    def from_noise(self, noise: Tensor) -> Tensor:
        """Carry noise to data, deterministically and differentiably.

        Args:
            noise: A draw of :attr:`noise`, shape ``(*sample, *batch_shape, *event_shape)``.

        Raises:
            NotImplementedError: If the sampler is stochastic.
        """
        if not self.diffusion.sampler.deterministic:
            raise NotImplementedError(
                f"{self.diffusion.sampler} draws fresh noise on its way, so data are no function "
                "of the noise it starts from. Build the Diffusion with Multistep() or Heun()."
            )
        return self._draw(noise)

    def _draw(self, noise: Tensor) -> Tensor:
        d = self.diffusion

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return d.denoise(x, sigma, self.context)

        return d.shift + d.scale * d.sampler(denoise, noise, d.low, d.high)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._draw(self.noise.rsample(Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_prob_and_error(value)[0]

    def log_prob_and_error(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density in nats, and the standard error of its trace estimate.

        The error is zero if the trace is exact. Neither counts the error of the ODE solver, which
        falls with the fourth power of ``steps``.

        Args:
            value: Data, shape broadcastable to ``(*sample, *batch_shape, *event_shape)``.
        """
        d = self.diffusion
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "Diffused takes derivatives inside log_prob, which inference mode forbids. Use "
                "torch.no_grad instead."
            )
        batch = value.unsqueeze(0) if value.ndim == self.event_dim else value
        check_batch(batch, self.event_shape, owner="Diffused", like=d.shift)
        lead = value.shape[: value.ndim - self.event_dim]
        shape = torch.broadcast_shapes(lead, self.batch_shape)
        u = ((value - d.shift) / d.scale).expand(*shape, *self.event_shape)
        u = u.reshape(-1, *self.event_shape)
        context = self.context
        if context is not None:
            context = context.expand(*shape, -1).reshape(-1, d.context)

        probes_per_row = d.trace.probes(u[:1]).shape[0]
        rows = max(1, COTANGENTS_AT_ONCE // probes_per_row)
        given = () if context is None else (context,)
        split = zip(*(v.split(rows) for v in (u, *given)), strict=True)
        parts = [_flow_density(d, *part) for part in split]
        log_prob, error = (torch.cat(column).reshape(shape) for column in zip(*parts, strict=True))
        return log_prob - d.scale.log().sum(), error


def _flow_density(d: Diffusion, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density of rows ``x`` in standardised units, and its standard error.

    On a uniform grid of log noise levels, where the trace is smooth and flat at both ends, the
    trapezoidal rule is more accurate than Gauss-Legendre's; Gregory's weights keep it of fourth
    order when the ends are not flat. The path between the levels is by Runge-Kutta, also of fourth
    order, which costs little beside the traces.
    """

    def velocity(log_sigma: Tensor, x: Tensor, *context: Tensor) -> Tensor:
        return x - d.denoise(x, log_sigma.exp(), *context)

    def start(log_sigma: Tensor, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return quadratic_forms(lambda x: velocity(log_sigma, x, *context), x, probes)

    def visit(log_sigma: Tensor, x: Tensor, *context: Tensor) -> tuple[Tensor, ...]:
        k1, forms = start(log_sigma, x, *context)
        k2 = velocity(log_sigma + step / 2, x + step / 2 * k1, *context)
        k3 = velocity(log_sigma + step / 2, x + step / 2 * k2, *context)
        k4 = velocity(log_sigma + step, x + step * k3, *context)
        return x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4), forms

    step = (math.log(d.high) - math.log(d.low)) / d.steps
    levels = [x.new_full((), math.log(d.low) + i * step) for i in range(d.steps + 1)]
    weights = [step] * (d.steps + 1)
    for i, weight in enumerate((3 / 8, 7 / 6, 23 / 24)):
        weights[i] = weights[-1 - i] = weight * step

    probes = d.trace.probes(x)
    integral = x.new_zeros(())
    if torch.is_grad_enabled():
        row = (levels[0], *(v[:1] for v in (x, *context)))
        visit = recomputed(visit, parameters_of(lambda *row: (velocity(*row),), row))
    for level, weight in zip(levels[:-1], weights[:-1], strict=True):
        x, forms = visit(level, x, *context)
        integral = integral + weight * forms
    _, forms = start(levels[-1], x, *context)
    divergence, error = d.trace.combine(integral + weights[-1] * forms)
    terminal = dist.Normal(x.new_zeros(()), math.hypot(d.high, 1.0))
    return terminal.log_prob(x).flatten(1).sum(-1) + divergence, error
