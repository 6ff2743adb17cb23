r"""Layers that add something small: :math:`y = x + g(x)`, with a determinant in closed form.

From noise to data they cost a few products with vectors, so they suit guides, which draw and
score their draws. From data to noise they are exact too: a quadratic equation, or increasing
equations of one variable. Every parameter can be predicted from a context.
"""

__all__ = ["Planar", "Radial", "Sylvester"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..autodiff import can_steer
from ..inputs import check_context, check_positive
from ..nets import mlp
from .base import Bijection, SizedBijection
from .linear import Reflections
from .univariate import bounded

FLOOR = 0.01  # least slope: below it neither direction could be trusted in float32
LOG_SCALE = 3.0  # bound of learned log-scales
REPEATS = 60  # of Newton's method; it takes about six


class _Parameters(nn.Module):
    """The numbers of a layer, learned directly or predicted from a context."""

    def __init__(self, start: Tensor, context: int, hidden: Sequence[int], owner: str) -> None:
        super().__init__()
        self.context = context
        self.owner = owner
        if context:
            self.net = mlp(context, len(start), hidden)
            weight, bias = list(self.net.parameters())[-2:]
            nn.init.zeros_(weight)
            with torch.no_grad():
                bias.copy_(start)
        else:
            self.values = nn.Parameter(start)

    def forward(self, context: Tensor | None) -> Tensor:
        check_context(context, self.context, owner=self.owner)
        return self.values if context is None else self.net(context)


def _above_minus_one(x: Tensor) -> Tensor:
    """Map the line onto (FLOOR - 1, infinity), zero to zero."""
    return (1 - FLOOR) * (nn.functional.softplus(x + math.log(math.e - 1)) - 1)


class Planar(nn.Module):
    r"""Trainable map :math:`y = x + \hat u \tanh(w^\top x + b)`: it moves along one direction.

    .. math:: \log|\det| = \log(1 + c\, (1 - \tanh^2 a)), \quad
        a = w^\top x + b, \quad c = w^\top \hat u,

    with :math:`\hat u` the vector nearest to the learned one that has :math:`c > -0.99`. The
    inverse solves :math:`a + c \tanh a = w^\top y + b` and is exact. It starts as the identity.
    Cost: a few products of ``features``, either way.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        hidden: Widths of the hidden layers of the network for :math:`u, w, b`, with context.

    Raises:
        ValueError: If there are no features, or the context does not fit.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015.
        arXiv:1505.05770

    Example:
        >>> layer = Planar(3, context=2)
        >>> y, ladj = layer(torch.zeros(5, 2)).call_and_ladj(torch.randn(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self, features: int, context: int = 0, *, hidden: Sequence[int] = (64, 64)
    ) -> None:
        super().__init__()
        check_positive("Planar", feature=features)
        self.features = features
        w = torch.randn(features) / math.sqrt(features)
        start = torch.cat([torch.zeros(features), w, torch.zeros(1)])
        self.parameters_of = _Parameters(start, context, hidden, owner="Planar")

    def forward(self, context: Tensor | None = None) -> Bijection:
        d = self.features
        u, w, b = self.parameters_of(context).split([d, d, 1], dim=-1)
        return _Planar(u, w, b.squeeze(-1))


class _Planar(SizedBijection):
    def __init__(self, u: Tensor, w: Tensor, b: Tensor) -> None:
        super().__init__(w.shape[-1], b.shape, owner="Planar")
        self.w, self.b = w, b
        along = (w * u).sum(-1)
        self.c = _above_minus_one(along)
        square = w.square().sum(-1).clamp(min=torch.finfo(w.dtype).tiny)
        self.u = u + ((self.c - along) / square).unsqueeze(-1) * w

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = ((self.w * x).sum(-1) + self.b).tanh()
        return x + self.u * t.unsqueeze(-1), _log_slope(t, self.c)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        t = _solve((self.w * y).sum(-1) + self.b, self.c).tanh()
        return y - self.u * t.unsqueeze(-1), -_log_slope(t, self.c)


def _log_slope(t: Tensor, c: Tensor) -> Tensor:
    """Log-derivative of ``a + c tanh(a)``, given ``t = tanh(a)``."""
    return torch.log1p(c * (1 - t) * (1 + t))


def _solve(y: Tensor, c: Tensor) -> Tensor:
    """Solve the increasing equation ``a + c tanh(a) = y`` for ``a``, with ``c > -1``.

    On the side of ``y`` the left-hand side is concave for ``c > 0`` and convex for ``c < 0``, so
    Newton's method goes straight to the root from a bound on one side of it: no bracket can be
    missed. Two more steps, with gradients, make first and second derivatives exact.
    """
    with torch.no_grad():
        size, k = torch.broadcast_tensors(y.detach().abs(), c.detach())
        far, near = size - k, size / (1 + k)
        a = torch.where(k > 0, torch.maximum(far, near), torch.minimum(far, near))
        for _ in range(REPEATS):
            last = a
            a = _newton(last, size, k)
            if _settled(last, a):
                break
        a = a * y.detach().sign()
    return _newton(_newton(a, y, c), y, c)


def _newton(a: Tensor, y: Tensor, c: Tensor) -> Tensor:
    t = a.tanh()
    return a - (a + c * t - y) / (1 + c * (1 - t) * (1 + t))


def _settled(last: Tensor, a: Tensor) -> bool:
    """Whether a step changed nothing but the last digits."""
    still = (a - last).abs() <= 8 * torch.finfo(a.dtype).eps * a.abs()
    return can_steer(still) and bool(still.all())


class Radial(nn.Module):
    r"""Trainable map :math:`y = x + \hat\beta\, (x - x_0) / (\alpha + r)`, :math:`r = |x - x_0|`.

    It pulls towards a centre or pushes away from it. With :math:`h = 1 / (\alpha + r)`,

    .. math:: \log|\det| = (d - 1) \log(1 + \hat\beta h) + \log(1 + \alpha \hat\beta h^2),
        \quad \hat\beta > -0.99\, \alpha.

    The inverse is a quadratic equation in :math:`r`, exact. It starts as the identity. Cost: a
    few sums over ``features``, either way. Gradients jump at the centre itself.

    Args:
        features: Number :math:`d` of features.
        context: Number of features to condition on; 0 for none.
        hidden: Widths of the hidden layers of the network for :math:`x_0, \alpha, \beta`, with
            context.

    Raises:
        ValueError: If there are no features, or the context does not fit.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015.
        arXiv:1505.05770

    Example:
        >>> layer = Radial(3)
        >>> y, ladj = layer().call_and_ladj(torch.randn(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self, features: int, context: int = 0, *, hidden: Sequence[int] = (64, 64)
    ) -> None:
        super().__init__()
        check_positive("Radial", feature=features)
        self.features = features
        start = torch.cat([torch.randn(features), torch.zeros(2)])
        self.parameters_of = _Parameters(start, context, hidden, owner="Radial")

    def forward(self, context: Tensor | None = None) -> Bijection:
        centre, alpha, beta = self.parameters_of(context).split([self.features, 1, 1], dim=-1)
        return _Radial(centre, alpha.squeeze(-1), beta.squeeze(-1))


class _Radial(SizedBijection):
    def __init__(self, centre: Tensor, log_alpha: Tensor, beta: Tensor) -> None:
        super().__init__(centre.shape[-1], beta.shape, owner="Radial")
        self.centre = centre
        self.alpha = bounded(log_alpha, LOG_SCALE).exp()
        self.beta = self.alpha * _above_minus_one(beta)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        away = x - self.centre
        radius = _length(away)
        push = self.beta / (self.alpha + radius)
        return x + push.unsqueeze(-1) * away, self._ladj(radius, push, x.shape[-1])

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        away = y - self.centre
        far = _length(away)
        # far = radius (1 + beta / (alpha + radius)); the root in the form that cancels nothing
        p = self.alpha + self.beta - far
        q = torch.sqrt(p.square() + 4 * self.alpha * far) + torch.where(p > 0, p, -p)
        radius = torch.where(p > 0, 2 * self.alpha * far / q, q / 2)
        push = self.beta / (self.alpha + radius)
        x = self.centre + away / (1 + push).unsqueeze(-1)
        return x, -self._ladj(radius, push, y.shape[-1])

    def _ladj(self, radius: Tensor, push: Tensor, features: int) -> Tensor:
        across = (features - 1) * torch.log1p(push)
        return across + torch.log1p(push * self.alpha / (self.alpha + radius))


def _length(x: Tensor) -> Tensor:
    """Euclidean length, with finite derivatives of both orders at zero."""
    return (x.square().sum(-1) + torch.finfo(x.dtype).eps ** 2).sqrt()


class Sylvester(nn.Module):
    r"""Trainable map :math:`y = x + Q R \tanh(\tilde R Q^\top x + b)`: planar, several at once.

    :math:`Q` has ``units`` orthonormal columns, made by as many Householder reflections;
    :math:`R, \tilde R` are upper triangular, and the determinant is a product of scalars:

    .. math:: \log|\det| = \sum_i \log(1 + c_i (1 - \tanh^2 a_i)), \quad
        a = \tilde R Q^\top x + b, \quad c_i = R_{ii} \tilde R_{ii} > -0.99.

    The inverse solves for :math:`a_M, \ldots, a_1` in turn, each an increasing equation of one
    variable, and is exact. It starts as the identity. Cost: a few products of ``features`` by
    ``units``; from data to noise ``units`` solves more.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        units: Number :math:`M` of columns, at most ``features``; ``min(features, 8)`` if None.
        hidden: Widths of the hidden layers of the network for all parameters, with context.

    Raises:
        ValueError: If there are no features, too few or too many units, or the context does not
            fit.

    References:
        van den Berg, Hasenclever, Tomczak, Welling. Sylvester Normalizing Flows for Variational
        Inference. UAI 2018. arXiv:1803.05649

    Example:
        >>> layer = Sylvester(3, units=2)
        >>> y, ladj = layer().call_and_ladj(torch.randn(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        units: int | None = None,
        hidden: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        check_positive("Sylvester", feature=features)
        units = min(features, 8) if units is None else units
        if not 1 <= units <= features:
            raise ValueError(
                f"Sylvester expected 1 to features={features} units, got {units}. Stack several "
                "layers for more."
            )
        self.features = features
        self.units = units
        start = torch.cat([torch.randn(units * features), torch.zeros(units * (units + 2))])
        self.parameters_of = _Parameters(start, context, hidden, owner="Sylvester")

    def forward(self, context: Tensor | None = None) -> Bijection:
        m, d = self.units, self.features
        sizes = [m * d, m * m, m, m]
        vectors, entries, log_diagonal, bias = self.parameters_of(context).split(sizes, dim=-1)
        return _Sylvester(
            vectors.unflatten(-1, (m, d)), entries.unflatten(-1, (m, m)), log_diagonal, bias
        )


class _Sylvester(SizedBijection):
    """Entries above the diagonal are those of R, below of the other factor, on it of c."""

    def __init__(
        self, vectors: Tensor, entries: Tensor, log_diagonal: Tensor, bias: Tensor
    ) -> None:
        super().__init__(vectors.shape[-1], bias.shape[:-1], owner="Sylvester")
        self.columns = Reflections(vectors).columns(vectors.shape[-2])  # Q, transposed
        self.c = _above_minus_one(entries.diagonal(dim1=-2, dim2=-1))
        diagonal = bounded(log_diagonal, LOG_SCALE).exp()
        self.outer = entries.triu(1) + torch.diag_embed(self.c / diagonal)
        self.inner = entries.mT.triu(1) + torch.diag_embed(diagonal)
        self.bias = bias

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = self._activation(x).tanh()
        return x + self._shift(t), _log_slope(t, self.c).sum(-1)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        target = self._activation(y)  # = a + inner outer tanh(a), for the a before the layer
        product = self.inner @ self.outer
        solved: list[Tensor] = []  # tanh(a), from the last unit up
        for i in reversed(range(target.shape[-1])):
            rest = target[..., i]
            if solved:
                later = torch.stack(solved[::-1], dim=-1)
                rest = rest - (product[..., i, i + 1 :] * later).sum(-1)
            solved.append(_solve(rest, self.c[..., i]).tanh())
        t = torch.stack(solved[::-1], dim=-1)
        return y - self._shift(t), -_log_slope(t, self.c).sum(-1)

    def _activation(self, x: Tensor) -> Tensor:
        return _apply(self.inner, _apply(self.columns, x)) + self.bias

    def _shift(self, t: Tensor) -> Tensor:
        return _apply(self.columns.mT, _apply(self.outer, t))


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply vectors by a matrix, or each by its own."""
    if matrix.ndim == 2:  # one product for the whole batch
        return x @ matrix.T
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)
