"""Losses to minimise: modules from a batch to a scalar, in nats, averaged over the batch."""

from .adversarial import (
    CriticLoss,
    Game,
    GeneratorLoss,
    NonSaturating,
    Relativistic,
    ZeroCentred,
)
from .elbo import ImportanceWeighted, StickingTheLanding
from .likelihood import MaximumLikelihood
from .score import DenoisingScore, UniformTime, edm_weight

__all__ = [
    "CriticLoss",
    "DenoisingScore",
    "Game",
    "GeneratorLoss",
    "ImportanceWeighted",
    "MaximumLikelihood",
    "NonSaturating",
    "Relativistic",
    "StickingTheLanding",
    "UniformTime",
    "ZeroCentred",
    "edm_weight",
]
