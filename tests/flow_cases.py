"""The recipes and supports that the tests of flows go through."""

import pyro.distributions as dist
from torch import nn
from torch.distributions import constraints

from pyrogen.distributions import (
    bernstein,
    gaussianization,
    iaf,
    maf,
    naf,
    nice,
    nsf,
    realnvp,
    sospf,
    triangular,
    umnn,
)
from pyrogen.transforms import RationalQuadratic

SMALL = {"layers": 2, "hidden": (16,)}
RECIPES = {
    "nice": lambda *a, **k: nice(*a, **{**SMALL, **k}),
    "iaf": lambda *a, **k: iaf(*a, **{**SMALL, **k}),
    "realnvp": lambda *a, **k: realnvp(*a, **{**SMALL, **k}),
    "nsf": lambda *a, **k: nsf(*a, **{**SMALL, **k}),
    "maf": lambda *a, **k: maf(*a, **{**SMALL, **k}),
    "spline maf": lambda *a, **k: maf(*a, **{**SMALL, "elementwise": RationalQuadratic(), **k}),
}
MONOTONE = {  # drawn by roots
    "naf": lambda *a, **k: naf(*a, **{**SMALL, **k}),
    "umnn": lambda *a, **k: umnn(*a, **{**SMALL, "units": 4, **k}),
    "sospf": lambda *a, **k: sospf(*a, **{**SMALL, **k}),
    "bernstein": lambda *a, **k: bernstein(*a, **{**SMALL, **k}),
    "triangular": lambda *a, layers=1, **k: triangular(*a, hidden=(16,), units=4, **k),
    "gaussianization": lambda *a, **k: gaussianization(*a, **{**SMALL, **k}),
}
SUPPORTS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "unit interval": constraints.unit_interval,
    "interval": constraints.interval(-1.0, 3.0),
    "greater than": constraints.greater_than(2.0),
    "simplex": constraints.simplex,
    "ordered": dist.constraints.ordered_vector,
    "positive ordered": dist.constraints.positive_ordered_vector,
}


def awake(flow):
    """Draw every weight anew: an untrained flow is the identity, of which much holds trivially."""
    for p in flow.parameters():
        bound = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.3
        nn.init.uniform_(p, -bound, bound)
    flow.shift.uniform_(-1, 1)
    flow.scale.uniform_(0.5, 2)
    return flow


def networks(flow):
    """The networks of a flow's layers, from noise to data."""
    return [module.net for module in flow.modules() if hasattr(module, "net")]
