"""Discrete draws with the gradient of a continuous relaxation: the straight-through estimator."""

__all__ = [
    "Continued",
    "Draws",
    "Relaxation",
    "StraightThrough",
    "check_relaxed",
    "check_temperature",
    "continued",
    "relaxation_of",
]

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.distributions import Bernoulli, OneHotCategorical, TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import is_identically_zero
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, constraints
from torch.nn import functional as F

from .gradients import Gradient
from .run import Run, bare, check_runs_alone


class Relaxation(ABC):
    """A discrete law as the outcome of noise that has a density, the concrete distribution's.

    Args:
        logits: Of each draw, or normalized along the last dimension of each.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Mean of the discrete draw; the draw less its mean is the score of the logits."""

    @abstractmethod
    def noisy(self) -> Tensor:
        """Draw the logits with their noise; which of them wins has the discrete law."""

    @abstractmethod
    def hard(self, noisy: Tensor) -> Tensor:
        """Return the discrete draw."""

    @abstractmethod
    def soft(self, noisy: Tensor, temperature: float) -> Tensor:
        """Return the relaxed draw, which tends to the discrete one as the temperature falls."""

    @abstractmethod
    def given_hard(self, noisy: Tensor) -> Tensor:
        """Return ``noisy``, with the gradient that it has when drawn anew given the hard draw."""

    @abstractmethod
    def other(self, hard: Tensor) -> Tensor:
        """Return values of the law that all differ from ``hard``."""

    @abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, continued linearly between the values of the law."""


class _Logistic(Relaxation):
    """Bernoulli: is a logit, with logistic noise, above zero?"""

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()

    def noisy(self) -> Tensor:
        return self.logits + _gumbel(self.logits) - _gumbel(self.logits)

    def hard(self, noisy: Tensor) -> Tensor:
        return (noisy.detach() > 0).to(noisy)

    def soft(self, noisy: Tensor, temperature: float) -> Tensor:
        return (noisy / temperature).sigmoid()

    def given_hard(self, noisy: Tensor) -> Tensor:
        # Noise v given the sign: noisy = sign * softplus(logit(v) + softplus(sign * logit)).
        sign = torch.where(noisy.detach() > 0, 1.0, -1.0).to(noisy)
        size = noisy.detach().abs()
        offset = F.softplus(sign * self.logits)
        v = size + (-torch.expm1(-size)).log() - offset.detach()
        return sign * F.softplus(v + offset)

    def other(self, hard: Tensor) -> Tensor:
        return 1 - hard

    def log_prob(self, value: Tensor) -> Tensor:
        return value * self.logits - F.softplus(self.logits)


class _Gumbel(Relaxation):
    """One-hot: which of the normalized logits, with Gumbel noise, is the largest?"""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits.clamp(min=torch.finfo(logits.dtype).min / 4))  # 0 * inf is nan

    @property
    def mean(self) -> Tensor:
        return self.logits.softmax(-1)

    def noisy(self) -> Tensor:
        return self.logits + _gumbel(self.logits)

    def hard(self, noisy: Tensor) -> Tensor:
        return F.one_hot(noisy.detach().argmax(-1), noisy.shape[-1]).to(noisy)

    def soft(self, noisy: Tensor, temperature: float) -> Tensor:
        return (noisy / temperature).softmax(-1)

    def given_hard(self, noisy: Tensor) -> Tensor:
        # The largest is standard Gumbel whatever the logits; the others are truncated at it.
        fixed, logits = noisy.detach(), self.logits
        top = fixed.max(-1, keepdim=True).values
        below = self.hard(noisy) == 0
        gap = (fixed - top).masked_fill(~below, -1.0)
        v = logits.detach() - fixed + (-torch.expm1(gap)).log()
        return torch.where(below, -torch.logaddexp(v - logits, -top), fixed)

    def other(self, hard: Tensor) -> Tensor:
        return hard.roll(1, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        return (value * self.logits).sum(-1)


def relaxation_of(fn: Any) -> Relaxation | None:
    """Return how a law is relaxed, in the shape of its draws; None if it is not."""
    law = bare(fn)
    if isinstance(law, Bernoulli):
        return _Logistic(law.logits.expand(fn.shape()))
    if isinstance(law, OneHotCategorical) and not law.has_rsample:
        return _Gumbel(law.logits.expand(fn.shape()))
    return None


class _Continued(TorchDistribution):
    """A discrete law whose log-density is continued linearly between its values."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True  # its draws have a path

    def __init__(self, law: Bernoulli | OneHotCategorical) -> None:
        self.law = law
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return self.law.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Continued":
        return _Continued(self.law.expand(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.law.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        relaxation = relaxation_of(self.law)
        assert relaxation is not None
        return relaxation.log_prob(value)


class Draws(Messenger):
    """Draws a guide's Bernoulli and one-hot sites by their noise, which it keeps.

    Args:
        temperature: Of the relaxation, where the draws carry its gradient; None where they carry
            none.
    """

    def __init__(self, temperature: float | None = None) -> None:
        super().__init__()
        self.temperature = temperature
        self.noise: dict[str, tuple[Relaxation, Tensor]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"]:
            return
        relaxation = relaxation_of(msg["fn"])
        if relaxation is None:
            return
        noisy = relaxation.noisy()
        self.noise[msg["name"]] = (relaxation, noisy)
        msg["value"] = relaxation.hard(noisy)
        msg["done"] = True
        if self.temperature is not None:
            soft = relaxation.soft(noisy, self.temperature)
            msg["value"] = msg["value"] + (soft - soft.detach())
            msg["fn"] = continued(msg["fn"])


class Continued(Messenger):
    """Lets a model's density at the sites of these names be differentiated by their values."""

    def __init__(self, names: Mapping[str, Any], owner: str) -> None:
        super().__init__()
        self.names = names
        self.owner = owner

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and not msg["is_observed"]:
            msg["fn"] = self._continued(msg["name"], msg["fn"])

    def _continued(self, name: str, fn: Any) -> Any:
        if relaxation_of(fn) is None:
            raise NotImplementedError(
                f"Model site {name!r} is {type(bare(fn)).__name__}, whose density is known at its "
                f"discrete values alone. {self.owner} needs Bernoulli or OneHotCategorical there; "
                "or use gradient=Reparameterized()."
            )
        return continued(fn)


def continued(fn: Any) -> Any:
    """The same law, beneath the same wrappers, with a density between its values."""
    if isinstance(fn, MaskedDistribution):
        return continued(fn.base_dist).mask(fn._mask)
    if isinstance(fn, Independent):
        return continued(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        return continued(fn.base_dist).expand(fn.batch_shape)
    return _Continued(fn)


def check_relaxed(name: str, site: Any, owner: str) -> None:
    """Refuse a guide site that goes by its score.

    Raises:
        NotImplementedError: If it does.
    """
    if is_identically_zero(site["score_parts"].score_function):
        return
    kind = type(bare(site["fn"])).__name__
    if kind == "Categorical":
        raise NotImplementedError(
            f"Guide site {name!r} is Categorical, whose integers carry no gradient. {owner} needs "
            "OneHotCategorical in guide and model; or use gradient=Reparameterized()."
        )
    raise NotImplementedError(
        f"Guide site {name!r} is {kind}, which has neither rsample nor a relaxation. {owner} "
        "takes Bernoulli, OneHotCategorical and what has rsample; use gradient=Reparameterized()."
    )


def check_temperature(temperature: float, owner: str) -> None:
    """Refuse a temperature that is not positive and finite.

    Raises:
        ValueError: If it is not.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"{owner} expected a positive temperature, got {temperature}. Pass one such as 0.5."
        )


class StraightThrough(Gradient):
    r"""Discrete draws, hard on the way forward and relaxed on the way back: quiet and biased.

    .. math:: b = H(z), \qquad \nabla_\phi b := \nabla_\phi\, \sigma(z / \tau), \qquad
        z = \text{logits}_\phi + \text{noise}

    For Bernoulli sites the noise is logistic, :math:`H` the unit step and :math:`\sigma` the
    logistic function; for OneHotCategorical, Gumbel, the one-hot of the largest, and the softmax.
    Values are exactly the site's own, and so is the bound; densities are continued linearly
    between them. Sites with ``rsample`` go along their path.

    The gradient is **biased**. It has the slope of the cost at the draw where the truth has the
    difference between draws, so a cost with curvature pulls it towards the inside of the simplex;
    and each slope shrinks as :math:`\tau` grows: at :math:`\tau = 1` and even odds to two thirds.
    The bias from shrinkage vanishes as :math:`\tau \to 0`, that from curvature does not, and the
    variance grows as :math:`1 / \tau`. :class:`Rebar` and :class:`Reparameterized` are unbiased.

    Cost: one run of guide and model per particle.

    Args:
        temperature: Temperature :math:`\tau` of the relaxation; it may be assigned anew as
            training goes on.

    Raises:
        ValueError: If the temperature is not positive.
        NotImplementedError: If a guide site is neither Bernoulli, OneHotCategorical nor
            reparameterized, or the model has another law at its place; or if the guide is a
            ``Messenger``, which cannot run without its model.

    References:
        Bengio, Léonard, Courville. Estimating or Propagating Gradients Through Stochastic Neurons
        for Conditional Computation. 2013. arXiv:1308.3432
        Jang, Gu, Poole. Categorical Reparameterization with Gumbel-Softmax. ICLR 2017.
        arXiv:1611.01144
        Maddison, Mnih, Teh. The Concrete Distribution: A Continuous Relaxation of Discrete Random
        Variables. ICLR 2017. arXiv:1611.00712

    Example:
        >>> from pyrogen.objectives import ELBO
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> def model():
        ...     b = pyro.sample("b", dist.Bernoulli(0.3).expand([3]).to_event(1))
        ...     pyro.sample("x", dist.Normal(b.sum(), 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))
        >>> ELBO(4, gradient=StraightThrough(0.5)).differentiable_loss(model, guide).backward()
    """

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        check_temperature(temperature, "StraightThrough")
        self.temperature = temperature

    def run(
        self, model: Callable, guide: Callable, nesting: Any, args: tuple, kwargs: dict
    ) -> Run:
        owner = type(self).__name__
        check_runs_alone(guide, owner)
        draws = Draws(self.temperature)
        model = Continued(draws.noise, owner)(model)
        p, q = get_importance_trace("flat", nesting, model, draws(guide), args, kwargs)
        for name in q.stochastic_nodes:
            check_relaxed(name, q.nodes[name], owner)
        return Run(p, q)


def _gumbel(like: Tensor) -> Tensor:
    e = torch.empty_like(like, requires_grad=False, memory_format=torch.contiguous_format)
    return -e.exponential_().clamp_min(torch.finfo(e.dtype).tiny).log()
