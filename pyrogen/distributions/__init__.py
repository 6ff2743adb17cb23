"""Objects to put in ``pyro.sample``."""

from .base import LikelihoodFree
from .dequantized import (
    Dequantized,
    Dequantizer,
    Quantized,
    UniformDequantizer,
    VariationalDequantizer,
)
from .diffusion import Denoiser, Diffused, Diffusion, ExactDenoiser, Preconditioned
from .discretized import DiscretizedLogistic
from .flow import Flow
from .foreign import PyroLayer, ZukoFlow, import_zuko
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
from .mixture import FlowMixture, Mixture
from .noise import CircularNoise, MixtureNoise, StudentTNoise, UniformNoise
from .recipes import (
    bernstein,
    cnf,
    gaussianization,
    glow,
    iaf,
    maf,
    naf,
    ncsf,
    nice,
    nsf,
    planar,
    radial,
    realnvp,
    sospf,
    sylvester,
    triangular,
    umnn,
)
from .samplers import Ancestral, FrozenScore, Heun, Multistep
from .supports import circular
from .transformed import Transformed

__all__ = [
    "Ancestral",
    "BernoulliLogits",
    "CategoricalLevels",
    "CircularNoise",
    "CorrelatedGaussian",
    "Denoiser",
    "Dequantized",
    "Dequantizer",
    "Diffused",
    "Diffusion",
    "DiscretizedLogistic",
    "ExactDenoiser",
    "Flow",
    "FlowMixture",
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
    "Mixture",
    "MixtureNoise",
    "Multistep",
    "Preconditioned",
    "Pushforward",
    "PyroLayer",
    "Quantized",
    "StudentTNoise",
    "Transformed",
    "UniformDequantizer",
    "UniformNoise",
    "VariationalDequantizer",
    "ZukoFlow",
    "bernstein",
    "circular",
    "cnf",
    "gaussianization",
    "glow",
    "iaf",
    "import_zuko",
    "maf",
    "naf",
    "ncsf",
    "nice",
    "nsf",
    "planar",
    "radial",
    "realnvp",
    "sospf",
    "sylvester",
    "triangular",
    "umnn",
]
