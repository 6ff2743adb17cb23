"""Inference in noise space: a latent site of an implicit law becomes the noise behind it."""

__all__ = ["AutoNoiseReparam", "NoiseReparam"]

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.infer.reparam.reparam import Reparam
from pyro.infer.reparam.strategies import Strategy
from torch import Tensor
from torch.distributions import Independent

from ..distributions import LikelihoodFree, Marginal


@runtime_checkable
class HasNoise(Protocol):
    """A distribution that is a deterministic function of noise with a known density."""

    @property
    def noise(self) -> dist.TorchDistribution:
        """The noise, with the batch shape of the distribution."""
        ...

    def from_noise(self, noise: Tensor) -> Tensor:
        """Turn a draw of the noise into a draw of the distribution."""
        ...


class NoiseReparam(Reparam):
    r"""Replace a latent site by the noise that it is a function of.

    The site ``x`` becomes a latent ``x_noise`` with a known density and a deterministic
    ``x = from_noise(x_noise)``. A generator has no density of its own, yet any inference of
    Pyro works on its noise; a flow's posterior is often easier there too.

    Normal noise is made standard, whatever its scale, so a sampler needs no warm-up to find it.

    A :class:`~pyrogen.distributions.Marginal` is opened: ``x_latent`` is drawn from the prior,
    through its own noise if it has any, and then ``x`` from the likelihood. An observed
    ``Marginal`` becomes an ordinary observed site in this way. ``Normal`` sites are
    non-centred.

    To condition on data, condition first and reparameterize the outcome:
    ``poutine.reparam(poutine.condition(model, data), config)``.

    Raises:
        TypeError: If the site's distribution has no noise behind it.
        NotImplementedError: If the site is observed and has no density.

    References:
        Patel, Ray, Oberai. Solution of Physics-based Bayesian Inverse Problems with Deep
        Generative Priors. 2021. arXiv:2107.02926
        Gorinova, Moore, Hoffman. Automatic Reparameterisation of Probabilistic Programs.
        ICML 2020. arXiv:1906.03028

    Example:
        >>> from pyrogen.distributions import Marginal
        >>> prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> def model():
        ...     return pyro.sample("x", Marginal(prior, lambda z: dist.Normal(z.sum(-1), 0.1)))
        >>> opened = pyro.poutine.reparam(model, {"x": NoiseReparam()})
        >>> pyro.poutine.trace(opened).get_trace().stochastic_nodes
        ['x_latent', 'x_noise']
    """

    def apply(self, msg: Any) -> Any:
        name, fn, value, observed = msg["name"], msg["fn"], msg["value"], msg["is_observed"]
        base, rewrap = _unwrap(fn)
        if isinstance(base, Marginal):
            z = _sample(f"{name}_latent", rewrap(base.prior))
            fn = rewrap(base.likelihood(z))
            base, rewrap = _unwrap(fn)
            if observed or not isinstance(base, HasNoise | dist.Normal):
                return {"fn": fn, "value": value, "is_observed": observed}
        if observed:
            if isinstance(base, LikelihoodFree):
                raise NotImplementedError(
                    f"Site '{name}' is observed, but {type(base).__name__} has no density. Draw "
                    "it as a latent site, and observe a noisy copy of it: Normal(draw, noise)."
                )
            return msg  # it has a density: nothing to do
        if not isinstance(base, HasNoise | dist.Normal):
            raise TypeError(
                f"Site '{name}' is {type(base).__name__}, which is no function of noise. "
                "NoiseReparam expected Pushforward, Transformed, Diffused, Marginal or Normal; "
                "leave this site out of its config."
            )
        noise, from_noise = _noise_space(base)
        x = from_noise(_sample(f"{name}_noise", rewrap(noise)))
        return {
            "fn": dist.Delta(x, event_dim=fn.event_dim).mask(False),  # noqa: FBT003
            "value": x,
            "is_observed": True,
        }


def _unwrap(fn: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Take off to_event, mask and expand; return what is inside, and how to put them back."""
    if isinstance(fn, Independent):
        base, inner = _unwrap(fn.base_dist)
        return base, lambda d: inner(d).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        base, inner = _unwrap(fn.base_dist)
        return base, lambda d: inner(d).mask(fn._mask)
    if isinstance(fn, ExpandedDistribution):
        base, inner = _unwrap(fn.base_dist)
        return base, lambda d: inner(d).expand(fn.batch_shape)
    return fn, lambda d: d


def _noise_space(fn: HasNoise | dist.Normal) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Noise of a distribution and the map from it; normal noise is made standard."""
    if isinstance(fn, dist.Normal):
        standard = dist.Normal(fn.loc.new_zeros(fn.batch_shape), 1.0)
        return standard, lambda e: fn.loc + fn.scale * e
    base, rewrap = _unwrap(fn.noise)
    if not isinstance(base, dist.Normal):
        return fn.noise, fn.from_noise
    standard, affine = _noise_space(base)
    return rewrap(standard), lambda e: fn.from_noise(affine(e))


def _sample(name: str, fn: Any) -> Tensor:
    """Draw a site, through its own noise if it has any."""
    base, _ = _unwrap(fn)
    config: dict[str, Reparam] = (
        {name: NoiseReparam()} if isinstance(base, HasNoise | Marginal) else {}
    )
    with poutine.reparam(config=config):
        return pyro.sample(name, fn)


class AutoNoiseReparam(Strategy):
    """Apply :class:`NoiseReparam` to every site of a distribution with noise behind it.

    Example:
        >>> from pyrogen.distributions import Marginal
        >>> @AutoNoiseReparam()
        ... def model():
        ...     prior = Marginal(dist.Normal(0.0, 1.0), lambda z: dist.Poisson(z.exp()))
        ...     pyro.sample("x", prior, obs=torch.tensor(3.0))
        >>> pyro.poutine.trace(model).get_trace().stochastic_nodes
        ['x_latent']
    """

    def configure(self, msg: dict) -> Reparam | None:
        base, _ = _unwrap(msg["fn"])
        if isinstance(base, Marginal | HasNoise):
            return NoiseReparam()
        return None
