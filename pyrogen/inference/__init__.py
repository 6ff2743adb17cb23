"""From model and data to draws of the posterior, with a verdict on them."""

from .draws import posterior_draws
from .fidelity import Fidelity, Limits, fidelity
from .importance import WeightedPosterior, importance
from .neutra import NeuTra
from .reparam import AutoNoiseReparam, NoiseReparam

__all__ = [
    "AutoNoiseReparam",
    "Fidelity",
    "Limits",
    "NeuTra",
    "NoiseReparam",
    "WeightedPosterior",
    "fidelity",
    "importance",
    "posterior_draws",
]
