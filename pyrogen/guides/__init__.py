"""Learned posteriors q(z | x), as Pyro guides."""

__all__ = ["Amortized", "AutoFlow"]

from .amortized import Amortized
from .auto import AutoFlow
