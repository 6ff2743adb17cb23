"""Flows and transforms of other libraries, with their traps made safe.

Transforms of Pyro become layers, and a zuko flow becomes a module that gives a Pyro distribution.
What such code returns wrongly without a word becomes an error: inverses that stop at the end
of a fixed bracket, and second derivatives that were never written.
"""

__all__ = ["PyroLayer", "ZukoFlow", "import_zuko"]

import copy
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, Transform, Uniform, constraints

from ..inputs import check_context
from ..transforms import Bijection, Wrapped
from .transformed import Transformed

Map = Callable[[Tensor], tuple[Tensor, Tensor]]


class PyroLayer(nn.Module):
    """A trainable transform of Pyro as a layer of a :class:`Flow`.

    Nothing is cached across calls, so values are never stale and the module can be copied.

    Args:
        transform: A ``TransformModule`` such as ``affine_autoregressive(features)``, or a
            ``ConditionalTransformModule``, which is conditioned on the context of the flow.
        context: Number of features that a conditional transform takes; 0 for none.

    Raises:
        TypeError: If ``transform`` is not a module.
        ValueError: If a context is promised to a transform that takes none, or the reverse, or
            the density of a datum would depend on its batch.
        NotImplementedError: When a value is scored whose inverse the transform does not have.

    Example:
        >>> from pyro.distributions.transforms import affine_coupling
        >>> from pyrogen.distributions import Flow
        >>> flow = Flow(2, [PyroLayer(affine_coupling(2))])
        >>> flow().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, transform: nn.Module, context: int = 0) -> None:
        super().__init__()
        conditional = isinstance(transform, dist.ConditionalTransformModule)
        if not conditional and not isinstance(transform, dist.TransformModule):
            raise TypeError(
                "PyroLayer expected a transform module of Pyro, got "
                f"{type(transform).__name__}. Put transforms without parameters "
                "into Transformed as they are."
            )
        if conditional != bool(context):
            raise ValueError(
                f"PyroLayer got context={context} for {type(transform).__name__}. Give context to "
                "conditional transforms, and only to them."
            )
        if any(isinstance(part, dist.transforms.BatchNorm) for part in transform.modules()):
            raise ValueError(
                "PyroLayer got BatchNorm, whose density of one datum depends on the others in "
                "its batch. Leave it out, and call the flow's standardize."
            )
        self.transform = transform
        self.context = context

    def forward(self, context: Tensor | None = None) -> Bijection:
        transform: Any = self.transform
        if self.context:
            check_context(context, self.context, owner="PyroLayer")
            assert context is not None
            return _Uncached(transform.condition(context), context.shape[:-1])
        return _Uncached(transform)


class _Uncached(Wrapped):
    def __init__(self, transform: Transform, batch_shape: tuple[int, ...] = ()) -> None:
        super().__init__(transform)
        self.batch_shape = torch.Size(batch_shape)

    def _wide(self, x: Tensor) -> Tensor:
        """With the batch of the context: some of Pyro's do not broadcast."""
        return x.expand(*torch.broadcast_shapes(x.shape[:-1], self.batch_shape), -1)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return super().call_and_ladj(self._wide(x))
        finally:
            _forget(self.transform)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return super().inverse_and_ladj(self._wide(y))
        except (KeyError, NotImplementedError) as error:
            raise NotImplementedError(
                f"{type(self.transform).__name__} has no inverse, so it can draw but not score a "
                "value. Choose an autoregressive, coupling or spline transform."
            ) from error
        finally:
            _forget(self.transform)


def _forget(transform: Transform) -> None:
    """Drop what a transform kept of its last call, graphs included."""
    for part in transform.modules() if isinstance(transform, nn.Module) else (transform,):
        for name, value in list(vars(part).items()):
            if name == "_cached_x_y":
                part._cached_x_y = (None, None)
            elif name.startswith("_cache") and isinstance(value, Tensor):
                setattr(part, name, None)


def import_zuko() -> ModuleType:
    """Import zuko and keep the validation of torch and Pyro as it was.

    A plain ``import zuko`` switches argument validation off for all distributions of torch and
    Pyro. If that has happened already, switch it on again by
    ``torch.distributions.Distribution.set_default_validate_args(True)``; zuko works all the same.

    Returns:
        The module ``zuko``.

    Raises:
        ImportError: If zuko is not installed.
    """
    before = Distribution._validate_args
    try:
        return importlib.import_module("zuko")
    except ModuleNotFoundError as error:
        raise ImportError("import_zuko needs zuko. Install it: pip install zuko") from error
    finally:
        Distribution.set_default_validate_args(before)


class ZukoFlow(nn.Module):
    """A flow of zuko; call it to get a Pyro distribution.

    Two of its traps become errors. A numeric inverse that leaves its bracket, where zuko clips,
    is noticed by mapping every draw back. Second derivatives are compared with finite differences
    once, in double precision and at one point; where they are wrong, as in flows by quadrature,
    bisection or the adjoint method, asking for them raises. First derivatives are right.

    Cost: a draw is mapped back once. Building runs a few passes of a copy of the flow.

    Args:
        flow: Module with a ``transform`` from data to noise and a ``base``, both called with
            the context: any ``zuko.flows.Flow``. See :func:`import_zuko`.
        context: Number of features to condition on; 0 for none.

    Shape:
        Context ``(*batch, context)`` gives a distribution of batch shape ``batch``.

    Raises:
        TypeError: If the noise is neither normal nor uniform.
        ValueError: If the context does not fit.
        FloatingPointError: When a draw does not map back to its noise.
        NotImplementedError: When a second derivative is asked for that would be wrong.

    References:
        Rozet et al. Zuko: Normalizing flows in PyTorch. 2022. doi:10.5281/zenodo.7625672
    """

    def __init__(self, flow: Any, context: int = 0) -> None:
        super().__init__()
        self.flow = flow
        self.context = context
        self.twice = _second_derivatives_hold(flow, context)

    def forward(self, context: Tensor | None = None) -> Transformed:
        like = next(self.flow.parameters(), None)
        check_context(context, self.context, owner="ZukoFlow", like=like)
        batch_shape = () if context is None else context.shape[:-1]
        noise = _as_pyro(self.flow.base(context))
        if noise.batch_shape != batch_shape:
            noise = noise.expand(batch_shape)
        return Transformed(noise, [_Turned(self.flow.transform(context), batch_shape, self.twice)])


class _Turned(Bijection):
    """A transform from data to noise, turned to run from noise to data."""

    def __init__(
        self, transform: Any, batch_shape: tuple[int, ...], twice: tuple[bool, bool]
    ) -> None:
        super().__init__(batch_shape)
        self.transform = transform
        self.twice_to_data, self.twice_to_noise = twice
        codomain = transform.domain
        self.codomain = constraints.real_vector if codomain.event_dim != 1 else codomain

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        once = (lambda t: t) if self.twice_to_data else _once
        y = self.transform.inv(once(x))
        back, ladj = self._to_noise(y)
        slack = 1e-4 if x.dtype == torch.float64 else 1e-3
        error = ((back - x).abs() / (1 + x.abs())).detach().amax() if x.numel() else 0.0
        if not error <= slack:
            raise FloatingPointError(
                f"{type(self.transform).__name__} maps a draw back to noise {float(error):.1e} "
                "away: its inverse clips or has not converged. Standardize the data, or use a "
                "flow of pyrogen, whose inverses do neither."
            )
        return once(y), -once(ladj)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        once = (lambda t: t) if self.twice_to_noise else _once
        x, ladj = self._to_noise(once(y))
        return once(x), once(ladj)

    def _to_noise(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self.transform.call_and_ladj(y)
        return x, ladj.sum(-1) if self.transform.domain.event_dim == 0 else ladj


def _as_pyro(base: Any) -> dist.TorchDistribution:
    if isinstance(base, Independent):
        return _as_pyro(base.base_dist).to_event(base.reinterpreted_batch_ndims)
    if isinstance(base, Normal):
        return dist.Normal(base.loc, base.scale, validate_args=False)
    if isinstance(base, Uniform):
        return dist.Uniform(base.low, base.high, validate_args=False)
    raise TypeError(
        f"ZukoFlow expected normal or uniform noise, got {type(base).__name__}. Build the flow "
        "with one of them as its base."
    )


def _second_derivatives_hold(flow: Any, context: int) -> tuple[bool, bool]:
    """Whether derivatives of derivatives are right from noise to data, and back.

    Asked of a copy on the CPU, wherever the flow lives and whatever the caller has set.
    """

    def to_noise(y: Tensor) -> tuple[Tensor, Tensor]:
        return flow.transform(c).call_and_ladj(y)

    def to_data(x: Tensor) -> tuple[Tensor, Tensor]:
        y = flow.transform(c).inv(x)
        return y, -flow.transform(c).call_and_ladj(y)[1]

    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):  # noqa: FBT003
        flow = copy.deepcopy(flow).cpu().double()
        c = torch.linspace(-0.5, 0.5, context, dtype=torch.float64) if context else None
        size = flow.base(c).event_shape[-1]
        point = torch.linspace(-0.73, 0.61, size, dtype=torch.float64)
        return _curvature_holds(to_data, point), _curvature_holds(to_noise, point)


def _curvature_holds(f: Map, x: Tensor) -> bool:
    direction = torch.linspace(1.0, 0.5, len(x), dtype=x.dtype)
    step = 1e-6 * direction  # so small that it hardly ever meets a kink of a ReLU

    def slope(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y, ladj = f(x)
        (g,) = torch.autograd.grad(y.sin().sum() + ladj.sum(), x, create_graph=True)
        return x, g

    at, g = slope(x)
    try:
        (found,) = torch.autograd.grad((g * direction).sum(), at)
    except RuntimeError:  # refused, or the derivative hangs on nothing
        found = torch.full_like(x, torch.nan)
    expected = (slope(x + step)[1] - slope(x - step)[1]).detach() / 2e-6
    error = (found - expected).abs().amax()
    return bool(error <= 1e-3 * expected.abs().amax() + 1e-6)


class _Once(torch.autograd.Function):
    """The identity, which can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return _Refused.apply(slope, *ctx.saved_tensors)  # hangs on x, so a second time comes here


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slope: Tensor, x: Tensor) -> Tensor:
        return slope.view_as(slope)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            "This flow has right first derivatives and wrong second ones, so they are refused. "
            "Use a flow of pyrogen for Hessians, score matching and Riemannian samplers."
        )


def _once(x: Tensor) -> Tensor:
    return _Once.apply(x)
