"""Latent-variable models: the law of data whose latent is integrated out."""

__all__ = ["LatentVariable", "Marginal"]

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NoReturn, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ..inputs import check_batch, check_context
from .base import LikelihoodFree
from .likelihoods import HomoscedasticGaussian, Likelihood


class Marginal(LikelihoodFree):
    r"""Law of :math:`x` where :math:`z \sim p(z)` and :math:`x \mid z \sim p(x \mid z)`.

    .. math:: p(x) = \int p(x \mid z)\, p(z)\, dz

    Draws are exact. The density is an integral without a closed form, so it is not offered:
    ``pyrogen.evaluation.log_evidence`` bounds it, and ``pyrogen.inference.NoiseReparam`` opens
    the integral, which makes the site usable by every inference of Pyro, observed or not.

    Args:
        prior: Distribution :math:`p(z)`.
        likelihood: Map from ``z`` to the Pyro distribution :math:`p(x \mid z)`; it must accept
            ``z`` with more batch dimensions than ``prior`` has.
        event_shape: Shape of one draw of ``x``; found by one call of ``likelihood`` if not given,
            and taken on trust if given.

    Shape:
        ``z``: ``(*sample, *batch, *latent_event)``; ``x``: ``(*sample, *batch, *event)``.

    Example:
        >>> prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> p = Marginal(prior, lambda z: dist.Normal(z.sum(-1), 0.1))
        >>> p.sample((3,)).shape, p.event_shape
        (torch.Size([3]), torch.Size([]))
        >>> p.log_prob(torch.zeros(()))
        Traceback (most recent call last):
            ...
        NotImplementedError: Marginal has draws but no density in closed form. To score ...
    """

    def __init__(
        self,
        prior: dist.TorchDistribution,
        likelihood: Callable[[Tensor], dist.TorchDistribution],
        *,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        self.prior = prior
        self.likelihood = likelihood
        if event_shape is None:
            # A batch that only the likelihood has would share one z: give each its own.
            wide = torch.broadcast_shapes(prior.batch_shape, self._example.batch_shape)
            self.prior = prior if wide == prior.batch_shape else prior.expand(wide)
            event_shape = self._example.event_shape
        super().__init__(self.prior.batch_shape, Size(event_shape))

    @cached_property
    def _example(self) -> dist.TorchDistribution:
        """The likelihood at one draw, made without moving the random stream."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            return self.likelihood(self.prior.sample())

    @constraints.dependent_property
    def support(self) -> constraints.Constraint | None:
        return self._example.support

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.prior.has_rsample and self._example.has_rsample

    @property
    def noise(self) -> dist.TorchDistribution:
        """The prior: what remains random once the likelihood is opened."""
        return self.prior

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "Marginal":
        return Marginal(
            self.prior.expand(Size(batch_shape)), self.likelihood, event_shape=self.event_shape
        )

    def __call__(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw, with gradient as far as prior and likelihood carry one."""
        return self.likelihood(self.prior(Size(sample_shape)))()

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.likelihood(self.prior.sample(Size(sample_shape))).sample()

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw with gradient.

        Raises:
            NotImplementedError: If the prior or the likelihood has no reparameterized draw.
        """
        if not self.has_rsample:
            raise NotImplementedError(
                "Marginal.rsample needs a prior and a likelihood with rsample, got "
                f"{type(self.prior).__name__} and {type(self._example).__name__}. Use sample, "
                "or another likelihood."
            )
        return self.likelihood(self.prior.rsample(Size(sample_shape))).rsample()

    def log_prob(self, value: Tensor) -> NoReturn:
        """Refuse, and say what to do instead.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "Marginal has draws but no density in closed form. To score data, bound it by "
            "pyrogen.evaluation.log_evidence. To fit or to condition it in a Pyro model, open "
            "the site by pyrogen.inference.NoiseReparam."
        )


class LatentVariable(nn.Module):
    r"""A trainable latent-variable model, the generative half of a variational autoencoder.

    Called, it gives the law of the data; its ``model`` is the Pyro program to fit.

    .. math:: z \sim p(z \mid c), \qquad x \mid z, c \sim p\big(x \mid \mathrm{decoder}(z, c)\big)

    Args:
        decoder: Network from ``(n, latents + context)`` to what ``likelihood`` takes; leading
            dimensions are flattened to ``n``, so convolutions see one batch.
        latents: Number of latent features.
        event_shape: Shape of one datum.
        context: Number of features to condition on, appended to ``z``; 0 for none.
        likelihood: Map from the decoder's output to a Pyro distribution over data. A module's
            parameters are learned too. Default: :class:`HomoscedasticGaussian`.
        prior: Module ``context -> distribution`` over ``z``, for instance a flow built with
            the same ``context``. Default: standard normal.

    Shape:
        context ``(*batch, context)``; draws ``(*sample, *batch, *event_shape)``.

    Raises:
        ValueError: If the context does not fit, or the decoder's output gives another shape.

    References:
        Kingma, Welling. Auto-Encoding Variational Bayes. ICLR 2014. arXiv:1312.6114

    Example:
        >>> vae = LatentVariable(nn.Linear(2, 3), latents=2, event_shape=(3,))
        >>> x = torch.randn(100, 3)
        >>> vae = vae.standardize(x)
        >>> vae().sample((5,)).shape
        torch.Size([5, 3])
        >>> trace = pyro.poutine.trace(vae.model).get_trace(x)
        >>> trace.stochastic_nodes, trace.observation_nodes
        (['data', 'z'], ['x'])
    """

    zero: Tensor

    def __init__(
        self,
        decoder: nn.Module,
        latents: int,
        *,
        event_shape: Sequence[int],
        context: int = 0,
        likelihood: Callable[[Tensor], dist.TorchDistribution] | None = None,
        prior: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.event_shape = Size(event_shape)
        self.context = context
        self.likelihood = likelihood or HomoscedasticGaussian(event_shape)
        self.prior = prior
        self.register_buffer("zero", torch.zeros(latents))  # follows .to(device, dtype)

    def forward(self, context: Tensor | None = None) -> Marginal:
        return Marginal(
            self._prior(context),
            lambda z: self.decode(z, context),
            event_shape=self.event_shape,
        )

    def decode(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return p(x | z); its ``mean`` is the reconstruction.

        Args:
            z: Latent, shape ``(*sample, *batch, latents)``.
            context: Shape ``(*batch, context)``.
        """
        check_context(context, self.context, owner="LatentVariable")
        if context is not None:
            shape = torch.broadcast_shapes(z.shape[:-1], context.shape[:-1])
            z = torch.cat([z.expand(*shape, -1), context.expand(*shape, -1)], dim=-1)
        output = self.decoder(z.reshape(-1, z.shape[-1]))  # one batch, as convolutions expect
        p = self.likelihood(output.reshape(*z.shape[:-1], *output.shape[1:]))
        if p.event_shape != self.event_shape:
            raise ValueError(
                f"LatentVariable expected a likelihood of event shape {tuple(self.event_shape)}, "
                f"got {tuple(p.event_shape)}. Change the decoder's output, or add to_event."
            )
        return p

    @property
    def model(self) -> "_Program":
        """The Pyro program ``(x, context=None)``: plate ``data``, latent ``z``, observed ``x``.

        It is a module that shares the parameters, so ``ELBO()(vae.model, guide)`` finds them.
        """
        return _Program(self)

    def standardize(self, x: Tensor) -> Self:
        """Set the units of the likelihood from data.

        Args:
            x: Data, shape ``(*batch, *event_shape)``.

        Raises:
            TypeError: If the likelihood is not a :class:`Likelihood`, and so has no units to set.
            ValueError: If the data are not finite, do not fit, or are fewer than two.
        """
        if not isinstance(self.likelihood, Likelihood):
            raise TypeError(
                "LatentVariable.standardize expected a Likelihood such as HomoscedasticGaussian, "
                f"got {type(self.likelihood).__name__}. Put the units into your likelihood."
            )
        self.likelihood.standardize(x)
        return self

    def _prior(self, context: Tensor | None) -> dist.TorchDistribution:
        check_context(context, self.context, owner="LatentVariable", like=self.zero)
        batch_shape = () if context is None else context.shape[:-1]
        if self.prior is not None:
            p = self.prior(context)
            wide = torch.broadcast_shapes(p.batch_shape, batch_shape)
            return p if p.batch_shape == wide else p.expand(wide)  # a latent for each context
        return dist.Normal(self.zero.expand(*batch_shape, -1), 1.0).to_event(1)


class _Program(nn.Module):
    def __init__(self, latent_variable: LatentVariable) -> None:
        super().__init__()
        self.latent_variable = latent_variable

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        owner = self.latent_variable
        check_batch(x, owner.event_shape, owner="LatentVariable", like=owner.zero)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", owner._prior(context))
            pyro.sample("x", owner.decode(z, context), obs=x)
        return z
