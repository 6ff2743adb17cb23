"""The evidence lower bound with a gradient that is quiet near the posterior."""

__all__ = ["StickingTheLanding"]

from collections.abc import Callable

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import is_identically_zero
from pyro.infer import Trace_ELBO
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from torch import nn
from torch.distributions import Distribution, Independent
from torch.nn.modules.dropout import _DropoutNd


class StickingTheLanding(Trace_ELBO):
    r"""The ELBO with the score term of its gradient removed.

    Same value and same mean gradient as :class:`pyro.infer.Trace_ELBO`. Its gradient keeps only
    the path through the draw, so its variance vanishes as the guide reaches the posterior:

    .. math:: \nabla_\phi \big[ \log p(x, z_\phi) - \log q_\phi(z_\phi)
        + \log q_\phi(\bar z) \big], \qquad \bar z = \mathrm{stopgrad}(z_\phi).

    :math:`\log q_\phi(\bar z)` comes from a second run of the guide with its draws held. Densities
    of ``Delta`` sites are left alone: they are the Jacobians of transforms, not scores.

    Cost: one more run of the guide per particle, when gradients are on.

    Args:
        num_particles: Draws over which value and gradient are averaged.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.

    Raises:
        ValueError: If a guide site is not reparameterized, or a module of the guide drops units at
            random, so that its second run has another density.
        NotImplementedError: If the guide is a ``Messenger``, which cannot run without its model.

    References:
        Roeder, Wu, Duvenaud. Sticking the Landing: Simple, Lower-Variance Gradient Estimators for
        Variational Inference. NeurIPS 2017. arXiv:1703.09194

    Example:
        >>> loc = torch.zeros((), requires_grad=True)
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(loc, 1.0))
        >>> loss = StickingTheLanding().differentiable_loss(model, guide)
        >>> torch.autograd.grad(loss, loc)  # the guide is the posterior
        (tensor(0.),)
    """

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        _check_repeatable(guide)
        draw = poutine.trace(guide)
        model_trace, guide_trace = super()._get_trace(model, draw, args, kwargs)
        if not torch.is_grad_enabled():
            return model_trace, guide_trace

        draw.trace.detach_()  # replay keeps z and the plates' subsamples, without gradient
        held = poutine.trace(poutine.replay(guide, trace=draw.trace)).get_trace(*args, **kwargs)
        held.compute_log_prob()

        for name in guide_trace.stochastic_nodes:
            site = guide_trace.nodes[name]
            parts = site["score_parts"]
            if not is_identically_zero(parts.score_function):
                raise ValueError(
                    f"Guide site {name!r} is {type(_bare(site['fn'])).__name__}, which is not "
                    "reparameterized. StickingTheLanding needs rsample; use "
                    "pyro.infer.Trace_ELBO for this guide."
                )
            if not isinstance(_bare(site["fn"]), Delta):
                score = held.nodes[name]["log_prob"]
                path = parts.entropy_term - score + score.detach()
                site["score_parts"] = parts._replace(entropy_term=path)
        return model_trace, guide_trace


def _bare(fn: Distribution) -> Distribution:
    """The distribution beneath what plates, masks and ``to_event`` wrap around it."""
    while isinstance(fn, (ExpandedDistribution, Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn


def _check_repeatable(guide: Callable) -> None:
    guide = poutine.unwrap(guide)
    if isinstance(guide, GuideMessenger):
        raise NotImplementedError(
            f"{type(guide).__name__} runs only inside its model, and StickingTheLanding reruns "
            "the guide alone. Use another autoguide, or pyro.infer.Trace_ELBO."
        )
    if isinstance(guide, nn.Module):
        for name, part in guide.named_modules():
            if isinstance(part, _DropoutNd) and part.training and part.p > 0:
                raise ValueError(
                    f"Guide module {name!r} is {type(part).__name__} in training mode: a second "
                    "run of the guide has another density. Call guide.eval(), remove it, or use "
                    "pyro.infer.Trace_ELBO."
                )
