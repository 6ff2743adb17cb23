"""From two sets of draws, or the ratio of two densities, to a number, differentiable."""

from .f import alpha_divergence, jensen_shannon, kl, neyman, pearson, reverse_kl, squared_hellinger
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
    "alpha_divergence",
    "energy_distance",
    "jensen_shannon",
    "kl",
    "mmd",
    "mmd_v",
    "neyman",
    "pearson",
    "reverse_kl",
    "sliced_wasserstein",
    "squared_hellinger",
    "wasserstein_1d",
]
