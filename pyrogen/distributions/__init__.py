"""Objects to put in ``pyro.sample``."""

from .base import LikelihoodFree
from .diffusion import Denoiser, Diffused, Diffusion, ExactDenoiser, Preconditioned
from .discretized import DiscretizedLogistic
from .flow import Flow, Transformed
from .generator import Generator, Pushforward
from .levels import CategoricalLevels, LogisticLevels
from .likelihoods import (
    BernoulliLogits,
    CorrelatedGaussian,
    HeteroscedasticGaussian,
    HomoscedasticGaussian,
    Likelihood,
)
from .marginal import LatentVariable, Marginal
from .recipes import iaf, maf, nice, nsf, realnvp
from .samplers import Ancestral, FrozenScore, Heun, Multistep

__all__ = [
    "Ancestral",
    "BernoulliLogits",
    "CategoricalLevels",
    "CorrelatedGaussian",
    "Denoiser",
    "Diffused",
    "Diffusion",
    "DiscretizedLogistic",
    "ExactDenoiser",
    "Flow",
    "FrozenScore",
    "Generator",
    "HeteroscedasticGaussian",
    "Heun",
    "HomoscedasticGaussian",
    "LatentVariable",
    "Likelihood",
    "LikelihoodFree",
    "LogisticLevels",
    "Marginal",
    "Multistep",
    "Preconditioned",
    "Pushforward",
    "Transformed",
    "iaf",
    "maf",
    "nice",
    "nsf",
    "realnvp",
]
