"""How the gradient of a bound is estimated: along the draws' path, or by their score."""

__all__ = ["DoublyReparameterized", "Gradient", "Reparameterized", "ScoreFunction"]

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import is_identically_zero
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor, nn

from .baselines import Baseline, LeaveOneOut, NoBaseline
from .run import Crossing, Detached, Run, bare, check_runs_alone, dropouts, is_point, replayed


class Gradient(nn.Module, ABC):
    """How one run of guide and model is made, and what of it is differentiated.

    A bound takes one by ``gradient=``. Whether draws go by path or by score is the gradient's
    choice; what is subtracted from the score's signal is its baseline's.

    Args:
        baseline: What is subtracted from the signal of the sites that go by their score.
    """

    single_sample_only = False  # whether the estimator holds for the ELBO alone

    def __init__(self, baseline: Baseline | None = None) -> None:
        super().__init__()
        self.baseline = LeaveOneOut() if baseline is None else baseline
        if not isinstance(self.baseline, Baseline):
            raise TypeError(
                f"{type(self).__name__} expected a baseline, got {baseline!r}. Pass an object "
                "such as LeaveOneOut(), MovingAverage() or NoBaseline()."
            )

    @abstractmethod
    def run(
        self, model: Callable, guide: Callable, nesting: Any, args: tuple, kwargs: dict
    ) -> Run:
        """Run the guide, and the model on its draws."""

    def observe(
        self,
        name: str,
        runs: Sequence[Run],
        gain: Tensor,
        stack: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        """Learn for the steps to come, once the runs of this one are made.

        Args:
            name: Guide site that goes by its score.
            runs: The runs of all particles.
            gain: What multiplies the site's score, shape ``(particles, *plates)``.
            stack: From one tensor a run, in the shape of the plates, to the shape of ``gain``.
        """


class Reparameterized(Gradient):
    r"""Along the path of draws by ``rsample``, by the score of all others: every bound's default.

    .. math:: \nabla_\phi E_{q_\phi} f(z) = E_\epsilon \nabla_\phi f\big(z_\phi(\epsilon)\big)
        \quad\text{or}\quad E_{q_\phi} \big(f(z) - b\big) \nabla_\phi \log q_\phi(z)

    The two go together in one guide. The score's signal is Rao-Blackwellized by plates: a draw
    answers for what its own cells, and what lies outside of plates, contribute.

    Cost: one run of guide and model per particle.

    Args:
        baseline: What is subtracted from the score's signal; by default, what the other particles
            give.

    References:
        Kingma, Welling. Auto-Encoding Variational Bayes. ICLR 2014. arXiv:1312.6114
        Ranganath, Gerrish, Blei. Black Box Variational Inference. AISTATS 2014. arXiv:1401.0118

    Example:
        >>> from pyrogen.objectives import ELBO, MovingAverage
        >>> loss = ELBO(8, gradient=Reparameterized(MovingAverage()))
    """

    def run(
        self, model: Callable, guide: Callable, nesting: Any, args: tuple, kwargs: dict
    ) -> Run:
        return Run(*get_importance_trace("flat", nesting, model, guide, args, kwargs))


class ScoreFunction(Gradient):
    r"""By the score of every draw, reparameterized or not: black-box variational inference.

    .. math:: \nabla_\phi E_{q_\phi} f(z)
        = E_{q_\phi} \big(f(z) - b\big) \nabla_\phi \log q_\phi(z)

    The model is never differentiated with respect to its latents, so it may be a simulator with
    jumps. Sites of ``Delta`` have no density to differentiate and keep their path.

    Cost: one run of guide and model per particle; the variance grows with the number of latents.

    Args:
        baseline: What is subtracted from the signal; by default, what the other particles give.

    Raises:
        NotImplementedError: If the guide is a ``Messenger``, which cannot run without its model.

    References:
        Ranganath, Gerrish, Blei. Black Box Variational Inference. AISTATS 2014. arXiv:1401.0118

    Example:
        >>> from pyrogen.objectives import ELBO
        >>> loss = ELBO(4, gradient=ScoreFunction())
    """

    def run(
        self, model: Callable, guide: Callable, nesting: Any, args: tuple, kwargs: dict
    ) -> Run:
        check_runs_alone(guide, type(self).__name__)
        drawn = poutine.trace(Detached()(guide)).get_trace(*args, **kwargs)
        for name, value in _draws(drawn):  # the trace saw them before they were detached
            if not is_point(drawn.nodes[name]["fn"]):
                drawn.nodes[name]["value"] = value.detach()
        p, q = _scored_on(dict(_draws(drawn)), drawn, model, nesting, args, kwargs)
        for name in q.stochastic_nodes:
            site = q.nodes[name]
            if not is_point(site["fn"]):
                site["score_parts"] = ScoreParts(
                    site["log_prob"], site["unscaled_log_prob"], torch.zeros(())
                )
        return Run(p, q)


class DoublyReparameterized(Gradient):
    r"""Along the path alone, without the guide's score: quiet near the posterior.

    .. math:: \nabla_\phi E F = E \sum_k \Big(\frac{\partial F}{\partial \log w_k} -
        \frac{\partial^2 F}{\partial (\log w_k)^2}\Big)\, \frac{\partial \log w_k}{\partial z_k}\,
        \nabla_\phi z_k

    On the :class:`ELBO` this is sticking the landing: its variance vanishes as the guide reaches
    the posterior. On :class:`ImportanceWeighted`, where the weights are the squares of the
    normalized ones, it is DReG, whose signal-to-noise ratio grows with the particles where that of
    the plain gradient falls. In every case the mean is that of the plain gradient.

    :math:`\log q_\phi` without its score comes from a second run of the guide with its draws held.
    Densities of ``Delta`` sites and of factors keep theirs: they are the Jacobians of transforms.

    Cost: one more run of the guide per particle, when gradients are on. Running statistics of the
    guide's modules, as of ``BatchNorm``, see both runs.

    Raises:
        ValueError: If a guide site is not reparameterized, or the guide has another density in its
            second run: a module that drops units at random, or, found while Pyro's validation is
            on, other noise outside of sites.
        NotImplementedError: If the guide is a ``Messenger``, which cannot run without its model,
            or cannot score a draw that it holds.

    References:
        Roeder, Wu, Duvenaud. Sticking the Landing: Simple, Lower-Variance Gradient Estimators for
        Variational Inference. NeurIPS 2017. arXiv:1703.09194
        Tucker, Lawson, Gu, Maddison. Doubly Reparameterized Gradient Estimators for Monte Carlo
        Objectives. ICLR 2019. arXiv:1810.04152

    Example:
        >>> from pyrogen.objectives import ELBO
        >>> loc = torch.zeros((), requires_grad=True)
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(loc, 1.0))
        >>> loss = ELBO(gradient=DoublyReparameterized()).differentiable_loss(model, guide)
        >>> torch.autograd.grad(loss, loc)  # the guide is the posterior
        (tensor(0.),)
    """

    def __init__(self) -> None:
        super().__init__(NoBaseline())  # there are no scores

    def run(
        self, model: Callable, guide: Callable, nesting: Any, args: tuple, kwargs: dict
    ) -> Run:
        check_runs_alone(guide, type(self).__name__)
        _check_repeatable(guide)
        if not torch.is_grad_enabled():
            return Run(*get_importance_trace("flat", nesting, model, guide, args, kwargs))

        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        again = {n: v.detach() for n, v in _draws(drawn) if not is_point(drawn.nodes[n]["fn"])}
        held = poutine.trace(replayed(again, drawn, guide)).get_trace(*args, **kwargs)
        crossing, rest = Crossing(), dict(_draws(held))
        crossed = dict(_draws(drawn))
        for name, value in crossed.items():
            if value.requires_grad:  # and so is no subsample, which has no event
                site: Any = drawn.nodes[name]
                crossed[name] = crossing(value, rest[name], site["fn"].event_dim)
        p, q = _scored_on(crossed, drawn, model, nesting, args, kwargs)
        with _explained():
            held.compute_log_prob()
        run = Run(p, q, held=held, crossing=crossing)
        for name, site in run.q.items():
            _check_path(name, site)
            _check_same(name, site, held.nodes[name])
        for name in run.jacobians:
            own = held.nodes[name]["unscaled_log_prob"]
            run.q[name]["unscaled_log_prob"] = crossing(run.q[name]["unscaled_log_prob"], own, 0)
            held.remove_node(name)
        return run


def _draws(trace: Any) -> list[tuple[str, Any]]:
    """Names and values of all unobserved sites, those of the plates' subsamples too."""
    return [(name, trace.nodes[name]["value"]) for name in trace.stochastic_nodes]


def _scored_on(
    draws: Mapping[str, Any],
    guide_trace: Trace,
    model: Callable,
    nesting: Any,
    args: tuple,
    kwargs: dict,
) -> tuple[Trace, Trace]:
    """Run the model on these values, and score both traces, as ``get_importance_trace`` does."""
    p = poutine.trace(replayed(draws, guide_trace, model)).get_trace(*args, **kwargs)
    if is_validation_enabled():
        check_model_guide_match(p, guide_trace, nesting)
    p, q = prune_subsample_sites(p), prune_subsample_sites(guide_trace)
    p.compute_log_prob()
    with _explained():
        q.compute_score_parts()
    if is_validation_enabled():
        for site in (*p.nodes.values(), *q.nodes.values()):
            if site["type"] == "sample":
                check_site_shape(site, nesting)
    return p, q


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except KeyError as error:  # a transform that inverts only what it has just made
        raise NotImplementedError(
            "The guide can score only the very tensors that it drew, as with a transform that has "
            "no inverse, and this gradient holds the draws. Use gradient=Reparameterized()."
        ) from error


def _check_path(name: str, site: Any) -> None:
    if not is_identically_zero(site["score_parts"].score_function):
        raise ValueError(
            f"Guide site {name!r} is {type(bare(site['fn'])).__name__}, which is not "
            "reparameterized. DoublyReparameterized needs rsample; use Reparameterized, which "
            "takes the score of such sites."
        )


def _check_same(name: str, site: Any, again: Any) -> None:
    first, second = site["unscaled_log_prob"], again["unscaled_log_prob"]
    if is_validation_enabled() and not torch.allclose(
        first, second, rtol=1e-2, atol=1e-2, equal_nan=True
    ):
        raise ValueError(
            f"Guide site {name!r} has another density when the guide runs again on the same "
            "draws. DoublyReparameterized needs a guide that is random in its sites alone: make "
            "other noise a site, call eval(), or use gradient=Reparameterized()."
        )


def _check_repeatable(guide: Callable) -> None:
    for name, part in dropouts(guide):
        raise ValueError(
            f"Guide module {name!r} is {type(part).__name__} in training mode: a second run of "
            "the guide has another density. Call guide.eval(), remove it, or use "
            "gradient=Reparameterized()."
        )
