r"""A continuous normalizing flow: the map that follows a vector field.

Time runs from 0 (data) to 1 (noise); the field says how data turn into noise,
:math:`\mathrm dx/\mathrm dt = v(x, t)`.
"""

__all__ = ["Continuous", "Costs", "FlowMap"]

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..inputs import check_context
from .base import SizedBijection
from .ode import DormandPrince, Field, Solver
from .trace import ExactTrace, Trace, pulled_back

COTANGENTS_AT_ONCE = 4096  # rows of one batch of derivatives: bounds the memory of a density
EXACT = ExactTrace()


class Costs(NamedTuple):
    """What following the field from data to noise gives, and what it costs.

    Each has the batch shape of the data, but for ``x``.
    """

    x: Tensor
    """The noise."""
    ladj: Tensor
    """Log-determinant of the map from data to noise."""
    error: Tensor
    """Standard error of ``ladj`` by the trace; zero if that is exact."""
    kinetic: Tensor
    r""":math:`\int |v|^2 \mathrm dt`."""
    jacobian: Tensor
    r""":math:`\int \lVert\partial_x v\rVert_F^2 \mathrm dt`."""


class Continuous(nn.Module):
    r"""Trainable map that follows a vector field, free of any form.

    .. math:: \frac{\mathrm dx}{\mathrm dt} = v(x, t), \qquad
        \frac{\mathrm d}{\mathrm dt} \log\Big|\det\frac{\partial x_t}{\partial x_0}\Big|
        = \operatorname{tr} \partial_x v

    From data (t = 0) to noise (t = 1) and back, by the same solver. With the default solver both
    directions agree to its tolerance, whatever the field; with one of fixed steps the map is
    cheaper, and as exact as its steps are many: ask
    :func:`~pyrogen.distributions.log_prob_and_error`. The log-determinant is exact; to train with
    an estimate of it, or with regularisers, use
    :class:`~pyrogen.objectives.RegularizedLikelihood`, or train without any solver by
    :class:`~pyrogen.objectives.FlowMatching`. The map is as smooth as the field: with a smooth
    activation its derivatives of every order are those of plain autograd, forward and backward,
    in whatever the field depends on. With a solver of fixed steps it can be mapped over by
    ``torch.vmap``, and compiled as one graph.

    Cost: a value is one call of the field per stage of a step; a log-determinant one backward
    pass per feature beside.

    Args:
        field: Module ``(x, t, context) -> v``, shapes ``(batch, features)``, ``(batch,)``,
            ``(batch, context)`` or None, and ``(batch, features)``. The map is the identity where
            it is zero, as an untrained :class:`~pyrogen.nets.TimeMLP` is.
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        solver: How to follow the field.

    Raises:
        ValueError: If the context or the field's result does not fit.
        FloatingPointError: If the solver does not arrive.
        RuntimeError: If a log-determinant is asked for in inference mode.

    References:
        Chen, Rubanova, Bettencourt, Duvenaud. Neural ordinary differential equations. NeurIPS
        2018. arXiv:1806.07366
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud. FFJORD: free-form continuous dynamics
        for scalable reversible generative models. ICLR 2019. arXiv:1810.01367

    Example:
        >>> from pyrogen.nets import TimeMLP
        >>> layer = Continuous(TimeMLP(3), 3)
        >>> y, ladj = layer().call_and_ladj(torch.randn(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        field: nn.Module,
        features: int,
        context: int = 0,
        *,
        solver: Solver | None = None,
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"Continuous expected at least 1 feature, got {features}.")
        self.field = field
        self.features = features
        self.context = context
        self.solver = DormandPrince() if solver is None else solver

    def velocity(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Value of the field.

        Args:
            t: Times, shape ``(batch,)``.
            x: Points, shape ``(batch, features)``.
            context: Shape ``(batch, context)``, or None.
        """
        v = self.field(x, t, context)
        if v.shape != x.shape:
            raise ValueError(
                f"The field of Continuous expected to return shape {tuple(x.shape)}, as its "
                f"input, got {tuple(v.shape)}. Change its last layer."
            )
        return v

    def forward(self, context: Tensor | None = None) -> "FlowMap":
        check_context(context, self.context, owner="Continuous")
        return FlowMap(self, context)


class FlowMap(SizedBijection):
    """From noise to data along the field of a :class:`Continuous` layer.

    Args:
        layer: The layer, which holds field and solver.
        context: Features to condition on, shape ``(*batch_shape, context)``, or None.
    """

    def __init__(self, layer: Continuous, context: Tensor | None) -> None:
        batch_shape = () if context is None else context.shape[:-1]
        super().__init__(layer.features, batch_shape, owner="Continuous")
        self.layer = layer
        self.context = context

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._density(x, 1.0, 0.0)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._density(y, 0.0, 1.0)

    def _call(self, x: Tensor) -> Tensor:
        return self._carry(x, 1.0, 0.0)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._carry(y, 0.0, 1.0)

    def inverse_and_costs(
        self,
        y: Tensor,
        *,
        solver: Solver | None = None,
        trace: Trace = EXACT,
        probes: Tensor | None = None,
    ) -> Costs:
        """Follow the field from data to noise, and integrate what that costs in the same pass.

        Args:
            y: Data, shape ``(*batch, features)``.
            solver: How to follow the field; the layer's if None.
            trace: How to get the traces.
            probes: Directions of the trace, shape ``(probes, rows, features)``, where the rows
                are those of the whole batch; drawn by ``trace`` if None.
        """
        rows, context, batch = self._rows(y)
        features = self.layer.features
        probes = trace.probes(rows) if probes is None else probes

        def rates(t: Tensor, state: Tensor, probes: Tensor, *context: Tensor) -> Tensor:
            v, pulled = self._pulled_back(t, state[:, :features], probes, *context)
            squares, _ = trace.combine(pulled.square().sum(-1))
            forms = (pulled * probes.movedim(1, 0)).sum(-1)
            sums = torch.stack([v.square().sum(-1), squares], dim=-1)
            return torch.cat([v, forms.T, sums], dim=-1)

        start = torch.cat([rows, rows.new_zeros(len(rows), len(probes) + 2)], dim=-1)
        held = (probes.movedim(0, 1), *context)
        end = self._solve(rates, start, 0.0, 1.0, solver or self.layer.solver, len(probes), *held)
        x, forms, sums = end.split([features, len(probes), 2], dim=-1)
        ladj, error = trace.combine(forms.T)
        values = (v.reshape(batch) for v in (ladj, error, sums[:, 0], sums[:, 1]))
        return Costs(x.reshape(*batch, -1), *values)

    def _density(self, x: Tensor, start: float, stop: float) -> tuple[Tensor, Tensor]:
        rows, context, batch = self._rows(x)
        features = self.layer.features

        def rates(t: Tensor, state: Tensor, *context: Tensor) -> Tensor:
            z = state[:, :features]
            axes = EXACT.probes(z).movedim(0, 1)
            v, pulled = self._pulled_back(t, z, axes, *context)
            trace, _ = EXACT.combine(pulled.diagonal(dim1=0, dim2=2).T)
            return torch.cat([v, trace.unsqueeze(-1)], dim=-1)

        begin = torch.cat([rows, rows.new_zeros(len(rows), 1)], dim=-1)
        end = self._solve(rates, begin, start, stop, self.layer.solver, features, *context)
        return end[:, :features].reshape(*batch, -1), end[:, features].reshape(batch)

    def _carry(self, x: Tensor, start: float, stop: float) -> Tensor:
        rows, context, batch = self._rows(x)

        def rates(t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
            return self.layer.velocity(t, z, context)

        end = self.layer.solver(rates, rows, start, stop, *context)
        return end.reshape(*batch, -1)

    def _rows(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[int, ...]]:
        """Data and context with one batch dimension, and the batch shape they had."""
        self._check(x.shape)
        batch = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        rows = x.expand(*batch, -1).reshape(-1, self.layer.features)
        if self.context is None:
            return rows, (), batch
        return rows, (self.context.expand(*batch, -1).reshape(-1, self.layer.context),), batch

    def _pulled_back(
        self, t: Tensor, x: Tensor, probes: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity, and its Jacobian's products with ``probes`` of shape (rows, probes, features).

        Returns:
            Velocity, shape ``(rows, features)``, and products, shape ``(probes, rows, features)``.
        """
        return pulled_back(lambda z: self.layer.velocity(t, z, context), x, probes.movedim(1, 0))

    def _solve(
        self,
        rates: Field,
        x: Tensor,
        start: float,
        stop: float,
        solver: Solver,
        cotangents: int,
        *held: Tensor,
    ) -> Tensor:
        """Integrate ``rates`` in chunks of rows."""
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "Continuous takes derivatives for its log-determinant, which inference mode "
                "forbids. Use torch.no_grad instead."
            )
        size = max(1, COTANGENTS_AT_ONCE // cotangents)
        parts = zip(*(v.split(size) for v in (x, *held)), strict=True)
        return torch.cat([solver(rates, part, start, stop, *own) for part, *own in parts])
