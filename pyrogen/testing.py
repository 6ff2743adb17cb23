"""Checks that every public object must pass, yours included.

A check is one law; it takes the object and what the object is called with, returns nothing,
and raises ``AssertionError`` when the law is broken::

    @pytest.mark.parametrize("check", DISTRIBUTION_CHECKS, ids=lambda f: f.__name__)
    def test_mine(check):
        check(MyDistribution())

``DISTRIBUTION_CHECKS`` take a distribution; ``MODULE_CHECKS`` a module and the arguments that
make a distribution from it; ``TRANSFORM_CHECKS`` a layer, points on its noise side and its
context; ``OBJECTIVE_CHECKS`` an objective and a batch.
"""

__all__ = ["DISTRIBUTION_CHECKS", "MODULE_CHECKS", "OBJECTIVE_CHECKS", "TRANSFORM_CHECKS"]

import copy
import io
from collections.abc import Callable

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from .distributions import LikelihoodFree


def draws_have_the_declared_shape(d: TorchDistribution) -> None:
    for sample_shape in [(), (3,), (3, 2)]:
        assert d.sample(sample_shape).shape == d.shape(sample_shape)


def expands_to_larger_batches(d: TorchDistribution) -> None:
    wider = d.expand((7, *d.batch_shape))
    assert wider.batch_shape == (7, *d.batch_shape)
    assert wider.sample((2,)).shape == wider.shape((2,))
    assert wider.event_shape == d.event_shape


def is_a_pyro_site(d: TorchDistribution) -> None:
    with pyro.plate("draws", 5, dim=-1 - len(d.batch_shape)):
        assert pyro.sample("x", d).shape == d.shape((5,))


def is_a_pyro_site_in_nested_plates(d: TorchDistribution) -> None:
    inner = -1 - len(d.batch_shape)
    with pyro.plate("outer", 3, dim=inner - 1), pyro.plate("inner", 5, dim=inner):
        assert pyro.sample("x", d).shape == d.shape((3, 5))


def can_be_masked(d: TorchDistribution) -> None:
    assert d.mask(False).sample((2,)).shape == d.shape((2,))  # noqa: FBT003


def draws_lie_in_the_support(d: TorchDistribution) -> None:
    assert d.support is not None
    assert d.support.event_dim == d.event_dim
    assert d.support.check(d.sample((20,))).all()


def sample_carries_no_gradient(d: TorchDistribution) -> None:
    assert not d.sample().requires_grad


def same_seed_gives_the_same_draw(d: TorchDistribution) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = d.sample((4,))
        torch.manual_seed(1)
        assert torch.equal(first, d.sample((4,)))


def density_is_finite_or_refused(d: TorchDistribution) -> None:
    x = d.sample((4,))
    if not isinstance(d, LikelihoodFree):
        log_prob = d.log_prob(x)
        assert log_prob.shape == (4, *d.batch_shape)
        assert log_prob.dtype == x.dtype
        assert log_prob.isfinite().all()
        return
    try:
        d.log_prob(x)
    except NotImplementedError as refusal:
        assert "no density" in str(refusal)  # noqa: PT017
        return
    raise AssertionError(f"{type(d).__name__} is LikelihoodFree but returned a density.")


DISTRIBUTION_CHECKS: list[Callable[[TorchDistribution], None]] = [
    draws_have_the_declared_shape,
    expands_to_larger_batches,
    is_a_pyro_site,
    is_a_pyro_site_in_nested_plates,
    can_be_masked,
    draws_lie_in_the_support,
    sample_carries_no_gradient,
    same_seed_gives_the_same_draw,
    density_is_finite_or_refused,
]


def _draw(module: nn.Module, arguments: tuple[Tensor, ...], sample_shape: tuple = (3,)) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return module(*arguments).sample(sample_shape)


def _reload(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _perturbed(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return other


def state_survives_a_file(module: nn.Module, *arguments: Tensor) -> None:
    other = _perturbed(module)
    other.load_state_dict(_reload(module.state_dict()))
    assert torch.equal(_draw(module, arguments), _draw(other, arguments))


def deep_copies_are_independent(module: nn.Module, *arguments: Tensor) -> None:
    before = _draw(module, arguments)
    _perturbed(module)
    assert torch.equal(before, _draw(module, arguments))


def dtype_follows_the_module(module: nn.Module, *arguments: Tensor) -> None:
    for dtype in (torch.float32, torch.float64):
        converted = copy.deepcopy(module).to(dtype)
        assert _draw(converted, tuple(a.to(dtype) for a in arguments)).dtype == dtype


def draws_carry_gradient_to_the_parameters(module: nn.Module, *arguments: Tensor) -> None:
    d = module(*arguments)
    if not d.has_rsample:
        return
    d.rsample((8,)).square().sum().backward()
    assert any(p.grad is not None and (p.grad != 0).any() for p in module.parameters())
    module.zero_grad()


def leaves_the_param_store_empty(module: nn.Module, *arguments: Tensor) -> None:
    before = len(pyro.get_param_store())
    pyro.sample("x", module(*arguments))
    assert len(pyro.get_param_store()) == before


MODULE_CHECKS: list[Callable[..., None]] = [
    state_survives_a_file,
    deep_copies_are_independent,
    dtype_follows_the_module,
    draws_carry_gradient_to_the_parameters,
    leaves_the_param_store_empty,
]


def _tolerance(x: Tensor) -> float:
    return 1e-10 if x.dtype == torch.float64 else 1e-4


def inverse_undoes_forward(layer: nn.Module, z: Tensor, context: Tensor | None = None) -> None:
    f = layer(context)
    x = f(z)
    assert x.dtype == z.dtype
    assert torch.allclose(f.inv(x.clone()), z, atol=_tolerance(z))  # clone: no cache may help


def both_log_determinants_agree(
    layer: nn.Module, z: Tensor, context: Tensor | None = None
) -> None:
    f = layer(context)
    x, forward = f.call_and_ladj(z)
    _, backward = f.inverse_and_ladj(x.clone())
    assert torch.allclose(forward, -backward, atol=_tolerance(z))
    assert torch.allclose(forward, f.log_abs_det_jacobian(z, x), atol=_tolerance(z))


def log_determinant_matches_autograd(
    layer: nn.Module, z: Tensor, context: Tensor | None = None
) -> None:
    layer = copy.deepcopy(layer).double()
    f = layer(None if context is None else context[0].double())
    point = z[0].double()
    _, ladj = f.call_and_ladj(point)
    jacobian = torch.autograd.functional.jacobian(f, point)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(ladj.sum(), expected, atol=1e-6)


def transform_keeps_the_batch(layer: nn.Module, z: Tensor, context: Tensor | None = None) -> None:
    f = layer(context)
    wide = z.expand(3, *z.shape)
    x, ladj = f.call_and_ladj(wide)
    assert x.shape == wide.shape
    assert ladj.shape == wide.shape[: wide.ndim - f.domain.event_dim]
    assert torch.allclose(x[0], f(z), atol=_tolerance(z))


def every_parameter_gets_a_gradient(
    layer: nn.Module, z: Tensor, context: Tensor | None = None
) -> None:
    if not list(layer.parameters()):
        return
    x, ladj = layer(context).call_and_ladj(z)
    (x.square().sum() + ladj.sum()).backward()
    assert all(p.grad is not None for p in layer.parameters())
    layer.zero_grad()


def transform_state_survives_a_file(
    layer: nn.Module, z: Tensor, context: Tensor | None = None
) -> None:
    other = _perturbed(layer)
    other.load_state_dict(_reload(layer.state_dict()))
    assert torch.equal(layer(context)(z), other(context)(z))


TRANSFORM_CHECKS: list[Callable[..., None]] = [
    inverse_undoes_forward,
    both_log_determinants_agree,
    log_determinant_matches_autograd,
    transform_keeps_the_batch,
    every_parameter_gets_a_gradient,
    transform_state_survives_a_file,
]


def loss_is_a_finite_scalar(objective: nn.Module, *batch: Tensor) -> None:
    loss = objective(*batch)
    assert loss.shape == ()
    assert loss.isfinite()
    assert loss.dtype == batch[0].dtype


def loss_gives_gradients(objective: nn.Module, *batch: Tensor) -> None:
    objective(*batch).backward()
    assert any(p.grad is not None and (p.grad != 0).any() for p in objective.parameters())
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())
    objective.zero_grad()


def same_seed_gives_the_same_loss(objective: nn.Module, *batch: Tensor) -> None:
    objective(*batch)  # what is set up at the first call may draw
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = objective(*batch)
        torch.manual_seed(3)
        assert torch.equal(first, objective(*batch))


def bad_data_are_refused(objective: nn.Module, *batch: Tensor) -> None:
    x, *rest = batch
    nan = x.clone()
    nan.view(-1)[0] = torch.nan
    wide = torch.cat([x, x], dim=-1)
    for bad in (nan, x.long(), x[:0], wide):
        try:
            objective(bad, *rest)
        except (ValueError, TypeError) as refusal:
            assert "expected" in str(refusal) or "needs" in str(refusal)  # noqa: PT017
            continue
        raise AssertionError(
            f"{type(objective).__name__} accepted {bad.dtype} data of shape {tuple(bad.shape)}."
        )


OBJECTIVE_CHECKS: list[Callable[..., None]] = [
    loss_is_a_finite_scalar,
    loss_gives_gradients,
    same_seed_gives_the_same_loss,
    bad_data_are_refused,
]
