"""Short chains in the noise of a map, from where it hides mass: do they forget their start?"""

__all__ = ["pilot", "pushed", "rhat", "stuck"]

from collections.abc import Callable

import torch
from torch import Size, Tensor

from ..distributions import Transformed
from ..guides.log_joint import LogJoint
from ..objectives.hamiltonian import Points, adapted, evaluate, transition

Density = Callable[[Tensor], Tensor]

CANDIDATES = 16  # for each chain that starts elsewhere
HIDDEN = 0.02  # of the mass: where the guide has least for it, half of these chains start
LEAPFROG = 8
LONGEST = 0.25  # step: eight of them are a third of a standard normal law's period
FIRST = 0.1
TAIL = 0.05  # of all draws: a chain that stays there has not seen the rest


def pushed(law: Transformed, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Latents at ``noise``, shape ``(n, latents)``, and the log-determinant, shape ``(n,)``."""
    u, ladj = law.bijection.call_and_ladj(noise)
    return u, ladj.reshape(len(noise), -1).sum(-1)


def pilot(
    law: Transformed, log_joint: LogJoint, chains: int, transitions: int
) -> tuple[Tensor, Tensor]:
    """Latents and log-density of short chains, ``(transitions, chains, latents + 1)``; steps."""

    def density(noise: Tensor) -> Tensor:
        u, ladj = pushed(law, noise)
        reached = u.isfinite().all(-1)  # a path that diverges overflows
        value = log_joint(u.where(reached[:, None], 0.0)) + ladj
        return value.where(reached, -torch.inf)

    points = _starts(law, log_joint, density, chains)
    step = torch.full_like(points.x[:, 0], FIRST)
    kept = []
    for i in range(2 * transitions):
        jitter = 0.6 + 0.8 * torch.rand_like(step)  # or a period could be hit
        points, accept = transition(points, [density], [1.0], step * jitter, leapfrog=LEAPFROG)
        if i < transitions:
            step = adapted(step, accept, rate=1.0).clamp(max=LONGEST)
        else:
            u = law.bijection(points.x)
            kept.append(torch.cat([u, points.log_density[0][:, None]], -1))
    return torch.stack(kept), step


def _starts(law: Transformed, log_joint: LogJoint, density: Density, chains: int) -> Points:
    """Half of the chains at draws of the guide, half elsewhere, all where density is finite.

    Elsewhere is where the posterior has mass, as far as can be told without the guide: points
    are drawn blindly and weighed. What has no mass, no sampler needs to leave.
    """
    zero = law.noise.mean
    found = []
    for source in (log_joint.prior, _uniform(zero, log_joint)):
        try:
            u, log_weight = source(CANDIDATES * chains)
            noise = law.bijection.inverse_and_ladj(u)[0]
        except (NotImplementedError, FloatingPointError):  # no draws, or out of the map's reach
            continue
        found.append(_elsewhere(law, noise, log_weight, density, chains // 4))
    missing = chains - chains // 2 - sum(map(len, found))
    if missing:
        wide = 3 * law.noise.sample(Size((CANDIDATES * chains,)))
        log_weight = density(wide) - law.noise.log_prob(wide / 3)
        found.append(_elsewhere(law, wide, log_weight, density, missing))
    own = law.noise.sample(Size((2 * chains,)))
    own = own[_finite(own, density)[0]]
    if not len(own):
        raise FloatingPointError(
            "fidelity found no draw of the guide where the model's log-density has a finite "
            "gradient. Check the model far from its mass."
        )
    found.append(own[torch.randint(len(own), (chains // 2,), device=own.device)])
    return evaluate(torch.cat(found), [density])


def _uniform(zero: Tensor, log_joint: LogJoint) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Where NUTS starts without a map: uniform on (-2, 2), unconstrained."""

    def draw(n: int) -> tuple[Tensor, Tensor]:
        u = 4 * torch.rand(n, len(zero), dtype=zero.dtype, device=zero.device) - 2
        return u, log_joint(u)

    return draw


def _elsewhere(
    law: Transformed, noise: Tensor, log_weight: Tensor, density: Density, n: int
) -> Tensor:
    """Choose ``n`` weighed points: half by weight, half of what the guide hides most.

    The weights of the guide's own draws know nothing of the mass that it misses. These draws are
    not its own, so their p/q is large just there, and there a chain that can be stuck is.
    """
    usable = noise.isfinite().all(-1) & log_weight.isfinite()
    noise, log_weight = noise[usable], log_weight[usable]
    usable, value = _finite(noise, density)
    noise, log_weight = noise[usable], log_weight[usable]
    if not len(noise):
        return noise
    share = log_weight.double().softmax(0)
    order = (value - law.noise.log_prob(noise)).argsort(descending=True)  # log p/q
    before = share[order].cumsum(0) - share[order]
    hidden = share.index_fill(0, order[before >= HIDDEN], 0.0)
    chosen = (share + hidden / hidden.sum()).multinomial(n, replacement=True)
    return noise[chosen]


def _finite(noise: Tensor, density: Density) -> tuple[Tensor, Tensor]:
    """Where density and slope are finite, shape ``(n,)``; the log-density of these points."""
    if not len(noise):
        return noise.new_zeros(0, dtype=torch.bool), noise.new_zeros(0)
    points = evaluate(noise, [density])
    usable = points.log_density[0].isfinite() & points.slope[0].isfinite().all(-1)
    return usable, points.log_density[0][usable]


def _ranks(x: Tensor) -> Tensor:
    """Ranks of each feature among all draws of all chains, in (0, 1)."""
    n = x.shape[0] * x.shape[1]
    order = x.reshape(n, -1).argsort(0).argsort(0)
    return ((order + 0.625) / (n + 0.25)).double().reshape(x.shape)


def rhat(x: Tensor) -> float:
    """Largest rank-normalised split R̂ over the features of ``(draws, chains, features)``."""
    half = len(x) // 2
    z = torch.special.ndtri(_ranks(x))
    z = torch.cat([z[:half], z[half : 2 * half]], dim=1)
    within, between = z.var(0).mean(0), z.mean(0).var(0)
    return ((half - 1) / half + between / within).sqrt().max().item()


def stuck(x: Tensor) -> int:
    """Number of chains whose mean rank, in some feature, lies in a tail."""
    mean = _ranks(x).mean(0)
    return int(((mean < TAIL) | (mean > 1 - TAIL)).any(-1).sum())
