"""From two sets of draws to a number, differentiable."""

from .ipm import (
    Distance,
    Gaussian,
    InverseMultiquadric,
    Kernel,
    Laplace,
    Mixture,
    Polynomial,
    RationalQuadratic,
    energy_distance,
    mmd,
    mmd_v,
)
from .transport import sliced_wasserstein, wasserstein_1d

__all__ = [
    "Distance",
    "Gaussian",
    "InverseMultiquadric",
    "Kernel",
    "Laplace",
    "Mixture",
    "Polynomial",
    "RationalQuadratic",
    "energy_distance",
    "mmd",
    "mmd_v",
    "sliced_wasserstein",
    "wasserstein_1d",
]
