"""How a module tells Pyro of its parameters without the global store."""

__all__ = ["announce"]

import weakref

from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints


def announce(name: str, module: nn.Module) -> None:
    """Let ``SVI`` and every handler of ``pyro.param`` see the parameters of ``module``.

    ``pyro.module`` would put them into the global param store, where a second guide of the same
    name finds those of the first and never trains its own. Here they stay in the module.

    Args:
        name: Prefix of the parameters' names in traces.
        module: Module whose trainable parameters are announced.

    Example:
        >>> with pyro.poutine.trace() as t:
        ...     announce("encoder", nn.Linear(2, 1))
        >>> t.trace.param_nodes, len(pyro.get_param_store())
        (['encoder.weight', 'encoder.bias'], 0)
    """
    for path, parameter in module.named_parameters():
        if parameter.requires_grad:
            _param(f"{name}.{path}", parameter)


def _param(name: str, parameter: nn.Parameter) -> Tensor:
    value = parameter.view_as(parameter)
    value.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]  # as Pyro's store
    seen = effectful(lambda *_, **__: value, type="param")
    return seen(name, parameter, constraint=constraints.real, event_dim=None, name=name)
