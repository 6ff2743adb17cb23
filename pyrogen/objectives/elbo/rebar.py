"""REBAR: the score of discrete draws, quieted by what a relaxation foretells."""

__all__ = ["Rebar"]

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from .baselines import Baseline
from .gradients import Gradient
from .relaxed import (
    Continued,
    Draws,
    Relaxation,
    check_relaxed,
    check_temperature,
    continued,
    relaxation_of,
)
from .run import Frames, Run, check_runs_alone, dropouts, in_plates, mean_of_others, replayed

MEMORY = 0.95  # of the coefficient, from one step to the next


class Rebar(Gradient):
    r"""By the score of Bernoulli and one-hot draws, with a relaxation as control variate.

    .. math:: \nabla_\phi E f(b) = E \big[\big(f(b) - \eta f(s)\big) \nabla_\phi \log q_\phi(b)
        + \eta f'(s) \big(\nabla_\phi \sigma(z / \tau) - \nabla_\phi \sigma(\tilde z / \tau)\big)
        \big], \qquad b = H(z), \quad s = \sigma(z / \tau)

    :math:`z` is what :class:`StraightThrough` draws, and :math:`\tilde z` the same number seen as
    a draw given :math:`b`: its gradient differs. What the relaxed :math:`f(s)` takes from the
    signal the second term gives back, so the mean is the exact gradient whatever :math:`\tau` and
    :math:`\eta`; they change the variance alone. By default :math:`\eta` is 1 at first, and then
    what would have made the last steps' gradients quietest: where the relaxation foretells nothing
    it goes to 0. A baseline is subtracted on top. Sites with ``rsample`` go along their path.

    The model is also run on values inside the simplex, and has to be smooth there:
    ``z @ locs``, where plain score functions may do ``locs[z.argmax(-1)]``. The guide's discrete
    sites must not decide what its other sites are. While Pyro's validation is on, both are looked
    for by changing the discrete draws.

    Cost: one run of the guide, two of the model, and the gradient of the second with respect to
    the draws, per particle. While validation is on, one more run of a guide of several sites.

    Args:
        baseline: What is subtracted from the score's signal on top; by default, what the other
            particles give.
        temperature: Temperature :math:`\tau` of the relaxation.
        coefficient: Weight :math:`\eta` of the control variate; learned by default. What
            is learned is part of ``state_dict``.

    Raises:
        ValueError: If the temperature is not positive or the coefficient not finite, if a site of
            the guide depends on its discrete draws, or if the model fails or jumps between them.
        NotImplementedError: If a guide site is neither Bernoulli, OneHotCategorical nor
            reparameterized, or the model has another law at its place; if the guide is a
            ``Messenger``, which cannot run without its model; or with a bound that joins its
            particles, where the identity does not hold.

    References:
        Tucker, Mnih, Maddison, Lawson, Sohl-Dickstein. REBAR: Low-variance, Unbiased Gradient
        Estimates for Discrete Latent Variable Models. NeurIPS 2017. arXiv:1703.07370

    Example:
        >>> from pyrogen.objectives import ELBO
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> def model():
        ...     b = pyro.sample("b", dist.Bernoulli(0.3).expand([3]).to_event(1))
        ...     pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))
        >>> ELBO(4, gradient=Rebar()).differentiable_loss(model, guide).backward()
    """

    single_sample_only = True

    def __init__(
        self,
        baseline: Baseline | None = None,
        *,
        temperature: float = 0.5,
        coefficient: float | None = None,
    ) -> None:
        super().__init__(baseline)
        check_temperature(temperature, "Rebar")
        if coefficient is not None and not abs(coefficient) < math.inf:
            raise ValueError(
                f"Rebar expected a finite coefficient, got {coefficient}. Pass a number near 1, "
                "or None to learn it."
            )
        self.temperature = temperature
        self.fixed = coefficient
        self.past: dict[str, tuple[float, float]] = {}

    @property
    def coefficient(self) -> float:
        """The weight of the control variate in the next step."""
        if self.fixed is not None:
            return self.fixed
        along, square = (sum(part) for part in zip((0.0, 0.0), *self.past.values(), strict=True))
        return -along / square if square > 0 else 1.0

    def run(
        self, model: Callable, guide: Callable, nesting: Any, args: tuple, kwargs: dict
    ) -> Run:
        check_runs_alone(guide, type(self).__name__)
        draws = Draws()
        p, q = get_importance_trace("flat", nesting, model, draws(guide), args, kwargs)
        for name in q.stochastic_nodes:
            if name not in draws.noise:
                check_relaxed(name, q.nodes[name], type(self).__name__)
        if not (torch.is_grad_enabled() and draws.noise):
            return Run(p, q)
        relaxed = _RelaxedRun(p, q, draws.noise, self.temperature, model, args, kwargs)
        if is_validation_enabled():
            _check_independent(q, draws.noise, guide, args, kwargs)
        return _Controlled(p, q, relaxed=relaxed, coefficient=self.coefficient)

    def observe(
        self,
        name: str,
        runs: Sequence[Run],
        gain: Tensor,
        stack: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        """Let this step's products of plain gradient and control variate join the past's.

        Both are with respect to the site's logits, a cell and a particle each.
        """
        if self.fixed is not None:
            return
        controlled = [r for r in runs if isinstance(r, _Controlled) and name in r.relaxed.noise]
        if len(controlled) < len(runs):
            return
        parts = zip(*(run.products(name) for run in controlled), strict=True)
        foretold, score, across, path = (stack(part) for part in parts)
        if len(foretold) > 1:  # as the baseline that the others give does with it
            foretold = foretold - mean_of_others(foretold)
        square = (foretold.square() * score - 2 * foretold * across + path).sum().item()
        now = controlled[0].coefficient
        both = gain * across - gain * foretold * score + now * (path - foretold * across)
        along = both.sum().item() - now * square
        if math.isfinite(along) and math.isfinite(square):
            past = self.past.get(name, (0.0, 0.0))
            self.past[name] = (MEMORY * past[0] + along, MEMORY * past[1] + square)

    def get_extra_state(self) -> dict[str, tuple[float, float]]:
        return dict(self.past)

    def set_extra_state(self, state: dict[str, tuple[float, float]]) -> None:
        self.past = dict(state)


class _Controlled(Run):
    """A run whose signal and path carry the control variate."""

    def __init__(
        self, model: Trace, guide: Trace, *, relaxed: "_RelaxedRun", coefficient: float
    ) -> None:
        super().__init__(model, guide)
        self.relaxed = relaxed
        self.coefficient = coefficient
        self.foretold: dict[Frames, Tensor] = {}  # relaxed costs that were asked for

    def path(self, weights: Mapping[str, Any]) -> Tensor:
        return super().path(weights) + self.coefficient * self.relaxed.given_back(weights)

    def cost(self, frames: Frames, weights: Mapping[str, Any]) -> Tensor:
        self.foretold[frames] = self.relaxed.cost(frames, weights)
        return super().cost(frames, weights) - self.coefficient * self.foretold[frames]

    def products(self, name: str) -> tuple[Tensor, ...]:
        """The relaxed cost of a site; and of its score and its path, the squares and the product.

        Score and path are gradients with respect to the logits, summed over each event.
        """
        site = self.q[name]
        relaxation, noisy = self.relaxed.noise[name]
        score = relaxation.hard(noisy) - relaxation.mean
        path = self.relaxed.moved.get(name, torch.zeros_like(score))
        events = list(range(-site["fn"].event_dim, 0))
        pairs = (score * score, score * path, path * path)
        sums = [x.sum(events) if events else x for x in pairs]
        frames = frozenset(site["cond_indep_stack"])
        masked = (scale_and_mask(x.detach(), mask=site["mask"]) for x in sums)
        return self.foretold[frames], *(in_plates(x, frames) for x in masked)


class _RelaxedRun(Run):
    """The model on the relaxed draws, scored there together with the guide.

    A relaxed draw is two leaves of one value: what the model computes with, and what the site's
    own densities see.
    """

    def __init__(
        self,
        model: Trace,
        guide: Trace,
        noise: Mapping[str, tuple[Relaxation, Tensor]],
        temperature: float,
        fn: Callable,
        args: tuple,
        kwargs: dict,
    ) -> None:
        self.at_draws = model
        self.noise = noise
        self.temperature = temperature
        self.moved: dict[str, Tensor] = {}  # what is given back, by the site's logits
        smooth = Continued(noise, "Rebar")(fn)
        self.rerun = lambda values: _rerun(smooth, model, values, args, kwargs)
        self.used = {name: self._soft(name, noisy) for name, (_, noisy) in noise.items()}
        self.own = {name: self._soft(name, noisy) for name, (_, noisy) in noise.items()}
        super().__init__(self._model(), self._guide(guide))

    def given_back(self, weights: Mapping[str, Any]) -> Tensor:
        """A scalar whose gradient is in the mean that of what the signal has lost."""
        leaves = [*self.used.values(), *self.own.values()]
        slopes = torch.autograd.grad(
            self.value(weights), leaves, retain_graph=True, allow_unused=True
        )
        used = dict(zip(self.used, slopes, strict=False))
        own = dict(zip(self.own, slopes[len(used) :], strict=True))
        if is_validation_enabled():
            idle = [n for n, slope in used.items() if slope is None or not slope.any()]
            self._check_smooth(idle)
        total = torch.zeros(())
        for name, (relaxation, noisy) in self.noise.items():
            slope = own[name] if used[name] is None else own[name] + used[name]
            again = relaxation.given_hard(noisy)
            soft, softened = (relaxation.soft(z, self.temperature) for z in (noisy, again))
            back = (slope * (soft - softened)).sum()
            if back.requires_grad:
                (moved,) = torch.autograd.grad(back, relaxation.logits, retain_graph=True)
                self.moved[name] = moved
            total = total + back
        return total

    def _soft(self, name: str, noisy: Tensor) -> Tensor:
        return self.noise[name][0].soft(noisy.detach(), self.temperature).requires_grad_()

    def _model(self) -> Trace:
        names = ", ".join(map(repr, self.noise))
        try:
            trace = self.rerun(self.used)
            for name in self.own.keys() & trace.nodes.keys():
                trace.nodes[name]["value"] = self.own[name]
            trace.compute_log_prob()
        except NotImplementedError:
            raise
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"The model fails between the values of {names}: {error} Rebar needs a model that "
                "is smooth in relaxed draws; or use gradient=Reparameterized()."
            ) from error
        if is_validation_enabled():
            for name, site in trace.nodes.items():
                if site["type"] != "sample":
                    continue
                before: Any = self.at_draws.nodes[name]
                if before["log_prob_sum"].isfinite() and not site["log_prob_sum"].isfinite():
                    raise ValueError(
                        f"Model site {name!r} has log-density {site['log_prob_sum'].item()} "
                        f"between the values of {names}. Rebar needs a model that is smooth in "
                        "relaxed draws; or use gradient=Reparameterized()."
                    )
        return trace

    def _guide(self, guide: Trace) -> Trace:
        trace = Trace()
        for name, site in guide.nodes.items():
            node: Any = dict(site)
            if name in self.own:
                node = {k: v for k, v in node.items() if "log_prob" not in k}
                node.update(fn=continued(node["fn"]), value=self.own[name])
            trace.add_node(name, **node)
        trace.compute_log_prob()
        return trace

    def _check_smooth(self, unused: list[str]) -> None:
        """Refuse a model that uses draws without a gradient, as by ``argmax`` or as an index."""
        unused = [name for name in unused if name in self.at_draws.nodes]
        if not unused:
            return
        with torch.no_grad():
            trace = self.rerun(_others(unused, self.noise))
            trace.compute_log_prob(lambda name, _: name not in unused)
        for name, site in _scored_by(trace).items():
            before: Any = self.at_draws.nodes.get(name)
            if before is None or not _same(before["log_prob"], site["log_prob"]):
                raise ValueError(
                    f"Model site {name!r} depends on {', '.join(map(repr, unused))} by a jump, "
                    "such as argmax, rounding or an index. Rebar needs a smooth function, such as "
                    "z @ table; or use gradient=Reparameterized()."
                )


def _check_independent(
    q: Trace, noise: Mapping[str, tuple[Relaxation, Tensor]], guide: Callable, *call: Any
) -> None:
    """Refuse a guide whose sites change when its discrete draws do."""
    if len(q.stochastic_nodes) == 1 or dropouts(guide):
        return
    args, kwargs = call
    with torch.no_grad():
        again = _rerun(guide, q, _others(noise, noise), args, kwargs)
        again.compute_log_prob(lambda name, _: name not in noise)
    for name in {*q.stochastic_nodes, *again.stochastic_nodes}:
        before: Any = q.nodes.get(name)
        after: Any = again.nodes.get(name)
        if before is None or after is None:
            same = False
        elif name in noise:
            relaxation = relaxation_of(after["fn"])
            same = relaxation is not None and _same(noise[name][0].logits, relaxation.logits)
        else:
            same = _same(before["log_prob"], after["log_prob"])
        if not same:
            raise ValueError(
                f"Guide site {name!r} depends on discrete draws of the guide, and Rebar's control "
                "variate does not see how. Use gradient=Reparameterized(LeaveOneOut()) with "
                "several particles."
            )


def _others(
    names: Mapping[str, Any] | list[str], noise: Mapping[str, tuple[Relaxation, Tensor]]
) -> dict[str, Tensor]:
    """Values that the sites have not drawn."""
    return {name: noise[name][0].other(noise[name][0].hard(noise[name][1])) for name in names}


def _scored_by(trace: Any) -> dict[str, Any]:
    return {name: site for name, site in trace.nodes.items() if "log_prob" in site}


def _rerun(
    fn: Callable, trace: Any, values: Mapping[str, Tensor], args: tuple, kwargs: dict
) -> Trace:
    """Run on the draws of a trace, held, with other values for some of them."""
    draws = {n: values.get(n, trace.nodes[n]["value"].detach()) for n in trace.stochastic_nodes}
    return prune_subsample_sites(
        poutine.trace(replayed(draws, trace, fn)).get_trace(*args, **kwargs)
    )


def _same(x: Any, y: Any) -> bool:
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True)
