"""Bijections with exact log-determinants: values of ``module(context)``."""

from .autoregressive import Autoregressive
from .base import Bijection, Composed, Inverse, Wrapped
from .continuous import Continuous, Costs, FlowMap
from .coupling import Coupling
from .elementwise import Elementwise
from .image import Convolution1x1, ImageCoupling, Squeeze
from .integrated import Integrated, SumOfSquares
from .linear import ActNorm, Householder, LULinear, Permutation, Reflections
from .monotone import Bernstein, LogisticMixture, Monotone
from .multiscale import MultiScale
from .ode import DormandPrince, Euler, Midpoint, RungeKutta4, Solver
from .residual import Planar, Radial, Sylvester
from .spline import BoundedSpline, CircularSpline, RationalQuadratic
from .tails import HeavyTails, SinhArcsinh
from .trace import ExactTrace, Hutchinson, Trace
from .univariate import Affine, Inverted, PerFeature, Shift, ShiftScale, Stacked, Univariate

__all__ = [
    "ActNorm",
    "Affine",
    "Autoregressive",
    "Bernstein",
    "Bijection",
    "BoundedSpline",
    "CircularSpline",
    "Composed",
    "Continuous",
    "Convolution1x1",
    "Costs",
    "Coupling",
    "DormandPrince",
    "Elementwise",
    "Euler",
    "ExactTrace",
    "FlowMap",
    "HeavyTails",
    "Householder",
    "Hutchinson",
    "ImageCoupling",
    "Integrated",
    "Inverse",
    "Inverted",
    "LULinear",
    "LogisticMixture",
    "Midpoint",
    "Monotone",
    "MultiScale",
    "PerFeature",
    "Permutation",
    "Planar",
    "Radial",
    "RationalQuadratic",
    "Reflections",
    "RungeKutta4",
    "Shift",
    "ShiftScale",
    "SinhArcsinh",
    "Solver",
    "Squeeze",
    "Stacked",
    "SumOfSquares",
    "Sylvester",
    "Trace",
    "Univariate",
    "Wrapped",
]
