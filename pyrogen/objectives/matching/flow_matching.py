"""Flow matching: a continuous flow learned by regression, without following it."""

__all__ = ["FlowMatching"]

import torch
from torch import Tensor, nn

from ...distributions.flow import Flow
from ...inputs import check_batch
from ...transforms.base import Composed
from ...transforms.continuous import Continuous
from ..likelihood import check_law, check_support
from .couplings import IndependentCoupling, MinibatchCoupling
from .interpolants import Interpolant, Straight


class FlowMatching(nn.Module):
    r"""Mean squared error of a flow's field against the velocity of paths from data to noise.

    .. math:: \mathbb E_{t, x, z} \big[ w(t)\, \tfrac1d \lVert v(x_t, t) - \dot x_t \rVert^2 \big]

    in standardised units, with t uniform. Up to a constant it is the error against the mean
    velocity at :math:`x_t`, whose flow carries the noise to the data, so the minimiser is exact
    whatever the coupling and the path. The flow then has its exact density, as always. In no unit;
    it does not fall to zero, for paths cross.

    Times are stratified over the batch: one in each of its equal parts.

    Cost: one call of the field per datum, and the coupling.

    Args:
        flow: A flow of one :class:`~pyrogen.transforms.Continuous` layer.
        coupling: Which draw of noise goes with which datum.
        interpolant: The path between them.

    Shape:
        ``forward(x, context, noise)``: ``(batch, *event)``, ``(batch, context)`` and
        ``(batch, features)`` to ``()``. Noise is drawn from the flow's own if None; else it is
        yours, and ``flow().from_noise(noise)`` will carry its law to that of the data.

    Raises:
        TypeError: If the data are not of floating point.
        ValueError: If the flow has other layers, or data, context or noise do not fit.

    References:
        Lipman, Chen, Ben-Hamu, Nickel, Le. Flow matching for generative modeling. ICLR 2023.
        arXiv:2210.02747
        Albergo, Vanden-Eijnden. Building normalizing flows with stochastic interpolants. ICLR
        2023. arXiv:2209.15571

    Example:
        >>> from pyrogen.distributions.recipes.continuous import cnf
        >>> loss = FlowMatching(cnf(2))(torch.randn(4096, 2))
        >>> round(loss.item())  # the variance of z - x, before training
        2
    """

    def __init__(
        self,
        flow: Flow,
        *,
        coupling: MinibatchCoupling | None = None,
        interpolant: Interpolant | None = None,
    ) -> None:
        super().__init__()
        layers = list(flow.layers)
        if len(layers) != 1 or not isinstance(layers[0], Continuous):
            raise ValueError(
                "FlowMatching expected a flow of one Continuous layer, got "
                f"[{', '.join(type(layer).__name__ for layer in layers)}]. Build it by cnf; for "
                "other layers use MaximumLikelihood."
            )
        self.flow = flow
        self.coupling = IndependentCoupling() if coupling is None else coupling
        self.interpolant = Straight() if interpolant is None else interpolant

    def forward(
        self, x: Tensor, context: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        law = self.flow(context)
        check_law(law, x, like=self.flow.zero, owner="FlowMatching")
        check_support(law, x)
        layer = self.flow.layers[0]
        assert isinstance(layer, Continuous)

        with torch.no_grad():
            to_data = Composed(law.bijection.parts[1:])  # what follows the layer is fixed
            free = to_data.inverse_and_ladj(x)[0].reshape(-1, layer.features)
        check_batch(free, (layer.features,), owner="FlowMatching, once data are real numbers,")
        batch = x.shape[: x.ndim - len(law.event_shape)]
        if noise is None:
            noise = law.noise.expand(batch).sample()
        check_batch(noise, (layer.features,), owner="The noise of FlowMatching", like=free)
        if noise.shape[:-1] != batch:
            raise ValueError(
                f"FlowMatching expected one draw of noise per datum, got {tuple(noise.shape)} for "
                f"data of shape {tuple(x.shape)}. Pass as many draws as data."
            )
        if context is not None:
            context = context.expand(*batch, -1).reshape(-1, self.flow.context)

        z = self.coupling(free, noise.reshape(-1, layer.features), context)
        t = _stratified(free)
        x_t, velocity = self.interpolant(free, z, t)
        error = layer.velocity(t.squeeze(-1), x_t, context) - velocity
        return (self.interpolant.weight(t) * error.square()).mean()


def _stratified(x: Tensor) -> Tensor:
    """A time for each row, shape ``(batch, 1)``: one in each of as many equal parts of (0, 1)."""
    n = len(x)
    strata = torch.randperm(n, device=x.device) + torch.rand(n, dtype=x.dtype, device=x.device)
    margin = torch.finfo(x.dtype).eps  # bridges have no velocity at their ends
    return (strata / n).clamp(margin, 1 - margin).unsqueeze(-1)
