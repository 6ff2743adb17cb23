"""Mixtures of flows: for modes that no single continuous map reaches without a bridge."""

__all__ = ["FlowMixture", "Mixture"]

from collections.abc import Iterable, Sequence
from typing import NoReturn, Self

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor, nn

from ..inputs import check_batch, check_context
from ..nets import mlp
from ..transforms.elementwise import start_at_zero
from .supports import agree


class Mixture(TorchDistribution):
    r"""The law :math:`p(x) = \sum_k w_k\, p_k(x)` of any distributions on one support.

    Draws and density are exact. Cost: both run every component.

    Args:
        logits: Unnormalised log-weights, shape ``(*batch, components)``.
        components: The distributions :math:`p_k`; their batch shapes broadcast with ``batch``.

    Raises:
        ValueError: If there are fewer than 2 components, or their number, events or supports do
            not agree.

    Example:
        >>> near, far = dist.Normal(-2.0, 1.0), dist.Normal(2.0, 1.0)
        >>> Mixture(torch.zeros(2), [near, far]).log_prob(torch.tensor(0.0))
        tensor(-2.9189)
    """

    arg_constraints = {}  # noqa: RUF012
    has_rsample = False

    def __init__(self, logits: Tensor, components: Iterable[TorchDistribution]) -> None:
        components = list(components)
        if len(components) < 2 or logits.shape[-1:] != (len(components),):
            raise ValueError(
                "Mixture expected at least 2 components and a logit for each, got "
                f"{len(components)} and logits of shape {tuple(logits.shape)}. Add some."
            )
        first = components[0]
        for other in components[1:]:
            if other.event_shape != first.event_shape or not agree(other.support, first.support):
                raise ValueError(
                    f"Mixture expected components of one event shape and support, got "
                    f"{tuple(first.event_shape)} on {first.support} and "
                    f"{tuple(other.event_shape)} on {other.support}. Build them alike."
                )
        shapes = [c.batch_shape for c in components]
        batch_shape = torch.broadcast_shapes(logits.shape[:-1], *shapes)
        self.log_weights = logits.log_softmax(-1).expand(*batch_shape, -1)
        self.components = [
            c if c.batch_shape == batch_shape else c.expand(batch_shape) for c in components
        ]
        super().__init__(batch_shape, first.event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint | None:
        return self.components[0].support

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "Mixture":
        wide = Size(batch_shape)
        logits = self.log_weights.expand(*wide, -1)
        return Mixture(logits, [c.expand(wide) for c in self.components])

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = Size(sample_shape)
        which = torch.distributions.Categorical(logits=self.log_weights).sample(shape)
        which = which.reshape(*which.shape, *[1] * self.event_dim)
        x = self.components[0].sample(shape)
        for k, component in enumerate(self.components[1:], start=1):
            x = torch.where(which == k, component.sample(shape), x)
        return x

    def rsample(self, sample_shape: Sequence[int] = ()) -> NoReturn:
        """Refuse, and say what to do instead.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "Mixture has no reparameterized draw: which component it comes from is discrete. Use "
            "sample; in a guide, Trace_ELBO then takes the score-function gradient. Or fit by "
            "MaximumLikelihood."
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value`` in nats, shape ``(*sample, *batch)``."""
        return self._joint(value).logsumexp(-1)

    def responsibilities(self, value: Tensor) -> Tensor:
        """Probability of each component given ``value``, ``(*sample, *batch, components)``."""
        return self._joint(value).softmax(-1)

    def _joint(self, value: Tensor) -> Tensor:
        each = torch.stack([c.log_prob(value) for c in self.components], dim=-1)
        return each + self.log_weights


class FlowMixture(nn.Module):
    r"""A mixture of flows with learned weights; call it to get the distribution.

    A flow is continuous, so between two modes it leaves a filament of mass. A mixture gives each
    mode a flow of its own. Fit it by maximum likelihood, after :meth:`standardize` has placed
    the flows: untrained flows are alike, and would part slowly.

    Args:
        flows: Modules ``context -> distribution``, of one event shape and support.
        context: Number of features to condition on; 0 for none. Weights depend on it too.
        hidden: Widths of the hidden layers of the network for the weights, with context.

    Shape:
        Context ``(*batch, context)`` gives a distribution of batch shape ``batch``.

    Raises:
        ValueError: If there are fewer than 2 flows, or the context does not fit.

    References:
        Dinh, Sohl-Dickstein, Larochelle, Pascanu. A RAD approach to deep mixture models.
        arXiv:1903.07714
        Pires, Figueiredo. Variational Mixture of Normalizing Flows. ESANN 2020.
        arXiv:2009.00585

    Example:
        >>> from pyrogen.distributions import nsf
        >>> mixture = FlowMixture([nsf(2), nsf(2)])
        >>> mixture().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    logits: Tensor

    def __init__(
        self, flows: Iterable[nn.Module], context: int = 0, *, hidden: Sequence[int] = (64, 64)
    ) -> None:
        super().__init__()
        self.flows = nn.ModuleList(flows)
        if len(self.flows) < 2:
            raise ValueError(
                f"FlowMixture expected at least 2 flows, got {len(self.flows)}. Add some."
            )
        self.context = context
        self.logits = nn.Parameter(torch.zeros(len(self.flows)))
        self.net = start_at_zero(mlp(context, len(self.flows), hidden)) if context else None

    def forward(self, context: Tensor | None = None) -> Mixture:
        check_context(context, self.context, owner="FlowMixture", like=self.logits)
        logits = self.logits if self.net is None else self.logits + self.net(context)
        return Mixture(logits, [flow(context) for flow in self.flows])

    @torch.no_grad()
    def standardize(self, x: Tensor) -> Self:
        """Give each flow a cluster of the data to start from, and the weights their sizes.

        Clusters come from a few rounds of k-means, which draw random starts.

        Args:
            x: Data, shape ``(*batch, *event_shape)``.

        Returns:
            The mixture itself.

        Raises:
            TypeError: If the data are not of floating point, or a flow cannot standardize.
            ValueError: If the data do not fit, are fewer than two for each flow, or have a
                constant feature.
        """
        event_dim = len(self._event_shape())
        check_batch(
            x,
            self._event_shape(),
            owner="FlowMixture",
            like=self.logits,
            at_least=2 * len(self.flows),
        )
        x = x.detach().flatten(0, x.ndim - event_dim - 1) if x.ndim > event_dim + 1 else x
        label = _k_means(x.flatten(1) if x.ndim > 1 else x[:, None], len(self.flows))
        for k, flow in enumerate(self.flows):
            flow.standardize(x)  # type: ignore[operator]  # refuses what does not fit
            own = x[label == k]
            if not (own == own[:1]).flatten(1).all(0).any():
                flow.standardize(own)  # type: ignore[operator]
        counts = torch.bincount(label, minlength=len(self.flows)).to(x)
        self.logits.copy_((counts + 1).log() - (counts + 1).log().mean())
        return self

    def _event_shape(self) -> Size:
        zeros = self.logits.new_zeros(self.context) if self.context else None
        return self.flows[0](zeros).event_shape


def _k_means(x: Tensor, clusters: int, rounds: int = 20) -> Tensor:
    """Label of each datum; starts are drawn far apart (k-means++)."""
    x = (x - x.mean(0)) / x.std(0).clamp(min=torch.finfo(x.dtype).tiny)
    centres = x[torch.randint(len(x), (1,), device=x.device)]
    while len(centres) < clusters:
        gap = torch.cdist(x, centres).amin(-1).square()
        weight = gap if gap.sum() > 0 else torch.ones_like(gap)
        centres = torch.cat([centres, x[torch.multinomial(weight, 1)]])
    for _ in range(rounds):
        label = torch.cdist(x, centres).argmin(-1)
        member = nn.functional.one_hot(label, clusters).to(x)
        size = member.sum(0)[:, None]
        centres = torch.where(size > 0, member.T @ x / size.clamp(min=1), centres)
    return torch.cdist(x, centres).argmin(-1)
