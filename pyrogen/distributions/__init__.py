"""Objects to put in ``pyro.sample``."""

from .base import LikelihoodFree
from .diffusion import Denoiser, Diffused, Diffusion, ExactDenoiser, Preconditioned
from .discretized import DiscretizedLogistic
from .flow import Flow, Transformed, maf, nsf, realnvp
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
from .samplers import Ancestral, FrozenScore, Heun, Multistep
from .trace import ExactTrace, Hutchinson

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
    "ExactTrace",
    "Flow",
    "FrozenScore",
    "Generator",
    "HeteroscedasticGaussian",
    "Heun",
    "HomoscedasticGaussian",
    "Hutchinson",
    "LatentVariable",
    "Likelihood",
    "LikelihoodFree",
    "LogisticLevels",
    "Marginal",
    "Multistep",
    "Preconditioned",
    "Pushforward",
    "Transformed",
    "maf",
    "nsf",
    "realnvp",
]
