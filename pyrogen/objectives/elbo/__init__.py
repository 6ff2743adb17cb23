"""Variational bounds and their gradients: each bound is a Pyro ``ELBO``, one idea a file."""

__all__ = [
    "ELBO",
    "Annealing",
    "Baseline",
    "Bound",
    "ChiSquared",
    "DoublyReparameterized",
    "FDivergence",
    "Gradient",
    "ImportanceWeighted",
    "Learned",
    "LeaveOneOut",
    "MovingAverage",
    "MultiSample",
    "NoBaseline",
    "Rebar",
    "Renyi",
    "Reparameterized",
    "ReweightedWakeSleep",
    "ScoreFunction",
    "StraightThrough",
    "TailAdaptive",
    "Tempered",
    "Thermodynamic",
]

from .base import Bound
from .baselines import Baseline, Learned, LeaveOneOut, MovingAverage, NoBaseline
from .divergence import FDivergence, TailAdaptive
from .evidence import ELBO, Annealing, Tempered
from .gradients import DoublyReparameterized, Gradient, Reparameterized, ScoreFunction
from .importance_weighted import ChiSquared, ImportanceWeighted, Renyi
from .multi_sample import MultiSample
from .rebar import Rebar
from .relaxed import StraightThrough
from .thermodynamic import Thermodynamic
from .wake_sleep import ReweightedWakeSleep
