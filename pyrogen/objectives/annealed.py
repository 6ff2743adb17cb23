"""Learning a flow from a density alone, by annealed importance sampling: it finds the modes."""

__all__ = ["AnnealedBootstrap", "Replay"]

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ..distributions import Flow
from .hamiltonian import adapted, evaluate, transition

ACCEPTANCE = 0.65


class Replay(nn.Module):
    """Annealed draws kept for several steps, and drawn again in proportion to their weights.

    The oldest make room for new ones. Its state is part of ``state_dict``.

    Args:
        capacity: Number of draws kept.
        reuse: Number of steps for each annealed batch.
        fill: Number of batches annealed before the first step.

    Raises:
        ValueError: If a number is not positive, or ``fill`` batches are more than ``capacity``.

    Example:
        >>> replay = Replay(capacity=1000, reuse=8)
        >>> len(replay)
        0
    """

    def __init__(self, capacity: int = 12_800, *, reuse: int = 4, fill: int = 8) -> None:
        super().__init__()
        if min(capacity, reuse, fill) < 1:
            raise ValueError(
                f"Replay expected positive numbers, got capacity={capacity}, reuse={reuse} and "
                f"fill={fill}. Leave them out for the default."
            )
        self.capacity = capacity
        self.reuse = reuse
        self.fill = fill
        self.age = 0  # steps since the last annealed batch
        self.kept: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.kept["x"]) if self.kept else 0

    @property
    def mean_log_weight(self) -> Tensor:
        """Logarithm of the mean weight."""
        return self.kept["log_weight"].logsumexp(0) - math.log(len(self))

    def add(self, x: Tensor, log_weight: Tensor, log_q: Tensor) -> None:
        """Keep draws, their log-weights, and the flow's log-density that these refer to."""
        new = {"x": x, "log_weight": log_weight, "log_q": log_q}
        if self.kept:
            new = {name: torch.cat([self.kept[name].to(t), t]) for name, t in new.items()}
        self.kept = {name: t[-self.capacity :] for name, t in new.items()}

    def choose(self, n: int) -> Tensor:
        """Indices of ``n`` draws, with the weights as probabilities; some repeat."""
        cumulative = self.kept["log_weight"].double().softmax(0).cumsum(0)
        points = torch.rand(n, dtype=torch.double, device=cumulative.device) * cumulative[-1]
        return torch.searchsorted(cumulative, points).clamp(max=len(self) - 1)

    def correct(self, index: Tensor, log_q: Tensor) -> None:
        """Let the weights of some draws refer to the flow as it is now."""
        kept = {name: t.clone() for name, t in self.kept.items()}
        log_q = log_q.to(kept["log_q"])
        kept["log_weight"][index] += kept["log_q"][index] - log_q  # one that repeats moves once
        kept["log_q"][index] = log_q
        self.kept = kept

    def get_extra_state(self) -> dict[str, Any]:
        return {"age": self.age, "kept": dict(self.kept)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self.age = state["age"]
        self.kept = {name: t.clone() for name, t in state["kept"].items()}


class AnnealedBootstrap(nn.Module):
    r"""Flow annealed importance sampling bootstrap, FAB: the divergence that sees missed modes.

    The loss is Rényi's divergence of order two of the density :math:`p` from the flow :math:`q`,
    up to twice the unknown :math:`\log Z` of :math:`p`,

    .. math:: \log \int \frac{p(x)^2}{q(x)}\, dx, \qquad
        \nabla = -E_{g} \nabla \log q(x), \qquad g \propto \frac{p^2}{q},

    which is infinite where the flow misses mass, where the reverse Kullback-Leibler divergence
    is indifferent to it. Both are estimated by annealed importance sampling from :math:`q` to
    :math:`g`, through the densities :math:`q^{1 - 2\beta} p^{2\beta}` with
    :math:`\beta = m / (M + 1)` and a step of Hamiltonian Monte Carlo for each of :math:`M` between
    them. So draws move from where the flow is to where it should be. The step sizes are adapted.
    With :math:`M = 0` it is the plain estimate by importance weights of the flow's own draws.

    The mean weight is unbiased for the integral, the gradient is consistent. In ``eval`` mode the
    loss is the fresh estimate, and no state changes.

    Cost: ``draws`` values and gradients of flow and density, ``intermediate * leapfrog + 1``
    times, and a gradient step of the flow; with a :class:`Replay`, the first divided by its
    ``reuse``.

    Args:
        flow: Flow to learn, over all reals.
        log_density: Logarithm of p up to a constant, from ``(draws, features)`` to ``(draws,)``,
            with gradient; -inf is allowed. For the posterior of a Pyro model,
            :meth:`AutoFlow.log_density <pyrogen.guides.AutoFlow.log_density>` with its ``flow``.
        draws: Number of annealed draws, and of a step's.
        intermediate: Number :math:`M` of densities between the flow and its target.
        leapfrog: Number of leapfrog steps of a transition.
        step: Step size to start from, in the units of x.
        replay: Where annealed draws are kept and drawn again; None to use them once.

    Shape:
        ``forward()``: ``()``. Train by ``Trainer(objective, optimizer).fit([()], steps=1000)``.

    Raises:
        TypeError: If ``flow`` is no :class:`~pyrogen.distributions.Flow`.
        ValueError: If the flow needs a context or is not over the reals, a number is not positive,
            or the density does not give one number a draw.
        FloatingPointError: If the density of one of the flow's draws is NaN or infinite, or all
            have none.

    References:
        Midgley, Stimper, Simm, Schölkopf, Hernández-Lobato. Flow Annealed Importance Sampling
        Bootstrap. ICLR 2023. arXiv:2208.01893
        Neal. Annealed Importance Sampling. Statistics and Computing 2001. arXiv:physics/9803008

    Example:
        >>> from pyrogen.distributions import realnvp
        >>> target = dist.Normal(torch.tensor([3.0, 0.0]), 1.0).to_event(1)
        >>> loss = AnnealedBootstrap(realnvp(features=2), target.log_prob, replay=Replay())
        >>> loss().shape
        torch.Size([])
    """

    def __init__(
        self,
        flow: Flow,
        log_density: Callable[[Tensor], Tensor],
        *,
        draws: int = 128,
        intermediate: int = 1,
        leapfrog: int = 5,
        step: float = 0.1,
        replay: Replay | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(
                f"AnnealedBootstrap expected a Flow, got {type(flow).__name__}. Build one by a "
                "recipe, such as nsf(features=2)."
            )
        if flow.context or flow.support is not constraints.real or flow.shift.ndim != 1:
            raise ValueError(
                "AnnealedBootstrap expected a flow of real vectors without context. Learn an "
                "unconstrained law, as AutoFlow does, and condition by fixing the density."
            )
        if draws < 1 or intermediate < 0 or leapfrog < 1 or not 0 < step < math.inf:
            raise ValueError(
                "AnnealedBootstrap expected draws >= 1, intermediate >= 0, leapfrog >= 1 and "
                f"step > 0, got {draws}, {intermediate}, {leapfrog} and {step}."
            )
        self.flow = flow
        self.log_density = log_density
        self.draws = draws
        self.intermediate = intermediate
        self.leapfrog = leapfrog
        self.replay = replay
        self.steps = [step] * intermediate

    def forward(self) -> Tensor:
        if self.replay is None or not self.training:
            x, log_weight, log_q = self.anneal(self.draws)
            return self._loss(x, log_weight, log_q)[0]
        replay = self.replay
        if replay.age % replay.reuse == 0:
            for _ in range(1 if len(replay) else replay.fill):
                replay.add(*self.anneal(self.draws))
        replay.age = (replay.age + 1) % replay.reuse
        total = replay.mean_log_weight
        index = replay.choose(self.draws)
        x, log_q = (replay.kept[name][index].to(self.flow.shift) for name in ("x", "log_q"))
        loss, now = self._loss(x, torch.zeros_like(log_q), log_q)
        replay.correct(index, now)
        return total + loss

    @torch.no_grad()
    def anneal(self, draws: int) -> tuple[Tensor, Tensor, Tensor]:
        r"""Draw from the flow and carry the draws to :math:`p^2 / q`.

        Step sizes are adapted in training mode.

        Args:
            draws: Number of draws.

        Returns:
            Draws, shape ``(draws, features)``; their log-weights, of which the mean weight is
            unbiased for :math:`\int p^2 / q`, and the flow's log-density of them, ``(draws,)``.
        """
        law = self.flow()
        densities = [law.log_prob, self._log_p]
        x, log_q = law.rsample_and_log_prob(Size((draws,)))
        if not self.intermediate:  # no move, so no gradient
            log_p = self._log_p(x)
            _check(log_p, log_q)
            return x, 2 * (log_p - log_q), log_q
        points = evaluate(x, densities)
        _check(points.log_density[1], log_q)
        change = 2 / (self.intermediate + 1)
        log_weight = change * (points.log_density[1] - points.log_density[0])
        for m, step in enumerate(self.steps, 1):
            beta = change * m
            points, accept = transition(
                points,
                densities,
                (1 - beta, beta),
                points.x.new_tensor(step),
                leapfrog=self.leapfrog,
            )
            log_weight = log_weight + change * (points.log_density[1] - points.log_density[0])
            if self.training:
                now = adapted(points.x.new_tensor(step), accept.mean(), target=ACCEPTANCE)
                self.steps[m - 1] = now.item()
        return points.x, log_weight, points.log_density[0]

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": list(self.steps)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        if len(state["steps"]) != self.intermediate:
            raise ValueError(
                f"AnnealedBootstrap has intermediate={self.intermediate}, and the state is of "
                f"{len(state['steps'])}. Build it as it was."
            )
        self.steps = list(state["steps"])

    def _loss(self, x: Tensor, log_weight: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the mean weight as the flow changes, and the flow's log-density now."""
        now = self.flow().log_prob(x)
        moved = log_weight + log_q - now
        return moved.logsumexp(0) - math.log(len(x)), now.detach()

    def _log_p(self, x: Tensor) -> Tensor:
        log_p = self.log_density(x)
        if not isinstance(log_p, Tensor) or log_p.shape != x.shape[:1]:
            got = tuple(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
            raise ValueError(
                f"AnnealedBootstrap expected one log-density a draw, shape ({len(x)},), got {got}."
                " Sum it over the features."
            )
        if x.requires_grad and not log_p.requires_grad:
            raise ValueError(
                "AnnealedBootstrap found that the log-density has no gradient in x. Look for "
                "detach or no_grad in it; if there is none to be had, pass intermediate=0."
            )
        return log_p


def _check(log_p: Tensor, log_q: Tensor) -> None:
    """Refuse densities that say nothing of the flow's draws."""
    if not log_q.isfinite().all() or log_p.isnan().any() or log_p.isposinf().any():
        raise FloatingPointError(
            "AnnealedBootstrap found a log-density of NaN or infinity at a draw of the flow. "
            "Check the density far from its mass, or lower the learning rate."
        )
    if log_p.isneginf().all():
        raise FloatingPointError(
            "AnnealedBootstrap found no draw of the flow that the density thinks possible. "
            "Widen the flow: set flow.scale, or start from a simpler guide."
        )
