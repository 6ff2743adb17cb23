"""Functions that build a flow: one for each architecture of the literature."""

from .autoregressive import iaf, maf
from .circular import ncsf
from .continuous import cnf
from .coupling import nice, nsf, realnvp
from .image import glow
from .monotone import bernstein, gaussianization, naf, sospf, triangular, umnn
from .residual import planar, radial, sylvester

__all__ = [
    "bernstein",
    "cnf",
    "gaussianization",
    "glow",
    "iaf",
    "maf",
    "naf",
    "ncsf",
    "nice",
    "nsf",
    "planar",
    "radial",
    "realnvp",
    "sospf",
    "sylvester",
    "triangular",
    "umnn",
]
