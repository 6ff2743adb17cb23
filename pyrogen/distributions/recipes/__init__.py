"""Functions that build a flow: one for each architecture of the literature."""

from .autoregressive import maf
from .coupling import nsf, realnvp

__all__ = ["maf", "nsf", "realnvp"]
