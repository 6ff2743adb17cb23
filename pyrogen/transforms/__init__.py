"""Bijections with exact log-determinants: values of ``module(context)``."""

from .autoregressive import Autoregressive
from .base import Bijection, Composed, Wrapped
from .coupling import Coupling
from .elementwise import Affine, Elementwise, RationalQuadratic, ShiftScale, Univariate
from .linear import ActNorm, LULinear, Permutation

__all__ = [
    "ActNorm",
    "Affine",
    "Autoregressive",
    "Bijection",
    "Composed",
    "Coupling",
    "Elementwise",
    "LULinear",
    "Permutation",
    "RationalQuadratic",
    "ShiftScale",
    "Univariate",
    "Wrapped",
]
