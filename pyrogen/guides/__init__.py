"""Learned posteriors q(z | x), as Pyro guides."""

__all__ = [
    "Amortized",
    "AutoFlow",
    "Descent",
    "Diagonal",
    "Family",
    "FlowFamily",
    "FullCovariance",
    "Local",
    "LowRank",
    "Mixed",
    "Pathfinder",
    "Refined",
    "Refinement",
    "Unrolled",
    "VariationalEM",
]

from .amortized import Amortized
from .auto import AutoFlow
from .families import Diagonal, Family, FlowFamily, FullCovariance, LowRank
from .local import Local
from .mixed import Mixed
from .pathfinder import Pathfinder
from .refined import Refined
from .refinement import Descent, Refinement, Unrolled
from .variational_em import VariationalEM
