"""Maximum likelihood, for what has a density."""

__all__ = ["MaximumLikelihood", "check_law", "check_like", "check_support"]

from typing import Any

from torch import Tensor, nn

from ..inputs import check_batch


class MaximumLikelihood(nn.Module):
    r"""Mean negative log-likelihood of the data, in nats.

    .. math:: -\frac 1n \sum_i \log p(x_i \mid \text{context}_i)

    Its expectation is the entropy of the data plus the Kullback-Leibler divergence from data to
    model. The value is a density's: with other units of ``x`` it changes by a constant.

    Args:
        flow: Module whose ``forward(context)`` is a distribution with a density: a flow, or any
            other.

    Shape:
        ``forward(x, context)``: ``(*batch, *event)`` and ``(*batch, context)`` to ``()``.

    Raises:
        TypeError: If ``x`` is not of floating point.
        ValueError: If shapes or dtypes do not fit, or ``x`` is not finite.
        NotImplementedError: If the distribution has no density.

    Example:
        >>> class Standard(nn.Module):
        ...     def forward(self, context=None):
        ...         return dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> MaximumLikelihood(Standard())(torch.zeros(5, 2))
        tensor(1.8379)
    """

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        p = self.flow(context)
        check_law(p, x, like=next(self.flow.parameters(), None), owner="MaximumLikelihood")
        return -p.log_prob(x).mean()


def check_like(x: Tensor, like: Tensor, *, owner: str) -> None:
    """Refuse data of another dtype or device than ``like``.

    Raises:
        ValueError: If dtype or device differ.
    """
    check_batch(x[:1], x.shape[1:], owner=owner, like=like)


def check_law(p: Any, x: Tensor, *, like: Tensor | None, owner: str) -> None:
    """Refuse data that do not fit the distribution ``p``, one to one with its contexts.

    Raises:
        TypeError: If ``x`` is not a tensor of floating point.
        ValueError: If shape, size, dtype, device or values are not as expected.
    """
    check_batch(x, p.event_shape, owner=owner, like=like)
    batch = x.shape[: x.ndim - len(p.event_shape)]
    if p.batch_shape and p.batch_shape != batch:
        raise ValueError(
            f"{owner} got data of batch shape {tuple(batch)} and contexts of "
            f"{tuple(p.batch_shape)}. Pass one context for each datum."
        )


def check_support(p: Any, x: Tensor) -> None:
    """Refuse data outside the support of ``p``, where its density is never asked for.

    Raises:
        ValueError: If there are any, when values are validated.
    """
    if p._validate_args:
        p._validate_sample(x)
