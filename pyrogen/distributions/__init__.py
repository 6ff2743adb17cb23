"""Objects to put in ``pyro.sample``."""

from .base import LikelihoodFree
from .diffusion import Denoiser, Diffused, Diffusion, ExactDenoiser, Preconditioned
from .flow import Flow, Transformed, maf, nsf, realnvp
from .generator import Generator, Pushforward
from .marginal import HeteroscedasticGaussian, HomoscedasticGaussian, LatentVariable, Marginal
from .samplers import Ancestral, FrozenScore, Heun, Multistep
from .trace import ExactTrace, Hutchinson

__all__ = [
    "Ancestral",
    "Denoiser",
    "Diffused",
    "Diffusion",
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
    "LikelihoodFree",
    "Marginal",
    "Multistep",
    "Preconditioned",
    "Pushforward",
    "Transformed",
    "maf",
    "nsf",
    "realnvp",
]
