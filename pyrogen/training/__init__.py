"""Moving parameters: optimisation of objectives."""

from .adversarial import AdversarialTrainer
from .average import MovingAverage
from .base import Fitting
from .batches import Batches
from .checkpoint import load, save
from .history import History
from .trainer import Trainer

__all__ = [
    "AdversarialTrainer",
    "Batches",
    "Fitting",
    "History",
    "MovingAverage",
    "Trainer",
    "load",
    "save",
]
