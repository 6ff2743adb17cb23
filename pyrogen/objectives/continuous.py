"""Maximum likelihood for continuous flows: cheaper traces, and fields that are easy to follow."""

__all__ = ["RegularizedLikelihood"]

import math

from torch import Tensor, nn

from ..distributions.flow import Flow
from ..inputs import check_batch
from ..transforms.continuous import EXACT, Continuous, FlowMap
from ..transforms.ode import Solver
from ..transforms.trace import Trace
from .likelihood import check_law, check_support


class RegularizedLikelihood(nn.Module):
    r"""Negative log-likelihood of a continuous flow, plus what following its field costs.

    .. math:: \frac 1n \sum_i \Big[ -\log p(x_i)
        + \lambda_K \int_0^1 |v|^2 \,\mathrm dt
        + \lambda_J \int_0^1 \lVert \partial_x v \rVert_F^2 \,\mathrm dt \Big]

    in nats, all three from one pass. The first regulariser makes paths short, the second makes
    them straight and steps few; with neither a solver slows down as training goes on. Trace and
    solver are those of training only: the flow's own density stays exact.

    Args:
        flow: A flow with at least one :class:`~pyrogen.transforms.Continuous` layer.
        kinetic: Weight :math:`\lambda_K`, in nats per squared distance of standardised data.
        jacobian: Weight :math:`\lambda_J`, in nats.
        trace: How to get traces: :class:`~pyrogen.transforms.Hutchinson` gives an unbiased loss
            at the cost of its few draws; exact by default.
        solver: How to follow the field in training, such as ``RungeKutta4(8)``; each layer's own
            if None.

    Shape:
        ``forward(x, context)``: ``(*batch, *event)`` and ``(*batch, context)`` to ``()``.

    Raises:
        TypeError: If ``x`` is not of floating point.
        ValueError: If the flow has no continuous layer, a weight is negative, or data or context
            do not fit.

    References:
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud. FFJORD: free-form continuous dynamics
        for scalable reversible generative models. ICLR 2019. arXiv:1810.01367
        Finlay, Jacobsen, Nurbekyan, Oberman. How to train your neural ODE: the world of Jacobian
        and kinetic regularization. ICML 2020. arXiv:2002.02798

    Example:
        >>> from pyrogen.distributions.recipes.continuous import cnf
        >>> from pyrogen.transforms import Hutchinson
        >>> loss = RegularizedLikelihood(cnf(2), kinetic=0.01, trace=Hutchinson(2))
        >>> loss(torch.zeros(5, 2)).item() == -cnf(2)().log_prob(torch.zeros(2)).item()
        True
    """

    def __init__(
        self,
        flow: Flow,
        *,
        kinetic: float = 0.0,
        jacobian: float = 0.0,
        trace: Trace = EXACT,
        solver: Solver | None = None,
    ) -> None:
        super().__init__()
        for name, weight in (("kinetic", kinetic), ("jacobian", jacobian)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"RegularizedLikelihood expected {name} >= 0, got {weight}.")
        if not any(isinstance(layer, Continuous) for layer in flow.layers):
            raise ValueError(
                "RegularizedLikelihood expected a flow with a Continuous layer, got none. Build "
                "it by cnf, or use MaximumLikelihood."
            )
        self.flow = flow
        self.kinetic = kinetic
        self.jacobian = jacobian
        self.trace = trace
        self.solver = solver

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        law = self.flow(context)
        check_law(law, x, like=self.flow.zero, owner="RegularizedLikelihood")
        check_support(law, x)
        batch = x.shape[: x.ndim - len(law.event_shape)]
        total = penalty = x.new_zeros(batch)
        for part in reversed(law.bijection.parts):
            if isinstance(part, FlowMap):
                costs = part.inverse_and_costs(x, solver=self.solver, trace=self.trace)
                x, ladj = costs.x, costs.ladj
                penalty = penalty + self.kinetic * costs.kinetic + self.jacobian * costs.jacobian
            else:
                x, ladj = part.inverse_and_ladj(x)
            total = total + ladj.reshape(*batch, -1).sum(-1)
        check_batch(x, x.shape[len(batch) :], owner="The noise of RegularizedLikelihood")
        return (penalty - law.noise.log_prob(x) - total).mean()
