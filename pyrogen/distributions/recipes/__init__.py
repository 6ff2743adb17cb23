"""Functions that build a flow: one for each architecture of the literature."""

from .autoregressive import iaf, maf
from .coupling import nice, nsf, realnvp

__all__ = ["iaf", "maf", "nice", "nsf", "realnvp"]
