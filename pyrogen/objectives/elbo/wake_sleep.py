"""Reweighted wake-sleep: the guide learns the posterior's own divergence, without a path."""

__all__ = ["ReweightedWakeSleep"]

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from .base import Bound
from .baselines import NoBaseline
from .gradients import ScoreFunction
from .multi_sample import weigh
from .run import Run, bare, is_point


class ReweightedWakeSleep(Bound):
    r"""The model climbs the importance-weighted bound; the guide minimises the forward KL.

    .. math:: \nabla_\theta = -\sum_i s \sum_k \tilde w_{ik} \nabla \log p_\theta(x_i, z_{ik}),
        \qquad
        \nabla_\phi = -\sum_i s \sum_k \tilde w_{ik} \nabla \log q_\phi(z_{ik}), \qquad
        \tilde w_{ik} = \frac{w_{ik}}{\sum_j w_{ij}}

    Draws are held, so discrete latents need neither a relaxation nor a baseline. The weights are
    normalized datum by datum, in the cells of the plates that hold every site, and subsampled
    plates are scaled outside: minibatches are as good as the whole. The guide's gradient is biased
    by :math:`O(1/K)`. With ``sleep``, a share of it comes from the model's own dreams, where it is
    not:

    .. math:: \iota \nabla_\phi - (1 - \iota) \nabla_\phi E_{p_\theta(x, z)} \log q_\phi(z \mid x)

    The value is that of the negative importance-weighted bound.

    Cost: ``num_particles`` runs of guide and model, or one vectorized run; one more with
    ``sleep``.

    Args:
        num_particles: Number :math:`K` of draws.
        sleep: From a dream of the model, a dict of all its draws and observations by site, and the
            model's arguments, to the guide's positional arguments:
            ``lambda dream, x: (dream["x"],)``.
        insomnia: Share :math:`\iota` in [0, 1] of the data in the guide's gradient; by default 1
            without ``sleep`` and one half with it.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.
        retain_graph: Passed to ``backward`` by ``loss_and_grads``.

    Raises:
        ValueError: If ``insomnia`` is not in [0, 1], or below 1 without ``sleep``.
        NotImplementedError: If a subsampled plate does not hold every site; or, with ``sleep``, if
            the model has factors, or the guide sites that the model has not, as autoguides do.

    References:
        Bornschein, Bengio. Reweighted Wake-Sleep. ICLR 2015. arXiv:1406.2751
        Le, Kosiorek, Siddharth, Teh, Wood. Revisiting Reweighted Wake-Sleep for Models with
        Stochastic Control Flow. UAI 2019. arXiv:1805.10469

    Example:
        >>> loss = ReweightedWakeSleep(16, sleep=lambda dream, x: (dream["x"],))
    """

    def __init__(
        self,
        num_particles: int = 2,
        *,
        sleep: Callable[..., tuple] | None = None,
        insomnia: float | None = None,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        if insomnia is None:
            insomnia = 1.0 if sleep is None else 0.5
        if not 0 <= insomnia <= 1 or (insomnia < 1 and sleep is None):
            raise ValueError(
                f"ReweightedWakeSleep expected insomnia in [0, 1], and 1 without sleep, got "
                f"{insomnia}. Pass sleep=, a function from a dream to the guide's arguments."
            )
        super().__init__(
            num_particles,
            gradient=ScoreFunction(NoBaseline()),
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        self.sleep = sleep
        self.insomnia = insomnia

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the negative importance-weighted bound, with the gradients of wake and sleep."""
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        if self.sleep is None or self.insomnia == 1 or not torch.is_grad_enabled():
            return loss
        log_q = self._asleep(model, guide, args, kwargs)
        asleep = -(1 - self.insomnia) * log_q
        return loss + (asleep - asleep.detach())

    def _asleep(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor:
        """Log q of a dream's latents, as the guide sees the data that came with them."""
        with torch.no_grad(), poutine.block():
            dream = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
        draws = {name: dream.nodes[name]["value"] for name in dream.stochastic_nodes}
        for name in draws:
            if isinstance(bare(dream.nodes[name]["fn"]), Unit):
                raise NotImplementedError(
                    f"Model site {name!r} is a factor, which draws nothing, so the model's dreams "
                    "are of another law. Make it a distribution, or leave sleep out."
                )
        recall = poutine.trace(poutine.replay(guide, trace=dream))
        recalled = recall.get_trace(*cast(Callable, self.sleep)(draws, *args, **kwargs))
        for name in recalled.stochastic_nodes:
            if name not in dream.nodes or is_point(recalled.nodes[name]["fn"]):
                raise NotImplementedError(
                    f"Guide site {name!r} is no draw of the model's, so a dream cannot be scored "
                    "under this guide. Use a guide whose sites are the model's latents, with laws "
                    "of their own, or leave sleep out."
                )
        return torch.as_tensor(recalled.log_prob_sum())

    def _evaluate(self, runs: Sequence[Run], args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        weighed = weigh(runs, particles=self.num_particles)
        log_p, log_q = (self._stack([getattr(w, n) for w in weighed]) for n in ("log_p", "log_q"))
        log_weight = (log_p - log_q).detach()
        share = log_weight.softmax(0)
        bound = log_weight.logsumexp(0) - math.log(self.num_particles)
        scale = weighed[0].scale
        awake = torch.where(share > 0, share * (log_p + self.insomnia * log_q), 0.0).sum(0)
        return -(scale * bound).sum(), -(scale * awake).sum()
