"""From model and data to draws of the posterior, with a verdict on them."""

from .draws import posterior_draws
from .importance import WeightedPosterior, importance
from .reparam import AutoNoiseReparam, NoiseReparam

__all__ = [
    "AutoNoiseReparam",
    "NoiseReparam",
    "WeightedPosterior",
    "importance",
    "posterior_draws",
]
