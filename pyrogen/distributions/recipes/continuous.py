"""Continuous flows: free-form densities, by maximum likelihood or by flow matching."""

__all__ = ["cnf", "log_prob_and_error"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ...inputs import check_batch
from ...nets import TimeMLP
from ...transforms.continuous import EXACT, Continuous, FlowMap
from ...transforms.ode import Solver
from ...transforms.trace import Trace
from ..flow import Flow


def cnf(
    features: int,
    context: int = 0,
    *,
    hidden: Sequence[int] = (64, 64, 64),
    activation: Callable[[], nn.Module] = nn.SiLU,
    solver: Solver | None = None,
    support: constraints.Constraint = constraints.real,
    noise: nn.Module | None = None,
) -> Flow:
    """Build a continuous flow: one field, followed by a solver; smooth, and of no special form.

    Train it by :class:`~pyrogen.objectives.FlowMatching`, which is fast, by
    :class:`~pyrogen.objectives.RegularizedLikelihood` (FFJORD), or by ``MaximumLikelihood``.
    Its density is exact to the solver's tolerance however it was trained.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        hidden: Widths of the hidden layers of the field.
        activation: Makes the nonlinearity between layers; a smooth one.
        solver: How to follow the field; Dormand-Prince at the precision of the numbers if None.
        support: Where draws lie.
        noise: Module whose call gives the law of the noise; standard normal if None.

    References:
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud. FFJORD: free-form continuous dynamics
        for scalable reversible generative models. ICLR 2019. arXiv:1810.01367

    Example:
        >>> flow = cnf(2, context=3)
        >>> flow(torch.zeros(5, 3)).sample().shape
        torch.Size([5, 2])
    """
    field = TimeMLP(features, context, hidden=hidden, activation=activation)
    layer = Continuous(field, features, context, solver=solver)
    return Flow(features, [layer], context, support=support, noise=noise)


def log_prob_and_error(
    flow: Flow, value: Tensor, context: Tensor | None = None, *, trace: Trace = EXACT
) -> tuple[Tensor, Tensor]:
    """Log-density of a flow with continuous layers, and how far off it may be.

    The density is computed twice, by the layers' solvers and by finer ones. Their difference is
    the error of the coarser, and a bound of that of the value returned; the standard error of
    the trace, if it is an estimate, comes on top.

    Cost: for fixed steps three densities, for Dormand-Prince about three.

    Args:
        flow: The flow; layers that are not continuous are computed as they stand.
        value: Data, shape ``(*batch, *event)``.
        context: Broadcastable to ``(*batch, context)``, or None.
        trace: How to get the traces; :class:`~pyrogen.transforms.Hutchinson` where an exact
            trace costs too much.

    Returns:
        Log-density and error in nats, each of shape ``batch``.

    Raises:
        TypeError: If the data are not of floating point.
        ValueError: If the data or the context do not fit.

    Example:
        >>> from pyrogen.transforms.ode import RungeKutta4
        >>> flow = cnf(2, solver=RungeKutta4(4))
        >>> log_prob, error = log_prob_and_error(flow, torch.zeros(2))
        >>> log_prob.item() == flow().log_prob(torch.zeros(2)).item(), error.item()
        (True, 0.0)
    """
    law = flow(context)
    batched = value.unsqueeze(0) if value.ndim == len(law.event_shape) else value
    check_batch(batched, law.event_shape, owner="log_prob_and_error", like=flow.zero)
    batch = value.shape[: value.ndim - len(law.event_shape)]
    batch = torch.broadcast_shapes(batch, law.batch_shape)

    def total(ladj: Tensor) -> Tensor:
        return ladj.reshape(*batch, -1).sum(-1)

    coarse = fine = value.expand(*batch, *law.event_shape)
    rough = exact = variance = value.new_zeros(batch)
    for part in reversed(law.bijection.parts):
        if isinstance(part, FlowMap):
            probes = trace.probes(coarse.reshape(-1, coarse.shape[-1]))  # the same for both
            finer = part.layer.solver.refined(value.dtype)
            first = part.inverse_and_costs(coarse, trace=trace, probes=probes)
            second = part.inverse_and_costs(fine, solver=finer, trace=trace, probes=probes)
            coarse, fine = first.x, second.x
            rough, exact = rough + first.ladj, exact + second.ladj
            variance = variance + second.error.square()
        else:
            coarse, ladj = part.inverse_and_ladj(coarse)
            fine, better = part.inverse_and_ladj(fine)
            rough, exact = rough + total(ladj), exact + total(better)
    rough, exact = rough + law.noise.log_prob(coarse), exact + law.noise.log_prob(fine)
    return exact, (exact - rough).abs() + variance.sqrt()
