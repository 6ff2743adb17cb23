"""Bijections with exact log-determinants: values of ``module(context)``."""

from .autoregressive import Autoregressive
from .base import Bijection, Composed, Inverse, Wrapped
from .coupling import Coupling
from .elementwise import Elementwise
from .linear import ActNorm, LULinear, Permutation
from .spline import RationalQuadratic
from .trace import ExactTrace, Hutchinson, Trace
from .univariate import Affine, Shift, ShiftScale, Univariate

__all__ = [
    "ActNorm",
    "Affine",
    "Autoregressive",
    "Bijection",
    "Composed",
    "Coupling",
    "Elementwise",
    "ExactTrace",
    "Hutchinson",
    "Inverse",
    "LULinear",
    "Permutation",
    "RationalQuadratic",
    "Shift",
    "ShiftScale",
    "Trace",
    "Univariate",
    "Wrapped",
]
