"""Evidence lower bounds: each is a Pyro ``ELBO``, one idea a file."""

__all__ = ["ImportanceWeighted", "StickingTheLanding"]

from .importance_weighted import ImportanceWeighted
from .sticking import StickingTheLanding
